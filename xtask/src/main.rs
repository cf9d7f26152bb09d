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

fn ci() -> anyhow::Result<()> {
    run(cargo().args(["fmt", "--all", "--check"]))?;
    tidy::run()?;
    run(cargo().args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]))?;
    run(cargo().args(["clippy", "--workspace", "--locked", "--", "-D", "warnings", "-D", "clippy::too_many_lines"]))?;
    run(cargo().args(["doc", "--workspace", "--no-deps", "--locked"]).env("RUSTDOCFLAGS", "-D warnings"))?;
    deny::run()?;
    test::run(&test::Options::default())
}

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
