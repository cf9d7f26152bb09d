//! The driver's steps, each safe to repeat.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use decant_base::{Bytes, MachineId};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::FlockOperation;

use super::client::{NoAnswer, ask};
use super::{Change, MachineError, Prepare, ProcessDriver, probe_exclusive};
use crate::cgroup;
use crate::protocol::{Answer, Device, Hello, Request, ShimConfig};
use crate::spec::MachineSpec;
use crate::status::{State, Status};

/// A shim answers within microseconds; one that does not for so long is stuck.
const ANSWER: Duration = Duration::from_secs(5);
/// Making a machine takes some 20 ms.
const PREPARE: Duration = Duration::from_secs(30);
/// How long the kernel may take to let go of a device after the last mount of it ended.
const LET_GO: Duration = Duration::from_secs(2);

/// SHA-256, hex, of the program that the machine's shim was made with, in its run directory. The file may be replaced
/// while the machine runs on.
const STARTED_FROM: &str = "program.sha256";

type Result<T> = std::result::Result<T, MachineError>;

trait Context<T> {
    fn context(self, machine: &MachineId, action: impl FnOnce() -> String) -> Result<T>;
}

impl<T> Context<T> for io::Result<T> {
    fn context(self, machine: &MachineId, action: impl FnOnce() -> String) -> Result<T> {
        self.map_err(|cause| MachineError::Io { machine: machine.clone(), action: action(), cause })
    }
}

pub(super) fn prepare(driver: &ProcessDriver, request: &Prepare<'_>) -> Result<Change> {
    let spec = request.spec;
    let machine = &spec.id;
    driver.check(spec)?;
    let program = driver.program_digest(spec)?;
    if let Some(wanted) = request.program_digest.filter(|wanted| **wanted != program) {
        let name = spec.command.first().map_or("", String::as_str);
        let cause = format!(
            "its program {name} is another one than where it runs: SHA-256 {program} here, {wanted} there; \
             install the same version here, or let any do (--any-program)"
        );
        return Err(MachineError::Unfit { machine: machine.clone(), cause });
    }
    let run = driver.run(machine);
    let config = ShimConfig {
        spec: spec.clone(),
        epoch: request.epoch,
        netns: request.netns.to_owned(),
        run: run.clone(),
        logs: driver.logs(machine),
        cgroup: driver.cgroup(machine),
    };
    if live_status(&run, machine)?.is_some_and(|status| status.state != State::Stopped) {
        return compare(&run, &config);
    }
    // A shim that has just answered "stopped", or was killed, may not be quite gone.
    wait_gone(driver, machine, ANSWER)?;
    fs::create_dir_all(run.join("root")).context(machine, || format!("make {}", run.display()))?;
    forget_device(&run);
    make_groups(driver, &config)?;
    let path = run.join("shim.json");
    let text =
        serde_json::to_vec(&config).map_err(io::Error::from).context(machine, || "describe the machine".to_owned())?;
    fs::write(&path, text).context(machine, || format!("write {}", path.display()))?;
    let digest = run.join(STARTED_FROM);
    fs::write(&digest, program).context(machine, || format!("write {}", digest.display()))?;
    spawn(driver, machine, &path)?;
    Ok(Change::Made)
}

fn make_groups(driver: &ProcessDriver, config: &ShimConfig) -> Result<()> {
    let machine = &config.spec.id;
    cgroup::make(&config.cgroup, &config.spec.limits)
        .context(machine, || format!("make the cgroup {}", driver.cgroup(machine).display()))
}

/// A shim is there; is it what was asked for?
fn compare(run: &Path, config: &ShimConfig) -> Result<Change> {
    let machine = &config.spec.id;
    let conflict = |what: String| Err(MachineError::Conflict { machine: machine.clone(), what });
    let is = fs::read(run.join("shim.json")).ok().and_then(|text| serde_json::from_slice::<ShimConfig>(&text).ok());
    match is {
        Some(is) if is == *config => Ok(Change::Unchanged),
        Some(is) if is.epoch != config.epoch => {
            conflict(format!("for epoch {} and not {}", is.epoch.0, config.epoch.0))
        }
        _ => conflict("with another description".to_owned()),
    }
}

