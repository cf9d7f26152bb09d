//! Against real cryptsetup (Debian package cryptsetup-bin), on plain files: no device-mapper is needed, because cryptsetup
//! handles keyslots, and the payload of an offline re-encryption, in userspace.

use std::os::unix::fs::FileExt;
use std::path::Path;
use std::process::{Command, Output};

use decant_luks2::*;
use tempfile::TempDir;

const PAYLOAD: u64 = 1 << 20;

fn run(arguments: &[&str]) -> Output {
    match Command::new("cryptsetup").args(arguments).output() {
        Ok(output) => output,
        Err(error) => panic!("cannot run cryptsetup ({error}); install the Debian package cryptsetup-bin"),
    }
}

fn cryptsetup(arguments: &[&str]) -> String {
    let output = run(arguments);
    assert!(output.status.success(), "{arguments:?}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

struct World {
    directory: TempDir,
}

impl World {
    fn new() -> Self {
        let world = Self { directory: tempfile::tempdir().unwrap() };
        std::fs::write(world.path("pass"), "secret").unwrap();
        std::fs::write(world.path("wrong"), "Secret").unwrap();
        world
    }

    fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().unwrap().to_owned()
    }
}

fn passphrase() -> Passphrase {
    Passphrase::new(b"secret".to_vec()).unwrap()
}

fn write(path: &str, at: u64, bytes: &[u8]) {
    let file = std::fs::OpenOptions::new().create(true).truncate(false).write(true).open(path).unwrap();
    file.write_all_at(bytes, at).unwrap();
}

fn open(path: &str) -> (Header, VolumeKey) {
    let bytes = std::fs::read(path).unwrap();
    let header = Header::read(&bytes[..], &Limits::OWN).unwrap();
    let key = header.unlock(&bytes[..], &passphrase()).unwrap();
    (header, key)
}

/// The volume key as cryptsetup extracts it.
fn key_by_cryptsetup(world: &World, image: &str) -> Vec<u8> {
    let file = world.path("volume.key");
    let _ = std::fs::remove_file(&file);
    let pass = world.path("pass");
    cryptsetup(&["luksDump", "-q", "--dump-volume-key", "--volume-key-file", &file, "--key-file", &pass, image]);
    std::fs::read(file).unwrap()
}

#[test]
fn cryptsetup_accepts_ours() {
    let world = World::new();
    let kdfs = [Kdf::RANDOM_PASSPHRASE, Kdf::Argon2id { passes: 4, memory_kib: 1024, lanes: 2 }];
    for (payload_offset, sector_size, kdf) in [
        (HEADER_4_MIB, 512, kdfs[0]),
        (HEADER_4_MIB, 4096, kdfs[1]),
        (HEADER_16_MIB, 512, kdfs[1]),
        (HEADER_16_MIB, 4096, kdfs[0]),
    ] {
        let image = world.path(&format!("ours-{payload_offset}-{sector_size}"));
        let new = NewHeader {
            payload_offset,
            payload_size: None,
            sector_size,
            iv_tweak: 0,
            uuid: None,
            label: "orders".to_owned(),
            kdf,
        };
        let key = VolumeKey::generate(&mut SystemEntropy).unwrap();
        write(&image, 0, &new.build(&key, &passphrase(), &mut SystemEntropy).unwrap());
        write(&image, payload_offset + PAYLOAD - 1, &[0]);

        let dump = cryptsetup(&["luksDump", &image]);
        assert!(dump.contains("Label:         \torders"), "{dump}");
        assert!(dump.contains(&format!("offset: {payload_offset} [bytes]")), "{dump}");
        assert!(dump.contains(&format!("sector: {sector_size} [bytes]")), "{dump}");
        let json = cryptsetup(&["luksDump", "--dump-json-metadata", &image]);
        let json: serde_json::Value = serde_json::from_str(&json).unwrap();
        assert_eq!(json["segments"]["0"]["encryption"], PAYLOAD_CIPHER);

        cryptsetup(&["open", "--test-passphrase", "--key-file", &world.path("pass"), &image]);
        assert!(!run(&["open", "--test-passphrase", "--key-file", &world.path("wrong"), &image]).status.success());
        assert!(key_by_cryptsetup(&world, &image) == key.expose());
    }
}

#[test]
fn we_open_cryptsetups() {
    let world = World::new();
    let rounds: &[&str] = &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
    let sha512: &[&str] = &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1500", "--hash", "sha512"];
    let argon2id: &[&str] =
        &["--pbkdf", "argon2id", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "2048", "--pbkdf-parallel", "3"];
    let argon2i: &[&str] = &["--pbkdf", "argon2i", "--pbkdf-force-iterations", "4", "--pbkdf-memory", "512"];
    for (sectors, sector_size, kdf) in
        [("8192", "512", rounds), ("8192", "4096", argon2id), ("32768", "512", argon2i), ("32768", "4096", sha512)]
    {
        let image = world.path(&format!("theirs-{sectors}-{sector_size}"));
        write(&image, (sectors.parse::<u64>().unwrap() * 512) + PAYLOAD - 1, &[0]);
        let pass = world.path("pass");
        let mut arguments = vec!["luksFormat", "-q", "--type", "luks2", "--key-file", &pass, "--offset", sectors];
        arguments.extend(["--sector-size", sector_size, "--key-size", "512"]);
        arguments.extend(kdf);
        arguments.push(&image);
        cryptsetup(&arguments);

        let (header, key) = open(&image);
        assert_eq!(header.layout().payload_offset, sectors.parse::<u64>().unwrap() * 512);
        assert_eq!(header.layout().sector_size.to_string(), sector_size);
        assert_eq!(header.stale_copy(), None);
        assert!(key_by_cryptsetup(&world, &image) == key.expose());
        let uuid = cryptsetup(&["luksUUID", &image]);
        assert_eq!(header.uuid(), uuid.trim());

        // What a destination does: its own header size around the source's key.
        for payload_offset in [HEADER_4_MIB, HEADER_16_MIB] {
            let copy = world.path(&format!("copy-{payload_offset}-{sectors}-{sector_size}"));
            let new = NewHeader::like(&header, payload_offset, Kdf::RANDOM_PASSPHRASE);
            write(&copy, 0, &new.build(&key, &passphrase(), &mut SystemEntropy).unwrap());
            write(&copy, payload_offset + PAYLOAD - 1, &[0]);
            assert!(key_by_cryptsetup(&world, &copy) == key.expose());
            assert_eq!(cryptsetup(&["luksUUID", &copy]), uuid);
        }
    }
}

#[test]
fn the_headers_that_cryptsetup_changes_still_open() {
    let world = World::new();
    let image = world.path("changed");
    let (pass, wrong) = (world.path("pass"), world.path("wrong"));
    let new = NewHeader {
        payload_offset: HEADER_16_MIB,
        payload_size: Some(PAYLOAD),
        sector_size: 4096,
        iv_tweak: 0,
        uuid: None,
        label: String::new(),
        kdf: Kdf::RANDOM_PASSPHRASE,
    };
    let key = VolumeKey::generate(&mut SystemEntropy).unwrap();
    write(&image, 0, &new.build(&key, &passphrase(), &mut SystemEntropy).unwrap());
    write(&image, HEADER_16_MIB + PAYLOAD - 1, &[0]);
    let cheap: &[&str] = &["--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000", "-q"];
    cryptsetup(&[&["luksAddKey", "--key-file", &pass, &image, &wrong], cheap].concat());
    cryptsetup(&[&["luksRemoveKey", &image, &pass][..], &["-q"]].concat());
    cryptsetup(&["config", &image, "--label", "renamed"]);
    let bytes = std::fs::read(&image).unwrap();
    let header = Header::read(&bytes[..], &Limits::OWN).unwrap();
    assert_eq!((header.label(), header.layout().payload_size), ("renamed", Some(PAYLOAD)));
    assert!(header.seqid() > 1);
    assert!(header.unlock(&bytes[..], &passphrase()).is_err());
    let other = Passphrase::new(b"Secret".to_vec()).unwrap();
    assert!(header.unlock(&bytes[..], &other).unwrap().expose() == key.expose());
    // The keyslot that is in use is the second one: what a peer needs reaches to its end.
    assert_eq!(header.area_bytes(), 32_768 + 2 * 258_048);
}

#[test]
fn our_repair_is_cryptsetups() {
    let world = World::new();
    let image = world.path("damaged");
    write(&image, HEADER_4_MIB + PAYLOAD - 1, &[0]);
    let pass = world.path("pass");
    let format = ["luksFormat", "-q", "--type", "luks2", "--key-file", &pass, "--offset", "8192", "--pbkdf", "pbkdf2"];
    cryptsetup(&[&format[..], &["--pbkdf-force-iterations", "1000", &image]].concat());
    write(&image, 0, &[0; 4096]);
    let (header, _) = open(&image);
    assert_eq!(header.stale_copy(), Some(HeaderCopy::Primary));
    let (at, bytes) = header.repair(&mut SystemEntropy).unwrap().unwrap();
    write(&image, at, &bytes);
    // cryptsetup would silently recover from the second copy: take it away.
    write(&image, 0x4000, &[0; 4096]);
    cryptsetup(&["open", "--test-passphrase", "--key-file", &pass, &image]);
}

/// cryptsetup itself encrypts a file in place (offline re-encryption works without device-mapper); we read it back. This is
/// the whole convention at once: payload offset, tweak counting, sector size.
#[test]
fn we_decrypt_what_cryptsetup_encrypted() {
    let world = World::new();
    for sector_size in ["512", "4096"] {
        let image = world.path(&format!("encrypted-{sector_size}"));
        let plain: Vec<u8> = (0..PAYLOAD).map(|n| (n ^ (n >> 7) ^ (n >> 13)) as u8).collect();
        write(&image, 0, &plain);
        write(&image, PAYLOAD + (32 << 20) - 1, &[0]);
        let pass = world.path("pass");
        let key_options = ["--key-size", "512", "--pbkdf", "pbkdf2", "--pbkdf-force-iterations", "1000"];
        cryptsetup(
            &[
                &["reencrypt", "-q", "--encrypt", "--type", "luks2", "--reduce-device-size", "32M"][..],
                &["--sector-size", sector_size, "--cipher", PAYLOAD_CIPHER, "--key-file", &pass],
                &key_options,
                &["--force-offline-reencrypt", &image],
            ]
            .concat(),
        );
        let (header, key) = open(&image);
        let layout = *header.layout();
        assert_eq!((layout.sector_size.to_string().as_str(), layout.payload_offset), (sector_size, HEADER_16_MIB));
        let cipher = SectorCipher::new(&key, layout.sector_size, layout.iv_tweak).unwrap();
        let mut payload = vec![0; plain.len()];
        std::fs::File::open(&image).unwrap().read_exact_at(&mut payload, layout.payload_offset).unwrap();
        assert!(payload != plain);
        cipher.decrypt(0, &mut payload);
        assert!(payload == plain, "sector size {sector_size}");
    }
}

/// The other way round: we encrypt, cryptsetup decrypts the file in place.
#[test]
fn cryptsetup_decrypts_what_we_encrypted() {
    let world = World::new();
    for sector_size in [512, 4096] {
        let image = world.path(&format!("ours-{sector_size}"));
        let new = NewHeader {
            payload_offset: HEADER_16_MIB,
            payload_size: None,
            sector_size,
            iv_tweak: 0,
            uuid: None,
            label: String::new(),
            kdf: Kdf::RANDOM_PASSPHRASE,
        };
        let key = VolumeKey::generate(&mut SystemEntropy).unwrap();
        write(&image, 0, &new.build(&key, &passphrase(), &mut SystemEntropy).unwrap());
        let plain: Vec<u8> = (0..PAYLOAD).map(|n| (n ^ (n >> 5) ^ (n >> 11)) as u8).collect();
        let mut payload = plain.clone();
        SectorCipher::new(&key, sector_size, 0).unwrap().encrypt(0, &mut payload);
        write(&image, HEADER_16_MIB, &payload);
        let (pass, header) = (world.path("pass"), world.path(&format!("header-{sector_size}")));
        cryptsetup(&[
            "reencrypt",
            "-q",
            "--decrypt",
            "--header",
            &header,
            "--key-file",
            &pass,
            "--force-offline-reencrypt",
            &image,
        ]);
        let mut back = vec![0; plain.len()];
        std::fs::File::open(Path::new(&image)).unwrap().read_exact_at(&mut back, 0).unwrap();
        assert!(back == plain, "sector size {sector_size}");
    }
}

/// A header whose payload cipher was replaced by none and whose checksums were made anew: cryptsetup opens it, we do not.
#[test]
fn a_header_without_encryption_is_refused() {
    let world = World::new();
    let image = world.path("null");
    write(&image, HEADER_4_MIB + PAYLOAD - 1, &[0]);
    let pass = world.path("pass");
    let format = ["luksFormat", "-q", "--type", "luks2", "--key-file", &pass, "--offset", "8192", "--pbkdf", "pbkdf2"];
    cryptsetup(&[&format[..], &["--pbkdf-force-iterations", "1000", &image]].concat());
    let mut bytes = std::fs::read(&image).unwrap();
    for copy in bytes[..0x8000].chunks_mut(0x4000) {
        // The last mention is the segment's, and both names happen to be equally long.
        let name = PAYLOAD_CIPHER.as_bytes();
        let at = copy.windows(name.len()).rposition(|window| window == name).unwrap();
        copy[at..at + name.len()].copy_from_slice(b"cipher_null-ecb");
        copy[448..512].fill(0);
        let sum = aws_lc_rs::digest::digest(&aws_lc_rs::digest::SHA256, copy);
        copy[448..480].copy_from_slice(sum.as_ref());
    }
    write(&image, 0, &bytes[..0x8000]);
    cryptsetup(&["open", "--test-passphrase", "--key-file", &pass, &image]);
    let error = Header::read(&bytes[..], &Limits::OWN).err().unwrap();
    assert_eq!(error.name(), "luks2-cipher");
}
