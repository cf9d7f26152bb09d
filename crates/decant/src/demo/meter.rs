//! Counts what a worker sends to the others and receives from them, without the client's part of it.
//!
//! The kernel counts bytes at the interface between the worker and the bridge. The client's requests and answers cross it
//! too, and cross the link between the worker and its machine as well, with nothing else on that one: so the
//! difference is the product's own traffic, every header included. The machine's link goes away with the machine, so it
//! is looked at every few milliseconds; what the client exchanged after the last look counts as ours.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::oracle::{self, Carried};

/// Between two looks.
const PACE: Duration = Duration::from_millis(4);

/// A running count.
#[derive(Debug)]
pub(crate) struct Meter {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<anyhow::Result<Tally>>>,
}

/// Bytes of each interface since the start, over the lives of interfaces that come and go.
#[derive(Debug, Default)]
struct Tally {
    started: bool,
    interfaces: HashMap<String, Counted>,
}

#[derive(Debug, Default)]
struct Counted {
    last: Carried,
    sum: Carried,
}

impl Tally {
    fn add(&mut self, counters: Vec<(String, Carried)>) {
        let started = self.started;
        for (name, now) in counters {
            // What an interface carried before the start is not ours; one that appears later starts at zero.
            let first = if started { Carried::default() } else { now };
            let counted =
                self.interfaces.entry(name).or_insert_with(|| Counted { last: first, sum: Carried::default() });
            // A smaller count is another interface of the same name.
            let more = |now: u64, last: u64| if now >= last { now - last } else { now };
            counted.sum.sent += more(now.sent, counted.last.sent);
            counted.sum.received += more(now.received, counted.last.received);
            counted.last = now;
        }
        self.started = true;
    }

    /// What a machine sends, its worker receives from it and sends on.
    fn ours(&self) -> Carried {
        let uplink = self.interfaces.get(oracle::UPLINK).map_or(Carried::default(), |counted| counted.sum);
        let machines =
            self.interfaces.iter().filter(|(name, _)| *name != oracle::UPLINK).map(|(_, counted)| counted.sum);
        let machines = machines.fold(Carried::default(), |sum, one| Carried {
            received: sum.received + one.received,
            sent: sum.sent + one.sent,
        });
        Carried {
            sent: uplink.sent.saturating_sub(machines.received),
            received: uplink.received.saturating_sub(machines.sent),
        }
    }
}

impl Meter {
    /// Starts counting in the network namespace of process `pid`.
    pub(crate) fn start(pid: u32) -> anyhow::Result<Self> {
        let stop = Arc::new(AtomicBool::new(false));
        let mut tally = Tally::default();
        tally.add(oracle::carried(pid)?);
        let flag = Arc::clone(&stop);
        let thread = std::thread::Builder::new().name("meter".into()).spawn(move || {
            while !flag.load(Ordering::Relaxed) {
                std::thread::sleep(PACE);
                tally.add(oracle::carried(pid)?);
            }
            Ok(tally)
        })?;
        Ok(Self { stop, thread: Some(thread) })
    }

    /// Bytes since the start.
    pub(crate) fn finish(mut self) -> anyhow::Result<Carried> {
        self.stop.store(true, Ordering::Relaxed);
        let thread = self.thread.take().ok_or_else(|| anyhow::anyhow!("the meter was ended before"))?;
        let tally = thread.join().map_err(|_| anyhow::anyhow!("the meter panicked"))??;
        Ok(tally.ours())
    }
}

impl Drop for Meter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_machines_part_is_taken_off_even_when_its_link_goes_and_comes() {
        let mut tally = Tally::default();
        let carried = |received, sent| Carried { received, sent };
        let look = |uplink: Carried, machine: Option<Carried>| {
            let mut counters = vec![(oracle::UPLINK.to_owned(), uplink)];
            counters.extend(machine.map(|count| ("d1.3".to_owned(), count)));
            counters
        };
        tally.add(look(carried(100, 1_000), Some(carried(500, 50))));
        tally.add(look(carried(130, 1_300), Some(carried(700, 70))));
        tally.add(look(carried(230, 9_300), None));
        tally.add(look(carried(235, 9_350), Some(carried(50, 5))));
        assert_eq!(tally.ours(), carried(135 - 25, 8_350 - 250));
    }
}
