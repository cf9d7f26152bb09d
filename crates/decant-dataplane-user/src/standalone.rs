//! A clone on its own, without a worker: an NBD export, a disk over iSCSI or a local file as origin, a file or block device as
//! destination, served over NBD or as a file while it fills.
//!
//! The same engine, map and origin as a volume's, with no cipher: bytes are kept as they come. What is where beside the
//! destination, and what it is a record of, is in `record`.
//!
//! ```text
//! Standalone::open: the lock, and what there is --> Opening::start: origin, destination, engine, fronts --> Standalone
//! ```

mod destination;
mod error;
mod front;
mod local;
mod opened;
mod record;

use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use decant_base::{BLOCK, Epoch, ExtentSet, VolumeId};
use decant_clone::Shape;
use decant_dataplane::{CloneStatus, MissingPolicy};
use rustix::io::Errno;

use crate::device::Exported;
use crate::engine::{self, Cipher, Engine, Files, Mode, VerifyError, beside};
use crate::export::iscsi::Chap;
use crate::export::{Address, Server};
use crate::stream::Listener;
use crate::tls::ClientTls;
use error::io;
pub use error::{DetachError, StandaloneError};
use front::{FileFront, Front};
use opened::Opened;
use record::{Found, Lock, Place, Record};

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

/// What to clone, where to, and how to serve it.
#[derive(Debug, Clone)]
pub struct StandaloneOptions {
    /// The origin as its user wrote it, without secrets: it is recorded, and shown.
    pub origin: String,
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
    /// Where there is no map: what the destination holds is of no use and may be overwritten.
    pub overwrite: bool,
    /// The origin or the destination of the map has another name now, and is recorded anew.
    pub moved: bool,
}

/// A running clone. Dropping it leaves the map as after a crash; [`Standalone::close`] ends in order.
pub struct Standalone {
    engine: Arc<Engine>,
    meta: PathBuf,
    record: Record,
    /// One detaches at a time.
    detaching: Mutex<()>,
    /// How it stood when it was detached.
    last: Mutex<Option<CloneStatus>>,
    server: Option<Server>,
    file: Option<FileFront>,
    /// Let go of last.
    _lock: Option<Lock>,
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

/// A clone that nobody else runs, about to start.
pub struct Opening {
    options: StandaloneOptions,
    found: Found,
    record: Option<Record>,
    lock: Lock,
}

impl Opening {
    /// Whether blocks may be missing, so that an origin is needed.
    pub fn needs_origin(&self) -> bool {
        matches!(self.found, Found::Nothing | Found::Map { complete: false, .. })
    }

