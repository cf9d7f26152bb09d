//! Waiting until a machine serves.

use std::io::{self, Read, Write};
use std::net::{Ipv6Addr, SocketAddr, TcpStream};
use std::time::{Duration, Instant};

use crate::spec::HealthCheck;

/// Between tries. A refused connection costs some 50 µs, and the first moment of health is part of an interruption.
const PAUSE: Duration = Duration::from_millis(1);
/// One try's patience. Packets that were sent before the link was there are lost; TCP would send the next after a second.
const TRY: Duration = Duration::from_millis(250);

/// Polls until the check passes; after `patience`, what the last try said.
pub(super) fn wait(check: &HealthCheck, address: Ipv6Addr, patience: Duration) -> Result<(), String> {
    let began = Instant::now();
    loop {
        let Err(error) = probe(check, SocketAddr::from((address, check.port))) else { return Ok(()) };
        if began.elapsed() >= patience {
            return Err(error.to_string());
        }
        std::thread::sleep(PAUSE);
    }
}

fn probe(check: &HealthCheck, address: SocketAddr) -> io::Result<()> {
    let mut stream = TcpStream::connect_timeout(&address, TRY)?;
    let Some(path) = &check.http_path else { return Ok(()) };
    stream.set_read_timeout(Some(4 * TRY))?;
    stream.set_write_timeout(Some(TRY))?;
    write!(stream, "GET {path} HTTP/1.1\r\nHost: {address}\r\nConnection: close\r\n\r\n")?;
    // "HTTP/1.1 2" is all that is looked at.
    let mut head = [0; 10];
    stream.read_exact(&mut head)?;
    if head.starts_with(b"HTTP/1.") && head[9] == b'2' {
        return Ok(());
    }
    Err(io::Error::other(format!("GET {path} was answered {:?}", String::from_utf8_lossy(&head))))
}
