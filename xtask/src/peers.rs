//! The programs that tests use as peers and oracles, and the Debian packages they come from.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::Command;

use anyhow::{Context, bail};

/// A program and the Debian package that brings it.
const PEERS: &[(&str, &str)] = &[
    ("ip", "iproute2"),
    ("mkfs.ext4", "e2fsprogs"),
    ("debugfs", "e2fsprogs"),
    ("fstrim", "util-linux"),
    ("cryptsetup", "cryptsetup-bin"),
    ("nbdkit", "nbdkit"),
    ("nbdcopy", "libnbd-bin"),
    ("nbdinfo", "libnbd-bin"),
    ("qemu-img", "qemu-utils"),
    ("qemu-io", "qemu-utils"),
    ("qemu-nbd", "qemu-utils"),
    ("sqlite3", "sqlite3"),
    ("iscsi-test-cu", "libiscsi-bin"),
    ("tgtd", "tgt"),
];

/// A peer that must have the version of another package: where that came from elsewhere it cannot be had, and the tests that want it
/// say so and are skipped. QEMU's iscsi driver is a module, found from /usr/bin by the directory of its architecture.
const WISHED: &[(&str, &str)] = &[(QEMU_ISCSI, "qemu-block-extra")];

#[cfg(target_arch = "aarch64")]
const QEMU_ISCSI: &str = "../lib/aarch64-linux-gnu/qemu/block-iscsi.so";
#[cfg(not(target_arch = "aarch64"))]
const QEMU_ISCSI: &str = "../lib/x86_64-linux-gnu/qemu/block-iscsi.so";

/// Peers that only benchmarks use.
pub(crate) const BENCH_PEERS: &[(&str, &str)] = &[
    ("fio", "fio"),
    ("nbdkit", "nbdkit"),
    ("nbdcopy", "libnbd-bin"),
    ("qemu-storage-daemon", "qemu-system-common"),
    ("iscsi-perf", "libiscsi-bin"),
    ("tgtd", "tgt"),
];

/// Installs what is missing for tests, after naming it. None of these packages starts a daemon, and none that is there is removed.
pub(crate) fn ensure() -> anyhow::Result<()> {
    ensure_all(PEERS)?;
    if let Err(error) = ensure_all(WISHED) {
        println!("cannot be had here, and the tests that want it are skipped: {error:#}");
    }
    Ok(())
}

/// Installs the packages of `peers` whose program is not on this machine.
pub(crate) fn ensure_all(peers: &[(&str, &str)]) -> anyhow::Result<()> {
    let missing: BTreeSet<&str> =
        peers.iter().filter(|(program, _)| !is_installed(program)).map(|&(_, package)| package).collect();
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<&str> = missing.into_iter().collect();
    println!("installing with apt-get, for tests to use as peers: {}", list.join(" "));
    if !is_root() {
        bail!("these Debian packages are missing: {}; install them, or run this as root", list.join(" "));
    }
    apt(&["update", "-q"])?;
    apt(&[&["install", "-y", "-q", "--no-install-recommends", "--no-remove"][..], &list].concat())?;
    for (program, package) in peers {
        if !is_installed(program) {
            bail!("{program} is still missing after installing {package}");
        }
    }
    Ok(())
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').chain(["/usr/sbin", "/sbin"]).any(|dir| Path::new(dir).join(program).is_file())
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

fn apt(args: &[&str]) -> anyhow::Result<()> {
    // RUNLEVEL=1 keeps package scripts from starting services, should a dependency bring one.
    let output = Command::new("apt-get")
        .args(args)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1")
        .output()
        .context("cannot start apt-get: tests need Debian or a system with the packages above")?;
    if !output.status.success() {
        bail!("apt-get {} failed:\n{}", args.join(" "), String::from_utf8_lossy(&output.stderr));
    }
    Ok(())
}
