use std::io;
use std::net::{Ipv4Addr, Ipv6Addr};
use std::sync::atomic::{AtomicUsize, Ordering};

use decant_base::Epoch;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::{oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::{Instant, timeout};

use super::*;
use crate::route::{ResolveError, Route, RouteState};

/// Tests have one of the loopback addresses per worker, as IPv6 writes them.
fn worker(n: u8) -> Ipv6Addr {
    Ipv4Addr::new(127, 0, 7, n).to_ipv6_mapped()
}

fn machine() -> MachineId {
    MachineId::new("orders").expect("an id")
}

fn route(state: RouteState, address: Option<Ipv6Addr>, epoch: u64) -> Route {
    Route { machine: machine(), state, worker: None, address, epoch: Epoch(epoch) }
}

/// Answers as a worker's agent does: at once when asked without `known`, else when the answer has changed.
#[derive(Clone)]
struct Agent {
    /// What it knows now.
    truth: watch::Sender<Route>,
    /// What it says before it was asked again without `known`, as an agent whose peers were slow.
    stale: Option<Route>,
    asked_again: std::sync::Arc<AtomicUsize>,
}

impl Agent {
    fn new(route: Route) -> Self {
        Self { truth: watch::Sender::new(route), stale: None, asked_again: Default::default() }
    }

    fn say(&self, route: Route) {
        self.truth.send_replace(route);
    }
}

impl Resolver for Agent {
    async fn route(&self, _: &MachineId, known: Option<&Route>, wait: Duration) -> Result<Route, ResolveError> {
        if let Some(stale) = &self.stale {
            match known {
                None if self.asked_again.fetch_add(1, Ordering::Relaxed) == 0 => return Ok(stale.clone()),
                Some(known) if known == stale => {
                    let _ = timeout(wait, std::future::pending::<()>()).await;
                }
                _ => {}
            }
        }
        let mut truth = self.truth.subscribe();
        if let Some(known) = known {
            let _ = timeout(wait, truth.wait_for(|truth| truth != known)).await;
        }
        let now = truth.borrow().clone();
        Ok(now)
    }
}

/// A program that answers each connection with its name and what it was sent.
struct Program {
    accepting: JoinHandle<()>,
}

impl Program {
    async fn start(address: Ipv6Addr, port: u16, name: &'static str) -> (Self, u16) {
        let listener = loop {
            match TcpListener::bind((address, port)).await {
                Ok(listener) => break listener,
                Err(error) => assert_eq!(error.kind(), io::ErrorKind::AddrInUse, "{error}"),
            }
            tokio::task::yield_now().await;
        };
        let port = listener.local_addr().expect("an address").port();
        let accepting = tokio::spawn(async move {
            let mut open = tokio::task::JoinSet::new();
            while let Ok((mut stream, _)) = listener.accept().await {
                open.spawn(async move {
                    let mut request = Vec::new();
                    if stream.read_to_end(&mut request).await.is_ok() {
                        let _ = stream.write_all(name.as_bytes()).await;
                        let _ = stream.write_all(&request).await;
                    }
                });
            }
        });
        (Self { accepting }, port)
    }

    async fn kill(self) {
        self.accepting.abort();
        let _ = self.accepting.await;
    }
}

struct Running {
    address: SocketAddr,
    metrics: Metrics,
    end: oneshot::Sender<()>,
    task: JoinHandle<()>,
}

async fn start(agent: &Agent, port: u16, change: impl FnOnce(&mut Config)) -> Running {
    let listen = SocketAddr::from((Ipv4Addr::LOCALHOST, 0));
    let mut config = Config {
        services: vec![Service { listen, machine: machine(), port }],
        max_parked: 100,
        park_timeout: Duration::from_secs(20),
        max_connections: 1000,
        drain_timeout: Duration::from_secs(20),
    };
    change(&mut config);
    let proxy = Proxy::bind(config).await.expect("a proxy");
    let (address, metrics) = (proxy.addresses().expect("addresses")[0], proxy.metrics());
    let (end, ended) = oneshot::channel::<()>();
    let agent = agent.clone();
    let task = tokio::spawn(proxy.serve(agent, async { drop(ended.await) }));
    Running { address, metrics, end, task }
}

impl Running {
    async fn ask(address: SocketAddr, request: String) -> io::Result<String> {
        let mut stream = TcpStream::connect(address).await?;
        stream.write_all(request.as_bytes()).await?;
        stream.shutdown().await?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await?;
        Ok(answer)
    }

    async fn until(&self, what: impl Fn(Snapshot) -> bool) {
        let began = Instant::now();
        while !what(self.metrics.snapshot()) {
            assert!(began.elapsed() < Duration::from_secs(20), "{:?}", self.metrics.snapshot());
            tokio::task::yield_now().await;
        }
    }
}

#[tokio::test]
async fn requests_before_during_and_after_a_move_are_all_answered() {
    let (source, port) = Program::start(worker(1), 0, "one:").await;
    let agent = Agent::new(route(RouteState::Here, Some(worker(1)), 1));
    let proxy = start(&agent, port, |_| {}).await;
    assert_eq!(Running::ask(proxy.address, "a".to_owned()).await.expect("before"), "one:a");

    agent.say(route(RouteState::Moving, Some(worker(2)), 1));
    source.kill().await;
    let during: Vec<_> = (0..50).map(|n| tokio::spawn(Running::ask(proxy.address, n.to_string()))).collect();
    proxy.until(|now| now.parked == 50).await;
    let (_destination, _) = Program::start(worker(2), port, "two:").await;
    let booted = Instant::now();
    for (n, answer) in during.into_iter().enumerate() {
        assert_eq!(answer.await.expect("a task").expect("during"), format!("two:{n}"));
    }
    let gap = booted.elapsed();
    println!("50 parked connections were answered {gap:?} after the destination listened");
    assert!(gap < Duration::from_millis(200), "{gap:?}");
    // The grant's news comes later than the first connection; it changes nothing for those who are there.
    agent.say(route(RouteState::Moved, Some(worker(2)), 2));
    assert_eq!(Running::ask(proxy.address, "z".to_owned()).await.expect("after"), "two:z");
    let counts = proxy.metrics.snapshot();
    assert_eq!((counts.accepted, counts.parked_total, counts.reset_moved), (52, 50, 0), "{counts:?}");
}

#[tokio::test]
async fn a_stale_route_is_corrected_by_asking_again() {
    let (_destination, port) = Program::start(worker(3), 0, "three:").await;
    let mut agent = Agent::new(route(RouteState::Moved, Some(worker(3)), 5));
    agent.stale = Some(route(RouteState::Here, Some(worker(4)), 4));
    let proxy = start(&agent, port, |_| {}).await;
    let began = Instant::now();
    assert_eq!(Running::ask(proxy.address, "a".to_owned()).await.expect("an answer"), "three:a");
    assert!(began.elapsed() < Duration::from_secs(2), "{:?}", began.elapsed());
}

#[tokio::test]
async fn a_connection_to_where_the_machine_no_longer_is_is_reset() {
    // The source answers nothing and closes nothing, as a worker that was cut off.
    let silent = TcpListener::bind((worker(5), 0)).await.expect("a listener");
    let port = silent.local_addr().expect("an address").port();
    let agent = Agent::new(route(RouteState::Here, Some(worker(5)), 1));
    let proxy = start(&agent, port, |_| {}).await;
    let mut client = TcpStream::connect(proxy.address).await.expect("a connection");
    client.write_all(b"a").await.expect("sent");
    let (mut upstream, _) = silent.accept().await.expect("accepted");
    upstream.read_u8().await.expect("the byte");

    agent.say(route(RouteState::Moving, Some(worker(6)), 1));
    agent.say(route(RouteState::Moved, Some(worker(6)), 2));
    let error = client.read_u8().await.expect_err("a reset");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(upstream.read_u8().await.expect_err("a reset").kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(proxy.metrics.snapshot().reset_moved, 1);
}

#[tokio::test]
async fn waiting_is_bounded_in_number_and_in_time() {
    let agent = Agent::new(route(RouteState::Moving, None, 1));
    let proxy = start(&agent, 1, |config| config.max_parked = 2).await;
    let waiting: Vec<_> = (0..2).map(|_| tokio::spawn(Running::ask(proxy.address, String::new()))).collect();
    proxy.until(|now| now.parked == 2).await;
    let error = Running::ask(proxy.address, String::new()).await.expect_err("one too many");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(proxy.metrics.snapshot().refused_full, 1);
    // A client that gives up frees its place.
    for client in &waiting {
        client.abort();
    }

    let proxy = start(&agent, 1, |config| config.park_timeout = Duration::from_millis(50)).await;
    let error = Running::ask(proxy.address, String::new()).await.expect_err("too late");
    assert_eq!(error.kind(), io::ErrorKind::ConnectionReset);
    assert_eq!(proxy.metrics.snapshot().refused_late, 1);
    proxy.until(|now| now.parked == 0 && now.open == 0).await;
}

#[tokio::test]
async fn the_end_lets_open_connections_finish_and_takes_no_new_ones() {
    let (_program, port) = Program::start(worker(7), 0, "seven:").await;
    let agent = Agent::new(route(RouteState::Here, Some(worker(7)), 1));
    let proxy = start(&agent, port, |_| {}).await;
    let mut open = TcpStream::connect(proxy.address).await.expect("a connection");
    open.write_all(b"a").await.expect("sent");
    proxy.until(|now| now.open == 1).await;
    proxy.end.send(()).expect("the proxy runs");
    while TcpStream::connect(proxy.address).await.is_ok() {
        tokio::task::yield_now().await;
    }
    open.shutdown().await.expect("shut down");
    let mut answer = String::new();
    open.read_to_string(&mut answer).await.expect("an answer");
    assert_eq!(answer, "seven:a");
    proxy.task.await.expect("the end");
}

#[tokio::test]
async fn a_port_that_is_taken_is_named() {
    let taken = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).await.expect("a listener");
    let listen = taken.local_addr().expect("an address");
    let config = Config {
        services: vec![Service { listen, machine: machine(), port: 1 }],
        max_parked: 1,
        park_timeout: Duration::ZERO,
        max_connections: 1,
        drain_timeout: Duration::ZERO,
    };
    let error = Proxy::bind(config).await.expect_err("taken");
    assert_eq!(
        error.to_string(),
        format!("cannot listen on {listen} for machine orders: Address already in use (os error 98)")
    );
}
