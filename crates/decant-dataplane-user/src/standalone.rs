//! A clone on its own, without a worker: an NBD export, a disk over iSCSI or a local file as origin, a file or block device as
//! destination, served over NBD or as a file while it fills.
//!
//! The same engine, map and origin as a volume's, with no cipher: bytes are kept as they come.
//!
//! What is where, beside the destination: `META` is the map, `META` with the ending `.marks` what a killed process had
//! acknowledged, with `.failed` a note that the medium failed; `META.done`, its size in bytes as text, takes the map's place
//! once the clone is detached from its origin.

mod front;
mod local;
mod opened;

use std::ffi::OsString;
use std::fs::File;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use decant_base::{BLOCK, Epoch, ExtentSet, VolumeId};
use decant_clone::Shape;
use decant_clone::format::{PAGE, Phase, Superblock};
use decant_dataplane::CloneStatus;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::device::Exported;
use crate::engine::{self, Cipher, Engine, Files, Mode, OpenError, VerifyError};
use crate::export::claim::{Claim, ClaimError, claim};
use crate::export::iscsi::Chap;
use crate::export::{Address, ListenError, Server};
use crate::origin::NotConnected;
use crate::tls::ClientTls;
use front::{FileFront, Front};
use opened::Opened;

/// How long the first session with the origin may take.
const FIRST_SESSION: Duration = Duration::from_secs(10);

/// Where a clone's missing blocks come from.
#[derive(Clone)]
pub enum Source {
    /// An NBD export.
    Nbd {
        /// Where its server listens.
        address: Address,
        /// Its name there.
        export: String,
        /// Mutual TLS, or in the clear.
        tls: Option<ClientTls>,
    },
    /// A disk over iSCSI.
    Iscsi {
        /// The target's portal.
        address: Address,
        /// The target's name (IQN).
        target: String,
        /// The logical unit.
        lun: u16,
        /// Our own name (IQN).
        initiator: String,
        /// What is proved to the target, and by it.
        chap: Option<Chap>,
    },
    /// A file or block device of this machine, that nobody writes meanwhile.
    File(PathBuf),
}

impl std::fmt::Display for Source {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Nbd { address, .. } => write!(f, "{address}"),
            Self::Iscsi { address, target, .. } => write!(f, "{target} at {address}"),
            Self::File(path) => write!(f, "{}", path.display()),
        }
    }
}

/// What to clone, where to, and how to serve it.
#[derive(Clone)]
pub struct StandaloneOptions {
    /// The origin.
    pub source: Source,
    /// The destination: a regular file, made if it is not there, or a block device that is large enough.
    pub destination: PathBuf,
    /// The clone's map. If it is there, filling goes on where it ended.
    pub meta: PathBuf,
    /// Where clients connect over NBD.
    pub serve: Option<Address>,
    /// The path at which it is a file, through FUSE.
    pub fuse: Option<PathBuf>,
    /// Whether blocks are fetched that nobody has asked for.
    pub hydrate: bool,
    /// Most bytes per second of those.
    pub limit: Option<u64>,
}

