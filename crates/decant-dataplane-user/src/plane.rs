//! The userspace data plane: every [`Command`] as requests to a volume's keeper and changes of its metadata.
//!
//! Order of a change: what must not be forgotten is in `volume.json` before the outcome is told; what `volume.json` says is
//! true of the files beside it. Every command can be performed again after a crash at any point between: it looks at what
//! is there (metadata, a living keeper) and does what is left.
//!
//! Changes that lie between a machine's stop and its start are written behind the outcome: `sealed`, whose truth is the
//! agent's journal (a volume found whole is sealed again), `clone`, whose truth is the map, durable before `Begin` is
//! answered (a prepared volume with a map is a clone), and limit and policy, which can be given again.
//!
//! | `volume.json` | files | keeper |
//! |---|---|---|
//! | creating, preparing | half-made: made anew or removed | perhaps |
//! | whole | header and ciphertext | while attached or exporting |
//! | prepared | header, an empty payload | once assembled |
//! | clone | payload that fills, `volume.map` | while attached |
//! | sealed | payload that no one writes | while exporting |
//! | freed | none but `volume.json` | no |

use std::collections::HashMap;
use std::net::IpAddr;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use decant_base::{Bytes, VolumeId};
use decant_dataplane::{Command, Failure, FailureCode, MissingPolicy, Outcome, Plane, Promises, VolumeState};

use crate::control::{CloneWork, KeeperReply, KeeperRequest, KeeperStatus, VolumeReply, VolumeRequest, Work};
use crate::metadata::{Metadata, MetadataError, State};
use crate::site::{SiteConfig, VolumePaths, make_private_dir};
use crate::tls::Identity;

mod destination;
mod host;
mod source;
mod whole;

/// The plane of one worker.
pub struct UserPlane {
    site: SiteConfig,
    /// SHA-256 fingerprint of this worker's certificate.
    certificate: String,
    /// Held while a `volume.json` is read, changed and written: limits and policies change under running commands.
    metadata: Arc<Mutex<Unwritten>>,
}

/// Metadata on its way to disk.
type Unwritten = HashMap<VolumeId, Metadata>;

fn failure(code: FailureCode, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into() }
}

fn refused(message: impl Into<String>) -> Failure {
    failure(FailureCode::Refused, message)
}

impl From<MetadataError> for Failure {
    fn from(error: MetadataError) -> Self {
        let code = match &error {
            MetadataError::Io { .. } => FailureCode::Retry,
            MetadataError::Damaged { .. } | MetadataError::Version { .. } => FailureCode::Stuck,
        };
        failure(code, error.to_string())
    }
}

impl UserPlane {
    /// The plane of `site`. Makes its directories.
    ///
    /// # Errors
    /// When they cannot be made, or the worker's certificate cannot be read.
    pub fn new(mut site: SiteConfig) -> Result<Self, Failure> {
        for directory in [site.volumes_dir(), site.run_dir.join("volumes")] {
            make_private_dir(&directory)
                .map_err(|error| refused(format!("{} cannot be made: {error}", directory.display())))?;
        }
        // Keepers have another working directory, and a loop device's name is made of this path.
        for directory in [&mut site.state_dir, &mut site.run_dir] {
            *directory = directory
                .canonicalize()
                .map_err(|error| refused(format!("{} cannot be used: {error}", directory.display())))?;
        }
        let identity = Identity::load(&site.tls.paths())
            .map_err(|error| refused(format!("this worker's certificate cannot be used: {error}")))?;
        Ok(Self { certificate: identity.fingerprint().to_string(), site, metadata: Arc::default() })
    }

    /// Whether all of `addresses` are on networks where blocks may travel over iSCSI.
    fn check_trusted(&self, addresses: &[IpAddr]) -> Result<(), Failure> {
        let trusted = &self.site.iscsi_trusted;
        let stranger = addresses.iter().find(|address| !trusted.iter().any(|network| network.contains(*address)));
        let Some(stranger) = stranger else { return Ok(()) };
        let worker = &self.site.worker;
        Err(refused(format!(
            "worker {worker} does not trust the network of {stranger} with iSCSI, where CHAP authenticates a login and nothing after it; \
             name the network in iscsi.trusted_networks of {worker}, or move over nbd"
        )))
    }

    /// SHA-256 fingerprint, hex, of this worker's certificate: the `certificate` of readers here.
    pub fn certificate(&self) -> &str {
        &self.certificate
    }

