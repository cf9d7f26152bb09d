//! What a connection's tasks ask for: done at once where that is quick, by others where not, and dropped if nobody wants it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use decant_iscsi::target::{Failure, Request, TaskId};

use super::connection::{Away, GATHER, Link, UNSENT};
use super::inbox::{Arrived, Parked, work};
use super::perform::{Ended, failure};
use crate::device::Served;

impl Link<'_> {
    /// Data of a write that lie in the input.
    pub(super) fn take_data(&mut self, task: TaskId, offset: usize, total: usize, data: &[u8]) {
        let Some(slot) = self.slots.get_mut(task.0 as usize) else { return };
        let buffer = match &mut slot.buffer {
            Some(buffer) if buffer.len() == total => buffer,
            // One that a task which was aborted has left.
            other => {
                if let Some(old) = other.take() {
                    self.spare.put(old);
                }
                other.insert(self.spare.take(total))
            }
        };
        if let Some(place) = buffer.bytes().get_mut(offset..offset + data.len()) {
            place.copy_from_slice(data);
        }
    }

    /// Does what is asked for, as far as it can be done at once; the rest is handed on.
    pub(super) fn perform(&mut self) {
        let mut gathered = 0;
        loop {
            self.drop_unwanted();
            if gathered >= GATHER || self.out.len() >= UNSENT || self.requests.is_empty() || !self.shared.device.ready()
            {
                return;
            }
            let Some((task, request)) = self.requests.pop_front() else { return };
            gathered += match request {
                Request::Read { length, .. } | Request::Write { length, .. } => length as usize,
                _ => 0,
            };
            if let Some(ended) = self.start_request(task, request) {
                self.complete(task, ended);
            }
        }
    }

    /// Ends what was aborted: at once where nothing has begun; a worker is told, and its word is waited for.
    pub(super) fn drop_unwanted(&mut self) {
        while let Some(task) = self.unwanted.pop() {
            if let Some(place) = self.requests.iter().position(|(other, _)| *other == task) {
                self.requests.remove(place);
                self.complete(task, Ended::Failed(Failure::NotReady));
                continue;
            }
            // What has come back does not wait for room any more.
            if let Some(place) = self.arrived.iter().position(|arrived| arrived.task == task) {
                if let Some(arrived) = self.arrived.remove(place).filter(|arrived| self.away(arrived).is_some()) {
                    self.end_away(arrived);
                }
                self.unwanted.push(task);
                continue;
            }
            let Some(slot) = self.slots.get_mut(task.0 as usize) else { continue };
            match &slot.away {
                Some(Away { unwanted: Some(flag), .. }) => flag.store(true, Ordering::Relaxed),
                // A read changes nothing; its answer may be long in coming, and finds nobody then.
                Some(Away { unwanted: None, .. }) => {
                    slot.away = None;
                    self.complete(task, Ended::Failed(Failure::NotReady));
                }
                None => {}
            }
        }
    }

    /// Does a request, or has it done: then there is no outcome yet.
    fn start_request(&mut self, task: TaskId, request: Request) -> Option<Ended> {
        match request {
            Request::Read { offset, length, fua: false } => self.read(task, offset, length as usize),
            Request::Write { offset, length, fua: false, keep: false } => {
                let mut buffer = self.slots.get_mut(task.0 as usize)?.buffer.take()?;
                let bytes = buffer.bytes().get_mut(..length as usize).unwrap_or_default();
                let result = self.shared.device.write(offset, bytes);
                self.spare.put(buffer);
                Some(result.map_or_else(|errno| Ended::Failed(failure(errno, Some(offset))), |()| Ended::Done))
            }
            _ => {
                self.hand_on(task, request);
                None
            }
        }
    }

    fn read(&mut self, task: TaskId, offset: u64, length: usize) -> Option<Ended> {
        let mut buffer = self.spare.take(length);
        let serial = self.next_serial;
        self.next_serial += 1;
        let inbox = &self.inbox;
        let read = self
            .shared
            .device
            .read(offset, buffer.bytes(), &mut || Box::new(Parked { inbox: Arc::clone(inbox), task, serial, offset }));
        self.shared.bytes_read.fetch_add(length as u64, Ordering::Relaxed);
        match read {
            Ok(Served::Done) => Some(Ended::Data(buffer)),
            Ok(Served::Missing) => {
                self.spare.put(buffer);
                if let Some(slot) = self.slots.get_mut(task.0 as usize) {
                    slot.away = Some(Away { serial, unwanted: None, then: None });
                }
                None
            }
            Err(errno) => {
                self.spare.put(buffer);
                Some(Ended::Failed(failure(errno, Some(offset))))
            }
        }
    }

    /// Gives what may take long to a worker.
    fn hand_on(&mut self, task: TaskId, request: Request) {
        let Some(slot) = self.slots.get_mut(task.0 as usize) else { return };
        let serial = self.next_serial;
        self.next_serial += 1;
        let unwanted = Arc::new(AtomicBool::new(false));
        // With FUA what is cached must be on the medium first. The read itself may have to wait for the network, which no worker
        // does.
        let (request, then) = match request {
            Request::Read { offset, length, .. } => {
                (Request::Flush, Some(Request::Read { offset, length, fua: false }))
            }
            other => (other, None),
        };
        slot.away = Some(Away { serial, unwanted: Some(Arc::clone(&unwanted)), then });
        let buffer = slot.buffer.take();
        let pattern = match request {
            Request::Fill { .. } => self.machine.pattern(task).to_vec(),
            _ => Vec::new(),
        };
        let (device, inbox) = (Arc::clone(&self.shared.device), Arc::clone(&self.inbox));
        self.shared.workers.submit(Box::new(move || {
            let (ended, buffer) = work(&*device, request, buffer, pattern, &unwanted);
            inbox.put(Arrived { task, serial, ended, buffer });
        }));
    }

    /// A request has ended. Its slot may be another task's from now on, which nobody has aborted.
    fn complete(&mut self, task: TaskId, ended: Ended) {
        self.unwanted.retain(|other| *other != task);
        let shared = self.shared;
        ended.with(|outcome| self.machine.complete(&mut shared.target(), task, outcome, &mut self.out));
        self.poll();
    }

    /// Answers what others have done for this connection. Bytes that were read wait until there is room for them: until then
    /// their command is outstanding, and so an initiator that reads nothing is not read for without end.
    pub(super) fn take_arrived(&mut self) {
        self.arrived.extend(self.inbox.take());
        let count = self.arrived.len();
        for _ in 0..count {
            let Some(arrived) = self.arrived.pop_front() else { return };
            let has_room = self.out.len() < UNSENT || !matches!(arrived.ended, Ended::Data(_));
            match self.away(&arrived) {
                Some(away) if has_room || away.is_unwanted() => self.end_away(arrived),
                Some(_) => self.arrived.push_back(arrived),
                None => {}
            }
        }
    }

    /// The request whose outcome this is, unless it was given up.
    fn away(&self, arrived: &Arrived) -> Option<&Away> {
        let away = self.slots.get(arrived.task.0 as usize)?.away.as_ref()?;
        (away.serial == arrived.serial).then_some(away)
    }

    fn end_away(&mut self, arrived: Arrived) {
        let Arrived { task, ended, buffer, .. } = arrived;
        let Some(slot) = self.slots.get_mut(task.0 as usize) else { return };
        slot.buffer = buffer;
        let unwanted = slot.away.as_ref().is_some_and(Away::is_unwanted);
        let then = slot.away.take().and_then(|away| away.then);
        match (ended, then) {
            (Ended::Done, Some(next)) if !unwanted => return self.requests.push_front((task, next)),
            (ended, _) => self.complete(task, ended),
        }
        // What a Verify that follows does not need.
        let unused = self.requests.iter().all(|(other, _)| *other != task);
        if let Some(buffer) = self.slots[task.0 as usize].buffer.take_if(|_| unused) {
            self.spare.put(buffer);
        }
    }
}
