//! Every verb over an agent of canned answers: what it asks, what people read, and that `-o json` is the answer itself.

mod canned;

use std::collections::BTreeMap;
use std::fmt::Debug;

use canned::{Canned, ok};
use decant_api::{
    Capacity, Drain, DrainMachine, DrainPhase, Eta, Exit, Listing, Logs, Machine, MachineState, Migration,
    MigrationPhase, PlannedMove, Progress, Reclaimed, RecoveryPoint, Role, SealedCopy, Timings, Volume, Why, Worker,
    WorkerState,
};
use decant_base::{Bytes, Epoch};
use decant_dataplane::{CloneStatus, Geometry, Protocol, VolumeState, VolumeStatus};
use expect_test::{Expect, expect};
use serde::Serialize;
use serde::de::DeserializeOwned;
use serde_json::{Value, json};

/// 2026-01-02 03:04:05 UTC.
const THEN: u64 = 1_767_323_045_000;

fn id<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: Debug,
{
    text.parse().expect("an id")
}

fn why() -> Why {
    Why {
        reason: "hydration: worker-1 does not answer".into(),
        since_at_ms: THEN,
        retry_at_ms: Some(THEN + 5_000),
        attempts: 3,
        clears: "every block is here".into(),
    }
}

fn worker() -> Worker {
    Worker {
        worker: id("worker-1"),
        worker_index: 1,
        address: "[fdde::1]:7070".into(),
        region: "attic".into(),
        labels: BTreeMap::from([("disk".into(), "nvme".into())]),
        state: WorkerState::Cordoned,
        reason: Some("new disk".into()),
        drain: None,
        capacity: Some(Capacity {
            machines: 64,
            bytes: Bytes::gib(100),
            bytes_used: Bytes::gib(3),
            bytes_free: Bytes::gib(50),
        }),
        machines: 2,
        serving: 1,
        exposure_bytes: 5 << 20,
        version: "0.1.0".into(),
    }
}

fn machine() -> Machine {
    let spec = json!({
        "id": "orders", "command": ["/opt/orders", "--data", "/data"], "volume": "orders-data", "address_index": 65537,
        "needs": { "disk": "nvme" },
    });
    Machine {
        machine: id("orders"),
        worker: id("worker-2"),
        spec: serde_json::from_value(spec).expect("a machine"),
        epoch: Epoch(2),
        state: MachineState::Running,
        address: Some("fdde::2:1".parse().expect("an address")),
        migration: Some(id("m-1")),
        moved_to: None,
        recovery_point: Some(RecoveryPoint::SealedCopy {
            worker: id("worker-1"),
            sealed_at_ms: THEN,
            written_bytes: Some(7 << 20),
        }),
        restarts: 1,
        exit: Some(Exit { status: None, signal: Some(9) }),
        why: Some(why()),
    }
}

fn migration(phase: MigrationPhase) -> Migration {
    Migration {
        migration: id("m-1"),
        machine: id("orders"),
        source: id("worker-1"),
        destination: id("worker-2"),
        role: Role::Destination,
        drain: Some(id("d-1")),
        protocol: Protocol::Nbd,
        phase,
        epoch: Epoch(2),
        started_at_ms: THEN,
        ended_at_ms: phase.is_final().then_some(THEN + 9_000),
        timings: Timings { prepare_ms: Some(12), stop_ms: Some(40), boot_ms: Some(30), ..Timings::default() },
        progress: Some(Progress {
            bytes_total: 200 << 20,
            bytes_done: if phase.is_final() { 200 << 20 } else { 50 << 20 },
            bytes_fetched: 60 << 20,
            exposure_bytes: if phase.is_final() { 0 } else { 150 << 20 },
            rate_bytes_per_s: 100 << 20,
            parked_reads: 1,
            eta: Some(Eta { low_ms: 1_200, high_ms: 1_900, assumed: false }),
        }),
        why: (!phase.is_final()).then(why),
    }
}

fn geometry() -> Geometry {
    Geometry { size: Bytes::gib(4), sector_size: 4096, cipher: "aes-xts-plain64".into(), key_bytes: 64, iv_tweak: 0 }
}

