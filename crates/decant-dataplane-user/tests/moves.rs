//! Volumes that move between two workers on loopback: mutual TLS, different header sizes, deaths on the way.

mod support;

use std::net::{IpAddr, Ipv4Addr};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use decant_base::{Bytes, Epoch, ExtentSet};
use decant_dataplane::{
    Command, Failure, FailureCode, Geometry, MissingPolicy, Origin, Outcome, Protocol, Reader, Seal, Verification,
    VolumeState,
};
use support::{Worker, World, cannot_run, eventually, kill, migration, mount, run, unmount, volume};

/// What the source handed over in prepare.
struct Opened {
    origin: Origin,
    geometry: Geometry,
    header: String,
    room: Bytes,
}

/// As the source's agent describes it.
fn reader(destination: &Worker) -> Reader {
    let certificate = destination.plane.certificate().to_owned();
    Reader { certificate, address: IpAddr::V4(Ipv4Addr::LOCALHOST), protocol: destination.protocol }
}

fn open_export(source: &Worker, destination: &Worker, id: &str) -> Opened {
    let reader = reader(destination);
    match source.perform(Command::OpenExport { volume: volume("v"), migration: migration(id), reader }) {
        Ok(Outcome::ExportOpened { origin, geometry, header, room }) => Opened { origin, geometry, header, room },
        other => panic!("open export: {other:?}"),
    }
}

fn prepare(destination: &Worker, opened: &Opened, id: &str) -> Result<Outcome, Failure> {
    destination.perform(Command::Prepare {
        volume: volume("v"),
        migration: migration(id),
        geometry: opened.geometry.clone(),
        header: opened.header.clone(),
        room: opened.room,
    })
}

fn assemble(destination: &Worker, opened: &Opened, id: &str) -> PathBuf {
    let command = Command::Assemble { volume: volume("v"), migration: migration(id), origin: opened.origin.clone() };
    match destination.perform(command) {
        Ok(Outcome::Attached { device }) => device,
        other => panic!("assemble: {other:?}"),
    }
}

fn seal(source: &Worker, destination: &Worker, id: &str) -> Result<Seal, Failure> {
    let reader = reader(destination);
    match source.perform(Command::Seal { volume: volume("v"), migration: migration(id), reader })? {
        Outcome::Sealed(seal) => Ok(seal),
        other => panic!("seal: {other:?}"),
    }
}

fn begin(destination: &Worker, opened: &Opened, seal: &Seal, id: &str) -> PathBuf {
    let command = Command::Begin {
        volume: volume("v"),
        migration: migration(id),
        epoch: Epoch(2),
        origin: opened.origin.clone(),
        seal: seal.clone(),
    };
    match destination.perform(command) {
        Ok(Outcome::Attached { device }) => device,
        other => panic!("begin: {other:?}"),
    }
}

fn verified(destination: &Worker, id: &str) -> Verification {
    let deadline = Instant::now() + Duration::from_secs(60);
    loop {
        match destination.perform(Command::Verify { volume: volume("v"), migration: migration(id) }) {
            Ok(Outcome::Verified(verification)) => return verification,
            Err(failure) if failure.code == FailureCode::NotYet => {
                assert!(Instant::now() < deadline, "never verified: {failure}, {:?}", destination.status("v").clone);
                std::thread::sleep(Duration::from_millis(10));
            }
            other => panic!("verify: {other:?}"),
        }
    }
}

fn content() -> Vec<u8> {
    (0..12 << 20).map(|n: u32| (n / 4096 * 31 + n % 7) as u8 | 1).collect()
}

/// A volume "v" with a file system and 12 MiB in it, attached and mounted.
fn source_volume(world: &World, source: &Worker, size: Bytes) -> PathBuf {
    source.create("v", size);
    let device = source.attach("v");
    let at = world.mount_point("at-source");
    mount(&device, &at);
    std::fs::write(at.join("file"), content()).unwrap();
    std::fs::write(at.join("dropped"), content()).unwrap();
    run("sync", &["-f", at.to_str().unwrap()]);
    std::fs::remove_file(at.join("dropped")).unwrap();
    run("sync", &["-f", at.to_str().unwrap()]);
    run("fstrim", &[at.to_str().unwrap()]);
    at
}

