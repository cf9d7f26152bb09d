//! The map file as lists of writes: which slot holds what, what a commit writes where, how a file is opened.
//!
//! The caller performs the writes and the syncs, one commit or superblock update at a time, and reports their end. After a
//! failed one it stops: the volume acknowledges nothing any more.

use std::collections::{BTreeMap, BTreeSet};
use std::io;

use decant_base::ExtentSet;

use crate::blocks::BlockMap;
use crate::format::{self, LIVE_OFFSET, MAX_REGIONS, MIN_REGION_SHIFT, PAGE, Phase, Slot, Superblock, SuperblockError};
use crate::shape::Shape;

/// Whose map it must be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// The volume's id, at most 64 bytes.
    pub volume: String,
    /// Its shape.
    pub shape: Shape,
    /// The epoch at which the clone was begun; `None` where the caller does not know it and takes the file's.
    pub epoch: Option<u64>,
    /// This boot, as /proc/sys/kernel/random/boot_id names it.
    pub boot: String,
}

/// A map file that cannot be opened. Nothing in it is guessed.
#[derive(Debug, thiserror::Error)]
pub enum MapError {
    /// Reading failed.
    #[error("cannot read the clone map")]
    Io(#[from] io::Error),
    /// Neither superblock can be used.
    #[error("the clone map's superblocks are damaged (A: {a}; B: {b})")]
    Superblocks {
        /// What is wrong with slot A.
        a: SuperblockError,
        /// What is wrong with slot B.
        b: SuperblockError,
    },
    /// It belongs to something else.
    #[error("the clone map is for {field} {found}, not {expected}")]
    Foreign {
        /// Which field differs.
        field: &'static str,
        /// As the file has it.
        found: String,
        /// As it should be.
        expected: String,
    },
    /// Pages may be cut off.
    #[error("the clone map is {found} bytes long and must be {expected}: its end is cut off")]
    Truncated {
        /// Bytes it has.
        found: u64,
        /// Bytes it was made with.
        expected: u64,
    },
    /// The table of live blocks is damaged.
    #[error("the clone map's live table is damaged")]
    LiveTable,
    /// Both slots of a page are damaged: marks are lost.
    #[error("page {page} of the clone map is damaged in both slots, so which of its blocks are here is lost")]
    Page {
        /// Which.
        page: u64,
    },
    /// A page with a valid checksum holds what no map can.
    #[error("page {page} of the clone map contradicts its live table")]
    Contradiction {
        /// Which.
        page: u64,
    },
    /// The process died in this boot and its marks file is gone or foreign.
    #[error("the marks file of an unclean clone map is missing or damaged, so acknowledged writes may be unmarked")]
    Marks,
}

/// One aligned write of 4 KiB to the map file.
#[derive(Debug)]
pub struct SyncedWrite {
    /// Where, in bytes.
    pub offset: u64,
    /// What.
    pub bytes: Box<[u8; PAGE]>,
}

/// Which pages a commit takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    /// Those a flush needs: pages with written or discarded marks.
    Flush,
    /// All changed pages, and second copies of those that have one only.
    All,
}

/// A commit under way: sync the image, perform `writes`, sync the map, then [`MapFile::end_commit`].
#[must_use]
#[derive(Debug)]
pub struct Commit {
    /// The page writes, in any order.
    pub writes: Vec<SyncedWrite>,
    fresh: Vec<(u64, Newest)>,
    settled: Vec<u64>,
}

/// What an opened file is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Found {
    /// Complete: the volume is whole, the file to be removed.
    Complete,
    /// Closed in order.
    Clean,
    /// The process died in this boot: the marks file must be replayed.
    Killed,
    /// The host went down meanwhile: overwritten regions were adopted, and the marks file means nothing.
    PowerCut,
}

/// Where a page's newest copy is.
#[derive(Debug, Clone, Copy)]
struct Newest {
    slot: u64,
    generation: u64,
}

