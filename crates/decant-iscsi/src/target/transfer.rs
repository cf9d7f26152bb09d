//! Data both ways, requests to the backend, and how commands end.

use super::command::is_lun_0;
use super::task::{State, Task};
use super::{Connection, Event, Failure, Outbox, Outcome, Request, Sink, Target, TaskId};
use crate::error::Violation;
use crate::pdu::{
    self, DataIn, DataOut, Header, NO_TAG, ReadyToTransfer, Residual, ScsiResponse, TaskAttribute, Trailer,
    reject_reason,
};
use crate::scsi::{self, Compare, Parameter, Plan, Sense, SenseKey, asc, status};
use crate::serial::Serial;

/// The bytes of a Data-In sequence.
enum Source<'a, B> {
    Own(&'a [u8]),
    Buffer(B),
}

impl Connection {
    /// A Data-Out's header (11.7): it must go on exactly where its sequence is.
    pub(super) fn data_out_header<B: AsRef<[u8]>>(
        &mut self,
        data: &DataOut,
        bhs: &[u8; pdu::BHS_BYTES],
        length: u32,
        target: &mut Target,
        out: &mut Outbox<B>,
    ) -> Result<Sink, Violation> {
        let slot = self.find_task(data.task);
        let Some((slot, Some(Some(task)))) = slot.map(|slot| (slot, self.tasks.get_mut(slot))) else {
            // Of a task that was aborted or has been answered already: the initiator did not know yet (11.7).
            self.header = None;
            return Ok(Sink::Discard);
        };
        let wrong = if task.transfer != Some(data.transfer) {
            Some("Data-Out that was not asked for")
        } else if data.offset != task.received {
            Some("Data-Out out of order")
        } else if task.received.checked_add(length).is_none_or(|end| end > task.sequence_end) {
            Some("Data-Out beyond what was asked for")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            self.reject(reject_reason::PROTOCOL_ERROR, bhs, out);
            return Err(Violation::OutOfPlace(wrong));
        }
        if data.data_sn != task.data_sn {
            // Something of this sequence was lost on the way (7.7): the command fails, the session goes on.
            self.header = None;
            self.forget_buffer(slot);
            let sense = Sense::new(SenseKey::AbortedCommand, asc::CRC_ERROR);
            self.end_with_sense(slot, &sense, target, out);
            return Ok(Sink::Discard);
        }
        task.data_sn = task.data_sn.next();
        Ok(Sink::Task(slot))
    }

    /// Data of a task's: into its list, or an event for the driver.
    pub(super) fn take_data(&mut self, slot: usize, data: &[u8], start: usize) -> Option<Event> {
        let task = self.tasks.get_mut(slot)?.as_mut()?;
        let offset = task.received;
        task.received = offset.saturating_add(u32::try_from(data.len()).unwrap_or(u32::MAX));
        // What comes beyond `want` is passed over.
        let useful = data.len().min(task.want.saturating_sub(offset) as usize);
        if useful == 0 {
            return None;
        }
        if task.keeps_list() {
            task.list.extend_from_slice(data.get(..useful).unwrap_or_default());
            return None;
        }
        let range = start..start.saturating_add(useful);
        Some(Event::Data { task: Self::task_id(slot), offset, total: task.want, range })
    }

    /// A Data-Out is complete.
    pub(super) fn data_out_is_here<B: AsRef<[u8]>>(
        &mut self,
        slot: usize,
        data: &DataOut,
        bhs: &[u8; pdu::BHS_BYTES],
        target: &mut Target,
        out: &mut Outbox<B>,
    ) -> Result<(), Violation> {
        let Some(Some(task)) = self.tasks.get_mut(slot) else { return Ok(()) };
        let at_end = task.received == task.sequence_end;
        // A solicited sequence ends where the R2T said; an unsolicited one may end sooner.
        if at_end != data.is_final && (at_end || !task.is_unsolicited()) {
            self.reject(reject_reason::PROTOCOL_ERROR, bhs, out);
            return Err(Violation::OutOfPlace("a sequence of Data-Out that does not end where it should"));
        }
        if data.is_final {
            task.transfer = None;
            self.go_on_receiving(slot, target, out);
        }
        Ok(())
    }

