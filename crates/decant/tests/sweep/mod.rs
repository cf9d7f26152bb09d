//! One way at a time: gone undisturbed and traced, then with a crash at each point that was passed.

mod drains;
mod ways;

use std::collections::BTreeSet;
use std::process::Command;
use std::thread::JoinHandle;
use std::time::Instant;

use super::fleet::{self, Fleet, Worker};

/// What dies at the point.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Victim {
    Agent,
    Volume,
    Both,
    Power,
}

/// What two workers and an operator do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// A machine moves.
    Move,
    /// A cancel: the source has not heard that the destination is prepared, and goes back alone.
    Abandon,
    /// A cancel: the source is sealed and the destination has not heard of the grant: it is asked to refuse.
    Refuse,
    /// The destination has not got the key, and says so.
    Unready,
    /// A stopped machine is reclaimed while its destination, thought to be destroyed, is about to say that it is whole.
    Overruled,
    /// A machine is stopped and started; no migration.
    Stop,
    /// A worker is drained.
    Drain,
    /// A drain finds no place, and is cancelled.
    BlockedDrain,
    /// A drain is cancelled while its machine is on its way.
    CancelledDrain,
    /// The deadline of a drain passes while its machine is on its way.
    LateDrain,
}

/// The two ends.
pub(crate) const SOURCE: usize = 0;
pub(crate) const DESTINATION: usize = 1;
const SIDES: [&str; 2] = ["source", "destination"];

/// Where the machine is in the end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    AtSource,
    AtDestination,
}

impl Way {
    /// A volume process knows nothing of a cancel or a drain: it dies where data moves.
    fn victims(self) -> &'static [Victim] {
        match self {
            Self::Move => &[Victim::Agent, Victim::Volume, Victim::Both, Victim::Power],
            _ => &[Victim::Agent, Victim::Power],
        }
    }

    /// Points of the source that are its own the second time: a cancel of a sealed machine is written into the sealed row.
    fn again(self) -> &'static [&'static str] {
        match self {
            Self::Refuse => &["journal:source:sealed:before#2", "journal:source:sealed:after#2"],
            _ => &[],
        }
    }

    /// Where the machine is if nothing dies. After a crash it may be at the other end: an order that was not durable is lost.
    fn end(self) -> End {
        if matches!(self, Self::Move | Self::Drain) { End::AtDestination } else { End::AtSource }
    }

    /// Whether a passed point is this way's own: one that it alone passes, or passes with something else at stake. When a
    /// machine's own row is committed depends on who is heard first, but in a move and in a stop; the points of a volume's map
    /// are the engine's tests'.
    fn has(self, point: &str) -> bool {
        match self {
            Self::Move | Self::Stop => !point.starts_with("map:"),
            // Whether the last grant is sent before the cancel or after it is a matter of luck; and a move's point.
            Self::Abandon | Self::Refuse => {
                ["unwinding", "ended", "abandon", "refuse"].iter().any(|word| point.contains(word))
            }
            Self::Unready => !point.starts_with("map:") && !point.starts_with("journal:machine:"),
            Self::Overruled => point.contains(":grant-stale"),
            Self::Drain | Self::BlockedDrain | Self::CancelledDrain | Self::LateDrain => {
                point.starts_with("journal:drain:")
            }
        }
    }
}

/// What is done to the way.
#[derive(Debug, Clone, Copy)]
enum Watch<'a> {
    /// Nothing: what it passes is written down.
    Trace,
    /// The victim dies when the agent of this side passes the point for the first time.
    Crash { side: usize, point: &'a str, victim: Victim },
}

