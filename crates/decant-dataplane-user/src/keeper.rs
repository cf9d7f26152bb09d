//! `decant keeper`: one per attached or exporting volume. It holds what must outlive the volume process, which is the FUSE
//! connection, the loop device and the volume key, starts that process, and starts it again when it dies. It does no I/O
//! on the volume.
//!
//! Who may die: the agent, which only talks to `keeper.sock`; the volume process, whose successor gets the requests that
//! were left unanswered. When the keeper itself dies, the kernel ends the volume process with it, the device gives errors
//! and clears itself with its last user.
//!
//! Threads: the main one starts, hears and reaps volume processes (the kernel ties a process to the thread that started
//! it); one accepts connections; each connection has its own.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::os::unix::net::{UnixListener, UnixStream};
use std::process::ExitCode;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use decant_base::VolumeId;
use decant_dataplane::{Failure, FailureCode};
use rustix::fs::FlockOperation;
use serde::{Deserialize, Serialize};

use crate::control::{
    self, ExportWork, KeeperReply, KeeperRequest, Lines, VolumeReply, VolumeRequest, VolumeStart, Work, send_line,
};
use crate::keys::SecretMemory;
use crate::process;
use crate::site::SiteConfig;

mod commands;
mod device;
mod files;
mod link;

use device::Device;
use link::{Link, Process};

/// How long a request waits for a volume process that is being started again.
const RESTART_PATIENCE: Duration = Duration::from_secs(30);
/// The longest pause before a volume process that keeps dying is started again.
const MAX_PAUSE: Duration = Duration::from_secs(5);
/// So many processes that die at their start are no accident.
const STILLBORN: u32 = 3;
/// A process that lived this long did not die of its start.
const SETTLED: Duration = Duration::from_secs(10);

/// The control group of a worker's keepers. No machine's id has an underscore.
pub const CGROUP: &str = "_keepers";
/// The exit code of a keeper that found another one.
pub const ALREADY_KEPT: u8 = 3;
/// What a keeper prints once it can be asked.
pub const READY_LINE: &str = "ready";

/// What a keeper reads from its standard input.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeeperSpec {
    /// Whose.
    pub site: SiteConfig,
    /// Which volume.
    pub volume: VolumeId,
}

/// The keeper's entry point. Its arguments, worker and volume, are for people who look at a process list; the
/// specification comes over standard input.
pub fn main(_arguments: &[String]) -> ExitCode {
    match run() {
        Ok(code) => code,
        Err(error) => {
            tracing::error!(%error, "the keeper cannot start");
            eprintln!("decant keeper: {error}");
            ExitCode::FAILURE
        }
    }
}

fn run() -> std::io::Result<ExitCode> {
    let mut text = Vec::new();
    std::io::stdin().read_to_end(&mut text)?;
    let spec: KeeperSpec = serde_json::from_slice(&text)?;
    let paths = spec.site.paths(&spec.volume);
    crate::site::make_private_dir(&paths.run)?;
    let lock = File::options().create(true).truncate(false).write(true).open(paths.lock())?;
    if rustix::fs::flock(&lock, FlockOperation::NonBlockingLockExclusive).is_err() {
        eprintln!("decant keeper: {} has a keeper already", spec.volume);
        return Ok(ExitCode::from(ALREADY_KEPT));
    }
    // A process group leader cannot; then it has no terminal to lose either.
    let _ = rustix::process::setsid();
    process::leave_cgroup(spec.site.worker.as_str(), &spec.site.run_dir, CGROUP);
    process::harden();
    let listener = control::listen(&paths.socket())?;
    let keeper =
        Arc::new(Keeper { spec, state: Mutex::default(), changed: Condvar::new(), one_at_a_time: Mutex::new(()) });
    let acceptor = Arc::clone(&keeper);
    std::thread::Builder::new().name("accept".into()).spawn(move || acceptor.accept(&listener))?;
    let mut out = std::io::stdout();
    // Nobody may be listening any more; the keeper serves whoever asks next.
    let _ = writeln!(out, "{READY_LINE}").and_then(|()| out.flush());
    keeper.supervise();
    let _ = std::fs::remove_file(paths.socket());
    drop(lock);
    Ok(ExitCode::SUCCESS)
}

