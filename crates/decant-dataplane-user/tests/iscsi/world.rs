//! Our own target over a disk in memory.

use std::net::SocketAddr;
use std::sync::Arc;

use decant_dataplane_user::device::Exported;
use decant_dataplane_user::export::Address;
use decant_dataplane_user::export::iscsi::{self, IscsiServer};
use decant_dataplane_user::origin::IscsiOptions;
use decant_iscsi::chap::{Chap, Credentials, Secret};
use decant_iscsi::login::DigestPolicy;
use decant_iscsi::target::Access;

use crate::fixture::{Disk, HASTY};

pub(crate) const TARGET: &str = "iqn.2026-11.dev.decant:disk";
pub(crate) const INITIATOR: &str = "iqn.2026-11.dev.decant:clone";

pub(crate) fn mutual() -> Chap {
    let credentials =
        |name: &str, secret: &str| Credentials { name: name.into(), secret: Secret::new(secret).unwrap() };
    Chap::new(credentials("reader", "the secret of the reader"), Some(credentials("server", "that of the server")))
        .unwrap()
}

pub(crate) fn options(address: SocketAddr) -> IscsiOptions {
    IscsiOptions {
        address: Address::Tcp(address),
        target: TARGET.into(),
        lun: 0,
        initiator: INITIATOR.into(),
        chap: None,
        digests: DigestPolicy::Required,
        size: None,
        connections: 3,
        timing: HASTY,
    }
}

/// How a disk is served.
#[derive(Clone)]
pub(crate) struct Shape {
    pub(crate) block_bytes: u32,
    pub(crate) serial: &'static str,
    pub(crate) chap: Option<Chap>,
}

impl Default for Shape {
    fn default() -> Self {
        Self { block_bytes: 512, serial: "0001", chap: None }
    }
}

pub(crate) fn listen(address: SocketAddr, shape: &Shape, disk: Arc<dyn Exported>) -> IscsiServer {
    let options = iscsi::IscsiOptions {
        address,
        name: TARGET.into(),
        access: vec![Access { initiator: Some(INITIATOR.into()), chap: shape.chap.clone() }],
        peers: Vec::new(),
        digests: DigestPolicy::Allowed,
        block_bytes: shape.block_bytes,
        serial: shape.serial.into(),
    };
    IscsiServer::listen(options, disk).unwrap()
}

/// A server on a port of its own.
pub(crate) fn serve(disk: Disk, shape: &Shape) -> (IscsiServer, Arc<Disk>, SocketAddr) {
    let disk = Arc::new(disk);
    let server = listen("127.0.0.1:0".parse().unwrap(), shape, disk.clone());
    let Address::Tcp(address) = server.local_addr().clone() else { unreachable!("it is TCP") };
    (server, disk, address)
}
