//! The commands that are supported, with the bits of each that mean something: one table for refusing what is reserved and
//! for REPORT SUPPORTED OPERATION CODES.

use super::{Disk, Plan, Sense, append, asc};
use crate::wire::Fields;

pub(super) const TEST_UNIT_READY: u8 = 0x00;
pub(super) const REQUEST_SENSE: u8 = 0x03;
pub(super) const READ_6: u8 = 0x08;
pub(super) const WRITE_6: u8 = 0x0a;
pub(super) const INQUIRY: u8 = 0x12;
pub(super) const MODE_SELECT_6: u8 = 0x15;
pub(super) const RESERVE_6: u8 = 0x16;
pub(super) const RELEASE_6: u8 = 0x17;
pub(super) const MODE_SENSE_6: u8 = 0x1a;
pub(super) const START_STOP_UNIT: u8 = 0x1b;
pub(super) const PREVENT_ALLOW: u8 = 0x1e;
pub(super) const READ_CAPACITY_10: u8 = 0x25;
pub(super) const READ_10: u8 = 0x28;
pub(super) const WRITE_10: u8 = 0x2a;
pub(super) const WRITE_VERIFY_10: u8 = 0x2e;
pub(super) const VERIFY_10: u8 = 0x2f;
pub(super) const SYNCHRONIZE_CACHE_10: u8 = 0x35;
pub(super) const WRITE_SAME_10: u8 = 0x41;
pub(super) const UNMAP: u8 = 0x42;
pub(super) const MODE_SELECT_10: u8 = 0x55;
pub(super) const MODE_SENSE_10: u8 = 0x5a;
pub(super) const READ_16: u8 = 0x88;
pub(super) const WRITE_16: u8 = 0x8a;
pub(super) const WRITE_VERIFY_16: u8 = 0x8e;
pub(super) const VERIFY_16: u8 = 0x8f;
pub(super) const SYNCHRONIZE_CACHE_16: u8 = 0x91;
pub(super) const WRITE_SAME_16: u8 = 0x93;
pub(super) const SERVICE_ACTION_IN_16: u8 = 0x9e;
pub(super) const REPORT_LUNS: u8 = 0xa0;
pub(super) const MAINTENANCE_IN: u8 = 0xa3;
pub(super) const READ_12: u8 = 0xa8;
pub(super) const WRITE_12: u8 = 0xaa;
pub(super) const WRITE_VERIFY_12: u8 = 0xae;
pub(super) const VERIFY_12: u8 = 0xaf;
/// READ BLOCK DIGESTS, of this vendor's own (SPC-4 4.2.5.1: C0h to FFh are the vendor's); docs/iscsi.md has its format.
pub(crate) const READ_BLOCK_DIGESTS: u8 = 0xd5;
/// Opcodes from here on are the vendor's.
const FIRST_VENDOR: u8 = 0xc0;

/// Service action of SERVICE ACTION IN (16): READ CAPACITY (16).
pub(super) const READ_CAPACITY_16: u8 = 0x10;
/// Service action of SERVICE ACTION IN (16): GET LBA STATUS.
pub(super) const GET_LBA_STATUS: u8 = 0x12;
/// Service action of MAINTENANCE IN: REPORT SUPPORTED OPERATION CODES.
const REPORT_CODES: u8 = 0x0c;

/// One supported command.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Code {
    pub(super) opcode: u8,
    service_action: Option<u8>,
    /// CDB USAGE DATA (SPC-4 6.35.3): bits that are looked at. The opcode itself stands in the first byte.
    usage: &'static [u8],
    needs: Needs,
}

/// What a disk must offer for a command to be supported.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Needs {
    Nothing,
    /// Blocks can be unmapped.
    Thin,
    /// Digests of blocks are kept.
    Digests,
}

const fn code(opcode: u8, usage: &'static [u8]) -> Code {
    Code { opcode, service_action: None, usage, needs: Needs::Nothing }
}

const fn action(opcode: u8, service_action: u8, usage: &'static [u8]) -> Code {
    Code { opcode, service_action: Some(service_action), usage, needs: Needs::Nothing }
}

const FF: u8 = 0xff;

