//! The entry points of fuzzing, with bytes from seeds: what `cargo fuzz` does without end, for a second.

#[path = "../fuzz/src/entries.rs"]
#[allow(unreachable_pub, reason = "the fuzzing crate exports them")]
mod entries;

/// Bytes of each entry, in all.
const BYTES: usize = 8 << 20;

/// A small generator; what a seed comes to never changes.
struct Random(u64);

impl Random {
    fn next(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d) >> 16
    }

    fn bytes(&mut self, length: usize) -> Vec<u8> {
        // Mostly small numbers and zeros, as protocols have them.
        let byte = |random: u64| if random & 0x300 == 0 { (random & 0xff) as u8 } else { (random & 0x03) as u8 };
        (0..length).map(|_| byte(self.next())).collect()
    }
}

/// Bytes that begin as something meaningful does.
fn shaped(name: &str, random: &mut Random) -> Vec<u8> {
    let length = 1 + (random.next() % 400) as usize;
    let mut bytes = random.bytes(length);
    match name {
        "login_text" => {
            const WORDS: &[&str] = &[
                "HeaderDigest=",
                "CRC32C,None",
                "None",
                "MaxBurstLength=",
                "FirstBurstLength=",
                "0x1000",
                "512",
                "\0",
                "InitialR2T=Yes",
                "MaxRecvDataSegmentLength=",
                "CHAP_C=0b",
                "AAAA",
                "ErrorRecoveryLevel=0",
                "Reject",
                "=",
            ];
            let words = bytes.iter().take(12).map(|byte| WORDS[usize::from(*byte) * 7 % WORDS.len()]);
            bytes = words.collect::<String>().into_bytes();
            bytes.push(0);
        }
        "cdbs" => {
            const OPCODES: &[u8] =
                &[0x28, 0x2a, 0x88, 0x8a, 0x41, 0x93, 0x42, 0x9e, 0x12, 0x1a, 0x5a, 0x55, 0xa3, 0xd5];
            bytes[0] = OPCODES[(random.next() as usize) % OPCODES.len()];
        }
        // Well-framed PDUs: no additional header, a short data segment.
        "pdus" | "to_target" | "to_initiator" => {
            bytes.truncate(1);
            for _ in 0..1 + random.next() % 6 {
                let length = (random.next() % 32) as usize;
                let mut pdu = random.bytes(48 + length.next_multiple_of(4));
                pdu[4..8].copy_from_slice(&(length as u32).to_be_bytes());
                bytes.extend(pdu);
            }
        }
        _ => {}
    }
    bytes
}

#[test]
fn nothing_that_is_said_does_harm() {
    for (seed, (name, entry)) in entries::ENTRIES.iter().enumerate() {
        let mut random = Random(0x9e37_79b9_7f4a_7c15 ^ (seed as u64 + 1));
        let mut spent = 0;
        while spent < BYTES {
            let bytes = if random.next().is_multiple_of(4) { random.bytes(300) } else { shaped(name, &mut random) };
            spent += bytes.len();
            if std::panic::catch_unwind(|| entry(&bytes)).is_err() {
                panic!("{name} of {bytes:02x?}");
            }
        }
    }
}
