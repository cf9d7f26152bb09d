//! MODE SENSE and MODE SELECT (SPC-4 6.11, 6.9, 7.5; SBC-3 6.5): the caching and the control page.

use super::{Context, Disk, Parameter, Plan, Sense, append, asc};
use crate::wire::{Fields, SetFields};

/// Mode parameters that an initiator can change. They hold until the disk is reset.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct ModeState {
    /// D_SENSE: sense data in descriptor format.
    pub descriptor_sense: bool,
    /// SWP: software write protection.
    pub write_protect: bool,
}

const CACHING: u8 = 0x08;
const CONTROL: u8 = 0x0a;
const ALL: u8 = 0x3f;

/// Which values of a page are asked for (PC).
#[derive(Clone, Copy, PartialEq, Eq)]
enum Control {
    Current,
    Changeable,
    Default,
}

/// Caching page: WCE, since writes go to a cache until FLUSH or FUA; nothing can be changed.
fn caching(control: Control) -> [u8; 20] {
    let mut page = [0; 20];
    page.set(0, &[CACHING, 0x12]);
    if control != Control::Changeable {
        page.set_u8(2, 0x04);
    }
    page
}

/// Control page: TST 1 (a task set for each session), unrestricted reordering, D_SENSE, SWP.
fn control_page(control: Control, mode: ModeState) -> [u8; 12] {
    let mut page = [0; 12];
    page.set(0, &[CONTROL, 0x0a]);
    let (descriptor, protect, fixed) = match control {
        Control::Current => (mode.descriptor_sense, mode.write_protect, true),
        Control::Changeable => (true, true, false),
        Control::Default => (false, false, true),
    };
    page.set_u8(2, if fixed { 0x20 } else { 0 } | if descriptor { 0x04 } else { 0 });
    page.set_u8(3, if fixed { 0x10 } else { 0 });
    page.set_u8(4, if protect { 0x08 } else { 0 });
    page
}

fn pages(page: u8, control: Control, mode: ModeState) -> Option<Vec<u8>> {
    match page {
        CACHING => Some(caching(control).to_vec()),
        CONTROL => Some(control_page(control, mode).to_vec()),
        ALL => Some([&caching(control)[..], &control_page(control, mode)].concat()),
        _ => None,
    }
}

fn short_descriptor(disk: &Disk) -> [u8; 8] {
    let mut descriptor = [0; 8];
    descriptor.set_u32(0, u32::try_from(disk.blocks).unwrap_or(u32::MAX));
    descriptor.set_u24(5, disk.block_bytes);
    descriptor
}

fn long_descriptor(disk: &Disk) -> [u8; 16] {
    let mut descriptor = [0; 16];
    descriptor.set_u64(0, disk.blocks);
    descriptor.set_u32(12, disk.block_bytes);
    descriptor
}

/// MODE SENSE (6) and (10).
pub(super) fn sense(context: &Context<'_>, cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    let ten = cdb.u8_at(0) == super::codes::MODE_SENSE_10;
    let control = match cdb.u8_at(2) >> 6 {
        0 => Control::Current,
        1 => Control::Changeable,
        2 => Control::Default,
        _ => return Err(Sense::illegal(asc::NO_SAVING)),
    };
    let page = cdb.u8_at(2) & 0x3f;
    // Subpages: none, or all of which there are none.
    if !matches!(cdb.u8_at(3), 0x00 | 0xff) {
        return Err(Sense::invalid_field(3));
    }
    let pages = pages(page, control, *context.mode).ok_or(Sense::invalid_field(2))?;
    let disk = context.disk;
    let descriptor = match cdb.u8_at(1) {
        flags if flags & 0x08 != 0 => Vec::new(),
        flags if ten && flags & 0x10 != 0 => long_descriptor(disk).to_vec(),
        _ => short_descriptor(disk).to_vec(),
    };
    let protect = disk.read_only || context.mode.write_protect;
    // DEVICE-SPECIFIC PARAMETER: WP and DPOFUA.
    let specific = if protect { 0x90 } else { 0x10 };
    let short = |bytes: &[u8]| u8::try_from(bytes.len()).unwrap_or(u8::MAX);
    let mut data = if ten {
        vec![0, 0, 0, specific, u8::from(descriptor.len() == 16), 0, 0, short(&descriptor)]
    } else {
        vec![0, 0, specific, short(&descriptor)]
    };
    data.extend_from_slice(&descriptor);
    data.extend_from_slice(&pages);
    let length = data.len();
    if ten {
        data.set_u16(0, u16::try_from(length.saturating_sub(2)).unwrap_or(u16::MAX));
    } else {
        data.set_u8(0, u8::try_from(length.saturating_sub(1)).unwrap_or(u8::MAX));
    }
    append(reply, &data, if ten { cdb.u16_at(7).into() } else { cdb.u8_at(4).into() });
    Ok(Plan::Done)
}

