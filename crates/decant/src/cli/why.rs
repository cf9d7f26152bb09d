//! `decant why`: every wait has a named reason, since when, the next try, and what clears it.

use decant_api::{Drain, Listing, Machine, Migration, Scope, Volume, Why, Worker, path};
use serde::Serialize;

use super::output::{moment, show};
use super::{Exit, Failure, Global};

/// `decant why`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Examples:\n  decant why\n  decant why orders")]
pub(crate) struct WhyArgs {
    /// A worker, machine, volume, drain or migration; all of them if absent.
    subject: Option<String>,
}

/// One thing that waits.
#[derive(Debug, Serialize)]
struct Wait {
    kind: &'static str,
    subject: String,
    worker: String,
    reason: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    since_at_ms: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    retry_at_ms: Option<u64>,
    /// Tries in vain so far.
    attempts: u32,
    clears: String,
}

pub(crate) fn run(args: &WhyArgs, global: &Global) -> Result<Exit, Failure> {
    let mut agent = global.agent();
    let workers: Listing<Worker> = agent.get(&path::workers(Scope::Fleet))?;
    let machines: Listing<Machine> = agent.get(&path::machines(Scope::Fleet))?;
    let migrations: Listing<Migration> = agent.get(&path::migrations(Scope::Fleet))?;
    let volumes: Listing<Volume> = agent.get(&path::volumes(Scope::Fleet))?;
    let drains: Listing<Drain> = agent.get(&path::drains())?;
    let mut waits = Vec::new();
    waits.extend(workers.items.iter().filter_map(of_worker));
    waits.extend(drains.items.iter().flat_map(of_drain));
    for machine in &machines.items {
        waits.extend(machine.why.as_ref().map(|why| waiting("machine", &machine.machine, &machine.worker, why)));
    }
    for migration in migrations.items.iter().filter(|migration| !migration.phase.is_final()) {
        let seen_by = match migration.role {
            decant_api::Role::Source => &migration.source,
            decant_api::Role::Destination => &migration.destination,
        };
        waits.extend(migration.why.as_ref().map(|why| waiting("migration", &migration.migration, seen_by, why)));
    }
    waits.extend(volumes.items.iter().filter_map(of_volume));
    if let Some(subject) = &args.subject {
        waits.retain(|wait| wait.subject == *subject || wait.worker == *subject);
    }
    show(global.output, &waits, |waits| match (waits.is_empty(), &args.subject) {
        (true, None) => "nothing waits".to_owned(),
        (true, Some(subject)) => format!("{subject} waits for nothing"),
        (false, _) => waits.iter().map(text).collect::<Vec<_>>().join("\n"),
    });
    Ok(Exit::Done)
}

fn waiting(kind: &'static str, subject: &impl ToString, worker: &impl ToString, why: &Why) -> Wait {
    Wait {
        kind,
        subject: subject.to_string(),
        worker: worker.to_string(),
        reason: why.reason.clone(),
        since_at_ms: Some(why.since_at_ms),
        retry_at_ms: why.retry_at_ms,
        attempts: why.attempts,
        clears: why.clears.clone(),
    }
}

fn known(kind: &'static str, subject: String, worker: String, reason: String, clears: String) -> Wait {
    Wait { kind, subject, worker, reason, since_at_ms: None, retry_at_ms: None, attempts: 0, clears }
}

fn of_worker(worker: &Worker) -> Option<Wait> {
    use decant_api::WorkerState::{Cordoned, Drained, Draining, Evacuated, Ready, Unreachable};
    let name = worker.worker.to_string();
    let because = worker.reason.as_ref().map(|reason| format!(": {reason}")).unwrap_or_default();
    let (reason, clears) = match worker.state {
        Ready | Draining | Drained => return None,
        Cordoned => (format!("takes no machines{because}"), format!("decant worker uncordon {name}")),
        Evacuated => (format!("{} volumes are still read from it", worker.serving), "their hydration ends".to_owned()),
        Unreachable => ("does not answer".to_owned(), "its agent runs and the network reaches it".to_owned()),
    };
    Some(known("worker", name.clone(), name, reason, clears))
}

fn of_drain(drain: &Drain) -> Vec<Wait> {
    if drain.phase.is_final() {
        return Vec::new();
    }
    let blocked = drain.blockers.iter().map(|blocker| {
        let reason = match &blocker.machine {
            Some(machine) => format!("{machine}: {}, {}", blocker.name, blocker.cause),
            None => format!("{}, {}", blocker.name, blocker.cause),
        };
        known("drain", drain.drain.to_string(), blocker.worker.to_string(), reason, blocker.fix.clone())
    });
    blocked.collect()
}

fn of_volume(volume: &Volume) -> Option<Wait> {
    let status = volume.status.as_ref();
    let about = |reason: String, clears: &str| {
        Some(known("volume", volume.volume.to_string(), volume.worker.to_string(), reason, clears.to_owned()))
    };
    if let Some(failed) = status.and_then(|status| status.failed.clone()).or_else(|| volume.problem.clone()) {
        return about(failed, "a person: it acknowledges nothing until its cause is removed");
    }
    let clone = status?.clone.as_ref().filter(|clone| clone.bytes_missing > 0)?;
    if !clone.connected {
        return about(format!("its origin {} does not answer", clone.origin), "the origin is reached again");
    }
    (!clone.hindrance.is_empty())
        .then(|| about(clone.hindrance.clone(), "the limit is lifted or the origin speeds up"))
        .flatten()
}

fn text(wait: &Wait) -> String {
    let since = wait.since_at_ms.map(|at| format!(", since {}", moment(at))).unwrap_or_default();
    let tried = match wait.attempts {
        0 => String::new(),
        1 => ", tried once".to_owned(),
        times => format!(", tried {times} times"),
    };
    let retry = wait.retry_at_ms.map(|at| format!(", next try {}", moment(at))).unwrap_or_default();
    format!(
        "{} {} on {}: {}{since}{tried}{retry}\n  clears when: {}",
        wait.kind, wait.subject, wait.worker, wait.reason, wait.clears
    )
}
