//! The time of day that steps are given: milliseconds since the Unix epoch, which never go back while the agent runs.
//!
//! Differences between two readings are measured by the monotonic clock, so the durations of a migration's steps are right
//! even if somebody sets the host's clock meanwhile. A jump of the host's clock is followed, forwards at once.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Instant, SystemTime, UNIX_EPOCH};

/// A jump of the host's clock above this is followed; below, it is drift and the monotonic clock is believed.
const JUMP_MS: u64 = 2_000;

/// A clock.
#[derive(Debug)]
pub(crate) struct Clock {
    start: Instant,
    /// Time of day at `start`, as believed now.
    anchor_ms: AtomicU64,
    last_ms: AtomicU64,
}

impl Clock {
    /// A clock that agrees with the host's now.
    pub(crate) fn new() -> Self {
        Self { start: Instant::now(), anchor_ms: AtomicU64::new(wall_ms()), last_ms: AtomicU64::new(0) }
    }

    /// Now.
    pub(crate) fn now_ms(&self) -> u64 {
        let elapsed = u64::try_from(self.start.elapsed().as_millis()).unwrap_or(u64::MAX);
        let wall = wall_ms();
        let mut now = self.anchor_ms.load(Ordering::Relaxed).saturating_add(elapsed);
        if wall.abs_diff(now) > JUMP_MS {
            self.anchor_ms.store(wall.saturating_sub(elapsed), Ordering::Relaxed);
            now = wall;
        }
        self.last_ms.fetch_max(now, Ordering::Relaxed).max(now)
    }
}

fn wall_ms() -> u64 {
    SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| u64::try_from(since.as_millis()).unwrap_or(u64::MAX))
}
