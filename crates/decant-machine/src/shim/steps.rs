//! The shim's steps: what a request, an end or a timer makes it do. Everything here is quick; what is not is an [`Errand`].

use std::io::Write;
use std::time::{Duration, Instant};

use rustix::process::Signal;

use super::errand::{Errand, Task};
use super::pid1::{Shim, Wait};
use crate::protocol::Request;
use crate::spec::RestartPolicy;
use crate::status::{Exit, State};

/// Before the first restart; doubled with each one that follows soon.
pub(super) const FIRST_PAUSE: Duration = Duration::from_millis(100);
/// Between restarts at most, and what a program must have run for to be trusted with the first pause again.
const LONGEST_PAUSE: Duration = Duration::from_secs(10);
/// How long a stop may be put off to write back what is dirty while the program still serves.
const WRITE_BACK: Duration = Duration::from_secs(1);
/// After the write-back, which held the program's own writes up for its last part and took its pages from the cache: what waits
/// is answered before the program is asked to end, so that the two pauses are not one. (5 ms were too short for the second.)
const BREATH: Duration = Duration::from_millis(25);
/// Between unmounts that found /data busy: a descriptor's last reference may be dropped a little after its process ended.
const BUSY_PAUSE: Duration = Duration::from_millis(2);
/// A trim waits until the program has run for so long: it reads all over the file system, and what a program reads while it
/// starts goes first.
const SETTLED: Duration = Duration::from_millis(200);
/// When to give an unmount up; nothing of the machine runs then, so what keeps it busy will not go away by waiting.
const BUSY_LIMIT: Duration = Duration::from_secs(5);

/// A stop under way.
pub(super) struct Stop {
    /// Without asking the program.
    hard: bool,
    phase: Phase,
    /// When the program was told, for the time it took.
    told: Option<Instant>,
    /// When the program's group was found empty.
    empty: Option<Instant>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Phase {
    /// Decides what is first.
    Begun,
    /// The program still runs; what is dirty is written back.
    WritingBack { until: Instant },
    /// That is done; the program answers who waited for it.
    Breathing { until: Instant },
    /// The program was asked to end.
    Asked { until: Instant },
    /// Whatever is left is killed.
    Killing,
    /// Nothing runs; /data is being unmounted, next try at `after`.
    Unmounting { after: Instant },
}

impl Shim {
    /// Takes up a request of the client at `index`.
    pub(super) fn handle(&mut self, index: usize, request: Request) {
        match request {
            Request::Status => self.answer_one(index, Ok(0)),
            Request::Go { device } => {
                if device.is_some() != self.config.spec.volume.is_some() {
                    let what =
                        if device.is_some() { "has no volume and was given" } else { "has a volume and was not given" };
                    return self.answer_one(index, Err(format!("the machine {what} a device")));
                }
                match self.status.state {
                    State::Waiting | State::Failed => {
                        self.device = device;
                        self.going = Some(Instant::now());
                        self.wait_for(index, Wait::Go);
                    }
                    State::Mounting => self.wait_for(index, Wait::Go),
                    State::Running | State::Restarting | State::Exited => self.answer_one(index, Ok(0)),
                    State::Stopping | State::Stopped | State::Lost => {
                        self.answer_one(index, Err("it is being stopped".to_owned()));
                    }
                }
            }
            Request::Sync | Request::Trim if !self.mounted => self.answer_one(index, Ok(0)),
            Request::Sync | Request::Trim if self.stop.is_some() => {
                self.answer_one(index, Err("it is being stopped".to_owned()));
            }
            Request::Sync => self.wait_for(index, Wait::Sync),
            Request::Trim => self.wait_for(index, Wait::Trim),
            Request::Stop | Request::Kill => {
                let hard = request == Request::Kill;
                let stop = self.stop.get_or_insert(Stop { hard, phase: Phase::Begun, told: None, empty: None });
                stop.hard |= hard;
                self.wait_for(index, Wait::Stop);
            }
        }
    }

    /// Does all that can be done now.
    pub(super) fn advance(&mut self) {
        if self.stop.is_some() {
            self.advance_stop();
        } else {
            self.advance_program();
            self.advance_errands();
        }
    }

