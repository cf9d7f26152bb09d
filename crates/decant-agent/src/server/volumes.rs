//! `/v1/volumes`.

use std::sync::Arc;
use std::time::Duration;

use axum::{Extension, Json};
use decant_api::{Code, CreateVolume, Empty, Listing, SealedCopy, Volume};
use decant_base::{BLOCK, Bytes, VolumeId};
use decant_dataplane::{Command, FailureCode};
use decant_drain::handoff::State;
use decant_drain::migration::Phase;
use decant_drain::{Desired, Event, Order, Row};

use crate::agent::Agent;
use crate::server::extract::{Args, Body, Id, ScopeArgs};
use crate::server::fail::Fail;
use crate::server::{Caller, Shared, is_local, list_all};

/// The smallest volume worth a file system.
const MIN_SIZE: Bytes = Bytes::mib(16);
/// Making or removing a volume takes a second or two; a plane that takes this long hangs.
const PATIENCE: Duration = Duration::from_secs(60);

pub(super) async fn list(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Args(args): Args<ScopeArgs>,
) -> Result<Json<Listing<Volume>>, Fail> {
    let ids = agent.volumes().await.map_err(|cause| unavailable(&cause))?;
    let own = futures_util::future::join_all(ids.into_iter().map(|volume| view(&agent, volume)));
    let local = is_local(&caller, args.scope);
    let mut listing = list_all(&agent, local, "/v1/volumes?scope=local", own).await;
    listing.items.sort_by(|a, b| (&a.volume, &a.worker).cmp(&(&b.volume, &b.worker)));
    Ok(Json(listing))
}

fn unavailable(cause: &str) -> Fail {
    Fail::new(Code::Unavailable, "data plane does not answer", cause, "look at the agent's log; machines run on")
}

async fn view(agent: &Agent, volume: VolumeId) -> Volume {
    let rows = agent.rows.machines();
    let row = rows.iter().find(|row| uses(row, &volume));
    let status = agent.statuses.of(&volume).await;
    let allocated = status.as_ref().map_or(Bytes::ZERO, |status| status.allocated);
    let problem = match &status {
        Err(cause) => Some(cause.clone()),
        Ok(status) => status.failed.clone(),
    };
    Volume {
        worker: agent.config.worker.clone(),
        machine: row.map(|row| row.machine.clone()),
        sealed: row.and_then(|row| sealed(row, allocated)),
        status: status.ok().map(|status| (*status).clone()),
        problem,
        volume,
    }
}

fn uses(row: &Row, volume: &VolumeId) -> bool {
    row.copy.as_ref().is_some_and(|copy| copy.volume == *volume)
        || row.volume.as_ref() == Some(volume) && !matches!(row.state, State::None)
}

fn sealed(row: &Row, size: Bytes) -> Option<SealedCopy> {
    let migration = row.migration.as_ref()?;
    let sealed_at_ms = migration.entered_ms.get(&Phase::Sealed).copied().unwrap_or(0);
    let copy = |expires_at_ms| SealedCopy {
        migration: migration.id.clone(),
        destination: migration.peer.clone(),
        sealed_at_ms,
        size,
        expires_at_ms,
    };
    match (&row.state, &row.copy) {
        (_, Some(kept)) => Some(SealedCopy { migration: kept.migration.clone(), ..copy(Some(kept.expires_ms)) }),
        (State::Sealed { .. }, None) => Some(copy(None)),
        _ => None,
    }
}

pub(super) async fn show(agent: Shared, Id(volume): Id<VolumeId>) -> Result<Json<Volume>, Fail> {
    known(&agent, &volume).await?;
    Ok(Json(view(&agent, volume).await))
}

async fn known(agent: &Agent, volume: &VolumeId) -> Result<(), Fail> {
    let ids = agent.volumes().await.map_err(|cause| unavailable(&cause))?;
    if ids.contains(volume) {
        return Ok(());
    }
    Err(Fail::not_found(
        "volume",
        volume,
        "list the fleet's with `decant volume list`; each is shown by its own worker",
    ))
}

