use proptest::prelude::*;

use super::*;

/// The same states, kept naively.
struct Naive {
    shape: Shape,
    live: Vec<bool>,
    entries: Vec<Entry>,
}

impl Naive {
    fn mark(&mut self, sectors: &Range<u64>, to: State, only_fetched: bool) {
        for block in 0..self.shape.blocks() {
            let (bits, full) = (self.shape.mask_in(block, sectors), self.shape.full_mask(block));
            let entry = &mut self.entries[block as usize];
            if bits == 0 || only_fetched && entry.state != State::Fetched {
                continue;
            }
            *entry = match entry.state {
                _ if bits & full == full => Entry::of(to),
                State::Written | State::Discarded => Entry::of(State::Written),
                _ if (entry.mask | bits) & full == full => Entry::of(State::Written),
                state => Entry { state, mask: entry.mask | bits },
            };
        }
    }
}

fn check(shape: Shape, live: &[(u64, u64)], ops: &[(u8, u64, u64)]) -> Result<(), TestCaseError> {
    let blocks = shape.blocks();
    let set: ExtentSet =
        live.iter().map(|&(s, l)| Extent { start: s % blocks, length: l.min(blocks - s % blocks) }).collect();
    let is_live: Vec<bool> = (0..blocks).map(|block| set.contains(block)).collect();
    let initial = |&live: &bool| Entry::of(if live { State::Missing } else { State::Discarded });
    let mut naive = Naive { shape, entries: is_live.iter().map(initial).collect(), live: is_live };
    let mut map = BlockMap::new(shape, set.clone());
    let unit = u64::from(shape.sector_size()) / 512;
    for &(op, at, length) in ops {
        let start = at * unit % shape.sectors();
        let sectors = start..(start + length * unit).min(shape.sectors());
        match op {
            0 => {
                map.mark_written(&sectors);
                naive.mark(&sectors, State::Written, false);
            }
            1 => {
                map.mark_discarded(&sectors);
                naive.mark(&sectors, State::Discarded, false);
            }
            2 => {
                map.adopt(&sectors);
                naive.mark(&sectors, State::Written, true);
            }
            3 => {
                let run = sectors.start / 8..sectors.end.div_ceil(8);
                map.mark_fetched(run.clone());
                for entry in &mut naive.entries[run.start as usize..run.end as usize] {
                    entry.state = if entry.state == State::Missing { State::Fetched } else { entry.state };
                }
            }
            _ => {
                let block = sectors.start / 8;
                map.mark_lost(block);
                let entry = &mut naive.entries[block as usize];
                entry.state = if entry.state == State::Fetched { State::Missing } else { entry.state };
            }
        }
    }
    for block in 0..blocks {
        prop_assert_eq!(map.entry(block), naive.entries[block as usize], "block {}", block);
    }
    let count = |want: &dyn Fn(usize, &Entry) -> bool| {
        naive.entries.iter().enumerate().filter(|(i, e)| want(*i, e)).count() as u64
    };
    for state in State::ALL {
        prop_assert_eq!(map.count(state), count(&|_, e| e.state == state), "{:?}", state);
        let mut at = 0;
        let mut found = Vec::new();
        while let Some(run) = map.next_in(at..blocks, state) {
            at = run.end;
            found.extend(run);
        }
        let want: Vec<u64> = (0..blocks).filter(|&b| naive.entries[b as usize].state == state).collect();
        prop_assert_eq!(found, want, "{:?}", state);
    }
    prop_assert_eq!(map.written_live(), count(&|i, e| naive.live[i] && e.state == State::Written));
    prop_assert_eq!(map.discarded_live(), count(&|i, e| naive.live[i] && e.state == State::Discarded));
    // What the file would hold reads back the same.
    let mut again = BlockMap::new(shape, set);
    for page in map.take_dirty(true) {
        prop_assert!(again.decode(page, &map.encode(page)));
    }
    prop_assert!((0..blocks).all(|block| again.entry(block) == map.entry(block)));
    for state in State::ALL {
        prop_assert_eq!(map.count(state), again.count(state));
    }
    prop_assert_eq!(map.written_live(), again.written_live());
    Ok(())
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(48))]

    #[test]
    fn agrees_with_the_naive_map_4096(
        live in prop::collection::vec((0u64..33_000, 0u64..9_000), 0..6),
        ops in prop::collection::vec((0u8..5, 0u64..33_000, prop_oneof![1u64..40, 1u64..20_000]), 0..24),
    ) {
        check(Shape::new(33_000 * 4096, 4096).unwrap(), &live, &ops)?;
    }

    #[test]
    fn agrees_with_the_naive_map_512(
        live in prop::collection::vec((0u64..4_200, 0u64..900), 0..6),
        ops in prop::collection::vec((0u8..5, 0u64..33_600, prop_oneof![1u64..40, 1u64..18_000]), 0..24),
    ) {
        check(Shape::new(4_200 * 4096 + 1536, 512).unwrap(), &live, &ops)?;
    }
}

