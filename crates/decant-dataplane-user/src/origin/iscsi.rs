//! A disk over iSCSI as the origin.
//!
//! A part of a job is asked for run by run: first which blocks are mapped, if the disk can say so and nobody waits for the
//! bytes, then the mapped ones. What was learnt of that is kept for the session.

mod extents;
mod url;

use std::collections::VecDeque;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Instant;

use decant_base::MigrationId;
use decant_dataplane::ExportSecret;
use decant_iscsi::chap::{self, Chap};
use decant_iscsi::initiator::{self, Answer, Config, Device, Failure, Initiator};
use decant_iscsi::login::{DigestPolicy, Offer};
use decant_iscsi::scsi::{DIGEST_BLOCK, MAX_DIGESTS};
use decant_iscsi::serial::Serial;
use rustix::io::Errno;

use super::client::{Ask, BLOCK, Broken, Buffer, Client, Event, Found, Terms};
use super::remote::Settings;
use super::{Address, Timing};
use crate::device::Want;
use crate::iscsi::{self as migration_names, NoSecret};
use crate::stream::now;
use extents::Extents;
pub use url::{IscsiUrl, UrlError};

/// Most commands that one session owes answers to; targets mostly take fewer.
const MAX_OUTSTANDING: u32 = 128;
/// Bytes of one READ, unless the disk takes less.
const PART: u32 = 1024 * 1024;
/// Longest data segment that is taken: large ones cost fewer headers.
const SEGMENT: u32 = 256 * 1024;
/// An idle target is pinged after this long, and given up after as long again, ms.
const PING: u64 = 5_000;
/// A command of which nothing comes for so long while later ones are answered is lost, ms: as long as a silent disk is given at
/// most ([`Timing::silence_max`]).
const COMMAND: u64 = 120_000;
/// Buffers that are kept for the next reads.
const MAX_SPARE: usize = 16;

/// Which disk to read, and how.
#[derive(Debug, Clone)]
pub struct IscsiOptions {
    /// The target's portal.
    pub address: Address,
    /// The target's name (IQN).
    pub target: String,
    /// The logical unit, 0..=16383.
    pub lun: u16,
    /// Our own name (IQN), by which targets let initiators in.
    pub initiator: String,
    /// What is proved to the target and, in mutual CHAP, by it.
    pub chap: Option<Chap>,
    /// Digests of headers and data: preferred, or required.
    pub digests: DigestPolicy,
    /// The size that the disk must have; another is refused.
    pub size: Option<u64>,
    /// Sessions, 1..=8; the first is for urgent requests alone while there are others.
    pub connections: usize,
    /// Patience.
    pub timing: Timing,
}

impl IscsiOptions {
    /// What a clone uses for an export of another worker.
    ///
    /// # Errors
    /// The secret is none that a worker draws.
    pub fn for_clone(
        origin: &decant_dataplane::Origin,
        migration: &MigrationId,
        secret: &ExportSecret,
        size: u64,
    ) -> Result<Self, NoSecret> {
        Ok(Self {
            address: origin.address.into(),
            target: origin.export.clone(),
            lun: 0,
            initiator: migration_names::initiator_name(migration),
            chap: Some(migration_names::chap(migration, secret)?),
            digests: DigestPolicy::Required,
            size: Some(size),
            connections: 3,
            timing: Timing::NETWORK,
        })
    }
}

/// What the lanes of an origin with these options need.
pub(super) fn parts(options: IscsiOptions) -> io::Result<(Settings, impl Fn(usize) -> Box<dyn Client>)> {
    let IscsiOptions { address, target, lun, initiator, chap, digests, size, connections, timing } = options;
    // A port of our own for as long as this origin lives: a login anew ends what is left of the session before it, and two
    // clones on this machine do not end each other's.
    let mut random = [0; 3];
    draw(&mut random)?;
    let name = format!("{target}/{lun}");
    let config = Config {
        initiator,
        target,
        lun,
        isid: [0; 6],
        chap,
        offer: Offer { header_digest: digests, data_digest: digests, max_receive: SEGMENT, ..Offer::default() },
        max_outstanding: MAX_OUTSTANDING,
        first_cmd_sn: Serial(1),
        ping_after_ms: PING,
        ping_timeout_ms: PING,
        command_timeout_ms: COMMAND,
    };
    let known = Arc::new(Mutex::new(None));
    let settings = Settings {
        protocol: "iscsi",
        address,
        tls: None,
        name,
        size,
        what: "the disk",
        connections,
        at_once: true,
        timing,
    };
    let make = move |lane: usize| -> Box<dyn Client> {
        // ISID of type "random" (RFC 7143 11.12.5): 24 bits of it, and a number.
        let [a, b, c] = random;
        let isid = [0x80, a, b, c, 0, u8::try_from(lane).unwrap_or_default()];
        Box::new(Iscsi::new(Config { isid, ..config.clone() }, Arc::clone(&known)))
    };
    Ok((settings, make))
}

fn draw(random: &mut [u8]) -> io::Result<()> {
    getrandom::fill(random).map_err(|error| io::Error::other(format!("no random numbers: {error}")))
}

