//! Drains.

use decant_base::{Bytes, DrainId, MachineId, MigrationId, WorkerId};
use decant_dataplane::Protocol;
use serde::{Deserialize, Serialize};

use crate::{Eta, MigrationPhase, Why};

/// Empties workers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateDrain {
    /// Its id, so that a repeated request does not start a second one; chosen if absent.
    #[serde(default)]
    pub drain: Option<DrainId>,
    /// Which; all are cordoned before anything moves.
    pub workers: Vec<WorkerId>,
    /// Only plan: nothing is cordoned, nothing moves, the answer has phase `planned`.
    #[serde(default)]
    pub plan_only: bool,
    /// Only to this worker; `None` allows all that are not cordoned.
    #[serde(default)]
    pub to: Option<WorkerId>,
    /// Machines that can move do so even if others are blocked.
    #[serde(default)]
    pub partial: bool,
    /// Machines moving at the same time, at least 1; the configured number if absent.
    #[serde(default)]
    pub max: Option<u32>,
    /// Why, for the event log and whoever finds the worker cordoned.
    #[serde(default)]
    pub reason: String,
    /// After this long without being drained it starts no more moves, takes back those that are not past their commit point,
    /// and ends as `deadline`.
    #[serde(default)]
    pub deadline_ms: Option<u64>,
    /// What the volumes travel over.
    #[serde(default)]
    pub protocol: Protocol,
    /// Destinations need not have the very program that a machine was started from.
    #[serde(default)]
    pub any_program: bool,
}

/// Live settings of a drain. Absent fields stay as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DrainSettings {
    /// Machines of each worker moving at the same time, at least 1.
    #[serde(default)]
    pub max: Option<u32>,
}

/// A drain and its plan.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Drain {
    /// Which.
    pub drain: DrainId,
    /// The workers it empties.
    pub workers: Vec<WorkerId>,
    /// Why.
    pub reason: String,
    /// How far it is.
    pub phase: DrainPhase,
    /// Machines of each worker moving at the same time.
    #[serde(default)]
    pub max: u32,
    /// When it was ordered.
    pub started_at_ms: u64,
    /// Until nothing ran on the workers any more.
    #[serde(default)]
    pub evacuated_ms: Option<u64>,
    /// Until nothing read from them any more.
    #[serde(default)]
    pub drained_ms: Option<u64>,
    /// When the deadline strikes.
    #[serde(default)]
    pub deadline_at_ms: Option<u64>,
    /// Every machine of the workers.
    pub machines: Vec<DrainMachine>,
    /// What keeps it from starting or ending.
    #[serde(default)]
    pub blockers: Vec<Blocker>,
    /// Sum of the machines' live bytes.
    #[serde(default)]
    pub bytes_total: u64,
    /// Sum of what is local at their destinations.
    #[serde(default)]
    pub bytes_done: u64,
    /// Sum of the exposures.
    #[serde(default)]
    pub exposure_bytes: u64,
    /// Sum of the rates.
    #[serde(default)]
    pub rate_bytes_per_s: u64,
    /// Until DRAINED.
    #[serde(default)]
    pub eta: Option<Eta>,
}

/// The states of a drain.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainPhase {
    /// A plan; nothing was touched.
    Planned,
    /// Machines move.
    Moving,
    /// No machine is left, but the workers still serve blocks: do not power off.
    Evacuated,
    /// Safe to power off.
    Drained,
    /// It cannot go on; the blockers say why.
    Blocked,
    /// Being cancelled.
    Cancelling,
    /// Cancelled: machines that had been handed over stay where they are.
    Cancelled,
    /// The deadline passed first.
    Deadline,
}

impl DrainPhase {
    /// Whether nothing more happens by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Planned | Self::Drained | Self::Cancelled | Self::Deadline)
    }
}

/// One machine of a drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DrainMachine {
    /// Which.
    pub machine: MachineId,
    /// The move it is in or was in last, with its plan.
    pub planned: Option<PlannedMove>,
    /// Its migration, once started.
    #[serde(default)]
    pub migration: Option<MigrationId>,
    /// How far that is.
    #[serde(default)]
    pub phase: Option<MigrationPhase>,
    /// Live bytes that have to become local.
    #[serde(default)]
    pub bytes_total: u64,
    /// Local by now.
    #[serde(default)]
    pub bytes_done: u64,
    /// Only at the source.
    #[serde(default)]
    pub exposure_bytes: u64,
    /// Over the last few seconds.
    #[serde(default)]
    pub rate_bytes_per_s: u64,
    /// What it waits for.
    #[serde(default)]
    pub why: Option<Why>,
}

/// Where a machine is to go.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedMove {
    /// From.
    pub source: WorkerId,
    /// To.
    pub destination: WorkerId,
    /// Allocated bytes of its volume, the most that has to move.
    pub bytes: Bytes,
    /// How long that takes, alone on its link.
    #[serde(default)]
    pub eta: Option<Eta>,
}

/// Why something cannot move.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Blocker {
    /// The machine; absent if the whole worker is meant.
    #[serde(default)]
    pub machine: Option<MachineId>,
    /// Where it is.
    pub worker: WorkerId,
    /// What blocks, in a few words.
    pub name: String,
    /// Why.
    pub cause: String,
    /// What the reader can do about it.
    pub fix: String,
}
