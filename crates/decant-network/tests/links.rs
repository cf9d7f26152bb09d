//! Links of machines between two workers of a lab. Needs root.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddrV6, TcpListener, TcpStream};
use std::time::{Duration, Instant};

use decant_base::MachineId;
use decant_network::{
    Lab, MachineAddress, MachineLink, NetNs, Shape, ensure_machine_link, ensure_route, ensure_worker,
    remove_machine_link, worker_prefix,
};

/// A lab called `name`; `None`, said as `SKIP <test>: <why>`, where this machine makes none.
fn lab(test: &str, name: &str, workers: u32) -> Option<Lab> {
    if !rustix::process::geteuid().is_root() {
        println!("SKIP {test}: network namespaces need root");
        return None;
    }
    Some(Lab::create(&format!("test-{name}-{}", std::process::id()), workers).expect("a lab"))
}

fn link(lab: &Lab, worker: u32, name: &str, machine: u32) -> MachineLink {
    let id = MachineId::new(name).expect("an id");
    let run_dir = lab.directory().join(format!("run-{worker}"));
    MachineLink::new(&run_dir, &id, MachineAddress { network: 1, worker, machine })
}

fn route_all(lab: &Lab, workers: u32) {
    for here in 1..=workers {
        lab.enter(here, || {
            ensure_worker(worker_prefix(1, here)).map_err(io::Error::other)?;
            for there in (1..=workers).filter(|there| *there != here) {
                ensure_route(worker_prefix(1, there), lab.address(there)).map_err(io::Error::other)?;
            }
            Ok(())
        })
        .expect("routes");
    }
}

/// A listener inside the machine that answers each connection with its own name.
fn serve(link: &MachineLink, answer: &'static str) -> std::thread::JoinHandle<()> {
    let listener = NetNs::open(&link.netns)
        .and_then(|netns| netns.run(|| TcpListener::bind((Ipv6Addr::UNSPECIFIED, 80))))
        .expect("a listener on port 80");
    std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(answer.as_bytes()).expect("an answer");
    })
}

fn ask(lab: &Lab, from: u32, address: Ipv6Addr) -> io::Result<String> {
    lab.enter(from, || {
        let mut stream =
            TcpStream::connect_timeout(&SocketAddrV6::new(address, 80, 0, 0).into(), Duration::from_secs(5))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    })
}

#[test]
fn a_machine_is_reached_from_both_workers_and_follows_its_address() {
    let Some(lab) = lab("a_machine_is_reached_from_both_workers_and_follows_its_address", "reach", 2) else { return };
    route_all(&lab, 2);
    let (here, there) = (link(&lab, 1, "orders", 7), link(&lab, 2, "orders", 7));
    let began = Instant::now();
    lab.enter(1, || ensure_machine_link(&here).map_err(io::Error::other)).expect("a link");
    println!("link made in {:?}", began.elapsed());
    lab.enter(2, || ensure_machine_link(&there).map_err(io::Error::other)).expect("a link");

    for (link, name) in [(&here, "one"), (&there, "two")] {
        for from in [1, 2] {
            let server = serve(link, name);
            let began = Instant::now();
            assert_eq!(ask(&lab, from, link.address.address()).expect("an answer"), name);
            assert!(began.elapsed() < Duration::from_millis(500), "first packets took {:?}", began.elapsed());
            server.join().expect("the server");
        }
    }

    // Nobody listens: refused at once. No machine there: unreachable, at once on the worker itself; from a peer over veth the
    // answer comes back while connect() still holds the socket, so the kernel heeds it only on its first retry after 1 s.
    assert_eq!(ask(&lab, 2, here.address.address()).expect_err("refused").kind(), io::ErrorKind::ConnectionRefused);
    lab.enter(1, || remove_machine_link(&here).map_err(io::Error::other)).expect("removed");
    assert!(!here.netns.exists());
    for from in [1, 2] {
        let began = Instant::now();
        let error = ask(&lab, from, here.address.address()).expect_err("unreachable");
        assert!(
            matches!(error.kind(), io::ErrorKind::HostUnreachable | io::ErrorKind::NetworkUnreachable),
            "worker {from}: {error:?}"
        );
        assert!(began.elapsed() < Duration::from_millis(2500), "worker {from} took {:?}: {error}", began.elapsed());
    }
    lab.destroy().expect("destroyed");
}

#[test]
fn a_link_is_made_once_and_mended() {
    let Some(lab) = lab("a_link_is_made_once_and_mended", "mend", 1) else { return };
    let link = link(&lab, 1, "orders", 7);
    lab.enter(1, || {
        for _ in 0..3 {
            ensure_machine_link(&link).map_err(io::Error::other)?;
        }
        // The namespace is lost, as after its processes ended and someone unpinned it: the stale end is replaced.
        NetNs::remove(&link.netns)?;
        ensure_machine_link(&link).map_err(io::Error::other)?;
        let server = serve(&link, "mended");
        let mut answer = String::new();
        TcpStream::connect((link.address.address(), 80))?.read_to_string(&mut answer)?;
        assert_eq!(answer, "mended");
        server.join().expect("the server");
        for _ in 0..2 {
            remove_machine_link(&link).map_err(io::Error::other)?;
        }
        Ok(())
    })
    .expect("a mended link");
}

