//! Sets of byte or block ranges, kept sorted and merged.

use std::collections::BTreeMap;
use std::ops::Range;

use serde::{Deserialize, Serialize};

/// A run of units: `start..start + length`. On the wire `[start, length]`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(from = "(u64, u64)", into = "(u64, u64)")]
pub struct Extent {
    /// The first unit.
    pub start: u64,
    /// How many units; the end is clamped to 2^64 - 1.
    pub length: u64,
}

impl Extent {
    /// The unit after the last one.
    pub fn end(self) -> u64 {
        self.start.saturating_add(self.length)
    }

    /// As a half-open range.
    pub fn range(self) -> Range<u64> {
        self.start..self.end()
    }
}

impl From<(u64, u64)> for Extent {
    fn from((start, length): (u64, u64)) -> Self {
        Self { start, length }
    }
}

impl From<Extent> for (u64, u64) {
    fn from(extent: Extent) -> Self {
        (extent.start, extent.length)
    }
}

/// A set of units, stored as its maximal runs. Every operation costs O(log n) in the number of runs, plus the runs it merges or cuts.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(from = "Vec<Extent>", into = "Vec<Extent>")]
pub struct ExtentSet {
    /// start -> end of each run; runs neither touch nor overlap.
    runs: BTreeMap<u64, u64>,
}

impl ExtentSet {
    /// The empty set.
    pub fn new() -> Self {
        Self::default()
    }

    /// Adds `range`.
    pub fn insert(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        let (mut start, mut end) = (range.start, range.end);
        // Every run that touches or overlaps is swallowed; walking down from `end` visits only those.
        while let Some((&s, &e)) = self.runs.range(..=end).next_back() {
            if e < start {
                break;
            }
            start = start.min(s);
            end = end.max(e);
            self.runs.remove(&s);
        }
        self.runs.insert(start, end);
    }

    /// Takes `range` away.
    pub fn remove(&mut self, range: Range<u64>) {
        if range.is_empty() {
            return;
        }
        while let Some((&s, &e)) = self.runs.range(..range.end).next_back() {
            if e <= range.start {
                break;
            }
            self.runs.remove(&s);
            if e > range.end {
                self.runs.insert(range.end, e);
            }
            if s < range.start {
                self.runs.insert(s, range.start);
            }
        }
    }

    /// Whether `unit` is in the set.
    pub fn contains(&self, unit: u64) -> bool {
        self.runs.range(..=unit).next_back().is_some_and(|(_, &e)| unit < e)
    }

    /// The runs that overlap `range`, cut to it, in order.
    pub fn overlapping(&self, range: Range<u64>) -> impl Iterator<Item = Extent> + '_ {
        let first = self.runs.range(..=range.start).next_back().map_or(range.start, |(&s, _)| s);
        self.runs
            .range(first..range.end.max(first))
            .map(move |(&s, &e)| (s.max(range.start), e.min(range.end)))
            .filter(|(s, e)| s < e)
            .map(|(s, e)| Extent { start: s, length: e - s })
    }

    /// The units of `range` that are not in the set, in order.
    pub fn gaps(&self, range: Range<u64>) -> ExtentSet {
        let mut gaps = ExtentSet::new();
        let mut at = range.start;
        for run in self.overlapping(range.clone()) {
            gaps.insert(at..run.start);
            at = run.end();
        }
        gaps.insert(at..range.end);
        gaps
    }

    /// The runs, in order.
    pub fn iter(&self) -> impl Iterator<Item = Extent> + '_ {
        self.runs.iter().map(|(&s, &e)| Extent { start: s, length: e - s })
    }

    /// How many runs.
    pub fn runs(&self) -> usize {
        self.runs.len()
    }

    /// How many units.
    pub fn len(&self) -> u64 {
        self.runs.iter().map(|(s, e)| e - s).sum()
    }

    /// Whether the set is empty.
    pub fn is_empty(&self) -> bool {
        self.runs.is_empty()
    }

    /// The first unit after the last run; 0 for the empty set.
    pub fn end(&self) -> u64 {
        self.runs.last_key_value().map_or(0, |(_, &e)| e)
    }
}

impl From<Vec<Extent>> for ExtentSet {
    fn from(list: Vec<Extent>) -> Self {
        list.into_iter().collect()
    }
}

impl From<ExtentSet> for Vec<Extent> {
    fn from(set: ExtentSet) -> Self {
        set.iter().collect()
    }
}

impl FromIterator<Extent> for ExtentSet {
    fn from_iter<I: IntoIterator<Item = Extent>>(list: I) -> Self {
        let mut set = Self::new();
        for extent in list {
            set.insert(extent.range());
        }
        set
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        #[test]
        fn agrees_with_a_set_of_units(ops in prop::collection::vec((any::<bool>(), 0u64..80, 0u64..20), 0..60)) {
            let mut set = ExtentSet::new();
            let mut model = std::collections::BTreeSet::new();
            for (add, start, length) in ops {
                let range = start..start + length;
                if add {
                    set.insert(range.clone());
                    model.extend(range);
                } else {
                    set.remove(range.clone());
                    range.for_each(|u| { model.remove(&u); });
                }
                prop_assert_eq!(set.len(), model.len() as u64);
                let runs: Vec<_> = set.iter().collect();
                prop_assert!(runs.windows(2).all(|w| w[0].end() < w[1].start), "runs touch: {:?}", runs);
            }
            for unit in 0..100 {
                prop_assert_eq!(set.contains(unit), model.contains(&unit));
            }
            let gaps = set.gaps(10..90);
            for unit in 10..90 {
                prop_assert_eq!(gaps.contains(unit), !model.contains(&unit));
            }
            let back: ExtentSet = set.overlapping(5..50).collect();
            prop_assert_eq!(back.len(), model.range(5..50).count() as u64);
        }
    }
}
