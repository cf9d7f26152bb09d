//! Two real workers in network namespaces, one machine, and an oracle outside the product.
//!
//! The machine is a shell script on an encrypted volume. It takes a lock on a file that no worker knows of and says so if
//! another holds it; it appends a line to a log, syncs it, and only then acknowledges the line through a FIFO that this
//! process reads. At every start it checks that its log is whole and says how long it is.

#![allow(dead_code, unused_imports, reason = "each test file uses its part")]

mod acks;
mod worker;

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use decant_network::Lab;
use serde_json::Value;

pub(crate) use acks::Acks;
pub(crate) use worker::{Worker, wait_a_moment};

/// How long anything may take that takes a second at most on an idle machine.
pub(crate) const PATIENCE: Duration = Duration::from_secs(45);

/// The machine's and its volume's name.
pub(crate) const MACHINE: &str = "counter";

const RUNNER: &str = r#"
exec 8>/outside/acks
exec 9</outside/lock
if ! flock -n 9; then echo "two runners" >&8; exit 1; fi
cd /data || exit 1
# The shell takes a file that cannot be opened or read for an empty one; cat says so.
touch log && cat log > /tmp/log || { echo "failed at start" >&8; exit 1; }
n=0
while read -r line; do
    n=$((n+1))
    if [ "$line" != "$n" ]; then echo "torn at $n: $line" >&8; exit 1; fi
done < /tmp/log
echo "start $n" >&8
#at the start
while :; do
    n=$((n+1))
    echo "$n" >> log && sync -d log || { echo "failed at $n" >&8; exit 1; }
    echo "ack $n" >&8
    #after each line
    sleep 0.02
done
"#;

/// The whole of it.
pub(crate) struct Fleet {
    pub(crate) workers: Vec<Worker>,
    pub(crate) acks: Acks,
    // After the workers: their processes end before their namespaces and files go.
    pub(crate) lab: std::sync::Arc<Lab>,
    _directory: Directory,
}

/// Whether this machine can run a fleet; says why not, as `SKIP <test>: <why>`.
pub(crate) fn can_run(test: &str) -> bool {
    let why = if !rustix::process::geteuid().is_root() {
        "needs root"
    } else if !Path::new("/dev/fuse").exists() {
        "needs /dev/fuse"
    } else if !Path::new("/dev/loop-control").exists() {
        "needs loop devices"
    } else {
        return true;
    };
    println!("SKIP {test}: {why}");
    false
}

impl Fleet {
    /// Makes workers 1 and 2 with a fresh authority, worker 1 with 16 MiB headers and worker 2 with 4 MiB ones, and starts the
    /// machine with a volume of 64 MiB on worker 1.
    pub(crate) fn start(name: &str) -> Self {
        Self::start_with(name, "", "")
    }

    /// As [`Self::start`]; the machine's shell also does `at_start`, before its first line, and `after_each` of its lines.
    pub(crate) fn start_with(name: &str, at_start: &str, after_each: &str) -> Self {
        let directory = Directory::make(name);
        let lab = std::sync::Arc::new(Lab::create(name, 2).expect("network namespaces"));
        let script = RUNNER.replace("#at the start", at_start).replace("#after each line", after_each);
        let acks = Acks::listen(&directory.path, &script);
        run(decant().args(["ca", "init", "--dir"]).arg(&directory.path));
        let keys = directory.path.join("keys");
        std::fs::create_dir(&keys).expect("a directory for keys");
        let mut workers: Vec<Worker> = (1..=2).map(|index| Worker::make(index, &lab, &directory.path)).collect();
        for worker in &mut workers {
            worker.start_agent(&[]);
        }
        let mut fleet = Self { workers, acks, lab, _directory: directory };
        let outside = fleet.acks.directory().display().to_string();
        fleet.workers[0].decant(&["volume", "create", MACHINE, "--size", "64MiB"]).expect("a volume");
        let bind = format!("{outside}:/outside");
        let order = ["machine", "run", MACHINE, "--volume", MACHINE, "--bind", &bind, "--stop-timeout", "5s"];
        let script = ["--", "/bin/sh", "/outside/runner.sh"];
        fleet.workers[0].decant(&[&order[..], &script[..]].concat()).expect("a machine");
        fleet.acks.await_progress("after the first start");
        fleet
    }

