//! The volume process as its keeper sees it: started, asked, reaped, started again.

use std::collections::HashMap;
use std::fs::File;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::process::{Child, Command, Stdio};
use std::sync::mpsc::{Receiver, Sender, channel};
use std::sync::{Mutex, PoisonError};

use decant_dataplane::Failure;

use crate::control::{Lines, Numbered, VolumeReply, VolumeRequest, VolumeStart, send_descriptors, send_line};

/// What a volume process answered, or why it could not do it.
pub(super) type Answer = Result<VolumeReply, Failure>;

struct Waiting {
    request: VolumeRequest,
    reply: Sender<Answer>,
}

/// A volume process that can be asked.
pub(super) struct Link {
    stream: UnixStream,
    /// Requests without an answer; `None` when the process is gone.
    waiting: Mutex<Option<Requests>>,
}

#[derive(Default)]
struct Requests {
    last: u64,
    by_number: HashMap<u64, Waiting>,
}

impl Link {
    /// Sends `request`. The answer comes through the channel; a channel that ends without one means that the process died.
    pub(super) fn send(&self, request: VolumeRequest) -> Receiver<Answer> {
        let (reply, answer) = channel();
        let mut waiting = self.waiting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(requests) = &mut *waiting {
            requests.last += 1;
            let message = Numbered { number: requests.last, body: &request };
            // A process that died before it read this is noticed by its reader, which drops the channel.
            let _ = send_line(&self.stream, &message);
            requests.by_number.insert(message.number, Waiting { request, reply });
        }
        answer
    }

    fn take(&self, number: u64) -> Option<Waiting> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner).as_mut()?.by_number.remove(&number)
    }

    /// Tells the process to end: it does when nobody can talk to it any more.
    pub(super) fn hang_up(&self) {
        let _ = self.stream.shutdown(std::net::Shutdown::Both);
    }
}

/// A volume process that was started.
pub(super) struct Process {
    child: Child,
    stream: UnixStream,
    lines: Lines<UnixStream>,
}

impl Process {
    /// Starts one and hands it its descriptors and its work. `again`: it follows a predecessor that died.
    pub(super) fn spawn(
        start: &VolumeStart,
        key: BorrowedFd<'_>,
        fuse: Option<&OwnedFd>,
        again: bool,
    ) -> std::io::Result<Self> {
        let (ours, theirs) = UnixStream::pair()?;
        let log = open_log(start)?;
        let mut command = Command::new(&start.site.exe);
        command
            // The flag tells this process from the command that makes and lists volumes.
            .args(["volume", "--process", start.site.worker.as_str(), start.volume.as_str()])
            .stdin(OwnedFd::from(theirs))
            .stdout(Stdio::null())
            .stderr(log);
        if again {
            // A crash that a test asked for has happened.
            command.env_remove("DECANT_CRASH");
        }
        let child = command.spawn()?;
        // From here on the child is reaped whatever happens.
        let process = Self { child, lines: Lines::new(ours.try_clone()?), stream: ours };
        let descriptors: Vec<_> = [Some(key), fuse.map(AsFd::as_fd)].into_iter().flatten().collect();
        send_descriptors(&process.stream, &descriptors)?;
        send_line(&process.stream, &Numbered { number: 0, body: start })?;
        Ok(process)
    }

    pub(super) fn pid(&self) -> u32 {
        self.child.id()
    }

    /// The answer to the start; `None` if it died first.
    pub(super) fn started(&mut self) -> Option<Answer> {
        self.lines.receive::<Numbered<Answer>>().ok().flatten().map(|answer| answer.body)
    }

    pub(super) fn link(&self) -> std::io::Result<Link> {
        Ok(Link { stream: self.stream.try_clone()?, waiting: Mutex::new(Some(Requests::default())) })
    }

    /// Hands answers to those who wait until the process is gone. `done` is told of each request that succeeded, before its
    /// sender is: what a successor must know is known before anybody acts upon it.
    pub(super) fn serve(&mut self, link: &Link, done: impl Fn(&VolumeRequest, &VolumeReply)) {
        while let Ok(Some(answer)) = self.lines.receive::<Numbered<Answer>>() {
            let Some(waiting) = link.take(answer.number) else { continue };
            if let Ok(reply) = &answer.body {
                done(&waiting.request, reply);
            }
            let _ = waiting.reply.send(answer.body);
        }
        link.waiting.lock().unwrap_or_else(PoisonError::into_inner).take();
    }

    /// Waits for its end; its descriptors are closed then, and its writes over or never to come.
    pub(super) fn reap(mut self) -> String {
        // It closed its socket, so it is of no use even if it lives.
        let _ = self.child.kill();
        match self.child.wait() {
            Ok(status) => status.to_string(),
            Err(error) => error.to_string(),
        }
    }
}

fn open_log(start: &VolumeStart) -> std::io::Result<File> {
    File::options().create(true).append(true).open(start.site.paths(&start.volume).log("volume"))
}
