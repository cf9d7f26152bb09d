//! Whole volumes: FUSE, loop and ext4 above, keeper and volume process below, and the deaths of each.

mod support;

use std::fs::File;
use std::io::Write;
use std::os::unix::fs::FileExt;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::Instant;

use decant_base::Bytes;
use decant_dataplane::{Command, FailureCode, Outcome, VolumeState};
use support::{World, cannot_run, eventually, kill, mount, run, unmount, volume};

#[test]
fn a_volume_is_made_used_and_put_away() {
    if cannot_run("a_volume_is_made_used_and_put_away") {
        return;
    }
    let world = World::new();
    let worker = world.worker("made", Bytes::mib(16));
    worker.create("v", Bytes::mib(64));
    worker.assert_nothing_left("v");
    assert_eq!(worker.status("v").state, VolumeState::Detached);
    assert!(worker.status("v").allocated < Bytes::mib(2), "an empty volume allocates {}", worker.status("v").allocated);

    let device = worker.attach("v");
    assert_eq!(worker.attach("v"), device, "attaching again changes nothing");
    assert_eq!(worker.status("v").state, VolumeState::Attached);
    let at = world.mount_point("data");
    mount(&device, &at);
    let content: Vec<u8> = (0..20 << 20).map(|n: u32| (n / 4096 * 31 + n % 7) as u8 | 1).collect();
    std::fs::write(at.join("file"), &content).unwrap();
    run("sync", &["-f", at.to_str().unwrap()]);
    let refusal = worker.perform(Command::Detach { volume: volume("v") }).unwrap_err();
    assert_eq!(refusal.code, FailureCode::Retry, "{refusal}");
    assert!(refusal.message.contains("still used"), "{refusal}");

    let before = worker.status("v").allocated;
    assert!(before >= Bytes::mib(20), "{before}");
    std::fs::write(at.join("kept"), &content[..1 << 20]).unwrap();
    std::fs::remove_file(at.join("file")).unwrap();
    run("sync", &["-f", at.to_str().unwrap()]);
    run("fstrim", &[at.to_str().unwrap()]);
    let after = worker.status("v").allocated;
    assert!(after.0 + (18 << 20) < before.0, "fstrim punched: {before} -> {after}");

    unmount(&at);
    worker.detach("v");
    worker.detach("v");
    worker.assert_nothing_left("v");
    let device = worker.attach("v");
    mount(&device, &at);
    assert_eq!(std::fs::read(at.join("kept")).unwrap(), content[..1 << 20]);
    unmount(&at);
    run("fsck.ext4", &["-fn", device.to_str().unwrap()]);
    assert_eq!(worker.perform(Command::Delete { volume: volume("v") }), Ok(Outcome::Done));
    worker.assert_nothing_left("v");
    assert!(!worker.site.paths(&volume("v")).state.exists());
    assert_eq!(worker.perform(Command::Delete { volume: volume("v") }), Ok(Outcome::Done));
}

#[test]
fn a_volume_process_killed_during_synced_writes_costs_no_error() {
    if cannot_run("a_volume_process_killed_during_synced_writes_costs_no_error") {
        return;
    }
    let world = World::new();
    let worker = world.worker("killed", Bytes::mib(4));
    worker.create("v", Bytes::mib(64));
    let device = worker.attach("v");
    let at = world.mount_point("data");
    mount(&device, &at);
    let file = File::options().read(true).write(true).create(true).truncate(true).open(at.join("file")).unwrap();
    let (stop, count) = (AtomicBool::new(false), AtomicU64::new(0));
    std::thread::scope(|scope| {
        let writer = scope.spawn(|| {
            let mut block = vec![0; 64 << 10];
            while !stop.load(Ordering::Relaxed) {
                let n = count.load(Ordering::Relaxed);
                block.fill(n as u8);
                file.write_all_at(&block, n % 256 * block.len() as u64).unwrap();
                file.sync_data().unwrap();
                count.store(n + 1, Ordering::Relaxed);
            }
        });
        for _ in 0..3 {
            let before = count.load(Ordering::Relaxed);
            eventually("synced writes go on", || count.load(Ordering::Relaxed) > before + 20 || writer.is_finished());
            worker.kill_volume("v");
        }
        let before = count.load(Ordering::Relaxed);
        eventually("synced writes go on", || count.load(Ordering::Relaxed) > before + 20 || writer.is_finished());
        stop.store(true, Ordering::Relaxed);
        writer.join().unwrap();
    });
    let written = count.load(Ordering::Relaxed);
    assert_eq!(worker.keeper("v").unwrap().restarts, 3);
    drop(file);
    unmount(&at);
    // Another process, and nothing cached: what the medium has.
    worker.detach("v");
    let device = worker.attach("v");
    mount(&device, &at);
    let content = std::fs::read(at.join("file")).unwrap();
    for (index, block) in content.chunks(64 << 10).enumerate() {
        let last = (0..written).rev().find(|n| n % 256 == index as u64).unwrap();
        assert!(block.iter().all(|&byte| byte == last as u8), "block {index} is not write {last}");
    }
    unmount(&at);
    run("fsck.ext4", &["-fn", device.to_str().unwrap()]);
    worker.detach("v");
    worker.assert_nothing_left("v");
}

