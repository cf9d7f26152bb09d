//! An initiator's side of one connection after another: it reads a disk.
//!
//! ```text
//! Idle --connect--> Login --> Probing --the disk is the same--> Ready --logout--> Leaving --> Ended
//!   ^                           |  ^ unit attention: again
//!   +--handle_disconnect (from anywhere): commands not answered come out of poll_lost, to be asked again
//! ```
//! [`Initiator`] turns commands into bytes, and bytes into [`Event`]s. Data of reads go to the driver's own buffers, at
//! once if it reads from its socket to where [`Initiator::landing`] says, else by way of its input. **A buffer comes back
//! when the status is GOOD, every byte of it came, and every digest matched; until then nothing in it means anything.**
//!
//! Whatever can be asked again in the session is, without the driver's doing: after unit attentions, BUSY, TASK SET FULL,
//! NOT READY and aborted commands, a number of times. What can not ends the session, and the driver makes another: a disk that
//! says it has changed or was reset, a command of which nothing comes, anything that breaks the protocol (ErrorRecoveryLevel is 0, so a lost PDU is a lost session), a ping without answer.
//! The next session is only ready if [`Device::check_same`] finds the disk of the first one again.
//!
//! Memory: at most [`Config::max_outstanding`] commands with the driver's buffers, 8 KiB of an answer each otherwise, and
//! 16 KiB of a login's text. Time is milliseconds of any clock that does not go back.

mod cdb;
mod device;
mod full;
mod login;
mod probe;
mod task;
mod verdict;

pub use device::{Device, Extent};
pub use verdict::Failure;

use std::collections::VecDeque;

use crate::Step;
use crate::chap::{self, Chap};
use crate::error::Violation;
use crate::login::{DEFAULT_MAX_SEGMENT, Offer, Params};
use crate::pdu::{self, Decoder, Header, LogoutRequest, NopOut, Unit};
use crate::scsi::MAX_DIGESTS;
use crate::serial::Serial;
use login::{Login, Progress};
use probe::Probe;
use task::{Order, Task, Tasks};

/// Initiator Task Tags of pings and of the logout: no command has this bit.
const CONTROL_TAG: u32 = 0x8000_0000;

/// What an initiator is, and what it wants.
#[derive(Debug, Clone)]
pub struct Config {
    /// InitiatorName.
    pub initiator: String,
    /// TargetName.
    pub target: String,
    /// The logical unit, 0..=16383.
    pub lun: u16,
    /// ISID: with the name, the initiator's port. A login with the same reinstates the session before it (7.3.5), so each
    /// lane has its own and keeps it.
    pub isid: [u8; 6],
    /// What is to be proved; `None`: nothing, to a target that does not ask for it either.
    pub chap: Option<Chap>,
    /// What is wanted of a session; digests may be preferred or required.
    pub offer: Offer,
    /// Most commands outstanding, 1..=4096; the target's window may be smaller.
    pub max_outstanding: u32,
    /// CmdSN that sessions begin with; any.
    pub first_cmd_sn: Serial,
    /// After so long without a byte the target is pinged, ms.
    pub ping_after_ms: u64,
    /// After so long without an answer to that the connection has failed, ms.
    pub ping_timeout_ms: u64,
    /// A command of which nothing has come for so long, and which later ones have overtaken, is lost, ms. Longer than any disk
    /// takes over one read. What waits behind earlier ones on a slow network is not overtaken.
    pub command_timeout_ms: u64,
}

/// What the driver has to act on.
#[derive(Debug, PartialEq, Eq)]
pub enum Event<B> {
    /// Commands may be sent; [`Initiator::device`] says to what.
    Ready,
    /// A command is answered.
    Done {
        /// Its tag.
        tag: u64,
        /// How.
        answer: Result<Answer<B>, Failure>,
    },
    /// The session has ended in good order, on this side's wish or the target's: close.
    Ended,
}

/// What a command brought.
#[derive(Debug, PartialEq, Eq)]
pub enum Answer<B> {
    /// A read: its buffer, full.
    Data(B),
    /// GET LBA STATUS: runs of blocks from where it was asked on, none if the target's answer makes no sense.
    Extents(Vec<Extent>),
    /// READ BLOCK DIGESTS: one CRC-32C for each 4 KiB block.
    Digests(Vec<u32>),
}

