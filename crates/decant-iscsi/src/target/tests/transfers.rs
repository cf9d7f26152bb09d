//! Data both ways.

use super::world::*;
use crate::pdu::*;
use crate::scsi::{Compare, Sense};
use crate::target::*;

fn pattern(length: usize) -> Vec<u8> {
    (0..length).map(|at| (at % 251) as u8).collect()
}

fn read_10(lba: u32, blocks: u16) -> [u8; 10] {
    let [a, b, c, d] = lba.to_be_bytes();
    let [e, f] = blocks.to_be_bytes();
    [0x28, 0, a, b, c, d, 0, e, f, 0]
}

fn write_10(lba: u32, blocks: u16) -> [u8; 10] {
    let [opcode, rest @ ..] = read_10(lba, blocks);
    let mut cdb = [opcode | 0x02; 10];
    cdb[1..].copy_from_slice(&rest);
    cdb
}

fn data_of(answers: &Answers) -> Vec<u8> {
    answers
        .iter()
        .filter(|(header, _)| matches!(header, Header::DataIn(_)))
        .flat_map(|(_, data)| data.clone())
        .collect()
}

#[test]
fn what_is_written_is_read_back() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let data = pattern(300 * 512);
    assert_eq!(status(&end.command(&mut world, &write_10(7, 300), 0, &data)), (0, 0, 0));
    let answers = end.command(&mut world, &read_10(7, 300), 300 * 512, &[]);
    assert_eq!(status(&answers), (0, 0, 0));
    // 8192 bytes to a PDU, since the initiator declared nothing.
    assert_eq!(answers.len(), 19);
    assert!(data_of(&answers) == data);
}

#[test]
fn immediate_and_unsolicited_data_come_before_the_r2t() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let data = pattern(200 * 512);
    let request = ScsiCommand { is_final: false, ..end.request(&write_10(0, 200), 0, &data) };
    assert!(end.send(&mut world, request, &data[..4096]).unwrap().is_empty());
    let out = DataOut { task: request.task, transfer: NO_TAG, offset: 4096, is_final: true, ..DataOut::default() };
    let answers = end.send(&mut world, out, &data[4096..8192]).unwrap();
    let Some((Header::ReadyToTransfer(r2t), _)) = answers.last() else { panic!("{answers:?}") };
    assert_eq!((r2t.offset, r2t.length), (8192, 200 * 512 - 8192));
    for (sn, at) in (8192..200 * 512).step_by(40_000).enumerate() {
        let piece = &data[at..data.len().min(at + 40_000)];
        let is_final = at + piece.len() == data.len();
        let out = DataOut {
            is_final,
            task: request.task,
            transfer: r2t.transfer,
            offset: at as u32,
            data_sn: crate::serial::Serial(sn as u32),
            ..DataOut::default()
        };
        assert!(end.send(&mut world, out, piece).unwrap().is_empty());
    }
    end.perform_all(&mut world);
    assert_eq!(status(&end.answers()), (0, 0, 0));
    assert!(world.medium[..200 * 512] == data);
}

#[test]
fn commands_are_answered_in_the_order_in_which_they_end() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    world.medium[512] = 9;
    let (one, two) = (end.request(&read_10(0, 1), 512, &[]), end.request(&read_10(1, 1), 512, &[]));
    end.send(&mut world, one, &[]).unwrap();
    end.send(&mut world, two, &[]).unwrap();
    end.perform(&mut world, 1);
    end.perform(&mut world, 0);
    let answers = end.answers();
    let tags: Vec<(u32, u32)> = answers
        .iter()
        .map(|(header, _)| if let Header::DataIn(data) = header { (data.task, data.stat_sn.0) } else { (0, 0) })
        .collect();
    assert_eq!(tags, [(two.task, 2), (one.task, 3)]);
    assert_eq!(answers[0].1[0], 9);
}

#[test]
fn an_ordered_command_waits_and_is_waited_for() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let data = [5u8; 512];
    let one = end.request(&read_10(0, 1), 512, &[]);
    let two = ScsiCommand { attribute: TaskAttribute::Ordered, ..end.request(&write_10(0, 1), 0, &data) };
    let three = end.request(&read_10(0, 1), 512, &[]);
    let head = ScsiCommand { attribute: TaskAttribute::HeadOfQueue, ..end.request(&read_10(0, 1), 512, &[]) };
    end.send(&mut world, one, &[]).unwrap();
    end.send(&mut world, two, &data).unwrap();
    end.send(&mut world, three, &[]).unwrap();
    end.send(&mut world, head, &[]).unwrap();
    assert_eq!(end.requests.len(), 2);
    end.perform(&mut world, 0);
    end.perform(&mut world, 0);
    assert!(matches!(end.requests[..], [(_, Request::Write { .. })]));
    end.perform_all(&mut world);
    let answers = end.answers();
    assert_eq!(
        answers.iter().map(|(_, data)| data.first().copied()).collect::<Vec<_>>(),
        [Some(0), Some(0), None, Some(5)]
    );
}

