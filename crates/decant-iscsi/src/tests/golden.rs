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

/// Each opcode with every field set, as section 11 lays it out.
#[test]
fn headers_lie_as_section_11_has_them() {
    let r2t = ReadyToTransfer {
        is_final: true,
        lun: 0x0102_0304_0506_0708,
        task: 0x1112_1314,
        transfer: 0x2122_2324,
        stat_sn: Serial(0x3132_3334),
        exp_cmd_sn: Serial(0x4142_4344),
        max_cmd_sn: Serial(0x5152_5354),
        r2t_sn: Serial(0x6162_6364),
        offset: 0x7172_7374,
        length: 0x0001_0203,
    };
    let expected = [
        0x31, 0x80, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6, 7, 8, 0x11, 0x12, 0x13, 0x14, 0x21, 0x22, 0x23, 0x24, 0x31,
        0x32, 0x33, 0x34, 0x41, 0x42, 0x43, 0x44, 0x51, 0x52, 0x53, 0x54, 0x61, 0x62, 0x63, 0x64, 0x71, 0x72, 0x73,
        0x74, 0, 1, 2, 3,
    ];
    assert_eq!(Header::from(r2t).encode(0), expected);
    let login = LoginRequest {
        immediate: true,
        transit: true,
        stage: 1,
        next_stage: 3,
        version_max: 0,
        version_min: 0,
        isid: [0x80, 1, 2, 3, 4, 5],
        tsih: 0x0607,
        task: 9,
        cid: 0x0a0b,
        cmd_sn: Serial(1),
        exp_stat_sn: Serial(2),
        more: false,
    };
    let bhs = Header::from(login).encode(0x01_0203);
    assert_eq!(bhs[..24], [0x43, 0x87, 0, 0, 0, 1, 2, 3, 0x80, 1, 2, 3, 4, 5, 6, 7, 0, 0, 0, 9, 10, 11, 0, 0]);
    let response =
        ScsiResponse { is_final: true, status: 2, residual: Residual::Underflow(5), ..ScsiResponse::default() };
    let bhs = Header::from(response).encode(20);
    assert_eq!((bhs[0], bhs[1], bhs[3], bhs[47]), (0x21, 0x82, 2, 5));
    let data = DataIn { is_final: true, has_status: true, residual: Residual::Overflow(7), ..DataIn::default() };
    let bhs = Header::from(data).encode(4);
    assert_eq!((bhs[0], bhs[1], bhs[7], bhs[47]), (0x25, 0x85, 4, 7));
    let reset = TaskRequest { immediate: true, function: task_function::LUN_RESET, ..TaskRequest::default() };
    assert_eq!(Header::from(reset).encode(0)[..2], [0x42, 0x85]);
}
