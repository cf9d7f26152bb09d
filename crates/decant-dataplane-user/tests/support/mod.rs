//! Workers with real files, keepers and devices, and the cleaning up after them.

#![allow(dead_code, reason = "each test file uses its part")]

use std::net::{Ipv4Addr, SocketAddr};
use std::path::{Path, PathBuf};
use std::process::Command as Process;
use std::time::{Duration, Instant};

use decant_base::{Bytes, MigrationId, VolumeId, WorkerId};
use decant_dataplane::{Command, Failure, Outcome, Plane, VolumeStatus};
use decant_dataplane_user::control::{self, KeeperReply, KeeperRequest, KeeperStatus};
use decant_dataplane_user::keys::KeySource;
use decant_dataplane_user::plane::UserPlane;
use decant_dataplane_user::site::{SiteConfig, TlsFiles};

/// Says why the tests of devices cannot run here, if so.
pub(crate) fn cannot_run(test: &str) -> bool {
    let why = if !rustix::process::geteuid().is_root() {
        "not root"
    } else if !Path::new("/dev/fuse").exists() {
        "no /dev/fuse"
    } else if !Path::new("/dev/loop-control").exists() {
        "no loop devices"
    } else {
        return false;
    };
    println!("SKIP {test}: {why}");
    true
}

/// A certificate authority and what it signs, in `directory`.
pub(crate) struct Authority {
    directory: PathBuf,
    certificate: rcgen::Certificate,
    key: rcgen::KeyPair,
    parameters: rcgen::CertificateParams,
}

impl Authority {
    pub(crate) fn new(directory: &Path) -> Self {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(Vec::<String>::new()).unwrap();
        parameters.is_ca = rcgen::IsCa::Ca(rcgen::BasicConstraints::Unconstrained);
        let certificate = parameters.self_signed(&key).unwrap();
        std::fs::write(directory.join("ca.pem"), certificate.pem()).unwrap();
        Self { directory: directory.to_owned(), certificate, key, parameters }
    }

    pub(crate) fn sign(&self, worker: &str) -> TlsFiles {
        let key = rcgen::KeyPair::generate().unwrap();
        let mut parameters = rcgen::CertificateParams::new(vec![worker.to_owned()]).unwrap();
        parameters.extended_key_usages =
            vec![rcgen::ExtendedKeyUsagePurpose::ServerAuth, rcgen::ExtendedKeyUsagePurpose::ClientAuth];
        let issuer = rcgen::Issuer::from_params(&self.parameters, &self.key);
        let certificate = parameters.signed_by(&key, &issuer).unwrap();
        let files = TlsFiles {
            ca: self.directory.join("ca.pem"),
            cert: self.directory.join(format!("{worker}.pem")),
            key: self.directory.join(format!("{worker}.key")),
        };
        std::fs::write(&files.cert, certificate.pem()).unwrap();
        std::fs::write(&files.key, key.serialize_pem()).unwrap();
        files
    }
}

/// A place for workers. When it goes, every keeper, device and mount under it goes too.
pub(crate) struct World {
    pub(crate) directory: tempfile::TempDir,
    authority: Authority,
}

impl World {
    pub(crate) fn new() -> Self {
        isolate_mounts();
        clean_up_after_killed_runs();
        let prefix = format!("{PREFIX}{}-", std::process::id());
        let directory = tempfile::Builder::new().prefix(&prefix).tempdir().unwrap();
        let authority = Authority::new(directory.path());
        Self { directory, authority }
    }

    pub(crate) fn worker(&self, name: &str, header: Bytes) -> Worker {
        self.worker_with(name, header, env!("CARGO_BIN_EXE_decant-plane-test").into())
    }

    /// A worker whose volume process dies, once for each keeper, at the crash point `point`.
    pub(crate) fn crashing_worker(&self, name: &str, point: &str) -> Worker {
        let program = self.directory.path().join(format!("{name}.sh"));
        let exe = env!("CARGO_BIN_EXE_decant-plane-test");
        // The keeper hands its environment to the first volume process and takes it away from the next.
        let script = format!("#!/bin/sh\n[ \"$1\" = keeper ] && export DECANT_CRASH={point}\nexec {exe} \"$@\"\n");
        std::fs::write(&program, script).unwrap();
        std::fs::set_permissions(&program, std::os::unix::fs::PermissionsExt::from_mode(0o755)).unwrap();
        self.worker_with(name, Bytes::mib(4), program)
    }

