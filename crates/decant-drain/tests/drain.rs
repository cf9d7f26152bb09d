//! The drain against a fake fleet: every state, every way out, and the words a person reads.

use std::collections::{BTreeMap, VecDeque};

use decant_base::{Bytes, DrainId, MachineId, MigrationId, WorkerId};
use decant_dataplane::Protocol;
use decant_drain::drain::{
    DrainEffect, DrainEvent, DrainOrder, DrainRow, DrainState, MigrationNews, drain_pending, drain_step,
};
use decant_drain::migration::{Limits, Phase};
use decant_drain::plan::{Fleet, MachineFacts, Serving, Wishes, WorkerFacts, plan};
use decant_drain::{Severity, Sync};
use expect_test::{Expect, expect};

fn worker(text: &str) -> WorkerId {
    WorkerId::new(text).expect("an id")
}

fn machine(text: &str) -> MachineId {
    MachineId::new(text).expect("an id")
}

fn facts(name: &str) -> WorkerFacts {
    WorkerFacts {
        worker: worker(name),
        unreachable: String::new(),
        cordoned: name == "worker-1",
        labels: BTreeMap::from([("disk".to_owned(), "nvme".to_owned())]),
        machines_max: 8,
        bytes_free: Bytes::gib(100),
    }
}

fn at(name: &str, on: &str, mib: u64) -> MachineFacts {
    MachineFacts {
        machine: machine(name),
        worker: worker(on),
        group: None,
        needs: BTreeMap::new(),
        bytes: Bytes::mib(mib),
        immovable: String::new(),
        fix: String::new(),
    }
}

fn grouped(group: &str, facts: MachineFacts) -> MachineFacts {
    MachineFacts { group: Some(group.to_owned()), ..facts }
}

fn fleet(machines: Vec<MachineFacts>) -> Fleet {
    let workers = ["worker-1", "worker-2", "worker-3"].map(facts).to_vec();
    Fleet { workers, machines, rate: (Bytes::mib(50), Bytes::mib(100)), ..Fleet::default() }
}

fn wishes() -> Wishes {
    Wishes { worker: vec![worker("worker-1")], to: None, max: 2 }
}

fn order() -> DrainOrder {
    DrainOrder {
        protocol: Protocol::Nbd,
        drain: DrainId::new("d-1").expect("an id"),
        workers: vec![worker("worker-1")],
        to: None,
        max: 2,
        reason: "disk smells".to_owned(),
        deadline_ms: None,
        limits: Limits { prepare_ms: 1, stop_ms: 1, retention_ms: 1 },
        partial: false,
        any_program: false,
    }
}

/// An agent that answers at once, with virtual time.
struct Agent {
    row: DrainRow,
    fleet: Fleet,
    now_ms: u64,
    wake: Option<u64>,
    /// Migrations ordered and not cancelled.
    ordered: Vec<(MachineId, MigrationId)>,
    cancelled: Vec<MachineId>,
    uncordoned: bool,
    unreachable: Option<WorkerId>,
    denies: bool,
}

impl Agent {
    fn new(order: DrainOrder, fleet: Fleet) -> Self {
        Self {
            row: DrainRow::new(order, worker("worker-1"), false, 0),
            fleet,
            now_ms: 0,
            wake: None,
            ordered: Vec::new(),
            cancelled: Vec::new(),
            uncordoned: false,
            unreachable: None,
            denies: false,
        }
    }

    fn feed(&mut self, event: DrainEvent) {
        let mut events = VecDeque::from([event]);
        while let Some(event) = events.pop_front() {
            let step = drain_step(&self.row, event.clone(), self.now_ms);
            assert_eq!(step.sync == Sync::Unchanged, step.row == self.row, "{event:?}");
            self.row = step.row;
            for effect in step.effects {
                events.extend(self.perform(effect));
            }
        }
    }

