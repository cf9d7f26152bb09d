//! The seams inside the volume process: what a front end asks of the engine, what the engine asks of an origin, and what
//! an export serves. Offsets and lengths are bytes of payload.
//!
//! Threads: the FUSE threads call the engine; the origin's I/O thread calls the engine's [`OriginSink`]; the export's I/O
//! threads call [`Exported`]. Nobody here waits for the network while holding a lock.

use rustix::io::Errno;

pub use crate::fuse::Served;

/// Where a parked read's bytes go once they are here.
pub trait ReadSink: Send {
    /// Called once, from whichever thread made the bytes available, with plaintext of exactly the length asked for, or with
    /// the error that policy, `stop` or a failed medium demands.
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>);

    /// Whether anybody still waits: a connection goes, a reader is killed, and what it asked for makes room where that is short.
    fn is_wanted(&self) -> bool {
        true
    }
}

/// One request to an origin.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Fetch {
    /// Chosen by the engine; comes back with every answer.
    pub token: u64,
    /// First byte, a multiple of 4096.
    pub offset: u64,
    /// Bytes, a multiple of 4096 (the payload's last block may be short), at most 32 MiB.
    pub length: u32,
    /// What is wanted.
    pub want: Want,
    /// Somebody waits for it: it goes ahead of, and on another connection than, what is not urgent. Keep it small
    /// (256 KiB at most), or the next urgent one waits for it.
    pub urgent: bool,
}

/// What a [`Fetch`] asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Want {
    /// The bytes, ciphertext as on the origin's medium.
    Data,
    /// CRC-32C of each 4 KiB block as the origin served it (NBD metadata context `decant:crc32c`).
    Digests,
}

/// Somewhere missing blocks come from. Requests are queued and pipelined; a broken session is made again and what was not
/// answered is asked again, for ever, until the origin is dropped.
pub trait Origin: Send + Sync {
    /// Queues `fetch`; never blocks. Answers go to the [`OriginSink`].
    fn request(&self, fetch: Fetch);
    /// Bytes asked for and not answered yet.
    fn in_flight(&self) -> u64;
    /// Ends all sessions and threads; nothing reaches the sink after this returns. Not to be called from within the sink, nor
    /// with a lock held that the sink takes.
    fn close(&self);
}

/// Receives an origin's answers, on the origin's I/O thread; must not block on the network.
pub trait OriginSink: Send + Sync {
    /// Some of the bytes asked for; `data` is the thread's buffer and is reused after the call. Whole 4 KiB blocks, except at
    /// the payload's end. After a broken session the same bytes may come again.
    fn handle_data(&self, token: u64, offset: u64, data: &[u8]);
    /// These bytes are a hole at the origin: plaintext zeros.
    fn handle_hole(&self, token: u64, offset: u64, length: u64);
    /// Digests, one per 4 KiB from `offset` on.
    fn handle_digests(&self, token: u64, offset: u64, crc32c: &[u32]);
    /// The request is answered in full, or the origin said it cannot (EIO on its medium, say).
    fn handle_done(&self, token: u64, result: Result<(), Errno>);
    /// A session came up, or the last one went away; `detail` is for people.
    fn handle_link(&self, up: bool, detail: &str);
}

/// A run of blocks with one allocation status, as NBD's `base:allocation` has it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Status {
    /// Bytes, never 0.
    pub length: u64,
    /// Reads as zeros, nothing allocated.
    pub hole: bool,
}

/// Makes the sink of a read that has to wait: called once, and only then.
pub type Later<'a> = dyn FnMut() -> Box<dyn ReadSink> + 'a;

/// What an export serves, over NBD or iSCSI. Calls may block on the local medium, never on the network.
pub trait Exported: Send + Sync {
    /// Bytes.
    fn size(&self) -> u64;
    /// Whether writes, trims and zeroes are refused with EPERM.
    fn read_only(&self) -> bool;
    /// Whether requests may be served yet; until then they are parked. The server's `wake` is called when it turns true.
    fn ready(&self) -> bool;
    /// Fills `buffer` from `offset`; or, if some of it is not here, keeps the sink that `later` makes, which is answered once
    /// the bytes are here (perhaps before this returns), and says [`Served::Missing`]. A device that has everything never
    /// asks for a sink.
    fn read(&self, offset: u64, buffer: &mut [u8], later: &mut Later<'_>) -> Result<Served, Errno>;
    /// Writes `data` at `offset`; `data` is scratch afterwards.
    fn write(&self, offset: u64, data: &mut [u8]) -> Result<(), Errno>;
    /// Discards, so that the range reads as zeros.
    fn discard(&self, offset: u64, length: u64) -> Result<(), Errno>;
    /// Makes all that was acknowledged durable.
    fn flush(&self) -> Result<(), Errno>;
    /// Allocation from `offset` on, in order, adding up to at most `length`; at least one.
    fn status(&self, offset: u64, length: u64, out: &mut Vec<Status>) -> Result<(), Errno>;
    /// CRC-32C per 4 KiB block as served, or of the medium for a block that was not served yet. `None`: this export keeps none
    /// (asked once at the start, with `length` 0).
    fn digests(&self, offset: u64, length: u64, out: &mut Vec<u32>) -> Option<Result<(), Errno>>;
}
