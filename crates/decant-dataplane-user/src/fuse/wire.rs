//! The part of the FUSE protocol that one file needs: requests read, replies made.
//!
//! Source: include/uapi/linux/fuse.h of Linux 6.9, protocol 7.40. All numbers are in the machine's own byte order.
//! Requests come from the kernel, so what does not parse is answered with EINVAL and never trusted with an index.

/// Bytes of `struct fuse_in_header`.
pub const IN_HEADER_BYTES: usize = 40;
/// Bytes of `struct fuse_out_header`.
pub const OUT_HEADER_BYTES: usize = 16;
/// Bytes before the data of a WRITE: the header and `struct fuse_write_in`. Every other request that this file gets says
/// what it has to say in as many bytes.
pub const HEAD_BYTES: usize = IN_HEADER_BYTES + 40;

/// The protocol's major number.
pub const MAJOR: u32 = 7;
/// The minor number that brought FUSE_NOTIFY_RESEND.
pub const MINOR: u32 = 40;

/// The root directory's node.
pub const ROOT_NODE: u64 = 1;
/// The file's node.
pub const FILE_NODE: u64 = 2;

const ASYNC_READ: u64 = 1 << 0;
const BIG_WRITES: u64 = 1 << 5;
/// Direct I/O of many requests at a time: without it one parked read stalls all others.
const ASYNC_DIO: u64 = 1 << 15;
const MAX_PAGES: u64 = 1 << 22;
const INIT_EXT: u64 = 1 << 30;
/// The kernel can be asked to send again what a dead server left unanswered (Linux 6.9).
const HAS_RESEND: u64 = 1 << 39;

/// Requests in flight that the kernel sends before it queues: all it can count.
const MAX_BACKGROUND: u16 = u16::MAX;
/// Pages of one request.
const PAGES: u16 = 256;
/// Data bytes of one request: 256 pages.
pub const MAX_DATA_BYTES: usize = PAGES as usize * 4096;

const OPEN_DIRECT_IO: u32 = 1 << 0;
const OPEN_NO_FLUSH: u32 = 1 << 5;
const OPEN_PARALLEL_DIRECT_WRITES: u32 = 1 << 6;

const NOTIFY_RESEND: i32 = 7;

const FALLOCATE_PUNCH_HOLE: u32 = 0x02;
const FALLOCATE_ZERO_RANGE: u32 = 0x10;
const FALLOCATE_KEEP_SIZE: u32 = 0x01;

const MODE_DIRECTORY: u32 = 0o040_700;
const MODE_FILE: u32 = 0o100_600;
/// Seconds that the kernel may keep names and attributes: they never change.
const FOREVER_S: u64 = 1 << 30;

/// What the kernel wants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Operation {
    /// Negotiation.
    Init {
        /// The kernel's major number.
        major: u32,
        /// What it offers.
        flags: u64,
    },
    /// A name in a directory.
    Lookup {
        /// Whether it is the file's.
        is_file: bool,
    },
    /// Attributes of a node.
    Attributes,
    /// Opens a node.
    Open,
    /// Reads.
    Read {
        /// Bytes.
        offset: u64,
        /// Bytes.
        size: u32,
    },
    /// Writes the data that follows the head.
    Write {
        /// Bytes.
        offset: u64,
        /// Bytes.
        size: u32,
    },
    /// Makes what was acknowledged durable.
    Sync,
    /// The range reads as zeros from here on.
    Discard {
        /// Bytes.
        offset: u64,
        /// Bytes.
        length: u64,
    },
    /// The issuer of another request got a signal; wants no reply.
    Interrupt {
        /// The other request's.
        unique: u64,
    },
    /// An allocation that is neither a hole nor zeros.
    UnsupportedAllocation,
    /// Size of the file system, block size of the device's discards.
    FileSystem,
    /// Nothing to do but to say yes.
    Acknowledge,
    /// Wants no reply.
    Silent,
    /// Not served; the kernel remembers that.
    Unknown,
    /// Shorter than its own fields.
    Malformed,
}

/// A request's identity and what it asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Request {
    /// Comes back with the reply, as it is: the top bit marks one that a dead server had already been given.
    pub unique: u64,
    /// The node it is about.
    pub node: u64,
    /// What it asks for.
    pub operation: Operation,
}

fn u32_at(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at.checked_add(4)?)?.try_into().ok().map(u32::from_ne_bytes)
}

fn u64_at(bytes: &[u8], at: usize) -> Option<u64> {
    bytes.get(at..at.checked_add(8)?)?.try_into().ok().map(u64::from_ne_bytes)
}