    fn perform(&mut self, effect: DrainEffect) -> Option<DrainEvent> {
        match effect {
            DrainEffect::Cordon { worker } => {
                let failure = if self.unreachable.as_ref() == Some(&worker) { "no answer" } else { "" };
                Some(DrainEvent::Cordoned { worker, failure: failure.to_owned() })
            }
            DrainEffect::Uncordon => {
                self.uncordoned = true;
                None
            }
            DrainEffect::Survey => Some(DrainEvent::Surveyed { fleet: Box::new(self.fleet.clone()) }),
            DrainEffect::Move { machine, migration, .. } if self.denies => {
                Some(DrainEvent::MoveDenied { machine, migration, reason: "busy".to_owned() })
            }
            DrainEffect::Move { machine, migration, .. } => {
                assert!(!self.ordered.iter().any(|(_, id)| *id == migration), "{migration} is ordered twice");
                self.ordered.push((machine.clone(), migration.clone()));
                Some(DrainEvent::News(MigrationNews {
                    machine,
                    migration,
                    phase: Phase::Planned,
                    reason: String::new(),
                    committed: false,
                }))
            }
            DrainEffect::CancelMigration { machine, .. } => {
                self.cancelled.push(machine);
                None
            }
            DrainEffect::Wake { at_ms } => {
                self.wake = Some(at_ms);
                None
            }
        }
    }

    /// The last migration ordered of `name` gets to `phase`.
    fn news(&mut self, name: &str, phase: Phase) {
        let (machine, migration) =
            self.ordered.iter().rev().find(|(id, _)| id.as_str() == name).cloned().expect("it was ordered");
        if (Phase::Granted..=Phase::Cleaned).contains(&phase) {
            self.fleet
                .machines
                .iter_mut()
                .filter(|facts| facts.machine == machine)
                .for_each(|facts| facts.worker = worker("worker-2"));
        }
        let reason = if phase >= Phase::Unwinding { "prepare: no room" } else { "" }.to_owned();
        let committed = (Phase::Granted..=Phase::Cleaned).contains(&phase);
        self.feed(DrainEvent::News(MigrationNews { machine, migration, phase, reason, committed }));
    }

    fn tick(&mut self) {
        let at = self.wake.take().expect("a timer is set");
        self.now_ms = self.now_ms.max(at);
        self.feed(DrainEvent::Wake);
    }

    fn moving(&self) -> Vec<&str> {
        let under_way = |name: &&MachineId| {
            self.row.machines[*name].migration.is_some() && self.row.machines[*name].phase < Some(Phase::Verified)
        };
        self.row.machines.keys().filter(under_way).map(MachineId::as_str).collect()
    }
}

#[test]
fn an_empty_worker_is_drained_at_once() {
    let mut agent = Agent::new(order(), fleet(vec![at("other", "worker-2", 1)]));
    agent.feed(DrainEvent::Restarted);
    assert_eq!(agent.row.state, DrainState::Drained);
    assert!(!agent.uncordoned, "a drained worker stays cordoned");
}

#[test]
fn evacuated_and_drained_are_apart() {
    let mut agent =
        Agent::new(order(), fleet(vec![at("a", "worker-1", 10), at("b", "worker-1", 20), at("c", "worker-1", 30)]));
    agent.feed(DrainEvent::Restarted);
    assert_eq!((agent.row.state, agent.moving()), (DrainState::Moving, vec!["a", "b"]));
    agent.news("a", Phase::Hydrating);
    assert_eq!(agent.moving(), ["a", "b"], "a machine that hydrates keeps its place");
    agent.news("a", Phase::Verified);
    assert_eq!(agent.moving(), ["b", "c"]);
    for name in ["b", "c"] {
        agent.news(name, Phase::Granted);
    }
    assert_eq!(agent.row.state, DrainState::Evacuated);
    for name in ["a", "b", "c"] {
        assert_eq!(agent.row.state, DrainState::Evacuated);
        agent.news(name, Phase::Cleaned);
    }
    assert_eq!(agent.row.state, DrainState::Drained);
    assert_eq!(drain_pending(&agent.row, 9), []);
}

