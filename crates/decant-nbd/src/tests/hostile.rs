//! Peers that mean harm: the field's known holes, each by name.

use super::pair::{SIZE, client_config, server_config};
use crate::client::{self, Client};
use crate::server::{self, Server};
use crate::wire::{self, Put, chunk, option, reply};
use crate::*;

fn haggling(config: server::Config) -> Server {
    let mut out = Vec::new();
    let mut server = Server::new(config, &mut out);
    let step = server.handle_input(&3u32.to_be_bytes(), &mut out).unwrap();
    assert_eq!((step.consumed, step.event), (4, None));
    server
}

fn ask(kind: u32, length: u32, data: &[u8]) -> Vec<u8> {
    let mut bytes = Vec::new();
    bytes.put_u64(wire::IHAVEOPT);
    bytes.put_u32(kind);
    bytes.put_u32(length);
    bytes.extend_from_slice(data);
    bytes
}

fn option(kind: u32, data: &[u8]) -> Vec<u8> {
    ask(kind, data.len() as u32, data)
}

/// The types of the replies to options in `out`.
fn kinds(mut out: &[u8]) -> Vec<u32> {
    let mut kinds = Vec::new();
    while let Some((head, rest)) = out.split_first_chunk::<20>() {
        kinds.push(u32::from_be_bytes(head[12..16].try_into().unwrap()));
        out = &rest[u32::from_be_bytes(head[16..20].try_into().unwrap()) as usize..];
    }
    kinds
}

fn say(server: &mut Server, bytes: &[u8]) -> Result<(Vec<u32>, Option<server::Event>), Violation> {
    let mut out = Vec::new();
    let step = server.handle_input(bytes, &mut out)?;
    Ok((kinds(&out), step.event))
}

fn named(name_length: u32, name: &[u8], tail: &[u8]) -> Vec<u8> {
    [&name_length.to_be_bytes(), name, tail].concat()
}

/// CVE-2022-26495 (a length of 0xffffffff that overflows), CVE-2022-26496 and CVE-2025-47711-like lengths that disagree.
#[test]
fn lengths_that_lie_are_refused() {
    let mut server = haggling(server_config());
    for kind in [option::GO, option::INFO] {
        for data in [
            named(u32::MAX, b"volume", &[0, 0]),
            named(7, b"volume", &[0, 0]),
            named(6, b"volume", &[0, 1]),
            named(6, b"volume", &[0, 0, 0, 0]),
            named(6, b"volume", &[]),
            vec![0, 0],
            vec![],
        ] {
            assert_eq!(say(&mut server, &option(kind, &data)), Ok((vec![reply::ERR_INVALID], None)));
        }
    }
    assert_eq!(say(&mut server, &option(option::STRUCTURED_REPLY, &[1])), Ok((vec![reply::ERR_INVALID], None)));
    assert_eq!(say(&mut server, &option(option::STRUCTURED_REPLY, &[])), Ok((vec![reply::ACK], None)));
    for tail in [&[255, 255, 255, 255][..], &[0, 0, 0, 1], &[0, 0, 0, 1, 255, 255, 255, 255, 1], &[0, 0, 0, 0, 7]] {
        let data = named(6, b"volume", tail);
        for kind in [option::SET_META_CONTEXT, option::LIST_META_CONTEXT] {
            assert_eq!(say(&mut server, &option(kind, &data)), Ok((vec![reply::ERR_INVALID], None)));
        }
    }
    // The server is as sane as before.
    let go = option(option::GO, &named(6, b"volume", &[0, 0]));
    let (kinds, event) = say(&mut server, &go).unwrap();
    assert_eq!((kinds.last(), event), (Some(&reply::ACK), Some(server::Event::Connected)));
}

