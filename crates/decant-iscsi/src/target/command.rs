//! PDUs of the full feature phase as they come in: numbers checked, commands admitted and planned.

use super::control::EXCHANGE_BYTES;
use super::task::{State, Task};
use super::{Arrival, Connection, Outbox, Phase, Sink, Target, TaskId};
use crate::error::Violation;
use crate::pdu::{Header, NO_TAG, ScsiCommand, TaskAttribute, reject_reason};
use crate::scsi::{self, Context, Plan, Sense, asc, status};
use crate::serial::Serial;

/// Immediate commands that can be outstanding beside the window (4.2.2.1); more are rejected.
pub(super) const MAX_IMMEDIATE: u32 = 8;
/// Longest parameter list that is taken, bytes: one field of 16 bits says it.
const MAX_LIST: u32 = 65_535;

/// What a CmdSN makes of its PDU.
enum Admission {
    /// It is dealt with.
    Taken,
    /// It is outside of the window, and not there for us (4.2.2.1).
    Ignored,
}

impl Connection {
    /// A header has come; where do its data go?
    pub(super) fn handle_header<B: AsRef<[u8]>>(
        &mut self,
        target: &mut Target,
        arrival: &Arrival<'_>,
        out: &mut Outbox<B>,
    ) -> Result<Sink, Violation> {
        let Arrival { header, bhs, data_length, .. } = arrival;
        let data_length = *data_length;
        if matches!(self.phase, Phase::Login(_)) {
            return self.login_header(header, out);
        }
        let (immediate, cmd_sn) = match header {
            Header::ScsiCommand(command) => (command.immediate, command.cmd_sn),
            Header::NopOut(nop) => (nop.immediate, nop.cmd_sn),
            Header::TaskRequest(request) => (request.immediate, request.cmd_sn),
            Header::TextRequest(request) => (request.immediate, request.cmd_sn),
            Header::LogoutRequest(request) => (request.immediate, request.cmd_sn),
            Header::DataOut(data) => return self.data_out_header(data, bhs, data_length, target, out),
            Header::Snack(_) => {
                self.reject(reject_reason::SNACK, bhs, out);
                return Ok(Sink::Discard);
            }
            other => {
                self.reject(reject_reason::PROTOCOL_ERROR, bhs, out);
                return Err(Violation::Opcode(other.opcode()));
            }
        };
        if self.discovery && matches!(header, Header::ScsiCommand(_) | Header::TaskRequest(_)) {
            self.reject(reject_reason::PROTOCOL_ERROR, bhs, out);
            return Err(Violation::OutOfPlace("a command in a discovery session"));
        }
        if !immediate && let Admission::Ignored = self.admit(cmd_sn)? {
            self.header = None;
            return Ok(Sink::Discard);
        }
        match header {
            Header::ScsiCommand(command) => self.command_header(target, command, arrival, out),
            Header::NopOut(_) | Header::TextRequest(_) if data_length > EXCHANGE_BYTES => {
                self.reject(reject_reason::INVALID_FIELD, bhs, out);
                self.header = None;
                Ok(Sink::Discard)
            }
            Header::NopOut(_) | Header::TextRequest(_) => Ok(Sink::Text),
            _ => Ok(Sink::Discard),
        }
    }

    /// Takes the next CmdSN, or says that this is not for us.
    fn admit(&mut self, cmd_sn: Serial) -> Result<Admission, Violation> {
        if cmd_sn == self.exp_cmd_sn && cmd_sn.is_at_most(self.max_cmd_sn) {
            self.exp_cmd_sn = cmd_sn.next();
            return Ok(Admission::Taken);
        }
        if self.exp_cmd_sn.is_before(cmd_sn) && cmd_sn.is_at_most(self.max_cmd_sn) {
            // With one connection, which keeps its order, what is missing can never come.
            return Err(Violation::OutOfPlace("a gap in CmdSN"));
        }
        Ok(Admission::Ignored)
    }

