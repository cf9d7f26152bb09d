//! A nonblocking connection to a peer, plain or TLS, and how a thread waits for it.

use std::fmt;
use std::io;
use std::net::{IpAddr, SocketAddr, TcpListener, ToSocketAddrs};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileTypeExt;
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, Timespec, eventfd, poll};
use rustix::io::Errno;
use rustix::net::{self, AddressFamily, RecvFlags, SendFlags, SocketAddrUnix, SocketFlags, SocketType, sockopt};

use crate::tls::{self, Progress, Session};

/// Unacknowledged data, or a window that stays shut, ends a connection after this long.
const USER_TIMEOUT_MS: u32 = 20_000;
/// An idle connection is probed after this long, this often, this many times.
const KEEPALIVE: (Duration, Duration, u32) = (Duration::from_secs(5), Duration::from_secs(5), 3);

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Address {
    /// TCP.
    Tcp(SocketAddr),
    /// TCP at whatever addresses the host's name has when somebody connects.
    Name {
        /// The host's name.
        host: String,
        /// TCP port.
        port: u16,
    },
    /// A Unix socket.
    Unix(PathBuf),
}

impl Address {
    /// Of a host, by its address (an IPv6 one perhaps in brackets) or its name, which is not looked up here.
    pub fn of_host(host: &str, port: u16) -> Self {
        let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        match bare.parse::<IpAddr>() {
            Ok(ip) => Self::Tcp(SocketAddr::new(ip, port)),
            Err(_) => Self::Name { host: host.to_owned(), port },
        }
    }

    /// The TCP port.
    pub fn port(&self) -> Option<u16> {
        match self {
            Self::Tcp(address) => Some(address.port()),
            Self::Name { port, .. } => Some(*port),
            Self::Unix(_) => None,
        }
    }

    /// What to connect to: a name has perhaps several addresses, in the resolver's order, and is looked up each time, for at most
    /// `patience`, and no longer than until `given_up` says so.
    ///
    /// # Errors
    /// The resolver's; `TimedOut`.
    pub(crate) fn look_up(&self, patience: Duration, given_up: impl Fn() -> bool) -> io::Result<Vec<Self>> {
        let Self::Name { host, port } = self else { return Ok(vec![self.clone()]) };
        // The resolver cannot be interrupted, so it is asked on a thread that nobody has to wait for.
        let (answer, found) = std::sync::mpsc::sync_channel(1);
        let name = (host.clone(), *port);
        std::thread::Builder::new().name("resolve".into()).spawn(move || {
            let _ = answer.send(name.to_socket_addrs().map(Iterator::collect::<Vec<SocketAddr>>));
        })?;
        let deadline = now() + patience;
        let explain = |error: io::Error| io::Error::new(error.kind(), format!("{host} is not found: {error}"));
        loop {
            match found.recv_timeout(LOOK_UP_STEP) {
                Ok(Ok(found)) if found.is_empty() => return Err(explain(io::Error::other("it has no address"))),
                Ok(found) => return Ok(found.map_err(explain)?.into_iter().map(Self::Tcp).collect()),
                Err(_) if given_up() || now() >= deadline => return Err(explain(io::ErrorKind::TimedOut.into())),
                Err(_) => {}
            }
        }
    }
}

/// How soon somebody who looks a name up finds that he is not to.
const LOOK_UP_STEP: Duration = Duration::from_millis(20);

impl From<SocketAddr> for Address {
    fn from(address: SocketAddr) -> Self {
        Self::Tcp(address)
    }
}

impl fmt::Display for Address {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Tcp(address) => write!(f, "{address}"),
            Self::Name { host, port } => write!(f, "{host}:{port}"),
            Self::Unix(path) => write!(f, "{}", path.display()),
        }
    }
}

/// Wakes a thread that waits in [`Stream::wait`].
#[derive(Debug)]
pub(crate) struct Kick(OwnedFd);

impl Kick {
    pub(crate) fn new() -> io::Result<Self> {
        Ok(Self(eventfd(0, EventfdFlags::NONBLOCK | EventfdFlags::CLOEXEC)?))
    }

