use decant_base::ExtentSet;

use super::*;
use crate::file::Identity;
use crate::progress::Progress;
use crate::shape::Shape;

const LINK: Duration = Duration::from_millis(2);

/// A clone and a link of 100 MB/s and 2 ms, in virtual time.
struct Pair {
    core: CloneCore<u64>,
    now: Duration,
    /// (when answered, plan), in the order asked.
    wire: VecDeque<(Duration, Plan)>,
    free: Duration,
    answered: Vec<(u64, Duration)>,
    order: Vec<Plan>,
}

impl Pair {
    fn new(blocks: u64, live: &[(u64, u64)]) -> Self {
        let shape = Shape::new(blocks * BLOCK, 4096).unwrap();
        let identity = Identity { volume: "v".into(), shape, epoch: Some(1), boot: "b".into() };
        let live: ExtentSet = live.iter().map(|&run| decant_base::Extent::from(run)).collect();
        let (file, _) = MapFile::create(&identity, &live);
        let now = Duration::from_secs(1);
        let core = CloneCore::new(BlockMap::new(shape, live), file, now);
        Self { core, now, wire: VecDeque::new(), free: now, answered: Vec::new(), order: Vec::new() }
    }

    fn sent(&mut self, plans: Vec<Plan>) {
        for plan in plans {
            assert!(
                self.wire
                    .iter()
                    .all(|(_, other)| other.blocks.end <= plan.blocks.start || plan.blocks.end <= other.blocks.start)
            );
            let transfer = Duration::from_nanos((plan.blocks.end - plan.blocks.start) * BLOCK * 10);
            self.free = self.free.max(self.now + LINK / 2) + transfer;
            self.order.push(plan.clone());
            self.wire.push_back((self.free + LINK / 2, plan));
        }
    }

    fn up(&mut self) {
        self.core.handle_link(self.now, true, "up", &mut Vec::new());
        self.poll();
    }

    fn poll(&mut self) {
        let mut plans = Vec::new();
        self.core.poll(self.now, &mut plans);
        self.sent(plans);
    }

    fn read(&mut self, block: u64) -> bool {
        let mut plans = Vec::new();
        let sectors = block * SECTORS_PER_BLOCK..(block + 1) * SECTORS_PER_BLOCK;
        let parked = self.core.park(self.now, sectors, block, &mut plans).is_ok();
        self.sent(plans);
        parked
    }

    /// The next answer arrives; `false`: none is due.
    fn step(&mut self) -> bool {
        self.step_as(|_| Some(Came::Data), &mut Vec::new())
    }

    /// The same with what `answer` makes of the blocks; `None`: the origin cannot read them.
    fn step_as(&mut self, answer: impl Fn(&Range<u64>) -> Option<Came>, failed: &mut Vec<Waiting<u64>>) -> bool {
        let Some((at, plan)) = self.wire.pop_front() else { return false };
        self.now = at;
        let came = answer(&plan.blocks);
        if let Some(came) = came {
            let mut arrival = Arrival::new();
            self.core.begin_store(self.now, plan.token, plan.blocks.clone(), came, &mut arrival);
            self.core.end_store(&mut arrival, true);
            self.answered
                .extend(arrival.direct.drain(..).chain(arrival.ready.drain(..)).map(|read| (read.waiter, self.now)));
        }
        self.core.fetch_done(self.now, plan.token, came.is_some(), failed);
        self.poll();
        true
    }
}

#[test]
fn everything_live_is_fetched_once_and_nothing_else() {
    let mut pair = Pair::new(40_000, &[(3, 5000), (9000, 1), (30_000, 10_000)]);
    pair.up();
    while pair.step() {}
    let fetched: ExtentSet = pair
        .order
        .iter()
        .map(|p| decant_base::Extent { start: p.blocks.start, length: p.blocks.end - p.blocks.start })
        .collect();
    assert_eq!(&fetched, pair.core.map().live());
    assert_eq!(pair.order.iter().map(|p| p.blocks.end - p.blocks.start).sum::<u64>(), fetched.len());
    let progress = pair.core.progress(pair.now, 10);
    assert_eq!((progress.missing, progress.filled, progress.hindrance.as_str()), (0, fetched.len() * BLOCK, ""));
    // 60 MB at 100 MB/s.
    assert!(pair.now < Duration::from_millis(1750), "{:?}", pair.now);
}