    fn worker_with(&self, name: &str, header: Bytes, exe: PathBuf) -> Worker {
        let home = self.directory.path().join(name);
        let site = SiteConfig {
            worker: WorkerId::new(name).unwrap(),
            state_dir: home.join("state"),
            run_dir: home.join("run"),
            data_listen: SocketAddr::from((Ipv4Addr::LOCALHOST, 0)),
            iscsi_trusted: vec!["127.0.0.0/8".parse().expect("a network")],
            tls: self.authority.sign(name),
            header,
            // One key store for all, as a fleet has.
            keys: KeySource::File { directory: self.directory.path().join("keys") },
            exe,
        };
        let plane = UserPlane::new(site.clone()).unwrap();
        let home = home.canonicalize().unwrap();
        Worker { plane, site: SiteConfig { state_dir: home.join("state"), run_dir: home.join("run"), ..site }, home }
    }

    pub(crate) fn mount_point(&self, name: &str) -> PathBuf {
        let path = self.directory.path().join(name);
        std::fs::create_dir_all(&path).unwrap();
        path
    }
}

/// Gives this thread, and what it starts, mounts of its own: whoever copies the host's mounts meanwhile, as `ip netns exec`
/// does, would keep a file system of a test busy after it was unmounted.
fn isolate_mounts() {
    use rustix::mount::{MountPropagationFlags, mount_change};
    use rustix::thread::{UnshareFlags, unshare_unsafe};
    // SAFETY: a mount namespace, unlike a table of descriptors, is shared with no code that relies on it.
    unsafe { unshare_unsafe(UnshareFlags::NEWNS) }.unwrap();
    mount_change("/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).unwrap();
}

const PREFIX: &str = "decant-plane-test-";

/// What a run that was killed left: its directories are named after its process.
fn clean_up_after_killed_runs() {
    for entry in std::fs::read_dir(std::env::temp_dir()).into_iter().flatten().flatten() {
        let name = entry.file_name().into_string().unwrap_or_default();
        let Some(pid) = name.strip_prefix(PREFIX).and_then(|rest| rest.split('-').next()) else { continue };
        if !Path::new("/proc").join(pid).exists() {
            clean_up(&entry.path());
            let _ = std::fs::remove_dir_all(entry.path());
        }
    }
}

/// Ends the keepers that have their sockets in `directory` and unmounts what is mounted there.
fn clean_up(directory: &Path) {
    for worker in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        for volume in std::fs::read_dir(worker.path().join("run/volumes")).into_iter().flatten().flatten() {
            if let Ok(KeeperReply::Status(status)) =
                control::ask(&volume.path().join("keeper.sock"), &KeeperRequest::Kept)
            {
                kill(status.pid);
                eventually("a killed keeper ends", || !Path::new(&format!("/proc/{}", status.pid)).exists());
            }
        }
        let name = worker.file_name().into_string().unwrap_or_default();
        decant_dataplane_user::process::remove_empty_cgroup(
            &name,
            &worker.path().join("run"),
            decant_dataplane_user::keeper::CGROUP,
        );
    }
    // After the keepers: what was mounted gives errors now, and an unmount does not wait for anybody.
    let root = directory.display().to_string();
    let mounts = std::fs::read_to_string("/proc/thread-self/mounts").unwrap_or_default();
    for mount in mounts.lines().filter_map(|line| line.split(' ').nth(1)).filter(|path| path.starts_with(&root)) {
        let _ = Process::new("umount").args(["-l", mount]).status();
    }
}

impl Drop for World {
    fn drop(&mut self) {
        clean_up(self.directory.path());
        if std::thread::panicking() {
            for log in find_logs(self.directory.path()) {
                println!("---- {}\n{}", log.display(), std::fs::read_to_string(&log).unwrap_or_default());
            }
        }
    }
}

