//! An NBD export as the origin.

use std::time::Instant;

use decant_nbd::client::{self, Config, Goal};
use decant_nbd::{Command, Context, Contexts, ErrorCode, TransmissionFlags, Violation};
use rustix::io::Errno;

use super::client::{Ask, BLOCK, Broken, Client, Event, Found, Terms};
use super::remote::Settings;
use super::{Address, Timing};
use crate::device::Want;
use crate::tls::ClientTls;

/// Most requests that one connection owes answers to. Bytes are bounded by whoever asks.
const MAX_OUTSTANDING: usize = 1024;

/// What to connect to, and how.
#[derive(Clone)]
pub struct Options {
    /// Where the server listens.
    pub address: Address,
    /// Mutual TLS with a pinned peer, or in the clear.
    pub tls: Option<ClientTls>,
    /// The export's name.
    pub export: String,
    /// The size that the export must have; another is refused.
    pub size: Option<u64>,
    /// Whether to ask for digests (`decant:crc32c`).
    pub digests: bool,
    /// Connections, 1..=8; the first is for urgent requests alone while there are others. More than one are made only if the
    /// server allows several (multi-conn).
    pub connections: usize,
    /// Patience.
    pub timing: Timing,
}

impl Options {
    /// What a clone uses for an export of another worker.
    pub fn for_clone(origin: &decant_dataplane::Origin, tls: ClientTls, size: u64) -> Self {
        Self {
            address: origin.address.into(),
            tls: Some(tls),
            export: origin.export.clone(),
            size: Some(size),
            digests: true,
            connections: 3,
            timing: Timing::NETWORK,
        }
    }
}

/// What the lanes of an origin with these options need.
pub(super) fn parts(options: Options) -> (Settings, impl Fn(usize) -> Box<dyn Client>) {
    let Options { address, tls, export, size, digests, connections, timing } = options;
    let config = Config {
        goal: Goal::Transmission,
        export: export.clone(),
        tls: tls.is_some(),
        contexts: Contexts { allocation: false, digests },
        max_outstanding: MAX_OUTSTANDING,
    };
    let settings = Settings {
        protocol: "nbd",
        address,
        tls,
        name: export,
        size,
        what: "the export",
        connections,
        at_once: false,
        timing,
    };
    (settings, move |_| Box::new(Nbd::new(config.clone())))
}

struct Nbd {
    core: client::Client,
}

impl Nbd {
    fn new(config: Config) -> Self {
        Self { core: client::Client::new(config) }
    }
}

impl Client for Nbd {
    fn handle_connect(&mut self, _now: Instant, _out: &mut Vec<u8>) -> Result<(), Broken> {
        self.core.handle_connect();
        Ok(())
    }

    fn handle_tls_started(&mut self, out: &mut Vec<u8>) -> Result<(), Broken> {
        self.core.handle_tls_started(out);
        Ok(())
    }

    fn handle_input(
        &mut self,
        _now: Instant,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, Option<Event>), Broken> {
        let step = self.core.handle_input(input, out)?;
        let Some(event) = step.event else { return Ok((step.consumed, None)) };
        let event = match event {
            client::Event::StartTls => Event::StartTls,
            client::Event::Ready => Event::Ready,
            client::Event::Data { tag, offset, length } => Event::Data { tag: tag as usize, offset, length },
            client::Event::Hole { tag, offset, length } => {
                Event::Hole { tag: tag as usize, offset, length: length.into() }
            }
            client::Event::Extent { tag, context: Context::Digests, offset, length, flags } => {
                Event::Digest { tag: tag as usize, offset, length, crc32c: flags }
            }
            client::Event::Extent { .. } => Event::Nothing,
            client::Event::Done { result: Err(ErrorCode::Shutdown), .. } => return Err(Broken::ShuttingDown),
            client::Event::Done { tag, result } => Event::Done { tag: tag as usize, result: result.map_err(errno) },
            client::Event::Listed(_) | client::Event::Finished => return Err(Violation::Ended.into()),
        };
        Ok((step.consumed, Some(event)))
    }

    fn terms(&self) -> Option<Terms> {
        let export = self.core.export()?;
        let most = export.blocks.maximum.min(decant_nbd::MAX_PAYLOAD).max(BLOCK as u32) / BLOCK as u32 * BLOCK as u32;
        let digests = self.core.contexts().digests;
        Some(Terms {
            found: Found { size: export.size, block_bytes: export.blocks.minimum, digests },
            several: export.flags.has(TransmissionFlags::MULTI_CONN),
            parts: (most, most),
            unfragmented: export.flags.has(TransmissionFlags::DF),
        })
    }

    fn has_room(&self) -> bool {
        self.core.outstanding() < MAX_OUTSTANDING
    }

    fn outstanding(&self) -> usize {
        self.core.outstanding()
    }

    fn ask(&mut self, tag: usize, ask: &Ask, _now: Instant, out: &mut Vec<u8>) -> Result<(), Broken> {
        let command = match ask.want {
            Want::Data => Command::Read { unfragmented: ask.unfragmented },
            Want::Digests => Command::BlockStatus { one: false },
        };
        Ok(self.core.request(tag as u64, command, ask.offset, ask.length, out)?)
    }

    fn leave(&mut self, _now: Instant, out: &mut Vec<u8>) {
        self.core.disconnect(out);
    }

    fn handle_disconnect(&mut self) {
        self.core.handle_disconnect();
        while self.core.poll_lost().is_some() {}
    }
}

fn errno(error: ErrorCode) -> Errno {
    match error {
        ErrorCode::Permission => Errno::PERM,
        ErrorCode::Io => Errno::IO,
        ErrorCode::NoMemory => Errno::NOMEM,
        ErrorCode::Invalid => Errno::INVAL,
        ErrorCode::NoSpace => Errno::NOSPC,
        ErrorCode::Overflow => Errno::OVERFLOW,
        ErrorCode::NotSupported => Errno::OPNOTSUPP,
        ErrorCode::Shutdown => Errno::SHUTDOWN,
    }
}
