//! Where each machine of a drained worker goes, what that costs, and everything that stands in the way.

use std::collections::{BTreeMap, BTreeSet};

use decant_base::{Bytes, MachineId, MigrationId, WorkerId};
use serde::{Deserialize, Serialize};

use crate::progress::Eta;

/// What is known of the fleet when a plan is made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fleet {
    /// Every worker that is configured, the drained one too.
    pub workers: Vec<WorkerFacts>,
    /// Every machine of the workers that answered.
    pub machines: Vec<MachineFacts>,
    /// Bytes per second that a link carried lately, lowest and highest; 0 if not known.
    pub rate: (Bytes, Bytes),
    /// Nothing was measured: the rate is what links are taken to carry.
    #[serde(default)]
    pub rate_is_assumed: bool,
    /// What the drained worker still serves: migrations from it that are sealed and not released, of any drain or none.
    #[serde(default)]
    pub serving: Vec<Serving>,
}

/// A migration whose origin the drained worker still is.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Serving {
    /// Which machine.
    pub machine: MachineId,
    /// Which migration.
    pub migration: MigrationId,
    /// Its destination.
    pub to: WorkerId,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerFacts {
    /// Which.
    pub worker: WorkerId,
    /// Why it cannot be asked; empty if it answered.
    pub unreachable: String,
    /// Whether it takes no new machines.
    pub cordoned: bool,
    /// Its labels.
    pub labels: BTreeMap<String, String>,
    /// Machines it may hold.
    pub machines_max: u32,
    /// Bytes free for volumes.
    pub bytes_free: Bytes,
}

/// One machine.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct MachineFacts {
    /// Which.
    pub machine: MachineId,
    /// Its owner.
    pub worker: WorkerId,
    /// Machines of one group are kept apart and moved one at a time.
    pub group: Option<String>,
    /// Labels that its worker must have.
    pub needs: BTreeMap<String, String>,
    /// Bytes allocated for its volume; 0 if it has none.
    pub bytes: Bytes,
    /// Why it cannot be moved now; empty if it can.
    pub immovable: String,
    /// What clears that; empty if nothing is wrong.
    pub fix: String,
}

/// One move of a plan.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct PlannedMove {
    /// Which machine.
    pub machine: MachineId,
    /// From.
    pub from: WorkerId,
    /// To.
    pub to: WorkerId,
    /// Its group.
    pub group: Option<String>,
    /// Bytes to move at most.
    pub bytes: Bytes,
    /// How long alone on the link.
    pub eta: Eta,
}

/// Something that stands in the way.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Blocker {
    /// Whose; `None` if it concerns the drain as a whole.
    pub machine: Option<MachineId>,
    /// A stable word: `no-place`, `immovable`, `unreachable`, `unknown-worker`, `self`.
    pub code: String,
    /// Cause, each candidate with its reason.
    pub reason: String,
    /// What to do.
    pub fix: String,
}

/// A plan. It can be carried out in full if there are no blockers.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Plan {
    /// In the order they will start.
    pub moves: Vec<PlannedMove>,
    /// All of them, not only the first.
    pub blockers: Vec<Blocker>,
    /// Bytes to move at most.
    pub bytes: Bytes,
    /// When it will be done.
    pub eta: Eta,
    /// The times stand on an assumed rate, nothing was measured.
    #[serde(default)]
    pub eta_is_assumed: bool,
}

/// What a plan must respect besides the fleet.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Wishes {
    /// The workers to empty; none of them is a destination.
    pub worker: Vec<WorkerId>,
    /// The one destination, if the operator named it. It must have room and the labels; groups may meet there.
    pub to: Option<WorkerId>,
    /// Machines at once, at least 1. The places do not depend on it.
    pub max: u32,
}

/// What a candidate has left while machines are given places.
struct Candidate<'a> {
    facts: &'a WorkerFacts,
    machines: u32,
    bytes_free: u64,
    groups: BTreeSet<&'a str>,
}

/// Makes a plan: every machine of `wishes.worker` gets a place, or a blocker that says why not.
///
/// The largest machines choose first, each the worker with the fewest machines, then the most room, then by name. The
/// smallest start first: they free their origins soonest. The same arguments give the same plan, on any worker.
pub fn plan(fleet: &Fleet, wishes: &Wishes) -> Plan {
    let mut plan = Plan { blockers: general_blockers(fleet, wishes), ..Plan::default() };
    let mut candidates = candidates(fleet, wishes);
    let mut machines: Vec<&MachineFacts> =
        fleet.machines.iter().filter(|m| wishes.worker.contains(&m.worker)).collect();
    machines.sort_by(|a, b| b.bytes.cmp(&a.bytes).then_with(|| a.machine.cmp(&b.machine)));
    for machine in machines {
        if !machine.immovable.is_empty() {
            plan.blockers.push(blocker(Some(machine), "immovable", machine.immovable.clone(), &machine.fix));
            continue;
        }
        match place(machine, &mut candidates, wishes) {
            Ok(to) => plan.moves.push(PlannedMove {
                machine: machine.machine.clone(),
                from: machine.worker.clone(),
                to,
                group: machine.group.clone(),
                bytes: machine.bytes,
                eta: Eta::of(machine.bytes.0, fleet.rate.0, fleet.rate.1),
            }),
            Err(reason) => {
                let fix = "make room, add a worker, or name a destination with --to";
                plan.blockers.push(blocker(Some(machine), "no-place", reason, fix));
            }
        }
    }
    plan.moves.sort_by(|a, b| a.bytes.cmp(&b.bytes).then_with(|| a.machine.cmp(&b.machine)));
    plan.bytes = Bytes(plan.moves.iter().map(|planned| planned.bytes.0).fold(0, u64::saturating_add));
    plan.eta = Eta::of(plan.bytes.0, fleet.rate.0, fleet.rate.1);
    plan.eta_is_assumed = fleet.rate_is_assumed;
    plan
}

