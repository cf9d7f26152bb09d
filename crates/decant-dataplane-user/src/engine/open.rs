//! Opening a volume, and beginning a clone.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Mutex, atomic::AtomicU64};
use std::time::Duration;

use decant_base::{BLOCK, Epoch, ExtentSet, VolumeId};
use decant_clone::file::Found;
use decant_clone::marks::{self, Mark};
use decant_clone::{BlockMap, CloneCore, Identity, MapError, MapFile, Shape};
use decant_dataplane::Verification;
use rustix::io::Errno;

use super::disk::Note;
use super::{CLONE, Cipher, Disk, Early, Engine, Life, MapFiles, Medium, Waiter, commit, lock};

/// What the volume is, as its metadata (`volume.json`) has it. The map file must agree.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// Whole. A map that is not complete is an error.
    Plain,
    /// Made for a migration, not begun: reads wait, writes fail, until [`Engine::begin`].
    Prepared,
    /// Begun. Without its map it does not open; with a complete one it is plain.
    Clone,
}

/// What an engine is opened with.
pub struct Options {
    /// The volume's id, in the map.
    pub volume: VolumeId,
    /// Size and sector size, from the LUKS2 header.
    pub shape: Shape,
    /// What it is.
    pub mode: Mode,
    /// Its files.
    pub disk: Arc<dyn Disk>,
    /// Keyed.
    pub cipher: Arc<dyn Cipher>,
    /// This boot ([`boot_id`]).
    pub boot: String,
}

/// This boot's id, from /proc/sys/kernel/random/boot_id.
///
/// # Errors
/// As reading a file.
pub fn boot_id() -> std::io::Result<String> {
    Ok(std::fs::read_to_string("/proc/sys/kernel/random/boot_id")?.trim().to_owned())
}

/// Bytes of a map: superblocks, pages, and a live table of the usual length.
pub fn map_bytes(shape: Shape) -> u64 {
    (shape.pages() * 2 + 2) * BLOCK + (64 << 10)
}

