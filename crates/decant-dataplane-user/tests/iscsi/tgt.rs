//! tgt, a target of other people's, as the origin: CHAP both ways, digests, both sizes of blocks, LUN 1.

use std::net::TcpListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use decant_dataplane_user::device::{Fetch, Origin as _, Want};
use decant_dataplane_user::origin::IscsiOptions;
use decant_iscsi::login::DigestPolicy;
use rustix::io::Errno;

use crate::fixture::{eventually, fetch, image, open};
use crate::world::{TARGET, mutual, options};

/// Where `cargo xtask test` unpacked it, or else as Debian installs it.
fn program(name: &str) -> PathBuf {
    let unpacked = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../target/peers/bin").join(name);
    if unpacked.is_file() { unpacked } else { Path::new("/usr/sbin").join(name) }
}

/// A tgtd of the test's own: in the foreground, on loopback, with a control socket in the test's directory.
struct Tgt {
    child: Child,
    socket: PathBuf,
    port: u16,
}

impl Tgt {
    fn start(directory: &Path) -> Self {
        // The port is free again when it is asked for; tgtd cannot say which it took.
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        Self::start_on(directory, port)
    }

    fn start_on(directory: &Path, port: u16) -> Self {
        let socket = directory.join("tgt.sock");
        let child = Command::new(program("tgtd"))
            .args(["-f", "--iscsi", &format!("portal=127.0.0.1:{port}"), "-C", "17"])
            .env("TGT_IPC_SOCKET", &socket)
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("tgtd cannot be started: `cargo xtask test` unpacks it");
        let tgt = Self { child, socket, port };
        eventually("tgtd answers", || tgt.adm(&["--mode", "target", "--op", "show"]).is_ok());
        tgt
    }

    fn adm(&self, arguments: &[&str]) -> Result<(), String> {
        let output = Command::new(program("tgtadm"))
            .args(["-C", "17", "--lld", "iscsi"])
            .args(arguments)
            .env("TGT_IPC_SOCKET", &self.socket)
            .output()
            .expect("tgtadm cannot be started: `cargo xtask test` unpacks it");
        if output.status.success() { Ok(()) } else { Err(String::from_utf8_lossy(&output.stderr).into_owned()) }
    }

    fn must(&self, arguments: &str) {
        self.adm(&arguments.split(' ').collect::<Vec<_>>()).unwrap_or_else(|error| panic!("{arguments}: {error}"));
    }

    /// A target with `file` as LUN 1; mutual CHAP with the words of the fixture, whose secrets tgt takes from its arguments.
    fn add(&self, tid: u32, name: &str, file: &Path, block_bytes: u32, chap: bool) {
        self.must(&format!("--mode target --op new --tid {tid} -T {name}"));
        let file = file.display();
        self.must(&format!("--mode logicalunit --op new --tid {tid} --lun 1 -b {file} --blocksize {block_bytes}"));
        self.must(&format!("--mode target --op bind --tid {tid} -I ALL"));
        for digest in ["HeaderDigest", "DataDigest"] {
            self.must(&format!("--mode target --op update --tid {tid} --name {digest} --value CRC32C,None"));
        }
        if chap {
            let account = |user: &str, password: &str, outgoing: &[&str]| {
                self.adm(&["--mode", "account", "--op", "new", "--user", user, "--password", password]).unwrap();
                let tid = tid.to_string();
                let bind = ["--mode", "account", "--op", "bind", "--tid", &tid, "--user", user];
                self.adm(&[&bind[..], outgoing].concat()).unwrap();
            };
            account("reader", "the secret of the reader", &[]);
            account("server", "that of the server", &["--outgoing"]);
        }
    }
}

impl Drop for Tgt {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn tgt_is_an_origin_too() {
    let bytes = image(4 << 20);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    std::fs::write(&file, &bytes).unwrap();
    let tgt = Tgt::start(directory.path());
    let names = [TARGET.to_owned(), format!("{TARGET}-4k"), format!("{TARGET}-chap")];
    for (tid, (name, block_bytes, chap)) in
        (1..).zip([(&names[0], 512, false), (&names[1], 4096, false), (&names[2], 512, true)])
    {
        tgt.add(tid, name, &file, block_bytes, chap);
        let portal = format!("127.0.0.1:{}", tgt.port).parse().unwrap();
        for digests in [DigestPolicy::Required, DigestPolicy::Never] {
            let options =
                IscsiOptions { target: name.clone(), lun: 1, chap: chap.then(mutual), digests, ..options(portal) };
            let (origin, recorder) = open(options);
            let found = origin.wait_connected(Duration::from_secs(10)).unwrap();
            assert_eq!((found.size, found.block_bytes, found.digests), (4 << 20, block_bytes, false));
            for token in 0..16 {
                origin.request(fetch(token, token as usize * 262_144, 262_144));
            }
            origin.request(Fetch { urgent: true, ..fetch(16, 4096, 4096) });
            recorder.wait_done(0..17);
            recorder.check(&bytes, 0..bytes.len());
            origin.request(Fetch { want: Want::Digests, ..fetch(17, 0, 4096) });
            assert_eq!(recorder.wait(|answers| answers.done.get(&17).copied()), Err(Errno::OPNOTSUPP));
            recorder.close(&origin);
        }
    }
}

#[test]
fn a_tgt_that_is_killed_and_comes_back_answers_everything() {
    let bytes = image(4 << 20);
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("image");
    std::fs::write(&file, &bytes).unwrap();
    let tgt = Tgt::start(directory.path());
    tgt.add(1, TARGET, &file, 512, false);
    let portal: std::net::SocketAddr = format!("127.0.0.1:{}", tgt.port).parse().unwrap();
    let (origin, recorder) = open(IscsiOptions { lun: 1, ..options(portal) });
    origin.wait_connected(Duration::from_secs(10)).unwrap();
    origin.request(fetch(0, 0, 262_144));
    recorder.wait_done(0..1);
    drop(tgt);
    for token in 1..16 {
        origin.request(fetch(token, token as usize * 262_144, 262_144));
    }
    recorder.wait_down("Connection refused");
    let tgt = Tgt::start_on(directory.path(), portal.port());
    tgt.add(1, TARGET, &file, 512, false);
    recorder.wait_done(0..16);
    recorder.check(&bytes, 0..bytes.len());
    recorder.close(&origin);
}
