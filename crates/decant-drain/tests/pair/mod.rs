//! Two workers in virtual time, for tests of the handoff step by step.

#![allow(dead_code, reason = "each test file uses its part")]

use std::collections::VecDeque;
use std::fmt::Write as _;

use decant_base::VolumeId;
use decant_dataplane::{Failure, FailureCode};
use decant_drain::migration::{Limits, Phase};
use decant_drain::{Denied, Effect, Event, Life, Message, Move, Order, Row, Sync, step};

use crate::world::{self, Kind, Site, index_of, machine, volume, worker};

pub const LIMITS: Limits = Limits { prepare_ms: 60_000, stop_ms: 20_000, retention_ms: 3_600_000 };

/// Two agents and their hardware, in virtual time, with a network that delivers in order.
pub struct Pair {
    pub rows: [Row; 2],
    pub disks: [Row; 2],
    pub sites: [Site; 2],
    pub queues: [VecDeque<Effect>; 2],
    pub net: VecDeque<(usize, usize, Message)>,
    pub wakes: [Option<u64>; 2],
    pub now_ms: u64,
    /// Every message is delivered twice.
    pub twice: bool,
    /// Nothing gets through.
    pub cut: bool,
    /// Answers instead of the hardware's.
    pub fails: Option<fn(usize, &Effect) -> Option<Failure>>,
    pub trace: String,
}

impl Pair {
    pub fn new(volume: Option<VolumeId>) -> Self {
        let fresh = |index: usize| Row::new(machine(), worker(index));
        let mut pair = Self {
            rows: [fresh(0), fresh(1)],
            disks: [fresh(0), fresh(1)],
            sites: [Site { kind: Kind::Plain, ..Site::default() }, Site::default()],
            queues: Default::default(),
            net: VecDeque::new(),
            wakes: [None, None],
            now_ms: 1_000,
            twice: false,
            cut: false,
            fails: None,
            trace: String::new(),
        };
        pair.order(0, Order::Run { spec: serde_json::json!({"name": "orders"}), volume }).expect("a new machine runs");
        pair.settle();
        assert!(pair.sites[0].running);
        pair.trace.clear();
        pair
    }

    pub fn moving() -> Self {
        let mut pair = Self::new(Some(volume()));
        pair.move_to(1, 0, 1);
        pair
    }

    pub fn move_to(&mut self, number: usize, from: usize, to: usize) {
        let order = Move { limits: LIMITS, ..world::move_to(number, to) };
        self.order(from, Order::Move(Box::new(order))).expect("a move is ordered");
    }

    pub fn order(&mut self, who: usize, order: Order) -> Result<(), Denied> {
        let word = format!("order {}", serde_json::to_value(&order).expect("JSON")["order"].as_str().unwrap_or("?"));
        self.feed(who, &word, Event::Order(order))
    }

    pub fn feed(&mut self, who: usize, word: &str, event: Event) -> Result<(), Denied> {
        let step = match step(&self.rows[who], event, self.now_ms) {
            Err(Denied::Unawaited) => return Ok(()),
            other => other?,
        };
        let (from, to) = (self.rows[who].summary(), step.row.summary());
        if from != to {
            let mark = if step.sync == Sync::Now { "!" } else { " " };
            let effects: Vec<String> = step.effects.iter().map(name).filter(|name| !name.is_empty()).collect();
            writeln!(self.trace, "{who}{mark} {word:<24} {to:<26} {}", effects.join(", ")).expect("a string");
        }
        self.rows[who] = step.row;
        if step.sync == Sync::Now {
            self.disks[who] = self.rows[who].clone();
        }
        for effect in step.effects {
            match effect {
                Effect::Send { .. } if self.cut => {}
                Effect::Send { to, message } => self.net.push_back((who, index_of(&to), *message)),
                Effect::Wake { at_ms } => self.wakes[who] = Some(at_ms),
                effect => self.queues[who].push_back(effect),
            }
        }
        Ok(())
    }

    /// One thing happens; false if nothing can but the passing of time.
    pub fn tick(&mut self) -> bool {
        if let Some((from, to, message)) = self.net.pop_front() {
            let word = message.body.name();
            let times = if self.twice { 2 } else { 1 };
            for _ in 0..times {
                let event = Event::Received { from: worker(from), message: Box::new(message.clone()) };
                let _ = self.feed(to, word, event);
            }
            return true;
        }
        for who in 0..2 {
            if let Some(effect) = self.queues[who].pop_front() {
                self.perform(who, &effect);
                return true;
            }
        }
        false
    }

