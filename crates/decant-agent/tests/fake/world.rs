//! The fake planes and drivers, and the oracle outside the product.

use std::collections::HashMap;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::time::Duration;

use decant_agent::Machines;
use decant_base::{Bytes, Epoch, ExtentSet, MachineId, VolumeId};
use decant_dataplane::{
    Access, CloneStatus, Command, Failure, FailureCode, Geometry, Origin, Outcome, Plane, Promises, Seal, Verification,
    VolumeState, VolumeStatus,
};
use decant_machine::{MachineSpec, State, Status};

/// A call that the world does not answer until it is let go.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hold {
    /// On which worker.
    pub(crate) worker: String,
    /// Which call, counted from 0 on each worker; `None` takes the first whose name is `name`.
    pub(crate) call: Option<usize>,
    /// Its name; empty matches any.
    pub(crate) name: String,
    /// Held after its work was done, else before, and then it is not done at all.
    pub(crate) done: bool,
}

#[derive(Default)]
struct Volume {
    number: u64,
    state: Option<VolumeState>,
    source: Option<String>,
    polls: u32,
    epoch: Epoch,
}

#[derive(Default)]
struct Site {
    volumes: HashMap<VolumeId, Volume>,
    machines: HashMap<MachineId, (Epoch, bool, Option<VolumeId>)>,
    calls: Vec<String>,
}

#[derive(Default)]
struct Inner {
    sites: HashMap<String, Site>,
    /// The highest number that a machine was told is safe.
    acknowledged: HashMap<MachineId, u64>,
    violations: Vec<String>,
    /// Programs of workers that have another one than the rest.
    programs: HashMap<String, String>,
    /// No clone gets whole any more.
    stalled: bool,
    /// The call that fails, on every worker, and how.
    fails: Option<(String, FailureCode)>,
    hold: Option<Hold>,
    held: bool,
}

impl Inner {
    fn program(&self, worker: &str) -> String {
        self.programs.get(worker).cloned().unwrap_or_else(|| "01".to_owned())
    }
}

/// All workers' planes and drivers.
#[derive(Default)]
pub(crate) struct World {
    inner: Mutex<Inner>,
    changed: Condvar,
}

impl World {
    fn lock(&self) -> MutexGuard<'_, Inner> {
        self.inner.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Holds the first call that fits.
    pub(crate) fn hold(&self, hold: Hold) {
        let mut inner = self.lock();
        (inner.hold, inner.held) = (Some(hold), false);
    }

    /// Whether a call is held.
    pub(crate) fn is_held(&self) -> bool {
        self.lock().held
    }

    /// Lets a held call go.
    pub(crate) fn release(&self) {
        let mut inner = self.lock();
        (inner.hold, inner.held) = (None, false);
        self.changed.notify_all();
    }

    /// The calls of `worker` so far.
    pub(crate) fn calls(&self, worker: &str) -> Vec<String> {
        self.lock().sites.get(worker).map(|site| site.calls.clone()).unwrap_or_default()
    }

    /// Where the machine runs.
    pub(crate) fn runners(&self, machine: &MachineId) -> Vec<String> {
        let inner = self.lock();
        let runs = |site: &Site| site.machines.get(machine).is_some_and(|(_, running, _)| *running);
        inner.sites.iter().filter(|(_, site)| runs(site)).map(|(worker, _)| worker.clone()).collect()
    }

    /// A machine that was left behind by an agent that died: it runs, and no row owns it.
    pub(crate) fn leave_behind(&self, worker: &str, machine: &MachineId) {
        let mut inner = self.lock();
        let site = inner.sites.entry(worker.to_owned()).or_default();
        site.machines.insert(machine.clone(), (Epoch(99), true, None));
    }

    /// The machine ends without having been told to.
    pub(crate) fn lose(&self, worker: &str, machine: &MachineId) {
        self.lock().sites.entry(worker.to_owned()).or_default().machines.remove(machine);
    }

    /// No clone gets whole from now on, or all do again.
    pub(crate) fn stall(&self, stalled: bool) {
        self.lock().stalled = stalled;
    }

    /// Calls of this name fail from now on, or none.
    pub(crate) fn fail(&self, call: Option<(&str, FailureCode)>) {
        self.lock().fails = call.map(|(name, code)| (name.to_owned(), code));
    }

    /// The worker's programs are replaced by others.
    pub(crate) fn upgrade(&self, worker: &str, program: &str) {
        self.lock().programs.insert(worker.to_owned(), program.to_owned());
    }

