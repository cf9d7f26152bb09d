use super::*;
use crate::file::Identity;
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
        let Some((at, plan)) = self.wire.pop_front() else { return false };
        self.now = at;
        let mut arrival = Arrival::new();
        self.core.begin_store(self.now, plan.token, plan.blocks.clone(), &mut arrival);
        self.core.end_store(&mut arrival, true);
        self.answered
            .extend(arrival.direct.drain(..).chain(arrival.ready.drain(..)).map(|read| (read.waiter, self.now)));
        self.core.fetch_done(self.now, plan.token, true, &mut Vec::new());
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
            pair.core.begin_store(pair.now, plan.token, plan.blocks.clone(), &mut arrival);
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
    pair.core.begin_store(pair.now, plan.token, plan.blocks.clone(), &mut arrival);
    assert_eq!(arrival.store, [0..80, 160..plan.blocks.end * 8], "nothing over the write under way");
    assert!(matches!(pair.core.begin_write(&(0..8), Kind::Written), Begin::Busy));
    assert!(pair.core.end_write(id, true).is_some());
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
    assert_eq!(pair.core.end_write(id, false), None);
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
