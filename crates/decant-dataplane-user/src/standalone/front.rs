//! A clone as its users see it: an NBD export, or a regular file.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Sender, channel};
use std::sync::{Arc, PoisonError, RwLock};

use decant_base::SECTOR;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::device::{Exported, Later, ReadSink, Status};
use crate::engine::Engine;
use crate::fuse::{Backend, ChangeSink, LaterChange, Mount, Served, Session};

/// Threads of the FUSE session: each does one request of what is here at a time; what is missing occupies none.
const FUSE_THREADS: usize = 4;
/// What the mount table calls it, after `fuse.`.
const SUBTYPE: &str = "decant";

/// The clone as NBD clients see it: read-write. A read that is missing waits; what was asked after it does not.
pub(super) struct Front {
    pub(super) engine: Arc<Engine>,
}

impl Exported for Front {
    fn size(&self) -> u64 {
        self.engine.shape().size()
    }

    fn read_only(&self) -> bool {
        false
    }

    fn ready(&self) -> bool {
        true
    }

    fn read(&self, offset: u64, buffer: &mut [u8], later: &mut Later<'_>) -> Result<Served, Errno> {
        let served = self.engine.read(offset, buffer)?;
        if served == Served::Missing {
            self.engine.park(offset, buffer.len(), later());
        }
        Ok(served)
    }

    fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        self.engine.write(offset, data)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        self.engine.discard(offset, length)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.engine.flush()
    }

    fn status(&self, _offset: u64, length: u64, out: &mut Vec<Status>) -> Result<(), Errno> {
        // What is not here yet may be data at the origin: everything is allocated, as far as is known.
        out.push(Status { length, hole: false });
        Ok(())
    }

    fn digests(&self, _offset: u64, _length: u64, _out: &mut Vec<u32>) -> Option<Result<(), Errno>> {
        None
    }
}

/// The sectors that hold these bytes.
fn sectors_around(offset: u64, length: u64) -> Range<u64> {
    offset / SECTOR * SECTOR..(offset + length).next_multiple_of(SECTOR)
}

/// Passes on the middle of what was read.
struct Middle {
    sink: Box<dyn ReadSink>,
    range: Range<usize>,
}

impl ReadSink for Middle {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        let Self { sink, range } = *self;
        sink.complete(result.and_then(|bytes| bytes.get(range).ok_or(Errno::IO)));
    }

    fn is_wanted(&self) -> bool {
        self.sink.is_wanted()
    }
}

/// New bytes for a part of one sector.
struct Edge {
    offset: u64,
    bytes: Vec<u8>,
}

impl Edge {
    /// Where its sector begins.
    fn sector(&self) -> u64 {
        self.offset / SECTOR * SECTOR
    }
}

/// The whole sectors of a range of bytes, and the parts of sectors before and after them; empty where there are none.
fn split(bytes: Range<u64>) -> (Range<u64>, [Range<u64>; 2]) {
    let (start, end) = (bytes.start.next_multiple_of(SECTOR), bytes.end / SECTOR * SECTOR);
    if start > end {
        (start..start, [bytes.clone(), bytes.end..bytes.end])
    } else {
        (start..end, [bytes.start..start, end..bytes.end])
    }
}

/// Changes of parts of sectors: what is around them is read, and written again.
struct Ragged {
    engine: Arc<Engine>,
    /// Held for writing while a sector is read and written again; for reading by other writes.
    edges: RwLock<()>,
}

impl Ragged {
    /// Makes the changes, if all their sectors are here, and if `claim`, asked when nothing is in the way any more, says so.
    fn apply(&self, edges: &[Edge], claim: impl FnOnce() -> bool) -> Result<Served, Errno> {
        let _alone = self.edges.write().unwrap_or_else(PoisonError::into_inner);
        let mut sectors = Vec::with_capacity(edges.len());
        for edge in edges {
            let mut sector = [0; SECTOR as usize];
            if self.engine.read(edge.sector(), &mut sector)? == Served::Missing {
                return Ok(Served::Missing);
            }
            let start = (edge.offset - edge.sector()) as usize;
            sector.get_mut(start..start + edge.bytes.len()).ok_or(Errno::INVAL)?.copy_from_slice(&edge.bytes);
            sectors.push((edge.sector(), sector));
        }
        if claim() {
            sectors.into_iter().try_for_each(|(at, mut sector)| self.engine.write(at, &mut sector))?;
        }
        Ok(Served::Done)
    }

