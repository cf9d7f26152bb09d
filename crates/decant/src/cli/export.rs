//! `decant export`: any file, block device or LVM volume, served over iSCSI or NBD.

use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use clap::Args;
use decant_dataplane_user::device::Exported;
use decant_dataplane_user::export::claim::{ClaimError, claim};
use decant_dataplane_user::export::iscsi::{Access, DigestPolicy, IscsiOptions, IscsiServer};
use decant_dataplane_user::export::{Address, FileMedium, ListenError, Server};
use decant_dataplane_user::iscsi::NAMING_AUTHORITY;
use decant_dataplane_user::tls::Fingerprint;
use serde_json::{Map, Value, json};
use tokio::signal::unix::{SignalKind, signal};

use super::ready::{listen_address, notify, ready, resolve};
use super::{Exit, Failure, Global, secrets};

/// iSCSI's port and NBD's (IANA).
const ISCSI_PORT: u16 = 3260;
pub(crate) const NBD_PORT: u16 = 10809;
/// Most bytes of an iSCSI name (RFC 7143, 4.2.7.1).
const MAX_IQN: usize = 223;

/// `decant export`.
#[derive(Debug, Args)]
#[command(
    group = clap::ArgGroup::new("server").args(["iscsi", "nbd"]).required(true),
    after_help = "Prints what clients connect to, then READY. Ends on SIGTERM or Ctrl-C, with everything acknowledged on the medium.\n\
        A SRC that is mounted, swap, or otherwise in use is refused (exit status 3).\n\n\
        Examples:\n  \
        decant export disk.img --nbd unix:/run/disk.sock             NBD for this machine\n  \
        decant export /dev/vg0/data --iscsi 10.0.0.7 --chap chap     iSCSI on port 3260, with a login\n  \
        decant export disk.img --nbd 10.0.0.7 --tls ./worker-1       NBD over mutual TLS\n  \
        decant export disk.img --iscsi 127.0.0.1 --read-only"
)]
pub(crate) struct ExportArgs {
    /// What to serve: a regular file, a block device or an LVM volume.
    source: PathBuf,
    /// Serve over iSCSI, as LUN 0 of one target; port 3260 if none is said.
    #[arg(long, value_name = "ADDR")]
    iscsi: Option<String>,
    /// Serve over NBD; port 10809 if none is said.
    #[arg(long, value_name = "ADDR|unix:PATH")]
    nbd: Option<String>,
    /// Nobody may write. Other readers may use SRC at the same time.
    #[arg(long)]
    read_only: bool,
    /// The target's IQN, or the NBD export's name. Made of SRC's name for iSCSI, empty for NBD, if none is said.
    #[arg(long, value_name = "NAME")]
    name: Option<String>,
    /// Secrets that an initiator proves, and the target if it is to: `username`, `password`, `username_in`, `password_in`.
    #[arg(long, value_name = "FILE", conflicts_with = "nbd")]
    chap: Option<PathBuf>,
    /// Take connections from this address only; repeatable.
    #[arg(long, value_name = "IP", conflicts_with = "nbd")]
    allow: Vec<IpAddr>,
    /// Whether headers and data carry checksums.
    #[arg(long, value_name = "never|allowed|required", conflicts_with = "nbd", default_value = "allowed",
          value_parser = ["never", "allowed", "required"])]
    digests: String,
    /// Bytes of a logical block.
    #[arg(long, value_name = "512|4096", conflicts_with = "nbd", default_value = "512", value_parser = ["512", "4096"])]
    block_size: String,
    /// Mutual TLS: a directory with ca.pem, NAME.pem and NAME.key, or the three files. Clients show a certificate of that CA.
    #[arg(long, value_name = "DIR|CA,CERT,KEY", conflicts_with = "iscsi")]
    tls: Option<String>,
    /// The SHA-256 fingerprint that the client's certificate must have.
    #[arg(long, value_name = "HEX", requires = "tls")]
    peer: Option<Fingerprint>,
}

enum Serving {
    Nbd(Server),
    Iscsi(IscsiServer),
}

impl Serving {
    fn close(&self) {
        match self {
            Self::Nbd(server) => server.close(),
            Self::Iscsi(server) => server.close(),
        }
    }
}

