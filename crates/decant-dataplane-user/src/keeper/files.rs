//! The image's header, made and opened where the key is kept.

use std::fs::File;
use std::path::Path;

use decant_dataplane::{Failure, FailureCode, Geometry};

use super::KeeperSpec;
use crate::control::Work;
use crate::header::{self, ExportedHeader, Unlocked};
use crate::keys::SecretMemory;

fn io(path: &Path, action: &str, error: &std::io::Error) -> Failure {
    let code = match error.kind() {
        std::io::ErrorKind::StorageFull => FailureCode::Refused,
        _ => FailureCode::Retry,
    };
    Failure { code, message: format!("{action} {} failed: {error}; check the disk (df, dmesg)", path.display()) }
}

/// An empty image, in the place of a half-made one.
fn new_image(spec: &KeeperSpec) -> Result<File, Failure> {
    let paths = spec.site.paths(&spec.volume);
    let image = paths.image();
    let made = File::options().read(true).write(true).create(true).truncate(true).open(&image);
    let file = made.map_err(|error| io(&image, "making", &error))?;
    // The name is durable before anybody relies on the file.
    let synced = File::open(&paths.state).and_then(|directory| directory.sync_all());
    synced.map_err(|error| io(&paths.state, "syncing", &error))?;
    Ok(file)
}

fn keep(unlocked: &Unlocked) -> Result<SecretMemory, Failure> {
    let memory = SecretMemory::new(&unlocked.key)
        .map_err(|error| Failure { code: FailureCode::Refused, message: error.to_string() })?;
    tracing::info!(kind = %memory.kind(), "the volume key is in memory");
    Ok(memory)
}

/// Makes the image with a fresh key.
pub(super) fn format(spec: &KeeperSpec, geometry: &Geometry) -> Result<SecretMemory, Failure> {
    let passphrase = spec.site.keys.provide(&spec.volume).map_err(header::HeaderError::from)?;
    let file = new_image(spec)?;
    keep(&header::create(&file, spec.site.header, geometry.size, geometry.sector_size, &passphrase)?)
}

/// Makes the image around the key in the source's header.
pub(super) fn adopt(spec: &KeeperSpec, geometry: &Geometry, source: &str) -> Result<SecretMemory, Failure> {
    let passphrase = spec.site.keys.passphrase(&spec.volume).map_err(header::HeaderError::from)?;
    let file = new_image(spec)?;
    keep(&header::rewrap(&file, source, geometry, spec.site.header, &passphrase)?)
}

fn open(spec: &KeeperSpec) -> Result<File, Failure> {
    let image = spec.site.paths(&spec.volume).image();
    let opened = File::options().read(true).write(true).open(&image);
    opened.map_err(|error| io(&image, "opening", &error))
}

/// Opens the image's header, which must say what the metadata says.
pub(super) fn unlock(spec: &KeeperSpec, work: &Work) -> Result<SecretMemory, Failure> {
    let unlocked = header::unlock(&open(spec)?, &spec.site.keys, &spec.volume)?;
    if unlocked.geometry != work.geometry || unlocked.payload_offset != work.header.0 {
        let message = format!(
            "the LUKS2 header of volume {} and its volume.json disagree about size, sector size, tweak or payload offset; restore one of them from a backup",
            spec.volume
        );
        return Err(Failure { code: FailureCode::Stuck, message });
    }
    keep(&unlocked)
}

/// The header area as an export's peer needs it.
pub(super) fn header_area(spec: &KeeperSpec) -> Result<ExportedHeader, Failure> {
    Ok(header::export_header(&open(spec)?)?)
}
