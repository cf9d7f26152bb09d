//! `decant drain`.

use clap::{Args, Subcommand};
use decant_api::{Blocker, CreateDrain, Drain, DrainPhase, DrainSettings, Empty, Listing, path};
use decant_base::{DrainId, WorkerId};
use decant_dataplane::Protocol;

use super::output::{Output, bytes, duration, fields, moment, print, show, table};
use super::{Exit, Failure, Global, parse_duration, progress, protocols, watch};

/// `decant drain`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    subcommand_negates_reqs = true,
    after_help = "EVACUATED means that no machine runs there any more but others still read blocks from it.\n\
        DRAINED means safe to power off. Ctrl-C detaches; the drain goes on.\n\n\
        Exit status: 0 drained, 3 blocked, 4 deadline, 5 cancelled, 6 detached.\n\n\
        Examples:\n  \
        decant drain worker-1 --plan\n  \
        decant drain worker-1 worker-2 --reason 'rack 7 loses power' --deadline 30m\n  \
        decant drain watch drain-1\n  \
        decant drain set drain-1 --max 4\n  \
        decant drain resume drain-1\n  \
        decant drain -- list                a worker that is called list"
)]
pub(crate) struct DrainArgs {
    #[command(subcommand)]
    command: Option<Command>,
    #[command(flatten)]
    start: StartArgs,
}

#[derive(Debug, Args)]
struct StartArgs {
    /// Workers to empty; all are cordoned before anything moves.
    #[arg(required = true)]
    workers: Vec<WorkerId>,
    /// Only show places, bytes, time and every blocker.
    #[arg(long)]
    plan: bool,
    /// Only to this worker.
    #[arg(long, value_name = "WORKER")]
    to: Option<WorkerId>,
    /// Move what can move even if other machines are blocked.
    #[arg(long)]
    partial: bool,
    /// Machines that move at the same time.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
    max: Option<u32>,
    /// Why, for the event log and whoever finds the worker cordoned.
    #[arg(long, default_value = "")]
    reason: String,
    /// Destinations need not have the very program that a machine was started from.
    #[arg(long)]
    any_program: bool,
    /// Do not watch; exits with 6.
    #[arg(long)]
    detach: bool,
    /// After this long start no more moves and take back those that are not past their commit point; exits with 4.
    #[arg(long, value_name = "DURATION", value_parser = parse_duration)]
    deadline: Option<u64>,
    /// What the volumes travel over: NBD over mutual TLS, or iSCSI where both workers trust the network
    /// (iscsi.trusted_networks).
    #[arg(long, default_value = "nbd", value_parser = protocols())]
    protocol: Protocol,
    /// The drain's name, so that repeating the command does not start a second one.
    #[arg(long, value_name = "NAME")]
    id: Option<DrainId>,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// All drains that the agent remembers.
    #[command(alias = "ls")]
    List,
    /// One drain.
    Show {
        /// Which.
        drain: DrainId,
    },
    /// Follow a drain to its end. Ctrl-C detaches; the drain goes on.
    Watch {
        /// Which.
        drain: DrainId,
    },
    /// Start no more moves and take back those not yet handed over.
    Cancel {
        /// Which.
        drain: DrainId,
    },
    /// Let a blocked drain look again and try again now: the cause is gone.
    #[command(after_help = "Example:\n  decant drain resume drain-1")]
    Resume {
        /// Which.
        drain: DrainId,
    },
    /// Change a running drain.
    #[command(after_help = "Example:\n  decant drain set drain-1 --max 4")]
    Set {
        /// Which.
        drain: DrainId,
        /// Machines that move at the same time; those under way go on.
        #[arg(long, value_name = "N", value_parser = clap::value_parser!(u32).range(1..=1000))]
        max: u32,
    },
}