/// Goes `way` once undisturbed, then crashes at each point that these sides passed; returns these points.
pub(crate) fn all_crashes_of(fleet: &mut Fleet, way: Way, sides: &[usize]) -> BTreeSet<String> {
    let began = Instant::now();
    let mut traced = Run::begin(fleet, way, Watch::Trace);
    let end = traced.go();
    assert_eq!(end, way.end(), "{way:?}, undisturbed");
    let mut points: Vec<(usize, String)> =
        sides.iter().flat_map(|side| traced.passed(*side).into_iter().map(|point| (*side, point))).collect();
    points.extend(way.again().iter().map(|point| (SOURCE, (*point).to_owned())));
    for worker in &mut fleet.workers {
        worker.end_agent();
        worker.start_agent(&[]);
    }
    let (mut crashes, mut as_if_undisturbed) = (0, 0);
    for (side, point) in &points {
        println!("SHOW point of {way:?} on the {}: {point}", SIDES[*side]);
        for victim in way.victims() {
            let end = Run::begin(fleet, way, Watch::Crash { side: *side, point, victim: *victim }).go();
            crashes += 1;
            as_if_undisturbed += usize::from(end == way.end());
        }
    }
    let count = |wanted| points.iter().filter(|(side, _)| *side == wanted).count();
    println!(
        "SHOW sweep of {way:?}: {} points on the source, {} on the destination, {crashes} crashes, {as_if_undisturbed} of them \
         ended as an undisturbed one, {:.0} s",
        count(SOURCE),
        count(DESTINATION),
        began.elapsed().as_secs_f64()
    );
    points.into_iter().map(|(_, point)| point.split('#').next().unwrap_or_default().to_owned()).collect()
}

/// One way, gone once.
struct Run<'a> {
    fleet: &'a mut Fleet,
    way: Way,
    watch: Watch<'a>,
    /// For whoever reads a failure.
    when: String,
    /// Which worker is the source; the other is the destination.
    source: usize,
    /// How long each side's trace was when its agent was started.
    began: [usize; 2],
    /// How long it was when the way's own part began.
    marks: [usize; 2],
    /// How long each was when that part ended, if not with the way itself.
    ends: [Option<usize>; 2],
    /// A crash counts a point's first passage by the process: what it passed before the mark is not this way's.
    only_first: [bool; 2],
}

impl<'a> Run<'a> {
    fn begin(fleet: &'a mut Fleet, way: Way, watch: Watch<'a>) -> Self {
        let when = match watch {
            Watch::Trace => format!("{way:?}, undisturbed"),
            Watch::Crash { side, point, victim } => format!("{way:?}: {victim:?} at {point} on the {}", SIDES[side]),
        };
        let source = fleet.settle(&format!("before {when}"));
        Self { fleet, way, watch, when, source, began: [0; 2], marks: [0; 2], ends: [None; 2], only_first: [false; 2] }
    }

    fn go(&mut self) -> End {
        match self.way {
            Way::Move => self.moves(),
            Way::Abandon | Way::Refuse => self.take_back(),
            Way::Unready => self.unready(),
            Way::Overruled => self.overruled(),
            Way::Stop => self.stop(),
            Way::Drain | Way::BlockedDrain | Way::CancelledDrain | Way::LateDrain => self.drain(),
        }
        let when = format!("after {}", self.when);
        let owner = self.fleet.settle(&when);
        self.fleet.acks.await_progress(&when);
        if owner == self.source { End::AtSource } else { End::AtDestination }
    }

    fn worker(&mut self, side: usize) -> &mut Worker {
        let at = self.index(side);
        &mut self.fleet.workers[at]
    }

    /// Which worker this side is.
    fn index(&self, side: usize) -> usize {
        if side == SOURCE { self.source } else { 1 - self.source }
    }

    fn name(&self, side: usize) -> String {
        format!("worker-{}", self.index(side) + 1)
    }

