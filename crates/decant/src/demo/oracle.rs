//! What is true, from outside the product: how much of a file system is live, and what crossed a worker's interface.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, bail, ensure};

/// Bytes that the file system mounted at `mounted`, on `device`, needs: what its files and directories take by statvfs,
/// and its own live metadata by dumpe2fs. The journal is not counted: a cleanly unmounted file system needs none of it.
pub(crate) fn used_bytes(mounted: &Path, device: &Path) -> anyhow::Result<u64> {
    let stat = rustix::fs::statvfs(mounted).with_context(|| format!("looking at {}", mounted.display()))?;
    let files = (stat.f_blocks - stat.f_bfree) * stat.f_frsize;
    Ok(files + metadata_bytes(&dump(device)?)?)
}

/// The file system is mounted and in use: a look may fall between a change of the superblock or a descriptor and its checksum.
fn dump(device: &Path) -> anyhow::Result<String> {
    const LOOKS: u32 = 20;
    let program = program("dumpe2fs")?;
    for look in 1.. {
        let output = Command::new(&program).arg(device).env("LC_ALL", "C").output().context("running dumpe2fs")?;
        if output.status.success() {
            return Ok(String::from_utf8_lossy(&output.stdout).into_owned());
        }
        let said = String::from_utf8_lossy(&output.stderr);
        ensure!(said.contains("checksum") && look < LOOKS, "dumpe2fs: {said}");
    }
    unreachable!("the last look returns")
}

fn program(name: &str) -> anyhow::Result<PathBuf> {
    crate::cli::doctor::find_program(name).with_context(|| format!("{name} is missing: apt-get install e2fsprogs"))
}

/// Live metadata of an ext4 file system as dumpe2fs describes it: superblocks and group descriptors with their copies,
/// initialised bitmaps, and inode tables up to the last inode in use.
fn metadata_bytes(dump: &str) -> anyhow::Result<u64> {
    let header = |name: &str| -> anyhow::Result<u64> {
        let line = dump.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|value| value.trim().parse().ok()).with_context(|| format!("dumpe2fs does not say {name:?}"))
    };
    let block = header("Block size:")?;
    let inodes_per_group = header("Inodes per group:")?;
    let inode_size = header("Inode size:")?;
    let mut blocks = 0;
    let (mut unused, mut inode_bitmap_live, mut groups) = (0, false, 0);
    for line in dump.lines() {
        let line = line.trim_start();
        if let Some(rest) = line.strip_prefix("Group ") {
            groups += 1;
            // `Group 0: (Blocks 0-32767) csum 0x1234 [INODE_UNINIT, ITABLE_ZEROED]`
            inode_bitmap_live = !rest.contains("INODE_UNINIT");
            unused = if inode_bitmap_live { 0 } else { inodes_per_group };
            blocks += u64::from(!rest.contains("BLOCK_UNINIT")) + u64::from(inode_bitmap_live);
        } else if line.starts_with("Primary superblock at") || line.starts_with("Backup superblock at") {
            // `Primary superblock at 0, Group descriptors at 1-1`
            blocks += 1 + line.rsplit_once("descriptors at ").map_or(Ok(0), |(_, range)| range_blocks(range))?;
        } else if let Some((_, rest)) = line.split_once(" free blocks, ") {
            // `23513 free blocks, 8181 free inodes, 2 directories, 8181 unused inodes`
            let said = rest.split(", ").find_map(|part| part.strip_suffix(" unused inodes"));
            if let Some(said) = said.filter(|_| inode_bitmap_live) {
                unused = said.trim().parse().context("reading dumpe2fs's unused inodes")?;
            }
            blocks += ((inodes_per_group - unused) * inode_size).div_ceil(block);
        }
    }
    if groups == 0 {
        bail!("dumpe2fs lists no groups");
    }
    Ok(blocks * block)
}

fn range_blocks(range: &str) -> anyhow::Result<u64> {
    let (first, last) = range.trim().split_once('-').unwrap_or((range.trim(), range.trim()));
    let (first, last): (u64, u64) = (first.parse()?, last.parse()?);
    ensure!(last >= first, "dumpe2fs gives the range {range:?}");
    Ok(last - first + 1)
}

/// `/data` of a running machine as the host's root sees it. `netns` is where the machine's network namespace is pinned.
pub(crate) fn machine_data(netns: &Path) -> anyhow::Result<PathBuf> {
    use std::os::unix::fs::MetadataExt;
    let inode = fs::metadata(netns).with_context(|| format!("looking at {}", netns.display()))?.ino();
    let processes = fs::read_dir("/proc")?.flatten().map(|entry| entry.path());
    let inside = processes.filter(|process| fs::metadata(process.join("ns/net")).is_ok_and(|meta| meta.ino() == inode));
    let mut with_data = inside.map(|process| process.join("root/data")).filter(|data| data.join("lost+found").is_dir());
    with_data.next().with_context(|| format!("no process in {} has /data", netns.display()))
}

