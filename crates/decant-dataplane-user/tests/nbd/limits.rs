//! What a server refuses, and that it ends when told to.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpStream};
use std::os::unix::net::UnixStream;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Instant;

use decant_dataplane_user::export::{Address, HANDSHAKE_DEADLINE, ListenError, MAX_CONNECTIONS, Server};

use crate::fixture::{Disk, PATIENCE, Served, eventually, image, localhost, succeed};

/// Reads until the server hangs up; false if it does not.
fn is_hung_up(stream: &mut impl Read) -> bool {
    let mut buffer = [0; 4096];
    loop {
        match stream.read(&mut buffer) {
            Ok(0) => return true,
            Ok(_) => {}
            Err(error) => return error.kind() == std::io::ErrorKind::ConnectionReset,
        }
    }
}

#[test]
fn connections_are_counted() {
    let served = Served::new(Disk::new(image(1 << 20)));
    let mut clients: Vec<UnixStream> =
        (0..MAX_CONNECTIONS).map(|_| UnixStream::connect(&served.socket).unwrap()).collect();
    eventually("all are served", || served.server.served().connections == MAX_CONNECTIONS as u64);
    let mut excess = UnixStream::connect(&served.socket).unwrap();
    excess.set_read_timeout(Some(PATIENCE)).unwrap();
    assert!(is_hung_up(&mut excess));
    clients.truncate(10);
    eventually("some have left", || served.server.served().connections == 10);
    succeed("nbdinfo", &["--size", &served.uri()]);
}

#[test]
fn a_handshake_has_a_deadline() {
    let served = Served::new(Disk::new(image(1 << 20)));
    let started = Instant::now();
    let mut silent = UnixStream::connect(&served.socket).unwrap();
    let mut dripping = silent.try_clone().unwrap();
    silent.set_read_timeout(Some(PATIENCE)).unwrap();
    // Options that keep coming do not extend it; half of one is as good as none.
    dripping.write_all(&[0, 0, 0, 3]).unwrap();
    dripping.write_all(b"IHAVEOPT\0\0\0").unwrap();
    assert!(is_hung_up(&mut silent));
    let took = started.elapsed();
    assert!(took >= HANDSHAKE_DEADLINE && took < HANDSHAKE_DEADLINE * 2, "{took:?}");
    assert_eq!(served.server.served().refused, 1);
}

/// CVE-2024-7409: connections in any state do not outlive, delay or crash a server that is closed.
#[test]
fn closing_ends_connections_in_every_state() {
    let served = Served::new(Disk::new(image(1 << 20)));
    served.disk.ready.store(false, Ordering::SeqCst);
    let connect = |said: &[u8]| {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(said).unwrap();
        stream
    };
    let go = b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x06volume\0\0";
    let read = b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x10\0";
    let write = b"\x25\x60\x95\x13\0\0\0\x01\0\0\0\0\0\0\0\x01\0\0\0\0\0\0\0\0\0\0\x10\0abc";
    let mut clients = [
        connect(b""),
        connect(b"\0\0\0\x03"),
        connect(&go[..20]),
        connect(go),
        connect(&[&go[..], read].concat()),
        connect(&[&go[..], write].concat()),
    ];
    eventually("all are served", || served.server.served().connections == 6);
    let started = Instant::now();
    served.server.close();
    assert!(started.elapsed().as_secs() < 2, "{:?}", started.elapsed());
    assert!(clients.iter_mut().all(is_hung_up));
    assert_eq!(served.server.served().connections, 0);
}

#[test]
fn a_client_that_reads_nothing_or_leaves_holds_up_nobody() {
    let served = Served::new(Disk::new(image(8 << 20)));
    let mut greedy = UnixStream::connect(&served.socket).unwrap();
    greedy.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x07\0\0\0\x0c\0\0\0\x06volume\0\0").unwrap();
    for cookie in 0..64u8 {
        let mut read = *b"\x25\x60\x95\x13\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\0\x10\0\0";
        read[15] = cookie;
        greedy.write_all(&read).unwrap();
    }
    succeed("nbdcopy", &[&served.uri(), "null:"]);
    greedy.shutdown(Shutdown::Both).unwrap();
    eventually("it is gone", || served.server.served().connections == 0);
    // The same, but the server is closed while it sends.
    let again = UnixStream::connect(&served.socket).unwrap();
    served.server.close();
    drop(again);
}

#[test]
fn what_cannot_be_served_is_said_so() {
    let disk = || Arc::new(Disk::new(image(1 << 16)));
    let server = Server::listen(&localhost(), None, "volume", disk()).unwrap();
    let taken = Server::listen(server.local_addr(), None, "volume", disk()).err().unwrap();
    assert!(matches!(&taken, ListenError::Bind { .. }), "{taken}");
    assert!(taken.to_string().contains("Address already in use"), "{taken}");
    let long = "x".repeat(5000);
    assert!(matches!(Server::listen(&localhost(), None, &long, disk()), Err(ListenError::Inexpressible)));
    // The same port can be had again at once, also after connections were open.
    let Address::Tcp(address) = server.local_addr().clone() else { unreachable!() };
    let client = TcpStream::connect(address).unwrap();
    eventually("it is served", || server.served().connections == 1);
    drop(server);
    drop(client);
    Server::listen(&Address::Tcp(address), None, "volume", disk()).unwrap();
}
