//! A target's side of a connection.
//!
//! ```text
//! Login --last response--> FullFeature --logout, farewell, violation--> Ended
//!   |                        ^
//!   +-- Reinstating ---------+   the session with the same name must have nothing running any more
//! ```
//!
//! [`Connection`] turns bytes into [`Event`]s and outcomes into bytes; [`Target`] is what the connections share. Everything
//! that the backend has to do is an [`Event::Request`], answered by [`Connection::complete`] in any order. Data of writes does
//! not pass through here: [`Event::Data`] says where the bytes that are in the driver's input belong, and
//! [`Connection::data_wanted`] where those that come next do, so that they can be read from the socket to their place. Data of
//! reads is handed over in the driver's own buffers, which come back out of the [`Outbox`] when they are sent.
//!
//! A connection keeps at most [`Limits::queue_depth`] commands and a few immediate ones, a parameter list or a login's text of
//! 64 KiB, and at the driver that many buffers of at most the disk's `max_transfer`.

mod command;
mod control;
mod login;
mod outbox;
mod shared;
mod task;
mod transfer;

pub use outbox::Outbox;
pub use shared::{Farewell, Target};

use std::collections::VecDeque;
use std::ops::Range;

use crate::Step;
use crate::chap::{self, Chap};
use crate::error::Violation;
use crate::login::{Offer, Params};
use crate::pdu::{self, Decoder, Header, Unit, reject_reason};
use crate::scsi::Compare;
use crate::serial::Serial;
use login::Login;
use task::{Pending, Task};

/// Bounds on what initiators can make a target do. Time is in milliseconds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Limits {
    /// Commands of a session that can be outstanding, 1..=1024: the CmdSN window.
    pub queue_depth: u32,
    /// Sessions, those that are ending included.
    pub sessions: usize,
    /// Bytes in an [`Outbox`] above which no PDU is begun.
    pub outbound_bytes: usize,
    /// A login takes no longer.
    pub login_ms: u64,
    /// After so long without a byte the initiator is pinged.
    pub ping_after_ms: u64,
    /// After so long without an answer to that the connection has failed.
    pub ping_timeout_ms: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            queue_depth: 64,
            sessions: 32,
            outbound_bytes: 8 * 1024 * 1024,
            login_ms: 10_000,
            ping_after_ms: 10_000,
            ping_timeout_ms: 10_000,
        }
    }
}

/// Who may log in, and how.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Access {
    /// The initiator's name; `None`: any.
    pub initiator: Option<String>,
    /// What it must prove; `None`: nothing.
    pub chap: Option<Chap>,
}

/// What a target is.
#[derive(Debug, Clone)]
pub struct Config {
    /// TargetName.
    pub name: String,
    /// TargetAddress without the portal group, `host:port`, that SendTargets gives; none: as the initiator came.
    pub addresses: Vec<String>,
    /// TargetPortalGroupTag.
    pub portal_group: u16,
    /// The first entry that an initiator's name fits decides.
    pub access: Vec<Access>,
    /// What the target wants of a session.
    pub offer: Offer,
    /// Bounds.
    pub limits: Limits,
}

/// A connection, for the driver to find it by.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct ConnectionId(pub u64);

/// A command of a connection that the driver has something to do with. Small: the driver may index a table by it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct TaskId(pub u32);

/// Something for the backend to do. Ranges are bytes, within the disk, and multiples of its logical block.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Request {
    /// Answer with [`Outcome::Data`] of exactly `length` bytes.
    Read {
        /// From here.
        offset: u64,
        /// So much.
        length: u32,
        /// What is cached must be on the medium first.
        fua: bool,
    },
    /// Write the task's buffer.
    Write {
        /// To here.
        offset: u64,
        /// So much, from the buffer's start.
        length: u32,
        /// On the medium before it is answered.
        fua: bool,
        /// The buffer is needed again: a [`Self::Verify`] follows.
        keep: bool,
    },
    /// Read and compare with the task's buffer; [`Outcome::Mismatch`] if they differ.
    Verify {
        /// From here.
        offset: u64,
        /// So much.
        length: u32,
        /// With what of the buffer.
        compare: Compare,
    },
    /// Write [`Connection::pattern`] again and again.
    Fill {
        /// To here.
        offset: u64,
        /// So much.
        length: u64,
    },
    /// Make it zeros.
    Zero {
        /// From here.
        offset: u64,
        /// So much.
        length: u64,
        /// A hole will do.
        unmap: bool,
    },
    /// Make it a hole, which reads as zeros.
    Unmap {
        /// From here.
        offset: u64,
        /// So much.
        length: u64,
    },
    /// Everything acknowledged must be on the medium.
    Flush,
    /// Answer with [`Outcome::Digests`], one for each [`crate::scsi::DIGEST_BLOCK`] of the range.
    Digests {
        /// From here, a multiple of that.
        offset: u64,
        /// So much; only at the disk's end no multiple of it.
        length: u32,
    },
    /// Answer with [`Outcome::Extents`] from here on, at most so many.
    Status {
        /// From here, to the disk's end.
        offset: u64,
        /// Extents that are of use.
        extents: u32,
    },
}

