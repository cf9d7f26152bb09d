//! The `decant` binary: every process of Decant and its command line.

mod demo;

use std::process::ExitCode;

use clap::Parser;

#[derive(Debug, Parser)]
#[command(name = "decant", version)]
struct Cli {
    #[command(subcommand)]
    command: Verb,
}

#[derive(Debug, clap::Subcommand)]
enum Verb {
    #[command(hide = true)]
    DemoOrders(demo::orders::OrdersArgs),
}

fn main() -> ExitCode {
    match Cli::parse().command {
        Verb::DemoOrders(args) => demo::orders::main(&args),
    }
}
