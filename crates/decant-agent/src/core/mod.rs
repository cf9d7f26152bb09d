//! The one owner of all rows.
//!
//! One thread takes inputs in order; each is stepped and journalled in one transaction, then its effects are handed out:
//! block work and machines to a lane per machine ([`lanes`]), messages to the peers' outboxes, drains' errands to the drain
//! service. None of these is ever waited for here, so that a hung command stops nothing but its own machine. Readers
//! see a [`Snapshot`] of what is committed and never come to this thread.

mod admission;
mod lanes;
mod line;
mod snapshot;
mod stepper;
mod timers;

use std::sync::Arc;
use std::sync::mpsc;

use decant_base::{DrainId, MachineId, MigrationId, WorkerId};
use decant_drain::drain::{DrainEffect, DrainEvent, DrainOrder, DrainRow};
use decant_drain::{Denied, Event, Message, Row};
use decant_fsm::LogEntry;
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

pub(crate) use admission::{Admission, is_or_will_be_here};
pub(crate) use lanes::{VolumeLocks, World, read_spec};
pub(crate) use line::Detail;
pub(crate) use snapshot::Snapshot;
pub(crate) use stepper::{Parts, load, start};

/// What the core is told.
#[derive(Debug)]
pub(crate) enum Input {
    /// Something happened to a machine.
    Machine { machine: MachineId, event: Box<Event>, reply: Option<oneshot::Sender<Result<Arc<Row>, Refusal>>> },
    /// Something happened to a drain of this worker.
    Drain { drain: DrainId, event: Box<DrainEvent>, reply: Option<oneshot::Sender<Result<(), Refusal>>> },
    /// A drain of this worker is ordered; one that is known is left as it is.
    StartDrain { order: Box<DrainOrder>, reply: oneshot::Sender<Result<Arc<DrainRow>, Refusal>> },
    /// The worker is cordoned, or not.
    Cordon { cordon: Option<Cordoned>, reply: Option<oneshot::Sender<Result<(), Refusal>>> },
    /// A line for the event log that changes no row.
    Note(Box<LogEntry>),
    /// A machine that no row owns was killed; then its row, if any, is told that the agent has started.
    Survivor { machine: MachineId },
    /// The agent ends.
    End,
}

/// Why the core did nothing.
#[derive(Debug, Clone, thiserror::Error)]
pub(crate) enum Refusal {
    /// The step says no.
    #[error(transparent)]
    Denied(#[from] Denied),
    /// The journal failed, or the agent ends: nothing is decided any more.
    #[error("the agent's journal does not work or the agent is ending: {0}")]
    Down(String),
}

/// Why a worker takes no new machines.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Cordoned {
    /// As whoever did it said.
    pub(crate) reason: String,
    /// The drain that did it.
    #[serde(default)]
    pub(crate) drain: Option<DrainId>,
    /// When, Unix milliseconds.
    pub(crate) at_ms: u64,
}

/// The worker's own row.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct WorkerRow {
    /// Set while it takes no new machines.
    #[serde(default)]
    pub(crate) cordoned: Option<Cordoned>,
}

/// A message to a peer.
#[derive(Debug)]
pub(crate) struct Outgoing {
    pub(crate) to: WorkerId,
    pub(crate) message: Box<Message>,
}

/// An errand of a drain.
#[derive(Debug)]
pub(crate) struct Errand {
    pub(crate) row: Arc<DrainRow>,
    pub(crate) effect: DrainEffect,
}

/// How to reach the core. Cheap to clone.
#[derive(Debug, Clone)]
pub(crate) struct Core {
    inputs: mpsc::Sender<Input>,
}

impl Core {
    /// Tells the core; says nothing if it has ended, because then nobody is to act any more.
    pub(crate) fn tell(&self, input: Input) {
        let _ = self.inputs.send(input);
    }

    /// Something happened to `machine`; nobody waits for what came of it.
    pub(crate) fn event(&self, machine: &MachineId, event: Event) {
        self.tell(Input::Machine { machine: machine.clone(), event: Box::new(event), reply: None });
    }

    /// Steps `event` and waits until it is durable.
    pub(crate) async fn step(&self, machine: &MachineId, event: Event) -> Result<Arc<Row>, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.tell(Input::Machine { machine: machine.clone(), event: Box::new(event), reply: Some(reply) });
        answer.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Something happened to a drain of this worker; nobody waits for what came of it.
    pub(crate) fn drain_event(&self, drain: &DrainId, event: DrainEvent) {
        self.tell(Input::Drain { drain: drain.clone(), event: Box::new(event), reply: None });
    }

    /// Steps `event` of a drain of this worker and waits until it is committed.
    pub(crate) async fn drain(&self, drain: &DrainId, event: DrainEvent) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.tell(Input::Drain { drain: drain.clone(), event: Box::new(event), reply: Some(reply) });
        answer.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Starts a drain of this worker.
    pub(crate) async fn start_drain(&self, order: DrainOrder) -> Result<Arc<DrainRow>, Refusal> {
        let (reply, answer) = oneshot::channel();
        self.tell(Input::StartDrain { order: Box::new(order), reply });
        answer.await.unwrap_or_else(|_| Err(ended()))
    }

    /// Cordons this worker, or lifts that.
    pub(crate) async fn cordon(&self, cordon: Option<Cordoned>) -> Result<(), Refusal> {
        let (reply, answer) = oneshot::channel();
        self.tell(Input::Cordon { cordon, reply: Some(reply) });
        answer.await.unwrap_or_else(|_| Err(ended()))
    }
}

fn ended() -> Refusal {
    Refusal::Down("the agent is ending".to_owned())
}

/// The id of a migration that nobody named: sortable by time, told apart by 32 random bits.
pub(crate) fn new_migration_id(now_ms: u64) -> MigrationId {
    MigrationId::new(new_id("m", now_ms)).expect("a letter, a dash and hex digits are a label")
}

/// The id of a drain that nobody named.
pub(crate) fn new_drain_id(now_ms: u64) -> DrainId {
    DrainId::new(new_id("d", now_ms)).expect("a letter, a dash and hex digits are a label")
}

fn new_id(kind: &str, now_ms: u64) -> String {
    let random = getrandom::u32().unwrap_or_else(|_| std::process::id());
    format!("{kind}-{:x}-{random:08x}", now_ms / 1000)
}
