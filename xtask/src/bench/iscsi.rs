//! Our iSCSI target against tgt, and hydration over iSCSI beside NBD, near and far.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

use super::clone::{MIB, Ours, fill, flush, free_port};
use super::delay::Delay;
use super::spread::Spread;
use super::{Bench, Server, await_that, output};

const NAME: &str = "iqn.2026-11.dev.decant:bench";
/// One load of iscsi-perf: what it is called, its requests at a time, and the 512-byte blocks of each.
const LOADS: [(&str, &str, &str); 3] = [("4k, qd 1", "1", "8"), ("4k, qd 32", "32", "8"), ("256k, qd 8", "8", "512")];
/// Each lasts so long, seconds.
const SECONDS: u32 = 3;
/// Milliseconds.
const ROUND_TRIPS: [u64; 3] = [0, 5, 80];

/// A server of one file, and its process for the count of its CPU.
struct Target {
    server: Server,
    url: String,
}

impl Target {
    fn pid(&self) -> u32 {
        self.server.0.id()
    }

    /// What `decant export` prints first is where clients connect.
    fn ours(bench: &Bench, image: &Path, protocol: &str) -> anyhow::Result<(Self, u16)> {
        let port = free_port()?;
        let mut command = Command::new(&bench.decant);
        command.arg("export").arg(image).args([protocol, &format!("127.0.0.1:{port}"), "--read-only"]);
        let url = match protocol {
            "--iscsi" => {
                command.args(["--name", NAME]);
                format!("iscsi://127.0.0.1:{port}/{NAME}/0")
            }
            _ => format!("nbd://127.0.0.1:{port}/"),
        };
        let mut child =
            command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("starting decant export")?;
        let output = child.stdout.take().context("no output")?;
        let target = Self { server: Server(child), url };
        if !says_ready(BufReader::new(output))? {
            bail!("{command:?} did not say READY");
        }
        Ok((target, port))
    }

    fn tgt(image: &Path) -> anyhow::Result<Self> {
        std::fs::create_dir_all("/var/run/tgtd").context("where tgtd has its control socket")?;
        let port = free_port()?;
        // A control port of its own: another tgtd may run here.
        let control = (port % 30_000 + 100).to_string();
        let mut command = Command::new(crate::peers::program("tgtd"));
        command.args(["-f", "-C", &control, "--iscsi", &format!("portal=127.0.0.1:{port}")]).stderr(Stdio::null());
        let server = Server::start(&mut command)?;
        let ask = |arguments: &[&str]| {
            output(
                Command::new(crate::peers::program("tgtadm"))
                    .args(["-C", &control, "--lld", "iscsi", "--mode"])
                    .args(arguments),
            )
            .is_ok()
        };
        await_that("tgtd", || ask(&["target", "--op", "show"]))?;
        let image = image.to_str().context("a path that is no text")?;
        let made = ask(&["target", "--op", "new", "--tid", "1", "-T", NAME])
            && ask(&["logicalunit", "--op", "new", "--tid", "1", "--lun", "1", "-b", image])
            && ask(&["target", "--op", "bind", "--tid", "1", "-I", "ALL"]);
        if !made {
            bail!("tgtadm cannot make a target");
        }
        Ok(Self { server, url: format!("iscsi://127.0.0.1:{port}/{NAME}/1") })
    }
}

fn says_ready(output: impl BufRead) -> anyhow::Result<bool> {
    for line in output.lines() {
        if line?.contains("READY") {
            return Ok(true);
        }
    }
    Ok(false)
}

/// CPU seconds that a process has used.
fn cpu_seconds(pid: u32) -> anyhow::Result<f64> {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat"))?;
    let fields: Vec<&str> = stat.rsplit_once(')').context("stat")?.1.split_whitespace().collect();
    let ticks = |at: usize| fields.get(at).and_then(|field| field.parse::<f64>().ok()).context("stat");
    // utime and stime, in USER_HZ, which is 100 (proc_pid_stat(5)).
    Ok((ticks(11)? + ticks(12)?) / 100.0)
}

