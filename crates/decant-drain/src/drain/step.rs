//! The drain's one way in.

use decant_base::{DrainId, MachineId, MigrationId, WorkerId};
use decant_dataplane::{Failure, FailureCode};
use decant_fsm::Backoff;

use super::{DrainEffect, DrainEvent, DrainMachine, DrainRow, DrainState, DrainStep, MigrationNews};
use crate::migration::Phase;
use crate::plan::{Blocker, Fleet, Plan, Wishes, plan};
use crate::points::Point;
use crate::vocabulary::Sync;
use crate::wait::{self, Severity, Wait};

/// Between two looks at a fleet in which the drain is blocked, and between tries to cordon a worker.
const LOOK_AGAIN: Backoff = Backoff { base_ms: 2_000, max_ms: 15_000 };
/// Between two looks at what an evacuated worker still serves for others.
const SERVING_MS: u64 = 1_000;
/// Between two migrations of one machine that went back.
const MACHINE: Backoff = Backoff { base_ms: 1_000, max_ms: 60_000 };
/// After so many migrations that went back the machine is a blocker, and the others go on.
const TRIES: u32 = 4;

/// What follows from `event`. Pure. An event that does not matter leaves the row [`Sync::Unchanged`] without effects.
pub fn drain_step(row: &DrainRow, event: DrainEvent, now_ms: u64) -> DrainStep {
    let mut draft = Draft { row: row.clone(), effects: Vec::new(), now_ms };
    let rearm = matches!(event, DrainEvent::Wake | DrainEvent::Restarted);
    if !row.state.is_over() {
        draft.handle(event);
    }
    draft.finish(row, rearm)
}

/// What must be (re)performed in this state.
pub fn drain_pending(row: &DrainRow, now_ms: u64) -> Vec<DrainEffect> {
    let mut effects = wanted(row, now_ms);
    effects.extend(next_wake(row).map(|at_ms| DrainEffect::Wake { at_ms }));
    effects
}

/// What the state wants done, whether it was tried or not.
fn wanted(row: &DrainRow, now_ms: u64) -> Vec<DrainEffect> {
    let ordered =
        || row.machines.iter().filter_map(|(machine, entry)| Some((machine, entry, entry.migration.clone()?)));
    match row.state {
        DrainState::Cordoning => {
            let missing = row.order.workers.iter().filter(|worker| !row.cordoned.contains(worker));
            missing.map(|worker| DrainEffect::Cordon { worker: worker.clone() }).collect()
        }
        DrainState::Planning => vec![DrainEffect::Survey],
        DrainState::Blocked if row.wait.as_ref().is_none_or(|wait| wait.is_due(now_ms)) => vec![DrainEffect::Survey],
        DrainState::Evacuated if !row.serving.is_empty() => vec![DrainEffect::Survey],
        // The same order again is no new one.
        DrainState::Moving => ordered()
            .filter(|(_, entry, _)| entry.phase.is_none())
            .map(|(machine, entry, migration)| DrainEffect::Move {
                machine: machine.clone(),
                migration,
                to: entry.to.clone(),
            })
            .collect(),
        DrainState::Cancelling => ordered()
            .filter(|(_, entry, _)| !entry.is_committed() && !entry.is_back())
            .map(|(machine, _, migration)| DrainEffect::CancelMigration { machine: machine.clone(), migration })
            .collect(),
        _ => Vec::new(),
    }
}

/// When the row must be looked at again by itself.
fn next_wake(row: &DrainRow) -> Option<u64> {
    if row.state.is_over() {
        return None;
    }
    let deadline = row.order.deadline_ms.filter(|_| !row.overdue);
    let machines = row.machines.values().filter(|_| row.state == DrainState::Moving).filter_map(|entry| entry.retry_ms);
    machines.chain(deadline).chain(row.wait.as_ref().and_then(|wait| wait.retry_ms)).min()
}

/// A migration's id that is the same whenever the same try of the same drain is ordered.
fn migration_id(drain: &DrainId, machine: &MachineId, attempt: u32) -> MigrationId {
    let seed = format!("{drain}/{machine}/{attempt}");
    let fnv =
        |basis: u64| seed.bytes().fold(basis, |hash, byte| (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3));
    let name: String = machine.as_str().chars().take(40).collect();
    let text = format!("{name}-{:016x}", fnv(0xcbf2_9ce4_8422_2325));
    MigrationId::new(text).unwrap_or_else(|_| unreachable!("a machine's name and hexadecimal digits are a label"))
}

