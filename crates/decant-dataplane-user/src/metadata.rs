//! `volume.json`: what this worker durably knows about a volume besides its bytes.
//!
//! Written whole to a temporary file, synced, renamed over the old one, and the directory synced: after a power cut there is
//! the old text or the new one. The handoff's truth is the agent's journal; this file says what the files beside it are.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use decant_base::{Bytes, Epoch, MigrationId};
use decant_dataplane::{ExportSecret, Geometry, MissingPolicy, Origin, Verification};
use serde::{Deserialize, Serialize};

use crate::site::VolumePaths;

/// The format's version; another is refused.
const VERSION: u32 = 1;

/// The content of `volume.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Metadata {
    /// [`VERSION`].
    version: u32,
    /// The shape of the volume.
    pub geometry: Geometry,
    /// Bytes of LUKS2 header before the payload in the image here.
    pub header: Bytes,
    /// The owner's epoch, a mirror of the journal's.
    pub epoch: Epoch,
    /// What the files are.
    pub state: State,
    /// The port that the volume's exports had; tried first for the next one, so that a peer finds it again.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<u16>,
    /// The last export.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub exported: Option<Exported>,
    /// Limit of hydration, bytes per second.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub limit: Option<Bytes>,
    /// What reads of missing blocks get while the origin is away.
    #[serde(default)]
    pub policy: MissingPolicy,
    /// The last migration whose verification ended here, so that asking again gives the same answer.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub verified: Option<(MigrationId, Verification)>,
}

/// An export, as it was opened.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Exported {
    /// For.
    pub migration: MigrationId,
    /// SHA-256, hex, of the header as it was sent.
    pub header_digest: String,
    /// What the reader of an iSCSI export was told.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub secret: Option<ExportSecret>,
}

/// What every version of the file says.
#[derive(Deserialize)]
struct Versioned {
    version: u32,
}

/// What the files of a volume are.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "is")]
pub enum State {
    /// Being made by `Create`; half-made after a crash, and then made anew.
    Creating,
    /// Whole.
    Whole,
    /// Being made by `Prepare`.
    Preparing {
        /// For.
        migration: MigrationId,
    },
    /// Made for a migration, not begun.
    Prepared {
        /// For.
        migration: MigrationId,
        /// SHA-256, hex, of the source's header as it came.
        header_digest: String,
        /// Bytes set aside for it.
        room: Bytes,
        /// Whence, once it is assembled.
        #[serde(default, skip_serializing_if = "Option::is_none")]
        origin: Option<Origin>,
    },
    /// A clone that is still filling.
    Clone {
        /// Of.
        migration: MigrationId,
        /// Whence.
        origin: Origin,
        /// Bytes set aside for it.
        room: Bytes,
    },
    /// Read by its new owner, written by nobody.
    Sealed {
        /// For.
        migration: MigrationId,
        /// SHA-256 fingerprint of the certificate that may read.
        peer: String,
    },
    /// The payload is discarded; only this file is left.
    Freed,
}

/// Why metadata cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub enum MetadataError {
    /// The file system says no.
    #[error("{path}: {source}")]
    Io {
        /// Which file.
        path: String,
        /// Why.
        source: std::io::Error,
    },
    /// Damaged, or of another version.
    #[error("{path} is damaged: {source}; restore it from a backup, or delete the volume")]
    Damaged {
        /// Which file.
        path: String,
        /// Why.
        source: serde_json::Error,
    },
    /// Written by another version of this program.
    #[error("{path} has format version {version}, this program knows {VERSION}; use the program that wrote it")]
    Version {
        /// Which file.
        path: String,
        /// What it says.
        version: u32,
    },
}

impl Metadata {
    /// A new volume's.
    pub fn new(geometry: Geometry, header: Bytes, state: State) -> Self {
        Self {
            version: VERSION,
            geometry,
            header,
            epoch: Epoch::default(),
            state,
            port: None,
            exported: None,
            limit: None,
            policy: MissingPolicy::default(),
            verified: None,
        }
    }

    /// Reads it; `None` if there is none.
    ///
    /// # Errors
    /// See [`MetadataError`].
    pub fn load(paths: &VolumePaths) -> Result<Option<Self>, MetadataError> {
        let path = paths.metadata();
        let shown = path.display().to_string();
        let text = match std::fs::read(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(MetadataError::Io { path: shown, source }),
        };
        let parsed = serde_json::from_slice::<Versioned>(&text).and_then(|versioned| match versioned.version {
            VERSION => serde_json::from_slice(&text).map(Ok),
            version => Ok(Err(version)),
        });
        match parsed {
            Ok(Ok(metadata)) => Ok(Some(metadata)),
            Ok(Err(version)) => Err(MetadataError::Version { path: shown, version }),
            Err(source) => Err(MetadataError::Damaged { path: shown, source }),
        }
    }

    /// Replaces the file durably.
    ///
    /// # Errors
    /// See [`MetadataError`]; the old text is then still there.
    pub fn store(&self, paths: &VolumePaths) -> Result<(), MetadataError> {
        let path = paths.metadata();
        let text = serde_json::to_vec_pretty(self).map_err(std::io::Error::other);
        text.and_then(|text| replace(&paths.state, &path, &text))
            .map_err(|source| MetadataError::Io { path: path.display().to_string(), source })
    }
}

fn replace(directory: &Path, path: &Path, text: &[u8]) -> std::io::Result<()> {
    let temporary = path.with_extension("json.new");
    let mut file = File::create(&temporary)?;
    file.write_all(text)?;
    file.sync_data()?;
    std::fs::rename(&temporary, path)?;
    File::open(directory)?.sync_all()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_stored_is_loaded_and_damage_is_named() {
        let directory = tempfile::tempdir().unwrap();
        let paths = VolumePaths { state: directory.path().into(), run: directory.path().into() };
        assert_eq!(Metadata::load(&paths).unwrap(), None);
        let geometry = Geometry {
            size: Bytes::gib(1),
            sector_size: 4096,
            cipher: "aes-xts-plain64".into(),
            key_bytes: 64,
            iv_tweak: 0,
        };
        let migration = MigrationId::new("m-1").unwrap();
        let mut metadata = Metadata::new(geometry, Bytes::mib(16), State::Preparing { migration });
        metadata.store(&paths).unwrap();
        metadata.state = State::Whole;
        metadata.epoch = Epoch(7);
        metadata.store(&paths).unwrap();
        assert_eq!(Metadata::load(&paths).unwrap(), Some(metadata));

        std::fs::write(paths.metadata(), r#"{"version":9,"new":1}"#).unwrap();
        assert!(matches!(Metadata::load(&paths), Err(MetadataError::Version { version: 9, .. })));
        std::fs::write(paths.metadata(), "{").unwrap();
        assert!(matches!(Metadata::load(&paths), Err(MetadataError::Damaged { .. })));
    }
}
