//! Losing a worker for good while blocks are still on their way.

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use decant_api::{
    Listing, Machine, MachineState, Migration, MigrationPhase, MigrationSettings, MoveMachine, RecoveryPoint, Scope,
    Volume, path,
};
use decant_base::{Bytes, MigrationId};
use decant_dataplane::{CloneStatus, MissingPolicy};
use serde::Serialize;

use super::client::{Load, Log, monotonic_ns};
use super::figures::longest_gap;
use super::stage::{ORDERS, Stage, VOLUME, machine_id, refused};
use super::{DemoArgs, Interrupt, main_job, say};
use crate::cli::Exit;
use crate::cli::output::{bytes, moment};

/// Slow enough that most of the volume is still at the source when the worker is lost.
const RATE: Bytes = Bytes::mib(8);
/// How long each policy is watched.
const WATCH: Duration = Duration::from_secs(2);
/// How long anything may take that should come soon.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long the destination may take to notice that its origin is gone.
const SILENCE: Duration = Duration::from_secs(60);
/// Writes that the client gets acknowledged before and after the move.
const SAMPLES: u64 = 200;
/// Missing ranges that people are shown.
const SHOWN: usize = 3;
/// Missing blocks that are read directly from the device.
const PROBES: usize = 64;
const BLOCK: u64 = decant_base::BLOCK;

/// What one policy did with missing blocks.
#[derive(Debug, Clone, Serialize)]
struct Case {
    policy: &'static str,
    /// The machine's state as the API names it.
    machine: MachineState,
    /// Bytes that are nowhere any more.
    missing_bytes: u64,
    /// Where they are in the volume: runs of missing blocks, the first 1,000 of them.
    missing_ranges: Vec<Range>,
    /// Missing blocks that a read returned as anything at all. Must be 0.
    zero_reads: u64,
    /// Direct reads of missing blocks that were tried.
    probed: u64,
    /// Of these, those that waited.
    waited: u64,
    /// Of these, those that failed with an error.
    failed: u64,
    /// Writes that the service acknowledged meanwhile.
    writes_acknowledged: u64,
}

/// A run of bytes of the volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
struct Range {
    start: u64,
    bytes: u64,
}

/// The report of `--lose-source`.
#[derive(Debug, Serialize)]
struct SourceLost {
    missing_bytes: u64,
    /// The same of the last case: what is lost for good.
    missing_ranges: Vec<Range>,
    zero_reads: u64,
    policy: &'static str,
    cases: Vec<Case>,
    /// Whether the machine could be stopped while blocks were missing.
    stopped: bool,
    /// Whether it could be removed then, by the operator's word that its source is destroyed.
    removed: bool,
}

/// `--lose-source`.
pub(crate) fn source(args: &DemoArgs, interrupt: &Interrupt) -> anyhow::Result<Exit> {
    let mut stage = Stage::set(args, interrupt)?;
    let (load, migration) = half_moved(&stage)?;
    say("worker-1 burns down: cut off, killed, its files removed");
    stage.site.lose(1)?;
    let (case, waiting) = wait_case(&stage, &load)?;
    say(case.text());
    let mut cases = vec![case];
    set(&stage, &migration, MigrationSettings { policy: Some(MissingPolicy::Eio), ..Default::default() })?;
    cases.push(eio_case(&stage, &load, waiting)?);
    say(cases[1].text());
    let began = Instant::now();
    stage.stop_machine(2, ORDERS).context("stopping a machine with missing blocks")?;
    say(format_args!("the machine could be stopped, in {} ms", began.elapsed().as_millis()));
    let removed = give_up(&stage)?;
    let log = load.finish()?;
    let wrong: u64 = cases.iter().map(|case| case.zero_reads).sum::<u64>() + log.wrong_reads;
    let report = SourceLost {
        missing_bytes: cases.iter().map(|case| case.missing_bytes).max().unwrap_or(0),
        missing_ranges: cases.last().map(|case| case.missing_ranges.clone()).unwrap_or_default(),
        zero_reads: wrong,
        policy: "wait, then eio",
        cases,
        stopped: true,
        removed,
    };
    super::deliver(args, &report)?;
    let has_probed = |case: &Case| case.missing_bytes > 0 && !case.missing_ranges.is_empty() && case.probed > 0;
    let good = wrong == 0
        && report.removed
        && report.cases.iter().all(has_probed)
        && report.cases.iter().all(|case| case.machine == MachineState::Running)
        && report.cases[0].waited == report.cases[0].probed
        && report.cases[1].failed == report.cases[1].probed;
    say(if good { "\nResult: no missing block was invented" } else { "\nResult: NOT AS PROMISED" });
    if let Some(example) = log.wrong_example {
        say(format_args!("  ! {example}"));
    }
    main_job::finish(stage)?;
    Ok(if good { Exit::Done } else { Exit::Error })
}

