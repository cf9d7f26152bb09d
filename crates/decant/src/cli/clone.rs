//! `decant clone`: a clone on its own, of any NBD export, without a worker.

use std::io::Read;
use std::net::ToSocketAddrs;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::{Args, Subcommand};
use decant_dataplane_user::export::Address;
use decant_dataplane_user::standalone::{Standalone, StandaloneOptions};
use serde_json::{Value, json};
use tokio::io::AsyncWriteExt;
use tokio::net::UnixListener;
use tokio::signal::unix::{SignalKind, signal};

use super::output::{Output, bytes, fields, print, show};
use super::{Exit, Failure, Global};

/// How long a running clone may take to say how it stands.
const PATIENCE: Duration = Duration::from_secs(5);

/// `decant clone`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Prints READY once clients can connect. Ends on SIGTERM or Ctrl-C; started again with the same files, it goes on\n\
        where it ended.\n\nExamples:\n  \
        decant clone nbd://10.0.0.7:10809/disk disk.img --meta disk.map --serve unix:/run/disk.sock\n  \
        decant clone status --control disk.map.sock -o json"
)]
pub(crate) struct CloneArgs {
    #[command(subcommand)]
    verb: Option<CloneVerb>,
    #[command(flatten)]
    start: Option<Start>,
}

#[derive(Debug, Subcommand)]
enum CloneVerb {
    /// How far a running clone is.
    Status {
        /// Its control socket: the map's name with `.sock` added.
        #[arg(long, value_name = "SOCKET")]
        control: PathBuf,
    },
}

#[derive(Debug, Args)]
struct Start {
    /// Where missing blocks come from: nbd://HOST:PORT/EXPORT (10809 if no port is said) or nbd+unix:///EXPORT?socket=PATH.
    origin: String,
    /// The file that is filled; made if it is not there.
    destination: PathBuf,
    /// The clone's map; made if it is not there.
    #[arg(long, value_name = "FILE")]
    meta: PathBuf,
    /// Where clients connect over NBD.
    #[arg(long, value_name = "unix:PATH")]
    serve: String,
    /// Whether blocks are fetched that nobody has asked for.
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = ["on", "off"])]
    hydrate: String,
}

pub(crate) fn run(args: CloneArgs, global: &Global) -> Result<Exit, Failure> {
    match (args.verb, args.start) {
        (Some(CloneVerb::Status { control }), _) => status(&control, global.output),
        (None, Some(start)) => serve(&start),
        (None, None) => Err(Failure::usage("nothing to clone", "no origin is named", "see `decant clone --help`")),
    }
}

/// `nbd://HOST[:PORT]/EXPORT` or `nbd+unix:///EXPORT?socket=PATH`.
fn parse_origin(text: &str) -> Result<(Address, String), Failure> {
    let wrong = |cause: String| {
        Failure::usage(
            "origin not understood",
            cause,
            "write nbd://HOST[:PORT]/EXPORT or nbd+unix:///EXPORT?socket=PATH",
        )
    };
    if let Some(rest) = text.strip_prefix("nbd+unix:///") {
        let (export, socket) = rest.split_once("?socket=").ok_or_else(|| wrong(format!("{text} names no socket")))?;
        return Ok((Address::Unix(socket.into()), export.to_owned()));
    }
    let rest = text.strip_prefix("nbd://").ok_or_else(|| wrong(format!("{text} is no NBD address")))?;
    let (host, export) = rest.split_once('/').unwrap_or((rest, ""));
    // 10809 is NBD's port (IANA); a bracketed IPv6 address has colons of its own.
    let has_port = host.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok()) && !host.ends_with(']');
    let host = if has_port { host.to_owned() } else { format!("{host}:10809") };
    let mut found = host.to_socket_addrs().map_err(|error| wrong(format!("{host}: {error}")))?;
    let address = found.next().ok_or_else(|| wrong(format!("{host} has no address")))?;
    Ok((Address::Tcp(address), export.to_owned()))
}

fn parse_serve(text: &str) -> Result<Address, Failure> {
    match text.strip_prefix("unix:") {
        Some(path) if !path.is_empty() => Ok(Address::Unix(path.into())),
        _ => Err(Failure::usage("address not understood", format_args!("{text:?} is no unix:PATH"), "write unix:PATH")),
    }
}

fn control_of(meta: &Path) -> PathBuf {
    let mut name = meta.as_os_str().to_owned();
    name.push(".sock");
    name.into()
}

