//! Digests on their way from descriptors to the sink.

use super::Lane;
use crate::origin::client::{BLOCK, Broken};

impl Lane<'_> {
    /// Digests come one block at a time and are handed over together.
    pub(super) fn handle_digest(&mut self, tag: usize, offset: u64, length: u32, crc32c: u32) -> Result<(), Broken> {
        let fetch = self.slot.lock().job(tag)?.fetch;
        let end = fetch.offset + u64::from(fetch.length);
        if !offset.is_multiple_of(BLOCK) || offset + u64::from(length) != (offset + BLOCK).min(end) {
            return Err(Broken::OddDigest);
        }
        if self.digests_of.0 != tag {
            self.hand_over_digests()?;
        }
        if self.digests.is_empty() {
            self.digests_of = (tag, offset);
        }
        self.digests.push(crc32c);
        Ok(())
    }

    pub(super) fn hand_over_digests(&mut self) -> Result<(), Broken> {
        if !self.digests.is_empty() {
            let (tag, offset) = self.digests_of;
            let token = {
                let mut desk = self.slot.lock();
                let job = desk.job(tag)?;
                job.next = offset + self.digests.len() as u64 * BLOCK;
                job.fetch.token
            };
            self.sink.handle_digests(token, offset, &self.digests);
            self.digests.clear();
        }
        Ok(())
    }
}