pub(super) async fn create(agent: Shared, Body(request): Body<CreateVolume>) -> Result<Json<Volume>, Fail> {
    let CreateVolume { volume, size, sector_size } = request;
    if size < MIN_SIZE || !size.0.is_multiple_of(BLOCK) {
        let cause = format!("a volume of {size} ({} bytes) is not made", size.0);
        return Err(Fail::invalid(cause, format!("ask for a multiple of {BLOCK} bytes, at least {MIN_SIZE}")));
    }
    if sector_size != 512 && sector_size != 4096 {
        return Err(Fail::invalid(format!("sectors of {sector_size} bytes do not exist"), "ask for 512 or 4096"));
    }
    let existing = agent.volumes().await.map_err(|cause| unavailable(&cause))?;
    if existing.contains(&volume) {
        let (cause, fix) =
            (format!("{} has a volume {volume}", agent.config.worker), "choose another name, or delete that one");
        return Err(Fail::new(Code::Exists, "volume exists", cause, fix));
    }
    let capacity = agent.capacity();
    if capacity.bytes_used.0 >= capacity.bytes.0 {
        let cause = format!("its volumes take {} of {}", capacity.bytes_used, capacity.bytes);
        return Err(Fail::new(Code::NoRoom, "no room", cause, "delete volumes, or raise capacity.bytes"));
    }
    perform(&agent, Command::Create { volume: volume.clone(), size, sector_size }).await?;
    agent.note("volume.created", format!("volume {volume} of {size}"));
    Ok(Json(view(&agent, volume).await))
}

pub(super) async fn delete(agent: Shared, Id(volume): Id<VolumeId>) -> Result<Json<Empty>, Fail> {
    known(&agent, &volume).await?;
    let rows = agent.rows.machines();
    if let Some(row) = rows.iter().find(|row| uses(row, &volume)) {
        // A copy under retention may go before its time; nothing else that a machine needs may.
        if row.copy.as_ref().is_none_or(|copy| copy.volume != volume) {
            let removed = row.desired == Desired::Removed;
            let fix =
                if removed { "wait until the machine is gone" } else { "remove the machine; its volume goes with it" };
            return Err(Fail::new(
                Code::Conflict,
                "volume is in use",
                format!("it belongs to machine {}", row.machine),
                fix,
            ));
        }
        agent.core.step(&row.machine, Event::Order(Order::FreeCopy)).await?;
        freed(&agent, row, &volume).await?;
    }
    perform(&agent, Command::Delete { volume: volume.clone() }).await?;
    agent.note("volume.deleted", format!("volume {volume}"));
    Ok(Json(Empty {}))
}

/// Waits until the copy's payload is gone and no row speaks of it.
async fn freed(agent: &Agent, row: &Row, volume: &VolumeId) -> Result<(), Fail> {
    let mut changes = agent.rows.changes();
    let gone = async {
        while agent.rows.machine(&row.machine).is_some_and(|row| uses(&row, volume)) {
            let _ = changes.changed().await;
        }
    };
    let cause = format!("the payload of {volume} is being discarded");
    let fail = Fail::new(Code::Timeout, "not done yet", cause, "look at `decant volume list`; it goes on");
    tokio::time::timeout(PATIENCE, gone).await.map_err(|_| fail)
}

async fn perform(agent: &Arc<Agent>, command: Command) -> Result<(), Fail> {
    let world = agent.world.clone();
    let task = tokio::task::spawn_blocking(move || world.perform(&command));
    match tokio::time::timeout(PATIENCE, task).await {
        Ok(Ok(Ok(_))) => Ok(()),
        Ok(Ok(Err(failure))) => {
            let is_full = failure.code == FailureCode::Refused && failure.message.contains("room");
            let fail = Fail::from(failure);
            if is_full { Err(Fail(decant_api::ErrorBody { code: Code::NoRoom, ..fail.0 })) } else { Err(fail) }
        }
        Ok(Err(_)) => {
            Err(Fail::new(Code::Internal, "the agent failed", "a task ended early", "report it with the agent's log"))
        }
        Err(_) => Err(Fail::new(
            Code::Timeout,
            "not done yet",
            format!("the data plane takes longer than {} s", PATIENCE.as_secs()),
            "look at `decant volume list`; it goes on",
        )),
    }
}
