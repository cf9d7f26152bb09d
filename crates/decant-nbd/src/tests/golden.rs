//! The bytes on the wire, as the protocol document has them.

use super::pair::{client_config, server_config};
use crate::client::Client;
use crate::server::Server;
use crate::*;
use expect_test::{Expect, expect};

fn hex(bytes: &[u8]) -> String {
    bytes.chunks(16).map(|row| row.iter().map(|b| format!("{b:02x}")).collect::<Vec<_>>().join(" ") + "\n").collect()
}

fn check(bytes: &[u8], expected: Expect) {
    expected.assert_eq(&hex(bytes));
}

#[test]
fn handshake() {
    let mut wire = Vec::new();
    let mut server = Server::new(server_config(), &mut wire);
    check(
        &wire,
        expect![[r#"
            4e 42 44 4d 41 47 49 43 49 48 41 56 45 4f 50 54
            00 03
        "#]],
    );
    let mut client = Client::new(client_config());
    client.handle_connect();
    let mut answer = |wire: &mut Vec<u8>| {
        let mut out = Vec::new();
        let _ = client.handle_input(wire, &mut out).unwrap();
        wire.clear();
        let sent = out.clone();
        let _ = server.handle_input(&out, wire).unwrap();
        (sent, wire.clone())
    };
    let (sent, replied) = answer(&mut wire);
    check(
        &sent,
        expect![[r#"
            00 00 00 03 49 48 41 56 45 4f 50 54 00 00 00 08
            00 00 00 00
        "#]],
    );
    check(
        &replied,
        expect![[r#"
            00 03 e8 89 04 55 65 a9 00 00 00 08 00 00 00 01
            00 00 00 00
        "#]],
    );
    let (sent, replied) = answer(&mut wire);
    check(
        &sent,
        expect![[r#"
            49 48 41 56 45 4f 50 54 00 00 00 0a 00 00 00 32
            00 00 00 06 76 6f 6c 75 6d 65 00 00 00 02 00 00
            00 0f 62 61 73 65 3a 61 6c 6c 6f 63 61 74 69 6f
            6e 00 00 00 0d 64 65 63 61 6e 74 3a 63 72 63 33
            32 63
        "#]],
    );
    check(
        &replied,
        expect![[r#"
            00 03 e8 89 04 55 65 a9 00 00 00 0a 00 00 00 04
            00 00 00 13 00 00 00 01 62 61 73 65 3a 61 6c 6c
            6f 63 61 74 69 6f 6e 00 03 e8 89 04 55 65 a9 00
            00 00 0a 00 00 00 04 00 00 00 11 00 00 00 02 64
            65 63 61 6e 74 3a 63 72 63 33 32 63 00 03 e8 89
            04 55 65 a9 00 00 00 0a 00 00 00 01 00 00 00 00
        "#]],
    );
    let (sent, replied) = answer(&mut wire);
    check(
        &sent,
        expect![[r#"
            49 48 41 56 45 4f 50 54 00 00 00 07 00 00 00 0e
            00 00 00 06 76 6f 6c 75 6d 65 00 01 00 03
        "#]],
    );
    check(
        &replied,
        expect![[r#"
            00 03 e8 89 04 55 65 a9 00 00 00 07 00 00 00 03
            00 00 00 0c 00 00 00 00 00 00 00 01 00 00 09 ed
            00 03 e8 89 04 55 65 a9 00 00 00 07 00 00 00 03
            00 00 00 0e 00 03 00 00 02 00 00 00 10 00 02 00
            00 00 00 03 e8 89 04 55 65 a9 00 00 00 07 00 00
            00 01 00 00 00 00
        "#]],
    );
}

#[test]
fn requests() {
    let mut out = Vec::new();
    let request = |command| Request { cookie: 0x1122_3344_5566_7788, command, offset: 0x10_0000, length: 0x1000 };
    for command in [
        Command::Read { unfragmented: true },
        Command::Write { fua: true },
        Command::WriteZeroes { fua: true, no_hole: true, fast: true },
        Command::BlockStatus { one: true },
    ] {
        request(command).encode(&mut out);
    }
    check(
        &out,
        expect![[r#"
            25 60 95 13 00 04 00 00 11 22 33 44 55 66 77 88
            00 00 00 00 00 10 00 00 00 00 10 00 25 60 95 13
            00 01 00 01 11 22 33 44 55 66 77 88 00 00 00 00
            00 10 00 00 00 00 10 00 25 60 95 13 00 13 00 06
            11 22 33 44 55 66 77 88 00 00 00 00 00 10 00 00
            00 00 10 00 25 60 95 13 00 08 00 07 11 22 33 44
            55 66 77 88 00 00 00 00 00 10 00 00 00 00 10 00
        "#]],
    );
}

#[test]
fn replies() {
    let cookie = 0x1122_3344_5566_7788;
    let mut out = Vec::new();
    for header in [
        ReplyHeader::simple(cookie, Some(ErrorCode::NoSpace)),
        ReplyHeader::data(cookie, 0x10_0000, 0x1000, false),
        ReplyHeader::hole(cookie, 0x10_1000, 0x1000, true),
        ReplyHeader::block_status(cookie, Context::Digests, 1, true),
    ] {
        out.extend_from_slice(header.as_bytes());
    }
    put_descriptor(&mut out, 4096, 0xdead_beef);
    check(
        &out,
        expect![[r#"
            67 44 66 98 00 00 00 1c 11 22 33 44 55 66 77 88
            66 8e 33 ef 00 00 00 01 11 22 33 44 55 66 77 88
            00 00 10 08 00 00 00 00 00 10 00 00 66 8e 33 ef
            00 01 00 02 11 22 33 44 55 66 77 88 00 00 00 0c
            00 00 00 00 00 10 10 00 00 00 10 00 66 8e 33 ef
            00 01 00 05 11 22 33 44 55 66 77 88 00 00 00 0c
            00 00 00 02 00 00 10 00 de ad be ef
        "#]],
    );
}