#[test]
fn a_volume_moves_to_a_smaller_header_and_back() {
    there_and_back("a_volume_moves_to_a_smaller_header_and_back", Protocol::Nbd);
}

#[test]
fn a_volume_moves_over_iscsi_and_back() {
    there_and_back("a_volume_moves_over_iscsi_and_back", Protocol::Iscsi);
}

fn there_and_back(test: &str, protocol: Protocol) {
    if cannot_run(test) {
        return;
    }
    let world = World::new();
    let source = Worker { protocol, ..world.worker("large-header", Bytes::mib(16)) };
    let destination = Worker { protocol, ..world.worker("small-header", Bytes::mib(4)) };
    let at = source_volume(&world, &source, Bytes::mib(128));

    let opened = open_export(&source, &destination, "m-1");
    assert_eq!(open_export(&source, &destination, "m-1").origin, opened.origin, "again: the same");
    assert_eq!(prepare(&destination, &opened, "m-1"), Ok(Outcome::Done));
    assert_eq!(prepare(&destination, &opened, "m-1"), Ok(Outcome::Done), "again: the same");
    assert_eq!(destination.status("v").state, VolumeState::Prepared);
    let device = assemble(&destination, &opened, "m-1");

    let busy = seal(&source, &destination, "m-1").unwrap_err();
    assert_eq!(busy.code, FailureCode::Retry, "{busy}");
    assert!(busy.message.contains("still used"), "{busy}");
    // A refused seal takes nothing away from the machine.
    std::fs::write(at.join("late"), b"written after a refused seal").unwrap();
    unmount(&at);

    let begun = Instant::now();
    let sealed = seal(&source, &destination, "m-1").unwrap();
    let seal_took = begun.elapsed();
    let begun = Instant::now();
    assert_eq!(begin(&destination, &opened, &sealed, "m-1"), device);
    println!("seal {seal_took:?}, begin {:?}", begun.elapsed());
    let moved = Bytes(sealed.live.len() * 4096);
    assert!(moved < Bytes(content().len() as u64 * 105 / 100 + (2 << 20)), "{moved} are to be moved");
    assert_eq!(source.status("v").state, VolumeState::Sealed);
    assert_eq!(seal(&source, &destination, "m-1"), Ok(sealed.clone()), "again: the same");
    assert_eq!(begin(&destination, &opened, &sealed, "m-1"), device, "again: the same");
    assert_eq!(destination.status("v").epoch, Epoch(2));

    let there = world.mount_point("at-destination");
    mount(&device, &there);
    assert_eq!(std::fs::read(there.join("file")).unwrap(), content());
    assert_eq!(std::fs::read(there.join("late")).unwrap(), b"written after a refused seal");
    std::fs::write(there.join("new"), b"written while it fills").unwrap();
    run("sync", &["-f", there.to_str().unwrap()]);
    destination.kill_volume("v");
    let found = verified(&destination, "m-1");
    assert!(found.compared > 0 && found.overwritten > 0, "{found:?}");
    assert_eq!(verified(&destination, "m-1"), found, "again: the same");
    assert_eq!(destination.status("v").state, VolumeState::Attached);
    assert_eq!(destination.status("v").header_bytes, Bytes::mib(4));
    assert!(!destination.site.paths(&volume("v")).map().exists());

    // The source goes: nothing is missing.
    assert_eq!(source.perform(Command::Free { volume: volume("v") }), Ok(Outcome::Done));
    assert_eq!(source.status("v").state, VolumeState::Freed);
    assert_eq!(source.status("v").allocated, Bytes::ZERO);
    source.assert_nothing_left("v");
    unmount(&there);
    mount(&device, &there);
    assert_eq!(std::fs::read(there.join("file")).unwrap(), content());
    unmount(&there);
    run("fsck.ext4", &["-fn", device.to_str().unwrap()]);
    // cryptsetup locks what the volume process has locked.
    destination.detach("v");
    let image = destination.site.paths(&volume("v")).image();
    let key = world.directory.path().join("keys/v.key");
    let (image, key) = (image.to_str().unwrap().to_owned(), key.to_str().unwrap().to_owned());
    run("cryptsetup", &["open", "--test-passphrase", "--key-file", &key, "--type", "luks2", &image]);

    // And back, onto what was freed.
    let opened = open_export(&destination, &source, "m-2");
    assert_eq!(prepare(&source, &opened, "m-2"), Ok(Outcome::Done));
    assemble(&source, &opened, "m-2");
    let sealed = seal(&destination, &source, "m-2").unwrap();
    let device = begin(&source, &opened, &sealed, "m-2");
    mount(&device, &at);
    assert_eq!(std::fs::read(at.join("new")).unwrap(), b"written while it fills");
    verified(&source, "m-2");
    unmount(&at);
    source.detach("v");
    source.assert_nothing_left("v");
    assert_eq!(destination.perform(Command::Delete { volume: volume("v") }), Ok(Outcome::Done));
    destination.assert_nothing_left("v");
}

