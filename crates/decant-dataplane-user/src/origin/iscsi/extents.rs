//! What a session has learnt of which blocks are mapped.

use std::collections::BTreeMap;

use decant_iscsi::initiator::Extent;

use crate::origin::client::BLOCK;

/// Most runs that are remembered; a few answers' worth. Beyond, all are forgotten and learnt again where they are needed.
const MAX_RUNS: usize = 16 * 1024;
/// A hole that is shorter is read along with what is around it: a command costs more than its zeros.
const SHORT_HOLE: u64 = 32 * 1024;

/// Runs by their start, each with its end and whether it is a hole.
#[derive(Debug, Default)]
pub(super) struct Extents {
    runs: BTreeMap<u64, (u64, bool)>,
}

impl Extents {
    /// Takes over what the disk said.
    pub(super) fn learn(&mut self, extents: &[Extent]) {
        if self.runs.len() + extents.len() > MAX_RUNS {
            self.runs.clear();
        }
        self.runs.extend(extents.iter().map(|run| (run.offset, (run.offset.saturating_add(run.length), run.hole))));
    }

    /// The end of the run that `offset` is in, and whether it is a hole.
    fn run(&self, offset: u64) -> Option<(u64, bool)> {
        let (_, (end, hole)) = self.runs.range(..=offset).next_back()?;
        (*end > offset).then_some((*end, *hole))
    }

    /// Whether anything is known about `offset`.
    pub(super) fn knows(&self, offset: u64) -> bool {
        self.run(offset).is_some()
    }

    /// Bytes of hole from `start` on, within `end`: whole blocks, but at the end of the disk, which has `size` bytes.
    pub(super) fn hole(&self, start: u64, end: u64, size: u64) -> Option<u64> {
        let mut at = start;
        while at < end
            && let Some((stop, true)) = self.run(at)
        {
            at = stop.min(end);
        }
        let at = if at == end || at == size { at } else { at / BLOCK * BLOCK };
        at.checked_sub(start).filter(|length| *length >= SHORT_HOLE || (*length > 0 && at == end))
    }

    /// Bytes to read from `start` on, within `end`: at least a block, up to the next hole that is worth it, or to where
    /// nothing is known.
    pub(super) fn data(&self, start: u64, end: u64) -> u64 {
        let mut at = start;
        while at < end {
            match self.run(at) {
                None => break,
                Some((stop, true)) if at > start && stop.min(end) - at >= SHORT_HOLE => break,
                Some((stop, _)) => at = stop,
            }
        }
        // Where nothing at all is known, all of it.
        if at == start { end - start } else { at.next_multiple_of(BLOCK).min(end) - start }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn known(runs: &[(u64, bool)]) -> Extents {
        let mut extents = Extents::default();
        let mut offset = 0;
        for (length, hole) in runs {
            extents.learn(&[Extent { offset, length: *length, hole: *hole }]);
            offset += length;
        }
        extents
    }

    const K: u64 = 1024;

    #[test]
    fn holes_are_whole_blocks_and_worth_it() {
        let extents =
            known(&[(64 * K + 512, true), (64 * K - 512, false), (8 * K, true), (8 * K, false), (64 * K, true)]);
        let size = 208 * K;
        assert_eq!(extents.hole(0, size, size), Some(64 * K));
        assert_eq!(extents.hole(0, 16 * K, size), Some(16 * K), "all that is asked for");
        assert_eq!(extents.hole(64 * K, size, size), None, "less than a block");
        assert_eq!(extents.data(64 * K, size), 80 * K, "a short hole is read along");
        assert_eq!(extents.hole(144 * K, size, size), Some(64 * K));
        assert_eq!(extents.hole(145 * K, 149 * K, size), Some(4 * K));
        assert!(extents.knows(207 * K) && !extents.knows(208 * K));
    }

    #[test]
    fn what_is_not_known_is_read() {
        let extents = known(&[(10 * K, false)]);
        assert_eq!((extents.hole(0, 64 * K, 128 * K), extents.data(0, 64 * K)), (None, 12 * K));
        assert_eq!((extents.hole(16 * K, 64 * K, 128 * K), extents.data(16 * K, 64 * K)), (None, 48 * K));
    }

    /// Together they go from one end to the other, and no mapped byte is called a hole.
    #[test]
    fn parts_are_covered_once() {
        let mut state = 7u64;
        let mut random = |end: u64| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            (state >> 33) % end
        };
        for _ in 0..200 {
            let runs: Vec<(u64, bool)> = (0..20).map(|_| ((1 + random(200)) * 512, random(2) == 0)).collect();
            let size: u64 = runs.iter().map(|run| run.0).sum();
            let extents = known(&runs);
            let mapped = |at: u64| extents.run(at).is_some_and(|(_, hole)| !hole);
            let mut at = 0;
            while at < size {
                assert!(at.is_multiple_of(BLOCK));
                match extents.hole(at, size, size) {
                    Some(length) => {
                        assert!(!(at..at + length).step_by(512).any(mapped));
                        at += length;
                    }
                    None => {
                        let length = extents.data(at, size);
                        assert!(length > 0);
                        at += length;
                    }
                }
            }
            assert_eq!(at, size);
        }
    }
}
