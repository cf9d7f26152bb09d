//! The figures of BENCHMARKS.md: ours and each peer on the same work, in the same run, interleaved; medians with spread.

mod clone;
mod delay;
mod demo;
mod iscsi;
mod spread;

use std::path::PathBuf;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// What to measure.
#[derive(clap::Args)]
pub(crate) struct Options {
    /// Which figures; all of them unless said.
    #[arg(value_enum)]
    what: Vec<What>,
    /// How often each contender runs.
    #[arg(long, default_value_t = 5, value_parser = clap::value_parser!(u32).range(1..=100))]
    rounds: u32,
    /// Replace the sections of BENCHMARKS.md that were measured.
    #[arg(long)]
    write: bool,
}

#[derive(Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
enum What {
    /// Reads of 4 KiB, one at a time, through a fresh clone, against nbdkit's cow filter.
    Reads,
    /// Hydration of 1 GiB, against QEMU's block-stream.
    Hydration,
    /// Our iSCSI target against tgt, and hydration over iSCSI beside NBD at several distances.
    Iscsi,
    /// The demo's figures: interruption, bytes moved, brownout.
    Demo,
}

/// Builds the release binary, installs the peers and measures.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    crate::peers::ensure_all(crate::peers::BENCH_PEERS)?;
    crate::peers::ensure_unpacked()?;
    crate::run(crate::cargo().args(["build", "--release", "--locked", "--package", "decant"]))?;
    let bench = Bench { decant: target().join("release/decant"), rounds: options.rounds, scratch: scratch()? };
    let wanted = |what| options.what.is_empty() || options.what.contains(&what);
    let mut sections = Vec::new();
    if wanted(What::Reads) {
        sections.push(("reads", clone::reads(&bench)?));
    }
    if wanted(What::Hydration) {
        sections.push(("hydration", clone::hydration(&bench)?));
    }
    if wanted(What::Iscsi) {
        sections.push(("iscsi", format!("{}\n{}", iscsi::targets(&bench)?, iscsi::hydration(&bench)?)));
    }
    if wanted(What::Demo) {
        sections.push(("demo", demo::figures(&bench)?));
    }
    for (name, text) in &sections {
        println!("{text}");
        if options.write {
            replace_section(name, text)?;
        }
    }
    Ok(())
}

/// What every measurement needs.
struct Bench {
    decant: PathBuf,
    rounds: u32,
    scratch: tempfile::TempDir,
}

impl Bench {
    fn path(&self, name: &str) -> PathBuf {
        self.scratch.path().join(name)
    }
}

fn target() -> PathBuf {
    std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| crate::root().join("target"), PathBuf::from)
}

/// On a disk, not in memory: /tmp may be a tmpfs.
fn scratch() -> anyhow::Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix("decant-bench-")
        .tempdir_in("/var/tmp")
        .context("cannot make a directory in /var/tmp")
}

/// A program that is ended with its owner.
struct Server(Child);

impl Server {
    fn start(command: &mut Command) -> anyhow::Result<Self> {
        let child = command.stdin(Stdio::null()).stdout(Stdio::null()).spawn();
        Ok(Self(child.with_context(|| format!("cannot start {command:?}"))?))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits for `ready`, for at most 20 s.
fn await_that(what: &str, mut ready: impl FnMut() -> bool) -> anyhow::Result<()> {
    let end = Instant::now() + Duration::from_secs(20);
    while !ready() {
        if Instant::now() > end {
            bail!("{what} took more than 20 s");
        }
        std::thread::sleep(Duration::from_millis(1));
    }
    Ok(())
}

fn output(command: &mut Command) -> anyhow::Result<String> {
    let output = command.output().with_context(|| format!("cannot start {command:?}"))?;
    if !output.status.success() {
        bail!("{command:?} ended with {}: {}", output.status, String::from_utf8_lossy(&output.stderr));
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Replaces what stands between the markers of section `name`.
fn replace_section(name: &str, text: &str) -> anyhow::Result<()> {
    let path = crate::root().join("BENCHMARKS.md");
    let page = std::fs::read_to_string(&path).context("BENCHMARKS.md")?;
    let (open, close) = (format!("<!-- {name} -->\n"), format!("<!-- end of {name} -->"));
    let start = page.find(&open).with_context(|| format!("BENCHMARKS.md has no {open}"))? + open.len();
    let end = page.find(&close).with_context(|| format!("BENCHMARKS.md has no {close}"))?;
    std::fs::write(&path, format!("{}{text}{}", &page[..start], &page[end..]))?;
    Ok(())
}
