//! A target over a file, with threads and blocking sockets: what the tests and `examples/target.rs` run.
//!
//! One thread for each connection reads, and performs requests itself or hands them to workers. The order of locks is the
//! connection's machine, then the target.

#![allow(dead_code)]

mod backend;

use std::collections::{HashMap, VecDeque};
use std::fs::File;
use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, Weak, mpsc};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use decant_iscsi::chap;
use decant_iscsi::target::{Connection, ConnectionId, Event, Outbox, Request, Target, TaskId};

use backend::perform;

/// Bytes read at a time; more than the largest header.
const INPUT_BYTES: usize = 256 * 1024;
/// Data that are at least this long are read straight to their place.
const DIRECT_BYTES: u32 = 16 * 1024;

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

struct Shared {
    target: Mutex<Target>,
    file: File,
    links: Mutex<HashMap<ConnectionId, Weak<Link>>>,
    workers: usize,
    log: bool,
    stopping: AtomicBool,
}

/// One connection.
struct Link {
    shared: Arc<Shared>,
    stream: TcpStream,
    machine: Mutex<Machine>,
    jobs: Option<mpsc::Sender<(TaskId, Request, Vec<u8>)>>,
}

struct Machine {
    connection: Connection,
    out: Outbox<Vec<u8>>,
    /// The buffer of each task that has one.
    buffers: Vec<Vec<u8>>,
    spare: Vec<Vec<u8>>,
    requests: VecDeque<(TaskId, Request)>,
    closing: bool,
}

impl Machine {
    fn act(&mut self, event: Event, input: &[u8], log: bool) {
        match event {
            Event::LoggedIn { initiator, discovery } => {
                if log {
                    eprintln!("{initiator} logged in{}", if discovery { " for discovery" } else { "" });
                }
            }
            Event::Data { task, offset, total, range } => {
                let Some(buffer) = self.buffers.get_mut(task.0 as usize) else { return };
                if buffer.len() != total as usize {
                    *buffer = self.spare.pop().unwrap_or_default();
                    buffer.resize(total as usize, 0);
                }
                let (from, at) = (&input[range], offset as usize);
                let to = &mut buffer[at..at + from.len()];
                to.copy_from_slice(from);
            }
            Event::Request { task, request } => self.requests.push_back((task, request)),
            Event::Forget(task) => {
                if let Some(buffer) = self.buffers.get_mut(task.0 as usize) {
                    *buffer = Vec::new();
                }
            }
            Event::Close(farewell) => {
                if log {
                    eprintln!("closing: {farewell:?}");
                }
                self.closing = true;
            }
        }
    }

    fn poll(&mut self, log: bool) {
        while let Some(event) = self.connection.poll_event() {
            self.act(event, &[], log);
        }
    }
}

impl Link {
    /// Deals with input; how much of it is dealt with.
    fn feed(&self, input: &[u8]) -> Result<usize, decant_iscsi::Violation> {
        let mut machine = lock(&self.machine);
        let mut target = lock(&self.shared.target);
        let machine = &mut *machine;
        let mut consumed = 0;
        loop {
            let rest = &input[consumed..];
            let step = machine.connection.handle_input(&mut target, rest, &mut machine.out)?;
            consumed += step.consumed;
            let Some(event) = step.event else { return Ok(consumed) };
            machine.act(event, rest, self.shared.log);
        }
    }

    /// Has all requests that came up performed.
    fn perform_requests(&self) {
        loop {
            let mut machine = lock(&self.machine);
            let Some((task, request)) = machine.requests.pop_front() else { return };
            let buffer = match request {
                Request::Read { .. } => machine.spare.pop().unwrap_or_default(),
                Request::Fill { .. } => machine.connection.pattern(task).to_vec(),
                Request::Write { .. } | Request::Verify { .. } => {
                    machine.buffers.get_mut(task.0 as usize).map(std::mem::take).unwrap_or_default()
                }
                _ => Vec::new(),
            };
            drop(machine);
            match &self.jobs {
                Some(jobs) => {
                    let _ = jobs.send((task, request, buffer));
                }
                None => self.run(task, request, buffer),
            }
        }
    }

    fn run(&self, task: TaskId, request: Request, buffer: Vec<u8>) {
        let mut done = perform(&self.shared.file, request, buffer);
        let mut machine = lock(&self.machine);
        let mut target = lock(&self.shared.target);
        let machine = &mut *machine;
        let keep = matches!(request, Request::Write { keep: true, .. });
        match done.buffer {
            Some(buffer) if keep => machine.buffers[task.0 as usize] = buffer,
            Some(buffer) if matches!(request, Request::Write { .. } | Request::Verify { .. }) => {
                machine.spare.push(buffer)
            }
            _ => {}
        }
        machine.connection.complete(&mut target, task, done.outcome.as_outcome(), &mut machine.out);
        machine.poll(self.shared.log);
    }

