//! libiscsi's conformance tests against `decant export --iscsi`: no failure, and no skip but of what is not offered. The same
//! suites against tgt are run beside it, and what came of them is printed.

mod tool;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use tool::{Tool, directory, disk, run, run_for, text, wait_until};

/// Fewer than 65,536 blocks of 512 bytes: iscsi-test-cu moves that many in one command otherwise.
const SIZE: u64 = 60_000 * 512;

/// A suite that does not end by then hangs; the slowest takes 10 s by itself, since it waits for answers that must not come.
const SUITE_SECONDS: u32 = 60;

/// As long for tgt, of which one suite does not end.
const TGT_SECONDS: u32 = 15;

/// Skips that are allowed: suite, test (`*`: any), words of the reason, and why it is right.
const SKIPS: &[(&str, &str, &str, &str)] = &[
    ("CompareAndWrite", "*", "COMPAREANDWRITE is not implemented", "not offered"),
    ("ExtendedCopy", "*", "EXTENDEDCOPY is not implemented", "not offered: it could name other disks"),
    ("ExtendedCopy", "DescrLimits", "RECEIVECOPYRESULT is not implemented", "part of EXTENDED COPY"),
    ("ReceiveCopyResults", "*", "RECEIVECOPYRESULT is not implemented", "part of EXTENDED COPY"),
    ("OrWrite", "*", "ORWRITE is not implemented", "not offered"),
    ("Prefetch10", "*", "PREFETCH10 is not implemented", "not offered"),
    ("Prefetch16", "*", "PREFETCH16 is not implemented", "not offered"),
    ("ReadDefectData10", "*", "READDEFECTDATA10 is not implemented", "a file has no defect list"),
    ("ReadDefectData12", "*", "READDEFECTDATA12 is not implemented", "a file has no defect list"),
    ("WriteAtomic16", "*", "WRITEATOMIC16 is not implemented", "not offered"),
    ("Sanitize", "*", "SANITIZE is not implemented", "not offered"),
    ("Sanitize", "*", "is not implemented according to REPORT_SUPPORTED_OPCODES", "not offered"),
    ("PrinReadKeys", "*", "PERSISTENT RESERVE IN is not implemented", "persistent reservations are not offered"),
    ("PrinReadKeys", "*", "PROUT Not Supported", "persistent reservations are not offered"),
    ("PrinServiceactionRange", "*", "PERSISTENT RESERVE IN is not implemented", "as above"),
    ("PrinReportCapabilities", "*", "PROUT Not Supported", "as above"),
    ("ProutRegister", "*", "PROUT Not Supported", "as above"),
    ("ProutReserve", "*", "PROUT Not Supported", "as above"),
    ("ProutClear", "*", "PROUT Not Supported", "as above"),
    ("ProutPreempt", "*", "PROUT Not Supported", "as above"),
    ("PreventAllow", "*", "Logical unit is not removable", "no removable medium"),
    ("StartStopUnit", "Simple", "Media is not removable", "no removable medium"),
    ("NoMedia", "*", "Logical unit is not removable", "no removable medium"),
    ("MultipathIO", "*", "Multipath unavailable", "one path"),
    ("ReadOnly", "*", "Logical unit is not write-protected", "runs against the read-only target"),
    (
        "ReadOnly",
        "*",
        "COMPAREANDWRITE is not implemented",
        "all others of its writes were refused before it came to this",
    ),
];

/// Suites that a read-only target passes as a writable one does.
const READ_ONLY_SUITES: &[&str] = &[
    "ReadOnly",
    "Inquiry",
    "Mandatory",
    "Read6",
    "Read10",
    "Read12",
    "Read16",
    "ReadCapacity10",
    "ReadCapacity16",
    "ReportSupportedOpcodes",
    "TestUnitReady",
];

/// Tests that must really have run: all 230 of libiscsi 1.19 without those that [`SKIPS`] names.
const LEAST_RUN: usize = 150;
const LEAST_RUN_READ_ONLY: usize = 36;

#[derive(Debug, Default)]
struct Tally {
    run: usize,
    skipped: BTreeMap<String, usize>,
    wrong: Vec<String>,
}

