//! How much the hydration may have in flight.
//!
//! The window follows bandwidth x round trip, both measured: the best delivery rate of the last two seconds and the shortest
//! time to a first byte of the last twenty. Twice that product keeps a long link full and doubles each round trip while it is not;
//! a window that is too large only lengthens the queue that a guest's read waits in, so it shrinks while such reads come: to the
//! product itself, which fills the link and leaves next to no queue. What is measured then is our own restraint and not
//! the link, so the window is whole for one round trip in each second, and while the rate still grows.

use std::time::Duration;

/// The shortest run worth a request of its own.
pub const MIN_RUN: u64 = 64 << 10;
/// The longest: beyond it, overhead per request no longer shows.
pub const MAX_RUN: u64 = 1 << 20;
/// The most in flight: 5 GB/s at 13 ms, or 640 MB/s at 100 ms.
pub const MAX_WINDOW: u64 = 64 << 20;
/// A run should not keep a link busy for longer than this, as a guest's read may queue behind it.
const RUN_TIME: Duration = Duration::from_millis(4);
/// After a guest's read of a missing block, or a flush, the hydration holds back this long.
const YIELD_TIME: Duration = Duration::from_millis(50);
const RATE_SPAN: Duration = Duration::from_secs(1);
/// A rate that has not grown for so many round trips is the link's.
const GROWTH_TRIPS: u128 = 3;
const TRIP_SPAN: Duration = Duration::from_secs(10);

/// Best of the current and the previous span.
#[derive(Debug, Clone, Copy, Default)]
struct Best {
    since: Duration,
    now: Option<u64>,
    before: Option<u64>,
}

impl Best {
    fn add(&mut self, now: Duration, span: Duration, sample: u64, better: fn(u64, u64) -> u64) {
        if now.saturating_sub(self.since) >= span {
            self.before = self.now.take();
            self.since = now;
        }
        self.now = Some(self.now.map_or(sample, |best| better(best, sample)));
    }

    fn best(&self, better: fn(u64, u64) -> u64) -> Option<u64> {
        match (self.now, self.before) {
            (Some(a), Some(b)) => Some(better(a, b)),
            (a, b) => a.or(b),
        }
    }
}

/// What a fetch remembers, to become a sample when it is answered.
#[derive(Debug, Clone, Copy)]
pub struct Sent {
    at: Duration,
    delivered: u64,
    answered: bool,
}

/// Window, run length and rate limit.
#[derive(Debug)]
pub struct Pace {
    delivered: u64,
    rate: Best,
    /// When more was measured than before, by a quarter or more.
    grew: Duration,
    trip: Best,
    foreground: Option<Duration>,
    limit: Option<u64>,
    tokens: i64,
    refilled: Duration,
}

impl Pace {
    /// No samples, no limit.
    pub fn new(now: Duration) -> Self {
        Self {
            delivered: 0,
            rate: Best::default(),
            grew: now,
            trip: Best::default(),
            foreground: None,
            limit: None,
            tokens: 0,
            refilled: now,
        }
    }

    /// Limits the hydration to so many bytes a second, or lifts the limit; takes effect at once.
    pub fn set_limit(&mut self, now: Duration, limit: Option<u64>) {
        self.refill(now);
        self.limit = limit.map(|rate| rate.max(1));
        self.tokens = self.tokens.min(self.burst()).max(0);
    }

    /// The limit.
    pub fn limit(&self) -> Option<u64> {
        self.limit
    }

    /// 50 ms worth, at least one short run.
    fn burst(&self) -> i64 {
        self.limit.map_or(0, |rate| (rate / 20).max(MIN_RUN)).min(1 << 40) as i64
    }

    fn refill(&mut self, now: Duration) {
        if let Some(rate) = self.limit {
            let earned = u128::from(rate) * now.saturating_sub(self.refilled).as_nanos() / 1_000_000_000;
            if earned == 0 {
                return;
            }
            // Credit for holes is kept, and does not grow by itself.
            let most = self.burst().max(self.tokens);
            self.tokens = self.tokens.saturating_add(earned.min(1 << 40) as i64).min(most);
        }
        self.refilled = now;
    }

