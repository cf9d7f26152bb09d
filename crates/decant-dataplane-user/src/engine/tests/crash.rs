//! A process killed at its writes and at each crash point, and a host that loses power.

use std::collections::BTreeMap;
use std::io::{BufRead, BufReader};
use std::os::unix::fs::FileExt;
use std::process::{Command, Stdio};

use decant_base::{BLOCK, Epoch, ExtentSet};

use super::super::*;
use super::fixture::*;

const BLOCKS: u64 = 256;
const CHILD: &str = "DECANT_TEST_ENGINE_CHILD";
const LIFE: &str = "DECANT_TEST_ENGINE_LIFE";

fn scale() -> f64 {
    std::env::var("DECANT_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0)
}

/// What step `n` of the writer does: a block, and whether it discards it. A pure function, so that the parent knows the next one.
fn step(seed: u64, n: u64) -> (u64, bool) {
    let mut random = Random(seed << 32 | n);
    (random.below(BLOCKS), random.below(5) == 0)
}

fn expected(block: u64, version: Option<u64>, seed: u64) -> Vec<u8> {
    match version {
        Some(n) if step(seed, n).1 => vec![0; 4096],
        version => plaintext(block * BLOCK, 4096, version.unwrap_or(0)),
    }
}

/// No test of its own: the process that [`a_killed_process_loses_nothing_it_acknowledged`] kills. It fills from an origin, writes,
/// and says on its standard output what was acknowledged.
#[test]
fn child() {
    let Ok(work) = std::env::var(CHILD) else { return };
    let (directory, seed) = work.rsplit_once('#').unwrap();
    let (seed, shape) = (seed.parse().unwrap(), Shape::new(BLOCKS * BLOCK, 4096).unwrap());
    let engine = open_in(directory.as_ref(), shape, Mode::Clone, &Arc::default()).unwrap();
    let live = [decant_base::Extent { start: 0, length: BLOCKS }].into_iter().collect();
    let origin = origin_of(shape, &live);
    engine.set_limit(Some(4 << 20));
    origin.attach(&engine);
    for n in 1.. {
        let (block, discards) = step(seed, n);
        if discards {
            engine.discard(block * BLOCK, BLOCK).unwrap();
        } else {
            engine.write(block * BLOCK, &mut plaintext(block * BLOCK, 4096, n)).unwrap();
        }
        println!("\nacknowledged {n}");
        if n % 16 == 0 {
            engine.flush().unwrap();
        }
        if n % 7 == 0 {
            let _ = read(&engine, (n * 31 % BLOCKS) * BLOCK, 4096).unwrap();
        }
    }
}

/// No test of its own: begins a clone, fills, verifies and drops it, and dies somewhere on the way.
#[test]
fn life() {
    let Ok(directory) = std::env::var(LIFE) else { return };
    let shape = Shape::new(BLOCKS * BLOCK, 4096).unwrap();
    let live: ExtentSet = [decant_base::Extent { start: 0, length: BLOCKS }].into_iter().collect();
    let engine = open_in(directory.as_ref(), shape, Mode::Prepared, &Arc::default()).unwrap();
    engine.begin(live.clone(), Epoch(3)).unwrap();
    origin_of(shape, &live).attach(&engine);
    hydrate(&engine);
    engine.verify().unwrap();
    engine.drop_map().unwrap();
}

#[test]
fn a_process_killed_at_any_turn_of_a_clones_life_goes_on_from_there() {
    for point in ["map:created", "map:complete", "map:dropped"] {
        let volume = Volume::new(BLOCKS * BLOCK, 4096, &[(0, BLOCKS)]);
        let mut command = Command::new(std::env::current_exe().unwrap());
        command.args(["--exact", "engine::tests::crash::life", "--nocapture", "--test-threads=1"]);
        command
            .env(LIFE, volume.directory.path())
            .env("DECANT_CRASH", point)
            .stdout(Stdio::null())
            .stderr(Stdio::null());
        let status = command.status().unwrap();
        assert!(!status.success() && status.code().is_none(), "{point}: it ended with {status}");
        let engine = match point {
            // The caller has not heard that it was begun, and says so again.
            "map:created" => {
                let engine = volume.try_open(Mode::Prepared).unwrap();
                engine.begin(volume.live.clone(), Epoch(3)).unwrap();
                volume.origin().attach(&engine);
                hydrate(&engine);
                engine
            }
            // It has not heard that all was verified, asks again, and gets the same answer without an origin.
            "map:complete" => volume.try_open(Mode::Clone).unwrap(),
            _ => volume.try_open(Mode::Plain).unwrap(),
        };
        if point != "map:dropped" {
            assert_eq!(engine.verify().unwrap().compared, BLOCKS, "{point}");
            engine.drop_map().unwrap();
        }
        assert!(engine.is_plain());
        (0..BLOCKS).for_each(|block| {
            assert_eq!(read(&engine, block * BLOCK, 4096).unwrap(), expected(block, None, 0), "{point}")
        });
    }
}

/// Runs a writer until it dies at `crash`, or after `acknowledged` writes; then opens the volume and checks it.
fn kill_and_check(seed: u64, crash: Option<&str>, acknowledged: u64) -> u64 {
    let volume = Volume::new(BLOCKS * BLOCK, 4096, &[(0, BLOCKS)]);
    drop(volume.begun());
    let mut command = Command::new(std::env::current_exe().unwrap());
    command.args(["--exact", "engine::tests::crash::child", "--nocapture", "--test-threads=1"]);
    command
        .env(CHILD, format!("{}#{seed}", volume.directory.path().display()))
        .stdout(Stdio::piped())
        .stderr(Stdio::null());
    if let Some(crash) = crash {
        command.env("DECANT_CRASH", crash);
    }
    let mut child = command.spawn().unwrap();
    let mut last = 0;
    for line in BufReader::new(child.stdout.take().unwrap()).lines() {
        if let Some(n) = line.unwrap().strip_prefix("acknowledged ") {
            last = n.parse().unwrap();
        }
        if last == acknowledged {
            child.kill().unwrap();
        }
    }
    let status = child.wait().unwrap();
    assert!(!status.success() && status.code().is_none(), "{crash:?}: it ended with {status} after {last}");

    let engine = volume.try_open(Mode::Clone).unwrap_or_else(|error| panic!("{crash:?}, seed {seed}: {error}"));
    volume.origin().attach(&engine);
    let mut versions: BTreeMap<u64, u64> = BTreeMap::new();
    (1..=last).for_each(|n| {
        versions.insert(step(seed, n).0, n);
    });
    let check = |engine: &Engine| {
        for block in 0..BLOCKS {
            let got = read(engine, block * BLOCK, 4096).unwrap();
            // The write under way may have landed in part; it has one block.
            let under_way = step(seed, last + 1).0 == block;
            let want = expected(block, versions.get(&block).copied(), seed);
            assert!(got == want || under_way, "{crash:?}, seed {seed}: block {block} after {last} writes");
        }
    };
    check(&engine);
    hydrate(&engine);
    let verification = engine.verify().unwrap();
    assert_eq!(verification.repaired, 0, "{crash:?}, seed {seed}: {verification:?}");
    check(&engine);
    last
}

#[test]
fn a_killed_process_loses_nothing_it_acknowledged() {
    for seed in 0..(3.0 * scale()).max(1.0) as u64 {
        assert!(kill_and_check(seed, None, 40 + seed * 97) >= 40);
    }
}

#[test]
fn a_process_killed_at_any_point_of_a_commit_loses_nothing_it_acknowledged() {
    for (seed, point) in
        (50..).zip(["map:data-synced", "map:pages-written", "map:committed", "map:intent", "map:marked"])
    {
        for nth in [1, 3].into_iter().filter(|&nth| nth == 1 || point != "map:intent") {
            kill_and_check(seed, Some(&format!("{point}#{nth}")), u64::MAX);
        }
    }
}

// ---- power ----

#[derive(Clone, Copy, PartialEq, Eq)]
enum File {
    Image,
    Map,
}

enum Event {
    Write(File, u64, Vec<u8>),
    /// A sync returned; it covers what came before this index.
    Synced(File, usize),
    /// A write of this version was issued.
    Issued(u64, u64),
    /// A flush returned; per block the version acknowledged when it was called.
    Flushed(BTreeMap<u64, u64>),
}

type Log = Arc<Mutex<Vec<Event>>>;

struct Recorded {
    inner: Arc<dyn Medium>,
    file: File,
    log: Log,
}

impl Medium for Recorded {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.inner.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.log.lock().unwrap().push(Event::Write(self.file, offset, data.to_vec()));
        self.inner.write_at(offset, data)
    }
    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.log.lock().unwrap().push(Event::Write(self.file, offset, vec![0; length as usize]));
        self.inner.punch(offset, length)
    }
    fn sync(&self) -> Result<(), Errno> {
        let covers = self.log.lock().unwrap().len();
        self.inner.sync()?;
        self.log.lock().unwrap().push(Event::Synced(self.file, covers));
        Ok(())
    }
    fn data_in(&self, range: Range<u64>) -> Result<ExtentSet, Errno> {
        self.inner.data_in(range)
    }
    fn length(&self) -> Result<u64, Errno> {
        self.inner.length()
    }
}