impl Request {
    /// Reads a request from its first bytes, at most [`HEAD_BYTES`]. `None`: not even a header.
    pub fn parse(head: &[u8]) -> Option<Self> {
        let opcode = u32_at(head, 4)?;
        let unique = u64_at(head, 8)?;
        let node = u64_at(head, 16)?;
        let arguments = head.get(IN_HEADER_BYTES..)?;
        let operation = operation(opcode, arguments).unwrap_or(Operation::Malformed);
        Some(Self { unique, node, operation })
    }
}

fn operation(opcode: u32, arguments: &[u8]) -> Option<Operation> {
    Some(match opcode {
        1 => Operation::Lookup { is_file: arguments.starts_with(b"volume\0") },
        // FORGET, BATCH_FORGET.
        2 | 42 => Operation::Silent,
        36 => Operation::Interrupt { unique: u64_at(arguments, 0)? },
        3 => Operation::Attributes,
        14 => Operation::Open,
        15 => Operation::Read { offset: u64_at(arguments, 8)?, size: u32_at(arguments, 16)? },
        16 => Operation::Write { offset: u64_at(arguments, 8)?, size: u32_at(arguments, 16)? },
        17 => Operation::FileSystem,
        // RELEASE, FLUSH (of a close: no promise of durability), DESTROY.
        18 | 25 | 38 => Operation::Acknowledge,
        20 => Operation::Sync,
        26 => {
            let low = u32_at(arguments, 12)?;
            let high = if u64::from(low) & INIT_EXT != 0 { u32_at(arguments, 16)? } else { 0 };
            Operation::Init { major: u32_at(arguments, 0)?, flags: u64::from(high) << 32 | u64::from(low) }
        }
        43 => {
            let mode = u32_at(arguments, 24)?;
            if matches!(mode & !FALLOCATE_KEEP_SIZE, FALLOCATE_PUNCH_HOLE | FALLOCATE_ZERO_RANGE) {
                Operation::Discard { offset: u64_at(arguments, 8)?, length: u64_at(arguments, 16)? }
            } else {
                Operation::UnsupportedAllocation
            }
        }
        _ => Operation::Unknown,
    })
}

/// A reply's body of at most 128 bytes, made without allocating.
#[derive(Debug, Clone, Copy)]
pub struct Body {
    bytes: [u8; 128],
    length: usize,
}

impl Body {
    /// Nothing: the reply is a header alone.
    pub const EMPTY: Self = Self { bytes: [0; 128], length: 0 };

    fn u16(mut self, value: u16) -> Self {
        self.append(&value.to_ne_bytes());
        self
    }

    fn u32(mut self, value: u32) -> Self {
        self.append(&value.to_ne_bytes());
        self
    }

    fn u64(mut self, value: u64) -> Self {
        self.append(&value.to_ne_bytes());
        self
    }

    fn zeros(mut self, count: usize) -> Self {
        self.length += count;
        debug_assert!(self.length <= self.bytes.len(), "a reply's body is at most 128 bytes");
        self
    }

    fn append(&mut self, bytes: &[u8]) {
        let end = self.length + bytes.len();
        self.bytes[self.length..end].copy_from_slice(bytes);
        self.length = end;
    }

    /// The bytes of the body.
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }

    /// `struct fuse_init_out`: what of the kernel's `flags` this server uses.
    pub fn init(flags: u64) -> Self {
        let chosen = flags & (ASYNC_READ | BIG_WRITES | ASYNC_DIO | MAX_PAGES | INIT_EXT | HAS_RESEND);
        Self::EMPTY
            .u32(MAJOR)
            .u32(MINOR)
            .u32(0) // No read-ahead: the loop device does its own.
            .u32(chosen as u32)
            .u16(MAX_BACKGROUND)
            .u16(MAX_BACKGROUND / 4 * 3)
            .u32(MAX_DATA_BYTES as u32)
            .u32(1)
            .u16(PAGES)
            .u16(0)
            .u32((chosen >> 32) as u32)
            .zeros(28)
    }

    /// `struct fuse_entry_out` of the file of `size` bytes.
    pub fn entry(size: u64) -> Self {
        Self::EMPTY
            .u64(FILE_NODE)
            .u64(0)
            .u64(FOREVER_S)
            .u64(FOREVER_S)
            .u32(0)
            .u32(0)
            .attributes_of(FILE_NODE, Some(size))
    }

    /// `struct fuse_attr_out` of `node`: of a file of `size` bytes, or of a directory.
    pub fn attributes(node: u64, size: Option<u64>) -> Self {
        Self::EMPTY.u64(FOREVER_S).u32(0).u32(0).attributes_of(node, size)
    }

    fn attributes_of(self, node: u64, size: Option<u64>) -> Self {
        let (mode, size) = size.map_or((MODE_DIRECTORY, 0), |size| (MODE_FILE, size));
        // Times, owner and device number are zero: root's, and nobody looks.
        self.u64(node).u64(size).u64(size.div_ceil(512)).zeros(36).u32(mode).u32(1).zeros(12).u32(4096).u32(0)
    }

    /// `struct fuse_open_out`: direct, with writes in parallel, and without a FLUSH at each close.
    pub fn open() -> Self {
        Self::EMPTY.u64(0).u32(OPEN_DIRECT_IO | OPEN_PARALLEL_DIRECT_WRITES | OPEN_NO_FLUSH).u32(0)
    }

    /// `struct fuse_write_out`.
    pub fn written(size: u32) -> Self {
        Self::EMPTY.u32(size).u32(0)
    }

    /// `struct fuse_statfs_out`. Its block size becomes the loop device's discard granularity.
    pub fn file_system(size: u64) -> Self {
        Self::EMPTY.u64(size / 4096).zeros(32).u32(4096).u32(255).u32(4096).u32(0).zeros(24)
    }
}