#[test]
fn reads_do_not_wait_behind_the_hydration_and_it_goes_on() {
    let mut pair = Pair::new(60_000, &[(0, 60_000)]);
    pair.up();
    let (mut slowest, mut before) = (Duration::ZERO, 0);
    for n in 0..300u64 {
        let block = n * 7919 % 60_000;
        let asked = pair.now;
        if !pair.read(block) {
            pair.step();
            continue;
        }
        while !pair.answered.iter().any(|&(waiter, _)| waiter == block) {
            assert!(pair.step());
        }
        if n > 20 {
            slowest = slowest.max(pair.now - asked);
        }
        if n == 20 {
            before = pair.core.map().count(State::Fetched);
        }
    }
    let share = pair.core.map().count(State::Fetched) - before;
    assert!(slowest < Duration::from_millis(8), "a read took {slowest:?} over a link of 2 ms");
    assert!(share > 3_000, "{share} blocks came meanwhile");
}

#[test]
fn what_surrounds_a_read_comes_next() {
    let mut pair = Pair::new(60_000, &[(0, 60_000)]);
    assert!(pair.read(45_003));
    pair.up();
    assert_eq!(pair.order[0].blocks, 45_003..45_004);
    let next: u64 = pair.order[1..]
        .iter()
        .take_while(|p| (44_800..45_312).contains(&p.blocks.start))
        .map(|p| p.blocks.end - p.blocks.start)
        .sum();
    assert!(next >= 64, "only {next} blocks around it: {:?}", pair.order);
}

#[test]
fn an_unreadable_block_is_cut_out_and_tried_again_later() {
    let mut pair = Pair::new(600, &[(0, 600)]);
    pair.up();
    while pair.core.map().count(State::Missing) > 1 {
        let (at, plan) = pair.wire.pop_front().expect("a fetch under way");
        pair.now = at;
        let ok = !plan.blocks.contains(&333);
        if ok {
            let mut arrival = Arrival::new();
            pair.core.begin_store(pair.now, plan.token, plan.blocks.clone(), Came::Data, &mut arrival);
            pair.core.end_store(&mut arrival, true);
        }
        pair.core.fetch_done(pair.now, plan.token, ok, &mut Vec::new());
        pair.poll();
    }
    while let Some((_, plan)) = pair.wire.pop_front() {
        pair.core.fetch_done(pair.now, plan.token, false, &mut Vec::new());
    }
    pair.poll();
    assert!(pair.wire.is_empty(), "not at once");
    assert!(pair.core.progress(pair.now, 1).hindrance.starts_with("SLOW: the origin cannot read 1 block"));
    pair.now = pair.core.next_poll(pair.now).expect("a time for the next try");
    pair.poll();
    assert_eq!(pair.wire[0].1.blocks, 333..334);
    // A reader does not wait for that time.
    pair.core.fetch_done(pair.now, pair.wire[0].1.token, false, &mut Vec::new());
    pair.wire.clear();
    assert!(pair.read(333));
    assert_eq!(pair.wire[0].1.class, Class::Demand);
    let mut failed = Vec::new();
    pair.core.fetch_done(pair.now, pair.wire[0].1.token, false, &mut failed);
    assert_eq!(failed.len(), 1);
}