    /// Asks for what is missing of a task's data, or lets it run.
    pub(super) fn go_on_receiving<B: AsRef<[u8]>>(&mut self, slot: usize, target: &mut Target, out: &mut Outbox<B>) {
        let Some(Some(task)) = self.tasks.get_mut(slot) else { return };
        if task.transfer.is_some() {
            return;
        }
        if task.received < task.want {
            self.next_transfer = self.next_transfer.wrapping_add(1) & 0x7fff_ffff;
            let length = task.want.saturating_sub(task.received).min(self.params.max_burst);
            task.transfer = Some(self.next_transfer);
            task.sequence_end = task.received.saturating_add(length);
            task.data_sn = Serial(0);
            let r2t = ReadyToTransfer {
                is_final: true,
                lun: task.command.lun,
                task: task.command.task,
                transfer: self.next_transfer,
                stat_sn: self.stat_sn,
                exp_cmd_sn: self.exp_cmd_sn,
                max_cmd_sn: self.max_cmd_sn,
                r2t_sn: task.r2t_sn,
                offset: task.received,
                length,
            };
            task.r2t_sn = task.r2t_sn.next();
            self.put(&r2t.into(), &[], out);
            return;
        }
        task.state = State::Waiting;
        self.start(slot, target, out);
    }

    /// Whether an older task must end first (SAM-5 8.6): an ordered one waits for all, all wait for an ordered one.
    fn must_wait(&self, slot: usize) -> bool {
        let Some(Some(task)) = self.tasks.get(slot) else { return false };
        if task.command.attribute == TaskAttribute::HeadOfQueue {
            return false;
        }
        let older = |other: &&Task| other.order < task.order && other.state != State::Aborted;
        self.tasks.iter().flatten().filter(older).any(|other| task.is_ordered() || other.is_ordered())
    }

    /// Runs a task whose data are here, unless it must wait.
    fn start<B: AsRef<[u8]>>(&mut self, slot: usize, target: &mut Target, out: &mut Outbox<B>) {
        if self.must_wait(slot) {
            return;
        }
        if self.check_reservation(slot, target) {
            self.forget_buffer(slot);
            return self.end_with_status(slot, status::RESERVATION_CONFLICT, target, out);
        }
        let Some(Some(task)) = self.tasks.get_mut(slot) else { return };
        let (block, want) = (target.disk().block_bytes, task.want);
        let plan = match task.plan {
            Ok(plan) => plan,
            Err(sense) => return self.end_with_sense(slot, &sense, target, out),
        };
        // The initiator may have announced less than the command moves: whole blocks of it are moved.
        let cut = |length: u32| length.min(want.checked_div(block).unwrap_or_default().saturating_mul(block));
        let request = match plan {
            Plan::Done | Plan::RequestSense { .. } => None,
            Plan::Read { offset, length, fua } => Some(Request::Read { offset, length, fua }),
            Plan::Write { offset, length, fua, verify } => {
                let length = cut(length);
                task.chain = verify.map(|compare| Request::Verify { offset, length, compare }).into_iter().collect();
                (length > 0).then_some(Request::Write { offset, length, fua, keep: verify.is_some() })
            }
            Plan::Verify { offset, length, compare } => {
                let length = match compare {
                    Compare::All => cut(length),
                    Compare::OneBlock if want < block => 0,
                    _ => length,
                };
                (length > 0).then_some(Request::Verify { offset, length, compare })
            }
            // With UNMAP the blocks read as zeros afterwards whatever block was sent: what LIO does and libiscsi's tests
            // ask for; an initiator that means another pattern does not ask to have it unmapped.
            Plan::Same { offset, length, unmap, .. } if unmap || task.list.iter().all(|byte| *byte == 0) => {
                Some(Request::Zero { offset, length, unmap })
            }
            Plan::Same { offset, length, .. } => Some(Request::Fill { offset, length }),
            Plan::Flush => Some(Request::Flush),
            Plan::LbaStatus { offset, descriptors, .. } => Some(Request::Status { offset, extents: descriptors }),
            Plan::Digests { offset, length } => Some(Request::Digests { offset, length }),
            Plan::Parameter { kind, .. } => match self.parameter(slot, kind, target) {
                Ok(first) => first,
                Err(sense) => return self.end_with_sense(slot, &sense, target, out),
            },
            Plan::Reserve => {
                target.reserve(self.id);
                None
            }
            Plan::Release => {
                target.release(self.id);
                None
            }
        };
        match request {
            Some(request) => self.ask(slot, request, target),
            None => {
                self.forget_buffer(slot);
                self.end_with_reply(slot, &[], target, out);
            }
        }
    }

