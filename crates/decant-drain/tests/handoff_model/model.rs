//! Three workers and the network between them, and all that may happen to them.

use std::hash::BuildHasher;
use std::sync::Arc;

use decant_base::Epoch;
use decant_dataplane::{Command, Failure, FailureCode};
use decant_drain::handoff::State;
use decant_drain::migration::{Phase, Role};
use decant_drain::{Desired, Effect, Event, Order, Row, Sync, pending, step};
use stateright::{Model, Property};

use crate::properties;
use crate::steps::{Cause, Handoff};
use crate::world::{Kind, Site, index_of, machine, move_to, volume, worker};

pub(crate) const WORKERS: usize = 3;

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct WorkerState {
    /// The row as it is on the medium.
    pub(crate) disk: u32,
    /// The row as the agent has it.
    pub(crate) mem: u32,
    /// Effects to perform, in order.
    pub(crate) queue: Vec<u32>,
    /// The agent runs.
    pub(crate) up: bool,
    /// The worker exists.
    pub(crate) alive: bool,
    pub(crate) site: Site,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct World {
    pub(crate) workers: [WorkerState; WORKERS],
    /// Letters ever sent, sorted.
    pub(crate) net: Vec<u32>,
    /// Writes acknowledged to the machine's clients and not given up by a reclaim.
    pub(crate) acknowledged: u8,
    pub(crate) moves: u8,
    pub(crate) crashes: u8,
    pub(crate) cancels: u8,
    pub(crate) reclaims: u8,
    pub(crate) failures: u8,
    pub(crate) toggles: u8,
    pub(crate) losses: u8,
    pub(crate) claims: u8,
    pub(crate) retries: u8,
    /// The machine was given up, whole or not.
    pub(crate) removed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Crash {
    No,
    Kill,
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Action {
    /// A letter arrives; the agent may die when the step is committed and nothing of it performed.
    Deliver(u32, Crash),
    /// The first effect of the queue is performed; the agent may die before its outcome is stepped.
    Perform(usize, Crash),
    /// It fails instead, in a way that does not pass.
    Refuse(usize),
    /// A timer fires, or what was pending is tried again.
    Again(usize),
    Crash(usize, Crash),
    Start(usize),
    Move(usize, usize),
    Cancel(usize),
    /// The destination is destroyed, the source boots its copy.
    Reclaim(usize),
    Write(usize),
    Hydrate(usize),
    /// The operator wants it up, or down.
    Toggle(usize, bool),
    /// The operator says that the origin is destroyed, which is so or not, and every block is here.
    ForgetOrigin(usize, bool),
    /// The origin is destroyed, and the machine is given up.
    GiveUp(usize),
    /// Somebody claims a higher epoch.
    Claim(usize),
    ClearVeto(usize),
    Retry(usize),
}

impl Handoff {
    /// Applies a step to the world: commit, then letters, then the queue; or death in between.
    fn apply(&self, world: &mut World, who: usize, cause: Cause, event: impl FnOnce() -> Event, crash: Crash) -> bool {
        let Some(stepped) = self.stepped(who, world.workers[who].mem, cause, event) else { return false };
        let worker = &mut world.workers[who];
        worker.mem = stepped.row;
        if stepped.sync == Sync::Now {
            worker.disk = stepped.row;
        }
        if crash != Crash::No {
            self.crash(world, who, crash);
            return true;
        }
        // As an agent may: what waits at the end of the queue already is not queued again.
        if !worker.queue.ends_with(&stepped.effects) {
            worker.queue.extend(&stepped.effects);
        }
        for letter in &stepped.letters {
            if let Err(at) = world.net.binary_search(letter) {
                world.net.insert(at, *letter);
            }
        }
        true
    }

    fn crash(&self, world: &mut World, who: usize, crash: Crash) {
        let worker = &mut world.workers[who];
        worker.up = false;
        worker.mem = worker.disk;
        worker.queue.clear();
        if crash == Crash::Power {
            worker.site.power_cut();
        }
        world.crashes += 1;
    }

    /// Performs the first effect of a queue and steps its outcome.
    fn perform(&self, world: &mut World, who: usize, crash: Crash) {
        let number = world.workers[who].queue.remove(0);
        let effect = self.effects.value(number);
        let origin = world.workers.iter().find(|w| w.alive && w.site.kind == Kind::Sealed).map(|w| w.site.version);
        let is_burnt = world.workers.iter().any(|w| !w.alive);
        let site = &mut world.workers[who].site;
        let stateless = self.scope.stateless;
        let (outcome, event): (u8, Box<dyn FnOnce() -> Event>) = match &*effect {
            Effect::Plane(command) => {
                let result = match command {
                    // Nobody is to blame for beginning on a source that burnt meanwhile.
                    Command::Begin { .. } if is_burnt && origin.is_none() => {
                        Err(Failure { code: FailureCode::Retry, message: "it does not answer".to_owned() })
                    }
                    command => site.plane(command, origin),
                };
                let command = Box::new(command.clone());
                (result_code(&result), Box::new(|| Event::Plane { command, result: result.map(Box::new) }))
            }
            Effect::Machine(command) => {
                let result = site.machine(command, stateless);
                let command = Box::new(command.clone());
                (result_code(&result), Box::new(|| Event::Machine { command, result }))
            }
            Effect::Send { .. } | Effect::Wake { .. } => unreachable!("sorted out"),
        };
        if crash == Crash::No {
            self.apply(world, who, Cause::Outcome(number, outcome), event, Crash::No);
        } else {
            self.crash(world, who, crash);
        }
    }

    fn refuse(&self, world: &mut World, who: usize) {
        let number = world.workers[who].queue.remove(0);
        let failure = Failure { code: FailureCode::Refused, message: "cannot".to_owned() };
        let event = || match &*self.effects.value(number) {
            Effect::Plane(command) => Event::Plane { command: Box::new(command.clone()), result: Err(failure) },
            Effect::Machine(command) => Event::Machine { command: Box::new(command.clone()), result: Err(failure) },
            Effect::Send { .. } | Effect::Wake { .. } => unreachable!("sorted out"),
        };
        world.failures += 1;
        self.apply(world, who, Cause::Outcome(number, 1), event, Crash::No);
    }

    fn start(&self, world: &mut World, who: usize) {
        let row = self.rows.value(world.workers[who].disk);
        let worker = &mut world.workers[who];
        worker.up = true;
        // Survivors that the worker does not own are dealt with before anything else.
        worker.site.running &= row.state.owned().is_some();
        self.apply(world, who, Cause::Restarted, || Event::Restarted, Crash::No);
    }

    fn reclaim(&self, world: &mut World, who: usize) {
        let row = self.rows.value(world.workers[who].mem);
        let State::Sealed { to, .. } = &row.state else { return };
        let lost = index_of(to);
        self.crash(world, lost, Crash::Power);
        world.workers[lost].alive = false;
        world.workers[lost].site = Site::default();
        world.reclaims += 1;
        world.crashes -= 1;
        // What was written since the seal is given up.
        world.acknowledged = world.workers[who].site.version;
        self.apply(world, who, Cause::Reclaim, || Event::Order(Order::Reclaim), Crash::No);
    }

    /// The source of the migration that `who` is the destination of is destroyed.
    fn destroy_source(&self, world: &mut World, who: usize) {
        let peer = self.row(world.workers[who].mem).migration.as_ref().map(|migration| index_of(&migration.peer));
        let Some(lost) = peer else { return };
        self.crash(world, lost, Crash::Power);
        world.workers[lost].alive = false;
        world.workers[lost].site = Site::default();
        world.crashes -= 1;
    }

    /// What the operator says about origins, claims and what is stuck; false if it is denied.
    fn operate(&self, world: &mut World, action: Action) -> bool {
        match action {
            Action::ForgetOrigin(who, destroyed) => {
                world.losses += 1;
                if destroyed {
                    self.destroy_source(world, who);
                }
                self.apply(world, who, Cause::ForgetOrigin, || Event::Order(Order::ForgetOrigin), Crash::No)
            }
            Action::GiveUp(who) => {
                world.losses += 1;
                self.destroy_source(world, who);
                (world.removed, world.acknowledged) = (true, 0);
                let event = || Event::Order(Order::Remove { force: true });
                self.apply(world, who, Cause::GiveUp, event, Crash::No)
            }
            Action::Claim(who) => {
                world.claims += 1;
                let event = || Event::EpochSeen { epoch: Epoch(9), by: worker(2) };
                self.apply(world, who, Cause::Claim, event, Crash::No)
            }
            Action::ClearVeto(who) => {
                self.apply(world, who, Cause::ClearVeto, || Event::Order(Order::ClearVeto), Crash::No)
            }
            Action::Retry(who) => {
                world.retries += 1;
                self.apply(world, who, Cause::Retry, || Event::Order(Order::Retry), Crash::No)
            }
            _ => false,
        }
    }

    pub(crate) fn row(&self, number: u32) -> Arc<Row> {
        self.rows.value(number)
    }

    /// Nothing is left to do: the machine runs on its owner and no migration is under way.
    fn is_end(&self, world: &World) -> bool {
        let alive = || world.workers.iter().filter(|w| w.alive);
        let idle = alive().all(|w| {
            w.up && w.queue.is_empty() && self.row(w.mem).migration.as_ref().is_none_or(|m| m.phase.is_over())
        });
        let is_as_desired = |w: &&WorkerState| {
            let row = self.row(w.disk);
            row.state.owned().is_some() && w.site.running == (self.row(w.mem).desired == Desired::Running)
        };
        if world.removed {
            let is_gone = |w: &WorkerState| self.row(w.disk).state.owned().is_none() && w.site.kind == Kind::None;
            return idle && alive().all(|w| !w.site.running && is_gone(w));
        }
        idle && alive().filter(is_as_desired).count() == 1 && alive().all(|w| !w.site.running || is_as_desired(&w))
    }

    pub(crate) fn fingerprint(&self, world: &World) -> u64 {
        self.hasher.hash_one(world)
    }
}

fn result_code<T>(result: &Result<T, Failure>) -> u8 {
    match result {
        Ok(_) => 0,
        Err(failure) if failure.code == FailureCode::Refused => 1,
        Err(_) => 2,
    }
}

impl Model for Handoff {
    type State = World;
    type Action = Action;

    fn init_states(&self) -> Vec<World> {
        let volume = (!self.scope.stateless).then(volume);
        let fresh = |index: usize| Row::new(machine(), worker(index));
        let run = Event::Order(Order::Run { spec: serde_json::Value::Null, volume });
        let mut owner = step(&fresh(0), run, 0).expect("a new machine runs").row;
        // As after an undisturbed start.
        owner.life = decant_drain::Life::Up;
        owner.device = owner.volume.as_ref().map(|_| "/dev/loop0".into());
        let rows = [owner, fresh(1), fresh(2)].map(|row| self.rows.number(row));
        let whole = Site { kind: Kind::Plain, attached: true, running: true, ..Site::default() };
        let sites = [whole, Site::default(), Site::default()];
        let workers = std::array::from_fn(|i| WorkerState {
            disk: rows[i],
            mem: rows[i],
            queue: Vec::new(),
            up: true,
            alive: true,
            site: sites[i],
        });
        vec![World {
            workers,
            net: Vec::new(),
            acknowledged: 0,
            moves: 0,
            crashes: 0,
            cancels: 0,
            reclaims: 0,
            failures: 0,
            toggles: 0,
            losses: 0,
            claims: 0,
            retries: 0,
            removed: false,
        }]
    }

    fn actions(&self, world: &World, actions: &mut Vec<Action>) {
        let crashes: &[Crash] =
            if world.crashes < self.scope.crashes { &[Crash::No, Crash::Kill, Crash::Power] } else { &[Crash::No] };
        for letter in &world.net {
            let to = &world.workers[self.letters.value(*letter).to];
            if to.alive && to.up {
                actions.extend(crashes.iter().map(|crash| Action::Deliver(*letter, *crash)));
            }
        }
        for (who, state) in world.workers.iter().enumerate().filter(|(_, state)| state.alive) {
            if !state.up {
                actions.push(Action::Start(who));
                continue;
            }
            actions.extend(crashes.iter().skip(1).map(|crash| Action::Crash(who, *crash)));
            self.agent_actions(world, who, crashes, actions);
            if state.site.running && state.site.attached && world.acknowledged < self.scope.writes {
                actions.push(Action::Write(who));
            }
            let exported = world.workers.iter().any(|w| w.alive && w.site.kind == Kind::Sealed && w.site.export);
            if state.site.kind == Kind::Clone && exported {
                actions.push(Action::Hydrate(who));
            }
        }
    }

    fn next_state(&self, last: &World, action: Action) -> Option<World> {
        let mut world = last.clone();
        if !self.act(&mut world, action) || world == *last {
            return None;
        }
        let (from, to) = (self.fingerprint(last), self.fingerprint(&world));
        self.edges.lock().expect("a lock").push((from, to));
        if self.is_end(&world) {
            self.ends.lock().expect("a lock").push(to);
        }
        Some(world)
    }

    fn properties(&self) -> Vec<Property<Self>> {
        properties::all()
    }
}

impl Handoff {
    /// Does `action`; whether anything could be done.
    fn act(&self, world: &mut World, action: Action) -> bool {
        match action {
            Action::Deliver(letter, crash) => {
                let known = self.letters.value(letter);
                let event = || Event::Received { from: worker(known.from), message: Box::new(known.message.clone()) };
                return self.apply(world, known.to, Cause::Letter(letter), event, crash);
            }
            Action::Perform(who, crash) => self.perform(world, who, crash),
            Action::Refuse(who) => self.refuse(world, who),
            Action::Again(who) => {
                let row = self.row(world.workers[who].mem);
                if row.copy.is_some() {
                    self.apply(world, who, Cause::Wake, || Event::Wake, Crash::No);
                } else {
                    let (letters, effects) = self.sort_out(who, pending(&row, 0));
                    world.workers[who].queue = effects;
                    world.net.extend(letters);
                    world.net.sort_unstable();
                    world.net.dedup();
                }
            }
            Action::Crash(who, crash) => self.crash(world, who, crash),
            Action::Start(who) => self.start(world, who),
            Action::Move(who, to) => {
                world.moves += 1;
                let number = world.moves;
                let event = || Event::Order(Order::Move(Box::new(move_to(number.into(), to))));
                return self.apply(world, who, Cause::Move(to, number), event, Crash::No);
            }
            Action::Cancel(who) => {
                world.cancels += 1;
                let row = self.row(world.workers[who].mem);
                let Some(migration) = row.migration.as_ref().map(|migration| migration.id.clone()) else {
                    return false;
                };
                return self.apply(world, who, Cause::Cancel, || Event::Order(Order::Cancel { migration }), Crash::No);
            }
            Action::Reclaim(who) => self.reclaim(world, who),
            Action::Toggle(who, up) => {
                world.toggles += 1;
                let order = if up { Order::Start } else { Order::Stop };
                return self.apply(world, who, Cause::Toggle(up), || Event::Order(order), Crash::No);
            }
            Action::Write(who) => {
                world.acknowledged += 1;
                world.workers[who].site.version += 1;
            }
            Action::Hydrate(who) => world.workers[who].site.kind = Kind::Filled,
            _ => return self.operate(world, action),
        }
        true
    }

    /// The agent's own next actions on one worker.
    fn agent_actions(&self, world: &World, who: usize, crashes: &[Crash], actions: &mut Vec<Action>) {
        let state = &world.workers[who];
        let row = self.row(state.mem);
        if let Some(first) = state.queue.first() {
            actions.extend(crashes.iter().map(|crash| Action::Perform(who, *crash)));
            let preparing = row.migration.as_ref().is_some_and(|m| m.phase <= Phase::Stopped);
            if preparing
                && world.failures < self.scope.failures
                && !matches!(&*self.effects.value(*first), Effect::Machine(_))
            {
                actions.push(Action::Refuse(who));
            }
        } else if row.migration.as_ref().is_some_and(|m| !m.phase.is_over()) || row.copy.is_some() || row.wait.is_some()
        {
            actions.push(Action::Again(who));
        }
        if matches!(row.state, State::Active { .. })
            && world.moves < self.scope.moves
            && row.life == decant_drain::Life::Up
        {
            let others = (0..WORKERS).filter(|to| *to != who && world.workers[*to].alive);
            actions.extend(others.filter(|to| world.moves > 0 || *to == 1).map(|to| Action::Move(who, to)));
        }
        let is_source = row.migration.as_ref().is_some_and(|m| m.role == Role::Source && !m.phase.is_over());
        if is_source && world.cancels < self.scope.cancels {
            actions.push(Action::Cancel(who));
        }
        if row.state.owned().is_some() && world.toggles < self.scope.toggles {
            actions.push(Action::Toggle(who, row.desired != Desired::Running));
        }
        if matches!(row.state, State::Sealed { .. }) && world.reclaims < self.scope.reclaims {
            actions.push(Action::Reclaim(who));
        }
        self.words_of_an_operator(world, who, &row, actions);
    }

    /// Origins given up, claims cleared, retries.
    fn words_of_an_operator(&self, world: &World, who: usize, row: &Row, actions: &mut Vec<Action>) {
        let phase = row.migration.as_ref().filter(|m| m.role == Role::Destination).map(|m| m.phase);
        if world.losses < self.scope.losses && matches!(row.state, State::Active { .. }) {
            if phase == Some(Phase::Verified) {
                actions.extend([Action::ForgetOrigin(who, false), Action::ForgetOrigin(who, true)]);
            }
            if phase.is_some_and(|phase| (Phase::Granted..=Phase::Verified).contains(&phase)) {
                actions.push(Action::GiveUp(who));
            }
        }
        if world.claims < self.scope.claims && row.state.owned().is_some() {
            actions.push(Action::Claim(who));
        }
        if row.veto.is_some() && matches!(row.state, State::Active { .. }) {
            actions.push(Action::ClearVeto(who));
        }
        if world.retries < self.scope.retries {
            actions.push(Action::Retry(who));
        }
    }
}
