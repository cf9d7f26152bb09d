//! `decant clone` where bytes could be lost or wrong ones served, and where it could hang: maps, destinations and origins that do
//! not belong together, an origin that is silent, and starts that fail half-way.

mod tool;

use std::fs::File;
use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use tool::{MIB, Place, Tool, decant, disk, patterned, succeed, text, wait_until};

/// Starts a clone that has to be refused: its exit status, and what was said.
fn refused(words: &[&str]) -> (i32, String) {
    let output = Command::new("timeout")
        .args(["-s", "KILL", "20", env!("CARGO_BIN_EXE_decant"), "clone"])
        .args(words)
        .output()
        .expect("timeout of coreutils");
    (output.status.code().expect("an exit status"), text(&output))
}

#[track_caller]
fn assert_refused(words: &[&str], status: i32, cause: &str) {
    let (found, said) = refused(words);
    assert!(found == status && said.contains(cause), "{words:?}: exit status {found}: {said}");
}

/// All of a clone, as its clients read it.
fn contents(place: &Place, tool: &Tool) -> Vec<u8> {
    let copy = place.path("copy");
    succeed(30, "nbdcopy", &[&tool.fact("uri"), copy.to_str().expect("text")]);
    std::fs::read(copy).expect("the copy")
}

fn signal(tool: &Tool, signal: Signal) {
    let pid = Pid::from_raw(tool.pid().cast_signed()).expect("a process");
    kill_process(pid, signal).expect("it runs");
}

fn is_silent(place: &Place) -> bool {
    place.status()["hindrance"].as_str().is_some_and(|why| why.starts_with("STALLED"))
}

#[test]
fn maps_whose_names_differ_behind_a_dot_share_nothing() {
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 8 * MIB);
    let start = |n: u32| {
        let (dest, map, serve) = (
            place.at(&format!("dest.{n}")),
            place.at(&format!("vm-101.{n}")),
            format!("unix:{}", place.at(&format!("s{n}"))),
        );
        Tool::start(&["clone", &place.at("origin"), &dest, "--meta", &map, "--serve", &serve, "--hydrate", "off"])
    };
    let disks = [start(0), start(1)];
    let mut expected = std::fs::read(origin).expect("the origin");
    for (n, tool) in disks.iter().enumerate() {
        let write = format!("write -P {} {}M 64k", n + 1, n + 1);
        succeed(20, "qemu-io", &["-f", "raw", "-c", &write, &tool.fact("uri")]);
    }
    // What is not in a map yet is in the marks only.
    disks.into_iter().for_each(Tool::kill);
    let again = start(0);
    expected[MIB as usize..][..64 << 10].fill(1);
    assert!(contents(&place, &again) == expected, "another disk's marks were believed");
    assert_eq!(again.end(), Some(0));
}

#[test]
fn another_clones_marks_are_not_believed() {
    let place = Place::new();
    patterned(place.directory.path(), "origin", 8 * MIB);
    let serve = place.serve();
    let start = |dest: &str, map: &str| {
        Tool::start(&["clone", &place.at("origin"), &place.at(dest), "--meta", &place.at(map), "--serve", &serve])
    };
    let other = start("dest2", "map2");
    succeed(20, "qemu-io", &["-f", "raw", "-c", "write -P 9 1M 64k", &other.fact("uri")]);
    other.kill();
    start("dest", "map").kill();
    std::fs::rename(place.path("map2.marks"), place.path("map.marks")).expect("they are there");
    assert_refused(
        &[&place.at("origin"), &place.at("dest"), "--meta", &place.at("map"), "--serve", &serve],
        1,
        "marks file of an unclean clone map is missing or damaged",
    );
}

