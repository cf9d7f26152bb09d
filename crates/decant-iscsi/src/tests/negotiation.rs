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