pub(crate) fn run(args: DrainArgs, global: &Global) -> Result<Exit, Failure> {
    let mut agent = global.agent();
    match args.command {
        None => start(&mut agent, args.start, global),
        Some(Command::List) => {
            let listing: Listing<Drain> = agent.get(&path::drains())?;
            show(global.output, &listing, |listing| {
                let rows = listing.items.iter().map(row).collect();
                let list = table(["DRAIN", "WORKERS", "PHASE", "MACHINES", "STARTED", "REASON"], rows, "no drains");
                listing.unreachable.iter().fold(list, |list, worker| format!("{list}\n({worker} did not answer)"))
            });
            Ok(Exit::Done)
        }
        Some(Command::Show { drain }) => {
            show(global.output, &agent.get::<Drain>(&path::drain(&drain))?, text);
            Ok(Exit::Done)
        }
        Some(Command::Watch { drain }) => {
            let drain = agent.get(&path::drain(&drain))?;
            watch::drain(&mut agent, drain, global, false)
        }
        Some(Command::Cancel { drain }) => {
            show(global.output, &agent.post::<Drain>(&path::cancel_drain(&drain), &Empty {})?, text);
            Ok(Exit::Done)
        }
        Some(Command::Resume { drain }) => {
            show(global.output, &agent.post::<Drain>(&path::resume_drain(&drain), &Empty {})?, text);
            Ok(Exit::Done)
        }
        Some(Command::Set { drain, max }) => {
            let settings = DrainSettings { max: Some(max) };
            show(global.output, &agent.post::<Drain>(&path::drain_settings(&drain), &settings)?, text);
            Ok(Exit::Done)
        }
    }
}

fn start(agent: &mut super::Agent, args: StartArgs, global: &Global) -> Result<Exit, Failure> {
    let StartArgs { workers, plan, to, partial, max, reason, any_program, detach, deadline, protocol, id } = args;
    let request = CreateDrain {
        drain: id,
        workers,
        plan_only: plan,
        to,
        partial,
        max,
        reason,
        deadline_ms: deadline,
        protocol,
        any_program,
    };
    let drain: Drain = agent.post("/v1/drains", &request)?;
    if plan {
        show(global.output, &drain, text);
        return Ok(if drain.blockers.is_empty() { Exit::Done } else { Exit::Blocked });
    }
    if global.output == Output::Table {
        print(&started(&drain));
    }
    watch::drain(agent, drain, global, detach)
}

/// The first line of a drain; its plan may come a moment later.
fn started(drain: &Drain) -> String {
    let count = drain.machines.len();
    if count == 0 {
        return format!("drain {} has started", drain.drain);
    }
    let total: u64 =
        drain.machines.iter().filter_map(|machine| machine.planned.as_ref()).map(|plan| plan.bytes.0).sum();
    let machines = if count == 1 { "machine" } else { "machines" };
    format!("drain {} has started: {count} {machines}, {} allocated", drain.drain, bytes(total))
}

fn row(drain: &Drain) -> [String; 6] {
    [
        drain.drain.to_string(),
        drain.workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", "),
        super::output::word(&drain.phase),
        drain.machines.len().to_string(),
        moment(drain.started_at_ms),
        drain.reason.clone(),
    ]
}

/// A drain for people.
pub(crate) fn text(drain: &Drain) -> String {
    let mut text = fields(&[
        ("drain", drain.drain.to_string()),
        ("workers", drain.workers.iter().map(ToString::to_string).collect::<Vec<_>>().join(", ")),
        ("reason", drain.reason.clone()),
        ("state", progress::drain_line(drain)),
        ("at once", format!("{} of each worker", drain.max)),
        ("started", moment(drain.started_at_ms)),
        ("evacuated", drain.evacuated_ms.map(|ms| format!("after {}", duration(ms))).unwrap_or_default()),
        ("drained", drain.drained_ms.map(|ms| format!("after {}", duration(ms))).unwrap_or_default()),
        ("deadline", drain.deadline_at_ms.map(moment).unwrap_or_default()),
    ]);
    let machines =
        if drain.phase == DrainPhase::Planned { plan_lines(drain) } else { progress::drain_machine_lines(drain) };
    for line in machines {
        text.push_str(&format!("\n  {line}"));
    }
    for blocker in &drain.blockers {
        text.push_str(&format!("\n{}", blocker_text(blocker)));
    }
    text
}

fn plan_lines(drain: &Drain) -> Vec<String> {
    let line = |machine: &decant_api::DrainMachine| match &machine.planned {
        Some(plan) => {
            let time = plan.eta.map(|eta| format!(", in {}", progress::range(eta))).unwrap_or_default();
            format!("{}  {} -> {}, at most {}{time}", machine.machine, plan.source, plan.destination, plan.bytes)
        }
        None => format!("{}  no place", machine.machine),
    };
    drain.machines.iter().map(line).collect()
}

/// A blocker: what, why, and what to do.
pub(crate) fn blocker_text(blocker: &Blocker) -> String {
    let subject = match &blocker.machine {
        Some(machine) => format!("{machine} on {}", blocker.worker),
        None => blocker.worker.to_string(),
    };
    format!("blocked: {subject}: {}\n  cause: {}\n  fix:   {}", blocker.name, blocker.cause, blocker.fix)
}
