//! The one way in: an event is stepped.

use decant_base::{Epoch, WorkerId};
use decant_dataplane::{Command, Failure, FailureCode, Outcome};

use crate::draft::{self, Draft};
use crate::handoff::State;
use crate::migration::{Phase, Role};
use crate::row::{Row, Went};
use crate::vocabulary::{Body, Denied, Effect, Event, Message, Step};
use crate::wait::{self, FREE_COPY, Wait};
use crate::{destination, life, orders, source};

/// A copy that is being freed is looked at again after this time, should the outcome get lost, milliseconds.
const FREEING_MS: u64 = 60_000;

/// What follows from `event`. Pure: the same arguments give the same answer.
///
/// # Errors
/// [`Denied`] if the event changes nothing and its sender should know.
pub fn step(row: &Row, event: Event, now_ms: u64) -> Result<Step, Denied> {
    let mut draft = Draft::new(row, now_ms);
    let rearm = matches!(event, Event::Wake | Event::Restarted);
    match event {
        Event::Restarted => restarted(&mut draft),
        Event::Wake => due(&mut draft),
        Event::Order(order) => orders::order(&mut draft, order)?,
        Event::Received { from, message } => received(&mut draft, &from, &message)?,
        Event::Plane { command, result } => plane(&mut draft, &command, result.map(|outcome| *outcome))?,
        Event::Machine { command, result } => {
            let of_migration = source::machine(&mut draft, &command, result.clone())
                .or_else(|_| destination::machine(&mut draft, &command, result.clone()));
            of_migration.or_else(|_| life::machine(&mut draft, &command, result))?;
        }
        Event::MachineLost { reason } => life::lost(&mut draft, &reason)?,
        Event::EpochSeen { epoch, by } => seen(&mut draft, epoch, &by)?,
    }
    draft.finish(row, rearm)
}

/// What must be (re)performed in this state: after a restart, and when a try failed or an answer did not come.
pub fn pending(row: &Row, now_ms: u64) -> Vec<Effect> {
    let mut effects = life::effects(row);
    effects.extend(draft::migration_effects(row));
    effects.extend(expired(row, now_ms));
    effects.extend(draft::next_wake(row).map(|at_ms| Effect::Wake { at_ms }));
    effects
}

/// The answer to a `Prepare` that this worker does not even consider, e.g. because it is cordoned; `None` for other messages.
pub fn decline(message: &Message, reason: &str) -> Option<Message> {
    let Body::Prepare { .. } = message.body else { return None };
    let failure = Failure { code: FailureCode::Refused, message: reason.to_owned() };
    Some(Message { body: Body::PrepareFailed { failure }, ..message.clone() })
}

fn restarted(draft: &mut Draft) {
    if let Some(phase) = draft.row.migration.as_ref().map(|migration| migration.phase) {
        draft.enter(phase);
        source::restarted(draft);
        destination::restarted(draft);
    }
    life::resume(draft);
    draft.drive_migration();
    expire(draft);
}

fn due(draft: &mut Draft) {
    source::due(draft);
    destination::due(draft);
    let now_ms = draft.now_ms;
    if let Some(wait) = draft.row.wait.as_mut().filter(|wait| wait.is_due(now_ms)) {
        wait.retry_ms = None;
        life::rest(draft);
    }
    expire(draft);
}

/// What frees the sealed copy, if its time has come.
fn expired(row: &Row, now_ms: u64) -> Vec<Effect> {
    let under_way = row.migration.as_ref().is_some_and(|migration| !migration.phase.is_over());
    // Never the volume of an owner, whatever else the row says.
    let is_handed_over = matches!(row.state, State::None | State::Released { .. });
    match &row.copy {
        Some(copy) if copy.expires_ms <= now_ms && !under_way && is_handed_over => {
            let volume = copy.volume.clone();
            vec![Effect::Plane(Command::Free { volume: volume.clone() }), Effect::Plane(Command::Delete { volume })]
        }
        _ => Vec::new(),
    }
}

/// Frees the sealed copy if its time has come.
pub(crate) fn expire(draft: &mut Draft) {
    let (row, now_ms) = (&mut draft.row, draft.now_ms);
    if row.wait.as_ref().is_some_and(|wait| wait.on != FREE_COPY || wait.retry_ms.is_some_and(|at| at > now_ms)) {
        return;
    }
    let effects = expired(row, now_ms);
    if !effects.is_empty() {
        let mut wait =
            row.wait.take().unwrap_or_else(|| Wait::new(FREE_COPY, "the copy's payload is discarded", now_ms));
        wait.retry_ms = Some(now_ms.saturating_add(FREEING_MS));
        row.wait = Some(wait);
        draft.effects.extend(effects);
    }
}

fn plane(draft: &mut Draft, command: &Command, result: Result<Outcome, Failure>) -> Result<(), Denied> {
    if let Some(done) = copy_outcome(draft, command, &result) {
        return done;
    }
    source::plane(draft, command, result.clone())
        .or_else(|_| destination::plane(draft, command, result.clone()))
        .or_else(|_| life::plane(draft, command, result))
}

