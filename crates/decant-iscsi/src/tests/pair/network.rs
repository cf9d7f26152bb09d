//! A target and an initiator, joined by connections that delay, cut, swallow, damage and break, in virtual time.

use std::collections::{BTreeMap, BTreeSet, VecDeque};

use crate::chap::{CHALLENGE_BYTES, RANDOM_BYTES};
use crate::error::Violation;
use crate::initiator::{Answer, Device, Event, Initiator};
use crate::scsi::Disk;
use crate::target::{self, Connection, Failure, Outbox, Outcome, Request, Target, TaskId};

/// A small generator; what a seed comes to never changes.
pub(super) struct Random(u64);

impl Random {
    pub(super) fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 11
    }

    /// Below `end`.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.next() % end.max(1)
    }

    pub(super) fn one_in(&mut self, chance: u64) -> bool {
        self.below(chance) == 0
    }
}

/// What goes wrong, as one chance in so many events of its kind; 0 never.
#[derive(Clone, Copy, Default)]
pub(super) struct Faults {
    /// A piece in flight breaks its connection.
    pub(super) reset: u64,
    /// A piece and all after it are swallowed, and nobody is told.
    pub(super) swallow: u64,
    /// A bit of a piece is flipped, once a session is up.
    pub(super) damage: u64,
    /// A request to the medium says "not now".
    pub(super) not_ready: u64,
    /// The target tells of a change of mode.
    pub(super) attention: u64,
    /// So many faults, then calm.
    pub(super) at_most: u32,
}

/// One direction of a connection: pieces with the times at which they arrive.
#[derive(Default)]
struct Pipe {
    pieces: VecDeque<(u64, Vec<u8>)>,
    last: u64,
    /// When its end arrives.
    closed: Option<u64>,
    swallows: bool,
}

impl Pipe {
    fn push(&mut self, now: u64, mut bytes: &[u8], random: &mut Random, delay: u64) {
        while !bytes.is_empty() && !self.swallows && self.closed.is_none() {
            // Mostly as TCP has it, sometimes byte by byte.
            let most = if random.one_in(3) { 64 } else { 16_384 };
            let (piece, rest) = bytes.split_at(bytes.len().min(1 + random.below(most) as usize));
            self.last = self.last.max(now + random.below(delay));
            self.pieces.push_back((self.last, piece.to_vec()));
            bytes = rest;
        }
    }

    fn close(&mut self, at: u64) {
        self.last = self.last.max(at);
        self.closed.get_or_insert(self.last);
    }

    fn next(&self) -> Option<u64> {
        self.pieces.front().map(|piece| piece.0).or(self.closed)
    }
}

/// One connection, with the target's end of it.
struct Wire {
    to_target: Pipe,
    to_initiator: Pipe,
    connection: Connection,
    out: Outbox<Vec<u8>>,
    input: Vec<u8>,
    running: Vec<(u64, TaskId, Request)>,
    gone: bool,
}

/// What the driver of the initiator asks.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Ask {
    Read(u64, u32),
    Status(u64),
    Digests(u64, u32),
}

/// The world.
pub(super) struct Network {
    pub(super) now: u64,
    pub(super) target: Target,
    pub(super) medium: Vec<u8>,
    pub(super) initiator: Initiator<Vec<u8>>,
    wires: Vec<Wire>,
    current: Option<usize>,
    input: Vec<u8>,
    reconnect: u64,
    random: Random,
    faults: Faults,
    pub(super) faults_so_far: u32,
    delay: u64,
    /// Asked for and not answered, and of these what is to be sent.
    pub(super) owed: BTreeMap<u64, Ask>,
    todo: VecDeque<u64>,
    answered: BTreeSet<u64>,
    pub(super) sessions: u32,
    pub(super) violations: Vec<Violation>,
}

const TICK: u64 = 500;

impl Network {
    pub(super) fn new(seed: u64, target: Target, initiator: Initiator<Vec<u8>>, faults: Faults) -> Self {
        let disk: &Disk = target.disk();
        let mut random = Random::new(seed);
        let medium = (0..disk.bytes() / 8).flat_map(|_| random.next().to_le_bytes()).collect();
        let delay = [1, 5, 40][random.below(3) as usize];
        Self {
            now: 0,
            medium,
            target,
            initiator,
            wires: Vec::new(),
            current: None,
            input: Vec::new(),
            reconnect: 0,
            random,
            faults,
            faults_so_far: 0,
            delay,
            owed: BTreeMap::new(),
            todo: VecDeque::new(),
            answered: BTreeSet::new(),
            sessions: 0,
            violations: Vec::new(),
        }
    }

    pub(super) fn ask(&mut self, tag: u64, ask: Ask) {
        assert!(self.owed.insert(tag, ask).is_none());
        self.todo.push_back(tag);
    }

