//! A proxy on loopback that delays what it carries, for a kernel without netem.

use std::io::{Read, Write};
use std::net::{Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{Receiver, SyncSender, sync_channel};
use std::thread;
use std::time::{Duration, Instant};

/// Bytes of one piece.
const PIECE: usize = 256 << 10;
/// Pieces under way in one direction at most: 512 MB, more than any window here.
const MOST_PIECES: usize = 2048;

/// Connections to it go to a port of this machine, every byte later by the delay. Dropping it takes no further ones.
pub(super) struct Delay {
    address: SocketAddr,
    ended: Arc<AtomicBool>,
}

impl Delay {
    pub(super) fn start(to: u16, one_way: Duration) -> std::io::Result<Self> {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        let address = listener.local_addr()?;
        let ended = Arc::new(AtomicBool::new(false));
        let seen = Arc::clone(&ended);
        thread::spawn(move || {
            for near in listener.incoming().flatten() {
                if seen.load(Ordering::Relaxed) {
                    return;
                }
                if let Ok(far) = TcpStream::connect(("127.0.0.1", to)) {
                    let _ = join(&near, &far, one_way);
                }
            }
        });
        Ok(Self { address, ended })
    }

    pub(super) fn port(&self) -> u16 {
        self.address.port()
    }
}

impl Drop for Delay {
    fn drop(&mut self) {
        self.ended.store(true, Ordering::Relaxed);
        // Wakes the thread that accepts.
        let _ = TcpStream::connect(self.address);
    }
}

fn join(near: &TcpStream, far: &TcpStream, one_way: Duration) -> std::io::Result<()> {
    for (from, to) in [(near, far), (far, near)] {
        from.set_nodelay(true)?;
        let (from, to) = (from.try_clone()?, to.try_clone()?);
        let (pieces, due) = sync_channel(MOST_PIECES);
        thread::spawn(move || take(from, &pieces, one_way));
        thread::spawn(move || give(to, &due));
    }
    Ok(())
}

fn take(mut from: TcpStream, pieces: &SyncSender<(Instant, Vec<u8>)>, one_way: Duration) {
    let mut buffer = vec![0; PIECE];
    while let Ok(length @ 1..) = from.read(&mut buffer) {
        if pieces.send((Instant::now() + one_way, buffer[..length].to_vec())).is_err() {
            return;
        }
    }
}

fn give(mut to: TcpStream, due: &Receiver<(Instant, Vec<u8>)>) {
    while let Ok((at, piece)) = due.recv() {
        thread::sleep(at.saturating_duration_since(Instant::now()));
        if to.write_all(&piece).is_err() {
            break;
        }
    }
    let _ = to.shutdown(Shutdown::Both);
}
