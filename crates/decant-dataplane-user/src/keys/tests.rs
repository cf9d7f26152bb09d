use std::os::fd::AsFd;
use std::os::unix::fs::PermissionsExt;
use std::time::Duration;

use decant_base::VolumeId;
use decant_luks2::{SystemEntropy, VolumeKey};

use super::*;

fn volume(name: &str) -> VolumeId {
    VolumeId::new(name).unwrap()
}

fn words(list: &[&str]) -> Vec<String> {
    list.iter().map(|word| (*word).to_owned()).collect()
}

fn name(error: &KeyError) -> String {
    error.to_string().split(':').next().unwrap().to_owned()
}

#[test]
fn a_new_volume_gets_a_random_passphrase_once() {
    let root = tempfile::tempdir().unwrap();
    let directory = root.path().join("keys");
    let source = KeySource::File { directory: directory.clone() };
    assert_eq!(name(&source.passphrase(&volume("orders")).err().unwrap()), "key-missing");
    let made = source.provide(&volume("orders")).unwrap();
    assert_eq!(made.expose().len(), 64);
    assert!(made.expose() == source.provide(&volume("orders")).unwrap().expose());
    assert!(made.expose() == source.passphrase(&volume("orders")).unwrap().expose());
    assert!(made.expose() != source.provide(&volume("other")).unwrap().expose());
    let mode = |path: &std::path::Path| std::fs::metadata(path).unwrap().permissions().mode() & 0o777;
    assert_eq!((mode(&directory), mode(&directory.join("orders.key"))), (0o700, 0o600));
    assert_eq!(std::fs::read_dir(&directory).unwrap().count(), 2, "nothing else is left behind");
}

#[test]
fn two_that_make_the_same_key_get_the_same_key() {
    let root = tempfile::tempdir().unwrap();
    let path = root.path().join("v.key");
    let first = Passphrase::generate(&mut SystemEntropy).unwrap();
    file::publish(root.path(), &path, &first).unwrap();
    file::publish(root.path(), &path, &Passphrase::generate(&mut SystemEntropy).unwrap()).unwrap();
    assert!(file::read(&path).unwrap().expose() == first.expose());
}

#[test]
fn files_that_are_no_secret_are_refused() {
    let root = tempfile::tempdir().unwrap();
    let source = KeySource::File { directory: root.path().to_owned() };
    let mut path = root.path().to_owned();
    let mut put = |name: &str, content: &str, mode: u32| {
        path = root.path().join(name);
        std::fs::write(&path, content).unwrap();
        std::fs::set_permissions(&path, std::fs::Permissions::from_mode(mode)).unwrap();
    };
    put("open.key", "secret", 0o640);
    put("empty.key", "\n", 0o600);
    put("long.key", &"x".repeat(10_000), 0o600);
    put("fits.key", &format!("{}\n", "x".repeat(512)), 0o400);
    put("newline.key", "secret\n", 0o600);
    std::fs::create_dir(root.path().join("dir.key")).unwrap();
    std::os::unix::fs::symlink(root.path().join("newline.key"), root.path().join("link.key")).unwrap();
    let refusal = |name_of: &str| name(&source.passphrase(&volume(name_of)).err().unwrap());
    assert_eq!(refusal("open"), "key-exposed");
    assert_eq!(refusal("empty"), "key-length");
    assert_eq!(refusal("long"), "key-length");
    assert_eq!(refusal("dir"), "key-not-a-file");
    assert_eq!(refusal("link"), "key-not-a-file");
    assert_eq!(source.passphrase(&volume("fits")).unwrap().expose().len(), 512);
    assert_eq!(source.passphrase(&volume("newline")).unwrap().expose(), b"secret");
    let text = source.passphrase(&volume("open")).err().unwrap().to_string();
    assert!(text.contains("mode 640") && text.contains("chmod 0600"), "{text}");
}

