use std::os::unix::fs::PermissionsExt;
use std::process::Command;

use tempfile::TempDir;

use super::*;

const SIZE: Bytes = Bytes(2 << 20);

struct World {
    root: TempDir,
    keys: KeySource,
    volume: VolumeId,
}

impl World {
    fn new() -> Self {
        let root = tempfile::tempdir().unwrap();
        let keys = KeySource::File { directory: root.path().join("keys") };
        Self { keys, root, volume: VolumeId::new("orders").unwrap() }
    }

    fn file(&self, name: &str) -> File {
        let options = std::fs::OpenOptions::new().read(true).write(true).create_new(true).to_owned();
        options.open(self.root.path().join(name)).unwrap()
    }

    fn create(&self, name: &str, offset: u64, sector_size: u32) -> (File, Unlocked) {
        let file = self.file(name);
        let passphrase = self.keys.provide(&self.volume).unwrap();
        let made = create(&file, Bytes::mib(offset), SIZE, sector_size, &passphrase).unwrap();
        (file, made)
    }

    fn passphrase(&self) -> Passphrase {
        self.keys.passphrase(&self.volume).unwrap()
    }

    fn test_passphrase(&self, name: &str) {
        let key = self.root.path().join("keys/orders.key");
        let status = Command::new("cryptsetup")
            .args(["open", "--test-passphrase", "--key-file"])
            .args([key, self.root.path().join(name)])
            .status()
            .expect("cannot run cryptsetup; install the Debian package cryptsetup-bin");
        assert!(status.success());
    }
}

fn refused(result: Result<Unlocked, HeaderError>) -> String {
    let error = result.err().unwrap();
    let failure = error.failure();
    assert_eq!(failure.code, FailureCode::Refused, "{failure}");
    failure.message
}

#[test]
fn a_volume_moves_between_all_header_sizes_and_sectors() {
    let world = World::new();
    for (from, to, sector_size) in [(4, 16, 512), (16, 4, 4096), (16, 16, 512), (4, 4, 4096)] {
        let (source_name, name) = (format!("s-{from}-{to}"), format!("d-{from}-{to}"));
        let (source, made) = world.create(&source_name, from, sector_size);
        assert_eq!(made.payload_offset, from << 20);
        assert_eq!(source.metadata().unwrap().len(), (from << 20) + SIZE.0);
        let opened = unlock(&source, &world.keys, &world.volume).unwrap();
        assert!(opened.key.expose() == made.key.expose());
        assert_eq!((&opened.geometry, opened.payload_offset), (&made.geometry, made.payload_offset));

        let exported = export_header(&source).unwrap();
        assert_eq!(exported.digest, digest(&exported.base64));
        assert!(exported.base64.len() < 400_000);
        let destination = world.file(&name);
        let moved =
            rewrap(&destination, &exported.base64, &made.geometry, Bytes::mib(to), &world.passphrase()).unwrap();
        assert!(moved.key.expose() == made.key.expose());
        assert_eq!(inspect(&destination).unwrap(), (made.geometry.clone(), to << 20));
        let opened = unlock(&destination, &world.keys, &world.volume).unwrap();
        assert!(opened.key.expose() == made.key.expose());
        world.test_passphrase(&source_name);
        world.test_passphrase(&name);
    }
}

#[test]
fn a_typed_passphrase_costs_more() {
    assert_eq!(derivation(&Passphrase::generate(&mut SystemEntropy).unwrap()), Kdf::RANDOM_PASSPHRASE);
    for text in ["correct horse battery staple", &"x".repeat(64), &"a".repeat(63)] {
        assert_eq!(derivation(&Passphrase::new(text.as_bytes().to_vec()).unwrap()), Kdf::TYPED_PASSPHRASE);
    }
}

