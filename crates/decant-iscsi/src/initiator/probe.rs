//! What is asked of a disk at the start of a session, before it is used.

use super::cdb::{self, Cdb};
use super::device::{Device, OWN_VENDOR, page};
use super::verdict::Failure;
use crate::scsi::READ_BLOCK_DIGESTS;
use crate::wire::Fields;

/// Unit attentions that a disk may have at the start: it keeps a few, and each is told once.
const MAX_RESTARTS: u32 = 32;

/// One question.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Step {
    Ready,
    Inquiry,
    Pages,
    Serial,
    Identification,
    Capacity16,
    Capacity10,
    Limits,
    Digests,
}

impl Step {
    /// Its command, and how much the answer may be.
    pub(super) fn command(self) -> (Cdb, u32) {
        let asks = |page: Option<u8>, bytes: u16| (cdb::inquiry(page, bytes), bytes.into());
        match self {
            Self::Ready => (cdb::test_unit_ready(), 0),
            Self::Inquiry => asks(None, cdb::INQUIRY_BYTES),
            Self::Pages => asks(Some(0x00), cdb::INQUIRY_BYTES),
            Self::Serial => asks(Some(0x80), cdb::INQUIRY_BYTES),
            Self::Identification => asks(Some(0x83), cdb::IDENTIFICATION_BYTES),
            Self::Capacity16 => (cdb::read_capacity_16(), cdb::CAPACITY_16_BYTES),
            Self::Capacity10 => (cdb::read_capacity_10(), cdb::CAPACITY_10_BYTES),
            Self::Limits => asks(Some(0xb0), cdb::INQUIRY_BYTES),
            Self::Digests => (cdb::report_digests(), cdb::CODE_BYTES),
        }
    }
}

/// Why a disk cannot be used.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Unusable {
    For(&'static str),
    Failed(Failure),
}

/// The questions, in waves: those of one wave need no answer of another, so a wave costs one round trip.
const WAVES: [&[Step]; 2] = [
    // The first takes the unit attention that most disks have for who is new.
    &[Step::Ready, Step::Inquiry, Step::Pages, Step::Capacity16],
    &[Step::Serial, Step::Identification, Step::Limits, Step::Digests],
];

/// The questions so far.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Probe {
    device: Device,
    /// Pages that the disk says it has.
    pages: Vec<u8>,
    restarts: u32,
    /// Of [`WAVES`], those that were asked.
    waves: usize,
    /// Questions that are not answered.
    pending: usize,
    /// Whether anything was learnt.
    learnt: bool,
    /// What was learnt may be wrong: all is asked again once nothing is pending.
    stale: bool,
}

impl Probe {
    /// With the first questions.
    pub(super) fn new() -> (Self, Vec<Step>) {
        let mut probe = Self {
            device: Device::default(),
            pages: Vec::new(),
            restarts: 0,
            waves: 0,
            pending: 0,
            learnt: false,
            stale: false,
        };
        let first = probe.next_wave().unwrap_or_default();
        (probe, first)
    }

    /// What was found.
    pub(super) fn device(&self) -> &Device {
        &self.device
    }

    /// A unit attention came instead of an answer to `step`: what was learnt before it may be wrong. The next questions, if
    /// there are any now, or `None` when all are answered.
    pub(super) fn interrupted(&mut self, step: Step) -> Result<Option<Vec<Step>>, Unusable> {
        self.restarts = self.restarts.saturating_add(1);
        if self.restarts > MAX_RESTARTS {
            return Err(Unusable::For("it has unit attentions without end"));
        }
        self.pending = self.pending.saturating_sub(1);
        if step == Step::Ready && !self.learnt {
            // That is what it was asked for; what else was asked comes after it, and says itself if the disk is not ready.
            return Ok(self.go_on());
        }
        self.stale = true;
        Ok(Some(self.begin_anew()))
    }

    fn begin_anew(&mut self) -> Vec<Step> {
        if self.pending > 0 {
            return Vec::new();
        }
        let restarts = self.restarts;
        let (anew, first) = Self::new();
        *self = Self { restarts, ..anew };
        first
    }

    /// Takes an answer; the next questions, if there are any now, or `None` when all are answered.
    pub(super) fn answered(
        &mut self,
        step: Step,
        answer: Result<&[u8], Failure>,
    ) -> Result<Option<Vec<Step>>, Unusable> {
        self.pending = self.pending.saturating_sub(1);
        if self.stale {
            return Ok(Some(self.begin_anew()));
        }
        let optional = !matches!(step, Step::Ready | Step::Inquiry | Step::Capacity10);
        let data = match answer {
            Ok(data) => data,
            Err(failure) if optional && failure.is_refusal() => &[],
            Err(failure) => return Err(Unusable::Failed(failure)),
        };
        self.learnt = true;
        match step {
            Step::Ready => {}
            Step::Inquiry => self.device.take_inquiry(data).map_err(Unusable::For)?,
            Step::Pages => self.pages = page(data, 0x00).unwrap_or_default().to_vec(),
            Step::Serial => self.device.take_serial(data),
            Step::Identification => self.device.take_identification(data),
            Step::Capacity16 if answer.is_err() => {
                self.pending = self.pending.saturating_add(1);
                return Ok(Some(vec![Step::Capacity10]));
            }
            Step::Capacity16 => self.device.take_capacity_16(data).map_err(Unusable::For)?,
            Step::Capacity10 => self.device.take_capacity_10(data).map_err(Unusable::For)?,
            Step::Limits => self.device.take_limits(data),
            Step::Digests => {
                // SUPPORT 3 or 5, and the opcode that was asked about in its usage data.
                let support = matches!(data.u8_at(1) & 7, 3 | 5) && data.u8_at(4) == READ_BLOCK_DIGESTS;
                self.device.digests = support;
            }
        }
        Ok(self.go_on())
    }

    fn go_on(&mut self) -> Option<Vec<Step>> {
        if self.pending > 0 { Some(Vec::new()) } else { self.next_wave() }
    }

    /// The questions of the next wave that has any; `None` after the last.
    fn next_wave(&mut self) -> Option<Vec<Step>> {
        while let Some(wave) = WAVES.get(self.waves) {
            self.waves = self.waves.saturating_add(1);
            let asked: Vec<Step> = wave.iter().copied().filter(|step| self.is_worth_asking(*step)).collect();
            self.pending = asked.len();
            if !asked.is_empty() {
                return Some(asked);
            }
        }
        None
    }

    fn is_worth_asking(&self, step: Step) -> bool {
        match step {
            Step::Serial => self.pages.contains(&0x80),
            Step::Identification => self.pages.contains(&0x83),
            Step::Limits => self.pages.contains(&0xb0),
            // Another vendor's D5h may do anything.
            Step::Digests => self.device.vendor == OWN_VENDOR,
            _ => true,
        }
    }
}
