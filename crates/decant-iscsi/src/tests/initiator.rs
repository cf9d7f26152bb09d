//! Targets that are slow, odd, wrong, or mean harm, and an initiator that tells these apart.

use crate::chap::{Chap, Credentials, RANDOM_BYTES, Secret};
use crate::error::Violation;
use crate::initiator::{Answer, Config, Event, Failure, Initiator};
use crate::login::{DigestPolicy, Offer};
use crate::pdu::*;
use crate::serial::Serial;

const BLOCKS: u64 = 2048;

fn config() -> Config {
    let policy = DigestPolicy::Preferred;
    Config {
        initiator: "iqn.2026-11.dev.decant:reader".into(),
        target: "iqn.2026-11.dev.decant:script".into(),
        lun: 0,
        isid: [0x80, 0, 0, 0, 0, 1],
        chap: None,
        offer: Offer { header_digest: policy, data_digest: policy, ..Offer::default() },
        max_outstanding: 4,
        first_cmd_sn: Serial(u32::MAX),
        ping_after_ms: 1000,
        ping_timeout_ms: 1000,
        command_timeout_ms: 60_000,
    }
}

/// A target that says what a test has it say.
struct Script {
    initiator: Initiator<Vec<u8>>,
    decoder: Decoder,
    /// PDUs that the initiator sent and nobody has looked at.
    heard: Vec<(Header, Vec<u8>)>,
    events: Vec<Event<Vec<u8>>>,
    stat_sn: Serial,
    exp_cmd_sn: Serial,
    /// Commands beyond the one that is expected next.
    window: u32,
    now: u64,
    /// Every byte of the target's since it was connected.
    said: Vec<u8>,
}

type Said = Result<(), Violation>;

impl Script {
    fn new(config: Config) -> Self {
        let mut script = Self {
            initiator: Initiator::new(config),
            decoder: Decoder::new(MAX_DATA_SEGMENT, 0),
            heard: Vec::new(),
            events: Vec::new(),
            stat_sn: Serial(u32::MAX - 2),
            exp_cmd_sn: Serial(0),
            window: 8,
            now: 0,
            said: Vec::new(),
        };
        script.connect();
        script
    }

    fn connect(&mut self) {
        let mut out = Vec::new();
        self.said.clear();
        self.initiator.handle_connect(self.now, [7; RANDOM_BYTES], &mut out);
        self.hear(&out);
    }

    /// A session, its disk found.
    fn session() -> Self {
        let mut script = Self::new(config());
        script.log_in().unwrap();
        script.find_disk().unwrap();
        assert!(script.initiator.is_ready() && script.events.pop() == Some(Event::Ready));
        script
    }

    fn hear(&mut self, mut bytes: &[u8]) {
        while let Ok(crate::Step { consumed, event: Some(unit) }) = self.decoder.handle_input(bytes) {
            match unit {
                Unit::Header { bhs, .. } => self.heard.push((Header::decode(bhs).unwrap(), Vec::new())),
                Unit::Data(data) => self.heard.last_mut().unwrap().1.extend_from_slice(data),
                Unit::End { intact } => assert!(intact),
            }
            bytes = &bytes[consumed..];
        }
        assert!(bytes.is_empty());
    }

    fn say_bytes(&mut self, bytes: &[u8]) -> Said {
        self.said.extend_from_slice(bytes);
        let (mut out, mut rest) = (Vec::new(), bytes);
        loop {
            let step = self.initiator.handle_input(self.now, rest, &mut out)?;
            rest = &rest[step.consumed..];
            match step.event {
                Some(event) => self.events.push(event),
                None => break,
            }
        }
        self.hear(&out);
        Ok(())
    }

    fn say(&mut self, header: impl Into<Header>, data: &[u8]) -> Said {
        let mut bytes = Vec::new();
        put(&mut bytes, &header.into(), data, Digests::default());
        self.say_bytes(&bytes)
    }

    fn next_stat_sn(&mut self) -> Serial {
        self.stat_sn = self.stat_sn.next();
        self.stat_sn
    }

    fn max_cmd_sn(&self) -> Serial {
        self.exp_cmd_sn.plus(self.window).minus(1)
    }

    fn answer_login(&mut self, stage: u8, next: Option<u8>, text: &str) -> Said {
        let (Header::LoginRequest(request), _) = self.heard.remove(0) else { panic!("no login") };
        self.exp_cmd_sn = request.cmd_sn;
        let response = LoginResponse {
            transit: next.is_some(),
            stage,
            next_stage: next.unwrap_or(0),
            isid: request.isid,
            tsih: u16::from(next == Some(3)),
            task: request.task,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn(),
            ..LoginResponse::default()
        };
        self.say(response, text.as_bytes())
    }

