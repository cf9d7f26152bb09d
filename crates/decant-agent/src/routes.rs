//! Where a machine is reached: from this worker's own rows if they know, else from the worker that does.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use decant_api::path::KnownRoute as Known;
use decant_api::{Route, RouteState};
use decant_base::{Epoch, MachineId, WorkerId};
use decant_drain::handoff::State;
use decant_drain::migration::Phase;
use decant_drain::{Desired, Life, Row};
use futures_util::future::join_all;
use tokio::time::Instant;

use crate::config::Config;
use crate::core::{Snapshot, read_spec};
use crate::peers::{Peer, Peers};
use crate::view;

/// Machines do not move in circles; a longer chain of handovers is followed by the next question.
const MAX_HOPS: usize = 4;
/// How long a peer may take beyond the wait that it was asked for.
const PATIENCE: Duration = Duration::from_secs(2);
/// Between two questions that were answered at once and brought nothing new: nobody holds such an answer back (nobody knows the
/// machine, or whoever should has forgotten it), and asking without a pause would cost two agents a core each. The first
/// pause; each further one is twice as long, up to [`LONGEST_PAUSE`].
const PAUSE: Duration = Duration::from_millis(25);
/// So much later than it happens a change may be seen, where nobody can tell that it has.
const LONGEST_PAUSE: Duration = Duration::from_millis(200);

/// Answers.
pub(crate) struct Routes {
    config: Arc<Config>,
    rows: Arc<Snapshot>,
    peers: Arc<Peers>,
    /// Who answered for a machine last, and what.
    hints: Mutex<HashMap<MachineId, (WorkerId, Route)>>,
}

impl Routes {
    pub(crate) fn new(config: Arc<Config>, rows: Arc<Snapshot>, peers: Arc<Peers>) -> Self {
        Self { config, rows, peers, hints: Mutex::default() }
    }

    /// What this worker's own rows say, held back for up to `wait` while that is nothing new.
    pub(crate) async fn local(&self, machine: &MachineId, known: Option<&Known>, wait: Duration) -> Route {
        let deadline = Instant::now() + wait;
        let mut changes = self.rows.changes();
        loop {
            changes.borrow_and_update();
            let route = self.own(machine).unwrap_or_else(|| unknown(machine));
            if is_news(&route, known) || tokio::time::timeout_at(deadline, changes.changed()).await.is_err() {
                return route;
            }
        }
    }

    /// Where `machine` is, held back for up to `wait` while that is nothing new; without `known`, while it is nowhere.
    pub(crate) async fn find(&self, machine: &MachineId, known: Option<&Known>, wait: Duration) -> Route {
        let deadline = Instant::now() + wait;
        // The first answer comes at once; then whoever gave it is asked to tell when it changes.
        let mut route = self.ask(machine, None, Duration::ZERO).await;
        let mut pause = PAUSE;
        while !is_news(&route, known) {
            let begun = Instant::now();
            if begun >= deadline {
                break;
            }
            let before = known_of(&route);
            route = self.ask(machine, Some(&before), deadline - begun).await;
            if known_of(&route) == before {
                // One that was held back has had its pause.
                tokio::time::sleep_until((begun + pause).min(deadline)).await;
                pause = (pause * 2).min(LONGEST_PAUSE);
            }
        }
        route
    }

    /// What is known of `machine` now; if nobody who answers knows anything, what was heard last.
    async fn ask(&self, machine: &MachineId, known: Option<&Known>, wait: Duration) -> Route {
        let route = self.ask_now(machine, known, wait).await;
        if route.state != RouteState::Unknown || route.worker.is_some() {
            return route;
        }
        // Whose agent is away may have it all the same.
        let heard = self.hint(machine).map(|(_, heard)| heard);
        heard.filter(|heard| heard.state != RouteState::Unknown).unwrap_or(route)
    }

    /// What this worker and those that answer know of `machine` now. What was heard earlier says only whom to ask first: its
    /// worker may be gone for good, and the machine run anew elsewhere, at a lower epoch.
    pub(crate) async fn ask_now(&self, machine: &MachineId, known: Option<&Known>, wait: Duration) -> Route {
        let own = self.own(machine);
        if let Some(route) = &own
            && route.state != RouteState::Moved
        {
            return if wait.is_zero() { route.clone() } else { self.local(machine, known, wait).await };
        }
        let hint = self.hint(machine);
        let mut next = own.as_ref().and_then(|route| route.worker.clone()).or_else(|| Some(hint?.0));
        let mut best = own;
        for _ in 0..MAX_HOPS {
            let Some(peer) = next.take().and_then(|worker| self.peers.get(&worker)) else { break };
            let Some(route) = self.ask_peer(peer, machine, known, wait).await else {
                break;
            };
            self.remember(machine, &peer.config.worker, &route);
            let moved_on = route.state == RouteState::Moved && route.worker.as_ref() != Some(&peer.config.worker);
            next = route.worker.clone().filter(|worker| moved_on && *worker != self.config.worker);
            if best.as_ref().is_none_or(|best| best.epoch <= route.epoch) && route.state != RouteState::Unknown {
                best = Some(route);
            }
            if next.is_none() && best.is_some() {
                return best.unwrap_or_else(|| unknown(machine));
            }
        }
        self.ask_all(machine, best).await
    }

