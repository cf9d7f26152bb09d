//! What a keeper does when it is asked.

use std::sync::{Arc, PoisonError};
use std::time::{Duration, Instant};

use decant_dataplane::{Failure, FailureCode};

use super::device::Connection;
use super::link::Answer;
use super::{Keeper, RESTART_PATIENCE, State, failure, files};
use crate::control::{ExportWork, KeeperReply, KeeperRequest, KeeperStatus, VolumeReply, VolumeRequest, Work};

impl Keeper {
    pub(super) fn handle(&self, request: KeeperRequest) -> Result<KeeperReply, Failure> {
        match request {
            KeeperRequest::Status => return Ok(KeeperReply::Status(Box::new(self.status()))),
            KeeperRequest::Kept => return Ok(KeeperReply::Status(Box::new(self.kept()))),
            KeeperRequest::Volume { request } => return self.call(&request).map(|reply| KeeperReply::Volume { reply }),
            KeeperRequest::Header => {
                let header = files::header_area(&self.spec)?;
                return Ok(KeeperReply::Header { header: header.base64, digest: header.digest });
            }
            _ => {}
        }
        let _guard = self.one_at_a_time.lock().unwrap_or_else(PoisonError::into_inner);
        match request {
            KeeperRequest::Format { geometry } => {
                let key = files::format(&self.spec, &geometry)?;
                self.change(|state| state.key = Some(Arc::new(key)));
                Ok(KeeperReply::Done)
            }
            KeeperRequest::Adopt { geometry, header } => {
                let key = files::adopt(&self.spec, &geometry, &header)?;
                self.change(|state| state.key = Some(Arc::new(key)));
                Ok(KeeperReply::Done)
            }
            KeeperRequest::Start { work } => self.start(*work),
            KeeperRequest::Seal { export } => self.seal(export),
            KeeperRequest::Stop => self.stop(),
            KeeperRequest::Status | KeeperRequest::Kept | KeeperRequest::Volume { .. } | KeeperRequest::Header => {
                Err(failure(FailureCode::Refused, "answered above"))
            }
        }
    }

    fn kept(&self) -> KeeperStatus {
        let state = self.state();
        KeeperStatus {
            pid: std::process::id(),
            volume_pid: state.pid,
            restarts: state.restarts,
            work: state.work.clone(),
            device: state.device.as_ref().map(|device| device.path().to_owned()),
            volume: None,
            trouble: state.trouble.as_ref().map(ToString::to_string),
        }
    }

    fn status(&self) -> KeeperStatus {
        let mut status = self.kept();
        let link = self.state().link.clone();
        // Asked once: a status must not wait for a process that is being started again.
        let answer = link.and_then(|link| link.send(VolumeRequest::Status).recv_timeout(Duration::from_secs(5)).ok());
        match answer {
            Some(Ok(VolumeReply::Status { status: volume })) => status.volume = Some(volume),
            Some(Err(trouble)) => status.trouble = Some(trouble.message),
            _ => {}
        }
        status
    }

    /// Asks the volume process, and its successor if it dies over it: every request can be repeated.
    fn call(&self, request: &VolumeRequest) -> Answer {
        let deadline = Instant::now() + RESTART_PATIENCE;
        loop {
            let (state, _) =
                self.wait_until(self.state(), Some(deadline), |state| state.link.is_some() || state.work.is_none());
            let Some(link) = state.link.clone() else {
                let trouble = state.trouble.clone();
                return Err(trouble.unwrap_or_else(|| {
                    failure(FailureCode::Retry, "the volume process does not run; it is being started")
                }));
            };
            drop(state);
            match link.send(request.clone()).recv() {
                Ok(answer) => return answer,
                // The main thread has yet to notice.
                Err(_) => self.change(|state| {
                    if state.link.as_ref().is_some_and(|current| Arc::ptr_eq(current, &link)) {
                        state.link = None;
                    }
                }),
            }
        }
    }

