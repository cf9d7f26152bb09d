//! A connection whose thread is the test's, a device that waits when it is told to, and an initiator played by hand.

use std::collections::VecDeque;
use std::io::{Read, Write};
use std::net::{Ipv4Addr, SocketAddr};
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Condvar, Mutex};
use std::time::Duration;

use decant_iscsi::login::DigestPolicy;
use decant_iscsi::pdu::*;
use decant_iscsi::serial::Serial;
use decant_iscsi::target::Access;
use rustix::io::Errno;

use super::super::{Broken, Link};
use crate::device::{Exported, Later, ReadSink, Served, Status};
use crate::export::doors::Visitor;
use crate::export::iscsi::{IscsiOptions, IscsiServer, Shared};
use crate::stream::{Kick, now};

pub(super) const SIZE: usize = 64 << 20;
const NAME: &str = "iqn.2026-11.dev.decant:test";
/// Nothing here takes a hundredth of this.
pub(super) const PATIENCE: Duration = Duration::from_secs(20);

/// Called with where a write goes and its length, before it is done.
type Hook = Box<dyn FnMut(u64, usize) + Send>;

/// Where from, how much, and who waits for it.
type ParkedRead = (u64, usize, Box<dyn ReadSink>);

/// Where calls wait.
#[derive(Default)]
pub(super) struct Gate {
    /// Whether it is shut, and how many wait.
    state: Mutex<(bool, usize)>,
    changed: Condvar,
}

impl Gate {
    pub(super) fn shut(&self) {
        self.state.lock().unwrap().0 = true;
    }

    pub(super) fn open(&self) {
        self.state.lock().unwrap().0 = false;
        self.changed.notify_all();
    }

    fn pass(&self) {
        let mut state = self.state.lock().unwrap();
        state.1 += 1;
        self.changed.notify_all();
        let (mut state, _) = self.changed.wait_timeout_while(state, PATIENCE, |state| state.0).unwrap();
        assert!(!state.0, "the gate was never opened");
        state.1 -= 1;
    }

    /// Until so many wait.
    pub(super) fn wait_for(&self, count: usize) {
        let state = self.state.lock().unwrap();
        let (state, _) = self.changed.wait_timeout_while(state, PATIENCE, |state| state.1 < count).unwrap();
        assert_eq!(state.1, count, "so many wait");
    }
}

pub(super) struct Disk {
    pub(super) bytes: Mutex<Vec<u8>>,
    /// Reads from here on are parked.
    pub(super) parked_from: Mutex<u64>,
    pub(super) parked: Mutex<Vec<ParkedRead>>,
    pub(super) on_write: Mutex<Option<Hook>>,
    pub(super) flushing: Gate,
    pub(super) writing: Gate,
    pub(super) ready: Mutex<bool>,
    /// What was written: where, and how much.
    pub(super) writes: Mutex<Vec<(u64, usize)>>,
}

impl Disk {
    /// Answers all reads that are parked with these bytes.
    pub(super) fn answer_parked(&self, byte: u8) {
        for (_, length, sink) in self.parked.lock().unwrap().drain(..) {
            sink.complete(Ok(&vec![byte; length]));
        }
    }
}

impl Exported for Disk {
    fn size(&self) -> u64 {
        SIZE as u64
    }
    fn read_only(&self) -> bool {
        false
    }
    fn ready(&self) -> bool {
        *self.ready.lock().unwrap()
    }
    fn read(&self, offset: u64, buffer: &mut [u8], later: &mut Later<'_>) -> Result<Served, Errno> {
        if offset >= *self.parked_from.lock().unwrap() {
            self.parked.lock().unwrap().push((offset, buffer.len(), later()));
            return Ok(Served::Missing);
        }
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buffer.len()]);
        Ok(Served::Done)
    }
    fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        if let Some(hook) = &mut *self.on_write.lock().unwrap() {
            hook(offset, data.len());
        }
        self.writing.pass();
        self.writes.lock().unwrap().push((offset, data.len()));
        self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        data.fill(0xee);
        Ok(())
    }
    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.bytes.lock().unwrap()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
    fn flush(&self) -> Result<(), Errno> {
        self.flushing.pass();
        Ok(())
    }
    fn status(&self, _offset: u64, length: u64, out: &mut Vec<Status>) -> Result<(), Errno> {
        out.push(Status { length, hole: false });
        Ok(())
    }
    fn digests(&self, _offset: u64, _length: u64, _out: &mut Vec<u32>) -> Option<Result<(), Errno>> {
        None
    }
}

