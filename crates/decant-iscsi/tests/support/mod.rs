//! A target over a file of its own, and peers that are run with a time limit.

#![allow(dead_code)]

use std::net::TcpListener;
use std::process::{Command, Output};

use decant_iscsi::chap::Chap;
use decant_iscsi::login::{DigestPolicy, Offer};
use decant_iscsi::scsi::Disk;
use decant_iscsi::target::{Access, Config, Limits, Target};

use crate::target_server::Server;

pub(crate) const NAME: &str = "iqn.2026-11.dev.decant:cu";

/// What a test's target is like.
pub(crate) struct Shape {
    pub(crate) block_bytes: u32,
    pub(crate) physical_exponent: u8,
    pub(crate) blocks: u64,
    pub(crate) read_only: bool,
    pub(crate) chap: Option<Chap>,
    pub(crate) digests: DigestPolicy,
    pub(crate) workers: usize,
}

impl Default for Shape {
    /// 512-byte blocks on a 4 KiB medium, fewer than 65,536 of them: iscsi-test-cu moves that many in one command otherwise.
    fn default() -> Self {
        Self {
            block_bytes: 512,
            physical_exponent: 3,
            blocks: 60_000,
            read_only: false,
            chap: None,
            digests: DigestPolicy::Allowed,
            workers: 2,
        }
    }
}

/// A running target and its disk, which goes with it.
pub(crate) struct Fixture {
    pub(crate) server: Server,
    pub(crate) disk: tempfile::NamedTempFile,
}

pub(crate) fn serve(shape: &Shape) -> Fixture {
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let disk = tempfile::NamedTempFile::new().expect("a temporary file");
    disk.as_file().set_len(shape.blocks * u64::from(shape.block_bytes)).expect("a sparse file");
    let offer = Offer { header_digest: shape.digests, data_digest: shape.digests, ..Offer::default() };
    let config = Config {
        name: NAME.to_owned(),
        addresses: vec![listener.local_addr().expect("bound").to_string()],
        portal_group: 1,
        access: vec![Access { initiator: None, chap: shape.chap.clone() }],
        offer,
        limits: Limits::default(),
    };
    let what = Disk {
        vendor: "DECANT".to_owned(),
        product: "TEST".to_owned(),
        revision: "1".to_owned(),
        serial: "cu-1".to_owned(),
        block_bytes: shape.block_bytes,
        physical_exponent: shape.physical_exponent,
        blocks: shape.blocks,
        read_only: shape.read_only,
        thin: true,
        max_transfer: 4 * 1024 * 1024,
        digests: false,
    };
    let file = disk.reopen().expect("the same file again");
    let server = Server::start(listener, Target::new(config, what), file, shape.workers, false);
    Fixture { server, disk }
}

impl Fixture {
    /// The URL of LUN 0 for libiscsi and QEMU; `user` as `name%secret@`.
    pub(crate) fn url(&self, user: &str) -> String {
        format!("iscsi://{user}{}/{NAME}/0", self.server.address())
    }
}

/// Runs a peer for at most so long; `timeout` of coreutils kills it then, with status 124.
pub(crate) fn run(seconds: u32, program: &str, arguments: &[&str]) -> Output {
    let package = if program.starts_with("qemu") { "qemu-utils and qemu-block-extra" } else { "libiscsi-bin" };
    let output = Command::new("timeout").arg(seconds.to_string()).arg(program).args(arguments).output();
    let output = output.expect("timeout is part of coreutils");
    let code = output.status.code();
    assert!(code != Some(127), "{program} is not here: install Debian's {package}");
    assert!(code != Some(124), "{program} {arguments:?} did not end within {seconds} s: {}", text(&output));
    output
}

/// Both streams.
pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Whether QEMU's iscsi driver, a module of QEMU's own version, is on this machine; says so if not, as `SKIP <test>: <why>`.
#[allow(dead_code, reason = "not every test file asks QEMU")]
pub(crate) fn has_qemu(test: &str) -> bool {
    let directory = format!("/usr/lib/{}-linux-gnu/qemu/block-iscsi.so", std::env::consts::ARCH);
    let found = std::path::Path::new(&directory).exists();
    if !found {
        println!("SKIP {test}: qemu-block-extra of the version of qemu-utils is not installed");
    }
    found
}
