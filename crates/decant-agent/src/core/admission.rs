//! Whether this worker even considers a machine that a peer wants to hand over. Room and key are the plane's to prove.

use std::sync::atomic::{AtomicU64, Ordering};

use decant_base::Bytes;
use decant_drain::handoff::State;
use decant_drain::{Body, Desired, Message, Row};

use crate::core::{Snapshot, lanes};

/// What a worker takes at most.
#[derive(Debug)]
pub(crate) struct Admission {
    /// Machines.
    pub(crate) max_machines: u64,
    /// Bytes of volumes.
    pub(crate) max_bytes: Bytes,
    /// Bytes that its volumes take, as last counted.
    pub(crate) bytes_used: AtomicU64,
}

impl Admission {
    /// Why `message`, if it is a `Prepare` of a migration that is new here, is not considered.
    pub(super) fn refusal(&self, rows: &Snapshot, message: &Message) -> Option<String> {
        let Body::Prepare { spec, offer, .. } = &message.body else { return None };
        let known = rows.machine(&message.machine);
        if known.is_some_and(|row| row.migration.as_ref().is_some_and(|migration| migration.id == message.migration)) {
            return None;
        }
        if let Some(cordoned) = rows.worker().cordoned {
            let reason = if cordoned.reason.is_empty() { String::new() } else { format!(" ({})", cordoned.reason) };
            return Some(format!("it is cordoned{reason}: uncordon it or choose another worker"));
        }
        let mut machines = 0u64;
        let index = lanes::read_spec(spec).map(|spec| spec.address_index);
        for row in rows.machines().iter().filter(|row| is_or_will_be_here(row)) {
            machines += 1;
            let other = row.spec.as_ref().and_then(|spec| lanes::read_spec(spec).ok()).map(|spec| spec.address_index);
            if row.machine != message.machine && other.is_some() && other == index.as_ref().ok().copied() {
                return Some(format!("{} has the same address_index here: give one of them another", row.machine));
            }
        }
        if machines >= self.max_machines {
            return Some(format!(
                "it has {machines} machines and takes {}: raise capacity.machines",
                self.max_machines
            ));
        }
        let room = offer.as_ref().map_or(0, |offer| offer.room.0);
        let used = self.bytes_used.load(Ordering::Relaxed);
        if used.saturating_add(room) > self.max_bytes.0 {
            let (used, room) = (Bytes(used), Bytes(room));
            return Some(format!(
                "its volumes take {used} of {} and this one up to {room}: raise capacity.bytes",
                self.max_bytes
            ));
        }
        None
    }
}

/// Whether the machine counts against this worker's capacity.
pub(crate) fn is_or_will_be_here(row: &Row) -> bool {
    row.desired != Desired::Removed && (row.state.owned().is_some() || matches!(row.state, State::Prepared { .. }))
}