fn volume(worker: &str, state: VolumeState) -> Volume {
    Volume {
        volume: id("orders-data"),
        worker: id(worker),
        machine: Some(id("orders")),
        status: Some(VolumeStatus {
            volume: id("orders-data"),
            state,
            geometry: geometry(),
            header_bytes: Bytes::mib(16),
            allocated: Bytes::mib(212),
            epoch: Epoch(2),
            device: (state == VolumeState::Attached).then(|| "/dev/loop7".into()),
            clone: None,
            failed: None,
        }),
        sealed: None,
        problem: None,
    }
}

fn sealed(expires_at_ms: Option<u64>) -> Volume {
    let copy = SealedCopy {
        migration: id("m-1"),
        destination: id("worker-2"),
        sealed_at_ms: THEN,
        size: Bytes::mib(212),
        expires_at_ms,
    };
    Volume { sealed: Some(copy), ..volume("worker-1", VolumeState::Sealed) }
}

fn drain(phase: DrainPhase) -> Drain {
    let eta = Some(Eta { low_ms: 170, high_ms: 17_000, assumed: phase == DrainPhase::Planned });
    let planned =
        Some(PlannedMove { source: id("worker-1"), destination: id("worker-2"), bytes: Bytes::mib(212), eta });
    let machine = DrainMachine {
        machine: id("orders"),
        planned,
        migration: (phase != DrainPhase::Planned).then(|| id("m-1")),
        phase: (phase != DrainPhase::Planned).then_some(MigrationPhase::Hydrating),
        bytes_total: 212 << 20,
        bytes_done: 0,
        exposure_bytes: 0,
        rate_bytes_per_s: 0,
        why: None,
    };
    Drain {
        drain: id("d-1"),
        workers: vec![id("worker-1")],
        reason: "new disk".into(),
        phase,
        max: 2,
        started_at_ms: THEN,
        evacuated_ms: None,
        drained_ms: None,
        deadline_at_ms: Some(THEN + 3_600_000),
        machines: vec![machine],
        blockers: Vec::new(),
        bytes_total: 212 << 20,
        bytes_done: 0,
        exposure_bytes: 0,
        rate_bytes_per_s: 0,
        eta,
    }
}

fn list<T>(items: Vec<T>) -> Listing<T> {
    Listing { items, unreachable: vec![id("worker-3")] }
}

/// Runs a verb twice: for people, and as JSON, which must be `answer` itself.
fn verb<T>(arguments: &[&str], answer: &T, asked: &str, people: Expect)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    verb_after(arguments, Vec::new(), answer, &[asked], people);
}

/// As [`verb`]; `before` is answered first.
fn verb_after<T>(arguments: &[&str], before: Vec<(u16, String)>, answer: &T, asked: &[&str], people: Expect)
where
    T: Serialize + DeserializeOwned + PartialEq + Debug,
{
    let answers = [before, vec![ok(answer)]].concat();
    let agent = Canned::new(answers.clone());
    let output = agent.run(arguments);
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    assert_eq!(agent.asked(), asked, "{arguments:?}");
    people.assert_eq(&String::from_utf8_lossy(&output.stdout));
    let output = Canned::new(answers).run(&[arguments, &["-o", "json"]].concat());
    assert!(output.status.success() && output.stderr.is_empty(), "{arguments:?}: {output:?}");
    let seen: T = serde_json::from_slice(&output.stdout).expect("JSON of the answer");
    assert_eq!(seen, *answer, "{arguments:?}");
}