    /// Connects to `source`, which may be left out if no origin is needed, opens or makes the destination and its map, and serves.
    ///
    /// # Errors
    /// [`StandaloneError`]; what was made is taken away again.
    pub fn start(self, source: Option<&Source>) -> Result<Standalone, StandaloneError> {
        let source = source.filter(|_| self.needs_origin());
        if self.needs_origin() && source.is_none() {
            return Err(StandaloneError::Size("none is named".into()));
        }
        // Dropped in the other order: the lock goes after what was made.
        let Self { options, found, record, lock } = self;
        let mut made = Made::default();
        let known = match &found {
            Found::Nothing => None,
            Found::Map { size, .. } | Found::Whole { size, .. } => Some(*size),
        };
        check_record(&options, &found, record.as_ref())?;
        // Found in use before anything is made.
        let opened = Opened::of(source, &options.origin, known)?;
        let size = match (known, &opened) {
            (Some(size), _) => size,
            (None, Opened::Local(_, claim)) => claim.size,
            (None, Opened::Remote(remote, _)) => remote.wait_connected(FIRST_SESSION)?.size,
            (None, Opened::Nothing) => unreachable!("a clone that is not there yet has an origin"),
        };
        let shape = Shape::new(size, 512).map_err(|error| StandaloneError::Size(error.to_string()))?;
        if found == Found::Nothing {
            destination::make_room(&options.meta, engine::map_bytes(shape))?;
        }
        let image = destination::open(&options, size, &found, &mut made)?;
        let (record, renamed) = keep_record(&options, &found, record, size, &mut made)?;
        let files = Files::new(image.file, &options.destination, 0, size, options.meta.clone()).with_room_for_all();
        let engine = Engine::open(engine::Options {
            volume: VolumeId::new(&record.clone)
                .map_err(|error| StandaloneError::Size(format!("its map is of {:?}: {error}", record.clone)))?,
            shape,
            mode: match found {
                Found::Nothing => Mode::Prepared,
                Found::Map { .. } => Mode::Clone,
                Found::Whole { .. } => Mode::Plain,
            },
            disk: Arc::new(files),
            cipher: Arc::new(Plaintext),
            boot: engine::boot_id().map_err(|source| io("read", Path::new("boot_id"), source))?,
        })?;
        let meta = options.meta.clone();
        let (detaching, last) = <(Mutex<()>, Mutex<_>)>::default();
        let clone = Standalone { engine, meta, record, detaching, last, server: None, file: None, _lock: None };
        let started = clone.serve(&options, opened, found == Found::Nothing)?;
        if let Some(path) = renamed
            && let Err(error) = started.record.write(&path)
        {
            let _ = started.close();
            return Err(io("write", &path, error));
        }
        made.0.clear();
        Ok(Standalone { _lock: Some(lock), ..started })
    }
}

/// That the origin and the destination named are those of the clone that was found.
fn check_record(options: &StandaloneOptions, found: &Found, record: Option<&Record>) -> Result<(), StandaloneError> {
    let ending = match found {
        Found::Nothing => return Ok(()),
        Found::Map { .. } => "origin",
        Found::Whole { .. } => "done",
    };
    if options.moved || destination::is_missing(&options.destination) {
        return Ok(());
    }
    let path = beside(&options.meta, ending);
    let Some(record) = record else {
        return Err(StandaloneError::NoRecord { meta: options.meta.clone(), record: path });
    };
    let place = Place::of(&options.destination).map_err(|error| io("look at", &options.destination, error))?;
    record.check(&path, &record::origin_text(&options.origin), &place)
}

/// What the map is, or is going to be, of. Of a new one that is recorded here, unless it is already; of one whose origin or
/// destination has another name now, in the file that is returned too, by the caller once all else has succeeded: a start that
/// fails must not take the word of whoever named the wrong one.
fn keep_record(
    options: &StandaloneOptions,
    found: &Found,
    record: Option<Record>,
    size: u64,
    made: &mut Made,
) -> Result<(Record, Option<PathBuf>), StandaloneError> {
    let meta = &options.meta;
    if let (Some(record), false) = (record, options.moved && *found != Found::Nothing) {
        return Ok((record, None));
    }
    let (path, clone) = match found {
        Found::Nothing => (beside(meta, "origin"), Record::draw_id().map_err(|error| io("name", meta, error))?),
        Found::Map { clone, .. } => (beside(meta, "origin"), clone.clone()),
        Found::Whole { clone, .. } => (beside(meta, "done"), clone.clone()),
    };
    let place = Place::of(&options.destination).map_err(|error| io("look at", &options.destination, error))?;
    let record = Record { clone, size, origin: record::origin_text(&options.origin), destination: place };
    if *found != Found::Nothing {
        return Ok((record, Some(path)));
    }
    let endings = ["origin", "origin.new", "new", "marks"].map(|ending| beside(meta, ending));
    made.0.extend([meta.clone()].into_iter().chain(endings));
    record.write(&path).map_err(|error| io("write", &path, error))?;
    Ok((record, None))
}

impl Standalone {
    /// Takes the map for this process, and looks what there is.
    ///
    /// # Errors
    /// Another process has it; what lies there is no map, or damaged.
    pub fn open(options: &StandaloneOptions) -> Result<Opening, StandaloneError> {
        let options = StandaloneOptions { meta: record::real_path(&options.meta), ..options.clone() };
        let lock = Lock::take(&options.meta)?;
        let (found, record) = record::look(&options.meta)?;
        Ok(Opening { options, found, record, lock })
    }

