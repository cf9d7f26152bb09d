//! The marks file: what was acknowledged since the last commit, for the next process of the same boot.
//!
//! A head of 4096 bytes, then records of 32 bytes, each at the place its number says. Records are written to the page cache and never
//! synced. Numbers only grow; what commits made superfluous is punched out, so the file stays small although its length does not.

use std::ops::Range;

/// Bytes of a record.
pub const RECORD: usize = 32;
/// Bytes of the head, so that punching records leaves it alone.
pub const HEAD: usize = 4096;

const MAGIC: &[u8; 8] = b"DECANTMK";

/// What a record says of its sectors.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum MarkKind {
    /// Written and acknowledged.
    Written = 1,
    /// Discarded and acknowledged.
    Discarded = 2,
    /// About to be overwritten: blocks that were fetched hold our bytes or theirs.
    Adopted = 3,
}

/// One record: 512-byte sectors that are ours.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mark {
    /// Its number, which is its place.
    pub number: u64,
    /// What happened.
    pub kind: MarkKind,
    /// Where.
    pub sectors: Range<u64>,
}

impl Mark {
    /// Where in the file it goes.
    pub fn offset(&self) -> u64 {
        offset_of(self.number)
    }

    /// As the file holds it: `0` CRC-32C of the rest · `4` kind u32 · `8` number · `16` first sector · `24` sectors.
    pub fn encode(&self) -> [u8; RECORD] {
        let mut bytes = [0; RECORD];
        bytes[4..8].copy_from_slice(&(self.kind as u32).to_le_bytes());
        bytes[8..16].copy_from_slice(&self.number.to_le_bytes());
        bytes[16..24].copy_from_slice(&self.sectors.start.to_le_bytes());
        bytes[24..32].copy_from_slice(&(self.sectors.end - self.sectors.start).to_le_bytes());
        let crc = crc32c::crc32c(&bytes[4..]);
        bytes[..4].copy_from_slice(&crc.to_le_bytes());
        bytes
    }

    /// Reads the record at the place of `number`. `None`: none was finished there, so nothing was acknowledged on its account.
    pub fn decode(number: u64, bytes: &[u8; RECORD]) -> Option<Self> {
        let word = |at: usize| bytes[at..].first_chunk().map(|chunk| u64::from_le_bytes(*chunk));
        let half = |at: usize| bytes[at..].first_chunk().map(|chunk| u32::from_le_bytes(*chunk));
        let kind = match half(4)? {
            1 => MarkKind::Written,
            2 => MarkKind::Discarded,
            3 => MarkKind::Adopted,
            _ => return None,
        };
        let start = word(16)?;
        let sectors = start..start.checked_add(word(24)?)?;
        (half(0)? == crc32c::crc32c(&bytes[4..]) && word(8)? == number).then_some(Self { number, kind, sectors })
    }
}

/// Where record `number` goes.
pub fn offset_of(number: u64) -> u64 {
    HEAD as u64 + number * RECORD as u64
}

/// The head of a marks file of `volume` at `epoch` in boot `boot`; a file with any other head is not to be believed.
pub fn head(volume: &str, epoch: u64, boot: &str) -> Box<[u8; HEAD]> {
    let mut bytes = Box::new([0; HEAD]);
    bytes[..8].copy_from_slice(MAGIC);
    bytes[8..16].copy_from_slice(&epoch.to_le_bytes());
    bytes[16..16 + volume.len().min(64)].copy_from_slice(&volume.as_bytes()[..volume.len().min(64)]);
    bytes[80..80 + boot.len().min(36)].copy_from_slice(&boot.as_bytes()[..boot.len().min(36)]);
    let crc = crc32c::crc32c(&bytes[..HEAD - 4]);
    bytes[HEAD - 4..].copy_from_slice(&crc.to_le_bytes());
    bytes
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_record_reads_back_and_only_at_its_place() {
        let mark = Mark { number: 7, kind: MarkKind::Discarded, sectors: 8..1 << 41 };
        let bytes = mark.encode();
        assert_eq!(Mark::decode(7, &bytes), Some(mark));
        assert_eq!(Mark::decode(8, &bytes), None);
        for at in 0..RECORD {
            let mut bytes = bytes;
            bytes[at] ^= 0x10;
            assert_eq!(Mark::decode(7, &bytes), None, "byte {at}");
        }
        assert_eq!(Mark::decode(0, &[0; RECORD]), None);
    }

    #[test]
    fn heads_differ_by_boot_volume_and_epoch() {
        let this = head("orders", 3, "boot-1");
        assert_eq!(this, head("orders", 3, "boot-1"));
        assert!(
            this != head("orders", 4, "boot-1")
                && this != head("other", 3, "boot-1")
                && this != head("orders", 3, "boot-2")
        );
    }
}
