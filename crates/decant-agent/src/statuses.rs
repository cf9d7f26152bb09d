//! How volumes stand: asked of the plane by at most one thread per volume, and given up on in time by everybody who waits,
//! so that the API answers while a plane hangs.

use std::collections::{HashMap, VecDeque};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use decant_base::{Bytes, VolumeId};
use decant_dataplane::{Command, Outcome, Plane, VolumeStatus};
use tokio::sync::watch;

/// How long a reader waits.
const PATIENCE: Duration = Duration::from_millis(500);
/// An answer this young is given again.
const FRESH: Duration = Duration::from_millis(50);
/// Rates of so many seconds make the range of an ETA.
const RATES: usize = 10;

/// What was measured so lately says something about what a link carries.
const RECENT: Duration = Duration::from_secs(600);
/// What a link is taken to carry, bytes per second, while nothing was measured: Ethernet of 100 Mbit/s to 10 Gbit/s.
pub(crate) const ASSUMED: (Bytes, Bytes) = (Bytes(12_500_000), Bytes(1_250_000_000));

/// What the plane said, or why it said nothing.
pub(crate) type Answer = Result<Arc<VolumeStatus>, String>;

/// Asks the plane.
pub(crate) struct Statuses {
    plane: Arc<dyn Plane>,
    slots: Mutex<HashMap<VolumeId, Arc<Slot>>>,
}

struct Slot {
    state: Mutex<State>,
    answers: watch::Sender<Option<Answer>>,
}

#[derive(Default)]
struct State {
    is_asking: bool,
    asked: Option<Instant>,
    rates: VecDeque<(Instant, u64)>,
}

impl Statuses {
    pub(crate) fn new(plane: Arc<dyn Plane>) -> Self {
        Self { plane, slots: Mutex::default() }
    }

    fn slot(&self, volume: &VolumeId) -> Arc<Slot> {
        let mut slots = self.slots.lock().unwrap_or_else(PoisonError::into_inner);
        let new = || Arc::new(Slot { state: Mutex::default(), answers: watch::Sender::new(None) });
        slots.entry(volume.clone()).or_insert_with(new).clone()
    }

    /// How `volume` stands; within 0.5 s in any case.
    pub(crate) async fn of(&self, volume: &VolumeId) -> Answer {
        let slot = self.slot(volume);
        let mut answers = slot.answers.subscribe();
        {
            let mut state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
            let is_fresh = state.asked.is_some_and(|at| at.elapsed() < FRESH);
            if let (true, false, Some(answer)) = (is_fresh, state.is_asking, slot.answers.borrow().clone()) {
                return answer;
            }
            if !state.is_asking {
                state.is_asking = true;
                self.ask(volume.clone(), slot.clone());
            }
        }
        match tokio::time::timeout(PATIENCE, answers.changed()).await {
            Ok(Ok(())) => answers.borrow().clone().unwrap_or_else(|| Err("the data plane gave no answer".to_owned())),
            _ => Err(format!("the data plane did not answer within {} ms", PATIENCE.as_millis())),
        }
    }

    fn ask(&self, volume: VolumeId, slot: Arc<Slot>) {
        let plane = self.plane.clone();
        tokio::task::spawn_blocking(move || {
            let answer = match plane.perform(&Command::Status { volume }) {
                Ok(Outcome::Status(status)) => Ok(Arc::new(*status)),
                Ok(other) => Err(format!("the data plane answered {other:?} to a question for its status")),
                Err(failure) => Err(failure.message),
            };
            let mut state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
            state.is_asking = false;
            state.asked = Some(Instant::now());
            if let Ok(status) = &answer {
                state.note_rate(status);
            }
            slot.answers.send_replace(Some(answer));
        });
    }

    /// The range of rates at which a volume fills, by the last seconds, bytes per second; 0 if it stands or nothing is known.
    pub(crate) fn rates(&self, volume: &VolumeId) -> (Bytes, Bytes) {
        let slot = self.slot(volume);
        let state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
        let rates: Vec<u64> = state.rates.iter().map(|(_, rate)| *rate).collect();
        let stands = rates.last() == Some(&0);
        range(&rates).filter(|_| !stands).unwrap_or_default()
    }

    /// The range of rates at which any volume filled here in the last ten minutes; `None` if none did.
    pub(crate) fn recent_rates(&self) -> Option<(Bytes, Bytes)> {
        let slots: Vec<Arc<Slot>> =
            self.slots.lock().unwrap_or_else(PoisonError::into_inner).values().cloned().collect();
        let rates_of = |slot: &Arc<Slot>| {
            let state = slot.state.lock().unwrap_or_else(PoisonError::into_inner);
            let recent = state.rates.iter().filter(|(at, _)| at.elapsed() < RECENT);
            recent.map(|(_, rate)| *rate).collect::<Vec<u64>>()
        };
        range(&slots.iter().flat_map(rates_of).collect::<Vec<u64>>())
    }
}

/// The range that measured rates promise; those of 0 are of seconds in which nothing was to be fetched. One second says little
/// of the next: half to twice as much. Several that agree are still no promise: a fifth either way.
fn range(rates: &[u64]) -> Option<(Bytes, Bytes)> {
    let moving = || rates.iter().copied().filter(|rate| *rate > 0);
    let (low, high) = (moving().min()?, moving().max()?);
    if moving().count() == 1 {
        return Some((Bytes(low.div_ceil(2)), Bytes(high.saturating_mul(2))));
    }
    Some((Bytes(low - low / 5), Bytes(high.saturating_add(high / 5))))
}

impl State {
    fn note_rate(&mut self, status: &VolumeStatus) {
        let Some(clone) = &status.clone else { return };
        let now = Instant::now();
        if self.rates.back().is_none_or(|(at, _)| now.duration_since(*at) >= Duration::from_secs(1)) {
            self.rates.push_back((now, clone.rate_bytes_per_s));
        }
        while self.rates.len() > RATES {
            self.rates.pop_front();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_range_of_rates_is_one_also_of_a_single_second() {
        let shown = |rates: &[u64]| range(rates).map(|(low, high)| (low.0, high.0));
        assert_eq!(shown(&[]), None);
        assert_eq!(shown(&[0, 0]), None);
        assert_eq!(shown(&[100]), Some((50, 200)));
        assert_eq!(shown(&[0, 1]), Some((1, 2)));
        assert_eq!(shown(&[100, 100, 0]), Some((80, 120)));
        assert_eq!(shown(&[50, 200]), Some((40, 240)));
    }
}