#[test]
fn worker_verbs() {
    verb(
        &["worker", "show", "worker-1"],
        &worker(),
        "GET /v1/workers/worker-1",
        expect![[r#"
        worker    worker-1
        state     cordoned
        reason    new disk
        machines  2
        serving   1 volumes that others still read from here
        exposure  5 MiB of its machines' data is only on other workers
        capacity  64 machines, 100 GiB of volumes (3 GiB used, 50 GiB free on disk)
        region    attic
        labels    disk=nvme
        address   [fdde::1]:7070
        version   0.1.0
    "#]],
    );
    let people = expect![[r#"
        worker    worker-1
        state     cordoned
        reason    new disk
        machines  2
        serving   1 volumes that others still read from here
        exposure  5 MiB of its machines' data is only on other workers
        capacity  64 machines, 100 GiB of volumes (3 GiB used, 50 GiB free on disk)
        region    attic
        labels    disk=nvme
        address   [fdde::1]:7070
        version   0.1.0
    "#]];
    let asked = r#"POST /v1/workers/worker-1/cordon {"reason":"new disk"}"#;
    verb(&["worker", "cordon", "worker-1", "--reason", "new disk"], &worker(), asked, people);
    let ready = Worker { state: WorkerState::Ready, reason: None, ..worker() };
    verb(
        &["worker", "uncordon", "worker-1"],
        &ready,
        "POST /v1/workers/worker-1/uncordon {}",
        expect![[r#"
        worker    worker-1
        state     ready
        machines  2
        serving   1 volumes that others still read from here
        exposure  5 MiB of its machines' data is only on other workers
        capacity  64 machines, 100 GiB of volumes (3 GiB used, 50 GiB free on disk)
        region    attic
        labels    disk=nvme
        address   [fdde::1]:7070
        version   0.1.0
    "#]],
    );
}

#[test]
fn volume_verbs() {
    let clone = CloneStatus { bytes_missing: 150 << 20, connected: true, ..CloneStatus::default() };
    let mut filling = volume("worker-2", VolumeState::Hydrating);
    if let Some(status) = &mut filling.status {
        status.clone = Some(clone);
    }
    let silent = Volume {
        status: None,
        problem: Some("the data plane did not answer within 500 ms".into()),
        ..volume("worker-4", VolumeState::Attached)
    };
    let all = list(vec![sealed(Some(THEN + 86_400_000)), sealed(None), filling, silent.clone()]);
    verb(
        &["volume", "list"],
        &all,
        "GET /v1/volumes?scope=fleet",
        expect![[r#"
        VOLUME       WORKER    STATE      SIZE   ALLOCATED  MACHINE  NOTE
        orders-data  worker-1  sealed     4 GiB  212 MiB    orders   sealed copy, 212 MiB, moved to worker-2, expires 2026-01-03 03:04:05Z
        orders-data  worker-1  sealed     4 GiB  212 MiB    orders   sealed copy, 212 MiB, moved to worker-2, still needed there
        orders-data  worker-2  hydrating  4 GiB  212 MiB    orders   150 MiB still only at its origin
        orders-data  worker-4  ?          -      -          orders   the data plane did not answer within 500 ms
        (worker-3 did not answer)
    "#]],
    );
    verb(
        &["volume", "show", "orders-data"],
        &sealed(Some(THEN)),
        "GET /v1/volumes/orders-data",
        expect![[r#"
        volume     orders-data
        worker     worker-1
        state      sealed
        machine    orders
        size       4 GiB, sectors of 4096
        allocated  212 MiB
        cipher     aes-xts-plain64, 512-bit key, LUKS2 header 16 MiB
        epoch      2
        note       sealed copy, 212 MiB, moved to worker-2, expires 2026-01-02 03:04:05Z
    "#]],
    );
    verb(
        &["volume", "show", "orders-data"],
        &silent,
        "GET /v1/volumes/orders-data",
        expect![[r#"
        volume   orders-data
        worker   worker-4
        problem  the data plane did not answer within 500 ms
    "#]],
    );
    let asked = r#"POST /v1/volumes {"volume":"orders-data","size":4294967296,"sector_size":4096}"#;
    let made = Volume { machine: None, ..volume("worker-1", VolumeState::Attached) };
    verb(
        &["volume", "create", "orders-data", "--size", "4GiB"],
        &made,
        asked,
        expect![[r#"
        volume     orders-data
        worker     worker-1
        state      attached
        size       4 GiB, sectors of 4096
        allocated  212 MiB
        cipher     aes-xts-plain64, 512-bit key, LUKS2 header 16 MiB
        epoch      2
        device     /dev/loop7
    "#]],
    );
}

#[test]
fn machine_verbs_that_look() {
    let moved = Machine {
        state: MachineState::HandedOver,
        worker: id("worker-1"),
        epoch: Epoch(1),
        address: None,
        moved_to: Some(id("worker-2")),
        why: None,
        ..machine()
    };
    let all = list(vec![machine(), moved]);
    verb(
        &["machine", "list"],
        &all,
        "GET /v1/machines?scope=fleet",
        expect![[r#"
        MACHINE  WORKER    STATE        EPOCH  ADDRESS    VOLUME       NOTE
        orders   worker-2  running      2      fdde::2:1  orders-data  hydration: worker-1 does not answer
        orders   worker-1  handed_over  1      -          orders-data  moved to worker-2
        (worker-3 did not answer)
    "#]],
    );
    verb(
        &["machine", "show", "orders"],
        &machine(),
        "GET /v1/machines/orders",
        expect![[r#"
        machine    orders
        worker     worker-2
        state      running
        waits for  hydration: worker-1 does not answer; every block is here
        epoch      2
        address    fdde::2:1
        volume     orders-data
        command    /opt/orders --data /data
        restarts   1
        last exit  signal 9
        migration  m-1
        recovery   sealed copy on worker-1 as of 2026-01-02 03:04:05Z; later writes would be lost (7 MiB so far)
    "#]],
    );
    let logs = Logs { text: "listening\nserved\n".into() };
    verb(
        &["machine", "logs", "orders", "-n", "2"],
        &logs,
        "GET /v1/machines/orders/logs?tail=2",
        expect![[r#"
        listening
        served
    "#]],
    );
}

#[test]
fn machine_verbs_that_order() {
    let stopped = Machine { state: MachineState::Stopped, recovery_point: None, exit: None, why: None, ..machine() };
    let starting = Machine { state: MachineState::Starting, ..stopped.clone() };
    verb(
        &["machine", "stop", "orders"],
        &stopped,
        "POST /v1/machines/orders/stop {}",
        expect![[r#"
        machine    orders
        worker     worker-2
        state      stopped
        epoch      2
        address    fdde::2:1
        volume     orders-data
        command    /opt/orders --data /data
        restarts   1
        migration  m-1
    "#]],
    );
    verb(
        &["machine", "start", "orders"],
        &starting,
        "POST /v1/machines/orders/start {}",
        expect![[r#"
        machine    orders
        worker     worker-2
        state      starting
        epoch      2
        address    fdde::2:1
        volume     orders-data
        command    /opt/orders --data /data
        restarts   1
        migration  m-1
    "#]],
    );
    verb(
        &["machine", "retry", "orders"],
        &starting,
        "POST /v1/machines/orders/retry {}",
        expect![[r#"
        machine    orders
        worker     worker-2
        state      starting
        epoch      2
        address    fdde::2:1
        volume     orders-data
        command    /opt/orders --data /data
        restarts   1
        migration  m-1
    "#]],
    );
    let asked = r#"POST /v1/machines/orders/clear-veto {"force":false}"#;
    verb(
        &["machine", "clear-veto", "orders"],
        &starting,
        asked,
        expect![[r#"
        machine    orders
        worker     worker-2
        state      starting
        epoch      2
        address    fdde::2:1
        volume     orders-data
        command    /opt/orders --data /data
        restarts   1
        migration  m-1
    "#]],
    );
    let asked = r#"POST /v1/machines/orders/forget-origin {"force":true}"#;
    verb(
        &["machine", "forget-origin", "orders", "--force"],
        &starting,
        asked,
        expect![[r#"
        machine    orders
        worker     worker-2
        state      starting
        epoch      2
        address    fdde::2:1
        volume     orders-data
        command    /opt/orders --data /data
        restarts   1
        migration  m-1
    "#]],
    );
    let reclaimed = Reclaimed { machine: starting, given_up: id("worker-2"), lost_since_at_ms: THEN };
    let asked = r#"POST /v1/machines/orders/reclaim {"force":true}"#;
    verb(
        &["machine", "reclaim", "orders", "--force"],
        &reclaimed,
        asked,
        expect![[r#"
        orders boots here from its sealed copy; worker-2 is given up.
        Lost: everything written there since 2026-01-02 03:04:05Z.

        machine    orders
        worker     worker-2
        state      starting
        epoch      2
        address    fdde::2:1
        volume     orders-data
        command    /opt/orders --data /data
        restarts   1
        migration  m-1
    "#]],
    );
}

#[test]
fn a_machine_is_run_as_it_is_described() {
    let agent = Canned::new(vec![ok(&machine())]);
    let arguments = ["machine", "run", "web", "--needs", "disk=nvme", "--stop-signal", "31", "--", "/usr/bin/true"];
    assert!(agent.run(&arguments).status.success());
    let asked = agent.asked();
    let body: Value = serde_json::from_str(asked[0].trim_start_matches("POST /v1/machines ")).expect("JSON");
    assert_eq!(body["spec"]["needs"], json!({ "disk": "nvme" }));
    assert_eq!(body["spec"]["stop_signal"], 31);
    let agent = Canned::new(vec![ok(&migration(MigrationPhase::Cleaned))]);
    assert!(agent.run(&["machine", "move", "orders", "--any-program"]).status.success());
    assert!(agent.asked()[0].contains(r#""any_program":true"#), "{:?}", agent.asked());
}

/// What is gone is answered with nothing: the command says itself what that was.
#[test]
fn verbs_that_remove() {
    let plain = |answers: Vec<(u16, String)>, arguments: &[&str]| {
        let agent = Canned::new(answers.clone());
        let output = agent.run(arguments);
        assert!(output.status.success() && output.stderr.is_empty(), "{output:?}");
        let json = Canned::new(answers).run(&[arguments, &["-o", "json"]].concat());
        let json: Value = serde_json::from_slice(&json.stdout).expect("JSON");
        (format!("{}{json}\n", String::from_utf8_lossy(&output.stdout)), agent.asked())
    };
    let empty = || ok(&json!({}));
    let (shown, asked) = plain(vec![empty()], &["volume", "delete", "orders-data"]);
    expect![[r#"
        volume orders-data is deleted
        {"removed":"orders-data"}
    "#]]
    .assert_eq(&shown);
    assert_eq!(asked, ["DELETE /v1/volumes/orders-data"]);
    let web = Machine { spec: decant_machine::MachineSpec { volume: None, ..machine().spec }, ..machine() };
    let (shown, asked) = plain(vec![ok(&web), empty()], &["machine", "rm", "orders"]);
    expect![[r#"
        machine orders is removed
        {"removed":"orders"}
    "#]]
    .assert_eq(&shown);
    assert_eq!(asked[1], "DELETE /v1/machines/orders?with_volume=false&force=false");
    let answers = vec![ok(&machine()), ok(&migration(MigrationPhase::Hydrating)), empty()];
    let (shown, asked) = plain(answers, &["machine", "rm", "orders", "--with-volume", "--force"]);
    expect![[r#"
        machine orders is removed with its volume orders-data; 150 MiB of it had not come from its origin
        {"missing_bytes":157286400,"removed":"orders","volume":"orders-data"}
    "#]]
    .assert_eq(&shown);
    assert_eq!(asked[1..], ["GET /v1/migrations/m-1", "DELETE /v1/machines/orders?with_volume=true&force=true"]);
    // Not by the way.
    let agent = Canned::new(vec![ok(&machine())]);
    let output = agent.run(&["machine", "rm", "orders", "--force"]);
    assert_eq!(output.status.code(), Some(2), "{output:?}");
    assert_eq!(agent.asked().len(), 1, "nothing was ordered");
}

#[test]
fn drain_verbs() {
    let all = list(vec![drain(DrainPhase::Moving)]);
    verb(
        &["drain", "list"],
        &all,
        "GET /v1/drains",
        expect![[r#"
            DRAIN  WORKERS   PHASE   MACHINES  STARTED               REASON
            d-1    worker-1  moving  1         2026-01-02 03:04:05Z  new disk
            (worker-3 did not answer)
        "#]],
    );
    verb(
        &["drain", "show", "d-1"],
        &drain(DrainPhase::Moving),
        "GET /v1/drains/d-1",
        expect![[r#"
        drain      d-1
        workers    worker-1
        reason     new disk
        state      moving, 0 B of 212 MiB (0 %), done in 170 ms to 17.0 s
        at once    2 of each worker
        started    2026-01-02 03:04:05Z
        deadline   2026-01-02 04:04:05Z
          orders  worker-1 -> worker-2  hydrating, 0 B of 212 MiB (0 %)
    "#]],
    );
    let cancelling = drain(DrainPhase::Cancelling);
    verb(
        &["drain", "cancel", "d-1"],
        &cancelling,
        "POST /v1/drains/d-1/cancel {}",
        expect![[r#"
        drain      d-1
        workers    worker-1
        reason     new disk
        state      cancelling, 0 B of 212 MiB (0 %), done in 170 ms to 17.0 s
        at once    2 of each worker
        started    2026-01-02 03:04:05Z
        deadline   2026-01-02 04:04:05Z
          orders  worker-1 -> worker-2  hydrating, 0 B of 212 MiB (0 %)
    "#]],
    );
    let moving = drain(DrainPhase::Moving);
    verb(
        &["drain", "resume", "d-1"],
        &moving,
        "POST /v1/drains/d-1/resume {}",
        expect![[r#"
        drain      d-1
        workers    worker-1
        reason     new disk
        state      moving, 0 B of 212 MiB (0 %), done in 170 ms to 17.0 s
        at once    2 of each worker
        started    2026-01-02 03:04:05Z
        deadline   2026-01-02 04:04:05Z
          orders  worker-1 -> worker-2  hydrating, 0 B of 212 MiB (0 %)
    "#]],
    );
    let asked = r#"POST /v1/drains/d-1/settings {"max":4}"#;
    verb(
        &["drain", "set", "d-1", "--max", "4"],
        &Drain { max: 4, ..moving },
        asked,
        expect![[r#"
        drain      d-1
        workers    worker-1
        reason     new disk
        state      moving, 0 B of 212 MiB (0 %), done in 170 ms to 17.0 s
        at once    4 of each worker
        started    2026-01-02 03:04:05Z
        deadline   2026-01-02 04:04:05Z
          orders  worker-1 -> worker-2  hydrating, 0 B of 212 MiB (0 %)
    "#]],
    );
}

#[test]
fn a_plan_says_how_long_and_on_what_that_stands() {
    let plan = drain(DrainPhase::Planned);
    let asked = r#"POST /v1/drains {"drain":null,"workers":["worker-1"],"plan_only":true,"to":null,"partial":false,"max":null,"reason":"","deadline_ms":null,"protocol":"nbd","any_program":false}"#;
    verb(
        &["drain", "worker-1", "--plan"],
        &plan,
        asked,
        expect![[r#"
        drain      d-1
        workers    worker-1
        reason     new disk
        state      planned; nothing was touched, at most 212 MiB to move, in 170 ms to 17.0 s; no rate was measured lately, 12.5 MB/s to 1.25 GB/s is assumed
        at once    2 of each worker
        started    2026-01-02 03:04:05Z
        deadline   2026-01-02 04:04:05Z
          orders  worker-1 -> worker-2, at most 212 MiB, in 170 ms to 17.0 s
    "#]],
    );
}

#[test]
fn migration_verbs() {
    let now = migration(MigrationPhase::Hydrating);
    let all = list(vec![now.clone()]);
    verb(
        &["migration", "list"],
        &all,
        "GET /v1/migrations?scope=fleet",
        expect![[r#"
        MIGRATION  MACHINE  FROM      TO        SEEN AS      PHASE      STARTED               NOTE
        m-1        orders   worker-1  worker-2  destination  hydrating  2026-01-02 03:04:05Z  hydration: worker-1 does not answer
        (worker-3 did not answer)
    "#]],
    );
    verb(
        &["migration", "show", "m-1"],
        &now,
        "GET /v1/migrations/m-1",
        expect![[r#"
        migration  m-1
        machine    orders, epoch 2
        from, to   worker-1 -> worker-2 (seen as destination)
        phase      hydrating
        waits for  hydration: worker-1 does not answer; every block is here
        drain      d-1
        live data  50 MiB of 200 MiB (25 %), 100 MiB/s, done in 1.2 s to 1.9 s
        exposure   150 MiB still only on worker-1
        steps      prepare 12 ms, stop 40 ms, boot 30 ms
        started    2026-01-02 03:04:05Z
    "#]],
    );
    let back = migration(MigrationPhase::Cancelled);
    verb(
        &["migration", "cancel", "m-1"],
        &back,
        "POST /v1/migrations/m-1/cancel {}",
        expect![[r#"
        migration  m-1
        machine    orders, epoch 2
        from, to   worker-1 -> worker-2 (seen as destination)
        phase      cancelled
        drain      d-1
        live data  200 MiB of 200 MiB (100 %)
        exposure   none: nothing is only on worker-1
        steps      prepare 12 ms, stop 40 ms, boot 30 ms
        started    2026-01-02 03:04:05Z
        ended      2026-01-02 03:04:14Z
    "#]],
    );
    let asked = r#"POST /v1/migrations/m-1/settings {"rate":52428800,"policy":"eio"}"#;
    verb(
        &["migration", "set", "m-1", "--rate", "50MiB", "--policy", "eio"],
        &now,
        asked,
        expect![[r#"
        migration  m-1
        machine    orders, epoch 2
        from, to   worker-1 -> worker-2 (seen as destination)
        phase      hydrating
        waits for  hydration: worker-1 does not answer; every block is here
        drain      d-1
        live data  50 MiB of 200 MiB (25 %), 100 MiB/s, done in 1.2 s to 1.9 s
        exposure   150 MiB still only on worker-1
        steps      prepare 12 ms, stop 40 ms, boot 30 ms
        started    2026-01-02 03:04:05Z
    "#]],
    );
    let over = migration(MigrationPhase::Cleaned);
    verb(
        &["migration", "watch", "m-1"],
        &over,
        "GET /v1/migrations/m-1",
        expect![[r#"
        orders  cleaned, 200 MiB of 200 MiB (100 %)
    "#]],
    );
}

#[test]
fn why_names_every_wait_since_when_how_often_and_what_clears_it() {
    let drains: Listing<Drain> = list(vec![drain(DrainPhase::Moving)]);
    let answers = vec![
        ok(&list(vec![worker()])),
        ok(&list(vec![machine()])),
        ok(&list(vec![migration(MigrationPhase::Hydrating)])),
        ok(&list(vec![volume("worker-2", VolumeState::Attached)])),
        ok(&drains),
    ];
    let output = Canned::new(answers.clone()).run(&["why"]);
    assert!(output.status.success(), "{output:?}");
    expect![[r#"
        worker worker-1 on worker-1: takes no machines: new disk
          clears when: decant worker uncordon worker-1
        machine orders on worker-2: hydration: worker-1 does not answer, since 2026-01-02 03:04:05Z, tried 3 times, next try 2026-01-02 03:04:10Z
          clears when: every block is here
        migration m-1 on worker-2: hydration: worker-1 does not answer, since 2026-01-02 03:04:05Z, tried 3 times, next try 2026-01-02 03:04:10Z
          clears when: every block is here
    "#]].assert_eq(&String::from_utf8_lossy(&output.stdout));
    let output = Canned::new(answers.clone()).run(&["why", "orders", "-o", "json"]);
    let waits: Value = serde_json::from_slice(&output.stdout).expect("JSON");
    expect![[r#"
        [
          {
            "attempts": 3,
            "clears": "every block is here",
            "kind": "machine",
            "reason": "hydration: worker-1 does not answer",
            "retry_at_ms": 1767323050000,
            "since_at_ms": 1767323045000,
            "subject": "orders",
            "worker": "worker-2"
          }
        ]"#]]
    .assert_eq(&serde_json::to_string_pretty(&waits).expect("JSON"));
    let output = Canned::new(answers).run(&["why", "web"]);
    assert_eq!(String::from_utf8_lossy(&output.stdout), "web waits for nothing\n");
}
