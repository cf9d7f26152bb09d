//! Who else has a file or device open, or bytes of it locked.

use std::collections::BTreeSet;
use std::fs::File;
use std::os::fd::AsRawFd;
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, StatxFlags, major, makedev, minor};

/// QEMU locks byte 100 + n for each permission n that it has (block/file-posix.c); these are to write, to write what is there
/// already, and to resize.
const QEMU_WRITES: std::ops::Range<i64> = 101..104;

/// What somebody may have open.
#[derive(Debug)]
pub(super) enum Target {
    /// Block devices that are one disk: it and its partitions.
    Devices(BTreeSet<u64>),
    /// A file.
    File { device: u64, inode: u64 },
}

impl Target {
    /// A block device, the disk that it is a partition of, and the partitions that it has.
    pub(super) fn device(number: u64) -> Self {
        let mut devices = BTreeSet::from([number]);
        let directory = format!("/sys/dev/block/{}:{}", major(number), minor(number));
        if let Ok(directory) = std::fs::canonicalize(directory) {
            let of =
                |directory: &Path| directory.join("partition").exists().then(|| device_number(directory)).flatten();
            if of(&directory).is_some() {
                devices.extend(directory.parent().and_then(device_number));
            }
            let inside = std::fs::read_dir(&directory).into_iter().flatten().flatten();
            devices.extend(inside.filter_map(|entry| of(&entry.path())));
        }
        Self::Devices(devices)
    }

    pub(super) fn file(device: u64, inode: u64) -> Self {
        Self::File { device, inode }
    }

    /// Whether a descriptor of a process is of it. Never waits for a server of a network file system that is away.
    fn is(&self, descriptor: &Path) -> bool {
        // Sockets and pipes have no path.
        if !std::fs::read_link(descriptor).is_ok_and(|path| path.is_absolute()) {
            return false;
        }
        let wanted = StatxFlags::TYPE | StatxFlags::INO;
        let Ok(found) = rustix::fs::statx(CWD, descriptor, AtFlags::STATX_DONT_SYNC, wanted) else { return false };
        match self {
            Self::Devices(devices) => {
                FileType::from_raw_mode(found.stx_mode.into()) == FileType::BlockDevice
                    && devices.contains(&makedev(found.stx_rdev_major, found.stx_rdev_minor))
            }
            Self::File { device, inode } => {
                (makedev(found.stx_dev_major, found.stx_dev_minor), found.stx_ino) == (*device, *inode)
            }
        }
    }
}

/// `MAJOR:MINOR` in a device's directory in /sys.
fn device_number(directory: &Path) -> Option<u64> {
    let text = std::fs::read_to_string(directory.join("dev")).ok()?;
    let (major, minor) = text.trim().split_once(':')?;
    Some(makedev(major.parse().ok()?, minor.parse().ok()?))
}

/// Another process that has it open for writing, for people; of those that may be looked at.
pub(super) fn writer_of(target: &Target) -> Option<String> {
    let ours = std::process::id().to_string();
    for process in std::fs::read_dir("/proc").ok()?.flatten() {
        let name = process.file_name();
        let Some(pid) = name.to_str().filter(|name| name.bytes().all(|byte| byte.is_ascii_digit())) else { continue };
        if pid == ours {
            continue;
        }
        let Ok(descriptors) = std::fs::read_dir(process.path().join("fd")) else { continue };
        for descriptor in descriptors.flatten() {
            let writes = || writes(&process.path().join("fdinfo").join(descriptor.file_name()));
            if target.is(&descriptor.path()) && writes() {
                return Some(name_of(pid));
            }
        }
    }
    None
}

/// Whether a descriptor's flags, as fdinfo has them in octal, let it write.
fn writes(fdinfo: &Path) -> bool {
    let Ok(text) = std::fs::read_to_string(fdinfo) else { return false };
    let flags = text.lines().find_map(|line| line.strip_prefix("flags:"));
    let Some(flags) = flags.and_then(|flags| i32::from_str_radix(flags.trim(), 8).ok()) else { return false };
    flags & libc::O_PATH == 0 && matches!(flags & libc::O_ACCMODE, libc::O_WRONLY | libc::O_RDWR)
}

fn name_of(pid: &str) -> String {
    match std::fs::read_to_string(format!("/proc/{pid}/comm")) {
        Ok(name) => format!("process {pid} ({})", name.trim()),
        Err(_) => format!("process {pid}"),
    }
}

/// Whoever has bytes locked so that we may not use it: any for a writer, those that mean writing for a reader.
pub(super) fn locked_bytes(file: &File, write: bool) -> Option<String> {
    if write {
        return conflict(file, libc::F_WRLCK, 0, 0);
    }
    // Locked for one alone, or by somebody who writes.
    conflict(file, libc::F_RDLCK, 0, 0)
        .or_else(|| conflict(file, libc::F_WRLCK, QEMU_WRITES.start, QEMU_WRITES.end - QEMU_WRITES.start))
}

/// Who holds a lock that one of `kind` on these bytes (to the end if `length` is 0) would wait for.
fn conflict(file: &File, kind: i32, start: i64, length: i64) -> Option<String> {
    let mut lock = range(kind, start, length);
    // SAFETY: the descriptor is open, and the kernel reads and fills the one structure that the pointer is to.
    let result = unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_GETLK, &mut lock) };
    if result != 0 || i32::from(lock.l_type) == libc::F_UNLCK {
        return None;
    }
    // A lock of an open file, as QEMU's, names no process.
    Some(if lock.l_pid > 0 { name_of(&lock.l_pid.to_string()) } else { "another process".to_owned() })
}

fn range(kind: i32, start: i64, length: i64) -> libc::flock {
    // SAFETY: a structure of integers, for which zeros are a value.
    let mut lock: libc::flock = unsafe { std::mem::zeroed() };
    lock.l_type = kind as _;
    lock.l_whence = libc::SEEK_SET as _;
    (lock.l_start, lock.l_len) = (start, length);
    lock
}

/// Locks a byte for reading, as QEMU does, until the file is closed.
#[cfg(test)]
pub(super) fn lock_byte(file: &File, byte: i64) {
    let lock = range(libc::F_RDLCK, byte, 1);
    // SAFETY: the descriptor is open, and the kernel reads the one structure that the pointer is to.
    assert_eq!(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_OFD_SETLK, &lock) }, 0);
}