    /// Sends everything; whether there was something. `None`: the connection is broken.
    fn flush(&self) -> Option<bool> {
        let mut machine = lock(&self.machine);
        let machine = &mut *machine;
        let something = !machine.out.is_empty();
        while !machine.out.is_empty() {
            let mut slices = [IoSlice::new(&[]); 64];
            let count = machine.out.slices(&mut slices);
            match (&self.stream).write_vectored(&slices[..count]) {
                Ok(0) => return None,
                Ok(sent) => machine.out.advance(sent),
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(_) => return None,
            }
        }
        while let Some(buffer) = machine.out.take_spent() {
            machine.spare.push(buffer);
        }
        if machine.closing {
            let _ = self.stream.shutdown(std::net::Shutdown::Both);
        }
        Some(something)
    }

    fn wake(&self) {
        {
            let mut machine = lock(&self.machine);
            let mut target = lock(&self.shared.target);
            let machine = &mut *machine;
            machine.connection.handle_wakeup(&mut target, &mut machine.out);
            machine.poll(self.shared.log);
        }
        self.perform_requests();
        self.flush();
    }

    /// The next bytes: where a task's data belong, or into `input`. Gives the length, or `None` at the stream's end.
    fn receive(&self, input: &mut [u8]) -> std::io::Result<Received> {
        let direct = {
            let mut machine = lock(&self.machine);
            let machine = &mut *machine;
            let wanted = machine.connection.data_wanted();
            wanted.filter(|(_, range)| range.end - range.start >= DIRECT_BYTES).and_then(|(task, range)| {
                let buffer = machine.buffers.get_mut(task.0 as usize)?;
                // The task's first bytes allocate it.
                (buffer.len() >= range.end as usize).then(|| (task, range, std::mem::take(buffer)))
            })
        };
        let Some((task, range, mut buffer)) = direct else { return (&self.stream).read(input).map(Received::Input) };
        let place = &mut buffer[range.start as usize..range.end as usize];
        let count = (&self.stream).read(place);
        let start = range.start as usize;
        lock(&self.machine).buffers[task.0 as usize] = buffer;
        count.map(|count| Received::Direct(task, start..start + count))
    }

    fn feed_direct(&self, task: TaskId, range: std::ops::Range<usize>) -> Result<(), decant_iscsi::Violation> {
        // Shown to the machine where it lies: taken out for the while, so that nothing else holds it.
        let buffer = std::mem::take(&mut lock(&self.machine).buffers[task.0 as usize]);
        let mut machine = lock(&self.machine);
        let mut target = lock(&self.shared.target);
        let machine = &mut *machine;
        let mut consumed = range.start;
        while consumed < range.end {
            let step = machine.connection.handle_input(&mut target, &buffer[consumed..range.end], &mut machine.out)?;
            consumed += step.consumed;
            match step.event {
                Some(Event::Data { .. }) => {}
                Some(event) => machine.act(event, &[], self.shared.log),
                None if step.consumed == 0 => break,
                None => {}
            }
        }
        machine.buffers[task.0 as usize] = buffer;
        Ok(())
    }

    fn serve(self: &Arc<Self>) {
        let mut input = vec![0; INPUT_BYTES];
        let (mut start, mut end) = (0, 0);
        let began = Instant::now();
        let ended = loop {
            let consumed = match self.feed(&input[start..end]) {
                Ok(consumed) => consumed,
                Err(violation) => break Some(violation),
            };
            start += consumed;
            self.perform_requests();
            self.shared.wake_others(self);
            let Some(sent) = self.flush() else { break None };
            if lock(&self.machine).closing {
                break None;
            }
            if start < end && (consumed > 0 || sent) {
                // Nothing is taken while too much is to be sent; now there is room again.
                continue;
            }
            if start == end {
                (start, end) = (0, 0);
            } else if start > 0 {
                input.copy_within(start..end, 0);
                (start, end) = (0, end - start);
            }
            let received = if end == 0 {
                self.receive(&mut input)
            } else {
                (&self.stream).read(&mut input[end..]).map(Received::Input)
            };
            match received {
                Ok(Received::Input(0)) => break None,
                Ok(Received::Input(count)) => end += count,
                Ok(Received::Direct(_, range)) if range.is_empty() => break None,
                Ok(Received::Direct(task, range)) => {
                    if let Err(violation) = self.feed_direct(task, range) {
                        break Some(violation);
                    }
                }
                Err(error) if matches!(error.kind(), ErrorKind::WouldBlock | ErrorKind::TimedOut) => {
                    let mut machine = lock(&self.machine);
                    let mut target = lock(&self.shared.target);
                    let machine = &mut *machine;
                    let now = began.elapsed().as_millis() as u64;
                    if let Err(violation) = machine.connection.handle_tick(&mut target, now, &mut machine.out) {
                        break Some(violation);
                    }
                }
                Err(_) => break None,
            }
        };
        if let Some(violation) = ended
            && self.shared.log
        {
            eprintln!("connection ended: {violation}");
        }
        self.flush();
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
        let mut machine = lock(&self.machine);
        machine.connection.handle_disconnect(&mut lock(&self.shared.target));
        drop(machine);
        self.shared.wake_others(self);
    }
}

