//! The link of a machine: its own network namespace, a veth pair to its worker, addresses and routes.

use std::fs;
use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use decant_base::MachineId;

use crate::addresses::{MachineAddress, Prefix};
use crate::netlink::{Hop, Mac, Netlink};
use crate::netns::{NetNs, set_sysctl};

/// The machine's end of its link, as the machine sees it.
const INSIDE: &str = "eth0";
/// Longest name of an interface (`IFNAMSIZ` less its NUL).
const MAX_NAME: usize = 15;
/// Link-local address of the worker's end. Neighbour solicitations for forwarded packets need one.
const LINK_LOCAL_WORKER: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 1);
/// Link-local address of the machine's end.
const LINK_LOCAL_MACHINE: Ipv6Addr = Ipv6Addr::new(0xfe80, 0, 0, 0, 0, 0, 0, 2);

/// A machine's link to the worker in whose network namespace the calling thread runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MachineLink {
    /// Where the machine's network namespace is pinned: `run_dir/netns/<machine>`.
    pub netns: PathBuf,
    /// Name of the worker's end, at most 15 characters, made of the worker's and the machine's index.
    pub interface: String,
    /// The machine's address.
    pub address: MachineAddress,
}

impl MachineLink {
    /// Names the link of `machine`; nothing is made yet.
    pub fn new(run_dir: &Path, machine: &MachineId, address: MachineAddress) -> Self {
        let plain = format!("d{:x}.{:x}", address.worker, address.machine);
        let interface = if plain.len() <= MAX_NAME { plain } else { format!("d{:013x}", hash(address) >> 12) };
        Self { netns: run_dir.join("netns").join(machine.as_str()), interface, address }
    }
}

fn hash(address: MachineAddress) -> u64 {
    // FNV-1a: stable over releases, so that a link made by an older binary is found again.
    address
        .address()
        .octets()
        .iter()
        .fold(0xcbf2_9ce4_8422_2325, |hash, byte| (hash ^ u64::from(*byte)).wrapping_mul(0x0000_0100_0000_01b3))
}

/// A link or a route could not be made or removed.
#[derive(Debug, thiserror::Error)]
#[error("cannot {action}: {cause}")]
pub struct LinkError {
    /// What was being done, e.g. `add address fdaa:…/112 to d1.3`.
    pub action: String,
    /// What the kernel said.
    #[source]
    pub cause: io::Error,
}

/// One end of a link.
struct End {
    address: Ipv6Addr,
    link_local: Ipv6Addr,
    mac: Mac,
}

impl End {
    fn worker(address: MachineAddress) -> Self {
        Self { address: address.gateway(), link_local: LINK_LOCAL_WORKER, mac: mac(0xdc, address) }
    }

    fn machine(address: MachineAddress) -> Self {
        Self { address: address.address(), link_local: LINK_LOCAL_MACHINE, mac: mac(0xde, address) }
    }
}

/// A locally administered hardware address; only the two ends of one link ever see it.
fn mac(end: u8, address: MachineAddress) -> Mac {
    let [a, b, c, d] = address.machine.to_be_bytes();
    [0x02, end, a, b, c, d]
}

/// Makes the namespace, the veth pair, addresses, default route and forwarding, or what is missing of them.
///
/// # Errors
/// What could not be done and what the kernel said to it. A second try is safe.
pub fn ensure_machine_link(link: &MachineLink) -> Result<(), LinkError> {
    let (netns, _) = NetNs::ensure(&link.netns).action(|| format!("make namespace {}", link.netns.display()))?;
    forward().action(|| "turn IPv6 forwarding on".to_owned())?;
    let mut outside = Netlink::open().action(|| "open rtnetlink".to_owned())?;
    let mut inside = netns
        .run(|| {
            inside_sysctls()?;
            Netlink::open()
        })
        .action(|| format!("enter namespace {}", link.netns.display()))?;

    let make = || format!("make link {}", link.interface);
    let ends = (outside.link(&link.interface).action(make)?, inside.link(INSIDE).action(make)?);
    let (worker, machine) = match ends {
        (Some(worker), Some(machine)) => (worker, machine),
        (worker, machine) => {
            // An end alone is of an older namespace of this name: its other end is gone or elsewhere.
            if let Some(worker) = worker {
                outside.delete_link(worker.index).action(make)?;
            }
            if let Some(machine) = machine {
                inside.delete_link(machine.index).action(make)?;
            }
            outside.add_veth(&link.interface, INSIDE, netns.fd()).action(make)?;
            let gone = || io::Error::from(io::ErrorKind::NotFound);
            (
                outside.link(&link.interface).and_then(|end| end.ok_or_else(gone)).action(make)?,
                inside.link(INSIDE).and_then(|end| end.ok_or_else(gone)).action(make)?,
            )
        }
    };
    if let Some(loopback) = inside.link("lo").action(make)? {
        inside.set_up(loopback.index, true).action(|| "bring the machine's loopback up".to_owned())?;
    }
    let ends = [End::worker(link.address), End::machine(link.address)];
    for (netlink, index, own, other) in
        [(&mut outside, worker.index, &ends[0], &ends[1]), (&mut inside, machine.index, &ends[1], &ends[0])]
    {
        let add = || format!("add {} to link {}", own.address, link.interface);
        netlink.no_link_local(index).action(add)?;
        netlink.set_mac(index, own.mac).action(add)?;
        netlink.add_address(index, Prefix { address: own.link_local, length: 64 }).action(add)?;
        netlink.add_address(index, Prefix { address: own.address, length: 112 }).action(add)?;
        netlink.set_up(index, true).action(make)?;
        for neighbour in [other.link_local, other.address] {
            netlink.set_neighbour(index, neighbour, other.mac).action(add)?;
        }
    }
    outside.wait_usable(&link.interface, Some(link.address.gateway())).action(make)?;
    inside.wait_usable(INSIDE, Some(link.address.address())).action(make)?;
    let default = Prefix { address: Ipv6Addr::UNSPECIFIED, length: 0 };
    inside
        .set_route(default, Hop::Via(link.address.gateway()))
        .action(|| format!("route the machine's packets via {}", link.address.gateway()))
}

