//! The agent: what everything else hangs on, and its start and end.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use decant_base::{Bytes, MachineId, VolumeId};
use decant_dataplane::{Failure, Plane};
use decant_fsm::{Journal, OpenError, Options};
use decant_machine::Status;
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::{mpsc, watch};
use tokio::task::JoinSet;

use crate::clock::Clock;
use crate::config::Config;
use crate::core::{self, Admission, Core, Detail, Input, Parts, Snapshot, VolumeLocks, World};
use crate::machines::Machines;
use crate::peers::{Peers, Standing};
use crate::routes::Routes;
use crate::statuses::Statuses;
use crate::tls::{Identity, TlsError};
use crate::view::{self, Seen};
use crate::watch::Health;
use crate::{errands, server};

/// What the rows and the log hold; raised when they change in a way that an older agent would misread.
const SCHEMA: u32 = 1;
/// Lines of the event log that are kept: months of drains, some ten megabytes.
const LOG_MAX: u64 = 50_000;
/// How long a driver may take to say how a machine stands before the API answers without it.
const STATUS_PATIENCE: Duration = Duration::from_millis(300);

/// How long requests that are under way at the end are waited for; ten times what a list takes.
const LAST_REQUESTS: Duration = Duration::from_secs(2);

/// An agent cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// A directory or a socket cannot be made.
    #[error("cannot {action} {}: {source}", path.display())]
    File {
        /// What was being done.
        action: &'static str,
        /// To which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// Another agent runs with the same `state_dir`.
    #[error("another agent runs with {}: stop it first, or give this worker its own state_dir", path.display())]
    Running {
        /// The lock.
        path: PathBuf,
    },
    /// The journal is refused.
    #[error(transparent)]
    Journal(#[from] OpenError),
    /// The journal does not read.
    #[error(transparent)]
    Rows(#[from] decant_fsm::JournalError),
    /// The certificates are refused.
    #[error(transparent)]
    Tls(#[from] TlsError),
    /// The port for peers cannot be had.
    #[error("cannot listen on {address} for peers: {source}; key `listen`")]
    Listen {
        /// Where.
        address: std::net::SocketAddr,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The data plane or the machines' driver cannot work here.
    #[error("{0}")]
    World(Failure),
    /// A thread cannot be started.
    #[error("cannot start a thread: {0}")]
    Thread(std::io::Error),
}

/// What all parts of a running agent share.
pub(crate) struct Agent {
    pub(crate) config: Arc<Config>,
    pub(crate) identity: Identity,
    pub(crate) rows: Arc<Snapshot>,
    pub(crate) core: Core,
    pub(crate) journal: Arc<Journal>,
    pub(crate) world: World,
    pub(crate) peers: Arc<Peers>,
    pub(crate) routes: Routes,
    pub(crate) statuses: Statuses,
    pub(crate) health: Health,
    pub(crate) clock: Arc<Clock>,
    pub(crate) admission: Arc<Admission>,
    /// The last field, so that it goes after the journal: [`Running::stop`] sees by it that the journal is closed.
    _gone: mpsc::Sender<()>,
}

/// A running agent. Dropping it ends it as a crash would; machines run on either way.
pub struct Running {
    agent: Arc<Agent>,
    tasks: JoinSet<()>,
    failed: watch::Receiver<Option<String>>,
    core: Option<std::thread::JoinHandle<()>>,
    gone: mpsc::Receiver<()>,
    _lock: File,
}

/// What an agent works with; tests pass their own.
pub struct Deps {
    /// The data plane.
    pub plane: Arc<dyn Plane>,
    /// The machines' driver.
    pub machines: Arc<dyn Machines>,
}

impl Running {
    /// Starts an agent: takes the lock on its state, opens the journal, kills survivors that it does not own, boots what it
    /// owns without asking any peer, and serves.
    pub async fn start(config: Config, deps: Deps) -> Result<Self, StartError> {
        let lock = lock(&config)?;
        let identity = Identity::load(&config.tls, &config.worker)?;
        let options = Options { owner: config.worker.to_string(), schema: SCHEMA, log_max: LOG_MAX };
        let journal = Arc::new(Journal::open(&config.state_dir.join("journal.redb"), &options)?);
        let rows = Arc::new(core::load(&journal)?);
        let survivors = strangers(&*deps.machines, &rows).map_err(StartError::World)?;
        let socket = listen_unix(&config.socket())?;
        let listener = TcpListener::bind(config.listen)
            .await
            .map_err(|source| StartError::Listen { address: config.listen, source })?;

        let (clock, config) = (Arc::new(Clock::new()), Arc::new(config));
        let peers = Arc::new(Peers::start(&config.peers, &identity));
        let admission = Arc::new(Admission {
            max_machines: config.max_machines,
            max_bytes: config.max_bytes,
            bytes_used: std::sync::atomic::AtomicU64::new(0),
        });
        let world = World { plane: deps.plane, machines: deps.machines, locks: Arc::new(VolumeLocks::default()) };
        let (outgoing, outbox) = mpsc::unbounded_channel();
        let (errand_sender, errand_inbox) = mpsc::unbounded_channel();
        let (failed_sender, failed) = watch::channel(None);
        let parts = Parts {
            worker: config.worker.clone(),
            journal: journal.clone(),
            rows: rows.clone(),
            clock: clock.clone(),
            admission: admission.clone(),
            world: world.clone(),
            outgoing,
            errands: errand_sender,
            failed: failed_sender,
            survivors,
        };
        let (core, thread) = core::start(parts).map_err(StartError::Thread)?;
        let (gone_sender, gone) = mpsc::channel(1);
        let agent = Arc::new(Agent {
            routes: Routes::new(config.clone(), rows.clone(), peers.clone()),
            statuses: Statuses::new(world.plane.clone()),
            health: Health::default(),
            config,
            identity,
            rows,
            core,
            journal,
            world,
            peers,
            clock,
            admission,
            _gone: gone_sender,
        });
        let mut tasks = JoinSet::new();
        tasks.spawn(agent.peers.clone().carry(outbox));
        tasks.spawn(errands::run(agent.clone(), errand_inbox));
        tasks.spawn(crate::watch::health(agent.clone()));
        tasks.spawn(crate::watch::losses(agent.clone()));
        tasks.spawn(server::serve_unix(agent.clone(), socket));
        tasks.spawn(server::serve_tls(agent.clone(), listener));
        agent.peers.watch(&mut tasks, &agent.core, &agent.rows, &agent.clock);
        agent.note("agent.started", format!("the agent of {} has started", agent.config.worker));
        Ok(Self { agent, tasks, failed, core: Some(thread), gone, _lock: lock })
    }

    /// Completes if the journal fails: nothing can be decided any more.
    pub async fn failed(&mut self) -> String {
        match self.failed.wait_for(Option::is_some).await {
            Ok(why) => why.clone().unwrap_or_default(),
            Err(_) => "the agent's core has ended".to_owned(),
        }
    }

    /// Ends the agent; machines run on. What is being performed is finished by nobody: the next start repeats it. When this
    /// returns, another agent may start with the same state.
    pub async fn stop(mut self) {
        self.agent.note("agent.ended", format!("the agent of {} ends; machines run on", self.agent.config.worker));
        self.agent.core.tell(Input::End);
        self.tasks.shutdown().await;
        if let Some(core) = self.core.take() {
            let _ = tokio::task::spawn_blocking(move || core.join()).await;
        }
        let _ = std::fs::remove_file(self.agent.config.socket());
        // Requests that are under way hold the agent and with it the journal; one that hangs is not waited for.
        let mut gone = std::mem::replace(&mut self.gone, mpsc::channel(1).1);
        drop(self);
        let _ = tokio::time::timeout(LAST_REQUESTS, gone.recv()).await;
    }

    /// The API's socket.
    pub fn socket(&self) -> PathBuf {
        self.agent.config.socket()
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.agent.core.tell(Input::End);
    }
}

fn file_error(action: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> StartError {
    let path = path.to_owned();
    move |source| StartError::File { action, path, source }
}

/// Makes the directories, for root only, and holds `state_dir` against a second agent.
fn lock(config: &Config) -> Result<File, StartError> {
    use std::os::unix::fs::DirBuilderExt as _;
    for directory in [&config.state_dir, &config.run_dir] {
        let mut builder = std::fs::DirBuilder::new();
        builder.recursive(true).mode(0o700).create(directory).map_err(file_error("make", directory))?;
    }
    let path = config.state_dir.join("agent.lock");
    let file =
        File::options().create(true).truncate(false).write(true).open(&path).map_err(file_error("open", &path))?;
    match rustix::fs::flock(&file, rustix::fs::FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(rustix::io::Errno::WOULDBLOCK) => Err(StartError::Running { path }),
        Err(error) => Err(file_error("lock", &path)(error.into())),
    }
}

/// Makes the API's socket, for root only from its first moment: it is made in a directory that is.
fn listen_unix(path: &Path) -> Result<UnixListener, StartError> {
    use std::os::unix::fs::PermissionsExt as _;
    match std::fs::remove_file(path) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(file_error("replace", path)(error)),
    }
    let listener = UnixListener::bind(path).map_err(file_error("make", path))?;
    std::fs::set_permissions(path, std::fs::Permissions::from_mode(0o600)).map_err(file_error("restrict", path))?;
    Ok(listener)
}

/// Machines that run here although their row does not say that this worker owns them under that claim.
fn strangers(machines: &dyn Machines, rows: &Snapshot) -> Result<Vec<MachineId>, Failure> {
    let survivors = machines.survivors()?;
    let is_ours = |machine: &MachineId, claim: Option<decant_base::Epoch>| {
        let owned = rows.machine(machine).and_then(|row| row.state.owned());
        owned.is_some() && claim.is_none_or(|claim| Some(claim) == owned)
    };
    Ok(survivors.into_iter().filter(|(machine, claim)| !is_ours(machine, *claim)).map(|(machine, _)| machine).collect())
}

impl Agent {
    /// Adds a line to the event log.
    pub(crate) fn note(&self, kind: &str, message: String) {
        let detail = Detail { kind: kind.to_owned(), message, ..Detail::default() };
        let subject = format!("worker/{}", self.config.worker);
        self.core.tell(Input::Note(Box::new(detail.note(subject, self.clock.now_ms()))));
    }

    /// How the driver says that a machine stands; `None` if it does not answer within `patience`.
    pub(crate) async fn driver_status(
        &self,
        machine: &MachineId,
        patience: Duration,
    ) -> Option<Result<Option<Status>, Failure>> {
        let (machines, machine) = (self.world.machines.clone(), machine.clone());
        let asked = tokio::task::spawn_blocking(move || machines.status(&machine));
        tokio::time::timeout(patience, asked).await.ok()?.ok()
    }

    /// A row with what others say of it now, for `f`.
    pub(crate) async fn with_seen<T>(&self, row: &decant_drain::Row, f: impl FnOnce(&Seen<'_>) -> T) -> T {
        let status = async {
            row.state.owned()?;
            self.driver_status(&row.machine, STATUS_PATIENCE).await?.ok()?
        };
        let volume = async {
            match &row.volume {
                Some(volume) => self.statuses.of(volume).await.ok(),
                None => None,
            }
        };
        let (status, volume) = tokio::join!(status, volume);
        f(&Seen {
            status: status.as_ref(),
            volume: volume.as_deref(),
            healthy_at_ms: row.state.owned().and_then(|epoch| self.health.passed_at(&row.machine, epoch)),
            rates: row.volume.as_ref().map(|volume| self.statuses.rates(volume)).unwrap_or_default(),
        })
    }

    /// The volumes that this worker has files of; `Err` if the plane does not answer in time.
    pub(crate) async fn volumes(&self) -> Result<Vec<VolumeId>, String> {
        let plane = self.world.plane.clone();
        let asked = tokio::task::spawn_blocking(move || plane.volumes());
        match tokio::time::timeout(Duration::from_millis(300), asked).await {
            Ok(Ok(answer)) => answer.map_err(|failure| failure.message),
            Ok(Err(_)) => Err("the data plane failed; see the agent's log".to_owned()),
            Err(_) => Err("the data plane did not answer within 300 ms".to_owned()),
        }
    }

    /// Counts what the volumes take, for placement.
    pub(crate) async fn count_bytes(&self) {
        let Ok(volumes) = self.volumes().await else { return };
        let mut sum = 0u64;
        for volume in volumes {
            if let Ok(status) = self.statuses.of(&volume).await {
                sum = sum.saturating_add(status.allocated.0);
            }
        }
        self.admission.bytes_used.store(sum, Ordering::Relaxed);
    }

    pub(crate) fn capacity(&self) -> decant_api::Capacity {
        let free =
            rustix::fs::statvfs(&self.config.state_dir).map_or(0, |stat| stat.f_bavail.saturating_mul(stat.f_frsize));
        decant_api::Capacity {
            machines: self.config.max_machines,
            bytes: self.config.max_bytes,
            bytes_used: Bytes(self.admission.bytes_used.load(Ordering::Relaxed)),
            bytes_free: Bytes(free),
        }
    }

    /// This worker as the API shows it.
    pub(crate) async fn this_worker(&self) -> decant_api::Worker {
        use decant_api::WorkerState as S;
        let rows = self.rows.machines();
        let cordoned = self.rows.worker().cordoned;
        let owned = rows.iter().filter(|row| row.state.owned().is_some());
        let machines = owned.clone().filter(|row| row.desired != decant_drain::Desired::Removed).count();
        let serving = rows.iter().filter(|row| is_serving(row)).count();
        let mut exposure_bytes = 0u64;
        for row in owned.filter(|row| row.migration.as_ref().is_some_and(|migration| !migration.phase.is_over())) {
            if let Some(Ok(status)) =
                futures_util::future::OptionFuture::from(row.volume.as_ref().map(|volume| self.statuses.of(volume)))
                    .await
            {
                exposure_bytes += status.clone.as_ref().map_or(0, |clone| clone.bytes_missing);
            }
        }
        let drain = cordoned.as_ref().and_then(|cordoned| cordoned.drain.clone());
        let state = match (&cordoned, &drain) {
            (None, _) => S::Ready,
            (Some(_), None) => S::Cordoned,
            (Some(_), Some(_)) if machines > 0 => S::Draining,
            (Some(_), Some(_)) if serving > 0 => S::Evacuated,
            (Some(_), Some(_)) => S::Drained,
        };
        decant_api::Worker {
            worker: self.config.worker.clone(),
            worker_index: self.config.worker_index,
            address: self.config.listen.to_string(),
            region: self.config.region.clone(),
            labels: self.config.labels.clone(),
            state,
            reason: cordoned.map(|cordoned| cordoned.reason),
            drain,
            capacity: Some(self.capacity()),
            machines: u64::try_from(machines).unwrap_or(u64::MAX),
            serving: u64::try_from(serving).unwrap_or(u64::MAX),
            exposure_bytes,
            version: env!("CARGO_PKG_VERSION").to_owned(),
        }
    }

    /// This worker as its peers ask for it.
    pub(crate) async fn standing(&self) -> Standing {
        let claim = |row: &Arc<decant_drain::Row>| {
            Some(crate::peers::Claim { machine: row.machine.clone(), epoch: row.state.owned()? })
        };
        let claims = self.rows.machines().iter().filter_map(claim).collect();
        Standing { worker: self.this_worker().await, claims }
    }

    /// A machine as the API shows it.
    pub(crate) async fn machine(&self, row: &decant_drain::Row) -> Option<decant_api::Machine> {
        self.with_seen(row, |seen| view::machine(&self.config, row, seen)).await
    }

    /// A row's migration as this worker sees it.
    pub(crate) async fn migration(&self, row: &decant_drain::Row) -> Option<decant_api::Migration> {
        self.with_seen(row, |seen| view::migration(row, seen)).await
    }
}

/// Whether another worker still reads a volume from here, or is about to.
fn is_serving(row: &decant_drain::Row) -> bool {
    matches!(row.state, decant_drain::handoff::State::Sealed { .. })
        || row.migration.as_ref().is_some_and(|migration| {
            migration.role == decant_drain::migration::Role::Source && !migration.phase.is_over()
        })
}
