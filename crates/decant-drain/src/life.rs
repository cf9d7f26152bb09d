//! The machine on the worker that owns it: up or down, as desired.
//!
//! ```text
//!            Attached            Started
//!   down ─────────────▶ starting ───────▶ up
//!    ▲  ▲                  │ failed: down, again later
//!    │  └──────────────────┘               │ not desired any more
//!    │ Detached            Stopped         ▼
//!   detaching ◀──────────────────────── stopping
//! ```
//!
//! Only a worker that [`may_run`] does any of this; a migration that stops the machine does so in its own phases.

use decant_base::Epoch;
use decant_dataplane::{Command, Failure, FailureCode, Outcome};

use crate::draft::Draft;
use crate::handoff::State;
use crate::migration::{Phase, Role};
use crate::row::{Desired, Life, Row};
use crate::vocabulary::{Denied, Effect, MachineCommand};
use crate::wait::{self, BOOT, LOCAL};
use crate::{destination, wait::Wait};

/// Whether this worker may run the machine now, and at which epoch. A higher epoch that was seen forbids it; nothing
/// that was seen permits it.
pub fn may_run(row: &Row) -> Option<Epoch> {
    if row.veto.is_some() {
        return None;
    }
    let phase = |role| row.migration.as_ref().filter(|m| m.role == role && !m.phase.is_over());
    match &row.state {
        // The migration is about to stop it, or has.
        State::Moving { .. } if phase(Role::Source).is_none_or(|m| m.phase != Phase::Planned) => None,
        // The sealed volume is not ours again before its export is closed.
        State::Active { .. }
            if phase(Role::Source).is_some_and(|m| m.phase == Phase::Unwinding && m.begun && !m.local_done) =>
        {
            None
        }
        // The clone is not there before it was begun.
        State::Active { .. } if phase(Role::Destination).is_some_and(|m| !m.begun) => None,
        state => state.owned(),
    }
}

/// Whether the clone must be attached to go on filling, up or down.
fn is_filling(row: &Row) -> bool {
    row.volume.is_some()
        && row.migration.as_ref().is_some_and(|m| {
            m.role == Role::Destination && m.begun && m.phase >= Phase::Granted && m.phase < Phase::Verified
        })
}

/// What the machine's life wants done.
pub(crate) fn effects(row: &Row) -> Vec<Effect> {
    let Some(epoch) = may_run(row) else { return Vec::new() };
    let machine = row.machine.clone();
    let up = row.desired == Desired::Running;
    match (row.life, &row.volume) {
        (Life::Down, Some(volume)) if row.device.is_none() && (up || is_filling(row)) => {
            vec![Effect::Plane(Command::Attach { volume: volume.clone() })]
        }
        (Life::Down | Life::Starting, _) if up => vec![Effect::Machine(MachineCommand::Start {
            machine,
            epoch,
            spec: row.spec.clone().unwrap_or_default(),
            device: row.device.clone(),
        })],
        (Life::Down, volume) if row.desired == Desired::Removed => {
            let discard = Effect::Machine(MachineCommand::Discard { machine });
            let delete = volume.clone().map(|volume| Effect::Plane(Command::Delete { volume }));
            std::iter::once(discard).chain(delete).collect()
        }
        (Life::Up, _) if up => Vec::new(),
        (Life::Starting | Life::Up | Life::Stopping, _) => vec![Effect::Machine(MachineCommand::Stop { machine })],
        (Life::Detaching, Some(volume)) => vec![Effect::Plane(Command::Detach { volume: volume.clone() })],
        (Life::Down | Life::Detaching, _) => Vec::new(),
    }
}

/// The machine is in this worker's hands again, and next to nothing is known of it: whatever runs is told to stop if it
/// is to be down, and taken over by its start if it is to be up.
pub(crate) fn resume(draft: &mut Draft) {
    draft.row.device = None;
    draft.row.life = match draft.row.desired {
        Desired::Stopped | Desired::Removed if may_run(&draft.row).is_some() => Life::Stopping,
        _ => Life::Down,
    };
    if draft.row.veto.is_none() {
        draft.row.wait = None;
    }
    rest(draft);
}

/// The row changed in what is desired: does what follows from it.
pub(crate) fn reconsider(draft: &mut Draft) {
    if may_run(&draft.row).is_none() {
        return;
    }
    let up = draft.row.desired == Desired::Running;
    if !up && matches!(draft.row.life, Life::Starting | Life::Up) {
        draft.row.life = Life::Stopping;
    }
    if draft.row.veto.is_none() {
        draft.row.wait = None;
    }
    rest(draft);
}

/// Goes on from where the machine is: starts it when its device is there, or takes the device away when it is down to
/// stay and the clone does not fill.
pub(crate) fn rest(draft: &mut Draft) {
    if may_run(&draft.row).is_none() {
        return;
    }
    let row = &mut draft.row;
    if row.life == Life::Down && row.desired != Desired::Running && row.device.is_some() && !is_filling(row) {
        row.life = Life::Detaching;
    }
    if row.life == Life::Down && row.desired == Desired::Running && (row.device.is_some() || row.volume.is_none()) {
        row.life = Life::Starting;
    }
    let effects = effects(&draft.row);
    draft.effects.extend(effects);
}

/// The device is there.
pub(crate) fn attached(draft: &mut Draft, device: std::path::PathBuf) {
    draft.row.device = Some(device);
    if draft.row.life == Life::Down {
        rest(draft);
    }
}

