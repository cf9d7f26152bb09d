//! Commands about the medium (SBC-3 5): ranges checked, turned into bytes.

use super::codes::*;
use super::inquiry::{MAX_SAME_BYTES, MAX_UNMAP_BLOCKS, MAX_UNMAP_DESCRIPTORS};
use super::{
    Compare, Context, DIGEST_BLOCK, Disk, Information, MAX_DIGESTS, Parameter, Plan, Sense, SenseKey, append, asc,
};
use crate::wire::{Fields, SetFields};

/// The LBA and the number of blocks of a command, by the length of its CDB.
fn range(cdb: &[u8; 16]) -> (u64, u64) {
    match cdb.u8_at(0) >> 5 {
        0 => {
            let blocks = u64::from(cdb.u8_at(4));
            (u64::from(cdb.u24_at(1) & 0x001f_ffff), if blocks == 0 { 256 } else { blocks })
        }
        1 | 2 => (cdb.u32_at(2).into(), cdb.u16_at(7).into()),
        4 => (cdb.u64_at(2), cdb.u32_at(10).into()),
        _ => (cdb.u32_at(2).into(), cdb.u32_at(6).into()),
    }
}

/// The range in bytes; within the disk.
fn extent(disk: &Disk, lba: u64, blocks: u64) -> Result<(u64, u64), Sense> {
    let end = lba.checked_add(blocks).filter(|end| *end <= disk.blocks && lba < disk.blocks);
    if end.is_none() {
        return Err(Sense::out_of_range(lba.max(disk.blocks)));
    }
    let bytes = u64::from(disk.block_bytes);
    Ok((lba.saturating_mul(bytes), blocks.saturating_mul(bytes)))
}

/// The same for a transfer, whose length is limited.
fn transfer(disk: &Disk, cdb: &[u8; 16]) -> Result<(u64, u32), Sense> {
    let (lba, blocks) = range(cdb);
    let (offset, length) = extent(disk, lba, blocks)?;
    let length = u32::try_from(length).ok().filter(|length| *length <= disk.max_transfer);
    Ok((offset, length.ok_or(Sense::invalid_field(length_field(cdb)))?))
}

fn length_field(cdb: &[u8; 16]) -> u16 {
    match cdb.u8_at(0) >> 5 {
        0 => 4,
        1 | 2 => 7,
        4 => 10,
        _ => 6,
    }
}

fn check_writable(context: &Context<'_>) -> Result<(), Sense> {
    if context.disk.read_only || context.mode.write_protect {
        return Err(Sense::new(SenseKey::DataProtect, asc::WRITE_PROTECTED));
    }
    Ok(())
}

/// What a command about the medium comes to.
pub(super) fn plan(context: &Context<'_>, cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    let disk = context.disk;
    let (flags, opcode) = (cdb.u8_at(1), cdb.u8_at(0));
    match opcode {
        READ_CAPACITY_10 => read_capacity_10(disk, cdb, reply),
        SERVICE_ACTION_IN_16 if service_action(cdb) == READ_CAPACITY_16 => read_capacity_16(disk, cdb, reply),
        SERVICE_ACTION_IN_16 => get_lba_status(disk, cdb),
        READ_6 | READ_10 | READ_12 | READ_16 => {
            let (offset, length) = transfer(disk, cdb)?;
            let fua = opcode != READ_6 && flags & 0x08 != 0;
            Ok(if length == 0 { Plan::Done } else { Plan::Read { offset, length, fua } })
        }
        WRITE_6 | WRITE_10 | WRITE_12 | WRITE_16 => {
            check_writable(context)?;
            let (offset, length) = transfer(disk, cdb)?;
            let fua = opcode != WRITE_6 && flags & 0x08 != 0;
            Ok(if length == 0 { Plan::Done } else { Plan::Write { offset, length, fua, verify: None } })
        }
        WRITE_VERIFY_10 | WRITE_VERIFY_12 | WRITE_VERIFY_16 => {
            check_writable(context)?;
            let verify = match flags >> 1 & 3 {
                0 => Compare::Nothing,
                1 => Compare::All,
                _ => return Err(Sense::invalid_field(1)),
            };
            let (offset, length) = transfer(disk, cdb)?;
            Ok(if length == 0 { Plan::Done } else { Plan::Write { offset, length, fua: true, verify: Some(verify) } })
        }
        VERIFY_10 | VERIFY_12 | VERIFY_16 => {
            let compare = match flags >> 1 & 3 {
                0 => Compare::Nothing,
                1 => Compare::All,
                3 => Compare::OneBlock,
                _ => return Err(Sense::invalid_field(1)),
            };
            let (offset, length) = transfer(disk, cdb)?;
            Ok(if length == 0 { Plan::Done } else { Plan::Verify { offset, length, compare } })
        }
        SYNCHRONIZE_CACHE_10 | SYNCHRONIZE_CACHE_16 => {
            let (lba, blocks) = range(cdb);
            extent(disk, lba, blocks)?;
            Ok(Plan::Flush)
        }
        WRITE_SAME_10 | WRITE_SAME_16 => write_same(context, cdb),
        READ_BLOCK_DIGESTS => read_block_digests(disk, cdb),
        UNMAP => {
            check_writable(context)?;
            let length = u32::from(cdb.u16_at(7));
            if (1..8).contains(&length) {
                return Err(Sense::illegal(asc::PARAMETER_LIST_LENGTH));
            }
            Ok(if length == 0 { Plan::Done } else { Plan::Parameter { length, kind: Parameter::Unmap } })
        }
        _ => Err(Sense::illegal(asc::INVALID_OPERATION_CODE)),
    }
}

