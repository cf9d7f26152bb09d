//! The API's paths, so that clients and the server spell them alike. Ids are DNS labels and need no escaping.

use decant_base::{DrainId, Epoch, MachineId, MigrationId, VolumeId, WorkerId};

use crate::{RouteState, Scope};

fn scoped(path: &str, scope: Scope) -> String {
    match scope {
        Scope::Fleet => format!("{path}?scope=fleet"),
        Scope::Local => format!("{path}?scope=local"),
    }
}

/// All workers.
pub fn workers(scope: Scope) -> String {
    scoped("/v1/workers", scope)
}

/// One worker.
pub fn worker(worker: &WorkerId) -> String {
    format!("/v1/workers/{worker}")
}

/// Takes a worker out of placement.
pub fn cordon(worker: &WorkerId) -> String {
    format!("/v1/workers/{worker}/cordon")
}

/// Puts it back.
pub fn uncordon(worker: &WorkerId) -> String {
    format!("/v1/workers/{worker}/uncordon")
}

/// All volumes.
pub fn volumes(scope: Scope) -> String {
    scoped("/v1/volumes", scope)
}

/// One volume on the worker asked.
pub fn volume(volume: &VolumeId) -> String {
    format!("/v1/volumes/{volume}")
}

/// All machines.
pub fn machines(scope: Scope) -> String {
    scoped("/v1/machines", scope)
}

/// One machine.
pub fn machine(machine: &MachineId) -> String {
    format!("/v1/machines/{machine}")
}

/// One machine, to remove it: with its volume, or only if it has none; with `force` also while blocks of it are missing.
pub fn remove_machine(machine: &MachineId, with_volume: bool, force: bool) -> String {
    format!("/v1/machines/{machine}?with_volume={with_volume}&force={force}")
}

/// An action on a machine: `stop`, `start`, `move`, `reclaim`, `retry`, `clear-veto`, `forget-origin`.
pub fn machine_action(machine: &MachineId, action: &str) -> String {
    format!("/v1/machines/{machine}/{action}")
}

/// The last `tail` lines of a machine's output.
pub fn logs(machine: &MachineId, tail: u32) -> String {
    format!("/v1/machines/{machine}/logs?tail={tail}")
}

/// All drains of the agent asked.
pub fn drains() -> String {
    "/v1/drains".to_owned()
}

/// One drain.
pub fn drain(drain: &DrainId) -> String {
    format!("/v1/drains/{drain}")
}

/// Cancels it.
pub fn cancel_drain(drain: &DrainId) -> String {
    format!("/v1/drains/{drain}/cancel")
}

/// Lets it go on now.
pub fn resume_drain(drain: &DrainId) -> String {
    format!("/v1/drains/{drain}/resume")
}

/// Changes its live settings.
pub fn drain_settings(drain: &DrainId) -> String {
    format!("/v1/drains/{drain}/settings")
}

/// All migrations.
pub fn migrations(scope: Scope) -> String {
    scoped("/v1/migrations", scope)
}

/// One migration.
pub fn migration(migration: &MigrationId) -> String {
    format!("/v1/migrations/{migration}")
}

/// Cancels it.
pub fn cancel_migration(migration: &MigrationId) -> String {
    format!("/v1/migrations/{migration}/cancel")
}

/// Changes its live settings.
pub fn migration_settings(migration: &MigrationId) -> String {
    format!("/v1/migrations/{migration}/settings")
}

/// Where a machine is reached; `wait_ms` waits that long at most for a machine that is between workers.
pub fn route(machine: &MachineId, wait_ms: u64) -> String {
    format!("/v1/routes/{machine}?wait_ms={wait_ms}")
}

/// What an asker knows of a route already.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct KnownRoute {
    /// As it was answered.
    pub state: RouteState,
    /// As it was answered.
    pub epoch: Epoch,
    /// As it was answered.
    pub worker: Option<WorkerId>,
}

/// As [`route`]; the answer is held back while it would be `known`.
pub fn route_if_changed(machine: &MachineId, wait_ms: u64, known: Option<&KnownRoute>) -> String {
    let mut path = route(machine, wait_ms);
    if let Some(known) = known {
        let state = match known.state {
            RouteState::Here => "here",
            RouteState::Moved => "moved",
            RouteState::Moving => "moving",
            RouteState::Unknown => "unknown",
        };
        path += &format!("&known_state={state}&known_epoch={}", known.epoch);
        if let Some(worker) = &known.worker {
            path += &format!("&known_worker={worker}");
        }
    }
    path
}

/// The event log from after number `after`.
pub fn events(after: u64) -> String {
    format!("/v1/events?after={after}")
}
