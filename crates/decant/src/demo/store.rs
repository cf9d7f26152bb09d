//! The order service's database: one writer thread that commits in groups, readers beside it.
//!
//! Write-ahead log with `synchronous=FULL`: a commit is one append and one fsync. The log is checkpointed every
//! [`LOG_PAGES`] pages, so that the next open, perhaps on another worker where each page read crosses the network, has
//! little to recover. Readers have connections of their own: a read that waits for a block never holds up a write.

use std::path::{Path, PathBuf};
use std::sync::{Mutex, PoisonError, mpsc};
use std::time::Duration;

use decant_base::Bytes;
use rusqlite::{Connection, OpenFlags, OptionalExtension};
use serde::{Deserialize, Serialize};
use tokio::sync::oneshot;

/// Pages of write-ahead log after which the writer checkpoints: 256 KiB, about thirty small commits.
const LOG_PAGES: u32 = 64;
/// Orders that one commit takes at most.
const GROUP: usize = 64;
/// Bytes of note in a filled order: with the row's other fields, two fit a page of 4 KiB.
const NOTE_BYTES: usize = 1_900;

/// What a client orders.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct NewOrder {
    /// The client's own number for it. Nothing in the database keeps it unique, so a repeat would show.
    pub(crate) reference: String,
    /// What is ordered.
    pub(crate) item: String,
    /// How many.
    pub(crate) quantity: i64,
    /// Free text.
    #[serde(default)]
    pub(crate) note: String,
}

/// An order as stored.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Order {
    /// Its row.
    pub(crate) id: i64,
    /// The idempotency key it was written with.
    pub(crate) key: String,
    /// As ordered.
    #[serde(flatten)]
    pub(crate) order: NewOrder,
}

/// Why the store did not do it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The same key came with another order before.
    #[error("this Idempotency-Key was used for a different order")]
    KeyReused,
    /// The service is stopping.
    #[error("the service is stopping; ask again with the same key")]
    Closed,
    /// SQLite failed.
    #[error("{doing}: {source}")]
    Database {
        /// What was tried.
        doing: &'static str,
        /// SQLite's reason.
        source: rusqlite::Error,
    },
}

fn failed(doing: &'static str) -> impl FnOnce(rusqlite::Error) -> StoreError {
    move |source| StoreError::Database { doing, source }
}

type Answer = Result<(Order, bool), StoreError>;

enum Request {
    Insert { key: String, order: NewOrder, answer: oneshot::Sender<Answer> },
    Close { patience: Duration, done: mpsc::Sender<()> },
}

/// The database and its writer thread.
#[derive(Debug)]
pub(crate) struct Store {
    requests: mpsc::Sender<Request>,
    readers: Readers,
}

#[derive(Debug)]
struct Readers {
    path: Option<PathBuf>,
    idle: Mutex<Vec<Connection>>,
}

const SCHEMA: &str = "CREATE TABLE IF NOT EXISTS orders (
    id INTEGER PRIMARY KEY,
    key TEXT NOT NULL UNIQUE,
    reference TEXT NOT NULL,
    item TEXT NOT NULL,
    quantity INTEGER NOT NULL,
    note TEXT NOT NULL
)";
const COLUMNS: &str = "id, key, reference, item, quantity, note";
/// The URI of the stateless twin: shared between this process's connections, gone with the last of them.
const MEMORY: &str = "file:orders?mode=memory&cache=shared";

