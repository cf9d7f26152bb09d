//! The journal itself.

use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicBool, Ordering};

use decant_base::crash;
use redb::{
    Database, Durability, ReadableDatabase, ReadableTable, ReadableTableMetadata, StorageBackend, TableDefinition,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::guard::{self, Guard};

const META: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("meta");
const ROWS: TableDefinition<'_, &str, &[u8]> = TableDefinition::new("rows");
const LOG: TableDefinition<'_, u64, &[u8]> = TableDefinition::new("log");

/// Enough for every row of a worker that is full of machines; the rest of the file is the log, read in order.
const CACHE_BYTES: usize = 8 << 20;

/// How to open a journal.
#[derive(Debug, Clone)]
pub struct Options {
    /// Whose journal it is, e.g. the worker's name; another owner's journal is refused.
    pub owner: String,
    /// The version of what the rows and the log hold. A file with a newer one is refused; an older one is opened and
    /// raised, so rows must stay readable by `serde` defaults.
    pub schema: u32,
    /// Lines the log keeps at most; the oldest go first. At least 1.
    pub log_max: u64,
}

/// A line of the event log: every transition, in one place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct LogEntry {
    /// Its number, given by the journal; 0 in what is handed to it.
    #[serde(default)]
    pub seq: u64,
    /// When, milliseconds since the Unix epoch.
    pub time_ms: u64,
    /// About what, e.g. `machine/orders`.
    pub subject: String,
    /// The old state.
    pub from: String,
    /// What happened.
    pub event: String,
    /// The new state.
    pub to: String,
    /// Anything else a reader should know; `null` if nothing.
    #[serde(default)]
    pub detail: serde_json::Value,
}

/// What becomes of the row.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Write<R> {
    /// It stays; nothing is committed unless there is a line for the log.
    Keep,
    /// It is this now.
    Put(R),
    /// It goes.
    Remove,
}

/// The names of the crash points around a commit, from its caller's table.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Points {
    /// Passed before.
    pub before: &'static str,
    /// Passed when it is durable.
    pub after: &'static str,
}

/// What one step does to the journal.
#[derive(Debug, Clone)]
#[must_use = "a change that is not committed did not happen"]
pub struct Change<R, T> {
    /// The row.
    pub row: Write<R>,
    /// Whether it must be durable when [`Journal::apply`] returns. If not, a crash may lose it.
    pub durable: bool,
    /// The line of the log.
    pub log: Option<LogEntry>,
    /// Crash points to pass.
    pub points: Option<Points>,
    /// Handed back once the commit is as durable as asked, e.g. the effects of the step.
    pub then: T,
}

/// The journal cannot be opened. Nothing was changed, except that a crash before was repaired.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It was there and is gone.
    #[error(
        "journal {} is gone, but {} says that this worker had one (identity {identity}): without it a machine that has moved \
         could be booted twice. Put the journal back; if it is lost for good, remove the .guard file to start with an \
         empty one, and take its machines' claims from their volumes",
        .path.display(), guard::path_of(.path).display()
    )]
    Gone {
        /// The journal.
        path: PathBuf,
        /// The identity it had.
        identity: String,
    },
    /// It is another one.
    #[error(
        "journal {} is not the one that belongs here: it is {found}'s, {} expects {expected}'s. Put the right file back",
        .path.display(), guard::path_of(.path).display()
    )]
    Replaced {
        /// The journal.
        path: PathBuf,
        /// Owner and identity in the guard, or this worker's name.
        expected: String,
        /// Owner and identity in the journal.
        found: String,
    },
    /// It is an older state of itself.
    #[error(
        "journal {} is older than the last one opened here (generation {found}, expected {expected} or more): it was \
         restored from a backup, and machines may have moved since. Put the newest one back; if there is none, remove the .guard \
         file to accept what this one says",
        .path.display()
    )]
    Older {
        /// The journal.
        path: PathBuf,
        /// The guard's generation.
        expected: u64,
        /// The journal's.
        found: u64,
    },
    /// A newer Decant wrote it.
    #[error("journal {} has schema {found}, this version reads up to {known}: run the newer version", .path.display())]
    Newer {
        /// The journal.
        path: PathBuf,
        /// In the file.
        found: u32,
        /// Known here.
        known: u32,
    },
    /// Another process has it open.
    #[error("journal {} is in use: another agent runs on this worker's state directory. Stop that one first", .path.display())]
    InUse {
        /// The journal.
        path: PathBuf,
    },
    /// It is damaged, or the medium does not read.
    #[error(
        "journal {} is damaged and nothing was booted from it: {source}. Check the disk, then put a copy back; rows are never guessed",
        .path.display()
    )]
    Damaged {
        /// The journal.
        path: PathBuf,
        /// What redb found.
        #[source]
        source: Box<redb::Error>,
    },
    /// The guard, or the directory, cannot be read or written.
    #[error("cannot read or write {}: {source}", .path.display())]
    Io {
        /// The file.
        path: PathBuf,
        /// The cause.
        #[source]
        source: std::io::Error,
    },
}

