//! Against file systems that mkfs.ext4 made, the kernel wrote and e2fsck judges (Debian package e2fsprogs).
//!
//! The proof of "not needed": in a copy, the blocks are overwritten (with zeros, which is what the destination reads, and once
//! with noise, which is stronger), then e2fsck finds nothing, the kernel mounts it, every file is as before, and it can be
//! written to, unmounted and judged again.

use std::collections::BTreeMap;
use std::fs::{File, OpenOptions};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};

use proptest::prelude::*;

use super::*;

const MIB: u64 = 1 << 20;

fn run(program: &str, arguments: &[&str]) -> Output {
    match Command::new(program).args(arguments).output() {
        Ok(output) => output,
        Err(error) => panic!("cannot run {program} ({error}); install the Debian package e2fsprogs"),
    }
}

fn must(program: &str, arguments: &[&str]) {
    let output = run(program, arguments);
    let said = String::from_utf8_lossy(&output.stdout) + String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{program} {arguments:?}: {said}");
}

/// A directory with an image in it, unmounted when dropped.
struct World {
    root: tempfile::TempDir,
    /// What it was made with.
    options: Vec<String>,
    /// Whose it is.
    test: &'static str,
}

/// A mount namespace for this thread and what it starts. Another test's child that copies the mounts, as each shim and each agent
/// of a fleet does, would keep a file system of this one in use, and its image unclean, after it was unmounted.
#[allow(unsafe_code)]
fn isolate_mounts() -> rustix::io::Result<()> {
    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    thread_local! {
        static ISOLATED: std::cell::Cell<bool> = const { std::cell::Cell::new(false) };
    }
    if !ISOLATED.get() {
        // SAFETY: a mount namespace, unlike a table of descriptors, is shared with no code that relies on it.
        unsafe { unshare_unsafe(UnshareFlags::NEWNS) }?;
        mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC)?;
        ISOLATED.set(true);
    }
    Ok(())
}

impl World {
    fn new(test: &'static str, size: u64, options: &[&str]) -> Self {
        // In memory where there is some: half of a test's time is a disk's syncs otherwise.
        let root = tempfile::tempdir_in("/dev/shm").or_else(|_| tempfile::tempdir()).unwrap();
        let world = Self { root, options: options.iter().map(|option| (*option).to_owned()).collect(), test };
        File::create(world.image()).unwrap().set_len(size).unwrap();
        std::fs::create_dir(world.mount_point()).unwrap();
        let image = world.image();
        must("mkfs.ext4", &[&["-F", "-q"], options, &[image.to_str().unwrap()]].concat());
        world
    }

    fn image(&self) -> PathBuf {
        self.root.path().join("image")
    }

    fn mount_point(&self) -> PathBuf {
        self.root.path().join("mnt")
    }

    /// `false`, said aloud, where this machine mounts nothing, or its kernel not such a file system.
    fn mount(&self, image: &Path) -> bool {
        if let Err(error) = isolate_mounts() {
            println!("SKIP {}: a mount namespace cannot be made, which needs root: {error}", self.test);
            return false;
        }
        let mount_point = self.mount_point();
        let output = run("mount", &["-o", "loop", image.to_str().unwrap(), mount_point.to_str().unwrap()]);
        if !output.status.success() {
            let said = String::from_utf8_lossy(&output.stderr);
            let options = self.options.join(" ");
            let said = said.trim();
            println!("SKIP {}: not mounted here, made with mkfs.ext4 {options}: {said}; dmesg may say more", self.test);
        }
        output.status.success()
    }

    fn unmount(&self) {
        // A child that another test's thread is just forking holds copies of our descriptors until it executes its program.
        for _ in 0..200 {
            let output = run("umount", &[self.mount_point().to_str().unwrap()]);
            if output.status.success() {
                return;
            }
            let said = String::from_utf8_lossy(&output.stderr);
            assert!(said.contains("busy"), "umount: {said}");
        }
        panic!("{} stays busy", self.mount_point().display());
    }

