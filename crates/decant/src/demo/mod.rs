//! The demo: one real drain on one Linux machine, measured from outside.
//!
//! `main_job` is the order of events; `stage` is what can be done to the fleet; `site` makes and removes the workers;
//! `client` writes and reads all along; `ledger`, `oracle` and `meter` say what is true without asking the product.

mod client;
mod compare;
mod figures;
mod ledger;
mod link;
mod lose;
mod main_job;
mod meter;
mod oracle;
pub(crate) mod orders;
mod preflight;
mod report;
mod site;
mod stage;
mod store;

use std::path::PathBuf;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use anyhow::Context;
use decant_api::ErrorBody;
use decant_base::Bytes;
use decant_dataplane::Protocol;

use crate::cli::output::Output;
use crate::cli::{Exit, Failure, parse_bytes, protocols};
use link::Link;

/// `decant demo`.
#[derive(Debug, Clone, clap::Args)]
#[command(
    after_help = "Three workers, each in its own network namespace; a real order service on an encrypted volume on\n\
    worker-1; a client that writes and reads all along; then `decant drain worker-1`; then every acknowledged\n\
    write is looked for in the destination's database. Exits with 0 only if nothing was lost or duplicated.\n\n\
    Examples:\n  \
    decant demo\n  \
    decant demo --moves 5 --report report.json --ledger ./ledger\n  \
    decant demo --link 200mbit,5ms\n  \
    decant demo --protocol iscsi\n  \
    decant demo -o json > report.json\n  \
    decant demo --keep"
)]
pub(crate) struct DemoArgs {
    /// Size of the volume.
    #[arg(long, default_value = "4GiB", value_parser = parse_bytes, value_name = "BYTES")]
    size: Bytes,
    /// About how much of it is live data.
    #[arg(long, default_value = "200MiB", value_parser = parse_bytes, value_name = "BYTES")]
    used: Bytes,
    /// Move each machine this often, back and forth, and report medians.
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=100))]
    moves: u32,
    /// Rate and one-way delay of the workers' links, e.g. 200mbit,5ms.
    #[arg(long, value_name = "RATE,DELAY", conflicts_with_all = ["keep", "lose_source", "lose_destination"])]
    link: Option<Link>,
    /// The block protocol between workers.
    #[arg(long, default_value = "nbd", value_parser = protocols())]
    protocol: Protocol,
    /// Write the report as JSON to this file.
    #[arg(long, value_name = "FILE")]
    report: Option<PathBuf>,
    /// Keep the client's log of acknowledged writes and a copy of the destination's database here.
    #[arg(long, value_name = "DIR")]
    ledger: Option<PathBuf>,
    /// Where volumes and logs are made and removed again.
    #[arg(long, default_value = "/var/tmp", value_name = "DIR")]
    dir: PathBuf,
    /// Leave the workers up afterwards, to play with.
    #[arg(long)]
    keep: bool,
    /// Remove what --keep left of this run, and do nothing else.
    #[arg(long, value_name = "RUN", conflicts_with_all = ["keep", "compare", "lose_source", "lose_destination", "link", "report", "ledger"])]
    clean: Option<String>,
    /// Also do it in the two other orders, side by side: kill, copy, boot and copy, boot, kill.
    #[arg(long, conflicts_with_all = ["lose_source", "lose_destination"])]
    compare: bool,
    /// Lose the source for good while blocks are still only there, under both policies.
    #[arg(long, conflicts_with = "lose_destination")]
    lose_source: bool,
    /// Lose the destination for good while it fills, and take the machine back.
    #[arg(long)]
    lose_destination: bool,
}

/// Whether somebody wants the demo to end.
#[derive(Debug, Clone, Default)]
pub(crate) struct Interrupt(Arc<AtomicBool>);

/// The demo was interrupted.
#[derive(Debug, thiserror::Error)]
#[error("interrupted; everything is removed again")]
struct Interrupted;

