//! What holds for any input.

use super::pair::{Pair, SIZE, client_config, server_config};
use crate::client::{self, Client};
use crate::server::{self, Server};
use crate::*;
use proptest::collection::vec;
use proptest::prelude::*;

fn cases() -> ProptestConfig {
    let scale: u32 = std::env::var("DECANT_TEST_SCALE").ok().and_then(|s| s.parse().ok()).unwrap_or(1);
    ProptestConfig { failure_persistence: None, ..ProptestConfig::with_cases(200 * scale) }
}

/// A server in any phase of its life.
fn server_in(phase: u8) -> Server {
    let mut out = Vec::new();
    let mut server = Server::new(server_config(), &mut out);
    let structured = [&wire::IHAVEOPT.to_be_bytes()[..], &[0, 0, 0, 8], &[0; 4]].concat();
    let go = [&wire::IHAVEOPT.to_be_bytes()[..], &[0, 0, 0, 7, 0, 0, 0, 12, 0, 0, 0, 6], b"volume", &[0, 0]].concat();
    for said in [&[0, 0, 0, 3][..], &structured, &go].into_iter().take(phase.into()) {
        let _ = server.handle_input(said, &mut out).unwrap();
    }
    server
}

/// A client in any phase of its life, in the last with reads outstanding.
fn client_in(phase: u8) -> Client {
    let mut pair = Pair::new(client_config(), server_config());
    if phase > 0 {
        pair.deliver(18).unwrap();
    }
    if phase > 1 {
        pair.run(64);
        for tag in 0..4 {
            pair.request(tag, Command::Read { unfragmented: false }, tag * 8192, 8192).unwrap();
            pair.request(tag, Command::BlockStatus { one: false }, tag * 8192, 8192).unwrap();
        }
    }
    pair.client
}

fn drive_server(server: &mut Server, mut input: &[u8]) -> Vec<server::Event> {
    let mut events = Vec::new();
    while let Ok(step) = server.handle_input(input, &mut Vec::new()) {
        input = &input[step.consumed..];
        let Some(event) = step.event else { break };
        if let server::Event::Request(request) = &event {
            assert!(request.end().unwrap() <= SIZE as u64, "no request reaches past the export");
            if matches!(request.command, Command::Write { .. }) {
                input = input.get(request.length as usize..).unwrap_or_default();
            }
        }
        events.push(event);
    }
    events
}

fn drive_client(client: &mut Client, mut input: &[u8]) -> Vec<client::Event> {
    let mut events = Vec::new();
    while let Ok(step) = client.handle_input(input, &mut Vec::new()) {
        input = &input[step.consumed..];
        let Some(event) = step.event else { break };
        if let client::Event::Data { offset, length, .. } = &event {
            assert!(offset + u64::from(*length) <= SIZE as u64);
            input = input.get(*length as usize..).unwrap_or_default();
        }
        events.push(event);
    }
    events
}

/// Bytes that look like the protocol more often than chance would have it.
fn plausible() -> impl Strategy<Value = Vec<u8>> {
    let piece = prop_oneof![
        Just(wire::IHAVEOPT.to_be_bytes().to_vec()),
        Just(wire::OPTION_REPLY.to_be_bytes().to_vec()),
        Just(wire::NBDMAGIC.to_be_bytes().to_vec()),
        Just(wire::REQUEST.to_be_bytes().to_vec()),
        Just(wire::SIMPLE_REPLY.to_be_bytes().to_vec()),
        Just(wire::STRUCTURED_REPLY.to_be_bytes().to_vec()),
        (0u32..12).prop_map(|n| n.to_be_bytes().to_vec()),
        (0u16..8).prop_map(|n| n.to_be_bytes().to_vec()),
        (0u64..12).prop_map(|n| (n * 4096).to_be_bytes().to_vec()),
        (0u32..6).prop_map(|n| (n * 4096).to_be_bytes().to_vec()),
        vec(any::<u8>(), 0..9),
    ];
    vec(piece, 0..40).prop_map(|pieces| pieces.concat())
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn no_bytes_harm_the_server(phase in 0u8..4, bytes in prop_oneof![plausible(), vec(any::<u8>(), 0..300)]) {
        drive_server(&mut server_in(phase), &bytes);
    }

    #[test]
    fn no_bytes_harm_the_client(phase in 0u8..3, bytes in prop_oneof![plausible(), vec(any::<u8>(), 0..300)]) {
        drive_client(&mut client_in(phase), &bytes);
    }

    /// A valid answer with one byte changed, or cut: an error or some answer within what was asked, never a panic, and never
    /// more than one Done for a request.
    #[test]
    fn a_damaged_answer_is_contained(at in 0usize..9000, flip in 1u8.., cut in any::<bool>()) {
        let mut client = client_in(2);
        let mut bytes = Vec::new();
        // Slots are used in turn: the read of tag 0 has cookie 0.
        bytes.extend_from_slice(ReplyHeader::data(0, 0, 4096, false).as_bytes());
        bytes.extend(vec![0xabu8; 4096]);
        bytes.extend_from_slice(ReplyHeader::hole(0, 4096, 4096, true).as_bytes());
        for context in [Context::Allocation, Context::Digests] {
            let header = ReplyHeader::block_status(1, context, 2, context == Context::Digests);
            bytes.extend_from_slice(header.as_bytes());
            put_descriptor(&mut bytes, 4096, 1);
            put_descriptor(&mut bytes, 4096, 2);
        }
        prop_assert_eq!(drive_client(&mut client.clone(), &bytes).len(), 8);
        let at = at % bytes.len();
        if cut { bytes.truncate(at) } else { bytes[at] ^= flip }
        let events = drive_client(&mut client, &bytes);
        let done = events.iter().filter(|event| matches!(event, client::Event::Done { .. })).count();
        prop_assert!(done <= 2);
    }

    #[test]
    fn requests_survive_the_wire(
        cookie in any::<u64>(), offset in any::<u64>(), length in any::<u32>(), kind in 0u16..12, flags in 0u16..32
    ) {
        let (command, _) = Command::decode(kind, flags);
        let request = Request { cookie, command, offset, length };
        let mut bytes = Vec::new();
        request.encode(&mut bytes);
        prop_assert_eq!(Request::decode(&bytes), Ok(Some((request, 0))));
        prop_assert_eq!(Request::decode(&bytes[..27]), Ok(None));
    }

    /// The same events come out however the stream is cut.
    #[test]
    fn cuts_do_not_matter(step in 1usize..200, offset in 0u64..100, blocks in 1u32..20) {
        let offset = offset * 512;
        let run = |step: usize| {
            let mut pair = Pair::new(client_config(), server_config());
            pair.run(step);
            pair.request(1, Command::Read { unfragmented: false }, offset, blocks * 512).unwrap();
            pair.request(2, Command::BlockStatus { one: false }, offset, blocks * 512).unwrap();
            pair.run(step);
            (pair.events, pair.received, pair.extents, pair.done, pair.error)
        };
        prop_assert_eq!(run(step), run(usize::MAX));
    }
}
