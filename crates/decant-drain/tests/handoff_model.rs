//! An exhaustive model of the handoff that calls the product's own `step` and `pending`.
//!
//! Three workers. The network keeps every message for ever and delivers any of them at any time, any number of times or
//! never: lost, repeated and reordered in one. Agents are killed and the power fails between a commit and its effects and
//! between an effect and its outcome. The operator moves, cancels and reclaims. Rows, effects and messages are interned,
//! so that a state is a handful of small numbers and a step is computed once.
//!
//! `DECANT_TEST_SCALE=2` and above widens the scope.

#[allow(unreachable_pub, reason = "shared by several test files")]
mod world;

use std::collections::{HashMap, HashSet, VecDeque};
use std::hash::{BuildHasher, Hash};
use std::sync::{Arc, Mutex, RwLock};

use decant_base::Epoch;
use decant_dataplane::{Command, Failure, FailureCode};
use decant_drain::handoff::State;
use decant_drain::migration::{Phase, Role};
use decant_drain::{Body, Desired, Effect, Event, Message, Order, Row, Sync, pending, step};
use stateright::{Checker, HasDiscoveries, Model, Property};
use world::{Kind, Site, index_of, machine, move_to, volume, worker};

const WORKERS: usize = 3;

/// A bug that the model must catch: a wrapper around the product's functions, here only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Bug {
    None,
    GrantBeforeSealIsDurable,
    BootBeforeActiveIsDurable,
    RefusalWithoutOutcome,
    LowerEpochAccepted,
    FreedBeforeVerified,
}

/// How much may happen.
#[derive(Debug, Clone, Copy)]
struct Scope {
    moves: u8,
    crashes: u8,
    cancels: u8,
    reclaims: u8,
    failures: u8,
    writes: u8,
    /// Times the operator stops or starts the machine.
    toggles: u8,
    /// Origins that the operator gives up, destroyed or not.
    losses: u8,
    /// Claims of a higher epoch that come from nowhere.
    claims: u8,
    /// Times the operator has something tried again.
    retries: u8,
    stateless: bool,
    /// Whether progress is told.
    news: bool,
}

fn is_news(message: &Message) -> bool {
    matches!(message.body, Body::Progress { phase } if phase > Phase::Planned)
}

/// The row without counters of tries and times of entry, which would make the state space endless.
fn without_tries(mut row: Row) -> Row {
    for wait in [row.wait.as_mut(), row.migration.as_mut().and_then(|m| m.wait.as_mut())].into_iter().flatten() {
        wait.attempts = 0;
        wait.reason.clear();
        wait.retry_ms = wait.retry_ms.map(|_| 1);
    }
    if let Some(migration) = &mut row.migration {
        migration.entered_ms.clear();
    }
    row
}

/// Values by number.
struct Interner<T> {
    numbers: RwLock<HashMap<Arc<T>, u32>>,
    values: RwLock<Vec<Arc<T>>>,
}

impl<T: Hash + Eq> Interner<T> {
    fn new() -> Self {
        Self { numbers: RwLock::default(), values: RwLock::default() }
    }

    fn number(&self, value: T) -> u32 {
        if let Some(number) = self.numbers.read().expect("a lock").get(&value) {
            return *number;
        }
        let mut numbers = self.numbers.write().expect("a lock");
        let mut values = self.values.write().expect("a lock");
        let value = Arc::new(value);
        *numbers.entry(value.clone()).or_insert_with(|| {
            values.push(value);
            values.len() as u32 - 1
        })
    }

    fn value(&self, number: u32) -> Arc<T> {
        self.values.read().expect("a lock")[number as usize].clone()
    }
}

/// A message on its way, for ever.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Letter {
    from: usize,
    to: usize,
    message: Message,
}