#[test]
fn writes_and_stores_exclude_each_other() {
    let mut pair = Pair::new(100, &[(0, 100)]);
    pair.up();
    let plan = pair.wire.pop_front().unwrap().1;
    let Begin::Tracked { id, adopted: None } = pair.core.begin_write(&(80..160), Kind::Written) else {
        panic!("not tracked")
    };
    let mut arrival = Arrival::new();
    pair.core.begin_store(pair.now, plan.token, plan.blocks.clone(), Came::Data, &mut arrival);
    assert_eq!(arrival.store, [0..80, 160..plan.blocks.end * 8], "nothing over the write under way");
    assert!(matches!(pair.core.begin_write(&(0..8), Kind::Written), Begin::Busy));
    assert!(pair.core.end_write(id, true, &mut Vec::new()).is_some());
    pair.core.end_store(&mut arrival, true);
    assert!(matches!(pair.core.begin_write(&(80..88), Kind::Discarded), Begin::Free));
    // Fetched blocks are overwritten only behind a durable intent.
    assert!(matches!(pair.core.begin_write(&(0..8), Kind::Written), Begin::Intents));
    assert_eq!(pair.core.missing_intents(&(0..800)), [0]);
    let _ = pair.core.parts().0.begin_update(|superblock| crate::file::set_intent(superblock, 0));
    assert!(matches!(pair.core.begin_write(&(0..8), Kind::Written), Begin::Intents), "not before it is durable");
    pair.core.parts().0.end_update();
    let Begin::Tracked { id, adopted: Some(_) } = pair.core.begin_write(&(0..8), Kind::Written) else {
        panic!("not adopted")
    };
    assert_eq!(pair.core.map().entry(0).state, State::Written, "from the first byte on it is not the origin's");
    assert_eq!(pair.core.end_write(id, false, &mut Vec::new()), None);
}

/// A write of whole blocks that are missing, to its end; whom that answers.
fn write(core: &mut CloneCore<u64>, blocks: Range<u64>, landed: bool) -> Vec<u64> {
    let begun = core.begin_write(&(blocks.start * SECTORS_PER_BLOCK..blocks.end * SECTORS_PER_BLOCK), Kind::Written);
    let Begin::Tracked { id, .. } = begun else { panic!("{begun:?}") };
    let mut ready = Vec::new();
    core.end_write(id, landed, &mut ready);
    ready.into_iter().map(|read| read.waiter).collect()
}

#[test]
fn a_write_of_what_reads_wait_for_answers_them() {
    let mut pair = Pair::new(100, &[(0, 100)]);
    pair.core.set_hydrate(false);
    pair.up();
    let mut plans = Vec::new();
    for (waiter, sectors) in [(1, 80..96), (2, 88..89), (3, 160..168)] {
        pair.core.park(pair.now, sectors, waiter, &mut plans).unwrap();
    }
    assert_eq!(write(&mut pair.core, 11..12, false), [], "nothing landed");
    assert_eq!(write(&mut pair.core, 10..11, true), [], "a part of the first");
    assert_eq!(write(&mut pair.core, 11..12, true), [1, 2]);
    // Written while it is being fetched: nothing is stored, and the origin's bytes answer nobody.
    let plan = plans.iter().find(|plan| plan.blocks.contains(&20)).expect("a fetch of it").clone();
    let begun = pair.core.begin_write(&(160..168), Kind::Discarded);
    let Begin::Tracked { id, .. } = begun else { panic!("{begun:?}") };
    let mut arrival = Arrival::new();
    pair.core.begin_store(pair.now, plan.token, plan.blocks, Came::Data, &mut arrival);
    pair.core.end_store(&mut arrival, true);
    assert!(arrival.direct.is_empty() && arrival.ready.is_empty());
    let mut ready = Vec::new();
    assert!(pair.core.end_write(id, true, &mut ready).is_some());
    assert_eq!((ready.len(), pair.core.parked()), (1, 0));
}

#[test]
fn ninety_six_reads_wait_for_ever_and_more_leave_room_for_writes() {
    let mut pair = Pair::new(40_000, &[(0, 40_000)]);
    pair.core.set_hydrate(false);
    pair.up();
    let begun = pair.now;
    for read in 0..128 {
        assert!(pair.read(read * 100));
    }
    let due = begun + crate::demand::STALLED_AFTER;
    assert_eq!(pair.core.stalls_at(), Some(due));
    let mut failed = Vec::new();
    assert!(!pair.core.shed_reads(due - Duration::from_millis(1), &mut failed) && failed.is_empty());
    assert!(pair.core.shed_reads(due, &mut failed), "the first time");
    let waiters: Vec<u64> = failed.drain(..).map(|read| read.waiter).collect();
    assert_eq!(waiters, (96..128).map(|read| read * 100).collect::<Vec<_>>(), "those that came last");
    assert_eq!((pair.core.parked(), pair.core.stalls_at()), (96, None));
    pair.now = due;
    assert!(!pair.read(20_000), "from now on one too many fails at once");
    let hindrance = pair.core.progress(due, 0).hindrance;
    assert_eq!(hindrance, "STALLED: nothing from the origin, 96 reads wait and 33 more failed, so that writes go on");
    // Something comes: more may wait again, and those that waited are answered.
    pair.step();
    assert!(pair.read(20_000) && pair.read(20_100) && pair.read(20_200));
    assert_eq!(pair.core.parked(), 98);
    assert_eq!(pair.core.stalls_at(), Some(pair.now + crate::demand::STALLED_AFTER));
    while pair.step() {}
    assert_eq!((pair.answered.len(), pair.core.parked(), pair.core.stalls_at()), (99, 0, None));
    assert!(!pair.core.shed_reads(pair.now + Duration::from_secs(100), &mut failed));
}

