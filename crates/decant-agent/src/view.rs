//! Rows as the API shows them.

use std::net::Ipv6Addr;

use decant_api as api;
use decant_base::WorkerId;
use decant_dataplane::{Protocol, VolumeStatus};
use decant_drain::handoff::State;
use decant_drain::migration::{Back, Migration, Phase, Role};
use decant_drain::{Desired, Life, Row, Severity, Wait};
use decant_machine::{MachineSpec, Status};
use decant_network::MachineAddress;

use crate::config::Config;
use crate::core::read_spec;

/// What a row does not say: what was asked of others just now.
#[derive(Debug, Default)]
pub(crate) struct Seen<'a> {
    /// Of the driver.
    pub(crate) status: Option<&'a Status>,
    /// Of the plane.
    pub(crate) volume: Option<&'a VolumeStatus>,
    /// When its health check passed first under this claim, Unix milliseconds.
    pub(crate) healthy_at_ms: Option<u64>,
    /// The range of the volume's rates.
    pub(crate) rates: (decant_base::Bytes, decant_base::Bytes),
}

/// A wait as `why`.
pub(crate) fn why(wait: &Wait) -> api::Why {
    let reason = match (wait.severity, wait.reason.is_empty()) {
        (_, true) => format!("waiting for {}", wait.on),
        (Severity::Stuck, false) => format!("stuck on {}: {}", wait.on, wait.reason),
        (_, false) => format!("{}: {}", wait.on, wait.reason),
    };
    api::Why {
        reason,
        since_at_ms: wait.since_ms,
        retry_at_ms: wait.retry_ms,
        attempts: wait.attempts,
        clears: wait.clears.clone(),
    }
}

/// The worst of what the row waits for.
fn worst(row: &Row) -> Option<api::Why> {
    decant_drain::why(row).iter().max_by_key(|wait| wait.severity).map(why)
}

/// The machine's address on `worker`.
pub(crate) fn address(config: &Config, spec: &MachineSpec, worker: &WorkerId) -> Option<Ipv6Addr> {
    let worker = config.index_of(worker)?;
    Some(MachineAddress { network: config.network, worker, machine: spec.address_index }.address())
}

/// Whether anything of the machine is worth showing.
pub(crate) fn is_shown(row: &Row) -> bool {
    let is_gone = matches!(row.state, State::None) || row.desired == Desired::Removed && row.life == Life::Down;
    row.spec.is_some() && (!is_gone || row.copy.is_some())
}

/// The machine; `None` if the row is only a memory of it.
pub(crate) fn machine(config: &Config, row: &Row, seen: &Seen<'_>) -> Option<api::Machine> {
    let spec = read_spec(row.spec.as_ref()?).ok()?;
    let exit = seen.status.and_then(|status| status.last_exit).map(|exit| match exit {
        decant_machine::Exit::Code(status) => api::Exit { status: Some(status), signal: None },
        decant_machine::Exit::Signal(signal) => api::Exit { status: None, signal: Some(signal) },
    });
    Some(api::Machine {
        machine: row.machine.clone(),
        worker: row.worker.clone(),
        epoch: row.state.owned().unwrap_or(row.top.epoch),
        state: machine_state(row, &spec, seen),
        address: row.state.owned().and_then(|_| address(config, &spec, &row.worker)),
        migration: row.migration.as_ref().map(|migration| migration.id.clone()),
        moved_to: moved_to(row),
        recovery_point: recovery_point(row, seen),
        restarts: seen.status.map_or(0, |status| u64::from(status.restarts)),
        exit,
        why: worst(row).or_else(|| driver_says(row, seen)),
        spec,
    })
}

/// What the shim waits for, when the row itself waits for nothing.
fn driver_says(row: &Row, seen: &Seen<'_>) -> Option<api::Why> {
    let status = seen.status.filter(|_| row.life == Life::Up)?;
    let reason = status.reason.clone()?;
    Some(api::Why {
        reason,
        since_at_ms: status.since_ms,
        retry_at_ms: None,
        attempts: 0,
        clears: "the program starts again".to_owned(),
    })
}

fn machine_state(row: &Row, spec: &MachineSpec, seen: &Seen<'_>) -> api::MachineState {
    use api::MachineState as S;
    match &row.state {
        State::Prepared { .. } => S::Incoming,
        State::Sealed { .. } => S::HandedOver,
        State::None | State::Released { .. } => S::Released,
        State::Active { .. } | State::Moving { .. } => match row.life {
            Life::Up => match seen.status.map(|status| status.state) {
                Some(decant_machine::State::Exited) => S::Stopped,
                Some(decant_machine::State::Failed | decant_machine::State::Lost) => S::Failed,
                _ if spec.health.is_some() && seen.healthy_at_ms.is_none() => S::Starting,
                _ => S::Running,
            },
            Life::Stopping | Life::Detaching => S::Stopping,
            Life::Down | Life::Starting if row.desired != Desired::Running => S::Stopped,
            Life::Down | Life::Starting => {
                let is_stuck = row.wait.as_ref().is_some_and(|wait| wait.severity == Severity::Stuck);
                if is_stuck || row.veto.is_some() { S::Failed } else { S::Starting }
            }
        },
    }
}

