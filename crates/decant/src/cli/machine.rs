//! `decant machine`.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use clap::{Args, Subcommand};
use decant_api::{
    Empty, Force, Listing, Logs, Machine, Migration, MoveMachine, Reclaim, Reclaimed, RecoveryPoint, RunMachine, Scope,
    path,
};
use decant_base::{Bytes, MachineId, VolumeId, WorkerId};
use decant_dataplane::Protocol;
use decant_machine::{Bind, HealthCheck, Limits, MachineSpec, RestartPolicy};
use serde::Serialize;

use super::output::{bytes, fields, moment, or_dash, show, table, word};
use super::{Agent, Exit, Failure, Global, parse_bytes, parse_duration, protocols, watch};

#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    /// Run a machine on the agent's worker.
    Run(Box<RunArgs>),
    /// All machines.
    #[command(alias = "ls")]
    List,
    /// One machine.
    Show {
        /// Which.
        machine: MachineId,
    },
    /// Stop a machine with its own stop signal and timeout; it stays down.
    Stop {
        /// Which.
        machine: MachineId,
    },
    /// Start a stopped machine.
    Start {
        /// Which.
        machine: MachineId,
    },
    /// Move a machine to another worker and watch.
    #[command(after_help = "Example:\n  decant machine move orders --to worker-2")]
    Move {
        /// Which.
        machine: MachineId,
        /// Where to; the planner chooses if absent.
        #[arg(long, value_name = "WORKER")]
        to: Option<WorkerId>,
        /// Why, for the event log.
        #[arg(long, default_value = "")]
        reason: String,
        /// What the volume travels over: NBD over mutual TLS, or iSCSI where both workers trust the network
        /// (iscsi.trusted_networks).
        #[arg(long, default_value = "nbd", value_parser = protocols())]
        protocol: Protocol,
        /// The destination need not have the very program that the machine was started from.
        #[arg(long)]
        any_program: bool,
        /// Do not watch; exits with 6.
        #[arg(long)]
        detach: bool,
    },
    /// Have whatever is stuck or waits for its time tried again now.
    #[command(
        after_help = "`decant why` says what is stuck and what removes the cause.\n\nExample:\n  decant machine retry orders"
    )]
    Retry {
        /// Which.
        machine: MachineId,
    },
    /// Boot a machine that another worker claims at a higher epoch: nobody else has it.
    #[command(
        name = "clear-veto",
        after_help = "A worker whose journal is an old copy does not boot what somebody else may run. Ask without --force\n\
            first: it says who claims the machine.\n\nExample:\n  decant machine clear-veto orders --force"
    )]
    ClearVeto {
        /// Which.
        machine: MachineId,
        /// Your word that no other worker has it.
        #[arg(long)]
        force: bool,
    },
    /// End a move whose source was destroyed after the last block had come.
    #[command(
        name = "forget-origin",
        after_help = "Refused while blocks are missing: then only `decant machine rm MACHINE --with-volume --force` is left.\n\n\
            Example:\n  decant machine forget-origin orders --force"
    )]
    ForgetOrigin {
        /// Which.
        machine: MachineId,
        /// Your word that the worker it came from is destroyed.
        #[arg(long)]
        force: bool,
    },
    /// The last lines that a machine printed.
    Logs {
        /// Which.
        machine: MachineId,
        /// How many lines.
        #[arg(long, short = 'n', default_value_t = 100)]
        tail: u32,
    },
    /// Stop a machine and remove it, its volume and its data.
    #[command(
        alias = "delete",
        after_help = "Examples:\n  decant machine rm web\n  decant machine rm orders --with-volume\n  \
            decant machine rm orders --with-volume --force     its source burnt, blocks of it are nowhere"
    )]
    Rm {
        /// Which.
        machine: MachineId,
        /// Your word that its volume may go with it.
        #[arg(long)]
        with_volume: bool,
        /// Your word that the worker it is still being moved from is destroyed.
        #[arg(long)]
        force: bool,
    },
    /// Boot the sealed copy of a machine whose new worker is destroyed.
    #[command(
        after_help = "Ask without --force first: it says what would be lost.\n\nExample:\n  decant machine reclaim orders --force"
    )]
    Reclaim {
        /// Which.
        machine: MachineId,
        /// Your word that the worker it moved to is destroyed and will never run it again.
        #[arg(long)]
        force: bool,
    },
}

