//! A clone as its users see it: an NBD export, or a regular file.

use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::sync::{Arc, PoisonError, RwLock};

use decant_base::SECTOR;
use rustix::io::Errno;
use rustix::mount::UnmountFlags;

use crate::device::{Exported, Later, ReadSink, Status};
use crate::engine::Engine;
use crate::fuse::{Backend, Mount, Served, Session};

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

/// The clone as a file: at any byte, where the engine knows sectors.
struct AnyByte {
    engine: Arc<Engine>,
    /// Held for writing while the sectors at a write's ragged edges are read and written again; for reading by other writes.
    edges: RwLock<()>,
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
}

/// Hands bytes to the thread that waits for them.
struct Handover(SyncSender<Result<Vec<u8>, Errno>>);

impl ReadSink for Handover {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        let _ = self.0.send(result.map(<[u8]>::to_vec));
    }
}

impl AnyByte {
    fn read_waiting(&self, bytes: Range<u64>) -> Result<Vec<u8>, Errno> {
        let mut buffer = vec![0; (bytes.end - bytes.start) as usize];
        if self.engine.read(bytes.start, &mut buffer)? == Served::Done {
            return Ok(buffer);
        }
        let (done, outcome) = sync_channel(1);
        self.engine.park(bytes.start, buffer.len(), Box::new(Handover(done)));
        outcome.recv().map_err(|_| Errno::IO)?
    }

    /// A write or discard of parts of sectors: what is around it is read first, which may wait for the origin.
    fn change_ragged(&self, offset: u64, length: u64, put: impl FnOnce(&mut [u8])) -> Result<(), Errno> {
        let whole = sectors_around(offset, length);
        // Once here, it stays here: so nobody waits for the network with the lock held.
        self.read_waiting(whole.clone())?;
        let _alone = self.edges.write().unwrap_or_else(PoisonError::into_inner);
        let mut bytes = self.read_waiting(whole.clone())?;
        let start = (offset - whole.start) as usize;
        put(bytes.get_mut(start..start + length as usize).ok_or(Errno::INVAL)?);
        self.engine.write(whole.start, &mut bytes)
    }
}

impl Backend for AnyByte {
    fn size(&self) -> u64 {
        self.engine.shape().size()
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Served, Errno> {
        let whole = sectors_around(offset, buffer.len() as u64);
        if whole == (offset..offset + buffer.len() as u64) {
            return self.engine.read(offset, buffer);
        }
        let mut bytes = vec![0; (whole.end - whole.start) as usize];
        let served = self.engine.read(whole.start, &mut bytes)?;
        let start = (offset - whole.start) as usize;
        buffer.copy_from_slice(&bytes[start..start + buffer.len()]);
        Ok(served)
    }

    fn park(&self, offset: u64, length: usize, sink: Box<dyn ReadSink>) {
        let whole = sectors_around(offset, length as u64);
        let start = (offset - whole.start) as usize;
        let sink = Box::new(Middle { sink, range: start..start + length });
        self.engine.park(whole.start, (whole.end - whole.start) as usize, sink);
    }

    fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno> {
        if sectors_around(offset, data.len() as u64) != (offset..offset + data.len() as u64) {
            return self.change_ragged(offset, data.len() as u64, |place| place.copy_from_slice(data));
        }
        let _others = self.edges.read().unwrap_or_else(PoisonError::into_inner);
        self.engine.write(offset, data)
    }

    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno> {
        let inner = offset.next_multiple_of(SECTOR)..(offset + length) / SECTOR * SECTOR;
        if inner.start >= inner.end {
            return self.change_ragged(offset, length, |place| place.fill(0));
        }
        for edge in [offset..inner.start, inner.end..offset + length] {
            if !edge.is_empty() {
                self.change_ragged(edge.start, edge.end - edge.start, |place| place.fill(0))?;
            }
        }
        let _others = self.edges.read().unwrap_or_else(PoisonError::into_inner);
        self.engine.discard(inner.start, inner.end - inner.start)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.engine.flush()
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
        let mount = Mount::on_file("decant-clone", SUBTYPE)?;
        mount.attach(path)?;
        let backend = Arc::new(AnyByte { engine, edges: RwLock::new(()) });
        Session::start_on_file(Arc::new(mount.device), backend, FUSE_THREADS)
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
