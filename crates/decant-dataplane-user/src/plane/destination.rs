//! A migration's destination: the volume made, the clone assembled, begun, verified.

use std::path::PathBuf;

use decant_base::{BLOCK, Bytes, Epoch, MigrationId, VolumeId};
use decant_dataplane::{Failure, FailureCode, Geometry, Origin, Outcome, Protocol, Seal};

use super::whole::describe;
use super::{UserPlane, failure, refused, unexpected};
use crate::control::{CloneWork, KeeperReply, KeeperRequest, VolumeReply, VolumeRequest};
use crate::header;
use crate::metadata::{Metadata, State};

impl UserPlane {
    pub(super) fn prepare(
        &self,
        volume: &VolumeId,
        migration: &MigrationId,
        geometry: &Geometry,
        header: &str,
        room: Bytes,
    ) -> Result<Outcome, Failure> {
        let digest = header::digest(header);
        match self.load(volume)?.map(|metadata| (metadata.geometry, metadata.state)) {
            None | Some((_, State::Freed)) => {}
            Some((_, State::Preparing { migration: of })) if of == *migration => {}
            Some((made, State::Prepared { migration: of, header_digest, .. })) if of == *migration => {
                if made == *geometry && header_digest == digest {
                    return Ok(Outcome::Done);
                }
                // The source prepared anew, with another header.
            }
            Some((_, State::Clone { migration: of, .. })) if of == *migration => return Ok(Outcome::Done),
            Some((_, state)) => {
                return Err(refused(format!(
                    "worker {} has a volume {volume} already: it is {}; `decant volume delete {volume}` removes it",
                    self.site.worker,
                    describe(&state)
                )));
            }
        }
        self.stop(volume)?;
        self.remove_files(volume)?;
        self.check_room(volume, room)?;
        let state = State::Preparing { migration: migration.clone() };
        let made = self
            .lay_out(volume, &Metadata::new(geometry.clone(), self.site.header, state))
            .and_then(|()| self.adopt(volume, geometry, header))
            .and_then(|()| {
                self.update(volume, |metadata| {
                    metadata.state =
                        State::Prepared { migration: migration.clone(), header_digest: digest, room, origin: None };
                })
            });
        if let Err(cause) = made {
            self.undo(volume);
            return Err(cause);
        }
        Ok(Outcome::Done)
    }

    fn adopt(&self, volume: &VolumeId, geometry: &Geometry, header: &str) -> Result<(), Failure> {
        self.ensure_keeper(volume)?;
        let request = KeeperRequest::Adopt { geometry: geometry.clone(), header: header.to_owned() };
        match self.ask(volume, &request)? {
            KeeperReply::Done => Ok(()),
            other => Err(unexpected(&other)),
        }
    }

