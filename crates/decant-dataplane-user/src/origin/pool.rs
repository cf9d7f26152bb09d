//! Which connection asks for what.

use std::collections::VecDeque;
use std::sync::{Mutex, MutexGuard, PoisonError};

use crate::device::Fetch;

/// A fetch and how far it is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Job {
    pub(super) fetch: Fetch,
    /// The first byte that is still to be asked for.
    pub(super) next: u64,
    /// Ask for it in one chunk: the server's own cuts are not at block boundaries.
    pub(super) unfragmented: bool,
    /// A piece of the answer under way was not whole blocks and was dropped.
    pub(super) cut: bool,
}

impl Job {
    pub(super) fn new(fetch: Fetch) -> Self {
        Self { fetch, next: fetch.offset, unfragmented: false, cut: false }
    }

    /// Bytes still to be asked for.
    pub(super) fn left(&self) -> u64 {
        (self.fetch.offset + u64::from(self.fetch.length)).saturating_sub(self.next)
    }
}

/// A connection's queue.
#[derive(Debug, Default)]
struct Lane {
    up: bool,
    queue: VecDeque<Job>,
    /// Bytes queued or asked for here and not answered.
    load: u64,
}

#[derive(Debug)]
struct State {
    lanes: Vec<Lane>,
    /// Jobs of no lane, while none is up.
    homeless: VecDeque<Job>,
}

/// The queues of all connections. The first lane is for urgent jobs while another is up; each job goes to the least loaded
/// lane of its kind, to a lane of the other kind if there is no other, and waits if none is up.
#[derive(Debug)]
pub(super) struct Pool {
    state: Mutex<State>,
}

impl Pool {
    pub(super) fn new(lanes: usize) -> Self {
        let lanes = (0..lanes).map(|_| Lane::default()).collect();
        Self { state: Mutex::new(State { lanes, homeless: VecDeque::new() }) }
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Takes a job; gives the lane to kick.
    pub(super) fn submit(&self, job: Job) -> Option<usize> {
        self.lock().route(job)
    }

    /// The next job of a lane.
    pub(super) fn take(&self, lane: usize) -> Option<Job> {
        self.lock().lanes.get_mut(lane)?.queue.pop_front()
    }

    /// A job of this lane is answered.
    pub(super) fn answered(&self, lane: usize, job: &Job) {
        if let Some(lane) = self.lock().lanes.get_mut(lane) {
            lane.load = lane.load.saturating_sub(job.fetch.length.into());
        }
    }

    /// A lane's session is up; jobs that waited for any, or on a lane of the other kind, are given out. Gives the lanes to
    /// kick, as bits.
    pub(super) fn up(&self, lane: usize) -> u32 {
        let mut state = self.lock();
        if let Some(lane) = state.lanes.get_mut(lane) {
            lane.up = true;
        }
        let mut jobs = std::mem::take(&mut state.homeless);
        for (index, lane) in state.lanes.iter_mut().enumerate() {
            let misplaced = |job: &Job| (index == 0) != job.fetch.urgent;
            let (moved, kept): (VecDeque<Job>, _) = lane.queue.drain(..).partition(misplaced);
            lane.queue = kept;
            lane.load -= moved.iter().map(|job| u64::from(job.fetch.length)).sum::<u64>().min(lane.load);
            jobs.extend(moved);
        }
        state.route_all(jobs)
    }

    /// A lane's session broke; its jobs, also those that were asked for (`owed`), go elsewhere, the owed ones first. Gives the
    /// lanes to kick, as bits.
    pub(super) fn down(&self, lane: usize, owed: impl Iterator<Item = Job>) -> u32 {
        let mut state = self.lock();
        let mut jobs: VecDeque<Job> = owed.collect();
        if let Some(lane) = state.lanes.get_mut(lane) {
            lane.up = false;
            lane.load = 0;
            jobs.append(&mut lane.queue);
        }
        state.route_all(jobs)
    }
}

impl State {
    fn route_all(&mut self, jobs: VecDeque<Job>) -> u32 {
        jobs.into_iter().filter_map(|job| self.route(job)).fold(0, |lanes, lane| lanes | 1 << lane)
    }

