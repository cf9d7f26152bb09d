//! The requests that the server owes an answer to.

use crate::error::{ErrorCode, Violation};
use crate::export::{Context, Contexts};
use crate::request::{Command, Request};

/// Bytes of a read that have arrived: sorted, disjoint, merged. A server that answers in order keeps it at one range.
#[derive(Debug, Clone, Default)]
struct Coverage {
    ranges: Vec<(u64, u64)>,
}

/// More separate pieces than this in one read's answer is no honest server.
const MAX_PIECES: usize = 16 * 1024;

impl Coverage {
    /// Adds `start..end`; false if part of it is there already, or there are too many pieces.
    fn add(&mut self, start: u64, end: u64) -> bool {
        if let Some(last) = self.ranges.last_mut()
            && last.1 == start
        {
            last.1 = end;
            return true;
        }
        let index = self.ranges.partition_point(|range| range.1 <= start);
        if self.ranges.len() >= MAX_PIECES || self.ranges.get(index).is_some_and(|next| next.0 < end) {
            return false;
        }
        match self.ranges.get_mut(index) {
            Some(next) if next.0 == end => next.0 = start,
            _ => self.ranges.insert(index, (start, end)),
        }
        // The range before may now touch the one at `index`.
        if let Some(before) = index.checked_sub(1)
            && let (Some(left), Some(right)) = (self.ranges.get(before), self.ranges.get(index))
            && left.1 == right.0
        {
            let end = right.1;
            self.ranges.remove(index);
            if let Some(left) = self.ranges.get_mut(before) {
                left.1 = end;
            }
        }
        true
    }

    fn is_exactly(&self, start: u64, end: u64) -> bool {
        match self.ranges.as_slice() {
            [] => start == end,
            [one] => *one == (start, end),
            _ => false,
        }
    }
}

/// One outstanding request.
#[derive(Debug, Clone)]
pub(super) struct Slot {
    generation: u32,
    used: bool,
    pub(super) tag: u64,
    pub(super) request: Request,
    coverage: Coverage,
    answered: Contexts,
    pub(super) error: Option<ErrorCode>,
}

impl Slot {
    /// Part of a read arrived.
    pub(super) fn cover(&mut self, offset: u64, length: u32) -> Result<(), Violation> {
        let outside = Violation::OutOfRange { offset, length: length.into() };
        let end = offset.checked_add(length.into()).ok_or(outside.clone())?;
        let inside = offset >= self.request.offset && self.request.end().is_some_and(|limit| end <= limit);
        if length == 0 || !inside || !self.coverage.add(offset, end) {
            return Err(outside);
        }
        Ok(())
    }

    /// A context's chunk begins; each comes once.
    pub(super) fn answer(&mut self, context: Context) -> Result<(), Violation> {
        if self.answered.has(context) {
            return Err(Violation::Malformed("block status: a context twice"));
        }
        self.answered.insert(context);
        Ok(())
    }

    /// Whether all that was asked has come.
    pub(super) fn is_complete(&self, contexts: Contexts) -> bool {
        match self.request.command {
            Command::Read { .. } => {
                self.request.end().is_some_and(|end| self.coverage.is_exactly(self.request.offset, end))
            }
            Command::BlockStatus { .. } => self.answered == contexts,
            _ => true,
        }
    }
}

/// All slots; a cookie is a slot's index and, above it, how often the slot was used, so that a late answer to an old
/// request is not taken for one to a new.
#[derive(Debug, Clone)]
pub(super) struct Table {
    slots: Vec<Slot>,
    free: Vec<u32>,
    limit: usize,
}

impl Table {
    pub(super) fn new(limit: usize) -> Self {
        Self { slots: Vec::with_capacity(limit), free: Vec::with_capacity(limit), limit }
    }

    pub(super) fn len(&self) -> usize {
        self.slots.len().saturating_sub(self.free.len())
    }

    pub(super) fn is_full(&self) -> bool {
        self.len() >= self.limit
    }

    /// Enters a request and gives it its cookie. `None`: full.
    pub(super) fn insert(&mut self, tag: u64, command: Command, offset: u64, length: u32) -> Option<Request> {
        let mut request = Request { cookie: 0, command, offset, length };
        if let Some(index) = self.free.pop() {
            let slot = self.slots.get_mut(usize::try_from(index).ok()?)?;
            slot.generation = slot.generation.wrapping_add(1);
            request.cookie = cookie(index, slot.generation);
            slot.used = true;
            slot.tag = tag;
            slot.request = request;
            slot.coverage.ranges.clear();
            slot.answered = Contexts::NONE;
            slot.error = None;
            return Some(request);
        }
        let index = u32::try_from(self.slots.len()).ok().filter(|_| !self.is_full())?;
        request.cookie = cookie(index, 0);
        self.slots.push(Slot {
            generation: 0,
            used: true,
            tag,
            request,
            coverage: Coverage::default(),
            answered: Contexts::NONE,
            error: None,
        });
        Some(request)
    }

    /// The slot of an outstanding request.
    pub(super) fn find(&mut self, cookie: u64) -> Result<&mut Slot, Violation> {
        usize::try_from(cookie & u64::from(u32::MAX))
            .ok()
            .and_then(|index| self.slots.get_mut(index))
            .filter(|slot| slot.used && slot.request.cookie == cookie)
            .ok_or(Violation::UnknownCookie(cookie))
    }

    /// The request is answered.
    pub(super) fn remove(&mut self, cookie: u64) {
        if let Ok(slot) = self.find(cookie) {
            slot.used = false;
            if let Ok(index) = u32::try_from(cookie & u64::from(u32::MAX)) {
                self.free.push(index);
            }
        }
    }

    /// Takes any outstanding request out.
    pub(super) fn pop(&mut self) -> Option<(u64, Request)> {
        let (tag, request) = self.slots.iter().find(|slot| slot.used).map(|slot| (slot.tag, slot.request))?;
        self.remove(request.cookie);
        Some((tag, request))
    }
}

fn cookie(index: u32, generation: u32) -> u64 {
    u64::from(generation) << 32 | u64::from(index)
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests {
    use super::*;
    use proptest::collection::vec;
    use proptest::prelude::*;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Against one flag per byte: a piece is taken if and only if none of it was there.
        #[test]
        fn coverage_is_a_set_of_bytes(pieces in vec((0usize..64, 1usize..16), 0..40)) {
            let mut coverage = Coverage::default();
            let mut bytes = [false; 80];
            for (start, length) in pieces {
                let range = start..start + length;
                let fresh = bytes[range.clone()].iter().all(|there| !there);
                prop_assert_eq!(coverage.add(range.start as u64, range.end as u64), fresh);
                if fresh {
                    bytes[range].fill(true);
                }
                let ranges: Vec<_> = coverage.ranges.windows(2).filter(|pair| pair[0].1 >= pair[1].0).collect();
                prop_assert!(ranges.is_empty(), "sorted, disjoint, merged");
                let covered: u64 = coverage.ranges.iter().map(|(start, end)| end - start).sum();
                prop_assert_eq!(covered, bytes.iter().filter(|there| **there).count() as u64);
                for end in 0..80u64 {
                    let all = bytes[..end as usize].iter().all(|there| *there) && !bytes[end as usize..].contains(&true);
                    prop_assert_eq!(coverage.is_exactly(0, end), all);
                }
            }
        }
    }
}