#[test]
fn fstrim_reaches_a_clone_that_fills() {
    if cannot_run("fstrim_reaches_a_clone_that_fills") {
        return;
    }
    let world = World::new();
    let source = world.worker("keeps", Bytes::mib(16));
    let destination = world.worker("trims", Bytes::mib(4));
    let at = source_volume(&world, &source, Bytes::mib(64));
    std::fs::write(at.join("doomed"), content()).unwrap();
    let opened = open_export(&source, &destination, "m-1");
    prepare(&destination, &opened, "m-1").unwrap();
    let device = assemble(&destination, &opened, "m-1");
    // But for what reads wait for, and what lies around it, next to nothing is fetched before the trim.
    let limit = |rate| destination.perform(Command::Limit { volume: volume("v"), rate });
    assert_eq!(limit(Some(Bytes(4096))), Ok(Outcome::Done));
    unmount(&at);
    let sealed = seal(&source, &destination, "m-1").unwrap();
    begin(&destination, &opened, &sealed, "m-1");
    let there = world.mount_point("at-destination");
    mount(&device, &there);
    let doomed = blocks_of(&there.join("doomed"));
    assert_eq!(doomed.len(), content().len() / 4096);

    let status = || destination.status("v").clone.unwrap();
    let (before, allocated) = (status(), destination.status("v").allocated);
    assert!(before.bytes_missing > 20 << 20, "most is still missing: {before:?}");
    std::fs::remove_file(there.join("doomed")).unwrap();
    run("sync", &["-f", there.to_str().unwrap()]);
    run("fstrim", &[there.to_str().unwrap()]);
    let after = status();
    let discarded = after.bytes_discarded - before.bytes_discarded;
    assert!(discarded >= content().len() as u64, "{discarded} were discarded: {after:?}");
    assert!(after.bytes_missing + (10 << 20) < before.bytes_missing, "they are missed no more: {after:?}");
    // From the device, past every cache: zeros, at once, though the origin has other bytes.
    for block in &doomed {
        assert!(read_direct(&device, *block).unwrap().iter().all(|&byte| byte == 0), "block {block} is no zeros");
    }

    assert_eq!(limit(None), Ok(Outcome::Done));
    let found = verified(&destination, "m-1");
    let never_fetched = Bytes(content().len() as u64 - (before.bytes_filled + before.bytes_fetched));
    println!("{found:?}, before {before:?}, {allocated} allocated, {never_fetched} never fetched");
    assert!(found.discarded * 4096 >= discarded, "{found:?}");
    for block in &doomed {
        assert!(read_direct(&device, *block).unwrap().iter().all(|&byte| byte == 0), "block {block} was fetched");
    }
    assert_eq!(std::fs::read(there.join("file")).unwrap(), content());
    unmount(&there);
    run("fsck.ext4", &["-fn", device.to_str().unwrap()]);
    destination.detach("v");
    source.detach("v");
}