fn moved_to(row: &Row) -> Option<WorkerId> {
    match &row.state {
        State::Sealed { to, .. } => Some(to.clone()),
        State::Released { .. } | State::None => row.went.as_ref().map(|went| went.to.clone()),
        _ => None,
    }
}

fn recovery_point(row: &Row, seen: &Seen<'_>) -> Option<api::RecoveryPoint> {
    if row.volume.is_none() {
        return Some(api::RecoveryPoint::Stateless);
    }
    let Some(migration) = &row.migration else { return Some(api::RecoveryPoint::None) };
    match decant_drain::recovery_point(row, migration) {
        decant_drain::progress::RecoveryPoint::Seal { sealed_ms, .. } => Some(api::RecoveryPoint::SealedCopy {
            worker: if migration.role == Role::Source { row.worker.clone() } else { migration.peer.clone() },
            sealed_at_ms: sealed_ms,
            written_bytes: seen.volume.and_then(|status| status.clone.as_ref()).map(|clone| clone.bytes_written),
        }),
        _ => Some(api::RecoveryPoint::None),
    }
}

/// The row's migration, as this worker sees it.
pub(crate) fn migration(row: &Row, seen: &Seen<'_>) -> Option<api::Migration> {
    let migration = row.migration.as_ref()?;
    let (source, destination) = match migration.role {
        Role::Source => (row.worker.clone(), migration.peer.clone()),
        Role::Destination => (migration.peer.clone(), row.worker.clone()),
    };
    let entered = |phase| migration.entered_ms.get(&phase).copied();
    Some(api::Migration {
        migration: migration.id.clone(),
        machine: row.machine.clone(),
        source,
        destination,
        role: match migration.role {
            Role::Source => api::Role::Source,
            Role::Destination => api::Role::Destination,
        },
        drain: migration.drain.clone(),
        protocol: protocol(migration),
        phase: phase(migration),
        epoch: migration.epoch,
        started_at_ms: migration.entered_ms.values().copied().min().unwrap_or(0),
        ended_at_ms: entered(Phase::Cleaned).or_else(|| entered(Phase::Ended)),
        timings: timings(migration, seen),
        progress: progress(row, seen),
        why: migration_why(migration),
    })
}

/// The source was told; the destination learnt it from the offer.
fn protocol(migration: &Migration) -> Protocol {
    let offered = migration.origin.as_ref().map(|origin| origin.access.protocol());
    migration.reader.as_ref().map(|reader| reader.protocol).or(offered).unwrap_or_default()
}

fn migration_why(migration: &Migration) -> Option<api::Why> {
    if let Some(wait) = migration.wait.as_ref().filter(|_| !migration.phase.is_over()) {
        return Some(why(wait));
    }
    let Some(Back::Failed { step, reason, .. }) = &migration.back else { return None };
    let at = migration.entered_ms.get(&Phase::Unwinding).copied().unwrap_or(0);
    let clears = "order the move again once the cause is gone".to_owned();
    Some(api::Why { reason: format!("{step}: {reason}"), since_at_ms: at, retry_at_ms: None, attempts: 0, clears })
}

fn phase(migration: &Migration) -> api::MigrationPhase {
    use api::MigrationPhase as P;
    let is_stuck = migration.wait.as_ref().is_some_and(|wait| wait.severity == Severity::Stuck);
    match migration.phase {
        phase if is_stuck && !phase.is_over() => P::Stuck,
        Phase::Planned => P::Preparing,
        Phase::Prepared if migration.role == Role::Source => P::Stopping,
        Phase::Prepared => P::Prepared,
        Phase::Stopped => P::Stopped,
        Phase::Sealed => P::Sealed,
        Phase::Granted => P::Granted,
        Phase::Booted | Phase::Hydrating => P::Hydrating,
        Phase::Verified => P::Verified,
        Phase::Cleaned => P::Cleaned,
        Phase::Unwinding => P::Cancelling,
        Phase::Ended if matches!(migration.back, Some(Back::Failed { .. })) => P::Failed,
        Phase::Ended => P::Cancelled,
    }
}

