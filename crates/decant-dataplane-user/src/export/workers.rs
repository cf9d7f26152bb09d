//! A few threads for what may take long.

use std::collections::VecDeque;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

type Job = Box<dyn FnOnce() + Send>;

#[derive(Default)]
struct State {
    queue: VecDeque<Job>,
    idle: usize,
    threads: Vec<JoinHandle<()>>,
    closed: bool,
}

#[derive(Default)]
struct Shared {
    state: Mutex<State>,
    changed: Condvar,
}

/// Threads that do jobs in the order in which they came; made as jobs come, up to a number.
pub(crate) struct Workers {
    name: &'static str,
    most: usize,
    shared: Arc<Shared>,
}

impl Shared {
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Workers {
    /// At most `most` threads, none yet.
    pub(crate) fn new(name: &'static str, most: usize) -> Self {
        Self { name, most: most.max(1), shared: Arc::default() }
    }

    /// Has `job` done. Without a thread for it, which only a system without memory has, it is done here.
    pub(crate) fn submit(&self, job: Job) {
        let mut state = self.shared.lock();
        if state.closed {
            drop(state);
            return job();
        }
        state.queue.push_back(job);
        if state.idle >= state.queue.len() || state.threads.len() >= self.most {
            self.shared.changed.notify_one();
            return;
        }
        let shared = Arc::clone(&self.shared);
        match std::thread::Builder::new().name(self.name.into()).spawn(move || work(&shared)) {
            Ok(thread) => state.threads.push(thread),
            Err(error) if state.threads.is_empty() => {
                tracing::warn!(%error, "no thread for slow requests");
                let jobs = std::mem::take(&mut state.queue);
                drop(state);
                jobs.into_iter().for_each(|job| job());
            }
            Err(_) => self.shared.changed.notify_one(),
        }
    }

    /// Has all jobs done that came so far, and ends the threads.
    pub(crate) fn close(&self) {
        let threads = {
            let mut state = self.shared.lock();
            state.closed = true;
            std::mem::take(&mut state.threads)
        };
        self.shared.changed.notify_all();
        for thread in threads {
            let _ = thread.join();
        }
    }
}

impl Drop for Workers {
    fn drop(&mut self) {
        self.close();
    }
}

fn work(shared: &Shared) {
    let mut state = shared.lock();
    loop {
        if let Some(job) = state.queue.pop_front() {
            drop(state);
            job();
            state = shared.lock();
        } else if state.closed {
            return;
        } else {
            state.idle += 1;
            state = shared.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
            state.idle -= 1;
        }
    }
}
