//! What a clone is filled into: what it must be, and that nothing on it is lost by mistake.

use std::os::unix::fs::PermissionsExt;
use std::path::Path;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::error::{StandaloneError, io};
use super::record::Found;
use super::{Made, StandaloneOptions};
use crate::engine::beside;
use crate::export::claim::{Claim, claim};
use crate::stream::Aligned;

const MIB: u64 = 1 << 20;
/// How much is looked at in each place but the first and the last.
const PIECE: u64 = 64 << 10;
/// Places looked at between the first MiB and the last, evenly spread.
const PLACES: u64 = 64;
/// Where a copy of btrfs's superblock lies; those of other file systems, volume managers and partition tables are in the first
/// MiB or the last.
const COPIES: [u64; 2] = [64 << 20, 256 << 30];

/// Opens the destination, and sees to it that it is what `found` says.
pub(super) fn open(
    options: &StandaloneOptions,
    size: u64,
    found: &Found,
    made: &mut Made,
) -> Result<Claim, StandaloneError> {
    let path = &options.destination;
    let not_its_map =
        |what: String| StandaloneError::NotItsMap { destination: path.clone(), meta: options.meta.clone(), what };
    let fresh = *found == Found::Nothing;
    if is_missing(path) {
        if !fresh {
            return Err(not_its_map("is missing".into()));
        }
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|source| io("make", path, source))?;
        made.0.push(path.clone());
        // What a machine keeps on its disk is nobody else's to read.
        file.set_permissions(PermissionsExt::from_mode(0o600)).map_err(|source| io("make", path, source))?;
    }
    let image = claim(path, true)?;
    if image.is_block_device && image.size < size {
        return Err(StandaloneError::TooSmall { destination: path.clone(), found: image.size, wanted: size });
    }
    if !fresh && !image.is_block_device && image.size != size {
        return Err(not_its_map(format!("has {} bytes, not {size}", image.size)));
    }
    if fresh && !options.overwrite {
        let holds_data = if image.is_block_device { device_holds_data(&image) } else { file_holds_data(&image, size) };
        if holds_data.map_err(|error| io("read", path, error.into()))? {
            return Err(StandaloneError::NotEmpty { destination: path.clone(), meta: options.meta.clone() });
        }
    }
    if !image.is_block_device {
        image.file.set_len(size).map_err(|source| io("size", path, source))?;
    }
    Ok(image)
}

/// Whether there is nothing of that name, a dead link included.
pub(super) fn is_missing(path: &Path) -> bool {
    std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound)
}

/// A start that was killed before there was a map has left a hole of the origin's size.
fn file_holds_data(image: &Claim, size: u64) -> Result<bool, Errno> {
    if image.size == 0 {
        return Ok(false);
    }
    let is_hole = rustix::fs::seek(&image.file, SeekFrom::Data(0)) == Err(Errno::NXIO);
    Ok(!(image.size == size && is_hole))
}

/// Looks where everything that manages disks leaves its mark, and in some places between. A device that was discarded or never
/// written reads as zeros.
fn device_holds_data(image: &Claim) -> Result<bool, Errno> {
    let size = image.size;
    let ends = [0..MIB.min(size), size.saturating_sub(MIB)..size];
    let piece = |at: u64| at / PIECE * PIECE..(at / PIECE * PIECE + PIECE).min(size);
    let spread = (1..PLACES).map(|n| piece((u128::from(size) * u128::from(n) / u128::from(PLACES)) as u64));
    let copies = COPIES.into_iter().filter(|at| *at < size).map(piece);
    let mut buffer = Aligned::new(PIECE as usize);
    for place in ends.into_iter().chain(spread).chain(copies) {
        for at in place.clone().step_by(PIECE as usize) {
            let bytes = buffer.slice_mut(0..(place.end - at).min(PIECE) as usize);
            image.read(at, bytes)?;
            if bytes.iter().any(|byte| *byte != 0) {
                return Ok(true);
            }
        }
    }
    Ok(false)
}

/// That a map of `wanted` bytes has room beside `meta`, where none is. What a start that was killed had reserved for its own is
/// given back first; the caller holds the lock.
pub(super) fn make_room(meta: &Path, wanted: u64) -> Result<(), StandaloneError> {
    let reserved = beside(meta, "new");
    match std::fs::remove_file(&reserved) {
        Ok(()) => {}
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("remove", &reserved, error)),
    }
    let directory = meta.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    let room = rustix::fs::statvfs(directory).map_err(|error| io("look at", directory, error.into()))?;
    let found = room.f_bavail.saturating_mul(room.f_frsize);
    if found < wanted {
        return Err(StandaloneError::NoRoom { directory: directory.to_owned(), found, wanted });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::FileExt;

    use super::*;

    #[test]
    fn what_a_killed_start_reserved_for_its_map_is_no_want_of_room() {
        let directory = tempfile::tempdir().unwrap();
        let meta = directory.path().join("map");
        let reserved = beside(&meta, "new");
        std::fs::write(&reserved, [1; 4096]).unwrap();
        assert!(matches!(make_room(&meta, u64::MAX), Err(StandaloneError::NoRoom { .. })));
        assert!(!reserved.exists());
        make_room(&meta, 0).unwrap();
    }

    #[test]
    fn data_are_found_wherever_a_file_system_leaves_its_mark() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let size = (1 << 40) + 512;
        for at in [0, 1024, 65_600, size - 17_408, size - 512, size / 2, 64 << 20, 256 << 30] {
            std::fs::write(&path, "").unwrap();
            let file = std::fs::File::options().read(true).write(true).open(&path).unwrap();
            file.set_len(size).unwrap();
            let image = |file: &std::fs::File| Claim { file: file.try_clone().unwrap(), size, is_block_device: true };
            assert_eq!(device_holds_data(&image(&file)), Ok(false));
            file.write_all_at(&[1], at).unwrap();
            assert_eq!(device_holds_data(&image(&file)), Ok(true), "a byte at {at}");
        }
    }
}
