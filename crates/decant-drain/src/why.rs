//! Why something does not go on, and how far it is: for `why`, status and progress bars.

use decant_base::{Bytes, WorkerId};
use decant_dataplane::CloneStatus;

use crate::handoff::State;
use crate::life;
use crate::migration::{Migration, Phase, Role};
use crate::progress::{Eta, Progress, RecoveryPoint};
use crate::row::Row;
use crate::wait::Wait;

/// Everything that the row waits for, the machine's own first. Empty if nothing is under way and all is as desired.
pub fn why(row: &Row) -> Vec<Wait> {
    let migration = row.migration.as_ref().filter(|migration| !migration.phase.is_over());
    life::wait_of(row).into_iter().chain(migration.and_then(|migration| migration.wait.clone())).collect()
}

/// What survives if one of the two workers is destroyed now.
pub fn recovery_point(row: &Row, migration: &Migration) -> RecoveryPoint {
    match (migration.role, &row.state) {
        (Role::Source, State::Sealed { epoch, .. }) => {
            RecoveryPoint::Seal { sealed_ms: sealed_ms(migration), epoch: *epoch }
        }
        (Role::Source, State::Released { .. }) => RecoveryPoint::Destination,
        (Role::Destination, State::Active { epoch }) if migration.phase < Phase::Verified && row.volume.is_some() => {
            RecoveryPoint::Seal {
                sealed_ms: sealed_ms(migration),
                epoch: decant_base::Epoch(epoch.0.saturating_sub(1)),
            }
        }
        (Role::Destination, State::Active { .. }) => RecoveryPoint::Destination,
        _ => RecoveryPoint::Source,
    }
}

/// When it was sealed; at the destination, which was not there, when it was granted.
fn sealed_ms(migration: &Migration) -> u64 {
    let entered = |phase| migration.entered_ms.get(&phase).copied();
    entered(Phase::Sealed).or_else(|| entered(Phase::Granted)).unwrap_or(0)
}

/// What a [`crate::Order::Reclaim`] loses, for the operator to read before and after; `None` if it cannot be given.
pub fn reclaim_loses(row: &Row) -> Option<String> {
    let (epoch, sealed, to) = match (&row.state, &row.migration, &row.copy) {
        (State::Sealed { epoch, to, .. }, Some(migration), _) => (epoch, sealed_ms(migration), to.clone()),
        (State::Released { epoch }, Some(migration), Some(_)) => (epoch, sealed_ms(migration), migration.peer.clone()),
        _ => return None,
    };
    Some(format!(
        "everything written to {} on {to} since the seal at {sealed} ms (epoch {epoch}) is lost; the copy here is what the \
         machine had when it was stopped. If {to} is alive, both run it: make sure that it is destroyed",
        row.machine
    ))
}

/// How far the migration of `row` is. `clone` is the destination's volume, if it could be asked.
///
/// The rate's range is `rate_low..=rate_high` of the last seconds, for the ETA; 0 if not known.
pub fn progress(row: &Row, clone: Option<&CloneStatus>, rate_low: Bytes, rate_high: Bytes) -> Option<Progress> {
    let migration = row.migration.as_ref()?;
    let (source, destination): (WorkerId, WorkerId) = match migration.role {
        Role::Source => (row.worker.clone(), migration.peer.clone()),
        Role::Destination => (migration.peer.clone(), row.worker.clone()),
    };
    let is_whole = matches!(migration.phase, Phase::Verified | Phase::Cleaned);
    let total = clone.map_or(0, |clone| clone.bytes_total);
    let missing = clone.map_or(0, |clone| clone.bytes_missing.min(total));
    let done = if is_whole { total } else { total - missing };
    let wait = migration.wait.clone();
    Some(Progress {
        machine: row.machine.clone(),
        migration: migration.id.clone(),
        source,
        destination,
        phase: migration.phase,
        bytes_live: Bytes(total),
        bytes_done: Bytes(done),
        rate: Bytes(clone.map_or(0, |clone| clone.rate_bytes_per_s)),
        eta: if is_whole {
            Eta { earliest_ms: Some(0), latest_ms: Some(0) }
        } else {
            Eta::of(missing, rate_low, rate_high)
        },
        exposure: Bytes(if is_whole { 0 } else { missing }),
        hindrance: clone.map_or(String::new(), |clone| clone.hindrance.clone()),
        wait,
        recovery_point: recovery_point(row, migration),
    })
}

impl Eta {
    /// The time for `bytes` at rates between `low` and `high` bytes per second; a rate of 0 knows no end.
    pub fn of(bytes: u64, low: Bytes, high: Bytes) -> Self {
        let at = |rate: Bytes| (rate.0 > 0).then(|| bytes.saturating_mul(1000).div_ceil(rate.0));
        Self { earliest_ms: at(high.max(low)), latest_ms: at(low) }
    }
}
