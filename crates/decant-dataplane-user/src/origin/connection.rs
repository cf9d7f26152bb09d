//! One connection to an origin: connect, haggle, ask, hand over, and again.

mod digests;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{self, IoSlice};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError, TryLockError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use decant_nbd::client::{Client, Config, Event, Goal, RequestError};
use decant_nbd::{Backoff, Command, Context, Contexts, ErrorCode, ExportInfo, MAX_UNIT, TransmissionFlags, Violation};
use rustix::io::Errno;

use super::Shared;
use super::pool::{Job, Pool};
use crate::device::{OriginSink, Want};
use crate::stream::{Aligned, Kick, Stream, Wait, now};
use crate::tls::Session;

/// Most requests that one connection owes answers to. Bytes are bounded by whoever asks.
const MAX_OUTSTANDING: usize = 1024;
/// Reply headers, and small replies whole, are read this much at a time; larger payloads go straight to their buffer.
const INPUT: usize = 32 * 1024;
const _: () = assert!(INPUT >= MAX_UNIT);
/// Payload that is handed over at a time, at most.
const DATA: usize = 1024 * 1024;
/// The granularity of everything that is handed over.
const BLOCK: u64 = 4096;

/// Why a try or a session ended.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(#[from] Violation),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("no session within {} s", .0.as_secs_f32())]
    Handshake(Duration),
    #[error("not a byte for {} s while it owes an answer", .0.as_secs_f32())]
    Silent(Duration),
    #[error("the export has {found} bytes, but {expected} were agreed")]
    WrongSize { found: u64, expected: u64 },
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the server refuses a request: {0}")]
    Request(#[from] RequestError),
    #[error("closed")]
    Closed,
}

/// Where a lane's thread works, and who it works for.
#[derive(Clone, Copy)]
struct Lane<'a> {
    shared: &'a Shared,
    sink: &'a dyn OriginSink,
    index: usize,
    slot: &'a Slot,
}

/// A lane as those see it who have something to ask: its state, behind a lock that its thread lets go of while it waits for the
/// network, and the means to wake it.
pub(super) struct Slot {
    pub(super) kick: Kick,
    desk: Mutex<Desk>,
    /// The lane's thread.
    owner: OnceLock<ThreadId>,
}

impl Slot {
    pub(super) fn new(options: &super::Options) -> io::Result<Self> {
        Ok(Self { kick: Kick::new()?, desk: Mutex::new(Desk::new(options)), owner: OnceLock::new() })
    }

    fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Has the lane ask for what its queue holds. If its thread is idle, the caller puts it on the wire: waking a thread takes
    /// longer than that. Never blocks.
    pub(super) fn post(&self, pool: &Pool, index: usize) {
        if self.owner.get() == Some(&thread::current().id()) {
            // Called from within the sink: the thread looks at its queue before it waits.
            return;
        }
        let posted = match self.desk.try_lock() {
            Ok(mut desk) => desk.post(pool, index),
            Err(TryLockError::Poisoned(_) | TryLockError::WouldBlock) => false,
        };
        if !posted {
            self.kick.kick();
        }
    }
}

/// What a session needs, kept from one to the next.
struct Desk {
    core: Client,
    /// The session, while requests may go out.
    session: Option<(Stream, ExportInfo)>,
    /// What broke the session while a request was put on the wire, for the thread to find.
    broken: Option<Broken>,
    /// Jobs in progress, by tag; `free` holds the empty places.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs that this export cannot answer.
    refused: Vec<(Job, Errno)>,
    input: Vec<u8>,
    start: usize,
    end: usize,
    data: Aligned,
    out: Vec<u8>,
    /// Digests that came and were not handed over yet: of this tag, from this offset on.
    digests: Vec<u32>,
    digests_of: (usize, u64),
    /// Bytes received when the peer was last heard, or when it began to owe an answer; and when that was.
    heard: (u64, Instant),
    /// Whether the session was of use: it answered something, or lasted.
    useful: bool,
    silence: Duration,
}

/// Lives until the origin is closed.
pub(super) fn run(shared: &Shared, index: usize, sink: &dyn OriginSink) {
    let timing = shared.options.timing;
    let Some(slot) = shared.slots.get(index) else { return };
    let _ = slot.owner.set(thread::current().id());
    let (kick, lane) = (&slot.kick, Lane { shared, sink, index, slot });
    let mut backoff = Backoff::new(timing.backoff_first, timing.backoff_max);
    while !shared.is_closed() {
        if index > 0 && !may_share(shared) {
            kick.wait(None);
            kick.clear();
            continue;
        }
        let mut was_up = false;
        let Err(reason) = lane.session(&mut was_up);
        if lane.leave(was_up, &reason.to_string()) {
            backoff.handle_success();
        }
        let again = backoff.handle_failure(now(), random());
        while !shared.is_closed() && now() < again {
            kick.wait(Some(again));
            kick.clear();
        }
    }
}

