//! The session against the kernel, with memory below it.

use std::os::fd::AsFd;
use std::os::unix::fs::FileExt;
use std::sync::Mutex;
use std::sync::mpsc;

use super::*;
use crate::loopdev::{LoopDevice, Name};

const SIZE: usize = 8 << 20;
/// Reads from here on are parked.
const PARKED: u64 = 4 << 20;

type Parked = (u64, usize, Box<dyn ReadSink>);
type Change = Box<dyn ChangeSink>;

struct Memory {
    parks: bool,
    bytes: Mutex<Vec<u8>>,
    parked: Mutex<mpsc::Sender<Parked>>,
    changes: Mutex<mpsc::Sender<Change>>,
    seen: Mutex<Vec<String>>,
}

impl Memory {
    fn new(parks: bool) -> (Arc<Self>, mpsc::Receiver<Parked>) {
        let (memory, parked, _) = Self::with_changes(parks);
        (memory, parked)
    }

    fn with_changes(parks: bool) -> (Arc<Self>, mpsc::Receiver<Parked>, mpsc::Receiver<Change>) {
        let ((parked, reads), (changes, writes)) = (mpsc::channel(), mpsc::channel());
        let memory = Self {
            parks,
            bytes: Mutex::new(vec![0; SIZE]),
            parked: Mutex::new(parked),
            changes: Mutex::new(changes),
            seen: Mutex::new(Vec::new()),
        };
        (Arc::new(memory), reads, writes)
    }
}

impl Backend for Memory {
    fn size(&self) -> u64 {
        SIZE as u64
    }

    fn read(&self, offset: u64, buffer: &mut [u8]) -> Result<Served, Errno> {
        if self.parks && (PARKED..PARKED + (2 << 20)).contains(&offset) {
            return Ok(Served::Missing);
        }
        buffer.copy_from_slice(&self.bytes.lock().unwrap()[offset as usize..][..buffer.len()]);
        Ok(Served::Done)
    }

    fn park(&self, offset: u64, length: usize, sink: Box<dyn ReadSink>) {
        self.parked.lock().unwrap().send((offset, length, sink)).unwrap();
    }

    fn write(&self, offset: u64, data: &mut [u8], later: &mut LaterChange<'_>) -> Result<Served, Errno> {
        if self.parks && (PARKED..PARKED + (2 << 20)).contains(&offset) {
            self.changes.lock().unwrap().send(later()).unwrap();
            return Ok(Served::Missing);
        }
        assert_eq!(data.as_ptr().align_offset(4096), 0, "a write arrives on a page boundary");
        self.bytes.lock().unwrap()[offset as usize..][..data.len()].copy_from_slice(data);
        Ok(Served::Done)
    }

    fn discard(&self, offset: u64, length: u64, _later: &mut LaterChange<'_>) -> Result<Served, Errno> {
        self.seen.lock().unwrap().push(format!("discard {offset}+{length}"));
        self.bytes.lock().unwrap()[offset as usize..][..length as usize].fill(0);
        Ok(Served::Done)
    }

    fn flush(&self) -> Result<(), Errno> {
        self.seen.lock().unwrap().push("flush".into());
        Ok(())
    }
}

/// The machine's mount, or why the test cannot run here.
fn mount(test: &str) -> Option<Mount> {
    match Mount::new("decant-test") {
        Ok(mount) => Some(mount),
        Err(error) => {
            println!("SKIP {test}: no FUSE here: {error}");
            None
        }
    }
}

fn open(root: &OwnedFd) -> std::fs::File {
    use rustix::fs::{Mode, OFlags};
    rustix::fs::openat(root, "volume", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).unwrap().into()
}

#[test]
fn a_loop_device_reads_writes_syncs_and_discards() {
    let Some(Mount { device, root }) = mount("a_loop_device_reads_writes_syncs_and_discards") else { return };
    let (memory, _parked) = Memory::new(false);
    let session = Session::start(Arc::new(device), memory.clone(), 3).unwrap();
    let backing = open(&root);
    let name = Name::new("test", "fuse-loop", std::path::Path::new(&std::process::id().to_string()));
    let device = LoopDevice::create(backing.as_fd(), 4096, &name).unwrap();
    drop((backing, root));
    let mounts = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
    assert!(!mounts.contains("decant-test"), "no mount table shows it");
    let found = crate::loopdev::find(|found| found == name.as_str()).unwrap();
    assert_eq!(found, [(device.path().to_owned(), name.as_str().to_owned())]);

    let block = std::fs::File::options().read(true).write(true).open(device.path()).unwrap();
    let pattern: Vec<u8> = (0..3 << 20).map(|n| (n % 251) as u8).collect();
    block.write_all_at(&pattern, 4096).unwrap();
    block.sync_all().unwrap();
    assert_eq!(memory.bytes.lock().unwrap()[4096..][..pattern.len()], pattern[..]);
    assert!(memory.seen.lock().unwrap().iter().any(|seen| seen == "flush"));
    let mut discard = std::process::Command::new("blkdiscard");
    discard.args(["-o", "8192", "-l", "65536"]).arg(device.path());
    assert!(discard.status().expect("blkdiscard, of the Debian package util-linux").success());
    assert!(memory.seen.lock().unwrap().iter().any(|seen| seen == "discard 8192+65536"));
    let mut back = vec![0; pattern.len()];
    block.read_exact_at(&mut back, 4096).unwrap();
    assert!(back[4096..][..65536].iter().all(|&byte| byte == 0));
    assert_eq!(back[4096 + 65536..], pattern[4096 + 65536..]);
    drop(block);
    drop(device.claim().unwrap());
    device.clear().unwrap();
    session.wait().unwrap();
    assert!(crate::loopdev::find(|found| found == name.as_str()).unwrap().is_empty());
}

