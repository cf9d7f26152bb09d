//! The state of each block, in memory.
//!
//! Untouched pages cost a null pointer: their blocks are as at the seal, missing where live and discarded elsewhere. A page
//! whose blocks all reach one state, none of them in part, gives its entries up again. What remains is 4 KiB per 63 MiB of mixed volume (per
//! 7.9 MiB on 512-byte sectors).

use std::collections::BTreeSet;
use std::ops::Range;

use decant_base::{Extent, ExtentSet};

use crate::shape::{ENTRY_BYTES, SECTORS_PER_BLOCK, Shape};

/// What a block is. Everything but `Missing` is read from the local file; the other three differ in what the verification
/// owes them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// Its bytes are at the origin only, except for the sectors in its mask.
    Missing = 0,
    /// Fetched and stored, except for the sectors in its mask, which were written here.
    Fetched = 1,
    /// Written here.
    Written = 2,
    /// Reads as zeros: discarded here, or never live.
    Discarded = 3,
}

impl State {
    /// All states, by code.
    pub const ALL: [Self; 4] = [Self::Missing, Self::Fetched, Self::Written, Self::Discarded];

    fn of(code: u8) -> Self {
        Self::ALL[usize::from(code & 3)]
    }

    /// Whether leaving this state must be durable before a flush returns. Between `Written` and `Discarded` the local file
    /// decides what is read, so that mark only counts and may come late: writes to free space cost no commit.
    fn is_origins(self) -> bool {
        matches!(self, Self::Missing | Self::Fetched)
    }
}

/// A block's state, and on 512-byte volumes which of its sectors are ours although the block is missing or fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Entry {
    /// The state.
    pub state: State,
    /// Bit n: sector n was written here. 0 in the states `Written` and `Discarded`, and always with 4096-byte sectors.
    pub mask: u8,
}

impl Entry {
    const fn of(state: State) -> Self {
        Self { state, mask: 0 }
    }
}

/// Entries of one page.
enum Cells {
    /// All in one state, no masks.
    Uniform(State),
    /// As on disk.
    Mixed(Box<[u8; ENTRY_BYTES]>),
}

struct Page {
    cells: Cells,
    counts: [u32; 4],
}

/// The states of all blocks.
pub struct BlockMap {
    shape: Shape,
    live: ExtentSet,
    pages: Vec<Option<Box<Page>>>,
    counts: [u64; 4],
    /// Written blocks that were not live.
    written_elsewhere: u64,
    /// Pages with marks that must be durable before a flush returns.
    hard: BTreeSet<u64>,
    /// Pages with fetched marks only.
    soft: BTreeSet<u64>,
}

impl BlockMap {
    /// All of `live` (in blocks) missing, the rest discarded.
    pub fn new(shape: Shape, mut live: ExtentSet) -> Self {
        live.remove(shape.blocks()..u64::MAX);
        let missing = live.len();
        Self {
            shape,
            live,
            pages: (0..shape.pages()).map(|_| None).collect(),
            counts: [missing, 0, 0, shape.blocks() - missing],
            written_elsewhere: 0,
            hard: BTreeSet::new(),
            soft: BTreeSet::new(),
        }
    }

    /// Its shape.
    pub fn shape(&self) -> Shape {
        self.shape
    }

    /// The blocks that were live at the seal.
    pub fn live(&self) -> &ExtentSet {
        &self.live
    }

    /// How many blocks are in `state`.
    pub fn count(&self, state: State) -> u64 {
        self.counts[state as usize]
    }

    /// How many blocks that were live at the seal are written now.
    pub fn written_live(&self) -> u64 {
        self.counts[State::Written as usize] - self.written_elsewhere
    }

    /// How many blocks that were live at the seal are discarded now.
    pub fn discarded_live(&self) -> u64 {
        self.live.len()
            - self.counts[State::Missing as usize]
            - self.counts[State::Fetched as usize]
            - self.written_live()
    }

    /// What `block` is.
    pub fn entry(&self, block: u64) -> Entry {
        let page = block / self.shape.blocks_per_page();
        let index = (block % self.shape.blocks_per_page()) as usize;
        match self.pages.get(page as usize).and_then(Option::as_deref) {
            None if self.live.contains(block) => Entry::of(State::Missing),
            None => Entry::of(State::Discarded),
            Some(Page { cells: Cells::Uniform(state), .. }) => Entry::of(*state),
            Some(Page { cells: Cells::Mixed(cells), .. }) => cell(self.shape, cells, index),
        }
    }

