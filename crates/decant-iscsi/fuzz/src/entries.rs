//! What is fuzzed: anything that an initiator, a target or a disk may say. Each takes any bytes and must come back, having
//! kept its promises. The ordinary tests run these too, with bytes from a seed (`tests/fuzz.rs`).

use decant_iscsi::Step;
use decant_iscsi::chap::RANDOM_BYTES;
use decant_iscsi::initiator::{self, Initiator};
use decant_iscsi::login::{Negotiation, Offer};
use decant_iscsi::pdu::{self, Decoder, Digests, Header, Unit};
use decant_iscsi::scsi::{self, Context, Disk, ModeState, Parameter, Plan};
use decant_iscsi::serial::Serial;
use decant_iscsi::target::{self, Access, Connection, Event, Limits, Outbox, Outcome, Request, Target};
use decant_iscsi::text::{self, Pairs, TextOut};

const TARGET: &str = "iqn.2026-11.dev.decant:fuzz";
const INITIATOR: &str = "iqn.2026-11.dev.decant:fuzzer";
const BLOCKS: u64 = 2048;

/// An entry.
pub type Entry = fn(&[u8]);

/// All of them, by name.
pub const ENTRIES: &[(&str, Entry)] = &[
    ("pdus", pdus),
    ("login_text", login_text),
    ("cdbs", cdbs),
    ("to_target", to_target),
    ("to_initiator", to_initiator),
    ("about_disks", about_disks),
];

fn disk() -> Disk {
    Disk {
        vendor: "DECANT".into(),
        product: "FUZZ".into(),
        revision: "1".into(),
        serial: "fuzz".into(),
        block_bytes: 512,
        physical_exponent: 3,
        blocks: BLOCKS,
        read_only: false,
        thin: true,
        max_transfer: 64 * 1024,
        digests: true,
    }
}

fn fresh_target() -> Target {
    let config = target::Config {
        name: TARGET.into(),
        addresses: Vec::new(),
        portal_group: 1,
        access: vec![Access { initiator: None, chap: None }],
        offer: Offer::default(),
        limits: Limits { queue_depth: 8, ..Limits::default() },
    };
    Target::new(config, disk())
}

fn fresh_initiator() -> Initiator<Vec<u8>> {
    Initiator::new(initiator::Config {
        initiator: INITIATOR.into(),
        target: TARGET.into(),
        lun: 0,
        isid: [0x80, 0, 0, 0, 0, 0],
        chap: None,
        offer: Offer::default(),
        max_outstanding: 8,
        first_cmd_sn: Serial(1),
        ping_after_ms: 1000,
        command_timeout_ms: 120_000,
        ping_timeout_ms: 1000,
    })
}

/// The stream of PDUs: headers that are understood are written as they were read, and data is never longer than allowed.
pub fn pdus(data: &[u8]) {
    let Some((flags, mut rest)) = data.split_first() else { return };
    let mut decoder = Decoder::new(4096, 64);
    decoder.set_negotiated(Digests { header: flags & 1 != 0, data: flags & 2 != 0 }, 4096);
    let mut left = 0;
    while let Ok(Step { consumed, event: Some(unit) }) = decoder.handle_input(rest) {
        match unit {
            Unit::Header { bhs, data_length, .. } => {
                assert!(data_length <= 4096);
                left = data_length as usize;
                if let Ok(header) = Header::decode(bhs) {
                    let again = Header::decode(&header.encode(data_length)).expect("it was understood");
                    assert_eq!(again, header);
                }
            }
            Unit::Data(bytes) => left = left.checked_sub(bytes.len()).expect("no more than announced"),
            Unit::End { .. } => assert_eq!(left, 0),
        }
        rest = &rest[consumed..];
    }
}

/// Login text, as offers and as answers.
pub fn login_text(data: &[u8]) {
    let Ok(pairs) = Pairs::parse(data) else { return };
    for (_, value) in pairs.iter() {
        let _ = text::number(value);
        assert!(text::binary(value, 100).is_none_or(|bytes| bytes.len() <= 100));
    }
    let mut answers = Negotiation::new(Offer::default(), false);
    let mut out = TextOut::default();
    if answers.handle(&pairs, &mut out).is_ok()
        && let Ok(params) = answers.finish()
    {
        assert!(params.first_burst <= params.max_burst && params.max_send >= 512 && params.max_burst >= 512);
    }
    let mut offers = Negotiation::new(Offer::default(), false);
    offers.offer(&mut TextOut::default());
    let _ = offers.handle(&pairs, &mut out).and_then(|()| offers.finish());
}

