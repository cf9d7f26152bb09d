//! `decant clone`: a clone on its own, without a worker.

mod control;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::{Args, Subcommand};
use decant_base::Bytes;
use decant_dataplane_user::engine::OpenError;
use decant_dataplane_user::export::Address;
use decant_dataplane_user::iscsi::NAMING_AUTHORITY;
use decant_dataplane_user::origin::{IscsiUrl, UrlError};
use decant_dataplane_user::standalone::{Source, Standalone, StandaloneError, StandaloneOptions};
use decant_dataplane_user::tls::Fingerprint;
use serde_json::{Map, Value};

use super::export::{NBD_PORT, Stop, in_use, listen_failure};
use super::ready::{host, notify, ready};
use super::{Exit, Failure, Global, parse_bytes, secrets};

/// `decant clone`.
#[derive(Debug, Args)]
#[command(
    args_conflicts_with_subcommands = true,
    after_help = "Prints READY once clients can connect. Ends on SIGTERM or Ctrl-C; started again with the same files, it goes on\n\
        where it ended. ORIGIN must not change meanwhile.\n\n\
        Examples:\n  \
        decant clone nbd://10.0.0.7/disk disk.img --meta disk.map --serve unix:/run/disk.sock\n  \
        decant clone iscsi://10.0.0.7/iqn.2026-11.com.example:a/0 disk.img --meta disk.map --serve unix:s --chap chap\n  \
        decant clone /dev/vg0/old /dev/vg1/new --meta new.map --fuse /run/new.img --limit 50M\n  \
        decant clone status --meta disk.map -o json\n  \
        decant clone detach --meta disk.map                   once nothing is missing"
)]
pub(crate) struct CloneArgs {
    #[command(subcommand)]
    verb: Option<Verb>,
    #[command(flatten)]
    start: Option<Start>,
}

/// Which running clone.
#[derive(Debug, Args)]
#[group(required = true, multiple = false)]
struct Which {
    /// Its control socket: the map's name with `.sock` added.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Its map.
    #[arg(long, value_name = "FILE")]
    meta: Option<PathBuf>,
}

impl Which {
    fn socket(&self) -> PathBuf {
        match (&self.control, &self.meta) {
            (Some(control), _) => control.clone(),
            (None, meta) => control_of(meta.as_deref().unwrap_or(Path::new("clone.map"))),
        }
    }
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// How far a running clone is.
    Status {
        #[command(flatten)]
        which: Which,
    },
    /// Limit how fast it fetches what nobody has asked for.
    Limit {
        /// Bytes per second, e.g. 50M, or `none`.
        #[arg(value_parser = parse_limit)]
        rate: Limit,
        #[command(flatten)]
        which: Which,
    },
    /// Fetch only what somebody reads.
    Pause {
        #[command(flatten)]
        which: Which,
    },
    /// Fetch the rest too.
    Resume {
        #[command(flatten)]
        which: Which,
    },
    /// Let the origin go, once nothing is missing; the clone goes on serving.
    Detach {
        #[command(flatten)]
        which: Which,
    },
}

/// Bytes per second, or no limit.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Limit(Option<u64>);

fn parse_limit(text: &str) -> Result<Limit, String> {
    if text == "none" {
        return Ok(Limit(None));
    }
    let Bytes(rate) = parse_bytes(text.trim_end_matches("/s"))?;
    if rate == 0 { Err("a rate is more than 0; `decant clone pause` stops".to_owned()) } else { Ok(Limit(Some(rate))) }
}