    /// Runs until `done`, or time is over.
    pub(super) fn run(&mut self, until: u64, mut done: impl FnMut(&Self) -> bool) -> bool {
        while !done(self) {
            let Some(at) = self.next_time() else { return false };
            if at > until {
                return false;
            }
            self.now = self.now.max(at);
            self.step();
        }
        true
    }

    fn next_time(&self) -> Option<u64> {
        let mut times = vec![(self.now / TICK + 1) * TICK];
        times.extend(self.current.is_none().then_some(self.reconnect));
        times.extend(self.initiator.poll_timeout());
        for (index, wire) in self.wires.iter().enumerate().filter(|(_, wire)| !wire.gone) {
            times.extend(wire.to_target.next());
            times.extend(wire.running.iter().map(|running| running.0));
            times.extend(wire.to_initiator.next().filter(|_| self.current == Some(index)));
        }
        times.into_iter().min()
    }

    fn step(&mut self) {
        if self.current.is_none() && self.reconnect <= self.now {
            self.connect();
        }
        for index in 0..self.wires.len() {
            self.deliver_to_target(index);
            self.perform(index);
            if self.now.is_multiple_of(TICK) {
                self.tick_target(index);
            }
        }
        self.wake();
        for index in 0..self.wires.len() {
            self.flush(index);
        }
        self.run_initiator();
        self.wires.iter_mut().for_each(|wire| wire.to_initiator.swallows |= wire.gone);
    }

    fn connect(&mut self) {
        let mut random = [0; RANDOM_BYTES];
        random.iter_mut().for_each(|byte| *byte = self.random.next() as u8);
        let connection = Connection::new(&mut self.target, random);
        let wire = Wire {
            to_target: Pipe::default(),
            to_initiator: Pipe::default(),
            connection,
            out: Outbox::default(),
            input: Vec::new(),
            running: Vec::new(),
            gone: false,
        };
        self.wires.push(wire);
        self.current = Some(self.wires.len() - 1);
        self.input.clear();
        random[CHALLENGE_BYTES] ^= 1;
        let mut out = Vec::new();
        self.initiator.handle_connect(self.now, random, &mut out);
        self.send(&out);
    }

    fn send(&mut self, bytes: &[u8]) {
        let Some(index) = self.current else { return };
        self.wires[index].to_target.push(self.now, bytes, &mut self.random, self.delay);
    }

    /// Whether something goes wrong now.
    fn strikes(&mut self, chance: u64) -> bool {
        let strikes = chance > 0 && self.faults_so_far < self.faults.at_most && self.random.one_in(chance);
        self.faults_so_far += u32::from(strikes);
        strikes
    }

    /// What became of a piece on its way; `None`: nothing arrives.
    fn travel(&mut self, mut piece: Vec<u8>, index: usize, up: bool) -> Option<Vec<u8>> {
        if self.strikes(self.faults.reset) {
            self.reset(index);
            return None;
        }
        if self.strikes(self.faults.swallow) {
            let wire = &mut self.wires[index];
            for pipe in [&mut wire.to_target, &mut wire.to_initiator] {
                (pipe.swallows, pipe.closed) = (true, None);
                pipe.pieces.clear();
            }
            return None;
        }
        if up && self.strikes(self.faults.damage) {
            let at = self.random.below(piece.len() as u64) as usize;
            piece[at] ^= 1 << self.random.below(8);
        }
        Some(piece)
    }

    /// The connection breaks: the initiator knows at once, and what it had sent still trickles in at the target.
    fn reset(&mut self, index: usize) {
        let late = self.now + self.random.below(400);
        self.wires[index].to_target.close(late);
        self.wires[index].to_initiator.swallows = true;
        if self.current == Some(index) {
            self.lose();
        }
    }

    fn lose(&mut self) {
        let Some(index) = self.current.take() else { return };
        let late = self.now + self.random.below(50);
        self.wires[index].to_target.close(late);
        self.initiator.handle_disconnect();
        while let Some((tag, buffer)) = self.initiator.poll_lost() {
            assert_eq!(buffer.is_some(), matches!(self.owed[&tag], Ask::Read(..)));
            self.todo.push_back(tag);
        }
        self.reconnect = self.now + 1 + self.random.below(30);
    }

    fn deliver_to_target(&mut self, index: usize) {
        loop {
            let wire = &mut self.wires[index];
            match wire.to_target.pieces.front() {
                Some((at, _)) if *at <= self.now => {}
                None if wire.to_target.closed.is_some_and(|at| at <= self.now) && !wire.gone => {
                    return self.target_loses(index);
                }
                _ => return,
            }
            let Some((_, piece)) = wire.to_target.pieces.pop_front() else { return };
            let up = wire.connection.is_logged_in() && self.initiator.is_ready();
            let Some(piece) = self.travel(piece, index, up) else { return };
            let wire = &mut self.wires[index];
            wire.input.extend(piece);
            if !wire.gone {
                self.feed_target(index);
            }
        }
    }