/// The layout state of an open map file.
#[derive(Debug)]
pub struct MapFile {
    superblock: Superblock,
    next: Option<Superblock>,
    slot: u64,
    pages_offset: u64,
    newest: BTreeMap<u64, Newest>,
    unsettled: BTreeSet<u64>,
}

/// Reads `buffer.len()` bytes at an offset; beyond the file's end zeros.
pub type ReadAt<'a> = dyn FnMut(u64, &mut [u8]) -> io::Result<()> + 'a;

impl MapFile {
    /// A new file for `identity` and `live` (blocks): its state, and what to write, in this order; then set its length, sync it and rename it to its place.
    pub fn create(identity: &Identity, live: &ExtentSet) -> (Self, Vec<(u64, Vec<u8>)>) {
        let table = format::encode_live(live);
        let blocks = identity.shape.blocks();
        let region_shift = (MIN_REGION_SHIFT..40).find(|shift| blocks >> shift < MAX_REGIONS).unwrap_or(40);
        let superblock = Superblock {
            generation: 1,
            phase: Phase::Filling,
            clean: false,
            volume: identity.volume.clone(),
            size: identity.shape.size(),
            sector_size: identity.shape.sector_size(),
            epoch: identity.epoch.unwrap_or(0),
            live_extents: live.runs() as u64,
            live_crc: crc32c::crc32c(&table),
            region_shift,
            boot: identity.boot.clone(),
            verification: [0; 4],
            intents: Superblock::no_intents(),
        };
        let head = superblock.encode().to_vec();
        let pages_offset = pages_offset(table.len() as u64);
        let file =
            Self { superblock, next: None, slot: 0, pages_offset, newest: BTreeMap::new(), unsettled: BTreeSet::new() };
        (file, vec![(LIVE_OFFSET, table), (0, head)])
    }

    /// How long the file is made, sparse: a shorter one has lost pages.
    pub fn length(&self, shape: Shape) -> u64 {
        self.pages_offset + shape.pages() * 2 * PAGE as u64
    }

    /// Opens a file of `length` bytes: `data` are its byte ranges that are no holes. The caller has synced it before.
    pub fn open(
        read: &mut ReadAt<'_>,
        length: u64,
        data: &ExtentSet,
        identity: &Identity,
    ) -> Result<(Self, BlockMap, Found), MapError> {
        let (superblock, slot) = newest_superblock(read)?;
        check_identity(&superblock, identity)?;
        let shape = identity.shape;
        if superblock.phase == Phase::Complete {
            let map = BlockMap::new(shape, ExtentSet::new());
            return Ok((Self::with(superblock, slot, LIVE_OFFSET), map, Found::Complete));
        }
        let live = read_live(read, &superblock, shape.blocks())?;
        let pages_offset = pages_offset(superblock.live_extents * 16);
        let found = match (superblock.clean, superblock.boot == identity.boot) {
            (true, _) => Found::Clean,
            (false, true) => Found::Killed,
            (false, false) => Found::PowerCut,
        };
        let mut file = Self::with(superblock, slot, pages_offset);
        if length < file.length(shape) {
            return Err(MapError::Truncated { found: length, expected: file.length(shape) });
        }
        let mut map = BlockMap::new(shape, live);
        file.read_pages(read, data, &mut map)?;
        if found == Found::PowerCut {
            file.adopt_intents(&mut map);
        }
        Ok((file, map, found))
    }

    fn with(superblock: Superblock, slot: u64, pages_offset: u64) -> Self {
        Self { superblock, next: None, slot, pages_offset, newest: BTreeMap::new(), unsettled: BTreeSet::new() }
    }

