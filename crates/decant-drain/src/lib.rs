//! Handoff, migration and drain as pure state machines, and the plan of a drain.
//!
//! **An event is stepped, the step is journalled, its effects are performed idempotently, their outcomes are events.**
//! The agent owns the clock, the sockets and the journal; everything here is a function of (row, event, now).
//!
//! What to open first: [`handoff`] (who may run a machine), then [`migration`] (the steps of a move, drawn), then
//! `source` and `destination` beside it, which are the transition table's two columns.
//!
//! How an agent drives it:
//! 1. at start: for each row `step(&row, Event::Restarted, now)`, journal, perform;
//! 2. for each message, outcome of an effect, timer or order: `step(&row, event, now)`; journal `step.row`
//!    ([`Sync`] says whether it must be durable before the effects are performed); perform `step.effects` in order,
//!    those of one machine one after another, `Send` and `Wake` beside them; feed each outcome back as an event;
//!    A step's effects may be left out if the machine's queue ends with the very same ones already; nothing else may be
//!    left out or overtake (a start before a stop is not the same as one after it);
//! 3. one timer per row: the last [`Effect::Wake`] replaces the one before.
//!
//! A `Denied` changes nothing and is for the one who asked.

#![forbid(unsafe_code)]

mod destination;
mod draft;
pub mod drain;
pub mod handoff;
mod life;
pub mod migration;
mod orders;
pub mod plan;
mod points;
pub mod progress;
mod row;
mod source;
mod step;
mod vocabulary;
mod wait;
mod why;

pub use life::may_run;
pub use points::{MESSAGE_POINTS, MessagePoints, POINTS, Point};
pub use row::{Desired, Life, Row, SealedCopy, Went};
pub use step::{decline, heeds, pending, step};
pub use vocabulary::{Body, Denied, Effect, Event, MachineCommand, Message, Move, Offer, Order, Step, Sync};
pub use wait::{Severity, Wait};
pub use why::{progress, reclaim_loses, recovery_point, why};
