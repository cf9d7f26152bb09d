//! One TLS connection over bytes that somebody else moves.
//!
//! Built on rustls' unbuffered API: records are decrypted where they were received, in a large buffer that one system call
//! can fill, and encrypted into a buffer that one system call can empty.

use std::sync::Arc;

use rustls::client::UnbufferedClientConnection;
use rustls::pki_types::ServerName;
use rustls::server::UnbufferedServerConnection;
use rustls::unbuffered::{ConnectionState, EncodeError, EncryptError, UnbufferedStatus};
use rustls::{Error, ServerConfig};

use super::ClientTls;

/// Room for received ciphertext: at least one record of the greatest size, and enough of them for few system calls.
const INCOMING: usize = 256 * 1024;
/// Plaintext that is encrypted at a time, so that both fit a core's cache.
const SLICE: usize = 64 * 1024;
/// More than the overhead of the records that one slice becomes.
const OVERHEAD: usize = 1024;

/// How far [`Session::advance`] came.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Progress {
    /// Plaintext is there to be read.
    Plaintext,
    /// More ciphertext is needed.
    NeedsInput,
    /// The peer has closed the session properly.
    Closed,
}

enum Side {
    Client(UnbufferedClientConnection),
    Server(UnbufferedServerConnection),
}

/// A TLS session, either side.
pub(crate) struct Session {
    side: Side,
    /// Ciphertext received; what is not processed yet is `incoming[start..end]`.
    incoming: Vec<u8>,
    start: usize,
    end: usize,
    /// Plaintext of the current record that nobody has read yet.
    plain: Vec<u8>,
    plain_start: usize,
    outgoing: Outgoing,
    closed: bool,
    connected: bool,
}

/// What one step of the TLS machine came to.
enum Turn {
    Again,
    Plaintext,
    NeedsInput,
    Writable,
    Closed,
}

impl Session {
    /// As a client. There is no server name: the certificate is pinned.
    pub(crate) fn client(tls: &ClientTls) -> Result<Self, Error> {
        let name = ServerName::try_from("decant.invalid").map_err(|_| Error::General("server name".into()))?;
        let connection = UnbufferedClientConnection::new(tls.config.clone(), name)?;
        Ok(Self::new(Side::Client(connection)))
    }

    /// As a server.
    pub(crate) fn server(config: Arc<ServerConfig>) -> Result<Self, Error> {
        Ok(Self::new(Side::Server(UnbufferedServerConnection::new(config)?)))
    }

    fn new(side: Side) -> Self {
        Self {
            side,
            incoming: vec![0; INCOMING],
            start: 0,
            end: 0,
            plain: Vec::new(),
            plain_start: 0,
            outgoing: Outgoing::default(),
            closed: false,
            connected: false,
        }
    }

    /// Where received ciphertext goes; call [`Self::received`] with how much came. Empty: read plaintext first.
    pub(crate) fn incoming(&mut self) -> &mut [u8] {
        if self.start > 0 {
            self.incoming.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        &mut self.incoming[self.end..]
    }

    /// `count` bytes were put into [`Self::incoming`].
    pub(crate) fn received(&mut self, count: usize) {
        self.end = (self.end + count).min(self.incoming.len());
    }

    /// Ciphertext that has to be sent; call [`Self::sent`] with how much went.
    pub(crate) fn outgoing(&self) -> &[u8] {
        &self.outgoing.bytes[self.outgoing.start..self.outgoing.end]
    }

    /// `count` bytes of [`Self::outgoing`] are gone.
    pub(crate) fn sent(&mut self, count: usize) {
        self.outgoing.start += count;
        if self.outgoing.start >= self.outgoing.end {
            (self.outgoing.start, self.outgoing.end) = (0, 0);
        }
    }

    /// Whether the handshake is over, on this side at least.
    pub(crate) fn is_connected(&self) -> bool {
        self.connected
    }

    /// Copies plaintext out; 0 if there is none: [`Self::advance`].
    pub(crate) fn take_plaintext(&mut self, into: &mut [u8]) -> usize {
        let rest = &self.plain[self.plain_start..];
        let count = rest.len().min(into.len());
        into[..count].copy_from_slice(&rest[..count]);
        self.plain_start += count;
        if self.plain_start == self.plain.len() {
            self.plain.clear();
            self.plain_start = 0;
        }
        count
    }

    /// Processes what was received, up to the next record with plaintext. Of that as much as fits goes straight to `into`
    /// and is counted in the second part; the rest waits for [`Self::take_plaintext`].
    pub(crate) fn advance(&mut self, into: &mut [u8]) -> Result<(Progress, usize), Error> {
        let mut count = self.take_plaintext(into);
        if count > 0 {
            return Ok((Progress::Plaintext, count));
        }
        loop {
            if self.closed {
                return Ok((Progress::Closed, 0));
            }
            match self.turn(Some((into, &mut count)), &[])? {
                Turn::Again => {}
                Turn::Plaintext if count > 0 => return Ok((Progress::Plaintext, count)),
                Turn::Plaintext => {}
                Turn::NeedsInput | Turn::Writable => return Ok((Progress::NeedsInput, 0)),
                Turn::Closed => self.closed = true,
            }
        }
    }

    /// Encrypts `data` behind what is to be sent already.
    ///
    /// # Errors
    /// The handshake is not over, or TLS failed.
    pub(crate) fn encrypt(&mut self, data: &[u8]) -> Result<(), Error> {
        for slice in data.chunks(SLICE) {
            loop {
                match self.turn(None, slice)? {
                    Turn::Again | Turn::Plaintext => {}
                    Turn::Writable => break,
                    Turn::NeedsInput => return Err(Error::HandshakeNotComplete),
                    Turn::Closed => {
                        self.closed = true;
                        return Err(Error::General("the peer has closed the session".into()));
                    }
                }
            }
        }
        Ok(())
    }

    /// One turn of the machine. Plaintext goes to `into` and, what does not fit, is kept; `data` is encrypted if the turn
    /// comes to where that is possible.
    fn turn(&mut self, into: Option<(&mut [u8], &mut usize)>, data: &[u8]) -> Result<Turn, Error> {
        let input = &mut self.incoming[self.start..self.end];
        let mut work = Work { into, plain: &mut self.plain, outgoing: &mut self.outgoing, data };
        let (discard, turn) = match &mut self.side {
            Side::Client(connection) => {
                let result = work.handle(connection.process_tls_records(input));
                self.connected = !connection.is_handshaking();
                result
            }
            Side::Server(connection) => {
                let result = work.handle(connection.process_tls_records(input));
                self.connected = !connection.is_handshaking();
                result
            }
        };
        self.start += discard;
        turn
    }

    /// After an error: collects the alert that tells the peer why, so that it can be sent.
    pub(crate) fn collect_alert(&mut self) {
        for _ in 0..4 {
            if !matches!(self.turn(None, &[]), Ok(Turn::Again)) {
                return;
            }
        }
    }
}

/// Ciphertext to be sent: `bytes[start..end]`. The buffer only grows, and to little more than the largest batch.
#[derive(Default)]
struct Outgoing {
    bytes: Vec<u8>,
    start: usize,
    end: usize,
}

impl Outgoing {
    /// Lets `write` fill up to `room` bytes at the end.
    fn append<E>(&mut self, room: usize, write: impl FnOnce(&mut [u8]) -> Result<usize, E>) -> Result<(), E> {
        if self.bytes.len() < self.end + room {
            self.bytes.resize(self.end + room, 0);
        }
        self.end += write(&mut self.bytes[self.end..])?;
        Ok(())
    }
}

struct Work<'a> {
    into: Option<(&'a mut [u8], &'a mut usize)>,
    plain: &'a mut Vec<u8>,
    outgoing: &'a mut Outgoing,
    data: &'a [u8],
}

