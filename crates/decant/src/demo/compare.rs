//! The two orders of events that the clone replaces, done with the same machine and the same data.
//!
//! Both are done as kindly as they can be: only files are copied, not the volume; everything at the destination is made
//! ready before; the copy of a running database is a consistent one.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::fs::chown;
use std::path::Path;

use anyhow::{Context, ensure};
use serde::Serialize;

use super::client::{Log, monotonic_ns};
use super::figures::{Gap, longest_gap};
use super::ledger::{self, Verdict};
use super::report::round;
use super::site::SECOND_PORT;
use super::stage::{ORDERS, PREFIX, Stage, VOLUME};
use super::{DemoArgs, Interrupt, main_job, orders, say};
use crate::cli::Exit;

/// Writes before and after each move.
const SAMPLES: u64 = 300;
/// How long the client takes for them at most, unless it has hardly any.
const PATIENCE: std::time::Duration = std::time::Duration::from_secs(4);
/// The machine, and its volume, that the running machine is copied to.
const COPY: &str = "orders-copy";
/// The machine, and its volume, that the stopped machine is copied to.
const SECOND: &str = "orders-second";
/// The user that the machine runs as.
const NOBODY: u32 = 65534;
/// Where the receiving end of a copy listens.
const COPY_PORT: u16 = 7071;

/// What one order of events cost.
#[derive(Debug, Clone, Serialize)]
struct Order {
    downtime_ms: f64,
    writes_acknowledged: u64,
    writes_lost: u64,
    writes_duplicated: u64,
}

/// The report of `--compare`.
#[derive(Debug, Serialize)]
struct Comparison {
    kill_clone_boot: Order,
    kill_copy_boot: Order,
    copy_boot_kill: Order,
}

pub(crate) fn run(args: &DemoArgs, interrupt: &Interrupt) -> anyhow::Result<Exit> {
    let mut stage = Stage::set(args, interrupt)?;
    stage.create_volume(1, VOLUME)?;
    stage.run_orders(1, ORDERS, Some(VOLUME))?;
    let (copy_boot_kill, mut sent) = copy_boot_kill(&stage)?;
    let (kill_clone_boot, after) = kill_clone_boot(&mut stage, sent)?;
    sent = after;
    stage.uncordon(1)?;
    let kill_copy_boot = kill_copy_boot(&stage, sent)?;
    let report = Comparison { kill_clone_boot, kill_copy_boot, copy_boot_kill };
    say("\nResult: the same machine, the same data, three orders of events");
    say(report.text());
    super::deliver(args, &report)?;
    let good = report.kill_clone_boot.writes_lost == 0 && report.kill_clone_boot.writes_duplicated == 0;
    main_job::finish(stage)?;
    Ok(if good { Exit::Done } else { Exit::Error })
}

impl Comparison {
    fn text(&self) -> String {
        let row = |name: &str, order: &Order| {
            [
                name.to_owned(),
                format!("{:.0} ms", order.downtime_ms),
                order.writes_acknowledged.to_string(),
                order.writes_lost.to_string(),
            ]
        };
        let rows = vec![
            row("kill, clone, boot (decant)", &self.kill_clone_boot),
            row("kill, copy, boot", &self.kill_copy_boot),
            row("copy, boot, kill", &self.copy_boot_kill),
        ];
        crate::cli::output::table(["ORDER", "DOWNTIME", "WRITES", "LOST"], rows, "")
    }
}

fn order(gap: Option<Gap>, verdict: &Verdict) -> Order {
    Order {
        downtime_ms: round(gap.map_or(0.0, Gap::millis)),
        writes_acknowledged: verdict.acknowledged,
        writes_lost: verdict.lost,
        writes_duplicated: verdict.duplicated + verdict.invented,
    }
}

/// Ours.
fn kill_clone_boot(stage: &mut Stage<'_>, first: u64) -> anyhow::Result<(Order, u64)> {
    say("kill, clone, boot: worker-1 to worker-2");
    let load = stage.orders_load(first)?;
    stage.wait_load(&load, SAMPLES, PATIENCE)?;
    let began = monotonic_ns();
    stage.drain(1, 2, ORDERS, "demo, compared")?;
    let ended = monotonic_ns();
    stage.wait_load(&load, SAMPLES, PATIENCE)?;
    let log = load.finish()?;
    let verdict = judge(stage, 2, ORDERS, &log, first)?;
    Ok((order(longest_gap(&log.acknowledged, began, ended), &verdict), log.sent))
}

