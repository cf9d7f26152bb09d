//! What goes in and what comes out: orders, messages, outcomes; effects.

use std::path::PathBuf;

use decant_base::{Bytes, DrainId, Epoch, MachineId, MigrationId, VolumeId, WorkerId};
use decant_dataplane::{Command, Failure, Geometry, Origin, Outcome, Reader, Seal, Verification};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::migration::{Limits, Phase};
use crate::points::Point;
use crate::row::{Desired, Row};

/// Something happened.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Event {
    /// The agent has started and read the row; survivors it does not own were dealt with.
    Restarted,
    /// The timer of an [`Effect::Wake`] fired.
    Wake,
    /// An operator, or a drain, wants something.
    Order(Order),
    /// A peer said something. The sender was authenticated; what it says is judged here.
    Received {
        /// Who.
        from: WorkerId,
        /// What.
        message: Box<Message>,
    },
    /// An [`Effect::Plane`] ended.
    Plane {
        /// The very command.
        command: Box<Command>,
        /// What came of it.
        result: Result<Box<Outcome>, Failure>,
    },
    /// An [`Effect::Machine`] ended.
    Machine {
        /// The very command.
        command: Box<MachineCommand>,
        /// What came of it.
        result: Result<(), Failure>,
    },
    /// The machine is gone without having been told to stop: its shim or its device died.
    MachineLost {
        /// Why, as a person reads it.
        reason: String,
    },
    /// Somebody claims the machine at this epoch. It may veto a boot, never permit one.
    EpochSeen {
        /// At which.
        epoch: Epoch,
        /// Who.
        by: WorkerId,
    },
}

/// What an operator can want of one machine on the worker asked.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "order")]
pub enum Order {
    /// A new machine; its volume, if any, exists here already.
    Run {
        /// Its specification.
        spec: Value,
        /// Its volume.
        volume: Option<VolumeId>,
    },
    /// Up.
    Start,
    /// Down.
    Stop,
    /// Stopped, then gone with its volume.
    Remove {
        /// Its origin is destroyed, says the operator: also while blocks are missing here, or while the origin has not
        /// heard that it is not needed.
        force: bool,
    },
    /// To another worker.
    Move(Box<Move>),
    /// A migration back to where it came from, as far as that is still possible.
    Cancel {
        /// Which; a migration that is over answers [`Denied::Over`].
        migration: MigrationId,
    },
    /// The destination is destroyed, says the operator: the sealed copy boots. Everything written since the seal is lost.
    Reclaim,
    /// The origin is destroyed, says the operator, and every block is here: stop telling it so.
    ForgetOrigin,
    /// Whatever is stuck: try again now.
    Retry,
    /// The sealed copy under retention goes now.
    FreeCopy,
    /// Nobody else has it, says the operator: forget the higher epoch that was seen.
    ClearVeto,
}

/// An order to move a machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Move {
    /// The id; repeating an order with the same id changes nothing.
    pub migration: MigrationId,
    /// The destination.
    pub to: WorkerId,
    /// The destination as its export knows it, the only one it will serve.
    pub reader: Reader,
    /// Why.
    pub reason: String,
    /// For which drain.
    pub drain: Option<DrainId>,
    /// Timeouts.
    pub limits: Limits,
    /// SHA-256, hex, of the program that it was started from: the destination must have the same. `None` takes any.
    pub program: Option<String>,
}

/// What one agent says to another, at least once; idempotent by (machine, migration, epoch).
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Message {
    /// About which machine.
    pub machine: MachineId,
    /// In which migration.
    pub migration: MigrationId,
    /// The epoch that the destination is (to be) granted.
    pub epoch: Epoch,
    /// What.
    pub body: Body,
}

/// The kinds of message.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "kind")]
pub enum Body {
    /// Source: get ready.
    Prepare {
        /// The machine's specification.
        spec: Value,
        /// Its volume.
        offer: Option<Box<Offer>>,
        /// Why.
        reason: String,
        /// For which drain.
        drain: Option<DrainId>,
        /// Timeouts.
        limits: Limits,
        /// SHA-256, hex, of the program that it was started from; absent where any will do, and from older agents.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        program: Option<String>,
    },
    /// Destination: ready. Sent again until the source says something.
    PrepareOk,
    /// Destination: not ready, and nothing is left of it here.
    PrepareFailed {
        /// Why; its code says whether to try again.
        failure: Failure,
    },
    /// Source: the machine is yours. Sent again until answered.
    Grant {
        /// Up or down.
        desired: Desired,
        /// What is live on its volume.
        seal: Option<Box<Seal>>,
    },
    /// Source, sealed: refuse the grant if you have not accepted it. Sent again until answered.
    Refuse,
    /// Destination: durably accepted.
    GrantAccepted,
    /// Destination: durably refused; it will never be accepted.
    GrantRefused,
    /// Destination: this offer is older than what I know; a journal was restored from a backup.
    GrantStale {
        /// The highest epoch known here.
        top: Epoch,
    },
    /// Source, not sealed: forget it. Sent again until answered.
    Abandon,
    /// Destination: nothing of it is left here.
    Abandoned,
    /// Destination: how far it is. Lost without harm.
    Progress {
        /// Its phase.
        phase: Phase,
    },
    /// Destination: every block is here and was compared. Sent again until answered.
    Verified {
        /// What was found; `None` for a stateless machine.
        verification: Option<Verification>,
    },
    /// Source: heard; nothing of mine is needed.
    Released,
}