fn find_logs(directory: &Path) -> Vec<PathBuf> {
    let mut logs = Vec::new();
    for entry in std::fs::read_dir(directory).into_iter().flatten().flatten() {
        let path = entry.path();
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            logs.extend(find_logs(&path));
        } else if path.extension().is_some_and(|extension| extension == "log") {
            logs.push(path);
        }
    }
    logs
}

pub(crate) fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid as i32).unwrap();
    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
}

/// Runs a program and wants it to succeed.
pub(crate) fn run(program: &str, arguments: &[&str]) -> String {
    let output =
        Process::new(program).args(arguments).output().unwrap_or_else(|error| panic!("{program}: {error}; install it"));
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}\n{}",
        output.status,
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8_lossy(&output.stdout).into_owned()
}

/// Waits until `met`; the events waited for here are other processes' and tell nobody.
pub(crate) fn eventually(what: &str, mut met: impl FnMut() -> bool) {
    let deadline = Instant::now() + Duration::from_secs(30);
    while !met() {
        assert!(Instant::now() < deadline, "never: {what}");
        std::thread::sleep(Duration::from_millis(2));
    }
}

pub(crate) struct Worker {
    pub(crate) plane: UserPlane,
    pub(crate) site: SiteConfig,
    pub(crate) home: PathBuf,
}

pub(crate) fn volume(name: &str) -> VolumeId {
    VolumeId::new(name).unwrap()
}

pub(crate) fn migration(name: &str) -> MigrationId {
    MigrationId::new(name).unwrap()
}

impl Worker {
    pub(crate) fn perform(&self, command: Command) -> Result<Outcome, Failure> {
        self.plane.perform(&command)
    }

    pub(crate) fn create(&self, name: &str, size: Bytes) {
        let made = self.perform(Command::Create { volume: volume(name), size, sector_size: 4096 });
        assert_eq!(made, Ok(Outcome::Done));
    }

    pub(crate) fn attach(&self, name: &str) -> PathBuf {
        match self.perform(Command::Attach { volume: volume(name) }) {
            Ok(Outcome::Attached { device }) => device,
            other => panic!("attach: {other:?}"),
        }
    }

    pub(crate) fn detach(&self, name: &str) {
        assert_eq!(self.perform(Command::Detach { volume: volume(name) }), Ok(Outcome::Done));
    }

    pub(crate) fn status(&self, name: &str) -> VolumeStatus {
        match self.perform(Command::Status { volume: volume(name) }) {
            Ok(Outcome::Status(status)) => *status,
            other => panic!("status: {other:?}"),
        }
    }

    pub(crate) fn keeper(&self, name: &str) -> Option<KeeperStatus> {
        let socket = self.site.paths(&volume(name)).socket();
        match control::ask(&socket, &KeeperRequest::Status) {
            Ok(KeeperReply::Status(status)) => Some(*status),
            _ => None,
        }
    }

    /// Kills the volume's process as `kill -9` does; returns when its successor serves.
    pub(crate) fn kill_volume(&self, name: &str) {
        let before = self.keeper(name).unwrap();
        kill(before.volume_pid.unwrap());
        eventually("the volume process is started again", || {
            self.keeper(name).is_some_and(|now| now.restarts > before.restarts && now.volume.is_some())
        });
    }

    /// Nothing of the volume runs or is bound any more.
    pub(crate) fn assert_nothing_left(&self, name: &str) {
        assert!(self.keeper(name).is_none(), "a keeper is left");
        let device = self.site.device_name(&volume(name));
        let found = decant_dataplane_user::loopdev::find(|found| found == device.as_str()).unwrap();
        assert!(found.is_empty(), "loop devices are left: {found:?}");
        let mounts =
            ["/proc/thread-self/mountinfo", "/proc/1/mountinfo"].map(|path| std::fs::read_to_string(path).unwrap());
        let mounts = mounts.concat();
        assert!(!mounts.contains(&self.home.display().to_string()), "mounts are left:\n{mounts}");
        assert!(!mounts.contains(device.as_str()), "mounts are left:\n{mounts}");
    }
}

pub(crate) fn mount(device: &Path, at: &Path) {
    run("mount", &["-t", "ext4", device.to_str().unwrap(), at.to_str().unwrap()]);
}

pub(crate) fn unmount(at: &Path) {
    run("umount", &[at.to_str().unwrap()]);
}
