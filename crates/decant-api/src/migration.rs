//! Migrations.

use decant_base::{Bytes, DrainId, Epoch, MachineId, MigrationId, WorkerId};
use decant_dataplane::{MissingPolicy, Protocol};
use serde::{Deserialize, Serialize};

/// One move of one machine, as one of its two workers sees it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Migration {
    /// Which.
    pub migration: MigrationId,
    /// Of.
    pub machine: MachineId,
    /// From.
    pub source: WorkerId,
    /// To.
    pub destination: WorkerId,
    /// Whose view this is.
    pub role: Role,
    /// The drain it belongs to.
    #[serde(default)]
    pub drain: Option<DrainId>,
    /// What the volume travels over.
    #[serde(default)]
    pub protocol: Protocol,
    /// How far it is.
    pub phase: MigrationPhase,
    /// The epoch that the destination runs it at.
    pub epoch: Epoch,
    /// When it began.
    pub started_at_ms: u64,
    /// When it ended, whichever way.
    #[serde(default)]
    pub ended_at_ms: Option<u64>,
    /// How long its steps took; those that this worker did not see are absent.
    #[serde(default)]
    pub timings: Timings,
    /// Bytes; absent for a stateless machine and before the seal.
    #[serde(default)]
    pub progress: Option<Progress>,
    /// What it waits for; absent when it progresses.
    #[serde(default)]
    pub why: Option<Why>,
}

/// A worker's part in a migration.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// Hands the machine over.
    Source,
    /// Takes it.
    Destination,
}

/// The steps of a migration, in order, and the ways out of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum MigrationPhase {
    /// Chosen; nothing was touched.
    Planned,
    /// The destination makes everything ready while the machine runs.
    Preparing,
    /// All slow work is done; the machine still runs at the source.
    Prepared,
    /// The machine is told to stop.
    Stopping,
    /// No process of the machine is left.
    Stopped,
    /// The source will never run it at this epoch again. Point of no return, unless the destination refuses.
    Sealed,
    /// The destination durably owns it.
    Granted,
    /// It runs at the destination and its volume fills.
    Hydrating,
    /// Every block is at the destination and was compared.
    Verified,
    /// Done: the source's part is over but for the retention of its copy.
    Cleaned,
    /// Being undone.
    Cancelling,
    /// Undone: the machine is on its source.
    Cancelled,
    /// Given up before the seal, with a reason; the machine is on its source.
    Failed,
    /// A person is needed; `why` says what for.
    Stuck,
}

impl MigrationPhase {
    /// Whether nothing more happens by itself.
    pub fn is_final(self) -> bool {
        matches!(self, Self::Cleaned | Self::Cancelled | Self::Failed)
    }
}

/// Durations of a migration's steps, by this worker's monotonic clock.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timings {
    /// From its start until the destination was prepared; the machine runs.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub prepare_ms: Option<u64>,
    /// From the order to stop until its cgroup was empty and its file system unmounted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stop_ms: Option<u64>,
    /// From there until the seal was durable.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub seal_ms: Option<u64>,
    /// From there until the destination had accepted (source), or from its arrival until it was durable (destination).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub grant_ms: Option<u64>,
    /// From the durable acceptance until the machine was up, health check included (destination).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub boot_ms: Option<u64>,
    /// From the acceptance until every block was here and compared (destination).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub hydration_ms: Option<u64>,
}

/// How far the volume is, in bytes of payload.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Progress {
    /// Live at the seal: what has to become local.
    pub bytes_total: u64,
    /// Local by now: fetched, overwritten or discarded. Never above `bytes_total`.
    pub bytes_done: u64,
    /// Read from the origin.
    pub bytes_fetched: u64,
    /// The exposure: bytes that exist only at the origin and are lost if it dies now.
    pub exposure_bytes: u64,
    /// Over the last few seconds.
    pub rate_bytes_per_s: u64,
    /// Reads that wait for the origin now.
    pub parked_reads: u64,
    /// When it will be whole; absent without a rate.
    #[serde(default)]
    pub eta: Option<Eta>,
}

/// A range, because nobody knows the rate of the next minute.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Eta {
    /// If all goes well.
    pub low_ms: u64,
    /// If it goes as slowly as it may.
    pub high_ms: u64,
    /// No rate was measured lately: it stands on what networks are taken to carry.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub assumed: bool,
}

/// What something waits for.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Why {
    /// The reason, with its cause.
    pub reason: String,
    /// Since when.
    pub since_at_ms: u64,
    /// When it is tried again; absent when only an event or a person can help.
    #[serde(default)]
    pub retry_at_ms: Option<u64>,
    /// How often it was tried in vain since then.
    #[serde(default)]
    pub attempts: u32,
    /// What clears it.
    pub clears: String,
}

/// Live settings of a migration, on its destination. Absent fields stay as they are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct MigrationSettings {
    /// Hydration limit in bytes per second; 0 lifts it.
    #[serde(default)]
    pub rate: Option<Bytes>,
    /// What reads of missing blocks get while the origin is away.
    #[serde(default)]
    pub policy: Option<MissingPolicy>,
}
