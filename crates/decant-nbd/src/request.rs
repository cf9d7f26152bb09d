//! Requests, as both sides see them.

use crate::error::Violation;
use crate::wire::{self, Cursor, Put, REQUEST_BYTES};

/// What a request wants done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Command {
    /// Bytes back.
    Read {
        /// NBD_CMD_FLAG_DF: in one chunk.
        unfragmented: bool,
    },
    /// Bytes there; as many payload bytes as its length follow the header.
    Write {
        /// NBD_CMD_FLAG_FUA: durable before the reply.
        fua: bool,
    },
    /// The client is leaving; there is no reply.
    Disconnect,
    /// What was acknowledged becomes durable.
    Flush,
    /// The range is not needed any more.
    Trim {
        /// NBD_CMD_FLAG_FUA.
        fua: bool,
    },
    /// The range reads as zeros afterwards.
    WriteZeroes {
        /// NBD_CMD_FLAG_FUA.
        fua: bool,
        /// NBD_CMD_FLAG_NO_HOLE: stay allocated.
        no_hole: bool,
        /// NBD_CMD_FLAG_FAST_ZERO: fail rather than be as slow as a write.
        fast: bool,
    },
    /// The negotiated metadata contexts' status of the range.
    BlockStatus {
        /// NBD_CMD_FLAG_REQ_ONE: one extent is enough.
        one: bool,
    },
    /// A type that is not known here; it is refused.
    Unknown(u16),
}

const FUA: u16 = 1 << 0;
const NO_HOLE: u16 = 1 << 1;
const DF: u16 = 1 << 2;
const REQ_ONE: u16 = 1 << 3;
const FAST_ZERO: u16 = 1 << 4;

impl Command {
    /// Type and command flags on the wire.
    pub(crate) fn encode(self) -> (u16, u16) {
        let bit = |set: bool, flag: u16| if set { flag } else { 0 };
        match self {
            Self::Read { unfragmented } => (0, bit(unfragmented, DF)),
            Self::Write { fua } => (1, bit(fua, FUA)),
            Self::Disconnect => (2, 0),
            Self::Flush => (3, 0),
            Self::Trim { fua } => (4, bit(fua, FUA)),
            Self::WriteZeroes { fua, no_hole, fast } => {
                (6, bit(fua, FUA) | bit(no_hole, NO_HOLE) | bit(fast, FAST_ZERO))
            }
            Self::BlockStatus { one } => (7, bit(one, REQ_ONE)),
            Self::Unknown(kind) => (kind, 0),
        }
    }

    /// From type and command flags; the second part is flags that do not belong to the type. FUA belongs to all of them:
    /// where nothing is written it means nothing ("Command flags").
    pub(crate) fn decode(kind: u16, flags: u16) -> (Self, u16) {
        let has = |flag: u16| flags & flag != 0;
        let (command, known) = match kind {
            0 => (Self::Read { unfragmented: has(DF) }, FUA | DF),
            1 => (Self::Write { fua: has(FUA) }, FUA),
            2 => (Self::Disconnect, flags),
            3 => (Self::Flush, FUA),
            4 => (Self::Trim { fua: has(FUA) }, FUA),
            6 => (
                Self::WriteZeroes { fua: has(FUA), no_hole: has(NO_HOLE), fast: has(FAST_ZERO) },
                FUA | NO_HOLE | FAST_ZERO,
            ),
            7 => (Self::BlockStatus { one: has(REQ_ONE) }, FUA | REQ_ONE),
            other => (Self::Unknown(other), flags),
        };
        (command, flags & !known)
    }

    /// Whether it changes the export.
    pub fn modifies(self) -> bool {
        matches!(self, Self::Write { .. } | Self::Trim { .. } | Self::WriteZeroes { .. })
    }
}

/// A request.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Chosen by the client, comes back in every reply.
    pub cookie: u64,
    /// What to do.
    pub command: Command,
    /// First byte.
    pub offset: u64,
    /// Bytes.
    pub length: u32,
}

impl Request {
    /// The byte after the last, if there is such a number.
    pub fn end(&self) -> Option<u64> {
        self.offset.checked_add(u64::from(self.length))
    }

    /// Appends the 28 bytes of the header.
    pub(crate) fn encode(&self, out: &mut Vec<u8>) {
        let (kind, flags) = self.command.encode();
        out.put_u32(wire::REQUEST);
        out.put_u16(flags);
        out.put_u16(kind);
        out.put_u64(self.cookie);
        out.put_u64(self.offset);
        out.put_u32(self.length);
    }

    /// Reads a header; `None` while it is not all there. Also gives the flags that do not belong to the command.
    pub(crate) fn decode(input: &[u8]) -> Result<Option<(Self, u16)>, Violation> {
        let Some(header) = input.first_chunk::<REQUEST_BYTES>() else { return Ok(None) };
        let mut cursor = Cursor::new(header);
        let mut fields =
            || Some((cursor.u32()?, cursor.u16()?, cursor.u16()?, cursor.u64()?, cursor.u64()?, cursor.u32()?));
        let Some((magic, flags, kind, cookie, offset, length)) = fields() else { return Ok(None) };
        if magic != wire::REQUEST {
            return Err(Violation::Magic { expected: "a request", found: magic.into() });
        }
        let (command, excess) = Command::decode(kind, flags);
        Ok(Some((Self { cookie, command, offset, length }, excess)))
    }
}
