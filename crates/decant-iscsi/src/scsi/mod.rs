//! The disk behind a target: LUN 0, a direct-access block device as SPC and SBC describe it, without the medium.
//!
//! [`plan`] reads a command and says what it comes to: bytes to answer, an error, or something to do with the medium, as a
//! [`Plan`] in bytes, already checked against the disk's end, limits and write protection. Logical blocks and their sizes
//! are known in here and nowhere else.

mod codes;
mod inquiry;
mod media;
mod mode;
mod sense;
#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests;

pub(crate) use codes::READ_BLOCK_DIGESTS;
pub use media::{Ranges, lba_status, unmap_ranges};
pub use mode::{ModeState, select as mode_select};
pub use sense::{Information, Sense, SenseKey, asc};

use crate::wire::Fields;

/// Status of a command (SAM-5 5.3).
pub mod status {
    /// GOOD.
    pub const GOOD: u8 = 0x00;
    /// CHECK CONDITION: sense data follow.
    pub const CHECK_CONDITION: u8 = 0x02;
    /// BUSY.
    pub const BUSY: u8 = 0x08;
    /// RESERVATION CONFLICT.
    pub const RESERVATION_CONFLICT: u8 = 0x18;
    /// TASK SET FULL.
    pub const TASK_SET_FULL: u8 = 0x28;
    /// TASK ABORTED.
    pub const TASK_ABORTED: u8 = 0x40;
}

/// What a disk is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Disk {
    /// T10 VENDOR IDENTIFICATION, at most 8 ASCII characters.
    pub vendor: String,
    /// PRODUCT IDENTIFICATION, at most 16 ASCII characters.
    pub product: String,
    /// PRODUCT REVISION LEVEL, at most 4 ASCII characters.
    pub revision: String,
    /// PRODUCT SERIAL NUMBER, at most [`MAX_SERIAL`] ASCII characters. With the vendor it names the disk for ever, wherever it is
    /// served from: multipath software takes two LUNs with the same serial for one disk.
    pub serial: String,
    /// Bytes of a logical block, 512 or 4096.
    pub block_bytes: u32,
    /// Logical blocks to a physical one, as a power of two: 3 for 512-byte blocks on a 4 KiB medium.
    pub physical_exponent: u8,
    /// Logical blocks, at least 1.
    pub blocks: u64,
    /// Whether nothing may be written.
    pub read_only: bool,
    /// Whether blocks can be unmapped, and then read as zeros.
    pub thin: bool,
    /// Most bytes of one READ or WRITE; a multiple of `block_bytes`.
    pub max_transfer: u32,
    /// Whether READ BLOCK DIGESTS is there: [`crate::target::Request::Digests`] is answered.
    pub digests: bool,
}

/// Most characters of [`Disk::serial`]: with the vendor it is a designator, whose length has one byte, and initiators copy it
/// into buffers of their own.
pub const MAX_SERIAL: usize = 64;
/// Bytes that one digest of READ BLOCK DIGESTS is about; fewer at the end of a disk that is no multiple of it.
pub const DIGEST_BLOCK: u32 = 4096;
/// Most digests of one READ BLOCK DIGESTS: those of 32 MiB, an answer of 32 KiB.
pub const MAX_DIGESTS: u32 = 8192;

impl Disk {
    /// Bytes of the disk.
    pub fn bytes(&self) -> u64 {
        self.blocks.saturating_mul(u64::from(self.block_bytes))
    }

    fn blocks32(&self, bytes: u32) -> u32 {
        bytes.checked_div(self.block_bytes).unwrap_or_default()
    }
}

/// Bytes that VERIFY compares the medium with.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compare {
    /// None: the medium must only be readable.
    Nothing,
    /// The whole range.
    All,
    /// One block, repeated.
    OneBlock,
}

/// What to do with a parameter list, once it has arrived.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Parameter {
    /// UNMAP: [`unmap_ranges`].
    Unmap,
    /// MODE SELECT (6): [`mode_select`].
    ModeSelect6,
    /// MODE SELECT (10).
    ModeSelect10,
}

