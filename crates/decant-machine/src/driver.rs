//! The process driver: machines as processes in namespaces of their own, each under a shim that outlives the agent.

use std::ffi::OsString;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use decant_base::{Bytes, Epoch, MachineId, WorkerId};

use crate::spec::{HealthCheck, MachineSpec};
use crate::status::Status;

/// What a driver is told.
#[derive(Debug, Clone)]
pub struct DriverConfig {
    /// The worker it drives machines on; names its cgroup.
    pub worker: WorkerId,
    /// Sockets, status files and roots: `run_dir/machines/<machine>`. Does not outlive a boot.
    pub run_dir: PathBuf,
    /// Logs: `state_dir/machines/<machine>/log`.
    pub state_dir: PathBuf,
    /// How a shim is started: program and leading arguments, e.g. `["/usr/bin/decant", "shim"]`.
    pub shim: Vec<OsString>,
}

/// What [`ProcessDriver::prepare`] needs.
#[derive(Debug, Clone)]
pub struct Prepare<'a> {
    /// The machine.
    pub spec: &'a MachineSpec,
    /// Where its network namespace is pinned.
    pub netns: &'a Path,
    /// The claim it is prepared for, kept in its status: a survivor of another epoch is not ours to run.
    pub epoch: Epoch,
    /// SHA-256, hex, that the program must have; `None` skips the comparison.
    pub program_digest: Option<&'a str>,
}

/// A machine that the driver found, running or not.
#[derive(Debug, Clone)]
pub struct Survivor {
    /// Which.
    pub machine: MachineId,
    /// How it stands; `None` when its shim is gone and only files are left.
    pub status: Option<Status>,
}

/// Whether a step changed anything.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Change {
    /// It did.
    Made,
    /// It had been done before.
    Unchanged,
}

/// A machine could not be driven.
#[derive(Debug, thiserror::Error)]
pub enum MachineError {
    /// The machine cannot run on this worker as it is described.
    #[error("machine {machine} cannot run here: {cause}")]
    Unfit {
        /// Which.
        machine: MachineId,
        /// What is missing or not allowed, and where.
        cause: String,
    },
    /// Its shim is not there: prepare first.
    #[error("machine {machine} is not prepared on this worker")]
    NotPrepared {
        /// Which.
        machine: MachineId,
    },
    /// A shim runs it with another description or epoch: stop it first.
    #[error("machine {machine} is already here, {what}")]
    Conflict {
        /// Which.
        machine: MachineId,
        /// In which way it differs.
        what: String,
    },
    /// The shim says that it cannot.
    #[error("machine {machine}: {reason}")]
    Refused {
        /// Which.
        machine: MachineId,
        /// In its words.
        reason: String,
    },
    /// Something did not happen in time; it may still happen.
    #[error("machine {machine}: {what} took more than {after:?}: {reason}")]
    TimedOut {
        /// Which.
        machine: MachineId,
        /// What was awaited.
        what: &'static str,
        /// How long.
        after: Duration,
        /// What it hangs on, as far as known.
        reason: String,
    },
    /// The kernel said no.
    #[error("machine {machine}: cannot {action}: {cause}")]
    Io {
        /// Which.
        machine: MachineId,
        /// What was being done.
        action: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

/// Drives the machines of one worker. Blocking; every call is idempotent and may run on any thread.
#[derive(Debug)]
pub struct ProcessDriver {
    config: DriverConfig,
}

impl ProcessDriver {
    /// Finds the cgroup2 mount and makes the worker's cgroup.
    pub fn new(config: DriverConfig) -> io::Result<Self> {
        Ok(Self { config })
    }

    /// Whether the program and everything bound is there, on this worker, without making anything.
    pub fn check(&self, spec: &MachineSpec) -> Result<(), MachineError> {
        Err(self.unsupported(&spec.id))
    }

    /// SHA-256, hex, of the machine's program as this worker has it.
    pub fn program_digest(&self, spec: &MachineSpec) -> Result<String, MachineError> {
        Err(self.unsupported(&spec.id))
    }

    /// Does everything slow: shim, cgroups, namespaces, root. The machine then waits for [`ProcessDriver::start`].
    pub fn prepare(&self, request: &Prepare<'_>) -> Result<Change, MachineError> {
        Err(self.unsupported(&request.spec.id))
    }

    /// Mounts the machine's device at /data, if it has a volume, and starts the program; returns when it was executed.
    pub fn start(&self, machine: &MachineId, device: Option<&Path>) -> Result<Status, MachineError> {
        let _ = device;
        Err(self.unsupported(machine))
    }

    /// Writes the machine's dirty data back while it runs, so that a stop soon after has little left to write.
    pub fn sync(&self, machine: &MachineId) -> Result<(), MachineError> {
        Err(self.unsupported(machine))
    }

    /// Stop signal, then after the machine's timeout SIGKILL; returns when its cgroup is empty, /data is unmounted and nobody
    /// holds the device. `Unchanged` if nothing of it was here.
    pub fn stop(&self, machine: &MachineId, patience: Duration) -> Result<Change, MachineError> {
        let _ = patience;
        Err(self.unsupported(machine))
    }

    /// SIGKILL to all of the machine at once, then as [`ProcessDriver::stop`]. Works without a shim.
    pub fn kill(&self, machine: &MachineId, patience: Duration) -> Result<Change, MachineError> {
        let _ = patience;
        Err(self.unsupported(machine))
    }

    /// How the machine stands; `None` if it is not here.
    pub fn status(&self, machine: &MachineId) -> Result<Option<Status>, MachineError> {
        Err(self.unsupported(machine))
    }

    /// Every machine of which something is here.
    pub fn survivors(&self) -> io::Result<Vec<Survivor>> {
        Ok(Vec::new())
    }

    /// FITRIM of /data; the bytes that the file system says it trimmed.
    pub fn trim(&self, machine: &MachineId) -> Result<Bytes, MachineError> {
        Err(self.unsupported(machine))
    }

    /// Waits until the machine's health check at `address` passes, polling every millisecond or so.
    pub fn wait_healthy(
        &self,
        machine: &MachineId,
        check: &HealthCheck,
        address: Ipv6Addr,
        patience: Duration,
    ) -> Result<(), MachineError> {
        let _ = (check, address, patience);
        Err(self.unsupported(machine))
    }

    /// The machine's log; older parts are `log.1`, `log.2`, … beside it.
    pub fn log_path(&self, machine: &MachineId) -> PathBuf {
        self.config.state_dir.join("machines").join(machine.as_str()).join("log")
    }

    /// Removes run files and cgroups of a machine that is not running, and with `logs` its logs.
    pub fn remove(&self, machine: &MachineId, logs: bool) -> Result<(), MachineError> {
        let _ = logs;
        Err(self.unsupported(machine))
    }

    fn unsupported(&self, machine: &MachineId) -> MachineError {
        MachineError::Refused { machine: machine.clone(), reason: "not supported".to_owned() }
    }
}
