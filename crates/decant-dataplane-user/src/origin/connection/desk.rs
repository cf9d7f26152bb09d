//! A lane's desk: what it asked for and how, shared between its thread and those who have something to ask.

use std::io::{self, IoSlice};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use rustix::io::Errno;

use crate::device::Want;
use crate::origin::client::{Ask, Broken, Client, Event, Terms};
use crate::origin::pool::{Job, Pool};
use crate::stream::{Kick, Stream, Wait, now};

/// Output that may wait for room in the socket: more than all requests of a session. A peer that makes us say more, and reads none
/// of it, is not one to wait for.
const MAX_PENDING: usize = 1024 * 1024;

/// A lane as everybody sees it: its desk, behind a lock that is held for moments only, never while anybody waits or works on
/// data; and the means to wake its thread.
pub(in crate::origin) struct Slot {
    pub(in crate::origin) kick: Kick,
    desk: Mutex<Desk>,
    /// The lane's thread.
    owner: OnceLock<ThreadId>,
}

impl Slot {
    pub(in crate::origin) fn new(core: Box<dyn Client>) -> io::Result<Self> {
        Ok(Self { kick: Kick::new()?, desk: Mutex::new(Desk::new(core)), owner: OnceLock::new() })
    }

    pub(super) fn lock(&self) -> MutexGuard<'_, Desk> {
        self.desk.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The calling thread is the lane's.
    pub(super) fn own(&self) {
        let _ = self.owner.set(thread::current().id());
    }

    /// Asks for what the lane's queue holds, at once and on the caller's thread: waking another takes longer. Never blocks.
    pub(in crate::origin) fn post(&self, pool: &Pool, index: usize) {
        // From within the sink: the thread looks at its queue before it waits.
        if self.owner.get() != Some(&thread::current().id()) && !self.lock().post(pool, index) {
            self.kick.kick();
        }
    }
}

/// The connection and what it owes.
pub(super) struct Desk {
    pub(super) core: Box<dyn Client>,
    /// While requests may go out.
    pub(super) session: Option<(Stream, Terms)>,
    /// What broke the session while a request was put on the wire, for the thread to find.
    pub(super) broken: Option<Broken>,
    /// Jobs in progress, by tag; `free` holds the empty places.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs that this export cannot answer.
    pub(super) refused: Vec<(Job, Errno)>,
    pub(super) out: Vec<u8>,
    /// What the core had heard when the peer was last heard, and when that was; or when it began to owe an answer, if that was later.
    heard: (u64, Instant),
}

impl Desk {
    fn new(core: Box<dyn Client>) -> Self {
        Self {
            core,
            session: None,
            broken: None,
            jobs: Vec::new(),
            free: Vec::new(),
            refused: Vec::new(),
            out: Vec::new(),
            heard: (0, now()),
        }
    }

    /// A connection is there.
    pub(super) fn connect(&mut self) -> Result<(), Broken> {
        self.core.handle_connect(now(), &mut self.out)
    }

    /// Puts what the queue holds on the wire; false if the lane's thread must see to the rest.
    fn post(&mut self, pool: &Pool, index: usize) -> bool {
        if self.broken.is_some() || self.session.is_none() {
            return false;
        }
        self.broken = self.ask(pool, index).err();
        let pending = self.session.as_ref().is_some_and(|(stream, _)| stream.has_pending());
        let idle = self.refused.is_empty() && !self.core.has_events();
        self.broken.is_none() && idle && !pending && self.core.has_room()
    }

    /// Asks for the lane's jobs.
    pub(super) fn ask(&mut self, pool: &Pool, index: usize) -> Result<(), Broken> {
        if self.core.outstanding() == 0 {
            self.heard.1 = now();
        }
        while self.core.has_room() {
            let Some(job) = pool.take(index) else { break };
            let Some((_, terms)) = &self.session else { return Err(Broken::Over) };
            let found = &terms.found;
            let outside = job.fetch.offset.checked_add(job.fetch.length.into()).is_none_or(|end| end > found.size);
            let impossible = job.fetch.want == Want::Digests && !found.digests;
            if outside || impossible {
                self.refused.push((job, if outside { Errno::INVAL } else { Errno::OPNOTSUPP }));
                continue;
            }
            let tag = match self.free.pop() {
                Some(tag) => tag,
                None => {
                    self.jobs.push(None);
                    self.jobs.len() - 1
                }
            };
            self.ask_next(tag, job)?;
        }
        self.send()
    }

