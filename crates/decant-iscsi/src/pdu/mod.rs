//! PDUs: the basic header segment of every opcode both ways (11), and the stream of them.
//!
//! ```text
//! | BHS 48 | AHS 0..=1020, a multiple of 4 | header digest 0 or 4 | data 0..2^24 | pad to 4 | data digest 0 or 4 |
//! ```
//! The digests are CRC-32C, little-endian as the polynomial's bit order has it (13.1). The header digest covers BHS and AHS,
//! the data digest data and padding; there is no data digest where there is no data.

mod header;
mod stream;

pub use header::{
    AsyncMessage, DataIn, DataOut, Header, LoginRequest, LoginResponse, LogoutRequest, LogoutResponse, NopIn, NopOut,
    ReadyToTransfer, Reject, Residual, ScsiCommand, ScsiResponse, Snack, TaskAttribute, TaskRequest, TaskResponse,
    TextRequest, TextResponse,
};
pub use stream::{Decoder, Digests, Trailer, Unit, put, put_header};

/// Bytes of a basic header segment.
pub const BHS_BYTES: usize = 48;
/// Most bytes of additional header segments: TotalAHSLength counts words in 8 bits.
pub const MAX_AHS_BYTES: usize = 255 * 4;
/// The largest piece of stream that a decoder needs to see at once, a whole header; a driver's input buffer must hold this
/// much.
pub const MAX_UNIT: usize = BHS_BYTES + MAX_AHS_BYTES + 4;
/// Longest data segment that the length field can say.
pub const MAX_DATA_SEGMENT: u32 = (1 << 24) - 1;
/// The Initiator or Target Task (or Transfer) Tag that means none.
pub const NO_TAG: u32 = 0xffff_ffff;

/// Opcodes (11.2.1.2).
pub mod opcode {
    /// Initiator: NOP-Out.
    pub const NOP_OUT: u8 = 0x00;
    /// Initiator: SCSI Command.
    pub const SCSI_COMMAND: u8 = 0x01;
    /// Initiator: SCSI Task Management Function Request.
    pub const TASK_REQUEST: u8 = 0x02;
    /// Initiator: Login Request.
    pub const LOGIN_REQUEST: u8 = 0x03;
    /// Initiator: Text Request.
    pub const TEXT_REQUEST: u8 = 0x04;
    /// Initiator: SCSI Data-Out.
    pub const DATA_OUT: u8 = 0x05;
    /// Initiator: Logout Request.
    pub const LOGOUT_REQUEST: u8 = 0x06;
    /// Initiator: SNACK Request.
    pub const SNACK: u8 = 0x10;
    /// Target: NOP-In.
    pub const NOP_IN: u8 = 0x20;
    /// Target: SCSI Response.
    pub const SCSI_RESPONSE: u8 = 0x21;
    /// Target: SCSI Task Management Function Response.
    pub const TASK_RESPONSE: u8 = 0x22;
    /// Target: Login Response.
    pub const LOGIN_RESPONSE: u8 = 0x23;
    /// Target: Text Response.
    pub const TEXT_RESPONSE: u8 = 0x24;
    /// Target: SCSI Data-In.
    pub const DATA_IN: u8 = 0x25;
    /// Target: Logout Response.
    pub const LOGOUT_RESPONSE: u8 = 0x26;
    /// Target: Ready To Transfer.
    pub const READY_TO_TRANSFER: u8 = 0x31;
    /// Target: Asynchronous Message.
    pub const ASYNC_MESSAGE: u8 = 0x32;
    /// Target: Reject.
    pub const REJECT: u8 = 0x3f;
}

/// Task management functions (11.5.1).
pub mod task_function {
    /// ABORT TASK.
    pub const ABORT_TASK: u8 = 1;
    /// ABORT TASK SET.
    pub const ABORT_TASK_SET: u8 = 2;
    /// CLEAR ACA.
    pub const CLEAR_ACA: u8 = 3;
    /// CLEAR TASK SET.
    pub const CLEAR_TASK_SET: u8 = 4;
    /// LOGICAL UNIT RESET.
    pub const LUN_RESET: u8 = 5;
    /// TARGET WARM RESET.
    pub const WARM_RESET: u8 = 6;
    /// TARGET COLD RESET.
    pub const COLD_RESET: u8 = 7;
    /// TASK REASSIGN.
    pub const TASK_REASSIGN: u8 = 8;
}

/// Responses to task management functions (11.6.1).
pub mod task_response {
    /// Function complete.
    pub const COMPLETE: u8 = 0;
    /// Task does not exist.
    pub const NO_TASK: u8 = 1;
    /// LUN does not exist.
    pub const NO_LUN: u8 = 2;
    /// Task allegiance reassignment not supported.
    pub const NO_REASSIGN: u8 = 4;
    /// Task management function not supported.
    pub const NOT_SUPPORTED: u8 = 5;
    /// Function rejected.
    pub const REJECTED: u8 = 255;
}

/// Reasons of a Reject (11.17.1).
pub mod reject_reason {
    /// Data (payload) digest error.
    pub const DATA_DIGEST: u8 = 0x02;
    /// SNACK Reject.
    pub const SNACK: u8 = 0x03;
    /// Protocol error.
    pub const PROTOCOL_ERROR: u8 = 0x04;
    /// Command not supported.
    pub const NOT_SUPPORTED: u8 = 0x05;
    /// Immediate command reject: too many immediate commands.
    pub const IMMEDIATE: u8 = 0x06;
    /// Task in progress.
    pub const TASK_IN_PROGRESS: u8 = 0x07;
    /// Invalid data ack.
    pub const INVALID_DATA_ACK: u8 = 0x08;
    /// Invalid PDU field.
    pub const INVALID_FIELD: u8 = 0x09;
    /// Long operation reject.
    pub const LONG_OPERATION: u8 = 0x0a;
    /// Waiting for logout.
    pub const WAITING_FOR_LOGOUT: u8 = 0x0c;
}

/// Events of an Asynchronous Message (11.9.1).
pub mod async_event {
    /// A SCSI asynchronous event is reported in the sense data.
    pub const SCSI: u8 = 0;
    /// The target requests logout; Parameter3 is the time in seconds.
    pub const LOGOUT_REQUESTED: u8 = 1;
    /// The target will drop this connection.
    pub const CONNECTION_DROPPED: u8 = 2;
    /// The target will drop all connections of this session.
    pub const SESSION_DROPPED: u8 = 3;
    /// The target requests parameter negotiation.
    pub const NEGOTIATION_REQUESTED: u8 = 4;
}

/// Bytes that pad `length` to a multiple of four.
pub fn padding(length: u32) -> u32 {
    length.wrapping_neg() & 3
}
