//! Whether anybody still uses a block device.

use std::fs;
use std::io;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

/// A device is still in use.
#[derive(Debug, thiserror::Error)]
#[error("{} is still in use: {who}", device.display())]
pub struct DeviceBusy {
    /// Which.
    pub device: PathBuf,
    /// The processes whose mount namespace shows it, or what is known instead.
    pub who: String,
}

/// Waits up to `patience` until `device` can be opened exclusively: no mount of it is left in any namespace. A device that is
/// not there is used by nobody.
///
/// # Errors
/// Who still uses it, as far as /proc shows it.
pub fn probe_exclusive(device: &Path, patience: Duration) -> Result<(), DeviceBusy> {
    let began = Instant::now();
    let mut pause = Duration::from_millis(1);
    loop {
        match rustix::fs::open(device, OFlags::RDONLY | OFlags::EXCL | OFlags::CLOEXEC, Mode::empty()) {
            // Gone, or dead: the claim is taken before anything is read.
            Ok(_) | Err(Errno::NOENT | Errno::NXIO | Errno::NODEV | Errno::NOMEDIUM | Errno::IO) => return Ok(()),
            Err(Errno::BUSY) if began.elapsed() < patience => {
                // The kernel drops a dead namespace's mounts a little after its last process and tells nobody.
                std::thread::sleep(pause);
                pause = (pause * 2).min(Duration::from_millis(20));
            }
            Err(Errno::BUSY) => {
                let who = holders(device).unwrap_or_else(|error| format!("by whom is not known: {error}"));
                return Err(DeviceBusy { device: device.to_owned(), who });
            }
            Err(error) => {
                return Err(DeviceBusy { device: device.to_owned(), who: format!("cannot open it: {error}") });
            }
        }
    }
}

/// Processes in whose mount namespace the device is mounted, one per namespace.
fn holders(device: &Path) -> io::Result<String> {
    let number = fs::metadata(device)?.rdev();
    let wanted = format!("{}:{}", rustix::fs::major(number), rustix::fs::minor(number));
    let mut seen = std::collections::BTreeSet::new();
    let mut found = Vec::new();
    for entry in fs::read_dir("/proc")?.flatten() {
        let path = entry.path();
        let Ok(namespace) = fs::metadata(path.join("ns/mnt")) else { continue };
        if !seen.insert(namespace.ino()) {
            continue;
        }
        let Ok(table) = fs::read_to_string(path.join("mountinfo")) else { continue };
        let point = table
            .lines()
            .map(|line| line.split(' ').collect::<Vec<_>>())
            .find(|fields| fields.get(2) == Some(&&*wanted));
        if let Some(point) = point.and_then(|fields| fields.get(4).map(|point| (*point).to_owned())) {
            let name = fs::read_to_string(path.join("comm")).unwrap_or_default();
            let pid = entry.file_name();
            found.push(format!("mounted at {point} for process {} ({})", pid.to_string_lossy(), name.trim()));
        }
    }
    if found.is_empty() {
        return Ok("no process shows a mount of it; something in the kernel or an exclusive opener holds it".to_owned());
    }
    Ok(found.join(", "))
}
