//! Who has the machine when workers disagree: claims of epochs, refusals of them, and what they forbid.

#[allow(unreachable_pub, reason = "shared by several test files")]
mod pair;
#[allow(unreachable_pub, reason = "shared by several test files")]
mod world;

use decant_base::Epoch;
use decant_dataplane::{Command, FailureCode};
use decant_drain::handoff::{Answer, State, Top};
use decant_drain::migration::Phase;
use decant_drain::{Effect, Event, Order, Row, Severity, step, why};
use pair::{Pair, fail};
use world::{Site, machine, migration, volume, worker};

/// Neither of two owners at one epoch would give way to the other.
#[test]
fn the_same_epoch_of_another_worker_vetoes_a_boot() {
    let mut pair = Pair::new(Some(volume()));
    pair.feed(0, "gossip", Event::EpochSeen { epoch: Epoch(1), by: worker(2) }).expect("it is heard");
    assert_eq!(pair.rows[0].veto, Some((Epoch(1), worker(2))));
    pair.crash(0, true);
    pair.settle();
    assert!(!pair.sites[0].running, "it does not boot");
    pair.order(0, Order::ClearVeto).expect("a person has looked");
    pair.settle();
    assert_eq!((pair.runner(), pair.rows[0].state.clone()), (0, State::Active { epoch: Epoch(2) }));
}

/// The machine went on from where it was handed over to: what is kept here boots above whoever was heard to have it.
#[test]
fn a_reclaim_goes_above_what_was_claimed_while_the_copy_was_sealed() {
    let claim = |epoch| Event::EpochSeen { epoch: Epoch(epoch), by: worker(2) };
    for released in [false, true] {
        let mut pair = Pair::moving();
        if released {
            pair.finish();
        } else {
            pair.settle();
        }
        assert!(step(&pair.rows[0], claim(2), pair.now_ms).is_err(), "it was granted that");
        pair.feed(0, "gossip", claim(7)).expect("it is heard");
        assert!(step(&pair.rows[0], claim(7), pair.now_ms).is_err(), "it is no news");
        pair.crash(0, false);
        // The destination burns.
        pair.sites[1] = Site::default();
        pair.queues[1].clear();
        pair.rows[1] = Row::new(machine(), worker(1));
        pair.wakes[1] = None;
        pair.order(0, Order::Reclaim).expect("it is reclaimed");
        pair.finish();
        assert_eq!((pair.runner(), pair.rows[0].state.clone()), (0, State::Active { epoch: Epoch(8) }));
    }
}

/// It was not whole: its source must not hear that it was, and give up the only copy.
#[test]
fn a_vetoed_machine_that_is_removed_before_it_is_whole_leaves_its_origin_the_copy() {
    for begun in [true, false] {
        let mut pair = Pair::new(Some(volume()));
        if !begun {
            pair.fails = Some(|_, effect| {
                let is_begin = matches!(effect, Effect::Plane(Command::Begin { .. }));
                is_begin.then(|| fail(FailureCode::Retry, "connection refused"))
            });
        }
        pair.move_to(1, 0, 1);
        pair.settle();
        assert_eq!(pair.phase(1), if begun { Phase::Hydrating } else { Phase::Granted });
        pair.feed(1, "gossip", Event::EpochSeen { epoch: Epoch(9), by: worker(2) }).expect("it is heard");
        pair.order(1, Order::Remove { force: false }).expect("somebody else has it");
        assert_eq!(pair.phase(1), Phase::Ended);
        pair.crash(0, true);
        pair.settle();
        assert_eq!(pair.rows[0].state.name(), "sealed", "{}", pair.trace);
    }
}

/// The source hears nothing of the refusal and goes back by itself: the epoch is used up all the same.
#[test]
fn a_machine_can_be_moved_again_to_where_its_move_was_cancelled() {
    let mut pair = Pair::new(Some(volume()));
    pair.move_to(1, 0, 1);
    while pair.rows[1].migration.is_none() {
        assert!(pair.tick());
    }
    pair.cut = true;
    pair.order(1, Order::Cancel { migration: migration(1) }).expect("it is not wanted");
    pair.order(0, Order::Cancel { migration: migration(1) }).expect("it is not wanted");
    pair.net.clear();
    pair.settle();
    pair.cut = false;
    pair.finish();
    assert_eq!((pair.rows[0].state.clone(), pair.rows[1].top.epoch), (State::Active { epoch: Epoch(1) }, Epoch(2)));
    pair.move_to(2, 0, 1);
    pair.finish();
    assert_eq!(pair.rows[0].state, State::Active { epoch: Epoch(3) }, "{}", pair.trace);
    pair.move_to(3, 0, 1);
    pair.finish();
    assert_eq!((pair.runner(), pair.rows[1].state.clone()), (1, State::Active { epoch: Epoch(4) }));
}

