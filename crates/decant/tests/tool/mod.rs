//! The tools as a user runs them, in a directory of their own, and the peers that they are tried with.

#![allow(dead_code, reason = "each test file uses a part of it")]

use std::io::{BufRead, BufReader, Read};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Output, Stdio};
use std::time::{Duration, Instant};

use serde_json::Value;

pub(crate) const MIB: u64 = 1 << 20;
/// Nothing that is waited for takes so long.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);

/// The program.
pub(crate) fn decant(arguments: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_decant"));
    command.args(arguments).env_remove("DECANT_SOCKET").env_remove("NOTIFY_SOCKET").env("DECANT_LOG", "warn");
    command
}

/// A tool that serves. Ended and waited for when it is dropped.
pub(crate) struct Tool {
    child: Child,
    /// What it said when it was ready.
    pub(crate) facts: Value,
}

impl Tool {
    /// Starts `decant … -o json` and waits until it is ready.
    pub(crate) fn start(arguments: &[&str]) -> Self {
        Self::run(decant(arguments).args(["-o", "json"]))
    }

    /// Waits until what was started is ready.
    pub(crate) fn run(command: &mut Command) -> Self {
        let mut child = command.stdout(Stdio::piped()).stderr(Stdio::piped()).spawn().expect("decant starts");
        let mut line = String::new();
        let mut out = BufReader::new(child.stdout.take().expect("a pipe"));
        out.read_line(&mut line).expect("its output is text");
        if line.is_empty() {
            let mut said = String::new();
            let _ = child.stderr.take().expect("a pipe").read_to_string(&mut said);
            panic!("{command:?} ended with {:?}: {said}", child.wait());
        }
        // What it logs is drained, so that it never waits for us.
        let mut errors = child.stderr.take().expect("a pipe");
        std::thread::spawn(move || {
            let mut text = String::new();
            let _ = errors.read_to_string(&mut text);
            if !text.is_empty() {
                eprintln!("decant said:\n{text}");
            }
        });
        let facts = serde_json::from_str(&line).unwrap_or_else(|error| panic!("{error}: {line}"));
        Self { child, facts }
    }

    /// One of the things that it said.
    pub(crate) fn fact(&self, name: &str) -> String {
        self.facts[name].as_str().unwrap_or_else(|| panic!("no {name} in {}", self.facts)).to_owned()
    }

    pub(crate) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Kills it as a power cut would, but for what the kernel holds.
    pub(crate) fn kill(mut self) {
        self.child.kill().expect("it runs");
        self.child.wait().expect("it ends");
    }

    /// Ends it in order; gives the exit status.
    pub(crate) fn end(mut self) -> Option<i32> {
        self.stop()
    }

    fn stop(&mut self) -> Option<i32> {
        let pid = rustix::process::Pid::from_child(&self.child);
        let _ = rustix::process::kill_process(pid, rustix::process::Signal::TERM);
        let deadline = Instant::now() + PATIENCE;
        while Instant::now() < deadline {
            if let Some(status) = self.child.try_wait().expect("it is ours") {
                return status.code();
            }
            std::thread::sleep(Duration::from_millis(5));
        }
        let _ = self.child.kill();
        panic!("decant did not end within {PATIENCE:?}");
    }
}

