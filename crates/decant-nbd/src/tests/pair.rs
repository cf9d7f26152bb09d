//! The whole protocol over a network that delivers as few bytes at a time as one likes.

use std::collections::{BTreeMap, VecDeque};

use crate::client::{self, Client, Goal, RequestError};
use crate::server::{self, Server};
use crate::*;

pub(super) const SIZE: usize = 64 * 1024;

pub(super) fn server_config() -> server::Config {
    server::Config {
        export: ExportInfo {
            name: "volume".into(),
            size: SIZE as u64,
            flags: TransmissionFlags::offered(false),
            blocks: BlockSizes { minimum: 512, preferred: 4096, maximum: MAX_PAYLOAD },
        },
        contexts: Contexts::ALL,
        tls_required: false,
    }
}

pub(super) fn client_config() -> client::Config {
    client::Config {
        goal: Goal::Transmission,
        export: "volume".into(),
        tls: false,
        contexts: Contexts::ALL,
        max_outstanding: 8,
    }
}

/// One direction of the network.
type Pipe = VecDeque<u8>;

fn take(pipe: &mut Pipe, count: usize) -> Vec<u8> {
    let count = count.min(pipe.len());
    pipe.drain(..count).collect()
}

/// What a driver keeps: input that was read, and a payload that is being read.
#[derive(Default)]
struct Reader {
    input: Vec<u8>,
    payload: Option<(Payload, usize, Vec<u8>)>,
}

#[derive(Clone, Copy)]
enum Payload {
    /// At the server.
    Write(Request),
    /// At the client.
    Data { offset: u64 },
}

impl Reader {
    /// Moves input to the payload that is being read; gives it when it is complete.
    fn fill(&mut self) -> Option<(Payload, Vec<u8>)> {
        let (_, wanted, bytes) = self.payload.as_mut()?;
        let count = (*wanted - bytes.len()).min(self.input.len());
        bytes.extend(self.input.drain(..count));
        if bytes.len() < *wanted {
            return None;
        }
        self.payload.take().map(|(kind, _, bytes)| (kind, bytes))
    }
}

pub(super) struct Pair {
    pub(super) client: Client,
    server_config: server::Config,
    server: Server,
    to_server: Pipe,
    to_client: Pipe,
    at_server: Reader,
    at_client: Reader,
    pub(super) disk: Vec<u8>,
    holes: bool,
    pub(super) received: BTreeMap<u64, u8>,
    pub(super) extents: Vec<(Context, u64, u32, u32)>,
    pub(super) done: Vec<(u64, Result<(), ErrorCode>)>,
    pub(super) events: Vec<client::Event>,
    tls: (bool, bool),
    pub(super) error: Option<Violation>,
}

impl Pair {
    pub(super) fn new(client: client::Config, server_config: server::Config) -> Self {
        let mut to_client = Vec::new();
        let server = Server::new(server_config.clone(), &mut to_client);
        let mut client = Client::new(client);
        client.handle_connect();
        Self {
            client,
            server_config,
            server,
            to_server: Pipe::new(),
            to_client: to_client.into(),
            at_server: Reader::default(),
            at_client: Reader::default(),
            disk: (0..SIZE).map(|i| if i / 8192 % 2 == 0 { (i % 251) as u8 } else { 0 }).collect(),
            holes: true,
            received: BTreeMap::new(),
            extents: Vec::new(),
            done: Vec::new(),
            events: Vec::new(),
            tls: (false, false),
            error: None,
        }
    }

    pub(super) fn request(&mut self, tag: u64, command: Command, offset: u64, length: u32) -> Result<(), RequestError> {
        let mut out = Vec::new();
        self.client.request(tag, command, offset, length, &mut out)?;
        if matches!(command, Command::Write { .. }) {
            out.extend((0..length).map(|i| (i % 13) as u8 + 1));
        }
        self.to_server.extend(out);
        Ok(())
    }

    /// Cuts the connection and makes it again; gives what has to be asked again.
    pub(super) fn reconnect(&mut self) -> Vec<(u64, Request)> {
        self.client.handle_disconnect();
        let lost = std::iter::from_fn(|| self.client.poll_lost()).collect();
        let mut greeting = Vec::new();
        self.server = Server::new(self.server_config.clone(), &mut greeting);
        self.to_client = greeting.into();
        self.to_server.clear();
        self.at_client = Reader::default();
        self.at_server = Reader::default();
        self.tls = (false, false);
        self.client.handle_connect();
        lost
    }

    /// Delivers `step` bytes at a time each way until nothing moves.
    pub(super) fn run(&mut self, step: usize) {
        while self.error.is_none() && !(self.to_server.is_empty() && self.to_client.is_empty()) {
            if let Err(error) = self.deliver(step) {
                self.error = Some(error);
            }
        }
    }

