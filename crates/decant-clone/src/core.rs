//! Reads, guest writes, fetches and stores against each other.
//!
//! The volume process holds one [`CloneCore`] behind a lock that it never holds during I/O. The protocol, per request:
//!
//! - **Read**: [`CloneCore::is_here`], then read the file; or [`CloneCore::park`].
//! - **Write, discard**: [`CloneCore::begin_write`]; the bytes; [`CloneCore::end_write`]; answer the reads it hands out; append the mark it
//!   returns; acknowledge.
//!   From begin to end no fetched byte is stored over a block that the write found missing; after the end no fetched byte is stored over what it wrote.
//! - **Fetched bytes**: [`CloneCore::begin_store`]; write what it names; [`CloneCore::end_store`]; then [`CloneCore::fetch_done`] once per fetch.
//!   From begin to end a write into the blocks being stored is told [`Begin::Busy`]: it waits for a local write, never for the network.
//! - **Flush**: [`MapFile::begin_commit`] through [`CloneCore::parts`], sync the image, write the pages, sync the map, [`MapFile::end_commit`].
//!
//! A read overlaps a write or a store at its own risk, as on any disk: it gets bytes from before or after, never others.

mod hydrate;
mod report;

use std::collections::{BTreeMap, HashMap, VecDeque};
use std::ops::Range;
use std::time::Duration;

use decant_base::BLOCK;

use crate::blocks::{BlockMap, State};
use crate::demand::{MAX_PARKED, Parked, STALLED_AFTER, STALLED_READS, Streams, Waiting};
use crate::file::MapFile;
use crate::marks::{Mark, MarkKind};
use crate::pace::{Pace, Sent};
use crate::progress::Rate;
use crate::shape::SECTORS_PER_BLOCK;

/// A block that the origin cannot read is tried again after this.
const RETRY: Duration = Duration::from_secs(1);
/// A boot is over when no read found a block missing for so long.
const BOOT_QUIET: Duration = Duration::from_millis(150);
/// The hydration waits for a boot no longer than this, however many reads it takes.
const BOOT_LONGEST: Duration = Duration::from_secs(1);

/// Names a write between its begin and its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteId(u64);

/// What a write leaves behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Data.
    Written,
    /// Zeros, by a hole.
    Discarded,
}

/// The answer to [`CloneCore::begin_write`].
#[derive(Debug)]
#[must_use]
pub enum Begin {
    /// All its blocks are ours already: write, acknowledge.
    Free,
    /// Fetched bytes are being stored there: wait for the store's end and begin again.
    Busy,
    /// Fetched blocks of regions without a durable intent are in the way: make it so ([`CloneCore::missing_intents`]) and begin again.
    Intents,
    /// Append `adopted`, if any, to the marks file; write; [`CloneCore::end_write`].
    Tracked {
        /// For the end.
        id: WriteId,
        /// Must be in the marks file before a byte of the write lands.
        adopted: Option<Mark>,
    },
}

/// Why a fetch is made.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Class {
    /// A read waits for it.
    Demand,
    /// Hydration.
    Bulk,
}

/// A fetch to be sent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Plan {
    /// Comes back with the answer.
    pub token: u64,
    /// Blocks, never in flight or here already.
    pub blocks: Range<u64>,
    /// For whom.
    pub class: Class,
}

/// What an origin answered with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Came {
    /// Bytes.
    Data,
    /// The word that there are none: zeros, which cost the link nothing.
    Hole,
}

/// What to do with fetched bytes; reused from call to call.
#[derive(Debug)]
pub struct Arrival<W> {
    /// 512-byte sectors to store, in order.
    pub store: Vec<Range<u64>>,
    /// Reads to be answered from the fetched bytes, at once.
    pub direct: Vec<Waiting<W>>,
    /// After [`CloneCore::end_store`]: reads to be answered from the file.
    pub ready: Vec<Waiting<W>>,
    /// After a failed store: reads that cannot be answered.
    pub failed: Vec<Waiting<W>>,
    blocks: Range<u64>,
}

