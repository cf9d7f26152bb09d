//! Mutual TLS: the one peer that was named gets in, everybody else gets a reason.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use decant_dataplane_user::device::Origin as _;
use decant_dataplane_user::export::{Address, Server};
use decant_dataplane_user::origin::Options;
use decant_dataplane_user::tls::{ClientTls, Fingerprint, Identity, Paths, TlsError};

use crate::fixture::{Authority, Disk, Peer, fetch, image, localhost, nobody, open, options, run, succeed};

struct Fleet {
    authority: Authority,
    source: Identity,
    destination: Identity,
    server: Server,
    bytes: Vec<u8>,
}

impl Fleet {
    fn new() -> Self {
        let authority = Authority::new();
        let (source, destination) = (authority.identity("worker-1"), authority.identity("worker-2"));
        let bytes = image(4 << 20);
        let tls = source.server(destination.fingerprint()).unwrap();
        let disk = Arc::new(Disk::new(bytes.clone()));
        let server = Server::listen(&localhost(), Some(tls), "volume", disk).unwrap();
        Self { authority, source, destination, server, bytes }
    }

    fn connect(&self, tls: Option<ClientTls>) -> Options {
        Options { tls, ..options(self.server.local_addr(), "volume") }
    }

    /// Why a client with `tls` gets no session.
    fn refusal(&self, tls: Option<ClientTls>, text: &str) -> String {
        let (origin, recorder) = open(self.connect(tls));
        origin.request(fetch(0, 0, 4096));
        let reason = recorder.wait_down(text);
        assert!(recorder.answers.lock().unwrap().done.is_empty(), "nothing is answered");
        recorder.close(&origin);
        reason
    }
}

#[test]
fn the_peer_that_was_named_gets_in() {
    let fleet = Fleet::new();
    let tls = fleet.destination.client(fleet.source.fingerprint()).unwrap();
    let (origin, recorder) = open(fleet.connect(Some(tls)));
    for token in 0..16 {
        origin.request(fetch(token, token as usize * 262_144, 262_144));
    }
    origin.request(fetch(16, 4096, 4096));
    recorder.wait_done(0..17);
    recorder.check(&fleet.bytes, 0..fleet.bytes.len());
    assert_eq!(fleet.server.served().refused, 0);
    recorder.close(&origin);
}

#[test]
fn everybody_else_gets_a_reason() {
    let fleet = Fleet::new();
    let source = fleet.source.fingerprint();
    // The server is not the one that was named.
    let reason = fleet.refusal(Some(fleet.destination.client(nobody()).unwrap()), "fingerprint");
    assert!(reason.contains(&source.to_string()) && reason.contains(&nobody().to_string()), "{reason}");
    // The client is not: a worker of the same fleet.
    let other = fleet.authority.identity("worker-3");
    let reason = fleet.refusal(Some(other.client(source).unwrap()), "refused us");
    assert!(reason.starts_with("the peer refused us: TLS alert"), "{reason}");
    // Another fleet altogether, seen from either side.
    let foreign = Authority::new().identity("worker-2");
    let reason = fleet.refusal(Some(foreign.client(source).unwrap()), "CA");
    assert_eq!(reason, "the peer's certificate is not from this fleet's CA");
    let (_, paths) = fleet.authority.issue("mixed", "worker");
    let elsewhere = Authority::new();
    let (_, theirs) = elsewhere.issue("worker-2", "worker");
    let stranger = Identity::load(&Paths { ca: paths.ca, ..theirs }).unwrap();
    fleet.refusal(Some(stranger.client(source).unwrap()), "the peer refused us: TLS alert");
    // No TLS at all.
    let reason = fleet.refusal(None, "TLS");
    assert!(reason.contains("the server requires TLS"), "{reason}");
    assert!(fleet.server.served().refused >= 4);
    assert_eq!(fleet.server.served().bytes_read, 0);
}

#[test]
fn a_client_without_certificate_stays_out() {
    let fleet = Fleet::new();
    let Address::Tcp(address) = fleet.server.local_addr() else { unreachable!() };
    let (certificates, paths) = fleet.authority.issue("nameless", "client");
    let uri = format!("nbds://localhost:{}/volume?tls-certificates={}", address.port(), certificates.display());
    // With a certificate that was not named, then without any.
    assert!(!run("nbdinfo", &[&uri]).status.success());
    std::fs::remove_file(paths.cert).unwrap();
    std::fs::remove_file(paths.key).unwrap();
    assert!(!run("nbdinfo", &[&uri]).status.success());
    assert!(fleet.server.served().refused >= 2);
}