    /// Waits until exactly one worker owns the machine and says it runs, no migration is under way anywhere and no copy is
    /// waited for; returns that worker's position.
    pub(crate) fn settle(&mut self, when: &str) -> usize {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let views: Vec<Result<View, String>> = self.workers.iter_mut().map(view).collect();
            let owners: Vec<usize> =
                (0..views.len()).filter(|&at| views[at].as_ref().is_ok_and(|view| view.runs)).collect();
            let quiet = views.iter().all(|view| view.as_ref().is_ok_and(|view| view.quiet));
            if let ([owner], true) = (&owners[..], quiet) {
                return *owner;
            }
            assert!(Instant::now() < deadline, "{when}: not settled within {PATIENCE:?}: {}", self.describe());
            self.acks.wait(Duration::from_millis(20));
        }
    }

    /// Waits until so many reads of the migration's volume wait at worker `at` for its source.
    pub(crate) fn await_parked(&mut self, at: usize, migration: &str, count: u64) {
        let path = format!("/v1/migrations/{migration}?scope=local");
        let deadline = Instant::now() + PATIENCE;
        loop {
            let seen = self.workers[at].api(&path);
            if seen.as_ref().is_ok_and(|view| view["progress"]["parked_reads"].as_u64() >= Some(count)) {
                return;
            }
            assert!(Instant::now() < deadline, "{count} reads do not wait: {seen:?}: {}", self.describe());
            self.acks.wait(Duration::from_millis(20));
        }
    }

    /// What the workers say, for a test that fails.
    pub(crate) fn describe(&mut self) -> String {
        let views: Vec<Result<View, String>> = self.workers.iter_mut().map(view).collect();
        let logs: Vec<String> = self.workers.iter().map(Worker::tail_of_logs).collect();
        format!("{views:#?}\n{}", logs.join("\n"))
    }
}

/// One worker's word about the machine.
#[derive(Debug)]
#[allow(dead_code, reason = "shown when a test fails")]
struct View {
    runs: bool,
    quiet: bool,
    machine: Value,
    migrations: Value,
}

fn view(worker: &mut Worker) -> Result<View, String> {
    let machines = worker.api("/v1/machines?scope=local")?;
    let migrations = worker.api("/v1/migrations?scope=local")?;
    let machine = machines["items"]
        .as_array()
        .into_iter()
        .flatten()
        .find(|m| m["machine"] == MACHINE)
        .cloned()
        .unwrap_or_default();
    let quiet = migrations["items"].as_array().into_iter().flatten().all(|migration| is_over(&migration["phase"]));
    Ok(View { runs: machine["state"] == "running", quiet, machine, migrations })
}

/// Whether a migration in this phase is over.
fn is_over(phase: &Value) -> bool {
    ["cleaned", "cancelled", "failed"].iter().any(|word| phase == word)
}

/// The program under test.
pub(crate) fn decant() -> Command {
    Command::new(env!("CARGO_BIN_EXE_decant"))
}

/// Runs `command`, which must succeed.
pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    assert!(output.status.success(), "{command:?}: {}\n{}", output.status, String::from_utf8_lossy(&output.stderr));
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// A directory below /var/tmp, which is on a disk, named by run; removed at the end, and at the start of the next run.
struct Directory {
    path: PathBuf,
}

impl Directory {
    fn make(name: &str) -> Self {
        let path = PathBuf::from(format!("/var/tmp/decant-test-{name}"));
        clear(&path);
        std::fs::create_dir_all(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()));
        Self { path }
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if !std::thread::panicking() {
            clear(&self.path);
        }
    }
}

fn clear(path: &Path) {
    let _ = std::fs::remove_dir_all(path);
}
