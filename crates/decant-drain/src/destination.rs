//! The worker that takes the machine: the other side of the transition table in [`crate::migration`].

use decant_base::{MachineId, MigrationId, WorkerId};
use decant_dataplane::{Command, Failure, FailureCode, Origin, Outcome, Seal, Verification};
use serde_json::Value;

use crate::draft::{self, Draft, OnFailure, Otherwise};
use crate::handoff::{Answer, State, Top};
use crate::life;
use crate::migration::{Back, Limits, Migration, Phase, Role};
use crate::row::{Desired, Life, Row};
use crate::vocabulary::{Body, Denied, Effect, MachineCommand, Message, Offer};
use crate::wait::{ASK, LOCAL, LOOK, RESEND, Wait};

/// What is awaited in the phase.
pub(crate) fn wait(machine: &MachineId, migration: &Migration, now_ms: u64) -> Option<Wait> {
    let from = &migration.peer;
    let remove = format!("`decant machine rm {machine} --with-volume --force`");
    let (on, clears) = match migration.phase {
        Phase::Planned => ("prepare", "the volume, the clone and the machine are prepared here".to_owned()),
        Phase::Prepared | Phase::Stopped | Phase::Sealed => {
            let cancel = format!("`decant migration cancel {}`", migration.id);
            (
                "grant",
                format!("{from} grants the machine, or cancels, or, if it is destroyed, somebody orders {cancel}"),
            )
        }
        Phase::Granted if !migration.begun => (
            "begin",
            format!("the clone's map is durable; if {from} is destroyed for good, {remove} gives the machine up"),
        ),
        Phase::Granted => ("boot", "the machine's first process runs".to_owned()),
        Phase::Booted => ("trim", "what the file system does not use is discarded".to_owned()),
        Phase::Hydrating => {
            let until = format!("every block is here; {from} must stay up until then");
            ("hydration", format!("{until}; if it is destroyed for good, {remove} gives the machine up"))
        }
        Phase::Verified => {
            let forget = format!("`decant machine forget-origin {machine} --force`");
            (
                "release",
                format!("{from} hears that nothing of it is needed, or, if it is destroyed, somebody orders {forget}"),
            )
        }
        Phase::Unwinding => ("unwinding", "what was prepared here is removed".to_owned()),
        Phase::Cleaned | Phase::Ended => return None,
    };
    Some(Wait::new(on, clears, now_ms))
}

/// What the phase wants done.
pub(crate) fn effects(row: &Row, migration: &Migration) -> Vec<Effect> {
    let say = |body| draft::send(row, migration, body);
    let id = || migration.id.clone();
    let machine = || row.machine.clone();
    match (migration.phase, row.volume.clone()) {
        // The offer is in no row: the source is asked for it again.
        (Phase::Planned, _) => vec![say(Body::Progress { phase: Phase::Planned })],
        (Phase::Prepared | Phase::Stopped | Phase::Sealed, _) => vec![say(Body::PrepareOk)],
        (Phase::Granted, Some(volume)) if !migration.begun => begin(migration, volume).into_iter().collect(),
        // Starting is the machine's life.
        (Phase::Granted, _) => Vec::new(),
        (Phase::Booted, _) => vec![Effect::Machine(MachineCommand::Trim { machine: machine() })],
        (Phase::Hydrating, Some(volume)) => vec![Effect::Plane(Command::Verify { volume, migration: id() })],
        (Phase::Hydrating | Phase::Verified, _) => {
            vec![say(Body::Verified { verification: migration.verification })]
        }
        (Phase::Unwinding, Some(volume)) if migration.local_done => {
            vec![Effect::Plane(Command::Abandon { volume, migration: id() })]
        }
        (Phase::Unwinding, _) => vec![Effect::Machine(MachineCommand::Discard { machine: machine() })],
        (Phase::Cleaned | Phase::Ended, _) => Vec::new(),
    }
}

fn begin(migration: &Migration, volume: decant_base::VolumeId) -> Option<Effect> {
    let (origin, seal) = (migration.origin.clone()?, migration.seal.clone()?);
    let (epoch, migration) = (migration.epoch, migration.id.clone());
    Some(Effect::Plane(Command::Begin { volume, migration, epoch, origin, seal }))
}

