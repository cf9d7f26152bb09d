//! What the engine stands on: the image's payload, the clone's map, the marks file, and a note of failure. Behind traits, so
//! that tests can fail a sync or fill the disk; the real one is [`Files`].

use std::fs::File;
use std::io::Write;
use std::ops::Range;
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use decant_base::{BLOCK, ExtentSet};
use rustix::fs::{FallocateFlags, FlockOperation, OFlags, SeekFrom};
use rustix::io::Errno;

/// A file or a part of one. All calls are from any thread, at explicit offsets.
pub trait Medium: Send + Sync {
    /// Fills `buffer`; beyond the end it reads as zeros.
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno>;
    /// Writes all of `data`.
    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), Errno>;
    /// The range reads as zeros afterwards and takes no room, as far as whole file blocks lie in it.
    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno>;
    /// Makes all that was written before the call durable. A failure is final.
    fn sync(&self) -> Result<(), Errno>;
    /// The byte ranges of `range` that are no holes.
    fn data_in(&self, range: Range<u64>) -> Result<ExtentSet, Errno>;
    /// The byte ranges that are no holes.
    fn data(&self) -> Result<ExtentSet, Errno> {
        self.data_in(0..self.length()?)
    }
    /// Bytes.
    fn length(&self) -> Result<u64, Errno>;
    /// As `read_at`, but from the medium and not from memory. `buffer` is aligned to 4096, as are `offset` and the length.
    fn read_medium(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        self.read_at(offset, buffer)
    }
}

/// The files of one volume.
pub trait Disk: Send + Sync {
    /// The payload.
    fn image(&self) -> &Arc<dyn Medium>;
    /// The map, if there is one.
    fn open_map(&self) -> Result<Option<Arc<dyn Medium>>, Errno>;
    /// Makes room for a map of about `length` bytes, off the path between stop and start.
    fn reserve_map(&self, length: u64) -> Result<(), Errno> {
        let _ = length;
        Ok(())
    }
    /// Makes the map of `length` bytes with `writes` in it, durable and in its place at once.
    fn create_map(&self, length: u64, writes: &[(u64, Vec<u8>)]) -> Result<Arc<dyn Medium>, Errno>;
    /// Removes the map, durably. No error if there is none.
    fn remove_map(&self) -> Result<(), Errno>;
    /// The marks file, emptied first if `fresh`.
    fn open_marks(&self, fresh: bool) -> Result<Arc<dyn Medium>, Errno>;
    /// Removes the marks file. No error if there is none.
    fn remove_marks(&self) -> Result<(), Errno>;
    /// Leaves a note that the volume may acknowledge nothing any more; as durable as the disk still allows.
    fn note_failure(&self, why: &str);
    /// The note of an earlier process.
    fn failure(&self) -> Option<Note>;
}

/// What a process whose volume failed left for the next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Note {
    /// Why it failed.
    pub why: String,
    /// The file that says so; without it the next process opens the volume as it is.
    pub path: PathBuf,
}

/// A regular file, or what follows its first `base` bytes.
pub struct FilePart {
    file: File,
    /// The same file, past the page cache; `None` where the file system cannot.
    direct: Option<File>,
    base: u64,
    length: Option<u64>,
}

fn errno(error: std::io::Error) -> Errno {
    Errno::from_io_error(&error).unwrap_or(Errno::IO)
}

impl FilePart {
    /// All of `file`.
    pub fn whole(file: File) -> Self {
        Self { file, direct: None, base: 0, length: None }
    }

    /// `length` bytes of `file` from `base` on, a multiple of 4096. `path` is where the file can be opened again for direct reads.
    pub fn payload(file: File, path: &Path, base: u64, length: u64) -> Self {
        let direct = std::fs::OpenOptions::new().read(true).custom_flags(OFlags::DIRECT.bits() as i32).open(path).ok();
        Self { file, direct, base, length: Some(length) }
    }
}

