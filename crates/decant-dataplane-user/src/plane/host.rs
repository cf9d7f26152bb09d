//! The plane's dealings with the host: keepers as processes, room on the disk, what dead keepers left.

use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use decant_base::{Bytes, VolumeId};
use decant_dataplane::{Failure, FailureCode};
use rustix::fs::SeekFrom;

use super::{UserPlane, failure, refused, unexpected};
use crate::control::{self, KeeperReply, KeeperRequest, Lines, send_line};
use crate::keeper::{ALREADY_KEPT, KeeperSpec, READY_LINE};
use crate::metadata::{Metadata, State};
use crate::site::make_private_dir;

/// How long a keeper that is ending may still hold its lock.
const PATIENCE: Duration = Duration::from_secs(5);
/// Room that is kept for journals, maps and logs besides what volumes may grow to.
const MARGIN: u64 = 16 << 20;

impl UserPlane {
    /// Makes sure that the volume has a keeper.
    pub(super) fn ensure_keeper(&self, volume: &VolumeId) -> Result<(), Failure> {
        if self.kept(volume).is_some() {
            return Ok(());
        }
        self.clear_leftovers(volume);
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.spawn_keeper(volume)? {
                Spawned::Ready => return Ok(()),
                // One that is ending, or one that another agent has just started.
                Spawned::AlreadyKept if self.kept(volume).is_some() => return Ok(()),
                // It will either end, which the lock tells, or begin to listen, which nothing tells: a bounded poll sees both.
                Spawned::AlreadyKept if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(10)),
                Spawned::AlreadyKept => {
                    return Err(failure(
                        FailureCode::Retry,
                        format!(
                            "volume {volume} has a keeper that does not answer; see {}",
                            self.paths(volume).log("keeper").display()
                        ),
                    ));
                }
            }
        }
    }

    fn spawn_keeper(&self, volume: &VolumeId) -> Result<Spawned, Failure> {
        let paths = self.paths(volume);
        let io = |error: std::io::Error| {
            failure(FailureCode::Retry, format!("the keeper of volume {volume} cannot be started: {error}"))
        };
        make_private_dir(&paths.run).map_err(io)?;
        let log = File::options().create(true).append(true).open(paths.log("keeper")).map_err(io)?;
        let mut child = Command::new(&self.site.exe)
            .args(["keeper", self.site.worker.as_str(), volume.as_str()])
            .current_dir("/")
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .map_err(io)?;
        let spec = KeeperSpec { site: self.site.clone(), volume: volume.clone() };
        let text = serde_json::to_vec(&spec).map_err(|error| io(error.into()))?;
        let written = child.stdin.take().map_or(Ok(()), |mut stdin| stdin.write_all(&text));
        let mut line = String::new();
        let heard = child.stdout.take().map_or(Ok(0), |stdout| BufReader::new(stdout.take(64)).read_line(&mut line));
        if line.trim() == READY_LINE {
            // Whoever started it reaps it, whenever that is; if the agent ends first, init does.
            let reaper = std::thread::Builder::new().name("keeper-reaper".into()).spawn(move || child.wait());
            return reaper.map(|_| Spawned::Ready).map_err(io);
        }
        let status = child.wait().map_err(io)?;
        if status.code() == Some(i32::from(ALREADY_KEPT)) {
            return Ok(Spawned::AlreadyKept);
        }
        let cause = written.and(heard.map(|_| ())).err().map(|error| format!(" ({error})")).unwrap_or_default();
        let log = paths.log("keeper");
        Err(failure(
            FailureCode::Retry,
            format!("the keeper of volume {volume} ended at once: {status}{cause}; see {}", log.display()),
        ))
    }

    /// Ends the keeper and waits for its end.
    pub(super) fn stop_keeper(&self, volume: &VolumeId) -> Result<(), Failure> {
        let socket = self.paths(volume).socket();
        let io = |error: std::io::Error| {
            failure(FailureCode::Retry, format!("the keeper of volume {volume} does not answer: {error}"))
        };
        let stream = control::connect(&socket).map_err(io)?;
        send_line(&stream, &KeeperRequest::Stop).map_err(io)?;
        let mut lines = Lines::new(&stream);
        let answer = lines.receive::<Result<KeeperReply, Failure>>().map_err(io)?;
        let trouble = match answer {
            Some(Ok(KeeperReply::Stopped { trouble })) => trouble,
            Some(Ok(other)) => return Err(unexpected(&other)),
            Some(Err(refusal)) => return Err(refusal),
            None => {
                return Err(failure(FailureCode::Retry, format!("the keeper of volume {volume} died over its stop")));
            }
        };
        // The connection ends with the process.
        let _ = lines.receive::<KeeperReply>();
        trouble.map_or(Ok(()), Err)
    }

    /// Clears loop devices that a dead keeper of this volume left. There is none alive when this is called.
    pub(super) fn clear_leftovers(&self, volume: &VolumeId) {
        let name = self.site.device_name(volume);
        match crate::loopdev::clear_all(|found| found == name.as_str()) {
            Ok(cleared) if cleared.is_empty() => {}
            Ok(cleared) => tracing::warn!(%volume, ?cleared, "cleared what a keeper that died left behind"),
            Err(error) => tracing::error!(%volume, %error, "cannot look for loop devices that were left behind"),
        }
    }

    /// Proves that `room` bytes are free, those that other volumes were promised not counted.
    pub(super) fn check_room(&self, volume: &VolumeId, room: Bytes) -> Result<(), Failure> {
        let directory = self.site.volumes_dir();
        let found = rustix::fs::statvfs(&directory)
            .map_err(|error| failure(FailureCode::Retry, format!("{}: {error}", directory.display())))?;
        let free = found.f_bavail.saturating_mul(found.f_frsize);
        let promised = self.promised(volume);
        let needed = room.0.saturating_add(self.site.header.0).saturating_add(MARGIN);
        if free.saturating_sub(promised) >= needed {
            return Ok(());
        }
        Err(refused(format!(
            "no room for volume {volume} on worker {}: {} needed, {} free in {}, {} of it promised to volumes that are arriving; free some or choose another worker",
            self.site.worker,
            Bytes(needed),
            Bytes(free),
            directory.display(),
            Bytes(promised),
        )))
    }

    /// What volumes that are arriving may still grow by.
    fn promised(&self, except: &VolumeId) -> u64 {
        use decant_dataplane::Plane;
        let volumes = self.volumes().unwrap_or_default();
        volumes.iter().filter(|volume| *volume != except).fold(0, |sum: u64, volume| {
            let grows = match self.load(volume) {
                Ok(Some(Metadata {
                    header, state: State::Prepared { room, .. } | State::Clone { room, .. }, ..
                })) => room.0.saturating_sub(allocated(&self.paths(volume).image(), header).0),
                _ => 0,
            };
            sum.saturating_add(grows)
        })
    }
}

enum Spawned {
    Ready,
    AlreadyKept,
}

/// Bytes allocated for the payload of an image; 0 if there is none.
pub(super) fn allocated(image: &Path, header: Bytes) -> Bytes {
    use std::os::unix::fs::MetadataExt;
    let Ok(file) = File::open(image) else { return Bytes::ZERO };
    let Ok(metadata) = file.metadata() else { return Bytes::ZERO };
    // The header has a handful of runs; the payload may have many, and the file system knows their sum.
    let mut in_header = 0;
    let mut at = 0;
    while let Ok(start) = rustix::fs::seek(&file, SeekFrom::Data(at)) {
        if start >= header.0 {
            break;
        }
        let end = rustix::fs::seek(&file, SeekFrom::Hole(start)).unwrap_or(header.0).min(header.0);
        in_header += end - start;
        at = end;
    }
    Bytes((metadata.blocks() * 512).saturating_sub(in_header))
}
