//! `/v1/drains`. Each worker drains itself and has its own row; one drain of several workers is shown as one.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use axum::{Extension, Json};
use decant_api as api;
use decant_api::{Code, CreateDrain, Drain, DrainPhase, DrainSettings, Empty, Listing};
use decant_base::{DrainId, MigrationId, WorkerId};
use decant_drain::drain::{DrainEvent, DrainOrder, DrainRow, DrainState};
use decant_drain::plan::{Plan, Wishes, plan};

use crate::agent::Agent;
use crate::core::new_drain_id;
use crate::errands::survey;
use crate::server::extract::{Body, Id};
use crate::server::fail::Fail;
use crate::server::migrations::{everywhere, limits};
use crate::server::peer::DRAINS_PATH;
use crate::server::{Caller, Shared, from_peers, peer_error};
use crate::view;

type Migrations = BTreeMap<MigrationId, api::Migration>;

pub(super) async fn list(agent: Shared, Extension(caller): Extension<Caller>) -> Json<Listing<Drain>> {
    let (rows, unreachable) = rows(&agent, &caller).await;
    let (migrations, _) = everywhere(&agent).await;
    let items = rows.values().map(|rows| view_of(rows, &migrations)).collect();
    Json(Listing { items, unreachable })
}

/// Every worker's rows by drain.
async fn rows(agent: &Agent, caller: &Caller) -> (BTreeMap<DrainId, Vec<DrainRow>>, Vec<WorkerId>) {
    let mut all: Vec<DrainRow> = agent.rows.drains().iter().map(|row| (**row).clone()).collect();
    let mut unreachable = Vec::new();
    if *caller == Caller::Root {
        for (worker, answer) in from_peers::<Vec<DrainRow>>(agent, DRAINS_PATH).await {
            match answer {
                Some(rows) => all.extend(rows),
                None => unreachable.push(worker),
            }
        }
    }
    let mut by_id: BTreeMap<DrainId, Vec<DrainRow>> = BTreeMap::new();
    for row in all {
        by_id.entry(row.order.drain.clone()).or_default().push(row);
    }
    (by_id, unreachable)
}

pub(super) async fn show(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(drain): Id<DrainId>,
) -> Result<Json<Drain>, Fail> {
    let (rows, _) = rows(&agent, &caller).await;
    let rows = rows.get(&drain).ok_or_else(|| unknown(&drain))?;
    let (migrations, _) = everywhere(&agent).await;
    Ok(Json(view_of(rows, &migrations)))
}

fn unknown(drain: &DrainId) -> Fail {
    Fail::not_found("drain", drain, "list them with `decant drain list`")
}

pub(super) async fn create(agent: Shared, Body(request): Body<CreateDrain>) -> Result<Json<Drain>, Fail> {
    let workers: BTreeSet<WorkerId> = request.workers.iter().cloned().collect();
    check(&agent, &request, &workers)?;
    let now_ms = agent.clock.now_ms();
    let order = DrainOrder {
        drain: request.drain.clone().unwrap_or_else(|| new_drain_id(now_ms)),
        workers: workers.iter().cloned().collect(),
        to: request.to.clone(),
        max: request.max.unwrap_or(agent.config.drain.max_migrations),
        reason: request.reason.clone(),
        deadline_ms: request.deadline_ms.map(|after| now_ms.saturating_add(after)),
        limits: limits(&agent.config),
        protocol: request.protocol,
        partial: request.partial,
        any_program: request.any_program,
    };
    if request.plan_only {
        return Ok(Json(planned(&agent, order, now_ms).await));
    }
    all_answer(&agent, &workers).await?;
    for worker in &workers {
        start_on(&agent, worker, &order).await?;
    }
    show(agent, Extension(Caller::Root), Id(order.drain)).await
}

fn check(agent: &Agent, request: &CreateDrain, workers: &BTreeSet<WorkerId>) -> Result<(), Fail> {
    if workers.is_empty() {
        return Err(Fail::invalid("no worker is named", "name at least one worker to drain"));
    }
    check_max(request.max)?;
    for worker in workers.iter().chain(&request.to) {
        if agent.config.index_of(worker).is_none() {
            return Err(Fail::not_found("worker", worker, "name a worker that `decant worker list` shows"));
        }
    }
    if let Some(to) = request.to.as_ref().filter(|to| workers.contains(to)) {
        return Err(Fail::invalid(format!("{to} cannot be drained to itself"), "name another destination"));
    }
    Ok(())
}

