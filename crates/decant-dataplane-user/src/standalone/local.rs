//! A file or block device of this machine as an origin, read by a thread of its own.

use std::collections::VecDeque;
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use decant_base::BLOCK;
use rustix::fs::SeekFrom;
use rustix::io::Errno;

use crate::device::{Fetch, Origin, OriginSink, Want};
use crate::export::claim::Claim;
use crate::stream::Aligned;

/// Bytes read at a time; between two of them somebody who waits gets his turn.
const PIECE: u64 = 256 * 1024;

/// A fetch, and how much of it is answered.
struct Job {
    fetch: Fetch,
    done: u64,
}

#[derive(Default)]
struct State {
    urgent: VecDeque<Job>,
    others: VecDeque<Job>,
    in_flight: u64,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// The origin. What was claimed stays claimed until it is closed.
pub(super) struct LocalOrigin {
    shared: Arc<Shared>,
    thread: Mutex<Option<JoinHandle<()>>>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl LocalOrigin {
    /// Starts to answer. A read that fails is answered with its error, and asked for again by the clone.
    pub(super) fn open(claim: Claim, path: &Path, sink: Arc<dyn OriginSink>) -> std::io::Result<Arc<Self>> {
        let shared = Arc::<Shared>::default();
        let (answering, name) = (Arc::clone(&shared), path.display().to_string());
        let thread = std::thread::Builder::new().name("local-origin".into()).spawn(move || {
            sink.handle_link(true, &format!("reading {name}"));
            answer_all(&answering, &claim, &*sink);
        })?;
        Ok(Arc::new(Self { shared, thread: Mutex::new(Some(thread)) }))
    }
}

impl Origin for LocalOrigin {
    fn request(&self, fetch: Fetch) {
        let mut state = self.shared.lock();
        if state.closed || fetch.length == 0 {
            return;
        }
        state.in_flight += u64::from(fetch.length);
        let queue = if fetch.urgent { &mut state.urgent } else { &mut state.others };
        queue.push_back(Job { fetch, done: 0 });
        self.shared.changed.notify_one();
    }

    fn in_flight(&self) -> u64 {
        self.shared.lock().in_flight
    }

    fn close(&self) {
        self.shared.lock().closed = true;
        self.shared.changed.notify_all();
        let thread = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take();
        // The last reference may be dropped by the sink, on the thread itself, which then ends on its own.
        if let Some(thread) = thread.filter(|thread| thread.thread().id() != std::thread::current().id()) {
            let _ = thread.join();
        }
    }
}

impl Drop for LocalOrigin {
    fn drop(&mut self) {
        self.close();
    }
}

fn answer_all(shared: &Shared, claim: &Claim, sink: &dyn OriginSink) {
    let mut buffer = Aligned::new(PIECE as usize);
    loop {
        let mut job = {
            let mut state = shared.lock();
            loop {
                if state.closed {
                    return;
                }
                if let Some(job) = state.urgent.pop_front() {
                    break job;
                }
                if let Some(job) = state.others.pop_front() {
                    break job;
                }
                state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            }
        };
        let result = answer_piece(&mut job, claim, &mut buffer, sink);
        let length = u64::from(job.fetch.length);
        if result.is_ok() && job.done < length {
            let mut state = shared.lock();
            let queue = if job.fetch.urgent { &mut state.urgent } else { &mut state.others };
            queue.push_front(job);
            continue;
        }
        shared.lock().in_flight -= length;
        sink.handle_done(job.fetch.token, result);
    }
}

/// Answers the next part of a job: a hole, or a piece of data.
fn answer_piece(job: &mut Job, claim: &Claim, buffer: &mut Aligned, sink: &dyn OriginSink) -> Result<(), Errno> {
    let Fetch { token, offset, length, want, .. } = job.fetch;
    let (at, end) = (offset + job.done, (offset + u64::from(length)).min(claim.size));
    if at >= end {
        return Err(Errno::INVAL);
    }
    if want == Want::Data {
        let data = next_data(claim, at, end)?;
        if data > at {
            sink.handle_hole(token, at, data - at);
            job.done = if data == end { length.into() } else { data - offset };
            return Ok(());
        }
    }
    let count = (end - at).min(PIECE);
    let bytes = buffer.slice_mut(0..count as usize);
    claim.read(at, bytes)?;
    match want {
        Want::Data => sink.handle_data(token, at, bytes),
        Want::Digests => {
            let digests: Vec<u32> = bytes.chunks(BLOCK as usize).map(crc32c::crc32c).collect();
            sink.handle_digests(token, at, &digests);
        }
    }
    job.done = if at + count == end { length.into() } else { job.done + count };
    Ok(())
}

/// Where the first block with data is, from the block boundary `at` on; `end` if there is none before it.
fn next_data(claim: &Claim, at: u64, end: u64) -> Result<u64, Errno> {
    if claim.is_block_device {
        return Ok(at);
    }
    match rustix::fs::seek(&claim.file, SeekFrom::Data(at)) {
        Ok(data) if data >= end => Ok(end),
        // Whole blocks only.
        Ok(data) => Ok((data / BLOCK * BLOCK).max(at)),
        Err(Errno::NXIO) => Ok(end),
        // A file system that cannot say.
        Err(Errno::INVAL) => Ok(at),
        Err(error) => Err(error),
    }
}
