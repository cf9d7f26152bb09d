//! The clone against a naive model, over media that lose and tear what was not synced.
//!
//! One thread takes random steps: guest writes of any sector multiple, discards, flushes, background commits, fetches that
//! arrive in pieces, each cut into begin, bytes and end so that they interleave; kills, power cuts and orderly closes. At
//! every sync and at random moments the media are copied as a crash would leave them, opened, and every sector compared:
//! it must read as the last flushed write or any later one, never as anything else. `DECANT_TEST_SCALE` multiplies the
//! cases; a failure prints its seed, and `DECANT_TEST_SEED` runs one.

use std::collections::BTreeMap;
use std::ops::Range;
use std::time::Duration;

use decant_base::{Extent, ExtentSet};
use decant_clone::file::{Found, set_intent};
use decant_clone::marks::{HEAD, Mark, RECORD, head, offset_of};
use decant_clone::{
    Arrival, Begin, BlockMap, Came, CloneCore, Commit, Identity, Kind, MapFile, Plan, Scope, Shape, State, SyncedWrite,
    WriteId,
};

struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }

    fn one_in(&mut self, n: u64) -> bool {
        self.below(n) == 0
    }
}

/// A file of sectors with what was written since its last sync. `T` is a sector's content.
#[derive(Clone)]
struct Disk<T: Copy> {
    cache: Vec<T>,
    durable: Vec<T>,
    /// (sector, content), in order.
    pending: Vec<(usize, T)>,
}

impl<T: Copy> Disk<T> {
    fn new(sectors: usize, zero: T) -> Self {
        Self { cache: vec![zero; sectors], durable: vec![zero; sectors], pending: Vec::new() }
    }

    fn write(&mut self, sector: usize, content: T) {
        self.cache[sector] = content;
        self.pending.push((sector, content));
    }

    fn sync(&mut self) {
        for (sector, content) in self.pending.drain(..) {
            self.durable[sector] = content;
        }
    }

    /// Any subset of the unsynced sectors lands: all, none, or each by its own coin, so that every write may tear.
    fn power_cut(&mut self, random: &mut Random) {
        let mode = random.below(4);
        for (sector, content) in std::mem::take(&mut self.pending) {
            if mode == 0 || mode > 1 && random.one_in(2) {
                self.durable[sector] = content;
            }
        }
        self.cache.clone_from(&self.durable);
    }
}

type Sector = [u8; 512];

#[derive(Clone)]
struct Media {
    image: Disk<u64>,
    map: Disk<Sector>,
    marks: Vec<u8>,
    boot: u64,
}

impl Media {
    fn write_map(&mut self, offset: u64, bytes: &[u8]) {
        for (index, sector) in bytes.chunks(512).enumerate() {
            let mut content = [0; 512];
            content[..sector.len()].copy_from_slice(sector);
            self.map.write(offset as usize / 512 + index, content);
        }
    }

    fn write_marks(&mut self, mark: &Mark) {
        let at = mark.offset() as usize;
        self.marks.resize(self.marks.len().max(at + RECORD), 0);
        self.marks[at..at + RECORD].copy_from_slice(&mark.encode());
    }

    fn boot_id(&self) -> String {
        format!("boot-{}", self.boot)
    }
}

#[derive(Clone)]
struct World {
    shape: Shape,
    live: ExtentSet,
    zones: Vec<Range<u64>>,
}

impl World {
    fn origin(&self, sector: u64) -> u64 {
        if self.live.contains(sector / 8) { 1 << 40 | sector } else { 0 }
    }

    fn identity(&self, media: &Media) -> Identity {
        Identity { volume: "v".into(), shape: self.shape, epoch: Some(3), boot: media.boot_id() }
    }

    fn sectors(&self) -> impl Iterator<Item = u64> + '_ {
        self.zones.iter().flat_map(|zone| zone.start * 8..(zone.end * 8).min(self.shape.sectors()))
    }
}

/// A guest write between its begin and its acknowledgement.
struct Write {
    id: Option<WriteId>,
    sectors: Range<u64>,
    tag: u64,
    landed: Vec<bool>,
}

struct Store {
    arrival: Arrival<()>,
    landed: usize,
}

enum Committing {
    Snapshot(Option<Commit>),
    Synced(Commit, usize),
    Done(Commit),
}

struct Flush {
    stage: Committing,
    /// Per sector, how many of its versions were acknowledged when it began; `None` for a background commit.
    acknowledged: Option<BTreeMap<u64, usize>>,
}

