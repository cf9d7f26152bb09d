//! Commands, each by itself.

use super::*;
use proptest::prelude::*;

fn disk() -> Disk {
    Disk {
        vendor: "DECANT".into(),
        product: "TEST".into(),
        revision: "1".into(),
        serial: "1234".into(),
        block_bytes: 4096,
        physical_exponent: 0,
        blocks: 1 << 33,
        read_only: false,
        thin: true,
        max_transfer: 1 << 20,
        digests: false,
    }
}

fn ask(disk: &Disk, cdb: &[u8]) -> (Result<Plan, Sense>, Vec<u8>) {
    let mut padded = [0; 16];
    padded[..cdb.len()].copy_from_slice(cdb);
    let mut reply = Vec::new();
    let mode = ModeState::default();
    let context =
        Context { disk, mode: &mode, is_lun_0: true, target_name: "iqn.2026-11.dev.decant:x", portal_group: 1 };
    (plan(&context, &padded, &mut reply), reply)
}

#[test]
fn the_commands_that_are_reported_are_those_that_are_there() {
    for (thin, digests) in [(true, false), (false, true)] {
        let disk = Disk { thin, digests, ..disk() };
        let (_, all) = ask(&disk, &[0xa3, 0x0c, 0, 0, 0, 0, 0, 0, 0xff, 0xff]);
        let listed = all[4..].chunks(8).map(|entry| (entry[0], entry[5] & 1 != 0, entry[3]));
        let listed: Vec<(u8, bool, u8)> = listed.collect();
        assert_eq!(listed.len() * 8, all.len() - 4);
        assert_eq!(listed.iter().any(|entry| entry.0 == 0x42), thin);
        assert_eq!(listed.iter().any(|entry| entry.0 == 0xd5), digests);
        for opcode in 0..=255u8 {
            let there = listed.iter().any(|entry| entry.0 == opcode);
            let refused = ask(&disk, &[opcode]).0 == Err(Sense::illegal(asc::INVALID_OPERATION_CODE));
            assert_eq!(there, !refused, "{opcode:#x}");
        }
        for (opcode, has_actions, action) in listed {
            let option = if has_actions { 2 } else { 1 };
            let (plan, one) = ask(&disk, &[0xa3, 0x0c, option | 0x80, opcode, 0, action, 0, 0, 0xff, 0xff]);
            assert_eq!(plan, Ok(Plan::Done));
            let support = if opcode == 0xd5 { 5 } else { 3 };
            assert_eq!(one[1], 0x80 | support);
            let length = usize::from(one[3]);
            assert_eq!((one[4], one.len()), (opcode, 4 + length + 12), "usage and timeouts");
            // The other option is an error, and the third takes both.
            assert!(ask(&disk, &[0xa3, 0x0c, 3 - option, opcode, 0, action, 0, 0, 0xff, 0xff]).0.is_err());
            assert_eq!(ask(&disk, &[0xa3, 0x0c, 3, opcode, 0, action, 0, 0, 0xff, 0xff]).1[1], support);
            // Bits that usage does not have are refused.
            for at in 1..length {
                let reserved = !one[4 + at] & if at == 1 && has_actions { 0xe0 } else { 0xff };
                for bit in (0..8).filter(|bit| reserved & (1 << bit) != 0) {
                    let mut cdb = vec![0; length];
                    cdb[0] = opcode;
                    cdb[1] = if has_actions { action } else { 0 };
                    cdb[at] |= 1 << bit;
                    let expected = Err(Sense::invalid_field(at as u16));
                    assert_eq!(ask(&disk, &cdb).0, expected, "{opcode:#x} byte {at} bit {bit}");
                }
            }
        }
    }
}

