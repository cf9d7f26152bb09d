//! Our client, with our server and with stock ones.

use std::io::{Read, Write};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use decant_dataplane_user::device::{Fetch, Origin as _, Want};
use decant_dataplane_user::export::Address;
use decant_dataplane_user::origin::Options;
use decant_nbd::{BlockSizes, Command, Contexts, ExportInfo, TransmissionFlags, server};
use rustix::io::Errno;

use crate::fixture::{BLOCK, Disk, Peer, Served, fetch, image, open, options};

#[test]
fn data_holes_and_digests_come_from_our_server() {
    let bytes = image((8 << 20) + 512);
    let served = Served::new(Disk { read_only: true, ..Disk::new(bytes.clone()) });
    let address = served.server.local_addr().clone();
    let (origin, recorder) = open(Options { size: Some(bytes.len() as u64), ..options(&address, "volume") });
    let export = origin.wait_connected(Duration::from_secs(5)).unwrap();
    assert_eq!(export.size, bytes.len() as u64);
    for token in 0..32 {
        origin.request(fetch(token, token as usize * 262_144, 262_144));
    }
    origin.request(fetch(32, 8 << 20, 512));
    let digests = |token, offset: usize, length: usize| Fetch { want: Want::Digests, ..fetch(token, offset, length) };
    origin.request(digests(33, 0, 8 << 20));
    origin.request(digests(34, 8 << 20, 512));
    recorder.wait_done(0..35);
    recorder.check(&bytes, 0..bytes.len());
    let answers = recorder.answers.lock().unwrap();
    assert_eq!(answers.digests.len(), 2049);
    for (block, expected) in bytes.chunks(BLOCK).enumerate() {
        assert_eq!(answers.digests[&(block as u64)], crc32c::crc32c(expected), "block {block}");
    }
    assert!(answers.holes > 2 << 20, "holes come as holes");
    drop(answers);
    assert_eq!(origin.in_flight(), 0);
    // What is beyond the export is an error and does not break the session.
    origin.request(fetch(99, 16 << 20, 4096));
    assert_eq!(recorder.wait(|answers| answers.done.get(&99).copied()), Err(Errno::INVAL));
    assert_eq!(origin.sessions(), 3);
    recorder.close(&origin);
    origin.request(fetch(100, 0, 4096));
}

#[test]
fn one_large_fetch_is_as_good_as_many_small_ones() {
    let bytes = image(40 << 20);
    let served = Served::new(Disk::new(bytes.clone()));
    let address = served.server.local_addr().clone();
    let (origin, recorder) = open(Options { connections: 1, ..options(&address, "volume") });
    origin.request(fetch(0, 0, 32 << 20));
    origin.request(fetch(1, 32 << 20, 8 << 20));
    recorder.wait_done(0..2);
    recorder.check(&bytes, 0..bytes.len());
    recorder.close(&origin);
}

#[test]
fn urgent_fetches_do_not_queue_behind_others() {
    let bytes = image(16 << 20);
    let served = Served::new(Disk::new(bytes.clone()));
    // Everything from 1 MiB on takes for ever.
    *served.disk.gate.lock().unwrap() = Some(1 << 20);
    let (origin, recorder) = open(options(served.server.local_addr(), "volume"));
    recorder.wait(|answers| answers.links.iter().any(|(up, _)| *up).then_some(()));
    crate::fixture::eventually("all connections are up", || origin.sessions() == 3);
    for token in 0..15 {
        origin.request(fetch(token, (token as usize + 1) << 20, 1 << 20));
    }
    for token in 100..110 {
        origin.request(Fetch { urgent: true, ..fetch(token, (token as usize - 100) * BLOCK, BLOCK) });
    }
    recorder.wait_done(100..110);
    assert_eq!(recorder.answers.lock().unwrap().done.len(), 10);
    *served.disk.gate.lock().unwrap() = None;
    served.disk.gate_changed.notify_all();
    recorder.wait_done(0..15);
    recorder.check(&bytes, 1 << 20..16 << 20);
    recorder.close(&origin);
}

#[test]
fn nbdkit_and_qemu_nbd_are_origins_too() {
    let bytes = image(4 << 20);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    std::fs::write(&file, &bytes).unwrap();
    let file = file.to_str().unwrap();
    let kit = directory.path().join("kit.sock");
    let small = directory.path().join("small.sock");
    let qemu = directory.path().join("qemu.sock");
    let lone = directory.path().join("lone.sock");
    let _peers = [
        Peer::nbdkit(&kit, &["-r", "file", file]),
        // Structured replies refused, and requests of 64 KiB at most.
        Peer::nbdkit(
            &small,
            &[
                "--no-sr",
                "--filter=blocksize-policy",
                "file",
                file,
                "blocksize-maximum=64k",
                "blocksize-error-policy=error",
            ],
        ),
        Peer::start(
            "qemu-nbd",
            &["-f", "raw", "-r", "-t", "-e", "8", "-k", qemu.to_str().unwrap(), "-x", "volume", file],
        ),
        // One client at a time: further connections would wait for ever.
        Peer::start("qemu-nbd", &["-f", "raw", "-t", "-e", "1", "-k", lone.to_str().unwrap(), "-x", "volume", file]),
    ];
    for (socket, export) in [(kit, ""), (small, ""), (qemu, "volume"), (lone, "volume")] {
        let (origin, recorder) = open(options(&Address::Unix(socket.clone()), export));
        for token in 0..16 {
            origin.request(fetch(token, token as usize * 262_144, 262_144));
        }
        origin.request(Fetch { urgent: true, ..fetch(16, 4096, 4096) });
        recorder.wait_done(0..17);
        recorder.check(&bytes, 0..bytes.len());
        // Contexts of ours they do not know.
        origin.request(Fetch { want: Want::Digests, ..fetch(17, 0, 4096) });
        let digests = recorder.wait(|answers| answers.done.get(&17).copied());
        assert_eq!(digests, Err(Errno::OPNOTSUPP), "{}", socket.display());
        recorder.close(&origin);
    }
}

