//! One connection: its thread, and its socket.
//!
//! The thread goes round and round: whatever came from elsewhere, input, requests, output; it waits only when a round has
//! nothing more to do. A kick says nothing but "look again", and everything that it can mean is looked at in every round: a
//! kick that is lost on the way out, or that comes while there is always more input, holds up nothing. What one round does
//! is bounded.

use std::collections::VecDeque;
use std::io::{self, IoSlice};
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use decant_iscsi::chap::RANDOM_BYTES;
use decant_iscsi::target::{Connection, Event, Outbox, Request, TaskId, Wanted};
use decant_iscsi::{Step, Violation};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::Shared;
use super::buffers::{Buffer, Spare};
use super::inbox::{Arrived, Inbox};
use crate::export::doors::Visitor;
use crate::stream::{Socket, Wait, now};

/// Bytes read at a time where headers are; more than the longest header and the longest text.
const INPUT: usize = 64 * 1024;
/// Data of a write of which so much is to come is read straight to its place.
const DIRECT: u32 = 8 * 1024;
/// Bytes of read data that are gathered before they are sent: small enough to be still in the processor's cache.
pub(super) const GATHER: usize = 512 * 1024;
/// Above so many unsent bytes nothing more is read from the device, and what was read elsewhere waits.
pub(super) const UNSENT: usize = 2 * 1024 * 1024;
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
    #[error("the protocol left {0} bytes that it had asked for, a defect of this program; nothing of them was written")]
    LeftOver(usize),
    #[error("the export is closing")]
    Closing,
}

/// What the driver knows of a task.
#[derive(Default)]
pub(super) struct Slot {
    /// What the initiator sent for it.
    pub(super) buffer: Option<Buffer>,
    /// The request that is not done here, while there is one.
    pub(super) away: Option<Away>,
}

/// A request that somebody else does.
pub(super) struct Away {
    /// Its number: what comes under another is of a task that is gone.
    pub(super) serial: u64,
    /// Tells a worker that nobody wants it any more; `None`: a parked read.
    pub(super) unwanted: Option<Arc<AtomicBool>>,
    /// What is to be done when it has succeeded, before the task is told.
    pub(super) then: Option<Request>,
}

impl Away {
    pub(super) fn is_unwanted(&self) -> bool {
        self.unwanted.as_ref().is_some_and(|flag| flag.load(Ordering::Relaxed))
    }
}

pub(super) struct Link<'a> {
    pub(super) shared: &'a Arc<Shared>,
    socket: Arc<OwnedFd>,
    pub(super) inbox: Arc<Inbox>,
    pub(super) machine: Connection,
    pub(super) out: Outbox<Buffer>,
    pub(super) slots: Vec<Slot>,
    pub(super) spare: Spare,
    /// What is to be done, in order.
    pub(super) requests: VecDeque<(TaskId, Request)>,
    /// What came back from elsewhere and is not answered.
    pub(super) arrived: VecDeque<Arrived>,
    /// Tasks that were aborted, not dealt with yet.
    pub(super) unwanted: Vec<TaskId>,
    pub(super) next_serial: u64,
    pub(super) closing: bool,
    was_logged_in: bool,
    peer: String,
    input: Vec<u8>,
    start: usize,
    end: usize,
    /// Whether there may be input that was not read: the last read filled its buffer, or there was none since the last wait.
    more: bool,
}

/// Serves one connection to its end.
pub(super) fn run(shared: &Arc<Shared>, visitor: Visitor) {
    let Some(mut link) = Link::new(shared, visitor) else { return };
    let ended = link.serve();
    link.report(ended);
    link.finish();
    shared.kicks().remove(&link.machine.id());
    shared.wake_others();
}

