//! One connection: its thread, and what comes back to it from elsewhere.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::ops::Range;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use decant_iscsi::chap::RANDOM_BYTES;
use decant_iscsi::target::{Connection, Event, Failure, Outbox, Request, TaskId};
use decant_iscsi::{Step, Violation};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::Shared;
use super::buffers::{Buffer, Spare};
use super::inbox::{Arrived, Inbox, Parked, work};
use super::perform::{Ended, failure};
use crate::device::Served;
use crate::export::doors::Visitor;
use crate::stream::{Socket, Wait, now};

/// Bytes read at a time where headers are; more than the longest header and the longest text.
const INPUT: usize = 64 * 1024;
/// Data of a write of which so much is to come is read straight to its place.
const DIRECT: u32 = 8 * 1024;
/// Bytes of read data that are gathered before they are sent: small enough to be still in the processor's cache.
const GATHER: usize = 512 * 1024;
/// Above so many unsent bytes nothing more is read from the device.
const UNSENT: usize = 2 * 1024 * 1024;
/// Parts in one system call: a full queue of small reads, header and data each.
const PARTS: usize = 160;
/// How often the protocol machine is told the time.
const TICK: Duration = Duration::from_secs(1);

/// Why a connection ended other than by the initiator's leave.
#[derive(Debug, thiserror::Error)]
enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Protocol(#[from] Violation),
    #[error("the export is closing")]
    Closing,
}

/// What the driver knows of a task.
#[derive(Default)]
struct Slot {
    /// What the initiator sent for it.
    buffer: Option<Buffer>,
    /// The number of the request that is not done here, while there is one: what comes under another number is of a task that
    /// is gone.
    away: Option<u64>,
    /// A parked read: given up when the connection ends, since nothing is changed by it.
    is_read: bool,
}

struct Link<'a> {
    shared: &'a Arc<Shared>,
    socket: Arc<OwnedFd>,
    inbox: Arc<Inbox>,
    machine: Connection,
    out: Outbox<Buffer>,
    slots: Vec<Slot>,
    spare: Spare,
    requests: VecDeque<(TaskId, Request)>,
    next_serial: u64,
    closing: bool,
    was_logged_in: bool,
    peer: String,
    input: Vec<u8>,
    start: usize,
    end: usize,
}

/// Serves one connection to its end.
pub(super) fn run(shared: &Arc<Shared>, visitor: Visitor) {
    let Visitor { socket, kick, peer } = visitor;
    let mut random = [0; RANDOM_BYTES];
    // Blocks only in the first seconds after a boot, until there is entropy.
    if let Err(error) = getrandom::fill(&mut random) {
        shared.doors.refuse();
        return tracing::warn!(peer, %error, "no random bytes for an iSCSI login");
    }
    let machine = Connection::new(&mut shared.target(), random);
    let id = machine.id();
    shared.kicks().insert(id, Arc::clone(&kick));
    let slots = std::iter::repeat_with(Slot::default).take(machine.task_ids() as usize).collect();
    let mut link = Link {
        shared,
        socket: Arc::new(socket),
        inbox: Arc::new(Inbox::new(kick)),
        machine,
        out: Outbox::default(),
        slots,
        spare: Spare::default(),
        requests: VecDeque::new(),
        next_serial: 0,
        closing: false,
        was_logged_in: false,
        peer,
        input: vec![0; INPUT],
        start: 0,
        end: 0,
    };
    let ended = link.serve();
    link.report(ended);
    link.finish();
    shared.kicks().remove(&id);
    shared.wake_others();
}