    /// What must never happen, and did.
    pub(crate) fn violations(&self) -> Vec<String> {
        self.lock().violations.clone()
    }

    /// Counts a call, and holds it if it is the one.
    fn call<T>(
        &self,
        worker: &str,
        name: &str,
        work: impl FnOnce(&mut Inner) -> Result<T, Failure>,
    ) -> Result<T, Failure> {
        let mut inner = self.lock();
        let site = inner.sites.entry(worker.to_owned()).or_default();
        let index = site.calls.len();
        site.calls.push(name.to_owned());
        if let Some((_, code)) = inner.fails.as_ref().filter(|(failing, _)| failing == name) {
            return Err(failure(*code, "it does not work"));
        }
        let fits = |hold: &Hold| {
            hold.worker == worker
                && hold.call.is_none_or(|call| call == index)
                && (hold.name.is_empty() || hold.name == name)
        };
        let Some(hold) = inner.hold.clone().filter(|hold| !inner.held && fits(hold)) else { return work(&mut inner) };
        let result = hold.done.then(|| work(&mut inner));
        inner.held = true;
        self.changed.notify_all();
        let _inner = self.changed.wait_while(inner, |inner| inner.held).expect("not poisoned");
        result.unwrap_or_else(|| Err(failure(FailureCode::Retry, "the agent died before it was done")))
    }
}

fn failure(code: FailureCode, message: &str) -> Failure {
    Failure { code, message: message.to_owned() }
}

fn geometry() -> Geometry {
    Geometry {
        size: Bytes::mib(64),
        sector_size: 4096,
        cipher: "aes-xts-plain64".to_owned(),
        key_bytes: 64,
        iv_tweak: 0,
    }
}

fn device(worker: &str, volume: &VolumeId) -> PathBuf {
    PathBuf::from(format!("/dev/fake/{worker}/{volume}"))
}

/// One worker's plane.
pub(crate) struct FakePlane {
    pub(crate) world: Arc<World>,
    pub(crate) worker: String,
}

impl Plane for FakePlane {
    fn perform(&self, command: &Command) -> Result<Outcome, Failure> {
        if let Command::Status { volume } = command {
            return self.status(volume);
        }
        let json = serde_json::to_value(command).expect("JSON");
        let name = json["command"].as_str().expect("a tag").to_owned();
        self.world.call(&self.worker, &name, |inner| perform(inner, &self.worker, command))
    }

    fn volumes(&self) -> Result<Vec<VolumeId>, Failure> {
        let inner = self.world.lock();
        Ok(inner.sites.get(&self.worker).map(|site| site.volumes.keys().cloned().collect()).unwrap_or_default())
    }

    fn promises(&self) -> Promises {
        Promises { reads_are_kept: true, writes_never_wait: true, verifies_from_medium: true }
    }
}

impl FakePlane {
    fn status(&self, volume: &VolumeId) -> Result<Outcome, Failure> {
        let inner = self.world.lock();
        let found = inner.sites.get(&self.worker).and_then(|site| site.volumes.get(volume));
        let found = found.ok_or_else(|| failure(FailureCode::Refused, "no such volume"))?;
        let state = found.state.unwrap_or(VolumeState::Detached);
        let missing = u64::from(3u32.saturating_sub(found.polls).max(u32::from(inner.stalled))) << 20;
        let is_there = matches!(state, VolumeState::Attached | VolumeState::Hydrating | VolumeState::Prepared);
        Ok(Outcome::Status(Box::new(VolumeStatus {
            volume: volume.clone(),
            state,
            geometry: geometry(),
            header_bytes: Bytes::mib(4),
            allocated: Bytes::mib(3),
            epoch: found.epoch,
            device: is_there.then(|| device(&self.worker, volume)),
            clone: (state == VolumeState::Hydrating).then(|| CloneStatus {
                bytes_total: 3 << 20,
                bytes_missing: missing,
                rate_bytes_per_s: 1 << 20,
                connected: true,
                ..CloneStatus::default()
            }),
            failed: None,
        })))
    }
}

