//! The demo itself, small: the whole product in one run, and nothing left behind however it ends.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Output, Stdio};
use std::sync::{Mutex, MutexGuard, PoisonError};

use serde_json::Value;

/// Demos name their cgroups alike, so one runs at a time.
static ONE: Mutex<()> = Mutex::new(());

fn alone() -> MutexGuard<'static, ()> {
    ONE.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Whether this machine can run it; says why not.
fn can_run(test: &str) -> bool {
    let doctor = decant().args(["doctor", "--state-dir", "/var/tmp"]).output().expect("decant runs");
    if doctor.status.success() {
        return true;
    }
    let text = String::from_utf8_lossy(&doctor.stdout);
    let lacking: Vec<&str> = text.lines().filter(|line| line.contains(" missing ")).collect();
    assert!(!lacking.iter().any(|line| line.starts_with("e2fsprogs")), "install the package e2fsprogs: {text}");
    println!("SKIP {test}: {}", lacking.join("; "));
    false
}

fn decant() -> Command {
    Command::new(env!("CARGO_BIN_EXE_decant"))
}

fn demo(directory: &Path, arguments: &[&str]) -> Command {
    let mut command = decant();
    command.args(["demo", "--size", "256MiB", "--used", "24MiB", "--dir"]).arg(directory).args(arguments);
    command
}

