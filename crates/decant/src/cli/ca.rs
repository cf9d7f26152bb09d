//! `decant ca`.

use std::net::IpAddr;
use std::path::PathBuf;

use clap::Subcommand;
use decant_agent::ca::{self, CaError, Made, WORKER_DAYS};
use decant_base::WorkerId;
use serde_json::json;

use super::output::{Output, print};
use super::{Exit, Failure, Global};

#[derive(Debug, Subcommand)]
#[command(after_help = "The authority's key is needed only to issue; keep it off the workers.\n\n\
    Examples:\n  \
    decant ca init --dir /root/decant-ca\n  \
    decant ca issue worker-1 --ca /root/decant-ca --dir ./worker-1 --address fdde::1")]
pub(crate) enum Command {
    /// Make the fleet's authority: ca.pem and ca.key.
    Init {
        /// Where to.
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
    },
    /// Issue a worker's certificate: WORKER.pem and WORKER.key.
    Issue {
        /// For which worker.
        worker: WorkerId,
        /// Where ca.pem and ca.key are.
        #[arg(long, value_name = "DIR", default_value = ".")]
        ca: PathBuf,
        /// Where to.
        #[arg(long, value_name = "DIR", default_value = ".")]
        dir: PathBuf,
        /// An address that peers reach it at; repeatable.
        #[arg(long, value_name = "IP")]
        address: Vec<IpAddr>,
        /// How many days it is good for.
        #[arg(long, value_name = "N", default_value_t = WORKER_DAYS, value_parser = clap::value_parser!(u32).range(1..=7300))]
        days: u32,
    },
}

pub(crate) fn run(command: &Command, global: &Global) -> Result<Exit, Failure> {
    let today = jiff::Zoned::now().date();
    let made = match command {
        Command::Init { dir } => ca::init(dir, today),
        Command::Issue { worker, ca, dir, address, days } => ca::issue(ca, dir, worker, address, (today, *days)),
    };
    let Made { cert, key } = made.map_err(failure)?;
    print(&match global.output {
        Output::Json => json!({ "cert": cert, "key": key }).to_string(),
        Output::Table => format!("made {} and {}", cert.display(), key.display()),
    });
    Ok(Exit::Done)
}

fn failure(error: CaError) -> Failure {
    let fix = match &error {
        CaError::File { .. } => "check the directory and its permissions; --ca and --dir name others",
        CaError::Exists { .. } => "name another directory with --dir",
        CaError::Certificate(_) => {
            "check that ca.pem and ca.key belong together; `decant ca init` makes new ones elsewhere"
        }
    };
    let cause = match std::error::Error::source(&error) {
        Some(source) => format!("{error}: {source}"),
        None => error.to_string(),
    };
    Failure::local("certificate not made", cause, fix)
}