/// Why an engine does not open or begin.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The volume failed in an earlier process.
    #[error(
        "the volume stopped acknowledging earlier ({}); what it holds since its last flush is uncertain. Boot the source's copy, or check the file system and remove {}",
        .0.why,
        .0.path.display()
    )]
    Failed(Note),
    /// A clone's map is gone: which blocks are here is not known.
    #[error(
        "the clone's map is missing, so which blocks are here is not known; the source's sealed copy is the way back"
    )]
    MapMissing,
    /// A whole volume has the map of a filling one.
    #[error("a map of a clone that is not complete lies beside a volume that should be whole")]
    UnexpectedMap,
    /// The map cannot be used.
    #[error(transparent)]
    Map(#[from] MapError),
    /// `begin` on a volume that is not prepared, or begun with something else.
    #[error("the volume is not prepared for this: {0}")]
    State(&'static str),
    /// A file cannot be read or written.
    #[error("cannot {what}")]
    Io {
        /// What was tried.
        what: &'static str,
        /// Why not.
        #[source]
        source: Errno,
    },
}

fn io(what: &'static str) -> impl FnOnce(Errno) -> OpenError {
    move |source| OpenError::Io { what, source }
}

impl Engine {
    /// Opens a volume. Reads and repairs nothing that it cannot be sure of.
    ///
    /// # Errors
    /// [`OpenError`]; nothing was changed on disk except by a map that opened.
    pub fn open(options: Options) -> Result<Arc<Self>, OpenError> {
        if let Some(note) = options.disk.failure() {
            return Err(OpenError::Failed(note));
        }
        let map = options.disk.open_map().map_err(io("open the clone's map"))?;
        let (life, files, verified) = match (options.mode, map) {
            (Mode::Prepared, None) => {
                options.disk.reserve_map(map_bytes(options.shape)).map_err(io("make room for the clone's map"))?;
                (Life::Prepared(Early::default()), None, None)
            }
            (Mode::Plain, None) => (Life::Plain, None, None),
            (Mode::Clone, None) => return Err(OpenError::MapMissing),
            (mode, Some(map)) => Self::open_clone(&options, mode, map)?,
        };
        let engine = Self::with(options, life, files, verified);
        engine.spawn_threads();
        Ok(engine)
    }

    #[allow(clippy::type_complexity)]
    fn open_clone(
        options: &Options,
        mode: Mode,
        map: Arc<dyn Medium>,
    ) -> Result<(Life, Option<MapFiles>, Option<Verification>), OpenError> {
        // Pages of a killed process may be in the page cache only, and the next commit overwrites their other slots.
        map.sync().map_err(io("sync the clone's map"))?;
        let identity = identity(options, None);
        let data = map.data().map_err(io("find the clone map's pages"))?;
        let length = map.length().map_err(io("find the clone map's length"))?;
        let mut read = |at: u64, buffer: &mut [u8]| map.read_at(at, buffer).map_err(Into::into);
        let (file, blocks, found) = MapFile::open(&mut read, length, &data, &identity)?;
        if found == Found::Complete {
            let [compared, overwritten, discarded, repaired] = file.superblock().verification;
            return Ok((Life::Plain, None, Some(Verification { compared, overwritten, discarded, repaired })));
        }
        if mode == Mode::Plain {
            return Err(OpenError::UnexpectedMap);
        }
        let epoch = file.superblock().epoch;
        let mut core = Box::new(CloneCore::new(blocks, file, Duration::ZERO));
        let marks = match found {
            Found::Killed => {
                let marks = options.disk.open_marks(false).map_err(|_| MapError::Marks)?;
                replay(&mut core, &*marks, &marks::head(options.volume.as_str(), epoch, &options.boot)[..])?;
                marks
            }
            _ => fresh_marks(options, epoch)?,
        };
        let files = MapFiles { map, marks, superblock: Mutex::default(), punched: AtomicU64::new(0) };
        if found != Found::Killed {
            // What a power cut made of overwritten regions is made durable before the old intents are forgotten.
            commit::commit_at_open(&mut core, &**options.disk.image(), &*files.map)
                .map_err(io("commit the clone's map"))?;
            let (file, _) = core.parts();
            let write = file.begin_update(|superblock| {
                superblock.clean = false;
                superblock.boot.clone_from(&options.boot);
                superblock.intents.fill(0);
            });
            files.map.write_at(write.offset, &write.bytes[..]).map_err(io("write the clone's map"))?;
            files.map.sync().map_err(io("sync the clone's map"))?;
            core.parts().0.end_update();
        }
        Ok((Life::Clone(core), Some(files), None))
    }

    /// Makes the map durable for the blocks that were live at the seal (others read as zeros) and lets I/O flow.
    /// Beginning again at the same epoch changes nothing.
    ///
    /// # Errors
    /// If the volume is not prepared, or the map cannot be made.
    pub fn begin(self: &Arc<Self>, live: ExtentSet, epoch: Epoch) -> Result<(), OpenError> {
        let reads = {
            let mut life = lock(&self.life);
            let early = match &mut *life {
                Life::Plain => return Err(OpenError::State("it is whole")),
                Life::Clone(core) if core.file().superblock().epoch == epoch.0 => return Ok(()),
                Life::Clone(_) => return Err(OpenError::State("it was begun at another epoch")),
                Life::Prepared(early) => early,
            };
            let (mut core, files) = self.make_clone(live, epoch)?;
            *lock(&self.files) = Some(Arc::new(files));
            let Early { reads, limit, eio, boot, link, most_waiting } = std::mem::take(early);
            // All of it before anybody sees the clone: an origin that is up sets the hydration going at once.
            core.set_limit(self.now(), limit);
            if boot {
                core.expect_boot(self.now());
            }
            if let Some(reads) = most_waiting {
                core.set_most_waiting(reads);
            }
            let mut none_waits_yet = Vec::new();
            core.set_eio_when_away(eio, &mut none_waits_yet);
            if let Some((up, detail)) = link {
                core.handle_link(self.now(), up, &detail, &mut none_waits_yet);
            }
            *life = Life::Clone(Box::new(core));
            self.phase.store(CLONE, Ordering::Release);
            reads
        };
        self.note_flush();
        for (bytes, sink) in reads {
            self.park(bytes.start, (bytes.end - bytes.start) as usize, sink);
        }
        self.pump();
        Ok(())
    }

    /// With the lock held: nobody reads or writes a volume before it is begun, so nobody waits for this.
    fn make_clone(&self, live: ExtentSet, epoch: Epoch) -> Result<(CloneCore<Waiter>, MapFiles), OpenError> {
        let map = BlockMap::new(self.shape, live);
        let identity = Identity {
            volume: self.volume.as_str().to_owned(),
            shape: self.shape,
            epoch: Some(epoch.0),
            boot: self.boot.clone(),
        };
        let (file, writes) = MapFile::create(&identity, map.live());
        // The marks file first: a map of this boot that was not closed in order must have one.
        let marks = self.disk.open_marks(true).map_err(io("make the marks file"))?;
        let head = marks::head(self.volume.as_str(), epoch.0, &self.boot);
        marks.write_at(0, &head[..]).map_err(io("write the marks file"))?;
        let made = self.disk.create_map(file.length(self.shape), &writes).map_err(io("make the clone's map"))?;
        decant_base::crash::point("map:created");
        let core = CloneCore::new(map, file, self.now());
        Ok((core, MapFiles { map: made, marks, superblock: Mutex::default(), punched: AtomicU64::new(0) }))
    }
}

fn identity(options: &Options, epoch: Option<u64>) -> Identity {
    Identity { volume: options.volume.as_str().to_owned(), shape: options.shape, epoch, boot: options.boot.clone() }
}

fn fresh_marks(options: &Options, epoch: u64) -> Result<Arc<dyn Medium>, OpenError> {
    let marks = options.disk.open_marks(true).map_err(io("make the marks file"))?;
    let head = marks::head(options.volume.as_str(), epoch, &options.boot);
    marks.write_at(0, &head[..]).map_err(io("write the marks file"))?;
    Ok(marks)
}

/// Takes what a killed process acknowledged.
fn replay(core: &mut CloneCore<Waiter>, marks: &dyn Medium, head: &[u8]) -> Result<(), OpenError> {
    let mut found = vec![0; marks::HEAD];
    marks.read_at(0, &mut found).map_err(io("read the marks file"))?;
    if found != head {
        return Err(MapError::Marks.into());
    }
    let data = marks.data().map_err(io("find the marks"))?;
    let mut page = vec![0; BLOCK as usize];
    let length = marks.length().map_err(io("find the marks"))?;
    for run in data.overlapping(marks::HEAD as u64..length) {
        let first = run.start / BLOCK * BLOCK;
        for at in (first..run.end()).step_by(BLOCK as usize) {
            marks.read_at(at, &mut page).map_err(io("read the marks file"))?;
            for (index, record) in page.as_chunks::<{ marks::RECORD }>().0.iter().enumerate() {
                let number = (at - marks::HEAD as u64) / marks::RECORD as u64 + index as u64;
                if let Some(mark) = Mark::decode(number, record) {
                    core.replay(&mark);
                }
            }
        }
    }
    Ok(())
}
