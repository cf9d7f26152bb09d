//! A device in memory, a sink that remembers, peers as processes, certificates.

use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, Instant};

use decant_dataplane_user::device::{
    Exported, Fetch, Later, Origin as _, OriginSink, ReadSink, Served as Have, Status, Want,
};
use decant_dataplane_user::export::{Address, Server};
use decant_dataplane_user::origin::{Options, Remote, Spec, Timing};
use decant_dataplane_user::tls::{Fingerprint, Identity, Paths};
use rustix::io::Errno;

/// How long anything may take before a test gives up; far more than it does.
pub(crate) const PATIENCE: Duration = Duration::from_secs(20);
pub(crate) const BLOCK: usize = 4096;

/// Bytes that differ everywhere, with holes: each third 64 KiB is zeros.
pub(crate) fn image(size: usize) -> Vec<u8> {
    let mut state = 0x9e37_79b9_7f4a_7c15u64;
    let mut bytes: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state.to_le_bytes()
    })
    .take(size / 8)
    .flatten()
    .collect();
    bytes.chunks_mut(65_536).skip(2).step_by(3).for_each(|hole| hole.fill(0));
    bytes
}

/// A device whose contents are in memory and whose ways can be changed.
pub(crate) struct Disk {
    pub(crate) bytes: Mutex<Vec<u8>>,
    pub(crate) read_only: bool,
    pub(crate) ready: AtomicBool,
    pub(crate) flushes: AtomicU64,
    /// What every read and write from this offset on fails with.
    pub(crate) error: Mutex<Option<(u64, Errno)>>,
    /// Reads from this offset on wait until it is lifted.
    pub(crate) gate: Mutex<Option<u64>>,
    pub(crate) gate_changed: Condvar,
    pub(crate) digests: bool,
    /// Reads from the offset on are not here: they are parked.
    pub(crate) parked: Mutex<Option<Parked>>,
}

/// Reads that wait for bytes from `from` on.
#[derive(Default)]
pub(crate) struct Parked {
    pub(crate) from: u64,
    pub(crate) reads: Vec<(u64, usize, Box<dyn ReadSink>)>,
}

impl Disk {
    pub(crate) fn new(bytes: Vec<u8>) -> Self {
        Self {
            bytes: Mutex::new(bytes),
            read_only: false,
            ready: AtomicBool::new(true),
            flushes: AtomicU64::new(0),
            error: Mutex::new(None),
            gate: Mutex::new(None),
            gate_changed: Condvar::new(),
            digests: true,
            parked: Mutex::new(None),
        }
    }

    pub(crate) fn contents(&self) -> Vec<u8> {
        self.bytes.lock().unwrap().clone()
    }

    fn check(&self, end: u64) -> Result<(), Errno> {
        match *self.error.lock().unwrap() {
            Some((from, errno)) if end > from => Err(errno),
            _ => Ok(()),
        }
    }
}

impl Exported for Disk {
    fn size(&self) -> u64 {
        self.bytes.lock().unwrap().len() as u64
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn ready(&self) -> bool {
        self.ready.load(Ordering::SeqCst)
    }

    fn read(&self, offset: u64, buffer: &mut [u8], later: &mut Later<'_>) -> Result<Have, Errno> {
        assert_eq!(buffer.as_ptr() as usize % 4096, 0, "buffers are aligned");
        if let Some(parked) = self.parked.lock().unwrap().as_mut().filter(|parked| offset >= parked.from) {
            parked.reads.push((offset, buffer.len(), later()));
            return Ok(Have::Missing);
        }
        self.check(offset + buffer.len() as u64)?;
        let gate = self.gate.lock().unwrap();
        drop(self.gate_changed.wait_while(gate, |gate| gate.is_some_and(|from| offset >= from)).unwrap());
        let bytes = self.bytes.lock().unwrap();
        buffer.copy_from_slice(&bytes[offset as usize..][..buffer.len()]);
        Ok(Have::Done)
    }

    fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.check(offset + data.len() as u64)?;
        self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.check(offset + length)?;
        self.bytes.lock().unwrap()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }

