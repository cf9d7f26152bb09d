//! One row per machine and worker: the whole of what the worker durably knows of that machine.

use std::path::PathBuf;

use decant_base::{Epoch, MachineId, MigrationId, VolumeId, WorkerId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::handoff::{State, Top};
use crate::migration::Migration;
use crate::wait::Wait;

/// Whether the operator wants the machine up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Desired {
    /// Up.
    Running,
    /// Down, but kept.
    #[default]
    Stopped,
    /// Gone, with its volume.
    Removed,
}

/// How far the machine is on this worker. Knowledge, not permission: after a restart it starts at `Down` and is learned again.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Life {
    /// Not up, as far as is known; its device may be there.
    #[default]
    Down,
    /// Its device is there, it was told to start.
    Starting,
    /// Up.
    Up,
    /// Told to stop.
    Stopping,
}

/// A copy that its new owner no longer needs, kept until it expires.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct SealedCopy {
    /// Which volume.
    pub volume: VolumeId,
    /// The epoch up to which its bytes are.
    pub epoch: Epoch,
    /// Whose migration left it.
    pub migration: MigrationId,
    /// When the word came that it may go, milliseconds since the Unix epoch.
    pub released_ms: u64,
    /// When its payload is discarded.
    pub expires_ms: u64,
}

/// Where a machine went that was here: what a worker that is asked for it answers.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Went {
    /// To whom.
    pub to: WorkerId,
    /// The epoch it was granted.
    pub epoch: Epoch,
}

/// The row. Changed only by [`crate::step`]; journalled in one transaction with the event that changed it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Row {
    /// Which machine.
    pub machine: MachineId,
    /// Whose row.
    pub worker: WorkerId,
    /// The handoff record.
    pub state: State,
    /// The highest epoch taken or refused here, with its outcome.
    pub top: Top,
    /// A higher epoch that somebody else claims; while it is set, nothing boots here.
    pub veto: Option<(Epoch, WorkerId)>,
    /// The machine's specification; nothing here looks into it.
    pub spec: Option<Value>,
    /// Its volume; `None` for a stateless machine.
    pub volume: Option<VolumeId>,
    /// Up or down.
    pub desired: Desired,
    /// How far up or down it is.
    pub life: Life,
    /// The volume's block device here, while it is known to be attached.
    pub device: Option<PathBuf>,
    /// Why the machine is not as desired.
    pub wait: Option<Wait>,
    /// The migration under way, or the last one.
    pub migration: Option<Migration>,
    /// A sealed copy under retention.
    pub copy: Option<SealedCopy>,
    /// Where it went.
    pub went: Option<Went>,
}

impl Row {
    /// The row of a machine this worker knows nothing of.
    pub fn new(machine: MachineId, worker: WorkerId) -> Self {
        Self {
            machine,
            worker,
            state: State::None,
            top: Top::default(),
            veto: None,
            spec: None,
            volume: None,
            desired: Desired::Stopped,
            life: Life::Down,
            device: None,
            wait: None,
            migration: None,
            copy: None,
            went: None,
        }
    }
}
