//! The journal against crashes, tears, flipped bits, a disk that fails, and people who move files.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::sync::{Arc, Mutex};

use decant_fsm::{ApplyError, Change, Journal, JournalError, LogEntry, OpenError, Options, Write};
use redb::StorageBackend;

fn options() -> Options {
    Options { owner: "worker-1".to_owned(), schema: 1, log_max: 1_000 }
}

fn entry(step: u64) -> LogEntry {
    LogEntry {
        seq: 0,
        time_ms: step,
        subject: "machine/orders".to_owned(),
        from: "active(1)".to_owned(),
        event: format!("step {step}"),
        to: "active(1)".to_owned(),
        detail: serde_json::Value::Null,
    }
}

/// Commits step number `step`: it counts in its own row and in one that all share, and writes a line.
fn commit(journal: &Journal, step: u64, durable: bool) -> Result<(), ApplyError<std::convert::Infallible>> {
    let key = format!("machine/m{}", step % 7);
    journal.apply(&key, |_: Option<(u64, String)>| {
        let filler = "x".repeat((step * 97 % 1_500) as usize);
        Ok(Change { row: Write::Put((step, filler)), durable, log: Some(entry(step)), points: None, then: () })
    })
}

/// The state of a journal: its rows' numbers, and the numbers of the lines.
fn state(journal: &Journal) -> (BTreeMap<String, u64>, Vec<u64>) {
    let rows = journal.rows::<(u64, String)>("machine/").expect("rows are read");
    let lines = journal.log(0, 10_000).expect("lines are read");
    (rows.into_iter().map(|(key, (step, _))| (key, step)).collect(), lines.iter().map(|line| line.time_ms).collect())
}

/// What the state is after steps 1..=last.
fn expected(last: u64) -> (BTreeMap<String, u64>, Vec<u64>) {
    ((1..=last).map(|step| (format!("machine/m{}", step % 7), step)).collect(), (1..=last).collect())
}

#[derive(Debug, Clone)]
enum Op {
    Write(u64, Vec<u8>),
    Length(u64),
    Sync,
}

#[derive(Debug, Default)]
struct Medium {
    bytes: Vec<u8>,
    ops: Vec<Op>,
    /// Syncs fail from this one on, counted from 1.
    fail_sync: Option<u64>,
    syncs: u64,
}

/// A disk in memory that remembers everything that was done to it.
#[derive(Debug, Clone, Default)]
struct Disk(Arc<Mutex<Medium>>);

impl Disk {
    fn of(bytes: Vec<u8>) -> Self {
        Self(Arc::new(Mutex::new(Medium { bytes, ..Medium::default() })))
    }

    fn medium(&self) -> std::sync::MutexGuard<'_, Medium> {
        self.0.lock().expect("a lock")
    }
}

impl StorageBackend for Disk {
    fn len(&self) -> Result<u64, std::io::Error> {
        Ok(self.medium().bytes.len() as u64)
    }

    fn read(&self, offset: u64, out: &mut [u8]) -> Result<(), std::io::Error> {
        let medium = self.medium();
        let start = offset as usize;
        let part = medium.bytes.get(start..start + out.len());
        out.copy_from_slice(part.ok_or_else(|| std::io::Error::other("read beyond the end"))?);
        Ok(())
    }

    fn set_len(&self, len: u64) -> Result<(), std::io::Error> {
        let mut medium = self.medium();
        apply(&mut medium.bytes, &Op::Length(len), |_| true);
        medium.ops.push(Op::Length(len));
        Ok(())
    }

    fn sync_data(&self) -> Result<(), std::io::Error> {
        let mut medium = self.medium();
        medium.syncs += 1;
        if medium.fail_sync.is_some_and(|from| medium.syncs >= from) {
            return Err(std::io::Error::other("the disk is gone"));
        }
        medium.ops.push(Op::Sync);
        Ok(())
    }

    fn write(&self, offset: u64, data: &[u8]) -> Result<(), std::io::Error> {
        let mut medium = self.medium();
        let op = Op::Write(offset, data.to_vec());
        apply(&mut medium.bytes, &op, |_| true);
        medium.ops.push(op);
        Ok(())
    }
}

/// Does `op` to `bytes`; of a write, those 512-byte sectors that `keeps` lets through.
fn apply(bytes: &mut Vec<u8>, op: &Op, mut keeps: impl FnMut(usize) -> bool) {
    match op {
        Op::Length(len) => bytes.resize(*len as usize, 0),
        Op::Write(offset, data) => {
            let start = *offset as usize;
            if bytes.len() < start + data.len() {
                bytes.resize(start + data.len(), 0);
            }
            for (index, sector) in data.chunks(512).enumerate() {
                if keeps(index) {
                    bytes[start + index * 512..][..sector.len()].copy_from_slice(sector);
                }
            }
        }
        Op::Sync => {}
    }
}

