//! Requests of the protocol, done on the device.

use std::sync::atomic::{AtomicBool, Ordering};

use decant_iscsi::scsi::Compare;
use decant_iscsi::target::{Failure, Outcome, Request};
use rustix::io::Errno;

use super::buffers::Buffer;
use crate::device::{Exported, Status};
use crate::export::read_waiting;
use crate::stream::Aligned;

/// Bytes read, compared or filled at a time.
const PIECE: usize = 256 * 1024;
/// Bytes whose allocation is asked for at a time.
const STATUS_WINDOW: u64 = 256 * 1024 * 1024;

/// An [`Outcome`] that owns what it says.
pub(super) enum Ended {
    Done,
    Data(Buffer),
    Mismatch(u64),
    Extents(Vec<(u64, bool)>),
    Digests(Vec<u32>),
    Failed(Failure),
}

impl Ended {
    /// As the protocol takes it.
    pub(super) fn with<T>(self, take: impl FnOnce(Outcome<'_, Buffer>) -> T) -> T {
        match self {
            Self::Done => take(Outcome::Done),
            Self::Data(data) => take(Outcome::Data(data)),
            Self::Mismatch(at) => take(Outcome::Mismatch(at)),
            Self::Extents(extents) => take(Outcome::Extents(&extents)),
            Self::Digests(digests) => take(Outcome::Digests(&digests)),
            Self::Failed(failure) => take(Outcome::Failed(failure)),
        }
    }
}

/// Does one request to its end, which may take long, or until it is `unwanted`. `data` are the bytes to write, to compare with,
/// or to fill with; writing may use them up.
pub(super) fn perform(device: &dyn Exported, request: Request, data: &mut [u8], unwanted: &AtomicBool) -> Ended {
    match try_perform(device, request, data, unwanted) {
        Ok(ended) => ended,
        Err((errno, at)) => Ended::Failed(failure(errno, at)),
    }
}

type Failed = (Errno, Option<u64>);

fn try_perform(
    device: &dyn Exported,
    request: Request,
    data: &mut [u8],
    unwanted: &AtomicBool,
) -> Result<Ended, Failed> {
    let plain = |errno| (errno, None);
    match request {
        Request::Read { .. } => Err((Errno::INVAL, None)),
        Request::Write { offset, length, fua, .. } => {
            let data = data.get_mut(..length as usize).ok_or((Errno::INVAL, None))?;
            device.write(offset, data).map_err(|errno| (errno, Some(offset)))?;
            if fua {
                device.flush().map_err(plain)?;
            }
            Ok(Ended::Done)
        }
        Request::Verify { offset, length, compare } => verify(device, offset, length, compare, data),
        Request::Fill { offset, length } => fill(device, offset, length, data, unwanted),
        Request::Zero { offset, length, unmap: false } => fill(device, offset, length, &[0; 512], unwanted),
        Request::Zero { offset, length, unmap: true } | Request::Unmap { offset, length } => {
            device.discard(offset, length).map_err(|errno| (errno, Some(offset)))?;
            Ok(Ended::Done)
        }
        Request::Flush => device.flush().map(|()| Ended::Done).map_err(plain),
        Request::Digests { offset, length } => {
            let mut digests = Vec::new();
            let asked = device.digests(offset, length.into(), &mut digests);
            asked.unwrap_or(Err(Errno::OPNOTSUPP)).map_err(|errno| (errno, Some(offset)))?;
            Ok(Ended::Digests(digests))
        }
        Request::Status { offset, extents } => status(device, offset, extents as usize),
    }
}

/// What is mapped from `offset` on. A device may have millions of runs: it is asked about a part of it at a time.
fn status(device: &dyn Exported, offset: u64, most: usize) -> Result<Ended, Failed> {
    let (mut found, mut runs) = (Vec::<(u64, bool)>::new(), Vec::new());
    let (mut at, size) = (offset, device.size());
    while at < size && found.len() <= most {
        runs.clear();
        let length = (size - at).min(STATUS_WINDOW);
        device.status(at, length, &mut runs).map_err(|errno| (errno, None))?;
        for Status { length, hole } in runs.iter().copied() {
            match found.last_mut() {
                Some((before, mapped)) if *mapped != hole => *before += length,
                _ => found.push((length, !hole)),
            }
        }
        let told = runs.iter().map(|run| run.length).sum::<u64>();
        if told == 0 {
            return Err((Errno::IO, None));
        }
        at += told.min(length);
    }
    found.truncate(most);
    Ok(Ended::Extents(found))
}

/// Reads again and compares; without anything to compare with, reading is all.
fn verify(device: &dyn Exported, offset: u64, length: u32, compare: Compare, data: &[u8]) -> Result<Ended, Failed> {
    let mut found = Aligned::new(PIECE);
    let mut done = 0usize;
    while done < length as usize {
        let count = PIECE.min(length as usize - done);
        let at = offset + done as u64;
        read_waiting(device, at, found.slice_mut(0..count)).map_err(|errno| (errno, Some(at)))?;
        let differs = match compare {
            Compare::Nothing => None,
            Compare::All => {
                let expected = data.get(done..done + count).ok_or((Errno::INVAL, None))?;
                found.slice(0..count).iter().zip(expected).position(|(a, b)| a != b)
            }
            // Pieces are multiples of a block, so the pattern begins anew in each.
            Compare::OneBlock => found.slice(0..count).iter().zip(data.iter().cycle()).position(|(a, b)| a != b),
        };
        if let Some(differs) = differs {
            return Ok(Ended::Mismatch((done + differs) as u64));
        }
        done += count;
    }
    Ok(Ended::Done)
}

/// Writes `pattern`, whose length divides [`PIECE`], again and again, until nobody wants it any more.
fn fill(
    device: &dyn Exported,
    offset: u64,
    length: u64,
    pattern: &[u8],
    unwanted: &AtomicBool,
) -> Result<Ended, Failed> {
    let mut piece = Aligned::new(PIECE);
    let mut done = 0u64;
    while done < length {
        if unwanted.load(Ordering::Relaxed) {
            return Ok(Ended::Failed(Failure::NotReady));
        }
        let count = (length - done).min(PIECE as u64) as usize;
        // Anew for each piece: writing uses it up.
        let bytes = piece.slice_mut(0..count);
        bytes.chunks_mut(pattern.len().max(1)).for_each(|part| part.copy_from_slice(&pattern[..part.len()]));
        device.write(offset + done, bytes).map_err(|errno| (errno, Some(offset + done)))?;
        done += count as u64;
    }
    Ok(Ended::Done)
}

/// As SCSI has it; `at` is where on the disk.
pub(super) fn failure(errno: Errno, at: Option<u64>) -> Failure {
    match errno {
        Errno::NOSPC | Errno::DQUOT => Failure::NoSpace,
        Errno::PERM | Errno::ROFS | Errno::ACCESS => Failure::ReadOnly,
        Errno::SHUTDOWN => Failure::NotReady,
        _ => Failure::Medium(at),
    }
}