/// Why a clone cannot start.
#[derive(Debug, thiserror::Error)]
pub enum StandaloneError {
    /// The origin does not answer.
    #[error(transparent)]
    Origin(#[from] NotConnected),
    /// The origin or the destination is in use, or cannot be opened.
    #[error(transparent)]
    Claim(#[from] ClaimError),
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
    /// There is a map and no destination, or one of another size.
    #[error("{} is not what the map at {} is of: it {what}", destination.display(), meta.display())]
    NotItsMap {
        /// Which.
        destination: PathBuf,
        /// The map.
        meta: PathBuf,
        /// What is wrong with the destination.
        what: String,
    },
    /// The destination is a device with too little room.
    #[error("{} has {found} bytes, the origin has {wanted}", destination.display())]
    TooSmall {
        /// Which.
        destination: PathBuf,
        /// Its bytes.
        found: u64,
        /// The origin's.
        wanted: u64,
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

/// Why a clone cannot be detached from its origin.
#[derive(Debug, thiserror::Error)]
pub enum DetachError {
    /// Blocks are missing.
    #[error("{0} bytes are still only at the origin")]
    Missing(u64),
    /// It cannot be recorded, or the medium failed.
    #[error("{0}")]
    Failed(String),
}

/// A running clone. Dropping it leaves the map as after a crash; [`Standalone::close`] ends in order.
pub struct Standalone {
    engine: Arc<Engine>,
    meta: PathBuf,
    server: Option<Server>,
    file: Option<FileFront>,
}

/// What there is of a clone already.
enum Found {
    Nothing,
    /// A map.
    Map {
        /// The clone's bytes.
        size: u64,
        /// All of them are here; the map was not removed yet.
        complete: bool,
    },
    /// All of them, detached.
    Whole(u64),
}

/// What a start that fails takes away again.
#[derive(Default)]
struct Made(Vec<PathBuf>);

impl Drop for Made {
    fn drop(&mut self) {
        for path in &self.0 {
            let _ = std::fs::remove_file(path);
        }
    }
}

impl Standalone {
    /// Connects, opens or makes the destination and its map, and serves.
    ///
    /// # Errors
    /// [`StandaloneError`]; what was made is taken away again.
    pub fn start(options: &StandaloneOptions) -> Result<Self, StandaloneError> {
        let found = look(&options.meta)?;
        // Found in use before anything is made.
        let opened = Opened::of(&options.source, &found)?;
        let size = match (&found, &opened) {
            (Found::Map { size, .. } | Found::Whole(size), _) => *size,
            (Found::Nothing, Opened::Local(_, claim)) => claim.size,
            (Found::Nothing, Opened::Remote(remote, _)) => remote.wait_connected(FIRST_SESSION)?.size,
            (Found::Nothing, Opened::Nothing) => unreachable!("a clone that is not there yet has an origin"),
        };
        if let Opened::Local(_, claim) = &opened
            && claim.size != size
        {
            return Err(StandaloneError::Size(format!("it has {} bytes, the map is of {size}", claim.size)));
        }
        let shape = Shape::new(size, 512).map_err(|error| StandaloneError::Size(error.to_string()))?;
        let mut made = Made::default();
        let image = open_destination(options, size, &found, &mut made)?;
        if let Found::Nothing = found {
            let endings = ["map.new", "marks"].map(|ending| options.meta.with_extension(ending));
            made.0.extend([options.meta.clone()].into_iter().chain(endings));
        }
        let engine = Engine::open(engine::Options {
            volume: VolumeId::new("clone").unwrap_or_else(|_| unreachable!("a DNS label")),
            shape,
            mode: match found {
                Found::Nothing => Mode::Prepared,
                Found::Map { .. } => Mode::Clone,
                Found::Whole(_) => Mode::Plain,
            },
            disk: Arc::new(Files::new(image.file, &options.destination, 0, size, options.meta.clone())),
            cipher: Arc::new(Plaintext),
            boot: engine::boot_id().map_err(|source| io("read", Path::new("boot_id"), source))?,
        })?;
        let started = Self::serve(options, engine, opened, matches!(found, Found::Nothing));
        if started.is_ok() {
            made.0.clear();
        }
        started
    }

    fn serve(
        options: &StandaloneOptions,
        engine: Arc<Engine>,
        opened: Opened,
        fresh: bool,
    ) -> Result<Self, StandaloneError> {
        engine.pause(!options.hydrate);
        if let Some(origin) = opened.origin(&engine)? {
            engine.set_origin(origin, &options.source.to_string());
        }
        let mut clone = Self { engine, meta: options.meta.clone(), server: None, file: None };
        if let Err(error) = clone.open_fronts(options) {
            // No thread of it may touch the files that are being taken away.
            clone.engine.drop_origin();
            let _ = clone.engine.close();
            return Err(error);
        }
        if fresh {
            let mut live = ExtentSet::new();
            live.insert(0..clone.engine.shape().size().div_ceil(BLOCK));
            if let Err(error) = clone.engine.begin(live, Epoch(0)) {
                clone.engine.drop_origin();
                return Err(error.into());
            }
        }
        clone.engine.set_limit(options.limit);
        Ok(clone)
    }

    /// Reads wait until the clone begins, so fronts may be there before it.
    fn open_fronts(&mut self, options: &StandaloneOptions) -> Result<(), StandaloneError> {
        if let Some(address) = &options.serve {
            let device: Arc<dyn Exported> = Arc::new(Front { engine: self.engine.clone() });
            self.server = Some(Server::listen(address, None, "", device)?);
        }
        if let Some(path) = &options.fuse {
            let file = FileFront::mount(path, self.engine.clone());
            self.file = Some(file.map_err(|error| io("mount the clone at", path, error))?);
        }
        Ok(())
    }

    /// How far it is; `None` once it is whole.
    pub fn status(&self) -> Option<CloneStatus> {
        self.engine.status()
    }

    /// Bytes of it.
    pub fn size(&self) -> u64 {
        self.engine.shape().size()
    }

    /// Where NBD clients connect, the port filled in.
    pub fn address(&self) -> Option<&Address> {
        self.server.as_ref().map(Server::local_addr)
    }

    /// Why it acknowledges nothing any more.
    pub fn failure(&self) -> Option<String> {
        self.engine.failure()
    }

    /// Fetches only what somebody reads, or goes on with the rest.
    pub fn pause(&self, paused: bool) {
        self.engine.pause(paused);
    }

    /// Whether only that is fetched.
    pub fn is_paused(&self) -> bool {
        self.engine.is_paused()
    }

    /// Limits what nobody has asked for to bytes per second, or lifts the limit.
    pub fn set_limit(&self, limit: Option<u64>) {
        self.engine.set_limit(limit);
    }

    /// Once nothing is missing: records durably that the clone is whole, lets the origin go, and removes the map; serving goes
    /// on. Again: no error.
    ///
    /// # Errors
    /// Blocks are missing, or the medium failed.
    pub fn detach(&self) -> Result<(), DetachError> {
        self.engine.finish().map_err(|error| match (error, self.status()) {
            (VerifyError::NotYet(_), Some(status)) => DetachError::Missing(status.bytes_missing.max(1)),
            (error, _) => DetachError::Failed(error.to_string()),
        })?;
        let done = done_path(&self.meta);
        let failed = |error: std::io::Error| DetachError::Failed(format!("cannot write {}: {error}", done.display()));
        record_done(&done, self.size()).map_err(failed)?;
        self.engine.drop_map().map_err(|error| DetachError::Failed(format!("cannot remove the map: {error}")))
    }

    /// Ends in order: nothing acknowledged is lost, and the next start goes on from here.
    ///
    /// # Errors
    /// If the last commit fails.
    pub fn close(mut self) -> Result<(), Errno> {
        self.engine.fail_parked_reads();
        drop(self.file.take());
        if let Some(server) = self.server.take() {
            server.close();
        }
        self.engine.close()
    }
}

fn io(action: &'static str, path: &Path, source: std::io::Error) -> StandaloneError {
    StandaloneError::Io { action, path: path.to_owned(), source }
}

fn done_path(meta: &Path) -> PathBuf {
    let mut name = OsString::from(meta);
    name.push(".done");
    name.into()
}

/// The size of a clone that is whole, durably and in its place at once.
fn record_done(done: &Path, size: u64) -> std::io::Result<()> {
    let new = done.with_extension("done.new");
    std::fs::write(&new, format!("{size}\n"))?;
    File::open(&new)?.sync_all()?;
    std::fs::rename(&new, done)?;
    let directory = done.parent().filter(|path| !path.as_os_str().is_empty()).unwrap_or(Path::new("."));
    File::open(directory)?.sync_all()
}

/// What the files beside the destination say.
fn look(meta: &Path) -> Result<Found, StandaloneError> {
    use std::os::unix::fs::FileExt;
    match File::open(meta) {
        Ok(map) => {
            // Two superblocks, of which one may be torn; the newer one counts.
            let mut page = [0; PAGE];
            let both = [0, PAGE as u64]
                .map(|at| map.read_exact_at(&mut page, at).ok().and_then(|()| Superblock::decode(&page).ok()));
            let newest = both.into_iter().flatten().max_by_key(|superblock| superblock.generation);
            let none = || std::io::Error::new(std::io::ErrorKind::InvalidData, "it is no map of a clone");
            let newest = newest.ok_or_else(|| io("use as map", meta, none()))?;
            return Ok(Found::Map { size: newest.size, complete: newest.phase == Phase::Complete });
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {}
        Err(error) => return Err(io("open", meta, error)),
    }
    let done = done_path(meta);
    match std::fs::read_to_string(&done) {
        Ok(text) => match text.trim().parse() {
            Ok(size) => Ok(Found::Whole(size)),
            Err(_) => Err(io("understand", &done, std::io::ErrorKind::InvalidData.into())),
        },
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(Found::Nothing),
        Err(error) => Err(io("read", &done, error)),
    }
}

/// Opens the destination, and sees to it that it is what `found` says.
fn open_destination(
    options: &StandaloneOptions,
    size: u64,
    found: &Found,
    made: &mut Made,
) -> Result<Claim, StandaloneError> {
    let path = &options.destination;
    let not_its_map =
        |what: String| StandaloneError::NotItsMap { destination: path.clone(), meta: options.meta.clone(), what };
    let fresh = matches!(found, Found::Nothing);
    if std::fs::symlink_metadata(path).is_err_and(|error| error.kind() == std::io::ErrorKind::NotFound) {
        if !fresh {
            return Err(not_its_map("is missing".into()));
        }
        let file = std::fs::OpenOptions::new().write(true).create_new(true).open(path);
        let file = file.map_err(|source| io("make", path, source))?;
        made.0.push(path.clone());
        // What a machine keeps on its disk is nobody else's to read.
        file.set_permissions(PermissionsExt::from_mode(0o600)).map_err(|source| io("make", path, source))?;
    }
    let image = claim(path, true)?;
    if image.is_block_device {
        if image.size < size {
            return Err(StandaloneError::TooSmall { destination: path.clone(), found: image.size, wanted: size });
        }
        return Ok(image);
    }
    if !fresh && image.size != size {
        return Err(not_its_map(format!("has {} bytes, not {size}", image.size)));
    }
    // A start that was killed before there was a map has left a hole of the origin's size.
    let is_hole = || rustix::fs::seek(&image.file, SeekFrom::Data(0)) == Err(Errno::NXIO);
    if fresh && image.size != 0 && !(image.size == size && is_hole()) {
        return Err(StandaloneError::NotEmpty { destination: path.clone(), meta: options.meta.clone() });
    }
    image.file.set_len(size).map_err(|source| io("size", path, source))?;
    Ok(image)
}

/// No cipher: an origin's zeros are zeros already.
struct Plaintext;

impl Cipher for Plaintext {
    fn encrypt(&self, _offset: u64, _data: &mut [u8]) {}
    fn decrypt(&self, _offset: u64, _data: &mut [u8]) {}
}
