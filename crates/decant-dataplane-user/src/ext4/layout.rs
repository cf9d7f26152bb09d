//! Superblock, group descriptors and inodes, as far as they are needed, with their checksums.

use super::{Aligned, MOST_GROUP_BYTES, crc32c, crc32c_around, le16, le32, split64};

const SUPERBLOCK_AT: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 1024;
const MAGIC: u16 = 0xef53;
/// s_state: cleanly unmounted, no errors seen, no orphans being cleaned.
const STATE_CLEAN: u16 = 1;

const COMPAT_HAS_JOURNAL: u32 = 0x4;
const COMPAT_SPARSE_SUPER2: u32 = 0x200;
const INCOMPAT_64BIT: u32 = 0x80;
const INCOMPAT_CSUM_SEED: u32 = 0x2000;
const RO_SPARSE_SUPER: u32 = 0x1;
const RO_BIGALLOC: u32 = 0x200;
const RO_METADATA_CSUM: u32 = 0x400;

/// The incompatible features whose meaning for blocks, bitmaps and journal is known here: filetype, extents, 64bit, flex_bg,
/// ea_inode, csum_seed, largedir, inline_data, encrypt, casefold. Not: compression, needs_recovery, journal_dev, meta_bg, mmp,
/// dirdata, and whatever comes.
const INCOMPAT_KNOWN: u32 = 0x2 | 0x40 | 0x80 | 0x200 | 0x400 | 0x2000 | 0x4000 | 0x8000 | 0x1_0000 | 0x2_0000;

/// The same for read-only compatible ones: sparse_super, large_file, btree_dir, huge_file, gdt_csum, dir_nlink, extra_isize,
/// quota, bigalloc, metadata_csum, readonly, project, verity. Not orphan_present: an orphan is work left to do. Leaving blocks out is a way of writing.
const RO_KNOWN: u32 = 0x1 | 0x2 | 0x4 | 0x8 | 0x10 | 0x20 | 0x40 | 0x100 | 0x200 | 0x400 | 0x1000 | 0x2000 | 0x8000;

/// A clean ext4.
pub(super) struct FileSystem {
    pub(super) block_size: u64,
    /// One past the last block.
    pub(super) blocks: u64,
    pub(super) first_block: u64,
    pub(super) blocks_per_group: u64,
    pub(super) inode_table_blocks: u64,
    pub(super) groups: u64,
    pub(super) has_journal: bool,
    pub(super) sparse_super: bool,
    /// Superblock, group descriptors and room for them to grow, at the start of some groups.
    pub(super) super_blocks: u64,
    /// Metadata checksums are kept, seeded with this.
    pub(super) seed: Option<u32>,
    /// Bits of bitmaps are blocks, and backups lie where they always did.
    pub(super) plain_bitmaps: bool,
    inode_size: usize,
    descriptor_size: usize,
}

/// One group descriptor.
pub(super) struct Group {
    pub(super) block_bitmap: u64,
    pub(super) inode_bitmap: u64,
    pub(super) inode_table: u64,
    pub(super) flags: u16,
    pub(super) bitmap_checksum: u32,
    /// Bits of `bitmap_checksum` that are kept.
    pub(super) bitmap_checksum_mask: u32,
}

impl FileSystem {
    /// `None` unless it is an ext4 that is clean in every respect and fits the device.
    pub(super) fn read(volume: &Aligned<'_>, size: u64) -> Option<Self> {
        let mut sb = [0u8; SUPERBLOCK_BYTES];
        if size < SUPERBLOCK_AT + SUPERBLOCK_BYTES as u64 {
            return None;
        }
        volume.read(SUPERBLOCK_AT, &mut sb)?;
        let (compat, incompat, ro_compat) = (le32(&sb, 0x5c)?, le32(&sb, 0x60)?, le32(&sb, 0x64)?);
        let clean = le16(&sb, 0x38)? == MAGIC
            && le32(&sb, 0x4c)? == 1
            && le16(&sb, 0x3a)? == STATE_CLEAN
            && le32(&sb, 0xe8)? == 0
            && incompat & !INCOMPAT_KNOWN == 0
            && ro_compat & !RO_KNOWN == 0;
        if !clean {
            return None;
        }
        let seed = seed(&sb, incompat, ro_compat)?;

        let block_size = 1024u64.checked_shl(le32(&sb, 0x18)?).filter(|size| (1024..=65536).contains(size))?;
        let long = incompat & INCOMPAT_64BIT != 0;
        let blocks = split64(&sb, 0x4, long.then_some(0x150))?;
        let first_block = u64::from(le32(&sb, 0x14)?);
        let blocks_per_group = u64::from(le32(&sb, 0x20)?);
        let inodes_per_group = u64::from(le32(&sb, 0x28)?);
        let inode_size = usize::from(le16(&sb, 0x58)?);
        let descriptor_size = if long { usize::from(le16(&sb, 0xfe)?) } else { 32 };
        // With clusters a group has up to 8 * block_size of those; its blocks only have to be counted.
        let most = if ro_compat & RO_BIGALLOC == 0 { 8 * block_size } else { u64::from(u32::MAX) };
        let sane = blocks.checked_mul(block_size)? <= size
            && first_block == u64::from(block_size == 1024)
            && blocks > first_block
            && (1..=most).contains(&blocks_per_group)
            && (1..=8 * block_size).contains(&inodes_per_group)
            && inode_size.is_power_of_two()
            && (128..=4096).contains(&inode_size)
            && matches!(descriptor_size, 32 | 64);
        if !sane {
            return None;
        }
        let groups = (blocks - first_block).div_ceil(blocks_per_group);
        let descriptor_bytes = groups.checked_mul(descriptor_size as u64)?;
        let reserved = u64::from(le16(&sb, 0xce)?);
        Some(Self {
            block_size,
            blocks,
            first_block,
            blocks_per_group,
            inode_table_blocks: (inodes_per_group * inode_size as u64).div_ceil(block_size),
            groups,
            has_journal: compat & COMPAT_HAS_JOURNAL != 0 && le32(&sb, 0xe0)? == 8 && le32(&sb, 0xe4)? == 0,
            sparse_super: ro_compat & RO_SPARSE_SUPER != 0,
            super_blocks: 1 + descriptor_bytes.div_ceil(block_size) + reserved,
            seed,
            plain_bitmaps: ro_compat & RO_BIGALLOC == 0 && compat & COMPAT_SPARSE_SUPER2 == 0,
            inode_size,
            descriptor_size,
        })
    }

