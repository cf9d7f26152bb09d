//! One connection of an export.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use decant_nbd::server::{Event, Replier, Server};
use decant_nbd::{Command, Context, ErrorCode, MAX_DESCRIPTORS, MAX_UNIT, Request, Violation, put_descriptor};
use rustix::io::Errno;

use super::replies::{CHUNK, Replies};
use super::{HANDSHAKE_DEADLINE, Shared};
use crate::device::{ReadSink, Served, Status};
use crate::stream::{Kick, Stream, Wait, now};
use crate::tls::Session;

/// Requests are read this much at a time; the core needs [`MAX_UNIT`] at once.
const INPUT: usize = 64 * 1024;
const _: () = assert!(INPUT >= MAX_UNIT);
/// Bytes of a block that a digest is of.
const BLOCK: u64 = 4096;

/// Why a connection ended other than by the client's leave.
#[derive(Debug, thiserror::Error)]
enum Ended {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(#[from] Violation),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("the handshake took longer than {} s", HANDSHAKE_DEADLINE.as_secs())]
    HandshakeDeadline,
    #[error("the export is closing")]
    Closing,
}

/// Reads of one connection that wait for their bytes, at most; what comes then waits in the socket. More than a clone lets wait
/// in all, so that there it never comes to that: what is too many fails, and writes go on.
const MAX_PARKED: usize = 4096;
const _: () = assert!(MAX_PARKED > decant_clone::demand::MAX_PARKED);

/// The way out: the connection's thread and whoever completes a parked read write here, whole replies under one lock.
struct Outlet {
    stream: Mutex<Stream>,
    kick: Arc<Kick>,
    parked: AtomicUsize,
    /// Reads that do not wait any more, for the thread to go on with.
    rests: Mutex<VecDeque<Rest>>,
    bytes_read: Arc<AtomicU64>,
    closed: AtomicBool,
}

impl Outlet {
    fn lock(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn rests(&self) -> MutexGuard<'_, VecDeque<Rest>> {
        self.rests.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// What is still to be done of a read that waited.
struct Rest {
    request: Request,
    /// From here on.
    offset: u64,
    /// Or it failed there.
    result: Result<(), Errno>,
}

/// A part of a read whose bytes were not here: one piece, with the rest of the read behind it; or all of a read that has to be
/// answered in one piece. So a read takes no memory while it waits, and never more than a piece of it waits.
struct Parked {
    outlet: Arc<Outlet>,
    replier: Replier,
    request: Request,
    offset: u64,
    length: u32,
}

impl ReadSink for Parked {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        let Self { outlet, replier, request, offset, length } = *self;
        let next = offset + u64::from(length);
        let ends = next == request.offset + u64::from(request.length);
        let (rest, waits) = {
            let mut stream = outlet.lock();
            let rest = match result {
                // The client has yet to take what it was sent. Its next bytes are read again when it has, instead of being
                // kept until then.
                Ok(_) if stream.has_pending() => Some((offset, Ok(()))),
                Ok(data) => {
                    let header = replier.data(&request, offset, length, ends);
                    // A connection that broke is found broken by its thread.
                    let _ = stream.send(&[IoSlice::new(header.as_bytes()), IoSlice::new(data)]);
                    outlet.bytes_read.fetch_add(length.into(), Ordering::Relaxed);
                    (!ends).then_some((next, Ok(())))
                }
                // An error ends the answer: the thread knows what of it is not sent yet.
                Err(errno) => Some((offset, Err(errno))),
            };
            (rest, stream.has_pending())
        };
        let has_rest = rest.is_some();
        if let Some((offset, result)) = rest {
            outlet.rests().push_back(Rest { request, offset, result });
        }
        let before = outlet.parked.fetch_sub(1, Ordering::AcqRel);
        // The thread sends what the socket did not take, goes on with the read, or waits for room for one more.
        if has_rest || waits || before == MAX_PARKED {
            outlet.kick.kick();
        }
    }

    fn is_wanted(&self) -> bool {
        !self.outlet.closed.load(Ordering::Relaxed)
    }
}

struct Connection<'a> {
    shared: &'a Shared,
    outlet: Arc<Outlet>,
    kick: &'a Kick,
    core: Server,
    input: Vec<u8>,
    start: usize,
    end: usize,
    replies: Replies,
    /// Handshake answers and errors, as the core writes them.
    out: Vec<u8>,
    runs: Vec<Status>,
    digests: Vec<u32>,
}

/// Serves one connection to its end.
pub(super) fn run(shared: &Shared, stream: Stream, kick: &Arc<Kick>, peer: &str) {
    let mut out = Vec::new();
    let core = Server::new(shared.config.clone(), &mut out);
    let outlet = Outlet {
        stream: Mutex::new(stream),
        kick: Arc::clone(kick),
        parked: AtomicUsize::new(0),
        rests: Mutex::default(),
        bytes_read: Arc::clone(&shared.bytes_read),
        closed: AtomicBool::new(false),
    };
    let mut connection = Connection {
        shared,
        outlet: Arc::new(outlet),
        kick,
        core,
        input: vec![0; INPUT],
        start: 0,
        end: 0,
        replies: Replies::new(),
        out,
        runs: Vec::new(),
        digests: Vec::new(),
    };
    let export = &shared.config.export.name;
    let ended = connection.serve();
    connection.outlet.closed.store(true, Ordering::Relaxed);
    // Reads that wait keep the stream, for as long as their bytes take to come; the client is not to wait with them.
    connection.outlet.lock().shut_down();
    match ended {
        Ok(()) => tracing::debug!(peer, export, "NBD client left"),
        Err(Ended::Closing) => tracing::debug!(peer, export, "NBD connection closed with its export"),
        Err(reason) if connection.core.is_connected() => tracing::info!(peer, export, %reason, "NBD connection ended"),
        Err(reason) => {
            shared.doors.refuse();
            tracing::warn!(peer, export, %reason, "NBD handshake failed");
        }
    }
}

impl Connection<'_> {
    fn serve(&mut self) -> Result<(), Ended> {
        let deadline = now().checked_add(HANDSHAKE_DEADLINE);
        loop {
            while let Some(rest) = self.next_rest() {
                self.go_on(&rest)?;
            }
            let step = self.core.handle_input(&self.input[self.start..self.end], &mut self.out);
            if step.is_err() {
                // What was refused before the violation may tell the client what is wrong.
                let _ = self.queue_out().and_then(|()| self.send_replies());
            }
            let step = step?;
            self.start += step.consumed;
            if !self.out.is_empty() {
                self.queue_out()?;
            }
            match step.event {
                Some(Event::Request(request)) => self.perform(&request)?,
                Some(Event::Connected) => {}
                Some(Event::StartTls) => self.start_tls()?,
                Some(Event::Finished) => return self.send_replies(),
                None => {
                    self.send_replies()?;
                    let deadline = deadline.filter(|_| !self.core.is_connected());
                    self.fill(deadline)?;
                }
            }
        }
    }

