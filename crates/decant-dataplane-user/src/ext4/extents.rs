//! A file's extent tree, as runs of blocks in logical order without holes.

use std::ops::Range;

use super::layout::FileSystem;
use super::{Aligned, crc32c, le16, le32};

const MAGIC: u16 = 0xf30a;
const ENTRY_BYTES: usize = 12;
/// fs/ext4/extents.c allows no deeper tree.
const DEEPEST: u16 = 5;
/// Blocks of tree that are read at most. A journal of 1 GiB whose every extent is one block needs 772.
const MOST_NODES: u32 = 1024;

/// Collects the runs of one file.
pub(super) struct Walk<'a> {
    pub(super) file_system: &'a FileSystem,
    pub(super) volume: &'a Aligned<'a>,
    /// The seed of the tree blocks' checksums.
    pub(super) seed: Option<u32>,
    nodes: u32,
    runs: Vec<Range<u64>>,
    /// Logical blocks so far: the next extent must start here.
    blocks: u64,
}

impl<'a> Walk<'a> {
    pub(super) fn new(file_system: &'a FileSystem, volume: &'a Aligned<'a>, seed: Option<u32>) -> Self {
        Self { file_system, volume, seed, nodes: 0, runs: Vec::new(), blocks: 0 }
    }

    /// The runs of the tree whose root is the 60 bytes in the inode. `None` if there is a hole, an unwritten or a strange extent.
    pub(super) fn runs(mut self, root: &[u8]) -> Option<Vec<Range<u64>>> {
        let depth = le16(root, 6).filter(|depth| *depth <= DEEPEST)?;
        self.node(root, depth)?;
        Some(self.runs)
    }

    fn node(&mut self, node: &[u8], depth: u16) -> Option<()> {
        let (entries, most) = (usize::from(le16(node, 2)?), usize::from(le16(node, 4)?));
        let fits = entries <= most && ENTRY_BYTES * (most + 1) <= node.len();
        if le16(node, 0)? != MAGIC || le16(node, 6)? != depth || !fits {
            return None;
        }
        for entry in node.get(ENTRY_BYTES..)?.chunks_exact(ENTRY_BYTES).take(entries) {
            // Both kinds of entry start with their first logical block.
            if u64::from(le32(entry, 0)?) != self.blocks {
                return None;
            }
            if depth == 0 {
                self.leaf(entry)?;
            } else {
                let child = u64::from(le16(entry, 8)?) << 32 | u64::from(le32(entry, 4)?);
                self.child(child, depth - 1)?;
            }
        }
        Some(())
    }

    fn leaf(&mut self, entry: &[u8]) -> Option<()> {
        // Above 32768 the extent is unwritten; a journal has none.
        let length = u64::from(le16(entry, 4).filter(|length| (1..=32768).contains(length))?);
        let start = u64::from(le16(entry, 6)?) << 32 | u64::from(le32(entry, 8)?);
        if !self.file_system.holds(start, length) {
            return None;
        }
        self.runs.push(start..start + length);
        self.blocks += length;
        Some(())
    }

    fn child(&mut self, number: u64, depth: u16) -> Option<()> {
        self.nodes += 1;
        if self.nodes > MOST_NODES {
            return None;
        }
        let block = self.file_system.block(self.volume, number)?;
        if let Some(seed) = self.seed {
            // The checksum follows the last entry there is room for.
            let tail = ENTRY_BYTES * (usize::from(le16(&block, 4)?) + 1);
            if crc32c(seed, block.get(..tail)?) != le32(&block, tail)? {
                return None;
            }
        }
        self.node(&block, depth)
    }
}
