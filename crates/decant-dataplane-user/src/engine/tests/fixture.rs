//! An origin that can be held, cut off and made to answer in pieces and out of order; a disk that can be made to fail.

use std::collections::HashMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicI32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, Weak, mpsc};
use std::time::{Duration, Instant};

use decant_base::{BLOCK, Epoch, ExtentSet};
use decant_luks2::{SectorCipher, VolumeKey};

use super::super::*;
use crate::device::{Fetch, OriginSink, Want};

/// Everything in these tests ends far sooner or is stuck.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);
pub(super) const BASE: u64 = 4 << 20;

pub(super) struct Random(pub(super) u64);

impl Random {
    pub(super) fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
        z ^ (z >> 31)
    }

    pub(super) fn below(&mut self, n: u64) -> u64 {
        self.next() % n.max(1)
    }
}

pub(super) fn cipher(sector_size: u32) -> Arc<SectorCipher> {
    let bytes: Vec<u8> = (0..64u8).map(|n| n.wrapping_mul(37) ^ 0x5A).collect();
    Arc::new(SectorCipher::new(&VolumeKey::from_bytes(&bytes).unwrap(), sector_size, 0).unwrap())
}

/// The plaintext of a sector of 512 bytes, never zeros.
pub(super) fn pattern(sector: u64, version: u64) -> [u8; 512] {
    let mut random = Random(sector << 24 ^ version);
    let mut bytes = [0; 512];
    bytes.chunks_mut(8).for_each(|chunk| chunk.copy_from_slice(&(random.next() | 1).to_le_bytes()));
    bytes
}

pub(super) fn plaintext(offset: u64, length: usize, version: u64) -> Vec<u8> {
    (0..length as u64 / 512).flat_map(|n| pattern(offset / 512 + n, version)).collect()
}

#[derive(Default)]
struct Queue {
    fetches: Vec<Fetch>,
    held: bool,
    down: bool,
    /// Grows with each `attach` and `close`: a thread serves one session.
    session: u64,
}

/// Serves ciphertext from memory on a thread of its own.
pub(super) struct FakeOrigin {
    pub(super) bytes: Mutex<Vec<u8>>,
    queue: Mutex<Queue>,
    changed: Condvar,
    sink: Mutex<Option<Weak<dyn OriginSink>>>,
    pub(super) data_bytes: AtomicU64,
    pub(super) requests: AtomicUsize,
    /// Blocks that it cannot read.
    pub(super) bad: Mutex<Vec<u64>>,
    /// Answers in pieces of at most so many bytes, and later requests first.
    pub(super) piece: AtomicU64,
    pub(super) reorder: AtomicBool,
    /// How often each block was sent.
    sent: Mutex<HashMap<u64, u32>>,
}

impl FakeOrigin {
    pub(super) fn new(bytes: Vec<u8>) -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(bytes),
            queue: Mutex::default(),
            changed: Condvar::new(),
            sink: Mutex::default(),
            data_bytes: AtomicU64::new(0),
            requests: AtomicUsize::new(0),
            bad: Mutex::default(),
            piece: AtomicU64::new(u64::MAX),
            reorder: AtomicBool::new(false),
            sent: Mutex::default(),
        })
    }

    pub(super) fn attach(self: &Arc<Self>, engine: &Arc<Engine>) {
        let sink: Arc<dyn OriginSink> = engine.clone();
        *self.sink.lock().unwrap() = Some(Arc::downgrade(&sink));
        engine.set_origin(self.clone(), "fake");
        let session = {
            let mut queue = self.queue.lock().unwrap();
            queue.session += 1;
            queue.session
        };
        engine.handle_link(true, "up");
        let (this, weak) = (Arc::clone(self), Arc::downgrade(&sink));
        std::thread::spawn(move || this.serve(&weak, session));
    }

    pub(super) fn hold(&self, held: bool) {
        self.queue.lock().unwrap().held = held;
        self.changed.notify_all();
    }

    pub(super) fn link(&self, up: bool) {
        self.queue.lock().unwrap().down = !up;
        let sink = self.sink.lock().unwrap().as_ref().and_then(Weak::upgrade);
        if let Some(sink) = sink {
            sink.handle_link(up, if up { "up" } else { "cut" });
        }
        self.changed.notify_all();
    }

    /// How many blocks were sent more than once.
    pub(super) fn repeats(&self) -> usize {
        self.sent.lock().unwrap().values().filter(|&&times| times > 1).count()
    }

    fn serve(&self, sink: &Weak<dyn OriginSink>, session: u64) {
        let mut random = Random(7);
        loop {
            let fetch = {
                let mut queue = self.queue.lock().unwrap();
                while queue.session == session && (queue.held || queue.down || queue.fetches.is_empty()) {
                    queue = self.changed.wait(queue).unwrap();
                }
                if queue.session != session {
                    return;
                }
                let last = queue.fetches.len() as u64;
                let index = if self.reorder.load(Ordering::Relaxed) { random.below(last) } else { 0 };
                queue.fetches.remove(index as usize)
            };
            let Some(sink) = sink.upgrade() else { return };
            self.answer(&*sink, fetch);
        }
    }

    fn answer(&self, sink: &dyn OriginSink, fetch: Fetch) {
        let end = fetch.offset + u64::from(fetch.length);
        let blocks = fetch.offset / BLOCK..end.div_ceil(BLOCK);
        if self.bad.lock().unwrap().iter().any(|block| blocks.contains(block)) {
            return sink.handle_done(fetch.token, Err(Errno::IO));
        }
        let data = self.bytes.lock().unwrap()[fetch.offset as usize..end as usize].to_vec();
        match fetch.want {
            Want::Digests => {
                let digests: Vec<u32> = data.chunks(BLOCK as usize).map(crc32c::crc32c).collect();
                sink.handle_digests(fetch.token, fetch.offset, &digests);
            }
            Want::Data => {
                self.data_bytes.fetch_add(data.len() as u64, Ordering::Relaxed);
                let mut sent = self.sent.lock().unwrap();
                blocks.for_each(|block| *sent.entry(block).or_insert(0) += 1);
                drop(sent);
                let piece = self.piece.load(Ordering::Relaxed).min(data.len() as u64) as usize;
                let mut at = fetch.offset;
                for part in data.chunks(piece) {
                    if part.iter().all(|&byte| byte == 0) {
                        sink.handle_hole(fetch.token, at, part.len() as u64);
                    } else {
                        sink.handle_data(fetch.token, at, part);
                    }
                    at += part.len() as u64;
                }
            }
        }
        sink.handle_done(fetch.token, Ok(()));
    }
}

