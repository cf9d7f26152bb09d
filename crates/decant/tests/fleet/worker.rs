//! One worker: its namespace, its disk, its agent.

use std::ffi::OsStr;
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Arc;
use std::time::{Duration, Instant};

use decant_network::Lab;
use rustix::process::{Pid, Signal, WaitIdOptions};
use serde_json::Value;

use super::{MACHINE, PATIENCE, decant, run};

/// Where a machine serves, and where every proxy serves for it.
const DOOR: u16 = 8080;

pub(crate) struct Worker {
    index: u32,
    lab: Arc<Lab>,
    directory: PathBuf,
    agent: Option<Child>,
    proxy: Option<Child>,
    /// Keeps the worker's mounts while it is up.
    host: Option<Child>,
    boots: u32,
}

impl Worker {
    /// Its state lies on a file system of its own, so that its power can be cut.
    pub(crate) fn make(index: u32, lab: &Arc<Lab>, below: &Path) -> Self {
        let name = format!("worker-{index}");
        let directory = below.join(&name);
        std::fs::create_dir_all(directory.join("state")).expect("a directory");
        let disk = directory.join("disk.img");
        let file = std::fs::File::create(&disk).expect("a disk");
        file.set_len(512 << 20).expect("a sparse disk");
        run(Command::new("mkfs.ext4").args(["-q", "-F"]).arg(&disk));
        let address = lab.address(index).to_string();
        run(decant()
            .args(["ca", "issue", &name, "--address", &address, "--ca"])
            .arg(below)
            .arg("--dir")
            .arg(&directory));
        // One key store for all, as a fleet has; by a name of the worker's own, so that it can lose it.
        std::os::unix::fs::symlink("../keys", directory.join("keys")).expect("a link to the keys");
        let peer = 3 - index;
        let config = format!(
            r#"
worker = "{name}"
worker_index = {index}
region = "test"
state_dir = "state"
run_dir = "{run}"
listen = "[{address}]:7070"
data_listen = "[{address}]:0"
tls = {{ ca = "../ca.pem", cert = "{name}.pem", key = "{name}.key" }}
luks = {{ header = "{header}" }}
keys = {{ source = "file", directory = "keys" }}
drain = {{ retention = "0s", stop_timeout = "10s", prepare_timeout = "20s" }}
iscsi = {{ trusted_networks = ["{network}"] }}
[[peers]]
worker = "worker-{peer}"
worker_index = {peer}
address = "[{peer_address}]:7070"
[[proxy.services]]
listen = "[{address}]:{DOOR}"
machine = "{MACHINE}"
port = {DOOR}
"#,
            run = Self::run_dir(lab, index).display(),
            network = lab.network(),
            header = if index == 1 { "16MiB" } else { "4MiB" },
            peer_address = lab.address(peer),
        );
        std::fs::write(directory.join("worker.toml"), config).expect("a configuration");
        let mut worker =
            Self { index, lab: Arc::clone(lab), directory, agent: None, proxy: None, host: None, boots: 0 };
        worker.boot();
        worker
    }

    fn run_dir(lab: &Lab, index: u32) -> PathBuf {
        lab.directory().join(format!("run-{index}"))
    }

    fn socket(&self) -> PathBuf {
        Self::run_dir(&self.lab, self.index).join("agent.sock")
    }

    /// Mounts the worker's disk, and a boot id of its own, in a mount namespace that only its processes are in: the disk is gone
    /// with the last of them.
    fn boot(&mut self) {
        self.boots += 1;
        let id = format!("00000000-0000-4000-8000-{:06}{:06}\n", self.index, self.boots);
        std::fs::write(self.directory.join("boot_id"), id).expect("a boot id");
        let script = r#"mount -o loop "$1" "$2" && mount --bind "$3" /proc/sys/kernel/random/boot_id && echo up && exec sleep infinity"#;
        let mut command = Command::new("unshare");
        command.args(["--mount", "/bin/sh", "-c", script, "sh"]).arg(self.directory.join("disk.img"));
        command.arg(self.directory.join("state")).arg(self.directory.join("boot_id")).stdout(Stdio::piped());
        let mut host = command.spawn().expect("a mount namespace");
        let mut word = [0; 3];
        host.stdout.as_mut().expect("piped").read_exact(&mut word).expect("the worker's disk is mounted");
        self.host = Some(host);
    }