    /// Deals with a parameter list; gives the first request that comes of it.
    fn parameter(&mut self, slot: usize, kind: Parameter, target: &mut Target) -> Result<Option<Request>, Sense> {
        let Some(Some(task)) = self.tasks.get_mut(slot) else { return Ok(None) };
        if kind == Parameter::Unmap {
            let ranges = scsi::unmap_ranges(target.disk(), &task.list)?;
            task.chain = ranges
                .iter()
                .rev()
                .map(|(offset, length)| Request::Unmap { offset: *offset, length: *length })
                .collect();
            return Ok(task.chain.pop());
        }
        let mode = scsi::mode_select(target.disk(), *target.mode(), &task.command.cdb, kind, &task.list)?;
        target.set_mode(mode, self.id);
        Ok(None)
    }

    fn ask(&mut self, slot: usize, request: Request, target: &mut Target) {
        if let Some(Some(task)) = self.tasks.get_mut(slot) {
            task.state = State::Running;
            task.resets = self.resets;
        }
        target.begin(self.id);
        self.events.push_back(Event::Request { task: Self::task_id(slot), request });
    }

    /// The driver's buffer of a task that has one, and will not get a request, is not needed.
    pub(super) fn forget_buffer(&mut self, slot: usize) {
        let Some(Some(task)) = self.tasks.get(slot) else { return };
        if !task.keeps_list() && task.want > 0 && task.received > 0 {
            self.events.push_back(Event::Forget(Self::task_id(slot)));
        }
    }

    /// A request has ended; events may have come of it ([`Self::poll_event`]).
    pub fn complete<B: AsRef<[u8]>>(
        &mut self,
        target: &mut Target,
        task: TaskId,
        outcome: Outcome<'_, B>,
        out: &mut Outbox<B>,
    ) {
        let slot = task.0 as usize;
        let Some(Some(task)) = self.tasks.get_mut(slot) else {
            debug_assert!(false, "a request is completed once");
            return;
        };
        target.finish(self.id, task.resets);
        let aborted = task.state == State::Aborted || task.resets != target.resets() || !self.is_logged_in();
        if aborted {
            if let Outcome::Data(buffer) = outcome {
                out.recycle(buffer);
            }
            self.remove(slot);
            self.widen();
            self.sync(target, out);
            self.start_waiting(target, out);
            return;
        }
        self.conclude(slot, outcome, target, out);
        self.sync(target, out);
    }

