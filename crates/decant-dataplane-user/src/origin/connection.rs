//! One connection to an origin: connect, haggle or log in, ask, hand over, and again.

mod desk;
mod digests;

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;
use std::io::{self, IoSlice};
use std::time::{Duration, Instant};

use decant_nbd::Backoff;
use rustix::io::Errno;

use super::Address;
use super::client::{BLOCK, Broken, Event, Terms};
use super::remote::Shared;
use crate::device::{OriginSink, Want};
use crate::stream::{Aligned, Stream, Wait, now};
use crate::tls::Session;
pub(super) use desk::Slot;

/// Headers, and small answers whole, are read this much at a time; larger payloads go straight to their buffer.
const INPUT: usize = 32 * 1024;
const _: () = assert!(INPUT >= decant_nbd::MAX_UNIT && INPUT >= decant_iscsi::pdu::MAX_UNIT);
/// Payload that is handed over at a time, at most.
const DATA: usize = 1024 * 1024;

/// A lane's thread: what it alone needs, kept from connection to connection.
struct Lane<'a> {
    shared: &'a Shared,
    sink: &'a dyn OriginSink,
    index: usize,
    slot: &'a Slot,
    input: Vec<u8>,
    start: usize,
    end: usize,
    data: Aligned,
    /// Digests that came and were not handed over yet: of this tag, from this offset on.
    digests: Vec<u32>,
    digests_of: (usize, u64),
    /// Whether the session was of use: it answered something, or lasted.
    useful: bool,
    silence: Duration,
}

/// Lives until the origin is closed.
pub(super) fn run(shared: &Shared, index: usize, sink: &dyn OriginSink) {
    let timing = shared.settings.timing;
    let Some(slot) = shared.slots.get(index) else { return };
    slot.own();
    let kick = &slot.kick;
    let mut lane = Lane {
        shared,
        sink,
        index,
        slot,
        input: vec![0; INPUT],
        start: 0,
        end: 0,
        data: Aligned::new(DATA),
        digests: Vec::new(),
        digests_of: (0, 0),
        useful: false,
        silence: timing.silence,
    };
    let mut backoff = Backoff::new(timing.backoff_first, timing.backoff_max);
    while !shared.is_closed() {
        if index > 0 && !shared.may_share() {
            kick.wait(None);
            kick.clear();
            continue;
        }
        let mut was_up = false;
        let Err(reason) = lane.session(&mut was_up);
        lane.leave(was_up, &reason.to_string());
        if lane.useful {
            backoff.handle_success();
        }
        let again = backoff.handle_failure(now(), random());
        while !shared.is_closed() && now() < again {
            kick.wait(Some(again));
            kick.clear();
        }
    }
}