fn write_same(context: &Context<'_>, cdb: &[u8; 16]) -> Result<Plan, Sense> {
    let disk = context.disk;
    let flags = cdb.u8_at(1);
    let unmap = flags & 0x08 != 0;
    if unmap && !disk.thin {
        return Err(Sense::invalid_field(1));
    }
    check_writable(context)?;
    let (lba, blocks) = range(cdb);
    // None is all to the end (WSNZ 0).
    let blocks = if blocks == 0 { disk.blocks.saturating_sub(lba) } else { blocks };
    let (offset, length) = extent(disk, lba, blocks)?;
    if length > MAX_SAME_BYTES {
        return Err(Sense::invalid_field(length_field(cdb)));
    }
    let zeros = cdb.u8_at(0) == WRITE_SAME_16 && flags & 0x01 != 0;
    Ok(Plan::Same { offset, length, unmap, zeros })
}

/// READ CAPACITY (10) (SBC-3 5.15).
fn read_capacity_10(disk: &Disk, cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    if cdb.u8_at(8) & 1 == 0 && cdb.u32_at(2) != 0 {
        return Err(Sense::invalid_field(2));
    }
    let last = u32::try_from(disk.blocks.saturating_sub(1)).unwrap_or(u32::MAX);
    let mut data = [0; 8];
    data.set_u32(0, last);
    data.set_u32(4, disk.block_bytes);
    append(reply, &data, u32::MAX);
    Ok(Plan::Done)
}

/// READ CAPACITY (16) (SBC-3 5.16).
fn read_capacity_16(disk: &Disk, cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    if cdb.u8_at(14) & 1 == 0 && cdb.u64_at(2) != 0 {
        return Err(Sense::invalid_field(2));
    }
    let mut data = [0; 32];
    data.set_u64(0, disk.blocks.saturating_sub(1));
    data.set_u32(8, disk.block_bytes);
    data.set_u8(13, disk.physical_exponent & 0x0f);
    // LBPME and LBPRZ.
    data.set_u8(14, if disk.thin { 0xc0 } else { 0 });
    append(reply, &data, cdb.u32_at(10));
    Ok(Plan::Done)
}

/// Most descriptors in an answer to GET LBA STATUS: 4 KiB of them.
const MAX_STATUS_DESCRIPTORS: u32 = 256;

/// GET LBA STATUS (SBC-3 5.5).
fn get_lba_status(disk: &Disk, cdb: &[u8; 16]) -> Result<Plan, Sense> {
    let (offset, _) = extent(disk, cdb.u64_at(2), 1)?;
    let allocation = cdb.u32_at(10);
    if allocation == 0 {
        return Ok(Plan::Done);
    }
    let descriptors = (allocation.saturating_sub(8) / 16).clamp(1, MAX_STATUS_DESCRIPTORS);
    Ok(Plan::LbaStatus { offset, descriptors, allocation })
}

