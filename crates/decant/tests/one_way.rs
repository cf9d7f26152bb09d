//! A network that loses what one worker sends to the other, without a word, and delivers the other direction: the kind of failure in
//! which each side knows something else. It lasts longer than any patience of the product.

#[allow(dead_code, reason = "shared with the crash sweep")]
mod fleet;

use std::time::{Duration, Instant};

use fleet::Fleet;

/// Longer than a silent origin is given (10 s) and than unacknowledged data is (20 s).
const LOSS: Duration = Duration::from_secs(21);
/// An agent answers within a second about itself, and in little more about the fleet: it gives its peers 0.9 s of that.
const ANSWER: [(&str, Duration); 2] =
    [("/v1/machines?scope=local", Duration::from_secs(1)), ("/v1/machines?scope=fleet", Duration::from_millis(1_500))];

#[test]
fn losses_in_one_direction_are_recovered_from() {
    if !fleet::can_run("losses_in_one_direction_are_recovered_from") {
        return;
    }
    let mut fleet = Fleet::start("one-way");
    // The point at the destination at which the loss begins, and whether it is the destination's words that are lost.
    for (point, from_destination) in [
        ("recv:prepare", true),
        ("journal:destination:granted:after", true),
        ("journal:destination:granted:after", false),
    ] {
        lose(&mut fleet, point, from_destination);
    }
}

fn lose(fleet: &mut Fleet, point: &str, from_destination: bool) {
    let whose = if from_destination { "destination" } else { "source" };
    let when = format!("the {whose}'s words lost from {point} on");
    let source = fleet.settle(&format!("before {when}"));
    let destination = 1 - source;
    fleet.workers[destination].end_agent();
    fleet.workers[destination].start_agent(&[("DECANT_CRASH", point), ("DECANT_CRASH_SIGNAL", "stop")]);
    fleet.workers[destination].await_agent();
    let to = format!("worker-{}", destination + 1);
    fleet.workers[source]
        .decant(&["machine", "move", fleet::MACHINE, "--to", &to, "--detach"])
        .expect("a move is accepted");
    assert!(fleet.workers[destination].await_standstill(), "{when}: the point was not hit");

    let (deaf, mute) = if from_destination { (source, destination) } else { (destination, source) };
    let ends = [mute, deaf].map(|at| at as u32 + 1);
    fleet.lab.set_lost(ends[0], ends[1], true).expect("a loss");
    fleet.workers[destination].resume_agent();
    let begun = Instant::now();
    let mut slowest = [Duration::ZERO; 2];
    while begun.elapsed() < LOSS {
        for worker in &mut fleet.workers {
            for ((path, limit), slowest) in ANSWER.iter().zip(&mut slowest) {
                let asked = Instant::now();
                worker.api(path).unwrap_or_else(|error| panic!("{when}: {error}"));
                *slowest = asked.elapsed().max(*slowest);
                assert!(*slowest < *limit, "{when}: {path} took {slowest:?}");
            }
        }
        // Two runners, a torn log or a failed write would be heard here.
        fleet.acks.wait(Duration::from_millis(100));
    }
    fleet.lab.set_lost(ends[0], ends[1], false).expect("no loss any more");
    let over = Instant::now();
    let owner = fleet.settle(&format!("after {when}"));
    fleet.acks.await_progress(&format!("after {when}"));
    println!(
        "SHOW {when}, for {} s: at its {}, settled {:.1} s later; slowest answers {:.0} ms, with the fleet {:.0} ms",
        LOSS.as_secs(),
        if owner == source { "source" } else { "destination" },
        over.elapsed().as_secs_f64(),
        slowest[0].as_secs_f64() * 1e3,
        slowest[1].as_secs_f64() * 1e3,
    );
}
