//! The ledger against fake histories: each kind of fault is found, and a good history is clean.

use super::*;
use crate::demo::store::{NewOrder, Store};

fn write(n: u64) -> Acknowledged {
    Acknowledged {
        key: format!("k-{n}"),
        reference: format!("r-{n}"),
        quantity: 1 + n as i64 % 9,
        id: 1 + n as i64,
        sent_ns: n * 1000,
        acknowledged_ns: n * 1000 + 500,
        tries: 1,
    }
}

fn row(n: u64) -> Row {
    let Acknowledged { key, reference, quantity, id, .. } = write(n);
    Row { id, key, reference, quantity }
}

fn history() -> (Vec<Acknowledged>, Vec<Row>) {
    ((0..100).map(write).collect(), (0..100).map(row).collect())
}

#[test]
fn a_good_history_is_clean() {
    let (writes, rows) = history();
    let verdict = compare(&writes, &rows, "r-", 100);
    assert!(verdict.is_clean(), "{verdict:?}");
    assert_eq!(verdict.acknowledged, 100);
}

#[test]
fn an_order_sent_and_never_acknowledged_may_be_there() {
    let (mut writes, rows) = history();
    writes.pop();
    assert!(compare(&writes, &rows, "r-", 100).is_clean());
}

#[test]
fn a_lost_write_is_found() {
    let (writes, mut rows) = history();
    rows.remove(41);
    let verdict = compare(&writes, &rows, "r-", 100);
    assert_eq!((verdict.lost, verdict.duplicated, verdict.invented), (1, 0, 0));
    assert!(verdict.examples[0].contains("r-41"), "{:?}", verdict.examples);
}

#[test]
fn a_changed_write_is_lost() {
    let (writes, mut rows) = history();
    rows[7].quantity += 1;
    assert_eq!(compare(&writes, &rows, "r-", 100).lost, 1);
}

#[test]
fn a_write_under_another_row_than_acknowledged_is_lost() {
    // This is what a fork shows: the new owner reuses the row number for another order.
    let (writes, mut rows) = history();
    rows[99].id = 500;
    assert_eq!(compare(&writes, &rows, "r-", 100).lost, 1);
}

#[test]
fn a_duplicate_is_found_even_under_another_key() {
    let (writes, mut rows) = history();
    rows.push(Row { id: 101, key: "k-other".into(), ..row(3) });
    let verdict = compare(&writes, &rows, "r-", 100);
    assert_eq!((verdict.lost, verdict.duplicated), (0, 1));
}

#[test]
fn a_row_that_nobody_sent_is_found() {
    let (writes, mut rows) = history();
    rows.push(row(100));
    assert_eq!(compare(&writes, &rows, "r-", 100).invented, 1);
}

#[test]
fn the_database_file_is_read_as_sqlite_reads_it() {
    let directory = tempfile::tempdir().expect("a temporary directory");
    let (live, copy) = (directory.path().join("orders.db"), directory.path().join("copy.db"));
    Store::create(&live, decant_base::Bytes(64 << 10)).expect("it is made");
    let store = Store::open(&live).expect("it opens");
    let runtime = tokio::runtime::Builder::new_current_thread().build().expect("a runtime");
    let mut writes = Vec::new();
    for n in 0..20_u64 {
        let order = NewOrder { reference: format!("r-{n}"), item: "cask".into(), quantity: 1, note: String::new() };
        let (stored, new) = runtime.block_on(store.insert(format!("k-{n}"), order.clone())).expect("it is stored");
        assert!(new);
        let (again, new) = runtime.block_on(store.insert(format!("k-{n}"), order)).expect("it is found");
        assert!(!new, "a replay stores nothing");
        assert_eq!(stored, again);
        writes.push(Acknowledged { id: stored.id, quantity: 1, ..write(n) });
    }
    // The copy is taken while the service still has the database open and its log holds the last rows.
    copy_database(&live, &copy).expect("it is copied");
    let rows = read_rows(&copy, "r-").expect("it is read");
    let verdict = compare(&writes, &rows, "r-", 20);
    assert!(verdict.is_clean() && rows.len() == 20, "{verdict:?}");
    store.close(std::time::Duration::from_millis(5));
}
