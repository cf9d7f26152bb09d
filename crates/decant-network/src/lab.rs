//! A lab: workers on one host, each in a network namespace of its own, on a bridge that nothing else is on.
//!
//! ```text
//!  switch namespace           worker-1            worker-2            worker-3
//!  br0 fdde::ffff ─┬─ w1 ──── up0 fdde::1
//!                  ├─ w2 ──────────────────────── up0 fdde::2
//!                  └─ w3 ──────────────────────────────────────────── up0 fdde::3
//! ```
//! The bridge lives in a namespace of its own too: nothing appears in the host's network, and nothing of the host's
//! (firewalls, other bridges) touches the lab. Everything is below `/run/decant-lab/<name>`, locked by the process that made
//! it, so that the next lab finds and clears what a killed one left.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io;
use std::net::Ipv6Addr;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command};

use rustix::fs::FlockOperation;
use rustix::mount::UnmountFlags;
use rustix::process::{Pid, PidfdFlags, Signal};

use crate::addresses::Prefix;
use crate::netlink::{Counters, Mac, Netlink};
use crate::netns::{NetNs, set_sysctl};
use crate::switch::{Shape, Switch};

/// Where labs are. Does not outlive a boot.
pub const LABS: &str = "/run/decant-lab";
/// A worker's interface to the bridge.
const UPLINK: &str = "up0";
const BRIDGE: &str = "br0";
/// Present in a lab that outlives its maker by intention.
const KEPT: &str = "kept";

/// Network namespaces for some workers and the bridge between them.
#[derive(Debug)]
pub struct Lab {
    directory: PathBuf,
    workers: u32,
    /// Of a lab with shaped links, instead of the bridge.
    switch: Option<Switch>,
    _lock: File,
}

/// A lab could not be made or cleared.
#[derive(Debug, thiserror::Error)]
pub enum LabError {
    /// A live process has a lab of this name.
    #[error("lab {name} is in use by another process")]
    InUse {
        /// Its name.
        name: String,
    },
    /// The kernel said no.
    #[error("cannot {action}: {cause}")]
    Io {
        /// What was being done.
        action: String,
        /// What the kernel said.
        #[source]
        cause: io::Error,
    },
}

fn failed(action: impl Into<String>) -> impl FnOnce(io::Error) -> LabError {
    |cause| LabError::Io { action: action.into(), cause }
}

impl Lab {
    /// Clears labs of dead processes, then makes namespaces for workers 1 to `workers`. `name` is a file name.
    pub fn create(name: &str, workers: u32) -> Result<Self, LabError> {
        Self::make(name, workers, None)
    }

    /// As [`Lab::create`], with links that carry no more than `shape` says. There is no bridge and no switch namespace then:
    /// packets are carried by threads of this process, and the network ends with it.
    pub fn create_shaped(name: &str, workers: u32, shape: Shape) -> Result<Self, LabError> {
        Self::make(name, workers, Some(shape))
    }

    fn make(name: &str, workers: u32, shape: Option<Shape>) -> Result<Self, LabError> {
        let _turn = turn().map_err(failed(format!("take turns in {LABS}")))?;
        sweep_dead()?;
        let directory = Path::new(LABS).join(name);
        fs::create_dir_all(&directory).map_err(failed(format!("make {}", directory.display())))?;
        let lock = lock(&directory)
            .map_err(failed(format!("lock {}", directory.display())))?
            .ok_or_else(|| LabError::InUse { name: name.to_owned() })?;
        let mut lab = Self { directory, workers, switch: None, _lock: lock };
        let wired = match shape {
            None => lab.wire(),
            Some(shape) => lab.wire_shaped(shape),
        };
        wired.map_err(failed(format!("make the network of lab {name}")))?;
        Ok(lab)
    }

    fn wire_shaped(&mut self, shape: Shape) -> io::Result<()> {
        let mut devices = Vec::new();
        for worker in 1..=self.workers {
            let (netns, _) = NetNs::ensure(&self.netns(worker))?;
            let (device, mut netlink) = netns.run(|| {
                quiet()?;
                Ok((crate::switch::tun(UPLINK)?, Netlink::open()?))
            })?;
            let link = netlink.link(UPLINK)?.ok_or(io::ErrorKind::NotFound)?;
            netlink.set_mtu(link.index, crate::switch::MTU)?;
            raise(&mut netlink, UPLINK, self.address(worker))?;
            netlink.wait_usable(UPLINK, Some(self.address(worker)))?;
            devices.push(device);
        }
        self.switch = Some(Switch::start(devices, shape)?);
        Ok(())
    }

