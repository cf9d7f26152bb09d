//! Which parts of an ext4 were ever allocated from, so that a trim looks at those alone.
//!
//! FITRIM makes the kernel build the free-space map of every group that it looks at, 8192 of them in 1 TiB, and the unmount, when the
//! machine is waited for, has to let go of them all. A group whose bitmap was never written (`BLOCK_UNINIT`) has nothing to
//! trim. Read from the mounted device; what changes meanwhile costs a group its trim, no more.
//! Layout: Documentation/filesystems/ext4/super.rst and group_descr.rst.

use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::unix::fs::FileExt;

const SUPERBLOCK: u64 = 1024;
const MAGIC: u16 = 0xef53;
const INCOMPAT_META_BG: u32 = 0x10;
const INCOMPAT_64BIT: u32 = 0x80;
/// `gdt_csum` and `metadata_csum`: without one of them the flags of a descriptor mean nothing.
const RO_COMPAT_CSUMS: u32 = 0x10 | 0x400;
const BLOCK_UNINIT: u16 = 0x2;

/// All of a file system.
pub(super) fn whole() -> Vec<Range<u64>> {
    std::iter::once(0..u64::MAX).collect()
}

/// The bytes of groups that were ever allocated from, in order; the whole of a file system that does not say.
pub(super) fn allocated(device: &File) -> io::Result<Vec<Range<u64>>> {
    let mut superblock = [0; 1024];
    device.read_exact_at(&mut superblock, SUPERBLOCK)?;
    let Some(layout) = Layout::of(&superblock) else { return Ok(whole()) };
    let mut descriptors = vec![0; layout.groups * layout.descriptor];
    device.read_exact_at(&mut descriptors, layout.table)?;
    let mut ranges: Vec<Range<u64>> = Vec::new();
    for (group, descriptor) in descriptors.chunks_exact(layout.descriptor).enumerate() {
        if u16_at(descriptor, 0x12) & BLOCK_UNINIT != 0 {
            continue;
        }
        let start = layout.first + group as u64 * layout.group;
        let end = start + layout.group;
        match ranges.last_mut() {
            Some(last) if last.end == start => last.end = end,
            _ => ranges.push(start..end),
        }
    }
    Ok(ranges)
}

/// All in bytes but the count of groups.
struct Layout {
    first: u64,
    group: u64,
    groups: usize,
    table: u64,
    descriptor: usize,
}

impl Layout {
    /// `None` if it is no ext4 with its descriptors in one table that say what was never used.
    fn of(superblock: &[u8; 1024]) -> Option<Self> {
        let (incompat, ro_compat) = (u32_at(superblock, 0x60), u32_at(superblock, 0x64));
        let is_wide = incompat & INCOMPAT_64BIT != 0;
        if u16_at(superblock, 0x38) != MAGIC || incompat & INCOMPAT_META_BG != 0 || ro_compat & RO_COMPAT_CSUMS == 0 {
            return None;
        }
        let block = 1024u64.checked_shl(u32_at(superblock, 0x18)).filter(|block| (1024..=65536).contains(block))?;
        let high = if is_wide { u64::from(u32_at(superblock, 0x150)) << 32 } else { 0 };
        let blocks = (u64::from(u32_at(superblock, 0x4)) | high).checked_sub(u32_at(superblock, 0x14).into())?;
        let per_group = Some(u64::from(u32_at(superblock, 0x20))).filter(|count| (8..=8 * block).contains(count))?;
        let first_block = u64::from(u32_at(superblock, 0x14));
        let descriptor = if is_wide { usize::from(u16_at(superblock, 0xfe)) } else { 32 };
        // 2^20 groups are 128 TiB.
        let groups = usize::try_from(blocks.div_ceil(per_group)).ok().filter(|&groups| groups <= 1 << 20)?;
        (32..=1024).contains(&descriptor).then_some(Self {
            first: first_block * block,
            group: per_group * block,
            groups,
            table: (first_block + 1) * block,
            descriptor,
        })
    }
}

fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]])
}

#[cfg(test)]
mod tests {
    use super::*;

    fn made(size: &str, options: &[&str]) -> (tempfile::NamedTempFile, Vec<Range<u64>>) {
        let file = tempfile::NamedTempFile::new().expect("a file");
        let run = |command: &mut std::process::Command| {
            let output = command.output().expect("e2fsprogs and coreutils");
            assert!(output.status.success(), "{command:?}: {}", String::from_utf8_lossy(&output.stderr));
        };
        run(std::process::Command::new("truncate").args(["-s", size]).arg(file.path()));
        run(std::process::Command::new("mkfs.ext4").args(["-q", "-F"]).args(options).arg(file.path()));
        let ranges = allocated(file.as_file()).expect("its groups");
        (file, ranges)
    }

    #[test]
    fn a_fresh_file_system_was_hardly_allocated_from() {
        let (_file, ranges) = made("64G", &[]);
        let bytes: u64 = ranges.iter().map(|range| range.end - range.start).sum();
        assert!(ranges[0].start == 0 && ranges.is_sorted_by(|a, b| a.end < b.start), "{ranges:?}");
        // Flex groups keep their tables in every sixteenth group; the backup superblocks lie in a few others.
        assert!(bytes < 64 << 27, "{bytes} of 64 GiB: {ranges:?}");
    }

    #[test]
    fn a_file_system_that_does_not_say_is_taken_whole() {
        assert_eq!(made("64M", &["-O", "^metadata_csum,^uninit_bg"]).1, whole());
        assert_eq!(made("64M", &["-O", "meta_bg,^resize_inode"]).1, whole());
        let nothing = tempfile::NamedTempFile::new().expect("a file");
        nothing.as_file().set_len(1 << 20).expect("a size");
        assert_eq!(allocated(nothing.as_file()).expect("zeros"), whole());
    }

    #[test]
    fn small_blocks_and_narrow_descriptors_are_understood() {
        let (_file, ranges) = made("256M", &["-b", "1024", "-O", "^64bit"]);
        assert_eq!(ranges[0].start, 1024, "{ranges:?}");
        assert!(ranges.last().is_some_and(|range| range.end <= 1024 + (256 << 20)), "{ranges:?}");
    }
}
