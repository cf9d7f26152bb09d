//! `decant volume`: the data process of one volume. Cipher, clone and front end, or, after the seal, the export.
//!
//! Started by a keeper, which sends its descriptors and its work over the socket that is its standard input, and then
//! requests. It ends when that socket ends. Before any I/O it takes the lock on the image that its predecessor's open file
//! held, so that a dead process's last writes cannot land after its own.
//!
//! Every request is idempotent: the keeper repeats those that a dead process left unanswered.

use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use decant_base::ExtentSet;
use decant_clone::Shape;
use decant_dataplane::{Access, Failure, FailureCode, Protocol};
use decant_iscsi::login::DigestPolicy;
use decant_iscsi::scsi::MAX_SERIAL;
use decant_iscsi::target;
use decant_luks2::SectorCipher;

use crate::control::{
    CloneWork, ExportWork, Lines, Numbered, VolumeReply, VolumeRequest, VolumeStart, VolumeStatus, receive_descriptors,
    send_line,
};
use crate::device::Exported;
use crate::engine::{self, Engine, Files, Mode, OpenError, VerifyError};
use crate::export::iscsi::{IscsiOptions, IscsiServer};
use crate::export::{self, Server};
use crate::fuse::{Backend, Session};
use crate::iscsi::{self, NoSecret};
use crate::keys::SecretMemory;
use crate::origin::{self, Remote};
use crate::process;
use crate::tls::{Fingerprint, Identity};

/// Threads that serve the file: the medium below may block each, and two or three keep a disk busy.
const FUSE_THREADS: usize = 4;
/// How long `Assemble` waits for a session: a TCP and a TLS handshake over any distance on earth take less.
const ORIGIN_PATIENCE: Duration = Duration::from_secs(5);

/// The volume process's entry point. Its arguments, worker and volume, are for people who look at a process list.
pub fn main(_arguments: &[String]) -> ExitCode {
    process::abort_on_panic();
    process::die_with_parent();
    process::harden();
    match run() {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            tracing::error!(%error, "the volume process ends");
            ExitCode::FAILURE
        }
    }
}

fn run() -> std::io::Result<()> {
    let control = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut descriptors = receive_descriptors(&control)?.into_iter();
    let mut lines = Lines::new(control.try_clone()?);
    let Some(start) = lines.receive::<Numbered<VolumeStart>>()? else { return Ok(()) };
    let replies = Arc::new(Mutex::new(control));
    let key = descriptors.next().ok_or_else(|| std::io::Error::other("no key came with the start"))?;
    let opened = Volume::open(start.body, &key, descriptors.next());
    drop(key);
    let volume = match opened {
        Ok(volume) => volume,
        Err(refusal) => {
            tracing::error!(%refusal, "the volume does not open");
            return reply(&replies, start.number, Err(refusal));
        }
    };
    reply(&replies, start.number, Ok(VolumeReply::Done))?;
    let volume = Arc::new(volume);
    while let Some(request) = lines.receive::<Numbered<VolumeRequest>>()? {
        // Each on its own: a verification takes minutes, and a status must not wait for it.
        let (volume, replies) = (Arc::clone(&volume), Arc::clone(&replies));
        std::thread::Builder::new().name("request".into()).spawn(move || {
            let answer = volume.handle(request.body);
            if let Err(error) = reply(&replies, request.number, answer) {
                tracing::warn!(%error, "the keeper does not hear an answer");
            }
        })?;
    }
    Ok(())
}

fn reply(control: &Mutex<UnixStream>, number: u64, body: Result<VolumeReply, Failure>) -> std::io::Result<()> {
    send_line(&lock(control), &Numbered { number, body })
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

fn failure(code: FailureCode, message: impl Into<String>) -> Failure {
    Failure { code, message: message.into() }
}

/// An error with its causes, as people read it.
fn chain(error: &dyn std::error::Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        text.push_str(": ");
        text.push_str(&error.to_string());
        cause = error.source();
    }
    text
}

struct OpenExport {
    work: ExportWork,
    port: u16,
    server: ExportServer,
}