    fn route(&mut self, job: Job) -> Option<usize> {
        let mut best: Option<(bool, u64, usize)> = None;
        for (index, lane) in self.lanes.iter().enumerate().filter(|(_, lane)| lane.up) {
            let of_other_kind = (index == 0) != job.fetch.urgent;
            let candidate = (of_other_kind, lane.load, index);
            if best.is_none_or(|best| candidate < best) {
                best = Some(candidate);
            }
        }
        let Some((_, _, index)) = best else {
            self.homeless.push_back(job);
            return None;
        };
        let lane = self.lanes.get_mut(index)?;
        lane.load += u64::from(job.fetch.length);
        // Ahead of what is not urgent, behind what is.
        let place =
            if job.fetch.urgent { lane.queue.partition_point(|other| other.fetch.urgent) } else { lane.queue.len() };
        lane.queue.insert(place, job);
        Some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::device::Want;

    fn job(token: u64, length: u32, urgent: bool) -> Job {
        Job::new(Fetch { token, offset: 0, length, want: Want::Data, urgent })
    }

    fn tokens(pool: &Pool, lane: usize) -> Vec<u64> {
        std::iter::from_fn(|| pool.take(lane)).map(|job| job.fetch.token).collect()
    }

    #[test]
    fn urgent_jobs_have_the_first_lane_and_others_the_least_loaded() {
        let pool = Pool::new(3);
        assert_eq!((pool.up(0), pool.up(1), pool.up(2)), (0, 0, 0));
        assert_eq!(pool.submit(job(1, 100, true)), Some(0));
        assert_eq!(pool.submit(job(2, 1000, false)), Some(1));
        assert_eq!(pool.submit(job(3, 100, false)), Some(2));
        assert_eq!(pool.submit(job(4, 100, false)), Some(2));
        assert_eq!(pool.submit(job(5, 100, true)), Some(0));
        assert_eq!((tokens(&pool, 0), tokens(&pool, 1), tokens(&pool, 2)), (vec![1, 5], vec![2], vec![3, 4]));
        // What was taken still counts until it is answered.
        assert_eq!(pool.submit(job(6, 900, false)), Some(2));
        pool.answered(1, &job(2, 1000, false));
        assert_eq!(pool.submit(job(7, 100, false)), Some(1));
    }

    #[test]
    fn jobs_outlive_their_lanes() {
        let pool = Pool::new(3);
        assert_eq!(pool.submit(job(1, 100, false)), None);
        assert_eq!(pool.submit(job(2, 100, true)), None);
        // The first lane takes what there is; the next one up relieves it of what it has not taken yet.
        assert_eq!(pool.up(0), 0b001);
        assert_eq!(pool.up(1), 0b010);
        assert_eq!((tokens(&pool, 0), tokens(&pool, 1)), (vec![2], vec![1]));
        assert_eq!(pool.up(2), 0);
        // Its end: what it owed goes first, ahead of what it had not taken; urgent jobs ahead of all.
        assert_eq!(pool.submit(job(3, 100, false)), Some(2));
        assert_eq!(pool.submit(job(4, 100, true)), Some(0));
        assert_eq!(pool.down(1, [job(1, 100, false)].into_iter()), 0b100);
        assert_eq!(pool.down(0, [job(2, 100, true)].into_iter()), 0b100);
        assert_eq!(tokens(&pool, 2), [2, 4, 3, 1]);
        // And with the last lane gone they wait for any.
        assert_eq!(pool.down(2, [job(3, 100, false), job(2, 100, true)].into_iter()), 0);
        assert_eq!(pool.up(1), 0b010);
        assert_eq!(tokens(&pool, 1), [2, 3]);
    }
}