/// A small generator with a seed that a failure prints.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }
}

fn scale() -> u64 {
    std::env::var("DECANT_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1)
}

#[test]
fn survives_a_power_cut_at_every_sync() {
    let disk = Disk::default();
    let journal = Journal::open_on(disk.clone(), &options()).expect("a new journal opens");
    // (operations so far, last step, durable)
    let mut marks = vec![(disk.medium().ops.len(), 0, true)];
    for step in 1..=60 {
        let durable = step % 3 != 2;
        commit(&journal, step, durable).expect("commits");
        marks.push((disk.medium().ops.len(), step, durable));
    }
    let ops = disk.medium().ops.clone();
    let syncs: Vec<usize> = (0..ops.len()).filter(|at| matches!(ops[*at], Op::Sync) && *at >= marks[0].0).collect();
    let mut images = 0;
    for (number, sync) in syncs.iter().enumerate() {
        let from = if number == 0 { marks[0].0 } else { syncs[number - 1] };
        let at_least = marks
            .iter()
            .filter(|(at, _, durable)| *durable && *at <= *sync)
            .map(|(_, step, _)| *step)
            .max()
            .unwrap_or(0);
        let at_most = marks.iter().filter(|(at, ..)| *at <= *sync).map(|(_, step, _)| *step).max().unwrap_or(0) + 1;
        for variant in 0..(6 * scale()) {
            let seed = (number as u64 + 1) * 1_000 + variant + 1;
            let mut random = Random(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15));
            let mut bytes = Vec::new();
            ops[..from].iter().for_each(|op| apply(&mut bytes, op, |_| true));
            for op in &ops[from..*sync] {
                match variant {
                    0 => {}
                    1 => apply(&mut bytes, op, |_| true),
                    _ if random.next().is_multiple_of(2) => apply(&mut bytes, op, |_| !random.next().is_multiple_of(3)),
                    _ => {}
                }
            }
            images += 1;
            let journal = Journal::open_on(Disk::of(bytes), &options())
                .unwrap_or_else(|error| panic!("seed {seed}, sync {number}: {error}"));
            let found = state(&journal);
            let last = found.1.last().copied().unwrap_or(0);
            assert!((at_least..=at_most).contains(&last), "seed {seed}: step {last}, not in {at_least}..={at_most}");
            assert_eq!(found, expected(last), "seed {seed}: a step is there in part");
        }
    }
    println!("{} syncs, {images} images", syncs.len());
}

#[test]
fn a_failed_sync_is_final() {
    let disk = Disk::default();
    let journal = Journal::open_on(disk.clone(), &options()).expect("a new journal opens");
    for step in 1..=5 {
        commit(&journal, step, true).expect("commits");
    }
    let syncs = disk.medium().syncs;
    disk.medium().fail_sync = Some(syncs + 1);
    assert!(matches!(commit(&journal, 6, true), Err(ApplyError::Journal(JournalError::Failed(_)))));
    disk.medium().fail_sync = None;
    assert!(matches!(commit(&journal, 7, true), Err(ApplyError::Journal(JournalError::FailedBefore))));
    assert!(matches!(journal.rows::<(u64, String)>(""), Err(JournalError::FailedBefore)));
    drop(journal);
    let bytes = disk.medium().bytes.clone();
    let again = Journal::open_on(Disk::of(bytes), &options()).expect("what is on the medium is whole");
    let found = state(&again);
    assert!(found == expected(5) || found == expected(6), "{found:?}");
}

#[test]
fn a_flipped_bit_is_refused_or_harmless() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("journal.redb");
    let journal = Journal::open(&path, &options()).expect("a new journal opens");
    for step in 1..=40 {
        commit(&journal, step, true).expect("commits");
    }
    drop(journal);
    let good = fs::read(&path).expect("the file is read");
    let mut random = Random(0x1234_5678_9abc_def1);
    let used: Vec<usize> = (0..good.len()).filter(|at| good[*at] != 0).collect();
    let (mut refused, mut harmless) = (0, 0);
    for round in 0..(250 * scale()) {
        // The header's pages, where the roots are, more often than their share.
        let at =
            if round % 5 == 0 { (random.next() % 512) as usize } else { used[random.next() as usize % used.len()] };
        let mut bytes = good.clone();
        bytes[at] ^= 1 << (random.next() % 8);
        match Journal::open_on(Disk::of(bytes), &options()) {
            Err(OpenError::Damaged { .. }) => refused += 1,
            Err(error) => panic!("byte {at}: {error}"),
            Ok(journal) => {
                assert_eq!(state(&journal), expected(40), "byte {at}: damage was not noticed");
                harmless += 1;
            }
        }
    }
    println!("{refused} refused, {harmless} harmless");
    assert!(refused > 0);
}

