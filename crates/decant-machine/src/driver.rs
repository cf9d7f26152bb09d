//! The process driver: machines as processes in namespaces of their own, each under a shim that outlives the agent.

mod check;
mod client;
mod device;
mod health;
mod steps;

use std::ffi::OsString;
use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use decant_base::{Bytes, Epoch, MachineId, WorkerId};

use crate::cgroup;
use crate::spec::{HealthCheck, MachineSpec};
use crate::status::Status;

pub use device::{DeviceBusy, probe_exclusive};

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
    /// How it stands; `None` when that cannot be told.
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
    /// It has stopped, but what its program wrote last could not be written to its volume.
    #[error("machine {machine} has stopped, and writing its volume back failed: {reason}")]
    Unclean {
        /// Which.
        machine: MachineId,
        /// In the shim's words.
        reason: String,
    },
    /// It has stopped, and somebody else still has its device open or mounted.
    #[error("machine {machine} has stopped, but {cause}")]
    DeviceBusy {
        /// Which.
        machine: MachineId,
        /// Who.
        #[source]
        cause: DeviceBusy,
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
    /// The cgroup of the worker's machines.
    group: PathBuf,
    controllers: Vec<String>,
    digests: check::Digests,
}

impl ProcessDriver {
    /// Finds the cgroup2 mount, clears cgroups that ended demos and tests left, and makes the worker's.
    ///
    /// # Errors
    /// No cgroup2, or no right to it.
    pub fn new(mut config: DriverConfig) -> io::Result<Self> {
        // Shims are started from wherever; their paths must not depend on it.
        for path in [&mut config.run_dir, &mut config.state_dir] {
            *path = std::path::absolute(&*path)?;
        }
        let mount = cgroup::mount_point()?;
        cgroup::sweep(&mount);
        let group = cgroup::of_worker(&mount, config.worker.as_str(), &config.run_dir);
        fs::create_dir_all(&config.run_dir)?;
        cgroup::make_worker(&group, &config.run_dir)?;
        let controllers = cgroup::available(&mount);
        Ok(Self { config, group, controllers, digests: check::Digests::default() })
    }

    /// Controllers of cgroup2 that limits can use here; a limit whose controller is missing does not hold.
    pub fn controllers(&self) -> &[String] {
        &self.controllers
    }

    /// Whether the program and everything bound is there, on this worker, without making anything.
    pub fn check(&self, spec: &MachineSpec) -> Result<(), MachineError> {
        check::check(spec).map(drop).map_err(|cause| MachineError::Unfit { machine: spec.id.clone(), cause })
    }

    /// SHA-256, hex, of the machine's program as this worker has it. Remembered until the file changes.
    pub fn program_digest(&self, spec: &MachineSpec) -> Result<String, MachineError> {
        let unfit = |cause| MachineError::Unfit { machine: spec.id.clone(), cause };
        self.digests.of(&check::check(spec).map_err(unfit)?).map_err(unfit)
    }

    /// SHA-256, hex, of the program that the machine was started from, which may since have been replaced; of the one it
    /// would start if it is down.
    pub fn started_from(&self, spec: &MachineSpec) -> Result<String, MachineError> {
        steps::started_from(self, spec)
    }

    /// Does everything slow: shim, cgroups, namespaces, root. The machine then waits for [`ProcessDriver::start`].
    ///
    /// # Errors
    /// [`MachineError::Unfit`] if it cannot run here; [`MachineError::Conflict`] if it is here for another claim.
    pub fn prepare(&self, request: &Prepare<'_>) -> Result<Change, MachineError> {
        steps::prepare(self, request)
    }

    /// Mounts the machine's device at /data, if it has a volume, and starts the program; returns when it was executed.
    /// Waits for a mount that waits for the volume; what it waits for is in its status meanwhile.
    pub fn start(&self, machine: &MachineId, device: Option<&Path>) -> Result<Status, MachineError> {
        steps::start(self, machine, device)
    }

