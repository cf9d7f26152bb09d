//! The full feature phase: commands out, data and statuses in, and what else a target may say.

use super::probe::{Probe, Step, Unusable};
use super::task::{Order, State, Task, Tries};
use super::verdict::{Failure, Sense, Verdict, judge};
use super::{Answer, Event, Initiator, Phase, Sink};
use crate::error::Violation;
use crate::pdu::{
    AsyncMessage, DataIn, Header, NO_TAG, NopIn, NopOut, Residual, ScsiCommand, TaskAttribute, async_event,
    reject_reason,
};
use crate::serial::Serial;
use crate::wire::Fields;

/// Longest data segment that is kept of anything but a command's data: sense data have 252 bytes at most, a rejected header 48.
const MAX_COLLECTED: u32 = 8192;
/// A command that a unit attention came in the way of is sent again at once so often, and then after a pause.
const PROMPT_TRIES: u32 = 4;
/// A command is put off so often for a reason that comes from the disk as a whole; then the session ends and says so. With the
/// pauses that is 5 s, and a few more far away: less than the 10 s after which a lane gives up a silent disk without a reason.
const MAX_PUT_OFF: u32 = 10;
/// The first pause, ms; it doubles up to [`MAX_PAUSE`].
const FIRST_PAUSE: u64 = 20;
/// The longest pause, ms.
const MAX_PAUSE: u64 = 1000;
/// Failures that may pass are believed after so many tries.
const MAX_RETRIES: u32 = 8;
/// The tag of a probe's commands; they have no driver.
const PROBE_TAG: u64 = u64::MAX;
/// Shortest time that is given to commands when the target wants the session to end, ms.
const LEAST_LEAVE: u64 = 1000;

impl<B: AsRef<[u8]> + AsMut<[u8]>> Initiator<B> {
    /// A header has come; where do its data go?
    pub(super) fn handle_header(&mut self, header: &Header, data_length: u32) -> Result<Sink, Violation> {
        if let Phase::Login(_) = self.phase {
            return match header {
                Header::LoginResponse(response) => {
                    self.take_window(response.exp_cmd_sn, response.max_cmd_sn);
                    Ok(Sink::Collect)
                }
                other => Err(Violation::Opcode(other.opcode())),
            };
        }
        match header {
            Header::DataIn(data) => return self.data_in_header(data, data_length),
            Header::NopIn(_) => return Ok(Sink::Discard),
            Header::ScsiResponse(_) | Header::LogoutResponse(_) | Header::AsyncMessage(_) | Header::Reject(_) => {}
            other => return Err(Violation::Opcode(other.opcode())),
        }
        if data_length > MAX_COLLECTED {
            let (length, limit) = (data_length.into(), MAX_COLLECTED.into());
            return Err(Violation::TooLong { what: "data of an answer", length, limit });
        }
        Ok(Sink::Collect)
    }

    /// Data-In (11.7): it must go on exactly where the command's data are. Digests and DataPDUInOrder=Yes leave no other
    /// reason for a gap than a target that has lost something.
    fn data_in_header(&mut self, data: &DataIn, length: u32) -> Result<Sink, Violation> {
        let slot = self.tasks.find(data.task).ok_or(Violation::UnknownTask(data.task))?;
        let task = self.tasks.get_mut(slot).ok_or(Violation::UnknownTask(data.task))?;
        if data.data_sn != task.data_sn {
            return Err(Violation::OutOfPlace("a gap in DataSN"));
        }
        if data.offset != task.received {
            return Err(Violation::OutOfPlace("Data-In out of order"));
        }
        if task.received.checked_add(length).is_none_or(|end| end > task.expected) {
            return Err(Violation::OutOfPlace("more Data-In than asked for"));
        }
        task.data_sn = task.data_sn.next();
        task.since = self.clock.now;
        Ok(Sink::Task(slot))
    }

