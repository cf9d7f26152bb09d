//! `/v1/machines/{machine}/…`: what stands on an operator's word, and what ends a state that nothing else ends.

use axum::Json;
use decant_api::{Code, Empty, Force, Machine, Reclaim, Reclaimed};
use decant_base::{Epoch, MachineId, WorkerId};
use decant_drain::migration::{Phase, Role};
use decant_drain::{Event, Order, Row};
use serde::Deserialize;

use crate::agent::Agent;
use crate::server::Shared;
use crate::server::extract::{Args, Body, Id};
use crate::server::fail::Fail;
use crate::server::machines::{answer, not_found, order, owner_elsewhere};

/// A row of this worker's, whether it owns the machine or not: what it waits for is its own.
async fn row_here(agent: &Agent, machine: &MachineId) -> Result<std::sync::Arc<Row>, Fail> {
    let row = agent.rows.machine(machine);
    let waits = row.as_ref().is_some_and(|row| !decant_drain::why(row).is_empty());
    if !waits && let Some(owner) = owner_elsewhere(agent, machine).await {
        return Err(Fail::elsewhere(machine, &owner));
    }
    row.ok_or_else(|| not_found(machine))
}

pub(super) async fn retry(
    agent: Shared,
    Id(machine): Id<MachineId>,
    Body(Empty {}): Body<Empty>,
) -> Result<Json<Machine>, Fail> {
    row_here(&agent, &machine).await?;
    let row = agent.core.step(&machine, Event::Order(Order::Retry)).await?;
    answer(&agent, &row).await
}

pub(super) async fn clear_veto(
    agent: Shared,
    Id(machine): Id<MachineId>,
    Body(request): Body<Force>,
) -> Result<Json<Machine>, Fail> {
    let row = row_here(&agent, &machine).await?;
    if let Some((epoch, by)) = row.veto.as_ref().filter(|_| !request.force) {
        let own = row.state.owned().map_or_else(|| "none".to_owned(), |own| own.to_string());
        let than = if row.state.owned() == Some(*epoch) { "as high as" } else { "above" };
        let cause = format!(
            "{by} claims {machine} at epoch {epoch}, {than} the one here ({own}): if it runs there, it runs twice from then \
             on, and what one of them writes is lost"
        );
        let fix = format!("make sure that {by} does not have it, then repeat with --force");
        return Err(Fail::new(Code::NeedsForce, "somebody else may have it", cause, fix));
    }
    let row = agent.core.step(&machine, Event::Order(Order::ClearVeto)).await?;
    answer(&agent, &row).await
}

pub(super) async fn forget_origin(
    agent: Shared,
    Id(machine): Id<MachineId>,
    Body(request): Body<Force>,
) -> Result<Json<Machine>, Fail> {
    let row = row_here(&agent, &machine).await?;
    let waits = row.migration.as_ref().filter(|m| m.role == Role::Destination && m.phase == Phase::Verified);
    if let Some(migration) = waits.filter(|_| !request.force) {
        let from = &migration.peer;
        let cause = format!(
            "{from} is not told any more that nothing of it is needed; its sealed copy of {machine} is given up, and \
             nothing that is here is lost: every block was compared"
        );
        let fix = format!("if {from} is destroyed, repeat with --force");
        return Err(Fail::new(Code::NeedsForce, "this gives up the origin", cause, fix));
    }
    let row = agent.core.step(&machine, Event::Order(Order::ForgetOrigin)).await?;
    answer(&agent, &row).await
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct RemoveArgs {
    #[serde(default)]
    with_volume: bool,
    #[serde(default)]
    force: bool,
}

pub(super) async fn remove(
    agent: Shared,
    Id(machine): Id<MachineId>,
    Args(args): Args<RemoveArgs>,
) -> Result<Json<Empty>, Fail> {
    let row = agent.rows.machine(&machine);
    if let Some(volume) = row.and_then(|row| row.volume.clone()).filter(|_| !args.with_volume) {
        return Err(Fail::new(
            Code::NeedsForce,
            "machine has a volume",
            format!("removing {machine} deletes volume {volume} and its data for good"),
            "say --with-volume (with_volume=true) if that is meant; `decant machine stop` keeps both",
        ));
    }
    order(&agent, &machine, Order::Remove { force: args.force }).await?;
    Ok(Json(Empty {}))
}

/// A copy is not to be booted while `owner` has the machine: it went on from the worker that would be given up.
fn owned_by(machine: &MachineId, owner: &WorkerId, epoch: Epoch, answers: bool) -> Fail {
    let word = if answers { "has" } else { "does not answer, and when it last did it had" };
    let cause = format!("{owner} {word} {machine} at epoch {epoch}: booted here as well, it would run twice");
    let fix = if answers {
        format!("leave it where it is; to be rid of it there, run `decant machine rm {machine}` on {owner}")
    } else {
        format!(
            "bring {owner} back; if it is destroyed too, take it out of this worker's configuration, restart the agent, and repeat"
        )
    };
    Fail::new(Code::Conflict, "machine is elsewhere", cause, fix)
}

pub(super) async fn reclaim(
    agent: Shared,
    Id(machine): Id<MachineId>,
    Body(request): Body<Reclaim>,
) -> Result<Json<Reclaimed>, Fail> {
    let row = agent.rows.machine(&machine).ok_or_else(|| not_found(&machine))?;
    let (Some(loses), Some(migration)) = (decant_drain::reclaim_loses(&row), row.migration.clone()) else {
        let cause = format!("{} has no sealed copy of {machine}: it is {} here", agent.config.worker, row.state.name());
        return Err(Fail::new(
            Code::Conflict,
            "nothing to reclaim",
            cause,
            "`decant machine list` shows who has a copy",
        ));
    };
    if let Some((owner, epoch, answers)) = agent.peers.claimant(&machine, migration.epoch, &migration.peer).await {
        return Err(owned_by(&machine, &owner, epoch, answers));
    }
    if !request.force {
        let fix = format!("if {} is destroyed and will never run it again, repeat with --force", migration.peer);
        return Err(Fail::new(Code::NeedsForce, "this loses data", loses, fix));
    }
    let sealed_at_ms = migration.entered_ms.get(&decant_drain::migration::Phase::Sealed).copied().unwrap_or(0);
    let row = agent.core.step(&machine, Event::Order(Order::Reclaim)).await?;
    let Json(machine) = answer(&agent, &row).await?;
    Ok(Json(Reclaimed { machine, given_up: migration.peer, lost_since_at_ms: sealed_at_ms }))
}