/// Export names of 4096 bytes (a stack smash elsewhere), CVE-2020-10761 (an assertion on a long error message).
#[test]
fn names_of_any_length_are_refused_cleanly() {
    for length in [255usize, 256, 4095, 4096, 4097, 8192, 16_000] {
        let mut server = haggling(server_config());
        let name = vec![b'a'; length];
        let go = option(option::GO, &named(length as u32, &name, &[0, 0]));
        let expected = if length > MAX_NAME { reply::ERR_TOO_BIG } else { reply::ERR_UNKNOWN };
        assert_eq!(say(&mut server, &go), Ok((vec![expected], None)));
        assert_eq!(say(&mut server, &option(option::EXPORT_NAME, &name)), Err(Violation::ExportName("no such export")));
    }
    // Longer than anything legitimate: skipped without being kept, or the end.
    let mut server = haggling(server_config());
    let (kinds, event) = say(&mut server, &ask(option::GO, 1_000_000, &[])).unwrap();
    assert_eq!((kinds, event), (vec![reply::ERR_TOO_BIG], None));
    let skipped = server.handle_input(&vec![0xff; 999_999], &mut Vec::new()).unwrap();
    assert_eq!(skipped.consumed, 999_999);
    let again = [&[0xff][..], &option(option::LIST, &[])].concat();
    assert_eq!(say(&mut server, &again), Ok((vec![reply::SERVER, reply::ACK], None)));
    assert!(matches!(say(&mut server, &ask(option::GO, u32::MAX, &[])), Err(Violation::TooLong { .. })));
    let mut server = haggling(server_config());
    assert!(matches!(say(&mut server, &ask(option::EXPORT_NAME, 20_000, &[])), Err(Violation::TooLong { .. })));
}

/// CVE-2021-3716: what a man in the middle said before TLS must not count inside it.
#[test]
fn starttls_forgets() {
    let mut server = haggling(server::Config { tls_required: true, ..server_config() });
    for early in [option::STRUCTURED_REPLY, option::LIST, option::GO, option::SET_META_CONTEXT, 77] {
        assert_eq!(say(&mut server, &option(early, &[])), Ok((vec![reply::ERR_TLS_REQD], None)));
    }
    let hello = option(option::STARTTLS, &[]);
    assert_eq!(say(&mut server, &hello), Ok((vec![reply::ACK], Some(server::Event::StartTls))));
    // Plaintext that follows is not taken as said inside TLS.
    let injected = option(option::STRUCTURED_REPLY, &[]);
    assert_eq!(say(&mut server, &injected), Err(Violation::PlaintextAfterStartTls));
    server.handle_tls_started();
    assert!(!server.structured());
    assert_eq!(say(&mut server, &hello), Ok((vec![reply::ERR_INVALID], None)));

    // The client likewise: replies that an attacker put behind the acknowledgement.
    let mut client = Client::new(client::Config { tls: true, ..client_config() });
    client.handle_connect();
    let mut greeting = Vec::new();
    let _ = Server::new(server_config(), &mut greeting);
    let _ = client.handle_input(&greeting, &mut Vec::new()).unwrap();
    let ack = answer(option::STARTTLS, reply::ACK, &[]);
    let early = answer(option::STRUCTURED_REPLY, reply::ACK, &[]);
    let step = client.handle_input(&[ack.clone(), early.clone()].concat(), &mut Vec::new()).unwrap();
    assert_eq!((step.consumed, step.event), (ack.len(), Some(client::Event::StartTls)));
    assert_eq!(client.handle_input(&early, &mut Vec::new()), Err(Violation::PlaintextAfterStartTls));
}

#[test]
fn a_handshake_ends() {
    let mut server = haggling(server_config());
    let list = option(option::LIST, &[]);
    let result = (0..100).try_for_each(|_| say(&mut server, &list).map(|_| ()));
    assert_eq!(result, Err(Violation::EndlessHandshake));
    assert_eq!(
        haggling(server_config()).handle_input(&[0; 16], &mut Vec::new()),
        Err(Violation::Magic { expected: "an option", found: 0 })
    );
}

