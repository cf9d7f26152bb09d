//! The programs that tests use as peers and oracles, and the Debian packages they come from.

use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
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
];

/// Programs of packages that enable and start a service when they are installed, and their Debian packages. Whatever keeps a
/// package's scripts from starting one (`policy-rc.d`) is itself a change of the host, so these are never installed: they are
/// unpacked below target/peers, with the libraries that are not here, and run from there.
const UNPACKED: &[(&str, &str)] = &[("tgtd", "tgt"), ("tgtadm", "tgt")];

/// A peer that must have the version of another package. QEMU's iscsi driver is a module, found from /usr/bin by the directory of
/// its architecture. Where QEMU came from elsewhere than the module can be had from, both are unpacked in one version
/// ([`ensure_qemu`]).
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
];

/// Installs or unpacks what is missing for tests, after naming it. Neither these packages nor what they depend on, but for
/// Debian's base that is there already, bring a service; none that is there is removed.
pub(crate) fn ensure() -> anyhow::Result<()> {
    ensure_all(PEERS)?;
    ensure_unpacked()?;
    if let Err(error) = ensure_qemu() {
        println!("cannot be had here, and the tests that want it are skipped: {error:#}");
    }
    Ok(())
}

/// Programs of QEMU that tests run with its iscsi driver.
const QEMU: &[&str] = &["qemu-io", "qemu-img"];

/// QEMU with its iscsi driver: installed beside the QEMU that is here, or else both unpacked.
fn ensure_qemu() -> anyhow::Result<()> {
    let is_there = |name: &&str| program(name).is_absolute();
    if QEMU.iter().all(is_there) || ensure_all(WISHED).is_ok() {
        return Ok(());
    }
    let offered = apt_cache(&["show", "--no-all-versions", "qemu-block-extra"])?;
    let version = offered.lines().find_map(|line| line.strip_prefix("Version: ")).context("no version is offered")?;
    let pair = ["qemu-utils", "qemu-block-extra"].map(|package| format!("{package}={version}"));
    println!("unpacking below target/peers, since it does not go with the QEMU that is here: {}", pair.join(" "));
    // What the two need is here, with the QEMU of another version; the drivers of what is not are never loaded.
    extract(&pair)?;
    QEMU.iter().try_for_each(|program| wrap(program).with_context(|| format!("{program} of the package qemu-utils")))
}

/// Installs the packages of `peers` whose program is not on this machine.
pub(crate) fn ensure_all(peers: &[(&str, &str)]) -> anyhow::Result<()> {
    let missing = packages_of_missing(peers, is_installed);
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<&str> = missing.into_iter().collect();
    println!("missing, for tests to use as peers: {}", list.join(" "));
    if !is_root() {
        bail!("these Debian packages are missing: {}; install them, or run this as root", list.join(" "));
    }
    apt(&["update", "-q"])?;
    println!("installing with apt-get, with what they depend on: {}", with_dependencies(&list)?.join(" "));
    apt(&[&["install"][..], INSTALL, &list].concat())?;
    for (program, package) in peers {
        if !is_installed(program) {
            bail!("{program} is still missing after installing {package}");
        }
    }
    Ok(())
}

/// Unpacks the packages of [`UNPACKED`] whose program is neither on this machine nor unpacked yet.
pub(crate) fn ensure_unpacked() -> anyhow::Result<()> {
    let missing = packages_of_missing(UNPACKED, |name| program(name).is_absolute() || is_installed(name));
    if missing.is_empty() {
        return Ok(());
    }
    let list: Vec<&str> = missing.into_iter().collect();
    println!("missing, for tests to use as peers: {}", list.join(" "));
    // Without root the lists are taken as they are.
    if is_root() {
        apt(&["update", "-q"])?;
    }
    let all = with_dependencies(&list)?;
    println!("unpacking below target/peers, where nothing of them is started: {}", all.join(" "));
    extract(&all)?;
    for (program, package) in UNPACKED {
        wrap(program).with_context(|| format!("{program} of the package {package}"))?;
    }
    Ok(())
}

/// Fetches packages, each a name or `name=version`, and unpacks them below target/peers.
fn extract(names: &[String]) -> anyhow::Result<()> {
    let packages = peers().join("packages");
    let root = peers().join("root");
    std::fs::create_dir_all(&packages).with_context(|| format!("cannot make {}", packages.display()))?;
    run_quietly(Command::new("apt-get").arg("download").args(names).current_dir(&packages))?;
    for entry in std::fs::read_dir(&packages)? {
        run_quietly(Command::new("dpkg-deb").arg("--extract").arg(entry?.path()).arg(&root))?;
    }
    std::fs::remove_dir_all(&packages)?;
    Ok(())
}

