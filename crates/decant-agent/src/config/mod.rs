//! `worker.toml`: raw as written, then resolved once: typed, no options, relative paths made absolute.

mod raw;

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use decant_base::{Bytes, MachineId, WorkerId};
use ipnet::IpNet;

use crate::tls::TlsFiles;

/// A worker's configuration.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Config {
    /// Its name, unique in the fleet and the name in its certificate.
    pub worker: WorkerId,
    /// The worker field of its machines' addresses, unique in the fleet.
    pub worker_index: u32,
    /// Where it is, for people.
    pub region: String,
    /// What must survive a reboot: journal, volumes, logs.
    pub state_dir: PathBuf,
    /// What must not: sockets, status files.
    pub run_dir: PathBuf,
    /// Where peers reach the agent.
    pub listen: SocketAddr,
    /// Where peers reach exports; port 0 lets each export choose and keep one.
    pub data_listen: SocketAddr,
    /// For placement.
    pub labels: BTreeMap<String, String>,
    /// Machines it takes at most.
    pub max_machines: u64,
    /// Bytes of volumes it takes at most, sealed copies included.
    pub max_bytes: Bytes,
    /// Its certificates.
    pub tls: TlsFiles,
    /// LUKS2 header bytes of volumes made here: 4 MiB or 16 MiB.
    pub luks_header: Bytes,
    /// Where passphrases come from.
    pub keys: KeySource,
    /// The network field of its machines' addresses.
    pub network: u32,
    /// How moves are done.
    pub drain: Drain,
    /// Networks on which volumes may travel over iSCSI; none by default.
    pub iscsi_trusted: Vec<IpNet>,
    /// The other workers of the fleet.
    pub peers: Vec<Peer>,
    /// What the worker's proxy does.
    pub proxy: Proxy,
    /// The program whose subcommands are started as keeper, volume process and shim; this program itself if `None` was
    /// written, resolved when the agent starts.
    pub program: Option<PathBuf>,
}

impl Config {
    /// The API's socket.
    pub fn socket(&self) -> PathBuf {
        self.run_dir.join("agent.sock")
    }

    /// The peer called `worker`.
    pub fn peer(&self, worker: &WorkerId) -> Option<&Peer> {
        self.peers.iter().find(|peer| peer.worker == *worker)
    }

    /// The address field of `worker`, this one or a peer.
    pub fn index_of(&self, worker: &WorkerId) -> Option<u32> {
        if *worker == self.worker {
            return Some(self.worker_index);
        }
        self.peer(worker).map(|peer| peer.worker_index)
    }
}

/// Another worker.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Peer {
    /// Its name, which its certificate must carry.
    pub worker: WorkerId,
    /// The worker field of its machines' addresses.
    pub worker_index: u32,
    /// Where its agent listens.
    pub address: SocketAddr,
}

/// How moves are done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Drain {
    /// Machines of this worker that move at the same time in a drain, unless the drain says otherwise.
    pub max_migrations: u32,
    /// How long a sealed copy is kept after the destination verified everything.
    pub retention: Duration,
    /// How long preparing may take before a migration goes back; the machine runs all the while.
    pub prepare_timeout: Duration,
    /// How long stopping and sealing may take before a migration goes back and the machine starts again. It must be longer
    /// than the machines' own stop timeouts.
    pub stop_timeout: Duration,
}

/// Where passphrases come from.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum KeySource {
    /// `directory/<volume>.key`, mode 0600.
    File {
        /// Which directory.
        directory: PathBuf,
    },
    /// A program that prints it; `{volume}` in an argument is replaced.
    Command {
        /// Program and arguments.
        command: Vec<String>,
    },
    /// The kernel's keyring: user key `decant:<volume>`.
    Keyring,
}

/// What the worker's proxy does.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Proxy {
    /// The ports it serves.
    pub services: Vec<ProxyService>,
    /// Connections that may wait for their machine at the same time.
    pub max_parked: usize,
    /// How long each may.
    pub park_timeout: Duration,
    /// Connections carried at a time, parked ones included.
    pub max_connections: usize,
}

/// A port of the proxy.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ProxyService {
    /// Where clients connect.
    pub listen: SocketAddr,
    /// The machine behind it.
    pub machine: MachineId,
    /// The port at the machine's address.
    pub port: u16,
}

/// A configuration cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum ConfigError {
    /// The file cannot be read.
    #[error("cannot read {}: {source}\n  fix: name the worker's configuration with --config", path.display())]
    Read {
        /// Which.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// It is no TOML, has a key that does not exist, lacks one, or one has the wrong type.
    #[error("{}: {source}  fix: compare with the reference in docs/agent.md", path.display())]
    Syntax {
        /// Which.
        path: PathBuf,
        /// Line, column and cause.
        #[source]
        source: Box<toml::de::Error>,
    },
    /// A value cannot be used.
    #[error("{}: key `{key}`: {cause}\n  fix: {fix}", path.display())]
    Value {
        /// Which file.
        path: PathBuf,
        /// The key, with its table.
        key: String,
        /// What is wrong with its value.
        cause: String,
        /// What to write instead.
        fix: String,
    },
}

impl Config {
    /// Reads and resolves `path`.
    pub fn load(path: &Path) -> Result<Self, ConfigError> {
        let text =
            std::fs::read_to_string(path).map_err(|source| ConfigError::Read { path: path.to_owned(), source })?;
        Self::parse(&text, path)
    }

    /// Resolves `text`. `path` is where it came from: relative paths in it start at its directory.
    pub fn parse(text: &str, path: &Path) -> Result<Self, ConfigError> {
        let raw: raw::Config = toml::from_str(text)
            .map_err(|source| ConfigError::Syntax { path: path.to_owned(), source: Box::new(source) })?;
        raw::resolve(raw, path.parent().unwrap_or(Path::new("."))).map_err(|wrong| ConfigError::Value {
            path: path.to_owned(),
            key: wrong.key,
            cause: wrong.cause,
            fix: wrong.fix,
        })
    }
}

#[cfg(test)]
mod tests;
