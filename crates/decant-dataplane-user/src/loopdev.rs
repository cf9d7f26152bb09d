//! Loop devices on top of a volume's FUSE file, found and cleared by name.
//!
//! The name, in `lo_file_name`, is `decant:<worker>:<volume>:<tag>` where the tag is made of the worker's state directory,
//! so that several workers on one host, or a test and a demo, do not touch each other's.
//!
//! Source: include/uapi/linux/loop.h and drivers/block/loop.c of Linux 6.9.

#![allow(unsafe_code)]

use std::fs::File;
use std::os::fd::{AsRawFd, BorrowedFd};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};

use sha2::{Digest, Sha256};

const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;

/// Cleared when its last user closes it: nothing is left behind by a keeper that was killed.
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// Requests go to the file as they are, many at a time.
const LO_FLAGS_DIRECT_IO: u32 = 16;

/// Bytes of a name, its final NUL included (LO_NAME_SIZE).
const NAME_BYTES: usize = 64;

/// `struct loop_info64`.
#[repr(C)]
#[derive(Clone, Copy)]
struct LoopInfo {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; NAME_BYTES],
    crypt_name: [u8; NAME_BYTES],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl LoopInfo {
    const EMPTY: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; NAME_BYTES],
        crypt_name: [0; NAME_BYTES],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
struct LoopConfig {
    fd: u32,
    block_size: u32,
    info: LoopInfo,
    reserved: [u64; 8],
}

/// A device's name, at most 63 bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Name(String);

impl Name {
    /// The name of `volume`'s device on `worker`, whose files are under `state_dir`. Long parts are cut; the tag, 48 bits of
    /// a digest of all three, tells them apart.
    pub fn new(worker: &str, volume: &str, state_dir: &Path) -> Self {
        let mut digest = Sha256::new();
        for part in [worker.as_bytes(), volume.as_bytes(), state_dir.as_os_str().as_encoded_bytes()] {
            digest.update(part);
            digest.update([0]);
        }
        let tag: String = digest.finalize().iter().take(6).map(|byte| format!("{byte:02x}")).collect();
        let cut = |text: &str| text.chars().take(21).collect::<String>();
        Self(format!("decant:{}:{}:{tag}", cut(worker), cut(volume)))
    }

    /// As text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Why there is no device.
#[derive(Debug, thiserror::Error)]
pub enum LoopError {
    /// `/dev/loop-control` is missing or refuses.
    #[error("no loop devices on this host: /dev/loop-control: {0}; load the kernel's loop module")]
    Control(#[source] std::io::Error),
    /// A device cannot be opened.
    #[error("cannot open {path}: {source}")]
    Open {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel does not take the file.
    #[error("the loop device {path} does not take the volume's file: {source}")]
    Configure {
        /// Which.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The kernel took the file but not what parked reads need.
    #[error(
        "the loop device {path} does no direct I/O, so one waiting read would stall all others; use Linux 5.10 or later"
    )]
    NotDirect {
        /// Which.
        path: PathBuf,
    },
}

/// A loop device of ours. Dropping it closes it; with its last user gone the kernel clears it.
pub struct LoopDevice {
    file: File,
    path: PathBuf,
}

impl LoopDevice {
    /// Puts a device with sectors of `sector_size` bytes on `backing`.
    ///
    /// # Errors
    /// See [`LoopError`].
    pub fn create(backing: BorrowedFd<'_>, sector_size: u32, name: &Name) -> Result<Self, LoopError> {
        let control = open("/dev/loop-control").map_err(LoopError::Control)?;
        let mut config = LoopConfig {
            fd: backing.as_raw_fd() as u32,
            block_size: sector_size,
            info: LoopInfo { flags: LO_FLAGS_AUTOCLEAR | LO_FLAGS_DIRECT_IO, ..LoopInfo::EMPTY },
            reserved: [0; 8],
        };
        config.info.file_name[..name.0.len()].copy_from_slice(name.0.as_bytes());
        loop {
            // SAFETY: LOOP_CTL_GET_FREE takes no argument and returns a number.
            let number = unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) };
            if number < 0 {
                return Err(LoopError::Control(std::io::Error::last_os_error()));
            }
            let path = PathBuf::from(format!("/dev/loop{number}"));
            let file = open(&path).map_err(|source| LoopError::Open { path: path.clone(), source })?;
            // SAFETY: LOOP_CONFIGURE reads a `struct loop_config`, which `config` is, and keeps no pointer to it.
            let configured = unsafe { libc::ioctl(file.as_raw_fd(), LOOP_CONFIGURE, &config) };
            if configured == 0 {
                let device = Self { file, path };
                return if device.is_direct() { Ok(device) } else { Err(LoopError::NotDirect { path: device.path }) };
            }
            let source = std::io::Error::last_os_error();
            // Somebody else took it between the two calls.
            if source.raw_os_error() != Some(libc::EBUSY) {
                return Err(LoopError::Configure { path, source });
            }
        }
    }

