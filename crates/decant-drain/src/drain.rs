//! All machines off a worker.
//!
//! ```text
//!            all cordoned        no blockers            no machine runs here     nothing is served from here
//! cordoning ─────────────▶ planning ───────▶ moving ─────────────────▶ evacuated ─────────────▶ drained
//!     │                      │  ▲              │  ▲                        │
//!     │              blockers│  │timer, retry  │  │timer, retry            │
//!     │                      ▼  │              ▼  │                        │
//!     │                     blocked ◀── some machine cannot go             │
//!     └──────────────┬───────┴─────────────────┘                           │ cancel
//!                    │ cancel, deadline                                    ▼
//!                    ▼                                                 cancelled
//!               cancelling ── what is past its commit point ends there ──▶ cancelled | overdue
//! ```
//!
//! A deadline that passes when the worker is evacuated cannot bring anything back: it is shown, and the drain goes on.
//! A cancel takes the cordon away again unless it was there before; a deadline leaves it, so that nothing comes back.
//!
//! Each worker drains itself: one row per drain and worker. A drain of several workers has one row on each, and each
//! cordons all of them before it plans, so that machines are not moved from one drained worker to another.

use std::collections::BTreeMap;

use decant_base::{Bytes, DrainId, MachineId, MigrationId, WorkerId};
use decant_dataplane::Protocol;
use serde::{Deserialize, Serialize};

use crate::migration::{Limits, Phase};
use crate::plan::{Blocker, Fleet, Plan, Serving};
use crate::points::Point;
use crate::vocabulary::Sync;
use crate::wait::Wait;

mod step;

pub use step::{drain_pending, drain_step};

/// Where a drain stands.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainState {
    /// Every worker of the drain is being told to take no new machines.
    Cordoning,
    /// Facts are being asked for.
    Planning,
    /// Machines are on their way.
    Moving,
    /// It cannot go on; `blockers` says why. Tried again by a timer and by `resume`.
    Blocked,
    /// No machine is left here; blocks or clients are still served. NOT yet safe to power off.
    Evacuated,
    /// SAFE TO POWER OFF. The end.
    Drained,
    /// Going back where that is still possible.
    Cancelling,
    /// Cancelled. The end.
    Cancelled,
    /// The deadline passed first. The end.
    Overdue,
}

impl DrainState {
    /// Whether the drain is over.
    pub fn is_over(self) -> bool {
        matches!(self, Self::Drained | Self::Cancelled | Self::Overdue)
    }

    /// The state's word, as logs, crash points and the API write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Cordoning => "cordoning",
            Self::Planning => "planning",
            Self::Moving => "moving",
            Self::Blocked => "blocked",
            Self::Evacuated => "evacuated",
            Self::Drained => "drained",
            Self::Cancelling => "cancelling",
            Self::Cancelled => "cancelled",
            Self::Overdue => "overdue",
        }
    }
}

/// What the operator ordered.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DrainOrder {
    /// The id; repeating an order with the same id changes nothing.
    pub drain: DrainId,
    /// Every worker that is to be emptied in this drain, this one too.
    pub workers: Vec<WorkerId>,
    /// The one destination, if the operator named it.
    pub to: Option<WorkerId>,
    /// Machines of this worker that are between their plan and the end of hydration at once, at least 1.
    pub max: u32,
    /// Why.
    pub reason: String,
    /// When it must be done, milliseconds since the Unix epoch.
    pub deadline_ms: Option<u64>,
    /// Timeouts of each migration.
    pub limits: Limits,
    /// What the volumes travel over.
    pub protocol: Protocol,
    /// Blockers of some machines do not keep the others here.
    pub partial: bool,
    /// Destinations need not have the very program that a machine was started from.
    #[serde(default)]
    pub any_program: bool,
}

/// Where one machine of a drain stands.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DrainMachine {
    /// Where it goes.
    pub to: WorkerId,
    /// Its group.
    pub group: Option<String>,
    /// Bytes to move at most.
    pub bytes: Bytes,
    /// Its migration, once ordered.
    pub migration: Option<MigrationId>,
    /// How far that is, as the source sees it.
    pub phase: Option<Phase>,
    /// Migrations that went back, ever.
    pub failures: u32,
    /// How many more may go back before a person must look.
    pub tries_left: u32,
    /// Its last migration went back: a place is looked for again.
    pub needs_place: bool,
    /// Not before this time, milliseconds since the Unix epoch.
    pub retry_ms: Option<u64>,
    /// Why the last one failed; empty if none did.
    pub reason: String,
}

