//! A file or a block device as an export.

use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use rustix::fs::{FallocateFlags, SeekFrom};
use rustix::io::{Errno, ReadWriteFlags};

use super::claim::Claim;
use super::workers::Workers;
use crate::device::{Exported, Later, ReadSink, Served, Status};
use crate::stream::Aligned;

/// Reads from the medium at a time: enough to keep a disk busy.
const READERS: usize = 16;

/// A file or block device, whole. What is cached is read at once, what is not is read by a few threads, so that a slow medium is
/// asked for many things at a time. A failed sync is final: from then on nothing is acknowledged but reads.
pub struct FileMedium {
    claim: Arc<Claim>,
    read_only: bool,
    /// Whether the kernel can say that a read would wait.
    nowait: AtomicBool,
    readers: Workers,
    has_failed: AtomicBool,
    failure: Mutex<Option<String>>,
}

impl FileMedium {
    /// Serves what was claimed.
    pub fn new(claim: Claim, read_only: bool) -> Self {
        Self {
            claim: Arc::new(claim),
            read_only,
            nowait: AtomicBool::new(true),
            readers: Workers::new("read", READERS),
            has_failed: AtomicBool::new(false),
            failure: Mutex::new(None),
        }
    }

    /// Why nothing is acknowledged any more.
    pub fn failure(&self) -> Option<String> {
        self.failure.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    fn check(&self, offset: u64, length: u64) -> Result<u64, Errno> {
        offset.checked_add(length).filter(|end| *end <= self.claim.size).ok_or(Errno::INVAL)
    }

    fn admit(&self, offset: u64, length: u64) -> Result<u64, Errno> {
        if self.read_only {
            return Err(Errno::PERM);
        }
        if self.has_failed.load(Ordering::Acquire) { Err(Errno::IO) } else { self.check(offset, length) }
    }

    /// What can change nothing any more: EIO of a write or sync. No room is the initiator's to deal with.
    fn landed(&self, what: &str, result: Result<(), Errno>) -> Result<(), Errno> {
        let Err(error) = result else { return Ok(()) };
        if !matches!(error, Errno::NOSPC | Errno::DQUOT) {
            let mut failure = self.failure.lock().unwrap_or_else(PoisonError::into_inner);
            if failure.is_none() {
                let why = format!("{what} failed: {error}");
                tracing::error!(why, "the export acknowledges no write and no flush any more");
                *failure = Some(why);
                self.has_failed.store(true, Ordering::Release);
            }
        }
        Err(error)
    }

    /// Reads what is cached; `None`: some of it is not.
    fn read_cached(&self, offset: u64, buffer: &mut [u8]) -> Result<Option<()>, Errno> {
        if !self.nowait.load(Ordering::Relaxed) {
            return self.claim.read(offset, buffer).map(Some);
        }
        let mut into = [std::io::IoSliceMut::new(buffer)];
        match rustix::io::preadv2(self.claim.file.as_fd(), &mut into, offset, ReadWriteFlags::NOWAIT) {
            Ok(count) if count == buffer.len() => Ok(Some(())),
            Ok(_) | Err(Errno::AGAIN | Errno::INTR) => Ok(None),
            Err(Errno::OPNOTSUPP | Errno::NOSYS) => {
                self.nowait.store(false, Ordering::Relaxed);
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}

impl Exported for FileMedium {
    fn size(&self) -> u64 {
        self.claim.size
    }

    fn read_only(&self) -> bool {
        self.read_only
    }

    fn ready(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, buffer: &mut [u8], later: &mut Later<'_>) -> Result<Served, Errno> {
        self.check(offset, buffer.len() as u64)?;
        if self.read_cached(offset, buffer)?.is_some() {
            return Ok(Served::Done);
        }
        let (claim, length, sink) = (Arc::clone(&self.claim), buffer.len(), later());
        self.readers.submit(Box::new(move || answer(&claim, offset, length, sink)));
        Ok(Served::Missing)
    }

    fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.admit(offset, data.len() as u64)?;
        let mut done = 0;
        while done < data.len() {
            match rustix::io::pwrite(&self.claim.file, &data[done..], offset + done as u64) {
                Ok(0) => return self.landed("a write", Err(Errno::IO)),
                Ok(count) => done += count,
                Err(Errno::INTR) => {}
                Err(error) => return self.landed("a write", Err(error)),
            }
        }
        Ok(())
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.admit(offset, length)?;
        if length == 0 {
            return Ok(());
        }
        // On a block device too: a discard where that leaves zeros, else zeros are written by the device or the kernel.
        for kind in [FallocateFlags::PUNCH_HOLE, FallocateFlags::ZERO_RANGE] {
            match rustix::fs::fallocate(&self.claim.file, kind | FallocateFlags::KEEP_SIZE, offset, length) {
                // EINVAL: a part of one of a device's larger blocks.
                Err(Errno::OPNOTSUPP | Errno::INVAL | Errno::INTR) => {}
                result => return self.landed("a discard", result),
            }
        }
        self.write_zeros(offset, length)
    }

    fn flush(&self) -> Result<(), Errno> {
        if self.read_only {
            return Ok(());
        }
        if self.has_failed.load(Ordering::Acquire) {
            return Err(Errno::IO);
        }
        // Never again after a failure: the kernel reports it once and then forgets it.
        let result = rustix::fs::fdatasync(&self.claim.file);
        self.landed("making writes durable", result)?;
        // Another thread's sync may have taken the report of a failure that was also ours.
        if self.has_failed.load(Ordering::Acquire) { Err(Errno::IO) } else { Ok(()) }
    }

    fn status(&self, offset: u64, length: u64, out: &mut Vec<Status>) -> Result<(), Errno> {
        let end = self.check(offset, length)?;
        if length == 0 {
            return Err(Errno::INVAL);
        }
        if self.claim.is_block_device {
            out.push(Status { length, hole: false });
            return Ok(());
        }
        let mut at = offset;
        while at < end {
            let (next, hole) = match rustix::fs::seek(&self.claim.file, SeekFrom::Data(at)) {
                Ok(data) if data > at => (data.min(end), true),
                Ok(_) => (rustix::fs::seek(&self.claim.file, SeekFrom::Hole(at))?.min(end), false),
                Err(Errno::NXIO) => (end, true),
                // A file system that cannot say: all of it may be data.
                Err(Errno::INVAL) => (end, false),
                Err(error) => return Err(error),
            };
            out.push(Status { length: next - at, hole });
            at = next;
        }
        Ok(())
    }

    fn digests(&self, _offset: u64, _length: u64, _out: &mut Vec<u32>) -> Option<Result<(), Errno>> {
        None
    }
}

impl FileMedium {
    fn write_zeros(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let mut zeros = Aligned::new(64 * 1024);
        let mut done = 0;
        while done < length {
            let count = (length - done).min(zeros.len() as u64);
            self.write(offset + done, zeros.slice_mut(0..count as usize))?;
            done += count;
        }
        Ok(())
    }
}

/// The largest buffer that a reader keeps.
const MAX_SCRATCH: usize = 1 << 20;

thread_local! {
    /// A reader's buffer, as large as the largest read that it has served, up to that.
    static SCRATCH: std::cell::RefCell<Aligned> = std::cell::RefCell::new(Aligned::new(0));
}

/// Reads what was not cached, on a reader's thread.
fn answer(claim: &Claim, offset: u64, length: usize, sink: Box<dyn ReadSink>) {
    SCRATCH.with_borrow_mut(|scratch| {
        if scratch.len() < length {
            *scratch = Aligned::new(length);
        }
        let result = claim.read(offset, scratch.slice_mut(0..length));
        sink.complete(result.map(|()| scratch.slice(0..length)));
        // One for a read of many megabytes is not kept for all that come after it.
        if scratch.len() > MAX_SCRATCH {
            *scratch = Aligned::new(0);
        }
    });
}