#[test]
fn requests_that_do_not_fit_are_refused_and_the_stream_stays_in_step() {
    let mut server = haggling(server_config());
    let go = option(option::GO, &named(6, b"volume", &[0, 0]));
    let _ = say(&mut server, &go).unwrap();
    let error_of = |server: &mut Server, flags: u16, kind: u16, offset: u64, length: u32| {
        let mut bytes = Vec::new();
        bytes.put_u32(wire::REQUEST);
        bytes.put_u16(flags);
        bytes.put_u16(kind);
        bytes.put_u64(7);
        bytes.put_u64(offset);
        bytes.put_u32(length);
        let mut out = Vec::new();
        let step = server.handle_input(&bytes, &mut out).unwrap();
        assert_eq!((step.consumed, step.event), (28, None));
        assert_eq!(out[8..16], 7u64.to_be_bytes());
        u32::from_be_bytes(out[4..8].try_into().unwrap())
    };
    let size = SIZE as u64;
    let server = &mut server;
    assert_eq!(error_of(server, 0, 0, size, 512), 22);
    assert_eq!(error_of(server, 0, 0, u64::MAX - 511, 512), 22);
    assert_eq!(error_of(server, 0, 0, u64::MAX, u32::MAX), 22);
    assert_eq!(error_of(server, 0, 0, 1, 512), 22, "misaligned");
    assert_eq!(error_of(server, 4, 0, 0, 512), 22, "DF without structured replies");
    assert_eq!(error_of(server, 0, 7, 0, 512), 22, "block status without contexts");
    assert_eq!(error_of(server, 0, 6, size - 512, 1024), 28);
    assert_eq!(error_of(server, 0, 42, 0, 0), 22);
    assert_eq!(error_of(server, 0x8000, 0, 0, 512), 22);
    // A write of 4 GiB: refused at once, its payload passes by and is kept nowhere.
    assert_eq!(error_of(server, 0, 1, 0, u32::MAX - 511), 28);
    let mut left = u64::from(u32::MAX - 511);
    let junk = vec![0x25; 1 << 20];
    while left > 0 {
        let count = left.min(junk.len() as u64);
        let step = server.handle_input(&junk[..count as usize], &mut Vec::new()).unwrap();
        assert_eq!(step.consumed as u64, count);
        left -= count;
    }
    assert_eq!(error_of(server, 0, 0, size, 512), 22);
}

fn answer(kind: u32, reply: u32, data: &[u8]) -> Vec<u8> {
    let mut out = Vec::new();
    out.put_u64(wire::OPTION_REPLY);
    out.put_u32(kind);
    out.put_u32(reply);
    out.put_u32(data.len() as u32);
    out.extend_from_slice(data);
    out
}

fn described(size: u64) -> Vec<u8> {
    [&[0, 0][..], &size.to_be_bytes(), &[0, 1]].concat()
}

/// A client that has one read of 8 KiB at 4 KiB (tag 5) and, with `status`, a block status of it (tag 6) outstanding.
fn waiting(status: bool) -> Client {
    let mut client = Client::new(client_config());
    client.handle_connect();
    let mut bytes = Vec::new();
    let _ = Server::new(server_config(), &mut bytes);
    bytes.extend(answer(option::STRUCTURED_REPLY, reply::ACK, &[]));
    for (id, context) in [(1u32, Context::Allocation), (2, Context::Digests)] {
        let data = [&id.to_be_bytes()[..], context.name().as_bytes()].concat();
        bytes.extend(answer(option::SET_META_CONTEXT, reply::META_CONTEXT, &data));
    }
    bytes.extend(answer(option::SET_META_CONTEXT, reply::ACK, &[]));
    bytes.extend(answer(option::GO, reply::INFO, &described(SIZE as u64)));
    bytes.extend(answer(option::GO, reply::ACK, &[]));
    let step = client.handle_input(&bytes, &mut Vec::new()).unwrap();
    assert_eq!((step.consumed, step.event), (bytes.len(), Some(client::Event::Ready)));
    client.request(5, Command::Read { unfragmented: false }, 4096, 8192, &mut Vec::new()).unwrap();
    if status {
        client.request(6, Command::BlockStatus { one: false }, 4096, 8192, &mut Vec::new()).unwrap();
    }
    client
}

fn reply_chunk(kind: u16, done: bool, cookie: u64, length: u32, body: &[u8]) -> Vec<u8> {
    [ReplyHeader::chunk(cookie, kind, done, length, &[]).as_bytes(), body].concat()
}

fn first_error(client: &mut Client, bytes: &[u8]) -> Option<Violation> {
    let mut rest = bytes;
    loop {
        match client.handle_input(rest, &mut Vec::new()) {
            Err(violation) => return Some(violation),
            Ok(step) => {
                rest = &rest[step.consumed..];
                match step.event {
                    None => return None,
                    Some(client::Event::Data { length, .. }) => rest = rest.get(length as usize..).unwrap_or(&[]),
                    Some(_) => {}
                }
            }
        }
    }
}

