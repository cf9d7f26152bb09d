//! Reads that wait for the origin, and what to fetch ahead of them.

use std::ops::Range;
use std::time::Duration;

/// So many reads may wait for an origin for as long as it takes, where a loop device is the front end. A loop device has 128 tags and no scheduler keeps some of them
/// for writes (the limits of kyber, mq-deadline and bfq are for everything but synchronous reads), so that with all tags taken by
/// reads that wait no write, no flush and no `sync` of the whole host would ever end. 32 remain for those.
pub const STALLED_READS: usize = 96;
/// Beyond those that may wait, reads fail once nothing came from the origin for so long: what a peer that owes an answer is given,
/// so that a connection that breaks and is made again costs no read.
pub const STALLED_AFTER: Duration = Duration::from_secs(10);
/// The most reads that may wait: what eight connections of a kernel's NBD client send, twice. A bound for memory, and for the
/// time that looking through them takes.
pub const MAX_PARKED: usize = 2048;
/// The first read-ahead of a sequential reader, 32 KiB.
const FIRST_AHEAD: u64 = 8;
/// The longest, 1 MiB.
const MAX_AHEAD: u64 = 256;
/// Sequential readers told apart.
const STREAMS: usize = 8;

/// A read that waits.
#[derive(Debug)]
pub struct Waiting<W> {
    /// 512-byte sectors.
    pub sectors: Range<u64>,
    /// Whoever asked.
    pub waiter: W,
}

/// The reads that wait, in the order they came.
#[derive(Debug)]
pub struct Parked<W> {
    reads: Vec<Waiting<W>>,
}

impl<W> Parked<W> {
    /// None.
    pub fn new() -> Self {
        Self { reads: Vec::with_capacity(STALLED_READS) }
    }

    /// How many.
    pub fn len(&self) -> usize {
        self.reads.len()
    }

    /// Whether none waits.
    pub fn is_empty(&self) -> bool {
        self.reads.is_empty()
    }

    /// Adds one; gives it back if there are too many.
    pub fn push(&mut self, sectors: Range<u64>, waiter: W) -> Result<(), W> {
        if self.reads.len() >= MAX_PARKED {
            return Err(waiter);
        }
        self.reads.push(Waiting { sectors, waiter });
        Ok(())
    }

    /// Moves the reads that `which` picks to `out`.
    pub fn take(&mut self, mut which: impl FnMut(&Range<u64>) -> bool, out: &mut Vec<Waiting<W>>) {
        let mut index = 0;
        while index < self.reads.len() {
            if which(&self.reads[index].sectors) {
                out.push(self.reads.remove(index));
            } else {
                index += 1;
            }
        }
    }

    /// Forgets those whose waiter `is_wanted` turns down.
    pub fn retain(&mut self, is_wanted: impl Fn(&W) -> bool) {
        self.reads.retain(|read| is_wanted(&read.waiter));
    }

    /// Moves those that came last to `out`, until `most` are left.
    pub fn shed(&mut self, most: usize, out: &mut Vec<Waiting<W>>) {
        out.extend(self.reads.drain(most.min(self.reads.len())..));
    }

    /// What they wait for.
    pub fn ranges(&self) -> impl Iterator<Item = &Range<u64>> {
        self.reads.iter().map(|read| &read.sectors)
    }
}

impl<W> Default for Parked<W> {
    fn default() -> Self {
        Self::new()
    }
}

#[derive(Debug, Clone, Copy, Default)]
struct Stream {
    next: u64,
    ahead: u64,
    used: u64,
}

/// Finds sequential readers. A reader is one when it asks for what follows its last read or lies in what was fetched ahead of it.
#[derive(Debug, Default)]
pub struct Streams {
    streams: [Stream; STREAMS],
    clock: u64,
}

impl Streams {
    /// A read of missing `blocks`: how many blocks to fetch beyond them. 0 for a reader that jumps about.
    pub fn ahead(&mut self, blocks: &Range<u64>) -> u64 {
        self.clock += 1;
        // A miss of a sequential reader comes at the end of what was fetched ahead for it.
        let follows = |s: &Stream| s.used > 0 && (s.next..=s.next + s.ahead).contains(&blocks.start);
        if let Some(stream) = self.streams.iter_mut().find(|stream| follows(stream)) {
            let ahead = (stream.ahead * 2).clamp(FIRST_AHEAD, MAX_AHEAD);
            *stream = Stream { next: blocks.end, ahead, used: self.clock };
            return ahead;
        }
        if let Some(oldest) = self.streams.iter_mut().min_by_key(|stream| stream.used) {
            *oldest = Stream { next: blocks.end, ahead: 0, used: self.clock };
        }
        0
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn read_ahead_grows_for_who_reads_on_and_not_for_who_jumps() {
        let mut streams = Streams::default();
        let mut at = 100;
        let mut seen = Vec::new();
        for _ in 0..8 {
            let ahead = streams.ahead(&(at..at + 1));
            seen.push(ahead);
            at += 1 + ahead;
            assert_eq!(streams.ahead(&(at * 7919..at * 7919 + 1)), 0, "a jump between");
        }
        assert_eq!(seen, [0, 8, 16, 32, 64, 128, 256, 256]);
    }
}
