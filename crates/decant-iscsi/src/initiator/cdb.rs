//! Commands that an initiator sends (SPC-4, SBC-3).

use crate::scsi::READ_BLOCK_DIGESTS;
use crate::wire::SetFields;

/// A command descriptor block, padded with zeros.
pub(super) type Cdb = [u8; 16];

/// Bytes of standard INQUIRY data and of most pages that are taken.
pub(super) const INQUIRY_BYTES: u16 = 252;
/// Bytes of device identification that are taken: it may list many ports.
pub(super) const IDENTIFICATION_BYTES: u16 = 4096;
/// Bytes of READ CAPACITY (16) data.
pub(super) const CAPACITY_16_BYTES: u32 = 32;
/// Bytes of READ CAPACITY (10) data.
pub(super) const CAPACITY_10_BYTES: u32 = 8;
/// Bytes of an answer to GET LBA STATUS: 256 descriptors.
pub(super) const STATUS_BYTES: u32 = 8 + 16 * 256;
/// Bytes of an answer about one operation code that are looked at.
pub(super) const CODE_BYTES: u32 = 20;

/// TEST UNIT READY.
pub(super) fn test_unit_ready() -> Cdb {
    [0; 16]
}

/// INQUIRY: standard data, or a page.
pub(super) fn inquiry(page: Option<u8>, allocation: u16) -> Cdb {
    let mut cdb = [0; 16];
    cdb.set_u8(0, 0x12);
    if let Some(page) = page {
        cdb.set(1, &[1, page]);
    }
    cdb.set_u16(3, allocation);
    cdb
}

/// READ CAPACITY (10).
pub(super) fn read_capacity_10() -> Cdb {
    let mut cdb = [0; 16];
    cdb.set_u8(0, 0x25);
    cdb
}

/// READ CAPACITY (16).
pub(super) fn read_capacity_16() -> Cdb {
    let mut cdb = [0; 16];
    cdb.set(0, &[0x9e, 0x10]);
    cdb.set_u32(10, CAPACITY_16_BYTES);
    cdb
}

/// GET LBA STATUS.
pub(super) fn get_lba_status(lba: u64) -> Cdb {
    let mut cdb = [0; 16];
    cdb.set(0, &[0x9e, 0x12]);
    cdb.set_u64(2, lba);
    cdb.set_u32(10, STATUS_BYTES);
    cdb
}

/// REPORT SUPPORTED OPERATION CODES about READ BLOCK DIGESTS.
pub(super) fn report_digests() -> Cdb {
    let mut cdb = [0; 16];
    cdb.set(0, &[0xa3, 0x0c, 0x01, READ_BLOCK_DIGESTS]);
    cdb.set_u32(6, CODE_BYTES);
    cdb
}

/// READ (16).
pub(super) fn read_16(lba: u64, blocks: u32) -> Cdb {
    ranged(0x88, lba, blocks)
}

/// READ (10), if it can say the range.
pub(super) fn read_10(lba: u64, blocks: u32) -> Option<Cdb> {
    let (lba, blocks) = (u32::try_from(lba).ok()?, u16::try_from(blocks).ok()?);
    let mut cdb = [0; 16];
    cdb.set_u8(0, 0x28);
    cdb.set_u32(2, lba);
    cdb.set_u16(7, blocks);
    Some(cdb)
}

/// READ BLOCK DIGESTS.
pub(super) fn read_block_digests(lba: u64, blocks: u32) -> Cdb {
    ranged(READ_BLOCK_DIGESTS, lba, blocks)
}

fn ranged(opcode: u8, lba: u64, blocks: u32) -> Cdb {
    let mut cdb = [0; 16];
    cdb.set_u8(0, opcode);
    cdb.set_u64(2, lba);
    cdb.set_u32(10, blocks);
    cdb
}