impl Case {
    fn text(&self) -> String {
        format!(
            "policy {}: the machine is {}; {} in {} ranges are missing ({}); of {} direct reads of missing blocks {} waited, {} failed, \
             {} returned something; {} writes were acknowledged meanwhile",
            self.policy,
            crate::cli::output::word(&self.machine),
            bytes(self.missing_bytes),
            self.missing_ranges.len(),
            first_of(&self.missing_ranges),
            self.probed,
            self.waited,
            self.failed,
            self.zero_reads,
            self.writes_acknowledged
        )
    }
}

/// The first few ranges, for people.
fn first_of(ranges: &[Range]) -> String {
    let shown = ranges.iter().take(SHOWN).map(|range| format!("{} at {}", bytes(range.bytes), range.start));
    let more = ranges.len().saturating_sub(SHOWN);
    let more = (more > 0).then(|| format!("{more} more"));
    shown.chain(more).collect::<Vec<_>>().join(", ")
}

/// Removes the machine that never gets whole any more; whether that worked, and only by force.
fn give_up(stage: &Stage<'_>) -> anyhow::Result<bool> {
    let worker = stage.site.worker(2);
    let remove = |force: bool| {
        say(format_args!("$ decant machine rm {ORDERS} --with-volume{}", if force { " --force" } else { "" }));
        let mut command = Command::new(stage.site.program());
        command.arg("--socket").arg(worker.socket()).args(["machine", "rm", ORDERS, "--with-volume"]);
        command.args(force.then_some("--force"));
        super::say_there(&mut command)?.status().context("running decant machine rm")
    };
    if remove(false)?.success() || !remove(true)?.success() {
        return Ok(false);
    }
    let deadline = Instant::now() + PATIENCE;
    loop {
        let machines: Listing<Machine> =
            worker.agent().get(&path::machines(Scope::Local)).map_err(refused("listing machines"))?;
        let volumes: Listing<Volume> =
            worker.agent().get(&path::volumes(Scope::Local)).map_err(refused("listing volumes"))?;
        if machines.items.is_empty() && volumes.items.is_empty() {
            say("the machine could be removed, and nothing of it is left");
            return Ok(true);
        }
        if Instant::now() > deadline {
            let why = machines.items.first().and_then(|machine| machine.why.clone());
            say(format_args!("the machine is not removed after {PATIENCE:?}: {why:?}"));
            return Ok(false);
        }
        stage.interrupt.sleep(Duration::from_millis(20))?;
    }
}