/// The blocks of 4096 bytes of the device that a file lies on, as FIEMAP tells them to filefrag.
fn blocks_of(file: &std::path::Path) -> Vec<u64> {
    let told = run("filefrag", &["-v", "-b4096", file.to_str().unwrap()]);
    let runs = told.lines().filter_map(|line| line.split(':').nth(2)?.trim().split_once(".."));
    let number = |text: &str| text.trim().parse::<u64>().ok();
    runs.filter_map(|(first, last)| Some(number(first)?..=number(last)?)).flatten().collect()
}

#[test]
fn a_sealed_volume_survives_its_host_and_a_cancel_gives_it_back() {
    if cannot_run("a_sealed_volume_survives_its_host_and_a_cancel_gives_it_back") {
        return;
    }
    let world = World::new();
    let source = world.worker("from", Bytes::mib(4));
    let destination = world.worker("to", Bytes::mib(16));
    let at = source_volume(&world, &source, Bytes::mib(64));
    let opened = open_export(&source, &destination, "m-1");
    prepare(&destination, &opened, "m-1").unwrap();
    assemble(&destination, &opened, "m-1");
    unmount(&at);
    let sealed = seal(&source, &destination, "m-1").unwrap();
    let refusal = source.perform(Command::Attach { volume: volume("v") }).unwrap_err();
    assert_eq!(refusal.code, FailureCode::Refused, "{refusal}");

    // What a restart of the host leaves is the disk.
    for worker in [&source, &destination] {
        kill(worker.keeper("v").unwrap().pid);
        eventually("the keeper is gone", || worker.keeper("v").is_none());
    }
    assert_eq!(seal(&source, &destination, "m-1"), Ok(sealed.clone()));
    let device = begin(&destination, &opened, &sealed, "m-1");
    let there = world.mount_point("at-destination");
    mount(&device, &there);
    assert_eq!(std::fs::read(there.join("file")).unwrap(), content());
    unmount(&there);
    // Killed in the middle of filling, then begun again from its map.
    kill(destination.keeper("v").unwrap().pid);
    eventually("the keeper is gone", || destination.keeper("v").is_none());
    let device = destination.attach("v");
    mount(&device, &there);
    assert_eq!(std::fs::read(there.join("file")).unwrap(), content());
    unmount(&there);
    let abandon = Command::Abandon { volume: volume("v"), migration: migration("m-1") };
    assert_eq!(destination.perform(abandon), Ok(Outcome::Done));
    assert_eq!(destination.status("v").state, VolumeState::Hydrating, "a begun volume is not abandoned");
    assert_eq!(destination.perform(Command::Delete { volume: volume("v") }), Ok(Outcome::Done));

    let close = Command::CloseExport { volume: volume("v"), migration: migration("m-1") };
    assert_eq!(source.perform(close.clone()), Ok(Outcome::Done));
    assert_eq!(source.perform(close), Ok(Outcome::Done));
    source.assert_nothing_left("v");
    let device = source.attach("v");
    mount(&device, &at);
    assert_eq!(std::fs::read(at.join("file")).unwrap(), content());
    unmount(&at);
    source.detach("v");
}

