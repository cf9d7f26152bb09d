//! The server's side of one connection.
//!
//! ```text
//! Greeted --client flags--> Haggling --GO, EXPORT_NAME--> Transmission --DISC--> Ended
//!                            |    ^
//!                     STARTTLS    | handle_tls_started: everything agreed before is forgotten
//!                            v    |
//!                            Tls -+
//! ```

mod handshake;

use crate::Step;
use crate::error::{ErrorCode, Violation};
use crate::export::{Context, Contexts, ExportInfo, TransmissionFlags};
use crate::reply::ReplyHeader;
use crate::request::{Command, Request};
use crate::wire::{self, Put, chunk};

/// What a server serves, on every connection alike.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The one export. [`TransmissionFlags::DF`] is the machine's to set.
    pub export: ExportInfo,
    /// Contexts that it can answer.
    pub contexts: Contexts,
    /// Whether nothing at all is said without TLS. Otherwise TLS is refused: there is no mode in between, which an attacker
    /// could choose for both.
    pub tls_required: bool,
}

/// What the driver has to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Send all output, then start TLS as the server, then call [`Server::handle_tls_started`]. Bytes that were read but
    /// not consumed are an attack (plaintext that would count as said inside TLS): close.
    StartTls,
    /// The handshake is over, requests follow.
    Connected,
    /// Do this and answer it. It lies within the export and obeys its flags. For [`Command::Write`] the next `length` bytes
    /// of the stream are its payload: take them before calling again.
    Request(Request),
    /// The client takes its leave: send all output and close.
    Finished,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Greeted,
    Haggling,
    Tls,
    Transmission,
    Ended,
}

/// The protocol machine of one connection.
#[derive(Debug, Clone)]
pub struct Server {
    config: Config,
    state: State,
    in_tls: bool,
    no_zeroes: bool,
    structured: bool,
    contexts: Contexts,
    options: u32,
    /// Stream bytes that belong to something refused.
    skip: u64,
}

impl Server {
    /// A new connection; appends the greeting.
    pub fn new(config: Config, out: &mut Vec<u8>) -> Self {
        out.put_u64(wire::NBDMAGIC);
        out.put_u64(wire::IHAVEOPT);
        out.put_u16(wire::FLAG_FIXED_NEWSTYLE | wire::FLAG_NO_ZEROES);
        Self {
            config,
            state: State::Greeted,
            in_tls: false,
            no_zeroes: false,
            structured: false,
            contexts: Contexts::NONE,
            options: 0,
            skip: 0,
        }
    }

