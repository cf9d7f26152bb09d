//! An exhaustive model of the handoff that calls the product's own `step` and `pending`.
//!
//! Three workers. The network keeps every message for ever and delivers any of them at any time, any number of times or
//! never: lost, repeated and reordered in one. Agents are killed and the power fails between a commit and its effects and
//! between an effect and its outcome. The operator moves, cancels and reclaims. Rows, effects and messages are interned,
//! so that a state is a handful of small numbers and a step is computed once.
//!
//! `DECANT_TEST_SCALE=2` and above widens the scope.

mod model;
mod properties;
mod steps;
#[allow(unreachable_pub, reason = "shared by several test files")]
#[path = "../world/mod.rs"]
mod world;

use properties::{dead_ends, way_into};
use stateright::{Checker, HasDiscoveries, Model};
use steps::{Bug, Handoff, Scope};

fn scale() -> u32 {
    std::env::var("DECANT_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Explores everything; panics with the path to a broken invariant.
fn hold(name: &str, scope: Scope) {
    let started = std::time::Instant::now();
    let checker = Handoff::new(scope, Bug::None).checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    let dead = dead_ends(checker.model());
    println!(
        "{name}: {} states, {} transitions, depth {}, {} rows, {:.1} s",
        checker.unique_state_count(),
        checker.model().edges.lock().expect("a lock").len(),
        checker.max_depth(),
        checker.model().rows.values.read().expect("a lock").len(),
        started.elapsed().as_secs_f64()
    );
    assert!(dead.is_empty(), "{} states without a way out, e.g.\n{}", dead.len(), way_into(checker.model(), &dead));
}

/// Explores until an invariant breaks, which it must.
fn catch(bug: Bug, scope: Scope, expected: &str) {
    let checker = Handoff::new(scope, bug).checker().threads(2).finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let found = checker.discoveries();
    let broken: Vec<&str> = found.keys().copied().collect();
    println!("{bug:?}: caught after {} states: {broken:?}", checker.unique_state_count());
    assert!(broken.contains(&expected), "the model does not catch {bug:?}: it finds {broken:?}");
}

/// Nothing happens but one move; each test widens it.
const QUIET: Scope = Scope {
    moves: 1,
    crashes: 0,
    cancels: 0,
    reclaims: 0,
    failures: 0,
    writes: 0,
    toggles: 0,
    losses: 0,
    claims: 0,
    retries: 0,
    stateless: false,
    news: false,
};

#[test]
fn one_move_with_crash_cancel_and_failure() {
    hold("one move, a crash, a cancel, a failure", Scope { crashes: 1, cancels: 1, failures: 1, writes: 1, ..QUIET });
}

#[test]
fn one_move_with_crash_cancel_and_reclaim() {
    hold("one move, a crash, a cancel, a reclaim", Scope { crashes: 1, cancels: 1, reclaims: 1, writes: 2, ..QUIET });
}

#[test]
fn one_move_with_two_crashes() {
    hold("one move, two crashes", Scope { crashes: 2, writes: 1, news: true, ..QUIET });
}

#[test]
fn two_moves_with_a_crash() {
    hold("two moves, a crash", Scope { moves: 2, crashes: 1, ..QUIET });
}

#[test]
fn one_move_while_the_operator_stops_and_starts() {
    hold("one move, stopped and started, a cancel", Scope { toggles: 2, cancels: 1, ..QUIET });
    hold("one move, stopped or started, a crash", Scope { toggles: 1, crashes: 1, ..QUIET });
}

#[test]
fn a_stateless_move() {
    let scope = Scope { crashes: 1, cancels: 1, failures: 1, toggles: 1, stateless: true, ..QUIET };
    hold("a stateless move, a crash, a cancel, a failure", scope);
}

#[test]
fn one_move_whose_origin_is_given_up() {
    hold("one move, a lost origin, a crash", Scope { losses: 1, crashes: 1, writes: 1, ..QUIET });
    hold("a stateless move, a lost origin, a crash", Scope { losses: 1, crashes: 1, stateless: true, ..QUIET });
}

#[test]
fn one_move_with_a_claim_that_is_cleared() {
    hold("one move, a claim, a cancel", Scope { claims: 1, cancels: 1, writes: 1, ..QUIET });
}

#[test]
fn one_move_with_a_retry() {
    hold("one move, a retry, a crash, a cancel", Scope { retries: 1, crashes: 1, cancels: 1, ..QUIET });
}

/// Explores only with `DECANT_TEST_SCALE=2` or more: minutes each.
fn hold_wide(name: &str, scope: Scope) {
    if scale() < 2 {
        println!("{name}: only with DECANT_TEST_SCALE=2 or more");
        return;
    }
    hold(name, scope);
}

#[test]
fn wide_everything_once() {
    hold_wide(
        "everything once",
        Scope { crashes: 1, cancels: 1, failures: 1, reclaims: 1, writes: 2, news: true, ..QUIET },
    );
}

#[test]
fn wide_every_word_of_an_operator() {
    let scope = Scope { losses: 1, claims: 1, retries: 1, crashes: 1, cancels: 1, writes: 1, ..QUIET };
    hold_wide("a lost origin, a claim, a retry, a crash, a cancel", scope);
}

#[test]
fn wide_two_crashes_and_a_cancel() {
    hold_wide("two crashes, a cancel", Scope { crashes: 2, cancels: 1, writes: 1, ..QUIET });
}

#[test]
fn wide_stopped_and_started_with_a_crash_and_a_cancel() {
    hold_wide("stopped and started, a crash, a cancel", Scope { toggles: 2, crashes: 1, cancels: 1, ..QUIET });
}

#[test]
fn wide_two_moves_and_a_cancel() {
    hold_wide("two moves, a cancel", Scope { moves: 2, cancels: 1, ..QUIET });
}

#[test]
fn wide_two_stateless_moves_and_two_crashes() {
    hold_wide("two stateless moves, two crashes", Scope { moves: 2, crashes: 2, stateless: true, ..QUIET });
}

#[test]
fn catches_a_grant_before_the_seal_is_durable() {
    let scope = Scope { crashes: 1, writes: 1, ..QUIET };
    catch(Bug::GrantBeforeSealIsDurable, scope, "at most one owner, with the highest epoch");
}

#[test]
fn catches_a_boot_before_active_is_durable() {
    let scope = Scope { crashes: 1, ..QUIET };
    catch(Bug::BootBeforeActiveIsDurable, scope, "whoever runs the machine durably owns it");
}

#[test]
fn catches_a_refusal_without_its_outcome() {
    catch(Bug::RefusalWithoutOutcome, QUIET, "at most one owner, with the highest epoch");
}

#[test]
fn catches_an_accepted_lower_epoch() {
    let scope = Scope { moves: 2, ..QUIET };
    catch(Bug::LowerEpochAccepted, scope, "at most one owner, with the highest epoch");
}

#[test]
fn catches_a_source_freed_before_verified() {
    let scope = Scope { writes: 1, ..QUIET };
    catch(Bug::FreedBeforeVerified, scope, "every acknowledged block is readable by the owner");
}