/// Starts a shim and waits for its word.
fn spawn(driver: &ProcessDriver, machine: &MachineId, config: &Path) -> Result<()> {
    let Some((program, arguments)) = driver.config.shim.split_first() else {
        return Err(MachineError::Unfit {
            machine: machine.clone(),
            cause: "no shim program is configured".to_owned(),
        });
    };
    let starting = || format!("start the shim {}", program.to_string_lossy());
    let errors = driver.run(machine).join("shim.log");
    let errors = File::create(&errors).context(machine, || format!("write {}", errors.display()))?;
    let mut child = Command::new(program)
        .args(arguments)
        .arg(config)
        .env_clear()
        .envs(std::env::vars_os().filter(|(name, _)| name.to_string_lossy().starts_with("DECANT_")))
        .current_dir("/")
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(errors)
        .spawn()
        .context(machine, starting)?;
    let hello = match child.stdout.take() {
        Some(output) => hear(output),
        None => Err(io::ErrorKind::BrokenPipe.into()),
    };
    let failed = matches!(hello, Ok(Some(Hello::Failed(_))) | Err(_));
    // The process we started has gone, or must go; what it forked lives on if it is well.
    if failed {
        let _ = child.kill();
    }
    let _ = child.wait();
    match hello.context(machine, starting)? {
        Some(Hello::Ready(_)) => Ok(()),
        Some(Hello::Failed(cause)) => Err(MachineError::Unfit { machine: machine.clone(), cause }),
        None => {
            let log = fs::read_to_string(driver.run(machine).join("shim.log")).unwrap_or_default();
            let cause = io::Error::other(format!("it ended without a word: {}", log.trim()));
            Err(cause).context(machine, starting)
        }
    }
}

/// One line, in time; `None` for an end without one.
fn hear(output: std::process::ChildStdout) -> io::Result<Option<Hello>> {
    let limit = Timespec { tv_sec: PREPARE.as_secs() as i64, tv_nsec: 0 };
    if poll(&mut [PollFd::new(&output, PollFlags::IN)], Some(&limit))? == 0 {
        return Err(io::Error::new(io::ErrorKind::TimedOut, "it says nothing"));
    }
    let mut line = String::new();
    BufReader::new(output).read_line(&mut line)?;
    if line.is_empty() {
        return Ok(None);
    }
    Ok(Some(serde_json::from_str(&line)?))
}

/// The status of a live shim.
fn live_status(run: &Path, machine: &MachineId) -> Result<Option<Status>> {
    match ask(run, &Request::Status, Some(ANSWER)) {
        Ok(Answer::Done { status, .. } | Answer::Refused { status, .. }) => Ok(Some(status)),
        Err(NoAnswer::Gone) => Ok(None),
        Err(NoAnswer::Late) => Err(MachineError::TimedOut {
            machine: machine.clone(),
            what: "an answer of its shim",
            after: ANSWER,
            reason: "the shim is there and silent".to_owned(),
        }),
        Err(NoAnswer::Io(cause)) => Err(cause).context(machine, || "ask its shim".to_owned()),
    }
}

/// SHA-256, hex, of the program that the machine runs; of the one it would start if it is down.
pub(super) fn started_from(driver: &ProcessDriver, spec: &MachineSpec) -> Result<String> {
    let run = driver.run(&spec.id);
    let is_up = live_status(&run, &spec.id)?.is_some_and(|status| status.state != State::Stopped);
    match fs::read_to_string(run.join(STARTED_FROM)) {
        Ok(digest) if is_up => Ok(digest),
        // Down, or started by a version that did not note it.
        _ => driver.program_digest(spec),
    }
}

pub(super) fn status(driver: &ProcessDriver, machine: &MachineId) -> Result<Option<Status>> {
    let run = driver.run(machine);
    if let Some(mut status) = live_status(&run, machine)? {
        if status.state == State::Running {
            status.pid = first_process(&driver.cgroup(machine).join("program"));
        }
        return Ok(Some(status));
    }
    let text = match fs::read(run.join("status.json")) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error).context(machine, || "read status.json".to_owned()),
    };
    let mut status: Status =
        serde_json::from_slice(&text).map_err(io::Error::from).context(machine, || "read status.json".to_owned())?;
    if status.state != State::Stopped {
        status.state = State::Lost;
        status.reason = Some("its shim is gone, and all of the machine with it".to_owned());
    }
    Ok(Some(status))
}

fn first_process(group: &Path) -> Option<u32> {
    fs::read_to_string(group.join("cgroup.procs")).ok()?.lines().next()?.parse().ok()
}