/// `struct fuse_out_header` of a reply with `body_bytes` bytes after it, or of an error.
pub fn reply_header(unique: u64, error: Option<rustix::io::Errno>, body_bytes: usize) -> [u8; OUT_HEADER_BYTES] {
    let mut header = [0; OUT_HEADER_BYTES];
    header[0..4].copy_from_slice(&((OUT_HEADER_BYTES + body_bytes) as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&error.map_or(0, |errno| -errno.raw_os_error()).to_ne_bytes());
    header[8..16].copy_from_slice(&unique.to_ne_bytes());
    header
}

/// The notification that makes the kernel send again every request that a dead server read and did not answer
/// (`fuse_notify_resend` in fs/fuse/dev.c, Linux 6.9).
pub fn resend_notification() -> [u8; OUT_HEADER_BYTES] {
    let mut header = [0; OUT_HEADER_BYTES];
    header[0..4].copy_from_slice(&(OUT_HEADER_BYTES as u32).to_ne_bytes());
    header[4..8].copy_from_slice(&NOTIFY_RESEND.to_ne_bytes());
    header
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(opcode: u32, arguments: &[u8]) -> Vec<u8> {
        let mut bytes = Vec::new();
        bytes.extend(((IN_HEADER_BYTES + arguments.len()) as u32).to_ne_bytes());
        bytes.extend(opcode.to_ne_bytes());
        bytes.extend((9u64 | 1 << 63).to_ne_bytes());
        bytes.extend(FILE_NODE.to_ne_bytes());
        bytes.resize(IN_HEADER_BYTES, 0);
        bytes.extend(arguments);
        bytes
    }

    #[test]
    fn requests_parse_and_short_ones_are_malformed() {
        let mut write = vec![0; 40];
        write[8..16].copy_from_slice(&8192u64.to_ne_bytes());
        write[16..20].copy_from_slice(&4096u32.to_ne_bytes());
        let parsed = Request::parse(&request(16, &write)).unwrap();
        assert_eq!(parsed.operation, Operation::Write { offset: 8192, size: 4096 });
        assert_eq!(parsed.unique, 9 | 1 << 63, "the mark of a request sent again is part of its name");
        let interrupt = Request::parse(&request(36, &7u64.to_ne_bytes())).unwrap();
        assert_eq!(interrupt.operation, Operation::Interrupt { unique: 7 });
        for opcode in [15, 16, 26, 36, 43] {
            assert_eq!(Request::parse(&request(opcode, &[0; 3])).unwrap().operation, Operation::Malformed, "{opcode}");
        }
        for length in 0..IN_HEADER_BYTES {
            assert_eq!(Request::parse(&request(15, &[])[..length]), None);
        }
        assert_eq!(Request::parse(&request(1, b"volume\0")).unwrap().operation, Operation::Lookup { is_file: true });
        assert_eq!(Request::parse(&request(1, b"volume2\0")).unwrap().operation, Operation::Lookup { is_file: false });
        assert_eq!(Request::parse(&request(9999, &[])).unwrap().operation, Operation::Unknown);
    }

    #[test]
    fn only_holes_and_zeros_are_allocations() {
        for (mode, discards) in [(0x03u32, true), (0x10, true), (0x11, true), (0, false), (0x01, false), (0x08, false)]
        {
            let mut arguments = vec![0; 32];
            arguments[24..28].copy_from_slice(&mode.to_ne_bytes());
            let operation = Request::parse(&request(43, &arguments)).unwrap().operation;
            assert_eq!(matches!(operation, Operation::Discard { .. }), discards, "mode {mode:#x}");
        }
    }

    #[test]
    fn replies_have_the_sizes_of_the_kernel_header() {
        for (body, bytes) in [
            (Body::init(u64::MAX), 64),
            (Body::entry(1), 128),
            (Body::attributes(FILE_NODE, Some(1)), 104),
            (Body::open(), 16),
            (Body::written(1), 8),
            (Body::file_system(1), 80),
        ] {
            assert_eq!(body.as_bytes().len(), bytes);
        }
    }
}