/// An outcome of `Attach`, `Detach` or `Delete` for the owner's volume.
pub(crate) fn plane(draft: &mut Draft, command: &Command, result: Result<Outcome, Failure>) -> Result<(), Denied> {
    if may_run(&draft.row).is_none() {
        return Err(Denied::Unawaited);
    }
    match (command, draft.row.life, result) {
        (Command::Attach { .. }, Life::Down, Ok(Outcome::Attached { device })) => {
            draft.row.wait = None;
            attached(draft, device);
        }
        (Command::Attach { .. }, Life::Down, Err(failure)) => failed(draft, "attach", &failure),
        (Command::Detach { .. }, Life::Detaching, Ok(_)) => {
            draft.row.wait = None;
            draft.row.device = None;
            draft.row.life = Life::Down;
            rest(draft);
        }
        (Command::Detach { .. }, Life::Detaching, Err(failure)) => failed(draft, "detach", &failure),
        (Command::Delete { .. }, Life::Down, result) if draft.row.desired == Desired::Removed => match result {
            Ok(_) => remove(draft),
            Err(failure) => failed(draft, "delete", &failure),
        },
        _ => return Err(Denied::Unawaited),
    }
    Ok(())
}

/// An outcome of `Start`, `Stop` or `Discard` while no migration has the machine in its hands.
pub(crate) fn machine(draft: &mut Draft, command: &MachineCommand, result: Result<(), Failure>) -> Result<(), Denied> {
    let Some(epoch) = may_run(&draft.row) else { return Err(Denied::Unawaited) };
    match (command, draft.row.life, result) {
        (MachineCommand::Start { epoch: at, .. }, Life::Down | Life::Starting, result)
            if *at == epoch && draft.row.desired == Desired::Running =>
        {
            match result {
                Ok(()) => {
                    draft.row.life = Life::Up;
                    draft.row.wait = None;
                    destination::booted(draft);
                }
                Err(failure) => {
                    // From the device on: it may be what failed.
                    draft.row.life = Life::Down;
                    draft.row.device = None;
                    failed(draft, "machine-start", &failure);
                    destination::not_booted(draft);
                }
            }
        }
        (MachineCommand::Stop { .. }, Life::Stopping, result) => match result {
            Ok(()) => {
                draft.row.wait = None;
                draft.row.life = Life::Down;
                if draft.row.desired != Desired::Running && draft.row.volume.is_some() && !is_filling(&draft.row) {
                    draft.row.life = Life::Detaching;
                }
                rest(draft);
                if draft.row.desired != Desired::Running {
                    destination::not_booted(draft);
                }
            }
            Err(failure) => failed(draft, "machine-stop", &failure),
        },
        (MachineCommand::Discard { .. }, Life::Down, result)
            if draft.row.desired == Desired::Removed && draft.row.volume.is_none() =>
        {
            match result {
                Ok(()) => remove(draft),
                Err(failure) => failed(draft, "machine-discard", &failure),
            }
        }
        _ => return Err(Denied::Unawaited),
    }
    Ok(())
}

/// The machine died without having been told to.
pub(crate) fn lost(draft: &mut Draft, reason: &str) -> Result<(), Denied> {
    if may_run(&draft.row).is_none() || !matches!(draft.row.life, Life::Starting | Life::Up) {
        return Err(Denied::Unawaited);
    }
    draft.row.life = Life::Down;
    draft.row.device = None;
    let failure = Failure { code: FailureCode::Retry, message: reason.to_owned() };
    failed(draft, "machine-start", &failure);
    Ok(())
}

/// A step of the machine's life failed: again later, or a person is needed.
fn failed(draft: &mut Draft, step: &str, failure: &Failure) {
    let (name, now_ms) = (draft.row.machine.as_str().to_owned(), draft.now_ms);
    match failure.code {
        FailureCode::Retry | FailureCode::NotYet => {
            let backoff = if step == "machine-start" { BOOT } else { LOCAL };
            wait::retry(&mut draft.row.wait, step, failure, backoff, &name, now_ms);
        }
        FailureCode::Refused | FailureCode::Stuck => {
            let clears = format!("somebody removes the cause and orders `decant machine retry {name}`");
            wait::stuck(&mut draft.row.wait, step, &failure.message, &clears, now_ms);
        }
    }
}

/// Nothing of the machine is left here: the row forgets it, but not the epoch.
fn remove(draft: &mut Draft) {
    let row = &mut draft.row;
    row.state = State::None;
    row.spec = None;
    row.volume = None;
    row.desired = Desired::Stopped;
    row.migration = None;
    row.wait = None;
    row.went = None;
}

/// The wait of a machine that is not as desired; for rows whose wait is not set because nothing failed.
pub(crate) fn wait_of(row: &Row) -> Option<Wait> {
    if row.wait.is_some() {
        return row.wait.clone();
    }
    may_run(row)?;
    let (on, clears) = match (row.life, row.desired) {
        (Life::Up, Desired::Running) => return None,
        (Life::Down, Desired::Stopped) => return None,
        (Life::Down, Desired::Running) => ("attach", "the volume's device is there"),
        (Life::Starting, Desired::Running) => ("machine-start", "its first process runs"),
        (Life::Detaching, _) => ("detach", "the volume's device is gone"),
        (Life::Down, Desired::Removed) => ("delete", "its volume is deleted"),
        (Life::Starting | Life::Up | Life::Stopping, _) => {
            ("machine-stop", "its cgroup is empty and its device has no user")
        }
    };
    Some(Wait::new(on, clears, 0))
}
