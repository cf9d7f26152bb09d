//! The program: forked and stripped of everything ahead of time, executed at a word.
//!
//! ```text
//! stage: fork ─► own cgroup ─► no capabilities, uid, gid ─► waits for one byte
//! go:                                                      byte ─► chdir /data ─► execve
//! ```

use std::ffi::CString;
use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};

use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::Pid;
use rustix::thread::{CapabilitySet, Gid, Uid};

use crate::spec::MachineSpec;
use crate::sys;

/// A program's working directory, and where its volume is.
pub(super) const DATA: &str = "/data";

/// A process that will be the program.
pub(super) struct Staged {
    pub(super) pid: Pid,
    /// One byte written here lets it go; closed without one, it ends.
    go: File,
    /// Closed by a successful `execve`; otherwise it carries the error number.
    pub(super) outcome: File,
}

impl Staged {
    /// Forks it. `cgroup` is the open `cgroup.procs` that it belongs into, `output` gets what it says.
    pub(super) fn fork(spec: &MachineSpec, cgroup: &File, output: &OwnedFd) -> io::Result<Self> {
        let (wait, go) = pipe_with(PipeFlags::CLOEXEC)?;
        let (outcome, report) = pipe_with(PipeFlags::CLOEXEC)?;
        let plan = Plan::new(spec)?;
        let pid = sys::fork(|| {
            let result = strip(&plan, cgroup, output, &[&wait, &report]);
            let error = match result {
                Ok(()) => launch(&plan, File::from(wait)),
                Err(error) => Some(error),
            };
            if let Some(error) = error {
                let _ = File::from(report).write_all(&error.raw_os_error().unwrap_or(libc::EIO).to_ne_bytes());
            }
            127
        })?;
        Ok(Self { pid, go: File::from(go), outcome: File::from(outcome) })
    }

    /// Lets it execute the program. An answer follows on `outcome`.
    pub(super) fn release(&mut self) -> io::Result<()> {
        self.go.write_all(&[1])
    }

    /// After `outcome` became readable: how the `execve` went.
    pub(super) fn result(mut self) -> io::Result<()> {
        let mut number = [0; 4];
        match self.outcome.read(&mut number)? {
            0 => Ok(()),
            _ => Err(io::Error::from_raw_os_error(i32::from_ne_bytes(number))),
        }
    }
}

/// Everything the child needs, made before the fork.
struct Plan {
    program: CString,
    arguments: Vec<CString>,
    environment: Vec<CString>,
    uid: Uid,
    gid: Gid,
    directory: &'static str,
}

impl Plan {
    fn new(spec: &MachineSpec) -> io::Result<Self> {
        let text = |text: &str| CString::new(text).map_err(io::Error::from);
        let directory = if spec.volume.is_some() { DATA } else { "/" };
        let mut environment =
            vec![("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"), ("HOME", directory)];
        environment.retain(|(name, _)| !spec.env.contains_key(*name));
        let given = spec.env.iter().map(|(name, value)| (name.as_str(), value.as_str()));
        Ok(Self {
            program: text(spec.command.first().map(String::as_str).unwrap_or_default())?,
            arguments: spec.command.iter().map(|argument| text(argument)).collect::<Result<_, _>>()?,
            environment: environment
                .into_iter()
                .chain(given)
                .map(|(name, value)| text(&format!("{name}={value}")))
                .collect::<Result<_, _>>()?,
            uid: Uid::from_raw(spec.uid),
            gid: Gid::from_raw(spec.gid),
            directory,
        })
    }
}

/// In the child: gives up what the shim has and the program must not.
fn strip(plan: &Plan, cgroup: &File, output: &OwnedFd, keep: &[&OwnedFd]) -> io::Result<()> {
    { cgroup }.write_all(b"0")?;
    rustix::process::setsid()?;
    rustix::stdio::dup2_stdin(&File::open("/dev/null")?)?;
    rustix::stdio::dup2_stdout(output)?;
    rustix::stdio::dup2_stderr(output)?;
    // The shim is spared when memory runs out, the program is not.
    let _ = std::fs::write("/proc/self/oom_score_adj", "0");
    for capability in CapabilitySet::all() {
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            // A capability that this kernel does not know.
            Ok(()) | Err(rustix::io::Errno::INVAL) => {}
            Err(error) => return Err(error.into()),
        }
    }
    rustix::thread::clear_ambient_capability_set()?;
    rustix::thread::set_no_new_privs(true)?;
    rustix::thread::set_thread_groups(&[plan.gid])?;
    rustix::thread::set_thread_res_gid(plan.gid, plan.gid, plan.gid)?;
    // Leaving user 0 clears the effective, permitted and inheritable sets (capabilities(7)).
    rustix::thread::set_thread_res_uid(plan.uid, plan.uid, plan.uid)?;
    rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
    sys::reset_signals();
    sys::close_all_but(&keep.iter().map(|fd| fd.as_fd().as_raw_fd()).collect::<Vec<_>>());
    Ok(())
}

/// In the child: waits for the word and becomes the program; gives what went wrong, or nothing if there was no word.
fn launch(plan: &Plan, mut go: File) -> Option<io::Error> {
    let mut byte = [0];
    match go.read(&mut byte) {
        Ok(0) => return None,
        Ok(_) => {}
        Err(error) => return Some(error),
    }
    if let Err(error) = rustix::process::chdir(plan.directory) {
        return Some(error.into());
    }
    Some(sys::exec(&plan.program, &plan.arguments, &plan.environment))
}
