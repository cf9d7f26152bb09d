//! What a person sees of a migration and of a drain.

use decant_base::{Bytes, Epoch, MachineId, MigrationId, WorkerId};
use serde::{Deserialize, Serialize};

use crate::migration::Phase;
use crate::wait::Wait;

/// A range that the end is expected in, milliseconds from now; both ends unknown when nothing moves.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Eta {
    /// If it goes on as in its best recent seconds.
    pub earliest_ms: Option<u64>,
    /// If it goes on as in its worst.
    pub latest_ms: Option<u64>,
}

/// Up to where the data is safe if one of the two workers is destroyed now.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "at")]
pub enum RecoveryPoint {
    /// The source owns the machine and has everything.
    Source,
    /// The source's sealed copy has everything up to the seal; the destination alone has what was written since, and
    /// the source alone has what is not yet there.
    Seal {
        /// When it was sealed, milliseconds since the Unix epoch.
        sealed_ms: u64,
        /// The epoch of the sealed copy.
        epoch: Epoch,
    },
    /// The destination has everything.
    Destination,
}

/// How far one migration is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Progress {
    /// Which machine.
    pub machine: MachineId,
    /// Which migration.
    pub migration: MigrationId,
    /// From.
    pub source: WorkerId,
    /// To.
    pub destination: WorkerId,
    /// The step.
    pub phase: Phase,
    /// Bytes that were live at the seal.
    pub bytes_live: Bytes,
    /// Of these, at the destination or written or discarded there.
    pub bytes_done: Bytes,
    /// Bytes per second over the last seconds.
    pub rate: Bytes,
    /// When it will be done.
    pub eta: Eta,
    /// Bytes that exist only at the source.
    pub exposure: Bytes,
    /// SLOW, THROTTLED, STALLED, or why else it does not go on; empty when it does.
    pub hindrance: String,
    /// What it waits for.
    pub wait: Option<Wait>,
    /// What survives.
    pub recovery_point: RecoveryPoint,
}
