//! Commands that are outstanding.

use super::cdb::{self, Cdb};
use super::device::Device;
use super::probe::Step;
use crate::scsi::DIGEST_BLOCK;
use crate::serial::Serial;

/// What a command is for. Offsets are bytes of the disk.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Order {
    Read { offset: u64, length: u32 },
    Status { offset: u64 },
    Digests { offset: u64, length: u32 },
    Probe(Step),
}

impl Order {
    /// Its command and the bytes that it is to bring; `None` if the disk's commands cannot say it.
    pub(super) fn command(self, device: &Device) -> Option<(Cdb, u32)> {
        match self {
            Self::Read { offset, length } => {
                let (lba, blocks) = device.blocks_of(offset, length.into())?;
                let cdb = if device.short_commands { cdb::read_10(lba, blocks)? } else { cdb::read_16(lba, blocks) };
                Some((cdb, length))
            }
            Self::Status { offset } => {
                let (lba, _) = device.blocks_of(offset, device.block_bytes.into())?;
                Some((cdb::get_lba_status(lba), cdb::STATUS_BYTES))
            }
            Self::Digests { offset, length } => {
                let (lba, blocks) = device.blocks_of(offset, length.into())?;
                let digests = device.digests_of(offset, length)?;
                Some((cdb::read_block_digests(lba, blocks), digests.checked_mul(4)?))
            }
            Self::Probe(step) => Some(step.command()),
        }
    }

    /// Digest blocks in a range: for its bound.
    pub(super) fn digest_blocks(length: u32) -> u32 {
        length.div_ceil(DIGEST_BLOCK)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum State {
    /// The target has it.
    Sent,
    /// It is to be sent at this time, when the window allows.
    Due(u64),
}

/// One command.
#[derive(Debug)]
pub(super) struct Task<B> {
    /// The driver's.
    pub(super) tag: u64,
    pub(super) order: Order,
    pub(super) cdb: Cdb,
    /// ExpectedDataTransferLength.
    pub(super) expected: u32,
    /// Where a read's data go.
    pub(super) buffer: Option<B>,
    /// Where all other data go.
    pub(super) reply: Vec<u8>,
    pub(super) received: u32,
    pub(super) data_sn: Serial,
    pub(super) state: State,
    /// The Initiator Task Tag it was sent with last.
    pub(super) itt: u32,
    /// When it was sent, or the last data of its came.
    pub(super) since: u64,
    /// How many commands the session had sent before it.
    pub(super) turn: u64,
    /// How often it was put off, for each reason by itself.
    pub(super) tries: Tries,
}

/// How often a command was put off. Each reason has its own patience: a disk that was busy for long is not broken at the first
/// failure that may pass.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Tries {
    /// A unit attention, or an earlier command's error, was told in its place.
    pub(super) interrupted: u32,
    /// BUSY, TASK SET FULL, NOT READY.
    pub(super) busy: u32,
    /// Failures that may pass.
    pub(super) failed: u32,
}

impl<B: AsRef<[u8]> + AsMut<[u8]>> Task<B> {
    /// A command that is to be sent at `now`.
    pub(super) fn new(tag: u64, order: Order, (cdb, expected): (Cdb, u32), buffer: Option<B>, now: u64) -> Self {
        let (state, data_sn) = (State::Due(now), Serial(0));
        let (reply, tries) = (Vec::new(), Tries::default());
        Self {
            tag,
            order,
            cdb,
            expected,
            buffer,
            reply,
            received: 0,
            data_sn,
            state,
            itt: 0,
            since: now,
            turn: 0,
            tries,
        }
    }

    /// Room for the next `length` bytes of its data, if they belong to a buffer of the driver's.
    pub(super) fn landing(&mut self, length: u32) -> Option<&mut [u8]> {
        let start = self.received as usize;
        let end = self.received.checked_add(length)?.min(self.expected) as usize;
        self.buffer.as_mut()?.as_mut().get_mut(start..end)
    }

    /// Takes data that are not in its buffer yet.
    pub(super) fn take(&mut self, data: &[u8]) {
        let length = u32::try_from(data.len()).unwrap_or(u32::MAX);
        if self.buffer.is_none() {
            self.reply.extend_from_slice(data);
        } else if let Some(room) = self.landing(length)
            && room.len() == data.len()
        {
            room.copy_from_slice(data);
        }
        self.received = self.received.saturating_add(length);
    }

    /// Forgets what came, before it is sent again.
    pub(super) fn rewind(&mut self) {
        self.reply.clear();
        self.received = 0;
        self.data_sn = Serial(0);
    }
}

/// All of them, in slots that an Initiator Task Tag names together with a count of its uses: the tag of a command that has
/// ended is no other's for a long time.
#[derive(Debug)]
pub(super) struct Tasks<B> {
    slots: Vec<Option<Task<B>>>,
    free: Vec<usize>,
    uses: u32,
    length: usize,
}

/// Most slots: their number has 16 bits of the tag.
const MAX_SLOTS: usize = 1 << 16;

impl<B> Tasks<B> {
    pub(super) fn new() -> Self {
        Self { slots: Vec::new(), free: Vec::new(), uses: 0, length: 0 }
    }

    pub(super) fn len(&self) -> usize {
        self.length
    }

    /// Enters a task; its slot, or `None` if there are too many.
    pub(super) fn insert(&mut self, task: Task<B>) -> Option<usize> {
        let slot = match self.free.pop() {
            Some(slot) => slot,
            None if self.slots.len() < MAX_SLOTS => {
                self.slots.push(None);
                self.slots.len().saturating_sub(1)
            }
            None => return None,
        };
        *self.slots.get_mut(slot)? = Some(task);
        self.length = self.length.saturating_add(1);
        Some(slot)
    }

    pub(super) fn get_mut(&mut self, slot: usize) -> Option<&mut Task<B>> {
        self.slots.get_mut(slot)?.as_mut()
    }

    pub(super) fn remove(&mut self, slot: usize) -> Option<Task<B>> {
        let task = self.slots.get_mut(slot)?.take()?;
        self.free.push(slot);
        self.length = self.length.saturating_sub(1);
        Some(task)
    }

    /// A tag for sending what is in `slot`: never one with the high bit, which pings and logouts have.
    pub(super) fn next_itt(&mut self, slot: usize) -> u32 {
        self.uses = self.uses.wrapping_add(1);
        (self.uses & 0x7fff) << 16 | u32::try_from(slot).unwrap_or_default() & 0xffff
    }

    /// The slot of the command that was sent with `itt` and is not answered.
    pub(super) fn find(&self, itt: u32) -> Option<usize> {
        let slot = (itt & 0xffff) as usize;
        let task = self.slots.get(slot)?.as_ref()?;
        (task.itt == itt && task.state == State::Sent).then_some(slot)
    }

    /// Commands that are to be sent, with their times.
    pub(super) fn due(&self) -> impl Iterator<Item = (u64, usize)> {
        self.slots.iter().enumerate().filter_map(|(slot, task)| match task.as_ref()?.state {
            State::Due(at) => Some((at, slot)),
            State::Sent => None,
        })
    }

    /// Since when nothing has come of a command that the target has had since before the one that was sent at `turn`; the longest.
    pub(super) fn overtaken_since(&self, turn: u64) -> Option<u64> {
        let overtaken = |task: &&Task<B>| task.state == State::Sent && task.turn < turn;
        self.slots.iter().flatten().filter(overtaken).map(|task| task.since).min()
    }

    /// Takes any.
    pub(super) fn pop(&mut self) -> Option<Task<B>> {
        let slot = self.slots.iter().position(Option::is_some)?;
        self.remove(slot)
    }
}
