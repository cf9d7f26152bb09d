//! An NBD client as the origin of a clone: it asks until it is answered.
//!
//! ```text
//! engine --request--> pool --lane 0: urgent------ thread --connection--> server
//!                          \-lanes 1..: the rest- thread --connection-->
//! ```
//!
//! One thread per connection, which connects, haggles, sends what its lane holds, and hands answers to the [`OriginSink`]; while
//! it waits for the network, whoever asks puts the request on the wire himself. A
//! connection that breaks, or that stays silent while it owes an answer, is made again, for ever, with bounded backoff; what
//! it owed goes back to the pool and to whichever lane is up. Urgent requests have a connection of their own, so that they
//! never queue behind megabytes of hydration. Further connections are made only if the server allows several (multi-conn).

mod connection;
mod pool;

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use decant_nbd::ExportInfo;

use crate::device::{Fetch, Origin, OriginSink};
use crate::stream::now;
use crate::tls::ClientTls;

pub use crate::stream::Address;
use connection::Slot;
use pool::{Job, Pool};

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

/// What to connect to, and how.
#[derive(Clone)]
pub struct Options {
    /// Where the server listens.
    pub address: Address,
    /// Mutual TLS with a pinned peer, or in the clear.
    pub tls: Option<ClientTls>,
    /// The export's name.
    pub export: String,
    /// The size that the export must have; another is refused.
    pub size: Option<u64>,
    /// Whether to ask for digests (`decant:crc32c`).
    pub digests: bool,
    /// Connections, 1..=8; the first is for urgent requests alone while there are others.
    pub connections: usize,
    /// Patience.
    pub timing: Timing,
}

impl Options {
    /// What a clone uses for the origin that a plane's command names.
    pub fn for_clone(origin: &decant_dataplane::Origin, tls: ClientTls, size: u64) -> Self {
        Self {
            address: origin.address.into(),
            tls: Some(tls),
            export: origin.export.clone(),
            size: Some(size),
            digests: true,
            connections: 3,
            timing: Timing::NETWORK,
        }
    }
}

/// Why there is no session, told to whoever waits for the first one.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no session with the origin {address}: {detail}")]
pub struct NotConnected {
    /// Of the origin.
    pub address: String,
    /// The last try's error.
    pub detail: String,
}

/// What the connections have come to.
#[derive(Debug, Clone, Default)]
struct Link {
    up: usize,
    export: Option<ExportInfo>,
    detail: String,
}

struct Shared {
    options: Options,
    pool: Pool,
    slots: Vec<Slot>,
    closed: AtomicBool,
    in_flight: AtomicU64,
    sessions: AtomicU64,
    link: Mutex<Link>,
    changed: Condvar,
}

/// Connections to one origin. Dropping it closes them.
pub struct NbdOrigin {
    shared: Arc<Shared>,
    threads: Mutex<Vec<(ThreadId, JoinHandle<()>)>>,
}

impl NbdOrigin {
    /// Starts connecting; never waits for the network. Answers go to `sink`, which is let go of when the origin is closed.
    ///
    /// # Errors
    /// No descriptors or threads left.
    pub fn open(options: Options, sink: Arc<dyn OriginSink>) -> io::Result<Arc<Self>> {
        let lanes = options.connections.clamp(1, 8);
        let slots = (0..lanes).map(|_| Slot::new(&options)).collect::<io::Result<Vec<_>>>()?;
        let shared = Arc::new(Shared {
            options,
            pool: Pool::new(lanes),
            slots,
            closed: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
            link: Mutex::new(Link::default()),
            changed: Condvar::new(),
        });
        let origin = Arc::new(Self { shared: shared.clone(), threads: Mutex::new(Vec::new()) });
        for lane in 0..lanes {
            let (shared, sink) = (shared.clone(), sink.clone());
            let thread = thread::Builder::new()
                .name(format!("nbd-origin-{lane}"))
                .spawn(move || connection::run(&shared, lane, &*sink))?;
            origin.lock_threads().push((thread.thread().id(), thread));
        }
        Ok(origin)
    }

    /// Waits for the first session.
    ///
    /// # Errors
    /// There was none in time; tries go on nevertheless until the origin is closed.
    pub fn wait_connected(&self, timeout: Duration) -> Result<ExportInfo, NotConnected> {
        let shared = &self.shared;
        let link = shared.link.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |link: &mut Link| link.up == 0 && !shared.is_closed();
        let (link, _) =
            shared.changed.wait_timeout_while(link, timeout, waiting).unwrap_or_else(PoisonError::into_inner);
        match &link.export {
            Some(export) if link.up > 0 => Ok(export.clone()),
            _ => Err(NotConnected { address: shared.options.address.to_string(), detail: link.detail.clone() }),
        }
    }

    /// Sessions that were made so far, all connections together; more than there are connections means that some broke.
    pub fn sessions(&self) -> u64 {
        self.shared.sessions.load(Ordering::Relaxed)
    }

    fn lock_threads(&self) -> std::sync::MutexGuard<'_, Vec<(ThreadId, JoinHandle<()>)>> {
        self.threads.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Origin for NbdOrigin {
    fn request(&self, fetch: Fetch) {
        if self.shared.is_closed() || fetch.length == 0 {
            return;
        }
        self.shared.in_flight.fetch_add(fetch.length.into(), Ordering::Relaxed);
        let lane = self.shared.pool.submit(Job::new(fetch));
        if let Some((index, slot)) = lane.and_then(|lane| Some((lane, self.shared.slots.get(lane)?))) {
            slot.post(&self.shared.pool, index);
        }
    }

    fn in_flight(&self) -> u64 {
        self.shared.in_flight.load(Ordering::Relaxed)
    }

    fn close(&self) {
        self.shared.closed.store(true, Ordering::Release);
        self.shared.slots.iter().for_each(|slot| slot.kick.kick());
        self.shared.changed.notify_all();
        let threads = std::mem::take(&mut *self.lock_threads());
        for (id, thread) in threads {
            // The last reference may be dropped by the sink, on one of these threads, which then ends on its own.
            if id != thread::current().id() {
                let _ = thread.join();
            }
        }
    }
}

impl Drop for NbdOrigin {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// A session is up.
    fn session_up(&self, export: &ExportInfo, sink: &dyn OriginSink) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.up += 1;
        link.export = Some(export.clone());
        let first = link.up == 1;
        link.detail = format!("connected to {}", self.options.address);
        let detail = link.detail.clone();
        drop(link);
        self.changed.notify_all();
        if first {
            sink.handle_link(true, &detail);
        }
    }

    /// A try failed, or a session (`was_up`) broke. The sink is told of the last session's end and of each new reason why there
    /// is none.
    fn session_down(&self, was_up: bool, reason: &str, sink: &dyn OriginSink) {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.up -= usize::from(was_up);
        if link.up > 0 {
            return;
        }
        let news = was_up || link.detail != reason;
        link.detail = reason.to_owned();
        drop(link);
        self.changed.notify_all();
        if news && !self.is_closed() {
            tracing::warn!(origin = %self.options.address, export = self.options.export, reason, "no session with the origin");
            sink.handle_link(false, reason);
        }
    }

    /// A request is answered.
    fn done(&self, fetch: &Fetch, result: Result<(), rustix::io::Errno>, sink: &dyn OriginSink) {
        self.in_flight.fetch_sub(fetch.length.into(), Ordering::Relaxed);
        sink.handle_done(fetch.token, result);
    }

    fn deadline(&self, wait: Duration) -> Option<std::time::Instant> {
        now().checked_add(wait)
    }
}
