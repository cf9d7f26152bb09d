//! Headers of replies, as the server sends them.

use crate::error::ErrorCode;
use crate::export::Context;
use crate::wire::{self, Put, chunk};

/// The longest reply header, in bytes: a hole chunk. A driver that leaves this much room before its payload can put the
/// header right there and send both with one write.
pub const HEADER_ROOM: usize = 32;

/// The header of a reply or chunk; its payload, if it has one, goes right behind it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ReplyHeader {
    bytes: [u8; HEADER_ROOM],
    length: usize,
}

impl ReplyHeader {
    fn from_fields(write: impl FnOnce(&mut Fields)) -> Self {
        let mut fields = Fields { header: Self { bytes: [0; HEADER_ROOM], length: 0 } };
        write(&mut fields);
        fields.header
    }

    /// A simple reply; for a read that succeeded, all of its data follows.
    pub(crate) fn simple(cookie: u64, error: Option<ErrorCode>) -> Self {
        Self::from_fields(|fields| {
            fields.put(&wire::SIMPLE_REPLY.to_be_bytes());
            fields.put(&error.map_or(0, ErrorCode::raw).to_be_bytes());
            fields.put(&cookie.to_be_bytes());
        })
    }

    /// A chunk's header; `length` counts what follows the header, `more` is the part of that which is written here.
    pub(crate) fn chunk(cookie: u64, kind: u16, done: bool, length: u32, more: &[&[u8]]) -> Self {
        let flags = if done { chunk::DONE } else { 0 };
        Self::from_fields(|fields| {
            fields.put(&wire::STRUCTURED_REPLY.to_be_bytes());
            fields.put(&flags.to_be_bytes());
            fields.put(&kind.to_be_bytes());
            fields.put(&cookie.to_be_bytes());
            fields.put(&length.to_be_bytes());
            for part in more {
                fields.put(part);
            }
        })
    }

    /// OFFSET_DATA; `length` payload bytes follow.
    pub(crate) fn data(cookie: u64, offset: u64, length: u32, done: bool) -> Self {
        Self::chunk(cookie, chunk::OFFSET_DATA, done, length.saturating_add(8), &[&offset.to_be_bytes()])
    }

    /// OFFSET_HOLE.
    pub(crate) fn hole(cookie: u64, offset: u64, length: u32, done: bool) -> Self {
        Self::chunk(cookie, chunk::OFFSET_HOLE, done, 12, &[&offset.to_be_bytes(), &length.to_be_bytes()])
    }

    /// BLOCK_STATUS; `descriptors` descriptors of 8 bytes follow.
    pub(crate) fn block_status(cookie: u64, context: Context, descriptors: u32, done: bool) -> Self {
        let length = descriptors.saturating_mul(8).saturating_add(4);
        Self::chunk(cookie, chunk::BLOCK_STATUS, done, length, &[&context.id().to_be_bytes()])
    }

    /// The bytes to send.
    pub fn as_bytes(&self) -> &[u8] {
        self.bytes.get(..self.length).unwrap_or_default()
    }
}

struct Fields {
    header: ReplyHeader,
}

impl Fields {
    fn put(&mut self, bytes: &[u8]) {
        let end = self.header.length.saturating_add(bytes.len());
        match self.header.bytes.get_mut(self.header.length..end) {
            Some(place) => place.copy_from_slice(bytes),
            None => unreachable!("no header is longer than HEADER_ROOM"),
        }
        self.header.length = end;
    }
}

/// Appends one descriptor of a block status chunk: `length` bytes of export have the status `flags`.
pub fn put_descriptor(out: &mut Vec<u8>, length: u32, flags: u32) {
    out.put_u32(length);
    out.put_u32(flags);
}