    fn paths(&self, volume: &VolumeId) -> VolumePaths {
        self.site.paths(volume)
    }

    fn unwritten(&self) -> MutexGuard<'_, Unwritten> {
        self.metadata.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn load(&self, volume: &VolumeId) -> Result<Option<Metadata>, Failure> {
        self.load_under(&self.unwritten(), volume)
    }

    fn load_under(&self, unwritten: &Unwritten, volume: &VolumeId) -> Result<Option<Metadata>, Failure> {
        if let Some(metadata) = unwritten.get(volume) {
            return Ok(Some(metadata.clone()));
        }
        let paths = self.paths(volume);
        let mut metadata = Metadata::load(&paths)?;
        if let Some(Metadata { state, .. }) = &mut metadata
            && let State::Prepared { migration, origin: Some(origin), room, .. } = &*state
            && paths.map().exists()
        {
            // It was begun, and a power cut came before that was written here.
            *state = State::Clone { migration: migration.clone(), origin: origin.clone(), room: *room };
        }
        Ok(metadata)
    }

    fn need(&self, volume: &VolumeId) -> Result<Metadata, Failure> {
        self.load(volume)?.ok_or_else(|| self.unknown(volume))
    }

    fn unknown(&self, volume: &VolumeId) -> Failure {
        let worker = &self.site.worker;
        refused(format!("worker {worker} has no volume {volume}; `decant volume list` shows those it has"))
    }

    /// Changes the metadata durably; returns what it is then.
    fn update(&self, volume: &VolumeId, change: impl FnOnce(&mut Metadata)) -> Result<Metadata, Failure> {
        let mut unwritten = self.unwritten();
        let (metadata, changed) = self.changed(&unwritten, volume, change)?;
        if changed || unwritten.contains_key(volume) {
            metadata.store(&self.paths(volume))?;
            unwritten.remove(volume);
        }
        Ok(metadata)
    }

    /// Changes the metadata for everyone here at once, on disk a little later.
    fn update_soon(&self, volume: &VolumeId, change: impl FnOnce(&mut Metadata)) -> Result<(), Failure> {
        let mut unwritten = self.unwritten();
        let (metadata, changed) = self.changed(&unwritten, volume, change)?;
        if !changed {
            return Ok(());
        }
        unwritten.insert(volume.clone(), metadata);
        drop(unwritten);
        let (all, volume, paths) = (Arc::clone(&self.metadata), volume.clone(), self.paths(volume));
        let write = move || {
            let mut unwritten = all.lock().unwrap_or_else(PoisonError::into_inner);
            // Perhaps written, or changed again, in the meantime.
            let Some(metadata) = unwritten.get(&volume) else { return };
            match metadata.store(&paths) {
                Ok(()) => drop(unwritten.remove(&volume)),
                Err(error) => tracing::error!(%volume, %error, "metadata is not written; the next change tries again"),
            }
        };
        let spawned = std::thread::Builder::new().name("metadata".into()).spawn(write);
        spawned.map(drop).map_err(|error| failure(FailureCode::Retry, format!("no thread to write metadata: {error}")))
    }

    fn changed(
        &self,
        unwritten: &Unwritten,
        volume: &VolumeId,
        change: impl FnOnce(&mut Metadata),
    ) -> Result<(Metadata, bool), Failure> {
        let before = self.load_under(unwritten, volume)?.ok_or_else(|| self.unknown(volume))?;
        let mut metadata = before.clone();
        change(&mut metadata);
        let changed = metadata != before;
        Ok((metadata, changed))
    }

    /// Writes the metadata of a volume that is being made.
    fn lay_out(&self, volume: &VolumeId, metadata: &Metadata) -> Result<(), Failure> {
        let paths = self.paths(volume);
        make_private_dir(&paths.state)
            .and_then(|()| std::fs::File::open(self.site.volumes_dir())?.sync_all())
            .map_err(|error| {
                failure(FailureCode::Retry, format!("{} cannot be made: {error}", paths.state.display()))
            })?;
        self.unwritten().remove(volume);
        Ok(metadata.store(&paths)?)
    }

