//! The small file beside the journal that says which journal belongs here.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

/// What the guard and the journal's `meta` table both say.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Guard {
    /// Random, hex, made with the journal.
    pub(crate) identity: String,
    /// Whose journal it is.
    pub(crate) owner: String,
    /// How often it was opened.
    pub(crate) generation: u64,
}

/// `journal.redb` -> `journal.redb.guard`.
pub(crate) fn path_of(journal: &Path) -> PathBuf {
    let mut name = journal.as_os_str().to_owned();
    name.push(".guard");
    PathBuf::from(name)
}

/// Reads the guard; `None` if there is none.
pub(crate) fn read(path: &Path) -> io::Result<Option<Guard>> {
    let text = match fs::read(path) {
        Ok(text) => text,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(error),
    };
    serde_json::from_slice(&text).map(Some).map_err(io::Error::other)
}

/// Replaces the guard: written beside, synced, renamed, directory synced. A crash leaves the old one or the new one.
pub(crate) fn write(path: &Path, guard: &Guard) -> io::Result<()> {
    let mut beside = path.as_os_str().to_owned();
    beside.push(".new");
    let beside = PathBuf::from(beside);
    let mut file = File::create(&beside)?;
    file.write_all(&serde_json::to_vec(guard).map_err(io::Error::other)?)?;
    file.sync_all()?;
    fs::rename(&beside, path)?;
    sync_directory_of(path)
}

/// Makes the names in `path`'s directory durable.
pub(crate) fn sync_directory_of(path: &Path) -> io::Result<()> {
    let directory = path.parent().filter(|parent| !parent.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

/// 128 random bits as hex, from the kernel.
pub(crate) fn random_identity() -> io::Result<String> {
    let mut bytes = [0u8; 16];
    File::open("/dev/urandom")?.read_exact(&mut bytes)?;
    Ok(bytes.iter().map(|byte| format!("{byte:02x}")).collect())
}