impl DrainMachine {
    /// The destination owns it.
    fn is_committed(&self) -> bool {
        self.phase.is_some_and(|phase| (Phase::Granted..=Phase::Cleaned).contains(&phase))
    }

    /// Its migration went back, or none was ordered.
    fn is_back(&self) -> bool {
        self.migration.is_none() || self.phase.is_some_and(|phase| phase >= Phase::Unwinding)
    }

    /// It takes one of the places of machines that move at once.
    fn is_moving(&self) -> bool {
        self.migration.is_some() && self.phase.is_none_or(|phase| phase < Phase::Verified)
    }

    /// Its migration is not to be touched by a new plan.
    fn is_under_way(&self) -> bool {
        self.is_moving() || self.is_committed()
    }

    /// Nothing of it is left here.
    fn is_gone(&self) -> bool {
        self.phase == Some(Phase::Cleaned)
    }
}

struct Draft {
    row: DrainRow,
    effects: Vec<DrainEffect>,
    now_ms: u64,
}

impl Draft {
    fn handle(&mut self, event: DrainEvent) {
        match event {
            DrainEvent::Restarted => {
                let effects = wanted(&self.row, self.now_ms);
                self.effects.extend(effects);
                self.go_on();
            }
            DrainEvent::Wake => self.due(),
            DrainEvent::Cordoned { worker, failure } => self.cordoned(worker, failure),
            DrainEvent::Surveyed { fleet } => self.surveyed(&fleet),
            DrainEvent::News(news) => self.news(news),
            DrainEvent::MoveDenied { machine, migration, reason } => self.went_back(&machine, &migration, reason),
            DrainEvent::Resume => self.resume(),
            DrainEvent::Cancel => self.cancel(),
            DrainEvent::Max(max) => {
                self.row.order.max = max.max(1);
                self.go_on();
            }
        }
    }

    fn finish(mut self, before: &DrainRow, rearm: bool) -> DrainStep {
        let wake = next_wake(&self.row);
        if let Some(at_ms) = wake
            && (rearm || wake != next_wake(before))
        {
            self.effects.push(DrainEffect::Wake { at_ms });
        }
        let but_for_waits = |row: &DrainRow| DrainRow { wait: None, ..row.clone() };
        let sync = match () {
            () if *before == self.row => Sync::Unchanged,
            () if but_for_waits(before) == but_for_waits(&self.row) => Sync::Later,
            () => Sync::Now,
        };
        DrainStep { point: Point::of_drain(self.row.state), row: self.row, sync, effects: self.effects }
    }

    fn enter(&mut self, state: DrainState) {
        self.row.state = state;
        self.row.entered_ms.insert(state, self.now_ms);
        let (on, clears) = match state {
            DrainState::Cordoning => {
                ("cordon", "every worker of the drain has confirmed that it takes no new machines")
            }
            DrainState::Planning => ("survey", "the workers have told what they have"),
            DrainState::Moving => ("machines", "every machine is owned by its new worker"),
            DrainState::Blocked => {
                ("blockers", "what stands in the way is removed; the fleet is looked at again by itself")
            }
            DrainState::Evacuated => ("hydration", "no block and no client is served from here any more"),
            DrainState::Cancelling => ("cancel", "every migration has gone back or is past its commit point"),
            DrainState::Drained | DrainState::Cancelled | DrainState::Overdue => {
                self.row.wait = None;
                return;
            }
        };
        self.row.wait = Some(Wait::new(on, clears, self.now_ms));
    }

    /// Looks at the fleet again after a while.
    fn later(&mut self, reason: &str) {
        let (name, now_ms) = (self.row.order.drain.as_str().to_owned(), self.now_ms);
        let failure = Failure { code: FailureCode::Retry, message: reason.to_owned() };
        let on = self.row.wait.as_ref().map_or("blockers", |wait| wait.on.as_str()).to_owned();
        wait::retry(&mut self.row.wait, &on, &failure, LOOK_AGAIN, &name, now_ms);
    }