/// Starts everything and moves the machine so far that it serves at worker-2 while most blocks are at worker-1.
fn half_moved(stage: &Stage<'_>) -> anyhow::Result<(Load, MigrationId)> {
    stage.create_volume(1, VOLUME)?;
    stage.run_orders(1, ORDERS, Some(VOLUME))?;
    let load = stage.orders_load(0)?;
    stage.wait_load(&load, SAMPLES, PATIENCE)?;
    say(format_args!("the order service moves from worker-1 to worker-2, its volume filling at {RATE}/s"));
    let request = MoveMachine {
        to: Some(stage.site.worker(2).name.clone()),
        reason: "demo: a worker will be lost".to_owned(),
        protocol: stage.args.protocol,
        ..MoveMachine::default()
    };
    let at = path::machine_action(&machine_id(ORDERS), "move");
    let moving: Migration = stage.site.worker(1).agent().post(&at, &request).map_err(refused("moving the machine"))?;
    slow_down(stage, &moving.migration)?;
    let mut agent = stage.site.worker(2).agent();
    let deadline = Instant::now() + PATIENCE;
    loop {
        let seen: Migration =
            agent.get(&path::migration(&moving.migration)).map_err(refused("looking at the migration"))?;
        if seen.phase >= MigrationPhase::Hydrating {
            ensure!(seen.phase == MigrationPhase::Hydrating, "the move is {:?} already: {:?}", seen.phase, seen.why);
            break;
        }
        ensure!(Instant::now() < deadline, "the move does not get anywhere: {:?} {:?}", seen.phase, seen.why);
        stage.interrupt.sleep(Duration::from_millis(5))?;
    }
    let writes = load.acknowledged() + SAMPLES;
    while load.acknowledged() < writes {
        ensure!(Instant::now() < deadline, "the client is not served at worker-2");
        stage.interrupt.sleep(Duration::from_millis(5))?;
    }
    Ok((load, moving.migration))
}

/// Limits the rate as soon as the destination knows the migration.
fn slow_down(stage: &Stage<'_>, migration: &MigrationId) -> anyhow::Result<()> {
    let settings = MigrationSettings { rate: Some(RATE), ..MigrationSettings::default() };
    let deadline = Instant::now() + PATIENCE;
    loop {
        match set(stage, migration, settings) {
            Ok(()) => return Ok(()),
            Err(error) if Instant::now() > deadline => return Err(error),
            Err(_) => stage.interrupt.sleep(Duration::from_millis(2))?,
        }
    }
}

fn set(stage: &Stage<'_>, migration: &MigrationId, settings: MigrationSettings) -> anyhow::Result<()> {
    let mut agent = stage.site.worker(2).agent();
    let _: Migration =
        agent.post(&path::migration_settings(migration), &settings).map_err(refused("changing the migration"))?;
    Ok(())
}

fn machine_state(stage: &Stage<'_>) -> anyhow::Result<MachineState> {
    let mut agent = stage.site.worker(2).agent();
    let seen: Machine = agent.get(&path::machine(&machine_id(ORDERS))).map_err(refused("looking at the machine"))?;
    Ok(seen.state)
}

fn clone_status(stage: &Stage<'_>) -> anyhow::Result<(CloneStatus, std::path::PathBuf)> {
    let status = stage.volume_status(2, VOLUME)?;
    let device = status.device.context("the volume has no device")?;
    Ok((status.clone.context("the volume is no clone any more: it filled before the loss")?, device))
}

/// Missing blocks, spread over all of the missing ranges.
fn probes(clone: &CloneStatus) -> Vec<u64> {
    let ranges: Vec<_> = clone.missing.iter().collect();
    let step = ranges.len().div_ceil(PROBES).max(1);
    // Offsets of missing ranges are bytes; the middle of a range is as missing as its ends.
    ranges.iter().step_by(step).map(|range| (range.start + range.length / 2) / BLOCK * BLOCK).collect()
}

/// One direct read of a block by a process of its own, which may wait for ever.
fn read_block(device: &Path, offset: u64) -> anyhow::Result<Child> {
    let child = Command::new("dd")
        .arg(format!("if={}", device.display()))
        .args(["of=/dev/null", "iflag=direct", "bs=4096", "count=1"])
        .arg(format!("skip={}", offset / BLOCK))
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn();
    child.context("running dd")
}

