//! A machine on one worker of a lab, then on another: reached across workers, and through a proxy without a lost request.
//! Needs root.

mod fixture;

use std::io::{self, Read, Write};
use std::net::{Shutdown, SocketAddr, TcpStream};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, mpsc};
use std::time::{Duration, Instant};

use decant_base::{Epoch, MachineId};
use decant_machine::{HealthCheck, MachineSpec, Prepare, ProcessDriver, State};
use decant_network::proxy::{Config, Proxy, Service};
use decant_network::{
    Lab, MachineAddress, MachineLink, ResolveError, Resolver, Route, RouteState, ensure_machine_link, ensure_route,
    ensure_worker, worker_prefix,
};
use tokio::sync::watch;

const PATIENCE: Duration = Duration::from_secs(20);
const PORT: u16 = 80;

struct Worker {
    index: u32,
    directory: PathBuf,
    driver: ProcessDriver,
}

impl Worker {
    fn new(lab: &Lab, index: u32) -> Self {
        let directory = lab.directory().join(format!("worker-{index}"));
        lab.enter(index, || {
            ensure_worker(worker_prefix(1, index)).map_err(io::Error::other)?;
            for other in (1..=3).filter(|other| *other != index) {
                ensure_route(worker_prefix(1, other), lab.address(other)).map_err(io::Error::other)?;
            }
            Ok(())
        })
        .expect("routes");
        let driver = fixture::driver(&format!("worker-{index}"), &directory);
        Self { index, directory, driver }
    }

    fn address(&self, spec: &MachineSpec) -> MachineAddress {
        MachineAddress { network: 1, worker: self.index, machine: spec.address_index }
    }

    fn prepare(&self, lab: &Lab, spec: &MachineSpec, epoch: u64) {
        let link = MachineLink::new(&self.directory.join("run"), &spec.id, self.address(spec));
        lab.enter(self.index, || ensure_machine_link(&link).map_err(io::Error::other)).expect("a link");
        let request = Prepare { spec, netns: &link.netns, epoch: Epoch(epoch), program_digest: None };
        self.driver.prepare(&request).expect("prepared");
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        fixture::end_machines(&self.driver);
    }
}

/// What the workers' agents would answer.
#[derive(Clone)]
struct Agents(watch::Sender<Route>);

impl Resolver for Agents {
    async fn route(&self, _: &MachineId, known: Option<&Route>, wait: Duration) -> Result<Route, ResolveError> {
        let mut truth = self.0.subscribe();
        if let Some(known) = known {
            let _ = tokio::time::timeout(wait, truth.wait_for(|truth| truth != known)).await;
        }
        let now = truth.borrow().clone();
        Ok(now)
    }
}

fn server(name: &str) -> MachineSpec {
    fixture::with(fixture::spec("orders", &["/opt/server", "serve", "80", name]), |spec| {
        spec["binds"] = serde_json::json!([{"source": fixture::HELPER, "target": "/opt/server"}]);
        spec["address_index"] = 7.into();
    })
}

fn ask(address: SocketAddr, request: &str) -> io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.write_all(request.as_bytes())?;
    stream.shutdown(Shutdown::Write)?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    Ok(answer)
}