impl<'a> Link<'a> {
    /// A connection that is to log in.
    fn new(shared: &'a Arc<Shared>, visitor: Visitor) -> Option<Self> {
        let Visitor { socket, kick, peer } = visitor;
        let mut random = [0; RANDOM_BYTES];
        // Blocks only in the first seconds after a boot, until there is entropy.
        if let Err(error) = getrandom::fill(&mut random) {
            shared.doors.refuse();
            tracing::warn!(peer, %error, "no random bytes for an iSCSI login");
            return None;
        }
        let machine = Connection::new(&mut shared.target(), random);
        shared.kicks().insert(machine.id(), Arc::clone(&kick));
        let slots = std::iter::repeat_with(Slot::default).take(machine.task_ids() as usize).collect();
        Some(Self {
            shared,
            socket: Arc::new(socket),
            inbox: Arc::new(Inbox::new(kick)),
            machine,
            out: Outbox::default(),
            slots,
            spare: Spare::default(),
            requests: VecDeque::new(),
            arrived: VecDeque::new(),
            unwanted: Vec::new(),
            next_serial: 0,
            closing: false,
            was_logged_in: false,
            peer,
            input: vec![0; INPUT],
            start: 0,
            end: 0,
            more: true,
        })
    }

    fn serve(&mut self) -> Result<(), Broken> {
        let began = now();
        let mut ticked = began;
        let socket = Socket::from(Arc::clone(&self.socket));
        loop {
            // Before the round, which hears of the farewell that comes with it.
            let is_closed = self.shared.doors.is_closed();
            let goes_on = self.round()?;
            if self.closing {
                return self.send_rest(&socket);
            }
            if is_closed {
                return Err(Broken::Closing);
            }
            if goes_on {
                continue;
            }
            let time = now();
            if time.duration_since(ticked) >= TICK {
                ticked = time;
                self.tick(time.duration_since(began))?;
            } else if !self.receive()? {
                self.wait(&socket, time.checked_add(TICK))?;
            }
        }
    }

    /// Does what can be done without reading from the socket; says whether there may be more of it.
    fn round(&mut self) -> Result<bool, Broken> {
        self.take_arrived();
        let consumed = self.feed()?;
        self.perform();
        self.shared.wake_others();
        let sent = self.send()?;
        let has_room = self.out.len() < UNSENT;
        let may_perform = !self.requests.is_empty() && self.shared.device.ready();
        let has_input = self.start < self.end && (consumed > 0 || sent);
        Ok(has_input || (has_room && (may_perform || !self.arrived.is_empty())))
    }

    /// Waits for the socket, or for whoever kicks.
    fn wait(&mut self, socket: &Socket, deadline: Option<Instant>) -> Result<(), Broken> {
        let want = match (self.out.is_empty(), self.end == self.input.len()) {
            (true, false) => Wait::Read,
            // The protocol takes nothing more before something else has happened.
            (true, true) => Wait::Hangup,
            (false, true) => Wait::Write,
            (false, false) => Wait::ReadWrite,
        };
        socket.wait(want, &self.inbox.kick, deadline)?;
        self.more = true;
        Ok(())
    }