impl<W> Arrival<W> {
    /// Empty.
    pub fn new() -> Self {
        Self { store: Vec::new(), direct: Vec::new(), ready: Vec::new(), failed: Vec::new(), blocks: 0..0 }
    }
}

impl<W> Default for Arrival<W> {
    fn default() -> Self {
        Self::new()
    }
}

/// Why a read was not parked; the waiter comes back.
#[derive(Debug)]
pub enum NotParked<W> {
    /// All of it is here by now: read the file.
    Here(W),
    /// Policy says EIO while the origin is away; or so many reads wait for an origin that is silent that one more would be in the
    /// way of writes ([`CloneCore::set_most_waiting`]).
    Refused(W),
    /// [`MAX_PARKED`] reads wait already.
    Full(W),
}

#[derive(Debug)]
struct Writing {
    id: u64,
    sectors: Range<u64>,
    kind: Kind,
}

/// A boot under way: the hydration keeps out of its way until `quiet`, which each read that waits puts off, at most to `end`.
#[derive(Debug, Clone, Copy)]
struct Boot {
    quiet: Duration,
    end: Duration,
}

#[derive(Debug)]
struct InFlight {
    end: u64,
    class: Class,
    sent: Sent,
}

/// The clone.
pub struct CloneCore<W> {
    map: BlockMap,
    file: MapFile,
    writing: Vec<Writing>,
    storing: Vec<Range<u64>>,
    /// By first block; they never overlap.
    in_flight: BTreeMap<u64, InFlight>,
    tokens: HashMap<u64, u64>,
    bulk_in_flight: u64,
    bulk_fetches: usize,
    parked: Parked<W>,
    /// So many reads may wait for as long as it takes.
    most_waiting: usize,
    /// Since when more than `most_waiting` wait and nothing comes.
    crowded: Option<Duration>,
    /// Reads failed because of that, since something came last.
    shed: u64,
    streams: Streams,
    hot: VecDeque<Range<u64>>,
    cursor: u64,
    exhausted: bool,
    retry: Vec<(Range<u64>, Duration)>,
    pace: Pace,
    rate: Rate,
    best_rate: u64,
    fetched_bytes: u64,
    last_arrival: Duration,
    connected: bool,
    eio_when_away: bool,
    link: String,
    link_since: Duration,
    no_room_until: Option<Duration>,
    hydrate: bool,
    paused: bool,
    boot: Option<Boot>,
    next_id: u64,
    next_mark: u64,
}

impl<W> CloneCore<W> {
    /// A clone with this map, not connected yet, hydrating as soon as it is.
    pub fn new(map: BlockMap, file: MapFile, now: Duration) -> Self {
        Self {
            map,
            file,
            writing: Vec::with_capacity(128),
            storing: Vec::with_capacity(8),
            in_flight: BTreeMap::new(),
            tokens: HashMap::new(),
            bulk_in_flight: 0,
            bulk_fetches: 0,
            parked: Parked::new(),
            most_waiting: STALLED_READS,
            crowded: None,
            shed: 0,
            streams: Streams::default(),
            hot: VecDeque::new(),
            cursor: 0,
            exhausted: false,
            retry: Vec::new(),
            pace: Pace::new(now),
            rate: Rate::default(),
            best_rate: 0,
            fetched_bytes: 0,
            last_arrival: now,
            connected: false,
            eio_when_away: false,
            link: String::new(),
            link_since: now,
            no_room_until: None,
            hydrate: true,
            paused: false,
            boot: None,
            next_id: 0,
            next_mark: 0,
        }
    }

    /// The map.
    pub fn map(&self) -> &BlockMap {
        &self.map
    }

    /// The map file's state.
    pub fn file(&self) -> &MapFile {
        &self.file
    }

    /// Both, for commits and the verification.
    pub fn parts(&mut self) -> (&mut MapFile, &mut BlockMap) {
        (&mut self.file, &mut self.map)
    }

