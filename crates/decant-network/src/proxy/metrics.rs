//! What a proxy counts.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering::Relaxed};
use std::time::Duration;

use serde::Serialize;

/// Counters of a running proxy; clones count together.
#[derive(Debug, Clone, Default)]
pub struct Metrics(Arc<Counts>);

#[derive(Debug, Default)]
struct Counts {
    accepted: AtomicU64,
    open: AtomicU64,
    parked: AtomicU64,
    parked_total: AtomicU64,
    parked_longest_us: AtomicU64,
    refused_full: AtomicU64,
    refused_late: AtomicU64,
    reset_moved: AtomicU64,
    bytes_to_machines: AtomicU64,
    bytes_to_clients: AtomicU64,
}

/// The counters at one moment.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize)]
pub struct Snapshot {
    /// Connections accepted so far.
    pub accepted: u64,
    /// Connections open now, parked ones included.
    pub open: u64,
    /// Connections that wait for their machine now.
    pub parked: u64,
    /// Connections that ever waited.
    pub parked_total: u64,
    /// The longest wait that ended in a connection, in microseconds.
    pub parked_longest_us: u64,
    /// Connections reset because too many waited.
    pub refused_full: u64,
    /// Connections reset because their machine did not come in time.
    pub refused_late: u64,
    /// Connections reset because their machine had moved away.
    pub reset_moved: u64,
    /// Bytes carried from clients to machines over connections that have ended in order.
    pub bytes_to_machines: u64,
    /// Bytes carried from machines to clients, likewise.
    pub bytes_to_clients: u64,
}

impl Metrics {
    /// The counters now. Each is exact; together they are not of one instant.
    pub fn snapshot(&self) -> Snapshot {
        let counts = &*self.0;
        Snapshot {
            accepted: counts.accepted.load(Relaxed),
            open: counts.open.load(Relaxed),
            parked: counts.parked.load(Relaxed),
            parked_total: counts.parked_total.load(Relaxed),
            parked_longest_us: counts.parked_longest_us.load(Relaxed),
            refused_full: counts.refused_full.load(Relaxed),
            refused_late: counts.refused_late.load(Relaxed),
            reset_moved: counts.reset_moved.load(Relaxed),
            bytes_to_machines: counts.bytes_to_machines.load(Relaxed),
            bytes_to_clients: counts.bytes_to_clients.load(Relaxed),
        }
    }

    /// Counts a connection as open until the guard is dropped.
    pub(super) fn accept(&self) -> OpenGuard {
        self.0.accepted.fetch_add(1, Relaxed);
        self.0.open.fetch_add(1, Relaxed);
        OpenGuard(self.clone())
    }

    /// Counts a connection as parked until the guard is dropped; `None` if `limit` are parked.
    pub(super) fn park(&self, limit: usize) -> Option<ParkGuard> {
        let before = self.0.parked.fetch_add(1, Relaxed);
        let guard = ParkGuard(self.clone());
        if before >= limit as u64 {
            self.0.refused_full.fetch_add(1, Relaxed);
            return None;
        }
        self.0.parked_total.fetch_add(1, Relaxed);
        Some(guard)
    }

    pub(super) fn released(&self, waited: Duration) {
        self.0.parked_longest_us.fetch_max(waited.as_micros() as u64, Relaxed);
    }

    pub(super) fn refuse_late(&self) {
        self.0.refused_late.fetch_add(1, Relaxed);
    }

    pub(super) fn reset_moved(&self) {
        self.0.reset_moved.fetch_add(1, Relaxed);
    }

    pub(super) fn carried(&self, to_machine: u64, to_client: u64) {
        self.0.bytes_to_machines.fetch_add(to_machine, Relaxed);
        self.0.bytes_to_clients.fetch_add(to_client, Relaxed);
    }
}

#[derive(Debug)]
pub(super) struct OpenGuard(Metrics);

impl Drop for OpenGuard {
    fn drop(&mut self) {
        self.0.0.open.fetch_sub(1, Relaxed);
    }
}

#[derive(Debug)]
pub(super) struct ParkGuard(Metrics);

impl Drop for ParkGuard {
    fn drop(&mut self) {
        self.0.0.parked.fetch_sub(1, Relaxed);
    }
}
