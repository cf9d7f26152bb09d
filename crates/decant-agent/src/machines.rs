//! Machines as the core drives them: the process driver and the link of each machine, with failures in the core's words.

use std::net::{IpAddr, Ipv6Addr};
use std::path::Path;
use std::time::Duration;

use decant_base::{Epoch, MachineId};
use decant_dataplane::{Failure, FailureCode};
use decant_machine::{MachineError, MachineSpec, Prepare, ProcessDriver, State, Status};
use decant_network::{LinkError, MachineAddress, MachineLink};

use crate::config::Config;

/// Who runs machines on this worker. Blocking and idempotent; calls for one machine come one at a time, except `status`.
pub trait Machines: Send + Sync {
    /// Everything slow before a start, for the claim `epoch`; the machine then waits. Its program must be `program` (SHA-256,
    /// hex), if that is given.
    fn prepare(&self, spec: &MachineSpec, epoch: Epoch, program: Option<&str>) -> Result<(), Failure>;

    /// SHA-256, hex, of the program that it was started from; of the one it would start if it is down.
    fn program(&self, spec: &MachineSpec) -> Result<String, Failure>;

    /// Starts it as its owner at `epoch`, prepared or not; returns when its first process runs.
    fn start(&self, spec: &MachineSpec, epoch: Epoch, device: Option<&Path>) -> Result<(), Failure>;

    /// Stops it; returns when no process of it is left and nobody has its device open.
    fn stop(&self, machine: &MachineId) -> Result<(), Failure>;

    /// As `stop`, at once and without its consent.
    fn kill(&self, machine: &MachineId) -> Result<(), Failure>;

    /// Discards what its file system does not use.
    fn trim(&self, machine: &MachineId) -> Result<(), Failure>;

    /// Removes all but its logs, the link of `address_index` too. It does not run.
    fn discard(&self, machine: &MachineId, address_index: Option<u32>) -> Result<(), Failure>;

    /// How it stands; `None` if nothing of it is here.
    fn status(&self, machine: &MachineId) -> Result<Option<Status>, Failure>;

    /// Every machine of which a process may be here, with the claim it was prepared for if that is known.
    fn survivors(&self) -> Result<Vec<(MachineId, Option<Epoch>)>, Failure>;

    /// Waits for its health check at `address`.
    fn wait_healthy(&self, spec: &MachineSpec, address: Ipv6Addr, patience: Duration) -> Result<(), Failure>;

    /// The last `lines` lines of its output.
    fn logs(&self, machine: &MachineId, lines: usize) -> Result<String, Failure>;
}

/// The process driver, with a link for each machine.
#[derive(Debug)]
pub struct Processes {
    driver: ProcessDriver,
    run_dir: std::path::PathBuf,
    network: u32,
    worker_index: u32,
}

/// A stop may take the machine's own timeout and this much more, for unmounting and writing back.
const STOP_PATIENCE: Duration = Duration::from_secs(120);
/// Reading more of a log than this makes no sense over an API.
const LOG_BYTES: u64 = 1 << 20;

impl Processes {
    /// Makes the worker's own routes and the driver of its machines.
    pub fn new(config: &Config, driver: ProcessDriver) -> Result<Self, LinkError> {
        decant_network::ensure_worker(decant_network::worker_prefix(config.network, config.worker_index))?;
        for peer in &config.peers {
            let IpAddr::V6(via) = peer.address.ip() else {
                // Machines' addresses are IPv6; a peer that has none is reached, its machines by their proxies are not.
                tracing::warn!(worker = %peer.worker, address = %peer.address, "no route to this peer's machines: its address is not IPv6");
                continue;
            };
            decant_network::ensure_route(decant_network::worker_prefix(config.network, peer.worker_index), via)?;
        }
        Ok(Self { driver, run_dir: config.run_dir.clone(), network: config.network, worker_index: config.worker_index })
    }

    fn link(&self, machine: &MachineId, index: u32) -> MachineLink {
        let address = MachineAddress { network: self.network, worker: self.worker_index, machine: index };
        MachineLink::new(&self.run_dir, machine, address)
    }
}

impl Machines for Processes {
    fn prepare(&self, spec: &MachineSpec, epoch: Epoch, program: Option<&str>) -> Result<(), Failure> {
        // What a finished shim of an earlier claim left is no obstacle; a running one of another claim is killed, because
        // the row says that this claim is the one.
        let status = self.driver.status(&spec.id).map_err(failure)?;
        if status.as_ref().is_some_and(|status| status.epoch != epoch) {
            self.driver.kill(&spec.id, STOP_PATIENCE).map_err(failure)?;
        }
        let link = self.link(&spec.id, spec.address_index);
        if status.is_none_or(|status| status.epoch != epoch || status.state == State::Stopped) {
            decant_network::ensure_machine_link(&link).map_err(link_failure)?;
        }
        let request = Prepare { spec, netns: &link.netns, epoch, program_digest: program };
        match self.driver.prepare(&request) {
            Ok(_) => Ok(()),
            Err(MachineError::Conflict { .. }) => {
                self.driver.kill(&spec.id, STOP_PATIENCE).map_err(failure)?;
                self.driver.prepare(&request).map(drop).map_err(failure)
            }
            Err(error) => Err(failure(error)),
        }
    }

