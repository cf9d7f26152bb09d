//! The worker that hands the machine over: one side of the transition table in [`crate::migration`].

use decant_base::{MachineId, MigrationId, WorkerId};
use decant_dataplane::{Command, Failure, FailureCode, Outcome, Seal};

use crate::draft::{self, Draft, OnFailure, Otherwise};
use crate::handoff::{State, Top};
use crate::life;
use crate::migration::{Back, Migration, Phase, Role};
use crate::row::{Life, Row, SealedCopy, Went};
use crate::step::highest_elsewhere;
use crate::vocabulary::{Body, Denied, Effect, MachineCommand, Message, Move, Offer};
use crate::wait::{ASK, FREE_COPY, LOCAL, RESEND, Severity, Wait};

/// How often a peer that does not answer is told to forget a migration that went back. After that it will ask itself:
/// a destination that was never granted anything goes on saying that it is ready, and is then told again.
const FAREWELLS: u32 = 6;

/// What is awaited in the phase.
pub(crate) fn wait(machine: &MachineId, migration: &Migration, now_ms: u64) -> Option<Wait> {
    let to = &migration.peer;
    let or_reclaim = || format!("or, if {to} is destroyed, somebody orders `decant machine reclaim {machine} --force`");
    let (on, clears) = match migration.phase {
        Phase::Planned => ("prepare", format!("the export is open and {to} answers that it is ready")),
        Phase::Prepared => ("machine-stop", "its cgroup is empty and its device has no user".to_owned()),
        Phase::Stopped => ("seal", "what was written is durable and no write lands any more".to_owned()),
        Phase::Sealed if migration.back.is_some() => {
            ("refusal", format!("{to} answers whether it has accepted the grant, {}", or_reclaim()))
        }
        Phase::Sealed => ("grant", format!("{to} answers the grant, {}", or_reclaim())),
        Phase::Granted => ("boot", format!("{to} says that the machine runs, {}", or_reclaim())),
        Phase::Booted | Phase::Hydrating => {
            ("hydration", format!("{to} says that every block is there and was compared, {}", or_reclaim()))
        }
        Phase::Verified => ("cleaning", "the export is closed".to_owned()),
        Phase::Unwinding => ("unwinding", format!("the export is closed and {to} has forgotten the migration")),
        Phase::Cleaned | Phase::Ended => return None,
    };
    Some(Wait::new(on, clears, now_ms))
}

/// When preparing has taken too long.
pub(crate) fn prepare_deadline(migration: &Migration) -> Option<u64> {
    let waits = migration.role == Role::Source && migration.phase == Phase::Planned;
    let since = migration.entered_ms.get(&Phase::Planned).filter(|_| waits)?;
    Some(since.saturating_add(migration.limits.prepare_ms))
}

/// When stopping and sealing have taken too long.
fn stop_deadline(migration: &Migration) -> u64 {
    let since = migration.entered_ms.get(&Phase::Prepared).copied().unwrap_or(0);
    since.saturating_add(migration.limits.stop_ms)
}

