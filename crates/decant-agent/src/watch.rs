//! What changes without anybody being told: machines that die, health checks that pass, devices that vanish.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use decant_base::{Epoch, MachineId};
use decant_dataplane::VolumeState;
use decant_drain::{Event, Life, Row};
use decant_machine::State;

use crate::agent::Agent;
use crate::core::{Detail, Input, read_spec};
use crate::view;

/// How often a running machine is looked at.
const LOOK: Duration = Duration::from_millis(500);
/// How long a driver may take to say how a machine stands.
const PATIENCE: Duration = Duration::from_secs(2);
/// A health check is given this long at a time.
const HEALTH_PATIENCE: Duration = Duration::from_secs(30);

/// When machines' health checks passed first, by claim.
#[derive(Debug, Default)]
pub(crate) struct Health {
    passed: Mutex<BTreeMap<MachineId, (Epoch, Check)>>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Check {
    Running,
    PassedAt(u64),
}

impl Health {
    /// When the machine's check passed first under the claim `epoch`, Unix milliseconds.
    pub(crate) fn passed_at(&self, machine: &MachineId, epoch: Epoch) -> Option<u64> {
        match self.lock().get(machine) {
            Some((at, Check::PassedAt(ms))) if *at == epoch => Some(*ms),
            _ => None,
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, BTreeMap<MachineId, (Epoch, Check)>> {
        self.passed.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Whether a check of this claim has to be started.
    fn begin(&self, machine: &MachineId, epoch: Epoch) -> bool {
        let mut passed = self.lock();
        if passed.get(machine).is_some_and(|(at, _)| *at == epoch) {
            return false;
        }
        passed.insert(machine.clone(), (epoch, Check::Running));
        true
    }

    fn end(&self, machine: &MachineId, epoch: Epoch, passed_at_ms: Option<u64>) {
        let mut passed = self.lock();
        if passed.get(machine) != Some(&(epoch, Check::Running)) {
            return;
        }
        match passed_at_ms {
            Some(ms) => passed.insert(machine.clone(), (epoch, Check::PassedAt(ms))),
            None => passed.remove(machine),
        };
    }

    /// Forgets a machine that is not up any more: its next start is checked again.
    fn forget(&self, machine: &MachineId) {
        self.lock().remove(machine);
    }
}

/// Starts a health check for every machine that has come up, as soon as it has.
pub(crate) async fn health(agent: Arc<Agent>) {
    let mut changes = agent.rows.changes();
    loop {
        changes.borrow_and_update();
        for row in agent.rows.machines() {
            match row.state.owned() {
                Some(epoch) if row.life == Life::Up => check(&agent, &row, epoch),
                _ => agent.health.forget(&row.machine),
            }
        }
        if changes.changed().await.is_err() {
            return;
        }
    }
}

fn check(agent: &Arc<Agent>, row: &Row, epoch: Epoch) {
    let Some(spec) = row.spec.as_ref().and_then(|spec| read_spec(spec).ok()) else { return };
    let Some(address) = view::address(&agent.config, &spec, &row.worker) else { return };
    if spec.health.is_none() || !agent.health.begin(&row.machine, epoch) {
        return;
    }
    let agent = agent.clone();
    let migration = row.migration.as_ref().map(|migration| migration.id.clone());
    tokio::task::spawn_blocking(move || {
        let result = agent.world.machines.wait_healthy(&spec, address, HEALTH_PATIENCE);
        let now_ms = agent.clock.now_ms();
        agent.health.end(&spec.id, epoch, result.is_ok().then_some(now_ms));
        let (kind, message) = match result {
            Ok(()) => ("machine.healthy", format!("{} serves", spec.id)),
            Err(failure) => ("machine.unhealthy", failure.message),
        };
        let detail =
            Detail { kind: kind.to_owned(), message, machine: Some(spec.id.clone()), migration, ..Detail::default() };
        agent.core.tell(Input::Note(Box::new(detail.note(format!("machine/{}", spec.id), now_ms))));
    });
}

/// Looks at every machine that should be up.
pub(crate) async fn losses(agent: Arc<Agent>) {
    let mut ticks = tokio::time::interval(LOOK);
    ticks.set_missed_tick_behavior(tokio::time::MissedTickBehavior::Delay);
    for tick in 0u64.. {
        ticks.tick().await;
        for row in agent.rows.machines().into_iter().filter(|row| row.life == Life::Up) {
            let agent = agent.clone();
            // A machine that is still being looked at is not looked at twice: the statuses share one question.
            tokio::spawn(async move {
                let Some(reason) = loss(&agent, &row).await else { return };
                // Only if nothing happened to it meanwhile: it may have been told to stop while it was looked at.
                let same = agent.rows.machine(&row.machine).is_some_and(|now| Arc::ptr_eq(&now, &row));
                if same {
                    agent.core.event(&row.machine, Event::MachineLost { reason });
                }
            });
        }
        if tick.is_multiple_of(10) {
            agent.count_bytes().await;
        }
    }
}

/// Why the machine cannot be up, if it cannot.
async fn loss(agent: &Arc<Agent>, row: &Row) -> Option<String> {
    match agent.driver_status(&row.machine, PATIENCE).await {
        // Not known is not lost.
        None | Some(Err(_)) => None,
        Some(Ok(None)) => Some("its shim is gone".to_owned()),
        Some(Ok(Some(status))) => match status.state {
            State::Stopped => Some("it has stopped without having been told to".to_owned()),
            State::Failed | State::Lost => Some(status.reason.unwrap_or_else(|| "its shim gave it up".to_owned())),
            _ => device_loss(agent, row).await,
        },
    }
}

async fn device_loss(agent: &Arc<Agent>, row: &Row) -> Option<String> {
    let status = agent.statuses.of(row.volume.as_ref()?).await.ok()?;
    let is_there = matches!(status.state, VolumeState::Attached | VolumeState::Hydrating) && status.device.is_some();
    (!is_there).then(|| format!("the device of its volume {} is gone: its keeper died", status.volume))
}