#[test]
fn every_request_is_answered_before_during_and_after_a_move() {
    if !fixture::is_root("every_request_is_answered_before_during_and_after_a_move") {
        return;
    }
    let lab = Lab::create(&format!("test-move-{}", std::process::id()), 3).expect("a lab");
    let (source, destination) = (Worker::new(&lab, 1), Worker::new(&lab, 2));
    let _third = Worker::new(&lab, 3);
    // One name for both: the answers must not tell where they come from, only that they come.
    let spec = server("done:");
    source.prepare(&lab, &spec, 1);
    source.driver.start(&spec.id, None).expect("started");
    let health = HealthCheck { port: PORT, http_path: None };
    let route = |state, worker: &Worker, epoch| Route {
        machine: spec.id.clone(),
        state,
        worker: None,
        address: Some(worker.address(&spec).address()),
        epoch: Epoch(epoch),
    };
    // From its own worker, and from another one over the bridge.
    lab.enter(1, || wait_healthy(&source, &spec, &health)).expect("healthy");
    lab.enter(3, || {
        assert_eq!(ask((source.address(&spec).address(), PORT).into(), "direct")?, "done:direct");
        Ok(())
    })
    .expect("reached from another worker");

    let agents = Agents(watch::Sender::new(route(RouteState::Here, &source, 1)));
    let (proxy_address, proxy) = start_proxy(&lab, &agents, &spec);
    let stop = Arc::new(AtomicBool::new(false));
    let (counts, counted) = mpsc::channel();
    let client = {
        let (stop, lab_netns) = (Arc::clone(&stop), lab.netns(3));
        std::thread::spawn(move || {
            let netns = decant_network::NetNs::open(&lab_netns).expect("a namespace");
            netns.run(|| Ok(client(proxy_address, &stop, &counts))).expect("a client")
        })
    };
    while counted.recv_timeout(PATIENCE).expect("answers before") < 50 {}

    // The move, as the agents order it: everything slow first.
    destination.prepare(&lab, &spec, 2);
    agents.0.send_replace(route(RouteState::Moving, &destination, 1));
    let began = Instant::now();
    source.driver.stop(&spec.id, PATIENCE).expect("stopped");
    let stopped = began.elapsed();
    destination.driver.start(&spec.id, None).expect("started");
    let started = began.elapsed();
    agents.0.send_replace(route(RouteState::Moved, &destination, 2));
    let after = counted.recv_timeout(PATIENCE).expect("an answer") + 50;
    while counted.recv_timeout(PATIENCE).expect("answers after") < after {}
    stop.store(true, Ordering::Relaxed);
    let (answered, failed, gap) = client.join().expect("the client");
    println!(
        "stopped after {stopped:?}, executed after {started:?}, longest gap {gap:?}; {answered} answered, {failed} cut"
    );
    // A request that the source had taken when it was stopped is cut and asked again; every other one is answered.
    assert!(failed <= 1, "{failed} of {answered}");
    assert!(gap < Duration::from_millis(1000), "{gap:?}");
    let status = destination.driver.status(&spec.id).expect("a status").expect("it is here");
    assert_eq!((status.state, status.epoch), (State::Running, Epoch(2)));
    drop(proxy);
    drop((source, destination));
    lab.destroy().expect("destroyed");
}

fn wait_healthy(worker: &Worker, spec: &MachineSpec, check: &HealthCheck) -> io::Result<()> {
    worker.driver.wait_healthy(&spec.id, check, worker.address(spec).address(), PATIENCE).map_err(io::Error::other)
}

/// A proxy on worker 3; it ends when the sender is dropped.
fn start_proxy(lab: &Lab, agents: &Agents, spec: &MachineSpec) -> (SocketAddr, tokio::sync::oneshot::Sender<()>) {
    let (end, ended) = tokio::sync::oneshot::channel::<()>();
    let (tell, told) = mpsc::channel();
    let (netns, agents, machine) = (lab.netns(3), agents.clone(), spec.id.clone());
    let listen = SocketAddr::from((lab.address(3), 0));
    std::thread::spawn(move || {
        let netns = decant_network::NetNs::open(&netns).expect("a namespace");
        netns.run(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            runtime.block_on(async {
                let proxy = Proxy::bind(Config {
                    services: vec![Service { listen, machine, port: PORT }],
                    max_parked: 100,
                    park_timeout: PATIENCE,
                    max_connections: 100,
                    drain_timeout: Duration::from_millis(100),
                })
                .await
                .expect("a proxy");
                tell.send(proxy.addresses()?[0]).expect("the test waits");
                proxy.serve(agents, async { drop(ended.await) }).await;
                Ok(())
            })
        })
    });
    (told.recv_timeout(PATIENCE).expect("a proxy"), end)
}

/// Asks one thing after another; how many were answered, how many were cut, and the longest time between two answers.
fn client(address: SocketAddr, stop: &AtomicBool, counts: &mpsc::Sender<u64>) -> (u64, u64, Duration) {
    let (mut answered, mut failed, mut gap, mut last) = (0, 0, Duration::ZERO, Instant::now());
    while !stop.load(Ordering::Relaxed) {
        match ask(address, &answered.to_string()) {
            Ok(answer) if answer == format!("done:{answered}") => {
                answered += 1;
                gap = gap.max(last.elapsed());
                last = Instant::now();
                let _ = counts.send(answered);
            }
            Ok(_) | Err(_) => failed += 1,
        }
    }
    (answered, failed, gap)
}
