//! Who may run a machine: one durable record per machine and worker.
//!
//! ```text
//!                 Run (operator)                    Prepare (source's word)
//!        None ───────────────────▶ Active(e)    None|Released ─────────────▶ Prepared(id)
//!                                   │    ▲                                    │        │ abandon, or refuse(e+1)
//!              Move (operator)      │    │ cancel, failure                    │        ▼
//!                                   ▼    │                                    │      None
//!                                 Moving(e,to,id)               Grant(e+1)    ▼
//!                                   │                           accepted  Active(e+1)
//!                                   │ sealed: durable, then granted
//!                                   ▼
//!                                 Sealed(e,to,id) ──────────▶ Active(e+2)     the destination durably refused e+1,
//!                                   │                                         or the operator's word: reclaim --force
//!                                   │ Verified(e+1), the destination's word
//!                                   ▼
//!                                 Released(e)
//! ```
//!
//! Only `Active` and `Moving` may run the machine. `Sealed` never runs it at e or e+1. Each arrow is one durable
//! transaction on one worker; no arrow needs two workers to write at once.

use decant_base::{Epoch, MigrationId, WorkerId};
use serde::{Deserialize, Serialize};

/// What a worker durably is to a machine.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "state")]
pub enum State {
    /// Nothing.
    #[default]
    None,
    /// Its owner.
    Active {
        /// At this epoch.
        epoch: Epoch,
    },
    /// Its owner, preparing to hand it over; nothing is sealed, the machine may run.
    Moving {
        /// The owner's epoch; the destination gets the next one.
        epoch: Epoch,
        /// The destination.
        to: WorkerId,
        /// The migration.
        migration: MigrationId,
    },
    /// Ready to accept a grant of this migration.
    Prepared {
        /// The migration.
        migration: MigrationId,
    },
    /// Handing over: never runs the machine at `epoch` or the one after it; serves its blocks.
    Sealed {
        /// The epoch it had.
        epoch: Epoch,
        /// Whom it grants `epoch + 1`.
        to: WorkerId,
        /// The migration.
        migration: MigrationId,
    },
    /// Handed over; the new owner needs nothing from here.
    Released {
        /// The epoch it had.
        epoch: Epoch,
    },
}

impl State {
    /// Whether this worker may run the machine, and at which epoch.
    pub fn owned(&self) -> Option<Epoch> {
        match self {
            Self::Active { epoch } | Self::Moving { epoch, .. } => Some(*epoch),
            _ => None,
        }
    }

    /// The state's word, as logs and the API write it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Active { .. } => "active",
            Self::Moving { .. } => "moving",
            Self::Prepared { .. } => "prepared",
            Self::Sealed { .. } => "sealed",
            Self::Released { .. } => "released",
        }
    }
}

/// How an offer of an epoch ended here.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Answer {
    /// This worker took it.
    Accepted,
    /// This worker durably refused it and will never take it.
    Refused,
}

/// The highest epoch this worker ever took or refused, with the outcome: a repeated prepare must not forge a refusal.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
pub struct Top {
    /// The epoch; 0 if none.
    pub epoch: Epoch,
    /// How it ended; `None` for epoch 0 and for one that no migration offered.
    pub answer: Option<(MigrationId, Answer)>,
}

impl Top {
    /// What was answered to `migration`'s offer of `epoch`, if that epoch is the highest one. A refused epoch is refused to
    /// every migration: whoever offers it again must go above it. Of a lower one nothing is known, and nothing is said.
    pub fn answer_to(&self, migration: &MigrationId, epoch: Epoch) -> Option<Answer> {
        match &self.answer {
            Some((_, Answer::Refused)) if self.epoch == epoch => Some(Answer::Refused),
            Some((id, answer)) if self.epoch == epoch && id == migration => Some(*answer),
            _ => None,
        }
    }
}
