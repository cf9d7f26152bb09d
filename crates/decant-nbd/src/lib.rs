//! The NBD protocol, client and server, without I/O.
//!
//! Both roles are state machines over a byte stream: the driver reads bytes from wherever it likes, hands them to
//! `handle_input`, appends what the machine wants sent to its own output buffer, and acts on the [`server::Event`] or
//! [`client::Event`] that comes back. **Payloads never pass through here**: an event says how many payload bytes come next
//! in the stream and where they belong, and the driver reads those straight into its own buffer; to send, it asks for a
//! header and puts the payload behind it. A machine keeps a few hundred bytes plus, at the client, the table of outstanding
//! requests, whatever the peer does.
//!
//! Spoken: fixed newstyle handshake only, STARTTLS, simple and structured replies, the metadata contexts
//! `base:allocation` and `decant:crc32c` ([`Context`]). The source is the NBD project's `doc/proto.md`; section names are
//! those of that document. Integers are big-endian on the wire.

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

mod backoff;
pub mod client;
mod error;
mod export;
mod reply;
mod request;
pub mod server;
mod wire;

pub use backoff::Backoff;
pub use error::{ErrorCode, Violation};
pub use export::{BlockSizes, Context, Contexts, ExportInfo, TransmissionFlags};
pub use reply::{HEADER_ROOM, ReplyHeader, put_descriptor};
pub use request::{Command, Request};
pub use wire::{MAX_DESCRIPTORS, MAX_NAME, MAX_PAYLOAD, MAX_UNIT, REQUEST_BYTES};

/// What one call of `handle_input` came to.
///
/// The driver drops the first `consumed` bytes of what it gave, acts on the event, and calls again, also with no bytes at
/// all, until there is no event; only then does it wait for more input.
#[derive(Debug, Clone, PartialEq, Eq)]
#[must_use]
pub struct Step<E> {
    /// Bytes of the input that are dealt with.
    pub consumed: usize,
    /// What happened, if anything yet.
    pub event: Option<E>,
}

#[cfg(test)]
#[allow(clippy::indexing_slicing, clippy::arithmetic_side_effects)]
mod tests;
