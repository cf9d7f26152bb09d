//! The row while an event is stepped, and what the handlers have in common.

use decant_base::{Epoch, MigrationId, WorkerId};
use decant_dataplane::{Command, Failure, FailureCode};
use decant_fsm::Backoff;

use crate::handoff::State;
use crate::migration::{Back, Migration, Phase, Role};
use crate::points::Point;
use crate::row::{Desired, Life, Row};
use crate::vocabulary::{Body, Denied, Effect, MachineCommand, Message, Step, Sync};
use crate::wait;
use crate::{destination, source};

/// A step in the making.
pub(crate) struct Draft {
    pub(crate) row: Row,
    pub(crate) effects: Vec<Effect>,
    pub(crate) now_ms: u64,
}

/// What to do about a failure that does not pass by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Otherwise {
    /// Go back.
    Unwind,
    /// Wait for a person.
    Stuck,
}

/// What a failure of one step leads to.
#[derive(Debug, Clone, Copy)]
pub(crate) struct OnFailure {
    /// The step's stable word.
    pub(crate) step: &'static str,
    /// Between passing failures.
    pub(crate) backoff: Backoff,
    /// After refusal.
    pub(crate) refused: Otherwise,
    /// When a person is needed.
    pub(crate) stuck: Otherwise,
    /// Passing failures are passing no more after this time, with what then.
    pub(crate) deadline: Option<(u64, Otherwise)>,
}

impl Draft {
    pub(crate) fn new(row: &Row, now_ms: u64) -> Self {
        Self { row: row.clone(), effects: Vec::new(), now_ms }
    }

    /// The migration under way here, in `role`.
    pub(crate) fn migration_as(&mut self, role: Role) -> Option<&mut Migration> {
        self.row.migration.as_mut().filter(|migration| migration.role == role && !migration.phase.is_over())
    }

    /// The migration, if it is `id` in `role`, over or not.
    pub(crate) fn migration_is(&self, role: Role, id: &MigrationId) -> Option<&Migration> {
        self.row.migration.as_ref().filter(|migration| migration.role == role && migration.id == *id)
    }

    pub(crate) fn plane(&mut self, command: Command) {
        self.effects.push(Effect::Plane(command));
    }

    pub(crate) fn machine(&mut self, command: MachineCommand) {
        self.effects.push(Effect::Machine(command));
    }

    /// Answers a message, or says something about a migration that this row may not know.
    pub(crate) fn reply(&mut self, to: &WorkerId, about: &Message, body: Body) {
        let (machine, migration, epoch) = (about.machine.clone(), about.migration.clone(), about.epoch);
        let message = Box::new(Message { machine, migration, epoch, body });
        self.effects.push(Effect::Send { to: to.clone(), message });
    }

    /// Says something to the other end of the migration.
    pub(crate) fn tell(&mut self, body: Body) {
        if let Some(migration) = &self.row.migration {
            let effect = send(&self.row, migration, body);
            self.effects.push(effect);
        }
    }

    /// Enters `phase`, with the name of what is awaited in it.
    pub(crate) fn enter(&mut self, phase: Phase) {
        let now_ms = self.now_ms;
        let machine = &self.row.machine;
        if let Some(migration) = &mut self.row.migration {
            migration.phase = phase;
            let since_ms = *migration.entered_ms.entry(phase).or_insert(now_ms);
            migration.wait = match migration.role {
                Role::Source => source::wait(machine, migration, since_ms),
                Role::Destination => destination::wait(machine, migration, since_ms),
            };
        }
    }

    /// Goes through `phase` without resting in it: its time is noted.
    pub(crate) fn pass(&mut self, phase: Phase) {
        let now_ms = self.now_ms;
        if let Some(migration) = &mut self.row.migration {
            migration.entered_ms.entry(phase).or_insert(now_ms);
        }
    }

    /// Performs what the migration's phase wants.
    pub(crate) fn drive_migration(&mut self) {
        let effects = migration_effects(&self.row);
        self.effects.extend(effects);
    }

    /// Notes that the migration's message was sent: if no answer comes, again later.
    pub(crate) fn expect_answer(&mut self, backoff: Backoff) {
        let now_ms = self.now_ms;
        if let Some(migration) = &mut self.row.migration
            && let Some(wait) = &mut migration.wait
        {
            wait.retry_ms = Some(now_ms.saturating_add(backoff.delay_ms(migration.id.as_str(), wait.attempts + 1)));
        }
    }

    /// A step of the migration failed: again, back, or stuck.
    pub(crate) fn migration_failed(&mut self, failure: &Failure, then: OnFailure) {
        let now_ms = self.now_ms;
        let Some(migration) = &mut self.row.migration else { return };
        let otherwise = match failure.code {
            FailureCode::Retry | FailureCode::NotYet => match then.deadline {
                Some((at, otherwise)) if at <= now_ms => Some(otherwise),
                _ => None,
            },
            FailureCode::Refused => Some(then.refused),
            FailureCode::Stuck => Some(then.stuck),
        };
        match otherwise {
            None => {
                let name = migration.id.as_str().to_owned();
                wait::retry(&mut migration.wait, then.step, failure, then.backoff, &name, now_ms);
            }
            Some(Otherwise::Stuck) => {
                let clears = format!(
                    "somebody removes the cause and orders `decant machine retry {}`, or cancels while that is possible",
                    self.row.machine
                );
                wait::stuck(&mut migration.wait, then.step, &failure.message, &clears, now_ms);
            }
            Some(Otherwise::Unwind) => {
                let passing = matches!(failure.code, FailureCode::Retry | FailureCode::NotYet);
                let (step, reason) = (then.step.to_owned(), failure.message.clone());
                let back = Back::Failed { step, reason, passing };
                match migration.role {
                    Role::Source => source::unwind(self, back),
                    Role::Destination => destination::unwind(self, back),
                }
            }
        }
    }

