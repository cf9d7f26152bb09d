//! What a map is of: the record beside it, and the lock that one process has it by.
//!
//! | file | is there | says |
//! |---|---|---|
//! | `META.lock` | while a clone runs, or was killed | nothing; the running one holds a lock on it |
//! | `META.origin` | from before the map is made until after it is gone | the clone's id, size, origin and destination |
//! | `META` | until the clone is detached | which blocks are here; its volume is the clone's id |
//! | `META.done` | once it is detached | what `META.origin` said |
//!
//! Order: the record is durable before the map is in its place; `META.done` is durable before the map goes, and the record goes
//! last. So a map has a record at any time, and a record without a map means nothing. The id is drawn anew for each clone, and
//! is in the head of the marks file too: the map, the marks and the record of different clones never pass for each other's.

use std::fs::File;
use std::io::{self, Write};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use decant_clone::format::{PAGE, Phase, Superblock};
use rustix::fs::FlockOperation;
use rustix::io::Errno;
use serde::{Deserialize, Serialize};

use super::error::{StandaloneError, io};
use crate::engine::beside;

/// Where a destination is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Place {
    /// Absolute; of a file without symbolic links, of a device as it was given, since what links lead to changes with each boot.
    pub(super) path: String,
    /// What names a block device whatever its path, where the kernel knows something.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) device: Option<String>,
}

impl Place {
    /// Of what is at `path`.
    pub(super) fn of(path: &Path) -> io::Result<Self> {
        let meta = std::fs::metadata(path)?;
        if !meta.file_type().is_block_device() {
            return Ok(Self { path: text(&path.canonicalize()?), device: None });
        }
        Ok(Self { path: text(&std::path::absolute(path)?), device: device_id(meta.rdev()) })
    }

    /// Whether both are the same: devices by what names them, if it is known of both.
    fn is(&self, other: &Self) -> bool {
        match (&self.device, &other.device) {
            (Some(one), Some(other)) => one == other,
            _ => self.path == other.path,
        }
    }
}

impl std::fmt::Display for Place {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match &self.device {
            Some(device) => write!(f, "{} ({device})", self.path),
            None => f.write_str(&self.path),
        }
    }
}

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

/// What the kernel says that a block device is: the id of a device-mapper volume, what a loop device is on, a disk's WWID or
/// serial number, and which partition of it.
fn device_id(number: u64) -> Option<String> {
    let (major, minor) = (rustix::fs::major(number), rustix::fs::minor(number));
    let mut directory = std::fs::canonicalize(format!("/sys/dev/block/{major}:{minor}")).ok()?;
    let read = |directory: &Path, name: &str| {
        let text = std::fs::read_to_string(directory.join(name)).ok()?;
        let text = text.trim();
        (!text.is_empty()).then(|| text.to_owned())
    };
    let partition = read(&directory, "partition").map(|number| format!(", partition {number}")).unwrap_or_default();
    if !partition.is_empty() {
        directory = directory.parent()?.to_owned();
    }
    let names =
        ["dm/uuid", "loop/backing_file", "wwid", "device/wwid", "serial", "device/serial", "device/cid", "md/uuid"];
    let (name, id) = names.into_iter().find_map(|name| Some((name, read(&directory, name)?)))?;
    let offset =
        if name.starts_with("loop") { read(&directory, "loop/offset").unwrap_or_default() } else { String::new() };
    let offset = if offset.is_empty() || offset == "0" { String::new() } else { format!(", offset {offset}") };
    Some(format!("{name} {id}{offset}{partition}"))
}

/// What a map is of.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Record {
    /// The clone's id, drawn when it was begun.
    pub(super) clone: String,
    /// Bytes.
    pub(super) size: u64,
    /// As it was given; a path is absolute.
    pub(super) origin: String,
    pub(super) destination: Place,
}

impl Record {
    /// An id that no other clone has.
    pub(super) fn draw_id() -> io::Result<String> {
        let mut random = [0; 16];
        getrandom::fill(&mut random).map_err(|error| io::Error::other(format!("no random numbers: {error}")))?;
        Ok(format!("clone-{:032x}", u128::from_be_bytes(random)))
    }

