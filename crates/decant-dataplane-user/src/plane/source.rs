//! A migration's source: the export, the seal, the way back.

use decant_base::{MigrationId, VolumeId};
use decant_dataplane::{Access, ExportSecret, Failure, FailureCode, Origin, Outcome, Protocol, Reader, Seal};

use super::whole::describe;
use super::{UserPlane, failure, host, refused, unexpected};
use crate::control::{ExportWork, KeeperReply, KeeperRequest, VolumeReply, VolumeRequest};
use crate::iscsi;
use crate::metadata::{Exported, Metadata, State};

impl UserPlane {
    pub(super) fn open_export(
        &self,
        volume: &VolumeId,
        migration: &MigrationId,
        reader: &Reader,
    ) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        let sealed = self.check_exportable(volume, &metadata, migration, reader)?;
        if self.site.data_listen.ip().is_unspecified() {
            let listen = self.site.data_listen;
            return Err(refused(format!(
                "data_listen = \"{listen}\" names no address that a peer could reach; write this worker's own"
            )));
        }
        if reader.protocol == Protocol::Iscsi {
            self.check_trusted(&[self.site.data_listen.ip(), reader.address])?;
        }
        self.run_for_export(volume, &metadata)?;
        let (header, header_digest) = self.header(volume)?;
        let mut export = self.export_work(&metadata, migration, reader);
        export.sealed = sealed;
        if reader.protocol == Protocol::Iscsi && export.secret.is_none() {
            export.secret = Some(draw_secret()?);
        }
        let access = match (reader.protocol, export.secret.clone()) {
            (Protocol::Iscsi, Some(secret)) => Access::Iscsi { secret },
            _ => Access::Nbd { certificate: self.certificate.clone() },
        };
        let exported = Exported { migration: migration.clone(), header_digest, secret: export.secret.clone() };
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
            metadata.exported = Some(exported);
        })?;
        let mut address = self.site.data_listen;
        address.set_port(port);
        Ok(Outcome::ExportOpened {
            origin: Origin { address, export: export_name(reader.protocol, migration), access },
            geometry: metadata.geometry,
            header,
            room: host::allocated(&self.paths(volume).image(), metadata.header),
        })
    }

    pub(super) fn seal(&self, volume: &VolumeId, migration: &MigrationId, reader: &Reader) -> Result<Outcome, Failure> {
        let metadata = self.need(volume)?;
        self.check_exportable(volume, &metadata, migration, reader)?;
        self.run_for_export(volume, &metadata)?;
        let work = self.export_work(&metadata, migration, reader);
        let secret = work.secret.clone();
        let (live, port) = self.seal_with(volume, work)?;
        let header_digest = match metadata.exported.filter(|exported| exported.migration == *migration) {
            Some(exported) => exported.header_digest,
            None => self.header(volume)?.1,
        };
        let exported = Exported { migration: migration.clone(), header_digest: header_digest.clone(), secret };
        self.update_soon(volume, |metadata| {
            metadata.port = Some(port);
            metadata.exported = Some(exported);
            metadata.state = State::Sealed { migration: migration.clone(), peer: reader.certificate.clone() };
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
                    metadata.exported.take_if(|exported| exported.migration == *migration);
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
        reader: &Reader,
    ) -> Result<bool, Failure> {
        match &metadata.state {
            State::Whole => Ok(false),
            State::Sealed { migration: of, peer: to } if of == migration && *to == reader.certificate => Ok(true),
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

    fn export_work(&self, metadata: &Metadata, migration: &MigrationId, reader: &Reader) -> ExportWork {
        let mut listen = self.site.data_listen;
        if let Some(port) = metadata.port {
            listen.set_port(port);
        }
        let exported = metadata.exported.as_ref().filter(|exported| exported.migration == *migration);
        let secret = exported.and_then(|exported| exported.secret.clone());
        ExportWork { migration: migration.clone(), reader: reader.clone(), secret, listen, sealed: false }
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

/// An NBD export is called as its migration.
fn export_name(protocol: Protocol, migration: &MigrationId) -> String {
    match protocol {
        Protocol::Nbd => migration.as_str().to_owned(),
        Protocol::Iscsi => iscsi::target_name(migration),
    }
}

fn draw_secret() -> Result<ExportSecret, Failure> {
    let mut random = [0; ExportSecret::RANDOM_BYTES];
    getrandom::fill(&mut random)
        .map_err(|error| failure(FailureCode::Retry, format!("no random numbers for the export's secret: {error}")))?;
    Ok(ExportSecret::new(random))
}
