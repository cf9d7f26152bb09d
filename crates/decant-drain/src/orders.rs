//! What an operator, or a drain, orders of one machine.

use decant_base::{MigrationId, VolumeId};
use serde_json::Value;

use crate::draft::{Draft, not_owner};
use crate::handoff::{State, Top};
use crate::migration::{Phase, Role};
use crate::row::{Desired, Life};
use crate::vocabulary::{Denied, Move, Order};
use crate::wait::Severity;
use crate::{destination, life, source};

/// Carries the order out, or says why not.
pub(crate) fn order(draft: &mut Draft, order: Order) -> Result<(), Denied> {
    match order {
        Order::Run { spec, volume } => run(draft, spec, volume),
        Order::Start => desire(draft, Desired::Running),
        Order::Stop => desire(draft, Desired::Stopped),
        Order::Remove { force } => remove(draft, force),
        Order::Move(order) => move_to(draft, *order),
        Order::Cancel { migration } => cancel(draft, &migration),
        Order::Reclaim => source::reclaim(draft),
        Order::ForgetOrigin => forget_origin(draft),
        Order::Retry => {
            retry(draft);
            Ok(())
        }
        Order::FreeCopy => free_copy(draft),
        Order::ClearVeto => clear_veto(draft),
    }
}

fn busy<T>(reason: String) -> Result<T, Denied> {
    Err(Denied::Busy { reason })
}

fn run(draft: &mut Draft, spec: Value, volume: Option<VolumeId>) -> Result<(), Denied> {
    let row = &mut draft.row;
    if row.state != State::None {
        return Err(Denied::Exists { state: row.state.name().to_owned() });
    }
    if let Some(migration) = row.migration.as_ref().filter(|migration| !migration.phase.is_over()) {
        return busy(format!("migration {} of this machine is being undone here: try again in a moment", migration.id));
    }
    let epoch = row.top.epoch.next();
    row.state = State::Active { epoch };
    row.top = Top { epoch, answer: None };
    row.spec = Some(spec);
    row.volume = volume;
    row.desired = Desired::Running;
    row.life = Life::Down;
    row.device = None;
    row.migration = None;
    row.went = None;
    life::reconsider(draft);
    Ok(())
}

fn desire(draft: &mut Draft, desired: Desired) -> Result<(), Denied> {
    if draft.row.state.owned().is_none() {
        return Err(not_owner(&draft.row));
    }
    match draft.row.desired {
        Desired::Removed => return busy("this machine is being removed".to_owned()),
        now if now == desired => return Ok(()),
        _ => draft.row.desired = desired,
    }
    if desired == Desired::Stopped && draft.row.life == Life::Down && life::may_run(&draft.row).is_some() {
        // Not known to be up is not known to be down.
        draft.row.life = Life::Stopping;
    }
    life::reconsider(draft);
    Ok(())
}

fn remove(draft: &mut Draft, force: bool) -> Result<(), Denied> {
    if !matches!(draft.row.state, State::Active { .. }) {
        return match &draft.row.state {
            State::Moving { migration, .. } => busy(format!("it is being moved: cancel migration {migration} first")),
            _ => Err(not_owner(&draft.row)),
        };
    }
    if force {
        destination::give_up(draft);
    }
    if let Some(reason) = not_over(draft) {
        if draft.row.veto.is_none() {
            return busy(format!("it is still being moved here; {reason}"));
        }
        // Whoever claims the higher epoch has it: nothing comes from the source any more, and nobody waits for a word of ours.
        // A source that asks nevertheless hears that the machine was whole only if it was.
        let phase = draft.migration_as(Role::Destination).map(|migration| migration.phase);
        if phase.is_some_and(|phase| phase < Phase::Verified) {
            destination::give_up(draft);
        } else {
            draft.enter(Phase::Cleaned);
        }
    }
    // Nobody boots it again, so a higher epoch elsewhere does no harm; without this a vetoed machine could not be removed.
    draft.row.veto = None;
    draft.row.wait = None;
    if draft.row.desired != Desired::Removed {
        draft.row.desired = Desired::Removed;
        if draft.row.life == Life::Down {
            // What is known is not enough to delete a volume: survivors are told to stop first.
            draft.row.life = Life::Stopping;
        }
        life::reconsider(draft);
    }
    Ok(())
}

fn move_to(draft: &mut Draft, order: Move) -> Result<(), Denied> {
    let row = &draft.row;
    if let Some(migration) = &row.migration {
        if migration.id == order.migration && migration.role == Role::Source {
            return Ok(());
        }
        let is_farewell = migration.role == Role::Source && migration.phase == Phase::Unwinding && migration.local_done;
        if !migration.phase.is_over() && !is_farewell {
            return busy(match migration.role {
                Role::Source => {
                    format!("migration {} to {} is under way: {}", migration.id, migration.peer, migration.phase.name())
                }
                Role::Destination => {
                    format!("this machine is not whole here yet; {}", not_over(draft).unwrap_or_default())
                }
            });
        }
    }
    let State::Active { epoch } = row.state else { return Err(not_owner(row)) };
    if order.to == row.worker {
        return Err(Denied::Senseless { reason: format!("{} has this machine already", row.worker) });
    }
    if let Some((seen, by)) = &row.veto {
        return busy(format!("{by} claims this machine at epoch {seen}, above {epoch}: make sure who has it first"));
    }
    if row.desired == Desired::Removed {
        return busy("this machine is being removed".to_owned());
    }
    source::begin(draft, order, epoch);
    Ok(())
}