pub(super) fn start(driver: &ProcessDriver, machine: &MachineId, device: Option<&Path>) -> Result<Status> {
    let run = driver.run(machine);
    let device = device
        .map(|path| {
            let number = fs::metadata(path).context(machine, || format!("find {}", path.display()))?.rdev();
            // Where to look when the machine has stopped, or its shim was killed; and which disk it is.
            fs::write(run.join("device"), path.as_os_str().as_encoded_bytes())
                .and_then(|()| fs::write(run.join("disk"), disk(path).unwrap_or_default()))
                .context(machine, || "note the device".to_owned())?;
            let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
            Ok(Device { path: path.to_owned(), major, minor })
        })
        .transpose()?;
    match ask(&run, &Request::Go { device }, None) {
        Ok(Answer::Done { status, .. }) => {
            let (mount_us, start_us) = (status.timings.mount_us, status.timings.start_us);
            tracing::info!(%machine, mount_us, start_us, "started");
            Ok(status)
        }
        Ok(Answer::Refused { reason, .. }) => Err(MachineError::Refused { machine: machine.clone(), reason }),
        Err(NoAnswer::Io(cause)) => Err(cause).context(machine, || "tell its shim to go".to_owned()),
        Err(NoAnswer::Gone | NoAnswer::Late) => Err(MachineError::NotPrepared { machine: machine.clone() }),
    }
}

/// Nothing of the machine is on a device any more.
fn forget_device(run: &Path) {
    for note in ["device", "disk"] {
        let _ = fs::remove_file(run.join(note));
    }
}

/// Whether the machine, if it is up, was started on the disk that `device` is now.
pub(super) fn is_on(driver: &ProcessDriver, machine: &MachineId, device: Option<&Path>) -> bool {
    let noted = fs::read_to_string(driver.run(machine).join("disk")).unwrap_or_default();
    // Not known is not another.
    noted.is_empty() || device.and_then(disk).is_none_or(|disk| disk == noted)
}

/// The kernel's number of this very disk (`diskseq`, Linux 5.15), which no other ever has; names of loop devices are used again.
fn disk(device: &Path) -> Option<String> {
    let number = fs::metadata(device).ok()?.rdev();
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let text = fs::read_to_string(format!("/sys/dev/block/{major}:{minor}/diskseq")).ok()?;
    Some(text.trim().to_owned())
}

fn order(driver: &ProcessDriver, machine: &MachineId, request: &Request) -> Result<u64> {
    match ask(&driver.run(machine), request, None) {
        Ok(Answer::Done { trimmed_bytes, .. }) => Ok(trimmed_bytes),
        Ok(Answer::Refused { reason, .. }) => Err(MachineError::Refused { machine: machine.clone(), reason }),
        Err(NoAnswer::Io(cause)) => Err(cause).context(machine, || "ask its shim".to_owned()),
        Err(NoAnswer::Gone | NoAnswer::Late) => Err(MachineError::NotPrepared { machine: machine.clone() }),
    }
}

pub(super) fn sync(driver: &ProcessDriver, machine: &MachineId) -> Result<()> {
    order(driver, machine, &Request::Sync).map(drop)
}

pub(super) fn trim(driver: &ProcessDriver, machine: &MachineId) -> Result<Bytes> {
    order(driver, machine, &Request::Trim).map(Bytes)
}

pub(super) fn stop(driver: &ProcessDriver, machine: &MachineId, hard: bool, patience: Duration) -> Result<Change> {
    let run = driver.run(machine);
    let began = Instant::now();
    let request = if hard { Request::Kill } else { Request::Stop };
    let change = match ask(&run, &request, Some(patience)) {
        Ok(Answer::Done { .. }) => Change::Made,
        Ok(Answer::Refused { reason, .. }) => return Err(MachineError::Refused { machine: machine.clone(), reason }),
        Err(NoAnswer::Gone) => without_shim(driver, machine, patience)?,
        Err(NoAnswer::Late) => match live_status(&run, machine) {
            Ok(Some(status)) => {
                return Err(MachineError::TimedOut {
                    machine: machine.clone(),
                    what: if hard { "the kill" } else { "the stop" },
                    after: patience,
                    reason: status.reason.unwrap_or_else(|| "its shim gives no reason".to_owned()),
                });
            }
            // It ended between the two questions, or does not answer any: the kernel ends what is left.
            Ok(None) | Err(_) => without_shim(driver, machine, patience)?,
        },
        Err(NoAnswer::Io(cause)) => return Err(cause).context(machine, || "ask its shim to stop".to_owned()),
    };
    let left = patience.saturating_sub(began.elapsed()).max(LET_GO);
    if let Some(device) = noted_device(&run) {
        probe_exclusive(&device, LET_GO.min(left))
            .map_err(|cause| MachineError::DeviceBusy { machine: machine.clone(), cause })?;
        // It was let go once. Whoever has a device of that name later has another one: loop devices are used again.
        forget_device(&run);
    }
    let status = status_file(&run);
    if let (Change::Made, Some(Status { timings, .. })) = (change, &status) {
        let (end_us, unmount_us) = (timings.end_us, timings.unmount_us);
        tracing::info!(%machine, took_us = began.elapsed().as_micros() as u64, end_us, unmount_us, "stopped");
    }
    match status {
        // A kill promises no more than a power cut: the journal is replayed at the next mount.
        Some(status) if status.unclean && !hard => {
            let reason = status.reason.unwrap_or_default();
            Err(MachineError::Unclean { machine: machine.clone(), reason })
        }
        _ => Ok(change),
    }
}