    /// Notes a claim of `epoch` by somebody else: nothing boots here any more until a person has looked.
    pub(crate) fn veto(&mut self, epoch: Epoch, by: &WorkerId) {
        // What is being removed nobody boots here: another's claim does no harm, and must not keep it from going.
        let is_going = self.row.desired == Desired::Removed;
        if is_going || self.row.veto.as_ref().is_some_and(|(seen, _)| *seen >= epoch) {
            return;
        }
        self.row.veto = Some((epoch, by.clone()));
        let reason = format!(
            "{by} claims this machine at epoch {epoch}, not below the one here: this worker's journal may be an old copy"
        );
        let clears = format!(
            "the machine is removed here, or somebody makes sure that nobody else has it and orders `decant machine clear-veto {} --force`",
            self.row.machine
        );
        wait::stuck(&mut self.row.wait, "higher-epoch", &reason, &clears, self.now_ms);
    }

    /// Ends the step.
    pub(crate) fn finish(mut self, before: &Row, rearm: bool) -> Result<Step, Denied> {
        let wake = next_wake(&self.row);
        if let Some(at_ms) = wake
            && (rearm || wake != next_wake(before))
        {
            self.effects.push(Effect::Wake { at_ms });
        }
        debug_assert_eq!(self.row.check(), Ok(()), "{:#?}", self.row);
        let point = point(before, &self.row);
        let sync = sync(before, &self.row);
        Ok(Step { row: self.row, sync, point, effects: self.effects })
    }
}

/// A message to the other end.
pub(crate) fn send(row: &Row, migration: &Migration, body: Body) -> Effect {
    let (machine, id) = (row.machine.clone(), migration.id.clone());
    let message = Box::new(Message { machine, migration: id, epoch: migration.epoch, body });
    Effect::Send { to: migration.peer.clone(), message }
}

/// What the migration's phase wants done.
pub(crate) fn migration_effects(row: &Row) -> Vec<Effect> {
    match &row.migration {
        Some(migration) if migration.role == Role::Source => source::effects(row, migration),
        Some(migration) => destination::effects(row, migration),
        None => Vec::new(),
    }
}

/// When the row must be looked at again by itself.
pub(crate) fn next_wake(row: &Row) -> Option<u64> {
    let migration = row.migration.as_ref();
    let retries = [row.wait.as_ref(), migration.and_then(|m| m.wait.as_ref())];
    let retries = retries.into_iter().flatten().filter_map(|wait| wait.retry_ms);
    let deadline = migration.and_then(source::prepare_deadline);
    let under_way = migration.is_some_and(|m| !m.phase.is_over());
    // A copy whose removal failed waits in `row.wait` like everything else.
    let expiry = row.copy.as_ref().filter(|_| !under_way && row.wait.is_none()).map(|copy| copy.expires_ms);
    retries.chain(deadline).chain(expiry).min()
}

fn point(before: &Row, after: &Row) -> Point {
    let key = |row: &Row| row.migration.as_ref().map(|m| (m.id.clone(), m.role, m.phase, m.back.clone()));
    match &after.migration {
        Some(migration) if key(before) != key(after) => Point::of_phase(migration.role, migration.phase),
        _ => Point::of_life(after.life),
    }
}

/// What of a row must not be lost. The rest is learned again by repeating effects: how far the machine is, waits, and
/// the phases that an older one leads to again without harm.
fn durable_part(row: &Row) -> Row {
    let mut row = Row { life: Life::Down, device: None, wait: None, ..row.clone() };
    if let Some(migration) = &mut row.migration {
        migration.wait = None;
        migration.entered_ms.clear();
        migration.local_done = false;
        migration.peer_done = false;
        migration.phase = match (migration.role, migration.phase) {
            (Role::Source, Phase::Stopped) => Phase::Prepared,
            (Role::Source, Phase::Booted | Phase::Hydrating) => Phase::Granted,
            (Role::Destination, Phase::Booted | Phase::Hydrating) => {
                migration.begun = false;
                migration.seal = None;
                Phase::Granted
            }
            (_, phase) => phase,
        };
        if migration.role == Role::Destination && migration.phase == Phase::Granted {
            migration.begun = false;
            migration.seal = None;
        }
    }
    row
}

fn sync(before: &Row, after: &Row) -> Sync {
    if before == after {
        Sync::Unchanged
    } else if durable_part(before) == durable_part(after) {
        Sync::Later
    } else {
        Sync::Now
    }
}

/// The refusal of an order that only the owner can carry out.
pub(crate) fn not_owner(row: &Row) -> Denied {
    let hint = match (&row.went, &row.state) {
        (_, State::Sealed { to, .. }) => format!(": it is being handed to {to}; ask there"),
        (Some(went), _) => format!(": it went to {}; ask there", went.to),
        (None, _) => String::new(),
    };
    Denied::NotOwner { worker: row.worker.clone(), state: row.state.name().to_owned(), hint }
}
