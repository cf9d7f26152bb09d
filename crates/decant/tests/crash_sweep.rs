//! A crash at every journal write and every message of a migration, on each side: of the agent, of the volume processes, of
//! both, and of the whole worker's power. After each, exactly one worker runs the machine and every acknowledged line is there.

mod fleet;

use std::collections::BTreeSet;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use fleet::Fleet;

/// What dies at the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Victim {
    Agent,
    Volume,
    Both,
    Power,
}

const VICTIMS: [Victim; 4] = [Victim::Agent, Victim::Volume, Victim::Both, Victim::Power];

/// Points that every move passes, or the sweep would prove nothing.
const EXPECTED: [[&str; 7]; 2] = [
    [
        "journal:source:planned:before",
        "journal:source:sealed:before",
        "journal:source:sealed:after",
        "send:prepare:before",
        "send:grant:before",
        "recv:grant-accepted",
        "recv:verified",
    ],
    [
        "recv:prepare",
        "send:prepare-ok:after",
        "recv:grant",
        "journal:destination:granted:before",
        "journal:destination:granted:after",
        "send:grant-accepted:before",
        "send:verified:before",
    ],
];

#[test]
fn every_crash_leaves_one_runner_and_all_its_writes() {
    if !fleet::can_run("every_crash_leaves_one_runner_and_all_its_writes") {
        return;
    }
    let _turn = turn();
    let began = Instant::now();
    let mut fleet = Fleet::start("sweep");
    let points = enumerate(&mut fleet);
    let mut runs = 0;
    for (side, points) in points.iter().enumerate() {
        for point in points {
            for victim in VICTIMS {
                runs += 1;
                crash_at(&mut fleet, side, point, victim);
            }
        }
    }
    let (lines, starts) = fleet.acks.totals();
    println!(
        "SHOW crash sweep: {} source and {} destination points, {runs} crashes, {lines} acknowledged lines all there, \
         {starts} starts, never two runners, {:.0} s",
        points[0].len(),
        points[1].len(),
        began.elapsed().as_secs_f64()
    );
}

#[test]
fn every_crash_of_a_cancel_leaves_one_runner_and_all_its_writes() {
    if !fleet::can_run("every_crash_of_a_cancel_leaves_one_runner_and_all_its_writes") {
        return;
    }
    let _turn = turn();
    let mut fleet = Fleet::start("cancels");
    for way in [Way::Abandon, Way::Refuse] {
        sweep_of(&mut fleet, way);
    }
}

/// One sweep at a time: each has its patience.
fn turn() -> MutexGuard<'static, ()> {
    static TURN: Mutex<()> = Mutex::new(());
    TURN.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How a move is taken back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Way {
    /// The source has not heard that the destination is prepared, and goes back alone.
    Abandon,
    /// The source is sealed and the destination has not heard of the grant: it is asked to refuse.
    Refuse,
}

impl Way {
    /// Where the destination dies before the cancel is ordered.
    fn last_word(self) -> &'static str {
        match self {
            Self::Abandon => "send:prepare-ok:before",
            Self::Refuse => "send:prepare-ok:after",
        }
    }

    /// Points that it passes and an undisturbed move does not, on the source and on the destination.
    fn points(self) -> [&'static [&'static str]; 2] {
        match self {
            Self::Abandon => [
                &[
                    "journal:source:unwinding:before",
                    "journal:source:unwinding:after",
                    "send:abandon:before",
                    "send:abandon:after",
                    "recv:abandoned",
                    "journal:source:ended:before",
                    "journal:source:ended:after",
                ],
                &["recv:abandon", "send:abandoned:before", "send:abandoned:after"],
            ],
            Self::Refuse => [
                &[
                    "journal:source:unwinding:before",
                    "journal:source:unwinding:after",
                    "send:refuse:before",
                    "send:refuse:after",
                    "recv:grant-refused",
                    "journal:source:ended:before",
                    "journal:source:ended:after",
                ],
                &["recv:refuse", "send:grant-refused:before", "send:grant-refused:after"],
            ],
        }
    }
}

