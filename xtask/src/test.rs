//! Every test, with one closing line: `N passed, N failed, N skipped`.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};

/// What to run.
#[derive(clap::Args, Default)]
pub(crate) struct Options {
    /// Only tests of this crate.
    #[arg(short, long)]
    package: Option<String>,
    /// Only tests whose name contains this.
    filter: Option<String>,
}

/// So many of the programs that took longest are named at the end.
const SLOWEST: usize = 10;

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: Vec<String>,
    /// Those of the program that runs now: a test that says more than once why it cannot run is one.
    skipped_here: Vec<String>,
}

/// How long the build and each program of tests took.
struct Times {
    began: Instant,
    /// What runs, and since when.
    now: (String, Instant),
    done: Vec<(String, Duration)>,
}

/// Installs the peers, builds, and runs the tests with `cargo test`. The whole output is kept in target/test.log.
pub(crate) fn run(options: &Options) -> anyhow::Result<()> {
    crate::peers::ensure()?;
    let mut command = crate::cargo();
    command.args(["test", "--locked", "--no-fail-fast"]);
    match &options.package {
        Some(package) => command.args(["--package", package]),
        None => command.arg("--workspace"),
    };
    command.args(["--", "--show-output"]);
    command.args(&options.filter);
    command.stdout(Stdio::piped()).stderr(Stdio::piped());
    let mut child = command.spawn().context("cannot start cargo test")?;
    let (sender, lines) = mpsc::channel();
    let (out, err) = (child.stdout.take().expect("piped"), child.stderr.take().expect("piped"));
    let readers = [forward(out, sender.clone()), forward(err, sender)];
    let log_path = crate::root().join("target/test.log");
    std::fs::create_dir_all(crate::root().join("target"))?;
    let mut log = File::create(&log_path).with_context(|| format!("cannot write {}", log_path.display()))?;
    let (mut tally, mut times) = (Tally::default(), Times::start(Instant::now()));
    let mut in_failures = false;
    for line in lines {
        writeln!(log, "{line}")?;
        tally.note(&line);
        times.note(&line, Instant::now());
        in_failures = (in_failures || line == "failures:") && !line.starts_with("test result:");
        if in_failures || is_worth_showing(&line) {
            println!("{line}");
        }
    }
    for reader in readers {
        let _ = reader.join();
    }
    let status = child.wait()?;
    println!("{}", times.report(Instant::now()));
    for skip in &tally.skipped {
        println!("could not run here: {skip}");
    }
    println!("full output: {}", log_path.strip_prefix(crate::root()).unwrap_or(&log_path).display());
    println!("{} passed, {} failed, {} skipped", tally.passed, tally.failed, tally.skipped.len());
    if !status.success() || tally.failed > 0 {
        bail!("tests failed");
    }
    if tally.passed == 0 {
        bail!("no test ran");
    }
    Ok(())
}

fn forward(from: impl std::io::Read + Send + 'static, to: mpsc::Sender<String>) -> std::thread::JoinHandle<()> {
    std::thread::spawn(move || {
        for line in BufReader::new(from).split(b'\n').map_while(Result::ok) {
            if to.send(String::from_utf8_lossy(&line).into_owned()).is_err() {
                return;
            }
        }
    })
}

fn is_worth_showing(line: &str) -> bool {
    let line = line.trim_start();
    ["Running ", "Doc-tests ", "Compiling decant", "test result:", "error", "warning", "SKIP ", "SHOW "]
        .iter()
        .any(|start| line.starts_with(start))
        || (line.starts_with("test ") && line.ends_with("FAILED"))
}

impl Tally {
    /// A test that this machine cannot run prints `SKIP <test>: <why>` and returns, so the harness counts it as passed.
    fn note(&mut self, line: &str) {
        if program(line).is_some() {
            self.skipped_here.clear();
        }
        if let Some(skip) = line.trim_start().strip_prefix("SKIP ") {
            let test = skip.split(':').next().unwrap_or_default().to_owned();
            if !self.skipped_here.contains(&test) {
                self.skipped_here.push(test);
                self.skipped.push(skip.to_owned());
                self.passed = self.passed.saturating_sub(1);
            }
        }
        let Some(result) = line.strip_prefix("test result: ") else { return };
        let count = |what: &str| -> u64 {
            let words: Vec<&str> = result.split([' ', ';', '.']).filter(|word| !word.is_empty()).collect();
            words.windows(2).find(|pair| pair[1] == what).and_then(|pair| pair[0].parse().ok()).unwrap_or(0)
        };
        self.passed += count("passed");
        self.failed += count("failed");
    }
}