    /// When the limit lets the next run go; `None`: now.
    pub fn held_until(&mut self, now: Duration) -> Option<Duration> {
        self.refill(now);
        let rate = self.limit?;
        if self.tokens > 0 {
            return None;
        }
        let nanos = u128::from(self.tokens.unsigned_abs() + 1) * 1_000_000_000 / u128::from(rate);
        Some(now + Duration::from_nanos(nanos.min(u128::from(u64::MAX)) as u64 + 1))
    }

    /// A guest's read needs the link, or its flush the medium.
    pub fn foreground(&mut self, now: Duration) {
        self.foreground = Some(now);
    }

    fn yields(&self, now: Duration) -> bool {
        self.foreground.is_some_and(|at| now.saturating_sub(at) < YIELD_TIME)
    }

    /// Bytes of the next run, a multiple of 64 KiB.
    pub fn run(&self, now: Duration) -> u64 {
        let Some(rate) = self.rate.best(u64::max) else { return 4 * MIN_RUN };
        let run = (u128::from(rate) * RUN_TIME.as_nanos() / 1_000_000_000) as u64;
        let run = if self.yields(now) { run / 4 } else { run };
        // Under a limit short runs make it smooth.
        let run = self.limit.map_or(run, |limit| run.min(limit / 20));
        (run / MIN_RUN * MIN_RUN).clamp(MIN_RUN, MAX_RUN)
    }

    /// Bytes that the hydration may have in flight; never less than one run, so that it progresses under any load.
    pub fn window(&self, now: Duration) -> u64 {
        let run = self.run(now);
        // Our own queue lengthens the trips we measure: for three of them in ten seconds it is let run empty.
        let trip = self.trip.best(u64::min).unwrap_or(0).min(1_000_000_000);
        if now > TRIP_SPAN && now.as_nanos() % TRIP_SPAN.as_nanos() < 3 * u128::from(trip) {
            return run;
        }
        let product = match (self.rate.best(u64::max), self.trip.best(u64::min)) {
            (Some(rate), Some(trip)) => {
                (u128::from(rate) * u128::from(trip) / 1_000_000_000).min(u128::from(MAX_WINDOW)) as u64
            }
            _ => 2 * run,
        };
        let grows = now.saturating_sub(self.grew).as_nanos() < GROWTH_TRIPS * u128::from(trip);
        let measures = grows || now.as_nanos() % RATE_SPAN.as_nanos() < u128::from(trip);
        if self.yields(now) && !measures {
            product.next_multiple_of(run).clamp(run, MAX_WINDOW)
        } else {
            (product * 2).clamp(4 * run, MAX_WINDOW)
        }
    }

    /// A fetch goes out; `bulk` bytes count against the limit (a guest's read is not held by it, and not charged).
    pub fn sent(&mut self, now: Duration, bulk: Option<u64>) -> Sent {
        if let (Some(bytes), Some(_)) = (bulk, self.limit) {
            self.tokens = self.tokens.saturating_sub(bytes.min(1 << 40) as i64);
        }
        Sent { at: now, delivered: self.delivered, answered: false }
    }

    /// So much of a fetch that was charged was a hole, and cost nothing: its charge is given back, and as much credit again, so
    /// that a long link is full of such questions soon. A second's worth at most, which is what may come beyond the limit where
    /// data follows holes.
    pub fn give_back(&mut self, bytes: u64) {
        let Some(rate) = self.limit else { return };
        let most = (rate.min(1 << 40) as i64).max(self.burst());
        self.tokens = self.tokens.saturating_add(2 * bytes.min(1 << 40) as i64).min(most);
    }

    /// Bytes of a fetch arrived.
    pub fn arrived(&mut self, now: Duration, sent: &mut Sent, bytes: u64) {
        self.delivered += bytes;
        if !sent.answered {
            sent.answered = true;
            let trip = now.saturating_sub(sent.at).as_nanos().min(u128::from(u64::MAX)) as u64;
            self.trip.add(now, TRIP_SPAN, trip.max(1), u64::min);
        }
    }