    /// Asks for the job's next part; [`Desk::send`] puts it on the wire.
    pub(super) fn ask_next(&mut self, tag: usize, mut job: Job) -> Result<(), Broken> {
        let Some((_, terms)) = &self.session else { return Err(Broken::Over) };
        job.cut = false;
        let Job { fetch, next: offset, unfragmented, .. } = job;
        let ask = Ask { want: fetch.want, offset, length: terms.part(&job), unfragmented, urgent: fetch.urgent };
        self.jobs[tag] = Some(job);
        self.core.ask(tag, &ask, now(), &mut self.out)
    }

    /// Sends what was written; what the socket does not take waits in the stream.
    pub(super) fn send(&mut self) -> Result<(), Broken> {
        if let Some((stream, _)) = &mut self.session
            && !self.out.is_empty()
        {
            stream.send(&[IoSlice::new(&self.out)])?;
            self.out.clear();
            if stream.pending_bytes() > MAX_PENDING {
                return Err(Broken::Deaf);
            }
        }
        Ok(())
    }

    /// Time passes; until when that is enough.
    pub(super) fn tick(&mut self) -> Result<Option<Instant>, Broken> {
        let next = self.core.handle_tick(now(), &mut self.out)?;
        self.send()?;
        Ok(next)
    }

    /// What the core makes of `input`, and how much of it.
    pub(super) fn step(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), Broken> {
        self.core.handle_input(now(), input, &mut self.out)
    }

    /// Reads what there is: to where it belongs, if `input` is empty and that is known, else into it. How much, and whether
    /// it was the former.
    pub(super) fn receive(&mut self, input: &mut [u8], empty: bool) -> Result<(usize, bool), Broken> {
        let Some((stream, _)) = &mut self.session else { return Err(Broken::Over) };
        let Some(room) = self.core.landing().filter(|_| empty) else { return Ok((self.read(input)?, false)) };
        match stream.read(room) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok((0, true)),
            Ok(count) => self.core.handle_landed(count).map(|()| (count, true)),
            Err(error) => Err(error.into()),
        }
    }

    /// Reads what there is; 0 if nothing.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<usize, Broken> {
        let Some((stream, _)) = &mut self.session else { return Err(Broken::Over) };
        match stream.read(into) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => Ok(result?),
        }
    }

    pub(super) fn job(&mut self, tag: usize) -> Result<&mut Job, Broken> {
        self.jobs.get_mut(tag).and_then(Option::as_mut).ok_or(Broken::Unasked)
    }

    /// The job of `tag` is over.
    pub(super) fn clear(&mut self, tag: usize) {
        self.jobs[tag] = None;
        self.free.push(tag);
    }

    /// What to wait for, and until when: no longer than a live peer would take. If none is owed, somebody may ask meanwhile
    /// without waking the thread, which looks again within the same time.
    pub(super) fn patience(&mut self, silence: Duration) -> Result<(Wait, Instant), Broken> {
        let tick = self.tick()?;
        let owes = self.core.outstanding() > 0;
        let Some((stream, _)) = &mut self.session else { return Err(Broken::Over) };
        stream.flush()?;
        let heard = self.core.heard(stream.bytes_received());
        if !owes || self.heard.0 != heard {
            self.heard = (heard, now());
        }
        let deadline = self.heard.1 + silence;
        if now() >= deadline {
            return Err(Broken::Silent(silence));
        }
        let deadline = tick.unwrap_or(deadline).min(deadline);
        Ok((if stream.has_pending() { Wait::ReadWrite } else { Wait::Read }, deadline))
    }

    /// A session begins.
    pub(super) fn open(&mut self, stream: Stream, terms: Terms) {
        self.heard = (self.core.heard(stream.bytes_received()), now());
        self.session = Some((stream, terms));
    }

    /// The session is over: gives back what it owed.
    pub(super) fn close(&mut self) -> Vec<Job> {
        self.session = None;
        self.broken = None;
        self.out.clear();
        self.core.handle_disconnect();
        self.free.clear();
        self.jobs.drain(..).flatten().chain(self.refused.drain(..).map(|(job, _)| job)).collect()
    }
}
