//! The shim's loop: what it waits for, and whom it answers.

use std::fs::File;
use std::io::{self, Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant, SystemTime};

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::fs::{Mode, OFlags};
use rustix::pipe::{PipeFlags, pipe_with};
use rustix::process::{Pid, WaitOptions};

use super::errand::Errand;
use super::program::Staged;
use super::steps::Stop;
use super::{Handles, root, say};
use crate::protocol::{Answer, Device, Hello, MAX_LINE, Request, ShimConfig};
use crate::status::{Exit, State, Status, Timings};
use crate::sys;

/// Connections at a time; a driver opens one per request.
const MAX_CLIENTS: usize = 32;

pub(super) struct Shim {
    pub(super) config: ShimConfig,
    pub(super) handles: Handles,
    pub(super) status: Status,
    /// Readable when a child has ended.
    children: OwnedFd,
    /// What the program says.
    output: File,
    pub(super) output_end: OwnedFd,
    clients: Vec<Client>,
    /// Waits to become the program.
    pub(super) staged: Option<Staged>,
    /// `staged` was told to go.
    pub(super) released: bool,
    pub(super) program: Option<Pid>,
    pub(super) errand: Option<Errand>,
    pub(super) device: Option<Device>,
    pub(super) mounted: bool,
    /// Since when the program is to run and does not yet.
    pub(super) going: Option<Instant>,
    /// The program has ended; what it left behind is being ended.
    pub(super) emptying: bool,
    pub(super) restart_at: Option<Instant>,
    pub(super) pause: Duration,
    pub(super) executed: Option<Instant>,
    pub(super) stop: Option<Stop>,
}

/// A connection of the driver's.
struct Client {
    stream: UnixStream,
    input: Vec<u8>,
    waits: Option<Wait>,
    gone: bool,
}

/// What a client waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Wait {
    Go,
    Sync,
    Trim,
    Stop,
}

/// PID 1's life; its exit status.
pub(super) fn main(config: ShimConfig, handles: Handles, began: Instant) -> i32 {
    let machine = config.spec.id.clone();
    match Shim::new(config, handles) {
        Ok(mut shim) => {
            shim.status.timings.prepare_us = began.elapsed().as_micros() as u64;
            shim.set(State::Waiting, None);
            say(&Hello::Ready(machine));
            leave_standard_streams();
            shim.run()
        }
        Err(reason) => {
            say(&Hello::Failed(reason));
            1
        }
    }
}

/// The driver reads the standard output to its end; the error stream stays, it is the shim's own log.
fn leave_standard_streams() {
    if let Ok(null) = File::open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
    }
    if let Ok(null) = File::options().write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}

impl Shim {
    fn new(config: ShimConfig, handles: Handles) -> Result<Self, String> {
        let text = |error: io::Error| format!("cannot prepare PID 1: {error}");
        root::build(&config.run.join("root"), &config.spec).map_err(|error| error.0)?;
        root::check_program(&config.spec).map_err(|error| error.0)?;
        rustix::system::sethostname(config.spec.id.as_str().as_bytes()).map_err(|error| text(error.into()))?;
        let children = sys::child_signals().map_err(text)?;
        let (output, output_end) = pipe_with(PipeFlags::CLOEXEC).map_err(|error| text(error.into()))?;
        // Only our end does not block: a program that finds its output full must wait, not fail.
        rustix::io::ioctl_fionbio(&output, true).map_err(|error| text(error.into()))?;
        let status = Status {
            machine: config.spec.id.clone(),
            epoch: config.epoch,
            state: State::Waiting,
            reason: None,
            unclean: false,
            restarts: 0,
            last_exit: None,
            since_ms: 0,
            pid: None,
            timings: Timings::default(),
        };
        let mut shim = Self {
            config,
            handles,
            status,
            children,
            output: File::from(output),
            output_end,
            clients: Vec::new(),
            staged: None,
            released: false,
            program: None,
            errand: None,
            device: None,
            mounted: false,
            going: None,
            emptying: false,
            restart_at: None,
            pause: super::steps::FIRST_PAUSE,
            executed: None,
            stop: None,
        };
        shim.stage().map_err(text)?;
        Ok(shim)
    }

    pub(super) fn stage(&mut self) -> io::Result<()> {
        self.staged = Some(Staged::fork(&self.config.spec, &self.handles.join, &self.output_end)?);
        self.released = false;
        Ok(())
    }

