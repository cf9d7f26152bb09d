//! Filling: fetches to the origin, its answers to the file, and to the reads that wait.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError, Weak};
use std::time::Duration;

use decant_base::{BLOCK, SECTOR};
use decant_clone::demand::Waiting;
use decant_clone::{Arrival, Came, Plan};
use rustix::io::Errno;

use super::{DIGEST_TOKENS, Engine, Life, Waiter, bytes_of, lock};
use crate::device::{Fetch, Origin, OriginSink, Want};

/// How long the hydration pauses when the file has no room.
const NO_ROOM_PAUSE: Duration = Duration::from_secs(5);
/// The background commit comes at least so often while there is something to commit.
const COMMIT_EVERY: Duration = Duration::from_secs(1);
/// How much may be stored and not synced: beyond the first figure the background commit comes at once, beyond the second the
/// hydration waits for the medium.
struct Backlog {
    commit_at: u64,
    hold_at: u64,
}

/// A guest's flush must write out what the hydration stored, so while there are flushes it finds little: at 500 MB/s about 6 ms.
const WITH_FLUSHES: Backlog = Backlog { commit_at: 1 << 20, hold_at: 3 << 20 };
/// Without them, enough that neither medium nor network waits for the other. (Small in tests, so that it is reached there.)
const WITHOUT_FLUSHES: Backlog = if cfg!(test) {
    Backlog { commit_at: 256 << 10, hold_at: 512 << 10 }
} else {
    Backlog { commit_at: 32 << 20, hold_at: 128 << 20 }
};
/// A guest that flushed so lately will flush again. A machine that just booted counts as one.
const FLUSHES_LATELY: Duration = Duration::from_secs(2);

/// A timer need not be finer: a full window is refilled by answers, not by time.
const SHORTEST_WAIT: Duration = Duration::from_millis(1);

/// Wakes a thread; a wake-up before the wait is not lost.
#[derive(Default)]
struct Signal {
    raised: Mutex<bool>,
    changed: Condvar,
    stopped: AtomicBool,
}

impl Signal {
    fn raise(&self) {
        *lock(&self.raised) = true;
        self.changed.notify_one();
    }

    /// Waits for the signal or for `timeout`; `false`: stopped.
    fn wait(&self, timeout: Option<Duration>) -> bool {
        let mut raised = lock(&self.raised);
        if !*raised && !self.stopped.load(Ordering::Acquire) {
            raised = match timeout {
                Some(timeout) => self.changed.wait_timeout(raised, timeout).unwrap_or_else(PoisonError::into_inner).0,
                None => self.changed.wait(raised).unwrap_or_else(PoisonError::into_inner),
            };
        }
        *raised = false;
        !self.stopped.load(Ordering::Acquire)
    }

    fn stop(&self) {
        self.stopped.store(true, Ordering::Release);
        self.raise();
    }
}

/// Pieces of blocks, for an origin whose answers are cut elsewhere than at blocks.
#[derive(Default)]
struct Cuts {
    /// (token, first byte of the block, its bytes so far).
    pieces: Vec<(u64, u64, Vec<u8>)>,
}

#[derive(Default)]
pub(super) struct Fill {
    pump: Arc<Signal>,
    commit: Arc<Signal>,
    /// What is fetched is what reads wait for.
    pub(super) paused: AtomicBool,
    /// When the pump's thread looks again by itself, in nanoseconds since the engine started.
    due: AtomicU64,
    idle: Mutex<Vec<Arrival<Waiter>>>,
    cuts: Mutex<Cuts>,
}

impl Fill {
    pub(super) fn stop(&self) {
        self.pump.stop();
        self.commit.stop();
    }
}

/// The largest buffer that a thread keeps.
const MAX_SCRATCH: usize = 1 << 20;

thread_local! {
    static SCRATCH: RefCell<Vec<u8>> = const { RefCell::new(Vec::new()) };
}

/// Lends this thread's buffer.
pub(super) fn with_scratch(length: usize, work: impl FnOnce(&mut [u8])) {
    let mut buffer = SCRATCH.take();
    if buffer.len() < length {
        buffer.resize(length, 0);
    }
    work(&mut buffer[..length]);
    // One for a read of many megabytes is not kept for all that come after it.
    if buffer.len() > MAX_SCRATCH {
        buffer = Vec::new();
    }
    SCRATCH.set(buffer);
}