    fn wire(&self) -> io::Result<()> {
        let (switch, _) = NetNs::ensure(&self.switch())?;
        let mut inside = switch.run(|| {
            quiet()?;
            Netlink::open()
        })?;
        inside.add_bridge(BRIDGE)?;
        let bridge = inside.link(BRIDGE)?.ok_or(io::ErrorKind::NotFound)?.index;
        for worker in 1..=self.workers {
            let (netns, _) = NetNs::ensure(&self.netns(worker))?;
            let mut outside = netns.run(|| {
                quiet()?;
                Netlink::open()
            })?;
            let port = format!("w{worker}");
            inside.add_veth(&port, UPLINK, netns.fd())?;
            let port = inside.link(&port)?.ok_or(io::ErrorKind::NotFound)?.index;
            inside.set_master(port, bridge)?;
            inside.set_up(port, true)?;
            raise(&mut outside, UPLINK, self.address(worker))?;
            let uplink = outside.link(UPLINK)?.ok_or(io::ErrorKind::NotFound)?.index;
            outside.set_mac(uplink, mac(worker))?;
            outside.wait_usable(UPLINK, Some(self.address(worker)))?;
            inside.wait_usable(&format!("w{worker}"), None)?;
            let others =
                (1..=self.workers).filter(|other| *other != worker).map(|other| (self.address(other), mac(other)));
            for (address, mac) in others.chain([(self.switch_address(), mac(0))]) {
                outside.set_neighbour(uplink, address, mac)?;
            }
        }
        raise(&mut inside, BRIDGE, self.switch_address())?;
        inside.set_mac(bridge, mac(0))?;
        for worker in 1..=self.workers {
            inside.set_neighbour(bridge, self.address(worker), mac(worker))?;
        }
        inside.wait_usable(BRIDGE, Some(self.switch_address()))
    }

