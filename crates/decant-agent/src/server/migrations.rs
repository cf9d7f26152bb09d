//! `/v1/migrations`, and the order to move.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Json};
use decant_api::{Code, Empty, Listing, Migration, MigrationSettings, MoveMachine};
use decant_base::{MachineId, MigrationId, WorkerId};
use decant_dataplane::Command;
use decant_drain::migration::{Limits, Role};
use decant_drain::plan::{Wishes, plan};
use decant_drain::{Event, Move, Order, Row};

use crate::agent::Agent;
use crate::config::Config;
use crate::core::new_migration_id;
use crate::errands::{program_of, reader_at, survey};
use crate::server::extract::{Args, Body, Id, ScopeArgs};
use crate::server::fail::Fail;
use crate::server::machines::{not_found, owner_elsewhere};
use crate::server::{Caller, Shared, from_peers, is_local, peer_error};
use crate::view;

const LOCAL: &str = "/v1/migrations?scope=local";
const PATIENCE: Duration = Duration::from_millis(900);

/// Timeouts of a move, as this worker is configured.
pub(super) fn limits(config: &Config) -> Limits {
    let ms = |duration: Duration| u64::try_from(duration.as_millis()).unwrap_or(u64::MAX);
    Limits {
        prepare_ms: ms(config.drain.prepare_timeout),
        stop_ms: ms(config.drain.stop_timeout),
        retention_ms: ms(config.drain.retention),
    }
}

pub(super) async fn start(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(machine): Id<MachineId>,
    Body(request): Body<MoveMachine>,
) -> Result<Json<Migration>, Fail> {
    if let Some(owner) = owner_elsewhere(&agent, &machine).await {
        let peer = agent.peers.get(&owner).filter(|_| caller == Caller::Root);
        let peer = peer.ok_or_else(|| Fail::elsewhere(&machine, &owner))?;
        let path = decant_api::path::machine_action(&machine, "move");
        return peer.client.post(&path, &request).await.map(Json).map_err(|error| peer_error(error).into());
    }
    let row = agent.rows.machine(&machine).ok_or_else(|| not_found(&machine))?;
    let again =
        request.migration.as_ref().is_some_and(|id| row.migration.as_ref().is_some_and(|known| known.id == *id));
    let to = match request.to {
        Some(to) => to,
        None if again => row.migration.as_ref().map(|known| known.peer.clone()).ok_or_else(|| not_found(&machine))?,
        None => choose(&agent, &machine).await?,
    };
    if to == agent.config.worker {
        let cause = format!("{machine} is on {to} already");
        return Err(Fail::new(Code::Conflict, "nowhere to move", cause, "name another worker"));
    }
    let reader = reader_at(&agent, &to, request.protocol).await.map_err(|cause| {
        Fail::new(
            Code::Unavailable,
            "destination does not answer",
            cause,
            "look at its agent, or name another worker; nothing was touched",
        )
    })?;
    let program = program_of(&agent, &machine, request.any_program).await.map_err(|cause| {
        let fix =
            "put the program back, stop the machine and start it, or let any do (--any-program); nothing was touched";
        Fail::new(Code::Refused, "program cannot be read", cause, fix)
    })?;
    let migration = request.migration.unwrap_or_else(|| new_migration_id(agent.clock.now_ms()));
    let (reason, drain, limits) = (request.reason, request.drain, limits(&agent.config));
    let order = Move { migration, to, reader, reason, drain, limits, program };
    let row = agent.core.step(&machine, Event::Order(Order::Move(Box::new(order)))).await?;
    agent.migration(&row).await.map(Json).ok_or_else(|| not_found(&machine))
}

/// The planner's choice for one machine.
async fn choose(agent: &Arc<Agent>, machine: &MachineId) -> Result<WorkerId, Fail> {
    let fleet = survey(agent).await;
    let wishes = Wishes { worker: vec![agent.config.worker.clone()], to: None, max: 1 };
    let plan = plan(&fleet, &wishes);
    if let Some(chosen) = plan.moves.iter().find(|planned| planned.machine == *machine) {
        return Ok(chosen.to.clone());
    }
    let about = plan.blockers.iter().filter(|blocker| blocker.machine.as_ref().is_none_or(|about| about == machine));
    let (causes, fixes): (Vec<_>, Vec<_>) = about.map(|blocker| (blocker.reason.clone(), blocker.fix.clone())).unzip();
    let fix = if fixes.is_empty() { "name a worker with --to".to_owned() } else { fixes.join("; ") };
    Err(Fail::new(Code::Blocked, "no place for the machine", causes.join("; "), fix))
}

/// This worker's own views.
pub(super) async fn local(agent: &Agent) -> Vec<Migration> {
    let rows = agent.rows.machines();
    let views = rows.iter().filter(|row| row.migration.is_some()).map(|row| agent.migration(row));
    futures_util::future::join_all(views).await.into_iter().flatten().collect()
}

/// Every migration that anybody who answers knows, both ends' views merged.
pub(super) async fn everywhere(agent: &Agent) -> (BTreeMap<MigrationId, Migration>, Vec<WorkerId>) {
    let (own, answers) = tokio::join!(local(agent), from_peers::<Listing<Migration>>(agent, LOCAL));
    let mut merged: BTreeMap<MigrationId, Migration> = BTreeMap::new();
    let mut unreachable = Vec::new();
    let mut add = |migration: Migration| match merged.remove(&migration.migration) {
        Some(other) => drop(merged.insert(migration.migration.clone(), view::merge(migration, other))),
        None => drop(merged.insert(migration.migration.clone(), migration)),
    };
    own.into_iter().for_each(&mut add);
    for (worker, answer) in answers {
        match answer {
            Some(listing) => listing.items.into_iter().for_each(&mut add),
            None => unreachable.push(worker),
        }
    }
    (merged, unreachable)
}

