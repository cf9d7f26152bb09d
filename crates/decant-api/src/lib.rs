//! Requests, responses and error codes of the agent's API.
//!
//! JSON over HTTP/1.1: on `run_dir/agent.sock` for root, and over mutual TLS for other workers. Every failure has an
//! [`ErrorBody`]. Times of day are Unix milliseconds and end in `_at_ms`; durations are milliseconds and end in `_ms`; sizes
//! are bytes. Responses may gain fields; requests with unknown fields are refused.
//!
//! | method and path | request | response |
//! |---|---|---|
//! | `GET /v1/workers?scope=local\|fleet` | | [`Listing`] of [`Worker`] |
//! | `GET /v1/workers/{worker}` | | [`Worker`] |
//! | `POST /v1/workers/{worker}/cordon`, `…/uncordon` | [`Cordon`], [`Empty`] | [`Worker`] |
//! | `GET /v1/volumes?scope=` | | [`Listing`] of [`Volume`] |
//! | `POST /v1/volumes` | [`CreateVolume`] | [`Volume`] |
//! | `GET /v1/volumes/{volume}` | | [`Volume`] |
//! | `DELETE /v1/volumes/{volume}` | | [`Empty`] |
//! | `GET /v1/machines?scope=` | | [`Listing`] of [`Machine`] |
//! | `POST /v1/machines` | [`RunMachine`] | [`Machine`] |
//! | `GET /v1/machines/{machine}` | | [`Machine`] |
//! | `DELETE /v1/machines/{machine}?with_volume=&force=` | | [`Empty`] |
//! | `POST /v1/machines/{machine}/stop`, `…/start` | [`Empty`] | [`Machine`] |
//! | `POST /v1/machines/{machine}/move` | [`MoveMachine`] | [`Migration`] |
//! | `POST /v1/machines/{machine}/reclaim` | [`Reclaim`] | [`Reclaimed`] |
//! | `POST /v1/machines/{machine}/retry` | [`Empty`] | [`Machine`] |
//! | `POST /v1/machines/{machine}/clear-veto`, `…/forget-origin` | [`Force`] | [`Machine`] |
//! | `GET /v1/machines/{machine}/logs?tail=` | | [`Logs`] |
//! | `GET /v1/drains` | | [`Listing`] of [`Drain`] |
//! | `POST /v1/drains` | [`CreateDrain`] | [`Drain`] |
//! | `GET /v1/drains/{drain}` | | [`Drain`] |
//! | `POST /v1/drains/{drain}/cancel`, `…/resume` | [`Empty`] | [`Drain`] |
//! | `POST /v1/drains/{drain}/settings` | [`DrainSettings`] | [`Drain`] |
//! | `GET /v1/migrations?scope=` | | [`Listing`] of [`Migration`] |
//! | `GET /v1/migrations/{migration}` | | [`Migration`] |
//! | `POST /v1/migrations/{migration}/cancel` | [`Empty`] | [`Migration`] |
//! | `POST /v1/migrations/{migration}/settings` | [`MigrationSettings`] | [`Migration`] |
//! | `GET /v1/routes/{machine}?wait_ms=&known_state=&known_epoch=&known_worker=` | | [`Route`] |
//! | `GET /v1/events?after=` | | server-sent events, each `data:` an [`Event`], its `id:` the sequence |
//!
//! `scope=local` answers for this worker alone; `scope=fleet`, the default on the socket, asks the peers too and names those
//! that did not answer. A request about a machine that another worker owns is passed on to it where that is safe, and
//! otherwise refused with [`Code::Elsewhere`], which names the worker.

#![forbid(unsafe_code)]

mod drain;
mod error;
mod event;
mod machine;
mod migration;
pub mod path;
mod volume;
mod worker;

pub use decant_network::{Route, RouteState};
pub use drain::{Blocker, CreateDrain, Drain, DrainMachine, DrainPhase, DrainSettings, PlannedMove};
pub use error::{Code, ErrorBody};
pub use event::Event;
pub use machine::{
    Exit, Force, Logs, Machine, MachineState, MoveMachine, Reclaim, Reclaimed, RecoveryPoint, RunMachine,
};
pub use migration::{Eta, Migration, MigrationPhase, MigrationSettings, Progress, Role, Timings, Why};
pub use volume::{CreateVolume, SealedCopy, Volume};
pub use worker::{Capacity, Cordon, Worker, WorkerState};

use decant_base::WorkerId;
use serde::{Deserialize, Serialize};

/// A request or a response that says nothing: `{}`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Empty {}

/// What a list asks for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Scope {
    /// This worker and every peer that answers within a second.
    #[default]
    Fleet,
    /// This worker alone.
    Local,
}

/// A list, and who did not contribute to it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listing<T> {
    /// The items, ordered by id.
    pub items: Vec<T>,
    /// Workers that did not answer; what they have is missing here.
    #[serde(default = "Vec::new", skip_serializing_if = "Vec::is_empty")]
    pub unreachable: Vec<WorkerId>,
}
