//! An NBD server for one [`Exported`]: a thread that accepts, and one thread for each connection.
//!
//! A connection's thread reads requests, does them against the local medium one after another, and answers; a client that
//! wants more at a time opens more connections (multi-conn is offered). That bounds memory and bytes in flight by the
//! number of connections, without a counter: each has one reply buffer. Nobody waits for a peer while holding a lock.

mod connection;
mod replies;

use std::collections::HashMap;
use std::io;
use std::os::fd::AsFd;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use decant_nbd::{BlockSizes, Contexts, ExportInfo, MAX_NAME, MAX_PAYLOAD, TransmissionFlags, server};
use rustix::event::{PollFd, PollFlags};

use crate::device::Exported;
use crate::stream::{Kick, Listener, wait_for};
use crate::tls::ServerTls;

pub use crate::stream::Address;

/// Most connections at a time; a further one is closed at once.
pub const MAX_CONNECTIONS: usize = 100;
/// A handshake, TLS included, takes no longer.
pub const HANDSHAKE_DEADLINE: Duration = Duration::from_secs(10);

/// Why an export cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum ListenError {
    /// The address cannot be listened on.
    #[error("cannot listen on {address}: {source}")]
    Bind {
        /// Which.
        address: Address,
        /// Why.
        source: io::Error,
    },
    /// A name or size that NBD cannot express.
    #[error("an export name has at most {MAX_NAME} bytes, and a size is below 2^63")]
    Inexpressible,
    /// No descriptors or threads left.
    #[error("cannot start the server: {0}")]
    Start(#[source] io::Error),
}

/// Counts of a server's life, for status and tests.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Served {
    /// Connections that are open now.
    pub connections: u64,
    /// Payload bytes of reads that were sent, holes not counted.
    pub bytes_read: u64,
    /// Handshakes that failed: strangers, wrong certificates, nonsense.
    pub refused: u64,
}

pub(crate) struct Shared {
    device: Arc<dyn Exported>,
    config: server::Config,
    tls: Option<ServerTls>,
    closed: AtomicBool,
    accept_kick: Kick,
    connections: Mutex<HashMap<u64, Handle>>,
    bytes_read: AtomicU64,
    refused: AtomicU64,
}

struct Handle {
    kick: Arc<Kick>,
    thread: Option<JoinHandle<()>>,
}

/// A running server. Dropping it closes it.
pub struct Server {
    shared: Arc<Shared>,
    address: Address,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl Server {
    /// Serves `device` as the export `name` on `address`, over TLS if `tls` is given, else in the clear to whoever comes.
    ///
    /// # Errors
    /// The address is taken or not ours, or the name or size cannot be expressed.
    pub fn listen(
        address: &Address,
        tls: Option<ServerTls>,
        name: &str,
        device: Arc<dyn Exported>,
    ) -> Result<Self, ListenError> {
        let size = device.size();
        if name.len() > MAX_NAME || i64::try_from(size).is_err() {
            return Err(ListenError::Inexpressible);
        }
        let config = server::Config {
            export: ExportInfo {
                name: name.to_owned(),
                size,
                flags: TransmissionFlags::offered(device.read_only()),
                blocks: BlockSizes { minimum: 512, preferred: 4096, maximum: MAX_PAYLOAD },
            },
            contexts: Contexts { allocation: true, digests: device.digests(0, 0, &mut Vec::new()).is_some() },
            tls_required: tls.is_some(),
        };
        let bind = |source| ListenError::Bind { address: address.clone(), source };
        let listener = Listener::bind(address).map_err(bind)?;
        let bound = listener.address().map_err(bind)?;
        let shared = Arc::new(Shared {
            device,
            config,
            tls,
            closed: AtomicBool::new(false),
            accept_kick: Kick::new().map_err(ListenError::Start)?,
            connections: Mutex::new(HashMap::new()),
            bytes_read: AtomicU64::new(0),
            refused: AtomicU64::new(0),
        });
        let acceptor = {
            let shared = shared.clone();
            thread::Builder::new().name("nbd-accept".into()).spawn(move || accept(&shared, &listener))
        };
        let acceptor = Mutex::new(Some(acceptor.map_err(ListenError::Start)?));
        Ok(Self { shared, address: bound, acceptor })
    }

    /// Where it listens, the port filled in.
    pub fn local_addr(&self) -> &Address {
        &self.address
    }

    /// [`Exported::ready`] has turned true: parked requests go on.
    pub fn wake(&self) {
        for handle in self.shared.lock().values() {
            handle.kick.kick();
        }
    }

    /// Counts so far.
    pub fn served(&self) -> Served {
        Served {
            connections: self.shared.lock().len() as u64,
            bytes_read: self.shared.bytes_read.load(Ordering::Relaxed),
            refused: self.shared.refused.load(Ordering::Relaxed),
        }
    }

    /// Ends all connections, idle, parked or in the middle of a handshake, and waits until their threads are gone. Takes no
    /// longer than the call to the device that is going on. Must not be called by the device.
    pub fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.accept_kick.kick();
        let acceptor = self.acceptor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(acceptor) = acceptor {
            let _ = acceptor.join();
        }
        let threads: Vec<_> = {
            let mut connections = self.shared.lock();
            connections
                .values_mut()
                .filter_map(|handle| {
                    handle.kick.kick();
                    handle.thread.take()
                })
                .collect()
        };
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn lock(&self) -> std::sync::MutexGuard<'_, HashMap<u64, Handle>> {
        self.connections.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }
}

fn accept(shared: &Arc<Shared>, listener: &Listener) {
    let mut serial = 0u64;
    while !shared.is_closed() {
        match listener.accept() {
            Ok((stream, peer)) => {
                serial += 1;
                start(shared, serial, stream, peer);
            }
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut fds = [
                    PollFd::new(listener, PollFlags::IN),
                    PollFd::from_borrowed_fd(shared.accept_kick.as_fd(), PollFlags::IN),
                ];
                if wait_for(&mut fds, None).is_err() {
                    return;
                }
            }
            Err(error) => {
                // Out of descriptors, most likely: some will come back. Not a busy loop meanwhile.
                tracing::warn!(%error, "cannot accept an NBD connection");
                shared.accept_kick.wait(crate::stream::now().checked_add(Duration::from_millis(100)));
            }
        }
    }
}

fn start(shared: &Arc<Shared>, serial: u64, stream: crate::stream::Stream, peer: String) {
    let kick = match Kick::new() {
        Ok(kick) => Arc::new(kick),
        Err(error) => return tracing::warn!(%error, "cannot serve an NBD connection"),
    };
    let mut connections = shared.lock();
    if connections.len() >= MAX_CONNECTIONS {
        shared.refused.fetch_add(1, Ordering::Relaxed);
        return tracing::warn!(%peer, "NBD connection refused: {MAX_CONNECTIONS} are open");
    }
    let thread = {
        let (shared, kick) = (shared.clone(), kick.clone());
        thread::Builder::new().name("nbd-serve".into()).spawn(move || {
            connection::run(&shared, stream, &kick, &peer);
            shared.lock().remove(&serial);
        })
    };
    match thread {
        Ok(thread) => {
            connections.insert(serial, Handle { kick, thread: Some(thread) });
        }
        Err(error) => tracing::warn!(%error, "cannot serve an NBD connection"),
    }
}