    /// Whether every 512-byte sector of `sectors` can be read locally.
    pub fn is_here(&self, sectors: &Range<u64>) -> bool {
        if self.counts[State::Missing as usize] == 0 {
            return true;
        }
        (sectors.start / SECTORS_PER_BLOCK..sectors.end.div_ceil(SECTORS_PER_BLOCK)).all(|block| {
            let entry = self.entry(block);
            entry.state != State::Missing
                || (entry.mask != 0
                    && self.shape.mask_in(block, sectors) & !entry.mask & self.shape.full_mask(block) == 0)
        })
    }

    /// `sectors` were written here: whole blocks turn `Written`, others gain bits of their masks.
    pub fn mark_written(&mut self, sectors: &Range<u64>) {
        self.mark(sectors, State::Written);
    }

    /// `sectors` were discarded here: whole blocks turn `Discarded`, others count as written with zeros.
    pub fn mark_discarded(&mut self, sectors: &Range<u64>) {
        self.mark(sectors, State::Discarded);
    }

    /// `sectors` may be overwritten any moment: blocks among them that are `Fetched` stop being the origin's bytes.
    /// Returns whether there was any.
    pub fn adopt(&mut self, sectors: &Range<u64>) -> bool {
        let mut any = false;
        let mut at = sectors.start / SECTORS_PER_BLOCK;
        let end = sectors.end.div_ceil(SECTORS_PER_BLOCK);
        while let Some(run) = self.next_in(at..end, State::Fetched) {
            any = true;
            at = run.end;
            run.for_each(|block| self.mark_part(block, self.shape.mask_in(block, sectors)));
        }
        any
    }

    /// Whether a block of the range is `Fetched`.
    pub fn has_fetched(&self, blocks: Range<u64>) -> bool {
        self.next_in(blocks, State::Fetched).is_some()
    }

    /// Stored fetched bytes: missing blocks of `blocks` turn `Fetched` and keep their masks.
    pub fn mark_fetched(&mut self, blocks: Range<u64>) {
        for block in blocks {
            let entry = self.entry(block);
            if entry.state == State::Missing {
                self.set(block, Entry { state: State::Fetched, mask: entry.mask });
                self.touch(block, false);
            }
        }
    }

    /// The verification found `block` different from the origin: it is missing again, if it is still `Fetched`.
    /// Returns whether it was.
    pub fn mark_lost(&mut self, block: u64) -> bool {
        let entry = self.entry(block);
        if entry.state != State::Fetched {
            return false;
        }
        self.set(block, Entry { state: State::Missing, mask: entry.mask });
        // Hard: a later crash must not believe the old mark.
        self.touch(block, true);
        true
    }

    /// Every `Fetched` block of `blocks` is taken as ours from now on.
    pub fn adopt_all(&mut self, blocks: Range<u64>) {
        let mut at = blocks.start;
        while let Some(run) = self.next_in(at..blocks.end, State::Fetched) {
            at = run.end;
            for block in run {
                self.set(block, Entry::of(State::Written));
                self.touch(block, true);
            }
        }
    }

    /// The first run of blocks in `state` within `range`. Its cost grows with what is live there, not with the volume.
    pub fn next_in(&self, range: Range<u64>, state: State) -> Option<Range<u64>> {
        if self.counts[state as usize] == 0 {
            return None;
        }
        let mut at = range.start;
        let end = range.end.min(self.shape.blocks());
        let start = loop {
            if at >= end {
                return None;
            }
            if state.is_origins() {
                // Only what was live at the seal can be missing or fetched; the rest of a huge volume is not looked at.
                at = self.live.overlapping(at..end).next()?.start;
            }
            let page = self.shape.page_blocks(at / self.shape.blocks_per_page());
            if let Some(found) = self.scan(at..page.end.min(end), state, true) {
                break found;
            }
            at = page.end;
        };
        let mut at = start;
        while at < end {
            let page = self.shape.page_blocks(at / self.shape.blocks_per_page());
            if let Some(stop) = self.scan(at..page.end.min(end), state, false) {
                return Some(start..stop);
            }
            at = page.end.min(end);
        }
        Some(start..end)
    }

