//! How far a clone is, and why it is slow.

use std::time::Duration;

use decant_base::{BLOCK, ExtentSet};

use super::CloneCore;
use crate::blocks::State;
use crate::progress::{Facts, Progress};

impl<W> CloneCore<W> {
    /// How far it is. `ranges`: how many missing runs to name.
    pub fn progress(&mut self, now: Duration, ranges: usize) -> Progress {
        let rate = self.rate.per_second(now);
        self.best_rate = self.best_rate.max(rate);
        let in_flight: u64 = self.in_flight.iter().map(|(start, fetch)| (fetch.end - start) * BLOCK).sum();
        let facts = Facts {
            unfinished: self.map.count(State::Missing) > 0,
            connected: self.connected,
            link: self.link.clone(),
            link_age: now.saturating_sub(self.link_since),
            silent: if in_flight > 0 { now.saturating_sub(self.last_arrival) } else { Duration::ZERO },
            no_room: self.no_room_until.is_some(),
            unreadable: self.retry.iter().filter(|(_, due)| *due > now).map(|(range, _)| range.end - range.start).sum(),
            parked: self.parked.len(),
            most_waiting: self.most_waiting,
            shed: self.shed,
            rate,
            best_rate: self.best_rate,
            limit: self.pace.limit(),
            paused: self.paused,
            held: !self.hydrate,
        };
        let bytes = |blocks: u64, state| blocks * BLOCK - self.short_by(state);
        let [missing, filled] = [State::Missing, State::Fetched].map(|state| bytes(self.map.count(state), state));
        let written = bytes(self.map.written_live(), State::Written);
        let discarded = bytes(self.map.discarded_live(), State::Discarded);
        Progress {
            total: missing + filled + written + discarded,
            filled,
            written,
            discarded,
            missing,
            fetched: self.fetched_bytes,
            rate,
            parked: self.parked.len() as u64,
            in_flight,
            hindrance: facts.hindrance(),
            missing_ranges: self.missing_ranges(ranges),
        }
    }

    /// How many bytes of a whole block the last one lacks, if it was live and is in `state`.
    fn short_by(&self, state: State) -> u64 {
        let shape = self.map.shape();
        let last = shape.blocks() - 1;
        let counts = self.map.live().contains(last) && self.map.entry(last).state == state;
        if counts { shape.blocks() * BLOCK - shape.size() } else { 0 }
    }

    fn missing_ranges(&self, limit: usize) -> ExtentSet {
        let mut ranges = ExtentSet::new();
        let mut at = 0;
        for _ in 0..limit {
            let Some(run) = self.map.next_in(at..self.map.shape().blocks(), State::Missing) else { break };
            at = run.end;
            ranges.insert(self.map.shape().bytes_of(run));
        }
        ranges
    }
}