    /// A PDU is complete.
    pub(super) fn full_feature(
        &mut self,
        header: &Header,
        sink: Sink,
        data: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(), Violation> {
        match header {
            Header::DataIn(data_in) => {
                self.take_window(data_in.exp_cmd_sn, data_in.max_cmd_sn);
                if data_in.has_status
                    && let Sink::Task(slot) = sink
                {
                    self.take_stat_sn(data_in.stat_sn)?;
                    return self.conclude(slot, judge(0, data_in.status, &[]), data_in.residual);
                }
                Ok(())
            }
            Header::ScsiResponse(response) => {
                self.take_window(response.exp_cmd_sn, response.max_cmd_sn);
                self.take_stat_sn(response.stat_sn)?;
                let slot = self.tasks.find(response.task).ok_or(Violation::UnknownTask(response.task))?;
                self.conclude(slot, judge(response.response, response.status, data), response.residual)
            }
            Header::NopIn(nop) => self.nop_in(nop, out),
            Header::AsyncMessage(message) => self.async_message(message, data),
            Header::Reject(reject) => {
                self.take_window(reject.exp_cmd_sn, reject.max_cmd_sn);
                self.take_stat_sn(reject.stat_sn)?;
                // The target has enough immediate commands: it is alive, which is all a ping asks.
                if reject.reason == reject_reason::IMMEDIATE && data.u8_at(0) & 0x3f == crate::pdu::opcode::NOP_OUT {
                    self.clock.pinged = None;
                    return Ok(());
                }
                Err(Violation::Rejected(reject.reason))
            }
            Header::LogoutResponse(response) => {
                self.take_stat_sn(response.stat_sn)?;
                if !matches!(self.phase, Phase::Leaving) {
                    return Err(Violation::OutOfPlace("an answer to a logout that was not asked for"));
                }
                self.phase = Phase::Ended;
                self.events.push_back(Event::Ended);
                Ok(())
            }
            other => Err(Violation::Opcode(other.opcode())),
        }
    }

    /// ExpCmdSN and MaxCmdSN (4.2.2.1): the window never narrows, and an impossible pair means nothing.
    fn take_window(&mut self, exp_cmd_sn: Serial, max_cmd_sn: Serial) {
        if max_cmd_sn.next().is_before(exp_cmd_sn) {
            return;
        }
        if self.max_cmd_sn.is_before(max_cmd_sn) {
            self.max_cmd_sn = max_cmd_sn;
        }
    }

    /// StatSN (4.2.2.2): with one connection and ErrorRecoveryLevel 0, a number left out is an answer lost.
    fn take_stat_sn(&mut self, stat_sn: Serial) -> Result<(), Violation> {
        if stat_sn != self.exp_stat_sn {
            return Err(Violation::OutOfPlace("a gap in StatSN"));
        }
        self.exp_stat_sn = stat_sn.next();
        Ok(())
    }

    fn nop_in(&mut self, nop: &NopIn, out: &mut Vec<u8>) -> Result<(), Violation> {
        self.take_window(nop.exp_cmd_sn, nop.max_cmd_sn);
        if nop.task != NO_TAG {
            self.take_stat_sn(nop.stat_sn)?;
            // The answer to an older ping than the last is no news, and no harm.
            if self.clock.pinged.is_some_and(|(task, _)| task == nop.task) {
                self.clock.pinged = None;
            }
            return Ok(());
        }
        if nop.transfer != NO_TAG {
            let answer = NopOut {
                immediate: true,
                is_final: true,
                lun: nop.lun,
                task: NO_TAG,
                transfer: nop.transfer,
                cmd_sn: self.cmd_sn,
                exp_stat_sn: self.exp_stat_sn,
            };
            self.put(&answer.into(), out);
        }
        Ok(())
    }

    fn async_message(&mut self, message: &AsyncMessage, data: &[u8]) -> Result<(), Violation> {
        self.take_window(message.exp_cmd_sn, message.max_cmd_sn);
        self.take_stat_sn(message.stat_sn)?;
        match message.event {
            async_event::SCSI if Sense::decode(data).tells_of_change() => Err(Violation::Changed),
            async_event::SCSI if Sense::decode(data).tells_of_reset() => {
                Err(Violation::Reset(Sense::decode(data).failure()))
            }
            // Negotiating anew is what a new session does.
            async_event::LOGOUT_REQUESTED | async_event::NEGOTIATION_REQUESTED => {
                let wait = u64::from(message.parameter3).saturating_mul(1000).max(LEAST_LEAVE);
                self.clock.leave_by.get_or_insert(self.clock.now.saturating_add(wait));
                Ok(())
            }
            async_event::CONNECTION_DROPPED | async_event::SESSION_DROPPED => Err(Violation::Dropped),
            _ => Ok(()),
        }
    }

    /// A command has ended, for now or for good. Only what is for good counts as progress.
    fn conclude(&mut self, slot: usize, verdict: Verdict, residual: Residual) -> Result<(), Violation> {
        let ready = !matches!(self.phase, Phase::Probing(_));
        match verdict {
            Verdict::Changed if ready => Err(Violation::Changed),
            // What else was asked will never be answered: a new session asks for all of it again.
            Verdict::Reset(failure) if ready => Err(Violation::Reset(failure)),
            Verdict::Changed | Verdict::Reset(_) | Verdict::Again(_) if !ready => {
                let Some(Task { order: Order::Probe(step), .. }) = self.tasks.remove(slot) else { return Ok(()) };
                self.probe_goes_on(|probe| probe.interrupted(step))
            }
            Verdict::Later(failure @ Failure::Check { .. }) if !ready => Err(Violation::NotReady(failure)),
            Verdict::Again(failure) | Verdict::Reset(failure) => {
                let tries = self.put_off(slot, PROMPT_TRIES, |tries| &mut tries.interrupted);
                if tries > PROMPT_TRIES + MAX_PUT_OFF { Err(Violation::NotReady(failure)) } else { Ok(()) }
            }
            Verdict::Later(failure) => {
                let tries = self.put_off(slot, 0, |tries| &mut tries.busy);
                if tries > MAX_PUT_OFF { Err(Violation::NotReady(failure)) } else { Ok(()) }
            }
            Verdict::Retry(failure) => {
                let tries = self.put_off(slot, 1, |tries| &mut tries.failed);
                if tries > MAX_RETRIES { self.finish(slot, Err(failure)) } else { Ok(()) }
            }
            Verdict::Failed(failure) => self.finish(slot, Err(failure)),
            Verdict::Good | Verdict::Changed => {
                // What a read asked for is all that will do. Answers about the disk may be shorter.
                let whole = match self.tasks.get_mut(slot) {
                    Some(Task { order: Order::Probe(_) | Order::Status { .. }, .. }) => true,
                    Some(task) => task.received == task.expected && !matches!(residual, Residual::Underflow(1..)),
                    None => false,
                };
                self.finish(slot, if whole { Ok(()) } else { Err(Failure::Short) })
            }
        }
    }

    /// Has a command sent again: at once the first `prompt` times that it is for this reason, then after a pause. How often that
    /// was, this time included.
    fn put_off(&mut self, slot: usize, prompt: u32, reason: impl FnOnce(&mut Tries) -> &mut u32) -> u32 {
        let now = self.clock.now;
        let Some(task) = self.tasks.get_mut(slot) else { return 0 };
        task.rewind();
        let tries = reason(&mut task.tries);
        let pause = match tries.checked_sub(prompt) {
            None => 0,
            Some(doublings) => {
                FIRST_PAUSE.checked_shl(doublings.min(16)).map_or(MAX_PAUSE, |pause| pause.min(MAX_PAUSE))
            }
        };
        *tries = tries.saturating_add(1);
        let tries = *tries;
        task.state = State::Due(now.saturating_add(pause));
        tries
    }

    /// A command is over, one way or the other.
    fn finish(&mut self, slot: usize, result: Result<(), Failure>) -> Result<(), Violation> {
        let Some(task) = self.tasks.remove(slot) else { return Ok(()) };
        self.progress = self.progress.wrapping_add(1);
        self.latest = self.latest.max(task.turn);
        if let Order::Probe(step) = task.order {
            return self.probe_answered(step, result.map(|()| task.reply));
        }
        let answer = result.map(|()| match (task.order, task.buffer) {
            (Order::Read { .. }, Some(buffer)) => Answer::Data(buffer),
            (Order::Status { offset }, _) => Answer::Extents(self.device.extents(offset, &task.reply)),
            _ => Answer::Digests(task.reply.chunks_exact(4).map(|digest| digest.u32_at(0)).collect()),
        });
        self.events.push_back(Event::Done { tag: task.tag, answer });
        Ok(())
    }

    fn probe_answered(&mut self, step: Step, answer: Result<Vec<u8>, Failure>) -> Result<(), Violation> {
        self.probe_goes_on(|probe| probe.answered(step, answer.as_deref().map_err(|failure| *failure)))
    }

    fn probe_goes_on(
        &mut self,
        event: impl FnOnce(&mut Probe) -> Result<Option<Vec<Step>>, Unusable>,
    ) -> Result<(), Violation> {
        let Phase::Probing(probe) = &mut self.phase else { return Ok(()) };
        match event(probe).map_err(unusable)? {
            Some(next) => next.into_iter().for_each(|step| self.ask_probe(step)),
            None => {
                self.device = probe.device().clone();
                match &self.known {
                    Some(known) => known.check_same(&self.device).map_err(Violation::OtherDisk)?,
                    None => self.known = Some(self.device.clone()),
                }
                self.phase = Phase::Ready;
                self.events.push_back(Event::Ready);
            }
        }
        Ok(())
    }

    /// Puts a question to the disk; it goes out with the next [`Self::send_due`].
    pub(super) fn ask_probe(&mut self, step: Step) {
        self.send_new(Task::new(PROBE_TAG, Order::Probe(step), step.command(), None, self.clock.now));
    }

    pub(super) fn send_new(&mut self, task: Task<B>) {
        let entered = self.tasks.insert(task);
        debug_assert!(entered.is_some(), "there are more slots than commands may be outstanding");
    }

    /// Sends what is due, as far as the window goes, the oldest first.
    pub(super) fn send_due(&mut self, out: &mut Vec<u8>) {
        while self.window() > 0 {
            let now = self.clock.now;
            let Some((_, slot)) = self.tasks.due().filter(|(at, _)| *at <= now).min() else { return };
            let (cmd_sn, lun, exp_stat_sn) = (self.cmd_sn, self.lun(), self.exp_stat_sn);
            let itt = self.tasks.next_itt(slot);
            let Some(task) = self.tasks.get_mut(slot) else { return };
            (task.itt, task.state, task.since, task.turn) = (itt, State::Sent, now, self.sent);
            self.sent = self.sent.saturating_add(1);
            let command = ScsiCommand {
                is_final: true,
                read: task.expected > 0,
                attribute: TaskAttribute::Simple,
                lun,
                task: itt,
                expected_length: task.expected,
                cmd_sn,
                exp_stat_sn,
                cdb: task.cdb,
                ..ScsiCommand::default()
            };
            self.cmd_sn = cmd_sn.next();
            self.put(&command.into(), out);
        }
    }
}

fn unusable(why: Unusable) -> Violation {
    match why {
        Unusable::For(what) => Violation::Unusable(what),
        Unusable::Failed(failure) => Violation::NotReady(failure),
    }
}