/// Spreads the tries of many lanes; the standard library's hash keys are random.
fn random() -> u32 {
    let bytes = RandomState::new().hash_one(0u8).to_ne_bytes();
    u32::from_ne_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

enum Never {}

impl Lane<'_> {
    /// One connection from beginning to end; it always ends with a reason.
    fn session(&mut self, was_up: &mut bool) -> Result<Never, Broken> {
        let shared = self.shared;
        (self.start, self.end, self.useful) = (0, 0, false);
        self.digests.clear();
        let deadline = shared.deadline(shared.settings.timing.handshake);
        let mut stream = self.connect(deadline)?;
        self.slot.lock().connect()?;
        self.haggle(&mut stream, deadline)?;
        let Some(terms) = self.slot.lock().core.terms() else { return Err(Broken::Over) };
        let (found, what) = (terms.found.size, shared.settings.what);
        if let Some(expected) = shared.size()
            && expected != found
        {
            return Err(Broken::WrongSize { what, found, expected });
        }
        *was_up = true;
        self.slot.lock().open(stream, terms.clone());
        shared.session_up(&terms, self.sink);
        self.kick_lanes(shared.pool.up(self.index));
        if self.index == 0 {
            shared.slots.iter().skip(1).for_each(|slot| slot.kick.kick());
        }
        let since = now();
        let result = self.transmit(&terms);
        if let Err(Broken::Closed) = result {
            // Leave politely, if that takes no waiting.
            let desk = &mut *self.slot.lock();
            desk.core.leave(now(), &mut desk.out);
            let _ = desk.send();
        }
        self.useful |= now().saturating_duration_since(since) >= shared.settings.timing.backoff_max;
        result
    }

    /// The connection is gone: what it owed goes back to the pool.
    fn leave(&mut self, was_up: bool, reason: &str) {
        let owed = self.slot.lock().close();
        let lanes = self.shared.pool.down(self.index, owed.into_iter());
        self.kick_lanes(lanes);
        self.shared.session_down(was_up, reason, self.sink);
    }

    fn kick_lanes(&self, lanes: u32) {
        let slots = self.shared.slots.iter().enumerate();
        slots.filter(|(index, _)| lanes >> index & 1 == 1).for_each(|(_, slot)| slot.kick.kick());
    }

    /// Waits; an error when the origin is closed meanwhile.
    fn wait(&self, stream: &Stream, want: Wait, deadline: Option<Instant>) -> Result<(), Broken> {
        stream.wait(want, &self.slot.kick, deadline)?;
        if self.shared.is_closed() { Err(Broken::Closed) } else { Ok(()) }
    }

    fn connect(&self, deadline: Option<Instant>) -> Result<Stream, Broken> {
        let shared = self.shared;
        let found = shared.settings.address.look_up(shared.settings.timing.handshake, || shared.is_closed())?;
        // A name's addresses one after another, each with its share of what time there is.
        let mut last = Broken::Over;
        for (tried, address) in found.iter().enumerate() {
            let share = deadline.map(|deadline| {
                let left = deadline.saturating_duration_since(now());
                now() + left / u32::try_from(found.len() - tried).unwrap_or(u32::MAX)
            });
            match self.connect_to(address, share) {
                Err(error) if !matches!(error, Broken::Closed) => last = error,
                result => return result,
            }
        }
        Err(last)
    }

    fn connect_to(&self, address: &Address, deadline: Option<Instant>) -> Result<Stream, Broken> {
        let stream = Stream::connect(address)?;
        loop {
            let kicked = stream.wait(Wait::Write, &self.slot.kick, deadline)?;
            if self.shared.is_closed() {
                return Err(Broken::Closed);
            }
            if !kicked {
                break;
            }
        }
        self.check_handshake(deadline)?;
        stream.connected()?;
        Ok(stream)
    }

    fn check_handshake(&self, deadline: Option<Instant>) -> Result<(), Broken> {
        if deadline.is_some_and(|deadline| now() >= deadline) {
            return Err(Broken::Handshake(self.shared.settings.timing.handshake));
        }
        Ok(())
    }

    /// The handshake, TLS included.
    fn haggle(&mut self, stream: &mut Stream, deadline: Option<Instant>) -> Result<(), Broken> {
        loop {
            let (consumed, event) = self.slot.lock().step(&self.input[self.start..self.end])?;
            self.start += consumed;
            self.say(stream)?;
            match event {
                Some(Event::Ready) => return Ok(()),
                Some(Event::StartTls) => self.start_tls(stream, deadline)?,
                Some(_) => return Err(Broken::Over),
                None => {
                    self.refill();
                    self.hear(stream, deadline)?;
                }
            }
        }
    }

    /// Sends what the core wrote during the handshake.
    fn say(&self, stream: &mut Stream) -> Result<(), Broken> {
        let out = &mut self.slot.lock().out;
        if !out.is_empty() {
            stream.send(&[IoSlice::new(out)])?;
            out.clear();
        }
        Ok(())
    }

    /// Waits for input during the handshake.
    fn hear(&mut self, stream: &mut Stream, deadline: Option<Instant>) -> Result<(), Broken> {
        loop {
            let tick = self.slot.lock().tick()?;
            self.say(stream)?;
            match stream.read(&mut self.input[self.end..]) {
                Ok(count) => {
                    self.end += count;
                    return Ok(());
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            self.check_handshake(deadline)?;
            let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
            self.wait(stream, want, [deadline, tick].into_iter().flatten().min())?;
            stream.flush()?;
        }
    }

    fn start_tls(&mut self, stream: &mut Stream, deadline: Option<Instant>) -> Result<(), Broken> {
        if self.start < self.end {
            return Err(Broken::PlaintextAfterStartTls);
        }
        let Some(tls) = &self.shared.settings.tls else { return Err(Broken::Over) };
        stream.start_tls(Session::client(tls)?);
        while !stream.is_secured() {
            // Drives the TLS handshake; no data can come before it is over and we asked for some.
            match stream.read(&mut self.input[..1]) {
                Ok(_) => return Err(Broken::EarlyData),
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Err(error.into()),
            }
            self.check_handshake(deadline)?;
            if !stream.is_secured() {
                let want = if stream.has_pending() { Wait::ReadWrite } else { Wait::Read };
                self.wait(stream, want, deadline)?;
            }
        }
        let desk = &mut *self.slot.lock();
        desk.core.handle_tls_started(&mut desk.out)?;
        stream.send(&[IoSlice::new(&desk.out)])?;
        desk.out.clear();
        Ok(())
    }

    /// Makes room for more input.
    fn refill(&mut self) {
        self.input.copy_within(self.start..self.end, 0);
        self.end -= self.start;
        self.start = 0;
    }

    /// Requests out, answers in, until something breaks.
    fn transmit(&mut self, terms: &Terms) -> Result<Never, Broken> {
        loop {
            self.handle_answers(terms)?;
            while self.ask()? {}
            self.refill();
            let (count, landed) = {
                let mut desk = self.slot.lock();
                if desk.core.has_events() {
                    continue;
                }
                desk.receive(&mut self.input[self.end..], self.end == 0)?
            };
            if !landed {
                self.end += count;
            }
            if count == 0 {
                self.await_peer()?;
            }
        }
    }

    /// Asks for what the queue holds. True: some of it was refused here, and the sink may have put more there.
    fn ask(&mut self) -> Result<bool, Broken> {
        if self.shared.is_closed() {
            return Err(Broken::Closed);
        }
        let refused = {
            let mut desk = self.slot.lock();
            if let Some(broken) = desk.broken.take() {
                return Err(broken);
            }
            desk.ask(&self.shared.pool, self.index)?;
            std::mem::take(&mut desk.refused)
        };
        let any = !refused.is_empty();
        for (job, errno) in refused {
            self.shared.pool.answered(self.index, &job);
            self.shared.done(&job.fetch, Err(errno), self.sink);
        }
        Ok(any)
    }

    /// Waits for the peer, or for a kick.
    fn await_peer(&mut self) -> Result<(), Broken> {
        let (socket, patience) = {
            let mut desk = self.slot.lock();
            let patience = desk.patience(self.silence);
            (desk.session.as_ref().map(|(stream, _)| stream.socket()), patience)
        };
        if let Err(Broken::Silent(silence)) = patience {
            // The next one may be longer.
            self.silence = (silence * 2).min(self.shared.settings.timing.silence_max).max(silence);
        }
        let (Some(socket), (want, deadline)) = (socket, patience?) else { return Err(Broken::Over) };
        socket.wait(want, &self.slot.kick, Some(deadline))?;
        if self.shared.is_closed() { Err(Broken::Closed) } else { Ok(()) }
    }

    /// Deals with what was read, and with payloads that follow.
    fn handle_answers(&mut self, terms: &Terms) -> Result<(), Broken> {
        loop {
            let (consumed, event) = self.slot.lock().step(&self.input[self.start..self.end])?;
            self.start += consumed;
            let Some(event) = event else { return Ok(()) };
            match event {
                Event::Data { tag, offset, length } => self.handle_data(tag, offset, length, terms)?,
                Event::Held { tag, offset, buffer } => {
                    let length = buffer.as_ref().len() as u64;
                    if let (token, true) = self.piece(tag, offset, length, terms)? {
                        self.sink.handle_data(token, offset, buffer.as_ref());
                    }
                    self.slot.lock().core.recycle(buffer);
                }
                Event::Hole { tag, offset, length } => {
                    if let (token, true) = self.piece(tag, offset, length, terms)? {
                        self.sink.handle_hole(token, offset, length);
                    }
                }
                Event::Digest { tag, offset, length, crc32c } => self.handle_digest(tag, offset, length, crc32c)?,
                Event::Done { tag, result } => self.handle_done(tag, result, terms)?,
                Event::Nothing => {}
                Event::Ready | Event::StartTls => return Err(Broken::Over),
            }
        }
    }

    /// Whose piece it is, and whether it is whole blocks. If not, it is dropped, and this part of the job is asked for again in
    /// one piece.
    fn piece(&self, tag: usize, offset: u64, length: u64, terms: &Terms) -> Result<(u64, bool), Broken> {
        let end = offset + length;
        let whole = offset.is_multiple_of(BLOCK) && (end.is_multiple_of(BLOCK) || end == terms.found.size);
        let mut desk = self.slot.lock();
        let job = desk.job(tag)?;
        job.cut |= !whole;
        Ok((job.fetch.token, whole))
    }

    /// A payload: from the input buffer what is there, then straight from the socket.
    fn handle_data(&mut self, tag: usize, offset: u64, length: u32, terms: &Terms) -> Result<(), Broken> {
        let (token, whole) = self.piece(tag, offset, length.into(), terms)?;
        let mut done = 0u64;
        while done < u64::from(length) {
            let count = (u64::from(length) - done).min(DATA as u64) as usize;
            let buffer = self.data.slice_mut(0..count);
            let mut filled = count.min(self.end - self.start);
            buffer[..filled].copy_from_slice(&self.input[self.start..self.start + filled]);
            self.start += filled;
            while filled < count {
                let read = self.slot.lock().read(&mut self.data.slice_mut(0..count)[filled..])?;
                filled += read;
                if read == 0 {
                    // New requests go out while a long answer comes in.
                    while self.ask()? {}
                    self.await_peer()?;
                }
            }
            if whole {
                self.sink.handle_data(token, offset + done, self.data.slice(0..count));
            }
            done += count as u64;
        }
        Ok(())
    }

    fn handle_done(&mut self, tag: usize, result: Result<(), Errno>, terms: &Terms) -> Result<(), Broken> {
        self.useful = true;
        self.silence = self.shared.settings.timing.silence;
        self.hand_over_digests()?;
        let mut desk = self.slot.lock();
        let mut job = *desk.job(tag)?;
        let result = match result {
            Err(errno) => Err(errno),
            Ok(()) if job.cut && (job.unfragmented || !terms.unfragmented) => Err(Errno::IO),
            Ok(()) => {
                if job.cut {
                    job.unfragmented = true;
                } else if job.fetch.want == Want::Data {
                    job.next += u64::from(terms.part(&job));
                }
                if job.left() > 0 {
                    return desk.ask_next(tag, job);
                }
                Ok(())
            }
        };
        desk.clear(tag);
        drop(desk);
        self.shared.pool.answered(self.index, &job);
        self.shared.done(&job.fetch, result, self.sink);
        Ok(())
    }
}