/// Whether the server takes several connections; known once the first session is up.
fn may_share(shared: &Shared) -> bool {
    let link = shared.link.lock().unwrap_or_else(PoisonError::into_inner);
    link.export.as_ref().is_some_and(|export| export.flags.has(TransmissionFlags::MULTI_CONN))
}

/// Spreads the tries of many lanes; the standard library's hash keys are random.
fn random() -> u32 {
    let bytes = RandomState::new().hash_one(0u8).to_ne_bytes();
    u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

enum Never {}

impl Lane<'_> {
    /// One connection from beginning to end; it always ends with a reason.
    fn session(self, was_up: &mut bool) -> Result<Never, Broken> {
        let shared = self.shared;
        let deadline = shared.deadline(shared.options.timing.handshake);
        let mut desk = self.slot.lock();
        let (stream, export) = desk.establish(self, deadline)?;
        *was_up = true;
        shared.session_up(&export, self.sink);
        let share = self.index == 0 && export.flags.has(TransmissionFlags::MULTI_CONN);
        desk.session = Some((stream, export));
        self.kick_lanes(shared.pool.up(self.index));
        if share {
            shared.slots.iter().skip(1).for_each(|slot| slot.kick.kick());
        }
        let since = now();
        let result = self.transmit(desk);
        let mut desk = self.slot.lock();
        if let (Err(Broken::Closed), Some((mut stream, _))) = (&result, desk.session.take()) {
            // Leave politely, if that takes no waiting.
            let desk = &mut *desk;
            desk.core.disconnect(&mut desk.out);
            let _ = desk.send(&mut stream);
        }
        desk.useful |= now().saturating_duration_since(since) >= shared.options.timing.backoff_max;
        result
    }

    /// The connection is gone: what it owed goes back to the pool. True if it was of use.
    fn leave(self, was_up: bool, reason: &str) -> bool {
        let mut desk = self.slot.lock();
        desk.session = None;
        desk.broken = None;
        desk.core.handle_disconnect();
        while desk.core.poll_lost().is_some() {}
        desk.free.clear();
        let desk = &mut *desk;
        let owed = desk.jobs.drain(..).flatten().chain(desk.refused.drain(..).map(|(job, _)| job));
        let lanes = self.shared.pool.down(self.index, owed);
        self.kick_lanes(lanes);
        self.shared.session_down(was_up, reason, self.sink);
        desk.useful
    }

    fn kick_lanes(self, lanes: u32) {
        let of = |index: &usize| lanes >> index & 1 == 1;
        (0..self.shared.slots.len()).filter(of).for_each(|index| self.shared.slots[index].kick.kick());
    }

    /// Waits; an error when the origin is closed meanwhile.
    fn wait(self, stream: &Stream, want: Wait, deadline: Option<Instant>) -> Result<(), Broken> {
        stream.wait(want, &self.slot.kick, deadline)?;
        if self.shared.is_closed() { Err(Broken::Closed) } else { Ok(()) }
    }

    fn check_handshake(self, deadline: Option<Instant>) -> Result<(), Broken> {
        if deadline.is_some_and(|deadline| now() >= deadline) {
            return Err(Broken::Handshake(self.shared.options.timing.handshake));
        }
        Ok(())
    }

    /// Requests out, answers in, until something breaks. The desk is free for others while this waits.
    fn transmit<'s>(&'s self, mut desk: MutexGuard<'s, Desk>) -> Result<Never, Broken> {
        desk.heard = (0, now());
        loop {
            if let Some(broken) = desk.broken.take() {
                return Err(broken);
            }
            let Some((mut stream, export)) = desk.session.take() else { return Err(Violation::Ended.into()) };
            let idle = desk.advance(*self, &mut stream, &export);
            let socket = stream.socket();
            desk.session = Some((stream, export));
            let Some((want, deadline)) = idle? else { continue };
            drop(desk);
            socket.wait(want, &self.slot.kick, Some(deadline))?;
            if self.shared.is_closed() {
                return Err(Broken::Closed);
            }
            desk = self.slot.lock();
        }
    }
}

