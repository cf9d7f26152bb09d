//! `decant migration`.

use clap::Subcommand;
use decant_api::{Empty, Listing, Migration, MigrationSettings, Scope, Timings, path};
use decant_base::{Bytes, MigrationId};
use decant_dataplane::MissingPolicy;

use super::output::{bytes, duration, fields, moment, show, table, word};
use super::{Exit, Failure, Global, parse_bytes, progress, watch};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// All migrations that the workers remember.
    #[command(alias = "ls")]
    List,
    /// One migration.
    Show {
        /// Which.
        migration: MigrationId,
    },
    /// Follow a migration to its end. Ctrl-C detaches; the migration goes on.
    Watch {
        /// Which.
        migration: MigrationId,
    },
    /// Take a migration back: possible until its destination has accepted the machine.
    Cancel {
        /// Which.
        migration: MigrationId,
    },
    /// Change a running migration: rate limit, and what reads of missing blocks get while the origin is away.
    #[command(
        after_help = "Examples:\n  decant migration set m-1 --rate 50MiB\n  decant migration set m-1 --rate 0 --policy eio"
    )]
    Set {
        /// Which.
        migration: MigrationId,
        /// Bytes per second at most; 0 lifts the limit.
        #[arg(long, value_parser = parse_bytes, value_name = "BYTES")]
        rate: Option<Bytes>,
        /// What a read of a missing block gets while the origin is away: it waits, or fails.
        #[arg(long, value_enum)]
        policy: Option<Policy>,
    },
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub(crate) enum Policy {
    /// It waits until the origin is back.
    Wait,
    /// It fails with EIO at once.
    Eio,
}

impl From<Policy> for MissingPolicy {
    fn from(policy: Policy) -> Self {
        match policy {
            Policy::Wait => Self::Wait,
            Policy::Eio => Self::Eio,
        }
    }
}

pub(crate) fn run(command: &Command, global: &Global) -> Result<Exit, Failure> {
    let mut agent = global.agent();
    match command {
        Command::List => {
            let listing: Listing<Migration> = agent.get(&path::migrations(Scope::Fleet))?;
            show(global.output, &listing, |listing| {
                let rows = listing.items.iter().map(row).collect();
                let headings = ["MIGRATION", "MACHINE", "FROM", "TO", "SEEN AS", "PHASE", "STARTED", "NOTE"];
                let list = table(headings, rows, "no migrations");
                listing.unreachable.iter().fold(list, |list, worker| format!("{list}\n({worker} did not answer)"))
            });
        }
        Command::Show { migration } => show(global.output, &agent.get::<Migration>(&path::migration(migration))?, text),
        Command::Watch { migration } => {
            let migration = agent.get(&path::migration(migration))?;
            return watch::migration(&mut agent, migration, global, false);
        }
        Command::Cancel { migration } => {
            let migration: Migration = agent.post(&path::cancel_migration(migration), &Empty {})?;
            show(global.output, &migration, text);
        }
        Command::Set { migration, rate, policy } => {
            let settings = MigrationSettings { rate: *rate, policy: policy.map(Into::into) };
            let migration: Migration = agent.post(&path::migration_settings(migration), &settings)?;
            show(global.output, &migration, text);
        }
    }
    Ok(Exit::Done)
}

fn row(migration: &Migration) -> [String; 8] {
    let note = match (&migration.why, &migration.progress) {
        (Some(why), _) => why.reason.clone(),
        (None, Some(progress)) if progress.exposure_bytes > 0 => {
            format!("{} still only on {}", bytes(progress.exposure_bytes), migration.source)
        }
        _ => String::new(),
    };
    [
        migration.migration.to_string(),
        migration.machine.to_string(),
        migration.source.to_string(),
        migration.destination.to_string(),
        word(&migration.role),
        word(&migration.phase),
        moment(migration.started_at_ms),
        note,
    ]
}

/// A migration for people.
pub(crate) fn text(migration: &Migration) -> String {
    let progress = migration.progress.as_ref();
    fields(&[
        ("migration", migration.migration.to_string()),
        ("machine", format!("{}, epoch {}", migration.machine, migration.epoch)),
        ("from, to", format!("{} -> {} (seen as {})", migration.source, migration.destination, word(&migration.role))),
        ("phase", word(&migration.phase)),
        ("waits for", migration.why.as_ref().map(|why| format!("{}; {}", why.reason, why.clears)).unwrap_or_default()),
        ("drain", migration.drain.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("live data", progress.map(progress::amount).unwrap_or_default()),
        (
            "exposure",
            progress.map(|progress| progress::exposure(progress.exposure_bytes, &migration.source)).unwrap_or_default(),
        ),
        ("steps", timings(&migration.timings)),
        ("started", moment(migration.started_at_ms)),
        ("ended", migration.ended_at_ms.map(moment).unwrap_or_default()),
    ])
}

fn timings(timings: &Timings) -> String {
    let steps = [
        ("prepare", timings.prepare_ms),
        ("stop", timings.stop_ms),
        ("seal", timings.seal_ms),
        ("grant", timings.grant_ms),
        ("boot", timings.boot_ms),
        ("hydration", timings.hydration_ms),
    ];
    let known = steps.iter().filter_map(|(name, ms)| ms.map(|ms| format!("{name} {}", duration(ms))));
    known.collect::<Vec<_>>().join(", ")
}