#[test]
fn parked_reads_stall_nothing() {
    let Some(Mount { device, root }) = mount("parked_reads_stall_nothing") else { return };
    let (memory, parked) = Memory::new(true);
    let session = Session::start(Arc::new(device), memory, 2).unwrap();
    let backing = open(&root);
    let name = Name::new("test", "fuse-parked", std::path::Path::new(&std::process::id().to_string()));
    let device = LoopDevice::create(backing.as_fd(), 4096, &name).unwrap();
    drop((backing, root));

    let readers: Vec<_> = (0..90)
        .map(|n| {
            let path = device.path().to_owned();
            std::thread::spawn(move || {
                use std::os::unix::fs::OpenOptionsExt;
                let file = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(path).unwrap();
                let mut buffer = AlignedBuffer::new(4096);
                file.read_exact_at(buffer.as_mut(), PARKED + n * 4096).map(|()| buffer.as_mut()[0])
            })
        })
        .collect();
    let parked: Vec<_> = (0..90).map(|_| parked.recv().unwrap()).collect();
    let block = std::fs::File::options().read(true).write(true).open(device.path()).unwrap();
    block.write_all_at(&[7; 8192], 0).unwrap();
    block.sync_all().unwrap();
    for (offset, length, sink) in parked {
        let n = (offset - PARKED) / 4096;
        if n.is_multiple_of(2) {
            sink.complete(Ok(&vec![n as u8; length]));
        } else {
            sink.complete(Err(Errno::IO));
        }
    }
    for (n, reader) in readers.into_iter().enumerate() {
        let read = reader.join().unwrap();
        assert_eq!(read.ok(), (n % 2 == 0).then_some(n as u8), "read {n}");
    }
    drop(block);
    device.clear().unwrap();
    session.wait().unwrap();
}

/// Whoever waits for a parked read or write can be killed: otherwise he would be in D state until the origin is back.
#[test]
fn who_waits_can_be_killed() {
    use std::process::{Command, Stdio};
    let test = "who_waits_can_be_killed";
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("file");
    std::fs::write(&path, "").unwrap();
    let mounted = Mount::on_file("decant-test", "decant-test").and_then(|mount| mount.attach(&path).map(|()| mount));
    let mount = match mounted {
        Ok(mount) => mount,
        Err(error) => return println!("SKIP {test}: no FUSE here: {error}"),
    };
    let (memory, parked, changes) = Memory::with_changes(true);
    let session = Session::start_on_file(Arc::new(mount.device), memory, 2).unwrap();
    drop(mount.root);
    let dd = |words: &[String]| {
        let mut dd = Command::new("dd");
        dd.args(["bs=4096", "count=1", "conv=notrunc"]).args(words).stdin(Stdio::null()).stderr(Stdio::null());
        dd.spawn().expect("dd of coreutils")
    };
    let place = PARKED / 4096;
    let mut reader = dd(&[format!("if={}", path.display()), "of=/dev/null".into(), format!("skip={place}")]);
    let mut writer = dd(&["if=/dev/zero".into(), format!("of={}", path.display()), format!("seek={place}")]);
    let (offset, length, read) = parked.recv().unwrap();
    let change = changes.recv().unwrap();
    assert!((offset, length) == (PARKED, 4096) && read.is_wanted() && change.is_wanted());
    for child in [&mut reader, &mut writer] {
        child.kill().unwrap();
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while child.try_wait().unwrap().is_none() {
            assert!(std::time::Instant::now() < deadline, "it does not end");
            std::thread::yield_now();
        }
    }
    // What it wanted written is not, and what comes late is heard by nobody.
    assert!(!read.is_wanted() && !change.is_wanted() && !change.claim());
    read.complete(Ok(&[0; 4096]));
    change.complete(Ok(()));
    let file = std::fs::File::open(&path).unwrap();
    file.read_exact_at(&mut [0; 4096], 0).unwrap();
    drop(file);
    rustix::mount::unmount(&path, rustix::mount::UnmountFlags::DETACH).unwrap();
    session.wait().unwrap();
}
