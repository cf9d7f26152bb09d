//! What to fetch next: what reads wait for, then what failed before, then the surroundings of recent reads, then the rest in order.

use std::ops::Range;
use std::time::Duration;

use decant_base::BLOCK;

use super::{Class, CloneCore, InFlight, Plan, blocks_of};
use crate::blocks::State;

/// Blocks in a region that a guest's read marks as hot: the hydration takes the rest of it next. 1 MiB.
const HOT_REGION: u64 = 256;
/// Hot regions remembered.
const HOT_REGIONS: usize = 64;
/// Blocks of one fetch that a read waits for: 32 MiB, as much as an origin takes at a time.
const MAX_FETCH: u64 = 8192;
/// Bulk fetches in flight, so that a fragmented volume's many short runs stay bounded.
const MAX_BULK_FETCHES: usize = 256;

impl<W> CloneCore<W> {
    pub(super) fn heat(&mut self, block: u64) {
        let start = block / HOT_REGION * HOT_REGION;
        let region = start..(start + HOT_REGION).min(self.map.shape().blocks());
        if !self.hot.contains(&region) {
            self.hot.push_front(region);
            self.hot.truncate(HOT_REGIONS);
        }
    }

    pub(super) fn demand(&mut self, now: Duration, blocks: Range<u64>, plans: &mut Vec<Plan>) {
        let mut at = blocks.start;
        while let Some(run) = self.fetchable(at..blocks.end, MAX_FETCH) {
            at = run.end;
            self.retry.iter_mut().for_each(|(range, due)| {
                if range.start < run.end && run.start < range.end {
                    *due = now;
                }
            });
            self.send(now, run, Class::Demand, plans);
        }
    }

    /// The first run of blocks, at most `limit`, that are missing and not in flight.
    fn fetchable(&self, within: Range<u64>, limit: u64) -> Option<Range<u64>> {
        let mut at = within.start;
        while at < within.end {
            if let Some((_, covering)) = self.in_flight.range(..=at).next_back().filter(|(_, fetch)| fetch.end > at) {
                at = covering.end;
                continue;
            }
            let next_start = self.in_flight.range(at..).next().map_or(within.end, |(&start, _)| start).min(within.end);
            if let Some(run) = self.map.next_in(at..next_start, State::Missing) {
                return Some(run.start..run.end.min(run.start.saturating_add(limit)));
            }
            at = next_start;
        }
        None
    }

    fn send(&mut self, now: Duration, blocks: Range<u64>, class: Class, plans: &mut Vec<Plan>) {
        if self.in_flight.is_empty() {
            self.last_arrival = now;
        }
        let bytes = (blocks.end - blocks.start) * BLOCK;
        let bulk = (class == Class::Bulk).then_some(bytes);
        if bulk.is_some() {
            self.bulk_in_flight += bytes;
            self.bulk_fetches += 1;
        }
        let token = self.next_id;
        self.next_id += 1;
        self.tokens.insert(token, blocks.start);
        self.in_flight.insert(blocks.start, InFlight { end: blocks.end, class, sent: self.pace.sent(now, bulk) });
        plans.push(Plan { token, blocks, class });
    }

    /// Fetches to send now, besides those that reads asked for.
    pub fn poll(&mut self, now: Duration, plans: &mut Vec<Plan>) {
        self.demand_again(now, plans);
        if self.no_room_until.is_some_and(|until| until <= now) {
            self.no_room_until = None;
        }
        if !self.connected || !self.hydrate || self.paused || self.no_room_until.is_some() {
            return;
        }
        loop {
            let run = self.pace.run(now);
            let fits = self.bulk_in_flight == 0 || self.bulk_in_flight + run <= self.pace.window(now);
            if !fits || self.bulk_fetches >= MAX_BULK_FETCHES || self.pace.held_until(now).is_some() {
                return;
            }
            let Some(blocks) = self.next_bulk(now, run / BLOCK) else { return };
            self.send(now, blocks, Class::Bulk, plans);
        }
    }

    /// A fetch may end with blocks left missing (a write was under way): reads that wait for them ask again.
    fn demand_again(&mut self, now: Duration, plans: &mut Vec<Plan>) {
        if self.parked.is_empty() {
            return;
        }
        let wanted: Vec<_> =
            self.parked.ranges().map(blocks_of).filter_map(|blocks| self.fetchable(blocks, u64::MAX)).collect();
        for blocks in wanted {
            self.demand(now, blocks, plans);
        }
    }

    fn next_bulk(&mut self, now: Duration, limit: u64) -> Option<Range<u64>> {
        while let Some(index) = self.retry.iter().position(|(_, due)| *due <= now) {
            let (range, _) = self.retry.swap_remove(index);
            if let Some(run) = self.fetchable(range.clone(), limit) {
                if run.end < range.end {
                    self.retry.push((run.end..range.end, now));
                }
                return Some(run);
            }
        }
        while let Some(region) = self.hot.front().cloned() {
            if let Some(run) = self.not_deferred(region, limit) {
                return Some(run);
            }
            self.hot.pop_front();
        }
        if self.exhausted || self.boots_until(now).is_some() {
            return None;
        }
        let end = self.map.shape().blocks();
        let found = self.not_deferred(self.cursor..end, limit).or_else(|| self.not_deferred(0..self.cursor, limit));
        match &found {
            Some(run) => self.cursor = run.end,
            None => self.exhausted = true,
        }
        found
    }

    /// When the boot under way is taken to be over; `None` if there is none.
    fn boots_until(&mut self, now: Duration) -> Option<Duration> {
        let until = self.boot.map(|boot| boot.quiet.min(boot.end))?;
        if until <= now {
            self.boot = None;
            return None;
        }
        Some(until)
    }

    /// As `fetchable`, without the ranges that wait for their next try.
    fn not_deferred(&self, within: Range<u64>, limit: u64) -> Option<Range<u64>> {
        let mut at = within.start;
        while let Some(run) = self.fetchable(at..within.end, limit) {
            let Some((deferred, _)) =
                self.retry.iter().find(|(range, _)| range.start < run.end && run.start < range.end)
            else {
                return Some(run);
            };
            if run.start < deferred.start {
                return Some(run.start..deferred.start);
            }
            at = deferred.end;
        }
        None
    }

    /// When [`CloneCore::poll`] may have more to send although nothing else happens.
    pub fn next_poll(&mut self, now: Duration) -> Option<Duration> {
        if !self.connected || !self.hydrate || self.paused || self.map.count(State::Missing) == 0 {
            return None;
        }
        let retry = self.retry.iter().map(|(_, due)| *due).min();
        [self.pace.held_until(now), retry, self.no_room_until, self.boots_until(now)].into_iter().flatten().min()
    }

    /// Missing blocks were marked by somebody else (the verification).
    pub fn refill(&mut self) {
        self.exhausted = false;
    }
}
