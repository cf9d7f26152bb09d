//! What the demo does to its fleet, in words of the product's own API and command line.

use std::fs::File;
use std::path::PathBuf;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use decant_api::{CreateVolume, Drain, Empty, Machine, MachineState, Migration, RunMachine, Volume, Worker, path};
use decant_base::{Bytes, DrainId, MachineId, MigrationId, VolumeId};
use decant_dataplane::{Protocol, VolumeStatus};
use decant_machine::{Bind, HealthCheck, Limits, MachineSpec, RestartPolicy};

use super::client::{Load, LoadOptions};
use super::site::{ORDERS_PORT, Site, TWIN_PORT};
use super::{DemoArgs, Interrupt, oracle, say, store};
use crate::cli::Failure;
use crate::http::{Address, Connection};

/// Written and deleted again when the database is made, on volumes that have room for it.
const SCRATCH: Bytes = Bytes::mib(300);
/// How long a machine may take to make its database and serve.
const SERVE_PATIENCE: Duration = Duration::from_secs(60);
/// Where a machine sees this program.
const INSIDE: &str = "/opt/decant/decant";
/// The port inside the machines.
const PORT: u16 = 8080;

/// The machine that is moved.
pub(crate) const ORDERS: &str = "orders";
/// The same without a volume.
pub(crate) const TWIN: &str = "orders-twin";
/// The machine's volume.
pub(crate) const VOLUME: &str = "orders-data";
/// Prefix of the client's references and keys.
pub(crate) const PREFIX: &str = "order-";

/// The site and what is done to it.
#[derive(Debug)]
pub(crate) struct Stage<'a> {
    pub(crate) site: Site,
    pub(crate) args: &'a DemoArgs,
    pub(crate) interrupt: &'a Interrupt,
    drains: u32,
}

/// What drained, as both of its workers tell it.
#[derive(Debug)]
pub(crate) struct Drained {
    pub(crate) drain: Drain,
    /// The machine's move as the source saw it.
    pub(crate) source: Migration,
    /// The same as the destination saw it.
    pub(crate) destination: Migration,
}

pub(crate) fn machine_id(name: &str) -> MachineId {
    MachineId::new(name).expect("the demo's names are ids")
}

pub(crate) fn volume_id(name: &str) -> VolumeId {
    VolumeId::new(name).expect("the demo's names are ids")
}

/// An agent's refusal as an error of the demo.
pub(crate) fn refused(what: &str) -> impl FnOnce(Failure) -> anyhow::Error {
    let what = what.to_owned();
    move |failure| anyhow::Error::from(*failure.body).context(what)
}

impl<'a> Stage<'a> {
    /// Makes the workers.
    pub(crate) fn set(args: &'a DemoArgs, interrupt: &'a Interrupt) -> anyhow::Result<Self> {
        let started = Instant::now();
        let wanted = args.used.0.saturating_mul(4).saturating_add(scratch(args).0);
        let site = Site::create(&args.dir, wanted, args.link.as_ref())?;
        interrupt.check()?;
        say(format_args!("three workers are up after {} ms (run {})", started.elapsed().as_millis(), site.run()));
        Ok(Self { site, args, interrupt, drains: 0 })
    }

    /// How many orders the database is filled with.
    pub(crate) fn filled(&self) -> i64 {
        store::filled_orders(self.args.used)
    }

    /// Makes a volume on a worker.
    pub(crate) fn create_volume(&self, worker: u32, volume: &str) -> anyhow::Result<VolumeStatus> {
        let request = CreateVolume { volume: volume_id(volume), size: self.args.size, sector_size: 4096 };
        let made: Volume =
            self.site.worker(worker).agent().post("/v1/volumes", &request).map_err(refused("making the volume"))?;
        made.status.context("the new volume has no status")
    }

    /// Runs the order service under the name `machine` and waits until it serves.
    pub(crate) fn run_orders(&self, worker: u32, machine: &str, volume: Option<&str>) -> anyhow::Result<()> {
        let mut command = vec![INSIDE.to_owned(), "demo-orders".into(), "--listen".into(), format!("[::]:{PORT}")];
        if volume.is_some() {
            let (fill, scratch) = (self.args.used.0.to_string(), scratch(self.args).0.to_string());
            command.extend(["--data", "/data", "--fill", &fill, "--scratch", &scratch].map(str::to_owned));
        }
        self.run_machine(worker, machine, volume, command)?;
        self.wait_running(worker, machine)
    }

    /// Runs the order service on a new volume of the machine's name, waiting for its database; gives its `/data`.
    pub(crate) fn run_awaiting(&self, worker: u32, machine: &str) -> anyhow::Result<PathBuf> {
        self.create_volume(worker, machine)?;
        let words = [INSIDE, "demo-orders", "--listen", "[::]:8080", "--data", "/data", "--await-database"];
        self.run_machine(worker, machine, Some(machine), words.map(str::to_owned).to_vec())?;
        self.wait_data(worker, machine)
    }

