//! Our server, with stock clients.

use std::sync::atomic::Ordering;

use rustix::io::Errno;

use crate::fixture::{Disk, Served, eventually, image, run, succeed};

#[test]
fn nbdinfo_sees_what_is_offered() {
    let served = Served::new(Disk::new(image(1 << 20)));
    let info = succeed("nbdinfo", &["--json", &served.uri()]);
    let info: serde_json::Value = serde_json::from_str(&info).unwrap();
    let export = &info["exports"][0];
    assert_eq!(info["structured"], true);
    assert_eq!(export["export-size"], 1 << 20);
    assert_eq!(export["contexts"], serde_json::json!(["base:allocation", "decant:crc32c"]));
    for flag in ["can_flush", "can_fua", "can_trim", "can_zero", "can_fast_zero", "can_multi_conn", "can_df"] {
        assert_eq!(export[flag], true, "{flag}");
    }
    assert_eq!(export["is_read_only"], false);
    assert_eq!(export["block_size_minimum"], 512);
    assert_eq!(export["block_size_preferred"], 4096);
    assert_eq!(export["block_size_maximum"], 32 << 20);
    let list = succeed("nbdinfo", &["--list", "--json", &served.uri()]);
    assert!(list.contains("\"export-name\": \"volume\""), "{list}");
    let map = succeed("nbdinfo", &["--map", "--json", &served.uri()]);
    let map: serde_json::Value = serde_json::from_str(&map).unwrap();
    let kinds: Vec<u64> = map.as_array().unwrap().iter().map(|run| run["type"].as_u64().unwrap()).collect();
    assert_eq!(kinds, [0, 3, 0, 3, 0, 3, 0, 3, 0, 3, 0]);
    let digests = succeed("nbdinfo", &["--map=decant:crc32c", "--json", &served.uri()]);
    let digests: serde_json::Value = serde_json::from_str(&digests).unwrap();
    assert_eq!(digests[1]["type"], crc32c::crc32c(&image(1 << 20)[4096..8192]));
    let unknown = run("nbdinfo", &[&served.uri().replace("volume", &"x".repeat(4096))]);
    assert!(!unknown.status.success());
}

#[test]
fn nbdcopy_reads_and_writes_all_of_it() {
    let bytes = image(8 << 20);
    let served = Served::new(Disk::new(bytes.clone()));
    let (file, uri) = (served.path("copy.img"), served.uri());
    let file = file.to_str().unwrap();
    succeed("nbdcopy", &["--connections=4", "--requests=16", &uri, file]);
    assert!(std::fs::read(file).unwrap() == bytes);
    // Without holes being asked for, and in requests that are cut differently.
    succeed("nbdcopy", &["--request-size=1048576", "--sparse=0", "--allocated", &uri, file]);
    assert!(std::fs::read(file).unwrap() == bytes);
    let other: Vec<u8> = bytes.iter().rev().copied().collect();
    std::fs::write(file, &other).unwrap();
    succeed("nbdcopy", &["--connections=4", "--flush", file, &uri]);
    assert!(served.disk.contents() == other);
    assert!(served.disk.flushes.load(Ordering::SeqCst) > 0);
}

#[test]
fn qemu_io_writes_trims_zeroes_and_flushes() {
    let served = Served::new(Disk::new(image(4 << 20)));
    let uri = served.uri();
    let io = |commands: &[&str]| {
        let mut arguments = vec!["-f", "raw", "-d", "unmap"];
        commands.iter().for_each(|command| arguments.extend(["-c", command]));
        arguments.push(&uri);
        let out = succeed("qemu-io", &arguments);
        assert!(!out.contains("failed") && !out.contains("Pattern verification"), "{out}");
        out
    };
    let flushes = || served.disk.flushes.load(Ordering::SeqCst);
    io(&["write -P 0xa5 0 1M", "read -P 0xa5 0 1M", "write -f -P 0x5a 1M 64k", "read -P 0x5a 1M 64k", "flush"]);
    assert!(flushes() >= 2);
    assert_eq!(served.disk.contents()[..4096], [0xa5; 4096]);
    io(&["discard 0 64k", "read -P 0 0 64k", "read -P 0xa5 64k 64k"]);
    io(&["write -z 64k 64k", "read -P 0 64k 64k", "write -z -u 128k 64k", "read -P 0 128k 64k"]);
    io(&["aio_write -P 0x11 256k 4k", "aio_write -P 0x22 260k 4k", "aio_flush", "read -P 0x22 260k 4k"]);
    let before = flushes();
    io(&["write -z -f 512k 64k", "write -P 7 3584k 512k", "read -P 7 4193792 512"]);
    assert!(flushes() > before);
    let beyond = run("qemu-io", &["-f", "raw", "-c", "read 4M 4k", &uri]);
    assert!(!beyond.status.success());
}

