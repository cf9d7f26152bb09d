//! Agents as tasks of this process.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::{AtomicU16, Ordering};
use std::time::Duration;

use decant_agent::client::{Client, TlsTarget};
use decant_agent::config::Config;
use decant_agent::tls::{Identity, TlsFiles};
use decant_agent::{Deps, Running, ca};
use decant_api::{Empty, Machine, MachineState, Migration, MoveMachine, path};
use decant_base::{MachineId, MigrationId, VolumeId, WorkerId};
use serde_json::json;

use crate::fake::world::{FakeMachines, FakePlane, World};

/// `text` as an id.
pub(crate) fn id<T: std::str::FromStr>(text: &str) -> T
where
    T::Err: std::fmt::Debug,
{
    text.parse().expect("a label")
}

/// Asks again until `check` gives something.
pub(crate) async fn retry_until<T, F: Future<Output = Option<T>>>(what: &str, mut check: impl FnMut() -> F) -> T {
    let patience = Duration::from_secs(25);
    let asking = async {
        let mut ticks = tokio::time::interval(Duration::from_millis(15));
        loop {
            ticks.tick().await;
            if let Some(found) = check().await {
                return found;
            }
        }
    };
    tokio::time::timeout(patience, asking).await.unwrap_or_else(|_| panic!("{what}: not within {patience:?}"))
}

/// An address of 127.0.0.0/8 that nobody else here uses.
fn loopback() -> std::net::Ipv4Addr {
    static FLEETS: AtomicU16 = AtomicU16::new(1);
    let [high, low] = FLEETS.fetch_add(1, Ordering::Relaxed).to_be_bytes();
    let [.., process] = std::process::id().to_be_bytes();
    std::net::Ipv4Addr::new(127, 64 | process >> 2, high, low)
}

/// Three workers.
pub(crate) struct Fleet {
    pub(crate) world: Arc<World>,
    agents: BTreeMap<String, Running>,
    configs: BTreeMap<String, PathBuf>,
    directory: tempfile::TempDir,
    today: (jiff::civil::Date, u32),
}

impl Fleet {
    /// Three agents that run.
    pub(crate) async fn start() -> Self {
        Self::start_behind(|_, address| address).await
    }

    /// Three agents; `front` says at which address the others reach each of them.
    pub(crate) async fn start_behind(front: impl Fn(&str, SocketAddr) -> SocketAddr) -> Self {
        // Journals are synced all the time; what is tested here is not the disk.
        let shm = Path::new("/dev/shm");
        let base = if shm.is_dir() { shm.to_owned() } else { std::env::temp_dir() };
        let directory = tempfile::Builder::new().prefix("decant-agents-").tempdir_in(base).expect("a directory");
        let today = (jiff::Zoned::now().date(), 30);
        ca::init(directory.path(), today.0).expect("an authority");
        // Ports are chosen by the kernel and free again when the agents want them: at an address of this fleet alone, so that no
        // connection of another fleet, which comes from 127.0.0.1, gets them meanwhile.
        let host = loopback();
        let names = ["worker-1", "worker-2", "worker-3"];
        let ports: Vec<std::net::TcpListener> =
            names.iter().map(|_| std::net::TcpListener::bind((host, 0)).expect("a port")).collect();
        let addresses: Vec<SocketAddr> = ports.iter().map(|port| port.local_addr().expect("an address")).collect();
        let fronts: Vec<SocketAddr> = names.iter().zip(&addresses).map(|(name, at)| front(name, *at)).collect();
        drop(ports);
        let mut fleet =
            Self { world: Arc::default(), agents: BTreeMap::new(), configs: BTreeMap::new(), directory, today };
        for (index, name) in names.iter().enumerate() {
            fleet.configure(name, index, addresses[index], &names, &fronts);
        }
        for name in names {
            fleet.boot(name).await;
        }
        fleet
    }

    fn configure(&mut self, name: &str, index: usize, listen: SocketAddr, names: &[&str], fronts: &[SocketAddr]) {
        let directory = self.directory.path();
        ca::issue(directory, directory, &id(name), &[], self.today).expect("a certificate");
        let mut text = format!(
            "worker = \"{name}\"\nworker_index = {}\nstate_dir = \"{name}/state\"\nrun_dir = \"{name}/run\"\n\
             listen = \"{listen}\"\ndata_listen = \"127.0.0.1:0\"\n[tls]\nca = \"ca.pem\"\ncert = \"{name}.pem\"\n\
             key = \"{name}.key\"\n[keys]\nsource = \"keyring\"\n",
            index + 1
        );
        for (other, front) in names.iter().zip(fronts).filter(|(other, _)| **other != name) {
            let index = names.iter().position(|known| known == other).expect("it is there") + 1;
            text += &format!("[[peers]]\nworker = \"{other}\"\nworker_index = {index}\naddress = \"{front}\"\n");
        }
        let path = directory.join(format!("{name}.toml"));
        std::fs::write(&path, text).expect("written");
        self.configs.insert(name.to_owned(), path);
    }

