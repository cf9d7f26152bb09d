//! The engine of the volume process: cipher, clone and file in one, as a front end, an origin and an export see it.
//!
//! ```text
//! FUSE threads --read/write/discard/flush/park--> Engine --pread/pwrite/fdatasync--> volume.img (payload)
//! origin thread --OriginSink--> Engine            Engine --request--> Origin
//! export threads --Exported (after the seal)----> Engine
//! ```
//!
//! A volume is *prepared* (its device is there, reads wait for the grant), a *clone* (filling), or *plain*. The last
//! transition happens under the machine's feet, after [`Engine::verify`]: same process, same device. On the plain path a
//! read or write takes no lock. On the clone path the lock around [`CloneCore`] is held for look-ups and marks only,
//! never during I/O, never while waiting for the network.
//!
//! What is final: a failed sync, or EIO for a write. The volume then acknowledges no write and no flush, says why in its
//! status, and leaves a note that keeps the next process from opening it as if nothing had happened.

mod commit;
pub mod disk;
mod export;
mod fill;
mod gate;
mod open;
mod verify;

use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU8, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use decant_base::{SECTOR, VolumeId};
use decant_clone::core::NotParked;
use decant_clone::demand::Waiting;
use decant_clone::marks::Mark;
use decant_clone::{Begin, CloneCore, Kind, Scope, Shape};
use decant_dataplane::{CloneStatus, MissingPolicy, Verification};
use rustix::io::Errno;

use crate::device::{Origin, ReadSink};
use crate::fuse::{Backend, LaterChange, Served};
pub use disk::{Disk, Files, Medium, Note, beside, open_image};
pub use export::Export;
pub use open::{Mode, OpenError, Options, boot_id, map_bytes};
pub use verify::VerifyError;

/// Crash points of the engine, in the order of a commit and of a volume's life.
pub const POINTS: &[&str] = &[
    "map:created",
    "map:data-synced",
    "map:pages-written",
    "map:committed",
    "map:intent",
    "map:marked",
    "map:complete",
    "map:dropped",
];

/// Encrypts and decrypts whole sectors in place, from any thread. An all-zero ciphertext sector decrypts to zeros.
pub trait Cipher: Send + Sync {
    /// `data` lies at byte `offset` of the payload.
    fn encrypt(&self, offset: u64, data: &mut [u8]);
    /// `data` lies at byte `offset` of the payload.
    fn decrypt(&self, offset: u64, data: &mut [u8]);
}

impl Cipher for decant_luks2::SectorCipher {
    fn encrypt(&self, offset: u64, data: &mut [u8]) {
        Self::encrypt(self, offset, data);
    }

    fn decrypt(&self, offset: u64, data: &mut [u8]) {
        Self::decrypt(self, offset, data);
    }
}

/// How an open clone keeps its marks.
struct MapFiles {
    map: Arc<dyn Medium>,
    marks: Arc<dyn Medium>,
    /// One superblock update at a time.
    superblock: Mutex<()>,
    /// Records below this number are punched out.
    punched: AtomicU64,
}

/// Someone waits for these bytes.
type Waiter = Box<dyn ReadSink>;

/// What is decided before a clone begins.
#[derive(Default)]
struct Early {
    reads: Vec<(Range<u64>, Waiter)>,
    limit: Option<u64>,
    eio: bool,
    boot: bool,
    link: Option<(bool, String)>,
    most_waiting: Option<usize>,
}

enum Life {
    Plain,
    Prepared(Early),
    Clone(Box<CloneCore<Waiter>>),
}

const PLAIN: u8 = 0;
const PREPARED: u8 = 1;
const CLONE: u8 = 2;

