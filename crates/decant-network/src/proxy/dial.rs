//! Getting a connection to a machine, now or as soon as there is one to be had.

use std::io;
use std::net::{Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use decant_base::MachineId;
use tokio::net::{TcpSocket, TcpStream};
use tokio::sync::{Mutex, Notify, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, sleep_until, timeout};

use crate::route::{Resolver, Route, RouteState};

/// Between knocks at a port that refuses: the machine's namespace is there and its program is about to listen.
const KNOCK: Duration = Duration::from_millis(2);
/// An attempt without any answer for so long gets a sibling, then after twice that another: packets sent before a link was
/// there are lost, and TCP alone would send the next one after a second. Long distances answer later than this and win anyway.
const HEDGE: Duration = Duration::from_millis(25);
/// Attempts at a time.
const MAX_ATTEMPTS: usize = 8;
/// One attempt's patience.
const ATTEMPT: Duration = Duration::from_secs(5);
/// How long one long poll for a route may take.
const POLL: Duration = Duration::from_secs(10);
/// Between two polls that said the same at once, and between asking again because a connection failed.
const POLL_PAUSE: Duration = Duration::from_millis(5);
/// Between polls while the resolver fails.
const FAILED_PAUSE: Duration = Duration::from_millis(50);
/// Unacknowledged bytes to a machine are given up after this; a worker that lost its power does not say so.
const USER_TIMEOUT_MS: u32 = 20_000;

/// What the proxy knows of one machine; shared by all its services.
pub(super) struct Target {
    machine: MachineId,
    route: watch::Sender<Option<Route>>,
    /// Asks the route's task to ask again.
    doubt: Notify,
}

/// One port of a machine; shared by all connections to it.
pub(super) struct Door {
    target: Arc<Target>,
    port: u16,
    gate: watch::Sender<Gate>,
    /// The right to knock at a shut door: one connection tries, all others wait for it to open.
    knocker: Mutex<()>,
}

/// What the last attempt to connect found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Gate {
    Untried,
    Open(Ipv6Addr),
    Shut(Ipv6Addr),
}

/// A connection to the machine, and the route it was made by.
pub(super) struct Connected {
    pub(super) stream: TcpStream,
    pub(super) route: Route,
}

impl Target {
    pub(super) fn new(machine: MachineId) -> Arc<Self> {
        Arc::new(Self { machine, route: watch::Sender::new(None), doubt: Notify::new() })
    }

    /// Keeps the route fresh, for ever.
    pub(super) async fn follow<R: Resolver>(&self, resolver: &R) {
        let mut known: Option<Route> = None;
        loop {
            let asked = Instant::now();
            let answer = tokio::select! {
                answer = resolver.route(&self.machine, known.as_ref(), POLL) => answer,
                () = self.doubt.notified() => resolver.route(&self.machine, None, Duration::ZERO).await,
            };
            match answer {
                Ok(route) => {
                    if known.as_ref() != Some(&route) {
                        tracing::debug!(machine = %self.machine, ?route, "route");
                        self.route.send_replace(Some(route.clone()));
                        known = Some(route);
                    } else if asked.elapsed() < POLL_PAUSE {
                        sleep(POLL_PAUSE).await;
                    }
                }
                Err(error) => {
                    tracing::debug!(machine = %self.machine, %error, "route unknown");
                    sleep(FAILED_PAUSE).await;
                }
            }
        }
    }
}

impl Door {
    pub(super) fn new(target: Arc<Target>, port: u16) -> Arc<Self> {
        Arc::new(Self { target, port, gate: watch::Sender::new(Gate::Untried), knocker: Mutex::new(()) })
    }

    pub(super) fn routes(&self) -> watch::Receiver<Option<Route>> {
        self.target.route.subscribe()
    }

    /// The route, if a connection along it may well succeed.
    fn promising(&self) -> Option<(Route, Ipv6Addr)> {
        let route = self.target.route.borrow().clone()?;
        let (address, gate) = (route.address?, *self.gate.borrow());
        let promising = match route.state {
            RouteState::Unknown => false,
            RouteState::Moving => gate == Gate::Open(address),
            RouteState::Here | RouteState::Moved => gate != Gate::Shut(address),
        };
        promising.then_some((route, address))
    }