fn fail_all(reads: Vec<Waiting<Waiter>>) {
    reads.into_iter().for_each(|read| read.waiter.complete(Err(Errno::IO)));
}

/// Bytes that arrived.
enum Bytes<'a> {
    Data(&'a [u8]),
    Hole,
}

impl Engine {
    /// Where missing blocks come from; `name` is for people. Replaces (and closes) an earlier one.
    pub fn set_origin(&self, origin: Arc<dyn Origin>, name: &str) {
        self.drop_origin();
        *lock(&self.origin) = Some((origin, name.to_owned()));
        self.pump();
    }

    /// Closes the origin, if there is one; what it did not answer will be asked of the next.
    pub fn drop_origin(&self) {
        let origin = lock(&self.origin).take();
        let Some((origin, _)) = origin else { return };
        origin.close();
        let mut failed = Vec::new();
        if let Life::Clone(core) = &mut *lock(&self.life) {
            core.handle_link(self.now(), false, "closed", &mut failed);
            core.forget_fetches();
        }
        fail_all(failed);
    }

    pub(super) fn origin(&self) -> Option<Arc<dyn Origin>> {
        lock(&self.origin).as_ref().map(|(origin, _)| Arc::clone(origin))
    }

    pub(super) fn spawn_threads(self: &Arc<Self>) {
        if self.is_plain() {
            return;
        }
        let (weak, signal) = (Arc::downgrade(self), Arc::clone(&self.fill.pump));
        let pump = std::thread::Builder::new().name("hydrate".into()).spawn(move || pump_thread(&weak, &signal));
        let (weak, signal) = (Arc::downgrade(self), Arc::clone(&self.fill.commit));
        let commit = std::thread::Builder::new().name("commit".into()).spawn(move || commit_thread(&weak, &signal));
        if let Err(error) = pump.and(commit) {
            self.fail(&format!("cannot start a thread: {error}"));
        }
    }

    /// Sends what may be sent now. From any thread; never blocks on the network.
    pub(super) fn pump(&self) {
        // Its thread is woken only if it would sleep too long.
        if let Some(due) = self.pump_once()
            && due < Duration::from_nanos(self.fill.due.load(Ordering::SeqCst))
        {
            self.fill.pump.raise();
        }
    }

    /// Something may be due earlier than the pump's thread knows.
    pub(super) fn wake_pump(&self) {
        self.fill.pump.raise();
    }

    fn backlog(&self) -> Backlog {
        let lately = self.now().saturating_sub(Duration::from_millis(self.flushed_ms.load(Ordering::Relaxed)));
        if lately < FLUSHES_LATELY && !cfg!(test) { WITH_FLUSHES } else { WITHOUT_FLUSHES }
    }

    /// A guest flushes, or is about to.
    pub(super) fn note_flush(&self) {
        self.flushed_ms.store(self.now().as_millis() as u64, Ordering::Relaxed);
        if !self.is_plain()
            && let Life::Clone(core) = &mut *lock(&self.life)
        {
            core.note_foreground(self.now());
        }
    }

    /// So much was stored before a sync that just ended: the hydration may have been held back, with nothing left in flight
    /// whose answer would set it going again.
    pub(super) fn synced(&self, stored: u64) {
        if stored > WITH_FLUSHES.hold_at.min(WITHOUT_FLUSHES.hold_at) {
            self.fill.pump.raise();
        }
    }

    /// As `pump`; returns when, since the engine started, there may be more to send although nothing else happens.
    fn pump_once(&self) -> Option<Duration> {
        let (mut plans, mut failed) = (Vec::new(), Vec::new());
        let (mut due, mut stalled) = (None, false);
        if let Life::Clone(core) = &mut *lock(&self.life) {
            let now = self.now();
            stalled = core.shed_reads(now, &mut failed);
            let hold = self.unsynced.load(Ordering::Acquire) > self.backlog().hold_at
                || self.has_failed.load(Ordering::Acquire);
            core.set_hydrate(!hold);
            core.set_paused(self.fill.paused.load(Ordering::Acquire));
            core.poll(now, &mut plans);
            let next = [core.next_poll(now), core.stalls_at()].into_iter().flatten().min();
            due = next.map(|due| due.max(now + SHORTEST_WAIT));
        }
        if stalled {
            tracing::warn!(volume = %self.volume, reads = failed.len(), "STALLED: the origin is silent and more reads wait than leave room for writes; those that came last fail with EIO");
        }
        fail_all(failed);
        self.send(&plans);
        due
    }