    /// Waits until a machine has its `/data`.
    pub(crate) fn wait_data(&self, worker: u32, machine: &str) -> anyhow::Result<PathBuf> {
        let deadline = Instant::now() + SERVE_PATIENCE;
        loop {
            match self.data(worker, machine) {
                Ok(data) => return Ok(data),
                Err(error) if Instant::now() > deadline => return Err(error),
                Err(_) => self.interrupt.sleep(Duration::from_millis(5))?,
            }
        }
    }

    fn run_machine(
        &self,
        worker: u32,
        machine: &str,
        volume: Option<&str>,
        command: Vec<String>,
    ) -> anyhow::Result<()> {
        let health = Some(HealthCheck { port: PORT, http_path: Some("/health".to_owned()) });
        let spec = MachineSpec {
            id: machine_id(machine),
            command,
            env: Default::default(),
            uid: 65534,
            gid: 65534,
            volume: volume.map(volume_id),
            binds: vec![Bind { source: self.site.program().to_owned(), target: PathBuf::from(INSIDE) }],
            stop_signal: 15,
            stop_timeout_ms: 10_000,
            restart: RestartPolicy::Always,
            health,
            limits: Limits::default(),
            address_index: 0,
            group: None,
            needs: Default::default(),
        };
        let mut agent = self.site.worker(worker).agent();
        let _: Machine = agent.post("/v1/machines", &RunMachine { spec }).map_err(refused("running the machine"))?;
        Ok(())
    }

    /// Waits until a machine runs, its health check included.
    pub(crate) fn wait_running(&self, worker: u32, machine: &str) -> anyhow::Result<()> {
        let mut agent = self.site.worker(worker).agent();
        let at = path::machine(&machine_id(machine));
        let deadline = Instant::now() + SERVE_PATIENCE;
        loop {
            let seen: Machine = agent.get(&at).map_err(refused("looking at the machine"))?;
            match seen.state {
                MachineState::Running => return Ok(()),
                MachineState::Failed => {
                    bail!("machine {machine} does not start: {:?}\n{}", seen.why, self.machine_log(worker, machine))
                }
                _ => {}
            }
            ensure!(
                Instant::now() < deadline,
                "machine {machine} does not serve after {SERVE_PATIENCE:?} ({:?}, {:?})\n{}",
                seen.state,
                seen.why,
                self.machine_log(worker, machine)
            );
            self.interrupt.sleep(Duration::from_millis(20))?;
        }
    }

    fn machine_log(&self, worker: u32, machine: &str) -> String {
        let logs = self.site.worker(worker).agent().get::<decant_api::Logs>(&path::logs(&machine_id(machine), 20));
        logs.map_or_else(|failure| failure.body.to_string(), |logs| logs.text)
    }

    /// Waits until the client's proxy answers for a machine.
    pub(crate) fn wait_reachable(&self, port: u16) -> anyhow::Result<()> {
        let deadline = Instant::now() + SERVE_PATIENCE;
        let address = Site::proxy(port);
        loop {
            let answer = self.site.lab().enter(3, || {
                Connection::new(Address::Tcp(address), Duration::from_secs(1)).request("GET", "/health", "", b"")
            });
            if answer.as_ref().is_ok_and(|answer| answer.status == 200) {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "the proxy on worker-3 does not reach the machine: {answer:?}");
            self.interrupt.sleep(Duration::from_millis(20))?;
        }
    }

    /// Starts a stopped machine.
    pub(crate) fn start_machine(&self, worker: u32, machine: &str) -> anyhow::Result<()> {
        self.machine_action(worker, machine, "start")
    }

    /// Stops a machine and waits until it is down.
    pub(crate) fn stop_machine(&self, worker: u32, machine: &str) -> anyhow::Result<()> {
        self.machine_action(worker, machine, "stop")?;
        let mut agent = self.site.worker(worker).agent();
        let at = path::machine(&machine_id(machine));
        let deadline = Instant::now() + SERVE_PATIENCE;
        loop {
            let seen: Machine = agent.get(&at).map_err(refused("looking at the machine"))?;
            if seen.state == MachineState::Stopped {
                return Ok(());
            }
            ensure!(Instant::now() < deadline, "machine {machine} does not stop: {:?} {:?}", seen.state, seen.why);
            self.interrupt.sleep(Duration::from_millis(5))?;
        }
    }

    fn machine_action(&self, worker: u32, machine: &str, action: &str) -> anyhow::Result<()> {
        let at = path::machine_action(&machine_id(machine), action);
        let _: Machine = self.site.worker(worker).agent().post(&at, &Empty {}).map_err(refused(action))?;
        Ok(())
    }

    /// Stops and removes a machine, and its volume with it.
    pub(crate) fn remove_machine(&self, worker: u32, machine: &str) -> anyhow::Result<()> {
        self.stop_machine(worker, machine)?;
        let at = path::remove_machine(&machine_id(machine), true, false);
        self.site.worker(worker).agent().delete(&at).map_err(refused("removing the machine"))?;
        Ok(())
    }

    /// The volume as a worker sees it.
    pub(crate) fn volume(&self, worker: u32, volume: &str) -> anyhow::Result<Volume> {
        let at = path::volume(&volume_id(volume));
        self.site.worker(worker).agent().get(&at).map_err(refused("looking at the volume"))
    }