struct Run {
    world: World,
    media: Media,
    core: CloneCore<()>,
    random: Random,
    now: Duration,
    /// Per sector: the last flushed version, then every later one, oldest first. The last may be unacknowledged.
    history: BTreeMap<u64, Vec<u64>>,
    writes: Vec<Write>,
    fetches: Vec<(Plan, u64)>,
    stores: Vec<Store>,
    flush: Option<Flush>,
    next_tag: u64,
    seed: u64,
    forks: u64,
}

impl Drop for Run {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!(
                "seed {} with sectors of {}: DECANT_TEST_SEED={} repeats it",
                self.seed,
                self.world.shape.sector_size(),
                self.seed
            );
        }
    }
}

fn open(world: &World, media: &mut Media, now: Duration) -> CloneCore<()> {
    media.map.sync();
    let identity = world.identity(media);
    let cache = &media.map.cache;
    let mut read = |at: u64, buffer: &mut [u8]| {
        for (index, chunk) in buffer.chunks_mut(512).enumerate() {
            chunk.copy_from_slice(&cache[at as usize / 512 + index][..chunk.len()]);
        }
        Ok(())
    };
    let mut data = ExtentSet::new();
    data.insert(0..cache.len() as u64 * 512);
    let (file, map, found) = MapFile::open(&mut read, cache.len() as u64 * 512, &data, &identity)
        .unwrap_or_else(|error| panic!("open: {error}"));
    let mut core = CloneCore::new(map, file, now);
    assert!(found != Found::Complete);
    if found == Found::Killed {
        let expected = head("v", 3, &media.boot_id());
        assert_eq!(media.marks[..HEAD], expected[..], "the marks file of this boot");
        let numbers = (media.marks.len() - HEAD) / RECORD;
        for number in 0..numbers as u64 {
            let at = offset_of(number) as usize;
            if let Some(mark) = Mark::decode(number, media.marks[at..at + RECORD].try_into().unwrap()) {
                core.replay(&mark);
            }
        }
    } else {
        media.marks = head("v", 3, &media.boot_id()).to_vec();
        commit_all(&mut core, media);
        let update = core.parts().0.begin_update(|superblock| {
            superblock.clean = false;
            superblock.boot = identity.boot.clone();
            superblock.intents.fill(0);
        });
        write_synced(&mut core, media, &update);
    }
    core
}

fn write_synced(core: &mut CloneCore<()>, media: &mut Media, update: &SyncedWrite) {
    media.write_map(update.offset, &update.bytes[..]);
    media.map.sync();
    core.parts().0.end_update();
}

fn commit_all(core: &mut CloneCore<()>, media: &mut Media) {
    let (file, map) = core.parts();
    let Some(commit) = file.begin_commit(map, Scope::All) else { return };
    media.image.sync();
    for write in &commit.writes {
        media.write_map(write.offset, &write.bytes[..]);
    }
    media.map.sync();
    core.parts().0.end_commit(commit);
}

impl Run {
    fn new(seed: u64, sector_size: u32) -> Self {
        let mut random = Random(seed);
        let (blocks, zones) = match sector_size {
            512 => (2100, vec![0..20, 2006..2026, 2090..2101]),
            _ => (16_500, vec![0..20, 16_118..16_138, 16_374..16_394, 16_490..16_500]),
        };
        let size = blocks * 4096 + if sector_size == 512 { 1024 } else { 0 };
        let mut live = ExtentSet::new();
        for zone in &zones {
            let start = zone.start + random.below(6);
            live.insert(start..zone.end - random.below(4));
            live.remove(start + 5..start + 5 + random.below(4));
        }
        live = live.iter().map(|run| Extent { start: run.start, length: run.length }).collect();
        let world = World { shape: Shape::new(size, sector_size).unwrap(), live, zones };
        let map_sectors = 16 + 8 + world.shape.pages() as usize * 16;
        let mut media = Media {
            image: Disk::new(world.shape.sectors() as usize, 0),
            map: Disk::new(map_sectors, [0; 512]),
            marks: Vec::new(),
            boot: 1,
        };
        media.marks = head("v", 3, &media.boot_id()).to_vec();
        let (file, writes) = MapFile::create(&world.identity(&media), &world.live);
        for (at, bytes) in writes {
            media.write_map(at, &bytes);
        }
        media.map.sync();
        let now = Duration::from_secs(1);
        let core = CloneCore::new(BlockMap::new(world.shape, world.live.clone()), file, now);
        let history = world.sectors().map(|sector| (sector, vec![world.origin(sector)])).collect();
        let mut run = Self {
            world,
            media,
            core,
            random,
            now,
            history,
            writes: Vec::new(),
            fetches: Vec::new(),
            stores: Vec::new(),
            flush: None,
            next_tag: 2 << 40,
            seed,
            forks: 0,
        };
        run.core.handle_link(now, true, "up", &mut Vec::new());
        run
    }

