//! The log of a machine's program: `log`, and `log.1` … `log.3` before it, each of at most 4 MiB.

use std::fs::File;
use std::io::{self, Write};
use std::os::fd::OwnedFd;

use rustix::fs::{Mode, OFlags, openat, renameat};

/// A file that has grown to this is put aside.
const MAX_BYTES: u64 = 4 << 20;
/// Files kept besides the current one.
const OLDER: u32 = 3;

pub(super) struct Log {
    directory: OwnedFd,
    file: File,
    bytes: u64,
    /// What could not be written since the last that could.
    lost: u64,
}

impl Log {
    /// Opens `log` in `directory`, which may be one that the caller's mount namespace no longer shows.
    pub(super) fn open(directory: OwnedFd) -> io::Result<Self> {
        let file = Self::file(&directory)?;
        let bytes = file.metadata()?.len();
        Ok(Self { directory, file, bytes, lost: 0 })
    }

    fn file(directory: &OwnedFd) -> io::Result<File> {
        let flags = OFlags::CREATE | OFlags::APPEND | OFlags::WRONLY | OFlags::CLOEXEC;
        Ok(File::from(openat(directory, "log", flags, Mode::from_raw_mode(0o640))?))
    }

    /// Appends. A full disk loses lines, counted, and never holds the program up.
    pub(super) fn write(&mut self, bytes: &[u8]) {
        if self.bytes >= MAX_BYTES && self.rotate().is_err() {
            // Going on in the same file would let it grow without bound.
            self.lost += bytes.len() as u64;
            return;
        }
        if self.lost > 0 {
            let note = format!("\ndecant: {} bytes of log were lost\n", self.lost);
            if self.file.write_all(note.as_bytes()).is_err() {
                self.lost += bytes.len() as u64;
                return;
            }
            self.lost = 0;
        }
        match self.file.write_all(bytes) {
            Ok(()) => self.bytes += bytes.len() as u64,
            Err(_) => self.lost += bytes.len() as u64,
        }
    }

    /// A line of the shim's own.
    pub(super) fn note(&mut self, text: &str) {
        self.write(format!("decant: {text}\n").as_bytes());
    }

    fn rotate(&mut self) -> io::Result<()> {
        for n in (0..OLDER).rev() {
            let from = if n == 0 { "log".to_owned() } else { format!("log.{n}") };
            match renameat(&self.directory, &from, &self.directory, format!("log.{}", n + 1)) {
                Ok(()) | Err(rustix::io::Errno::NOENT) => {}
                Err(error) => return Err(error.into()),
            }
        }
        self.file = Self::file(&self.directory)?;
        self.bytes = 0;
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_log_is_bounded_and_keeps_the_latest() {
        let directory = tempfile::tempdir().expect("a directory");
        let open = || Log::open(File::open(directory.path()).expect("opened").into()).expect("a log");
        let mut log = open();
        let line = vec![b'x'; 1 << 20];
        for _ in 0..30 {
            log.write(&line);
        }
        // A new shim goes on where the last one was.
        drop(log);
        let mut log = open();
        log.note("the end");
        let mut files: Vec<_> = std::fs::read_dir(directory.path())
            .expect("a list")
            .map(|entry| entry.expect("an entry").file_name().into_string().expect("a name"))
            .collect();
        files.sort();
        assert_eq!(files, ["log", "log.1", "log.2", "log.3"]);
        let bytes = |name: &str| std::fs::read(directory.path().join(name)).expect("a file");
        assert!(files.iter().all(|name| bytes(name).len() as u64 <= MAX_BYTES + (1 << 20)));
        assert!(bytes("log").ends_with(b"decant: the end\n"));
    }
}