/// What is not in here is refused: protection information, anchors, and a control byte that is not zero (NACA). The group
/// number and the obsolete FUA_NV and SYNC_NV are taken and mean nothing.
const CODES: &[Code] = &[
    code(TEST_UNIT_READY, &[0x00, 0, 0, 0, 0, 0]),
    code(REQUEST_SENSE, &[0x03, 0x01, 0, 0, FF, 0]),
    code(READ_6, &[0x08, 0x1f, FF, FF, FF, 0]),
    code(WRITE_6, &[0x0a, 0x1f, FF, FF, FF, 0]),
    code(INQUIRY, &[0x12, 0x01, FF, FF, FF, 0]),
    code(MODE_SELECT_6, &[0x15, 0x11, 0, 0, FF, 0]),
    code(RESERVE_6, &[0x16, 0, 0, 0, 0, 0]),
    code(RELEASE_6, &[0x17, 0, 0, 0, 0, 0]),
    code(MODE_SENSE_6, &[0x1a, 0x08, FF, FF, FF, 0]),
    code(START_STOP_UNIT, &[0x1b, 0x01, 0, 0x0f, 0xf7, 0]),
    code(PREVENT_ALLOW, &[0x1e, 0, 0, 0, 0x03, 0]),
    code(READ_CAPACITY_10, &[0x25, 0, FF, FF, FF, FF, 0, 0, 0x01, 0]),
    code(READ_10, &[0x28, 0x1a, FF, FF, FF, FF, 0x1f, FF, FF, 0]),
    code(WRITE_10, &[0x2a, 0x1a, FF, FF, FF, FF, 0x1f, FF, FF, 0]),
    code(WRITE_VERIFY_10, &[0x2e, 0x16, FF, FF, FF, FF, 0x1f, FF, FF, 0]),
    code(VERIFY_10, &[0x2f, 0x16, FF, FF, FF, FF, 0x1f, FF, FF, 0]),
    code(SYNCHRONIZE_CACHE_10, &[0x35, 0x06, FF, FF, FF, FF, 0x1f, FF, FF, 0]),
    Code { needs: Needs::Thin, ..code(UNMAP, &[0x42, 0x00, 0, 0, 0, 0, 0x1f, FF, FF, 0]) },
    code(WRITE_SAME_10, &[0x41, 0x08, FF, FF, FF, FF, 0x1f, FF, FF, 0]),
    code(MODE_SELECT_10, &[0x55, 0x11, 0, 0, 0, 0, 0, FF, FF, 0]),
    code(MODE_SENSE_10, &[0x5a, 0x18, FF, FF, 0, 0, 0, FF, FF, 0]),
    code(READ_16, &[0x88, 0x1a, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    code(WRITE_16, &[0x8a, 0x1a, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    code(WRITE_VERIFY_16, &[0x8e, 0x16, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    code(VERIFY_16, &[0x8f, 0x16, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    code(SYNCHRONIZE_CACHE_16, &[0x91, 0x06, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    code(WRITE_SAME_16, &[0x93, 0x09, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    action(
        SERVICE_ACTION_IN_16,
        READ_CAPACITY_16,
        &[0x9e, 0x10, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0x01, 0],
    ),
    Code {
        needs: Needs::Thin,
        ..action(
            SERVICE_ACTION_IN_16,
            GET_LBA_STATUS,
            &[0x9e, 0x12, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0],
        )
    },
    code(REPORT_LUNS, &[0xa0, 0, FF, 0, 0, 0, FF, FF, FF, FF, 0, 0]),
    action(MAINTENANCE_IN, REPORT_CODES, &[0xa3, 0x0c, 0x87, FF, FF, FF, FF, FF, FF, FF, 0, 0]),
    code(READ_12, &[0xa8, 0x1a, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    code(WRITE_12, &[0xaa, 0x1a, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    code(WRITE_VERIFY_12, &[0xae, 0x16, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    code(VERIFY_12, &[0xaf, 0x16, FF, FF, FF, FF, FF, FF, FF, FF, 0x1f, 0]),
    Code {
        needs: Needs::Digests,
        ..code(READ_BLOCK_DIGESTS, &[0xd5, 0, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, FF, 0, 0])
    },
];

/// The service action of a command whose opcode has them.
pub(super) fn service_action(cdb: &[u8; 16]) -> u8 {
    cdb.u8_at(1) & 0x1f
}

pub(super) fn find(opcode: u8, service_action: u8) -> Option<&'static Code> {
    CODES.iter().find(|code| code.opcode == opcode && code.service_action.is_none_or(|own| own == service_action))
}

/// Whether some command has this opcode.
pub(super) fn is_known(opcode: u8) -> bool {
    CODES.iter().any(|code| code.opcode == opcode)
}

impl Code {
    fn is_supported(&self, disk: &Disk) -> bool {
        match self.needs {
            Needs::Nothing => true,
            Needs::Thin => disk.thin,
            Needs::Digests => disk.digests,
        }
    }

    /// Refuses bits that are reserved, and the command as a whole where it is not supported.
    pub(super) fn check(&self, cdb: &[u8; 16], disk: &Disk) -> Result<(), Sense> {
        if !self.is_supported(disk) {
            return Err(if self.service_action.is_some() {
                Sense::invalid_field(1)
            } else {
                Sense::illegal(asc::INVALID_OPERATION_CODE)
            });
        }
        for (at, (byte, usage)) in cdb.iter().zip(self.usage).enumerate().skip(1) {
            let service_action = if at == 1 && self.service_action.is_some() { 0x1f } else { 0 };
            if byte & !(usage | service_action) != 0 {
                return Err(Sense::invalid_field(u16::try_from(at).unwrap_or_default()));
            }
        }
        Ok(())
    }

    fn timeouts(rctd: bool, out: &mut Vec<u8>) {
        if rctd {
            // Descriptor length, and times that are not indicated (SPC-4 6.35.4).
            out.extend_from_slice(&[0, 0x0a, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        }
    }

    fn length(&self) -> u16 {
        u16::try_from(self.usage.len()).unwrap_or_default()
    }
}

/// REPORT SUPPORTED OPERATION CODES (SPC-4 6.35).
pub(super) fn report(disk: &Disk, cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    let rctd = cdb.u8_at(2) & 0x80 != 0;
    let (opcode, service_action) = (cdb.u8_at(3), cdb.u16_at(4));
    let allocation = cdb.u32_at(6);
    let mut out = Vec::new();
    let own = |code: &&Code| code.opcode == opcode && code.is_supported(disk);
    let same_action = |code: &&Code| code.service_action.map(u16::from) == Some(service_action);
    match cdb.u8_at(2) & 7 {
        0 => all(disk, rctd, &mut out),
        1 => {
            if CODES.iter().filter(own).any(|code| code.service_action.is_some()) {
                return Err(Sense::invalid_field(2));
            }
            one(CODES.iter().find(own), rctd, &mut out);
        }
        2 => {
            if CODES.iter().filter(own).any(|code| code.service_action.is_none()) {
                return Err(Sense::invalid_field(2));
            }
            one(CODES.iter().filter(own).find(same_action), rctd, &mut out);
        }
        3 => {
            let found = CODES.iter().filter(own).find(|code| match code.service_action {
                Some(action) => u16::from(action) == service_action,
                None => service_action == 0,
            });
            one(found, rctd, &mut out);
        }
        _ => return Err(Sense::invalid_field(2)),
    }
    append(reply, &out, allocation);
    Ok(Plan::Done)
}

fn all(disk: &Disk, rctd: bool, out: &mut Vec<u8>) {
    out.extend_from_slice(&[0; 4]);
    for code in CODES.iter().filter(|code| code.is_supported(disk)) {
        let [high, low] = u16::from(code.service_action.unwrap_or_default()).to_be_bytes();
        let flags = u8::from(code.service_action.is_some()) | if rctd { 2 } else { 0 };
        let [length_high, length_low] = code.length().to_be_bytes();
        out.extend_from_slice(&[code.opcode, 0, high, low, 0, flags, length_high, length_low]);
        Code::timeouts(rctd, out);
    }
    let length = u32::try_from(out.len().saturating_sub(4)).unwrap_or_default();
    crate::wire::SetFields::set_u32(out.as_mut_slice(), 0, length);
}

fn one(found: Option<&Code>, rctd: bool, out: &mut Vec<u8>) {
    let Some(code) = found else {
        // SUPPORT 1: not supported.
        out.extend_from_slice(&[0, 1, 0, 0]);
        return;
    };
    let [high, low] = code.length().to_be_bytes();
    // SUPPORT 3: supported as the standard has it; 5: in a way of the vendor's.
    let support = if code.opcode >= FIRST_VENDOR { 5 } else { 3 };
    out.extend_from_slice(&[0, support | if rctd { 0x80 } else { 0 }, high, low]);
    out.extend_from_slice(code.usage);
    Code::timeouts(rctd, out);
}