impl Origin for FakeOrigin {
    fn request(&self, fetch: Fetch) {
        self.requests.fetch_add(1, Ordering::Relaxed);
        self.queue.lock().unwrap().fetches.push(fetch);
        self.changed.notify_all();
    }

    fn in_flight(&self) -> u64 {
        self.queue.lock().unwrap().fetches.iter().map(|fetch| u64::from(fetch.length)).sum()
    }

    fn close(&self) {
        let mut queue = self.queue.lock().unwrap();
        queue.session += 1;
        queue.fetches.clear();
        self.changed.notify_all();
    }
}

/// Errors to inject: 0 is none, else the errno of the next operations.
#[derive(Default)]
pub(super) struct Faults {
    pub(super) sync: AtomicI32,
    pub(super) write: AtomicI32,
    pub(super) map_sync: AtomicI32,
}

fn injected(fault: &AtomicI32) -> Result<(), Errno> {
    match fault.load(Ordering::SeqCst) {
        0 => Ok(()),
        code => Err(Errno::from_raw_os_error(code)),
    }
}

struct Faulty {
    inner: Arc<dyn Medium>,
    faults: Arc<Faults>,
    is_map: bool,
}

impl Medium for Faulty {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.inner.read_at(offset, buffer)
    }
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        if !self.is_map {
            injected(&self.faults.write)?;
        }
        self.inner.write_at(offset, data)
    }
    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.inner.punch(offset, length)
    }
    fn sync(&self) -> Result<(), Errno> {
        injected(if self.is_map { &self.faults.map_sync } else { &self.faults.sync })?;
        self.inner.sync()
    }
    fn data_in(&self, range: Range<u64>) -> Result<ExtentSet, Errno> {
        self.inner.data_in(range)
    }
    fn length(&self) -> Result<u64, Errno> {
        self.inner.length()
    }
    fn read_medium(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.inner.read_medium(offset, buffer)
    }
}

struct FaultyDisk {
    files: Files,
    image: Arc<dyn Medium>,
    faults: Arc<Faults>,
}

