//! Figures from what the client saw: gaps, percentiles, the brownout. Times are nanoseconds of CLOCK_MONOTONIC.

use serde::Serialize;

use super::client::Read;
use super::ledger::Acknowledged;

/// Reads in one window of the brownout's search: enough for a p99 that means the second worst of two hundred.
const WINDOW: usize = 200;
/// A window's p99 up to this many times the p99 before counts as recovered.
const RECOVERED: f64 = 1.2;

/// A percentile before the drain, while the clone fills, and after.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize)]
pub(crate) struct Phases {
    pub(crate) before: u64,
    pub(crate) hydrating: u64,
    pub(crate) after: u64,
}

/// The longest time between two acknowledged writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Gap {
    /// The last acknowledgement before it.
    pub(crate) from_ns: u64,
    /// The first after it.
    pub(crate) to_ns: u64,
}

impl Gap {
    /// Its length in milliseconds.
    pub(crate) fn millis(self) -> f64 {
        (self.to_ns - self.from_ns) as f64 / 1e6
    }
}

/// The longest gap that touches the time from `from_ns` to `to_ns`.
pub(crate) fn longest_gap(acknowledged: &[Acknowledged], from_ns: u64, to_ns: u64) -> Option<Gap> {
    acknowledged
        .windows(2)
        .map(|pair| Gap { from_ns: pair[0].acknowledged_ns, to_ns: pair[1].acknowledged_ns })
        .filter(|gap| gap.to_ns >= from_ns && gap.from_ns <= to_ns)
        .max_by_key(|gap| gap.to_ns - gap.from_ns)
}

/// The `p`th percentile by nearest rank, 0 for no values. `p` from 0 to 100.
pub(crate) fn percentile(values: &mut [u64], p: f64) -> u64 {
    values.sort_unstable();
    let rank = (p / 100.0 * values.len() as f64).ceil() as usize;
    values.get(rank.clamp(1, values.len().max(1)) - 1).copied().unwrap_or(0)
}

/// The middle value, the mean of two for an even count; 0 for none.
pub(crate) fn median(mut values: Vec<f64>) -> f64 {
    values.sort_unstable_by(f64::total_cmp);
    match values.len() {
        0 => 0.0,
        n if n % 2 == 1 => values[n / 2],
        n => (values[n / 2 - 1] + values[n / 2]) / 2.0,
    }
}

/// Read latency in microseconds, p50 and p99, by phase. A read that overlaps the gap is the interruption's and is in no
/// phase: before ends where the gap begins, hydrating begins where it ends.
pub(crate) fn read_phases(reads: &[Read], before_from_ns: u64, gap: Gap, hydrated_ns: u64) -> (Phases, Phases) {
    let within = |from: u64, to: u64| -> Vec<u64> {
        let inside = reads.iter().filter(|read| read.at_ns >= from && read.at_ns + read.took_ns <= to);
        inside.map(|read| read.took_ns / 1_000).collect()
    };
    let mut phases =
        [within(before_from_ns, gap.from_ns), within(gap.to_ns, hydrated_ns), within(hydrated_ns, u64::MAX)];
    let mut at = |p: f64| {
        let [before, hydrating, after] = &mut phases;
        Phases { before: percentile(before, p), hydrating: percentile(hydrating, p), after: percentile(after, p) }
    };
    (at(50.0), at(99.0))
}

/// From the end of the gap until reads are as fast as before: the start of the first window of 200 reads
/// whose p99 is within 1.2 x of `p99_before_us`. `None` if no such window was seen.
pub(crate) fn brownout_ms(reads: &[Read], gap: Gap, p99_before_us: u64) -> Option<f64> {
    let after: Vec<&Read> = reads.iter().filter(|read| read.at_ns >= gap.to_ns).collect();
    let bound = p99_before_us as f64 * RECOVERED;
    let recovered = after.windows(WINDOW).find(|window| {
        let mut took: Vec<u64> = window.iter().map(|read| read.took_ns / 1_000).collect();
        percentile(&mut took, 99.0) as f64 <= bound
    })?;
    // A window that is good from the first read on is no brownout at all.
    let first = after.first().map_or(gap.to_ns, |read| read.at_ns);
    Some((recovered.first()?.at_ns - first) as f64 / 1e6)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn acknowledged(at_ns: u64) -> Acknowledged {
        let (key, reference) = (String::new(), String::new());
        Acknowledged { key, reference, quantity: 1, id: 1, sent_ns: at_ns, acknowledged_ns: at_ns, tries: 1 }
    }

    #[test]
    fn the_longest_gap_is_found_where_it_is_looked_for() {
        let writes: Vec<_> = [0, 10, 20, 95, 100, 110, 300].map(acknowledged).into();
        assert_eq!(longest_gap(&writes, 0, 110), Some(Gap { from_ns: 110, to_ns: 300 }), "a gap that touches counts");
        assert_eq!(longest_gap(&writes, 0, 105), Some(Gap { from_ns: 20, to_ns: 95 }));
        assert_eq!(longest_gap(&writes[..1], 0, 105), None);
    }

    #[test]
    fn percentiles_are_nearest_rank() {
        let mut values: Vec<u64> = (1..=200).rev().collect();
        assert_eq!((percentile(&mut values, 50.0), percentile(&mut values, 99.0)), (100, 198));
        assert_eq!(percentile(&mut [7], 99.0), 7);
        assert_eq!(percentile(&mut [], 99.0), 0);
        assert_eq!(median(vec![3.0, 1.0, 2.0]), 2.0);
        assert_eq!(median(vec![4.0, 1.0]), 2.5);
    }

    #[test]
    fn phases_leave_the_gap_out() {
        let read = |at_ns: u64, took_us: u64| Read { at_ns: at_ns * 1_000_000, took_ns: took_us * 1_000 };
        let gap = Gap { from_ns: 50_000_000, to_ns: 100_000_000 };
        let mut reads: Vec<Read> = (0..49).map(|ms| read(ms, 100)).collect();
        reads.push(read(49, 51_000)); // parked through the gap
        reads.extend((100..200).map(|ms| read(ms, 900)));
        reads.extend((200..500).map(|ms| read(ms, 110)));
        let (p50, p99) = read_phases(&reads, 0, gap, 200_000_000);
        assert_eq!(p50, Phases { before: 100, hydrating: 900, after: 110 });
        assert_eq!(p99, p50);
        let brownout = brownout_ms(&reads, gap, p99.before).expect("reads recovered");
        assert!((95.0..=101.0).contains(&brownout), "{brownout}");
        assert_eq!(brownout_ms(&reads[..150], gap, p99.before), None, "too few reads to tell");
    }
}