/// The journal does not work any more. Final for this handle.
#[derive(Debug, thiserror::Error)]
pub enum JournalError {
    /// A commit or a read failed now.
    #[error("the journal failed and takes nothing more until the agent starts again: {0}")]
    Failed(#[source] Box<redb::Error>),
    /// One failed before.
    #[error("the journal failed before and takes nothing more until the agent starts again")]
    FailedBefore,
    /// A row is no JSON of the wanted kind: another version wrote it.
    #[error("journal row {key} cannot be read: {source}")]
    Row {
        /// Which.
        key: String,
        /// The cause.
        #[source]
        source: serde_json::Error,
    },
}

/// Why [`Journal::apply`] changed nothing.
#[derive(Debug, thiserror::Error)]
pub enum ApplyError<E> {
    /// The step said no.
    #[error("{0}")]
    Denied(E),
    /// The journal does not work.
    #[error(transparent)]
    Journal(#[from] JournalError),
}

fn failed(error: impl Into<redb::Error>) -> JournalError {
    JournalError::Failed(Box::new(error.into()))
}

/// A worker's journal. Shared between threads; steps exclude each other.
#[derive(Debug)]
pub struct Journal {
    db: Database,
    log_max: u64,
    /// The next line's number, also the lock of a step.
    next_seq: Mutex<u64>,
    failed: AtomicBool,
    identity: String,
    generation: u64,
}

impl Journal {
    /// Opens the journal at `path`, or makes it if neither it nor its guard is there. Verifies every page.
    ///
    /// # Errors
    /// [`OpenError`]: whatever is not plainly this worker's newest journal is refused.
    pub fn open(path: &Path, options: &Options) -> Result<Self, OpenError> {
        let guard_path = guard::path_of(path);
        let io = |path: &Path| {
            let path = path.to_owned();
            move |source| OpenError::Io { path, source }
        };
        let expected = guard::read(&guard_path).map_err(io(&guard_path))?;
        let is_there = std::fs::metadata(path).is_ok_and(|meta| meta.len() > 0);
        if let (Some(guard), false) = (&expected, is_there) {
            return Err(OpenError::Gone { path: path.to_owned(), identity: guard.identity.clone() });
        }
        let identity = guard::random_identity().map_err(io(Path::new("/dev/urandom")))?;
        let db = builder().create(path).map_err(|error| open_error(path, error.into()))?;
        let journal = Self::start(db, path, options, identity, expected.as_ref())?;
        guard::sync_directory_of(path).map_err(io(path))?;
        let guard =
            Guard { identity: journal.identity.clone(), owner: options.owner.clone(), generation: journal.generation };
        guard::write(&guard_path, &guard).map_err(io(&guard_path))?;
        Ok(journal)
    }

    /// Opens a journal on `backend`, without a guard: for tests that lose and tear writes.
    ///
    /// # Errors
    /// As [`Journal::open`].
    pub fn open_on(backend: impl StorageBackend, options: &Options) -> Result<Self, OpenError> {
        let path = Path::new("journal on a backend");
        let db = builder().create_with_backend(backend).map_err(|error| open_error(path, error.into()))?;
        Self::start(db, path, options, "backend".to_owned(), None)
    }