#[test]
fn what_is_served_for_others_keeps_the_power_on() {
    let mut agent = Agent::new(order(), fleet(Vec::new()));
    let serving =
        Serving { machine: machine("x"), migration: MigrationId::new("m-x").expect("an id"), to: worker("worker-3") };
    agent.fleet.serving = vec![serving];
    agent.feed(DrainEvent::Restarted);
    assert_eq!(agent.row.state, DrainState::Evacuated);
    agent.tick();
    assert_eq!(agent.row.state, DrainState::Evacuated);
    agent.fleet.serving.clear();
    agent.tick();
    assert_eq!(agent.row.state, DrainState::Drained);
}

#[test]
fn one_machine_of_a_group_at_a_time() {
    let machines =
        vec![grouped("db", at("a", "worker-1", 1)), grouped("db", at("b", "worker-1", 2)), at("c", "worker-1", 3)];
    let mut agent = Agent::new(DrainOrder { max: 9, ..order() }, fleet(machines));
    agent.feed(DrainEvent::Restarted);
    assert_eq!(agent.moving(), ["a", "c"]);
    agent.news("a", Phase::Verified);
    assert_eq!(agent.moving(), ["b", "c"]);
}

#[test]
fn a_blocked_drain_looks_again_and_goes_on() {
    let mut stuck = at("a", "worker-1", 1);
    stuck.immovable = "it is still being moved here".to_owned();
    stuck.fix = "wait".to_owned();
    let mut agent = Agent::new(order(), fleet(vec![stuck, at("b", "worker-1", 1)]));
    agent.feed(DrainEvent::Restarted);
    assert_eq!(agent.row.state, DrainState::Blocked);
    assert!(agent.ordered.is_empty(), "nothing is touched while something blocks");
    assert_eq!(
        agent.row.wait.as_ref().map(|wait| wait.reason.as_str()),
        Some("a: it is still being moved here (fix: wait)")
    );
    agent.tick();
    assert_eq!(agent.row.state, DrainState::Blocked);
    agent.fleet.machines[0].immovable.clear();
    agent.tick();
    assert_eq!((agent.row.state, agent.moving()), (DrainState::Moving, vec!["a", "b"]));
}

#[test]
fn a_partial_drain_moves_what_it_can() {
    let mut stuck = at("a", "worker-1", 1);
    stuck.immovable = "pinned".to_owned();
    let mut agent = Agent::new(DrainOrder { partial: true, ..order() }, fleet(vec![stuck, at("b", "worker-1", 1)]));
    agent.feed(DrainEvent::Restarted);
    assert_eq!((agent.row.state, agent.moving()), (DrainState::Moving, vec!["b"]));
    agent.news("b", Phase::Cleaned);
    assert_eq!(agent.row.state, DrainState::Blocked, "a is still here: never EVACUATED");
    agent.fleet.machines[0].immovable.clear();
    agent.tick();
    assert_eq!(agent.moving(), ["a"]);
    agent.news("a", Phase::Cleaned);
    assert_eq!(agent.row.state, DrainState::Drained);
}

#[test]
fn a_failed_machine_does_not_stop_the_others() {
    let mut agent =
        Agent::new(DrainOrder { max: 1, ..order() }, fleet(vec![at("a", "worker-1", 1), at("b", "worker-1", 2)]));
    agent.feed(DrainEvent::Restarted);
    assert_eq!(agent.moving(), ["a"]);
    agent.news("a", Phase::Unwinding);
    assert_eq!(agent.moving(), ["b"], "a waits for its next try, b has its place");
    agent.news("b", Phase::Cleaned);
    for _ in 1..4 {
        agent.tick();
        assert_eq!((agent.row.state, agent.moving()), (DrainState::Moving, vec!["a"]));
        agent.news("a", Phase::Ended);
    }
    assert_eq!(agent.row.state, DrainState::Blocked);
    assert_eq!(agent.row.wait.as_ref().map(|wait| wait.severity), Some(Severity::Stuck));
    assert_eq!(agent.row.blockers.len(), 1);
    agent.feed(DrainEvent::Resume);
    assert_eq!(agent.moving(), ["a"], "with an id that was never used: the agent checks");
    agent.news("a", Phase::Cleaned);
    assert_eq!(agent.row.state, DrainState::Drained);
}