    /// Files large and small, some of them deleted again, in several transactions.
    fn work(&self, seed: u64) {
        let root = self.mount_point();
        for round in 0..4u64 {
            let directory = root.join(format!("d{round}"));
            std::fs::create_dir_all(&directory).unwrap();
            for n in 0..30u64 {
                let length = (1 + n * n * 400 + seed % 1000) as usize;
                std::fs::write(directory.join(format!("f{n}")), noise(seed ^ (round << 32 | n), length)).unwrap();
            }
            must("sync", &["-f", root.to_str().unwrap()]);
            for n in (0..30).step_by(2) {
                std::fs::remove_file(directory.join(format!("f{n}"))).unwrap();
            }
        }
        std::fs::write(root.join("big"), noise(seed, 3 << 20)).unwrap();
        std::fs::remove_dir_all(root.join("d2")).unwrap();
    }

    fn files(&self) -> BTreeMap<PathBuf, Vec<u8>> {
        let mut files = BTreeMap::new();
        let mut left = vec![self.mount_point()];
        while let Some(directory) = left.pop() {
            for entry in std::fs::read_dir(directory).unwrap() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    left.push(path);
                } else {
                    files.insert(path.clone(), std::fs::read(path).unwrap());
                }
            }
        }
        files
    }

    fn check(&self, image: &Path) {
        let output = run("e2fsck", &["-f", "-n", image.to_str().unwrap()]);
        let said = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && !said.contains("? no"), "e2fsck: {said}");
    }

    fn unneeded(&self) -> Unneeded {
        inspect(&File::open(self.image()).unwrap())
    }

    /// Overwrites what is not needed in a copy and shows that nobody misses it.
    fn prove(&self, fill: u8, what: &ExtentSet) {
        self.check(&self.image());
        if !self.mount(&self.image()) {
            return;
        }
        let before = self.files();
        self.unmount();
        let copy = self.root.path().join("copy");
        must("cp", &["--sparse=always", self.image().to_str().unwrap(), copy.to_str().unwrap()]);
        // The mount above wrote to the superblock: ask again, the answer must still be right for the copy.
        let file = OpenOptions::new().write(true).open(&copy).unwrap();
        let noise = vec![fill; 1 << 20];
        for run in what.iter() {
            // A long run by its first and last MiB: nobody waits for 40 GiB.
            for part in
                [run.start..run.end().min(run.start + 256), run.start.max(run.end().saturating_sub(256))..run.end()]
            {
                let length = ((part.end - part.start) * BLOCK) as usize;
                file.write_all_at(&noise[..length], part.start * BLOCK).unwrap();
            }
        }
        drop(file);
        self.check(&copy);
        assert!(self.mount(&copy));
        let after = self.files();
        assert!(before == after, "files differ");
        self.work(99);
        self.unmount();
        self.check(&copy);
        std::fs::remove_file(copy).unwrap();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        // Only after a failed assertion is anything still mounted here.
        let _ = Command::new("umount").arg(self.mount_point()).output();
    }
}

fn noise(seed: u64, length: usize) -> Vec<u8> {
    let mut state = seed | 1;
    let mut out = Vec::with_capacity(length + 8);
    while out.len() < length {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        out.extend_from_slice(&state.to_le_bytes());
    }
    out.truncate(length);
    out
}

fn all(size: u64) -> ExtentSet {
    let mut live = ExtentSet::new();
    live.insert(0..size / BLOCK);
    live
}

fn inspect(file: &File) -> Unneeded {
    let size = file.metadata().unwrap().len();
    let read = |offset: u64, buffer: &mut [u8]| {
        assert!(
            offset.is_multiple_of(BLOCK) && buffer.len().is_multiple_of(BLOCK as usize),
            "{} at {offset}",
            buffer.len()
        );
        file.read_exact_at(buffer, offset).ok()
    };
    unneeded(&read, size, &all(size))
}

