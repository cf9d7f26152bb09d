//! Machines.

use std::net::Ipv6Addr;

use decant_base::{DrainId, Epoch, MachineId, MigrationId, WorkerId};
use decant_dataplane::Protocol;
use decant_machine::MachineSpec;
use serde::{Deserialize, Serialize};

use crate::Why;

/// Runs a machine on the worker asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunMachine {
    /// What it is. `address_index` 0 lets the worker choose one. Its volume, if it names one, must exist on this worker.
    pub spec: MachineSpec,
}

/// Moves a machine to another worker.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MoveMachine {
    /// Where to; `None` lets the planner choose.
    #[serde(default)]
    pub to: Option<WorkerId>,
    /// The move's id, so that a repeated request does not start a second one; chosen if absent.
    #[serde(default)]
    pub migration: Option<MigrationId>,
    /// The drain that it belongs to.
    #[serde(default)]
    pub drain: Option<DrainId>,
    /// Why, for the event log.
    #[serde(default)]
    pub reason: String,
    /// What the volume travels over.
    #[serde(default)]
    pub protocol: Protocol,
    /// The destination need not have the very program that the machine was started from.
    #[serde(default)]
    pub any_program: bool,
}

/// Boots the sealed copy of a machine whose new owner is destroyed.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Reclaim {
    /// The operator's word that the destination is destroyed and will never run the machine again. Without it the request
    /// fails with `needs_force` and says what would be lost.
    #[serde(default)]
    pub force: bool,
}

/// An order that stands on the operator's word.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Force {
    /// The word. Without it the request fails with `needs_force` and says what would be given up.
    #[serde(default)]
    pub force: bool,
}

/// What came of a reclaim.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Reclaimed {
    /// The machine, which boots here now.
    pub machine: Machine,
    /// The worker whose copy was given up.
    pub given_up: WorkerId,
    /// Everything written there after this time is lost: the time of the seal.
    pub lost_since_at_ms: u64,
}

/// The last lines of a machine's output.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Logs {
    /// Whole lines, oldest first, stdout and stderr as they came; bytes that are no UTF-8 are replaced.
    pub text: String,
}

/// One machine on one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Machine {
    /// Which.
    pub machine: MachineId,
    /// The worker that answers for this row.
    pub worker: WorkerId,
    /// What it is.
    pub spec: MachineSpec,
    /// The claim's epoch.
    pub epoch: Epoch,
    /// Where it stands on this worker.
    pub state: MachineState,
    /// Its address while it is owned here.
    #[serde(default)]
    pub address: Option<Ipv6Addr>,
    /// The move it is in, or was last in.
    #[serde(default)]
    pub migration: Option<MigrationId>,
    /// Where it went, when this worker handed it over.
    #[serde(default)]
    pub moved_to: Option<WorkerId>,
    /// What could be brought back if the worker that owns it died now.
    #[serde(default)]
    pub recovery_point: Option<RecoveryPoint>,
    /// How often it was started again after it ended by itself.
    #[serde(default)]
    pub restarts: u64,
    /// How it ended last.
    #[serde(default)]
    pub exit: Option<Exit>,
    /// What it waits for.
    #[serde(default)]
    pub why: Option<Why>,
}

/// Where a machine stands on one worker.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MachineState {
    /// Owned here, being brought up.
    Starting,
    /// Owned here and running; healthy if it has a health check.
    Running,
    /// Owned here, told to stop.
    Stopping,
    /// Owned here and down, because somebody stopped it or its restart policy leaves it so.
    Stopped,
    /// Owned here, and cannot be brought up; `why` says more.
    Failed,
    /// Not yet owned here: another worker prepares to hand it over.
    Incoming,
    /// Handed over; this worker keeps a sealed copy that the new owner still reads.
    HandedOver,
    /// Gone from here; nothing reads from this worker any more.
    Released,
}

/// How a program ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Exit {
    /// Exit status, if it exited.
    #[serde(default)]
    pub status: Option<i32>,
    /// Signal, if one killed it.
    #[serde(default)]
    pub signal: Option<i32>,
}

/// What can be brought back if the worker that owns a machine dies now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum RecoveryPoint {
    /// Nothing: the volume exists only here.
    None,
    /// A sealed copy on `worker`, as of `sealed_at_ms`; what was written since would be lost.
    SealedCopy {
        /// Who has the copy.
        worker: WorkerId,
        /// When it was sealed.
        sealed_at_ms: u64,
        /// Bytes written since the seal, if known here.
        #[serde(default)]
        written_bytes: Option<u64>,
    },
    /// It has no volume, so nothing can be lost.
    Stateless,
}