#[test]
fn the_hydration_lets_a_boot_go_first_and_not_for_ever() {
    let mut pair = Pair::new(40_000, &[(0, 40_000)]);
    let began = pair.now;
    pair.core.expect_boot(began);
    pair.up();
    while pair.step() {}
    assert!(pair.order.drain(..).all(|plan| plan.blocks.end <= 256), "the volume's start, as nothing was read yet");
    // A boot that reads all over the place, every 50 ms: its reads and what lies around them, and no more.
    for read in 1..30 {
        pair.now = began + read * Duration::from_millis(50);
        if pair.now >= began + BOOT_LONGEST {
            break;
        }
        let block = u64::from(read) * 1000;
        assert!(pair.read(block));
        while pair.step() {}
        pair.now = began + read * Duration::from_millis(50);
        let around = |plan: &Plan| plan.blocks.start / 256 == block / 256;
        assert!(pair.order.drain(..).all(|plan| around(&plan)), "only around block {block}");
        assert!(pair.core.next_poll(pair.now).is_some_and(|due| due <= began + BOOT_LONGEST));
    }
    pair.now = began + BOOT_LONGEST;
    pair.poll();
    assert_eq!(pair.order[0].blocks.start, 256, "the rest comes in order");
    // One that reads nothing is over soon.
    let mut pair = Pair::new(40_000, &[(0, 40_000)]);
    pair.core.expect_boot(pair.now);
    let began = pair.now;
    pair.up();
    while pair.step() {}
    pair.order.clear();
    assert_eq!(pair.core.next_poll(pair.now), Some(began + BOOT_QUIET));
    pair.now = began + BOOT_QUIET;
    pair.poll();
    assert!(!pair.order.is_empty());
}

#[test]
fn read_ahead_over_a_bad_block_fails_the_reads_of_that_block_only() {
    let mut pair = Pair::new(1000, &[(0, 1000)]);
    pair.core.set_hydrate(false);
    pair.up();
    let answer = |blocks: &Range<u64>| (!blocks.contains(&105)).then_some(Came::Data);
    let mut failed = Vec::new();
    for block in 100..110 {
        if pair.read(block) {
            while pair.step_as(answer, &mut failed) {}
        }
    }
    let failed: Vec<u64> = failed.into_iter().map(|read| read.waiter).collect();
    assert_eq!(failed, [105]);
    assert_eq!(pair.core.parked(), 0, "all others are answered");
    // Whoever waits for what somebody else asked for is not failed with him either.
    let mut pair = Pair::new(1000, &[(0, 1000)]);
    pair.core.set_hydrate(false);
    pair.up();
    let (mut plans, mut failed) = (Vec::new(), Vec::new());
    assert!(pair.core.park(pair.now, 100 * 8..110 * 8, 100, &mut plans).is_ok());
    pair.sent(plans);
    assert!(pair.read(102));
    while pair.step_as(answer, &mut failed) {}
    assert_eq!(failed.iter().map(|read| read.waiter).collect::<Vec<_>>(), [100]);
    assert_eq!(pair.answered.iter().map(|(waiter, _)| *waiter).collect::<Vec<_>>(), [102]);
}