pub(super) async fn list(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Args(args): Args<ScopeArgs>,
) -> Json<Listing<Migration>> {
    if is_local(&caller, args.scope) {
        return Json(Listing { items: local(&agent).await, unreachable: Vec::new() });
    }
    let (merged, unreachable) = everywhere(&agent).await;
    Json(Listing { items: merged.into_values().collect(), unreachable })
}

fn row_of(agent: &Agent, migration: &MigrationId) -> Option<Arc<Row>> {
    agent.rows.machines().into_iter().find(|row| row.migration.as_ref().is_some_and(|known| known.id == *migration))
}

fn unknown(migration: &MigrationId) -> Fail {
    Fail::not_found("migration", migration, "list them with `decant migration list`; only a machine's last one is kept")
}

pub(super) async fn show(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(migration): Id<MigrationId>,
) -> Result<Json<Migration>, Fail> {
    let own = match row_of(&agent, &migration) {
        Some(row) => agent.migration(&row).await,
        None => None,
    };
    if caller != Caller::Root {
        return own.map(Json).ok_or_else(|| unknown(&migration));
    }
    let Some(own) = own else {
        let (mut merged, _) = everywhere(&agent).await;
        return merged.remove(&migration).map(Json).ok_or_else(|| unknown(&migration));
    };
    let other = if own.role == decant_api::Role::Source { &own.destination } else { &own.source };
    let Some(peer) = agent.peers.get(other) else { return Ok(Json(own)) };
    let client = peer.client.clone().with_timeout(PATIENCE);
    Ok(Json(match client.get::<Migration>(&decant_api::path::migration(&migration)).await {
        Ok(theirs) => view::merge(own, theirs),
        Err(_) => own,
    }))
}

/// Where a request about `migration` is to be dealt with: here, or at the worker that has the wanted role in it.
async fn holder(agent: &Agent, migration: &MigrationId, role: Role) -> Result<Result<Arc<Row>, WorkerId>, Fail> {
    if let Some(row) = row_of(agent, migration) {
        let known = row.migration.as_ref().ok_or_else(|| unknown(migration))?;
        return Ok(if known.role == role { Ok(row) } else { Err(known.peer.clone()) });
    }
    let (merged, _) = everywhere(agent).await;
    let found = merged.get(migration).ok_or_else(|| unknown(migration))?;
    Ok(Err(if role == Role::Source { found.source.clone() } else { found.destination.clone() }))
}

async fn forward(
    agent: &Agent,
    caller: &Caller,
    worker: &WorkerId,
    path: &str,
    request: &impl serde::Serialize,
) -> Result<Json<Migration>, Fail> {
    let fail = || {
        Fail::new(Code::Elsewhere, "migration is elsewhere", format!("{worker} deals with it"), format!("ask {worker}"))
    };
    let peer = agent.peers.get(worker).filter(|_| *caller == Caller::Root).ok_or_else(fail)?;
    peer.client.post(path, request).await.map(Json).map_err(|error| peer_error(error).into())
}

pub(super) async fn cancel(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(migration): Id<MigrationId>,
    Body(request): Body<Empty>,
) -> Result<Json<Migration>, Fail> {
    let row = match holder(&agent, &migration, Role::Source).await? {
        Ok(row) => row,
        Err(worker) => {
            let path = decant_api::path::cancel_migration(&migration);
            let answer = forward(&agent, &caller, &worker, &path, &request).await;
            let is_away = |fail: &Fail| matches!(fail.0.code, Code::Unavailable | Code::Timeout);
            match row_of(&agent, &migration).filter(|_| answer.as_ref().is_err_and(is_away)) {
                // The source is away, for ever perhaps: this worker refuses what it is prepared for, durably, and a source
                // that comes back takes its machine back.
                Some(row) => row,
                None => return answer,
            }
        }
    };
    let row = agent.core.step(&row.machine, Event::Order(Order::Cancel { migration: migration.clone() })).await?;
    agent.migration(&row).await.map(Json).ok_or_else(|| unknown(&migration))
}

pub(super) async fn settings(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(migration): Id<MigrationId>,
    Body(request): Body<MigrationSettings>,
) -> Result<Json<Migration>, Fail> {
    let row = match holder(&agent, &migration, Role::Destination).await? {
        Ok(row) => row,
        Err(worker) => {
            let path = decant_api::path::migration_settings(&migration);
            return forward(&agent, &caller, &worker, &path, &request).await;
        }
    };
    let Some(volume) = row.volume.clone() else {
        let cause = format!("{} has no volume", row.machine);
        return Err(Fail::new(Code::Conflict, "nothing to set", cause, "a stateless machine moves no bytes"));
    };
    let limit = request.rate.map(|rate| Command::Limit { volume: volume.clone(), rate: (rate.0 > 0).then_some(rate) });
    let policy = request.policy.map(|policy| Command::Policy { volume, policy });
    for command in limit.into_iter().chain(policy) {
        let plane = agent.world.plane.clone();
        let done = tokio::task::spawn_blocking(move || plane.perform(&command));
        let answer = tokio::time::timeout(PATIENCE, done).await.map_err(|_| {
            Fail::new(Code::Timeout, "not done yet", "the data plane did not answer in time", "set it again")
        })?;
        answer.map_err(|_| {
            Fail::new(Code::Internal, "the agent failed", "a task ended early", "report it with the agent's log")
        })??;
    }
    agent.migration(&row).await.map(Json).ok_or_else(|| unknown(&migration))
}