/// Takes the link away, and the namespace unless a process still lives in it. No link is no error.
pub fn remove_machine_link(link: &MachineLink) -> Result<(), LinkError> {
    let remove = || format!("remove link {}", link.interface);
    let mut outside = Netlink::open().action(remove)?;
    if let Some(worker) = outside.link(&link.interface).action(remove)? {
        match outside.delete_link(worker.index) {
            Err(error) if error.raw_os_error() != Some(libc::ENODEV) => return Err(error).action(remove),
            _ => {}
        }
    }
    NetNs::remove(&link.netns).action(|| format!("remove namespace {}", link.netns.display()))
}

/// Routes `to` (a peer's /80) through the peer's address `via`, replacing any route it had.
pub fn ensure_route(to: Prefix, via: Ipv6Addr) -> Result<(), LinkError> {
    let route = || format!("route {to} via {via}");
    Netlink::open().action(route)?.set_route(to, Hop::Via(via)).action(route)
}

/// Removes the route to `to`; there being none is no error.
pub fn remove_route(to: Prefix) -> Result<(), LinkError> {
    let route = || format!("remove the route to {to}");
    Netlink::open().action(route)?.delete_route(to).action(route)
}

/// Prepares the worker's network namespace: forwarding on, and everything in `own` (this worker's /80) that is no machine's
/// link answered with "unreachable" at once instead of leaving by the default route.
pub fn ensure_worker(own: Prefix) -> Result<(), LinkError> {
    forward().action(|| "turn IPv6 forwarding on".to_owned())?;
    let route = || format!("make the rest of {own} unreachable");
    Netlink::open().action(route)?.set_route(own, Hop::Unreachable).action(route)
}

/// What a machine's own namespace is set to before its interface appears there.
fn inside_sysctls() -> io::Result<()> {
    for (name, value) in [
        ("ipv6/conf/all/disable_ipv6", "0"),
        ("ipv6/conf/default/disable_ipv6", "0"),
        ("ipv6/conf/default/accept_ra", "0"),
        // Programs run without capabilities and may still listen on ports below 1024: nobody else is in the namespace.
        ("ipv4/ip_unprivileged_port_start", "0"),
    ] {
        set_sysctl(name, value)?;
    }
    Ok(())
}

/// Turns forwarding on. A forwarding host stops listening to router advertisements, so interfaces that did are told to go on.
fn forward() -> io::Result<()> {
    const FORWARDING: &str = "ipv6/conf/all/forwarding";
    let conf = Path::new("/proc/sys/net/ipv6/conf");
    if fs::read_to_string(conf.join("all/forwarding"))?.trim() == "1" {
        return Ok(());
    }
    for entry in fs::read_dir(conf)? {
        let setting = entry?.path().join("accept_ra");
        if fs::read_to_string(&setting).is_ok_and(|value| value.trim() == "1") {
            fs::write(&setting, "2")?;
        }
    }
    set_sysctl(FORWARDING, "1")
}

trait Action<T> {
    fn action(self, action: impl FnOnce() -> String) -> Result<T, LinkError>;
}

impl<T> Action<T> for io::Result<T> {
    fn action(self, action: impl FnOnce() -> String) -> Result<T, LinkError> {
        self.map_err(|cause| LinkError { action: action(), cause })
    }
}