    /// The first block of `range`, which lies in one page, that is (`equal`) or is not in `state`.
    fn scan(&self, range: Range<u64>, state: State, equal: bool) -> Option<u64> {
        if range.is_empty() {
            return None;
        }
        let page = range.start / self.shape.blocks_per_page();
        let first = page * self.shape.blocks_per_page();
        match self.pages[page as usize].as_deref() {
            None => {
                let wants_live = match state {
                    State::Missing => equal,
                    State::Discarded => !equal,
                    _ => return (!equal).then_some(range.start),
                };
                if wants_live {
                    self.live.overlapping(range).next().map(|run| run.start)
                } else {
                    self.live.gaps(range).iter().next().map(|run| run.start)
                }
            }
            Some(page) if equal && page.counts[state as usize] == 0 => None,
            Some(Page { cells: Cells::Uniform(is), .. }) => ((*is == state) == equal).then_some(range.start),
            Some(Page { cells: Cells::Mixed(cells), .. }) if self.shape.has_masks() => range
                .into_iter()
                .find(|block| (cell(self.shape, cells, (block - first) as usize).state == state) == equal),
            Some(Page { cells: Cells::Mixed(cells), .. }) => {
                let (from, to) = ((range.start - first) as usize, (range.end - first) as usize);
                scan_packed(cells, from..to, state, equal).map(|index| first + index as u64)
            }
        }
    }

    fn mark(&mut self, sectors: &Range<u64>, to: State) {
        let whole = sectors.start.div_ceil(SECTORS_PER_BLOCK)..if sectors.end >= self.shape.sectors() {
            self.shape.blocks()
        } else {
            sectors.end / SECTORS_PER_BLOCK
        };
        let touched =
            sectors.start / SECTORS_PER_BLOCK..sectors.end.div_ceil(SECTORS_PER_BLOCK).min(self.shape.blocks());
        if whole.is_empty() {
            touched.for_each(|block| self.mark_part(block, self.shape.mask_in(block, sectors)));
            return;
        }
        (touched.start..whole.start).for_each(|block| self.mark_part(block, self.shape.mask_in(block, sectors)));
        (whole.end..touched.end).for_each(|block| self.mark_part(block, self.shape.mask_in(block, sectors)));
        let mut at = whole.start;
        while at < whole.end {
            let page = at / self.shape.blocks_per_page();
            let blocks = self.shape.page_blocks(page);
            let run = at..whole.end.min(blocks.end);
            at = run.end;
            if run == blocks {
                self.mark_page(page, to);
            } else {
                // Most of a trim's blocks are discarded already, and this happens with the clone locked.
                let mut from = run.start;
                while let Some(block) = self.scan(from..run.end, to, false) {
                    let was = self.entry(block).state;
                    self.set(block, Entry::of(to));
                    self.touch(block, was.is_origins());
                    from = block + 1;
                }
            }
        }
    }

    /// Some sectors of `block` were written, with data or with zeros.
    fn mark_part(&mut self, block: u64, bits: u8) {
        let entry = self.entry(block);
        let full = self.shape.full_mask(block);
        let next = match entry.state {
            State::Written => return,
            State::Discarded => Entry::of(State::Written),
            State::Missing | State::Fetched if (entry.mask | bits) & full == full => Entry::of(State::Written),
            state => Entry { state, mask: entry.mask | bits },
        };
        if next != entry {
            self.set(block, next);
            self.touch(block, entry.state.is_origins());
        }
    }

    /// The whole of `page` turns `to`.
    fn mark_page(&mut self, page: u64, to: State) {
        let blocks = self.shape.page_blocks(page);
        let length = blocks.end - blocks.start;
        let live: u64 = self.live.overlapping(blocks.clone()).map(|run| run.length).sum();
        let before = match self.pages[page as usize].as_deref() {
            None if to == State::Discarded && live == 0 => return,
            None => [live as u32, 0, 0, (length - live) as u32],
            Some(Page { cells: Cells::Uniform(state), .. }) if *state == to => return,
            Some(page) => page.counts,
        };
        let mut counts = [0u32; 4];
        counts[to as usize] = length as u32;
        // Written blocks outside the live set: those of the page leave or all of them join.
        let written_here: u64 = self.written_elsewhere_in(page);
        self.written_elsewhere -= written_here;
        if to == State::Written {
            self.written_elsewhere += length - live;
        }
        for state in 0..4 {
            self.counts[state] = self.counts[state] - u64::from(before[state]) + u64::from(counts[state]);
        }
        self.pages[page as usize] = Some(Box::new(Page { cells: Cells::Uniform(to), counts }));
        self.touch(blocks.start, before[State::Missing as usize] + before[State::Fetched as usize] > 0);
    }