/// Every crash point of a cancel. The agent alone and the whole worker: a volume process knows nothing of a cancel.
fn sweep_of(fleet: &mut Fleet, way: Way) {
    let began = Instant::now();
    let end = take_back(fleet, way, None);
    assert_eq!(end, Ended::AtSource, "an undisturbed {way:?} takes the machine back");
    let mut runs = [0; 2];
    let mut back = 0;
    for (side, points) in way.points().iter().enumerate() {
        for point in *points {
            for victim in [Victim::Agent, Victim::Power] {
                runs[side] += 1;
                back += u32::from(take_back(fleet, way, Some((side, point, victim))) == Ended::AtSource);
            }
        }
    }
    println!(
        "SHOW sweep of {way:?}: {} crashes on the source and {} on the destination, {back} times back at the source, else at the \
         destination, {:.0} s",
        runs[0],
        runs[1],
        began.elapsed().as_secs_f64()
    );
}

/// Where the machine is after a cancel.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ended {
    AtSource,
    /// The order was lost with an agent before it was durable.
    AtDestination,
}

/// One move that is cancelled, and a crash on the way back.
fn take_back(fleet: &mut Fleet, way: Way, crash: Option<(usize, &str, Victim)>) -> Ended {
    let when = match crash {
        Some((side, point, victim)) => {
            format!("{way:?}: {victim:?} at {point} on the {}", ["source", "destination"][side])
        }
        None => format!("{way:?}, undisturbed"),
    };
    let source = fleet.settle(&format!("before {when}"));
    let destination = 1 - source;
    let stop_at = |point| [("DECANT_CRASH", point), ("DECANT_CRASH_SIGNAL", "stop")];
    let of_side = |wanted| crash.filter(|(side, ..)| *side == wanted).map(|(_, point, _)| stop_at(point));
    let on_source = of_side(0);
    if let Some(environment) = &on_source {
        fleet.workers[source].end_agent();
        fleet.workers[source].start_agent(environment);
    }
    fleet.workers[destination].end_agent();
    fleet.workers[destination].start_agent(&stop_at(way.last_word()));
    fleet.workers[destination].await_agent();

    let to = format!("worker-{}", destination + 1);
    let order = ["machine", "move", fleet::MACHINE, "--to", &to, "--reason", "to be cancelled", "--detach"];
    let ordered = fleet.workers[source].decant(&order).expect("a move is accepted");
    let migration = ordered["migration"].as_str().expect("its id").to_owned();
    let asked = fleet.workers[destination].await_standstill();
    assert!(asked, "{when}: the destination was not asked: {}", fleet.describe());
    fleet.workers[destination].kill_agent();
    if way == Way::Refuse {
        fleet.workers[source].await_phase(&migration, "sealed");
    }
    // By a thread: the agent that takes it may stand still before it answers. If it does not, the order is durable before the
    // destination hears anything again, and no grant is on its way any more.
    let mut cancel = fleet.workers[source].command(&["migration", "cancel", &migration]);
    let cancel = std::thread::spawn(move || drop(cancel.output()));
    fleet.workers[source].await_or_standstill(|_| cancel.is_finished());
    if way == Way::Refuse {
        // A peer's messages go one batch after the other: the first that fails from now on may hold a grant, the next does not.
        let before = fleet.workers[source].undelivered();
        fleet.workers[source].await_or_standstill(|worker| worker.undelivered() >= before + 2);
    }
    fleet.workers[destination].start_agent(of_side(1).as_ref().map_or(&[], |environment| &environment[..]));
    if let Some((side, _, victim)) = crash {
        let at = [source, destination][side];
        let hit = fleet.workers[at].await_standstill();
        assert!(hit, "{when}: the point was not hit: {}", fleet.describe());
        if victim == Victim::Power {
            fleet.acks.expect_power_cut();
            fleet.workers[at].cut_power();
        } else {
            fleet.workers[at].kill_agent();
        }
        fleet.workers[at].start_agent(&[]);
    }
    let _ = cancel.join();
    let owner = fleet.settle(&format!("after {when}"));
    fleet.acks.await_progress(&format!("after {when}"));
    if owner == source { Ended::AtSource } else { Ended::AtDestination }
}

