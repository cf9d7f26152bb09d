//! An iSCSI server for one [`Exported`]: LUN 0 of one target, with the protocol of `decant-iscsi`.
//!
//! ```text
//! connection's thread: socket --> protocol --> reads and writes of what is here --> socket
//!                                    |   ^
//!        slow work (flush, unmap ..) v   | outcomes, and a kick
//!                                 workers, or whoever brings a parked read's bytes
//! ```
//!
//! A connection's thread owns its protocol machine, does what is quick itself, and never waits for the rest: that is handed
//! to a few workers, or to the device, which answers a parked read whenever it can; both leave the outcome in the
//! connection's inbox and kick its thread. So one flush or one missing block holds up nobody else. (A VERIFY reads on its
//! worker, missing blocks too: initiators hardly send one.) What the
//! connections of a target share is behind one lock, which nobody holds while doing I/O.

mod buffers;
mod connection;
mod inbox;
mod perform;
mod requests;

use std::collections::HashMap;
use std::net::{IpAddr, SocketAddr};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use decant_iscsi::login::Offer;
use decant_iscsi::scsi::Disk;
use decant_iscsi::target::{Config, ConnectionId, Limits, Target};

use super::doors::{Doors, Visitor};
use super::workers::Workers;
use super::{Address, ListenError, Served};
use crate::device::Exported;
use crate::stream::{Kick, Listener};

pub use decant_iscsi::chap::{Chap, Credentials, Secret, SecretError};
pub use decant_iscsi::login::DigestPolicy;
pub use decant_iscsi::target::Access;

/// Most bytes of one READ or WRITE: more than initiators ask for that do not look. A session's memory is bounded by this times the
/// commands that it may have outstanding, 64.
pub const MAX_TRANSFER: u32 = 4 * 1024 * 1024;
/// Threads for work that may take long, of all connections together. They are made when they are needed.
const WORKERS: usize = 4;

/// How a disk is served.
#[derive(Debug, Clone)]
pub struct IscsiOptions {
    /// Where to listen; port 3260 is iSCSI's own.
    pub address: SocketAddr,
    /// The target's name (IQN).
    pub name: String,
    /// Who may log in, by name, and with which secrets. The first entry that fits decides; nobody is let in by an empty list.
    pub access: Vec<Access>,
    /// From which addresses connections are taken; empty: from any.
    pub peers: Vec<IpAddr>,
    /// Digests of headers and data.
    pub digests: DigestPolicy,
    /// Bytes of a logical block, 512 or 4096.
    pub block_bytes: u32,
    /// What names the disk for ever, at most [`decant_iscsi::scsi::MAX_SERIAL`] ASCII characters; see [`Disk::serial`].
    pub serial: String,
}

/// A running iSCSI server. Dropping it closes it.
pub struct IscsiServer {
    shared: Arc<Shared>,
    address: Address,
}

/// What the connections share.
struct Shared {
    device: Arc<dyn Exported>,
    /// Taken for a moment at a time, never during I/O.
    target: Mutex<Target>,
    /// How to wake a connection's thread.
    kicks: Mutex<HashMap<ConnectionId, Arc<Kick>>>,
    doors: Arc<Doors>,
    workers: Workers,
    bytes_read: AtomicU64,
}

impl IscsiServer {
    /// Serves `device` as LUN 0.
    ///
    /// # Errors
    /// The address is taken or not ours; a size that is no number of blocks.
    pub fn listen(options: IscsiOptions, device: Arc<dyn Exported>) -> Result<Self, ListenError> {
        let IscsiOptions { address, name, access, peers, digests, block_bytes, serial } = options;
        debug_assert!(decant_iscsi::text::is_name(&name), "names of our own are as the standard has them: {name}");
        let size = device.size();
        if !matches!(block_bytes, 512 | 4096) || size == 0 || !size.is_multiple_of(block_bytes.into()) {
            return Err(ListenError::Blocks { size, block_bytes });
        }
        let address = Address::Tcp(address);
        let bind = |source| ListenError::Bind { address: address.clone(), source };
        let listener = Listener::bind(&address).map_err(bind)?;
        let bound = listener.address().map_err(bind)?;
        let disk = Disk {
            vendor: "DECANT".to_owned(),
            product: "VOLUME".to_owned(),
            revision: env!("CARGO_PKG_VERSION_MAJOR").to_owned(),
            serial,
            block_bytes,
            // The medium's blocks are 4 KiB; GET LBA STATUS answers in these.
            physical_exponent: if block_bytes == 512 && size.is_multiple_of(4096) { 3 } else { 0 },
            blocks: size / u64::from(block_bytes),
            read_only: device.read_only(),
            thin: true,
            max_transfer: MAX_TRANSFER,
            digests: device.digests(0, 0, &mut Vec::new()).is_some(),
        };
        let offer = Offer { header_digest: digests, data_digest: digests, ..Offer::default() };
        // Where it listens on all addresses, SendTargets gives none: the initiator takes the one it came to.
        let addresses = match &bound {
            Address::Tcp(address) if !address.ip().is_unspecified() => vec![address.to_string()],
            _ => Vec::new(),
        };
        let config = Config { name, addresses, portal_group: 1, access, offer, limits: Limits::default() };
        let doors = Arc::new(Doors::new("iscsi", &peers).map_err(ListenError::Start)?);
        let shared = Arc::new(Shared {
            device,
            target: Mutex::new(Target::new(config, disk)),
            kicks: Mutex::new(HashMap::new()),
            doors,
            workers: Workers::new("iscsi-work", WORKERS),
            bytes_read: AtomicU64::new(0),
        });
        let serving = Arc::clone(&shared);
        let serve = move |visitor: Visitor| connection::run(&serving, visitor);
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

    /// Counts so far; `refused` are addresses that are not on the list, and connections that ended before a login.
    pub fn served(&self) -> Served {
        let (connections, refused) = self.shared.doors.counts();
        Served { connections, bytes_read: self.shared.bytes_read.load(Ordering::Relaxed), refused }
    }

    /// Names of the initiators that are logged in.
    pub fn initiators(&self) -> Vec<String> {
        self.shared.target().initiators().map(str::to_owned).collect()
    }

    /// Tells all initiators that their session ends, ends them, and waits until their threads are gone. What was acknowledged
    /// stays done; requests in progress at the medium are waited for. Must not be called by the device.
    pub fn close(&self) {
        self.shared.target().shut_down();
        self.shared.wake_others();
        self.shared.doors.close();
        self.shared.workers.close();
    }
}

impl Drop for IscsiServer {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn target(&self) -> MutexGuard<'_, Target> {
        self.target.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn kicks(&self) -> MutexGuard<'_, HashMap<ConnectionId, Arc<Kick>>> {
        self.kicks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Kicks the connections that another one did something to.
    fn wake_others(&self) {
        loop {
            let Some(id) = self.target().poll_wakeup() else { return };
            if let Some(kick) = self.kicks().get(&id) {
                kick.kick();
            }
        }
    }
}