impl Medium for FilePart {
    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        read_full(&self.file, self.base + offset, buffer)
    }

    fn write_at(&self, offset: u64, data: &[u8]) -> Result<(), Errno> {
        self.file.write_all_at(data, self.base + offset).map_err(errno)
    }

    fn punch(&self, offset: u64, length: u64) -> Result<(), Errno> {
        if length == 0 {
            return Ok(());
        }
        let flags = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        match rustix::fs::fallocate(&self.file, flags, self.base + offset, length) {
            // EINVAL: a block device whose blocks are larger than what is punched.
            Err(Errno::OPNOTSUPP | Errno::INVAL) => write_zeros(&self.file, self.base + offset, length),
            result => result,
        }
    }

    fn sync(&self) -> Result<(), Errno> {
        // Never again after a failure: the kernel forgets the error with the first report. The engine sees to that.
        rustix::fs::fdatasync(&self.file)
    }

    fn data_in(&self, range: Range<u64>) -> Result<ExtentSet, Errno> {
        let end = self.base + range.end;
        let mut data = ExtentSet::new();
        let mut at = self.base + range.start;
        while at < end {
            let start = match rustix::fs::seek(&self.file, SeekFrom::Data(at)) {
                Ok(start) if start < end => start,
                Ok(_) | Err(Errno::NXIO) => break,
                Err(error) => return Err(error),
            };
            let stop = rustix::fs::seek(&self.file, SeekFrom::Hole(start))?.min(end);
            data.insert(start - self.base..stop - self.base);
            at = stop;
        }
        Ok(data)
    }

    fn length(&self) -> Result<u64, Errno> {
        match self.length {
            Some(length) => Ok(length),
            None => Ok(self.file.metadata().map_err(errno)?.len().saturating_sub(self.base)),
        }
    }

    fn read_medium(&self, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
        if let Some(direct) = &self.direct {
            match read_full(direct, self.base + offset, buffer) {
                Err(Errno::INVAL) => {}
                result => return result,
            }
        }
        // Dropping clean pages makes the next read go to the medium; the caller has synced.
        let length = std::num::NonZeroU64::new(buffer.len() as u64);
        let _ = rustix::fs::fadvise(&self.file, self.base + offset, length, rustix::fs::Advice::DontNeed);
        read_full(&self.file, self.base + offset, buffer)
    }
}

fn read_full(file: &File, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
    let mut done = 0;
    while done < buffer.len() {
        match rustix::io::pread(file, &mut buffer[done..], offset + done as u64) {
            Ok(0) => {
                buffer[done..].fill(0);
                return Ok(());
            }
            Ok(bytes) => done += bytes,
            Err(Errno::INTR) => {}
            Err(error) => return Err(error),
        }
    }
    Ok(())
}

fn write_zeros(file: &File, offset: u64, length: u64) -> Result<(), Errno> {
    let zeros = [0; 64 << 10];
    let mut done = 0;
    while done < length {
        let part = (length - done).min(zeros.len() as u64);
        file.write_all_at(&zeros[..part as usize], offset + done).map_err(errno)?;
        done += part;
    }
    Ok(())
}

/// Opens an image for the process that will own it: takes the lock that its open file carries, and waits for a predecessor's
/// last I/O, which holds that lock until it is over.
///
/// # Errors
/// As opening and locking.
pub fn open_image(path: &Path) -> std::io::Result<File> {
    let file = std::fs::OpenOptions::new().read(true).write(true).open(path)?;
    loop {
        match rustix::fs::flock(&file, FlockOperation::LockExclusive) {
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
            Ok(()) => return Ok(file),
        }
    }
}

/// The file that belongs to a map: its whole name with `.ending` added, so that maps of different names share none.
pub fn beside(map: &Path, ending: &str) -> PathBuf {
    let mut name = map.as_os_str().to_owned();
    name.push(".");
    name.push(ending);
    name.into()
}

/// A volume's files on a file system: the image, and beside the map ([`beside`]) `.marks`, `.failed`, and `.new` while a map is
/// made.
pub struct Files {
    image: Arc<dyn Medium>,
    map: PathBuf,
    /// Larger maps than this are sparse.
    reserved: u64,
}

/// Maps up to this size get their blocks when they are made, so that no flush fails for want of room for a mark. 2 TiB of
/// 4096-byte sectors, or 256 GiB of 512-byte ones.
const RESERVED_MAP: u64 = 256 << 20;

impl Files {
    /// `image` is `path`, opened and locked ([`open_image`]); its payload is `payload` bytes from `header` on. `map` is where the
    /// clone's map is or will be.
    pub fn new(image: File, path: &Path, header: u64, payload: u64, map: PathBuf) -> Self {
        Self { image: Arc::new(FilePart::payload(image, path, header, payload)), map, reserved: RESERVED_MAP }
    }

    /// A map of any size gets its blocks when it is made, so that no mark ever lacks room.
    #[must_use]
    pub fn with_room_for_all(self) -> Self {
        Self { reserved: u64::MAX, ..self }
    }

    fn marks(&self) -> PathBuf {
        beside(&self.map, "marks")
    }

    fn failed(&self) -> PathBuf {
        beside(&self.map, "failed")
    }

