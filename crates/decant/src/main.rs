//! The `decant` binary: every process of Decant and its command line.

mod cli;
mod demo;
mod http;
mod processes;

use std::process::ExitCode;

fn main() -> ExitCode {
    processes::start().unwrap_or_else(cli::main)
}
