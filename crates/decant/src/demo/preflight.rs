//! What the demo needs of this machine, found out before anything is made.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, bail};

use super::{DemoArgs, say};
use crate::cli::doctor::{Check, Verdict, checks, find_program};

/// Programs that the demo runs, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 2] = [("mkfs.ext4", "e2fsprogs"), ("dumpe2fs", "e2fsprogs")];
/// The smallest volume that the demo's file system, journal and orders fit.
const MIN_SIZE: u64 = 64 << 20;

/// Fails unless root runs this.
pub(crate) fn root() -> anyhow::Result<()> {
    if !rustix::process::geteuid().is_root() {
        bail!("not root: the demo makes namespaces, mounts and loop devices; run it with sudo");
    }
    Ok(())
}

/// Checks everything; installs missing programs where apt is.
pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<()> {
    root()?;
    if args.size.0 < MIN_SIZE || !args.size.0.is_multiple_of(4096) {
        bail!("--size {}: it must be a multiple of 4 KiB and at least {}", args.size, decant_base::Bytes(MIN_SIZE));
    }
    if args.used.0 > args.size.0 / 2 {
        bail!("--used {}: it must be at most half of --size {}", args.used, args.size);
    }
    std::fs::create_dir_all(&args.dir).with_context(|| format!("making {}", args.dir.display()))?;
    install_programs()?;
    let lacking: Vec<Check> = checks(&args.dir).into_iter().filter(|check| check.verdict == Verdict::Missing).collect();
    if !lacking.is_empty() {
        let lines: Vec<String> =
            lacking.iter().map(|check| format!("\n  {}: {}; {}", check.name, check.found, check.fix)).collect();
        bail!("this machine cannot run it:{}", lines.concat());
    }
    Ok(())
}

fn install_programs() -> anyhow::Result<()> {
    let mut packages: Vec<&str> =
        PROGRAMS.iter().filter(|(program, _)| find_program(program).is_none()).map(|(_, package)| *package).collect();
    packages.dedup();
    if packages.is_empty() {
        return Ok(());
    }
    let list = packages.join(" ");
    if !Path::new("/usr/bin/apt-get").exists() {
        bail!("missing: {list}; install them with this system's package manager");
    }
    say(format_args!("installing {list} with apt-get"));
    for arguments in
        [&["-qq", "update"][..], &[&["-qq", "-y", "--no-install-recommends", "install"][..], &packages].concat()]
    {
        let status = Command::new("/usr/bin/apt-get")
            .args(arguments)
            .env("DEBIAN_FRONTEND", "noninteractive")
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .status()
            .context("running apt-get")?;
        if !status.success() {
            bail!("apt-get {} failed ({status}); install {list} by hand", arguments.join(" "));
        }
    }
    Ok(())
}