    fn read_pages(&mut self, read: &mut ReadAt<'_>, data: &ExtentSet, map: &mut BlockMap) -> Result<(), MapError> {
        let mut slots = [[0; PAGE]; 2];
        let end = self.length(map.shape());
        let mut next = 0;
        for run in data.overlapping(self.pages_offset..end) {
            let first = ((run.start - self.pages_offset) / (2 * PAGE as u64)).max(next);
            next = (run.end() - self.pages_offset).div_ceil(2 * PAGE as u64).max(first);
            for page in first..next {
                let mut unreadable = [false; 2];
                for (slot, buffer) in slots.iter_mut().enumerate() {
                    unreadable[slot] = read(self.slot_offset(page, slot as u64), buffer).is_err();
                }
                self.read_page(page, &slots, unreadable, map)?;
            }
        }
        Ok(())
    }

    fn read_page(
        &mut self,
        page: u64,
        slots: &[[u8; PAGE]; 2],
        bad: [bool; 2],
        map: &mut BlockMap,
    ) -> Result<(), MapError> {
        let decoded =
            [0, 1].map(|slot| if bad[slot] { Slot::Damaged } else { format::decode_page(page, &slots[slot]) });
        let (slot, generation, entries) = match decoded {
            [Slot::Valid { generation: a, entries }, Slot::Valid { generation: b, .. }] if a >= b => (0, a, entries),
            [_, Slot::Valid { generation, entries }] => (1, generation, entries),
            [Slot::Valid { generation, entries }, _] => (0, generation, entries),
            [Slot::Damaged, Slot::Damaged] => return Err(MapError::Page { page }),
            // The first write of a page, torn: it was never committed.
            _ => return Ok(()),
        };
        self.newest.insert(page, Newest { slot, generation });
        self.unsettled.insert(page);
        if map.decode(page, entries) { Ok(()) } else { Err(MapError::Contradiction { page }) }
    }

    fn adopt_intents(&self, map: &mut BlockMap) {
        for region in 0..MAX_REGIONS {
            if bit(&self.superblock.intents[..], region) {
                let start = region << self.superblock.region_shift;
                map.adopt_all(start..(region + 1) << self.superblock.region_shift);
            }
        }
    }

    fn slot_offset(&self, page: u64, slot: u64) -> u64 {
        self.pages_offset + (page * 2 + slot) * PAGE as u64
    }

    /// Starts a commit of what changed; `None` if nothing did. Changes from here on belong to the next one.
    pub fn begin_commit(&mut self, map: &mut BlockMap, scope: Scope) -> Option<Commit> {
        let dirty = map.take_dirty(scope == Scope::All);
        let mut commit = Commit { writes: Vec::with_capacity(dirty.len()), fresh: Vec::new(), settled: Vec::new() };
        if scope == Scope::All {
            for &page in self.unsettled.difference(&dirty) {
                let Some(&Newest { slot, generation }) = self.newest.get(&page) else { continue };
                commit.writes.push(self.page_write(map, page, 1 - slot, generation));
                commit.settled.push(page);
            }
        }
        for page in dirty {
            let (slot, generation) =
                self.newest.get(&page).map_or((0, 1), |newest| (1 - newest.slot, newest.generation + 1));
            commit.writes.push(self.page_write(map, page, slot, generation));
            commit.fresh.push((page, Newest { slot, generation }));
        }
        (!commit.writes.is_empty()).then_some(commit)
    }

    fn page_write(&self, map: &BlockMap, page: u64, slot: u64, generation: u64) -> SyncedWrite {
        let bytes = format::encode_page(page, generation, &map.encode(page));
        SyncedWrite { offset: self.slot_offset(page, slot), bytes }
    }

    /// The commit is durable.
    pub fn end_commit(&mut self, commit: Commit) {
        for page in commit.settled {
            self.unsettled.remove(&page);
        }
        for (page, newest) in commit.fresh {
            self.newest.insert(page, newest);
            self.unsettled.insert(page);
        }
    }

    /// Whether a background commit has second copies to write.
    pub fn has_unsettled(&self) -> bool {
        !self.unsettled.is_empty()
    }