/// Under `wait`, a read of a missing block neither returns nor fails. The reads are left waiting for the next case: the
/// kernel lets nobody give up a direct read.
fn wait_case(stage: &Stage<'_>, load: &Load) -> anyhow::Result<(Case, Vec<Child>)> {
    let written = load.acknowledged();
    stage.interrupt.sleep(WATCH)?;
    let (clone, device) = clone_status(stage)?;
    // A few: each waiting read holds one of the loop device's tags.
    let offsets: Vec<u64> = probes(&clone).into_iter().step_by(8).take(8).collect();
    let readers = offsets.iter().map(|offset| read_block(&device, *offset)).collect::<Result<Vec<_>, _>>()?;
    stage.interrupt.sleep(WATCH)?;
    let mut tally = Tally { probed: readers.len() as u64, ..Tally::default() };
    let mut waiting = Vec::new();
    for mut reader in readers {
        match reader.try_wait()? {
            None => {
                tally.waited += 1;
                waiting.push(reader);
            }
            Some(status) => tally.count(status),
        }
    }
    Ok((case(stage, "wait", &clone, &tally, load.acknowledged() - written)?, waiting))
}

/// Waits until the destination knows that its origin does not answer: a connection that was cut says nothing, so this takes
/// as long as the origin may be silent.
fn wait_disconnected(stage: &Stage<'_>) -> anyhow::Result<()> {
    let deadline = Instant::now() + SILENCE;
    while clone_status(stage)?.0.connected {
        ensure!(Instant::now() < deadline, "the destination does not notice that its origin is gone");
        stage.interrupt.sleep(Duration::from_millis(50))?;
    }
    Ok(())
}

/// Under `eio`, a read of a missing block fails, and so do those that waited.
fn eio_case(stage: &Stage<'_>, load: &Load, mut readers: Vec<Child>) -> anyhow::Result<Case> {
    wait_disconnected(stage)?;
    let written = load.acknowledged();
    let (clone, device) = clone_status(stage)?;
    for offset in probes(&clone) {
        readers.push(read_block(&device, offset)?);
    }
    let mut tally = Tally { probed: readers.len() as u64, ..Tally::default() };
    let deadline = Instant::now() + WATCH + WATCH;
    for mut reader in readers {
        loop {
            match reader.try_wait()? {
                Some(status) => break tally.count(status),
                None if Instant::now() > deadline => break tally.waited += 1,
                None => stage.interrupt.sleep(Duration::from_millis(2))?,
            }
        }
    }
    case(stage, "eio", &clone, &tally, load.acknowledged() - written)
}

/// How direct reads of missing blocks went.
#[derive(Debug, Default)]
struct Tally {
    probed: u64,
    waited: u64,
    failed: u64,
    returned: u64,
}

impl Tally {
    fn count(&mut self, status: std::process::ExitStatus) {
        if status.success() {
            self.returned += 1;
        } else {
            self.failed += 1;
        }
    }
}

fn case(
    stage: &Stage<'_>,
    policy: &'static str,
    clone: &CloneStatus,
    tally: &Tally,
    written: u64,
) -> anyhow::Result<Case> {
    Ok(Case {
        policy,
        machine: machine_state(stage)?,
        missing_bytes: clone.bytes_missing,
        missing_ranges: clone.missing.iter().map(|range| Range { start: range.start, bytes: range.length }).collect(),
        zero_reads: tally.returned,
        probed: tally.probed,
        waited: tally.waited,
        failed: tally.failed,
        writes_acknowledged: written,
    })
}

/// The report of `--lose-destination`.
#[derive(Debug, Serialize)]
struct DestinationLost {
    /// What the API stated before the loss: the moment of the seal.
    recovery_point_at_ms: u64,
    writes_acknowledged: u64,
    /// Acknowledged at the destination, after the seal: what the operator gave up.
    writes_lost: u64,
    /// Lost although acknowledged before the seal. Must be 0.
    writes_lost_before_seal: u64,
    writes_duplicated: u64,
    wrong_reads: u64,
}