    fn read(path: &Path) -> Result<Option<Self>, StandaloneError> {
        let text = match std::fs::read(path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(error) => return Err(io("read", path, error)),
        };
        serde_json::from_slice(&text).map(Some).map_err(|error| io("understand", path, error.into()))
    }

    /// Durable and in its place at once.
    pub(super) fn write(&self, path: &Path) -> io::Result<()> {
        let new = beside(path, "new");
        let mut file = File::create(&new)?;
        serde_json::to_writer(&mut file, self)?;
        file.write_all(b"\n")?;
        file.sync_all()?;
        std::fs::rename(&new, path)?;
        sync_directory(path)
    }

    /// Whether these are its origin and destination.
    pub(super) fn check(&self, path: &Path, origin: &str, destination: &Place) -> Result<(), StandaloneError> {
        let another = |what, recorded: String, named: String| StandaloneError::AnotherClone {
            record: path.to_owned(),
            what,
            recorded,
            named,
        };
        if self.origin != origin {
            return Err(another("origin", self.origin.clone(), origin.to_owned()));
        }
        if !self.destination.is(destination) {
            return Err(another("destination", self.destination.to_string(), destination.to_string()));
        }
        Ok(())
    }
}

/// How an origin is recorded: a path is absolute, so that it means the same wherever a clone is started.
pub(super) fn origin_text(origin: &str) -> String {
    if origin.contains("://") {
        return origin.to_owned();
    }
    std::path::absolute(origin).map_or_else(|_| origin.to_owned(), |path| text(&path))
}

pub(super) fn sync_directory(of: &Path) -> io::Result<()> {
    let directory = of.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

/// The map's name as it is on disk, so that two ways to it are one.
pub(super) fn real_path(meta: &Path) -> PathBuf {
    if let Ok(real) = meta.canonicalize() {
        return real;
    }
    let directory = meta.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    match (directory.canonicalize(), meta.file_name()) {
        (Ok(directory), Some(name)) => directory.join(name),
        _ => meta.to_owned(),
    }
}

/// What there is of a clone already.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Found {
    Nothing,
    /// A map.
    Map {
        /// The clone's id.
        clone: String,
        /// Its bytes.
        size: u64,
        /// All of them are here; the map was not removed yet.
        complete: bool,
    },
    /// All of it, detached: so many bytes.
    Whole {
        /// The clone's id.
        clone: String,
        /// Its bytes.
        size: u64,
    },
}

/// What lies at `meta`, and the record of it. One of another clone counts as none.
pub(super) fn look(meta: &Path) -> Result<(Found, Option<Record>), StandaloneError> {
    if let Some(superblock) = superblock(meta)? {
        let record = Record::read(&beside(meta, "origin"))?.filter(|record| record.clone == superblock.volume);
        let complete = superblock.phase == Phase::Complete;
        return Ok((Found::Map { clone: superblock.volume, size: superblock.size, complete }, record));
    }
    match Record::read(&beside(meta, "done"))? {
        Some(record) => Ok((Found::Whole { clone: record.clone.clone(), size: record.size }, Some(record))),
        None => Ok((Found::Nothing, None)),
    }
}

/// The newer superblock of the map, if there is one.
fn superblock(meta: &Path) -> Result<Option<Superblock>, StandaloneError> {
    use std::os::unix::fs::FileExt;
    let map = match File::open(meta) {
        Ok(map) => map,
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
        Err(error) => return Err(io("open", meta, error)),
    };
    // Two, of which one may be torn.
    let mut page = [0; PAGE];
    let both =
        [0, PAGE as u64].map(|at| map.read_exact_at(&mut page, at).ok().and_then(|()| Superblock::decode(&page).ok()));
    let newest = both.into_iter().flatten().max_by_key(|superblock| superblock.generation);
    let none = || io::Error::new(io::ErrorKind::InvalidData, "it is no map of a clone");
    newest.map(Some).ok_or_else(|| io("use as map", meta, none()))
}