/// `decant machine run`.
#[derive(Debug, Args)]
#[command(after_help = "Examples:\n  \
    decant machine run web -- /usr/bin/python3 -m http.server 8080\n  \
    decant machine run orders --volume orders-data --health-port 8080 --health-path /health \\\n      \
    --bind /opt/orders -- /opt/orders/serve --data /data\n  \
    decant machine run --spec orders.json")]
pub(crate) struct RunArgs {
    /// Its name, unique in the fleet.
    #[arg(required_unless_present = "spec")]
    machine: Option<MachineId>,
    /// The whole machine as JSON, as `machine show -o json` prints it under `spec`.
    #[arg(long, value_name = "FILE", conflicts_with_all = ["machine", "command"])]
    spec: Option<PathBuf>,
    /// Its volume, mounted at /data.
    #[arg(long)]
    volume: Option<VolumeId>,
    /// Environment, NAME=VALUE; repeatable.
    #[arg(long, short, value_name = "NAME=VALUE", value_parser = parse_env)]
    env: Vec<(String, String)>,
    /// User id it runs as.
    #[arg(long, default_value_t = 65534)]
    uid: u32,
    /// Group id it runs as.
    #[arg(long, default_value_t = 65534)]
    gid: u32,
    /// A file or directory of the host to see read-only besides /usr and /etc; repeatable.
    #[arg(long, value_name = "HOST[:INSIDE]", value_parser = parse_bind)]
    bind: Vec<Bind>,
    /// Stop signal by number, 1 to 31.
    #[arg(long, default_value_t = 15, value_parser = clap::value_parser!(i32).range(1..=31), value_name = "N")]
    stop_signal: i32,
    /// How long stopping may take before SIGKILL.
    #[arg(long, default_value = "10s", value_parser = parse_duration, value_name = "DURATION")]
    stop_timeout: u64,
    /// What happens when it ends by itself.
    #[arg(long, default_value = "always", value_enum)]
    restart: Restart,
    /// It counts as up when this TCP port accepts.
    #[arg(long, value_name = "PORT")]
    health_port: Option<u16>,
    /// … and this HTTP path answers 2xx.
    #[arg(long, value_name = "PATH", requires = "health_port")]
    health_path: Option<String>,
    /// Memory at most, where the host delegates the controller.
    #[arg(long, value_name = "BYTES", value_parser = parse_bytes)]
    memory: Option<Bytes>,
    /// Hundredths of a processor at most, where the host delegates the controller.
    #[arg(long, value_name = "PERCENT")]
    cpu: Option<u32>,
    /// Processes and threads at most, where the host delegates the controller.
    #[arg(long, value_name = "N")]
    pids: Option<u32>,
    /// Machines of one group are not drained at the same time.
    #[arg(long)]
    group: Option<String>,
    /// A label that a worker must have to be chosen for it; repeatable. `machine move --to` is not bound by it.
    #[arg(long, value_name = "LABEL=VALUE", value_parser = parse_env)]
    needs: Vec<(String, String)>,
    /// Its number in addresses; chosen if absent.
    #[arg(long, default_value_t = 0, hide_default_value = true, value_name = "N")]
    address_index: u32,
    /// Program and arguments, the program as an absolute path.
    #[arg(last = true, required_unless_present = "spec")]
    command: Vec<String>,
}

#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Restart {
    Always,
    OnFailure,
    Never,
}

fn parse_env(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((name, value)) if !name.is_empty() => Ok((name.to_owned(), value.to_owned())),
        _ => Err("must be NAME=VALUE".to_owned()),
    }
}

fn parse_bind(text: &str) -> Result<Bind, String> {
    let (source, target) = text.split_once(':').unwrap_or((text, text));
    let (source, target) = (PathBuf::from(source), PathBuf::from(target));
    if source.is_absolute() && target.is_absolute() {
        Ok(Bind { source, target })
    } else {
        Err("must be absolute paths, HOST or HOST:INSIDE".to_owned())
    }
}

