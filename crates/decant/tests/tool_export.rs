//! `decant export` from outside: what it serves, what it refuses, and how it ends.

mod tool;

use std::os::unix::fs::MetadataExt;
use std::os::unix::net::UnixDatagram;
use std::path::Path;
use std::process::Command;

use tool::{PATIENCE, Tool, decant, directory, disk, patterned, run, succeed, text};

const MIB: u64 = 1 << 20;

fn path(path: &Path) -> &str {
    path.to_str().expect("text")
}

/// Exit status and what was said.
fn refused(arguments: &[&str]) -> (i32, String) {
    // Were it not refused, it would serve for ever.
    let output = run(20, env!("CARGO_BIN_EXE_decant"), arguments);
    (output.status.code().expect("an exit status"), text(&output))
}

#[track_caller]
fn assert_refused(arguments: &[&str], status: i32, words: &str) {
    let (found, said) = refused(arguments);
    assert!(found == status && said.contains(words), "{arguments:?}: exit status {found}: {said}");
}

#[test]
fn a_file_is_read_and_written_over_nbd_and_ends_whole() {
    let directory = directory();
    let source = patterned(directory.path(), "disk", 16 * MIB);
    let original = std::fs::read(&source).expect("the disk");
    let socket = format!("unix:{}", path(&directory.path().join("s")));
    let tool = Tool::start(&["export", path(&source), "--nbd", &socket]);
    let uri = tool.fact("uri");
    let copy = directory.path().join("copy");
    succeed(30, "nbdcopy", &[&uri, path(&copy)]);
    assert!(std::fs::read(&copy).expect("the copy") == original);
    let script = ["write -P 0xab 1M 1M", "discard 4M 4M", "write -z -u 8M 1M", "flush", "read -P 0 4M 4M"];
    let commands = script.iter().flat_map(|command| ["-c", command]);
    let arguments: Vec<&str> = ["-f", "raw"].into_iter().chain(commands).chain([uri.as_str()]).collect();
    let said = succeed(30, "qemu-io", &arguments);
    assert!(!said.contains("rror") && !said.contains("failed"), "{said}");
    assert_eq!(tool.end(), Some(0));
    let found = std::fs::read(&source).expect("the disk");
    assert!(found[MIB as usize..2 * MIB as usize].iter().all(|byte| *byte == 0xab));
    assert!(found[4 * MIB as usize..8 * MIB as usize].iter().all(|byte| *byte == 0));
    assert!(found[9 * MIB as usize..] == original[9 * MIB as usize..]);
    let allocated = source.metadata().expect("the disk").blocks() * 512;
    assert!(allocated < 12 * MIB, "trim punches holes: {allocated} bytes are allocated");
    assert!(!directory.path().join("s").exists(), "the socket is removed");
}

#[test]
fn what_is_in_use_is_refused_and_readers_share() {
    let directory = directory();
    let source = disk(directory.path(), "disk", MIB);
    let sockets = ["a", "b", "c"].map(|name| format!("unix:{}", path(&directory.path().join(name))));
    let writer = Tool::start(&["export", path(&source), "--nbd", &sockets[0]]);
    for more in [&[][..], &["--read-only"]] {
        let arguments = [&["export", path(&source), "--nbd", &sockets[1]], more].concat();
        assert_refused(&arguments, 3, "is in use: another process has it open for writing");
    }
    assert_eq!(writer.end(), Some(0));
    let _readers =
        [0, 1].map(|at: usize| Tool::start(&["export", path(&source), "--nbd", &sockets[at], "--read-only"]));
    assert_refused(&["export", path(&source), "--nbd", &sockets[2]], 3, "most likely a decant");
    assert_refused(&["export", path(&source), "--nbd", &sockets[0], "--read-only"], 1, "cannot listen on");
    let said = refused(&["export", path(&source), "--nbd", &sockets[2], "-o", "json"]).1;
    assert!(said.contains(r#""code":"blocked""#), "{said}");
}

#[test]
fn misuse_is_told_and_leaves_nothing() {
    let directory = directory();
    let empty = disk(directory.path(), "empty", 0);
    let odd = disk(directory.path(), "odd", 1000);
    let good = disk(directory.path(), "good", MIB);
    let file = disk(directory.path(), "file", 1);
    let not_a_socket = format!("unix:{}", path(&file));
    for (arguments, status, words) in [
        (vec![path(&empty), "--nbd", "127.0.0.1:0"], 2, "is empty"),
        (vec![path(&odd), "--iscsi", "127.0.0.1:0"], 2, "no whole number of 512-byte blocks"),
        (vec![path(directory.path()), "--nbd", "127.0.0.1:0"], 2, "neither a regular file nor a block device"),
        (vec!["/nowhere/at/all", "--nbd", "127.0.0.1:0"], 1, "No such file"),
        (vec![path(&good), "--nbd", &not_a_socket], 1, "there is a file of that name"),
        (vec![path(&good), "--iscsi", "127.0.0.1:0", "--name", "Disk"], 2, "no iSCSI name"),
        (vec![path(&good), "--iscsi", "127.0.0.1:0", "--chap", path(&file)], 2, "others than its owner may read it"),
        (vec![path(&good), "--nbd", "127.0.0.1:0", "--tls", path(directory.path())], 2, "no NAME.pem"),
        (vec![path(&good), "--iscsi", "127.0.0.1:0", "--nbd", "127.0.0.1:0"], 2, "cannot be used with"),
        (vec![path(&good), "--nbd", "127.0.0.1:0", "--chap", "x"], 2, "cannot be used with"),
        (vec![path(&good)], 2, "required"),
    ] {
        assert_refused(&[&["export"], &arguments[..]].concat(), status, words);
    }
    assert!(file.exists() && std::fs::read_dir(directory.path()).expect("it is there").count() == 4);
}

#[test]
fn systemd_is_told_of_the_beginning_and_the_end() {
    let directory = directory();
    let source = disk(directory.path(), "disk", MIB);
    let notified = UnixDatagram::bind(directory.path().join("notify")).expect("a socket");
    notified.set_read_timeout(Some(PATIENCE)).expect("a timeout");
    let hear = || {
        let mut buffer = [0; 64];
        let count = notified.recv(&mut buffer).expect("a word");
        String::from_utf8_lossy(&buffer[..count]).into_owned()
    };
    let mut command = decant(&["export", path(&source), "--nbd", "127.0.0.1:0", "-o", "json"]);
    let tool = Tool::run(command.env("NOTIFY_SOCKET", directory.path().join("notify")));
    assert_eq!(hear(), "READY=1");
    assert_eq!(tool.end(), Some(0));
    assert_eq!(hear(), "STOPPING=1");
}

/// A loop device on a file, detached when it is dropped; `None` where there can be none.
struct Loop(String);

impl Loop {
    fn new(test: &str, file: &Path) -> Option<Self> {
        let output =
            Command::new("losetup").args(["--show", "-f", path(file)]).output().expect("losetup of util-linux");
        if !output.status.success() {
            println!("SKIP {test}: no loop device can be made: {}", text(&output).trim());
            return None;
        }
        Some(Self(text(&output).trim().to_owned()))
    }
}

impl Drop for Loop {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["-d", &self.0]).status();
    }
}