/// What became of a [`Request`].
#[derive(Debug)]
pub enum Outcome<'a, B> {
    /// Done; not for [`Request::Read`], [`Request::Status`] or [`Request::Digests`].
    Done,
    /// What was read.
    Data(B),
    /// It differs at this byte of the range.
    Mismatch(u64),
    /// Length in bytes of each extent, and whether it is mapped.
    Extents(&'a [(u64, bool)]),
    /// CRC-32C of each block, as it was or would be served.
    Digests(&'a [u32]),
    /// It failed.
    Failed(Failure),
}

/// Why the backend failed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Failure {
    /// The medium, at this byte of the disk if that is known: MEDIUM ERROR.
    Medium(Option<u64>),
    /// No room: SPACE ALLOCATION FAILED WRITE PROTECT.
    NoSpace,
    /// Writing is not possible (any more): WRITE PROTECTED.
    ReadOnly,
    /// Not for now; the initiator tries again: NOT READY.
    NotReady,
    /// Anything else: INTERNAL TARGET FAILURE.
    Target,
}

/// What the driver has to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// A session begins.
    LoggedIn {
        /// The initiator's name.
        initiator: String,
        /// It will only ask what targets there are.
        discovery: bool,
    },
    /// These bytes of the input of this very call belong into the task's buffer. They may be there already, if they were
    /// read to where [`Connection::data_wanted`] said.
    Data {
        /// Whose.
        task: TaskId,
        /// Where in the buffer; 0 where it begins.
        offset: u32,
        /// The buffer's length: nothing will come that reaches past it.
        total: u32,
        /// Which bytes of the input.
        range: Range<usize>,
    },
    /// Do this, and [`Connection::complete`] it.
    Request {
        /// Whose.
        task: TaskId,
        /// What.
        request: Request,
    },
    /// The task was aborted before it came to a request: its buffer is not needed.
    Forget(TaskId),
    /// The task was aborted, and whoever aborted it waits for the end of its request: [`Connection::complete`] that as soon as it
    /// can be, performed or not.
    Abort(TaskId),
    /// Send all output and close. Requests that still run are to be completed nevertheless.
    Close(Option<Farewell>),
}

/// Data that come next in the stream; see [`Connection::data_wanted`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    /// Whose.
    pub task: TaskId,
    /// Where in the task's buffer.
    pub range: Range<u32>,
    /// The buffer's length, as of [`Event::Data`]: a buffer of another length is not this task's.
    pub total: u32,
}

/// Where the data goes that follows the header that came last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sink {
    /// Nowhere.
    Discard,
    /// Into `text`, for a login.
    Login,
    /// Into `text`, for a text request or a ping.
    Text,
    /// To the task in this slot.
    Task(usize),
}

/// A header that has just come.
#[derive(Debug, Clone, Copy)]
struct Arrival<'a> {
    header: Header,
    bhs: &'a [u8; pdu::BHS_BYTES],
    ahs: &'a [u8],
    data_length: u32,
}

#[derive(Debug)]
enum Phase {
    Login(Box<Login>),
    FullFeature,
    Ended,
}