/// A part of a job.
#[derive(Debug, Clone, Copy)]
struct Part {
    want: Want,
    /// What of it is still to be asked for, or has been and has not come.
    next: u64,
    end: u64,
    urgent: bool,
}

struct Iscsi {
    core: Initiator<Buffer>,
    /// The disk, as the first session of any lane found it.
    known: Arc<Mutex<Option<Device>>>,
    /// Parts by tag.
    parts: Vec<Option<Part>>,
    outstanding: usize,
    /// Parts whose next command waits for room.
    waiting: VecDeque<usize>,
    events: VecDeque<Event>,
    extents: Extents,
    /// Whether GET LBA STATUS has been of use so far.
    holes: bool,
    spare: Vec<Buffer>,
    /// Where the core's clock begins.
    epoch: Instant,
}

impl Iscsi {
    fn new(config: Config, known: Arc<Mutex<Option<Device>>>) -> Self {
        Self {
            core: Initiator::new(config),
            known,
            parts: Vec::new(),
            outstanding: 0,
            waiting: VecDeque::new(),
            events: VecDeque::new(),
            extents: Extents::default(),
            holes: false,
            spare: Vec::new(),
            epoch: now(),
        }
    }

    /// The core's time: ms.
    fn millis(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_millis()).unwrap_or(u64::MAX)
    }

    fn part(&mut self, tag: usize) -> Result<&mut Part, Broken> {
        self.parts.get_mut(tag).and_then(Option::as_mut).ok_or(Broken::Unasked)
    }

    fn done(&mut self, tag: usize, result: Result<(), Errno>) {
        if let Some(place) = self.parts.get_mut(tag)
            && place.take().is_some()
        {
            self.outstanding -= 1;
            self.events.push_back(Event::Done { tag, result });
        }
    }

    /// A session is up, perhaps another lane's before it.
    fn ready(&mut self) -> Result<(), Broken> {
        let Some(device) = self.core.device() else { return Err(Broken::Over) };
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        known.get_or_insert_with(|| device.clone()).check_same(device).map_err(decant_iscsi::Violation::OtherDisk)?;
        if u64::from(device.max_transfer) < BLOCK {
            return Err(decant_iscsi::Violation::Unusable("it moves less than 4 KiB at a time").into());
        }
        self.holes = device.holes;
        Ok(())
    }

    /// Asks for the next run of a part; holes on the way are events.
    fn go_on(&mut self, tag: usize, now: Instant, out: &mut Vec<u8>) -> Result<(), Broken> {
        let millis = self.millis(now);
        loop {
            let part = *self.part(tag)?;
            if part.next >= part.end {
                self.done(tag, Ok(()));
                return Ok(());
            }
            let length = part.end - part.next;
            if part.want == Want::Data
                && let Some(hole) = self.extents.hole(part.next, part.end, self.size())
            {
                self.events.push_back(Event::Hole { tag, offset: part.next, length: hole });
                self.part(tag)?.next += hole;
                continue;
            }
            if self.core.room() == 0 {
                self.waiting.push_back(tag);
                return Ok(());
            }
            let name = tag as u64;
            if part.want == Want::Digests {
                // A part's length is bounded by what one command takes.
                let length = u32::try_from(length).map_err(|_| Broken::Over)?;
                return Ok(self.core.digests(name, part.next, length, millis, out)?);
            }
            if self.holes && !part.urgent && !self.extents.knows(part.next) {
                return Ok(self.core.status(name, part.next, millis, out)?);
            }
            let data = self.extents.data(part.next, part.end);
            let buffer = Buffer::new(self.spare.pop(), usize::try_from(data).map_err(|_| Broken::Over)?);
            return self.core.read(name, part.next, buffer, millis, out).map_err(|(refused, _)| refused.into());
        }
    }

    fn size(&self) -> u64 {
        self.core.device().map_or(0, Device::bytes)
    }

    /// Parts that waited for room have it, as far as it goes.
    fn go_on_waiting(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<(), Broken> {
        while self.core.room() > 0
            && let Some(tag) = self.waiting.pop_front()
        {
            self.go_on(tag, now, out)?;
        }
        Ok(())
    }

    fn answered(
        &mut self,
        tag: usize,
        answer: Result<Answer<Buffer>, Failure>,
        now: Instant,
        out: &mut Vec<u8>,
    ) -> Result<(), Broken> {
        let part = *self.part(tag)?;
        let offset = part.next;
        match answer {
            Ok(Answer::Data(buffer)) => {
                self.part(tag)?.next += buffer.as_ref().len() as u64;
                self.events.push_back(Event::Held { tag, offset, buffer });
            }
            Ok(Answer::Digests(digests)) => {
                let end = part.end;
                self.part(tag)?.next = end;
                for (start, crc32c) in (offset..end).step_by(DIGEST_BLOCK as usize).zip(digests) {
                    let length = u32::try_from((end - start).min(DIGEST_BLOCK.into())).unwrap_or(DIGEST_BLOCK);
                    self.events.push_back(Event::Digest { tag, offset: start, length, crc32c });
                }
            }
            Ok(Answer::Extents(extents)) => {
                self.extents.learn(&extents);
                self.holes &= self.extents.knows(offset);
            }
            // A disk that does not say what is mapped is read as a whole.
            Err(_) if part.want == Want::Data && self.holes && !part.urgent && !self.extents.knows(offset) => {
                self.holes = false;
            }
            Err(failure) => {
                tracing::warn!(offset, %failure, "the origin's disk cannot answer");
                self.done(tag, Err(errno(&failure)));
                return Ok(());
            }
        }
        self.go_on(tag, now, out)
    }
}