impl Work<'_> {
    fn handle<Data>(&mut self, status: UnbufferedStatus<'_, '_, Data>) -> (usize, Result<Turn, Error>) {
        let UnbufferedStatus { mut discard, state } = status;
        let turn = match state {
            Err(error) => Err(error),
            Ok(ConnectionState::EncodeTlsData(mut encode)) => {
                let mut room = 0;
                loop {
                    match self.outgoing.append(room, |place| encode.encode(place)) {
                        Ok(()) => break Ok(Turn::Again),
                        Err(EncodeError::InsufficientSize(size)) if room == 0 => room = size.required_size,
                        Err(error) => break Err(Error::General(format!("encoding a TLS record: {error}"))),
                    }
                }
            }
            // What was encoded is in `outgoing`, which the owner sends before anything else.
            Ok(ConnectionState::TransmitTlsData(transmit)) => {
                transmit.done();
                Ok(Turn::Again)
            }
            Ok(ConnectionState::BlockedHandshake) => Ok(Turn::NeedsInput),
            Ok(ConnectionState::ReadTraffic(mut traffic)) => {
                while let Some(record) = traffic.next_record() {
                    match record {
                        Ok(record) => {
                            discard += record.discard;
                            deliver(record.payload, &mut self.into, self.plain);
                        }
                        Err(error) => return (discard, Err(error)),
                    }
                }
                Ok(Turn::Plaintext)
            }
            Ok(ConnectionState::WriteTraffic(mut traffic)) if !self.data.is_empty() => {
                let room = self.data.len() + OVERHEAD;
                match self.outgoing.append(room, |place| traffic.encrypt(self.data, place)) {
                    Ok(()) => Ok(Turn::Writable),
                    Err(EncryptError::InsufficientSize(size)) => {
                        match self.outgoing.append(size.required_size, |place| traffic.encrypt(self.data, place)) {
                            Ok(()) => Ok(Turn::Writable),
                            Err(error) => Err(Error::General(format!("encrypting: {error}"))),
                        }
                    }
                    Err(error) => Err(Error::General(format!("encrypting: {error}"))),
                }
            }
            Ok(ConnectionState::WriteTraffic(_)) => Ok(Turn::Writable),
            Ok(ConnectionState::PeerClosed | ConnectionState::Closed) => Ok(Turn::Closed),
            Ok(_) => Err(Error::General("unexpected early data".into())),
        };
        (discard, turn)
    }
}

fn deliver(payload: &[u8], into: &mut Option<(&mut [u8], &mut usize)>, plain: &mut Vec<u8>) {
    let mut rest = payload;
    if let Some((place, count)) = into
        && plain.is_empty()
    {
        let direct = rest.len().min(place.len() - **count);
        place[**count..**count + direct].copy_from_slice(&rest[..direct]);
        **count += direct;
        rest = &rest[direct..];
    }
    plain.extend_from_slice(rest);
}