    fn next_rest(&self) -> Option<Rest> {
        self.outlet.rests().pop_front()
    }

    /// Goes on with a read that waited.
    fn go_on(&mut self, rest: &Rest) -> Result<(), Ended> {
        match rest.result {
            Ok(()) => self.read(&rest.request, rest.offset),
            Err(errno) => {
                self.core.error(&rest.request, code(errno), Some(rest.offset), &mut self.out);
                self.queue_out()
            }
        }
    }

    /// Reads what there is, waiting for it until the deadline, or until there is something else to do.
    fn fill(&mut self, deadline: Option<std::time::Instant>) -> Result<(), Ended> {
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            if self.shared.is_closed() {
                return Err(Ended::Closing);
            }
            if !self.outlet.rests().is_empty() {
                return Ok(());
            }
            let read = self.outlet.lock().read(&mut self.input[self.end..]);
            match read {
                Ok(count) => {
                    self.end += count;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            if deadline.is_some_and(|deadline| now() >= deadline) {
                return Err(Ended::HandshakeDeadline);
            }
            self.wait(Wait::Read, deadline)?;
        }
    }

    fn start_tls(&mut self) -> Result<(), Ended> {
        if self.start < self.end {
            return Err(Violation::PlaintextAfterStartTls.into());
        }
        self.send_replies()?;
        let Some(tls) = &self.shared.tls else { return Err(Violation::Ended.into()) };
        self.outlet.lock().start_tls(Session::server(tls.config.clone())?);
        self.core.handle_tls_started();
        Ok(())
    }

    /// Moves what the core wrote behind the replies that wait already.
    fn queue_out(&mut self) -> Result<(), Ended> {
        if !self.replies.push(&self.out) {
            self.send_replies()?;
            self.outlet.lock().send(&[IoSlice::new(&self.out)])?;
            self.drain()?;
        }
        self.out.clear();
        Ok(())
    }

    /// Sends every reply that waits, to the last byte.
    fn send_replies(&mut self) -> Result<(), Ended> {
        if !self.replies.is_empty() {
            self.outlet.lock().send(&self.replies.parts())?;
            self.replies.clear();
            self.drain()?;
        }
        Ok(())
    }

    /// Waits until the socket has taken all output. A client that does not read holds up nobody but itself.
    fn drain(&mut self) -> Result<(), Ended> {
        while self.outlet.lock().has_pending() {
            if self.shared.is_closed() {
                return Err(Ended::Closing);
            }
            self.wait(Wait::Write, None)?;
        }
        Ok(())
    }

    /// Waits for the socket, or for a kick; output that waits is sent as there is room for it.
    fn wait(&self, want: Wait, deadline: Option<std::time::Instant>) -> Result<(), Ended> {
        let (socket, pending) = {
            let stream = self.outlet.lock();
            (stream.socket(), stream.has_pending())
        };
        let want = if pending && want == Wait::Read { Wait::ReadWrite } else { want };
        socket.wait(want, self.kick, deadline)?;
        if pending || want == Wait::Read {
            self.outlet.lock().flush()?;
        }
        Ok(())
    }

    /// Parks until the device can be asked.
    fn await_ready(&mut self) -> Result<(), Ended> {
        while !self.shared.device.ready() {
            self.send_replies()?;
            if self.shared.is_closed() {
                return Err(Ended::Closing);
            }
            self.wait(Wait::Hangup, None)?;
        }
        Ok(())
    }

    fn perform(&mut self, request: &Request) -> Result<(), Ended> {
        self.await_ready()?;
        match request.command {
            Command::Read { .. } => self.read(request, request.offset),
            Command::Write { fua } => self.write(request, fua),
            Command::BlockStatus { one } => self.block_status(request, one),
            Command::Flush => {
                let result = self.shared.device.flush();
                self.finish(request, result)
            }
            Command::Trim { fua } => {
                let result = self.discard(request, fua);
                self.finish(request, result)
            }
            Command::WriteZeroes { no_hole: false, fua, .. } => {
                let result = self.discard(request, fua);
                self.finish(request, result)
            }
            Command::WriteZeroes { fast: true, .. } => self.finish(request, Err(Errno::OPNOTSUPP)),
            Command::WriteZeroes { fua, .. } => {
                let result = self.write_zeroes(request, fua);
                self.finish(request, result)
            }
            Command::Disconnect | Command::Unknown(_) => self.finish(request, Err(Errno::INVAL)),
        }
    }

    fn discard(&self, request: &Request, fua: bool) -> Result<(), Errno> {
        self.shared.device.discard(request.offset, request.length.into())?;
        if fua { self.shared.device.flush() } else { Ok(()) }
    }

    /// Zeros that stay allocated.
    fn write_zeroes(&mut self, request: &Request, fua: bool) -> Result<(), Errno> {
        let zeros = self.replies.large(CHUNK).slice_mut(0..CHUNK);
        let mut done = 0u64;
        while done < request.length.into() {
            if self.shared.is_closed() {
                return Err(Errno::SHUTDOWN);
            }
            let count = (u64::from(request.length) - done).min(CHUNK as u64);
            // The device may have made something else of the last piece.
            let piece = zeros.get_mut(..usize::try_from(count).unwrap_or(CHUNK)).unwrap_or_default();
            piece.fill(0);
            self.shared.device.write(request.offset + done, piece)?;
            done += count;
        }
        if fua { self.shared.device.flush() } else { Ok(()) }
    }

    /// Answers a request that has no content.
    fn finish(&mut self, request: &Request, result: Result<(), Errno>) -> Result<(), Ended> {
        match result {
            Ok(()) => self.out.extend_from_slice(self.core.done(request).as_bytes()),
            Err(errno) => self.core.error(request, code(errno), None, &mut self.out),
        }
        self.queue_out()
    }

    /// Reads from `offset` on, which is where the request begins or where it goes on after a wait.
    fn read(&mut self, request: &Request, offset: u64) -> Result<(), Ended> {
        if request.length == 0 {
            return self.finish(request, Ok(()));
        }
        let end = request.offset + u64::from(request.length);
        let result = match request.command {
            Command::Read { unfragmented } if self.core.structured() => {
                let mut runs = std::mem::take(&mut self.runs);
                let result = self.read_runs(request, unfragmented, offset..end, &mut runs);
                self.runs = runs;
                result?
            }
            // All or an error: without structured replies a read has one part.
            _ => {
                self.read_piece(request, offset, request.length as usize)?.map(|_| ()).map_err(|errno| (errno, offset))
            }
        };
        match result {
            Ok(()) => Ok(()),
            Err((errno, offset)) => {
                self.core.error(request, code(errno), Some(offset), &mut self.out);
                self.queue_out()
            }
        }
    }

    /// A read as chunks: data straight from the medium behind its header, holes as holes; up to its end, or to where it waits.
    /// The outer result is the connection's, the inner the medium's.
    fn read_runs(
        &mut self,
        request: &Request,
        unfragmented: bool,
        range: Range<u64>,
        runs: &mut Vec<Status>,
    ) -> Result<Result<(), (Errno, u64)>, Ended> {
        let Range { start: mut offset, end } = range;
        while offset < end {
            runs.clear();
            if let Err(errno) = self.shared.device.status(offset, end - offset, runs) {
                return Ok(Err((errno, offset)));
            }
            if runs.is_empty() {
                return Ok(Err((Errno::IO, offset)));
            }
            let whole_hole = runs.first().is_some_and(|run| run.hole && run.length >= end - offset);
            if unfragmented && !whole_hole {
                let read = self.read_piece(request, offset, (end - offset) as usize)?;
                return Ok(read.map(|_| ()).map_err(|errno| (errno, offset)));
            }
            for run in runs.iter() {
                let run_end = offset.saturating_add(run.length).min(end);
                while offset < run_end {
                    if run.hole {
                        let length = u32::try_from(run_end - offset).unwrap_or(u32::MAX);
                        let next = offset + u64::from(length);
                        let header = self.core.hole(request, offset, length, next == end);
                        self.out.extend_from_slice(header.as_bytes());
                        self.queue_out()?;
                        offset = next;
                        continue;
                    }
                    let length = (run_end - offset).min(CHUNK as u64);
                    match self.read_piece(request, offset, length as usize)? {
                        Ok(Served::Done) => offset += length,
                        Ok(Served::Missing) => return Ok(Ok(())),
                        Err(errno) => return Ok(Err((errno, offset))),
                    }
                }
            }
        }
        Ok(Ok(()))
    }

    /// One data chunk, at once or when it is here.
    fn read_piece(&mut self, request: &Request, offset: u64, length: usize) -> Result<Result<Served, Errno>, Ended> {
        let ends = offset + length as u64 == request.offset + u64::from(request.length);
        let is_large = length > CHUNK;
        // A parked piece is answered by whoever brings it: if it is a read's last, what comes before it must be out.
        if is_large || !self.replies.has_room(length) || (ends && offset > request.offset) {
            self.send_replies()?;
        }
        self.await_parking()?;
        let (outlet, replier, device) = (&self.outlet, self.core.replier(), &*self.shared.device);
        let mut later = || -> Box<dyn ReadSink> {
            outlet.parked.fetch_add(1, Ordering::AcqRel);
            let outlet = Arc::clone(outlet);
            Box::new(Parked { outlet, replier, request: *request, offset, length: length as u32 })
        };
        let header = self.core.data(request, offset, length as u32, ends);
        let read = if is_large {
            let buffer = self.replies.large(length).slice_mut(0..length);
            let read = device.read(offset, buffer, &mut later);
            if read == Ok(Served::Done) {
                outlet.lock().send(&[IoSlice::new(header.as_bytes()), IoSlice::new(buffer)])?;
                self.drain()?;
            }
            self.replies.shrink();
            read
        } else {
            let read = device.read(offset, self.replies.payload(length), &mut later);
            if read == Ok(Served::Done) {
                self.replies.commit(header.as_bytes(), length);
            }
            read
        };
        if read == Ok(Served::Done) {
            self.shared.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
        }
        Ok(read)
    }

    /// Waits until one more read may be parked. Others are served meanwhile by whoever brings their bytes.
    fn await_parking(&mut self) -> Result<(), Ended> {
        while self.outlet.parked.load(Ordering::Acquire) >= MAX_PARKED {
            self.send_replies()?;
            if self.shared.is_closed() {
                return Err(Ended::Closing);
            }
            self.wait(Wait::Hangup, None)?;
        }
        Ok(())
    }

    /// The payload comes in pieces, each written as soon as it is here; after an error the rest is read and dropped.
    fn write(&mut self, request: &Request, fua: bool) -> Result<(), Ended> {
        self.send_replies()?;
        let mut result = Ok(());
        let mut done = 0u64;
        while done < u64::from(request.length) {
            let count = (u64::from(request.length) - done).min(CHUNK as u64) as usize;
            self.take_payload(count)?;
            let piece = self.replies.large(CHUNK).slice_mut(0..count);
            if result.is_ok() {
                result = self.shared.device.write(request.offset + done, piece);
            }
            done += count as u64;
        }
        if fua && result.is_ok() {
            result = self.shared.device.flush();
        }
        self.finish(request, result)
    }

    /// Reads `count` payload bytes into the large buffer: what was read with the header, then from the socket.
    fn take_payload(&mut self, count: usize) -> Result<(), Ended> {
        let mut filled = count.min(self.end - self.start);
        let buffered = &self.input[self.start..self.start + filled];
        self.replies.large(CHUNK).slice_mut(0..filled).copy_from_slice(buffered);
        self.start += filled;
        while filled < count {
            let read = self.outlet.lock().read(self.replies.large(CHUNK).slice_mut(filled..count));
            match read {
                Ok(read) => filled += read,
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    if self.shared.is_closed() {
                        return Err(Ended::Closing);
                    }
                    self.wait(Wait::Read, None)?;
                }
                Err(error) => return Err(error.into()),
            }
        }
        Ok(())
    }

