//! Replies on their way out: payloads are read from the medium right behind their headers, and many small replies leave
//! with one system call.

use std::io::IoSlice;
use std::ops::Range;

use decant_nbd::HEADER_ROOM;

use crate::stream::Aligned;

/// Largest payload of one data chunk.
pub(super) const CHUNK: usize = 256 * 1024;
/// Two chunks, or many small replies.
const ARENA: usize = 2 * (CHUNK + PAGE);
const PAGE: usize = 4096;
/// Most parts in one system call (IOV_MAX is 1024; this many fill the arena with 4 KiB replies).
const MAX_PARTS: usize = 128;

/// The reply buffer of a connection.
pub(super) struct Replies {
    arena: Aligned,
    used: usize,
    parts: Vec<Range<usize>>,
    /// A chunk larger than [`CHUNK`], for clients without structured replies, which need a read's data in one piece.
    large: Option<Aligned>,
}

impl Replies {
    pub(super) fn new() -> Self {
        Self { arena: Aligned::new(ARENA), used: 0, parts: Vec::with_capacity(MAX_PARTS), large: None }
    }

    pub(super) fn is_empty(&self) -> bool {
        self.parts.is_empty()
    }

    /// Whether a payload of `length` bytes and its header have room.
    pub(super) fn has_room(&self, length: usize) -> bool {
        self.parts.len() < MAX_PARTS && place(self.used) + length <= self.arena.len()
    }

    /// Where the next payload goes; [`Self::commit`] puts its header before it. Aligned to 4096.
    pub(super) fn payload(&mut self, length: usize) -> &mut [u8] {
        let start = place(self.used);
        self.arena.slice_mut(start..start + length)
    }

    /// The payload is there.
    pub(super) fn commit(&mut self, header: &[u8], length: usize) {
        let start = place(self.used);
        let from = start - header.len();
        self.arena.slice_mut(from..start).copy_from_slice(header);
        self.used = start + length;
        self.push_part(from..self.used);
    }

    /// Appends bytes that need no alignment. False: no room.
    #[must_use]
    pub(super) fn push(&mut self, bytes: &[u8]) -> bool {
        let end = self.used + bytes.len();
        if end > self.arena.len() || self.parts.len() >= MAX_PARTS {
            return false;
        }
        self.arena.slice_mut(self.used..end).copy_from_slice(bytes);
        self.push_part(self.used..end);
        self.used = end;
        true
    }

    fn push_part(&mut self, part: Range<usize>) {
        match self.parts.last_mut() {
            Some(last) if last.end == part.start => last.end = part.end,
            _ => self.parts.push(part),
        }
    }

    /// Everything that waits, in order.
    pub(super) fn parts(&self) -> Vec<IoSlice<'_>> {
        self.parts.iter().map(|part| IoSlice::new(self.arena.slice(part.clone()))).collect()
    }

    pub(super) fn clear(&mut self) {
        self.used = 0;
        self.parts.clear();
    }

    /// A buffer for one read of `length` bytes that has to be answered in one piece.
    pub(super) fn large(&mut self, length: usize) -> &mut Aligned {
        match &mut self.large {
            Some(large) if large.len() >= length => {}
            other => *other = Some(Aligned::new(length)),
        }
        self.large.get_or_insert_with(|| Aligned::new(length))
    }

    /// Gives a large buffer back to the system if it is larger than most requests need.
    pub(super) fn shrink(&mut self) {
        self.large.take_if(|large| large.len() > 4 * CHUNK);
    }
}

/// Where a payload goes if `used` bytes of the arena are taken: aligned, with room for the header before it.
fn place(used: usize) -> usize {
    (used + HEADER_ROOM).next_multiple_of(PAGE)
}