impl Link<'_> {
    fn serve(&mut self) -> Result<(), Broken> {
        let began = now();
        let mut ticked = began;
        let socket = Socket::from(Arc::clone(&self.socket));
        // Whether the last read filled its buffer: then there may be more, and waiting would be a call for nothing.
        let mut more = true;
        loop {
            let consumed = self.feed()?;
            self.perform();
            self.shared.wake_others();
            let sent = self.send()?;
            if self.closing {
                return self.send_rest(&socket);
            }
            let may_perform = !self.requests.is_empty() && self.out.len() < UNSENT && self.shared.device.ready();
            if may_perform || (self.start < self.end && (consumed > 0 || sent)) {
                continue;
            }
            self.compact();
            let time = now();
            if time.duration_since(ticked) >= TICK {
                ticked = time;
                self.tick(time.duration_since(began))?;
                continue;
            }
            let full = self.end == self.input.len();
            let received = if more && !full { self.receive()? } else { None };
            more = match received {
                Some(filled) => filled,
                None => {
                    let want = match (self.out.is_empty(), full) {
                        (true, false) => Wait::Read,
                        // The protocol takes nothing more before something else has happened.
                        (true, true) => Wait::Hangup,
                        (false, true) => Wait::Write,
                        (false, false) => Wait::ReadWrite,
                    };
                    if socket.wait(want, &self.inbox.kick, time.checked_add(TICK))? {
                        self.handle_kick()?;
                    }
                    true
                }
            };
        }
    }

    /// Deals with the input that is there; says how much of it.
    fn feed(&mut self) -> Result<usize, Broken> {
        let shared = self.shared;
        let mut target = shared.target();
        let (mut consumed, input) = (0, std::mem::take(&mut self.input));
        let result = loop {
            let rest = &input[self.start..self.end];
            match self.machine.handle_input(&mut target, rest, &mut self.out) {
                Ok(Step { consumed: step, event }) => {
                    consumed += step;
                    self.start += step;
                    match event {
                        Some(Event::Data { task, offset, total, range }) => {
                            self.take_data(task, offset as usize, total as usize, &rest[range]);
                        }
                        Some(event) => self.act(event),
                        None => break Ok(consumed),
                    }
                }
                Err(violation) => break Err(violation.into()),
            }
        };
        self.input = input;
        result
    }

    fn take_data(&mut self, task: TaskId, offset: usize, total: usize, data: &[u8]) {
        let Some(slot) = self.slots.get_mut(task.0 as usize) else { return };
        let buffer = match &mut slot.buffer {
            Some(buffer) if buffer.len() == total => buffer,
            // One that a task which was aborted has left.
            other => {
                if let Some(old) = other.take() {
                    self.spare.put(old);
                }
                other.insert(self.spare.take(total))
            }
        };
        if let Some(place) = buffer.bytes().get_mut(offset..offset + data.len()) {
            place.copy_from_slice(data);
        }
    }

    fn act(&mut self, event: Event) {
        match event {
            Event::LoggedIn { initiator, discovery } => {
                self.was_logged_in = true;
                tracing::info!(peer = self.peer, initiator, discovery, "iSCSI session begun");
            }
            Event::Data { .. } => {}
            Event::Request { task, request } => self.requests.push_back((task, request)),
            Event::Forget(task) => {
                if let Some(buffer) = self.slots.get_mut(task.0 as usize).and_then(|slot| slot.buffer.take()) {
                    self.spare.put(buffer);
                }
            }
            Event::Close(farewell) => {
                if let Some(farewell) = farewell {
                    tracing::info!(peer = self.peer, ?farewell, "iSCSI session ends");
                }
                self.closing = true;
            }
        }
    }

    fn poll(&mut self) {
        while let Some(event) = self.machine.poll_event() {
            self.act(event);
        }
    }

    /// Does what is asked for, as far as it can be done at once; the rest is handed on.
    fn perform(&mut self) {
        let mut gathered = 0;
        while gathered < GATHER && self.out.len() < UNSENT && !self.requests.is_empty() && self.shared.device.ready() {
            let Some((task, request)) = self.requests.pop_front() else { return };
            gathered += match request {
                Request::Read { length, .. } | Request::Write { length, .. } => length as usize,
                _ => 0,
            };
            if let Some(ended) = self.start_request(task, request) {
                self.complete(task, ended);
            }
        }
    }

    /// Does a request, or has it done: then there is no outcome yet.
    fn start_request(&mut self, task: TaskId, request: Request) -> Option<Ended> {
        match request {
            Request::Read { offset, length, fua: false } => self.read(task, offset, length as usize),
            Request::Write { offset, length, fua: false, keep: false } => {
                let mut buffer = self.slots.get_mut(task.0 as usize)?.buffer.take()?;
                let bytes = buffer.bytes().get_mut(..length as usize).unwrap_or_default();
                let result = self.shared.device.write(offset, bytes);
                self.spare.put(buffer);
                Some(result.map_or_else(|errno| Ended::Failed(failure(errno, Some(offset))), |()| Ended::Done))
            }
            _ => {
                self.hand_on(task, request);
                None
            }
        }
    }

    fn read(&mut self, task: TaskId, offset: u64, length: usize) -> Option<Ended> {
        let mut buffer = self.spare.take(length);
        let serial = self.next_serial;
        self.next_serial += 1;
        let inbox = &self.inbox;
        let read = self
            .shared
            .device
            .read(offset, buffer.bytes(), &mut || Box::new(Parked { inbox: Arc::clone(inbox), task, serial, offset }));
        self.shared.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
        match read {
            Ok(Served::Done) => Some(Ended::Data(buffer)),
            Ok(Served::Missing) => {
                self.spare.put(buffer);
                if let Some(slot) = self.slots.get_mut(task.0 as usize) {
                    (slot.away, slot.is_read) = (Some(serial), true);
                }
                None
            }
            Err(errno) => {
                self.spare.put(buffer);
                Some(Ended::Failed(failure(errno, Some(offset))))
            }
        }
    }

    /// Gives what may take long to a worker.
    fn hand_on(&mut self, task: TaskId, request: Request) {
        let Some(slot) = self.slots.get_mut(task.0 as usize) else { return };
        let serial = self.next_serial;
        self.next_serial += 1;
        (slot.away, slot.is_read) = (Some(serial), false);
        let mut buffer = slot.buffer.take();
        let pattern = match request {
            Request::Fill { .. } => self.machine.pattern(task).to_vec(),
            _ => Vec::new(),
        };
        if let Request::Read { length, .. } = request {
            buffer = Some(self.spare.take(length as usize));
        }
        let (device, inbox) = (Arc::clone(&self.shared.device), Arc::clone(&self.inbox));
        self.shared.workers.submit(Box::new(move || {
            let (ended, buffer) = work(&*device, request, buffer, pattern);
            inbox.put(Arrived { task, serial, ended, buffer });
        }));
    }

    /// A request has ended.
    fn complete(&mut self, task: TaskId, ended: Ended) {
        let shared = self.shared;
        ended.with(|outcome| self.machine.complete(&mut shared.target(), task, outcome, &mut self.out));
        self.poll();
    }

    /// What other threads have done for this connection, and to it.
    fn handle_kick(&mut self) -> Result<(), Broken> {
        for Arrived { task, serial, ended, buffer } in self.inbox.take() {
            let Some(slot) = self.slots.get_mut(task.0 as usize).filter(|slot| slot.away == Some(serial)) else {
                continue;
            };
            (slot.away, slot.buffer) = (None, buffer);
            self.complete(task, ended);
            // What a Verify that follows does not need.
            let unused = self.requests.iter().all(|(other, _)| *other != task);
            if let Some(buffer) = self.slots[task.0 as usize].buffer.take_if(|_| unused) {
                self.spare.put(buffer);
            }
        }
        let shared = self.shared;
        self.machine.handle_wakeup(&mut shared.target(), &mut self.out);
        self.poll();
        if self.shared.doors.is_closed() && !self.closing { Err(Broken::Closing) } else { Ok(()) }
    }

    fn tick(&mut self, since: Duration) -> Result<(), Broken> {
        let shared = self.shared;
        let millis = u64::try_from(since.as_millis()).unwrap_or(u64::MAX);
        self.machine.handle_tick(&mut shared.target(), millis, &mut self.out)?;
        self.poll();
        Ok(())
    }

    /// Sends what the socket takes; says whether it took anything.
    fn send(&mut self) -> Result<bool, Broken> {
        let mut any = false;
        while !self.out.is_empty() {
            let mut parts = [IoSlice::new(&[]); PARTS];
            let count = self.out.slices(&mut parts);
            let flags = SendFlags::NOSIGNAL | SendFlags::DONTWAIT;
            match rustix::net::sendmsg(&*self.socket, &parts[..count], &mut Default::default(), flags) {
                Ok(sent) => {
                    self.out.advance(sent);
                    any = true;
                }
                Err(Errno::AGAIN) => break,
                Err(Errno::INTR) => {}
                Err(error) => return Err(io::Error::from(error).into()),
            }
        }
        while let Some(buffer) = self.out.take_spent() {
            self.spare.put(buffer);
        }
        Ok(any)
    }

    /// Sends all that is left before the connection is closed, for at most one tick: a peer that does not read has lost it.
    fn send_rest(&mut self, socket: &Socket) -> Result<(), Broken> {
        let Some(deadline) = now().checked_add(TICK) else { return Ok(()) };
        while !self.out.is_empty() && now() < deadline {
            socket.wait(Wait::Write, &self.inbox.kick, Some(deadline))?;
            self.send()?;
        }
        Ok(())
    }

    fn compact(&mut self) {
        if self.start == self.end {
            (self.start, self.end) = (0, 0);
        } else if self.start > 0 {
            self.input.copy_within(self.start..self.end, 0);
            (self.start, self.end) = (0, self.end - self.start);
        }
    }

    /// Reads what comes next: to its place in a task's buffer if that is known, else into the input. `None`: nothing there;
    /// else whether there may be more.
    fn receive(&mut self) -> Result<Option<bool>, Broken> {
        if self.start == self.end
            && let Some((task, range)) = self.machine.data_wanted().filter(|(_, range)| range.len() >= DIRECT as usize)
            && let Some(buffer) = self.slots.get_mut(task.0 as usize).and_then(|slot| slot.buffer.take())
        {
            return self.receive_direct(task, range.start as usize..range.end as usize, buffer);
        }
        let room = self.input.len() - self.end;
        let Some(count) = receive(&self.socket, &mut self.input[self.end..])? else { return Ok(None) };
        self.end += count;
        Ok(Some(count == room))
    }

    fn receive_direct(
        &mut self,
        task: TaskId,
        place: Range<usize>,
        mut buffer: Buffer,
    ) -> Result<Option<bool>, Broken> {
        let wanted = place.len();
        let count = match buffer.bytes().get_mut(place.clone()) {
            Some(place) => receive(&self.socket, place)?,
            None => return Err(Violation::OutOfPlace("data beyond their buffer").into()),
        };
        if let Some(count) = count {
            let shared = self.shared;
            let mut target = shared.target();
            let mut rest = place.start..place.start + count;
            // The machine sees them where they lie; while it does, nobody else holds the buffer.
            while !rest.is_empty() {
                let bytes = buffer.as_ref().get(rest.clone()).unwrap_or_default();
                let step = self.machine.handle_input(&mut target, bytes, &mut self.out)?;
                rest.start += step.consumed;
                match step.event {
                    Some(Event::Data { .. }) => {}
                    Some(event) => self.act(event),
                    None if step.consumed == 0 => break,
                    None => {}
                }
            }
            // More than the machine took cannot be: it was all of one segment.
            drop(target);
        }
        if let Some(slot) = self.slots.get_mut(task.0 as usize) {
            slot.buffer = Some(buffer);
        }
        Ok(count.map(|count| count == wanted))
    }

    fn report(&self, ended: Result<(), Broken>) {
        let peer = &self.peer;
        match ended {
            Err(Broken::Closing) => tracing::debug!(peer, "iSCSI connection closed with its export"),
            _ if !self.was_logged_in => {
                self.shared.doors.refuse();
                let reason = ended.err().map_or_else(|| "the login was refused".to_owned(), |error| error.to_string());
                tracing::warn!(peer, reason, "iSCSI login failed");
            }
            Ok(()) => tracing::debug!(peer, "iSCSI session ended"),
            Err(reason) => tracing::info!(peer, %reason, "iSCSI connection ended"),
        }
    }

    /// The connection is over: what still runs for it is waited for, so that nothing of it happens later than its session's end.
    fn finish(&mut self) {
        // What was refused may tell the initiator what is wrong.
        let _ = self.send();
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        let shared = self.shared;
        self.machine.handle_disconnect(&mut shared.target());
        while let Some((task, _)) = self.requests.pop_front() {
            self.complete(task, Ended::Failed(Failure::NotReady));
        }
        for index in 0..self.slots.len() {
            let slot = &mut self.slots[index];
            if slot.is_read && slot.away.take().is_some() {
                self.complete(TaskId(index as u32), Ended::Failed(Failure::NotReady));
            }
        }
        self.shared.wake_others();
        while !self.machine.is_drained() {
            self.inbox.kick.wait(None);
            self.inbox.kick.clear();
            let _ = self.handle_kick();
            self.requests.clear();
        }
    }
}

/// Reads from a socket; `None`: nothing there.
fn receive(socket: &OwnedFd, into: &mut [u8]) -> io::Result<Option<usize>> {
    loop {
        match rustix::net::recv(socket, &mut *into, RecvFlags::DONTWAIT) {
            Ok((0, _)) if !into.is_empty() => return Err(io::ErrorKind::UnexpectedEof.into()),
            Ok((count, _)) => return Ok(Some(count)),
            Err(Errno::AGAIN) => return Ok(None),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}