pub(crate) fn run(args: &ExportArgs, global: &Global) -> Result<Exit, Failure> {
    crate::processes::log();
    let claimed = claim(&args.source, !args.read_only).map_err(in_use)?;
    if claimed.size == 0 {
        return Err(Failure::usage(
            "nothing to serve",
            format_args!("{} is empty", args.source.display()),
            "truncate -s SIZE makes a disk of a file",
        ));
    }
    let medium = Arc::new(FileMedium::new(claimed, args.read_only));
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
    let runtime =
        runtime.map_err(|error| Failure::local("export not started", error, "check the limits of this process"))?;
    let ended: Result<Serving, Failure> = runtime.block_on(async {
        let stop = Stop::listen()?;
        let (serving, facts) = match &args.iscsi {
            Some(address) => iscsi(args, address, &medium)?,
            None => nbd(args, args.nbd.as_deref().unwrap_or_default(), &medium)?,
        };
        ready(global.output, &facts);
        stop.wait().await;
        notify("STOPPING=1");
        Ok(serving)
    });
    let serving = ended?;
    serving.close();
    let flushed = medium.flush();
    match (medium.failure(), flushed) {
        (None, Ok(())) => Ok(Exit::Done),
        (failure, flushed) => {
            let cause = failure.unwrap_or_else(|| flushed.err().map(|error| error.to_string()).unwrap_or_default());
            Err(Failure::local(
                "export failed",
                cause,
                "what clients wrote since their last flush is uncertain; check the disk",
            ))
        }
    }
}

/// The two signals that end a tool in order.
pub(crate) struct Stop {
    terminate: tokio::signal::unix::Signal,
    interrupt: tokio::signal::unix::Signal,
}

impl Stop {
    /// From here on they do not end the process at once.
    pub(crate) fn listen() -> Result<Self, Failure> {
        let signal = |kind| {
            signal(kind)
                .map_err(|error| Failure::local("signals not handled", error, "check the limits of this process"))
        };
        Ok(Self { terminate: signal(SignalKind::terminate())?, interrupt: signal(SignalKind::interrupt())? })
    }

    pub(crate) async fn wait(mut self) {
        self.next().await;
    }

    pub(crate) async fn next(&mut self) {
        tokio::select! {
            _ = self.terminate.recv() => {}
            _ = self.interrupt.recv() => {}
        }
    }
}

/// Somebody else's use of a file stands in the way; anything else was asked for in the wrong way.
pub(crate) fn in_use(error: ClaimError) -> Failure {
    match &error {
        ClaimError::InUse { .. } => {
            Failure::blocked("in use", &error, "end that use first: unmount it, detach it, stop the program")
        }
        ClaimError::Kind(_) => Failure::usage("not a disk", &error, "name a regular file or a block device"),
        ClaimError::Open { source, .. } => {
            Failure::local("cannot be opened", format_args!("{error}: {source}"), "check its name and permissions")
        }
    }
}

pub(crate) fn listen_failure(error: &ListenError) -> Failure {
    match error {
        ListenError::Blocks { .. } => {
            Failure::usage("size not served", error, "truncate -s %4096 rounds a file's size up; or serve it over NBD")
        }
        _ => Failure::local("export not started", error, "name an address of this machine that is free"),
    }
}

fn facts(args: &ExportArgs, medium: &FileMedium, uri: String) -> Map<String, Value> {
    let facts = json!({ "uri": uri, "size_bytes": medium.size(), "read_only": args.read_only });
    facts.as_object().cloned().unwrap_or_default()
}

fn iscsi(args: &ExportArgs, address: &str, medium: &Arc<FileMedium>) -> Result<(Serving, Map<String, Value>), Failure> {
    let name = match &args.name {
        Some(name) => checked_iqn(name)?,
        None => iqn_of(&args.source),
    };
    let chap = args.chap.as_deref().map(secrets::chap).transpose()?;
    let address = resolve(address, ISCSI_PORT)?;
    if chap.is_none() && args.allow.is_empty() && !address.ip().is_loopback() {
        tracing::warn!(%address, "no --chap and no --allow: whoever reaches this address can log in");
    }
    let options = IscsiOptions {
        address,
        name: name.clone(),
        access: vec![Access { initiator: None, chap }],
        peers: args.allow.clone(),
        digests: match args.digests.as_str() {
            "never" => DigestPolicy::Never,
            "required" => DigestPolicy::Required,
            _ => DigestPolicy::Allowed,
        },
        block_bytes: if args.block_size == "4096" { 4096 } else { 512 },
        serial: serial_of(&args.source),
    };
    let device: Arc<dyn Exported> = medium.clone();
    let server = IscsiServer::listen(options, device).map_err(|error| listen_failure(&error))?;
    let mut facts = facts(args, medium, format!("iscsi://{}/{name}/0", server.local_addr()));
    facts.insert("target".to_owned(), name.into());
    facts.insert("lun".to_owned(), 0.into());
    Ok((Serving::Iscsi(server), facts))
}