/// The copy is booted while the original still takes writes: what comes after the copy is lost.
fn copy_boot_kill(stage: &Stage<'_>) -> anyhow::Result<(Order, u64)> {
    say("copy, boot, kill: worker-1 to worker-2");
    let to = stage.run_awaiting(2, COPY)?;
    let load = stage.orders_load(0)?;
    stage.wait_load(&load, SAMPLES, PATIENCE)?;
    let snapshot = stage.site.directory().join("snapshot.db");
    ledger::copy_database(&stage.database(1, ORDERS)?, &snapshot)?;
    send(stage, 1, 2, &snapshot, &to.join(orders::DATABASE))?;
    fs::remove_file(&snapshot)?;
    stage.wait_running(2, COPY)?;
    // The copy serves. Now, and only now, the original is killed.
    stage.stop_machine(1, ORDERS)?;
    let log = load.finish()?;
    let verdict = judge(stage, 2, COPY, &log, 0)?;
    stage.remove_machine(2, COPY)?;
    stage.start_machine(1, ORDERS)?;
    stage.wait_running(1, ORDERS)?;
    // The copy served before the original was killed, so clients that follow at once see no gap.
    Ok((order(None, &verdict), log.sent))
}

/// The machine is down for as long as the copy takes.
fn kill_copy_boot(stage: &Stage<'_>, first: u64) -> anyhow::Result<Order> {
    say("kill, copy, boot: worker-2 to worker-1");
    let to = stage.run_awaiting(1, SECOND)?;
    let load = stage.orders_load(first)?;
    stage.wait_load(&load, SAMPLES, PATIENCE)?;
    let began = monotonic_ns();
    // Killed, and mounted again with the service held back, so that its files can be read.
    fs::write(stage.data(2, ORDERS)?.join(orders::HOLD), "")?;
    stage.stop_machine(2, ORDERS)?;
    stage.start_machine(2, ORDERS)?;
    let from = stage.wait_data(2, ORDERS)?;
    load.switch(SECOND_PORT);
    send(stage, 2, 1, &from.join(orders::DATABASE), &to.join(orders::DATABASE))?;
    stage.wait_running(1, SECOND)?;
    stage.wait_load(&load, SAMPLES, PATIENCE)?;
    let ended = monotonic_ns();
    let log = load.finish()?;
    let verdict = judge(stage, 1, SECOND, &log, first)?;
    Ok(order(longest_gap(&log.acknowledged, began, ended), &verdict))
}

/// Copies a file over the wire between two workers, and syncs it there.
fn send(stage: &Stage<'_>, from: u32, to: u32, source: &Path, destination: &Path) -> anyhow::Result<()> {
    let address = SocketAddr::from((stage.site.lab().address(to), COPY_PORT));
    let listener = stage.site.lab().enter(to, || TcpListener::bind(address)).context("listening for the copy")?;
    let unfinished = destination.with_extension("unfinished");
    let (sent, received) = std::thread::scope(|scope| -> io::Result<(u64, u64)> {
        let receiver = scope.spawn(|| -> io::Result<u64> {
            let (mut stream, _) = listener.accept()?;
            let mut file = File::create(&unfinished)?;
            let count = pour(&mut stream, &mut file)?;
            file.sync_all()?;
            Ok(count)
        });
        let mut stream = stage.site.lab().enter(from, || TcpStream::connect(address))?;
        let sent = pour(&mut File::open(source)?, &mut stream)?;
        stream.shutdown(std::net::Shutdown::Write)?;
        let received = receiver.join().unwrap_or_else(|_| Err(io::Error::other("the receiver panicked")))?;
        Ok((sent, received))
    })
    .with_context(|| format!("copying {}", source.display()))?;
    let length = fs::metadata(source)?.len();
    ensure!(
        sent == length && received == length,
        "of the {length} bytes of {} {sent} were sent and {received} received",
        source.display()
    );
    chown(&unfinished, Some(NOBODY), Some(NOBODY)).context("giving the copy to the machine's user")?;
    fs::rename(&unfinished, destination).context("naming the copy")
}

/// Copies to the end; how many bytes.
fn pour(from: &mut impl Read, to: &mut impl Write) -> io::Result<u64> {
    let mut chunk = vec![0; 1 << 20];
    let mut total = 0;
    loop {
        let count = from.read(&mut chunk)?;
        if count == 0 {
            return Ok(total);
        }
        to.write_all(&chunk[..count])?;
        total += count as u64;
    }
}

/// What of this log the database has. Orders below `first` were judged before.
fn judge(stage: &Stage<'_>, worker: u32, machine: &str, log: &Log, first: u64) -> anyhow::Result<Verdict> {
    let copy = stage.site.directory().join("judged.db");
    let _ = fs::remove_file(&copy);
    ledger::copy_database(&stage.database(worker, machine)?, &copy)?;
    let mut rows = ledger::read_rows(&copy, PREFIX)?;
    rows.retain(|row| {
        let number = row.reference.strip_prefix(PREFIX).and_then(|number| number.parse::<u64>().ok());
        number.is_none_or(|number| number >= first)
    });
    Ok(ledger::compare(&log.acknowledged, &rows, PREFIX, log.sent))
}