    fn new_map(&self) -> Result<File, Errno> {
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true).create(true).truncate(false);
        options.open(beside(&self.map, "new")).map_err(errno)
    }

    /// Gives a map its blocks, unless that is too much or the file system cannot.
    fn reserve(&self, map: &File, length: u64) -> Result<(), Errno> {
        if length > self.reserved {
            return Ok(());
        }
        match rustix::fs::fallocate(map, FallocateFlags::empty(), 0, length) {
            Ok(()) | Err(Errno::OPNOTSUPP) => Ok(()),
            Err(error) => Err(error),
        }
    }

    fn sync_directory(&self) -> Result<(), Errno> {
        let directory = self.map.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
        File::open(directory).and_then(|file| file.sync_all()).map_err(errno)
    }
}

fn remove(path: &Path) -> Result<bool, Errno> {
    match std::fs::remove_file(path) {
        Ok(()) => Ok(true),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(errno(error)),
    }
}

impl Disk for Files {
    fn image(&self) -> &Arc<dyn Medium> {
        &self.image
    }

    fn open_map(&self) -> Result<Option<Arc<dyn Medium>>, Errno> {
        match std::fs::OpenOptions::new().read(true).write(true).open(&self.map) {
            Ok(file) => {
                // Copied from elsewhere, it may have become sparse.
                if self.reserved == u64::MAX {
                    self.reserve(&file, file.metadata().map_err(errno)?.len())?;
                }
                Ok(Some(Arc::new(FilePart::whole(file))))
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
            Err(error) => Err(errno(error)),
        }
    }

    fn reserve_map(&self, length: u64) -> Result<(), Errno> {
        let file = self.new_map()?;
        file.set_len(0).map_err(errno)?;
        self.reserve(&file, length)?;
        file.sync_all().map_err(errno)?;
        self.sync_directory()
    }

    fn create_map(&self, length: u64, writes: &[(u64, Vec<u8>)]) -> Result<Arc<dyn Medium>, Errno> {
        let file = self.new_map()?;
        // What a try that failed left would be taken for pages.
        if rustix::fs::seek(&file, SeekFrom::Data(0)) != Err(Errno::NXIO) {
            file.set_len(0).map_err(errno)?;
        }
        file.set_len(length).map_err(errno)?;
        self.reserve(&file, length)?;
        for (offset, bytes) in writes {
            file.write_all_at(bytes, *offset).map_err(errno)?;
        }
        file.sync_all().map_err(errno)?;
        std::fs::rename(beside(&self.map, "new"), &self.map).map_err(errno)?;
        self.sync_directory()?;
        Ok(Arc::new(FilePart::whole(file)))
    }

    fn remove_map(&self) -> Result<(), Errno> {
        if remove(&self.map)? { self.sync_directory() } else { Ok(()) }
    }

    fn open_marks(&self, fresh: bool) -> Result<Arc<dyn Medium>, Errno> {
        let mut options = std::fs::OpenOptions::new();
        options.read(true).write(true).create(fresh).truncate(fresh);
        Ok(Arc::new(FilePart::whole(options.open(self.marks()).map_err(errno)?)))
    }

    fn remove_marks(&self) -> Result<(), Errno> {
        remove(&self.marks()).map(|_| ())
    }

    fn note_failure(&self, why: &str) {
        let note = File::create(self.failed()).and_then(|mut file| {
            file.write_all(why.as_bytes())?;
            file.sync_all()
        });
        if let Err(error) = note.map_err(errno).and_then(|()| self.sync_directory()) {
            tracing::error!(%error, "cannot leave a note of the volume's failure");
        }
    }

    fn failure(&self) -> Option<Note> {
        let path = self.failed();
        // One that cannot be read is no leave to pass over it.
        match std::fs::read(&path) {
            Ok(why) => Some(Note { why: String::from_utf8_lossy(&why).into_owned(), path }),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => None,
            Err(error) => Some(Note { why: format!("its note cannot be read: {error}"), path }),
        }
    }
}

/// A buffer aligned as direct reads need it.
pub struct Aligned {
    bytes: Vec<u8>,
    start: usize,
    length: usize,
}

impl Aligned {
    /// `length` zeros.
    pub fn new(length: usize) -> Self {
        let bytes = vec![0; length + BLOCK as usize];
        let start = bytes.as_ptr().align_offset(BLOCK as usize);
        Self { bytes, start, length }
    }

    /// All of it.
    pub fn bytes(&mut self) -> &mut [u8] {
        &mut self.bytes[self.start..self.start + self.length]
    }
}