/// What the destination needs to make its volume.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Offer {
    /// Which.
    pub volume: VolumeId,
    /// Where its blocks will come from.
    pub origin: Origin,
    /// What it must be like.
    pub geometry: Geometry,
    /// LUKS2 header area, base64.
    pub header: String,
    /// Bytes that must be free.
    pub room: Bytes,
}

/// An order to the machine's driver. Idempotent: performing it again changes nothing and gives the same outcome.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "command")]
pub enum MachineCommand {
    /// Destination: everything slow before the start (programs, shim, namespaces, root, cgroup, link); it waits for the word.
    Prepare {
        /// Which.
        machine: MachineId,
        /// For.
        migration: MigrationId,
        /// What.
        spec: Value,
        /// Its device, if it has a volume.
        device: Option<PathBuf>,
        /// SHA-256, hex, that its program must have here; `None` takes any.
        program: Option<String>,
    },
    /// Start it, prepared or not. Done when its first process runs.
    Start {
        /// Which.
        machine: MachineId,
        /// As its owner at this epoch.
        epoch: Epoch,
        /// What.
        spec: Value,
        /// Its device, if it has a volume.
        device: Option<PathBuf>,
    },
    /// Stop it: its signal, its timeout, then kill. Done when its cgroup is empty and its device has no user.
    Stop {
        /// Which.
        machine: MachineId,
    },
    /// Discard what its file system does not use. Best effort: a failure is logged, not retried.
    Trim {
        /// Which.
        machine: MachineId,
    },
    /// Remove what `Prepare` made, or what a stopped machine left: shim, namespaces, cgroup, link. Done, also if there was nothing.
    Discard {
        /// Which.
        machine: MachineId,
    },
}

/// Something to do. At least once; the outcome comes back as an [`Event`].
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Effect {
    /// To the data plane; outcome [`Event::Plane`].
    Plane(Command),
    /// To the machine's driver; outcome [`Event::Machine`].
    Machine(MachineCommand),
    /// To a peer; no outcome, answers are messages. Whoever sends must not wait for it.
    Send {
        /// To whom.
        to: WorkerId,
        /// What.
        message: Box<Message>,
    },
    /// [`Event::Wake`] at this time, in place of any earlier one of this row.
    Wake {
        /// Milliseconds since the Unix epoch.
        at_ms: u64,
    },
}

/// Whether the step must be durable before its effects are performed.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Sync {
    /// The row did not change: nothing to write.
    Unchanged,
    /// May be lost: an older row leads here again by repeating effects. Keeps an fsync off the interruption.
    Later,
    /// Must be durable first.
    Now,
}

/// What follows from an event.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use = "a step that is not journalled did not happen"]
pub struct Step {
    /// The row from now on.
    pub row: Row,
    /// Whether it must be durable before the effects.
    pub sync: Sync,
    /// The crash points around its commit.
    pub point: Point,
    /// What to do then, in order.
    pub effects: Vec<Effect>,
}

/// The event is refused; nothing changed. For the one who asked.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "denied")]
pub enum Denied {
    /// The worker does not own the machine.
    #[error("{worker} does not own this machine, which is {state} here{hint}")]
    NotOwner {
        /// The worker asked.
        worker: WorkerId,
        /// What it is to the machine.
        state: String,
        /// Where it went, or what to do; starts with a blank or is empty.
        hint: String,
    },
    /// A machine of that name is here already.
    #[error("this machine is here already ({state}): choose another name, or remove it first")]
    Exists {
        /// What it is here.
        state: String,
    },
    /// Something else must end first.
    #[error("{reason}")]
    Busy {
        /// What, and what to do.
        reason: String,
    },
    /// It is over already.
    #[error("migration {migration} is over: {phase}")]
    Over {
        /// Which.
        migration: MigrationId,
        /// How it ended.
        phase: String,
    },
    /// The destination owns the machine: no cancel any more.
    #[error(
        "migration {migration} is past its commit point, {to} owns the machine: once it is verified, a move brings the machine back"
    )]
    TooLate {
        /// Which.
        migration: MigrationId,
        /// The new owner.
        to: WorkerId,
    },
    /// No such migration here.
    #[error("no migration {migration} of this machine is known here")]
    Unknown {
        /// Which was asked for.
        migration: MigrationId,
    },
    /// The order makes no sense in this state.
    #[error("{reason}")]
    Senseless {
        /// Why, and what to do.
        reason: String,
    },
    /// The outcome of something that nobody waits for any more; harmless.
    #[error("nobody waits for this outcome")]
    Unawaited,
    /// A peer said something that cannot be true.
    #[error("{from} sent {what}, which cannot be: {reason}")]
    Impossible {
        /// Who.
        from: WorkerId,
        /// What.
        what: String,
        /// Why not.
        reason: String,
    },
}