/// `--lose-destination`.
pub(crate) fn destination(args: &DemoArgs, interrupt: &Interrupt) -> anyhow::Result<Exit> {
    let mut stage = Stage::set(args, interrupt)?;
    let began = monotonic_ns();
    let (load, _) = half_moved(&stage)?;
    let recovery_point_at_ms = recovery_point(&stage)?;
    say("worker-2 burns down: cut off, killed, its files removed");
    let lost_at = monotonic_ns();
    stage.site.lose(2)?;
    let refused = reclaim(&stage, false)?;
    ensure!(!refused.success(), "reclaim without --force must be refused");
    let forced = reclaim(&stage, true)?;
    ensure!(forced.success(), "reclaim --force ended with {forced}\n{}", stage.site.log_tail(1, "agent", 15));
    stage.wait_running(1, ORDERS)?;
    stage.wait_load(&load, SAMPLES, PATIENCE)?;
    let log = load.finish()?;
    let verdict = main_job::check(&stage, 1, ORDERS, &log)?;
    let before_seal = lost_before_seal(&stage, &log, began, lost_at)?;
    let report = DestinationLost {
        recovery_point_at_ms,
        writes_acknowledged: verdict.acknowledged,
        writes_lost: verdict.lost,
        writes_lost_before_seal: before_seal,
        writes_duplicated: verdict.duplicated + verdict.invented,
        wrong_reads: log.wrong_reads,
    };
    super::deliver(args, &report)?;
    let good = before_seal == 0 && report.writes_duplicated == 0 && report.wrong_reads == 0 && report.writes_lost > 0;
    say(format_args!(
        "\nResult: {} writes acknowledged; {} lost, all written after the seal: {}; {} of those before it lost",
        report.writes_acknowledged,
        report.writes_lost,
        if before_seal == 0 { "yes" } else { "NO" },
        before_seal
    ));
    main_job::finish(stage)?;
    Ok(if good { Exit::Done } else { Exit::Error })
}

/// What the source says could be brought back.
fn recovery_point(stage: &Stage<'_>) -> anyhow::Result<u64> {
    let mut agent = stage.site.worker(1).agent();
    let seen: Machine = agent.get(&path::machine(&machine_id(ORDERS))).map_err(refused("looking at the machine"))?;
    match seen.recovery_point {
        Some(RecoveryPoint::SealedCopy { worker, sealed_at_ms, .. }) => {
            say(format_args!("recovery point: the sealed copy on {worker}, as of {}", moment(sealed_at_ms)));
            Ok(sealed_at_ms)
        }
        other => anyhow::bail!("a machine half moved must have a sealed copy to go back to, not {other:?}"),
    }
}

fn reclaim(stage: &Stage<'_>, force: bool) -> anyhow::Result<std::process::ExitStatus> {
    say(format_args!("$ decant machine reclaim {ORDERS}{}", if force { " --force" } else { "" }));
    let mut command = Command::new(stage.site.program());
    command.arg("--socket").arg(stage.site.worker(1).socket()).args(["machine", "reclaim", ORDERS]);
    command.args(force.then_some("--force"));
    super::say_there(&mut command)?.status().context("running decant machine reclaim")
}

/// Acknowledged before the machine stopped at the source, and not in its database.
fn lost_before_seal(stage: &Stage<'_>, log: &Log, began: u64, lost_at: u64) -> anyhow::Result<u64> {
    let gap = longest_gap(&log.acknowledged, began, lost_at).context("the client saw no move")?;
    // The longest gap may be the one after the loss; the move's is the longest that ended before it.
    let before: Vec<_> = log.acknowledged.iter().filter(|write| write.acknowledged_ns <= lost_at).cloned().collect();
    let gap = longest_gap(&before, began, lost_at).unwrap_or(gap);
    let early: Vec<_> = before.into_iter().filter(|write| write.acknowledged_ns <= gap.from_ns).collect();
    let rows = super::ledger::read_rows(&ledger_copy(stage), super::stage::PREFIX)?;
    Ok(super::ledger::compare(&early, &rows, super::stage::PREFIX, log.sent).lost)
}

fn ledger_copy(stage: &Stage<'_>) -> std::path::PathBuf {
    let directory = stage.args.ledger.clone().unwrap_or_else(|| stage.site.directory().join("ledger"));
    directory.join(super::orders::DATABASE)
}
