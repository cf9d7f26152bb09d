//! What a disk says about itself: replies to INQUIRY, READ CAPACITY, GET LBA STATUS, read with suspicion.

use crate::scsi::DIGEST_BLOCK;
use crate::wire::Fields;

/// T10 VENDOR IDENTIFICATION of disks that may have READ BLOCK DIGESTS.
pub(super) const OWN_VENDOR: &str = "DECANT";
/// Most designators of a disk that are looked at.
const MAX_DESIGNATORS: usize = 32;

/// A disk, as it was found at the start of a session.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Device {
    /// T10 VENDOR IDENTIFICATION.
    pub vendor: String,
    /// PRODUCT IDENTIFICATION.
    pub product: String,
    /// PRODUCT SERIAL NUMBER (VPD 80), if the disk has one.
    pub serial: Option<String>,
    /// Designators of the logical unit (VPD 83), each its type and bytes, sorted: T10, EUI-64, NAA, SCSI name and UUID.
    pub designators: Vec<Vec<u8>>,
    /// Logical blocks, at least 1.
    pub blocks: u64,
    /// Bytes of a logical block: 512 or 4096.
    pub block_bytes: u32,
    /// Most bytes of one READ, a multiple of `block_bytes`; `u32::MAX` rounded down to that where the disk sets no limit.
    pub max_transfer: u32,
    /// Whether blocks that are unmapped read as zeros, and GET LBA STATUS is worth asking.
    pub holes: bool,
    /// Whether READ BLOCK DIGESTS is there.
    pub digests: bool,
    /// Whether only commands of ten bytes are there: READ CAPACITY (16) was not known.
    pub short_commands: bool,
}