#[derive(Default)]
struct State {
    /// What the volume process is to be; `None`: there is to be none.
    work: Option<Work>,
    key: Option<Arc<SecretMemory>>,
    /// The connection before there is a device.
    fuse: Option<Arc<OwnedFd>>,
    device: Option<Arc<Device>>,
    /// Whether a process has already served the connection.
    served: bool,
    link: Option<Arc<Link>>,
    pid: Option<u32>,
    restarts: u64,
    /// Processes started.
    lives: u64,
    /// Processes that died before they took up the work that they were started for.
    stillborn: u32,
    trouble: Option<Failure>,
    /// Whether the work has ever been taken up: a refusal before that is final.
    proved: bool,
    stopping: bool,
    stopped: bool,
    answered: bool,
}

struct Keeper {
    spec: KeeperSpec,
    state: Mutex<State>,
    changed: Condvar,
    /// Held by a request that changes what there is.
    one_at_a_time: Mutex<()>,
}

fn failure(code: FailureCode, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into() }
}

impl Keeper {
    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn change(&self, change: impl FnOnce(&mut State)) {
        change(&mut self.state());
        self.changed.notify_all();
    }

    fn wait_until<'a>(
        &self,
        mut state: MutexGuard<'a, State>,
        deadline: Option<Instant>,
        met: impl Fn(&State) -> bool,
    ) -> (MutexGuard<'a, State>, bool) {
        while !met(&state) {
            let Some(deadline) = deadline else {
                state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
                continue;
            };
            let Some(left) = deadline.checked_duration_since(Instant::now()) else { return (state, false) };
            state = self.changed.wait_timeout(state, left).unwrap_or_else(PoisonError::into_inner).0;
        }
        (state, true)
    }

    // ---- the main thread: one volume process after the other ----

    fn supervise(&self) {
        let mut pause = Duration::ZERO;
        loop {
            let (state, _) = self.wait_until(self.state(), None, |state| state.stopping || state.wants_process());
            if state.stopping {
                drop(state);
                self.change(|state| state.stopped = true);
                // The reply to `Stop` is written by a thread that ends with this process.
                let deadline = Instant::now() + Duration::from_secs(1);
                let (state, _) = self.wait_until(self.state(), Some(deadline), |state| state.answered);
                drop(state);
                return;
            }
            drop(state);
            let started = Instant::now();
            let end = self.one_life();
            pause = if started.elapsed() > SETTLED {
                Duration::ZERO
            } else {
                (pause * 2).max(Duration::from_millis(5)).min(MAX_PAUSE)
            };
            let state = self.state();
            if state.stopping || state.work.is_none() {
                pause = Duration::ZERO;
                continue;
            }
            tracing::warn!(volume = %self.spec.volume, %end, ?pause, "the volume process ended; it is started again");
            // The first death costs no pause: somebody's write waits.
            if pause > Duration::from_millis(5) {
                drop(
                    self.wait_until(state, Some(Instant::now() + pause), |state| {
                        state.stopping || state.work.is_none()
                    }),
                );
            } else {
                drop(state);
            }
        }
    }

    /// Starts a volume process and hears it to its end; says how it ended.
    fn one_life(&self) -> String {
        let (start, key, fuse, again) = {
            let mut state = self.state();
            let (Some(work), Some(key)) = (state.work.clone(), state.key.clone()) else { return "no work".into() };
            let fuse = state.device.as_ref().and_then(|device| device.fuse()).or_else(|| state.fuse.clone());
            let resume = fuse.is_some() && state.served;
            state.served |= fuse.is_some();
            let again = state.lives > 0;
            state.lives += 1;
            let start = VolumeStart { site: self.spec.site.clone(), volume: self.spec.volume.clone(), work, resume };
            (start, key, fuse, again)
        };
        let mut process = match Process::spawn(&start, key.as_fd(), fuse.as_deref(), again) {
            Ok(process) => process,
            Err(error) => {
                let message = format!("{} volume cannot be started: {error}", start.site.exe.display());
                self.change(|state| state.refuse(failure(FailureCode::Retry, &message)));
                return message;
            }
        };
        self.change(|state| state.pid = Some(process.pid()));
        match (process.started(), process.link()) {
            (Some(Ok(_)), Ok(link)) => {
                let link = Arc::new(link);
                self.change(|state| {
                    state.link = Some(Arc::clone(&link));
                    state.proved = true;
                    state.trouble = None;
                });
                process.serve(&link, |request, reply| self.change(|state| state.learn(request, reply)));
            }
            (Some(Err(refusal)), _) => self.change(|state| state.refuse(refusal)),
            (None, _) | (_, Err(_)) => {}
        }
        self.change(|state| state.link = None);
        let end = process.reap();
        self.change(|state| {
            state.pid = None;
            state.restarts += u64::from(state.work.is_some() && !state.stopping);
            state.stillborn += 1;
            if state.trouble.is_none() && !state.proved && state.stillborn >= STILLBORN {
                state.refuse(failure(
                    FailureCode::Retry,
                    format!("the volume process died at its start: {end}; see volume.log"),
                ));
            }
        });
        end
    }

    // ---- connections ----

    fn accept(self: &Arc<Self>, listener: &UnixListener) {
        loop {
            match listener.accept() {
                Ok((stream, _)) => {
                    let keeper = Arc::clone(self);
                    let served = std::thread::Builder::new().name("agent".into()).spawn(move || keeper.serve(&stream));
                    if let Err(error) = served {
                        tracing::error!(%error, "no thread for a connection");
                    }
                }
                Err(error) => {
                    tracing::error!(%error, "accepting failed");
                    // Out of descriptors, most likely; which come back unannounced. Not a busy loop meanwhile.
                    std::thread::sleep(Duration::from_millis(100));
                }
            }
        }
    }

    fn serve(&self, stream: &UnixStream) {
        let is_ours = rustix::net::sockopt::socket_peercred(stream).is_ok_and(|peer| peer.uid.is_root());
        if !is_ours {
            let _ =
                send_line(stream, &Err::<KeeperReply, _>(failure(FailureCode::Refused, "only root may ask a keeper")));
            return;
        }
        let mut lines = Lines::new(stream);
        loop {
            let answer = match lines.receive::<KeeperRequest>() {
                Ok(Some(request)) => self.handle(request),
                Ok(None) => return,
                Err(error) => Err(failure(FailureCode::Refused, format!("no request of this version: {error}"))),
            };
            let sent = send_line(stream, &answer);
            if self.state().stopped {
                self.change(|state| state.answered = true);
                // The connection's end tells the agent that this process is gone.
                loop {
                    std::thread::park();
                }
            }
            if sent.is_err() {
                return;
            }
        }
    }
}