fn run(directory: &Path, arguments: &[&str]) -> (Output, Value) {
    let report = directory.join("report.json");
    let output = demo(directory, arguments).arg("--report").arg(&report).output().expect("decant runs");
    let text = std::fs::read_to_string(&report).unwrap_or_default();
    let shown = format!("{}{}", String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
    assert!(output.status.success(), "{arguments:?}: {}\n{shown}", output.status);
    let json = serde_json::from_str(&text).unwrap_or_else(|error| panic!("{error}: {text}\n{shown}"));
    std::fs::remove_file(&report).expect("it is there");
    nothing_is_left(directory);
    (output, json)
}

/// No file, no loop device, no namespace, no process of a demo below `directory`.
fn nothing_is_left(directory: &Path) {
    let left: Vec<_> =
        std::fs::read_dir(directory).expect("it is there").flatten().map(|entry| entry.file_name()).collect();
    assert!(left.iter().all(|name| !name.to_string_lossy().starts_with("decant-demo-")), "{left:?}");
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").expect("it is there");
    let text = directory.to_string_lossy();
    assert!(!mounts.contains(text.as_ref()), "{mounts}");
    for entry in std::fs::read_dir("/proc").expect("it is there").flatten() {
        let line = std::fs::read_to_string(entry.path().join("cmdline")).unwrap_or_default();
        assert!(!line.contains(text.as_ref()) || line.contains("demo"), "{line:?} still runs");
    }
}

#[test]
fn a_drain_loses_nothing_and_leaves_nothing_behind() {
    let _alone = alone();
    if !can_run("a_drain_loses_nothing_and_leaves_nothing_behind") {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let ledger = tempfile::tempdir().expect("a temporary directory");
    let (_, report) = run(directory.path(), &["--moves", "2", "--ledger", &ledger.path().to_string_lossy()]);
    assert_eq!(
        (&report["writes_lost"], &report["writes_duplicated"], &report["wrong_reads"]),
        (&0.into(), &0.into(), &0.into())
    );
    let (moved, used) = (report["bytes_moved"].as_u64().unwrap_or(0), report["used_bytes"].as_u64().unwrap_or(0));
    assert!(used > 24 << 20 && moved as f64 <= used as f64 * 1.05 + f64::from(2 << 20), "{moved} of {used}");
    assert_eq!(report["source_header_bytes"], 16 << 20);
    assert_eq!(report["destination_header_bytes"], 4 << 20);
    assert!(report["discarded_bytes"].as_u64() > Some(32 << 20), "{report}");
    // Anyone can compare: the ledger's last order is in the copied database.
    let log = std::fs::read_to_string(ledger.path().join("acknowledged.jsonl")).expect("it is kept");
    let last: Value = serde_json::from_str(log.lines().last().expect("it has lines")).expect("it is JSON");
    let database = rusqlite::Connection::open(ledger.path().join("orders.db")).expect("it is kept");
    let reference: String = database
        .query_row("SELECT reference FROM orders WHERE id = ?1", [last["id"].as_i64()], |row| row.get(0))
        .expect("the row is there");
    assert_eq!(last["reference"], reference);
}

#[test]
fn a_lost_source_is_never_read_as_zeros() {
    let _alone = alone();
    if !can_run("a_lost_source_is_never_read_as_zeros") {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let (_, report) = run(directory.path(), &["--lose-source"]);
    assert_eq!(report["zero_reads"], 0);
    assert!(report["missing_bytes"].as_u64() > Some(0), "{report}");
    assert_eq!(report["cases"][0]["policy"], "wait");
    assert_eq!(report["cases"][1]["policy"], "eio");
    // Where they are, and no more than there are.
    let ranges = report["missing_ranges"].as_array().expect("a list");
    let sum: u64 = ranges.iter().map(|range| range["bytes"].as_u64().unwrap_or(0)).sum();
    assert!(sum > 0 && Some(sum) <= report["missing_bytes"].as_u64(), "{report}");
    assert!(ranges.iter().all(|range| range["start"].as_u64().is_some_and(|at| at < 256 << 20)), "{report}");
    // A machine that never gets whole is not there for ever.
    assert_eq!((&report["stopped"], &report["removed"]), (&true.into(), &true.into()));
}

#[test]
fn a_lost_destination_costs_what_was_written_since_the_seal() {
    let _alone = alone();
    if !can_run("a_lost_destination_costs_what_was_written_since_the_seal") {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let (output, report) = run(directory.path(), &["--lose-destination", "-o", "json"]);
    let shown: Value = serde_json::from_slice(&output.stdout).expect("the output is the report and nothing else");
    assert_eq!(shown, report);
    assert_eq!(report["writes_lost_before_seal"], 0);
    assert!(report["writes_lost"].as_u64() > Some(0), "{report}");
}

#[test]
fn a_comparison_loses_nothing_by_the_clone_and_writes_by_the_copy_of_what_runs() {
    let _alone = alone();
    if !can_run("a_comparison_loses_nothing_by_the_clone_and_writes_by_the_copy_of_what_runs") {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let (_, report) = run(directory.path(), &["--compare"]);
    for order in ["kill_clone_boot", "kill_copy_boot"] {
        assert_eq!((&report[order]["writes_lost"], &report[order]["writes_duplicated"]), (&0.into(), &0.into()));
        assert!(report[order]["writes_acknowledged"].as_u64() > Some(0), "{report}");
    }
    assert!(report["copy_boot_kill"]["writes_lost"].as_u64() > Some(0), "{report}");
}

#[test]
fn what_is_kept_can_be_used_and_removed() {
    let _alone = alone();
    if !can_run("what_is_kept_can_be_used_and_removed") {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    let output = demo(directory.path(), &["--keep", "-o", "json"]).output().expect("decant runs");
    let shown = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{output:?}");
    let report: Value = serde_json::from_slice(&output.stdout).expect("the output is the report and nothing else");
    assert_eq!(report["writes_lost"], 0);
    let word = |after: &str| {
        let rest = shown.split_once(after).unwrap_or_else(|| panic!("{after:?} in {shown}")).1;
        rest.split_whitespace().next().expect("a word").to_owned()
    };
    // As the demo says it: the socket in the environment, then the removal.
    let (socket, kept) = (word("DECANT_SOCKET="), word("demo --clean "));
    let list = decant().env("DECANT_SOCKET", &socket).args(["machine", "list", "-o", "json"]).output();
    let list: Value = serde_json::from_slice(&list.expect("decant runs").stdout).expect("JSON");
    assert!(
        list["items"].as_array().is_some_and(|items| items.iter().any(|item| item["machine"] == "orders")),
        "{list}"
    );
    let clean = || decant().env("DECANT_SOCKET", &socket).args(["demo", "--clean", &kept, "-o", "json"]).output();
    let cleaned = clean().expect("decant runs");
    assert!(cleaned.status.success(), "{cleaned:?}");
    let removed: Value = serde_json::from_slice(&cleaned.stdout).expect("JSON");
    assert_eq!(removed["removed"].as_str(), Some(kept.as_str()));
    nothing_is_left(directory.path());
    let again = clean().expect("decant runs");
    assert_eq!(again.status.code(), Some(1), "it is gone: {again:?}");
    let body: Value = serde_json::from_slice(&again.stderr).expect("with -o json a failure is JSON");
    assert!(body["cause"].as_str().is_some_and(|cause| cause.contains("there is no demo called")), "{body}");
}

#[test]
fn ctrl_c_and_kill_leave_nothing_behind() {
    let _alone = alone();
    if !can_run("ctrl_c_and_kill_leave_nothing_behind") {
        return;
    }
    let directory = tempfile::tempdir_in("/var/tmp").expect("a temporary directory");
    // Killed: it cannot clear, the next run does.
    let mut killed = up(directory.path());
    killed.kill().expect("it runs");
    killed.wait().expect("it is dead");
    let interrupted = up(directory.path());
    let pid = rustix::process::Pid::from_child(&interrupted);
    rustix::process::kill_process(pid, rustix::process::Signal::INT).expect("it runs");
    let output = interrupted.wait_with_output().expect("it ends");
    assert_eq!(output.status.code(), Some(5), "{output:?}");
    nothing_is_left(directory.path());
}

/// A demo whose workers are up.
fn up(directory: &Path) -> Child {
    let mut child = demo(directory, &[]).stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("decant runs");
    let out = BufReader::new(child.stdout.as_mut().expect("a pipe"));
    let line = out.lines().map_while(Result::ok).find(|line| line.contains("workers are up"));
    assert!(line.is_some(), "the workers do not come up: {:?}", child.wait_with_output());
    child
}
