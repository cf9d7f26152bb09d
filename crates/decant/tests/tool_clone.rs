//! `decant clone` from outside: origins, destinations, fronts, its control socket, and kills at any time.

mod tool;

use std::fs::File;
use std::os::unix::fs::{FileExt, MetadataExt, PermissionsExt};
use std::path::Path;

use serde_json::Value;
use tool::{MIB, Place, Tool, decant, disk, patterned, run, succeed, text};

fn same(a: &Path, b: &Path) {
    assert!(std::fs::read(a).expect("a file") == std::fs::read(b).expect("a file"), "{} differs", b.display());
}

#[test]
fn a_file_is_cloned_holes_and_all_and_detached() {
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 8 * MIB);
    File::options().write(true).open(&origin).expect("a file").set_len(64 * MIB).expect("a hole");
    let tool = place.clone(&place.at("origin"), &["--serve", &place.serve(), "--hydrate", "off"]);
    let uri = tool.fact("uri");
    let status = place.status();
    for (field, value) in
        [("state", Value::from("paused")), ("bytes_total", (64 * MIB).into()), ("origin", place.at("origin").into())]
    {
        assert_eq!(status[field], value, "{field}: {status}");
    }
    assert!(status["hindrance"].as_str().is_some_and(|why| why.starts_with("PAUSED")), "{status}");
    succeed(20, "qemu-io", &["-f", "raw", "-c", "read 1M 64k", "-c", "write -P 9 2M 64k", "-c", "flush", &uri]);
    let status = place.status();
    assert!(
        status["bytes_missing"].as_u64() > Some(50 * MIB) && status["bytes_fetched"].as_u64() >= Some(64 << 10),
        "{status}"
    );
    let refused = place.ask(&["detach"]);
    assert!(
        refused.status.code() == Some(3) && text(&refused).contains("still only at the origin"),
        "{}",
        text(&refused)
    );
    assert!(place.ask(&["limit", "200M"]).status.success() && place.ask(&["resume"]).status.success());
    place.await_filled();
    assert_eq!(place.ask(&["limit", "none"]).status.code(), Some(0));
    assert_eq!(place.status()["state"], "filled");
    let detached = place.ask(&["detach"]);
    assert!(detached.status.success(), "{}", text(&detached));
    let status = place.status();
    assert_eq!((&status["state"], &status["origin"]), (&"whole".into(), &Value::Null));
    // What it took to get there is told for as long as it runs.
    assert!(status["bytes_written"] == 64 << 10 && status["bytes_fetched"].as_u64() >= Some(7 * MIB), "{status}");
    assert!(!place.path("map").exists() && place.path("map.done").exists() && !place.path("map.origin").exists());
    // The origin is let go: somebody else may write it.
    File::options().write(true).open(&origin).expect("a file").write_all_at(b"gone", 0).expect("a write");
    succeed(20, "qemu-io", &["-f", "raw", "-c", "read -P 9 2M 64k", "-c", "write -P 8 3M 4k", "-c", "flush", &uri]);
    assert_eq!(tool.end(), Some(0));
    assert!(!place.path("s").exists() && !place.path("map.sock").exists());
    let dest = place.path("dest").metadata().expect("the destination");
    assert!(dest.len() == 64 * MIB && dest.blocks() * 512 < 12 * MIB, "holes stay holes: {} blocks", dest.blocks());
    // Started again with the same words it serves what it has; the origin may be gone for good.
    std::fs::remove_file(&origin).expect("it is there");
    let again = place.clone(&place.at("origin"), &["--serve", &place.serve()]);
    succeed(20, "qemu-io", &["-f", "raw", "-c", "read -P 9 2M 64k", "-c", "read -P 8 3M 4k", &again.fact("uri")]);
    assert_eq!(place.status()["state"], "whole");
    assert_eq!(again.end(), Some(0));
}

#[test]
fn kills_lose_nothing_that_was_acknowledged() {
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 32 * MIB);
    let source = format!("unix:{}", place.at("o"));
    let export = Tool::start(&["export", &place.at("origin"), "--nbd", &source, "--read-only"]);
    let mut expected = std::fs::read(&origin).expect("the origin");
    for round in 0..6u8 {
        let tool = place.clone(&export.fact("uri"), &["--serve", &place.serve(), "--limit", "4M"]);
        let at = MIB * (3 + 4 * u64::from(round));
        let (write, discard) = (format!("write -P {} {at} 96k", round + 1), format!("discard {} 64k", at + MIB));
        let said =
            succeed(20, "qemu-io", &["-f", "raw", "-c", &write, "-c", &discard, "-c", "flush", &tool.fact("uri")]);
        assert!(!said.contains("rror"), "{said}");
        expected[at as usize..][..96 << 10].fill(round + 1);
        expected[(at + MIB) as usize..][..64 << 10].fill(0);
        tool.kill();
    }
    let tool = place.clone(&export.fact("uri"), &["--serve", &place.serve()]);
    place.await_filled();
    assert!(place.ask(&["detach"]).status.success());
    assert_eq!(tool.end(), Some(0));
    assert_eq!(export.end(), Some(0));
    assert!(std::fs::read(place.path("dest")).expect("the destination") == expected);
}

