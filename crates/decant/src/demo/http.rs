//! The little HTTP/1.1 that the demo's client speaks: one keep-alive connection, one request at a time.
//!
//! It is its own so that the measured times are those of the service and not of a client library's pool, and
//! so that the connection is made from the thread's own network namespace.

use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::time::Duration;

/// The most that a response's head may have.
const MAX_HEAD: usize = 16 << 10;
/// The most that a response's body may have.
const MAX_BODY: usize = 1 << 20;

/// An answer: status and body.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) status: u16,
    pub(crate) body: Vec<u8>,
}

/// A keep-alive connection, made again when it breaks.
#[derive(Debug)]
pub(crate) struct Connection {
    address: SocketAddr,
    timeout: Duration,
    stream: Option<BufReader<TcpStream>>,
    request: Vec<u8>,
}

impl Connection {
    /// A connection to `address`; each try of a request takes at most about `timeout`.
    pub(crate) fn new(address: SocketAddr, timeout: Duration) -> Self {
        Self { address, timeout, stream: None, request: Vec::with_capacity(4096) }
    }

    /// One try of one request. After an error the connection is dropped; whether the request was carried out is unknown.
    pub(crate) fn request(&mut self, method: &str, path: &str, headers: &str, body: &[u8]) -> io::Result<Answer> {
        self.request.clear();
        write!(
            self.request,
            "{method} {path} HTTP/1.1\r\nHost: orders\r\nContent-Type: application/json\r\nContent-Length: {}\r\n{headers}\r\n",
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
            none => {
                let stream = TcpStream::connect_timeout(&self.address, self.timeout)?;
                stream.set_nodelay(true)?;
                stream.set_read_timeout(Some(self.timeout))?;
                stream.set_write_timeout(Some(self.timeout))?;
                none.insert(BufReader::new(stream))
            }
        };
        stream.get_mut().write_all(&self.request)?;
        let (answer, keep) = read_answer(stream)?;
        if !keep {
            self.stream = None;
        }
        Ok(answer)
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
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
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
