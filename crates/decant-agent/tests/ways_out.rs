//! Every state has a way out: what an operator can order when a worker is gone for good, a machine is stuck or claimed by
//! somebody else; and what a plan says before anything is touched.

mod fake;

use decant_agent::client::ClientError;
use decant_api::{
    Code, Drain, DrainPhase, Empty, ErrorBody, Listing, Logs, Machine, MachineState, Migration, MigrationPhase,
    Reclaimed, Route, RouteState, Scope, Volume, path,
};
use decant_base::{MachineId, MigrationId};
use decant_dataplane::FailureCode;
use expect_test::expect;
use fake::{Fleet, Hold, id, retry_until};
use serde_json::json;

fn refusal<T: std::fmt::Debug>(answer: Result<T, ClientError>) -> ErrorBody {
    answer.expect_err("it is refused").into_body()
}

fn text(body: &ErrorBody) -> String {
    let code = serde_json::to_value(body.code).expect("a code");
    format!("{} | {} | {} | {}", code.as_str().expect("a word"), body.name, body.cause, body.fix)
}

/// The machine runs at worker-2, half of it is still at worker-1.
async fn half_moved(fleet: &Fleet) -> (MachineId, MigrationId) {
    fleet.world.stall(true);
    let machine = fleet.run("orders", true).await;
    let migration = fleet.start_move(&machine, "m-1").await;
    wait_phase(fleet, &migration, MigrationPhase::Hydrating).await;
    fleet.wait_running("worker-2", &machine).await;
    (machine, migration)
}

async fn wait_phase(fleet: &Fleet, migration: &MigrationId, phase: MigrationPhase) -> Migration {
    let client = fleet.client("worker-2");
    retry_until(&format!("{migration} is {phase:?}"), || async {
        let seen = client.get::<Migration>(&path::migration(migration)).await.ok()?;
        (seen.phase == phase).then_some(seen)
    })
    .await
}