#[test]
fn a_clone_over_tls_of_an_export_over_tls() {
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 8 * MIB);
    for words in [
        vec!["ca", "init", "--dir", "CA"],
        vec!["ca", "issue", "here", "--ca", "CA", "--dir", "CA"],
        vec!["ca", "issue", "there", "--ca", "CA", "--dir", "CA"],
    ] {
        let output = decant(&words).current_dir(place.directory.path()).output().expect("decant runs");
        if words[1] == "init" && !output.status.success() {
            std::fs::create_dir(place.path("CA")).expect("a directory");
            let output = decant(&words).current_dir(place.directory.path()).output().expect("decant runs");
            assert!(output.status.success(), "{}", text(&output));
            continue;
        }
        assert!(output.status.success(), "{}", text(&output));
    }
    let files = |name: &str| {
        ["ca.pem", &format!("{name}.pem"), &format!("{name}.key")].map(|file| place.at(&format!("CA/{file}"))).join(",")
    };
    let export =
        Tool::start(&["export", &place.at("origin"), "--nbd", "127.0.0.1:0", "--tls", &files("there"), "--name", "o"]);
    let uri = export.fact("uri");
    assert!(uri.starts_with("nbds://"), "{uri}");
    let plain = run(10, "nbdinfo", &[&uri.replace("nbds", "nbd")]);
    assert!(!plain.status.success(), "{}", text(&plain));
    let tool = place.clone(&uri, &["--serve", &place.serve(), "--tls", &files("here")]);
    place.await_filled();
    assert_eq!(tool.end(), Some(0));
    same(&origin, &place.path("dest"));
    // A certificate that is not the one that was named.
    let (dest, map, serve, files) = (place.at("dest2"), place.at("map2"), place.serve(), files("here"));
    let wrong = "00".repeat(32);
    let words = ["clone", &uri, &dest, "--meta", &map, "--serve", &serve, "--tls", &files, "--peer", &wrong];
    let refused = decant(&words).output().expect("decant runs");
    assert!(refused.status.code() == Some(1) && text(&refused).contains("fingerprint"), "{}", text(&refused));
    assert!(!place.path("dest2").exists() && !place.path("map2").exists());
}

#[test]
fn a_clone_of_a_disk_over_iscsi_that_asks_for_a_secret() {
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 8 * MIB);
    File::options().write(true).open(&origin).expect("a file").set_len(24 * MIB).expect("a hole");
    std::fs::write(
        place.path("chap"),
        "username=u\npassword=twelve bytes of it\nusername_in=t\npassword_in=and twelve of its own",
    )
    .expect("a file");
    std::fs::set_permissions(place.path("chap"), PermissionsExt::from_mode(0o600)).expect("its owner's");
    let chap = place.at("chap");
    let export =
        Tool::start(&["export", &place.at("origin"), "--iscsi", "127.0.0.1:0", "--chap", &chap, "--read-only"]);
    // By its name, which is looked up for each connection.
    let uri = export.fact("uri").replace("127.0.0.1", "localhost");
    let (dest, map, serve) = (place.at("dest"), place.at("map"), place.serve());
    let refused = decant(&["clone", &uri, &dest, "--meta", &map, "--serve", &serve]).output().expect("decant runs");
    assert!(refused.status.code() == Some(1) && !place.path("dest").exists(), "{}", text(&refused));
    let tool = place.clone(&uri, &["--serve", &serve, "--chap", &chap]);
    succeed(20, "qemu-io", &["-f", "raw", "-c", "read 4M 64k", &tool.fact("uri")]);
    assert_eq!(place.status()["origin"], *uri);
    place.await_filled();
    assert!(place.ask(&["detach"]).status.success());
    assert_eq!(export.end(), Some(0));
    assert_eq!(tool.end(), Some(0));
    same(&origin, &place.path("dest"));
    assert!(place.path("dest").metadata().expect("it").blocks() * 512 < 12 * MIB, "holes stay holes");
    // From now on the same command needs neither the origin nor what was shown to it.
    std::fs::remove_file(chap).expect("it is there");
    let again = place.clone(&uri, &["--serve", &serve, "--chap", &place.at("chap")]);
    assert_eq!(place.status()["state"], "whole");
    assert_eq!(again.end(), Some(0));
}

