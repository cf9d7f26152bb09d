//! Every test, with one closing line: `N passed, N failed, N skipped`.

use std::fs::File;
use std::io::{BufRead, BufReader, Write};
use std::process::Stdio;
use std::sync::mpsc;

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

#[derive(Default)]
struct Tally {
    passed: u64,
    failed: u64,
    skipped: Vec<String>,
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
    let mut tally = Tally::default();
    let mut in_failures = false;
    for line in lines {
        writeln!(log, "{line}")?;
        tally.note(&line);
        in_failures = (in_failures || line == "failures:") && !line.starts_with("test result:");
        if in_failures || is_worth_showing(&line) {
            println!("{line}");
        }
    }
    for reader in readers {
        let _ = reader.join();
    }
    let status = child.wait()?;
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
        if let Some(skip) = line.trim_start().strip_prefix("SKIP ") {
            self.skipped.push(skip.to_owned());
            self.passed = self.passed.saturating_sub(1);
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
