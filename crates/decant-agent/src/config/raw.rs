//! The file as it is written, and what is checked when it is resolved.

use std::collections::{BTreeMap, BTreeSet};
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use decant_base::{Bytes, MachineId, WorkerId};
use ipnet::IpNet;
use serde::Deserialize;

use crate::config::{self, KeySource};
use crate::tls::TlsFiles;

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Config {
    worker: WorkerId,
    worker_index: u32,
    #[serde(default)]
    region: String,
    state_dir: PathBuf,
    run_dir: PathBuf,
    listen: SocketAddr,
    data_listen: SocketAddr,
    #[serde(default)]
    labels: BTreeMap<String, String>,
    #[serde(default)]
    capacity: Capacity,
    tls: Tls,
    #[serde(default)]
    luks: Luks,
    keys: Keys,
    #[serde(default)]
    network: Network,
    #[serde(default)]
    drain: Drain,
    #[serde(default)]
    iscsi: Iscsi,
    #[serde(default)]
    peers: Vec<Peer>,
    #[serde(default)]
    proxy: Proxy,
    program: Option<PathBuf>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Capacity {
    machines: Option<u64>,
    bytes: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Tls {
    ca: PathBuf,
    cert: PathBuf,
    key: PathBuf,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Luks {
    header: Option<String>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields, tag = "source", rename_all = "snake_case")]
enum Keys {
    File { directory: PathBuf },
    Command { command: Vec<String> },
    Keyring,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Network {
    id: Option<u32>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Drain {
    max_migrations: Option<u32>,
    retention: Option<String>,
    prepare_timeout: Option<String>,
    stop_timeout: Option<String>,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Iscsi {
    #[serde(default)]
    trusted_networks: Vec<IpNet>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Peer {
    worker: WorkerId,
    worker_index: u32,
    address: SocketAddr,
}

#[derive(Debug, Default, Deserialize)]
#[serde(deny_unknown_fields)]
struct Proxy {
    max_parked: Option<usize>,
    max_connections: Option<usize>,
    park_timeout: Option<String>,
    #[serde(default)]
    services: Vec<Service>,
}

#[derive(Debug, Deserialize)]
#[serde(deny_unknown_fields)]
struct Service {
    listen: SocketAddr,
    machine: MachineId,
    port: u16,
}

/// A value that cannot be used.
pub(super) struct Wrong {
    pub(super) key: String,
    pub(super) cause: String,
    pub(super) fix: String,
}

fn wrong(key: impl Into<String>, cause: impl Into<String>, fix: impl Into<String>) -> Wrong {
    Wrong { key: key.into(), cause: cause.into(), fix: fix.into() }
}

/// Types, defaults and what must hold between keys. `base` is where relative paths start.
pub(super) fn resolve(raw: Config, base: &Path) -> Result<config::Config, Wrong> {
    check_fleet(&raw)?;
    if raw.data_listen.ip().is_unspecified() {
        return Err(wrong(
            "data_listen",
            format!("{} is no address that a peer can connect to", raw.data_listen.ip()),
            "write the address of this worker that the peers reach, e.g. \"[fdde::1]:0\"",
        ));
    }
    Ok(config::Config {
        worker: raw.worker,
        worker_index: raw.worker_index,
        region: raw.region,
        state_dir: base.join(raw.state_dir),
        run_dir: base.join(raw.run_dir),
        listen: raw.listen,
        data_listen: raw.data_listen,
        labels: raw.labels,
        max_machines: raw.capacity.machines.unwrap_or(64),
        max_bytes: size("capacity.bytes", raw.capacity.bytes, Bytes(1 << 50))?,
        tls: TlsFiles { ca: base.join(raw.tls.ca), cert: base.join(raw.tls.cert), key: base.join(raw.tls.key) },
        luks_header: luks_header(raw.luks.header)?,
        keys: keys(raw.keys, base)?,
        network: raw.network.id.unwrap_or(1),
        drain: drain(raw.drain)?,
        iscsi_trusted: raw.iscsi.trusted_networks,
        peers: raw
            .peers
            .into_iter()
            .map(|peer| config::Peer { worker: peer.worker, worker_index: peer.worker_index, address: peer.address })
            .collect(),
        proxy: proxy(raw.proxy)?,
        program: raw.program.map(|program| base.join(program)),
    })
}

/// Names and indexes must be unique in the fleet: two workers with one index would have machines with one address.
fn check_fleet(raw: &Config) -> Result<(), Wrong> {
    let mut names = BTreeSet::from([&raw.worker]);
    let mut indexes = BTreeMap::from([(raw.worker_index, &raw.worker)]);
    for (position, peer) in raw.peers.iter().enumerate() {
        let key = |field: &str| format!("peers[{position}].{field}");
        if !names.insert(&peer.worker) {
            let cause = format!("{} is named twice", peer.worker);
            return Err(wrong(key("worker"), cause, "list every other worker once, and not this one"));
        }
        if let Some(other) = indexes.insert(peer.worker_index, &peer.worker) {
            let cause = format!("{} is the index of {other} already", peer.worker_index);
            return Err(wrong(key("worker_index"), cause, "give every worker of the fleet its own index"));
        }
    }
    Ok(())
}

fn size(key: &str, text: Option<String>, default: Bytes) -> Result<Bytes, Wrong> {
    let Some(text) = text else { return Ok(default) };
    Bytes::parse(&text).map_err(|error| wrong(key, error.to_string(), "write a size such as \"1TiB\""))
}

fn luks_header(text: Option<String>) -> Result<Bytes, Wrong> {
    let header = size("luks.header", text, Bytes::mib(16))?;
    if header != Bytes::mib(4) && header != Bytes::mib(16) {
        let cause = format!("a header of {header} is not made here");
        return Err(wrong("luks.header", cause, "write \"4MiB\" or \"16MiB\"; what peers use does not matter"));
    }
    Ok(header)
}

fn keys(raw: Keys, base: &Path) -> Result<KeySource, Wrong> {
    match raw {
        Keys::File { directory } => Ok(KeySource::File { directory: base.join(directory) }),
        Keys::Command { command } if command.is_empty() => {
            Err(wrong("keys.command", "no program is named", "write e.g. command = [\"vault-read\", \"{volume}\"]"))
        }
        Keys::Command { command } => Ok(KeySource::Command { command }),
        Keys::Keyring => Ok(KeySource::Keyring),
    }
}

fn drain(raw: Drain) -> Result<config::Drain, Wrong> {
    let max_migrations = raw.max_migrations.unwrap_or(2);
    if max_migrations == 0 {
        return Err(wrong("drain.max_migrations", "0 machines at a time never end", "write at least 1"));
    }
    Ok(config::Drain {
        max_migrations,
        retention: duration("drain.retention", raw.retention, Duration::from_secs(24 * 3600))?,
        prepare_timeout: duration("drain.prepare_timeout", raw.prepare_timeout, Duration::from_secs(300))?,
        stop_timeout: duration("drain.stop_timeout", raw.stop_timeout, Duration::from_secs(60))?,
    })
}

fn proxy(raw: Proxy) -> Result<config::Proxy, Wrong> {
    let mut listens = BTreeSet::new();
    for (position, service) in raw.services.iter().enumerate() {
        if !listens.insert(service.listen) {
            let cause = format!("{} is used by another service", service.listen);
            return Err(wrong(format!("proxy.services[{position}].listen"), cause, "give every service its own port"));
        }
    }
    let service = |service: Service| config::ProxyService {
        listen: service.listen,
        machine: service.machine,
        port: service.port,
    };
    Ok(config::Proxy {
        services: raw.services.into_iter().map(service).collect(),
        max_parked: raw.max_parked.unwrap_or(1024),
        max_connections: raw.max_connections.unwrap_or(4096),
        park_timeout: duration("proxy.park_timeout", raw.park_timeout, Duration::from_secs(30))?,
    })
}

fn duration(key: &str, text: Option<String>, default: Duration) -> Result<Duration, Wrong> {
    let Some(text) = text else { return Ok(default) };
    parse_duration(&text).ok_or_else(|| {
        wrong(key, format!("{text:?} is no duration"), "write a number with ms, s, m, h or d, e.g. \"24h\"")
    })
}

fn parse_duration(text: &str) -> Option<Duration> {
    let text = text.trim();
    let digits = text.find(|c: char| !c.is_ascii_digit())?;
    let (number, unit) = text.split_at(digits);
    let number: u64 = number.parse().ok()?;
    let milliseconds = match unit.trim() {
        "ms" => 1,
        "s" => 1_000,
        "m" => 60_000,
        "h" => 3_600_000,
        "d" => 86_400_000,
        _ => return None,
    };
    number.checked_mul(milliseconds).map(Duration::from_millis)
}