/// What a `Prepare` carries.
struct Call<'a> {
    spec: &'a Value,
    offer: Option<&'a Offer>,
    reason: &'a str,
    drain: Option<&'a decant_base::DrainId>,
    limits: Limits,
    program: Option<&'a String>,
}

/// A message of a source's. The row may know nothing of the migration.
pub(crate) fn received(draft: &mut Draft, from: &WorkerId, message: &Message) -> Result<(), Denied> {
    let id = &message.migration;
    match (&message.body, draft.row.top.answer_to(id, message.epoch)) {
        // What was answered once is answered the same way for ever.
        (Body::Grant { .. } | Body::Refuse | Body::Abandon | Body::Prepare { .. }, Some(Answer::Accepted)) => {
            draft.reply(from, message, Body::GrantAccepted);
            // A source that was thought to be destroyed asks; nobody else says it to it any more.
            if let Some(verification) = was_whole(draft, id) {
                draft.reply(from, message, Body::Verified { verification });
            }
        }
        // A source that offers it once more goes above it then, and its next offer is considered.
        (Body::Grant { .. } | Body::Refuse | Body::Prepare { .. }, Some(Answer::Refused)) => {
            draft.reply(from, message, Body::GrantRefused);
        }
        // The epoch was raised above it since: a veto was cleared.
        (Body::Grant { .. } | Body::Refuse, None) if message.epoch < draft.row.top.epoch && is_accepted(draft, id) => {
            draft.reply(from, message, Body::GrantAccepted);
            if let Some(verification) = was_whole(draft, id) {
                draft.reply(from, message, Body::Verified { verification });
            }
        }
        (Body::Grant { .. } | Body::Refuse, None) if message.epoch <= draft.row.top.epoch => {
            let top = draft.row.top.epoch;
            draft.reply(from, message, Body::GrantStale { top });
        }
        (Body::Grant { desired, seal }, None) => granted(draft, from, message, *desired, seal.as_deref()),
        (Body::Refuse, None) => refuse(draft, from, message, Back::Cancelled),
        (Body::Abandon, _) => abandon(draft, from, message),
        (Body::Prepare { spec, offer, reason, drain, limits, program }, _) => {
            let (offer, drain, program) = (offer.as_deref(), drain.as_ref(), program.as_ref());
            let call = Call { spec, offer, reason, drain, limits: *limits, program };
            prepare(draft, from, message, &call);
        }
        (Body::Released, _) => {
            let waits = draft.migration_is(Role::Destination, id).is_some_and(|m| m.phase == Phase::Verified);
            // The epoch owned may be above the message's: a veto was cleared since.
            if waits && draft.row.state.owned().is_some() {
                clean(draft);
            }
        }
        _ => return Err(Denied::Unawaited),
    }
    Ok(())
}

/// Whether the migration `id`, the last one of this row, was accepted here.
fn is_accepted(draft: &mut Draft, id: &MigrationId) -> bool {
    draft.migration_is(Role::Destination, id).is_some_and(|migration| migration.accepted)
}

/// Whether every block of the accepted migration `id` is known to be, or to have been, here, with what verification found.
fn was_whole(draft: &Draft, id: &MigrationId) -> Option<Option<Verification>> {
    let migration = draft.row.migration.as_ref()?;
    if migration.id == *id && migration.role == Role::Destination {
        return matches!(migration.phase, Phase::Verified | Phase::Cleaned).then_some(migration.verification);
    }
    // Only a machine that is whole is moved on.
    (migration.role == Role::Source).then_some(None)
}

/// The machine goes, whole or not: its origin is destroyed, says the operator, or somebody else has it. An origin that comes back nevertheless is
/// told that its grant was accepted and nothing more: its copy may be all that is left, and is there to be reclaimed.
pub(crate) fn give_up(draft: &mut Draft) {
    let Some(migration) = draft.migration_as(Role::Destination) else { return };
    let reason = format!("the machine was removed before {} was over", migration.id);
    migration.back = Some(Back::Failed { step: "remove".to_owned(), reason, passing: false });
    migration.seal = None;
    migration.origin = None;
    draft.enter(Phase::Ended);
}

