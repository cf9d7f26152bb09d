//! What is asked comes, whatever the disk is like.

use std::time::{Duration, Instant};

use decant_dataplane_user::device::{Fetch, Origin as _, Want};
use decant_dataplane_user::origin::IscsiOptions;
use decant_iscsi::chap::{Chap, Credentials, Secret};
use decant_iscsi::login::DigestPolicy;
use rustix::io::Errno;

use crate::fixture::{BLOCK, Disk, fetch, image, open};
use crate::world::{Shape, mutual, options, serve};

#[test]
fn everything_that_is_asked_for_comes() {
    for (block_bytes, tail) in [(512, 512), (4096, 4096)] {
        let mut bytes = image(8 << 20);
        bytes.extend(image(4096)[..tail].iter());
        let shape = Shape { block_bytes, chap: Some(mutual()), ..Shape::default() };
        let (_server, _disk, address) = serve(Disk::new(bytes.clone()), &shape);
        let (origin, recorder) = open(IscsiOptions { chap: Some(mutual()), ..options(address) });
        let found = origin.wait_connected(Duration::from_secs(5)).unwrap();
        assert_eq!((found.size, found.block_bytes, found.digests), (bytes.len() as u64, block_bytes, true));
        for token in 0..32 {
            origin.request(fetch(token, token as usize * 262_144, 262_144));
        }
        origin.request(fetch(32, 8 << 20, tail));
        let digests =
            |token, offset: usize, length: usize| Fetch { want: Want::Digests, ..fetch(token, offset, length) };
        origin.request(digests(33, 0, 8 << 20));
        origin.request(digests(34, 8 << 20, tail));
        recorder.wait_done(0..35);
        recorder.check(&bytes, 0..bytes.len());
        let answers = recorder.answers.lock().unwrap();
        assert_eq!(answers.digests.len(), 2049);
        for (block, expected) in bytes.chunks(BLOCK).enumerate() {
            assert_eq!(answers.digests[&(block as u64)], crc32c::crc32c(expected), "block {block}");
        }
        assert!(answers.holes > 2 << 20, "holes come as holes: {}", answers.holes);
        drop(answers);
        assert_eq!(origin.in_flight(), 0);
        // What is beyond the disk is an error and does not break the session.
        origin.request(fetch(99, 16 << 20, 4096));
        assert_eq!(recorder.wait(|answers| answers.done.get(&99).copied()), Err(Errno::INVAL));
        crate::fixture::eventually("all sessions are up", || origin.sessions() == 3);
        recorder.close(&origin);
        origin.request(fetch(100, 0, 4096));
    }
}

#[test]
fn one_large_fetch_is_as_good_as_many_small_ones() {
    let bytes = image(40 << 20);
    let (_server, _disk, address) = serve(Disk::new(bytes.clone()), &Shape::default());
    let (origin, recorder) = open(IscsiOptions { connections: 1, ..options(address) });
    origin.request(fetch(0, 0, 32 << 20));
    origin.request(fetch(1, 32 << 20, 8 << 20));
    origin.request(Fetch { want: Want::Digests, ..fetch(2, 0, 32 << 20) });
    origin.request(Fetch { urgent: true, ..fetch(3, 1 << 20, 4096) });
    recorder.wait_done(0..4);
    recorder.check(&bytes, 0..bytes.len());
    assert_eq!(recorder.answers.lock().unwrap().digests.len(), 8192);
    recorder.close(&origin);
}

#[test]
fn urgent_fetches_do_not_queue_behind_others() {
    let bytes = image(16 << 20);
    let (_server, disk, address) = serve(Disk::new(bytes.clone()), &Shape::default());
    *disk.gate.lock().unwrap() = Some(1 << 20);
    let mut options = options(address);
    options.timing.silence = Duration::from_secs(30);
    options.timing.silence_max = Duration::from_secs(30);
    let (origin, recorder) = open(options);
    crate::fixture::eventually("all sessions are up", || origin.sessions() == 3);
    for token in 0..15 {
        origin.request(fetch(token, (token as usize + 1) << 20, 1 << 20));
    }
    for token in 100..110 {
        origin.request(Fetch { urgent: true, ..fetch(token, (token as usize - 100) * BLOCK, BLOCK) });
    }
    recorder.wait_done(100..110);
    assert_eq!(recorder.answers.lock().unwrap().done.len(), 10);
    *disk.gate.lock().unwrap() = None;
    disk.gate_changed.notify_all();
    recorder.wait_done(0..15);
    recorder.check(&bytes, 1 << 20..16 << 20);
    recorder.close(&origin);
}

