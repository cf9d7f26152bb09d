//! A target, its connections and a disk in memory, with a hand that plays initiators.

use std::collections::BTreeMap;

use crate::chap::RANDOM_BYTES;
use crate::error::Violation;
use crate::login::Offer;
use crate::pdu::*;
use crate::scsi::Disk;
use crate::serial::Serial;
use crate::target::*;

pub(super) const NAME: &str = "iqn.2026-11.dev.decant:test";
pub(super) const INITIATOR: &str = "iqn.2026-11.dev.decant:initiator";
pub(super) const BLOCKS: u64 = 2048;

pub(super) fn disk() -> Disk {
    Disk {
        vendor: "DECANT".into(),
        product: "TEST".into(),
        revision: "1".into(),
        serial: "1234".into(),
        block_bytes: 512,
        physical_exponent: 3,
        blocks: BLOCKS,
        read_only: false,
        thin: true,
        max_transfer: 256 * 1024,
        digests: false,
    }
}

pub(super) fn config() -> Config {
    Config {
        name: NAME.into(),
        addresses: vec!["192.0.2.1:3260".into()],
        portal_group: 1,
        access: vec![Access { initiator: None, chap: None }],
        offer: Offer::default(),
        limits: Limits { queue_depth: 8, sessions: 3, ..Limits::default() },
    }
}

/// One initiator's end.
pub(super) struct End {
    pub(super) connection: Connection,
    pub(super) out: Outbox<Vec<u8>>,
    pub(super) buffers: BTreeMap<TaskId, Vec<u8>>,
    /// Requests that nobody has performed yet.
    pub(super) requests: Vec<(TaskId, Request)>,
    pub(super) events: Vec<Event>,
    pub(super) cmd_sn: Serial,
    pub(super) digests: Digests,
    decoder: Decoder,
    pub(super) sent: Vec<u8>,
}

pub(super) type Answers = Vec<(Header, Vec<u8>)>;

pub(super) struct World {
    pub(super) target: Target,
    pub(super) medium: Vec<u8>,
}

impl World {
    pub(super) fn new(config: Config) -> Self {
        Self::of(config, disk())
    }

    pub(super) fn of(config: Config, disk: Disk) -> Self {
        Self { target: Target::new(config, disk), medium: vec![0; (BLOCKS * 512) as usize] }
    }

    pub(super) fn connect(&mut self, random: u8) -> End {
        End {
            connection: Connection::new(&mut self.target, [random; RANDOM_BYTES]),
            out: Outbox::default(),
            buffers: BTreeMap::new(),
            requests: Vec::new(),
            events: Vec::new(),
            cmd_sn: Serial(1),
            digests: Digests::default(),
            decoder: Decoder::new(MAX_DATA_SEGMENT, 0),
            sent: Vec::new(),
        }
    }

    /// A connection that is logged in without more ado, its power-on told.
    pub(super) fn session(&mut self, isid: u8) -> End {
        let mut end = self.connect(isid);
        let text = format!("InitiatorName={INITIATOR}\0TargetName={NAME}\0InitialR2T=No\0ImmediateData=Yes\0");
        let answers = end.login(self, isid, 1, 3, &text).unwrap();
        assert!(matches!(answers.last(), Some((Header::LoginResponse(r), _)) if r.status_class == 0 && r.transit));
        let answers = end.command(self, &[0], 0, &[]);
        assert!(matches!(answers.last(), Some((Header::ScsiResponse(r), _)) if r.status == 2));
        end
    }

    /// Calls on connections that were woken.
    pub(super) fn wake(&mut self, ends: &mut [&mut End]) {
        while let Some(id) = self.target.poll_wakeup() {
            for end in ends.iter_mut().filter(|end| end.connection.id() == id) {
                end.connection.handle_wakeup(&mut self.target, &mut end.out);
                end.poll(&[]);
            }
        }
    }
}