/// Why a command cannot be sent; nothing was entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Refused {
    /// No session, or it is about to end.
    #[error("not connected")]
    NotConnected,
    /// See [`Initiator::room`].
    #[error("too many commands outstanding")]
    Full,
    /// Past the disk's end, not whole blocks, or longer than the disk takes.
    #[error("the command does not fit the disk")]
    OutOfRange,
    /// The disk does not have it.
    #[error("the disk does not offer this")]
    NotOffered,
}

#[derive(Debug)]
enum Phase {
    Idle,
    Login(Box<Login>),
    Probing(Box<Probe>),
    Ready,
    /// Logout is out.
    Leaving,
    Ended,
}

/// Where the data goes that follows the header that came last.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Sink {
    /// Nowhere.
    Discard,
    /// Into `collected`.
    Collect,
    /// To the command in this slot.
    Task(usize),
}

#[derive(Debug, Default)]
struct Clock {
    now: u64,
    heard: u64,
    /// Bytes that came and were left over: they come again, and are no news then.
    left: usize,
    /// The ping that is out, and since when.
    pinged: Option<(u32, u64)>,
    pings: u32,
    /// When to be gone, if the target wants the session to end.
    leave_by: Option<u64>,
}

/// The protocol machine; see the module. `B` is the driver's buffer.
#[derive(Debug)]
pub struct Initiator<B> {
    config: Config,
    phase: Phase,
    decoder: Decoder,
    params: Params,
    cmd_sn: Serial,
    max_cmd_sn: Serial,
    exp_stat_sn: Serial,
    header: Option<Header>,
    sink: Sink,
    collected: Vec<u8>,
    tasks: Tasks<B>,
    events: VecDeque<Event<B>>,
    device: Device,
    known: Option<Device>,
    clock: Clock,
    progress: u64,
    /// Commands that this session has sent, and the turn of the latest that is over.
    sent: u64,
    latest: u64,
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Initiator<B> {
    /// An initiator with no connection yet.
    pub fn new(config: Config) -> Self {
        Self {
            phase: Phase::Idle,
            decoder: Decoder::new(DEFAULT_MAX_SEGMENT, 0),
            params: Params::default(),
            cmd_sn: config.first_cmd_sn,
            max_cmd_sn: config.first_cmd_sn,
            exp_stat_sn: Serial(0),
            header: None,
            sink: Sink::Discard,
            collected: Vec::new(),
            tasks: Tasks::new(),
            events: VecDeque::new(),
            device: Device::default(),
            known: None,
            clock: Clock::default(),
            progress: 0,
            sent: 0,
            latest: 0,
            config,
        }
    }

    /// Only this disk will do: as found on another connection. Else the first one that is found.
    pub fn expect(&mut self, device: &Device) {
        self.known = Some(device.clone());
    }

    /// There is a transport: the login begins. `random` is drawn for this connection alone: the challenge that a target which
    /// has to prove itself is given (CVE-2024-45751 is what comes of drawing it badly).
    pub fn handle_connect(&mut self, now: u64, random: [u8; chap::RANDOM_BYTES], out: &mut Vec<u8>) {
        debug_assert!(matches!(self.phase, Phase::Idle), "one connection at a time");
        self.clock = Clock { now, heard: now, ..Clock::default() };
        (self.cmd_sn, self.max_cmd_sn) = (self.config.first_cmd_sn, self.config.first_cmd_sn.minus(1));
        self.decoder = Decoder::new(DEFAULT_MAX_SEGMENT, 0);
        self.params = Params::default();
        (self.sent, self.latest) = (0, 0);
        self.phase = Phase::Login(Box::new(Login::start(&self.config, random, self.cmd_sn, out)));
    }

    /// The transport is gone. Every command that was not answered comes out of [`Self::poll_lost`].
    pub fn handle_disconnect(&mut self) {
        self.phase = Phase::Idle;
        self.header = None;
        self.sink = Sink::Discard;
        self.collected.clear();
        self.events.clear();
    }

    /// A command that a lost connection left unanswered: its tag, and the buffer of a read.
    pub fn poll_lost(&mut self) -> Option<(u64, Option<B>)> {
        if !matches!(self.phase, Phase::Idle) {
            return None;
        }
        loop {
            let task = self.tasks.pop()?;
            if !matches!(task.order, Order::Probe(_)) {
                return Some((task.tag, task.buffer));
            }
        }
    }

    /// Whether commands may be sent.
    pub fn is_ready(&self) -> bool {
        matches!(self.phase, Phase::Ready)
    }

    /// The disk, once [`Event::Ready`] was given.
    pub fn device(&self) -> Option<&Device> {
        self.is_ready().then_some(&self.device)
    }

    /// What was negotiated.
    pub fn params(&self) -> Params {
        self.params
    }

    /// Commands that are not answered.
    pub fn outstanding(&self) -> usize {
        self.tasks.len()
    }

    /// How many more commands may be sent now.
    pub fn room(&self) -> u32 {
        if !self.is_ready() || self.clock.leave_by.is_some() {
            return 0;
        }
        let waiting = u32::try_from(self.tasks.due().count()).unwrap_or(u32::MAX);
        let length = u32::try_from(self.tasks.len()).unwrap_or(u32::MAX);
        let own = self.config.max_outstanding.clamp(1, 4096).saturating_sub(length);
        own.min(self.window().saturating_sub(waiting))
    }

    /// Commands that the target takes now (4.2.2.1).
    fn window(&self) -> u32 {
        self.max_cmd_sn.next().since(self.cmd_sn)
    }

    /// Counts bytes and final answers of commands: a target that answers pings but nothing else, or puts everything off, does
    /// not move it.
    pub fn progress(&self) -> u64 {
        self.progress
    }

    /// Reads `buffer` full from `offset`.
    ///
    /// # Errors
    /// See [`Refused`]; the buffer comes back.
    pub fn read(&mut self, tag: u64, offset: u64, buffer: B, now: u64, out: &mut Vec<u8>) -> Result<(), (Refused, B)> {
        let length = buffer.as_ref().len();
        match u32::try_from(length).ok().filter(|length| *length <= self.device.max_transfer) {
            Some(length) => self.enter(tag, Order::Read { offset, length }, Some(buffer), now, out),
            None => Err((Refused::OutOfRange, Some(buffer))),
        }
        .map_err(|(refused, buffer)| match buffer {
            Some(buffer) => (refused, buffer),
            None => unreachable!("it was given"),
        })
    }

    /// Asks which blocks are mapped, from `offset` on.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn status(&mut self, tag: u64, offset: u64, now: u64, out: &mut Vec<u8>) -> Result<(), Refused> {
        if self.is_ready() && !self.device.holes {
            return Err(Refused::NotOffered);
        }
        self.enter(tag, Order::Status { offset }, None, now, out).map_err(|(refused, _)| refused)
    }

