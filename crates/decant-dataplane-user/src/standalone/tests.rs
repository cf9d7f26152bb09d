//! Clones of a file, started and ended in this process.

use std::net::TcpListener;
use std::sync::Barrier;
use std::time::Instant;

use super::*;

/// Far longer than anything here takes.
const PATIENCE: Duration = Duration::from_secs(20);

fn options(directory: &Path) -> (StandaloneOptions, Source) {
    let origin = directory.join("origin");
    std::fs::write(&origin, [7; 64 << 10]).unwrap();
    let options = StandaloneOptions {
        origin: origin.to_str().unwrap().into(),
        destination: directory.join("destination"),
        meta: directory.join("map"),
        serve: None,
        fuse: None,
        hydrate: false,
        limit: None,
        overwrite: false,
        moved: false,
    };
    (options, Source::File(origin))
}

fn start(options: &StandaloneOptions, source: &Source) -> Result<Standalone, StandaloneError> {
    Standalone::open(options)?.start(Some(source))
}

#[test]
fn a_start_that_fails_leaves_the_record_as_it_was() {
    let directory = tempfile::tempdir().unwrap();
    let (before, source) = options(directory.path());
    start(&before, &source).unwrap().close().unwrap();
    let record = || std::fs::read_to_string(beside(&before.meta, "origin")).unwrap();
    let recorded = record();

    let (other, taken) = (directory.path().join("other"), TcpListener::bind("127.0.0.1:0").unwrap());
    std::fs::copy(&before.origin, &other).unwrap();
    let serve = Some(Address::from(taken.local_addr().unwrap()));
    let moved = StandaloneOptions { origin: other.to_str().unwrap().into(), moved: true, ..before.clone() };
    let source = Source::File(other);
    let failed = start(&StandaloneOptions { serve, ..moved.clone() }, &source).map(|_| ());
    assert!(matches!(failed, Err(StandaloneError::Serve(_))), "{failed:?}");
    assert_eq!(record(), recorded);

    let clone = start(&moved, &source).unwrap();
    assert!(record().contains(&moved.origin), "{}", record());
    clone.close().unwrap();
    start(&StandaloneOptions { moved: false, ..moved }, &source).unwrap().close().unwrap();
}

#[test]
fn whoever_detaches_at_the_same_time_is_told_the_same() {
    const CALLERS: usize = 8;
    let directory = tempfile::tempdir().unwrap();
    let (options, source) = options(directory.path());
    let clone = start(&StandaloneOptions { hydrate: true, ..options.clone() }, &source).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while clone.status().is_some_and(|status| status.bytes_missing > 0) {
        assert!(Instant::now() < deadline, "not filled within {PATIENCE:?}");
        std::thread::yield_now();
    }
    let together = Barrier::new(CALLERS);
    std::thread::scope(|scope| {
        let detach = || {
            together.wait();
            clone.detach()
        };
        let callers: Vec<_> = (0..CALLERS).map(|_| scope.spawn(detach)).collect();
        callers.into_iter().for_each(|caller| caller.join().unwrap().unwrap());
    });
    assert!(clone.is_whole() && !options.meta.exists() && beside(&options.meta, "done").exists());
    clone.close().unwrap();
}