impl Disk for FaultyDisk {
    fn image(&self) -> &Arc<dyn Medium> {
        &self.image
    }
    fn open_map(&self) -> Result<Option<Arc<dyn Medium>>, Errno> {
        let wrap = |inner| Arc::new(Faulty { inner, faults: self.faults.clone(), is_map: true }) as Arc<dyn Medium>;
        Ok(self.files.open_map()?.map(wrap))
    }
    fn reserve_map(&self, length: u64) -> Result<(), Errno> {
        self.files.reserve_map(length)
    }
    fn create_map(&self, length: u64, writes: &[(u64, Vec<u8>)]) -> Result<Arc<dyn Medium>, Errno> {
        let inner = self.files.create_map(length, writes)?;
        Ok(Arc::new(Faulty { inner, faults: self.faults.clone(), is_map: true }))
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

/// A volume of a test in a directory of its own.
pub(super) struct Volume {
    pub(super) directory: tempfile::TempDir,
    pub(super) shape: Shape,
    pub(super) live: ExtentSet,
    pub(super) faults: Arc<Faults>,
}

impl Volume {
    pub(super) fn new(size: u64, sector_size: u32, live: &[(u64, u64)]) -> Self {
        let shape = Shape::new(size, sector_size).unwrap();
        let live = live.iter().map(|&run| decant_base::Extent::from(run)).collect();
        // Beside this test's program, not in /tmp, which may be in memory: holes and direct reads are to be the real ones.
        let program = std::env::current_exe().unwrap();
        let directory = tempfile::tempdir_in(program.parent().unwrap()).unwrap();
        let volume = Self { directory, shape, live, faults: Arc::default() };
        let file = std::fs::File::create(volume.image()).unwrap();
        file.set_len(BASE + size).unwrap();
        volume
    }

    pub(super) fn image(&self) -> PathBuf {
        self.directory.path().join("volume.img")
    }

    pub(super) fn try_open(&self, mode: Mode) -> Result<Arc<Engine>, OpenError> {
        open_in(self.directory.path(), self.shape, mode, &self.faults)
    }

    /// A prepared engine that has begun, without an origin.
    pub(super) fn begun(&self) -> Arc<Engine> {
        let engine = self.try_open(Mode::Prepared).unwrap();
        engine.begin(self.live.clone(), Epoch(3)).unwrap();
        engine
    }

    /// What the origin holds: a pattern in the live blocks, holes elsewhere.
    pub(super) fn origin(&self) -> Arc<FakeOrigin> {
        origin_of(self.shape, &self.live)
    }

    /// Flips a bit of the payload behind the engine's back.
    pub(super) fn flip(&self, offset: u64) {
        let file = std::fs::OpenOptions::new().read(true).write(true).open(self.image()).unwrap();
        let mut byte = [0];
        file.read_exact_at(&mut byte, BASE + offset).unwrap();
        file.write_all_at(&[byte[0] ^ 4], BASE + offset).unwrap();
        file.sync_all().unwrap();
    }
}

pub(super) fn origin_of(shape: Shape, live: &ExtentSet) -> Arc<FakeOrigin> {
    let mut bytes = vec![0; shape.size() as usize];
    let cipher = cipher(shape.sector_size());
    for run in live.iter() {
        let range = shape.bytes_of(run.range());
        let data = &mut bytes[range.start as usize..range.end as usize];
        data.copy_from_slice(&plaintext(range.start, data.len(), 0));
        cipher.encrypt(range.start, data);
    }
    FakeOrigin::new(bytes)
}

pub(super) fn open_in(
    directory: &Path,
    shape: Shape,
    mode: Mode,
    faults: &Arc<Faults>,
) -> Result<Arc<Engine>, OpenError> {
    let path = directory.join("volume.img");
    let file = open_image(&path).unwrap();
    let files = Files::new(file, &path, BASE, shape.size(), directory.join("volume.map"));
    let image = Arc::new(Faulty { inner: files.image().clone(), faults: faults.clone(), is_map: false });
    Engine::open(Options {
        volume: "orders".parse().unwrap(),
        shape,
        mode,
        disk: Arc::new(FaultyDisk { files, image, faults: faults.clone() }),
        cipher: cipher(shape.sector_size()),
        boot: boot_id().unwrap(),
    })
}

/// Where a parked read's answer goes in a test.
pub(super) struct Sink(pub(super) mpsc::Sender<Result<Vec<u8>, Errno>>);

impl ReadSink for Sink {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        let _ = self.0.send(result.map(<[u8]>::to_vec));
    }
}

/// Reads as the front end does.
pub(super) fn start_read(engine: &Engine, offset: u64, length: usize) -> mpsc::Receiver<Result<Vec<u8>, Errno>> {
    let (sender, receiver) = mpsc::channel();
    let mut buffer = vec![0xEE; length];
    match engine.read(offset, &mut buffer) {
        Ok(Served::Done) => sender.send(Ok(buffer)).unwrap(),
        Ok(Served::Missing) => engine.park(offset, length, Box::new(Sink(sender))),
        Err(error) => sender.send(Err(error)).unwrap(),
    }
    receiver
}

pub(super) fn read(engine: &Engine, offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
    start_read(engine, offset, length).recv_timeout(PATIENCE).expect("the read is answered")
}

/// Waits until `done`, by looking again and again: for states that announce themselves nowhere but in the status.
pub(super) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

pub(super) fn hydrate(engine: &Engine) {
    wait_until("hydration", || engine.status().is_none_or(|status| status.bytes_missing == 0));
}