/// Moves the machine once undisturbed and returns the points that the source and the destination passed.
fn enumerate(fleet: &mut Fleet) -> [BTreeSet<String>; 2] {
    for worker in &mut fleet.workers {
        let trace = worker.trace_path();
        worker.end_agent();
        worker.start_agent(&[("DECANT_CRASH_TRACE", trace.to_str().expect("UTF-8"))]);
        worker.await_agent();
    }
    let source = fleet.settle("before the traced move");
    // What the start of an agent passes is no step of a migration.
    let before: Vec<usize> = (0..2).map(|at| read_trace(fleet, at).len()).collect();
    order_move(fleet, source);
    assert_eq!(fleet.settle("after the traced move"), 1 - source);
    let passed = |at: usize| -> BTreeSet<String> {
        let names = read_trace(fleet, at).split_off(before[at]);
        // The volume processes trace too; their own points are swept by the engine's tests.
        names.into_iter().filter(|name| !name.starts_with("map:")).collect()
    };
    let points = [passed(source), passed(1 - source)];
    for (side, expected) in EXPECTED.iter().enumerate() {
        for point in expected {
            assert!(points[side].contains(*point), "the undisturbed move never passed {point}: {:?}", points[side]);
        }
        for point in &points[side] {
            println!("SHOW point on the {}: {point}", ["source", "destination"][side]);
        }
    }
    for worker in &mut fleet.workers {
        worker.end_agent();
        worker.start_agent(&[]);
    }
    points
}

fn read_trace(fleet: &Fleet, at: usize) -> Vec<String> {
    let text = std::fs::read_to_string(fleet.workers[at].trace_path()).unwrap_or_default();
    text.lines().map(str::to_owned).collect()
}

fn order_move(fleet: &mut Fleet, source: usize) {
    let to = format!("worker-{}", 2 - source);
    fleet.workers[source]
        .decant(&["machine", "move", fleet::MACHINE, "--to", &to, "--reason", "crash sweep", "--detach"])
        .expect("a move is accepted");
}

/// One move in which the victim dies when the agent of `side` passes `point`.
fn crash_at(fleet: &mut Fleet, side: usize, point: &str, victim: Victim) {
    let when = format!("{victim:?} at {point} on the {}", ["source", "destination"][side]);
    let source = fleet.settle(&format!("before {when}"));
    let at = if side == 0 { source } else { 1 - source };
    fleet.workers[at].end_agent();
    fleet.workers[at].start_agent(&[("DECANT_CRASH", point), ("DECANT_CRASH_SIGNAL", "stop")]);
    // Some points an agent passes while it starts, before it takes any order.
    let early = fleet.workers[at].answers_or_stands_still();
    let order = (!early).then(|| {
        fleet.workers[1 - at].await_agent();
        // The order is given by a thread: the agent that takes it may stand still before it answers.
        spawn_order(&fleet.workers[source], &format!("worker-{}", 2 - source))
    });
    assert!(early || fleet.workers[at].await_standstill(), "{when}: the point was not hit");
    let worker = &mut fleet.workers[at];
    match victim {
        Victim::Agent => worker.kill_agent(),
        Victim::Volume => {
            worker.kill_volume_processes();
            worker.resume_agent();
        }
        Victim::Both => {
            worker.kill_volume_processes();
            worker.kill_agent();
        }
        Victim::Power => {
            fleet.acks.expect_power_cut();
            worker.cut_power();
        }
    }
    if victim != Victim::Volume {
        worker.start_agent(&[]);
    }
    if let Some(order) = order {
        let _ = order.join();
    }
    fleet.settle(&format!("after {when}"));
    fleet.acks.await_progress(&format!("after {when}"));
}

fn spawn_order(worker: &fleet::Worker, to: &str) -> std::thread::JoinHandle<()> {
    let mut command = worker.command(&["machine", "move", fleet::MACHINE, "--to", to, "--detach"]);
    std::thread::spawn(move || {
        let _ = command.output();
    })
}
