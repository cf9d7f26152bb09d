//! What the demo needs of this machine, found out before anything is made.

use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::Context;
use decant_api::{Code, ErrorBody};

use super::{DemoArgs, say};
use crate::cli::doctor::{Check, Verdict, checks, find_program};

/// Programs that the demo runs, and the Debian packages that have them.
const PROGRAMS: [(&str, &str); 2] = [("mkfs.ext4", "e2fsprogs"), ("dumpe2fs", "e2fsprogs")];
/// The smallest volume that the demo's file system, journal and orders fit.
const MIN_SIZE: u64 = 64 << 20;

/// Fails unless root runs this.
pub(crate) fn root() -> anyhow::Result<()> {
    let uid = rustix::process::geteuid();
    if !uid.is_root() {
        let cause = format!("this is user {}, and the demo makes namespaces, mounts and loop devices", uid.as_raw());
        return Err(unfit("not root", cause, "run it as root"));
    }
    Ok(())
}

/// What is missing here, with what to do.
fn unfit(name: &str, cause: impl Into<String>, fix: impl Into<String>) -> anyhow::Error {
    ErrorBody::new(Code::Unavailable, name, cause, fix).into()
}

fn misused(cause: String) -> anyhow::Error {
    ErrorBody::new(Code::InvalidRequest, "sizes do not fit", cause, "see `decant demo --help`").into()
}

/// Checks everything; installs missing programs where apt is.
pub(crate) fn run(args: &DemoArgs) -> anyhow::Result<()> {
    root()?;
    if args.size.0 < MIN_SIZE || !args.size.0.is_multiple_of(4096) {
        let least = decant_base::Bytes(MIN_SIZE);
        return Err(misused(format!("--size {} must be a multiple of 4 KiB and at least {least}", args.size)));
    }
    if args.used.0 > args.size.0 / 2 {
        return Err(misused(format!("--used {} must be at most half of --size {}", args.used, args.size)));
    }
    std::fs::create_dir_all(&args.dir).with_context(|| format!("making {}", args.dir.display()))?;
    install_programs()?;
    let lacking: Vec<Check> = checks(&args.dir).into_iter().filter(|check| check.verdict == Verdict::Missing).collect();
    if !lacking.is_empty() {
        let of = |part: fn(&Check) -> String| lacking.iter().map(part).collect::<Vec<_>>().join("; ");
        let cause = of(|check| format!("{}: {}", check.name, check.found));
        return Err(unfit("this machine cannot run it", cause, of(|check| check.fix.clone())));
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
        let fix = "install them with this system's package manager";
        return Err(unfit("programs are missing", format!("there is no apt-get to install {list}"), fix));
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
            let cause = format!("apt-get {} failed ({status})", arguments.join(" "));
            return Err(unfit("programs are missing", cause, format!("install {list} by hand")));
        }
    }
    Ok(())
}
