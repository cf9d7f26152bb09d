//! INQUIRY and its vital product data (SPC-4 6.4, 7.8; SBC-3 6.6), REPORT LUNS.

use super::{Context, Disk, MAX_SERIAL, Plan, Sense, append};
use crate::wire::{Fields, SetFields};

/// Most blocks of one UNMAP, and most descriptors in its list: the list then is 4 KiB.
pub(super) const MAX_UNMAP_BLOCKS: u32 = 1024 * 1024;
pub(super) const MAX_UNMAP_DESCRIPTORS: u32 = 256;
/// Most bytes of one WRITE SAME: one block sent keeps the medium busy for no longer than a few of the largest writes, and others
/// that want it wait no longer than that.
pub(super) const MAX_SAME_BYTES: u64 = 32 * 1024 * 1024;

/// INQUIRY.
pub(super) fn inquiry(context: &Context<'_>, cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    let page = cdb.u8_at(2);
    let allocation = u32::from(cdb.u16_at(3));
    // PERIPHERAL QUALIFIER 3, type 1Fh: nothing can be here. Other LUNs have no pages.
    let device = if context.is_lun_0 { 0x00 } else { 0x7f };
    if cdb.u8_at(1) & 1 == 0 {
        if page != 0 {
            return Err(Sense::invalid_field(2));
        }
        append(reply, &standard(context.disk, device), allocation);
        return Ok(Plan::Done);
    }
    let disk = context.disk;
    let body = match page {
        0x00 => vec![0x00, 0x80, 0x83, 0xb0, 0xb1, 0xb2],
        0x80 if context.is_lun_0 => serial(disk).as_bytes().to_vec(),
        0x83 if context.is_lun_0 => identification(context),
        0xb0 if context.is_lun_0 => block_limits(disk),
        // Block device characteristics: not rotating, form factor not said.
        0xb1 if context.is_lun_0 => [&[0, 1][..], &[0; 58]].concat(),
        0xb2 if context.is_lun_0 => provisioning(disk),
        _ => return Err(Sense::invalid_field(2)),
    };
    let mut bytes = vec![device, page];
    bytes.extend_from_slice(&u16::try_from(body.len()).unwrap_or_default().to_be_bytes());
    bytes.extend_from_slice(&body);
    append(reply, &bytes, allocation);
    Ok(Plan::Done)
}

fn text<const N: usize>(text: &str) -> [u8; N] {
    let mut field = [b' '; N];
    for (to, from) in field.iter_mut().zip(text.bytes()) {
        *to = if from.is_ascii_graphic() || from == b' ' { from } else { b'_' };
    }
    field
}

fn standard(disk: &Disk, device: u8) -> [u8; 96] {
    let mut data = [0; 96];
    data.set_u8(0, device);
    // VERSION SPC-4; HISUP and RESPONSE DATA FORMAT 2; ADDITIONAL LENGTH; CMDQUE.
    data.set(2, &[0x06, 0x12, 91]);
    data.set_u8(7, 0x02);
    data.set(8, &text::<8>(&disk.vendor));
    data.set(16, &text::<16>(&disk.product));
    data.set(32, &text::<4>(&disk.revision));
    // VERSION DESCRIPTORs: SAM-5, SPC-4, SBC-3, iSCSI, none with a revision.
    for (at, version) in [(58, 0x00a0), (60, 0x0460), (62, 0x04c0), (64, 0x0960)] {
        data.set_u16(at, version);
    }
    data
}

/// The serial number, cut to what it may have.
fn serial(disk: &Disk) -> &str {
    disk.serial.get(..disk.serial.len().min(MAX_SERIAL)).unwrap_or_default()
}

/// VPD 83: the disk by vendor and serial and as a locally assigned NAA name; the target port by its number and its name.
fn identification(context: &Context<'_>) -> Vec<u8> {
    let disk = context.disk;
    let mut out = Vec::new();
    let mut designator = |head: [u8; 3], body: &[u8]| {
        out.extend_from_slice(&head);
        out.push(u8::try_from(body.len()).unwrap_or_default());
        out.extend_from_slice(body);
    };
    let id = [&text::<8>(&disk.vendor)[..], serial(disk).as_bytes()].concat();
    designator([0x02, 0x01, 0], &id);
    designator([0x01, 0x03, 0], &naa(&id));
    // PROTOCOL IDENTIFIER 5h, iSCSI; PIV, about the target port; relative port and target port group 1.
    designator([0x51, 0x94, 0], &[0, 0, 0, 1]);
    designator([0x51, 0x95, 0], &[0, 0, 0, 1]);
    // The port's name is the target's with its portal group (RFC 7143 4.4.1).
    let mut name = format!("{},t,0x{:04x}", context.target_name, context.portal_group).into_bytes();
    // SCSI name string: ended by a zero byte, padded to four.
    name.push(0);
    name.resize(name.len().next_multiple_of(4), 0);
    designator([0x53, 0x98, 0], &name);
    out
}

/// NAA 3, locally assigned: 60 bits that follow from the disk's name, so that it keeps them wherever it is served.
fn naa(id: &[u8]) -> [u8; 8] {
    use md5::Digest as _;
    let hash: [u8; 16] = md5::Md5::digest(id).into();
    let mut name: [u8; 8] = hash.array_at(0);
    let first = name.u8_at(0);
    name.set_u8(0, 0x30 | (first & 0x0f));
    name
}

/// VPD B0 (SBC-3 6.6.4).
fn block_limits(disk: &Disk) -> Vec<u8> {
    let mut page = [0; 60];
    let physical = 1u32.checked_shl(disk.physical_exponent.into()).unwrap_or(1);
    // OPTIMAL TRANSFER LENGTH GRANULARITY, MAXIMUM and OPTIMAL TRANSFER LENGTH.
    page.set_u16(2, u16::try_from(physical).unwrap_or(1));
    page.set_u32(4, disk.blocks32(disk.max_transfer));
    page.set_u32(8, disk.blocks32(disk.max_transfer.min(1024 * 1024)));
    if disk.thin {
        page.set_u32(16, MAX_UNMAP_BLOCKS);
        page.set_u32(20, MAX_UNMAP_DESCRIPTORS);
        // OPTIMAL UNMAP GRANULARITY; its ALIGNMENT is 0 and valid.
        page.set_u32(24, physical);
        page.set_u32(28, 0x8000_0000);
    }
    page.set_u64(32, MAX_SAME_BYTES.checked_div(disk.block_bytes.into()).unwrap_or_default());
    page.to_vec()
}

/// VPD B2 (SBC-3 6.6.6): LBPU, LBPWS, LBPWS10; unmapped blocks read as zeros; thin.
fn provisioning(disk: &Disk) -> Vec<u8> {
    if disk.thin { vec![0, 0xe4, 0x02, 0] } else { vec![0, 0, 0, 0] }
}

/// REPORT LUNS (SPC-4 6.33): LUN 0, and no well-known ones.
pub(super) fn report_luns(cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    let allocation = cdb.u32_at(6);
    let luns = match cdb.u8_at(2) {
        0x00 | 0x02 => 1usize,
        0x01 | 0x10 | 0x11 | 0x12 => 0,
        _ => return Err(Sense::invalid_field(2)),
    };
    if allocation < 16 {
        return Err(Sense::invalid_field(6));
    }
    let mut data = [0; 16];
    data.set_u32(0, if luns == 1 { 8 } else { 0 });
    append(reply, data.get(..if luns == 1 { 16 } else { 8 }).unwrap_or_default(), allocation);
    Ok(Plan::Done)
}
