//! The main job: drain worker-1 and lose nothing.

use std::time::Duration;

use anyhow::{Context, ensure};

use super::client::{Load, Log, monotonic_ns};
use super::figures::{brownout_ms, longest_gap, read_phases};
use super::ledger::{self, Verdict};
use super::meter::Meter;
use super::report::{Move, Report};
use super::site::{ORDERS_PORT, TWIN_PORT};
use super::stage::{Drained, ORDERS, PREFIX, Stage, TWIN, VOLUME};
use super::{DemoArgs, Interrupt, oracle, say};
use crate::cli::Exit;
use crate::cli::output::bytes;

/// Writes, and reads, that are measured before and after each move: p99 then stands on a dozen samples.
const SAMPLES: u64 = 700;
/// The same for the machine without a volume, whose reads nobody compares.
const TWIN_SAMPLES: u64 = 200;
/// How long the client takes for them at most, unless it has hardly any.
const SAMPLE_PATIENCE: Duration = Duration::from_secs(4);

pub(crate) fn run(args: &DemoArgs, interrupt: &Interrupt) -> anyhow::Result<Exit> {
    let mut stage = Stage::set(args, interrupt)?;
    let volume = stage.create_volume(1, VOLUME)?;
    say(format_args!(
        "worker-1 has an encrypted volume of {} (LUKS2 header {}); the order service fills it",
        volume.geometry.size, volume.header_bytes
    ));
    stage.run_orders(1, ORDERS, Some(VOLUME))?;
    let mut report = Report { volume_bytes: volume.geometry.size.0, ..Report::default() };
    let (mut moves, mut stateless, mut log) = (Vec::new(), Vec::new(), Log::default());
    for round in 0..args.moves {
        // There and back again.
        let (from, to) = if round % 2 == 0 { (1, 2) } else { (2, 1) };
        stateless.push(move_twin(&mut stage, to, from)?);
        let (figures, seen) = move_orders(&mut stage, from, to, log.sent)?;
        moves.push(figures);
        log.append(seen);
        stage.uncordon(from)?;
        if round == 0 {
            report.source_header_bytes = volume.header_bytes.0;
            report.destination_header_bytes = stage.volume_status(to, VOLUME)?.header_bytes.0;
        }
    }
    let last = if args.moves % 2 == 1 { 2 } else { 1 };
    let verdict = check(&stage, last, ORDERS, &log)?;
    report.writes_acknowledged = verdict.acknowledged;
    report.writes_lost = verdict.lost;
    report.writes_duplicated = verdict.duplicated + verdict.invented;
    report.wrong_reads = log.wrong_reads;
    report.set_moves(&moves, &stateless);
    say("");
    say(report.text());
    for example in verdict.examples.iter().chain(&log.wrong_example) {
        say(format_args!("  ! {example}"));
    }
    super::deliver(args, &report)?;
    finish(stage)?;
    Ok(if report.is_clean() { Exit::Done } else { Exit::Error })
}

/// Moves the machine without a volume and gives its interruption in milliseconds.
fn move_twin(stage: &mut Stage<'_>, from: u32, to: u32) -> anyhow::Result<f64> {
    say(format_args!("first the same machine without a volume, worker-{from} to worker-{to}"));
    stage.run_orders(from, TWIN, None)?;
    stage.wait_reachable(TWIN_PORT)?;
    let load = stage.load(TWIN_PORT, 0)?;
    stage.wait_load(&load, TWIN_SAMPLES, SAMPLE_PATIENCE)?;
    let began = monotonic_ns();
    stage.drain(from, to, TWIN, "demo, stateless")?;
    let ended = monotonic_ns();
    stage.wait_load(&load, TWIN_SAMPLES, SAMPLE_PATIENCE)?;
    let log = load.finish()?;
    stage.remove_machine(to, TWIN)?;
    stage.uncordon(from)?;
    let gap = longest_gap(&log.acknowledged, began, ended).context("the client wrote nothing")?;
    say(format_args!("  interruption {:.0} ms", gap.millis()));
    Ok(gap.millis())
}

