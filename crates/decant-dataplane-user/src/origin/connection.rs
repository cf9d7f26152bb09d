//! One connection to an origin: connect, haggle, ask, hand over, and again.

mod desk;
mod digests;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{self, IoSlice};
use std::sync::PoisonError;
use std::time::{Duration, Instant};

use decant_nbd::client::{Event, RequestError};
use decant_nbd::{Backoff, Context, ErrorCode, ExportInfo, MAX_UNIT, TransmissionFlags, Violation};
use rustix::io::Errno;

use super::Shared;
use crate::device::{OriginSink, Want};
use crate::stream::{Aligned, Stream, Wait, now};
use crate::tls::Session;
pub(super) use desk::Slot;
use desk::part;

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

/// A lane's thread: what it alone needs, kept from connection to connection.
struct Lane<'a> {
    shared: &'a Shared,
    sink: &'a dyn OriginSink,
    index: usize,
    slot: &'a Slot,
    input: Vec<u8>,
    start: usize,
    end: usize,
    data: Aligned,
    /// Digests that came and were not handed over yet: of this tag, from this offset on.
    digests: Vec<u32>,
    digests_of: (usize, u64),
    /// Whether the session was of use: it answered something, or lasted.
    useful: bool,
    silence: Duration,
}

/// Lives until the origin is closed.
pub(super) fn run(shared: &Shared, index: usize, sink: &dyn OriginSink) {
    let timing = shared.options.timing;
    let Some(slot) = shared.slots.get(index) else { return };
    slot.own();
    let kick = &slot.kick;
    let mut lane = Lane {
        shared,
        sink,
        index,
        slot,
        input: vec![0; INPUT],
        start: 0,
        end: 0,
        data: Aligned::new(DATA),
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
    fn session(&mut self, was_up: &mut bool) -> Result<Never, Broken> {
        let shared = self.shared;
        (self.start, self.end, self.useful) = (0, 0, false);
        self.digests.clear();
        let deadline = shared.deadline(shared.options.timing.handshake);
        let mut stream = self.connect(deadline)?;
        self.slot.lock().core.handle_connect();
        self.haggle(&mut stream, deadline)?;
        let Some(export) = self.slot.lock().core.export().cloned() else { return Err(Violation::Ended.into()) };
        if let Some(expected) = shared.options.size
            && expected != export.size
        {
            return Err(Broken::WrongSize { found: export.size, expected });
        }
        *was_up = true;
        self.slot.lock().open(stream, export.clone());
        shared.session_up(&export, self.sink);
        self.kick_lanes(shared.pool.up(self.index));
        if self.index == 0 && export.flags.has(TransmissionFlags::MULTI_CONN) {
            shared.slots.iter().skip(1).for_each(|slot| slot.kick.kick());
        }
        let since = now();
        let result = self.transmit(&export);
        if let Err(Broken::Closed) = result {
            // Leave politely, if that takes no waiting.
            let desk = &mut *self.slot.lock();
            desk.core.disconnect(&mut desk.out);
            let _ = desk.send();
        }
        self.useful |= now().saturating_duration_since(since) >= shared.options.timing.backoff_max;
        result
    }

    /// The connection is gone: what it owed goes back to the pool.
    fn leave(&mut self, was_up: bool, reason: &str) {
        let owed = self.slot.lock().close();
        let lanes = self.shared.pool.down(self.index, owed.into_iter());
        self.kick_lanes(lanes);
        self.shared.session_down(was_up, reason, self.sink);
    }

    fn kick_lanes(&self, lanes: u32) {
        let slots = self.shared.slots.iter().enumerate();
        slots.filter(|(index, _)| lanes >> index & 1 == 1).for_each(|(_, slot)| slot.kick.kick());
    }

    /// Waits; an error when the origin is closed meanwhile.
    fn wait(&self, stream: &Stream, want: Wait, deadline: Option<Instant>) -> Result<(), Broken> {
        stream.wait(want, &self.slot.kick, deadline)?;
        if self.shared.is_closed() { Err(Broken::Closed) } else { Ok(()) }
    }

    fn connect(&self, deadline: Option<Instant>) -> Result<Stream, Broken> {
        let stream = Stream::connect(&self.shared.options.address)?;
        loop {
            let kicked = stream.wait(Wait::Write, &self.slot.kick, deadline)?;
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
            let (consumed, event) = self.slot.lock().step(&self.input[self.start..self.end])?;
            self.start += consumed;
            self.say(stream)?;
            match event {
                Some(Event::Ready) => return Ok(()),
                Some(Event::StartTls) => self.start_tls(stream, deadline)?,
                Some(_) => return Err(Violation::Ended.into()),
                None => {
                    self.refill();
                    self.hear(stream, deadline)?;
                }
            }
        }
    }

    /// Sends what the core wrote during the handshake.
    fn say(&self, stream: &mut Stream) -> Result<(), Broken> {
        let out = &mut self.slot.lock().out;
        if !out.is_empty() {
            stream.send(&[IoSlice::new(out)])?;
            out.clear();
        }
        Ok(())
    }

    /// Waits for input during the handshake.
    fn hear(&mut self, stream: &mut Stream, deadline: Option<Instant>) -> Result<(), Broken> {
        loop {
            match stream.read(&mut self.input[self.end..]) {
                Ok(count) => {
                    self.end += count;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            self.check_handshake(deadline)?;
            let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
            self.wait(stream, want, deadline)?;
            stream.flush()?;
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
        let desk = &mut *self.slot.lock();
        desk.core.handle_tls_started(&mut desk.out);
        stream.send(&[IoSlice::new(&desk.out)])?;
        desk.out.clear();
        Ok(())
    }

    /// Makes room for more input.
    fn refill(&mut self) {
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    /// Requests out, answers in, until something breaks.
    fn transmit(&mut self, export: &ExportInfo) -> Result<Never, Broken> {
        loop {
            self.ask()?;
            let progress = self.handle_answers(export)?;
            self.refill();
            let count = self.slot.lock().read(&mut self.input[self.end..])?;
            self.end += count;
            if count == 0 && !progress {
                self.await_peer()?;
            }
        }
    }

    /// Asks for what the queue holds.
    fn ask(&mut self) -> Result<(), Broken> {
        if self.shared.is_closed() {
            return Err(Broken::Closed);
        }
        let refused = {
            let mut desk = self.slot.lock();
            if let Some(broken) = desk.broken.take() {
                return Err(broken);
            }
            desk.ask(&self.shared.pool, self.index)?;
            std::mem::take(&mut desk.refused)
        };
        for (job, errno) in refused {
            self.shared.pool.answered(self.index, &job);
            self.shared.done(&job.fetch, Err(errno), self.sink);
        }
        Ok(())
    }

    /// Waits for the peer, or for a kick.
    fn await_peer(&mut self) -> Result<(), Broken> {
        let (socket, patience) = {
            let mut desk = self.slot.lock();
            let patience = desk.patience(self.silence);
            (desk.session.as_ref().map(|(stream, _)| stream.socket()), patience)
        };
        if let Err(Broken::Silent(silence)) = patience {
            // The next one may be longer.
            self.silence = (silence * 2).min(self.shared.options.timing.silence_max).max(silence);
        }
        let (Some(socket), (want, deadline)) = (socket, patience?) else { return Err(Violation::Ended.into()) };
        socket.wait(want, &self.slot.kick, Some(deadline))?;
        if self.shared.is_closed() { Err(Broken::Closed) } else { Ok(()) }
    }

    /// Deals with what was read, and with payloads that follow; false if there was nothing.
    fn handle_answers(&mut self, export: &ExportInfo) -> Result<bool, Broken> {
        let mut progress = false;
        loop {
            let (consumed, event) = self.slot.lock().step(&self.input[self.start..self.end])?;
            self.start += consumed;
            let Some(event) = event else { return Ok(progress) };
            progress = true;
            match event {
                Event::Data { tag, offset, length } => self.handle_data(tag as usize, offset, length, export)?,
                Event::Hole { tag, offset, length } => {
                    if let (token, true) = self.piece(tag as usize, offset, length, export)? {
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

    /// Whose piece it is, and whether it is whole blocks. If not, it is dropped, and this part of the job is asked for again in
    /// one piece.
    fn piece(&self, tag: usize, offset: u64, length: u32, export: &ExportInfo) -> Result<(u64, bool), Broken> {
        let end = offset + u64::from(length);
        let whole = offset.is_multiple_of(BLOCK) && (end.is_multiple_of(BLOCK) || end == export.size);
        let mut desk = self.slot.lock();
        let job = desk.job(tag)?;
        job.cut |= !whole;
        Ok((job.fetch.token, whole))
    }

    /// A payload: from the input buffer what is there, then straight from the socket.
    fn handle_data(&mut self, tag: usize, offset: u64, length: u32, export: &ExportInfo) -> Result<(), Broken> {
        let (token, whole) = self.piece(tag, offset, length, export)?;
        let mut done = 0u64;
        while done < u64::from(length) {
            let count = (u64::from(length) - done).min(DATA as u64) as usize;
            let buffer = self.data.slice_mut(0..count);
            let mut filled = count.min(self.end - self.start);
            buffer[..filled].copy_from_slice(&self.input[self.start..self.start + filled]);
            self.start += filled;
            while filled < count {
                let read = self.slot.lock().read(&mut self.data.slice_mut(0..count)[filled..])?;
                filled += read;
                if read == 0 {
                    // New requests go out while a long answer comes in.
                    self.ask()?;
                    self.await_peer()?;
                }
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
        let mut desk = self.slot.lock();
        let mut job = *desk.job(tag)?;
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
                    return desk.ask_next(tag, job);
                }
                Ok(())
            }
        };
        desk.clear(tag);
        drop(desk);
        self.shared.pool.answered(self.index, &job);
        self.shared.done(&job.fetch, result, self.sink);
        Ok(())
    }
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
