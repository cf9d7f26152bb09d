//! A FUSE session of our own on a raw `/dev/fuse` descriptor: one directory, one file, `volume`.
//!
//! Why not a library: the session must be able to start on a connection that another process negotiated, so that a data
//! process killed with requests in flight is replaced without an I/O error (see [`Session::resume`]).
//!
//! Several threads read the same descriptor; the kernel gives each request to one of them. Clones of the descriptor
//! (FUSE_DEV_IOC_CLONE) would each carry requests that die with their process, so there are none. Each thread owns one
//! page-aligned buffer for its whole life; a write is read into it, encrypted in place and written from it, and
//! nothing is allocated on that way: the kernel may be writing to free memory.

use std::collections::{HashSet, VecDeque};
use std::io::{IoSlice, IoSliceMut};
use std::os::fd::OwnedFd;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use rustix::io::Errno;

use crate::device::ReadSink;

pub mod wire;

use wire::{Body, HEAD_BYTES, MAX_DATA_BYTES, Operation, Request};

/// Whether a read was served.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Served {
    /// The buffer is filled.
    Done,
    /// Some of it is not here; the caller parks the read.
    Missing,
}

/// Where the outcome of a change goes that had to wait.
pub trait ChangeSink: Send {
    /// To be asked when nothing is in the way any more: the change is made from here on, and no signal ends it. `false`: whoever
    /// asked for it has gone, and it is not to be made: he may have asked for another one there, which must not be undone.
    fn claim(&self) -> bool;
    /// Whether anybody still waits for it.
    fn is_wanted(&self) -> bool;
    /// It is made, or it failed.
    fn complete(self: Box<Self>, result: Result<(), Errno>);
}

/// Makes the sink of a change that has to wait: called once, and only then.
pub type LaterChange<'a> = dyn FnMut() -> Box<dyn ChangeSink> + 'a;

