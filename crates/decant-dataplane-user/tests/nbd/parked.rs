//! Reads whose bytes come later hold up nobody.

use decant_dataplane_user::device::Origin as _;
use decant_dataplane_user::origin::{Options, Timing};
use rustix::io::Errno;

use crate::fixture::{BLOCK, Disk, Parked, Served, eventually, fetch, open, options};

/// Parked reads of one connection before it takes no more requests.
const MAX_PARKED: usize = 64;

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
fn parked_reads_are_bounded_and_outlive_their_connection() {
    let bytes = dense(1 << 20);
    let served = Served::new(parks(&bytes, 0));
    let (origin, recorder) = open(one(&served));
    for token in 0..100 {
        origin.request(fetch(token, token as usize * BLOCK, BLOCK));
    }
    let reads = taken(&served, MAX_PARKED);
    for (offset, length, sink) in reads {
        sink.complete(Ok(&bytes[offset as usize..][..length]));
    }
    // The others follow; their connection goes before their bytes come.
    let reads = taken(&served, 100 - MAX_PARKED);
    recorder.wait_done(0..MAX_PARKED as u64);
    recorder.check(&bytes, 0..MAX_PARKED * BLOCK);
    recorder.close(&origin);
    eventually("the connection has gone", || served.server.served().connections == 0);
    for (offset, length, sink) in reads {
        sink.complete(Ok(&bytes[offset as usize..][..length]));
    }
}