    /// The same, its data plane's part alone.
    pub(crate) fn volume_status(&self, worker: u32, volume: &str) -> anyhow::Result<VolumeStatus> {
        let seen = self.volume(worker, volume)?;
        seen.status.with_context(|| format!("volume {volume} has no status: {:?}", seen.problem))
    }

    /// Starts a client in worker-3's namespace.
    pub(crate) fn load(&self, port: u16, first: u64) -> anyhow::Result<Load> {
        let namespace = File::open(self.site.lab().netns(3)).context("opening worker-3's namespace")?;
        let filled = if port == TWIN_PORT { 0 } else { self.filled() };
        Load::start(LoadOptions { namespace, address: Site::proxy(port), filled, prefix: PREFIX.into(), first })
    }

    /// Starts a client of the order service.
    pub(crate) fn orders_load(&self, first: u64) -> anyhow::Result<Load> {
        self.wait_reachable(ORDERS_PORT)?;
        self.load(ORDERS_PORT, first)
    }

    /// Waits until the client has seen this many more writes, and reads where it reads. On a busy machine a
    /// tenth of them is enough once `enough` has passed.
    pub(crate) fn wait_load(&self, load: &Load, more: u64, enough: Duration) -> anyhow::Result<()> {
        let (writes, reads) = (load.acknowledged(), load.reads());
        let began = Instant::now();
        loop {
            let seen_reads = if load.has_reader() { load.reads() - reads } else { u64::MAX };
            let seen = (load.acknowledged() - writes).min(seen_reads);
            if seen >= more || (seen >= more / 10 && began.elapsed() >= enough) {
                return Ok(());
            }
            ensure!(
                began.elapsed() < enough + SERVE_PATIENCE,
                "the client got {} writes and {} reads answered in {:?}, fewer than expected",
                load.acknowledged() - writes,
                load.reads() - reads,
                began.elapsed()
            );
            self.interrupt.sleep(Duration::from_millis(10))?;
        }
    }

    /// Drains a worker with the product's own command, its progress shown, and returns what the agents say about it.
    pub(crate) fn drain(&mut self, from: u32, to: u32, machine: &str, reason: &str) -> anyhow::Result<Drained> {
        self.drains += 1;
        let id = DrainId::new(format!("demo-drain-{}", self.drains))?;
        let (source, destination) = (self.site.worker(from), self.site.worker(to));
        let protocol = self.args.protocol.to_string();
        let shown = if self.args.protocol == Protocol::Nbd { String::new() } else { format!(" --protocol {protocol}") };
        say(format_args!("$ decant drain {} --to {}{shown} --reason '{reason}'", source.name, destination.name));
        let mut command = Command::new(self.site.program());
        command.arg("--socket").arg(source.socket()).args([
            "drain",
            source.name.as_str(),
            "--to",
            destination.name.as_str(),
            "--id",
            id.as_str(),
            "--protocol",
            &protocol,
            "--reason",
            reason,
        ]);
        let status = super::say_there(&mut command)?.status().context("running decant drain")?;
        self.interrupt.check()?;
        ensure!(
            status.success(),
            "decant drain ended with {status}; the source's agent says:\n{}\nthe destination's:\n{}",
            self.site.log_tail(from, "agent", 15),
            self.site.log_tail(to, "agent", 15)
        );
        let drain: Drain = source.agent().get(&path::drain(&id)).map_err(refused("looking at the drain"))?;
        let moved = drain.machines.iter().find(|one| one.machine.as_str() == machine);
        let migration = moved.and_then(|one| one.migration.clone()).context("the drain did not move the machine")?;
        self.drained(drain, from, to, &migration)
    }

    fn drained(&self, drain: Drain, from: u32, to: u32, migration: &MigrationId) -> anyhow::Result<Drained> {
        let seen = |worker: u32| {
            let at = path::migration(migration);
            self.site.worker(worker).agent().get::<Migration>(&at).map_err(refused("looking at the migration"))
        };
        Ok(Drained { drain, source: seen(from)?, destination: seen(to)? })
    }

    /// Puts a drained worker back into placement.
    pub(crate) fn uncordon(&self, worker: u32) -> anyhow::Result<()> {
        let worker = self.site.worker(worker);
        let at = path::uncordon(&worker.name);
        let _: Worker = worker.agent().post(&at, &Empty {}).map_err(refused("uncordoning the worker"))?;
        Ok(())
    }

    /// `/data` of a running machine, as the host's root sees it.
    pub(crate) fn data(&self, worker: u32, machine: &str) -> anyhow::Result<PathBuf> {
        oracle::machine_data(&self.site.worker(worker).run_dir.join("netns").join(machine))
    }

    /// The database of a running machine, as a file that the host's root can open.
    pub(crate) fn database(&self, worker: u32, machine: &str) -> anyhow::Result<PathBuf> {
        Ok(self.data(worker, machine)?.join(super::orders::DATABASE))
    }
}

fn scratch(args: &DemoArgs) -> Bytes {
    Bytes(SCRATCH.0.min(args.size.0 / 4))
}
