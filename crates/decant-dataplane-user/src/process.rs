//! What the keeper and the volume process do to themselves before they touch a volume: locked in memory, no core dumps,
//! deaf to signals that a session's end or a stop of the service sends.

use std::path::Path;

use rustix::mm::MlockAllFlags;
use rustix::process::{DumpableBehavior, Resource, Rlimit, Signal};

/// Hardens this process; to be called before it starts threads, which inherit it. What the machine does not let us have is
/// logged and done without: the volume is still better served than not.
pub fn harden() {
    no_cores();
    // On fault: every page that was touched stays; reserved stacks and arenas that were not cost nothing. The buffers of
    // the I/O path are touched when they are made.
    if let Err(error) = rustix::mm::mlockall(MlockAllFlags::CURRENT | MlockAllFlags::FUTURE | MlockAllFlags::ONFAULT) {
        tracing::warn!(%error, "memory is not locked: under memory pressure this volume may wait for itself");
    }
    // Reclaim started by this process must not wait for writes to devices that this process serves (prctl(2)). `decant doctor`
    // tells a host that lacks the capability; each process says it once.
    if let Err(error) = rustix::process::configure_io_flusher_behavior(true) {
        tracing::info!(%error, "PR_SET_IO_FLUSHER is refused (it needs CAP_SYS_RESOURCE, which this host withholds): if memory runs out, an allocation of this process may wait for a write to the volume that it serves");
    }
    // The memory of a machine must not cost it its disk. Needs CAP_SYS_RESOURCE.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", "-1000") {
        tracing::debug!(%error, "the kernel may choose this process when memory runs out");
    }
    ignore_signals();
}

/// No core file and no ptrace by others of the same user: this process holds a volume key.
fn no_cores() {
    let none = Rlimit { current: Some(0), maximum: Some(0) };
    if let Err(error) = rustix::process::setrlimit(Resource::Core, none) {
        tracing::warn!(%error, "cannot limit core dumps to nothing");
    }
    if let Err(error) = rustix::process::set_dumpable_behavior(DumpableBehavior::NotDumpable) {
        tracing::warn!(%error, "cannot forbid core dumps");
    }
}

/// A block device has no business vanishing because a terminal closed or a service stopped. SIGKILL still works.
#[allow(unsafe_code)]
fn ignore_signals() {
    for signal in [libc::SIGHUP, libc::SIGINT, libc::SIGTERM, libc::SIGPIPE, libc::SIGQUIT] {
        // SAFETY: SIG_IGN installs no handler that could run code; the numbers are valid and can be ignored.
        unsafe { libc::signal(signal, libc::SIG_IGN) };
    }
}

/// A bug in a thread ends the whole process, which the keeper replaces: a request that its thread forgot would otherwise
/// never be answered.
pub fn abort_on_panic() {
    let default = std::panic::take_hook();
    std::panic::set_hook(Box::new(move |info| {
        default(info);
        std::process::abort();
    }));
}

/// Ends this process when the thread that started it ends.
pub fn die_with_parent() {
    if let Err(error) = rustix::process::set_parent_process_death_signal(Some(Signal::KILL)) {
        tracing::warn!(%error, "cannot tie this process to its parent");
    }
}

/// Moves this process into `leaf` below the worker's control group ([`decant_base::cgroup`]), out of its starter's control group, so that stopping the
/// starter's service does not take volumes away. Without a cgroup2 mount it stays where it is.
pub fn leave_cgroup(worker: &str, run_dir: &Path, leaf: &str) {
    let moved = cgroup2_mount().ok_or_else(|| std::io::Error::other("no cgroup2 is mounted")).and_then(|mount| {
        let group = mount.join(decant_base::cgroup::of_worker(worker, run_dir)).join(leaf);
        let join = || {
            std::fs::create_dir_all(&group)?;
            std::fs::write(group.join("cgroup.procs"), std::process::id().to_string())
        };
        // Between the two, whoever was last there may have removed it.
        join().or_else(|_| join()).or_else(|_| join())
    });
    if let Err(error) = moved {
        tracing::warn!(%error, "stays in its starter's control group");
    }
}

/// Removes the control group that [`leave_cgroup`] made, if nobody is in it any more.
pub fn remove_empty_cgroup(worker: &str, run_dir: &Path, leaf: &str) {
    let Some(mount) = cgroup2_mount() else { return };
    let of_worker = mount.join(decant_base::cgroup::of_worker(worker, run_dir));
    let group = of_worker.join(leaf);
    for _ in 0..10 {
        match std::fs::remove_dir(&group) {
            // A worker's with machines in it refuses.
            Ok(()) => return drop(std::fs::remove_dir(of_worker)),
            Err(error) if error.kind() == std::io::ErrorKind::ResourceBusy => {}
            Err(_) => return,
        }
        // One that has just ended is still counted for a moment, a millisecond or two after it was reaped, and the group's own event
        // (`populated 0`) comes before that moment is over; others are there to stay.
        if std::fs::read_to_string(group.join("cgroup.procs")).is_ok_and(|pids| !pids.is_empty()) {
            return;
        }
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

/// Where the cgroup2 hierarchy is mounted, from /proc/self/mountinfo (proc(5)).
fn cgroup2_mount() -> Option<std::path::PathBuf> {
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    mounts.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        let path = before.split(' ').nth(4)?;
        (after.split(' ').next()? == "cgroup2").then(|| path.into())
    })
}