    fn go(&mut self, steps: u64) {
        for _ in 0..steps {
            self.now += Duration::from_micros(self.random.below(900));
            match self.random.below(64) {
                0..16 => self.begin_write(),
                16..30 => self.step_write(),
                30..34 => self.begin_flush(),
                34..42 => self.step_flush(),
                42..46 => self.fetch(),
                46..56 => self.step_fetch(),
                56..60 => self.step_store(),
                60 => self.read(),
                61 => self.verify(),
                62 => self.fork(),
                _ if self.random.one_in(4) => self.restart(),
                _ => {}
            }
        }
        self.fork();
    }

    fn begin_write(&mut self) {
        let zone = self.world.zones[self.random.below(self.world.zones.len() as u64) as usize].clone();
        let unit = u64::from(self.world.shape.sector_size()) / 512;
        let zone = zone.start * 8..(zone.end * 8).min(self.world.shape.sectors());
        let start = zone.start + self.random.below((zone.end - zone.start) / unit) * unit;
        let longest = if self.random.one_in(4) { 40 } else { 4 };
        let length = (1 + self.random.below(longest)) * unit;
        let sectors = start..(start + length).min(zone.end);
        if self.writes.iter().any(|write| write.sectors.start < sectors.end && sectors.start < write.sectors.end) {
            return;
        }
        let kind = if self.random.one_in(4) { Kind::Discarded } else { Kind::Written };
        let id = match self.core.begin_write(&sectors, kind) {
            Begin::Busy => return,
            Begin::Intents if matches!(self.flush, Some(Flush { stage: Committing::Synced(..), .. })) => return,
            Begin::Intents => {
                let regions = self.core.missing_intents(&sectors);
                let update =
                    self.core.parts().0.begin_update(|sb| regions.iter().for_each(|&region| set_intent(sb, region)));
                write_synced(&mut self.core, &mut self.media, &update);
                return;
            }
            Begin::Free => None,
            Begin::Tracked { id, adopted } => {
                adopted.iter().for_each(|mark| self.media.write_marks(mark));
                Some(id)
            }
        };
        let tag = if kind == Kind::Discarded { 0 } else { self.next_tag };
        self.next_tag += 1;
        for sector in sectors.clone() {
            self.history.get_mut(&sector).unwrap().push(tag);
        }
        let landed = vec![false; (sectors.end - sectors.start) as usize];
        self.writes.push(Write { id, sectors, tag, landed });
    }

    fn step_write(&mut self) {
        if self.writes.is_empty() {
            return;
        }
        let index = self.random.below(self.writes.len() as u64) as usize;
        let write = &mut self.writes[index];
        if let Some(at) = write.landed.iter().position(|landed| !landed) {
            let end = if self.random.one_in(3) { at + 1 } else { write.landed.len() };
            for offset in at..end {
                write.landed[offset] = true;
                self.media.image.write(write.sectors.start as usize + offset, write.tag);
            }
            return;
        }
        let write = self.writes.swap_remove(index);
        let mut ready = Vec::new();
        if let Some(mark) = write.id.and_then(|id| self.core.end_write(id, true, &mut ready)) {
            self.media.write_marks(&mark);
        }
        for read in ready {
            assert!(self.core.is_here(&read.sectors));
        }
    }

    /// How many versions of `sector` are acknowledged: all but the one of a write under way.
    fn acknowledged(&self, sector: u64) -> usize {
        self.history[&sector].len() - usize::from(self.writes.iter().any(|write| write.sectors.contains(&sector)))
    }

    fn begin_flush(&mut self) {
        if self.flush.is_some() {
            return;
        }
        let scope = if self.random.one_in(3) { Scope::All } else { Scope::Flush };
        let (file, map) = self.core.parts();
        let commit = file.begin_commit(map, scope);
        let acknowledged =
            (scope == Scope::Flush).then(|| self.world.sectors().map(|s| (s, self.acknowledged(s))).collect());
        self.flush = Some(Flush { stage: Committing::Snapshot(commit), acknowledged });
    }