    /// Removes all files of a volume, durably: whoever hears that they are gone forgets the volume, and after a power cut nobody would
    /// remove what came back, which stands in the way of the next volume of that name. Its keeper is gone.
    fn remove_files(&self, volume: &VolumeId) -> Result<(), Failure> {
        let paths = self.paths(volume);
        self.unwritten().remove(volume);
        // The metadata last: without it nothing knows of the rest.
        for path in [paths.image(), paths.map(), paths.state.clone(), paths.run.clone()] {
            let removed = if path.is_dir() { std::fs::remove_dir_all(&path) } else { std::fs::remove_file(&path) };
            match removed {
                Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                    let message = format!("{} cannot be removed: {error}", path.display());
                    return Err(failure(FailureCode::Retry, message));
                }
                _ => {}
            }
        }
        self.sync_removal(volume)
    }

    /// What was removed so far, perhaps by a process that died over it, stays removed.
    fn sync_removal(&self, volume: &VolumeId) -> Result<(), Failure> {
        let directory = self.site.volumes_dir();
        std::fs::File::open(&directory).and_then(|directory| directory.sync_all()).map_err(|error| {
            let message = format!("volume {volume} is not durably removed from {}: {error}", directory.display());
            failure(FailureCode::Retry, message)
        })
    }

    fn perform_status(&self, volume: &VolumeId) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        let kept = self.keeper(volume, &KeeperRequest::Status);
        let device = kept.as_ref().and_then(|kept| kept.device.clone());
        let state = match &metadata.state {
            State::Creating | State::Preparing { .. } | State::Prepared { .. } => VolumeState::Prepared,
            State::Whole if device.is_some() => VolumeState::Attached,
            State::Whole => VolumeState::Detached,
            State::Clone { .. } => VolumeState::Hydrating,
            State::Sealed { .. } => VolumeState::Sealed,
            State::Freed => VolumeState::Freed,
        };
        let noted = std::fs::read_to_string(crate::engine::beside(&self.paths(volume).map(), "failed")).ok();
        let running = kept.as_ref().and_then(|kept| kept.volume.as_ref());
        let failed = running.and_then(|volume| volume.failed.clone()).or(noted);
        Ok(Outcome::Status(Box::new(decant_dataplane::VolumeStatus {
            volume: volume.clone(),
            state,
            geometry: metadata.geometry,
            header_bytes: metadata.header,
            allocated: host::allocated(&self.paths(volume).image(), metadata.header),
            epoch: metadata.epoch,
            device,
            clone: running.and_then(|volume| volume.clone.clone()),
            failed: failed.or_else(|| kept.and_then(|kept| kept.trouble)),
        })))
    }

    fn limit(&self, volume: &VolumeId, rate: Option<Bytes>) -> Result<Outcome, Failure> {
        self.update_soon(volume, |metadata| metadata.limit = rate)?;
        self.tell(volume, VolumeRequest::Limit { rate })
    }

    fn policy(&self, volume: &VolumeId, policy: MissingPolicy) -> Result<Outcome, Failure> {
        // Set and set back around each stop of a machine: not a matter of waiting for the disk.
        self.update_soon(volume, |metadata| metadata.policy = policy)?;
        self.tell(volume, VolumeRequest::Policy { policy })
    }

    /// Tells a running volume process what its successors will read in the metadata.
    fn tell(&self, volume: &VolumeId, request: VolumeRequest) -> Result<Outcome, Failure> {
        if self.kept(volume).is_some_and(|kept| kept.work.is_some()) {
            self.ask_volume(volume, request)?;
        }
        Ok(Outcome::Done)
    }

    // ---- keepers ----

    fn ask(&self, volume: &VolumeId, request: &KeeperRequest) -> Result<KeeperReply, Failure> {
        crate::control::ask(&self.paths(volume).socket(), request)
    }

    fn ask_volume(&self, volume: &VolumeId, request: VolumeRequest) -> Result<VolumeReply, Failure> {
        match self.ask(volume, &KeeperRequest::Volume { request })? {
            KeeperReply::Volume { reply } => Ok(reply),
            other => Err(unexpected(&other)),
        }
    }

    /// How the volume's keeper stands; `None` without one. Does not ask the volume process.
    fn kept(&self, volume: &VolumeId) -> Option<KeeperStatus> {
        self.keeper(volume, &KeeperRequest::Kept)
    }

    fn keeper(&self, volume: &VolumeId, request: &KeeperRequest) -> Option<KeeperStatus> {
        match self.ask(volume, request) {
            Ok(KeeperReply::Status(status)) => Some(*status),
            _ => None,
        }
    }

    /// Starts the volume's process as `work`, in a keeper that is made if there is none. Its device, if it has one.
    fn start(&self, volume: &VolumeId, work: Work) -> Result<Option<PathBuf>, Failure> {
        self.ensure_keeper(volume)?;
        match self.ask(volume, &KeeperRequest::Start { work: Box::new(work) }) {
            Ok(KeeperReply::Started { device }) => Ok(device),
            Ok(other) => Err(unexpected(&other)),
            Err(cause) => {
                // A keeper with nothing to keep goes.
                if self.kept(volume).is_some_and(|kept| kept.work.is_none())
                    && let Err(error) = self.stop_keeper(volume)
                {
                    tracing::warn!(%volume, %error, "a keeper with nothing to keep is left");
                }
                Err(cause)
            }
        }
    }

    /// Ends the volume's keeper in good order, if there is one, and clears what a dead one left.
    fn stop(&self, volume: &VolumeId) -> Result<(), Failure> {
        let stopped = match self.kept(volume) {
            Some(_) => self.stop_keeper(volume),
            None => Ok(()),
        };
        self.clear_leftovers(volume);
        crate::process::remove_empty_cgroup(self.site.worker.as_str(), &self.site.run_dir, crate::keeper::CGROUP);
        stopped
    }

    /// What a volume process is to be, by the metadata; no export.
    fn work(metadata: &Metadata, device: bool) -> Work {
        let clone = match &metadata.state {
            State::Clone { migration, origin, .. } => {
                Some(CloneWork { migration: migration.clone(), origin: origin.clone(), begun: true })
            }
            State::Prepared { migration, origin: Some(origin), .. } => {
                Some(CloneWork { migration: migration.clone(), origin: origin.clone(), begun: false })
            }
            _ => None,
        };
        Work {
            geometry: metadata.geometry.clone(),
            header: metadata.header,
            device,
            clone,
            export: None,
            limit: metadata.limit,
            policy: metadata.policy,
        }
    }
}