impl End {
    fn act(&mut self, event: Event, input: &[u8]) {
        match event {
            Event::Data { task, offset, total, range } => {
                let buffer = self.buffers.entry(task).or_default();
                if offset == 0 {
                    *buffer = vec![0; total as usize];
                }
                let from = &input[range];
                buffer[offset as usize..offset as usize + from.len()].copy_from_slice(from);
            }
            Event::Request { task, request } => self.requests.push((task, request)),
            other => self.events.push(other),
        }
    }

    pub(super) fn poll(&mut self, input: &[u8]) {
        while let Some(event) = self.connection.poll_event() {
            self.act(event, input);
        }
    }

    /// Sends bytes; gives what comes back without performing anything.
    pub(super) fn send_bytes(&mut self, world: &mut World, bytes: &[u8]) -> Result<Answers, Violation> {
        let mut rest = bytes;
        loop {
            let step = self.connection.handle_input(&mut world.target, rest, &mut self.out)?;
            let input = rest;
            rest = &rest[step.consumed..];
            match step.event {
                Some(event) => self.act(event, input),
                None => break,
            }
        }
        Ok(self.answers())
    }

    pub(super) fn send(
        &mut self,
        world: &mut World,
        header: impl Into<Header>,
        data: &[u8],
    ) -> Result<Answers, Violation> {
        let mut bytes = Vec::new();
        put(&mut bytes, &header.into(), data, self.digests);
        self.sent.extend_from_slice(&bytes);
        self.send_bytes(world, &bytes)
    }

    /// What is in the outbox, taken in odd pieces.
    pub(super) fn answers(&mut self) -> Answers {
        let mut bytes = Vec::new();
        while !self.out.is_empty() {
            let mut slices = [std::io::IoSlice::new(&[]); 3];
            let count = self.out.slices(&mut slices);
            let piece: Vec<u8> = slices[..count].iter().flat_map(|slice| slice.to_vec()).take(1000).collect();
            self.out.advance(piece.len());
            bytes.extend(piece);
        }
        let mut answers = Answers::new();
        let mut rest = &bytes[..];
        while let Ok(Step { consumed, event: Some(unit) }) = self.decoder.handle_input(rest) {
            match unit {
                Unit::Header { bhs, .. } => answers.push((Header::decode(bhs).unwrap(), Vec::new())),
                Unit::Data(data) => answers.last_mut().unwrap().1.extend_from_slice(data),
                Unit::End { intact } => assert!(intact),
            }
            rest = &rest[consumed..];
        }
        assert!(rest.is_empty(), "whole PDUs only");
        answers
    }

    pub(super) fn login(
        &mut self,
        world: &mut World,
        isid: u8,
        stage: u8,
        next_stage: u8,
        text: &str,
    ) -> Result<Answers, Violation> {
        let transit = next_stage > stage;
        let request = LoginRequest {
            immediate: true,
            transit,
            stage,
            next_stage: if transit { next_stage } else { 0 },
            isid: [0x80, 0, 0, 0, 0, isid],
            cmd_sn: self.cmd_sn,
            ..LoginRequest::default()
        };
        self.send(world, request, text.as_bytes())
    }

    pub(super) fn set_digests(&mut self) {
        self.decoder.set_negotiated(self.digests, MAX_DATA_SEGMENT);
    }

    /// A command's PDU; reads announce `expected` bytes, writes what they have.
    pub(super) fn request(&mut self, cdb: &[u8], expected: u32, data: &[u8]) -> ScsiCommand {
        let mut padded = [0; 16];
        padded[..cdb.len()].copy_from_slice(cdb);
        let cmd_sn = self.cmd_sn;
        self.cmd_sn = cmd_sn.next();
        ScsiCommand {
            is_final: true,
            read: data.is_empty() && expected > 0,
            write: !data.is_empty(),
            attribute: TaskAttribute::Simple,
            task: cmd_sn.0,
            expected_length: if data.is_empty() { expected } else { data.len() as u32 },
            cmd_sn,
            cdb: padded,
            ..ScsiCommand::default()
        }
    }

