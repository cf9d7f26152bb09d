//! One command, from its PDU to its status.

use std::ops::Range;

use super::Request;
use crate::pdu::{NO_TAG, ScsiCommand, TaskAttribute};
use crate::scsi::{Plan, Sense};
use crate::serial::Serial;

/// Where a task is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// Its data are coming.
    Receiving,
    /// It could run, but an older one must end first.
    Waiting,
    /// Its request is at the backend.
    Running,
    /// The same, but nobody wants the outcome.
    Aborted,
}

#[derive(Debug)]
pub(super) struct Task {
    pub(super) command: ScsiCommand,
    pub(super) state: State,
    /// What it comes to, or the sense data it ends with once its unsolicited data have passed.
    pub(super) plan: Result<Plan, Sense>,
    /// Bytes that the plan needs from the initiator, whether it sends them or not: for the residual.
    pub(super) needed: u32,
    /// Bytes of those that it will send.
    pub(super) want: u32,
    /// Bytes of its stream that have come, those beyond `want` included.
    pub(super) received: u32,
    /// How far the sequence that is being sent goes.
    pub(super) sequence_end: u32,
    /// Whether a sequence is being sent, and under which Target Transfer Tag.
    pub(super) transfer: Option<u32>,
    pub(super) data_sn: Serial,
    pub(super) r2t_sn: Serial,
    /// A parameter list, or the block of a WRITE SAME.
    pub(super) list: Vec<u8>,
    /// Requests that are to follow the running one, last first.
    pub(super) chain: Vec<Request>,
    /// The order in which commands came.
    pub(super) order: u64,
    /// Resets of the disk before it.
    pub(super) resets: u64,
    /// Bytes before the first that a READ or VERIFY is about, for an error's address.
    pub(super) length: u32,
}

impl Task {
    pub(super) fn new(command: ScsiCommand, order: u64, resets: u64) -> Self {
        Self {
            command,
            state: State::Receiving,
            plan: Ok(Plan::Done),
            needed: 0,
            want: 0,
            received: 0,
            sequence_end: 0,
            transfer: None,
            data_sn: Serial(0),
            r2t_sn: Serial(0),
            list: Vec::new(),
            chain: Vec::new(),
            order,
            resets,
            length: 0,
        }
    }

    pub(super) fn is_running(&self) -> bool {
        matches!(self.state, State::Running | State::Aborted)
    }

    pub(super) fn is_ordered(&self) -> bool {
        self.command.attribute == TaskAttribute::Ordered
    }

    /// Whether its data are kept in `list` rather than in a buffer of the driver's.
    pub(super) fn keeps_list(&self) -> bool {
        matches!(self.plan, Ok(Plan::Parameter { .. } | Plan::Same { .. }))
    }

    /// Where in the driver's buffer the next `left` bytes belong; `None` if they do not.
    pub(super) fn wanted(&self, left: u32) -> Option<Range<u32>> {
        let end = self.received.saturating_add(left).min(self.want);
        (self.received < end && !self.keeps_list()).then_some(self.received..end)
    }

    /// ExpectedDataTransferLength of the direction in which data go, if the command said it.
    pub(super) fn expected_write(&self) -> u32 {
        if self.command.write { self.command.expected_length } else { 0 }
    }

    /// The same towards the initiator.
    pub(super) fn expected_read(&self) -> u32 {
        if self.command.read && !self.command.write { self.command.expected_length } else { 0 }
    }

    /// Whether an unsolicited sequence is being sent.
    pub(super) fn is_unsolicited(&self) -> bool {
        self.transfer == Some(NO_TAG)
    }
}

/// Something that is answered when tasks have ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Pending {
    /// A task management function that aborted those of its session's tasks that came before `order`.
    Abort { task: u32, order: u64 },
    /// A reset of the disk, and whether all sessions are to end with it.
    Reset { task: u32, cold: bool },
    /// A logout.
    Logout { task: u32 },
}
