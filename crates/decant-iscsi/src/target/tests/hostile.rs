//! Initiators that mean harm.

use super::world::*;
use crate::pdu::*;
use crate::target::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// The bytes of a login, two commands and a logout.
fn captured() -> Vec<u8> {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let request = end.request(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 2, 0], 0, &[1; 1024]);
    end.send(&mut world, request, &[1; 512]).unwrap();
    let out = DataOut { is_final: true, task: request.task, transfer: 1, offset: 512, ..DataOut::default() };
    end.send(&mut world, out, &[1; 512]).unwrap();
    end.perform_all(&mut world);
    end.command(&mut world, &[0x12, 1, 0x83, 0, 255, 0], 255, &[]);
    let logout = LogoutRequest { immediate: true, task: 4, ..LogoutRequest::default() };
    end.send(&mut world, logout, &[]).unwrap();
    end.sent
}

/// Plays bytes to a fresh target; what it keeps and asks for stays within bounds.
fn play(bytes: &[u8]) {
    let mut world = World::new(config());
    let mut end = world.connect(1);
    let result = end.send_bytes(&mut world, bytes);
    assert!(end.buffers.values().map(Vec::len).sum::<usize>() <= 16 * 256 * 1024);
    assert!(end.requests.len() <= 16);
    if result.is_ok() {
        end.perform_all(&mut world);
        let _ = end.out.len();
    }
    end.connection.handle_disconnect(&mut world.target);
}

#[test]
fn every_truncation_of_a_session_is_contained() {
    let bytes = captured();
    for length in 0..bytes.len() {
        play(&bytes[..length]);
    }
}

#[test]
fn every_bit_flip_of_a_session_is_contained() {
    let bytes = captured();
    for at in 0..bytes.len() {
        for bit in 0..8 {
            let mut damaged = bytes.clone();
            damaged[at] ^= 1 << bit;
            play(&damaged);
        }
    }
}

/// Lengths that overflow what they are added to (the kind of CVE-2022-26495 and CVE-2025-47711).
#[test]
fn lengths_that_overflow_are_refused() {
    for (at, value) in [(4, 0xff), (5, 0xff)] {
        let mut world = World::new(config());
        let mut end = world.connect(1);
        let mut bytes = vec![0u8; 48 + 2000];
        bytes[0] = 0x43;
        bytes[at] = value;
        assert!(end.send_bytes(&mut world, &bytes).is_err());
    }
    // Data-Out that wraps around its buffer.
    for offset in [u32::MAX, u32::MAX - 511, 1024, 0] {
        let mut world = World::new(config());
        let mut end = world.session(1);
        let request = end.request(&[0x2a, 0, 0, 0, 0, 0, 0, 0, 2, 0], 0, &[1; 1024]);
        end.send(&mut world, request, &[1; 512]).unwrap();
        let out = DataOut { is_final: true, task: request.task, transfer: 1, offset, ..DataOut::default() };
        assert!(end.send(&mut world, out, &[1; 512]).is_err(), "{offset}");
    }
}

/// tgt lets commands past the end succeed; here none does, whatever it is.
#[test]
fn no_command_reaches_past_the_end() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    for opcode in [0x28u8, 0x2a, 0x2e, 0x2f, 0x35, 0x41, 0xa8, 0xaa, 0xae, 0xaf] {
        for (lba, blocks) in [(BLOCKS as u32, 1u8), (BLOCKS as u32 - 1, 2), (u32::MAX, 1), (u32::MAX, 255)] {
            let mut cdb = [0u8; 16];
            cdb[0] = opcode;
            cdb[2..6].copy_from_slice(&lba.to_be_bytes());
            cdb[if opcode < 0x80 { 8 } else { 9 }] = blocks;
            let data = if matches!(opcode & 0x1f, 0x0a | 0x0e | 0x01) {
                vec![1; usize::from(blocks) * 512]
            } else {
                Vec::new()
            };
            assert_eq!(status(&end.command(&mut world, &cdb, 512, &data)), (2, 5, 0x2100), "{opcode:#x} {lba}");
        }
    }
    for opcode in [0x88u8, 0x8a, 0x8e, 0x8f, 0x91, 0x93] {
        for lba in [BLOCKS, u64::MAX, u64::MAX / 512, 1 << 55] {
            let mut cdb = [0u8; 16];
            cdb[0] = opcode;
            cdb[2..10].copy_from_slice(&lba.to_be_bytes());
            cdb[13] = 1;
            let data = if matches!(opcode, 0x8a | 0x8e | 0x93) { vec![1; 512] } else { Vec::new() };
            assert_eq!(status(&end.command(&mut world, &cdb, 512, &data)), (2, 5, 0x2100), "{opcode:#x} {lba}");
        }
    }
    assert!(world.medium.iter().all(|byte| *byte == 0));
}

