//! Haggling ("Option negotiation"), as the server.

use super::{Event, Server, State};
use crate::error::Violation;
use crate::export::{Context, Contexts};
use crate::wire::{self, Cursor, MAX_NAME, MAX_OPTION, Put, info, length32, option, reply};

/// Why an option is refused: the reply's type and a message for people.
type Refusal = (u32, &'static str);

impl Server {
    pub(super) fn handle_client_flags<'a>(&mut self, input: &'a [u8]) -> Result<(&'a [u8], Option<Event>), Violation> {
        let mut cursor = Cursor::new(input);
        let Some(flags) = cursor.u32() else { return Ok((input, None)) };
        let known = u32::from(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
        if flags & !known != 0 {
            return Err(Violation::HandshakeFlags(flags));
        }
        if flags & u32::from(wire::FLAG_FIXED_NEWSTYLE) == 0 {
            return Err(Violation::OldStyle);
        }
        self.no_zeroes = flags & u32::from(wire::FLAG_NO_ZEROES) != 0;
        self.state = State::Haggling;
        Ok((cursor.rest(), None))
    }

    /// One option, if it is all there.
    pub(super) fn handle_option<'a>(
        &mut self,
        input: &'a [u8],
        out: &mut Vec<u8>,
    ) -> Result<(&'a [u8], Option<Event>), Violation> {
        let mut cursor = Cursor::new(input);
        let mut header = || Some((cursor.u64()?, cursor.u32()?, cursor.u32()?));
        let Some((magic, option, length)) = header() else { return Ok((input, None)) };
        if magic != wire::IHAVEOPT {
            return Err(Violation::Magic { expected: "an option", found: magic });
        }
        let size = usize::try_from(length).unwrap_or(usize::MAX);
        if size > MAX_OPTION {
            self.count_option()?;
            if length > wire::MAX_SKIPPED_OPTION || option == option::EXPORT_NAME {
                let limit = MAX_OPTION as u64;
                return Err(Violation::TooLong { what: "an option", length: length.into(), limit });
            }
            refuse(option, (reply::ERR_TOO_BIG, "option is too long"), out);
            self.skip = length.into();
            return Ok((cursor.rest(), None));
        }
        let Some(data) = cursor.bytes(size) else { return Ok((input, None)) };
        self.count_option()?;
        let event = self.perform_option(option, data, out)?;
        Ok((cursor.rest(), event))
    }

    fn count_option(&mut self) -> Result<(), Violation> {
        self.options = self.options.saturating_add(1);
        if self.options > wire::MAX_OPTIONS { Err(Violation::EndlessHandshake) } else { Ok(()) }
    }

    fn perform_option(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<Option<Event>, Violation> {
        if option == option::ABORT {
            answer(option, reply::ACK, &[], out);
            self.state = State::Ended;
            return Ok(Some(Event::Finished));
        }
        if option == option::STARTTLS {
            let refusal = if !data.is_empty() || self.in_tls {
                Some((reply::ERR_INVALID, "STARTTLS takes no data and works once"))
            } else if !self.config.tls_required {
                Some((reply::ERR_POLICY, "this server has no TLS"))
            } else {
                None
            };
            if let Some(refusal) = refusal {
                refuse(option, refusal, out);
                return Ok(None);
            }
            answer(option, reply::ACK, &[], out);
            self.state = State::Tls;
            return Ok(Some(Event::StartTls));
        }
        if self.config.tls_required && !self.in_tls {
            if option == option::EXPORT_NAME {
                return Err(Violation::ExportName("TLS is required"));
            }
            refuse(option, (reply::ERR_TLS_REQD, "TLS is required: send NBD_OPT_STARTTLS"), out);
            return Ok(None);
        }
        match option {
            option::EXPORT_NAME => self.export_name(data, out).map(Some),
            option::GO | option::INFO => Ok(match self.describe(option, data, out) {
                Ok(()) if option == option::GO => {
                    self.state = State::Transmission;
                    Some(Event::Connected)
                }
                Ok(()) => None,
                Err(refusal) => {
                    refuse(option, refusal, out);
                    None
                }
            }),
            _ => {
                let result = match option {
                    option::LIST => self.list(data, out),
                    option::STRUCTURED_REPLY => self.structured_reply(data),
                    option::LIST_META_CONTEXT | option::SET_META_CONTEXT => self.meta_context(option, data, out),
                    _ => Err((reply::ERR_UNSUP, "unknown option")),
                };
                match result {
                    Ok(()) => answer(option, reply::ACK, &[], out),
                    Err(refusal) => refuse(option, refusal, out),
                }
                Ok(None)
            }
        }
    }

    /// NBD_OPT_EXPORT_NAME: no errors, no acknowledgement; the size and flags are the answer.
    fn export_name(&mut self, name: &[u8], out: &mut Vec<u8>) -> Result<Event, Violation> {
        if name != self.config.export.name.as_bytes() {
            return Err(Violation::ExportName("no such export"));
        }
        out.put_u64(self.config.export.size);
        out.put_u16(self.flags().0);
        if !self.no_zeroes {
            out.extend_from_slice(&[0; 124]);
        }
        self.state = State::Transmission;
        Ok(Event::Connected)
    }

    /// NBD_OPT_INFO and NBD_OPT_GO.
    fn describe(&self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        const MALFORMED: Refusal = (reply::ERR_INVALID, "lengths do not add up");
        let mut cursor = Cursor::new(data);
        let name = cursor.string().ok_or(MALFORMED)?;
        let wanted = cursor.u16().ok_or(MALFORMED)?;
        let mut wants_name = false;
        for _ in 0..wanted {
            wants_name |= cursor.u16().ok_or(MALFORMED)? == info::NAME;
        }
        if !cursor.is_empty() {
            return Err(MALFORMED);
        }
        self.check_name(name)?;
        let export = &self.config.export;
        let mut part = Vec::with_capacity(16);
        part.put_u16(info::EXPORT);
        part.put_u64(export.size);
        part.put_u16(self.flags().0);
        answer(option, reply::INFO, &part, out);
        part.clear();
        part.put_u16(info::BLOCK_SIZE);
        part.put_u32(export.blocks.minimum);
        part.put_u32(export.blocks.preferred);
        part.put_u32(export.blocks.maximum);
        answer(option, reply::INFO, &part, out);
        if wants_name {
            part.clear();
            part.put_u16(info::NAME);
            part.extend_from_slice(export.name.as_bytes());
            answer(option, reply::INFO, &part, out);
        }
        answer(option, reply::ACK, &[], out);
        Ok(())
    }

    fn check_name(&self, name: &[u8]) -> Result<(), Refusal> {
        if name.len() > MAX_NAME {
            return Err((reply::ERR_TOO_BIG, "export name is too long"));
        }
        if name != self.config.export.name.as_bytes() {
            return Err((reply::ERR_UNKNOWN, "no such export"));
        }
        Ok(())
    }

    fn list(&self, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err((reply::ERR_INVALID, "LIST takes no data"));
        }
        let name = self.config.export.name.as_bytes();
        let mut part = Vec::with_capacity(name.len().saturating_add(4));
        part.put_u32(length32(name));
        part.extend_from_slice(name);
        answer(option::LIST, reply::SERVER, &part, out);
        Ok(())
    }

    fn structured_reply(&mut self, data: &[u8]) -> Result<(), Refusal> {
        if !data.is_empty() {
            return Err((reply::ERR_INVALID, "STRUCTURED_REPLY takes no data"));
        }
        self.structured = true;
        Ok(())
    }

    /// NBD_OPT_LIST_META_CONTEXT and NBD_OPT_SET_META_CONTEXT.
    fn meta_context(&mut self, option: u32, data: &[u8], out: &mut Vec<u8>) -> Result<(), Refusal> {
        const MALFORMED: Refusal = (reply::ERR_INVALID, "lengths do not add up");
        let set = option == option::SET_META_CONTEXT;
        if set {
            self.contexts = Contexts::NONE;
        }
        if !self.structured {
            return Err((reply::ERR_INVALID, "negotiate structured replies first"));
        }
        let mut cursor = Cursor::new(data);
        let name = cursor.string().ok_or(MALFORMED)?;
        let queries = cursor.u32().ok_or(MALFORMED)?;
        let mut chosen = if queries == 0 && !set { self.config.contexts } else { Contexts::NONE };
        for _ in 0..queries {
            let query = cursor.string().ok_or(MALFORMED)?;
            if query.len() > MAX_NAME {
                return Err((reply::ERR_TOO_BIG, "query is too long"));
            }
            for context in self.config.contexts.iter() {
                let name = context.name().as_bytes();
                // A bare namespace ("base:") lists all that is in it, and sets nothing.
                let matches = query == name || (!set && query.ends_with(b":") && name.starts_with(query));
                if matches {
                    chosen.insert(context);
                }
            }
        }
        if !cursor.is_empty() {
            return Err(MALFORMED);
        }
        self.check_name(name)?;
        for context in chosen.iter() {
            context_reply(option, if set { context.id() } else { 0 }, context, out);
        }
        if set {
            self.contexts = chosen;
        }
        Ok(())
    }
}

fn context_reply(option: u32, id: u32, context: Context, out: &mut Vec<u8>) {
    let mut part = Vec::with_capacity(32);
    part.put_u32(id);
    part.extend_from_slice(context.name().as_bytes());
    answer(option, reply::META_CONTEXT, &part, out);
}

fn answer(option: u32, kind: u32, data: &[u8], out: &mut Vec<u8>) {
    out.put_u64(wire::OPTION_REPLY);
    out.put_u32(option);
    out.put_u32(kind);
    out.put_u32(length32(data));
    out.extend_from_slice(data);
}

fn refuse(option: u32, (kind, message): Refusal, out: &mut Vec<u8>) {
    answer(option, kind, message.as_bytes(), out);
}