    fn serve(mut self, options: &StandaloneOptions, opened: Opened, fresh: bool) -> Result<Self, StandaloneError> {
        // All that holds the hydration back, before there is an origin to fetch from.
        self.engine.pause(!options.hydrate);
        self.engine.set_limit(options.limit);
        // Neither front has tags that waiting reads take from writes.
        self.engine.set_most_waiting(usize::MAX);
        if let Some(origin) = opened.origin(&self.engine)? {
            self.engine.set_origin(origin, &options.origin);
        }
        let started = self.open_fronts(options).and_then(|()| if fresh { self.begin() } else { Ok(()) });
        if let Err(error) = started {
            // No thread of it may touch the files that are being taken away.
            self.let_all_go();
            let _ = self.engine.close();
            return Err(error);
        }
        Ok(self)
    }

    fn begin(&self) -> Result<(), StandaloneError> {
        let mut live = ExtentSet::new();
        live.insert(0..self.engine.shape().size().div_ceil(BLOCK));
        Ok(self.engine.begin(live, Epoch(0))?)
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

    /// How far it is; once it is detached, how it stood then. `None`: it was whole before it started.
    pub fn status(&self) -> Option<CloneStatus> {
        self.engine.status().or_else(|| self.last.lock().unwrap_or_else(PoisonError::into_inner).clone())
    }

    /// Whether it needs no origin any more.
    pub fn is_whole(&self) -> bool {
        self.engine.is_plain()
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
        let _one = self.detaching.lock().unwrap_or_else(PoisonError::into_inner);
        let before = self.engine.status();
        self.engine.finish().map_err(|error| match (error, self.engine.status()) {
            (VerifyError::NotYet(_), Some(status)) => DetachError::Missing(status.bytes_missing.max(1)),
            (error, _) => DetachError::Failed(error.to_string()),
        })?;
        if let Some(before) = before {
            let now = CloneStatus { connected: false, rate_bytes_per_s: 0, hindrance: String::new(), ..before };
            *self.last.lock().unwrap_or_else(PoisonError::into_inner) = Some(now);
        }
        let done = beside(&self.meta, "done");
        let failed = |error: std::io::Error| DetachError::Failed(format!("cannot write {}: {error}", done.display()));
        self.record.write(&done).map_err(failed)?;
        self.engine.drop_map().map_err(|error| DetachError::Failed(format!("cannot remove the map: {error}")))?;
        let _ = std::fs::remove_file(beside(&self.meta, "origin"));
        Ok(())
    }

    /// The origin goes, and no read waits for it any more: neither one that does now, nor one that comes while the fronts close.
    fn let_all_go(&self) {
        self.engine.set_policy(MissingPolicy::Eio);
        self.engine.drop_origin();
        self.engine.fail_parked_reads();
    }

    /// Ends in order: nothing acknowledged is lost, and the next start goes on from here.
    ///
    /// # Errors
    /// If the last commit fails.
    pub fn close(mut self) -> Result<(), Errno> {
        self.let_all_go();
        drop(self.file.take());
        if let Some(server) = self.server.take() {
            server.close();
        }
        self.engine.close()
    }
}

/// Listens where a running clone is asked and steered; its owner alone may. A socket of that name that nobody serves makes room,
/// and nothing else does.
///
/// # Errors
/// `AddrInUse`: somebody answers there. `AlreadyExists`: a file of that name. `InvalidInput`: the path is too long for a socket.
pub fn control_socket(path: &Path) -> std::io::Result<UnixListener> {
    use std::os::unix::fs::PermissionsExt;
    let listener = Listener::bind_unix(path)?;
    let for_its_owner = std::fs::set_permissions(path, PermissionsExt::from_mode(0o600));
    if let Err(error) = for_its_owner.and_then(|()| listener.set_nonblocking(true)) {
        let _ = std::fs::remove_file(path);
        return Err(error);
    }
    Ok(listener)
}

/// No cipher: an origin's zeros are zeros already.
struct Plaintext;

impl Cipher for Plaintext {
    fn encrypt(&self, _offset: u64, _data: &mut [u8]) {}
    fn decrypt(&self, _offset: u64, _data: &mut [u8]) {}
}

#[cfg(test)]
mod tests;