/// One process has this map. Let go of when it is dropped; what a killed one leaves locks nobody out.
pub(super) struct Lock {
    path: PathBuf,
    _file: File,
}

impl Lock {
    pub(super) fn take(meta: &Path) -> Result<Self, StandaloneError> {
        let path = beside(meta, "lock");
        loop {
            let mut options = File::options();
            let file = options.read(true).write(true).create(true).truncate(false).open(&path);
            let file = file.map_err(|error| io("make", &path, error))?;
            match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
                Ok(()) => {}
                Err(Errno::AGAIN) => return Err(StandaloneError::InUse(meta.to_owned())),
                Err(error) => return Err(io("lock", &path, error.into())),
            }
            // Its last owner may have removed it while we waited for nothing.
            let found = file.metadata().map_err(|error| io("look at", &path, error))?;
            if std::fs::metadata(&path).is_ok_and(|now| (now.dev(), now.ino()) == (found.dev(), found.ino())) {
                return Ok(Self { path, _file: file });
            }
        }
    }
}

impl Drop for Lock {
    fn drop(&mut self) {
        // Before the lock goes: whoever has opened it by now finds out that it is not the file of that name any more.
        let _ = std::fs::remove_file(&self.path);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(origin: &str, path: &str, device: Option<&str>) -> Record {
        let destination = Place { path: path.into(), device: device.map(str::to_owned) };
        Record { clone: "clone-1".into(), size: 4096, origin: origin.into(), destination }
    }

    #[test]
    fn a_record_reads_back_and_knows_its_own() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("map.origin");
        let disk = record("nbd://a/b", "/dev/sda", Some("wwid naa.1"));
        disk.write(&path).unwrap();
        assert_eq!(Record::read(&path).unwrap(), Some(disk.clone()));
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 1);
        std::fs::write(&path, "4096\n").unwrap();
        assert!(Record::read(&path).is_err());

        let check = |origin: &str, place: &str, device: Option<&str>| {
            disk.check(&path, origin, &record("", place, device).destination).map_err(|error| error.to_string())
        };
        assert_eq!(check("nbd://a/b", "/dev/sda", Some("wwid naa.1")), Ok(()));
        // The disk decides, not the letter that it got at this boot.
        assert_eq!(check("nbd://a/b", "/dev/sdb", Some("wwid naa.1")), Ok(()));
        assert!(check("nbd://a/b", "/dev/sda", Some("wwid naa.2")).unwrap_err().contains("destination"));
        assert_eq!(check("nbd://a/b", "/dev/sda", None), Ok(()));
        assert!(check("nbd://a/b", "/dev/sdb", None).is_err());
        assert!(check("nbd://a/c", "/dev/sda", Some("wwid naa.1")).unwrap_err().contains("nbd://a/c"));
    }

    #[test]
    fn ids_are_names_of_volumes_and_differ() {
        let [one, other] = [Record::draw_id().unwrap(), Record::draw_id().unwrap()];
        assert_ne!(one, other);
        assert!(decant_base::VolumeId::new(&one).is_ok());
    }

    #[test]
    fn one_process_at_a_time_has_a_map() {
        let directory = tempfile::tempdir().unwrap();
        let meta = directory.path().join("vm-101.0");
        let lock = Lock::take(&meta).unwrap();
        assert!(matches!(Lock::take(&meta), Err(StandaloneError::InUse(_))));
        // The name of a disk is not taken for an ending.
        let _other = Lock::take(&directory.path().join("vm-101.1")).unwrap();
        drop(lock);
        assert!(!directory.path().join("vm-101.0.lock").exists());
        drop(Lock::take(&meta).unwrap());
        let link = directory.path().join("link");
        std::fs::write(&meta, "").unwrap();
        std::os::unix::fs::symlink(&meta, &link).unwrap();
        assert_eq!(real_path(&link), real_path(&meta));
    }
}