/// What one suite's output says: for each test `Test: NAME ...`, then words, then `passed` or `FAILED`.
fn count(suite: &str, output: &str, tally: &mut Tally) {
    let mut tests = 0;
    for part in output.split("  Test: ").skip(1) {
        tests += 1;
        let name = part.split_whitespace().next().unwrap_or_default();
        // What follows the verdict belongs to the clean-up after the last test.
        let (words, passed) = match (part.find("passed"), part.find("FAILED\n")) {
            (Some(at), failed) if failed.is_none_or(|failed| at < failed) => (&part[..at], true),
            (_, Some(at)) => (&part[..at], false),
            _ => (part, false),
        };
        if !passed {
            tally.wrong.push(format!("{suite}.{name} failed: {part}"));
        } else if let Some((_, reason)) = words.split_once("[SKIPPED]") {
            let reason = reason.trim();
            let allowed = |(s, t, words, _): &&(&str, &str, &str, &str)| {
                *s == suite && (*t == "*" || *t == name) && reason.contains(words)
            };
            match SKIPS.iter().find(allowed) {
                Some((suite, _, words, _)) => *tally.skipped.entry(format!("{suite}: {words}")).or_default() += 1,
                None => tally.wrong.push(format!("{suite}.{name} was skipped: {reason}")),
            }
        } else {
            tally.run += 1;
        }
    }
    if tests == 0 {
        tally.wrong.push(format!("{suite} has run no test: {output}"));
    }
}

fn suites() -> Vec<String> {
    let list = text(&run(10, "iscsi-test-cu", &["--list"]));
    let suites = list.lines().filter_map(|line| line.strip_prefix("ALL."));
    suites.filter(|suite| !suite.contains('.')).map(str::to_owned).collect()
}

fn run_suite(suite: &str, url: &str, tally: &mut Tally) {
    let test = format!("--test=ALL.{suite}");
    let arguments = ["--dataloss", "--allow-sanitize", &test, url];
    match run_for(SUITE_SECONDS, "iscsi-test-cu", &arguments) {
        Some(output) => count(suite, &text(&output), tally),
        None => tally.wrong.push(format!("{suite} did not end within {SUITE_SECONDS} s")),
    }
}

fn judge(tally: &Tally, least: usize) {
    let skipped: usize = tally.skipped.values().sum();
    println!("iscsi-test-cu: {} run, {} failed, {skipped} skipped: {:#?}", tally.run, tally.wrong.len(), tally.skipped);
    assert!(tally.wrong.is_empty(), "{}", tally.wrong.join("\n"));
    assert!(tally.run >= least, "only {} tests have run, {least} must", tally.run);
}

fn export(directory: &std::path::Path, name: &str, size: u64, more: &[&str]) -> (Tool, String) {
    let disk = disk(directory, name, size);
    let source = disk.to_str().expect("text");
    let tool = Tool::start(&[&["export", source, "--iscsi", "127.0.0.1:0"], more].concat());
    let uri = tool.fact("uri");
    (tool, uri)
}

#[test]
fn a_writable_target_passes_every_suite() {
    let directory = directory();
    let (_fine, fine) = export(directory.path(), "fine", SIZE, &[]);
    // GetLBAStatus asks at LBAs inside of a physical block and expects answers about its end: only where blocks are as large
    // as the medium's, here because the size is no multiple of those, does it agree with itself.
    let (_flat, flat) = export(directory.path(), "flat", SIZE - 512, &[]);
    let mut tally = Tally::default();
    for suite in suites() {
        run_suite(&suite, if suite == "GetLBAStatus" { &flat } else { &fine }, &mut tally);
    }
    judge(&tally, LEAST_RUN);
}

#[test]
fn a_target_with_large_blocks_and_digests_passes_what_moves_data() {
    let directory = directory();
    let (_large, large) = export(directory.path(), "large", 16_384 * 4096, &["--block-size", "4096"]);
    // libiscsi knows no digests of data.
    let large = format!("{large}?header_digest=crc32c");
    let mut tally = Tally::default();
    for suite in
        ["Read10", "Read16", "Write10", "Write16", "Unmap", "Verify16", "WriteVerify16", "iSCSITMF", "GetLBAStatus"]
    {
        run_suite(suite, &large, &mut tally);
    }
    judge(&tally, 44);
}