    fn step_flush(&mut self) {
        let Some(flush) = &mut self.flush else { return };
        let next = match std::mem::replace(&mut flush.stage, Committing::Snapshot(None)) {
            Committing::Snapshot(commit) => {
                self.media.image.sync();
                match commit {
                    Some(commit) => Committing::Synced(commit, 0),
                    None => return self.flushed(),
                }
            }
            Committing::Synced(commit, written) if written < commit.writes.len() => {
                let write = &commit.writes[written];
                self.media.write_map(write.offset, &write.bytes[..]);
                Committing::Synced(commit, written + 1)
            }
            Committing::Synced(commit, _) => {
                self.fork();
                self.media.map.sync();
                Committing::Done(commit)
            }
            Committing::Done(commit) => {
                self.core.parts().0.end_commit(commit);
                return self.flushed();
            }
        };
        if let Some(flush) = &mut self.flush {
            flush.stage = next;
        }
    }

    fn flushed(&mut self) {
        let flush = self.flush.take().unwrap();
        for (sector, versions) in flush.acknowledged.into_iter().flatten() {
            self.history.get_mut(&sector).unwrap().drain(..versions - 1);
        }
        self.fork();
    }

    fn fetch(&mut self) {
        let mut plans = Vec::new();
        if self.random.one_in(2) {
            self.core.poll(self.now, &mut plans);
        } else {
            let sectors: Vec<u64> = self.world.sectors().collect();
            let at = sectors[self.random.below(sectors.len() as u64) as usize] / 8 * 8;
            let end = (at + 8 * (1 + self.random.below(3))).min(self.world.shape.sectors());
            let _ = self.core.park(self.now, at..end, (), &mut plans);
        }
        for plan in plans {
            for (other, at) in &self.fetches {
                assert!(
                    plan.blocks.end <= *at || other.blocks.end <= plan.blocks.start,
                    "fetched twice: {plan:?} and {other:?}"
                );
            }
            let here = plan.blocks.clone().find(|&block| self.core.map().entry(block).state != State::Missing);
            assert_eq!(here, None, "a block that is here is fetched");
            let start = plan.blocks.start;
            self.fetches.push((plan, start));
        }
    }

    /// The next piece of a fetch arrives, in order within the fetch, fetches in any order.
    fn step_fetch(&mut self) {
        if self.fetches.is_empty() {
            return;
        }
        let index = self.random.below(self.fetches.len() as u64) as usize;
        let (plan, at) = &mut self.fetches[index];
        if *at < plan.blocks.end {
            let piece = *at..(*at + 1 + self.random.below(16)).min(plan.blocks.end);
            *at = piece.end;
            let mut arrival = Arrival::new();
            let token = plan.token;
            self.core.begin_store(self.now, token, piece, Came::Data, &mut arrival);
            for read in arrival.direct.drain(..) {
                for sector in read.sectors {
                    assert_eq!(
                        self.history[&sector].last(),
                        Some(&self.world.origin(sector)),
                        "sector {sector}: a stale answer"
                    );
                }
            }
            self.stores.push(Store { arrival, landed: 0 });
            return;
        }
        // An origin's thread stores what it got before it says that the fetch is done.
        if self.stores.is_empty() {
            let (plan, _) = self.fetches.swap_remove(index);
            self.core.fetch_done(self.now, plan.token, true, &mut Vec::new());
        }
    }

    fn step_store(&mut self) {
        let Some(store) = self.stores.last_mut() else { return };
        if let Some(sectors) = store.arrival.store.get(store.landed) {
            for sector in sectors.clone() {
                self.media.image.write(sector as usize, self.world.origin(sector));
            }
            store.landed += 1;
            return;
        }
        let mut store = self.stores.pop().unwrap();
        let landed = !self.random.one_in(12);
        self.core.end_store(&mut store.arrival, landed);
        for read in store.arrival.ready.drain(..) {
            assert!(self.core.is_here(&read.sectors));
        }
    }

    /// What the guest would read of `sector`.
    fn seen(world: &World, core: &CloneCore<()>, media: &Media, sector: u64) -> u64 {
        if core.is_here(&(sector..sector + 1)) { media.image.cache[sector as usize] } else { world.origin(sector) }
    }

