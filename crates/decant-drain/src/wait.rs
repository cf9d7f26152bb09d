//! Every wait has a name: what for, since when, when it is tried again, and what clears it.

use serde::{Deserialize, Serialize};

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
    /// What is awaited, a stable word: `peer-prepare`, `machine-stop`, `plane-seal`, `grant`, `hydration`, …
    pub on: String,
    /// The last failure as a person reads it; empty while nothing failed.
    pub reason: String,
    /// What clears it.
    pub clears: String,
    /// Since when, milliseconds since the Unix epoch.
    pub since_ms: u64,
    /// Failures so far.
    pub attempts: u32,
    /// When it is tried again; `None` if something else must happen first.
    pub retry_ms: Option<u64>,
}