/// Makes target/peers/bin/`program`, which runs what was unpacked, with the libraries that were unpacked with it.
fn wrap(program: &str) -> anyhow::Result<()> {
    let directories = ["usr/sbin", "usr/bin", "sbin", "bin"];
    let found = directories.iter().find(|directory| peers().join("root").join(directory).join(program).is_file());
    let directory = found.context("it is not where programs are")?;
    let libraries = format!("lib/{}-linux-gnu", std::env::consts::ARCH);
    let script = format!(
        "#!/bin/sh\nroot=$(dirname \"$0\")/../root\n\
         export LD_LIBRARY_PATH=\"$root/usr/{libraries}:$root/{libraries}\" QEMU_MODULE_DIR=\"$root/usr/{libraries}/qemu\"\n\
         exec \"$root/{directory}/{program}\" \"$@\"\n"
    );
    let path = peers().join("bin").join(program);
    std::fs::create_dir_all(peers().join("bin"))?;
    std::fs::write(&path, script)?;
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o755))?;
    Ok(())
}

/// Where peers are unpacked. Tests look here first: in target/peers/bin, two directories above their crate.
fn peers() -> PathBuf {
    crate::root().join("target/peers")
}

/// The unpacked program `name` by its path, or else its name, to be looked for on the PATH.
pub(crate) fn program(name: &str) -> PathBuf {
    let unpacked = peers().join("bin").join(name);
    if unpacked.is_file() { unpacked } else { PathBuf::from(name) }
}

fn packages_of_missing<'a>(peers: &[(&'a str, &'a str)], is_there: impl Fn(&str) -> bool) -> BTreeSet<&'a str> {
    peers.iter().filter(|(program, _)| !is_there(program)).map(|&(_, package)| package).collect()
}

/// Options of `apt-get install`, when it is done and when it is only asked what it would do.
const INSTALL: &[&str] = &["-y", "-q", "--no-install-recommends", "--no-remove"];

/// `packages` and what would be installed with them on this machine.
fn with_dependencies(packages: &[&str]) -> anyhow::Result<Vec<String>> {
    let plan = apt(&[&["install", "--simulate"][..], INSTALL, packages].concat())?;
    let names: Vec<String> = installed_by(&plan).map(str::to_owned).collect();
    if names.is_empty() {
        bail!("apt-get would install nothing for {}: they are installed, but not their programs", packages.join(" "));
    }
    Ok(names)
}

/// The packages that a plan of `apt-get --simulate` installs: lines `Inst NAME [OLD] (NEW …)`.
fn installed_by(plan: &str) -> impl Iterator<Item = &str> {
    plan.lines().filter_map(|line| line.strip_prefix("Inst ")?.split(' ').next())
}

fn is_installed(program: &str) -> bool {
    let path = std::env::var("PATH").unwrap_or_default();
    path.split(':').chain(["/usr/sbin", "/sbin"]).any(|dir| Path::new(dir).join(program).is_file())
}

fn is_root() -> bool {
    std::fs::metadata("/proc/self").is_ok_and(|meta| std::os::unix::fs::MetadataExt::uid(&meta) == 0)
}

/// Runs apt-get; gives what it printed.
fn apt(args: &[&str]) -> anyhow::Result<String> {
    let mut command = Command::new("apt-get");
    command.args(args).env("DEBIAN_FRONTEND", "noninteractive").env("LC_ALL", "C");
    run_quietly(&mut command).context("tests need Debian, or a system with the packages above")
}

/// What apt-cache knows of packages.
fn apt_cache(args: &[&str]) -> anyhow::Result<String> {
    run_quietly(Command::new("apt-cache").args(args).env("LC_ALL", "C"))
}

/// Runs `command`, which must succeed; gives what it printed.
fn run_quietly(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        let program = command.get_program().to_string_lossy();
        bail!("{program} ended with {}:\n{}", output.status, String::from_utf8_lossy(&output.stderr).trim_end());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_apt_would_install_is_named() {
        let plan = "Reading package lists...\nInst libaio1 (0.3.113-4 Debian:12.12/oldstable [amd64])\n\
                    Inst sg3-utils [1.45] (1.46-3 Debian:12.12/oldstable [amd64])\nConf libaio1 (0.3.113-4 …)\n";
        assert_eq!(installed_by(plan).collect::<Vec<_>>(), ["libaio1", "sg3-utils"]);
    }

    #[test]
    fn nothing_that_starts_a_service_is_installed() {
        for (_, package) in PEERS.iter().chain(WISHED).chain(BENCH_PEERS) {
            assert!(UNPACKED.iter().all(|(_, unpacked)| unpacked != package), "{package}");
        }
    }
}