#[test]
fn ninety_reads_wait_while_a_write_and_a_sync_complete() {
    if cannot_run("ninety_reads_wait_while_a_write_and_a_sync_complete") {
        return;
    }
    let world = World::new();
    let source = world.worker("stalls", Bytes::mib(4));
    let destination = world.worker("waits", Bytes::mib(4));
    let at = source_volume(&world, &source, Bytes::mib(64));
    let opened = open_export(&source, &destination, "m-1");
    prepare(&destination, &opened, "m-1").unwrap();
    assemble(&destination, &opened, "m-1");
    unmount(&at);
    let sealed = seal(&source, &destination, "m-1").unwrap();
    // The origin is gone before the first block.
    kill(source.keeper("v").unwrap().pid);
    eventually("the origin is gone", || source.keeper("v").is_none());
    let device = begin(&destination, &opened, &sealed, "m-1");

    let missing: Vec<u64> = sealed.live.iter().flat_map(|run| run.range()).collect();
    let blocks: Vec<u64> = missing.iter().copied().step_by((missing.len() / 90).max(1)).take(90).collect();
    assert_eq!(blocks.len(), 90);
    let read = |block: u64| {
        let device = device.clone();
        std::thread::spawn(move || {
            let file = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(device).unwrap();
            let mut buffer = vec![0; 8192];
            let start = buffer.as_ptr().align_offset(4096);
            file.read_exact_at(&mut buffer[start..start + 4096], block * 4096)
                .map(|()| buffer[start..start + 4096].to_vec())
        })
    };
    let parked = |worker: &Worker| worker.status("v").clone.map_or(0, |clone| clone.parked_reads);
    let readers: Vec<_> = blocks.iter().map(|&block| read(block)).collect();
    eventually("90 reads are parked", || parked(&destination) >= 90);

    // One block that nobody waits for is written and synced.
    let free = missing.iter().copied().find(|block| !blocks.contains(block)).unwrap();
    let file = std::fs::File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&device).unwrap();
    let mut buffer = vec![9; 8192];
    let start = buffer.as_mut_ptr().align_offset(4096);
    file.write_all_at(&buffer[start..start + 4096], free * 4096).unwrap();
    file.sync_all().unwrap();
    assert!(parked(&destination) >= 90, "the reads still wait");

    // A stop frees them.
    let policy = |policy| destination.perform(Command::Policy { volume: volume("v"), policy });
    assert_eq!(policy(MissingPolicy::Eio), Ok(Outcome::Done));
    for reader in readers {
        let error = reader.join().unwrap().unwrap_err();
        assert_eq!(error.raw_os_error(), Some(libc::EIO));
    }
    assert_eq!(parked(&destination), 0);
    assert_eq!(policy(MissingPolicy::Wait), Ok(Outcome::Done));

    // Reads that wait survive the process that keeps them, and complete when the origin is back.
    let readers: Vec<_> = blocks.iter().map(|&block| read(block)).collect();
    eventually("90 reads are parked", || parked(&destination) >= 90);
    destination.kill_volume("v");
    eventually("90 reads are parked again", || parked(&destination) >= 90);
    seal(&source, &destination, "m-1").unwrap();
    let got: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap().unwrap()).collect();
    verified(&destination, "m-1");
    for (&block, bytes) in blocks.iter().zip(got) {
        assert!(read(block).join().unwrap().unwrap() == bytes, "block {block} was not what it is");
    }
    drop(file);
    destination.detach("v");
    destination.assert_nothing_left("v");
}

