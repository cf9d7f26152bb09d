//! A switch with slow ports: carries IPv6 packets between the workers of a lab at a stated rate and delay, in userspace.
//!
//! ```text
//! up0 of the sender ─read─► its way out: a packet leaves when those before it have, at the rate
//!                          ─► delay ─► the receiver's way in, at the rate ─► queue ─write when due─► up0 of the receiver
//! ```
//! Ports are TUN devices. When a port is behind by more than [`BACKLOG`], what arrives is dropped, as a router does, and TCP
//! slows down: memory is bounded by rate x (delay + backlog). The kernel's netem would do, but not every kernel has it.

use std::collections::VecDeque;
use std::fs::File;
use std::io::{self, Read, Write};
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use rustix::event::{EventfdFlags, PollFd, PollFlags, eventfd, poll};

/// How far a port may be behind before it drops: what routers are commonly given.
const BACKLOG: Duration = Duration::from_millis(50);
/// Bytes of a packet. Jumbo frames, as links between hosts of one data centre have them: 0.8 % of headers and not 5 %.
pub(crate) const MTU: u32 = 9000;
/// `TUNSETIFF`, include/uapi/linux/if_tun.h: `_IOW('T', 202, int)`.
const TUNSETIFF: libc::c_ulong = 0x4004_54ca;

/// What the link of each worker of a lab carries.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Shape {
    /// Bits per second, in each direction of each worker. At least 100 kbit/s.
    pub bits_per_s: u64,
    /// From any worker to any other, one way.
    pub delay: Duration,
}

impl Shape {
    fn serialisation(self, bytes: usize) -> Duration {
        Duration::from_nanos(bytes as u64 * 8 * 1_000_000_000 / self.bits_per_s.max(100_000))
    }
}

/// Makes the TUN device `name` in the calling thread's network namespace; it lives as long as the descriptor.
#[allow(unsafe_code)]
pub(crate) fn tun(name: &str) -> io::Result<OwnedFd> {
    let file = File::options().read(true).write(true).open("/dev/net/tun")?;
    // SAFETY: all-zero bytes are a valid struct ifreq.
    let mut request: libc::ifreq = unsafe { std::mem::zeroed() };
    for (to, from) in request.ifr_name.iter_mut().zip(name.bytes().take(15)) {
        *to = from.cast_signed();
    }
    request.ifr_ifru.ifru_flags = (libc::IFF_TUN | libc::IFF_NO_PI) as i16;
    // SAFETY: TUNSETIFF reads and writes one struct ifreq, which outlives the call.
    if unsafe { libc::ioctl(file.as_raw_fd(), TUNSETIFF, &raw mut request) } < 0 {
        return Err(io::Error::last_os_error());
    }
    rustix::io::ioctl_fionbio(&file, true)?;
    Ok(file.into())
}

/// A running switch; dropped, it stops.
#[derive(Debug)]
pub(crate) struct Switch {
    ports: Arc<[Port]>,
    stop: Arc<OwnedFd>,
    threads: Vec<JoinHandle<()>>,
}

#[derive(Debug)]
struct Port {
    device: File,
    connected: AtomicBool,
    inbound: Mutex<Inbound>,
    due: Condvar,
}

#[derive(Debug)]
struct Inbound {
    /// When the way in is free again.
    free_at: Instant,
    queue: VecDeque<(Instant, Vec<u8>)>,
    stopped: bool,
}

impl Switch {
    /// Connects the devices; the first is worker 1's.
    pub(crate) fn start(devices: Vec<OwnedFd>, shape: Shape) -> io::Result<Self> {
        let port = |device: OwnedFd| Port {
            device: File::from(device),
            connected: AtomicBool::new(true),
            inbound: Mutex::new(Inbound { free_at: Instant::now(), queue: VecDeque::new(), stopped: false }),
            due: Condvar::new(),
        };
        let ports: Arc<[Port]> = devices.into_iter().map(port).collect();
        let stop = Arc::new(eventfd(0, EventfdFlags::CLOEXEC)?);
        let mut switch = Self { ports: Arc::clone(&ports), stop: Arc::clone(&stop), threads: Vec::new() };
        for index in 0..ports.len() {
            let (from, stop) = (Arc::clone(&ports), Arc::clone(&stop));
            let thread = std::thread::Builder::new().name(format!("switch-from-{}", index + 1));
            switch.threads.push(thread.spawn(move || carry_out(&from, index, &stop, shape))?);
            let to = Arc::clone(&ports);
            let thread = std::thread::Builder::new().name(format!("switch-to-{}", index + 1));
            switch.threads.push(thread.spawn(move || to.get(index).into_iter().for_each(carry_in))?);
        }
        Ok(switch)
    }

