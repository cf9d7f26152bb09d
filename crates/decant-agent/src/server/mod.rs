//! The API's sockets: a unix socket for root, mutual TLS for peers. One table of paths for both.

mod drains;
mod events;
mod extract;
mod fail;
mod machines;
mod migrations;
mod orders;
mod peer;
mod volumes;
mod workers;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{DefaultBodyLimit, Request};
use axum::http::Method;
use axum::middleware::{self, Next};
use axum::response::Response;
use axum::routing::{get, post};
use decant_api::{Code, ErrorBody};
use decant_base::WorkerId;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpListener, UnixListener};
use tokio::sync::Semaphore;
use tokio::task::JoinSet;

use crate::agent::Agent;
use crate::client::MAX_BODY_BYTES;
use crate::tls;
use fail::Fail;

/// Connections at the same time, per socket. Peers keep three each.
const MAX_CONNECTIONS: usize = 512;
/// How long a TLS handshake, or the head of a request, may take.
const HANDSHAKE: Duration = Duration::from_secs(10);

/// Who asks.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Caller {
    /// Root on this host.
    Root,
    /// A worker of this fleet, by its certificate.
    Peer(WorkerId),
    /// Somebody with a certificate of the authority who is no peer of this worker's.
    Stranger,
}

pub(crate) type Shared = axum::extract::State<Arc<Agent>>;

fn router(agent: Arc<Agent>, caller: Caller) -> Router {
    Router::new()
        .route("/v1/workers", get(workers::list))
        .route("/v1/workers/{worker}", get(workers::show))
        .route("/v1/workers/{worker}/cordon", post(workers::cordon))
        .route("/v1/workers/{worker}/uncordon", post(workers::uncordon))
        .route("/v1/volumes", get(volumes::list).post(volumes::create))
        .route("/v1/volumes/{volume}", get(volumes::show).delete(volumes::delete))
        .route("/v1/machines", get(machines::list).post(machines::run))
        .route("/v1/machines/{machine}", get(machines::show).delete(orders::remove))
        .route("/v1/machines/{machine}/stop", post(machines::stop))
        .route("/v1/machines/{machine}/start", post(machines::start))
        .route("/v1/machines/{machine}/retry", post(orders::retry))
        .route("/v1/machines/{machine}/clear-veto", post(orders::clear_veto))
        .route("/v1/machines/{machine}/forget-origin", post(orders::forget_origin))
        .route("/v1/machines/{machine}/move", post(migrations::start))
        .route("/v1/machines/{machine}/reclaim", post(orders::reclaim))
        .route("/v1/machines/{machine}/logs", get(machines::logs))
        .route("/v1/migrations", get(migrations::list))
        .route("/v1/migrations/{migration}", get(migrations::show))
        .route("/v1/migrations/{migration}/cancel", post(migrations::cancel))
        .route("/v1/migrations/{migration}/settings", post(migrations::settings))
        .route("/v1/drains", get(drains::list).post(drains::create))
        .route("/v1/drains/{drain}", get(drains::show))
        .route("/v1/drains/{drain}/cancel", post(drains::cancel))
        .route("/v1/drains/{drain}/resume", post(drains::resume))
        .route("/v1/drains/{drain}/settings", post(drains::settings))
        .route("/v1/routes/{machine}", get(machines::route))
        .route("/v1/events", get(events::follow))
        .route(crate::peers::MESSAGES_PATH, post(peer::messages).layer(DefaultBodyLimit::max(MAX_BODY_BYTES)))
        .route(crate::peers::STANDING_PATH, get(peer::standing))
        .route(crate::errands::FACTS_PATH, get(peer::facts))
        .route(peer::DRAINS_PATH, get(peer::drains).post(peer::start_drain))
        .fallback(no_such_path)
        .method_not_allowed_fallback(no_such_path)
        .layer(middleware::from_fn(authorize))
        .layer(axum::Extension(caller))
        .layer(DefaultBodyLimit::max(1 << 20))
        .with_state(agent)
}

async fn no_such_path(request: Request) -> Fail {
    let cause = format!("{} {} is not part of this API", request.method(), request.uri().path());
    Fail::new(Code::NoSuchPath, "no such path", cause, "use the same version of decant on both sides")
}

/// What a peer may change here: what a drain, and a move ordered elsewhere, need. All else is root's on this host.
fn peer_may_post(path: &str) -> bool {
    let is = |prefix: &str, suffix: &str| path.starts_with(prefix) && path.ends_with(suffix);
    path.starts_with("/v1/peer/")
        || is("/v1/workers/", "/cordon")
        || is("/v1/workers/", "/uncordon")
        || is("/v1/machines/", "/move")
        || is("/v1/migrations/", "/cancel")
        || is("/v1/migrations/", "/settings")
        || is("/v1/drains/", "/cancel")
        || is("/v1/drains/", "/resume")
        || is("/v1/drains/", "/settings")
}

async fn authorize(
    axum::Extension(caller): axum::Extension<Caller>,
    request: Request,
    next: Next,
) -> Result<Response, Fail> {
    let forbidden = |cause: String, fix: &str| Fail::new(Code::Forbidden, "not allowed", cause, fix);
    match &caller {
        Caller::Root => {}
        Caller::Peer(_) if request.method() == Method::GET => {}
        Caller::Peer(_) if request.method() == Method::POST && peer_may_post(request.uri().path()) => {}
        Caller::Peer(peer) => {
            let cause = format!("{peer} may not {} {}", request.method(), request.uri().path());
            return Err(forbidden(cause, "run the command on the worker itself, as root"));
        }
        Caller::Stranger => {
            let cause = "the certificate is of this fleet's authority, but names no peer of this worker".to_owned();
            return Err(forbidden(cause, "add the worker to [[peers]] here, and restart the agent"));
        }
    }
    Ok(next.run(request).await)
}