    /// The first sector that the changes wait for.
    fn missing(&self, edges: &[Edge]) -> Option<u64> {
        let is_missing =
            |edge: &&Edge| self.engine.read(edge.sector(), &mut [0; SECTOR as usize]) == Ok(Served::Missing);
        edges.iter().find(is_missing).map(Edge::sector)
    }
}

/// Changes that wait for what is around them.
struct Waiting {
    ragged: Arc<Ragged>,
    edges: Vec<Edge>,
    sink: Box<dyn ChangeSink>,
    /// Whose thread makes them.
    queue: Sender<Box<Self>>,
}

impl Waiting {
    /// Waits for the first sector that is missing.
    fn park(self: Box<Self>) {
        match self.ragged.missing(&self.edges) {
            Some(sector) => {
                let engine = Arc::clone(&self.ragged.engine);
                engine.park(sector, SECTOR as usize, self);
            }
            None => self.submit(),
        }
    }

    /// Never on the thread that brings the bytes: it has yet to store them, and a write there waits for that.
    fn submit(self: Box<Self>) {
        let queue = self.queue.clone();
        if let Err(unsent) = queue.send(self) {
            unsent.0.sink.complete(Err(Errno::IO));
        }
    }

    fn go_on(self: Box<Self>) {
        match self.ragged.apply(&self.edges, || self.sink.claim()) {
            Ok(Served::Missing) => self.park(),
            Ok(Served::Done) => self.sink.complete(Ok(())),
            Err(error) => self.sink.complete(Err(error)),
        }
    }
}

impl ReadSink for Waiting {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        match result {
            Ok(_) => self.submit(),
            Err(error) => self.sink.complete(Err(error)),
        }
    }

    fn is_wanted(&self) -> bool {
        self.sink.is_wanted()
    }
}

/// The clone as a file: at any byte, where the engine knows sectors. A change of a part of a sector that is missing waits for
/// it, on no thread of the session.
struct AnyByte {
    ragged: Arc<Ragged>,
    queue: Sender<Box<Waiting>>,
}

impl AnyByte {
    fn new(engine: Arc<Engine>) -> std::io::Result<Self> {
        let (queue, waiting) = channel::<Box<Waiting>>();
        // Ends with the last change that waits, and with us.
        std::thread::Builder::new()
            .name("fuse-ragged".into())
            .spawn(move || waiting.iter().for_each(Waiting::go_on))?;
        Ok(Self { ragged: Arc::new(Ragged { engine, edges: RwLock::new(()) }), queue })
    }

    fn engine(&self) -> &Engine {
        &self.ragged.engine
    }

    /// Changes what lies at the edges of a range, now or once it is here.
    fn change(&self, edges: Vec<Edge>, later: &mut LaterChange<'_>) -> Result<Served, Errno> {
        if edges.is_empty() || self.ragged.apply(&edges, || true)? == Served::Done {
            return Ok(Served::Done);
        }
        let (ragged, queue) = (Arc::clone(&self.ragged), self.queue.clone());
        Box::new(Waiting { ragged, edges, sink: later(), queue }).park();
        Ok(Served::Missing)
    }
}

