//! Everything of the full feature phase that is not a command: pings, text, task management, logout, rejects, time.

use super::command::{MAX_IMMEDIATE, is_lun_0};
use super::task::{Pending, State};
use super::{Connection, Event, Farewell, Outbox, Phase, Target};
use crate::error::Violation;
use crate::pdu::{
    self, AsyncMessage, LogoutRequest, LogoutResponse, NO_TAG, NopIn, NopOut, Reject, TaskRequest, TaskResponse,
    TextRequest, TextResponse, async_event, reject_reason, task_function, task_response,
};
use crate::serial::Serial;
use crate::text::{Pairs, TextIn, TextOut};

/// Most bytes in a ping, or in one text request.
pub(super) const EXCHANGE_BYTES: u32 = 64 * 1024;

/// A text exchange (11.10), of which there is one at a time.
#[derive(Debug, Default)]
pub(super) struct TextExchange {
    input: TextIn,
    output: TextOut,
    /// The Target Transfer Tag of a response that is to be continued.
    transfer: Option<u32>,
}

/// What time has to do with a connection; milliseconds of the caller's clock.
#[derive(Debug, Default)]
pub(super) struct Clock {
    heard: bool,
    /// Bytes that came and were left over: they come again, and are no news then.
    left: usize,
    last_heard: Option<u64>,
    pinged: Option<Ping>,
}

/// A ping that is not answered.
#[derive(Debug)]
struct Ping {
    since: u64,
    /// The transport has taken all that is before it when it has taken so many bytes.
    before: u64,
    /// How many it had taken when that was looked at last; `None`: so many.
    taken: Option<u64>,
}

impl Clock {
    /// `length` bytes of input were there, and so many of them were dealt with.
    pub(super) fn handle_input(&mut self, length: usize, consumed: usize) {
        if length > 0 {
            self.heard |= length > self.left;
            self.left = length.saturating_sub(consumed);
        }
    }
}

impl Ping {
    /// While it is on its way into the transport, behind what else is to be sent, the initiator cannot answer it: what moves
    /// there puts the time off. So a slow network is not taken for a dead one.
    fn handle_taken(&mut self, taken: u64, now: u64) {
        if self.taken.is_some_and(|last| last < taken) {
            self.since = now;
            self.taken = (taken < self.before).then_some(taken);
        }
    }
}

impl Connection {
    /// Ends the connection in good order.
    pub(super) fn close(&mut self, farewell: Option<Farewell>) {
        self.phase = Phase::Ended;
        self.events.push_back(Event::Close(farewell));
    }

    /// Time passes: `now` in milliseconds of any clock that does not go back. To be called about once a second.
    ///
    /// # Errors
    /// The initiator is silent, or its login takes too long: as an error of [`Self::handle_input`].
    pub fn handle_tick<B: AsRef<[u8]>>(
        &mut self,
        target: &mut Target,
        now: u64,
        out: &mut Outbox<B>,
    ) -> Result<(), Violation> {
        let limits = &target.config.limits;
        let clock = &mut self.clock;
        let since = now.saturating_sub(*clock.last_heard.get_or_insert(now));
        match self.phase {
            Phase::Ended => {}
            Phase::Login(_) if since > limits.login_ms => {
                return Err(self.fail(Violation::OutOfPlace("the login took too long")));
            }
            Phase::Login(_) => {}
            Phase::FullFeature if clock.heard => {
                (clock.heard, clock.last_heard, clock.pinged) = (false, Some(now), None);
            }
            Phase::FullFeature => match &mut clock.pinged {
                Some(ping) => {
                    ping.handle_taken(out.taken(), now);
                    if now.saturating_sub(ping.since) > limits.ping_timeout_ms {
                        return Err(self.fail(Violation::OutOfPlace("a ping was not answered")));
                    }
                }
                None if since > limits.ping_after_ms => self.ping(now, out),
                None => {}
            },
        }
        Ok(())
    }

    fn ping<B: AsRef<[u8]>>(&mut self, now: u64, out: &mut Outbox<B>) {
        // StatSN is the next one: a ping takes none (11.19.1).
        let nop = NopIn {
            is_final: true,
            task: NO_TAG,
            transfer: 0,
            stat_sn: self.stat_sn,
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
            ..NopIn::default()
        };
        let before = out.taken().saturating_add(out.len() as u64);
        let taken = (!out.is_empty()).then_some(out.taken());
        self.clock.pinged = Some(Ping { since: now, before, taken });
        self.put(&nop.into(), &[], out);
    }

    pub(super) fn nop_out<B: AsRef<[u8]>>(&mut self, nop: &NopOut, out: &mut Outbox<B>) {
        self.widen();
        if nop.task == NO_TAG {
            return;
        }
        let answer = NopIn {
            is_final: true,
            lun: nop.lun,
            task: nop.task,
            transfer: NO_TAG,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
        };
        let echo = std::mem::take(&mut self.collected);
        let length = echo.len().min(self.params.max_send as usize);
        self.put(&answer.into(), echo.get(..length).unwrap_or_default(), out);
        self.collected = echo;
    }

