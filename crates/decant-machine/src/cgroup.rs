//! Control groups: who belongs to a machine, and the only way to end all of it.
//!
//! ```text
//! <cgroup2>/decant/<worker>/<machine>/shim      the shim and its errands
//!                                    /program   the program and everything it starts
//! ```
//! Emptiness of `program` is what "stopped" means; a process id is never asked, for it can be another process's by then.

use std::ffi::OsStr;
use std::fs;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::path::{Path, PathBuf};

use rustix::fs::XattrFlags;

use crate::spec::Limits;

/// The extended attribute of a worker's group that names its run directory.
const RUN_DIR: &str = "trusted.decant.run_dir";

/// The mount point of cgroup2, also where it is mounted beside version 1 (`hybrid`).
pub(crate) fn mount_point() -> io::Result<PathBuf> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    // "36 35 98:0 /root /point options [optional…] - type source options"
    let found = table.lines().find_map(|line| {
        let (left, right) = line.split_once(" - ")?;
        (right.split(' ').next() == Some("cgroup2")).then(|| left.split(' ').nth(4)).flatten()
    });
    found.map(PathBuf::from).ok_or_else(|| {
        io::Error::new(io::ErrorKind::NotFound, "no cgroup2 is mounted; mount it at /sys/fs/cgroup (or …/unified)")
    })
}

/// The cgroup of a worker's machines.
pub(crate) fn of_worker(mount: &Path, worker: &str, run_dir: &Path) -> PathBuf {
    mount.join(decant_base::cgroup::of_worker(worker, run_dir))
}

/// Whether a process is in the group or below it. A group that is not there is empty.
pub(crate) fn is_populated(group: &Path) -> io::Result<bool> {
    match fs::read_to_string(group.join("cgroup.events")) {
        Ok(events) => Ok(says_populated(&events)),
        Err(error) if is_gone(&error) => Ok(false),
        Err(error) => Err(error),
    }
}

/// Reads `cgroup.events`.
pub(crate) fn says_populated(events: &str) -> bool {
    events.lines().any(|line| line == "populated 1")
}

/// ENODEV is what a read of a removed group's open file says.
fn is_gone(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::NotFound || error.raw_os_error() == Some(libc::ENODEV)
}

/// SIGKILL to everything in the group and below.
pub(crate) fn kill(group: &Path) -> io::Result<()> {
    match fs::write(group.join("cgroup.kill"), "1") {
        Err(error) if !is_gone(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Removes the group and those below it, all empty.
pub(crate) fn remove(group: &Path) -> io::Result<()> {
    let Ok(entries) = fs::read_dir(group) else { return Ok(()) };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove(&entry.path())?;
        }
    }
    match fs::remove_dir(group) {
        Err(error) if !is_gone(&error) => Err(error),
        _ => Ok(()),
    }
}

/// Makes the group of a worker and notes on it whose it is.
pub(crate) fn make_worker(group: &Path, run_dir: &Path) -> io::Result<()> {
    fs::create_dir_all(group)?;
    // Where extended attributes are not to be had, the group is only never swept.
    let _ = rustix::fs::setxattr(group, RUN_DIR, run_dir.as_os_str().as_encoded_bytes(), XattrFlags::empty());
    Ok(())
}

/// Removes groups of workers without a process and whose run directory is gone: leftovers of demos and tests.
pub(crate) fn sweep(mount: &Path) {
    let Ok(workers) = fs::read_dir(mount.join("decant")) else { return };
    for worker in workers.flatten() {
        let mut noted = [0; 4096];
        let Ok(length) = rustix::fs::getxattr(worker.path(), RUN_DIR, &mut noted) else { continue };
        let is_gone = !Path::new(OsStr::from_bytes(noted.get(..length).unwrap_or_default())).exists();
        if is_gone && matches!(is_populated(&worker.path()), Ok(false)) {
            let _ = remove(&worker.path());
        }
    }
}

/// Makes the machine's groups. Limits are set where their controller can be had.
pub(crate) fn make(machine: &Path, limits: &Limits) -> io::Result<()> {
    for group in ["shim", "program"] {
        fs::create_dir_all(machine.join(group))?;
    }
    for (controller, file, value) in wanted(limits) {
        if !delegate(machine, controller) {
            tracing::warn!(machine = %machine.display(), controller, "no limit: the cgroup2 controller is not delegated");
            continue;
        }
        fs::write(machine.join(file), value)?;
    }
    Ok(())
}

fn wanted(limits: &Limits) -> Vec<(&'static str, &'static str, String)> {
    let mut wanted = Vec::new();
    if let Some(bytes) = limits.memory_bytes {
        wanted.push(("memory", "memory.max", bytes.to_string()));
    }
    if let Some(percent) = limits.cpu_percent {
        // Per period of 100 ms, the kernel's default.
        wanted.push(("cpu", "cpu.max", format!("{} 100000", u64::from(percent) * 1000)));
    }
    if let Some(pids) = limits.pids {
        wanted.push(("pids", "pids.max", pids.to_string()));
    }
    wanted
}

/// Turns `controller` on in every group from the mount point down to the machine's parent; whether the machine has it then.
fn delegate(machine: &Path, controller: &str) -> bool {
    let has = |group: &Path| {
        fs::read_to_string(group.join("cgroup.controllers"))
            .is_ok_and(|list| list.split_whitespace().any(|name| name == controller))
    };
    let Some(worker) = machine.parent() else { return false };
    let Some(top) = worker.parent().and_then(Path::parent) else { return false };
    for group in [top, &top.join("decant"), worker] {
        if !has(group) {
            return false;
        }
        let _ = fs::write(group.join("cgroup.subtree_control"), format!("+{controller}"));
    }
    has(machine)
}

/// Controllers that limits can use here, for `doctor`.
pub(crate) fn available(mount: &Path) -> Vec<String> {
    let list = fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    list.split_whitespace().map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn events_are_read_by_line() {
        assert!(says_populated("populated 1\nfrozen 0\n"));
        assert!(!says_populated("populated 0\nfrozen 1\n"));
        assert!(!says_populated(""));
    }
}