/// Nothing is owed to the source any more.
pub(crate) fn clean(draft: &mut Draft) {
    draft.enter(Phase::Cleaned);
    // A machine that is down held its device only for hydration.
    life::reconsider(draft);
}

fn decline(draft: &mut Draft, from: &WorkerId, message: &Message, code: FailureCode, reason: String) {
    let failure = Failure { code, message: reason };
    draft.reply(from, message, Body::PrepareFailed { failure });
}

/// The source asks this worker to get ready.
fn prepare(draft: &mut Draft, from: &WorkerId, message: &Message, call: &Call<'_>) {
    let (id, top) = (&message.migration, draft.row.top.epoch);
    let worker = draft.row.worker.clone();
    if message.epoch <= top {
        // Never as if it had not been answered: that would forge a refusal.
        let reason = format!("{worker} knows epoch {top} of this machine, the offer is for {}", message.epoch);
        return decline(draft, from, message, FailureCode::Refused, reason);
    }
    if let Some(migration) = draft.migration_is(Role::Destination, id) {
        let (phase, cancelled) = (migration.phase, migration.back == Some(Back::Cancelled));
        match phase {
            Phase::Planned => return make(draft, call),
            Phase::Prepared => return draft.reply(from, message, Body::PrepareOk),
            Phase::Ended if cancelled => {
                let reason = format!("{worker} was told to forget this migration");
                return decline(draft, from, message, FailureCode::Refused, reason);
            }
            _ => {}
        }
    }
    let is_busy = draft.row.migration.as_ref().is_some_and(|m| !m.phase.is_over());
    match draft.row.state {
        State::None | State::Released { .. } if !is_busy => accept_call(draft, from, message, call),
        State::Active { .. } | State::Moving { .. } => {
            let reason = format!("{worker} owns this machine itself");
            decline(draft, from, message, FailureCode::Refused, reason);
        }
        _ => {
            let what =
                draft.row.migration.as_ref().map_or(String::new(), |m| format!(" ({} is {})", m.id, m.phase.name()));
            let reason = format!("{worker} is still busy with an earlier migration of this machine{what}");
            decline(draft, from, message, FailureCode::Retry, reason);
        }
    }
}

fn accept_call(draft: &mut Draft, from: &WorkerId, message: &Message, call: &Call<'_>) {
    draft.row.state = State::Prepared { migration: message.migration.clone() };
    draft.row.spec = Some(call.spec.clone());
    draft.row.volume = call.offer.map(|offer| offer.volume.clone());
    draft.row.desired = Desired::Stopped;
    draft.row.life = Life::Down;
    draft.row.device = None;
    draft.row.wait = None;
    draft.row.migration = Some(Migration {
        id: message.migration.clone(),
        role: Role::Destination,
        peer: from.clone(),
        reader: None,
        epoch: message.epoch,
        phase: Phase::Planned,
        reason: call.reason.to_owned(),
        drain: call.drain.cloned(),
        limits: call.limits,
        program: call.program.cloned(),
        entered_ms: Default::default(),
        back: None,
        accepted: false,
        begun: false,
        peer_done: false,
        local_done: false,
        origin: None,
        seal: None,
        verification: None,
        wait: None,
    });
    draft.enter(Phase::Planned);
    make(draft, call);
}

/// Starts to make the volume, or the machine if it has none.
fn make(draft: &mut Draft, call: &Call<'_>) {
    let Some(offer) = call.offer else { return prepare_machine(draft) };
    let Some(migration) = &mut draft.row.migration else { return };
    migration.origin = Some(offer.origin.clone());
    let id = migration.id.clone();
    if let Some(copy) = draft.row.copy.clone() {
        // The machine comes back: the copy that was kept for going back makes room.
        draft.plane(Command::Delete { volume: copy.volume });
    }
    draft.plane(Command::Prepare {
        volume: offer.volume.clone(),
        migration: id,
        geometry: offer.geometry.clone(),
        header: offer.header.clone(),
        room: offer.room,
    });
}

