//! Whoever may die does, one at a time, under a machine that runs; and an origin that goes silent under reads of a machine.

mod fleet;

use std::time::{Duration, Instant};

use fleet::{Fleet, MACHINE};
use rustix::process::Signal;

/// Says over TCP how many lines are in the log, to whoever connects.
const SERVE: &str = r#"
perl -MIO::Socket::IP -e '
    my $door = IO::Socket::IP->new(LocalHost => "::", LocalPort => 8080, Listen => 16, ReuseAddr => 1) or die $@;
    while (my $guest = $door->accept) {
        open(my $log, "<", "/data/log") or die $!;
        my @lines = <$log>;
        print $guest scalar(@lines), "\n";
        close $guest;
    }' 8>&- 9>&- &
"#;

#[test]
fn each_process_may_die_under_a_running_machine() {
    let test = "each_process_may_die_under_a_running_machine";
    if !fleet::can_run(test) {
        return;
    }
    let mut fleet = Fleet::start_with("deaths", SERVE, "");
    for worker in &mut fleet.workers {
        worker.start_proxy();
    }
    serves(&mut fleet, "at first");

    fleet.workers[0].kill_agent();
    runs_on(&mut fleet, "without its agent");
    serves(&mut fleet, "without its agent");
    fleet.workers[0].start_agent(&[]);
    runs_on(&mut fleet, "under a new agent");

    fleet.workers[0].kill_proxy();
    runs_on(&mut fleet, "without its proxy");
    fleet.workers[0].start_proxy();
    serves(&mut fleet, "through a new proxy");

    assert_eq!(fleet.workers[0].kill_volume_processes(), 1);
    runs_on(&mut fleet, "under a new volume process");
    serves(&mut fleet, "under a new volume process");

    for process in ["keeper", "shim"] {
        let (_, starts) = fleet.acks.totals();
        // Whichever of the two dies, the machine is stopped, which ends its shim, and started again.
        let shim = fleet.workers[0].processes("shim");
        // What the machine did not acknowledge may fail, and its shim may start it anew: its disk is gone before it is.
        fleet.acks.expect_power_cut();
        assert_eq!(fleet.workers[0].kill_processes(process), 1, "one {process}");
        let when = format!("after the death of its {process}");
        let deadline = Instant::now() + fleet::PATIENCE;
        loop {
            // Nothing is heard of the old program once there is a new shim.
            let now = ["keeper", "shim"].map(|process| fleet.workers[0].processes(process));
            fleet.acks.wait(Duration::from_millis(20));
            if now.iter().all(|processes| processes.len() == 1) && now[1] != shim {
                break;
            }
            assert!(Instant::now() < deadline, "{when}: it is not started again: {}", fleet.describe());
        }
        assert_eq!(fleet.settle(&when), 0, "{when}: here again");
        fleet.acks.await_progress(&when);
        assert!(fleet.acks.totals().1 > starts, "{when}: it was started again");
        runs_on(&mut fleet, &when);
        serves(&mut fleet, &when);
    }
    let (lines, starts) = fleet.acks.totals();
    println!("SHOW {test}: {lines} acknowledged lines all there, {starts} starts");
}

/// The machine goes on, and was not started anew: a runner, and one only.
fn runs_on(fleet: &mut Fleet, when: &str) {
    let (_, starts) = fleet.acks.totals();
    fleet.acks.await_progress(when);
    assert_eq!(fleet.acks.totals().1, starts, "{when}: it was not started again");
}

/// What was acknowledged is read through the proxy of each worker.
fn serves(fleet: &mut Fleet, when: &str) {
    for at in 0..2 {
        let (acknowledged, _) = fleet.acks.totals();
        let deadline = Instant::now() + fleet::PATIENCE;
        loop {
            let answer = fleet.workers[at].ask_proxy();
            if let Ok(lines) = answer.as_deref().unwrap_or_default().trim().parse::<u64>() {
                assert!(lines >= acknowledged, "{when}: {lines} lines of {acknowledged} at worker-{}", at + 1);
                break;
            }
            assert!(Instant::now() < deadline, "{when}: the proxy of worker-{} serves nothing: {answer:?}", at + 1);
            fleet.acks.wait(Duration::from_millis(20));
        }
    }
}

/// So many reads at once: more than 90, and fewer than the 96 that may wait.
const READERS: usize = 93;

