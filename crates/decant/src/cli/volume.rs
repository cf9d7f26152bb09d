//! `decant volume`.

use clap::Subcommand;
use decant_api::{CreateVolume, Listing, Scope, Volume, path};
use decant_base::{Bytes, VolumeId};

use super::output::{bytes, fields, moment, or_dash, show, table, word};
use super::{Exit, Failure, Global, parse_bytes};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Make an encrypted volume with ext4 on the agent's worker.
    #[command(after_help = "Example:\n  decant volume create orders-data --size 4GiB")]
    Create {
        /// Its name.
        volume: VolumeId,
        /// Its size, e.g. 4GiB. Space is taken as it is written.
        #[arg(long, value_parser = parse_bytes)]
        size: Bytes,
        /// Logical sector size, fixed for the volume's life.
        #[arg(long, default_value = "4096", value_parser = parse_sector_size)]
        sector_size: u32,
    },
    /// All volumes; sealed copies with their size and expiry too.
    #[command(alias = "ls")]
    List,
    /// One volume, as the agent's worker sees it.
    Show {
        /// Which.
        volume: VolumeId,
    },
    /// Remove a volume and its data from the agent's worker.
    #[command(alias = "rm")]
    Delete {
        /// Which.
        volume: VolumeId,
    },
}

fn parse_sector_size(text: &str) -> Result<u32, String> {
    match text {
        "512" => Ok(512),
        "4096" => Ok(4096),
        _ => Err("must be 512 or 4096".to_owned()),
    }
}

pub(crate) fn run(command: &Command, global: &Global) -> Result<Exit, Failure> {
    let mut agent = global.agent();
    match command {
        Command::Create { volume, size, sector_size } => {
            let request = CreateVolume { volume: volume.clone(), size: *size, sector_size: *sector_size };
            show(global.output, &agent.post::<Volume>("/v1/volumes", &request)?, text);
        }
        Command::List => {
            let listing: Listing<Volume> = agent.get(&path::volumes(Scope::Fleet))?;
            show(global.output, &listing, |listing| {
                let rows = listing.items.iter().map(row).collect();
                let list =
                    table(["VOLUME", "WORKER", "STATE", "SIZE", "ALLOCATED", "MACHINE", "NOTE"], rows, "no volumes");
                listing.unreachable.iter().fold(list, |list, worker| format!("{list}\n({worker} did not answer)"))
            });
        }
        Command::Show { volume } => show(global.output, &agent.get::<Volume>(&path::volume(volume))?, text),
        Command::Delete { volume } => {
            agent.delete(&path::volume(volume))?;
            let deleted = serde_json::json!({ "removed": volume });
            show(global.output, &deleted, |_| format!("volume {volume} is deleted"));
        }
    }
    Ok(Exit::Done)
}

fn row(volume: &Volume) -> [String; 7] {
    let status = volume.status.as_ref();
    [
        volume.volume.to_string(),
        volume.worker.to_string(),
        status.map_or_else(|| "?".to_owned(), |status| word(&status.state)),
        status.map_or_else(|| "-".to_owned(), |status| status.geometry.size.to_string()),
        status.map_or_else(|| "-".to_owned(), |status| status.allocated.to_string()),
        or_dash(volume.machine.as_ref()),
        note(volume),
    ]
}

/// What is special about a copy, in a few words.
fn note(volume: &Volume) -> String {
    if let Some(problem) = volume.problem.as_ref().or(volume.status.as_ref().and_then(|status| status.failed.as_ref()))
    {
        return problem.clone();
    }
    if let Some(sealed) = &volume.sealed {
        let expiry = match sealed.expires_at_ms {
            Some(at_ms) => format!("expires {}", moment(at_ms)),
            None => "still needed there".to_owned(),
        };
        return format!("sealed copy, {}, moved to {}, {expiry}", sealed.size, sealed.destination);
    }
    match volume.status.as_ref().and_then(|status| status.clone.as_ref()) {
        Some(clone) if clone.bytes_missing > 0 => format!("{} still only at its origin", bytes(clone.bytes_missing)),
        _ => String::new(),
    }
}

fn text(volume: &Volume) -> String {
    let Some(status) = &volume.status else {
        return fields(&[
            ("volume", volume.volume.to_string()),
            ("worker", volume.worker.to_string()),
            ("problem", volume.problem.clone().unwrap_or_else(|| "its data plane does not answer".to_owned())),
        ]);
    };
    let geometry = &status.geometry;
    fields(&[
        ("volume", volume.volume.to_string()),
        ("worker", volume.worker.to_string()),
        ("state", word(&status.state)),
        ("machine", volume.machine.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("size", format!("{}, sectors of {}", geometry.size, geometry.sector_size)),
        ("allocated", status.allocated.to_string()),
        (
            "cipher",
            format!("{}, {}-bit key, LUKS2 header {}", geometry.cipher, geometry.key_bytes * 8, status.header_bytes),
        ),
        ("epoch", status.epoch.to_string()),
        ("device", status.device.as_ref().map(|device| device.display().to_string()).unwrap_or_default()),
        ("note", note(volume)),
    ])
}