#[test]
fn a_map_is_of_one_origin_and_one_destination_and_has_one_owner() {
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 4 * MIB);
    std::fs::copy(&origin, place.path("origin2")).expect("a copy");
    disk(place.directory.path(), "dest2", 4 * MIB);
    let (map, serve) = (place.at("map"), place.serve());
    let words = |origin: &str, dest: &str| {
        [place.at(origin), place.at(dest), "--meta".into(), map.clone(), "--serve".into(), serve.clone()]
    };
    let check = |origin: &str, dest: &str, cause: &str| {
        assert_refused(&words(origin, dest).each_ref().map(String::as_str), 3, cause);
    };
    let tool = place.clone(&place.at("origin"), &["--serve", &serve]);
    check("origin", "dest", "runs with the map");
    check("origin", "dest2", "runs with the map");
    place.await_filled();
    assert_eq!(tool.end(), Some(0));
    let names = || -> std::collections::BTreeSet<_> {
        let entries = std::fs::read_dir(place.directory.path()).expect("it is there");
        entries.flatten().map(|entry| entry.file_name()).collect()
    };
    let before = names();
    check("origin", "dest2", &format!("the clone's destination is {}, not {}", place.at("dest"), place.at("dest2")));
    check("origin2", "dest", &format!("the clone's origin is {}, not {}", place.at("origin"), place.at("origin2")));
    assert_eq!(before, names());
    // What only has another name is said to, once.
    std::fs::rename(place.path("dest"), place.path("moved")).expect("it is there");
    let moved = words("origin2", "moved");
    let moved: Vec<&str> = ["clone"].into_iter().chain(moved.iter().map(String::as_str)).collect();
    assert_eq!(Tool::start(&[&moved[..], &["--moved"]].concat()).end(), Some(0));
    check("origin", "moved", "the clone's origin is");
    let tool = Tool::start(&moved);
    assert!(place.ask(&["detach"]).status.success());
    assert_eq!(tool.end(), Some(0));
    // Once it is whole it is a clone of that origin still, in that destination.
    check("origin2", "dest2", "the clone's destination is");
    check("origin", "moved", "the clone's origin is");
    assert_eq!(Tool::start(&moved).end(), Some(0));
    std::fs::remove_file(place.path("map.done")).expect("it is there");
    check("origin2", "moved", "holds data and has no map");
}

#[test]
fn a_map_without_its_record_is_not_guessed_at() {
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", MIB);
    let (dest, map, serve) = (place.at("dest"), place.at("map"), place.serve());
    assert_eq!(place.clone(&place.at("origin"), &["--serve", &serve, "--hydrate", "off"]).end(), Some(0));
    let words = [origin.to_str().expect("text"), &dest, "--meta", &map, "--serve", &serve];
    std::fs::remove_file(place.path("map.origin")).expect("it is there");
    assert_refused(&words, 3, "no record of its clone");
    assert_eq!(place.clone(&place.at("origin"), &["--serve", &serve, "--moved"]).end(), Some(0));
    // An origin that was cut or grew is not the one that it was.
    File::options().write(true).open(&origin).expect("a file").set_len(2 * MIB).expect("it grows");
    assert_refused(&words, 3, "begun of one with 1048576");
    File::options().write(true).open(&origin).expect("a file").set_len(MIB).expect("it shrinks");
    // What a failed sync leaves keeps the next one from passing over it, and says where it is.
    std::fs::write(place.path("map.failed"), "syncing the image failed").expect("a file");
    assert_refused(&words, 1, &format!("remove {}.failed", map));
    std::fs::remove_file(place.path("map.failed")).expect("it is there");
    assert_eq!(place.clone(&place.at("origin"), &["--serve", &serve]).end(), Some(0));
}

/// A loop device on a file, detached when it is dropped; `None` where there can be none.
struct Loop(String);

