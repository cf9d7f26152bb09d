//! The thread that steps.

use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, RecvTimeoutError};
use std::thread::JoinHandle;

use decant_base::{DrainId, MachineId, WorkerId};
use decant_drain::drain::{DrainEffect, DrainEvent, DrainOrder, DrainRow, DrainState, MigrationNews, drain_step};
use decant_drain::migration::{Back, Migration, Phase};
use decant_drain::{Denied, Effect, Event, POINTS, Row, Sync, decline, step};
use decant_fsm::{ApplyError, Change, Journal, JournalError, LogEntry, Points, Write};
use tokio::sync::mpsc::UnboundedSender;
use tokio::sync::{oneshot, watch};

use crate::clock::Clock;
use crate::core::admission::Admission;
use crate::core::lanes::{self, About, Lanes, Work, World};
use crate::core::timers::{Subject, Timers};
use crate::core::{Cordoned, Core, Errand, Input, Outgoing, Refusal, Snapshot, WorkerRow, line};

/// What the core is made of.
pub(crate) struct Parts {
    pub(crate) worker: WorkerId,
    pub(crate) journal: Arc<Journal>,
    pub(crate) rows: Arc<Snapshot>,
    pub(crate) clock: Arc<Clock>,
    pub(crate) admission: Arc<Admission>,
    pub(crate) world: World,
    /// Messages to peers.
    pub(crate) outgoing: UnboundedSender<Outgoing>,
    /// Errands of drains.
    pub(crate) errands: UnboundedSender<Errand>,
    /// Set once the journal has failed: why. The agent then ends; machines run on.
    pub(crate) failed: watch::Sender<Option<String>>,
    /// Machines that run here and are not this worker's; they are killed before anything else is done with them.
    pub(crate) survivors: Vec<MachineId>,
}

/// Reads every row.
pub(crate) fn load(journal: &Journal) -> Result<Snapshot, JournalError> {
    let machines = journal.rows::<Row>("machine/")?.into_iter().map(|(_, row)| row).collect();
    let drains = journal.rows::<DrainRow>("drain/")?.into_iter().map(|(_, row)| row).collect();
    Ok(Snapshot::new(machines, drains, journal.row(WORKER_KEY)?.unwrap_or_default()))
}

const WORKER_KEY: &str = "worker/self";

/// Starts the core: every row is told that the agent has started, survivors are killed first.
pub(crate) fn start(parts: Parts) -> std::io::Result<(Core, JoinHandle<()>)> {
    let (sender, inputs) = mpsc::channel();
    let core = Core { inputs: sender };
    for row in parts.rows.machines().iter().filter(|row| !parts.survivors.contains(&row.machine)) {
        core.event(&row.machine, Event::Restarted);
    }
    for row in parts.rows.drains() {
        core.drain_event(&row.order.drain, DrainEvent::Restarted);
    }
    let mut lanes = Lanes::new(parts.world.clone(), core.clone());
    for machine in &parts.survivors {
        lanes.add(machine, vec![Work::Kill]);
    }
    let stepper = Stepper { parts, lanes, timers: Timers::default() };
    let thread = std::thread::Builder::new().name("core".to_owned()).spawn(move || stepper.run(&inputs))?;
    Ok((core, thread))
}

struct Stepper {
    parts: Parts,
    lanes: Lanes,
    timers: Timers,
}

/// The journal failed: nothing is decided any more.
struct Dead;

impl Stepper {
    fn run(mut self, inputs: &Receiver<Input>) {
        loop {
            let now_ms = self.parts.clock.now_ms();
            if let Some(subject) = self.timers.take_due(now_ms) {
                if self.wake(subject).is_err() {
                    break;
                }
                continue;
            }
            let input = match inputs.recv_timeout(self.timers.idle(now_ms)) {
                Ok(Input::End) | Err(RecvTimeoutError::Disconnected) => return,
                Ok(input) => input,
                Err(RecvTimeoutError::Timeout) => continue,
            };
            if self.take(input).is_err() {
                break;
            }
        }
        // Every reply that still comes in is dropped with the receiver, and its asker learns that the agent is ending.
    }

    fn wake(&mut self, subject: Subject) -> Result<(), Dead> {
        match subject {
            Subject::Machine(machine) => self.machine(&machine, Event::Wake, None),
            Subject::Drain(drain) => self.drain(&drain, DrainEvent::Wake),
        }
    }

