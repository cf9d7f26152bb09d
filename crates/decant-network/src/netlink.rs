//! The few rtnetlink requests that links need, in the network namespace where the socket was opened.
//!
//! Kernel: `include/uapi/linux/{netlink,rtnetlink,if_link,if_addr,veth}.h`. A socket keeps working in the namespace it was
//! opened in, whichever namespace its user moves to; that is how one thread configures both ends of a link.

use std::io;
use std::net::Ipv6Addr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};
use std::time::Duration;

use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, netlink::SocketAddrNetlink};

use crate::addresses::Prefix;

const NLM_F_REQUEST: u16 = 0x1;
const NLM_F_ACK: u16 = 0x4;
const NLM_F_REPLACE: u16 = 0x100;
const NLM_F_EXCL: u16 = 0x200;
const NLM_F_CREATE: u16 = 0x400;
/// `NLA_F_NESTED`: the attribute holds attributes.
const NESTED: u16 = 0x8000;

const IFLA_ADDRESS: u16 = 1;
const IFLA_IFNAME: u16 = 3;
const IFLA_MTU: u16 = 4;
const IFLA_MASTER: u16 = 10;
const IFLA_LINKINFO: u16 = 18;
const IFLA_STATS64: u16 = 23;
const IFLA_AF_SPEC: u16 = 26;
const IFLA_NET_NS_FD: u16 = 28;
const IFLA_INFO_KIND: u16 = 1;
const IFLA_INFO_DATA: u16 = 2;
const IFLA_INET6_ADDR_GEN_MODE: u16 = 8;
const IFLA_BR_MCAST_SNOOPING: u16 = 23;
const VETH_INFO_PEER: u16 = 1;
const IFA_ADDRESS: u16 = 1;
const IFA_LOCAL: u16 = 2;
const IFA_FLAGS: u16 = 8;
const RTA_DST: u16 = 1;
const RTA_GATEWAY: u16 = 5;
const RTA_PRIORITY: u16 = 6;
const NDA_DST: u16 = 1;
const NDA_LLADDR: u16 = 2;
/// No link-local address is made: the ones we want are added without duplicate detection, which takes a second.
const ADDR_GEN_MODE_NONE: u8 = 1;

/// How often a link is looked at until it can be used, a second in all.
const USABLE_TRIES: u32 = 5000;
/// Between two looks.
const USABLE_PAUSE: Duration = Duration::from_micros(200);

/// Bytes and packets that an interface has carried.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Counters {
    /// Bytes received.
    pub received_bytes: u64,
    /// Bytes sent.
    pub sent_bytes: u64,
    /// Packets received.
    pub received_packets: u64,
    /// Packets sent.
    pub sent_packets: u64,
}

/// A hardware address.
pub(crate) type Mac = [u8; 6];

#[derive(Debug, Clone, Copy)]
pub(crate) struct Link {
    pub(crate) index: u32,
    /// Whether the kernel has noticed that both ends are up. Until then it drops what is sent.
    pub(crate) running: bool,
    pub(crate) counters: Counters,
}

/// Where packets to a prefix go.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Hop {
    /// To a neighbour.
    Via(Ipv6Addr),
    /// Nowhere: the sender is told so.
    Unreachable,
}

pub(crate) struct Netlink {
    socket: OwnedFd,
    sequence: u32,
    answer: Vec<u8>,
}

/// A request under construction.
struct Message(Vec<u8>);

impl Message {
    fn new(kind: u16, flags: u16, body: &[u8]) -> Self {
        let mut bytes = vec![0; 4];
        bytes.extend(kind.to_ne_bytes());
        bytes.extend((flags | NLM_F_REQUEST | NLM_F_ACK).to_ne_bytes());
        bytes.extend([0; 8]);
        bytes.extend(body);
        Self(bytes)
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        // Attributes are at most a name, a number or an address: far below 64 KiB.
        self.0.extend((4 + value.len() as u16).to_ne_bytes());
        self.0.extend(kind.to_ne_bytes());
        self.0.extend(value);
        self.0.resize(self.0.len().next_multiple_of(4), 0);
    }