/// What debugfs says about the journal, to compare with: blocks of it, without its superblock.
fn journal_blocks(image: &Path) -> u64 {
    let output = run("dumpe2fs", &["-h", image.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap_or_else(|| panic!("no {name} in {text}"));
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    (number("Total journal blocks:") - 1) * number("Block size:")
}

fn free_bytes(image: &Path) -> u64 {
    let output = run("dumpe2fs", &["-h", image.to_str().unwrap()]);
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    let number = |name: &str| -> u64 {
        let line = text.lines().find(|line| line.starts_with(name)).unwrap();
        line.rsplit(' ').next().unwrap().parse().unwrap()
    };
    number("Free blocks:") * number("Block size:")
}

/// One file system through its life: fresh, used, zeroed, filled with noise.
fn life(test: &'static str, size: u64, options: &[&str], journal: bool, free: bool) {
    let world = World::new(test, size, options);
    let judge = |found: &Unneeded| {
        let bytes = found.journal.len() * BLOCK;
        if journal {
            let want = journal_blocks(&world.image());
            // Rounding inward at each end of each extent costs less than this.
            assert!(bytes <= want && bytes + 64 * BLOCK > want, "journal {bytes} of {want}");
        } else {
            assert_eq!(bytes, 0, "journal");
        }
        let bytes = found.free.len() * BLOCK;
        if free {
            let want = free_bytes(&world.image());
            assert!(bytes <= want && bytes * 10 >= want * 8, "free {bytes} of {want}");
        } else {
            assert_eq!(bytes, 0, "free");
        }
        let together = found.journal.len() + found.free.len();
        assert_eq!(found.all().len(), together, "the journal is not free");
    };
    let fresh = world.unneeded();
    judge(&fresh);
    if !world.mount(&world.image()) {
        return;
    }
    world.work(7);
    world.unmount();
    let used = world.unneeded();
    judge(&used);
    if used == Unneeded::default() {
        return;
    }
    // Noise is stronger than the zeros that a destination reads, except where zeros mean something: once for each.
    let fill = if size == 256 * MIB { 0 } else { 0xa5 };
    world.prove(fill, &used.all());
}

#[test]
fn as_mkfs_makes_it() {
    life("as_mkfs_makes_it", 256 * MIB, &["-b", "4096"], true, true);
    life("as_mkfs_makes_it", 128 * MIB, &["-b", "4096"], true, true);
}

#[test]
fn small_blocks() {
    life("small_blocks", 64 * MIB, &["-b", "1024"], true, true);
}

#[test]
fn blocks_of_2048() {
    life("blocks_of_2048", 64 * MIB, &["-b", "2048"], true, true);
}

#[test]
fn a_journal_in_many_pieces() {
    life(
        "a_journal_in_many_pieces",
        128 * MIB,
        &["-b", "4096", "-g", "2048", "-O", "^flex_bg", "-J", "size=32"],
        true,
        true,
    );
}

#[test]
fn a_journal_in_many_pieces_of_small_blocks() {
    life(
        "a_journal_in_many_pieces_of_small_blocks",
        64 * MIB,
        &["-b", "1024", "-g", "1024", "-O", "^flex_bg,^resize_inode", "-J", "size=8"],
        true,
        true,
    );
}

#[test]
fn a_sparse_giant() {
    life("a_sparse_giant", 40 << 30, &[], true, true);
}

#[test]
fn short_descriptors() {
    life("short_descriptors", 128 * MIB, &["-O", "^64bit"], true, true);
}

#[test]
fn small_inodes() {
    life("small_inodes", 64 * MIB, &["-I", "128"], true, true);
}

#[test]
fn written_inode_tables_and_journal() {
    life("written_inode_tables_and_journal", 64 * MIB, &["-E", "lazy_itable_init=0,lazy_journal_init=0"], true, true);
}

#[test]
fn fast_commits_and_seeds() {
    life("fast_commits_and_seeds", 128 * MIB, &["-O", "fast_commit,metadata_csum_seed"], true, true);
}

#[test]
fn an_orphan_file() {
    life("an_orphan_file", 128 * MIB, &["-O", "orphan_file"], true, true);
}

#[test]
fn inline_data_and_much_else() {
    life("inline_data_and_much_else", 128 * MIB, &["-O", "inline_data,large_dir,ea_inode,encrypt"], true, true);
}

/// Kernels are built without CONFIG_QUOTA or without CONFIG_UNICODE and then mount no such file system: one each.
#[test]
fn quotas() {
    life("quotas", 128 * MIB, &["-O", "quota,project"], true, true);
}

#[test]
fn names_without_case() {
    life("names_without_case", 128 * MIB, &["-O", "casefold"], true, true);
}

#[test]
fn without_checksums_only_the_journal_is_known() {
    life("without_checksums_only_the_journal_is_known", 64 * MIB, &["-O", "^metadata_csum"], true, false);
    life("without_checksums_only_the_journal_is_known", 64 * MIB, &["-O", "^metadata_csum,^uninit_bg"], true, false);
}

#[test]
fn clusters_leave_only_the_journal() {
    life("clusters_leave_only_the_journal", 128 * MIB, &["-b", "4096", "-O", "bigalloc", "-C", "16384"], true, false);
    // Their first block is 0 although it should be 1; a layout of its own.
    life("clusters_leave_only_the_journal", 128 * MIB, &["-b", "1024", "-O", "bigalloc", "-C", "16384"], false, false);
}

#[test]
fn no_journal_leaves_only_the_free() {
    life("no_journal_leaves_only_the_free", 64 * MIB, &["-O", "^has_journal"], false, true);
}

#[test]
fn strange_layouts_are_moved_whole() {
    life("strange_layouts_are_moved_whole", 64 * MIB, &["-O", "^extent,^64bit,^metadata_csum"], false, false);
    life("strange_layouts_are_moved_whole", 64 * MIB, &["-O", "meta_bg,^resize_inode"], false, false);
    life("strange_layouts_are_moved_whole", 64 * MIB, &["-O", "mmp"], false, false);
    life("strange_layouts_are_moved_whole", 64 * MIB, &["-O", "sparse_super2"], true, false);
}

/// A copy of the image of a mounted file system, as a crash would leave it: its journal is needed.
#[test]
fn a_file_system_that_was_not_unmounted_is_moved_whole() {
    let world = World::new("a_file_system_that_was_not_unmounted_is_moved_whole", 64 * MIB, &[]);
    if !world.mount(&world.image()) {
        return;
    }
    world.work(3);
    must("sync", &["-f", world.mount_point().to_str().unwrap()]);
    let copy = world.root.path().join("crashed");
    must("cp", &[world.image().to_str().unwrap(), copy.to_str().unwrap()]);
    world.unmount();
    assert_eq!(inspect(&File::open(&copy).unwrap()), Unneeded::default());
    assert!(!world.unneeded().journal.is_empty());
}

#[test]
fn marks_of_trouble_are_believed() {
    let world = World::new("marks_of_trouble_are_believed", 64 * MIB, &["-b", "4096", "-O", "^metadata_csum"]);
    let file = OpenOptions::new().read(true).write(true).open(world.image()).unwrap();
    assert!(!inspect(&file).journal.is_empty());
    let table: &[(&str, u64, &[u8])] = &[
        ("errors seen", 1024 + 0x3a, &[3, 0]),
        ("not clean", 1024 + 0x3a, &[0, 0]),
        ("needs recovery", 1024 + 0x60, &[0xc6]),
        ("orphans", 1024 + 0xe8, &[11]),
        ("orphan file in use", 1024 + 0x66, &[1]),
        ("unknown feature", 1024 + 0x63, &[0x80]),
        ("unknown read-only feature", 1024 + 0x67, &[0x80]),
        ("journal elsewhere", 1024 + 0xe4, &[1]),
        ("journal in another inode", 1024 + 0xe0, &[7]),
        ("no magic", 1024 + 0x38, &[0]),
        ("blocks beyond the device", 1024 + 0x5, &[0xff]),
    ];
    for (what, at, bytes) in table {
        let mut before = vec![0; bytes.len()];
        file.read_exact_at(&mut before, *at).unwrap();
        assert_ne!(before, *bytes, "{what}");
        file.write_all_at(bytes, *at).unwrap();
        assert_eq!(inspect(&file), Unneeded::default(), "{what}");
        file.write_all_at(&before, *at).unwrap();
    }
    assert!(!inspect(&file).journal.is_empty());

    // The journal's own superblock, in the first block of its file.
    let output = run("debugfs", &["-R", "bmap <8> 0", world.image().to_str().unwrap()]);
    let block: u64 = String::from_utf8_lossy(&output.stdout).trim().parse().unwrap();
    for (what, at, bytes) in
        [("start of the log", 0x1c, [0, 0, 0, 1]), ("an error", 0x20, [0xff; 4]), ("no magic", 0, [0; 4])]
    {
        let mut before = [0; 4];
        let at = block * 4096 + at;
        file.read_exact_at(&mut before, at).unwrap();
        file.write_all_at(&bytes, at).unwrap();
        assert!(inspect(&file).journal.is_empty(), "{what}");
        file.write_all_at(&before, at).unwrap();
    }
    assert!(!inspect(&file).journal.is_empty());
}

#[test]
fn a_damaged_bitmap_is_not_believed() {
    let world = World::new("a_damaged_bitmap_is_not_believed", 64 * MIB, &["-b", "4096"]);
    let file = OpenOptions::new().read(true).write(true).open(world.image()).unwrap();
    assert!(!inspect(&file).free.is_empty());
    let read = |offset: u64, buffer: &mut [u8]| file.read_exact_at(buffer, offset).ok();
    let volume = Aligned { volume: &read, size: 64 * MIB };
    let fs = FileSystem::read(&volume, 64 * MIB).unwrap();
    let bitmap = fs.descriptors(&volume, 1).unwrap()[0].block_bitmap;
    let mut byte = [0];
    file.read_exact_at(&mut byte, bitmap * fs.block_size + 100).unwrap();
    file.write_all_at(&[byte[0] ^ 0x10], bitmap * fs.block_size + 100).unwrap();
    assert!(inspect(&file).free.is_empty());
}

#[test]
fn only_what_is_live_is_looked_at() {
    let size = 40 << 30;
    let world = World::new("only_what_is_live_is_looked_at", size, &[]);
    let file = File::open(world.image()).unwrap();
    let reads = std::cell::Cell::new((0u64, 0u64));
    let read = |offset: u64, buffer: &mut [u8]| {
        let (count, bytes) = reads.get();
        reads.set((count + 1, bytes + buffer.len() as u64));
        file.read_exact_at(buffer, offset).ok()
    };
    let mut live = ExtentSet::new();
    live.insert(0..100);
    live.insert(200_000..200_100);
    let found = unneeded(&read, size, &live);
    assert!(found.free.len() <= 200);
    for run in found.free.iter() {
        assert_eq!(live.overlapping(run.range()).map(|part| part.length).sum::<u64>(), run.length);
    }
    let (count, bytes) = reads.get();
    assert!(count < 20 && bytes < MIB, "{count} reads of {bytes} bytes");
    assert_eq!(unneeded(&read, size, &ExtentSet::new()).free.len(), 0);
}

#[test]
fn what_is_no_ext4_is_moved_whole() {
    let nothing = |_: u64, _: &mut [u8]| None;
    let zeros = |_: u64, buffer: &mut [u8]| {
        buffer.fill(0);
        Some(())
    };
    let ones = |_: u64, buffer: &mut [u8]| {
        buffer.fill(0xff);
        Some(())
    };
    for size in [0, 1024, 4096, MIB, u64::MAX] {
        let live = all(MIB);
        assert_eq!(unneeded(&nothing, size, &live), Unneeded::default());
        assert_eq!(unneeded(&zeros, size, &live), Unneeded::default());
        assert_eq!(unneeded(&ones, size, &live), Unneeded::default());
    }
}

fn cases(cases: u32) -> ProptestConfig {
    let factor = std::env::var("DECANT_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    ProptestConfig::with_cases(cases * factor)
}

#[test]
fn damage_is_survived() {
    let size = 16 * MIB;
    let images: Vec<Vec<u8>> = [&["-O", "^metadata_csum", "-b", "1024"][..], &["-b", "4096"]]
        .map(|options| std::fs::read(World::new("damage_is_survived", size, options).image()).unwrap())
        .into();
    let strategy = (0usize..2, prop::collection::vec((0usize..8, 0usize..4096, any::<u8>()), 1..6));
    proptest!(cases(300), |((which, edits) in strategy)| {
        let mut image = images[which].clone();
        for (place, at, byte) in edits {
            // Superblock, descriptors, the first inode table, and the first blocks.
            let base = [1024, 1024, 2048, 4096, 8192, 16 << 10, 64 << 10, 256 << 10][place];
            image[base + at] = byte;
        }
        let read = |offset: u64, buffer: &mut [u8]| {
            let from = image.get(offset as usize..)?.get(..buffer.len())?;
            buffer.copy_from_slice(from);
            Some(())
        };
        let found = unneeded(&read, size, &all(size));
        prop_assert!(found.all().end() <= size / BLOCK);
    });
}