#[test]
fn qemu_img_compares_and_converts() {
    let bytes = image(4 << 20);
    let served = Served::new(Disk { read_only: true, ..Disk::new(bytes.clone()) });
    let (copy, qcow) = (served.path("copy.img"), served.path("copy.qcow2"));
    let (copy, qcow) = (copy.to_str().unwrap(), qcow.to_str().unwrap());
    std::fs::write(copy, &bytes).unwrap();
    let uri = served.uri();
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "raw", &uri, copy]);
    succeed("qemu-img", &["convert", "-m", "8", "-W", "-f", "raw", "-O", "qcow2", &uri, qcow]);
    succeed("qemu-img", &["compare", "-f", "raw", "-F", "qcow2", copy, qcow]);
    let map = succeed("qemu-img", &["map", "--output=json", "-f", "raw", &uri]);
    assert!(map.contains("\"data\": false"), "{map}");
    let write = run("qemu-io", &["-f", "raw", "-c", "write 0 4k", &uri]);
    assert!(!write.status.success(), "an export that is read-only stays so");
    assert!(served.disk.contents() == bytes);
}

#[test]
fn errors_of_the_medium_reach_the_client() {
    let served = Served::new(Disk::new(image(4 << 20)));
    let uri = served.uri();
    let stdout = |command: &str| {
        let output = run("qemu-io", &["-f", "raw", "-c", command, &uri]);
        String::from_utf8_lossy(&[output.stdout, output.stderr].concat()).into_owned()
    };
    *served.disk.error.lock().unwrap() = Some((1 << 20, Errno::IO));
    assert!(stdout("read 1M 4k").contains("Input/output error"));
    assert!(stdout("read 512k 1M").contains("Input/output error"), "in the middle of a read");
    assert!(stdout("read 0 1M").contains("read 1048576/1048576 bytes"), "the rest is as before");
    *served.disk.error.lock().unwrap() = Some((1 << 20, Errno::NOSPC));
    assert!(stdout("write 1M 4k").contains("No space left on device"));
    assert!(stdout("write 512k 2M").contains("No space left on device"), "in the middle of a write");
    assert!(stdout("write 0 4k").contains("wrote 4096/4096 bytes"));
}

#[test]
fn requests_are_parked_until_the_device_is_ready() {
    let bytes = image(2 << 20);
    let served = Served::new(Disk::new(bytes.clone()));
    served.disk.ready.store(false, Ordering::SeqCst);
    let (file, uri) = (served.path("copy.img"), served.uri());
    std::thread::scope(|scope| {
        let copy = scope.spawn(|| succeed("nbdcopy", &["--connections=1", &uri, file.to_str().unwrap()]));
        // The handshake works while requests wait.
        let info = succeed("nbdinfo", &["--size", &uri]);
        assert_eq!(info.trim(), "2097152");
        eventually("nbdcopy connects", || served.server.served().connections > 0);
        assert_eq!(served.server.served().bytes_read, 0);
        assert!(!copy.is_finished());
        served.disk.ready.store(true, Ordering::SeqCst);
        served.server.wake();
        copy.join().unwrap();
    });
    assert!(std::fs::read(file).unwrap() == bytes);
}
