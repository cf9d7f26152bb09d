//! Other initiators against `decant export --iscsi`.

mod tool;

use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use tempfile::TempDir;
use tool::{Tool, directory, disk, has_qemu_iscsi, run, succeed, text};

const SIZE: u64 = 60_000 * 512;
const NAME: &str = "iqn.2026-11.dev.decant:disk";

struct Fixture {
    tool: Tool,
    disk: PathBuf,
    _directory: TempDir,
}

impl Fixture {
    fn new(more: &[&str]) -> Self {
        Self::with(more, |_| Vec::new())
    }

    /// With options that name files in its directory.
    fn with(more: &[&str], files: impl FnOnce(&Path) -> Vec<String>) -> Self {
        let directory = directory();
        let disk = disk(directory.path(), "disk", SIZE);
        let files = files(directory.path());
        let files: Vec<&str> = files.iter().map(String::as_str).collect();
        let source = disk.to_str().expect("text");
        let tool = Tool::start(&[&["export", source, "--iscsi", "127.0.0.1:0"], more, &files].concat());
        Self { tool, disk, _directory: directory }
    }

    /// `host:port`.
    fn portal(&self) -> String {
        let uri = self.tool.fact("uri");
        let portal = uri.trim_start_matches("iscsi://").split('/').next().expect("a portal").to_owned();
        portal.rsplit('@').next().expect("a portal").to_owned()
    }

    /// The URL of LUN 0 for libiscsi and QEMU; `user` as `name%secret@`.
    fn url(&self, user: &str) -> String {
        format!("iscsi://{user}{}/{NAME}/0", self.portal())
    }
}

/// `--chap FILE` with these lines.
fn chap(directory: &Path, lines: &str) -> Vec<String> {
    let path = directory.join("chap");
    std::fs::write(&path, lines).expect("a file");
    std::fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("its owner's");
    vec!["--chap".to_owned(), path.to_str().expect("text").to_owned()]
}

#[test]
fn libiscsi_finds_and_describes_the_disk() {
    let fixture = Fixture::new(&[]);
    let portal = format!("iscsi://{}", fixture.portal());
    let listed = text(&run(10, "iscsi-ls", &["-s", &portal]));
    assert!(listed.contains(&format!("Target:{NAME} Portal:{},1", fixture.portal())), "{listed}");
    let inquiry = text(&run(10, "iscsi-inq", &[&fixture.url("")]));
    assert!(inquiry.contains("Vendor:DECANT") && inquiry.contains("DIRECT_ACCESS"), "{inquiry}");
    for page in ["0x80", "0x83", "0xb0", "0xb1", "0xb2"] {
        let output = run(10, "iscsi-inq", &["-e", "1", "-c", page, &fixture.url("")]);
        assert!(output.status.success(), "page {page}: {}", text(&output));
    }
    let capacity = text(&run(10, "iscsi-readcapacity16", &["-s", &fixture.url("")]));
    assert_eq!(capacity.trim(), (60_000u64 * 512).to_string());
    let protection = text(&run(10, "iscsi-swp", &[&fixture.url("")]));
    assert!(protection.contains("SWP:0"), "{protection}");
}

#[test]
fn libiscsi_reads_many_blocks_at_a_time() {
    let fixture = Fixture::new(&[]);
    let output = run(20, "iscsi-perf", &["-m", "32", "-b", "8", "-t", "1", &fixture.url("")]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn qemu_writes_reads_discards_and_maps() {
    if !has_qemu_iscsi("qemu_writes_reads_discards_and_maps") {
        return;
    }
    let fixture = Fixture::new(&[]);
    let url = fixture.url("");
    let info = text(&run(20, "qemu-img", &["info", &url]));
    assert!(info.contains("30720000 bytes"), "{info}");
    let script = ["write -P 0xab 0 8M", "write -P 0xcd -f 1M 64k", "flush", "discard 4M 1M", "write -z -u 6M 1M"];
    let mut arguments: Vec<&str> = vec!["-f", "raw"];
    for command in script {
        arguments.extend(["-c", command]);
    }
    for check in
        ["read -P 0xab 0 1M", "read -P 0xcd 1M 64k", "read -P 0 4M 1M", "read -P 0 6M 1M", "read -P 0xab 7M 1M"]
    {
        arguments.extend(["-c", check]);
    }
    arguments.push(&url);
    let output = run(30, "qemu-io", &arguments);
    let said = text(&output);
    assert!(output.status.success() && !said.contains("failed") && !said.contains("rror"), "{said}");
    let map = text(&run(20, "qemu-img", &["map", "--output=json", "-f", "raw", &url]));
    assert!(map.contains("\"zero\": true") && map.contains("\"data\": true"), "{map}");
    let medium = std::fs::read(&fixture.disk).expect("the disk");
    assert!(medium[..1 << 20].iter().all(|byte| *byte == 0xab) && medium[4 << 20] == 0 && medium[7 << 20] == 0xab);
}

#[test]
fn chap_is_asked_of_libiscsi_and_qemu() {
    let lines = "username = somebody\npassword = twelve bytes and more\n";
    let fixture = Fixture::with(&[], |directory| chap(directory, lines));
    let right = fixture.url("somebody%twelve bytes and more@");
    let output = run(10, "iscsi-inq", &[&right]);
    assert!(output.status.success(), "{}", text(&output));
    let wrong = run(10, "iscsi-inq", &[&fixture.url("somebody%twelve bytes and less@")]);
    assert!(!wrong.status.success(), "{}", text(&wrong));
    let none = run(10, "iscsi-inq", &[&fixture.url("")]);
    assert!(!none.status.success(), "{}", text(&none));
}

#[test]
fn a_read_only_disk_is_read_only_to_qemu() {
    if !has_qemu_iscsi("a_read_only_disk_is_read_only_to_qemu") {
        return;
    }
    let fixture = Fixture::new(&["--read-only"]);
    let output = run(20, "qemu-io", &["-f", "raw", "-c", "write 0 4k", &fixture.url("")]);
    assert!(!output.status.success() || text(&output).contains("rror"), "{}", text(&output));
    let output = run(20, "qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 4k", &fixture.url("")]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn libiscsi_proves_itself_and_has_the_target_prove_itself() {
    let lines = "username=somebody\npassword=twelve bytes and more\nusername_in=the-target\npassword_in=the target's own secret";
    let fixture = Fixture::with(&[], |directory| chap(directory, lines));
    let url = fixture.url("somebody%twelve bytes and more@");
    let ask = |secret: &str| {
        let secret = format!("LIBISCSI_CHAP_TARGET_PASSWORD={secret}");
        run(10, "env", &["LIBISCSI_CHAP_TARGET_USERNAME=the-target", &secret, "iscsi-inq", &url])
    };
    let right = ask("the target's own secret");
    assert!(right.status.success(), "{}", text(&right));
    // It is the initiator that finds a wrong target out.
    let wrong = ask("another target's secret");
    assert!(!wrong.status.success(), "{}", text(&wrong));
}

#[test]
fn only_addresses_on_the_list_are_let_in() {
    let fixture = Fixture::new(&["--allow", "127.0.0.2"]);
    let refused = run(10, "iscsi-inq", &[&fixture.url("")]);
    assert!(!refused.status.success(), "{}", text(&refused));
    let fixture = Fixture::new(&["--allow", "127.0.0.2", "--allow", "127.0.0.1"]);
    succeed(10, "iscsi-inq", &[&fixture.url("")]);
}
