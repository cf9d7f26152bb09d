//! The demo's workers: namespaces, certificates, configurations and processes, all named by the run and all removed again.

use std::fs::{self, File};
use std::net::{Ipv6Addr, SocketAddr};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use decant_api::{Worker as WorkerView, path};
use decant_base::WorkerId;
use decant_dataplane_user::loopdev;
use decant_network::{LABS, Lab, Shape};
use serde::{Deserialize, Serialize};

use super::link::Link;
use crate::cli::Agent;

/// How many workers the demo has: where the machine is, where it goes, and where the client is.
pub(crate) const WORKERS: u32 = 3;
/// Where runs are registered, so that the next one finds what a killed one left. Does not outlive a boot.
const RUNS: &str = "/run/decant-demo";
/// The port that agents listen at.
const AGENT_PORT: u16 = 7070;
/// The proxies' port of the order service.
pub(crate) const ORDERS_PORT: u16 = 8080;
/// The proxies' port of its stateless twin.
pub(crate) const TWIN_PORT: u16 = 8081;
/// The proxies' port of a second copy of the order service.
pub(crate) const SECOND_PORT: u16 = 8082;
/// How long an agent may take to answer for the first time.
const START_PATIENCE: Duration = Duration::from_secs(15);
/// Free space that the demo wants beside what its volumes take.
const SPARE: u64 = 512 << 20;

/// One worker of the demo.
#[derive(Debug)]
pub(crate) struct Worker {
    pub(crate) name: WorkerId,
    pub(crate) index: u32,
    pub(crate) run_dir: PathBuf,
    pub(crate) state_dir: PathBuf,
    config: PathBuf,
    processes: Vec<Child>,
}

impl Worker {
    /// The agent's socket.
    pub(crate) fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// A connection to the agent.
    pub(crate) fn agent(&self) -> Agent {
        Agent::at(self.socket())
    }
}

/// The demo's workers and everything that belongs to them.
#[derive(Debug)]
pub(crate) struct Site {
    run: String,
    directory: PathBuf,
    program: PathBuf,
    lab: Option<Lab>,
    workers: Vec<Worker>,
    kept: bool,
}

/// What the next run has to know to clear this one.
#[derive(Debug, Serialize, Deserialize)]
struct Registered {
    directory: PathBuf,
    volumes: Vec<String>,
}

/// Names of volumes that the demo makes; their loop devices are cleared by name.
const VOLUMES: [&str; 3] = ["orders-data", "orders-copy", "orders-second"];

impl Site {
    /// Makes the site under `parent`, where its volumes will take `room_bytes`, and starts its agents and proxies.
    pub(crate) fn create(parent: &Path, room_bytes: u64, link: Option<&Link>) -> anyhow::Result<Self> {
        sweep()?;
        let run = format!("demo-{}", std::process::id());
        let directory = parent.join(format!("decant-{run}"));
        let room = rustix::fs::statvfs(parent).with_context(|| format!("looking at {}", parent.display()))?;
        let free = room.f_bavail.saturating_mul(room.f_frsize);
        let wanted = room_bytes.saturating_add(SPARE);
        if free < wanted {
            bail!(
                "{} has {} free and the demo may need {}; name a roomier place with --dir",
                parent.display(),
                decant_base::Bytes(free),
                decant_base::Bytes(wanted)
            );
        }
        let registered = Registered { directory: directory.clone(), volumes: VOLUMES.map(str::to_owned).to_vec() };
        fs::create_dir_all(RUNS)?;
        fs::write(Path::new(RUNS).join(format!("{run}.json")), serde_json::to_vec(&registered)?)?;
        let program = std::env::current_exe().context("finding this program")?;
        let mut site = Self { run, directory, program, lab: None, workers: Vec::new(), kept: false };
        site.build(link)?;
        Ok(site)
    }