#[test]
fn a_clone_is_a_file_while_it_fills() {
    let place = Place::new();
    let origin = patterned(place.directory.path(), "origin", 8 * MIB);
    let file = place.at("file");
    let (dest, map) = (place.at("dest"), place.at("map"));
    let words =
        ["clone", &place.at("origin"), &dest, "--meta", &map, "--fuse", &file, "--hydrate", "off", "-o", "json"];
    if !rustix::process::geteuid().is_root() || !Path::new("/dev/fuse").exists() {
        return println!("SKIP a_clone_is_a_file_while_it_fills: needs root and /dev/fuse");
    }
    let tool = Tool::run(&mut decant(&words));
    let mut expected = std::fs::read(&origin).expect("the origin");
    {
        let clone = File::options().read(true).write(true).open(&file).expect("the clone");
        assert_eq!(clone.metadata().expect("attributes").len(), 8 * MIB);
        let mut bytes = vec![0; 1000];
        clone.read_exact_at(&mut bytes, 777).expect("a read at any byte");
        assert!(bytes == expected[777..1777]);
        clone.write_all_at(b"ragged", MIB + 5).expect("a write at any byte");
        expected[MIB as usize + 5..][..6].copy_from_slice(b"ragged");
        clone.write_all_at(&[3; 8192], 2 * MIB).expect("a write");
        expected[2 * MIB as usize..][..8192].fill(3);
        rustix::fs::fallocate(
            &clone,
            rustix::fs::FallocateFlags::PUNCH_HOLE | rustix::fs::FallocateFlags::KEEP_SIZE,
            3 * MIB + 100,
            70_000,
        )
        .expect("a hole");
        expected[3 * MIB as usize + 100..][..70_000].fill(0);
        clone.sync_all().expect("a sync");
    }
    assert!(std::fs::read(&file).expect("all of it") == expected, "unlike what was written");
    // A killed one leaves a dead mount, which the next start puts away.
    tool.kill();
    let again = Tool::run(&mut decant(&words));
    assert!(std::fs::read(&file).expect("all of it") == expected, "unlike what was written before the kill");
    assert_eq!(again.end(), Some(0));
    let below = place.path("file").metadata().expect("the file below");
    assert_eq!(below.len(), 0, "unmounted; what the killed one made to be mounted on is an empty file");
    assert!(std::fs::read(place.path("dest")).expect("the destination") == expected);
}

#[test]
fn misuse_is_told_and_leaves_nothing() {
    let place = Place::new();
    patterned(place.directory.path(), "origin", MIB);
    patterned(place.directory.path(), "full", MIB);
    disk(place.directory.path(), "odd", 1000);
    std::fs::write(place.path("text"), "no map").expect("a file");
    let (origin, dest, map, serve) = (place.at("origin"), place.at("dest"), place.at("map"), place.serve());
    let (full, odd, note) = (place.at("full"), place.at("odd"), place.at("text"));
    let nowhere = format!("nbd+unix:///?socket={}", place.at("nobody"));
    let before = std::fs::read_dir(place.directory.path()).expect("it is there").count();
    for (words, status, cause) in [
        ([origin.as_str(), &full, &map, &serve], 3, "holds data and has no map"),
        ([&nowhere, &dest, &map, &serve], 1, "no session with the origin"),
        (["http://x/y", &dest, &map, &serve], 2, "is not spoken"),
        (["nbds://127.0.0.1/x", &dest, &map, &serve], 2, "belong together"),
        ([&origin, &dest, &map, "tcp:1"], 2, "is no unix:PATH"),
        ([&origin, &dest, &dest, &serve], 2, "the same file"),
        ([&origin, &dest, &note, &serve], 1, "no map of a clone"),
        ([&odd, &dest, &map, &serve], 2, "cannot be cloned"),
        ([&origin, &origin, &map, &serve], 3, "is in use"),
        ([&origin, "/dev/null", &map, &serve], 2, "neither a regular file nor a block device"),
        ([&origin, &dest, "/nowhere/map", &serve], 1, "map"),
        ([&origin, &dest, &map, "unix:/nowhere/s"], 1, "cannot listen on"),
        ([&origin, &dest, &map, &format!("unix:{note}")], 1, "there is a file of that name"),
    ] {
        let [origin, dest, map, serve] = words;
        let output = decant(&["clone", origin, dest, "--meta", map, "--serve", serve]).output().expect("decant runs");
        let said = text(&output);
        assert!(output.status.code() == Some(status) && said.contains(cause), "{words:?}: {:?}: {said}", output.status);
        assert_eq!(
            std::fs::read_dir(place.directory.path()).expect("it is there").count(),
            before,
            "{words:?} left something"
        );
    }
    let silent = place.ask(&["status"]);
    assert!(silent.status.code() == Some(1) && text(&silent).contains("clone not running"), "{}", text(&silent));
}
