//! A clone over a real session: a sealed volume exported by NBD over TCP, and the engine that fills from it.

use std::net::{Ipv4Addr, SocketAddr};
use std::path::Path;
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use decant_base::{Epoch, ExtentSet};
use decant_clone::Shape;
use decant_dataplane_user::device::ReadSink;
use decant_dataplane_user::engine::{Engine, Files, Mode, Options, boot_id, open_image};
use decant_dataplane_user::export::{Address, Server};
use decant_dataplane_user::fuse::Served;
use decant_dataplane_user::origin::{self, Remote, Timing};
use decant_luks2::{SectorCipher, VolumeKey};
use rustix::io::Errno;

const PATIENCE: Duration = Duration::from_secs(30);
const SIZE: u64 = 64 << 20;

fn open(directory: &Path, header: u64, mode: Mode) -> Arc<Engine> {
    let image = directory.join("volume.img");
    let file = std::fs::OpenOptions::new().write(true).create(true).truncate(false).open(&image).unwrap();
    file.set_len(header + SIZE).unwrap();
    let key: Vec<u8> = (0..64).map(|n| n * 3 + 1).collect();
    let disk = Files::new(open_image(&image).unwrap(), &image, header, SIZE, directory.join("volume.map"));
    Engine::open(Options {
        volume: "orders".parse().unwrap(),
        shape: Shape::new(SIZE, 4096).unwrap(),
        mode,
        disk: Arc::new(disk),
        cipher: Arc::new(SectorCipher::new(&VolumeKey::from_bytes(&key).unwrap(), 4096, 0).unwrap()),
        boot: boot_id().unwrap(),
    })
    .unwrap()
}

fn directory() -> tempfile::TempDir {
    tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap()
}

fn pattern(offset: u64, length: usize, version: u64) -> Vec<u8> {
    (0..length as u64 / 8)
        .flat_map(|n| (((offset / 8 + n + 1) * 0x9E37_79B9) ^ (version << 40)).to_le_bytes())
        .collect()
}

/// 12 MiB live in three runs.
fn source(directory: &Path) -> (Arc<Engine>, ExtentSet) {
    let engine = open(directory, 16 << 20, Mode::Plain);
    for start in [0, 20 << 20, 60 << 20] {
        for at in (start..start + (4 << 20)).step_by(1 << 20) {
            engine.write(at, &mut pattern(at, 1 << 20, 0)).unwrap();
        }
    }
    let live = engine.seal().unwrap();
    assert_eq!(live.len(), (12 << 20) / 4096);
    (engine, live)
}

fn listen(engine: &Arc<Engine>, port: u16) -> (Server, SocketAddr) {
    let address = SocketAddr::from((Ipv4Addr::LOCALHOST, port));
    let server = Server::listen(&Address::Tcp(address), None, "move-1", engine.as_exported()).unwrap();
    let Address::Tcp(address) = *server.local_addr() else { panic!("not TCP") };
    (server, address)
}

fn connect(engine: &Arc<Engine>, address: SocketAddr) {
    let options = origin::Options {
        address: Address::Tcp(address),
        tls: None,
        export: "move-1".into(),
        size: Some(SIZE),
        digests: true,
        connections: 3,
        timing: Timing { backoff_max: Duration::from_millis(50), ..Timing::NETWORK },
    };
    let origin = Remote::open(options, engine.clone()).unwrap();
    engine.set_origin(origin, &address.to_string());
}

struct Sink(mpsc::Sender<Result<Vec<u8>, Errno>>);

impl ReadSink for Sink {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        let _ = self.0.send(result.map(<[u8]>::to_vec));
    }
}

fn start_read(engine: &Engine, offset: u64, length: usize) -> mpsc::Receiver<Result<Vec<u8>, Errno>> {
    let (sender, receiver) = mpsc::channel();
    let mut buffer = vec![0xEE; length];
    match engine.read(offset, &mut buffer).unwrap() {
        Served::Done => sender.send(Ok(buffer)).unwrap(),
        Served::Missing => engine.park(offset, length, Box::new(Sink(sender))),
    }
    receiver
}

fn read(engine: &Engine, offset: u64, length: usize) -> Vec<u8> {
    start_read(engine, offset, length).recv_timeout(PATIENCE).expect("the read is answered").unwrap()
}

fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::yield_now();
    }
}

fn is_whole(engine: &Engine) -> bool {
    engine.status().is_none_or(|status| status.bytes_missing == 0)
}

fn check(engine: &Engine, live: &ExtentSet) {
    for at in (0..SIZE).step_by(256 << 10) {
        let want = if live.contains(at / 4096) { pattern(at, 256 << 10, 0) } else { vec![0; 256 << 10] };
        assert!(read(engine, at, 256 << 10) == want, "at {at}");
    }
}

#[test]
fn a_volume_fills_over_nbd_is_verified_and_turns_plain() {
    let (from, to) = (directory(), directory());
    let (source, live) = source(from.path());
    let (server, address) = listen(&source, 0);
    let clone = open(to.path(), 4 << 20, Mode::Prepared);
    connect(&clone, address);
    clone.begin(live.clone(), Epoch(2)).unwrap();
    check(&clone, &live);
    wait_until("hydration", || is_whole(&clone));
    assert_eq!(clone.status().unwrap().bytes_fetched, 12 << 20, "every block once, holes not at all");
    let verification = clone.verify().unwrap();
    assert_eq!((verification.compared, verification.repaired), (live.len(), 0));
    drop(server);
    clone.drop_map().unwrap();
    check(&clone, &live);
    assert_eq!(clone.allocated().unwrap(), 12 << 20);
}

#[test]
fn an_origin_that_goes_and_comes_back_is_waited_for() {
    let (from, to) = (directory(), directory());
    let (source, live) = source(from.path());
    let (server, address) = listen(&source, 0);
    let clone = open(to.path(), 4 << 20, Mode::Prepared);
    clone.set_limit(Some(1 << 20));
    connect(&clone, address);
    clone.begin(live.clone(), Epoch(2)).unwrap();
    assert!(read(&clone, 20 << 20, 4096) == pattern(20 << 20, 4096, 0));
    drop(server);
    wait_until("the loss", || !clone.status().unwrap().connected);
    let waiting: Vec<_> =
        (0..90).map(|n| ((60 << 20) + n * 8192, start_read(&clone, (60 << 20) + n * 8192, 4096))).collect();
    clone.write(1 << 20, &mut pattern(1 << 20, 4096, 7)).unwrap();
    clone.flush().unwrap();
    assert!(clone.status().unwrap().hindrance.starts_with("STALLED"));
    clone.set_limit(None);
    let (_server, _) = listen(&source, address.port());
    for (at, waiting) in waiting {
        assert!(waiting.recv_timeout(PATIENCE).unwrap().unwrap() == pattern(at, 4096, 0), "at {at}");
    }
    wait_until("hydration", || is_whole(&clone));
    let verification = clone.verify().unwrap();
    assert_eq!((verification.overwritten, verification.repaired), (1, 0));
    assert!(read(&clone, 1 << 20, 4096) == pattern(1 << 20, 4096, 7));
}