    fn conclude<B: AsRef<[u8]>>(
        &mut self,
        slot: usize,
        outcome: Outcome<'_, B>,
        target: &mut Target,
        out: &mut Outbox<B>,
    ) {
        let Some(Some(task)) = self.tasks.get_mut(slot) else { return };
        match outcome {
            Outcome::Done => match task.chain.pop() {
                Some(next) => self.ask(slot, next, target),
                None => self.end_with_reply(slot, &[], target, out),
            },
            Outcome::Data(buffer) => {
                let Some(task) = self.remove(slot) else { return };
                self.widen();
                let length = buffer.as_ref().len();
                self.put_data_in(&task, Source::Buffer(buffer), length, out);
                self.start_waiting(target, out);
            }
            Outcome::Mismatch(at) => self.end_with_sense(slot, &Sense::miscompare(at), target, out),
            Outcome::Extents(extents) => {
                let mut reply = Vec::new();
                if let Ok(Plan::LbaStatus { offset, allocation, .. }) = task.plan {
                    scsi::lba_status(target.disk(), offset, extents, allocation, &mut reply);
                }
                self.end_with_reply(slot, &reply, target, out);
            }
            Outcome::Digests(digests) => {
                let reply: Vec<u8> = digests.iter().flat_map(|digest| digest.to_be_bytes()).collect();
                self.end_with_reply(slot, &reply, target, out);
            }
            Outcome::Failed(failure) => {
                let reads = matches!(
                    task.plan,
                    Ok(Plan::Read { .. } | Plan::Verify { .. } | Plan::LbaStatus { .. } | Plan::Digests { .. })
                );
                let sense = sense_of(failure, !reads, target.disk().block_bytes);
                self.end_with_sense(slot, &sense, target, out);
            }
        }
    }

    /// Runs tasks that waited for one that has ended.
    pub(super) fn start_waiting<B: AsRef<[u8]>>(&mut self, target: &mut Target, out: &mut Outbox<B>) {
        // Nobody waits unless there are ordered tasks, which initiators hardly send.
        loop {
            let waits = |(slot, task): (usize, &Option<Task>)| {
                task.as_ref().filter(|task| task.state == State::Waiting).map(|task| (task.order, slot))
            };
            let ready =
                self.tasks.iter().enumerate().filter_map(waits).filter(|(_, slot)| !self.must_wait(*slot)).min();
            let Some((_, slot)) = ready else { return };
            self.start(slot, target, out);
        }
    }

    /// Ends a task with GOOD and these bytes.
    pub(super) fn end_with_reply<B: AsRef<[u8]>>(
        &mut self,
        slot: usize,
        reply: &[u8],
        target: &mut Target,
        out: &mut Outbox<B>,
    ) {
        let Some(task) = self.remove(slot) else { return };
        self.widen();
        if reply.is_empty() {
            let (needed, expected) = if task.command.write {
                (u64::from(task.needed), task.expected_write())
            } else {
                (u64::from(task.needed), task.expected_read())
            };
            self.put_response(&task, status::GOOD, Residual::between(expected, needed), &[], out);
        } else {
            self.put_data_in::<B>(&task, Source::Own(reply), reply.len(), out);
        }
        self.start_waiting(target, out);
    }

    pub(super) fn end_with_sense<B: AsRef<[u8]>>(
        &mut self,
        slot: usize,
        sense: &Sense,
        target: &mut Target,
        out: &mut Outbox<B>,
    ) {
        let Some(task) = self.remove(slot) else { return };
        self.widen();
        let bytes = sense.encode(target.mode().descriptor_sense && is_lun_0(task.command.lun));
        let length = u16::try_from(bytes.len()).unwrap_or_default();
        let data = [&length.to_be_bytes()[..], &bytes].concat();
        // Nothing was sent of what was to be read; of what was to be written, it does not matter how much.
        let residual = Residual::between(task.expected_read(), 0);
        self.put_response(&task, status::CHECK_CONDITION, residual, &data, out);
        self.start_waiting(target, out);
    }

    pub(super) fn end_with_status<B: AsRef<[u8]>>(
        &mut self,
        slot: usize,
        status: u8,
        target: &mut Target,
        out: &mut Outbox<B>,
    ) {
        let Some(task) = self.remove(slot) else { return };
        self.widen();
        let residual = Residual::between(task.expected_read(), 0);
        self.put_response(&task, status, residual, &[], out);
        self.start_waiting(target, out);
    }

