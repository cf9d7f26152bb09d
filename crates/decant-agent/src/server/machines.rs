//! `/v1/machines` and `/v1/routes`.

use std::time::Duration;

use axum::{Extension, Json};
use decant_api::{Code, Empty, Listing, Logs, Machine, Route, RouteState, RunMachine};
use decant_base::{Epoch, MachineId, WorkerId};
use decant_drain::{Event, Order, Row};
use decant_machine::MachineSpec;
use serde::Deserialize;

use crate::agent::Agent;
use crate::core::{is_or_will_be_here, read_spec};
use crate::server::extract::{Args, Body, Id, ScopeArgs};
use crate::server::fail::Fail;
use crate::server::{Caller, Shared, is_local, list_all, peer_error};
use crate::view;
use decant_api::path::KnownRoute as Known;

/// A route may be waited for this long in one request.
const LONGEST_WAIT: Duration = Duration::from_secs(60);
/// Lines of a log in one answer.
const MAX_TAIL: usize = 10_000;

pub(super) async fn list(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Args(args): Args<ScopeArgs>,
) -> Json<Listing<Machine>> {
    let rows = agent.rows.machines();
    let own = async {
        let shown = rows.iter().filter(|row| view::is_shown(row)).map(|row| agent.machine(row));
        futures_util::future::join_all(shown).await.into_iter().flatten().collect()
    };
    let local = is_local(&caller, args.scope);
    let mut listing: Listing<Machine> = list_all(&agent, local, "/v1/machines?scope=local", own).await;
    if !local {
        // Of a machine that moved, the owner's view is the one to show; a copy that another still needs is shown beside it.
        listing.items.retain(|machine| machine.state != decant_api::MachineState::Released);
    }
    listing.items.sort_by(|a, b| (&a.machine, b.epoch, &a.worker).cmp(&(&b.machine, a.epoch, &b.worker)));
    Json(listing)
}

/// The row of a machine that this worker knows.
pub(super) fn row_of(agent: &Agent, machine: &MachineId) -> Option<std::sync::Arc<Row>> {
    agent.rows.machine(machine).filter(|row| view::is_shown(row))
}

/// The worker that owns `machine`, if that is another one and somebody who answers now knows.
pub(super) async fn owner_elsewhere(agent: &Agent, machine: &MachineId) -> Option<WorkerId> {
    if agent.rows.machine(machine).is_some_and(|row| row.state.owned().is_some()) {
        return None;
    }
    let route = agent.routes.ask_now(machine, None, Duration::ZERO).await;
    route.worker.filter(|worker| route.state != RouteState::Unknown && *worker != agent.config.worker)
}

pub(super) fn not_found(machine: &MachineId) -> Fail {
    Fail::not_found("machine", machine, "list the fleet's with `decant machine list`")
}

pub(super) async fn show(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(machine): Id<MachineId>,
) -> Result<Json<Machine>, Fail> {
    let row = row_of(&agent, &machine);
    let is_owned = row.as_ref().is_some_and(|row| row.state.owned().is_some());
    if is_owned || caller != Caller::Root {
        let view = match &row {
            Some(row) => agent.machine(row).await,
            None => None,
        };
        return view.map(Json).ok_or_else(|| not_found(&machine));
    }
    // The owner knows more than a worker that handed it over.
    if let Some(peer) = owner_elsewhere(&agent, &machine).await.and_then(|owner| agent.peers.get(&owner).cloned()) {
        let client = peer.client.clone().with_timeout(Duration::from_millis(900));
        if let Ok(view) = client.get(&decant_api::path::machine(&machine)).await {
            return Ok(Json(view));
        }
    }
    let row = row.ok_or_else(|| not_found(&machine))?;
    agent.machine(&row).await.map(Json).ok_or_else(|| not_found(&machine))
}

pub(super) async fn run(agent: Shared, Body(request): Body<RunMachine>) -> Result<Json<Machine>, Fail> {
    let mut spec = request.spec;
    if agent.rows.worker().cordoned.is_some() {
        let cause = format!("{} takes no new machines", agent.config.worker);
        return Err(Fail::new(
            Code::Cordoned,
            "worker is cordoned",
            cause,
            "uncordon it, or run the machine on another worker",
        ));
    }
    if spec.command.first().is_none_or(|program| !program.starts_with('/')) {
        return Err(Fail::invalid(
            "the machine names no program",
            "give an absolute path as the first word of the command",
        ));
    }
    check_volume(&agent, &spec).await?;
    let rows = agent.rows.machines();
    let here = rows.iter().filter(|row| is_or_will_be_here(row)).count();
    if u64::try_from(here).unwrap_or(u64::MAX) >= agent.config.max_machines {
        let cause = format!("{} has {here} machines", agent.config.worker);
        return Err(Fail::new(
            Code::NoRoom,
            "worker is full",
            cause,
            "raise capacity.machines, or choose another worker",
        ));
    }
    if let Some(owner) = owner_elsewhere(&agent, &spec.id).await {
        let cause = format!("{owner} has a machine {}", spec.id);
        return Err(Fail::new(
            Code::Exists,
            "machine exists",
            cause,
            "choose another name: it must be unique in the fleet",
        ));
    }
    spec.address_index = address_index(&agent, &spec, &rows)?;
    let (machine, volume) = (spec.id.clone(), spec.volume.clone());
    let spec =
        serde_json::to_value(&spec).map_err(|error| Fail::invalid(error.to_string(), "change the specification"))?;
    let row = agent.core.step(&machine, Event::Order(Order::Run { spec, volume })).await?;
    answer(&agent, &row).await
}