enum Received {
    Input(usize),
    Direct(TaskId, std::ops::Range<usize>),
}

impl Shared {
    /// Calls on the connections that another one did something to; no lock may be held.
    fn wake_others(&self, _by: &Link) {
        loop {
            let Some(id) = lock(&self.target).poll_wakeup() else { return };
            let link = lock(&self.links).get(&id).and_then(Weak::upgrade);
            if let Some(link) = link {
                link.wake();
            }
        }
    }
}

/// A running target.
pub(crate) struct Server {
    shared: Arc<Shared>,
    address: SocketAddr,
    acceptor: Option<JoinHandle<()>>,
}

impl Server {
    /// Serves `target` over `file` at `listener`; with `workers` 0 each connection performs its requests itself.
    pub(crate) fn start(listener: TcpListener, target: Target, file: File, workers: usize, log: bool) -> Self {
        let address = listener.local_addr().expect("a listener has an address");
        let shared = Arc::new(Shared {
            target: Mutex::new(target),
            file,
            links: Mutex::new(HashMap::new()),
            workers,
            log,
            stopping: AtomicBool::new(false),
        });
        let accepting = Arc::clone(&shared);
        let acceptor = std::thread::spawn(move || accept(&accepting, &listener));
        Self { shared, address, acceptor: Some(acceptor) }
    }

    /// Where it listens.
    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    /// The target.
    pub(crate) fn with_target<T>(&self, act: impl FnOnce(&mut Target) -> T) -> T {
        act(&mut lock(&self.shared.target))
    }

    /// Serves until the process ends.
    pub(crate) fn wait(mut self) {
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.shared.stopping.store(true, Ordering::SeqCst);
        for link in lock(&self.shared.links).values().filter_map(Weak::upgrade) {
            let _ = link.stream.shutdown(std::net::Shutdown::Both);
        }
        // Wakes the acceptor.
        let _ = TcpStream::connect(self.address);
        if let Some(acceptor) = self.acceptor.take() {
            let _ = acceptor.join();
        }
    }
}

fn accept(shared: &Arc<Shared>, listener: &TcpListener) {
    for stream in listener.incoming() {
        if shared.stopping.load(Ordering::SeqCst) {
            return;
        }
        let Ok(stream) = stream else { continue };
        let _ = stream.set_nodelay(true);
        let _ = stream.set_read_timeout(Some(Duration::from_secs(1)));
        let _ = stream.set_write_timeout(Some(Duration::from_secs(20)));
        let mut random = [0; chap::RANDOM_BYTES];
        if getrandom::fill(&mut random).is_err() {
            continue;
        }
        let connection = Connection::new(&mut lock(&shared.target), random);
        let id = connection.id();
        let buffers = std::iter::repeat_with(Vec::new).take(connection.task_ids() as usize).collect();
        let (jobs, queue) = mpsc::channel();
        let link = Arc::new(Link {
            shared: Arc::clone(shared),
            stream,
            machine: Mutex::new(Machine {
                connection,
                out: Outbox::default(),
                buffers,
                spare: Vec::new(),
                requests: VecDeque::new(),
                closing: false,
            }),
            jobs: (shared.workers > 0).then_some(jobs),
        });
        lock(&shared.links).insert(id, Arc::downgrade(&link));
        let queue = Arc::new(Mutex::new(queue));
        for _ in 0..shared.workers {
            let (link, queue) = (Arc::downgrade(&link), Arc::clone(&queue));
            std::thread::spawn(move || work(&link, &queue));
        }
        let shared = Arc::clone(shared);
        std::thread::spawn(move || {
            link.serve();
            lock(&shared.links).remove(&id);
        });
    }
}

/// A worker: performs requests until the connection is forgotten.
fn work(link: &Weak<Link>, queue: &Mutex<mpsc::Receiver<(TaskId, Request, Vec<u8>)>>) {
    loop {
        let job = lock(queue).recv();
        let (Ok((task, request, buffer)), Some(link)) = (job, link.upgrade()) else { return };
        link.run(task, request, buffer);
        link.perform_requests();
        link.shared.wake_others(&link);
        link.flush();
    }
}