    fn feed_target(&mut self, index: usize) {
        loop {
            let wire = &mut self.wires[index];
            match wire.connection.handle_input(&mut self.target, &wire.input, &mut wire.out) {
                Ok(step) => {
                    wire.input.drain(..step.consumed);
                    let Some(event) = step.event else { return };
                    self.act(index, event);
                }
                Err(violation) => {
                    self.violations.push(violation);
                    self.flush(index);
                    return self.target_loses(index);
                }
            }
        }
    }

    fn act(&mut self, index: usize, event: target::Event) {
        match event {
            target::Event::Request { task, request } => {
                let slow = if self.random.one_in(40) { 2000 } else { 10 };
                let at = self.now + self.random.below(slow);
                self.wires[index].running.push((at, task, request));
            }
            target::Event::Close(_) => {
                self.flush(index);
                self.target_loses(index);
            }
            target::Event::LoggedIn { .. } => self.sessions += 1,
            // Its end comes at its time, as with a medium that cannot be interrupted.
            target::Event::Abort(_) => {}
            other => panic!("nothing is written: {other:?}"),
        }
    }

    /// The target's end is closed; what its medium still does is done nevertheless.
    fn target_loses(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        if !wire.gone {
            wire.to_initiator.close(self.now);
            wire.connection.handle_disconnect(&mut self.target);
            wire.gone = wire.running.is_empty();
            wire.to_target.closed = None;
            wire.to_target.pieces.clear();
        }
    }

    fn perform(&mut self, index: usize) {
        while let Some(at) = self.wires[index].running.iter().position(|running| running.0 <= self.now) {
            let (_, task, request) = self.wires[index].running.swap_remove(at);
            let (mut extents, mut digests) = (Vec::new(), Vec::new());
            let refuse = self.strikes(self.faults.not_ready);
            let outcome = match request {
                _ if refuse => Outcome::Failed(Failure::NotReady),
                Request::Read { offset, length, .. } => {
                    Outcome::Data(self.medium[offset as usize..][..length as usize].to_vec())
                }
                Request::Status { offset, .. } => {
                    extents.extend(extents_of(offset, self.medium.len() as u64));
                    Outcome::Extents(&extents)
                }
                Request::Digests { offset, length } => {
                    let range = &self.medium[offset as usize..][..length as usize];
                    digests.extend(range.chunks(4096).map(crc32c::crc32c));
                    Outcome::Digests(&digests)
                }
                other => panic!("nothing is written: {other:?}"),
            };
            let wire = &mut self.wires[index];
            wire.connection.complete(&mut self.target, task, outcome, &mut wire.out);
            self.poll_target(index);
            if self.strikes(self.faults.attention) {
                self.target.set_read_only(true);
            }
        }
    }

    fn poll_target(&mut self, index: usize) {
        while let Some(event) = self.wires[index].connection.poll_event() {
            self.act(index, event);
        }
    }

    fn tick_target(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        if !wire.gone && wire.connection.handle_tick(&mut self.target, self.now, &mut wire.out).is_err() {
            self.target_loses(index);
        }
    }

    fn wake(&mut self) {
        while let Some(id) = self.target.poll_wakeup() {
            if let Some(index) = self.wires.iter().position(|wire| wire.connection.id() == id) {
                let wire = &mut self.wires[index];
                wire.connection.handle_wakeup(&mut self.target, &mut wire.out);
                self.poll_target(index);
                self.feed_target(index);
            }
        }
    }

