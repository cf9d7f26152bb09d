//! Ways in which a peer can break the protocol.

/// The peer broke the protocol, or refused us. The connection is of no further use: the driver sends what is still in its
/// output, if it can, and closes.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A header whose CRC does not match: nothing in it can be believed, its lengths neither (7.8).
    #[error("header digest does not match")]
    HeaderDigest,
    /// A data segment whose CRC does not match (7.8; with ErrorRecoveryLevel 0 this ends the session).
    #[error("data digest does not match")]
    DataDigest,
    /// An opcode nobody defined, or one that the other role sends.
    #[error("unexpected opcode {0:#04x}")]
    Opcode(u8),
    /// A field is longer than this side accepts.
    #[error("{what} of {length} bytes is longer than {limit}")]
    TooLong {
        /// Which field.
        what: &'static str,
        /// As the peer has it.
        length: u64,
        /// What is accepted.
        limit: u64,
    },
    /// A field or PDU is cut short, or its parts do not add up.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// A PDU that is not allowed in this phase or under what was negotiated.
    #[error("{0}")]
    OutOfPlace(&'static str),
    /// A key has a value that is not one of its.
    #[error("{key}={value} is not acceptable")]
    Value {
        /// The key.
        key: String,
        /// As the peer sent it, cut to a length that fits a log line.
        value: String,
    },
    /// More steps than a login needs.
    #[error("login does not come to an end")]
    EndlessLogin,
    /// The peer could not prove who it is.
    #[error("authentication failed: {0}")]
    Authentication(&'static str),
    /// The target refused the login (11.13.5).
    #[error("login refused: {status}")]
    LoginRefused {
        /// Status class and detail.
        status: crate::login::Status,
    },
    /// The peer rejected a PDU of ours (11.17).
    #[error("peer rejected a PDU, reason {0:#04x}")]
    Rejected(u8),
    /// This side refused a login; the peer is told the status alone.
    #[error("login refused: {status}: {why}")]
    RefusedLogin {
        /// Status class and detail.
        status: crate::login::Status,
        /// What is wrong, and with which value.
        why: String,
    },
    /// An answer to a task that was not asked for, or is answered already.
    #[error("an answer to task {0:#x}, which is not outstanding")]
    UnknownTask(u32),
    /// The target is elsewhere (11.13.5, redirection).
    #[error("the target has moved to {address}, and a redirection is not followed: name that portal as the origin's")]
    Moved {
        /// TargetAddress.
        address: String,
    },
    /// The target will drop the connection or the session, or wanted it to end (11.9.1).
    #[error("the target ends the session")]
    Dropped,
    /// The disk says that it has changed: its size, or what it is.
    #[error("the disk has changed")]
    Changed,
    /// This disk is not the one that an earlier session found.
    #[error("this is not the disk that was there before: its {0} differs")]
    OtherDisk(&'static str),
    /// The disk is none that can be read.
    #[error("the disk cannot be used: {0}")]
    Unusable(&'static str),
    /// The disk does not answer what it is, or puts off the same command again and again.
    #[error("the disk is not ready: {0}")]
    NotReady(crate::initiator::Failure),
    /// The disk was reset, or its commands cleared: what was asked of it and is not answered never will be.
    #[error("the disk was reset, and forgot what was asked of it: {0}")]
    Reset(crate::initiator::Failure),
    /// Others are answered, and of this command nothing comes.
    #[error("the target has lost a command: nothing came of it for {seconds} s")]
    Lost {
        /// How long.
        seconds: u64,
    },
    /// The machine was used after it ended.
    #[error("the connection has ended")]
    Ended,
}

impl Violation {
    /// A value that does not fit its key.
    pub(crate) fn value(key: &str, value: &str) -> Self {
        Self::Value { key: cut(key), value: cut(value) }
    }
}

/// A peer's text, cut to a length that fits a log line.
pub(crate) fn cut(text: &str) -> String {
    text.chars().take(80).collect()
}