/// Its agent did not restart, so nothing but its own question tells a source that its word is awaited no more.
#[test]
fn a_source_asks_by_itself_what_became_of_the_machine() {
    let mut pair = Pair::moving();
    pair.settle();
    assert_eq!((pair.phase(0), pair.phase(1)), (Phase::Hydrating, Phase::Hydrating));
    pair.cut = true;
    pair.sites[1].kind = world::Kind::Filled;
    while pair.phase(1) != Phase::Verified {
        assert!(pair.wait());
        pair.settle();
    }
    pair.order(1, Order::ForgetOrigin).expect("the operator says so");
    pair.cut = false;
    for _ in 0..5 {
        pair.settle();
        pair.wait();
    }
    assert_eq!(pair.rows[0].state.name(), "released", "{}", pair.trace);
}

/// The destination's veto was cleared: it has the machine at a higher epoch than it was granted, and goes on filling.
#[test]
fn a_source_hears_that_it_is_needed_when_the_epoch_was_raised_above_its_grant() {
    let mut pair = Pair::moving();
    pair.settle();
    pair.feed(1, "gossip", Event::EpochSeen { epoch: Epoch(5), by: worker(2) }).expect("it is heard");
    pair.order(1, Order::ClearVeto).expect("a person has looked");
    for _ in 0..30 {
        pair.settle();
        pair.wait();
        assert!(why(&pair.rows[0]).iter().all(|wait| wait.severity == Severity::Waiting), "{}", pair.trace);
    }
    pair.finish();
    assert_eq!((pair.runner(), pair.rows[0].state.name()), (1, "released"), "{}", pair.trace);
}

/// A destination that knows a higher epoch has no use for the grant any more: a person must look.
#[test]
fn a_source_that_is_told_of_a_higher_epoch_past_the_commit_point_is_stuck() {
    let mut pair = Pair::moving();
    pair.settle();
    pair.rows[1] = Row::new(machine(), worker(1));
    pair.rows[1].top.epoch = Epoch(9);
    pair.queues[1].clear();
    pair.wakes[1] = None;
    for _ in 0..3 {
        pair.settle();
        pair.wait();
    }
    let wait = why(&pair.rows[0]).pop().expect("it waits");
    assert_eq!((wait.severity, wait.on.as_str(), wait.retry_ms), (Severity::Stuck, "grant", None), "{}", pair.trace);
    assert!(wait.reason.starts_with("worker-2 knows epoch 9"), "{wait:?}");
}

/// Only the outcome of the highest epoch is known: a late question about a lower one, which was accepted, is no occasion to refuse.
#[test]
fn a_late_prepare_forges_no_refusal_of_what_was_accepted() {
    let mut pair = Pair::new(Some(volume()));
    pair.cut = true;
    pair.order(0, Order::Move(Box::new(world::move_to(1, 1)))).expect("a move is ordered");
    let opened = Event::Plane {
        command: Box::new(pair.queues[0].iter().find_map(plane_command).expect("the export is opened")),
        result: Ok(Box::new(world::opened())),
    };
    let effects = step(&pair.rows[0], opened, pair.now_ms).expect("it is awaited").effects;
    let prepare = effects.into_iter().find_map(|effect| match effect {
        Effect::Send { message, .. } => Some(message),
        _ => None,
    });
    let prepare = prepare.expect("a message");
    let mut row = Row::new(machine(), worker(1));
    let answers = |row: &Row| -> Vec<&'static str> {
        let event = Event::Received { from: worker(0), message: prepare.clone() };
        let effects = step(row, event, 5_000).expect("it is answered").effects;
        effects
            .iter()
            .filter_map(|effect| match effect {
                Effect::Send { message, .. } => Some(message.body.name()),
                _ => None,
            })
            .collect()
    };
    for (epoch, id, answer, expected) in [
        (2, 1, Answer::Accepted, "grant-accepted"),
        (2, 9, Answer::Accepted, "prepare-failed"),
        (4, 9, Answer::Refused, "prepare-failed"),
        (2, 1, Answer::Refused, "grant-refused"),
        (2, 9, Answer::Refused, "grant-refused"),
    ] {
        row.top = Top { epoch: Epoch(epoch), answer: Some((migration(id), answer)) };
        assert_eq!(answers(&row), [expected], "{answer:?} {epoch} to m-{id}");
    }
}

fn plane_command(effect: &Effect) -> Option<Command> {
    match effect {
        Effect::Plane(command @ Command::OpenExport { .. }) => Some(command.clone()),
        _ => None,
    }
}
