//! The connections to one origin, whatever they speak.

use std::io;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::{self, JoinHandle, ThreadId};
use std::time::Duration;

use super::client::{Client, Found, Terms};
use super::connection::{self, Slot};
use super::pool::{Job, Pool};
use super::{Address, IscsiOptions, Options, Timing, iscsi, nbd};
use crate::device::{Fetch, Origin, OriginSink};
use crate::stream::now;
use crate::tls::ClientTls;

/// What the connections have in common, beside their protocol.
pub(super) struct Settings {
    /// For names of threads.
    pub(super) protocol: &'static str,
    pub(super) address: Address,
    pub(super) tls: Option<ClientTls>,
    /// The export's or the target's.
    pub(super) name: String,
    /// The size that it must have; another is refused.
    pub(super) size: Option<u64>,
    /// What that is, for messages.
    pub(super) what: &'static str,
    /// How many, 1..=8.
    pub(super) connections: usize,
    /// Whether they may all be made at once; else the first session says whether there may be others.
    pub(super) at_once: bool,
    pub(super) timing: Timing,
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

/// What to connect to.
#[derive(Clone)]
pub enum Spec {
    /// An NBD export.
    Nbd(Options),
    /// A disk over iSCSI.
    Iscsi(IscsiOptions),
}

impl From<Options> for Spec {
    fn from(options: Options) -> Self {
        Self::Nbd(options)
    }
}

impl From<IscsiOptions> for Spec {
    fn from(options: IscsiOptions) -> Self {
        Self::Iscsi(options)
    }
}

/// What the connections have come to.
#[derive(Debug, Clone, Default)]
struct Link {
    up: usize,
    terms: Option<Terms>,
    detail: String,
}

pub(super) struct Shared {
    pub(super) settings: Settings,
    pub(super) pool: Pool,
    pub(super) slots: Vec<Slot>,
    closed: AtomicBool,
    in_flight: AtomicU64,
    sessions: AtomicU64,
    link: Mutex<Link>,
    /// Held from what the connections have come to until the sink knows, so that it hears of it in that order. Taken before
    /// `link`; the sink may make requests meanwhile.
    news: Mutex<()>,
    changed: Condvar,
}

/// Connections to one origin. Dropping it closes them.
pub struct Remote {
    shared: Arc<Shared>,
    threads: Mutex<Vec<(ThreadId, JoinHandle<()>)>>,
}

impl Remote {
    /// Starts connecting; never waits for the network. Answers go to `sink`, which is let go of when the origin is closed.
    ///
    /// # Errors
    /// No descriptors, threads or random numbers left.
    pub fn open(spec: impl Into<Spec>, sink: Arc<dyn OriginSink>) -> io::Result<Arc<Self>> {
        match spec.into() {
            Spec::Nbd(options) => {
                let (settings, make) = nbd::parts(options);
                Self::start(settings, sink, &make)
            }
            Spec::Iscsi(options) => {
                let (settings, make) = iscsi::parts(options)?;
                Self::start(settings, sink, &make)
            }
        }
    }

    fn start(
        settings: Settings,
        sink: Arc<dyn OriginSink>,
        make: &dyn Fn(usize) -> Box<dyn Client>,
    ) -> io::Result<Arc<Self>> {
        let lanes = settings.connections.clamp(1, 8);
        let slots = (0..lanes).map(|lane| Slot::new(make(lane))).collect::<io::Result<Vec<_>>>()?;
        let protocol = settings.protocol;
        let shared = Arc::new(Shared {
            settings,
            pool: Pool::new(lanes),
            slots,
            closed: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
            link: Mutex::new(Link::default()),
            news: Mutex::default(),
            changed: Condvar::new(),
        });
        let origin = Arc::new(Self { shared: shared.clone(), threads: Mutex::new(Vec::new()) });
        for lane in 0..lanes {
            let (shared, sink) = (shared.clone(), sink.clone());
            let thread = thread::Builder::new()
                .name(format!("{protocol}-origin-{lane}"))
                .spawn(move || connection::run(&shared, lane, &*sink))?;
            origin.lock_threads().push((thread.thread().id(), thread));
        }
        Ok(origin)
    }