#[test]
fn a_machine_that_failed_gets_another_place() {
    let mut agent = Agent::new(order(), fleet(vec![at("a", "worker-1", 1), at("x", "worker-3", 1)]));
    agent.feed(DrainEvent::Restarted);
    assert_eq!(agent.row.machines[&machine("a")].to, worker("worker-2"));
    agent.fleet.workers[1].unreachable = "connection refused".to_owned();
    agent.news("a", Phase::Ended);
    agent.tick();
    assert_eq!(agent.row.machines[&machine("a")].to, worker("worker-3"));
    assert_eq!(agent.moving(), ["a"]);
}

#[test]
fn denied_moves_count_as_failures() {
    let mut agent = Agent::new(order(), fleet(vec![at("a", "worker-1", 1)]));
    agent.denies = true;
    agent.feed(DrainEvent::Restarted);
    while agent.row.state == DrainState::Moving {
        agent.tick();
    }
    assert_eq!(agent.row.state, DrainState::Blocked);
    assert!(agent.row.blockers[0].reason.contains("busy"), "{:?}", agent.row.blockers);
}

#[test]
fn all_are_cordoned_first() {
    let both = vec![worker("worker-1"), worker("worker-2")];
    let mut agent = Agent::new(DrainOrder { workers: both, ..order() }, fleet(vec![at("a", "worker-1", 1)]));
    agent.unreachable = Some(worker("worker-2"));
    agent.feed(DrainEvent::Restarted);
    assert_eq!(agent.row.state, DrainState::Cordoning);
    assert_eq!(
        agent.row.wait.as_ref().map(|wait| wait.reason.as_str()),
        Some("worker-2 cannot be cordoned: no answer")
    );
    agent.unreachable = None;
    agent.tick();
    assert_eq!(agent.row.machines[&machine("a")].to, worker("worker-3"), "not to the other drained one");
}

#[test]
fn cancel_in_every_state() {
    // Cordoning.
    let mut agent = Agent::new(order(), fleet(Vec::new()));
    agent.feed(DrainEvent::Cancel);
    assert_eq!((agent.row.state, agent.uncordoned), (DrainState::Cancelled, true));
    // Planning.
    let mut agent = Agent::new(order(), fleet(Vec::new()));
    agent.row.state = DrainState::Planning;
    agent.feed(DrainEvent::Cancel);
    assert_eq!(agent.row.state, DrainState::Cancelled);
    // Moving: what is not committed goes back, what is committed ends there.
    let mut agent =
        Agent::new(order(), fleet(vec![at("a", "worker-1", 1), at("b", "worker-1", 2), at("c", "worker-1", 3)]));
    agent.feed(DrainEvent::Restarted);
    agent.news("a", Phase::Granted);
    agent.feed(DrainEvent::Cancel);
    assert_eq!((agent.row.state, agent.cancelled.clone()), (DrainState::Cancelling, vec![machine("b")]));
    agent.feed(DrainEvent::Cancel);
    agent.news("b", Phase::Unwinding);
    assert_eq!((agent.row.state, agent.ordered.len()), (DrainState::Cancelled, 2));
    // Blocked.
    let mut agent =
        Agent::new(DrainOrder { to: Some(worker("worker-9")), ..order() }, fleet(vec![at("a", "worker-1", 1)]));
    agent.feed(DrainEvent::Restarted);
    assert_eq!(agent.row.state, DrainState::Blocked);
    agent.row.was_cordoned = true;
    agent.feed(DrainEvent::Cancel);
    assert_eq!((agent.row.state, agent.uncordoned), (DrainState::Cancelled, false));
    // Evacuated: nothing goes back.
    let mut agent = Agent::new(order(), fleet(vec![at("a", "worker-1", 1)]));
    agent.feed(DrainEvent::Restarted);
    agent.news("a", Phase::Booted);
    agent.feed(DrainEvent::Cancel);
    assert_eq!((agent.row.state, agent.cancelled.len()), (DrainState::Cancelled, 0));
    // Over: nothing happens.
    agent.feed(DrainEvent::Resume);
    assert_eq!(agent.row.state, DrainState::Cancelled);
}

