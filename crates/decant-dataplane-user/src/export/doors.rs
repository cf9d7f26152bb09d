//! What every server has: a thread that accepts, a thread for each connection, and an end that waits for all of them.

use std::collections::HashMap;
use std::io;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use rustix::event::{PollFd, PollFlags};

use super::MAX_CONNECTIONS;
use crate::stream::{Kick, Listener, now, wait_for};

struct Guest {
    kick: Arc<Kick>,
    thread: Option<JoinHandle<()>>,
}

/// Who came in.
pub(super) struct Visitor {
    /// Its socket, nonblocking.
    pub(super) socket: OwnedFd,
    /// Wakes its thread.
    pub(super) kick: Arc<Kick>,
    /// Its address, for people.
    pub(super) peer: String,
}

/// The connections of one server.
pub(super) struct Doors {
    /// For thread names and messages.
    protocol: &'static str,
    /// Who may come in over TCP; empty: anybody.
    allowed: Vec<IpAddr>,
    closed: AtomicBool,
    kick: Kick,
    guests: Mutex<HashMap<u64, Guest>>,
    refused: AtomicU64,
    acceptor: Mutex<Option<JoinHandle<()>>>,
}

impl Doors {
    pub(super) fn new(protocol: &'static str, allowed: &[IpAddr]) -> io::Result<Self> {
        Ok(Self {
            protocol,
            allowed: allowed.iter().map(IpAddr::to_canonical).collect(),
            closed: AtomicBool::new(false),
            kick: Kick::new()?,
            guests: Mutex::new(HashMap::new()),
            refused: AtomicU64::new(0),
            acceptor: Mutex::new(None),
        })
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<u64, Guest>> {
        self.guests.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Starts to accept; each connection is served by `serve` on a thread of its own.
    pub(super) fn open(
        self: &Arc<Self>,
        listener: Listener,
        serve: impl Fn(Visitor) + Send + Sync + 'static,
    ) -> io::Result<()> {
        let doors = Arc::clone(self);
        let serve = Arc::new(serve);
        let accepting = thread::Builder::new().name(format!("{}-accept", self.protocol));
        let accepting = accepting.spawn(move || doors.accept(&listener, &serve))?;
        *self.acceptor.lock().unwrap_or_else(PoisonError::into_inner) = Some(accepting);
        Ok(())
    }

    pub(super) fn is_closed(&self) -> bool {
        self.closed.load(Ordering::Acquire)
    }

    /// Wakes every connection's thread.
    pub(super) fn wake(&self) {
        self.lock().values().for_each(|guest| guest.kick.kick());
    }

    /// Counts one that was turned away.
    pub(super) fn refuse(&self) {
        self.refused.fetch_add(1, Ordering::Relaxed);
    }

    /// Connections that are open, and how many were turned away.
    pub(super) fn counts(&self) -> (u64, u64) {
        (self.lock().len() as u64, self.refused.load(Ordering::Relaxed))
    }

    /// Ends every connection and waits for its thread. Not to be called on one of them.
    pub(super) fn close(&self) {
        self.closed.store(true, Ordering::Release);
        self.kick.kick();
        let acceptor = self.acceptor.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(acceptor) = acceptor {
            let _ = acceptor.join();
        }
        let leaving = |guest: &mut Guest| {
            guest.kick.kick();
            guest.thread.take()
        };
        let threads: Vec<_> = self.lock().values_mut().filter_map(leaving).collect();
        for thread in threads {
            let _ = thread.join();
        }
    }

    fn accept<F: Fn(Visitor) + Send + Sync + 'static>(self: &Arc<Self>, listener: &Listener, serve: &Arc<F>) {
        let mut serial = 0u64;
        while !self.is_closed() {
            match listener.accept() {
                Ok((socket, peer)) => {
                    serial += 1;
                    self.let_in(serial, socket, peer.address, peer.name, serve);
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                    let mut fds = [
                        PollFd::new(listener, PollFlags::IN),
                        PollFd::from_borrowed_fd(self.kick.as_fd(), PollFlags::IN),
                    ];
                    if wait_for(&mut fds, None).is_err() {
                        return;
                    }
                }
                Err(error) => {
                    // Out of descriptors, most likely: some will come back. Not a busy loop meanwhile.
                    tracing::warn!(%error, protocol = self.protocol, "cannot accept a connection");
                    self.kick.wait(now().checked_add(Duration::from_millis(100)));
                }
            }
        }
    }

    fn let_in<F: Fn(Visitor) + Send + Sync + 'static>(
        self: &Arc<Self>,
        serial: u64,
        socket: OwnedFd,
        address: Option<IpAddr>,
        peer: String,
        serve: &Arc<F>,
    ) {
        let protocol = self.protocol;
        if !self.allowed.is_empty() && address.is_some_and(|address| !self.allowed.contains(&address.to_canonical())) {
            self.refuse();
            return tracing::warn!(protocol, %peer, "connection refused: its address is not on the list");
        }
        let kick = match Kick::new() {
            Ok(kick) => Arc::new(kick),
            Err(error) => return tracing::warn!(protocol, %error, "cannot serve a connection"),
        };
        let mut guests = self.lock();
        if guests.len() >= MAX_CONNECTIONS {
            self.refuse();
            return tracing::warn!(protocol, %peer, "connection refused: {MAX_CONNECTIONS} are open");
        }
        let visitor = Visitor { socket, kick: Arc::clone(&kick), peer };
        let thread = {
            let (doors, serve) = (Arc::clone(self), Arc::clone(serve));
            thread::Builder::new().name(format!("{protocol}-serve")).spawn(move || {
                serve(visitor);
                doors.lock().remove(&serial);
            })
        };
        match thread {
            Ok(thread) => {
                guests.insert(serial, Guest { kick, thread: Some(thread) });
            }
            Err(error) => tracing::warn!(protocol, %error, "cannot serve a connection"),
        }
    }
}
