//! The blocks that the bitmaps call free.

use std::ops::Range;

use decant_base::{BLOCK, ExtentSet};

use super::layout::{FileSystem, Group};
use super::{Aligned, crc32c};

/// bg_flags: the block bitmap was never written; nothing is allocated but the group's own metadata.
const BLOCK_UNINIT: u16 = 0x2;
/// Shorter runs are not worth an entry in the list of live blocks, which is sent at the seal.
const SHORTEST_BYTES: u64 = 64 << 10;
/// Bitmaps read at most: 128 GiB of groups that hold data, some tens of milliseconds of reads. The rest stays live.
const MOST_BITMAPS: usize = 1024;
/// Runs found at most, for the same reason.
const MOST_RUNS: usize = 20_000;

/// Free blocks of the groups that overlap `live` (4 KiB payload blocks). Only with metadata checksums: a bitmap that a torn
/// write changed must not be believed.
pub(super) fn blocks(fs: &FileSystem, volume: &Aligned<'_>, live: &ExtentSet) -> Option<ExtentSet> {
    let seed = fs.seed?;
    if !fs.plain_bitmaps {
        return None;
    }
    let groups = fs.descriptors(volume, fs.groups)?;
    let metadata = metadata(fs, &groups)?;
    // A large file system's own tables are spread over all of its groups; only where something else is live is there
    // anything to gain from a bitmap.
    let mut content = live.clone();
    for run in fs.to_payload(&metadata).iter() {
        content.remove(run.range());
    }
    let mut free = ExtentSet::new();
    let mut bitmaps = Bitmaps { fs, volume, groups: &groups, seed, read: 0, chunk: (0..0, Vec::new()) };
    for (number, group) in (0u64..).zip(&groups) {
        let range = blocks_of(fs, number);
        if !overlaps(fs, &range, &content) {
            continue;
        }
        if group.flags & BLOCK_UNINIT != 0 {
            // fs/ext4/balloc.c, ext4_init_block_bitmap: all but the metadata, which is taken out below.
            free.insert(range);
            continue;
        }
        if bitmaps.read >= MOST_BITMAPS || free.runs() >= MOST_RUNS {
            break;
        }
        bitmaps.free_of(number, range, &metadata, &mut free);
    }
    for run in metadata.iter() {
        free.remove(run.range());
    }
    Some(only_live(fs, &free, live))
}

/// The blocks of group `number`.
fn blocks_of(fs: &FileSystem, number: u64) -> Range<u64> {
    let start = fs.first_block + number * fs.blocks_per_group;
    start..(start + fs.blocks_per_group).min(fs.blocks)
}

fn overlaps(fs: &FileSystem, blocks: &Range<u64>, live: &ExtentSet) -> bool {
    let payload = blocks.start * fs.block_size / BLOCK..(blocks.end * fs.block_size).div_ceil(BLOCK);
    live.overlapping(payload).next().is_some()
}

/// All blocks of all groups' own metadata, wherever flex_bg put them.
fn metadata(fs: &FileSystem, groups: &[Group]) -> Option<ExtentSet> {
    let mut metadata = ExtentSet::new();
    metadata.insert(0..fs.first_block);
    // Together what lies together, as flex_bg puts it: a volume of 1 TiB has 8,192 groups, and a machine stands still meanwhile.
    let mut runs = [0..0, 0..0, 0..0];
    for (number, group) in (0u64..).zip(groups) {
        let table = group.inode_table..group.inode_table + fs.inode_table_blocks;
        let bitmaps = [group.block_bitmap, group.inode_bitmap].map(|block| block..block + 1);
        for (run, next) in runs.iter_mut().zip(bitmaps.into_iter().chain([table])) {
            if run.end == next.start {
                run.end = next.end;
            } else {
                metadata.insert(std::mem::replace(run, next));
            }
        }
        if has_super(fs, number) {
            let range = blocks_of(fs, number);
            metadata.insert(range.start..(range.start + fs.super_blocks).min(fs.blocks));
        }
    }
    runs.into_iter().for_each(|run| metadata.insert(run));
    // Fewer blocks than were put in: two groups claim the same ones, and nothing here can be believed.
    let supers = (0..fs.groups).filter(|number| has_super(fs, *number)).count() as u64;
    let tables = groups.len() as u64 * (2 + fs.inode_table_blocks);
    let most = fs.first_block + tables + supers * fs.super_blocks;
    // A backup in a short last group may be cut.
    (metadata.len() <= most && metadata.len() + fs.super_blocks >= most).then_some(metadata)
}

