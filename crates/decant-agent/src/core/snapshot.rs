//! What is committed, for everybody who only wants to read.

use std::collections::BTreeMap;
use std::sync::{Arc, PoisonError, RwLock};

use decant_base::{DrainId, MachineId};
use decant_drain::Row;
use decant_drain::drain::DrainRow;
use tokio::sync::watch;

use crate::core::WorkerRow;

#[derive(Debug, Default)]
struct Rows {
    machines: BTreeMap<MachineId, Arc<Row>>,
    drains: BTreeMap<DrainId, Arc<DrainRow>>,
    worker: WorkerRow,
}

/// Every committed row. Reading never waits for a step.
#[derive(Debug)]
pub(crate) struct Snapshot {
    rows: RwLock<Rows>,
    changes: watch::Sender<u64>,
}

impl Snapshot {
    pub(crate) fn new(machines: Vec<Row>, drains: Vec<DrainRow>, worker: WorkerRow) -> Self {
        let machines = machines.into_iter().map(|row| (row.machine.clone(), Arc::new(row))).collect();
        let drains = drains.into_iter().map(|row| (row.order.drain.clone(), Arc::new(row))).collect();
        Self { rows: RwLock::new(Rows { machines, drains, worker }), changes: watch::Sender::new(0) }
    }

    fn read(&self) -> std::sync::RwLockReadGuard<'_, Rows> {
        self.rows.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn write(&self) -> std::sync::RwLockWriteGuard<'_, Rows> {
        self.rows.write().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn machine(&self, machine: &MachineId) -> Option<Arc<Row>> {
        self.read().machines.get(machine).cloned()
    }

    pub(crate) fn machines(&self) -> Vec<Arc<Row>> {
        self.read().machines.values().cloned().collect()
    }

    pub(crate) fn drain(&self, drain: &DrainId) -> Option<Arc<DrainRow>> {
        self.read().drains.get(drain).cloned()
    }

    pub(crate) fn drains(&self) -> Vec<Arc<DrainRow>> {
        self.read().drains.values().cloned().collect()
    }

    pub(crate) fn worker(&self) -> WorkerRow {
        self.read().worker.clone()
    }

    /// A counter that grows with every change; to wait on.
    pub(crate) fn changes(&self) -> watch::Receiver<u64> {
        self.changes.subscribe()
    }

    /// Wakes everybody who waits, e.g. because something that is no row has changed.
    pub(crate) fn touch(&self) {
        self.changes.send_modify(|count| *count += 1);
    }

    pub(super) fn put_machine(&self, row: Arc<Row>) {
        self.write().machines.insert(row.machine.clone(), row);
        self.touch();
    }

    pub(super) fn put_drain(&self, row: Arc<DrainRow>) {
        self.write().drains.insert(row.order.drain.clone(), row);
        self.touch();
    }

    pub(super) fn put_worker(&self, row: WorkerRow) {
        self.write().worker = row;
        self.touch();
    }
}