/// One volume's engine. All methods are callable from any thread.
pub struct Engine {
    shape: Shape,
    volume: VolumeId,
    boot: String,
    disk: Arc<dyn Disk>,
    image: Arc<dyn Medium>,
    cipher: Arc<dyn Cipher>,
    started: Instant,
    /// `PLAIN`, `PREPARED` or `CLONE`: lets the plain path do without the lock. Follows `life`.
    phase: AtomicU8,
    life: Mutex<Life>,
    /// A store ended; for writes that must not overlap it.
    stored: Condvar,
    store_waiters: AtomicUsize,
    files: Mutex<Option<Arc<MapFiles>>>,
    gate: gate::Gate,
    sealed: AtomicBool,
    has_failed: AtomicBool,
    failure: Mutex<Option<String>>,
    flusher: commit::Flusher,
    /// Bytes the hydration stored since the last sync.
    unsynced: AtomicU64,
    /// When a guest flushed last, in milliseconds since `started`.
    flushed_ms: AtomicU64,
    origin: Mutex<Option<(Arc<dyn Origin>, String)>>,
    fill: fill::Fill,
    digests: verify::Digests,
    verifying: Mutex<decant_clone::verify::Verify>,
    verified: Mutex<Option<Verification>>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // A panic while holding one of these locks is a bug that was reported; the state is as consistent as any single step.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Engine {
    fn with(options: Options, life: Life, files: Option<MapFiles>, verified: Option<Verification>) -> Arc<Self> {
        let phase = match life {
            Life::Plain => PLAIN,
            Life::Prepared(_) => PREPARED,
            Life::Clone(_) => CLONE,
        };
        Arc::new(Self {
            shape: options.shape,
            volume: options.volume,
            boot: options.boot,
            image: Arc::clone(options.disk.image()),
            disk: options.disk,
            cipher: options.cipher,
            started: Instant::now(),
            phase: AtomicU8::new(phase),
            life: Mutex::new(life),
            stored: Condvar::new(),
            store_waiters: AtomicUsize::new(0),
            files: Mutex::new(files.map(Arc::new)),
            gate: gate::Gate::default(),
            sealed: AtomicBool::new(false),
            has_failed: AtomicBool::new(false),
            failure: Mutex::default(),
            flusher: commit::Flusher::default(),
            unsynced: AtomicU64::new(0),
            flushed_ms: AtomicU64::new(0),
            origin: Mutex::default(),
            fill: fill::Fill::default(),
            digests: verify::Digests::default(),
            verifying: Mutex::default(),
            verified: Mutex::new(verified),
        })
    }

    fn now(&self) -> Duration {
        self.started.elapsed()
    }

    /// Its size and sector size.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// Whether it is whole: never a clone, or one that was verified.
    pub fn is_plain(&self) -> bool {
        self.phase.load(Ordering::Acquire) == PLAIN
    }

    fn check(&self, offset: u64, length: u64) -> Result<Range<u64>, Errno> {
        let bytes = offset..offset.checked_add(length).ok_or(Errno::INVAL)?;
        if self.shape.holds(&bytes) { Ok(bytes) } else { Err(Errno::INVAL) }
    }

    /// Fills `buffer` with plaintext, or says that some of it is not here ([`Engine::park`]).
    ///
    /// # Errors
    /// EINVAL off the volume or off its sectors; what the medium says.
    pub fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Served, Errno> {
        let bytes = self.check(offset, buffer.len() as u64)?;
        if self.phase.load(Ordering::Acquire) != PLAIN {
            match &*lock(&self.life) {
                Life::Plain => {}
                Life::Prepared(_) => return Ok(Served::Missing),
                Life::Clone(core) if core.is_here(&sectors(&bytes)) => {}
                Life::Clone(_) => return Ok(Served::Missing),
            }
        }
        self.read_here(offset, buffer).map(|()| Served::Done)
    }

    fn read_here(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.image.read_at(offset, buffer)?;
        self.cipher.decrypt(offset, buffer);
        Ok(())
    }

    /// Answers `sink` when the bytes are here, perhaps before this returns.
    pub fn park(&self, offset: u64, length: usize, sink: Box<dyn ReadSink>) {
        let bytes = match self.check(offset, length as u64) {
            Ok(bytes) => bytes,
            Err(error) => return sink.complete(Err(error)),
        };
        let (mut plans, mut crowded) = (Vec::new(), false);
        let outcome = match &mut *lock(&self.life) {
            Life::Plain => Err(NotParked::Here(sink)),
            Life::Prepared(early) => {
                early.reads.push((bytes.clone(), sink));
                Ok(())
            }
            Life::Clone(core) => {
                let (now, sectors) = (self.now(), sectors(&bytes));
                let mut outcome = core.park(now, sectors.clone(), sink, &mut plans);
                if let Err(NotParked::Full(sink)) = outcome {
                    core.drop_unwanted(|sink| sink.is_wanted());
                    outcome = core.park(now, sectors, sink, &mut plans);
                }
                crowded = core.stalls_at().is_some();
                outcome
            }
        };
        match outcome {
            Ok(()) => {
                self.send(&plans);
                if crowded {
                    self.wake_pump();
                }
            }
            Err(NotParked::Here(sink)) => self.serve(&bytes, sink),
            Err(NotParked::Refused(sink) | NotParked::Full(sink)) => sink.complete(Err(Errno::IO)),
        }
    }

