//! Haggling, as the client: one option at a time, each awaited.

use super::{Client, Event, Goal, State};
use crate::error::Violation;
use crate::export::{BlockSizes, Context, ExportInfo, TransmissionFlags};
use crate::wire::{self, Cursor, MAX_NAME, MAX_OPTION, Put, info, length32, option, reply};

/// Most replies to one option; a list of exports is the longest.
const MAX_REPLIES: u32 = 4096;

type Handled<'a> = Result<(&'a [u8], Option<Event>), Violation>;

impl Client {
    pub(super) fn handle_greeting<'a>(&mut self, input: &'a [u8], out: &mut Vec<u8>) -> Handled<'a> {
        let mut cursor = Cursor::new(input);
        let Some(magic) = cursor.u64() else { return Ok((input, None)) };
        if magic != wire::NBDMAGIC {
            return Err(Violation::Magic { expected: "NBDMAGIC", found: magic });
        }
        let Some(style) = cursor.u64() else { return Ok((input, None)) };
        if style != wire::IHAVEOPT {
            return Err(Violation::OldStyle);
        }
        let Some(flags) = cursor.u16() else { return Ok((input, None)) };
        if flags & wire::FLAG_FIXED_NEWSTYLE == 0 {
            return Err(Violation::OldStyle);
        }
        self.zeroes_after_export_name = flags & wire::FLAG_NO_ZEROES == 0;
        out.put_u32(u32::from(flags & (wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES)));
        if self.config.tls {
            ask(option::STARTTLS, &[], out);
            self.state = State::StartTls;
        } else {
            self.haggle(out);
        }
        Ok((cursor.rest(), None))
    }

    /// The first option that counts, in the clear or inside TLS.
    pub(super) fn haggle(&mut self, out: &mut Vec<u8>) {
        debug_assert_eq!(self.config.tls, self.in_tls, "nothing counts that was said in the clear");
        match self.config.goal {
            Goal::List => {
                ask(option::LIST, &[], out);
                self.state = State::Listing;
            }
            Goal::Transmission => {
                ask(option::STRUCTURED_REPLY, &[], out);
                self.state = State::Structured;
            }
        }
    }

    fn ask_contexts(&mut self, out: &mut Vec<u8>) {
        if self.config.contexts.is_empty() || !self.structured {
            return self.ask_go(out);
        }
        let mut data = Vec::with_capacity(128);
        put_string(self.config.export.as_bytes(), &mut data);
        let queries = self.config.contexts.iter().fold(0u32, |count, _| count.saturating_add(1));
        data.put_u32(queries);
        for context in self.config.contexts.iter() {
            put_string(context.name().as_bytes(), &mut data);
        }
        ask(option::SET_META_CONTEXT, &data, out);
        self.state = State::Contexts;
    }

    fn ask_go(&mut self, out: &mut Vec<u8>) {
        let mut data = Vec::with_capacity(128);
        put_string(self.config.export.as_bytes(), &mut data);
        data.put_u16(1);
        data.put_u16(info::BLOCK_SIZE);
        ask(option::GO, &data, out);
        self.state = State::Go;
    }

    fn expected_option(&self) -> (u32, &'static str) {
        match self.state {
            State::StartTls => (option::STARTTLS, "TLS"),
            State::Structured => (option::STRUCTURED_REPLY, "structured replies"),
            State::Contexts => (option::SET_META_CONTEXT, "the metadata contexts"),
            State::Listing => (option::LIST, "to list its exports"),
            _ => (option::GO, "the export"),
        }
    }

    pub(super) fn handle_option_reply<'a>(&mut self, input: &'a [u8], out: &mut Vec<u8>) -> Handled<'a> {
        let mut cursor = Cursor::new(input);
        let mut header = || Some((cursor.u64()?, cursor.u32()?, cursor.u32()?, cursor.u32()?));
        let Some((magic, option, kind, length)) = header() else { return Ok((input, None)) };
        if magic != wire::OPTION_REPLY {
            return Err(Violation::Magic { expected: "an option reply", found: magic });
        }
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        if size > MAX_OPTION {
            let limit = MAX_OPTION as u64;
            return Err(Violation::TooLong { what: "an option reply", length: length.into(), limit });
        }
        let (asked, name) = self.expected_option();
        self.replies = self.replies.saturating_add(1);
        if option != asked {
            return Err(Violation::UnaskedReply { option, reply: kind });
        }
        if self.replies > MAX_REPLIES {
            return Err(Violation::EndlessHandshake);
        }
        let Some(data) = cursor.bytes(size) else {
            self.replies = self.replies.saturating_sub(1);
            return Ok((input, None));
        };
        let event = if kind & reply::ERROR != 0 {
            self.handle_refusal(name, kind, data, out)?;
            None
        } else {
            self.handle_answer(option, kind, data, out)?
        };
        Ok((cursor.rest(), event))
    }

    fn handle_answer(
        &mut self,
        option: u32,
        kind: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<Option<Event>, Violation> {
        if kind == reply::ACK {
            self.replies = 0;
        }
        match (self.state, kind) {
            (State::StartTls, reply::ACK) => {
                self.state = State::Tls;
                return Ok(Some(Event::StartTls));
            }
            (State::Structured, reply::ACK) => {
                self.structured = true;
                self.ask_contexts(out);
            }
            (State::Contexts, reply::META_CONTEXT) => self.handle_context(data)?,
            (State::Contexts, reply::ACK) => self.ask_go(out),
            (State::Go, reply::INFO) => self.handle_info(data)?,
            (State::Go, reply::ACK) => {
                if self.described.as_ref().is_none_or(|export| export.size == u64::MAX) {
                    return Err(Violation::Malformed("NBD_OPT_GO: no size and flags"));
                }
                self.state = State::Transmission;
                return Ok(Some(Event::Ready));
            }
            (State::Listing, reply::SERVER) => {
                let name = Cursor::new(data).string().ok_or(Violation::Malformed("list of exports"))?;
                return Ok(Some(Event::Listed(text(name))));
            }
            (State::Listing, reply::ACK) => {
                self.abort(out);
                self.state = State::Ended;
                return Ok(Some(Event::Finished));
            }
            _ => return Err(Violation::UnaskedReply { option, reply: kind }),
        }
        Ok(None)
    }

    fn handle_refusal(
        &mut self,
        asked: &'static str,
        kind: u32,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        self.replies = 0;
        match self.state {
            // We can live without these.
            State::Structured => self.ask_contexts(out),
            State::Contexts => {
                self.context_ids = [None; 2];
                self.ask_go(out);
            }
            State::Go if kind == reply::ERR_UNSUP => {
                self.described = None;
                ask(option::EXPORT_NAME, self.config.export.as_bytes(), out);
                self.state = State::ExportName;
            }
            _ => {
                let mut reason = refusal(kind).to_owned();
                if !data.is_empty() {
                    reason.push_str(": ");
                    reason.push_str(&text(data));
                }
                return Err(Violation::Refused { option: asked, reason });
            }
        }
        Ok(())
    }

    fn handle_context(&mut self, data: &[u8]) -> Result<(), Violation> {
        const MALFORMED: Violation = Violation::Malformed("metadata context");
        let mut cursor = Cursor::new(data);
        let id = cursor.u32().ok_or(MALFORMED)?;
        let context = self
            .config
            .contexts
            .iter()
            .find(|context| context.name().as_bytes() == cursor.rest())
            .ok_or(Violation::Malformed("metadata context: not asked for"))?;
        if self.context_ids.contains(&Some(id)) {
            return Err(MALFORMED);
        }
        let [allocation, digests] = &mut self.context_ids;
        let place = match context {
            Context::Allocation => allocation,
            Context::Digests => digests,
        };
        if place.replace(id).is_some() { Err(MALFORMED) } else { Ok(()) }
    }

    fn handle_info(&mut self, data: &[u8]) -> Result<(), Violation> {
        const MALFORMED: Violation = Violation::Malformed("description of the export");
        let mut cursor = Cursor::new(data);
        let kind = cursor.u16().ok_or(MALFORMED)?;
        // A size of u64::MAX, which no server may announce, stands for "not said yet".
        let unsaid = self.unsaid_export();
        let export = self.described.get_or_insert(unsaid);
        match kind {
            info::EXPORT => {
                export.size = cursor.u64().ok_or(MALFORMED)?;
                export.flags = TransmissionFlags(cursor.u16().ok_or(MALFORMED)?);
                if i64::try_from(export.size).is_err() {
                    return Err(Violation::ExportSize(export.size));
                }
            }
            info::BLOCK_SIZE => {
                let mut sizes = || Some((cursor.u32()?, cursor.u32()?, cursor.u32()?));
                let (minimum, preferred, maximum) = sizes().ok_or(MALFORMED)?;
                export.blocks = BlockSizes { minimum, preferred, maximum };
                if !export.blocks.are_sane() {
                    return Err(Violation::Malformed("block sizes"));
                }
            }
            // Name, description, whatever comes: not needed. What was asked for is checked above.
            _ => return Ok(()),
        }
        if cursor.is_empty() { Ok(()) } else { Err(MALFORMED) }
    }

    fn unsaid_export(&self) -> ExportInfo {
        ExportInfo {
            name: self.config.export.clone(),
            size: u64::MAX,
            flags: TransmissionFlags::HAS_FLAGS,
            blocks: BlockSizes::UNSAID,
        }
    }

    /// The answer to NBD_OPT_EXPORT_NAME.
    pub(super) fn handle_export_name<'a>(&mut self, input: &'a [u8]) -> Handled<'a> {
        let mut cursor = Cursor::new(input);
        let zeroes = if self.zeroes_after_export_name { 124 } else { 0 };
        let mut fields = || Some((cursor.u64()?, cursor.u16()?, cursor.bytes(zeroes)?));
        let Some((size, flags, _)) = fields() else { return Ok((input, None)) };
        if i64::try_from(size).is_err() {
            return Err(Violation::ExportSize(size));
        }
        self.described = Some(ExportInfo { size, flags: TransmissionFlags(flags), ..self.unsaid_export() });
        self.state = State::Transmission;
        Ok((cursor.rest(), Some(Event::Ready)))
    }
}

