//! Memory that holds one volume key and goes from the keeper to its volume process as a file descriptor.
//!
//! `memfd_secret` pages are in no other process's mapping of physical memory, not even the kernel's, and are never swapped.
//! Where the kernel has none (before 5.14, or `secretmem.enable=0`), a sealed memfd locked in memory serves, and says so.

#![allow(unsafe_code)]

use std::fs::File;
use std::io::{Error, Write};
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::ptr::NonNull;

use decant_luks2::{KEY_BYTES, VolumeKey};
use rustix::fs::{MemfdFlags, SealFlags};
use rustix::mm::{MapFlags, ProtFlags};

/// One page on every architecture we know would be more; the kernel rounds up.
const LENGTH: usize = 4096;

/// What kind of memory it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SecretKind {
    /// `memfd_secret`.
    Secret,
    /// A sealed memfd, locked in memory where the limit allows: root of the host can read it through /proc.
    Memfd {
        /// Whether it is locked, and so never swapped.
        locked: bool,
    },
}

impl std::fmt::Display for SecretKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Secret => "memfd_secret",
            Self::Memfd { locked: true } => "memfd, locked (this kernel has no memfd_secret)",
            Self::Memfd { locked: false } => {
                "memfd, NOT locked: raise RLIMIT_MEMLOCK (this kernel has no memfd_secret)"
            }
        })
    }
}

/// Why a key could not be kept or read.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    /// The kernel says no.
    #[error(
        "secret-memory: {action} failed: {source}; check RLIMIT_MEMLOCK and that memfd_create is allowed here (seccomp)"
    )]
    Kernel {
        /// What was tried.
        action: &'static str,
        /// Why it failed.
        #[source]
        source: Error,
    },
    /// What the descriptor holds is no key.
    #[error("secret-memory: the inherited descriptor holds no volume key: {0}")]
    NoKey(#[source] decant_luks2::Error),
}

/// The key's memory; it lives as long as any descriptor of it, and the kernel erases it after the last.
pub struct SecretMemory {
    fd: OwnedFd,
    kind: SecretKind,
    /// Keeps the pages locked.
    _locked: Option<Mapping>,
}

impl SecretMemory {
    /// Puts `key` into new secret memory.
    ///
    /// # Errors
    /// [`SecretError::Kernel`] if neither kind of memory can be had.
    pub fn new(key: &VolumeKey) -> Result<Self, SecretError> {
        match secret(key) {
            Ok(memory) => Ok(memory),
            Err(_) => Self::fallback(key),
        }
    }

    /// What a kernel without memfd_secret gets.
    pub(super) fn fallback(key: &VolumeKey) -> Result<Self, SecretError> {
        let kernel = |action| move |errno: rustix::io::Errno| SecretError::Kernel { action, source: errno.into() };
        let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
        let mut file = File::from(rustix::fs::memfd_create("decant-key", flags).map_err(kernel("memfd_create"))?);
        let written = file.write_all(key.expose()).and_then(|()| file.set_len(LENGTH as u64));
        written.map_err(|source| SecretError::Kernel { action: "writing to a memfd", source })?;
        let seals = SealFlags::WRITE | SealFlags::GROW | SealFlags::SHRINK | SealFlags::SEAL;
        rustix::fs::fcntl_add_seals(&file, seals).map_err(kernel("sealing a memfd"))?;
        let mapping = Mapping::new(file.as_fd(), Access::Read).map_err(kernel("mapping a memfd"))?;
        let locked = mapping.lock().is_ok();
        Ok(Self { fd: file.into(), kind: SecretKind::Memfd { locked }, _locked: Some(mapping) })
    }

    /// What kind of memory was had, for `doctor` and the log.
    pub fn kind(&self) -> SecretKind {
        self.kind
    }