    /// A fetch was answered in full.
    pub fn answered(&mut self, now: Duration, sent: &Sent) {
        let elapsed = now.saturating_sub(sent.at).as_nanos();
        let bytes = self.delivered.saturating_sub(sent.delivered);
        if elapsed > 0 && bytes > 0 {
            let rate = (u128::from(bytes) * 1_000_000_000 / elapsed).min(u128::from(u64::MAX >> 16)) as u64;
            if self.rate.best(u64::max).is_none_or(|best| rate > best / 4 * 5) {
                self.grew = now;
            }
            self.rate.add(now, RATE_SPAN, rate, u64::max);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::VecDeque;

    use super::*;

    /// What became of a hydration.
    struct Seen {
        /// Bytes per second over the last half of the time.
        got: u64,
        /// The most in flight.
        most: u64,
        /// How long a guest's read would have queued at the link before its own bytes: the median of the last half.
        queue: Duration,
    }

    /// A link of `rate` bytes a second and `trip` round trip.
    fn run_link(rate: u64, trip: Duration, limit: Option<u64>, guest: bool) -> Seen {
        let span = Duration::from_secs(4);
        let mut now = Duration::ZERO;
        let mut pace = Pace::new(now);
        pace.set_limit(now, limit);
        let (mut queue, mut in_flight, mut link_free) = (VecDeque::new(), 0, Duration::ZERO);
        let (mut late, mut most, mut queues) = (0, 0, Vec::new());
        while now < span {
            if guest {
                pace.foreground(now);
            }
            let run = pace.run(now);
            let mut held = None;
            while in_flight + run <= pace.window(now) || in_flight == 0 {
                held = pace.held_until(now);
                if held.is_some() {
                    break;
                }
                let sent = pace.sent(now, Some(run));
                let transfer = Duration::from_nanos(run * 1_000_000_000 / rate);
                link_free = link_free.max(now + trip / 2) + transfer;
                queue.push_back((link_free + trip / 2, run, sent));
                in_flight += run;
            }
            most = most.max(in_flight);
            if now > span / 2 {
                queues.push(link_free.saturating_sub(now + trip / 2));
            }
            let next = queue.front().map(|entry| entry.0);
            now = match (next, held) {
                (Some(a), Some(b)) => a.min(b),
                (a, b) => a.or(b).unwrap(),
            };
            while queue.front().is_some_and(|entry| entry.0 <= now) {
                let (_, run, mut sent) = queue.pop_front().unwrap();
                pace.arrived(now, &mut sent, run);
                pace.answered(now, &sent);
                in_flight -= run;
                late += if now > span / 2 { run } else { 0 };
            }
        }
        queues.sort();
        Seen { got: late / 2, most, queue: queues[queues.len() / 2] }
    }

    #[test]
    fn a_link_is_full_at_any_distance() {
        for (rate, trip) in
            [(25_000_000, 5), (125_000_000, 40), (1_000_000_000, 20), (125_000_000, 150), (1_000_000, 1)]
        {
            let Seen { got, most, .. } = run_link(rate, Duration::from_millis(trip), None, false);
            assert!(got > rate * 9 / 10, "{rate} B/s at {trip} ms: {got} with at most {most} in flight");
            let product = rate * trip / 1000;
            assert!(most <= 3 * product + 6 * MAX_RUN, "{rate} B/s at {trip} ms: {most} in flight");
        }
    }

    #[test]
    fn a_limit_holds_and_a_guest_is_let_through() {
        for limit in [100_000, 5_000_000, 80_000_000] {
            let Seen { got, .. } = run_link(125_000_000, Duration::from_millis(5), Some(limit), false);
            assert!(got <= limit * 11 / 10 && got >= limit * 9 / 10, "limit {limit}: {got}");
        }
        for (rate, trip) in [(25_000_000, 5), (25_000_000, 10), (125_000_000, 80)] {
            let trip = Duration::from_millis(trip);
            let Seen { got, queue, .. } = run_link(rate, trip, None, true);
            assert!(got > rate / 4 * 3, "{rate} B/s at {trip:?}: progress under load: {got}");
            let runs = Duration::from_nanos(3 * MIN_RUN * 1_000_000_000 / rate);
            assert!(queue <= runs.max(trip / 2), "{rate} B/s at {trip:?}: a guest's read queues for {queue:?}");
        }
    }
}