    // ---- reads ----

    /// Whether these 512-byte sectors can be read from the file.
    pub fn is_here(&self, sectors: &Range<u64>) -> bool {
        self.map.is_here(sectors)
    }

    /// A read waits for `sectors`; the fetches it needs, read-ahead included, go to `plans`.
    pub fn park(
        &mut self,
        now: Duration,
        sectors: Range<u64>,
        waiter: W,
        plans: &mut Vec<Plan>,
    ) -> Result<(), NotParked<W>> {
        if self.is_here(&sectors) {
            return Err(NotParked::Here(waiter));
        }
        if !self.connected && self.eio_when_away {
            return Err(NotParked::Refused(waiter));
        }
        if self.shed > 0 && self.parked.len() >= self.most_waiting {
            self.shed += 1;
            return Err(NotParked::Refused(waiter));
        }
        self.parked.push(sectors.clone(), waiter).map_err(NotParked::Full)?;
        if self.parked.len() > self.most_waiting {
            self.crowded.get_or_insert(now);
        }
        let blocks = blocks_of(&sectors);
        let ahead = self.streams.ahead(&blocks);
        self.pace.foreground(now);
        if let Some(boot) = &mut self.boot {
            boot.quiet = now + BOOT_QUIET;
        }
        self.heat(blocks.start);
        self.demand(now, blocks.start..(blocks.end + ahead).min(self.map.shape().blocks()), plans);
        Ok(())
    }

    /// So many reads may wait for a silent origin for as long as it takes: [`STALLED_READS`] unless it is said otherwise, for a
    /// front end whose waiting reads take room from its writes; up to [`MAX_PARKED`] for one where they do not.
    pub fn set_most_waiting(&mut self, reads: usize) {
        self.most_waiting = reads.min(MAX_PARKED);
    }

    /// Forgets reads that nobody waits for any more, where `is_wanted` says so.
    pub fn drop_unwanted(&mut self, is_wanted: impl Fn(&W) -> bool) {
        self.parked.retain(is_wanted);
    }

    /// Fails the reads beyond those that may wait that came last, if nothing has come from the origin for [`STALLED_AFTER`]; to be
    /// called when [`CloneCore::stalls_at`] says so. Returns whether these are the first since something came.
    pub fn shed_reads(&mut self, now: Duration, failed: &mut Vec<Waiting<W>>) -> bool {
        if self.stalls_at().is_none_or(|at| now < at) {
            return false;
        }
        let before = failed.len();
        self.parked.shed(self.most_waiting, failed);
        let first = self.shed == 0;
        self.shed += (failed.len() - before) as u64;
        self.crowded = None;
        first
    }

    /// When reads are to fail for want of tags, if nothing comes from the origin until then.
    pub fn stalls_at(&self) -> Option<Duration> {
        (self.parked.len() > self.most_waiting).then_some(self.crowded? + STALLED_AFTER)
    }

    /// Something came from the origin.
    fn heard(&mut self, now: Duration) {
        self.last_arrival = now;
        self.shed = 0;
        self.crowded = self.crowded.map(|_| now);
    }

    /// How many reads wait.
    pub fn parked(&self) -> usize {
        self.parked.len()
    }

    /// All reads that wait: to be failed as the machine is being stopped or killed, or to be answered from the file as the clone ends.
    pub fn take_parked(&mut self, out: &mut Vec<Waiting<W>>) {
        self.parked.take(|_| true, out);
    }

    // ---- writes ----

