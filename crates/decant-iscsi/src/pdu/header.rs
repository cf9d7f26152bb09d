//! The basic header segment of each opcode as a type.

use super::{BHS_BYTES, opcode};
use crate::error::Violation;
use crate::serial::Serial;
use crate::wire::{Fields, SetFields};

/// What a task's order in its set is (11.3.1, SAM-5 8).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum TaskAttribute {
    /// Untagged, dealt with as simple.
    #[default]
    Untagged,
    /// In any order with other simple ones.
    Simple,
    /// After everything before it, before everything after it.
    Ordered,
    /// Before everything that has not begun.
    HeadOfQueue,
    /// Auto contingent allegiance.
    Aca,
    /// Not defined.
    Reserved(u8),
}

impl TaskAttribute {
    fn from_raw(raw: u8) -> Self {
        match raw & 7 {
            0 => Self::Untagged,
            1 => Self::Simple,
            2 => Self::Ordered,
            3 => Self::HeadOfQueue,
            4 => Self::Aca,
            other => Self::Reserved(other),
        }
    }

    fn raw(self) -> u8 {
        match self {
            Self::Untagged => 0,
            Self::Simple => 1,
            Self::Ordered => 2,
            Self::HeadOfQueue => 3,
            Self::Aca => 4,
            Self::Reserved(raw) => raw & 7,
        }
    }
}

/// By how much the bytes moved differ from ExpectedDataTransferLength (11.4.5.1).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Residual {
    /// They do not.
    #[default]
    None,
    /// So many bytes more were to be moved.
    Overflow(u32),
    /// So many bytes less were moved.
    Underflow(u32),
}

impl Residual {
    /// Of a transfer of `actual` bytes for which the initiator expected `expected`.
    pub fn between(expected: u32, actual: u64) -> Self {
        let expected = u64::from(expected);
        let cap = |n: u64| u32::try_from(n).unwrap_or(u32::MAX);
        match actual.cmp(&expected) {
            std::cmp::Ordering::Equal => Self::None,
            std::cmp::Ordering::Less => Self::Underflow(cap(expected.saturating_sub(actual))),
            std::cmp::Ordering::Greater => Self::Overflow(cap(actual.saturating_sub(expected))),
        }
    }

    fn decode(flags: u8, count: u32) -> Self {
        match flags & 0x06 {
            0x04 => Self::Overflow(count),
            0x02 => Self::Underflow(count),
            _ => Self::None,
        }
    }

    fn encode(self) -> (u8, u32) {
        match self {
            Self::None => (0, 0),
            Self::Overflow(count) => (0x04, count),
            Self::Underflow(count) => (0x02, count),
        }
    }
}