#[test]
fn sense_has_both_formats() {
    let sense = Sense::out_of_range(0x1_0000_0001);
    // More than 32 bits: not valid in fixed format.
    assert_eq!(sense.encode(false), [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x21, 0, 0, 0, 0, 0]);
    assert_eq!(sense.encode(true), [0x72, 5, 0x21, 0, 0, 0, 0, 12, 0, 10, 0x80, 0, 0, 0, 0, 1, 0, 0, 0, 1]);
    let sense = Sense::invalid_field(2);
    assert_eq!(sense.encode(false), [0x70, 0, 5, 0, 0, 0, 0, 10, 0, 0, 0, 0, 0x24, 0, 0, 0xc0, 0, 2]);
    assert_eq!(sense.encode(true), [0x72, 5, 0x24, 0, 0, 0, 0, 8, 2, 6, 0, 0, 0xc0, 0, 2, 0]);
}

#[test]
fn capacity_is_told_in_both_lengths() {
    let disk = disk();
    assert_eq!(ask(&disk, &[0x25]).1, [0xff, 0xff, 0xff, 0xff, 0, 0, 0x10, 0]);
    let (_, long) = ask(&disk, &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 32]);
    assert_eq!(long[..16], [0, 0, 0, 1, 0xff, 0xff, 0xff, 0xff, 0, 0, 0x10, 0, 0, 0, 0xc0, 0]);
    assert_eq!(ask(&disk, &[0x9e, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 5]).1.len(), 5);
}

/// Whoever is told that it is done may take the power away.
#[test]
fn what_is_cached_is_flushed_whenever_somebody_asks_for_it() {
    let disk = disk();
    for immediate in [0x00, 0x02] {
        assert_eq!(ask(&disk, &[0x35, immediate]).0, Ok(Plan::Flush));
        assert_eq!(ask(&disk, &[0x91, immediate]).0, Ok(Plan::Flush));
    }
    for immediate in [0x00, 0x01] {
        let start_stop = |byte: u8| ask(&disk, &[0x1b, immediate, 0, 0, byte]).0;
        // Stop; idle and standby, by themselves and by force.
        for byte in [0x00, 0x20, 0x30, 0xa0, 0xb0] {
            assert_eq!(start_stop(byte), Ok(Plan::Flush), "{byte:#x}");
            assert_eq!(start_stop(byte | 0x04), Ok(Plan::Done), "{byte:#x} with NO_FLUSH");
        }
        assert_eq!((start_stop(0x01), start_stop(0x10)), (Ok(Plan::Done), Ok(Plan::Done)), "started, active");
        assert_eq!(start_stop(0x02), Err(Sense::invalid_field(4)), "nothing to eject");
    }
}

#[test]
fn write_same_is_at_most_what_block_limits_say() {
    for block_bytes in [512, 4096] {
        let disk = Disk { block_bytes, ..disk() };
        let (_, page) = ask(&disk, &[0x12, 1, 0xb0, 0, 255]);
        let most = page[4..].u64_at(32);
        assert_eq!(most * u64::from(block_bytes), 32 << 20);
        let same = |blocks: u64| {
            let mut cdb = [0; 16];
            cdb[0] = 0x93;
            cdb[10..14].copy_from_slice(&(blocks as u32).to_be_bytes());
            ask(&disk, &cdb).0
        };
        assert_eq!(same(most), Ok(Plan::Same { offset: 0, length: 32 << 20, unmap: false, zeros: false }));
        assert_eq!(same(most + 1), Err(Sense::invalid_field(10)));
        // To the end, which is too far.
        assert_eq!(same(0), Err(Sense::invalid_field(10)));
    }
}

#[test]
fn the_disk_and_its_port_are_named_as_of_iscsi() {
    let disk = Disk { serial: "0123456789".repeat(9), ..disk() };
    let (_, serial) = ask(&disk, &[0x12, 1, 0x80, 0, 255]);
    assert_eq!(serial[4..], disk.serial.as_bytes()[..MAX_SERIAL]);
    let (_, page) = ask(&disk, &[0x12, 1, 0x83, 4, 0]);
    let (mut rest, mut heads) = (&page[4..], Vec::new());
    while let [head, kind, _, length, tail @ ..] = rest {
        heads.push((*head, *kind, *length));
        rest = &tail[usize::from(*length)..];
    }
    // Vendor and serial, NAA; with PROTOCOL IDENTIFIER 5h relative port, port group and the port's name.
    let port = "iqn.2026-11.dev.decant:x,t,0x0001\0".len().next_multiple_of(4) as u8;
    assert_eq!(heads, [(0x02, 1, 72), (0x01, 3, 8), (0x51, 0x94, 4), (0x51, 0x95, 4), (0x53, 0x98, port)]);
}