struct RecordedDisk {
    files: Files,
    image: Arc<dyn Medium>,
    log: Log,
}

impl Disk for RecordedDisk {
    fn image(&self) -> &Arc<dyn Medium> {
        &self.image
    }
    fn open_map(&self) -> Result<Option<Arc<dyn Medium>>, Errno> {
        let wrap = |inner| Arc::new(Recorded { inner, file: File::Map, log: self.log.clone() }) as Arc<dyn Medium>;
        Ok(self.files.open_map()?.map(wrap))
    }
    fn create_map(&self, _: u64, _: &[(u64, Vec<u8>)]) -> Result<Arc<dyn Medium>, Errno> {
        Err(Errno::NOTSUP)
    }
    fn remove_map(&self) -> Result<(), Errno> {
        self.files.remove_map()
    }
    fn open_marks(&self, fresh: bool) -> Result<Arc<dyn Medium>, Errno> {
        self.files.open_marks(fresh)
    }
    fn remove_marks(&self) -> Result<(), Errno> {
        self.files.remove_marks()
    }
    fn note_failure(&self, why: &str) {
        self.files.note_failure(why);
    }
    fn failure(&self) -> Option<Note> {
        self.files.failure()
    }
}

fn open_recorded(volume: &Volume, log: &Log, boot: &str) -> Arc<Engine> {
    let path = volume.image();
    let files = Files::new(open_image(&path).unwrap(), &path, BASE, volume.shape.size(), path.with_extension("map"));
    let image = Arc::new(Recorded { inner: files.image().clone(), file: File::Image, log: log.clone() });
    Engine::open(Options {
        volume: "orders".parse().unwrap(),
        shape: volume.shape,
        mode: Mode::Clone,
        disk: Arc::new(RecordedDisk { files, image, log: log.clone() }),
        cipher: cipher(4096),
        boot: boot.to_owned(),
    })
    .unwrap()
}

