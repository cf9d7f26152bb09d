//! The little HTTP/1.1 that the command line and the demo's client speak: one keep-alive connection, one request at a
//! time, blocking.
//!
//! It is our own so that a command starts in a millisecond, that the demo's times are those of the service and not of
//! a client library's pool, and that a connection is made from the calling thread's own network namespace.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

/// The most that a response's head may have.
const MAX_HEAD: usize = 16 << 10;
/// The most that a response's body may have: a listing of thousands of machines fits.
const MAX_BODY: usize = 64 << 20;

/// An answer: status and body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

/// Where to connect.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Address {
    Tcp(SocketAddr),
    Unix(PathBuf),
}

/// A keep-alive connection, made again when it breaks.
#[derive(Debug)]
pub(crate) struct Connection {
    address: Address,
    timeout: Duration,
    stream: Option<BufReader<Stream>>,
    request: Vec<u8>,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

impl Connection {
    /// A connection to `address`; each try of a request takes at most about `timeout`.
    pub(crate) fn new(address: Address, timeout: Duration) -> Self {
        Self { address, timeout, stream: None, request: Vec::with_capacity(4096) }
    }

    /// One try of one request. After an error the connection is dropped; whether the request was carried out is unknown.
    pub(crate) fn request(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> io::Result<Answer> {
        self.request.clear();
        write!(
            self.request,
            "{method} {path} HTTP/1.1\r\nHost: decant\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{headers}\r\n",
            body.len()
        )?;
        self.request.extend_from_slice(body);
        let result = self.exchange();
        if result.is_err() {
            self.stream = None;
        }
        result
    }

    fn exchange(&mut self) -> io::Result<Answer> {
        let stream = match &mut self.stream {
            Some(stream) => stream,
            none => none.insert(BufReader::new(Stream::connect(&self.address, self.timeout)?)),
        };
        stream.get_mut().write_all(&self.request)?;
        let (answer, keep) = read_answer(stream)?;
        if !keep {
            self.stream = None;
        }
        Ok(answer)
    }
}

impl Stream {
    fn connect(address: &Address, timeout: Duration) -> io::Result<Self> {
        match address {
            Address::Tcp(address) => {
                let stream = TcpStream::connect_timeout(address, timeout)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                Ok(Self::Tcp(stream))
            }
            Address::Unix(path) => {
                let stream = UnixStream::connect(path)?;
                stream.set_read_timeout(Some(timeout))?;
                stream.set_write_timeout(Some(timeout))?;
                Ok(Self::Unix(stream))
            }
        }
    }
}

impl Read for Stream {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(buffer),
            Self::Unix(stream) => stream.read(buffer),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn malformed(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, format!("malformed HTTP response: {what}"))
}

/// Reads one response; `true` if the connection may be used again.
fn read_answer(stream: &mut impl BufRead) -> io::Result<(Answer, bool)> {
    let mut line = String::new();
    read_line(stream, &mut line)?;
    let mut words = line.split_ascii_whitespace();
    if words.next() != Some("HTTP/1.1") {
        return Err(malformed("no HTTP/1.1 status line"));
    }
    let status = words.next().and_then(|word| word.parse().ok()).ok_or_else(|| malformed("no status"))?;
    let (mut length, mut keep, mut head) = (None, true, line.len());
    loop {
        read_line(stream, &mut line)?;
        head += line.len();
        if head > MAX_HEAD {
            return Err(malformed("its head is too long"));
        }
        let Some((name, value)) = line.trim_end().split_once(':') else { break };
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.trim().parse().map_err(|_| malformed("bad Content-Length"))?);
        } else if name.eq_ignore_ascii_case("connection") {
            keep = !value.trim().eq_ignore_ascii_case("close");
        }
    }
    let length: usize = length.ok_or_else(|| malformed("no Content-Length"))?;
    if length > MAX_BODY {
        return Err(malformed("its body is too long"));
    }
    let mut body = Vec::new();
    stream.take(length as u64).read_to_end(&mut body)?;
    if body.len() < length {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok((Answer { status, body }, keep))
}

fn read_line(stream: &mut impl BufRead, line: &mut String) -> io::Result<()> {
    line.clear();
    if stream.take(MAX_HEAD as u64).read_line(line)? == 0 || !line.ends_with('\n') {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn answers_are_read_to_their_end_and_no_further() {
        let mut bytes: &[u8] =
            b"HTTP/1.1 201 Created\r\ncontent-length: 2\r\n\r\n{}HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 0\r\n\r\n";
        let (answer, keep) = read_answer(&mut bytes).expect("the first is whole");
        assert_eq!((answer.status, answer.body.as_slice(), keep), (201, b"{}".as_slice(), true));
        let (answer, keep) = read_answer(&mut bytes).expect("the second is whole");
        assert_eq!((answer.status, answer.body.len(), keep), (200, 0, false));
        assert!(read_answer(&mut bytes).is_err(), "nothing is left");
    }

    #[test]
    fn a_cut_or_hostile_answer_is_an_error() {
        for text in [
            "HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\nabc",
            "HTTP/1.1 200 OK\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: 99999999999\r\n\r\n",
            "HTTP/1.1 200 OK\r\ncontent-length: -1\r\n\r\n",
            "ICY 200 OK\r\n\r\n",
            "HTTP/1.1 200 OK\r\n\r\n",
        ] {
            assert!(read_answer(&mut text.as_bytes()).is_err(), "{text:?}");
        }
    }
}
