//! The client that writes and reads all along: one writer and one reader at a steady pace, each on its own thread in
//! the network namespace of the worker whose proxy they use.
//!
//! The writer sends one order at a time, each with its own key, and repeats it until it is acknowledged: a gap between
//! acknowledgements is a gap in the service. The reader asks for random orders of the first filling and compares
//! every byte, so a block read as zeros or as something else would show.

use std::fs::File;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU16, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use anyhow::Context;

use super::ledger::Acknowledged;
use super::store::{self, NewOrder, Order};
use crate::http::{Address, Connection};

/// From one acknowledgement to the next write: fine enough to time a gap to a few milliseconds, and half a
/// core is left for the workers.
const WRITE_PACE: Duration = Duration::from_millis(2);
/// From one read to the next.
const READ_PACE: Duration = Duration::from_millis(2);
/// After a failed try. The proxy parks connections while a machine moves, so few tries fail.
const RETRY_PAUSE: Duration = Duration::from_millis(1);
/// One try. Long enough for a proxy to hold a connection through a move.
const TRY: Duration = Duration::from_secs(2);

/// Now, in nanoseconds of CLOCK_MONOTONIC.
pub(crate) fn monotonic_ns() -> u64 {
    let now = rustix::time::clock_gettime(rustix::time::ClockId::Monotonic);
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// How to run the client.
#[derive(Debug)]
pub(crate) struct LoadOptions {
    /// The network namespace to connect from.
    pub(crate) namespace: File,
    /// The proxy.
    pub(crate) address: SocketAddr,
    /// Rows 1 to this are the filling's and are read at random; 0 reads nothing.
    pub(crate) filled: i64,
    /// Prefix of keys and references.
    pub(crate) prefix: String,
    /// The number of the first order, beyond those of earlier clients of the same prefix.
    pub(crate) first: u64,
}

/// One read: when it began and what it took, in nanoseconds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Read {
    pub(crate) at_ns: u64,
    pub(crate) took_ns: u64,
}

/// What the client saw.
#[derive(Debug, Default)]
pub(crate) struct Log {
    pub(crate) acknowledged: Vec<Acknowledged>,
    /// The number after the last one used, acknowledged or not.
    pub(crate) sent: u64,
    pub(crate) reads: Vec<Read>,
    /// Reads whose try failed; they were repeated.
    pub(crate) failed_reads: u64,
    /// Reads that returned something else than was written. Must be 0.
    pub(crate) wrong_reads: u64,
    /// The first wrong read, for people.
    pub(crate) wrong_example: Option<String>,
}

impl Log {
    /// Adds what a later client saw.
    pub(crate) fn append(&mut self, later: Log) {
        self.acknowledged.extend(later.acknowledged);
        self.sent = later.sent;
        self.reads.extend(later.reads);
        self.failed_reads += later.failed_reads;
        self.wrong_reads += later.wrong_reads;
        self.wrong_example = self.wrong_example.take().or(later.wrong_example);
    }
}

#[derive(Debug, Default)]
struct Shared {
    stop: AtomicBool,
    /// The port to use from now on.
    port: AtomicU16,
    acknowledged: AtomicU64,
    reads: AtomicU64,
}

/// A running client.
#[derive(Debug)]
pub(crate) struct Load {
    shared: Arc<Shared>,
    writer: Option<JoinHandle<anyhow::Result<Log>>>,
    reader: Option<JoinHandle<anyhow::Result<Log>>>,
}

impl Load {
    /// Starts writer and reader.
    pub(crate) fn start(options: LoadOptions) -> anyhow::Result<Self> {
        let shared = Arc::new(Shared::default());
        let LoadOptions { namespace, address, filled, prefix, first } = options;
        shared.port.store(address.port(), Ordering::Relaxed);
        let mut load = Self { shared: Arc::clone(&shared), writer: None, reader: None };
        let (inside, of) = (namespace.try_clone().context("copying the namespace's descriptor")?, Arc::clone(&shared));
        load.writer = Some(spawn("client-writer", inside, move || write(&of, address, &prefix, first))?);
        if filled > 0 {
            load.reader = Some(spawn("client-reader", namespace, move || read(&shared, address, filled))?);
        }
        Ok(load)
    }

    /// Acknowledged writes so far.
    pub(crate) fn acknowledged(&self) -> u64 {
        self.shared.acknowledged.load(Ordering::Relaxed)
    }

    /// Completed reads so far.
    pub(crate) fn reads(&self) -> u64 {
        self.shared.reads.load(Ordering::Relaxed)
    }

    /// Goes to another port of the same proxy from the next try on.
    pub(crate) fn switch(&self, port: u16) {
        self.shared.port.store(port, Ordering::Relaxed);
    }

    /// Whether it reads too.
    pub(crate) fn has_reader(&self) -> bool {
        self.reader.is_some()
    }

    /// Ends both and gives what they saw. A write in flight is given up and counts as sent, not acknowledged.
    pub(crate) fn finish(mut self) -> anyhow::Result<Log> {
        self.shared.stop.store(true, Ordering::Relaxed);
        let mut log = join(self.writer.take())?;
        let reads = join(self.reader.take())?;
        log.reads = reads.reads;
        log.failed_reads = reads.failed_reads;
        log.wrong_reads += reads.wrong_reads;
        log.wrong_example = log.wrong_example.or(reads.wrong_example);
        Ok(log)
    }
}

impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::Relaxed);
        let _ = join(self.writer.take());
        let _ = join(self.reader.take());
    }
}

fn join(thread: Option<JoinHandle<anyhow::Result<Log>>>) -> anyhow::Result<Log> {
    match thread {
        None => Ok(Log::default()),
        Some(thread) => thread.join().unwrap_or_else(|_| Err(anyhow::anyhow!("the client's thread panicked"))),
    }
}

fn spawn(
    name: &str,
    namespace: File,
    body: impl FnOnce() -> anyhow::Result<Log> + Send + 'static,
) -> anyhow::Result<JoinHandle<anyhow::Result<Log>>> {
    std::thread::Builder::new()
        .name(name.into())
        .spawn(move || {
            rustix::thread::move_into_link_name_space(
                std::os::fd::AsFd::as_fd(&namespace),
                Some(rustix::thread::LinkNameSpaceType::Network),
            )
            .context("entering the worker's network namespace")?;
            body()
        })
        .context("starting the client's thread")
}

/// The connection to where the client is to go now.
fn follow(shared: &Shared, address: &mut SocketAddr, connection: &mut Connection) {
    let port = shared.port.load(Ordering::Relaxed);
    if port != address.port() {
        address.set_port(port);
        *connection = Connection::new(Address::Tcp(*address), TRY);
    }
}

fn write(shared: &Shared, mut address: SocketAddr, prefix: &str, first: u64) -> anyhow::Result<Log> {
    let mut log = Log { sent: first, ..Log::default() };
    let mut connection = Connection::new(Address::Tcp(address), TRY);
    while !shared.stop.load(Ordering::Relaxed) {
        let n = log.sent;
        log.sent += 1;
        let reference = format!("{prefix}{n}");
        let key = format!("{prefix}{n:012}");
        let order = NewOrder { reference, item: "cask".into(), quantity: 1 + n as i64 % 97, note: String::new() };
        let body = serde_json::to_vec(&order)?;
        let header = format!("Idempotency-Key: {key}\r\n");
        let sent_ns = monotonic_ns();
        let mut tries = 0;
        while !shared.stop.load(Ordering::Relaxed) {
            tries += 1;
            follow(shared, &mut address, &mut connection);
            match connection.request("POST", "/orders", &header, &body) {
                Ok(answer) if matches!(answer.status, 200 | 201) => {
                    let acknowledged_ns = monotonic_ns();
                    let stored: Order = serde_json::from_slice(&answer.body).context("reading an acknowledgement")?;
                    if stored.order != order || stored.key != key {
                        log.wrong_reads += 1;
                        log.wrong_example.get_or_insert_with(|| format!("order {key} was acknowledged as {stored:?}"));
                    }
                    let NewOrder { reference, quantity, .. } = order;
                    let id = stored.id;
                    log.acknowledged.push(Acknowledged {
                        key,
                        reference,
                        quantity,
                        id,
                        sent_ns,
                        acknowledged_ns,
                        tries,
                    });
                    shared.acknowledged.fetch_add(1, Ordering::Relaxed);
                    break;
                }
                Ok(_) | Err(_) => std::thread::sleep(RETRY_PAUSE),
            }
        }
        std::thread::sleep(WRITE_PACE);
    }
    Ok(log)
}

fn read(shared: &Shared, mut address: SocketAddr, filled: i64) -> anyhow::Result<Log> {
    let mut log = Log::default();
    let mut connection = Connection::new(Address::Tcp(address), TRY);
    let mut random = monotonic_ns();
    while !shared.stop.load(Ordering::Relaxed) {
        random = store::scramble(random);
        let id = 1 + (random % filled as u64) as i64;
        let path = format!("/orders/{id}");
        follow(shared, &mut address, &mut connection);
        let at_ns = monotonic_ns();
        match connection.request("GET", &path, "", b"") {
            Ok(answer) if answer.status == 200 => {
                log.reads.push(Read { at_ns, took_ns: monotonic_ns() - at_ns });
                let same = serde_json::from_slice::<Order>(&answer.body).is_ok_and(|order| order == store::filled(id));
                if !same {
                    log.wrong_reads += 1;
                    log.wrong_example.get_or_insert_with(|| {
                        format!(
                            "order {id} was read as {:?}",
                            String::from_utf8_lossy(&answer.body).chars().take(200).collect::<String>()
                        )
                    });
                }
                shared.reads.fetch_add(1, Ordering::Relaxed);
            }
            Ok(answer) if answer.status == 404 => {
                log.wrong_reads += 1;
                log.wrong_example.get_or_insert_with(|| format!("order {id} was filled and is not there"));
            }
            Ok(_) => log.failed_reads += 1,
            Err(error) => {
                log.failed_reads += 1;
                if error.kind() == io::ErrorKind::InvalidData {
                    return Err(error).context("reading an answer");
                }
                std::thread::sleep(RETRY_PAUSE);
            }
        }
        std::thread::sleep(READ_PACE);
    }
    Ok(log)
}