impl RunArgs {
    fn into_spec(self) -> Result<MachineSpec, Failure> {
        if let Some(path) = &self.spec {
            return read_spec(path);
        }
        let Some(id) = self.machine else {
            return Err(Failure::usage("no machine named", "neither a name nor --spec is given", "name the machine"));
        };
        Ok(MachineSpec {
            id,
            command: self.command,
            env: self.env.into_iter().collect::<BTreeMap<_, _>>(),
            uid: self.uid,
            gid: self.gid,
            volume: self.volume,
            binds: self.bind,
            stop_signal: self.stop_signal,
            stop_timeout_ms: self.stop_timeout,
            restart: match self.restart {
                Restart::Always => RestartPolicy::Always,
                Restart::OnFailure => RestartPolicy::OnFailure,
                Restart::Never => RestartPolicy::Never,
            },
            health: self.health_port.map(|port| HealthCheck { port, http_path: self.health_path }),
            limits: Limits { memory_bytes: self.memory.map(|b| b.0), cpu_percent: self.cpu, pids: self.pids },
            address_index: self.address_index,
            group: self.group,
            needs: self.needs.into_iter().collect(),
        })
    }
}

fn read_spec(path: &Path) -> Result<MachineSpec, Failure> {
    let text = std::fs::read_to_string(path).map_err(|error| {
        Failure::usage("machine's file cannot be read", format_args!("{}: {error}", path.display()), "check --spec")
    })?;
    serde_json::from_str(&text).map_err(|error| {
        Failure::usage(
            "machine's file is no machine",
            format_args!("{}: {error}", path.display()),
            "compare with the field `spec` of `decant machine show NAME -o json`",
        )
    })
}

pub(crate) fn run(command: Command, global: &Global) -> Result<Exit, Failure> {
    let mut agent = global.agent();
    match command {
        Command::Run(args) => {
            let request = RunMachine { spec: args.into_spec()? };
            show(global.output, &agent.post::<Machine>("/v1/machines", &request)?, text);
        }
        Command::List => {
            let listing: Listing<Machine> = agent.get(&path::machines(Scope::Fleet))?;
            show(global.output, &listing, |listing| {
                let rows = listing.items.iter().map(row).collect();
                let list =
                    table(["MACHINE", "WORKER", "STATE", "EPOCH", "ADDRESS", "VOLUME", "NOTE"], rows, "no machines");
                listing.unreachable.iter().fold(list, |list, worker| format!("{list}\n({worker} did not answer)"))
            });
        }
        Command::Show { machine } => show(global.output, &agent.get::<Machine>(&path::machine(&machine))?, text),
        Command::Stop { machine } => act(&mut agent, global, &machine, "stop", &Empty {})?,
        Command::Start { machine } => act(&mut agent, global, &machine, "start", &Empty {})?,
        Command::Move { machine, to, reason, protocol, any_program, detach } => {
            let request = MoveMachine { to, reason, protocol, any_program, ..MoveMachine::default() };
            let migration: Migration = agent.post(&path::machine_action(&machine, "move"), &request)?;
            return watch::migration(&mut agent, migration, global, detach);
        }
        Command::Logs { machine, tail } => {
            show(global.output, &agent.get::<Logs>(&path::logs(&machine, tail))?, |logs| logs.text.clone());
        }
        Command::Rm { machine, with_volume, force } => {
            let removed = remove(&mut agent, &machine, with_volume, force)?;
            show(global.output, &removed, Removed::text);
        }
        Command::Retry { machine } => act(&mut agent, global, &machine, "retry", &Empty {})?,
        Command::ClearVeto { machine, force } => act(&mut agent, global, &machine, "clear-veto", &Force { force })?,
        Command::ForgetOrigin { machine, force } => {
            act(&mut agent, global, &machine, "forget-origin", &Force { force })?;
        }
        Command::Reclaim { machine, force } => {
            let reclaimed: Reclaimed = agent.post(&path::machine_action(&machine, "reclaim"), &Reclaim { force })?;
            show(global.output, &reclaimed, |reclaimed| {
                format!(
                    "{} boots here from its sealed copy; {} is given up.\nLost: everything written there since {}.\n\n{}",
                    reclaimed.machine.machine,
                    reclaimed.given_up,
                    moment(reclaimed.lost_since_at_ms),
                    text(&reclaimed.machine)
                )
            });
        }
    }
    Ok(Exit::Done)
}