    fn take(&mut self, input: Input) -> Result<(), Dead> {
        match input {
            Input::Machine { machine, event, reply } => self.machine(&machine, *event, reply),
            Input::Drain { drain, event, reply } => {
                self.drain(&drain, *event)?;
                // One whose journal failed is dropped, and its asker learns that the agent is ending.
                reply.map_or(Ok(()), |reply| {
                    let _ = reply.send(Ok(()));
                    Ok(())
                })
            }
            Input::StartDrain { order, reply } => self.start_drain(*order, reply),
            Input::Cordon { cordon, reply } => self.cordon(cordon, reply),
            Input::Note(entry) => self.note(*entry),
            Input::Survivor { machine } => self.survivor(&machine),
            Input::End => Ok(()),
        }
    }

    fn survivor(&mut self, machine: &MachineId) -> Result<(), Dead> {
        tracing::warn!(%machine, "killed: it ran here, but this worker does not own it");
        if self.parts.rows.machine(machine).is_some() { self.machine(machine, Event::Restarted, None) } else { Ok(()) }
    }

    fn machine(
        &mut self,
        machine: &MachineId,
        event: Event,
        reply: Option<oneshot::Sender<Result<Arc<Row>, Refusal>>>,
    ) -> Result<(), Dead> {
        if self.is_declined(&event) {
            return Ok(());
        }
        let now_ms = self.parts.clock.now_ms();
        let worker = self.parts.worker.clone();
        let word = line::word(&event);
        let applied = self.parts.journal.apply(&format!("machine/{machine}"), |row: Option<Row>| {
            let old = row.unwrap_or_else(|| Row::new(machine.clone(), worker));
            let step = step(&old, event, now_ms)?;
            let points = Some(Points { before: step.point.before, after: step.point.after });
            let (durable, log) = (step.sync == Sync::Now, line::of_machine(&old, &word, &step.row, now_ms));
            let write = if step.sync == Sync::Unchanged { Write::Keep } else { Write::Put(step.row.clone()) };
            Ok(Change { row: write, durable, log, points, then: (old, step) })
        });
        let (old, step) = match applied {
            Ok(done) => done,
            Err(error) => return self.refuse(machine, &word, error, reply),
        };
        let row = Arc::new(step.row);
        if step.sync != Sync::Unchanged {
            tracing::debug!(%machine, event = %word, from = old.state.name(), to = row.state.name(), life = ?row.life, "step");
            self.parts.rows.put_machine(row.clone());
        }
        self.perform(&row, step.effects);
        if let Some(reply) = reply {
            let _ = reply.send(Ok(row.clone()));
        }
        self.tell_drain(&old, &row)
    }

    /// A `Prepare` that this worker does not even consider is answered here and changes nothing.
    fn is_declined(&self, event: &Event) -> bool {
        let Event::Received { from, message } = event else { return false };
        let Some(reason) = self.parts.admission.refusal(&self.parts.rows, message) else { return false };
        let Some(answer) = decline(message, &format!("{} declines: {reason}", self.parts.worker)) else { return false };
        tracing::info!(machine = %message.machine, migration = %message.migration, %reason, "declined");
        let _ = self.parts.outgoing.send(Outgoing { to: from.clone(), message: Box::new(answer) });
        true
    }

    fn refuse(
        &self,
        machine: &MachineId,
        word: &str,
        error: ApplyError<Denied>,
        reply: Option<oneshot::Sender<Result<Arc<Row>, Refusal>>>,
    ) -> Result<(), Dead> {
        let denied = match error {
            ApplyError::Denied(denied) => denied,
            ApplyError::Journal(error) => {
                let dead = self.die(&error);
                if let Some(reply) = reply {
                    let _ = reply.send(Err(Refusal::Down(error.to_string())));
                }
                return Err(dead);
            }
        };
        match &denied {
            Denied::Unawaited => tracing::trace!(%machine, event = word, "nobody waits for it"),
            denied => tracing::info!(%machine, event = word, %denied, "denied"),
        }
        if let Some(reply) = reply {
            let _ = reply.send(Err(denied.into()));
        }
        Ok(())
    }

    fn die(&self, error: &JournalError) -> Dead {
        tracing::error!(%error, "the agent ends; machines run on");
        self.parts.failed.send_replace(Some(error.to_string()));
        Dead
    }