/// A server that nobody connects to: its connections are [`World`]s.
pub(super) struct House {
    pub(super) disk: Arc<Disk>,
    pub(super) shared: &'static Arc<Shared>,
    _server: IscsiServer,
}

impl House {
    pub(super) fn new() -> Self {
        let disk = Arc::new(Disk {
            bytes: Mutex::new(vec![7; SIZE]),
            parked_from: Mutex::new(u64::MAX),
            parked: Mutex::default(),
            on_write: Mutex::default(),
            flushing: Gate::default(),
            writing: Gate::default(),
            ready: Mutex::new(true),
            writes: Mutex::default(),
        });
        let options = IscsiOptions {
            address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            name: NAME.into(),
            access: vec![Access { initiator: None, chap: None }],
            peers: Vec::new(),
            digests: DigestPolicy::Allowed,
            block_bytes: 512,
            serial: "test-1".into(),
        };
        let server = IscsiServer::listen(options, disk.clone()).unwrap();
        // For the rest of the test program, so that a thread can have a connection.
        let shared = Box::leak(Box::new(Arc::clone(&server.shared)));
        Self { disk, shared, _server: server }
    }

    /// A session of its own initiator port, its unit attention told.
    pub(super) fn session(&self, port: u8) -> World {
        let (ours, theirs) = UnixStream::pair().unwrap();
        theirs.set_nonblocking(true).unwrap();
        let kick = Arc::new(Kick::new().unwrap());
        let visitor = Visitor { socket: ours.into(), kick, peer: format!("port {port}") };
        let client = Client {
            stream: theirs,
            decoder: Decoder::new(MAX_DATA_SEGMENT, 0),
            outgoing: VecDeque::new(),
            input: Vec::new(),
            answers: Vec::new(),
            cmd_sn: Serial(1),
        };
        let mut world = World { link: Link::new(self.shared, visitor).unwrap(), client };
        let login = LoginRequest {
            immediate: true,
            transit: true,
            stage: 1,
            next_stage: 3,
            isid: [0x80, 0, 0, 0, 0, port],
            cmd_sn: Serial(1),
            ..LoginRequest::default()
        };
        let name = "InitiatorName=iqn.2026-11.dev.decant:hand";
        let text = format!("{name}\0TargetName={NAME}\0InitialR2T=No\0ImmediateData=Yes\0");
        let more = "MaxRecvDataSegmentLength=262144\0FirstBurstLength=262144\0";
        world.send(login, (text + more).as_bytes());
        let ready = world.client.command(&[0], 0, false);
        world.send(ready, &[]);
        let answers = world.answers();
        assert!(matches!(answers[0].0, Header::LoginResponse(response) if response.transit), "{answers:?}");
        world
    }
}

/// The initiator's end.
pub(super) struct Client {
    pub(super) stream: UnixStream,
    decoder: Decoder,
    pub(super) outgoing: VecDeque<u8>,
    input: Vec<u8>,
    answers: Vec<(Header, Vec<u8>)>,
    cmd_sn: Serial,
}

impl Client {
    /// A command's PDU, whose tag is its CmdSN.
    pub(super) fn command(&mut self, cdb: &[u8], length: u32, write: bool) -> ScsiCommand {
        let mut padded = [0; 16];
        padded[..cdb.len()].copy_from_slice(cdb);
        let cmd_sn = self.cmd_sn;
        self.cmd_sn = cmd_sn.next();
        ScsiCommand {
            is_final: true,
            read: length > 0 && !write,
            write,
            attribute: TaskAttribute::Simple,
            task: cmd_sn.0,
            expected_length: length,
            cmd_sn,
            cdb: padded,
            ..ScsiCommand::default()
        }
    }

    /// The CmdSN of the next command.
    pub(super) fn next_cmd_sn(&self) -> Serial {
        self.cmd_sn
    }

    pub(super) fn read(&mut self, offset: usize, length: usize) -> ScsiCommand {
        self.command(&cdb(0x28, offset, length), length as u32, false)
    }

    pub(super) fn write(&mut self, offset: usize, length: usize) -> ScsiCommand {
        let write = Self::write_of(self.cmd_sn, offset, length);
        self.cmd_sn = self.cmd_sn.next();
        write
    }