    fn cordoned(&mut self, worker: WorkerId, failure: String) {
        if self.row.state != DrainState::Cordoning || !self.row.order.workers.contains(&worker) {
            return;
        }
        if !failure.is_empty() {
            return self.later(&format!("{worker} cannot be cordoned: {failure}"));
        }
        if !self.row.cordoned.contains(&worker) {
            self.row.cordoned.push(worker);
        }
        if self.row.order.workers.iter().all(|worker| self.row.cordoned.contains(worker)) {
            self.enter(DrainState::Planning);
            self.effects.push(DrainEffect::Survey);
        }
    }

    /// The fleet as it is: plan anew. What is under way stays as it is.
    fn surveyed(&mut self, fleet: &Fleet) {
        let own: Vec<_> = self.row.machines.values().filter_map(|entry| entry.migration.clone()).collect();
        let others = fleet.serving.iter().filter(|serving| !own.contains(&serving.migration));
        self.row.serving = others.cloned().collect();
        match self.row.state {
            DrainState::Planning | DrainState::Blocked | DrainState::Moving => {}
            DrainState::Evacuated => return self.go_on(),
            _ => return,
        }
        let order = &self.row.order;
        let wishes = Wishes { worker: order.workers.clone(), to: order.to.clone(), max: order.max };
        let plan = self.own_part(plan(fleet, &wishes), fleet);
        self.row.blockers = plan.blockers.clone();
        let is_partial = self.row.order.partial && plan.blockers.iter().all(|blocker| blocker.machine.is_some());
        let goes_on =
            plan.blockers.is_empty() || (is_partial && !plan.moves.is_empty()) || self.row.state == DrainState::Moving;
        self.take_places(&plan);
        self.row.plan = plan;
        if !goes_on {
            return self.blocked();
        }
        if self.row.state != DrainState::Moving {
            self.enter(DrainState::Moving);
        }
        self.go_on();
    }

    /// Every worker of the drain makes the same plan and carries out its own part of it; what is under way stays.
    fn own_part(&self, mut plan: Plan, fleet: &Fleet) -> Plan {
        let owner = |machine: &MachineId| {
            fleet.machines.iter().find(|facts| facts.machine == *machine).map(|facts| &facts.worker)
        };
        let under_way = |machine: &MachineId| self.row.machines.get(machine).is_some_and(DrainMachine::is_under_way);
        plan.moves.retain(|planned| planned.from == self.row.worker && !under_way(&planned.machine));
        plan.blockers.retain(|blocker| {
            blocker
                .machine
                .as_ref()
                .is_none_or(|machine| owner(machine) == Some(&self.row.worker) && !under_way(machine))
        });
        plan
    }

    /// The plan's places; what is neither under way nor planned is not here any more, or is a blocker.
    fn take_places(&mut self, plan: &Plan) {
        for planned in &plan.moves {
            let entry = self.row.machines.entry(planned.machine.clone()).or_insert(DrainMachine {
                to: planned.to.clone(),
                group: None,
                bytes: planned.bytes,
                migration: None,
                phase: None,
                failures: 0,
                tries_left: TRIES,
                needs_place: false,
                retry_ms: None,
                reason: String::new(),
            });
            entry.to = planned.to.clone();
            entry.group = planned.group.clone();
            entry.bytes = planned.bytes;
        }
        let keeps = |machine: &MachineId| {
            let is_blocked = plan.blockers.iter().any(|blocker| blocker.machine.as_ref() == Some(machine));
            is_blocked || plan.moves.iter().any(|planned| planned.machine == *machine)
        };
        self.row.machines.retain(|machine, entry| entry.is_under_way() || keeps(machine));
        for entry in self.row.machines.values_mut() {
            entry.needs_place = false;
        }
    }

    /// Whether the last plan found something that keeps the machine here.
    fn is_blocked(&self, machine: &MachineId) -> bool {
        self.row.blockers.iter().any(|blocker| blocker.machine.as_ref() == Some(machine))
    }

    /// It cannot go on by itself; looked at again after a while.
    fn blocked(&mut self) {
        let attempts =
            self.row.wait.as_ref().filter(|_| self.row.state == DrainState::Blocked).map_or(0, |wait| wait.attempts);
        if self.row.state != DrainState::Blocked {
            self.enter(DrainState::Blocked);
        }
        if let Some(wait) = &mut self.row.wait {
            wait.attempts = attempts;
        }
        let reasons: Vec<String> = self.row.blockers.iter().map(describe).collect();
        self.later(&reasons.join("; "));
    }