    fn run(&mut self) -> i32 {
        loop {
            self.advance();
            if self.status.state == State::Stopped {
                self.read_output();
                return 0;
            }
            if let Err(error) = self.wait() {
                // Without its loop a shim can neither answer nor stop the machine; ending it at once is what is left.
                eprintln!("shim of {}: {error}", self.config.spec.id);
                return 1;
            }
        }
    }

    /// Waits for the next thing to happen and takes it in.
    fn wait(&mut self) -> io::Result<()> {
        let timeout = self.next_deadline().map(|at| {
            let left = at.saturating_duration_since(Instant::now());
            Timespec { tv_sec: left.as_secs() as i64, tv_nsec: i64::from(left.subsec_nanos()) }
        });
        let ready = {
            let mut fds = vec![
                PollFd::new(&self.children, PollFlags::IN),
                PollFd::new(&self.output, PollFlags::IN),
                PollFd::new(&self.handles.listener, PollFlags::IN),
                PollFd::new(&self.handles.events, PollFlags::PRI),
            ];
            // What is not there is stood in for by a descriptor that is not asked for anything.
            let idle = || PollFd::new(&self.handles.run, PollFlags::empty());
            fds.push(self.errand.as_ref().map_or_else(idle, |errand| PollFd::new(&errand.report, PollFlags::IN)));
            fds.push(match &self.staged {
                Some(staged) if self.released => PollFd::new(&staged.outcome, PollFlags::IN),
                _ => idle(),
            });
            fds.extend(self.clients.iter().map(|client| PollFd::new(&client.stream, PollFlags::IN)));
            match poll(&mut fds, timeout.as_ref()) {
                Ok(_) => {}
                Err(rustix::io::Errno::INTR) => return Ok(()),
                Err(error) => return Err(error.into()),
            }
            fds.iter().map(|fd| !fd.revents().is_empty()).collect::<Vec<_>>()
        };
        if ready[1] {
            self.read_output();
        }
        if ready[5] {
            self.launched();
        }
        if ready[4]
            && let Some(errand) = self.errand.take()
        {
            self.errand_done(errand);
        }
        if ready[0] {
            self.reap();
        }
        if ready[3] {
            // Reading rearms it; whether the group is empty is looked up where it matters.
            self.is_populated();
        }
        for (client, _) in self.clients.iter_mut().zip(&ready[6..]).filter(|(_, ready)| **ready) {
            client.read();
        }
        if ready[2] {
            self.accept();
        }
        self.serve();
        Ok(())
    }

    fn read_output(&mut self) {
        let mut buffer = [0; 64 * 1024];
        // One buffer at a time: a program that only writes does not keep the shim from its other work.
        if let Ok(length @ 1..) = self.output.read(&mut buffer) {
            self.handles.log.write(&buffer[..length]);
        }
    }

    fn reap(&mut self) {
        let mut signal = [0; 128];
        while rustix::io::read(&self.children, &mut signal).is_ok() {}
        while let Ok(Some((pid, status))) = rustix::process::wait(WaitOptions::NOHANG) {
            let exit = match (status.exit_status(), status.terminating_signal()) {
                (Some(code), _) => Exit::Code(code),
                (_, Some(signal)) => Exit::Signal(signal),
                _ => continue,
            };
            if self.staged.as_ref().is_some_and(|staged| staged.pid == pid) {
                // Its last word may still be unread: that it was executed, and has ended already.
                if self.released {
                    self.launched();
                } else {
                    self.staged = None;
                }
            }
            if self.program == Some(pid) {
                self.program = None;
                self.ended(exit);
            }
        }
    }

    /// Whether a process is in the program's group.
    pub(super) fn is_populated(&self) -> bool {
        let mut buffer = [0; 256];
        let length = rustix::io::pread(&self.handles.events, &mut buffer, 0).unwrap_or(0);
        crate::cgroup::says_populated(&String::from_utf8_lossy(&buffer[..length]))
    }

    /// Sets the state and writes it down. `status.json` is replaced, never half written.
    pub(super) fn set(&mut self, state: State, reason: Option<String>) {
        self.status.state = state;
        self.status.reason = reason;
        self.status.since_ms =
            SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
        if let Err(error) = self.write_status() {
            eprintln!("shim of {}: cannot write status.json: {error}", self.config.spec.id);
        }
    }

