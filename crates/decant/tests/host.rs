//! Hosts that lack what is needed: without root, without FUSE. Each command says so first, with cause and fix, and leaves
//! nothing behind.

use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Output};
use std::sync::OnceLock;

use decant_api::ErrorBody;
use expect_test::expect;

const NOBODY: u32 = 65534;

/// Lets everybody look into `path`, or run it.
fn open_to_all(path: &Path) {
    std::fs::set_permissions(path, PermissionsExt::from_mode(0o755)).expect("set");
}

/// A copy of the program that everybody can run: nobody may be locked out of where it was built. It is made once, before
/// anything is started: a child that is forked while it is written would hold it open, and it could not be executed.
fn program() -> &'static Path {
    static COPY: OnceLock<tempfile::TempDir> = OnceLock::new();
    let directory = COPY.get_or_init(|| {
        let directory = tempfile::tempdir().expect("a temporary directory");
        open_to_all(directory.path());
        let program = directory.path().join("decant");
        std::fs::copy(env!("CARGO_BIN_EXE_decant"), &program).expect("copied");
        open_to_all(&program);
        directory
    });
    static PATH: OnceLock<PathBuf> = OnceLock::new();
    PATH.get_or_init(|| directory.path().join("decant"))
}

/// A directory that everybody may look into, with the configuration of a worker.
fn place() -> tempfile::TempDir {
    let directory = tempfile::tempdir().expect("a temporary directory");
    open_to_all(directory.path());
    let config = "worker = \"worker-1\"\nworker_index = 1\nstate_dir = \"state\"\nrun_dir = \"run\"\n\
        listen = \"[::1]:0\"\ndata_listen = \"[::1]:0\"\n[tls]\nca = \"ca.pem\"\ncert = \"w.pem\"\nkey = \"w.key\"\n\
        [keys]\nsource = \"keyring\"\n";
    std::fs::write(directory.path().join("worker.toml"), config).expect("written");
    directory
}

fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// The agent, the demo and the doctor of `place`, started by `start` with their arguments.
fn all(place: &Path, start: impl Fn(&Path, &[&str]) -> Command) -> [Output; 4] {
    let (config, dir) = (place.join("worker.toml"), place.to_string_lossy().into_owned());
    let config = config.to_string_lossy().into_owned();
    let run = |arguments: &[&str]| start(program(), arguments).output().expect("it runs");
    [
        run(&["agent", "--config", &config]),
        run(&["demo", "--dir", &dir]),
        run(&["demo", "--dir", &dir, "-o", "json"]),
        run(&["doctor", "--state-dir", &dir]),
    ]
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8_lossy(bytes).into_owned()
}

/// Nothing but what [`place`] made.
fn nothing_is_made(place: &Path) {
    let mut names: Vec<String> = std::fs::read_dir(place)
        .expect("it is there")
        .map(|entry| entry.expect("an entry").file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    assert_eq!(names, ["worker.toml"]);
}

#[test]
fn without_root_it_says_so_and_touches_nothing() {
    let place = place();
    let [agent, demo, json, doctor] = all(place.path(), |program, arguments| {
        let mut command = Command::new(program);
        command.args(arguments);
        if is_root() {
            command.uid(NOBODY).gid(NOBODY);
        }
        command
    });
    let uid = if is_root() { NOBODY } else { rustix::process::geteuid().as_raw() };
    let plain = |output: &Output| text(&output.stderr).replace(&format!("user {uid}"), "user N");
    assert_eq!(agent.status.code(), Some(1), "{agent:?}");
    expect![[r#"
        error: not root
          cause: this is user N, and volumes, machines and their networks are root's to make
          fix:   run it as root
    "#]]
    .assert_eq(&plain(&agent));
    assert_eq!(demo.status.code(), Some(1), "{demo:?}");
    expect![[r#"
        error: not root
          cause: this is user N, and the demo makes namespaces, mounts and loop devices
          fix:   run it as root
    "#]]
    .assert_eq(&plain(&demo));
    let body: ErrorBody = serde_json::from_slice(&json.stderr).expect("with -o json a failure is JSON");
    assert_eq!((body.name.as_str(), body.fix.as_str()), ("not root", "run it as root"));
    assert_eq!(doctor.status.code(), Some(3), "{doctor:?}");
    let row = text(&doctor.stdout).lines().find(|line| line.starts_with("root ")).map(str::to_owned);
    expect!["root              missing  no; run as root"].assert_eq(&row.unwrap_or_default());
    nothing_is_made(place.path());
}

#[test]
fn without_fuse_it_says_so_and_touches_nothing() {
    if !is_root() || !Path::new("/dev/fuse").exists() {
        println!(
            "SKIP without_fuse_it_says_so_and_touches_nothing: it masks /dev/fuse, which needs root and the device"
        );
        return;
    }
    let place = place();
    let mask = tempfile::NamedTempFile::new().expect("a file");
    let [agent, demo, json, doctor] = all(place.path(), |program, arguments| {
        let mut command = Command::new("unshare");
        command.args(["--mount", "/bin/sh", "-c", "mount --bind \"$1\" /dev/fuse && shift && exec \"$@\"", "sh"]);
        command.arg(mask.path()).arg(program).args(arguments);
        command
    });
    assert_eq!(agent.status.code(), Some(1), "{agent:?}");
    expect![[r#"
        error: no FUSE
          cause: /dev/fuse cannot be used: it is not the device of FUSE
          fix:   load the module: modprobe fuse; in a container, let it have /dev/fuse
    "#]]
    .assert_eq(&text(&agent.stderr));
    assert_eq!(demo.status.code(), Some(1), "{demo:?}");
    expect![[r#"
        error: this machine cannot run it
          cause: fuse: /dev/fuse: it is not the device of FUSE
          fix:   load the module: modprobe fuse; in a container, let it have /dev/fuse
    "#]]
    .assert_eq(&text(&demo.stderr));
    let body: ErrorBody = serde_json::from_slice(&json.stderr).expect("with -o json a failure is JSON");
    assert!(body.cause.contains("/dev/fuse"), "{body:?}");
    assert_eq!(doctor.status.code(), Some(3), "{doctor:?}");
    let row = text(&doctor.stdout).lines().find(|line| line.starts_with("fuse ")).map(str::to_owned);
    expect!["fuse              missing  /dev/fuse: it is not the device of FUSE; load the module: modprobe fuse; in a container, let it have /dev/fuse"].assert_eq(&row.unwrap_or_default());
    nothing_is_made(place.path());
}
