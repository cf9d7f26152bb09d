//! Keys, both roles.

use crate::login::*;
use crate::text::*;

fn pairs(text: &TextOut) -> Pairs {
    let mut text = text.clone();
    Pairs::parse(&text.next_piece(usize::MAX).0).unwrap()
}

/// Both sides agree on the same, whatever they want.
#[test]
fn both_sides_come_to_the_same_values() {
    let ours =
        Offer { header_digest: DigestPolicy::Preferred, max_burst: 65_536, first_burst: 32_768, ..Offer::default() };
    let theirs =
        Offer { data_digest: DigestPolicy::Required, initial_r2t: true, max_receive: 4096, ..Offer::default() };
    let (mut initiator, mut responder) = (Negotiation::new(ours, false), Negotiation::new(theirs, false));
    let (mut there, mut back) = (TextOut::default(), TextOut::default());
    initiator.offer(&mut there);
    responder.handle(&pairs(&there), &mut back).unwrap();
    responder.declare(&mut back);
    let mut rest = TextOut::default();
    initiator.handle(&pairs(&back), &mut rest).unwrap();
    assert!(rest.is_empty());
    let (a, b) = (initiator.finish().unwrap(), responder.finish().unwrap());
    assert_eq!((a.max_send, b.max_send), (4096, 262_144));
    assert_eq!(Params { max_send: 0, max_receive: 0, ..a }, Params { max_send: 0, max_receive: 0, ..b });
    assert!(a.digests.header && a.digests.data && a.initial_r2t && a.immediate_data);
    assert_eq!((a.max_burst, a.first_burst), (65_536, 32_768));
}

fn negotiation(offer: Offer) -> Negotiation {
    Negotiation::new(offer, false)
}

fn offered(offer: Offer, text: &str) -> (Result<(), crate::Violation>, String) {
    let mut negotiation = negotiation(offer);
    let mut out = TextOut::default();
    let result = negotiation.handle(&Pairs::parse(text.as_bytes()).unwrap(), &mut out);
    (result, String::from_utf8(out.next_piece(usize::MAX).0).unwrap())
}

#[test]
fn offers_are_answered_by_the_rule_of_their_key() {
    let answer = |text: &str| offered(Offer::default(), text).1;
    assert_eq!(answer("InitialR2T=No\0"), "InitialR2T=No\0");
    assert_eq!(answer("InitialR2T=Yes\0"), "InitialR2T=Yes\0");
    assert_eq!(answer("ImmediateData=No\0"), "ImmediateData=No\0");
    assert_eq!(answer("MaxBurstLength=16777215\0"), "MaxBurstLength=1048576\0");
    assert_eq!(answer("MaxBurstLength=0x1000\0"), "MaxBurstLength=4096\0");
    assert_eq!(answer("DefaultTime2Wait=7\0DefaultTime2Retain=7\0"), "DefaultTime2Wait=7\0DefaultTime2Retain=0\0");
    assert_eq!(answer("MaxConnections=8\0ErrorRecoveryLevel=2\0"), "MaxConnections=1\0ErrorRecoveryLevel=0\0");
    assert_eq!(answer("DataPDUInOrder=No\0DataSequenceInOrder=No\0"), "DataPDUInOrder=Yes\0DataSequenceInOrder=Yes\0");
    assert_eq!(answer("HeaderDigest=X-other,CRC32C,None\0"), "HeaderDigest=CRC32C\0");
    assert_eq!(answer("HeaderDigest=None,CRC32C\0"), "HeaderDigest=None\0");
    assert_eq!(answer("X-com.example.key=1\0OFMarker=Yes\0"), "X-com.example.key=NotUnderstood\0OFMarker=No\0");
    assert_eq!(answer("MaxRecvDataSegmentLength=1024\0InitiatorAlias=me\0"), "");
}

#[test]
fn values_that_are_not_the_keys_are_refused() {
    for text in [
        "InitialR2T=yes\0",
        "MaxBurstLength=511\0",
        "MaxBurstLength=16777216\0",
        "MaxBurstLength=99999999999999999999\0",
        "MaxBurstLength=-1\0",
        "MaxBurstLength=\0",
        "MaxRecvDataSegmentLength=0\0",
        "MaxOutstandingR2T=0\0",
        "DefaultTime2Wait=3601\0",
        "HeaderDigest=\0",
        "ErrorRecoveryLevel=3\0",
    ] {
        assert!(offered(Offer::default(), text).0.is_err(), "{text}");
    }
    let required = Offer { data_digest: DigestPolicy::Required, ..Offer::default() };
    assert!(offered(required, "DataDigest=None\0").0.is_err());
}