/// A running export, whatever it speaks. Dropping it closes it.
enum ExportServer {
    Nbd(Server),
    Iscsi(IscsiServer),
}

impl ExportServer {
    fn port(&self) -> u16 {
        let address = match self {
            Self::Nbd(server) => server.local_addr(),
            Self::Iscsi(server) => server.local_addr(),
        };
        match address {
            export::Address::Tcp(address) => address.port(),
            export::Address::Name { .. } | export::Address::Unix(_) => 0,
        }
    }

    /// The volume is sealed: what was asked meanwhile is answered.
    fn wake(&self) {
        match self {
            Self::Nbd(server) => server.wake(),
            Self::Iscsi(server) => server.wake(),
        }
    }
}

/// The volume as this process serves it.
struct Volume {
    start: VolumeStart,
    engine: Arc<Engine>,
    export: Mutex<Option<OpenExport>>,
    /// The origin that the engine was last given.
    origin: Mutex<Option<(CloneWork, Arc<Remote>)>>,
}

impl Volume {
    fn open(start: VolumeStart, key: &OwnedFd, fuse: Option<OwnedFd>) -> Result<Self, Failure> {
        let engine = open_engine(&start, key)?;
        let volume = Self { engine, export: Mutex::default(), origin: Mutex::default(), start };
        let work = &volume.start.work;
        volume.engine.set_limit(work.limit.map(|limit| limit.0));
        volume.engine.set_policy(work.policy);
        if let Some(clone) = work.clone.clone().filter(|_| !volume.engine.is_plain()) {
            volume.connect(clone)?;
        }
        if let Some(export) = &work.export {
            if export.sealed {
                volume.seal(export)?;
            } else {
                volume.open_export(export)?;
            }
        }
        if let Some(fuse) = fuse {
            let backend: Arc<dyn Backend> = volume.engine.clone();
            let serve = if volume.start.resume { Session::resume } else { Session::start };
            serve(Arc::new(fuse), backend, FUSE_THREADS).map_err(|error| {
                let why = "on Linux before 6.9 a volume does not outlive its process: detach it, and its machine starts again";
                failure(FailureCode::Stuck, format!("the FUSE connection cannot be served: {error}; {why}"))
            })?;
        }
        Ok(volume)
    }

    fn handle(&self, request: VolumeRequest) -> Result<VolumeReply, Failure> {
        match request {
            VolumeRequest::OpenExport { export } => {
                self.open_export(&export).map(|port| VolumeReply::Exporting { port })
            }
            VolumeRequest::CloseExport => {
                let open = lock(&self.export).take();
                if open.is_some_and(|open| open.work.sealed) {
                    self.engine.open_gate();
                }
                Ok(VolumeReply::Done)
            }
            VolumeRequest::Seal { export } => self.seal(&export).map(|(live, port)| VolumeReply::Sealed { live, port }),
            VolumeRequest::Begin { live, epoch, clone } => {
                self.engine.expect_boot();
                self.engine.begin(live, epoch).map_err(|error| open_failure(&error))?;
                self.connect(clone).map(|()| VolumeReply::Done)
            }
            VolumeRequest::AwaitOrigin => self.await_origin(),
            VolumeRequest::Verify => self.verify(),
            VolumeRequest::DropMap => {
                self.engine.drop_map().map_err(|error| {
                    failure(FailureCode::Retry, format!("the clone's map cannot be removed: {error}"))
                })?;
                lock(&self.origin).take();
                self.engine.drop_origin();
                Ok(VolumeReply::Done)
            }
            VolumeRequest::Limit { rate } => {
                self.engine.set_limit(rate.map(|rate| rate.0));
                Ok(VolumeReply::Done)
            }
            VolumeRequest::Policy { policy } => {
                self.engine.set_policy(policy);
                Ok(VolumeReply::Done)
            }
            VolumeRequest::Quiesce => {
                self.engine.close().map_err(|error| self.failed(&format!("the last flush failed: {error}")))?;
                Ok(VolumeReply::Done)
            }
            VolumeRequest::Status => Ok(VolumeReply::Status { status: self.status() }),
        }
    }

