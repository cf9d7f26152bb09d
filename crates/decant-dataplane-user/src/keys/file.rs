//! A directory with one file for each volume.

use std::fs::{DirBuilder, File, OpenOptions};
use std::io::{ErrorKind, Read, Write};
use std::os::unix::fs::{DirBuilderExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use decant_base::VolumeId;
use decant_luks2::Passphrase;
use zeroize::Zeroizing;

use super::{KeyError, MOST_BYTES};

/// Where the passphrase of `volume` is. An id is a DNS label and cannot leave the directory.
pub(super) fn path(directory: &Path, volume: &VolumeId) -> PathBuf {
    directory.join(format!("{volume}.key"))
}

/// Reads it, if nobody else could have.
pub(super) fn read(path: &Path) -> Result<Passphrase, KeyError> {
    let io = |action| move |source| KeyError::Io { action, path: path.to_owned(), source };
    // Not through a symbolic link, and without waiting for the other end of a pipe.
    let flags = libc::O_NOFOLLOW | libc::O_NONBLOCK;
    let file = OpenOptions::new().read(true).custom_flags(flags).open(path).map_err(|source| match source.kind() {
        ErrorKind::NotFound => KeyError::FileMissing { path: path.to_owned() },
        _ if source.raw_os_error() == Some(libc::ELOOP) => KeyError::NotAFile { path: path.to_owned() },
        _ => io("opening")(source),
    })?;
    let metadata = file.metadata().map_err(io("reading"))?;
    if !metadata.is_file() {
        return Err(KeyError::NotAFile { path: path.to_owned() });
    }
    let (mode, owner) = (metadata.mode() & 0o7777, metadata.uid());
    if mode & 0o077 != 0 || (owner != 0 && owner != rustix::process::geteuid().as_raw()) {
        return Err(KeyError::FileExposed { path: path.to_owned(), mode, owner });
    }
    // Room for all of it from the start: a vector that grows leaves copies behind.
    let mut bytes = Zeroizing::new(Vec::with_capacity(MOST_BYTES + 1));
    let mut limited = file.take(MOST_BYTES as u64 + 1);
    let mut chunk = Zeroizing::new([0u8; 128]);
    loop {
        match limited.read(chunk.as_mut()) {
            Ok(0) => break,
            Ok(length) => bytes.extend_from_slice(chunk.get(..length).unwrap_or_default()),
            Err(error) if error.kind() == ErrorKind::Interrupted => {}
            Err(error) => return Err(io("reading")(error)),
        }
    }
    super::passphrase(bytes, || path.display().to_string())
}

/// Makes `path` durably, unless it is there: written and synced under another name first, then linked, which fails rather
/// than replaces; then the directory is synced. After a power cut there is the whole file or none.
pub(super) fn publish(directory: &Path, path: &Path, passphrase: &Passphrase) -> Result<(), KeyError> {
    let io = |action| move |source| KeyError::Io { action, path: path.to_owned(), source };
    DirBuilder::new().recursive(true).mode(0o700).create(directory).map_err(io("making the directory of"))?;
    // One name per process: two that make the same key meet at the link, not here.
    let temporary = path.with_extension(format!("key.new-{}", std::process::id()));
    let _ = std::fs::remove_file(&temporary);
    let write = || -> std::io::Result<()> {
        let mut file = OpenOptions::new().write(true).create_new(true).mode(0o600).open(&temporary)?;
        file.write_all(passphrase.expose())?;
        file.sync_all()?;
        match std::fs::hard_link(&temporary, path) {
            Err(error) if error.kind() == ErrorKind::AlreadyExists => Ok(()),
            other => other,
        }
    };
    let written = write();
    let _ = std::fs::remove_file(&temporary);
    written.map_err(io("writing"))?;
    File::open(directory).and_then(|directory| directory.sync_all()).map_err(io("syncing the directory of"))
}
