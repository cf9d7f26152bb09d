//! One timer per machine and per drain; setting it again replaces it.

use std::collections::{BTreeSet, HashMap};
use std::time::Duration;

use decant_base::{DrainId, MachineId};

/// Whose timer.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Subject {
    Machine(MachineId),
    Drain(DrainId),
}

/// The host's clock may jump, and a sleeping thread does not see it: look at least so often.
const LONGEST_SLEEP: Duration = Duration::from_secs(5);

/// Timers by time of day.
#[derive(Debug, Default)]
pub(super) struct Timers {
    by_time: BTreeSet<(u64, Subject)>,
    by_subject: HashMap<Subject, u64>,
}

impl Timers {
    pub(super) fn set(&mut self, subject: Subject, at_ms: u64) {
        if let Some(old) = self.by_subject.insert(subject.clone(), at_ms) {
            self.by_time.remove(&(old, subject.clone()));
        }
        self.by_time.insert((at_ms, subject));
    }

    /// Takes one that is due.
    pub(super) fn take_due(&mut self, now_ms: u64) -> Option<Subject> {
        let (at_ms, _) = self.by_time.first()?;
        if *at_ms > now_ms {
            return None;
        }
        let (_, subject) = self.by_time.pop_first()?;
        self.by_subject.remove(&subject);
        Some(subject)
    }

    /// How long nothing is due.
    pub(super) fn idle(&self, now_ms: u64) -> Duration {
        let next = self.by_time.first().map(|(at_ms, _)| Duration::from_millis(at_ms.saturating_sub(now_ms)));
        next.unwrap_or(LONGEST_SLEEP).min(LONGEST_SLEEP)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_last_setting_counts() {
        let machine = |name: &str| Subject::Machine(MachineId::new(name).expect("a label"));
        let mut timers = Timers::default();
        assert_eq!(timers.idle(0), LONGEST_SLEEP);
        timers.set(machine("a"), 100);
        timers.set(machine("b"), 50);
        timers.set(machine("a"), 20);
        assert_eq!(timers.idle(5), Duration::from_millis(15));
        assert_eq!(timers.take_due(19), None);
        assert_eq!(timers.take_due(60), Some(machine("a")));
        assert_eq!(timers.take_due(60), Some(machine("b")));
        assert_eq!(timers.take_due(200), None);
    }
}