    /// The descriptor to pass on. It is close-on-exec: whoever spawns the heir duplicates it there.
    pub fn as_fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// The key behind a descriptor made by [`SecretMemory::new`], perhaps in another process.
    ///
    /// # Errors
    /// See [`SecretError`].
    pub fn read(fd: BorrowedFd<'_>) -> Result<VolumeKey, SecretError> {
        let kernel = |action| move |errno: rustix::io::Errno| SecretError::Kernel { action, source: errno.into() };
        // A mapping beyond the file's end would be a SIGBUS at the first touch.
        let length = rustix::fs::fstat(fd).map_err(kernel("examining the inherited key descriptor"))?.st_size;
        if length < LENGTH as i64 {
            return Err(SecretError::NoKey(decant_luks2::Error::KeyBytes(u32::try_from(length).unwrap_or(0))));
        }
        let mapping = Mapping::new(fd, Access::Read).map_err(kernel("mapping the inherited key descriptor"))?;
        VolumeKey::from_bytes(mapping.key()).map_err(SecretError::NoKey)
    }
}

fn secret(key: &VolumeKey) -> Result<SecretMemory, Error> {
    // SAFETY: memfd_secret takes one number, its flags, and returns a new descriptor or -1.
    let raw = unsafe { libc::syscall(libc::SYS_memfd_secret, libc::O_CLOEXEC) };
    if raw < 0 {
        return Err(Error::last_os_error());
    }
    let raw = i32::try_from(raw).map_err(|_| Error::from(std::io::ErrorKind::InvalidData))?;
    // SAFETY: the kernel just gave us this descriptor; nobody else has it.
    let fd = unsafe { OwnedFd::from_raw_fd(raw) };
    rustix::fs::ftruncate(&fd, LENGTH as u64)?;
    let mut mapping = Mapping::new(fd.as_fd(), Access::Write)?;
    mapping.key_mut().copy_from_slice(key.expose());
    Ok(SecretMemory { fd, kind: SecretKind::Secret, _locked: None })
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Access {
    Read,
    Write,
}

/// A page of the memory, mapped.
struct Mapping {
    address: NonNull<u8>,
    writable: bool,
}

// SAFETY: the mapping belongs to the process, not to a thread, and is only read through `&self`.
unsafe impl Send for Mapping {}
// SAFETY: as above; `key_mut` needs `&mut self`.
unsafe impl Sync for Mapping {}

impl Mapping {
    fn new(fd: BorrowedFd<'_>, access: Access) -> Result<Self, rustix::io::Errno> {
        let writable = access == Access::Write;
        let mut protection = ProtFlags::READ;
        protection.set(ProtFlags::WRITE, writable);
        // memfd_secret maps only shared; a write-sealed memfd maps shared only since Linux 6.7, private always.
        let attempt = |flags| {
            // SAFETY: a new mapping at an address of the kernel's choice; it aliases no Rust object.
            unsafe { rustix::mm::mmap(std::ptr::null_mut(), LENGTH, protection, flags, fd, 0) }
        };
        let address = match attempt(MapFlags::SHARED) {
            Err(_) if !writable => attempt(MapFlags::PRIVATE)?,
            other => other?,
        };
        let address = NonNull::new(address.cast()).ok_or(rustix::io::Errno::NOMEM)?;
        Ok(Self { address, writable })
    }

    fn key(&self) -> &[u8] {
        // SAFETY: the mapping is LENGTH bytes and lives as long as self; the file behind it is at least as long (checked, or
        // made so here) and cannot shrink: a memfd_secret refuses a second truncate, the memfd is sealed.
        unsafe { std::slice::from_raw_parts(self.address.as_ptr(), KEY_BYTES) }
    }

    fn key_mut(&mut self) -> &mut [u8] {
        assert!(self.writable, "only a writable mapping is written");
        // SAFETY: as above, the mapping is writable, and no other process has the descriptor yet.
        unsafe { std::slice::from_raw_parts_mut(self.address.as_ptr(), KEY_BYTES) }
    }

    fn lock(&self) -> Result<(), rustix::io::Errno> {
        // SAFETY: the range is exactly this mapping.
        unsafe { rustix::mm::mlock(self.address.as_ptr().cast(), LENGTH) }
    }
}

impl Drop for Mapping {
    fn drop(&mut self) {
        // SAFETY: the mapping is ours and unmapped once; no slice of it outlives self.
        let _ = unsafe { rustix::mm::munmap(self.address.as_ptr().cast(), LENGTH) };
    }
}