impl Device {
    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(self.block_bytes.into())
    }

    /// Whether `other` can be the same disk, found again: what tells disks apart, and what addresses mean, must not have
    /// changed. Firmware, and so what is offered, may.
    ///
    /// # Errors
    /// What differs.
    pub fn check_same(&self, other: &Self) -> Result<(), &'static str> {
        if self.bytes() != other.bytes() {
            return Err("size");
        }
        if self.block_bytes != other.block_bytes {
            return Err("block size");
        }
        if self.vendor != other.vendor || self.product != other.product {
            return Err("vendor or product");
        }
        if self.serial != other.serial {
            return Err("serial number");
        }
        if self.designators != other.designators {
            return Err("identification");
        }
        Ok(())
    }

    /// Standard INQUIRY data (SPC-4 6.4.2); what is wrong with the disk, if it cannot be one.
    pub(super) fn take_inquiry(&mut self, data: &[u8]) -> Result<(), &'static str> {
        if data.len() < 36 {
            return Err("INQUIRY data are cut short");
        }
        match data.u8_at(0) {
            0x00 => {}
            qualified if qualified >> 5 != 0 => return Err("there is nothing at this LUN"),
            _ => return Err("it is no disk"),
        }
        self.vendor = text(data.get(8..16));
        self.product = text(data.get(16..32));
        Ok(())
    }

    /// VPD 80, PRODUCT SERIAL NUMBER (SPC-4 7.8.18).
    pub(super) fn take_serial(&mut self, data: &[u8]) {
        self.serial = page(data, 0x80).map(|serial| text(Some(serial))).filter(|serial| !serial.is_empty());
    }

    /// VPD 83, device identification (SPC-4 7.8.6): designators of the logical unit that are meant to be lasting.
    pub(super) fn take_identification(&mut self, data: &[u8]) {
        let mut rest = page(data, 0x83).unwrap_or_default();
        self.designators.clear();
        while let Some((head, tail)) = rest.split_first_chunk::<4>() {
            let Some((body, tail)) = tail.split_at_checked(head.u8_at(3).into()) else { break };
            let (association, kind) = (head.u8_at(1) >> 4 & 3, head.u8_at(1) & 0x0f);
            if association == 0 && matches!(kind, 1 | 2 | 3 | 8 | 10) && self.designators.len() < MAX_DESIGNATORS {
                self.designators.push([&[kind], body].concat());
            }
            rest = tail;
        }
        self.designators.sort();
    }

    /// VPD B0, block limits (SBC-3 6.6.4): MAXIMUM TRANSFER LENGTH in blocks, 0 for none. To be called once the block size is
    /// known.
    pub(super) fn take_limits(&mut self, data: &[u8]) {
        let blocks = match page(data, 0xb0) {
            Some(body) if body.len() >= 8 => body.u32_at(4),
            _ => 0,
        };
        self.max_transfer = self.block_bytes.checked_mul(blocks).filter(|limit| *limit > 0).unwrap_or(self.most());
    }

    fn most(&self) -> u32 {
        u32::MAX.checked_div(self.block_bytes).unwrap_or_default().saturating_mul(self.block_bytes)
    }

    /// READ CAPACITY (16) (SBC-3 5.16).
    pub(super) fn take_capacity_16(&mut self, data: &[u8]) -> Result<(), &'static str> {
        if data.len() < 12 {
            return Err("READ CAPACITY data are cut short");
        }
        self.set_capacity(data.u64_at(0), data.u32_at(8))?;
        // LBPME and LBPRZ: blocks can be unmapped, and then read as zeros. Without the latter nobody knows what they hold.
        self.holes = data.u8_at(14) & 0xc0 == 0xc0;
        Ok(())
    }

    /// READ CAPACITY (10) (SBC-3 5.15).
    pub(super) fn take_capacity_10(&mut self, data: &[u8]) -> Result<(), &'static str> {
        if data.len() < 8 {
            return Err("READ CAPACITY data are cut short");
        }
        if data.u32_at(0) == u32::MAX {
            return Err("it is larger than its READ CAPACITY can say");
        }
        (self.holes, self.short_commands) = (false, true);
        self.set_capacity(data.u32_at(0).into(), data.u32_at(4))
    }

    fn set_capacity(&mut self, last: u64, block_bytes: u32) -> Result<(), &'static str> {
        if !matches!(block_bytes, 512 | 4096) {
            return Err("its logical blocks have neither 512 nor 4096 bytes");
        }
        let blocks = last.checked_add(1).ok_or("its size is absurd")?;
        let bytes = blocks.checked_mul(block_bytes.into()).ok_or("its size is absurd")?;
        i64::try_from(bytes).map_err(|_| "its size is absurd")?;
        (self.blocks, self.block_bytes) = (blocks, block_bytes);
        self.max_transfer = self.most();
        Ok(())
    }

    /// Bytes within the disk as LBA and blocks, if they are whole blocks of it.
    pub(super) fn blocks_of(&self, offset: u64, length: u64) -> Option<(u64, u32)> {
        let block = u64::from(self.block_bytes);
        let end = offset.checked_add(length).filter(|end| *end <= self.bytes())?;
        if length == 0 || !offset.is_multiple_of(block) || !end.is_multiple_of(block) {
            return None;
        }
        Some((offset.checked_div(block)?, u32::try_from(length.checked_div(block)?).ok()?))
    }

    /// Digests that a range has.
    pub(super) fn digests_of(&self, offset: u64, length: u32) -> Option<u32> {
        let granule = u64::from(DIGEST_BLOCK);
        let end = offset.checked_add(length.into())?;
        let whole = offset.is_multiple_of(granule) && (end.is_multiple_of(granule) || end == self.bytes());
        whole.then_some(length.div_ceil(DIGEST_BLOCK))
    }

    /// The answer to GET LBA STATUS (SBC-3 5.5) for `offset`: as far as it makes sense, which must begin there.
    pub(super) fn extents(&self, offset: u64, data: &[u8]) -> Vec<Extent> {
        let block = u64::from(self.block_bytes);
        let stated = data.u32_at(0) as usize;
        let body = data.get(8..).unwrap_or_default();
        let body = body.get(..stated.saturating_sub(4)).unwrap_or(body);
        let mut extents: Vec<Extent> = Vec::new();
        let mut next = offset;
        for descriptor in body.chunks_exact(16) {
            let start = descriptor.u64_at(0).checked_mul(block);
            let length = u64::from(descriptor.u32_at(8)).saturating_mul(block);
            let end = start.and_then(|start| start.checked_add(length)).unwrap_or_default().min(self.bytes());
            if start != Some(next) || end <= next {
                break;
            }
            // PROVISIONING STATUS: 1 deallocated, 2 anchored; both read as zeros, since LBPRZ is set.
            let hole = matches!(descriptor.u8_at(12) & 0x0f, 1 | 2);
            extents.push(Extent { offset: next, length: end.saturating_sub(next), hole });
            next = end;
        }
        extents
    }
}

/// A run of blocks that are mapped, or not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Extent {
    /// From here, bytes.
    pub offset: u64,
    /// So many bytes, at least one block.
    pub length: u64,
    /// Nothing is stored, and it reads as zeros.
    pub hole: bool,
}

/// The body of a vital product data page, if it is that page.
pub(super) fn page(data: &[u8], code: u8) -> Option<&[u8]> {
    let body = data.get(4..)?;
    (data.u8_at(1) == code).then(|| body.get(..data.u16_at(2).into()).unwrap_or(body))
}

/// Text as SCSI has it: ASCII, padded with blanks; at most what fits a log line.
fn text(bytes: Option<&[u8]>) -> String {
    let visible = |byte: &u8| if byte.is_ascii_graphic() || *byte == b' ' { char::from(*byte) } else { '_' };
    let text: String = bytes.unwrap_or_default().iter().take(255).map(visible).collect();
    text.trim().to_owned()
}