#[test]
fn residuals_say_what_was_not_moved() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let residual = |answers: &Answers| match &answers.last().unwrap().0 {
        Header::DataIn(data) => data.residual,
        Header::ScsiResponse(response) => response.residual,
        other => panic!("{other:?}"),
    };
    let answers = end.command(&mut world, &read_10(0, 2), 700, &[]);
    assert_eq!((residual(&answers), data_of(&answers).len()), (Residual::Overflow(324), 700));
    let answers = end.command(&mut world, &read_10(0, 2), 5000, &[]);
    assert_eq!((residual(&answers), data_of(&answers).len()), (Residual::Underflow(3976), 1024));
    assert_eq!(residual(&end.command(&mut world, &read_10(0, 2), 0, &[])), Residual::Overflow(1024));
    world.medium.fill(1);
    // More than the command writes: only that is written. Less: whole blocks of it are.
    assert_eq!(residual(&end.command(&mut world, &write_10(0, 1), 0, &[2; 1024])), Residual::Underflow(512));
    assert_eq!(residual(&end.command(&mut world, &write_10(4, 2), 0, &[2; 700])), Residual::Overflow(324));
    let blocks: Vec<u8> = world.medium.chunks(512).take(6).map(|block| block[0]).collect();
    assert_eq!(blocks, [2, 1, 1, 1, 2, 1]);
}

#[test]
fn verify_compares_and_write_same_repeats() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    let block = [7u8; 512];
    assert_eq!(status(&end.command(&mut world, &[0x41, 0, 0, 0, 0, 8, 0, 0, 4, 0], 0, &block)), (0, 0, 0));
    assert!(world.medium[8 * 512..12 * 512].iter().all(|byte| *byte == 7) && world.medium[12 * 512] == 0);
    let verify = |flags: u8, blocks: u8| [0x2f, flags, 0, 0, 0, 8, 0, 0, blocks, 0];
    assert_eq!(status(&end.command(&mut world, &verify(2, 1), 0, &block)), (0, 0, 0));
    assert_eq!(status(&end.command(&mut world, &verify(6, 4), 0, &block)), (0, 0, 0));
    assert_eq!(status(&end.command(&mut world, &verify(6, 5), 0, &block)), (2, 0x0e, 0x1d00));
    assert_eq!(status(&end.command(&mut world, &verify(0, 5), 0, &[])), (0, 0, 0));
    assert_eq!(status(&end.command(&mut world, &[0x2e, 2, 0, 0, 0, 20, 0, 0, 1, 0], 0, &block)), (0, 0, 0));
    assert_eq!(world.medium[20 * 512], 7);
    // NDOB: zeros without a block.
    let mut cdb = [0u8; 16];
    (cdb[0], cdb[1], cdb[9], cdb[13]) = (0x93, 1, 8, 4);
    assert_eq!(status(&end.command(&mut world, &cdb, 0, &[])), (0, 0, 0));
    assert_eq!(world.medium[8 * 512], 0);
    assert_eq!(Compare::Nothing, Compare::Nothing);
}

#[test]
fn unmap_checks_every_range_before_it_does_any() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    world.medium.fill(1);
    let list = |ranges: &[(u64, u32)]| {
        let mut list = vec![0, 0, 0, (ranges.len() * 16) as u8, 0, 0, 0, 0];
        list[1] = list[3] + 6;
        for (lba, blocks) in ranges {
            list.extend(lba.to_be_bytes());
            list.extend(blocks.to_be_bytes());
            list.extend([0; 4]);
        }
        list
    };
    let mut unmap = |end: &mut End, list: &[u8]| {
        let answers = end.command(&mut world, &[0x42, 0, 0, 0, 0, 0, 0, 0, list.len() as u8, 0], 0, list);
        (status(&answers), world.medium[0])
    };
    assert_eq!(unmap(&mut end, &list(&[(0, 1), (BLOCKS - 1, 2)])), ((2, 5, 0x2100), 1));
    assert_eq!(unmap(&mut end, &list(&[(0, 1), (8, 8)])), ((0, 0, 0), 0));
    let mut short = list(&[(0, 1)]);
    short.truncate(20);
    assert_eq!(unmap(&mut end, &short).0, (2, 5, 0x1a00));
    assert_eq!(world.medium[8 * 512], 0);
    assert_eq!(world.medium[7 * 512], 1);
}

/// The backend's errors arrive as errors (of CVE-2022-0485's kind: a failed read that was taken for zeros).
#[test]
fn a_failed_request_is_never_answered_with_good() {
    let mut world = World::new(config());
    let mut end = world.session(1);
    for (failure, expected) in [
        (Failure::Medium(Some(1024)), (2, 3, 0x1100)),
        (Failure::NotReady, (2, 2, 0x0400)),
        (Failure::NoSpace, (2, 7, 0x2707)),
        (Failure::Target, (2, 4, 0x4400)),
    ] {
        let request = end.request(&read_10(0, 8), 4096, &[]);
        end.send(&mut world, request, &[]).unwrap();
        let (task, _) = end.requests.remove(0);
        end.connection.complete(&mut world.target, task, Outcome::Failed(failure), &mut end.out);
        let answers = end.answers();
        assert_eq!(status(&answers), expected);
        if let Failure::Medium(_) = failure {
            // Valid, and the LBA.
            assert_eq!(answers[0].1[2..9], [0xf0, 0, 3, 0, 0, 0, 2]);
        }
    }
    assert_eq!(Sense::out_of_range(5).encode(true).len(), 20);
}