/// The protocol machine of one connection; see the module. `B` is the driver's buffer for what it reads.
#[derive(Debug)]
pub struct Connection {
    id: ConnectionId,
    phase: Phase,
    decoder: Decoder,
    params: Params,
    discovery: bool,
    cid: u16,
    stat_sn: Serial,
    exp_cmd_sn: Serial,
    max_cmd_sn: Serial,
    queue_depth: u32,
    /// The header whose data are coming.
    header: Option<(Header, [u8; pdu::BHS_BYTES])>,
    sink: Sink,
    collected: Vec<u8>,
    tasks: Vec<Option<Task>>,
    /// How many there are of them, and of these immediate ones.
    outstanding: u32,
    immediate: u32,
    next_order: u64,
    next_transfer: u32,
    resets: u64,
    pending: Vec<Pending>,
    events: VecDeque<Event>,
    scratch: Vec<u8>,
    text: control::TextExchange,
    clock: control::Clock,
    refusal: Option<Violation>,
}

impl Connection {
    /// A new connection to `target`. `random` is drawn for it alone: the challenge of its login.
    pub fn new(target: &mut Target, random: [u8; chap::RANDOM_BYTES]) -> Self {
        let limits = &target.config.limits;
        let queue_depth = limits.queue_depth.clamp(1, 1024);
        let slots = queue_depth.saturating_add(command::MAX_IMMEDIATE) as usize;
        Self {
            id: target.next_connection(),
            phase: Phase::Login(Box::new(Login::new(random))),
            decoder: Decoder::new(crate::login::DEFAULT_MAX_SEGMENT, pdu::MAX_AHS_BYTES as u32),
            params: Params::default(),
            discovery: false,
            cid: 0,
            stat_sn: Serial(0),
            exp_cmd_sn: Serial(0),
            max_cmd_sn: Serial(0),
            queue_depth,
            header: None,
            sink: Sink::Discard,
            collected: Vec::new(),
            tasks: std::iter::repeat_with(|| None).take(slots).collect(),
            outstanding: 0,
            immediate: 0,
            next_order: 0,
            next_transfer: 0,
            resets: target.resets(),
            pending: Vec::new(),
            events: VecDeque::new(),
            scratch: Vec::new(),
            text: control::TextExchange::default(),
            clock: control::Clock::default(),
            refusal: None,
        }
    }

    /// Why the login was refused, where that was not [`Self::handle_input`]'s error: [`Event::Close`] came of it.
    pub fn refusal(&self) -> Option<&Violation> {
        self.refusal.as_ref()
    }

    /// What the target's wakeups name it by.
    pub fn id(&self) -> ConnectionId {
        self.id
    }

    /// Whether a session is up.
    pub fn is_logged_in(&self) -> bool {
        matches!(self.phase, Phase::FullFeature)
    }

    /// Tasks whose ids can occur: below this.
    pub fn task_ids(&self) -> u32 {
        u32::try_from(self.tasks.len()).unwrap_or(u32::MAX)
    }

    /// Whether no request is at the backend.
    pub fn is_drained(&self) -> bool {
        !self.tasks.iter().flatten().any(Task::is_running)
    }

    /// Deals with the next bytes of the stream; see [`Step`]. Begins no PDU while more than [`Limits::outbound_bytes`] are to
    /// be sent: the driver sends them, and calls again before it waits for more input. A PDU that has begun is taken to its end,
    /// so that what was read to where [`Self::data_wanted`] said is never left over.
    ///
    /// # Errors
    /// The peer broke the protocol: send what is in `out` if possible, close, take the events that are left, and call
    /// [`Self::handle_disconnect`].
    pub fn handle_input<B: AsRef<[u8]>>(
        &mut self,
        target: &mut Target,
        input: &[u8],
        out: &mut Outbox<B>,
    ) -> Result<Step<Event>, Violation> {
        let result = self.take_input(target, input, out);
        if let Ok(step) = &result {
            self.clock.handle_input(input.len(), step.consumed);
        }
        result
    }