    pub(super) fn text_request<B: AsRef<[u8]>>(
        &mut self,
        request: &TextRequest,
        bhs: &[u8; pdu::BHS_BYTES],
        target: &Target,
        out: &mut Outbox<B>,
    ) -> Result<(), Violation> {
        self.widen();
        if request.transfer == NO_TAG && self.text.transfer.is_some() {
            // A new exchange ends the one before (11.10.4).
            self.text = TextExchange::default();
        }
        if request.transfer != NO_TAG && self.text.transfer != Some(request.transfer) {
            self.reject(reject_reason::INVALID_FIELD, bhs, out);
            return Ok(());
        }
        self.text.input.push(&self.collected)?;
        if !request.more && self.text.output.is_empty() {
            let pairs = self.text.input.take()?;
            self.answer_text(&pairs, target)?;
        }
        let piece =
            if request.more { (Vec::new(), false) } else { self.text.output.next_piece(self.params.max_send as usize) };
        let (data, more) = piece;
        let goes_on = request.more || more;
        let transfer = if goes_on { 1 } else { NO_TAG };
        self.text.transfer = goes_on.then_some(transfer);
        let response = TextResponse {
            is_final: request.is_final && !goes_on,
            more,
            lun: request.lun,
            task: request.task,
            transfer,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
        };
        self.put(&response.into(), &data, out);
        Ok(())
    }

    fn answer_text(&mut self, pairs: &Pairs, target: &Target) -> Result<(), Violation> {
        for (key, value) in pairs.iter() {
            match key {
                "SendTargets" => {
                    let wanted = match value {
                        "All" => self.discovery,
                        "" => !self.discovery,
                        name => name == target.config.name,
                    };
                    if !wanted {
                        continue;
                    }
                    self.text.output.push("TargetName", &target.config.name);
                    for address in &target.config.addresses {
                        let address = format!("{address},{}", target.config.portal_group);
                        self.text.output.push("TargetAddress", &address);
                    }
                }
                "MaxRecvDataSegmentLength" => {
                    let number = crate::text::number(value).filter(|n| (512..=pdu::MAX_DATA_SEGMENT).contains(n));
                    self.params.max_send = number.ok_or_else(|| Violation::value(key, value))?;
                }
                "InitiatorAlias" => {}
                _ if matches!(value, "NotUnderstood" | "Irrelevant" | "Reject") => {}
                _ => self.text.output.push(key, "NotUnderstood"),
            }
        }
        Ok(())
    }

    pub(super) fn task_request<B: AsRef<[u8]>>(
        &mut self,
        request: &TaskRequest,
        bhs: &[u8; pdu::BHS_BYTES],
        target: &mut Target,
        out: &mut Outbox<B>,
    ) {
        self.widen();
        if self.pending.len() >= MAX_IMMEDIATE as usize {
            return self.reject(reject_reason::IMMEDIATE, bhs, out);
        }
        let needs_lun = !matches!(request.function, task_function::WARM_RESET | task_function::COLD_RESET);
        let answer = match request.function {
            _ if needs_lun && !is_lun_0(request.lun) => task_response::NO_LUN,
            task_function::ABORT_TASK => match self.find_task(request.referenced) {
                Some(slot) => {
                    let order = self.tasks.get(slot).and_then(Option::as_ref).map_or(0, |task| task.order);
                    self.abort(slot);
                    self.pending.push(Pending::Abort { task: request.task, order: order.wrapping_add(1) });
                    return self.finish_after_abort(target, out);
                }
                // One that has not come yet, and now will not (11.5.5): there can be none, commands come in order. One that
                // has been answered does not exist.
                None => task_response::NO_TASK,
            },
            // Each session has a task set of its own (TST), so both come to the same.
            task_function::ABORT_TASK_SET | task_function::CLEAR_TASK_SET => {
                self.abort_all();
                self.pending.push(Pending::Abort { task: request.task, order: u64::MAX });
                return self.finish_after_abort(target, out);
            }
            task_function::LUN_RESET | task_function::WARM_RESET | task_function::COLD_RESET => {
                target.reset(self.id);
                self.resets = target.resets();
                self.abort_all();
                let cold = request.function == task_function::COLD_RESET;
                self.pending.push(Pending::Reset { task: request.task, cold });
                return self.finish_after_abort(target, out);
            }
            task_function::TASK_REASSIGN => task_response::NO_REASSIGN,
            _ => task_response::NOT_SUPPORTED,
        };
        self.answer_task_request(request.task, answer, out);
    }

    fn finish_after_abort<B: AsRef<[u8]>>(&mut self, target: &mut Target, out: &mut Outbox<B>) {
        self.widen();
        self.finish_pending(target, out);
        self.start_waiting(target, out);
    }

