//! Whole volumes: made, attached, detached, deleted.

use std::path::Path;
use std::process::{Command as Process, Stdio};

use decant_base::{Bytes, VolumeId};
use decant_dataplane::{Failure, FailureCode, Geometry, Outcome};
use decant_luks2::{KEY_BYTES, PAYLOAD_CIPHER};

use super::{UserPlane, failure, refused, unexpected};
use crate::control::{KeeperReply, KeeperRequest, VolumeRequest};
use crate::metadata::{Metadata, State};

impl UserPlane {
    pub(super) fn create(&self, volume: &VolumeId, size: Bytes, sector_size: u32) -> Result<Outcome, Failure> {
        match self.load(volume)? {
            Some(Metadata { state: State::Whole, geometry, .. })
                if geometry.size == size && geometry.sector_size == sector_size =>
            {
                return Ok(Outcome::Done);
            }
            None | Some(Metadata { state: State::Creating | State::Freed, .. }) => {}
            Some(_) => {
                return Err(refused(format!(
                    "worker {} has a volume {volume} already; choose another name",
                    self.site.worker
                )));
            }
        }
        // What an attempt left that was cut off.
        self.stop(volume)?;
        self.remove_files(volume)?;
        let geometry =
            Geometry { size, sector_size, cipher: PAYLOAD_CIPHER.to_owned(), key_bytes: KEY_BYTES as u32, iv_tweak: 0 };
        let metadata = Metadata::new(geometry, self.site.header, State::Creating);
        let made = self.lay_out(volume, &metadata).and_then(|()| self.make(volume, &metadata));
        if let Err(cause) = made {
            self.undo(volume);
            return Err(cause);
        }
        self.update(volume, |metadata| metadata.state = State::Whole)?;
        Ok(Outcome::Done)
    }

    fn make(&self, volume: &VolumeId, metadata: &Metadata) -> Result<(), Failure> {
        self.ensure_keeper(volume)?;
        match self.ask(volume, &KeeperRequest::Format { geometry: metadata.geometry.clone() })? {
            KeeperReply::Done => {}
            other => return Err(unexpected(&other)),
        }
        let device = self.start(volume, Self::work(metadata, true))?;
        let device = device.ok_or_else(|| failure(FailureCode::Retry, "the volume's process made no device"))?;
        make_file_system(&device)?;
        self.stop(volume)
    }

    /// Removes what a failed attempt made; what cannot be removed now is removed with the next attempt.
    pub(super) fn undo(&self, volume: &VolumeId) {
        let undone = self.stop(volume).and_then(|()| self.remove_files(volume));
        if let Err(error) = undone {
            tracing::warn!(%volume, %error, "a half-made volume is not removed yet");
        }
    }

    pub(super) fn delete(&self, volume: &VolumeId) -> Result<Outcome, Failure> {
        self.stop(volume)?;
        self.remove_files(volume)?;
        Ok(Outcome::Done)
    }

    pub(super) fn attach(&self, volume: &VolumeId) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        match &metadata.state {
            State::Whole | State::Clone { .. } => {}
            State::Sealed { migration, .. } => {
                return Err(refused(format!(
                    "volume {volume} is sealed for migration {migration}; it can be attached here only if that migration is cancelled"
                )));
            }
            state => return Err(refused(format!("volume {volume} cannot be attached: it is {}", describe(state)))),
        }
        let kept = self.kept(volume);
        if let Some(device) = kept.as_ref().and_then(|kept| kept.device.clone()) {
            return Ok(Outcome::Attached { device });
        }
        let mut work = Self::work(&metadata, true);
        if let Some(current) = kept.and_then(|kept| kept.work) {
            // It serves an export of a stopped machine, which starts again: the export stays open, unless it was sealed and that
            // was never recorded.
            work.export = current.export.filter(|export| !export.sealed);
            self.stop(volume)?;
        }
        let device = self.start(volume, work)?;
        if metadata.state == State::Whole && self.paths(volume).map().exists() {
            // A crash came between the end of a verification and this.
            self.ask_volume(volume, VolumeRequest::DropMap)?;
        }
        device
            .map(|device| Outcome::Attached { device })
            .ok_or_else(|| failure(FailureCode::Retry, "the volume's process made no device"))
    }

    pub(super) fn detach(&self, volume: &VolumeId) -> Result<Outcome, Failure> {
        let exports = matches!(self.load(volume)?, Some(Metadata { state: State::Sealed { .. }, .. }));
        if !exports {
            self.stop(volume)?;
        }
        Ok(Outcome::Done)
    }

    pub(super) fn free(&self, volume: &VolumeId) -> Result<Outcome, Failure> {
        match self.load(volume)? {
            None | Some(Metadata { state: State::Freed, .. }) => return Ok(Outcome::Done),
            Some(Metadata { state: State::Sealed { .. }, .. }) => {}
            // The copy of a migration whose export was closed. Whatever is in use refuses to stop.
            Some(Metadata { state: State::Whole, .. })
                if self.kept(volume).is_none_or(|kept| kept.device.is_none()) => {}
            Some(metadata) => {
                let state = describe(&metadata.state);
                return Err(refused(format!("volume {volume} is no sealed copy that could be freed: it is {state}")));
            }
        }
        self.stop(volume)?;
        // From here on nobody attaches it, whatever is left of it.
        self.update(volume, |metadata| metadata.state = State::Freed)?;
        let image = self.paths(volume).image();
        match std::fs::remove_file(&image) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
                Err(failure(FailureCode::Retry, format!("{} cannot be removed: {error}", image.display())))
            }
            _ => Ok(Outcome::Done),
        }
    }
}

/// What a state is, in a sentence "it is …".
pub(super) fn describe(state: &State) -> String {
    match state {
        State::Creating => "not made to its end; create it again".into(),
        State::Whole => "a whole volume".into(),
        State::Preparing { migration } | State::Prepared { migration, .. } => {
            format!("prepared for migration {migration}, which was not granted yet")
        }
        State::Clone { migration, .. } => format!("still filling from migration {migration}"),
        State::Sealed { migration, .. } => format!("sealed for migration {migration}"),
        State::Freed => "freed: its bytes are gone".into(),
    }
}

/// Puts ext4 on an empty device. Everything it writes is real: inode tables are zeroed by WRITE_ZEROES, which is a hole
/// below, so no thread of the kernel does it behind a machine's back later (and behind a clone's), and nothing is allocated
/// for them. The journal is left a hole: a new volume's blocks read as zeros, as a journal's must.
fn make_file_system(device: &Path) -> Result<(), Failure> {
    let output = Process::new("mkfs.ext4")
        .args(["-q", "-F", "-b", "4096", "-m", "0", "-E", "nodiscard,lazy_itable_init=0,lazy_journal_init=1"])
        .arg(device)
        .stdin(Stdio::null())
        .output()
        .map_err(|error| refused(format!("mkfs.ext4 cannot be run: {error}; install e2fsprogs")))?;
    if output.status.success() {
        return Ok(());
    }
    let said = String::from_utf8_lossy(&output.stderr);
    Err(refused(format!("mkfs.ext4 failed: {}: {}", output.status, said.trim())))
}