#[test]
fn a_damaged_copy_is_repaired_when_the_volume_is_opened() {
    let world = World::new();
    let (file, made) = world.create("v", 4, 4096);
    file.write_all_at(&[0xff; 4096], 0).unwrap();
    assert!(unlock(&file, &world.keys, &world.volume).unwrap().key.expose() == made.key.expose());
    assert!(Header::read(&Image(&file), &Limits::OWN).unwrap().stale_copy().is_none());
    file.write_all_at(&[0xff; 0x8000], 0).unwrap();
    let failure = unlock(&file, &world.keys, &world.volume).err().unwrap().failure();
    assert_eq!(failure.code, FailureCode::Stuck);
    assert!(failure.message.starts_with("luks2-not-luks: "), "{failure}");
}

#[test]
fn what_a_peer_says_is_compared() {
    let world = World::new();
    let (source, made) = world.create("s", 4, 4096);
    let header = export_header(&source).unwrap().base64;
    let attempt = |name: &str, header: &str, geometry: &Geometry| {
        let file = world.file(name);
        let result = rewrap(&file, header, geometry, Bytes::mib(16), &world.passphrase());
        assert_eq!(file.metadata().unwrap().len(), 0, "nothing is written before all is checked");
        refused(result)
    };
    let good = &made.geometry;
    for (name, geometry, want) in [
        ("a", Geometry { sector_size: 512, ..good.clone() }, "peer-geometry: the source announced the sector size 512"),
        ("b", Geometry { iv_tweak: 1, ..good.clone() }, "peer-geometry: the source announced the iv_tweak 1"),
        ("c", Geometry { cipher: "cipher_null-ecb".into(), ..good.clone() }, "peer-geometry: the announced volume is"),
        ("d", Geometry { key_bytes: 32, ..good.clone() }, "peer-geometry: the announced volume is impossible"),
        ("e", Geometry { size: Bytes(0), ..good.clone() }, "peer-geometry: the announced volume is impossible"),
        ("f", Geometry { size: Bytes(u64::MAX - 4095), ..good.clone() }, "peer-geometry: the announced volume is"),
        ("g", Geometry { size: Bytes((2 << 20) + 512), ..good.clone() }, "peer-geometry: the announced volume is"),
    ] {
        let message = attempt(name, &header, &geometry);
        assert!(message.starts_with(want), "{message}");
    }
    assert!(attempt("h", "%%%", good).starts_with("peer-header: the header that the source sent is no base64"));
    assert!(attempt("i", &"A".repeat(23 << 20), good).contains("longer than 16 MiB"));
    assert!(
        attempt("j", "", good).starts_with("peer-header: the header that the source sent is refused (luks2-not-luks")
    );
    let null = hostile(&header);
    let message = attempt("k", &null, good);
    assert!(message.contains("luks2-cipher") && message.contains("cipher_null-ecb"), "{message}");
}

/// The header with its segment's cipher replaced by none, with fresh checksums.
fn hostile(header: &str) -> String {
    let mut area = BASE64.decode(header).unwrap();
    for copy in area[..0x8000].chunks_mut(0x4000) {
        let at = copy.windows(15).rposition(|window| window == PAYLOAD_CIPHER.as_bytes()).unwrap();
        copy[at..at + 15].copy_from_slice(b"cipher_null-ecb");
        copy[448..512].fill(0);
        let sum = Sha256::digest(&*copy);
        copy[448..480].copy_from_slice(&sum);
    }
    BASE64.encode(area)
}

#[test]
fn another_passphrase_does_not_open_the_peers_header() {
    let world = World::new();
    let (source, made) = world.create("s", 4, 4096);
    let header = export_header(&source).unwrap().base64;
    let other = Passphrase::generate(&mut SystemEntropy).unwrap();
    let message = refused(rewrap(&world.file("d"), &header, &made.geometry, Bytes::mib(4), &other));
    assert!(message.starts_with("peer-passphrase: "), "{message}");
    std::fs::write(world.root.path().join("keys/orders.key"), "another").unwrap();
    let failure = unlock(&source, &world.keys, &world.volume).err().unwrap().failure();
    assert!(failure.message.starts_with("luks2-wrong-passphrase: "), "{failure}");
}