fn unexpected(reply: &impl std::fmt::Debug) -> Failure {
    // Only another version of this program answers so.
    tracing::error!(?reply, "an unexpected answer");
    failure(
        FailureCode::Stuck,
        "the volume's keeper answers what was not asked: it runs another version; detach the volume first",
    )
}

impl Plane for UserPlane {
    fn perform(&self, command: &Command) -> Result<Outcome, Failure> {
        match command {
            Command::Create { volume, size, sector_size } => self.create(volume, *size, *sector_size),
            Command::Delete { volume } => self.delete(volume),
            Command::Attach { volume } => self.attach(volume),
            Command::Detach { volume } => self.detach(volume),
            Command::OpenExport { volume, migration, reader } => self.open_export(volume, migration, reader),
            Command::Seal { volume, migration, reader } => self.seal(volume, migration, reader),
            Command::CloseExport { volume, migration } => self.close_export(volume, migration),
            Command::Prepare { volume, migration, geometry, header, room } => {
                self.prepare(volume, migration, geometry, header, *room)
            }
            Command::Assemble { volume, migration, origin } => self.assemble(volume, migration, origin),
            Command::Begin { volume, migration, epoch, origin, seal } => {
                self.begin(volume, migration, *epoch, origin, seal)
            }
            Command::Abandon { volume, migration } => self.abandon(volume, migration),
            Command::Verify { volume, migration } => self.verify(volume, migration),
            Command::Limit { volume, rate } => self.limit(volume, *rate),
            Command::Policy { volume, policy } => self.policy(volume, *policy),
            Command::Free { volume } => self.free(volume),
            Command::Status { volume } => self.perform_status(volume),
        }
    }

    fn volumes(&self) -> Result<Vec<VolumeId>, Failure> {
        let directory = self.site.volumes_dir();
        let io = |error: std::io::Error| {
            failure(FailureCode::Retry, format!("{} cannot be read: {error}", directory.display()))
        };
        let mut volumes = Vec::new();
        for entry in std::fs::read_dir(&directory).map_err(io)? {
            let name = entry.map_err(io)?.file_name();
            // A directory without metadata is a volume that was being removed.
            if let Some(volume) = name.to_str().and_then(|name| VolumeId::new(name).ok())
                && self.paths(&volume).metadata().exists()
            {
                volumes.push(volume);
            }
        }
        volumes.sort();
        Ok(volumes)
    }

    fn promises(&self) -> Promises {
        Promises { reads_are_kept: true, writes_never_wait: true, verifies_from_medium: true }
    }
}