    fn put_response<B: AsRef<[u8]>>(
        &mut self,
        task: &Task,
        status: u8,
        residual: Residual,
        data: &[u8],
        out: &mut Outbox<B>,
    ) {
        let response = ScsiResponse {
            is_final: true,
            status,
            task: task.command.task,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
            exp_data_sn: task.r2t_sn,
            residual,
            ..ScsiResponse::default()
        };
        self.put(&response.into(), data, out);
    }

    /// Sends the data of a read in Data-In PDUs, the last of which has the status (11.7.3).
    fn put_data_in<B: AsRef<[u8]>>(&mut self, task: &Task, source: Source<'_, B>, length: usize, out: &mut Outbox<B>) {
        let expected = task.expected_read();
        let residual = Residual::between(expected, length as u64);
        let length = length.min(expected as usize);
        if length == 0 {
            if let Source::Buffer(buffer) = source {
                out.recycle(buffer);
            }
            return self.put_response(task, status::GOOD, residual, &[], out);
        }
        let bytes = match &source {
            Source::Own(bytes) => bytes,
            Source::Buffer(buffer) => buffer.as_ref(),
        };
        let (segment, burst) = (self.params.max_send.max(512) as usize, self.params.max_burst.max(512) as usize);
        let digests = self.params.digests;
        let (mut at, mut sequence, mut data_sn) = (0usize, 0usize, Serial(0));
        while at < length {
            let step = length.saturating_sub(at).min(segment).min(burst.saturating_sub(sequence));
            let (end, ends) = (at.saturating_add(step), at.saturating_add(step) == length);
            sequence = sequence.saturating_add(step);
            let full = sequence >= burst;
            let header = DataIn {
                is_final: ends || full,
                has_status: ends,
                status: status::GOOD,
                task: task.command.task,
                transfer: NO_TAG,
                stat_sn: if ends { self.next_stat_sn() } else { Serial(0) },
                exp_cmd_sn: self.exp_cmd_sn,
                max_cmd_sn: self.max_cmd_sn,
                data_sn,
                offset: u32::try_from(at).unwrap_or(u32::MAX),
                residual: if ends { residual } else { Residual::None },
                ..DataIn::default()
            };
            let part = bytes.get(at..end).unwrap_or_default();
            let count = u32::try_from(part.len()).unwrap_or_default();
            out.put(|out| pdu::put_header(out, &Header::DataIn(header), count, digests));
            match &source {
                Source::Own(_) => out.put(|out| out.extend_from_slice(part)),
                Source::Buffer(_) => out.put_range(at..end, ends),
            }
            out.put(|out| out.extend_from_slice(Trailer::of(part, digests).as_bytes()));
            (at, data_sn) = (end, data_sn.next());
            if full {
                sequence = 0;
            }
        }
        if let Source::Buffer(buffer) = source {
            out.put_buffer(buffer);
        }
    }

    pub(super) fn next_stat_sn(&mut self) -> Serial {
        let stat_sn = self.stat_sn;
        self.stat_sn = stat_sn.next();
        stat_sn
    }

    pub(super) fn put<B: AsRef<[u8]>>(&mut self, header: &Header, data: &[u8], out: &mut Outbox<B>) {
        let digests = self.params.digests;
        out.put(|bytes| pdu::put(bytes, header, data, digests));
    }
}

fn sense_of(failure: Failure, writes: bool, block: u32) -> Sense {
    match failure {
        Failure::Medium(at) => {
            let sense = Sense::new(SenseKey::MediumError, if writes { asc::WRITE_ERROR } else { asc::READ_ERROR });
            let lba = at.and_then(|at| at.checked_div(block.into()));
            Sense { information: lba.map_or(scsi::Information::None, scsi::Information::Value), ..sense }
        }
        Failure::NoSpace => Sense::new(SenseKey::DataProtect, asc::NO_SPACE),
        Failure::ReadOnly => Sense::new(SenseKey::DataProtect, asc::WRITE_PROTECTED),
        Failure::NotReady => Sense::new(SenseKey::NotReady, asc::NOT_READY),
        Failure::Target => Sense::new(SenseKey::HardwareError, asc::TARGET_FAILURE),
    }
}