/// A worker's interface to the other workers.
pub(crate) const UPLINK: &str = "up0";

/// Bytes that an interface has carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) struct Carried {
    pub(crate) received: u64,
    pub(crate) sent: u64,
}

/// What each interface of a namespace but the loopback has carried, read through one of the processes in it.
pub(crate) fn carried(pid_in_namespace: u32) -> anyhow::Result<Vec<(String, Carried)>> {
    let text = fs::read_to_string(format!("/proc/{pid_in_namespace}/net/dev")).context("reading interface counters")?;
    Ok(parse_carried(&text))
}

/// `/proc/net/dev` (proc(5)): two lines of headings, then `name: received-bytes …7 more… sent-bytes …`.
fn parse_carried(table: &str) -> Vec<(String, Carried)> {
    let lines = table.lines().skip(2).filter_map(|line| line.split_once(':'));
    let counts = lines.map(|(name, rest)| {
        let words: Vec<u64> = rest.split_whitespace().filter_map(|word| word.parse().ok()).collect();
        let at = |index: usize| words.get(index).copied().unwrap_or(0);
        (name.trim().to_owned(), Carried { received: at(0), sent: at(8) })
    });
    counts.filter(|(name, _)| name != "lo").collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn live_metadata_is_counted_by_group() {
        let dump = "Block size:               4096\nInodes per group:         8192\nInode size:\t          256\n\n\
            Group 0: (Blocks 0-32767) csum 0x1 [ITABLE_ZEROED]\n\
            \x20 Primary superblock at 0, Group descriptors at 1-1\n\
            \x20 Reserved GDT blocks at 2-512\n\
            \x20 23513 free blocks, 8176 free inodes, 2 directories, 8176 unused inodes\n\
            Group 1: (Blocks 32768-65535) csum 0x2 [INODE_UNINIT, ITABLE_ZEROED]\n\
            \x20 Backup superblock at 32768, Group descriptors at 32769-32769\n\
            \x20 32254 free blocks, 8192 free inodes, 0 directories, 8192 unused inodes\n\
            Group 2: (Blocks 65536-98303) csum 0x3 [INODE_UNINIT, BLOCK_UNINIT, ITABLE_ZEROED]\n\
            \x20 32768 free blocks, 8192 free inodes, 0 directories, 8192 unused inodes\n";
        // Group 0: superblock, descriptors, two bitmaps, 16 inodes of 256 bytes = 1 block. Group 1: superblock,
        // descriptors, block bitmap. Group 2: nothing.
        assert_eq!(metadata_bytes(dump).expect("it reads"), (5 + 3) * 4096);
        assert!(metadata_bytes("").is_err());
    }

    #[test]
    fn a_real_file_system_is_measured() {
        // Unmounted, so by dumpe2fs alone: what mkfs wrote, less the journal, is a few hundred KiB.
        let Ok(mkfs) = program("mkfs.ext4") else {
            println!("SKIP a_real_file_system_is_measured: e2fsprogs is missing");
            return;
        };
        let directory = tempfile::tempdir().expect("a temporary directory");
        let image = directory.path().join("image");
        fs::File::create(&image).and_then(|file| file.set_len(1 << 30)).expect("a file");
        let made = Command::new(mkfs).args(["-q", "-F", "-b", "4096"]).arg(&image).status().expect("mkfs.ext4 runs");
        assert!(made.success());
        let dump = Command::new(program("dumpe2fs").expect("it is there")).arg(&image).output().expect("dumpe2fs runs");
        let bytes = metadata_bytes(&String::from_utf8_lossy(&dump.stdout)).expect("it reads");
        assert!((40 << 10..2 << 20).contains(&bytes), "{bytes}");
    }

    #[test]
    fn counters_are_told_apart() {
        let table = "Inter-|   Receive                                                |  Transmit\n\
            \x20face |bytes    packets errs drop fifo frame compressed multicast|bytes    packets errs drop fifo colls carrier compressed\n\
            \x20   lo:     100       1    0    0    0     0          0         0      100       1    0    0    0     0       0          0\n\
            \x20  up0:    1000       1    0    0    0     0          0         0     2000       1    0    0    0     0       0          0\n\
            \x20 d1.3:      10       1    0    0    0     0          0         0       20       1    0    0    0     0       0          0\n";
        let up = ("up0".to_owned(), Carried { received: 1000, sent: 2000 });
        let machine = ("d1.3".to_owned(), Carried { received: 10, sent: 20 });
        assert_eq!(parse_carried(table), [up, machine]);
    }
}