    fn command_header<B: AsRef<[u8]>>(
        &mut self,
        target: &mut Target,
        command: &ScsiCommand,
        arrival: &Arrival<'_>,
        out: &mut Outbox<B>,
    ) -> Result<Sink, Violation> {
        let Arrival { bhs, ahs, data_length, .. } = *arrival;
        if command.task == NO_TAG || self.find_task(command.task).is_some() {
            self.reject(reject_reason::TASK_IN_PROGRESS, bhs, out);
            return Err(Violation::OutOfPlace("an Initiator Task Tag that is in use"));
        }
        let unsolicited = command.write && !command.is_final;
        let burst = self.params.first_burst.min(command.expected_length);
        let wrong = if data_length > 0 && !(command.write && self.params.immediate_data) {
            Some("immediate data that were not agreed")
        } else if unsolicited && self.params.initial_r2t {
            Some("unsolicited data that were not agreed")
        } else if data_length > burst {
            Some("more immediate data than agreed")
        } else {
            None
        };
        if let Some(wrong) = wrong {
            self.reject(reject_reason::PROTOCOL_ERROR, bhs, out);
            return Err(Violation::OutOfPlace(wrong));
        }
        let free = self.tasks.iter().position(Option::is_none);
        let Some(slot) = free.filter(|_| !command.immediate || self.immediate < MAX_IMMEDIATE) else {
            self.reject(reject_reason::IMMEDIATE, bhs, out);
            self.header = None;
            return Ok(Sink::Discard);
        };
        self.next_order = self.next_order.wrapping_add(1);
        let mut task = Task::new(*command, self.next_order, self.resets);
        self.scratch.clear();
        task.plan = self.plan(target, command, ahs);
        if let Ok(plan) = &task.plan {
            task.needed = plan.data_out(target.disk().block_bytes);
            task.want = task.needed.min(task.expected_write());
            task.length = task.needed;
        }
        if let Err(sense) = wrong_length(&task) {
            (task.plan, task.want) = (Err(sense), 0);
        }
        if unsolicited {
            task.transfer = Some(NO_TAG);
            task.sequence_end = burst;
        }
        self.outstanding = self.outstanding.saturating_add(1);
        self.immediate = self.immediate.saturating_add(u32::from(command.immediate));
        if let Some(place) = self.tasks.get_mut(slot) {
            *place = Some(task);
        }
        Ok(Sink::Task(slot))
    }

    /// What a command comes to, the session's unit attentions and the reservation considered; the answer is in `scratch`.
    fn plan(&mut self, target: &mut Target, command: &ScsiCommand, ahs: &[u8]) -> Result<Plan, Sense> {
        // Nothing here has a CDB beyond 16 bytes, nor data in both directions.
        if !ahs.is_empty() || (command.read && command.write) {
            return Err(Sense::illegal(asc::INVALID_INFORMATION_UNIT));
        }
        if matches!(command.attribute, TaskAttribute::Aca | TaskAttribute::Reserved(_)) {
            return Err(Sense::illegal(asc::INVALID_INFORMATION_UNIT));
        }
        let is_lun_0 = is_lun_0(command.lun);
        if is_lun_0
            && !scsi::passes_attention(&command.cdb)
            && let Some(asc) = target.take_attention(self.id)
        {
            return Err(Sense::attention(asc));
        }
        let context = Context {
            disk: target.disk(),
            mode: target.mode(),
            is_lun_0,
            target_name: &target.config.name,
            portal_group: target.config.portal_group,
        };
        let plan = scsi::plan(&context, &command.cdb, &mut self.scratch)?;
        if let Plan::RequestSense { descriptor, allocation } = plan {
            let attention = target.take_attention(self.id).map(Sense::attention);
            let sense = attention.unwrap_or(Sense::new(scsi::SenseKey::NoSense, asc::NONE)).encode(descriptor);
            self.scratch.extend_from_slice(sense.get(..allocation as usize).unwrap_or(&sense));
            return Ok(Plan::Done);
        }
        Ok(plan)
    }