#[test]
fn an_answer_outside_of_the_offer_is_refused() {
    let check = |answer: &str| {
        let mut negotiation = negotiation(Offer { initial_r2t: true, ..Offer::default() });
        negotiation.offer(&mut TextOut::default());
        negotiation.handle(&Pairs::parse(answer.as_bytes()).unwrap(), &mut TextOut::default())
    };
    assert!(check("MaxBurstLength=4096\0InitialR2T=Yes\0ImmediateData=No\0HeaderDigest=None\0").is_ok());
    assert!(check("MaxBurstLength=Irrelevant\0").is_ok());
    for wrong in [
        "MaxBurstLength=1048577\0",
        "InitialR2T=No\0",
        "DefaultTime2Wait=1\0",
        "HeaderDigest=MD5\0",
        "HeaderDigest=None,CRC32C\0",
        "MaxConnections=2\0",
        "MaxBurstLength=Reject\0",
    ] {
        assert!(check(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn text_is_pairs_within_bounds() {
    let pairs = |text: &[u8]| Pairs::parse(text).map(|pairs| pairs.iter().count());
    assert_eq!(pairs(b"a=b\0c=\0"), Ok(2));
    assert_eq!(pairs(b"a=b=c\0\0\0"), Ok(1));
    for wrong in [&b"a=b"[..], b"a\0", b"=b\0", b"a=1\0a=2\0", b"a b=1\0", b"a=\xff\0"] {
        assert!(pairs(wrong).is_err(), "{wrong:?}");
    }
    assert!(pairs(&[&[b'k'; 64][..], b"=1\0"].concat()).is_err());
    assert!(pairs(&[b"k=", &[b'1'; 5000][..], b"\0"].concat()).is_err());
    let many: Vec<u8> = (0..200).flat_map(|n| format!("k{n}=1\0").into_bytes()).collect();
    assert!(pairs(&many).is_err());
    let mut text = TextIn::default();
    assert!((0..4).all(|_| text.push(&[b'x'; 4096]).is_ok()) && text.push(b"x").is_err());
}

#[test]
fn text_is_sent_in_pieces_and_put_together_again() {
    let mut out = TextOut::default();
    for n in 0..50 {
        out.push(&format!("Key{n}"), &"v".repeat(n));
    }
    let (mut text, mut pieces) = (TextIn::default(), 0);
    loop {
        let (piece, more) = out.next_piece(100);
        assert!(piece.len() <= 100);
        text.push(&piece).unwrap();
        pieces += 1;
        if !more {
            break;
        }
    }
    assert!(pieces > 10);
    assert_eq!(text.take().unwrap().value("Key49"), Some(&"v".repeat(49)[..]));
}

#[test]
fn numbers_and_binaries_are_read_in_every_spelling() {
    assert_eq!(
        [number("10"), number("0x1F"), number("0x"), number("1a"), number("+1")],
        [Some(10), Some(31), None, None, None]
    );
    assert_eq!(binary("0x0aFF", 16), Some(vec![10, 255]));
    assert_eq!(binary("0xaff", 16), Some(vec![10, 255]));
    assert_eq!(binary("0bSGVsbG8=", 16), Some(b"Hello".to_vec()));
    for wrong in ["", "0x", "0b", "0bSGV", "0bSGVsbG9=", "0bS===", "0xzz", "aa", "0b====", "é"] {
        assert_eq!(binary(wrong, 16), None, "{wrong}");
    }
    assert_eq!(binary("0x0102", 1), None);
    assert!(is_name("iqn.2026-11.dev.decant:x") && is_name("eui.02004567A425678D".to_lowercase().as_str()));
    assert!(
        !is_name("iqn.") && !is_name("iqn.a b") && !is_name("disk") && !is_name(&format!("iqn.{}", "a".repeat(230)))
    );
    // What peers write is not what we write.
    assert!(is_peer_name("iqn.2008-11.org.linux-kvm:my_vm") && !is_name("iqn.2008-11.org.linux-kvm:my_vm"));
    for wrong in
        ["iqn.", "iqn.a b", "iqn.a,b", "iqn.a/b", "iqn.a=b", "iqn.a\u{7}", "disk", &format!("iqn.{}", "_".repeat(220))]
    {
        assert!(!is_peer_name(wrong), "{wrong}");
    }
}

#[test]
fn serial_numbers_wrap() {
    use crate::serial::Serial;
    assert!(Serial(u32::MAX).is_before(Serial(0)) && !Serial(0).is_before(Serial(u32::MAX)));
    assert!(!Serial(0).is_before(Serial(1 << 31)) && !Serial(1 << 31).is_before(Serial(0)));
    assert_eq!((Serial(5).since(Serial(u32::MAX)), Serial(5).since(Serial(6))), (6, 0));
}