    /// Asks for the digests of at most [`MAX_DIGESTS`] blocks.
    ///
    /// # Errors
    /// See [`Refused`].
    pub fn digests(&mut self, tag: u64, offset: u64, length: u32, now: u64, out: &mut Vec<u8>) -> Result<(), Refused> {
        if self.is_ready() && !self.device.digests {
            return Err(Refused::NotOffered);
        }
        if Order::digest_blocks(length) > MAX_DIGESTS {
            return Err(Refused::OutOfRange);
        }
        self.enter(tag, Order::Digests { offset, length }, None, now, out).map_err(|(refused, _)| refused)
    }

    fn enter(
        &mut self,
        tag: u64,
        order: Order,
        buffer: Option<B>,
        now: u64,
        out: &mut Vec<u8>,
    ) -> Result<(), (Refused, Option<B>)> {
        self.clock.now = now;
        if !self.is_ready() || self.clock.leave_by.is_some() {
            return Err((Refused::NotConnected, buffer));
        }
        if self.room() == 0 {
            return Err((Refused::Full, buffer));
        }
        let Some(command) = order.command(&self.device) else { return Err((Refused::OutOfRange, buffer)) };
        self.send_new(Task::new(tag, order, command, buffer, now));
        self.send_due(out);
        Ok(())
    }

    /// Where the next bytes of the stream belong, if they are a read's data: a driver with no unread input may read them
    /// straight there, as many as fit, and then call [`Self::handle_landed`].
    pub fn landing(&mut self) -> Option<&mut [u8]> {
        let left = self.decoder.data_left();
        let Sink::Task(slot) = self.sink else { return None };
        if left == 0 || !self.events.is_empty() {
            return None;
        }
        self.tasks.get_mut(slot)?.landing(left).filter(|room| !room.is_empty())
    }

