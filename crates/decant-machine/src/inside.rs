//! Looking at a machine's files from outside, as a demo or a person with root does.

use std::fs::File;
use std::io;
use std::os::fd::AsFd;

use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::sys;

/// Runs `work` on a thread that sees the files of process `pid` (a process id of this host) and nothing else of the host's.
/// A path through `/proc/<pid>/root` does for most uses; not for programs that resolve symbolic links by themselves, as
/// SQLite does: that link says `/`.
///
/// # Errors
/// No such process, no right to it, or what `work` says.
pub fn inside<T: Send>(pid: u32, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
    let namespace = File::open(format!("/proc/{pid}/ns/mnt"))?;
    std::thread::scope(|scope| {
        let thread = std::thread::Builder::new().name("inside".to_owned()).spawn_scoped(scope, || {
            // A thread that shares its root and working directory with others cannot change mount namespaces (setns(2)).
            sys::unshare(UnshareFlags::FS)?;
            rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(LinkNameSpaceType::Mount))?;
            work()
        })?;
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}
