//! `decant doctor`: whether this machine can be a worker, and what to do where it cannot.

use std::fs::{File, OpenOptions};
use std::path::{Path, PathBuf};

use rustix::fs::FallocateFlags;
use serde::Serialize;

use super::output::{show, table, word};
use super::{Exit, Failure, Global};

/// `decant doctor`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Exit status: 0 all is there, 3 something needed is missing.")]
pub(crate) struct DoctorArgs {
    /// Where volumes are to be kept.
    #[arg(long, value_name = "DIR", default_value = "/var/lib")]
    state_dir: PathBuf,
}

/// How a check went.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub(crate) enum Verdict {
    /// As it should be.
    Ok,
    /// It works, with less.
    Limited,
    /// It does not work.
    Missing,
}

/// One check.
#[derive(Debug, Clone, Serialize)]
pub(crate) struct Check {
    pub(crate) name: &'static str,
    pub(crate) verdict: Verdict,
    /// What was found.
    pub(crate) found: String,
    /// What to do; empty if nothing.
    pub(crate) fix: String,
}

fn ok(name: &'static str, found: impl Into<String>) -> Check {
    Check { name, verdict: Verdict::Ok, found: found.into(), fix: String::new() }
}

fn limited(name: &'static str, found: impl Into<String>, fix: &str) -> Check {
    Check { name, verdict: Verdict::Limited, found: found.into(), fix: fix.to_owned() }
}

fn missing(name: &'static str, found: impl Into<String>, fix: &str) -> Check {
    Check { name, verdict: Verdict::Missing, found: found.into(), fix: fix.to_owned() }
}

pub(crate) fn run(args: &DoctorArgs, global: &Global) -> Result<Exit, Failure> {
    let checks = checks(&args.state_dir);
    show(global.output, &checks, |checks| {
        let row = |check: &Check| {
            let more = if check.fix.is_empty() { String::new() } else { format!("; {}", check.fix) };
            [check.name.to_owned(), word(&check.verdict), format!("{}{more}", check.found)]
        };
        table(["CHECK", "VERDICT", "FOUND"], checks.iter().map(row).collect(), "")
    });
    let fit = checks.iter().all(|check| check.verdict != Verdict::Missing);
    Ok(if fit { Exit::Done } else { Exit::Blocked })
}

/// Every check, in the order in which a person would fix them.
pub(crate) fn checks(state_dir: &Path) -> Vec<Check> {
    vec![
        root(),
        kernel(),
        fuse(),
        device("loop devices", "/dev/loop-control", "load the module: modprobe loop"),
        cgroup2(),
        namespaces(),
        io_flusher(),
        program("e2fsprogs", "mkfs.ext4", "apt-get install e2fsprogs", true),
        program("iproute2", "ip", "apt-get install iproute2; only people need it, to look around", false),
        sparse_files(state_dir),
        cipher(),
    ]
}

fn root() -> Check {
    if rustix::process::geteuid().is_root() { ok("root", "yes") } else { missing("root", "no", "run as root") }
}

fn kernel() -> Check {
    let uname = rustix::system::uname();
    let release = uname.release().to_string_lossy().into_owned();
    let mut numbers = release.split(|c: char| !c.is_ascii_digit()).map_while(|part| part.parse::<u32>().ok());
    let version = (numbers.next().unwrap_or(0), numbers.next().unwrap_or(0));
    if version >= (6, 9) {
        ok("kernel", format!("{release}: a volume process may die and come back unnoticed (FUSE_NOTIFY_RESEND)"))
    } else {
        let found = format!("{release}: a machine sees I/O errors if its volume process is killed");
        limited("kernel", found, "Linux 6.9 or later has FUSE_NOTIFY_RESEND")
    }
}

/// What to do without FUSE.
pub(crate) const FUSE_FIX: &str = "load the module: modprobe fuse; in a container, let it have /dev/fuse";

fn fuse() -> Check {
    match decant_agent::fuse() {
        Ok(()) => ok("fuse", format!("{} opens", decant_agent::FUSE)),
        Err(error) => missing("fuse", format!("{}: {error}", decant_agent::FUSE), FUSE_FIX),
    }
}

fn device(name: &'static str, path: &str, fix: &str) -> Check {
    match OpenOptions::new().read(true).write(true).open(path) {
        Ok(_) => ok(name, format!("{path} opens")),
        Err(error) => missing(name, format!("{path}: {error}"), fix),
    }
}

/// The cgroup2 mount of this mount namespace.
pub(crate) fn cgroup2_mount() -> Option<PathBuf> {
    let table = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
    cgroup2_in(&table)
}

/// The first cgroup2 mount of a mountinfo table (proc(5): the type follows a lone dash).
fn cgroup2_in(mountinfo: &str) -> Option<PathBuf> {
    mountinfo.lines().find_map(|line| {
        let (before, after) = line.split_once(" - ")?;
        if after.split(' ').next() != Some("cgroup2") {
            return None;
        }
        before.split(' ').nth(4).map(PathBuf::from)
    })
}