impl State {
    fn wants_process(&self) -> bool {
        self.work.is_some()
    }

    /// A volume process says that it cannot be what it is to be.
    fn refuse(&mut self, refusal: Failure) {
        tracing::error!(%refusal, "the volume process refuses");
        // Trying again mends neither; a person does, and meanwhile whoever uses the device gets errors instead of waiting in
        // a state that not even a kill ends.
        if !self.proved || refusal.code == FailureCode::Stuck {
            self.work = None;
            self.fuse = None;
            if let Some(device) = &self.device {
                device.give_up();
            }
        }
        self.trouble = Some(refusal);
    }

    /// What a successor must know of a request that succeeded.
    fn learn(&mut self, request: &VolumeRequest, reply: &VolumeReply) {
        let Some(work) = &mut self.work else { return };
        match (request, reply) {
            (VolumeRequest::OpenExport { export }, VolumeReply::Exporting { port }) => {
                work.export = Some(on_port(export, *port));
            }
            (VolumeRequest::CloseExport, _) => work.export = None,
            (VolumeRequest::Seal { export }, VolumeReply::Sealed { port, .. }) => {
                work.export = Some(ExportWork { sealed: true, ..on_port(export, *port) });
                work.device = false;
            }
            (VolumeRequest::Begin { clone, .. }, _) => {
                work.clone = Some(control::CloneWork { begun: true, ..clone.clone() });
            }
            // Whole from here on: a successor opens it so, with its complete map or after that was dropped.
            (VolumeRequest::Verify, VolumeReply::Verified { .. }) => work.clone = None,
            (VolumeRequest::Limit { rate }, _) => work.limit = *rate,
            (VolumeRequest::Policy { policy }, _) => work.policy = *policy,
            _ => {}
        }
    }
}

fn on_port(export: &ExportWork, port: u16) -> ExportWork {
    let mut export = export.clone();
    export.listen.set_port(port);
    export
}
