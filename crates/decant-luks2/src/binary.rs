//! The binary header: 512 bytes in use of 4096, once at byte 0 and once behind the first JSON area.
//!
//! ```text
//!   0   6  magic      "LUKS\xba\xbe" first copy, "SKUL\xba\xbe" second
//!   6   2  version    2                              (all numbers big-endian)
//!   8   8  hdr_size   bytes of this header with its JSON area
//!  16   8  seqid      grows with each update; the higher valid copy wins
//!  24  48  label      text, NUL-padded, like the next ones
//!  72  32  checksum algorithm, "sha256"
//! 104  64  salt       random, different in each copy, so that copies never deduplicate
//! 168  40  uuid
//! 208  48  subsystem
//! 256   8  hdr_offset where this copy lies
//! 264 184  zeros
//! 448  64  checksum of header and JSON area, itself taken as zeros
//! ```
//! (LUKS2 on-disk format 1.1 §2; cryptsetup lib/luks2/luks2.h `struct luks2_hdr_disk`.)

use aws_lc_rs::digest;

use crate::error::Damage;

/// Bytes that the binary header occupies before its JSON area.
pub(crate) const BINARY_BYTES: u64 = 4096;
/// The sizes a header with its JSON area may have (format 1.1 §2.2), and so where the second copy may start.
pub(crate) const SIZES: [u64; 9] =
    [0x4000, 0x8000, 0x1_0000, 0x2_0000, 0x4_0000, 0x8_0000, 0x10_0000, 0x20_0000, 0x40_0000];

const VERSION: u16 = 2;
const CHECKSUM_AT: usize = 448;
const CHECKSUM_BYTES: usize = 64;

/// Which of the two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum HeaderCopy {
    /// At byte 0.
    Primary,
    /// Behind the first one's JSON area.
    Secondary,
}

impl HeaderCopy {
    fn magic(self) -> &'static [u8; 6] {
        match self {
            Self::Primary => b"LUKS\xba\xbe",
            Self::Secondary => b"SKUL\xba\xbe",
        }
    }
}

/// The fields of one copy.
#[derive(Clone)]
pub(crate) struct Binary {
    pub(crate) header_bytes: u64,
    pub(crate) seqid: u64,
    pub(crate) label: String,
    pub(crate) algorithm: String,
    pub(crate) uuid: String,
    pub(crate) subsystem: String,
    pub(crate) salt: [u8; 64],
    pub(crate) offset: u64,
}

/// The first fields of a copy, read before its size is known. Says how many bytes the whole copy has.
pub(crate) fn peek(start: &[u8], copy: HeaderCopy, at: u64) -> Result<u64, Damage> {
    if start.get(..6) != Some(copy.magic()) {
        return Err(Damage::Magic);
    }
    if field(start, 6).map(u16::from_be_bytes) != Some(VERSION) {
        return Err(Damage::Version);
    }
    let size = field(start, 8).map(u64::from_be_bytes).ok_or(Damage::Size)?;
    if !SIZES.contains(&size) || (copy == HeaderCopy::Secondary && size != at) {
        return Err(Damage::Size);
    }
    if field(start, 256).map(u64::from_be_bytes) != Some(at) {
        return Err(Damage::Position);
    }
    Ok(size)
}

/// Decodes a whole copy, checksum first. `bytes` are exactly what [`peek`] asked for.
pub(crate) fn decode(bytes: &[u8], copy: HeaderCopy, at: u64) -> Result<Binary, Damage> {
    let header_bytes = peek(bytes, copy, at)?;
    if bytes.len() as u64 != header_bytes {
        return Err(Damage::Size);
    }
    let algorithm = text(bytes, 72, 32);
    let stored: [u8; CHECKSUM_BYTES] = field(bytes, CHECKSUM_AT).ok_or(Damage::Size)?;
    let computed = checksum(&algorithm, bytes).ok_or(Damage::Algorithm)?;
    let (head, rest) = stored.split_at_checked(computed.as_ref().len()).ok_or(Damage::Algorithm)?;
    if head != computed.as_ref() || rest.iter().any(|byte| *byte != 0) {
        return Err(Damage::Checksum);
    }
    Ok(Binary {
        header_bytes,
        seqid: field(bytes, 16).map(u64::from_be_bytes).ok_or(Damage::Size)?,
        label: text(bytes, 24, 48),
        algorithm,
        uuid: text(bytes, 168, 40),
        subsystem: text(bytes, 208, 48),
        salt: field(bytes, 104).ok_or(Damage::Size)?,
        offset: at,
    })
}

/// Encodes a copy with its JSON area, checksummed with SHA-256 unless the fields name another known algorithm.
///
/// # Panics
/// If the JSON does not fit or a text is too long: the caller checked both.
pub(crate) fn encode(fields: &Binary, copy: HeaderCopy, json: &[u8]) -> Vec<u8> {
    let mut bytes = vec![0u8; fields.header_bytes as usize];
    let mut put = |at: usize, value: &[u8]| bytes[at..at + value.len()].copy_from_slice(value);
    put(0, copy.magic());
    put(6, &VERSION.to_be_bytes());
    put(8, &fields.header_bytes.to_be_bytes());
    put(16, &fields.seqid.to_be_bytes());
    put(24, fields.label.as_bytes());
    put(72, fields.algorithm.as_bytes());
    put(104, &fields.salt);
    put(168, fields.uuid.as_bytes());
    put(208, fields.subsystem.as_bytes());
    put(256, &fields.offset.to_be_bytes());
    put(BINARY_BYTES as usize, json);
    let sum = checksum(&fields.algorithm, &bytes).expect("a header is made with a known checksum algorithm");
    bytes[CHECKSUM_AT..CHECKSUM_AT + sum.as_ref().len()].copy_from_slice(sum.as_ref());
    bytes
}

fn checksum(algorithm: &str, bytes: &[u8]) -> Option<digest::Digest> {
    let algorithm = match algorithm {
        "sha256" => &digest::SHA256,
        "sha384" => &digest::SHA384,
        "sha512" => &digest::SHA512,
        _ => return None,
    };
    let mut context = digest::Context::new(algorithm);
    context.update(bytes.get(..CHECKSUM_AT)?);
    context.update(&[0; CHECKSUM_BYTES]);
    context.update(bytes.get(CHECKSUM_AT + CHECKSUM_BYTES..)?);
    Some(context.finish())
}

fn field<const N: usize>(bytes: &[u8], at: usize) -> Option<[u8; N]> {
    bytes.get(at..)?.first_chunk().copied()
}

/// A NUL-padded text. Only what prints is kept: a label goes to terminals.
fn text(bytes: &[u8], at: usize, length: usize) -> String {
    let raw = bytes.get(at..at.saturating_add(length)).unwrap_or_default();
    let end = raw.iter().position(|byte| *byte == 0).unwrap_or(raw.len());
    raw.iter().take(end).map(|byte| char::from(*byte)).filter(|c| c.is_ascii_graphic() || *c == ' ').collect()
}
