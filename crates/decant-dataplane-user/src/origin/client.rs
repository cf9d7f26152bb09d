//! What a lane's driver needs of a protocol: one connection after another, ranges asked for, pieces that come back.

use std::io;
use std::time::{Duration, Instant};

use rustix::io::Errno;

use super::pool::Job;
use crate::device::Want;
use crate::stream::Aligned;

/// The granularity of everything that is handed over.
pub(super) const BLOCK: u64 = 4096;

/// What a session found at the other end.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Found {
    /// Bytes.
    pub size: u64,
    /// Bytes of the smallest piece that can be read there: 512 or 4096 of a disk over iSCSI; 1 where nothing is said over NBD.
    pub block_bytes: u32,
    /// Whether [`Want::Digests`] is answered.
    pub digests: bool,
}

/// The terms of a session.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Terms {
    pub(super) found: Found,
    /// Whether further sessions may be made beside this one.
    pub(super) several: bool,
    /// Most bytes of data, and of what digests are of, to ask for at a time; multiples of [`BLOCK`].
    pub(super) parts: (u32, u32),
    /// Whether a part can be had in one piece.
    pub(super) unfragmented: bool,
}

impl Terms {
    /// Bytes of a job to ask for next.
    pub(super) fn part(&self, job: &Job) -> u32 {
        let (data, digests) = self.parts;
        let most = if job.fetch.want == Want::Data { data } else { digests };
        u32::try_from(job.left()).unwrap_or(most).min(most)
    }
}

/// A part of a job, asked of the peer.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ask {
    pub(super) want: Want,
    pub(super) offset: u64,
    pub(super) length: u32,
    pub(super) unfragmented: bool,
    pub(super) urgent: bool,
}

/// Bytes in a buffer of their own.
#[derive(Debug)]
pub(super) struct Buffer {
    bytes: Aligned,
    length: usize,
}

impl Buffer {
    /// Of `length` bytes, in `spare` if that is large enough.
    pub(super) fn new(spare: Option<Self>, length: usize) -> Self {
        match spare {
            Some(spare) if spare.bytes.len() >= length => Self { length, ..spare },
            _ => Self { bytes: Aligned::new(length.next_power_of_two()), length },
        }
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        self.bytes.slice(0..self.length)
    }
}

impl AsMut<[u8]> for Buffer {
    fn as_mut(&mut self) -> &mut [u8] {
        self.bytes.slice_mut(0..self.length)
    }
}

/// What the driver has to act on. Offsets are the peer's bytes.
#[derive(Debug)]
pub(super) enum Event {
    /// Send all output, start TLS, and say so.
    StartTls,
    /// Parts may be asked for.
    Ready,
    /// The next `length` bytes of the stream are of this part and final; the driver takes them before it calls again.
    Data { tag: usize, offset: u64, length: u32 },
    /// These are. The buffer is to be given back.
    Held { tag: usize, offset: u64, buffer: Buffer },
    /// A hole.
    Hole { tag: usize, offset: u64, length: u64 },
    /// The digest of one block.
    Digest { tag: usize, offset: u64, length: u32, crc32c: u32 },
    /// All of the part has come, or it failed.
    Done { tag: usize, result: Result<(), Errno> },
    /// Nothing that matters.
    Nothing,
}

/// Why a try or a session ended.
#[derive(Debug, thiserror::Error)]
pub(super) enum Broken {
    #[error("{0}")]
    Io(#[from] io::Error),
    #[error("{0}")]
    Nbd(#[from] decant_nbd::Violation),
    #[error("{0}")]
    Iscsi(#[from] decant_iscsi::Violation),
    #[error("TLS: {0}")]
    Tls(#[from] rustls::Error),
    #[error("TLS handshake: data before it was asked for")]
    EarlyData,
    #[error("data after the request for TLS, and before TLS")]
    PlaintextAfterStartTls,
    #[error("no session within {} s", .0.as_secs_f32())]
    Handshake(Duration),
    #[error("not a byte for {} s while it owes an answer", .0.as_secs_f32())]
    Silent(Duration),
    #[error("{what} has {found} bytes, but {expected} were agreed")]
    WrongSize { what: &'static str, found: u64, expected: u64 },
    #[error("the server is shutting down")]
    ShuttingDown,
    #[error("the server refuses a request: {0}")]
    NbdRequest(#[from] decant_nbd::client::RequestError),
    #[error("the target refuses a command: {0}")]
    IscsiCommand(#[from] decant_iscsi::initiator::Refused),
    #[error("an answer to something that was not asked")]
    Unasked,
    #[error("a digest that is not of one block")]
    OddDigest,
    #[error("it sends without reading what it is sent")]
    Deaf,
    #[error("the session is over")]
    Over,
    #[error("closed")]
    Closed,
}

/// A protocol's side of a lane; outlives connections. All calls are made with the lane's desk locked, and none waits.
pub(super) trait Client: Send {
    /// There is a transport.
    fn handle_connect(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<(), Broken>;

    /// TLS is up.
    fn handle_tls_started(&mut self, _out: &mut Vec<u8>) -> Result<(), Broken> {
        Err(Broken::Over)
    }

    /// Deals with input: how much of it was dealt with, and what came of it. To be called until nothing does.
    fn handle_input(&mut self, now: Instant, input: &[u8], out: &mut Vec<u8>)
    -> Result<(usize, Option<Event>), Broken>;

    /// Whether [`Self::handle_input`] has something to say without any input.
    fn has_events(&self) -> bool {
        false
    }

    /// Where the next bytes of the stream go, if the driver has no unread input.
    fn landing(&mut self) -> Option<&mut [u8]> {
        None
    }

    /// So many have been read to there.
    fn handle_landed(&mut self, _count: usize) -> Result<(), Broken> {
        Err(Broken::Over)
    }

    /// Does what is to be done by now; gives the time of the next call.
    fn handle_tick(&mut self, _now: Instant, _out: &mut Vec<u8>) -> Result<Option<Instant>, Broken> {
        Ok(None)
    }

    /// The terms, while there is a session.
    fn terms(&self) -> Option<Terms>;

    /// Whether a part may be asked for.
    fn has_room(&self) -> bool;

    /// Parts that are not answered.
    fn outstanding(&self) -> usize;

    /// Asks for a part.
    fn ask(&mut self, tag: usize, ask: &Ask, now: Instant, out: &mut Vec<u8>) -> Result<(), Broken>;

    /// A number that moves while the peer works on what it owes; `received` bytes have come in all.
    fn heard(&self, received: u64) -> u64 {
        received
    }

    /// A buffer is not needed any more.
    fn recycle(&mut self, _buffer: Buffer) {}

    /// Takes leave.
    fn leave(&mut self, now: Instant, out: &mut Vec<u8>);

    /// The transport is gone, and all that was asked with it.
    fn handle_disconnect(&mut self);
}