#[test]
fn two_hundred_reads_that_wait_leave_room_for_writes_and_for_a_stop() {
    if cannot_run("two_hundred_reads_that_wait_leave_room_for_writes_and_for_a_stop") {
        return;
    }
    let world = World::new();
    let source = world.worker("silent", Bytes::mib(4));
    let destination = world.worker("crowded", Bytes::mib(4));
    let at = source_volume(&world, &source, Bytes::mib(64));
    let opened = open_export(&source, &destination, "m-1");
    prepare(&destination, &opened, "m-1").unwrap();
    assemble(&destination, &opened, "m-1");
    unmount(&at);
    let sealed = seal(&source, &destination, "m-1").unwrap();
    kill(source.keeper("v").unwrap().pid);
    eventually("the origin is gone", || source.keeper("v").is_none());
    let device = begin(&destination, &opened, &sealed, "m-1");

    let missing: Vec<u64> = sealed.live.iter().flat_map(|run| run.range()).collect();
    let blocks: Vec<u64> = missing.iter().copied().step_by((missing.len() / 201).max(1)).take(200).collect();
    assert_eq!(blocks.len(), 200);
    let free = missing.iter().copied().find(|block| !blocks.contains(block)).unwrap();
    let read_all = || -> Vec<_> {
        let read = |&block: &u64| {
            let device = device.clone();
            std::thread::spawn(move || read_direct(&device, block))
        };
        blocks.iter().map(read).collect()
    };
    let parked = || destination.status("v").clone.map_or(0, |clone| clone.parked_reads);
    let readers = read_all();
    eventually("all of the device's tags are taken", || parked() >= 128);

    // A write, a sync of the device, and nothing in their way for ever.
    let begun = Instant::now();
    let file = std::fs::File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(&device).unwrap();
    let mut buffer = vec![9; 8192];
    let start = buffer.as_mut_ptr().align_offset(4096);
    file.write_all_at(&buffer[start..start + 4096], free * 4096).unwrap();
    file.sync_all().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(20), "{:?}", begun.elapsed());
    eventually("the reads that are too many have failed", || {
        readers.iter().filter(|reader| reader.is_finished()).count() == 104
    });
    let clone = destination.status("v").clone.unwrap();
    assert_eq!(clone.parked_reads, 96);
    assert!(clone.hindrance.contains("96 reads wait and 104 more failed"), "{}", clone.hindrance);
    // Now that it is known to be stalled nobody waits for a tag.
    let begun = Instant::now();
    file.write_all_at(&buffer[start..start + 4096], free * 4096).unwrap();
    file.sync_all().unwrap();
    assert!(begun.elapsed() < Duration::from_secs(5), "{:?}", begun.elapsed());

    // A stop frees the rest.
    let policy = |policy| destination.perform(Command::Policy { volume: volume("v"), policy });
    assert_eq!(policy(MissingPolicy::Eio), Ok(Outcome::Done));
    for reader in readers {
        assert_eq!(reader.join().unwrap().unwrap_err().raw_os_error(), Some(libc::EIO));
    }
    assert_eq!(policy(MissingPolicy::Wait), Ok(Outcome::Done));

    // The origin comes back before the reads are too old: every one of them is answered.
    let readers = read_all();
    eventually("reads are parked", || parked() >= 96);
    seal(&source, &destination, "m-1").unwrap();
    let got: Vec<_> = readers.into_iter().map(|reader| reader.join().unwrap()).collect();
    verified(&destination, "m-1");
    let mut answered = 0;
    for (&block, bytes) in blocks.iter().zip(got) {
        // Those beyond 96 fail only while nothing comes; no read that was let wait does.
        if let Ok(bytes) = bytes {
            assert!(read_direct(&device, block).unwrap() == bytes, "block {block} was not what it is");
            answered += 1;
        }
    }
    assert!(answered >= 96, "{answered} of 200 were answered");
    drop(file);
    destination.detach("v");
    destination.assert_nothing_left("v");
}

fn read_direct(device: &std::path::Path, block: u64) -> std::io::Result<Vec<u8>> {
    let file = std::fs::File::options().read(true).custom_flags(libc::O_DIRECT).open(device)?;
    let mut buffer = vec![0; 8192];
    let start = buffer.as_ptr().align_offset(4096);
    file.read_exact_at(&mut buffer[start..start + 4096], block * 4096)?;
    Ok(buffer[start..start + 4096].to_vec())
}

