//! How agent, keeper and volume process speak: JSON, one message per line, over unix sockets.
//!
//! ```text
//! agent  --keeper.sock-->  keeper  --socketpair-->  volume process
//! one request, one reply       many requests, each with a number; replies in any order
//! per connection               descriptors travel with the first byte (SCM_RIGHTS)
//! ```
//!
//! Keys never travel here; the volume key is a descriptor of secret memory.

use std::io::{BufRead, BufReader, IoSlice, IoSliceMut, Read, Write};
use std::mem::MaybeUninit;
use std::net::SocketAddr;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};

use decant_base::{Bytes, Epoch, ExtentSet, MigrationId, VolumeId};
use decant_dataplane::{
    CloneStatus, ExportSecret, Failure, FailureCode, Geometry, MissingPolicy, Origin, Reader, Verification,
};
use rustix::net::{
    RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, SendAncillaryBuffer, SendAncillaryMessage, SendFlags,
};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};

use crate::site::SiteConfig;

/// The longest line: a map of live blocks with 2 million runs.
const MAX_LINE_BYTES: u64 = 64 << 20;

/// What the agent asks of a keeper.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum KeeperRequest {
    /// Makes the image: a fresh volume key, a header. Answered by `Done`.
    Format {
        /// The shape of the volume.
        geometry: Geometry,
    },
    /// Makes the image: a header of this worker's own size around the key in the source's header, proving that it can be
    /// unlocked here. `Done`.
    Adopt {
        /// The shape of the volume.
        geometry: Geometry,
        /// The source's header area, base64.
        header: String,
    },
    /// Starts the volume process, and makes the device if `work` has one. `Started`.
    Start {
        /// What it is to be.
        work: Box<Work>,
    },
    /// The header area as an export's peer needs it. `Header`.
    Header,
    /// Makes a writer an exporter, see [`VolumeRequest::Seal`]; the device goes away behind it. `Volume`.
    Seal {
        /// For whom.
        export: ExportWork,
    },
    /// Something for the volume process. `Volume`.
    Volume {
        /// What.
        request: VolumeRequest,
    },
    /// How it stands. `Status`.
    Status,
    /// How it stands, without asking the volume process. `Status`.
    Kept,
    /// Ends the volume process in good order, takes the device away and ends the keeper. Refused while the device is used.
    /// `Stopped`.
    Stop,
}

/// What a keeper answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum KeeperReply {
    /// It is done.
    Done,
    /// The device is gone, and the keeper is about to be.
    Stopped {
        /// What was not in good order.
        trouble: Option<Failure>,
    },
    /// The volume process runs.
    Started {
        /// Its device.
        device: Option<PathBuf>,
    },
    /// The header area.
    Header {
        /// Binary header to the end of the keyslots, base64.
        header: String,
        /// SHA-256 of the area, hex.
        digest: String,
    },
    /// What the volume process answered.
    Volume {
        /// That.
        reply: VolumeReply,
    },
    /// How it stands.
    Status(Box<KeeperStatus>),
}

/// How a keeper and its volume process stand.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct KeeperStatus {
    /// The keeper's process.
    pub pid: u32,
    /// The volume process, while there is one.
    pub volume_pid: Option<u32>,
    /// How often the volume process was started again.
    pub restarts: u64,
    /// What it does; `None` before `Start`.
    pub work: Option<Work>,
    /// The device.
    pub device: Option<PathBuf>,
    /// What the volume process says; `None` while there is none.
    pub volume: Option<VolumeStatus>,
    /// Why there is none, while there should be one.
    pub trouble: Option<String>,
}

/// What a volume process is to be. The keeper keeps it up to date, so that a process started again gets what its
/// predecessor was at the end.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Work {
    /// The shape of the volume.
    pub geometry: Geometry,
    /// Bytes of header before the payload.
    pub header: Bytes,
    /// Whether there is a device.
    pub device: bool,
    /// Where missing blocks come from; `None`: nothing is missing.
    pub clone: Option<CloneWork>,
    /// The export.
    pub export: Option<ExportWork>,
    /// Limit of hydration, bytes per second.
    pub limit: Option<Bytes>,
    /// What reads of missing blocks get while the origin is away.
    pub policy: MissingPolicy,
}