impl Backend for AnyByte {
    fn size(&self) -> u64 {
        self.engine().shape().size()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Served, Errno> {
        let whole = sectors_around(offset, buffer.len() as u64);
        if whole == (offset..offset + buffer.len() as u64) {
            return self.engine().read(offset, buffer);
        }
        let mut bytes = vec![0; (whole.end - whole.start) as usize];
        let served = self.engine().read(whole.start, &mut bytes)?;
        let start = (offset - whole.start) as usize;
        buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
        Ok(served)
    }

    fn park(&self, offset: u64, length: usize, sink: Box<dyn ReadSink>) {
        let whole = sectors_around(offset, length as u64);
        let start = (offset - whole.start) as usize;
        let sink = Box::new(Middle { sink, range: start..start + length });
        self.engine().park(whole.start, (whole.end - whole.start) as usize, sink);
    }

    fn write(&self, offset: u64, data: &mut [u8], later: &mut LaterChange<'_>) -> Result<Served, Errno> {
        let (whole, edges) = split(offset..offset + data.len() as u64);
        let place = |range: &Range<u64>| (range.start - offset) as usize..(range.end - offset) as usize;
        let edge = |range: Range<u64>| Edge { offset: range.start, bytes: data[place(&range)].to_vec() };
        let edges = edges.into_iter().filter(|range| !range.is_empty()).map(edge).collect();
        if !whole.is_empty() {
            let _others = self.ragged.edges.read().unwrap_or_else(PoisonError::into_inner);
            self.engine().write(whole.start, &mut data[place(&whole)])?;
        }
        self.change(edges, later)
    }

    fn discard(&self, offset: u64, length: u64, later: &mut LaterChange<'_>) -> Result<Served, Errno> {
        let (whole, edges) = split(offset..offset + length);
        let edge = |range: Range<u64>| Edge { offset: range.start, bytes: vec![0; (range.end - range.start) as usize] };
        if !whole.is_empty() {
            let _others = self.ragged.edges.read().unwrap_or_else(PoisonError::into_inner);
            self.engine().discard(whole.start, whole.end - whole.start)?;
        }
        self.change(edges.into_iter().filter(|range| !range.is_empty()).map(edge).collect(), later)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.engine().flush()
    }
}

/// The clone as a regular file at a path. Dropping it unmounts it.
pub(super) struct FileFront {
    path: PathBuf,
    /// The file below was made for it.
    made: bool,
    /// Its threads end with the file system.
    _session: Session,
}

impl FileFront {
    /// Mounts it on the file at `path`, which is made if it is missing; what a killed process left mounted there makes room.
    pub(super) fn mount(path: &Path, engine: Arc<Engine>) -> std::io::Result<Self> {
        if std::fs::metadata(path).is_err_and(|error| error.raw_os_error() == Some(libc::ENOTCONN)) {
            rustix::mount::unmount(path, UnmountFlags::DETACH)?;
        }
        let made = match std::fs::symlink_metadata(path) {
            Ok(meta) if meta.is_file() => false,
            Ok(_) => return Err(std::io::Error::new(std::io::ErrorKind::AlreadyExists, "it is no regular file")),
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
                std::fs::OpenOptions::new().write(true).create_new(true).open(path)?;
                true
            }
            Err(error) => return Err(error),
        };
        match Self::serve(path, engine) {
            Ok(session) => Ok(Self { path: path.to_owned(), made, _session: session }),
            Err(error) => {
                if made {
                    let _ = std::fs::remove_file(path);
                }
                Err(error)
            }
        }
    }

    fn serve(path: &Path, engine: Arc<Engine>) -> std::io::Result<Session> {
        let backend = Arc::new(AnyByte::new(engine)?);
        let mount = Mount::on_file("decant-clone", SUBTYPE)?;
        mount.attach(path)?;
        let session = Session::start_on_file(Arc::new(mount.device), backend, FUSE_THREADS);
        // The kernel learns the size. As long as it takes the file for empty, it lets one write at a time go "beyond its end"
        // (fuse_io_past_eof in fs/fuse/file.c), and one that waits for the origin would hold up all others.
        let session = session.and_then(|session| std::fs::metadata(path).map(|_| session));
        if session.is_err() {
            let _ = rustix::mount::unmount(path, UnmountFlags::DETACH);
        }
        session
    }
}

impl Drop for FileFront {
    fn drop(&mut self) {
        // Whoever has it open still sees it, until this process ends.
        if let Err(error) = rustix::mount::unmount(&self.path, UnmountFlags::DETACH) {
            tracing::warn!(path = %self.path.display(), %error, "cannot unmount");
            return;
        }
        if self.made {
            let _ = std::fs::remove_file(&self.path);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ranges_split_at_sectors() {
        for (bytes, whole, edges) in [
            (0..512, 0..512, [0..0, 512..512]),
            (5..100, 512..512, [5..100, 100..100]),
            (5..512, 512..512, [5..512, 512..512]),
            (5..600, 512..512, [5..512, 512..600]),
            (5..1100, 512..1024, [5..512, 1024..1100]),
            (1024..1025, 1024..1024, [1024..1024, 1024..1025]),
        ] {
            assert_eq!(split(bytes.clone()), (whole, edges), "{bytes:?}");
        }
    }
}
