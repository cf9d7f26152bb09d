//! Magic numbers, limits, and reading and writing of fixed fields.

/// "NBDMAGIC", the first bytes of a greeting.
pub(crate) const NBDMAGIC: u64 = 0x4e42_444d_4147_4943;
/// "IHAVEOPT", before the server's flags and before each option.
pub(crate) const IHAVEOPT: u64 = 0x4948_4156_454f_5054;
/// Before each reply to an option.
pub(crate) const OPTION_REPLY: u64 = 0x0003_e889_0455_65a9;
/// Before each request.
pub(crate) const REQUEST: u32 = 0x2560_9513;
/// Before each simple reply.
pub(crate) const SIMPLE_REPLY: u32 = 0x6744_6698;
/// Before each structured reply chunk.
pub(crate) const STRUCTURED_REPLY: u32 = 0x668e_33ef;

/// Handshake flags, both sides: fixed newstyle (bit 0), no 124 zeroes after NBD_OPT_EXPORT_NAME (bit 1).
pub(crate) const FLAG_FIXED_NEWSTYLE: u16 = 1;
pub(crate) const FLAG_NO_ZEROES: u16 = 2;

/// Options, from the client.
pub(crate) mod option {
    pub(crate) const EXPORT_NAME: u32 = 1;
    pub(crate) const ABORT: u32 = 2;
    pub(crate) const LIST: u32 = 3;
    pub(crate) const STARTTLS: u32 = 5;
    pub(crate) const INFO: u32 = 6;
    pub(crate) const GO: u32 = 7;
    pub(crate) const STRUCTURED_REPLY: u32 = 8;
    pub(crate) const LIST_META_CONTEXT: u32 = 9;
    pub(crate) const SET_META_CONTEXT: u32 = 10;
}

/// Replies to options, from the server.
pub(crate) mod reply {
    pub(crate) const ACK: u32 = 1;
    pub(crate) const SERVER: u32 = 2;
    pub(crate) const INFO: u32 = 3;
    pub(crate) const META_CONTEXT: u32 = 4;
    /// Set in every error.
    pub(crate) const ERROR: u32 = 1 << 31;
    pub(crate) const ERR_UNSUP: u32 = ERROR | 1;
    pub(crate) const ERR_POLICY: u32 = ERROR | 2;
    pub(crate) const ERR_INVALID: u32 = ERROR | 3;
    pub(crate) const ERR_PLATFORM: u32 = ERROR | 4;
    pub(crate) const ERR_TLS_REQD: u32 = ERROR | 5;
    pub(crate) const ERR_UNKNOWN: u32 = ERROR | 6;
    pub(crate) const ERR_SHUTDOWN: u32 = ERROR | 7;
    pub(crate) const ERR_BLOCK_SIZE_REQD: u32 = ERROR | 8;
    pub(crate) const ERR_TOO_BIG: u32 = ERROR | 9;
}

/// What NBD_OPT_INFO and NBD_OPT_GO can ask for.
pub(crate) mod info {
    pub(crate) const EXPORT: u16 = 0;
    pub(crate) const NAME: u16 = 1;
    pub(crate) const BLOCK_SIZE: u16 = 3;
}

/// Types of structured reply chunks.
pub(crate) mod chunk {
    pub(crate) const NONE: u16 = 0;
    pub(crate) const OFFSET_DATA: u16 = 1;
    pub(crate) const OFFSET_HOLE: u16 = 2;
    pub(crate) const BLOCK_STATUS: u16 = 5;
    /// Set in every error.
    pub(crate) const ERROR_BIT: u16 = 1 << 15;
    pub(crate) const ERROR: u16 = ERROR_BIT | 1;
    pub(crate) const ERROR_OFFSET: u16 = ERROR_BIT | 2;
    /// Flag: the last chunk of this reply.
    pub(crate) const DONE: u16 = 1;
}

/// Longest string the protocol allows (export names, contexts, messages), in bytes ("Terminology", string limit 4096).
pub const MAX_NAME: usize = 4096;
/// Longest option data, or option reply, that is looked at: room for two strings of the greatest length and the fixed
/// fields around them. A longer option is skipped and refused.
pub(crate) const MAX_OPTION: usize = 16 * 1024;
/// An option longer than this is hostile, and ends the connection instead of being skipped.
pub(crate) const MAX_SKIPPED_OPTION: u32 = 1024 * 1024;
/// The largest piece of stream that a machine needs to see at once; a driver's input buffer must hold this much.
pub const MAX_UNIT: usize = MAX_OPTION + 64;
/// Largest payload of a read or write, in bytes; the protocol's advice for clients that know nothing of the server.
pub const MAX_PAYLOAD: u32 = 32 * 1024 * 1024;
/// Most descriptors in one block status chunk: one for each 4 KiB of the largest payload.
pub const MAX_DESCRIPTORS: usize = 8192;
/// Most descriptors that are accepted from a server (they are never held, so this bounds time, not memory).
pub(crate) const MAX_FOREIGN_DESCRIPTORS: u32 = 1 << 20;
/// Most options in one handshake; a peer that haggles longer is not going to agree.
pub(crate) const MAX_OPTIONS: u32 = 64;
/// Bytes of a request header.
pub const REQUEST_BYTES: usize = 28;
/// Bytes of a simple reply's header.
pub(crate) const SIMPLE_BYTES: usize = 16;
/// Bytes of a chunk's header.
pub(crate) const CHUNK_BYTES: usize = 20;

/// Takes fixed fields off the front of a slice. `None`: too short; nothing is taken then.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cursor<'a> {
    rest: &'a [u8],
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(rest: &'a [u8]) -> Self {
        Self { rest }
    }

    pub(crate) fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (head, rest) = self.rest.split_first_chunk::<N>()?;
        self.rest = rest;
        Some(*head)
    }

    pub(crate) fn u16(&mut self) -> Option<u16> {
        self.array().map(u16::from_be_bytes)
    }

    pub(crate) fn u32(&mut self) -> Option<u32> {
        self.array().map(u32::from_be_bytes)
    }

    pub(crate) fn u64(&mut self) -> Option<u64> {
        self.array().map(u64::from_be_bytes)
    }

    pub(crate) fn bytes(&mut self, count: usize) -> Option<&'a [u8]> {
        let (head, rest) = self.rest.split_at_checked(count)?;
        self.rest = rest;
        Some(head)
    }

    /// A string as the protocol has them: a 32-bit length, then that many bytes.
    pub(crate) fn string(&mut self) -> Option<&'a [u8]> {
        let mut ahead = *self;
        let length = usize::try_from(ahead.u32()?).ok()?;
        let bytes = ahead.bytes(length)?;
        *self = ahead;
        Some(bytes)
    }

    pub(crate) fn rest(&self) -> &'a [u8] {
        self.rest
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.rest.is_empty()
    }
}

/// Appends fixed fields.
pub(crate) trait Put {
    fn put_u16(&mut self, value: u16);
    fn put_u32(&mut self, value: u32);
    fn put_u64(&mut self, value: u64);
}

impl Put for Vec<u8> {
    fn put_u16(&mut self, value: u16) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u32(&mut self, value: u32) {
        self.extend_from_slice(&value.to_be_bytes());
    }

    fn put_u64(&mut self, value: u64) {
        self.extend_from_slice(&value.to_be_bytes());
    }
}

/// The length of something that is known to be small (a name, a message) as the wire has it.
pub(crate) fn length32(bytes: &[u8]) -> u32 {
    u32::try_from(bytes.len()).unwrap_or(u32::MAX)
}