#[tokio::test(flavor = "multi_thread")]
async fn a_source_that_burns_after_the_last_block_is_forgotten_by_the_operators_word() {
    let mut fleet = Fleet::start().await;
    let (machine, migration) = half_moved(&fleet).await;
    let client = fleet.client("worker-2");
    let forget = path::machine_action(&machine, "forget-origin");
    let early = refusal(client.post::<Machine>(&forget, &json!({ "force": true })).await);
    fleet.crash("worker-1").await;
    fleet.world.stall(false);
    wait_phase(&fleet, &migration, MigrationPhase::Verified).await;
    let denied = [
        early,
        refusal(client.post::<Migration>(&path::machine_action(&machine, "move"), &json!({ "to": "worker-3" })).await),
        refusal(client.delete(&path::remove_machine(&machine, true, false)).await),
        refusal(client.post::<Machine>(&forget, &json!({})).await),
        refusal(fleet.client("worker-3").post::<Machine>(&forget, &json!({ "force": true })).await),
    ];
    expect![[r#"
        conflict | machine is busy | blocks of this machine's volume are still missing here: without its origin it is not whole; `decant machine rm orders --with-volume --force` gives it up | wait until that is over, or cancel it
        conflict | machine is busy | this machine is not whole here yet; m-1 from worker-1 is verified: wait until it is over, or, if worker-1 is destroyed, order `decant machine forget-origin orders --force` | wait until that is over, or cancel it
        conflict | machine is busy | it is still being moved here; m-1 from worker-1 is verified: wait until it is over, or, if worker-1 is destroyed, order `decant machine forget-origin orders --force` | wait until that is over, or cancel it
        needs_force | this gives up the origin | worker-1 is not told any more that nothing of it is needed; its sealed copy of orders is given up, and nothing that is here is lost: every block was compared | if worker-1 is destroyed, repeat with --force
        elsewhere | machine is elsewhere | worker-2 owns orders | run the command on worker-2
    "#]]
    .assert_eq(&(denied.iter().map(text).collect::<Vec<_>>().join("\n") + "\n"));
    let why = client.get::<Machine>(&path::machine(&machine)).await.expect("it is here").why.expect("it waits");
    assert!(why.clears.contains("`decant machine forget-origin orders --force`"), "{why:?}");
    client.post::<Machine>(&forget, &json!({ "force": true })).await.expect("the operator says so");
    let over: Migration = client.get(&path::migration(&migration)).await.expect("it is known");
    assert_eq!(over.phase, MigrationPhase::Cleaned);
    // It had not burnt: it hears that it is not needed, and lets go.
    fleet.boot("worker-1").await;
    retry_until("the source lets go", || async {
        let list: Listing<Volume> = fleet.client("worker-1").get(&path::volumes(Scope::Local)).await.ok()?;
        list.items.iter().any(|volume| volume.sealed.as_ref().is_some_and(|s| s.expires_at_ms.is_some())).then_some(())
    })
    .await;
    fleet.assert_sound(&machine, "worker-2", "after all");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_whose_source_burnt_with_blocks_missing_is_removed_by_force() {
    let mut fleet = Fleet::start().await;
    let (machine, _) = half_moved(&fleet).await;
    fleet.crash("worker-1").await;
    let client = fleet.client("worker-2");
    let refused = refusal(client.delete(&path::remove_machine(&machine, true, false)).await);
    expect!["conflict | machine is busy | it is still being moved here; m-1 from worker-1 is hydrating: wait until it is over, or, if worker-1 is destroyed, give it up with `decant machine rm orders --with-volume --force` | wait until that is over, or cancel it"].assert_eq(&text(&refused));
    let refused = refusal(client.delete(&path::remove_machine(&machine, false, true)).await);
    assert_eq!(refused.code, Code::NeedsForce, "its volume is not thrown away by the way: {refused:?}");
    client.delete(&path::remove_machine(&machine, true, true)).await.expect("the operator says so");
    retry_until("nothing is left", || async {
        let machines: Listing<Machine> = client.get(&path::machines(Scope::Local)).await.ok()?;
        let volumes: Listing<Volume> = client.get(&path::volumes(Scope::Local)).await.ok()?;
        (machines.items.is_empty() && volumes.items.is_empty()).then_some(())
    })
    .await;
    // It had not burnt: what it has is all that is left, and is there to be reclaimed.
    fleet.boot("worker-1").await;
    let client = fleet.client("worker-1");
    let reclaim = path::machine_action(&machine, "reclaim");
    client.post::<Reclaimed>(&reclaim, &json!({ "force": true })).await.expect("its copy is kept");
    fleet.wait_running("worker-1", &machine).await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_claim_of_somebody_else_is_cleared_by_the_operators_word() {
    let fleet = Fleet::start().await;
    let (machine, _) = half_moved(&fleet).await;
    let client = fleet.client("worker-2");
    let reclaim = path::machine_action(&machine, "reclaim");
    let source = fleet.client("worker-1");
    source.post::<Reclaimed>(&reclaim, &json!({ "force": true })).await.expect("worker-2 is destroyed, they say");
    let local = || async {
        let list = client.get::<Listing<Machine>>(&path::machines(Scope::Local)).await.ok()?;
        list.items.into_iter().next()
    };
    let why = retry_until("worker-2 hears of the claim", || async {
        local().await?.why.filter(|why| why.reason.contains("higher-epoch"))
    })
    .await;
    assert!(why.clears.contains("`decant machine clear-veto orders --force`"), "{why:?}");
    let clear = path::machine_action(&machine, "clear-veto");
    let refused = refusal(client.post::<Machine>(&clear, &json!({})).await);
    expect!["needs_force | somebody else may have it | worker-1 claims orders at epoch 3, above the one here (2): if it runs there, it runs twice from then on, and what one of them writes is lost | make sure that worker-1 does not have it, then repeat with --force"].assert_eq(&text(&refused));
    let cleared: Machine = client.post(&clear, &json!({ "force": true })).await.expect("the operator says so");
    assert_eq!((cleared.worker.as_str(), cleared.epoch.0), ("worker-2", 4), "{cleared:?}");
    let refused = refusal(client.post::<Machine>(&clear, &json!({ "force": true })).await);
    assert_eq!(
        (refused.code, refused.cause.as_str()),
        (Code::Conflict, "nobody claims this machine at a higher epoch")
    );
}

/// Worker-1 was away while the machine went on from worker-2 to worker-3.
#[tokio::test(flavor = "multi_thread")]
async fn a_copy_is_not_reclaimed_while_somebody_else_has_the_machine() {
    let mut fleet = Fleet::start().await;
    let (machine, migration) = half_moved(&fleet).await;
    fleet.crash("worker-1").await;
    fleet.world.stall(false);
    wait_phase(&fleet, &migration, MigrationPhase::Verified).await;
    let client = fleet.client("worker-2");
    let forget = path::machine_action(&machine, "forget-origin");
    client.post::<Machine>(&forget, &json!({ "force": true })).await.expect("the operator says so");
    let onward = json!({ "to": "worker-3", "migration": "m-2" });
    client.post::<Migration>(&path::machine_action(&machine, "move"), &onward).await.expect("it is taken");
    fleet.wait_running("worker-3", &machine).await;
    wait_phase(&fleet, &id("m-2"), MigrationPhase::Cleaned).await;
    fleet.crash("worker-2").await;
    fleet.boot("worker-1").await;
    let reclaim = path::machine_action(&machine, "reclaim");
    let refused = refusal(fleet.client("worker-1").post::<Reclaimed>(&reclaim, &json!({ "force": true })).await);
    expect!["conflict | machine is elsewhere | worker-3 has orders at epoch 3: booted here as well, it would run twice | leave it where it is; to be rid of it there, run `decant machine rm orders` on worker-3"].assert_eq(&text(&refused));
    fleet.assert_sound(&machine, "worker-3", "after the refusal");
}

/// What was heard of a worker that is destroyed neither forbids the name to others nor hides the machine that has it then.
#[tokio::test(flavor = "multi_thread")]
async fn a_machine_of_a_destroyed_worker_is_run_anew_elsewhere() {
    let mut fleet = Fleet::start().await;
    // Its second life has a higher epoch than one that nobody remembers.
    let machine = fleet.run("web", false).await;
    fleet.client("worker-1").delete(&path::remove_machine(&machine, false, false)).await.expect("it is removed");
    retry_until("it is gone", || async {
        let machines: Listing<Machine> = fleet.client("worker-1").get(&path::machines(Scope::Local)).await.ok()?;
        machines.items.is_empty().then_some(())
    })
    .await;
    fleet.run("web", false).await;
    for worker in ["worker-2", "worker-3"] {
        let route: Route = fleet.client(worker).get(&path::route(&machine, 2_000)).await.expect("a route");
        assert_eq!((route.epoch.0, route.worker), (2, Some(id("worker-1"))), "it is remembered");
    }
    fleet.crash("worker-1").await;
    // Its agent is away; the machine need not be.
    let route: Route = fleet.client("worker-3").get(&path::route(&machine, 0)).await.expect("a route");
    assert_eq!((route.state, route.worker), (RouteState::Moved, Some(id("worker-1"))));
    let spec = json!({ "id": "web", "command": ["/bin/true"], "address_index": 0 });
    fleet.client("worker-2").post::<Machine>("/v1/machines", &json!({ "spec": spec })).await.expect("the name is free");
    retry_until("the new one is found", || async {
        let route: Route = fleet.client("worker-3").get(&path::route(&machine, 0)).await.ok()?;
        (route.worker == Some(id("worker-2"))).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_stuck_goes_on_when_it_is_retried() {
    let fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    let client = fleet.client("worker-1");
    let retry = path::machine_action(&machine, "retry");
    let elsewhere = refusal(fleet.client("worker-3").post::<Machine>(&retry, &Empty {}).await);
    assert_eq!(elsewhere.code, Code::Elsewhere, "{elsewhere:?}");
    fleet.world.fail(Some(("machine stop", FailureCode::Stuck)));
    client.post::<Machine>(&path::machine_action(&machine, "stop"), &Empty {}).await.expect("it is told to stop");
    let why = retry_until("it is stuck", || async {
        client.get::<Machine>(&path::machine(&machine)).await.ok()?.why.filter(|why| why.reason.starts_with("stuck"))
    })
    .await;
    expect![
        "stuck on machine-stop: it does not work; somebody removes the cause and orders `decant machine retry orders`"
    ]
    .assert_eq(&format!("{}; {}", why.reason, why.clears));
    fleet.world.fail(None);
    client.post::<Machine>(&retry, &Empty {}).await.expect("it is tried again");
    retry_until("it is stopped", || async {
        let seen = client.get::<Machine>(&path::machine(&machine)).await.ok()?;
        (seen.state == MachineState::Stopped).then_some(())
    })
    .await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_prepared_for_a_source_that_is_gone_is_given_up() {
    let mut fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    fleet.world.hold(Hold { worker: "worker-1".to_owned(), call: None, name: "machine stop".to_owned(), done: false });
    let migration = fleet.start_move(&machine, "m-1").await;
    retry_until("the source stops the machine", || async { fleet.world.is_held().then_some(()) }).await;
    fleet.crash("worker-1").await;
    fleet.world.release();
    let client = fleet.client("worker-2");
    let cancelled: Migration =
        client.post(&path::cancel_migration(&migration), &Empty {}).await.expect("it refuses what it was prepared for");
    assert_eq!(cancelled.role, decant_api::Role::Destination);
    retry_until("nothing is left", || async {
        let volumes: Listing<Volume> = client.get(&path::volumes(Scope::Local)).await.ok()?;
        volumes.items.is_empty().then_some(())
    })
    .await;
    // It was not gone: its machine is its own again, above what it had offered.
    fleet.boot("worker-1").await;
    let view = retry_until("it runs at its source", || async {
        let view = fleet.client("worker-1").get::<Machine>(&path::machine(&machine)).await.ok()?;
        (view.state == MachineState::Running && view.epoch.0 == 3).then_some(view)
    })
    .await;
    fleet.assert_sound(&machine, view.worker.as_str(), "after the cancel");
}

#[tokio::test(flavor = "multi_thread")]
async fn another_program_at_the_destination_is_refused_before_anything_stops() {
    let fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    fleet.world.upgrade("worker-2", "02");
    let stops = |fleet: &Fleet| fleet.world.calls("worker-1").iter().filter(|call| *call == "machine stop").count();
    let before = stops(&fleet);
    let migration = fleet.start_move(&machine, "m-1").await;
    let over = fleet.wait_over(&migration).await;
    assert_eq!(over.phase, MigrationPhase::Failed, "{over:?}");
    let why = over.why.expect("a reason");
    assert_eq!(why.reason, "prepare: its program /bin/true is another one than where it runs");
    assert_eq!(stops(&fleet), before, "it was not touched");
    fleet.assert_sound(&machine, "worker-1", "after the refusal");
    let request = json!({ "to": "worker-2", "migration": "m-2", "any_program": true });
    let client = fleet.client("worker-1");
    client.post::<Migration>(&path::machine_action(&machine, "move"), &request).await.expect("it is taken");
    assert_eq!(fleet.wait_over(&id("m-2")).await.phase, MigrationPhase::Cleaned);
    fleet.assert_sound(&machine, "worker-2", "with any program");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_plan_says_how_long_it_takes_and_on_what_that_stands() {
    let fleet = Fleet::start().await;
    let client = fleet.client("worker-1");
    let other = fleet.run("other", true).await;
    let plan_of = |worker: &'static str| {
        let client = client.clone();
        async move {
            let request = json!({ "workers": [worker], "plan_only": true });
            client.post::<Drain>("/v1/drains", &request).await.expect("a plan")
        }
    };
    let plan = plan_of("worker-1").await;
    let eta = plan.eta.expect("a range");
    assert!(eta.assumed && eta.low_ms < eta.high_ms, "{plan:?}");
    let planned = plan.machines[0].planned.as_ref().expect("a place");
    assert_eq!(planned.eta, Some(eta), "one machine is all");
    // 1 MiB/s was measured at worker-2, for one second at least: 3 MiB take 1.5 to 6 s by that.
    let (_, migration) = half_moved(&fleet).await;
    retry_until("a rate is measured", || async {
        let seen = fleet.client("worker-2").get::<Migration>(&path::migration(&migration)).await.ok()?;
        seen.progress?.eta.filter(|eta| eta.low_ms < eta.high_ms && !eta.assumed)
    })
    .await;
    let eta = plan_of("worker-1").await.eta.expect("a range");
    assert!(!eta.assumed && eta.low_ms >= 1_500 && eta.high_ms <= 6_000 && eta.low_ms < eta.high_ms, "{eta:?}");
    fleet.assert_sound(&other, "worker-1", "a plan touches nothing");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_drain_is_changed_while_it_runs_and_resumed() {
    let fleet = Fleet::start().await;
    fleet.world.stall(true);
    for name in ["a", "b", "c"] {
        fleet.run(name, true).await;
    }
    let client = fleet.client("worker-3");
    let request = json!({ "drain": "d-1", "workers": ["worker-1"], "max": 1 });
    let drain: Drain = client.post("/v1/drains", &request).await.expect("it is taken");
    assert_eq!(drain.max, 1);
    let moving = |count: usize| {
        let client = &client;
        retry_until("as many move as may", move || async move {
            let drain = client.get::<Drain>(&path::drain(&id("d-1"))).await.ok()?;
            let moving = drain.machines.iter().filter(|m| m.phase == Some(MigrationPhase::Hydrating)).count();
            (moving == count).then_some(())
        })
    };
    moving(1).await;
    let settings = path::drain_settings(&id("d-1"));
    let refused = refusal(client.post::<Drain>(&settings, &json!({ "max": 0 })).await);
    assert_eq!(refused.code, Code::InvalidRequest);
    let drain: Drain = client.post(&settings, &json!({ "max": 3 })).await.expect("it is changed");
    assert_eq!(drain.max, 3);
    moving(3).await;
    client.post::<Drain>(&path::resume_drain(&id("d-1")), &Empty {}).await.expect("it goes on");
    fleet.world.stall(false);
    retry_until("it is drained", || async {
        let drain = client.get::<Drain>(&path::drain(&id("d-1"))).await.ok()?;
        (drain.phase == DrainPhase::Drained).then_some(())
    })
    .await;
    let over = refusal(client.post::<Drain>(&path::resume_drain(&id("d-1")), &Empty {}).await);
    expect!["conflict | drain is over | d-1 is drained | order a new one with `decant drain WORKER`"]
        .assert_eq(&text(&over));
}

#[tokio::test(flavor = "multi_thread")]
async fn a_blocked_drain_goes_on_when_it_is_resumed() {
    let fleet = Fleet::start().await;
    let machine = fleet.run("orders", true).await;
    fleet.world.upgrade("worker-2", "02");
    let client = fleet.client("worker-1");
    // Worker-3 has nothing and is drained soon; that is no obstacle.
    let request = json!({ "drain": "d-1", "workers": ["worker-1", "worker-3"] });
    client.post::<Drain>("/v1/drains", &request).await.expect("it is taken");
    let drain = retry_until("nothing is tried any more", || async {
        let drain = client.get::<Drain>(&path::drain(&id("d-1"))).await.ok()?;
        drain.blockers.iter().any(|blocker| blocker.name == "failed").then_some(drain)
    })
    .await;
    let fix = &drain.blockers.iter().find(|blocker| blocker.name == "failed").expect("it is there").fix;
    assert!(fix.contains("`decant drain resume d-1`"), "{drain:?}");
    fleet.world.upgrade("worker-2", "01");
    client.post::<Drain>(&path::resume_drain(&id("d-1")), &Empty {}).await.expect("it goes on");
    retry_until("it is drained", || async {
        let drain = client.get::<Drain>(&path::drain(&id("d-1"))).await.ok()?;
        (drain.phase == DrainPhase::Drained).then_some(())
    })
    .await;
    assert_eq!(fleet.world.runners(&machine), ["worker-2"]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_machine_is_placed_where_its_labels_are_and_its_log_is_read_from_anywhere() {
    let fleet = Fleet::start().await;
    let client = fleet.client("worker-1");
    let spec = json!({ "id": "picky", "command": ["/bin/true"], "address_index": 0, "needs": { "disk": "nvme" } });
    client.post::<Machine>("/v1/machines", &json!({ "spec": spec })).await.expect("it is taken");
    let request = json!({ "workers": ["worker-1"], "plan_only": true });
    let plan: Drain = client.post("/v1/drains", &request).await.expect("a plan");
    assert_eq!(plan.blockers[0].cause, "worker-2 has no label disk=nvme; worker-3 has no label disk=nvme", "{plan:?}");
    let machine = id("picky");
    for worker in ["worker-1", "worker-2"] {
        let logs: Logs = fleet.client(worker).get(&path::logs(&machine, 5)).await.expect("its log");
        assert_eq!(logs.text, "log of picky\n");
    }
    let unknown = refusal(client.get::<Logs>(&path::logs(&id("nobody"), 5)).await);
    assert_eq!(unknown.code, Code::NotFound);
}