/// Commands and their parameter lists: nothing reaches past the disk.
pub fn cdbs(data: &[u8]) {
    let Some((cdb, list)) = data.split_first_chunk::<16>() else { return };
    let (disk, mode) = (disk(), ModeState::default());
    let context = Context { disk: &disk, mode: &mode, is_lun_0: true, target_name: TARGET, portal_group: 1 };
    let mut reply = Vec::new();
    let within = |offset: u64, length: u64| assert!(offset + length <= disk.bytes());
    match scsi::plan(&context, cdb, &mut reply) {
        Ok(
            Plan::Read { offset, length, .. }
            | Plan::Write { offset, length, .. }
            | Plan::Verify { offset, length, .. },
        ) => {
            within(offset, length.into());
            assert!(length <= disk.max_transfer);
        }
        Ok(Plan::Digests { offset, length }) => within(offset, length.into()),
        Ok(Plan::Same { offset, length, .. }) => within(offset, length),
        Ok(Plan::LbaStatus { offset, .. }) => within(offset, 512),
        _ => {}
    }
    assert!(reply.len() <= 4096);
    for (offset, length) in scsi::unmap_ranges(&disk, list).unwrap_or_default() {
        within(offset, length);
    }
    for kind in [Parameter::ModeSelect6, Parameter::ModeSelect10] {
        let _ = scsi::mode_select(&disk, mode, cdb, kind, list);
    }
}

/// A target's end with a medium that has everything at once.
struct Served {
    target: Target,
    connection: Connection,
    out: Outbox<Vec<u8>>,
}

impl Served {
    fn new() -> Self {
        let mut target = fresh_target();
        let connection = Connection::new(&mut target, [7; RANDOM_BYTES]);
        Self { target, connection, out: Outbox::default() }
    }

    /// Takes bytes; what is answered, or `None` when the connection is over.
    fn take(&mut self, bytes: &[u8]) -> Option<Vec<u8>> {
        let mut rest = bytes;
        loop {
            let step = self.connection.handle_input(&mut self.target, rest, &mut self.out).ok()?;
            rest = &rest[step.consumed..];
            let Some(event) = step.event else { break };
            self.act(event);
            while let Some(event) = self.connection.poll_event() {
                self.act(event);
            }
        }
        let mut answer = Vec::new();
        while !self.out.is_empty() {
            let mut slices = [std::io::IoSlice::new(&[]); 16];
            let count = self.out.slices(&mut slices);
            let before = answer.len();
            slices[..count].iter().for_each(|slice| answer.extend_from_slice(slice));
            self.out.advance(answer.len() - before);
        }
        Some(answer)
    }

    fn act(&mut self, event: Event) {
        let Event::Request { task, request } = event else { return };
        let disk = self.target.disk().bytes();
        let within = |offset: u64, length: u64| assert!(offset + length <= disk);
        let outcome = match request {
            Request::Read { offset, length, .. } => {
                within(offset, length.into());
                Outcome::Data(vec![0; length as usize])
            }
            Request::Write { offset, length, .. } | Request::Verify { offset, length, .. } => {
                within(offset, length.into());
                Outcome::Done
            }
            Request::Fill { offset, length }
            | Request::Zero { offset, length, .. }
            | Request::Unmap { offset, length } => {
                within(offset, length);
                Outcome::Done
            }
            Request::Digests { offset, length } => {
                within(offset, length.into());
                let digests = vec![0; length.div_ceil(4096) as usize];
                self.connection.complete(&mut self.target, task, Outcome::Digests(&digests), &mut self.out);
                return;
            }
            Request::Status { offset, .. } => {
                within(offset, 512);
                let extents = [(disk - offset, true)];
                self.connection.complete(&mut self.target, task, Outcome::Extents(&extents), &mut self.out);
                return;
            }
            Request::Flush => Outcome::Done,
        };
        self.connection.complete(&mut self.target, task, outcome, &mut self.out);
    }
}

/// A login as initiators send it, without digests.
fn login() -> Vec<u8> {
    let mut bytes = Vec::new();
    let request = pdu::LoginRequest {
        immediate: true,
        transit: true,
        stage: 1,
        next_stage: 3,
        cmd_sn: Serial(1),
        ..Default::default()
    };
    let text = format!("InitiatorName={INITIATOR}\0TargetName={TARGET}\0InitialR2T=No\0");
    pdu::put(&mut bytes, &request.into(), text.as_bytes(), Digests::default());
    bytes
}

/// Whatever an initiator says, at the start of a connection or once it is logged in.
pub fn to_target(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else { return };
    let mut served = Served::new();
    if flags & 1 != 0 {
        assert!(served.take(&login()).is_some() && served.connection.is_logged_in());
    }
    for piece in data.chunks(usize::from(*flags).max(1)) {
        if served.take(piece).is_none() {
            break;
        }
    }
    served.connection.handle_disconnect(&mut served.target);
}