    fn write_status(&self) -> io::Result<()> {
        let flags = OFlags::CREATE | OFlags::TRUNC | OFlags::WRONLY | OFlags::CLOEXEC;
        let run = &self.handles.run;
        let mut file = File::from(rustix::fs::openat(run, "status.json.new", flags, Mode::from_raw_mode(0o644))?);
        file.write_all(&serde_json::to_vec(&self.status)?)?;
        Ok(rustix::fs::renameat(run, "status.json.new", run, "status.json")?)
    }

    fn accept(&mut self) {
        while let Ok((stream, _)) = self.handles.listener.accept() {
            let is_root = sys::peer_uid(stream.as_fd()).is_ok_and(|uid| uid == 0);
            if is_root && self.clients.len() < MAX_CLIENTS && stream.set_nonblocking(true).is_ok() {
                let mut client = Client { stream, input: Vec::new(), waits: None, gone: false };
                // The request usually comes with the connection.
                client.read();
                self.clients.push(client);
            }
        }
    }

    /// Takes up every whole request, one per client at a time.
    fn serve(&mut self) {
        for index in 0..self.clients.len() {
            let client = &mut self.clients[index];
            if client.waits.is_some() || client.gone {
                continue;
            }
            let Some(end) = client.input.iter().position(|byte| *byte == b'\n') else {
                client.gone |= client.input.len() > MAX_LINE;
                continue;
            };
            let line: Vec<u8> = client.input.drain(..=end).collect();
            match serde_json::from_slice::<Request>(&line) {
                Ok(request) => self.handle(index, request),
                Err(error) => self.answer_one(index, Err(format!("not a request: {error}"))),
            }
        }
        self.clients.retain(|client| !client.gone);
    }

    pub(super) fn wait_for(&mut self, index: usize, wait: Wait) {
        self.clients[index].waits = Some(wait);
    }

    pub(super) fn anyone_waits_for(&self, wait: Wait) -> bool {
        self.clients.iter().any(|client| client.waits == Some(wait) && !client.gone)
    }

    /// Answers every client that waits for `wait`.
    pub(super) fn answer(&mut self, wait: Wait, result: &Result<u64, String>) {
        for index in 0..self.clients.len() {
            if self.clients[index].waits == Some(wait) {
                self.answer_one(index, result.clone());
            }
        }
    }

    pub(super) fn answer_one(&mut self, index: usize, result: Result<u64, String>) {
        let mut status = self.status.clone();
        status.reason = status.reason.or_else(|| self.why());
        let answer = match result {
            Ok(trimmed_bytes) => Answer::Done { status, trimmed_bytes },
            Err(reason) => Answer::Refused { reason, status },
        };
        let client = &mut self.clients[index];
        client.waits = None;
        let mut line = serde_json::to_vec(&answer).unwrap_or_default();
        line.push(b'\n');
        // An answer fits the socket's buffer; a driver that has stopped reading is not waited for.
        client.gone |= client.stream.write_all(&line).is_err();
    }

    /// Name, state and place in the kernel of a process of the program's group, preferably one that waits for a disk.
    pub(super) fn straggler(&self) -> Option<String> {
        let mut buffer = [0; 4096];
        let length = rustix::io::pread(&self.handles.members, &mut buffer, 0).ok()?;
        let pids = String::from_utf8_lossy(&buffer[..length]).into_owned();
        let mut found = None;
        for pid in pids.lines() {
            let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
            let Some((name, rest)) = stat.split_once('(').and_then(|(_, rest)| rest.rsplit_once(") ")) else {
                continue;
            };
            let place = std::fs::read_to_string(format!("/proc/{pid}/wchan")).unwrap_or_default();
            if rest.starts_with('D') {
                return Some(format!("{name} (process {pid} inside) waits for its disk, in {place}"));
            }
            found.get_or_insert_with(|| format!("{name} (process {pid} inside) still runs"));
        }
        found
    }
}

impl Client {
    fn read(&mut self) {
        let mut buffer = [0; MAX_LINE];
        match self.stream.read(&mut buffer) {
            Ok(0) => self.gone = true,
            Ok(length) => {
                self.input.extend(&buffer[..length]);
                // One that talks on while it waits for an answer does not get to fill our memory.
                self.gone |= self.input.len() > 2 * MAX_LINE;
            }
            Err(error) => {
                self.gone |= !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::Interrupted);
            }
        }
    }
}

impl AsFd for Client {
    fn as_fd(&self) -> std::os::fd::BorrowedFd<'_> {
        self.stream.as_fd()
    }
}