    fn nested(&mut self, kind: u16, inside: impl FnOnce(&mut Self)) {
        let start = self.0.len();
        self.attribute(kind | NESTED, &[]);
        inside(self);
        let length = (self.0.len() - start) as u16;
        self.0[start..start + 2].copy_from_slice(&length.to_ne_bytes());
    }

    fn text(&mut self, kind: u16, text: &str) {
        let mut bytes = text.as_bytes().to_vec();
        bytes.push(0);
        self.attribute(kind, &bytes);
    }

    fn number(&mut self, kind: u16, number: u32) {
        self.attribute(kind, &number.to_ne_bytes());
    }
}

/// `struct ifinfomsg`.
fn ifinfomsg(index: u32, flags: u32, change: u32) -> [u8; 16] {
    let mut body = [0; 16];
    body[4..8].copy_from_slice(&index.to_ne_bytes());
    body[8..12].copy_from_slice(&flags.to_ne_bytes());
    body[12..16].copy_from_slice(&change.to_ne_bytes());
    body
}

impl Netlink {
    /// Opens a socket in the calling thread's network namespace.
    pub(crate) fn open() -> io::Result<Self> {
        let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, None)?;
        rustix::net::bind(&socket, &SocketAddrNetlink::new(0, 0))?;
        Ok(Self { socket, sequence: 0, answer: vec![0; 32 * 1024] })
    }

    /// Sends one request and waits for its acknowledgement; gives the first message that came before it, if any.
    fn request(&mut self, mut message: Message) -> io::Result<Option<Vec<u8>>> {
        self.sequence += 1;
        let length = message.0.len() as u32;
        message.0[0..4].copy_from_slice(&length.to_ne_bytes());
        message.0[8..12].copy_from_slice(&self.sequence.to_ne_bytes());
        rustix::net::send(&self.socket, &message.0, SendFlags::empty())?;
        let mut first = None;
        loop {
            let (length, _) = rustix::net::recv(&self.socket, &mut self.answer[..], RecvFlags::empty())?;
            let mut rest = self.answer.get(..length).unwrap_or_default();
            while let Some((header, _)) = rest.split_at_checked(16) {
                let size = read_u32(header, 0) as usize;
                let (Some(body), sequence) = (rest.get(16..size), read_u32(header, 8)) else { break };
                let kind = i32::from(u16::from_ne_bytes([header[4], header[5]]));
                if sequence == self.sequence {
                    if kind == libc::NLMSG_ERROR {
                        return match read_u32(body, 0).cast_signed() {
                            0 => Ok(first),
                            error => Err(io::Error::from_raw_os_error(-error)),
                        };
                    }
                    first.get_or_insert_with(|| body.to_vec());
                }
                rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
            }
        }
    }

    /// The interface called `name`, if there is one.
    pub(crate) fn link(&mut self, name: &str) -> io::Result<Option<Link>> {
        let mut message = Message::new(libc::RTM_GETLINK, 0, &ifinfomsg(0, 0, 0));
        message.text(IFLA_IFNAME, name);
        let body = match self.request(message) {
            Ok(Some(body)) => body,
            Ok(None) => return Ok(None),
            Err(error) if error.raw_os_error() == Some(libc::ENODEV) => return Ok(None),
            Err(error) => return Err(error),
        };
        let mut counters = Counters::default();
        let mut rest = body.get(16..).unwrap_or_default();
        while rest.len() >= 4 {
            let size = usize::from(u16::from_ne_bytes([rest[0], rest[1]]));
            let Some(value) = rest.get(4..size) else { break };
            if u16::from_ne_bytes([rest[2], rest[3]]) == IFLA_STATS64 {
                counters = Counters {
                    received_packets: read_u64(value, 0),
                    sent_packets: read_u64(value, 8),
                    received_bytes: read_u64(value, 16),
                    sent_bytes: read_u64(value, 24),
                };
            }
            rest = rest.get(size.next_multiple_of(4)..).unwrap_or_default();
        }
        let running = read_u32(&body, 8) & libc::IFF_RUNNING as u32 != 0;
        Ok(Some(Link { index: read_u32(&body, 4), running, counters }))
    }

    /// Waits until the interface, which is up and has `address`, carries packets to it. The kernel does two things in the
    /// background: it notices the carrier, and it takes up an address that was added. A connection's first packet that
    /// comes before is lost, and sent again after a second only.
    pub(crate) fn wait_usable(&mut self, name: &str, address: Option<Ipv6Addr>) -> io::Result<()> {
        for _ in 0..USABLE_TRIES {
            let running = self.link(name)?.is_none_or(|link| link.running);
            if running && address.map_or(Ok(true), |address| self.is_local(address))? {
                return Ok(());
            }
            std::thread::sleep(USABLE_PAUSE);
        }
        Err(io::Error::new(io::ErrorKind::TimedOut, format!("link {name} does not come up")))
    }

    /// Whether packets to `address` are delivered here.
    fn is_local(&mut self, address: Ipv6Addr) -> io::Result<bool> {
        let mut body = [0; 12];
        body[0] = libc::AF_INET6 as u8;
        body[1] = 128;
        let mut message = Message::new(libc::RTM_GETROUTE, 0, &body);
        message.attribute(RTA_DST, &address.octets());
        match self.request(message) {
            // struct rtmsg: the type of the route is its eighth byte.
            Ok(route) => Ok(route.is_some_and(|route| route.get(7) == Some(&libc::RTN_LOCAL))),
            Err(error) if matches!(error.raw_os_error(), Some(libc::ENETUNREACH | libc::EHOSTUNREACH)) => Ok(false),
            Err(error) => Err(error),
        }
    }

    /// Makes a veth pair: `name` here, `peer` in the namespace `peer_netns`, both down.
    pub(crate) fn add_veth(&mut self, name: &str, peer: &str, peer_netns: BorrowedFd<'_>) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &ifinfomsg(0, 0, 0));
        message.text(IFLA_IFNAME, name);
        message.nested(IFLA_LINKINFO, |m| {
            m.text(IFLA_INFO_KIND, "veth");
            m.nested(IFLA_INFO_DATA, |m| {
                m.nested(VETH_INFO_PEER, |m| {
                    m.0.extend(ifinfomsg(0, 0, 0));
                    m.text(IFLA_IFNAME, peer);
                    m.number(IFLA_NET_NS_FD, peer_netns.as_raw_fd().cast_unsigned());
                });
            });
        });
        self.request(message).map(drop)
    }

    /// No link-local address is made when the interface comes up.
    pub(crate) fn no_link_local(&mut self, index: u32) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0, &ifinfomsg(index, 0, 0));
        message.nested(IFLA_AF_SPEC, |m| {
            m.nested(libc::AF_INET6 as u16, |m| m.attribute(IFLA_INET6_ADDR_GEN_MODE, &[ADDR_GEN_MODE_NONE]));
        });
        self.request(message).map(drop)
    }

    /// Makes a bridge that forwards at once and does not filter multicast.
    pub(crate) fn add_bridge(&mut self, name: &str) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, NLM_F_CREATE | NLM_F_EXCL, &ifinfomsg(0, 0, 0));
        message.text(IFLA_IFNAME, name);
        message.nested(IFLA_LINKINFO, |m| {
            m.text(IFLA_INFO_KIND, "bridge");
            m.nested(IFLA_INFO_DATA, |m| m.attribute(IFLA_BR_MCAST_SNOOPING, &[0]));
        });
        self.request(message).map(drop)
    }

    pub(crate) fn delete_link(&mut self, index: u32) -> io::Result<()> {
        self.request(Message::new(libc::RTM_DELLINK, 0, &ifinfomsg(index, 0, 0))).map(drop)
    }

    pub(crate) fn set_up(&mut self, index: u32, up: bool) -> io::Result<()> {
        let flag = libc::IFF_UP as u32;
        self.request(Message::new(libc::RTM_NEWLINK, 0, &ifinfomsg(index, if up { flag } else { 0 }, flag))).map(drop)
    }

    /// Gives the interface a hardware address.
    pub(crate) fn set_mac(&mut self, index: u32, mac: Mac) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0, &ifinfomsg(index, 0, 0));
        message.attribute(IFLA_ADDRESS, &mac);
        self.request(message).map(drop)
    }

    /// Says for good where a neighbour is. Asking (neighbour discovery) can take a second right after a link was made: the
    /// neighbour joins the group in which it is asked for in the background.
    pub(crate) fn set_neighbour(&mut self, index: u32, address: Ipv6Addr, mac: Mac) -> io::Result<()> {
        // struct ndmsg: family, pad, ifindex, state, flags, type.
        let mut body = [0; 12];
        body[0] = libc::AF_INET6 as u8;
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        body[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
        let mut message = Message::new(libc::RTM_NEWNEIGH, NLM_F_CREATE | NLM_F_REPLACE, &body);
        message.attribute(NDA_DST, &address.octets());
        message.attribute(NDA_LLADDR, &mac);
        self.request(message).map(drop)
    }

    pub(crate) fn set_mtu(&mut self, index: u32, bytes: u32) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0, &ifinfomsg(index, 0, 0));
        message.number(IFLA_MTU, bytes);
        self.request(message).map(drop)
    }

    /// Makes the interface a port of the bridge `master`.
    pub(crate) fn set_master(&mut self, index: u32, master: u32) -> io::Result<()> {
        let mut message = Message::new(libc::RTM_NEWLINK, 0, &ifinfomsg(index, 0, 0));
        message.number(IFLA_MASTER, master);
        self.request(message).map(drop)
    }

    /// Adds an address that is usable at once (no duplicate detection); adding it again is no error.
    pub(crate) fn add_address(&mut self, index: u32, prefix: Prefix) -> io::Result<()> {
        let link_scope = prefix.address.is_unicast_link_local();
        let scope = if link_scope { libc::RT_SCOPE_LINK } else { libc::RT_SCOPE_UNIVERSE };
        let mut body = [libc::AF_INET6 as u8, prefix.length, libc::IFA_F_NODAD as u8, scope, 0, 0, 0, 0];
        body[4..8].copy_from_slice(&index.to_ne_bytes());
        let mut message = Message::new(libc::RTM_NEWADDR, NLM_F_CREATE | NLM_F_REPLACE, &body);
        message.attribute(IFA_LOCAL, &prefix.address.octets());
        message.attribute(IFA_ADDRESS, &prefix.address.octets());
        message.number(IFA_FLAGS, libc::IFA_F_NODAD);
        self.request(message).map(drop)
    }

    /// Sets the route to `to`, replacing the one it had.
    pub(crate) fn set_route(&mut self, to: Prefix, hop: Hop) -> io::Result<()> {
        let kind = if matches!(hop, Hop::Unreachable) { libc::RTN_UNREACHABLE } else { libc::RTN_UNICAST };
        let body = [
            libc::AF_INET6 as u8,
            to.length,
            0,
            0,
            libc::RT_TABLE_MAIN,
            libc::RTPROT_STATIC,
            libc::RT_SCOPE_UNIVERSE,
            kind,
            0,
            0,
            0,
            0,
        ];
        let mut message = Message::new(libc::RTM_NEWROUTE, NLM_F_CREATE | NLM_F_REPLACE, &body);
        message.attribute(RTA_DST, &to.address.octets());
        message.number(RTA_PRIORITY, 1024);
        match hop {
            Hop::Via(gateway) => message.attribute(RTA_GATEWAY, &gateway.octets()),
            Hop::Unreachable => {}
        }
        self.request(message).map(drop)
    }

    /// Removes our route to `to`; there being none is no error.
    pub(crate) fn delete_route(&mut self, to: Prefix) -> io::Result<()> {
        let mut body = [0; 12];
        body[0] = libc::AF_INET6 as u8;
        body[1] = to.length;
        body[4] = libc::RT_TABLE_MAIN;
        body[5] = libc::RTPROT_STATIC;
        let mut message = Message::new(libc::RTM_DELROUTE, 0, &body);
        message.attribute(RTA_DST, &to.address.octets());
        match self.request(message) {
            Err(error) if error.raw_os_error() != Some(libc::ESRCH) => Err(error),
            _ => Ok(()),
        }
    }
}

fn read_u32(bytes: &[u8], at: usize) -> u32 {
    bytes.get(at..at + 4).and_then(|b| b.try_into().ok()).map_or(0, u32::from_ne_bytes)
}

fn read_u64(bytes: &[u8], at: usize) -> u64 {
    bytes.get(at..at + 8).and_then(|b| b.try_into().ok()).map_or(0, u64::from_ne_bytes)
}
