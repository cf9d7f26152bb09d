//! What a command's status and sense data mean to whoever sent it (SAM-5 5.3, SPC-4 4.5).

use crate::scsi::{SenseKey, asc, status};
use crate::wire::Fields;

/// Why a command failed for good.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Failure {
    /// CHECK CONDITION.
    #[error("sense key {key:x}h, code {:02x}h/{:02x}h", .asc >> 8, .asc & 0xff)]
    Check {
        /// SENSE KEY.
        key: u8,
        /// ADDITIONAL SENSE CODE, and its qualifier in the low byte.
        asc: u16,
        /// INFORMATION, if valid: with a medium error, the first LBA that failed.
        information: Option<u64>,
    },
    /// RESERVATION CONFLICT: another initiator has the disk for itself.
    #[error("the disk is reserved by another initiator")]
    Reserved,
    /// GOOD, but not all bytes came.
    #[error("fewer bytes than asked for")]
    Short,
    /// Any other status.
    #[error("status {0:02x}h{name}", name = name(.0))]
    Status(u8),
    /// The target could not carry it out (Response of the SCSI Response, 11.4.3), again and again.
    #[error("target failure {0:02x}h")]
    Target(u8),
}

/// A status that people know by its name.
fn name(raw: &u8) -> &'static str {
    match *raw {
        status::BUSY => " (BUSY)",
        status::TASK_SET_FULL => " (TASK SET FULL)",
        status::TASK_ABORTED => " (TASK ABORTED)",
        _ => "",
    }
}

impl Failure {
    /// Whether the medium could not be read.
    pub fn is_medium(&self) -> bool {
        matches!(self, Self::Check { key, .. } if *key == SenseKey::MediumError.raw())
    }

    /// Whether the command or a part of it is not known to the disk.
    pub fn is_refusal(&self) -> bool {
        matches!(self, Self::Check { key, .. } if *key == SenseKey::IllegalRequest.raw())
    }
}

/// Sense data as received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Sense {
    pub(super) key: u8,
    pub(super) asc: u16,
    information: Option<u64>,
    /// About an earlier command; this one was not carried out.
    deferred: bool,
}

impl Sense {
    /// From the data segment of a SCSI Response or an Asynchronous Message: a length and sense data in either format
    /// (11.4.7.2). Nothing readable is no sense.
    pub(super) fn decode(segment: &[u8]) -> Self {
        let none = Self { key: 0, asc: asc::NONE, information: None, deferred: false };
        let body = segment.get(2..).unwrap_or_default();
        let sense = body.get(..segment.u16_at(0).into()).unwrap_or(body);
        let code = sense.u8_at(0) & 0x7f;
        match code {
            0x70 | 0x71 if sense.len() >= 8 => Self {
                key: sense.u8_at(2) & 0x0f,
                asc: sense.u16_at(12),
                information: (sense.u8_at(0) & 0x80 != 0).then(|| sense.u32_at(3).into()),
                deferred: code == 0x71,
            },
            0x72 | 0x73 if sense.len() >= 8 => Self {
                key: sense.u8_at(1) & 0x0f,
                asc: sense.u16_at(2),
                information: descriptor_information(sense),
                deferred: code == 0x73,
            },
            _ => none,
        }
    }

    /// Whether it says that this may be another disk, or the same with another size or content behind its addresses.
    pub(super) fn tells_of_change(&self) -> bool {
        self.key == SenseKey::UnitAttention.raw()
            && matches!(
                self.asc,
                asc::CAPACITY_CHANGED | asc::INQUIRY_CHANGED | asc::IDENTIFIER_CHANGED | asc::LUNS_CHANGED
            )
    }

    /// Whether it says that all commands of this nexus are gone, unanswered: a power on, a reset or a loss of the nexus (29h),
    /// or commands cleared by somebody else (2Fh).
    pub(super) fn tells_of_reset(&self) -> bool {
        let [code, _] = self.asc.to_be_bytes();
        self.key == SenseKey::UnitAttention.raw() && matches!(code, RESET_CODE | CLEARED_CODE)
    }

    /// As a command's failure.
    pub(super) fn failure(&self) -> Failure {
        Failure::Check { key: self.key, asc: self.asc, information: self.information }
    }
}

/// ADDITIONAL SENSE CODE of POWER ON, RESET, OR BUS DEVICE RESET OCCURRED and its kin.
const RESET_CODE: u8 = 0x29;
/// ADDITIONAL SENSE CODE of COMMANDS CLEARED.
const CLEARED_CODE: u8 = 0x2f;

/// INFORMATION of sense data in descriptor format: descriptor type 0 (SPC-4 4.5.2.2).
fn descriptor_information(sense: &[u8]) -> Option<u64> {
    let mut rest = sense.get(8..)?;
    while let Some((head, tail)) = rest.split_first_chunk::<2>() {
        let (body, tail) = tail.split_at_checked(head.u8_at(1).into())?;
        if head.u8_at(0) == 0 && body.len() >= 10 && body.u8_at(0) & 0x80 != 0 {
            return Some(body.u64_at(2));
        }
        rest = tail;
    }
    None
}

/// What to do about a command that has ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was carried out.
    Good,
    /// A unit attention, or an earlier command's error, came in its place: send it again.
    Again(Failure),
    /// Not now: send it again after a while.
    Later(Failure),
    /// It went wrong in a way that may pass: send it again after a while, a few times.
    Retry(Failure),
    /// The disk may be another one: the session must find out.
    Changed,
    /// A unit attention that says that the disk forgot what else it was asked.
    Reset(Failure),
    /// No use.
    Failed(Failure),
}

/// Judges a Response, a Status and sense data.
pub(super) fn judge(response: u8, raw: u8, segment: &[u8]) -> Verdict {
    if response != 0 {
        return Verdict::Retry(Failure::Target(response));
    }
    let sense = Sense::decode(segment);
    let failure = sense.failure();
    match raw {
        status::GOOD => Verdict::Good,
        status::BUSY | status::TASK_SET_FULL => Verdict::Later(Failure::Status(raw)),
        status::TASK_ABORTED => Verdict::Retry(Failure::Status(raw)),
        status::RESERVATION_CONFLICT => Verdict::Failed(Failure::Reserved),
        status::CHECK_CONDITION if sense.tells_of_change() => Verdict::Changed,
        status::CHECK_CONDITION if sense.deferred => Verdict::Again(failure),
        status::CHECK_CONDITION if sense.tells_of_reset() => Verdict::Reset(failure),
        status::CHECK_CONDITION => match sense.key {
            // RECOVERED ERROR: done, with some effort.
            1 => Verdict::Good,
            key if key == SenseKey::UnitAttention.raw() => Verdict::Again(failure),
            // Becoming ready, or for a reason that may pass; with no medium it will not pass.
            key if key == SenseKey::NotReady.raw() && sense.asc >> 8 == 0x04 => Verdict::Later(failure),
            key if key == SenseKey::AbortedCommand.raw() => Verdict::Retry(failure),
            _ => Verdict::Failed(failure),
        },
        other => Verdict::Failed(Failure::Status(other)),
    }
}