async fn check_volume(agent: &Agent, spec: &MachineSpec) -> Result<(), Fail> {
    let Some(volume) = &spec.volume else { return Ok(()) };
    let volumes = agent.volumes().await.map_err(|cause| {
        Fail::new(Code::Unavailable, "data plane does not answer", cause, "look at the agent's log; machines run on")
    })?;
    if !volumes.contains(volume) {
        return Err(Fail::not_found("volume", volume, "make it first with `decant volume create`, on this worker"));
    }
    let rows = agent.rows.machines();
    let other = rows
        .iter()
        .find(|row| row.machine != spec.id && row.volume.as_ref() == Some(volume) && is_or_will_be_here(row));
    match other {
        Some(row) => {
            let cause = format!("volume {volume} belongs to machine {}", row.machine);
            Err(Fail::new(Code::Conflict, "volume is in use", cause, "make another volume"))
        }
        None => Ok(()),
    }
}

/// The machine's index in addresses: the one it asks for, or a free one of this worker's 65,535.
fn address_index(agent: &Agent, spec: &MachineSpec, rows: &[std::sync::Arc<Row>]) -> Result<u32, Fail> {
    let used: Vec<(&MachineId, u32)> =
        rows.iter().filter_map(|row| Some((&row.machine, read_spec(row.spec.as_ref()?).ok()?.address_index))).collect();
    if spec.address_index != 0 {
        return match used.iter().find(|(machine, index)| **machine != spec.id && *index == spec.address_index) {
            Some((machine, index)) => {
                let cause = format!("address_index {index} is {machine}'s");
                Err(Fail::new(Code::Conflict, "address is in use", cause, "leave address_index 0 to have one chosen"))
            }
            None => Ok(spec.address_index),
        };
    }
    // A repeated request for the same machine gets the same answer.
    if let Some((_, index)) = used.iter().find(|(machine, _)| **machine == spec.id) {
        return Ok(*index);
    }
    let first = agent.config.worker_index << 16;
    let last = used.iter().map(|(_, index)| *index).filter(|index| index & 0xffff_0000 == first).max().unwrap_or(first);
    Ok(last + 1)
}

pub(super) async fn answer(agent: &Agent, row: &Row) -> Result<Json<Machine>, Fail> {
    agent.machine(row).await.map(Json).ok_or_else(|| not_found(&row.machine))
}

/// Steps an order that only the owner takes.
pub(super) async fn order(agent: &Agent, machine: &MachineId, order: Order) -> Result<std::sync::Arc<Row>, Fail> {
    if let Some(owner) = owner_elsewhere(agent, machine).await {
        return Err(Fail::elsewhere(machine, &owner));
    }
    if agent.rows.machine(machine).is_none() {
        return Err(not_found(machine));
    }
    Ok(agent.core.step(machine, Event::Order(order)).await?)
}

pub(super) async fn stop(
    agent: Shared,
    Id(machine): Id<MachineId>,
    Body(Empty {}): Body<Empty>,
) -> Result<Json<Machine>, Fail> {
    let row = order(&agent, &machine, Order::Stop).await?;
    answer(&agent, &row).await
}

pub(super) async fn start(
    agent: Shared,
    Id(machine): Id<MachineId>,
    Body(Empty {}): Body<Empty>,
) -> Result<Json<Machine>, Fail> {
    let row = order(&agent, &machine, Order::Start).await?;
    answer(&agent, &row).await
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct LogArgs {
    #[serde(default = "some_lines")]
    tail: usize,
}

fn some_lines() -> usize {
    100
}

pub(super) async fn logs(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(machine): Id<MachineId>,
    Args(args): Args<LogArgs>,
) -> Result<Json<Logs>, Fail> {
    if caller == Caller::Root
        && let Some(peer) = owner_elsewhere(&agent, &machine).await.and_then(|owner| agent.peers.get(&owner).cloned())
    {
        let tail = u32::try_from(args.tail).unwrap_or(u32::MAX);
        let answer = peer.client.get(&decant_api::path::logs(&machine, tail)).await;
        return answer.map(Json).map_err(|error| peer_error(error).into());
    }
    if agent.rows.machine(&machine).is_none() {
        return Err(not_found(&machine));
    }
    let machines = agent.world.machines.clone();
    let read = tokio::task::spawn_blocking(move || machines.logs(&machine, args.tail.min(MAX_TAIL))).await;
    let text = read.map_err(|_| {
        Fail::new(Code::Internal, "the agent failed", "a task ended early", "report it with the agent's log")
    })??;
    Ok(Json(Logs { text }))
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RouteArgs {
    #[serde(default)]
    wait_ms: u64,
    #[serde(default)]
    scope: decant_api::Scope,
    known_state: Option<RouteState>,
    known_epoch: Option<u64>,
    known_worker: Option<WorkerId>,
}

pub(super) async fn route(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(machine): Id<MachineId>,
    Args(args): Args<RouteArgs>,
) -> Json<Route> {
    let wait = Duration::from_millis(args.wait_ms).min(LONGEST_WAIT);
    let known = args.known_state.zip(args.known_epoch).map(|(state, epoch)| Known {
        state,
        epoch: Epoch(epoch),
        worker: args.known_worker,
    });
    Json(if is_local(&caller, args.scope) {
        agent.routes.local(&machine, known.as_ref(), wait).await
    } else {
        agent.routes.find(&machine, known.as_ref(), wait).await
    })
}
