//! Opening a file or block device that nobody else uses, and keeping others of our kind out while it is open.
//!
//! | in use by | told by |
//! |---|---|
//! | a mount, swap, device mapper, MD, LVM, a loop device on it | a block device does not open with O_EXCL |
//! | a process that has the device, its disk or a partition of it open for writing | /proc/*/fd, as far as this user may look |
//! | somebody who has the file open for writing, a loop device and a swap file included | the kernel grants no read lease (F_SETLEASE) on it; where it has no leases, /proc/*/fd |
//! | a loop device that only reads | /sys/block/loop*/loop/backing_file |
//! | QEMU, and others that lock bytes | F_OFD_GETLK |
//! | another decant | flock, exclusive for a writer, shared for readers |
//!
//! What this cannot see: whoever comes later (a block device that is being written, and one that is a clone's origin, keeps its
//! O_EXCL claim, so that it cannot be mounted; nobody else is kept out but decant), users on other hosts of a network file
//! system or of a shared disk, and what processes that /proc does not show have open where the kernel does not tell: without root
//! those of other users, inside a container those outside it.

#![allow(unsafe_code)]

mod holders;

use std::fs::{File, OpenOptions};
use std::io;
use std::os::fd::AsRawFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::FlockOperation;
use rustix::io::Errno;

/// Sets the signal of a file's events (include/uapi/asm-generic/fcntl.h).
const F_SETSIG: i32 = 10;

/// Why something cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ClaimError {
    /// Somebody uses it.
    #[error("{} is in use: {by}", path.display())]
    InUse {
        /// What.
        path: PathBuf,
        /// Who, as far as that can be told.
        by: String,
    },
    /// Neither a file nor a block device.
    #[error("{} is neither a regular file nor a block device", .0.display())]
    Kind(PathBuf),
    /// It cannot be opened.
    #[error("cannot open {}: {source}", path.display())]
    Open {
        /// What.
        path: PathBuf,
        /// Why.
        #[source]
        source: io::Error,
    },
}

/// A file or block device that was found unused.
#[derive(Debug)]
pub struct Claim {
    /// Open as asked for; closing it ends the claim.
    pub file: File,
    /// Bytes.
    pub size: u64,
    /// Whether it is a block device.
    pub is_block_device: bool,
}

impl Claim {
    /// Fills `buffer` from `offset`; past the end is EIO.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        let mut done = 0;
        while done < buffer.len() {
            match rustix::io::pread(&self.file, &mut buffer[done..], offset + done as u64) {
                // The file was cut short by somebody: what was there is not zeros.
                Ok(0) => return Err(Errno::IO),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(error) => return Err(error),
            }
        }
        Ok(())
    }
}

/// What something is opened for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Purpose {
    /// Reading, beside other readers.
    Read,
    /// Reading what must not change for as long as it is open: nobody may mount it meanwhile.
    Origin,
    /// Writing.
    Write,
}

/// Opens `path` for reading, and for writing if asked. Writers share with nobody, readers with readers.
///
/// # Errors
/// [`ClaimError`]; nothing was changed.
pub fn claim(path: &Path, write: bool) -> Result<Claim, ClaimError> {
    claim_for(path, if write { Purpose::Write } else { Purpose::Read })
}

/// Opens a clone's origin for reading. A block device stays claimed for as long as it is open; a file is shared with readers.
///
/// # Errors
/// [`ClaimError`].
pub fn claim_origin(path: &Path) -> Result<Claim, ClaimError> {
    claim_for(path, Purpose::Origin)
}

fn claim_for(path: &Path, purpose: Purpose) -> Result<Claim, ClaimError> {
    let open = |source| ClaimError::Open { path: path.to_owned(), source };
    let meta = std::fs::metadata(path).map_err(open)?;
    let is_block_device = meta.file_type().is_block_device();
    let write = purpose == Purpose::Write;
    let file = if is_block_device {
        open_device(path, purpose)?
    } else if meta.is_file() {
        open_file(path, write)?
    } else {
        return Err(ClaimError::Kind(path.to_owned()));
    };
    let lock = if write { FlockOperation::NonBlockingLockExclusive } else { FlockOperation::NonBlockingLockShared };
    match rustix::fs::flock(&file, lock) {
        Ok(()) => {}
        Err(Errno::AGAIN) => return Err(in_use(path, "another process, most likely a decant, has locked it")),
        Err(error) => return Err(open(error.into())),
    }
    if let Some(whose) = holders::locked_bytes(&file, write) {
        return Err(in_use(path, format!("{whose} has locked bytes of it, as QEMU does")));
    }
    if is_block_device && let Some(writer) = holders::writer_of(&holders::Target::device(meta.rdev())) {
        return Err(in_use(path, format!("{writer} has it open for writing")));
    }
    let size = if is_block_device {
        // The end is where seeking says; the metadata of a device node has no length.
        rustix::fs::seek(&file, rustix::fs::SeekFrom::End(0)).map_err(|error| open(error.into()))?
    } else {
        file.metadata().map_err(open)?.len()
    };
    Ok(Claim { file, size, is_block_device })
}

fn in_use(path: &Path, by: impl Into<String>) -> ClaimError {
    ClaimError::InUse { path: path.to_owned(), by: by.into() }
}

