//! libiscsi's conformance tests against the target: no failure, and no skip but of what is not offered.

mod support;
mod target_server;

use std::collections::BTreeMap;

use support::{Fixture, Shape, run, serve, text};

/// A suite that does not end by then hangs; the slowest takes 10 s by itself, since it waits for answers that must not come.
const SUITE_SECONDS: u32 = 60;

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

fn run_suite(suite: &str, fixture: &Fixture, tally: &mut Tally) {
    let test = format!("--test=ALL.{suite}");
    let output = run(SUITE_SECONDS, "iscsi-test-cu", &["--dataloss", "--allow-sanitize", &test, &fixture.url("")]);
    count(suite, &text(&output), tally);
}

fn judge(tally: &Tally, least: usize) {
    let skipped: usize = tally.skipped.values().sum();
    println!("iscsi-test-cu: {} run, {} failed, {skipped} skipped: {:#?}", tally.run, tally.wrong.len(), tally.skipped);
    assert!(tally.wrong.is_empty(), "{}", tally.wrong.join("\n"));
    assert!(tally.run >= least, "only {} tests have run, {least} must", tally.run);
}

#[test]
fn a_writable_target_passes_every_suite() {
    let fine = serve(&Shape::default());
    // GetLBAStatus asks at LBAs inside of a physical block and expects answers about its end: only with blocks as large as
    // the medium's does it agree with itself.
    let flat = serve(&Shape { physical_exponent: 0, ..Shape::default() });
    let mut tally = Tally::default();
    for suite in suites() {
        run_suite(&suite, if suite == "GetLBAStatus" { &flat } else { &fine }, &mut tally);
    }
    judge(&tally, LEAST_RUN);
}

#[test]
fn a_target_with_large_blocks_and_digests_passes_what_moves_data() {
    let large = serve(&Shape {
        block_bytes: 4096,
        physical_exponent: 0,
        blocks: 16_384,
        digests: decant_iscsi::login::DigestPolicy::Preferred,
        workers: 0,
        ..Shape::default()
    });
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
    let fixture = serve(&Shape { read_only: true, ..Shape::default() });
    let mut tally = Tally::default();
    for suite in READ_ONLY_SUITES {
        run_suite(suite, &fixture, &mut tally);
    }
    judge(&tally, LEAST_RUN_READ_ONLY);
}
