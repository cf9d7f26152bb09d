//! Lanes: one thread per machine that has something to do. Effects of one machine are performed in order, those of
//! different machines beside each other; a command that hangs holds up its own lane alone.

use std::collections::{HashMap, VecDeque};
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::RecvTimeoutError;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use decant_base::{Epoch, MachineId, VolumeId};
use decant_dataplane::{Command, Failure, FailureCode, MissingPolicy, Outcome, Plane};
use decant_drain::{Effect, Event, MachineCommand};
use decant_machine::MachineSpec;

use crate::core::{Core, Input};
use crate::machines::Machines;

/// A lane with nothing to do ends after this long; starting another costs some ten microseconds.
const IDLE: Duration = Duration::from_secs(20);

/// Between two tries to kill a survivor. What refuses to die (it waits for a disk, say) tells nobody when it does.
const KILL_AGAIN: Duration = Duration::from_secs(1);

/// How often a stop that takes longer is looked after.
const LOOK: Duration = Duration::from_millis(500);

/// Who does the work.
#[derive(Clone)]
pub(crate) struct World {
    pub(crate) plane: Arc<dyn Plane>,
    pub(crate) machines: Arc<dyn Machines>,
    pub(crate) locks: Arc<VolumeLocks>,
}

/// At most one command per volume at a time, whoever gives it.
#[derive(Debug, Default)]
pub(crate) struct VolumeLocks {
    locks: Mutex<HashMap<VolumeId, Arc<Mutex<()>>>>,
}

impl VolumeLocks {
    /// Runs `work` while nobody else works on `volume`. Blocks.
    pub(crate) fn with<T>(&self, volume: &VolumeId, work: impl FnOnce() -> T) -> T {
        let lock = self.locks.lock().unwrap_or_else(PoisonError::into_inner).entry(volume.clone()).or_default().clone();
        let _guard = lock.lock().unwrap_or_else(PoisonError::into_inner);
        work()
    }
}

impl World {
    /// Performs a plane's command, alone on its volume. Blocks.
    pub(crate) fn perform(&self, command: &Command) -> Result<Outcome, Failure> {
        self.locks.with(command.volume(), || guarded(|| self.plane.perform(command)))
    }

    fn perform_machine(&self, command: &MachineCommand, about: &About) -> Result<(), Failure> {
        guarded(|| match command {
            MachineCommand::Prepare { spec, program, .. } => {
                self.machines.prepare(&read_spec(spec)?, about.claim, program.as_deref())
            }
            MachineCommand::Start { epoch, spec, device, .. } => {
                self.machines.start(&read_spec(spec)?, *epoch, device.as_deref())
            }
            MachineCommand::Stop { machine } => {
                self.with_reads_let_go(about.volume.as_ref(), || self.machines.stop(machine))
            }
            MachineCommand::Trim { machine } => self.machines.trim(machine),
            MachineCommand::Discard { machine } => self.machines.discard(machine, about.address_index),
        })
    }
}

impl World {
    /// Runs `stop`; while it does, reads that wait for an origin that is away fail: a process that waits in one cannot be
    /// killed, and its machine could not be stopped before the origin is back.
    fn with_reads_let_go(
        &self,
        volume: Option<&VolumeId>,
        stop: impl FnOnce() -> Result<(), Failure>,
    ) -> Result<(), Failure> {
        let Some(volume) = volume else { return stop() };
        let (done, wait) = std::sync::mpsc::channel::<()>();
        std::thread::scope(|scope| {
            scope.spawn(move || {
                let policy = |policy| self.plane.perform(&Command::Policy { volume: volume.clone(), policy });
                let mut let_go = false;
                // The first look comes late enough not to disturb a stop that is as quick as it should be.
                while wait.recv_timeout(LOOK).is_err_and(|error| error == RecvTimeoutError::Timeout) {
                    if !let_go && self.has_stranded_reads(volume) {
                        tracing::warn!(%volume, "reads wait for an origin that is away: they fail, so that the machine can stop");
                        let_go = policy(MissingPolicy::Eio).is_ok();
                    }
                }
                // Reads could only wait because the policy was to wait.
                if let_go && let Err(failure) = policy(MissingPolicy::Wait) {
                    tracing::error!(%volume, %failure, "reads of missing blocks still fail; set the migration's policy to wait");
                }
            });
            let result = stop();
            drop(done);
            result
        })
    }

    fn has_stranded_reads(&self, volume: &VolumeId) -> bool {
        match self.plane.perform(&Command::Status { volume: volume.clone() }) {
            Ok(Outcome::Status(status)) => status.clone.is_some_and(|clone| clone.parked_reads > 0 && !clone.connected),
            _ => false,
        }
    }
}

/// A specification as it came from a peer or from the journal.
pub(crate) fn read_spec(spec: &serde_json::Value) -> Result<MachineSpec, Failure> {
    serde_json::from_value(spec.clone()).map_err(|error| Failure {
        code: FailureCode::Refused,
        message: format!(
            "the machine's specification is not understood here: {error}; run the same version on both workers"
        ),
    })
}