    /// Starts the agent with these variables.
    pub(crate) fn start_agent(&mut self, environment: &[(&str, &str)]) {
        self.start_agent_with(environment);
    }

    /// Starts the agent with these variables.
    pub(crate) fn start_agent_with<'a, K, V>(&mut self, environment: impl IntoIterator<Item = &'a (K, V)>)
    where
        K: AsRef<OsStr> + 'a,
        V: AsRef<OsStr> + 'a,
    {
        assert!(self.agent.is_none(), "worker-{} has an agent", self.index);
        let mut command = self.inside("agent");
        command.envs(environment.into_iter().map(|(name, value)| (name, value)));
        self.agent = Some(self.lab.spawn(self.index, &mut command).expect("an agent"));
    }

    /// Starts the worker's proxy.
    pub(crate) fn start_proxy(&mut self) {
        assert!(self.proxy.is_none(), "worker-{} has a proxy", self.index);
        self.proxy = Some(self.lab.spawn(self.index, &mut self.inside("proxy")).expect("a proxy"));
    }

    /// Kills the worker's proxy.
    pub(crate) fn kill_proxy(&mut self) {
        let mut proxy = self.proxy.take().expect("a proxy");
        proxy.kill().expect("it runs");
        proxy.wait().expect("it ends");
    }

    /// What the machine says to who connects to it through this worker's proxy.
    pub(crate) fn ask_proxy(&self) -> std::io::Result<String> {
        let address = self.lab.address(self.index);
        let mut stream = self
            .lab
            .enter(self.index, || TcpStream::connect_timeout(&(address, DOOR).into(), Duration::from_secs(5)))?;
        stream.set_read_timeout(Some(Duration::from_secs(5)))?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer)?;
        Ok(answer)
    }

    /// `decant agent` or `decant proxy` where the worker's mounts are; what it says goes to the log of that name.
    fn inside(&self, what: &str) -> Command {
        let log = self.directory.join(format!("{what}.log"));
        let log = std::fs::File::options().create(true).append(true).open(log).expect("a log");
        let namespace = format!("--mount=/proc/{}/ns/mnt", self.host.as_ref().expect("a booted worker").id());
        let mut command = Command::new("nsenter");
        command.arg(namespace).arg("--").arg(env!("CARGO_BIN_EXE_decant"));
        command.args([what, "--config"]).arg(self.directory.join("worker.toml"));
        command.stdin(Stdio::null()).stdout(log.try_clone().expect("a log")).stderr(log);
        command
    }

    /// Waits until the agent answers.
    pub(crate) fn await_agent(&mut self) {
        let end = Instant::now() + PATIENCE;
        while let Err(error) = self.api("/v1/machines?scope=local") {
            assert!(Instant::now() < end, "worker-{}: {error}\n{}", self.index, self.tail_of_logs());
            if let Some(status) = self.agent.as_mut().and_then(|agent| agent.try_wait().expect("wait")) {
                panic!("the agent of worker-{} ended with {status}\n{}", self.index, self.tail_of_logs());
            }
            wait_a_moment();
        }
    }

    /// Waits until this worker says that the migration is in `phase`.
    pub(crate) fn await_phase(&mut self, migration: &str, phase: &str) {
        self.await_answer(&format!("/v1/migrations/{migration}?scope=local"), phase, |view| view["phase"] == phase);
    }

    /// Waits until this worker says that the migration is over.
    pub(crate) fn await_over(&mut self, migration: &str) {
        self.await_answer(&format!("/v1/migrations/{migration}?scope=local"), "over", |view| {
            super::is_over(&view["phase"])
        });
    }

    /// Waits until this worker says that the machine is in `state`.
    pub(crate) fn await_state(&mut self, machine: &str, state: &str) {
        self.await_answer(&format!("/v1/machines/{machine}?scope=local"), state, |view| view["state"] == state);
    }

    /// Waits until this worker has nothing of the machine.
    pub(crate) fn await_gone(&mut self, machine: &str) {
        self.await_answer("/v1/machines?scope=local", &format!("without {machine}"), |view| {
            view["items"].as_array().into_iter().flatten().all(|item| item["machine"] != machine)
        });
    }

    fn await_answer(&mut self, path: &str, what: &str, is_so: impl Fn(&Value) -> bool) {
        let end = Instant::now() + PATIENCE;
        loop {
            let seen = self.api(path);
            if seen.as_ref().is_ok_and(&is_so) {
                return;
            }
            assert!(Instant::now() < end, "{path} is not {what}: {seen:?}\n{}", self.tail_of_logs());
            wait_a_moment();
        }
    }

    /// Another passphrase than the fleet's is what this worker finds for `volume`.
    pub(crate) fn lose_key(&self, volume: &str) {
        let wrong = self.directory.join("wrong-keys");
        std::fs::create_dir_all(&wrong).expect("a directory");
        let key = wrong.join(format!("{volume}.key"));
        std::fs::write(&key, "another passphrase").expect("a key");
        std::fs::set_permissions(&key, std::os::unix::fs::PermissionsExt::from_mode(0o600)).expect("a mode");
        self.link_keys("wrong-keys");
    }

    /// The fleet's keys are there again.
    pub(crate) fn find_key(&self) {
        self.link_keys("../keys");
    }

    fn link_keys(&self, to: &str) {
        let link = self.directory.join("keys");
        std::fs::remove_file(&link).expect("the link to the keys");
        std::os::unix::fs::symlink(to, &link).expect("a link to keys");
    }

    /// How often the agent has given messages to its peer up, by its log; their rows send them again.
    pub(crate) fn undelivered(&self) -> usize {
        let text = std::fs::read_to_string(self.directory.join("agent.log")).unwrap_or_default();
        text.matches("messages not delivered").count()
    }

    /// Ends the agent as a service manager would.
    pub(crate) fn end_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = rustix::process::kill_process(pid_of(&agent), Signal::TERM);
            let status = agent.wait().expect("wait");
            assert!(status.success(), "the agent of worker-{} ended with {status}", self.index);
        }
    }

    /// Kills the agent; it may be standing still at a crash point.
    pub(crate) fn kill_agent(&mut self) {
        if let Some(mut agent) = self.agent.take() {
            let _ = agent.kill();
            let _ = agent.wait();
        }
    }

    /// Waits until the agent answers (false) or stands still at its crash point (true).
    pub(crate) fn answers_or_stands_still(&mut self) -> bool {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if self.stands_still() {
                return true;
            }
            if self.api_within("/v1/machines?scope=local", Duration::from_millis(100)).is_ok() {
                return false;
            }
            wait_a_moment();
        }
        panic!("the agent of worker-{} neither answers nor stands still\n{}", self.index, self.tail_of_logs());
    }

    /// Waits until the agent stands still at its crash point.
    pub(crate) fn await_standstill(&mut self) -> bool {
        let end = Instant::now() + PATIENCE;
        while Instant::now() < end {
            if self.stands_still() {
                return true;
            }
            wait_a_moment();
        }
        false
    }

    /// Whether the agent stands still at its crash point.
    pub(crate) fn stands_still(&self) -> bool {
        let agent = pid_of(self.agent.as_ref().expect("an agent"));
        let options = WaitIdOptions::STOPPED | WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT;
        match rustix::process::waitid(rustix::process::WaitId::Pid(agent), options).expect("wait") {
            Some(status) if status.stopped() => true,
            Some(status) => panic!("the agent of worker-{} ended: {status:?}\n{}", self.index, self.tail_of_logs()),
            None => false,
        }
    }

    /// Lets an agent that stands still go on.
    pub(crate) fn resume_agent(&self) {
        let _ = rustix::process::kill_process(pid_of(self.agent.as_ref().expect("an agent")), Signal::CONT);
    }

    /// Kills every volume process of this worker; how many there were.
    pub(crate) fn kill_volume_processes(&self) -> usize {
        self.kill_processes("volume")
    }

    /// The processes of this worker that are a `decant WORD`.
    pub(crate) fn processes(&self, word: &str) -> Vec<Pid> {
        those(&self.namespaces(), is_called(word))
    }

    /// Kills every process of this worker that is a `decant WORD`; how many there were.
    pub(crate) fn kill_processes(&self, word: &str) -> usize {
        signal_those(&self.namespaces(), Signal::KILL, is_called(word))
    }

    /// Gives every volume process of this worker the signal; how many there were.
    pub(crate) fn signal_volume_processes(&self, signal: Signal) -> usize {
        signal_those(&self.namespaces(), signal, is_called("volume"))
    }

    /// Cuts the power: what was not synced to the worker's disk is gone, every process of it too, and its run directory.
    ///
    /// Everything of the worker stands still first: nothing is computed, and nothing acknowledged, in the moment in which the disk
    /// goes. A sync that is under way then may succeed: ext4 that is shut down waits for no transaction that it gave up.
    pub(crate) fn cut_power(&mut self) {
        self.stand_still();
        let state = self.directory.join("state");
        let seen = format!("{}{}", self.root(), state.display());
        let directory = std::fs::File::open(&seen).expect("the state directory");
        let without_log_flush: u32 = 2;
        // SAFETY: EXT4_IOC_SHUTDOWN (fs/ext4/ioctl.c) reads one u32.
        let done = unsafe { libc::ioctl(directory.as_raw_fd(), 0x8004_587d, &raw const without_log_flush) };
        assert_eq!(done, 0, "EXT4_IOC_SHUTDOWN: {}", std::io::Error::last_os_error());
        drop(directory);
        self.kill_everything();
        let end = Instant::now() + PATIENCE;
        while !run(Command::new("losetup").arg("--associated").arg(self.directory.join("disk.img"))).trim().is_empty() {
            assert!(Instant::now() < end, "{} stays mounted somewhere", state.display());
            wait_a_moment();
        }
        clear_run_dir(&Self::run_dir(&self.lab, self.index));
        self.boot();
    }

    /// Stops every process of this worker, and waits until none of them runs.
    fn stand_still(&self) {
        let namespaces = self.namespaces();
        let end = Instant::now() + PATIENCE;
        loop {
            signal_those(&namespaces, Signal::STOP, |_| true);
            let running = those(&namespaces, |_| true).into_iter().filter(|pid| is_running(*pid)).count();
            if running == 0 {
                return;
            }
            assert!(Instant::now() < end, "{running} processes of worker-{} do not stand still", self.index);
            wait_a_moment();
        }
    }

    /// Kills every process of this worker: all that is in its network namespace or in one of its machines', until none is left.
    fn kill_everything(&mut self) {
        let namespaces = self.namespaces();
        self.kill_agent();
        if self.proxy.is_some() {
            self.kill_proxy();
        }
        let end = Instant::now() + PATIENCE;
        while signal_those(&namespaces, Signal::KILL, |_| true) > 0 {
            assert!(Instant::now() < end, "processes of worker-{} do not end", self.index);
            wait_a_moment();
        }
        if let Some(mut host) = self.host.take() {
            let _ = host.kill();
            let _ = host.wait();
        }
    }

    /// Where the worker's mounts are seen.
    fn root(&self) -> String {
        self.host.as_ref().map(|host| format!("/proc/{}/root", host.id())).unwrap_or_default()
    }

    /// The network namespaces of the worker and its machines, by inode.
    fn namespaces(&self) -> Vec<u64> {
        let pins = format!("{}{}", self.root(), Self::run_dir(&self.lab, self.index).join("netns").display());
        let machines = std::fs::read_dir(pins).into_iter().flatten().flatten().map(|entry| entry.path());
        machines.chain([self.lab.netns(self.index)]).filter_map(|path| inode(&path)).collect()
    }

    /// Runs a command line against this worker's agent.
    pub(crate) fn decant(&mut self, arguments: &[&str]) -> Result<Value, String> {
        self.await_agent();
        let output = self.command(arguments).output().expect("decant");
        let text = String::from_utf8_lossy(&output.stdout);
        // 6: detached, as asked.
        if output.status.success() || output.status.code() == Some(6) {
            return Ok(serde_json::from_str(&text).unwrap_or_default());
        }
        Err(format!("decant {arguments:?}: {}: {}", output.status, String::from_utf8_lossy(&output.stderr)))
    }

    /// A command line against this worker's agent.
    pub(crate) fn command(&self, arguments: &[&str]) -> Command {
        let mut command = decant();
        command.args(["-o", "json", "--socket"]).arg(self.socket()).args(arguments);
        command
    }

    /// One GET, without waiting for the agent.
    pub(crate) fn api(&mut self, path: &str) -> Result<Value, String> {
        self.api_within(path, Duration::from_secs(5))
    }

    /// One GET that takes no longer.
    pub(crate) fn api_within(&mut self, path: &str, patience: Duration) -> Result<Value, String> {
        let failed = |error: std::io::Error| format!("{}: {error}", self.socket().display());
        let mut stream = UnixStream::connect(self.socket()).map_err(failed)?;
        stream.set_read_timeout(Some(patience)).map_err(failed)?;
        write!(stream, "GET {path} HTTP/1.0\r\nHost: agent\r\n\r\n").map_err(failed)?;
        let mut answer = String::new();
        stream.read_to_string(&mut answer).map_err(failed)?;
        let (head, body) = answer.split_once("\r\n\r\n").ok_or("no answer")?;
        if !head.contains(" 200 ") {
            return Err(format!("{path}: {answer}"));
        }
        serde_json::from_str(body).map_err(|error| format!("{path}: {error}: {body}"))
    }

    /// The names of crash points that were passed so far by agents that were told to write them down.
    pub(crate) fn trace(&self) -> Vec<String> {
        let text = std::fs::read_to_string(self.trace_path()).unwrap_or_default();
        text.lines().map(str::to_owned).collect()
    }

    /// Where they write them.
    pub(crate) fn trace_path(&self) -> PathBuf {
        self.directory.join("trace")
    }

    /// The end of what the agent said.
    pub(crate) fn tail_of_logs(&self) -> String {
        let text = std::fs::read_to_string(self.directory.join("agent.log")).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        format!("--- worker-{}\n{}", self.index, lines[lines.len().saturating_sub(40)..].join("\n"))
    }
}