/// The program of tests that a line of cargo's says is started now, e.g. `crash_sweep (tests/crash_sweep.rs)`.
fn program(line: &str) -> Option<String> {
    let line = line.trim_start();
    if let Some(name) = line.strip_prefix("Doc-tests ") {
        return Some(format!("{name} (doc-tests)"));
    }
    let (source, file) = line.strip_prefix("Running ")?.strip_suffix(')')?.split_once(" (")?;
    // target/debug/deps/NAME-HASH
    let name = file.rsplit('/').next()?.rsplit_once('-')?.0;
    Some(format!("{name} ({})", source.trim_start_matches("unittests ")))
}

impl Times {
    /// The first thing that takes time is the build.
    fn start(now: Instant) -> Self {
        Self { began: now, now: ("build".to_owned(), now), done: Vec::new() }
    }

    fn note(&mut self, line: &str, now: Instant) {
        if let Some(name) = program(line) {
            self.end(name, now);
        }
    }

    fn end(&mut self, next: String, now: Instant) {
        let (name, since) = std::mem::replace(&mut self.now, (next, now));
        self.done.push((name, now.duration_since(since)));
    }

    /// The build, the programs that took longest, and the sum.
    fn report(&mut self, now: Instant) -> String {
        self.end(String::new(), now);
        let seconds = |time: &Duration| format!("{:6.1} s", time.as_secs_f64());
        let (build, tests) = self.done.split_first().expect("the build has ended");
        let mut slowest: Vec<_> = tests.iter().collect();
        slowest.sort_by_key(|(_, time)| std::cmp::Reverse(*time));
        let mut lines = vec![format!("{}  {}", seconds(&build.1), build.0)];
        lines.extend(slowest.iter().take(SLOWEST).map(|(name, time)| format!("{}  {name}", seconds(time))));
        let others: Duration = slowest.iter().skip(SLOWEST).map(|(_, time)| *time).sum();
        lines.push(format!("{}  {} others", seconds(&others), slowest.len().saturating_sub(SLOWEST)));
        lines.push(format!("{}  in all", seconds(&now.duration_since(self.began))));
        lines.join("\n")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_line_of_cargo_names_the_program() {
        let named = [
            (
                "     Running unittests src/lib.rs (target/debug/deps/decant_base-0f3a)",
                Some("decant_base (src/lib.rs)"),
            ),
            ("     Running tests/orders.rs (target/debug/deps/orders-77)", Some("orders (tests/orders.rs)")),
            ("   Doc-tests decant_nbd", Some("decant_nbd (doc-tests)")),
            ("Running a machine", None),
            ("test a ... ok", None),
        ];
        for (line, name) in named {
            assert_eq!(program(line).as_deref(), name, "{line}");
        }
    }

    #[test]
    fn a_test_that_cannot_run_is_counted_once() {
        let mut tally = Tally::default();
        for line in [
            "     Running tests/a.rs (target/debug/deps/a-1)",
            "test result: ok. 3 passed; 0 failed; 0 ignored",
            "SKIP one: no root",
            "SKIP one: no disk",
            "     Running tests/b.rs (target/debug/deps/b-1)",
            "SKIP one: no root",
            "test result: ok. 1 passed; 0 failed; 0 ignored",
        ] {
            tally.note(line);
        }
        assert_eq!((tally.passed, tally.skipped.len()), (2, 2));
    }

    #[test]
    fn the_slowest_are_named_and_the_sum_is_of_all() {
        let began = Instant::now();
        let at = |seconds| began + Duration::from_secs(seconds);
        let mut times = Times::start(began);
        times.note("Running tests/a.rs (target/debug/deps/a-1)", at(5));
        times.note("Running tests/b.rs (target/debug/deps/b-1)", at(6));
        let report = times.report(at(16));
        let expected =
            ["   5.0 s  build", "  10.0 s  b (tests/b.rs)", "   1.0 s  a (tests/a.rs)", "   0.0 s  0 others"];
        assert_eq!(report.lines().collect::<Vec<_>>(), [&expected[..], &["  16.0 s  in all"]].concat());
    }
}