    /// Checks that the opened file is the expected one, and counts the opening in it.
    fn start(
        db: Database,
        path: &Path,
        options: &Options,
        identity: String,
        expected: Option<&Guard>,
    ) -> Result<Self, OpenError> {
        let damaged = |error: redb::Error| OpenError::Damaged { path: path.to_owned(), source: Box::new(error) };
        let mut txn = db.begin_write().map_err(|e| damaged(e.into()))?;
        txn.set_durability(Durability::Immediate).map_err(|e| damaged(e.into()))?;
        let (found, next_seq) = {
            let mut meta = txn.open_table(META).map_err(|e| damaged(e.into()))?;
            txn.open_table(ROWS).map_err(|e| damaged(e.into()))?;
            let log = txn.open_table(LOG).map_err(|e| damaged(e.into()))?;
            let found: Option<Guard> = read_meta(&meta, "identity").map_err(damaged)?;
            let schema: u32 = read_meta(&meta, "schema").map_err(damaged)?.unwrap_or(options.schema);
            check(path, options, schema, found.as_ref(), expected)?;
            let mut guard = found.unwrap_or(Guard { identity, owner: options.owner.clone(), generation: 0 });
            guard.generation += 1;
            write_meta(&mut meta, "identity", &guard).map_err(damaged)?;
            write_meta(&mut meta, "schema", &options.schema).map_err(damaged)?;
            let last = log.last().map_err(|e| damaged(e.into()))?.map_or(0, |(seq, _)| seq.value());
            (guard, last + 1)
        };
        txn.commit().map_err(|e| damaged(e.into()))?;
        tracing::debug!(path = %path.display(), generation = found.generation, "journal opened");
        Ok(Self {
            db,
            log_max: options.log_max.max(1),
            next_seq: Mutex::new(next_seq),
            failed: AtomicBool::new(false),
            identity: found.identity,
            generation: found.generation,
        })
    }

    /// The journal's identity: 128 random bits as hex, the same for its whole life.
    pub fn identity(&self) -> &str {
        &self.identity
    }

    /// Steps the row at `key` and commits what came of it, in one transaction. `step` gets the row as it is, `None` if there is none.
    ///
    /// Blocks for an fsync if the change is durable; call it off an event loop.
    ///
    /// # Errors
    /// [`ApplyError::Denied`] hands back the step's own refusal, nothing changed. Any other error is final for the journal.
    pub fn apply<R, T, E>(
        &self,
        key: &str,
        step: impl FnOnce(Option<R>) -> Result<Change<R, T>, E>,
    ) -> Result<T, ApplyError<E>>
    where
        R: Serialize + DeserializeOwned,
    {
        let mut next_seq = self.next_seq.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
        let row = self.row(key)?;
        let change = step(row).map_err(ApplyError::Denied)?;
        if matches!(change.row, Write::Keep) && change.log.is_none() {
            return Ok(change.then);
        }
        let encoded = match &change.row {
            Write::Put(row) => Some(encode(key, row)?),
            Write::Keep | Write::Remove => None,
        };
        let log = match change.log {
            Some(entry) => Some(encode(key, &LogEntry { seq: *next_seq, ..entry })?),
            None => None,
        };
        if let Some(points) = change.points {
            crash::point(points.before);
        }
        let removed = matches!(change.row, Write::Remove);
        let result =
            self.commit(key, encoded.as_deref(), removed, log.as_deref().map(|log| (*next_seq, log)), change.durable);
        if let Err(error) = result {
            self.failed.store(true, Ordering::Release);
            tracing::error!(%error, key, "the journal failed");
            return Err(failed(error).into());
        }
        if log.is_some() {
            *next_seq += 1;
        }
        if let Some(points) = change.points {
            crash::point(points.after);
        }
        Ok(change.then)
    }

    fn commit(
        &self,
        key: &str,
        row: Option<&[u8]>,
        removed: bool,
        log: Option<(u64, &[u8])>,
        durable: bool,
    ) -> Result<(), redb::Error> {
        let mut txn = self.db.begin_write()?;
        txn.set_durability(if durable { Durability::Immediate } else { Durability::None })?;
        {
            let mut rows = txn.open_table(ROWS)?;
            match row {
                Some(row) => drop(rows.insert(key, row)?),
                None if removed => drop(rows.remove(key)?),
                None => {}
            }
            if let Some((seq, line)) = log {
                let mut table = txn.open_table(LOG)?;
                table.insert(seq, line)?;
                // Two for one, so that a lowered limit is reached in time.
                for _ in 0..2 {
                    if table.len()? > self.log_max {
                        table.pop_first()?;
                    }
                }
            }
        }
        txn.commit()?;
        Ok(())
    }

    fn check_alive(&self) -> Result<(), JournalError> {
        if self.failed.load(Ordering::Acquire) { Err(JournalError::FailedBefore) } else { Ok(()) }
    }

    /// The row at `key`.
    ///
    /// # Errors
    /// As [`Journal::apply`].
    pub fn row<R: DeserializeOwned>(&self, key: &str) -> Result<Option<R>, JournalError> {
        self.check_alive()?;
        let txn = self.db.begin_read().map_err(failed)?;
        let rows = txn.open_table(ROWS).map_err(failed)?;
        rows.get(key).map_err(failed)?.map(|value| decode(key, value.value())).transpose()
    }