    /// Hands the effects out, in order.
    fn perform(&mut self, row: &Row, effects: Vec<Effect>) {
        let offered = row.migration.as_ref().map(|migration| migration.epoch);
        let claim = row.state.owned().or(offered).unwrap_or_default();
        let address_index =
            row.spec.as_ref().and_then(|spec| lanes::read_spec(spec).ok()).map(|spec| spec.address_index);
        let about = About { claim, address_index, volume: row.volume.clone() };
        let mut batch = Vec::new();
        for effect in effects {
            match effect {
                Effect::Plane(_) | Effect::Machine(_) => {
                    batch.push(Work::Effect { effect: Box::new(effect), about: about.clone() })
                }
                Effect::Send { to, message } => {
                    let _ = self.parts.outgoing.send(Outgoing { to, message });
                }
                Effect::Wake { at_ms } => self.timers.set(Subject::Machine(row.machine.clone()), at_ms),
            }
        }
        self.lanes.add(&row.machine, batch);
    }

    /// A drain wants to know whenever one of its migrations has changed.
    fn tell_drain(&mut self, old: &Row, new: &Row) -> Result<(), Dead> {
        let Some(migration) = &new.migration else { return Ok(()) };
        let Some(drain) = migration.drain.clone().filter(|drain| self.parts.rows.drain(drain).is_some()) else {
            return Ok(());
        };
        let news = news(new, migration);
        if old.migration.as_ref().is_some_and(|was| news == self::news(old, was)) {
            return Ok(());
        }
        self.drain(&drain, DrainEvent::News(news))
    }

    fn drain(&mut self, drain: &DrainId, event: DrainEvent) -> Result<(), Dead> {
        let is_restart = matches!(event, DrainEvent::Restarted);
        let now_ms = self.parts.clock.now_ms();
        let word = line::drain_word(&event);
        let applied = self.parts.journal.apply::<_, _, std::convert::Infallible>(
            &format!("drain/{drain}"),
            |row: Option<DrainRow>| {
                let Some(old) = row else { return Ok(keep(None)) };
                let step = drain_step(&old, event, now_ms);
                let log = line::of_drain(&old, word, &step.row, now_ms);
                let points = points_of(step.row.state);
                let write = if step.sync == Sync::Unchanged { Write::Keep } else { Write::Put(step.row.clone()) };
                Ok(Change { row: write, durable: step.sync == Sync::Now, log, points, then: Some(step) })
            },
        );
        let step = match applied {
            Ok(step) => step,
            Err(ApplyError::Denied(never)) => match never {},
            Err(ApplyError::Journal(error)) => return Err(self.die(&error)),
        };
        let Some(step) = step else { return Ok(()) };
        let row = Arc::new(step.row);
        if step.sync != Sync::Unchanged {
            self.parts.rows.put_drain(row.clone());
        }
        self.perform_drain(&row, step.effects);
        if is_restart { self.retell(drain) } else { Ok(()) }
    }

    fn perform_drain(&mut self, row: &Arc<DrainRow>, effects: Vec<DrainEffect>) {
        for effect in effects {
            match effect {
                DrainEffect::Wake { at_ms } => self.timers.set(Subject::Drain(row.order.drain.clone()), at_ms),
                effect => {
                    let _ = self.parts.errands.send(Errand { row: row.clone(), effect });
                }
            }
        }
    }

    /// News that a crash may have kept from the drain: every one is told again.
    fn retell(&mut self, drain: &DrainId) -> Result<(), Dead> {
        for row in self.parts.rows.machines() {
            if let Some(migration) = row.migration.as_ref().filter(|migration| migration.drain.as_ref() == Some(drain))
            {
                self.drain(drain, DrainEvent::News(news(&row, migration)))?;
            }
        }
        Ok(())
    }