fn perform(inner: &mut Inner, worker: &str, command: &Command) -> Result<Outcome, Failure> {
    let volume = command.volume().clone();
    let stalled = inner.stalled;
    let open = inner
        .sites
        .entry(worker.to_owned())
        .or_default()
        .machines
        .values()
        .any(|(_, runs, of)| *runs && of.as_ref() == Some(&volume));
    let from = match command {
        Command::Begin { origin, .. } => Some(origin.export.clone()),
        _ => None,
    };
    let sealed =
        from.as_ref().and_then(|from| inner.sites.get(from)?.volumes.get(&volume)).map(|v| (v.state, v.number));
    let volumes = &mut inner.sites.entry(worker.to_owned()).or_default().volumes;
    let refused = || failure(FailureCode::Refused, "no such volume");
    match command {
        Command::Create { .. } => drop(volumes.entry(volume).or_default().state.get_or_insert(VolumeState::Detached)),
        Command::Delete { .. } => drop(volumes.remove(&volume)),
        Command::Prepare { .. } => drop(volumes.entry(volume).or_default().state.get_or_insert(VolumeState::Prepared)),
        Command::Abandon { .. } => {
            if volumes.get(&volume).is_some_and(|v| v.state == Some(VolumeState::Prepared)) {
                volumes.remove(&volume);
            }
        }
        Command::Attach { .. } | Command::Assemble { .. } | Command::Begin { .. } => {
            let found = volumes.get_mut(&volume).ok_or_else(refused)?;
            if matches!(found.state, Some(VolumeState::Sealed | VolumeState::Freed)) {
                return Err(failure(FailureCode::Refused, "it is sealed"));
            }
            match (command, found.state) {
                (Command::Begin { epoch, .. }, Some(VolumeState::Prepared)) => {
                    let Some((Some(VolumeState::Sealed), number)) = sealed else {
                        inner.violations.push(format!("{worker} begins {volume}, which is not sealed at {from:?}"));
                        return Err(failure(FailureCode::Stuck, "not sealed"));
                    };
                    (found.number, found.epoch, found.source, found.state) =
                        (number, *epoch, from, Some(VolumeState::Hydrating));
                }
                (Command::Attach { .. }, Some(VolumeState::Detached)) => found.state = Some(VolumeState::Attached),
                _ => {}
            }
            return Ok(Outcome::Attached { device: device(worker, &volume) });
        }
        Command::Detach { .. } => {
            if let Some(found) = volumes.get_mut(&volume).filter(|v| v.state == Some(VolumeState::Attached)) {
                found.state = Some(VolumeState::Detached);
            }
        }
        Command::OpenExport { .. } => {
            volumes.get(&volume).ok_or_else(refused)?;
            return Ok(Outcome::ExportOpened {
                origin: Origin {
                    address: ([127, 0, 0, 1], 9).into(),
                    export: worker.to_owned(),
                    access: Access::Nbd { certificate: "00".to_owned() },
                },
                geometry: geometry(),
                header: "aGVhZGVy".to_owned(),
                room: Bytes::mib(3),
            });
        }
        Command::Seal { .. } => {
            if open {
                return Err(failure(FailureCode::Retry, "it is open"));
            }
            volumes.get_mut(&volume).ok_or_else(refused)?.state = Some(VolumeState::Sealed);
            let mut live = ExtentSet::new();
            live.insert(0..768);
            return Ok(Outcome::Sealed(Seal { live, header_digest: "00".to_owned() }));
        }
        Command::CloseExport { .. } => {
            if let Some(found) = volumes.get_mut(&volume).filter(|v| v.state == Some(VolumeState::Sealed)) {
                found.state = Some(VolumeState::Detached);
            }
        }
        Command::Verify { .. } => {
            let found = volumes.get_mut(&volume).ok_or_else(refused)?;
            found.polls += 1;
            if found.polls < 3 || stalled {
                return Err(failure(FailureCode::NotYet, "blocks are missing"));
            }
            found.state = Some(VolumeState::Attached);
            return Ok(Outcome::Verified(Verification { compared: 768, ..Verification::default() }));
        }
        Command::Free { .. } => {
            if let Some(found) = volumes.get_mut(&volume) {
                found.state = Some(VolumeState::Freed);
            }
        }
        Command::Limit { .. } | Command::Policy { .. } | Command::Status { .. } => {}
    }
    Ok(Outcome::Done)
}

/// One worker's driver.
pub(crate) struct FakeMachines {
    pub(crate) world: Arc<World>,
    pub(crate) worker: String,
}