/// Serves root.
pub(crate) async fn serve_unix(agent: Arc<Agent>, listener: UnixListener) {
    let router = router(agent, Caller::Root);
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let slot = slots.clone().acquire_owned().await.expect("nobody closes the semaphore");
        match listener.accept().await {
            Ok((stream, _)) => {
                let router = router.clone();
                connections.spawn(async move {
                    serve(stream, router).await;
                    drop(slot);
                });
            }
            Err(error) => pause_after(&error).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

/// Serves peers.
pub(crate) async fn serve_tls(agent: Arc<Agent>, listener: TcpListener) {
    let acceptor = tokio_rustls::TlsAcceptor::from(agent.identity.server.clone());
    let slots = Arc::new(Semaphore::new(MAX_CONNECTIONS));
    let mut connections = JoinSet::new();
    loop {
        let slot = slots.clone().acquire_owned().await.expect("nobody closes the semaphore");
        match listener.accept().await {
            Ok((stream, from)) => {
                let (agent, acceptor) = (agent.clone(), acceptor.clone());
                connections.spawn(async move {
                    let _ = stream.set_nodelay(true);
                    match tokio::time::timeout(HANDSHAKE, acceptor.accept(stream)).await {
                        Ok(Ok(stream)) => {
                            let caller = caller_of(&agent, &stream);
                            tracing::debug!(%from, ?caller, "connection");
                            serve(stream, router(agent, caller)).await;
                        }
                        Ok(Err(error)) => {
                            tracing::info!(%from, %error, "refused: the TLS handshake failed")
                        }
                        Err(_) => tracing::info!(%from, "refused: the TLS handshake took too long"),
                    }
                    drop(slot);
                });
            }
            Err(error) => pause_after(&error).await,
        }
        while connections.try_join_next().is_some() {}
    }
}

/// The name in the certificate that was checked in the handshake.
fn caller_of<S>(agent: &Agent, stream: &tokio_rustls::server::TlsStream<S>) -> Caller {
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let peer = certificate
        .and_then(|certificate| agent.config.peers.iter().find(|peer| tls::is_issued_to(certificate, &peer.worker)));
    peer.map_or(Caller::Stranger, |peer| Caller::Peer(peer.worker.clone()))
}

async fn serve<S>(stream: S, router: Router)
where
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let served = hyper::server::conn::http1::Builder::new()
        .timer(TokioTimer::new())
        // Of a request that has begun; a kept connection may be silent for as long as it likes.
        .header_read_timeout(None)
        .serve_connection(TokioIo::new(stream), TowerToHyperService::new(router))
        .await;
    if let Err(error) = served {
        tracing::debug!(%error, "connection");
    }
}

/// Out of descriptors, most likely: they come back as connections end, of which this task hears nothing. The pause keeps it from
/// asking all the time.
async fn pause_after(error: &std::io::Error) {
    tracing::warn!(%error, "cannot accept a connection");
    tokio::time::sleep(Duration::from_millis(100)).await;
}

/// Asks every peer for its part of a list.
async fn from_peers<T: serde::de::DeserializeOwned>(agent: &Agent, path: &str) -> Vec<(WorkerId, Option<T>)> {
    /// A worker that takes longer is listed as unreachable: a list is worth more soon than whole.
    const PATIENCE: Duration = Duration::from_millis(900);
    let asked = agent.peers.all().map(|peer| async move {
        let client = peer.client.clone().with_timeout(PATIENCE);
        (peer.config.worker.clone(), client.get::<T>(path).await.ok())
    });
    futures_util::future::join_all(asked).await
}

/// A list of this worker's own, made by `own`, and the peers' parts of it unless only ours is wanted. Both are asked at once, so
/// that the answer takes as long as the slowest of them, at most a second.
async fn list_all<T: serde::de::DeserializeOwned>(
    agent: &Agent,
    local: bool,
    path: &str,
    own: impl Future<Output = Vec<T>>,
) -> decant_api::Listing<T> {
    let theirs = async { if local { Vec::new() } else { from_peers(agent, path).await } };
    let (mut items, answers) = tokio::join!(own, theirs);
    let mut unreachable = Vec::new();
    add_all(&mut items, &mut unreachable, answers);
    decant_api::Listing { items, unreachable }
}

/// Whether the caller wants this worker's own alone: peers always get that.
fn is_local(caller: &Caller, scope: decant_api::Scope) -> bool {
    *caller != Caller::Root || scope == decant_api::Scope::Local
}

/// A peer's list, its items added to ours.
fn add_all<T>(
    items: &mut Vec<T>,
    unreachable: &mut Vec<WorkerId>,
    answers: Vec<(WorkerId, Option<decant_api::Listing<T>>)>,
) {
    for (worker, answer) in answers {
        match answer {
            Some(listing) => items.extend(listing.items),
            None => unreachable.push(worker),
        }
    }
}

/// A peer's refusal as our own.
fn peer_error(error: crate::client::ClientError) -> ErrorBody {
    error.into_body()
}
