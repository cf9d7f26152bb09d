//! Volumes.

use decant_base::{Bytes, MachineId, MigrationId, VolumeId, WorkerId};
use decant_dataplane::VolumeStatus;
use serde::{Deserialize, Serialize};

/// Makes an encrypted volume on the worker asked.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct CreateVolume {
    /// Its id.
    pub volume: VolumeId,
    /// Payload bytes, a multiple of 4096, at least 16 MiB.
    pub size: Bytes,
    /// Logical sector size, 512 or 4096; fixed for the volume's life.
    #[serde(default = "four_kib")]
    pub sector_size: u32,
}

fn four_kib() -> u32 {
    4096
}

/// One volume on one worker. A volume that moved is there twice until its sealed copy is freed.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Volume {
    /// Which.
    pub volume: VolumeId,
    /// Where this copy is.
    pub worker: WorkerId,
    /// The machine it belongs to.
    #[serde(default)]
    pub machine: Option<MachineId>,
    /// How the data plane sees it; absent while it does not answer within its time.
    #[serde(default)]
    pub status: Option<VolumeStatus>,
    /// Set on a copy that was handed over.
    #[serde(default)]
    pub sealed: Option<SealedCopy>,
    /// Why there is no status, or what is wrong with the volume.
    #[serde(default)]
    pub problem: Option<String>,
}

/// A copy whose machine runs elsewhere. It is written by nobody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct SealedCopy {
    /// The move that sealed it.
    pub migration: MigrationId,
    /// Who took the machine.
    pub destination: WorkerId,
    /// When it was sealed: the state of the machine's data that this copy can bring back.
    pub sealed_at_ms: u64,
    /// Bytes allocated for its payload.
    pub size: Bytes,
    /// When its payload is discarded. `None` while the destination still needs it.
    #[serde(default)]
    pub expires_at_ms: Option<u64>,
}