impl FakeMachines {
    fn end(&self, name: &str, machine: &MachineId) -> Result<(), Failure> {
        self.world.call(&self.worker, name, |inner| {
            inner.sites.entry(self.worker.clone()).or_default().machines.remove(machine);
            Ok(())
        })
    }
}

impl Machines for FakeMachines {
    fn prepare(&self, spec: &MachineSpec, epoch: Epoch, program: Option<&str>) -> Result<(), Failure> {
        self.world.call(&self.worker, "machine prepare", |inner| {
            if program.is_some_and(|program| program != inner.program(&self.worker)) {
                return Err(failure(FailureCode::Refused, "its program /bin/true is another one than where it runs"));
            }
            let machines = &mut inner.sites.entry(self.worker.clone()).or_default().machines;
            machines.entry(spec.id.clone()).or_insert((epoch, false, spec.volume.clone()));
            Ok(())
        })
    }

    fn program(&self, _: &MachineSpec) -> Result<String, Failure> {
        Ok(self.world.lock().program(&self.worker))
    }

    fn start(&self, spec: &MachineSpec, epoch: Epoch, device: Option<&Path>) -> Result<(), Failure> {
        self.world.call(&self.worker, "machine start", |inner| start(inner, &self.worker, spec, epoch, device))
    }

    fn stop(&self, machine: &MachineId) -> Result<(), Failure> {
        self.end("machine stop", machine)
    }

    fn kill(&self, machine: &MachineId) -> Result<(), Failure> {
        self.end("machine kill", machine)
    }

    fn trim(&self, _: &MachineId) -> Result<(), Failure> {
        self.world.call(&self.worker, "machine trim", |_| Ok(()))
    }

    fn discard(&self, machine: &MachineId, _: Option<u32>) -> Result<(), Failure> {
        self.end("machine discard", machine)
    }

    fn status(&self, machine: &MachineId) -> Result<Option<Status>, Failure> {
        let inner = self.world.lock();
        let found = inner.sites.get(&self.worker).and_then(|site| site.machines.get(machine));
        Ok(found.map(|(epoch, running, _)| Status {
            machine: machine.clone(),
            epoch: *epoch,
            state: if *running { State::Running } else { State::Waiting },
            reason: None,
            restarts: 0,
            last_exit: None,
            since_ms: 0,
            pid: None,
            unclean: false,
            timings: decant_machine::Timings::default(),
        }))
    }

    fn survivors(&self) -> Result<Vec<(MachineId, Option<Epoch>)>, Failure> {
        let inner = self.world.lock();
        let site = inner.sites.get(&self.worker);
        Ok(site
            .map(|site| site.machines.iter().map(|(id, (epoch, ..))| (id.clone(), Some(*epoch))).collect())
            .unwrap_or_default())
    }

    fn wait_healthy(&self, _: &MachineSpec, _: Ipv6Addr, _: Duration) -> Result<(), Failure> {
        Ok(())
    }

    fn logs(&self, machine: &MachineId, _: usize) -> Result<String, Failure> {
        Ok(format!("log of {machine}\n"))
    }
}

/// Starts a machine: the oracle's moment.
fn start(
    inner: &mut Inner,
    worker: &str,
    spec: &MachineSpec,
    epoch: Epoch,
    device: Option<&Path>,
) -> Result<(), Failure> {
    let machine = &spec.id;
    for (other, site) in &inner.sites {
        if other != worker && site.machines.get(machine).is_some_and(|(_, runs, _)| *runs) {
            inner.violations.push(format!("{machine} is started on {worker} while it runs on {other}"));
        }
    }
    let site = inner.sites.entry(worker.to_owned()).or_default();
    if site.machines.get(machine).is_some_and(|(at, runs, _)| *runs && *at == epoch) {
        return Ok(());
    }
    if let Some(volume) = &spec.volume {
        let found = site.volumes.get_mut(volume).ok_or_else(|| failure(FailureCode::Refused, "no volume"))?;
        if device.is_none() || !matches!(found.state, Some(VolumeState::Attached | VolumeState::Hydrating)) {
            return Err(failure(FailureCode::Retry, "its device is not there"));
        }
        let safe = inner.acknowledged.entry(machine.clone()).or_default();
        if found.number < *safe {
            inner.violations.push(format!("{machine} on {worker} sees {} of {safe} writes", found.number));
        }
        found.number += 1;
        *safe = (*safe).max(found.number);
    }
    site.machines.insert(machine.clone(), (epoch, true, spec.volume.clone()));
    Ok(())
}
