//! One machine's move, as each of its two workers sees it.
//!
//! ```text
//! SOURCE                                              DESTINATION
//! planned    Moving   OpenExport ─── Prepare ───────▶ planned    Prepared  plane Prepare, Assemble; machine Prepare
//!   │ PrepareOk ◀──────────────────────────────────── prepared   Prepared
//! prepared   Moving   machine Stop
//!   │ cgroup empty
//! stopped    Moving   plane Seal
//!   │ no write lands
//! sealed     Sealed   Grant, for ever ──────────────▶ granted    Active    plane Begin, machine Start
//!   │ GrantAccepted ◀────────────────────────────────   │ started
//! granted    Sealed   serves blocks                   booted     Active    trim
//!   │ Booted ◀───────────────────────────────────────   │
//! hydrating  Sealed   serves blocks ◀──── fetch ───── hydrating  Active    plane Verify until it is done
//!   │                                                   │ every block here and compared
//!   │ Verified, for ever ◀─────────────────────────── verified   Active
//! verified   Released CloseExport ── Released ──────▶ cleaned
//!   │ export closed, nothing of it runs here
//! cleaned    Released (the copy is kept until it expires)
//! ```
//!
//! The commit point is the destination's durable `Active(e+1)`. Before `sealed` the source alone goes back; from
//! `sealed` on only a refusal that the destination made durable lets it. `unwinding` undoes what was made and ends in
//! `ended`, from any phase before the commit point.

use std::collections::BTreeMap;

use decant_base::{DrainId, Epoch, MigrationId, WorkerId};
use decant_dataplane::{Origin, Reader, Seal, Verification};
use serde::{Deserialize, Serialize};

use crate::wait::Wait;

/// Which end of the move this worker is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Role {
    /// It hands the machine over.
    Source,
    /// It takes it.
    Destination,
}

/// A step of the move; see the drawing above for who is in which and why.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Phase {
    /// Preparing while the machine runs.
    Planned,
    /// The destination is ready; the machine is being stopped.
    Prepared,
    /// The machine is down, its volume is being sealed.
    Stopped,
    /// Sealed durably; the grant is on its way.
    Sealed,
    /// The destination owns the machine: the commit point is passed.
    Granted,
    /// It runs at the destination.
    Booted,
    /// Missing blocks are being fetched.
    Hydrating,
    /// Every block is at the destination and was compared.
    Verified,
    /// Nothing of the migration runs any more. The end.
    Cleaned,
    /// Going back: what was made is being undone.
    Unwinding,
    /// Gone back: the machine is with the source. The end.
    Ended,
}

impl Phase {
    /// Every phase, in order.
    pub const ALL: [Self; 11] = [
        Self::Planned,
        Self::Prepared,
        Self::Stopped,
        Self::Sealed,
        Self::Granted,
        Self::Booted,
        Self::Hydrating,
        Self::Verified,
        Self::Cleaned,
        Self::Unwinding,
        Self::Ended,
    ];

    /// The phase's word, as logs, crash points and the API write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Planned => "planned",
            Self::Prepared => "prepared",
            Self::Stopped => "stopped",
            Self::Sealed => "sealed",
            Self::Granted => "granted",
            Self::Booted => "booted",
            Self::Hydrating => "hydrating",
            Self::Verified => "verified",
            Self::Cleaned => "cleaned",
            Self::Unwinding => "unwinding",
            Self::Ended => "ended",
        }
    }

    /// Whether the migration is over.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Cleaned | Self::Ended)
    }
}

/// Timeouts and times of one migration. All milliseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Limits {
    /// Preparing may take so long before the migration unwinds; the machine runs all the while.
    pub prepare_ms: u64,
    /// Stopping and sealing may take so long before the migration unwinds and the machine starts again.
    pub stop_ms: u64,
    /// The source's copy is kept so long after the destination verified.
    pub retention_ms: u64,
}

/// Why a migration goes or went back.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "why")]
pub enum Back {
    /// The operator cancelled it.
    Cancelled,
    /// A step failed.
    Failed {
        /// Which step, a stable word.
        step: String,
        /// Cause, as a person reads it.
        reason: String,
        /// The cause may pass: the same may be tried again.
        passing: bool,
    },
    /// The operator said that the destination is destroyed.
    Reclaimed,
}

/// A migration as one worker's row carries it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Migration {
    /// Its id; the same on both workers.
    pub id: MigrationId,
    /// Which end this is.
    pub role: Role,
    /// The other end.
    pub peer: WorkerId,
    /// Source: the other end as the export knows it.
    pub reader: Option<Reader>,
    /// The epoch that the destination is granted: the source's plus one.
    pub epoch: Epoch,
    /// The step.
    pub phase: Phase,
    /// Why it was ordered.
    pub reason: String,
    /// The drain it belongs to.
    pub drain: Option<DrainId>,
    /// Timeouts.
    pub limits: Limits,
    /// When each phase was entered here, milliseconds since the Unix epoch.
    pub entered_ms: BTreeMap<Phase, u64>,
    /// The operator wants it back (source, while that may still be possible), or why it went back.
    pub back: Option<Back>,
    /// Source: the destination answered `accepted`; a cancel comes too late.
    pub accepted: bool,
    /// Source: the machine was told to stop. Destination: the clone was begun, or there is no volume.
    pub begun: bool,
    /// Unwinding: the other end is rid of the migration.
    pub peer_done: bool,
    /// Unwinding at the source: the export is closed. Elsewhere: what the machine left here is removed.
    pub local_done: bool,
    /// Destination: where missing blocks come from.
    pub origin: Option<Origin>,
    /// Destination: what is live; carried from the grant until the clone is begun.
    pub seal: Option<Seal>,
    /// What verification found.
    pub verification: Option<Verification>,
    /// SHA-256, hex, of the program that the destination must have; `None` takes any.
    #[serde(default)]
    pub program: Option<String>,
    /// What it waits for.
    pub wait: Option<Wait>,
}
