//! What a cleanly unmounted ext4 does not need: the content of its journal, and of its free blocks. Read-only, from plaintext.
//!
//! Below the cipher, a journal that was written once is as much data as a database is: 64 MiB of a 4 GiB volume. After a clean
//! unmount its superblock says that there is nothing to replay (`s_start == 0`), and the kernel then reads none of its blocks;
//! it writes each before it ever reads it. Such a block may read as anything, zeros included, and need not be moved. The same
//! holds for a block that a checksummed bitmap calls free.
//!
//! **Whatever is not exactly as expected means "nothing is known"**: the blocks are then moved like any others. So the worst a
//! damaged or hostile file system achieves is a larger move. No error leaves this module, no loop is bounded by what is read
//! alone, and nothing is allocated beyond `MOST_GROUP_BYTES`. The cost on the path between stop and start is a handful of
//! reads for the journal, and one read for each group of blocks that holds data.
//!
//! Sources: kernel Documentation/filesystems/ext4/, fs/ext4/{ext4.h,super.c,balloc.c,bitmap.c,extents.c}, fs/jbd2/{journal.c,recovery.c}.

mod extents;
mod free;
mod journal;
mod layout;
#[cfg(test)]
mod tests;

use std::ops::Range;

use decant_base::{BLOCK, ExtentSet};

use layout::FileSystem;

/// Group descriptors that are read at most: 8 MiB, a file system of 16 TiB. A larger one keeps its free blocks.
const MOST_GROUP_BYTES: u64 = 8 << 20;

/// Plaintext of the volume: fills the buffer from a byte offset of the payload, or says that it cannot.
pub trait Plaintext {
    /// Reads exactly the buffer's length; `None` is any error. Offset and length are multiples of 4096, but for the end of a
    /// volume that ends elsewhere.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Option<()>;
}

impl<F: Fn(u64, &mut [u8]) -> Option<()>> Plaintext for F {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Option<()> {
        self(offset, buffer)
    }
}

/// Reads anything by whole blocks of 4 KiB.
struct Aligned<'a> {
    volume: &'a dyn Plaintext,
    size: u64,
}

impl Aligned<'_> {
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Option<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.size)?;
        let start = offset - offset % BLOCK;
        let whole = start..end.checked_next_multiple_of(BLOCK)?.min(self.size);
        if whole.start == offset && whole.end == end {
            return self.volume.read(offset, buffer);
        }
        let mut blocks = vec![0; (whole.end - whole.start) as usize];
        self.volume.read(whole.start, &mut blocks)?;
        buffer.copy_from_slice(blocks.get((offset - start) as usize..)?.get(..buffer.len())?);
        Some(())
    }
}

/// What was found, in blocks of 4 KiB of the payload.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Unneeded {
    /// The journal's blocks without its superblock.
    pub journal: ExtentSet,
    /// Blocks in runs of at least 64 KiB that a checksummed bitmap calls free and that are in the `live` set.
    pub free: ExtentSet,
}

impl Unneeded {
    /// Both together.
    pub fn all(&self) -> ExtentSet {
        let mut all = self.journal.clone();
        for run in self.free.iter() {
            all.insert(run.range());
        }
        all
    }
}

/// Inspects the `size` bytes of `volume`, of which the 4 KiB blocks in `live` hold data. Nobody may have it mounted.
pub fn unneeded(volume: &dyn Plaintext, size: u64, live: &ExtentSet) -> Unneeded {
    let volume = &Aligned { volume, size };
    let Some(file_system) = FileSystem::read(volume, size) else { return Unneeded::default() };
    let journal = journal::blocks(&file_system, volume).unwrap_or_default();
    let free = free::blocks(&file_system, volume, live).unwrap_or_default();
    Unneeded { journal: file_system.to_payload(&journal), free: file_system.to_payload(&free) }
}

impl FileSystem {
    /// File-system blocks as payload blocks that lie in them whole.
    fn to_payload(&self, blocks: &ExtentSet) -> ExtentSet {
        let mut payload = ExtentSet::new();
        for run in blocks.iter() {
            // Both were checked to lie in the device.
            let bytes = run.start * self.block_size..run.end() * self.block_size;
            payload.insert(inward(&bytes));
        }
        payload
    }
}

/// The 4 KiB blocks that lie in `bytes` whole; empty if there are none.
fn inward(bytes: &Range<u64>) -> Range<u64> {
    bytes.start.div_ceil(BLOCK)..bytes.end / BLOCK
}

/// CRC-32C as the kernel's `crc32c_le` and ext4 count it: the caller's seed, no final inversion.
fn crc32c(seed: u32, data: &[u8]) -> u32 {
    !::crc32c::crc32c_append(!seed, data)
}

/// The checksum of `data` with the `length` bytes at `at` taken as zeros.
fn crc32c_around(seed: u32, data: &[u8], at: usize, length: usize) -> Option<u32> {
    const ZEROS: [u8; 4] = [0; 4];
    let before = crc32c(seed, data.get(..at)?);
    Some(crc32c(crc32c(before, ZEROS.get(..length)?), data.get(at.checked_add(length)?..)?))
}

fn le16(data: &[u8], at: usize) -> Option<u16> {
    data.get(at..)?.first_chunk().copied().map(u16::from_le_bytes)
}

fn le32(data: &[u8], at: usize) -> Option<u32> {
    data.get(at..)?.first_chunk().copied().map(u32::from_le_bytes)
}

fn be32(data: &[u8], at: usize) -> Option<u32> {
    data.get(at..)?.first_chunk().copied().map(u32::from_be_bytes)
}

/// A 64-bit number kept in two halves, the upper one only where the format has it.
fn split64(data: &[u8], low: usize, high: Option<usize>) -> Option<u64> {
    let high = match high {
        Some(at) => u64::from(le32(data, at)?),
        None => 0,
    };
    Some(high << 32 | u64::from(le32(data, low)?))
}