/// A bug in a command must not end its lane silently: the machine would hang without a reason.
fn guarded<T>(work: impl FnOnce() -> Result<T, Failure>) -> Result<T, Failure> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<String>().cloned();
        let text = text.or_else(|| panic.downcast_ref::<&str>().map(|text| (*text).to_owned())).unwrap_or_default();
        Err(Failure {
            code: FailureCode::Stuck,
            message: format!("a fault of the agent ({text}): report it with the agent's log"),
        })
    })
}

/// What a command does not say itself.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct About {
    /// The epoch that a machine is prepared for.
    pub(super) claim: Epoch,
    /// Its index in addresses, which names its link.
    pub(super) address_index: Option<u32>,
    /// Its volume.
    pub(super) volume: Option<VolumeId>,
}

/// Something for a lane.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Work {
    /// An effect.
    Effect { effect: Box<Effect>, about: About },
    /// A survivor that this worker does not own: killed before anything else of it is done.
    Kill,
}

/// All lanes.
pub(super) struct Lanes {
    lanes: HashMap<MachineId, Arc<Lane>>,
    world: World,
    core: Core,
}

impl Lanes {
    pub(super) fn new(world: World, core: Core) -> Self {
        Self { lanes: HashMap::new(), world, core }
    }

    /// Adds `batch` to the machine's lane, unless it is exactly what the lane has to do last: a step may be repeated while
    /// its effects are still under way.
    pub(super) fn add(&mut self, machine: &MachineId, batch: Vec<Work>) {
        if batch.is_empty() {
            return;
        }
        let lane = self.lanes.entry(machine.clone()).or_insert_with(|| Arc::new(Lane::new(machine.clone()))).clone();
        let mut queue = lane.lock();
        let skip = queue.work.len().checked_sub(batch.len()).is_some_and(|from| queue.work.range(from..).eq(&batch));
        if !skip {
            queue.work.extend(batch);
        }
        if queue.is_running {
            lane.wake.notify_one();
            return;
        }
        queue.is_running = true;
        drop(queue);
        let (world, core) = (self.world.clone(), self.core.clone());
        let name = format!("lane {}", lane.machine);
        let runner = lane.clone();
        if let Err(error) = std::thread::Builder::new().name(name).spawn(move || runner.run(&world, &core)) {
            // Out of threads: what waits in the lane is started by the next effect, at the latest by a retry's timer.
            tracing::error!(machine = %lane.machine, %error, "cannot start a thread");
            lane.lock().is_running = false;
        }
    }
}

struct Lane {
    machine: MachineId,
    queue: Mutex<Queue>,
    wake: Condvar,
}

#[derive(Default)]
struct Queue {
    /// The first one is being performed.
    work: VecDeque<Work>,
    is_running: bool,
}

impl Lane {
    fn new(machine: MachineId) -> Self {
        Self { machine, queue: Mutex::default(), wake: Condvar::new() }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn run(&self, world: &World, core: &Core) {
        while let Some(work) = self.next() {
            let input = self.perform(world, work);
            self.lock().work.pop_front();
            core.tell(input);
        }
    }

    /// The next thing to do, or the end of the lane.
    fn next(&self) -> Option<Work> {
        let mut queue = self.lock();
        loop {
            if let Some(work) = queue.work.front() {
                return Some(work.clone());
            }
            let (woken, timeout) = self.wake.wait_timeout(queue, IDLE).unwrap_or_else(PoisonError::into_inner);
            queue = woken;
            if timeout.timed_out() && queue.work.is_empty() {
                queue.is_running = false;
                return None;
            }
        }
    }

    fn perform(&self, world: &World, work: Work) -> Input {
        let machine = self.machine.clone();
        let event = match work {
            Work::Effect { effect, about } => perform_effect(world, &machine, *effect, &about),
            Work::Kill => {
                // Kept at until it is gone: nothing else of this machine may happen here before.
                while let Err(failure) = world.machines.kill(&machine) {
                    tracing::error!(%machine, %failure, "a machine runs here that this worker does not own, and cannot be killed");
                    std::thread::sleep(KILL_AGAIN);
                }
                return Input::Survivor { machine };
            }
        };
        Input::Machine { machine, event: Box::new(event), reply: None }
    }
}

/// Performs an effect; its outcome.
fn perform_effect(world: &World, machine: &MachineId, effect: Effect, about: &About) -> Event {
    match effect {
        Effect::Plane(command) => {
            let result = world.perform(&command).map(Box::new);
            if let Err(failure) = &result {
                tracing::debug!(%machine, ?command, code = ?failure.code, %failure, "plane");
            }
            Event::Plane { command: Box::new(command), result }
        }
        Effect::Machine(command) => {
            let result = world.perform_machine(&command, about);
            if let Err(failure) = &result {
                tracing::info!(%machine, code = ?failure.code, %failure, "machine");
            }
            Event::Machine { command: Box::new(command), result }
        }
        Effect::Send { .. } | Effect::Wake { .. } => unreachable!("messages and timers are no work for a lane"),
    }
}