    /// Writes the machine's dirty data back while it runs, so that a stop soon after has little left to write.
    pub fn sync(&self, machine: &MachineId) -> Result<(), MachineError> {
        steps::sync(self, machine)
    }

    /// Writes back, then stop signal, then after the machine's timeout SIGKILL; returns when its cgroup is empty, /data is
    /// unmounted and nobody holds the device. `Unchanged` if nothing of it was here.
    ///
    /// # Errors
    /// [`MachineError::TimedOut`] after `patience`, with what it hangs on; the stop goes on, and can be waited for again.
    /// [`MachineError::Unclean`] if writing back failed, said until the machine is prepared again: as after a power cut, what
    /// the program had synced is there.
    pub fn stop(&self, machine: &MachineId, patience: Duration) -> Result<Change, MachineError> {
        steps::stop(self, machine, false, patience)
    }

    /// SIGKILL to all of the machine at once, then as [`ProcessDriver::stop`]. Works without a shim, and a write-back that
    /// fails is no error.
    pub fn kill(&self, machine: &MachineId, patience: Duration) -> Result<Change, MachineError> {
        steps::stop(self, machine, true, patience)
    }

    /// How the machine stands; `None` if it is not here.
    pub fn status(&self, machine: &MachineId) -> Result<Option<Status>, MachineError> {
        steps::status(self, machine)
    }

    /// Whether the machine, if it is up, was started on the disk that `device` is now. One that was not runs on a disk that is
    /// gone: the keeper of its volume has died. True where that is not known.
    pub fn is_on(&self, machine: &MachineId, device: Option<&Path>) -> bool {
        steps::is_on(self, machine, device)
    }

    /// Every machine of which something is here.
    pub fn survivors(&self) -> io::Result<Vec<Survivor>> {
        let mut survivors = Vec::new();
        let entries = match fs::read_dir(self.config.run_dir.join("machines")) {
            Ok(entries) => entries,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(survivors),
            Err(error) => return Err(error),
        };
        for entry in entries {
            let Ok(machine) = MachineId::new(entry?.file_name().to_string_lossy()) else { continue };
            let status = steps::status(self, &machine).ok().flatten();
            survivors.push(Survivor { machine, status });
        }
        survivors.sort_by(|a, b| a.machine.cmp(&b.machine));
        Ok(survivors)
    }

    /// FITRIM of /data; the bytes that the file system says it trimmed.
    pub fn trim(&self, machine: &MachineId) -> Result<Bytes, MachineError> {
        steps::trim(self, machine)
    }

    /// Waits until the machine's health check at `address` passes, polling every millisecond or so.
    pub fn wait_healthy(
        &self,
        machine: &MachineId,
        check: &HealthCheck,
        address: Ipv6Addr,
        patience: Duration,
    ) -> Result<(), MachineError> {
        health::wait(check, address, patience).map_err(|reason| MachineError::TimedOut {
            machine: machine.clone(),
            what: "becoming healthy",
            after: patience,
            reason,
        })
    }

    /// The machine's log; older parts are `log.1`, `log.2`, … beside it.
    pub fn log_path(&self, machine: &MachineId) -> PathBuf {
        self.logs(machine).join("log")
    }

    /// Removes run files and cgroups of a machine that is not running, and with `logs` its logs.
    pub fn remove(&self, machine: &MachineId, logs: bool) -> Result<(), MachineError> {
        steps::remove(self, machine, logs)
    }

    fn run(&self, machine: &MachineId) -> PathBuf {
        self.config.run_dir.join("machines").join(machine.as_str())
    }

    fn logs(&self, machine: &MachineId) -> PathBuf {
        self.config.state_dir.join("machines").join(machine.as_str())
    }

    fn cgroup(&self, machine: &MachineId) -> PathBuf {
        self.group.join(machine.as_str())
    }
}