/// What a MODE SELECT with this command and parameter list makes of the mode parameters.
///
/// # Errors
/// Pages without PF, saving, a list that is cut short, and any change but of D_SENSE and SWP.
pub fn select(disk: &Disk, mode: ModeState, cdb: &[u8; 16], kind: Parameter, list: &[u8]) -> Result<ModeState, Sense> {
    if cdb.u8_at(1) & 0x11 != 0x10 {
        return Err(Sense::invalid_field(1));
    }
    let cut = Sense::illegal(asc::PARAMETER_LIST_LENGTH);
    let ten = kind == Parameter::ModeSelect10;
    let (header, descriptor, long) = if ten {
        (8usize, usize::from(list.u16_at(6)), list.u8_at(4) & 1 != 0)
    } else {
        (4, usize::from(list.u8_at(3)), false)
    };
    let rest = list.get(header..).ok_or(cut)?;
    let (descriptor_bytes, mut rest) = rest.split_at_checked(descriptor).ok_or(cut)?;
    let field = if ten { 6 } else { 3 };
    // The blocks that there are, and none other: "no change" may be said as zero or all ones (SBC-3 6.5.2).
    let fits = match (descriptor, long) {
        (0, _) => true,
        (8, false) => {
            let same = short_descriptor(disk);
            let blocks = descriptor_bytes.u32_at(0);
            descriptor_bytes.u24_at(5) == disk.block_bytes
                && (blocks == same.u32_at(0) || matches!(blocks, 0 | u32::MAX))
        }
        (16, true) => {
            let blocks = descriptor_bytes.u64_at(0);
            descriptor_bytes.u32_at(12) == disk.block_bytes && (blocks == disk.blocks || matches!(blocks, 0 | u64::MAX))
        }
        _ => false,
    };
    if !fits {
        return Err(Sense::invalid_parameter(field));
    }
    let mut mode = mode;
    while !rest.is_empty() {
        let at = u16::try_from(list.len().saturating_sub(rest.len())).unwrap_or_default();
        // PS is reserved here; SPF would be a subpage, and there are none.
        let code = rest.u8_at(0) & 0x7f;
        let current =
            pages(code, Control::Current, mode).filter(|_| code != ALL).ok_or(Sense::invalid_parameter(at))?;
        let page = rest.get(..current.len()).ok_or(cut)?;
        if page.u8_at(1) != current.u8_at(1) {
            return Err(Sense::invalid_parameter(at.saturating_add(1)));
        }
        let changeable = pages(code, Control::Changeable, mode).unwrap_or_default();
        for (index, ((new, old), mask)) in page.iter().zip(&current).zip(&changeable).enumerate().skip(2) {
            if (new ^ old) & !mask != 0 {
                return Err(Sense::invalid_parameter(at.saturating_add(u16::try_from(index).unwrap_or_default())));
            }
        }
        if code == CONTROL {
            mode.descriptor_sense = page.u8_at(2) & 0x04 != 0;
            mode.write_protect = page.u8_at(4) & 0x08 != 0;
        }
        rest = rest.get(current.len()..).unwrap_or_default();
    }
    Ok(mode)
}