    /// Its node, e.g. `/dev/loop3`.
    pub fn path(&self) -> &Path {
        &self.path
    }

    fn is_direct(&self) -> bool {
        let attribute = Path::new("/sys/block").join(self.path.file_name().unwrap_or_default()).join("loop/dio");
        std::fs::read_to_string(attribute).is_ok_and(|text| text.trim() == "1")
    }

    /// Opens the device for nobody else: succeeds only when no file system on it is mounted, in whatever namespace, and
    /// nobody else holds it like this. It stays so until the file is dropped.
    ///
    /// # Errors
    /// EBUSY when somebody uses it.
    pub fn claim(&self) -> std::io::Result<File> {
        File::options().read(true).write(true).custom_flags(libc::O_EXCL | libc::O_CLOEXEC).open(&self.path)
    }

    /// Makes everything written to the device durable in the file below.
    ///
    /// # Errors
    /// What the engine's flush failed with, as EIO.
    pub fn sync(&self) -> std::io::Result<()> {
        self.file.sync_all()
    }

    /// Takes the file away from the device; immediately if nobody else has it open, else when the last one closes it.
    ///
    /// # Errors
    /// What the kernel says.
    pub fn clear(self) -> std::io::Result<()> {
        clear(&self.file)
    }
}

fn open(path: impl AsRef<Path>) -> std::io::Result<File> {
    File::options().read(true).write(true).open(path)
}

fn clear(device: &File) -> std::io::Result<()> {
    // SAFETY: LOOP_CLR_FD takes no argument.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) } == 0 {
        return Ok(());
    }
    let error = std::io::Error::last_os_error();
    // ENXIO: it had no file.
    if error.raw_os_error() == Some(libc::ENXIO) { Ok(()) } else { Err(error) }
}

fn name_of(device: &File) -> Option<String> {
    let mut info = LoopInfo::EMPTY;
    // SAFETY: LOOP_GET_STATUS64 writes a `struct loop_info64`, which `info` is.
    if unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &mut info) } != 0 {
        return None;
    }
    let end = info.file_name.iter().position(|&byte| byte == 0).unwrap_or(NAME_BYTES);
    String::from_utf8(info.file_name[..end].to_vec()).ok()
}

/// The devices whose name satisfies `wanted`, with their names.
///
/// # Errors
/// When `/sys/block` cannot be read.
pub fn find(wanted: impl Fn(&str) -> bool) -> std::io::Result<Vec<(PathBuf, String)>> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/sys/block")? {
        let entry = entry?;
        // Only devices with a file have this directory.
        if !entry.path().join("loop").exists() {
            continue;
        }
        let path = Path::new("/dev").join(entry.file_name());
        let Ok(device) = File::open(&path) else { continue };
        if let Some(name) = name_of(&device).filter(|name| wanted(name)) {
            found.push((path, name));
        }
    }
    found.sort();
    Ok(found)
}

/// Clears the devices whose name satisfies `wanted`; returns which. Somebody who has such a device mounted keeps it, without
/// its file, until he lets go.
///
/// # Errors
/// When `/sys/block` cannot be read, or a device cannot be cleared.
pub fn clear_all(wanted: impl Fn(&str) -> bool) -> std::io::Result<Vec<PathBuf>> {
    let mut cleared = Vec::new();
    for (path, _) in find(wanted)? {
        clear(&open(&path)?)?;
        cleared.push(path);
    }
    Ok(cleared)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_fit_and_differ() {
        let long = "a-very-long-name-of-a-worker-or-of-a-volume-with-63-characters";
        let names: std::collections::BTreeSet<String> = [
            Name::new("worker-1", "orders", Path::new("/a")),
            Name::new("worker-1", "orders", Path::new("/b")),
            Name::new(long, long, Path::new("/a")),
            Name::new(long, &format!("{long}2"), Path::new("/a")),
        ]
        .into_iter()
        .map(|name| name.0)
        .collect();
        assert_eq!(names.len(), 4);
        assert!(names.iter().all(|name| name.len() < NAME_BYTES), "{names:?}");
        assert!(names.iter().any(|name| name.starts_with("decant:worker-1:orders:")));
    }

    #[test]
    fn the_kernel_structures_have_its_sizes() {
        assert_eq!(size_of::<LoopInfo>(), 232);
        assert_eq!(size_of::<LoopConfig>(), 304);
    }
}