    /// A write or discard of 512-byte `sectors` (whole sectors of the volume) wants to begin.
    pub fn begin_write(&mut self, sectors: &Range<u64>, kind: Kind) -> Begin {
        let blocks = blocks_of(sectors);
        let any_missing = self.map.count(State::Missing) > 0 && self.is_missing_in(sectors, blocks.clone());
        if any_missing && self.storing.iter().any(|store| store.start < blocks.end && blocks.start < store.end) {
            return Begin::Busy;
        }
        let fetched = self.map.count(State::Fetched) > 0 && self.map.has_fetched(blocks.clone());
        if fetched && !self.missing_intents(sectors).is_empty() {
            return Begin::Intents;
        }
        if !any_missing && !fetched {
            self.mark(kind, sectors);
            return Begin::Free;
        }
        let adopted = (fetched && self.map.adopt(sectors)).then(|| self.number(MarkKind::Adopted, sectors));
        let id = self.next_id;
        self.next_id += 1;
        self.writing.push(Writing { id, sectors: sectors.clone(), kind });
        Begin::Tracked { id: WriteId(id), adopted }
    }

    /// Whether a missing block of `blocks` would get sectors that are not ours yet.
    fn is_missing_in(&self, sectors: &Range<u64>, blocks: Range<u64>) -> bool {
        let mut at = blocks.start;
        while let Some(run) = self.map.next_in(at..blocks.end, State::Missing) {
            let shape = self.map.shape();
            if !shape.has_masks()
                || run.clone().any(|block| shape.mask_in(block, sectors) & !self.map.entry(block).mask != 0)
            {
                return true;
            }
            at = run.end;
        }
        false
    }

    /// The intent regions that must be durable before fetched blocks of `sectors` are overwritten.
    pub fn missing_intents(&self, sectors: &Range<u64>) -> Vec<u64> {
        let blocks = blocks_of(sectors);
        let mut regions = Vec::new();
        let mut at = blocks.start;
        while let Some(run) = self.map.next_in(at..blocks.end, State::Fetched) {
            let region = self.file.region(run.start);
            if !self.file.has_intent(region) {
                regions.push(region);
            }
            at = self.file.region_end(region);
        }
        regions
    }

    /// The write's bytes are in the file (`landed`), or it failed. Append the mark before it is acknowledged. Reads that waited and
    /// are all here by now go to `ready`, to be answered from the file: nothing that comes from the origin would answer them, as
    /// what they waited for is not stored any more, or cannot be read there.
    pub fn end_write(&mut self, id: WriteId, landed: bool, ready: &mut Vec<Waiting<W>>) -> Option<Mark> {
        let index = self.writing.iter().position(|writing| writing.id == id.0)?;
        let Writing { sectors, kind, .. } = self.writing.swap_remove(index);
        if !landed {
            return None;
        }
        self.mark(kind, &sectors);
        let (map, written) = (&self.map, blocks_of(&sectors));
        self.parked.take(|read| overlaps(read, &written) && map.is_here(read), ready);
        Some(self.number(if kind == Kind::Written { MarkKind::Written } else { MarkKind::Discarded }, &sectors))
    }

    fn mark(&mut self, kind: Kind, sectors: &Range<u64>) {
        match kind {
            Kind::Written => self.map.mark_written(sectors),
            Kind::Discarded => self.map.mark_discarded(sectors),
        }
    }

    fn number(&mut self, kind: MarkKind, sectors: &Range<u64>) -> Mark {
        let number = self.next_mark;
        self.next_mark += 1;
        Mark { number, kind, sectors: sectors.clone() }
    }

    /// The number of the next mark: all below are in memory, and a commit begun now makes them superfluous.
    pub fn next_mark(&self) -> u64 {
        self.next_mark
    }

    /// Takes a record of the marks file that a killed process left.
    pub fn replay(&mut self, mark: &Mark) {
        let end = mark.sectors.end.min(self.map.shape().sectors());
        let sectors = mark.sectors.start.min(end)..end;
        match mark.kind {
            MarkKind::Written => self.map.mark_written(&sectors),
            MarkKind::Discarded => self.map.mark_discarded(&sectors),
            MarkKind::Adopted => {
                self.map.adopt(&sectors);
            }
        }
        self.next_mark = self.next_mark.max(mark.number + 1);
    }

    // ---- fetched bytes ----

