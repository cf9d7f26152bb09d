//! The line that a step adds to the event log: old state, event, new state.

use decant_base::{DrainId, MachineId, MigrationId, VolumeId};
use decant_drain::drain::{DrainEvent, DrainRow};
use decant_drain::{Event, Order, Row, Severity};
use decant_fsm::LogEntry;
use serde::{Deserialize, Serialize};

/// What a line is about, in its `detail`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Detail {
    /// E.g. `migration.sealed`.
    pub(crate) kind: String,
    /// For people.
    pub(crate) message: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) machine: Option<MachineId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) volume: Option<VolumeId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) migration: Option<MigrationId>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(crate) drain: Option<DrainId>,
}

impl Detail {
    /// A line for the log that changes no row.
    pub(crate) fn note(self, subject: String, now_ms: u64) -> LogEntry {
        LogEntry {
            seq: 0,
            time_ms: now_ms,
            subject,
            from: String::new(),
            event: self.kind.clone(),
            to: String::new(),
            detail: serde_json::to_value(&self).expect("a detail has string keys"),
        }
    }
}

/// The line of a machine's step; `None` if nothing changed that anybody would want to read.
pub(super) fn of_machine(old: &Row, event: &str, new: &Row, now_ms: u64) -> Option<LogEntry> {
    let (kind, from, to) = difference(old, new)?;
    let migration = new.migration.as_ref();
    let route = migration.filter(|_| kind.starts_with("migration.")).map(|migration| match migration.role {
        decant_drain::migration::Role::Source => format!(", {} -> {}", new.worker, migration.peer),
        decant_drain::migration::Role::Destination => format!(", {} -> {}", migration.peer, new.worker),
    });
    let wait = new.wait.iter().chain(migration.and_then(|migration| migration.wait.as_ref()));
    let reason: String = wait.filter(|wait| !wait.reason.is_empty()).map(|wait| format!(": {}", wait.reason)).collect();
    let message = format!("{} {from} -> {to}{}{reason}", new.machine, route.unwrap_or_default());
    let detail = Detail {
        kind,
        message,
        machine: Some(new.machine.clone()),
        volume: new.volume.clone(),
        migration: migration.map(|migration| migration.id.clone()),
        drain: migration.and_then(|migration| migration.drain.clone()),
    };
    let subject = format!("machine/{}", new.machine);
    Some(LogEntry { event: event.to_owned(), from, to, ..detail.note(subject, now_ms) })
}

/// What changed most: kind, old, new.
fn difference(old: &Row, new: &Row) -> Option<(String, String, String)> {
    let phase = |row: &Row| row.migration.as_ref().map(|migration| (migration.id.clone(), migration.phase));
    if let (before, Some((id, now))) = (phase(old), phase(new))
        && before.as_ref() != Some(&(id.clone(), now))
    {
        let from = before.filter(|(old_id, _)| *old_id == id).map_or("new", |(_, phase)| phase.name());
        return Some((format!("migration.{}", now.name()), from.to_owned(), now.name().to_owned()));
    }
    if old.state != new.state {
        let names = (old.state.name().to_owned(), new.state.name().to_owned());
        return Some((format!("machine.{}", names.1), names.0, names.1));
    }
    if old.life != new.life || old.desired != new.desired {
        let word = |row: &Row| format!("{:?}", row.life).to_lowercase();
        return Some((format!("machine.{}", word(new)), word(old), word(new)));
    }
    let trouble = |row: &Row| {
        let wait = row.migration.as_ref().and_then(|migration| migration.wait.as_ref()).or(row.wait.as_ref());
        wait.filter(|wait| wait.severity > Severity::Waiting)
            .map(|wait| (wait.severity, wait.on.clone(), wait.reason.clone()))
    };
    let now = trouble(new)?;
    let was = trouble(old);
    let word = |severity| if severity == Severity::Stuck { "stuck" } else { "retrying" };
    (was.as_ref() != Some(&now)).then(|| {
        let from = was.map_or("fine".to_owned(), |was| word(was.0).to_owned());
        (format!("machine.{}", word(now.0)), from, format!("{} on {}", word(now.0), now.1))
    })
}

/// The line of a drain's step.
pub(super) fn of_drain(old: &DrainRow, event: &str, new: &DrainRow, now_ms: u64) -> Option<LogEntry> {
    if old.state == new.state && event != "ordered" {
        return None;
    }
    let (from, to) = (if event == "ordered" { "new" } else { old.state.name() }, new.state.name());
    let blockers: String = new.blockers.iter().map(|blocker| format!("; {}", blocker.reason)).collect();
    let detail = Detail {
        kind: format!("drain.{to}"),
        message: format!("drain of {} {from} -> {to}{blockers}", new.worker),
        drain: Some(new.order.drain.clone()),
        ..Detail::default()
    };
    let subject = format!("drain/{}", new.order.drain);
    Some(LogEntry { event: event.to_owned(), from: from.to_owned(), to: to.to_owned(), ..detail.note(subject, now_ms) })
}

/// An event's stable word.
pub(super) fn word(event: &Event) -> String {
    match event {
        Event::Restarted => "restarted".to_owned(),
        Event::Wake => "timer".to_owned(),
        Event::Order(order) => match order {
            Order::Run { .. } => "run",
            Order::Start => "start",
            Order::Stop => "stop",
            Order::Remove { .. } => "remove",
            Order::Move(_) => "move",
            Order::Cancel { .. } => "cancel",
            Order::Reclaim => "reclaim",
            Order::ForgetOrigin => "forget-origin",
            Order::Retry => "retry",
            Order::FreeCopy => "free-copy",
            Order::ClearVeto => "clear-veto",
        }
        .to_owned(),
        Event::Received { from, message } => format!("{} from {from}", message.body.name()),
        Event::Plane { command, result } => outcome(&tag(command, "command"), result.is_ok()),
        Event::Machine { command, result } => outcome(&format!("machine {}", tag(command, "command")), result.is_ok()),
        Event::MachineLost { .. } => "machine lost".to_owned(),
        Event::EpochSeen { .. } => "higher epoch seen".to_owned(),
    }
}

fn outcome(what: &str, ok: bool) -> String {
    if ok { format!("{what} done") } else { format!("{what} failed") }
}

/// The word that an internally tagged enum is written with.
fn tag(value: &impl Serialize, key: &str) -> String {
    let json = serde_json::to_value(value).ok();
    json.and_then(|json| json.get(key)?.as_str().map(str::to_owned)).unwrap_or_default()
}

/// A drain's event's stable word.
pub(super) fn drain_word(event: &DrainEvent) -> &'static str {
    match event {
        DrainEvent::Restarted => "restarted",
        DrainEvent::Wake => "timer",
        DrainEvent::Cordoned { .. } => "cordoned",
        DrainEvent::Surveyed { .. } => "surveyed",
        DrainEvent::News(_) => "migration changed",
        DrainEvent::MoveDenied { .. } => "move denied",
        DrainEvent::Resume => "resume",
        DrainEvent::Cancel => "cancel",
        DrainEvent::Max(_) => "max",
    }
}
