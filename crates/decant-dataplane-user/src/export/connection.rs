//! One connection of an export.

use std::io::{self, IoSlice};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use decant_nbd::server::{Event, Replier, Server};
use decant_nbd::{Command, Context, ErrorCode, MAX_DESCRIPTORS, MAX_UNIT, Request, Violation, put_descriptor};
use rustix::io::Errno;

use super::replies::{CHUNK, Replies};
use super::{HANDSHAKE_DEADLINE, Shared, read_waiting};
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

/// Reads of one connection that wait for their bytes, at most; what comes then waits in the socket.
const MAX_PARKED: usize = 64;

/// The way out: the connection's thread and whoever completes a parked read write here, whole replies under one lock.
struct Outlet {
    stream: Mutex<Stream>,
    kick: Arc<Kick>,
    parked: AtomicUsize,
}

impl Outlet {
    fn lock(&self) -> MutexGuard<'_, Stream> {
        self.stream.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// A read whose bytes were not here.
struct Parked {
    outlet: Arc<Outlet>,
    replier: Replier,
    request: Request,
    /// The part of the request that is missing: all of it, or its end.
    offset: u64,
    length: u32,
}

impl ReadSink for Parked {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        let (offset, length) = (self.offset, self.length);
        let waits = {
            let mut stream = self.outlet.lock();
            // A connection that broke is found broken by its thread.
            let _ = match result {
                Ok(data) => {
                    let header = self.replier.data(&self.request, offset, length, true);
                    stream.send(&[IoSlice::new(header.as_bytes()), IoSlice::new(data)])
                }
                Err(errno) => {
                    let mut out = Vec::new();
                    self.replier.error(&self.request, code(errno), Some(offset), &mut out);
                    stream.send(&[IoSlice::new(&out)])
                }
            };
            stream.has_pending()
        };
        let before = self.outlet.parked.fetch_sub(1, Ordering::AcqRel);
        // The thread sends what the socket did not take, or waits for room for one more.
        if waits || before == MAX_PARKED {
            self.outlet.kick.kick();
        }
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
    let mut connection = Connection {
        shared,
        outlet: Arc::new(Outlet { stream: Mutex::new(stream), kick: Arc::clone(kick), parked: AtomicUsize::new(0) }),
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
    match connection.serve() {
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

    /// Reads what there is, waiting for it until the deadline.
    fn fill(&mut self, deadline: Option<std::time::Instant>) -> Result<(), Ended> {
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
        loop {
            if self.shared.is_closed() {
                return Err(Ended::Closing);
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
            Command::Read { unfragmented } if self.core.structured() => self.read_chunks(request, unfragmented),
            Command::Read { .. } => self.read_whole(request),
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

    /// A read as chunks: data straight from the medium behind its header, holes as holes.
    fn read_chunks(&mut self, request: &Request, unfragmented: bool) -> Result<(), Ended> {
        if request.length == 0 {
            return self.finish(request, Ok(()));
        }
        let end = request.offset + u64::from(request.length);
        let mut runs = std::mem::take(&mut self.runs);
        let result = self.read_runs(request, unfragmented, end, &mut runs);
        self.runs = runs;
        match result? {
            Ok(()) => Ok(()),
            Err((errno, offset)) => {
                self.core.error(request, code(errno), Some(offset), &mut self.out);
                self.queue_out()
            }
        }
    }

    /// The outer result is the connection's, the inner the medium's.
    fn read_runs(
        &mut self,
        request: &Request,
        unfragmented: bool,
        end: u64,
        runs: &mut Vec<Status>,
    ) -> Result<Result<(), (Errno, u64)>, Ended> {
        let mut offset = request.offset;
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
                return self.read_piece(request, offset, (end - offset) as usize, end);
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
                    } else {
                        let length = (run_end - offset).min(CHUNK as u64);
                        if let Err(failed) = self.read_piece(request, offset, length as usize, end)? {
                            return Ok(Err(failed));
                        }
                        offset += length;
                    }
                }
            }
        }
        Ok(Ok(()))
    }

    /// One data chunk.
    fn read_piece(
        &mut self,
        request: &Request,
        offset: u64,
        length: usize,
        end: u64,
    ) -> Result<Result<(), (Errno, u64)>, Ended> {
        if length > CHUNK {
            return self.read_large(request, offset, length);
        }
        // A read's last piece may be parked, and is then answered by whoever brings it: what comes before it must be out.
        let ends = offset + length as u64 == end;
        if !self.replies.has_room(length) || (ends && offset > request.offset) {
            self.send_replies()?;
        }
        if ends {
            self.await_parking()?;
        }
        let (outlet, replier, device) = (&self.outlet, self.core.replier(), &*self.shared.device);
        let payload = self.replies.payload(length);
        let read = if ends {
            device.read(offset, payload, &mut || {
                outlet.parked.fetch_add(1, Ordering::AcqRel);
                let (outlet, length) = (Arc::clone(outlet), length as u32);
                Box::new(Parked { outlet, replier, request: *request, offset, length })
            })
        } else {
            read_waiting(device, offset, payload).map(|()| Served::Done)
        };
        match read {
            Ok(Served::Done) => {
                let header = self.core.data(request, offset, length as u32, ends);
                self.replies.commit(header.as_bytes(), length);
            }
            Ok(Served::Missing) => {}
            Err(errno) => return Ok(Err((errno, offset))),
        }
        self.shared.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(Ok(()))
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

    /// The whole read in one piece.
    fn read_large(&mut self, request: &Request, offset: u64, length: usize) -> Result<Result<(), (Errno, u64)>, Ended> {
        self.send_replies()?;
        let buffer = self.replies.large(length).slice_mut(0..length);
        if let Err(errno) = read_waiting(&*self.shared.device, offset, buffer) {
            return Ok(Err((errno, offset)));
        }
        let header = self.core.data(request, offset, length as u32, true);
        self.outlet.lock().send(&[IoSlice::new(header.as_bytes()), IoSlice::new(buffer)])?;
        self.drain()?;
        self.replies.shrink();
        self.shared.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
        Ok(Ok(()))
    }

    /// A read without structured replies: all or an error, so all of it is read before anything is sent.
    fn read_whole(&mut self, request: &Request) -> Result<(), Ended> {
        let end = request.offset + u64::from(request.length);
        match self.read_piece(request, request.offset, request.length as usize, end)? {
            Ok(()) => Ok(()),
            Err((errno, _)) => self.finish(request, Err(errno)),
        }
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