/// What a target made of one load: requests per second, and its CPU seconds per GB.
fn perf(target: &Target, depth: &str, blocks: &str) -> anyhow::Result<(f64, f64)> {
    let before = cpu_seconds(target.pid())?;
    let mut command = Command::new("iscsi-perf");
    command.args(["-m", depth, "-b", blocks, "-t", &SECONDS.to_string(), &target.url]);
    let printed = output(&mut command)?;
    let cpu = cpu_seconds(target.pid())? - before;
    let average = printed.rsplit("iops average ").next().and_then(|rest| rest.split_whitespace().next());
    let iops: f64 =
        average.and_then(|text| text.parse().ok()).with_context(|| format!("iscsi-perf printed {printed}"))?;
    let gigabytes = iops * f64::from(SECONDS) * blocks.parse::<f64>()? * 512.0 / 1e9;
    Ok((iops, cpu / gigabytes))
}

/// Both targets, in turn, under each load.
pub(super) fn targets(bench: &Bench) -> anyhow::Result<String> {
    let image = bench.path("iscsi-disk");
    fill(&image, 256 * MIB)?;
    let (ours, _) = Target::ours(bench, &image, "--iscsi")?;
    let tgt = Target::tgt(&image)?;
    let mut rows = String::new();
    for (load, depth, blocks) in LOADS {
        let mut spreads: [Spread; 4] = Default::default();
        for _ in 0..bench.rounds {
            for (target, at) in [(&ours, 0), (&tgt, 2)] {
                let (iops, cpu) = perf(target, depth, blocks)?;
                spreads[at].push(iops);
                spreads[at + 1].push(cpu);
            }
        }
        let [ours, ours_cpu, tgt, tgt_cpu] = &spreads;
        let ratio = tgt.median() / ours.median();
        rows += &format!("| {load} | {ours} | {tgt} | {ratio:.2} | {ours_cpu} | {tgt_cpu} |\n");
    }
    Ok(format!(
        "`decant export --iscsi` against tgt, sequential reads of a file in the page cache with iscsi-perf on loopback, {SECONDS} s each, \
         {} rounds interleaved: median (lowest–highest).\n\n\
         | | decant, requests/s | tgt, requests/s | tgt against ours | decant, CPU s/GB | tgt, CPU s/GB |\n\
         |---|---|---|---|---|---|\n{rows}",
        bench.rounds
    ))
}

/// 1 GiB over each protocol from the same file, at several distances.
pub(super) fn hydration(bench: &Bench) -> anyhow::Result<String> {
    let size = 1024 * MIB;
    let image = bench.path(&format!("origin-{size}"));
    if !image.exists() {
        fill(&image, size)?;
    }
    let (_iscsi, iscsi_port) = Target::ours(bench, &image, "--iscsi")?;
    let (_nbd, nbd_port) = Target::ours(bench, &image, "--nbd")?;
    let mut rows = String::new();
    for round_trip in ROUND_TRIPS {
        let one_way = Duration::from_micros(round_trip * 500);
        let (iscsi_link, nbd_link) = (Delay::start(iscsi_port, one_way)?, Delay::start(nbd_port, one_way)?);
        let (mut iscsi, mut nbd) = (Spread::default(), Spread::default());
        for _ in 0..bench.rounds {
            iscsi.push(rate(bench, &format!("iscsi://127.0.0.1:{}/{NAME}/0", iscsi_link.port()), size)?);
            nbd.push(rate(bench, &format!("nbd://127.0.0.1:{}/", nbd_link.port()), size)?);
        }
        rows += &format!("| {round_trip} ms | {iscsi} | {nbd} | {:.2} |\n", nbd.median() / iscsi.median());
    }
    Ok(format!(
        "Hydration of 1 GiB without zeros from `decant export` of one file, through a proxy that delays each direction by half of the \
         round trip, from start to the last block here and flushed, {} rounds interleaved: median MiB/s (lowest–highest).\n\n\
         | round trip | iscsi:// | nbd:// | nbd against iscsi |\n|---|---|---|---|\n{rows}",
        bench.rounds
    ))
}

/// MiB/s of a fresh clone of `origin`.
fn rate(bench: &Bench, origin: &str, size: u64) -> anyhow::Result<f64> {
    let began = Instant::now();
    let clone = Ours::start(bench, origin, "on")?;
    while clone.missing()? > 0 {
        std::thread::sleep(Duration::from_millis(5));
    }
    flush(&clone.uri())?;
    Ok((size / MIB) as f64 / began.elapsed().as_secs_f64())
}