    pub(super) fn deliver(&mut self, step: usize) -> Result<(), Violation> {
        self.at_server.input.extend(take(&mut self.to_server, step));
        self.run_server()?;
        self.at_client.input.extend(take(&mut self.to_client, step));
        self.run_client()
    }

    fn run_server(&mut self) -> Result<(), Violation> {
        loop {
            if self.at_server.payload.is_some() {
                let Some((Payload::Write(request), bytes)) = self.at_server.fill() else { return Ok(()) };
                let at = request.offset as usize;
                self.disk[at..at + bytes.len()].copy_from_slice(&bytes);
                self.to_client.extend(self.server.done(&request).as_bytes());
            }
            let mut out = Vec::new();
            let step = self.server.handle_input(&self.at_server.input, &mut out)?;
            self.to_client.extend(out);
            self.at_server.input.drain(..step.consumed);
            match step.event {
                None | Some(server::Event::Finished) => return Ok(()),
                Some(server::Event::Connected) => {}
                Some(server::Event::StartTls) => {
                    assert!(self.at_server.input.is_empty());
                    self.tls.0 = true;
                    self.server.handle_tls_started();
                }
                Some(server::Event::Request(request)) => self.serve(request),
            }
        }
    }

    fn serve(&mut self, request: Request) {
        let (at, length) = (request.offset as usize, request.length as usize);
        match request.command {
            Command::Write { .. } => {
                self.at_server.payload = Some((Payload::Write(request), length, Vec::new()));
            }
            Command::Read { .. } if self.server.structured() && self.holes => {
                let mut offset = at;
                while offset < at + length {
                    let end = (at + length).min((offset / 4096 + 1) * 4096);
                    let (last, count) = (end == at + length, (end - offset) as u32);
                    let bytes = &self.disk[offset..end];
                    if bytes.iter().all(|byte| *byte == 0) {
                        self.to_client.extend(self.server.hole(&request, offset as u64, count, last).as_bytes());
                    } else {
                        self.to_client.extend(self.server.data(&request, offset as u64, count, last).as_bytes());
                        self.to_client.extend(bytes);
                    }
                    offset = end;
                }
            }
            Command::Read { .. } => {
                self.to_client.extend(self.server.data(&request, request.offset, request.length, true).as_bytes());
                self.to_client.extend(&self.disk[at..at + length]);
            }
            Command::BlockStatus { .. } => self.serve_status(&request),
            Command::Trim { .. } | Command::WriteZeroes { .. } => {
                self.disk[at..at + length].fill(0);
                self.to_client.extend(self.server.done(&request).as_bytes());
            }
            _ => self.to_client.extend(self.server.done(&request).as_bytes()),
        }
    }

    fn serve_status(&mut self, request: &Request) {
        let contexts = self.server.contexts();
        let blocks: Vec<&[u8]> = self.disk[request.offset as usize..][..request.length as usize].chunks(4096).collect();
        if contexts.allocation {
            let header = self.server.block_status(request, Context::Allocation, blocks.len() as u32, !contexts.digests);
            self.to_client.extend(header.as_bytes());
            let mut out = Vec::new();
            for block in &blocks {
                put_descriptor(&mut out, block.len() as u32, if block.iter().all(|b| *b == 0) { 3 } else { 0 });
            }
            self.to_client.extend(out);
        }
        if contexts.digests {
            let header = self.server.block_status(request, Context::Digests, blocks.len() as u32, true);
            self.to_client.extend(header.as_bytes());
            let mut out = Vec::new();
            for block in &blocks {
                put_descriptor(&mut out, block.len() as u32, block.iter().map(|b| u32::from(*b)).sum());
            }
            self.to_client.extend(out);
        }
    }

    fn run_client(&mut self) -> Result<(), Violation> {
        loop {
            if self.at_client.payload.is_some() {
                let Some((Payload::Data { offset }, bytes)) = self.at_client.fill() else { return Ok(()) };
                self.received.extend((offset..).zip(bytes));
            }
            let mut out = Vec::new();
            let step = self.client.handle_input(&self.at_client.input, &mut out)?;
            self.at_client.input.drain(..step.consumed);
            if let Some(event) = &step.event {
                self.events.push(event.clone());
            }
            match step.event {
                None => {
                    self.to_server.extend(out);
                    return Ok(());
                }
                Some(client::Event::StartTls) => {
                    self.tls.1 = true;
                    self.client.handle_tls_started(&mut out);
                }
                Some(client::Event::Data { offset, length, .. }) => {
                    self.at_client.payload = Some((Payload::Data { offset }, length as usize, Vec::new()));
                }
                Some(client::Event::Hole { offset, length, .. }) => {
                    self.received.extend((offset..offset + u64::from(length)).map(|at| (at, 0)));
                }
                Some(client::Event::Extent { context, offset, length, flags, .. }) => {
                    self.extents.push((context, offset, length, flags));
                }
                Some(client::Event::Done { tag, result }) => self.done.push((tag, result)),
                Some(client::Event::Ready | client::Event::Finished | client::Event::Listed(_)) => {}
            }
            self.to_server.extend(out);
        }
    }