    /// The lab's directory; a good place for its workers' run directories, which a sweep then clears too.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// The address of worker `worker` (1 and up) on the bridge.
    pub fn address(&self, worker: u32) -> Ipv6Addr {
        let [a, b, c, d] = worker.to_be_bytes();
        Ipv6Addr::new(0xfdde, 0, 0, 0, 0, 0, u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d]))
    }

    /// The network of the bridge, in CIDR notation.
    pub fn network(&self) -> String {
        format!("{}/64", Ipv6Addr::new(0xfdde, 0, 0, 0, 0, 0, 0, 0))
    }

    /// The address of the switch namespace on its bridge.
    pub fn switch_address(&self) -> Ipv6Addr {
        Ipv6Addr::new(0xfdde, 0, 0, 0, 0, 0xffff, 0, 0)
    }

    /// Where the namespace of worker `worker` is pinned; `nsenter --net=PATH` enters it.
    pub fn netns(&self, worker: u32) -> PathBuf {
        self.directory.join("netns").join(format!("worker-{worker}"))
    }

    /// Where the namespace of the bridge is pinned.
    pub fn switch(&self) -> PathBuf {
        self.directory.join("netns").join("switch")
    }

    /// Runs `work` on a thread inside the worker's network namespace.
    pub fn enter<T: Send>(&self, worker: u32, work: impl FnOnce() -> io::Result<T> + Send) -> io::Result<T> {
        NetNs::open(&self.netns(worker))?.run(work)
    }

    /// Starts `command` inside the worker's network namespace.
    pub fn spawn(&self, worker: u32, command: &mut Command) -> io::Result<Child> {
        self.enter(worker, || command.spawn())
    }

    /// What the worker's interface to the bridge has carried, by the kernel's count in the worker's namespace.
    pub fn counters(&self, worker: u32) -> io::Result<Counters> {
        let link = self.enter(worker, || Netlink::open()?.link(UPLINK))?;
        Ok(link.ok_or(io::ErrorKind::NotFound)?.counters)
    }

    /// Cuts the worker off the bridge, or joins it again.
    pub fn set_connected(&self, worker: u32, connected: bool) -> io::Result<()> {
        if let Some(switch) = &self.switch {
            switch.set_connected(worker, connected);
            return Ok(());
        }
        NetNs::open(&self.switch())?.run(|| {
            let mut netlink = Netlink::open()?;
            let port = netlink.link(&format!("w{worker}"))?.ok_or(io::ErrorKind::NotFound)?;
            netlink.set_up(port.index, connected)
        })
    }

    /// Loses all that worker `from` sends to worker `to`, without a word to either, or delivers it again; the other direction
    /// goes on. Not in a lab with shaped links.
    ///
    /// # Errors
    /// What the kernel says; `Unsupported` with shaped links.
    pub fn set_lost(&self, from: u32, to: u32, lost: bool) -> io::Result<()> {
        if self.switch.is_some() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "shaped links lose in both directions only"));
        }
        // At a hardware address that nobody has.
        let address = if lost { mac(u32::MAX) } else { mac(to) };
        self.enter(from, || {
            let mut netlink = Netlink::open()?;
            let uplink = netlink.link(UPLINK)?.ok_or(io::ErrorKind::NotFound)?.index;
            netlink.set_neighbour(uplink, self.address(to), address)
        })
    }

    /// Leaves the lab and what runs in it when this process ends, until somebody [`Lab::destroy_named`]s it.
    ///
    /// # Errors
    /// A lab with shaped links cannot be kept: this process carries its packets. It is cleared then.
    pub fn keep(self) -> io::Result<()> {
        if self.switch.is_some() {
            return Err(io::Error::new(io::ErrorKind::Unsupported, "shaped links end with the process that made them"));
        }
        File::create(self.directory.join(KEPT))?;
        std::mem::forget(self);
        Ok(())
    }

    /// Kills what still runs in the lab's namespaces and removes all of it.
    pub fn destroy(mut self) -> Result<(), LabError> {
        self.switch = None;
        let directory = self.directory.clone();
        std::mem::forget(self);
        clear(&directory).map_err(failed(format!("clear {}", directory.display())))
    }

    /// Removes a kept lab.
    pub fn destroy_named(name: &str) -> Result<(), LabError> {
        let directory = Path::new(LABS).join(name);
        if !directory.exists() {
            return Ok(());
        }
        let action = format!("clear {}", directory.display());
        match lock(&directory) {
            Ok(Some(_lock)) => clear(&directory).map_err(failed(action)),
            Ok(None) => Err(LabError::InUse { name: name.to_owned() }),
            Err(error) => Err(failed(action)(error)),
        }
    }

    /// Clears every lab whose maker is dead, unless it is kept.
    pub fn sweep() -> Result<(), LabError> {
        let _turn = turn().map_err(failed(format!("take turns in {LABS}")))?;
        sweep_dead()
    }
}

fn sweep_dead() -> Result<(), LabError> {
    for lab in fs::read_dir(LABS).map_err(failed(format!("read {LABS}")))?.flatten() {
        let directory = lab.path();
        if !directory.is_dir() || directory.join(KEPT).exists() {
            continue;
        }
        if let Ok(Some(_lock)) = lock(&directory) {
            clear(&directory).map_err(failed(format!("clear {}", directory.display())))?;
        }
    }
    Ok(())
}

/// Held while labs are made or swept: a lab that is half made is not yet locked.
fn turn() -> io::Result<File> {
    fs::create_dir_all(LABS)?;
    let file = File::options().create(true).append(true).open(Path::new(LABS).join("turn"))?;
    rustix::fs::flock(&file, FlockOperation::LockExclusive)?;
    Ok(file)
}

impl Drop for Lab {
    fn drop(&mut self) {
        if let Err(error) = clear(&self.directory) {
            tracing::warn!(directory = %self.directory.display(), %error, "a lab was not cleared");
        }
    }
}