    /// All of a PDU is here.
    pub(super) fn handle_end<B: AsRef<[u8]>>(
        &mut self,
        target: &mut Target,
        out: &mut Outbox<B>,
    ) -> Result<(), Violation> {
        let sink = std::mem::replace(&mut self.sink, Sink::Discard);
        let Some((header, bhs)) = self.header.take() else { return Ok(()) };
        match &header {
            Header::LoginRequest(request) if matches!(self.phase, Phase::Login(_)) => {
                self.login_request(request, target, out)
            }
            Header::ScsiCommand(_) => {
                if let Sink::Task(slot) = sink {
                    self.command_is_here(slot, target, out);
                }
                Ok(())
            }
            Header::DataOut(data) => {
                if let Sink::Task(slot) = sink {
                    return self.data_out_is_here(slot, data, &bhs, target, out);
                }
                Ok(())
            }
            Header::NopOut(nop) => {
                self.nop_out(nop, out);
                Ok(())
            }
            Header::TextRequest(request) => self.text_request(request, &bhs, target, out),
            Header::TaskRequest(request) => {
                self.task_request(request, &bhs, target, out);
                Ok(())
            }
            Header::LogoutRequest(request) => {
                self.logout_request(request, &bhs, target, out);
                Ok(())
            }
            _ => Ok(()),
        }
    }

    /// A command with its immediate data is here.
    fn command_is_here<B: AsRef<[u8]>>(&mut self, slot: usize, target: &mut Target, out: &mut Outbox<B>) {
        let Some(Some(task)) = self.tasks.get_mut(slot) else { return };
        // Only a command that is answered at once can have an answer; it goes out before the next is planned.
        if task.plan.is_ok_and(|plan| plan == Plan::Done) && task.transfer.is_none() {
            let reply = std::mem::take(&mut self.scratch);
            let reserved = self.check_reservation(slot, target);
            if reserved {
                self.end_with_status(slot, status::RESERVATION_CONFLICT, target, out);
            } else {
                self.end_with_reply(slot, &reply, target, out);
            }
            self.scratch = reply;
            return;
        }
        self.go_on_receiving(slot, target, out);
    }

    /// Whether another session's reservation is in this task's way.
    pub(super) fn check_reservation(&self, slot: usize, target: &Target) -> bool {
        let Some(Some(task)) = self.tasks.get(slot) else { return false };
        is_lun_0(task.command.lun)
            && target.is_reserved_by_other(self.id)
            && !scsi::passes_reservation(&task.command.cdb)
    }

    pub(super) fn find_task(&self, tag: u32) -> Option<usize> {
        let has = |task: &Task| task.command.task == tag && task.state != State::Aborted;
        self.tasks.iter().position(|task| task.as_ref().is_some_and(has))
    }

    /// Removes a task that has ended and widens the window.
    pub(super) fn remove(&mut self, slot: usize) -> Option<Task> {
        let task = self.tasks.get_mut(slot)?.take()?;
        self.outstanding = self.outstanding.saturating_sub(1);
        self.immediate = self.immediate.saturating_sub(u32::from(task.command.immediate));
        Some(task)
    }

    /// MaxCmdSN: as many beyond ExpCmdSN as there are slots for commands; it never goes back (4.2.2.1).
    pub(super) fn widen(&mut self) {
        let used = self.outstanding.saturating_sub(self.immediate);
        let free = self.queue_depth.saturating_sub(used);
        let max = self.exp_cmd_sn.plus(free).minus(1);
        if self.max_cmd_sn.is_before(max) {
            self.max_cmd_sn = max;
        }
    }

    pub(super) fn task_id(slot: usize) -> TaskId {
        TaskId(u32::try_from(slot).unwrap_or(u32::MAX))
    }
}

/// Whether a LUN field addresses LUN 0, by the peripheral or the flat method (SAM-5 4.7).
pub(super) fn is_lun_0(lun: u64) -> bool {
    lun == 0 || lun == 0x4000 << 48
}

/// A WRITE SAME with anything but one block, and a list longer than can be held, are not what the command says.
fn wrong_length(task: &Task) -> Result<(), Sense> {
    match task.plan {
        Ok(Plan::Same { zeros: false, .. }) if task.expected_write() != task.needed => {
            Err(Sense::illegal(asc::INVALID_INFORMATION_UNIT))
        }
        Ok(Plan::Parameter { length, .. }) if length > MAX_LIST => Err(Sense::invalid_field(7)),
        _ => Ok(()),
    }
}