#[test]
fn a_block_device_is_served_and_one_in_use_is_not() {
    let directory = directory();
    let file = patterned(directory.path(), "disk", 8 * MIB);
    let Some(device) = Loop::new("a_block_device_is_served_and_one_in_use_is_not", &file) else { return };
    let socket = format!("unix:{}", path(&directory.path().join("s")));
    assert_refused(&["export", path(&file), "--nbd", &socket], 3, &format!("the loop device {} is on it", device.0));
    let tool = Tool::start(&["export", &device.0, "--nbd", &socket]);
    let mounted = run(10, "mkfs.ext4", &["-q", "-F", &device.0]);
    assert!(!mounted.status.success(), "the device is claimed: {}", text(&mounted));
    let uri = tool.fact("uri");
    let said =
        succeed(30, "qemu-io", &["-f", "raw", "-c", "write -P 7 0 1M", "-c", "discard 2M 1M", "-c", "flush", &uri]);
    assert!(!said.contains("rror"), "{said}");
    assert_eq!(tool.end(), Some(0));
    let found = std::fs::read(&file).expect("the disk");
    assert!(found[..MIB as usize].iter().all(|byte| *byte == 7));
    assert!(found[2 * MIB as usize..3 * MIB as usize].iter().all(|byte| *byte == 0));
    // Claimed by somebody else, as a mount does it.
    let _claim = rustix::fs::open(
        &device.0,
        rustix::fs::OFlags::RDWR | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    )
    .expect("nobody uses it");
    for more in [&[][..], &["--read-only"]] {
        assert_refused(&[&["export", &device.0, "--nbd", &socket], more].concat(), 3, "it is mounted, is swap");
    }
}

#[test]
fn after_a_failed_sync_nothing_is_acknowledged() {
    let test = "after_a_failed_sync_nothing_is_acknowledged";
    let directory = directory();
    // A device larger than what it stands on: writes are cached, and fail when they are to be kept.
    let small = directory.path().join("small");
    std::fs::create_dir(&small).expect("a directory");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=1M", "decant-test", path(&small)]).output();
    let mounted = mounted.expect("mount of util-linux");
    if !mounted.status.success() {
        return println!("SKIP {test}: no tmpfs can be mounted: {}", text(&mounted).trim());
    }
    let unmount = || Command::new("umount").args(["-l", path(&small)]).status().expect("umount of util-linux");
    let file = disk(&small, "disk", 64 * MIB);
    let Some(device) = Loop::new(test, &file) else {
        unmount();
        return;
    };
    let socket = format!("unix:{}", path(&directory.path().join("s")));
    let tool = Tool::start(&["export", &device.0, "--nbd", &socket]);
    let uri = tool.fact("uri");
    let script = ["write 0 16M", "flush", "write 0 4k", "flush", "read 0 4k"];
    let commands = script.iter().flat_map(|command| ["-c", command]);
    let arguments: Vec<&str> = ["-f", "raw", "-t", "none"].into_iter().chain(commands).chain([uri.as_str()]).collect();
    let said = text(&run(60, "qemu-io", &arguments));
    // Whether the kernel kept the 16 MiB until the flush or wrote some out sooner: from then on every write and flush fails.
    assert!(said.contains("write failed: Input/output error"), "{said}");
    let status = tool.end();
    drop(device);
    unmount();
    assert_eq!(status, Some(1), "it does not end as if all were well");
}
