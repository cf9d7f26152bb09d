//! Letting go of a file system's page cache before its unmount.
//!
//! An unmount drops every page the kernel keeps of the file system, while nobody is served: 65 ms for 200 MiB of a database read
//! and written in pages, and in proportion for more. Pages that are dropped while the program still runs cost it a read from the local
//! disk at most; wherever it runs next, it starts without them anyway. A help for the unmount to come, no promise: what is
//! mapped, dirty or read again stays.

use std::ffi::{CString, OsStr};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Advice, Dir, FileType, Mode, OFlags, ResolveFlags, fadvise, openat2};
use rustix::io::Errno;

/// Some 100,000 files' worth; the stop waits for it.
pub(super) const BUDGET: Duration = Duration::from_millis(500);
/// Directories remembered at most, so that a tree of any shape takes bounded memory.
const MOST_DIRECTORIES: usize = 100_000;

/// Drops the clean pages of all regular files of the file system that `root` is the top of, for at most [`BUDGET`]. The machine's
/// programs may rename and replace whatever they like meanwhile; nothing outside of the file system is touched.
pub(super) fn drop_pages(root: BorrowedFd<'_>) {
    let until = Instant::now() + BUDGET;
    let mut directories = vec![PathBuf::from(".")];
    while let Some(path) = directories.pop() {
        let Ok(mut entries) = open(root, &path, OFlags::DIRECTORY).and_then(Dir::new) else { continue };
        while let Some(Ok(entry)) = entries.read() {
            if Instant::now() >= until {
                return;
            }
            let name = OsStr::from_bytes(entry.file_name().to_bytes());
            match entry.file_type() {
                FileType::Directory if name != "." && name != ".." && directories.len() < MOST_DIRECTORIES => {
                    directories.push(path.join(name));
                }
                FileType::RegularFile => {
                    // One that is gone, or that nobody may open, has nothing to gain.
                    if let Ok(file) = open(root, &path.join(name), OFlags::NOATIME) {
                        let _ = fadvise(file.as_fd(), 0, None, Advice::DontNeed);
                    }
                }
                _ => {}
            }
        }
    }
}

/// Opens what lies in the file system itself: not through a symbolic link, not beyond another mount.
fn open(root: BorrowedFd<'_>, path: &Path, flags: OFlags) -> Result<OwnedFd, Errno> {
    let path = CString::new(path.as_os_str().as_bytes()).map_err(|_| Errno::INVAL)?;
    let flags = flags | OFlags::RDONLY | OFlags::CLOEXEC | OFlags::NOFOLLOW | OFlags::NONBLOCK;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
    openat2(root, path, flags, Mode::empty(), resolve)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;
    use std::os::fd::AsRawFd;

    /// Bytes of the file that are in the page cache: cachestat(2), Linux 6.5.
    fn cached(file: &fs::File) -> Option<u64> {
        let range = [0u64, 0];
        let mut stat = [0u64; 5];
        // SAFETY: struct cachestat_range is two u64 and struct cachestat five; both outlive the call.
        #[allow(unsafe_code)]
        let result = unsafe { libc::syscall(451, file.as_raw_fd(), range.as_ptr(), stat.as_mut_ptr(), 0) };
        (result == 0).then_some(stat[0] * 4096)
    }

    #[test]
    fn pages_go_and_what_lies_elsewhere_keeps_its_own() {
        // On a disk: a tmpfs has nothing but its pages.
        let place = tempfile::tempdir_in(std::env::current_exe().unwrap().parent().unwrap()).unwrap();
        let (inside, outside) = (place.path().join("data/deep/er"), place.path().join("outside"));
        fs::create_dir_all(&inside).unwrap();
        fs::create_dir_all(&outside).unwrap();
        let file = |path: &Path| {
            fs::write(path, vec![7; 1 << 20]).unwrap();
            let file = fs::File::open(path).unwrap();
            file.sync_all().unwrap();
            file
        };
        let (mine, theirs) = (file(&inside.join("pages")), file(&outside.join("pages")));
        std::os::unix::fs::symlink(&outside, place.path().join("data/link")).unwrap();
        std::os::unix::fs::symlink(outside.join("pages"), place.path().join("data/deep/link")).unwrap();
        if cached(&mine).is_none_or(|bytes| bytes == 0) {
            println!(
                "SKIP pages_go_and_what_lies_elsewhere_keeps_its_own: this kernel or disk does not tell what is cached"
            );
            return;
        }
        let root = fs::File::open(place.path().join("data")).unwrap();
        drop_pages(root.as_fd());
        assert_eq!(cached(&mine), Some(0));
        assert_eq!(cached(&theirs), Some(1 << 20));
    }
}