    /// Nobody who should know does: everybody is asked, and the highest epoch is right.
    async fn ask_all(&self, machine: &MachineId, best: Option<Route>) -> Route {
        let answers = self.peers.all().map(|peer| async move {
            (peer.config.worker.clone(), self.ask_peer(peer, machine, None, Duration::ZERO).await)
        });
        let answers = join_all(answers).await;
        let found = answers
            .into_iter()
            .filter_map(|(worker, route)| Some((worker, route.filter(|route| route.state != RouteState::Unknown)?)))
            .max_by_key(|(_, route)| (route.epoch, route.state == RouteState::Moved && route.worker.is_some()));
        let Some((worker, route)) =
            found.filter(|(_, route)| best.as_ref().is_none_or(|best| route.epoch >= best.epoch))
        else {
            return best.unwrap_or_else(|| unknown(machine));
        };
        self.remember(machine, &worker, &route);
        route
    }

    async fn ask_peer(&self, peer: &Peer, machine: &MachineId, known: Option<&Known>, wait: Duration) -> Option<Route> {
        // What we call "moved there" the peer itself calls "here".
        let known = known.cloned().map(|known| {
            let is_there = known.state == RouteState::Moved && known.worker.as_ref() == Some(&peer.config.worker);
            Known { state: if is_there { RouteState::Here } else { known.state }, ..known }
        });
        let path = decant_api::path::route_if_changed(machine, millis(wait), known.as_ref()) + "&scope=local";
        let route = peer.client.clone().with_timeout(wait + PATIENCE).get::<Route>(&path).await.ok()?;
        let is_there = route.state == RouteState::Here;
        Some(if is_there {
            Route { state: RouteState::Moved, worker: Some(peer.config.worker.clone()), ..route }
        } else {
            route
        })
    }

    fn hint(&self, machine: &MachineId) -> Option<(WorkerId, Route)> {
        self.hints.lock().unwrap_or_else(PoisonError::into_inner).get(machine).cloned()
    }

    fn remember(&self, machine: &MachineId, worker: &WorkerId, route: &Route) {
        let hint = (worker.clone(), route.clone());
        self.hints.lock().unwrap_or_else(PoisonError::into_inner).insert(machine.clone(), hint);
    }

    fn own(&self, machine: &MachineId) -> Option<Route> {
        of_row(&self.config, &*self.rows.machine(machine)?)
    }
}

fn millis(duration: Duration) -> u64 {
    u64::try_from(duration.as_millis()).unwrap_or(u64::MAX)
}

fn known_of(route: &Route) -> Known {
    Known { state: route.state, epoch: route.epoch, worker: route.worker.clone() }
}

fn unknown(machine: &MachineId) -> Route {
    Route { machine: machine.clone(), state: RouteState::Unknown, worker: None, address: None, epoch: Epoch(0) }
}

fn is_news(route: &Route, known: Option<&Known>) -> bool {
    match known {
        Some(known) => known_of(route) != *known,
        None => matches!(route.state, RouteState::Here | RouteState::Moved),
    }
}

/// What a row says; `None` if it says nothing about where the machine is.
pub(crate) fn of_row(config: &Config, row: &Row) -> Option<Route> {
    let spec = read_spec(row.spec.as_ref()?).ok()?;
    let at = |state, worker: &WorkerId, epoch| {
        let address = view::address(config, &spec, worker);
        Some(Route { machine: row.machine.clone(), state, worker: Some(worker.clone()), address, epoch })
    };
    let migration = row.migration.as_ref();
    match &row.state {
        State::Moving { epoch, to, .. }
            if migration.is_some_and(|m| matches!(m.phase, Phase::Prepared | Phase::Stopped)) =>
        {
            at(RouteState::Moving, to, epoch.next())
        }
        State::Active { epoch } | State::Moving { epoch, .. } => match (row.life, row.desired) {
            (Life::Up, _) => at(RouteState::Here, &row.worker, *epoch),
            (_, Desired::Running) => at(RouteState::Moving, &row.worker, *epoch),
            _ => at(RouteState::Unknown, &row.worker, *epoch),
        },
        State::Sealed { epoch, to, .. } => {
            let is_theirs = migration.is_some_and(|migration| migration.accepted || migration.phase >= Phase::Granted);
            at(if is_theirs { RouteState::Moved } else { RouteState::Moving }, to, epoch.next())
        }
        State::Released { .. } | State::None => {
            let went = row.went.as_ref()?;
            at(RouteState::Moved, &went.to, went.epoch)
        }
        // Not ours yet: whoever hands it over knows.
        State::Prepared { .. } => {
            let migration = migration?;
            at(RouteState::Moved, &migration.peer, Epoch(migration.epoch.0.saturating_sub(1)))
        }
    }
}