    pub(super) fn write_of(cmd_sn: Serial, offset: usize, length: usize) -> ScsiCommand {
        let mut padded = [0; 16];
        padded[..10].copy_from_slice(&cdb(0x2a, offset, length));
        ScsiCommand {
            is_final: true,
            write: true,
            attribute: TaskAttribute::Simple,
            task: cmd_sn.0,
            expected_length: length as u32,
            cmd_sn,
            cdb: padded,
            ..ScsiCommand::default()
        }
    }

    /// What the socket takes of what is to be sent.
    pub(super) fn push(&mut self) {
        while !self.outgoing.is_empty() {
            match (&self.stream).write(self.outgoing.make_contiguous()) {
                Ok(count) => drop(self.outgoing.drain(..count)),
                Err(_) => return,
            }
        }
    }

    /// What the socket has; false: nothing.
    fn pull(&mut self) -> bool {
        let mut piece = vec![0; 256 * 1024];
        let Ok(count @ 1..) = (&self.stream).read(&mut piece) else { return false };
        self.input.extend_from_slice(&piece[..count]);
        let mut done = 0;
        while let Ok(decant_iscsi::Step { consumed, event: Some(unit) }) =
            self.decoder.handle_input(&self.input[done..])
        {
            match unit {
                Unit::Header { bhs, .. } => self.answers.push((Header::decode(bhs).unwrap(), Vec::new())),
                Unit::Data(data) => self.answers.last_mut().unwrap().1.extend_from_slice(data),
                Unit::End { intact } => assert!(intact),
            }
            done += consumed;
        }
        self.input.drain(..done);
        true
    }
}

fn cdb(opcode: u8, offset: usize, length: usize) -> [u8; 10] {
    let ([a, b, c, d], [e, f]) = (((offset / 512) as u32).to_be_bytes(), ((length / 512) as u16).to_be_bytes());
    [opcode, 0, a, b, c, d, 0, e, f, 0]
}

pub(super) fn pdu(header: impl Into<Header>, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    put(&mut bytes, &header.into(), data, Digests::default());
    bytes
}

/// A connection and its initiator.
pub(super) struct World {
    pub(super) link: Link<'static>,
    pub(super) client: Client,
}

impl World {
    /// Lets the connection do all that it can without waiting.
    pub(super) fn settle(&mut self) -> Result<(), Broken> {
        loop {
            while self.link.round()? {}
            self.link.more = true;
            if self.link.closing || !self.link.receive()? {
                return Ok(());
            }
        }
    }

    pub(super) fn send_bytes(&mut self, bytes: &[u8]) {
        self.client.outgoing.extend(bytes);
        while !self.client.outgoing.is_empty() {
            self.client.push();
            self.settle().unwrap();
        }
    }

    pub(super) fn send(&mut self, header: impl Into<Header>, data: &[u8]) {
        self.send_bytes(&pdu(header, data));
    }

    /// All that the connection says until it has nothing more to say.
    pub(super) fn answers(&mut self) -> Vec<(Header, Vec<u8>)> {
        loop {
            self.settle().unwrap();
            if !self.client.pull() {
                return std::mem::take(&mut self.client.answers);
            }
        }
    }

    /// The answers once `done` is among them, whoever it waits for.
    pub(super) fn answers_with(&mut self, done: impl Fn(&Header) -> bool) -> Vec<(Header, Vec<u8>)> {
        let (deadline, mut answers) = (now() + PATIENCE, Vec::new());
        loop {
            answers.extend(self.answers());
            if answers.iter().any(|(header, _)| done(header)) {
                return answers;
            }
            assert!(now() < deadline, "not among {answers:?}");
            self.wait_for_kick();
        }
    }

    /// Until somebody has kicked the connection; the kick stays.
    pub(super) fn wait_for_kick(&self) {
        self.link.inbox.kick.wait(now().checked_add(PATIENCE));
    }

    /// Whether a ping comes back at once, and with what before it.
    pub(super) fn ping(&mut self) -> Vec<(Header, Vec<u8>)> {
        let ping = NopOut { immediate: true, is_final: true, task: 0x99, transfer: NO_TAG, ..NopOut::default() };
        self.send(ping, &[]);
        let mut answers = self.answers();
        assert!(matches!(answers.pop(), Some((Header::NopIn(nop), _)) if nop.task == 0x99));
        answers
    }
}