    /// Wakes whoever waits now, or else who waits next.
    pub(crate) fn kick(&self) {
        // EAGAIN: the counter is full, so the waiter is woken anyway.
        let _ = rustix::io::write(&self.0, &1u64.to_ne_bytes());
    }

    /// Forgets kicks so far.
    pub(crate) fn clear(&self) {
        let _ = rustix::io::read(&self.0, &mut [0u8; 8]);
    }

    /// Waits for a kick, or until `deadline`.
    pub(crate) fn wait(&self, deadline: Option<Instant>) {
        let _ = wait_for(&mut [PollFd::new(&self.0, PollFlags::IN)], deadline);
    }
}

impl AsFd for Kick {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.0.as_fd()
    }
}

/// The clock, read in one place.
pub(crate) fn now() -> Instant {
    Instant::now()
}

/// Polls until an event or `deadline`; a signal is no event.
pub(crate) fn wait_for(fds: &mut [PollFd<'_>], deadline: Option<Instant>) -> io::Result<usize> {
    loop {
        let timeout = deadline.map(|deadline| {
            let left = deadline.saturating_duration_since(now());
            Timespec { tv_sec: left.as_secs().cast_signed(), tv_nsec: left.subsec_nanos().into() }
        });
        match poll(fds, timeout.as_ref()) {
            Err(Errno::INTR) => {}
            result => return Ok(result?),
        }
    }
}

/// What a thread waits for besides the kick.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Wait {
    /// Input.
    Read,
    /// Input, or room for output.
    ReadWrite,
    /// Room for output.
    Write,
    /// The peer's leave only; input may lie there.
    Hangup,
}

/// A connection's socket, to wait on while the connection is in other hands.
pub(crate) struct Socket(Arc<OwnedFd>);

impl From<Arc<OwnedFd>> for Socket {
    fn from(socket: Arc<OwnedFd>) -> Self {
        Self(socket)
    }
}

impl Socket {
    /// Waits until what is wanted may work, a kick, or the deadline. True: kicked (and the kick is cleared).
    pub(crate) fn wait(&self, want: Wait, kick: &Kick, deadline: Option<Instant>) -> io::Result<bool> {
        wait_on(&self.0, want, kick, deadline)
    }
}

/// A connection.
pub(crate) struct Stream {
    socket: Arc<OwnedFd>,
    tls: Option<Session>,
    /// Plain output that did not fit into the socket.
    pending: Vec<u8>,
    pending_start: usize,
    /// Bytes received, ciphertext or plain: what tells a silent peer from a slow one.
    received: u64,
}

impl Stream {
    /// On a socket that was set up.
    pub(crate) fn new(socket: OwnedFd) -> Self {
        Self { socket: Arc::new(socket), tls: None, pending: Vec::new(), pending_start: 0, received: 0 }
    }

    /// Starts connecting to `address`; the socket is writable when that is decided, see [`Self::connected`].
    pub(crate) fn connect(address: &Address) -> io::Result<Self> {
        let flags = SocketFlags::NONBLOCK | SocketFlags::CLOEXEC;
        let (socket, result) = match address {
            Address::Tcp(address) => {
                let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
                let socket = net::socket_with(family, SocketType::STREAM, flags, None)?;
                let result = net::connect(&socket, address);
                (socket, result)
            }
            Address::Name { .. } => {
                return Err(io::Error::new(io::ErrorKind::InvalidInput, "a name that was not looked up"));
            }
            Address::Unix(path) => {
                let socket = net::socket_with(AddressFamily::UNIX, SocketType::STREAM, flags, None)?;
                let result = net::connect(&socket, &SocketAddrUnix::new(path)?);
                (socket, result)
            }
        };
        match result {
            Ok(()) | Err(Errno::INPROGRESS) => {
                set_up(&socket, !matches!(address, Address::Unix(_)))?;
                Ok(Self::new(socket))
            }
            Err(error) => Err(error.into()),
        }
    }

    /// How connecting went, once the socket is writable.
    pub(crate) fn connected(&self) -> io::Result<()> {
        Ok(sockopt::socket_error(&self.socket)??)
    }