#[test]
fn holes_are_neither_limited_nor_counted_as_carried() {
    let mut pair = Pair::new(40_000, &[(0, 40_000)]);
    pair.core.set_limit(pair.now, Some(1_000_000));
    pair.up();
    let begun = pair.now;
    while pair.core.map().count(State::Missing) > 0 {
        if !pair.step_as(|_| Some(Came::Hole), &mut Vec::new()) {
            pair.now = pair.core.next_poll(pair.now).expect("it goes on");
            pair.poll();
        }
    }
    let took = pair.now - begun;
    assert!(took < Duration::from_secs(5), "160 MB of holes took {took:?}");
    let progress = pair.core.progress(pair.now, 0);
    assert_eq!((progress.fetched, progress.rate), (0, 0));
    // And data are limited from a second's worth on.
    let mut pair = Pair::new(40_000, &[(0, 40_000)]);
    pair.core.set_limit(pair.now, Some(1_000_000));
    pair.up();
    let begun = pair.now;
    let answer = |blocks: &Range<u64>| Some(if blocks.start < 20_000 { Came::Hole } else { Came::Data });
    while pair.now < begun + Duration::from_secs(10) {
        if !pair.step_as(answer, &mut Vec::new()) {
            pair.now = pair.core.next_poll(pair.now).expect("it goes on");
            pair.poll();
        }
    }
    let fetched = pair.core.progress(pair.now, 0).fetched;
    assert!((8_000_000..11_500_000).contains(&fetched), "{fetched} bytes in 10 s");
}

#[test]
fn where_waiting_reads_are_in_no_way_none_fails_for_want_of_room() {
    let mut pair = Pair::new(40_000, &[(0, 40_000)]);
    pair.core.set_most_waiting(usize::MAX);
    pair.core.set_hydrate(false);
    pair.up();
    for read in 0..crate::demand::MAX_PARKED as u64 {
        assert!(pair.read(read * 19));
    }
    assert_eq!(pair.core.stalls_at(), None);
    let mut failed = Vec::new();
    assert!(!pair.core.shed_reads(pair.now + Duration::from_secs(1000), &mut failed) && failed.is_empty());
    // One too many; and reads whose readers have gone make room.
    assert!(!pair.read(39_999));
    pair.core.drop_unwanted(|read| read % 2 == 0);
    assert!(pair.read(39_999));
    assert_eq!(pair.core.parked(), crate::demand::MAX_PARKED / 2 + 1);
}

#[test]
fn a_pause_holds_what_nobody_asked_for_and_says_who_paused() {
    let mut pair = Pair::new(40_000, &[(0, 40_000)]);
    pair.core.set_paused(true);
    pair.up();
    assert!(pair.order.is_empty() && pair.core.next_poll(pair.now).is_none());
    assert!(pair.core.progress(pair.now, 0).hindrance.starts_with("PAUSED"));
    assert!(pair.read(7));
    while pair.step() {}
    assert_eq!(pair.order.len(), 1);
    pair.core.set_paused(false);
    pair.poll();
    assert!(pair.order.len() > 1);
}

#[test]
fn the_last_block_counts_as_many_bytes_as_it_has() {
    let shape = Shape::new(3 * BLOCK + 512, 512).unwrap();
    let identity = Identity { volume: "v".into(), shape, epoch: Some(1), boot: "b".into() };
    let live: ExtentSet = [decant_base::Extent { start: 0, length: 4 }].into_iter().collect();
    let (file, _) = MapFile::create(&identity, &live);
    let mut core = CloneCore::<u64>::new(BlockMap::new(shape, live), file, Duration::ZERO);
    let figures = |core: &mut CloneCore<u64>| {
        let Progress { total, missing, filled, written, discarded, .. } = core.progress(Duration::ZERO, 0);
        assert_eq!((total, missing + filled + written + discarded), (shape.size(), shape.size()));
        [missing, filled, written, discarded]
    };
    assert_eq!(figures(&mut core), [3 * BLOCK + 512, 0, 0, 0]);
    core.parts().1.mark_fetched(3..4);
    assert_eq!(figures(&mut core), [3 * BLOCK, 512, 0, 0]);
    core.parts().1.mark_written(&(24..25));
    assert_eq!(figures(&mut core), [3 * BLOCK, 0, 512, 0]);
    core.parts().1.mark_discarded(&(0..25));
    assert_eq!(figures(&mut core), [0, 0, 0, 3 * BLOCK + 512]);
}
