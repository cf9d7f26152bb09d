#![doc = include_str!("../../../docs/clone-map.md")]

use decant_base::{Extent, ExtentSet};

use crate::shape::ENTRY_BYTES;

/// Bytes of a superblock and of a page slot.
pub const PAGE: usize = 4096;
/// Where the live table starts.
pub const LIVE_OFFSET: u64 = 8192;
/// Regions that the superblock's intent bitmap can name.
pub const MAX_REGIONS: u64 = (INTENT_BYTES * 8) as u64;
/// The smallest intent region, 64 MiB: few enough syncs that a 4 GiB volume pays at most 64 in its life.
pub const MIN_REGION_SHIFT: u32 = 14;
/// Bytes of volume name in the superblock.
pub const NAME_BYTES: usize = 64;
/// Characters of a boot id.
pub const BOOT_ID_BYTES: usize = 36;

const MAGIC: &[u8; 8] = b"DECANTMP";
const PAGE_MAGIC: &[u8; 4] = b"DCPG";
const VERSION: u32 = 1;
const INTENTS_AT: usize = 512;
const INTENT_BYTES: usize = 3580;
const CRC_AT: usize = 4092;

/// How far the clone is, durably.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Phase {
    /// Blocks are missing, or not compared yet.
    Filling = 1,
    /// All blocks are here and were compared: the map is of no more use.
    Complete = 2,
}

/// A superblock's contents.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Superblock {
    /// Grows with each update; the higher of two valid ones counts.
    pub generation: u64,
    /// Filling or complete.
    pub phase: Phase,
    /// Closed in order: everything in the map, no intents.
    pub clean: bool,
    /// The volume's id, at most 64 bytes.
    pub volume: String,
    /// Bytes of payload.
    pub size: u64,
    /// 512 or 4096.
    pub sector_size: u32,
    /// The owner's epoch at `begin`.
    pub epoch: u64,
    /// Extents in the live table.
    pub live_extents: u64,
    /// CRC-32C of the live table.
    pub live_crc: u32,
    /// log2 of the blocks in an intent region.
    pub region_shift: u32,
    /// The boot in which the file was last opened; at most 36 bytes.
    pub boot: String,
    /// Compared, overwritten, discarded, repaired, once complete.
    pub verification: [u64; 4],
    /// One bit per region in which fetched blocks may have been overwritten.
    pub intents: Box<[u8; INTENT_BYTES]>,
}

/// Why a superblock slot is none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// Not the magic number.
    #[error("no clone map")]
    Magic,
    /// The checksum does not match.
    #[error("checksum mismatch")]
    Checksum,
    /// A version this program does not know.
    #[error("version {0} is not known to this program")]
    Version(u32),
    /// Flags this program does not know.
    #[error("feature flags {0:#x} are not known to this program")]
    Flags(u32),
    /// A field out of range under a valid checksum.
    #[error("field {0} is out of range")]
    Field(&'static str),
}

impl Superblock {
    /// An intent bitmap with no bit set.
    pub fn no_intents() -> Box<[u8; INTENT_BYTES]> {
        Box::new([0; INTENT_BYTES])
    }

    /// As the file holds it.
    pub fn encode(&self) -> Box<[u8; PAGE]> {
        let mut page = Box::new([0u8; PAGE]);
        let mut put = |at: usize, bytes: &[u8]| page[at..at + bytes.len()].copy_from_slice(bytes);
        put(0, MAGIC);
        put(8, &VERSION.to_le_bytes());
        put(16, &self.generation.to_le_bytes());
        put(24, &(self.phase as u32).to_le_bytes());
        put(28, &u32::from(self.clean).to_le_bytes());
        put(32, &self.volume.as_bytes()[..self.volume.len().min(NAME_BYTES)]);
        put(96, &self.size.to_le_bytes());
        put(104, &self.sector_size.to_le_bytes());
        put(108, &if self.sector_size == 512 { 16u32 } else { 2 }.to_le_bytes());
        put(112, &self.epoch.to_le_bytes());
        put(120, &self.live_extents.to_le_bytes());
        put(128, &self.live_crc.to_le_bytes());
        put(132, &self.region_shift.to_le_bytes());
        put(136, &self.boot.as_bytes()[..self.boot.len().min(BOOT_ID_BYTES)]);
        for (index, count) in self.verification.iter().enumerate() {
            put(176 + index * 8, &count.to_le_bytes());
        }
        put(INTENTS_AT, &self.intents[..]);
        let crc = crc32c::crc32c(&page[..CRC_AT]);
        page[CRC_AT..].copy_from_slice(&crc.to_le_bytes());
        page
    }