impl Desk {
    fn new(options: &super::Options) -> Self {
        let config = Config {
            goal: Goal::Transmission,
            export: options.export.clone(),
            tls: options.tls.is_some(),
            contexts: Contexts { allocation: false, digests: options.digests },
            max_outstanding: MAX_OUTSTANDING,
        };
        Self {
            core: Client::new(config),
            session: None,
            broken: None,
            jobs: Vec::with_capacity(MAX_OUTSTANDING),
            free: Vec::with_capacity(MAX_OUTSTANDING),
            refused: Vec::new(),
            input: vec![0; INPUT],
            start: 0,
            end: 0,
            data: Aligned::new(DATA),
            out: Vec::new(),
            digests: Vec::new(),
            digests_of: (0, 0),
            heard: (0, now()),
            useful: false,
            silence: options.timing.silence,
        }
    }

    /// A connection with its handshake done.
    fn establish(&mut self, lane: Lane<'_>, deadline: Option<Instant>) -> Result<(Stream, ExportInfo), Broken> {
        (self.start, self.end, self.useful) = (0, 0, false);
        self.out.clear();
        self.digests.clear();
        let mut stream = connect(lane, deadline)?;
        self.core.handle_connect();
        self.haggle(lane, &mut stream, deadline)?;
        let Some(export) = self.core.export().cloned() else { return Err(Violation::Ended.into()) };
        match lane.shared.options.size {
            Some(expected) if expected != export.size => Err(Broken::WrongSize { found: export.size, expected }),
            _ => Ok((stream, export)),
        }
    }

    /// Puts what the queue holds on the wire, on whoever's thread; false if the lane's own must see to it.
    fn post(&mut self, pool: &Pool, index: usize) -> bool {
        if self.broken.is_some() {
            return false;
        }
        let Some((mut stream, export)) = self.session.take() else { return false };
        let sent = self.ask(pool, index, &export).and_then(|()| self.send(&mut stream));
        let done = self.refused.is_empty() && !stream.has_pending() && self.core.outstanding() < MAX_OUTSTANDING;
        self.session = Some((stream, export));
        self.broken = sent.err();
        done && self.broken.is_none()
    }

    /// Does all that can be done now; what to wait for then, `None`: there may be more to do.
    fn advance(
        &mut self,
        lane: Lane<'_>,
        stream: &mut Stream,
        export: &ExportInfo,
    ) -> Result<Option<(Wait, Instant)>, Broken> {
        if lane.shared.is_closed() {
            return Err(Broken::Closed);
        }
        self.ask(&lane.shared.pool, lane.index, export)?;
        self.send(stream)?;
        for (job, errno) in std::mem::take(&mut self.refused) {
            lane.shared.pool.answered(lane.index, &job);
            lane.shared.done(&job.fetch, Err(errno), lane.sink);
        }
        let progress = self.handle_answers(lane, stream, export)?;
        self.refill();
        if self.fill(stream)? || progress {
            return Ok(None);
        }
        if stream.has_pending() {
            stream.flush()?;
        }
        // Nothing to do but wait: for an answer if one is owed, and no longer than a live peer would take. If none is owed,
        // somebody may ask meanwhile without waking this thread, which then looks again within the same time.
        let owes = self.core.outstanding() > 0;
        if !owes || self.heard.0 != stream.bytes_received() {
            self.heard = (stream.bytes_received(), now());
        }
        let deadline = self.heard.1 + self.silence;
        if now() >= deadline {
            let silence = self.silence;
            self.silence = (silence * 2).min(lane.shared.options.timing.silence_max).max(silence);
            return Err(Broken::Silent(silence));
        }
        Ok(Some((if stream.has_pending() { Wait::ReadWrite } else { Wait::Read }, deadline)))
    }
    /// The handshake, TLS included.
    fn haggle(&mut self, lane: Lane<'_>, stream: &mut Stream, deadline: Option<Instant>) -> Result<(), Broken> {
        loop {
            let step = self.core.handle_input(&self.input[self.start..self.end], &mut self.out)?;
            self.start += step.consumed;
            self.send(stream)?;
            match step.event {
                Some(Event::Ready) => return Ok(()),
                Some(Event::StartTls) => self.start_tls(lane, stream, deadline)?,
                Some(_) => return Err(Violation::Ended.into()),
                None => {
                    self.refill();
                    while !self.fill(stream)? {
                        lane.check_handshake(deadline)?;
                        let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
                        lane.wait(stream, want, deadline)?;
                        stream.flush()?;
                    }
                }
            }
        }
    }

