//! Targets that die, hang, are cut off and lie: every request is answered in the end, and only with what is true.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use decant_dataplane_user::device::{Fetch, Origin as _, Want};
use decant_dataplane_user::origin::IscsiOptions;

use crate::fixture::{Disk, fetch, image, open};
use crate::world::{Shape, listen, options, serve};

#[test]
fn a_target_that_ends_and_comes_back_answers_everything() {
    let bytes = image(4 << 20);
    let (mut server, disk, address) = serve(Disk::new(bytes.clone()), &Shape::default());
    let (origin, recorder) = open(options(address));
    for token in 0..256 {
        origin.request(fetch(token, token as usize * 16_384, 16_384));
    }
    for _ in 0..4 {
        let up =
            recorder.wait(|answers| answers.links.last().is_some_and(|(up, _)| *up).then_some(answers.links.len()));
        drop(server);
        recorder.wait(|answers| (answers.links.len() > up).then_some(()));
        server = listen(address, &Shape::default(), disk.clone());
    }
    recorder.wait_done(0..256);
    recorder.check(&bytes, 0..bytes.len());
    assert!(origin.sessions() >= 5);
    recorder.close(&origin);
    drop(server);
}

#[test]
fn another_disk_behind_the_same_name_is_never_read() {
    let bytes = image(1 << 20);
    let (server, disk, address) = serve(Disk::new(bytes.clone()), &Shape::default());
    let (origin, recorder) = open(options(address));
    origin.wait_connected(Duration::from_secs(5)).unwrap();
    drop(server);
    recorder.wait_down("");
    for (what, shape, size) in [
        ("serial number differs", Shape { serial: "0002", ..Shape::default() }, 1 << 20),
        ("size differs", Shape::default(), 2 << 20),
        ("block size differs", Shape { block_bytes: 4096, ..Shape::default() }, 1 << 20),
    ] {
        let other = listen(address, &shape, Arc::new(Disk::new(vec![0xaa; size])));
        origin.request(Fetch { urgent: true, ..fetch(what.len() as u64, 0, 4096) });
        recorder.wait_down(what);
        drop(other);
    }
    let server = listen(address, &Shape::default(), disk);
    recorder.wait_done("size differs".len() as u64..13);
    recorder.check(&bytes, 0..4096);
    recorder.close(&origin);
    drop(server);
}

#[test]
fn a_disk_that_hangs_is_noticed_although_its_target_answers_pings() {
    let bytes = image(4 << 20);
    let (_server, disk, address) = serve(Disk::new(bytes.clone()), &Shape::default());
    let (origin, recorder) = open(IscsiOptions { connections: 1, ..options(address) });
    origin.wait_connected(Duration::from_secs(5)).unwrap();
    *disk.gate.lock().unwrap() = Some(0);
    for token in 0..8 {
        origin.request(fetch(token, token as usize * 65_536, 65_536));
    }
    recorder.wait_down("not a byte for 0.3 s while it owes an answer");
    // The session is not made again while the old one's reads are under way.
    recorder.wait_down("no session within 0.5 s");
    *disk.gate.lock().unwrap() = None;
    disk.gate_changed.notify_all();
    recorder.wait_done(0..8);
    recorder.check(&bytes, 0..524_288);
    recorder.close(&origin);
}

#[test]
fn closing_does_not_wait_for_a_target_that_stands_still() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let (origin, recorder) = open(options(listener.local_addr().unwrap()));
    origin.request(fetch(0, 0, 4096));
    recorder.wait_down("no session within 0.5 s");
    let started = Instant::now();
    recorder.close(&origin);
    assert!(started.elapsed() < Duration::from_secs(1));
}

/// CVE-2024-7409: QEMU's NBD server fell over connections that said nothing while it ended.
#[test]
fn idle_connections_do_not_hold_up_a_shutdown() {
    let (server, _disk, address) = serve(Disk::new(image(1 << 20)), &Shape::default());
    let idle: Vec<TcpStream> = (0..20).map(|_| TcpStream::connect(address).unwrap()).collect();
    let (origin, recorder) = open(options(address));
    crate::fixture::eventually("all sessions are up", || origin.sessions() == 3);
    let started = Instant::now();
    server.close();
    assert!(started.elapsed() < Duration::from_secs(2), "{:?}", started.elapsed());
    recorder.wait_down("");
    for mut stream in idle {
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        assert!(matches!(stream.read(&mut [0; 1]), Ok(0) | Err(_)), "it is closed");
    }
    recorder.close(&origin);
}

