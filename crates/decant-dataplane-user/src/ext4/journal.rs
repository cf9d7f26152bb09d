//! The journal of a clean file system.

use decant_base::ExtentSet;

use super::extents::Walk;
use super::layout::FileSystem;
use super::{Aligned, be32, crc32c_around, le32};

const INODE: u32 = 8;
const EXTENTS_FLAG: u32 = 0x8_0000;
/// A regular file.
const MODE_FILE: u16 = 0x8000;

const MAGIC: u32 = 0xc03b_3998;
const SUPERBLOCK_V2: u32 = 4;
const SUPERBLOCK_BYTES: usize = 1024;
const INCOMPAT_CSUM_V2: u32 = 0x8;
const INCOMPAT_CSUM_V3: u32 = 0x10;
/// revoke, 64bit, async_commit, csum_v2, csum_v3, fast_commit.
const INCOMPAT_KNOWN: u32 = 0x3f;

/// The blocks of the journal behind its superblock, if there is nothing in them to replay.
pub(super) fn blocks(file_system: &FileSystem, volume: &Aligned<'_>) -> Option<ExtentSet> {
    if !file_system.has_journal {
        return None;
    }
    let (inode, seed) = file_system.inode(volume, INODE)?;
    let is_file = super::le16(&inode, 0)? & 0xf000 == MODE_FILE;
    // Block-mapped journals, those of file systems made as ext3, are moved whole.
    if !is_file || le32(&inode, 0x20)? & EXTENTS_FLAG == 0 {
        return None;
    }
    let runs = Walk::new(file_system, volume, seed).runs(inode.get(0x28..0x64)?)?;
    let total: u64 = runs.iter().map(|run| run.end - run.start).sum();

    let superblock = file_system.block(volume, runs.first()?.start)?;
    let (first, length) = replayed(file_system, &superblock)?;
    if length > total {
        return None;
    }
    let mut blocks = ExtentSet::new();
    let mut logical = 0;
    for run in &runs {
        let end = logical + (run.end - run.start);
        let (from, to) = (first.max(logical), length.min(end));
        if from < to {
            blocks.insert(run.start + (from - logical)..run.start + (to - logical));
        }
        logical = end;
    }
    // Two logical blocks on one physical block: the tree lies.
    (blocks.len() == length - first).then_some(blocks)
}

/// The first block of the log and the journal's length, if its superblock says that all of it was replayed.
fn replayed(file_system: &FileSystem, block: &[u8]) -> Option<(u64, u64)> {
    let sb = block.get(..SUPERBLOCK_BYTES)?;
    let incompat = be32(sb, 0x28)?;
    let clean = be32(sb, 0)? == MAGIC
        && be32(sb, 4)? == SUPERBLOCK_V2
        && u64::from(be32(sb, 0xc)?) == file_system.block_size
        // s_start: where the log to replay begins; 0 is "nowhere", and recovery then reads no block of it.
        && be32(sb, 0x1c)? == 0
        // s_errno
        && be32(sb, 0x20)? == 0
        && incompat & !INCOMPAT_KNOWN == 0;
    if !clean {
        return None;
    }
    if incompat & (INCOMPAT_CSUM_V2 | INCOMPAT_CSUM_V3) != 0 && crc32c_around(u32::MAX, sb, 0xfc, 4)? != be32(sb, 0xfc)?
    {
        return None;
    }
    let (length, first) = (u64::from(be32(sb, 0x10)?), u64::from(be32(sb, 0x14)?));
    (first >= 1 && first < length).then_some((first, length))
}
