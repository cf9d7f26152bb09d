//! The client's side of one connection after another.
//!
//! ```text
//! Idle --connect--> Greeting -> [StartTls -> Tls] -> [Structured -> Contexts] -> Go --> Transmission
//!   ^                                            -> Listing --> Ended
//!   +--handle_disconnect (from anywhere): requests not answered come out of poll_lost, to be asked again
//! ```

mod handshake;
mod table;
mod transmission;

use crate::Step;
use crate::error::{ErrorCode, Violation};
use crate::export::{Context, Contexts, ExportInfo, TransmissionFlags};
use crate::request::{Command, Request};
use crate::wire::Put;
use table::Table;
use transmission::Inbound;

/// What a connection is for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Goal {
    /// Requests to the export.
    Transmission,
    /// The names of all exports.
    List,
}

/// What a client wants of a server.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// What for.
    pub goal: Goal,
    /// The export's name; at most [`crate::MAX_NAME`] bytes.
    pub export: String,
    /// Whether nothing is said without TLS.
    pub tls: bool,
    /// Contexts to ask for; what the server grants is [`Client::contexts`].
    pub contexts: Contexts,
    /// Most requests outstanding at a time, 1..=65,536; memory for them is reserved at the start.
    pub max_outstanding: usize,
}

/// What the driver has to act on.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// Send all output, then start TLS as the client, then call [`Client::handle_tls_started`]. Bytes that were read but not
    /// consumed are an attack: close.
    StartTls,
    /// The server has an export of this name.
    Listed(String),
    /// The list is complete, or the connection has ended otherwise as it should: send all output and close.
    Finished,
    /// Requests may be sent; [`Client::export`] says about what.
    Ready,
    /// Bytes of a read: the next `length` bytes of the stream, which the driver takes before it calls again.
    Data {
        /// The request's.
        tag: u64,
        /// Where they belong.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// This part of a read is zeros.
    Hole {
        /// The request's.
        tag: u64,
        /// Where.
        offset: u64,
        /// How many.
        length: u32,
    },
    /// Status of a range, from BLOCK_STATUS.
    Extent {
        /// The request's.
        tag: u64,
        /// Of which context.
        context: Context,
        /// From where.
        offset: u64,
        /// How many bytes, cut to what was asked.
        length: u32,
        /// What the context says of them.
        flags: u32,
    },
    /// The request is answered: everything has arrived, or it failed.
    Done {
        /// The request's.
        tag: u64,
        /// How it went.
        result: Result<(), ErrorCode>,
    },
}

/// Why a request cannot be sent.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RequestError {
    /// No session.
    #[error("not connected")]
    NotConnected,
    /// [`Config::max_outstanding`] are outstanding.
    #[error("too many requests outstanding")]
    Full,
    /// It reaches past the export's end, is empty, or longer than the server takes.
    #[error("request does not fit the export")]
    OutOfRange,
    /// The server did not offer it.
    #[error("the server does not offer this")]
    NotOffered,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Idle,
    Greeting,
    StartTls,
    Tls,
    Structured,
    Contexts,
    Go,
    ExportName,
    Listing,
    Transmission,
    Ended,
}

/// The protocol machine. It outlives connections; the requests that one of them left unanswered are handed back.
#[derive(Debug, Clone)]
pub struct Client {
    config: Config,
    state: State,
    in_tls: bool,
    zeroes_after_export_name: bool,
    structured: bool,
    context_ids: [Option<u32>; 2],
    replies: u32,
    /// What the server told about the export so far.
    described: Option<ExportInfo>,
    inbound: Inbound,
    table: Table,
}

impl Client {
    /// A client with no connection yet.
    pub fn new(config: Config) -> Self {
        let limit = config.max_outstanding.clamp(1, 65_536);
        Self {
            config,
            state: State::Idle,
            in_tls: false,
            zeroes_after_export_name: true,
            structured: false,
            context_ids: [None; 2],
            replies: 0,
            described: None,
            inbound: Inbound::Header,
            table: Table::new(limit),
        }
    }

    /// There is a transport: the server's greeting is expected.
    pub fn handle_connect(&mut self) {
        debug_assert_eq!(self.state, State::Idle, "one connection at a time");
        self.forget();
        self.state = State::Greeting;
    }

    /// The transport is gone. Every request that was not answered comes out of [`Self::poll_lost`]; parts of its answer may
    /// have arrived and will come again.
    pub fn handle_disconnect(&mut self) {
        self.forget();
        self.state = State::Idle;
        self.in_tls = false;
    }

    /// A request that a lost connection left unanswered, with its tag. Reads can simply be asked again; whether a write or a
    /// flush can is for the driver to know.
    pub fn poll_lost(&mut self) -> Option<(u64, Request)> {
        if self.state == State::Idle { self.table.pop() } else { None }
    }

    fn forget(&mut self) {
        self.zeroes_after_export_name = true;
        self.structured = false;
        self.context_ids = [None; 2];
        self.replies = 0;
        self.described = None;
        self.inbound = Inbound::Header;
    }

