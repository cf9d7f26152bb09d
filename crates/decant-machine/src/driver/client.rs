//! Talking to a shim.

use std::io::{self, BufRead, BufReader, Write};
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::time::Duration;

use crate::protocol::{Answer, Request};
use crate::shim::{directory, socket_path};

/// Why there is no answer.
#[derive(Debug)]
pub(super) enum NoAnswer {
    /// Nobody listens: there is no shim.
    Gone,
    /// A shim is there and did not answer in time.
    Late,
    /// Something else.
    Io(io::Error),
}

/// Asks the shim of the machine whose run directory is `run`. `patience` of `None` is for ever: the answer comes, or the shim's end.
pub(super) fn ask(run: &Path, request: &Request, patience: Option<Duration>) -> Result<Answer, NoAnswer> {
    let gone_or = |error: io::Error| match error.kind() {
        io::ErrorKind::NotFound | io::ErrorKind::ConnectionRefused | io::ErrorKind::NotADirectory => NoAnswer::Gone,
        _ => NoAnswer::Io(error),
    };
    let run = directory(run).map_err(gone_or)?;
    let mut stream = UnixStream::connect(socket_path(&run)).map_err(gone_or)?;
    // A shim that ends closes its socket: what was asked is then known to be unanswered.
    let ended = |error: io::Error| match error.kind() {
        io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut => NoAnswer::Late,
        io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset | io::ErrorKind::UnexpectedEof => NoAnswer::Gone,
        _ => NoAnswer::Io(error),
    };
    stream.set_read_timeout(patience.map(|patience| patience.max(Duration::from_millis(1)))).map_err(NoAnswer::Io)?;
    let mut line = serde_json::to_vec(request).map_err(|error| NoAnswer::Io(error.into()))?;
    line.push(b'\n');
    stream.write_all(&line).map_err(ended)?;
    let mut answer = Vec::new();
    BufReader::new(stream).read_until(b'\n', &mut answer).map_err(ended)?;
    if answer.is_empty() {
        return Err(NoAnswer::Gone);
    }
    serde_json::from_slice(&answer).map_err(|error| NoAnswer::Io(error.into()))
}