#[derive(Debug, Args)]
#[command(group = clap::ArgGroup::new("front").args(["serve", "fuse"]).required(true).multiple(true))]
struct Start {
    /// Where missing blocks come from: nbd://HOST:PORT/EXPORT, nbds:// (with --tls), nbd+unix:///EXPORT?socket=PATH,
    /// iscsi://HOST:PORT/IQN/LUN, or a file or block device of this machine that nobody writes.
    origin: String,
    /// What is filled: a regular file, made if it is not there, or a block device that nobody uses.
    destination: PathBuf,
    /// The clone's map; made if it is not there.
    #[arg(long, value_name = "FILE")]
    meta: PathBuf,
    /// Where the clone is asked and steered; the map's name with `.sock` added if none is said.
    #[arg(long, value_name = "SOCKET")]
    control: Option<PathBuf>,
    /// Where there is no map yet: overwrite what DEST holds.
    #[arg(long)]
    overwrite: bool,
    /// ORIGIN or DEST of the map has another name now: record it as it is named here.
    #[arg(long)]
    moved: bool,
    /// Where clients connect over NBD.
    #[arg(long, value_name = "unix:PATH")]
    serve: Option<String>,
    /// Where the clone is a regular file; made if it is not there.
    #[arg(long, value_name = "PATH")]
    fuse: Option<PathBuf>,
    /// Whether blocks are fetched that nobody has asked for.
    #[arg(long, value_name = "on|off", default_value = "on", value_parser = ["on", "off"])]
    hydrate: String,
    /// Most bytes per second of those, e.g. 50M.
    #[arg(long, value_name = "RATE", value_parser = parse_limit)]
    limit: Option<Limit>,
    /// Mutual TLS for nbds://: a directory with ca.pem, NAME.pem and NAME.key, or the three files.
    #[arg(long, value_name = "DIR|CA,CERT,KEY")]
    tls: Option<String>,
    /// The SHA-256 fingerprint that the server's certificate must have.
    #[arg(long, value_name = "HEX", requires = "tls")]
    peer: Option<Fingerprint>,
    /// Secrets for iscsi://: what we prove, and perhaps the target: `username`, `password`, `username_in`, `password_in`.
    #[arg(long, value_name = "FILE")]
    chap: Option<PathBuf>,
    /// Our name for iscsi://, by which a target may know us.
    #[arg(long, value_name = "IQN", default_value_t = format!("{NAMING_AUTHORITY}:clone"))]
    initiator: String,
}

pub(crate) fn run(args: CloneArgs, global: &Global) -> Result<Exit, Failure> {
    let Some(verb) = args.verb else {
        return match args.start {
            Some(start) => serve(&start, global),
            None => Err(Failure::usage("nothing to clone", "no origin is named", "see `decant clone --help`")),
        };
    };
    match verb {
        Verb::Status { which } => control::ask(&which.socket(), "status", global.output),
        Verb::Limit { rate: Limit(rate), which } => {
            let rate = rate.map_or_else(|| "none".to_owned(), |rate| rate.to_string());
            control::ask(&which.socket(), &format!("limit {rate}"), global.output)
        }
        Verb::Pause { which } => control::ask(&which.socket(), "pause", global.output),
        Verb::Resume { which } => control::ask(&which.socket(), "resume", global.output),
        Verb::Detach { which } => control::ask(&which.socket(), "detach", global.output),
    }
}

/// An origin as its text says, before anything is looked up or read for it.
#[derive(Debug, Clone, PartialEq, Eq)]
enum Origin {
    Nbd { address: Address, export: String },
    Iscsi(IscsiUrl),
    File(PathBuf),
}

/// What an origin's text says; a path is what has no scheme.
fn parse_origin(start: &Start) -> Result<Origin, Failure> {
    let text = start.origin.as_str();
    let wrong = |cause: String| {
        Failure::usage(
            "origin not understood",
            cause,
            "write nbd://HOST[:PORT]/EXPORT, nbds://HOST[:PORT]/EXPORT with --tls, nbd+unix:///EXPORT?socket=PATH, \
             iscsi://HOST[:PORT]/IQN/LUN, or a path",
        )
    };
    let (scheme, rest) = text.split_once("://").unwrap_or(("", text));
    if (scheme == "nbds") != start.tls.is_some() {
        return Err(wrong("nbds:// and --tls belong together".into()));
    }
    if scheme != "iscsi" && start.chap.is_some() {
        return Err(wrong("--chap is for iscsi://".into()));
    }
    match scheme {
        "" if text.is_empty() => Err(wrong("it is empty".into())),
        "" => Ok(Origin::File(text.into())),
        "nbd+unix" => {
            let named = rest.strip_prefix('/').and_then(|rest| rest.split_once("?socket="));
            let (export, socket) = named.ok_or_else(|| wrong(format!("{text} names no socket")))?;
            Ok(Origin::Nbd { address: Address::Unix(socket.into()), export: export.to_owned() })
        }
        "nbd" | "nbds" => {
            let (address, export) = rest.split_once('/').unwrap_or((rest, ""));
            Ok(Origin::Nbd { address: host(address, NBD_PORT)?, export: export.to_owned() })
        }
        "iscsi" => text.parse().map(Origin::Iscsi).map_err(|error: UrlError| wrong(error.to_string())),
        _ => Err(wrong(format!("{scheme}:// is not spoken"))),
    }
}

