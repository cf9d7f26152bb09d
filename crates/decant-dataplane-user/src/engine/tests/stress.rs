//! Many threads at once: each owns some blocks and knows what they must hold.

use super::super::*;
use super::fixture::*;

const THREADS: u64 = 4;

/// Sector versions of one thread's blocks; `u64::MAX` is discarded.
fn work(engine: &Engine, shape: Shape, thread: u64, steps: u64, seed: u64) -> Vec<(u64, u64)> {
    let mut random = Random(seed * 1000 + thread);
    let unit = u64::from(shape.sector_size()) / 512;
    // Blocks thread, thread + 4, ...: neighbours belong to others, so that stores and writes meet.
    let blocks: Vec<u64> = (thread..shape.blocks()).step_by(THREADS as usize).collect();
    let mut versions = std::collections::HashMap::new();
    for step in 1..=steps {
        let block = blocks[random.below(blocks.len() as u64) as usize];
        let first = random.below(8 / unit) * unit;
        let count = (1 + random.below((8 - first) / unit)) * unit;
        let sectors = block * 8 + first..block * 8 + first + count.min(8 - first);
        let (offset, length) = (sectors.start * 512, ((sectors.end - sectors.start) * 512) as usize);
        match random.below(8) {
            0..3 => {
                engine.write(offset, &mut plaintext(offset, length, thread << 32 | step)).unwrap();
                sectors.for_each(|sector| {
                    versions.insert(sector, thread << 32 | step);
                });
            }
            3 => {
                engine.discard(offset, length as u64).unwrap();
                sectors.for_each(|sector| {
                    versions.insert(sector, u64::MAX);
                });
            }
            4 if step % 5 == 0 => engine.flush().unwrap(),
            _ => {
                let got = read(engine, offset, length).unwrap();
                for (sector, data) in sectors.zip(got.chunks(512)) {
                    check(sector, versions.get(&sector).copied().unwrap_or(0), data, seed);
                }
            }
        }
    }
    versions.into_iter().collect()
}

fn check(sector: u64, version: u64, data: &[u8], seed: u64) {
    let want = if version == u64::MAX { [0; 512] } else { pattern(sector, version) };
    assert!(data == want, "seed {seed}: sector {sector} is not version {version:#x}");
}

fn run(sector_size: u32, seed: u64) {
    let volume = Volume::new(4 << 20, sector_size, &[(0, 1024)]);
    let (engine, origin) = (volume.begun(), volume.origin());
    origin.reorder.store(true, Ordering::Relaxed);
    origin.piece.store([4096, 8192, 5000, 1 << 20][seed as usize % 4], Ordering::Relaxed);
    engine.set_limit(Some(6 << 20));
    origin.attach(&engine);
    let versions: Vec<(u64, u64)> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..THREADS)
            .map(|n| {
                scope.spawn({
                    let engine = &engine;
                    move || work(engine, volume.shape, n, 500, seed)
                })
            })
            .collect();
        threads.into_iter().flat_map(|thread| thread.join().unwrap()).collect()
    });
    engine.set_limit(None);
    hydrate(&engine);
    let versions: std::collections::HashMap<_, _> = versions.into_iter().collect();
    let all = |engine: &Engine| {
        let data = read(engine, 0, volume.shape.size() as usize).unwrap();
        for (sector, data) in (0..).zip(data.chunks(512)) {
            check(sector, versions.get(&sector).copied().unwrap_or(0), data, seed);
        }
    };
    all(&engine);
    let verification = engine.verify().unwrap();
    assert_eq!(verification.repaired, 0, "seed {seed}");
    assert_eq!(verification.compared + verification.overwritten + verification.discarded, 1024);
    all(&engine);
    engine.drop_map().unwrap();
    drop(engine);
    all(&volume.try_open(Mode::Plain).unwrap());
}

#[test]
fn threads_that_read_write_discard_and_flush_while_it_fills() {
    let scale: f64 = std::env::var("DECANT_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1.0);
    for seed in 0..(4.0 * scale).max(1.0) as u64 {
        run(if seed % 2 == 0 { 4096 } else { 512 }, seed);
    }
}