    fn start_drain(
        &mut self,
        order: DrainOrder,
        reply: oneshot::Sender<Result<Arc<DrainRow>, Refusal>>,
    ) -> Result<(), Dead> {
        let id = order.drain.clone();
        let now_ms = self.parts.clock.now_ms();
        let was_cordoned = self.parts.rows.worker().cordoned.is_some();
        let worker = self.parts.worker.clone();
        let applied = self.parts.journal.apply::<_, _, std::convert::Infallible>(
            &format!("drain/{id}"),
            |row: Option<DrainRow>| {
                if row.is_some() {
                    return Ok(keep(None));
                }
                let new = DrainRow::new(order, worker, was_cordoned, now_ms);
                let log = line::of_drain(&new, "ordered", &new, now_ms);
                let points = points_of(new.state);
                Ok(Change { row: Write::Put(new.clone()), durable: true, log, points, then: Some(new) })
            },
        );
        match applied {
            Ok(Some(row)) => self.parts.rows.put_drain(Arc::new(row)),
            Ok(None) => {}
            Err(ApplyError::Denied(never)) => match never {},
            Err(ApplyError::Journal(error)) => {
                let dead = self.die(&error);
                let _ = reply.send(Err(Refusal::Down(error.to_string())));
                return Err(dead);
            }
        }
        self.drain(&id, DrainEvent::Restarted)?;
        if let Some(row) = self.parts.rows.drain(&id) {
            let _ = reply.send(Ok(row));
        }
        Ok(())
    }

    fn cordon(
        &mut self,
        cordon: Option<Cordoned>,
        reply: Option<oneshot::Sender<Result<(), Refusal>>>,
    ) -> Result<(), Dead> {
        let now_ms = self.parts.clock.now_ms();
        let worker = self.parts.worker.clone();
        let applied =
            self.parts.journal.apply::<_, _, std::convert::Infallible>(WORKER_KEY, |row: Option<WorkerRow>| {
                let old = row.unwrap_or_default();
                if old.cordoned.is_some() == cordon.is_some() && cordon.as_ref().is_none_or(|new| new.drain.is_none()) {
                    return Ok(keep(None));
                }
                let (kind, message) = match &cordon {
                    Some(cordon) => ("worker.cordoned", format!("{worker} takes no new machines: {}", cordon.reason)),
                    None => ("worker.uncordoned", format!("{worker} takes machines")),
                };
                let detail = line::Detail { kind: kind.to_owned(), message, ..line::Detail::default() };
                let log = Some(detail.note(format!("worker/{worker}"), now_ms));
                let new = WorkerRow { cordoned: cordon };
                Ok(Change { row: Write::Put(new.clone()), durable: true, log, points: None, then: Some(new) })
            });
        let result = match applied {
            Ok(Some(row)) => {
                self.parts.rows.put_worker(row);
                Ok(())
            }
            Ok(None) => Ok(()),
            Err(ApplyError::Denied(never)) => match never {},
            Err(ApplyError::Journal(error)) => Err(error),
        };
        let outcome = result.as_ref().copied().map_err(|error| Refusal::Down(error.to_string()));
        if let Some(reply) = reply {
            let _ = reply.send(outcome);
        }
        result.map_err(|error| self.die(&error))
    }

    fn note(&mut self, entry: LogEntry) -> Result<(), Dead> {
        let applied = self.parts.journal.apply::<(), (), std::convert::Infallible>("note", |_| {
            Ok(Change { row: Write::Keep, durable: false, log: Some(entry), points: None, then: () })
        });
        match applied {
            Ok(()) => {
                self.parts.rows.touch();
                Ok(())
            }
            Err(ApplyError::Denied(never)) => match never {},
            Err(ApplyError::Journal(error)) => Err(self.die(&error)),
        }
    }
}

fn keep<R, T>(then: T) -> Change<R, T> {
    Change { row: Write::Keep, durable: false, log: None, points: None, then }
}

/// The crash points of a drain's commit.
fn points_of(state: DrainState) -> Option<Points> {
    let point = POINTS.iter().find(|point| {
        let name = point.before.strip_prefix("journal:drain:").and_then(|name| name.strip_suffix(":before"));
        name == Some(state.name())
    })?;
    Some(Points { before: point.before, after: point.after })
}

/// How a migration stands, as its drain is told.
fn news(row: &Row, migration: &Migration) -> MigrationNews {
    let reason = match &migration.back {
        Some(Back::Failed { step, reason, .. }) => format!("{step}: {reason}"),
        Some(Back::Cancelled) => "cancelled".to_owned(),
        Some(Back::Reclaimed) => "reclaimed".to_owned(),
        None => String::new(),
    };
    let committed = migration.accepted || (migration.phase >= Phase::Granted && migration.phase <= Phase::Cleaned);
    MigrationNews {
        machine: row.machine.clone(),
        migration: migration.id.clone(),
        phase: migration.phase,
        reason,
        committed,
    }
}
