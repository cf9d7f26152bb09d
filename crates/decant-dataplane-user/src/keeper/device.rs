//! A volume's device: the FUSE connection, the file, the loop device on it.

use std::fs::File;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use decant_dataplane::{Failure, FailureCode};
use rustix::fs::{Mode, OFlags};

use crate::fuse::Mount;
use crate::loopdev::{LoopDevice, Name};

/// How long a cleared device may take to vanish: somebody, udev say, may have it open for a moment.
const CLEAR_TIMEOUT: Duration = Duration::from_secs(2);

/// The connection, before there is a device: the file can only be opened while a volume process answers.
pub(super) struct Connection {
    /// What volume processes read requests from.
    pub(super) fuse: Arc<OwnedFd>,
    root: OwnedFd,
}

impl Connection {
    pub(super) fn new(name: &Name) -> Result<Self, Failure> {
        let mount = Mount::new(name.as_str()).map_err(|error| Failure {
            code: FailureCode::Refused,
            message: format!(
                "no FUSE file system can be made on this host: {error}; the kernel needs FUSE and this process CAP_SYS_ADMIN"
            ),
        })?;
        Ok(Self { fuse: Arc::new(mount.device), root: mount.root })
    }

    /// Makes the device; a volume process must be serving the connection.
    pub(super) fn device(self, sector_size: u32, name: &Name) -> Result<Device, Failure> {
        let refused = |message: String| Failure { code: FailureCode::Retry, message };
        let backing = rustix::fs::openat(&self.root, "volume", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(
            |error| refused(format!("the volume's file does not open through FUSE: {error}; see volume.log")),
        )?;
        let disk =
            LoopDevice::create(backing.as_fd(), sector_size, name).map_err(|error| refused(error.to_string()))?;
        // From here on the loop device alone keeps the file system alive.
        Ok(Device { path: disk.path().to_owned(), fuse: Mutex::new(Some(self.fuse)), disk })
    }
}

/// A volume's block device.
pub(super) struct Device {
    path: PathBuf,
    /// What volume processes read requests from; `None` once it was given up.
    fuse: Mutex<Option<Arc<OwnedFd>>>,
    disk: LoopDevice,
}

impl Device {
    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// What volume processes read requests from; `None` once it was given up.
    pub(super) fn fuse(&self) -> Option<Arc<OwnedFd>> {
        self.fuse.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// Ends the connection: with its last descriptor gone, every request, those that wait included, fails.
    pub(super) fn give_up(&self) {
        self.fuse.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Proves that nobody uses the device, and keeps it so until the file is dropped.
    pub(super) fn claim(&self) -> Result<File, Failure> {
        self.disk.claim().map_err(|error| {
            let device = self.path.display();
            let message = if error.raw_os_error() == Some(libc::EBUSY) {
                format!("{device} is still used: a file system on it is mounted, perhaps in another mount namespace; stop its machine or unmount it")
            } else {
                format!("{device} cannot be claimed: {error}")
            };
            Failure { code: FailureCode::Retry, message }
        })
    }

    /// Makes everything written to the device durable below.
    pub(super) fn sync(&self) -> Result<(), Failure> {
        self.disk.sync().map_err(|error| Failure {
            code: FailureCode::Stuck,
            message: format!(
                "the last writes to {} did not become durable: {error}; the medium below failed, see volume.log",
                self.path.display()
            ),
        })
    }

    /// Takes the device away. Whoever still has it open sees errors from here on. A volume process answers to the end, or the
    /// connection was given up.
    pub(super) fn clear(self) {
        let Self { path, fuse: _held, disk } = self;
        let bound = Path::new("/sys/block").join(path.file_name().unwrap_or_default()).join("loop");
        if let Err(error) = disk.clear() {
            tracing::error!(%error, device = %path.display(), "the loop device cannot be cleared");
        }
        // Only a uevent tells of it, which needs a netlink socket in the host's first network namespace: this poll, of about one
        // round, does not.
        let deadline = Instant::now() + CLEAR_TIMEOUT;
        while bound.exists() && Instant::now() < deadline {
            std::thread::sleep(Duration::from_millis(1));
        }
    }
}