#[test]
fn an_agent_that_ends_leaves_the_volume_alone() {
    if cannot_run("an_agent_that_ends_leaves_the_volume_alone") {
        return;
    }
    let world = World::new();
    let worker = world.worker("agentless", Bytes::mib(4));
    worker.create("v", Bytes::mib(16));
    let device = worker.attach("v");
    let at = world.mount_point("data");
    mount(&device, &at);
    let site = worker.site.clone();
    let keeper = worker.keeper("v").unwrap();
    // What an agent that ends takes with it is its sockets and pipes.
    drop(worker);
    std::fs::write(at.join("file"), b"written without an agent").unwrap();
    run("sync", &["-f", at.to_str().unwrap()]);
    let group = std::fs::read_to_string(format!("/proc/{}/cgroup", keeper.pid)).unwrap();
    let of_worker = decant_base::cgroup::of_worker("agentless", &site.run_dir);
    assert!(group.contains(&format!("/{}/_keepers", of_worker.display())), "{group}");
    let session = std::fs::read_to_string(format!("/proc/{}/stat", keeper.pid)).unwrap();
    let session = session.rsplit(") ").next().unwrap().split(' ').nth(3).unwrap().to_owned();
    assert_eq!(session, keeper.pid.to_string(), "a session of its own");

    let again = decant_dataplane_user::plane::UserPlane::new(site).unwrap();
    let attached = decant_dataplane::Plane::perform(&again, &Command::Attach { volume: volume("v") });
    assert_eq!(attached, Ok(Outcome::Attached { device }));
    unmount(&at);
    decant_dataplane::Plane::perform(&again, &Command::Detach { volume: volume("v") }).unwrap();
}

#[test]
fn a_killed_keeper_takes_the_device_with_it_and_attaching_again_works() {
    if cannot_run("a_killed_keeper_takes_the_device_with_it_and_attaching_again_works") {
        return;
    }
    let world = World::new();
    let worker = world.worker("keeper", Bytes::mib(4));
    worker.create("v", Bytes::mib(32));
    let device = worker.attach("v");
    let at = world.mount_point("data");
    mount(&device, &at);
    std::fs::write(at.join("file"), b"durable").unwrap();
    run("sync", &["-f", at.to_str().unwrap()]);
    let keeper = worker.keeper("v").unwrap();
    kill(keeper.pid);
    eventually("the volume process ends with its keeper", || {
        !std::path::Path::new(&format!("/proc/{}", keeper.volume_pid.unwrap())).exists()
    });
    let mut file = File::create(at.join("more")).ok();
    let wrote = file.as_mut().map(|file| file.write_all(&[1; 1 << 20]).and_then(|()| file.sync_all()));
    assert!(!matches!(wrote, Some(Ok(()))), "the device gives errors");
    drop(file);
    run("umount", &[at.to_str().unwrap()]);
    let device = worker.attach("v");
    mount(&device, &at);
    assert_eq!(std::fs::read(at.join("file")).unwrap(), b"durable");
    unmount(&at);
    worker.detach("v");
    worker.assert_nothing_left("v");
}

#[test]
fn a_second_keeper_refuses() {
    if cannot_run("a_second_keeper_refuses") {
        return;
    }
    let world = World::new();
    let worker = world.worker("second", Bytes::mib(4));
    worker.create("v", Bytes::mib(8));
    worker.attach("v");
    let spec = decant_dataplane_user::keeper::KeeperSpec { site: worker.site.clone(), volume: volume("v") };
    let mut second = std::process::Command::new(&worker.site.exe)
        .args(["keeper", "second", "v"])
        .stdin(std::process::Stdio::piped())
        .stderr(std::process::Stdio::null())
        .spawn()
        .unwrap();
    second.stdin.take().unwrap().write_all(&serde_json::to_vec(&spec).unwrap()).unwrap();
    assert_eq!(second.wait().unwrap().code(), Some(i32::from(decant_dataplane_user::keeper::ALREADY_KEPT)));
    worker.detach("v");
}

