//! Reads whose bytes come later hold up nobody.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use decant_dataplane_user::device::Origin as _;
use decant_dataplane_user::origin::{Options, Timing};
use rustix::io::Errno;

use crate::fixture::{BLOCK, Disk, PATIENCE, Parked, Served, eventually, fetch, open, options};

/// Parked reads of one connection before it takes no more requests.
const MAX_PARKED: usize = 4096;
/// Bytes of a chunk.
const CHUNK: usize = 256 << 10;

/// A client without structured replies, as the kernel's.
struct Plain(UnixStream);

const READ: u16 = 0;
const WRITE: u16 = 1;
const FLUSH: u16 = 3;

impl Plain {
    fn connect(served: &Served) -> Self {
        let mut stream = UnixStream::connect(&served.socket).unwrap();
        stream.set_read_timeout(Some(PATIENCE)).unwrap();
        stream.write_all(b"\0\0\0\x03IHAVEOPT\0\0\0\x01\0\0\0\x06volume").unwrap();
        stream.read_exact(&mut [0; 18 + 10]).unwrap();
        Self(stream)
    }

    fn ask(&mut self, command: u16, cookie: u64, offset: usize, length: usize) {
        let mut request = 0x2560_9513u32.to_be_bytes().to_vec();
        request.extend([0, 0]);
        request.extend(command.to_be_bytes());
        request.extend(cookie.to_be_bytes());
        request.extend((offset as u64).to_be_bytes());
        request.extend((length as u32).to_be_bytes());
        self.0.write_all(&request).unwrap();
    }

    /// The next answer's cookie, and its `length` bytes.
    fn answer(&mut self, length: usize) -> (u64, Vec<u8>) {
        let mut head = [0; 16];
        self.0.read_exact(&mut head).unwrap();
        assert_eq!(head[..8], [0x67, 0x44, 0x66, 0x98, 0, 0, 0, 0], "a reply without an error");
        let mut bytes = vec![0; length];
        self.0.read_exact(&mut bytes).unwrap();
        (u64::from_be_bytes(head[8..].try_into().unwrap()), bytes)
    }
}

/// Bytes without a hole: those are answered without a read.
fn dense(size: u32) -> Vec<u8> {
    (0..size).map(|at| (at.wrapping_mul(0x9e37_79b1) >> 24) as u8 | 1).collect()
}

/// One connection, as patient as between workers.
fn one(served: &Served) -> Options {
    let options = options(served.server.local_addr(), "volume");
    Options { connections: 1, digests: false, timing: Timing::NETWORK, ..options }
}

fn parks(bytes: &[u8], from: u64) -> Disk {
    let disk = Disk::new(bytes.to_vec());
    *disk.parked.lock().unwrap() = Some(Parked { from, reads: Vec::new() });
    disk
}

/// Takes the reads that wait, once there are `count`.
fn taken(served: &Served, count: usize) -> Vec<(u64, usize, Box<dyn decant_dataplane_user::device::ReadSink>)> {
    let waiting = || served.disk.parked.lock().unwrap().as_ref().map_or(0, |parked| parked.reads.len());
    eventually("the reads are parked", || waiting() == count);
    std::mem::take(&mut served.disk.parked.lock().unwrap().as_mut().unwrap().reads)
}

#[test]
fn what_is_here_overtakes_what_is_not() {
    let bytes = dense(1 << 20);
    let served = Served::new(parks(&bytes, 512 << 10));
    let (origin, recorder) = open(one(&served));
    for token in 0..10 {
        origin.request(fetch(token, (512 << 10) + token as usize * BLOCK, BLOCK));
    }
    origin.request(fetch(10, 0, 64 << 10));
    recorder.wait_done(10..11);
    let mut reads = taken(&served, 10);
    assert_eq!(recorder.answers.lock().unwrap().order, [10]);
    // They come in any order, one of them as an error.
    let (_, _, unreadable) = reads.remove(4);
    unreadable.complete(Err(Errno::IO));
    for (offset, length, sink) in reads.into_iter().rev() {
        sink.complete(Ok(&bytes[offset as usize..][..length]));
    }
    recorder.wait_done(0..11);
    let failed = recorder.answers.lock().unwrap().done.insert(4, Ok(()));
    assert_eq!(failed, Some(Err(Errno::IO)));
    recorder.check(&bytes, 0..64 << 10);
    recorder.check(&bytes, 512 << 10..(512 << 10) + 4 * BLOCK);
    recorder.check(&bytes, (512 << 10) + 5 * BLOCK..(512 << 10) + 10 * BLOCK);
    assert_eq!(origin.sessions(), 1);
    recorder.close(&origin);
}

