//! One row per machine and worker: the whole of what the worker durably knows of that machine.

use std::path::PathBuf;

use decant_base::{Epoch, MachineId, MigrationId, VolumeId, WorkerId};
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::handoff::{State, Top};
use crate::migration::{Migration, Phase, Role};
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
    /// Down; its device is being taken away.
    Detaching,
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

    /// The row's state in a few words, for the one line of the log per transition: `moving(3) planned`, `active(4) up`.
    pub fn summary(&self) -> String {
        let epoch = match &self.state {
            State::None | State::Prepared { .. } => String::new(),
            State::Active { epoch }
            | State::Moving { epoch, .. }
            | State::Sealed { epoch, .. }
            | State::Released { epoch } => {
                format!("({epoch})")
            }
        };
        let mut words = format!("{}{epoch}", self.state.name());
        if self.state.owned().is_some() {
            words += &format!(" {}", self.life.name());
        }
        if let Some(migration) = self.migration.as_ref().filter(|migration| !migration.phase.is_over()) {
            words += &format!(" {}", migration.phase.name());
        }
        words
    }

    /// The handoff's invariants as far as one row can break them. A step that breaks one has a bug; the model checks this in every state.
    ///
    /// # Errors
    /// Which one, in words.
    pub fn check(&self) -> Result<(), String> {
        let under_way = self.migration.as_ref().filter(|migration| !migration.phase.is_over());
        let phase = |role| under_way.filter(|m| m.role == role).map(|m| (&m.id, m.phase));
        let (source, destination) = (phase(Role::Source), phase(Role::Destination));
        let holds = match &self.state {
            State::None => source.is_none() && destination.is_none_or(|(_, phase)| phase == Phase::Unwinding),
            State::Active { .. } => {
                source.is_none_or(|(_, phase)| phase == Phase::Unwinding)
                    && destination.is_none_or(|(_, phase)| (Phase::Granted..=Phase::Verified).contains(&phase))
            }
            State::Moving { migration, .. } => {
                source.is_some_and(|(id, phase)| id == migration && phase <= Phase::Stopped)
            }
            State::Prepared { migration } => {
                destination.is_some_and(|(id, phase)| id == migration && phase <= Phase::Prepared)
            }
            State::Sealed { migration, .. } => {
                source.is_some_and(|(id, phase)| id == migration && (Phase::Sealed..=Phase::Hydrating).contains(&phase))
            }
            State::Released { .. } => source.is_none_or(|(_, phase)| phase == Phase::Verified) && destination.is_none(),
        };
        if !holds {
            return Err(format!("state {:?} does not go with {under_way:?}", self.state));
        }
        if self.state.owned().is_some_and(|epoch| epoch > self.top.epoch) {
            return Err(format!("owned at {:?}, above the top {:?}", self.state, self.top));
        }
        if let (State::Moving { epoch, .. } | State::Sealed { epoch, .. }, Some(migration)) = (&self.state, under_way)
            && migration.epoch != epoch.next()
        {
            return Err(format!("grants {:?} from {epoch:?}", migration.epoch));
        }
        if self.state.owned().is_none() && self.life != Life::Down {
            return Err(format!("{:?} without being the owner", self.life));
        }
        Ok(())
    }
}

impl Life {
    /// The word, as logs and the API write it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Down => "down",
            Self::Starting => "starting",
            Self::Up => "up",
            Self::Stopping => "stopping",
            Self::Detaching => "detaching",
        }
    }
}
