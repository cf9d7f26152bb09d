//! A network that loses what one worker sends to the other, without a word, and delivers the other direction or loses that too: the
//! kind of failure in which each side knows something else, and no socket is closed. It lasts longer than any patience of the product.

mod fleet;

use std::time::{Duration, Instant};

use fleet::Fleet;

/// Longer than a silent origin is given (10 s) and than unacknowledged data is (20 s).
const LOSS: Duration = Duration::from_secs(21);
/// Longer than an iSCSI session that is silent is kept by either end.
const LONG_LOSS: Duration = Duration::from_secs(30);
/// An agent answers within a second about itself, and in little more about the fleet: it gives its peers 0.9 s of that.
const ANSWER: [(&str, Duration); 2] =
    [("/v1/machines?scope=local", Duration::from_secs(1)), ("/v1/machines?scope=fleet", Duration::from_millis(1_500))];

#[test]
fn losses_in_one_direction_are_recovered_from() {
    let test = "losses_in_one_direction_are_recovered_from";
    lose_each(
        test,
        "one-way",
        &[
            ("recv:prepare", Lost::FromDestination, "nbd", LOSS),
            ("journal:destination:granted:after", Lost::FromDestination, "nbd", LOSS),
            ("journal:destination:granted:after", Lost::FromSource, "nbd", LOSS),
        ],
    );
}

#[test]
fn sessions_over_iscsi_outlive_a_network_that_is_gone_for_long() {
    let test = "sessions_over_iscsi_outlive_a_network_that_is_gone_for_long";
    lose_each(
        test,
        "both-ways",
        &[
            ("journal:destination:granted:after", Lost::Both, "iscsi", LONG_LOSS),
            ("journal:destination:granted:after", Lost::FromSource, "iscsi", LONG_LOSS),
        ],
    );
}

/// Each with a fleet of its own, beside each other: nearly all of it is waiting.
fn lose_each(test: &str, name: &str, losses: &[(&str, Lost, &str, Duration)]) {
    if !fleet::can_run(test) {
        return;
    }
    std::thread::scope(|scope| {
        for (n, (point, lost, protocol, time)) in losses.iter().enumerate() {
            scope.spawn(move || {
                let mut fleet = Fleet::start(&format!("{name}-{}", n + 1));
                lose(&mut fleet, point, *lost, protocol, *time);
            });
        }
    });
}

/// Whose words are lost.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Lost {
    FromDestination,
    FromSource,
    Both,
}

/// `point` is where at the destination the loss begins.
fn lose(fleet: &mut Fleet, point: &str, lost: Lost, protocol: &str, time: Duration) {
    let when = format!("{lost:?} lost from {point} on, over {protocol}");
    let source = fleet.settle(&format!("before {when}"));
    let destination = 1 - source;
    fleet.workers[destination].end_agent();
    fleet.workers[destination].start_agent(&[("DECANT_CRASH", point), ("DECANT_CRASH_SIGNAL", "stop")]);
    fleet.workers[destination].await_agent();
    let to = format!("worker-{}", destination + 1);
    fleet.workers[source]
        .decant(&["machine", "move", fleet::MACHINE, "--to", &to, "--protocol", protocol, "--detach"])
        .expect("a move is accepted");
    assert!(fleet.workers[destination].await_standstill(), "{when}: the point was not hit");

    let [here, there] = [source, destination].map(|at| at as u32 + 1);
    let ways: &[(u32, u32)] = match lost {
        Lost::FromDestination => &[(there, here)],
        Lost::FromSource => &[(here, there)],
        Lost::Both => &[(here, there), (there, here)],
    };
    ways.iter().for_each(|(from, to)| fleet.lab.set_lost(*from, *to, true).expect("a loss"));
    fleet.workers[destination].resume_agent();
    let begun = Instant::now();
    let mut slowest = [Duration::ZERO; 2];
    while begun.elapsed() < time {
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
    ways.iter().for_each(|(from, to)| fleet.lab.set_lost(*from, *to, false).expect("no loss any more"));
    let over = Instant::now();
    let owner = fleet.settle(&format!("after {when}"));
    fleet.acks.await_progress(&format!("after {when}"));
    let stuck = fleet.lab.directory().to_str().map(still_uninterruptible).unwrap_or_default();
    assert!(stuck.is_empty(), "after {when}: in an uninterruptible sleep for long: {stuck:?}");
    println!(
        "SHOW {when}, for {} s: at its {}, settled {:.1} s later; slowest answers {:.0} ms, with the fleet {:.0} ms",
        time.as_secs(),
        if owner == source { "source" } else { "destination" },
        over.elapsed().as_secs_f64(),
        slowest[0].as_secs_f64() * 1e3,
        slowest[1].as_secs_f64() * 1e3,
    );
}

/// Processes that name `of` in their arguments and were seen in state D at each of many looks.
fn still_uninterruptible(of: &str) -> Vec<String> {
    let looks = || -> Vec<String> {
        let processes = std::fs::read_dir("/proc").expect("/proc").flatten().map(|entry| entry.path());
        let is_asleep = |path: &std::path::Path| {
            let read = |name: &str| std::fs::read_to_string(path.join(name)).unwrap_or_default();
            let state = read("stat").rsplit_once(')').is_some_and(|(_, rest)| rest.trim_start().starts_with('D'));
            state && read("cmdline").contains(of)
        };
        processes.filter(|path| is_asleep(path)).map(|path| path.display().to_string()).collect()
    };
    let mut found = looks();
    for _ in 0..50 {
        std::thread::sleep(Duration::from_millis(20));
        let now = looks();
        found.retain(|path| now.contains(path));
    }
    found
}