impl Loop {
    fn new(test: &str, file: &Path) -> Option<Self> {
        let output = Command::new("losetup").args(["--show", "-f"]).arg(file).output().expect("losetup of util-linux");
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
fn a_device_that_holds_data_or_is_being_written_is_left_alone() {
    let test = "a_device_that_holds_data_or_is_being_written_is_left_alone";
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 4 * MIB);
    let disk = disk(place.directory.path(), "disk", 8 * MIB);
    let Some(device) = Loop::new(test, &disk) else { return };
    let (map, serve) = (place.at("map"), place.serve());
    let words = [origin.to_str().expect("text"), &device.0, "--meta", &map, "--serve", &serve];
    let command = [&["clone"], &words[..]].concat();
    // Somebody who neither mounts nor claims it.
    let writer = File::options().write(true).open(&device.0).expect("it is there");
    assert_refused(&words, 3, &format!("process {}", std::process::id()));
    writer.write_all_at(b"LABELONE", 8 * MIB - 512).expect("a write");
    writer.sync_all().expect("a sync");
    drop(writer);
    assert_refused(&words, 3, "holds data and has no map");
    assert!(!place.path("map").exists() && !place.path("map.origin").exists() && !place.path("map.lock").exists());
    let tool = Tool::start(&[&command[..], &["--overwrite"]].concat());
    place.await_filled();
    assert_eq!(tool.end(), Some(0));
    let found = std::fs::read(&disk).expect("the disk");
    assert!(found[..4 * MIB as usize] == std::fs::read(&origin).expect("the origin") && found.ends_with(&[0; 504]));
    // From then on it has a map.
    let again = Tool::start(&command);
    assert_eq!(again.end(), Some(0));
    // As an origin it is nobody's to mount while it is read.
    let (dest, other) = (place.at("dest"), place.at("other"));
    let reader = Tool::start(&["clone", &device.0, &dest, "--meta", &other, "--serve", &serve, "--hydrate", "off"]);
    let claimed = rustix::fs::open(
        &device.0,
        rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::EXCL | rustix::fs::OFlags::CLOEXEC,
        rustix::fs::Mode::empty(),
    );
    assert_eq!(claimed.map(drop), Err(rustix::io::Errno::BUSY));
    assert_eq!(reader.end(), Some(0));
}

#[test]
fn a_clone_whose_origin_is_silent_ends_when_it_is_told_to() {
    let place = Place::new();
    patterned(place.directory.path(), "origin", 16 * MIB);
    let source = format!("unix:{}", place.at("o"));
    let export = Tool::start(&["export", &place.at("origin"), "--nbd", &source, "--read-only"]);
    let tool = place.clone(&export.fact("uri"), &["--serve", &place.serve(), "--hydrate", "off"]);
    signal(&export, Signal::STOP);
    // Many reads at a time, each of more than one piece.
    let mut copy = Command::new("nbdcopy");
    copy.args(["--request-size=1048576", &tool.fact("uri"), "null:"]).stderr(Stdio::null());
    let mut copy = copy.spawn().expect("nbdcopy of libnbd-bin");
    wait_until("the reads wait", || is_silent(&place));
    succeed(20, "qemu-io", &["-f", "raw", "-c", "write -P 9 15M 64k", "-c", "flush", &tool.fact("uri")]);
    assert_eq!(tool.end(), Some(0));
    assert!(!copy.wait().expect("it ends").success());
    signal(&export, Signal::CONT);
}

#[test]
fn writes_at_any_byte_wait_for_the_origin_and_hold_up_nobody() {
    let test = "writes_at_any_byte_wait_for_the_origin_and_hold_up_nobody";
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return println!("SKIP {test}: needs root and /dev/fuse");
    }
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 8 * MIB);
    let source = format!("unix:{}", place.at("o"));
    let export = Tool::start(&["export", &place.at("origin"), "--nbd", &source, "--read-only"]);
    let tool = place.clone(&export.fact("uri"), &["--fuse", &place.at("file"), "--hydrate", "off"]);
    signal(&export, Signal::STOP);
    let mut expected = std::fs::read(origin).expect("the origin");
    let writers: Vec<_> = (0..12)
        .map(|n| {
            // From the middle of a sector to the middle of the next but one.
            let (at, bytes) = (MIB / 2 * n + 700, [n as u8; 1000]);
            expected[at as usize..][..1000].copy_from_slice(&bytes);
            let file = File::options().write(true).open(place.path("file")).expect("the clone");
            std::thread::spawn(move || file.write_all_at(&bytes, at))
        })
        .collect();
    wait_until("they wait", || is_silent(&place));
    let file = place.at("file");
    // No fsync: the kernel begins none while a write is under way (fuse_fsync takes the inode's lock).
    let dd = |words: &[&str]| succeed(20, "dd", &[&["bs=4096", "count=1", "conv=notrunc"], words].concat());
    dd(&["if=/dev/zero", &format!("of={file}"), "seek=1700"]);
    succeed(20, "dd", &[&format!("if={file}"), "of=/dev/null", "bs=4096", "count=1", "skip=1700"]);
    expected[1700 * 4096..][..4096].fill(0);
    signal(&export, Signal::CONT);
    writers.into_iter().for_each(|writer| writer.join().expect("no panic").expect("a write"));
    assert!(std::fs::read(place.path("file")).expect("all of it") == expected);
    assert_eq!(tool.end(), Some(0));
}