    /// Answers from the file.
    fn serve(&self, bytes: &Range<u64>, sink: Waiter) {
        fill::with_scratch((bytes.end - bytes.start) as usize, |buffer| match self.read_here(bytes.start, buffer) {
            Ok(()) => sink.complete(Ok(buffer)),
            Err(error) => sink.complete(Err(error)),
        });
    }

    fn serve_all(&self, reads: Vec<Waiting<Waiter>>) {
        reads.into_iter().for_each(|read| self.serve(&bytes_of(&read.sectors), read.waiter));
    }

    /// Writes `data`, which is ciphertext afterwards. Waits for no network.
    ///
    /// # Errors
    /// EINVAL off the volume or off its sectors; EIO after the gate was closed, after a failure and before the clone began;
    /// ENOSPC. EIO of the medium is final.
    pub fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        let bytes = self.check(offset, data.len() as u64)?;
        let _pass = self.admit()?;
        self.cipher.encrypt(offset, data);
        self.change(&bytes, Kind::Written, || self.image.write_at(offset, data))
    }

    /// The range reads as zeros afterwards; also for write-zeroes. Waits for no network.
    ///
    /// # Errors
    /// As [`Engine::write`].
    pub fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let bytes = self.check(offset, length)?;
        let _pass = self.admit()?;
        // A hole is all-zero ciphertext, which is plaintext zeros; the kernel zeroes the edges inside a file block.
        self.change(&bytes, Kind::Discarded, || self.image.punch(offset, length))
    }

    fn admit(&self) -> Result<gate::Pass<'_>, Errno> {
        let pass = self.gate.enter().ok_or(Errno::IO)?;
        if self.has_failed.load(Ordering::Acquire) { Err(Errno::IO) } else { Ok(pass) }
    }

    /// Lands a write between the marks that it needs.
    fn change(&self, bytes: &Range<u64>, kind: Kind, land: impl FnOnce() -> Result<(), Errno>) -> Result<(), Errno> {
        if bytes.is_empty() {
            return Ok(());
        }
        let sectors = sectors(bytes);
        let (id, adopted) = loop {
            if self.phase.load(Ordering::Acquire) == PLAIN {
                return self.landed(land());
            }
            let mut life = lock(&self.life);
            let core = match &mut *life {
                Life::Plain => continue,
                Life::Prepared(_) => return Err(Errno::IO),
                Life::Clone(core) => core,
            };
            match core.begin_write(&sectors, kind) {
                Begin::Free => {
                    drop(life);
                    return self.landed(land());
                }
                Begin::Busy => {
                    self.store_waiters.fetch_add(1, Ordering::SeqCst);
                    drop(self.stored.wait(life));
                    self.store_waiters.fetch_sub(1, Ordering::SeqCst);
                }
                Begin::Intents => {
                    drop(life);
                    self.intend(&sectors)?;
                }
                Begin::Tracked { id, adopted } => break (id, adopted),
            }
        };
        let adopted = adopted.map_or(Ok(()), |mark| self.append(&mark));
        let landed = adopted.and_then(|()| self.landed(land()));
        let mut ready = Vec::new();
        let mark = match &mut *lock(&self.life) {
            Life::Clone(core) => core.end_write(id, landed.is_ok(), &mut ready),
            _ => None,
        };
        self.serve_all(ready);
        landed?;
        mark.map_or(Ok(()), |mark| self.append(&mark))
    }

    fn landed(&self, result: Result<(), Errno>) -> Result<(), Errno> {
        match result {
            Ok(()) | Err(Errno::NOSPC | Errno::DQUOT) => {}
            Err(error) => self.fail(&format!("a write to the image failed: {error}")),
        }
        result
    }

    /// A record in the marks file, or, if that has no room, a commit instead.
    fn append(&self, mark: &Mark) -> Result<(), Errno> {
        let Some(files) = lock(&self.files).clone() else { return Ok(()) };
        if files.marks.write_at(mark.offset(), &mark.encode()).is_err() {
            self.commit(Scope::Flush)?;
        }
        decant_base::crash::point("map:marked");
        Ok(())
    }

    /// Makes the intents durable that a write to `sectors` needs.
    fn intend(&self, sectors: &Range<u64>) -> Result<(), Errno> {
        let Some(files) = lock(&self.files).clone() else { return Ok(()) };
        let _one = lock(&files.superblock);
        let write = match &mut *lock(&self.life) {
            Life::Clone(core) => {
                let regions = core.missing_intents(sectors);
                if regions.is_empty() {
                    return Ok(());
                }
                let set = |superblock: &mut _| {
                    regions.iter().for_each(|&region| decant_clone::file::set_intent(superblock, region))
                };
                core.parts().0.begin_update(set)
            }
            _ => return Ok(()),
        };
        self.update(&files, &write, "map:intent")
    }

    /// Writes a superblock; the caller holds its lock.
    fn update(&self, files: &MapFiles, write: &decant_clone::SyncedWrite, point: &str) -> Result<(), Errno> {
        let result = files.map.write_at(write.offset, &write.bytes[..]).and_then(|()| files.map.sync());
        if let Err(error) = result {
            self.fail(&format!("the clone's map cannot be written: {error}"));
            return Err(Errno::IO);
        }
        decant_base::crash::point(point);
        if let Life::Clone(core) = &mut *lock(&self.life) {
            core.parts().0.end_update();
        }
        Ok(())
    }

    /// No write lands after this returns. What was acknowledged is not durable yet: [`Engine::flush`].
    pub fn close_gate(&self) {
        self.gate.close();
    }

    /// Writes are taken again: the migration was cancelled before its seal was recorded.
    pub fn open_gate(&self) {
        self.sealed.store(false, Ordering::SeqCst);
        self.gate.open();
    }

    /// All parked reads fail with EIO: the machine is being stopped or killed. Returns how many.
    pub fn fail_parked_reads(&self) -> usize {
        let mut failed = Vec::new();
        match &mut *lock(&self.life) {
            Life::Plain => {}
            Life::Prepared(early) => failed.extend(early.reads.drain(..).map(|(_, sink)| sink)),
            Life::Clone(core) => {
                let mut waiting = Vec::new();
                core.take_parked(&mut waiting);
                failed.extend(waiting.into_iter().map(|read| read.waiter));
            }
        }
        let count = failed.len();
        failed.into_iter().for_each(|sink| sink.complete(Err(Errno::IO)));
        count
    }

    /// A machine boots as soon as the clone begins: the hydration lets its reads go first.
    pub fn expect_boot(&self) {
        if let Life::Prepared(early) = &mut *lock(&self.life) {
            early.boot = true;
        }
    }

    /// Fetches only what reads wait for, or goes on with the rest.
    pub fn pause(&self, paused: bool) {
        self.fill.paused.store(paused, Ordering::Release);
        self.pump();
    }

    /// Whether only what reads wait for is fetched.
    pub fn is_paused(&self) -> bool {
        self.fill.paused.load(Ordering::Acquire)
    }

    /// Limits the hydration to bytes per second, or lifts the limit.
    pub fn set_limit(&self, limit: Option<u64>) {
        match &mut *lock(&self.life) {
            Life::Plain => {}
            Life::Prepared(early) => early.limit = limit,
            Life::Clone(core) => core.set_limit(self.now(), limit),
        }
        self.pump();
    }

    /// How many reads may wait for a silent origin for as long as it takes, where it is not a loop device that they take tags
    /// from; at most [`decant_clone::demand::MAX_PARKED`], beyond which a read fails at once.
    pub fn set_most_waiting(&self, reads: usize) {
        match &mut *lock(&self.life) {
            Life::Plain => {}
            Life::Prepared(early) => early.most_waiting = Some(reads),
            Life::Clone(core) => core.set_most_waiting(reads),
        }
    }

    /// What reads of missing blocks get while the origin is away.
    pub fn set_policy(&self, policy: MissingPolicy) {
        let eio = policy == MissingPolicy::Eio;
        let mut failed = Vec::new();
        match &mut *lock(&self.life) {
            Life::Plain => {}
            Life::Prepared(early) => early.eio = eio,
            Life::Clone(core) => core.set_eio_when_away(eio, &mut failed),
        }
        failed.into_iter().for_each(|read| read.waiter.complete(Err(Errno::IO)));
    }

    /// How far the clone is; `None` for a volume that is no clone (any more).
    pub fn status(&self) -> Option<CloneStatus> {
        let origin = lock(&self.origin).as_ref().map(|(_, name)| name.clone()).unwrap_or_default();
        let mut life = lock(&self.life);
        let Life::Clone(core) = &mut *life else { return None };
        let connected = core.connected();
        let progress = core.progress(self.now(), 1000);
        Some(CloneStatus {
            bytes_total: progress.total,
            bytes_filled: progress.filled,
            bytes_written: progress.written,
            bytes_discarded: progress.discarded,
            bytes_missing: progress.missing,
            bytes_fetched: progress.fetched,
            rate_bytes_per_s: progress.rate,
            parked_reads: progress.parked,
            origin,
            connected,
            hindrance: progress.hindrance,
            missing: progress.missing_ranges,
        })
    }

    /// Why the volume acknowledges nothing any more.
    pub fn failure(&self) -> Option<String> {
        lock(&self.failure).clone()
    }

    fn fail(&self, why: &str) {
        {
            let mut failure = lock(&self.failure);
            if failure.is_some() {
                return;
            }
            *failure = Some(why.to_owned());
            self.has_failed.store(true, Ordering::Release);
        }
        tracing::error!(volume = %self.volume, why, "the volume acknowledges nothing any more");
        self.disk.note_failure(why);
    }

    /// Ends in order: the origin is closed, everything committed, the map marked clean. The gate stays closed.
    ///
    /// # Errors
    /// If the last commit fails, which is final.
    pub fn close(&self) -> Result<(), Errno> {
        self.close_gate();
        self.drop_origin();
        self.fail_parked_reads();
        self.fill.stop();
        self.flush()?;
        // Twice: the second one settles the pages of the first.
        self.commit(Scope::All)?;
        self.commit(Scope::All)?;
        let Some(files) = lock(&self.files).clone() else { return Ok(()) };
        let _one = lock(&files.superblock);
        let write = match &mut *lock(&self.life) {
            Life::Clone(core) => core.parts().0.begin_update(|superblock| {
                superblock.clean = true;
                superblock.intents.fill(0);
            }),
            _ => return Ok(()),
        };
        self.update(&files, &write, "map:committed")?;
        self.disk.remove_marks()
    }
}

