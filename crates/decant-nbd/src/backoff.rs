//! When to try again.

use std::time::{Duration, Instant};

/// Waits that double from `first` to `max`, with jitter, and start over after a success. Bounded: a try happens at least
/// every `max`, for ever.
#[derive(Debug, Clone)]
pub struct Backoff {
    first: Duration,
    max: Duration,
    next: Duration,
    failures: u32,
}

impl Backoff {
    /// `first` is the wait after the first failure, at least 1 ms; `max` the longest, at least `first`.
    pub fn new(first: Duration, max: Duration) -> Self {
        let first = first.max(Duration::from_millis(1));
        Self { first, max: max.max(first), next: first, failures: 0 }
    }

    /// A try failed at `now`; gives the moment of the next. `random` spreads the tries of many clients of one server over
    /// the upper half of the wait.
    pub fn handle_failure(&mut self, now: Instant, random: u32) -> Instant {
        let wait = self.next;
        self.next = wait.saturating_mul(2).min(self.max);
        self.failures = self.failures.saturating_add(1);
        let half = wait.checked_div(2).unwrap_or_default();
        let share = f64::from(random) / f64::from(u32::MAX);
        let spread = half.mul_f64(share.clamp(0.0, 1.0));
        now.checked_add(half.saturating_add(spread)).unwrap_or(now)
    }

    /// A try came to a working session: the next failure waits `first` again.
    pub fn handle_success(&mut self) {
        self.next = self.first;
        self.failures = 0;
    }

    /// Failures since the last success.
    pub fn failures(&self) -> u32 {
        self.failures
    }
}
