//! One connection to an origin: connect, haggle, ask, hand over, and again.

mod digests;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use decant_nbd::client::{Client, Config, Event, Goal, RequestError};
use decant_nbd::{Backoff, Command, Context, Contexts, ErrorCode, ExportInfo, MAX_UNIT, TransmissionFlags, Violation};
use rustix::io::Errno;

use super::Shared;
use super::pool::Job;
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

/// A thread's own things, kept from connection to connection.
struct Lane<'a> {
    shared: &'a Shared,
    sink: &'a dyn OriginSink,
    index: usize,
    kick: &'a Kick,
    core: Client,
    /// Jobs in progress, by tag; `free` holds the empty places.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    input: Vec<u8>,
    start: usize,
    end: usize,
    data: Aligned,
    out: Vec<u8>,
    /// Digests that came and were not handed over yet: of this tag, from this offset on.
    digests: Vec<u32>,
    digests_of: (usize, u64),
    /// Whether the session was of use: it answered something, or lasted.
    useful: bool,
    silence: Duration,
}

/// Lives until the origin is closed.
pub(super) fn run(shared: &Shared, index: usize, sink: &dyn OriginSink) {
    let (options, timing) = (&shared.options, shared.options.timing);
    let Some(kick) = shared.kicks.get(index) else { return };
    let config = Config {
        goal: Goal::Transmission,
        export: options.export.clone(),
        tls: options.tls.is_some(),
        contexts: Contexts { allocation: false, digests: options.digests },
        max_outstanding: MAX_OUTSTANDING,
    };
    let mut lane = Lane {
        shared,
        sink,
        index,
        kick,
        core: Client::new(config),
        jobs: Vec::with_capacity(MAX_OUTSTANDING),
        free: Vec::with_capacity(MAX_OUTSTANDING),
        input: vec![0; INPUT],
        start: 0,
        end: 0,
        data: Aligned::new(DATA),
        out: Vec::new(),
        digests: Vec::new(),
        digests_of: (0, 0),
        useful: false,
        silence: timing.silence,
    };
    let mut backoff = Backoff::new(timing.backoff_first, timing.backoff_max);
    while !shared.is_closed() {
        if index > 0 && !may_share(shared) {
            kick.wait(None);
            kick.clear();
            continue;
        }
        let mut was_up = false;
        let Err(reason) = lane.session(&mut was_up);
        lane.leave(was_up, &reason.to_string());
        if lane.useful {
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
    let link = shared.link.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
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
    fn session(&mut self, was_up: &mut bool) -> Result<Never, Broken> {
        let shared = self.shared;
        (self.start, self.end, self.useful) = (0, 0, false);
        self.out.clear();
        self.digests.clear();
        let deadline = shared.deadline(shared.options.timing.handshake);
        let mut stream = self.connect(deadline)?;
        self.core.handle_connect();
        self.haggle(&mut stream, deadline)?;
        let Some(export) = self.core.export().cloned() else { return Err(Violation::Ended.into()) };
        if let Some(expected) = shared.options.size
            && expected != export.size
        {
            return Err(Broken::WrongSize { found: export.size, expected });
        }
        *was_up = true;
        shared.session_up(&export, self.sink);
        self.kick_lanes(shared.pool.up(self.index));
        if self.index == 0 && export.flags.has(TransmissionFlags::MULTI_CONN) {
            shared.kicks.iter().skip(1).for_each(Kick::kick);
        }
        let since = now();
        let result = self.transmit(&mut stream, &export);
        if let Err(Broken::Closed) = result {
            // Leave politely, if that takes no waiting.
            self.core.disconnect(&mut self.out);
            let _ = self.send(&mut stream);
        }
        self.useful |= now().saturating_duration_since(since) >= shared.options.timing.backoff_max;
        result
    }

    /// The connection is gone: what it owed goes back to the pool.
    fn leave(&mut self, was_up: bool, reason: &str) {
        self.core.handle_disconnect();
        while self.core.poll_lost().is_some() {}
        self.free.clear();
        let owed = self.jobs.drain(..).flatten();
        let lanes = self.shared.pool.down(self.index, owed);
        self.kick_lanes(lanes);
        self.shared.session_down(was_up, reason, self.sink);
    }

    fn kick_lanes(&self, lanes: u32) {
        (0..self.shared.kicks.len()).filter(|lane| lanes >> lane & 1 == 1).for_each(|lane| self.shared.kick(lane));
    }

    /// Waits; an error when the origin is closed meanwhile.
    fn wait(&self, stream: &Stream, want: Wait, deadline: Option<Instant>) -> Result<(), Broken> {
        stream.wait(want, self.kick, deadline)?;
        if self.shared.is_closed() { Err(Broken::Closed) } else { Ok(()) }
    }

    fn connect(&self, deadline: Option<Instant>) -> Result<Stream, Broken> {
        let stream = Stream::connect(&self.shared.options.address)?;
        loop {
            let kicked = stream.wait(Wait::Write, self.kick, deadline)?;
            if self.shared.is_closed() {
                return Err(Broken::Closed);
            }
            if !kicked {
                break;
            }
        }
        self.check_handshake(deadline)?;
        stream.connected()?;
        Ok(stream)
    }

    fn check_handshake(&self, deadline: Option<Instant>) -> Result<(), Broken> {
        if deadline.is_some_and(|deadline| now() >= deadline) {
            return Err(Broken::Handshake(self.shared.options.timing.handshake));
        }
        Ok(())
    }

    /// The handshake, TLS included.
    fn haggle(&mut self, stream: &mut Stream, deadline: Option<Instant>) -> Result<(), Broken> {
        loop {
            let step = self.core.handle_input(&self.input[self.start..self.end], &mut self.out)?;
            self.start += step.consumed;
            self.send(stream)?;
            match step.event {
                Some(Event::Ready) => return Ok(()),
                Some(Event::StartTls) => self.start_tls(stream, deadline)?,
                Some(_) => return Err(Violation::Ended.into()),
                None => {
                    self.refill();
                    while !self.fill(stream)? {
                        self.check_handshake(deadline)?;
                        let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
                        self.wait(stream, want, deadline)?;
                        stream.flush()?;
                    }
                }
            }
        }
    }

    fn start_tls(&mut self, stream: &mut Stream, deadline: Option<Instant>) -> Result<(), Broken> {
        if self.start < self.end {
            return Err(Violation::PlaintextAfterStartTls.into());
        }
        let Some(tls) = &self.shared.options.tls else { return Err(Violation::Ended.into()) };
        stream.start_tls(Session::client(tls)?);
        while !stream.is_secured() {
            // Drives the TLS handshake; no data can come before it is over and we asked for some.
            match stream.read(&mut self.input[..1]) {
                Ok(_) => return Err(Violation::Malformed("TLS handshake: data before it was asked for").into()),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            self.check_handshake(deadline)?;
            if !stream.is_secured() {
                let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
                self.wait(stream, want, deadline)?;
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

    /// Requests out, answers in, until something breaks.
    fn transmit(&mut self, stream: &mut Stream, export: &ExportInfo) -> Result<Never, Broken> {
        // When the peer was last heard; or when it was first asked, after a while in which it owed nothing.
        let mut heard = (stream.bytes_received(), now());
        let mut owed = false;
        loop {
            self.ask(export)?;
            self.send(stream)?;
            let progress = self.handle_answers(stream, export)?;
            self.refill();
            if self.fill(stream)? || progress {
                continue;
            }
            if stream.has_pending() {
                stream.flush()?;
            }
            // Nothing to do but wait: for an answer if one is owed, and no longer than a live peer would take.
            let owes = self.core.outstanding() > 0;
            if !owed || heard.0 != stream.bytes_received() {
                heard = (stream.bytes_received(), now());
            }
            owed = owes;
            let deadline = heard.1.checked_add(self.silence).filter(|_| owes);
            if deadline.is_some_and(|deadline| now() >= deadline) {
                let silence = self.silence;
                self.silence = (silence * 2).min(self.shared.options.timing.silence_max).max(silence);
                return Err(Broken::Silent(silence));
            }
            let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
            self.wait(stream, want, deadline)?;
        }
    }

    /// Puts the lane's jobs on the wire.
    fn ask(&mut self, export: &ExportInfo) -> Result<(), Broken> {
        if self.shared.is_closed() {
            return Err(Broken::Closed);
        }
        while self.core.outstanding() < MAX_OUTSTANDING {
            let Some(job) = self.shared.pool.take(self.index) else { return Ok(()) };
            let outside = job.fetch.offset.checked_add(job.fetch.length.into()).is_none_or(|end| end > export.size);
            let impossible = job.fetch.want == Want::Digests && !self.core.contexts().digests;
            if outside || impossible {
                self.shared.pool.answered(self.index, &job);
                let errno = if outside { Errno::INVAL } else { Errno::OPNOTSUPP };
                self.shared.done(&job.fetch, Err(errno), self.sink);
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
    fn handle_answers(&mut self, stream: &mut Stream, export: &ExportInfo) -> Result<bool, Broken> {
        let mut progress = false;
        loop {
            let step = self.core.handle_input(&self.input[self.start..self.end], &mut self.out)?;
            self.start += step.consumed;
            let Some(event) = step.event else { return Ok(progress) };
            progress = true;
            match event {
                Event::Data { tag, offset, length } => {
                    self.handle_data(stream, tag as usize, offset, length, export)?
                }
                Event::Hole { tag, offset, length } => {
                    if self.is_whole(tag as usize, offset, length, export) {
                        let token = self.job(tag as usize)?.fetch.token;
                        self.sink.handle_hole(token, offset, length.into());
                    }
                }
                Event::Extent { tag, context: Context::Digests, offset, length, flags } => {
                    self.handle_digest(tag as usize, offset, length, flags)?;
                }
                Event::Extent { .. } => {}
                Event::Done { tag, result } => self.handle_done(tag as usize, result, export)?,
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
        stream: &mut Stream,
        tag: usize,
        offset: u64,
        length: u32,
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
            let mut heard = (stream.bytes_received(), now());
            while filled < count {
                match stream.read(&mut self.data.slice_mut(0..count)[filled..]) {
                    Ok(read) => {
                        filled += read;
                        continue;
                    }
                    Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                    Err(error) => return Err(error.into()),
                }
                if heard.0 != stream.bytes_received() {
                    heard = (stream.bytes_received(), now());
                }
                let deadline = heard.1.checked_add(self.silence);
                if deadline.is_some_and(|deadline| now() >= deadline) {
                    return Err(Broken::Silent(self.silence));
                }
                // New requests go out while a long answer comes in.
                self.ask(export)?;
                self.send(stream)?;
                let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
                self.wait(stream, want, deadline)?;
                stream.flush()?;
            }
            if whole {
                self.sink.handle_data(token, offset + done, self.data.slice(0..count));
            }
            done += count as u64;
        }
        Ok(())
    }

    fn handle_done(&mut self, tag: usize, result: Result<(), ErrorCode>, export: &ExportInfo) -> Result<(), Broken> {
        self.useful = true;
        self.silence = self.shared.options.timing.silence;
        self.hand_over_digests()?;
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
        self.shared.pool.answered(self.index, &job);
        self.shared.done(&job.fetch, result, self.sink);
        Ok(())
    }
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
