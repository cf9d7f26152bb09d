//! Every wait has a name: what for, since when, when it is tried again, and what clears it.

use decant_dataplane::{Failure, FailureCode};
use decant_fsm::Backoff;
use serde::{Deserialize, Serialize};

/// Between tries of something on this worker that failed in passing.
pub(crate) const LOCAL: Backoff = Backoff { base_ms: 50, max_ms: 5_000 };
/// Between repeats of a message whose answer costs its receiver next to nothing.
pub(crate) const RESEND: Backoff = Backoff { base_ms: 250, max_ms: 10_000 };
/// Between repeats of a message that carries a header area, or whose answer takes its receiver seconds.
pub(crate) const ASK: Backoff = Backoff { base_ms: 2_000, max_ms: 30_000 };
/// Between two looks at whether hydration is complete: short against any hydration, long against what a look costs.
pub(crate) const LOOK: Backoff = Backoff { base_ms: 400, max_ms: 400 };
/// Between tries to start a machine again: a machine that cannot start should not keep its worker busy.
pub(crate) const BOOT: Backoff = Backoff { base_ms: 250, max_ms: 30_000 };

/// What a row waits for while its sealed copy is being freed.
pub(crate) const FREE_COPY: &str = "free-copy";

/// How bad a wait is.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Severity {
    /// In the normal course: an answer, a timer, hydration.
    Waiting,
    /// It failed and is tried again by itself.
    Retrying,
    /// A person is needed; nothing is tried until [`crate::Order::Retry`] or a cancel.
    Stuck,
}

/// Why something does not go on.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Wait {
    /// How bad.
    pub severity: Severity,
    /// What is awaited, a stable word: `prepare`, `machine-stop`, `seal`, `grant`, `hydration`, …
    pub on: String,
    /// The last failure as a person reads it; empty while nothing failed.
    pub reason: String,
    /// What clears it.
    pub clears: String,
    /// Since when, milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// Tries that did not help so far.
    pub attempts: u32,
    /// When it is tried again; `None` if something else must happen first.
    pub retry_ms: Option<u64>,
}

impl Wait {
    /// A wait in the normal course.
    pub(crate) fn new(on: &str, clears: impl Into<String>, now_ms: u64) -> Self {
        Self {
            severity: Severity::Waiting,
            on: on.to_owned(),
            reason: String::new(),
            clears: clears.into(),
            since_ms: now_ms,
            attempts: 0,
            retry_ms: None,
        }
    }

    /// One more try, `name`'s, that has not helped yet.
    pub(crate) fn again(&mut self, backoff: Backoff, name: &str, now_ms: u64) {
        self.attempts = self.attempts.saturating_add(1);
        self.retry_ms = Some(now_ms.saturating_add(backoff.delay_ms(name, self.attempts)));
    }

    /// Whether its time has come.
    pub(crate) fn is_due(&self, now_ms: u64) -> bool {
        self.retry_ms.is_some_and(|at| at <= now_ms)
    }
}

/// Notes a passing failure in `slot`: same wait, one more attempt.
pub(crate) fn retry(slot: &mut Option<Wait>, on: &str, failure: &Failure, backoff: Backoff, name: &str, now_ms: u64) {
    let wait = carry_on(slot, on, now_ms);
    wait.severity = if failure.code == FailureCode::NotYet { Severity::Waiting } else { Severity::Retrying };
    wait.reason = if failure.code == FailureCode::NotYet { String::new() } else { failure.message.clone() };
    wait.again(backoff, name, now_ms);
}

/// Notes in `slot` that a person is needed.
pub(crate) fn stuck(slot: &mut Option<Wait>, on: &str, reason: &str, clears: &str, now_ms: u64) {
    let wait = carry_on(slot, on, now_ms);
    wait.severity = Severity::Stuck;
    wait.reason = reason.to_owned();
    wait.clears = clears.to_owned();
    wait.retry_ms = None;
}

/// The wait for `on`, the running one if there is one.
fn carry_on<'a>(slot: &'a mut Option<Wait>, on: &str, now_ms: u64) -> &'a mut Wait {
    if slot.as_ref().is_none_or(|wait| wait.on != on) {
        *slot = Some(Wait::new(on, "the next try succeeds", now_ms));
    }
    slot.get_or_insert_with(|| Wait::new(on, "", now_ms))
}