/// A clone's part of [`Work`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct CloneWork {
    /// For.
    pub migration: MigrationId,
    /// Whence.
    pub origin: Origin,
    /// Whether it has begun: there is a map. Before that, reads are parked.
    pub begun: bool,
}

/// An export's part of [`Work`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ExportWork {
    /// For.
    pub migration: MigrationId,
    /// Who may connect, and how.
    pub reader: Reader,
    /// What an iSCSI export and its reader prove to each other.
    pub secret: Option<ExportSecret>,
    /// Address to listen on; port 0 lets the system choose.
    pub listen: SocketAddr,
    /// Whether the volume is sealed: requests are answered, nothing is written.
    pub sealed: bool,
}

/// The first message to a volume process. With it come descriptors: the key, and `/dev/fuse` if there is a device.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct VolumeStart {
    /// Whose.
    pub site: SiteConfig,
    /// Which.
    pub volume: VolumeId,
    /// What it is to be.
    pub work: Work,
    /// Whether a predecessor served the same FUSE connection.
    pub resume: bool,
}

/// What a keeper asks of its volume process.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "ask")]
pub enum VolumeRequest {
    /// Opens the export; requests are parked unless it is sealed. `Exporting`.
    OpenExport {
        /// How.
        export: ExportWork,
    },
    /// Closes the export. `Done`.
    CloseExport,
    /// No write lands from here on; the export answers. `Sealed`.
    Seal {
        /// For whom.
        export: ExportWork,
    },
    /// The clone's map is written; reads and writes flow. `Done`.
    Begin {
        /// What is live.
        live: ExtentSet,
        /// At.
        epoch: Epoch,
        /// The origin, should it have moved since the clone was assembled.
        clone: CloneWork,
    },
    /// Waits a few seconds for a session with the origin. `Done`.
    AwaitOrigin,
    /// Compares what was fetched with what the origin served. `Verified`.
    Verify,
    /// The metadata says that the volume is whole: the clone's map goes. `Done`.
    DropMap,
    /// Limits hydration. `Done`.
    Limit {
        /// Bytes per second.
        rate: Option<Bytes>,
    },
    /// Sets the policy; with EIO, reads that wait for an origin that is away fail. `Done`.
    Policy {
        /// The policy.
        policy: MissingPolicy,
    },
    /// Everything acknowledged is made durable; parked reads fail. `Done`.
    Quiesce,
    /// How it stands. `Status`.
    Status,
}

/// What a volume process answers.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "snake_case", tag = "answer")]
pub enum VolumeReply {
    /// It is done.
    Done,
    /// The export listens.
    Exporting {
        /// On which port.
        port: u16,
    },
    /// Sealed.
    Sealed {
        /// Live blocks.
        live: ExtentSet,
        /// The export's port.
        port: u16,
    },
    /// Compared.
    Verified {
        /// What was found.
        verification: Verification,
    },
    /// How it stands.
    Status {
        /// That.
        status: VolumeStatus,
    },
}

/// How a volume process stands.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct VolumeStatus {
    /// How far a clone is.
    pub clone: Option<CloneStatus>,
    /// The export's port.
    pub port: Option<u16>,
    /// Why the volume acknowledges nothing any more.
    pub failed: Option<String>,
}

/// A request or reply with its number, between keeper and volume process.
#[derive(Debug, Serialize, Deserialize)]
pub struct Numbered<T> {
    /// Chosen by the keeper; 0 is the start.
    pub number: u64,
    /// The request or reply.
    pub body: T,
}

/// Sends one line.
///
/// # Errors
/// When the other end is gone.
pub fn send_line<T: Serialize>(mut stream: &UnixStream, message: &T) -> std::io::Result<()> {
    let mut line = serde_json::to_vec(message)?;
    line.push(b'\n');
    stream.write_all(&line)
}

/// Lines from the other end.
pub struct Lines<R>(BufReader<R>);

impl<R: Read> Lines<R> {
    /// Reads lines of `stream`.
    pub fn new(stream: R) -> Self {
        Self(BufReader::new(stream))
    }

