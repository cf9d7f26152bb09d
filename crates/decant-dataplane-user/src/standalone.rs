//! A clone on its own, without a worker: any NBD export as origin, a file as destination, served over NBD while it fills.
//!
//! The same engine, map and origin as a volume's, with no cipher: bytes are kept as they come.

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use decant_base::{BLOCK, Epoch, ExtentSet, VolumeId};
use decant_clone::Shape;
use decant_dataplane::CloneStatus;
use rustix::io::Errno;

use crate::device::{Exported, Later, OriginSink, Status};
use crate::engine::{self, Cipher, Engine, Files, Mode, OpenError, open_image};
use crate::export::{Address, ListenError, Server};
use crate::fuse::Served;
use crate::origin::{NotConnected, Options, Remote, Timing};

/// How long the first session with the origin may take.
const FIRST_SESSION: Duration = Duration::from_secs(10);
/// Connections to the origin: one for reads that somebody waits for, the others for hydration.
const CONNECTIONS: usize = 3;

/// What to clone, where to, and how to serve it.
#[derive(Debug, Clone)]
pub struct StandaloneOptions {
    /// Where the origin's NBD server listens.
    pub origin: Address,
    /// The export's name there.
    pub export: String,
    /// The destination, a regular file; made if it is not there.
    pub destination: PathBuf,
    /// The clone's map. If it is there, filling goes on where it ended.
    pub meta: PathBuf,
    /// Where clients connect.
    pub serve: Address,
    /// Whether blocks are fetched that nobody has asked for.
    pub hydrate: bool,
}

/// Why a clone cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    /// The origin does not answer.
    #[error(transparent)]
    Origin(#[from] NotConnected),
    /// The destination is not empty and has no map: it is not known which of its bytes are the origin's.
    #[error(
        "{} holds data and has no map at {}: name its map with --meta, or another destination",
        destination.display(),
        meta.display()
    )]
    NotEmpty {
        /// Which.
        destination: PathBuf,
        /// Where its map would be.
        meta: PathBuf,
    },
    /// The origin is no size that a clone can have.
    #[error("the origin cannot be cloned: {0}")]
    Size(String),
    /// The map is damaged, or another clone's.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// The serving address cannot be had.
    #[error(transparent)]
    Serve(#[from] ListenError),
    /// A file cannot be had.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was being done.
        action: &'static str,
        /// With which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
}

/// A running clone. Dropping it leaves the map as after a crash; [`Standalone::close`] ends in order.
pub struct Standalone {
    engine: Arc<Engine>,
    server: Server,
}

impl Standalone {
    /// Connects, opens or makes the destination and its map, and serves.
    ///
    /// # Errors
    /// [`StandaloneError`]; a destination that was made is left, empty.
    pub fn start(options: &StandaloneOptions) -> Result<Self, StandaloneError> {
        let size = probe(options)?;
        let shape = Shape::new(size, 512).map_err(|error| StandaloneError::Size(error.to_string()))?;
        // A clone that was filled has no map any more; there is nothing left to do but serve it.
        let found = options.meta.exists();
        let image = open_destination(options, size, found)?;
        let engine = Engine::open(engine::Options {
            volume: VolumeId::new("clone").unwrap_or_else(|_| unreachable!("a DNS label")),
            shape,
            mode: if found { Mode::Clone } else { Mode::Prepared },
            disk: Arc::new(Files::new(image, &options.destination, 0, size, options.meta.clone())),
            cipher: Arc::new(Plaintext),
            boot: engine::boot_id().map_err(|source| io("read", Path::new("boot_id"), source))?,
        })?;
        engine.pause(!options.hydrate);
        let sink: Arc<dyn OriginSink> = engine.clone();
        let origin = Remote::open(origin_options(options, Some(size)), sink)
            .map_err(|source| io("connect for", &options.destination, source))?;
        engine.set_origin(origin, &options.origin.to_string());
        if !found {
            let mut live = ExtentSet::new();
            live.insert(0..size.div_ceil(BLOCK));
            engine.begin(live, Epoch(0))?;
        }
        let server = Server::listen(&options.serve, None, "", Arc::new(Front { engine: engine.clone() }))?;
        Ok(Self { engine, server })
    }

    /// How far it is; `None` once it is whole.
    pub fn status(&self) -> Option<CloneStatus> {
        self.engine.status()
    }

    /// Why it acknowledges nothing any more.
    pub fn failure(&self) -> Option<String> {
        self.engine.failure()
    }

    /// Ends in order: nothing acknowledged is lost, and the next start goes on from here.
    ///
    /// # Errors
    /// If the last commit fails.
    pub fn close(self) -> Result<(), Errno> {
        self.engine.fail_parked_reads();
        self.server.close();
        self.engine.close()
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> StandaloneError {
    StandaloneError::Io { action, path: path.to_owned(), source }
}

fn origin_options(options: &StandaloneOptions, size: Option<u64>) -> Options {
    Options {
        address: options.origin.clone(),
        tls: None,
        export: options.export.clone(),
        size,
        digests: false,
        connections: if size.is_some() { CONNECTIONS } else { 1 },
        timing: Timing::NETWORK,
    }
}

/// The origin's size.
fn probe(options: &StandaloneOptions) -> Result<u64, StandaloneError> {
    struct Nobody;
    impl OriginSink for Nobody {
        fn handle_data(&self, _token: u64, _offset: u64, _data: &[u8]) {}
        fn handle_hole(&self, _token: u64, _offset: u64, _length: u64) {}
        fn handle_digests(&self, _token: u64, _offset: u64, _crc32c: &[u32]) {}
        fn handle_done(&self, _token: u64, _result: Result<(), Errno>) {}
        fn handle_link(&self, _up: bool, _detail: &str) {}
    }
    let origin = Remote::open(origin_options(options, None), Arc::new(Nobody))
        .map_err(|source| io("connect for", &options.destination, source))?;
    Ok(origin.wait_connected(FIRST_SESSION)?.size)
}

fn open_destination(options: &StandaloneOptions, size: u64, found: bool) -> Result<std::fs::File, StandaloneError> {
    let path = &options.destination;
    if !path.exists() {
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|source| io("make", path, source))?;
        // What a machine keeps on its disk is nobody else's to read.
        file.set_permissions(PermissionsExt::from_mode(0o600)).map_err(|source| io("make", path, source))?;
    }
    let image = open_image(path).map_err(|source| io("open", path, source))?;
    let length = image.metadata().map_err(|source| io("open", path, source))?.len();
    if !found && length != 0 {
        return Err(StandaloneError::NotEmpty { destination: path.clone(), meta: options.meta.clone() });
    }
    image.set_len(size).map_err(|source| io("size", path, source))?;
    Ok(image)
}

/// No cipher: an origin's zeros are zeros already.
struct Plaintext;

impl Cipher for Plaintext {
    fn encrypt(&self, _offset: u64, _data: &mut [u8]) {}
    fn decrypt(&self, _offset: u64, _data: &mut [u8]) {}
}

/// The clone as NBD clients see it: read-write. A read that is missing waits; what was asked after it does not.
struct Front {
    engine: Arc<Engine>,
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