    /// The first `count` bytes of [`Self::landing`] were read.
    ///
    /// # Errors
    /// As of [`Self::handle_input`].
    pub fn handle_landed(&mut self, count: usize) -> Result<(), Violation> {
        let Sink::Task(slot) = self.sink else { return Err(Violation::Ended) };
        let task = self.tasks.get_mut(slot).ok_or(Violation::Ended)?;
        let length = u32::try_from(count).unwrap_or(u32::MAX);
        let step = match task.landing(length) {
            Some(landed) if landed.len() == count => self.decoder.handle_input(landed)?,
            _ => return Err(Violation::Ended),
        };
        debug_assert!(step.consumed == count, "what was announced is all data");
        task.received = task.received.saturating_add(length);
        self.progress = self.progress.wrapping_add(u64::from(length));
        self.clock.heard = self.clock.now;
        Ok(())
    }

    /// Deals with the next bytes of the stream; see [`Step`].
    ///
    /// # Errors
    /// The target broke the protocol, refused us, or has another disk than before: close, then
    /// [`Self::handle_disconnect`].
    pub fn handle_input(&mut self, now: u64, input: &[u8], out: &mut Vec<u8>) -> Result<Step<Event<B>>, Violation> {
        self.clock.now = now;
        if input.len() > self.clock.left {
            self.clock.heard = now;
        }
        let step = self.take_input(input, out)?;
        if !input.is_empty() {
            self.clock.left = input.len().saturating_sub(step.consumed);
        }
        Ok(step)
    }