    pub fn perform(&mut self, who: usize, effect: &Effect) {
        let failure = self.fails.and_then(|fails| fails(who, effect));
        let origin = self.sites[1 - who];
        let origin = (origin.kind == Kind::Sealed && origin.export).then_some(origin.version);
        let event = match effect {
            Effect::Plane(command) => {
                let result = failure.map_or_else(|| self.sites[who].plane(command, origin), Err);
                Event::Plane { command: Box::new(command.clone()), result: result.map(Box::new) }
            }
            Effect::Machine(command) => {
                let stateless = self.rows[who].volume.is_none();
                let result = failure.map_or_else(|| self.sites[who].machine(command, stateless), Err);
                Event::Machine { command: Box::new(command.clone()), result }
            }
            Effect::Send { .. } | Effect::Wake { .. } => unreachable!("not queued"),
        };
        self.feed(who, &name(effect), event).expect("an outcome is no order");
        assert!(!self.sites.iter().any(|site| site.wrong), "{}", self.trace);
        assert!(self.sites.iter().filter(|site| site.running).count() <= 1, "two run:\n{}", self.trace);
    }

    /// Everything happens that needs no time.
    pub fn settle(&mut self) {
        for _ in 0..10_000 {
            if !self.tick() {
                return;
            }
        }
        panic!("it does not settle:\n{}", self.trace);
    }

    /// Time passes up to the next timer; false if there is none.
    pub fn wait(&mut self) -> bool {
        let Some(at) = self.wakes.iter().flatten().min().copied() else { return false };
        self.now_ms = self.now_ms.max(at);
        for who in 0..2 {
            if self.wakes[who].is_some_and(|at| at <= self.now_ms) {
                self.wakes[who] = None;
                self.feed(who, "timer", Event::Wake).expect("a timer is no order");
            }
        }
        true
    }

    /// Time passes, blocks are fetched, until both migrations are over.
    pub fn finish(&mut self) {
        for _ in 0..500 {
            self.settle();
            let is_over = |row: &Row| row.migration.as_ref().is_none_or(|m| m.phase.is_over());
            if self.rows.iter().all(is_over) && self.sites.iter().any(|site| site.running) {
                return;
            }
            for who in 0..2 {
                let origin = self.sites[1 - who];
                if self.sites[who].kind == Kind::Clone && self.sites[who].attached && origin.export {
                    self.sites[who].kind = Kind::Filled;
                }
            }
            assert!(self.wait(), "nothing will ever happen:\n{}\n{:#?}", self.trace, self.rows);
        }
        panic!("it does not end:\n{}\n{:#?}", self.trace, self.rows);
    }

    pub fn crash(&mut self, who: usize, power: bool) {
        self.rows[who] = self.disks[who].clone();
        self.queues[who].clear();
        self.wakes[who] = None;
        if power {
            self.sites[who].power_cut();
        }
        self.sites[who].running &= self.rows[who].state.owned().is_some();
        self.feed(who, "restarted", Event::Restarted).expect("a restart is no order");
    }

    pub fn phase(&self, who: usize) -> Phase {
        self.rows[who].migration.as_ref().expect("a migration").phase
    }

    pub fn runner(&self) -> usize {
        let runners: Vec<usize> = (0..2).filter(|who| self.sites[*who].running).collect();
        assert_eq!(runners.len(), 1, "{}", self.trace);
        assert!(self.rows[runners[0]].state.owned().is_some(), "{}", self.trace);
        assert_eq!(self.rows[runners[0]].life, Life::Up, "{}", self.trace);
        runners[0]
    }
}

pub fn name(effect: &Effect) -> String {
    let word = |value: serde_json::Value| value["command"].as_str().unwrap_or("?").to_owned();
    match effect {
        Effect::Plane(command) => format!("plane {}", word(serde_json::to_value(command).expect("JSON"))),
        Effect::Machine(command) => format!("machine {}", word(serde_json::to_value(command).expect("JSON"))),
        Effect::Send { message, .. } => format!("send {}", message.body.name()),
        Effect::Wake { .. } => String::new(),
    }
}

pub fn fail(code: FailureCode, message: &str) -> Failure {
    Failure { code, message: message.to_owned() }
}
