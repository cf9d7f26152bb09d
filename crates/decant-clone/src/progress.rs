//! Figures about a clone at one moment, exact, and the word for what hinders it.

use std::time::Duration;

use decant_base::ExtentSet;

const BUCKET: Duration = Duration::from_millis(250);
const BUCKETS: usize = 12;

/// Bytes per second over the last three seconds.
#[derive(Debug, Default)]
pub struct Rate {
    buckets: [u64; BUCKETS],
    newest: u64,
    started: Option<Duration>,
}

impl Rate {
    fn advance(&mut self, now: Duration) -> usize {
        let number = (now.as_nanos() / BUCKET.as_nanos()) as u64;
        for passed in (self.newest + 1..=number).rev().take(BUCKETS) {
            self.buckets[passed as usize % BUCKETS] = 0;
        }
        self.newest = self.newest.max(number);
        self.newest as usize % BUCKETS
    }

    /// `bytes` arrived.
    pub fn add(&mut self, now: Duration, bytes: u64) {
        let bucket = self.advance(now);
        self.buckets[bucket] += bytes;
        self.started.get_or_insert(now);
    }

    /// The rate.
    pub fn per_second(&mut self, now: Duration) -> u64 {
        self.advance(now);
        let span = BUCKET * BUCKETS as u32;
        let age = self.started.map_or(span, |started| now.saturating_sub(started)).clamp(BUCKET, span);
        (u128::from(self.buckets.iter().sum::<u64>()) * 1_000_000_000 / age.as_nanos()) as u64
    }
}

/// How far a clone is. Bytes of payload; blocks that were live at the seal are in exactly one of filled, written, discarded and missing.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Progress {
    /// Live at the seal.
    pub total: u64,
    /// Fetched and not overwritten since.
    pub filled: u64,
    /// Written here.
    pub written: u64,
    /// Discarded here.
    pub discarded: u64,
    /// Only at the origin. A block of which some sectors were written here counts whole.
    pub missing: u64,
    /// Received from the origin, what was thrown away included, holes not.
    pub fetched: u64,
    /// Received per second over the last three seconds.
    pub rate: u64,
    /// Reads that wait.
    pub parked: u64,
    /// Bytes asked for and not received in full.
    pub in_flight: u64,
    /// Why it is slow or does not move; empty when it moves or is done.
    pub hindrance: String,
    /// The first missing ranges, in bytes, at most 1,000 runs.
    pub missing_ranges: ExtentSet,
}

/// The facts that the hindrance is told from.
#[derive(Debug, Clone, Default)]
pub struct Facts {
    /// Blocks are missing.
    pub unfinished: bool,
    /// The origin answers, and since when it does or does not.
    pub connected: bool,
    /// What was said of the link.
    pub link: String,
    /// For how long the link has been as it is.
    pub link_age: Duration,
    /// For how long nothing arrived although it was asked for.
    pub silent: Duration,
    /// The local file has no room.
    pub no_room: bool,
    /// Blocks that the origin says it cannot read.
    pub unreadable: u64,
    /// Reads that wait.
    pub parked: usize,
    /// So many of them may wait for as long as it takes.
    pub most_waiting: usize,
    /// Reads that failed because too many wait.
    pub shed: u64,
    /// The rate now.
    pub rate: u64,
    /// The best rate seen.
    pub best_rate: u64,
    /// The limit.
    pub limit: Option<u64>,
    /// A person paused the hydration.
    pub paused: bool,
    /// It is held back for the medium's sake.
    pub held: bool,
}

/// Below this share of its best rate a hydration is called SLOW.
const SLOW_SHARE: u64 = 8;
/// Silence beyond this is called STALLED: several round trips of any link, and a retransmission.
const SILENCE: Duration = Duration::from_secs(3);

impl Facts {
    /// One word in capitals, a colon, and what a person needs to know; empty if nothing hinders.
    pub fn hindrance(&self) -> String {
        if !self.unfinished {
            return String::new();
        }
        if self.no_room {
            return "STALLED: no room here; hydration is paused, the origin is kept; free space and it goes on".into();
        }
        if self.shed > 0 {
            return format!(
                "STALLED: nothing from the origin, {} reads wait and {} more failed, so that writes go on",
                self.parked, self.shed
            );
        }
        if !self.connected {
            let what = if self.link.is_empty() { "no session yet" } else { &self.link };
            return format!("STALLED: the origin does not answer for {} s ({what})", self.link_age.as_secs());
        }
        if self.parked > self.most_waiting {
            return format!("STALLED: {} reads wait for the origin", self.parked);
        }
        if self.silent > SILENCE {
            return format!("STALLED: nothing from the origin for {} s", self.silent.as_secs());
        }
        if self.unreadable > 0 {
            return format!("SLOW: the origin cannot read {} blocks; they are tried again", self.unreadable);
        }
        if self.paused {
            return "PAUSED: only what somebody reads is fetched".into();
        }
        if self.held {
            return "THROTTLED: the local disk takes no more for now".into();
        }
        match self.limit {
            Some(limit) if self.rate.saturating_mul(5) >= limit.saturating_mul(4) || limit < self.best_rate => {
                format!("THROTTLED: limited to {}/s", decant_base::Bytes(limit))
            }
            _ if self.rate < self.best_rate / SLOW_SHARE => {
                format!("SLOW: {}/s, was {}/s", decant_base::Bytes(self.rate), decant_base::Bytes(self.best_rate))
            }
            _ => String::new(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_rate_forgets() {
        let mut rate = Rate::default();
        let at = |ms| Duration::from_millis(ms);
        for ms in (0..3000).step_by(10) {
            rate.add(at(10_000 + ms), 1000);
        }
        let now = rate.per_second(at(12_999));
        assert!((95_000..=105_000).contains(&now), "{now}");
        assert_eq!(rate.per_second(at(60_000)), 0);
    }

    #[test]
    fn each_hindrance_has_its_word() {
        let base = Facts {
            unfinished: true,
            connected: true,
            most_waiting: 96,
            rate: 100,
            best_rate: 100,
            ..Facts::default()
        };
        let check = |facts: Facts, word: &str| {
            assert!(facts.hindrance().starts_with(word), "{:?} is not {word}", facts.hindrance())
        };
        assert_eq!(base.hindrance(), "");
        check(Facts { no_room: true, ..base.clone() }, "STALLED");
        check(Facts { connected: false, ..base.clone() }, "STALLED");
        check(Facts { parked: 97, ..base.clone() }, "STALLED: 97 reads wait");
        check(
            Facts { parked: 96, shed: 3, ..base.clone() },
            "STALLED: nothing from the origin, 96 reads wait and 3 more",
        );
        check(Facts { silent: Duration::from_secs(4), ..base.clone() }, "STALLED");
        check(Facts { limit: Some(100), ..base.clone() }, "THROTTLED");
        check(Facts { held: true, ..base.clone() }, "THROTTLED: the local disk");
        // Whoever paused it is not told of a disk that is slow.
        check(Facts { paused: true, held: true, ..base.clone() }, "PAUSED");
        check(Facts { parked: 97, most_waiting: 1000, paused: true, ..base.clone() }, "PAUSED");
        check(Facts { rate: 5, ..base.clone() }, "SLOW");
        assert_eq!(Facts { unfinished: false, no_room: true, ..base }.hindrance(), "");
    }
}
