//! Sizes: a volume in sectors, in blocks and in map pages.

use std::ops::Range;

use decant_base::{BLOCK, SECTOR};

/// Bytes of entries in a map page: the page less its 64-byte header.
pub const ENTRY_BYTES: usize = 4032;
/// 512-byte sectors in a block.
pub const SECTORS_PER_BLOCK: u64 = BLOCK / SECTOR;
/// The largest volume, 1 PiB: page numbers stay below 2^32 for both entry widths.
pub const MAX_SIZE: u64 = 1 << 50;

/// A size or sector size that no volume has.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ShapeError {
    /// Neither 512 nor 4096.
    #[error("sector size {0} is neither 512 nor 4096")]
    SectorSize(u32),
    /// Zero, above 1 PiB, or no whole number of sectors.
    #[error("{size} bytes is no volume size: a multiple of {sector_size}, at most 1 PiB")]
    Size {
        /// The size given.
        size: u64,
        /// The sector size it must be a multiple of.
        sector_size: u32,
    },
}

/// The size and the sector size of a volume, fixed for its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    size: u64,
    sector_size: u32,
}

impl Shape {
    /// Checks `size` (bytes) and `sector_size` (512 or 4096).
    pub fn new(size: u64, sector_size: u32) -> Result<Self, ShapeError> {
        if sector_size != 512 && sector_size != 4096 {
            return Err(ShapeError::SectorSize(sector_size));
        }
        if size == 0 || size > MAX_SIZE || !size.is_multiple_of(u64::from(sector_size)) {
            return Err(ShapeError::Size { size, sector_size });
        }
        Ok(Self { size, sector_size })
    }

    /// Bytes of payload.
    pub fn size(self) -> u64 {
        self.size
    }

    /// 512 or 4096.
    pub fn sector_size(self) -> u32 {
        self.sector_size
    }

    /// Whether a write may be smaller than a block, so that entries carry a mask of sectors.
    pub fn has_masks(self) -> bool {
        self.sector_size == 512
    }

    /// Blocks of 4 KiB, the last one perhaps short.
    pub fn blocks(self) -> u64 {
        self.size.div_ceil(BLOCK)
    }

    /// Sectors of 512 bytes, whatever the sector size.
    pub fn sectors(self) -> u64 {
        self.size / SECTOR
    }

    /// Blocks that one map page describes: 16,128 (63 MiB) at 2 bits, 2,016 (7.9 MiB) at 16 bits.
    pub fn blocks_per_page(self) -> u64 {
        if self.has_masks() { (ENTRY_BYTES / 2) as u64 } else { (ENTRY_BYTES * 4) as u64 }
    }

    /// Map pages.
    pub fn pages(self) -> u64 {
        self.blocks().div_ceil(self.blocks_per_page())
    }

    /// The blocks of page `page`.
    pub fn page_blocks(self, page: u64) -> Range<u64> {
        let start = page * self.blocks_per_page();
        start..(start + self.blocks_per_page()).min(self.blocks())
    }

    /// Which sectors `block` has, one bit each: 0xFF except for a short last block.
    pub fn full_mask(self, block: u64) -> u8 {
        let sectors = self.sectors() - (block * SECTORS_PER_BLOCK).min(self.sectors());
        if sectors >= SECTORS_PER_BLOCK { 0xFF } else { ((1u16 << sectors) - 1) as u8 }
    }

    /// The blocks that a range of bytes touches.
    pub fn touched(self, bytes: Range<u64>) -> Range<u64> {
        bytes.start / BLOCK..bytes.end.min(self.size).div_ceil(BLOCK)
    }

    /// The bytes of a range of blocks, cut at the volume's end.
    pub fn bytes_of(self, blocks: Range<u64>) -> Range<u64> {
        (blocks.start * BLOCK).min(self.size)..(blocks.end * BLOCK).min(self.size)
    }

    /// Whether `bytes` lies in the volume and on sector boundaries.
    pub fn holds(self, bytes: &Range<u64>) -> bool {
        let sector = u64::from(self.sector_size);
        bytes.start <= bytes.end
            && bytes.end <= self.size
            && bytes.start.is_multiple_of(sector)
            && bytes.end.is_multiple_of(sector)
    }

    /// Which sectors of `block` the range of 512-byte `sectors` covers.
    pub fn mask_in(self, block: u64, sectors: &Range<u64>) -> u8 {
        let base = block * SECTORS_PER_BLOCK;
        let from = sectors.start.saturating_sub(base).min(SECTORS_PER_BLOCK) as u32;
        let to = sectors.end.saturating_sub(base).min(SECTORS_PER_BLOCK) as u32;
        if from >= to { 0 } else { ((0xFFu16 >> (8 - (to - from))) << from) as u8 }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn masks_follow_the_sectors() {
        let shape = Shape::new(4096 * 3 + 1024, 512).unwrap();
        assert_eq!(shape.blocks(), 4);
        assert_eq!(shape.full_mask(2), 0xFF);
        assert_eq!(shape.full_mask(3), 0b11);
        assert_eq!(shape.mask_in(1, &(8..16)), 0xFF);
        assert_eq!(shape.mask_in(1, &(9..11)), 0b110);
        assert_eq!(shape.mask_in(1, &(0..9)), 1);
        assert_eq!(shape.mask_in(1, &(15..99)), 0x80);
        assert_eq!(shape.mask_in(1, &(16..99)), 0);
        assert_eq!(shape.mask_in(1, &(0..8)), 0);
    }

    #[test]
    fn shapes_that_no_volume_has_are_refused() {
        assert!(Shape::new(4096, 1024).is_err());
        assert!(Shape::new(0, 512).is_err());
        assert!(Shape::new(4096 + 512, 4096).is_err());
        assert!(Shape::new(u64::MAX - 511, 512).is_err());
        assert_eq!(Shape::new(1 << 40, 4096).unwrap().pages(), 16645);
    }
}