    fn flush(&self) -> Result<(), Errno> {
        self.flushes.fetch_add(1, Ordering::SeqCst);
        Ok(())
    }

    fn status(&self, offset: u64, length: u64, out: &mut Vec<Status>) -> Result<(), Errno> {
        let bytes = self.bytes.lock().unwrap();
        let mut at = offset as usize;
        let end = (offset + length) as usize;
        while at < end {
            let next = end.min((at / BLOCK + 1) * BLOCK);
            let (hole, length) = (bytes[at..next].iter().all(|byte| *byte == 0), (next - at) as u64);
            match out.last_mut() {
                Some(last) if last.hole == hole => last.length += length,
                _ => out.push(Status { length, hole }),
            }
            at = next;
        }
        Ok(())
    }

    fn digests(&self, offset: u64, length: u64, out: &mut Vec<u32>) -> Option<Result<(), Errno>> {
        let bytes = self.bytes.lock().unwrap();
        out.extend(bytes[offset as usize..][..length as usize].chunks(BLOCK).map(crc32c::crc32c));
        self.digests.then_some(Ok(()))
    }
}

/// What an origin's answers came to.
#[derive(Default)]
pub(crate) struct Answers {
    /// Bytes by block number; a hole is an empty vector.
    pub(crate) blocks: HashMap<u64, Vec<u8>>,
    pub(crate) digests: HashMap<u64, u32>,
    pub(crate) done: HashMap<u64, Result<(), Errno>>,
    pub(crate) order: Vec<u64>,
    pub(crate) links: Vec<(bool, String)>,
    pub(crate) holes: u64,
}

#[derive(Default)]
pub(crate) struct Recorder {
    pub(crate) answers: Mutex<Answers>,
    changed: Condvar,
    closed: AtomicBool,
}

impl Recorder {
    /// Waits until `ready`, then gives what it said.
    pub(crate) fn wait<T>(&self, mut ready: impl FnMut(&mut Answers) -> Option<T>) -> T {
        let deadline = Instant::now() + PATIENCE;
        let mut answers = self.answers.lock().unwrap();
        loop {
            if let Some(value) = ready(&mut answers) {
                return value;
            }
            let left = deadline.checked_duration_since(Instant::now());
            let left = left.unwrap_or_else(|| {
                panic!("gave up waiting; done: {:?}, links: {:?}", answers.done.keys(), answers.links)
            });
            answers = self.changed.wait_timeout(answers, left).unwrap().0;
        }
    }

    pub(crate) fn wait_done(&self, tokens: std::ops::Range<u64>) {
        self.wait(|answers| tokens.clone().all(|token| answers.done.contains_key(&token)).then_some(()));
    }

    /// The last reason why there is no session that contains `text`.
    pub(crate) fn wait_down(&self, text: &str) -> String {
        self.wait(|answers| {
            answers.links.iter().find(|(up, detail)| !up && detail.contains(text)).map(|(_, detail)| detail.clone())
        })
    }

    fn record(&self, record: impl FnOnce(&mut Answers)) {
        assert!(!self.closed.load(Ordering::SeqCst), "nothing comes after close");
        record(&mut self.answers.lock().unwrap());
        self.changed.notify_all();
    }

    pub(crate) fn close(&self, origin: &Remote) {
        origin.close();
        self.closed.store(true, Ordering::SeqCst);
    }

    /// Everything that came is as in `image`, and all of `range` came.
    pub(crate) fn check(&self, image: &[u8], range: std::ops::Range<usize>) {
        let answers = self.answers.lock().unwrap();
        for (token, result) in &answers.done {
            assert_eq!(*result, Ok(()), "token {token}");
        }
        for block in range.start / BLOCK..range.end.div_ceil(BLOCK) {
            let expected = &image[block * BLOCK..image.len().min((block + 1) * BLOCK)];
            match answers.blocks.get(&(block as u64)) {
                None => panic!("block {block} did not come"),
                Some(hole) if hole.is_empty() => assert!(expected.iter().all(|byte| *byte == 0), "block {block}"),
                Some(bytes) => assert!(bytes == expected, "block {block} differs"),
            }
        }
    }
}

