//! A sealed volume as its new owner reads it: ciphertext, read-only.

use std::ops::Range;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use decant_base::{BLOCK, ExtentSet};
use rustix::io::Errno;

use super::{Engine, Life, lock};
use crate::device::{Exported, Later, Served, Status};

/// Blocks whose digests share an allocation: 16 MiB of volume, 16 KiB of memory, made when one of them is first served.
const CHUNK: u64 = 4096;

/// What the export serves. It keeps a CRC-32C of each block as it was served, so that a digest asked for later says what left
/// here and not what a dying disk says by then; 4 bytes per block served.
pub struct Export {
    engine: Arc<Engine>,
    /// 0: not served. (A block whose digest is 0 is read again when asked for.)
    served: Vec<OnceLock<Box<[AtomicU32]>>>,
}

impl Engine {
    /// What an export serves; [`Exported::ready`] once [`Engine::seal`] succeeded.
    pub fn as_exported(self: &Arc<Self>) -> Arc<Export> {
        let chunks = self.shape.blocks().div_ceil(CHUNK);
        Arc::new(Export { engine: Arc::clone(self), served: (0..chunks).map(|_| OnceLock::new()).collect() })
    }

    /// Closes the gate, makes everything durable, and returns the blocks that hold data, less those that a cleanly unmounted ext4
    /// does not need. The export is ready afterwards. Again: the same.
    ///
    /// # Errors
    /// EBUSY while the volume is a clone; EIO if it failed.
    pub fn seal(&self) -> Result<ExtentSet, Errno> {
        if !self.is_plain() {
            return Err(Errno::BUSY);
        }
        self.close_gate();
        self.flush()?;
        let mut live = self.live()?;
        let plaintext = |offset: u64, buffer: &mut [u8]| self.read_plain(offset, buffer);
        for run in crate::ext4::unneeded(&plaintext, self.shape.size(), &live).all().iter() {
            live.remove(run.range());
        }
        self.sealed.store(true, Ordering::SeqCst);
        Ok(live)
    }

    /// Plaintext at any offset and length, for whoever looks into the file system.
    fn read_plain(&self, offset: u64, buffer: &mut [u8]) -> Option<()> {
        let sector = u64::from(self.shape.sector_size());
        let end = offset.checked_add(buffer.len() as u64).filter(|&end| end <= self.shape.size())?;
        let start = offset / sector * sector;
        let mut whole = vec![0; (end.next_multiple_of(sector) - start) as usize];
        self.read_here(start, &mut whole).ok()?;
        buffer.copy_from_slice(whole.get((offset - start) as usize..)?.get(..buffer.len())?);
        Some(())
    }

    /// The blocks that hold data: what the file has allocated.
    ///
    /// # Errors
    /// EBUSY while the volume is a clone; what the file system says.
    pub fn live(&self) -> Result<ExtentSet, Errno> {
        if !self.is_plain() {
            return Err(Errno::BUSY);
        }
        let mut live = ExtentSet::new();
        for run in self.image.data()?.iter() {
            live.insert(run.start / BLOCK..run.end().div_ceil(BLOCK));
        }
        Ok(live)
    }

    /// Bytes of payload that the file has allocated.
    ///
    /// # Errors
    /// What the file system says.
    pub fn allocated(&self) -> Result<u64, Errno> {
        Ok(self.image.data()?.len())
    }
}

impl Export {
    fn check(&self, offset: u64, length: u64) -> Result<Range<u64>, Errno> {
        let bytes = offset..offset.checked_add(length).ok_or(Errno::INVAL)?;
        if bytes.end > self.engine.shape.size() { Err(Errno::INVAL) } else { Ok(bytes) }
    }

    fn digest(&self, block: u64) -> Option<&AtomicU32> {
        let chunk = self.served.get((block / CHUNK) as usize)?;
        let made = chunk.get_or_init(|| (0..CHUNK).map(|_| AtomicU32::new(0)).collect());
        made.get((block % CHUNK) as usize)
    }

    /// Reads ciphertext; what is not here is an error, never what the file happens to hold.
    fn read_raw(&self, bytes: &Range<u64>, buffer: &mut [u8]) -> Result<(), Errno> {
        if !self.engine.is_plain()
            && let Life::Prepared(_) | Life::Clone(_) = &*lock(&self.engine.life)
        {
            return Err(Errno::IO);
        }
        self.engine.image.read_at(bytes.start, buffer)
    }
}

impl Exported for Export {
    fn size(&self) -> u64 {
        self.engine.shape.size()
    }

    fn read_only(&self) -> bool {
        true
    }

    fn ready(&self) -> bool {
        self.engine.sealed.load(Ordering::SeqCst)
    }

    fn read(&self, offset: u64, buffer: &mut [u8], _later: &mut Later<'_>) -> Result<Served, Errno> {
        let bytes = self.check(offset, buffer.len() as u64)?;
        self.read_raw(&bytes, buffer)?;
        // Whole blocks only: pieces of one are digested from the medium when it is asked for.
        let first = bytes.start.next_multiple_of(BLOCK);
        let mut at = first;
        while at < bytes.end {
            let end = (at + BLOCK).min(self.engine.shape.size());
            if end > bytes.end {
                break;
            }
            let data = &buffer[(at - bytes.start) as usize..(end - bytes.start) as usize];
            if let Some(digest) = self.digest(at / BLOCK) {
                digest.store(crc32c::crc32c(data), Ordering::Relaxed);
            }
            at = end;
        }
        Ok(Served::Done)
    }

    fn write(&self, _offset: u64, _data: &mut [u8]) -> Result<(), Errno> {
        Err(Errno::PERM)
    }

    fn discard(&self, _offset: u64, _length: u64) -> Result<(), Errno> {
        Err(Errno::PERM)
    }

    fn flush(&self) -> Result<(), Errno> {
        Ok(())
    }

    fn status(&self, offset: u64, length: u64, out: &mut Vec<Status>) -> Result<(), Errno> {
        let bytes = self.check(offset, length)?;
        if bytes.is_empty() {
            return Err(Errno::INVAL);
        }
        // The file's extents change no more once it is sealed, but a volume may have millions: ask for these only.
        let data = self.engine.image.data_in(bytes.clone())?;
        let mut at = bytes.start;
        for run in data.overlapping(bytes.clone()) {
            if run.start > at {
                out.push(Status { length: run.start - at, hole: true });
            }
            out.push(Status { length: run.length, hole: false });
            at = run.end();
        }
        if at < bytes.end {
            out.push(Status { length: bytes.end - at, hole: true });
        }
        Ok(())
    }

    fn digests(&self, offset: u64, length: u64, out: &mut Vec<u32>) -> Option<Result<(), Errno>> {
        Some(self.digest_range(offset, length, out))
    }
}

impl Export {
    fn digest_range(&self, offset: u64, length: u64, out: &mut Vec<u32>) -> Result<(), Errno> {
        let bytes = self.check(offset, length)?;
        let mut buffer = [0; BLOCK as usize];
        for block in self.engine.shape.touched(bytes) {
            let digest = self.digest(block).ok_or(Errno::INVAL)?;
            let mut value = digest.load(Ordering::Relaxed);
            if value == 0 {
                let bytes = self.engine.shape.bytes_of(block..block + 1);
                let data = &mut buffer[..(bytes.end - bytes.start) as usize];
                self.read_raw(&bytes, data)?;
                value = crc32c::crc32c(data);
                digest.store(value, Ordering::Relaxed);
            }
            out.push(value);
        }
        Ok(())
    }
}
