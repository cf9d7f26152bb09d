//! `decant agent` and `decant proxy`.

use std::path::PathBuf;

use decant_agent::RunError;
use decant_agent::config::Config;

use super::{Exit, Failure};

/// `decant agent`, `decant proxy`.
#[derive(Debug, clap::Args)]
#[command(after_help = "Logs go to the error stream; DECANT_LOG filters them, e.g. DECANT_LOG=debug.\n\
    SIGTERM ends it. Machines run on without it.\n\n\
    Example:\n  decant agent --config /etc/decant/worker.toml")]
pub(crate) struct DaemonArgs {
    /// The worker's configuration.
    #[arg(long, value_name = "FILE", default_value = "/etc/decant/worker.toml")]
    config: PathBuf,
}

pub(crate) fn agent(args: &DaemonArgs) -> Result<Exit, Failure> {
    run(args, "agent", decant_agent::run)
}

pub(crate) fn proxy(args: &DaemonArgs) -> Result<Exit, Failure> {
    run(args, "proxy", decant_agent::proxy_main)
}

fn run(args: &DaemonArgs, what: &str, main: fn(Config) -> Result<(), RunError>) -> Result<Exit, Failure> {
    crate::processes::log();
    let config = Config::load(&args.config).map_err(|error| {
        // The configuration's errors carry their fix as a last line.
        let text = chain(&error);
        let (cause, fix) = text.split_once("fix:").unwrap_or((&text, "compare with the reference in docs/agent.md"));
        Failure::usage("configuration cannot be used", cause.trim(), fix.trim())
    })?;
    main(config).map(|()| Exit::Done).map_err(|error| {
        let (name, fix) = match &error {
            RunError::NotRoot { .. } => ("not root".to_owned(), "run it as root"),
            RunError::Fuse(_) => ("no FUSE".to_owned(), super::doctor::FUSE_FIX),
            _ => (format!("the {what} ended"), "`decant doctor` checks what it needs of this machine"),
        };
        Failure::local(&name, chain(&error), fix)
    })
}

/// An error and its causes in one line, each said once.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(next) = cause {
        let said = next.to_string();
        if !text.contains(said.trim()) {
            text = format!("{text}: {said}");
        }
        cause = next.source();
    }
    text
}
