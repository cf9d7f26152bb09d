//! Other initiators against the target.

mod support;
mod target_server;

use decant_iscsi::chap::{Chap, Credentials, Secret};
use decant_iscsi::login::DigestPolicy;
use support::{NAME, Shape, run, serve, text};

fn credentials(name: &str, secret: &str) -> Credentials {
    Credentials { name: name.to_owned(), secret: Secret::new(secret).expect("long enough") }
}

#[test]
fn libiscsi_finds_and_describes_the_disk() {
    let fixture = serve(&Shape::default());
    let portal = format!("iscsi://{}", fixture.server.address());
    let listed = text(&run(10, "iscsi-ls", &["-s", &portal]));
    assert!(listed.contains(&format!("Target:{NAME} Portal:{},1", fixture.server.address())), "{listed}");
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
    let fixture = serve(&Shape { workers: 0, ..Shape::default() });
    let output = run(20, "iscsi-perf", &["-m", "32", "-b", "8", "-t", "1", &fixture.url("")]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn qemu_writes_reads_discards_and_maps() {
    if !support::has_qemu("qemu_writes_reads_discards_and_maps") {
        return;
    }
    let fixture = serve(&Shape::default());
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
    let medium = std::fs::read(fixture.disk.path()).expect("the disk");
    assert!(medium[..1 << 20].iter().all(|byte| *byte == 0xab) && medium[4 << 20] == 0 && medium[7 << 20] == 0xab);
}

#[test]
fn chap_is_asked_of_libiscsi_and_qemu() {
    let chap = Chap::new(credentials("somebody", "twelve bytes and more"), None).expect("one secret");
    let fixture = serve(&Shape { chap: Some(chap), digests: DigestPolicy::Preferred, ..Shape::default() });
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
    if !support::has_qemu("a_read_only_disk_is_read_only_to_qemu") {
        return;
    }
    let fixture = serve(&Shape { read_only: true, ..Shape::default() });
    let output = run(20, "qemu-io", &["-f", "raw", "-c", "write 0 4k", &fixture.url("")]);
    assert!(!output.status.success() || text(&output).contains("rror"), "{}", text(&output));
    let output = run(20, "qemu-io", &["-r", "-f", "raw", "-c", "read -P 0 0 4k", &fixture.url("")]);
    assert!(output.status.success(), "{}", text(&output));
}

#[test]
fn libiscsi_proves_itself_and_has_the_target_prove_itself() {
    let target = credentials("the-target", "the target's own secret");
    let chap = Chap::new(credentials("somebody", "twelve bytes and more"), Some(target)).expect("two secrets");
    let fixture = serve(&Shape { chap: Some(chap), ..Shape::default() });
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