#[test]
fn a_program_prints_it() {
    let run = |list: &[&str]| command::run(&words(list), &volume("orders"), Duration::from_secs(20));
    assert_eq!(run(&["/bin/echo", "key-of-{volume}"]).unwrap().expose(), b"key-of-orders");
    assert_eq!(run(&["/bin/sh", "-c", "printf a; exec >&-; exec 2>&-; read x; exit 0"]).unwrap().expose(), b"a");
    let failed = run(&["/bin/sh", "-c", "echo no such secret >&2; exit 3"]).err().unwrap().to_string();
    assert_eq!(failed, "key-command: /bin/sh ended with exit status: 3: no such secret; run it by hand to see why");
    assert_eq!(name(&run(&["/bin/true"]).err().unwrap()), "key-length");
    assert_eq!(name(&run(&["/bin/sh", "-c", "yes | head -c 1000000"]).err().unwrap()), "key-length");
    assert_eq!(name(&run(&["/nonexistent"]).err().unwrap()), "key-command");
    assert_eq!(name(&run(&[]).err().unwrap()), "key-command");
    let noisy = run(&["/bin/sh", "-c", "yes | head -c 1000000 >&2; exit 1"]).err().unwrap().to_string();
    assert!(noisy.len() < 3000);
}

#[test]
fn a_program_that_hangs_is_killed_with_all_it_started() {
    let root = tempfile::tempdir().unwrap();
    let file = root.path().join("pid");
    let script = format!("sleep 1000 & echo $! > {}; wait", file.display());
    let hang = words(&["/bin/sh", "-c", &script]);
    let error = command::run(&hang, &volume("v"), Duration::from_millis(1500)).err().unwrap();
    assert!(matches!(error, KeyError::CommandSlow { seconds: 1, .. }), "{error}");
    let pid: i32 = std::fs::read_to_string(&file).unwrap().trim().parse().unwrap();
    // The signal is sent; dying takes the kernel a moment, and reaping is init's, so a zombie may stay.
    let deadline = std::time::Instant::now() + Duration::from_secs(10);
    loop {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_else(|_| "0 (sleep) X".to_owned());
        let state = stat.rsplit(") ").next().unwrap().chars().next().unwrap();
        if matches!(state, 'Z' | 'X' | 'x') {
            break;
        }
        assert!(std::time::Instant::now() < deadline, "still alive in state {state}");
        std::thread::yield_now();
    }
}

#[test]
fn the_kernel_keeps_it() {
    let name_of = format!("test-{}", std::process::id());
    assert_eq!(name(&KeySource::Keyring.passphrase(&volume(&name_of)).err().unwrap()), "key-keyring");
    let refused = KeySource::Keyring.provide(&volume(&name_of)).err().unwrap();
    assert_eq!(name(&refused), "key-not-made");
    let serial = match keyring::add(&format!("decant:{name_of}"), b"from the kernel\n") {
        Ok(serial) => serial,
        Err(error) => {
            println!("SKIP the_kernel_keeps_it: this machine allows no add_key: {error}");
            return;
        }
    };
    let read = KeySource::Keyring.passphrase(&volume(&name_of));
    keyring::unlink(serial);
    assert_eq!(read.map(|p| p.expose().to_vec()).map_err(|e| e.to_string()), Ok(b"from the kernel".to_vec()));
}

#[test]
fn a_key_survives_in_secret_memory() {
    let key = VolumeKey::generate(&mut SystemEntropy).unwrap();
    for memory in [SecretMemory::new(&key).unwrap(), SecretMemory::fallback(&key).unwrap()] {
        println!("{}", memory.kind());
        let heir = memory.as_fd().try_clone_to_owned().unwrap();
        assert!(SecretMemory::read(heir.as_fd()).unwrap().expose() == key.expose());
        // The keeper may be gone before the heir reads.
        drop(memory);
        assert!(SecretMemory::read(heir.as_fd()).unwrap().expose() == key.expose());
    }
    let fallback = SecretMemory::fallback(&key).unwrap();
    assert!(matches!(fallback.kind(), SecretKind::Memfd { .. }));
    assert!(rustix::io::pwrite(fallback.as_fd(), &[0], 0).is_err(), "sealed");
    let empty = rustix::fs::memfd_create("empty", rustix::fs::MemfdFlags::CLOEXEC).unwrap();
    assert!(matches!(SecretMemory::read(empty.as_fd()), Err(SecretError::NoKey(_))));
    rustix::fs::ftruncate(&empty, 4096).unwrap();
    assert!(matches!(SecretMemory::read(empty.as_fd()), Err(SecretError::NoKey(decant_luks2::Error::WeakKey))));
}