    fn block_status(&mut self, request: &Request, one: bool) -> Result<(), Ended> {
        let contexts = self.core.contexts();
        // The core's output is empty between requests; its buffer is lent to the reply.
        let mut body = std::mem::take(&mut self.out);
        let result = self.encode_status(request, one, contexts.allocation, contexts.digests, &mut body);
        if result.is_err() {
            body.clear();
        }
        self.out = body;
        match result {
            Ok(()) => self.queue_out(),
            Err(errno) => self.finish(request, Err(errno)),
        }
    }

    fn encode_status(
        &mut self,
        request: &Request,
        one: bool,
        allocation: bool,
        digests: bool,
        body: &mut Vec<u8>,
    ) -> Result<(), Errno> {
        let most = if one { 1 } else { MAX_DESCRIPTORS };
        let device = &self.shared.device;
        if allocation {
            self.runs.clear();
            device.status(request.offset, request.length.into(), &mut self.runs)?;
            self.runs.truncate(most);
            if self.runs.is_empty() {
                return Err(Errno::IO);
            }
            let header = self.core.block_status(request, Context::Allocation, self.runs.len() as u32, !digests);
            body.extend_from_slice(header.as_bytes());
            let mut left = request.length;
            for run in &self.runs {
                let length = u32::try_from(run.length).unwrap_or(u32::MAX).min(left);
                left -= length;
                put_descriptor(body, length, if run.hole { Context::HOLE | Context::ZERO } else { 0 });
            }
        }
        if digests {
            if !request.offset.is_multiple_of(BLOCK) {
                return Err(Errno::INVAL);
            }
            let length = u64::from(request.length).min(most as u64 * BLOCK);
            self.digests.clear();
            device.digests(request.offset, length, &mut self.digests).ok_or(Errno::OPNOTSUPP)??;
            self.digests.truncate(usize::try_from(length.div_ceil(BLOCK)).unwrap_or(most));
            if self.digests.is_empty() {
                return Err(Errno::IO);
            }
            let header = self.core.block_status(request, Context::Digests, self.digests.len() as u32, true);
            body.extend_from_slice(header.as_bytes());
            let mut left = length;
            for digest in &self.digests {
                let count = left.min(BLOCK);
                left -= count;
                put_descriptor(body, count as u32, *digest);
            }
        }
        Ok(())
    }
}

/// As NBD has it.
fn code(errno: Errno) -> ErrorCode {
    match errno {
        Errno::PERM | Errno::ROFS | Errno::ACCESS => ErrorCode::Permission,
        Errno::NOMEM => ErrorCode::NoMemory,
        Errno::INVAL => ErrorCode::Invalid,
        Errno::NOSPC | Errno::DQUOT | Errno::FBIG => ErrorCode::NoSpace,
        Errno::OVERFLOW => ErrorCode::Overflow,
        Errno::OPNOTSUPP | Errno::NOSYS => ErrorCode::NotSupported,
        Errno::SHUTDOWN => ErrorCode::Shutdown,
        _ => ErrorCode::Io,
    }
}