    /// Reads a slot.
    pub fn decode(page: &[u8; PAGE]) -> Result<Self, SuperblockError> {
        if page.first_chunk() != Some(MAGIC) {
            return Err(SuperblockError::Magic);
        }
        if crc32c::crc32c(&page[..CRC_AT]) != u32_at(page, CRC_AT) {
            return Err(SuperblockError::Checksum);
        }
        let version = u32_at(page, 8);
        if version != VERSION {
            return Err(SuperblockError::Version(version));
        }
        let flags = u32_at(page, 12);
        if flags != 0 {
            return Err(SuperblockError::Flags(flags));
        }
        let phase = match u32_at(page, 24) {
            1 => Phase::Filling,
            2 => Phase::Complete,
            _ => return Err(SuperblockError::Field("state")),
        };
        let sector_size = u32_at(page, 104);
        if u32_at(page, 108) != if sector_size == 512 { 16 } else { 2 } {
            return Err(SuperblockError::Field("bits per entry"));
        }
        let region_shift = u32_at(page, 132);
        if !(MIN_REGION_SHIFT..=40).contains(&region_shift) {
            return Err(SuperblockError::Field("intent region"));
        }
        let mut intents = Self::no_intents();
        intents.copy_from_slice(&page[INTENTS_AT..CRC_AT]);
        Ok(Self {
            generation: u64_at(page, 16),
            phase,
            clean: u32_at(page, 28) == 1,
            volume: text_at(page, 32, NAME_BYTES).ok_or(SuperblockError::Field("volume"))?,
            size: u64_at(page, 96),
            sector_size,
            epoch: u64_at(page, 112),
            live_extents: u64_at(page, 120),
            live_crc: u32_at(page, 128),
            region_shift,
            boot: text_at(page, 136, BOOT_ID_BYTES).ok_or(SuperblockError::Field("boot id"))?,
            verification: std::array::from_fn(|index| u64_at(page, 176 + index * 8)),
            intents,
        })
    }
}

/// The live table of `live`, in blocks.
pub fn encode_live(live: &ExtentSet) -> Vec<u8> {
    let mut table = Vec::with_capacity(live.runs() * 16);
    for run in live.iter() {
        table.extend_from_slice(&run.start.to_le_bytes());
        table.extend_from_slice(&run.length.to_le_bytes());
    }
    table
}

/// Reads a live table whose checksum was compared; `None` if it is not sorted, touches itself or leaves the volume.
pub fn decode_live(table: &[u8], blocks: u64) -> Option<ExtentSet> {
    let mut live = ExtentSet::new();
    let mut after = None;
    for entry in table.chunks_exact(16) {
        let run = Extent { start: u64_at(entry, 0), length: u64_at(entry, 8) };
        let in_order = after.is_none_or(|after| run.start > after);
        if !in_order || run.length == 0 || run.start.checked_add(run.length)? > blocks {
            return None;
        }
        after = Some(run.end());
        live.insert(run.range());
    }
    Some(live)
}

/// A page as the file holds it.
pub fn encode_page(page: u64, generation: u64, entries: &[u8; ENTRY_BYTES]) -> Box<[u8; PAGE]> {
    let mut bytes = Box::new([0u8; PAGE]);
    bytes[..4].copy_from_slice(PAGE_MAGIC);
    bytes[8..16].copy_from_slice(&generation.to_le_bytes());
    bytes[16..24].copy_from_slice(&page.to_le_bytes());
    bytes[64..].copy_from_slice(entries);
    let crc = crc32c::crc32c(&bytes[..]);
    bytes[4..8].copy_from_slice(&crc.to_le_bytes());
    bytes
}

/// What a page slot holds.
#[derive(Debug, PartialEq, Eq)]
pub enum Slot<'a> {
    /// Zeros: never written.
    Empty,
    /// Torn or rotten.
    Damaged,
    /// A page.
    Valid {
        /// The higher of two valid slots counts.
        generation: u64,
        /// Its entries.
        entries: &'a [u8; ENTRY_BYTES],
    },
}

/// Reads the slot of `page`.
pub fn decode_page(page: u64, bytes: &[u8; PAGE]) -> Slot<'_> {
    if bytes.iter().all(|&byte| byte == 0) {
        return Slot::Empty;
    }
    let crc = crc32c::crc32c(&bytes[..4]);
    let crc = crc32c::crc32c_append(crc, &[0; 4]);
    let crc = crc32c::crc32c_append(crc, &bytes[8..]);
    if bytes[..4] != PAGE_MAGIC[..] || crc != u32_at(bytes, 4) || u64_at(bytes, 16) != page {
        return Slot::Damaged;
    }
    match bytes.last_chunk() {
        Some(entries) => Slot::Valid { generation: u64_at(bytes, 8), entries },
        None => Slot::Damaged,
    }
}

/// Offsets are constants inside buffers of known length.
fn u32_at(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_le_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_le_bytes)
}

fn text_at(bytes: &[u8], at: usize, length: usize) -> Option<String> {
    let field = bytes.get(at..at + length)?;
    let end = field.iter().position(|&byte| byte == 0).unwrap_or(length);
    field[end..].iter().all(|&byte| byte == 0).then(|| std::str::from_utf8(&field[..end]).ok().map(str::to_owned))?
}

#[cfg(test)]
mod tests;
