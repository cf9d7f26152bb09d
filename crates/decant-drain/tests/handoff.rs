//! The handoff step by step: its trace, a cancel and a crash at each step, failures, deadlines, and what a person reads.

#[allow(unreachable_pub, reason = "shared by several test files")]
mod pair;
#[allow(unreachable_pub, reason = "shared by several test files")]
mod world;

use std::fmt::Write as _;

use decant_base::{Epoch, MachineId};
use decant_dataplane::{Command, FailureCode};
use decant_drain::handoff::State;
use decant_drain::migration::{Back, Phase};
use decant_drain::{
    Denied, Desired, Effect, Event, Life, MachineCommand, Message, Order, Row, Severity, pending, reclaim_loses, step,
    why,
};
use expect_test::expect;
use pair::{LIMITS, Pair, fail};
use world::{Kind, Site, machine, migration, volume, worker};

#[test]
fn the_trace_of_a_move() {
    let mut pair = Pair::moving();
    pair.finish();
    expect![[r#"
        0! order move               moving(1) up planned       machine trim, plane open_export
        1! prepare                  prepared planned           plane prepare
        1! machine prepare          prepared prepared          send prepare-ok
        0! prepare-ok               moving(1) up prepared      machine stop
        0  machine stop             moving(1) down stopped     plane seal
        0! plane seal               sealed(1) sealed           send grant
        1! grant                    active(2) down granted     plane begin, send grant-accepted
        0! grant-accepted           sealed(1) granted          
        1  plane begin              active(2) starting granted machine start
        1  machine start            active(2) up booted        send progress, machine trim
        0  progress                 sealed(1) booted           
        1  machine trim             active(2) up hydrating     send progress, plane verify
        0  progress                 sealed(1) hydrating        
        1! plane verify             active(2) up verified      send verified
        0! verified                 released(1) verified       send released, machine discard
        1! released                 active(2) up               
        0! plane close_export       released(1)                
    "#]]
    .assert_eq(&pair.trace);
    assert_eq!(pair.runner(), 1);
    assert_eq!(pair.rows[1].state, State::Active { epoch: Epoch(2) });
    assert_eq!(pair.rows[0].copy.as_ref().map(|copy| copy.expires_ms - copy.released_ms), Some(3_600_000));
    // The copy expires.
    while pair.rows[0].copy.is_some() {
        assert!(pair.wait());
        pair.settle();
    }
    assert!(pair.now_ms > 3_600_000);
    assert_eq!(pair.sites[0].kind, Kind::None);
    assert_eq!(pair.rows[0].went.as_ref().map(|went| went.to.clone()), Some(worker(1)));
    assert_eq!((why(&pair.rows[0]), why(&pair.rows[1])), (Vec::new(), Vec::new()), "nothing is left to be done");
}

#[test]
fn the_trace_of_a_stateless_move() {
    let mut pair = Pair::new(None);
    pair.move_to(1, 0, 1);
    pair.finish();
    expect![[r#"
        0! order move               moving(1) up planned       send prepare
        1! prepare                  prepared planned           machine prepare
        1! machine prepare          prepared prepared          send prepare-ok
        0! prepare-ok               moving(1) up prepared      machine stop
        0! machine stop             sealed(1) sealed           send grant
        1! grant                    active(2) starting granted send grant-accepted, machine start
        0! grant-accepted           sealed(1) granted          
        1! machine start            active(2) up verified      send verified
        0! verified                 released(1) verified       send released, machine discard
        1! released                 active(2) up               
        0! machine discard          released(1)                
    "#]]
    .assert_eq(&pair.trace);
    assert_eq!((pair.runner(), pair.rows[0].copy.clone()), (1, None));
}

#[test]
fn it_moves_there_and_back_again() {
    let mut pair = Pair::moving();
    pair.finish();
    for number in 2..6 {
        let from = pair.runner();
        pair.sites[from].version += 1;
        pair.move_to(number, from, 1 - from);
        pair.finish();
        assert_eq!(pair.runner(), 1 - from);
        assert_eq!(usize::from(pair.sites[1 - from].version), number - 1, "every write is there");
    }
    assert_eq!(pair.rows[1].top.epoch, Epoch(6));
}

#[test]
fn every_message_twice_changes_nothing() {
    let mut once = Pair::moving();
    once.finish();
    let mut twice = Pair::moving();
    twice.twice = true;
    twice.finish();
    for who in 0..2 {
        let plain = |row: &Row| (row.state.clone(), row.top.clone(), row.life, row.copy.is_some());
        assert_eq!(plain(&once.rows[who]), plain(&twice.rows[who]));
    }
}

/// How many things happen in an undisturbed move.
fn length_of(stateless: bool) -> usize {
    let mut pair = Pair::new((!stateless).then(volume));
    pair.move_to(1, 0, 1);
    let mut length = 0;
    while pair.tick() {
        length += 1;
    }
    length
}

fn after(steps: usize, stateless: bool) -> Pair {
    let mut pair = Pair::new((!stateless).then(volume));
    pair.move_to(1, 0, 1);
    for _ in 0..steps {
        pair.tick();
    }
    pair
}

#[test]
fn cancel_at_every_step() {
    for stateless in [false, true] {
        let mut outcomes = Vec::new();
        for steps in 0..=length_of(stateless) {
            let mut pair = after(steps, stateless);
            let phase = pair.phase(0);
            let cancelled = pair.order(0, Order::Cancel { migration: migration(1) });
            pair.finish();
            let runner = pair.runner();
            let (state, kind) = (pair.rows[1 - runner].state.name(), pair.sites[1 - runner].kind);
            if runner == 0 {
                assert_eq!(cancelled, Ok(()));
                assert_eq!((state, kind), ("none", Kind::None), "something is left at {phase:?}:\n{}", pair.trace);
                assert_eq!(pair.rows[0].migration.as_ref().and_then(|m| m.back.clone()), Some(Back::Cancelled));
            } else {
                assert!(matches!(cancelled, Ok(()) | Err(Denied::TooLate { .. })), "{cancelled:?}");
                assert_eq!(state, "released");
            }
            let word = format!(
                "{}: {}",
                phase.name(),
                match (&cancelled, runner) {
                    (Ok(()), 0) => "back on the source",
                    (Ok(()), _) => "too late: forward",
                    (Err(denied), _) => return_word(denied),
                }
            );
            if outcomes.last() != Some(&word) {
                outcomes.push(word);
            }
            // And it can be moved again, wherever it is.
            pair.move_to(2, runner, 1 - runner);
            pair.finish();
            assert_eq!(pair.runner(), 1 - runner);
        }
        let expected = expect![[r#"
            planned: back on the source
            prepared: back on the source
            stopped: back on the source
            sealed: too late: forward
            granted: too late
            booted: too late
            hydrating: too late
        "#]];
        if !stateless {
            expected.assert_eq(&(outcomes.join("\n") + "\n"));
        }
    }
}

fn return_word(denied: &Denied) -> &'static str {
    match denied {
        Denied::TooLate { .. } => "too late",
        Denied::Over { .. } => "over",
        _ => "denied",
    }
}

#[test]
fn a_crash_at_every_step() {
    for stateless in [false, true] {
        for steps in 0..=length_of(stateless) {
            for (who, power) in [(0, false), (0, true), (1, false), (1, true)] {
                let mut pair = after(steps, stateless);
                pair.crash(who, power);
                pair.finish();
                assert_eq!(pair.runner(), 1, "after {steps} steps, {who}, {power}:\n{}", pair.trace);
            }
        }
    }
}

#[test]
fn both_crash_at_every_step_and_messages_are_lost() {
    for steps in 0..=length_of(false) {
        let mut pair = after(steps, false);
        pair.net.clear();
        pair.crash(0, true);
        pair.crash(1, true);
        pair.net.clear();
        pair.finish();
        assert_eq!(pair.runner(), 1, "after {steps} steps:\n{}", pair.trace);
    }
}

#[test]
fn every_wait_has_a_name() {
    for steps in 0..length_of(false) {
        let pair = after(steps, false);
        for row in &pair.rows {
            let waits = why(row);
            let under_way = row.migration.as_ref().is_some_and(|m| !m.phase.is_over());
            assert!(!under_way || !waits.is_empty(), "{row:#?}");
            assert!(waits.iter().all(|wait| !wait.on.is_empty() && !wait.clears.is_empty()), "{waits:?}");
        }
    }
}

#[test]
fn a_destination_that_does_not_answer_leaves_the_machine_alone() {
    let mut pair = Pair::new(Some(volume()));
    pair.cut = true;
    pair.move_to(1, 0, 1);
    pair.settle();
    let started = pair.now_ms;
    while pair.phase(0) == Phase::Planned {
        assert!(pair.sites[0].running);
        assert!(pair.wait());
        pair.settle();
    }
    assert_eq!(pair.now_ms - started, LIMITS.prepare_ms);
    assert_eq!((pair.rows[0].state.clone(), pair.sites[0].running), (State::Active { epoch: Epoch(1) }, true));
    // The destination never answers: the farewell ends by itself, and another move need not wait for it.
    pair.finish();
    assert_eq!(pair.phase(0), Phase::Ended);
    let Some(Back::Failed { step, reason, passing: true }) =
        pair.rows[0].migration.as_ref().and_then(|m| m.back.clone())
    else {
        panic!("{:?}", pair.rows[0].migration)
    };
    assert_eq!((step.as_str(), reason.as_str()), ("prepare", "not prepared within 60000 ms: worker-2 did not answer"));
}

#[test]
fn a_destination_without_room_is_named_and_cleaned() {
    let mut pair = Pair::new(Some(volume()));
    pair.fails = Some(|who, effect| {
        let is_prepare = matches!(effect, Effect::Plane(Command::Prepare { .. }));
        (who == 1 && is_prepare).then(|| fail(FailureCode::Refused, "no room: 200 MiB needed, 10 MiB free"))
    });
    pair.move_to(1, 0, 1);
    pair.finish();
    assert_eq!((pair.runner(), pair.rows[1].state.clone(), pair.sites[1].kind), (0, State::None, Kind::None));
    let back = pair.rows[0].migration.as_ref().and_then(|m| m.back.clone());
    let reason = "no room: 200 MiB needed, 10 MiB free".to_owned();
    assert_eq!(back, Some(Back::Failed { step: "prepare".to_owned(), reason, passing: false }));
}

#[test]
fn a_passing_failure_while_preparing_is_tried_again() {
    let mut pair = Pair::new(Some(volume()));
    pair.fails = Some(|who, effect| {
        let is_assemble = matches!(effect, Effect::Plane(Command::Assemble { .. }));
        (who == 1 && is_assemble).then(|| fail(FailureCode::Retry, "connection refused"))
    });
    pair.move_to(1, 0, 1);
    pair.settle();
    let wait = pair.rows[0].migration.as_ref().and_then(|m| m.wait.clone()).expect("a wait");
    assert_eq!((wait.severity, wait.reason.as_str(), wait.attempts), (Severity::Retrying, "connection refused", 1));
    assert!(wait.retry_ms.is_some());
    pair.fails = None;
    pair.finish();
    assert_eq!(pair.runner(), 1);
}

#[test]
fn a_machine_that_does_not_stop_is_named_and_can_be_cancelled() {
    let mut pair = Pair::new(Some(volume()));
    pair.fails = Some(|_, effect| {
        let is_stop = matches!(effect, Effect::Machine(MachineCommand::Stop { .. }));
        is_stop.then(|| fail(FailureCode::Retry, "its cgroup does not empty: process 77 waits for a disk"))
    });
    pair.move_to(1, 0, 1);
    pair.settle();
    let wait = |pair: &Pair| pair.rows[0].migration.as_ref().and_then(|m| m.wait.clone()).expect("a wait");
    assert_eq!((wait(&pair).severity, wait(&pair).on.as_str()), (Severity::Retrying, "machine-stop"));
    let started = pair.now_ms;
    while wait(&pair).severity != Severity::Stuck {
        assert!(pair.wait());
        pair.settle();
    }
    assert!(pair.now_ms - started >= LIMITS.stop_ms);
    assert_eq!(wait(&pair).reason, "its cgroup does not empty: process 77 waits for a disk");
    pair.fails = None;
    pair.order(0, Order::Cancel { migration: migration(1) }).expect("it can be cancelled");
    pair.finish();
    assert_eq!(pair.runner(), 0);
}

#[test]
fn a_stuck_stop_goes_on_when_a_person_says_so() {
    let mut pair = Pair::new(Some(volume()));
    pair.fails = Some(|_, effect| {
        let is_stop = matches!(effect, Effect::Machine(MachineCommand::Stop { .. }));
        is_stop.then(|| fail(FailureCode::Stuck, "the cgroup is frozen"))
    });
    pair.move_to(1, 0, 1);
    pair.settle();
    pair.fails = None;
    pair.order(0, Order::Retry).expect("it can be tried again");
    pair.finish();
    assert_eq!(pair.runner(), 1);
}

#[test]
fn a_seal_that_is_refused_brings_the_machine_back() {
    let mut pair = Pair::new(Some(volume()));
    pair.fails = Some(|_, effect| {
        let is_seal = matches!(effect, Effect::Plane(Command::Seal { .. }));
        is_seal.then(|| fail(FailureCode::Refused, "somebody has the device open"))
    });
    pair.move_to(1, 0, 1);
    pair.finish();
    assert_eq!((pair.runner(), pair.rows[0].state.clone()), (0, State::Active { epoch: Epoch(1) }));
    assert_eq!(pair.sites[1].kind, Kind::None);
}

#[test]
fn a_machine_that_does_not_boot_still_gets_its_blocks() {
    let mut pair = Pair::new(Some(volume()));
    pair.fails = Some(|who, effect| {
        let is_start = matches!(effect, Effect::Machine(MachineCommand::Start { .. }));
        (who == 1 && is_start).then(|| fail(FailureCode::Retry, "no such program"))
    });
    pair.move_to(1, 0, 1);
    for _ in 0..40 {
        pair.settle();
        if pair.sites[1].kind == Kind::Clone {
            pair.sites[1].kind = Kind::Filled;
        }
        pair.wait();
    }
    assert_eq!((pair.phase(0), pair.phase(1)), (Phase::Cleaned, Phase::Cleaned), "{}", pair.trace);
    let waits = why(&pair.rows[1]);
    assert_eq!((waits[0].on.as_str(), waits[0].reason.as_str()), ("machine-start", "no such program"));
    pair.fails = None;
    pair.finish();
    assert_eq!(pair.runner(), 1);
}

#[test]
fn a_stopped_machine_moves_and_stays_down() {
    let mut pair = Pair::new(Some(volume()));
    pair.order(0, Order::Stop).expect("it is stopped");
    pair.settle();
    assert!(!pair.sites[0].running && !pair.sites[0].attached);
    pair.move_to(1, 0, 1);
    for _ in 0..20 {
        pair.settle();
        if pair.sites[1].kind == Kind::Clone {
            assert!(pair.sites[1].attached, "it fills while it is down");
            pair.sites[1].kind = Kind::Filled;
        }
        pair.wait();
    }
    assert_eq!(
        (pair.phase(0), pair.phase(1), pair.rows[1].desired),
        (Phase::Cleaned, Phase::Cleaned, Desired::Stopped)
    );
    assert!(!pair.sites[1].running && !pair.sites[1].attached);
    pair.order(1, Order::Start).expect("it is started");
    pair.settle();
    assert_eq!(pair.runner(), 1);
}

#[test]
fn reclaim_boots_the_sealed_copy_above_what_was_granted() {
    let mut pair = Pair::moving();
    pair.settle();
    assert_eq!(pair.phase(0), Phase::Hydrating);
    expect!["everything written to orders on worker-2 since the seal at 1000 ms (epoch 1) is lost; the copy here is what the machine had when it was stopped. If worker-2 is alive, both run it: make sure that it is destroyed"].assert_eq(&reclaim_loses(&pair.rows[0]).expect("it can be reclaimed"));
    // The destination burns.
    pair.sites[1] = Site::default();
    pair.queues[1].clear();
    pair.rows[1] = Row::new(machine(), worker(1));
    pair.wakes[1] = None;
    pair.order(0, Order::Reclaim).expect("it is reclaimed");
    pair.finish();
    assert_eq!((pair.runner(), pair.rows[0].state.clone()), (0, State::Active { epoch: Epoch(3) }));
    assert!(matches!(pair.order(0, Order::Reclaim), Err(Denied::Senseless { .. })));
}

#[test]
fn a_retained_copy_can_be_reclaimed_until_it_expires() {
    let mut pair = Pair::moving();
    pair.finish();
    let kept = pair.rows[0].clone();
    pair.sites[1] = Site::default();
    pair.rows[1] = Row::new(machine(), worker(1));
    pair.order(0, Order::Reclaim).expect("it is reclaimed");
    pair.finish();
    assert_eq!((pair.runner(), pair.rows[0].state.clone()), (0, State::Active { epoch: Epoch(3) }));
    let expires_ms = kept.copy.as_ref().map_or(0, |copy| copy.expires_ms);
    assert!(matches!(step(&kept, Event::Order(Order::Reclaim), expires_ms), Err(Denied::Busy { .. })));
    let freeing = step(&kept, Event::Order(Order::FreeCopy), 5_000).expect("it is freed").row;
    assert!(matches!(step(&freeing, Event::Order(Order::Reclaim), 5_000), Err(Denied::Busy { .. })));
}

#[test]
fn a_destination_that_was_not_destroyed_learns_that_it_was_overruled() {
    let mut pair = Pair::moving();
    pair.settle();
    pair.order(0, Order::Reclaim).expect("it is reclaimed");
    // Two run now, as the operator was told; the destination hears of it with its next word.
    pair.sites[1].running = false;
    pair.sites[1].kind = Kind::Filled;
    for _ in 0..5 {
        pair.settle();
        pair.wait();
    }
    assert_eq!(pair.rows[1].veto, Some((Epoch(3), worker(0))));
    assert_eq!(why(&pair.rows[1])[0].on, "higher-epoch");
}

/// Whole or not: what an overruled destination has is of no use, and its operator can be rid of it.
#[test]
fn an_overruled_destination_can_be_removed() {
    for kind in [Kind::Clone, Kind::Filled] {
        let mut pair = Pair::moving();
        pair.settle();
        assert!(
            matches!(pair.order(1, Order::Remove { force: false }), Err(Denied::Busy { .. })),
            "blocks are still missing"
        );
        pair.order(0, Order::Reclaim).expect("it is reclaimed");
        pair.sites[1].running = false;
        pair.sites[1].kind = kind;
        pair.feed(1, "gossip", Event::EpochSeen { epoch: Epoch(3), by: worker(0) }).expect("it is heard");
        pair.order(1, Order::Remove { force: false }).expect("it is removed");
        // The claim is heard every second, before it is gone too.
        pair.feed(1, "gossip", Event::EpochSeen { epoch: Epoch(3), by: worker(0) }).expect("it is heard");
        pair.finish();
        assert_eq!((pair.rows[1].state.clone(), pair.sites[1].kind), (State::None, Kind::None), "{kind:?}");
        assert_eq!((pair.runner(), pair.rows[0].state.clone()), (0, State::Active { epoch: Epoch(3) }));
    }
}

#[test]
fn a_higher_epoch_vetoes_a_boot_and_never_permits_one() {
    let mut pair = Pair::new(Some(volume()));
    let seen = |epoch| Event::EpochSeen { epoch: Epoch(epoch), by: worker(2) };
    assert!(step(&pair.rows[1], seen(9), 0).is_err(), "who owns nothing gains nothing");
    assert!(step(&pair.rows[0], seen(0), 0).is_err(), "a lower epoch is no news");
    pair.feed(0, "gossip", seen(5)).expect("it is heard");
    pair.crash(0, true);
    pair.settle();
    assert!(!pair.sites[0].running, "it does not boot");
    assert_eq!(why(&pair.rows[0])[0].severity, Severity::Stuck);
    assert!(pending(&pair.rows[0], 0).is_empty());
    assert!(matches!(pair.order(0, Order::Move(Box::new(world::move_to(1, 1)))), Err(Denied::Busy { .. })));
    pair.order(0, Order::ClearVeto).expect("a person has looked");
    pair.settle();
    assert_eq!((pair.runner(), pair.rows[0].state.clone()), (0, State::Active { epoch: Epoch(6) }));
}

#[test]
fn an_old_journal_at_the_source_is_noticed() {
    let mut pair = Pair::new(Some(volume()));
    let old = pair.rows[0].clone();
    pair.move_to(1, 0, 1);
    pair.settle();
    // The source's journal is restored from a backup: it thinks that it owns the machine.
    pair.rows[0] = old.clone();
    pair.disks[0] = old;
    pair.sites[1].kind = Kind::Filled;
    for _ in 0..5 {
        pair.wait();
        pair.settle();
        assert!(!pair.sites[0].running);
    }
    assert_eq!(pair.rows[0].veto, Some((Epoch(2), worker(1))), "{}", pair.trace);
}

#[test]
fn a_machine_is_removed_with_its_volume_and_its_epoch_stays() {
    let mut pair = Pair::new(Some(volume()));
    pair.order(0, Order::Remove { force: false }).expect("it is removed");
    pair.settle();
    assert_eq!((pair.rows[0].state.clone(), pair.sites[0].kind), (State::None, Kind::None));
    pair.sites[0].kind = Kind::Plain;
    pair.order(0, Order::Run { spec: serde_json::Value::Null, volume: Some(volume()) }).expect("the name is free");
    assert_eq!(pair.rows[0].state, State::Active { epoch: Epoch(2) });
}

#[test]
fn a_machine_that_dies_is_started_again() {
    let mut pair = Pair::new(Some(volume()));
    pair.sites[0].running = false;
    pair.feed(0, "lost", Event::MachineLost { reason: "its shim died".to_owned() }).expect("it is heard");
    assert_eq!(why(&pair.rows[0])[0].reason, "its shim died");
    assert!(pair.wait());
    pair.settle();
    assert_eq!(pair.runner(), 0);
}

#[test]
fn an_agent_restart_disturbs_nothing() {
    let mut pair = Pair::new(Some(volume()));
    pair.crash(0, false);
    assert_eq!(pair.rows[0].life, Life::Down, "what runs is learned again");
    pair.settle();
    assert_eq!((pair.runner(), pair.rows[0].life), (0, Life::Up));
}

#[test]
fn a_dead_origin_can_be_forgotten_once_every_block_is_here() {
    let mut pair = Pair::moving();
    pair.settle();
    assert!(matches!(pair.order(1, Order::ForgetOrigin), Err(Denied::Busy { .. })));
    pair.cut = true;
    pair.sites[1].kind = Kind::Filled;
    while pair.phase(1) != Phase::Verified {
        assert!(pair.wait());
        pair.settle();
    }
    let denied = pair.order(1, Order::Move(Box::new(world::move_to(2, 2))));
    assert!(matches!(denied, Err(Denied::Busy { .. })), "{denied:?}");
    pair.order(1, Order::ForgetOrigin).expect("the operator says so");
    assert_eq!(pair.phase(1), Phase::Cleaned);
    pair.move_to(2, 1, 0);
}

/// A pair whose source burnt at `phase` of the destination.
fn burnt_at(phase: Phase) -> Pair {
    let mut pair = Pair::moving();
    pair.settle();
    assert_eq!(pair.phase(1), Phase::Hydrating);
    pair.cut = true;
    if phase == Phase::Verified {
        pair.sites[1].kind = Kind::Filled;
    }
    while pair.phase(1) != phase {
        assert!(pair.wait());
        pair.settle();
    }
    pair
}

#[test]
fn a_machine_whose_origin_burnt_with_blocks_missing_can_be_given_up() {
    for phase in [Phase::Hydrating, Phase::Verified] {
        let mut pair = burnt_at(phase);
        let denied = pair.order(1, Order::Remove { force: false });
        assert!(matches!(denied, Err(Denied::Busy { .. })), "{denied:?}");
        pair.order(1, Order::Remove { force: true }).expect("the operator says so");
        pair.settle();
        assert_eq!((pair.rows[1].state.clone(), pair.sites[1].kind), (State::None, Kind::None), "{phase:?}");
        assert!(!pair.sites[1].running && why(&pair.rows[1]).is_empty(), "{:?}", why(&pair.rows[1]));
        // It had not burnt: it is not told that its copy is not needed, and can be reclaimed.
        pair.cut = false;
        pair.crash(0, true);
        pair.settle();
        assert_eq!(pair.rows[0].state.name(), "sealed", "{}", pair.trace);
        pair.order(0, Order::Reclaim).expect("it has the only copy");
        pair.finish();
        assert_eq!(pair.runner(), 0);
    }
}

#[test]
fn a_machine_that_was_granted_and_never_begun_can_be_given_up() {
    let mut pair = Pair::new(Some(volume()));
    pair.fails = Some(|_, effect| {
        let is_begin = matches!(effect, Effect::Plane(Command::Begin { .. }));
        is_begin.then(|| fail(FailureCode::Retry, "connection refused"))
    });
    pair.move_to(1, 0, 1);
    pair.settle();
    assert_eq!(pair.phase(1), Phase::Granted);
    pair.cut = true;
    pair.order(1, Order::Remove { force: true }).expect("the operator says so");
    pair.settle();
    assert_eq!((pair.rows[1].state.clone(), pair.sites[1].kind), (State::None, Kind::None), "{}", pair.trace);
}

#[test]
fn an_origin_that_was_forgotten_and_comes_back_lets_go() {
    for moved_on in [false, true] {
        let mut pair = burnt_at(Phase::Verified);
        pair.order(1, Order::ForgetOrigin).expect("the operator says so");
        if moved_on {
            pair.move_to(2, 1, 2);
            pair.settle();
        }
        pair.cut = false;
        pair.crash(0, true);
        pair.settle();
        assert_eq!(pair.rows[0].state.name(), "released", "{}", pair.trace);
        assert_eq!(pair.runner(), 1);
    }
}

#[test]
fn a_veto_is_cleared_before_and_after_a_move_and_not_in_it() {
    let seen = || Event::EpochSeen { epoch: Epoch(9), by: worker(2) };
    let mut pair = Pair::new(Some(volume()));
    pair.cut = true;
    pair.move_to(1, 0, 1);
    pair.feed(0, "gossip", seen()).expect("it is heard");
    assert!(matches!(pair.order(0, Order::ClearVeto), Err(Denied::Busy { .. })));
    pair.order(0, Order::Cancel { migration: migration(1) }).expect("it is cancelled");
    pair.order(0, Order::ClearVeto).expect("a person has looked");
    assert_eq!(pair.rows[0].state, State::Active { epoch: Epoch(10) });
    // While the source has not heard yet that nothing of it is needed.
    let mut pair = burnt_at(Phase::Verified);
    pair.feed(1, "gossip", seen()).expect("it is heard");
    pair.order(1, Order::ClearVeto).expect("a person has looked");
    pair.cut = false;
    pair.finish();
    assert_eq!((pair.runner(), pair.phase(1)), (1, Phase::Cleaned), "{}", pair.trace);
}

#[test]
fn the_program_of_the_source_is_asked_for_at_the_destination() {
    let mut pair = Pair::new(Some(volume()));
    pair.move_to(1, 0, 1);
    let mut asked = None;
    let mut said = None;
    while asked.is_none() {
        for (.., message) in &pair.net {
            if let decant_drain::Body::Prepare { .. } = &message.body {
                said = Some(serde_json::to_value(message).expect("JSON"));
            }
        }
        if let Some(Effect::Machine(MachineCommand::Prepare { program, .. })) = pair.queues[1].front() {
            asked = Some(program.clone());
        }
        assert!(pair.tick(), "{}", pair.trace);
    }
    assert_eq!(asked, Some(Some("ab12".to_owned())));
    // What an agent says that knows nothing of it.
    let mut said = said.expect("it was said");
    assert_eq!(said["body"]["program"], "ab12");
    said["body"].as_object_mut().expect("an object").remove("program");
    let old: Message = serde_json::from_value(said).expect("it reads");
    assert!(matches!(old.body, decant_drain::Body::Prepare { program: None, .. }));
}

#[test]
fn what_a_person_reads_when_an_order_is_refused() {
    let mut text = String::new();
    let mut note =
        |denied: Result<(), Denied>| writeln!(text, "{}", denied.expect_err("it is refused")).expect("a string");
    let run = || Order::Run { spec: serde_json::Value::Null, volume: None };
    let mut pair = Pair::new(Some(volume()));
    note(pair.order(0, run()));
    note(pair.order(1, Order::Stop));
    note(pair.order(0, Order::Move(Box::new(world::move_to(1, 0)))));
    note(pair.order(0, Order::Cancel { migration: migration(1) }));
    note(pair.order(0, Order::Reclaim));
    note(pair.order(0, Order::FreeCopy));
    note(pair.order(0, Order::ClearVeto));
    note(pair.order(0, Order::ForgetOrigin));
    pair.move_to(1, 0, 1);
    note(pair.order(0, Order::Move(Box::new(world::move_to(2, 1)))));
    note(pair.order(0, Order::Remove { force: false }));
    pair.settle();
    note(pair.order(0, Order::Cancel { migration: migration(1) }));
    note(pair.order(0, Order::Start));
    note(pair.order(1, Order::Move(Box::new(world::move_to(2, 0)))));
    note(pair.order(1, Order::Remove { force: false }));
    pair.finish();
    note(pair.order(0, Order::Stop));
    note(pair.order(0, Order::Cancel { migration: migration(1) }));
    pair.move_to(2, 1, 0);
    pair.order(1, Order::Cancel { migration: migration(2) }).expect("it is cancelled");
    pair.finish();
    note(pair.order(1, Order::Cancel { migration: migration(2) }));
    let other = Message { machine: MachineId::new("other").expect("an id"), ..message() };
    note(pair.feed(0, "wrong", Event::Received { from: worker(1), message: Box::new(other) }));
    note(pair.feed(0, "wrong", Event::Received { from: worker(2), message: Box::new(message()) }));
    expect![[r#"
        this machine is here already (active): choose another name, or remove it first
        worker-2 does not own this machine, which is none here
        worker-1 has this machine already
        no migration m-1 of this machine is known here
        there is no sealed copy of this machine here that could be booted
        no sealed copy of this machine is kept here
        nobody claims this machine at a higher epoch
        no origin waits for a word from here
        migration m-1 to worker-2 is under way: planned
        it is being moved: cancel migration m-1 first
        migration m-1 is past its commit point, worker-2 owns the machine: once it is verified, a move brings the machine back
        worker-1 does not own this machine, which is sealed here: it is being handed to worker-2; ask there
        this machine is not whole here yet; m-1 from worker-1 is hydrating: wait until it is over, or, if worker-1 is destroyed, give it up with `decant machine rm orders --with-volume --force`
        it is still being moved here; m-1 from worker-1 is hydrating: wait until it is over, or, if worker-1 is destroyed, give it up with `decant machine rm orders --with-volume --force`
        worker-1 does not own this machine, which is released here: it went to worker-2; ask there
        migration m-1 is past its commit point, worker-2 owns the machine: once it is verified, a move brings the machine back
        migration m-2 is over: ended
        worker-2 sent prepare-ok, which cannot be: it is about other
        worker-3 sent prepare-ok, which cannot be: the other end of m-1 is worker-2
    "#]]
    .assert_eq(&text);
}

fn message() -> Message {
    Message { machine: machine(), migration: migration(1), epoch: Epoch(2), body: decant_drain::Body::PrepareOk }
}