/// What the file's bytes are. Called from all threads of the session; nothing here waits for the network.
pub trait Backend: Send + Sync {
    /// Bytes, constant.
    fn size(&self) -> u64;
    /// Fills `buffer` with the plaintext at `offset`, or says that it cannot yet.
    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Served, Errno>;
    /// Takes over a read that was [`Served::Missing`]; the bytes go to `sink`, perhaps before this returns.
    fn park(&self, offset: u64, length: usize, sink: Box<dyn ReadSink>);
    /// Writes `data` at `offset`; `data` is scratch afterwards. Or, if what is around it is not here, keeps the sink that `later`
    /// makes, which is answered once it is written (perhaps before this returns), and says [`Served::Missing`]. A backend to
    /// which any byte can be written never asks for a sink.
    fn write(&self, offset: u64, data: &mut [u8], later: &mut LaterChange<'_>) -> Result<Served, Errno>;
    /// The range reads as zeros afterwards; as [`Backend::write`].
    fn discard(&self, offset: u64, length: u64, later: &mut LaterChange<'_>) -> Result<Served, Errno>;
    /// Makes all that was acknowledged durable.
    fn flush(&self) -> Result<(), Errno>;
}

/// The threads that serve one file. They end when the file system is gone, which is when nobody has the file open any more
/// and the mount is closed.
pub struct Session {
    threads: Vec<JoinHandle<Result<(), Errno>>>,
}

impl Session {
    /// Serves a new connection with `threads` threads; the first request negotiates.
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start(device: Arc<OwnedFd>, backend: Arc<dyn Backend>, threads: usize) -> std::io::Result<Self> {
        Self::serve(device, backend, threads, wire::FILE_NODE)
    }

    /// The same for a file system whose root is the file ([`Mount::on_file`]).
    ///
    /// # Errors
    /// When a thread cannot be made.
    pub fn start_on_file(device: Arc<OwnedFd>, backend: Arc<dyn Backend>, threads: usize) -> std::io::Result<Self> {
        Self::serve(device, backend, threads, wire::ROOT_NODE)
    }

    fn serve(device: Arc<OwnedFd>, backend: Arc<dyn Backend>, threads: usize, file_node: u64) -> std::io::Result<Self> {
        let connection = Arc::new(Connection { device, parked: Mutex::default() });
        let threads = (0..threads)
            .map(|n| {
                let worker = Worker::new(Arc::clone(&connection), Arc::clone(&backend), file_node);
                std::thread::Builder::new().name(format!("fuse-{n}")).spawn(move || worker.run())
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { threads })
    }

    /// Serves a connection whose last server died: asks the kernel for the requests that were read and not answered, then
    /// goes on as [`Session::start`]. Doing such a request twice is harmless: its issuer has not heard of the first time, so
    /// it cannot have sent anything that depends on it.
    ///
    /// # Errors
    /// EINVAL on a kernel before 6.9, which cannot send again; ENODEV when the connection is gone.
    pub fn resume(device: Arc<OwnedFd>, backend: Arc<dyn Backend>, threads: usize) -> std::io::Result<Self> {
        rustix::io::write(&*device, &wire::resend_notification())?;
        Self::start(device, backend, threads)
    }

    /// Waits for the file system's end.
    ///
    /// # Errors
    /// The first error that ended a thread early.
    pub fn wait(self) -> Result<(), Errno> {
        let mut result = Ok(());
        for thread in self.threads {
            // A panic in a backend must not pass for an orderly end.
            let ended = thread.join().unwrap_or(Err(Errno::IO));
            result = result.and(ended);
        }
        result
    }
}

/// A buffer whose usable part starts at a page boundary and whose pages are all there.
struct AlignedBuffer {
    bytes: Box<[u8]>,
    start: usize,
}

impl AlignedBuffer {
    fn new(length: usize) -> Self {
        // Written once, not merely reserved: a first touch on the write path would allocate.
        let bytes = vec![0xa5u8; length + 4096].into_boxed_slice();
        let start = bytes.as_ptr().align_offset(4096);
        assert!(start < 4096, "a byte pointer can always be aligned to a page");
        Self { bytes, start }
    }

    fn as_mut(&mut self) -> &mut [u8] {
        let length = self.bytes.len() - 4096;
        &mut self.bytes[self.start..self.start + length]
    }
}

/// Requests that wait, and those whose issuers do not wait any more.
#[derive(Default)]
struct Parked {
    waiting: HashSet<u64>,
    /// Interrupted before they were parked, or when they were answered already; the last few.
    interrupted: VecDeque<u64>,
}

/// Interrupts remembered for requests that are not parked yet: as many as could be on their way through all threads at a time,
/// many times over.
const MAX_INTERRUPTED: usize = 256;

/// What all threads of a session share.
struct Connection {
    device: Arc<OwnedFd>,
    parked: Mutex<Parked>,
}

impl Connection {
    fn lock(&self) -> MutexGuard<'_, Parked> {
        self.parked.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A request waits from here on. `false`: its issuer does not wait for it.
    fn park(&self, unique: u64) -> bool {
        let mut parked = self.lock();
        if let Some(index) = parked.interrupted.iter().position(|found| *found == unique) {
            parked.interrupted.remove(index);
            return false;
        }
        parked.waiting.insert(unique)
    }

    /// Whether a request waits, which it does not any more.
    fn unpark(&self, unique: u64) -> bool {
        self.lock().waiting.remove(&unique)
    }

    /// The issuer of a request got a signal: one that waits ends with EINTR. One that is under way is answered all the same.
    fn interrupt(&self, unique: u64) -> Result<(), Errno> {
        {
            let mut parked = self.lock();
            if !parked.waiting.remove(&unique) {
                if parked.interrupted.len() >= MAX_INTERRUPTED {
                    parked.interrupted.pop_front();
                }
                parked.interrupted.push_back(unique);
                return Ok(());
            }
        }
        send(&self.device, unique, Err(Errno::INTR))
    }
}

struct Worker {
    connection: Arc<Connection>,
    backend: Arc<dyn Backend>,
    /// The file's node: below the root, or the root itself.
    file_node: u64,
    head: [u8; HEAD_BYTES],
    data: AlignedBuffer,
}

impl Worker {
    fn new(connection: Arc<Connection>, backend: Arc<dyn Backend>, file_node: u64) -> Self {
        Self { connection, backend, file_node, head: [0; HEAD_BYTES], data: AlignedBuffer::new(MAX_DATA_BYTES) }
    }

    fn run(mut self) -> Result<(), Errno> {
        loop {
            let mut into = [IoSliceMut::new(&mut self.head), IoSliceMut::new(self.data.as_mut())];
            match rustix::io::readv(&*self.connection.device, &mut into) {
                Ok(length) => self.handle(length)?,
                // ENOENT: the request was withdrawn while it was read.
                Err(Errno::INTR | Errno::AGAIN | Errno::NOENT) => {}
                Err(Errno::NODEV | Errno::CONNABORTED) => return Ok(()),
                Err(error) => {
                    tracing::error!(%error, "reading from the FUSE device failed; this thread serves no more");
                    return Err(error);
                }
            }
        }
    }

    fn handle(&mut self, length: usize) -> Result<(), Errno> {
        let Some(request) = Request::parse(&self.head[..length.min(HEAD_BYTES)]) else {
            tracing::error!(length, "the kernel sent less than a FUSE header");
            return Ok(());
        };
        let unique = request.unique;
        match request.operation {
            Operation::Read { offset, size } => self.read(unique, offset, size as usize),
            Operation::Write { offset, size } => {
                let given = length.saturating_sub(HEAD_BYTES);
                self.write(unique, offset, size, given)
            }
            Operation::Discard { offset, length } => {
                let discarded = check_range(offset, length, self.backend.size()).and_then(|()| {
                    self.backend.discard(offset, length, &mut later(&self.connection, unique, Body::EMPTY))
                });
                self.changed(unique, discarded, Body::EMPTY)
            }
            Operation::Interrupt { unique } => self.connection.interrupt(unique),
            Operation::Silent => Ok(()),
            _ => match self.answer(&request) {
                Ok(body) => self.send(unique, Ok(body.as_bytes())),
                Err(error) => self.send(unique, Err(error)),
            },
        }
    }

    fn answer(&self, request: &Request) -> Result<Body, Errno> {
        let size = self.backend.size();
        let is_file = request.node == self.file_node;
        Ok(match request.operation {
            Operation::Init { major, .. } if major < wire::MAJOR => return Err(Errno::PROTO),
            Operation::Init { flags, .. } => Body::init(flags),
            Operation::Lookup { is_file: true } if request.node == wire::ROOT_NODE && !is_file => Body::entry(size),
            Operation::Lookup { .. } => return Err(Errno::NOENT),
            Operation::Attributes => Body::attributes(request.node, is_file.then_some(size)),
            Operation::Open if is_file => Body::open(),
            Operation::Sync => self.backend.flush().map(|()| Body::EMPTY)?,
            Operation::UnsupportedAllocation => return Err(Errno::OPNOTSUPP),
            Operation::FileSystem => Body::file_system(size),
            Operation::Acknowledge => Body::EMPTY,
            Operation::Malformed => return Err(Errno::INVAL),
            _ => return Err(Errno::NOSYS),
        })
    }

    fn read(&mut self, unique: u64, offset: u64, size: usize) -> Result<(), Errno> {
        // Past the end a file reads short.
        let size = (size as u64).min(self.backend.size().saturating_sub(offset)) as usize;
        let Some(buffer) = self.data.as_mut().get_mut(..size) else {
            return self.send(unique, Err(Errno::INVAL));
        };
        match self.backend.read(offset, buffer) {
            Ok(Served::Done) => send(&self.connection.device, unique, Ok(buffer)),
            Ok(Served::Missing) => {
                if !self.connection.park(unique) {
                    return self.send(unique, Err(Errno::INTR));
                }
                self.backend.park(offset, size, Box::new(Reply::new(&self.connection, unique, Body::EMPTY)));
                Ok(())
            }
            Err(error) => self.send(unique, Err(error)),
        }
    }

    fn write(&mut self, unique: u64, offset: u64, size: u32, given: usize) -> Result<(), Errno> {
        let body = Body::written(size);
        let mut later = later(&self.connection, unique, body);
        let written = match self.data.as_mut().get_mut(..size as usize) {
            Some(data) if size as usize == given => check_range(offset, u64::from(size), self.backend.size())
                .and_then(|()| self.backend.write(offset, data, &mut later)),
            _ => Err(Errno::INVAL),
        };
        drop(later);
        self.changed(unique, written, body)
    }

    /// Answers a change, unless whoever has its sink does.
    fn changed(&self, unique: u64, result: Result<Served, Errno>, body: Body) -> Result<(), Errno> {
        match result {
            Ok(Served::Done) => self.send(unique, Ok(body.as_bytes())),
            Ok(Served::Missing) => Ok(()),
            Err(error) => self.send(unique, Err(error)),
        }
    }

    fn send(&self, unique: u64, result: Result<&[u8], Errno>) -> Result<(), Errno> {
        send(&self.connection.device, unique, result)
    }
}

/// Makes the reply of a change that has to wait.
fn later(connection: &Arc<Connection>, unique: u64, body: Body) -> impl FnMut() -> Box<dyn ChangeSink> {
    move || {
        if !connection.park(unique) {
            // It is found unwanted, and is not made.
            let _ = send(&connection.device, unique, Err(Errno::INTR));
        }
        Box::new(Reply::new(connection, unique, body))
    }
}

fn check_range(offset: u64, length: u64, size: u64) -> Result<(), Errno> {
    match offset.checked_add(length) {
        Some(end) if end <= size => Ok(()),
        _ => Err(Errno::NOSPC),
    }
}

/// The reply to a request that waited, from whichever thread has what it waited for.
struct Reply {
    connection: Arc<Connection>,
    unique: u64,
    /// What a change is answered with.
    body: Body,
    /// It is answered by us, and by no interrupt.
    claimed: AtomicBool,
}

impl Reply {
    fn new(connection: &Arc<Connection>, unique: u64, body: Body) -> Self {
        Self { connection: Arc::clone(connection), unique, body, claimed: AtomicBool::new(false) }
    }

    fn claim(&self) -> bool {
        let claimed = self.claimed.load(Ordering::Relaxed) || self.connection.unpark(self.unique);
        self.claimed.store(claimed, Ordering::Relaxed);
        claimed
    }

    fn answer(&self, result: Result<&[u8], Errno>) {
        if self.claim()
            && let Err(error) = send(&self.connection.device, self.unique, result)
        {
            tracing::error!(%error, "a parked request could not be answered");
        }
    }

    fn is_wanted(&self) -> bool {
        self.claimed.load(Ordering::Relaxed) || self.connection.lock().waiting.contains(&self.unique)
    }
}

impl ReadSink for Reply {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        self.answer(result);
    }

    fn is_wanted(&self) -> bool {
        Self::is_wanted(self)
    }
}

impl ChangeSink for Reply {
    fn claim(&self) -> bool {
        Self::claim(self)
    }

    fn is_wanted(&self) -> bool {
        Self::is_wanted(self)
    }

    fn complete(self: Box<Self>, result: Result<(), Errno>) {
        self.answer(result.map(|()| self.body.as_bytes()));
    }
}

/// Answers `unique`. The only error is that the connection is of no use any more.
fn send(device: &OwnedFd, unique: u64, result: Result<&[u8], Errno>) -> Result<(), Errno> {
    let body = result.unwrap_or(&[]);
    let header = wire::reply_header(unique, result.err(), body.len());
    loop {
        return match rustix::io::writev(device, &[IoSlice::new(&header), IoSlice::new(body)]) {
            Err(Errno::INTR) => continue,
            // ENOENT: its issuer gave up. ENODEV: the file system is gone, which the next read tells.
            Ok(_) | Err(Errno::NOENT | Errno::NODEV | Errno::CONNABORTED) => Ok(()),
            Err(error) => {
                tracing::error!(%error, unique, "writing a FUSE reply failed");
                Err(error)
            }
        };
    }
}

/// A new connection and its file system, mounted nowhere: the mount is an unattached object, so no mount table shows it and
/// nothing needs unmounting. It lives as long as this descriptor or a file opened through it.
pub struct Mount {
    /// What the server reads requests from.
    pub device: OwnedFd,
    /// The root directory.
    pub root: OwnedFd,
}

impl Mount {
    /// Makes it. `source` is what the kernel calls it in messages.
    ///
    /// # Errors
    /// ENOENT without `/dev/fuse`; ENODEV without FUSE in the kernel; EPERM without CAP_SYS_ADMIN.
    pub fn new(source: &str) -> std::io::Result<Self> {
        Self::make(source, "40000", None)
    }

    /// As [`Self::new`], with the file as its root, so that it can be mounted on a file ([`Session::start_on_file`]). The
    /// mount table shows it as `fuse.SUBTYPE`.
    ///
    /// # Errors
    /// As [`Self::new`].
    pub fn on_file(source: &str, subtype: &str) -> std::io::Result<Self> {
        Self::make(source, "100600", Some(subtype))
    }

    fn make(source: &str, root_mode: &str, subtype: Option<&str>) -> std::io::Result<Self> {
        use rustix::mount::{
            FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_string, fsmount, fsopen,
        };
        use std::os::fd::AsRawFd;
        let device: OwnedFd = std::fs::File::options().read(true).write(true).open("/dev/fuse")?.into();
        let context = fsopen("fuse", FsOpenFlags::FSOPEN_CLOEXEC)?;
        let descriptor = device.as_raw_fd().to_string();
        for (key, value) in [
            ("source", source),
            ("fd", descriptor.as_str()),
            ("rootmode", root_mode),
            ("user_id", "0"),
            ("group_id", "0"),
        ] {
            fsconfig_set_string(&context, key, value)?;
        }
        if let Some(subtype) = subtype {
            fsconfig_set_string(&context, "subtype", subtype)?;
        }
        fsconfig_create(&context)?;
        let attributes =
            MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NODEV | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let root = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)?;
        Ok(Self { device, root })
    }

    /// Shows it at `path`, which has to be there.
    ///
    /// # Errors
    /// As mounting.
    pub fn attach(&self, path: &std::path::Path) -> std::io::Result<()> {
        use rustix::mount::{MoveMountFlags, move_mount};
        let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
        Ok(move_mount(&self.root, "", rustix::fs::CWD, path, flags)?)
    }
}

#[cfg(test)]
mod tests;