/// What a command comes to. Offsets and lengths are bytes of the medium and within it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Plan {
    /// Nothing more: GOOD, with what was appended to the reply.
    Done,
    /// Read and send.
    Read {
        /// From here.
        offset: u64,
        /// So much.
        length: u32,
        /// From the medium, not from a cache with other content.
        fua: bool,
    },
    /// Receive and write.
    Write {
        /// To here.
        offset: u64,
        /// So much.
        length: u32,
        /// To the medium before it is answered.
        fua: bool,
        /// Read it again afterwards, and compare.
        verify: Option<Compare>,
    },
    /// Receive, unless there is nothing to compare with, and compare.
    Verify {
        /// From here.
        offset: u64,
        /// So much.
        length: u32,
        /// With what.
        compare: Compare,
    },
    /// Receive one block, unless there is none, and write it all over the range.
    Same {
        /// From here.
        offset: u64,
        /// So much.
        length: u64,
        /// The range is to be unmapped, and then reads as zeros whatever the block.
        unmap: bool,
        /// No block is sent, it is zeros (NDOB).
        zeros: bool,
    },
    /// Receive a parameter list.
    Parameter {
        /// Bytes of it.
        length: u32,
        /// What it is.
        kind: Parameter,
    },
    /// All that was written must be on the medium before it is answered. IMMED would allow an answer before that: nobody could
    /// be told then that it failed.
    Flush,
    /// Find out which blocks are mapped, from here on.
    LbaStatus {
        /// From here, bytes.
        offset: u64,
        /// Most descriptors that the initiator takes.
        descriptors: u32,
        /// Bytes of answer it takes.
        allocation: u32,
    },
    /// Send the CRC-32C of each [`DIGEST_BLOCK`] of this range, as it is served.
    Digests {
        /// From here, a multiple of [`DIGEST_BLOCK`].
        offset: u64,
        /// So much: as many blocks as there are digests, of which the disk's last may be short.
        length: u32,
    },
    /// REQUEST SENSE: answer a pending unit attention, if there is one.
    RequestSense {
        /// DESC: in descriptor format.
        descriptor: bool,
        /// Bytes of answer it takes.
        allocation: u32,
    },
    /// RESERVE (6).
    Reserve,
    /// RELEASE (6).
    Release,
}

impl Plan {
    /// Bytes that the initiator has to send for it.
    pub fn data_out(&self, block_bytes: u32) -> u32 {
        match *self {
            Self::Write { length, .. } | Self::Verify { length, compare: Compare::All, .. } => length,
            Self::Parameter { length, .. } => length,
            Self::Verify { compare: Compare::OneBlock, .. } | Self::Same { zeros: false, .. } => block_bytes,
            _ => 0,
        }
    }
}

/// Who asks, as far as it matters to the answer.
#[derive(Debug, Clone, Copy)]
pub struct Context<'a> {
    /// The disk.
    pub disk: &'a Disk,
    /// Its changeable mode parameters.
    pub mode: &'a ModeState,
    /// Whether the addressed LUN is LUN 0; on any other only INQUIRY, REPORT LUNS and REQUEST SENSE are answered.
    pub is_lun_0: bool,
    /// The target's name and portal group, which name its port in VPD page 83.
    pub target_name: &'a str,
    /// TargetPortalGroupTag.
    pub portal_group: u16,
}

/// Whether a command is answered although a unit attention is pending (SAM-5 5.14), or another session has the
/// reservation (SPC-2 5.5.1).
pub fn passes_attention(cdb: &[u8; 16]) -> bool {
    matches!(cdb.u8_at(0), codes::INQUIRY | codes::REPORT_LUNS | codes::REQUEST_SENSE)
}

