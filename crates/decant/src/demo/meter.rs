//! Counts what a worker exchanges with the others, without the client's part of it.
//!
//! The kernel counts bytes at the interface between the worker and the bridge. The client's requests and answers cross it
//! too, and cross the link between the worker and its machine as well, with nothing else on that one: so the
//! difference is the product's own traffic, both directions, every header included. The machine's link goes away with the
//! machine, so it is looked at every few milliseconds; what the client exchanged after the last look counts as ours.

use std::collections::HashMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::oracle;

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
    last: u64,
    sum: u64,
}

impl Tally {
    fn add(&mut self, counters: Vec<(String, u64)>) {
        for (name, now) in counters {
            let started = self.started;
            let counted = self.interfaces.entry(name).or_insert_with(|| Counted {
                // What an interface carried before the start is not ours; one that appears later starts at zero.
                last: if started { 0 } else { now },
                sum: 0,
            });
            // A smaller count is another interface of the same name.
            counted.sum += if now >= counted.last { now - counted.last } else { now };
            counted.last = now;
        }
        self.started = true;
    }

    fn ours(&self) -> u64 {
        let uplink = self.interfaces.get(oracle::UPLINK).map_or(0, |counted| counted.sum);
        let machines: u64 =
            self.interfaces.iter().filter(|(name, _)| *name != oracle::UPLINK).map(|(_, counted)| counted.sum).sum();
        uplink.saturating_sub(machines)
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
    pub(crate) fn finish(mut self) -> anyhow::Result<u64> {
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
        let look = |uplink: u64, machine: Option<u64>| {
            let mut counters = vec![(oracle::UPLINK.to_owned(), uplink)];
            counters.extend(machine.map(|count| ("d1.3".to_owned(), count)));
            counters
        };
        tally.add(look(1_000, Some(500)));
        tally.add(look(1_300, Some(700)));
        tally.add(look(9_300, None));
        tally.add(look(9_350, Some(50)));
        assert_eq!(tally.ours(), 8_350 - 250);
    }
}
