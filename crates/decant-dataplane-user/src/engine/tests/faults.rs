//! Disks that fail, and files that are not what they should be.

use std::os::unix::fs::FileExt;

use decant_base::BLOCK;
use decant_clone::MapError;

use super::super::*;
use super::fixture::*;

fn small() -> Volume {
    Volume::new(8 << 20, 4096, &[(0, 2000)])
}

const EIO: i32 = 5;
const ENOSPC: i32 = 28;

#[test]
fn a_failed_sync_is_final() {
    for of_map in [false, true] {
        let volume = small();
        let (engine, origin) = (volume.begun(), volume.origin());
        origin.hold(true);
        origin.attach(&engine);
        engine.write(0, &mut plaintext(0, 4096, 1)).unwrap();
        let fault = if of_map { &volume.faults.map_sync } else { &volume.faults.sync };
        fault.store(EIO, Ordering::SeqCst);
        assert_eq!(engine.flush(), Err(Errno::IO));
        // The next sync would succeed, as the kernel has forgotten: it is not asked.
        fault.store(0, Ordering::SeqCst);
        assert_eq!(engine.flush(), Err(Errno::IO));
        assert_eq!(engine.write(4096, &mut plaintext(4096, 4096, 1)), Err(Errno::IO));
        assert_eq!(engine.discard(4096, 4096), Err(Errno::IO));
        assert!(engine.failure().is_some_and(|why| why.contains("Input/output error")), "{:?}", engine.failure());
        let before = engine.status().unwrap().bytes_filled;
        origin.hold(false);
        assert_eq!(read(&engine, 8192, 4096).unwrap(), plaintext(8192, 4096, 0), "reads go on");
        assert_eq!(before, 0);
        drop(engine);
        let again = volume.try_open(Mode::Clone);
        assert!(matches!(&again, Err(OpenError::Failed(_))), "{:?}", again.err());
    }
}

#[test]
fn an_eio_of_a_write_is_final_and_a_full_disk_is_not() {
    let volume = small();
    let engine = volume.begun();
    volume.faults.write.store(ENOSPC, Ordering::SeqCst);
    assert_eq!(engine.write(0, &mut plaintext(0, 4096, 1)), Err(Errno::NOSPC));
    volume.faults.write.store(0, Ordering::SeqCst);
    engine.write(0, &mut plaintext(0, 4096, 2)).unwrap();
    engine.flush().unwrap();
    assert!(engine.failure().is_none());
    volume.faults.write.store(EIO, Ordering::SeqCst);
    assert_eq!(engine.write(0, &mut plaintext(0, 4096, 3)), Err(Errno::IO));
    volume.faults.write.store(0, Ordering::SeqCst);
    assert_eq!(engine.write(0, &mut plaintext(0, 4096, 4)), Err(Errno::IO));
    assert_eq!(engine.flush(), Err(Errno::IO));
}

#[test]
fn no_room_pauses_the_hydration_and_is_said_and_reads_go_on() {
    let volume = small();
    let (engine, origin) = (volume.begun(), volume.origin());
    volume.faults.write.store(ENOSPC, Ordering::SeqCst);
    origin.attach(&engine);
    assert_eq!(read(&engine, 1000 * BLOCK, 4096).unwrap(), plaintext(1000 * BLOCK, 4096, 0));
    wait_until("the pause", || engine.status().unwrap().hindrance.starts_with("STALLED: no room"));
    let status = engine.status().unwrap();
    assert_eq!((status.bytes_missing, status.bytes_filled), (status.bytes_total, 0));
    assert_eq!(read(&engine, 1001 * BLOCK, 4096).unwrap(), plaintext(1001 * BLOCK, 4096, 0));
    assert!(engine.failure().is_none());
    volume.faults.write.store(0, Ordering::SeqCst);
    hydrate(&engine);
    engine.verify().unwrap();
}

#[test]
fn what_lies_beside_the_image_must_fit_what_the_volume_is() {
    let volume = small();
    assert!(matches!(volume.try_open(Mode::Clone), Err(OpenError::MapMissing)));
    drop(volume.begun());
    assert!(matches!(volume.try_open(Mode::Plain), Err(OpenError::UnexpectedMap)));

    let marks = volume.directory.path().join("volume.map.marks");
    let saved = std::fs::read(&marks).unwrap();
    std::fs::remove_file(&marks).unwrap();
    assert!(matches!(volume.try_open(Mode::Clone), Err(OpenError::Map(MapError::Marks))));
    std::fs::write(&marks, &saved[..100]).unwrap();
    assert!(matches!(volume.try_open(Mode::Clone), Err(OpenError::Map(MapError::Marks))));
    std::fs::write(&marks, &saved).unwrap();

    let map = volume.directory.path().join("volume.map");
    let file = std::fs::OpenOptions::new().write(true).open(&map).unwrap();
    file.write_all_at(&[0xAA; 16], 8192).unwrap();
    assert!(matches!(volume.try_open(Mode::Clone), Err(OpenError::Map(MapError::LiveTable))));
    file.write_all_at(&[0xAA; 8192], 0).unwrap();
    assert!(matches!(volume.try_open(Mode::Clone), Err(OpenError::Map(MapError::Superblocks { .. }))));
}

#[test]
fn requests_off_the_volume_or_its_sectors_are_refused() {
    let volume = small();
    let engine = volume.try_open(Mode::Plain).unwrap();
    let size = volume.shape.size();
    for (offset, length) in [(0, 512), (512, 4096), (size, 4096), (size - 4096, 8192), (u64::MAX - 4095, 4096)] {
        assert_eq!(engine.read(offset, &mut vec![0; length]), Err(Errno::INVAL));
        assert_eq!(engine.write(offset, &mut vec![0; length]), Err(Errno::INVAL));
        assert_eq!(engine.discard(offset, length as u64), Err(Errno::INVAL));
        assert_eq!(start_read(&engine, offset, length).recv().unwrap(), Err(Errno::INVAL));
    }
}

#[test]
fn an_orderly_close_leaves_nothing_to_replay() {
    let volume = small();
    let (engine, origin) = (volume.begun(), volume.origin());
    origin.attach(&engine);
    engine.write(0, &mut plaintext(0, 4096, 1)).unwrap();
    hydrate(&engine);
    engine.close().unwrap();
    assert!(!volume.directory.path().join("volume.map.marks").exists());
    assert_eq!(engine.write(0, &mut plaintext(0, 4096, 2)), Err(Errno::IO));
    drop(engine);
    let engine = volume.try_open(Mode::Clone).unwrap();
    let status = engine.status().unwrap();
    assert_eq!((status.bytes_missing, status.bytes_written, status.bytes_filled), (0, 4096, 1999 * BLOCK));
    assert_eq!(read(&engine, 0, 4096).unwrap(), plaintext(0, 4096, 1));
    volume.origin().attach(&engine);
    let verification = engine.verify().unwrap();
    assert_eq!((verification.compared, verification.overwritten), (1999, 1));
}