#[test]
fn a_missing_swapped_or_older_journal_is_refused() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("journal.redb");
    let open = |owner: &str| Journal::open(&path, &Options { owner: owner.to_owned(), ..options() });
    let journal = open("worker-1").expect("a new journal opens");
    commit(&journal, 1, true).expect("commits");
    assert!(matches!(open("worker-1"), Err(OpenError::InUse { .. })));
    drop(journal);
    let backup = fs::read(&path).expect("the file is read");

    drop(open("worker-1").expect("it opens again"));
    fs::write(&path, &backup).expect("the backup is put back");
    assert!(matches!(open("worker-1"), Err(OpenError::Older { expected: 2, found: 1, .. })));

    fs::remove_file(&path).expect("it is removed");
    assert!(matches!(open("worker-1"), Err(OpenError::Gone { .. })));
    assert!(!path.exists(), "a refusal leaves no new journal behind");

    let elsewhere = directory.path().join("other.redb");
    drop(Journal::open(&elsewhere, &options()).expect("another new journal opens"));
    fs::copy(&elsewhere, &path).expect("it is copied");
    let Err(error @ OpenError::Replaced { .. }) = open("worker-1") else { panic!("a swapped journal was opened") };
    assert!(error.to_string().contains("is not the one that belongs here"), "{error}");

    fs::remove_file(directory.path().join("journal.redb.guard")).expect("the operator accepts it");
    drop(open("worker-1").expect("it opens"));
    assert!(matches!(open("worker-2"), Err(OpenError::Replaced { .. })));

    fs::write(&path, b"no journal at all, but bytes").expect("it is written");
    assert!(matches!(open("worker-1"), Err(OpenError::Damaged { .. })));
}

#[test]
fn a_newer_schema_is_refused_and_an_older_one_raised() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("journal.redb");
    let open = |schema| Journal::open(&path, &Options { schema, ..options() });
    drop(open(1).expect("a new journal opens"));
    drop(open(2).expect("a newer version opens it"));
    assert!(matches!(open(1), Err(OpenError::Newer { found: 2, known: 1, .. })));
}

#[test]
fn a_refused_step_changes_nothing() {
    let journal = Journal::open_on(Disk::default(), &options()).expect("a new journal opens");
    commit(&journal, 1, true).expect("commits");
    let refused =
        journal.apply("machine/m1", |row: Option<(u64, String)>| Err::<Change<(u64, String), ()>, _>(row.is_some()));
    assert!(matches!(refused, Err(ApplyError::Denied(true))));
    assert_eq!(state(&journal), expected(1));
    assert_eq!(journal.last_seq(), 1);
}

#[test]
fn rows_go_and_the_log_keeps_its_limit() {
    let journal =
        Journal::open_on(Disk::default(), &Options { log_max: 10, ..options() }).expect("a new journal opens");
    for step in 1..=25 {
        commit(&journal, step, false).expect("commits");
    }
    let lines = journal.log(0, 100).expect("lines are read");
    assert_eq!(lines.iter().map(|line| line.seq).collect::<Vec<_>>(), (16..=25).collect::<Vec<_>>());
    assert_eq!(journal.log(23, 1).expect("lines are read")[0].event, "step 24");
    let remove = |_: Option<(u64, String)>| {
        Ok::<_, std::convert::Infallible>(Change {
            row: Write::Remove,
            durable: true,
            log: None,
            points: None,
            then: (),
        })
    };
    journal.apply("machine/m3", remove).expect("it is removed");
    assert_eq!(journal.row::<(u64, String)>("machine/m3").expect("it is read"), None);
    assert_eq!(journal.rows::<(u64, String)>("machine/").expect("rows are read").len(), 6);
}

#[test]
fn many_small_steps_do_not_grow_the_file() {
    let directory = tempfile::tempdir().expect("a directory");
    let path = directory.path().join("journal.redb");
    let journal = Journal::open(&path, &Options { log_max: 50, ..options() }).expect("a new journal opens");
    let size = |path: &Path| fs::metadata(path).expect("it is there").len();
    (1..=200).for_each(|step| commit(&journal, step, false).expect("commits"));
    let before = size(&path);
    (201..=3_000).for_each(|step| commit(&journal, step, false).expect("commits"));
    let after = size(&path);
    println!("{before} bytes after 200 steps that need not be durable, {after} after 3,000");
    assert!(after <= before.max(1 << 20) * 2, "{before} -> {after}");
}

#[test]
fn commits_are_quick() {
    let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).expect("a directory");
    let path = directory.path().join("journal.redb");
    let journal = Journal::open(&path, &options()).expect("a new journal opens");
    let median = |durable: bool| {
        let mut times: Vec<_> = (1..=40u64)
            .map(|step| {
                let started = std::time::Instant::now();
                commit(&journal, step, durable).expect("commits");
                started.elapsed()
            })
            .collect();
        times.sort();
        times[20]
    };
    let (durable, lazy) = (median(true), median(false));
    println!("median commit: {durable:?} durable, {lazy:?} not");
}
