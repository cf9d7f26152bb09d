//! A crash at every journal write and every message of a migration, on each side: of the agent, of the volume processes, of
//! both, and of the whole worker's power. After each, exactly one worker runs the machine and every acknowledged line is there.

mod fleet;

use std::collections::BTreeSet;
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