/// What a proxy does to what the target says: connection's number, position in what was said, the bytes; how many to pass on.
type Fault = Arc<dyn Fn(u64, u64, &mut [u8]) -> usize + Send + Sync>;

/// Stands between initiator and target.
struct Proxy {
    address: SocketAddr,
    ends: Arc<AtomicBool>,
    said: Arc<AtomicU64>,
    acceptor: Option<JoinHandle<()>>,
}

impl Proxy {
    fn new(target: SocketAddr, fault: Fault) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let (ends, said) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (ending, saying) = (ends.clone(), said.clone());
        let acceptor = std::thread::spawn(move || {
            for (number, client) in (0..).zip(listener.incoming()) {
                let Ok(client) = client else { continue };
                if ending.load(Ordering::SeqCst) {
                    return;
                }
                let Ok(upstream) = TcpStream::connect(target) else { continue };
                let (mut from, mut to) = (client.try_clone().unwrap(), upstream.try_clone().unwrap());
                std::thread::spawn(move || {
                    let _ = std::io::copy(&mut from, &mut to);
                    let _ = to.shutdown(Shutdown::Both);
                });
                let (fault, said) = (fault.clone(), saying.clone());
                std::thread::spawn(move || pass(number, upstream, client, &*fault, &said));
            }
        });
        Self { address, ends, said, acceptor: Some(acceptor) }
    }
}

fn pass(
    number: u64,
    mut from: TcpStream,
    mut to: TcpStream,
    fault: &dyn Fn(u64, u64, &mut [u8]) -> usize,
    said: &AtomicU64,
) {
    let (mut buffer, mut position) = (vec![0; 65_536], 0);
    while let Ok(count @ 1..) = from.read(&mut buffer) {
        let passed = fault(number, position, &mut buffer[..count]);
        position += count as u64;
        said.fetch_max(position, Ordering::SeqCst);
        if to.write_all(&buffer[..passed]).is_err() || passed < count {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
    let _ = from.shutdown(Shutdown::Both);
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.ends.store(true, Ordering::SeqCst);
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

/// Two reads, one of them of a hole, and digests, by way of a proxy.
fn read_through(target: SocketAddr, bytes: &[u8], fault: Fault) -> u64 {
    let proxy = Proxy::new(target, fault);
    let (origin, recorder) = open(IscsiOptions { connections: 1, ..options(proxy.address) });
    origin.request(fetch(0, 0, 8192));
    origin.request(fetch(1, 131_072, 65_536));
    origin.request(Fetch { want: Want::Digests, ..fetch(2, 0, 8192) });
    recorder.wait_done(0..3);
    recorder.check(bytes, 0..8192);
    recorder.check(bytes, 131_072..196_608);
    for block in 0..2 {
        let found = recorder.answers.lock().unwrap().digests[&block];
        assert_eq!(found, crc32c::crc32c(&bytes[block as usize * 4096..][..4096]));
    }
    recorder.close(&origin);
    proxy.said.load(Ordering::SeqCst)
}

#[test]
fn a_connection_cut_anywhere_is_made_again() {
    let bytes = image(1 << 20);
    let (_server, _disk, address) = serve(Disk::new(bytes.clone()), &Shape::default());
    let total = read_through(address, &bytes, Arc::new(|_, _, bytes: &mut [u8]| bytes.len()));
    assert!((8192..20_000).contains(&total), "the hole is not sent: {total}");
    for cut in (0..total).step_by(41) {
        let at = move |number: u64, position: u64, bytes: &mut [u8]| {
            if number == 0 { cut.saturating_sub(position).min(bytes.len() as u64) as usize } else { bytes.len() }
        };
        read_through(address, &bytes, Arc::new(at));
    }
}

#[test]
fn a_bit_flipped_anywhere_harms_nothing() {
    let bytes = image(1 << 20);
    let (_server, _disk, address) = serve(Disk::new(bytes.clone()), &Shape::default());
    let total = read_through(address, &bytes, Arc::new(|_, _, bytes: &mut [u8]| bytes.len()));
    // Not in the login, whose bytes no digest covers: there a flip can ask for the impossible, and waits for the deadline.
    for (index, flip) in (2048..total).step_by(97).enumerate() {
        let at = move |number: u64, position: u64, bytes: &mut [u8]| {
            if number == 0
                && let Some(byte) = flip.checked_sub(position).and_then(|at| bytes.get_mut(at as usize))
            {
                *byte ^= 1 << (index % 8);
            }
            bytes.len()
        };
        read_through(address, &bytes, Arc::new(at));
    }
}