impl Interrupt {
    /// Fails once somebody pressed Ctrl-C.
    pub(crate) fn check(&self) -> anyhow::Result<()> {
        if self.0.load(Ordering::Relaxed) { Err(Interrupted.into()) } else { Ok(()) }
    }

    /// Waits that long, or less with an error.
    pub(crate) fn sleep(&self, time: std::time::Duration) -> anyhow::Result<()> {
        let end = std::time::Instant::now() + time;
        loop {
            self.check()?;
            let left = end.saturating_duration_since(std::time::Instant::now());
            if left.is_zero() {
                return Ok(());
            }
            std::thread::sleep(left.min(std::time::Duration::from_millis(20)));
        }
    }
}

/// Whether the one thing on the output stream is JSON; what people read goes to the error stream then.
static JSON: AtomicBool = AtomicBool::new(false);

/// Runs the demo to its exit status.
pub(crate) fn main(args: &DemoArgs, output: Output) -> Result<Exit, Failure> {
    JSON.store(output == Output::Json, Ordering::Relaxed);
    run(args).map_err(|error| failure(&error))
}

/// The demo's end as name, cause and fix: those of whoever refused something, where they are known.
fn failure(error: &anyhow::Error) -> Failure {
    if error.is::<Interrupted>() {
        let fix = "run it again; nothing is left of it";
        return Failure { exit: Exit::Cancelled, ..Failure::local("interrupted", error, fix) };
    }
    let cause = format!("{error:#}");
    match error.downcast_ref::<ErrorBody>() {
        Some(body) if body.to_string() == cause => Failure::from(body.clone()),
        Some(body) => Failure { exit: Exit::Error, ..Failure::local(&body.name, cause, body.fix.clone()) },
        None => {
            let fix = "everything was removed again; `decant doctor` checks what it needs of this machine";
            Failure::local("the demo failed", cause, fix)
        }
    }
}

fn run(args: &DemoArgs) -> anyhow::Result<Exit> {
    if let Some(run) = &args.clean {
        preflight::root()?;
        site::clean(run)?;
        deliver_json(&serde_json::json!({ "removed": run }))?;
        say(format_args!("{run} is removed"));
        return Ok(Exit::Done);
    }
    preflight::run(args)?;
    let interrupt = Interrupt::default();
    let interrupts = crate::cli::interrupts().context("listening for Ctrl-C")?;
    let flag = Arc::clone(&interrupt.0);
    std::thread::spawn(move || {
        while interrupts.recv().is_ok() {
            flag.store(true, Ordering::Relaxed);
        }
    });
    if args.compare {
        compare::run(args, &interrupt)
    } else if args.lose_source {
        lose::source(args, &interrupt)
    } else if args.lose_destination {
        lose::destination(args, &interrupt)
    } else {
        main_job::run(args, &interrupt)
    }
}

/// A line that says what happens now.
pub(crate) fn say(text: impl std::fmt::Display) {
    if JSON.load(Ordering::Relaxed) {
        eprintln!("{text}");
    } else {
        crate::cli::output::print(&text.to_string());
    }
}

/// Has `command` say what it says where [`say`] does.
pub(crate) fn say_there(command: &mut Command) -> anyhow::Result<&mut Command> {
    use std::os::fd::AsFd as _;
    if JSON.load(Ordering::Relaxed) {
        command.stdout(std::io::stderr().as_fd().try_clone_to_owned().context("keeping the error stream")?);
    }
    Ok(command)
}

/// Gives a report to whoever wants it: to the file of `--report`, and to the output stream with `-o json`.
pub(crate) fn deliver(args: &DemoArgs, report: &impl serde::Serialize) -> anyhow::Result<()> {
    if let Some(path) = &args.report {
        let text = serde_json::to_string_pretty(report)? + "\n";
        std::fs::write(path, text).with_context(|| format!("writing {}", path.display()))?;
    }
    deliver_json(report)
}

fn deliver_json(report: &impl serde::Serialize) -> anyhow::Result<()> {
    if JSON.load(Ordering::Relaxed) {
        crate::cli::output::print(&serde_json::to_string_pretty(report)?);
    }
    Ok(())
}