fn timings(migration: &Migration, seen: &Seen<'_>) -> api::Timings {
    let entered = |phase| migration.entered_ms.get(&phase).copied();
    let between = |from, to| Some(entered(to)?.saturating_sub(entered(from)?));
    match migration.role {
        Role::Source => api::Timings {
            prepare_ms: between(Phase::Planned, Phase::Prepared),
            stop_ms: between(Phase::Prepared, Phase::Stopped),
            seal_ms: between(Phase::Stopped, Phase::Sealed),
            grant_ms: between(Phase::Sealed, Phase::Granted),
            ..api::Timings::default()
        },
        Role::Destination => {
            let granted = entered(Phase::Granted);
            let up = seen.healthy_at_ms.filter(|at| granted.is_some_and(|granted| *at >= granted));
            api::Timings {
                prepare_ms: between(Phase::Planned, Phase::Prepared),
                boot_ms: up.or(entered(Phase::Booted)).and_then(|up| Some(up.saturating_sub(granted?))),
                hydration_ms: between(Phase::Granted, Phase::Verified),
                ..api::Timings::default()
            }
        }
    }
}

fn progress(row: &Row, seen: &Seen<'_>) -> Option<api::Progress> {
    let clone = seen.volume.and_then(|status| status.clone.as_ref());
    row.volume.as_ref()?;
    let (low, high) = seen.rates;
    let progress = decant_drain::progress(row, clone, low, high)?;
    let eta = progress.eta.earliest_ms.zip(progress.eta.latest_ms);
    Some(api::Progress {
        bytes_total: progress.bytes_live.0,
        bytes_done: progress.bytes_done.0,
        bytes_fetched: clone.map_or(0, |clone| clone.bytes_fetched),
        exposure_bytes: progress.exposure.0,
        rate_bytes_per_s: progress.rate.0,
        parked_reads: clone.map_or(0, |clone| clone.parked_reads),
        eta: eta.map(|(low_ms, high_ms)| api::Eta { low_ms, high_ms, assumed: false }),
    })
}

/// Both ends' views of one migration as one: steps and durations from whoever took them, bytes from the destination.
pub(crate) fn merge(one: api::Migration, other: api::Migration) -> api::Migration {
    let (source, destination) = if one.role == api::Role::Source { (one, other) } else { (other, one) };
    let (s, d) = (source.timings, destination.timings);
    let is_granted =
        destination.phase >= api::MigrationPhase::Granted && destination.phase < api::MigrationPhase::Cancelling;
    let phase = joint_phase(source.phase, destination.phase);
    api::Migration {
        phase,
        timings: api::Timings {
            boot_ms: d.boot_ms,
            hydration_ms: d.hydration_ms,
            prepare_ms: s.prepare_ms,
            stop_ms: s.stop_ms,
            seal_ms: s.seal_ms,
            grant_ms: s.grant_ms,
        },
        progress: if is_granted { destination.progress } else { source.progress },
        why: if is_granted { destination.why.or(source.why) } else { source.why.or(destination.why) },
        ..source
    }
}

/// How far a migration is, by what its two ends say. It is over when it is for both: until then either of them still refuses
/// orders that would meet it.
fn joint_phase(source: api::MigrationPhase, destination: api::MigrationPhase) -> api::MigrationPhase {
    use api::MigrationPhase as P;
    if source == P::Stuck || destination == P::Stuck {
        return P::Stuck;
    }
    let is_granted = |phase| (P::Granted..P::Cancelling).contains(&phase);
    match source.max(destination) {
        P::Cleaned if is_granted(source) && is_granted(destination) => source.min(destination).max(P::Verified),
        further if is_granted(destination) && source < P::Cancelling => further,
        _ => source,
    }
}

#[cfg(test)]
mod tests {
    use super::joint_phase;
    use decant_api::MigrationPhase as P;

    #[test]
    fn a_migration_is_over_when_it_is_for_both_ends() {
        let cases = [
            ((P::Preparing, P::Prepared), P::Preparing),
            ((P::Sealed, P::Hydrating), P::Hydrating),
            ((P::Hydrating, P::Verified), P::Verified),
            ((P::Verified, P::Cleaned), P::Verified),
            ((P::Cleaned, P::Verified), P::Verified),
            ((P::Cleaned, P::Cleaned), P::Cleaned),
            ((P::Cancelling, P::Preparing), P::Cancelling),
            ((P::Cancelled, P::Cancelling), P::Cancelled),
            ((P::Stuck, P::Hydrating), P::Stuck),
            ((P::Granted, P::Stuck), P::Stuck),
        ];
        for ((source, destination), joint) in cases {
            assert_eq!(joint_phase(source, destination), joint, "{source:?}, {destination:?}");
        }
    }
}