/// CVE-2020-28374: EXTENDED COPY reached other backstores. There is none, nor anything else that names a second disk.
#[test]
fn extended_copy_and_its_like_do_not_exist() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    for opcode in [0x83u8, 0x84, 0x89, 0x5e, 0x5f, 0x48, 0x9c, 0x8b] {
        assert_eq!(status(&end.command(&mut world, &[opcode, 1], 0, &[])), (2, 5, 0x2000), "{opcode:#x}");
    }
}

/// LIO maps LUNs writable unless told otherwise; a read-only disk here takes no write by any command.
#[test]
fn a_read_only_disk_takes_no_write() {
    let mut world = World::new(config());
    world.target.set_read_only(true);
    let mut end = world.session(1);
    for (cdb, length) in [
        (&[0x0a, 0, 0, 0, 1, 0][..], 512),
        (&[0x2a, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512),
        (&[0x2e, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512),
        (&[0x41, 0, 0, 0, 0, 0, 0, 0, 1, 0], 512),
        (&[0x42, 0, 0, 0, 0, 0, 0, 0, 24, 0], 24),
        (&[0x93, 9, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0], 0),
    ] {
        let data = vec![1; length];
        assert_eq!(status(&end.command(&mut world, cdb, 0, &data)), (2, 7, 0x2700), "{cdb:?}");
    }
    let answers = end.command(&mut world, &[0x1a, 8, 0x3f, 0, 255, 0], 255, &[]);
    assert_eq!(answers[0].1[2] & 0x80, 0x80);
}

/// PDUs of any opcode and content, well framed.
fn any_pdu() -> impl Strategy<Value = Vec<u8>> {
    (0u8..64, any::<bool>(), vec(any::<u8>(), 47), vec(any::<u8>(), 0..64)).prop_map(|(opcode, tame, rest, data)| {
        let mut bhs = [0u8; 48];
        bhs[1..].copy_from_slice(&rest);
        bhs[0] = opcode | 0x40;
        bhs[4] = 0;
        bhs[5..8].copy_from_slice(&(data.len() as u32).to_be_bytes()[1..]);
        if tame {
            bhs[1] = 0x81;
            bhs[8..16].fill(0);
            bhs[32] = [0x28, 0x2a, 0x12, 0x5a, 0x42, 0x93][usize::from(rest[40] % 6)];
        }
        let mut bytes = bhs.to_vec();
        bytes.extend(&data);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    })
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn no_bytes_harm_the_target(bytes in vec(any::<u8>(), 0..400)) {
        play(&bytes);
    }

    #[test]
    fn no_pdus_harm_a_session(pdus in vec(any_pdu(), 1..20)) {
        let mut world = World::new(config());
        let mut end = world.session(1);
        for pdu in pdus {
            if end.send_bytes(&mut world, &pdu).is_err() {
                break;
            }
            end.perform_all(&mut world);
            end.answers();
        }
        prop_assert!(end.buffers.values().map(Vec::len).sum::<usize>() <= 16 * 256 * 1024);
    }

    /// The same events and answers come out however the stream is cut.
    #[test]
    fn cuts_do_not_matter(step in 1usize..700) {
        let bytes = captured();
        let run = |step: usize| {
            let mut world = World::new(config());
            let mut end = world.connect(1);
            let (mut start, mut stop, mut answers) = (0, 0, Answers::new());
            while stop < bytes.len() || start < stop {
                stop = (stop + step).min(bytes.len());
                let before = start;
                loop {
                    let taken = end.connection.handle_input(&mut world.target, &bytes[start..stop], &mut end.out).unwrap();
                    let input = start;
                    start += taken.consumed;
                    match taken.event {
                        Some(Event::Data { task, offset, total, range }) => {
                            let buffer = end.buffers.entry(task).or_insert_with(|| vec![0; total as usize]);
                            let from = &bytes[input..][range];
                            buffer[offset as usize..][..from.len()].copy_from_slice(from);
                        }
                        Some(Event::Request { task, request }) => {
                            end.requests.push((task, request));
                            end.perform_all(&mut world);
                        }
                        Some(event) => end.events.push(event),
                        None => break,
                    }
                }
                answers.extend(end.answers());
                if stop == bytes.len() && start == before {
                    break;
                }
            }
            (answers, end.events, world.medium)
        };
        prop_assert!(run(step) == run(usize::MAX / 2));
    }
}
