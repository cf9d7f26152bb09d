//! What a drain wants done: cordons, surveys, moves. Each errand is a task of its own; its outcome is an event of the drain.

use std::sync::Arc;
use std::time::Duration;

use decant_api::Cordon;
use decant_base::{Bytes, MachineId, WorkerId};
use decant_dataplane::{Protocol, Reader};
use decant_drain::drain::{DrainEffect, DrainEvent, DrainRow};
use decant_drain::handoff::State;
use decant_drain::plan::{Fleet, MachineFacts, Serving, WorkerFacts};
use decant_drain::{Event, Move, Order, Row};
use futures_util::future::join_all;
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc::UnboundedReceiver;

use crate::agent::Agent;
use crate::core::{Cordoned, Errand, is_or_will_be_here, read_spec};
use crate::statuses;

/// Where peers ask for a worker's facts.
pub(crate) const FACTS_PATH: &str = "/v1/peer/facts";
/// A worker that takes longer to answer counts as unreachable in a plan.
const PATIENCE: Duration = Duration::from_secs(3);

/// What a plan needs to know of one worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Facts {
    pub(crate) worker: WorkerFacts,
    pub(crate) machines: Vec<MachineFacts>,
    /// Lowest and highest rate, bytes per second, at which volumes filled here lately; absent if none did.
    #[serde(default)]
    pub(crate) rate: Option<(Bytes, Bytes)>,
}

/// Runs errands as they come.
pub(crate) async fn run(agent: Arc<Agent>, mut errands: UnboundedReceiver<Errand>) {
    while let Some(Errand { row, effect }) = errands.recv().await {
        let agent = agent.clone();
        tokio::spawn(async move {
            if let Some(event) = perform(&agent, &row, effect).await {
                agent.core.drain_event(&row.order.drain, event);
            }
        });
    }
}

async fn perform(agent: &Arc<Agent>, row: &DrainRow, effect: DrainEffect) -> Option<DrainEvent> {
    match effect {
        DrainEffect::Cordon { worker } => {
            let failure = cordon(agent, row, &worker).await.err().unwrap_or_default();
            Some(DrainEvent::Cordoned { worker, failure })
        }
        DrainEffect::Uncordon => {
            if let Err(refusal) = agent.core.cordon(None).await {
                tracing::warn!(%refusal, "not uncordoned");
            }
            None
        }
        DrainEffect::Survey => Some(DrainEvent::Surveyed { fleet: Box::new(survey(agent).await) }),
        DrainEffect::Move { machine, migration, to } => {
            let (limits, protocol) = (row.order.limits, row.order.protocol);
            let order = async {
                let reader = reader_at(agent, &to, protocol).await?;
                let program = program_of(agent, &machine, row.order.any_program).await?;
                let (reason, drain) = (row.order.reason.clone(), Some(row.order.drain.clone()));
                let order = Move { migration: migration.clone(), to, reader, reason, drain, limits, program };
                let stepped = agent.core.step(&machine, Event::Order(Order::Move(Box::new(order)))).await;
                stepped.map(drop).map_err(|refusal| refusal.to_string())
            };
            let reason = order.await.err()?;
            Some(DrainEvent::MoveDenied { machine, migration, reason })
        }
        DrainEffect::CancelMigration { machine, migration } => {
            agent.core.event(&machine, Event::Order(Order::Cancel { migration }));
            None
        }
        // The core keeps the timers.
        DrainEffect::Wake { .. } => None,
    }
}

/// A destination as the one reader of the exports to it. It connects from the address that its agent listens on.
pub(crate) async fn reader_at(agent: &Agent, worker: &WorkerId, protocol: Protocol) -> Result<Reader, String> {
    let Some(peer) = agent.peers.get(worker) else {
        return Err(format!("{worker} is not among the peers of {}: add it to its configuration", agent.config.worker));
    };
    let certificate = tokio::time::timeout(PATIENCE, peer.certificate()).await;
    match certificate {
        Ok(Ok(certificate)) => Ok(Reader { certificate, address: peer.config.address.ip(), protocol }),
        Ok(Err(error)) => Err(format!("{worker} does not answer: {}", error.into_body().cause)),
        Err(_) => Err(format!("{worker} did not answer within {} s", PATIENCE.as_secs())),
    }
}

/// The program that a machine of this worker was started from, as the destination must have it; `None` if any will do.
pub(crate) async fn program_of(agent: &Agent, machine: &MachineId, any: bool) -> Result<Option<String>, String> {
    let spec = agent.rows.machine(machine).and_then(|row| read_spec(row.spec.as_ref()?).ok()).filter(|_| !any);
    let Some(spec) = spec else { return Ok(None) };
    let machines = agent.world.machines.clone();
    let digest = tokio::task::spawn_blocking(move || machines.program(&spec)).await;
    let digest = digest.map_err(|_| "a task ended early; report it with the agent's log".to_owned())?;
    digest.map(Some).map_err(|failure| {
        format!("its program cannot be told from others: {}; --any-program moves it all the same", failure.message)
    })
}