fn blocker(machine: Option<&MachineFacts>, code: &str, reason: String, fix: &str) -> Blocker {
    let (code, fix) = (code.to_owned(), fix.to_owned());
    Blocker { machine: machine.map(|facts| facts.machine.clone()), code, reason, fix }
}

/// What stands in the way of the drain as a whole.
fn general_blockers(fleet: &Fleet, wishes: &Wishes) -> Vec<Blocker> {
    let mut blockers = Vec::new();
    let known = |worker: &WorkerId| fleet.workers.iter().find(|facts| facts.worker == *worker);
    for worker in wishes.worker.iter().chain(&wishes.to) {
        match known(worker) {
            None => {
                let reason = format!("{worker} is not known");
                blockers.push(blocker(
                    None,
                    "unknown-worker",
                    reason,
                    "add it to the configuration's peers, or mind the spelling",
                ));
            }
            Some(facts) if !facts.unreachable.is_empty() => {
                let reason = format!("{worker} does not answer: {}", facts.unreachable);
                blockers.push(blocker(None, "unreachable", reason, "start its agent, or look at the network between"));
            }
            Some(_) => {}
        }
    }
    if let Some(to) = wishes.to.as_ref().filter(|to| wishes.worker.contains(to)) {
        let reason = format!("{to} is to be emptied itself");
        blockers.push(blocker(None, "self", reason, "name another destination"));
    }
    blockers
}

fn candidates<'a>(fleet: &'a Fleet, wishes: &Wishes) -> Vec<Candidate<'a>> {
    let wanted = |facts: &&WorkerFacts| {
        !wishes.worker.contains(&facts.worker) && wishes.to.as_ref().is_none_or(|to| *to == facts.worker)
    };
    let with_load = |facts: &'a WorkerFacts| {
        let here = || fleet.machines.iter().filter(|machine| machine.worker == facts.worker);
        Candidate {
            facts,
            machines: here().count().try_into().unwrap_or(u32::MAX),
            bytes_free: facts.bytes_free.0,
            groups: here().filter_map(|machine| machine.group.as_deref()).collect(),
        }
    };
    fleet.workers.iter().filter(wanted).map(with_load).collect()
}

/// Gives `machine` a place, or says of every candidate why it is none.
fn place<'a>(machine: &'a MachineFacts, candidates: &mut [Candidate<'a>], wishes: &Wishes) -> Result<WorkerId, String> {
    let mut reasons = Vec::new();
    let mut best: Option<usize> = None;
    for (index, candidate) in candidates.iter().enumerate() {
        if let Some(reason) = unfit(machine, candidate, wishes.to.is_some()) {
            reasons.push(format!("{} {reason}", candidate.facts.worker));
            continue;
        }
        let rank = |at: usize| {
            let candidate = &candidates[at];
            (candidate.machines, u64::MAX - candidate.bytes_free, &candidate.facts.worker)
        };
        if best.is_none_or(|best| rank(index) < rank(best)) {
            best = Some(index);
        }
    }
    let Some(best) = best else {
        return Err(if reasons.is_empty() { "there is no other worker".to_owned() } else { reasons.join("; ") });
    };
    let chosen = &mut candidates[best];
    chosen.machines = chosen.machines.saturating_add(1);
    chosen.bytes_free = chosen.bytes_free.saturating_sub(machine.bytes.0);
    chosen.groups.extend(machine.group.as_deref());
    Ok(chosen.facts.worker.clone())
}

/// Why the candidate cannot take the machine.
fn unfit(machine: &MachineFacts, candidate: &Candidate<'_>, is_named: bool) -> Option<String> {
    let facts = candidate.facts;
    if !facts.unreachable.is_empty() {
        return Some(format!("does not answer: {}", facts.unreachable));
    }
    if facts.cordoned {
        return Some("is cordoned".to_owned());
    }
    if let Some((label, wanted)) = machine.needs.iter().find(|(label, wanted)| facts.labels.get(*label) != Some(wanted))
    {
        return Some(format!("has no label {label}={wanted}"));
    }
    if candidate.machines >= facts.machines_max {
        return Some(format!("is full: {} of {} machines", candidate.machines, facts.machines_max));
    }
    if candidate.bytes_free < machine.bytes.0 {
        let (free, needed) = (Bytes(candidate.bytes_free), machine.bytes);
        return Some(format!("has no room: {free} free, {needed} needed"));
    }
    let group = machine.group.as_deref().filter(|group| candidate.groups.contains(group) && !is_named)?;
    Some(format!("has a machine of group {group} already"))
}