fn prepare_machine(draft: &mut Draft) {
    let Some(migration) = &draft.row.migration else { return };
    let (migration, program) = (migration.id.clone(), migration.program.clone());
    let (machine, device) = (draft.row.machine.clone(), draft.row.device.clone());
    let spec = draft.row.spec.clone().unwrap_or_default();
    draft.machine(MachineCommand::Prepare { machine, migration, spec, device, program });
}

/// The source, sealed, hands the machine over; nothing was answered yet and the epoch is above all.
fn granted(draft: &mut Draft, from: &WorkerId, message: &Message, desired: Desired, seal: Option<&Seal>) {
    let is_prepared = draft
        .migration_is(Role::Destination, &message.migration)
        .is_some_and(|m| m.phase == Phase::Prepared && m.epoch == message.epoch && m.peer == *from)
        && matches!(&draft.row.state, State::Prepared { migration } if *migration == message.migration)
        && draft.row.volume.is_some() == seal.is_some();
    if !is_prepared {
        let reason = "granted without being prepared".to_owned();
        return refuse(draft, from, message, Back::Failed { step: "grant".to_owned(), reason, passing: false });
    }
    let answer = Some((message.migration.clone(), Answer::Accepted));
    draft.row.top = Top { epoch: message.epoch, answer };
    draft.row.state = State::Active { epoch: message.epoch };
    draft.row.desired = desired;
    draft.row.went = None;
    if let Some(migration) = &mut draft.row.migration {
        migration.accepted = true;
        migration.seal = seal.cloned();
        migration.begun = seal.is_none();
    }
    draft.enter(Phase::Granted);
    draft.drive_migration();
    draft.reply(from, message, Body::GrantAccepted);
    if seal.is_none() {
        begun(draft);
    }
}

/// The clone may be used: the machine starts. One that is to stay down is told to stop: an agent that died may have
/// started it before that was ordered.
fn begun(draft: &mut Draft) {
    if draft.row.desired != Desired::Running {
        draft.row.life = Life::Stopping;
    }
    life::reconsider(draft);
}

/// Durably refuses: this epoch is never taken here, whatever arrives later.
fn refuse(draft: &mut Draft, from: &WorkerId, message: &Message, back: Back) {
    let answer = Some((message.migration.clone(), Answer::Refused));
    draft.row.top = Top { epoch: message.epoch, answer };
    draft.reply(from, message, Body::GrantRefused);
    if matches!(&draft.row.state, State::Prepared { migration } if *migration == message.migration) {
        unwind(draft, back);
    }
}

/// The operator of this worker does not want the machine.
pub(crate) fn cancel(draft: &mut Draft) -> Result<(), Denied> {
    let Some(migration) = draft.migration_as(Role::Destination) else { return Err(Denied::Unawaited) };
    let (from, epoch, id) = (migration.peer.clone(), migration.epoch, migration.id.clone());
    match migration.phase {
        Phase::Planned | Phase::Prepared => {
            let message = Message { machine: draft.row.machine.clone(), migration: id, epoch, body: Body::Refuse };
            refuse(draft, &from, &message, Back::Cancelled);
            Ok(())
        }
        Phase::Unwinding => Ok(()),
        _ => Err(Denied::TooLate { migration: id, to: draft.row.worker.clone() }),
    }
}

/// Removes what was prepared here. Nothing was granted.
pub(crate) fn unwind(draft: &mut Draft, back: Back) {
    if !matches!(draft.row.state, State::Prepared { .. }) {
        return;
    }
    draft.row.state = State::None;
    if let Some(migration) = &mut draft.row.migration {
        migration.back = Some(back);
        migration.local_done = false;
    }
    draft.enter(Phase::Unwinding);
    draft.drive_migration();
}