fn ask(option: u32, data: &[u8], out: &mut Vec<u8>) {
    out.put_u64(wire::IHAVEOPT);
    out.put_u32(option);
    out.put_u32(length32(data));
    out.extend_from_slice(data);
}

fn put_string(string: &[u8], out: &mut Vec<u8>) {
    out.put_u32(length32(string));
    out.extend_from_slice(string);
}

/// A peer's string, made fit for a log: printable, and short enough to read.
fn text(bytes: &[u8]) -> String {
    let shown = bytes.get(..MAX_NAME).unwrap_or(bytes);
    String::from_utf8_lossy(shown).chars().map(|c| if c.is_control() { ' ' } else { c }).collect()
}

fn refusal(kind: u32) -> &'static str {
    match kind {
        reply::ERR_UNSUP => "not supported",
        reply::ERR_POLICY => "against the server's policy",
        reply::ERR_INVALID => "invalid",
        reply::ERR_PLATFORM => "not on this platform",
        reply::ERR_TLS_REQD => "the server requires TLS",
        reply::ERR_UNKNOWN => "no such export",
        reply::ERR_SHUTDOWN => "the server is shutting down",
        reply::ERR_BLOCK_SIZE_REQD => "the server requires block sizes to be obeyed",
        reply::ERR_TOO_BIG => "too big",
        _ => "unknown error",
    }
}
