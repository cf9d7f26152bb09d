//! The iSCSI server over a device that is not ready, or has not everything, with QEMU and libiscsi as initiators.

use std::io::{BufRead, BufReader};
use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use decant_dataplane_user::device::{Exported, Later, ReadSink, Served, Status};
use decant_dataplane_user::export::iscsi::{IscsiOptions, IscsiServer};
use decant_iscsi::login::DigestPolicy;
use decant_iscsi::target::Access;
use rustix::io::Errno;

const SIZE: usize = 16 << 20;
const NAME: &str = "iqn.2026-11.dev.decant:test";
const PATIENCE: Duration = Duration::from_secs(20);

type ParkedRead = (u64, usize, Box<dyn ReadSink>);

struct Disk {
    bytes: Mutex<Vec<u8>>,
    ready: AtomicBool,
    /// Reads from here on are parked.
    parked_from: AtomicU64,
    parked: Mutex<Vec<ParkedRead>>,
}

impl Disk {
    fn new() -> Arc<Self> {
        Arc::new(Self {
            bytes: Mutex::new(vec![7; SIZE]),
            ready: AtomicBool::new(true),
            parked_from: AtomicU64::new(u64::MAX),
            parked: Mutex::default(),
        })
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
        self.ready.load(Ordering::SeqCst)
    }
    fn read(&self, offset: u64, buffer: &mut [u8], later: &mut Later<'_>) -> Result<Served, Errno> {
        assert_eq!(buffer.as_ptr() as usize % 4096, 0, "buffers are aligned");
        if offset >= self.parked_from.load(Ordering::SeqCst) {
            self.parked.lock().unwrap().push((offset, buffer.len(), later()));
            return Ok(Served::Missing);
        }
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buffer.len()]);
        Ok(Served::Done)
    }
    fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        // Scratch afterwards, as with a cipher.
        data.fill(0xEE);
        Ok(())
    }
    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.bytes.lock().unwrap()[offset as usize..][..length as usize].fill(0);
        Ok(())
    }
    fn flush(&self) -> Result<(), Errno> {
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

fn serve(disk: &Arc<Disk>) -> (IscsiServer, String) {
    let options = IscsiOptions {
        address: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
        name: NAME.into(),
        access: vec![Access { initiator: None, chap: None }],
        peers: Vec::new(),
        digests: DigestPolicy::Allowed,
        block_bytes: 512,
        serial: "test-1".into(),
    };
    let server = IscsiServer::listen(options, Arc::clone(disk) as Arc<dyn Exported>).unwrap();
    let url = format!("iscsi://{}/{NAME}/0", server.local_addr());
    (server, url)
}

/// Whether QEMU's iscsi driver is here.
fn has_qemu(test: &str) -> bool {
    let module = format!("/usr/lib/{}-linux-gnu/qemu/block-iscsi.so", std::env::consts::ARCH);
    let found = Path::new(&module).exists() || qemu_io_program().is_absolute();
    if !found {
        println!("SKIP {test}: qemu-block-extra of the version of qemu-utils is not installed");
    }
    found
}

/// By its path if `cargo xtask test` has unpacked it.
fn qemu_io_program() -> PathBuf {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/peers/bin/qemu-io");
    if unpacked.is_file() { unpacked } else { PathBuf::from("qemu-io") }
}

fn qemu_io(url: &str, script: &[&str]) -> Child {
    let commands = script.iter().flat_map(|command| ["-c", command]);
    let mut command = Command::new("stdbuf");
    command.arg("-oL").arg(qemu_io_program()).args(["-f", "raw", "-t", "none"]).args(commands).arg(url);
    command
        .stdout(Stdio::piped())
        .stderr(Stdio::inherit())
        .spawn()
        .expect("stdbuf of coreutils, and Debian's qemu-utils")
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

#[test]
fn a_parked_read_holds_up_nobody_else() {
    if !has_qemu("a_parked_read_holds_up_nobody_else") {
        return;
    }
    let disk = Disk::new();
    let (server, url) = serve(&disk);
    disk.parked_from.store(8 << 20, Ordering::SeqCst);
    let script =
        ["aio_read -P 9 8M 64k", "write -P 5 1M 256k", "read -P 5 1M 256k", "flush", "read -P 7 0 4k", "aio_flush"];
    let mut child = qemu_io(&url, &script);
    let mut out = BufReader::new(child.stdout.take().unwrap()).lines();
    let mut said = Vec::new();
    while !said.iter().any(|line: &String| line.starts_with("read 4096/4096")) {
        said.push(out.next().expect("more output").unwrap());
    }
    assert!(!said.iter().any(|line| line.contains("8388608")), "it was answered before its bytes were here: {said:?}");
    wait_until("the read is parked", || !disk.parked.lock().unwrap().is_empty());
    for (_, length, sink) in disk.parked.lock().unwrap().drain(..) {
        sink.complete(Ok(&vec![9; length]));
    }
    said.extend(out.map(Result::unwrap));
    assert!(child.wait().unwrap().success());
    let said = said.join("\n");
    assert!(
        said.contains("read 65536/65536 bytes at offset 8388608") && !said.contains("rror") && !said.contains("failed"),
        "{said}"
    );
    assert_eq!(server.served().refused, 0);
    assert!(server.served().bytes_read >= (64 + 256 + 4) << 10);
}

#[test]
fn requests_wait_until_the_export_is_ready() {
    if !has_qemu("requests_wait_until_the_export_is_ready") {
        return;
    }
    let disk = Disk::new();
    disk.ready.store(false, Ordering::SeqCst);
    let (server, url) = serve(&disk);
    // Logging in and asking what it is does not touch the medium.
    let capacity = Command::new("iscsi-readcapacity16").args(["-s", &url]).output().expect("Debian's libiscsi-bin");
    assert!(capacity.status.success());
    let mut child = qemu_io(&url, &["read -P 7 0 64k"]);
    wait_until("QEMU is logged in", || !server.initiators().is_empty());
    assert!(child.try_wait().unwrap().is_none());
    disk.ready.store(true, Ordering::SeqCst);
    server.wake();
    assert!(child.wait().unwrap().success());
}

#[test]
fn closing_ends_sessions_with_parked_reads_and_late_answers_do_no_harm() {
    if !has_qemu("closing_ends_sessions_with_parked_reads_and_late_answers_do_no_harm") {
        return;
    }
    let disk = Disk::new();
    let (server, url) = serve(&disk);
    disk.parked_from.store(8 << 20, Ordering::SeqCst);
    let mut child = qemu_io(&url, &["read 8M 64k"]);
    wait_until("the read is parked", || !disk.parked.lock().unwrap().is_empty());
    let begun = Instant::now();
    server.close();
    assert!(begun.elapsed() < Duration::from_secs(5), "closing took {:?}", begun.elapsed());
    assert_eq!(server.served().connections, 0);
    for (_, length, sink) in disk.parked.lock().unwrap().drain(..) {
        sink.complete(Ok(&vec![9; length]));
    }
    // QEMU would try to connect for long.
    child.kill().unwrap();
    child.wait().unwrap();
}