/// The plan alone; nothing is touched.
async fn planned(agent: &Arc<Agent>, order: DrainOrder, now_ms: u64) -> Drain {
    let fleet = survey(agent).await;
    let wishes = Wishes { worker: order.workers.clone(), to: order.to.clone(), max: order.max };
    let plan = plan(&fleet, &wishes);
    let blockers = plan.blockers.clone();
    let worker = agent.config.worker.clone();
    let row = DrainRow { plan, blockers, ..DrainRow::new(order, worker, false, now_ms) };
    Drain { phase: DrainPhase::Planned, ..view_of(&[row], &Migrations::new()) }
}

/// A drain is not begun on some of its workers only.
async fn all_answer(agent: &Agent, workers: &BTreeSet<WorkerId>) -> Result<(), Fail> {
    for (worker, answer) in from_peers::<Vec<DrainRow>>(agent, DRAINS_PATH).await {
        if answer.is_none() && workers.contains(&worker) {
            let cause = agent.peers.get(&worker).map(|peer| peer.last().failure).unwrap_or_default();
            let cause = format!("{worker} does not answer{}{cause}", if cause.is_empty() { "" } else { ": " });
            let fix = "start its agent: a worker is drained by its own agent. If it is destroyed, reclaim its machines";
            return Err(Fail::new(Code::Unavailable, "worker does not answer", cause, fix));
        }
    }
    Ok(())
}

async fn start_on(agent: &Agent, worker: &WorkerId, order: &DrainOrder) -> Result<(), Fail> {
    if *worker == agent.config.worker {
        return Ok(agent.core.start_drain(order.clone()).await.map(drop)?);
    }
    let Some(peer) = agent.peers.get(worker) else { return Ok(()) };
    peer.client.post::<DrainRow>(DRAINS_PATH, order).await.map(drop).map_err(|error| peer_error(error).into())
}

pub(super) async fn cancel(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(drain): Id<DrainId>,
    Body(request): Body<Empty>,
) -> Result<Json<Drain>, Fail> {
    let (rows, _) = rows(&agent, &caller).await;
    let rows = rows.get(&drain).ok_or_else(|| unknown(&drain))?;
    let path = decant_api::path::cancel_drain(&drain);
    tell_all(&agent, rows, DrainEvent::Cancel, &path, &request).await?;
    show(agent, Extension(caller), Id(drain)).await
}

/// Tells every worker on which the drain is not over; whether it matters there is for its own row to say.
async fn tell_all(
    agent: &Agent,
    rows: &[DrainRow],
    event: DrainEvent,
    path: &str,
    request: &impl serde::Serialize,
) -> Result<(), Fail> {
    for row in rows.iter().filter(|row| !row.state.is_over()) {
        if row.worker == agent.config.worker {
            agent.core.drain(&row.order.drain, event.clone()).await?;
        } else if let Some(peer) = agent.peers.get(&row.worker) {
            peer.client.post::<Drain>(path, request).await.map_err(peer_error)?;
        }
    }
    Ok(())
}

fn refuse_if_over(drain: &DrainId, rows: &[DrainRow]) -> Result<(), Fail> {
    let Some(state) = rows.iter().all(|row| row.state.is_over()).then(|| rows.first().map(|row| row.state)).flatten()
    else {
        return Ok(());
    };
    let cause = format!("{drain} is {}", state.name());
    Err(Fail::new(Code::Conflict, "drain is over", cause, "order a new one with `decant drain WORKER`"))
}

pub(super) async fn resume(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(drain): Id<DrainId>,
    Body(request): Body<Empty>,
) -> Result<Json<Drain>, Fail> {
    let (rows, _) = rows(&agent, &caller).await;
    let rows = rows.get(&drain).ok_or_else(|| unknown(&drain))?;
    refuse_if_over(&drain, rows)?;
    let path = decant_api::path::resume_drain(&drain);
    tell_all(&agent, rows, DrainEvent::Resume, &path, &request).await?;
    show(agent, Extension(caller), Id(drain)).await
}