/// Orders something of a machine and shows it.
fn act(
    agent: &mut Agent,
    global: &Global,
    machine: &MachineId,
    action: &str,
    request: &impl Serialize,
) -> Result<(), Failure> {
    show(global.output, &agent.post::<Machine>(&path::machine_action(machine, action), request)?, text);
    Ok(())
}

/// What was removed.
#[derive(Debug, Serialize)]
struct Removed {
    removed: MachineId,
    #[serde(skip_serializing_if = "Option::is_none")]
    volume: Option<VolumeId>,
    /// What of the volume was only at its origin, where that was given up.
    #[serde(skip_serializing_if = "Option::is_none")]
    missing_bytes: Option<u64>,
}

impl Removed {
    fn text(&self) -> String {
        let volume = self.volume.as_ref().map(|volume| format!(" with its volume {volume}")).unwrap_or_default();
        let missing = self.missing_bytes.filter(|count| *count > 0);
        let missing = missing.map(|count| format!("; {} of it had not come from its origin", bytes(count)));
        format!("machine {} is removed{volume}{}", self.removed, missing.unwrap_or_default())
    }
}

fn remove(agent: &mut Agent, machine: &MachineId, with_volume: bool, force: bool) -> Result<Removed, Failure> {
    let seen: Machine = agent.get(&path::machine(machine))?;
    if let Some(volume) = seen.spec.volume.as_ref().filter(|_| !with_volume) {
        return Err(Failure::usage(
            "machine has a volume",
            format_args!("removing {machine} deletes volume {volume} and its data for good"),
            "say --with-volume if that is meant; `decant machine stop` keeps both",
        ));
    }
    // What is given up is said by whoever has it, before it is gone.
    let migration = seen.migration.filter(|_| force).map(|id| agent.get::<Migration>(&path::migration(&id)));
    let missing_bytes = migration.and_then(Result::ok).and_then(|m| m.progress).map(|progress| progress.exposure_bytes);
    agent.delete(&path::remove_machine(machine, with_volume, force))?;
    Ok(Removed { removed: machine.clone(), volume: seen.spec.volume, missing_bytes })
}

fn row(machine: &Machine) -> [String; 7] {
    let note = match (&machine.why, &machine.moved_to) {
        (Some(why), _) => why.reason.clone(),
        (None, Some(worker)) => format!("moved to {worker}"),
        (None, None) => String::new(),
    };
    [
        machine.machine.to_string(),
        machine.worker.to_string(),
        word(&machine.state),
        machine.epoch.to_string(),
        or_dash(machine.address.as_ref()),
        or_dash(machine.spec.volume.as_ref()),
        note,
    ]
}

fn text(machine: &Machine) -> String {
    let recovery = machine.recovery_point.as_ref().map(|point| match point {
        RecoveryPoint::None => "none: its data exists only here".to_owned(),
        RecoveryPoint::SealedCopy { worker, sealed_at_ms, written_bytes } => {
            let written = written_bytes.map_or_else(String::new, |count| format!(" ({} so far)", bytes(count)));
            format!("sealed copy on {worker} as of {}; later writes would be lost{written}", moment(*sealed_at_ms))
        }
        RecoveryPoint::Stateless => "stateless: nothing can be lost".to_owned(),
    });
    let exit = machine.exit.map(|exit| match (exit.status, exit.signal) {
        (Some(status), _) => format!("status {status}"),
        (None, Some(signal)) => format!("signal {signal}"),
        (None, None) => "unknown".to_owned(),
    });
    let why = machine.why.as_ref().map(|why| format!("{}; {}", why.reason, why.clears));
    fields(&[
        ("machine", machine.machine.to_string()),
        ("worker", machine.worker.to_string()),
        ("state", word(&machine.state)),
        ("waits for", why.unwrap_or_default()),
        ("epoch", machine.epoch.to_string()),
        ("address", machine.address.map(|address| address.to_string()).unwrap_or_default()),
        ("volume", machine.spec.volume.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("command", machine.spec.command.join(" ")),
        ("restarts", machine.restarts.to_string()),
        ("last exit", exit.unwrap_or_default()),
        ("migration", machine.migration.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("moved to", machine.moved_to.as_ref().map(ToString::to_string).unwrap_or_default()),
        ("recovery", recovery.unwrap_or_default()),
    ])
}
