//! Workers.

use std::collections::BTreeMap;

use decant_base::{Bytes, DrainId, WorkerId};
use serde::{Deserialize, Serialize};

/// One worker, as the agent asked sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    /// Which.
    pub worker: WorkerId,
    /// Its field of addresses.
    pub worker_index: u32,
    /// Where its agent listens for peers.
    pub address: String,
    /// Its region.
    #[serde(default)]
    pub region: String,
    /// Its labels.
    #[serde(default)]
    pub labels: BTreeMap<String, String>,
    /// Whether it takes machines and what is left of it.
    pub state: WorkerState,
    /// Why it is cordoned, as whoever did it said.
    #[serde(default)]
    pub reason: Option<String>,
    /// The drain that empties it.
    #[serde(default)]
    pub drain: Option<DrainId>,
    /// What it can hold; absent while the worker does not answer.
    #[serde(default)]
    pub capacity: Option<Capacity>,
    /// Machines that it owns.
    #[serde(default)]
    pub machines: u64,
    /// Volumes whose blocks another worker still reads from here: what keeps an evacuated worker from being switched off.
    #[serde(default)]
    pub serving: u64,
    /// Bytes that its machines own and that exist only on other workers: lost if those die now.
    #[serde(default)]
    pub exposure_bytes: u64,
    /// Version of the agent, e.g. `0.1.0`.
    #[serde(default)]
    pub version: String,
}

/// What a worker is for, now.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum WorkerState {
    /// Takes machines.
    Ready,
    /// Takes no new machines; those it has stay.
    Cordoned,
    /// Cordoned, and a drain moves its machines away.
    Draining,
    /// Drained of machines, but others still read blocks from it.
    Evacuated,
    /// Safe to power off.
    Drained,
    /// Does not answer.
    Unreachable,
}

/// What a worker can hold.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Capacity {
    /// Machines at most.
    pub machines: u64,
    /// Bytes of volumes at most, as configured.
    pub bytes: Bytes,
    /// Bytes that its volumes take, sealed copies included.
    pub bytes_used: Bytes,
    /// Bytes free on the file system that holds the volumes.
    pub bytes_free: Bytes,
}

/// Takes a worker out of placement.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Cordon {
    /// Why, for whoever finds it cordoned.
    #[serde(default)]
    pub reason: String,
}