async fn cordon(agent: &Arc<Agent>, row: &DrainRow, worker: &WorkerId) -> Result<(), String> {
    let reason = format!("drain {}: {}", row.order.drain, row.order.reason);
    if *worker == agent.config.worker {
        let cordon = Cordoned { reason, drain: Some(row.order.drain.clone()), at_ms: agent.clock.now_ms() };
        return agent.core.cordon(Some(cordon)).await.map_err(|refusal| refusal.to_string());
    }
    let Some(peer) = agent.peers.get(worker) else {
        return Err(format!("{worker} is not among the peers of {}", agent.config.worker));
    };
    let path = decant_api::path::cordon(worker);
    let client = peer.client.clone().with_timeout(PATIENCE);
    client
        .post::<decant_api::Worker>(&path, &Cordon { reason })
        .await
        .map(drop)
        .map_err(|error| error.into_body().cause)
}

/// Asks every worker for its facts.
pub(crate) async fn survey(agent: &Arc<Agent>) -> Fleet {
    let peers = agent.peers.all().map(|peer| async move {
        let answer = peer.client.clone().with_timeout(PATIENCE).get::<Facts>(FACTS_PATH).await;
        answer.unwrap_or_else(|error| unreachable_facts(&peer.config.worker, error.into_body().cause))
    });
    let mut all = vec![facts(agent).await];
    all.extend(join_all(peers).await);
    let rates: Vec<(Bytes, Bytes)> = all.iter().filter_map(|facts| facts.rate).collect();
    let measured = rates.iter().map(|rate| rate.0).min().zip(rates.iter().map(|rate| rate.1).max());
    let mut fleet =
        Fleet { rate: measured.unwrap_or(statuses::ASSUMED), rate_is_assumed: measured.is_none(), ..Fleet::default() };
    for facts in all {
        fleet.workers.push(facts.worker);
        fleet.machines.extend(facts.machines);
    }
    // Until these are released this worker is not safe to power off, whoever ordered their moves.
    fleet.serving = agent.rows.machines().iter().filter_map(|row| serving(row)).collect();
    fleet
}

fn serving(row: &Row) -> Option<Serving> {
    let State::Sealed { to, migration, .. } = &row.state else { return None };
    Some(Serving { machine: row.machine.clone(), migration: migration.clone(), to: to.clone() })
}

fn unreachable_facts(worker: &WorkerId, cause: String) -> Facts {
    let worker = WorkerFacts {
        worker: worker.clone(),
        unreachable: cause,
        cordoned: false,
        labels: std::collections::BTreeMap::new(),
        machines_max: 0,
        bytes_free: Bytes::ZERO,
    };
    Facts { worker, machines: Vec::new(), rate: None }
}

/// This worker's own.
pub(crate) async fn facts(agent: &Arc<Agent>) -> Facts {
    let capacity = agent.capacity();
    let config = &agent.config;
    let worker = WorkerFacts {
        worker: config.worker.clone(),
        unreachable: String::new(),
        cordoned: agent.rows.worker().cordoned.is_some(),
        labels: config.labels.clone(),
        machines_max: u32::try_from(config.max_machines).unwrap_or(u32::MAX),
        bytes_free: capacity.bytes_free.min(Bytes(capacity.bytes.0.saturating_sub(capacity.bytes_used.0))),
    };
    let rows = agent.rows.machines();
    let machines = rows.iter().filter(|row| is_or_will_be_here(row)).map(|row| async move {
        let spec = row.spec.as_ref().and_then(|spec| read_spec(spec).ok());
        let status = match &row.volume {
            Some(volume) => Some(agent.statuses.of(volume).await),
            None => None,
        };
        let (immovable, fix) = immovable(row, status.as_ref());
        MachineFacts {
            machine: row.machine.clone(),
            worker: row.worker.clone(),
            group: spec.as_ref().and_then(|spec| spec.group.clone()),
            needs: spec.map(|spec| spec.needs).unwrap_or_default(),
            bytes: status.and_then(Result::ok).map_or(Bytes::ZERO, |status| status.allocated),
            immovable,
            fix,
        }
    });
    let machines = join_all(machines).await;
    Facts { worker, machines, rate: agent.statuses.recent_rates() }
}

/// Why a machine cannot move now, and what clears that; both empty if it can.
fn immovable(row: &decant_drain::Row, status: Option<&crate::statuses::Answer>) -> (String, String) {
    let none = (String::new(), String::new());
    if row.state.owned().is_none() {
        return none;
    }
    match status {
        Some(Err(cause)) => {
            (format!("its volume does not answer: {cause}"), "look at the volume with `decant volume show`".to_owned())
        }
        Some(Ok(status)) if status.failed.is_some() => (
            status.failed.clone().unwrap_or_default(),
            "the volume takes no more writes; replace the disk and restore the machine".to_owned(),
        ),
        _ => none,
    }
}
