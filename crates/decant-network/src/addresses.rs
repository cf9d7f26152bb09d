//! Addresses that say where a machine is.
//!
//! ```text
//! fdaa : NNNN : NNNN : WWWW : WWWW : MMMM : MMMM : free
//!  16  |  network 32 |  worker 32  | machine 32  |  16
//! └──────── /80: what peers route to a worker ──┘
//! └──────────────── /112: one machine's own ──────────┘
//! ```
//! `::1` of the /112 is the worker's end of the machine's link, `::2` is the machine. Moving changes the worker field and with it
//! the address; names are the contract.

use std::fmt;
use std::net::Ipv6Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The first 16 bits of every machine's address: a unique local prefix (RFC 4193).
const PREFIX: u16 = 0xfdaa;
/// The worker's end of a machine's link, in the machine's free 16 bits.
const GATEWAY: u16 = 1;
/// The machine itself.
const MACHINE: u16 = 2;

/// Where a machine is, as its address says it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct MachineAddress {
    /// The isolation domain: machines of different networks do not reach each other.
    pub network: u32,
    /// The worker's index in the fleet, `worker_index` of its configuration.
    pub worker: u32,
    /// The machine's index in the fleet, never 0.
    pub machine: u32,
}

/// A text or an address that is no machine's.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{text:?} is not a machine's address: want fdaa:N:N:W:W:M:M:2 with a machine index that is not 0")]
pub struct NotAMachine {
    /// What was given, cut at 80 characters.
    pub text: String,
}

impl MachineAddress {
    /// The machine's own address, `::2` in its /112.
    pub fn address(self) -> Ipv6Addr {
        self.host(MACHINE)
    }

    /// The worker's end of the link, `::1`; the machine's default route.
    pub fn gateway(self) -> Ipv6Addr {
        self.host(GATEWAY)
    }

    /// The machine's /112.
    pub fn prefix(self) -> Prefix {
        Prefix { address: self.host(0), length: 112 }
    }

    /// The /80 that is routed to the machine's worker.
    pub fn worker_prefix(self) -> Prefix {
        worker_prefix(self.network, self.worker)
    }

    /// The same machine on another worker.
    pub fn on_worker(self, worker: u32) -> Self {
        Self { worker, ..self }
    }

    /// Takes a machine's own address apart.
    pub fn from_address(address: Ipv6Addr) -> Result<Self, NotAMachine> {
        let [prefix, n1, n0, w1, w0, m1, m0, host] = address.segments();
        let join = |high: u16, low: u16| u32::from(high) << 16 | u32::from(low);
        let machine = join(m1, m0);
        if prefix != PREFIX || host != MACHINE || machine == 0 {
            return Err(NotAMachine { text: address.to_string() });
        }
        Ok(Self { network: join(n1, n0), worker: join(w1, w0), machine })
    }

    fn host(self, host: u16) -> Ipv6Addr {
        let ([n1, n0], [w1, w0], [m1, m0]) = (halves(self.network), halves(self.worker), halves(self.machine));
        Ipv6Addr::new(PREFIX, n1, n0, w1, w0, m1, m0, host)
    }
}

/// The /80 in which all machines of `network` on the worker with index `worker` live.
pub fn worker_prefix(network: u32, worker: u32) -> Prefix {
    Prefix { address: MachineAddress { network, worker, machine: 0 }.host(0), length: 80 }
}

fn halves(field: u32) -> [u16; 2] {
    let [a, b, c, d] = field.to_be_bytes();
    [u16::from_be_bytes([a, b]), u16::from_be_bytes([c, d])]
}

impl fmt::Display for MachineAddress {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.address().fmt(f)
    }
}

impl FromStr for MachineAddress {
    type Err = NotAMachine;
    fn from_str(text: &str) -> Result<Self, NotAMachine> {
        let address: Ipv6Addr = text.parse().map_err(|_| NotAMachine { text: text.chars().take(80).collect() })?;
        Self::from_address(address)
    }
}

impl TryFrom<String> for MachineAddress {
    type Error = NotAMachine;
    fn try_from(text: String) -> Result<Self, NotAMachine> {
        text.parse()
    }
}

impl From<MachineAddress> for String {
    fn from(address: MachineAddress) -> Self {
        address.to_string()
    }
}

/// An IPv6 network in CIDR notation.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Prefix {
    /// Its first address; bits beyond `length` are 0.
    pub address: Ipv6Addr,
    /// Leading bits that count, 0 to 128.
    pub length: u8,
}

impl Prefix {
    /// Whether `address` lies within.
    pub fn contains(self, address: Ipv6Addr) -> bool {
        let mask = u128::MAX.checked_shl(128 - u32::from(self.length)).unwrap_or(0);
        (address.to_bits() ^ self.address.to_bits()) & mask == 0
    }
}

impl fmt::Display for Prefix {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.length)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    #[test]
    fn the_fields_stand_where_the_map_says() {
        let address = MachineAddress { network: 0x0001_0002, worker: 3, machine: 0xabcd_0004 };
        assert_eq!(address.to_string(), "fdaa:1:2:0:3:abcd:4:2");
        assert_eq!(address.gateway().to_string(), "fdaa:1:2:0:3:abcd:4:1");
        assert_eq!(address.prefix().to_string(), "fdaa:1:2:0:3:abcd:4:0/112");
        assert_eq!(address.worker_prefix().to_string(), "fdaa:1:2:0:3::/80");
        assert_eq!(address.on_worker(9).to_string(), "fdaa:1:2:0:9:abcd:4:2");
    }

    #[test]
    fn what_is_no_machine_is_refused() {
        for text in ["", "fdaa::2", "fdab:1:2:0:3:0:4:2", "fdaa:1:2:0:3:0:4:1", "fdaa:1:2:0:3:0:4:0", "10.0.0.1", "x"] {
            assert!(text.parse::<MachineAddress>().is_err(), "{text}");
        }
        let json = serde_json::from_str::<MachineAddress>("\"fdaa:0:1:0:2:0:3:2\"").expect("an address");
        assert_eq!(json, MachineAddress { network: 1, worker: 2, machine: 3 });
    }

    proptest! {
        #[test]
        fn parse_is_the_inverse_of_format(network: u32, worker: u32, machine in 1..=u32::MAX) {
            let address = MachineAddress { network, worker, machine };
            prop_assert_eq!(address.to_string().parse::<MachineAddress>(), Ok(address));
            prop_assert!(address.prefix().contains(address.address()));
            prop_assert!(address.prefix().contains(address.gateway()));
            prop_assert!(address.worker_prefix().contains(address.address()));
            prop_assert!(!address.on_worker(worker.wrapping_add(1)).worker_prefix().contains(address.address()));
        }
    }
}