/// The lock of a lab, or `None` while a live process holds it.
fn lock(directory: &Path) -> io::Result<Option<File>> {
    let file = File::options().create(true).append(true).open(directory.join("lock"))?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(rustix::io::Errno::WOULDBLOCK) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// A namespace of a lab has IPv6 without duplicate detection, which would take its first second.
fn quiet() -> io::Result<()> {
    for (name, value) in [
        ("ipv6/conf/all/disable_ipv6", "0"),
        ("ipv6/conf/default/disable_ipv6", "0"),
        ("ipv6/conf/default/accept_dad", "0"),
        ("ipv6/conf/all/accept_dad", "0"),
    ] {
        set_sysctl(name, value)?;
    }
    Ok(())
}

/// The hardware address of a worker's uplink, 0 for the bridge.
fn mac(worker: u32) -> Mac {
    let [a, b, c, d] = worker.to_be_bytes();
    [0x02, 0x1a, a, b, c, d]
}

fn raise(netlink: &mut Netlink, interface: &str, address: Ipv6Addr) -> io::Result<()> {
    for name in ["lo", interface] {
        let index = netlink.link(name)?.ok_or(io::ErrorKind::NotFound)?.index;
        if name == interface {
            netlink.add_address(index, Prefix { address, length: 64 })?;
            let tail = address.segments();
            let link_local = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, tail[5], tail[6], tail[7]);
            netlink.add_address(index, Prefix { address: link_local, length: 64 })?;
        }
        netlink.set_up(index, true)?;
    }
    Ok(())
}

/// Kills every process in a namespace pinned below `directory`, unmounts what is mounted below it, removes it.
fn clear(directory: &Path) -> io::Result<()> {
    let below = mounts_below(directory)?;
    let namespaces: BTreeSet<u64> =
        below.iter().filter_map(|path| NetNs::open(path).ok().and(fs::metadata(path).ok())).map(|m| m.ino()).collect();
    kill_all_in(&namespaces)?;
    for mount in below.iter().rev() {
        // Already gone with the mount above it, or with its process: fine.
        let _ = rustix::mount::unmount(mount, UnmountFlags::DETACH);
    }
    match fs::remove_dir_all(directory) {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}

/// Mount points below `directory`, in the order they were mounted.
fn mounts_below(directory: &Path) -> io::Result<Vec<PathBuf>> {
    let table = fs::read_to_string("/proc/self/mountinfo")?;
    let points = table.lines().filter_map(|line| line.split(' ').nth(4)).map(|text| PathBuf::from(unescape(text)));
    Ok(points.filter(|point| point.starts_with(directory) && point != directory).collect())
}

/// mountinfo writes blanks, tabs, newlines and backslashes as three octal digits.
fn unescape(text: &str) -> String {
    let mut parts = text.split('\\');
    let mut plain = parts.next().unwrap_or_default().to_owned();
    for part in parts {
        match part.split_at_checked(3).and_then(|(code, rest)| Some((u8::from_str_radix(code, 8).ok()?, rest))) {
            Some((code, rest)) => {
                plain.push(char::from(code));
                plain.push_str(rest);
            }
            None => plain.push_str(part),
        }
    }
    plain
}

/// Ends every process whose network namespace is one of `namespaces`, and waits for it. Repeats while new ones turn up.
fn kill_all_in(namespaces: &BTreeSet<u64>) -> io::Result<()> {
    if namespaces.is_empty() {
        return Ok(());
    }
    loop {
        let mut doomed = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw)
            else {
                continue;
            };
            // The descriptor first, then the check: the pid cannot have become another process in between.
            let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { continue };
            let inside = fs::metadata(entry.path().join("ns/net")).is_ok_and(|meta| namespaces.contains(&meta.ino()));
            if inside && pid != rustix::process::getpid() {
                let _ = rustix::process::pidfd_send_signal(&pidfd, Signal::KILL);
                doomed.push(pidfd);
            }
        }
        if doomed.is_empty() {
            return Ok(());
        }
        for pidfd in doomed {
            let mut poll = [rustix::event::PollFd::new(&pidfd, rustix::event::PollFlags::IN)];
            let limit = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };
            if rustix::event::poll(&mut poll, Some(&limit))? == 0 {
                return Err(io::Error::new(io::ErrorKind::TimedOut, "a process of the lab does not end on SIGKILL"));
            }
        }
    }
}