pub(super) async fn settings(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(drain): Id<DrainId>,
    Body(request): Body<DrainSettings>,
) -> Result<Json<Drain>, Fail> {
    check_max(request.max)?;
    let (rows, _) = rows(&agent, &caller).await;
    let rows = rows.get(&drain).ok_or_else(|| unknown(&drain))?;
    refuse_if_over(&drain, rows)?;
    if let Some(max) = request.max {
        let path = decant_api::path::drain_settings(&drain);
        tell_all(&agent, rows, DrainEvent::Max(max), &path, &request).await?;
    }
    show(agent, Extension(caller), Id(drain)).await
}

fn check_max(max: Option<u32>) -> Result<(), Fail> {
    match max {
        Some(0) => Err(Fail::invalid("0 machines at a time never end", "let at least 1 move at a time")),
        _ => Ok(()),
    }
}

/// One drain, from the rows of those of its workers that answered.
fn view_of(rows: &[DrainRow], migrations: &Migrations) -> Drain {
    let first = rows.first().expect("a drain is known by its rows");
    let mut machines: Vec<api::DrainMachine> = rows.iter().flat_map(|row| machines_of(row, migrations)).collect();
    machines.sort_by(|a, b| a.machine.cmp(&b.machine));
    let started_at_ms =
        rows.iter().filter_map(|row| row.entered_ms.get(&DrainState::Cordoning)).min().copied().unwrap_or(0);
    // Of several workers, the drain has come as far as the last of them.
    let reached = |states: &[DrainState]| {
        let each = rows.iter().map(|row| states.iter().filter_map(|state| row.entered_ms.get(state)).min());
        let all: Option<Vec<u64>> = each.map(|at| at.copied()).collect();
        all?.into_iter().max().map(|at| at.saturating_sub(started_at_ms))
    };
    let sum = |field: fn(&api::DrainMachine) -> u64| machines.iter().map(field).sum();
    let phase = rows.iter().map(|row| phase(row.state)).min_by_key(|phase| rank(*phase)).unwrap_or(DrainPhase::Planned);
    Drain {
        drain: first.order.drain.clone(),
        workers: first.order.workers.clone(),
        reason: first.order.reason.clone(),
        phase,
        max: first.order.max,
        started_at_ms,
        evacuated_ms: reached(&[DrainState::Evacuated, DrainState::Drained]),
        drained_ms: reached(&[DrainState::Drained]),
        deadline_at_ms: first.order.deadline_ms,
        blockers: rows.iter().flat_map(blockers_of).collect(),
        bytes_total: sum(|machine| machine.bytes_total),
        bytes_done: sum(|machine| machine.bytes_done),
        exposure_bytes: sum(|machine| machine.exposure_bytes),
        rate_bytes_per_s: sum(|machine| machine.rate_bytes_per_s),
        eta: eta(rows, &machines, migrations, phase),
        machines,
    }
}

fn phase(state: DrainState) -> DrainPhase {
    match state {
        DrainState::Cordoning | DrainState::Planning | DrainState::Moving => DrainPhase::Moving,
        DrainState::Blocked => DrainPhase::Blocked,
        DrainState::Evacuated => DrainPhase::Evacuated,
        DrainState::Drained => DrainPhase::Drained,
        DrainState::Cancelling => DrainPhase::Cancelling,
        DrainState::Cancelled => DrainPhase::Cancelled,
        DrainState::Overdue => DrainPhase::Deadline,
    }
}

/// How far a phase is; the least counts, what needs a person before all.
fn rank(phase: DrainPhase) -> u8 {
    match phase {
        DrainPhase::Blocked => 0,
        DrainPhase::Cancelling => 1,
        DrainPhase::Planned => 2,
        DrainPhase::Moving => 3,
        DrainPhase::Evacuated => 4,
        DrainPhase::Deadline => 5,
        DrainPhase::Cancelled => 6,
        DrainPhase::Drained => 7,
    }
}