    fn written_elsewhere_in(&self, page: u64) -> u64 {
        let Some(stored) = self.pages[page as usize].as_deref() else { return 0 };
        if stored.counts[State::Written as usize] == 0 {
            return 0;
        }
        let gaps = self.live.gaps(self.shape.page_blocks(page));
        let written =
            |run: Extent| run.range().filter(|&block| self.entry(block).state == State::Written).count() as u64;
        gaps.iter().map(written).sum()
    }

    fn touch(&mut self, block: u64, hard: bool) {
        let page = block / self.shape.blocks_per_page();
        if hard {
            self.hard.insert(page);
            self.soft.remove(&page);
        } else if !self.hard.contains(&page) {
            self.soft.insert(page);
        }
    }

    fn set(&mut self, block: u64, to: Entry) {
        let shape = self.shape;
        let number = block / shape.blocks_per_page();
        let index = (block % shape.blocks_per_page()) as usize;
        let was = self.entry(block).state;
        if was != to.state {
            self.counts[was as usize] -= 1;
            self.counts[to.state as usize] += 1;
            if (was == State::Written || to.state == State::Written) && !self.live.contains(block) {
                if to.state == State::Written { self.written_elsewhere += 1 } else { self.written_elsewhere -= 1 }
            }
        }
        if self.pages[number as usize].is_none() {
            self.pages[number as usize] = Some(Box::new(self.initial(number)));
        }
        let Some(page) = self.pages[number as usize].as_deref_mut() else { return };
        let length = shape.page_blocks(number);
        let length = (length.end - length.start) as u32;
        if let Cells::Uniform(state) = page.cells {
            page.cells = Cells::Mixed(filled(shape, state));
        }
        let Cells::Mixed(cells) = &mut page.cells else { return };
        set_cell(shape, cells, index, to);
        page.counts[was as usize] -= 1;
        page.counts[to.state as usize] += 1;
        if page.counts[to.state as usize] == length && !(shape.has_masks() && has_masks_set(cells)) {
            page.cells = Cells::Uniform(to.state);
        }
    }

    fn initial(&self, page: u64) -> Page {
        let blocks = self.shape.page_blocks(page);
        let mut cells = filled(self.shape, State::Discarded);
        let mut missing = 0;
        for run in self.live.overlapping(blocks.clone()) {
            missing += run.length as u32;
            for block in run.range() {
                set_cell(self.shape, &mut cells, (block - blocks.start) as usize, Entry::of(State::Missing));
            }
        }
        let length = (blocks.end - blocks.start) as u32;
        Page { cells: Cells::Mixed(cells), counts: [missing, 0, 0, length - missing] }
    }

    /// The entries of `page` as the map file holds them; entries past the volume's end are 0.
    pub(crate) fn encode(&self, page: u64) -> Box<[u8; ENTRY_BYTES]> {
        let mut cells = match self.pages[page as usize].as_deref() {
            None => match self.initial(page).cells {
                Cells::Mixed(cells) => cells,
                Cells::Uniform(state) => filled(self.shape, state),
            },
            Some(Page { cells: Cells::Uniform(state), .. }) => filled(self.shape, *state),
            Some(Page { cells: Cells::Mixed(cells), .. }) => cells.clone(),
        };
        let blocks = self.shape.page_blocks(page);
        for index in (blocks.end - blocks.start) as usize..self.shape.blocks_per_page() as usize {
            set_cell(self.shape, &mut cells, index, Entry::of(State::Missing));
        }
        cells
    }