impl Drop for Engine {
    fn drop(&mut self) {
        self.fill.stop();
    }
}

impl Backend for Engine {
    fn size(&self) -> u64 {
        self.shape.size()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Served, Errno> {
        Self::read(self, offset, buffer)
    }

    fn park(&self, offset: u64, length: usize, sink: Box<dyn ReadSink>) {
        Self::park(self, offset, length, sink);
    }

    fn write(&self, offset: u64, data: &mut [u8], _later: &mut LaterChange<'_>) -> Result<Served, Errno> {
        Self::write(self, offset, data).map(|()| Served::Done)
    }

    fn discard(&self, offset: u64, length: u64, _later: &mut LaterChange<'_>) -> Result<Served, Errno> {
        Self::discard(self, offset, length).map(|()| Served::Done)
    }

    fn flush(&self) -> Result<(), Errno> {
        Self::flush(self)
    }
}

fn sectors(bytes: &Range<u64>) -> Range<u64> {
    bytes.start / SECTOR..bytes.end / SECTOR
}

fn bytes_of(sectors: &Range<u64>) -> Range<u64> {
    sectors.start * SECTOR..sectors.end * SECTOR
}

/// Requests that are the verification's, not the clone's.
const DIGEST_TOKENS: u64 = 1 << 63;

#[cfg(test)]
mod tests;