fn cgroup2() -> Check {
    let Some(mount) = cgroup2_mount() else {
        return missing("cgroup2", "not mounted", "mount -t cgroup2 none /sys/fs/cgroup/unified");
    };
    let at = mount.display();
    let controllers = std::fs::read_to_string(mount.join("cgroup.controllers")).unwrap_or_default();
    let absent: Vec<&str> = ["memory", "cpu", "pids"]
        .into_iter()
        .filter(|name| !controllers.split_whitespace().any(|c| c == *name))
        .collect();
    if absent.is_empty() {
        ok("cgroup2", format!("{at}, with limits"))
    } else {
        let found = format!("{at}, without limits of {}", absent.join(", "));
        limited("cgroup2", found, "boot with systemd.unified_cgroup_hierarchy=1 for limits; all else works")
    }
}

/// CAP_SYS_RESOURCE, number 24 (linux/capability.h), which containers and some virtual machines withhold from their root.
fn io_flusher() -> Check {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let effective = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = effective.and_then(|hex| u64::from_str_radix(hex.trim(), 16).ok());
    match effective {
        Some(bits) if bits >> 24 & 1 == 0 => limited(
            "CAP_SYS_RESOURCE",
            "withheld: if memory runs out, a volume process may wait for itself (PR_SET_IO_FLUSHER) or be chosen to end (oom_score_adj)",
            "give the agent the capability; with memory to spare all else works",
        ),
        _ => ok("CAP_SYS_RESOURCE", "volume processes are spared when memory runs out"),
    }
}

fn namespaces() -> Check {
    let absent: Vec<&str> = ["net", "mnt", "pid", "ipc", "uts"]
        .into_iter()
        .filter(|name| !Path::new("/proc/self/ns").join(name).exists())
        .collect();
    if !absent.is_empty() {
        return missing("namespaces", format!("no {}", absent.join(", ")), "use a kernel with namespaces");
    }
    if !Path::new("/proc/sys/net/ipv6").exists() {
        return missing("namespaces", "no IPv6", "boot without ipv6.disable=1");
    }
    ok("namespaces", "network, mount, PID, IPC, UTS; IPv6")
}

/// Where a program is, by PATH and where administration programs are kept.
pub(crate) fn find_program(name: &str) -> Option<PathBuf> {
    let path = std::env::var("PATH").unwrap_or_default();
    let places = path.split(':').chain(["/usr/sbin", "/sbin", "/usr/bin", "/bin"]);
    places.filter(|place| !place.is_empty()).map(|place| Path::new(place).join(name)).find(|program| program.is_file())
}

fn program(name: &'static str, program: &str, fix: &str, needed: bool) -> Check {
    match find_program(program) {
        Some(at) => ok(name, at.display().to_string()),
        None if needed => missing(name, format!("no {program}"), fix),
        None => limited(name, format!("no {program}"), fix),
    }
}

/// Whether files under `state_dir` can have holes punched: what a discard becomes.
fn sparse_files(state_dir: &Path) -> Check {
    let name = "sparse files";
    let at = state_dir.display();
    let fix = "keep volumes on ext4, xfs, btrfs or tmpfs; --state-dir names another place";
    let probe = state_dir.join(format!(".decant-doctor-{}", std::process::id()));
    let punched = File::create_new(&probe).and_then(|file| {
        file.set_len(8192)?;
        let mode = FallocateFlags::PUNCH_HOLE | FallocateFlags::KEEP_SIZE;
        Ok(rustix::fs::fallocate(&file, mode, 0, 4096)?)
    });
    let _ = std::fs::remove_file(&probe);
    match punched {
        Ok(()) => ok(name, format!("{at} punches holes")),
        Err(error) => missing(name, format!("{at}: {error}"), fix),
    }
}

fn cipher() -> Check {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let flags = info.lines().find(|line| line.starts_with("flags") || line.starts_with("Features")).unwrap_or_default();
    if flags.split_whitespace().any(|flag| flag == "aes") {
        ok("cipher", "AES in hardware")
    } else {
        limited(
            "cipher",
            "AES in software: volumes cost a lot of processor time",
            "use a processor with AES instructions",
        )
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_cgroup2_mount_is_found_among_others() {
        let table = "30 24 0:26 / /sys/fs/cgroup ro,nosuid - tmpfs tmpfs ro,mode=755\n\
            31 30 0:27 / /sys/fs/cgroup/unified rw,nosuid shared:10 - cgroup2 cgroup2 rw\n\
            32 30 0:28 / /sys/fs/cgroup/pids rw - cgroup cgroup rw,pids\n";
        assert_eq!(cgroup2_in(table), Some(PathBuf::from("/sys/fs/cgroup/unified")));
        assert_eq!(cgroup2_in("30 24 0:26 / / rw - ext4 /dev/vda rw"), None);
    }

    #[test]
    fn every_check_that_fails_says_what_to_do() {
        for check in checks(Path::new("/nonexistent")) {
            assert!(check.verdict == Verdict::Ok || !check.fix.is_empty(), "{check:?}");
        }
    }
}