    fn start_tls(&mut self, lane: Lane<'_>, stream: &mut Stream, deadline: Option<Instant>) -> Result<(), Broken> {
        if self.start < self.end {
            return Err(Violation::PlaintextAfterStartTls.into());
        }
        let Some(tls) = &lane.shared.options.tls else { return Err(Violation::Ended.into()) };
        stream.start_tls(Session::client(tls)?);
        while !stream.is_secured() {
            // Drives the TLS handshake; no data can come before it is over and we asked for some.
            match stream.read(&mut self.input[..1]) {
                Ok(_) => return Err(Violation::Malformed("TLS handshake: data before it was asked for").into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            lane.check_handshake(deadline)?;
            if !stream.is_secured() {
                let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
                lane.wait(stream, want, deadline)?;
            }
        }
        self.core.handle_tls_started(&mut self.out);
        self.send(stream)
    }

    fn send(&mut self, stream: &mut Stream) -> Result<(), Broken> {
        if !self.out.is_empty() {
            stream.send(&[IoSlice::new(&self.out)])?;
            self.out.clear();
        }
        Ok(())
    }

    /// Makes room for more input.
    fn refill(&mut self) {
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    /// Reads what there is; false if nothing.
    fn fill(&mut self, stream: &mut Stream) -> Result<bool, Broken> {
        match stream.read(&mut self.input[self.end..]) {
            Ok(count) => {
                self.end += count;
                Ok(true)
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(false),
            Err(error) => Err(error.into()),
        }
    }

    /// Asks for the lane's jobs.
    fn ask(&mut self, pool: &Pool, index: usize, export: &ExportInfo) -> Result<(), Broken> {
        if self.core.outstanding() == 0 {
            self.heard.1 = now();
        }
        while self.core.outstanding() < MAX_OUTSTANDING {
            let Some(job) = pool.take(index) else { return Ok(()) };
            let outside = job.fetch.offset.checked_add(job.fetch.length.into()).is_none_or(|end| end > export.size);
            let impossible = job.fetch.want == Want::Digests && !self.core.contexts().digests;
            if outside || impossible {
                self.refused.push((job, if outside { Errno::INVAL } else { Errno::OPNOTSUPP }));
                continue;
            }
            let tag = match self.free.pop() {
                Some(tag) => tag,
                None => {
                    self.jobs.push(None);
                    self.jobs.len() - 1
                }
            };
            self.ask_next(tag, job, export)?;
        }
        Ok(())
    }

    /// Asks for the job's next part.
    fn ask_next(&mut self, tag: usize, mut job: Job, export: &ExportInfo) -> Result<(), Broken> {
        job.cut = false;
        self.jobs[tag] = Some(job);
        let command = match job.fetch.want {
            Want::Data => Command::Read { unfragmented: job.unfragmented },
            Want::Digests => Command::BlockStatus { one: false },
        };
        Ok(self.core.request(tag as u64, command, job.next, part(&job, export), &mut self.out)?)
    }

    /// Deals with what was read, and with payloads that follow; false if there was nothing.
    fn handle_answers(&mut self, lane: Lane<'_>, stream: &mut Stream, export: &ExportInfo) -> Result<bool, Broken> {
        let mut progress = false;
        loop {
            let step = self.core.handle_input(&self.input[self.start..self.end], &mut self.out)?;
            self.start += step.consumed;
            let Some(event) = step.event else { return Ok(progress) };
            progress = true;
            match event {
                Event::Data { tag, offset, length } => {
                    self.handle_data(lane, stream, tag as usize, (offset, length), export)?
                }
                Event::Hole { tag, offset, length } => {
                    if self.is_whole(tag as usize, offset, length, export) {
                        let token = self.job(tag as usize)?.fetch.token;
                        lane.sink.handle_hole(token, offset, length.into());
                    }
                }
                Event::Extent { tag, context: Context::Digests, offset, length, flags } => {
                    self.handle_digest(lane, tag as usize, offset, length, flags)?;
                }
                Event::Extent { .. } => {}
                Event::Done { tag, result } => self.handle_done(lane, tag as usize, result, export)?,
                _ => return Err(Violation::Ended.into()),
            }
        }
    }

    fn job(&mut self, tag: usize) -> Result<&mut Job, Violation> {
        self.jobs.get_mut(tag).and_then(Option::as_mut).ok_or(Violation::UnknownCookie(tag as u64))
    }

    /// Whether a piece is whole blocks. If not, it is dropped, and this part of the job is asked for again in one piece.
    fn is_whole(&mut self, tag: usize, offset: u64, length: u32, export: &ExportInfo) -> bool {
        let end = offset + u64::from(length);
        let whole = offset.is_multiple_of(BLOCK) && (end.is_multiple_of(BLOCK) || end == export.size);
        if !whole && let Ok(job) = self.job(tag) {
            job.cut = true;
        }
        whole
    }

    /// A payload: from the input buffer what is there, then straight from the socket.
    fn handle_data(
        &mut self,
        lane: Lane<'_>,
        stream: &mut Stream,
        tag: usize,
        (offset, length): (u64, u32),
        export: &ExportInfo,
    ) -> Result<(), Broken> {
        let whole = self.is_whole(tag, offset, length, export);
        let token = self.job(tag)?.fetch.token;
        let mut done = 0u64;
        while done < u64::from(length) {
            let count = (u64::from(length) - done).min(DATA as u64) as usize;
            let buffer = self.data.slice_mut(0..count);
            let mut filled = count.min(self.end - self.start);
            buffer[..filled].copy_from_slice(&self.input[self.start..self.start + filled]);
            self.start += filled;
            let mut heard = now();
            while filled < count {
                match stream.read(&mut self.data.slice_mut(0..count)[filled..]) {
                    Ok(read) => {
                        filled += read;
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
                let before = stream.bytes_received();
                let deadline = heard.checked_add(self.silence);
                if deadline.is_some_and(|deadline| now() >= deadline) {
                    return Err(Broken::Silent(self.silence));
                }
                // New requests go out while a long answer comes in.
                self.ask(&lane.shared.pool, lane.index, export)?;
                self.send(stream)?;
                let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
                lane.wait(stream, want, deadline)?;
                stream.flush()?;
                if before != stream.bytes_received() {
                    heard = now();
                }
            }
            if whole {
                lane.sink.handle_data(token, offset + done, self.data.slice(0..count));
            }
            done += count as u64;
        }
        Ok(())
    }

    fn handle_done(
        &mut self,
        lane: Lane<'_>,
        tag: usize,
        result: Result<(), ErrorCode>,
        export: &ExportInfo,
    ) -> Result<(), Broken> {
        self.useful = true;
        self.silence = lane.shared.options.timing.silence;
        self.hand_over_digests(lane)?;
        let mut job = *self.job(tag)?;
        let result = match result {
            Err(ErrorCode::Shutdown) => return Err(Broken::ShuttingDown),
            Err(error) => Err(errno(error)),
            Ok(()) if job.cut && (job.unfragmented || !export.flags.has(TransmissionFlags::DF)) => Err(Errno::IO),
            Ok(()) => {
                if job.cut {
                    job.unfragmented = true;
                } else if job.fetch.want == Want::Data {
                    job.next += u64::from(part(&job, export));
                }
                if job.left() > 0 {
                    return self.ask_next(tag, job, export);
                }
                Ok(())
            }
        };
        self.jobs[tag] = None;
        self.free.push(tag);
        lane.shared.pool.answered(lane.index, &job);
        lane.shared.done(&job.fetch, result, lane.sink);
        Ok(())
    }
}

fn connect(lane: Lane<'_>, deadline: Option<Instant>) -> Result<Stream, Broken> {
    let stream = Stream::connect(&lane.shared.options.address)?;
    loop {
        let kicked = stream.wait(Wait::Write, &lane.slot.kick, deadline)?;
        if lane.shared.is_closed() {
            return Err(Broken::Closed);
        }
        if !kicked {
            break;
        }
    }
    lane.check_handshake(deadline)?;
    stream.connected()?;
    Ok(stream)
}

/// Bytes to ask for next: all of the job, unless the server takes less at a time.
fn part(job: &Job, export: &ExportInfo) -> u32 {
    let most = export.blocks.maximum.min(decant_nbd::MAX_PAYLOAD).max(BLOCK as u32) / BLOCK as u32 * BLOCK as u32;
    u32::try_from(job.left()).unwrap_or(most).min(most)
}

fn errno(error: ErrorCode) -> Errno {
    match error {
        ErrorCode::Permission => Errno::PERM,
        ErrorCode::Io => Errno::IO,
        ErrorCode::NoMemory => Errno::NOMEM,
        ErrorCode::Invalid => Errno::INVAL,
        ErrorCode::NoSpace => Errno::NOSPC,
        ErrorCode::Overflow => Errno::OVERFLOW,
        ErrorCode::NotSupported => Errno::OPNOTSUPP,
        ErrorCode::Shutdown => Errno::SHUTDOWN,
    }
}