    /// Deals with the input that is there, and with what other connections did to this one; says how much of the input.
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
            Event::Abort(task) => self.unwanted.push(task),
            Event::Close(farewell) => {
                if let Some(farewell) = farewell {
                    tracing::info!(peer = self.peer, ?farewell, "iSCSI session ends");
                }
                self.closing = true;
            }
        }
    }

    pub(super) fn poll(&mut self) {
        while let Some(event) = self.machine.poll_event() {
            self.act(event);
        }
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

    /// Reads what comes next: to its place in a task's buffer if that is known, else into the input. False: nothing is there.
    fn receive(&mut self) -> Result<bool, Broken> {
        self.compact();
        if !self.more {
            return Ok(false);
        }
        if self.start == self.end
            && let Some(wanted) = self.machine.data_wanted().filter(|wanted| wanted.range.len() >= DIRECT as usize)
            && self.buffer_of(&wanted).is_some()
        {
            return self.receive_direct(&wanted);
        }
        let room = self.input.len() - self.end;
        if room == 0 {
            return Ok(false);
        }
        let count = receive(&self.socket, &mut self.input[self.end..])?;
        self.end += count.unwrap_or_default();
        self.more = count == Some(room);
        Ok(count.is_some())
    }

    /// The buffer in which these data belong. One of another length was left by another task.
    fn buffer_of(&mut self, wanted: &Wanted) -> Option<&mut Buffer> {
        let buffer = self.slots.get_mut(wanted.task.0 as usize)?.buffer.as_mut()?;
        (buffer.len() == wanted.total as usize).then_some(buffer)
    }

    /// Reads data to their place, and shows them to the machine where they lie. The buffer stays in its slot: what the machine
    /// says of the task meanwhile is done to it.
    fn receive_direct(&mut self, wanted: &Wanted) -> Result<bool, Broken> {
        let beyond = Violation::OutOfPlace("data beyond their buffer");
        let (start, end) = (wanted.range.start as usize, wanted.range.end as usize);
        let Some(slot) = self.slots.get_mut(wanted.task.0 as usize) else { return Err(beyond.into()) };
        let Some(buffer) = slot.buffer.as_mut() else { return Err(beyond.into()) };
        let Some(room) = buffer.bytes().get_mut(start..end) else { return Err(beyond.into()) };
        let count = receive(&self.socket, room)?;
        self.more = count == Some(end - start);
        let Some(count) = count else { return Ok(false) };
        let mut rest = buffer.as_ref().get(start..start + count).unwrap_or_default();
        let (mut events, mut result) = (Vec::new(), Ok(()));
        let mut target = self.shared.target();
        while !rest.is_empty() {
            match self.machine.handle_input(&mut target, rest, &mut self.out) {
                Ok(Step { consumed: 0, event: None }) => break,
                Ok(Step { consumed, event }) => {
                    rest = rest.get(consumed..).unwrap_or_default();
                    events.extend(event.filter(|event| !matches!(event, Event::Data { .. })));
                }
                Err(violation) => {
                    result = Err(violation);
                    break;
                }
            }
        }
        drop(target);
        let left = rest.len();
        events.into_iter().for_each(|event| self.act(event));
        result?;
        if left > 0 && !self.closing { Err(Broken::LeftOver(left)) } else { Ok(true) }
    }

    fn report(&self, ended: Result<(), Broken>) {
        let peer = &self.peer;
        match ended {
            Err(Broken::Closing) => tracing::debug!(peer, "iSCSI connection closed with its export"),
            _ if !self.was_logged_in => {
                self.shared.doors.refuse();
                let refusal = self.machine.refusal().map(ToString::to_string);
                let reason = ended.err().map(|error| error.to_string()).or(refusal);
                let reason = reason.unwrap_or_else(|| "it ended before there was a session".to_owned());
                tracing::warn!(peer, reason, "iSCSI login failed");
            }
            Ok(()) => tracing::debug!(peer, "iSCSI session ended"),
            Err(reason) => tracing::info!(peer, %reason, "iSCSI connection ended"),
        }
    }

    /// The connection is over: what still runs for it is waited for, so that nothing of it happens later than its session's end.
    fn finish(&mut self) {
        self.leave();
        self.drain();
    }

    /// Closes the connection, and gives up what nobody will hear of.
    fn leave(&mut self) {
        // What was refused may tell the initiator what is wrong.
        let _ = self.send();
        let _ = rustix::net::shutdown(&*self.socket, rustix::net::Shutdown::Both);
        // A request that nobody has taken out of the machine would never end.
        self.poll();
        let shared = self.shared;
        self.machine.handle_disconnect(&mut shared.target());
        self.unwanted.extend((0..self.machine.task_ids()).map(TaskId));
        self.drop_unwanted();
    }

    /// Waits for what could not be given up.
    fn drain(&mut self) {
        loop {
            self.take_arrived();
            self.shared.wake_others();
            if self.machine.is_drained() {
                return;
            }
            self.inbox.kick.wait(None);
            self.inbox.kick.clear();
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

#[cfg(test)]
mod tests;