    pub(super) fn send(&self, plans: &[Plan]) {
        if plans.is_empty() {
            return;
        }
        // Without an origin the clone would believe that its fetches are under way; set_origin asks for them again.
        let Some(origin) = self.origin() else { return self.unsend(plans) };
        for plan in plans {
            let bytes = self.shape.bytes_of(plan.blocks.clone());
            let length = (bytes.end - bytes.start) as u32;
            origin.request(Fetch {
                token: plan.token,
                offset: bytes.start,
                length,
                want: Want::Data,
                urgent: plan.class == decant_clone::Class::Demand,
            });
        }
    }

    fn unsend(&self, plans: &[Plan]) {
        if let Life::Clone(core) = &mut *lock(&self.life) {
            plans.iter().for_each(|plan| core.fetch_done(self.now(), plan.token, true, &mut Vec::new()));
        }
    }

    /// `bytes`, whole blocks of a fetch, arrived: answer, store, mark.
    fn arrived(&self, token: u64, range: Range<u64>, bytes: &Bytes<'_>) {
        let mut arrival = lock(&self.fill.idle).pop().unwrap_or_default();
        let came = if matches!(bytes, Bytes::Hole) { Came::Hole } else { Came::Data };
        let blocks = self.shape.touched(range.clone());
        match &mut *lock(&self.life) {
            Life::Clone(core) => core.begin_store(self.now(), token, blocks, came, &mut arrival),
            _ => return,
        }
        for read in arrival.direct.drain(..) {
            self.answer(&range, bytes, read);
        }
        let landed = arrival.store.iter().try_for_each(|store| self.store(&range, bytes, bytes_of(store)));
        let stored: u64 = arrival.store.iter().map(|store| store.end - store.start).sum::<u64>() * SECTOR;
        match &mut *lock(&self.life) {
            Life::Clone(core) => {
                core.end_store(&mut arrival, landed.is_ok());
                if matches!(landed, Err(Errno::NOSPC | Errno::DQUOT)) {
                    core.no_room(self.now(), NO_ROOM_PAUSE);
                }
            }
            _ => return,
        }
        if self.store_waiters.load(Ordering::SeqCst) > 0 {
            self.stored.notify_all();
        }
        for read in arrival.ready.drain(..) {
            self.serve(&bytes_of(&read.sectors), read.waiter);
        }
        fail_all(std::mem::take(&mut arrival.failed));
        match landed {
            Ok(()) if self.unsynced.fetch_add(stored, Ordering::AcqRel) + stored > self.backlog().commit_at => {
                self.fill.commit.raise()
            }
            Ok(()) | Err(Errno::NOSPC | Errno::DQUOT) => {}
            Err(error) => self.fail(&format!("a write to the image failed: {error}")),
        }
        lock(&self.fill.idle).push(arrival);
    }

    /// Answers a read from bytes that just arrived.
    fn answer(&self, range: &Range<u64>, bytes: &Bytes<'_>, read: Waiting<Waiter>) {
        let wanted = bytes_of(&read.sectors);
        with_scratch((wanted.end - wanted.start) as usize, |buffer| {
            match bytes {
                Bytes::Hole => buffer.fill(0),
                Bytes::Data(data) => {
                    let at = (wanted.start - range.start) as usize;
                    buffer.copy_from_slice(&data[at..at + buffer.len()]);
                    self.cipher.decrypt(wanted.start, buffer);
                }
            }
            read.waiter.complete(Ok(buffer));
        });
    }

    fn store(&self, range: &Range<u64>, bytes: &Bytes<'_>, store: Range<u64>) -> Result<(), Errno> {
        match bytes {
            // The file may hold what a crash left of a write that was never acknowledged.
            Bytes::Hole => self.image.punch(store.start, store.end - store.start),
            Bytes::Data(data) => {
                let at = (store.start - range.start) as usize;
                self.image.write_at(store.start, &data[at..at + (store.end - store.start) as usize])
            }
        }
    }

