//! The `decant` binary: every process of Decant and its command line.

mod cli;
mod demo;
mod http;

fn main() -> std::process::ExitCode {
    cli::main()
}
