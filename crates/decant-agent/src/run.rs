//! The agent and the proxy as processes: from a configuration to the end that a signal asks for.

use std::ffi::OsString;
use std::future::Future;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use decant_base::MachineId;
use decant_dataplane_user::{SiteConfig, UserPlane};
use decant_machine::{DriverConfig, ProcessDriver};
use decant_network::proxy::{self, ProxyError};
use decant_network::{LinkError, ResolveError, Resolver, Route};
use tokio::signal::unix::{SignalKind, signal};

use crate::agent::{Deps, Running, StartError};
use crate::client::Client;
use crate::config::{Config, KeySource};
use crate::machines::Processes;

/// Connections that are open when the proxy is told to end may go on for this long.
const PROXY_DRAIN: Duration = Duration::from_secs(10);

/// The agent or the proxy ended, or did not start.
#[derive(Debug, thiserror::Error)]
pub enum RunError {
    /// Threads or signals cannot be had.
    #[error("cannot start: {0}")]
    Process(#[source] std::io::Error),
    /// Not root.
    #[error("this is user {uid}, and volumes, machines and their networks are root's to make")]
    NotRoot {
        /// Who it is.
        uid: u32,
    },
    /// No FUSE.
    #[error("{FUSE} cannot be used: {0}")]
    Fuse(#[source] std::io::Error),
    /// The program's own path cannot be read.
    #[error("cannot find this program's own file: {0}; name it with the key `program`")]
    Program(#[source] std::io::Error),
    /// The data plane cannot work here.
    #[error("the data plane cannot work here: {0}")]
    Plane(#[source] decant_dataplane::Failure),
    /// Machines cannot be driven here.
    #[error("machines cannot be driven here: {0}; the agent needs root and a mounted cgroup2")]
    Machines(#[source] std::io::Error),
    /// Links cannot be made here.
    #[error("{0}; the agent needs root in its network namespace")]
    Links(#[from] LinkError),
    /// The agent cannot start.
    #[error(transparent)]
    Start(#[from] StartError),
    /// The journal failed while the agent ran.
    #[error("{0}; machines run on. Start the agent again; if it ends again, look at the disk under state_dir")]
    Journal(String),
    /// A port of the proxy cannot be had.
    #[error(transparent)]
    Proxy(#[from] ProxyError),
}

/// Where the kernel hands out FUSE sessions; a volume's device stands on one.
pub const FUSE: &str = "/dev/fuse";

/// Whether FUSE is here: its device, not merely a file of that name (misc, number 229; Documentation/admin-guide/devices.txt).
///
/// # Errors
/// What the kernel says, or that the file is none of its.
pub fn fuse() -> std::io::Result<()> {
    let file = std::fs::File::options().read(true).write(true).open(FUSE)?;
    let stat = rustix::fs::fstat(&file)?;
    let is_device = rustix::fs::FileType::from_raw_mode(stat.st_mode) == rustix::fs::FileType::CharacterDevice;
    if is_device && (rustix::fs::major(stat.st_rdev), rustix::fs::minor(stat.st_rdev)) == (10, 229) {
        return Ok(());
    }
    Err(std::io::Error::new(std::io::ErrorKind::NotFound, "it is not the device of FUSE"))
}

/// What is asked of this host before anything is made, in the order in which a person would fix it.
fn check_host() -> Result<(), RunError> {
    let uid = rustix::process::geteuid();
    if !uid.is_root() {
        return Err(RunError::NotRoot { uid: uid.as_raw() });
    }
    fuse().map_err(RunError::Fuse)
}

/// Runs the agent of `config` until SIGTERM or SIGINT; machines run on.
///
/// # Errors
/// Why it did not start, or that its journal failed.
pub fn run(config: Config) -> Result<(), RunError> {
    check_host()?;
    block_on(async {
        let end = end()?;
        let deps = deps(&config)?;
        let mut running = Running::start(config, deps).await?;
        tracing::info!(socket = %running.socket().display(), "the agent has started");
        let failed = tokio::select! {
            () = end => None,
            why = running.failed() => Some(why),
        };
        running.stop().await;
        match failed {
            Some(why) => Err(RunError::Journal(why)),
            None => Ok(()),
        }
    })
}

/// Runs the proxy of `config` until SIGTERM or SIGINT. It asks the agent beside it where machines are, and goes on with
/// what it knows while that one is away.
///
/// # Errors
/// A port that cannot be had.
pub fn proxy_main(config: Config) -> Result<(), RunError> {
    let resolver = AgentResolver { client: Client::unix(config.socket()) };
    let services = config.proxy.services.iter().map(|service| proxy::Service {
        listen: service.listen,
        machine: service.machine.clone(),
        port: service.port,
    });
    let proxy = proxy::Config {
        services: services.collect(),
        max_parked: config.proxy.max_parked,
        park_timeout: config.proxy.park_timeout,
        max_connections: config.proxy.max_connections,
        drain_timeout: PROXY_DRAIN,
    };
    block_on(async {
        let end = end()?;
        Ok(proxy::run(proxy, resolver, end).await?)
    })
}

/// Runs `work` to its end. Blocking questions that hang, e.g. in a plane, are not waited for: the process ends without them.
fn block_on(work: impl Future<Output = Result<(), RunError>>) -> Result<(), RunError> {
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().map_err(RunError::Process)?;
    let result = runtime.block_on(work);
    runtime.shutdown_background();
    result
}

/// Completes at SIGTERM or SIGINT, which are caught from now on.
fn end() -> Result<impl Future<Output = ()> + Send, RunError> {
    let mut terminate = signal(SignalKind::terminate()).map_err(RunError::Process)?;
    let mut interrupt = signal(SignalKind::interrupt()).map_err(RunError::Process)?;
    Ok(async move {
        tokio::select! {
            _ = terminate.recv() => {}
            _ = interrupt.recv() => {}
        }
    })
}

/// The userspace plane and the process driver of a worker.
fn deps(config: &Config) -> Result<Deps, RunError> {
    let program = match &config.program {
        Some(program) => program.clone(),
        None => std::env::current_exe().map_err(RunError::Program)?,
    };
    let plane = UserPlane::new(site(config, program.clone())).map_err(RunError::Plane)?;
    let driver = ProcessDriver::new(DriverConfig {
        worker: config.worker.clone(),
        run_dir: config.run_dir.clone(),
        state_dir: config.state_dir.clone(),
        shim: vec![OsString::from(program), OsString::from("shim")],
    })
    .map_err(RunError::Machines)?;
    Ok(Deps { plane: Arc::new(plane), machines: Arc::new(Processes::new(config, driver)?) })
}

fn site(config: &Config, program: PathBuf) -> SiteConfig {
    use decant_dataplane_user::keys::KeySource as Source;
    SiteConfig {
        worker: config.worker.clone(),
        state_dir: config.state_dir.clone(),
        run_dir: config.run_dir.clone(),
        data_listen: config.data_listen,
        iscsi_trusted: config.iscsi_trusted.clone(),
        tls: decant_dataplane_user::TlsFiles {
            ca: config.tls.ca.clone(),
            cert: config.tls.cert.clone(),
            key: config.tls.key.clone(),
        },
        header: config.luks_header,
        keys: match &config.keys {
            KeySource::File { directory } => Source::File { directory: directory.clone() },
            KeySource::Command { command } => Source::Command { command: command.clone() },
            KeySource::Keyring => Source::Keyring,
        },
        exe: program,
    }
}

/// Asks the agent of this worker.
struct AgentResolver {
    client: Client,
}

impl Resolver for AgentResolver {
    async fn route(&self, machine: &MachineId, known: Option<&Route>, wait: Duration) -> Result<Route, ResolveError> {
        let known = known.map(|known| decant_api::path::KnownRoute {
            state: known.state,
            epoch: known.epoch,
            worker: known.worker.clone(),
        });
        let wait_ms = u64::try_from(wait.as_millis()).unwrap_or(u64::MAX);
        let path = decant_api::path::route_if_changed(machine, wait_ms, known.as_ref());
        let patience = wait + Duration::from_secs(10);
        let answer = self.client.clone().with_timeout(patience).get(&path).await;
        answer.map_err(|error| ResolveError { machine: machine.clone(), cause: Box::new(error) })
    }
}
