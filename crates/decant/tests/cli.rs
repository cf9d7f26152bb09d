//! The command line from outside: what it parses, what it prints, how it exits, against an agent of canned answers.

mod canned;

use std::io::{BufRead, BufReader};

use canned::{Canned, check, decant, ok};
use decant_api::{Blocker, Code, Drain, DrainMachine, DrainPhase, ErrorBody, Eta, Listing, Worker, WorkerState};
use decant_base::{DrainId, MachineId, WorkerId};
use expect_test::expect;

fn drain(phase: DrainPhase, done: u64) -> Drain {
    let moving = DrainMachine {
        machine: MachineId::new("orders").expect("an id"),
        planned: None,
        migration: None,
        phase: Some(decant_api::MigrationPhase::Hydrating),
        bytes_total: 200 << 20,
        bytes_done: done << 20,
        exposure_bytes: (200 - done) << 20,
        rate_bytes_per_s: 100 << 20,
        why: None,
    };
    Drain {
        drain: DrainId::new("drain-1").expect("an id"),
        workers: vec![WorkerId::new("worker-1").expect("an id")],
        reason: "disk".into(),
        phase,
        max: 2,
        started_at_ms: 0,
        evacuated_ms: (phase == DrainPhase::Drained).then_some(140),
        drained_ms: (phase == DrainPhase::Drained).then_some(2_100),
        deadline_at_ms: None,
        machines: vec![moving],
        blockers: Vec::new(),
        bytes_total: 200 << 20,
        bytes_done: done << 20,
        exposure_bytes: (200 - done) << 20,
        rate_bytes_per_s: 100 << 20,
        eta: Some(Eta { low_ms: 900, high_ms: 2_000, assumed: false }),
    }
}

