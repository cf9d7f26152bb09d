//! A running clone's control socket: one line asks, one JSON object answers.

use std::io::{ErrorKind, Read, Write};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use decant_api::{Code, ErrorBody};
use decant_dataplane_user::standalone::{DetachError, Standalone, control_socket};
use serde_json::{Value, json};
use tokio::io::{AsyncBufReadExt, AsyncWriteExt, BufReader};
use tokio::net::UnixListener;

use crate::cli::export::Stop;
use crate::cli::output::{Output, bytes, fields, show};
use crate::cli::{Exit, Failure};

/// How long either side waits for the other's words.
const PATIENCE: Duration = Duration::from_secs(5);
/// A detach makes all that was stored durable first.
const DETACH_PATIENCE: Duration = Duration::from_secs(120);

/// The socket of this process. Removed when dropped.
pub(super) struct Control {
    listener: UnixListener,
    path: PathBuf,
}

impl Drop for Control {
    fn drop(&mut self) {
        let _ = std::fs::remove_file(&self.path);
    }
}

impl Control {
    /// Listens at `path`; its owner alone may ask.
    pub(super) fn listen(path: &Path) -> Result<Self, Failure> {
        let failed = |error: std::io::Error| {
            let cause = format_args!("{}: {error}", path.display());
            match error.kind() {
                ErrorKind::AddrInUse => Failure::blocked(
                    "in use",
                    format_args!("somebody answers at {} already", path.display()),
                    "end that clone first, or name another socket with --control",
                ),
                _ => Failure::local("control socket not made", cause, "name another one with --control"),
            }
        };
        let listener = control_socket(path).map_err(failed)?;
        let listener = UnixListener::from_std(listener).map_err(failed)?;
        Ok(Self { listener, path: path.to_owned() })
    }

    pub(super) fn path(&self) -> &Path {
        &self.path
    }

    /// Answers whoever asks, until a signal asks for the end.
    pub(super) async fn answer(&self, clone: &Arc<Standalone>, mut stop: Stop) {
        loop {
            let stream = tokio::select! {
                () = stop.next() => return,
                asked = self.listener.accept() => match asked {
                    Ok((stream, _)) => stream,
                    Err(error) => {
                        tracing::warn!(%error, "cannot accept on the control socket");
                        tokio::time::sleep(Duration::from_millis(100)).await;
                        continue;
                    }
                },
            };
            let clone = Arc::clone(clone);
            tokio::spawn(async move {
                let mut stream = BufReader::new(stream);
                let mut line = String::new();
                if !matches!(tokio::time::timeout(PATIENCE, stream.read_line(&mut line)).await, Ok(Ok(_))) {
                    return;
                }
                // A detach waits for the disk.
                let answer = tokio::task::spawn_blocking(move || act(&clone, line.trim())).await;
                let text = answer.unwrap_or_else(|error| json!({ "error": error.to_string() })).to_string();
                // Whoever asked and does not read is not waited for.
                let _ = tokio::time::timeout(PATIENCE, stream.write_all(text.as_bytes())).await;
            });
        }
    }
}

/// Does what a line asks for.
fn act(clone: &Standalone, line: &str) -> Value {
    let refused = |body: ErrorBody| json!({ "error": body });
    match line.split_once(' ').unwrap_or((line, "")) {
        ("status", "") => {}
        ("pause", "") => clone.pause(true),
        ("resume", "") => clone.pause(false),
        ("limit", "none") => clone.set_limit(None),
        ("limit", rate) => match rate.parse() {
            Ok(rate) => clone.set_limit(Some(rate)),
            Err(_) => return refused(not_understood(line)),
        },
        ("detach", "") => {
            if let Err(error) = clone.detach() {
                return refused(match &error {
                    DetachError::Missing(_) => ErrorBody::new(
                        Code::Blocked,
                        "not detached",
                        error.to_string(),
                        "wait until nothing is missing; `decant clone status` tells how far it is, `resume` and `limit none` speed it up",
                    ),
                    DetachError::Failed(_) => {
                        ErrorBody::new(Code::Unavailable, "not detached", error.to_string(), "check the disk")
                    }
                });
            }
        }
        _ => return refused(not_understood(line)),
    }
    json!({ "status": describe(clone) })
}

fn not_understood(line: &str) -> ErrorBody {
    let cause = format!("{:?} is not understood", line.chars().take(80).collect::<String>());
    ErrorBody::new(Code::InvalidRequest, "question not understood", cause, "ask with a decant of the same version")
}

fn describe(clone: &Standalone) -> Value {
    let failure = clone.failure();
    let size = clone.size();
    match clone.status() {
        Some(status) => json!({
            "state": if failure.is_some() {
                "failed"
            } else if clone.is_whole() {
                "whole"
            } else if status.bytes_missing == 0 {
                "filled"
            } else if clone.is_paused() {
                "paused"
            } else {
                "filling"
            },
            "bytes_total": status.bytes_total,
            "bytes_filled": status.bytes_filled,
            "bytes_written": status.bytes_written,
            "bytes_discarded": status.bytes_discarded,
            "bytes_missing": status.bytes_missing,
            "bytes_fetched": status.bytes_fetched,
            "rate_bytes_per_s": status.rate_bytes_per_s,
            "origin": if clone.is_whole() { Value::Null } else { status.origin.into() },
            "connected": status.connected,
            "hindrance": status.hindrance,
            "failure": failure,
        }),
        None => json!({
            "state": if failure.is_some() { "failed" } else { "whole" },
            "bytes_total": size,
            "bytes_filled": size,
            "bytes_written": 0,
            "bytes_discarded": 0,
            "bytes_missing": 0,
            "bytes_fetched": 0,
            "rate_bytes_per_s": 0,
            "origin": Value::Null,
            "connected": false,
            "hindrance": "",
            "failure": failure,
        }),
    }
}

/// Asks a running clone and shows how it stands.
pub(super) fn ask(control: &Path, line: &str, output: Output) -> Result<Exit, Failure> {
    let silent = |error: std::io::Error| {
        Failure::local(
            "clone not running",
            format_args!("{}: {error}", control.display()),
            "name the map or the control socket of a running clone",
        )
    };
    let mut stream = UnixStream::connect(control).map_err(silent)?;
    let patience = if line == "detach" { DETACH_PATIENCE } else { PATIENCE };
    stream.set_read_timeout(Some(patience)).map_err(silent)?;
    stream.write_all(format!("{line}\n").as_bytes()).map_err(silent)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(silent)?;
    let foreign = |error: serde_json::Error| {
        Failure::local("answer not understood", error, "ask with a decant of the same version")
    };
    let value: Value = serde_json::from_str(&text).map_err(foreign)?;
    if let Some(error) = value.get("error") {
        let body: ErrorBody = serde_json::from_value(error.clone()).map_err(foreign)?;
        return Err(body.into());
    }
    show(output, &value["status"], |value| {
        let size = |field: &str| value[field].as_u64().map(bytes).unwrap_or_default();
        let word = |field: &str| value[field].as_str().unwrap_or_default().to_owned();
        fields(&[
            ("state", word("state")),
            ("origin", word("origin")),
            ("total", size("bytes_total")),
            ("missing", size("bytes_missing")),
            ("fetched", size("bytes_fetched")),
            ("written here", size("bytes_written")),
            ("discarded here", size("bytes_discarded")),
            ("rate", format!("{}/s", size("rate_bytes_per_s"))),
            ("waits for", word("hindrance")),
            ("failure", word("failure")),
        ])
    });
    Ok(Exit::Done)
}
