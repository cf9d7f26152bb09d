//! Whole agents, three of them, over a fake world: moves, crashes, cancels, lost connections, certificates.

mod fake;

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use decant_agent::client::ClientError;
use decant_api::{
    Cordon, Drain, DrainPhase, Empty, Listing, Machine, MachineState, Migration, MigrationPhase, Reclaimed, Route,
    RouteState, Scope, Volume, Worker, WorkerState, path,
};
use decant_base::MachineId;
use expect_test::expect;
use fake::{Fleet, Hold, id, retry_until};
use serde_json::json;

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_moves_with_its_writes() {
    let fleet = Fleet::start().await;
    for stateful in [true, false] {
        let name = if stateful { "orders" } else { "web" };
        let machine = fleet.run(name, stateful).await;
        let migration = fleet.start_move(&machine, &format!("m-{name}")).await;
        let done = fleet.wait_over(&migration).await;
        assert_eq!(done.phase, MigrationPhase::Cleaned, "{done:?}");
        fleet.wait_running("worker-2", &machine).await;
        fleet.assert_sound(&machine, "worker-2", name);
        let timings = done.timings;
        assert!(
            [timings.prepare_ms, timings.stop_ms, timings.seal_ms, timings.grant_ms].iter().all(Option::is_some),
            "{done:?}"
        );
        assert!([timings.boot_ms, timings.hydration_ms].iter().all(Option::is_some), "{done:?}");
        // Whoever is asked knows where it went.
        for worker in ["worker-1", "worker-2", "worker-3"] {
            let route: Route = fleet.client(worker).get(&path::route(&machine, 2_000)).await.expect("a route");
            let state = if worker == "worker-2" { RouteState::Here } else { RouteState::Moved };
            assert_eq!((route.state, route.worker, route.epoch.0), (state, Some(id("worker-2")), 2), "{worker}");
        }
    }
    let volumes: Listing<Volume> = fleet.client("worker-1").get(&path::volumes(Scope::Local)).await.expect("a list");
    let sealed = volumes.items[0].sealed.as_ref().expect("the copy is kept");
    assert!(sealed.expires_at_ms.is_some_and(|at| at > sealed.sealed_at_ms), "{sealed:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_event_log_tells_the_move_once_and_in_order() {
    let fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    let migration = fleet.start_move(&machine, "m-1").await;
    fleet.wait_over(&migration).await;
    let mut kinds = Vec::new();
    let mut events = fleet.client("worker-1").events(0).await.expect("a stream");
    let mut last = 0;
    while kinds.last().map(String::as_str) != Some("migration.cleaned") {
        let event = events.next().await.expect("it goes on").expect("an event");
        assert_eq!(event.sequence, last + 1, "no gap");
        last = event.sequence;
        if event.kind.starts_with("migration.") {
            kinds.push(event.kind);
        }
    }
    expect![[r#"
        migration.planned
        migration.prepared
        migration.stopped
        migration.sealed
        migration.granted
        migration.booted
        migration.hydrating
        migration.verified
        migration.cleaned"#]]
    .assert_eq(&kinds.join("\n"));
}

/// The agent of one side dies at each of its calls to the plane and the driver, before or after the work was done.
#[tokio::test(flavor = "multi_thread")]
async fn an_agent_may_die_at_every_effect() {
    let runs: Vec<(&str, usize, bool)> = ["worker-1", "worker-2"]
        .into_iter()
        .flat_map(|worker| (0..12).flat_map(move |call| [(worker, call, false), (worker, call, true)]))
        .collect();
    let mut hits = std::collections::BTreeMap::new();
    // Eight fleets at a time: they wait most of the time.
    for batch in runs.chunks(8) {
        let batch = batch.iter().map(|&(worker, call, done)| async move {
            tokio::spawn(crash_run(worker, call, done)).await.expect("no panic").then_some(worker)
        });
        for worker in futures_util::future::join_all(batch).await.into_iter().flatten() {
            *hits.entry(worker).or_insert(0) += 1;
        }
    }
    // Each side has at least: export or prepare, machine, seal or begin, close or verify; each before and after.
    assert!(hits.len() == 2 && hits.values().all(|count| *count >= 8), "{hits:?}");
}

async fn crash_run(worker: &'static str, call: usize, done: bool) -> bool {
    let about = format!("{worker} dies at call {call}, done {done}");
    let mut fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    let before = fleet.world.calls(worker).len();
    fleet.world.hold(Hold { worker: worker.to_owned(), call: Some(before + call), name: String::new(), done });
    let migration = fleet.start_move(&machine, "m-1").await;
    // Either the call comes, or the move is over without it.
    let client = fleet.client("worker-1");
    let hit = retry_until(&about, || async {
        if fleet.world.is_held() {
            return Some(true);
        }
        let view = client.get::<Migration>(&path::migration(&migration)).await.ok()?;
        view.phase.is_final().then_some(false)
    })
    .await;
    if hit {
        fleet.crash(worker).await;
        fleet.world.release();
        fleet.boot(worker).await;
    }
    let over = fleet.wait_over(&migration).await;
    assert_eq!(over.phase, MigrationPhase::Cleaned, "{about}: {over:?}");
    fleet.wait_running("worker-2", &machine).await;
    fleet.assert_sound(&machine, "worker-2", &about);
    hit
}

/// A cancel at each call: either the machine is back, or it was too late and the machine is at its destination.
#[tokio::test(flavor = "multi_thread")]
async fn a_cancel_at_every_step_goes_back_or_forward() {
    let mut runs = tokio::task::JoinSet::new();
    for worker in ["worker-1", "worker-2"] {
        for call in 0..8 {
            runs.spawn(async move { cancel_run(worker, call).await });
        }
    }
    let mut ends = std::collections::BTreeSet::new();
    while let Some(end) = runs.join_next().await {
        ends.insert(end.expect("no panic"));
    }
    assert_eq!(ends.into_iter().collect::<Vec<_>>(), ["worker-1", "worker-2"], "both ends were seen");
}

async fn cancel_run(worker: &'static str, call: usize) -> &'static str {
    let about = format!("cancel at call {call} of {worker}");
    let fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    let before = fleet.world.calls(worker).len();
    fleet.world.hold(Hold { worker: worker.to_owned(), call: Some(before + call), name: String::new(), done: true });
    let migration = fleet.start_move(&machine, "m-1").await;
    let client = fleet.client("worker-1");
    retry_until(&about, || async {
        let view = client.get::<Migration>(&path::migration(&migration)).await.ok()?;
        (fleet.world.is_held() || view.phase.is_final()).then_some(())
    })
    .await;
    fleet.cancel(&migration).await;
    fleet.world.release();
    let over = fleet.wait_over(&migration).await;
    let end = if over.phase == MigrationPhase::Cleaned { "worker-2" } else { "worker-1" };
    fleet.wait_running(end, &machine).await;
    fleet.assert_sound(&machine, end, &about);
    end
}

#[tokio::test(flavor = "multi_thread")]
async fn a_move_survives_connections_that_break() {
    let fleet = Fleet::start_behind(|_, address| lossy(address)).await;
    let machine = fleet.run("orders", true).await;
    let migration = fleet.start_move(&machine, "m-1").await;
    let over = fleet.wait_over(&migration).await;
    assert_eq!(over.phase, MigrationPhase::Cleaned, "{over:?}");
    fleet.wait_running("worker-2", &machine).await;
    fleet.assert_sound(&machine, "worker-2", "lossy");
}

/// A relay that breaks every connection after some kilobytes, each after another number of them.
fn lossy(to: std::net::SocketAddr) -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("set");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        let mut limit = 4_000u64;
        while let Ok((mut near, _)) = listener.accept().await {
            limit = 4_000 + (limit * 7_919) % 9_000;
            tokio::spawn(async move {
                use tokio::io::AsyncReadExt as _;
                let Ok(mut far) = tokio::net::TcpStream::connect(to).await else { return };
                let (near_read, mut near_write) = near.split();
                let (far_read, mut far_write) = far.split();
                let (mut out, mut back) = (near_read.take(limit), far_read.take(limit));
                tokio::select! {
                    _ = tokio::io::copy(&mut out, &mut far_write) => {}
                    _ = tokio::io::copy(&mut back, &mut near_write) => {}
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_route_is_held_back_until_it_changes() {
    let fleet = Fleet::start().await;
    let machine = fleet.run("web", false).await;
    let client = fleet.client("worker-3");
    let mut route: Route = client.get(&path::route(&machine, 2_000)).await.expect("a route");
    assert_eq!((route.state, route.worker.clone()), (RouteState::Moved, Some(id("worker-1"))));
    let ask = |known: &Route, wait_ms| {
        let known = path::KnownRoute { state: known.state, epoch: known.epoch, worker: known.worker.clone() };
        path::route_if_changed(&machine, wait_ms, Some(&known))
    };
    // Nothing changes: the answer comes when the wait is over.
    let begun = Instant::now();
    let same: Route = client.get(&ask(&route, 300)).await.expect("a route");
    assert_eq!(same, route);
    assert!(begun.elapsed() >= Duration::from_millis(295), "{:?}", begun.elapsed());
    // It moves: each change is told at once, and the address is never behind.
    fleet.start_move(&machine, "m-1").await;
    let mut seen = Vec::new();
    while (route.state, route.worker.clone()) != (RouteState::Moved, Some(id("worker-2"))) {
        let begun = Instant::now();
        route = client.get(&ask(&route, 20_000)).await.expect("a route");
        assert!(begun.elapsed() < Duration::from_secs(15), "held back too long");
        seen.push((route.state, route.worker.clone(), route.address));
        assert!(seen.len() < 10, "{seen:?}");
    }
    assert!(seen.iter().all(|(.., address)| address.is_some()), "{seen:?}");
}

/// A relay that counts the bytes it carries to `to`.
fn counted(to: std::net::SocketAddr, count: Arc<AtomicU64>) -> std::net::SocketAddr {
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a port");
    listener.set_nonblocking(true).expect("set");
    let address = listener.local_addr().expect("an address");
    tokio::spawn(async move {
        let listener = tokio::net::TcpListener::from_std(listener).expect("a listener");
        while let Ok((mut near, _)) = listener.accept().await {
            let count = count.clone();
            tokio::spawn(async move {
                use tokio::io::{AsyncReadExt as _, AsyncWriteExt as _};
                let Ok(mut far) = tokio::net::TcpStream::connect(to).await else { return };
                let (mut near_read, mut near_write) = near.split();
                let (mut far_read, mut far_write) = far.split();
                let out = async {
                    let mut buffer = [0; 4096];
                    while let Ok(bytes @ 1..) = near_read.read(&mut buffer).await {
                        count.fetch_add(bytes as u64, Ordering::Relaxed);
                        if far_write.write_all(&buffer[..bytes]).await.is_err() {
                            return;
                        }
                    }
                };
                tokio::select! {
                    () = out => {}
                    _ = tokio::io::copy(&mut far_read, &mut near_write) => {}
                }
            });
        }
    });
    address
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_that_was_removed_keeps_nobody_busy() {
    let count = Arc::new(AtomicU64::new(0));
    let fleet = Fleet::start_behind(|_, address| counted(address, count.clone())).await;
    let machine = fleet.run("web", false).await;
    let migration = fleet.start_move(&machine, "m-1").await;
    fleet.wait_over(&migration).await;
    fleet.wait_running("worker-2", &machine).await;
    // Worker-1 goes on to say that it went to worker-2, which has forgotten it.
    fleet.client("worker-2").delete(&path::remove_machine(&machine, false, false)).await.expect("removed");
    retry_until("it is gone", || async {
        let machines: Listing<Machine> = fleet.client("worker-2").get(&path::machines(Scope::Local)).await.ok()?;
        machines.items.is_empty().then_some(())
    })
    .await;
    for worker in ["worker-1", "worker-2", "worker-3"] {
        let client = fleet.client(worker);
        let route: Route = client.get(&path::route(&machine, 0)).await.expect("a route");
        let known = path::KnownRoute { state: route.state, epoch: route.epoch, worker: route.worker.clone() };
        let (before, begun) = (count.load(Ordering::Relaxed), Instant::now());
        let same: Route = client.get(&path::route_if_changed(&machine, 1_500, Some(&known))).await.expect("a route");
        assert_eq!(same, route, "{worker}");
        assert!(begun.elapsed() >= Duration::from_millis(1_495), "{worker}: {:?}", begun.elapsed());
        // Some ten questions to each of two peers, and what they ask each other anyhow, once a second.
        let asked = count.load(Ordering::Relaxed) - before;
        assert!(asked < 64 << 10, "{worker} sent {asked} bytes to learn nothing");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_hung_plane_stops_neither_the_api_nor_other_machines() {
    let fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    fleet.world.hold(Hold { worker: "worker-1".to_owned(), call: None, name: "seal".to_owned(), done: false });
    fleet.start_move(&machine, "m-1").await;
    retry_until("it hangs", || async { fleet.world.is_held().then_some(()) }).await;
    let begun = Instant::now();
    let list: Listing<Machine> = fleet.client("worker-1").get(&path::machines(Scope::Fleet)).await.expect("a list");
    assert!(begun.elapsed() < Duration::from_secs(2), "{:?}", begun.elapsed());
    assert!(list.items.iter().any(|view| view.machine == machine));
    let view: Machine = fleet.client("worker-1").get(&path::machine(&machine)).await.expect("the machine");
    assert!(view.why.is_some(), "a wait has a reason: {view:?}");
    let other = fleet.run("web", false).await;
    fleet.assert_sound(&other, "worker-1", "beside a hung one");
    fleet.world.release();
    fleet.wait_running("worker-2", &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_runs_and_is_not_owned_is_killed_before_anything_else() {
    let mut fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    fleet.crash("worker-3").await;
    fleet.crash("worker-1").await;
    let stranger: MachineId = id("stranger");
    fleet.world.leave_behind("worker-3", &stranger);
    fleet.boot("worker-3").await;
    retry_until("the stranger is killed", || async { fleet.world.runners(&stranger).is_empty().then_some(()) }).await;
    // What this worker owns runs on through a restart of its agent.
    fleet.boot("worker-1").await;
    fleet.wait_running("worker-1", &machine).await;
    assert!(!fleet.world.calls("worker-1").contains(&"machine kill".to_owned()));
    // A machine that dies without its agent having told it to is started again.
    fleet.world.lose("worker-1", &machine);
    retry_until("it is started again", || async { (!fleet.world.runners(&machine).is_empty()).then_some(()) }).await;
    fleet.assert_sound(&machine, "worker-1", "after a loss");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_destroyed_destination_is_reclaimed_by_the_operators_word() {
    let mut fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    fleet.world.hold(Hold { worker: "worker-2".to_owned(), call: None, name: "verify".to_owned(), done: false });
    let migration = fleet.start_move(&machine, "m-1").await;
    retry_until("it hydrates", || async { fleet.world.is_held().then_some(()) }).await;
    let client = fleet.client("worker-1");
    retry_until("the source knows", || async {
        let view = client.get::<Machine>(&format!("{}?", path::machine(&machine))).await.ok()?;
        (view.worker.as_str() == "worker-2").then_some(())
    })
    .await;
    fleet.crash("worker-2").await;
    fleet.world.lose("worker-2", &machine);
    let reclaim = path::machine_action(&machine, "reclaim");
    let refused = client.post::<Reclaimed>(&reclaim, &json!({})).await.expect_err("without the word").into_body();
    assert_eq!(refused.code, decant_api::Code::NeedsForce);
    assert!(refused.cause.contains("lost"), "{refused:?}");
    let done: Reclaimed = client.post(&reclaim, &json!({ "force": true })).await.expect("with it");
    assert_eq!(done.given_up.as_str(), "worker-2");
    let view = fleet.wait_running("worker-1", &machine).await;
    assert_eq!(view.epoch.0, 3, "{migration}");
    assert_eq!(fleet.world.runners(&machine), ["worker-1"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_empties_a_worker() {
    let fleet = Fleet::start().await;
    let machines = [fleet.run("orders", true).await, fleet.run("web", false).await];
    let client = fleet.client("worker-3");
    let request = json!({ "workers": ["worker-1"], "reason": "new disk", "plan_only": true });
    let plan: Drain = client.post("/v1/drains", &request).await.expect("a plan");
    assert_eq!((plan.phase, plan.machines.len(), plan.blockers.len()), (DrainPhase::Planned, 2, 0), "{plan:?}");
    let worker: Worker = client.get(&path::worker(&id("worker-1"))).await.expect("a worker");
    assert_eq!(worker.state, WorkerState::Ready, "a plan touches nothing");
    let request = json!({ "drain": "d-1", "workers": ["worker-1"], "reason": "new disk" });
    for _ in 0..2 {
        // Repeating the order starts no second drain.
        let drain: Drain = client.post("/v1/drains", &request).await.expect("it is taken");
        assert_eq!(drain.drain.as_str(), "d-1");
    }
    let done = retry_until("it is drained", || async {
        let drain = client.get::<Drain>(&path::drain(&id("d-1"))).await.ok()?;
        (drain.phase == DrainPhase::Drained).then_some(drain)
    })
    .await;
    assert!(done.evacuated_ms <= done.drained_ms && done.drained_ms.is_some(), "{done:?}");
    for machine in &machines {
        assert_eq!(fleet.world.runners(machine).len(), 1);
        assert_ne!(fleet.world.runners(machine), ["worker-1"]);
    }
    assert_eq!(fleet.world.violations(), Vec::<String>::new());
    let worker: Worker = client.get(&path::worker(&id("worker-1"))).await.expect("a worker");
    assert_eq!(worker.state, WorkerState::Drained, "{worker:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn certificates_decide_who_may_do_what() {
    let fleet = Fleet::start().await;
    let machine = fleet.run("web", false).await;
    // A worker reads, and may not give root's orders.
    let peer = fleet.peer_client(fleet.directory(), "worker-2", "worker-1", "worker-1");
    peer.get::<Listing<Machine>>(&path::machines(Scope::Local)).await.expect("it reads");
    let stop = path::machine_action(&machine, "stop");
    let refused = peer.post::<Machine>(&stop, &Empty {}).await.expect_err("it may not").into_body();
    expect!["forbidden: worker-2 may not POST /v1/machines/web/stop"].assert_eq(&format!(
        "{}: {}",
        word(&refused),
        refused.cause
    ));
    // A certificate of the authority that names no peer.
    let stranger = fleet.peer_client(fleet.directory(), "worker-9", "worker-1", "worker-1");
    let refused = stranger.get::<Listing<Machine>>(&path::machines(Scope::Local)).await.expect_err("no").into_body();
    expect!["forbidden: the certificate is of this fleet's authority, but names no peer of this worker"]
        .assert_eq(&format!("{}: {}", word(&refused), refused.cause));
    // Another authority.
    let other = tempfile::tempdir().expect("a directory");
    decant_agent::ca::init(other.path(), jiff::Zoned::now().date()).expect("an authority");
    let unknown = fleet.peer_client(other.path(), "worker-2", "worker-1", "worker-1");
    unknown.get::<Listing<Machine>>(&path::machines(Scope::Local)).await.expect_err("an unknown authority");
    // The right authority, the wrong worker.
    let wrong = fleet.peer_client(fleet.directory(), "worker-3", "worker-1", "worker-2");
    let error = wrong.get::<Listing<Machine>>(&path::machines(Scope::Local)).await.expect_err("the wrong worker");
    assert!(matches!(error, ClientError::Unreachable { .. }), "{error:?}");
    // The socket is root's.
    use std::os::unix::fs::PermissionsExt as _;
    let socket = fleet.config("worker-1").socket();
    assert_eq!(std::fs::metadata(socket).expect("a socket").permissions().mode() & 0o777, 0o600);
}

fn word(body: &decant_api::ErrorBody) -> String {
    serde_json::to_value(body.code).expect("a code").as_str().expect("a word").to_owned()
}

#[tokio::test(flavor = "multi_thread")]
async fn refusals_have_name_cause_and_fix() {
    let fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    let client = fleet.client("worker-1");
    let far = fleet.client("worker-3");
    let cordon = path::cordon(&id("worker-3"));
    client.post::<Worker>(&cordon, &Cordon { reason: "new disk".to_owned() }).await.expect("cordoned from afar");
    let spec = |name: &str, volume: Option<&str>| json!({ "spec": { "id": name, "command": ["/bin/true"], "address_index": 0, "volume": volume } });
    let mut bodies = vec![
        client.get::<Machine>("/v1/machines/none").await.err(),
        client.get::<Machine>("/v1/machines/No!").await.err(),
        client.get::<Machine>("/v2/machines").await.err(),
        client.post::<Machine>("/v1/machines", &json!({ "spec": {} })).await.err(),
        client.post::<Machine>("/v1/machines", &spec("x", Some("none"))).await.err(),
        client.post::<Machine>("/v1/machines", &spec("x", Some("orders-data"))).await.err(),
        far.post::<Machine>("/v1/machines", &spec("x", None)).await.err(),
        far.post::<Machine>(&path::machine_action(&machine, "stop"), &Empty {}).await.err(),
        client.post::<Volume>("/v1/volumes", &json!({ "volume": "v", "size": 5 })).await.err(),
        client.post::<Volume>("/v1/volumes", &json!({ "volume": "orders-data", "size": 64 << 20 })).await.err(),
        client.delete(&path::volume(&id("orders-data"))).await.err(),
        client.post::<Migration>(&path::machine_action(&machine, "move"), &json!({ "to": "worker-1" })).await.err(),
        client.post::<Migration>(&path::machine_action(&machine, "move"), &json!({ "to": "worker-8" })).await.err(),
        client.post::<Migration>(&path::cancel_migration(&id("m-9")), &Empty {}).await.err(),
        client.post::<Reclaimed>(&path::machine_action(&machine, "reclaim"), &json!({ "force": true })).await.err(),
        client.post::<Drain>("/v1/drains", &json!({ "workers": [] })).await.err(),
        client.post::<Drain>("/v1/drains", &json!({ "workers": ["worker-1"], "to": "worker-1" })).await.err(),
        client.get::<Drain>(&path::drain(&id("d-9"))).await.err(),
    ];
    let texts: Vec<String> = bodies
        .drain(..)
        .map(|error| error.expect("each is refused").into_body())
        .map(|body| format!("{} | {} | {} | {}", word(&body), body.name, body.cause, body.fix))
        .collect();
    expect![[r#"
        not_found | machine not found | no machine none is known here | list the fleet's with `decant machine list`
        invalid_request | invalid request | Invalid URL: machine "No!" is not valid: use 1 to 63 characters of a-z, 0-9 and '-', not starting or ending with '-' | write the id as `list` shows it
        no_such_path | no such path | GET /v2/machines is not part of this API | use the same version of decant on both sides
        invalid_request | invalid request | the body is not understood: missing field `id` at line 1 column 10 | use the same version of decant on both sides
        not_found | volume not found | no volume none is known here | make it first with `decant volume create`, on this worker
        conflict | volume is in use | volume orders-data belongs to machine orders | make another volume
        cordoned | worker is cordoned | worker-3 takes no new machines | uncordon it, or run the machine on another worker
        elsewhere | machine is elsewhere | worker-1 owns orders | run the command on worker-1
        invalid_request | invalid request | a volume of 5 B (5 bytes) is not made | ask for a multiple of 4096 bytes, at least 16 MiB
        exists | volume exists | worker-1 has a volume orders-data | choose another name, or delete that one
        conflict | volume is in use | it belongs to machine orders | remove the machine; its volume goes with it
        conflict | nowhere to move | orders is on worker-1 already | name another worker
        unavailable | destination does not answer | worker-8 is not among the peers of worker-1: add it to its configuration | look at its agent, or name another worker; nothing was touched
        not_found | migration not found | no migration m-9 is known here | list them with `decant migration list`; only a machine's last one is kept
        conflict | nothing to reclaim | worker-1 has no sealed copy of orders: it is active here | `decant machine list` shows who has a copy
        invalid_request | invalid request | no worker is named | name at least one worker to drain
        invalid_request | invalid request | worker-1 cannot be drained to itself | name another destination
        not_found | drain not found | no drain d-9 is known here | list them with `decant drain list`"#]].assert_eq(&texts.join("\n"));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_second_agent_and_a_damaged_journal_are_refused() {
    let mut fleet = Fleet::start().await;
    let start = |config| async move {
        let deps = decant_agent::Deps {
            plane: std::sync::Arc::new(fake::plane("worker-1")),
            machines: std::sync::Arc::new(fake::machines("worker-1")),
        };
        decant_agent::Running::start(config, deps).await.err().map(|error| error.to_string()).unwrap_or_default()
    };
    let second = start(fleet.config("worker-1")).await;
    assert!(second.starts_with("another agent runs with "), "{second}");
    fleet.run("orders", true).await;
    fleet.crash("worker-1").await;
    let journal = fleet.config("worker-1").state_dir.join("journal.redb");
    let mut bytes = std::fs::read(&journal).expect("the journal");
    let middle = bytes.len() / 2;
    bytes[..middle].iter_mut().skip(4096).for_each(|byte| *byte ^= 0x5a);
    std::fs::write(&journal, bytes).expect("damaged");
    let damaged = start(fleet.config("worker-1")).await;
    assert!(damaged.contains("damaged") && damaged.contains("journal"), "{damaged}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stopped_machine_stays_stopped_and_can_be_removed() {
    let mut fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    let client = fleet.client("worker-1");
    let action = |action: &str| path::machine_action(&machine, action);
    client.post::<Machine>(&action("stop"), &Empty {}).await.expect("stop");
    let stopped = || async {
        let view = client.get::<Machine>(&path::machine(&machine)).await.ok()?;
        (view.state == MachineState::Stopped).then_some(())
    };
    retry_until("it is stopped", stopped).await;
    fleet.crash("worker-1").await;
    fleet.boot("worker-1").await;
    retry_until("it is still stopped", stopped).await;
    assert!(fleet.world.runners(&machine).is_empty());
    client.post::<Machine>(&action("start"), &Empty {}).await.expect("start");
    fleet.wait_running("worker-1", &machine).await;
    // Not by the way: its volume goes with it.
    let refused = client.delete(&path::machine(&machine)).await.expect_err("not asked to remove the volume");
    assert!(matches!(&refused, ClientError::Api(body) if body.code == decant_api::Code::NeedsForce), "{refused:?}");
    fleet.wait_running("worker-1", &machine).await;
    client.delete(&path::remove_machine(&machine, true, false)).await.expect("removed");
    retry_until("it is gone, and its volume", || async {
        let machines: Listing<Machine> = client.get(&path::machines(Scope::Local)).await.ok()?;
        let volumes: Listing<Volume> = client.get(&path::volumes(Scope::Local)).await.ok()?;
        (machines.items.is_empty() && volumes.items.is_empty()).then_some(())
    })
    .await;
    assert_eq!(fleet.world.violations(), Vec::<String>::new());
}