    /// Waits for the first session.
    ///
    /// # Errors
    /// There was none in time; tries go on nevertheless until the origin is closed.
    pub fn wait_connected(&self, timeout: Duration) -> Result<Found, NotConnected> {
        let shared = &self.shared;
        let link = shared.link.lock().unwrap_or_else(PoisonError::into_inner);
        let waiting = |link: &mut Link| link.up == 0 && !shared.is_closed();
        let (link, _) =
            shared.changed.wait_timeout_while(link, timeout, waiting).unwrap_or_else(PoisonError::into_inner);
        match &link.terms {
            Some(terms) if link.up > 0 => Ok(terms.found.clone()),
            _ => Err(NotConnected { address: shared.settings.address.to_string(), detail: link.detail.clone() }),
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

impl Origin for Remote {
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

impl Drop for Remote {
    fn drop(&mut self) {
        self.close();
    }
}

impl Shared {
    /// Whether further lanes may connect.
    pub(super) fn may_share(&self) -> bool {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        self.settings.at_once || link.terms.as_ref().is_some_and(|terms| terms.several)
    }

    /// The size that a session must find: what was asked for, or what the first one found.
    pub(super) fn size(&self) -> Option<u64> {
        let link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        self.settings.size.or_else(|| link.terms.as_ref().map(|terms| terms.found.size))
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// A session is up.
    pub(super) fn session_up(&self, terms: &Terms, sink: &dyn OriginSink) {
        self.sessions.fetch_add(1, Ordering::Relaxed);
        let _in_order = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.up += 1;
        link.terms = Some(terms.clone());
        let first = link.up == 1;
        link.detail = format!("connected to {}", self.settings.address);
        let detail = link.detail.clone();
        drop(link);
        self.changed.notify_all();
        if first {
            sink.handle_link(true, &detail);
        }
    }

    /// A try failed, or a session (`was_up`) broke. The sink is told of the last session's end and of each new reason why there
    /// is none.
    pub(super) fn session_down(&self, was_up: bool, reason: &str, sink: &dyn OriginSink) {
        let in_order = self.news.lock().unwrap_or_else(PoisonError::into_inner);
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        link.up -= usize::from(was_up);
        let others = link.up > 0;
        let news = was_up || (!others && link.detail != reason);
        if !others {
            reason.clone_into(&mut link.detail);
        }
        drop(link);
        if !others {
            self.changed.notify_all();
        }
        if !news || self.is_closed() {
            return;
        }
        if !others {
            sink.handle_link(false, reason);
        }
        drop(in_order);
        let (origin, name) = (&self.settings.address, &self.settings.name);
        if others {
            // The link is up, but what keeps ending one of its sessions should not be a secret.
            tracing::info!(%origin, name, reason, "a session with the origin ended");
        } else {
            tracing::warn!(%origin, name, reason, "no session with the origin");
        }
    }

    /// A request is answered.
    pub(super) fn done(&self, fetch: &Fetch, result: Result<(), rustix::io::Errno>, sink: &dyn OriginSink) {
        self.in_flight.fetch_sub(fetch.length.into(), Ordering::Relaxed);
        sink.handle_done(fetch.token, result);
    }

    pub(super) fn deadline(&self, wait: Duration) -> Option<std::time::Instant> {
        now().checked_add(wait)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::TryLockError;

    use rustix::io::Errno;

    use super::*;

    /// Notes what it is told, and whether another lane could be told something else meanwhile.
    struct Told {
        shared: Arc<Shared>,
        links: Mutex<Vec<(bool, bool)>>,
    }

    impl OriginSink for Told {
        fn handle_data(&self, _token: u64, _offset: u64, _data: &[u8]) {}
        fn handle_hole(&self, _token: u64, _offset: u64, _length: u64) {}
        fn handle_digests(&self, _token: u64, _offset: u64, _crc32c: &[u32]) {}
        fn handle_done(&self, _token: u64, _result: Result<(), Errno>) {}
        fn handle_link(&self, up: bool, _detail: &str) {
            let is_alone = matches!(self.shared.news.try_lock(), Err(TryLockError::WouldBlock));
            self.links.lock().unwrap().push((up, is_alone));
        }
    }

    /// Lanes that connect at once fail and succeed at once: a failure told after a later success would be the last word.
    #[test]
    fn lanes_tell_of_the_link_one_at_a_time() {
        let settings = Settings {
            protocol: "test",
            address: Address::of_host("127.0.0.1", 1),
            tls: None,
            name: "disk".into(),
            size: None,
            what: "disk",
            connections: 2,
            at_once: true,
            timing: Timing::NETWORK,
        };
        let shared = Arc::new(Shared {
            settings,
            pool: Pool::new(2),
            slots: Vec::new(),
            closed: AtomicBool::new(false),
            in_flight: AtomicU64::new(0),
            sessions: AtomicU64::new(0),
            link: Mutex::default(),
            news: Mutex::default(),
            changed: Condvar::new(),
        });
        let told = Told { shared: shared.clone(), links: Mutex::default() };
        let found = Found { size: 4096, block_bytes: 512, digests: false };
        let terms = Terms { found, several: true, parts: (4096, 4096), unfragmented: true };
        shared.session_down(false, "refused", &told);
        shared.session_down(false, "refused", &told);
        shared.session_up(&terms, &told);
        shared.session_up(&terms, &told);
        shared.session_down(false, "no more than two", &told);
        shared.session_down(true, "cut", &told);
        shared.session_down(true, "cut", &told);
        assert_eq!(*told.links.lock().unwrap(), [(false, true), (true, true), (false, true)]);
    }
}
