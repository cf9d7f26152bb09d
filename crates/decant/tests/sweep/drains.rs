//! Drains, and what ends them.

use std::time::{Duration, Instant};

use super::{DESTINATION, Run, SOURCE, Way};
use crate::fleet;

/// An agent answers about a drain within what it gives its peers, 0.9 s, and a little; one that stands still does not.
const ANSWER: Duration = Duration::from_millis(1_500);

/// Ends of a drain, as the API says them.
const OVER: [&str; 3] = ["drained", "cancelled", "deadline"];

impl Run<'_> {
    /// One drain of the source, to its end or to what ends it.
    pub(super) fn drain(&mut self) {
        let (from, to) = (self.name(SOURCE), self.name(DESTINATION));
        let (is_halted, is_blocked) =
            (matches!(self.way, Way::CancelledDrain | Way::LateDrain), self.way == Way::BlockedDrain);
        let early = self.restart_watched(&[SOURCE]);
        if is_halted {
            // The machine's move does not get on meanwhile.
            self.restart_to_stop_at(DESTINATION, "send:prepare-ok:before");
        }
        if is_blocked {
            self.worker(DESTINATION).decant(&["worker", "cordon", &to]).expect("it is cordoned");
        }
        let drain = self.drain_id();
        let mut orders = Vec::new();
        if !early {
            let deadline: &[&str] = if self.way == Way::LateDrain { &["--deadline", "1s"] } else { &[] };
            orders.push(self.spawn(SOURCE, &[&["drain", &from, "--id", &drain, "--detach"], deadline].concat()));
            match self.way {
                Way::CancelledDrain => {
                    self.await_unless_still(SOURCE, |run| run.worker(DESTINATION).stands_still());
                    orders.push(self.spawn(SOURCE, &["drain", "cancel", &drain]));
                }
                Way::BlockedDrain => {
                    self.await_unless_still(SOURCE, |run| {
                        run.drain_phase(&drain).is_ok_and(|phase| phase == "blocked")
                    });
                    orders.push(self.spawn(SOURCE, &["drain", "cancel", &drain]));
                }
                _ => {}
            }
            self.await_traced(SOURCE, self.last_point());
        }
        self.strike();
        for order in orders {
            let _ = order.join();
        }
        if is_halted {
            // Anew, and not only on: it may not have come to where it is to stand still yet.
            self.worker(DESTINATION).kill_agent();
            self.worker(DESTINATION).start_agent(&[]);
        }
        self.end_drain(&drain);
        for (side, name) in [(SOURCE, &from), (DESTINATION, &to)] {
            self.worker(side).decant(&["worker", "uncordon", name]).expect("it is uncordoned");
        }
    }

    /// A name that no other run has.
    fn drain_id(&self) -> String {
        let words = self.when.to_lowercase();
        let hash = words
            .bytes()
            .fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
        format!("d-{hash:016x}")
    }

    /// How far the drain is, or what the source said instead.
    fn drain_phase(&mut self, drain: &str) -> Result<String, String> {
        let seen = self.worker(SOURCE).api_within(&format!("/v1/drains/{drain}"), ANSWER)?;
        Ok(seen["phase"].as_str().expect("its phase").to_owned())
    }

    /// What an undisturbed drain of this way passes last.
    fn last_point(&self) -> &'static str {
        match self.way {
            Way::Drain => "journal:drain:drained:after",
            Way::LateDrain => "journal:drain:overdue:after",
            _ => "journal:drain:cancelled:after",
        }
    }

    /// Waits until the drain is over, or was never ordered; an order to cancel it may have been lost, and is given again.
    fn end_drain(&mut self, drain: &str) {
        let is_cancelled = matches!(self.way, Way::CancelledDrain | Way::BlockedDrain);
        let deadline = Instant::now() + fleet::PATIENCE;
        loop {
            self.worker(SOURCE).await_agent();
            let phase = self.drain_phase(drain);
            let is_over = match &phase {
                Ok(phase) => OVER.contains(&phase.as_str()),
                Err(said) => said.contains(" 404 "),
            };
            if is_over {
                return;
            }
            let late = Instant::now() >= deadline;
            assert!(!late, "{}: the drain is not over: {phase:?}: {}", self.when, self.fleet.describe());
            if is_cancelled {
                // Refused where it cannot be cancelled any more: then it ends by itself.
                let _ = self.worker(SOURCE).decant(&["drain", "cancel", drain]);
            }
            fleet::wait_a_moment();
        }
    }
}