#[test]
fn a_trim_of_a_sparse_tebibyte_looks_at_what_is_live() {
    const GROUP: u64 = 32_768;
    let blocks = (1 << 40) / 4096;
    let mut live = ExtentSet::new();
    // As ext4 lays it out: tables at the start of each sixteenth group, data here and there.
    for group in (0..blocks / GROUP).step_by(16) {
        live.insert(group * GROUP..group * GROUP + 33);
        live.insert(group * GROUP + 9_000..group * GROUP + 9_100);
    }
    let mut map = BlockMap::new(Shape::new(1 << 40, 4096).unwrap(), live.clone());
    let begun = std::time::Instant::now();
    for group in 0..blocks / GROUP {
        // What is looked at for each request, of the trim or of a reader of the progress, while the clone is locked.
        let free = group * GROUP + 40..(group + 1) * GROUP;
        map.mark_discarded(&(free.start * 8..free.end * 8));
        assert!(!map.has_fetched(free));
        map.next_in(group * GROUP..blocks, State::Missing);
    }
    assert_eq!(map.count(State::Missing), blocks / GROUP / 16 * 33);
    assert_eq!(map.discarded_live(), blocks / GROUP / 16 * 100);
    // Block by block it would be a hundred million looks: half a minute without optimization, and now some ten milliseconds.
    assert!(begun.elapsed() < std::time::Duration::from_secs(3), "{:?}", begun.elapsed());
}

#[test]
fn a_sparse_tebibyte_is_small_and_quick() {
    let mut live = ExtentSet::new();
    for run in 0..1000 {
        live.insert(run * 200_000..run * 200_000 + 100);
    }
    let mut map = BlockMap::new(Shape::new(1 << 40, 4096).unwrap(), live);
    assert_eq!(map.count(State::Missing), 100_000);
    map.mark_discarded(&(0..(1 << 40) / 512));
    assert_eq!(map.count(State::Discarded), 1 << 28);
    assert!(map.pages.iter().flatten().all(|page| matches!(page.cells, Cells::Uniform(_))));
}

#[test]
fn a_page_of_blocks_in_one_state_takes_no_room() {
    for sector_size in [512, 4096] {
        let shape = Shape::new(64 << 20, sector_size).unwrap();
        let live: ExtentSet = [Extent { start: 0, length: shape.blocks() }].into_iter().collect();
        let mut map = BlockMap::new(shape, live.clone());
        let mixed = |map: &BlockMap| {
            let is_mixed = |page: &Page| matches!(page.cells, Cells::Mixed(_));
            map.pages.iter().flatten().filter(|page| is_mixed(page)).count()
        };
        // A part of a sector's block, where there can be one, keeps its page as it is.
        let ragged = if sector_size == 512 { 1 } else { 0 };
        map.mark_written(&(8..8 + ragged));
        map.mark_fetched(0..shape.blocks());
        assert_eq!(mixed(&map), ragged as usize, "{sector_size}");
        // And when it is read back.
        let mut again = BlockMap::new(shape, live);
        (0..shape.pages()).for_each(|page| assert!(again.decode(page, &map.encode(page))));
        assert_eq!(mixed(&again), ragged as usize, "{sector_size}");
        for block in [0, 1, 2, shape.blocks() - 1] {
            assert_eq!(again.entry(block), map.entry(block), "block {block}");
        }
    }
}