    fn failed(&self, otherwise: &str) -> Failure {
        failure(FailureCode::Stuck, self.engine.failure().unwrap_or_else(|| otherwise.to_owned()))
    }

    fn status(&self) -> VolumeStatus {
        VolumeStatus {
            clone: self.engine.status(),
            port: lock(&self.export).as_ref().map(|open| open.port),
            failed: self.engine.failure(),
        }
    }

    fn identity(&self) -> Result<Identity, Failure> {
        let files = &self.start.site.tls;
        Identity::load(&files.paths()).map_err(|error| {
            failure(FailureCode::Refused, format!("this worker's certificate cannot be used: {}", chain(&error)))
        })
    }

    /// Connects to the origin, unless it is the one already. Does not wait for the session: the status says when it is up.
    fn connect(&self, clone: CloneWork) -> Result<(), Failure> {
        let mut current = lock(&self.origin);
        if current.as_ref().is_some_and(|(current, _)| current.origin == clone.origin) {
            return Ok(());
        }
        let refused = |error: &dyn std::error::Error| {
            failure(FailureCode::Refused, format!("the origin cannot be used: {}", chain(error)))
        };
        let size = self.engine.shape().size();
        let spec: origin::Spec = match &clone.origin.access {
            Access::Nbd { certificate } => {
                let pinned: Fingerprint = certificate.parse().map_err(|error| refused(&error))?;
                let tls = self.identity()?.client(pinned).map_err(|error| refused(&error))?;
                origin::Options::for_clone(&clone.origin, tls, size).into()
            }
            Access::Iscsi { secret } => {
                let options = origin::IscsiOptions::for_clone(&clone.origin, &clone.migration, secret, size);
                options.map_err(|error| refused(&error))?.into()
            }
        };
        // The old one first: its last word on its link must not come after the new one's first.
        self.engine.drop_origin();
        let remote = Remote::open(spec, self.engine.clone()).map_err(|error| refused(&error))?;
        self.engine.set_origin(remote.clone(), &clone.origin.address.to_string());
        *current = Some((clone, remote));
        Ok(())
    }

    /// Waits for the first session, so that what hinders one is known before the source's machine is stopped.
    fn await_origin(&self) -> Result<VolumeReply, Failure> {
        let origin = lock(&self.origin).as_ref().map(|(_, origin)| Arc::clone(origin));
        let Some(origin) = origin else { return Ok(VolumeReply::Done) };
        match origin.wait_connected(ORIGIN_PATIENCE) {
            Ok(_) => Ok(VolumeReply::Done),
            Err(error) => Err(failure(FailureCode::Retry, format!("no session with the origin: {}", chain(&error)))),
        }
    }

    fn open_export(&self, work: &ExportWork) -> Result<u16, Failure> {
        let mut open = lock(&self.export);
        if let Some(open) = &*open
            && open.work.migration == work.migration
            && open.work.reader == work.reader
            && open.work.secret == work.secret
        {
            return Ok(open.port);
        }
        // One export at a time; what another migration left is closed.
        open.take();
        if !self.engine.is_plain() {
            let message = "the volume is still filling from another worker; it can be moved on once it is verified";
            return Err(failure(FailureCode::NotYet, message));
        }
        let refused = |error: &dyn std::error::Error| {
            failure(FailureCode::Refused, format!("the export cannot be opened: {}", chain(error)))
        };
        let device: Arc<dyn Exported> = self.engine.as_exported();
        let server = match work.reader.protocol {
            Protocol::Nbd => {
                let pinned: Fingerprint = work.reader.certificate.parse().map_err(|error| refused(&error))?;
                let tls = self.identity()?.server(pinned).map_err(|error| refused(&error))?;
                let address = export::Address::Tcp(work.listen);
                Server::listen(&address, Some(tls), work.migration.as_str(), device).map(ExportServer::Nbd)
            }
            Protocol::Iscsi => {
                let options = self.iscsi_options(work).map_err(|error| refused(&error))?;
                IscsiServer::listen(options, device).map(ExportServer::Iscsi)
            }
        };
        let server = server.map_err(|error| failure(FailureCode::Retry, chain(&error)))?;
        let port = server.port();
        *open = Some(OpenExport { work: work.clone(), port, server });
        Ok(port)
    }