impl OriginSink for Recorder {
    fn handle_data(&self, _token: u64, offset: u64, data: &[u8]) {
        assert!(offset.is_multiple_of(BLOCK as u64) && !data.is_empty());
        self.record(|answers| {
            for (block, bytes) in (offset / BLOCK as u64..).zip(data.chunks(BLOCK)) {
                answers.blocks.insert(block, bytes.to_vec());
            }
        });
    }

    fn handle_hole(&self, _token: u64, offset: u64, length: u64) {
        assert!(offset.is_multiple_of(BLOCK as u64));
        self.record(|answers| {
            answers.holes += length;
            for block in offset / BLOCK as u64..(offset + length).div_ceil(BLOCK as u64) {
                answers.blocks.insert(block, Vec::new());
            }
        });
    }

    fn handle_digests(&self, _token: u64, offset: u64, crc32c: &[u32]) {
        self.record(|answers| answers.digests.extend((offset / BLOCK as u64..).zip(crc32c.iter().copied())));
    }

    fn handle_done(&self, token: u64, result: Result<(), Errno>) {
        self.record(|answers| {
            answers.order.push(token);
            assert!(answers.done.insert(token, result).is_none(), "answered twice");
        });
    }

    fn handle_link(&self, up: bool, detail: &str) {
        self.record(|answers| answers.links.push((up, detail.to_owned())));
    }
}

pub(crate) fn fetch(token: u64, offset: usize, length: usize) -> Fetch {
    Fetch { token, offset: offset as u64, length: length as u32, want: Want::Data, urgent: false }
}

/// Fast to give up, so that tests are fast.
pub(crate) const HASTY: Timing = Timing {
    backoff_first: Duration::from_millis(1),
    backoff_max: Duration::from_millis(50),
    handshake: Duration::from_millis(500),
    silence: Duration::from_millis(300),
    silence_max: Duration::from_secs(2),
};

pub(crate) fn options(address: &Address, export: &str) -> Options {
    Options {
        address: address.clone(),
        tls: None,
        export: export.into(),
        size: None,
        digests: true,
        connections: 3,
        timing: HASTY,
    }
}

pub(crate) fn open(options: impl Into<Spec>) -> (Arc<Remote>, Arc<Recorder>) {
    let recorder = Arc::new(Recorder::default());
    (Remote::open(options, recorder.clone()).unwrap(), recorder)
}

/// A server of ours on a Unix socket in a directory of its own.
pub(crate) struct Served {
    pub(crate) server: Server,
    pub(crate) disk: Arc<Disk>,
    pub(crate) socket: PathBuf,
    pub(crate) directory: tempfile::TempDir,
}

impl Served {
    pub(crate) fn new(disk: Disk) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("nbd.sock");
        let disk = Arc::new(disk);
        let server = Server::listen(&Address::Unix(socket.clone()), None, "volume", disk.clone()).unwrap();
        Self { server, disk, socket, directory }
    }

    pub(crate) fn uri(&self) -> String {
        format!("nbd+unix:///volume?socket={}", self.socket.display())
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }
}

/// Waits for what nobody announces.
pub(crate) fn eventually(what: &str, mut condition: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !condition() {
        assert!(Instant::now() < deadline, "{what}: never");
        std::thread::park_timeout(Duration::from_millis(2));
    }
}

fn package(program: &str) -> &'static str {
    match program {
        "nbdinfo" | "nbdcopy" => "libnbd-bin",
        "nbdkit" => "nbdkit",
        _ => "qemu-utils",
    }
}

