//! Buffers of a connection, used again and again.

use crate::stream::Aligned;

/// Small buffers have this many bytes, large ones the largest transfer.
const SMALL: usize = 16 * 1024;
const LARGE: usize = super::MAX_TRANSFER as usize;
/// Bytes that a connection keeps for its next requests: what a full queue of small ones needs, and a few large ones.
const KEPT_SMALL: usize = 72;
const KEPT_LARGE: usize = 8;

/// The bytes of one request, aligned for direct I/O.
pub(super) struct Buffer {
    memory: Aligned,
    length: usize,
}

impl Buffer {
    /// Its bytes.
    pub(super) fn bytes(&mut self) -> &mut [u8] {
        self.memory.slice_mut(0..self.length)
    }

    /// Bytes in use.
    pub(super) fn len(&self) -> usize {
        self.length
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.memory.slice(0..self.length)
    }
}

/// Buffers that nobody uses; the last that came back goes out first, since it is the one in the processor's cache.
#[derive(Default)]
pub(super) struct Spare {
    small: Vec<Aligned>,
    large: Vec<Aligned>,
}

impl Spare {
    /// A buffer of `length` bytes, with anything in them.
    pub(super) fn take(&mut self, length: usize) -> Buffer {
        let (kept, size) = if length <= SMALL { (&mut self.small, SMALL) } else { (&mut self.large, LARGE) };
        let memory = kept.pop().unwrap_or_else(|| Aligned::new(size.max(length)));
        Buffer { memory, length }
    }

    /// Takes one back.
    pub(super) fn put(&mut self, buffer: Buffer) {
        let (kept, most) =
            if buffer.memory.len() <= SMALL { (&mut self.small, KEPT_SMALL) } else { (&mut self.large, KEPT_LARGE) };
        // One of an unusual size would be handed out for a larger request.
        if kept.len() < most && matches!(buffer.memory.len(), SMALL | LARGE) {
            kept.push(buffer.memory);
        }
    }
}