fn serve(start: &Start) -> Result<Exit, Failure> {
    let (origin, export) = parse_origin(&start.origin)?;
    let options = StandaloneOptions {
        origin,
        export,
        destination: start.destination.clone(),
        meta: start.meta.clone(),
        serve: parse_serve(&start.serve)?,
        hydrate: start.hydrate == "on",
    };
    let clone = Standalone::start(&options)
        .map_err(|error| Failure::local("clone not started", error, "check the origin and the files named"))?;
    let control = control_of(&start.meta);
    let _ = std::fs::remove_file(&control);
    let broken = |error: std::io::Error| {
        Failure::local("control socket not made", format_args!("{}: {error}", control.display()), "check its directory")
    };
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().map_err(broken)?;
    let ended = runtime.block_on(answer(&control, &clone));
    let _ = std::fs::remove_file(&control);
    if let Address::Unix(path) = &options.serve {
        let _ = std::fs::remove_file(path);
    }
    let closed = clone.close();
    ended.map_err(broken)?;
    closed.map_err(|error| {
        Failure::local("clone not ended in order", format_args!("the last commit failed: {error}"), "check the disk")
    })?;
    Ok(Exit::Done)
}

/// Tells whoever connects how the clone stands, until a signal asks for the end.
async fn answer(control: &Path, clone: &Standalone) -> std::io::Result<()> {
    let listener = UnixListener::bind(control)?;
    let (mut terminate, mut interrupt) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    print("READY");
    loop {
        tokio::select! {
            _ = terminate.recv() => return Ok(()),
            _ = interrupt.recv() => return Ok(()),
            asked = listener.accept() => {
                let (mut stream, _) = asked?;
                let text = describe(clone).to_string();
                // Whoever asked and does not read is not waited for: the answer fits into the socket's buffer.
                let _ = tokio::time::timeout(PATIENCE, stream.write_all(text.as_bytes())).await;
            }
        }
    }
}

fn describe(clone: &Standalone) -> Value {
    let failed = clone.failure();
    match clone.status() {
        Some(status) => json!({
            "state": if failed.is_some() { "failed" } else if status.bytes_missing == 0 { "filled" } else { "filling" },
            "bytes_total": status.bytes_total,
            "bytes_filled": status.bytes_filled,
            "bytes_written": status.bytes_written,
            "bytes_discarded": status.bytes_discarded,
            "bytes_missing": status.bytes_missing,
            "bytes_fetched": status.bytes_fetched,
            "rate_bytes_per_s": status.rate_bytes_per_s,
            "origin": status.origin,
            "failure": failed,
        }),
        None => json!({ "state": "whole", "bytes_missing": 0, "failure": failed }),
    }
}

fn status(control: &Path, output: Output) -> Result<Exit, Failure> {
    let silent = |error: std::io::Error| {
        Failure::local(
            "clone not running",
            format_args!("{}: {error}", control.display()),
            "name the control socket of a running clone: its map's name with .sock added",
        )
    };
    let mut stream = UnixStream::connect(control).map_err(silent)?;
    stream.set_read_timeout(Some(PATIENCE)).map_err(silent)?;
    let mut text = String::new();
    stream.read_to_string(&mut text).map_err(silent)?;
    let value: Value = serde_json::from_str(&text)
        .map_err(|error| Failure::local("answer not understood", error, "ask a decant of the same version"))?;
    show(output, &value, |value| {
        let size = |field: &str| value[field].as_u64().map(bytes).unwrap_or_default();
        fields(&[
            ("state", value["state"].as_str().unwrap_or_default().to_owned()),
            ("origin", value["origin"].as_str().unwrap_or_default().to_owned()),
            ("total", size("bytes_total")),
            ("missing", size("bytes_missing")),
            ("fetched", size("bytes_fetched")),
            ("written here", size("bytes_written")),
            ("failure", value["failure"].as_str().unwrap_or_default().to_owned()),
        ])
    });
    Ok(Exit::Done)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn origins_read_as_uris() {
        let tcp = |text: &str| Address::Tcp(text.parse().expect("an address"));
        assert_eq!(parse_origin("nbd://127.0.0.1:10811/a").expect("valid"), (tcp("127.0.0.1:10811"), "a".to_owned()));
        assert_eq!(parse_origin("nbd://[::1]").expect("valid"), (tcp("[::1]:10809"), String::new()));
        let unix = Address::Unix("/tmp/s".into());
        assert_eq!(parse_origin("nbd+unix:///x?socket=/tmp/s").expect("valid"), (unix, "x".to_owned()));
        for text in ["", "nbd+unix:///x", "http://a/b", "/dev/sda"] {
            assert_eq!(parse_origin(text).expect_err("invalid").exit, Exit::Usage, "{text}");
        }
    }
}
