//! Errands: what may take long or hang in the kernel is done by a forked child, so that the shim can always answer and kill.

use std::ffi::CStr;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, FileType, Gid, Mode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::{MountFlags, UnmountFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, Signal};

use super::program::DATA;
use super::{cache, groups};
use crate::protocol::Device;
use crate::sys;

/// Where the volume's device node stands while it is being mounted; only root could open it, and nobody inside is.
const NODE: &str = "/dev/.data";

/// What a child is out for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Task {
    /// Mounts the volume at /data.
    Mount,
    /// Writes back and unmounts /data.
    Unmount,
    /// Writes back.
    Sync,
    /// Trims.
    Trim,
}

/// How an errand went. Numbers are 0 or an error number.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Report {
    /// Of the task itself.
    pub(super) error: i32,
    /// Of the write-back before an unmount, which goes on all the same.
    pub(super) sync_error: i32,
    /// For a trim.
    pub(super) trimmed_bytes: u64,
}

/// A child on its way.
pub(super) struct Errand {
    pub(super) task: Task,
    pub(super) pid: Pid,
    pub(super) began: Instant,
    pub(super) report: File,
}

impl Errand {
    fn fork(task: Task, work: impl FnOnce() -> Report) -> io::Result<Self> {
        let (report, tell) = pipe_with(PipeFlags::CLOEXEC)?;
        let began = Instant::now();
        let pid = sys::fork(|| {
            // Whoever waits for the shim's sockets and pipes to close does not wait for an errand.
            sys::close_all_but(&[tell.as_raw_fd()]);
            let result = work();
            let mut bytes = [0; 16];
            bytes[0..4].copy_from_slice(&result.error.to_ne_bytes());
            bytes[4..8].copy_from_slice(&result.sync_error.to_ne_bytes());
            bytes[8..16].copy_from_slice(&result.trimmed_bytes.to_ne_bytes());
            let _ = File::from(tell).write_all(&bytes);
            0
        })?;
        Ok(Self { task, pid, began, report: File::from(report) })
    }

    pub(super) fn mount(device: &Device, uid: u32, gid: u32) -> io::Result<Self> {
        Self::fork(Task::Mount, || Report { error: number(mount(device, uid, gid)), ..Report::default() })
    }

    pub(super) fn unmount() -> io::Result<Self> {
        Self::fork(Task::Unmount, || {
            // An unmount says nothing of what it could not write; syncfs does.
            let sync_error = number(sync());
            let error = number(rustix::mount::unmount(DATA, UnmountFlags::empty()).map_err(Into::into));
            Report { error, sync_error, trimmed_bytes: 0 }
        })
    }

    pub(super) fn sync() -> io::Result<Self> {
        Self::fork(Task::Sync, || Report { error: number(sync()), ..Report::default() })
    }

    /// Writes back, and leaves an unmount soon after as little to do as can be. The program still runs.
    pub(super) fn settle() -> io::Result<Self> {
        Self::fork(Task::Sync, || {
            let mut error = number(sync());
            if let Ok(data) = data() {
                cache::drop_pages(data.as_fd());
                // What was written meanwhile.
                error = if error == 0 { number(sync()) } else { error };
            }
            // A help for the unmount to come, no promise.
            let _ = data().and_then(|data| sys::checkpoint(data.as_fd()));
            Report { error, ..Report::default() }
        })
    }

    pub(super) fn trim(device: Option<&Device>) -> io::Result<Self> {
        Self::fork(Task::Trim, || match trim(device) {
            Ok(trimmed_bytes) => Report { trimmed_bytes, ..Report::default() },
            Err(error) => Report { error: number(Err(error)), ..Report::default() },
        })
    }

    /// After `report` became readable: what it says. A child that died without a word was killed.
    pub(super) fn result(&mut self) -> Report {
        let mut bytes = [0; 16];
        if self.report.read_exact(&mut bytes).is_err() {
            return Report { error: libc::EINTR, ..Report::default() };
        }
        let word = |at: usize| i32::from_ne_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
        let (low, high) = (u64::from(word(8).cast_unsigned()), u64::from(word(12).cast_unsigned()));
        let trimmed_bytes = if cfg!(target_endian = "little") { high << 32 | low } else { low << 32 | high };
        Report { error: word(0), sync_error: word(4), trimmed_bytes }
    }

    pub(super) fn kill(&self) {
        let _ = rustix::process::kill_process(self.pid, Signal::KILL);
    }

    pub(super) fn took(&self) -> Duration {
        self.began.elapsed()
    }
}

fn number(result: io::Result<()>) -> i32 {
    result.err().map_or(0, |error| error.raw_os_error().unwrap_or(libc::EIO))
}

fn data() -> io::Result<File> {
    let flags = OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC;
    Ok(File::from(rustix::fs::open(DATA, flags, Mode::empty())?))
}

fn sync() -> io::Result<()> {
    Ok(rustix::fs::syncfs(data()?)?)
}

/// Trims what was ever allocated from; all of it if that cannot be told.
fn trim(device: Option<&Device>) -> io::Result<u64> {
    let data = data()?;
    let ranges = device.and_then(|device| opened(device).and_then(|device| groups::allocated(&device)).ok());
    ranges.unwrap_or_else(groups::whole).iter().try_fold(0, |sum, range| Ok(sum + sys::trim(data.as_fd(), range)?))
}

/// The device, to read.
fn opened(device: &Device) -> io::Result<File> {
    make_node(device)?;
    let file = File::open(NODE);
    std::fs::remove_file(NODE)?;
    file
}

fn make_node(device: &Device) -> io::Result<()> {
    let _ = std::fs::remove_file(NODE);
    let number = rustix::fs::makedev(device.major, device.minor);
    Ok(rustix::fs::mknodat(CWD, NODE, FileType::BlockDevice, Mode::from_raw_mode(0o600), number)?)
}

/// Whether something is mounted at /data.
pub(super) fn is_mounted() -> bool {
    let device = |path: &str| std::fs::metadata(path).map(|meta| std::os::unix::fs::MetadataExt::dev(&meta));
    matches!((device("/"), device(DATA)), (Ok(root), Ok(data)) if root != data)
}

/// The block bitmaps of all groups are not read ahead at the mount: on a clone each is a round trip, just when the program boots, and
/// the unmount has to let go of what was made of them.
const OPTIONS: &CStr = c"nodiscard,no_prefetch_block_bitmaps";

/// Mounts ext4 without `discard`: trims are explicit, so that deletes cost no round trips to the volume. On first use the
/// root of the file system is given to the machine's user.
fn mount(device: &Device, uid: u32, gid: u32) -> io::Result<()> {
    make_node(device)?;
    let flags = MountFlags::NODEV | MountFlags::NOSUID;
    let mut mounted = rustix::mount::mount(NODE, DATA, "ext4", flags, OPTIONS);
    if mounted == Err(Errno::INVAL) {
        // A kernel before 5.13 does not know all of them.
        mounted = rustix::mount::mount(NODE, DATA, "ext4", flags, c"nodiscard");
    }
    std::fs::remove_file(NODE)?;
    mounted?;
    let owner = std::os::unix::fs::MetadataExt::uid(&std::fs::metadata(Path::new(DATA))?);
    if owner == 0 {
        rustix::fs::chown(DATA, Some(Uid::from_raw(uid)), Some(Gid::from_raw(gid)))?;
    }
    Ok(())
}