/// A drain's row on one worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct DrainRow {
    /// The order.
    pub order: DrainOrder,
    /// Whose row.
    pub worker: WorkerId,
    /// Where it stands.
    pub state: DrainState,
    /// When each state was entered last, milliseconds since the Unix epoch.
    pub entered_ms: BTreeMap<DrainState, u64>,
    /// Workers that confirmed that they are cordoned.
    pub cordoned: Vec<WorkerId>,
    /// This worker was cordoned before the drain, so a cancel leaves it so.
    pub was_cordoned: bool,
    /// The last plan.
    pub plan: Plan,
    /// What stands in the way now.
    pub blockers: Vec<Blocker>,
    /// Its machines.
    pub machines: BTreeMap<MachineId, DrainMachine>,
    /// Migrations of other drains, or of none, that this worker is still the origin of.
    #[serde(default)]
    pub serving: Vec<Serving>,
    /// The deadline has passed.
    #[serde(default)]
    pub overdue: bool,
    /// What it waits for.
    pub wait: Option<Wait>,
}

/// How a migration of this worker's stands, told to the drain whenever it changed.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct MigrationNews {
    /// Which machine.
    pub machine: MachineId,
    /// Which migration.
    pub migration: MigrationId,
    /// How far.
    pub phase: Phase,
    /// Why it went back; empty if it did not.
    pub reason: String,
    /// The destination owns the machine.
    pub committed: bool,
}

/// Something happened to a drain.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainEvent {
    /// The agent has started and read the row.
    Restarted,
    /// The timer of a [`DrainEffect::Wake`] fired.
    Wake,
    /// An [`DrainEffect::Cordon`] ended.
    Cordoned {
        /// Which worker.
        worker: WorkerId,
        /// Why it could not be told; empty if it was.
        failure: String,
    },
    /// A [`DrainEffect::Survey`] ended.
    Surveyed {
        /// What was found.
        fleet: Box<Fleet>,
    },
    /// A migration changed.
    News(MigrationNews),
    /// A [`DrainEffect::Move`] was denied.
    MoveDenied {
        /// Which machine.
        machine: MachineId,
        /// Which migration.
        migration: MigrationId,
        /// Why.
        reason: String,
    },
    /// The operator wants it to go on now.
    Resume,
    /// The operator wants it to stop.
    Cancel,
    /// The operator changed how many machines move at once.
    Max(u32),
}

/// Something to do for a drain.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum DrainEffect {
    /// Tell a worker (this one too) to take no new machines; [`DrainEvent::Cordoned`].
    Cordon {
        /// Which.
        worker: WorkerId,
    },
    /// This worker takes machines again.
    Uncordon,
    /// Ask every worker for its facts; [`DrainEvent::Surveyed`].
    Survey,
    /// Order a migration of this worker's machine: [`crate::Order::Move`] with the drain's reason and limits. If denied,
    /// [`DrainEvent::MoveDenied`]; else its changes come as [`DrainEvent::News`]. After [`DrainEvent::Restarted`] the
    /// present state of every migration of the drain is told once more.
    Move {
        /// Which machine.
        machine: MachineId,
        /// The id of the migration.
        migration: MigrationId,
        /// Where to.
        to: WorkerId,
    },
    /// [`crate::Order::Cancel`]; a denial needs no answer.
    CancelMigration {
        /// Which machine.
        machine: MachineId,
        /// Which migration.
        migration: MigrationId,
    },
    /// [`DrainEvent::Wake`] at this time, in place of any earlier one of this drain.
    Wake {
        /// Milliseconds since the Unix epoch.
        at_ms: u64,
    },
}

/// What follows from a drain's event.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a step that is not journalled did not happen"]
pub struct DrainStep {
    /// The row from now on.
    pub row: DrainRow,
    /// Whether it must be durable before the effects.
    pub sync: Sync,
    /// The crash points around its commit.
    pub point: Point,
    /// What to do then.
    pub effects: Vec<DrainEffect>,
}

impl DrainRow {
    /// A new drain of `worker`.
    pub fn new(order: DrainOrder, worker: WorkerId, was_cordoned: bool, now_ms: u64) -> Self {
        Self {
            order,
            worker,
            state: DrainState::Cordoning,
            entered_ms: BTreeMap::from([(DrainState::Cordoning, now_ms)]),
            cordoned: Vec::new(),
            was_cordoned,
            plan: Plan::default(),
            blockers: Vec::new(),
            machines: BTreeMap::new(),
            serving: Vec::new(),
            overdue: false,
            wait: None,
        }
    }
}