fn status_file(run: &Path) -> Option<Status> {
    serde_json::from_slice(&fs::read(run.join("status.json")).ok()?).ok()
}

fn noted_device(run: &Path) -> Option<PathBuf> {
    use std::os::unix::ffi::OsStringExt;
    fs::read(run.join("device")).ok().map(|bytes| PathBuf::from(std::ffi::OsString::from_vec(bytes)))
}

/// There is no shim, or none that answers: whatever is in the machine's group is killed.
fn without_shim(driver: &ProcessDriver, machine: &MachineId, patience: Duration) -> Result<Change> {
    let group = driver.cgroup(machine);
    let populated = || cgroup::is_populated(&group).context(machine, || format!("read {}", group.display()));
    if !populated()? {
        return Ok(Change::Unchanged);
    }
    wait_gone(driver, machine, patience)?;
    // Only a shim that had said its last word was still there.
    let was_stopped = status_file(&driver.run(machine)).is_some_and(|status| status.state == State::Stopped);
    Ok(if was_stopped { Change::Unchanged } else { Change::Made })
}

/// Kills what is in the machine's group and waits until it is empty and the machine's lock is free.
fn wait_gone(driver: &ProcessDriver, machine: &MachineId, patience: Duration) -> Result<()> {
    let group = driver.cgroup(machine);
    let reading = || format!("watch {}", group.display());
    let late = || MachineError::TimedOut {
        machine: machine.clone(),
        what: "the end of its last process",
        after: patience,
        reason: "a killed process waits for its disk; it ends when the volume answers, if only with an error"
            .to_owned(),
    };
    let until = Instant::now() + patience;
    if let Ok(events) = File::open(group.join("cgroup.events")) {
        loop {
            let mut text = [0; 256];
            let Ok(length) = rustix::io::pread(&events, &mut text, 0) else { break };
            if !cgroup::says_populated(&String::from_utf8_lossy(&text[..length])) {
                break;
            }
            cgroup::kill(&group).context(machine, reading)?;
            let left = until.saturating_duration_since(Instant::now());
            if left.is_zero() {
                return Err(late());
            }
            let limit = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) };
            // One that was signalled by a poll is not yet empty, or is: looked at again either way.
            poll(&mut [PollFd::new(&events, PollFlags::PRI)], Some(&limit))
                .map_err(io::Error::from)
                .context(machine, reading)?;
        }
    }
    let path = driver.run(machine).join("lock");
    if let Ok(lock) = File::open(&path)
        && rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err()
    {
        let reason = format!("somebody outside its cgroup holds {}", path.display());
        return Err(MachineError::Refused { machine: machine.clone(), reason });
    }
    Ok(())
}

pub(super) fn remove(driver: &ProcessDriver, machine: &MachineId, logs: bool) -> Result<()> {
    let run = driver.run(machine);
    if let Some(status) = live_status(&run, machine)?
        && status.state != State::Stopped
    {
        return Err(MachineError::Refused { machine: machine.clone(), reason: "it is here: stop it first".to_owned() });
    }
    wait_gone(driver, machine, ANSWER)?;
    let group = driver.cgroup(machine);
    cgroup::remove(&group).context(machine, || format!("remove {}", group.display()))?;
    let mut doomed = vec![run];
    if logs {
        doomed.push(driver.logs(machine));
    }
    for directory in doomed {
        match fs::remove_dir_all(&directory) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(error).context(machine, || format!("remove {}", directory.display()));
            }
            _ => {}
        }
    }
    Ok(())
}