    fn build(&mut self, link: Option<&Link>) -> anyhow::Result<()> {
        use std::os::unix::fs::DirBuilderExt;
        fs::DirBuilder::new()
            .mode(0o711)
            .create(&self.directory)
            .with_context(|| format!("making {}", self.directory.display()))?;
        let lab = match link {
            None => Lab::create(&self.run, WORKERS),
            Some(Link { bits_per_s, delay }) => {
                Lab::create_shaped(&self.run, WORKERS, Shape { bits_per_s: *bits_per_s, delay: *delay })
            }
        };
        let lab = self.lab.insert(lab.context("making the network")?);
        let today = jiff::Zoned::now().date();
        let ca = self.directory.join("ca");
        decant_agent::ca::init(&ca, today).context("making the authority")?;
        fs::create_dir(self.directory.join("keys"))?;
        for index in 1..=WORKERS {
            let name = WorkerId::new(format!("worker-{index}"))?;
            let state_dir = self.directory.join(name.as_str());
            let run_dir = lab.directory().join(name.as_str());
            fs::create_dir_all(&state_dir)?;
            fs::create_dir_all(&run_dir)?;
            let address = lab.address(index);
            decant_agent::ca::issue(&ca, &state_dir, &name, &[address.into()], (today, 30))
                .context("issuing a certificate")?;
            fs::copy(ca.join("ca.pem"), state_dir.join("ca.pem"))?;
            let config = state_dir.join("worker.toml");
            self.workers.push(Worker { name, index, run_dir, state_dir, config, processes: Vec::new() });
        }
        for worker in &self.workers {
            let text = config_text(worker, &self.workers, lab, &self.directory.join("keys"));
            fs::write(&worker.config, text)?;
        }
        for index in 1..=WORKERS {
            self.start(index)?;
        }
        for worker in &self.workers {
            wait_for(worker)?;
        }
        Ok(())
    }

    fn start(&mut self, index: u32) -> anyhow::Result<()> {
        let worker = &self.workers[index as usize - 1];
        let mut processes = Vec::new();
        for verb in ["agent", "proxy"] {
            let log = File::create(worker.state_dir.join(format!("{verb}.log")))?;
            let mut command = Command::new(&self.program);
            command.arg(verb).arg("--config").arg(&worker.config);
            command.stdin(Stdio::null()).stdout(log.try_clone()?).stderr(log);
            // A group of its own: Ctrl-C is the demo's alone, which then ends the workers in order.
            command.process_group(0);
            let child = self
                .lab()
                .spawn(index, &mut command)
                .with_context(|| format!("starting the {verb} of {}", worker.name))?;
            processes.push(child);
        }
        self.workers[index as usize - 1].processes = processes;
        Ok(())
    }

    /// The run's name.
    pub(crate) fn run(&self) -> &str {
        &self.run
    }

    /// This program.
    pub(crate) fn program(&self) -> &Path {
        &self.program
    }

    /// Where the run keeps its files.
    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// The namespaces.
    pub(crate) fn lab(&self) -> &Lab {
        self.lab.as_ref().expect("a site has its lab until it is destroyed")
    }

    /// Worker `index`, 1 and up.
    pub(crate) fn worker(&self, index: u32) -> &Worker {
        &self.workers[index as usize - 1]
    }

    /// Where the client reaches a service: the proxy on its own worker.
    pub(crate) fn proxy(port: u16) -> SocketAddr {
        SocketAddr::from((Ipv6Addr::LOCALHOST, port))
    }

    /// The process id of a worker's agent.
    pub(crate) fn agent_pid(&self, index: u32) -> u32 {
        self.worker(index).processes[0].id()
    }