    fn program(&self, spec: &MachineSpec) -> Result<String, Failure> {
        self.driver.started_from(spec).map_err(failure)
    }

    fn start(&self, spec: &MachineSpec, epoch: Epoch, device: Option<&Path>) -> Result<(), Failure> {
        if !self.driver.is_on(&spec.id, device) {
            // What its shim still runs, or starts again and again, writes to a disk that is gone.
            self.driver.kill(&spec.id, STOP_PATIENCE).map_err(failure)?;
        }
        let ready = self.driver.status(&spec.id).map_err(failure)?.is_some_and(|status| {
            status.epoch == epoch && matches!(status.state, State::Waiting | State::Running | State::Restarting)
        });
        if !ready {
            self.prepare(spec, epoch, None)?;
        }
        self.driver.start(&spec.id, device).map(drop).map_err(failure)
    }

    fn stop(&self, machine: &MachineId) -> Result<(), Failure> {
        self.driver.stop(machine, STOP_PATIENCE).map(drop).map_err(failure)
    }

    fn kill(&self, machine: &MachineId) -> Result<(), Failure> {
        self.driver.kill(machine, STOP_PATIENCE).map(drop).map_err(failure)
    }

    fn trim(&self, machine: &MachineId) -> Result<(), Failure> {
        self.driver.trim(machine).map(drop).map_err(failure)
    }

    fn discard(&self, machine: &MachineId, address_index: Option<u32>) -> Result<(), Failure> {
        self.driver.kill(machine, STOP_PATIENCE).map_err(failure)?;
        self.driver.remove(machine, false).map_err(failure)?;
        let Some(index) = address_index else { return Ok(()) };
        decant_network::remove_machine_link(&self.link(machine, index)).map_err(link_failure)
    }

    fn status(&self, machine: &MachineId) -> Result<Option<Status>, Failure> {
        self.driver.status(machine).map_err(failure)
    }

    fn survivors(&self) -> Result<Vec<(MachineId, Option<Epoch>)>, Failure> {
        let list = self.driver.survivors().map_err(|error| Failure {
            code: FailureCode::Stuck,
            message: format!("cannot list the machines that run here: {error}; look at run_dir/machines"),
        })?;
        Ok(list.into_iter().map(|survivor| (survivor.machine, survivor.status.map(|status| status.epoch))).collect())
    }

    fn wait_healthy(&self, spec: &MachineSpec, address: Ipv6Addr, patience: Duration) -> Result<(), Failure> {
        let Some(check) = &spec.health else { return Ok(()) };
        self.driver.wait_healthy(&spec.id, check, address, patience).map_err(failure)
    }

    fn logs(&self, machine: &MachineId, lines: usize) -> Result<String, Failure> {
        tail(&self.driver.log_path(machine), lines).map_err(|error| Failure {
            code: FailureCode::Retry,
            message: format!("cannot read the log of {machine}: {error}"),
        })
    }
}

/// The last `lines` lines of a file, at most [`LOG_BYTES`]; nothing if there is none.
fn tail(path: &Path, lines: usize) -> std::io::Result<String> {
    use std::io::{Read as _, Seek as _, SeekFrom};
    let mut file = match std::fs::File::open(path) {
        Ok(file) => file,
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(String::new()),
        Err(error) => return Err(error),
    };
    let length = file.metadata()?.len();
    file.seek(SeekFrom::Start(length.saturating_sub(LOG_BYTES)))?;
    let mut bytes = Vec::new();
    file.take(LOG_BYTES).read_to_end(&mut bytes)?;
    let text = String::from_utf8_lossy(&bytes);
    let skip = text.lines().count().saturating_sub(lines);
    Ok(text.lines().skip(skip).flat_map(|line| [line, "\n"]).collect())
}

/// What a driver's error means for the step that caused it.
fn failure(error: MachineError) -> Failure {
    let code = match &error {
        MachineError::Unfit { .. } => FailureCode::Refused,
        // What its program wrote last is not on the medium: no retry brings it back.
        MachineError::Unclean { .. } => FailureCode::Stuck,
        // Whatever else there is may pass; a deadline of the step that wanted it ends the trying.
        _ => FailureCode::Retry,
    };
    Failure { code, message: error.to_string() }
}

fn link_failure(error: LinkError) -> Failure {
    Failure {
        code: FailureCode::Retry,
        message: format!("{error}; the agent needs CAP_NET_ADMIN in its network namespace"),
    }
}

#[cfg(test)]
mod tests {
    #[test]
    fn a_tail_is_whole_lines() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("log");
        assert_eq!(super::tail(&path, 3).expect("no file is no log"), "");
        std::fs::write(&path, b"one\ntwo\nthree\n\xff\n").expect("written");
        assert_eq!(super::tail(&path, 2).expect("read"), "three\n\u{fffd}\n");
        assert_eq!(super::tail(&path, 99).expect("read").lines().count(), 4);
    }
}