impl Client for Iscsi {
    fn handle_connect(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<(), Broken> {
        if let Some(device) = &*self.known.lock().unwrap_or_else(PoisonError::into_inner) {
            self.core.expect(device);
        }
        let mut random = [0; chap::RANDOM_BYTES];
        draw(&mut random)?;
        let millis = self.millis(now);
        self.core.handle_connect(millis, random, out);
        Ok(())
    }

    fn handle_input(
        &mut self,
        now: Instant,
        input: &[u8],
        out: &mut Vec<u8>,
    ) -> Result<(usize, Option<Event>), Broken> {
        let mut consumed = 0;
        loop {
            if let Some(event) = self.events.pop_front() {
                return Ok((consumed, Some(event)));
            }
            let millis = self.millis(now);
            let step = self.core.handle_input(millis, input.get(consumed..).unwrap_or_default(), out)?;
            consumed += step.consumed;
            match step.event {
                Some(initiator::Event::Ready) => {
                    self.ready()?;
                    return Ok((consumed, Some(Event::Ready)));
                }
                Some(initiator::Event::Done { tag, answer }) => self.answered(tag as usize, answer, now, out)?,
                Some(initiator::Event::Ended) => return Err(Broken::ShuttingDown),
                None => {
                    self.go_on_waiting(now, out)?;
                    let event = self.events.pop_front();
                    return Ok((consumed, event));
                }
            }
        }
    }

    fn has_events(&self) -> bool {
        !self.events.is_empty()
    }

    fn landing(&mut self) -> Option<&mut [u8]> {
        self.core.landing()
    }

    fn handle_landed(&mut self, count: usize) -> Result<(), Broken> {
        Ok(self.core.handle_landed(count)?)
    }

    fn handle_tick(&mut self, now: Instant, out: &mut Vec<u8>) -> Result<Option<Instant>, Broken> {
        let millis = self.millis(now);
        self.core.handle_tick(millis, out)?;
        let next = self.core.poll_timeout();
        // A little later than the millisecond itself, which must have passed.
        Ok(next.and_then(|at| self.epoch.checked_add(std::time::Duration::from_millis(at.saturating_add(1)))))
    }

    fn terms(&self) -> Option<Terms> {
        let device = self.core.device()?;
        let most = PART.min(device.max_transfer) / BLOCK as u32 * BLOCK as u32;
        Some(Terms {
            found: Found { size: device.bytes(), block_bytes: device.block_bytes, digests: device.digests },
            several: true,
            parts: (most, MAX_DIGESTS * DIGEST_BLOCK),
            unfragmented: false,
        })
    }

    fn has_room(&self) -> bool {
        self.core.room() as usize > self.waiting.len()
    }

    fn outstanding(&self) -> usize {
        self.outstanding
    }

    fn ask(&mut self, tag: usize, ask: &Ask, now: Instant, out: &mut Vec<u8>) -> Result<(), Broken> {
        let end = ask.offset.checked_add(ask.length.into()).ok_or(Broken::Over)?;
        if self.parts.len() <= tag {
            self.parts.resize(tag + 1, None);
        }
        let Some(place) = self.parts.get_mut(tag) else { return Err(Broken::Over) };
        *place = Some(Part { want: ask.want, next: ask.offset, end, urgent: ask.urgent });
        self.outstanding += 1;
        self.go_on(tag, now, out)
    }

    fn heard(&self, _received: u64) -> u64 {
        // Pings are answered by a target whose disk hangs.
        self.core.progress()
    }

    fn recycle(&mut self, buffer: Buffer) {
        if self.spare.len() < MAX_SPARE {
            self.spare.push(buffer);
        }
    }

    fn leave(&mut self, now: Instant, out: &mut Vec<u8>) {
        let millis = self.millis(now);
        self.core.logout(millis, out);
    }

    fn handle_disconnect(&mut self) {
        self.core.handle_disconnect();
        while let Some((_, buffer)) = self.core.poll_lost() {
            if let Some(buffer) = buffer {
                self.recycle(buffer);
            }
        }
        self.parts.clear();
        self.outstanding = 0;
        self.waiting.clear();
        self.events.clear();
        self.extents = Extents::default();
    }
}

fn errno(failure: &Failure) -> Errno {
    match failure {
        Failure::Reserved => Errno::BUSY,
        failure if failure.is_refusal() => Errno::INVAL,
        _ => Errno::IO,
    }
}