/// One worker.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct WorkerState {
    /// The row as it is on the medium.
    disk: u32,
    /// The row as the agent has it.
    mem: u32,
    /// Effects to perform, in order.
    queue: Vec<u32>,
    /// The agent runs.
    up: bool,
    /// The worker exists.
    alive: bool,
    site: Site,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct World {
    workers: [WorkerState; WORKERS],
    /// Letters ever sent, sorted.
    net: Vec<u32>,
    /// Writes acknowledged to the machine's clients and not given up by a reclaim.
    acknowledged: u8,
    moves: u8,
    crashes: u8,
    cancels: u8,
    reclaims: u8,
    failures: u8,
    toggles: u8,
    losses: u8,
    claims: u8,
    retries: u8,
    /// The machine was given up, whole or not.
    removed: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Crash {
    No,
    Kill,
    Power,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Action {
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

/// What a step depends on, besides the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Cause {
    Letter(u32),
    /// An effect's outcome: 0 as performed, 1 refused, 2 not yet.
    Outcome(u32, u8),
    Restarted,
    Wake,
    Move(usize, u8),
    Cancel,
    Reclaim,
    Toggle(bool),
    ForgetOrigin,
    GiveUp,
    Claim,
    ClearVeto,
    Retry,
}

/// A step by number: the row, whether it is durable, letters sent, effects to perform.
#[derive(Debug)]
struct Stepped {
    row: u32,
    sync: Sync,
    letters: Vec<u32>,
    effects: Vec<u32>,
}

/// Steps by row and cause; `None` if denied.
type Steps = HashMap<(u32, Cause), Option<Arc<Stepped>>>;

struct Handoff {
    scope: Scope,
    bug: Bug,
    rows: Interner<Row>,
    effects: Interner<Effect>,
    letters: Interner<Letter>,
    steps: RwLock<Steps>,
    /// Transitions between fingerprints, for reachability.
    edges: Mutex<Vec<(u64, u64)>>,
    /// Fingerprints of states in which nothing is left to do.
    ends: Mutex<Vec<u64>>,
    hasher: std::hash::RandomState,
}

impl Handoff {
    fn new(scope: Scope, bug: Bug) -> Self {
        Self {
            scope,
            bug,
            rows: Interner::new(),
            effects: Interner::new(),
            letters: Interner::new(),
            steps: RwLock::default(),
            edges: Mutex::default(),
            ends: Mutex::default(),
            hasher: std::hash::RandomState::new(),
        }
    }

    /// Steps the row, through the seeded bug if there is one.
    fn stepped(&self, who: usize, row: u32, cause: Cause, event: impl FnOnce() -> Event) -> Option<Arc<Stepped>> {
        if let Some(known) = self.steps.read().expect("a lock").get(&(row, cause)) {
            return known.clone();
        }
        let computed = self.compute(who, &self.rows.value(row), event()).map(Arc::new);
        self.steps.write().expect("a lock").insert((row, cause), computed.clone());
        computed
    }

    fn compute(&self, who: usize, row: &Row, event: Event) -> Option<Stepped> {
        let mut row = row.clone();
        let mut event = event;
        match (&mut event, self.bug) {
            (Event::Received { message, .. }, Bug::LowerEpochAccepted)
                if matches!(message.body, Body::Grant { .. } | Body::Prepare { .. }) && row.state.owned().is_none() =>
            {
                row.top = Default::default();
            }
            (Event::Received { message, .. }, Bug::RefusalWithoutOutcome)
                if matches!(message.body, Body::Grant { .. } | Body::Refuse | Body::Prepare { .. }) =>
            {
                row.top.answer = None;
            }
            (Event::Received { message, .. }, Bug::FreedBeforeVerified) if message.body == Body::GrantAccepted => {
                message.body = Body::Verified { verification: None };
            }
            _ => {}
        }
        let repeated = (self.bug == Bug::None && matches!(event, Event::Received { .. })).then(|| event.clone());
        let step = step(&row, event, 0).ok()?;
        let mut row = step.row;
        // A letter that arrives twice is stepped once.
        if let Some(Ok(again)) = repeated.map(|event| decant_drain::step(&row, event, 0)) {
            assert_eq!(without_tries(again.row), without_tries(row.clone()), "a repeated letter changed the row again");
        }
        if let Err(broken) = row.check() {
            panic!("{broken}: {row:#?}");
        }
        row = without_tries(row);
        let mut sync = step.sync;
        match (self.bug, &row.state) {
            (Bug::GrantBeforeSealIsDurable, State::Sealed { .. })
            | (Bug::BootBeforeActiveIsDurable, State::Active { .. }) => {
                sync = sync.min(Sync::Later);
            }
            _ => {}
        }
        let (letters, effects) = self.sort_out(who, step.effects);
        Some(Stepped { row: self.rows.number(row), sync, letters, effects })
    }

    /// Letters and other effects apart, by number.
    fn sort_out(&self, from: usize, all: Vec<Effect>) -> (Vec<u32>, Vec<u32>) {
        let (mut letters, mut effects) = (Vec::new(), Vec::new());
        for effect in all {
            match effect {
                // News that may be lost without harm is lost in the small scope.
                Effect::Send { message, .. } if !self.scope.news && is_news(&message) => {}
                Effect::Send { to, message } => {
                    let mut message = *message;
                    if self.bug == Bug::RefusalWithoutOutcome && matches!(message.body, Body::GrantStale { .. }) {
                        // Only the number is known: whatever is not above it was refused, it seems.
                        message.body = Body::GrantRefused;
                    }
                    letters.push(self.letters.number(Letter { from, to: index_of(&to), message }));
                }
                Effect::Wake { .. } => {}
                effect => effects.push(self.effects.number(effect)),
            }
        }
        (letters, effects)
    }

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

    fn row(&self, number: u32) -> Arc<Row> {
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

    fn fingerprint(&self, world: &World) -> u64 {
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
        match action {
            Action::Deliver(letter, crash) => {
                let known = self.letters.value(letter);
                let event = || Event::Received { from: worker(known.from), message: Box::new(known.message.clone()) };
                if !self.apply(&mut world, known.to, Cause::Letter(letter), event, crash) {
                    return None;
                }
            }
            Action::Perform(who, crash) => self.perform(&mut world, who, crash),
            Action::Refuse(who) => self.refuse(&mut world, who),
            Action::Again(who) => {
                let row = self.row(world.workers[who].mem);
                if row.copy.is_some() {
                    self.apply(&mut world, who, Cause::Wake, || Event::Wake, Crash::No);
                } else {
                    let (letters, effects) = self.sort_out(who, pending(&row, 0));
                    world.workers[who].queue = effects;
                    world.net.extend(letters);
                    world.net.sort_unstable();
                    world.net.dedup();
                }
            }
            Action::Crash(who, crash) => self.crash(&mut world, who, crash),
            Action::Start(who) => self.start(&mut world, who),
            Action::Move(who, to) => {
                world.moves += 1;
                let number = world.moves;
                let event = || Event::Order(Order::Move(Box::new(move_to(number.into(), to))));
                if !self.apply(&mut world, who, Cause::Move(to, number), event, Crash::No) {
                    return None;
                }
            }
            Action::Cancel(who) => {
                world.cancels += 1;
                let migration = self.row(world.workers[who].mem).migration.as_ref()?.id.clone();
                if !self.apply(&mut world, who, Cause::Cancel, || Event::Order(Order::Cancel { migration }), Crash::No)
                {
                    return None;
                }
            }
            Action::Reclaim(who) => self.reclaim(&mut world, who),
            Action::Toggle(who, up) => {
                world.toggles += 1;
                let order = if up { Order::Start } else { Order::Stop };
                if !self.apply(&mut world, who, Cause::Toggle(up), || Event::Order(order), Crash::No) {
                    return None;
                }
            }
            Action::Write(who) => {
                world.acknowledged += 1;
                world.workers[who].site.version += 1;
            }
            Action::Hydrate(who) => world.workers[who].site.kind = Kind::Filled,
            _ => {
                if !self.operate(&mut world, action) {
                    return None;
                }
            }
        }
        if world == *last {
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
        vec![
            Property::always("at most one worker runs the machine", |_, world: &World| {
                world.workers.iter().filter(|w| w.alive && w.site.running).count() <= 1
            }),
            Property::always("whoever runs the machine durably owns it", |model: &Self, world: &World| {
                world.workers.iter().all(|w| !w.site.running || model.row(w.disk).state.owned().is_some())
            }),
            Property::always("at most one owner, with the highest epoch", |model: &Self, world: &World| {
                let rows: Vec<_> = world.workers.iter().filter(|w| w.alive).map(|w| model.row(w.disk)).collect();
                let owners: Vec<Epoch> = rows.iter().filter_map(|row| row.state.owned()).collect();
                let highest = rows.iter().filter_map(|row| claim(row)).max();
                owners.len() <= 1 && owners.first().is_none_or(|owner| Some(*owner) == highest)
            }),
            Property::always("no write after the seal", |_, world: &World| {
                world.workers.iter().all(|w| !(w.site.running && w.site.kind == Kind::Sealed))
            }),
            Property::always("nobody is told what makes no sense", |_, world: &World| {
                world.workers.iter().all(|w| !w.site.wrong)
            }),
            Property::always("every acknowledged block is readable by the owner", |model: &Self, world: &World| {
                model.scope.stateless || world.removed || model.is_readable(world)
            }),
        ]
    }
}

/// The epoch a row claims to have, or to have had.
fn claim(row: &Row) -> Option<Epoch> {
    match row.state {
        State::Active { epoch }
        | State::Moving { epoch, .. }
        | State::Sealed { epoch, .. }
        | State::Released { epoch } => Some(epoch),
        State::None | State::Prepared { .. } => None,
    }
}

impl Handoff {
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

    /// Whoever owns the machine, or will when its grant arrives, reaches every acknowledged write.
    fn is_readable(&self, world: &World) -> bool {
        let alive = || world.workers.iter().filter(|w| w.alive);
        let origin = alive().any(|w| w.site.kind == Kind::Sealed);
        let reaches = |site: &Site| {
            site.version == world.acknowledged
                && match site.kind {
                    Kind::Plain | Kind::Filled | Kind::Sealed => true,
                    Kind::Clone => origin,
                    Kind::None | Kind::Prepared => false,
                }
        };
        let owner = alive().find(|w| self.row(w.disk).state.owned().is_some());
        match owner {
            // Granted, not begun: the sealed copy is what it will read.
            Some(owner) if owner.site.kind == Kind::Prepared => {
                alive().any(|w| w.site.kind == Kind::Sealed && reaches(&w.site))
            }
            Some(owner) => reaches(&owner.site),
            None => alive().any(|w| reaches(&w.site)),
        }
    }
}

/// States from which no end can be reached.
fn dead_ends(model: &Handoff) -> HashSet<u64> {
    let edges = model.edges.lock().expect("a lock");
    let mut backwards: HashMap<u64, Vec<u64>> = HashMap::new();
    let mut all = HashSet::new();
    for (from, to) in edges.iter() {
        backwards.entry(*to).or_default().push(*from);
        all.extend([*from, *to]);
    }
    let mut reached: HashSet<u64> = model.ends.lock().expect("a lock").iter().copied().collect();
    let mut work: Vec<u64> = reached.iter().copied().collect();
    while let Some(state) = work.pop() {
        for from in backwards.get(&state).into_iter().flatten() {
            if reached.insert(*from) {
                work.push(*from);
            }
        }
    }
    all.difference(&reached).copied().collect()
}

/// A shortest way into one of `dead`, for a person to read.
fn way_into(model: &Handoff, dead: &HashSet<u64>) -> String {
    let mut seen = HashSet::new();
    let mut work: VecDeque<(World, Vec<String>)> =
        model.init_states().into_iter().map(|world| (world, Vec::new())).collect();
    while let Some((world, way)) = work.pop_front() {
        if dead.contains(&model.fingerprint(&world)) {
            let rows =
                world.workers.iter().map(|w| format!("\n  {} {:?}", model.row(w.mem).summary(), w)).collect::<String>();
            return format!("{}{rows}", way.join("\n"));
        }
        let mut actions = Vec::new();
        model.actions(&world, &mut actions);
        for action in actions {
            let Some(next) = model.next_state(&world, action) else { continue };
            if seen.insert(model.fingerprint(&next)) {
                let what = match action {
                    Action::Deliver(letter, _) => format!("{action:?}: {:?}", model.letters.value(letter)),
                    Action::Perform(who, _) | Action::Refuse(who) => {
                        format!(
                            "{action:?}: {:?}",
                            world.workers[who].queue.first().map(|effect| model.effects.value(*effect))
                        )
                    }
                    _ => format!("{action:?}"),
                };
                work.push_back((next, way.iter().cloned().chain([what]).collect()));
            }
        }
    }
    "no way found".to_owned()
}

fn scale() -> u32 {
    std::env::var("DECANT_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

/// Explores everything; panics with the path to a broken invariant.
fn hold(name: &str, scope: Scope) {
    let started = std::time::Instant::now();
    let checker = Handoff::new(scope, Bug::None).checker().threads(2).spawn_bfs().join();
    checker.assert_properties();
    let dead = dead_ends(checker.model());
    println!(
        "{name}: {} states, {} transitions, depth {}, {} rows, {:.1} s",
        checker.unique_state_count(),
        checker.model().edges.lock().expect("a lock").len(),
        checker.max_depth(),
        checker.model().rows.values.read().expect("a lock").len(),
        started.elapsed().as_secs_f64()
    );
    assert!(dead.is_empty(), "{} states without a way out, e.g.\n{}", dead.len(), way_into(checker.model(), &dead));
}

/// Explores until an invariant breaks, which it must.
fn catch(bug: Bug, scope: Scope, expected: &str) {
    let checker = Handoff::new(scope, bug).checker().threads(2).finish_when(HasDiscoveries::Any).spawn_bfs().join();
    let found = checker.discoveries();
    let broken: Vec<&str> = found.keys().copied().collect();
    println!("{bug:?}: caught after {} states: {broken:?}", checker.unique_state_count());
    assert!(broken.contains(&expected), "the model does not catch {bug:?}: it finds {broken:?}");
}

/// Nothing happens but one move; each test widens it.
const QUIET: Scope = Scope {
    moves: 1,
    crashes: 0,
    cancels: 0,
    reclaims: 0,
    failures: 0,
    writes: 0,
    toggles: 0,
    losses: 0,
    claims: 0,
    retries: 0,
    stateless: false,
    news: false,
};

#[test]
fn one_move_with_crash_cancel_and_failure() {
    hold("one move, a crash, a cancel, a failure", Scope { crashes: 1, cancels: 1, failures: 1, writes: 1, ..QUIET });
}

#[test]
fn one_move_with_crash_cancel_and_reclaim() {
    hold("one move, a crash, a cancel, a reclaim", Scope { crashes: 1, cancels: 1, reclaims: 1, writes: 2, ..QUIET });
}

#[test]
fn one_move_with_two_crashes() {
    hold("one move, two crashes", Scope { crashes: 2, writes: 1, news: true, ..QUIET });
}

#[test]
fn two_moves_with_a_crash() {
    hold("two moves, a crash", Scope { moves: 2, crashes: 1, ..QUIET });
}

#[test]
fn one_move_while_the_operator_stops_and_starts() {
    hold("one move, stopped and started, a cancel", Scope { toggles: 2, cancels: 1, ..QUIET });
    hold("one move, stopped or started, a crash", Scope { toggles: 1, crashes: 1, ..QUIET });
}

#[test]
fn a_stateless_move() {
    let scope = Scope { crashes: 1, cancels: 1, failures: 1, toggles: 1, stateless: true, ..QUIET };
    hold("a stateless move, a crash, a cancel, a failure", scope);
}

#[test]
fn one_move_whose_origin_is_given_up() {
    hold("one move, a lost origin, a crash", Scope { losses: 1, crashes: 1, writes: 1, ..QUIET });
    hold("a stateless move, a lost origin, a crash", Scope { losses: 1, crashes: 1, stateless: true, ..QUIET });
}

#[test]
fn one_move_with_a_claim_that_is_cleared() {
    hold("one move, a claim, a cancel", Scope { claims: 1, cancels: 1, writes: 1, ..QUIET });
}

#[test]
fn one_move_with_a_retry() {
    hold("one move, a retry, a crash, a cancel", Scope { retries: 1, crashes: 1, cancels: 1, ..QUIET });
}

/// Explores only with `DECANT_TEST_SCALE=2` or more: minutes each.
fn hold_wide(name: &str, scope: Scope) {
    if scale() < 2 {
        println!("{name}: only with DECANT_TEST_SCALE=2 or more");
        return;
    }
    hold(name, scope);
}

#[test]
fn wide_everything_once() {
    hold_wide(
        "everything once",
        Scope { crashes: 1, cancels: 1, failures: 1, reclaims: 1, writes: 2, news: true, ..QUIET },
    );
}

#[test]
fn wide_every_word_of_an_operator() {
    let scope = Scope { losses: 1, claims: 1, retries: 1, crashes: 1, cancels: 1, writes: 1, ..QUIET };
    hold_wide("a lost origin, a claim, a retry, a crash, a cancel", scope);
}

#[test]
fn wide_two_crashes_and_a_cancel() {
    hold_wide("two crashes, a cancel", Scope { crashes: 2, cancels: 1, writes: 1, ..QUIET });
}

#[test]
fn wide_stopped_and_started_with_a_crash_and_a_cancel() {
    hold_wide("stopped and started, a crash, a cancel", Scope { toggles: 2, crashes: 1, cancels: 1, ..QUIET });
}

#[test]
fn wide_two_moves_and_a_cancel() {
    hold_wide("two moves, a cancel", Scope { moves: 2, cancels: 1, ..QUIET });
}

#[test]
fn wide_two_stateless_moves_and_two_crashes() {
    hold_wide("two stateless moves, two crashes", Scope { moves: 2, crashes: 2, stateless: true, ..QUIET });
}

#[test]
fn catches_a_grant_before_the_seal_is_durable() {
    let scope = Scope { crashes: 1, writes: 1, ..QUIET };
    catch(Bug::GrantBeforeSealIsDurable, scope, "at most one owner, with the highest epoch");
}

#[test]
fn catches_a_boot_before_active_is_durable() {
    let scope = Scope { crashes: 1, ..QUIET };
    catch(Bug::BootBeforeActiveIsDurable, scope, "whoever runs the machine durably owns it");
}

#[test]
fn catches_a_refusal_without_its_outcome() {
    catch(Bug::RefusalWithoutOutcome, QUIET, "at most one owner, with the highest epoch");
}

#[test]
fn catches_an_accepted_lower_epoch() {
    let scope = Scope { moves: 2, ..QUIET };
    catch(Bug::LowerEpochAccepted, scope, "at most one owner, with the highest epoch");
}

#[test]
fn catches_a_source_freed_before_verified() {
    let scope = Scope { writes: 1, ..QUIET };
    catch(Bug::FreedBeforeVerified, scope, "every acknowledged block is readable by the owner");
}