    fn check_received(&self, from: usize, to: usize) {
        assert_eq!(self.received.len(), to - from);
        for (at, byte) in &self.received {
            assert_eq!(*byte, self.disk[*at as usize], "byte {at}");
        }
    }
}

const READ: Command = Command::Read { unfragmented: false };

#[test]
fn everything_works_whatever_the_network_cuts() {
    for step in [1, 2, 7, 27, 28, 29, 1000, usize::MAX] {
        let mut pair = Pair::new(client_config(), server_config());
        pair.run(step);
        assert_eq!(pair.error, None);
        assert!(pair.client.is_ready() && pair.client.contexts() == Contexts::ALL);
        assert!(pair.client.export().unwrap().flags.has(TransmissionFlags::DF));
        assert_eq!(pair.client.export().unwrap().size, SIZE as u64);
        // Pipelined, of all kinds.
        pair.request(1, READ, 512, 30 * 1024).unwrap();
        pair.request(2, Command::Write { fua: true }, 40_960, 4096).unwrap();
        pair.request(3, Command::Flush, 0, 0).unwrap();
        pair.request(4, Command::Trim { fua: false }, 49_152, 512).unwrap();
        pair.request(5, Command::WriteZeroes { fua: true, no_hole: true, fast: false }, 50_176, 512).unwrap();
        pair.request(6, Command::BlockStatus { one: false }, 0, 16_384).unwrap();
        pair.run(step);
        assert_eq!(pair.error, None);
        assert_eq!(pair.done, (1..=6).map(|tag| (tag, Ok(()))).collect::<Vec<_>>());
        pair.check_received(512, 512 + 30 * 1024);
        assert_eq!(pair.disk[40_960..45_056], (0..4096u32).map(|i| (i % 13) as u8 + 1).collect::<Vec<_>>());
        assert_eq!(pair.disk[49_152..49_664], [0; 512]);
        let holes: Vec<u32> = pair.extents.iter().filter(|e| e.0 == Context::Allocation).map(|e| e.3).collect();
        assert_eq!(holes, [0, 0, 3, 3]);
        assert_eq!(pair.extents.iter().filter(|e| e.0 == Context::Digests).count(), 4);
        assert_eq!(pair.client.outstanding(), 0);
    }
}

#[test]
fn without_structured_replies_reads_come_whole() {
    let mut pair = Pair::new(client_config(), server_config());
    // A server that has never heard of it: swap the option number in flight.
    pair.deliver(usize::MAX).unwrap();
    let sent: Vec<u8> = pair.to_server.drain(..).collect();
    let unknown = [&sent[..15], &[99], &sent[16..]].concat();
    pair.to_server.extend(unknown);
    pair.at_server.input.extend(take(&mut pair.to_server, usize::MAX));
    pair.run_server().unwrap();
    let reply: Vec<u8> = pair.to_client.drain(..).collect();
    pair.to_client.extend([&reply[..11], &[8], &reply[12..]].concat());
    pair.run(3);
    assert_eq!(pair.error, None);
    assert!(pair.client.is_ready() && pair.client.contexts().is_empty());
    pair.request(1, READ, 0, 16_384).unwrap();
    assert_eq!(pair.request(2, Command::BlockStatus { one: true }, 0, 512), Err(RequestError::NotOffered));
    pair.run(5);
    assert_eq!(pair.done, [(1, Ok(()))]);
    pair.check_received(0, 16_384);
}

#[test]
fn tls_comes_first_and_forgets_what_was_before() {
    let mut pair = Pair::new(
        client::Config { tls: true, ..client_config() },
        server::Config { tls_required: true, ..server_config() },
    );
    pair.run(1);
    assert_eq!((pair.error.clone(), pair.tls), (None, (true, true)));
    assert!(pair.client.is_ready() && pair.client.contexts() == Contexts::ALL);

    // A server without TLS, and a server that requires it: both are told.
    let mut pair = Pair::new(client::Config { tls: true, ..client_config() }, server_config());
    pair.run(1);
    let reason = "against the server's policy: this server has no TLS".to_owned();
    assert_eq!(pair.error, Some(Violation::Refused { option: "TLS", reason }));
    let mut pair = Pair::new(client_config(), server::Config { tls_required: true, ..server_config() });
    pair.run(1);
    let reason = "the server requires TLS: TLS is required: send NBD_OPT_STARTTLS".to_owned();
    assert_eq!(pair.error, Some(Violation::Refused { option: "the export", reason }));
}

