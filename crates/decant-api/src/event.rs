//! The event log.

use decant_base::{DrainId, MachineId, MigrationId, VolumeId, WorkerId};
use serde::{Deserialize, Serialize};

/// One line of the worker's event log, numbered without gaps; a subscriber resumes with `?after=SEQUENCE`.
///
/// A line is durable with the next durable step, milliseconds to seconds later: decisions are durable before they are told of,
/// notes and intermediate steps are not. A power cut may take the last of those, and their numbers are then given again.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Event {
    /// Its number on this worker, from 1.
    pub sequence: u64,
    /// When.
    pub at_ms: u64,
    /// The worker whose log this is.
    pub worker: WorkerId,
    /// What kind, e.g. `migration.sealed`, `machine.started`, `drain.evacuated`, `worker.cordoned`.
    pub kind: String,
    /// The machine it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub machine: Option<MachineId>,
    /// The volume it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub volume: Option<VolumeId>,
    /// The migration it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub migration: Option<MigrationId>,
    /// The drain it is about.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub drain: Option<DrainId>,
    /// For people.
    pub message: String,
}