    /// `blocks` arrived for `token`: what to store and whom to answer goes to `arrival`.
    pub fn begin_store(&mut self, now: Duration, token: u64, blocks: Range<u64>, came: Came, arrival: &mut Arrival<W>) {
        let shape = self.map.shape();
        arrival.store.clear();
        arrival.blocks = blocks.clone();
        let bytes = shape.bytes_of(blocks.clone());
        let bytes = bytes.end - bytes.start;
        self.heard(now);
        if let Some(fetch) = self.tokens.get(&token).and_then(|start| self.in_flight.get_mut(start)) {
            // A hole counts as delivered, so that the window over a long link stays wide where there is nothing to carry.
            self.pace.arrived(now, &mut fetch.sent, bytes);
            if came == Came::Hole && fetch.class == Class::Bulk {
                self.pace.give_back(bytes);
            }
        }
        if came == Came::Data {
            self.fetched_bytes += bytes;
            self.rate.add(now, bytes);
        }
        let chunk = blocks.start * SECTORS_PER_BLOCK..blocks.end * SECTORS_PER_BLOCK;
        let (map, writing) = (&self.map, &self.writing);
        let is_free = |block: u64| {
            map.entry(block).state == State::Missing && !writing.iter().any(|w| blocks_of(&w.sectors).contains(&block))
        };
        for block in blocks.clone().filter(|&block| is_free(block)) {
            let ours = map.entry(block).mask;
            let base = block * SECTORS_PER_BLOCK;
            if ours == 0 {
                push(&mut arrival.store, base..(base + SECTORS_PER_BLOCK).min(shape.sectors()));
                continue;
            }
            for sector in (0..SECTORS_PER_BLOCK).filter(|s| shape.full_mask(block) & !ours & 1 << s != 0) {
                push(&mut arrival.store, base + sector..base + sector + 1);
            }
        }
        let is_pure = |block: u64| is_free(block) && map.entry(block).mask == 0;
        self.parked.take(
            |read| read.start >= chunk.start && read.end <= chunk.end && blocks_of(read).all(is_pure),
            &mut arrival.direct,
        );
        if !arrival.store.is_empty() {
            self.storing.push(blocks);
        }
    }

    /// What `arrival` named is in the file (`landed`), or could not be stored and stays missing.
    pub fn end_store(&mut self, arrival: &mut Arrival<W>, landed: bool) {
        if let Some(index) = self.storing.iter().position(|store| *store == arrival.blocks) {
            self.storing.swap_remove(index);
        }
        for store in arrival.store.iter().filter(|_| landed) {
            self.map.mark_fetched(blocks_of(store));
        }
        let (map, chunk) = (&self.map, &arrival.blocks);
        self.parked.take(|read| overlaps(read, chunk) && map.is_here(read), &mut arrival.ready);
        if !landed {
            self.parked.take(|read| overlaps(read, chunk), &mut arrival.failed);
        }
    }

    /// The fetch is answered (`ok`), or the origin cannot read what it asked for; then the reads that cannot be answered go to `failed`.
    pub fn fetch_done(&mut self, now: Duration, token: u64, ok: bool, failed: &mut Vec<Waiting<W>>) {
        let Some(start) = self.tokens.remove(&token) else { return };
        let Some(fetch) = self.in_flight.remove(&start) else { return };
        let blocks = start..fetch.end;
        if fetch.class == Class::Bulk {
            self.bulk_in_flight -= (blocks.end - blocks.start) * BLOCK;
            self.bulk_fetches -= 1;
        }
        self.last_arrival = now;
        self.retry.retain(|(range, _)| !(blocks.start <= range.start && range.end <= blocks.end));
        if ok {
            self.pace.answered(now, &fetch.sent);
        }
        let Some(left) = self.map.next_in(blocks.clone(), State::Missing) else { return };
        self.exhausted = false;
        if ok {
            return;
        }
        if fetch.class == Class::Demand {
            // Only a read that asked for all of what failed has a bad block for certain: what was fetched ahead of one, or for
            // another, says nothing about it, so it stays parked and its own blocks are asked for by themselves.
            let is_its_own = |read: &Range<u64>| {
                let read = blocks_of(read);
                read.start <= blocks.start && blocks.end <= read.end
            };
            self.parked.take(is_its_own, failed);
        }
        // Halves at once, a single block later: the readable rest of a run does not wait for the unreadable block in it.
        let middle = left.start + (blocks.end - left.start) / 2;
        if middle == left.start {
            self.retry.push((left.start..blocks.end, now + RETRY));
        } else {
            self.retry.push((left.start..middle, now));
            self.retry.push((middle..blocks.end, now));
        }
    }