#[test]
fn a_destination_that_cannot_refuses_and_leaves_nothing() {
    if cannot_run("a_destination_that_cannot_refuses_and_leaves_nothing") {
        return;
    }
    let world = World::new();
    let source = world.worker("gives", Bytes::mib(4));
    let destination = world.worker("cannot", Bytes::mib(4));
    let stranger = world.worker("stranger", Bytes::mib(4));
    source.create("v", Bytes::mib(16));
    let opened = open_export(&source, &destination, "m-1");
    let refused = |opened: &Opened, what: &str| {
        let refusal = prepare(&destination, opened, "m-1").unwrap_err();
        assert_eq!(refusal.code, FailureCode::Refused, "{refusal}");
        assert!(refusal.message.contains(what), "{refusal}");
        assert!(!destination.site.paths(&volume("v")).state.exists(), "nothing half-made is left");
        destination.assert_nothing_left("v");
    };
    let but = |change: &dyn Fn(&mut Opened)| {
        let mut other = open_export(&source, &destination, "m-1");
        change(&mut other);
        other
    };
    refused(&but(&|opened| opened.room = Bytes(1 << 60)), "no room");
    refused(&but(&|opened| opened.geometry.cipher = "cipher_null-ecb".into()), "cipher");
    refused(&but(&|opened| opened.geometry.sector_size = 512), "sector size");
    refused(&but(&|opened| opened.header = "AAAA".into()), "header");
    let key = world.directory.path().join("keys/v.key");
    let right = std::fs::read(&key).unwrap();
    std::fs::write(&key, "another passphrase").unwrap();
    refused(&opened, "passphrase");
    std::fs::write(&key, right).unwrap();

    // A stranger with a certificate of the same fleet does not get in.
    prepare(&stranger, &opened, "m-1").unwrap();
    let command = Command::Assemble { volume: volume("v"), migration: migration("m-1"), origin: opened.origin.clone() };
    let refusal = stranger.perform(command).unwrap_err();
    assert_eq!(refusal.code, FailureCode::Retry, "{refusal}");
    let abandon = || Command::Abandon { volume: volume("v"), migration: migration("m-1") };
    assert_eq!(stranger.perform(abandon()), Ok(Outcome::Done));
    stranger.assert_nothing_left("v");
    assert!(!stranger.site.paths(&volume("v")).state.exists());

    // A seal of another header than the one prepared from is not begun.
    prepare(&destination, &opened, "m-1").unwrap();
    assemble(&destination, &opened, "m-1");
    let wrong = Seal { live: ExtentSet::new(), header_digest: "00".repeat(32) };
    let command = Command::Begin {
        volume: volume("v"),
        migration: migration("m-1"),
        epoch: Epoch(2),
        origin: opened.origin.clone(),
        seal: wrong,
    };
    assert_eq!(destination.perform(command).unwrap_err().code, FailureCode::Stuck);
    assert_eq!(destination.perform(abandon()), Ok(Outcome::Done));
    destination.assert_nothing_left("v");
    let close = Command::CloseExport { volume: volume("v"), migration: migration("m-1") };
    assert_eq!(source.perform(close), Ok(Outcome::Done));
    source.assert_nothing_left("v");
}

#[test]
fn a_tebibyte_moves_like_a_gibibyte() {
    if cannot_run("a_tebibyte_moves_like_a_gibibyte") {
        return;
    }
    let took = [Bytes::gib(1), Bytes::gib(1024)].map(|size| {
        let world = World::new();
        let source = world.worker("size-from", Bytes::mib(16));
        let destination = world.worker("size-to", Bytes::mib(4));
        let begun = Instant::now();
        let at = source_volume(&world, &source, size);
        let made = begun.elapsed();
        let opened = open_export(&source, &destination, "m-1");
        prepare(&destination, &opened, "m-1").unwrap();
        let begun = Instant::now();
        let device = assemble(&destination, &opened, "m-1");
        let assembled = begun.elapsed();
        unmount(&at);
        let begun = Instant::now();
        let sealed = seal(&source, &destination, "m-1").unwrap();
        let seal_took = begun.elapsed();
        let begun = Instant::now();
        begin(&destination, &opened, &sealed, "m-1");
        let begin_took = begun.elapsed();
        let there = world.mount_point("at-destination");
        let begun = Instant::now();
        mount(&device, &there);
        let mount_took = begun.elapsed();
        println!(
            "{size}: made in {made:?}, assembled in {assembled:?}, sealed in {seal_took:?}, begun in {begin_took:?}, mounted in {mount_took:?}, {} live",
            Bytes(sealed.live.len() * 4096)
        );
        assert_eq!(std::fs::read(there.join("file")).unwrap(), content());
        verified(&destination, "m-1");
        unmount(&there);
        destination.detach("v");
        source.detach("v");
        seal_took + begin_took
    });
    // Measured by the benchmarks, on a quiet machine. What would be wrong here is work for each block: 268 million of them.
    assert!(took[1] < Duration::from_secs(5), "1 GiB {:?}, 1 TiB {:?}", took[0], took[1]);
}