    fn start(&self, work: Work) -> Result<KeeperReply, Failure> {
        let current = self.state().work.clone();
        if let Some(current) = current {
            let device = self.state_device();
            return if current.device == work.device && current.clone.is_some() == work.clone.is_some() {
                Ok(KeeperReply::Started { device })
            } else {
                Err(failure(FailureCode::Refused, "the volume is kept for another purpose already; detach it first"))
            };
        }
        let name = self.spec.site.device_name(&self.spec.volume);
        let key = match self.state().key.clone() {
            Some(key) => key,
            None => Arc::new(files::unlock(&self.spec, &work)?),
        };
        let connection = if work.device { Some(Connection::new(&name)?) } else { None };
        let sector_size = work.geometry.sector_size;
        self.change(|state| {
            state.key = Some(key);
            state.fuse = connection.as_ref().map(|connection| Arc::clone(&connection.fuse));
            state.served = false;
            state.proved = false;
            state.stillborn = 0;
            state.trouble = None;
            state.work = Some(work);
        });
        let (state, ready) = self.wait_until(self.state(), Some(Instant::now() + RESTART_PATIENCE), |state| {
            state.link.is_some() || state.work.is_none()
        });
        let trouble = state.trouble.clone();
        drop(state);
        if let Some(trouble) = trouble {
            return Err(trouble);
        }
        if !ready {
            self.forget_work();
            return Err(failure(FailureCode::Retry, "the volume process did not start in time; see volume.log"));
        }
        let Some(connection) = connection else { return Ok(KeeperReply::Started { device: None }) };
        match connection.device(sector_size, &name) {
            Ok(device) => {
                let path = device.path().to_owned();
                self.change(|state| {
                    state.fuse = None;
                    state.device = Some(Arc::new(device));
                });
                Ok(KeeperReply::Started { device: Some(path) })
            }
            Err(failure) => {
                self.forget_work();
                Err(failure)
            }
        }
    }

    fn state_device(&self) -> Option<std::path::PathBuf> {
        self.state().device.as_ref().map(|device| device.path().to_owned())
    }

    fn forget_work(&self) {
        self.change(|state| {
            state.work = None;
            state.fuse = None;
            if let Some(link) = state.link.take() {
                link.hang_up();
            }
        });
    }

    fn seal(&self, export: ExportWork) -> Result<KeeperReply, Failure> {
        let device = self.state().device.clone();
        let begun = Instant::now();
        // Held until no write can land.
        let claim = device.as_ref().map(|device| device.claim()).transpose()?;
        let claimed = begun.elapsed();
        if let Some(device) = &device {
            device.sync()?;
        }
        let synced = begun.elapsed();
        let reply = self.call(&VolumeRequest::Seal { export })?;
        tracing::info!(volume = %self.spec.volume, ?claimed, ?synced, total = ?begun.elapsed(), "sealed");
        // The main thread has learned by now that there is no device any more.
        let device = device.and_then(|device| {
            self.state().device.take();
            Arc::into_inner(device)
        });
        drop(claim);
        if let Some(device) = device {
            // Behind the answer: the machine waits elsewhere for it.
            let cleared = std::thread::Builder::new().name("clear".into()).spawn(move || device.clear());
            if let Err(error) = cleared {
                tracing::error!(%error, "no thread to clear the device; it clears itself");
            }
        }
        Ok(KeeperReply::Volume { reply })
    }

    fn stop(&self) -> Result<KeeperReply, Failure> {
        let device = self.state().device.clone();
        let claim = device.as_ref().map(|device| device.claim()).transpose()?;
        // A process that is being started again finishes what it was given.
        let deadline = Some(Instant::now() + RESTART_PATIENCE);
        let settled = |state: &State| state.link.is_some() || state.work.is_none() || state.trouble.is_some();
        let (state, _) = self.wait_until(self.state(), deadline, settled);
        let (runs, trouble) = (state.link.is_some(), state.trouble.clone());
        let lost = state.work.is_some() || trouble.is_some();
        drop(state);
        let durable = if runs {
            let synced = device.as_ref().map_or(Ok(()), |device| device.sync());
            synced.and(self.call(&VolumeRequest::Quiesce).map(drop))
        } else if let (true, Some(device)) = (lost, &device) {
            // Nobody serves the device any more, so syncing it would wait for ever.
            self.change(|state| state.work = None);
            device.give_up();
            Err(trouble.unwrap_or_else(|| failure(FailureCode::Stuck, "the volume process does not start")))
        } else {
            Ok(())
        };
        self.state().device.take();
        drop(claim);
        // Served to its end: the kernel closes the file through the process that is still there.
        if let Some(device) = device.and_then(Arc::into_inner) {
            device.clear();
        }
        self.change(|state| {
            state.stopping = true;
            state.work = None;
            state.fuse = None;
            if let Some(link) = state.link.take() {
                link.hang_up();
            }
        });
        drop(self.wait_until(self.state(), Some(Instant::now() + RESTART_PATIENCE), |state| state.stopped));
        let trouble = durable.err().map(|cause| {
            failure(cause.code, format!("detached, but what was written last may not be durable: {cause}"))
        });
        Ok(KeeperReply::Stopped { trouble })
    }
}
