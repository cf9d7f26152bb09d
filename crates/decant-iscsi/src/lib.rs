//! The iSCSI protocol, a target's side, and the SCSI disk behind it, without I/O.
//!
//! Sections named in this crate are those of RFC 7143 unless another document is named; SPC, SBC and SAM are the T10
//! standards as of SPC-4, SBC-3 and SAM-5. Integers are big-endian on the wire.
//!
//! The layers, each usable by both roles:
//! [`serial`] numbers that wrap; [`pdu`] one PDU and the stream of them; [`text`] key=value text; [`chap`] and [`login`] what
//! a login agrees on. Above them [`target`] is a target's side of a connection, and [`scsi`] the disk that it presents.

#![forbid(unsafe_code)]
#![warn(clippy::indexing_slicing, clippy::arithmetic_side_effects)]

pub mod chap;
mod error;
pub mod initiator;
pub mod login;
pub mod pdu;
pub mod scsi;
pub mod serial;
pub mod target;
pub mod text;
mod wire;

pub use error::Violation;

/// What one call that takes bytes of the stream came to.
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
