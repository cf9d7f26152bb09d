//! The comparison of the medium with the origin's digests, before the origin is let go.
//!
//! Every block that is still `Fetched` is compared once; one that differs turns missing, is fetched again and compared again.
//! A block that the guest overwrites meanwhile leaves the state `Fetched` before a byte of the write lands, so a difference counts
//! only if the block is still `Fetched` after its bytes were read: that check is the lock against writers.

use std::collections::BTreeMap;
use std::ops::Range;

use crate::blocks::{BlockMap, State};

/// After so many fetches of a block that never reads back as fetched, the medium is at fault.
pub const MAX_REPAIRS: u32 = 3;

/// What to do next.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Step {
    /// Read these blocks from the medium, get their digests, and say what differs with [`Verify::compared`].
    Compare(Range<u64>),
    /// Blocks are missing: wait for the hydration.
    Missing(u64),
    /// The medium does not keep this block.
    BadMedium(u64),
    /// Every fetched block was compared.
    Done(Counts),
}

/// What was found, in blocks.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counts {
    /// Equal to the origin's digest.
    pub compared: u64,
    /// Overwritten here, in whole or in part.
    pub overwritten: u64,
    /// Discarded here, or never live.
    pub discarded: u64,
    /// Differed, were fetched again, then were equal.
    pub repaired: u64,
}

/// The state of a verification. Losing it (a restart) costs only the work.
#[derive(Debug, Default)]
pub struct Verify {
    cursor: u64,
    again: BTreeMap<u64, u32>,
    repaired: u64,
}

impl Verify {
    /// Nothing compared yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// What to do next; runs of at most `limit` blocks.
    pub fn step(&mut self, map: &BlockMap, limit: u64) -> Step {
        let missing = map.count(State::Missing);
        if missing > 0 {
            return Step::Missing(missing);
        }
        if let Some((&block, _)) = self.again.iter().find(|&(_, &tries)| tries > MAX_REPAIRS) {
            return Step::BadMedium(block);
        }
        if let Some((&block, _)) = self.again.iter().find(|&(&block, _)| block < self.cursor) {
            if map.entry(block).state == State::Fetched {
                return Step::Compare(block..block + 1);
            }
            // Overwritten before its repair could be compared.
            self.again.remove(&block);
            return self.step(map, limit);
        }
        let blocks = map.shape().blocks();
        while let Some(run) = map.next_in(self.cursor..blocks, State::Fetched) {
            let pure = |block: &u64| map.entry(*block).mask == 0;
            let Some(start) = run.clone().find(pure) else {
                self.cursor = run.end;
                continue;
            };
            let end = if map.shape().has_masks() {
                (start..run.end.min(start + limit)).find(|block| !pure(block)).unwrap_or(run.end)
            } else {
                run.end
            };
            return Step::Compare(start..end.min(start + limit));
        }
        self.cursor = blocks;
        Step::Done(self.counts(map))
    }

    /// `blocks` were compared; `differing` are those that were not equal. Returns how many of these turned missing.
    pub fn compared(&mut self, map: &mut BlockMap, blocks: Range<u64>, differing: &[u64]) -> u64 {
        for block in differing.iter().filter(|block| blocks.contains(block)) {
            if map.entry(*block).mask == 0 && map.mark_lost(*block) {
                *self.again.entry(*block).or_insert(0) += 1;
            }
        }
        let is_lost = |block: &u64| differing.contains(block);
        let repaired: Vec<u64> =
            self.again.range(blocks.clone()).map(|(&block, _)| block).filter(|b| !is_lost(b)).collect();
        for block in repaired {
            self.again.remove(&block);
            self.repaired += u64::from(map.entry(block).state == State::Fetched);
        }
        self.cursor = self.cursor.max(blocks.end);
        differing.iter().filter(|&&block| map.entry(block).state == State::Missing).count() as u64
    }

    /// Whether blocks are missing, or were, because they differed.
    pub fn has_repairs(&self) -> bool {
        !self.again.is_empty()
    }

    fn counts(&self, map: &BlockMap) -> Counts {
        let fetched = map.count(State::Fetched);
        let mut mixed = 0;
        if map.shape().has_masks() {
            let mut at = 0;
            while let Some(run) = map.next_in(at..map.shape().blocks(), State::Fetched) {
                at = run.end;
                mixed += run.filter(|&block| map.entry(block).mask != 0).count() as u64;
            }
        }
        Counts {
            compared: fetched - mixed,
            overwritten: map.count(State::Written) + mixed,
            discarded: map.count(State::Discarded),
            repaired: self.repaired,
        }
    }
}

#[cfg(test)]
mod tests {
    use decant_base::ExtentSet;

    use super::*;
    use crate::shape::Shape;

    #[test]
    fn a_block_that_differs_is_fetched_and_compared_again() {
        let mut live = ExtentSet::new();
        live.insert(0..100);
        let mut map = BlockMap::new(Shape::new(200 * 4096, 4096).unwrap(), live);
        let mut verify = Verify::new();
        assert_eq!(verify.step(&map, 64), Step::Missing(100));
        map.mark_fetched(0..100);
        map.mark_written(&(80..160));
        assert_eq!(verify.step(&map, 64), Step::Compare(0..10));
        assert_eq!(verify.compared(&mut map, 0..10, &[3]), 1);
        assert_eq!(verify.step(&map, 64), Step::Missing(1));
        map.mark_fetched(3..4);
        assert_eq!(verify.step(&map, 64), Step::Compare(3..4));
        assert_eq!(verify.compared(&mut map, 3..4, &[]), 0);
        assert_eq!(verify.step(&map, 64), Step::Compare(20..84));
        // Overwritten while it was read: the difference is the guest's.
        map.adopt(&(8 * 30..8 * 31));
        assert_eq!(verify.compared(&mut map, 20..84, &[30]), 0);
        assert_eq!(verify.step(&map, 64), Step::Compare(84..100));
        assert_eq!(verify.compared(&mut map, 84..100, &[]), 0);
        let want = Counts { compared: 89, overwritten: 11, discarded: 100, repaired: 1 };
        assert_eq!(verify.step(&map, 64), Step::Done(want));
    }

    #[test]
    fn a_medium_that_keeps_nothing_is_named() {
        let mut live = ExtentSet::new();
        live.insert(0..4);
        let mut map = BlockMap::new(Shape::new(4 * 4096, 4096).unwrap(), live);
        let mut verify = Verify::new();
        for _ in 0..=MAX_REPAIRS {
            map.mark_fetched(0..4);
            let Step::Compare(blocks) = verify.step(&map, 64) else { panic!("nothing to compare") };
            verify.compared(&mut map, blocks, &[2]);
        }
        map.mark_fetched(0..4);
        assert_eq!(verify.step(&map, 64), Step::BadMedium(2));
    }
}