impl Drop for Tool {
    fn drop(&mut self) {
        if matches!(self.child.try_wait(), Ok(None)) && !std::thread::panicking() {
            self.stop();
        } else {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

/// A directory on a disk, not in memory: file systems in memory neither lease nor punch as others do.
pub(crate) fn directory() -> tempfile::TempDir {
    let base = std::env::current_exe().expect("this program");
    tempfile::tempdir_in(base.parent().expect("a directory")).expect("a temporary directory")
}

/// A sparse file of `size` bytes.
pub(crate) fn disk(directory: &Path, name: &str, size: u64) -> PathBuf {
    let path = directory.join(name);
    std::fs::File::create(&path).expect("a file").set_len(size).expect("a sparse file");
    path
}

/// A file of bytes that tell their place.
pub(crate) fn patterned(directory: &Path, name: &str, size: u64) -> PathBuf {
    let path = directory.join(name);
    let bytes: Vec<u8> =
        (0..size / 8).flat_map(|n| (n.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1).to_le_bytes()).collect();
    std::fs::write(&path, bytes).expect("a file");
    path
}

/// Debian's package of a peer.
fn package(program: &str) -> &'static str {
    match program {
        _ if program.starts_with("qemu") => "qemu-utils and qemu-block-extra",
        _ if program.starts_with("iscsi") => "libiscsi-bin",
        _ if program.starts_with("nbd") => "libnbd-bin",
        _ if program.starts_with("tgt") => "tgt",
        _ => "of that name",
    }
}

/// A peer that `cargo xtask test` has unpacked by its path, any other by its name.
pub(crate) fn peer(program: &str) -> PathBuf {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/peers/bin").join(program);
    if unpacked.is_file() { unpacked } else { PathBuf::from(program) }
}

/// Runs a peer for at most so long; `None`: it was ended then.
pub(crate) fn run_for(seconds: u32, program: &str, arguments: &[&str]) -> Option<Output> {
    let output = Command::new("timeout")
        .args(["-s", "KILL"])
        .arg(seconds.to_string())
        .arg(peer(program))
        .args(arguments)
        .output();
    let output = output.expect("timeout is part of coreutils");
    let code = output.status.code();
    assert!(code != Some(127), "{program} is not here: install Debian's {}", package(program));
    // 137: `timeout -s KILL` itself was killed by the signal, as it says; no code: it was told by the signal.
    (!matches!(code, Some(124 | 137) | None)).then_some(output)
}

/// Runs a peer that has to end in time.
pub(crate) fn run(seconds: u32, program: &str, arguments: &[&str]) -> Output {
    run_for(seconds, program, arguments)
        .unwrap_or_else(|| panic!("{program} {arguments:?} did not end within {seconds} s"))
}

/// Runs a peer that has to succeed; gives what it said.
pub(crate) fn succeed(seconds: u32, program: &str, arguments: &[&str]) -> String {
    let output = run(seconds, program, arguments);
    assert!(output.status.success(), "{program} {arguments:?}: {}", text(&output));
    text(&output)
}

/// Both streams.
pub(crate) fn text(output: &Output) -> String {
    String::from_utf8_lossy(&output.stdout).into_owned() + &String::from_utf8_lossy(&output.stderr)
}

/// Whether QEMU's iscsi driver, a module of QEMU's own version, is on this machine; says so if not, as `SKIP <test>: <why>`.
pub(crate) fn has_qemu_iscsi(test: &str) -> bool {
    let module = format!("/usr/lib/{}-linux-gnu/qemu/block-iscsi.so", std::env::consts::ARCH);
    let found = Path::new(&module).exists() || peer("qemu-io").is_absolute();
    if !found {
        println!("SKIP {test}: qemu-block-extra of the version of qemu-utils is not installed");
    }
    found
}

/// Waits until `done`.
pub(crate) fn wait_until(what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        assert!(Instant::now() < deadline, "{what}: not within {PATIENCE:?}");
        std::thread::sleep(Duration::from_millis(10));
    }
}

/// Where a clone's files are.
pub(crate) struct Place {
    pub(crate) directory: tempfile::TempDir,
}

impl Place {
    pub(crate) fn new() -> Self {
        Self { directory: directory() }
    }

    pub(crate) fn at(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("text").to_owned()
    }

    pub(crate) fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    /// `decant clone ORIGIN dest --meta map …`.
    pub(crate) fn clone(&self, origin: &str, more: &[&str]) -> Tool {
        let (dest, map) = (self.at("dest"), self.at("map"));
        Tool::start(&[&["clone", origin, &dest, "--meta", &map], more].concat())
    }

    pub(crate) fn serve(&self) -> String {
        format!("unix:{}", self.at("s"))
    }

    pub(crate) fn ask(&self, words: &[&str]) -> Output {
        let map = self.at("map");
        decant(&[&["-o", "json", "clone"], words, &["--meta", &map]].concat()).output().expect("decant runs")
    }

    pub(crate) fn status(&self) -> Value {
        let output = self.ask(&["status"]);
        serde_json::from_slice(&output.stdout).unwrap_or_else(|error| panic!("{error}: {}", text(&output)))
    }

    pub(crate) fn await_filled(&self) {
        wait_until("the clone is filled", || self.status()["bytes_missing"] == 0);
    }
}