#[test]
fn stock_peers_talk_tls_with_us() {
    // libnbd (GnuTLS) as the client that was named.
    let authority = Authority::new();
    let source = authority.identity("localhost");
    let (certificates, paths) = authority.issue("client", "client");
    let named = Identity::load(&paths).unwrap().fingerprint();
    let bytes = image(4 << 20);
    let disk = Arc::new(Disk::new(bytes.clone()));
    let server = Server::listen(&localhost(), Some(source.server(named).unwrap()), "volume", disk).unwrap();
    let port = server.local_addr().port().unwrap();
    let uri = format!("nbds://localhost:{port}/volume?tls-certificates={}", certificates.display());
    let file = authority.directory.path().join("copy.img");
    succeed("nbdcopy", &[&uri, file.to_str().unwrap()]);
    assert!(std::fs::read(&file).unwrap() == bytes);
    // nbdkit (GnuTLS) as the server that was named.
    let (certificates, paths) = authority.issue("nbdkit", "server");
    let pinned = Identity::load(&paths).unwrap().fingerprint();
    let socket = authority.directory.path().join("kit.sock");
    let directory = format!("--tls-certificates={}", certificates.display());
    let arguments = ["--tls=require", "--tls-verify-peer", &directory, "-r", "file", file.to_str().unwrap()];
    let _peer = Peer::nbdkit(&socket, &arguments);
    let tls = authority.identity("worker-2").client(pinned).unwrap();
    let (origin, recorder) = open(Options { tls: Some(tls), ..options(&Address::Unix(socket), "") });
    for token in 0..16 {
        origin.request(fetch(token, token as usize * 262_144, 262_144));
    }
    recorder.wait_done(0..16);
    recorder.check(&bytes, 0..bytes.len());
    recorder.close(&origin);
}

/// What is said in the clear right behind STARTTLS is not taken as said inside TLS, nor is a half handshake waited for.
#[test]
fn plaintext_behind_starttls_ends_the_connection() {
    let fleet = Fleet::new();
    let Address::Tcp(address) = fleet.server.local_addr() else { unreachable!() };
    for injected in [&b""[..], b"IHAVEOPT\0\0\0\x08\0\0\0\0", b"\x16\x03\x01\x40\x01garbage"] {
        let mut stream = TcpStream::connect(address).unwrap();
        stream.set_read_timeout(Some(Duration::from_secs(5))).unwrap();
        let hello = b"\0\0\0\x03IHAVEOPT\0\0\0\x05\0\0\0\0";
        stream.write_all(&[&hello[..], injected].concat()).unwrap();
        if injected.is_empty() {
            stream.shutdown(std::net::Shutdown::Write).unwrap();
        }
        let mut said = Vec::new();
        // A reset is as good an end as any.
        let _ = stream.read_to_end(&mut said);
        assert!(said.len() < 200, "{said:?}");
    }
    crate::fixture::eventually("all are refused", || fleet.server.served().refused == 3);
}

#[test]
fn files_that_do_not_fit_are_named() {
    let authority = Authority::new();
    let (_, paths) = authority.issue("worker-1", "worker");
    let (_, others) = authority.issue("worker-2", "worker");
    let load = |paths: Paths| Identity::load(&paths).err().unwrap().to_string();
    let missing = load(Paths { cert: "/nonexistent/cert.pem".into(), ..paths.clone() });
    assert!(missing.starts_with("cannot read the certificate from /nonexistent/cert.pem"), "{missing}");
    let swapped = load(Paths { cert: paths.key.clone(), ..paths.clone() });
    assert!(swapped.contains("holds no certificate"), "{swapped}");
    let mixed = Identity::load(&Paths { key: others.key, ..paths.clone() }).unwrap();
    assert!(matches!(mixed.client(nobody()), Err(TlsError::Unfit(_))));
    assert!(matches!(mixed.server(nobody()), Err(TlsError::Unfit(_))));
    let fingerprint = Identity::load(&paths).unwrap().fingerprint();
    let text = fingerprint.to_string();
    assert_eq!(text.parse::<Fingerprint>().unwrap(), fingerprint);
    let colons: Vec<&str> = text.as_bytes().chunks(2).map(|pair| std::str::from_utf8(pair).unwrap()).collect();
    assert_eq!(colons.join(":").to_uppercase().parse::<Fingerprint>().unwrap(), fingerprint);
    for wrong in ["", "abc", &text[..63], &format!("{text}00"), &text.replace(&text[..1], "g")] {
        assert!(wrong.parse::<Fingerprint>().is_err(), "{wrong}");
    }
}