    pub(super) fn assemble(
        &self,
        volume: &VolumeId,
        migration: &MigrationId,
        origin: &Origin,
    ) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        match &metadata.state {
            State::Prepared { migration: of, .. } if of == migration => {}
            // Begun in the meantime, or whole already.
            State::Clone { migration: of, .. } if of == migration => return self.attach(volume),
            state => return Err(not_prepared(volume, migration, state)),
        }
        if origin.access.protocol() == Protocol::Iscsi {
            self.check_trusted(&[self.site.data_listen.ip(), origin.address.ip()])?;
        }
        let device = self.assembled(volume, origin)?;
        self.ask_volume(volume, VolumeRequest::AwaitOrigin)?;
        Ok(Outcome::Attached { device })
    }

    /// The device of a prepared volume, connected to `origin`.
    fn assembled(&self, volume: &VolumeId, origin: &Origin) -> Result<PathBuf, Failure> {
        let kept = self.kept(volume);
        if let Some(kept) = &kept
            && let (Some(device), Some(work)) = (&kept.device, &kept.work)
            && work.clone.as_ref().is_some_and(|clone| clone.origin == *origin)
        {
            return Ok(device.clone());
        }
        if kept.is_some_and(|kept| kept.work.is_some()) {
            // Its origin has moved.
            self.stop(volume)?;
        }
        let metadata = self.update(volume, |metadata| {
            if let State::Prepared { origin: whence, .. } = &mut metadata.state {
                *whence = Some(origin.clone());
            }
        })?;
        let device = self.start(volume, Self::work(&metadata, true))?;
        device.ok_or_else(|| failure(FailureCode::Retry, "the volume's process made no device"))
    }

    pub(super) fn begin(
        &self,
        volume: &VolumeId,
        migration: &MigrationId,
        epoch: Epoch,
        origin: &Origin,
        seal: &Seal,
    ) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        let room = match &metadata.state {
            State::Prepared { migration: of, header_digest, room, .. } if of == migration => {
                if *header_digest != seal.header_digest {
                    return Err(failure(
                        FailureCode::Stuck,
                        format!(
                            "volume {volume} was prepared from another header than the source sealed; cancel the migration and start it again"
                        ),
                    ));
                }
                *room
            }
            State::Clone { migration: of, .. } if of == migration => {
                self.update(volume, |metadata| metadata.epoch = metadata.epoch.max(epoch))?;
                return self.attach(volume);
            }
            State::Whole if metadata.verified.as_ref().is_some_and(|(of, _)| of == migration) => {
                return self.attach(volume);
            }
            state => return Err(not_prepared(volume, migration, state)),
        };
        if seal.live.end() > metadata.geometry.size.0.div_ceil(BLOCK) {
            return Err(refused(format!(
                "the seal of volume {volume} names blocks beyond its end; do not trust that source"
            )));
        }
        let device = self.assembled(volume, origin)?;
        let clone = CloneWork { migration: migration.clone(), origin: origin.clone(), begun: true };
        // The map first: metadata that says "clone" without a map would be a volume that cannot be read.
        self.ask_volume(volume, VolumeRequest::Begin { live: seal.live.clone(), epoch, clone })?;
        self.update_soon(volume, |metadata| {
            metadata.epoch = epoch;
            metadata.state = State::Clone { migration: migration.clone(), origin: origin.clone(), room };
        })?;
        Ok(Outcome::Attached { device })
    }

    pub(super) fn abandon(&self, volume: &VolumeId, migration: &MigrationId) -> Result<Outcome, Failure> {
        let ours = match self.load(volume)?.map(|metadata| metadata.state) {
            Some(State::Preparing { migration: of } | State::Prepared { migration: of, .. }) => of == *migration,
            Some(_) => false,
            None => return self.sync_removal(volume).map(|()| Outcome::Done),
        };
        // A begun one is a clone, also when a power cut left only its map to say so.
        if !ours {
            return Ok(Outcome::Done);
        }
        self.stop(volume)?;
        self.remove_files(volume)?;
        Ok(Outcome::Done)
    }

    pub(super) fn verify(&self, volume: &VolumeId, migration: &MigrationId) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        match (&metadata.state, &metadata.verified) {
            (State::Clone { migration: of, .. }, _) if of == migration => {}
            (_, Some((of, verification))) if of == migration => return Ok(Outcome::Verified(*verification)),
            (state, _) => return Err(not_prepared(volume, migration, state)),
        }
        if self.kept(volume).is_none_or(|kept| kept.work.is_none()) {
            // The machine is stopped, and the clone fills all the same.
            self.attach(volume)?;
        }
        let verification = match self.ask_volume(volume, VolumeRequest::Verify)? {
            VolumeReply::Verified { verification } => verification,
            other => return Err(unexpected(&other)),
        };
        self.update(volume, |metadata| {
            metadata.state = State::Whole;
            metadata.verified = Some((migration.clone(), verification));
        })?;
        self.ask_volume(volume, VolumeRequest::DropMap)?;
        Ok(Outcome::Verified(verification))
    }
}

fn not_prepared(volume: &VolumeId, migration: &MigrationId, state: &State) -> Failure {
    refused(format!("volume {volume} is not prepared for migration {migration}: it is {}", describe(state)))
}
