//! Where each machine of a drained worker goes, what that costs, and everything that stands in the way.

use std::collections::BTreeMap;

use decant_base::{Bytes, MachineId, WorkerId};
use serde::{Deserialize, Serialize};

use crate::progress::Eta;

/// What is known of the fleet when a plan is made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fleet {
    /// Every worker that is configured, the drained one too.
    pub workers: Vec<WorkerFacts>,
    /// Every machine of the workers that answered.
    pub machines: Vec<MachineFacts>,
    /// Bytes per second that a link carried lately, lowest and highest; 0 if not known.
    pub rate: (Bytes, Bytes),
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerFacts {
    /// Which.
    pub worker: WorkerId,
    /// Why it cannot be asked; empty if it answered.
    pub unreachable: String,
    /// Whether it takes no new machines.
    pub cordoned: bool,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Machines it may hold.
    pub machines_max: u32,
    /// Bytes free for volumes.
    pub bytes_free: Bytes,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// Which.
    pub machine: MachineId,
    /// Its owner.
    pub worker: WorkerId,
    /// Machines of one group are kept apart and moved one at a time.
    pub group: Option<String>,
    /// Labels that its worker must have.
    pub needs: BTreeMap<String, String>,
    /// Bytes allocated for its volume; 0 if it has none.
    pub bytes: Bytes,
    /// Why it cannot be moved now; empty if it can.
    pub immovable: String,
    /// What clears that; empty if nothing is wrong.
    pub fix: String,
}

/// One move of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlannedMove {
    /// Which machine.
    pub machine: MachineId,
    /// From.
    pub from: WorkerId,
    /// To.
    pub to: WorkerId,
    /// Its group.
    pub group: Option<String>,
    /// Bytes to move at most.
    pub bytes: Bytes,
    /// How long alone on the link.
    pub eta: Eta,
}

/// Something that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Blocker {
    /// Whose; `None` if it concerns the drain as a whole.
    pub machine: Option<MachineId>,
    /// A stable word: `no-place`, `immovable`, `unreachable`, `unknown-worker`, `self`.
    pub code: String,
    /// Cause, each candidate with its reason.
    pub reason: String,
    /// What to do.
    pub fix: String,
}

/// A plan. It can be carried out in full if there are no blockers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Plan {
    /// In the order they will start.
    pub moves: Vec<PlannedMove>,
    /// All of them, not only the first.
    pub blockers: Vec<Blocker>,
    /// Bytes to move at most.
    pub bytes: Bytes,
    /// When it will be done.
    pub eta: Eta,
}

/// What a plan must respect besides the fleet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wishes {
    /// The worker to empty.
    pub worker: WorkerIdList,
    /// The one destination, if the operator named it.
    pub to: Option<WorkerId>,
    /// Machines at once.
    pub max: u32,
}

/// Workers by name.
pub type WorkerIdList = Vec<WorkerId>;

/// Makes a plan.
pub fn plan(fleet: &Fleet, wishes: &Wishes) -> Plan {
    let _ = (fleet, wishes);
    Plan::default()
}
