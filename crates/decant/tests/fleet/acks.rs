//! What the machine acknowledged, as it says so itself, outside the product.

use std::fs::{File, OpenOptions};
use std::io::{BufRead, BufReader};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::time::{Duration, Instant};

/// The machine's acknowledgements, checked as they come.
pub(crate) struct Acks {
    directory: PathBuf,
    lines: Receiver<String>,
    /// The highest line acknowledged.
    last: u64,
    /// How many lines whoever runs has.
    here: u64,
    /// How often the machine started.
    starts: u64,
    /// How many files it has read as they were written.
    right: usize,
    /// The power was cut: the machine may have seen its disk go before it ended itself.
    dying: bool,
}

impl Acks {
    /// Makes the directory that is bound into the machine: lock, FIFO, script.
    pub(crate) fn listen(below: &Path, script: &str) -> Self {
        let directory = below.join("outside");
        std::fs::create_dir(&directory).expect("a directory outside the workers");
        std::fs::set_permissions(&directory, PermissionsExt::from_mode(0o755)).expect("a mode");
        std::fs::write(directory.join("runner.sh"), script).expect("a script");
        File::create(directory.join("lock")).expect("a lock");
        let fifo = directory.join("acks");
        super::run(std::process::Command::new("mkfifo").arg(&fifo));
        std::fs::set_permissions(&fifo, PermissionsExt::from_mode(0o666)).expect("a mode");
        // Opened for writing too: the end of one machine is not the end of the FIFO.
        let reader = OpenOptions::new().read(true).write(true).open(&fifo).expect("the FIFO");
        let (sender, lines) = channel();
        std::thread::spawn(move || {
            for line in BufReader::new(reader).lines().map_while(Result::ok) {
                if sender.send(line).is_err() {
                    return;
                }
            }
        });
        Self { directory, lines, last: 0, here: 0, starts: 0, right: 0, dying: false }
    }

    pub(crate) fn directory(&self) -> &Path {
        &self.directory
    }

    /// Takes in what comes within `time`.
    pub(crate) fn wait(&mut self, time: Duration) {
        let end = Instant::now() + time;
        loop {
            match self.lines.recv_timeout(end.saturating_duration_since(Instant::now())) {
                Ok(line) => self.note(&line),
                Err(RecvTimeoutError::Timeout) => return,
                Err(RecvTimeoutError::Disconnected) => panic!("the FIFO's reader ended"),
            }
        }
    }

    /// Waits for three acknowledgements more: the machine runs, and what it acknowledged is there.
    pub(crate) fn await_progress(&mut self, when: &str) {
        // What is already said may have been said by one that is dead now.
        self.wait(Duration::ZERO);
        let wanted = self.last + 3;
        let end = Instant::now() + super::PATIENCE;
        while self.last < wanted {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{when}: no write is acknowledged after {}", self.last);
            if let Ok(line) = self.lines.recv_timeout(left) {
                self.note(&line);
            }
        }
        self.dying = false;
    }

    /// Waits until the machine was started so often.
    pub(crate) fn await_start(&mut self, starts: u64, when: &str) {
        let end = Instant::now() + super::PATIENCE;
        while self.starts < starts {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{when}: it was started {} times, not {starts}", self.starts);
            if let Ok(line) = self.lines.recv_timeout(left) {
                self.note(&line);
            }
        }
    }

    /// Files that the machine has read, and found to be what they were.
    pub(crate) fn right(&self) -> usize {
        self.right
    }

    /// Waits until it has read so many.
    pub(crate) fn await_right(&mut self, files: usize, when: &str) {
        let end = Instant::now() + super::PATIENCE;
        while self.right < files {
            let left = end.saturating_duration_since(Instant::now());
            assert!(!left.is_zero(), "{when}: {} files of {files} were read and right", self.right);
            if let Ok(line) = self.lines.recv_timeout(left) {
                self.note(&line);
            }
        }
    }

    /// Makes an empty file outside, for the machine to see.
    pub(crate) fn touch_outside(&self, name: &str) {
        File::create(self.directory.join(name)).expect("a file outside the workers");
    }

    fn note(&mut self, line: &str) {
        let (word, number) = line.split_once(' ').unwrap_or((line, ""));
        match (word, number.parse::<u64>()) {
            ("start", Ok(length)) => {
                // One line may have been written and not acknowledged when it was stopped.
                let (low, high) = (self.last, self.here + 1);
                assert!((low..=high).contains(&length), "{length} lines are there, {low} were acknowledged");
                self.here = length;
                // What is read from a disk that is gone is what the kernel remembers of it.
                if !self.dying {
                    self.last = length;
                }
                self.starts += 1;
            }
            ("ack", Ok(number)) => {
                assert_eq!(number, self.here + 1, "acknowledged out of order");
                (self.here, self.last) = (number, number);
            }
            ("right", Ok(_)) => self.right += 1,
            // Not acknowledged, so nothing is lost; without a power cut no machine may ever see an error.
            ("failed", _) if self.dying => {}
            _ => panic!("the machine says: {line}"),
        }
    }

    /// Until it makes progress again the machine may report a write that failed: its shim may start it on a disk that is gone.
    pub(crate) fn expect_power_cut(&mut self) {
        self.dying = true;
    }

    /// Lines acknowledged and starts so far.
    pub(crate) fn totals(&mut self) -> (u64, u64) {
        self.wait(Duration::ZERO);
        (self.last, self.starts)
    }
}