    /// Loses a worker for good: it is cut off, everything on it is killed, its files are removed.
    pub(crate) fn lose(&mut self, index: u32) -> anyhow::Result<()> {
        self.lab().set_connected(index, false).context("cutting the worker off")?;
        let worker = &self.workers[index as usize - 1];
        let inside = self.processes_of(index)?;
        for pid in inside {
            let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
        }
        let state_dir = worker.state_dir.clone();
        for child in &mut self.workers[index as usize - 1].processes {
            let _ = child.wait();
        }
        let deadline = Instant::now() + Duration::from_secs(10);
        while !self.processes_of(index)?.is_empty() {
            anyhow::ensure!(Instant::now() < deadline, "the processes of a lost worker do not end");
            std::thread::sleep(Duration::from_millis(10));
        }
        fs::remove_dir_all(&state_dir).with_context(|| format!("removing {}", state_dir.display()))
    }

    /// Processes in the network namespaces of a worker and of its machines.
    fn processes_of(&self, index: u32) -> anyhow::Result<Vec<rustix::process::Pid>> {
        use std::os::unix::fs::MetadataExt;
        let worker = self.worker(index);
        let mut inodes = vec![fs::metadata(self.lab().netns(index))?.ino()];
        if let Ok(machines) = fs::read_dir(worker.run_dir.join("netns")) {
            inodes.extend(machines.flatten().filter_map(|entry| Some(fs::metadata(entry.path()).ok()?.ino())));
        }
        let mut found = Vec::new();
        for entry in fs::read_dir("/proc")?.flatten() {
            let Some(pid) = entry.file_name().to_str().and_then(|name| name.parse().ok()) else { continue };
            let inside = fs::metadata(entry.path().join("ns/net")).is_ok_and(|meta| inodes.contains(&meta.ino()));
            if let Some(pid) =
                rustix::process::Pid::from_raw(pid).filter(|pid| inside && *pid != rustix::process::getpid())
            {
                found.push(pid);
            }
        }
        Ok(found)
    }

    /// Leaves everything as it is when this process ends.
    pub(crate) fn keep(mut self) -> anyhow::Result<()> {
        self.kept = true;
        match self.lab.take() {
            Some(lab) => lab.keep().context("keeping the workers"),
            None => Ok(()),
        }
    }

    /// The last lines of a worker's log, for when something went wrong.
    pub(crate) fn log_tail(&self, index: u32, process: &str, lines: usize) -> String {
        let text = fs::read_to_string(self.worker(index).state_dir.join(format!("{process}.log"))).unwrap_or_default();
        let all: Vec<&str> = text.lines().collect();
        all[all.len().saturating_sub(lines)..].join("\n")
    }
}

impl Drop for Site {
    fn drop(&mut self) {
        if self.kept {
            return;
        }
        if let Some(lab) = self.lab.take()
            && let Err(error) = lab.destroy()
        {
            eprintln!("demo: {error}");
        }
        for child in self.workers.iter_mut().flat_map(|worker| &mut worker.processes) {
            let _ = child.wait();
        }
        if let Err(error) = clear(&self.run) {
            eprintln!("demo: {error:#}");
        }
    }
}

fn wait_for(worker: &Worker) -> anyhow::Result<()> {
    let deadline = Instant::now() + START_PATIENCE;
    loop {
        let last = match worker.agent().get::<WorkerView>(&path::worker(&worker.name)) {
            Ok(_) => return Ok(()),
            Err(failure) => failure,
        };
        if Instant::now() > deadline {
            let log = fs::read_to_string(worker.state_dir.join("agent.log")).unwrap_or_default();
            bail!("the agent of {} does not start: {}\n{log}", worker.name, last.body);
        }
        std::thread::sleep(Duration::from_millis(20));
    }
}

