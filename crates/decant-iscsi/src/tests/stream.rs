//! The stream of PDUs, whatever it is cut into and whatever happens to it.

use crate::Violation;
use crate::pdu::*;
use proptest::collection::vec;
use proptest::prelude::*;

/// All PDUs of a stream that is given in pieces of `step` bytes; with each, whether its data were intact.
fn decode(bytes: &[u8], step: usize, digests: Digests) -> Result<Vec<(Header, Vec<u8>, bool)>, Violation> {
    let mut decoder = Decoder::new(1 << 16, 64);
    decoder.set_negotiated(digests, 1 << 16);
    let (mut start, mut stop, mut pdus) = (0, 0, Vec::new());
    loop {
        stop = (stop + step).min(bytes.len());
        while let Step { consumed, event: Some(unit) } = decoder.handle_input(&bytes[start..stop])? {
            start += consumed;
            match unit {
                Unit::Header { bhs, .. } => pdus.push((Header::decode(bhs)?, Vec::new(), true)),
                Unit::Data(data) => pdus.last_mut().unwrap().1.extend_from_slice(data),
                Unit::End { intact } => pdus.last_mut().unwrap().2 = intact,
            }
        }
        if stop == bytes.len() {
            return Ok(pdus);
        }
    }
}

use crate::Step;

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(300) })]

    #[test]
    fn headers_survive_the_wire(bhs in vec(any::<u8>(), 48)) {
        let bhs: [u8; 48] = bhs.try_into().unwrap();
        if let Ok(header) = Header::decode(&bhs) {
            prop_assert_eq!(Header::decode(&header.encode(0)), Ok(header));
        }
    }

    #[test]
    fn cuts_do_not_matter(
        step in 1usize..300, header in any::<bool>(), data in any::<bool>(),
        contents in vec(vec(any::<u8>(), 0..100), 1..6)
    ) {
        let digests = Digests { header, data };
        let mut bytes = Vec::new();
        for content in &contents {
            put(&mut bytes, &NopOut { task: 5, ..NopOut::default() }.into(), content, digests);
        }
        let pdus = decode(&bytes, step, digests).unwrap();
        let got: Vec<_> = pdus.iter().map(|(_, data, intact)| (data.clone(), *intact)).collect();
        prop_assert_eq!(got, contents.into_iter().map(|content| (content, true)).collect::<Vec<_>>());
    }

    /// With both digests, no flipped bit goes unnoticed.
    #[test]
    fn digests_find_every_flip(at in 0usize..160, bit in 0u8..8, content in vec(any::<u8>(), 97..100)) {
        let digests = Digests { header: true, data: true };
        let mut bytes = Vec::new();
        put(&mut bytes, &NopOut::default().into(), &content, digests);
        let at = at % bytes.len();
        bytes[at] ^= 1 << bit;
        let seen = match decode(&bytes, usize::MAX, digests) {
            Err(Violation::HeaderDigest) => true,
            // A longer header than there is never becomes complete.
            Ok(pdus) => pdus.iter().all(|(_, _, intact)| !intact),
            Err(_) => false,
        };
        prop_assert!(seen);
    }

    #[test]
    fn no_bytes_harm_the_decoder(bytes in vec(any::<u8>(), 0..400), step in 1usize..100) {
        let _ = decode(&bytes, step, Digests::default());
    }
}

#[test]
fn additional_headers_must_fill_their_room() {
    let with_ahs = |ahs: &[u8]| {
        let mut bytes = Header::from(NopOut::default()).encode(0).to_vec();
        bytes[4] = (ahs.len() / 4) as u8;
        bytes.extend(ahs);
        decode(&bytes, usize::MAX, Digests::default()).map(|pdus| pdus.len())
    };
    assert_eq!(with_ahs(&[0, 5, 2, 0, 0, 0, 1, 0]), Ok(1));
    assert_eq!(with_ahs(&[0, 1, 2, 0, 0, 1, 2, 0]), Ok(1));
    assert_eq!(with_ahs(&[0, 6, 2, 0, 0, 0, 1, 0]), Err(Violation::Malformed("additional header")));
    assert_eq!(with_ahs(&[0xff, 0xff, 1, 0]), Err(Violation::Malformed("additional header")));
    assert!(matches!(with_ahs(&[0; 68]), Err(Violation::TooLong { .. })));
}