    /// Every row whose key starts with `prefix`, in the order of the keys.
    ///
    /// # Errors
    /// As [`Journal::apply`].
    pub fn rows<R: DeserializeOwned>(&self, prefix: &str) -> Result<Vec<(String, R)>, JournalError> {
        self.check_alive()?;
        let txn = self.db.begin_read().map_err(failed)?;
        let table = txn.open_table(ROWS).map_err(failed)?;
        let mut rows = Vec::new();
        for entry in table.range(prefix..).map_err(failed)? {
            let (key, value) = entry.map_err(failed)?;
            if !key.value().starts_with(prefix) {
                break;
            }
            rows.push((key.value().to_owned(), decode(key.value(), value.value())?));
        }
        Ok(rows)
    }

    /// Lines of the log after number `after`, oldest first, at most `limit`.
    ///
    /// # Errors
    /// As [`Journal::apply`].
    pub fn log(&self, after: u64, limit: usize) -> Result<Vec<LogEntry>, JournalError> {
        self.check_alive()?;
        let txn = self.db.begin_read().map_err(failed)?;
        let table = txn.open_table(LOG).map_err(failed)?;
        let mut lines = Vec::new();
        for entry in table.range(after.saturating_add(1)..).map_err(failed)?.take(limit) {
            let (seq, value) = entry.map_err(failed)?;
            lines.push(LogEntry { seq: seq.value(), ..decode("log", value.value())? });
        }
        Ok(lines)
    }

    /// The number of the last line of the log; 0 if it is empty.
    pub fn last_seq(&self) -> u64 {
        *self.next_seq.lock().unwrap_or_else(|poisoned| poisoned.into_inner()) - 1
    }
}

fn builder() -> redb::Builder {
    let mut builder = Database::builder();
    builder.set_cache_size(CACHE_BYTES).set_check_integrity_on_open(true);
    builder
}

fn open_error(path: &Path, error: redb::Error) -> OpenError {
    match error {
        redb::Error::DatabaseAlreadyOpen => OpenError::InUse { path: path.to_owned() },
        error => OpenError::Damaged { path: path.to_owned(), source: Box::new(error) },
    }
}

fn check(
    path: &Path,
    options: &Options,
    schema: u32,
    found: Option<&Guard>,
    expected: Option<&Guard>,
) -> Result<(), OpenError> {
    if schema > options.schema {
        return Err(OpenError::Newer { path: path.to_owned(), found: schema, known: options.schema });
    }
    let name = |guard: &Guard| format!("{} ({})", guard.owner, guard.identity);
    let replaced = |expected: String, found: String| OpenError::Replaced { path: path.to_owned(), expected, found };
    match (found, expected) {
        (Some(found), _) if found.owner != options.owner => Err(replaced(options.owner.clone(), name(found))),
        (None, Some(expected)) => Err(replaced(name(expected), "an empty journal".to_owned())),
        (Some(found), Some(expected)) if found.identity != expected.identity => {
            Err(replaced(name(expected), name(found)))
        }
        (Some(found), Some(expected)) if found.generation < expected.generation => {
            Err(OpenError::Older { path: path.to_owned(), expected: expected.generation, found: found.generation })
        }
        _ => Ok(()),
    }
}

fn read_meta<T: DeserializeOwned>(meta: &redb::Table<'_, &str, &[u8]>, key: &str) -> Result<Option<T>, redb::Error> {
    let Some(value) = meta.get(key)? else { return Ok(None) };
    serde_json::from_slice(value.value())
        .map(Some)
        .map_err(|error| redb::Error::Corrupted(format!("meta row {key}: {error}")))
}

fn write_meta<T: Serialize>(meta: &mut redb::Table<'_, &str, &[u8]>, key: &str, value: &T) -> Result<(), redb::Error> {
    let bytes =
        serde_json::to_vec(value).map_err(|error| redb::Error::Corrupted(format!("meta row {key}: {error}")))?;
    meta.insert(key, bytes.as_slice())?;
    Ok(())
}

fn encode<T: Serialize>(key: &str, value: &T) -> Result<Vec<u8>, JournalError> {
    serde_json::to_vec(value).map_err(|source| JournalError::Row { key: key.to_owned(), source })
}

fn decode<T: DeserializeOwned>(key: &str, bytes: &[u8]) -> Result<T, JournalError> {
    serde_json::from_slice(bytes).map_err(|source| JournalError::Row { key: key.to_owned(), source })
}