fn open_device(path: &Path, purpose: Purpose) -> Result<File, ClaimError> {
    let write = purpose == Purpose::Write;
    let exclusive = OpenOptions::new().read(true).write(write).custom_flags(libc::O_EXCL).open(path);
    let claimed = exclusive.map_err(|source| match source.raw_os_error() {
        Some(libc::EBUSY) => in_use(
            path,
            "it is mounted, is swap, belongs to a device mapper, RAID or loop device, or another decant has it",
        ),
        _ => ClaimError::Open { path: path.to_owned(), source },
    })?;
    if purpose != Purpose::Read {
        return Ok(claimed);
    }
    // Nobody has a claim, so nobody writes by one; ours would keep other readers out.
    let shared = File::open(path).map_err(|source| ClaimError::Open { path: path.to_owned(), source })?;
    Ok(shared)
}

fn open_file(path: &Path, write: bool) -> Result<File, ClaimError> {
    let open = |source| ClaimError::Open { path: path.to_owned(), source };
    let file = File::open(path).map_err(open)?;
    if let Some(device) = loop_device_on(&file).map_err(open)? {
        return Err(in_use(path, format!("the loop device {device} is on it")));
    }
    match lease(&file, libc::F_RDLCK) {
        Ok(()) => lease(&file, libc::F_UNLCK).map_err(|error| open(error.into()))?,
        Err(Errno::AGAIN) => return Err(in_use(path, "another process has it open for writing")),
        // A file system without leases, or somebody else's file and no CAP_LEASE.
        Err(_) => {
            let meta = file.metadata().map_err(open)?;
            if let Some(writer) = holders::writer_of(&holders::Target::file(meta.dev(), meta.ino())) {
                return Err(in_use(path, format!("{writer} has it open for writing")));
            }
        }
    }
    if !write {
        return Ok(file);
    }
    // The very file that was looked at, whatever the path leads to by now.
    let same = format!("/proc/self/fd/{}", file.as_raw_fd());
    OpenOptions::new().read(true).write(true).open(same).map_err(open)
}

/// Takes or gives back a lease. While it is held for a moment, whoever opens the file for writing waits, and this process gets
/// SIGURG, which it ignores by default, instead of SIGIO, which would end it.
fn lease(file: &File, kind: i32) -> Result<(), Errno> {
    let fd = file.as_raw_fd();
    // SAFETY: `fd` is open for the duration of both calls, which take an integer and no memory.
    let result = unsafe {
        match libc::fcntl(fd, F_SETSIG, libc::SIGURG) {
            0 => libc::fcntl(fd, libc::F_SETLEASE, kind),
            failed => failed,
        }
    };
    if result == 0 {
        return Ok(());
    }
    Err(Errno::from_io_error(&io::Error::last_os_error()).unwrap_or(Errno::INVAL))
}

/// A loop device whose file this is.
fn loop_device_on(file: &File) -> io::Result<Option<String>> {
    let meta = file.metadata()?;
    let Ok(blocks) = std::fs::read_dir("/sys/block") else { return Ok(None) };
    for entry in blocks.flatten() {
        let name = entry.file_name().to_string_lossy().into_owned();
        if !name.starts_with("loop") {
            continue;
        }
        let Ok(backing) = std::fs::read_to_string(entry.path().join("loop/backing_file")) else { continue };
        // A path of another mount namespace may lead elsewhere; then a writer is told by the lease.
        let same = std::fs::metadata(backing.trim_end_matches('\n'))
            .is_ok_and(|other| (other.dev(), other.ino()) == (meta.dev(), meta.ino()));
        if same {
            return Ok(Some(format!("/dev/{name}")));
        }
    }
    Ok(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(result: Result<Claim, ClaimError>) -> String {
        result.expect_err("in use").to_string()
    }

    #[test]
    fn a_file_is_claimed_by_one_writer_or_many_readers() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        std::fs::write(&path, [7; 8192]).unwrap();
        let reader = claim(&path, false).unwrap();
        assert_eq!((reader.size, reader.is_block_device), (8192, false));
        let other = claim(&path, false).unwrap();
        assert!(reason(claim(&path, true)).contains("another process, most likely a decant"));
        drop((reader, other));
        let writer = claim(&path, true).unwrap();
        for write in [false, true] {
            assert!(reason(claim(&path, write)).contains("open for writing"), "write {write}");
        }
        drop(writer);
        assert!(claim(&path, true).is_ok());
    }

    #[test]
    fn who_writes_without_any_lock_is_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        let writer = File::create(&path).unwrap();
        assert!(reason(claim(&path, false)).contains("open for writing"));
        drop(writer);
        // A mere reader is in nobody's way.
        let _reader = File::open(&path).unwrap();
        assert!(claim(&path, true).is_ok());
    }

    #[test]
    fn other_kinds_of_files_are_refused() {
        assert!(reason(claim(Path::new("/"), false)).contains("neither"));
        assert!(reason(claim(Path::new("/dev/null"), false)).contains("neither"));
        assert!(reason(claim(Path::new("/nowhere/at-all"), false)).contains("cannot open"));
    }

    #[test]
    fn bytes_that_a_virtual_machine_has_locked_are_seen() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("a");
        std::fs::write(&path, [7; 8192]).unwrap();
        let machine = File::open(&path).unwrap();
        // As QEMU for a disk that it only reads: in nobody's way but a writer's.
        holders::lock_byte(&machine, 100);
        assert!(reason(claim(&path, true)).contains("has locked bytes of it"));
        assert!(claim(&path, false).is_ok() && claim_origin(&path).is_ok());
        // And for one that it writes.
        holders::lock_byte(&machine, 101);
        for purpose in [Purpose::Read, Purpose::Origin, Purpose::Write] {
            assert!(reason(claim_for(&path, purpose)).contains("has locked bytes of it"), "{purpose:?}");
        }
        drop(machine);
        assert!(claim(&path, true).is_ok());
    }
}