    /// Takes `page` as the map file holds it. `false`: it holds what no map can, a missing or fetched block that was not live.
    pub(crate) fn decode(&mut self, page: u64, cells: &[u8; ENTRY_BYTES]) -> bool {
        let blocks = self.shape.page_blocks(page);
        let live: u64 = self.live.overlapping(blocks.clone()).map(|run| run.length).sum();
        let mut counts = [0u32; 4];
        let mut sane = true;
        for block in blocks.clone() {
            let entry = cell(self.shape, cells, (block - blocks.start) as usize);
            counts[entry.state as usize] += 1;
            match entry.state {
                State::Missing | State::Fetched => sane &= self.live.contains(block),
                State::Written => self.written_elsewhere += u64::from(!self.live.contains(block)),
                State::Discarded => {}
            }
        }
        let before = [live, 0, 0, blocks.end - blocks.start - live];
        for state in 0..4 {
            self.counts[state] = self.counts[state] - before[state] + u64::from(counts[state]);
        }
        let length = (blocks.end - blocks.start) as u32;
        let settled = !(self.shape.has_masks() && has_masks_set(cells));
        let uniform = State::ALL.into_iter().find(|&state| settled && counts[state as usize] == length);
        let cells = uniform.map_or_else(|| Cells::Mixed(Box::new(*cells)), Cells::Uniform);
        self.pages[page as usize] = Some(Box::new(Page { cells, counts }));
        sane
    }

    /// The pages to commit: those with hard marks, and with `all` the others too. They count as clean from here on.
    pub(crate) fn take_dirty(&mut self, all: bool) -> BTreeSet<u64> {
        let mut pages = std::mem::take(&mut self.hard);
        if all {
            pages.append(&mut self.soft);
        }
        pages
    }

    /// Whether marks wait that a flush must make durable.
    pub fn has_hard_marks(&self) -> bool {
        !self.hard.is_empty()
    }

    /// Whether any marks wait.
    pub fn has_marks(&self) -> bool {
        !self.hard.is_empty() || !self.soft.is_empty()
    }
}

fn filled(shape: Shape, state: State) -> Box<[u8; ENTRY_BYTES]> {
    let code = state as u8;
    let mut cells = Box::new([0; ENTRY_BYTES]);
    if shape.has_masks() {
        cells.iter_mut().step_by(2).for_each(|byte| *byte = code);
    } else {
        cells.fill(code * 0b0101_0101);
    }
    cells
}

fn cell(shape: Shape, cells: &[u8; ENTRY_BYTES], index: usize) -> Entry {
    if shape.has_masks() {
        Entry { state: State::of(cells[index * 2]), mask: cells[index * 2 + 1] }
    } else {
        Entry::of(State::of(cells[index / 4] >> (index % 4 * 2)))
    }
}

/// Whether any of the entries of a page with masks has one.
fn has_masks_set(cells: &[u8; ENTRY_BYTES]) -> bool {
    cells.iter().skip(1).step_by(2).any(|&mask| mask != 0)
}

fn set_cell(shape: Shape, cells: &mut [u8; ENTRY_BYTES], index: usize, to: Entry) {
    if shape.has_masks() {
        cells[index * 2] = to.state as u8;
        cells[index * 2 + 1] = to.mask;
    } else {
        let shift = index % 4 * 2;
        cells[index / 4] = cells[index / 4] & !(3 << shift) | (to.state as u8) << shift;
    }
}

/// The first index of `range` whose 2-bit entry is (`equal`) or is not `state`, 32 entries at a time.
fn scan_packed(cells: &[u8; ENTRY_BYTES], range: Range<usize>, state: State, equal: bool) -> Option<usize> {
    const LOW: u64 = 0x5555_5555_5555_5555;
    let pattern = LOW * state as u64;
    let mut word_index = range.start / 32;
    while word_index * 32 < range.end {
        let mut bytes = [0; 8];
        bytes.copy_from_slice(&cells[word_index * 8..word_index * 8 + 8]);
        let differs = u64::from_le_bytes(bytes) ^ pattern;
        let differs = (differs | differs >> 1) & LOW;
        let mut found = if equal { !differs & LOW } else { differs };
        if word_index * 32 < range.start {
            found &= u64::MAX << ((range.start - word_index * 32) * 2);
        }
        if found != 0 {
            let index = word_index * 32 + found.trailing_zeros() as usize / 2;
            return (index < range.end).then_some(index);
        }
        word_index += 1;
    }
    None
}

#[cfg(test)]
mod tests;