    /// Whatever can happen now without news.
    fn go_on(&mut self) {
        match self.row.state {
            DrainState::Moving => self.schedule(),
            DrainState::Evacuated => self.check_drained(),
            DrainState::Cancelling => self.check_cancelled(),
            _ => {}
        }
    }

    /// Starts as many machines as may move at once, one of a group at a time; sees what is left when none moves.
    fn schedule(&mut self) {
        let now_ms = self.now_ms;
        let mut free = (self.row.order.max.max(1) as usize)
            .saturating_sub(self.row.machines.values().filter(|m| m.is_moving()).count());
        for machine in self.by_size() {
            if free == 0 {
                break;
            }
            let Some(entry) = self.row.machines.get(&machine) else { continue };
            let is_ready = entry.migration.is_none()
                && !entry.needs_place
                && !self.is_blocked(&machine)
                && entry.tries_left > 0
                && entry.retry_ms.is_none_or(|at| at <= now_ms);
            let is_group_free = entry.group.is_none()
                || !self.row.machines.values().any(|other| other.group == entry.group && other.is_moving());
            if is_ready && is_group_free {
                self.start(&machine);
                free -= 1;
            }
        }
        if self.row.machines.values().all(DrainMachine::is_committed) {
            if !self.row.blockers.is_empty() {
                return self.blocked();
            }
            self.enter(DrainState::Evacuated);
            return self.check_drained();
        }
        // Under way, or going to be tried.
        let is_open = |(machine, entry): (&MachineId, &DrainMachine)| {
            !entry.is_committed() && (entry.migration.is_some() || (entry.tries_left > 0 && !self.is_blocked(machine)))
        };
        if !self.row.machines.iter().any(is_open) {
            self.give_up();
        }
    }

    /// The smallest first: they free their origin soonest.
    fn by_size(&self) -> Vec<MachineId> {
        let mut all: Vec<_> = self.row.machines.iter().map(|(machine, entry)| (entry.bytes, machine.clone())).collect();
        all.sort();
        all.into_iter().map(|(_, machine)| machine).collect()
    }

    fn start(&mut self, machine: &MachineId) {
        let Some(entry) = self.row.machines.get_mut(machine) else { return };
        let id = migration_id(&self.row.order.drain, machine, entry.failures);
        entry.migration = Some(id.clone());
        entry.phase = None;
        entry.retry_ms = None;
        self.effects.push(DrainEffect::Move { machine: machine.clone(), migration: id, to: entry.to.clone() });
    }

    /// Every machine that can go has gone, and some cannot.
    fn give_up(&mut self) {
        let failed = self.row.machines.iter().filter(|(_, entry)| !entry.is_committed() && entry.tries_left == 0);
        let failed = failed.map(|(machine, entry)| Blocker {
            machine: Some(machine.clone()),
            code: "failed".to_owned(),
            reason: format!(
                "{} migrations to {} went back, the last one because: {}",
                entry.failures, entry.to, entry.reason
            ),
            fix: format!(
                "remove the cause and order `decant drain resume {}`, or cancel it and name another destination with --to",
                self.row.order.drain
            ),
        });
        let failed: Vec<Blocker> = failed.collect();
        let needs_person = !failed.is_empty();
        self.row.blockers.retain(|blocker| failed.iter().all(|other| other.machine != blocker.machine));
        self.row.blockers.extend(failed);
        self.blocked();
        // Only a person knows that the cause is gone.
        if let Some(wait) = self.row.wait.as_mut().filter(|_| needs_person) {
            wait.severity = Severity::Stuck;
            wait.retry_ms = None;
        }
    }

    fn check_drained(&mut self) {
        let (now_ms, is_serving) = (self.now_ms, !self.row.serving.is_empty());
        if !is_serving && self.row.machines.values().all(DrainMachine::is_gone) {
            return self.enter(DrainState::Drained);
        }
        if let Some(wait) = &mut self.row.wait
            && is_serving
            && wait.retry_ms.is_none_or(|at| at <= now_ms)
        {
            wait.retry_ms = Some(now_ms + SERVING_MS);
        }
    }

    fn check_cancelled(&mut self) {
        if self.row.machines.values().all(|entry| entry.is_committed() || entry.is_back()) {
            if self.row.overdue {
                return self.enter(DrainState::Overdue);
            }
            if !self.row.was_cordoned {
                self.effects.push(DrainEffect::Uncordon);
            }
            self.enter(DrainState::Cancelled);
        }
    }