#[test]
fn a_control_socket_that_cannot_be_had_leaves_nothing() {
    let place = Place::new();
    patterned(place.directory.path(), "origin", MIB);
    let (origin, dest, map, serve) = (place.at("origin"), place.at("dest"), place.at("map"), place.serve());
    let start = [origin.as_str(), &dest, "--meta", &map, "--serve", &serve];
    let count = || std::fs::read_dir(place.directory.path()).expect("it is there").count();
    let before = count();
    let long = place.at(&"x".repeat(120));
    assert_refused(&[origin.as_str(), &dest, "--meta", &long, "--serve", &serve], 1, "a socket's has at most 107");
    assert_eq!(count(), before);
    std::fs::write(place.path("map.sock"), "mine").expect("a file");
    assert_refused(&start, 1, "there is a file of that name");
    assert_eq!((std::fs::read(place.path("map.sock")).expect("it is there"), count()), (b"mine".to_vec(), before + 1));
    let _somebody = std::os::unix::net::UnixListener::bind(place.path("live")).expect("a socket");
    assert_refused(&[&start[..], &["--control", &place.at("live")]].concat(), 3, "somebody answers at");
    let control = place.at("c");
    let tool = place.clone(&origin, &["--serve", &serve, "--control", &control]);
    assert_eq!(tool.fact("control"), control);
    let status = decant(&["clone", "status", "--control", &control]).output().expect("decant runs");
    assert!(status.status.success(), "{}", text(&status));
    assert_eq!(tool.end(), Some(0));
}

#[test]
fn a_limit_holds_from_the_first_moment_of_a_clone_that_goes_on() {
    let place = Place::new();
    patterned(place.directory.path(), "origin", 16 * MIB + 512);
    let tool = place.clone(&place.at("origin"), &["--serve", &place.serve(), "--hydrate", "off"]);
    assert_eq!(place.status()["bytes_total"], 16 * MIB + 512, "a size that is no number of blocks is told as it is");
    assert_eq!(tool.end(), Some(0));
    let tool = place.clone(&place.at("origin"), &["--serve", &place.serve(), "--limit", "1"]);
    let status = place.status();
    assert!(status["bytes_fetched"].as_u64() <= Some(64 << 10), "{status}");
    assert_eq!(tool.end(), Some(0));
}

#[test]
fn a_map_without_room_is_refused_before_anything_is_made() {
    let test = "a_map_without_room_is_refused_before_anything_is_made";
    let place = Place::new();
    disk(place.directory.path(), "origin", 1 << 30);
    let small = place.path("small");
    std::fs::create_dir(&small).expect("a directory");
    let mounted = Command::new("mount").args(["-t", "tmpfs", "-o", "size=256k", "decant-test"]).arg(&small).output();
    let mounted = mounted.expect("mount of util-linux");
    if !mounted.status.success() {
        return println!("SKIP {test}: no tmpfs can be mounted: {}", text(&mounted).trim());
    }
    let map = place.at("small/map");
    let (found, said) = refused(&[&place.at("origin"), &place.at("dest"), "--meta", &map, "--serve", &place.serve()]);
    let left = std::fs::read_dir(&small).expect("it is there").count();
    assert!(Command::new("umount").args(["-l"]).arg(&small).status().expect("umount of util-linux").success());
    assert!(found == 3 && said.contains("the map needs"), "exit status {found}: {said}");
    assert!(left == 0 && !place.path("dest").exists());
}