    /// Everything from here on is TLS.
    pub(crate) fn start_tls(&mut self, session: Session) {
        self.tls = Some(session);
    }

    /// Whether TLS, if there is any, has come to where data may be sent.
    pub(crate) fn is_secured(&self) -> bool {
        self.tls.as_ref().is_none_or(Session::is_connected)
    }

    /// Bytes received so far, counted on the wire.
    pub(crate) fn bytes_received(&self) -> u64 {
        self.received
    }

    /// Its socket.
    pub(crate) fn socket(&self) -> Socket {
        Socket(Arc::clone(&self.socket))
    }

    /// As [`Socket::wait`].
    pub(crate) fn wait(&self, want: Wait, kick: &Kick, deadline: Option<Instant>) -> io::Result<bool> {
        wait_on(&self.socket, want, kick, deadline)
    }

    /// Reads plaintext; `WouldBlock` if there is none.
    ///
    /// # Errors
    /// The connection is over: `UnexpectedEof` when the peer closed it.
    pub(crate) fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let Some(session) = &mut self.tls else {
            let count = receive(&self.socket, into)?;
            self.received += count as u64;
            return Ok(count);
        };
        loop {
            match session.advance(into) {
                Ok((Progress::Plaintext, count)) => return Ok(count),
                Ok((Progress::Closed, _)) => return Err(closed_by_peer()),
                Ok((Progress::NeedsInput, _)) => {
                    if !session.outgoing().is_empty() {
                        flush_session(&self.socket, session)?;
                    }
                    let room = session.incoming();
                    if room.is_empty() {
                        return Err(io::Error::new(io::ErrorKind::InvalidData, "TLS: a message without end"));
                    }
                    let count = receive(&self.socket, room)?;
                    session.received(count);
                    self.received += count as u64;
                }
                Err(error) => {
                    let text = tls::explain(&error);
                    session.collect_alert();
                    let _ = flush_session(&self.socket, session);
                    return Err(io::Error::new(io::ErrorKind::InvalidData, text));
                }
            }
        }
    }

    /// Takes output and sends what the socket takes at once; the rest waits for [`Self::flush`]. For TLS the handshake must
    /// be over.
    pub(crate) fn send(&mut self, parts: &[io::IoSlice<'_>]) -> io::Result<()> {
        if let Some(session) = &mut self.tls {
            for part in parts {
                session.encrypt(part).map_err(|error| io::Error::other(tls::explain(&error)))?;
                flush_session(&self.socket, session)?;
            }
            return Ok(());
        }
        self.flush()?;
        let mut sent = 0;
        if self.pending.is_empty() {
            sent = match net::sendmsg(&self.socket, parts, &mut Default::default(), SendFlags::NOSIGNAL) {
                Ok(count) => count,
                Err(Errno::AGAIN | Errno::INTR) => 0,
                Err(error) => return Err(error.into()),
            };
        }
        for part in parts {
            let skip = sent.min(part.len());
            sent -= skip;
            self.pending.extend_from_slice(&part[skip..]);
        }
        Ok(())
    }

    /// Tells the peer that it is over. The descriptor stays until the last of those that have the stream lets it go.
    pub(crate) fn shut_down(&self) {
        // A peer that is gone already needs no word.
        let _ = net::shutdown(&self.socket, net::Shutdown::Both);
    }

    /// Plain output that waits for room, bytes.
    pub(crate) fn pending_bytes(&self) -> usize {
        self.pending.len() - self.pending_start
    }

    /// Whether output waits for room.
    pub(crate) fn has_pending(&self) -> bool {
        self.pending_start < self.pending.len() || self.tls.as_ref().is_some_and(|tls| !tls.outgoing().is_empty())
    }

    /// Sends what waits, as far as the socket takes it.
    pub(crate) fn flush(&mut self) -> io::Result<()> {
        while self.pending_start < self.pending.len() {
            match net::send(&self.socket, &self.pending[self.pending_start..], SendFlags::NOSIGNAL) {
                Ok(count) => self.pending_start += count,
                Err(Errno::AGAIN) => return Ok(()),
                Err(Errno::INTR) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.pending.clear();
        self.pending_start = 0;
        match &mut self.tls {
            Some(session) => flush_session(&self.socket, session),
            None => Ok(()),
        }
    }
}

/// Sets up a socket that was accepted, or that is being connected: nonblocking, and with a dead peer found out.
fn set_up(socket: &OwnedFd, tcp: bool) -> io::Result<()> {
    rustix::io::ioctl_fionbio(socket, true)?;
    if tcp {
        sockopt::set_tcp_nodelay(socket, true)?;
        sockopt::set_tcp_user_timeout(socket, USER_TIMEOUT_MS)?;
        sockopt::set_socket_keepalive(socket, true)?;
        sockopt::set_tcp_keepidle(socket, KEEPALIVE.0)?;
        sockopt::set_tcp_keepintvl(socket, KEEPALIVE.1)?;
        sockopt::set_tcp_keepcnt(socket, KEEPALIVE.2)?;
    }
    // Buffers are the kernel's to size: it grows them with the distance (tcp_rmem, tcp_wmem), and a fixed size would switch
    // that off.
    Ok(())
}

fn wait_on(socket: &OwnedFd, want: Wait, kick: &Kick, deadline: Option<Instant>) -> io::Result<bool> {
    let events = match want {
        Wait::Read => PollFlags::IN | PollFlags::RDHUP,
        Wait::ReadWrite => PollFlags::IN | PollFlags::OUT | PollFlags::RDHUP,
        Wait::Write => PollFlags::OUT,
        Wait::Hangup => PollFlags::RDHUP,
    };
    let mut fds = [PollFd::new(socket, events), PollFd::new(kick, PollFlags::IN)];
    wait_for(&mut fds, deadline)?;
    let gone = PollFlags::RDHUP | PollFlags::HUP | PollFlags::ERR;
    if want == Wait::Hangup && fds[0].revents().intersects(gone) {
        return Err(closed_by_peer());
    }
    let kicked = fds[1].revents().contains(PollFlags::IN);
    if kicked {
        kick.clear();
    }
    Ok(kicked)
}

fn closed_by_peer() -> io::Error {
    io::Error::new(io::ErrorKind::UnexpectedEof, "the peer closed the connection")
}

fn flush_session(socket: &OwnedFd, session: &mut Session) -> io::Result<()> {
    while !session.outgoing().is_empty() {
        match net::send(socket, session.outgoing(), SendFlags::NOSIGNAL) {
            Ok(count) => session.sent(count),
            Err(Errno::AGAIN) => return Ok(()),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
    Ok(())
}

fn receive(socket: &OwnedFd, into: &mut [u8]) -> io::Result<usize> {
    loop {
        match net::recv(socket, &mut *into, RecvFlags::empty()) {
            Ok((0, _)) if !into.is_empty() => return Err(closed_by_peer()),
            Ok((count, _)) => return Ok(count),
            Err(Errno::INTR) => {}
            Err(error) => return Err(error.into()),
        }
    }
}

/// Bytes of a Unix socket's path, the zero after it not counted (unix(7)).
const MAX_SOCKET_PATH: usize = 107;

/// A listening socket.
pub(crate) enum Listener {
    Tcp(TcpListener),
    Unix(UnixListener, PathBuf),
}

/// Removes a socket that its server has left behind.
fn remove_stale(path: &Path) -> io::Result<()> {
    let meta = match std::fs::symlink_metadata(path) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(()),
        meta => meta?,
    };
    if !meta.file_type().is_socket() {
        return Err(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file of that name"));
    }
    match UnixStream::connect(path) {
        Err(error) if error.kind() == io::ErrorKind::ConnectionRefused => std::fs::remove_file(path),
        _ => Err(io::ErrorKind::AddrInUse.into()),
    }
}

impl Listener {
    /// Listens; a Unix socket at the same path that nobody serves makes room, and nothing else does.
    pub(crate) fn bind(address: &Address) -> io::Result<Self> {
        let listener = match address {
            Address::Tcp(address) => Self::Tcp(TcpListener::bind(address)?),
            Address::Name { host, port } => Self::Tcp(TcpListener::bind((host.as_str(), *port))?),
            Address::Unix(path) => Self::Unix(Self::bind_unix(path)?, path.clone()),
        };
        rustix::io::ioctl_fionbio(listener.as_fd(), true)?;
        Ok(listener)
    }

    /// The same for a Unix socket alone.
    pub(crate) fn bind_unix(path: &Path) -> io::Result<UnixListener> {
        let length = path.as_os_str().len();
        if length > MAX_SOCKET_PATH {
            let why = format!("its path has {length} bytes, and a socket's has at most {MAX_SOCKET_PATH}");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        remove_stale(path)?;
        UnixListener::bind(path)
    }

    /// Where it listens, the port filled in.
    pub(crate) fn address(&self) -> io::Result<Address> {
        Ok(match self {
            Self::Tcp(listener) => Address::Tcp(listener.local_addr()?),
            Self::Unix(_, path) => Address::Unix(path.clone()),
        })
    }

    /// The next connection's socket, set up, and who it is; `WouldBlock` if there is none.
    pub(crate) fn accept(&self) -> io::Result<(OwnedFd, Peer)> {
        let (socket, peer): (OwnedFd, _) = match self {
            Self::Tcp(listener) => {
                let (socket, peer) = listener.accept()?;
                (socket.into(), Peer { name: peer.to_string(), address: Some(peer.ip()) })
            }
            Self::Unix(listener, path) => {
                let (socket, _) = listener.accept()?;
                (socket.into(), Peer { name: path.display().to_string(), address: None })
            }
        };
        set_up(&socket, peer.address.is_some())?;
        Ok((socket, peer))
    }
}

/// Who connected.
pub(crate) struct Peer {
    /// For people.
    pub(crate) name: String,
    /// Over TCP, from where.
    pub(crate) address: Option<IpAddr>,
}

impl AsFd for Listener {
    fn as_fd(&self) -> BorrowedFd<'_> {
        match self {
            Self::Tcp(listener) => listener.as_fd(),
            Self::Unix(listener, _) => listener.as_fd(),
        }
    }
}

impl Drop for Listener {
    fn drop(&mut self) {
        if let Self::Unix(_, path) = self {
            let _ = std::fs::remove_file(path);
        }
    }
}

/// Bytes of which a given place is a multiple of 4096 in memory, as direct I/O wants it.
#[derive(Debug)]
pub(crate) struct Aligned {
    bytes: Vec<u8>,
    start: usize,
}

impl Aligned {
    /// `length` bytes, the first of them aligned.
    pub(crate) fn new(length: usize) -> Self {
        let bytes = vec![0; length + 4096];
        let start = bytes.as_ptr().align_offset(4096).min(4096);
        Self { bytes, start }
    }

    pub(crate) fn len(&self) -> usize {
        self.bytes.len() - 4096
    }

    pub(crate) fn slice(&self, range: std::ops::Range<usize>) -> &[u8] {
        &self.bytes[self.start + range.start..self.start + range.end]
    }

    pub(crate) fn slice_mut(&mut self, range: std::ops::Range<usize>) -> &mut [u8] {
        &mut self.bytes[self.start + range.start..self.start + range.end]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_host_is_an_address_or_a_name_that_is_looked_up_when_somebody_connects() {
        for (host, shown) in [("10.0.0.7", "10.0.0.7:9"), ("::1", "[::1]:9"), ("[::1]", "[::1]:9")] {
            let address = Address::of_host(host, 9);
            assert!(matches!(address, Address::Tcp(_)) && address.to_string() == shown, "{address:?}");
            assert_eq!(address.look_up(Duration::ZERO, || true).unwrap(), [address]);
        }
        let name = Address::of_host("localhost", 9);
        assert!(Stream::connect(&name).is_err());
        let found = name.look_up(Duration::from_secs(20), || false).unwrap();
        assert!(!found.is_empty() && found.iter().all(|found| found.port() == Some(9)), "{found:?}");
        let none = Address::of_host("no such host", 9).look_up(Duration::from_secs(20), || false).unwrap_err();
        assert!(none.to_string().starts_with("no such host is not found"), "{none}");
    }
}