    fn iscsi_options(&self, work: &ExportWork) -> Result<IscsiOptions, NoSecret> {
        let chap = iscsi::chap(&work.migration, work.secret.as_ref().ok_or(NoSecret)?)?;
        Ok(IscsiOptions {
            address: work.listen,
            name: iscsi::target_name(&work.migration),
            access: vec![target::Access { initiator: Some(iscsi::initiator_name(&work.migration)), chap: Some(chap) }],
            peers: vec![work.reader.address],
            digests: DigestPolicy::Required,
            block_bytes: self.start.work.geometry.sector_size,
            serial: self.start.volume.as_str().chars().take(MAX_SERIAL).collect(),
        })
    }

    /// The way from writer to exporter. On the machine's critical path.
    fn seal(&self, work: &ExportWork) -> Result<(ExtentSet, u16), Failure> {
        if !self.engine.is_plain() {
            let message = "the volume is still filling from another worker; it can be sealed once it is verified";
            return Err(failure(FailureCode::NotYet, message));
        }
        let port = self.open_export(work)?;
        let begun = Instant::now();
        let live = self.engine.seal().map_err(|error| self.failed(&format!("the volume cannot be sealed: {error}")))?;
        tracing::info!(volume = %self.start.volume, took = ?begun.elapsed(), blocks = live.len(), runs = live.runs(), "sealed");
        if let Some(open) = &mut *lock(&self.export) {
            open.work.sealed = true;
            open.server.wake();
        }
        Ok((live, port))
    }

    fn verify(&self) -> Result<VolumeReply, Failure> {
        match self.engine.verify() {
            Ok(verification) => Ok(VolumeReply::Verified { verification }),
            Err(error) => Err(verify_failure(&error)),
        }
    }
}

fn open_engine(start: &VolumeStart, key: &OwnedFd) -> Result<Arc<Engine>, Failure> {
    let paths = start.site.paths(&start.volume);
    let work = &start.work;
    let image = paths.image();
    let io =
        |error: std::io::Error| failure(FailureCode::Retry, format!("{} cannot be opened: {error}", image.display()));
    // Waits for a dead predecessor's last write.
    let file = engine::open_image(&image).map_err(io)?;
    let unusable = |error: &dyn std::error::Error| failure(FailureCode::Stuck, chain(error));
    let shape = Shape::new(work.geometry.size.0, work.geometry.sector_size).map_err(|error| unusable(&error))?;
    let key = SecretMemory::read(key.as_fd()).map_err(|error| unusable(&error))?;
    let cipher =
        SectorCipher::new(&key, work.geometry.sector_size, work.geometry.iv_tweak).map_err(|error| unusable(&error))?;
    let disk = Files::new(file, &image, work.header.0, work.geometry.size.0, paths.map());
    let mode = match &work.clone {
        None => Mode::Plain,
        Some(clone) if clone.begun => Mode::Clone,
        Some(_) => Mode::Prepared,
    };
    Engine::open(engine::Options {
        volume: start.volume.clone(),
        shape,
        mode,
        disk: Arc::new(disk),
        cipher: Arc::new(cipher),
        boot: engine::boot_id().map_err(io)?,
    })
    .map_err(|error| open_failure(&error))
}

fn open_failure(error: &OpenError) -> Failure {
    let code = match error {
        OpenError::Io { .. } => FailureCode::Retry,
        OpenError::State(_) => FailureCode::Refused,
        _ => FailureCode::Stuck,
    };
    failure(code, chain(error))
}

fn verify_failure(error: &VerifyError) -> Failure {
    let code = match error {
        VerifyError::NotYet(_) => FailureCode::NotYet,
        VerifyError::Stuck(_) => FailureCode::Stuck,
    };
    failure(code, chain(error))
}