#[test]
fn answers_that_were_not_asked_for_end_the_connection() {
    let at = |offset: u64, count: u32| [&offset.to_be_bytes()[..], &count.to_be_bytes()].concat();
    let hole = |offset: u64, count: u32, done| reply_chunk(chunk::OFFSET_HOLE, done, 0, 12, &at(offset, count));
    let outside = |offset, length| Some(Violation::OutOfRange { offset, length });
    let check = |bytes: Vec<u8>, expected: Option<Violation>| {
        assert_eq!(first_error(&mut waiting(false), &bytes), expected);
    };
    check(hole(4096, 8192, true), None);
    check([hole(8192, 4096, false), hole(4096, 4096, true)].concat(), None);
    check(hole(0, 4096, true), outside(0, 4096));
    check(hole(8192, 8192, true), outside(8192, 8192));
    check(hole(u64::MAX, 4096, true), outside(u64::MAX, 4096));
    check(hole(4096, 0, true), outside(4096, 0));
    check([hole(4096, 4096, false), hole(4096, 4096, true)].concat(), outside(4096, 4096));
    check([hole(8192, 4096, false), hole(6144, 4096, true)].concat(), outside(6144, 4096));
    check(hole(4096, 4096, true), Some(Violation::Incomplete));
    check(reply_chunk(chunk::NONE, true, 0, 0, &[]), Some(Violation::Incomplete));
    check(reply_chunk(chunk::NONE, false, 0, 0, &[]), Some(Violation::Malformed("empty reply chunk")));
    check(reply_chunk(chunk::NONE, true, 99, 0, &[]), Some(Violation::UnknownCookie(99)));
    check(reply_chunk(chunk::NONE, true, 1 << 32, 0, &[]), Some(Violation::UnknownCookie(1 << 32)));
    check(reply_chunk(chunk::OFFSET_DATA, true, 0, 7, &[]), Some(Violation::Malformed("data chunk")));
    check(reply_chunk(chunk::OFFSET_DATA, true, 0, 8, &[0; 8]), outside(0, 0));
    check(
        reply_chunk(chunk::OFFSET_DATA, true, 0, u32::MAX, &4096u64.to_be_bytes()),
        outside(4096, u64::from(u32::MAX) - 8),
    );
    check(reply_chunk(chunk::BLOCK_STATUS, true, 0, 12, &[0; 12]), Some(Violation::WrongChunk(chunk::BLOCK_STATUS)));
    check(reply_chunk(77, true, 0, 0, &[]), Some(Violation::WrongChunk(77)));
    check(reply_chunk(chunk::ERROR, true, 0, 6, &[0; 6]), Some(Violation::Malformed("error chunk")));
    check(reply_chunk(chunk::ERROR, true, 0, 6, &[0, 0, 0, 5, 0, 1]), Some(Violation::Malformed("error chunk")));
    check(reply_chunk(chunk::ERROR_OFFSET, true, 0, 6, &[0, 0, 0, 5, 0, 0]), Some(Violation::Malformed("error chunk")));
    let long = Violation::TooLong { what: "an error chunk", length: 1 << 20, limit: 4110 };
    check(reply_chunk(chunk::ERROR, true, 0, 1 << 20, &[]), Some(long));
    // A success without content is none (CVE-2022-0485: ignored errors); a plain success for a read neither.
    let simple = ReplyHeader::simple(0, None);
    check(simple.as_bytes().to_vec(), Some(Violation::WrongChunk(chunk::NONE)));
    check(vec![0xff; 16], Some(Violation::Magic { expected: "a reply", found: 0xffff_ffff }));
}

#[test]
fn block_status_is_checked() {
    let body = |id: u32, pairs: &[(u32, u32)]| {
        let mut body = id.to_be_bytes().to_vec();
        pairs.iter().for_each(|(length, flags)| put_descriptor(&mut body, *length, *flags));
        body
    };
    let status = |id, done, pairs: &[(u32, u32)]| {
        let body = body(id, pairs);
        reply_chunk(chunk::BLOCK_STATUS, done, 1, body.len() as u32, &body)
    };
    let check = |bytes: Vec<u8>, expected: Option<Violation>| {
        assert_eq!(first_error(&mut waiting(true), &bytes), expected);
    };
    let outside = |offset, length| Some(Violation::OutOfRange { offset, length });
    check([status(1, false, &[(4096, 0), (4096, 3)]), status(2, true, &[(4096, 9)])].concat(), None);
    // The last may reach beyond what was asked, and is cut.
    check([status(1, false, &[(1 << 30, 0)]), status(2, true, &[(4096, 9)])].concat(), None);
    check(status(1, true, &[(4096, 0)]), Some(Violation::Incomplete));
    check(status(1, true, &[(0, 0)]), outside(4096, 0));
    check(status(1, true, &[(u32::MAX, 0), (4096, 0)]), outside(4096, u32::MAX.into()));
    check(status(1, true, &[(8192, 0), (4096, 0)]), outside(12_288, 4096));
    check(status(3, true, &[(8192, 0)]), Some(Violation::Malformed("block status of a context that was not agreed")));
    check(
        [status(1, false, &[(4096, 0)]), status(1, true, &[(4096, 0)])].concat(),
        Some(Violation::Malformed("block status: a context twice")),
    );
    for length in [0, 4, 11, 13, 3] {
        let bytes = reply_chunk(chunk::BLOCK_STATUS, true, 1, length, &[0; 16]);
        check(bytes, Some(Violation::Malformed("block status chunk")));
    }
    let many = reply_chunk(chunk::BLOCK_STATUS, true, 1, u32::MAX - 3, &[]);
    assert!(matches!(first_error(&mut waiting(true), &many), Some(Violation::TooLong { .. })));
}