    /// What the agent of this side is started with; `None` if nothing is watched there.
    fn environment(&mut self, side: usize) -> Option<[(&'static str, String); 2]> {
        match self.watch {
            Watch::Trace => {
                let trace = self.worker(side).trace_path().display().to_string();
                Some([("DECANT_CRASH_TRACE", trace), ("DECANT_CRASH_SIGNAL", "stop".to_owned())])
            }
            Watch::Crash { side: at, point, .. } => (at == side).then(|| stop_at(point)),
        }
    }

    /// Starts the agent of this side, which does not run, watched if its side is.
    fn start(&mut self, side: usize) {
        let environment = self.environment(side);
        self.began[side] = self.worker(side).trace().len();
        self.worker(side).start_agent_with(environment.iter().flatten());
    }

    /// Starts the agent of this side anew, to stand still at `point`, and waits until it answers.
    fn restart_to_stop_at(&mut self, side: usize, point: &str) {
        self.worker(side).end_agent();
        self.worker(side).start_agent_with(stop_at(point).iter());
        self.worker(side).await_agent();
    }

    /// Starts the agents that are watched anew. True if one stands still already: some points an agent passes while it
    /// starts, before it takes any order.
    fn restart_watched(&mut self, sides: &[usize]) -> bool {
        for side in sides {
            if self.environment(*side).is_some() {
                self.worker(*side).end_agent();
                self.start(*side);
            }
        }
        if let Watch::Crash { side, .. } = self.watch {
            // It may still come to the point by itself: nothing else is asked of it.
            return self.worker(side).answers_or_stands_still();
        }
        let when = format!("before {}", self.when);
        self.fleet.settle(&when);
        self.mark(SOURCE);
        self.mark(DESTINATION);
        false
    }

    /// The way's own part begins on this side.
    fn mark(&mut self, side: usize) {
        self.marks[side] = self.worker(side).trace().len();
    }

    /// From here on, and only points that the process passes for the first time.
    fn mark_first(&mut self, side: usize) {
        self.mark(side);
        self.only_first[side] = true;
    }

    /// The way's own part has ended: nothing dies any more.
    fn mark_end(&mut self) {
        self.ends = [SOURCE, DESTINATION].map(|side| Some(self.worker(side).trace().len()));
    }

    /// What this side passed since its mark, sorted.
    fn passed(&mut self, side: usize) -> Vec<String> {
        let (mark, end) = (self.marks[side], self.ends[side]);
        let mut trace = self.worker(side).trace();
        trace.truncate(end.unwrap_or(usize::MAX));
        let (before, since) = trace.split_at(mark);
        let before = &before[self.began[side]..];
        let is_own = |point: &&String| self.way.has(point) && !(self.only_first[side] && before.contains(point));
        let own: BTreeSet<String> = since.iter().filter(is_own).cloned().collect();
        own.into_iter().collect()
    }

    /// Waits until a traced side has passed `point`. Nothing is waited for where something dies: it may never come to that.
    fn await_traced(&mut self, side: usize, point: &str) {
        let mark = self.marks[side];
        let is_traced = matches!(self.watch, Watch::Trace);
        let deadline = Instant::now() + fleet::PATIENCE;
        while is_traced && !self.worker(side).trace()[mark..].iter().any(|passed| passed == point) {
            assert!(Instant::now() < deadline, "{}: {point} is not passed: {}", self.when, self.fleet.describe());
            fleet::wait_a_moment();
        }
    }

    /// Waits until `done`, or until this side stands still at its point.
    fn await_unless_still(&mut self, side: usize, mut done: impl FnMut(&mut Self) -> bool) {
        let is_watched = matches!(self.watch, Watch::Crash { side: at, .. } if at == side);
        let deadline = Instant::now() + fleet::PATIENCE;
        loop {
            if (is_watched && self.worker(side).stands_still()) || done(self) {
                return;
            }
            assert!(Instant::now() < deadline, "{}: not done: {}", self.when, self.fleet.describe());
            fleet::wait_a_moment();
        }
    }

    /// A command line against this side's agent, by a thread: the agent that takes an order may stand still before it answers.
    fn spawn(&mut self, side: usize, arguments: &[&str]) -> JoinHandle<()> {
        let mut command: Command = self.worker(side).command(arguments);
        std::thread::spawn(move || drop(command.output()))
    }

    /// The victim dies where it is meant to, and its agent is started again.
    fn strike(&mut self) {
        let Watch::Crash { side, victim, .. } = self.watch else { return };
        let hit = self.worker(side).await_standstill();
        assert!(hit, "{}: the point was not hit: {}", self.when, self.fleet.describe());
        if victim == Victim::Power {
            self.fleet.acks.expect_power_cut();
        }
        let worker = self.worker(side);
        match victim {
            Victim::Agent => worker.kill_agent(),
            Victim::Volume => {
                worker.kill_volume_processes();
                return worker.resume_agent();
            }
            Victim::Both => {
                worker.kill_volume_processes();
                worker.kill_agent();
            }
            Victim::Power => worker.cut_power(),
        }
        worker.start_agent(&[]);
    }
}

fn stop_at(point: &str) -> [(&'static str, String); 2] {
    [("DECANT_CRASH", point.to_owned()), ("DECANT_CRASH_SIGNAL", "stop".to_owned())]
}