/// The destination's volume process dies at each point of its map's life; the move ends as if it had not.
#[test]
fn a_destination_that_dies_at_any_point_of_its_map_loses_nothing() {
    if cannot_run("a_destination_that_dies_at_any_point_of_its_map_loses_nothing") {
        return;
    }
    let world = World::new();
    let content = &content()[..1 << 20];
    for (n, point) in decant_dataplane_user::engine::POINTS.iter().enumerate() {
        let source = world.worker(&format!("alive-{n}"), Bytes::mib(4));
        let destination = world.crashing_worker(&format!("dies-{n}"), point);
        source.create("v", Bytes::mib(16));
        let at = world.mount_point("at-source");
        mount(&source.attach("v"), &at);
        std::fs::write(at.join("file"), content).unwrap();
        unmount(&at);
        let opened = open_export(&source, &destination, "m-1");
        prepare(&destination, &opened, "m-1").unwrap();
        let device = assemble(&destination, &opened, "m-1");
        let sealed = seal(&source, &destination, "m-1").unwrap();
        assert_eq!(begin(&destination, &opened, &sealed, "m-1"), device);
        let there = world.mount_point("at-destination");
        mount(&device, &there);
        std::fs::write(there.join("new"), content).unwrap();
        run("sync", &["-f", there.to_str().unwrap()]);
        assert_eq!(std::fs::read(there.join("file")).unwrap(), content, "{point}");
        verified(&destination, "m-1");
        // In good order, so that this, too, passes the point.
        unmount(&there);
        let died = destination.keeper("v").unwrap().restarts;
        destination.detach("v");
        let device = destination.attach("v");
        run("fsck.ext4", &["-fn", device.to_str().unwrap()]);
        mount(&device, &there);
        for name in ["file", "new"] {
            assert_eq!(std::fs::read(there.join(name)).unwrap(), content, "{point}: {name}");
        }
        unmount(&there);
        for worker in [&source, &destination] {
            assert_eq!(worker.perform(Command::Delete { volume: volume("v") }), Ok(Outcome::Done));
            worker.assert_nothing_left("v");
        }
        std::fs::remove_file(world.directory.path().join("keys/v.key")).unwrap();
        println!("{point}: the volume process died {died} times");
        assert!(died == 1, "{point}: the point was not passed");
    }
}

#[test]
fn sectors_of_512_bytes_move_and_keep_what_is_written_on_the_way() {
    if cannot_run("sectors_of_512_bytes_move_and_keep_what_is_written_on_the_way") {
        return;
    }
    let world = World::new();
    let source = world.worker("sectors-from", Bytes::mib(4));
    let destination = world.worker("sectors-to", Bytes::mib(16));
    let made = source.perform(Command::Create { volume: volume("v"), size: Bytes::mib(16), sector_size: 512 });
    assert_eq!(made, Ok(Outcome::Done));
    let direct = |device: &PathBuf| {
        std::fs::File::options().read(true).write(true).custom_flags(libc::O_DIRECT).open(device).unwrap()
    };
    // Raw: no file system here tells what is free.
    let mut model = content()[..4 << 20].to_vec();
    let mut buffer = vec![0; model.len() + 4096];
    let start = buffer.as_ptr().align_offset(4096);
    let aligned = &mut buffer[start..start + (4 << 20)];
    aligned.copy_from_slice(&model);
    let device = direct(&source.attach("v"));
    device.write_all_at(aligned, 0).unwrap();
    drop(device);

    let opened = open_export(&source, &destination, "m-1");
    assert_eq!(opened.geometry.sector_size, 512);
    prepare(&destination, &opened, "m-1").unwrap();
    let path = assemble(&destination, &opened, "m-1");
    let sealed = seal(&source, &destination, "m-1").unwrap();
    begin(&destination, &opened, &sealed, "m-1");
    let device = direct(&path);
    for n in 0..200u64 {
        let at = (n * 37 % 1024) * 4096 + n % 8 * 512;
        aligned[..512].fill(n as u8);
        device.write_all_at(&aligned[..512], at).unwrap();
        model[at as usize..][..512].fill(n as u8);
    }
    device.sync_all().unwrap();
    destination.kill_volume("v");
    let compare = |aligned: &mut [u8], device: &std::fs::File| {
        device.read_exact_at(aligned, 0).unwrap();
        let differs = aligned.chunks(512).zip(model.chunks(512)).position(|(is, should)| is != should);
        assert_eq!(differs, None, "the first sector that differs");
    };
    compare(aligned, &device);
    verified(&destination, "m-1");
    compare(aligned, &device);
    drop(device);
    destination.detach("v");
    compare(aligned, &direct(&destination.attach("v")));
    destination.detach("v");
    destination.assert_nothing_left("v");
}
