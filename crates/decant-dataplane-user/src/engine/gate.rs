//! The gate that every write passes: once closed, no write lands.

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Condvar, Mutex, PoisonError};

const CLOSED: u64 = 1 << 63;

/// Counts writes under way. One atomic addition in the open state.
#[derive(Default)]
pub(super) struct Gate {
    /// Writes under way, and the top bit once closed.
    state: AtomicU64,
    lock: Mutex<()>,
    empty: Condvar,
}

/// A write under way.
pub(super) struct Pass<'a>(&'a Gate);

impl Gate {
    /// Lets a write begin, unless the gate is closed.
    pub(super) fn enter(&self) -> Option<Pass<'_>> {
        let before = self.state.fetch_add(1, Ordering::SeqCst);
        let pass = Pass(self);
        (before & CLOSED == 0).then_some(pass)
    }

    /// Closes it and waits for the writes under way.
    pub(super) fn close(&self) {
        self.state.fetch_or(CLOSED, Ordering::SeqCst);
        let mut guard = self.lock.lock().unwrap_or_else(PoisonError::into_inner);
        while self.state.load(Ordering::SeqCst) != CLOSED {
            guard = self.empty.wait(guard).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Opens it again: a seal was cancelled.
    pub(super) fn open(&self) {
        self.state.fetch_and(!CLOSED, Ordering::SeqCst);
    }

    #[cfg(test)]
    pub(super) fn is_closed(&self) -> bool {
        self.state.load(Ordering::SeqCst) & CLOSED != 0
    }
}

impl Drop for Pass<'_> {
    fn drop(&mut self) {
        if self.0.state.fetch_sub(1, Ordering::SeqCst) & CLOSED != 0 {
            // Under the lock, so that the closer is either before its look at the count or already waiting.
            let _guard = self.0.lock.lock().unwrap_or_else(PoisonError::into_inner);
            self.0.empty.notify_all();
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn closing_waits_for_who_is_in_and_admits_nobody_after() {
        let gate = Gate::default();
        let pass = gate.enter();
        assert!(pass.is_some());
        std::thread::scope(|scope| {
            let closer = scope.spawn(|| gate.close());
            while !gate.is_closed() {
                std::thread::yield_now();
            }
            assert!(gate.enter().is_none());
            assert!(!closer.is_finished());
            drop(pass);
        });
        gate.open();
        assert!(gate.enter().is_some());
    }
}