    fn take_input(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Step<Event<B>>, Violation> {
        let mut consumed = 0usize;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok(Step { consumed, event: Some(event) });
            }
            if matches!(self.phase, Phase::Ended | Phase::Idle) {
                return Ok(Step { consumed, event: None });
            }
            let rest = input.get(consumed..).unwrap_or_default();
            let step = self.decoder.handle_input(rest)?;
            let Some(unit) = step.event else { return Ok(Step { consumed, event: None }) };
            consumed = consumed.saturating_add(step.consumed);
            self.handle_unit(unit, out)?;
            self.go_on_leaving(out);
            self.send_due(out);
        }
    }

    fn handle_unit(&mut self, unit: Unit<'_>, out: &mut Vec<u8>) -> Result<(), Violation> {
        match unit {
            Unit::Header { bhs, data_length, .. } => {
                let header = Header::decode(bhs)?;
                self.collected.clear();
                self.header = Some(header);
                self.sink = self.handle_header(&header, data_length)?;
                if data_length == 0 { self.handle_end(out) } else { Ok(()) }
            }
            Unit::Data(data) => {
                match self.sink {
                    Sink::Discard => {}
                    Sink::Collect => self.collected.extend_from_slice(data),
                    Sink::Task(slot) => {
                        self.progress = self.progress.wrapping_add(data.len() as u64);
                        if let Some(task) = self.tasks.get_mut(slot) {
                            task.take(data);
                        }
                    }
                }
                Ok(())
            }
            Unit::End { intact: false } => Err(Violation::DataDigest),
            Unit::End { intact: true } => self.handle_end(out),
        }
    }

    /// All of a PDU is here.
    fn handle_end(&mut self, out: &mut Vec<u8>) -> Result<(), Violation> {
        let sink = std::mem::replace(&mut self.sink, Sink::Discard);
        let Some(header) = self.header.take() else { return Ok(()) };
        let collected = std::mem::take(&mut self.collected);
        let result = match (&mut self.phase, &header) {
            (Phase::Login(login), Header::LoginResponse(response)) => {
                let progress = login.handle(response, &collected, &self.config, out)?;
                if let Progress::LoggedIn(params) = progress {
                    let exp_stat_sn = login.exp_stat_sn();
                    self.begin(params, exp_stat_sn);
                }
                Ok(())
            }
            _ => self.full_feature(&header, sink, &collected, out),
        };
        self.collected = collected;
        self.collected.clear();
        result
    }

    /// The full feature phase begins: the disk is asked what it is.
    fn begin(&mut self, params: Params, exp_stat_sn: Serial) {
        self.params = params;
        self.exp_stat_sn = exp_stat_sn;
        self.decoder.set_negotiated(params.digests, params.max_receive);
        let (probe, first) = Probe::new();
        self.phase = Phase::Probing(Box::new(probe));
        first.into_iter().for_each(|step| self.ask_probe(step));
    }

    /// Time passes: to be called when [`Self::poll_timeout`] says, or more often.
    ///
    /// # Errors
    /// The target is silent, or its session has to end: as of [`Self::handle_input`].
    pub fn handle_tick(&mut self, now: u64, out: &mut Vec<u8>) -> Result<(), Violation> {
        self.clock.now = now;
        if matches!(self.phase, Phase::Probing(_) | Phase::Ready | Phase::Leaving) {
            if self.clock.leave_by.is_some_and(|by| now >= by) {
                return Err(Violation::Dropped);
            }
            match self.clock.pinged {
                // It was sent because nothing had come for long, so what came in the same millisecond came after it.
                Some((_, since)) if self.clock.heard >= since => self.clock.pinged = None,
                Some((_, since)) if now.saturating_sub(since) >= self.config.ping_timeout_ms => {
                    return Err(Violation::OutOfPlace("a ping was not answered"));
                }
                None if now.saturating_sub(self.clock.heard) >= self.config.ping_after_ms => self.ping(out),
                _ => {}
            }
            let limit = self.config.command_timeout_ms;
            if self.tasks.overtaken_since(self.latest).is_some_and(|since| now.saturating_sub(since) >= limit) {
                return Err(Violation::Lost { seconds: limit / 1000 });
            }
        }
        self.go_on_leaving(out);
        self.send_due(out);
        Ok(())
    }

    /// When to call [`Self::handle_tick`] next.
    pub fn poll_timeout(&self) -> Option<u64> {
        if !matches!(self.phase, Phase::Probing(_) | Phase::Ready | Phase::Leaving) {
            return None;
        }
        let ping = match self.clock.pinged {
            Some((_, since)) => since.saturating_add(self.config.ping_timeout_ms),
            None => self.clock.heard.saturating_add(self.config.ping_after_ms),
        };
        // What is to be sent waits for the window, if that is shut, and not for time.
        let due = if self.window() > 0 { self.tasks.due().map(|(at, _)| at).min() } else { None };
        let overtaken = self.tasks.overtaken_since(self.latest);
        let lost = overtaken.map(|since| since.saturating_add(self.config.command_timeout_ms));
        [Some(ping), due, self.clock.leave_by, lost].into_iter().flatten().min()
    }

    fn ping(&mut self, out: &mut Vec<u8>) {
        self.clock.pings = self.clock.pings.wrapping_add(1);
        let task = CONTROL_TAG | (self.clock.pings & 0xffff);
        self.clock.pinged = Some((task, self.clock.now));
        let nop = NopOut {
            immediate: true,
            is_final: true,
            lun: self.lun(),
            task,
            transfer: pdu::NO_TAG,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        };
        self.put(&nop.into(), out);
    }

    /// Takes leave: no more commands; those that are outstanding are answered first, if the target answers. [`Event::Ended`]
    /// comes when the logout is answered; who does not want to wait closes now.
    pub fn logout(&mut self, now: u64, out: &mut Vec<u8>) {
        self.clock.now = now;
        if matches!(self.phase, Phase::Probing(_) | Phase::Ready) {
            self.put_logout(out);
        }
    }

    /// The target wants the session to end: logs out once nothing is outstanding.
    fn go_on_leaving(&mut self, out: &mut Vec<u8>) {
        if self.clock.leave_by.is_some() && matches!(self.phase, Phase::Ready) && self.tasks.len() == 0 {
            self.put_logout(out);
        }
    }

    fn put_logout(&mut self, out: &mut Vec<u8>) {
        // Reason 0: the session is closed.
        let logout = LogoutRequest {
            immediate: true,
            reason: 0,
            task: CONTROL_TAG | 0x1_0000,
            cid: 0,
            cmd_sn: self.cmd_sn,
            exp_stat_sn: self.exp_stat_sn,
        };
        self.put(&logout.into(), out);
        self.phase = Phase::Leaving;
    }

    fn put(&mut self, header: &Header, out: &mut Vec<u8>) {
        pdu::put(out, header, &[], self.params.digests);
    }

    /// The LUN field (SAM-5 4.7): peripheral addressing to 255, flat beyond.
    fn lun(&self) -> u64 {
        let lun = u64::from(self.config.lun & 0x3fff);
        (if lun < 256 { lun } else { 0x4000 | lun }) << 48
    }
}
