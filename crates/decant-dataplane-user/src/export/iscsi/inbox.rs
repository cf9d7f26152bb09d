//! What comes back to a connection's thread: outcomes of parked reads and of what workers did.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use decant_iscsi::target::{Failure, Request, TaskId};
use rustix::io::Errno;

use super::buffers::{Buffer, Spare};
use super::perform::{Ended, failure, perform};
use crate::device::{Exported, ReadSink};
use crate::stream::Kick;

/// What came of a request that was not done at once.
pub(super) struct Arrived {
    pub(super) task: TaskId,
    /// Which request of the task's slot it was.
    pub(super) serial: u64,
    pub(super) ended: Ended,
    /// The task's buffer, which may be needed again.
    pub(super) buffer: Option<Buffer>,
}

/// Where outcomes arrive.
pub(super) struct Inbox {
    arrived: Mutex<Vec<Arrived>>,
    pub(super) kick: Arc<Kick>,
}

impl Inbox {
    pub(super) fn new(kick: Arc<Kick>) -> Self {
        Self { arrived: Mutex::default(), kick }
    }

    pub(super) fn put(&self, arrived: Arrived) {
        self.arrived.lock().unwrap_or_else(PoisonError::into_inner).push(arrived);
        self.kick.kick();
    }

    pub(super) fn take(&self) -> Vec<Arrived> {
        std::mem::take(&mut self.arrived.lock().unwrap_or_else(PoisonError::into_inner))
    }
}

/// A read that waits for its bytes.
pub(super) struct Parked {
    pub(super) inbox: Arc<Inbox>,
    pub(super) task: TaskId,
    pub(super) serial: u64,
    pub(super) offset: u64,
}

impl ReadSink for Parked {
    fn complete(self: Box<Self>, result: Result<&[u8], Errno>) {
        let ended = match result {
            Ok(bytes) => {
                let mut buffer = Spare::default().take(bytes.len());
                buffer.bytes().copy_from_slice(bytes);
                Ended::Data(buffer)
            }
            Err(errno) => Ended::Failed(failure(errno, Some(self.offset))),
        };
        self.inbox.put(Arrived { task: self.task, serial: self.serial, ended, buffer: None });
    }
}

/// What a worker does; gives the buffer back that may be needed again. Nothing is begun once the request is `unwanted`.
pub(super) fn work(
    device: &dyn Exported,
    request: Request,
    buffer: Option<Buffer>,
    mut pattern: Vec<u8>,
    unwanted: &AtomicBool,
) -> (Ended, Option<Buffer>) {
    if unwanted.load(Ordering::Relaxed) {
        return (Ended::Failed(Failure::NotReady), buffer);
    }
    let perform = |data: &mut [u8]| perform(device, request, data, unwanted);
    match (request, buffer) {
        // What is to be compared with must outlive the writing of it.
        (Request::Write { keep: true, .. }, Some(buffer)) => (perform(&mut buffer.as_ref().to_vec()), Some(buffer)),
        (_, Some(mut buffer)) => (perform(buffer.bytes()), Some(buffer)),
        (_, None) => (perform(&mut pattern), None),
    }
}