    fn log_in(&mut self) -> Said {
        self.answer_login(0, Some(1), "AuthMethod=None\0TargetPortalGroupTag=1\0")?;
        self.answer_login(1, Some(3), "MaxRecvDataSegmentLength=8192\0HeaderDigest=None\0DataDigest=None\0")
    }

    /// The next command that was sent.
    fn command(&mut self) -> ScsiCommand {
        let (Header::ScsiCommand(command), _) = self.heard.remove(0) else { panic!("no command: {:?}", self.heard) };
        assert_eq!(command.cmd_sn, self.exp_cmd_sn, "in order, without a gap");
        self.exp_cmd_sn = command.cmd_sn.next();
        command
    }

    /// Answers with data and GOOD in one PDU.
    fn good(&mut self, command: &ScsiCommand, data: &[u8]) -> Said {
        if data.is_empty() {
            return self.status(command.task, 0, &[]);
        }
        let header = self.data_in(command, 0, 0, true);
        self.say(header, data)
    }

    fn data_in(&mut self, command: &ScsiCommand, data_sn: u32, offset: u32, last: bool) -> DataIn {
        DataIn {
            is_final: last,
            has_status: last,
            task: command.task,
            transfer: NO_TAG,
            stat_sn: if last { self.next_stat_sn() } else { Serial(0) },
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn(),
            data_sn: Serial(data_sn),
            offset,
            ..DataIn::default()
        }
    }

    fn status(&mut self, task: u32, status: u8, data: &[u8]) -> Said {
        let response = ScsiResponse {
            is_final: true,
            status,
            task,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn(),
            ..ScsiResponse::default()
        };
        self.say(response, data)
    }

    fn check(&mut self, task: u32, key: u8, asc: u16) -> Said {
        let [code, qualifier] = asc.to_be_bytes();
        let sense = [0, 18, 0x70, 0, key, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0];
        self.status(task, 2, &sense)
    }

    /// Answers one question about the disk.
    fn describe(&mut self, command: &ScsiCommand) -> Said {
        let mut inquiry = [b' '; 36];
        inquiry[..8].copy_from_slice(&[0, 0, 6, 0x12, 31, 0, 0, 2]);
        inquiry[8..14].copy_from_slice(b"SCRIPT");
        let mut capacity = [0; 32];
        capacity[..8].copy_from_slice(&(BLOCKS - 1).to_be_bytes());
        capacity[10] = 2;
        capacity[14] = 0xc0;
        match (command.cdb[0], command.cdb[1], command.cdb[2]) {
            (0x00, ..) => self.status(command.task, 0, &[]),
            (0x12, 0, _) => self.good(command, &inquiry),
            (0x12, 1, 0x00) => self.good(command, &[0, 0, 0, 3, 0x00, 0x80, 0xb0]),
            (0x12, 1, 0x80) => self.good(command, &[0, 0x80, 0, 4, b's', b'n', b'-', b'1']),
            (0x12, 1, 0xb0) => self.good(command, &[0, 0xb0, 0, 8, 0, 0, 0, 8, 0, 0, 0, 128]),
            (0x9e, 0x10, _) => self.good(command, &capacity),
            other => panic!("not expected: {other:x?}"),
        }
    }

    fn find_disk(&mut self) -> Said {
        while !self.initiator.is_ready() {
            let command = self.command();
            self.describe(&command)?;
        }
        Ok(())
    }

    /// Asks to read; the command, if it went out.
    fn read(&mut self, tag: u64, offset: u64, length: usize) {
        let mut out = Vec::new();
        self.initiator.read(tag, offset, vec![0; length], self.now, &mut out).unwrap();
        self.hear(&out);
    }

    fn tick(&mut self, now: u64) -> Said {
        self.now = now;
        let mut out = Vec::new();
        let result = self.initiator.handle_tick(now, &mut out);
        self.hear(&out);
        result
    }

