//! Steps by number: rows, effects and letters are interned, a step is computed once, and the seeded bugs wrap it.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, RwLock};

use decant_drain::handoff::State;
use decant_drain::migration::Phase;
use decant_drain::{Body, Effect, Event, Message, Row, Sync, step};

use crate::world::index_of;

/// A bug that the model must catch: a wrapper around the product's functions, here only.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Bug {
    None,
    GrantBeforeSealIsDurable,
    BootBeforeActiveIsDurable,
    RefusalWithoutOutcome,
    LowerEpochAccepted,
    FreedBeforeVerified,
}

/// How much may happen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Scope {
    pub(crate) moves: u8,
    pub(crate) crashes: u8,
    pub(crate) cancels: u8,
    pub(crate) reclaims: u8,
    pub(crate) failures: u8,
    pub(crate) writes: u8,
    /// Times the operator stops or starts the machine.
    pub(crate) toggles: u8,
    /// Origins that the operator gives up, destroyed or not.
    pub(crate) losses: u8,
    /// Claims of a higher epoch that come from nowhere.
    pub(crate) claims: u8,
    /// Times the operator has something tried again.
    pub(crate) retries: u8,
    pub(crate) stateless: bool,
    /// Whether progress is told.
    pub(crate) news: bool,
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
pub(crate) struct Interner<T> {
    numbers: RwLock<HashMap<Arc<T>, u32>>,
    pub(crate) values: RwLock<Vec<Arc<T>>>,
}

impl<T: Hash + Eq> Interner<T> {
    pub(crate) fn new() -> Self {
        Self { numbers: RwLock::default(), values: RwLock::default() }
    }

    pub(crate) fn number(&self, value: T) -> u32 {
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

    pub(crate) fn value(&self, number: u32) -> Arc<T> {
        self.values.read().expect("a lock")[number as usize].clone()
    }
}

/// A message on its way, for ever.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(crate) struct Letter {
    pub(crate) from: usize,
    pub(crate) to: usize,
    pub(crate) message: Message,
}

/// What a step depends on, besides the row.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Cause {
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
pub(crate) struct Stepped {
    pub(crate) row: u32,
    pub(crate) sync: Sync,
    pub(crate) letters: Vec<u32>,
    pub(crate) effects: Vec<u32>,
}

/// Steps by row and cause; `None` if denied.
type Steps = HashMap<(u32, Cause), Option<Arc<Stepped>>>;

/// The model: what may happen, and every step that was ever computed.
pub(crate) struct Handoff {
    pub(crate) scope: Scope,
    pub(crate) bug: Bug,
    pub(crate) rows: Interner<Row>,
    pub(crate) effects: Interner<Effect>,
    pub(crate) letters: Interner<Letter>,
    steps: RwLock<Steps>,
    /// Transitions between fingerprints, for reachability.
    pub(crate) edges: Mutex<Vec<(u64, u64)>>,
    /// Fingerprints of states in which nothing is left to do.
    pub(crate) ends: Mutex<Vec<u64>>,
    pub(crate) hasher: std::hash::RandomState,
}

impl Handoff {
    pub(crate) fn new(scope: Scope, bug: Bug) -> Self {
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
    pub(crate) fn stepped(
        &self,
        who: usize,
        row: u32,
        cause: Cause,
        event: impl FnOnce() -> Event,
    ) -> Option<Arc<Stepped>> {
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
    pub(crate) fn sort_out(&self, from: usize, all: Vec<Effect>) -> (Vec<u32>, Vec<u32>) {
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
}