    /// The next message; `None` at the end.
    ///
    /// # Errors
    /// When the line is no such message or longer than 64 MiB.
    pub fn receive<T: DeserializeOwned>(&mut self) -> std::io::Result<Option<T>> {
        let mut line = Vec::new();
        (&mut self.0).take(MAX_LINE_BYTES).read_until(b'\n', &mut line)?;
        if line.last() != Some(&b'\n') {
            // Cut off in the middle is as good as gone: its sender died.
            return Ok(None);
        }
        Ok(Some(serde_json::from_slice(&line)?))
    }
}

/// Sends `descriptors` with one byte.
///
/// # Errors
/// When the other end is gone.
pub fn send_descriptors(stream: &UnixStream, descriptors: &[BorrowedFd<'_>]) -> std::io::Result<()> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = SendAncillaryBuffer::new(&mut space);
    if !ancillary.push(SendAncillaryMessage::ScmRights(descriptors)) {
        return Err(std::io::Error::other("at most two descriptors go with a start"));
    }
    rustix::net::sendmsg(stream, &[IoSlice::new(b"d")], &mut ancillary, SendFlags::NOSIGNAL)?;
    Ok(())
}

/// Receives what [`send_descriptors`] sent.
///
/// # Errors
/// When the other end is gone.
pub fn receive_descriptors(stream: &UnixStream) -> std::io::Result<Vec<OwnedFd>> {
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(2))];
    let mut ancillary = RecvAncillaryBuffer::new(&mut space);
    let mut byte = [0];
    let got = rustix::net::recvmsg(stream, &mut [IoSliceMut::new(&mut byte)], &mut ancillary, RecvFlags::CMSG_CLOEXEC)?;
    if got.bytes != 1 {
        return Err(std::io::ErrorKind::UnexpectedEof.into());
    }
    let mut descriptors = Vec::new();
    for message in ancillary.drain() {
        if let RecvAncillaryMessage::ScmRights(received) = message {
            descriptors.extend(received);
        }
    }
    Ok(descriptors)
}

/// Runs `with` with a path to `name` in `directory` that fits a socket address (108 bytes), however long the directory's is.
fn with_short_path<T>(path: &Path, with: impl FnOnce(&Path) -> std::io::Result<T>) -> std::io::Result<T> {
    if path.as_os_str().len() < 108 {
        return with(path);
    }
    let (Some(directory), Some(name)) = (path.parent(), path.file_name()) else {
        return Err(std::io::ErrorKind::InvalidInput.into());
    };
    let directory = std::fs::File::open(directory)?;
    with(&Path::new("/proc/self/fd").join(directory.as_fd().as_raw_fd().to_string()).join(name))
}

/// Listens on `path`, in the place of a dead predecessor's socket; the caller holds a lock that says it is dead.
///
/// # Errors
/// What the system says.
pub fn listen(path: &Path) -> std::io::Result<UnixListener> {
    match std::fs::remove_file(path) {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
        _ => {}
    }
    with_short_path(path, |short| UnixListener::bind(short))
}

/// Connects to `path`.
///
/// # Errors
/// NotFound or ConnectionRefused when nobody listens there.
pub fn connect(path: &Path) -> std::io::Result<UnixStream> {
    with_short_path(path, |short| UnixStream::connect(short))
}

/// One request to the keeper at `path`, and its answer.
///
/// # Errors
/// [`FailureCode::Retry`] when no keeper listens, or it dies before it answers; else what it answers.
pub fn ask(path: &Path, request: &KeeperRequest) -> Result<KeeperReply, Failure> {
    let lost = |error: std::io::Error| Failure {
        code: FailureCode::Retry,
        message: format!(
            "the volume's keeper does not answer on {}: {error}; it is started again with the next attempt",
            path.display()
        ),
    };
    let stream = connect(path).map_err(lost)?;
    send_line(&stream, request).map_err(lost)?;
    let reply: Option<Result<KeeperReply, Failure>> = Lines::new(&stream).receive().map_err(lost)?;
    reply.unwrap_or_else(|| Err(lost(std::io::ErrorKind::UnexpectedEof.into())))
}
