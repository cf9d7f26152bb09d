//! Errors that cross the wire, and ways in which a peer can break the protocol.

/// An error as NBD sends it ("Error values"). Values this list does not have are read as [`ErrorCode::Invalid`], as the
/// protocol says.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, thiserror::Error)]
pub enum ErrorCode {
    /// EPERM: a write to a read-only export.
    #[error("operation not permitted (EPERM)")]
    Permission,
    /// EIO: the medium failed.
    #[error("input/output error (EIO)")]
    Io,
    /// ENOMEM.
    #[error("cannot allocate memory (ENOMEM)")]
    NoMemory,
    /// EINVAL.
    #[error("invalid argument (EINVAL)")]
    Invalid,
    /// ENOSPC: a write past the end, or the medium is full.
    #[error("no space left on device (ENOSPC)")]
    NoSpace,
    /// EOVERFLOW: the request is larger than can be answered.
    #[error("value too large (EOVERFLOW)")]
    Overflow,
    /// ENOTSUP.
    #[error("operation not supported (ENOTSUP)")]
    NotSupported,
    /// ESHUTDOWN: the server is going away.
    #[error("server is shutting down (ESHUTDOWN)")]
    Shutdown,
}

impl ErrorCode {
    /// The value on the wire.
    pub fn raw(self) -> u32 {
        match self {
            Self::Permission => 1,
            Self::Io => 5,
            Self::NoMemory => 12,
            Self::Invalid => 22,
            Self::NoSpace => 28,
            Self::Overflow => 75,
            Self::NotSupported => 95,
            Self::Shutdown => 108,
        }
    }

    /// From the wire; `None` for 0, success.
    pub fn from_raw(raw: u32) -> Option<Self> {
        Some(match raw {
            0 => return None,
            1 => Self::Permission,
            5 => Self::Io,
            12 => Self::NoMemory,
            28 => Self::NoSpace,
            75 => Self::Overflow,
            95 => Self::NotSupported,
            108 => Self::Shutdown,
            _ => Self::Invalid,
        })
    }
}

/// The peer broke the protocol, or refused us. The connection is of no further use: the driver closes it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Violation {
    /// A magic number is wrong: not NBD, or the stream is out of step.
    #[error("not NBD, or out of step: expected {expected}, found {found:#x}")]
    Magic {
        /// What should be there.
        expected: &'static str,
        /// What is.
        found: u64,
    },
    /// The server speaks only a handshake older than fixed newstyle.
    #[error("the server does not speak the fixed newstyle handshake")]
    OldStyle,
    /// Handshake flags nobody defined.
    #[error("unknown handshake flags {0:#x}")]
    HandshakeFlags(u32),
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
    /// More options than a handshake needs.
    #[error("handshake does not come to an end")]
    EndlessHandshake,
    /// NBD_OPT_EXPORT_NAME, which has no error reply, asked for something that is not served here.
    #[error("NBD_OPT_EXPORT_NAME cannot be granted: {0}")]
    ExportName(&'static str),
    /// Plaintext arrived where only TLS may follow.
    #[error("plaintext after STARTTLS was agreed")]
    PlaintextAfterStartTls,
    /// The server refused an option that we cannot do without.
    #[error("the server refused {option}: {reason}")]
    Refused {
        /// Which option.
        option: &'static str,
        /// The server's error, and its message if it sent one.
        reason: String,
    },
    /// A reply to an option that was not asked.
    #[error("reply of type {reply:#x} to option {option}, which was not asked")]
    UnaskedReply {
        /// The option in the reply.
        option: u32,
        /// Its type.
        reply: u32,
    },
    /// A field or message is cut short, or its parts do not add up.
    #[error("malformed {0}")]
    Malformed(&'static str),
    /// An export size that no file has.
    #[error("export of {0} bytes")]
    ExportSize(u64),
    /// A reply to a request that is not outstanding.
    #[error("reply to unknown cookie {0:#x}")]
    UnknownCookie(u64),
    /// A chunk of a type that does not belong to the request.
    #[error("reply chunk of type {0:#x} does not answer this request")]
    WrongChunk(u16),
    /// A chunk lies outside the range that was asked for, or overlaps what came before.
    #[error("reply for {length} bytes at {offset} is outside of what was asked, or repeats it")]
    OutOfRange {
        /// Bytes from the export's start.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// A request was answered as done although parts are missing.
    #[error("reply is complete but leaves out part of what was asked")]
    Incomplete,
    /// The machine was used after it ended.
    #[error("the connection has ended")]
    Ended,
}