    /// Starts an agent.
    pub(crate) async fn boot(&mut self, name: &str) {
        let deps = Deps {
            plane: Arc::new(FakePlane { world: self.world.clone(), worker: name.to_owned() }),
            machines: Arc::new(FakeMachines { world: self.world.clone(), worker: name.to_owned() }),
        };
        let config = Config::load(&self.configs[name]).expect("a good configuration");
        let running = Running::start(config, deps).await.unwrap_or_else(|error| panic!("{name}: {error}"));
        self.agents.insert(name.to_owned(), running);
    }

    /// Ends an agent as a crash would: what it does is not waited for, and nobody hears of it.
    pub(crate) async fn crash(&mut self, name: &str) {
        if let Some(agent) = self.agents.remove(name) {
            agent.stop().await;
        }
    }

    /// The configuration of a worker, to change it.
    pub(crate) fn config(&self, name: &str) -> Config {
        Config::load(&self.configs[name]).expect("a good configuration")
    }

    /// Root's client of a worker.
    pub(crate) fn client(&self, name: &str) -> Client {
        Client::unix(self.directory.path().join(name).join("run/agent.sock"))
    }

    /// A client of `to` that shows the certificate of `from`, made by the authority in `ca`.
    pub(crate) fn peer_client(&self, ca: &Path, from: &str, to: &str, expect: &str) -> Client {
        let directory = ca.join("clients");
        let made = ca::issue(ca, &directory.join(from), &id(from), &[], self.today).expect("a certificate");
        let files = TlsFiles { ca: self.directory.path().join("ca.pem"), cert: made.cert, key: made.key };
        let identity = Identity::load(&files, &id(from)).expect("an identity");
        let address = self.config(to).listen.to_string();
        Client::tls(TlsTarget { address, worker: id::<WorkerId>(expect), config: identity.client })
    }

    /// Where the authority is.
    pub(crate) fn directory(&self) -> &Path {
        self.directory.path()
    }

    /// Runs a machine on worker-1, with a volume of its own if wanted, and waits until it runs.
    pub(crate) async fn run(&self, name: &str, stateful: bool) -> MachineId {
        let client = self.client("worker-1");
        let machine: MachineId = id(name);
        let mut spec = json!({ "id": name, "command": ["/bin/true"], "address_index": 0 });
        if stateful {
            let volume: VolumeId = id(&format!("{name}-data"));
            let request = json!({ "volume": volume, "size": 64 << 20 });
            client
                .post::<decant_api::Volume>(&path::volumes(decant_api::Scope::Fleet), &request)
                .await
                .expect("a volume");
            spec["volume"] = json!(volume);
        }
        client.post::<Machine>("/v1/machines", &json!({ "spec": spec })).await.expect("it is taken");
        self.wait_running("worker-1", &machine).await;
        machine
    }

    /// Waits until `worker` says that it owns and runs the machine.
    pub(crate) async fn wait_running(&self, worker: &str, machine: &MachineId) -> Machine {
        let client = self.client(worker);
        retry_until(&format!("{machine} runs on {worker}"), || async {
            let view = client.get::<Machine>(&path::machine(machine)).await.ok()?;
            (view.worker.as_str() == worker && view.state == MachineState::Running).then_some(view)
        })
        .await
    }

    /// Orders a move from worker-1 to worker-2.
    pub(crate) async fn start_move(&self, machine: &MachineId, migration: &str) -> MigrationId {
        let migration: MigrationId = id(migration);
        let request =
            MoveMachine { to: Some(id("worker-2")), migration: Some(migration.clone()), ..MoveMachine::default() };
        let order = path::machine_action(machine, "move");
        let client = self.client("worker-1");
        retry_until("the move is taken", || async { client.post::<Migration>(&order, &request).await.ok() }).await;
        migration
    }

    /// Waits until the migration is over, and says how it ended.
    pub(crate) async fn wait_over(&self, migration: &MigrationId) -> Migration {
        let client = self.client("worker-1");
        retry_until(&format!("{migration} is over"), || async {
            let view = client.get::<Migration>(&path::migration(migration)).await.ok()?;
            view.phase.is_final().then_some(view)
        })
        .await
    }

    /// Cancels a migration; whether that was still possible.
    pub(crate) async fn cancel(&self, migration: &MigrationId) -> bool {
        self.client("worker-1").post::<Migration>(&path::cancel_migration(migration), &Empty {}).await.is_ok()
    }

    /// Exactly one worker runs the machine, no write is lost, and nothing happened on the way that must not.
    pub(crate) fn assert_sound(&self, machine: &MachineId, worker: &str, about: &str) {
        assert_eq!(self.world.violations(), Vec::<String>::new(), "{about}");
        assert_eq!(self.world.runners(machine), [worker], "{about}");
    }
}