/// What to connect to, and what we show it of ourselves: certificates and secrets are read here.
fn source(origin: Origin, start: &Start) -> Result<Source, Failure> {
    let certificates = |error| Failure::usage("certificates not usable", error, "see `decant ca --help`");
    Ok(match origin {
        Origin::Nbd { address, export } => {
            let tls = match &start.tls {
                Some(text) => Some(secrets::identity(text)?.client(start.peer).map_err(certificates)?),
                None => None,
            };
            Source::Nbd { address, export, tls }
        }
        Origin::Iscsi(IscsiUrl { host, port, target, lun }) => {
            let chap = start.chap.as_deref().map(secrets::chap).transpose()?;
            let (address, initiator) = (Address::of_host(&host, port), start.initiator.clone());
            Source::Iscsi { address, target, lun, initiator, chap }
        }
        Origin::File(path) => Source::File(path),
    })
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

fn options(start: &Start) -> Result<StandaloneOptions, Failure> {
    if start.destination == start.meta {
        let cause = "DEST and --meta name the same file";
        return Err(Failure::usage("map not usable", cause, "name another file for the map"));
    }
    Ok(StandaloneOptions {
        origin: start.origin.clone(),
        destination: start.destination.clone(),
        meta: start.meta.clone(),
        serve: start.serve.as_deref().map(parse_serve).transpose()?,
        fuse: start.fuse.clone(),
        hydrate: start.hydrate == "on",
        limit: start.limit.and_then(|Limit(rate)| rate),
        overwrite: start.overwrite,
        moved: start.moved,
    })
}

/// Why a clone does not start, as its user has to hear it.
fn not_started(error: StandaloneError) -> Failure {
    let another_map = "name the map, the origin and the destination that belong together";
    match error {
        StandaloneError::Claim(error) => in_use(error),
        StandaloneError::Serve(error) => listen_failure(&error),
        StandaloneError::InUse(_) => Failure::blocked("in use", error, "end that clone first, or name another map"),
        StandaloneError::AnotherClone { what, ref record, .. } => {
            let fix = format!(
                "{another_map}; if the {what} is the same and only its name is new, add --moved; to begin another clone, name \
                 another map, or remove {} once nobody needs it",
                record.display()
            );
            Failure::blocked("another clone's map", error, fix)
        }
        StandaloneError::NoRecord { .. } => {
            let fix =
                "if the map is of this origin and this destination, add --moved; else name those that belong together";
            Failure::blocked("map without a record", error, fix)
        }
        StandaloneError::NotEmpty { .. } => Failure::blocked(
            "destination not empty",
            error,
            "name its map with --meta, or another destination; or add --overwrite if nothing on it is needed",
        ),
        StandaloneError::NotItsMap { .. } => Failure::blocked("not this map's destination", error, another_map),
        StandaloneError::TooSmall { .. } => Failure::blocked("no room", error, "name a larger device"),
        StandaloneError::NoRoom { .. } => {
            Failure::blocked("no room", error, "free some, or name a map on another file system with --meta")
        }
        StandaloneError::OriginSize { .. } => {
            Failure::blocked("another origin", error, "name the origin that the clone was begun of; it must not change")
        }
        StandaloneError::Size(_) => {
            Failure::usage("origin not cloned", error, "name an origin of whole 512-byte sectors")
        }
        StandaloneError::Open(OpenError::Failed(note)) => {
            let fix = format!(
                "check the disk; then begin again with another destination and map, or remove {} to go on with what is there",
                note.path.display()
            );
            let cause = format!(
                "it acknowledged nothing any more ({}); what was written since the last flush is uncertain",
                note.why
            );
            Failure::local("clone failed earlier", cause, fix)
        }
        StandaloneError::Open(error) => {
            Failure::local("clone not started", chain(&error), "check that --meta names this clone's map")
        }
        error => Failure::local("clone not started", error, "check the origin and the files named"),
    }
}

fn chain(error: &dyn std::error::Error) -> String {
    match error.source() {
        Some(source) => format!("{error}: {}", chain(source)),
        None => error.to_string(),
    }
}

fn serve(start: &Start, global: &Global) -> Result<Exit, Failure> {
    crate::processes::log();
    let options = options(start)?;
    let origin = parse_origin(start)?;
    let broken = |error: std::io::Error| Failure::local("clone not started", error, "check the limits of this process");
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build().map_err(broken)?;
    let clone = runtime.block_on(async {
        let stop = Stop::listen()?;
        let opening = Standalone::open(&options).map_err(not_started)?;
        // Before anything is made: without it the clone could be neither watched nor detached.
        let control = control::Control::listen(&start.control.clone().unwrap_or_else(|| control_of(&start.meta)))?;
        let source = if opening.needs_origin() { Some(source(origin, start)?) } else { None };
        let clone = Arc::new(opening.start(source.as_ref()).map_err(not_started)?);
        ready(global.output, &facts(&options, &clone, control.path()));
        control.answer(&clone, stop).await;
        notify("STOPPING=1");
        Ok::<_, Failure>(clone)
    })?;
    // Whoever still answers a question gives the clone back.
    drop(runtime);
    let failed = clone.failure();
    let closed = Arc::into_inner(clone).map_or(Ok(()), Standalone::close);
    match (failed, closed) {
        (None, Ok(())) => Ok(Exit::Done),
        (failed, closed) => {
            let cause = failed.or_else(|| closed.err().map(|error| format!("the last commit failed: {error}")));
            Err(Failure::local(
                "clone failed",
                cause.unwrap_or_default(),
                "check the disk; what was written since the last flush is uncertain",
            ))
        }
    }
}

fn facts(options: &StandaloneOptions, clone: &Standalone, control: &Path) -> Map<String, Value> {
    let mut facts = Map::new();
    if let Some(Address::Unix(path)) = clone.address() {
        facts.insert("uri".to_owned(), format!("nbd+unix:///?socket={}", path.display()).into());
    }
    if let Some(path) = &options.fuse {
        facts.insert("file".to_owned(), path.display().to_string().into());
    }
    facts.insert("control".to_owned(), control.display().to_string().into());
    facts
}

#[cfg(test)]
mod tests {
    use super::*;

    fn origin(text: &str) -> Result<Origin, Failure> {
        let line = ["decant", "clone", text, "dest", "--meta", "map", "--serve", "unix:s"];
        let cli = <crate::cli::Cli as clap::Parser>::try_parse_from(line).expect("a command line");
        let crate::cli::Verb::Clone(args) = cli.verb else { panic!("a clone") };
        parse_origin(&args.start.expect("a start"))
    }

    #[test]
    fn origins_read_as_uris_or_paths() {
        let nbd = |address: &str, export: &str| {
            let address = Address::Tcp(address.parse().expect("an address"));
            Origin::Nbd { address, export: export.to_owned() }
        };
        assert_eq!(origin("nbd://127.0.0.1:10811/a").expect("valid"), nbd("127.0.0.1:10811", "a"));
        assert_eq!(origin("nbd://[::1]").expect("valid"), nbd("[::1]:10809", ""));
        // A name is looked up when somebody connects: the host may be gone once the clone is whole.
        let address = Address::Name { host: "host.invalid".to_owned(), port: 10_809 };
        assert_eq!(origin("nbd://host.invalid/a").expect("valid"), Origin::Nbd { address, export: "a".to_owned() });
        let Origin::Iscsi(url) = origin("iscsi://host.invalid/iqn.2026-11.dev.decant:a/1").expect("valid") else {
            panic!("it is iSCSI")
        };
        assert_eq!((url.host.as_str(), url.port, url.lun), ("host.invalid", 3260, 1));
        let unix = Origin::Nbd { address: Address::Unix("/tmp/s".into()), export: "x".to_owned() };
        assert_eq!(origin("nbd+unix:///x?socket=/tmp/s").expect("valid"), unix);
        assert_eq!(origin("/dev/sda").expect("valid"), Origin::File("/dev/sda".into()));
        for text in ["", "nbd+unix:///x", "http://a/b", "nbds://127.0.0.1/a", "iscsi://u%s@127.0.0.1/iqn.a:b/0"] {
            assert_eq!(origin(text).expect_err("invalid").exit, Exit::Usage, "{text}");
        }
    }

    #[test]
    fn rates_read_as_sizes() {
        assert_eq!(parse_limit("none"), Ok(Limit(None)));
        assert_eq!(parse_limit("1M/s"), parse_limit("1M"));
        assert!(parse_limit("0").is_err() && parse_limit("fast").is_err());
    }
}