#[test]
fn what_cannot_be_made_leaves_nothing() {
    if cannot_run("what_cannot_be_made_leaves_nothing") {
        return;
    }
    let world = World::new();
    let worker = world.worker("refuses", Bytes::mib(4));
    let create =
        |name: &str, size, sector_size| worker.perform(Command::Create { volume: volume(name), size, sector_size });
    let refusal = create("v", Bytes(1000), 4096).unwrap_err();
    assert_eq!(refusal.code, FailureCode::Refused, "{refusal}");
    let refusal = create("v", Bytes::mib(8), 1024).unwrap_err();
    assert_eq!(refusal.code, FailureCode::Refused, "{refusal}");
    worker.assert_nothing_left("v");
    assert!(!worker.site.paths(&volume("v")).state.exists());

    create("v", Bytes::mib(8), 512).unwrap();
    assert_eq!(create("v", Bytes::mib(8), 512), Ok(Outcome::Done), "again: the same");
    assert_eq!(create("v", Bytes::mib(16), 512).unwrap_err().code, FailureCode::Refused);
    let device = worker.attach("v");
    let sectors = format!("/sys/block/{}/queue/logical_block_size", device.file_name().unwrap().to_str().unwrap());
    assert_eq!(std::fs::read_to_string(sectors).unwrap().trim(), "512");
    worker.detach("v");

    let key = world.directory.path().join("keys/v.key");
    std::fs::write(&key, "another passphrase").unwrap();
    let refusal = worker.perform(Command::Attach { volume: volume("v") }).unwrap_err();
    assert!(refusal.message.contains("passphrase"), "{refusal}");
    worker.detach("v");
    worker.assert_nothing_left("v");
    assert_eq!(worker.perform(Command::Attach { volume: volume("none") }).unwrap_err().code, FailureCode::Refused);
}

#[test]
fn attach_is_quick() {
    if cannot_run("attach_is_quick") {
        return;
    }
    let world = World::new();
    let worker = world.worker("quick", Bytes::mib(16));
    let begun = Instant::now();
    worker.create("v", Bytes::gib(100));
    let made = begun.elapsed();
    assert!(
        worker.status("v").allocated < Bytes::mib(16),
        "an empty volume allocates {}",
        worker.status("v").allocated
    );
    let begun = Instant::now();
    worker.attach("v");
    let attached = begun.elapsed();
    let begun = Instant::now();
    worker.detach("v");
    println!("create 100 GiB {made:?}, attach {attached:?}, detach {:?}", begun.elapsed());
}

#[test]
fn a_volume_that_failed_says_so_and_can_be_put_away() {
    if cannot_run("a_volume_that_failed_says_so_and_can_be_put_away") {
        return;
    }
    let world = World::new();
    let worker = world.worker("failed", Bytes::mib(4));
    worker.create("v", Bytes::mib(8));
    let device = worker.attach("v");
    // What a failed fsync leaves, and the end of the process that saw it.
    let note = decant_dataplane_user::engine::beside(&worker.site.paths(&volume("v")).map(), "failed");
    std::fs::write(&note, "the last flush failed: EIO").unwrap();
    let before = worker.keeper("v").unwrap();
    kill(before.volume_pid.unwrap());
    eventually("the successor refuses", || worker.keeper("v").unwrap().trouble.is_some());
    assert!(worker.status("v").failed.is_some_and(|why| why.contains("the last flush failed")));
    assert!(std::fs::read(device).is_err(), "a read ends with an error instead of waiting");
    let refusal = worker.perform(Command::Detach { volume: volume("v") }).unwrap_err();
    assert_eq!(refusal.code, FailureCode::Stuck, "{refusal}");
    worker.assert_nothing_left("v");
    let refusal = worker.perform(Command::Attach { volume: volume("v") }).unwrap_err();
    assert_eq!(refusal.code, FailureCode::Stuck, "{refusal}");
    worker.assert_nothing_left("v");
    std::fs::remove_file(note).unwrap();
    worker.attach("v");
    worker.detach("v");
}
