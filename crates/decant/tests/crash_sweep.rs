//! A crash at every journal write and every message of a migration and of a drain, on each side: of the agent, of the volume
//! processes, of both, and of the whole worker's power. After each, exactly one worker runs the machine and every
//! acknowledged line is there.
//!
//! Each way is first gone once undisturbed, and traced; then once for each point that it passed and each victim. What no way
//! passes fails, unless [`UNREACHED`] names it.

mod fleet;
mod sweep;

use std::collections::BTreeSet;
use std::time::Instant;

use decant_agent::{MESSAGE_POINTS, POINTS};
use fleet::Fleet;
use sweep::{DESTINATION, SOURCE, Way};

/// Points in the tables that no way passes, and why.
const UNREACHED: &[(&str, &str)] = &[];

/// The name of a fleet, and what is gone with it: ways, each with the sides on which something dies.
type Part = (&'static str, &'static [(Way, &'static [usize])]);

/// Each with a fleet of its own, beside each other: a run waits for the disk and for timers more than it computes.
const PARTS: [Part; 4] = [
    ("sweep-source", &[(Way::Move, &[SOURCE])]),
    ("sweep-destination", &[(Way::Move, &[DESTINATION])]),
    ("sweep-back", &[(Way::Abandon, BOTH), (Way::Refuse, BOTH), (Way::Unready, BOTH)]),
    (
        "sweep-others",
        &[
            (Way::Overruled, BOTH),
            (Way::Stop, BOTH),
            (Way::Drain, BOTH),
            (Way::BlockedDrain, BOTH),
            (Way::CancelledDrain, BOTH),
            (Way::LateDrain, BOTH),
        ],
    ),
];

const BOTH: &[usize] = &[SOURCE, DESTINATION];

#[test]
fn every_crash_leaves_one_runner_and_all_its_writes() {
    if !fleet::can_run("every_crash_leaves_one_runner_and_all_its_writes") {
        return;
    }
    let began = Instant::now();
    let parts = std::thread::scope(|scope| {
        let parts = PARTS.map(|(name, ways)| scope.spawn(move || sweep_with(name, ways)));
        // All are waited for, whatever becomes of the first.
        parts.map(|part| part.join())
    });
    let mut swept = BTreeSet::new();
    for part in parts {
        swept.extend(part.unwrap_or_else(|panic| std::panic::resume_unwind(panic)));
    }
    check_tables(&swept);
    println!("SHOW crash sweep: {} points of the tables, {:.0} s", swept.len(), began.elapsed().as_secs_f64());
}

/// Goes these ways with one fleet, with crashes on these sides; every point that was crashed at.
fn sweep_with(name: &str, ways: &[(Way, &[usize])]) -> BTreeSet<String> {
    let mut fleet = Fleet::start(name);
    let swept = ways.iter().flat_map(|(way, sides)| sweep::all_crashes_of(&mut fleet, *way, sides)).collect();
    let (lines, starts) = fleet.acks.totals();
    println!("SHOW {name}: {lines} acknowledged lines all there, {starts} starts, never two runners");
    swept
}

/// Every point of the product's tables was crashed at, or is excused; nothing else was.
fn check_tables(swept: &BTreeSet<String>) {
    let journal = POINTS.iter().flat_map(|point| [point.before, point.after]);
    let messages = MESSAGE_POINTS.iter().flat_map(|message| [message.before, message.after, message.received]);
    let all: BTreeSet<&str> = journal.chain(messages).collect();
    let excused: BTreeSet<&str> = UNREACHED.iter().map(|(point, _)| *point).collect();
    let swept: BTreeSet<&str> = swept.iter().map(String::as_str).collect();
    let unhit: Vec<_> = all.iter().filter(|point| !swept.contains(**point) && !excused.contains(**point)).collect();
    assert!(unhit.is_empty(), "no way passes these points: {unhit:#?}");
    let unknown: Vec<_> = swept.difference(&all).collect();
    assert!(unknown.is_empty(), "passed, and in no table: {unknown:#?}");
    let hit: Vec<_> = excused.iter().filter(|point| swept.contains(**point) || !all.contains(**point)).collect();
    assert!(hit.is_empty(), "excused without need: {hit:#?}");
}
