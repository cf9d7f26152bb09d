//! `decant worker`.

use clap::Subcommand;
use decant_api::{Capacity, Cordon, Empty, Listing, Scope, Worker, path};
use decant_base::WorkerId;

use super::output::{bytes, fields, or_dash, show, table, word};
use super::{Exit, Failure, Global};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All workers, and those that do not answer.
    #[command(alias = "ls")]
    List,
    /// One worker.
    Show {
        /// Which.
        worker: WorkerId,
    },
    /// Take a worker out of placement; its machines stay.
    #[command(after_help = "Example:\n  decant worker cordon worker-1 --reason 'kernel upgrade on Friday'")]
    Cordon {
        /// Which.
        worker: WorkerId,
        /// Why, for whoever finds it cordoned.
        #[arg(long, default_value = "")]
        reason: String,
    },
    /// Put a worker back into placement.
    Uncordon {
        /// Which.
        worker: WorkerId,
    },
}

pub(crate) fn run(command: &Command, global: &Global) -> Result<Exit, Failure> {
    let mut agent = global.agent();
    match command {
        Command::List => {
            let listing: Listing<Worker> = agent.get(&path::workers(Scope::Fleet))?;
            show(global.output, &listing, |listing| {
                let rows = listing.items.iter().map(row).collect();
                table(["WORKER", "STATE", "MACHINES", "SERVING", "EXPOSURE", "FREE", "REASON"], rows, "no workers")
            });
        }
        Command::Show { worker } => show(global.output, &agent.get::<Worker>(&path::worker(worker))?, text),
        Command::Cordon { worker, reason } => {
            let cordon = Cordon { reason: reason.clone() };
            show(global.output, &agent.post::<Worker>(&path::cordon(worker), &cordon)?, text);
        }
        Command::Uncordon { worker } => {
            show(global.output, &agent.post::<Worker>(&path::uncordon(worker), &Empty {})?, text);
        }
    }
    Ok(Exit::Done)
}

fn row(worker: &Worker) -> [String; 7] {
    [
        worker.worker.to_string(),
        word(&worker.state),
        worker.machines.to_string(),
        worker.serving.to_string(),
        bytes(worker.exposure_bytes),
        worker.capacity.map_or_else(|| "-".to_owned(), |capacity| capacity.bytes_free.to_string()),
        worker.reason.clone().unwrap_or_default(),
    ]
}

fn text(worker: &Worker) -> String {
    let labels: Vec<String> = worker.labels.iter().map(|(name, value)| format!("{name}={value}")).collect();
    let capacity = worker.capacity.map(|Capacity { machines, bytes, bytes_used, bytes_free }| {
        format!("{machines} machines, {bytes} of volumes ({bytes_used} used, {bytes_free} free on disk)")
    });
    fields(&[
        ("worker", worker.worker.to_string()),
        ("state", word(&worker.state)),
        ("reason", worker.reason.clone().unwrap_or_default()),
        ("drain", worker.drain.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("machines", worker.machines.to_string()),
        ("serving", format!("{} volumes that others still read from here", worker.serving)),
        ("exposure", format!("{} of its machines' data is only on other workers", bytes(worker.exposure_bytes))),
        ("capacity", or_dash(capacity.as_ref())),
        ("region", worker.region.clone()),
        ("labels", labels.join(", ")),
        ("address", worker.address.clone()),
        ("version", worker.version.clone()),
    ])
}