fn nbd(args: &ExportArgs, address: &str, medium: &Arc<FileMedium>) -> Result<(Serving, Map<String, Value>), Failure> {
    let address = listen_address(address, NBD_PORT)?;
    let tls = match &args.tls {
        None => None,
        Some(text) => {
            let tls = secrets::identity(text)?.server(args.peer);
            Some(tls.map_err(|error| Failure::usage("certificates not usable", error, "see `decant ca --help`"))?)
        }
    };
    let scheme = if tls.is_some() { "nbds" } else { "nbd" };
    let name = args.name.clone().unwrap_or_default();
    let device: Arc<dyn Exported> = medium.clone();
    let server = Server::listen(&address, tls, &name, device).map_err(|error| listen_failure(&error))?;
    let uri = match server.local_addr() {
        address @ (Address::Tcp(_) | Address::Name { .. }) => format!("{scheme}://{address}/{name}"),
        Address::Unix(path) => format!("{scheme}+unix:///{name}?socket={}", path.display()),
    };
    Ok((Serving::Nbd(server), facts(args, medium, uri)))
}

fn checked_iqn(name: &str) -> Result<String, Failure> {
    let is_fine = |c: char| c.is_ascii_lowercase() || c.is_ascii_digit() || matches!(c, '-' | '.' | ':');
    let begins = ["iqn.", "eui.", "naa."].iter().any(|start| name.starts_with(start));
    if begins && name.len() <= MAX_IQN && name.chars().all(is_fine) {
        return Ok(name.to_owned());
    }
    Err(Failure::usage(
        "name not understood",
        format_args!("{name:?} is no iSCSI name"),
        "write iqn.YYYY-MM.DOMAIN:NAME in lower case, at most 223 bytes",
    ))
}

/// A target's name from that of what it serves; the same for the same path.
fn iqn_of(source: &Path) -> String {
    let name = source.file_name().map(|name| name.to_string_lossy().to_lowercase()).unwrap_or_default();
    let fine = |c: char| if c.is_ascii_alphanumeric() || matches!(c, '-' | '.') { c } else { '-' };
    let name: String = name.chars().map(fine).take(64).collect();
    format!("{NAMING_AUTHORITY}:{}", if name.is_empty() { "disk" } else { &name })
}

/// What names the disk to initiators for ever: this machine and the path.
fn serial_of(source: &Path) -> String {
    let machine = std::fs::read_to_string("/etc/machine-id").unwrap_or_default();
    let path = std::fs::canonicalize(source).unwrap_or_else(|_| source.to_owned());
    let mut bytes = machine.trim().as_bytes().to_vec();
    bytes.extend_from_slice(path.as_os_str().as_encoded_bytes());
    // A fingerprint is a SHA-256 of any bytes.
    Fingerprint::of(&bytes).to_string().chars().take(32).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_named_after_what_they_serve() {
        for (path, name) in
            [("/dev/vg0/data", "data"), ("Disk 1.img", "disk-1.img"), ("/", "disk"), ("\u{e4}.img", "-.img")]
        {
            let iqn = iqn_of(Path::new(path));
            assert_eq!(iqn, format!("{NAMING_AUTHORITY}:{name}"));
            assert_eq!(checked_iqn(&iqn).expect("a valid name"), iqn);
        }
        for name in ["", "disk", "iqn.2026-11.DEV:x", "iqn.2026-11.dev x"] {
            assert_eq!(checked_iqn(name).expect_err("invalid").exit, Exit::Usage, "{name}");
        }
        assert_eq!(serial_of(Path::new("/")).len(), 32);
    }
}