    fn take_input<B: AsRef<[u8]>>(
        &mut self,
        target: &mut Target,
        input: &[u8],
        out: &mut Outbox<B>,
    ) -> Result<Step<Event>, Violation> {
        self.sync(target, out);
        let mut consumed = 0usize;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Step { consumed, event: Some(event) });
            }
            let is_full = !self.decoder.is_within() && out.len() > target.config.limits.outbound_bytes;
            if matches!(self.phase, Phase::Ended) || is_full || self.is_waiting() {
                return Ok(Step { consumed, event: None });
            }
            let rest = input.get(consumed..).unwrap_or_default();
            let step = match self.decoder.handle_input(rest) {
                Ok(step) => step,
                Err(violation) => return Err(self.fail(violation)),
            };
            let Some(unit) = step.event else { return Ok(Step { consumed, event: None }) };
            let start = consumed;
            consumed = consumed.saturating_add(step.consumed);
            let data = self.handle_unit(target, unit, start, out).map_err(|violation| self.fail(violation))?;
            if data.is_some() {
                return Ok(Step { consumed, event: data });
            }
        }
    }

    /// The next event that came of something else than input: after [`Self::complete`], [`Self::handle_wakeup`] and
    /// [`Self::handle_tick`] until there is none.
    pub fn poll_event(&mut self) -> Option<Event> {
        self.events.pop_front()
    }

    /// The task whose data come next in the stream, where they belong in its buffer, and how many. A driver that has no
    /// unread input may read them straight there, and then call [`Self::handle_input`] with them: all of them are taken, unless
    /// the connection ends.
    pub fn data_wanted(&self) -> Option<Wanted> {
        let left = self.decoder.data_left();
        let Sink::Task(slot) = self.sink else { return None };
        if left == 0 || !self.events.is_empty() {
            return None;
        }
        let task = self.tasks.get(slot)?.as_ref()?;
        let range = task.wanted(left)?;
        Some(Wanted { task: TaskId(u32::try_from(slot).ok()?), range, total: task.want })
    }

    /// The block that a [`Request::Fill`] repeats.
    pub fn pattern(&self, task: TaskId) -> &[u8] {
        self.tasks.get(task.0 as usize).and_then(Option::as_ref).map(|task| task.list.as_slice()).unwrap_or_default()
    }

    /// The transport is gone. Requests that run are still to be completed.
    pub fn handle_disconnect(&mut self, target: &mut Target) {
        self.phase = Phase::Ended;
        self.events.clear();
        self.pending.clear();
        self.header = None;
        for slot in &mut self.tasks {
            if slot.as_ref().is_some_and(|task| !task.is_running()) {
                *slot = None;
            }
        }
        target.unregister(self.id);
    }

    /// Another connection did something that concerns this one.
    pub fn handle_wakeup<B: AsRef<[u8]>>(&mut self, target: &mut Target, out: &mut Outbox<B>) {
        self.sync(target, out);
    }

    /// Takes over what happened to the session from outside: a reset, a farewell, the end of something waited for.
    fn sync<B: AsRef<[u8]>>(&mut self, target: &mut Target, out: &mut Outbox<B>) {
        if self.resets != target.resets() {
            self.resets = target.resets();
            self.abort_all();
        }
        self.finish_pending(target, out);
        if matches!(self.phase, Phase::Login(_)) {
            self.go_on_with_login(target, out);
        }
        self.say_farewell(target, out);
    }

    fn handle_unit<B: AsRef<[u8]>>(
        &mut self,
        target: &mut Target,
        unit: Unit<'_>,
        start: usize,
        out: &mut Outbox<B>,
    ) -> Result<Option<Event>, Violation> {
        match unit {
            Unit::Header { bhs, ahs, data_length } => {
                let header = match Header::decode(bhs) {
                    Ok(header) => header,
                    Err(violation) => {
                        self.reject(reject_reason::NOT_SUPPORTED, bhs, out);
                        return Err(violation);
                    }
                };
                self.collected.clear();
                self.header = Some((header, *bhs));
                self.sink = self.handle_header(target, &Arrival { header, bhs, ahs, data_length }, out)?;
                if data_length == 0 { self.handle_end(target, out).map(|()| None) } else { Ok(None) }
            }
            Unit::Data(data) => match self.sink {
                Sink::Discard => Ok(None),
                Sink::Login | Sink::Text => {
                    self.collected.extend_from_slice(data);
                    Ok(None)
                }
                Sink::Task(slot) => Ok(self.take_data(slot, data, start)),
            },
            Unit::End { intact: false } => {
                if let Some((_, bhs)) = self.header {
                    self.reject(reject_reason::DATA_DIGEST, &bhs, out);
                }
                Err(Violation::DataDigest)
            }
            Unit::End { intact: true } => self.handle_end(target, out).map(|()| None),
        }
    }

    /// Marks the end; gives the violation back. Events stay: among them may be requests, which the driver has to complete.
    fn fail(&mut self, violation: Violation) -> Violation {
        self.phase = Phase::Ended;
        violation
    }
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests;
