//! Servers for one [`Exported`]: NBD here, iSCSI in [`iscsi`]; both have a thread that accepts and one for each connection.
//!
//! An NBD connection's thread reads requests, does them against the local medium one after another, and answers; a client that
//! wants more at a time opens more connections (multi-conn is offered). A read whose bytes are not here waits elsewhere, and
//! holds up nothing that comes after it. That bounds memory and bytes in flight by the number of connections, without a counter:
//! each has one reply buffer, and a read that waits has none. Nobody waits for a peer while holding a lock.

pub mod claim;
mod connection;
mod doors;
pub mod iscsi;
mod medium;
mod replies;
mod workers;

use std::io;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc::{SyncSender, sync_channel};
use std::time::Duration;

use decant_nbd::{BlockSizes, Contexts, ExportInfo, MAX_NAME, MAX_PAYLOAD, TransmissionFlags, server};
use rustix::io::Errno;

use crate::device::{Exported, ReadSink, Served as Here};
use crate::stream::{Listener, Stream};
use crate::tls::ServerTls;
use doors::Doors;

pub use crate::stream::Address;
pub use medium::FileMedium;

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
    /// A size that is no number of blocks.
    #[error(
        "{size} bytes are no whole number of {block_bytes}-byte blocks, which have 512 or 4096 bytes; there must be one"
    )]
    Blocks {
        /// Of the device, bytes.
        size: u64,
        /// Of a block.
        block_bytes: u32,
    },
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
    doors: Arc<Doors>,
    bytes_read: Arc<AtomicU64>,
}

/// A running NBD server. Dropping it closes it.
pub struct Server {
    shared: Arc<Shared>,
    address: Address,
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
        let doors = Arc::new(Doors::new("nbd", &[]).map_err(ListenError::Start)?);
        let bytes_read = Arc::default();
        let shared = Arc::new(Shared { device, config, tls, doors, bytes_read });
        let serving = Arc::clone(&shared);
        let serve = move |visitor: doors::Visitor| {
            connection::run(&serving, Stream::new(visitor.socket), &visitor.kick, &visitor.peer);
        };
        shared.doors.open(listener, serve).map_err(ListenError::Start)?;
        Ok(Self { shared, address: bound })
    }

    /// Where it listens, the port filled in.
    pub fn local_addr(&self) -> &Address {
        &self.address
    }

    /// [`Exported::ready`] has turned true: parked requests go on.
    pub fn wake(&self) {
        self.shared.doors.wake();
    }

    /// Counts so far.
    pub fn served(&self) -> Served {
        let (connections, refused) = self.shared.doors.counts();
        Served { connections, bytes_read: self.shared.bytes_read.load(Ordering::Relaxed), refused }
    }

    /// Ends all connections, idle, parked or in the middle of a handshake, and waits until their threads are gone. Takes no
    /// longer than the call to the device that is going on. Must not be called by the device.
    pub fn close(&self) {
        self.shared.doors.close();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn is_closed(&self) -> bool {
        self.doors.is_closed()
    }
}

/// Hands a read that had to wait over to the thread that waits for it.
struct Handover(SyncSender<Result<Vec<u8>, Errno>>);

impl ReadSink for Handover {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        // Nobody waits any more if the connection has gone.
        let _ = self.0.send(result.map(<[u8]>::to_vec));
    }
}

/// Reads, waiting for what is not here: for the part of a request that nothing else of it can overtake.
fn read_waiting(device: &dyn Exported, offset: u64, buffer: &mut [u8]) -> Result<(), Errno> {
    let (done, outcome) = sync_channel(1);
    match device.read(offset, buffer, &mut || Box::new(Handover(done.clone())))? {
        Here::Done => Ok(()),
        Here::Missing => {
            drop(done);
            let bytes = outcome.recv().map_err(|_| Errno::IO)??;
            buffer.copy_from_slice(bytes.get(..buffer.len()).ok_or(Errno::IO)?);
            Ok(())
        }
    }
}
