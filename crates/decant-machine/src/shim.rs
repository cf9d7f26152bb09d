//! PID 1 of each machine's namespaces.
//!
//! A shim makes the machine's namespaces and root, waits for `go`, mounts the volume, executes the program, reaps, keeps its
//! log, restarts it by its policy, and at the end stops it and unmounts. It outlives the agent; if it dies, the kernel ends
//! every process of its PID namespace with it.
//!
//! ```text
//!            go                  executed            program ends
//! waiting ───────► mounting ───────────────► running ─────────────► restarting ─► running
//!    │                │ mount fails             │                └► exited
//!    │                └──► failed ── go ──► …   │ stop, kill
//!    └──────────── stop, kill ──────────────────┴──► stopping ──► stopped: the shim ends
//! ```
//! The shim has one thread and never makes a call that can wait for the volume: those are errands of forked children.

mod cache;
mod errand;
mod groups;
mod log;
mod pid1;
mod program;
mod root;
mod steps;

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{self, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::time::Instant;

use rustix::fs::{FlockOperation, Mode, OFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::protocol::{Hello, ShimConfig};
use crate::sys;

/// When memory runs out the kernel ends programs before their shim: -1000 would be never.
const OOM_SCORE: &str = "-900";

/// Runs a shim: `decant shim CONFIG`, where CONFIG is the file that the driver wrote. To be called before the process has a
/// second thread. Returns when the machine is being kept by a child of its own, or could not be made.
pub fn main(args: impl IntoIterator<Item = OsString>) -> ExitCode {
    let Some(path) = args.into_iter().next() else {
        eprintln!("usage: decant shim CONFIG; the agent starts it");
        return ExitCode::from(2);
    };
    match start(Path::new(&path)) {
        Ok(()) => ExitCode::SUCCESS,
        Err(reason) => {
            say(&Hello::Failed(reason));
            ExitCode::FAILURE
        }
    }
}

/// Tells the driver, which reads one line.
fn say(hello: &Hello) {
    let line = serde_json::to_string(hello).unwrap_or_default();
    let _ = writeln!(io::stdout(), "{line}");
}

/// What PID 1 takes with it into its namespaces: the host's files are out of sight there.
struct Handles {
    /// The machine's run directory.
    run: OwnedFd,
    /// Holds the machine's lock as long as the shim lives.
    _lock: File,
    log: log::Log,
    listener: UnixListener,
    /// `cgroup.procs` of the program's group, to write.
    join: File,
    /// The same, to read.
    members: File,
    /// `cgroup.events` of the program's group.
    events: File,
    /// `cgroup.kill` of the program's group.
    kill: File,
}

fn start(path: &Path) -> Result<(), String> {
    let began = Instant::now();
    let text = fs::read(path).map_err(|error| format!("cannot read {}: {error}", path.display()))?;
    let config: ShimConfig =
        serde_json::from_slice(&text).map_err(|error| format!("{} is no shim's: {error}", path.display()))?;
    if sys::threads().map_err(|error| error.to_string())? != 1 {
        return Err("a shim must start with one thread".to_owned());
    }
    let _ = rustix::process::setsid();
    let handles = open(&config)?;
    let group = config.cgroup.join("shim/cgroup.procs");
    fs::write(&group, "0").map_err(|error| format!("cannot join {}: {error}", group.display()))?;
    let _ = fs::write("/proc/self/oom_score_adj", OOM_SCORE);
    let netns = File::open(&config.netns)
        .map_err(|error| format!("cannot open the machine's network namespace {}: {error}", config.netns.display()))?;
    rustix::thread::move_into_link_name_space(netns.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(|error| format!("cannot enter the network namespace {}: {error}", config.netns.display()))?;
    drop(netns);
    let flags = UnshareFlags::NEWNS
        | UnshareFlags::NEWPID
        | UnshareFlags::NEWIPC
        | UnshareFlags::NEWUTS
        | UnshareFlags::NEWCGROUP;
    sys::unshare(flags).map_err(|error| format!("cannot make namespaces: {error}"))?;
    // The first child is PID 1 of the new PID namespace; this process goes.
    sys::fork(|| pid1::main(config, handles, began)).map_err(|error| format!("cannot fork: {error}"))?;
    Ok(())
}

fn open(config: &ShimConfig) -> Result<Handles, String> {
    let failed = |path: &Path| {
        let path = path.to_owned();
        move |error: io::Error| format!("cannot open {}: {error}", path.display())
    };
    let run = directory(&config.run).map_err(failed(&config.run))?;
    let lock = File::options()
        .create(true)
        .append(true)
        .open(config.run.join("lock"))
        .map_err(failed(&config.run.join("lock")))?;
    rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive)
        .map_err(|_| "another shim runs this machine on this worker".to_owned())?;
    fs::create_dir_all(&config.logs).map_err(failed(&config.logs))?;
    let log = directory(&config.logs).and_then(log::Log::open).map_err(failed(&config.logs))?;
    // Through the descriptor the path is short: a socket's may have 107 characters.
    let _ = fs::remove_file(config.run.join("shim.sock"));
    let listener = UnixListener::bind(socket_path(&run)).map_err(failed(&config.run.join("shim.sock")))?;
    listener.set_nonblocking(true).map_err(failed(&config.run.join("shim.sock")))?;
    let group = |name: &str, write: bool| {
        let path = config.cgroup.join("program").join(name);
        File::options().read(!write).write(write).open(&path).map_err(failed(&path))
    };
    Ok(Handles {
        log,
        listener,
        join: group("cgroup.procs", true)?,
        members: group("cgroup.procs", false)?,
        events: group("cgroup.events", false)?,
        kill: group("cgroup.kill", true)?,
        run,
        _lock: lock,
    })
}

pub(crate) fn directory(path: &Path) -> io::Result<OwnedFd> {
    Ok(rustix::fs::open(path, OFlags::DIRECTORY | OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())?)
}

/// `shim.sock` in the open directory `run`.
pub(crate) fn socket_path(run: &OwnedFd) -> PathBuf {
    PathBuf::from(format!("/proc/self/fd/{}/shim.sock", run.as_raw_fd()))
}