/// An outcome of freeing the sealed copy, or of making room for the machine's return.
fn copy_outcome(draft: &mut Draft, command: &Command, result: &Result<Outcome, Failure>) -> Option<Result<(), Denied>> {
    let (Command::Free { volume } | Command::Delete { volume }) = command else { return None };
    draft.row.copy.as_ref().filter(|copy| copy.volume == *volume)?;
    let is_freeing = matches!(draft.row.state, State::None | State::Released { .. });
    match (command, result) {
        (Command::Delete { .. }, Ok(_)) => {
            draft.row.copy = None;
            if is_freeing {
                draft.row.wait = None;
                draft.row.volume = None;
                draft.row.spec = None;
            }
        }
        (_, Err(failure)) if is_freeing => {
            let (name, now_ms) = (draft.row.machine.as_str().to_owned(), draft.now_ms);
            wait::retry(&mut draft.row.wait, FREE_COPY, failure, wait::ASK, &name, now_ms);
        }
        // A failed Delete before a return shows in the Prepare that follows it.
        _ => {}
    }
    Some(Ok(()))
}

/// Whether it comes from the source of its migration.
fn is_of_source(body: &Body) -> bool {
    matches!(body, Body::Prepare { .. } | Body::Grant { .. } | Body::Refuse | Body::Abandon | Body::Released)
}

fn received(draft: &mut Draft, from: &WorkerId, message: &Message) -> Result<(), Denied> {
    let impossible =
        |reason: String| Denied::Impossible { from: from.clone(), what: message.body.name().to_owned(), reason };
    if message.machine != draft.row.machine {
        return Err(impossible(format!("it is about {}", message.machine)));
    }
    if let Some(migration) = draft.row.migration.as_ref().filter(|migration| migration.id == message.migration) {
        let by_source = is_of_source(&message.body);
        let about_our_role =
            matches!(message.body, Body::GrantStale { .. }) || by_source == (migration.role == Role::Destination);
        if migration.peer != *from || !about_our_role {
            return Err(impossible(format!("the other end of {} is {}", migration.id, migration.peer)));
        }
        if migration.epoch != message.epoch {
            return Err(impossible(format!("{} is about epoch {}", migration.id, migration.epoch)));
        }
    }
    if is_of_source(&message.body) {
        return destination::received(draft, from, message);
    }
    let is_source = draft.migration_as(Role::Source).is_some_and(|migration| migration.id == message.migration);
    if is_source { source::received(draft, from, message) } else { stranger(draft, from, message) }
}

/// A destination speaks of a migration that is over here, or that this row never knew.
fn stranger(draft: &mut Draft, from: &WorkerId, message: &Message) -> Result<(), Denied> {
    let owned = draft.row.state.owned();
    let is_claim = match &message.body {
        Body::GrantAccepted | Body::Verified { .. } => true,
        Body::Progress { phase } => *phase >= Phase::Granted,
        _ => false,
    };
    match (&message.body, owned) {
        (Body::PrepareOk, _) => draft.reply(from, message, Body::Abandon),
        // A higher epoch than the owner's: its journal is an old copy.
        // Nor is the same epoch ever another's: of two owners at one epoch neither would give way.
        (_, Some(epoch)) if is_claim && epoch <= message.epoch => draft.veto(message.epoch, from),
        (Body::Verified { .. }, Some(epoch)) => draft.reply(from, message, Body::GrantStale { top: epoch }),
        (Body::Verified { .. }, None) => draft.reply(from, message, Body::Released),
        // The source was reclaimed while this worker, the destination, was thought to be destroyed.
        (Body::GrantStale { top }, Some(epoch)) if *top > epoch => draft.veto(*top, from),
        _ => return Err(Denied::Unawaited),
    }
    Ok(())
}

/// Whether a claim of `row`'s machine by another worker, at `epoch`, says something that this row must remember: it
/// forbids an owner to boot, and whoever has a sealed copy may reclaim it only above the claim.
pub fn heeds(row: &Row, epoch: Epoch) -> bool {
    match &row.state {
        State::Active { epoch: own } | State::Moving { epoch: own, .. } => {
            *own <= epoch && row.veto.as_ref().is_none_or(|(seen, _)| *seen < epoch)
        }
        State::Sealed { epoch: own, .. } => highest_elsewhere(row, *own) < epoch,
        State::Released { epoch: own } => row.copy.is_some() && highest_elsewhere(row, *own) < epoch,
        State::None | State::Prepared { .. } => false,
    }
}

/// The highest epoch at which another worker is known to have, or to have been offered, a machine handed over at `own`.
pub(crate) fn highest_elsewhere(row: &Row, own: Epoch) -> Epoch {
    row.went.as_ref().map_or(own.next(), |went| went.epoch.max(own.next()))
}

/// Somebody claims the machine.
fn seen(draft: &mut Draft, epoch: Epoch, by: &WorkerId) -> Result<(), Denied> {
    if !heeds(&draft.row, epoch) {
        return Err(Denied::Unawaited);
    }
    if draft.row.state.owned().is_some() {
        draft.veto(epoch, by);
    } else {
        draft.row.went = Some(Went { to: by.clone(), epoch });
    }
    Ok(())
}