/// Writes, discards and flushes while the volume fills, and records everything.
fn record(volume: &Volume, log: &Log, seed: u64) {
    let engine = open_recorded(volume, log, "first boot");
    let origin = volume.origin();
    engine.set_limit(Some(12 << 20));
    origin.attach(&engine);
    let mut versions = BTreeMap::new();
    for n in 1..=400 {
        let (block, discards) = step(seed, n);
        log.lock().unwrap().push(Event::Issued(block, n));
        if discards {
            engine.discard(block * BLOCK, BLOCK).unwrap();
        } else {
            engine.write(block * BLOCK, &mut plaintext(block * BLOCK, 4096, n)).unwrap();
        }
        versions.insert(block, n);
        if n % 10 == 0 {
            engine.flush().unwrap();
            log.lock().unwrap().push(Event::Flushed(versions.clone()));
        }
        if n % 50 == 0 {
            engine.commit(Scope::All).unwrap();
        }
        if n % 9 == 0 {
            let _ = read(&engine, (n * 31 % BLOCKS) * BLOCK, 4096).unwrap();
        }
    }
    engine.drop_origin();
}

/// The files as a power cut after `cut` events leaves them.
fn lay_out(volume: &Volume, map: &[u8], events: &[Event], random: &mut Random) {
    let covered = |file: File| {
        let synced = |event: &Event| matches!(event, Event::Synced(of, _) if *of == file);
        match events.iter().rev().find(|event| synced(event)) {
            Some(Event::Synced(_, covers)) => *covers,
            _ => 0,
        }
    };
    let (image_covered, map_covered) = (covered(File::Image), covered(File::Map));
    let (mut image, mut map) = (vec![0; volume.shape.size() as usize], map.to_vec());
    let mode = random.below(3);
    for (index, event) in events.iter().enumerate() {
        let Event::Write(of, offset, data) = event else { continue };
        let (file, covered) = if *of == File::Image { (&mut image, image_covered) } else { (&mut map, map_covered) };
        let whole = index < covered || mode == 0 || (mode == 1 && random.below(2) == 0);
        for (block, data) in (*offset as usize..).step_by(4096).zip(data.chunks(4096)) {
            let place = &mut file[block..block + data.len()];
            // A block turns from hole to data, or back, as one: that is metadata of the file system.
            let grain = if *of == File::Image && (decant_luks2::is_zero(place) || decant_luks2::is_zero(data)) {
                4096
            } else {
                512
            };
            for (place, sector) in place.chunks_mut(grain).zip(data.chunks(grain)) {
                if whole || (mode == 2 && random.below(2) == 0) {
                    place.copy_from_slice(sector);
                }
            }
        }
    }
    let path = volume.image();
    let file = std::fs::File::create(&path).unwrap();
    file.set_len(BASE + volume.shape.size()).unwrap();
    file.write_all_at(&image, BASE).unwrap();
    std::fs::write(path.with_extension("map"), map).unwrap();
}