#[test]
fn every_refusal_as_a_person_sees_it() {
    use std::io::{Error, ErrorKind};
    use std::os::unix::process::ExitStatusExt;
    let io = || Error::from(ErrorKind::PermissionDenied);
    let path = || PathBuf::from("/etc/decant/keys/orders.key");
    let program = || "vault-read".to_owned();
    let length = || decant_luks2::Error::PassphraseLength(0);
    let all = [
        KeyError::FileMissing { path: path() },
        KeyError::FileExposed { path: path(), mode: 0o644, owner: 0 },
        KeyError::NotAFile { path: path() },
        KeyError::Io { action: "writing", path: path(), source: io() },
        KeyError::Length { from: program(), source: length() },
        KeyError::CommandStart { program: program(), source: io() },
        KeyError::CommandFailed {
            program: program(),
            status: std::process::ExitStatus::from_raw(2 << 8),
            stderr: "permission denied on secret/orders".to_owned(),
        },
        KeyError::CommandSlow { program: program(), seconds: 30 },
        KeyError::CommandEmpty,
        KeyError::Keyring { description: "decant:orders".to_owned(), source: io() },
        KeyError::CannotGenerate {
            from: "the keyring",
            volume: volume("orders"),
            source: Box::new(KeyError::CommandEmpty),
        },
        KeyError::Entropy(decant_luks2::Error::Library),
    ];
    let mut table: String = all.iter().map(|error| format!("{error}\n")).collect();
    table += &format!("{}\n", SecretError::Kernel { action: "memfd_create", source: io() });
    table += &format!("{}\n", SecretError::NoKey(decant_luks2::Error::KeyBytes(32)));
    expect_test::expect![[r#"
        key-missing: there is no key file /etc/decant/keys/orders.key; copy it from the worker that the volume comes from, or restore it from a backup
        key-exposed: /etc/decant/keys/orders.key has mode 644 and owner 0; only its owner, this process's user or root, may have access: chmod 0600 it
        key-not-a-file: /etc/decant/keys/orders.key is no regular file; put the passphrase into one
        key-io: writing /etc/decant/keys/orders.key failed: permission denied; check the directory named in [keys]
        key-length: what vault-read gives is no passphrase: the passphrase is 0 bytes long, 1 to 512 are allowed; it must be 1 to 512 bytes, and one newline at the end is ignored
        key-command: vault-read cannot be run: permission denied; check `command` in [keys]
        key-command: vault-read ended with exit status: 2: permission denied on secret/orders; run it by hand to see why
        key-command: vault-read did not end within 30 s and was killed; run it by hand to see why
        key-command: no program is named; write command = ["PROGRAM", "{volume}"] in [keys]
        key-keyring: the kernel's keyring gives no key user "decant:orders": permission denied; add it with `keyctl padd user decant:orders @u`
        key-not-made: the keyring has no passphrase for volume orders yet and cannot make one: put a random one of 64 hexadecimal digits there first (key-command: no program is named; write command = ["PROGRAM", "{volume}"] in [keys])
        key-entropy: no passphrase could be made: the cipher library failed to set up AES-256-XTS
        secret-memory: memfd_create failed: permission denied; check RLIMIT_MEMLOCK and that memfd_create is allowed here (seccomp)
        secret-memory: the inherited descriptor holds no volume key: the volume key has 32 bytes, only 64 (AES-256-XTS) is allowed
    "#]].assert_eq(&table);
}
