//! What is to be sent: bytes of our own, and parts of the driver's buffers, in order and without copying the latter.

use std::collections::VecDeque;
use std::io::IoSlice;
use std::ops::Range;

/// Own bytes that were sent are moved out of the way when there are so many.
const COMPACT_BYTES: usize = 64 * 1024;

#[derive(Debug, Clone, PartialEq, Eq)]
enum Segment {
    /// So many of the own bytes.
    Own(usize),
    /// This part of the first buffer that is not used up; `last` uses it up.
    Buffer { range: Range<usize>, last: bool },
}

/// Output of a connection. The driver writes it with vectored writes: [`Self::slices`], [`Self::advance`]; buffers that were
/// sent as a whole come back out of [`Self::take_spent`], to be used again.
#[derive(Debug)]
pub struct Outbox<B> {
    own: Vec<u8>,
    own_sent: usize,
    segments: VecDeque<Segment>,
    buffers: VecDeque<B>,
    spent: Vec<B>,
    length: usize,
    taken: u64,
}

impl<B> Default for Outbox<B> {
    fn default() -> Self {
        Self {
            own: Vec::new(),
            own_sent: 0,
            segments: VecDeque::new(),
            buffers: VecDeque::new(),
            spent: Vec::new(),
            length: 0,
            taken: 0,
        }
    }
}

impl<B: AsRef<[u8]>> Outbox<B> {
    /// Bytes to be sent.
    pub fn len(&self) -> usize {
        self.length
    }

    /// Bytes that were sent so far.
    pub fn taken(&self) -> u64 {
        self.taken
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.length == 0
    }

    /// Puts the first parts of what is to be sent into `slices` and says how many.
    pub fn slices<'a>(&'a self, slices: &mut [IoSlice<'a>]) -> usize {
        let mut own = self.own.get(self.own_sent..).unwrap_or_default();
        let mut buffers = self.buffers.iter();
        let mut buffer = buffers.next();
        let mut count = 0usize;
        for (segment, slot) in self.segments.iter().zip(slices) {
            let part = match segment {
                Segment::Own(length) => {
                    let (part, rest) = own.split_at_checked(*length).unwrap_or((own, &[]));
                    own = rest;
                    part
                }
                Segment::Buffer { range, last } => {
                    let part = buffer.and_then(|buffer| buffer.as_ref().get(range.clone())).unwrap_or_default();
                    if *last {
                        buffer = buffers.next();
                    }
                    part
                }
            };
            *slot = IoSlice::new(part);
            count = count.saturating_add(1);
        }
        count
    }

    /// The first `count` bytes were sent.
    pub fn advance(&mut self, count: usize) {
        let mut left = count.min(self.length);
        self.length = self.length.saturating_sub(left);
        self.taken = self.taken.saturating_add(left as u64);
        while let Some(segment) = self.segments.front_mut() {
            let length = match segment {
                Segment::Own(length) => *length,
                Segment::Buffer { range, .. } => range.len(),
            };
            let step = length.min(left);
            left = left.saturating_sub(step);
            match segment {
                Segment::Own(length) => {
                    *length = length.saturating_sub(step);
                    self.own_sent = self.own_sent.saturating_add(step);
                }
                Segment::Buffer { range, .. } => range.start = range.start.saturating_add(step),
            }
            if step < length {
                break;
            }
            if let Some(Segment::Buffer { last: true, .. }) = self.segments.pop_front() {
                self.spent.extend(self.buffers.pop_front());
            }
        }
        if self.own_sent == self.own.len() {
            self.own.clear();
            self.own_sent = 0;
        } else if self.own_sent > COMPACT_BYTES {
            self.own.drain(..self.own_sent);
            self.own_sent = 0;
        }
    }

    /// A buffer that is not needed any more.
    pub fn take_spent(&mut self) -> Option<B> {
        self.spent.pop()
    }

    /// Gives a buffer back unsent.
    pub(super) fn recycle(&mut self, buffer: B) {
        self.spent.push(buffer);
    }

    /// Appends what `put` puts.
    pub(super) fn put(&mut self, put: impl FnOnce(&mut Vec<u8>)) {
        let before = self.own.len();
        put(&mut self.own);
        let length = self.own.len().saturating_sub(before);
        self.length = self.length.saturating_add(length);
        match self.segments.back_mut() {
            _ if length == 0 => {}
            Some(Segment::Own(last)) => *last = last.saturating_add(length),
            _ => self.segments.push_back(Segment::Own(length)),
        }
    }

    /// Appends a part of the buffer that [`Self::put_buffer`] will give next.
    pub(super) fn put_range(&mut self, range: Range<usize>, last: bool) {
        self.length = self.length.saturating_add(range.len());
        self.segments.push_back(Segment::Buffer { range, last });
    }

    /// The buffer of the ranges before.
    pub(super) fn put_buffer(&mut self, buffer: B) {
        self.buffers.push_back(buffer);
    }
}