#[test]
fn a_move_ordered_before_the_cancel_and_begun_after_it_goes_back() {
    let mut agent = Agent::new(order(), fleet(vec![at("a", "worker-1", 1)]));
    agent.feed(DrainEvent::Restarted);
    agent.row.machines.get_mut(&machine("a")).expect("it is there").phase = None;
    agent.feed(DrainEvent::Cancel);
    agent.news("a", Phase::Planned);
    assert_eq!(agent.cancelled.len(), 2, "once at the cancel, which was too early, and once when it began");
    agent.news("a", Phase::Ended);
    assert_eq!(agent.row.state, DrainState::Cancelled);
}

#[test]
fn the_deadline_ends_what_can_be_ended() {
    let timed = || DrainOrder { deadline_ms: Some(5_000), ..order() };
    let mut agent = Agent::new(timed(), fleet(vec![at("a", "worker-1", 1)]));
    agent.feed(DrainEvent::Restarted);
    agent.tick();
    assert_eq!((agent.now_ms, agent.row.state), (5_000, DrainState::Cancelling));
    agent.news("a", Phase::Ended);
    assert_eq!((agent.row.state, agent.uncordoned), (DrainState::Overdue, false));

    let mut agent = Agent::new(timed(), fleet(vec![at("a", "worker-1", 1)]));
    agent.feed(DrainEvent::Restarted);
    agent.news("a", Phase::Hydrating);
    agent.tick();
    assert_eq!((agent.row.state, agent.row.overdue), (DrainState::Evacuated, true));
    agent.news("a", Phase::Cleaned);
    assert_eq!(agent.row.state, DrainState::Drained);
}

#[test]
fn a_restart_repeats_what_was_lost_and_nothing_else() {
    let mut agent = Agent::new(order(), fleet(vec![at("a", "worker-1", 1)]));
    let step = drain_step(&agent.row, DrainEvent::Restarted, 0);
    assert_eq!(step.effects, [DrainEffect::Cordon { worker: worker("worker-1") }]);
    agent.feed(DrainEvent::Restarted);
    // The order was journalled and not performed.
    agent.row.machines.get_mut(&machine("a")).expect("it is there").phase = None;
    let step = drain_step(&agent.row, DrainEvent::Restarted, 0);
    let [DrainEffect::Move { migration, .. }] = step.effects.as_slice() else { panic!("{:?}", step.effects) };
    assert_eq!(*migration, agent.ordered[0].1, "the same id: the same order again is no new one");
    // News repeated change nothing.
    agent.news("a", Phase::Sealed);
    let before = agent.row.clone();
    agent.news("a", Phase::Sealed);
    assert_eq!(agent.row, before);
}