    /// Whether `range` of blocks lies in the file system.
    pub(super) fn holds(&self, start: u64, length: u64) -> bool {
        start >= self.first_block && start.checked_add(length).is_some_and(|end| end <= self.blocks)
    }

    /// Reads one block.
    pub(super) fn block(&self, volume: &Aligned<'_>, number: u64) -> Option<Vec<u8>> {
        if !self.holds(number, 1) {
            return None;
        }
        let mut block = vec![0; self.block_size as usize];
        volume.read(number * self.block_size, &mut block)?;
        Some(block)
    }

    /// The first `count` group descriptors, checked.
    pub(super) fn descriptors(&self, volume: &Aligned<'_>, count: u64) -> Option<Vec<Group>> {
        let bytes = count.checked_mul(self.descriptor_size as u64).filter(|bytes| *bytes <= MOST_GROUP_BYTES)?;
        let start = self.first_block + 1;
        if count > self.groups || !self.holds(start, bytes.div_ceil(self.block_size)) {
            return None;
        }
        let mut table = vec![0; bytes as usize];
        volume.read(start * self.block_size, &mut table)?;
        table.chunks_exact(self.descriptor_size).zip(0u32..).map(|(raw, number)| self.group(raw, number)).collect()
    }

    fn group(&self, raw: &[u8], number: u32) -> Option<Group> {
        let high = |at| (self.descriptor_size == 64).then_some(at);
        if let Some(seed) = self.seed {
            let sum = crc32c_around(crc32c(seed, &number.to_le_bytes()), raw, 0x1e, 2)?;
            if sum & 0xffff != u32::from(le16(raw, 0x1e)?) {
                return None;
            }
        }
        let sum_high = match high(0x38) {
            Some(at) => u32::from(le16(raw, at)?),
            None => 0,
        };
        let group = Group {
            block_bitmap: split64(raw, 0x0, high(0x20))?,
            inode_bitmap: split64(raw, 0x4, high(0x24))?,
            inode_table: split64(raw, 0x8, high(0x28))?,
            flags: le16(raw, 0x12)?,
            bitmap_checksum: sum_high << 16 | u32::from(le16(raw, 0x18)?),
            bitmap_checksum_mask: if self.descriptor_size == 64 { u32::MAX } else { 0xffff },
        };
        let inside = self.holds(group.block_bitmap, 1)
            && self.holds(group.inode_bitmap, 1)
            && self.holds(group.inode_table, self.inode_table_blocks);
        inside.then_some(group)
    }

    /// An inode of the first group, checked, and the seed of the checksums of its extents.
    pub(super) fn inode(&self, volume: &Aligned<'_>, number: u32) -> Option<(Vec<u8>, Option<u32>)> {
        let index = u64::from(number.checked_sub(1)?);
        let offset = index * self.inode_size as u64;
        if offset + self.inode_size as u64 > self.inode_table_blocks * self.block_size {
            return None;
        }
        let table = self.descriptors(volume, 1)?.first()?.inode_table;
        let mut inode = vec![0; self.inode_size];
        volume.read(table * self.block_size + offset, &mut inode)?;
        let Some(seed) = self.seed else { return Some((inode, None)) };
        let seed = crc32c(crc32c(seed, &number.to_le_bytes()), inode.get(0x64..0x68)?);
        // The upper half of the checksum lies in the part that a small inode does not have.
        let long = self.inode_size > 128 && le16(&inode, 0x80)? >= 4;
        let mut blank = inode.clone();
        blank.get_mut(0x7c..0x7e)?.fill(0);
        let mut stored = u32::from(le16(&inode, 0x7c)?);
        if long {
            blank.get_mut(0x82..0x84)?.fill(0);
            stored |= u32::from(le16(&inode, 0x82)?) << 16;
        }
        let sum = crc32c(seed, &blank);
        let sum = if long { sum } else { sum & 0xffff };
        (sum == stored).then_some((inode, Some(seed)))
    }
}

/// `Some(None)`: no metadata checksums. `None`: a checksum is wrong, or of an unknown kind.
fn seed(sb: &[u8], incompat: u32, ro_compat: u32) -> Option<Option<u32>> {
    if ro_compat & RO_METADATA_CSUM == 0 {
        return Some(None);
    }
    let known = sb.get(0x175) == Some(&1);
    if !known || crc32c(u32::MAX, sb.get(..0x3fc)?) != le32(sb, 0x3fc)? {
        return None;
    }
    let seed =
        if incompat & INCOMPAT_CSUM_SEED != 0 { le32(sb, 0x270)? } else { crc32c(u32::MAX, sb.get(0x68..0x78)?) };
    Some(Some(seed))
}