#[test]
fn errors_of_the_medium_are_told_and_not_asked_again() {
    let (_server, disk, address) = serve(Disk::new(image(1 << 20)), &Shape::default());
    *disk.error.lock().unwrap() = Some((65_536, Errno::IO));
    let (origin, recorder) = open(options(address));
    origin.request(fetch(0, 65_536, 65_536));
    assert_eq!(recorder.wait(|answers| answers.done.get(&0).copied()), Err(Errno::IO));
    origin.request(fetch(1, 0, 65_536));
    assert_eq!(recorder.wait(|answers| answers.done.get(&1).copied()), Ok(()));
    assert_eq!(origin.in_flight(), 0);
    recorder.close(&origin);
}

#[test]
fn digests_that_a_disk_does_not_have_are_not_supported() {
    let disk = Disk { digests: false, ..Disk::new(image(1 << 20)) };
    let (_server, _disk, address) = serve(disk, &Shape::default());
    let (origin, recorder) = open(options(address));
    assert!(!origin.wait_connected(Duration::from_secs(5)).unwrap().digests);
    origin.request(Fetch { want: Want::Digests, ..fetch(0, 0, 4096) });
    assert_eq!(recorder.wait(|answers| answers.done.get(&0).copied()), Err(Errno::OPNOTSUPP));
    recorder.close(&origin);
}

#[test]
fn what_is_not_what_was_agreed_is_refused_and_tried_again() {
    let shape = Shape { chap: Some(mutual()), ..Shape::default() };
    let (server, _disk, address) = serve(Disk::new(image(1 << 20)), &shape);
    let good = IscsiOptions { chap: Some(mutual()), ..options(address) };
    let refused = |options: IscsiOptions, why: &str| {
        let (origin, recorder) = open(options);
        let said = recorder.wait_down(why);
        recorder.close(&origin);
        said
    };
    let wrong_size = IscsiOptions { size: Some(2 << 20), ..good.clone() };
    assert_eq!(refused(wrong_size, "bytes"), "the disk has 1048576 bytes, but 2097152 were agreed");
    refused(IscsiOptions { chap: None, ..good.clone() }, "login refused: authentication failure (0201)");
    let secret = |text: &str| Credentials { name: "reader".into(), secret: Secret::new(text).unwrap() };
    let stranger = Chap::new(secret("not the secret at all"), None).unwrap();
    refused(IscsiOptions { chap: Some(stranger), ..good.clone() }, "login refused: authentication failure (0201)");
    let liar = Credentials { name: "server".into(), secret: Secret::new("another server's").unwrap() };
    let impostor = Chap::new(secret("the secret of the reader"), Some(liar)).unwrap();
    refused(IscsiOptions { chap: Some(impostor), ..good.clone() }, "the target is not the one it should be");
    refused(IscsiOptions { target: "iqn.2026-11.dev.decant:x".into(), ..good.clone() }, "no such target (0203)");
    refused(IscsiOptions { initiator: "iqn.2026-11.dev.decant:y".into(), ..good.clone() }, "not allowed (0202)");
    refused(IscsiOptions { lun: 3, ..good.clone() }, "the disk is not ready: sense key 5h, code 25h/00h");
    drop(server);
    let started = Instant::now();
    refused(good, "Connection refused");
    assert!(started.elapsed() < Duration::from_secs(2));
}

#[test]
fn digests_of_pdus_are_as_they_are_configured() {
    let bytes = image(1 << 20);
    let (_server, _disk, address) = serve(Disk::new(bytes.clone()), &Shape::default());
    for digests in [DigestPolicy::Never, DigestPolicy::Preferred, DigestPolicy::Required] {
        let (origin, recorder) = open(IscsiOptions { digests, ..options(address) });
        origin.request(fetch(0, 0, 1 << 20));
        recorder.wait_done(0..1);
        recorder.check(&bytes, 0..bytes.len());
        recorder.close(&origin);
    }
}
