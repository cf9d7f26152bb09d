//! PDUs byte for byte.

use crate::pdu::*;
use crate::serial::Serial;

/// The examples of RFC 3720 B.4 and RFC 7143 A.4: CRC-32C of 32 zeros, of 32 ones, counting up, and a Read(10) PDU.
#[test]
fn digests_are_those_of_the_standard() {
    let command: [u8; 48] = [
        0x01, 0xc0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0x14, 0, 0, 0, 0, 0, 0x04, 0, 0, 0, 0, 0x14, 0, 0, 0,
        0x18, 0x28, 0, 0, 0, 0, 0, 0, 0, 0x02, 0, 0, 0, 0, 0, 0, 0,
    ];
    assert_eq!(crc32c::crc32c(&[0; 32]).to_le_bytes(), [0xaa, 0x36, 0x91, 0x8a]);
    assert_eq!(crc32c::crc32c(&[0xff; 32]).to_le_bytes(), [0x43, 0xab, 0xa8, 0x62]);
    assert_eq!(crc32c::crc32c(&command).to_le_bytes(), [0x56, 0x3a, 0x96, 0xd9]);
    let header = Header::decode(&command).unwrap();
    let Header::ScsiCommand(read) = header else { panic!("{header:?}") };
    assert!(read.is_final && read.read && !read.write && !read.immediate);
    assert_eq!((read.task, read.expected_length), (0x1400_0000, 0x400));
    assert_eq!((read.cmd_sn, read.exp_stat_sn), (Serial(0x14), Serial(0x18)));
    assert_eq!(read.cdb[..10], [0x28, 0, 0, 0, 0, 0, 0, 0, 2, 0]);
    let mut out = Vec::new();
    put(&mut out, &header, &[], Digests { header: true, data: true });
    assert_eq!(out[..48], command);
    assert_eq!(out[48..], [0x56, 0x3a, 0x96, 0xd9]);
}