impl Drop for Worker {
    fn drop(&mut self) {
        self.kill_everything();
    }
}

fn inode(path: &Path) -> Option<u64> {
    std::fs::metadata(path).map(|meta| std::os::unix::fs::MetadataExt::ino(&meta)).ok()
}

/// Whether a command line is that of `decant WORD`.
fn is_called(word: &str) -> impl Fn(&[u8]) -> bool {
    move |command| command.split(|&byte| byte == 0).nth(1) == Some(word.as_bytes())
}

/// Signals the processes in these network namespaces whose command line `chosen` accepts; how many there were.
fn signal_those(namespaces: &[u64], signal: Signal, chosen: impl Fn(&[u8]) -> bool) -> usize {
    let those = those(namespaces, chosen);
    those.into_iter().filter(|pid| rustix::process::kill_process(*pid, signal).is_ok()).count()
}

/// The processes in these network namespaces whose command line `chosen` accepts.
fn those(namespaces: &[u64], chosen: impl Fn(&[u8]) -> bool) -> Vec<Pid> {
    let mut those = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("/proc").flatten() {
        let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()).and_then(Pid::from_raw) else {
            continue;
        };
        let here = inode(&entry.path().join("ns/net")).is_some_and(|own| namespaces.contains(&own));
        let command = std::fs::read(entry.path().join("cmdline")).unwrap_or_default();
        if here && chosen(&command) {
            those.push(pid);
        }
    }
    those
}

/// Whether a process may still do something by itself: it is neither stopped nor dead, and does not wait for a disk.
fn is_running(pid: Pid) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{}/stat", pid.as_raw_nonzero())).unwrap_or_default();
    stat.rsplit_once(')').is_some_and(|(_, rest)| !rest.trim_start().starts_with(['T', 't', 'D', 'Z', 'X']))
}

fn pid_of(child: &Child) -> Pid {
    Pid::from_child(child)
}

/// A poll interval, not a synchronisation: the caller checks a condition again and has a deadline.
pub(crate) fn wait_a_moment() {
    std::thread::sleep(Duration::from_millis(3));
}

/// What a reboot does to /run.
fn clear_run_dir(run_dir: &Path) {
    let table = std::fs::read_to_string("/proc/self/mountinfo").expect("mountinfo");
    let below: Vec<&str> = table
        .lines()
        .filter_map(|line| line.split(' ').nth(4))
        .filter(|point| Path::new(point).starts_with(run_dir))
        .collect();
    for point in below.iter().rev() {
        let _ = Command::new("umount").arg("-q").arg("-l").arg(point).output();
    }
    let _ = std::fs::remove_dir_all(run_dir);
}