fn check_plan(fleet: &Fleet, wishes: &Wishes, expected: &Expect) {
    let plan = plan(fleet, wishes);
    let mut text = String::new();
    for planned in &plan.moves {
        let seconds = |ms: Option<u64>| ms.unwrap_or(0).div_ceil(1000);
        let eta = format!("{}..{} s", seconds(planned.eta.earliest_ms), seconds(planned.eta.latest_ms));
        text += &format!("{} -> {} {} in {eta}\n", planned.machine, planned.to, planned.bytes);
    }
    for blocker in &plan.blockers {
        let whose = blocker.machine.as_ref().map_or("drain", MachineId::as_str);
        text += &format!("BLOCKED {whose} {}: {}; {}\n", blocker.code, blocker.reason, blocker.fix);
    }
    let seconds = |ms: Option<u64>| ms.map(|ms| ms.div_ceil(1000));
    let (earliest, latest) = (seconds(plan.eta.earliest_ms), seconds(plan.eta.latest_ms));
    text += &format!("total {} in {earliest:?}..{latest:?} s\n", plan.bytes);
    expected.assert_eq(&text);
}

#[test]
fn plans_spread_and_start_with_the_smallest() {
    let machines = vec![
        at("big", "worker-1", 4000),
        at("small", "worker-1", 10),
        at("mid", "worker-1", 500),
        at("x", "worker-3", 1),
    ];
    check_plan(
        &fleet(machines),
        &wishes(),
        &expect![[r#"
            small -> worker-2 10 MiB in 1..1 s
            mid -> worker-3 500 MiB in 5..10 s
            big -> worker-2 3.9 GiB in 40..80 s
            total 4.4 GiB in Some(46)..Some(91) s
        "#]],
    );
}

#[test]
fn every_blocker_is_named_with_its_fix() {
    let mut needs = at("picky", "worker-1", 10);
    needs.needs = BTreeMap::from([("gpu".to_owned(), "yes".to_owned())]);
    let mut filling = at("filling", "worker-1", 10);
    filling.immovable = "it is still being moved here from worker-2".to_owned();
    filling.fix = "wait until m-7 is over".to_owned();
    let mut all = fleet(vec![
        needs,
        filling,
        at("huge", "worker-1", 200 << 10),
        grouped("db", at("db-1", "worker-1", 10)),
        grouped("db", at("db-2", "worker-2", 10)),
        grouped("db", at("db-3", "worker-3", 10)),
        at("fine", "worker-1", 10),
    ]);
    all.workers[2].machines_max = 1;
    check_plan(
        &all,
        &wishes(),
        &expect![[r#"
            fine -> worker-2 10 MiB in 1..1 s
            BLOCKED huge no-place: worker-2 has no room: 100 GiB free, 200 GiB needed; worker-3 is full: 1 of 1 machines; make room, add a worker, or name a destination with --to
            BLOCKED db-1 no-place: worker-2 has a machine of group db already; worker-3 is full: 1 of 1 machines; make room, add a worker, or name a destination with --to
            BLOCKED filling immovable: it is still being moved here from worker-2; wait until m-7 is over
            BLOCKED picky no-place: worker-2 has no label gpu=yes; worker-3 has no label gpu=yes; make room, add a worker, or name a destination with --to
            total 10 MiB in Some(1)..Some(1) s
        "#]],
    );
    all.workers[1].unreachable = "connection refused".to_owned();
    let named = Wishes { to: Some(worker("worker-2")), ..wishes() };
    all.machines.truncate(1);
    check_plan(
        &all,
        &named,
        &expect![[r#"
            BLOCKED drain unreachable: worker-2 does not answer: connection refused; start its agent, or look at the network between
            BLOCKED picky no-place: worker-2 does not answer: connection refused; make room, add a worker, or name a destination with --to
            total 0 B in Some(0)..Some(0) s
        "#]],
    );
}

#[test]
fn a_named_destination_may_bring_a_group_together() {
    let machines = vec![grouped("db", at("db-1", "worker-1", 10)), grouped("db", at("db-2", "worker-2", 10))];
    let named = Wishes { to: Some(worker("worker-2")), ..wishes() };
    check_plan(
        &fleet(machines),
        &named,
        &expect![[r#"
            db-1 -> worker-2 10 MiB in 1..1 s
            total 10 MiB in Some(1)..Some(1) s
        "#]],
    );
}