    /// The superblock as it is durable.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// Changes the superblock: write, sync, then [`MapFile::end_update`].
    pub fn begin_update(&mut self, change: impl FnOnce(&mut Superblock)) -> SyncedWrite {
        let mut next = self.superblock.clone();
        next.generation += 1;
        change(&mut next);
        let write = SyncedWrite { offset: (1 - self.slot) * PAGE as u64, bytes: next.encode() };
        self.next = Some(next);
        write
    }

    /// The update is durable.
    pub fn end_update(&mut self) {
        if let Some(next) = self.next.take() {
            self.superblock = next;
            self.slot = 1 - self.slot;
        }
    }

    /// The intent region of `block`.
    pub fn region(&self, block: u64) -> u64 {
        block >> self.superblock.region_shift
    }

    /// The block after the last of `region`.
    pub fn region_end(&self, region: u64) -> u64 {
        (region + 1) << self.superblock.region_shift
    }

    /// Whether fetched blocks of `region` may be overwritten.
    pub fn has_intent(&self, region: u64) -> bool {
        bit(&self.superblock.intents[..], region)
    }
}

/// Sets the bit of `region` in an intent bitmap.
pub fn set_intent(superblock: &mut Superblock, region: u64) {
    if let Some(byte) = superblock.intents.get_mut((region / 8) as usize) {
        *byte |= 1 << (region % 8);
    }
}

fn bit(bitmap: &[u8], index: u64) -> bool {
    bitmap.get((index / 8) as usize).is_some_and(|byte| byte >> (index % 8) & 1 == 1)
}

fn pages_offset(table_bytes: u64) -> u64 {
    LIVE_OFFSET + table_bytes.next_multiple_of(PAGE as u64)
}

fn newest_superblock(read: &mut ReadAt<'_>) -> Result<(Superblock, u64), MapError> {
    let mut page = [0; PAGE];
    read(0, &mut page)?;
    let a = Superblock::decode(&page);
    read(PAGE as u64, &mut page)?;
    let b = Superblock::decode(&page);
    match (a, b) {
        // A newer program's superblock is not to be passed over for the older one beside it.
        (Err(error @ (SuperblockError::Version(_) | SuperblockError::Flags(_))), other)
        | (other, Err(error @ (SuperblockError::Version(_) | SuperblockError::Flags(_)))) => {
            Err(MapError::Superblocks { b: other.err().unwrap_or(error.clone()), a: error })
        }
        (Ok(a), Ok(b)) => Ok(if a.generation >= b.generation { (a, 0) } else { (b, 1) }),
        (Ok(a), Err(_)) => Ok((a, 0)),
        (Err(_), Ok(b)) => Ok((b, 1)),
        (Err(a), Err(b)) => Err(MapError::Superblocks { a, b }),
    }
}

fn check_identity(superblock: &Superblock, identity: &Identity) -> Result<(), MapError> {
    let foreign = |field, found: String, expected: String| {
        if found == expected { Ok(()) } else { Err(MapError::Foreign { field, found, expected }) }
    };
    let shape = identity.shape;
    foreign("volume", superblock.volume.clone(), identity.volume.clone())?;
    foreign("size", superblock.size.to_string(), shape.size().to_string())?;
    foreign("sector size", superblock.sector_size.to_string(), shape.sector_size().to_string())?;
    match identity.epoch {
        Some(epoch) => foreign("epoch", superblock.epoch.to_string(), epoch.to_string()),
        None => Ok(()),
    }
}

fn read_live(read: &mut ReadAt<'_>, superblock: &Superblock, blocks: u64) -> Result<ExtentSet, MapError> {
    // More extents than every second block starts none.
    if superblock.live_extents > blocks / 2 + 1 {
        return Err(MapError::LiveTable);
    }
    let mut table = vec![0; (superblock.live_extents * 16) as usize];
    read(LIVE_OFFSET, &mut table)?;
    if crc32c::crc32c(&table) != superblock.live_crc {
        return Err(MapError::LiveTable);
    }
    format::decode_live(&table, blocks).ok_or(MapError::LiveTable)
}