#[test]
fn a_large_read_of_what_is_not_here_holds_up_nothing_after_it() {
    let bytes = dense(2 << 20);
    let served = Served::new(parks(&bytes, 128 << 10));
    let (origin, recorder) = open(one(&served));
    // Four chunks and a bit, of which only the first is here, and what was asked for after it.
    origin.request(fetch(0, 64 << 10, (1 << 20) + (64 << 10)));
    origin.request(fetch(1, 0, 64 << 10));
    recorder.wait_done(1..2);
    assert_eq!(recorder.answers.lock().unwrap().order, [1]);
    for piece in 1..5 {
        let (offset, length, sink) = taken(&served, 1).remove(0);
        assert_eq!((offset, length), ((64 << 10) + piece * CHUNK as u64, if piece == 4 { 64 << 10 } else { CHUNK }));
        sink.complete(Ok(&bytes[offset as usize..][..length]));
    }
    recorder.wait_done(0..2);
    recorder.check(&bytes, 0..1 << 20);
    // One that fails in the middle is an error once, and the connection goes on.
    origin.request(fetch(2, 512 << 10, 1 << 20));
    let (offset, length, sink) = taken(&served, 1).remove(0);
    sink.complete(Ok(&bytes[offset as usize..][..length]));
    taken(&served, 1).remove(0).2.complete(Err(Errno::IO));
    recorder.wait_done(2..3);
    assert_eq!(recorder.answers.lock().unwrap().done.insert(2, Ok(())), Some(Err(Errno::IO)));
    origin.request(fetch(3, 0, 64 << 10));
    recorder.wait_done(3..4);
    assert_eq!(origin.sessions(), 1);
    recorder.close(&origin);
}

#[test]
fn without_structured_replies_a_large_read_holds_up_no_write_either() {
    let bytes = dense(2 << 20);
    let served = Served::new(parks(&bytes, 128 << 10));
    let mut client = Plain::connect(&served);
    client.ask(READ, 1, 128 << 10, 1 << 20);
    client.ask(WRITE, 2, 0, 4096);
    client.0.write_all(&[7; 4096]).unwrap();
    client.ask(FLUSH, 3, 0, 0);
    client.ask(READ, 4, 4096, 4096);
    assert_eq!(client.answer(0).0, 2);
    assert_eq!(client.answer(0).0, 3);
    assert_eq!(client.answer(4096), (4, bytes[4096..8192].to_vec()));
    let (offset, length, sink) = taken(&served, 1).remove(0);
    assert_eq!((offset, length), (128 << 10, 1 << 20));
    sink.complete(Ok(&bytes[offset as usize..][..length]));
    assert!(client.answer(1 << 20) == (1, bytes[offset as usize..][..length].to_vec()));
}

#[test]
fn bytes_for_a_client_that_does_not_read_are_not_kept() {
    let bytes = dense(2 << 20);
    let served = Served::new(parks(&bytes, 0));
    let mut client = Plain::connect(&served);
    for cookie in 0..8 {
        client.ask(READ, cookie, 0, 1 << 20);
    }
    // The first fills the socket; the others are read again once the client has taken it.
    let reads = taken(&served, 8);
    *served.disk.parked.lock().unwrap() = None;
    for (_, length, sink) in reads {
        sink.complete(Ok(&bytes[..length]));
    }
    let mut answered: Vec<u64> = (0..8)
        .map(|_| {
            let (cookie, found) = client.answer(1 << 20);
            assert!(found == bytes[..1 << 20], "{cookie}");
            cookie
        })
        .collect();
    answered.sort_unstable();
    assert_eq!(answered, [0, 1, 2, 3, 4, 5, 6, 7]);
}

#[test]
fn parked_reads_are_bounded_and_outlive_their_connection() {
    let bytes = dense(1 << 20);
    let served = Served::new(parks(&bytes, 0));
    let mut client = Plain::connect(&served);
    for cookie in 0..MAX_PARKED as u64 + 36 {
        client.ask(READ, cookie, 0, 512);
    }
    for (offset, length, sink) in taken(&served, MAX_PARKED) {
        assert!(sink.is_wanted());
        sink.complete(Ok(&bytes[offset as usize..][..length]));
        assert_eq!(client.answer(512).1, bytes[..512]);
    }
    // The others follow; their connection goes before their bytes come.
    let reads = taken(&served, 36);
    drop(client);
    eventually("the connection has gone", || served.server.served().connections == 0);
    for (offset, length, sink) in reads {
        assert!(!sink.is_wanted());
        sink.complete(Ok(&bytes[offset as usize..][..length]));
    }
}

#[test]
fn a_client_whose_connection_ended_does_not_wait_for_its_parked_reads() {
    let served = Served::new(parks(&dense(1 << 20), 0));
    let mut client = Plain::connect(&served);
    client.ask(READ, 1, 0, 512);
    let reads = taken(&served, 1);
    // No request begins like this.
    client.0.write_all(&[0; 28]).unwrap();
    assert_eq!(client.0.read(&mut [0]).unwrap(), 0, "the end, with the read still waiting");
    drop(reads);
}
