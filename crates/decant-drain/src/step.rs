//! The one way in: an event is stepped.

use crate::row::Row;
use crate::vocabulary::{Denied, Effect, Event, Message, Step};

/// The names of a crash point before and after a commit, both in [`POINTS`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Point {
    /// Passed before the commit.
    pub before: &'static str,
    /// Passed after it.
    pub after: &'static str,
}

/// Every crash point of the journal: `journal:<source|destination|machine|drain>:<phase>:<before|after>`.
pub const POINTS: &[Point] = &[];

/// What follows from `event`. Pure: the same arguments give the same answer.
///
/// # Errors
/// [`Denied`] if the event changes nothing and its sender should know.
pub fn step(row: &Row, event: Event, now_ms: u64) -> Result<Step, Denied> {
    let _ = (row, now_ms);
    let _ = event;
    Err(Denied::Unawaited)
}

/// What must be (re)performed in this state: after a restart, and when a try failed or an answer did not come.
pub fn pending(row: &Row, now_ms: u64) -> Vec<Effect> {
    let _ = (row, now_ms);
    Vec::new()
}

/// The answer to a `Prepare` that this worker does not even consider, e.g. because it is cordoned; `None` for other messages.
pub fn decline(message: &Message, reason: &str) -> Option<Message> {
    let _ = (message, reason);
    None
}
