//! A program that prints the passphrase.

use std::io::Read;
use std::os::fd::AsFd;
use std::os::unix::process::CommandExt;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use decant_base::VolumeId;
use decant_luks2::Passphrase;
use rustix::event::{PollFd, PollFlags, poll};
use rustix::io::Errno;
use rustix::process::{Pid, Signal, kill_process_group};
use rustix::time::Timespec;
use zeroize::Zeroizing;

use super::{KeyError, MOST_BYTES};

/// How long a program has: a secrets store over a slow network answers well within, and a drain that waits shows why.
pub(super) const PATIENCE: Duration = Duration::from_secs(30);
/// How much of its error stream is kept for the message.
const STDERR_BYTES: usize = 2000;

/// Runs it and takes its standard output.
pub(super) fn run(command: &[String], volume: &VolumeId, patience: Duration) -> Result<Passphrase, KeyError> {
    let mut words = command.iter().map(|word| word.replace("{volume}", volume.as_str()));
    let program = words.next().ok_or(KeyError::CommandEmpty)?;
    let deadline = Instant::now() + patience;
    let start = |source| KeyError::CommandStart { program: program.clone(), source };
    // A group of its own, so that what it started is killed with it.
    let mut child = Command::new(&program)
        .args(words)
        .stdin(Stdio::null())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .process_group(0)
        .spawn()
        .map_err(start)?;
    let mut secret = Zeroizing::new(Vec::with_capacity(MOST_BYTES + 1));
    let mut stderr = Vec::new();
    let ended = collect(&mut child, &mut secret, &mut stderr, deadline);
    if !matches!(ended, Ok(true)) {
        kill(&child);
    }
    let status = child.wait();
    match (ended, status) {
        (Ok(true), Ok(status)) if status.success() => super::passphrase(secret, || program.clone()),
        (Ok(true), Ok(status)) => {
            let text = String::from_utf8_lossy(&stderr);
            let text: String = text.trim().chars().map(|c| if c.is_control() { ' ' } else { c }).collect();
            Err(KeyError::CommandFailed { program, status, stderr: text })
        }
        (Ok(false), _) => Err(KeyError::CommandSlow { program, seconds: patience.as_secs() }),
        (Err(source), _) | (_, Err(source)) => Err(start(source)),
    }
}

/// Reads both streams until the program closed them and ended; `false` when the deadline came first.
fn collect(
    child: &mut Child,
    secret: &mut Zeroizing<Vec<u8>>,
    stderr: &mut Vec<u8>,
    deadline: Instant,
) -> std::io::Result<bool> {
    let mut out = child.stdout.take();
    let mut err = child.stderr.take();
    let mut chunk = Zeroizing::new([0u8; 256]);
    while out.is_some() || err.is_some() {
        let Some(left) = remaining(deadline) else { return Ok(false) };
        let (mut out_ready, mut err_ready) = (false, false);
        {
            let mut fds = Vec::with_capacity(2);
            fds.extend(out.as_ref().map(|out| PollFd::from_borrowed_fd(out.as_fd(), PollFlags::IN)));
            fds.extend(err.as_ref().map(|err| PollFd::from_borrowed_fd(err.as_fd(), PollFlags::IN)));
            match poll(&mut fds, Some(&left)) {
                Ok(_) => {}
                Err(Errno::INTR) => continue,
                Err(errno) => return Err(errno.into()),
            }
            let mut ready = fds.iter().map(|fd| !fd.revents().is_empty());
            if out.is_some() {
                out_ready = ready.next().unwrap_or(false);
            }
            if err.is_some() {
                err_ready = ready.next().unwrap_or(false);
            }
        }
        if out_ready && !take(&mut out, chunk.as_mut(), |bytes| append(secret, bytes, MOST_BYTES + 1))? {
            out = None;
        }
        if err_ready && !take(&mut err, chunk.as_mut(), |bytes| append(stderr, bytes, STDERR_BYTES))? {
            err = None;
        }
    }
    // Both streams are closed; a program that goes on regardless is not waited for without end.
    loop {
        if child.try_wait()?.is_some() {
            return Ok(true);
        }
        let Some(left) = remaining(deadline) else { return Ok(false) };
        wait_for_exit(child, left)?;
    }
}

/// One read; `false` at the end of the stream.
fn take(from: &mut Option<impl Read>, chunk: &mut [u8], mut keep: impl FnMut(&[u8])) -> std::io::Result<bool> {
    let Some(stream) = from else { return Ok(false) };
    match stream.read(chunk) {
        Ok(0) => Ok(false),
        Ok(length) => {
            keep(chunk.get(..length).unwrap_or_default());
            Ok(true)
        }
        Err(error) if error.kind() == std::io::ErrorKind::Interrupted => Ok(true),
        Err(error) => Err(error),
    }
}

/// Keeps at most `most` bytes; one more than a passphrase may have is enough to refuse it.
fn append(kept: &mut Vec<u8>, bytes: &[u8], most: usize) {
    let room = most.saturating_sub(kept.len()).min(bytes.len());
    kept.extend_from_slice(bytes.get(..room).unwrap_or_default());
}

fn wait_for_exit(child: &Child, left: Timespec) -> std::io::Result<()> {
    let Some(pid) = Pid::from_raw(child.id().cast_signed()) else { return Ok(()) };
    let process = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    let mut fds = [PollFd::new(&process, PollFlags::IN)];
    match poll(&mut fds, Some(&left)) {
        Ok(_) | Err(Errno::INTR) => Ok(()),
        Err(errno) => Err(errno.into()),
    }
}

fn remaining(deadline: Instant) -> Option<Timespec> {
    let left = deadline.checked_duration_since(Instant::now()).filter(|left| !left.is_zero())?;
    Timespec::try_from(left).ok()
}

fn kill(child: &Child) {
    // The child was not waited for: its pid, and so its group, cannot have been given to anybody else.
    if let Some(pid) = Pid::from_raw(child.id().cast_signed()) {
        let _ = kill_process_group(pid, Signal::KILL);
    }
}
