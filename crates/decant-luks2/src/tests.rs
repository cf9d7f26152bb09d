//! Golden bytes, hostile headers, damage, and what the cipher promises. Real cryptsetup is in tests/cryptsetup.rs.

use aws_lc_rs::digest::{SHA256, digest};
use expect_test::expect;
use proptest::prelude::*;
use serde_json::{Value, json};

use crate::binary::{self, HeaderCopy};
use crate::kdf::Hash;
use crate::*;

/// A counter behind SHA-256: the same bytes for the same seed, for ever.
pub(crate) struct Seeded(pub(crate) u64);

impl Entropy for Seeded {
    fn fill(&mut self, buffer: &mut [u8]) -> Result<(), Error> {
        for chunk in buffer.chunks_mut(32) {
            self.0 += 1;
            chunk.copy_from_slice(&digest(&SHA256, &self.0.to_be_bytes()).as_ref()[..chunk.len()]);
        }
        Ok(())
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn sha256(bytes: &[u8]) -> String {
    hex(digest(&SHA256, bytes).as_ref())
}

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(text.as_bytes().to_vec()).unwrap()
}

fn shape() -> NewHeader {
    NewHeader {
        payload_offset: HEADER_4_MIB,
        payload_size: None,
        sector_size: 4096,
        iv_tweak: 0,
        uuid: None,
        label: "orders".to_owned(),
        kdf: Kdf::RANDOM_PASSPHRASE,
    }
}

fn key() -> VolumeKey {
    VolumeKey::generate(&mut Seeded(7)).unwrap()
}

fn area() -> Vec<u8> {
    shape().build(&key(), &passphrase("secret"), &mut Seeded(0)).unwrap()
}

/// Rewrites the JSON of both copies and gives them fresh checksums, as an attacker would.
fn craft(edit: impl FnOnce(&mut Value)) -> Vec<u8> {
    let area = area();
    let text = area[4096..0x4000].split(|byte| *byte == 0).next().unwrap();
    let mut metadata: Value = serde_json::from_slice(text).unwrap();
    edit(&mut metadata);
    reseal(area, &serde_json::to_vec(&metadata).unwrap())
}

fn reseal(mut area: Vec<u8>, json: &[u8]) -> Vec<u8> {
    for (at, copy) in [(0, HeaderCopy::Primary), (0x4000, HeaderCopy::Secondary)] {
        let fields = binary::decode(&area[at..at + 0x4000], copy, at as u64).unwrap();
        area[at..at + 0x4000].copy_from_slice(&binary::encode(&fields, copy, json));
    }
    area
}

fn refusal(area: &[u8]) -> String {
    match Header::read(area, &Limits::PEER) {
        Ok(_) => "accepted".to_owned(),
        Err(error) => format!("{}: {error}", error.name()),
    }
}

#[test]
fn golden_header() {
    let area = area();
    assert_eq!(area.len(), 290_816);
    assert_eq!(sha256(&area), "eaa9bd21abd4b91cd7e99d456ae6f354179cf83e7daad7bbc4befa648fdb8b77");
    let text = area[4096..0x4000].split(|byte| *byte == 0).next().unwrap();
    expect![[r#"{"keyslots":{"0":{"type":"luks2","key_size":64,"af":{"type":"luks1","stripes":4000,"hash":"sha256"},"area":{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64","key_size":64},"kdf":{"type":"pbkdf2","hash":"sha256","iterations":1000,"salt":"zSZiFU5tdrKyuS5wwMrDzPU0+bdOtbiYGexQkIPQClA="}}},"tokens":{},"segments":{"0":{"type":"crypt","offset":"4194304","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64","sector_size":4096}},"digests":{"0":{"type":"pbkdf2","keyslots":["0"],"segments":["0"],"hash":"sha256","iterations":1000,"salt":"zQSkdUSY4G21oTxfNx8fBP9tJHDySqm9iGVA5dznf3A=","digest":"qE5a+2nofg6adw6/wgv6K7PSM6czvzF6pK4RKoqh8gw="}},"config":{"json_size":"12288","keyslots_size":"4161536"}}"#]].assert_eq(std::str::from_utf8(text).unwrap());
    // Without salts and checksum: magic to label, algorithm, uuid to offset.
    let fields = [&area[..104], &area[168..448]].concat();
    expect!["4c554b53babe0002000000000000400000000000000000016f7264657273000000000000000000000000000000000000000000000000000000000000000000000000000000000000736861323536000000000000000000000000000000000000000000000000000061336562386462382d396663352d343233632d386664342d39353835303539663239326200000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000000"].assert_eq(&hex(&fields));
}

#[test]
fn what_is_made_opens() {
    for (payload_offset, sector_size) in [(HEADER_4_MIB, 512), (HEADER_16_MIB, 4096), (290_816, 4096)] {
        for kdf in [Kdf::RANDOM_PASSPHRASE, Kdf::Argon2id { passes: 1, memory_kib: 64, lanes: 2 }] {
            let new = NewHeader { payload_offset, sector_size, kdf, iv_tweak: 9, ..shape() };
            let area = new.build(&key(), &passphrase("secret"), &mut Seeded(1)).unwrap();
            let header = Header::read(&area[..], &Limits::PEER).unwrap();
            assert_eq!(*header.layout(), Layout { payload_offset, payload_size: None, sector_size, iv_tweak: 9 });
            assert_eq!((header.label(), header.seqid(), header.area_bytes()), ("orders", 1, area.len() as u64));
            assert!(header.unlock(&area[..], &passphrase("secret")).unwrap().expose() == key().expose());
            let wrong = header.unlock(&area[..], &passphrase("Secret")).err().unwrap();
            assert_eq!(wrong.name(), "luks2-wrong-passphrase");
        }
    }
}

#[test]
fn a_volume_keeps_its_identity_behind_another_header() {
    let source = Header::read(&area()[..], &Limits::PEER).unwrap();
    let new = NewHeader::like(&source, HEADER_16_MIB, Kdf::RANDOM_PASSPHRASE);
    let area = new.build(&key(), &passphrase("other"), &mut Seeded(2)).unwrap();
    let header = Header::read(&area[..], &Limits::OWN).unwrap();
    assert_eq!(header.uuid(), source.uuid());
    assert_eq!(header.layout().payload_offset, HEADER_16_MIB);
    assert!(header.unlock(&area[..], &passphrase("other")).unwrap().expose() == key().expose());
}

#[test]
fn either_copy_is_enough() {
    let whole = area();
    for (damage, copy) in [(100, HeaderCopy::Primary), (0, HeaderCopy::Primary), (0x4000 + 5000, HeaderCopy::Secondary)]
    {
        let mut area = whole.clone();
        area[damage] ^= 1;
        let header = Header::read(&area[..], &Limits::OWN).unwrap();
        assert_eq!(header.stale_copy(), Some(copy));
        assert!(header.unlock(&area[..], &passphrase("secret")).is_ok());
        let (at, bytes) = header.repair(&mut Seeded(3)).unwrap().unwrap();
        area[at as usize..at as usize + bytes.len()].copy_from_slice(&bytes);
        let header = Header::read(&area[..], &Limits::OWN).unwrap();
        assert_eq!(header.stale_copy(), None);
        assert!(header.repair(&mut Seeded(3)).unwrap().is_none());
    }
    let mut area = whole;
    area[5000] ^= 1;
    area[0x4000 + 5000] ^= 1;
    expect![
        "luks2-damaged: both copies of the header are damaged (first: checksum mismatch; second: checksum mismatch)"
    ]
    .assert_eq(&refusal(&area));
}

#[test]
fn the_newer_copy_wins() {
    let mut area = area();
    let mut fields = binary::decode(&area[0x4000..0x8000], HeaderCopy::Secondary, 0x4000).unwrap();
    fields.seqid = 2;
    fields.label = "newer".to_owned();
    let json = area[4096..0x4000].to_vec();
    area[0x4000..0x8000].copy_from_slice(&binary::encode(&fields, HeaderCopy::Secondary, &json));
    let header = Header::read(&area[..], &Limits::OWN).unwrap();
    assert_eq!((header.label(), header.seqid(), header.stale_copy()), ("newer", 2, Some(HeaderCopy::Primary)));
}

/// Each edit is made with fresh checksums: nothing but validation stands in its way.
#[test]
fn hostile_headers_are_refused() {
    type Edit = (&'static str, fn(&mut Value));
    let edits: &[Edit] = &[
        ("null payload cipher", |m| m["segments"]["0"]["encryption"] = json!("cipher_null-ecb")),
        ("other payload cipher", |m| m["segments"]["0"]["encryption"] = json!("aes-cbc-essiv:sha256")),
        ("no payload cipher", |m| drop(m["segments"]["0"].as_object_mut().unwrap().remove("encryption"))),
        ("null keyslot cipher", |m| m["keyslots"]["0"]["area"]["encryption"] = json!("cipher_null-ecb")),
        ("short keyslot key", |m| m["keyslots"]["0"]["area"]["key_size"] = json!(32)),
        ("AES-128", |m| m["keyslots"]["0"]["key_size"] = json!(32)),
        ("sector 1024", |m| m["segments"]["0"]["sector_size"] = json!(1024)),
        ("no sector size", |m| drop(m["segments"]["0"].as_object_mut().unwrap().remove("sector_size"))),
        ("payload in the header", |m| m["segments"]["0"]["offset"] = json!("32768")),
        ("payload at 0", |m| m["segments"]["0"]["offset"] = json!("0")),
        ("payload unaligned", |m| m["segments"]["0"]["offset"] = json!("4194816")),
        ("payload far away", |m| m["segments"]["0"]["offset"] = json!("1099511627776")),
        ("offset no number", |m| m["segments"]["0"]["offset"] = json!("-4096")),
        ("offset too big", |m| m["segments"]["0"]["offset"] = json!("18446744073709551616")),
        ("size 0", |m| m["segments"]["0"]["size"] = json!("0")),
        ("size odd", |m| m["segments"]["0"]["size"] = json!("4097")),
        ("size endless", |m| m["segments"]["0"]["size"] = json!("18446744073709547520")),
        ("two segments", |m| m["segments"]["1"] = m["segments"]["0"].clone()),
        ("no segment", |m| m["segments"] = json!({})),
        ("linear segment", |m| m["segments"]["0"]["type"] = json!("linear")),
        ("integrity", |m| m["segments"]["0"]["integrity"] = json!({"type": "hmac(sha256)"})),
        ("segment flag", |m| m["segments"]["0"]["flags"] = json!(["backup-final"])),
        ("re-encryption flag", |m| m["segments"]["0"]["flags"] = json!(["in-reencryption"])),
        ("re-encryption keyslot", |m| m["keyslots"]["1"] = json!({"type": "reencrypt", "mode": "decrypt"})),
        ("requirement", |m| m["config"]["requirements"] = json!({"mandatory": ["online-reencrypt-v2"]})),
        ("odd requirement", |m| m["config"]["requirements"] = json!({"mandatory": "online-reencrypt"})),
        ("pbkdf2 cost", |m| m["keyslots"]["0"]["kdf"]["iterations"] = json!(4_294_967_295u32)),
        ("pbkdf2 without rounds", |m| m["keyslots"]["0"]["kdf"]["iterations"] = json!(0)),
        ("digest cost", |m| m["digests"]["0"]["iterations"] = json!(4_294_967_295u32)),
        ("argon2 memory", |m| m["keyslots"]["0"]["kdf"] = argon2(4_194_304, 4, 4)),
        ("argon2 passes", |m| m["keyslots"]["0"]["kdf"] = argon2(1_048_576, 4_000_000_000, 4)),
        ("argon2 lanes", |m| m["keyslots"]["0"]["kdf"] = argon2(1_048_576, 4, 16_777_215)),
        ("argon2 of nothing", |m| m["keyslots"]["0"]["kdf"] = argon2(0, 0, 0)),
        ("unknown kdf", |m| m["keyslots"]["0"]["kdf"]["type"] = json!("none")),
        ("weak hash", |m| m["keyslots"]["0"]["kdf"]["hash"] = json!("md5")),
        ("weak splitter hash", |m| m["keyslots"]["0"]["af"]["hash"] = json!("sha1")),
        ("one stripe", |m| m["keyslots"]["0"]["af"]["stripes"] = json!(1)),
        ("no salt", |m| m["keyslots"]["0"]["kdf"]["salt"] = json!("")),
        ("area over the header", |m| m["keyslots"]["0"]["area"]["offset"] = json!("0")),
        ("area in the payload", |m| m["keyslots"]["0"]["area"]["offset"] = json!("4194304")),
        ("area overflows", |m| m["keyslots"]["0"]["area"]["size"] = json!("18446744073709551615")),
        ("area too small", |m| m["keyslots"]["0"]["area"]["size"] = json!("4096")),
        ("areas overlap", |m| m["keyslots"]["1"] = m["keyslots"]["0"].clone()),
        ("33 keyslots", |m| (1..33).for_each(|n| m["keyslots"][n.to_string()] = json!({"type": "x"}))),
        ("short digest", |m| m["digests"]["0"]["digest"] = json!("AAAA")),
        ("empty digest", |m| m["digests"]["0"]["digest"] = json!("")),
        ("no digest", |m| m["digests"] = json!({})),
        ("two digests", |m| m["digests"]["1"] = m["digests"]["0"].clone()),
        ("foreign digest", |m| m["digests"]["0"]["keyslots"] = json!(["1"])),
        ("json_size", |m| m["config"]["json_size"] = json!("4096")),
        ("keyslots_size huge", |m| m["config"]["keyslots_size"] = json!("18446744073709547520")),
        ("keyslots over payload", |m| m["config"]["keyslots_size"] = json!("8388608")),
        ("all slots unwanted", |m| m["keyslots"]["0"]["priority"] = json!(0)),
        ("no config", |m| drop(m.as_object_mut().unwrap().remove("config"))),
    ];
    let table: String = edits.iter().map(|(what, edit)| format!("{what}: {}\n", refusal(&craft(edit)))).collect();
    assert!(!table.contains("accepted"), "{table}");
    expect![[r#"
        null payload cipher: luks2-cipher: the segment's cipher is "cipher_null-ecb", only "aes-xts-plain64" is allowed
        other payload cipher: luks2-cipher: the segment's cipher is "aes-cbc-essiv:sha256", only "aes-xts-plain64" is allowed
        no payload cipher: luks2-cipher: the segment's cipher is "", only "aes-xts-plain64" is allowed
        null keyslot cipher: luks2-keyslot-cipher: keyslot 0 is encrypted with "cipher_null-ecb" and a key of 64 bytes, only "aes-xts-plain64" with 64 is allowed
        short keyslot key: luks2-keyslot-cipher: keyslot 0 is encrypted with "aes-xts-plain64" and a key of 32 bytes, only "aes-xts-plain64" with 64 is allowed
        AES-128: luks2-key-bytes: the volume key has 32 bytes, only 64 (AES-256-XTS) is allowed
        sector 1024: luks2-sector-size: the encryption sector is 1024 bytes, only 512 and 4096 are allowed
        no sector size: luks2-sector-size: the encryption sector is 0 bytes, only 512 and 4096 are allowed
        payload in the header: luks2-payload-offset: the payload starts at byte 32768: that is inside the header
        payload at 0: luks2-payload-offset: the payload starts at byte 0: that is inside the header
        payload unaligned: luks2-payload-offset: the payload starts at byte 4194816: that is no multiple of 4096
        payload far away: luks2-payload-offset: the payload starts at byte 1099511627776: that is beyond 1 GiB
        offset no number: luks2-json: the header's JSON area does not parse
        offset too big: luks2-json: the header's JSON area does not parse
        size 0: luks2-payload-size: the payload's size does not fit: it is not a positive multiple of the sector size
        size odd: luks2-payload-size: the payload's size does not fit: it is not a positive multiple of the sector size
        size endless: luks2-payload-size: the payload's size does not fit: its end is beyond what a file can hold
        two segments: luks2-segments: the header has 2 segments, exactly one is allowed
        no segment: luks2-segments: the header has 0 segments, exactly one is allowed
        linear segment: luks2-segment-type: the segment is of type "linear", only "crypt" is allowed
        integrity: luks2-segment-field: the segment carries "integrity", which changes what its bytes mean
        segment flag: luks2-segment-field: the segment carries "flags", which changes what its bytes mean
        re-encryption flag: luks2-reencryption: the header describes a re-encryption in progress (a flag of the segment)
        re-encryption keyslot: luks2-reencryption: the header describes a re-encryption in progress (a reencrypt keyslot)
        requirement: luks2-requirement: the header demands "online-reencrypt-v2", which is not supported
        odd requirement: luks2-requirement: the header demands "mandatory", which is not supported
        pbkdf2 cost: luks2-cost: keyslot 0 asks for 4294967295 rounds of pbkdf2, the limit is 10000000
        pbkdf2 without rounds: luks2-salt: keyslot 0 has a salt or digest that is not usable
        digest cost: luks2-cost: digest 0 asks for 4294967295 rounds of pbkdf2, the limit is 10000000
        argon2 memory: luks2-cost: keyslot 0 asks for 4194304 KiB of argon2 memory, the limit is 1048576
        argon2 passes: luks2-cost: keyslot 0 asks for 4194304000000000 KiB of argon2 memory times passes, the limit is 8388608
        argon2 lanes: luks2-cost: keyslot 0 asks for 16777215 argon2 lanes, the limit is 4
        argon2 of nothing: luks2-kdf: keyslot 0 derives its key with "argon2id", only pbkdf2, argon2i and argon2id are known
        unknown kdf: luks2-kdf: keyslot 0 derives its key with "none", only pbkdf2, argon2i and argon2id are known
        weak hash: luks2-hash: a keyslot's pbkdf2 uses the hash "md5", only sha256, sha384 and sha512 are allowed
        weak splitter hash: luks2-hash: a keyslot's splitter uses the hash "sha1", only sha256, sha384 and sha512 are allowed
        one stripe: luks2-splitter: keyslot 0 does not use the luks1 splitter with 4000 stripes
        no salt: luks2-salt: keyslot 0 has a salt or digest that is not usable
        area over the header: luks2-keyslot-area: the area of keyslot 0 is wrong: it lies outside the keyslots area
        area in the payload: luks2-keyslot-area: the area of keyslot 0 is wrong: it lies outside the keyslots area
        area overflows: luks2-keyslot-area: the area of keyslot 0 is wrong: its end overflows
        area too small: luks2-keyslot-area: the area of keyslot 0 is wrong: it is too small for 4000 stripes of the key
        areas overlap: luks2-keyslot-area: the area of keyslot 1 is wrong: it overlaps another keyslot's
        33 keyslots: luks2-too-many: the header lists 33 keyslots, at most 32 are allowed
        short digest: luks2-salt: digest 0 has a salt or digest that is not usable
        empty digest: luks2-salt: digest 0 has a salt or digest that is not usable
        no digest: luks2-digest: the volume key cannot be checked: no digest belongs to the segment
        two digests: luks2-digest: the volume key cannot be checked: several digests belong to the segment
        foreign digest: luks2-no-keyslot: the header has no keyslot of type luks2 that belongs to its segment
        json_size: luks2-areas: the header's areas do not fit together: json_size contradicts the binary header
        keyslots_size huge: luks2-areas: the header's areas do not fit together: keyslots_size is above 128 MiB
        keyslots over payload: luks2-payload-offset: the payload starts at byte 4194304: that is inside the header
        all slots unwanted: luks2-no-keyslot: the header has no keyslot of type luks2 that belongs to its segment
        no config: luks2-json: the header's JSON area does not parse
    "#]].assert_eq(&table);
}

fn argon2(memory: u32, time: u32, cpus: u32) -> Value {
    json!({"type": "argon2id", "memory": memory, "time": time, "cpus": cpus, "salt": "AAAAAAAAAAAAAAAAAAAAAA=="})
}

#[test]
fn what_is_not_understood_and_harmless_is_tolerated() {
    let area = craft(|m| {
        m["keyslots"]["5"] = json!({"type": "from-the-future", "area": {"offset": "32768"}});
        m["tokens"]["0"] = json!({"type": "systemd-tpm2", "keyslots": ["0"]});
        m["config"]["requirements"] = json!({"mandatory": []});
        m["config"]["flags"] = json!(["allow-discards"]);
        m["future"] = json!({"a": 1});
    });
    let header = Header::read(&area[..], &Limits::PEER).unwrap();
    assert!(header.unlock(&area[..], &passphrase("secret")).is_ok());
}

#[test]
fn two_readers_cannot_read_two_headers_out_of_one() {
    let text = String::from_utf8(area()[4096..0x4000].split(|b| *b == 0).next().unwrap().to_vec()).unwrap();
    let twice = text.replacen(
        "\"segments\":{",
        "\"segments\":{\"0\":{\"type\":\"linear\",\"offset\":\"0\",\"size\":\"1\"},",
        1,
    );
    assert_ne!(text, twice);
    assert_eq!(refusal(&reseal(area(), twice.as_bytes())), "luks2-json: the header's JSON area does not parse");
    let trailing = format!("{text}\0{{}}");
    assert_eq!(
        refusal(&reseal(area(), trailing.as_bytes())),
        "luks2-areas: the header's areas do not fit together: something follows the JSON text"
    );
    let deep = format!("{{\"keyslots\":{}", "[".repeat(10_000));
    assert!(refusal(&reseal(area(), deep.as_bytes())).starts_with("luks2-json"));
}

#[test]
fn a_header_that_is_none() {
    assert_eq!(refusal(&[]), "luks2-not-luks: there is no LUKS2 header: neither copy starts with its magic");
    assert_eq!(refusal(&vec![0; 1 << 20])[..14], *"luks2-not-luks");
    let mut luks1 = vec![0; 1 << 16];
    luks1[..8].copy_from_slice(b"LUKS\xba\xbe\0\x01");
    assert_eq!(refusal(&luks1), "luks2-version: the header says LUKS version 1, only 2 is known");
    assert_eq!(refusal(&area()[..5000])[..13], *"luks2-damaged");
    let area = area();
    let header = Header::read(&area[..0x8000], &Limits::PEER).unwrap();
    let cut = header.unlock(&area[..0x8000], &passphrase("secret")).err().unwrap();
    assert_eq!(cut.name(), "luks2-read");
}

#[test]
fn many_dear_keyslots_do_not_multiply_the_cost() {
    let area = craft(|m| {
        m["config"]["keyslots_size"] = json!("4161536");
        for n in 1..8u64 {
            let mut slot = m["keyslots"]["0"].clone();
            slot["kdf"]["iterations"] = json!(9_000_000);
            slot["area"]["offset"] = json!((32_768 + n * 258_048).to_string());
            m["keyslots"][n.to_string()] = slot;
            m["digests"]["0"]["keyslots"].as_array_mut().unwrap().push(json!(n.to_string()));
        }
    });
    let mut long = area;
    long.resize(4 << 20, 0);
    let limits = Limits { attempts: 0, ..Limits::PEER };
    let header = Header::read(&long[..], &limits).unwrap();
    // The right one is cheap and is tried first.
    assert!(header.unlock(&long[..], &passphrase("secret")).is_ok());
    let error = header.unlock(&long[..], &passphrase("wrong")).err().unwrap();
    assert_eq!(
        error.to_string(),
        "the passphrase opened none of the 1 cheapest keyslots; trying the other 7 would exceed the limit on work"
    );
}

#[test]
fn payload_bytes_fit_the_device() {
    let layout = |payload_size| Layout { payload_offset: 4096, payload_size, sector_size: 512, iv_tweak: 0 };
    assert_eq!(layout(None).payload_bytes(8192).ok(), Some(4096));
    assert_eq!(layout(Some(512)).payload_bytes(8192).ok(), Some(512));
    for (size, device) in [(None, 4096), (None, 0), (None, 4097), (Some(8192), 8192)] {
        assert_eq!(layout(size).payload_bytes(device).err().map(|e| e.name()), Some("luks2-payload-size"));
    }
}

#[test]
fn keys_that_are_no_keys() {
    assert_eq!(VolumeKey::from_bytes(&[1; 64]).err().unwrap().name(), "luks2-weak-key");
    assert_eq!(VolumeKey::from_bytes(&[1; 32]).err().unwrap().name(), "luks2-key-bytes");
    assert_eq!(Passphrase::new(vec![]).err().unwrap().name(), "luks2-passphrase-length");
    assert_eq!(Passphrase::new(vec![1; 513]).err().unwrap().name(), "luks2-passphrase-length");
    assert_eq!(Passphrase::generate(&mut Seeded(0)).unwrap().expose().len(), 64);
    for new in [
        NewHeader { payload_offset: 286_720, ..shape() },
        NewHeader { payload_offset: (4 << 20) + 512, ..shape() },
        NewHeader { label: "é".to_owned(), ..shape() },
        NewHeader { label: "x".repeat(48), ..shape() },
        NewHeader { uuid: Some("x".repeat(10)), ..shape() },
        NewHeader { payload_size: Some(100), ..shape() },
        NewHeader { kdf: Kdf::Pbkdf2 { rounds: 999 }, ..shape() },
        NewHeader { kdf: Kdf::Argon2id { passes: 1, memory_kib: 64, lanes: 5 }, ..shape() },
    ] {
        assert_eq!(new.build(&key(), &passphrase("x"), &mut Seeded(0)).err().unwrap().name(), "luks2-options");
    }
}

/// IEEE 1619-2007 annex B, vectors 10 and 11: AES-256 keys, data units 0xff and 0xffff, 512 bytes 00 01 02 … ff twice.
#[test]
fn golden_ieee_1619() {
    let mut key = [0u8; 64];
    for (at, digits) in [
        "2718281828459045235360287471352662497757247093699959574966967627",
        "3141592653589793238462643383279502884197169399375105820974944592",
    ]
    .concat()
    .as_bytes()
    .chunks(2)
    .enumerate()
    {
        key[at] = u8::from_str_radix(std::str::from_utf8(digits).unwrap(), 16).unwrap();
    }
    let cipher = SectorCipher::new(&VolumeKey::from_bytes(&key).unwrap(), 512, 0).unwrap();
    let plain: Vec<u8> = (0..512).map(|n| n as u8).collect();
    let mut data = plain.clone();
    cipher.encrypt(0xff * 512, &mut data);
    assert_eq!(hex(&data[..32]), "1c3b3a102f770386e4836c99e370cf9bea00803f5e482357a4ae12d414a3e63b");
    assert_eq!(sha256(&data), "e97e974fa393af794f7a4684395814cf820de60a01eaec677d87b452e316b364");
    cipher.decrypt(0xff * 512, &mut data);
    assert_eq!(data, plain);
    cipher.encrypt(0xffff * 512, &mut data);
    assert_eq!(hex(&data[..32]), "77a31251618a15e6b92d1d66dffe7b50b50bad552305ba0217a610688eff7e11");
}

/// SHA-256 of 16 KiB encrypted by OpenSSL (python3-cryptography, one call per sector), with the tweak counted in 512-byte
/// units for both sector sizes, at byte offsets below and above 2^40, without and with `iv_tweak`.
#[test]
fn golden_sectors() {
    let table = [
        (512, 0, 0, "f112aa28d31e85387de6622c8e86a500afba7d6e4a68d48a6c9a070693600549"),
        (512, 4096, 12345, "842feca464d14cd72e74d10383386d6e5e6fea3e49dd88d8ef7f5777ce8142c8"),
        (512, (1 << 40) + 12288, 12345, "23982d0bf340364896b8da27c604bdd00770bb7d89ade7c4111f3a2c5c17b892"),
        (4096, 0, 0, "86c3e69f1de65c670dc554c8742e0100512295654af417569803133b0c62c598"),
        (4096, 4096, 0, "b4d616e09dd47ac9747a99d6bf39999b8f5740903b61e352f56a4a69822e274a"),
        (4096, 4096, 12345, "ced3e2642214c9feefce951cfbcbcee47157115da08bbaf0e41399af578d4bb6"),
        (4096, (1 << 40) + 12288, 12345, "30ef498889dbf8f1b944f77e1f2863f263026044960b380d788c76ad46882cdb"),
    ];
    let key: Vec<u8> = (0..64u32).map(|n| (n * 7 + 3) as u8).collect();
    let key = VolumeKey::from_bytes(&key).unwrap();
    let plain: Vec<u8> = (0..16384u32).map(|n| ((n * 31) ^ (n >> 8)) as u8).collect();
    for (sector_size, offset, tweak, want) in table {
        let cipher = SectorCipher::new(&key, sector_size, tweak).unwrap();
        let mut data = plain.clone();
        cipher.encrypt(offset, &mut data);
        assert_eq!(sha256(&data), want, "{sector_size} {offset} {tweak}");
        // In any pieces, from any thread, the same.
        let half = std::thread::scope(|scope| {
            scope
                .spawn(|| {
                    let mut half = plain[8192..].to_vec();
                    cipher.encrypt(offset + 8192, &mut half);
                    half
                })
                .join()
                .unwrap()
        });
        assert_eq!(half, data[8192..]);
        cipher.decrypt(offset, &mut data);
        assert_eq!(data, plain);
    }
}

#[test]
fn a_hole_reads_as_zeros_and_zeros_do_not_become_a_hole() {
    for sector_size in [512usize, 4096] {
        let cipher = SectorCipher::new(&key(), sector_size as u32, 0).unwrap();
        let mut data = vec![0u8; 4 * sector_size];
        cipher.decrypt(0, &mut data);
        assert!(is_zero(&data));
        cipher.encrypt(0, &mut data);
        assert!(data.chunks(sector_size).all(|sector| !is_zero(sector)));
        // A hole between two written sectors.
        data[sector_size..2 * sector_size].fill(0);
        cipher.decrypt(0, &mut data);
        assert!(is_zero(&data));
        // One bit is no hole.
        data[2 * sector_size - 1] = 1;
        cipher.decrypt(0, &mut data);
        assert!(!is_zero(&data[sector_size..sector_size + 16]));
    }
    assert!(is_zero(&[]) && is_zero(&[0; 65]) && !is_zero(&[0, 1]));
    assert!((0..130).all(|at| {
        let mut bytes = [0u8; 130];
        bytes[at] = 128;
        !is_zero(&bytes)
    }));
}

#[test]
fn the_cipher_is_shared_by_threads() {
    let cipher = SectorCipher::new(&key(), 4096, 0).unwrap();
    std::thread::scope(|scope| {
        for thread in 0..8u64 {
            let cipher = &cipher;
            scope.spawn(move || {
                for round in 0..200 {
                    let offset = (thread * 1000 + round) * 4096;
                    let mut data = vec![thread as u8; 8192];
                    cipher.encrypt(offset, &mut data);
                    cipher.decrypt(offset, &mut data);
                    assert!(data.iter().all(|byte| *byte == thread as u8));
                }
            });
        }
    });
}

#[test]
#[should_panic(expected = "are no whole sectors")]
fn half_a_sector_is_a_bug() {
    SectorCipher::new(&key(), 4096, 0).unwrap().encrypt(512, &mut [0; 4096]);
}

/// Made by an independent implementation of af.c (python, hashlib).
#[test]
fn golden_splitter() {
    let mut material = vec![0u8; crate::af::SPLIT_BYTES];
    for (at, byte) in material.iter_mut().enumerate() {
        *byte = ((at * 131) ^ (at >> 8)) as u8;
    }
    for (hash, want) in [
        (
            Hash::Sha256,
            "1ca3c344d5d9d9dfb4c9a12bce967e2fbd2f93f89529ac4cfb5635c453d43ae1971fbae7073732c5d2948804f7b07cd04bba19da2724f6c781fb1ea9337de8d6",
        ),
        (
            Hash::Sha384,
            "ae56d9d03b2532f735c0782e26c9382d853bea6511bdea0b2aee5358d48fc436805e545f98fc8f7034ce5b4168c679f192d69a63d584dc01515cec2ff989906c",
        ),
        (
            Hash::Sha512,
            "0fff1a0bb98a6a72010068ab8264e12b977a68c9b7aad3e708b240207b208266c9751000e72797eb06c666934ce624f9cbda4e94ead7a1aeb9844f10ddbe777e",
        ),
    ] {
        let mut key = [0u8; 64];
        crate::af::merge(&material, hash, &mut key);
        assert_eq!(hex(&key), want);
    }
}

#[test]
fn every_refusal_as_a_person_sees_it() {
    let io = || std::io::Error::from(std::io::ErrorKind::UnexpectedEof);
    let slot = || "0".to_owned();
    let all = [
        Error::Read { offset: 0, length: 4096, source: io() },
        Error::NotLuks,
        Error::Version(1),
        Error::Damaged { primary: Damage::Checksum, secondary: Damage::Magic },
        Error::Json(serde_json::from_str::<u8>("{").unwrap_err()),
        Error::Areas("json_size contradicts the binary header"),
        Error::TooMany { what: "keyslots", count: 33, most: 32 },
        Error::Requirement("online-reencrypt-v2".to_owned()),
        Error::Reencryption("a reencrypt keyslot"),
        Error::Segments(2),
        Error::SegmentType("linear".to_owned()),
        Error::SegmentField("integrity".to_owned()),
        Error::Cipher("cipher_null-ecb".to_owned()),
        Error::KeyslotCipher { keyslot: slot(), cipher: "cipher_null-ecb".to_owned(), key_bytes: 32 },
        Error::KeyBytes(32),
        Error::SectorSize(1024),
        Error::PayloadOffset { offset: 4_194_816, cause: "that is no multiple of 4096" },
        Error::PayloadSize("the segment is larger than the device"),
        Error::KeyslotArea { keyslot: slot(), cause: "it overlaps another keyslot's" },
        Error::Splitter(slot()),
        Error::Hash { place: "the digest", hash: "md5".to_owned() },
        Error::Kdf { keyslot: slot(), kdf: "none".to_owned() },
        Error::Cost { place: "keyslot 0".to_owned(), asked: 1 << 32, limit: 1 << 20, unit: "KiB of argon2 memory" },
        Error::Salt { place: "digest 0".to_owned() },
        Error::Digest("no digest belongs to the segment"),
        Error::NoKeyslot,
        Error::WrongPassphrase { tried: 1 },
        Error::Budget { tried: 1, left: 7 },
        Error::WeakKey,
        Error::PassphraseLength(0),
        Error::Options("pbkdf2 needs at least 1000 rounds"),
        Error::Memory(1 << 20),
        Error::Entropy(io()),
        Error::Library,
    ];
    let names: std::collections::BTreeSet<_> = all.iter().map(Error::name).collect();
    assert_eq!(names.len(), include_str!("error.rs").matches("=> \"luks2-").count(), "a variant is not listed here");
    let table: String = all.iter().map(|e| format!("{}: {e}\n  fix: {}\n", e.name(), e.fix())).collect();
    expect![[r#"
        luks2-read: reading 4096 bytes of header at byte 0 failed
          fix: check the medium (dmesg, smartctl) and restore the header from a backup if it is gone
        luks2-not-luks: there is no LUKS2 header: neither copy starts with its magic
          fix: check that this is the right file; restore the header with `cryptsetup luksHeaderRestore`
        luks2-version: the header says LUKS version 1, only 2 is known
          fix: convert it with `cryptsetup convert --type luks2`
        luks2-damaged: both copies of the header are damaged (first: checksum mismatch; second: no magic)
          fix: restore the header from a backup with `cryptsetup luksHeaderRestore`
        luks2-json: the header's JSON area does not parse
          fix: look at it with `cryptsetup luksDump`; if it came from a peer, do not trust that peer
        luks2-areas: the header's areas do not fit together: json_size contradicts the binary header
          fix: look at it with `cryptsetup luksDump`; if it came from a peer, do not trust that peer
        luks2-too-many: the header lists 33 keyslots, at most 32 are allowed
          fix: look at it with `cryptsetup luksDump`; if it came from a peer, do not trust that peer
        luks2-requirement: the header demands "online-reencrypt-v2", which is not supported
          fix: finish or undo it with `cryptsetup reencrypt`; if nobody started one, the header was tampered with
        luks2-reencryption: the header describes a re-encryption in progress (a reencrypt keyslot)
          fix: finish or undo it with `cryptsetup reencrypt`; if nobody started one, the header was tampered with
        luks2-segments: the header has 2 segments, exactly one is allowed
          fix: make the volume anew with one plain crypt segment; if it came from a peer, do not trust that peer
        luks2-segment-type: the segment is of type "linear", only "crypt" is allowed
          fix: make the volume anew with one plain crypt segment; if it came from a peer, do not trust that peer
        luks2-segment-field: the segment carries "integrity", which changes what its bytes mean
          fix: make the volume anew with one plain crypt segment; if it came from a peer, do not trust that peer
        luks2-cipher: the segment's cipher is "cipher_null-ecb", only "aes-xts-plain64" is allowed
          fix: if it came from a peer, do not trust that peer; else re-encrypt it with `cryptsetup reencrypt --cipher aes-xts-plain64 --key-size 512`
        luks2-keyslot-cipher: keyslot 0 is encrypted with "cipher_null-ecb" and a key of 32 bytes, only "aes-xts-plain64" with 64 is allowed
          fix: if it came from a peer, do not trust that peer; else re-encrypt it with `cryptsetup reencrypt --cipher aes-xts-plain64 --key-size 512`
        luks2-key-bytes: the volume key has 32 bytes, only 64 (AES-256-XTS) is allowed
          fix: if it came from a peer, do not trust that peer; else re-encrypt it with `cryptsetup reencrypt --cipher aes-xts-plain64 --key-size 512`
        luks2-sector-size: the encryption sector is 1024 bytes, only 512 and 4096 are allowed
          fix: make the volume anew with --sector-size 512 or 4096
        luks2-payload-offset: the payload starts at byte 4194816: that is no multiple of 4096
          fix: compare with a header backup; if it came from a peer, do not trust that peer
        luks2-payload-size: the payload's size does not fit: the segment is larger than the device
          fix: compare with a header backup; if it came from a peer, do not trust that peer
        luks2-keyslot-area: the area of keyslot 0 is wrong: it overlaps another keyslot's
          fix: compare with a header backup; if it came from a peer, do not trust that peer
        luks2-splitter: keyslot 0 does not use the luks1 splitter with 4000 stripes
          fix: add a keyslot with `cryptsetup luksAddKey --pbkdf argon2id --hash sha256` and remove this one
        luks2-hash: the digest uses the hash "md5", only sha256, sha384 and sha512 are allowed
          fix: add a keyslot with `cryptsetup luksAddKey --pbkdf argon2id --hash sha256` and remove this one
        luks2-kdf: keyslot 0 derives its key with "none", only pbkdf2, argon2i and argon2id are known
          fix: add a keyslot with `cryptsetup luksAddKey --pbkdf argon2id --hash sha256` and remove this one
        luks2-cost: keyslot 0 asks for 4294967296 KiB of argon2 memory, the limit is 1048576
          fix: lower it with `cryptsetup luksConvertKey --pbkdf-memory … --pbkdf-force-iterations …`; if it came from a peer, do not trust that peer
        luks2-salt: digest 0 has a salt or digest that is not usable
          fix: add a keyslot with `cryptsetup luksAddKey --pbkdf argon2id --hash sha256` and remove this one
        luks2-digest: the volume key cannot be checked: no digest belongs to the segment
          fix: restore the header from a backup with `cryptsetup luksHeaderRestore`
        luks2-no-keyslot: the header has no keyslot of type luks2 that belongs to its segment
          fix: add a keyslot with `cryptsetup luksAddKey --pbkdf argon2id --hash sha256` and remove this one
        luks2-wrong-passphrase: the passphrase opens none of the 1 keyslots tried
          fix: check that the key source gives this volume's passphrase, without a newline at its end
        luks2-budget: the passphrase opened none of the 1 cheapest keyslots; trying the other 7 would exceed the limit on work
          fix: lower it with `cryptsetup luksConvertKey --pbkdf-memory … --pbkdf-force-iterations …`; if it came from a peer, do not trust that peer
        luks2-weak-key: the two halves of the AES-XTS key are equal
          fix: such a key is never made by accident; make the volume anew
        luks2-passphrase-length: the passphrase is 0 bytes long, 1 to 512 are allowed
          fix: check the key source
        luks2-options: no header can be made like that: pbkdf2 needs at least 1000 rounds
          fix: correct the option named
        luks2-memory: there is no memory for argon2 (1048576 KiB)
          fix: free memory, or use a keyslot with a smaller cost
        luks2-entropy: the kernel gives no random bytes
          fix: check that getrandom(2) is allowed here (seccomp)
        luks2-library: the cipher library failed to set up AES-256-XTS
          fix: free memory and try again
    "#]].assert_eq(&table);
}

fn scale(cases: u32) -> ProptestConfig {
    let factor = std::env::var("DECANT_TEST_SCALE").ok().and_then(|text| text.parse().ok()).unwrap_or(1);
    ProptestConfig::with_cases(cases * factor)
}

proptest! {
    #![proptest_config(scale(400))]

    /// Flips, cuts and copies of bytes anywhere in both headers: no panic, and whatever is still accepted is what was written.
    #[test]
    fn damage_never_changes_the_geometry(edits in prop::collection::vec((0usize..0x8000, any::<u8>(), 1usize..64), 1..8), cut in 0usize..0x9000) {
        let mut area = area();
        let want = *Header::read(&area[..], &Limits::OWN).unwrap().layout();
        for (at, byte, length) in edits {
            let end = (at + length).min(area.len());
            area[at..end].fill(byte);
        }
        if cut < 0x8000 {
            area.truncate(0x8000 - cut / 16);
        }
        if let Ok(header) = Header::read(&area[..], &Limits::OWN) {
            prop_assert_eq!(*header.layout(), want);
            prop_assert_eq!(header.label(), "orders");
        }
    }

    /// The JSON text edited at random and checksummed again: no panic, and whatever is accepted keeps to the allow-list.
    #[test]
    fn edited_json_keeps_to_the_allow_list(edits in prop::collection::vec((0usize..900, 0usize..TOKENS.len()), 1..4)) {
        let area = area();
        let mut text: Vec<u8> = area[4096..0x4000].split(|b| *b == 0).next().unwrap().to_vec();
        for (at, token) in edits {
            // Replaces the JSON token at or after `at`, so that many edits still parse.
            let start = (at..text.len()).find(|i| text[*i] == b':' ).map_or(0, |i| i + 1);
            let end = (start..text.len()).find(|i| matches!(text[*i], b',' | b'}')).unwrap_or(text.len());
            text.splice(start..end, TOKENS[token].bytes());
        }
        let area = reseal(area, &text);
        if let Ok(header) = Header::read(&area[..], &Limits::PEER) {
            let layout = header.layout();
            prop_assert!(layout.payload_offset >= 32_768 && layout.payload_offset.is_multiple_of(4096));
            prop_assert!(matches!(layout.sector_size, 512 | 4096));
            prop_assert!(header.area_bytes() <= layout.payload_offset);
            let _ = header.unlock(&area[..], &passphrase("wrong"));
        }
    }

    #[test]
    fn splitting_loses_nothing(seed in any::<u32>()) {
        let key = VolumeKey::generate(&mut Seeded(u64::from(seed))).unwrap();
        let split = crate::af::split(key.expose(), Hash::Sha256, &mut Seeded(9)).unwrap();
        let mut back = [0u8; 64];
        crate::af::merge(&split, Hash::Sha256, &mut back);
        prop_assert!(back == *key.expose());
    }
}

const TOKENS: &[&str] = &[
    "0",
    "1",
    "64",
    "512",
    "4096",
    "4294967295",
    "-1",
    "\"0\"",
    "\"32768\"",
    "\"4096\"",
    "\"4194304\"",
    "\"16777216\"",
    "\"18446744073709551615\"",
    "\"dynamic\"",
    "\"crypt\"",
    "\"luks2\"",
    "\"raw\"",
    "\"cipher_null-ecb\"",
    "\"aes-xts-plain64\"",
    "\"sha256\"",
    "\"sha512\"",
    "\"pbkdf2\"",
    "\"argon2id\"",
    "\"\"",
    "null",
    "{}",
    "[]",
    "[\"0\"]",
    "true",
    "1e9",
];