impl Store {
    /// Opens an existing database.
    pub(crate) fn open(path: &Path) -> Result<Self, StoreError> {
        let connection =
            Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)
                .map_err(failed("opening the database"))?;
        prepare(&connection, true)?;
        Ok(Self::run(connection, Some(path.to_owned())))
    }

    /// Opens an empty database in memory.
    pub(crate) fn in_memory() -> Result<Self, StoreError> {
        let connection = Connection::open(MEMORY).map_err(failed("opening a database in memory"))?;
        connection.execute_batch(SCHEMA).map_err(failed("making the table"))?;
        Ok(Self::run(connection, None))
    }

    /// Makes a database at `path`, filled with orders of about `fill` bytes, durable when this returns.
    pub(crate) fn create(path: &Path, fill: Bytes) -> Result<(), StoreError> {
        let mut connection = Connection::open(path).map_err(failed("making the database"))?;
        // Nobody knows this file yet, so it needs no journal: a crash leaves it unnamed and it is made again.
        connection
            .execute_batch(&format!("PRAGMA page_size=4096; PRAGMA journal_mode=OFF; PRAGMA synchronous=OFF; {SCHEMA}"))
            .map_err(failed("making the table"))?;
        let transaction = connection.transaction().map_err(failed("filling the database"))?;
        {
            let mut insert = transaction
                .prepare(&format!("INSERT INTO orders ({COLUMNS}) VALUES (?1, ?2, ?3, ?4, ?5, ?6)"))
                .map_err(failed("filling the database"))?;
            for id in 1..=filled_orders(fill) {
                let order = filled(id);
                let NewOrder { reference, item, quantity, note } = &order.order;
                insert
                    .execute((id, &order.key, reference, item, quantity, note))
                    .map_err(failed("filling the database"))?;
            }
        }
        transaction.commit().map_err(failed("filling the database"))?;
        connection.execute_batch("PRAGMA journal_mode=WAL").map_err(failed("choosing the journal"))?;
        connection.close().map_err(|(_, source)| StoreError::Database { doing: "closing the database", source })?;
        std::fs::File::open(path)
            .and_then(|file| file.sync_all())
            .map_err(|error| failed("syncing the database")(rusqlite::Error::ToSqlConversionFailure(Box::new(error))))
    }

    fn run(connection: Connection, path: Option<PathBuf>) -> Self {
        let (requests, inbox) = mpsc::channel();
        std::thread::Builder::new()
            .name("orders-writer".into())
            .spawn(move || write(connection, &inbox))
            .expect("a process that serves can start one thread");
        Self { requests, readers: Readers { path, idle: Mutex::new(Vec::new()) } }
    }

    /// Stores `order` under `key`, or finds what was stored under it before; `true` if it is new. Durable when it answers.
    pub(crate) async fn insert(&self, key: String, order: NewOrder) -> Answer {
        let (answer, answered) = oneshot::channel();
        self.requests.send(Request::Insert { key, order, answer }).map_err(|_| StoreError::Closed)?;
        answered.await.map_err(|_| StoreError::Closed)?
    }

    /// The order of row `id`.
    pub(crate) fn by_id(&self, id: i64) -> Result<Option<Order>, StoreError> {
        self.readers.with(|connection| {
            connection
                .prepare_cached(&format!("SELECT {COLUMNS} FROM orders WHERE id = ?1"))?
                .query_row([id], from_row)
                .optional()
        })
    }

    /// The highest row, 0 for none.
    pub(crate) fn last_id(&self) -> Result<i64, StoreError> {
        self.readers
            .with(|connection| connection.query_row("SELECT coalesce(max(id), 0) FROM orders", [], |row| row.get(0)))
    }

    /// Ends the writer: what is committed stays, the log is folded into the database if no reader holds it for
    /// longer than `patience`. Later inserts are refused.
    pub(crate) fn close(&self, patience: Duration) {
        let (done, closed) = mpsc::channel();
        if self.requests.send(Request::Close { patience, done }).is_ok() {
            let _ = closed.recv();
        }
    }
}

impl Readers {
    fn with<T>(&self, query: impl FnOnce(&Connection) -> rusqlite::Result<T>) -> Result<T, StoreError> {
        let idle = self.idle.lock().unwrap_or_else(PoisonError::into_inner).pop();
        let connection = match idle {
            Some(connection) => connection,
            None => self.connect()?,
        };
        let result = query(&connection).map_err(failed("reading an order"));
        self.idle.lock().unwrap_or_else(PoisonError::into_inner).push(connection);
        result
    }

    fn connect(&self) -> Result<Connection, StoreError> {
        let opened = match &self.path {
            Some(path) => {
                Connection::open_with_flags(path, OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_NO_MUTEX)
            }
            None => Connection::open(MEMORY),
        };
        let connection = opened.map_err(failed("opening the database for reading"))?;
        prepare(&connection, self.path.is_some())?;
        Ok(connection)
    }
}

fn prepare(connection: &Connection, durable: bool) -> Result<(), StoreError> {
    connection.busy_timeout(Duration::from_secs(5)).map_err(failed("setting the busy timeout"))?;
    let settings = if durable {
        format!("PRAGMA synchronous=FULL; PRAGMA wal_autocheckpoint={LOG_PAGES};")
    } else {
        // Connections to one memory share its table locks, which no busy timeout covers.
        "PRAGMA read_uncommitted=1;".to_owned()
    };
    connection.execute_batch(&settings).map_err(failed("setting up the connection"))
}

