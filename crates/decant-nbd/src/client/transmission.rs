//! Replies, as the client reads them.

use super::{Client, Event};
use crate::error::{ErrorCode, Violation};
use crate::export::Context;
use crate::request::Command;
use crate::wire::{self, CHUNK_BYTES, Cursor, MAX_FOREIGN_DESCRIPTORS, SIMPLE_BYTES, chunk};

/// What the next bytes are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Inbound {
    /// The header of a reply or chunk.
    Header,
    /// The last chunk of this request was read, its payload is with the driver; it is done.
    Finishing { cookie: u64 },
    /// Descriptors of a block status chunk.
    Descriptors { cookie: u64, context: Context, offset: u64, left: u32, last: bool },
}

/// A chunk's header.
#[derive(Debug, Clone, Copy)]
struct Chunk {
    last: bool,
    kind: u16,
    cookie: u64,
    length: u32,
}

type Handled<'a> = Result<(&'a [u8], Option<Event>), Violation>;
/// The same, but `None` while the chunk is not all there.
type Taken<'a> = Result<Option<(&'a [u8], Option<Event>)>, Violation>;
/// Longest payload of an error chunk: code, length, message, offset.
const MAX_ERROR_CHUNK: u32 = 4 + 2 + 4096 + 8;

impl Client {
    pub(super) fn handle_reply<'a>(&mut self, input: &'a [u8]) -> Handled<'a> {
        match self.inbound {
            Inbound::Finishing { cookie } => {
                self.inbound = Inbound::Header;
                Ok((input, Some(self.finish(cookie)?)))
            }
            Inbound::Descriptors { cookie, context, offset, left, last } => {
                self.handle_descriptor(input, Descriptor { cookie, context, offset, left, last })
            }
            Inbound::Header => {
                let mut cursor = Cursor::new(input);
                let Some(magic) = cursor.u32() else { return Ok((input, None)) };
                match magic {
                    wire::SIMPLE_REPLY => self.handle_simple(input),
                    wire::STRUCTURED_REPLY if self.structured => self.handle_chunk(input),
                    other => Err(Violation::Magic { expected: "a reply", found: other.into() }),
                }
            }
        }
    }

    /// The request's answer is complete; it leaves the table.
    fn finish(&mut self, cookie: u64) -> Result<Event, Violation> {
        let contexts = self.contexts();
        let slot = self.table.find(cookie)?;
        let (tag, error) = (slot.tag, slot.error);
        if error.is_none() && !slot.is_complete(contexts) {
            return Err(Violation::Incomplete);
        }
        self.table.remove(cookie);
        Ok(Event::Done { tag, result: error.map_or(Ok(()), Err) })
    }

    fn handle_simple<'a>(&mut self, input: &'a [u8]) -> Handled<'a> {
        let structured = self.structured;
        let Some((header, rest)) = input.split_first_chunk::<SIMPLE_BYTES>() else { return Ok((input, None)) };
        let mut cursor = Cursor::new(header);
        let mut fields = || Some((cursor.u32()?, cursor.u32()?, cursor.u64()?));
        let Some((_, error, cookie)) = fields() else { return Ok((input, None)) };
        let slot = self.table.find(cookie)?;
        slot.error = ErrorCode::from_raw(error);
        let (tag, request) = (slot.tag, slot.request);
        match request.command {
            _ if error != 0 => {}
            Command::Read { .. } if !structured => {
                slot.cover(request.offset, request.length)?;
                self.inbound = Inbound::Finishing { cookie };
                return Ok((rest, Some(Event::Data { tag, offset: request.offset, length: request.length })));
            }
            // With structured replies agreed, what has content comes in chunks.
            Command::Read { .. } | Command::BlockStatus { .. } => return Err(Violation::WrongChunk(chunk::NONE)),
            _ => {}
        }
        Ok((rest, Some(self.finish(cookie)?)))
    }

    fn handle_chunk<'a>(&mut self, input: &'a [u8]) -> Handled<'a> {
        let Some((header, rest)) = input.split_first_chunk::<CHUNK_BYTES>() else { return Ok((input, None)) };
        let mut cursor = Cursor::new(header);
        let mut fields = || Some((cursor.u32()?, cursor.u16()?, cursor.u16()?, cursor.u64()?, cursor.u32()?));
        let Some((_, flags, kind, cookie, length)) = fields() else { return Ok((input, None)) };
        let head = Chunk { last: flags & chunk::DONE != 0, kind, cookie, length };
        let command = self.table.find(cookie)?.request.command;
        let is_read = matches!(command, Command::Read { .. });
        let is_status = matches!(command, Command::BlockStatus { .. });
        let handled = match kind {
            chunk::NONE if length == 0 && head.last => Some((rest, None)),
            chunk::NONE => return Err(Violation::Malformed("empty reply chunk")),
            chunk::OFFSET_DATA if is_read => self.handle_data(head, rest)?,
            chunk::OFFSET_HOLE if is_read => self.handle_hole(head, rest)?,
            chunk::BLOCK_STATUS if is_status => return self.handle_block_status(head, input, rest),
            kind if kind & chunk::ERROR_BIT != 0 => self.handle_error(head, rest)?.map(|rest| (rest, None)),
            other => return Err(Violation::WrongChunk(other)),
        };
        let Some((rest, event)) = handled else { return Ok((input, None)) };
        if head.last {
            self.inbound = Inbound::Finishing { cookie };
        }
        Ok((rest, event))
    }

    fn handle_data<'a>(&mut self, head: Chunk, input: &'a [u8]) -> Taken<'a> {
        let mut cursor = Cursor::new(input);
        let Some(length) = head.length.checked_sub(8) else { return Err(Violation::Malformed("data chunk")) };
        let Some(offset) = cursor.u64() else { return Ok(None) };
        let slot = self.table.find(head.cookie)?;
        slot.cover(offset, length)?;
        let event = Event::Data { tag: slot.tag, offset, length };
        Ok(Some((cursor.rest(), Some(event))))
    }

    fn handle_hole<'a>(&mut self, head: Chunk, input: &'a [u8]) -> Taken<'a> {
        if head.length != 12 {
            return Err(Violation::Malformed("hole chunk"));
        }
        let mut cursor = Cursor::new(input);
        let mut fields = || Some((cursor.u64()?, cursor.u32()?));
        let Some((offset, length)) = fields() else { return Ok(None) };
        let slot = self.table.find(head.cookie)?;
        slot.cover(offset, length)?;
        let event = Event::Hole { tag: slot.tag, offset, length };
        Ok(Some((cursor.rest(), Some(event))))
    }

    fn handle_error<'a>(&mut self, head: Chunk, input: &'a [u8]) -> Result<Option<&'a [u8]>, Violation> {
        const MALFORMED: Violation = Violation::Malformed("error chunk");
        if head.length > MAX_ERROR_CHUNK {
            let limit = MAX_ERROR_CHUNK.into();
            return Err(Violation::TooLong { what: "an error chunk", length: head.length.into(), limit });
        }
        let mut cursor = Cursor::new(input);
        let size = usize::try_from(head.length).map_err(|_| MALFORMED)?;
        let Some(body) = cursor.bytes(size) else { return Ok(None) };
        let mut fields = Cursor::new(body);
        let error = fields.u32().ok_or(MALFORMED)?;
        let message = fields.u16().ok_or(MALFORMED)?;
        fields.bytes(message.into()).ok_or(MALFORMED)?;
        match head.kind {
            chunk::ERROR if !fields.is_empty() => return Err(MALFORMED),
            chunk::ERROR_OFFSET if fields.u64().is_none() || !fields.is_empty() => return Err(MALFORMED),
            _ => {}
        }
        let error = ErrorCode::from_raw(error).ok_or(MALFORMED)?;
        self.table.find(head.cookie)?.error.get_or_insert(error);
        Ok(Some(cursor.rest()))
    }

    fn handle_block_status<'a>(&mut self, head: Chunk, input: &'a [u8], rest: &'a [u8]) -> Handled<'a> {
        const MALFORMED: Violation = Violation::Malformed("block status chunk");
        let bytes = head.length.checked_sub(4).ok_or(MALFORMED)?;
        let left = bytes.checked_div(8).unwrap_or_default();
        if left == 0 || !bytes.is_multiple_of(8) {
            return Err(MALFORMED);
        }
        if left > MAX_FOREIGN_DESCRIPTORS {
            let limit = MAX_FOREIGN_DESCRIPTORS.into();
            return Err(Violation::TooLong { what: "a block status chunk", length: left.into(), limit });
        }
        let mut cursor = Cursor::new(rest);
        let Some(id) = cursor.u32() else { return Ok((input, None)) };
        let [allocation, digests] = self.context_ids;
        let context = match Some(id) {
            id if id == allocation => Context::Allocation,
            id if id == digests => Context::Digests,
            _ => return Err(Violation::Malformed("block status of a context that was not agreed")),
        };
        let slot = self.table.find(head.cookie)?;
        slot.answer(context)?;
        let offset = slot.request.offset;
        self.inbound = Inbound::Descriptors { cookie: head.cookie, context, offset, left, last: head.last };
        Ok((cursor.rest(), None))
    }

    fn handle_descriptor<'a>(&mut self, input: &'a [u8], at: Descriptor) -> Handled<'a> {
        let Descriptor { cookie, context, offset, left, last } = at;
        let mut cursor = Cursor::new(input);
        let mut fields = || Some((cursor.u32()?, cursor.u32()?));
        let Some((length, flags)) = fields() else { return Ok((input, None)) };
        let slot = self.table.find(cookie)?;
        let outside = Violation::OutOfRange { offset, length: length.into() };
        let limit = slot.request.end().unwrap_or(u64::MAX);
        let end = offset.checked_add(length.into()).ok_or(outside.clone())?;
        let left = left.saturating_sub(1);
        // Only the last descriptor may reach past what was asked.
        if length == 0 || offset >= limit || (end > limit && left > 0) {
            return Err(outside);
        }
        let within = u32::try_from(limit.min(end).saturating_sub(offset)).unwrap_or(length);
        let event = Event::Extent { tag: slot.tag, context, offset, length: within, flags };
        self.inbound = match (left, last) {
            (0, true) => Inbound::Finishing { cookie },
            (0, false) => Inbound::Header,
            _ => Inbound::Descriptors { cookie, context, offset: end, left, last },
        };
        Ok((cursor.rest(), Some(event)))
    }
}

/// Where in a block status chunk the stream is.
#[derive(Debug, Clone, Copy)]
struct Descriptor {
    cookie: u64,
    context: Context,
    offset: u64,
    left: u32,
    last: bool,
}
