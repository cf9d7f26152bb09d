//! `/v1/workers`.

use axum::{Extension, Json};
use decant_api::{Cordon, Empty, Listing, Worker, WorkerState};
use decant_base::WorkerId;

use crate::agent::Agent;
use crate::core::Cordoned;
use crate::peers::{Peer, STANDING_PATH, Standing};
use crate::server::extract::{Args, Body, Id, ScopeArgs};
use crate::server::fail::Fail;
use crate::server::{Caller, Shared, from_peers, is_local, peer_error};

pub(super) async fn list(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Args(args): Args<ScopeArgs>,
) -> Json<Listing<Worker>> {
    let mut items = vec![agent.this_worker().await];
    let mut unreachable = Vec::new();
    if !is_local(&caller, args.scope) {
        for (worker, answer) in from_peers::<Standing>(&agent, STANDING_PATH).await {
            if answer.is_none() {
                unreachable.push(worker.clone());
            }
            items.extend(agent.peers.get(&worker).map(|peer| as_worker(peer, answer)));
        }
    }
    items.sort_by(|a, b| a.worker.cmp(&b.worker));
    Json(Listing { items, unreachable })
}

/// A peer as it answered, or as it was when it last did.
fn as_worker(peer: &Peer, answer: Option<Standing>) -> Worker {
    if let Some(standing) = answer {
        return standing.worker;
    }
    let last = peer.last();
    let reason = (!last.failure.is_empty()).then_some(last.failure);
    let known = last.standing.map(|standing| standing.worker);
    Worker {
        worker: peer.config.worker.clone(),
        worker_index: peer.config.worker_index,
        address: peer.config.address.to_string(),
        region: known.as_ref().map(|worker| worker.region.clone()).unwrap_or_default(),
        labels: known.as_ref().map(|worker| worker.labels.clone()).unwrap_or_default(),
        state: WorkerState::Unreachable,
        reason,
        drain: None,
        capacity: None,
        machines: known.as_ref().map_or(0, |worker| worker.machines),
        serving: known.as_ref().map_or(0, |worker| worker.serving),
        exposure_bytes: known.as_ref().map_or(0, |worker| worker.exposure_bytes),
        version: known.map(|worker| worker.version).unwrap_or_default(),
    }
}

pub(super) async fn show(agent: Shared, Id(worker): Id<WorkerId>) -> Result<Json<Worker>, Fail> {
    if worker == agent.config.worker {
        return Ok(Json(agent.this_worker().await));
    }
    let peer = peer(&agent, &worker)?;
    let client = peer.client.clone().with_timeout(std::time::Duration::from_millis(900));
    Ok(Json(as_worker(peer, client.get::<Standing>(STANDING_PATH).await.ok())))
}

fn peer<'a>(agent: &'a Agent, worker: &WorkerId) -> Result<&'a Peer, Fail> {
    let fix = "name a worker that `decant worker list` shows";
    agent.peers.get(worker).map(|peer| &**peer).ok_or_else(|| Fail::not_found("worker", worker, fix))
}

pub(super) async fn cordon(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(worker): Id<WorkerId>,
    Body(request): Body<Cordon>,
) -> Result<Json<Worker>, Fail> {
    if worker != agent.config.worker {
        return forward(&agent, &caller, &worker, &decant_api::path::cordon(&worker), &request).await;
    }
    let at_ms = agent.clock.now_ms();
    agent.core.cordon(Some(Cordoned { reason: request.reason, drain: None, at_ms })).await?;
    Ok(Json(agent.this_worker().await))
}

pub(super) async fn uncordon(
    agent: Shared,
    Extension(caller): Extension<Caller>,
    Id(worker): Id<WorkerId>,
    Body(request): Body<Empty>,
) -> Result<Json<Worker>, Fail> {
    if worker != agent.config.worker {
        return forward(&agent, &caller, &worker, &decant_api::path::uncordon(&worker), &request).await;
    }
    agent.core.cordon(None).await?;
    Ok(Json(agent.this_worker().await))
}

async fn forward(
    agent: &Agent,
    caller: &Caller,
    worker: &WorkerId,
    path: &str,
    request: &impl serde::Serialize,
) -> Result<Json<Worker>, Fail> {
    if *caller != Caller::Root {
        return Err(Fail::not_found("worker", worker, "ask the worker itself"));
    }
    let answer = peer(agent, worker)?.client.post(path, request).await;
    answer.map(Json).map_err(|error| peer_error(error).into())
}