/// Moves the order service under load.
fn move_orders(stage: &mut Stage<'_>, from: u32, to: u32, first: u64) -> anyhow::Result<(Move, Log)> {
    say(format_args!("now the order service, worker-{from} to worker-{to}, with a client at worker-3"));
    let load = stage.orders_load(first)?;
    let started = monotonic_ns();
    stage.wait_load(&load, SAMPLES, SAMPLE_PATIENCE)?;
    let before = stage.volume_status(from, VOLUME)?;
    let device = before.device.clone().context("the volume of a running machine has a device")?;
    let mounted = stage.data(from, ORDERS)?;
    let used_bytes = oracle::used_bytes(&mounted, &device).context("measuring what is in use")?;
    say(format_args!(
        "  {} writes so far; {} of {} allocated are in use",
        load.acknowledged(),
        bytes(used_bytes),
        before.allocated
    ));
    let meter = Meter::start(stage.site.agent_pid(from))?;
    let began = monotonic_ns();
    let drained = stage.drain(from, to, ORDERS, "demo: the disk of worker-1 is dying")?;
    let ended = monotonic_ns();
    let carried = meter.finish()?;
    stage.wait_load(&load, SAMPLES, SAMPLE_PATIENCE)?;
    let log = finish_load(load)?;
    let gap = longest_gap(&log.acknowledged, began, ended).context("the client wrote nothing")?;
    let (p50, p99) = read_phases(&log.reads, started, gap, ended);
    let mut figures = steps(&drained);
    figures.interruption_ms = gap.millis();
    figures.used_bytes = used_bytes;
    figures.bytes_moved = carried.sent;
    figures.bytes_requested = carried.received;
    figures.discarded_bytes = before.allocated.0.saturating_sub(used_bytes);
    figures.read_p50_us = p50;
    figures.read_p99_us = p99;
    figures.brownout_ms = brownout_ms(&log.reads, gap, p99.before);
    Ok((figures, log))
}

fn finish_load(load: Load) -> anyhow::Result<Log> {
    let log = load.finish()?;
    ensure!(!log.acknowledged.is_empty(), "the client got no write acknowledged");
    Ok(log)
}

/// The steps' times as the workers took them.
fn steps(drained: &Drained) -> Move {
    let (source, destination) = (drained.source.timings, drained.destination.timings);
    let ms = |time: Option<u64>| time.unwrap_or(0) as f64;
    Move {
        stop_ms: ms(source.stop_ms),
        seal_ms: ms(source.seal_ms),
        grant_ms: ms(source.grant_ms),
        boot_ms: ms(destination.boot_ms),
        hydration_ms: ms(destination.hydration_ms),
        evacuated_ms: ms(drained.drain.evacuated_ms),
        drained_ms: ms(drained.drain.drained_ms),
        ..Move::default()
    }
}

/// Compares the client's ledger with the database of the machine where it runs now.
pub(crate) fn check(stage: &Stage<'_>, worker: u32, machine: &str, log: &Log) -> anyhow::Result<Verdict> {
    let directory = stage.args.ledger.clone().unwrap_or_else(|| stage.site.directory().join("ledger"));
    std::fs::create_dir_all(&directory).with_context(|| format!("making {}", directory.display()))?;
    let copy = directory.join(super::orders::DATABASE);
    let _ = std::fs::remove_file(&copy);
    ledger::copy_database(&stage.database(worker, machine)?, &copy)?;
    ledger::save(&directory.join("acknowledged.jsonl"), &log.acknowledged).context("writing the ledger")?;
    let rows = ledger::read_rows(&copy, PREFIX)?;
    say(format_args!("the database of worker-{worker} is whole; its {} orders of the client are compared", rows.len()));
    Ok(ledger::compare(&log.acknowledged, &rows, PREFIX, log.sent))
}

/// Removes the workers, or leaves them up and says how to use them.
pub(crate) fn finish(stage: Stage<'_>) -> anyhow::Result<()> {
    if !stage.args.keep {
        return Ok(());
    }
    let (site, run) = (&stage.site, stage.site.run().to_owned());
    let socket = site.worker(1).socket();
    say(format_args!(
        "\nThe workers stay up. To play:\n  \
         export DECANT_SOCKET={}\n  \
         {program} machine list\n  {program} volume list\n  {program} drain worker-2 --reason 'back again'\n  \
         nsenter --net={} curl -s 'http://[::1]:{ORDERS_PORT}/orders/1'\n\
         Files and logs are in {}. To remove it all:\n  {program} demo --clean {run}",
        socket.display(),
        site.lab().netns(3).display(),
        site.directory().display(),
        program = site.program().display(),
    ));
    stage.site.keep()
}