    /// The origin is closed: what is in flight will not be answered.
    pub fn forget_fetches(&mut self) {
        self.in_flight.clear();
        self.tokens.clear();
        self.bulk_in_flight = 0;
        self.bulk_fetches = 0;
        self.exhausted = false;
    }

    /// The guest waits for something that the hydration slows down, a flush say: for a moment it takes less.
    pub fn note_foreground(&mut self, now: Duration) {
        self.pace.foreground(now);
    }

    /// Limits the hydration, bytes per second.
    pub fn set_limit(&mut self, now: Duration, limit: Option<u64>) {
        self.pace.set_limit(now, limit);
    }

    /// A person pauses the hydration, or lets it go on; reads are served in any case.
    pub fn set_paused(&mut self, paused: bool) {
        self.paused = paused;
    }

    /// Holds the hydration back for the medium's sake, or lets it go on; reads are served in any case.
    pub fn set_hydrate(&mut self, on: bool) {
        self.hydrate = on;
    }

    /// A machine is about to boot: until its reads have come, for a second at most, nothing is fetched but what they wait for
    /// and what lies around it. The interruption is those reads; the rest has time. Ahead of them comes the volume's start, where
    /// file systems keep what a mount reads first: ext4's superblock and group descriptors, 64 bytes for each 128 MiB.
    pub fn expect_boot(&mut self, now: Duration) {
        self.heat(0);
        self.boot = Some(Boot { quiet: now + BOOT_QUIET, end: now + BOOT_LONGEST });
    }

    /// The local file has no room: the hydration pauses for `pause`, then tries again.
    pub fn no_room(&mut self, now: Duration, pause: Duration) {
        self.no_room_until = Some(now + pause);
    }

    /// What reads of missing blocks get while the origin is away; those that must fail go to `failed`.
    pub fn set_eio_when_away(&mut self, eio: bool, failed: &mut Vec<Waiting<W>>) {
        self.eio_when_away = eio;
        if eio && !self.connected {
            self.take_parked(failed);
        }
    }

    /// The link came up or went away; reads that must fail go to `failed`.
    pub fn handle_link(&mut self, now: Duration, up: bool, detail: &str, failed: &mut Vec<Waiting<W>>) {
        if self.connected != up || self.link.is_empty() {
            self.link_since = now;
        }
        self.connected = up;
        self.link.clear();
        self.link.push_str(detail);
        self.last_arrival = now;
        if !up && self.eio_when_away {
            self.take_parked(failed);
        }
    }

    /// Whether the origin answers.
    pub fn connected(&self) -> bool {
        self.connected
    }
}

/// The blocks that a range of 512-byte sectors touches.
pub fn blocks_of(sectors: &Range<u64>) -> Range<u64> {
    sectors.start / SECTORS_PER_BLOCK..sectors.end.div_ceil(SECTORS_PER_BLOCK)
}

/// Whether these 512-byte sectors touch any of `blocks`.
fn overlaps(sectors: &Range<u64>, blocks: &Range<u64>) -> bool {
    let touched = blocks_of(sectors);
    touched.start < blocks.end && blocks.start < touched.end
}

fn push(runs: &mut Vec<Range<u64>>, sectors: Range<u64>) {
    match runs.last_mut() {
        Some(run) if run.end == sectors.start => run.end = sectors.end,
        _ => runs.push(sectors),
    }
}

#[cfg(test)]
mod tests;