#[test]
fn exports_are_listed() {
    let mut pair = Pair::new(client::Config { goal: Goal::List, ..client_config() }, server_config());
    pair.run(1);
    assert_eq!(pair.events, [client::Event::Listed("volume".into()), client::Event::Finished]);
    let mut pair = Pair::new(client::Config { export: "other".into(), ..client_config() }, server_config());
    pair.run(1);
    let reason = "no such export: no such export".to_owned();
    assert_eq!(pair.error, Some(Violation::Refused { option: "the export", reason }));
}

#[test]
fn a_lost_connection_hands_back_what_was_not_answered() {
    // Cut after every number of deliveries; whatever was unanswered is asked again, and in the end all is there.
    for cut in 0..400 {
        let mut pair = Pair::new(client_config(), server_config());
        pair.run(64);
        for tag in 0..4 {
            pair.request(tag, READ, tag * 8192, 8192).unwrap();
        }
        for _ in 0..cut {
            pair.deliver(64).unwrap();
        }
        let answered = pair.done.len();
        let lost = pair.reconnect();
        assert_eq!(lost.len() + answered, 4);
        assert_eq!(pair.client.outstanding(), 0);
        pair.run(1000);
        for (tag, request) in lost {
            pair.request(tag, request.command, request.offset, request.length).unwrap();
        }
        pair.run(1000);
        assert_eq!(pair.error, None);
        let mut tags: Vec<u64> = pair.done.iter().map(|(tag, _)| *tag).collect();
        tags.sort_unstable();
        assert_eq!(tags, [0, 1, 2, 3]);
        pair.check_received(0, 4 * 8192);
    }
}

#[test]
fn the_table_of_outstanding_requests_is_bounded() {
    let mut pair = Pair::new(client_config(), server_config());
    pair.run(usize::MAX);
    for tag in 0..8 {
        pair.request(tag, READ, 0, 512).unwrap();
    }
    assert_eq!(pair.request(8, READ, 0, 512), Err(RequestError::Full));
    assert_eq!(pair.client.outstanding(), 8);
    pair.run(usize::MAX);
    pair.request(8, READ, 0, 512).unwrap();
    assert_eq!(pair.request(9, READ, SIZE as u64, 512), Err(RequestError::OutOfRange));
    assert_eq!(pair.request(9, READ, u64::MAX, 512), Err(RequestError::OutOfRange));
    assert_eq!(pair.request(9, READ, 0, 0), Err(RequestError::OutOfRange));
}

#[test]
fn read_only_exports_refuse_changes() {
    let mut config = server_config();
    config.export.flags = TransmissionFlags::offered(true);
    let mut pair = Pair::new(client_config(), config);
    pair.run(usize::MAX);
    assert_eq!(pair.request(1, Command::Write { fua: false }, 0, 512), Err(RequestError::NotOffered));
    // A client that does not care is refused, its payload skipped, and the stream stays in step.
    let mut raw = Vec::new();
    Request { cookie: 9, command: Command::Write { fua: false }, offset: 0, length: 512 }.encode(&mut raw);
    raw.extend([0x25; 512]);
    Request { cookie: 10, command: READ, offset: 0, length: 512 }.encode(&mut raw);
    let mut out = Vec::new();
    let step = pair.server.handle_input(&raw, &mut out).unwrap();
    assert_eq!(step.consumed, raw.len());
    assert!(matches!(step.event, Some(server::Event::Request(Request { cookie: 10, .. }))));
    assert_eq!(out[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 1]);
}

#[test]
fn backoff_doubles_to_its_bound_and_starts_over() {
    use std::time::{Duration, Instant};
    let now = Instant::now();
    let mut backoff = Backoff::new(Duration::from_millis(5), Duration::from_secs(1));
    let mut waits: Vec<u128> = (0..10).map(|_| (backoff.handle_failure(now, u32::MAX) - now).as_millis()).collect();
    assert_eq!(waits, [5, 10, 20, 40, 80, 160, 320, 640, 1000, 1000]);
    assert_eq!(backoff.failures(), 10);
    backoff.handle_success();
    waits = (0..2).map(|_| (backoff.handle_failure(now, 0) - now).as_micros()).collect();
    assert_eq!(waits, [2500, 5000]);
}