    /// Drops everything from and to a worker, or stops doing so.
    pub(crate) fn set_connected(&self, worker: u32, connected: bool) {
        if let Some(port) = self.ports.get((worker as usize).wrapping_sub(1)) {
            port.connected.store(connected, Ordering::Relaxed);
        }
    }
}

impl Drop for Switch {
    fn drop(&mut self) {
        let _ = rustix::io::write(&self.stop, &1_u64.to_ne_bytes());
        for port in self.ports.iter() {
            port.inbound().stopped = true;
            port.due.notify_all();
        }
        for thread in self.threads.drain(..) {
            let _ = thread.join();
        }
    }
}

impl Port {
    fn inbound(&self) -> MutexGuard<'_, Inbound> {
        self.inbound.lock().unwrap_or_else(|poisoned| poisoned.into_inner())
    }
}

/// Reads what a worker sends and puts it on its way.
fn carry_out(ports: &[Port], index: usize, stop: &OwnedFd, shape: Shape) {
    let Some(port) = ports.get(index) else { return };
    let mut free_at = Instant::now();
    let mut packet = vec![0; MTU as usize + 64];
    loop {
        let length = match (&port.device).read(&mut packet) {
            Ok(length) => length,
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => {
                let mut fds = [PollFd::new(&port.device, PollFlags::IN), PollFd::new(stop, PollFlags::IN)];
                let ended = poll(&mut fds, None).is_err() || !fds[1].revents().is_empty();
                if ended || fds[0].revents().contains(PollFlags::ERR) {
                    return;
                }
                continue;
            }
            // EIO: the device is down for the moment. Any other way the switch is being stopped.
            Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
            Err(_) => return,
        };
        let now = Instant::now();
        let Some(to) = packet.get(..length).and_then(|packet| destination(packet, ports)) else { continue };
        let backlog = free_at.saturating_duration_since(now);
        if backlog > BACKLOG || !port.connected.load(Ordering::Relaxed) || !to.connected.load(Ordering::Relaxed) {
            continue;
        }
        let takes = shape.serialisation(length);
        free_at = free_at.max(now) + takes;
        let arrives = free_at + shape.delay;
        let mut inbound = to.inbound();
        if inbound.free_at.saturating_duration_since(arrives) > BACKLOG {
            continue;
        }
        // The way in is as fast as the way out: a lone sender's packets pass it without a further wait.
        inbound.free_at = inbound.free_at.max(arrives - takes) + takes;
        let due = inbound.free_at;
        inbound.queue.push_back((due, packet.get(..length).unwrap_or_default().to_vec()));
        if inbound.queue.len() == 1 {
            to.due.notify_one();
        }
    }
}

/// Writes to a worker what is due.
fn carry_in(port: &Port) {
    let mut inbound = port.inbound();
    while !inbound.stopped {
        let now = Instant::now();
        match inbound.queue.front() {
            None => inbound = port.due.wait(inbound).unwrap_or_else(|poisoned| poisoned.into_inner()),
            Some((due, _)) if *due > now => {
                let wait = due.duration_since(now);
                inbound = port.due.wait_timeout(inbound, wait).unwrap_or_else(|poisoned| poisoned.into_inner()).0;
            }
            Some(_) => {
                let Some((_, packet)) = inbound.queue.pop_front() else { continue };
                drop(inbound);
                // A full or vanished device loses packets, as a real one does.
                let _ = (&port.device).write(&packet);
                inbound = port.inbound();
            }
        }
    }
}

/// The port of the worker that an IPv6 packet is for: its address on the lab's network, or that of one of its machines.
fn destination<'a>(packet: &[u8], ports: &'a [Port]) -> Option<&'a Port> {
    let octets: [u8; 16] = packet.get(24..40)?.try_into().ok()?;
    if packet.first()? >> 4 != 6 {
        return None;
    }
    ports.get((worker_of(Ipv6Addr::from(octets))? as usize).checked_sub(1)?)
}

fn worker_of(address: Ipv6Addr) -> Option<u32> {
    let [prefix, _, _, w1, w0, _, m1, m0] = address.segments();
    match prefix {
        0xfdaa => Some(u32::from(w1) << 16 | u32::from(w0)),
        0xfdde => Some(u32::from(m1) << 16 | u32::from(m0)),
        _ => None,
    }
}