    /// When to look again even if nothing happens.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        match &self.stop {
            None => [self.restart_at, self.trim_due()].into_iter().flatten().min(),
            Some(stop) => match stop.phase {
                Phase::WritingBack { until } | Phase::Breathing { until } | Phase::Asked { until } => Some(until),
                Phase::Unmounting { after } if self.errand.is_none() => Some(after),
                _ => None,
            },
        }
    }

    fn advance_program(&mut self) {
        if self.emptying {
            if self.is_populated() {
                return self.kill_program();
            }
            self.emptying = false;
            self.decide_restart();
        }
        if self.restart_at.is_some_and(|at| at <= Instant::now()) {
            self.restart_at = None;
            self.status.restarts += 1;
            self.going = Some(Instant::now());
        }
        if self.going.is_none() || self.released {
            return;
        }
        if self.config.spec.volume.is_some() && !self.mounted {
            if self.errand.is_none() {
                self.mount();
            }
            return;
        }
        if self.staged.is_none()
            && let Err(error) = self.stage()
        {
            return self.cannot_run(format!("cannot fork: {error}"));
        }
        if let Some(staged) = &mut self.staged {
            match staged.release() {
                Ok(()) => self.released = true,
                Err(error) => self.cannot_run(format!("cannot start the program: {error}")),
            }
        }
    }

    fn mount(&mut self) {
        let Some(device) = &self.device else { return };
        match Errand::mount(device, self.config.spec.uid, self.config.spec.gid) {
            Ok(errand) => {
                self.errand = Some(errand);
                self.set(State::Mounting, None);
            }
            Err(error) => self.cannot_run(format!("cannot fork: {error}")),
        }
    }

    /// Starts what clients wait for, one errand at a time.
    fn advance_errands(&mut self) {
        if self.errand.is_some() {
            return;
        }
        let (wait, errand) = if self.anyone_waits_for(Wait::Sync) {
            (Wait::Sync, Errand::sync())
        } else if self.anyone_waits_for(Wait::Trim) && self.trim_due().is_none() {
            (Wait::Trim, Errand::trim(self.device.as_ref()))
        } else {
            return;
        };
        match errand {
            Ok(errand) => self.errand = Some(errand),
            Err(error) => self.answer(wait, &Err(format!("cannot fork: {error}"))),
        }
    }

    /// When a trim that somebody waits for may start; `None`: at once, or nobody does.
    fn trim_due(&self) -> Option<Instant> {
        let due = self.executed? + SETTLED;
        (self.anyone_waits_for(Wait::Trim) && Instant::now() < due).then_some(due)
    }

    /// `go` came to nothing.
    fn cannot_run(&mut self, reason: String) {
        self.going = None;
        self.handles.log.note(&reason);
        self.set(State::Failed, Some(reason.clone()));
        self.answer(Wait::Go, &Err(reason));
    }

    /// The staged process has become the program, or could not.
    pub(super) fn launched(&mut self) {
        let Some(staged) = self.staged.take() else { return };
        let pid = staged.pid;
        let since = self.going.take();
        self.released = false;
        match staged.result() {
            Ok(()) => {
                self.program = Some(pid);
                self.executed = Some(Instant::now());
                self.status.timings.start_us = since.map_or(0, |since| since.elapsed().as_micros() as u64);
                if self.stop.is_none() {
                    self.set(State::Running, None);
                }
                self.answer(Wait::Go, &Ok(0));
            }
            Err(error) => {
                let program = self.config.spec.command.first().cloned().unwrap_or_default();
                let reason = format!("cannot execute {program}: {error}");
                self.handles.log.note(&reason);
                self.status.reason = Some(reason.clone());
                self.ended(Exit::Code(127));
                self.answer(Wait::Go, &Err(reason));
            }
        }
    }

    /// The program has ended.
    pub(super) fn ended(&mut self, exit: Exit) {
        self.status.last_exit = Some(exit);
        let how = match exit {
            Exit::Code(code) => format!("with status {code}"),
            Exit::Signal(signal) => format!("by signal {signal}"),
        };
        self.handles.log.note(&format!("the program ended {how}"));
        // What it left behind is not the machine: it ends too, before the program is started again.
        self.emptying = true;
    }

    fn decide_restart(&mut self) {
        let well = matches!(self.status.last_exit, Some(Exit::Code(0)));
        let again = match self.config.spec.restart {
            RestartPolicy::Always => true,
            RestartPolicy::OnFailure => !well,
            RestartPolicy::Never => false,
        };
        let reason = self.status.reason.take();
        if !again {
            return self.set(State::Exited, reason);
        }
        if self.executed.take().is_some_and(|since| since.elapsed() >= LONGEST_PAUSE) {
            self.pause = FIRST_PAUSE;
        }
        self.restart_at = Some(Instant::now() + self.pause);
        self.handles.log.note(&format!("the program is started again in {} ms", self.pause.as_millis()));
        self.pause = (self.pause * 2).min(LONGEST_PAUSE);
        self.set(State::Restarting, reason);
    }

    pub(super) fn errand_done(&mut self, mut errand: Errand) {
        let report = errand.result();
        let took = errand.took().as_micros() as u64;
        let error = std::io::Error::from_raw_os_error(report.error);
        let result = if report.error == 0 { Ok(report.trimmed_bytes) } else { Err(error.to_string()) };
        match errand.task {
            Task::Mount => {
                self.status.timings.mount_us = took;
                // One that was killed may have mounted before it could say so.
                self.mounted = result.is_ok() || super::errand::is_mounted();
                if let Err(error) = result
                    && self.stop.is_none()
                {
                    let device = self.device.as_ref().map(|device| device.path.display().to_string());
                    self.cannot_run(format!("cannot mount {} at /data: {error}", device.unwrap_or_default()));
                }
            }
            Task::Sync => {
                self.wrote_back(report.error);
                self.answer(Wait::Sync, &result.map_err(|error| format!("cannot write /data back: {error}")));
            }
            Task::Trim => self.answer(Wait::Trim, &result.map_err(|error| format!("cannot trim /data: {error}"))),
            Task::Unmount => {
                self.status.timings.unmount_us += took;
                self.wrote_back(report.sync_error);
                self.unmounted(report.error);
            }
        }
    }

    /// A write-back has ended, with this error number. The kernel tells of a failure once: what one write-back was told
    /// counts for the stop that comes later, too. One that was killed says nothing.
    fn wrote_back(&mut self, error: i32) {
        if error != 0 && error != libc::EINTR {
            let error = std::io::Error::from_raw_os_error(error);
            self.handles.log.note(&format!("writing /data back failed: {error}"));
            self.status.unclean = true;
        }
    }

    /// An unmount has ended, with this error number.
    fn unmounted(&mut self, error: i32) {
        // EINVAL: nothing is mounted there, an earlier try was told of too late.
        if error == 0 || error == libc::EINVAL {
            self.mounted = false;
            return;
        }
        let since = self.stop.as_ref().and_then(|stop| stop.empty);
        let is_late = since.is_none_or(|since| since.elapsed() >= BUSY_LIMIT);
        if error == libc::EBUSY && !is_late {
            if let Some(stop) = &mut self.stop {
                stop.phase = Phase::Unmounting { after: Instant::now() + BUSY_PAUSE };
            }
            return;
        }
        // Told again, it tries again.
        let reason = format!("cannot unmount /data: {}", std::io::Error::from_raw_os_error(error));
        self.stop = None;
        self.handles.log.note(&reason);
        self.set(State::Failed, Some(reason.clone()));
        self.answer(Wait::Stop, &Err(reason));
    }

    fn kill_program(&mut self) {
        if let Err(error) = self.handles.kill.write_all(b"1") {
            eprintln!("shim of {}: cgroup.kill: {error}", self.config.spec.id);
        }
    }

    fn advance_stop(&mut self) {
        loop {
            let Some(stop) = &self.stop else { return };
            let (phase, hard) = (stop.phase, stop.hard);
            let next = match phase {
                Phase::Begun => self.begin_stop(hard),
                Phase::WritingBack { until } => {
                    let is_done = self.errand.is_none() || until <= Instant::now() || hard || self.program.is_none();
                    let breath = if self.mounted { BREATH } else { Duration::ZERO };
                    is_done.then(|| Phase::Breathing { until: Instant::now() + breath })
                }
                Phase::Breathing { until } => {
                    (until <= Instant::now() || hard || self.program.is_none()).then(|| self.ask_program(hard))
                }
                Phase::Asked { until } => {
                    (self.program.is_none() || hard || until <= Instant::now()).then_some(Phase::Killing)
                }
                Phase::Killing => self.kill_rest(),
                Phase::Unmounting { after } => {
                    self.finish_stop(after);
                    None
                }
            };
            match (next, &mut self.stop) {
                (Some(next), Some(stop)) => stop.phase = next,
                _ => return,
            }
        }
    }

    fn begin_stop(&mut self, hard: bool) -> Option<Phase> {
        self.going = None;
        self.restart_at = None;
        self.emptying = false;
        for wait in [Wait::Go, Wait::Sync, Wait::Trim] {
            self.answer(wait, &Err("it is being stopped".to_owned()));
        }
        if let Some(errand) = &self.errand
            && (hard || errand.task != Task::Sync)
        {
            errand.kill();
        }
        self.set(State::Stopping, None);
        if self.program.is_none() {
            self.told();
            return Some(Phase::Killing);
        }
        if !hard && self.mounted && self.errand.is_none() {
            self.errand = Errand::settle().ok();
        }
        Some(Phase::WritingBack { until: Instant::now() + WRITE_BACK })
    }

    fn told(&mut self) {
        if let Some(stop) = &mut self.stop {
            stop.told.get_or_insert_with(Instant::now);
        }
    }

    fn ask_program(&mut self, hard: bool) -> Phase {
        self.told();
        let timeout = Duration::from_millis(self.config.spec.stop_timeout_ms);
        if let (Some(pid), Some(signal), false) =
            (self.program, Signal::from_named_raw(self.config.spec.stop_signal), hard)
        {
            let _ = rustix::process::kill_process(pid, signal);
        }
        Phase::Asked { until: Instant::now() + timeout }
    }

    /// Everything in the program's group ends, the staged process too. Done when the group is empty.
    fn kill_rest(&mut self) -> Option<Phase> {
        if self.is_populated() {
            self.kill_program();
            if self.is_populated() {
                return None;
            }
        }
        if let Some(errand) = &self.errand {
            // A mount or a write-back that hangs ends when the volume answers, if only with an error.
            errand.kill();
            return None;
        }
        let now = Instant::now();
        if let Some(stop) = &mut self.stop {
            stop.empty = Some(now);
            let took = stop.told.map_or(0, |told| now.duration_since(told).as_micros() as u64);
            self.status.timings.end_us = took;
        }
        Some(Phase::Unmounting { after: now })
    }

    fn finish_stop(&mut self, after: Instant) {
        if self.errand.is_some() || (self.mounted && after > Instant::now()) {
            return;
        }
        if self.mounted {
            match Errand::unmount() {
                Ok(errand) => self.errand = Some(errand),
                Err(error) => {
                    eprintln!("shim of {}: cannot fork: {error}", self.config.spec.id);
                    if let Some(stop) = &mut self.stop {
                        stop.phase = Phase::Unmounting { after: Instant::now() + BUSY_PAUSE };
                    }
                }
            }
            return;
        }
        let reason =
            self.status.unclean.then(|| "writing /data back failed: what was written last may be lost".to_owned());
        self.set(State::Stopped, reason);
        self.answer(Wait::Stop, &Ok(0));
    }

    /// What the machine is waiting for, in words.
    pub(super) fn why(&self) -> Option<String> {
        let since = |errand: &Errand, what: &str| format!("{what} has taken {} ms", errand.took().as_millis());
        let errand = self.errand.as_ref().map(|errand| match errand.task {
            Task::Mount => since(errand, "mounting /data"),
            Task::Unmount => since(errand, "writing back and unmounting /data"),
            Task::Sync => since(errand, "writing /data back"),
            Task::Trim => since(errand, "trimming /data"),
        });
        let Some(stop) = &self.stop else {
            return errand.filter(|_| self.status.state == State::Mounting);
        };
        match stop.phase {
            Phase::Asked { until } => {
                let left = until.saturating_duration_since(Instant::now()).as_millis();
                Some(format!("the program was asked to end and has {left} ms left"))
            }
            Phase::Killing if self.is_populated() => self.straggler().or(errand),
            _ => errand,
        }
    }
}