/// Whether a group starts with a copy of the superblock (fs/ext4/balloc.c, ext4_bg_has_super).
fn has_super(fs: &FileSystem, number: u64) -> bool {
    let power_of = |base: u64| {
        let mut power = base;
        while power < number {
            power *= base;
        }
        power == number
    };
    !fs.sparse_super || number <= 1 || power_of(3) || power_of(5) || power_of(7)
}

struct Bitmaps<'a> {
    fs: &'a FileSystem,
    volume: &'a Aligned<'a>,
    groups: &'a [Group],
    seed: u32,
    read: usize,
    /// Blocks read together: flex_bg keeps the bitmaps of 16 groups side by side.
    chunk: (Range<u64>, Vec<u8>),
}

impl Bitmaps<'_> {
    /// Adds the free runs of one group, if its bitmap is whole and agrees with the metadata.
    fn free_of(&mut self, number: u64, range: Range<u64>, metadata: &ExtentSet, free: &mut ExtentSet) {
        self.read += 1;
        let Some(group) = self.groups.get(number as usize) else { return };
        let (fs, seed, mask) = (self.fs, self.seed, group.bitmap_checksum_mask);
        let Some(bitmap) = self.load(number, group.block_bitmap) else { return };
        if crc32c_of(seed, bitmap, fs.blocks_per_group) & mask != group.bitmap_checksum & mask {
            return;
        }
        let runs = zeros(bitmap, range.end - range.start);
        let shortest = SHORTEST_BYTES / fs.block_size.min(SHORTEST_BYTES);
        let mut found = Vec::new();
        for run in runs {
            let blocks = range.start + run.start..range.start + run.end;
            // Metadata that the bitmap calls free: one of them is wrong.
            if metadata.overlapping(blocks.clone()).next().is_some() {
                return;
            }
            if blocks.end - blocks.start >= shortest {
                found.push(blocks);
            }
        }
        found.into_iter().for_each(|blocks| free.insert(blocks));
    }

    fn load(&mut self, number: u64, block: u64) -> Option<&[u8]> {
        let size = self.fs.block_size as usize;
        if !self.chunk.0.contains(&block) {
            let rest = self.groups.get(number as usize..)?;
            let together = rest.iter().zip(block..).take(16).take_while(|(g, at)| g.block_bitmap == *at).count() as u64;
            let mut bytes = vec![0; together as usize * size];
            self.volume.read(block * self.fs.block_size, &mut bytes)?;
            self.chunk = (block..block + together, bytes);
        }
        let at = (block - self.chunk.0.start) as usize * size;
        self.chunk.1.get(at..at + size)
    }
}

/// fs/ext4/bitmap.c: over the bits of a whole group, also for a short last one.
fn crc32c_of(seed: u32, bitmap: &[u8], blocks_per_group: u64) -> u32 {
    crc32c(seed, bitmap.get(..blocks_per_group as usize / 8).unwrap_or_default())
}

/// The runs of zero bits among the first `bits`, least significant first.
fn zeros(bitmap: &[u8], bits: u64) -> Vec<Range<u64>> {
    let mut runs: Vec<Range<u64>> = Vec::new();
    let mut push = |range: Range<u64>| match runs.last_mut() {
        Some(last) if last.end == range.start => last.end = range.end,
        _ => runs.push(range),
    };
    for (byte, at) in bitmap.iter().zip((0..bits).step_by(8)) {
        let end = (at + 8).min(bits);
        match byte {
            0xff => {}
            0 => push(at..end),
            byte => (at..end).filter(|bit| byte >> (bit - at) & 1 == 0).for_each(|bit| push(bit..bit + 1)),
        }
    }
    runs
}

/// The part of `free` that overlaps `live`, in whole 4 KiB payload blocks, still counted in file-system blocks.
fn only_live(fs: &FileSystem, free: &ExtentSet, live: &ExtentSet) -> ExtentSet {
    let mut both = ExtentSet::new();
    for run in free.iter() {
        let payload = super::inward(&(run.start * fs.block_size..run.end() * fs.block_size));
        for part in live.overlapping(payload) {
            // A file-system block of 64 KiB that is live in part is left alone in part: round inward again.
            let start = (part.start * BLOCK).div_ceil(fs.block_size);
            let end = part.end() * BLOCK / fs.block_size;
            both.insert(start..end.max(start));
        }
    }
    both
}
