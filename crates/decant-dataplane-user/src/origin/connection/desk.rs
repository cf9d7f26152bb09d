//! A lane's desk: what it asked for and how, shared between its thread and those who have something to ask.

use std::io::{self, IoSlice};
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::thread::{self, ThreadId};
use std::time::{Duration, Instant};

use decant_nbd::client::{Client, Config, Event, Goal};
use decant_nbd::{Command, Contexts, ExportInfo, Violation};
use rustix::io::Errno;

use super::super::Options;
use super::super::pool::{Job, Pool};
use super::{BLOCK, Broken};
use crate::device::Want;
use crate::stream::{Kick, Stream, Wait, now};

/// Most requests that one connection owes answers to. Bytes are bounded by whoever asks.
const MAX_OUTSTANDING: usize = 1024;

/// A lane as everybody sees it: its desk, behind a lock that is held for moments only, never while anybody waits or works on
/// data; and the means to wake its thread.
pub(in crate::origin) struct Slot {
    pub(in crate::origin) kick: Kick,
    desk: Mutex<Desk>,
    /// The lane's thread.
    owner: OnceLock<ThreadId>,
}

impl Slot {
    pub(in crate::origin) fn new(options: &Options) -> io::Result<Self> {
        Ok(Self { kick: Kick::new()?, desk: Mutex::new(Desk::new(options)), owner: OnceLock::new() })
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
    pub(super) core: Client,
    /// While requests may go out.
    pub(super) session: Option<(Stream, ExportInfo)>,
    /// What broke the session while a request was put on the wire, for the thread to find.
    pub(super) broken: Option<Broken>,
    /// Jobs in progress, by tag; `free` holds the empty places.
    jobs: Vec<Option<Job>>,
    free: Vec<usize>,
    /// Jobs that this export cannot answer.
    pub(super) refused: Vec<(Job, Errno)>,
    pub(super) out: Vec<u8>,
    /// Bytes received when the peer was last heard, and when that was; or when it began to owe an answer, if that was later.
    heard: (u64, Instant),
}

impl Desk {
    fn new(options: &Options) -> Self {
        let config = Config {
            goal: Goal::Transmission,
            export: options.export.clone(),
            tls: options.tls.is_some(),
            contexts: Contexts { allocation: false, digests: options.digests },
            max_outstanding: MAX_OUTSTANDING,
        };
        Self {
            core: Client::new(config),
            session: None,
            broken: None,
            jobs: Vec::with_capacity(MAX_OUTSTANDING),
            free: Vec::with_capacity(MAX_OUTSTANDING),
            refused: Vec::new(),
            out: Vec::new(),
            heard: (0, now()),
        }
    }

    /// Puts what the queue holds on the wire; false if the lane's thread must see to the rest.
    fn post(&mut self, pool: &Pool, index: usize) -> bool {
        if self.broken.is_some() || self.session.is_none() {
            return false;
        }
        self.broken = self.ask(pool, index).err();
        let pending = self.session.as_ref().is_some_and(|(stream, _)| stream.has_pending());
        self.broken.is_none() && self.refused.is_empty() && !pending && self.core.outstanding() < MAX_OUTSTANDING
    }

    /// Asks for the lane's jobs.
    pub(super) fn ask(&mut self, pool: &Pool, index: usize) -> Result<(), Broken> {
        if self.core.outstanding() == 0 {
            self.heard.1 = now();
        }
        while self.core.outstanding() < MAX_OUTSTANDING {
            let Some(job) = pool.take(index) else { break };
            let Some((_, export)) = &self.session else { return Err(Violation::Ended.into()) };
            let outside = job.fetch.offset.checked_add(job.fetch.length.into()).is_none_or(|end| end > export.size);
            let impossible = job.fetch.want == Want::Digests && !self.core.contexts().digests;
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
        let Some((_, export)) = &self.session else { return Err(Violation::Ended.into()) };
        let length = part(&job, export);
        job.cut = false;
        self.jobs[tag] = Some(job);
        let command = match job.fetch.want {
            Want::Data => Command::Read { unfragmented: job.unfragmented },
            Want::Digests => Command::BlockStatus { one: false },
        };
        Ok(self.core.request(tag as u64, command, job.next, length, &mut self.out)?)
    }

    /// Sends what was written; what the socket does not take waits in the stream.
    pub(super) fn send(&mut self) -> Result<(), Broken> {
        if let Some((stream, _)) = &mut self.session
            && !self.out.is_empty()
        {
            stream.send(&[IoSlice::new(&self.out)])?;
            self.out.clear();
        }
        Ok(())
    }

    /// What the core makes of `input`, and how much of it.
    pub(super) fn step(&mut self, input: &[u8]) -> Result<(usize, Option<Event>), Broken> {
        let step = self.core.handle_input(input, &mut self.out)?;
        Ok((step.consumed, step.event))
    }

    /// Reads what there is; 0 if nothing.
    pub(super) fn read(&mut self, into: &mut [u8]) -> Result<usize, Broken> {
        let Some((stream, _)) = &mut self.session else { return Err(Violation::Ended.into()) };
        match stream.read(into) {
            Err(error) if error.kind() == io::ErrorKind::WouldBlock => Ok(0),
            result => Ok(result?),
        }
    }

    pub(super) fn job(&mut self, tag: usize) -> Result<&mut Job, Violation> {
        self.jobs.get_mut(tag).and_then(Option::as_mut).ok_or(Violation::UnknownCookie(tag as u64))
    }

    /// The job of `tag` is over.
    pub(super) fn clear(&mut self, tag: usize) {
        self.jobs[tag] = None;
        self.free.push(tag);
    }

    /// What to wait for, and until when: no longer than a live peer would take. If none is owed, somebody may ask meanwhile
    /// without waking the thread, which looks again within the same time.
    pub(super) fn patience(&mut self, silence: Duration) -> Result<(Wait, Instant), Broken> {
        let owes = self.core.outstanding() > 0;
        let Some((stream, _)) = &mut self.session else { return Err(Violation::Ended.into()) };
        stream.flush()?;
        if !owes || self.heard.0 != stream.bytes_received() {
            self.heard = (stream.bytes_received(), now());
        }
        let deadline = self.heard.1 + silence;
        if now() >= deadline {
            return Err(Broken::Silent(silence));
        }
        Ok((if stream.has_pending() { Wait::ReadWrite } else { Wait::Read }, deadline))
    }

    /// A session begins.
    pub(super) fn open(&mut self, stream: Stream, export: ExportInfo) {
        self.heard = (stream.bytes_received(), now());
        self.session = Some((stream, export));
    }

    /// The session is over: gives back what it owed.
    pub(super) fn close(&mut self) -> Vec<Job> {
        self.session = None;
        self.broken = None;
        self.out.clear();
        self.core.handle_disconnect();
        while self.core.poll_lost().is_some() {}
        self.free.clear();
        self.jobs.drain(..).flatten().chain(self.refused.drain(..).map(|(job, _)| job)).collect()
    }
}

/// Bytes to ask for next: all of the job, unless the server takes less at a time.
pub(super) fn part(job: &Job, export: &ExportInfo) -> u32 {
    let most = export.blocks.maximum.min(decant_nbd::MAX_PAYLOAD).max(BLOCK as u32) / BLOCK as u32 * BLOCK as u32;
    u32::try_from(job.left()).unwrap_or(most).min(most)
}
