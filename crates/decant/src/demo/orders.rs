//! The order service: the machine that the demo moves.
//!
//! HTTP/1.1; one durable SQLite row per order and an idempotency key per write, so that a client that heard nothing
//! may repeat its request. An order is acknowledged after the commit that holds it is on the medium, never before.
//!
//! Three things matter for being moved: it opens without scanning anything (a short write-ahead log is all there is to
//! recover), it ends within milliseconds of SIGTERM (one bounded checkpoint), and what was not acknowledged
//! is answered after the move to the same key, once.
//!
//! Without `--data` the orders live in memory: the stateless twin that the demo measures against.

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;
use std::time::Duration;

use anyhow::Context;
use axum::extract::{Path as UrlPath, State};
use axum::http::{HeaderMap, StatusCode};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Json, Router};
use decant_base::Bytes;
use serde_json::json;

use super::store::{NewOrder, Order, Store, StoreError};

/// `decant demo-orders`.
#[derive(Debug, clap::Args)]
pub(crate) struct OrdersArgs {
    /// Directory of the database; without it orders live in memory.
    #[arg(long)]
    data: Option<PathBuf>,
    /// Address to serve at.
    #[arg(long, default_value = "[::]:8080")]
    listen: std::net::SocketAddr,
    /// When the database is made: fill it with orders of about this many bytes.
    #[arg(long, default_value = "0", value_parser = parse_bytes)]
    fill: Bytes,
    /// Make no database: wait until there is one.
    #[arg(long)]
    await_database: bool,
    /// When the database is made: write this many bytes to a file and delete it again.
    #[arg(long, default_value = "0", value_parser = parse_bytes)]
    scratch: Bytes,
}

fn parse_bytes(text: &str) -> Result<Bytes, String> {
    Bytes::parse(text).map_err(|error| error.to_string())
}

/// The file name of the database under `--data`.
pub(crate) const DATABASE: &str = "orders.db";

/// While a file of this name is beside the database, it is left alone: somebody copies it.
pub(crate) const HOLD: &str = "hold";
/// Between two looks for it.
const HOLD_PACE: Duration = Duration::from_millis(5);
/// How long the last checkpoint at SIGTERM may wait for a reader.
const CLOSE_PATIENCE: Duration = Duration::from_millis(5);

/// Runs the service until SIGTERM or SIGINT.
pub(crate) fn main(args: &OrdersArgs) -> ExitCode {
    match serve(args) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("order service: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn serve(args: &OrdersArgs) -> anyhow::Result<()> {
    let store = match &args.data {
        Some(directory) => {
            let database = directory.join(DATABASE);
            while directory.join(HOLD).exists() || (args.await_database && !database.exists()) {
                std::thread::sleep(HOLD_PACE);
            }
            if !database.exists() {
                make_database(directory, &database, args)?;
            }
            Store::open(&database)?
        }
        None => Store::in_memory()?,
    };
    let store = Arc::new(store);
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().context("starting the runtime")?;
    runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut terminate = signal(SignalKind::terminate()).context("listening for SIGTERM")?;
        let mut interrupt = signal(SignalKind::interrupt()).context("listening for SIGINT")?;
        let listener = tokio::net::TcpListener::bind(args.listen)
            .await
            .with_context(|| format!("listening at {}", args.listen))?;
        crate::cli::output::print(&format!("order service: listening at {}", listener.local_addr()?));
        let server = axum::serve(
            axum::serve::ListenerExt::tap_io(listener, |stream| {
                // An answer is one small packet; waiting for more to send with it only delays it.
                let _ = stream.set_nodelay(true);
            }),
            router(Arc::clone(&store)),
        );
        tokio::select! {
            result = server => result.context("serving"),
            _ = terminate.recv() => Ok(()),
            _ = interrupt.recv() => Ok(()),
        }
    })?;
    // Whoever was not answered asks again with the same key. Connections close with the process.
    store.close(CLOSE_PATIENCE);
    std::process::exit(0)
}