    fn news(&mut self, news: MigrationNews) {
        let Some(entry) = self.row.machines.get_mut(&news.machine) else { return };
        if entry.migration.as_ref() != Some(&news.migration) {
            return;
        }
        // The destination's word counts even if the source's own phase does not show it yet.
        let phase = if news.committed { news.phase.max(Phase::Granted) } else { news.phase };
        if news.phase >= Phase::Unwinding {
            if self.row.state != DrainState::Cancelling {
                return self.went_back(&news.machine, &news.migration, news.reason);
            }
            entry.phase = Some(news.phase);
        } else {
            entry.phase = Some(phase);
            if self.row.state == DrainState::Cancelling && !entry.is_committed() {
                // It was ordered before the cancel and began after it.
                let (machine, migration) = (news.machine, news.migration);
                self.effects.push(DrainEffect::CancelMigration { machine, migration });
            }
        }
        self.go_on();
    }

    /// A migration went back: the machine is tried again later, the others go on.
    fn went_back(&mut self, machine: &MachineId, migration: &MigrationId, reason: String) {
        let now_ms = self.now_ms;
        let Some(entry) =
            self.row.machines.get_mut(machine).filter(|entry| entry.migration.as_ref() == Some(migration))
        else {
            return;
        };
        entry.migration = None;
        entry.phase = None;
        entry.failures = entry.failures.saturating_add(1);
        entry.tries_left = entry.tries_left.saturating_sub(1);
        entry.reason = if reason.is_empty() { "it went back".to_owned() } else { reason };
        entry.retry_ms = Some(now_ms.saturating_add(MACHINE.delay_ms(machine.as_str(), entry.failures)));
        self.go_on();
    }

    fn resume(&mut self) {
        for entry in self.row.machines.values_mut().filter(|entry| entry.migration.is_none()) {
            entry.retry_ms = None;
            entry.tries_left = TRIES;
        }
        match self.row.state {
            DrainState::Blocked => {
                self.enter(DrainState::Planning);
                self.effects.push(DrainEffect::Survey);
            }
            DrainState::Cordoning => {
                let effects = wanted(&self.row, self.now_ms);
                self.effects.extend(effects);
            }
            _ => self.go_on(),
        }
    }

    fn cancel(&mut self) {
        self.row.order.deadline_ms = None;
        match self.row.state {
            DrainState::Cancelling => {}
            DrainState::Evacuated => {
                // Everything is past its commit point: nothing goes back.
                self.row.overdue = false;
                self.enter(DrainState::Cancelling);
                self.check_cancelled();
            }
            _ => self.stop(),
        }
    }

    /// No new migration; what can still go back goes back.
    fn stop(&mut self) {
        self.enter(DrainState::Cancelling);
        let effects = wanted(&self.row, self.now_ms);
        self.effects.extend(effects);
        self.check_cancelled();
    }

    fn due(&mut self) {
        let now_ms = self.now_ms;
        if !self.row.overdue && self.row.order.deadline_ms.is_some_and(|at| at <= now_ms) {
            self.row.overdue = true;
            if self.row.state == DrainState::Evacuated {
                if let Some(wait) = &mut self.row.wait {
                    wait.reason =
                        "the deadline has passed; every machine is away, but blocks are still served from here"
                            .to_owned();
                }
            } else {
                return self.stop();
            }
        }
        let is_due = |entry: &DrainMachine| entry.migration.is_none() && entry.retry_ms.is_some_and(|at| at <= now_ms);
        if self.row.state == DrainState::Moving && self.row.machines.values().any(is_due) {
            for entry in self.row.machines.values_mut().filter(|entry| is_due(entry)) {
                entry.retry_ms = None;
                entry.needs_place = entry.tries_left > 0;
            }
            self.effects.push(DrainEffect::Survey);
            return;
        }
        if self.row.wait.as_ref().is_some_and(|wait| wait.is_due(now_ms)) {
            let effects = wanted(&self.row, now_ms);
            self.effects.extend(effects);
            if let Some(wait) = &mut self.row.wait {
                wait.retry_ms = None;
            }
        }
        self.go_on();
    }
}

fn describe(blocker: &Blocker) -> String {
    match &blocker.machine {
        Some(machine) => format!("{machine}: {} (fix: {})", blocker.reason, blocker.fix),
        None => format!("{} (fix: {})", blocker.reason, blocker.fix),
    }
}