#[test]
fn a_watched_drain_shows_each_change_and_ends_with_0() {
    let answers =
        [(DrainPhase::Moving, 0), (DrainPhase::Evacuated, 50), (DrainPhase::Evacuated, 90), (DrainPhase::Drained, 200)];
    let agent = Canned::new(answers.map(|(phase, done)| ok(&drain(phase, done))).to_vec());
    let output = agent.run(&["drain", "worker-1", "--reason", "disk"]);
    check(
        &output,
        0,
        expect![[r"
            drain drain-1 has started: 1 machine, 0 B allocated
            moving, 0 B of 200 MiB (0 %), 100 MiB/s, done in 900 ms to 2.0 s, 200 MiB still only on worker-1
            orders  hydrating, 0 B of 200 MiB (0 %), 100 MiB/s
            EVACUATED: runs nothing, still serves blocks; do not power off, 50 MiB of 200 MiB (25 %), 100 MiB/s, done in 900 ms to 2.0 s, 150 MiB still only on worker-1
            orders  hydrating, 50 MiB of 200 MiB (25 %), 100 MiB/s
            DRAINED: safe to power off, 200 MiB of 200 MiB (100 %)
            orders  hydrating, 200 MiB of 200 MiB (100 %)
            DRAINED: safe to power off (evacuated after 140 ms, drained after 2.1 s)
        "]],
        expect![""],
    );
    assert_eq!(agent.asked()[1], "GET /v1/drains/drain-1");
    assert!(
        agent.asked()[0].starts_with(r#"POST /v1/drains {"drain":null,"workers":["worker-1"]"#),
        "{:?}",
        agent.asked()
    );
}

#[test]
fn each_end_of_a_drain_has_its_exit_status() {
    for (phase, code) in
        [(DrainPhase::Drained, 0), (DrainPhase::Blocked, 3), (DrainPhase::Deadline, 4), (DrainPhase::Cancelled, 5)]
    {
        let agent = Canned::new(vec![ok(&drain(DrainPhase::Moving, 0)), ok(&drain(phase, 1))]);
        let output = agent.run(&["-o", "json", "drain", "worker-1"]);
        assert_eq!(output.status.code(), Some(code), "{output:?}");
        for line in String::from_utf8_lossy(&output.stdout).lines() {
            serde_json::from_str::<Drain>(line).expect("each line is the drain");
        }
    }
    let agent = Canned::new(vec![ok(&drain(DrainPhase::Moving, 0))]);
    let output = agent.run(&["drain", "worker-1", "--detach"]);
    assert_eq!(output.status.code(), Some(6));
    assert!(String::from_utf8_lossy(&output.stderr).contains("decant drain watch drain-1"), "{output:?}");
    let agent = Canned::new(vec![ok(&drain(DrainPhase::Moving, 0))]);
    let output = agent.run(&["drain", "worker-1", "--detach", "-o", "json"]);
    assert_eq!(output.status.code(), Some(6));
    serde_json::from_slice::<Drain>(&output.stdout).expect("the drain as it was answered");
    expect![[r#"
        {"detached":true,"watch":"decant drain watch drain-1"}
    "#]]
    .assert_eq(&String::from_utf8_lossy(&output.stderr));
}

#[test]
fn ctrl_c_detaches_and_says_so() {
    let agent = Canned::new(vec![ok(&drain(DrainPhase::Moving, 0)); 10_000]);
    let mut child = decant()
        .arg("--socket")
        .arg(agent.socket())
        .args(["drain", "watch", "drain-1"])
        .stdout(std::process::Stdio::piped())
        .stderr(std::process::Stdio::piped())
        .spawn()
        .expect("decant runs");
    // It has drawn its first line, so it listens for the signal.
    let mut line = String::new();
    BufReader::new(child.stdout.as_mut().expect("a pipe")).read_line(&mut line).expect("a line");
    rustix::process::kill_process(rustix::process::Pid::from_child(&child), rustix::process::Signal::INT)
        .expect("it is there");
    let output = child.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(6), "{output:?}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("detached; it goes on"), "{output:?}");
}

#[test]
fn blockers_are_named_with_what_to_do() {
    let blocker = Blocker {
        machine: Some(MachineId::new("orders").expect("an id")),
        worker: WorkerId::new("worker-1").expect("an id"),
        name: "no place".into(),
        cause: "4 GiB wanted, worker-2 has 1 GiB free".into(),
        fix: "add room".into(),
    };
    let planned = Drain { blockers: vec![blocker], ..drain(DrainPhase::Planned, 0) };
    let agent = Canned::new(vec![ok(&planned)]);
    let output = agent.run(&["drain", "worker-1", "--plan"]);
    assert_eq!(output.status.code(), Some(3));
    let text = String::from_utf8_lossy(&output.stdout);
    assert!(
        text.ends_with(
            "blocked: orders on worker-1: no place\n  cause: 4 GiB wanted, worker-2 has 1 GiB free\n  fix:   add room\n"
        ),
        "{text}"
    );
}

#[test]
fn failures_have_a_name_a_cause_and_a_fix() {
    let refusal =
        ErrorBody::new(Code::NotFound, "machine not found", "no worker has machine x", "see `decant machine list`");
    let answer = (404, serde_json::to_string(&refusal).expect("it is JSON"));
    check(
        &Canned::new(vec![answer.clone()]).run(&["machine", "show", "x"]),
        1,
        expect![""],
        expect![[r"
            error: machine not found
              cause: no worker has machine x
              fix:   see `decant machine list`
        "]],
    );
    check(
        &Canned::new(vec![answer]).run(&["machine", "show", "x", "-o", "json"]),
        1,
        expect![""],
        expect![[r#"
            {"code":"not_found","name":"machine not found","cause":"no worker has machine x","fix":"see `decant machine list`"}
        "#]],
    );
}

#[test]
fn a_command_line_that_makes_no_sense_exits_with_2() {
    for arguments in [
        &["drain"][..],
        &["drain", "Worker_1"],
        &["drain", "worker-1", "--deadline", "soon"],
        &["drain", "worker-1", "--max", "0"],
        &["volume", "create", "v", "--size", "4 GB"],
        &["volume", "create", "v", "--size", "4GiB", "--sector-size", "1024"],
        &["machine", "run", "m"],
        &["machine", "run", "m", "--bind", "relative", "--", "/bin/true"],
        &["machine", "run", "m", "--stop-signal", "32", "--", "/bin/true"],
        &["machine", "run", "m", "--needs", "nvme", "--", "/bin/true"],
        &["drain", "set", "drain-1"],
        &["drain", "set", "drain-1", "--max", "0"],
        &["machine", "clear-veto"],
        &["frobnicate"],
    ] {
        let output = decant().args(arguments).output().expect("decant runs");
        assert_eq!(output.status.code(), Some(2), "{arguments:?}: {output:?}");
        let json = decant().args(arguments).args(["-o", "json"]).output().expect("decant runs");
        if arguments.contains(&"--") {
            continue;
        }
        let body: ErrorBody = serde_json::from_slice(&json.stderr).expect("with -o json a failure is JSON");
        assert_eq!((json.status.code(), body.code), (Some(2), Code::InvalidRequest), "{arguments:?}");
    }
}

#[test]
fn a_drain_of_a_worker_and_a_verb_of_drain_are_told_apart() {
    let empty: Listing<Drain> = Listing { items: Vec::new(), unreachable: Vec::new() };
    let agent = Canned::new(vec![ok(&empty), ok(&drain(DrainPhase::Planned, 0)), ok(&drain(DrainPhase::Planned, 0))]);
    assert!(agent.run(&["drain", "list"]).status.success());
    assert!(agent.run(&["drain", "worker-1", "worker-2", "--plan"]).status.success());
    assert!(agent.run(&["drain", "--plan", "--", "list"]).status.success());
    let asked = agent.asked();
    assert_eq!(asked[0], "GET /v1/drains");
    assert!(asked[1].contains(r#""workers":["worker-1","worker-2"]"#), "{asked:?}");
    assert!(asked[2].contains(r#""workers":["list"]"#), "{asked:?}");
}

#[test]
fn workers_are_listed_with_what_an_operator_looks_for() {
    let worker = |name: &str, state, serving, exposure| Worker {
        worker: WorkerId::new(name).expect("an id"),
        worker_index: 1,
        address: "[fdde::1]:7070".into(),
        region: String::new(),
        labels: Default::default(),
        state,
        reason: Some("disk".into()),
        drain: None,
        capacity: None,
        machines: 2,
        serving,
        exposure_bytes: exposure,
        version: "0.1.0".into(),
    };
    let listing = Listing {
        items: vec![
            worker("worker-1", WorkerState::Evacuated, 1, 0),
            worker("worker-2", WorkerState::Ready, 0, 212 << 20),
        ],
        unreachable: Vec::new(),
    };
    check(
        &Canned::new(vec![ok(&listing)]).run(&["worker", "list"]),
        0,
        expect![[r"
            WORKER    STATE      MACHINES  SERVING  EXPOSURE  FREE  REASON
            worker-1  evacuated  2         1        0 B       -     disk
            worker-2  ready      2         0        212 MiB   -     disk
        "]],
        expect![""],
    );
}

#[test]
fn every_verb_has_help_with_what_it_does() {
    let output = decant().arg("--help").output().expect("decant runs");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    for verb in ["agent", "proxy", "ca", "worker", "volume", "machine", "drain", "migration", "why", "doctor", "demo"] {
        assert!(text.lines().any(|line| line.trim_start().starts_with(&format!("{verb} "))), "{verb} in\n{text}");
        let help = decant().args([verb, "--help"]).output().expect("decant runs");
        assert!(help.status.success() && help.stdout.len() > 200, "{verb}: {help:?}");
    }
    for hidden in ["keeper", "demo-orders", "shim"] {
        assert!(!text.contains(hidden), "{hidden} is for decant itself");
    }
}