    fn answer_task_request<B: AsRef<[u8]>>(&mut self, task: u32, response: u8, out: &mut Outbox<B>) {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.numbers();
        let response = TaskResponse { is_final: true, response, task, stat_sn, exp_cmd_sn, max_cmd_sn };
        self.put(&response.into(), &[], out);
    }

    /// StatSN of the next answer, which takes it, with ExpCmdSN and MaxCmdSN.
    fn numbers(&mut self) -> (Serial, Serial, Serial) {
        (self.next_stat_sn(), self.exp_cmd_sn, self.max_cmd_sn)
    }

    /// Ends a task without an answer; one that runs when it has run.
    pub(super) fn abort(&mut self, slot: usize) {
        let Some(Some(task)) = self.tasks.get_mut(slot) else { return };
        if task.is_running() {
            if task.state != State::Aborted {
                task.state = State::Aborted;
                self.events.push_back(Event::Abort(Self::task_id(slot)));
            }
            return;
        }
        self.forget_buffer(slot);
        self.remove(slot);
    }

    pub(super) fn abort_all(&mut self) {
        for slot in 0..self.tasks.len() {
            self.abort(slot);
        }
    }

    /// Answers what waited for tasks to end, in the order in which it came.
    pub(super) fn finish_pending<B: AsRef<[u8]>>(&mut self, target: &mut Target, out: &mut Outbox<B>) {
        while let Some(pending) = self.pending.first().copied() {
            let mut aborted = self.tasks.iter().flatten().filter(|task| task.state == State::Aborted);
            let done = match pending {
                Pending::Abort { order, .. } => !aborted.any(|task| task.order < order),
                Pending::Reset { .. } => target.is_reset_done(),
                Pending::Logout { .. } => self.is_drained(),
            };
            if !done {
                target.wait(self.id);
                return;
            }
            self.pending.remove(0);
            match pending {
                Pending::Abort { task, .. } => self.answer_task_request(task, task_response::COMPLETE, out),
                Pending::Reset { task, cold } => {
                    self.answer_task_request(task, task_response::COMPLETE, out);
                    if cold {
                        target.end_all(Farewell::ColdReset, None);
                    }
                }
                Pending::Logout { task } => {
                    self.answer_logout(task, 0, out);
                    self.close(None);
                    return;
                }
            }
        }
    }

    pub(super) fn logout_request<B: AsRef<[u8]>>(
        &mut self,
        request: &LogoutRequest,
        bhs: &[u8; pdu::BHS_BYTES],
        target: &mut Target,
        out: &mut Outbox<B>,
    ) {
        self.widen();
        if self.pending.len() >= MAX_IMMEDIATE as usize {
            return self.reject(reject_reason::IMMEDIATE, bhs, out);
        }
        match request.reason {
            0 => {}
            1 if request.cid == self.cid => {}
            1 => return self.answer_logout(request.task, 1, out),
            _ => return self.answer_logout(request.task, 2, out),
        }
        self.abort_all();
        self.pending.push(Pending::Logout { task: request.task });
        self.finish_pending(target, out);
    }

    fn answer_logout<B: AsRef<[u8]>>(&mut self, task: u32, response: u8, out: &mut Outbox<B>) {
        let (stat_sn, exp_cmd_sn, max_cmd_sn) = self.numbers();
        let default = LogoutResponse::default();
        let response = LogoutResponse { is_final: true, response, task, stat_sn, exp_cmd_sn, max_cmd_sn, ..default };
        self.put(&response.into(), &[], out);
    }

    /// Somebody else ended the session: the initiator is told, and the connection closed.
    pub(super) fn say_farewell<B: AsRef<[u8]>>(&mut self, target: &mut Target, out: &mut Outbox<B>) {
        let farewell = target.session(self.id).and_then(|session| session.farewell);
        let (Some(farewell), Phase::FullFeature) = (farewell, &self.phase) else { return };
        let message = AsyncMessage {
            is_final: true,
            task: NO_TAG,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
            event: async_event::SESSION_DROPPED,
            ..AsyncMessage::default()
        };
        self.put(&message.into(), &[], out);
        self.abort_all();
        self.close(Some(farewell));
    }

    /// Sends a header back with the reason why it is refused (11.17).
    pub(super) fn reject<B: AsRef<[u8]>>(&mut self, reason: u8, bhs: &[u8; pdu::BHS_BYTES], out: &mut Outbox<B>) {
        self.widen();
        let reject = Reject {
            is_final: true,
            reason,
            task: NO_TAG,
            stat_sn: self.next_stat_sn(),
            exp_cmd_sn: self.exp_cmd_sn,
            max_cmd_sn: self.max_cmd_sn,
            data_sn: Serial(0),
        };
        self.put(&reject.into(), bhs, out);
    }
}