#[test]
fn a_read_only_target_passes_what_reads() {
    let directory = directory();
    let (_tool, url) = export(directory.path(), "read-only", SIZE, &["--read-only"]);
    let mut tally = Tally::default();
    for suite in READ_ONLY_SUITES {
        run_suite(suite, &url, &mut tally);
    }
    judge(&tally, LEAST_RUN_READ_ONLY);
}

/// tgt serving a file, ended by its id.
struct Tgt(Child);

impl Drop for Tgt {
    fn drop(&mut self) {
        // It takes no notice of SIGTERM while it has sessions.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Where `cargo xtask test` unpacked it, or else as Debian installs it.
fn program(name: &str) -> PathBuf {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/peers/bin").join(name);
    if unpacked.is_file() { unpacked } else { Path::new("/usr/sbin").join(name) }
}

fn tgt(directory: &Path) -> (Tgt, String) {
    let (name, disk) = ("iqn.2026-11.dev.decant:peer", disk(directory, "tgt", SIZE));
    // A free port, and a control socket of our own: another tgtd may run here.
    let listener = std::net::TcpListener::bind("127.0.0.1:0").expect("a free port");
    let port = listener.local_addr().expect("bound").port();
    drop(listener);
    let (control, socket) = ((port % 30_000 + 100).to_string(), directory.join("tgt.sock"));
    let tgtd = Command::new(program("tgtd"))
        .args(["-f", "-C", &control, "--iscsi", &format!("portal=127.0.0.1:{port}")])
        .env("TGT_IPC_SOCKET", &socket)
        .stdout(Stdio::null())
        .stderr(Stdio::null())
        .spawn()
        .expect("tgtd is not here: `cargo xtask test` unpacks it");
    let tgt = Tgt(tgtd);
    let ask = |arguments: &[&str]| {
        let mut command = Command::new("timeout");
        command.arg("10").arg(program("tgtadm")).args(["-C", &control, "--lld", "iscsi", "--mode"]).args(arguments);
        command.env("TGT_IPC_SOCKET", &socket).output().expect("timeout starts").status.success()
    };
    wait_until("tgtd answers", || ask(&["target", "--op", "show"]));
    assert!(ask(&["target", "--op", "new", "--tid", "1", "-T", name]));
    let disk = disk.to_str().expect("text");
    let thin = ["logicalunit", "--op", "update", "--tid", "1", "--lun", "1", "--params", "thin_provisioning=1"];
    assert!(ask(&["logicalunit", "--op", "new", "--tid", "1", "--lun", "1", "-b", disk]) && ask(&thin));
    assert!(ask(&["target", "--op", "bind", "--tid", "1", "-I", "ALL"]));
    (tgt, format!("iscsi://127.0.0.1:{port}/{name}/1"))
}

/// No verdict on tgt: its figures are beside ours, from the same tests on the same machine.
#[test]
fn what_tgt_makes_of_the_same_suites() {
    let directory = directory();
    let (_tgt, url) = tgt(directory.path());
    let (mut passed, mut failed, mut skipped, mut hung) = (0, 0, 0, Vec::new());
    for suite in suites() {
        let test = format!("--test=ALL.{suite}");
        let Some(output) = run_for(TGT_SECONDS, "iscsi-test-cu", &["--dataloss", "--allow-sanitize", &test, &url])
        else {
            hung.push(suite);
            continue;
        };
        for part in text(&output).split("  Test: ").skip(1) {
            match (part.contains("[SKIPPED]"), part.contains("FAILED\n")) {
                (_, true) => failed += 1,
                (true, false) => skipped += 1,
                (false, false) => passed += 1,
            }
        }
    }
    println!(
        "SHOW tgt with the same suites: {passed} passed, {failed} failed, {skipped} skipped; not ended within {TGT_SECONDS} s: {hung:?}"
    );
    assert!(passed > 0, "tgt was not asked");
}
