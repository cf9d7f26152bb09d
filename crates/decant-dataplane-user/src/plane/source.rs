//! A migration's source: the export, the seal, the way back.

use decant_base::{MigrationId, VolumeId};
use decant_dataplane::{Failure, FailureCode, Origin, Outcome, Seal};

use super::whole::describe;
use super::{UserPlane, failure, host, refused, unexpected};
use crate::control::{ExportWork, KeeperReply, KeeperRequest, VolumeReply, VolumeRequest};
use crate::metadata::{Metadata, State};

impl UserPlane {
    pub(super) fn open_export(
        &self,
        volume: &VolumeId,
        migration: &MigrationId,
        peer: &str,
    ) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        let sealed = self.check_exportable(volume, &metadata, migration, peer)?;
        if self.site.data_listen.ip().is_unspecified() {
            let listen = self.site.data_listen;
            return Err(refused(format!(
                "data_listen = \"{listen}\" names no address that a peer could reach; write this worker's own"
            )));
        }
        self.run_for_export(volume, &metadata)?;
        let (header, digest) = self.header(volume)?;
        let mut export = self.export_work(&metadata, migration, peer);
        export.sealed = sealed;
        let port = if sealed {
            self.seal_with(volume, export)?.1
        } else {
            let request = |export| VolumeRequest::OpenExport { export };
            let reply = self.ask_volume(volume, request(export.clone())).or_else(|_| {
                // The port of an earlier export may be somebody else's by now.
                export.listen.set_port(self.site.data_listen.port());
                self.ask_volume(volume, request(export.clone()))
            })?;
            match reply {
                VolumeReply::Exporting { port } => port,
                other => return Err(unexpected(&other)),
            }
        };
        self.update(volume, |metadata| {
            metadata.port = Some(port);
            metadata.exported = Some((migration.clone(), digest));
        })?;
        let mut address = self.site.data_listen;
        address.set_port(port);
        Ok(Outcome::ExportOpened {
            origin: Origin { address, export: migration.as_str().to_owned(), certificate: self.certificate.clone() },
            geometry: metadata.geometry,
            header,
            room: host::allocated(&self.paths(volume).image(), metadata.header),
        })
    }

    pub(super) fn seal(&self, volume: &VolumeId, migration: &MigrationId, peer: &str) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        self.check_exportable(volume, &metadata, migration, peer)?;
        self.run_for_export(volume, &metadata)?;
        let (live, port) = self.seal_with(volume, self.export_work(&metadata, migration, peer))?;
        let header_digest = match metadata.exported.filter(|(of, _)| of == migration) {
            Some((_, digest)) => digest,
            None => self.header(volume)?.1,
        };
        self.update_soon(volume, |metadata| {
            metadata.port = Some(port);
            metadata.exported = Some((migration.clone(), header_digest.clone()));
            metadata.state = State::Sealed { migration: migration.clone(), peer: peer.to_owned() };
        })?;
        Ok(Outcome::Sealed(Seal { live, header_digest }))
    }

    pub(super) fn close_export(&self, volume: &VolumeId, migration: &MigrationId) -> Result<Outcome, Failure> {
        match self.load(volume)?.map(|metadata| metadata.state) {
            Some(State::Sealed { migration: of, .. }) if of == *migration => {
                self.stop(volume)?;
                self.update(volume, |metadata| {
                    metadata.state = State::Whole;
                    metadata.exported = None;
                })?;
            }
            Some(State::Whole) => {
                let kept = self.kept(volume).and_then(|kept| kept.work);
                let open =
                    kept.filter(|work| work.export.as_ref().is_some_and(|export| export.migration == *migration));
                match open {
                    Some(work) if work.device => {
                        self.ask_volume(volume, VolumeRequest::CloseExport)?;
                    }
                    // It was there for the export alone.
                    Some(_) => self.stop(volume)?,
                    None => {}
                }
                self.update(volume, |metadata| {
                    metadata.exported.take_if(|(of, _)| of == migration);
                })?;
            }
            _ => {}
        }
        Ok(Outcome::Done)
    }

    /// Whether the volume can be exported for `migration`; true if it is sealed for it.
    fn check_exportable(
        &self,
        volume: &VolumeId,
        metadata: &Metadata,
        migration: &MigrationId,
        peer: &str,
    ) -> Result<bool, Failure> {
        match &metadata.state {
            State::Whole => Ok(false),
            State::Sealed { migration: of, peer: to } if of == migration && to == peer => Ok(true),
            State::Clone { migration, .. } => Err(failure(
                FailureCode::NotYet,
                format!(
                    "volume {volume} is still filling from migration {migration}; it can move on once that is verified"
                ),
            )),
            state => Err(refused(format!("volume {volume} cannot be exported: it is {}", describe(state)))),
        }
    }

    /// Makes sure that a volume process runs: the attached one, or, of a stopped machine, one without a device.
    fn run_for_export(&self, volume: &VolumeId, metadata: &Metadata) -> Result<(), Failure> {
        if self.kept(volume).is_none_or(|kept| kept.work.is_none()) {
            self.start(volume, Self::work(metadata, false))?;
        }
        Ok(())
    }

    fn export_work(&self, metadata: &Metadata, migration: &MigrationId, peer: &str) -> ExportWork {
        let mut listen = self.site.data_listen;
        if let Some(port) = metadata.port {
            listen.set_port(port);
        }
        ExportWork { migration: migration.clone(), peer: peer.to_owned(), listen, sealed: false }
    }

    fn seal_with(&self, volume: &VolumeId, export: ExportWork) -> Result<(decant_base::ExtentSet, u16), Failure> {
        match self.ask(volume, &KeeperRequest::Seal { export })? {
            KeeperReply::Volume { reply: VolumeReply::Sealed { live, port } } => Ok((live, port)),
            other => Err(unexpected(&other)),
        }
    }

    fn header(&self, volume: &VolumeId) -> Result<(String, String), Failure> {
        match self.ask(volume, &KeeperRequest::Header)? {
            KeeperReply::Header { header, digest } => Ok((header, digest)),
            other => Err(unexpected(&other)),
        }
    }
}