fn write(mut connection: Connection, inbox: &mpsc::Receiver<Request>) {
    while let Ok(first) = inbox.recv() {
        let mut group = Vec::new();
        let mut next = Some(first);
        let mut close = None;
        while let Some(request) = next {
            match request {
                Request::Insert { key, order, answer } => group.push((key, order, answer)),
                Request::Close { patience, done } => {
                    close = Some((patience, done));
                    break;
                }
            }
            next = if group.len() < GROUP { inbox.try_recv().ok() } else { None };
        }
        if !group.is_empty() {
            commit(&mut connection, group);
        }
        if let Some((patience, done)) = close {
            let _ = connection.busy_timeout(patience);
            let _ = connection.query_row("PRAGMA wal_checkpoint(TRUNCATE)", [], |_| Ok(()));
            let _ = done.send(());
            return;
        }
    }
}

/// Commits a group and only then answers it.
fn commit(connection: &mut Connection, group: Vec<(String, NewOrder, oneshot::Sender<Answer>)>) {
    let result = (|| {
        let transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
        let rows =
            group.iter().map(|(key, order, _)| upsert(&transaction, key, order)).collect::<Result<Vec<_>, _>>()?;
        transaction.commit()?;
        Ok(rows)
    })();
    match result {
        Ok(rows) => {
            for (row, (_, order, answer)) in rows.into_iter().zip(group) {
                let _ = answer.send(if row.0.order == order { Ok(row) } else { Err(StoreError::KeyReused) });
            }
        }
        Err(error) => {
            let error: rusqlite::Error = error;
            let text = error.to_string();
            eprintln!("order service: a commit failed, its {} orders are not acknowledged: {text}", group.len());
            for (_, _, answer) in group {
                let source = rusqlite::Error::ToSqlConversionFailure(text.clone().into());
                let _ = answer.send(Err(StoreError::Database { doing: "storing the order", source }));
            }
        }
    }
}

fn upsert(connection: &Connection, key: &str, order: &NewOrder) -> rusqlite::Result<(Order, bool)> {
    let NewOrder { reference, item, quantity, note } = order;
    let inserted = connection
        .prepare_cached(
            "INSERT INTO orders (key, reference, item, quantity, note) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (key) DO NOTHING",
        )?
        .execute((key, reference, item, quantity, note))?;
    if inserted == 1 {
        let id = connection.last_insert_rowid();
        return Ok((Order { id, key: key.to_owned(), order: order.clone() }, true));
    }
    let stored = connection
        .prepare_cached(&format!("SELECT {COLUMNS} FROM orders WHERE key = ?1"))?
        .query_row([key], from_row)?;
    Ok((stored, false))
}

fn from_row(row: &rusqlite::Row<'_>) -> rusqlite::Result<Order> {
    Ok(Order {
        id: row.get(0)?,
        key: row.get(1)?,
        order: NewOrder { reference: row.get(2)?, item: row.get(3)?, quantity: row.get(4)?, note: row.get(5)? },
    })
}

/// How many orders make about `fill` bytes of database.
pub(crate) fn filled_orders(fill: Bytes) -> i64 {
    // Two rows to a page; the index over the keys adds about one page in sixty.
    i64::try_from(fill.0 / 4096 * 2).unwrap_or(i64::MAX)
}

/// The order that filling puts into row `id`; a reader compares what it gets with this.
pub(crate) fn filled(id: i64) -> Order {
    const ALPHABET: &[u8; 16] = b"abcdefghijklmnop";
    let mut note = String::with_capacity(NOTE_BYTES);
    let mut state = scramble(id.unsigned_abs());
    while note.len() < NOTE_BYTES {
        state = scramble(state);
        for nibble in 0..16 {
            note.push(ALPHABET[(state >> (nibble * 4) & 15) as usize] as char);
        }
    }
    note.truncate(NOTE_BYTES);
    let order = NewOrder { reference: format!("filled-{id}"), item: "barrel".into(), quantity: 1 + id % 9, note };
    Order { id, key: format!("filled-{id:012}"), order }
}

/// One step of splitmix64: cheap, and no two ids give the same note.
pub(crate) fn scramble(state: u64) -> u64 {
    let mut z = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}