    fn flush(&mut self, index: usize) {
        let wire = &mut self.wires[index];
        while !wire.out.is_empty() {
            let mut slices = [std::io::IoSlice::new(&[]); 8];
            let count = wire.out.slices(&mut slices);
            let bytes: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).collect();
            wire.out.advance(bytes.len());
            wire.to_initiator.push(self.now, &bytes, &mut self.random, self.delay);
        }
        while wire.out.take_spent().is_some() {}
    }

    fn run_initiator(&mut self) {
        let mut out = Vec::new();
        while let Some(index) = self.current {
            let wire = &mut self.wires[index];
            match wire.to_initiator.pieces.front() {
                Some((at, _)) if *at <= self.now => {}
                None if wire.to_initiator.closed.is_some_and(|at| at <= self.now) => self.lose(),
                _ => break,
            }
            if self.current.is_none() {
                break;
            }
            let Some((_, piece)) = self.wires[index].to_initiator.pieces.pop_front() else { break };
            let up = self.initiator.is_ready();
            let Some(piece) = self.travel(piece, index, up) else { continue };
            if let Err(violation) = self.feed_initiator(&piece, &mut out) {
                self.violations.push(violation);
                self.lose();
            }
        }
        if self.current.is_some() {
            let result = self.initiator.handle_tick(self.now, &mut out);
            self.ask_more(&mut out);
            self.send(&out);
            if let Err(violation) = result {
                self.violations.push(violation);
                self.lose();
            }
        }
    }

    /// By way of the input, or straight to where it belongs.
    fn feed_initiator(&mut self, mut piece: &[u8], out: &mut Vec<u8>) -> Result<(), Violation> {
        while !piece.is_empty() {
            if self.input.is_empty()
                && self.random.one_in(2)
                && let Some(room) = self.initiator.landing()
            {
                let (landed, rest) = piece.split_at(piece.len().min(room.len()));
                room[..landed.len()].copy_from_slice(landed);
                self.initiator.handle_landed(landed.len())?;
                piece = rest;
            }
            let (next, rest) = piece.split_at(piece.len().min(1 + self.random.below(4096) as usize));
            self.input.extend(next);
            piece = rest;
            loop {
                let step = self.initiator.handle_input(self.now, &self.input, out)?;
                self.input.drain(..step.consumed);
                match step.event {
                    Some(Event::Done { tag, answer }) => self.judge(tag, answer),
                    Some(Event::Ready) => {}
                    Some(Event::Ended) => return Err(Violation::Ended),
                    None => break,
                }
            }
        }
        Ok(())
    }

    fn ask_more(&mut self, out: &mut Vec<u8>) {
        while self.initiator.room() > 0 {
            let Some(tag) = self.todo.pop_front() else { return };
            match self.owed[&tag] {
                Ask::Read(offset, length) => {
                    // What was in the buffer before must not show through.
                    let buffer = vec![0xee; length as usize];
                    assert!(self.initiator.read(tag, offset, buffer, self.now, out).is_ok());
                }
                Ask::Status(offset) => self.initiator.status(tag, offset, self.now, out).unwrap(),
                Ask::Digests(offset, length) => self.initiator.digests(tag, offset, length, self.now, out).unwrap(),
            }
        }
        assert!(self.initiator.outstanding() <= 4096);
    }

    /// The oracle: the bytes of the medium, and once.
    fn judge(&mut self, tag: u64, answer: Result<Answer<Vec<u8>>, crate::initiator::Failure>) {
        assert!(self.answered.insert(tag), "tag {tag} is answered twice");
        let ask = self.owed.remove(&tag).expect("only what was asked is answered");
        match (ask, answer.expect("nothing fails for good here")) {
            (Ask::Read(offset, length), Answer::Data(bytes)) => {
                assert!(bytes == self.medium[offset as usize..][..length as usize], "tag {tag}");
            }
            (Ask::Status(offset), Answer::Extents(extents)) => {
                let expected: Vec<(u64, bool)> = extents_of(offset, self.medium.len() as u64).collect();
                assert_eq!(extents[0].offset, offset);
                let found: Vec<(u64, bool)> = extents.iter().map(|extent| (extent.length, !extent.hole)).collect();
                assert_eq!(found, expected);
            }
            (Ask::Digests(offset, length), Answer::Digests(digests)) => {
                let range = &self.medium[offset as usize..][..length as usize];
                assert_eq!(digests, range.chunks(4096).map(crc32c::crc32c).collect::<Vec<u32>>());
            }
            (ask, answer) => panic!("{ask:?} is answered with {answer:?}"),
        }
    }

    /// The disk as the initiator found it.
    pub(super) fn device(&self) -> &Device {
        self.initiator.device().expect("a session")
    }

    /// The target is started anew, and knows of no session.
    pub(super) fn restart(&mut self, target: Target) {
        self.lose();
        self.wires.clear();
        self.target = target;
    }

    /// Other things go wrong from now on.
    pub(super) fn set_faults(&mut self, faults: Faults) {
        (self.faults, self.faults_so_far) = (faults, 0);
    }

    /// A number of the world's own generator.
    pub(super) fn below(&mut self, end: u64) -> u64 {
        self.random.below(end)
    }
}

/// 64 KiB mapped, 64 KiB not.
fn extents_of(offset: u64, end: u64) -> impl Iterator<Item = (u64, bool)> {
    const RUN: u64 = 65_536;
    let first = offset / RUN * RUN;
    (first..end).step_by(RUN as usize).map(move |start| {
        let stop = (start + RUN).min(end);
        (stop - start.max(offset), (start / RUN).is_multiple_of(2))
    })
}