/// The answer to GET LBA STATUS. `extents` follow each other from `offset` bytes on, each its length in bytes and whether it
/// is mapped; lengths are rounded so that no block that is partly mapped is called unmapped.
pub fn lba_status(disk: &Disk, offset: u64, extents: &[(u64, bool)], allocation: u32, reply: &mut Vec<u8>) {
    let block = u64::from(disk.block_bytes).max(1);
    let mut data = vec![0; 8];
    let mut runs: Vec<(u64, u64, bool)> = Vec::new();
    let (mut position, mut lba) = (offset, offset.checked_div(block).unwrap_or_default());
    for (length, mapped) in extents {
        position = position.saturating_add(*length);
        // A mapped run ends with the block it ends in, an unmapped one before it.
        let end = if *mapped { position.div_ceil(block) } else { position.checked_div(block).unwrap_or_default() };
        let end = end.min(disk.blocks);
        let Some(blocks) = end.checked_sub(lba).filter(|blocks| *blocks > 0) else { continue };
        match runs.last_mut() {
            Some(last) if last.2 == *mapped => last.1 = last.1.saturating_add(blocks),
            _ => runs.push((lba, blocks, *mapped)),
        }
        lba = end;
    }
    if runs.is_empty() {
        // The standard wants one descriptor at least; mapped is what claims nothing.
        runs.push((lba, 1, true));
    }
    for (lba, blocks, mapped) in runs.iter().take(MAX_STATUS_DESCRIPTORS as usize) {
        let mut descriptor = [0; 16];
        descriptor.set_u64(0, *lba);
        descriptor.set_u32(8, u32::try_from(*blocks).unwrap_or(u32::MAX));
        descriptor.set_u8(12, u8::from(!mapped));
        data.extend_from_slice(&descriptor);
    }
    let length = u32::try_from(data.len().saturating_sub(4)).unwrap_or_default();
    data.set_u32(0, length);
    append(reply, &data, allocation);
}

/// READ BLOCK DIGESTS: LBA in bytes 2 to 9 and logical blocks in bytes 10 to 13, whole digest blocks but at the end.
fn read_block_digests(disk: &Disk, cdb: &[u8; 16]) -> Result<Plan, Sense> {
    let (offset, length) = extent(disk, cdb.u64_at(2), cdb.u32_at(10).into())?;
    let granule = u64::from(DIGEST_BLOCK);
    if !offset.is_multiple_of(granule) {
        return Err(Sense::invalid_field(2));
    }
    let whole = length.is_multiple_of(granule) || offset.saturating_add(length) == disk.bytes();
    let length = u32::try_from(length).ok().filter(|length| whole && length.div_ceil(DIGEST_BLOCK) <= MAX_DIGESTS);
    let length = length.ok_or(Sense::invalid_field(10))?;
    Ok(if length == 0 { Plan::Done } else { Plan::Digests { offset, length } })
}

/// Ranges of an UNMAP in bytes: offset and length.
pub type Ranges = Vec<(u64, u64)>;

/// The ranges of an UNMAP's parameter list (SBC-3 5.28), all checked, so that nothing is done if one is wrong.
///
/// # Errors
/// A list that is cut short or too long, or a range past the end.
pub fn unmap_ranges(disk: &Disk, list: &[u8]) -> Result<Ranges, Sense> {
    if list.len() < 8 {
        return Err(Sense::illegal(asc::PARAMETER_LIST_LENGTH));
    }
    let descriptors = usize::from(list.u16_at(2));
    let Some(body) = list.get(8..).and_then(|rest| rest.get(..descriptors)) else {
        return Err(Sense::illegal(asc::PARAMETER_LIST_LENGTH));
    };
    if descriptors / 16 > MAX_UNMAP_DESCRIPTORS as usize {
        return Err(Sense::invalid_parameter(2));
    }
    let mut ranges = Ranges::new();
    let mut total = 0u64;
    for descriptor in body.chunks_exact(16) {
        let (lba, blocks) = (descriptor.u64_at(0), u64::from(descriptor.u32_at(8)));
        total = total.saturating_add(blocks);
        if total > MAX_UNMAP_BLOCKS.into() {
            return Err(Sense::invalid_parameter(8));
        }
        // Nothing at the very end is within the disk, unlike with the commands that have an LBA (SBC-3 5.28.2).
        if blocks > 0 || lba != disk.blocks {
            ranges.push(extent(disk, lba, blocks)?);
        }
    }
    ranges.retain(|(_, length)| *length > 0);
    Ok(ranges)
}

impl Sense {
    /// MISCOMPARE, at this byte of the compared range.
    pub fn miscompare(at: u64) -> Self {
        Self { information: Information::Value(at), ..Self::new(SenseKey::Miscompare, asc::MISCOMPARE) }
    }
}
