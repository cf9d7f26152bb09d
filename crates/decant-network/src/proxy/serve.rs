//! Accepting, parking, carrying and resetting connections.

use std::collections::BTreeMap;
use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use tokio::io::{Interest, copy_bidirectional_with_sizes};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Semaphore, watch};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout, timeout_at};

use super::dial::{Connected, Door, Target};
use super::metrics::Metrics;
use super::{Config, Proxy, Service};
use crate::route::Resolver;

/// Bytes copied at a time in each direction.
const BUFFER: usize = 64 * 1024;
/// After an accept that failed for want of descriptors or memory.
const ACCEPT_PAUSE: Duration = Duration::from_millis(20);

struct Shared {
    config: Config,
    metrics: Metrics,
    connections: Arc<Semaphore>,
}

pub(super) async fn serve<R: Resolver>(proxy: Proxy, resolver: R, end: impl Future<Output = ()> + Send) {
    let Proxy { config, listeners, metrics } = proxy;
    let connections = Arc::new(Semaphore::new(config.max_connections));
    let shared = Arc::new(Shared { config, metrics, connections });
    let resolver = Arc::new(resolver);
    let (ending, ended) = watch::channel(false);
    let mut targets = BTreeMap::new();
    let mut followers = JoinSet::new();
    let mut acceptors = JoinSet::new();
    for (service, listener) in shared.config.services.iter().zip(listeners) {
        let target = targets.entry(service.machine.clone()).or_insert_with(|| {
            let target = Target::new(service.machine.clone());
            let (followed, resolver) = (Arc::clone(&target), Arc::clone(&resolver));
            followers.spawn(async move { followed.follow(&*resolver).await });
            target
        });
        let door = Door::new(Arc::clone(target), service.port);
        acceptors.spawn(accept(listener, door, service.clone(), Arc::clone(&shared), ended.clone()));
    }
    end.await;
    ending.send_replace(true);
    // Acceptors close their port at once and end with their last connection.
    let drained = timeout(shared.config.drain_timeout, async { while acceptors.join_next().await.is_some() {} }).await;
    if drained.is_err() {
        tracing::info!(open = shared.metrics.snapshot().open, "connections cut at the end of the drain timeout");
    }
}

async fn accept(
    listener: TcpListener,
    door: Arc<Door>,
    service: Service,
    shared: Arc<Shared>,
    mut ended: watch::Receiver<bool>,
) {
    let mut open = JoinSet::new();
    loop {
        let next = async {
            let permit = Arc::clone(&shared.connections).acquire_owned().await;
            (permit, listener.accept().await)
        };
        let (Ok(permit), accepted) = (tokio::select! {
            next = next => next,
            _ = ended.wait_for(|ended| *ended) => break,
        }) else {
            break;
        };
        // Reap what has ended, so that the set does not grow.
        while open.try_join_next().is_some() {}
        match accepted {
            Ok((client, _)) => {
                let (door, shared) = (Arc::clone(&door), Arc::clone(&shared));
                open.spawn(async move {
                    let _counted = shared.metrics.accept();
                    carry(client, &door, &shared).await;
                    drop(permit);
                });
            }
            Err(error) => {
                tracing::warn!(listen = %service.listen, %error, "accept failed");
                sleep(ACCEPT_PAUSE).await;
            }
        }
    }
    drop(listener);
    while open.join_next().await.is_some() {}
}

async fn carry(mut client: TcpStream, door: &Door, shared: &Shared) {
    let _ = client.set_nodelay(true);
    let Some(Connected { mut stream, route }) = reach(&client, door, shared).await else {
        reset(&client);
        return;
    };
    let mut routes = door.routes();
    let moved = async {
        // `wait_for` looks at the present value first: a change between connecting and here is not missed.
        let _ = routes.wait_for(|newer| newer.as_ref().is_some_and(|newer| !route.still_leads(newer))).await;
    };
    tokio::select! {
        copied = copy_bidirectional_with_sizes(&mut client, &mut stream, BUFFER, BUFFER) => match copied {
            Ok((to_machine, to_client)) => shared.metrics.carried(to_machine, to_client),
            // A reset on one side is passed on as one: an orderly end would say that the answer was complete.
            Err(_) => {
                reset(&client);
                reset(&stream);
            }
        },
        () = moved => {
            shared.metrics.reset_moved();
            reset(&client);
            reset(&stream);
        }
    }
}

/// A connection to the machine; waits for it if need be. `None` if there is no more point in waiting.
async fn reach(client: &TcpStream, door: &Door, shared: &Shared) -> Option<Connected> {
    if let Some(connected) = door.connect_now().await {
        return Some(connected);
    }
    let _parked = shared.metrics.park(shared.config.max_parked)?;
    let began = Instant::now();
    tokio::select! {
        connected = timeout_at(began + shared.config.park_timeout, door.connect_later()) => match connected {
            Ok(connected) => {
                shared.metrics.released(began.elapsed());
                Some(connected)
            }
            Err(_) => {
                shared.metrics.refuse_late();
                None
            }
        },
        // The client has reset the connection: nobody waits any more.
        _ = client.ready(Interest::ERROR) => None,
    }
}

/// Makes the coming close a reset.
fn reset(stream: &TcpStream) {
    let _ = stream.set_zero_linger();
}