#[test]
fn nothing_is_overwritten_and_nonsense_is_not_made() {
    let world = World::new();
    let (file, _) = world.create("v", 4, 4096);
    let again = create(&file, Bytes::mib(4), SIZE, 4096, &world.passphrase()).err().unwrap();
    assert!(again.to_string().starts_with("image-not-empty: the volume's image already holds 6 MiB"), "{again}");
    for (name, offset, size, sector_size) in
        [("a", 4 << 20, 4096, 4096), ("b", 4096, 2 << 20, 4096), ("c", 4 << 20, 2 << 20, 1024)]
    {
        let file = world.file(name);
        refused(create(&file, Bytes(offset), Bytes(size), sector_size, &world.passphrase()));
        assert_eq!(file.metadata().unwrap().len(), 0);
    }
}

#[test]
fn a_key_file_that_others_read_stops_the_volume() {
    let world = World::new();
    let (file, _) = world.create("v", 4, 4096);
    let key = world.root.path().join("keys/orders.key");
    std::fs::set_permissions(&key, std::fs::Permissions::from_mode(0o644)).unwrap();
    assert!(refused(unlock(&file, &world.keys, &world.volume)).starts_with("key-exposed: "));
}

#[test]
fn every_refusal_as_a_person_sees_it() {
    let io = |kind: ErrorKind| HeaderError::Io { action: "syncing the header", source: kind.into() };
    let wrong = || decant_luks2::Error::WrongPassphrase { tried: 1 };
    let all = [
        HeaderError::Luks { source: wrong() },
        HeaderError::Luks { source: decant_luks2::Error::Memory(65536) },
        HeaderError::Luks { source: decant_luks2::Error::SectorSize(1024) },
        HeaderError::PeerLuks { source: decant_luks2::Error::Cipher("cipher_null-ecb".to_owned()) },
        HeaderError::PeerPassphrase { source: wrong() },
        HeaderError::PeerEncoding("no base64"),
        HeaderError::Geometry { what: "the sector size", carried: "512".to_owned(), header: "4096".to_owned() },
        HeaderError::Impossible("its size is beyond what a file can hold"),
        HeaderError::Key(KeyError::CommandEmpty),
        HeaderError::Key(KeyError::CommandSlow { program: "vault-read".to_owned(), seconds: 30 }),
        HeaderError::NotEmpty(Bytes::gib(4)),
        io(ErrorKind::StorageFull),
        io(ErrorKind::Other),
    ];
    let table: String = all
        .iter()
        .map(HeaderError::failure)
        .map(|failure| format!("{:?} {}\n", failure.code, failure.message))
        .collect();
    expect_test::expect![[r#"
        Stuck luks2-wrong-passphrase: the passphrase opens none of the 1 keyslots tried; check that the key source gives this volume's passphrase, without a newline at its end
        Retry luks2-memory: there is no memory for argon2 (65536 KiB); free memory, or use a keyslot with a smaller cost
        Refused luks2-sector-size: the encryption sector is 1024 bytes, only 512 and 4096 are allowed; make the volume anew with --sector-size 512 or 4096
        Refused peer-header: the header that the source sent is refused (luks2-cipher: the segment's cipher is "cipher_null-ecb", only "aes-xts-plain64" is allowed); if it came from a peer, do not trust that peer; else re-encrypt it with `cryptsetup reencrypt --cipher aes-xts-plain64 --key-size 512`
        Refused peer-passphrase: the passphrase that this worker has for the volume does not open the source's header (the passphrase opens none of the 1 keyslots tried); give both workers the same passphrase for it
        Refused peer-header: the header that the source sent is no base64; check that both workers run compatible versions
        Refused peer-geometry: the source announced the sector size 512, its header says 4096; do not trust that worker before this is explained
        Refused peer-geometry: the announced volume is impossible: its size is beyond what a file can hold; check that both workers run compatible versions
        Refused key-command: no program is named; write command = ["PROGRAM", "{volume}"] in [keys]
        Retry key-command: vault-read did not end within 30 s and was killed; run it by hand to see why
        Stuck image-not-empty: the volume's image already holds 4 GiB; delete the volume first
        Refused image-io: syncing the header failed: no storage space; check the disk (df, dmesg)
        Retry image-io: syncing the header failed: other error; check the disk (df, dmesg)
    "#]].assert_eq(&table);
}