/// What the phase wants done.
pub(crate) fn effects(row: &Row, migration: &Migration) -> Vec<Effect> {
    let id = || migration.id.clone();
    let reader = || migration.reader.clone();
    let machine = || row.machine.clone();
    let say = |body| draft::send(row, migration, body);
    let volume = row.volume.clone();
    match (migration.phase, volume) {
        (Phase::Planned, Some(volume)) => {
            let open = |reader| Effect::Plane(Command::OpenExport { volume, migration: id(), reader });
            reader().map(open).into_iter().collect()
        }
        (Phase::Planned, None) => vec![say(prepare(row, migration, None))],
        (Phase::Prepared, _) | (Phase::Stopped, None) => {
            vec![Effect::Machine(MachineCommand::Stop { machine: machine() })]
        }
        (Phase::Sealed, _) if migration.back.is_some() => vec![say(Body::Refuse)],
        // Past the commit point it is no order but a question: it is answered with how far the destination is, which may
        // have been told that this worker is destroyed.
        (Phase::Sealed | Phase::Granted | Phase::Booted | Phase::Hydrating, None) => {
            vec![say(Body::Grant { desired: row.desired, seal: None })]
        }
        // Its outcome says what is live, and brings the export back after a restart of the host.
        (Phase::Stopped | Phase::Sealed | Phase::Granted | Phase::Booted | Phase::Hydrating, Some(volume)) => {
            let seal = |reader| Effect::Plane(Command::Seal { volume, migration: id(), reader });
            reader().map(seal).into_iter().collect()
        }
        (Phase::Verified, Some(volume)) if migration.local_done => {
            vec![Effect::Plane(Command::CloseExport { volume, migration: id() })]
        }
        (Phase::Verified, _) => vec![Effect::Machine(MachineCommand::Discard { machine: machine() })],
        (Phase::Unwinding, volume) => {
            let close = volume.filter(|_| !migration.local_done);
            let close = close.map(|volume| Effect::Plane(Command::CloseExport { volume, migration: id() }));
            let abandon = (!migration.peer_done).then(|| say(Body::Abandon));
            close.into_iter().chain(abandon).collect()
        }
        (Phase::Cleaned | Phase::Ended, _) => Vec::new(),
    }
}

fn prepare(row: &Row, migration: &Migration, offer: Option<Box<Offer>>) -> Body {
    Body::Prepare {
        spec: row.spec.clone().unwrap_or_default(),
        offer,
        reason: migration.reason.clone(),
        drain: migration.drain.clone(),
        limits: migration.limits,
        program: migration.program.clone(),
    }
}

