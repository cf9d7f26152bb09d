//! Why a clone does not start, or is not detached.

use std::path::{Path, PathBuf};

use crate::engine::OpenError;
use crate::export::ListenError;
use crate::export::claim::ClaimError;
use crate::origin::NotConnected;

/// Why a clone cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    /// Another process runs it.
    #[error("a clone runs with the map {} already", .0.display())]
    InUse(PathBuf),
    /// The origin does not answer.
    #[error(transparent)]
    Origin(#[from] NotConnected),
    /// The origin or the destination is in use, or cannot be opened.
    #[error(transparent)]
    Claim(#[from] ClaimError),
    /// What is named is not what the map is of.
    #[error("{} says that the clone's {what} is {recorded}, not {named}", record.display())]
    AnotherClone {
        /// Where that is recorded.
        record: PathBuf,
        /// `origin` or `destination`.
        what: &'static str,
        /// As recorded.
        recorded: String,
        /// As named.
        named: String,
    },
    /// It is not known what the map is of.
    #[error("there is a map at {} and no record of its clone at {}", meta.display(), record.display())]
    NoRecord {
        /// The map.
        meta: PathBuf,
        /// Where its record should be.
        record: PathBuf,
    },
    /// The destination is not empty and has no map: it is not known which of its bytes are the origin's.
    #[error("{} holds data and has no map at {}", destination.display(), meta.display())]
    NotEmpty {
        /// Which.
        destination: PathBuf,
        /// Where its map would be.
        meta: PathBuf,
    },
    /// There is a map and no destination, or one of another size.
    #[error("{} is not what the map at {} is of: it {what}", destination.display(), meta.display())]
    NotItsMap {
        /// Which.
        destination: PathBuf,
        /// The map.
        meta: PathBuf,
        /// What is wrong with the destination.
        what: String,
    },
    /// The destination is a device with too little room.
    #[error("{} has {found} bytes, the origin has {wanted}", destination.display())]
    TooSmall {
        /// Which.
        destination: PathBuf,
        /// Its bytes.
        found: u64,
        /// The origin's.
        wanted: u64,
    },
    /// The map has no room.
    #[error("the map needs {wanted} bytes and {} has {found} left", directory.display())]
    NoRoom {
        /// Where it would be.
        directory: PathBuf,
        /// Bytes that are free there.
        found: u64,
        /// Bytes of the map.
        wanted: u64,
    },
    /// The origin is another than the one that was begun with, or was cut or grew.
    #[error("{} has {found} bytes, and the clone was begun of one with {expected}", origin.display())]
    OriginSize {
        /// Which.
        origin: PathBuf,
        /// Its bytes.
        found: u64,
        /// Those that it had.
        expected: u64,
    },
    /// The origin is no size that a clone can have.
    #[error("the origin cannot be cloned: {0}")]
    Size(String),
    /// The map is damaged, or another clone's.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The serving address cannot be had.
    #[error(transparent)]
    Serve(#[from] ListenError),
    /// A file cannot be had.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

pub(super) fn io(action: &'static str, path: &Path, source: std::io::Error) -> StandaloneError {
    StandaloneError::Io { action, path: path.to_owned(), source }
}

/// Why a clone cannot be detached from its origin.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Blocks are missing.
    #[error("{0} bytes are still only at the origin")]
    Missing(u64),
    /// It cannot be recorded, or the medium failed.
    #[error("{0}")]
    Failed(String),
}