/// The source, not sealed, does not want it any more.
fn abandon(draft: &mut Draft, from: &WorkerId, message: &Message) {
    let phase = draft.migration_is(Role::Destination, &message.migration).map(|migration| migration.phase);
    match phase {
        Some(Phase::Planned | Phase::Prepared) => unwind(draft, Back::Cancelled),
        // The source hears of it when nothing is left.
        Some(Phase::Unwinding) => {
            if let Some(migration) = &mut draft.row.migration {
                migration.back = Some(Back::Cancelled);
            }
        }
        _ => draft.reply(from, message, Body::Abandoned),
    }
}

/// Nothing is left here.
fn unwound(draft: &mut Draft) {
    draft.enter(Phase::Ended);
    if let Some(migration) = &mut draft.row.migration {
        migration.seal = None;
        migration.origin = None;
    }
    let body = match draft.row.migration.as_ref().and_then(|migration| migration.back.clone()) {
        Some(Back::Failed { reason, passing, .. }) => {
            let code = if passing { FailureCode::Retry } else { FailureCode::Refused };
            Body::PrepareFailed { failure: Failure { code, message: reason } }
        }
        _ => Body::Abandoned,
    };
    draft.tell(body);
    draft.row.spec = None;
    draft.row.volume = None;
    draft.row.device = None;
}

fn failed(draft: &mut Draft, failure: &Failure, step: &'static str, phase: Phase) {
    let otherwise = if phase == Phase::Planned { Otherwise::Unwind } else { Otherwise::Stuck };
    // While preparing the source does the trying: it has the offer, and may change its mind.
    let deadline = (phase == Phase::Planned).then_some((0, Otherwise::Unwind));
    let backoff = if failure.code == FailureCode::NotYet { LOOK } else { LOCAL };
    draft.migration_failed(failure, OnFailure { step, backoff, refused: otherwise, stuck: otherwise, deadline });
}

/// An outcome of the plane's for this migration.
pub(crate) fn plane(draft: &mut Draft, command: &Command, result: Result<Outcome, Failure>) -> Result<(), Denied> {
    let (Command::Prepare { migration: id, .. }
    | Command::Assemble { migration: id, .. }
    | Command::Begin { migration: id, .. }
    | Command::Verify { migration: id, .. }
    | Command::Abandon { migration: id, .. }) = command
    else {
        return Err(Denied::Unawaited);
    };
    let phase = match draft.migration_as(Role::Destination) {
        Some(migration) if migration.id == *id => migration.phase,
        _ => return Err(Denied::Unawaited),
    };
    match (command, phase, result) {
        (Command::Prepare { volume, .. }, Phase::Planned, Ok(_)) => assemble(draft, volume.clone(), id.clone()),
        (Command::Prepare { .. }, Phase::Planned, Err(failure)) => failed(draft, &failure, "volume", phase),
        (Command::Assemble { .. }, Phase::Planned, Ok(Outcome::Attached { device })) => {
            draft.row.device = Some(device);
            prepare_machine(draft);
        }
        (Command::Assemble { .. }, Phase::Planned, Err(failure)) => failed(draft, &failure, "assemble", phase),
        (Command::Begin { .. }, Phase::Granted, Ok(Outcome::Attached { device })) => {
            if let Some(migration) = &mut draft.row.migration {
                migration.begun = true;
                migration.seal = None;
            }
            draft.enter(Phase::Granted);
            draft.row.device = Some(device);
            begun(draft);
        }
        (Command::Begin { .. }, Phase::Granted, Err(failure)) => failed(draft, &failure, "begin", phase),
        (Command::Verify { .. }, Phase::Hydrating, Ok(Outcome::Verified(found))) => verified(draft, Some(found)),
        (Command::Verify { .. }, Phase::Hydrating, Err(failure)) => failed(draft, &failure, "hydration", phase),
        (Command::Abandon { .. }, Phase::Unwinding, Ok(_)) => unwound(draft),
        (Command::Abandon { .. }, Phase::Unwinding, Err(failure)) => failed(draft, &failure, "abandon", phase),
        _ => return Err(Denied::Unawaited),
    }
    Ok(())
}

fn assemble(draft: &mut Draft, volume: decant_base::VolumeId, migration: MigrationId) {
    let origin: Option<Origin> = draft.row.migration.as_ref().and_then(|migration| migration.origin.clone());
    if let Some(origin) = origin {
        draft.plane(Command::Assemble { volume, migration, origin });
    }
}