/// CVE-2023-5215: sizes that turn negative.
#[test]
fn exports_of_impossible_size_are_refused() {
    for size in [1u64 << 63, u64::MAX - 1, u64::MAX] {
        let mut client = Client::new(client::Config { contexts: Contexts::NONE, ..client_config() });
        client.handle_connect();
        let mut bytes = Vec::new();
        let _ = Server::new(server_config(), &mut bytes);
        bytes.extend(answer(option::STRUCTURED_REPLY, reply::ACK, &[]));
        bytes.extend(answer(option::GO, reply::INFO, &described(size)));
        assert_eq!(client.handle_input(&bytes, &mut Vec::new()), Err(Violation::ExportSize(size)));
    }
    // No size at all, and sizes of blocks that cannot be.
    for (info, expected) in [
        (None, Violation::Malformed("NBD_OPT_GO: no size and flags")),
        (Some([0, 3, 0, 0, 0, 3, 0, 0, 16, 0, 0, 0, 16, 0]), Violation::Malformed("block sizes")),
        (Some([0, 3, 0, 0, 16, 0, 0, 0, 2, 0, 0, 0, 16, 0]), Violation::Malformed("block sizes")),
        (Some([0, 3, 0, 0, 16, 0, 0, 0, 16, 0, 0, 0, 2, 0]), Violation::Malformed("block sizes")),
    ] {
        let mut client = Client::new(client::Config { contexts: Contexts::NONE, ..client_config() });
        client.handle_connect();
        let mut bytes = Vec::new();
        let _ = Server::new(server_config(), &mut bytes);
        bytes.extend(answer(option::STRUCTURED_REPLY, reply::ACK, &[]));
        bytes.extend(info.map(|info| answer(option::GO, reply::INFO, &info)).unwrap_or_default());
        bytes.extend(answer(option::GO, reply::ACK, &[]));
        assert_eq!(client.handle_input(&bytes, &mut Vec::new()), Err(expected));
    }
}

#[test]
fn servers_that_are_too_old_or_talk_too_much_are_refused() {
    let connect = || {
        let mut client = Client::new(client_config());
        client.handle_connect();
        client
    };
    let old = [&wire::NBDMAGIC.to_be_bytes()[..], &0x0000_4202_8186_1253u64.to_be_bytes(), &[0; 136]].concat();
    assert_eq!(connect().handle_input(&old, &mut Vec::new()), Err(Violation::OldStyle));
    let not_fixed = [&wire::NBDMAGIC.to_be_bytes()[..], &wire::IHAVEOPT.to_be_bytes(), &[0, 0]].concat();
    assert_eq!(connect().handle_input(&not_fixed, &mut Vec::new()), Err(Violation::OldStyle));
    let http = b"HTTP/1.1 400 Bad Request\r\n";
    assert!(matches!(connect().handle_input(http, &mut Vec::new()), Err(Violation::Magic { .. })));
    let mut greeting = Vec::new();
    let _ = Server::new(server_config(), &mut greeting);
    let long = ask_reply(option::STRUCTURED_REPLY, 1 << 20);
    let result = connect().handle_input(&[greeting.clone(), long].concat(), &mut Vec::new());
    assert!(matches!(result, Err(Violation::TooLong { .. })));
    let other = answer(option::GO, reply::ACK, &[]);
    let result = connect().handle_input(&[greeting, other].concat(), &mut Vec::new());
    assert_eq!(result, Err(Violation::UnaskedReply { option: option::GO, reply: reply::ACK }));
}

fn ask_reply(kind: u32, length: u32) -> Vec<u8> {
    let mut bytes = answer(kind, reply::ACK, &[]);
    bytes.truncate(16);
    bytes.put_u32(length);
    bytes
}