    /// Collects the pieces of a block that an answer was cut in; whole blocks go on at once.
    fn cut(&self, token: u64, mut offset: u64, mut data: &[u8]) {
        while !data.is_empty() {
            let block = offset / BLOCK * BLOCK;
            let end = (block + BLOCK).min(self.shape.size());
            let take = data.len().min((end - offset) as usize);
            let (piece, rest) = data.split_at(take);
            let whole = {
                let mut cuts = lock(&self.fill.cuts);
                let found = cuts.pieces.iter().position(|(of, at, _)| *of == token && *at == block);
                let index = found.unwrap_or_else(|| {
                    cuts.pieces.push((token, block, Vec::with_capacity(BLOCK as usize)));
                    cuts.pieces.len() - 1
                });
                let buffer = &mut cuts.pieces[index].2;
                // A session made again starts its answer over.
                buffer.truncate((offset - block) as usize);
                let is_next = buffer.len() as u64 == offset - block;
                if is_next {
                    buffer.extend_from_slice(piece);
                }
                (buffer.len() as u64 == end - block).then(|| cuts.pieces.swap_remove(index).2)
            };
            if let Some(whole) = whole {
                self.arrived(token, block..end, &Bytes::Data(&whole));
            }
            offset += take as u64;
            data = rest;
        }
    }

    pub(super) fn link(&self, up: bool, detail: &str) {
        let mut failed = Vec::new();
        match &mut *lock(&self.life) {
            Life::Plain => {}
            Life::Prepared(early) => early.link = Some((up, detail.to_owned())),
            Life::Clone(core) => core.handle_link(self.now(), up, detail, &mut failed),
        }
        fail_all(failed);
        self.pump();
    }
}

impl OriginSink for Engine {
    fn handle_data(&self, token: u64, offset: u64, data: &[u8]) {
        let end = (offset + data.len() as u64).min(self.shape.size());
        let first = offset.next_multiple_of(BLOCK).min(end);
        let last = if end == self.shape.size() { end } else { (end / BLOCK * BLOCK).max(first) };
        let at = |position: u64| (position - offset) as usize;
        if offset < first {
            self.cut(token, offset, &data[..at(first)]);
        }
        if first < last {
            self.arrived(token, first..last, &Bytes::Data(&data[at(first)..at(last)]));
        }
        if last < end {
            self.cut(token, last, &data[at(last)..at(end)]);
        }
    }

    fn handle_hole(&self, token: u64, offset: u64, length: u64) {
        let end = (offset + length).min(self.shape.size());
        let first = offset.next_multiple_of(BLOCK).min(end);
        let last = if end == self.shape.size() { end } else { (end / BLOCK * BLOCK).max(first) };
        let zeros = [0; BLOCK as usize];
        if offset < first {
            self.cut(token, offset, &zeros[..(first - offset) as usize]);
        }
        if first < last {
            self.arrived(token, first..last, &Bytes::Hole);
        }
        if last < end {
            self.cut(token, last, &zeros[..(end - last) as usize]);
        }
    }

    fn handle_digests(&self, token: u64, offset: u64, crc32c: &[u32]) {
        self.take_digests(token, offset / BLOCK, crc32c);
    }

    fn handle_done(&self, token: u64, result: Result<(), Errno>) {
        if token & DIGEST_TOKENS != 0 {
            self.digests_done(token, result);
            return;
        }
        lock(&self.fill.cuts).pieces.retain(|(of, ..)| *of != token);
        let mut failed = Vec::new();
        if let Life::Clone(core) = &mut *lock(&self.life) {
            core.fetch_done(self.now(), token, result.is_ok(), &mut failed);
        }
        fail_all(failed);
        self.pump();
    }

    fn handle_link(&self, up: bool, detail: &str) {
        self.link(up, detail);
        self.digests_link(up);
    }
}

/// Sends what became due: a rate limit's next run, a retry, the end of a pause.
fn pump_thread(engine: &Weak<Engine>, signal: &Signal) {
    loop {
        let Some(engine) = engine.upgrade() else { return };
        if engine.is_plain() {
            return;
        }
        // While it looks, whatever others find is sooner than what it will sleep until: they raise the signal.
        engine.fill.due.store(u64::MAX, Ordering::SeqCst);
        let due = engine.pump_once();
        engine.fill.due.store(due.map_or(u64::MAX, |due| due.as_nanos() as u64), Ordering::SeqCst);
        let timeout = due.map(|due| due.saturating_sub(engine.now()));
        drop(engine);
        if !signal.wait(timeout) {
            return;
        }
    }
}

fn commit_thread(engine: &Weak<Engine>, signal: &Signal) {
    while signal.wait(Some(COMMIT_EVERY)) {
        let Some(engine) = engine.upgrade() else { return };
        if engine.is_plain() {
            return;
        }
        engine.commit_lazily();
    }
}
