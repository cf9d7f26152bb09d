//! Requests performed on a file.

use std::fs::File;
use std::io::{self, ErrorKind};
use std::os::unix::fs::FileExt as _;

use decant_iscsi::scsi::{Compare, DIGEST_BLOCK};
use decant_iscsi::target::{Failure, Outcome, Request};
use rustix::fs::{FallocateFlags, SeekFrom, fallocate, seek};
use rustix::io::Errno;

/// An outcome that owns what it says.
pub(crate) enum Owned {
    Done,
    Data(Vec<u8>),
    Mismatch(u64),
    Extents(Vec<(u64, bool)>),
    Digests(Vec<u32>),
    Failed(Failure),
}

impl Owned {
    pub(crate) fn as_outcome(&mut self) -> Outcome<'_, Vec<u8>> {
        match self {
            Self::Done => Outcome::Done,
            Self::Data(data) => Outcome::Data(std::mem::take(data)),
            Self::Mismatch(at) => Outcome::Mismatch(*at),
            Self::Extents(extents) => Outcome::Extents(extents),
            Self::Digests(digests) => Outcome::Digests(digests),
            Self::Failed(failure) => Outcome::Failed(*failure),
        }
    }
}

/// What became of a request, and the buffer that came with it.
pub(crate) struct Done {
    pub(crate) outcome: Owned,
    pub(crate) buffer: Option<Vec<u8>>,
}

/// Performs one request; `buffer` is the task's, or one to read into.
pub(crate) fn perform(file: &File, request: Request, mut buffer: Vec<u8>) -> Done {
    if let Request::Read { offset, length, fua } = request {
        buffer.resize(length as usize, 0);
        let result = if fua { file.sync_data() } else { Ok(()) };
        return match result.and_then(|()| file.read_exact_at(&mut buffer, offset)) {
            Ok(()) => Done { outcome: Owned::Data(buffer), buffer: None },
            Err(error) => Done { outcome: Owned::Failed(failure(&error, offset)), buffer: None },
        };
    }
    let outcome = try_perform(file, request, &buffer).unwrap_or_else(|error| Owned::Failed(failure(&error, 0)));
    Done { outcome, buffer: Some(buffer) }
}

fn try_perform(file: &File, request: Request, buffer: &[u8]) -> io::Result<Owned> {
    match request {
        Request::Write { offset, length, fua, .. } => {
            file.write_all_at(&buffer[..length as usize], offset)?;
            if fua {
                file.sync_data()?;
            }
        }
        Request::Verify { offset, length, compare } => {
            let mut found = vec![0; length as usize];
            file.read_exact_at(&mut found, offset)?;
            let expected = match compare {
                Compare::Nothing => return Ok(Owned::Done),
                Compare::All => buffer[..length as usize].to_vec(),
                Compare::OneBlock => buffer.iter().copied().cycle().take(length as usize).collect(),
            };
            if let Some(at) = found.iter().zip(&expected).position(|(a, b)| a != b) {
                return Ok(Owned::Mismatch(at as u64));
            }
        }
        Request::Fill { offset, length } => {
            let piece: Vec<u8> = buffer.iter().copied().cycle().take((1 << 20).min(length) as usize).collect();
            let mut at = 0;
            while at < length {
                let step = (length - at).min(piece.len() as u64);
                file.write_all_at(&piece[..step as usize], offset + at)?;
                at += step;
            }
        }
        Request::Zero { offset, length, unmap: false } => {
            let zeros = vec![0; (1 << 20).min(length) as usize];
            let mut at = 0;
            while at < length {
                let step = (length - at).min(zeros.len() as u64);
                file.write_all_at(&zeros[..step as usize], offset + at)?;
                at += step;
            }
        }
        Request::Zero { offset, length, unmap: true } | Request::Unmap { offset, length } => {
            fallocate(file, FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE, offset, length)?;
        }
        Request::Flush => file.sync_data()?,
        Request::Status { offset, extents } => return status(file, offset, extents).map(Owned::Extents),
        Request::Digests { offset, length } => {
            let mut found = vec![0; length as usize];
            file.read_exact_at(&mut found, offset)?;
            return Ok(Owned::Digests(found.chunks(DIGEST_BLOCK as usize).map(crc32c::crc32c).collect()));
        }
        Request::Read { .. } => {}
    }
    Ok(Owned::Done)
}

fn status(file: &File, offset: u64, most: u32) -> io::Result<Vec<(u64, bool)>> {
    let size = file.metadata()?.len();
    let mut extents = Vec::new();
    let mut at = offset;
    while at < size && extents.len() < most as usize {
        let data = match seek(file, SeekFrom::Data(at)) {
            Ok(data) => data,
            Err(Errno::NXIO) => size,
            Err(error) => return Err(error.into()),
        };
        let next = if data > at { data } else { seek(file, SeekFrom::Hole(at))? };
        extents.push((next - at, data == at));
        at = next;
    }
    Ok(extents)
}

fn failure(error: &io::Error, offset: u64) -> Failure {
    match error.kind() {
        ErrorKind::StorageFull => Failure::NoSpace,
        ErrorKind::ReadOnlyFilesystem | ErrorKind::PermissionDenied => Failure::ReadOnly,
        ErrorKind::UnexpectedEof => Failure::Medium(Some(offset)),
        _ => Failure::Medium(None),
    }
}