/// An initiator that reads, and whatever its target says: at the start, or once the disk was found.
pub fn to_initiator(data: &[u8]) {
    let Some((flags, data)) = data.split_first() else { return };
    let (mut reader, mut out) = (fresh_initiator(), Vec::new());
    reader.handle_connect(0, [9; RANDOM_BYTES], &mut out);
    if flags & 1 != 0 {
        let mut served = Served::new();
        while !reader.is_ready() {
            let answer = served.take(&std::mem::take(&mut out)).expect("both are ours");
            assert!(!answer.is_empty());
            hear(&mut reader, &answer, &mut out).expect("both are ours");
        }
        out.clear();
    }
    for tag in 0..4 {
        let _ = reader.read(tag, tag * 4096, vec![0; 1024], 0, &mut out);
    }
    let _ = reader.status(4, 0, 0, &mut out);
    for piece in data.chunks(usize::from(*flags).max(1)) {
        if hear(&mut reader, piece, &mut out).is_none() {
            break;
        }
        assert!(reader.outstanding() <= 8);
    }
    reader.handle_disconnect();
    while reader.poll_lost().is_some() {}
}

fn hear(reader: &mut Initiator<Vec<u8>>, bytes: &[u8], out: &mut Vec<u8>) -> Option<()> {
    let mut rest = bytes;
    loop {
        let step = reader.handle_input(0, rest, out).ok()?;
        rest = &rest[step.consumed..];
        match step.event {
            Some(initiator::Event::Done { answer: Ok(initiator::Answer::Data(buffer)), .. }) => {
                assert_eq!(buffer.len(), 1024, "a buffer comes back as it was given");
            }
            Some(_) => {}
            None => return Some(()),
        }
    }
}

/// Whatever a disk says about itself: each command is answered with the next bytes, well framed.
pub fn about_disks(data: &[u8]) {
    let (mut reader, mut out) = (fresh_initiator(), Vec::new());
    reader.handle_connect(0, [9; RANDOM_BYTES], &mut out);
    let (mut data, mut stat_sn, mut steps) = (data, Serial(0), 0);
    while !out.is_empty() && steps < 64 {
        steps += 1;
        let sent = std::mem::take(&mut out);
        let Some(bhs) = sent.first_chunk::<{ pdu::BHS_BYTES }>() else { return };
        stat_sn = stat_sn.next();
        let (header, body): (Header, &[u8]) = match Header::decode(bhs) {
            Ok(Header::LoginRequest(login)) => {
                let response = pdu::LoginResponse {
                    transit: true,
                    stage: login.stage,
                    next_stage: login.next_stage,
                    tsih: 1,
                    stat_sn,
                    exp_cmd_sn: Serial(1),
                    max_cmd_sn: Serial(100),
                    ..Default::default()
                };
                (response.into(), &[])
            }
            Ok(Header::ScsiCommand(command)) => {
                let Some((flags, rest)) = data.split_first() else { return };
                let (body, rest) = rest.split_at(rest.len().min(usize::from(*flags >> 1)));
                data = rest;
                let body = &body[..body.len().min(command.expected_length as usize)];
                let data_in = pdu::DataIn {
                    is_final: true,
                    has_status: true,
                    task: command.task,
                    stat_sn,
                    exp_cmd_sn: command.cmd_sn.next(),
                    max_cmd_sn: command.cmd_sn.plus(100),
                    ..Default::default()
                };
                if flags & 1 != 0 {
                    // A status, with the same bytes as sense data.
                    let pdu::DataIn { task, stat_sn, exp_cmd_sn, max_cmd_sn, .. } = data_in;
                    let status = if body.first().is_some_and(|byte| byte & 1 != 0) { 8 } else { 2 };
                    let is_final = true;
                    let response = pdu::ScsiResponse {
                        is_final,
                        status,
                        task,
                        stat_sn,
                        exp_cmd_sn,
                        max_cmd_sn,
                        ..Default::default()
                    };
                    (response.into(), body)
                } else {
                    (data_in.into(), body)
                }
            }
            _ => return,
        };
        let mut bytes = Vec::new();
        pdu::put(&mut bytes, &header, body, Digests::default());
        if hear(&mut reader, &bytes, &mut out).is_none() {
            return;
        }
        if let Some(device) = reader.device() {
            assert!(device.blocks > 0 && matches!(device.block_bytes, 512 | 4096) && device.bytes() < 1 << 63);
            assert!(device.max_transfer.is_multiple_of(device.block_bytes));
            let block = device.block_bytes as usize;
            let _ = reader.status(2, 0, 0, &mut out);
            let _ = reader.read(1, 0, vec![0; block], 0, &mut Vec::new());
        }
    }
}