#[test]
fn a_lab_counts_bytes_can_be_cut_and_leaves_nothing() {
    let Some(lab) = lab("a_lab_counts_bytes_can_be_cut_and_leaves_nothing", "lab", 2) else { return };
    let directory = lab.directory().to_owned();
    let before = lab.counters(2).expect("counters");
    let address = lab.address(1);
    let listener = lab.enter(1, || TcpListener::bind((address, 0))).expect("a listener");
    let port = listener.local_addr().expect("an address").port();
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(&vec![7; 1 << 20]).expect("a MiB");
    });
    let mut bytes = Vec::new();
    lab.enter(2, || TcpStream::connect((address, port))?.read_to_end(&mut bytes)).expect("a MiB");
    server.join().expect("the server");
    let after = lab.counters(2).expect("counters");
    let received = after.received_bytes - before.received_bytes;
    assert!((1 << 20..(1 << 20) + 200_000).contains(&received), "{received}");

    lab.set_connected(1, false).expect("cut");
    let cut = lab.enter(2, || {
        TcpStream::connect_timeout(&SocketAddrV6::new(address, port, 0, 0).into(), Duration::from_millis(100))
    });
    assert!(cut.is_err());
    lab.set_connected(1, true).expect("joined");
    let refused = lab.enter(2, || TcpStream::connect((address, port))).expect_err("nobody listens");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);

    // What still runs in the lab ends with it.
    let mut child = lab
        .spawn(1, std::process::Command::new("/bin/sh").args(["-c", "read x"]).stdin(std::process::Stdio::piped()))
        .expect("a child");
    lab.destroy().expect("destroyed");
    assert!(!child.wait().expect("its end").success());
    assert!(!directory.exists());
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mounts");
    assert!(!table.contains(&*directory.to_string_lossy()));
}

#[test]
fn shaped_links_have_the_rate_and_the_delay_they_were_given() {
    if !rustix::process::geteuid().is_root() || !std::path::Path::new("/dev/net/tun").exists() {
        println!("SKIP shaped_links_have_the_rate_and_the_delay_they_were_given: needs root and /dev/net/tun");
        return;
    }
    let shape = Shape { bits_per_s: 100_000_000, delay: Duration::from_millis(5) };
    let lab = Lab::create_shaped(&format!("test-shape-{}", std::process::id()), 2, shape).expect("a lab");
    route_all(&lab, 2);
    let link = link(&lab, 1, "orders", 7);
    lab.enter(1, || ensure_machine_link(&link).map_err(io::Error::other)).expect("a link");
    let server = serve(&link, "shaped");
    let began = Instant::now();
    assert_eq!(ask(&lab, 2, link.address.address()).expect("an answer"), "shaped");
    let took = began.elapsed();
    server.join().expect("the server");
    // There and back for the handshake, and one way for the answer that the server sends unasked.
    assert!(took >= Duration::from_millis(15) && took < Duration::from_millis(300), "{took:?}");

    let address = lab.address(1);
    let listener = lab.enter(1, || TcpListener::bind((address, 0))).expect("a listener");
    let port = listener.local_addr().expect("an address").port();
    const BYTES: usize = 6 << 20;
    let server = std::thread::spawn(move || {
        let (mut stream, _) = listener.accept().expect("a connection");
        stream.write_all(&vec![7; BYTES]).expect("sent");
    });
    let mut bytes = Vec::new();
    let began = Instant::now();
    lab.enter(2, || TcpStream::connect((address, port))?.read_to_end(&mut bytes)).expect("received");
    let took = began.elapsed();
    server.join().expect("the server");
    let mbit = BYTES as f64 * 8.0 / took.as_secs_f64() / 1e6;
    println!("{mbit:.0} Mbit/s");
    assert_eq!(bytes.len(), BYTES);
    assert!((30.0..101.0).contains(&mbit), "{mbit:.0} Mbit/s");
    let counted = lab.counters(2).expect("counters").received_bytes as usize;
    assert!((BYTES..BYTES + BYTES / 25).contains(&counted), "{counted}");

    lab.set_connected(1, false).expect("cut");
    let cut = lab.enter(2, || {
        TcpStream::connect_timeout(&SocketAddrV6::new(address, port, 0, 0).into(), Duration::from_millis(100))
    });
    assert_eq!(cut.expect_err("cut").kind(), io::ErrorKind::TimedOut);
    lab.set_connected(1, true).expect("joined");
    let refused = lab.enter(2, || TcpStream::connect((address, port))).expect_err("nobody listens");
    assert_eq!(refused.kind(), io::ErrorKind::ConnectionRefused);
    lab.destroy().expect("destroyed");
}
