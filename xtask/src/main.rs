//! The chores of this repository.
//!
//! `cargo xtask test` runs every test and installs the peers they need; `cargo xtask tidy` checks the shape of the tree;
//! `cargo xtask deny` checks licences, bans and sources of dependencies; `cargo xtask bench` makes the figures of BENCHMARKS.md;
//! `cargo xtask ci` is all of it but the benchmarks, as `.ci/run` calls it.

mod bench;
mod deny;
mod peers;
mod test;
mod tidy;

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Instant;

use anyhow::{Context, bail};
use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "cargo xtask", about = "The chores of this repository")]
struct Cli {
    #[command(subcommand)]
    chore: Chore,
}

#[derive(Subcommand)]
enum Chore {
    /// Run every test; install the Debian packages that tests need first.
    Test(test::Options),
    /// Measure the figures of BENCHMARKS.md (builds the release binary; takes minutes).
    Bench(bench::Options),
    /// Check crate edges, lengths, headings and words.
    Tidy,
    /// Check licences, bans and sources of dependencies (installs cargo-deny when it is missing).
    Deny,
    /// fmt, clippy, tidy, doc, deny, test: what must pass before a change lands.
    Ci,
}

fn main() -> ExitCode {
    let outcome = match Cli::parse().chore {
        Chore::Test(options) => test::run(&options),
        Chore::Bench(options) => bench::run(&options),
        Chore::Tidy => tidy::run(),
        Chore::Deny => deny::run(),
        Chore::Ci => ci(),
    };
    match outcome {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("error: {error:#}");
            ExitCode::FAILURE
        }
    }
}

type Check = fn() -> anyhow::Result<()>;

/// Every check in turn; says how long each took, up to the first that fails.
fn ci() -> anyhow::Result<()> {
    let chores: [(&str, Check); 7] = [
        ("fmt", || run(cargo().args(["fmt", "--all", "--check"]))),
        ("tidy", tidy::run),
        ("clippy", || run(cargo().args(CLIPPY).args(["--all-targets", "--", "-D", "warnings"]))),
        // Tests may be long.
        ("clippy, lengths", || {
            run(cargo().args(CLIPPY).args(["--", "-D", "warnings", "-D", "clippy::too_many_lines"]))
        }),
        ("doc", || {
            run(cargo().args(["doc", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings"))
        }),
        ("deny", deny::run),
        ("test", || test::run(&test::Options::default())),
    ];
    let began = Instant::now();
    let mut times = Vec::new();
    let mut outcome = Ok(());
    for (name, chore) in chores {
        let chore_began = Instant::now();
        outcome = chore();
        times.push(format!("{name} {:.0} s", chore_began.elapsed().as_secs_f64()));
        if outcome.is_err() {
            break;
        }
    }
    println!("{}; {:.0} s in all", times.join(", "), began.elapsed().as_secs_f64());
    outcome
}

const CLIPPY: [&str; 3] = ["clippy", "--workspace", "--locked"];

/// The top of the checkout.
fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).parent().expect("xtask lies in the workspace").to_owned()
}

/// The cargo that runs us, in the workspace's top.
fn cargo() -> Command {
    let mut command = Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()));
    command.current_dir(root());
    command
}

/// Runs `command` with its output shown; an error names it.
fn run(command: &mut Command) -> anyhow::Result<()> {
    let status = command.status().with_context(|| format!("cannot start {command:?}"))?;
    if !status.success() {
        bail!("{command:?} ended with {status}");
    }
    Ok(())
}