    /// Deals with the next bytes of the stream; see [`Step`]. Appends to `out` at most a small multiple of `input`.
    ///
    /// # Errors
    /// The peer broke the protocol: send what is in `out` if possible, and close.
    pub fn handle_input(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Step<Event>, Violation> {
        let mut rest = input;
        let mut event = None;
        while event.is_none() {
            rest = self.skip(rest);
            let before = rest.len();
            (rest, event) = match self.state {
                State::Greeted => self.handle_client_flags(rest)?,
                State::Haggling => self.handle_option(rest, out)?,
                State::Tls if rest.is_empty() => break,
                State::Tls => return Err(Violation::PlaintextAfterStartTls),
                State::Transmission => self.handle_request(rest, out)?,
                State::Ended => break,
            };
            if rest.len() == before && event.is_none() {
                break;
            }
        }
        Ok(Step { consumed: input.len().saturating_sub(rest.len()), event })
    }

    /// TLS is up. Nothing that was agreed in the clear survives (CVE-2021-3716).
    pub fn handle_tls_started(&mut self) {
        debug_assert_eq!(self.state, State::Tls, "TLS starts where it was agreed");
        self.state = State::Haggling;
        self.in_tls = true;
        self.structured = false;
        self.contexts = Contexts::NONE;
        self.options = 0;
        self.skip = 0;
    }

    /// Whether reads may be answered in chunks, holes among them.
    pub fn structured(&self) -> bool {
        self.structured
    }

    /// Contexts that the client asked for: each is owed one chunk in the reply to BLOCK_STATUS.
    pub fn contexts(&self) -> Contexts {
        self.contexts
    }

    /// Whether requests are being served, the handshake being over.
    pub fn is_connected(&self) -> bool {
        self.state == State::Transmission
    }

    fn flags(&self) -> TransmissionFlags {
        let flags = self.config.export.flags | TransmissionFlags::HAS_FLAGS;
        if self.structured { flags | TransmissionFlags::DF } else { flags.without(TransmissionFlags::DF) }
    }

    fn skip<'a>(&mut self, input: &'a [u8]) -> &'a [u8] {
        let count = usize::try_from(self.skip).unwrap_or(usize::MAX).min(input.len());
        self.skip = self.skip.saturating_sub(count as u64);
        input.get(count..).unwrap_or_default()
    }

    fn handle_request<'a>(
        &mut self,
        input: &'a [u8],
        out: &mut Vec<u8>,
    ) -> Result<(&'a [u8], Option<Event>), Violation> {
        let Some((mut request, excess)) = Request::decode(input)? else { return Ok((input, None)) };
        if request.command == Command::Flush {
            // It is about the whole export; what its range says means nothing.
            (request.offset, request.length) = (0, 0);
        }
        let rest = input.get(wire::REQUEST_BYTES..).unwrap_or_default();
        if request.command == Command::Disconnect {
            self.state = State::Ended;
            return Ok((rest, Some(Event::Finished)));
        }
        match self.admit(&request, excess) {
            Ok(()) => Ok((rest, Some(Event::Request(request)))),
            Err(error) => {
                if matches!(request.command, Command::Write { .. }) {
                    self.skip = request.length.into();
                }
                self.error(&request, error, None, out);
                Ok((rest, None))
            }
        }
    }

    /// Whether a request may be performed at all.
    fn admit(&self, request: &Request, excess_flags: u16) -> Result<(), ErrorCode> {
        let export = &self.config.export;
        let flags = self.flags();
        if excess_flags != 0 {
            return Err(ErrorCode::Invalid);
        }
        if request.command.modifies() && flags.has(TransmissionFlags::READ_ONLY) {
            return Err(ErrorCode::Permission);
        }
        let (past_end, payload) = match request.command {
            Command::Flush => return Ok(()),
            Command::Unknown(_) | Command::Disconnect => return Err(ErrorCode::Invalid),
            Command::Read { unfragmented } if unfragmented && !self.structured => return Err(ErrorCode::Invalid),
            Command::BlockStatus { .. } if self.contexts.is_empty() || request.length == 0 => {
                return Err(ErrorCode::Invalid);
            }
            Command::Trim { .. } if !flags.has(TransmissionFlags::TRIM) => return Err(ErrorCode::NotSupported),
            Command::WriteZeroes { fast: true, .. } if !flags.has(TransmissionFlags::FAST_ZERO) => {
                return Err(ErrorCode::Invalid);
            }
            Command::Read { .. } => (ErrorCode::Invalid, true),
            Command::Write { .. } => (ErrorCode::NoSpace, true),
            Command::WriteZeroes { .. } => (ErrorCode::NoSpace, false),
            Command::Trim { .. } | Command::BlockStatus { .. } => (ErrorCode::Invalid, false),
        };
        let end = request.end().ok_or(past_end)?;
        if end > export.size {
            return Err(past_end);
        }
        if payload && request.length > export.blocks.maximum {
            return Err(ErrorCode::Invalid);
        }
        let minimum = u64::from(export.blocks.minimum.max(1));
        let aligned = |position: u64| position.is_multiple_of(minimum) || position == export.size;
        if !aligned(request.offset) || !aligned(end) {
            return Err(ErrorCode::Invalid);
        }
        Ok(())
    }

    /// What answers that come later need of the session.
    pub fn replier(&self) -> Replier {
        Replier { structured: self.structured }
    }

    /// As [`Replier::data`].
    pub fn data(&self, request: &Request, offset: u64, length: u32, done: bool) -> ReplyHeader {
        self.replier().data(request, offset, length, done)
    }

    /// `length` bytes at `offset` of a read are a hole. Only with structured replies.
    pub fn hole(&self, request: &Request, offset: u64, length: u32, done: bool) -> ReplyHeader {
        debug_assert!(self.structured, "simple replies have no holes");
        ReplyHeader::hole(request.cookie, offset, length, done)
    }

    /// The header of one context's status; `descriptors` of them ([`crate::put_descriptor`]) follow it, from the request's
    /// offset on, adding up to at most its length.
    pub fn block_status(&self, request: &Request, context: Context, descriptors: u32, done: bool) -> ReplyHeader {
        debug_assert!(self.contexts.has(context), "only what was agreed");
        ReplyHeader::block_status(request.cookie, context, descriptors, done)
    }

    /// The request succeeded and nothing more is to be said.
    pub fn done(&self, request: &Request) -> ReplyHeader {
        match request.command {
            Command::Read { .. } if self.structured => ReplyHeader::chunk(request.cookie, chunk::NONE, true, 0, &[]),
            Command::BlockStatus { .. } => ReplyHeader::chunk(request.cookie, chunk::NONE, true, 0, &[]),
            _ => ReplyHeader::simple(request.cookie, None),
        }
    }

    /// As [`Replier::error`].
    pub fn error(&self, request: &Request, error: ErrorCode, offset: Option<u64>, out: &mut Vec<u8>) {
        self.replier().error(request, error, offset, out);
    }
}

/// Writes answers to reads without the session at hand: they may be given in any order, from any thread.
#[derive(Debug, Clone, Copy)]
pub struct Replier {
    structured: bool,
}

impl Replier {
    /// The header of `length` data bytes at `offset` of a read; they follow it. Without structured replies the whole answer
    /// is one such header and all of the data; `done` marks the last chunk.
    pub fn data(&self, request: &Request, offset: u64, length: u32, done: bool) -> ReplyHeader {
        if self.structured {
            ReplyHeader::data(request.cookie, offset, length, done)
        } else {
            debug_assert!(done && (offset, length) == (request.offset, request.length), "simple replies have one part");
            ReplyHeader::simple(request.cookie, None)
        }
    }

    /// The request failed, at `offset` if that is known; ends the answer. Without structured replies it must not come after
    /// [`Self::data`].
    pub fn error(&self, request: &Request, error: ErrorCode, offset: Option<u64>, out: &mut Vec<u8>) {
        let chunked = match request.command {
            Command::Read { .. } => self.structured,
            Command::BlockStatus { .. } => self.structured,
            _ => false,
        };
        if !chunked {
            out.extend_from_slice(ReplyHeader::simple(request.cookie, Some(error)).as_bytes());
            return;
        }
        let code = error.raw().to_be_bytes();
        let header = match offset {
            None => ReplyHeader::chunk(request.cookie, chunk::ERROR, true, 6, &[&code, &[0, 0]]),
            Some(_) => ReplyHeader::chunk(request.cookie, chunk::ERROR_OFFSET, true, 14, &[&code, &[0, 0]]),
        };
        out.extend_from_slice(header.as_bytes());
        if let Some(offset) = offset {
            out.put_u64(offset);
        }
    }
}