/// Makes the database beside its name and renames it into place, so that a crash leaves none or a whole one.
fn make_database(directory: &Path, database: &Path, args: &OrdersArgs) -> anyhow::Result<()> {
    let unfinished = directory.join("orders.db.unfinished");
    let _ = std::fs::remove_file(&unfinished);
    Store::create(&unfinished, args.fill)?;
    if args.scratch.0 > 0 {
        write_and_delete(&directory.join("scratch"), args.scratch)?;
    }
    std::fs::rename(&unfinished, database).context("naming the database")?;
    std::fs::File::open(directory).and_then(|d| d.sync_all()).context("syncing the directory")?;
    Ok(())
}

/// Writes `size` bytes that are no zeros, syncs and deletes them: what a volume that lived for a while looks like.
fn write_and_delete(path: &Path, size: Bytes) -> anyhow::Result<()> {
    use std::io::Write;
    let mut chunk = vec![0u8; 1 << 20];
    let mut state = 0x9e37_79b9_7f4a_7c15_u64;
    for word in chunk.chunks_exact_mut(8) {
        state = super::store::scramble(state);
        word.copy_from_slice(&state.to_le_bytes());
    }
    let mut file = std::fs::File::create(path).context("making the scratch file")?;
    let mut left = size.0;
    while left > 0 {
        let now = left.min(chunk.len() as u64);
        file.write_all(&chunk[..now as usize]).context("writing the scratch file")?;
        left -= now;
    }
    file.sync_all().context("syncing the scratch file")?;
    drop(file);
    std::fs::remove_file(path).context("deleting the scratch file")
}

fn router(store: Arc<Store>) -> Router {
    Router::new()
        .route("/health", get(|| async { Json(json!({ "status": "ok" })) }))
        .route("/orders", post(create).get(count))
        .route("/orders/{id}", get(show))
        .with_state(store)
}

async fn create(State(store): State<Arc<Store>>, headers: HeaderMap, Json(order): Json<NewOrder>) -> Response {
    let Some(key) = headers.get("idempotency-key").and_then(|key| key.to_str().ok()) else {
        return refusal(StatusCode::BAD_REQUEST, "the header Idempotency-Key is missing");
    };
    if key.is_empty() || key.len() > 128 {
        return refusal(StatusCode::BAD_REQUEST, "Idempotency-Key must have 1 to 128 characters");
    }
    match store.insert(key.to_owned(), order).await {
        Ok((order, true)) => (StatusCode::CREATED, Json(order)).into_response(),
        Ok((order, false)) => (StatusCode::OK, Json(order)).into_response(),
        Err(error) => failure(&error),
    }
}

async fn show(State(store): State<Arc<Store>>, UrlPath(id): UrlPath<i64>) -> Response {
    match tokio::task::spawn_blocking(move || store.by_id(id)).await {
        Ok(Ok(Some(order))) => Json::<Order>(order).into_response(),
        Ok(Ok(None)) => refusal(StatusCode::NOT_FOUND, "no such order"),
        Ok(Err(error)) => failure(&error),
        Err(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the read was abandoned"),
    }
}

async fn count(State(store): State<Arc<Store>>) -> Response {
    match tokio::task::spawn_blocking(move || store.last_id()).await {
        Ok(Ok(last)) => Json(json!({ "last_id": last })).into_response(),
        Ok(Err(error)) => failure(&error),
        Err(_) => refusal(StatusCode::INTERNAL_SERVER_ERROR, "the read was abandoned"),
    }
}

fn failure(error: &StoreError) -> Response {
    let status = match error {
        StoreError::KeyReused => StatusCode::UNPROCESSABLE_ENTITY,
        StoreError::Closed => StatusCode::SERVICE_UNAVAILABLE,
        StoreError::Database { .. } => StatusCode::INTERNAL_SERVER_ERROR,
    };
    refusal(status, &error.to_string())
}

fn refusal(status: StatusCode, message: &str) -> Response {
    (status, Json(json!({ "error": message }))).into_response()
}