    /// Deals with the next bytes of the stream; see [`Step`].
    ///
    /// # Errors
    /// The server broke the protocol or refused us: close, then [`Self::handle_disconnect`].
    pub fn handle_input(&mut self, input: &[u8], out: &mut Vec<u8>) -> Result<Step<Event>, Violation> {
        let mut rest = input;
        let mut event = None;
        while event.is_none() {
            let (state, inbound, before) = (self.state, self.inbound, rest.len());
            (rest, event) = match self.state {
                State::Idle if rest.is_empty() => break,
                State::Idle => return Err(Violation::Ended),
                State::Tls if rest.is_empty() => break,
                State::Tls => return Err(Violation::PlaintextAfterStartTls),
                State::Ended => break,
                State::Greeting => self.handle_greeting(rest, out)?,
                State::ExportName => self.handle_export_name(rest)?,
                State::Transmission => self.handle_reply(rest)?,
                _ => self.handle_option_reply(rest, out)?,
            };
            let moved = rest.len() != before || self.state != state || self.inbound != inbound;
            if !moved {
                break;
            }
        }
        Ok(Step { consumed: input.len().saturating_sub(rest.len()), event })
    }

    /// TLS is up. Nothing that was said in the clear counts (CVE-2021-3716).
    pub fn handle_tls_started(&mut self, out: &mut Vec<u8>) {
        debug_assert_eq!(self.state, State::Tls, "TLS starts where it was agreed");
        let zeroes = self.zeroes_after_export_name;
        self.forget();
        self.zeroes_after_export_name = zeroes;
        self.in_tls = true;
        self.haggle(out);
    }

    /// Whether requests can be sent.
    pub fn is_ready(&self) -> bool {
        self.state == State::Transmission
    }

    /// The export, once [`Event::Ready`] was given.
    pub fn export(&self) -> Option<&ExportInfo> {
        if self.state == State::Transmission { self.described.as_ref() } else { None }
    }

    /// Contexts that BLOCK_STATUS answers on this connection.
    pub fn contexts(&self) -> Contexts {
        let [allocation, digests] = self.context_ids;
        Contexts { allocation: allocation.is_some(), digests: digests.is_some() }
    }

    /// Requests outstanding.
    pub fn outstanding(&self) -> usize {
        self.table.len()
    }

    /// Enters a request and appends its header; the payload of a write goes right behind it. `tag` comes back in its events.
    ///
    /// # Errors
    /// See [`RequestError`]; nothing is sent or entered then.
    pub fn request(
        &mut self,
        tag: u64,
        command: Command,
        offset: u64,
        length: u32,
        out: &mut Vec<u8>,
    ) -> Result<(), RequestError> {
        let export = self.export().ok_or(RequestError::NotConnected)?;
        let flags = export.flags;
        let offered = match command {
            Command::Read { unfragmented } => !unfragmented || flags.has(TransmissionFlags::DF),
            Command::Write { fua } => !fua || flags.has(TransmissionFlags::FUA),
            Command::Flush => flags.has(TransmissionFlags::FLUSH),
            Command::Trim { .. } => flags.has(TransmissionFlags::TRIM),
            Command::WriteZeroes { fast, .. } => {
                flags.has(TransmissionFlags::WRITE_ZEROES) && (!fast || flags.has(TransmissionFlags::FAST_ZERO))
            }
            Command::BlockStatus { .. } => !self.contexts().is_empty(),
            Command::Disconnect | Command::Unknown(_) => false,
        };
        let read_only = command.modifies() && flags.has(TransmissionFlags::READ_ONLY);
        if !offered || read_only {
            return Err(RequestError::NotOffered);
        }
        let payload = matches!(command, Command::Read { .. } | Command::Write { .. });
        let end = offset.checked_add(length.into()).ok_or(RequestError::OutOfRange)?;
        let empty = length == 0 && command != Command::Flush;
        if end > export.size || empty || (payload && length > export.blocks.maximum) {
            return Err(RequestError::OutOfRange);
        }
        let request = self.table.insert(tag, command, offset, length).ok_or(RequestError::Full)?;
        request.encode(out);
        Ok(())
    }

    /// Takes leave: appends DISC, or an abort of the handshake. Send it and close.
    pub fn disconnect(&mut self, out: &mut Vec<u8>) {
        match self.state {
            State::Transmission => {
                let leave = Request { cookie: 0, command: Command::Disconnect, offset: 0, length: 0 };
                leave.encode(out);
            }
            State::Structured | State::Contexts | State::Go | State::Listing => self.abort(out),
            _ => {}
        }
        self.state = State::Ended;
    }

    fn abort(&mut self, out: &mut Vec<u8>) {
        out.put_u64(crate::wire::IHAVEOPT);
        out.put_u32(crate::wire::option::ABORT);
        out.put_u32(0);
    }
}