    /// One attempt where the machine should be, unless it is known to be in vain.
    pub(super) async fn connect_now(&self) -> Option<Connected> {
        let (route, address) = self.promising()?;
        // The patience of a few hedges: what takes longer is parked, and knocks with siblings.
        if let Ok(Ok(stream)) = timeout(4 * HEDGE, connect(address, self.port)).await {
            self.set_gate(Gate::Open(address));
            return Some(Connected { stream, route });
        }
        self.set_gate(Gate::Shut(address));
        self.target.doubt.notify_one();
        None
    }

    fn set_gate(&self, gate: Gate) {
        self.gate.send_if_modified(|old| std::mem::replace(old, gate) != gate);
    }

    /// Waits until the machine lets a connection in. Cancel safe.
    pub(super) async fn connect_later(&self) -> Connected {
        let mut gate = self.gate.subscribe();
        loop {
            if let Some(connected) = self.connect_now().await {
                return connected;
            }
            let opened = async {
                let _ = gate.wait_for(|gate| matches!(gate, Gate::Open(_)) && self.promising_at(*gate)).await;
            };
            tokio::select! {
                _turn = self.knocker.lock() => {
                    if self.promising().is_some() {
                        continue;
                    }
                    let connected = self.knock().await;
                    if let Some(address) = connected.route.address {
                        self.set_gate(Gate::Open(address));
                    }
                    return connected;
                }
                () = opened => {}
            }
        }
    }

    /// Whether the route leads to where `gate` is about.
    fn promising_at(&self, gate: Gate) -> bool {
        let route = self.target.route.borrow();
        let Some(route) = route.as_ref().filter(|route| route.state != RouteState::Unknown) else { return false };
        route.address.is_some_and(|address| gate == Gate::Open(address))
    }

    /// Tries the machine's address, wherever that is by the latest route, until it lets us in.
    async fn knock(&self) -> Connected {
        let port = self.port;
        let mut routes = self.routes();
        let mut attempts: JoinSet<io::Result<TcpStream>> = JoinSet::new();
        let (mut hedge, mut next) = (HEDGE, Instant::now());
        let mut current = routes.borrow_and_update().clone();
        loop {
            let address = current.as_ref().filter(|r| r.state != RouteState::Unknown).and_then(|route| route.address);
            tokio::select! {
                Some(attempt) = attempts.join_next() => {
                    if let (Ok(Ok(stream)), Some(route)) = (attempt, current.clone()) {
                        return Connected { stream, route };
                    }
                    if attempts.is_empty() {
                        (hedge, next) = (HEDGE, Instant::now() + KNOCK);
                        if current.as_ref().is_some_and(|route| route.state != RouteState::Moving) {
                            self.target.doubt.notify_one();
                        }
                    }
                }
                () = sleep_until(next), if address.is_some() && attempts.len() < MAX_ATTEMPTS => {
                    if let Some(address) = address {
                        attempts.spawn(async move {
                            timeout(ATTEMPT, connect(address, port)).await.unwrap_or(Err(io::ErrorKind::TimedOut.into()))
                        });
                    }
                    next = Instant::now() + hedge;
                    hedge *= 2;
                }
                _ = routes.changed() => {
                    let newer = routes.borrow_and_update().clone();
                    if newer.as_ref().map(|route| route.address) != current.as_ref().map(|route| route.address) {
                        // Dropping the set ends its attempts: they lead to where the machine is not.
                        attempts = JoinSet::new();
                        (hedge, next) = (HEDGE, Instant::now());
                    }
                    current = newer;
                }
            }
        }
    }
}

async fn connect(address: Ipv6Addr, port: u16) -> io::Result<TcpStream> {
    let socket = TcpSocket::new_v6()?;
    rustix::net::sockopt::set_tcp_user_timeout(&socket, USER_TIMEOUT_MS)?;
    socket.set_keepalive(true)?;
    let stream = socket.connect(SocketAddr::from((address, port))).await?;
    stream.set_nodelay(true)?;
    Ok(stream)
}
