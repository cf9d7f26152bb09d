//! The link of a machine: its own network namespace, a veth pair to its worker, addresses and routes.

use std::io;
use std::net::Ipv6Addr;
use std::path::{Path, PathBuf};

use decant_base::MachineId;

use crate::addresses::{MachineAddress, Prefix};

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
        let interface = if plain.len() <= 15 { plain } else { format!("d{:013x}", hash(address) >> 12) };
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

/// Makes the namespace, the veth pair, addresses, default route and forwarding, or what is missing of them.
///
/// # Errors
/// What could not be done and what the kernel said to it. A second try is safe.
pub fn ensure_machine_link(link: &MachineLink) -> Result<(), LinkError> {
    Err(LinkError { action: format!("make {}", link.interface), cause: io::ErrorKind::Unsupported.into() })
}

/// Takes the link away, and the namespace unless a process still lives in it. No link is no error.
pub fn remove_machine_link(link: &MachineLink) -> Result<(), LinkError> {
    Err(LinkError { action: format!("remove {}", link.interface), cause: io::ErrorKind::Unsupported.into() })
}

/// Routes `to` (a peer's /80) through the peer's address `via`, replacing any route it had.
pub fn ensure_route(to: Prefix, via: Ipv6Addr) -> Result<(), LinkError> {
    Err(LinkError { action: format!("route {to} via {via}"), cause: io::ErrorKind::Unsupported.into() })
}

/// Prepares the worker's network namespace: forwarding on, and everything in `own` (this worker's /80) that is no machine's
/// link answered with "unreachable" at once instead of leaving by the default route.
pub fn ensure_worker(own: Prefix) -> Result<(), LinkError> {
    Err(LinkError { action: format!("prepare {own}"), cause: io::ErrorKind::Unsupported.into() })
}
