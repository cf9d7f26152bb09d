//! The proxy of a worker: carries clients' TCP connections to wherever a machine runs now.
//!
//! ```text
//! client ── accept ──► route known, gate open ──► connect ──► copy both ways until an end, or the machine is elsewhere: reset
//!                          │ refused, unreachable, moving, unknown
//!                          ▼
//!                        parked (bounded in number and time) ── one of them knocks every 2 ms; when it is let in, all go
//! ```
//! One task per machine keeps its route fresh by long polls. A connection that was made to where the machine no longer is
//! is reset, so that its client comes again instead of waiting for an answer that nobody will give.

mod dial;
mod metrics;
mod serve;
#[cfg(test)]
mod tests;

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use decant_base::MachineId;
use tokio::net::TcpListener;

use crate::route::Resolver;

pub use metrics::{Metrics, Snapshot};

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
    /// Connections that may wait for their machine at a time, over all services. One more is reset. Each costs a
    /// descriptor and a few KiB.
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

/// A proxy whose ports are open and which does not accept yet.
#[derive(Debug)]
pub struct Proxy {
    config: Config,
    listeners: Vec<TcpListener>,
    metrics: Metrics,
}

impl Proxy {
    /// Opens the ports of all services.
    ///
    /// # Errors
    /// A port that cannot be had; none stays open then.
    pub async fn bind(config: Config) -> Result<Self, ProxyError> {
        let mut listeners = Vec::new();
        for service in &config.services {
            let listener = TcpListener::bind(service.listen).await.map_err(|cause| ProxyError::Listen {
                listen: service.listen,
                machine: service.machine.clone(),
                cause,
            })?;
            listeners.push(listener);
        }
        Ok(Self { config, listeners, metrics: Metrics::default() })
    }

    /// Where the services listen, in the order of the configuration; tells the port where that said 0.
    pub fn addresses(&self) -> io::Result<Vec<SocketAddr>> {
        self.listeners.iter().map(TcpListener::local_addr).collect()
    }

    /// What it counts, readable while it serves.
    pub fn metrics(&self) -> Metrics {
        self.metrics.clone()
    }

    /// Serves until `end` completes, then lets open connections finish for `drain_timeout` and closes the rest.
    pub async fn serve<R: Resolver>(self, resolver: R, end: impl Future<Output = ()> + Send) {
        serve::serve(self, resolver, end).await;
    }
}

/// [`Proxy::bind`], then [`Proxy::serve`].
///
/// # Errors
/// A port that cannot be had; afterwards it does not fail.
pub async fn run<R: Resolver>(
    config: Config,
    resolver: R,
    end: impl Future<Output = ()> + Send,
) -> Result<(), ProxyError> {
    Proxy::bind(config).await?.serve(resolver, end).await;
    Ok(())
}