#[test]
fn digests_are_checked_and_sent() {
    let mut world = World::new(config());
    let mut end = world.connect(1);
    let text = format!(
        "InitiatorName={INITIATOR}\0TargetName={NAME}\0HeaderDigest=CRC32C,None\0DataDigest=CRC32C\0ImmediateData=Yes\0"
    );
    end.login(&mut world, 1, 1, 3, &text).unwrap();
    end.digests = Digests { header: true, data: true };
    end.set_digests();
    assert_eq!(status(&end.command(&mut world, &[0], 0, &[])), (2, 6, 0x2901));
    let data = pattern(517 * 3 - 15);
    assert_eq!(status(&end.command(&mut world, &write_10(0, 3), 0, &data)), (0, 0, 0));
    assert_eq!(data_of(&end.command(&mut world, &read_10(0, 3), 1536, &[])), data);
    let mut bytes = Vec::new();
    let request = ScsiCommand { cmd_sn: crate::serial::Serial(1), ..end.request(&write_10(0, 1), 0, &[1; 512]) };
    put(&mut bytes, &request.into(), &[1; 512], end.digests);
    for (at, expected) in [(33, crate::Violation::HeaderDigest), (100, crate::Violation::DataDigest)] {
        let mut world = World { target: Target::new(config(), disk()), medium: Vec::new() };
        let mut other = world.connect(1);
        other.login(&mut world, 1, 1, 3, &text).unwrap();
        let mut damaged = bytes.clone();
        damaged[at] ^= 0x10;
        assert_eq!(other.send_bytes(&mut world, &damaged), Err(expected));
        assert!(other.requests.is_empty());
    }
}

#[test]
fn digests_of_blocks_are_sent_as_they_are_served() {
    let mut world = World::new(config());
    world.medium = pattern(world.medium.len());
    let mut end = world.session(1);
    let cdb = [0xd5, 0, 0, 0, 0, 0, 0, 0, 0, 8, 0, 0, 0, 16, 0, 0];
    assert_eq!(status(&end.command(&mut world, &cdb, 8, &[])), (2, 5, 0x2000), "not offered");
    let mut world = World::of(config(), crate::scsi::Disk { digests: true, ..disk() });
    world.medium = pattern(world.medium.len());
    let mut end = world.session(1);
    let answers = end.command(&mut world, &cdb, 8, &[]);
    let expected: Vec<u8> =
        world.medium[4096..12_288].chunks(4096).flat_map(|block| crc32c::crc32c(block).to_be_bytes()).collect();
    assert_eq!((status(&answers), data_of(&answers)), ((0, 0, 0), expected));
}

/// The driver reads data straight to their place because the machine said where that is: they must not be left over.
#[test]
fn a_pdu_that_has_begun_is_taken_although_much_is_to_be_sent() {
    let mut world = World::new(Config { limits: Limits { outbound_bytes: 1000, ..config().limits }, ..config() });
    let mut end = world.session(1);
    let data = pattern(8192);
    let read = end.request(&read_10(100, 8), 4096, &[]);
    end.send(&mut world, read, &[]).unwrap();
    let write = end.request(&write_10(0, 16), 0, &data);
    let mut bytes = Vec::new();
    put(&mut bytes, &write.into(), &data, end.digests);
    end.send_bytes(&mut world, &bytes[..4096]).unwrap();
    let wanted = end.connection.data_wanted().expect("the rest of them");
    assert_eq!((wanted.range.end, wanted.total), (8192, 8192));
    // The read's data are more than the limit, and nobody takes them.
    end.perform(&mut world, 0);
    assert!(end.out.len() > 4096);
    let ready = end.request(&[0], 0, &[]);
    put(&mut bytes, &ready.into(), &[], end.digests);
    let (mut rest, mut taken) = (&bytes[4096..], 0);
    loop {
        let step = end.connection.handle_input(&mut world.target, rest, &mut end.out).unwrap();
        taken += step.consumed;
        match step.event {
            Some(Event::Data { task, offset, range, .. }) => {
                let from = &rest[range];
                end.buffers.get_mut(&task).unwrap()[offset as usize..][..from.len()].copy_from_slice(from);
            }
            Some(Event::Request { task, request }) => end.requests.push((task, request)),
            Some(other) => panic!("{other:?}"),
            None => break,
        }
        rest = &rest[step.consumed..];
    }
    assert_eq!(taken, bytes.len() - 4096 - 48, "the write to its end, and the command behind it not yet");
    end.perform_all(&mut world);
    assert!(world.medium[..8192] == data);
    end.answers();
    assert_eq!(status(&end.send_bytes(&mut world, &bytes[bytes.len() - 48..]).unwrap()), (0, 0, 0));
}