/// An outcome of the machine's driver for this migration.
pub(crate) fn machine(draft: &mut Draft, command: &MachineCommand, result: Result<(), Failure>) -> Result<(), Denied> {
    let Some(migration) = draft.migration_as(Role::Destination) else { return Err(Denied::Unawaited) };
    let phase = migration.phase;
    match (command, phase, result) {
        (MachineCommand::Prepare { migration: id, .. }, Phase::Planned, result) if *id == migration.id => {
            match result {
                Ok(()) => {
                    draft.enter(Phase::Prepared);
                    draft.drive_migration();
                    draft.expect_answer(ASK);
                }
                Err(failure) => failed(draft, &failure, "machine-prepare", phase),
            }
        }
        // Best effort, either way.
        (MachineCommand::Trim { .. }, Phase::Booted, _) => hydrate(draft),
        (MachineCommand::Discard { .. }, Phase::Unwinding, Ok(())) => {
            migration.local_done = true;
            if draft.row.volume.is_some() {
                draft.drive_migration();
            } else {
                unwound(draft);
            }
        }
        (MachineCommand::Discard { .. }, Phase::Unwinding, Err(failure)) => {
            failed(draft, &failure, "machine-discard", phase)
        }
        _ => return Err(Denied::Unawaited),
    }
    Ok(())
}

/// The machine runs.
pub(crate) fn booted(draft: &mut Draft) {
    if draft.migration_as(Role::Destination).is_none_or(|migration| migration.phase != Phase::Granted) {
        return;
    }
    if draft.row.volume.is_none() {
        draft.pass(Phase::Booted);
        return not_booted(draft);
    }
    draft.enter(Phase::Booted);
    draft.tell(Body::Progress { phase: Phase::Booted });
    draft.drive_migration();
}

/// The machine is to stay down, or does not start: blocks must come all the same, the source may be dying.
pub(crate) fn not_booted(draft: &mut Draft) {
    if draft.migration_as(Role::Destination).is_none_or(|migration| migration.phase != Phase::Granted) {
        return;
    }
    if draft.row.volume.is_none() {
        // Nothing of a stateless machine is left at the source.
        draft.pass(Phase::Hydrating);
        return verified(draft, None);
    }
    hydrate(draft);
    // Filling needs the device, up or down.
    if draft.row.device.is_none() && draft.row.wait.is_none() {
        life::rest(draft);
    }
}

fn hydrate(draft: &mut Draft) {
    draft.enter(Phase::Hydrating);
    draft.tell(Body::Progress { phase: Phase::Hydrating });
    draft.drive_migration();
}

/// Every block is here and was compared: the source is told until it hears it.
fn verified(draft: &mut Draft, verification: Option<Verification>) {
    if let Some(migration) = &mut draft.row.migration {
        migration.verification = verification;
    }
    draft.enter(Phase::Verified);
    draft.drive_migration();
    draft.expect_answer(RESEND);
}

/// The agent started: what was half prepared is asked for again, what was acknowledged is said again.
pub(crate) fn restarted(draft: &mut Draft) {
    if let Some(migration) = draft.migration_as(Role::Destination)
        && matches!(migration.phase, Phase::Planned | Phase::Prepared | Phase::Verified)
    {
        let backoff = if migration.phase == Phase::Verified { RESEND } else { ASK };
        draft.expect_answer(backoff);
    }
}

/// The migration's time has come: again.
pub(crate) fn due(draft: &mut Draft) {
    let now_ms = draft.now_ms;
    let Some(migration) = draft.migration_as(Role::Destination) else { return };
    let Some(wait) = migration.wait.as_mut().filter(|wait| wait.is_due(now_ms)) else { return };
    match migration.phase {
        Phase::Planned | Phase::Prepared => wait.again(ASK, migration.id.as_str(), now_ms),
        Phase::Verified => wait.again(RESEND, migration.id.as_str(), now_ms),
        _ => wait.retry_ms = None,
    }
    draft.drive_migration();
}