/// Declares the structs of the opcodes and the enum of all of them: each field with its position and how it is read.
macro_rules! headers {
    ($(
        $(#[$doc:meta])*
        $name:ident = $opcode:path, { $( $(#[$fdoc:meta])* $field:ident: $type:ty = $codec:ident($($arg:expr),*), )* }
    )*) => {
        $(
            $(#[$doc])*
            #[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
            pub struct $name { $( $(#[$fdoc])* pub $field: $type, )* }

            impl $name {
                fn decode(bhs: &[u8]) -> Self {
                    Self { $( $field: $codec::read(bhs, $($arg),*), )* }
                }

                fn encode(&self, bhs: &mut [u8]) {
                    $( $codec::write(bhs, self.$field, $($arg),*); )*
                }
            }

            impl From<$name> for Header {
                fn from(header: $name) -> Self {
                    Self::$name(header)
                }
            }
        )*

        /// One basic header segment, except for its lengths.
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Header { $( $(#[$doc])* $name($name), )* }

        impl Header {
            /// The opcode.
            pub fn opcode(&self) -> u8 {
                match self { $( Self::$name(_) => $opcode, )* }
            }

            /// From the wire.
            ///
            /// # Errors
            /// [`Violation::Opcode`]: none of the opcodes of RFC 7143.
            pub fn decode(bhs: &[u8; BHS_BYTES]) -> Result<Self, Violation> {
                let raw = bhs.u8_at(0) & 0x3f;
                Ok(match raw {
                    $( $opcode => Self::$name($name::decode(bhs)), )*
                    _ => return Err(Violation::Opcode(raw)),
                })
            }

            /// As on the wire, with no additional header and `data_length` bytes of data behind it.
            pub fn encode(&self, data_length: u32) -> [u8; BHS_BYTES] {
                let mut bhs = [0; BHS_BYTES];
                bhs.set_u8(0, self.opcode());
                bhs.set_u24(5, data_length);
                match self { $( Self::$name(header) => header.encode(&mut bhs), )* }
                bhs
            }
        }
    };
}

/// One bit or more of a byte; `set` bits are or-ed in, so several fields may share a byte.
mod flag {
    use super::*;
    pub(super) fn read(bhs: &[u8], at: usize, mask: u8) -> bool {
        bhs.u8_at(at) & mask != 0
    }
    pub(super) fn write(bhs: &mut [u8], value: bool, at: usize, mask: u8) {
        let byte = bhs.u8_at(at);
        bhs.set_u8(at, if value { byte | mask } else { byte });
    }
}

/// Two bits of byte 1, `shift` up.
mod stage {
    use super::*;
    pub(super) fn read(bhs: &[u8], shift: u8) -> u8 {
        (bhs.u8_at(1) >> (shift & 7)) & 3
    }
    pub(super) fn write(bhs: &mut [u8], value: u8, shift: u8) {
        let byte = bhs.u8_at(1);
        bhs.set_u8(1, byte | ((value & 3) << (shift & 7)));
    }
}

/// The low seven bits of byte 1, whose high bit is set.
mod low7 {
    use super::*;
    pub(super) fn read(bhs: &[u8]) -> u8 {
        bhs.u8_at(1) & 0x7f
    }
    pub(super) fn write(bhs: &mut [u8], value: u8) {
        bhs.set_u8(1, 0x80 | (value & 0x7f));
    }
}

mod attribute {
    use super::*;
    pub(super) fn read(bhs: &[u8]) -> TaskAttribute {
        TaskAttribute::from_raw(bhs.u8_at(1))
    }
    pub(super) fn write(bhs: &mut [u8], value: TaskAttribute) {
        let byte = bhs.u8_at(1);
        bhs.set_u8(1, byte | value.raw());
    }
}

mod residual {
    use super::*;
    pub(super) fn read(bhs: &[u8]) -> Residual {
        Residual::decode(bhs.u8_at(1), bhs.u32_at(44))
    }
    pub(super) fn write(bhs: &mut [u8], value: Residual) {
        let (flags, count) = value.encode();
        let byte = bhs.u8_at(1);
        bhs.set_u8(1, byte | flags);
        bhs.set_u32(44, count);
    }
}

mod byte {
    use super::*;
    pub(super) fn read(bhs: &[u8], at: usize) -> u8 {
        bhs.u8_at(at)
    }
    pub(super) fn write(bhs: &mut [u8], value: u8, at: usize) {
        bhs.set_u8(at, value);
    }
}

mod half {
    use super::*;
    pub(super) fn read(bhs: &[u8], at: usize) -> u16 {
        bhs.u16_at(at)
    }
    pub(super) fn write(bhs: &mut [u8], value: u16, at: usize) {
        bhs.set_u16(at, value);
    }
}

mod word {
    use super::*;
    pub(super) fn read(bhs: &[u8], at: usize) -> u32 {
        bhs.u32_at(at)
    }
    pub(super) fn write(bhs: &mut [u8], value: u32, at: usize) {
        bhs.set_u32(at, value);
    }
}

mod sn {
    use super::*;
    pub(super) fn read(bhs: &[u8], at: usize) -> Serial {
        Serial(bhs.u32_at(at))
    }
    pub(super) fn write(bhs: &mut [u8], value: Serial, at: usize) {
        bhs.set_u32(at, value.0);
    }
}

mod long {
    use super::*;
    pub(super) fn read(bhs: &[u8], at: usize) -> u64 {
        bhs.u64_at(at)
    }
    pub(super) fn write(bhs: &mut [u8], value: u64, at: usize) {
        bhs.set_u64(at, value);
    }
}

mod array {
    use super::*;
    pub(super) fn read<const N: usize>(bhs: &[u8], at: usize) -> [u8; N] {
        bhs.array_at(at)
    }
    pub(super) fn write<const N: usize>(bhs: &mut [u8], value: [u8; N], at: usize) {
        bhs.set(at, &value);
    }
}

headers! {
    /// NOP-Out (11.18): a ping, or the answer to one.
    NopOut = opcode::NOP_OUT, {
        /// I: outside of the order of CmdSN.
        immediate: bool = flag(0, 0x40),
        /// F, always set.
        is_final: bool = flag(1, 0x80),
        /// LUN, copied from the NOP-In that is answered.
        lun: u64 = long(8),
        /// Initiator Task Tag; [`super::NO_TAG`] wants no answer.
        task: u32 = word(16),
        /// Target Transfer Tag, copied from the NOP-In that is answered.
        transfer: u32 = word(20),
        /// CmdSN.
        cmd_sn: Serial = sn(24),
        /// ExpStatSN.
        exp_stat_sn: Serial = sn(28),
    }
    /// SCSI Command (11.3).
    ScsiCommand = opcode::SCSI_COMMAND, {
        /// I.
        immediate: bool = flag(0, 0x40),
        /// F: no unsolicited Data-Out follows.
        is_final: bool = flag(1, 0x80),
        /// R: data towards the initiator is expected.
        read: bool = flag(1, 0x40),
        /// W: data towards the target is expected.
        write: bool = flag(1, 0x20),
        /// ATTR.
        attribute: TaskAttribute = attribute(),
        /// LUN.
        lun: u64 = long(8),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// ExpectedDataTransferLength, bytes.
        expected_length: u32 = word(20),
        /// CmdSN.
        cmd_sn: Serial = sn(24),
        /// ExpStatSN.
        exp_stat_sn: Serial = sn(28),
        /// The command descriptor block, padded with zeros.
        cdb: [u8; 16] = array(32),
    }
    /// SCSI Task Management Function Request (11.5).
    TaskRequest = opcode::TASK_REQUEST, {
        /// I.
        immediate: bool = flag(0, 0x40),
        /// One of [`super::task_function`].
        function: u8 = low7(),
        /// LUN.
        lun: u64 = long(8),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// Referenced Task Tag.
        referenced: u32 = word(20),
        /// CmdSN.
        cmd_sn: Serial = sn(24),
        /// ExpStatSN.
        exp_stat_sn: Serial = sn(28),
        /// RefCmdSN.
        ref_cmd_sn: Serial = sn(32),
        /// ExpDataSN.
        exp_data_sn: Serial = sn(36),
    }
    /// Login Request (11.12).
    LoginRequest = opcode::LOGIN_REQUEST, {
        /// I, always set.
        immediate: bool = flag(0, 0x40),
        /// T: ready to go on to the stage `next_stage`.
        transit: bool = flag(1, 0x80),
        /// C: the text goes on in the next PDU.
        more: bool = flag(1, 0x40),
        /// CSG: the stage this belongs to.
        stage: u8 = stage(2),
        /// NSG: the stage to go on to.
        next_stage: u8 = stage(0),
        /// Version-max.
        version_max: u8 = byte(2),
        /// Version-min.
        version_min: u8 = byte(3),
        /// ISID: the initiator's part of the session's name.
        isid: [u8; 6] = array(8),
        /// TSIH: 0 for a new session.
        tsih: u16 = half(14),
        /// Initiator Task Tag, one for the whole login.
        task: u32 = word(16),
        /// CID: the connection's number.
        cid: u16 = half(20),
        /// CmdSN, where the session begins.
        cmd_sn: Serial = sn(24),
        /// ExpStatSN.
        exp_stat_sn: Serial = sn(28),
    }
    /// Text Request (11.10).
    TextRequest = opcode::TEXT_REQUEST, {
        /// I.
        immediate: bool = flag(0, 0x40),
        /// F: nothing more to ask.
        is_final: bool = flag(1, 0x80),
        /// C: the text goes on in the next PDU.
        more: bool = flag(1, 0x40),
        /// LUN.
        lun: u64 = long(8),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// Target Transfer Tag, of the response that is continued.
        transfer: u32 = word(20),
        /// CmdSN.
        cmd_sn: Serial = sn(24),
        /// ExpStatSN.
        exp_stat_sn: Serial = sn(28),
    }
    /// SCSI Data-Out (11.7).
    DataOut = opcode::DATA_OUT, {
        /// F: the last of its sequence.
        is_final: bool = flag(1, 0x80),
        /// LUN.
        lun: u64 = long(8),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// Target Transfer Tag of the R2T; [`super::NO_TAG`] when unsolicited.
        transfer: u32 = word(20),
        /// ExpStatSN.
        exp_stat_sn: Serial = sn(28),
        /// DataSN, from 0 in each sequence.
        data_sn: Serial = sn(36),
        /// Buffer Offset, bytes.
        offset: u32 = word(40),
    }
    /// Logout Request (11.14).
    LogoutRequest = opcode::LOGOUT_REQUEST, {
        /// I.
        immediate: bool = flag(0, 0x40),
        /// Reason: 0 close the session, 1 close the connection, 2 remove it for recovery.
        reason: u8 = low7(),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// CID.
        cid: u16 = half(20),
        /// CmdSN.
        cmd_sn: Serial = sn(24),
        /// ExpStatSN.
        exp_stat_sn: Serial = sn(28),
    }
    /// SNACK Request (11.16); only with ErrorRecoveryLevel 1 and more.
    Snack = opcode::SNACK, {
        /// Type.
        kind: u8 = low7(),
        /// LUN.
        lun: u64 = long(8),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// Target Transfer Tag or SNACK Tag.
        transfer: u32 = word(20),
        /// ExpStatSN.
        exp_stat_sn: Serial = sn(28),
        /// BegRun.
        begin: u32 = word(40),
        /// RunLength.
        length: u32 = word(44),
    }
    /// NOP-In (11.19): a ping, or the answer to one.
    NopIn = opcode::NOP_IN, {
        /// F, always set.
        is_final: bool = flag(1, 0x80),
        /// LUN.
        lun: u64 = long(8),
        /// Initiator Task Tag, of the NOP-Out that is answered.
        task: u32 = word(16),
        /// Target Transfer Tag; [`super::NO_TAG`] wants no answer.
        transfer: u32 = word(20),
        /// StatSN.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
    }
    /// SCSI Response (11.4).
    ScsiResponse = opcode::SCSI_RESPONSE, {
        /// F, always set.
        is_final: bool = flag(1, 0x80),
        /// Response: 0 completed at the target, 1 target failure.
        response: u8 = byte(2),
        /// Status, as SAM has it.
        status: u8 = byte(3),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// SNACK Tag.
        snack: u32 = word(20),
        /// StatSN.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
        /// ExpDataSN: Data-In (read) or R2T (write) PDUs that were sent.
        exp_data_sn: Serial = sn(36),
        /// O, U and Residual Count.
        residual: Residual = residual(),
    }
    /// SCSI Task Management Function Response (11.6).
    TaskResponse = opcode::TASK_RESPONSE, {
        /// F, always set.
        is_final: bool = flag(1, 0x80),
        /// One of [`super::task_response`].
        response: u8 = byte(2),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// StatSN.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
    }
    /// Login Response (11.13).
    LoginResponse = opcode::LOGIN_RESPONSE, {
        /// T.
        transit: bool = flag(1, 0x80),
        /// C.
        more: bool = flag(1, 0x40),
        /// CSG.
        stage: u8 = stage(2),
        /// NSG.
        next_stage: u8 = stage(0),
        /// Version-max.
        version_max: u8 = byte(2),
        /// Version-active.
        version_active: u8 = byte(3),
        /// ISID.
        isid: [u8; 6] = array(8),
        /// TSIH: the target's part of the session's name, in the last response.
        tsih: u16 = half(14),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// StatSN.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
        /// Status-Class.
        status_class: u8 = byte(36),
        /// Status-Detail.
        status_detail: u8 = byte(37),
    }
    /// Text Response (11.11).
    TextResponse = opcode::TEXT_RESPONSE, {
        /// F: nothing more to say.
        is_final: bool = flag(1, 0x80),
        /// C.
        more: bool = flag(1, 0x40),
        /// LUN.
        lun: u64 = long(8),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// Target Transfer Tag, for the request that continues this.
        transfer: u32 = word(20),
        /// StatSN.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
    }
    /// SCSI Data-In (11.7).
    DataIn = opcode::DATA_IN, {
        /// F: the last of its sequence.
        is_final: bool = flag(1, 0x80),
        /// A: the target wants an acknowledgement (ErrorRecoveryLevel 1 and more).
        acknowledge: bool = flag(1, 0x40),
        /// S: the status of the command is in here.
        has_status: bool = flag(1, 0x01),
        /// Status, with S.
        status: u8 = byte(3),
        /// LUN, with A.
        lun: u64 = long(8),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// Target Transfer Tag, with A.
        transfer: u32 = word(20),
        /// StatSN, with S.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
        /// DataSN.
        data_sn: Serial = sn(36),
        /// Buffer Offset, bytes.
        offset: u32 = word(40),
        /// O, U and Residual Count, with S.
        residual: Residual = residual(),
    }
    /// Logout Response (11.15).
    LogoutResponse = opcode::LOGOUT_RESPONSE, {
        /// F, always set.
        is_final: bool = flag(1, 0x80),
        /// Response: 0 closed, 1 CID not found, 2 recovery not supported, 3 cleanup failed.
        response: u8 = byte(2),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// StatSN.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
        /// Time2Wait, seconds.
        time_to_wait: u16 = half(40),
        /// Time2Retain, seconds.
        time_to_retain: u16 = half(42),
    }
    /// Ready To Transfer (11.8).
    ReadyToTransfer = opcode::READY_TO_TRANSFER, {
        /// F, always set.
        is_final: bool = flag(1, 0x80),
        /// LUN.
        lun: u64 = long(8),
        /// Initiator Task Tag.
        task: u32 = word(16),
        /// Target Transfer Tag, which the Data-Outs carry.
        transfer: u32 = word(20),
        /// StatSN, the next one: an R2T takes none.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
        /// R2TSN.
        r2t_sn: Serial = sn(36),
        /// Buffer Offset, bytes.
        offset: u32 = word(40),
        /// Desired Data Transfer Length, bytes.
        length: u32 = word(44),
    }
    /// Asynchronous Message (11.9).
    AsyncMessage = opcode::ASYNC_MESSAGE, {
        /// F, always set.
        is_final: bool = flag(1, 0x80),
        /// LUN.
        lun: u64 = long(8),
        /// Reserved, all ones.
        task: u32 = word(16),
        /// StatSN.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
        /// One of [`super::async_event`].
        event: u8 = byte(36),
        /// AsyncVCode.
        code: u8 = byte(37),
        /// Parameter1.
        parameter1: u16 = half(38),
        /// Parameter2.
        parameter2: u16 = half(40),
        /// Parameter3.
        parameter3: u16 = half(42),
    }
    /// Reject (11.17); its data is the header that was refused.
    Reject = opcode::REJECT, {
        /// F, always set.
        is_final: bool = flag(1, 0x80),
        /// One of [`super::reject_reason`].
        reason: u8 = byte(2),
        /// Reserved, all ones.
        task: u32 = word(16),
        /// StatSN.
        stat_sn: Serial = sn(24),
        /// ExpCmdSN.
        exp_cmd_sn: Serial = sn(28),
        /// MaxCmdSN.
        max_cmd_sn: Serial = sn(32),
        /// DataSN or R2TSN.
        data_sn: Serial = sn(36),
    }
}