#[test]
fn mode_select_takes_what_can_be_changed_and_nothing_else() {
    let disk = disk();
    let (_, current) = ask(&disk, &[0x1a, 0, 0x0a, 0, 255, 0]);
    let mut list = current;
    list[0] = 0;
    let select = |cdb1: u8, list: &[u8]| {
        let cdb = [0x15, cdb1, 0, 0, list.len() as u8, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        mode_select(&disk, ModeState::default(), &cdb, Parameter::ModeSelect6, list)
    };
    assert_eq!(select(0x10, &list), Ok(ModeState::default()));
    list[12 + 4] |= 0x08;
    list[12 + 2] |= 0x04;
    assert_eq!(select(0x10, &list), Ok(ModeState { descriptor_sense: true, write_protect: true }));
    assert_eq!(select(0x11, &list), Err(Sense::invalid_field(1)));
    assert_eq!(select(0x00, &list), Err(Sense::invalid_field(1)));
    for length in [1, 3, 5, 11, 13, 20] {
        assert_eq!(
            select(0x10, &list[..length]).map_err(|sense| sense.asc),
            Err(asc::PARAMETER_LIST_LENGTH),
            "{length}"
        );
    }
    for (at, flip) in [(12 + 2, 0x40), (12 + 3, 0x10), (12 + 5, 0x40), (12 + 1, 1), (12, 1), (11, 1), (4 + 7, 0xf0)] {
        let mut wrong = list.clone();
        wrong[at] ^= flip;
        assert_eq!(select(0x10, &wrong).map_err(|sense| sense.asc), Err(asc::INVALID_FIELD_IN_LIST), "{at}");
    }
}

#[test]
fn other_luns_say_that_nothing_is_there() {
    let disk = disk();
    let mode = ModeState::default();
    let context = Context { disk: &disk, mode: &mode, is_lun_0: false, target_name: "x", portal_group: 1 };
    let ask = |cdb: &[u8]| {
        let mut padded = [0; 16];
        padded[..cdb.len()].copy_from_slice(cdb);
        let mut reply = Vec::new();
        (plan(&context, &padded, &mut reply), reply)
    };
    assert_eq!(ask(&[0x12, 0, 0, 0, 96]).1[0], 0x7f);
    assert_eq!(ask(&[0x03, 0, 0, 0, 18]).1[12], 0x25);
    assert_eq!(ask(&[0xa0, 0, 0, 0, 0, 0, 0, 0, 0, 16]).1.len(), 16);
    for opcode in [0x00, 0x28, 0x2a, 0x9e, 0xff] {
        assert_eq!(ask(&[opcode]).0, Err(Sense::illegal(asc::LUN_NOT_SUPPORTED)));
    }
}

#[test]
fn lba_status_never_calls_data_deallocated() {
    let disk = disk();
    let status = |extents: &[(u64, bool)]| {
        let mut reply = Vec::new();
        lba_status(&disk, 4096, extents, 1024, &mut reply);
        let runs = reply[8..].chunks(16).map(|run| (run.u64_at(0), run.u32_at(8), run[12]));
        runs.collect::<Vec<_>>()
    };
    assert_eq!(status(&[(8192, true), (8192, false)]), [(1, 2, 0), (3, 2, 1)]);
    // A block that is partly data is mapped.
    assert_eq!(status(&[(5000, false), (100, true), (20_000, false)]), [(1, 1, 1), (2, 1, 0), (3, 4, 1)]);
    assert_eq!(status(&[]), [(1, 1, 0)]);
}

#[test]
fn digests_are_of_whole_blocks_within_the_disk() {
    let disk = Disk { digests: true, block_bytes: 512, blocks: 8 * 10_000 + 3, ..disk() };
    let digests = |lba: u64, blocks: u32| {
        let mut cdb = [0; 16];
        cdb[0] = 0xd5;
        cdb[2..10].copy_from_slice(&lba.to_be_bytes());
        cdb[10..14].copy_from_slice(&blocks.to_be_bytes());
        ask(&disk, &cdb).0
    };
    assert_eq!(digests(8, 16), Ok(Plan::Digests { offset: 4096, length: 8192 }));
    assert_eq!(digests(80_000, 3), Ok(Plan::Digests { offset: 80_000 * 512, length: 1536 }));
    assert_eq!(digests(0, 8 * MAX_DIGESTS), Ok(Plan::Digests { offset: 0, length: 32 << 20 }));
    assert_eq!(digests(8, 0), Ok(Plan::Done));
    assert_eq!(digests(4, 8), Err(Sense::invalid_field(2)));
    assert_eq!(digests(8, 4), Err(Sense::invalid_field(10)));
    assert_eq!(digests(0, 8 * MAX_DIGESTS + 8), Err(Sense::invalid_field(10)));
    assert_eq!(digests(80_000, 4), Err(Sense::out_of_range(80_003)));
    assert_eq!(digests(u64::MAX - 7, 8), Err(Sense::out_of_range(u64::MAX - 7)));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(4000) })]

    /// No CDB panics, and none comes to anything outside of the disk.
    #[test]
    fn any_cdb_stays_within_the_disk(
        mut cdb in any::<[u8; 16]>(), known in any::<bool>(), small in any::<bool>(), read_only in any::<bool>()
    ) {
        let disk = Disk { read_only, blocks: 1 << 20, digests: true, ..disk() };
        if known {
            cdb[0] = [0x08, 0x0a, 0x28, 0x2a, 0x88, 0x8a, 0x41, 0x93, 0x2f, 0x9e, 0x35, 0x2e, 0x12, 0x1a, 0xd5][usize::from(cdb[15] % 15)];
            cdb[1] &= 0x1a;
            cdb[15] = 0;
            cdb[14] = 0;
        }
        if small {
            cdb[2..8].fill(0);
        }
        let (plan, reply) = ask(&disk, &cdb);
        prop_assert!(reply.len() < 4096);
        let within = |offset: u64, length: u64| offset + length <= disk.bytes() && (offset | length).is_multiple_of(4096);
        match plan {
            Ok(Plan::Read { offset, length, .. } | Plan::Verify { offset, length, .. }) => {
                prop_assert!(within(offset, length.into()) && length <= disk.max_transfer);
            }
            Ok(Plan::Write { offset, length, .. }) => {
                prop_assert!(within(offset, length.into()) && length <= disk.max_transfer && !read_only);
            }
            Ok(Plan::Digests { offset, length }) => prop_assert!(within(offset, length.into())),
            Ok(Plan::Same { offset, length, .. }) => prop_assert!(within(offset, length) && !read_only),
            Ok(Plan::LbaStatus { offset, .. }) => prop_assert!(within(offset, 4096)),
            _ => {}
        }
    }

    #[test]
    fn any_parameter_list_is_contained(list in proptest::collection::vec(any::<u8>(), 0..200), ten in any::<bool>()) {
        let disk = disk();
        if let Ok(ranges) = unmap_ranges(&disk, &list) {
            prop_assert!(ranges.iter().all(|(offset, length)| offset + length <= disk.bytes()));
        }
        let (kind, cdb) = if ten { (Parameter::ModeSelect10, 0x55) } else { (Parameter::ModeSelect6, 0x15) };
        let cdb = [cdb, 0x10, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
        let _ = mode_select(&disk, ModeState::default(), &cdb, kind, &list);
    }
}