    fn done(&mut self) -> (u64, Result<Answer<Vec<u8>>, Failure>) {
        match self.events.remove(0) {
            Event::Done { tag, answer } => (tag, answer),
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_disk_is_asked_what_it_is_and_its_limits_hold() {
    let script = Script::session();
    let device = script.initiator.device().unwrap();
    assert_eq!((device.bytes(), device.max_transfer, device.serial.as_deref()), (1 << 20, 65_536, Some("sn-1")));
    assert!(device.holes && !device.digests, "another vendor is not asked for digests");
}

#[test]
fn reads_come_in_pieces_and_out_of_order_and_only_whole() {
    let mut script = Script::session();
    script.read(1, 0, 8192);
    script.read(2, 8192, 512);
    let (first, second) = (script.command(), script.command());
    assert_eq!((first.cdb[0], first.cdb[13], first.expected_length), (0x88, 16, 8192));
    let header = script.data_in(&first, 0, 0, false);
    script.say(header, &[1; 4096]).unwrap();
    script.good(&second, &[2; 512]).unwrap();
    assert_eq!(script.done(), (2, Ok(Answer::Data(vec![2; 512]))));
    let header = script.data_in(&first, 1, 4096, false);
    script.say(header, &[1; 4096]).unwrap();
    assert!(script.events.is_empty(), "there is no status yet");
    script.status(first.task, 0, &[]).unwrap();
    assert_eq!(script.done(), (1, Ok(Answer::Data(vec![1; 8192]))));
    // GOOD, and not everything: an error, never a buffer that is half full.
    script.read(3, 0, 1024);
    let command = script.command();
    script.good(&command, &[3; 512]).unwrap();
    assert_eq!(script.done(), (3, Err(Failure::Short)));
    // All the bytes, and the target says some are missing.
    script.read(4, 0, 512);
    let command = script.command();
    let header = DataIn { residual: Residual::Underflow(512), ..script.data_in(&command, 0, 0, true) };
    script.say(header, &[3; 512]).unwrap();
    assert_eq!(script.done(), (4, Err(Failure::Short)));
}

#[test]
fn what_may_pass_is_asked_again() {
    let mut script = Script::session();
    script.read(1, 0, 512);
    // A unit attention: at once. BUSY, TASK SET FULL, becoming ready: after a pause.
    let command = script.command();
    script.check(command.task, 6, 0x2a01).unwrap();
    for (status, asc) in [(0x08, None), (0x28, None), (2, Some(0x0401))] {
        let again = script.command();
        assert!(again.task != command.task && again.cdb == command.cdb);
        // Data of the try that failed must not count.
        let header = script.data_in(&again, 0, 0, false);
        script.say(header, &[9; 512]).unwrap();
        match asc {
            Some(asc) => script.check(again.task, 2, asc).unwrap(),
            None => script.status(again.task, status, &[]).unwrap(),
        }
        assert!(script.heard.is_empty(), "not at once");
        let at = script.initiator.poll_timeout().unwrap();
        script.tick(at).unwrap();
    }
    let command = script.command();
    script.good(&command, &[1; 512]).unwrap();
    assert_eq!(script.done(), (1, Ok(Answer::Data(vec![1; 512]))));
}

#[test]
fn what_goes_wrong_again_and_again_is_believed() {
    let mut script = Script::session();
    script.read(1, 0, 512);
    let mut tries = 0;
    while script.events.is_empty() {
        let command = script.command();
        script.check(command.task, 0x0b, 0x4b00).unwrap();
        tries += 1;
        let now = script.now + 1000;
        script.tick(now).unwrap();
        script.heard.retain(|(header, _)| matches!(header, Header::ScsiCommand(_)));
    }
    assert!((5..=10).contains(&tries), "{tries}");
    let failure = Failure::Check { key: 0x0b, asc: 0x4b00, information: None };
    assert_eq!(script.done(), (1, Err(failure)));
    // The medium's word is final, and says where.
    script.read(2, 0, 512);
    let command = script.command();
    let sense = [0, 18, 0xf0, 0, 3, 0, 0, 0, 9, 10, 0, 0, 0, 0, 0x11, 0, 0, 0, 0, 0];
    script.status(command.task, 2, &sense).unwrap();
    let failure = Failure::Check { key: 3, asc: 0x1100, information: Some(9) };
    assert!(failure.is_medium());
    assert_eq!(script.done(), (2, Err(failure)));
}

/// A power on, a reset, commands cleared: one command is told, and the others of the session are never answered.
#[test]
fn a_reset_disk_is_asked_for_everything_again() {
    for asc in [0x2900, 0x2903, 0x2907, 0x2f00] {
        let failure = Failure::Check { key: 6, asc, information: None };
        let mut script = Script::session();
        script.read(1, 0, 512);
        script.read(2, 512, 512);
        script.command();
        let second = script.command();
        assert_eq!(script.check(second.task, 6, asc), Err(Violation::Reset(failure)), "{asc:#x}");
        script.initiator.handle_disconnect();
        let mut lost: Vec<u64> = std::iter::from_fn(|| script.initiator.poll_lost()).map(|(tag, _)| tag).collect();
        lost.sort_unstable();
        assert_eq!(lost, [1, 2]);
        // The same by way of an Asynchronous Message.
        let mut script = Script::session();
        let [code, qualifier] = asc.to_be_bytes();
        let sense = [0, 18, 0x70, 0, 6, 0, 0, 0, 0, 10, 0, 0, 0, 0, code, qualifier, 0, 0, 0, 0];
        let message = AsyncMessage {
            is_final: true,
            task: NO_TAG,
            stat_sn: script.next_stat_sn(),
            event: async_event::SCSI,
            ..AsyncMessage::default()
        };
        assert_eq!(script.say(message, &sense), Err(Violation::Reset(failure)));
    }
}

#[test]
fn a_command_that_others_overtake_is_lost_in_the_end() {
    let mut script = Script::session();
    script.read(1, 0, 512);
    script.command();
    let mut result = Ok(());
    while result.is_ok() && script.now < 200_000 {
        script.read(2, 512, 512);
        let command = script.command();
        script.good(&command, &[2; 512]).unwrap();
        assert_eq!(script.done().0, 2);
        let at = script.initiator.poll_timeout().unwrap().min(script.now + 500);
        result = script.tick(at);
    }
    assert_eq!((result, script.now), (Err(Violation::Lost { seconds: 60 }), 60_000));
    // What waits behind others that come slowly is not lost, and neither is what comes slowly itself.
    let mut script = Script::session();
    script.read(1, 0, 2048);
    script.read(2, 2048, 512);
    script.read(3, 4096, 512);
    let (first, second, third) = (script.command(), script.command(), script.command());
    script.good(&third, &[3; 512]).unwrap();
    for part in 0..4 {
        let now = script.now + 500;
        script.tick(now).unwrap();
        script.now += 50_000;
        let header = script.data_in(&first, part, part * 512, part == 3);
        script.say(header, &[1; 512]).unwrap();
        if part == 0 {
            script.good(&second, &[2; 512]).unwrap();
        }
    }
    let tags: Vec<u64> = (0..3).map(|_| script.done().0).collect();
    assert_eq!(tags, [3, 2, 1]);
    let mut script = Script::session();
    script.read(1, 0, 512);
    script.read(2, 512, 512);
    let first = script.command();
    script.command();
    script.now += 500_000;
    script.good(&first, &[1; 512]).unwrap();
    let now = script.now + 500;
    assert_eq!(script.tick(now), Ok(()), "nothing has overtaken the second");
}

/// A disk that puts everything off is no progress, and what it says comes out in the end.
#[test]
fn a_disk_that_is_never_ready_ends_the_session_with_its_reason() {
    let check = |key, asc| Failure::Check { key, asc, information: None };
    for (status, key, asc, failure) in [
        (0x08, 0, 0, Failure::Status(0x08)),
        (0x28, 0, 0, Failure::Status(0x28)),
        (0x02, 2, 0x0401, check(2, 0x0401)),
        (0x02, 6, 0x2a01, check(6, 0x2a01)),
    ] {
        let mut script = Script::session();
        script.read(1, 0, 512);
        let (began, progress) = (script.now, script.initiator.progress());
        let mut tries = 0;
        let violation = loop {
            let command = script.command();
            tries += 1;
            let said = if status == 2 {
                script.check(command.task, key, asc)
            } else {
                script.status(command.task, status, &[])
            };
            match said {
                Err(violation) => break violation,
                Ok(()) => assert!(tries < 100, "without end"),
            }
            while script.heard.is_empty() {
                let at = script.initiator.poll_timeout().unwrap();
                script.tick(at).unwrap();
            }
            script.heard.retain(|(header, _)| matches!(header, Header::ScsiCommand(_)));
        };
        assert_eq!(violation, Violation::NotReady(failure));
        assert_eq!(script.initiator.progress(), progress, "nothing was answered");
        let took = script.now - began;
        assert!((3000..9000).contains(&took), "{took} ms: sooner than a silent disk is given up");
    }
    let said = Violation::NotReady(Failure::Status(0x08)).to_string();
    assert_eq!(said, "the disk is not ready: status 08h (BUSY)");
}

#[test]
fn patience_with_a_busy_disk_is_not_taken_from_another_failure() {
    let mut script = Script::session();
    script.read(1, 0, 512);
    let again = |script: &mut Script| {
        while script.heard.is_empty() {
            let at = script.initiator.poll_timeout().unwrap();
            script.tick(at).unwrap();
        }
        script.heard.retain(|(header, _)| matches!(header, Header::ScsiCommand(_)));
    };
    for _ in 0..10 {
        let command = script.command();
        script.status(command.task, 0x08, &[]).unwrap();
        again(&mut script);
    }
    for _ in 0..8 {
        let command = script.command();
        script.check(command.task, 0x0b, 0x4b00).unwrap();
        assert!(script.events.is_empty(), "the disk was busy, which was no failure");
        again(&mut script);
    }
    let command = script.command();
    script.good(&command, &[1; 512]).unwrap();
    assert_eq!(script.done(), (1, Ok(Answer::Data(vec![1; 512]))));
}

/// What was left over comes again with every call: it is no sign of life.
#[test]
fn a_target_that_stops_in_the_midst_of_a_header_is_given_up() {
    let mut script = Script::session();
    let half = [0x20u8; 30];
    let mut result = Ok(());
    while result.is_ok() && script.now < 10_000 {
        let mut out = Vec::new();
        let step = script.initiator.handle_input(script.now, &half, &mut out).unwrap();
        assert_eq!((step.consumed, step.event), (0, None));
        result = script.tick(script.now + 100);
    }
    assert_eq!(result, Err(Violation::OutOfPlace("a ping was not answered")));
    assert!(script.now <= 2100, "{}", script.now);
}

#[test]
fn a_disk_that_says_it_has_changed_is_not_read_any_more() {
    for asc in [0x2a09, 0x3f03, 0x3f05, 0x3f0e] {
        let mut script = Script::session();
        script.read(1, 0, 512);
        let command = script.command();
        assert_eq!(script.check(command.task, 6, asc), Err(Violation::Changed), "{asc:#x}");
        script.initiator.handle_disconnect();
        assert_eq!(script.initiator.poll_lost(), Some((1, Some(vec![0; 512]))));
        assert_eq!(script.initiator.poll_lost(), None);
    }
}

#[test]
fn the_window_is_kept_and_never_narrows() {
    let mut script = Script::session();
    // The target has said that it takes eight; then, that it takes none.
    script.window = 0;
    for tag in 0..4 {
        assert_eq!(script.initiator.room(), 4 - tag as u32);
        script.read(tag, 0, 512);
    }
    let commands: Vec<_> = (0..4).map(|_| script.command()).collect();
    for command in &commands {
        script.good(command, &[1; 512]).unwrap();
    }
    // What was granted before: seven, since one was used by the last question about the disk.
    let mut left = 0;
    while script.initiator.room() > 0 {
        script.read(10 + left, 0, 512);
        let command = script.command();
        script.good(&command, &[1; 512]).unwrap();
        left += 1;
    }
    assert_eq!(left, 4, "eight beyond what was expected when it was said");
    let mut out = Vec::new();
    assert!(script.initiator.read(99, 0, vec![0; 512], 0, &mut out).is_err() && out.is_empty());
    // A ping from the target opens it.
    script.window = 2;
    let nop = NopIn {
        is_final: true,
        task: NO_TAG,
        transfer: 5,
        stat_sn: script.stat_sn.next(),
        exp_cmd_sn: script.exp_cmd_sn,
        max_cmd_sn: script.max_cmd_sn(),
        ..NopIn::default()
    };
    script.say(nop, &[]).unwrap();
    let (Header::NopOut(answer), _) = script.heard.remove(0) else { panic!("a ping is answered") };
    assert_eq!((answer.task, answer.transfer, answer.immediate), (NO_TAG, 5, true));
    assert_eq!(script.initiator.room(), 2);
    // A window that ends before it begins says nothing (4.2.2.1).
    let nop = NopIn { transfer: NO_TAG, max_cmd_sn: script.exp_cmd_sn.minus(9), ..nop };
    script.say(nop, &[]).unwrap();
    assert_eq!(script.initiator.room(), 2);
}

/// DataSN, offsets, tags, lengths and StatSN that do not fit end the session; nothing of it is believed.
#[test]
fn answers_that_do_not_fit_end_the_session() {
    type Spoil = fn(&mut DataIn);
    let spoilers: [(&str, Spoil); 6] = [
        ("DataSN", |data| data.data_sn = Serial(1)),
        ("offset", |data| data.offset = 512),
        ("offset that wraps", |data| data.offset = u32::MAX - 511),
        ("tag", |data| data.task ^= 0x10_0000),
        ("tag of no slot", |data| data.task = 0xffff),
        ("StatSN", |data| data.stat_sn = data.stat_sn.next()),
    ];
    for (what, spoil) in spoilers {
        let mut script = Script::session();
        script.read(1, 0, 512);
        let command = script.command();
        let mut header = script.data_in(&command, 0, 0, true);
        spoil(&mut header);
        assert!(script.say(header, &[1; 512]).is_err(), "{what}");
        assert!(script.events.is_empty(), "{what}");
    }
    let mut script = Script::session();
    script.read(1, 0, 512);
    let command = script.command();
    let header = script.data_in(&command, 0, 0, true);
    assert!(script.say(header, &[1; 513]).is_err(), "more than was asked for");
    // Answered twice.
    let mut script = Script::session();
    script.read(1, 0, 512);
    let command = script.command();
    script.good(&command, &[1; 512]).unwrap();
    assert_eq!(script.good(&command, &[2; 512]), Err(Violation::UnknownTask(command.task)));
    // Never asked for.
    let mut script = Script::session();
    assert!(script.status(3, 0, &[]).is_err());
    let r2t = ReadyToTransfer { is_final: true, task: 1, length: 512, ..ReadyToTransfer::default() };
    assert_eq!(Script::session().say(r2t, &[]), Err(Violation::Opcode(opcode::READY_TO_TRANSFER)));
    let reject =
        Reject { is_final: true, reason: 4, task: NO_TAG, stat_sn: script.next_stat_sn(), ..Reject::default() };
    assert_eq!(script.say(reject, &[0x01; 48]), Err(Violation::Rejected(4)));
    // A segment longer than declared, and an additional header, which no answer has.
    let mut bytes = [0u8; 48];
    bytes[0] = opcode::DATA_IN;
    bytes[5] = 0xff;
    assert!(matches!(Script::session().say_bytes(&bytes), Err(Violation::TooLong { .. })));
    (bytes[5], bytes[4]) = (0, 1);
    assert!(matches!(Script::session().say_bytes(&[bytes, bytes].concat()), Err(Violation::TooLong { .. })));
}

#[test]
fn a_target_that_wants_to_end_is_given_a_logout() {
    let mut script = Script::session();
    script.read(1, 0, 512);
    let command = script.command();
    let asks = AsyncMessage {
        is_final: true,
        task: NO_TAG,
        stat_sn: script.next_stat_sn(),
        exp_cmd_sn: script.exp_cmd_sn,
        max_cmd_sn: script.max_cmd_sn(),
        event: async_event::LOGOUT_REQUESTED,
        parameter3: 3,
        ..AsyncMessage::default()
    };
    script.say(asks, &[]).unwrap();
    assert_eq!((script.initiator.room(), script.heard.len()), (0, 0), "nothing new, and the old first");
    script.good(&command, &[1; 512]).unwrap();
    assert_eq!(script.done().0, 1);
    let (Header::LogoutRequest(logout), _) = script.heard.remove(0) else { panic!("no logout") };
    let response = LogoutResponse {
        is_final: true,
        task: logout.task,
        stat_sn: script.next_stat_sn(),
        ..LogoutResponse::default()
    };
    script.say(response, &[]).unwrap();
    assert_eq!(script.events, [Event::Ended]);
    // Not in time, and without asking.
    let mut script = Script::session();
    let asks = AsyncMessage { stat_sn: script.next_stat_sn(), ..asks };
    script.read(1, 0, 512);
    script.say(asks, &[]).unwrap();
    assert_eq!(script.tick(3000), Err(Violation::Dropped));
    let mut script = Script::session();
    let drops = AsyncMessage { event: async_event::SESSION_DROPPED, stat_sn: script.next_stat_sn(), ..asks };
    assert_eq!(script.say(drops, &[]), Err(Violation::Dropped));
}

#[test]
fn logins_that_go_astray_are_refused() {
    let begin = |chap: Option<Chap>| Script::new(Config { chap, ..config() });
    let credentials = |name: &str, text: &str| Credentials { name: name.into(), secret: Secret::new(text).unwrap() };
    let chap = || Some(Chap::new(credentials("me", "my own secret it is"), None).unwrap());
    let mutual = || {
        let target = credentials("you", "your secret it is");
        Some(Chap::new(credentials("me", "my own secret it is"), Some(target)).unwrap())
    };
    let authentication = |result: Said| assert!(matches!(result, Err(Violation::Authentication(_))), "{result:?}");
    // The target leaves authentication out, or goes on before it is done (7.1, 8.2).
    authentication(begin(chap()).answer_login(0, None, "AuthMethod=None\0"));
    authentication(begin(chap()).answer_login(0, Some(1), "AuthMethod=CHAP\0"));
    authentication(begin(None).answer_login(0, None, "AuthMethod=CHAP\0"));
    let mut script = begin(mutual());
    script.answer_login(0, None, "AuthMethod=CHAP\0").unwrap();
    let challenge = format!("CHAP_A=5\0CHAP_I=3\0CHAP_C=0x{}\0", "5a".repeat(16));
    script.answer_login(0, None, &challenge).unwrap();
    let text = String::from_utf8(script.heard[0].1.clone()).unwrap();
    assert!(text.contains("CHAP_N=me\0CHAP_R=0x") && text.contains("CHAP_C=0x07070707"), "{text}");
    authentication(script.answer_login(0, Some(1), ""));
    // Our own challenge comes back (reflection), or a challenge too short to be one.
    for challenge in [format!("0x{}", "07".repeat(32)), "0x5a".to_owned()] {
        let mut script = begin(mutual());
        script.answer_login(0, None, "AuthMethod=CHAP\0").unwrap();
        authentication(script.answer_login(0, None, &format!("CHAP_A=5\0CHAP_I=3\0CHAP_C={challenge}\0")));
    }
    // Stages that do not exist, text without end, keys twice, another value than was offered.
    assert!(begin(None).answer_login(0, Some(3), "AuthMethod=None\0").is_err());
    assert!(begin(None).answer_login(1, Some(3), "").is_err());
    assert!(begin(None).answer_login(0, Some(1), "AuthMethod=None\0AuthMethod=None\0").is_err());
    let mut script = begin(None);
    script.answer_login(0, Some(1), "AuthMethod=None\0").unwrap();
    assert!(script.answer_login(1, Some(3), "MaxBurstLength=16777215\0").is_err());
    let mut script = begin(None);
    script.answer_login(0, Some(1), "AuthMethod=None\0").unwrap();
    let endless = (0..100).find_map(|_| script.answer_login(1, None, "").err());
    assert_eq!(endless, Some(Violation::EndlessLogin));
    // Digests that must be there, and a target that is silent about them.
    let required = DigestPolicy::Required;
    let offer = Offer { header_digest: required, data_digest: required, ..Offer::default() };
    for answer in ["", "HeaderDigest=None\0DataDigest=None\0", "HeaderDigest=CRC32C\0", "HeaderDigest=NotUnderstood\0"]
    {
        let mut script = Script::new(Config { offer: offer.clone(), ..config() });
        script.answer_login(0, Some(1), "AuthMethod=None\0").unwrap();
        assert!(matches!(script.answer_login(1, Some(3), answer), Err(Violation::Value { .. })), "{answer}");
    }
    // Commands are nothing for a login phase.
    assert!(begin(None).status(0, 0, &[]).is_err());
}

#[test]
fn a_target_that_has_moved_says_where() {
    let mut script = Script::new(config());
    let response = LoginResponse { status_class: 1, status_detail: 1, ..LoginResponse::default() };
    let moved = script.say(response, b"TargetAddress=192.0.2.7:3260,1\0");
    assert_eq!(moved, Err(Violation::Moved { address: "192.0.2.7:3260,1".into() }));
    let said = moved.unwrap_err().to_string();
    assert!(said.contains("192.0.2.7:3260,1") && said.contains("name that portal as the origin's"), "{said}");
}

/// Old disks, strange disks, and what is no disk.
#[test]
fn disks_that_cannot_be_used_are_refused_with_the_reason() {
    let ask = |replies: &[(u8, &[u8])]| {
        let mut script = Script::new(config());
        script.log_in().unwrap();
        loop {
            let command = script.command();
            let reply = replies.iter().find(|(opcode, _)| *opcode == command.cdb[0]);
            let said = match reply {
                Some((_, [])) => script.check(command.task, 5, 0x2000),
                Some((_, data)) => script.good(&command, data),
                None => script.describe(&command),
            };
            if let Err(violation) = said {
                return Err(violation.to_string());
            }
            if script.initiator.is_ready() {
                return Ok(script.initiator.device().unwrap().clone());
            }
        }
    };
    let capacity = |last: u64, block: u32| [&last.to_be_bytes()[..], &block.to_be_bytes(), &[0; 20]].concat();
    let refused = |replies: &[(u8, &[u8])], why: &str| {
        let error = ask(replies).unwrap_err();
        assert!(error.contains(why), "{error}, not {why}");
    };
    refused(&[(0x12, &[0; 20])], "cut short");
    refused(&[(0x12, &[0x7f; 36])], "nothing at this LUN");
    refused(&[(0x12, &[5; 36])], "no disk");
    refused(&[(0x9e, &capacity(99, 520))], "neither 512 nor 4096");
    refused(&[(0x9e, &capacity(u64::MAX, 512))], "absurd");
    refused(&[(0x9e, &capacity(1 << 60, 512))], "absurd");
    refused(&[(0x9e, &[0; 8])], "cut short");
    refused(&[(0x9e, &[]), (0x25, &[0xff, 0xff, 0xff, 0xff, 0, 0, 2, 0])], "larger than its READ CAPACITY can say");
    refused(&[(0x00, &[])], "not ready");
    // No READ CAPACITY (16), no pages: a disk all the same, read with ten-byte commands.
    let device = ask(&[(0x9e, &[]), (0x25, &[0, 0, 0x07, 0xff, 0, 0, 2, 0])]).unwrap();
    assert_eq!((device.bytes(), device.short_commands, device.holes), (1 << 20, true, false));
}

#[test]
fn answers_about_holes_are_believed_as_far_as_they_make_sense() {
    let extents = |descriptors: &[(u64, u32, u8)]| {
        let mut script = Script::session();
        let mut out = Vec::new();
        script.initiator.status(1, 4096, 0, &mut out).unwrap();
        script.hear(&out);
        let command = script.command();
        assert_eq!(command.cdb[..2], [0x9e, 0x12]);
        let mut reply = vec![0; 8];
        for (lba, blocks, state) in descriptors {
            reply.extend(lba.to_be_bytes());
            reply.extend(blocks.to_be_bytes());
            reply.extend([*state, 0, 0, 0]);
        }
        let length = reply.len() as u32 - 4;
        reply[..4].copy_from_slice(&length.to_be_bytes());
        script.good(&command, &reply).unwrap();
        let (1, Ok(Answer::Extents(extents))) = script.done() else { panic!("no extents") };
        extents.iter().map(|extent| (extent.offset / 512, extent.length / 512, extent.hole)).collect::<Vec<_>>()
    };
    assert_eq!(extents(&[(8, 8, 1), (16, 8, 0), (24, 8, 2)]), [(8, 8, true), (16, 8, false), (24, 8, true)]);
    // Elsewhere, empty, with a gap, past the end.
    assert_eq!(extents(&[(9, 8, 1)]), []);
    assert_eq!(extents(&[(8, 0, 1)]), []);
    assert_eq!(extents(&[(8, 8, 0), (17, 8, 1)]), [(8, 8, false)]);
    assert_eq!(extents(&[(8, u32::MAX, 1)]), [(8, BLOCKS - 8, true)]);
    assert_eq!(extents(&[(u64::MAX, 8, 1)]), []);
}

/// The bytes of a target that answers two reads: whatever becomes of them, nothing panics, and no memory grows.
fn captured() -> Vec<u8> {
    let mut script = Script::session();
    script.read(1, 0, 1024);
    script.read(2, 4096, 512);
    let (first, second) = (script.command(), script.command());
    script.good(&second, &[2; 512]).unwrap();
    script.check(first.task, 6, 0x2a01).unwrap();
    let first = script.command();
    script.good(&first, &[1; 1024]).unwrap();
    script.said
}

fn play(bytes: &[u8]) {
    let mut script = Script::new(config());
    for piece in bytes.chunks(100) {
        let mut out = Vec::new();
        script.now += 1;
        if script.say_bytes(piece).is_err() {
            return;
        }
        if script.initiator.room() > 0 && script.initiator.outstanding() == 0 {
            let _ = script.initiator.read(1, 0, vec![0; 1024], script.now, &mut out);
            let _ = script.initiator.read(2, 4096, vec![0; 512], script.now, &mut out);
        }
        assert!(script.heard.len() < 100);
    }
    // Bytes after which nothing comes are found out by the clock.
    let _ = script.tick(script.now + 5000);
}

#[test]
fn every_truncation_of_a_target_is_contained() {
    let bytes = captured();
    (0..bytes.len()).for_each(|length| play(&bytes[..length]));
}

#[test]
fn every_bit_flip_of_a_target_is_contained() {
    let bytes = captured();
    for at in 0..bytes.len() * 8 {
        let mut damaged = bytes.clone();
        damaged[at / 8] ^= 1 << (at % 8);
        play(&damaged);
    }
}
