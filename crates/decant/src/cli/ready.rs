//! A tool that serves: how it says that it is ready, where it listens, and how it is told to end.

use std::net::{SocketAddr, ToSocketAddrs};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixDatagram};
use std::path::Path;

use decant_dataplane_user::export::Address;

use super::Failure;
use super::output::{Output, fields, print};

/// Says what is served, then READY: to people as lines, to programs as one JSON object in one line with `"ready": true`, and to
/// systemd, if it started us with `Type=notify`.
pub(crate) fn ready(output: Output, facts: &serde_json::Map<String, serde_json::Value>) {
    match output {
        Output::Json => {
            let mut facts = facts.clone();
            facts.insert("ready".to_owned(), true.into());
            print(&serde_json::Value::from(facts).to_string());
        }
        Output::Table => {
            let shown = |value: &serde_json::Value| match value {
                serde_json::Value::String(text) => text.clone(),
                other => other.to_string(),
            };
            let rows: Vec<(&str, String)> = facts.iter().map(|(name, value)| (name.as_str(), shown(value))).collect();
            if !rows.is_empty() {
                print(fields(&rows).trim_end());
            }
            print("READY");
        }
    }
    notify("READY=1");
}

/// Tells systemd (sd_notify(3)). Nobody may listen, which is no error.
pub(crate) fn notify(state: &str) {
    let Some(path) = std::env::var_os("NOTIFY_SOCKET") else { return };
    let address = match path.as_encoded_bytes().strip_prefix(b"@") {
        Some(name) => UnixAddr::from_abstract_name(name),
        None => UnixAddr::from_pathname(Path::new(&path)),
    };
    let sent = UnixDatagram::unbound().and_then(|socket| socket.send_to_addr(state.as_bytes(), &address?));
    if let Err(error) = sent {
        tracing::warn!(%error, "the service manager cannot be told");
    }
}

/// `HOST[:PORT]`, with brackets around an IPv6 address that a port follows.
pub(crate) fn resolve(text: &str, default_port: u16) -> Result<SocketAddr, Failure> {
    let wrong =
        |cause: String| Failure::usage("address not understood", cause, "write HOST[:PORT], e.g. 10.0.0.7:3260");
    if let Ok(ip) = text.trim_start_matches('[').trim_end_matches(']').parse() {
        return Ok(SocketAddr::new(ip, default_port));
    }
    let has_port = text.rsplit_once(':').is_some_and(|(_, port)| port.parse::<u16>().is_ok());
    let host = if has_port { text.to_owned() } else { format!("{text}:{default_port}") };
    let mut found = host.to_socket_addrs().map_err(|error| wrong(format!("{text:?}: {error}")))?;
    found.next().ok_or_else(|| wrong(format!("{text} has no address")))
}

/// `unix:PATH`, or an address over TCP.
pub(crate) fn listen_address(text: &str, default_port: u16) -> Result<Address, Failure> {
    match text.strip_prefix("unix:") {
        Some("") => Err(Failure::usage("address not understood", "unix: names no path", "write unix:PATH")),
        Some(path) => Ok(Address::Unix(path.into())),
        None => resolve(text, default_port).map(Address::Tcp),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_get_a_port_where_they_have_none() {
        for (text, expected) in [
            ("127.0.0.1", "127.0.0.1:3260"),
            ("127.0.0.1:1", "127.0.0.1:1"),
            ("::1", "[::1]:3260"),
            ("[::1]", "[::1]:3260"),
            ("[::1]:9", "[::1]:9"),
        ] {
            assert_eq!(resolve(text, 3260).expect("valid").to_string(), expected, "{text}");
        }
        assert_eq!(listen_address("unix:/a", 1).expect("valid"), Address::Unix("/a".into()));
        for text in ["unix:", "", "no such host:1:2"] {
            assert_eq!(listen_address(text, 1).expect_err("invalid").exit, super::super::Exit::Usage, "{text:?}");
        }
    }
}