/// The operator, or a drain, wants the machine elsewhere. The row was found fit for it.
pub(crate) fn begin(draft: &mut Draft, order: Move, epoch: decant_base::Epoch) {
    let (to, migration) = (order.to.clone(), order.migration.clone());
    draft.row.state = State::Moving { epoch, to, migration };
    draft.row.migration = Some(Migration {
        id: order.migration,
        role: Role::Source,
        peer: order.to,
        reader: Some(order.reader),
        epoch: epoch.next(),
        phase: Phase::Planned,
        reason: order.reason,
        drain: order.drain,
        limits: order.limits,
        program: order.program,
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
    if draft.row.life == Life::Up && draft.row.volume.is_some() {
        let machine = draft.row.machine.clone();
        draft.machine(MachineCommand::Trim { machine });
    }
    if draft.row.volume.is_none() {
        draft.expect_answer(ASK);
    }
    draft.drive_migration();
}

/// Goes back from a phase in which nothing is sealed: the source alone decides.
pub(crate) fn unwind(draft: &mut Draft, back: Back) {
    let State::Moving { epoch, .. } = draft.row.state else { return };
    draft.row.state = State::Active { epoch };
    take_back(draft, back, false);
}

/// The machine is this worker's again, at whatever epoch its state says. `peer_done`: the destination needs no farewell.
fn take_back(draft: &mut Draft, back: Back, peer_done: bool) {
    let stateless = draft.row.volume.is_none();
    let Some(migration) = &mut draft.row.migration else { return };
    let was_begun = migration.begun;
    migration.back = Some(back);
    migration.peer_done = peer_done;
    migration.local_done = stateless;
    draft.enter(Phase::Unwinding);
    draft.expect_answer(RESEND);
    // A start at the old epoch may be under way: at the new one it starts anew.
    if was_begun || draft.row.life == Life::Starting {
        draft.row.life = Life::Down;
        draft.row.device = None;
    }
    draft.drive_migration();
    in_hand(draft);
    end_if_done(draft);
}

/// The machine goes on as desired, as soon as its volume is not exported any more.
fn in_hand(draft: &mut Draft) {
    let Some(migration) = draft.migration_as(Role::Source) else { return };
    match (migration.begun, migration.local_done) {
        (true, true) => life::resume(draft),
        (true, false) => {}
        (false, _) => life::rest(draft),
    }
}

fn end_if_done(draft: &mut Draft) {
    let done = draft.migration_as(Role::Source).is_some_and(|m| {
        m.phase == Phase::Unwinding
            && m.local_done
            && (m.peer_done || m.wait.as_ref().is_some_and(|w| w.attempts >= FAREWELLS))
    });
    if done {
        draft.enter(Phase::Ended);
    }
}

/// The machine is down and no write lands any more: from here on it never runs here at this epoch or the next.
fn seal(draft: &mut Draft, seal: Option<Seal>) {
    let State::Moving { epoch, to, migration } = draft.row.state.clone() else { return };
    draft.row.state = State::Sealed { epoch, to, migration };
    draft.row.life = Life::Down;
    draft.row.device = None;
    draft.enter(Phase::Sealed);
    grant(draft, seal);
}

fn grant(draft: &mut Draft, seal: Option<Seal>) {
    let desired = draft.row.desired;
    draft.tell(Body::Grant { desired, seal: seal.map(Box::new) });
    draft.expect_answer(RESEND);
}

/// An outcome of the plane's for this migration.
pub(crate) fn plane(draft: &mut Draft, command: &Command, result: Result<Outcome, Failure>) -> Result<(), Denied> {
    let (Command::OpenExport { migration: id, .. }
    | Command::Seal { migration: id, .. }
    | Command::CloseExport { migration: id, .. }) = command
    else {
        return Err(Denied::Unawaited);
    };
    let phase = match draft.migration_as(Role::Source) {
        Some(migration) if migration.id == *id => migration.phase,
        _ => return Err(Denied::Unawaited),
    };
    let after = result.as_ref().ok().cloned();
    match (command, phase, after) {
        (
            Command::OpenExport { volume, .. },
            Phase::Planned,
            Some(Outcome::ExportOpened { origin, geometry, header, room }),
        ) => {
            let offer = Box::new(Offer { volume: volume.clone(), origin, geometry, header, room });
            if let Some(migration) = &draft.row.migration {
                let body = prepare(&draft.row, migration, Some(offer));
                draft.tell(body);
            }
            draft.expect_answer(ASK);
        }
        (Command::OpenExport { .. }, Phase::Planned, None) => failed(draft, result, "export", phase),
        (Command::Seal { .. }, Phase::Stopped, Some(Outcome::Sealed(sealed))) => seal(draft, Some(sealed)),
        (Command::Seal { .. }, Phase::Sealed, Some(Outcome::Sealed(sealed))) => {
            if draft.row.migration.as_ref().is_some_and(|m| m.back.is_none()) {
                grant(draft, Some(sealed));
            }
        }
        // The export is there again. This worker was away, and the destination may have been told that it is destroyed.
        (Command::Seal { .. }, Phase::Granted | Phase::Booted | Phase::Hydrating, Some(Outcome::Sealed(sealed))) => {
            draft.enter(phase);
            draft.expect_answer(ASK);
            let desired = draft.row.desired;
            draft.tell(Body::Grant { desired, seal: Some(Box::new(sealed)) });
        }
        (
            Command::Seal { .. },
            Phase::Stopped | Phase::Sealed | Phase::Granted | Phase::Booted | Phase::Hydrating,
            None,
        ) => {
            failed(draft, result, "seal", phase);
        }
        (Command::CloseExport { .. }, Phase::Unwinding, Some(_)) => {
            if let Some(migration) = &mut draft.row.migration {
                migration.local_done = true;
            }
            in_hand(draft);
            end_if_done(draft);
        }
        (Command::CloseExport { .. }, Phase::Verified, Some(_)) => draft.enter(Phase::Cleaned),
        (Command::CloseExport { .. }, Phase::Unwinding | Phase::Verified, None) => {
            failed(draft, result, "close-export", phase)
        }
        _ => return Err(Denied::Unawaited),
    }
    Ok(())
}

/// A step failed. Before the seal it goes back, and what is not yet stopped runs on; after it there is only forward.
fn failed<T>(draft: &mut Draft, result: Result<T, Failure>, step: &'static str, phase: Phase) {
    let Err(failure) = result else { return };
    let Some(migration) = &draft.row.migration else { return };
    let (refused, stuck, deadline) = match phase {
        Phase::Planned => (Otherwise::Unwind, Otherwise::Unwind, None),
        // A machine that does not stop does not start either: somebody must look.
        Phase::Prepared => (Otherwise::Unwind, Otherwise::Stuck, Some((stop_deadline(migration), Otherwise::Stuck))),
        Phase::Stopped => (Otherwise::Unwind, Otherwise::Stuck, Some((stop_deadline(migration), Otherwise::Unwind))),
        _ => (Otherwise::Stuck, Otherwise::Stuck, None),
    };
    draft.migration_failed(&failure, OnFailure { step, backoff: LOCAL, refused, stuck, deadline });
}

/// An outcome of the machine's driver, in a phase in which the migration has the machine in its hands.
pub(crate) fn machine(draft: &mut Draft, command: &MachineCommand, result: Result<(), Failure>) -> Result<(), Denied> {
    let Some(phase) = draft.migration_as(Role::Source).map(|migration| migration.phase) else {
        return Err(Denied::Unawaited);
    };
    match (command, phase, result) {
        (MachineCommand::Stop { .. }, Phase::Prepared, Ok(())) => {
            draft.row.life = Life::Down;
            if draft.row.volume.is_some() {
                draft.enter(Phase::Stopped);
                draft.drive_migration();
            } else {
                draft.pass(Phase::Stopped);
                seal(draft, None);
            }
        }
        (MachineCommand::Stop { .. }, Phase::Prepared, result) => failed(draft, result, "machine-stop", phase),
        (MachineCommand::Discard { .. }, Phase::Verified, Ok(())) => {
            if let Some(migration) = &mut draft.row.migration {
                migration.local_done = true;
            }
            if draft.row.volume.is_some() {
                draft.drive_migration();
            } else {
                draft.enter(Phase::Cleaned);
            }
        }
        (MachineCommand::Discard { .. }, Phase::Verified, result) => failed(draft, result, "machine-discard", phase),
        _ => return Err(Denied::Unawaited),
    }
    Ok(())
}

/// The operator wants it back.
pub(crate) fn cancel(draft: &mut Draft) -> Result<(), Denied> {
    let Some(migration) = draft.migration_as(Role::Source) else { return Err(Denied::Unawaited) };
    match migration.phase {
        Phase::Planned | Phase::Prepared | Phase::Stopped => unwind(draft, Back::Cancelled),
        Phase::Sealed if migration.back.is_none() => {
            migration.back = Some(Back::Cancelled);
            draft.enter(Phase::Sealed);
            draft.expect_answer(RESEND);
            draft.drive_migration();
        }
        Phase::Sealed | Phase::Unwinding => {}
        _ => return Err(Denied::TooLate { migration: migration.id.clone(), to: migration.peer.clone() }),
    }
    Ok(())
}

/// The operator's word that the destination is destroyed: the copy kept here boots above anything it was granted.
pub(crate) fn reclaim(draft: &mut Draft) -> Result<(), Denied> {
    // What frees it may be on its way to the plane.
    if draft.row.copy.as_ref().is_some_and(|copy| copy.expires_ms <= draft.now_ms)
        || draft.row.wait.as_ref().is_some_and(|wait| wait.on == FREE_COPY)
    {
        return Err(Denied::Busy { reason: "the copy of this machine has expired and is being freed".to_owned() });
    }
    let epoch = match (&draft.row.state, &draft.row.copy) {
        (State::Sealed { epoch, .. }, _) | (State::Released { epoch }, Some(_)) => {
            let known = highest_elsewhere(&draft.row, *epoch);
            let seen = draft.row.veto.as_ref().map_or(known, |(seen, _)| *seen);
            known.max(seen).next()
        }
        _ => {
            let reason = "there is no sealed copy of this machine here that could be booted".to_owned();
            return Err(Denied::Senseless { reason });
        }
    };
    draft.row.state = State::Active { epoch };
    draft.row.top = Top { epoch, answer: None };
    draft.row.veto = None;
    draft.row.wait = None;
    draft.row.copy = None;
    draft.row.went = None;
    // Nobody is left to say farewell to.
    take_back(draft, Back::Reclaimed, true);
    Ok(())
}

/// A message of the destination's about the migration under way.
pub(crate) fn received(draft: &mut Draft, from: &WorkerId, message: &Message) -> Result<(), Denied> {
    let id: MigrationId = message.migration.clone();
    let Some(migration) = draft.migration_as(Role::Source).filter(|m| m.id == id) else {
        return Err(Denied::Unawaited);
    };
    let phase = migration.phase;
    let is_moving = phase <= Phase::Stopped;
    let is_sealed = (Phase::Sealed..=Phase::Hydrating).contains(&phase);
    match &message.body {
        Body::PrepareOk if phase == Phase::Planned => {
            migration.begun = true;
            draft.enter(Phase::Prepared);
            draft.drive_migration();
        }
        Body::PrepareOk if phase == Phase::Unwinding => draft.reply(from, message, Body::Abandon),
        Body::PrepareFailed { failure } if phase == Phase::Planned => {
            let stuck = Otherwise::Unwind;
            let deadline = prepare_deadline(migration).map(|at| (at, Otherwise::Unwind));
            draft.migration_failed(
                failure,
                OnFailure { step: "prepare", backoff: ASK, refused: stuck, stuck, deadline },
            );
        }
        Body::PrepareFailed { failure } if is_moving => {
            let (step, reason) = ("prepare".to_owned(), failure.message.clone());
            unwind(draft, Back::Failed { step, reason, passing: failure.code == FailureCode::Retry });
        }
        // A destination that restarted while it prepared has lost the offer: again.
        Body::Progress { phase: Phase::Planned } if phase == Phase::Planned => draft.drive_migration(),
        Body::GrantAccepted if phase == Phase::Sealed => accepted(draft),
        Body::Progress { phase: theirs } if is_sealed && *theirs >= Phase::Granted => {
            if phase == Phase::Sealed {
                accepted(draft);
            }
            let theirs = (*theirs).min(Phase::Hydrating);
            if theirs > phase && theirs > Phase::Granted {
                draft.enter(theirs);
                draft.expect_answer(ASK);
            }
        }
        Body::GrantRefused if phase == Phase::Sealed || is_moving => refused(draft, from),
        Body::GrantStale { top } if is_sealed => {
            let message =
                format!("{from} knows epoch {top}, above the one granted: this worker's journal may be an old copy");
            let failure = Failure { code: FailureCode::Stuck, message };
            let stuck = Otherwise::Stuck;
            draft.migration_failed(
                &failure,
                OnFailure { step: "grant", backoff: RESEND, refused: stuck, stuck, deadline: None },
            );
        }
        Body::Verified { verification } if is_sealed => {
            released(draft, *verification);
            draft.reply(from, message, Body::Released);
            draft.drive_migration();
        }
        Body::Verified { .. } if phase == Phase::Verified => draft.reply(from, message, Body::Released),
        Body::Abandoned if phase == Phase::Unwinding => {
            if let Some(migration) = &mut draft.row.migration {
                migration.peer_done = true;
            }
            end_if_done(draft);
        }
        _ => {}
    }
    Ok(())
}

/// The commit point is passed: the destination owns the machine.
fn accepted(draft: &mut Draft) {
    let Some(migration) = &mut draft.row.migration else { return };
    migration.accepted = true;
    // A cancel came too late.
    migration.back = None;
    let went = Went { to: migration.peer.clone(), epoch: migration.epoch };
    note_where(draft, went);
    draft.enter(Phase::Granted);
    draft.expect_answer(ASK);
}

/// The machine went there. A higher epoch that somebody claimed meanwhile stays known.
fn note_where(draft: &mut Draft, went: Went) {
    if draft.row.went.as_ref().is_none_or(|known| known.epoch <= went.epoch) {
        draft.row.went = Some(went);
    }
}

/// The destination will never take what it was, or would be, granted: the machine is this worker's, above that.
fn refused(draft: &mut Draft, from: &WorkerId) {
    let (State::Sealed { epoch, .. } | State::Moving { epoch, .. }) = draft.row.state else { return };
    let above = epoch.next().next();
    draft.row.state = State::Active { epoch: above };
    draft.row.top = Top { epoch: above, answer: None };
    // A claim that was heard while this worker owned nothing forbids a boot now.
    if let Some(went) = draft.row.went.take().filter(|went| went.epoch >= above) {
        draft.veto(went.epoch, &went.to);
    }
    let failed = || {
        let reason = format!("{from} refused the grant: it is not prepared for this migration any more");
        Back::Failed { step: "grant".to_owned(), reason, passing: true }
    };
    let back = draft.row.migration.as_mut().and_then(|m| m.back.take()).unwrap_or_else(failed);
    take_back(draft, back, true);
}

/// The destination's word that it needs nothing from here: the record lets go, the copy is kept until it expires.
fn released(draft: &mut Draft, verification: Option<decant_dataplane::Verification>) {
    let State::Sealed { epoch, .. } = draft.row.state else { return };
    let Some(migration) = &mut draft.row.migration else { return };
    migration.accepted = true;
    migration.back = None;
    migration.verification = verification;
    draft.row.state = State::Released { epoch };
    let went = Went { to: migration.peer.clone(), epoch: migration.epoch };
    draft.row.copy = draft.row.volume.clone().map(|volume| SealedCopy {
        volume,
        epoch,
        migration: migration.id.clone(),
        released_ms: draft.now_ms,
        expires_ms: draft.now_ms.saturating_add(migration.limits.retention_ms),
    });
    note_where(draft, went);
    draft.enter(Phase::Verified);
}

/// The agent started: timers of messages that are said again.
pub(crate) fn restarted(draft: &mut Draft) {
    let stateless = draft.row.volume.is_none();
    let Some(migration) = draft.migration_as(Role::Source) else { return };
    match migration.phase {
        Phase::Planned if stateless => draft.expect_answer(ASK),
        Phase::Sealed | Phase::Unwinding => draft.expect_answer(RESEND),
        Phase::Granted | Phase::Booted | Phase::Hydrating => draft.expect_answer(ASK),
        _ => {}
    }
}

/// The migration's time has come: again, or too late.
pub(crate) fn due(draft: &mut Draft) {
    let now_ms = draft.now_ms;
    let stateless = draft.row.volume.is_none();
    let Some(migration) = draft.migration_as(Role::Source) else { return };
    if prepare_deadline(migration).is_some_and(|at| at <= now_ms) {
        let last = migration.wait.as_ref().map(|wait| wait.reason.clone()).filter(|reason| !reason.is_empty());
        let last = last.unwrap_or_else(|| format!("{} did not answer", migration.peer));
        let reason = format!("not prepared within {} ms: {last}", migration.limits.prepare_ms);
        return unwind(draft, Back::Failed { step: "prepare".to_owned(), reason, passing: true });
    }
    let Some(wait) = migration.wait.as_mut().filter(|wait| wait.is_due(now_ms)) else { return };
    match migration.phase {
        // The outcome of opening the export sets the next time.
        Phase::Planned if !stateless => {
            wait.attempts = wait.attempts.saturating_add(1);
            wait.retry_ms = None;
        }
        Phase::Planned => wait.again(ASK, migration.id.as_str(), now_ms),
        Phase::Sealed | Phase::Unwinding => wait.again(RESEND, migration.id.as_str(), now_ms),
        // The destination may have been told that this worker is destroyed, and says nothing more by itself.
        Phase::Granted | Phase::Booted | Phase::Hydrating if wait.severity == Severity::Waiting => {
            wait.again(ASK, migration.id.as_str(), now_ms);
            let desired = draft.row.desired;
            return draft.tell(Body::Grant { desired, seal: None });
        }
        _ => wait.retry_ms = None,
    }
    draft.drive_migration();
    end_if_done(draft);
}
