//! When to try again: exponential, bounded, with a jitter that a replay repeats.

use serde::{Deserialize, Serialize};

/// Waits between attempts: `base_ms`, doubled each time, never above `max_ms`, spread by up to a quarter either way.
///
/// The jitter comes from a hash of the waiter's name and the attempt, not from a random source: a replayed step gives
/// the same instant, and waiters with different names do not knock in step.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Backoff {
    /// The first wait, milliseconds; at least 1.
    pub base_ms: u64,
    /// The longest wait before jitter, milliseconds; at least `base_ms`.
    pub max_ms: u64,
}

impl Backoff {
    /// The wait after the `attempt`th failure (1 for the first) of the waiter called `name`, milliseconds, at least 1.
    pub fn delay_ms(&self, name: &str, attempt: u32) -> u64 {
        let doublings = attempt.saturating_sub(1).min(32);
        let plain = self.base_ms.max(1).saturating_mul(1 << doublings).min(self.max_ms.max(self.base_ms).max(1));
        // 0..=1000 thousandths of the half-open span [-1/4, +1/4].
        let spread = fnv(name, attempt) % 1001;
        (plain - plain / 4).saturating_add((plain / 2).saturating_mul(spread) / 1000).max(1)
    }
}

/// FNV-1a, 64 bits: stable across versions of Rust, unlike the standard library's hashers.
fn fnv(name: &str, attempt: u32) -> u64 {
    let bytes = name.bytes().chain(attempt.to_le_bytes());
    let hash =
        bytes.fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    // The low bits of FNV are weak for short inputs: fold the high ones in.
    hash ^ (hash >> 32)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn grows_is_bounded_and_repeats() {
        let backoff = Backoff { base_ms: 100, max_ms: 5_000 };
        let waits: Vec<u64> = (1..12).map(|n| backoff.delay_ms("m-1", n)).collect();
        assert_eq!(waits, (1..12).map(|n| backoff.delay_ms("m-1", n)).collect::<Vec<_>>());
        for (index, wait) in waits.iter().enumerate() {
            let plain = (100u64 << index).min(5_000);
            assert!((plain * 3 / 4..=plain * 5 / 4).contains(wait), "{waits:?}");
        }
        assert!(Backoff { base_ms: 0, max_ms: 0 }.delay_ms("m", u32::MAX) >= 1);
        assert!(Backoff { base_ms: u64::MAX, max_ms: u64::MAX }.delay_ms("m", 5) >= 1);
    }

    #[test]
    fn waiters_spread() {
        let backoff = Backoff { base_ms: 1_000, max_ms: 1_000 };
        let distinct: std::collections::BTreeSet<u64> =
            (0..50).map(|n| backoff.delay_ms(&format!("m-{n}"), 1)).collect();
        assert!(distinct.len() > 25, "{distinct:?}");
    }
}