fn config_text(worker: &Worker, all: &[Worker], lab: &Lab, keys: &Path) -> String {
    let Worker { name, index, run_dir, state_dir, .. } = worker;
    let address = lab.address(*index);
    // The first worker is the older one: its cryptsetup made headers of 16 MiB.
    let header = if *index == 1 { "16MiB" } else { "4MiB" };
    let mut text = format!(
        "worker = \"{name}\"\nworker_index = {index}\nregion = \"demo\"\nstate_dir = {state_dir:?}\nrun_dir = {run_dir:?}\n\
         listen = \"[{address}]:{AGENT_PORT}\"\ndata_listen = \"[{address}]:0\"\n\n\
         [tls]\nca = \"ca.pem\"\ncert = \"{name}.pem\"\nkey = \"{name}.key\"\n\n\
         [luks]\nheader = \"{header}\"\n\n[keys]\nsource = \"file\"\ndirectory = {keys:?}\n\n[network]\nid = 1\n\n\
         [iscsi]\ntrusted_networks = [\"{network}\"]\n\n",
        network = lab.network(),
    );
    for peer in all.iter().filter(|peer| peer.index != *index) {
        let (name, index, address) = (&peer.name, peer.index, lab.address(peer.index));
        text.push_str(&format!(
            "[[peers]]\nworker = \"{name}\"\nworker_index = {index}\naddress = \"[{address}]:{AGENT_PORT}\"\n\n"
        ));
    }
    for (machine, port) in [("orders", ORDERS_PORT), ("orders-twin", TWIN_PORT), ("orders-second", SECOND_PORT)] {
        text.push_str(&format!(
            "[[proxy.services]]\nlisten = \"[::]:{port}\"\nmachine = \"{machine}\"\nport = 8080\n\n"
        ));
    }
    text
}

/// Clears what runs of dead processes left.
pub(crate) fn sweep() -> anyhow::Result<()> {
    Lab::sweep().context("clearing what an earlier demo left")?;
    let Ok(runs) = fs::read_dir(RUNS) else { return Ok(()) };
    for entry in runs.flatten() {
        let path = entry.path();
        let Some(run) = path.file_stem().and_then(|stem| stem.to_str()) else { continue };
        // A lab that is still there is in use, or kept on purpose.
        if !Path::new(LABS).join(run).exists() {
            clear(run)?;
        }
    }
    Ok(())
}

/// Removes a run that was kept.
pub(crate) fn clean(run: &str) -> anyhow::Result<()> {
    if !Path::new(RUNS).join(format!("{run}.json")).exists() {
        bail!("there is no demo called {run}; `ls {RUNS}` shows those that are kept");
    }
    Lab::destroy_named(run).context("removing the workers")?;
    clear(run)
}

/// Removes what a run has beside its lab: loop devices, files, cgroups.
fn clear(run: &str) -> anyhow::Result<()> {
    let register = Path::new(RUNS).join(format!("{run}.json"));
    let Ok(text) = fs::read(&register) else { return Ok(()) };
    let Ok(Registered { directory, volumes }) = serde_json::from_slice(&text) else {
        // Cut short when it was written: nothing had been made yet.
        return Ok(fs::remove_file(&register)?);
    };
    let names: Vec<String> = (1..=WORKERS)
        .flat_map(|index| {
            let (worker, directory) = (format!("worker-{index}"), &directory);
            volumes
                .iter()
                .map(move |volume| loopdev::Name::new(&worker, volume, &directory.join(&worker)).as_str().to_owned())
        })
        .collect();
    loopdev::clear_all(|name| names.iter().any(|ours| ours == name)).context("clearing loop devices")?;
    if directory.exists() {
        fs::remove_dir_all(&directory).with_context(|| format!("removing {}", directory.display()))?;
    }
    for index in 1..=WORKERS {
        let worker = format!("worker-{index}");
        let run_dir = Path::new(LABS).join(run).join(&worker);
        // A group that somebody is in stays.
        if let Ok(group) = decant_machine::worker_cgroup(&worker, &run_dir) {
            remove_cgroups(&group);
        }
    }
    fs::remove_file(&register).context("forgetting the run")
}

fn remove_cgroups(cgroup: &Path) {
    if let Ok(entries) = fs::read_dir(cgroup) {
        for entry in entries.flatten().filter(|entry| entry.file_type().is_ok_and(|kind| kind.is_dir())) {
            remove_cgroups(&entry.path());
        }
    }
    let _ = fs::remove_dir(cgroup);
}
