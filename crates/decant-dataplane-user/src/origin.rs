//! Where a clone's missing blocks come from: an NBD export or a disk over iSCSI, asked until it answers.
//!
//! ```text
//! engine --request--> pool --lane 0: urgent------ thread --connection--> server
//!                          \-lanes 1..: the rest- thread --connection-->
//! ```
//!
//! One thread per connection, which connects, haggles or logs in, sends what its lane holds, and hands answers to the
//! [`OriginSink`](crate::device::OriginSink); while it waits for the network, whoever asks puts the request on the wire himself.
//! A connection that breaks, or that stays silent while it owes an answer, is made again, for ever, with bounded backoff; what
//! it owed goes back to the pool and to whichever lane is up. Urgent requests have a connection of their own, so that they
//! never queue behind megabytes of hydration. What differs between the protocols is a small trait, `client::Client`.

mod client;
mod connection;
mod iscsi;
mod nbd;
mod pool;
mod remote;

use std::time::Duration;

pub use crate::stream::Address;
pub use client::Found;
pub use iscsi::{IscsiOptions, IscsiUrl, UrlError};
pub use nbd::Options;
pub use remote::{NotConnected, Remote, Spec};

/// How patient an origin is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Timing {
    /// Wait after the first failure; it doubles with each further one.
    pub backoff_first: Duration,
    /// Longest wait between two tries, and so the longest that a server which is back goes unnoticed.
    pub backoff_max: Duration,
    /// A connection and its handshake, TLS included, take no longer.
    pub handshake: Duration,
    /// A connection on which not a byte comes for so long while it owes an answer is given up. Doubles while nothing is
    /// answered, up to `silence_max`, because a dying disk may take its time over one read.
    pub silence: Duration,
    /// The longest silence.
    pub silence_max: Duration,
}

impl Timing {
    /// For networks between workers.
    pub const NETWORK: Self = Self {
        backoff_first: Duration::from_millis(5),
        backoff_max: Duration::from_secs(1),
        handshake: Duration::from_secs(10),
        silence: Duration::from_secs(10),
        silence_max: Duration::from_secs(120),
    };
}