    fn read(&mut self) {
        for (&sector, versions) in &self.history {
            let seen = Self::seen(&self.world, &self.core, &self.media, sector);
            let acknowledged = self.acknowledged(sector);
            assert!(
                versions[acknowledged - 1..].contains(&seen),
                "sector {sector} reads {seen:#x}, not of {versions:x?}"
            );
        }
    }

    /// No fetched block differs from the origin on a medium that keeps what it is given.
    fn verify(&mut self) {
        let map = self.core.map();
        let mut at = 0;
        while let Some(run) = map.next_in(at..self.world.shape.blocks(), State::Fetched) {
            at = run.end;
            for block in run.filter(|&block| map.entry(block).mask == 0) {
                let sectors = block * 8..(block * 8 + 8).min(self.world.shape.sectors());
                let same =
                    sectors.clone().all(|sector| self.media.image.cache[sector as usize] == self.world.origin(sector));
                assert!(
                    same,
                    "block {block} is marked fetched and holds {:x?}",
                    &self.media.image.cache[sectors.start as usize..sectors.end as usize]
                );
            }
        }
    }

    /// A power cut now, on copies: what would be read after it.
    fn fork(&mut self) {
        self.forks += 1;
        let mut media = self.media.clone();
        self.power_cut(&mut media);
        let core = open(&self.world, &mut media, self.now);
        for (&sector, versions) in &self.history {
            let seen = Self::seen(&self.world, &core, &media, sector);
            assert!(
                versions.contains(&seen),
                "after a power cut sector {sector} reads {seen:#x}, not of {versions:x?}"
            );
        }
    }

    fn power_cut(&mut self, media: &mut Media) {
        media.image.power_cut(&mut self.random);
        media.map.power_cut(&mut self.random);
        if self.random.one_in(2) {
            media.marks.truncate(self.random.below(media.marks.len() as u64) as usize);
        }
        media.boot += 1;
    }

    fn restart(&mut self) {
        let what = self.random.below(3);
        if what == 0 {
            if self.flush.is_some() || !self.writes.is_empty() || !self.stores.is_empty() {
                return;
            }
            commit_all(&mut self.core, &mut self.media);
            commit_all(&mut self.core, &mut self.media);
            let update = self.core.parts().0.begin_update(|superblock| {
                superblock.clean = true;
                superblock.intents.fill(0);
            });
            write_synced(&mut self.core, &mut self.media, &update);
            for versions in self.history.values_mut() {
                versions.drain(..versions.len() - 1);
            }
        }
        if what == 1 {
            let mut media = self.media.clone();
            self.power_cut(&mut media);
            self.media = media;
        }
        let acknowledged: BTreeMap<u64, usize> = self.world.sectors().map(|s| (s, self.acknowledged(s))).collect();
        self.writes.clear();
        self.fetches.clear();
        self.stores.clear();
        self.flush = None;
        self.core = open(&self.world, &mut self.media, self.now);
        self.core.handle_link(self.now, true, "up", &mut Vec::new());
        for (&sector, versions) in &mut self.history {
            let seen = Self::seen(&self.world, &self.core, &self.media, sector);
            let first = if what == 1 { 0 } else { acknowledged[&sector] - 1 };
            assert!(
                versions[first..].contains(&seen),
                "restart {what}: sector {sector} reads {seen:#x}, not of {versions:x?} from {first}"
            );
            if what == 1 {
                // From here on it reads as it was seen.
                *versions = vec![seen];
            } else {
                versions.truncate(acknowledged[&sector]);
                if versions.last() != Some(&seen) {
                    versions.push(seen);
                }
            }
        }
    }
}

fn seeds() -> Vec<u64> {
    if let Some(seed) = std::env::var("DECANT_TEST_SEED").ok().and_then(|text| text.parse().ok()) {
        return vec![seed];
    }
    let scale: f64 = std::env::var("DECANT_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    (0..(24.0 * scale).max(1.0) as u64).collect()
}

#[test]
fn flushed_writes_survive_anything_4096() {
    let mut forks = 0;
    for seed in seeds() {
        let mut run = Run::new(seed, 4096);
        run.go(2500);
        forks += run.forks;
    }
    println!("{forks} crashes opened");
}

#[test]
fn flushed_writes_survive_anything_512() {
    let mut forks = 0;
    for seed in seeds() {
        let mut run = Run::new(seed, 512);
        run.go(4000);
        forks += run.forks;
    }
    println!("{forks} crashes opened");
}