    /// A command, with its data as the R2Ts ask for them, and everything performed.
    pub(super) fn command(&mut self, world: &mut World, cdb: &[u8], expected: u32, data: &[u8]) -> Answers {
        let request = self.request(cdb, expected, data);
        let mut answers = self.send(world, request, &[]).unwrap();
        while let Some((Header::ReadyToTransfer(r2t), _)) = answers.last().cloned() {
            let part = &data[r2t.offset as usize..][..r2t.length as usize];
            let out = DataOut {
                is_final: true,
                task: request.task,
                transfer: r2t.transfer,
                offset: r2t.offset,
                ..DataOut::default()
            };
            answers = self.send(world, out, part).unwrap();
        }
        self.perform_all(world);
        answers.extend(self.answers());
        answers
    }

    /// Performs one of the waiting requests.
    pub(super) fn perform(&mut self, world: &mut World, index: usize) {
        let (task, request) = self.requests.remove(index);
        let medium = &mut world.medium;
        let (mut extents, mut digests) = (Vec::new(), Vec::new());
        let outcome = match request {
            Request::Read { offset, length, .. } => {
                Outcome::Data(medium[offset as usize..][..length as usize].to_vec())
            }
            Request::Write { offset, length, .. } => {
                medium[offset as usize..][..length as usize].copy_from_slice(&self.buffers[&task][..length as usize]);
                Outcome::Done
            }
            Request::Verify { offset, length, compare } => {
                let found = &medium[offset as usize..][..length as usize];
                let differs = |(at, byte): (usize, &u8)| match compare {
                    crate::scsi::Compare::Nothing => None,
                    crate::scsi::Compare::All => (self.buffers[&task][at] != *byte).then_some(at),
                    crate::scsi::Compare::OneBlock => (self.buffers[&task][at % 512] != *byte).then_some(at),
                };
                found.iter().enumerate().find_map(differs).map_or(Outcome::Done, |at| Outcome::Mismatch(at as u64))
            }
            Request::Fill { offset, length } => {
                let pattern = self.connection.pattern(task).to_vec();
                let range = &mut medium[offset as usize..][..length as usize];
                range.iter_mut().zip(pattern.iter().cycle()).for_each(|(to, from)| *to = *from);
                Outcome::Done
            }
            Request::Zero { offset, length, .. } | Request::Unmap { offset, length } => {
                medium[offset as usize..][..length as usize].fill(0);
                Outcome::Done
            }
            Request::Flush => Outcome::Done,
            Request::Digests { offset, length } => {
                let range = &medium[offset as usize..][..length as usize];
                digests.extend(range.chunks(4096).map(crc32c::crc32c));
                Outcome::Digests(&digests)
            }
            Request::Status { offset, .. } => {
                extents.push((medium.len() as u64 - offset, true));
                Outcome::Extents(&extents)
            }
        };
        self.connection.complete(&mut world.target, task, outcome, &mut self.out);
        self.poll(&[]);
    }

    pub(super) fn perform_all(&mut self, world: &mut World) {
        while !self.requests.is_empty() {
            self.perform(world, 0);
        }
    }
}

/// Status, sense key, ASC and ASCQ of the last answer.
pub(super) fn status(answers: &Answers) -> (u8, u8, u16) {
    match answers.last() {
        Some((Header::ScsiResponse(response), sense)) if sense.len() >= 16 => {
            (response.status, sense[4] & 0x0f, u16::from_be_bytes([sense[14], sense[15]]))
        }
        Some((Header::ScsiResponse(response), _)) => (response.status, 0, 0),
        Some((Header::DataIn(data), _)) if data.has_status => (data.status, 0, 0),
        other => panic!("no status: {other:?}"),
    }
}