/// Why a machine that is still being moved here is not to be touched, and what to do if its origin is destroyed.
fn not_over(draft: &Draft) -> Option<String> {
    let migration = draft.row.migration.as_ref();
    let migration = migration.filter(|migration| migration.role == Role::Destination && !migration.phase.is_over())?;
    let (machine, from) = (&draft.row.machine, &migration.peer);
    let way_out = match migration.phase {
        Phase::Granted | Phase::Booted | Phase::Hydrating => {
            format!(", or, if {from} is destroyed, give it up with `decant machine rm {machine} --with-volume --force`")
        }
        Phase::Verified => {
            format!(", or, if {from} is destroyed, order `decant machine forget-origin {machine} --force`")
        }
        _ => String::new(),
    };
    Some(format!("{} from {from} is {}: wait until it is over{way_out}", migration.id, migration.phase.name()))
}

fn cancel(draft: &mut Draft, id: &MigrationId) -> Result<(), Denied> {
    match &draft.row.migration {
        Some(migration) if migration.id == *id => match (migration.phase, migration.role) {
            (Phase::Verified, _) | (Phase::Cleaned, _) if migration.accepted => Err(Denied::TooLate {
                migration: id.clone(),
                to: if migration.role == Role::Source { migration.peer.clone() } else { draft.row.worker.clone() },
            }),
            (phase, _) if phase.is_over() => {
                Err(Denied::Over { migration: id.clone(), phase: phase.name().to_owned() })
            }
            (_, Role::Source) => source::cancel(draft),
            (_, Role::Destination) => destination::cancel(draft),
        },
        _ => Err(Denied::Unknown { migration: id.clone() }),
    }
}

fn forget_origin(draft: &mut Draft) -> Result<(), Denied> {
    match draft.migration_as(Role::Destination).map(|migration| migration.phase) {
        Some(Phase::Verified) => {
            destination::clean(draft);
            Ok(())
        }
        Some(phase) if phase >= Phase::Granted && phase < Phase::Verified => busy(format!(
            "blocks of this machine's volume are still missing here: without its origin it is not whole; \
             `decant machine rm {} --with-volume --force` gives it up",
            draft.row.machine
        )),
        _ => Err(Denied::Senseless { reason: "no origin waits for a word from here".to_owned() }),
    }
}

/// Whatever is stuck or waits for its time: now.
fn retry(draft: &mut Draft) {
    if draft.row.veto.is_none() && draft.row.wait.take().is_some() {
        life::rest(draft);
    }
    let is_waiting = |wait: &crate::wait::Wait| wait.severity != Severity::Waiting || wait.retry_ms.is_some();
    if draft.row.migration.as_ref().and_then(|migration| migration.wait.as_ref()).is_some_and(is_waiting)
        && let Some(phase) = draft.row.migration.as_ref().map(|migration| migration.phase)
    {
        draft.enter(phase);
        source::restarted(draft);
        destination::restarted(draft);
        draft.drive_migration();
    }
}

fn free_copy(draft: &mut Draft) -> Result<(), Denied> {
    let now_ms = draft.now_ms;
    if draft.row.migration.as_ref().is_some_and(|migration| !migration.phase.is_over()) {
        return busy("the copy is still in use: wait until the migration is over".to_owned());
    }
    let Some(copy) = &mut draft.row.copy else {
        return Err(Denied::Senseless { reason: "no sealed copy of this machine is kept here".to_owned() });
    };
    copy.expires_ms = copy.expires_ms.min(now_ms);
    draft.row.wait = None;
    crate::step::expire(draft);
    Ok(())
}

fn clear_veto(draft: &mut Draft) -> Result<(), Denied> {
    if let (State::Moving { migration, .. }, Some(_)) = (&draft.row.state, &draft.row.veto) {
        // The destination is granted the epoch after this one, which was promised before the claim was heard.
        return busy(format!("it is being moved: cancel migration {migration} first"));
    }
    let Some((seen, _)) = draft.row.veto.take() else {
        return Err(Denied::Senseless { reason: "nobody claims this machine at a higher epoch".to_owned() });
    };
    draft.row.wait = None;
    if let State::Active { epoch } = &mut draft.row.state {
        // The highest epoch is the owner's: say so, should the other claim turn up again.
        let above = seen.max(draft.row.top.epoch).next();
        *epoch = above;
        draft.row.top = Top { epoch: above, answer: None };
    }
    if draft.row.life != Life::Up {
        life::resume(draft);
    }
    Ok(())
}