/// The machines of one worker: those under way, and those of the plan that are not yet.
fn machines_of(row: &DrainRow, migrations: &Migrations) -> Vec<api::DrainMachine> {
    let mut planned = planned_moves(&row.plan);
    let mut machines: Vec<api::DrainMachine> = row
        .machines
        .iter()
        .map(|(machine, state)| {
            let planned = planned.remove(machine);
            let seen = state.migration.as_ref().and_then(|migration| migrations.get(migration));
            let progress = seen.and_then(|migration| migration.progress).unwrap_or_default();
            let failed = (!state.reason.is_empty()).then(|| api::Why {
                reason: state.reason.clone(),
                since_at_ms: 0,
                retry_at_ms: state.retry_ms,
                attempts: state.failures,
                clears: "the next try succeeds, or the drain is cancelled".to_owned(),
            });
            api::DrainMachine {
                machine: machine.clone(),
                planned: Some(api::PlannedMove {
                    source: row.worker.clone(),
                    destination: state.to.clone(),
                    bytes: state.bytes,
                    eta: planned.and_then(|planned| planned.eta),
                }),
                migration: state.migration.clone(),
                phase: seen.map(|migration| migration.phase),
                bytes_total: progress.bytes_total,
                bytes_done: progress.bytes_done,
                exposure_bytes: progress.exposure_bytes,
                rate_bytes_per_s: progress.rate_bytes_per_s,
                why: seen.and_then(|migration| migration.why.clone()).or(failed),
            }
        })
        .collect();
    machines.extend(planned.into_iter().map(|(machine, planned)| api::DrainMachine {
        machine,
        bytes_total: planned.bytes.0,
        planned: Some(planned),
        migration: None,
        phase: None,
        bytes_done: 0,
        exposure_bytes: 0,
        rate_bytes_per_s: 0,
        why: None,
    }));
    machines
}

fn planned_moves(plan: &Plan) -> BTreeMap<decant_base::MachineId, api::PlannedMove> {
    plan.moves
        .iter()
        .map(|planned| {
            let (source, destination) = (planned.from.clone(), planned.to.clone());
            let eta = range(planned.eta, plan.eta_is_assumed);
            (planned.machine.clone(), api::PlannedMove { source, destination, bytes: planned.bytes, eta })
        })
        .collect()
}

fn blockers_of(row: &DrainRow) -> Vec<api::Blocker> {
    let blockers = row.blockers.iter().map(|blocker| api::Blocker {
        machine: blocker.machine.clone(),
        worker: row.worker.clone(),
        name: blocker.code.clone(),
        cause: blocker.reason.clone(),
        fix: blocker.fix.clone(),
    });
    let waits = row.wait.iter().filter(|wait| wait.severity > decant_drain::Severity::Waiting).map(|wait| {
        let why = view::why(wait);
        api::Blocker {
            machine: None,
            worker: row.worker.clone(),
            name: wait.on.clone(),
            cause: why.reason,
            fix: why.clears,
        }
    });
    blockers.chain(waits).collect()
}

fn range(eta: decant_drain::progress::Eta, assumed: bool) -> Option<api::Eta> {
    let (low_ms, high_ms) = eta.earliest_ms.zip(eta.latest_ms)?;
    Some(api::Eta { low_ms, high_ms, assumed })
}

/// The slowest machine decides.
fn eta(
    rows: &[DrainRow],
    machines: &[api::DrainMachine],
    migrations: &Migrations,
    phase: DrainPhase,
) -> Option<api::Eta> {
    if phase == DrainPhase::Planned || rows.iter().all(|row| row.machines.is_empty()) {
        let all: Option<Vec<api::Eta>> = rows.iter().map(|row| range(row.plan.eta, row.plan.eta_is_assumed)).collect();
        return slowest(&all?);
    }
    let running = machines.iter().filter_map(|machine| machine.migration.as_ref()).filter_map(|id| migrations.get(id));
    let etas: Vec<api::Eta> = running.filter_map(|migration| migration.progress?.eta).collect();
    slowest(&etas)
}

fn slowest(etas: &[api::Eta]) -> Option<api::Eta> {
    let low_ms = etas.iter().map(|eta| eta.low_ms).max()?;
    let high_ms = etas.iter().map(|eta| eta.high_ms).max()?;
    Some(api::Eta { low_ms, high_ms, assumed: etas.iter().any(|eta| eta.assumed) })
}
