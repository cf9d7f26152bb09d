//! The command line.

mod agent;
mod ca;
mod clone;
mod daemon;
pub(crate) mod doctor;
mod drain;
mod export;
mod failure;
mod machine;
mod migration;
pub(crate) mod output;
mod progress;
mod ready;
mod secrets;
mod volume;
mod watch;
mod why;
mod worker;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};
use decant_dataplane::Protocol;

pub(crate) use agent::Agent;
pub(crate) use failure::{Exit, Failure};
use output::Output;
pub(crate) use watch::interrupts;

/// Where an agent's socket is unless it is said otherwise.
const DEFAULT_SOCKET: &str = "/run/decant/agent.sock";

/// Drain a host whose machines keep their data on local, encrypted disks.
#[derive(Debug, Parser)]
#[command(
    name = "decant",
    version,
    disable_help_subcommand = true,
    after_help = "Exit status: 0 done, 1 error, 2 usage, 3 blocked, 4 deadline, 5 cancelled, 6 detached.\n\n\
        Examples:\n  \
        decant demo                                        see it all happen on this machine\n  \
        decant drain worker-1 --reason 'disk is dying'     empty a worker and watch\n  \
        decant why                                         what everything waits for"
)]
pub(crate) struct Cli {
    #[command(flatten)]
    pub(crate) global: Global,
    #[command(subcommand)]
    pub(crate) verb: Verb,
}

/// Options of every command.
#[derive(Debug, Args)]
pub(crate) struct Global {
    /// The agent's socket.
    #[arg(long, global = true, env = "DECANT_SOCKET", value_name = "PATH", default_value = DEFAULT_SOCKET, hide_env_values = true)]
    pub(crate) socket: PathBuf,
    /// How to show results.
    #[arg(short, long, global = true, value_name = "FORM", value_enum, default_value_t)]
    pub(crate) output: Output,
}

impl Global {
    fn agent(&self) -> Agent {
        Agent::at(self.socket.clone())
    }
}

#[derive(Debug, Subcommand)]
pub(crate) enum Verb {
    /// Run a worker's agent: its API, its peers, its journal.
    Agent(daemon::DaemonArgs),
    /// Run a worker's proxy: clients' connections to wherever their machine runs.
    Proxy(daemon::DaemonArgs),
    /// Workers: list, show, cordon, uncordon.
    #[command(subcommand)]
    Worker(worker::Command),
    /// Volumes: create, list, show, delete.
    #[command(subcommand)]
    Volume(volume::Command),
    /// Machines: run, list, show, stop, start, move, logs, rm, reclaim, retry, clear-veto, forget-origin.
    #[command(subcommand)]
    Machine(Box<machine::Command>),
    /// Move every machine off one or more workers.
    Drain(drain::DrainArgs),
    /// Moves of single machines: list, show, watch, cancel, set.
    #[command(subcommand)]
    Migration(migration::Command),
    /// What everything waits for, since when, and what clears it.
    Why(why::WhyArgs),
    /// Certificates: init, issue.
    #[command(subcommand)]
    Ca(ca::Command),
    /// Serve a file, block device or LVM volume over iSCSI or NBD, without a worker.
    Export(Box<export::ExportArgs>),
    /// Clone an NBD export, a disk over iSCSI, a file or a device, without a worker; or ask a clone how far it is.
    Clone(Box<clone::CloneArgs>),
    /// Whether this machine can be a worker.
    Doctor(doctor::DoctorArgs),
    /// See one real drain happen on this machine, and every acknowledged write checked.
    Demo(Box<crate::demo::DemoArgs>),
    /// The machine that the demo moves: an order service.
    #[command(hide = true)]
    DemoOrders(crate::demo::orders::OrdersArgs),
}

/// Runs a command line to its exit status.
pub(crate) fn main() -> ExitCode {
    let Cli { global, verb } = match Cli::try_parse() {
        Ok(cli) => cli,
        Err(error) => return misused(&error),
    };
    let result = match verb {
        Verb::Agent(args) => daemon::agent(&args),
        Verb::Proxy(args) => daemon::proxy(&args),
        Verb::Worker(command) => worker::run(&command, &global),
        Verb::Volume(command) => volume::run(&command, &global),
        Verb::Machine(command) => machine::run(*command, &global),
        Verb::Drain(args) => drain::run(args, &global),
        Verb::Migration(command) => migration::run(&command, &global),
        Verb::Why(args) => why::run(&args, &global),
        Verb::Ca(command) => ca::run(&command, &global),
        Verb::Export(args) => export::run(&args, &global),
        Verb::Clone(args) => clone::run(*args, &global),
        Verb::Doctor(args) => doctor::run(&args, &global),
        Verb::Demo(args) => crate::demo::main(&args, global.output),
        Verb::DemoOrders(args) => return crate::demo::orders::main(&args),
    };
    match result {
        Ok(exit) => exit.into(),
        Err(failure) => {
            eprintln!("{}", failure.text(global.output));
            failure.exit.into()
        }
    }
}

/// Shows help, a version, or what is wrong with the command line: as JSON if that was asked for.
fn misused(error: &clap::Error) -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let wants_json = arguments.iter().any(|word| matches!(word.as_str(), "-ojson" | "--output=json"))
        || arguments.windows(2).any(|pair| matches!(pair[0].as_str(), "-o" | "--output") && pair[1] == "json");
    if error.exit_code() == 0 || !wants_json {
        let _ = error.print();
    } else {
        let text = error.to_string();
        let cause = text.lines().next().unwrap_or_default().trim_start_matches("error: ");
        eprintln!("{}", Failure::usage("command line not understood", cause, "see --help").text(Output::Json));
    }
    ExitCode::from(u8::try_from(error.exit_code()).unwrap_or(Exit::Usage as u8))
}

/// `--protocol`.
pub(crate) fn protocols() -> impl clap::builder::TypedValueParser<Value = Protocol> {
    use clap::builder::TypedValueParser as _;
    clap::builder::PossibleValuesParser::new(["nbd", "iscsi"])
        .map(|name| if name == "iscsi" { Protocol::Iscsi } else { Protocol::Nbd })
}

/// Reads `90s`, `10m`, `2h`, `1d` or `500ms` as milliseconds.
pub(crate) fn parse_duration(text: &str) -> Result<u64, String> {
    let fail = || format!("{text:?} is not a duration: write a number with ms, s, m, h or d, e.g. 90s");
    let digits = text.find(|c: char| !c.is_ascii_digit()).unwrap_or(text.len());
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().map_err(|_| fail())?;
    let ms = match unit {
        "ms" => 1,
        "s" => 1_000,
        "m" | "min" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return Err(fail()),
    };
    number.checked_mul(ms).ok_or_else(fail)
}

/// Reads a size as people write it.
pub(crate) fn parse_bytes(text: &str) -> Result<decant_base::Bytes, String> {
    decant_base::Bytes::parse(text).map_err(|error| error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_well_formed() {
        Cli::command().debug_assert();
    }

    #[test]
    fn durations_read_as_people_write_them() {
        assert_eq!(
            ["500ms", "90s", "10m", "2h", "1d"].map(parse_duration),
            [500, 90_000, 600_000, 7_200_000, 86_400_000].map(Ok)
        );
        for text in ["", "10", "s", "-1s", "1.5h", "99999999999999999999d", "1w"] {
            assert!(parse_duration(text).is_err(), "{text}");
        }
    }
}
