//! Where a worker's volumes live and what the plane needs to know of the worker.

use std::net::SocketAddr;
use std::path::{Path, PathBuf};

use decant_base::{Bytes, VolumeId, WorkerId};
use ipnet::IpNet;
use serde::{Deserialize, Serialize};

use crate::keys::KeySource;
use crate::loopdev;

/// What the plane is told about its worker. It carries no secret: it goes to keepers over a pipe.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct SiteConfig {
    /// The worker's name.
    pub worker: WorkerId,
    /// Kept over a restart of the host: `volumes/<volume>/`.
    pub state_dir: PathBuf,
    /// Gone with a restart of the host: sockets and logs.
    pub run_dir: PathBuf,
    /// The address that exports listen on; its port, usually 0, is where the first export of a volume tries.
    pub data_listen: SocketAddr,
    /// Networks on which exports may be served and read over iSCSI.
    pub iscsi_trusted: Vec<IpNet>,
    /// For exports and for connections to the exports of others.
    pub tls: TlsFiles,
    /// LUKS2 header bytes of volumes made here: 4 MiB or 16 MiB.
    pub header: Bytes,
    /// Where passphrases come from.
    pub keys: KeySource,
    /// The program that has the subcommands `keeper` and `volume`.
    pub exe: PathBuf,
}

/// Mutual TLS between workers.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct TlsFiles {
    /// Certificates of the authority that signs workers' certificates, PEM.
    pub ca: PathBuf,
    /// This worker's certificate, PEM.
    pub cert: PathBuf,
    /// Its private key, PEM.
    pub key: PathBuf,
}

impl TlsFiles {
    /// As [`crate::tls`] reads them.
    pub fn paths(&self) -> crate::tls::Paths {
        crate::tls::Paths { ca: self.ca.clone(), cert: self.cert.clone(), key: self.key.clone() }
    }
}

impl SiteConfig {
    /// Where the files of all volumes are.
    pub fn volumes_dir(&self) -> PathBuf {
        self.state_dir.join("volumes")
    }

    /// The files of `volume`.
    pub fn paths(&self, volume: &VolumeId) -> VolumePaths {
        let state = self.volumes_dir().join(volume.as_str());
        let run = self.run_dir.join("volumes").join(volume.as_str());
        VolumePaths { state, run }
    }

    /// What the loop device of `volume` is called.
    pub fn device_name(&self, volume: &VolumeId) -> loopdev::Name {
        // The directory as it is on disk: two spellings of one directory are one worker.
        let state_dir = self.state_dir.canonicalize().unwrap_or_else(|_| self.state_dir.clone());
        loopdev::Name::new(self.worker.as_str(), volume.as_str(), &state_dir)
    }
}

/// Paths of one volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct VolumePaths {
    /// The directory in `state_dir`.
    pub state: PathBuf,
    /// The directory in `run_dir`.
    pub run: PathBuf,
}

impl VolumePaths {
    /// LUKS2 header and ciphertext, sparse.
    pub fn image(&self) -> PathBuf {
        self.state.join("volume.img")
    }

    /// A clone's map.
    pub fn map(&self) -> PathBuf {
        self.state.join("volume.map")
    }

    /// Metadata, see [`crate::metadata`].
    pub fn metadata(&self) -> PathBuf {
        self.state.join("volume.json")
    }

    /// Where the keeper answers the agent.
    pub fn socket(&self) -> PathBuf {
        self.run.join("keeper.sock")
    }

    /// Locked by the keeper for its whole life.
    pub fn lock(&self) -> PathBuf {
        self.run.join("keeper.lock")
    }

    /// Error stream of `name`, `keeper` or `volume`.
    pub fn log(&self, name: &str) -> PathBuf {
        self.run.join(format!("{name}.log"))
    }
}

/// Makes `directory` and what is missing above it, for its owner alone.
///
/// # Errors
/// What the file system says.
pub fn make_private_dir(directory: &Path) -> std::io::Result<()> {
    use std::os::unix::fs::DirBuilderExt;
    std::fs::DirBuilder::new().recursive(true).mode(0o700).create(directory)
}