#[test]
fn errors_of_the_medium_are_told_and_not_asked_again() {
    let directory = tempfile::tempdir().unwrap();
    let socket = directory.path().join("kit.sock");
    let _peer = Peer::nbdkit(&socket, &["--filter=error", "memory", "1M", "error-pread=EIO", "error-pread-rate=100%"]);
    let (origin, recorder) = open(options(&Address::Unix(socket), ""));
    origin.request(fetch(0, 0, 65_536));
    assert_eq!(recorder.wait(|answers| answers.done.get(&0).copied()), Err(Errno::IO));
    assert_eq!(origin.in_flight(), 0);
    recorder.close(&origin);
}

#[test]
fn what_is_not_what_was_agreed_is_refused_and_tried_again() {
    let served = Served::new(Disk::new(image(1 << 20)));
    let address = served.server.local_addr().clone();
    let (origin, recorder) = open(Options { size: Some(2 << 20), ..options(&address, "volume") });
    assert_eq!(recorder.wait_down("bytes"), "the export has 1048576 bytes, but 2097152 were agreed");
    let error = origin.wait_connected(Duration::from_millis(1)).unwrap_err();
    assert!(error.to_string().contains("1048576 bytes"), "{error}");
    recorder.close(&origin);
    let (origin, recorder) = open(options(&address, "another"));
    assert_eq!(recorder.wait_down("export"), "the server refused the export: no such export: no such export");
    recorder.close(&origin);
    let (origin, recorder) = open(options(&Address::Unix(served.path("nothing")), "volume"));
    recorder.wait_down("No such file");
    recorder.close(&origin);
    let (origin, recorder) = open(options(&Address::Tcp("127.0.0.1:1".parse().unwrap()), "volume"));
    recorder.wait_down("Connection refused");
    let started = Instant::now();
    recorder.close(&origin);
    assert!(started.elapsed() < Duration::from_secs(1));
}

/// A server that cuts its answers at 512 bytes, as the protocol allows, unless it is asked not to.
fn cut_answers(listener: UnixListener, bytes: Vec<u8>, df: bool) {
    let Ok((mut stream, _)) = listener.accept() else { return };
    let flags = TransmissionFlags::offered(true).without(TransmissionFlags::MULTI_CONN);
    let config = server::Config {
        export: ExportInfo { name: "".into(), size: bytes.len() as u64, flags, blocks: BlockSizes::UNSAID },
        contexts: Contexts::NONE,
        tls_required: false,
    };
    let (mut out, mut input, mut buffer) = (Vec::new(), Vec::new(), [0; 4096]);
    let mut core = server::Server::new(config, &mut out);
    loop {
        let step = core.handle_input(&input, &mut out).unwrap();
        input.drain(..step.consumed);
        match step.event {
            Some(server::Event::Request(request)) => {
                let Command::Read { unfragmented } = request.command else { unreachable!() };
                let (start, end) = (request.offset as usize, (request.offset + u64::from(request.length)) as usize);
                let mut at = start;
                while at < end {
                    let next = if unfragmented && df { end } else { end.min(at + 1536) };
                    out.extend_from_slice(core.data(&request, at as u64, (next - at) as u32, next == end).as_bytes());
                    out.extend_from_slice(&bytes[at..next]);
                    at = next;
                }
            }
            Some(server::Event::Finished) => return,
            Some(_) => {}
            None => {
                if stream.write_all(&out).is_err() {
                    return;
                }
                out.clear();
                match stream.read(&mut buffer) {
                    Ok(0) | Err(_) => return,
                    Ok(count) => input.extend_from_slice(&buffer[..count]),
                }
            }
        }
    }
}

#[test]
fn answers_cut_within_blocks_are_asked_for_whole() {
    let bytes = image(1 << 20);
    for df in [true, false] {
        let directory = tempfile::tempdir().unwrap();
        let socket = directory.path().join("cut.sock");
        let listener = UnixListener::bind(&socket).unwrap();
        let served = bytes.clone();
        let server = std::thread::spawn(move || cut_answers(listener, served, df));
        let (origin, recorder) = open(options(&Address::Unix(socket), ""));
        for token in 0..4 {
            origin.request(fetch(token, token as usize * 262_144, 262_144));
        }
        recorder.wait_done(0..4);
        if df {
            recorder.check(&bytes, 0..bytes.len());
        } else {
            assert!(recorder.answers.lock().unwrap().done.values().all(|result| *result == Err(Errno::IO)));
        }
        recorder.close(&origin);
        server.join().unwrap();
    }
}