/// Whether a command is answered although another session has the reservation (SPC-2 5.5.1).
pub fn passes_reservation(cdb: &[u8; 16]) -> bool {
    passes_attention(cdb)
        || matches!(cdb.u8_at(0), codes::RELEASE_6)
        || (cdb.u8_at(0) == codes::PREVENT_ALLOW && cdb.u8_at(4) & 3 == 0)
}

/// What a command comes to; the answer's bytes are appended to `reply`, cut to what the initiator allocated.
///
/// # Errors
/// The sense data of a CHECK CONDITION.
pub fn plan(context: &Context<'_>, cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    let Some(code) = codes::find(cdb.u8_at(0), codes::service_action(cdb)) else {
        let sense = if codes::is_known(cdb.u8_at(0)) {
            Sense::invalid_field(1)
        } else {
            Sense::illegal(asc::INVALID_OPERATION_CODE)
        };
        return Err(if context.is_lun_0 { sense } else { Sense::illegal(asc::LUN_NOT_SUPPORTED) });
    };
    if !context.is_lun_0 && !passes_attention(cdb) {
        return Err(Sense::illegal(asc::LUN_NOT_SUPPORTED));
    }
    code.check(cdb, context.disk)?;
    match code.opcode {
        codes::INQUIRY => inquiry::inquiry(context, cdb, reply),
        codes::REPORT_LUNS => inquiry::report_luns(cdb, reply),
        codes::REQUEST_SENSE => request_sense(context, cdb, reply),
        codes::TEST_UNIT_READY | codes::PREVENT_ALLOW => Ok(Plan::Done),
        codes::START_STOP_UNIT => start_stop(cdb),
        codes::MODE_SENSE_6 | codes::MODE_SENSE_10 => mode::sense(context, cdb, reply),
        codes::MODE_SELECT_6 => Ok(parameter(u32::from(cdb.u8_at(4)), Parameter::ModeSelect6)),
        codes::MODE_SELECT_10 => Ok(parameter(u32::from(cdb.u16_at(7)), Parameter::ModeSelect10)),
        codes::RESERVE_6 => Ok(Plan::Reserve),
        codes::RELEASE_6 => Ok(Plan::Release),
        codes::MAINTENANCE_IN => codes::report(context.disk, cdb, reply),
        _ => media::plan(context, cdb, reply),
    }
}

fn parameter(length: u32, kind: Parameter) -> Plan {
    // No list is no error (SPC-4 4.2.5.5).
    if length == 0 { Plan::Done } else { Plan::Parameter { length, kind } }
}

fn request_sense(context: &Context<'_>, cdb: &[u8; 16], reply: &mut Vec<u8>) -> Result<Plan, Sense> {
    let descriptor = cdb.u8_at(1) & 1 != 0;
    let allocation = u32::from(cdb.u8_at(4));
    if context.is_lun_0 {
        return Ok(Plan::RequestSense { descriptor, allocation });
    }
    let sense = Sense::illegal(asc::LUN_NOT_SUPPORTED);
    append(reply, &sense.encode(descriptor), allocation);
    Ok(Plan::Done)
}

/// START STOP UNIT (SBC-3 5.25): there is nothing to load or eject, and power is somebody else's. But who stops a disk means to
/// take its power, so what is cached goes to the medium first, unless NO_FLUSH is set.
fn start_stop(cdb: &[u8; 16]) -> Result<Plan, Sense> {
    let byte = cdb.u8_at(4);
    let (condition, no_flush, eject, start) = (byte >> 4, byte & 0x04 != 0, byte & 0x02 != 0, byte & 0x01 != 0);
    if condition == 0 && eject {
        return Err(Sense::invalid_field(4));
    }
    // POWER CONDITION 0 leaves it to START, 1 is ACTIVE.
    let starts = (condition == 0 && start) || condition == 1;
    Ok(if starts || no_flush { Plan::Done } else { Plan::Flush })
}

/// Appends at most `allocation` bytes of an answer.
fn append(reply: &mut Vec<u8>, bytes: &[u8], allocation: u32) {
    reply.extend_from_slice(bytes.get(..allocation as usize).unwrap_or(bytes));
}