fn spawned(program: &str, result: io::Result<Child>) -> Child {
    result.unwrap_or_else(|error| {
        panic!("cannot run {program}: {error}; install the Debian package {}", package(program))
    })
}

/// Runs a peer to its end.
pub(crate) fn run(program: &str, arguments: &[&str]) -> Output {
    let mut command = Command::new(program);
    command.args(arguments).stdin(Stdio::null()).stdout(Stdio::piped()).stderr(Stdio::piped());
    spawned(program, command.spawn()).wait_with_output().unwrap()
}

/// Runs a peer that has to succeed; gives what it printed.
pub(crate) fn succeed(program: &str, arguments: &[&str]) -> String {
    let output = run(program, arguments);
    let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{program} {arguments:?}: {out}{err}");
    out.into_owned()
}

/// A server that is not ours, killed when the test ends.
pub(crate) struct Peer {
    child: Child,
}

impl Peer {
    pub(crate) fn start(program: &str, arguments: &[&str]) -> Self {
        let mut command = Command::new(program);
        command.args(arguments).stdin(Stdio::null()).stdout(Stdio::null()).stderr(Stdio::null());
        Self { child: spawned(program, command.spawn()) }
    }

    /// nbdkit, serving with `arguments` on a Unix socket.
    pub(crate) fn nbdkit(socket: &Path, arguments: &[&str]) -> Self {
        let _ = std::fs::remove_file(socket);
        let socket = socket.to_str().unwrap();
        Self::start("nbdkit", &[&["-f", "--exit-with-parent", "-U", socket][..], arguments].concat())
    }

    pub(crate) fn signal(&self, signal: rustix::process::Signal) {
        let pid = rustix::process::Pid::from_child(&self.child);
        rustix::process::kill_process(pid, signal).unwrap();
    }

    pub(crate) fn kill(&mut self) {
        self.child.kill().unwrap();
        self.child.wait().unwrap();
    }
}

impl Drop for Peer {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// A CA and what it signed, as PEM files.
pub(crate) struct Authority {
    pub(crate) directory: tempfile::TempDir,
    issuer: rcgen::Issuer<'static, rcgen::KeyPair>,
}

impl Authority {
    pub(crate) fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(Vec::new()).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        parameters.distinguished_name.push(rcgen::DnType::CommonName, "fleet");
        let certificate = parameters.self_signed(&key).unwrap();
        std::fs::write(directory.path().join("ca-cert.pem"), certificate.pem()).unwrap();
        Self { directory, issuer: rcgen::Issuer::new(parameters, key) }
    }

    /// A directory with ca-cert.pem, `role`-cert.pem and `role`-key.pem, as GnuTLS programs like it, and the paths in it.
    pub(crate) fn issue(&self, name: &str, role: &str) -> (PathBuf, Paths) {
        let directory = self.directory.path().join(name);
        std::fs::create_dir_all(&directory).unwrap();
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec![name.to_owned(), "localhost".to_owned()]).unwrap();
        parameters.distinguished_name.push(rcgen::DnType::CommonName, name);
        let certificate = parameters.signed_by(&key, &self.issuer).unwrap();
        let paths = Paths {
            ca: directory.join("ca-cert.pem"),
            cert: directory.join(format!("{role}-cert.pem")),
            key: directory.join(format!("{role}-key.pem")),
        };
        std::fs::copy(self.directory.path().join("ca-cert.pem"), &paths.ca).unwrap();
        std::fs::write(&paths.cert, certificate.pem()).unwrap();
        std::fs::write(&paths.key, key.serialize_pem()).unwrap();
        (directory, paths)
    }

    pub(crate) fn identity(&self, name: &str) -> Identity {
        Identity::load(&self.issue(name, "worker").1).unwrap()
    }
}

pub(crate) fn localhost() -> Address {
    Address::Tcp("127.0.0.1:0".parse().unwrap())
}

/// A fingerprint that nobody has.
pub(crate) fn nobody() -> Fingerprint {
    Fingerprint::of(b"nobody")
}
