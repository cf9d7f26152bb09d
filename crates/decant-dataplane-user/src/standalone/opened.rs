//! A clone's origin before there is a clone.

use std::path::Path;
use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use rustix::io::Errno;

use super::Source;
use super::error::{StandaloneError, io};
use super::local::LocalOrigin;
use crate::device::{Origin, OriginSink};
use crate::engine::Engine;
use crate::export::claim::{Claim, claim_origin};
use crate::export::iscsi::DigestPolicy;
use crate::origin::{IscsiOptions, Options, Remote, Spec, Timing};

/// Connections to the origin: one for reads that somebody waits for, the others for hydration.
const CONNECTIONS: usize = 3;

/// An origin before there is an engine that its answers go to.
pub(super) enum Opened<'a> {
    /// None is needed: the clone is whole.
    Nothing,
    /// A file, held so that nobody else writes it.
    Local(&'a Path, Claim),
    /// Sessions on a network, and whom their answers go to.
    Remote(Arc<Remote>, Arc<Relay>),
}

impl<'a> Opened<'a> {
    /// Claims a file, or starts to connect, which never waits for a network. `text` is what the origin is called; `size` what it
    /// must have, if that is known.
    pub(super) fn of(source: Option<&'a Source>, text: &str, size: Option<u64>) -> Result<Self, StandaloneError> {
        let Some(source) = source else { return Ok(Self::Nothing) };
        let (connections, timing) = (CONNECTIONS, Timing::NETWORK);
        let spec: Spec = match source {
            Source::File(path) => {
                let claim = claim_origin(path)?;
                return match size.filter(|size| *size != claim.size) {
                    Some(expected) => {
                        Err(StandaloneError::OriginSize { origin: path.clone(), found: claim.size, expected })
                    }
                    None => Ok(Self::Local(path, claim)),
                };
            }
            Source::Nbd { address, export, tls } => {
                let (address, tls, export) = (address.clone(), tls.clone(), export.clone());
                Options { address, tls, export, size, digests: false, connections, timing }.into()
            }
            Source::Iscsi { address, target, lun, initiator, chap } => {
                let (address, target, initiator) = (address.clone(), target.clone(), initiator.clone());
                let (lun, chap, digests) = (*lun, chap.clone(), DigestPolicy::Preferred);
                IscsiOptions { address, target, lun, initiator, chap, digests, size, connections, timing }.into()
            }
        };
        let relay = Arc::new(Relay::default());
        let remote = Remote::open(spec, relay.clone()).map_err(|error| io("connect to", Path::new(text), error))?;
        Ok(Self::Remote(remote, relay))
    }

    /// The origin, whose answers go to `engine` from now on.
    pub(super) fn origin(self, engine: &Arc<Engine>) -> Result<Option<Arc<dyn Origin>>, StandaloneError> {
        match self {
            Self::Nothing => Ok(None),
            Self::Local(path, claim) => {
                let origin = LocalOrigin::open(claim, path, engine.clone());
                Ok(Some(origin.map_err(|error| io("read", path, error))?))
            }
            Self::Remote(remote, relay) => {
                relay.attach(engine.clone());
                Ok(Some(remote))
            }
        }
    }
}

/// Sessions are made before the engine is, since its size is what the first of them finds; nothing is asked until then.
#[derive(Default)]
pub(super) struct Relay {
    engine: OnceLock<Arc<Engine>>,
    /// How the link stands, until there is somebody to tell.
    link: Mutex<Option<(bool, String)>>,
}

impl Relay {
    fn attach(&self, engine: Arc<Engine>) {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((up, detail)) = link.take() {
            engine.handle_link(up, &detail);
        }
        let _ = self.engine.set(engine);
    }
}

impl OriginSink for Relay {
    fn handle_data(&self, token: u64, offset: u64, data: &[u8]) {
        self.engine.get().inspect(|engine| engine.handle_data(token, offset, data));
    }

    fn handle_hole(&self, token: u64, offset: u64, length: u64) {
        self.engine.get().inspect(|engine| engine.handle_hole(token, offset, length));
    }

    fn handle_digests(&self, token: u64, offset: u64, crc32c: &[u32]) {
        self.engine.get().inspect(|engine| engine.handle_digests(token, offset, crc32c));
    }

    fn handle_done(&self, token: u64, result: Result<(), Errno>) {
        self.engine.get().inspect(|engine| engine.handle_done(token, result));
    }

    fn handle_link(&self, up: bool, detail: &str) {
        let mut link = self.link.lock().unwrap_or_else(PoisonError::into_inner);
        match self.engine.get() {
            Some(engine) => {
                // An origin tells of one thing after the other, so what is told now stays the last word without the lock.
                drop(link);
                engine.handle_link(up, detail);
            }
            None => *link = Some((up, detail.to_owned())),
        }
    }
}