/// Sectors of `block` after a power cut: each as flushed or as any later write.
fn check_block(block: u64, got: &[u8], allowed: &[Option<u64>], seed: u64, cut: usize) {
    let candidates: Vec<Vec<u8>> = allowed.iter().map(|&version| expected(block, version, seed)).collect();
    for at in (0..4096).step_by(512) {
        let fits = candidates.iter().any(|want| want[at..at + 512] == got[at..at + 512]);
        assert!(fits, "seed {seed}, cut {cut}: block {block} byte {at} is none of {allowed:?}");
    }
}

fn cut_power(seed: u64, cuts: u64) {
    let volume = Volume::new(BLOCKS * BLOCK, 4096, &[(0, BLOCKS)]);
    drop(volume.begun());
    let map = std::fs::read(volume.directory.path().join("volume.map")).unwrap();
    let log = Log::default();
    record(&volume, &log, seed);
    let events = std::mem::take(&mut *log.lock().unwrap());
    let mut random = Random(seed ^ 0xC0FFEE);
    for _ in 0..cuts {
        let cut = random.below(events.len() as u64) as usize;
        let events = &events[..cut];
        let mut allowed: BTreeMap<u64, Vec<Option<u64>>> = (0..BLOCKS).map(|block| (block, vec![None])).collect();
        for event in events {
            match event {
                Event::Issued(block, version) => allowed.get_mut(block).unwrap().push(Some(*version)),
                Event::Flushed(versions) => {
                    for (block, version) in versions {
                        allowed.get_mut(block).unwrap().retain(|v| *v >= Some(*version));
                    }
                }
                _ => {}
            }
        }
        lay_out(&volume, &map, events, &mut random);
        let engine = open_recorded(&volume, &Log::default(), &format!("boot after {cut}"));
        volume.origin().attach(&engine);
        let all =
            |engine: &Engine| (0..BLOCKS).map(|block| read(engine, block * BLOCK, 4096).unwrap()).collect::<Vec<_>>();
        let seen = all(&engine);
        (0..).zip(&seen).for_each(|(block, got)| check_block(block, got, &allowed[&block], seed, cut));
        hydrate(&engine);
        assert_eq!(engine.verify().unwrap().repaired, 0, "seed {seed}, cut {cut}");
        assert!(all(&engine) == seen, "seed {seed}, cut {cut}: what was read once changed without a write");
    }
}

#[test]
fn a_power_cut_at_any_moment_loses_nothing_that_was_flushed() {
    for seed in 0..(2.0 * scale()).max(1.0) as u64 {
        cut_power(seed, 24);
    }
}
