//! Serves a file as LUN 0 of an iSCSI target, for trying peers against it:
//!
//! ```text
//! cargo run --release -p decant-iscsi --example target -- 127.0.0.1:3260 disk.img [--read-only] [--block 4096] [--workers N]
//! iscsi-perf -m 32 -b 8 iscsi://127.0.0.1:3260/iqn.2026-11.dev.decant:disk/0
//! ```
//! Anybody may log in, so it listens where it is told and nowhere else.

#[path = "../tests/target_server/mod.rs"]
mod target_server;

use std::net::TcpListener;

use decant_iscsi::login::Offer;
use decant_iscsi::scsi::Disk;
use decant_iscsi::target::{Access, Config, Limits, Target};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut arguments = std::env::args().skip(1);
    let usage = "usage: target ADDR FILE [--read-only] [--block BYTES] [--workers N]";
    let (address, path) = (arguments.next().ok_or(usage)?, arguments.next().ok_or(usage)?);
    let (mut read_only, mut block_bytes, mut workers) = (false, 512u32, 0);
    while let Some(option) = arguments.next() {
        match option.as_str() {
            "--read-only" => read_only = true,
            "--block" => block_bytes = arguments.next().ok_or(usage)?.parse()?,
            "--workers" => workers = arguments.next().ok_or(usage)?.parse()?,
            _ => return Err(usage.into()),
        }
    }
    let file = std::fs::OpenOptions::new().read(true).write(!read_only).open(path)?;
    let listener = TcpListener::bind(address)?;
    let config = Config {
        name: "iqn.2026-11.dev.decant:disk".to_owned(),
        addresses: vec![listener.local_addr()?.to_string()],
        portal_group: 1,
        access: vec![Access { initiator: None, chap: None }],
        offer: Offer::default(),
        limits: Limits::default(),
    };
    let disk = Disk {
        vendor: "DECANT".to_owned(),
        product: "EXAMPLE".to_owned(),
        revision: "1".to_owned(),
        serial: "example-target".to_owned(),
        block_bytes,
        physical_exponent: if block_bytes == 512 { 3 } else { 0 },
        blocks: file.metadata()?.len() / u64::from(block_bytes),
        read_only,
        thin: true,
        max_transfer: 4 * 1024 * 1024,
        digests: false,
    };
    println!("READY {}", listener.local_addr()?);
    target_server::Server::start(listener, Target::new(config, disk), file, workers, true).wait();
    Ok(())
}