/// Files that are read later, 256 KiB each, and what they are.
const MAKE_FILES: &str = r#"
if [ ! -e sums ]; then
    i=0
    while [ $i -lt READERS ]; do head -c 262144 /dev/urandom > f$i; i=$((i+1)); done
    sha256sum f* > sums.new && sync -f . && mv sums.new sums && sync -f .
fi
reading=
"#;

/// When it is asked to, the machine reads all of them at once, past the page cache, and says which were right.
const READ_FILES: &str = r#"
    if [ -z "$reading" ] && [ -e /outside/read ]; then
        reading=1
        i=0
        while [ $i -lt READERS ]; do
            (
                dd if=f$i of=/tmp/f$i bs=4096 iflag=direct 2>/dev/null || exit
                grep " f$i\$" sums > /tmp/sum$i && cd /tmp && sha256sum -c --status sum$i && echo "right $i" >&8
            ) 9>&- &
            i=$((i+1))
        done
    fi
"#;

/// A silent origin counts as away after 10 s; a machine that is killed then is stopped within its own timeout of 5 s, and some.
const STOP_PATIENCE: Duration = Duration::from_secs(30);

#[test]
fn a_machine_whose_reads_wait_for_a_silent_origin_writes_and_stops() {
    let test = "a_machine_whose_reads_wait_for_a_silent_origin_writes_and_stops";
    if !fleet::can_run(test) {
        return;
    }
    let [make, read] = [MAKE_FILES, READ_FILES].map(|script| script.replace("READERS", &READERS.to_string()));
    let mut fleet = Fleet::start_with("parked", &make, &read);
    let migration = move_slowly(&mut fleet);
    // The origin goes silent: its sockets stay, and nobody answers.
    assert_eq!(fleet.workers[0].signal_volume_processes(Signal::STOP), 1);
    fleet.acks.touch_outside("read");
    fleet.await_parked(1, &migration, 90);
    runs_on(&mut fleet, "90 reads wait, writes and syncs do not");
    fleet.await_parked(1, &migration, 90);

    let begun = Instant::now();
    fleet.workers[1].decant(&["machine", "stop", MACHINE]).expect("a stop is accepted");
    fleet.workers[1].await_state(MACHINE, "stopped");
    let stopped = begun.elapsed();
    assert!(stopped < STOP_PATIENCE, "it took {stopped:?} to stop");
    assert_eq!(fleet.acks.right(), 0, "no file was read");

    // Up again with the origin still silent, by what is here; then it comes back.
    let (_, starts) = fleet.acks.totals();
    fleet.workers[1].decant(&["machine", "start", MACHINE]).expect("a start is accepted");
    fleet.acks.await_start(starts + 1, "after the stop");
    fleet.await_parked(1, &migration, 90);
    fleet.workers[0].signal_volume_processes(Signal::CONT);
    fleet.workers[1].decant(&["migration", "set", &migration, "--rate", "0"]).expect("the limit is lifted");
    assert_eq!(fleet.settle("after the origin is back"), 1);
    fleet.acks.await_right(READERS, "after the origin is back");
    fleet.acks.await_progress("in the end");
    println!("SHOW {test}: {READERS} reads waited, stopped in {:.1} s, all read in the end", stopped.as_secs_f64());
}

/// Moves the machine to worker 2, where its volume then fills at next to no rate; the migration.
fn move_slowly(fleet: &mut Fleet) -> String {
    fleet.workers[0].end_agent();
    fleet.workers[0].start_agent(&[("DECANT_CRASH", "journal:source:sealed:after"), ("DECANT_CRASH_SIGNAL", "stop")]);
    let order = ["machine", "move", MACHINE, "--to", "worker-2", "--detach"];
    let ordered = fleet.workers[0].decant(&order).expect("a move is accepted");
    let migration = ordered["migration"].as_str().expect("its id").to_owned();
    // Sealed and not granted: the clone is there, and not a block of it was asked for.
    assert!(fleet.workers[0].await_standstill(), "{}", fleet.describe());
    fleet.workers[1].decant(&["migration", "set", &migration, "--rate", "16KiB"]).expect("a limit is set");
    let (_, starts) = fleet.acks.totals();
    fleet.workers[0].resume_agent();
    fleet.acks.await_start(starts + 1, "at the destination");
    fleet.acks.await_progress("at the destination");
    migration
}
