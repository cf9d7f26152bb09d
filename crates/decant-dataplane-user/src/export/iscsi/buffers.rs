//! Buffers of a connection, used again and again.

use crate::stream::Aligned;

/// Bytes of a buffer, and how many of that size a connection keeps for its next requests: a full queue of small ones, some of
/// what initiators commonly ask for at a time, and two of the largest transfer. That is 13 MiB at most.
const SIZES: [(usize, usize); 3] = [(16 * 1024, 72), (512 * 1024, 8), (super::MAX_TRANSFER as usize, 2)];

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
pub(super) struct Spare([Vec<Aligned>; SIZES.len()]);

impl Spare {
    /// A buffer of `length` bytes, with anything in them.
    pub(super) fn take(&mut self, length: usize) -> Buffer {
        let fitting = SIZES.iter().zip(&mut self.0).find(|((size, _), _)| length <= *size);
        let memory = match fitting {
            Some(((size, _), kept)) => kept.pop().unwrap_or_else(|| Aligned::new(*size)),
            None => Aligned::new(length),
        };
        Buffer { memory, length }
    }

    /// Takes one back; one of an unusual size, or too many, are given up.
    pub(super) fn put(&mut self, buffer: Buffer) {
        let fitting = SIZES.iter().zip(&mut self.0).find(|((size, _), _)| buffer.memory.len() == *size);
        if let Some((_, kept)) = fitting.filter(|((_, most), kept)| kept.len() < *most) {
            kept.push(buffer.memory);
        }
    }
}
