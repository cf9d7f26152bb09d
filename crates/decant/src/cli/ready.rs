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

/// `HOST[:PORT]`, with brackets around an IPv6 address that a port follows. A name is not looked up.
pub(crate) fn host(text: &str, default_port: u16) -> Result<Address, Failure> {
    let wrong = || {
        let cause = format!("{text:?} is no host with a port");
        Failure::usage("address not understood", cause, "write HOST[:PORT], e.g. 10.0.0.7:3260")
    };
    let plain = Address::of_host(text, default_port);
    if matches!(plain, Address::Tcp(_)) {
        return Ok(plain);
    }
    let (host, port) = match text.rsplit_once(':') {
        Some((host, port)) => (host, port.parse().map_err(|_| wrong())?),
        None => (text, default_port),
    };
    let address = Address::of_host(host, port);
    // What is left in a name is in no name: colons and brackets of an address that is none, a user.
    let is_odd = |c: char| matches!(c, ':' | '[' | ']' | '@' | '/') || c.is_whitespace();
    match &address {
        Address::Name { host, .. } if host.is_empty() || host.contains(is_odd) => Err(wrong()),
        _ => Ok(address),
    }
}

/// An address to listen on: a host's name is looked up, once.
pub(crate) fn resolve(text: &str, default_port: u16) -> Result<SocketAddr, Failure> {
    let address = host(text, default_port)?;
    let wrong = |cause: String| {
        Failure::usage("address not understood", cause, "name an address of this machine, e.g. 10.0.0.7:3260")
    };
    match &address {
        Address::Tcp(address) => Ok(*address),
        name => {
            let mut found = name.to_string().to_socket_addrs().map_err(|error| wrong(format!("{text:?}: {error}")))?;
            found.next().ok_or_else(|| wrong(format!("{text} has no address")))
        }
    }
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
        let name = Address::Name { host: "array.example".to_owned(), port: 7 };
        assert_eq!(host("array.example:7", 1).expect("valid"), name);
        for text in ["", "a:b", "[::1", "me@here", "a b", "no such host:1:2"] {
            assert_eq!(host(text, 1).expect_err("invalid").exit, super::super::Exit::Usage, "{text:?}");
        }
        for text in ["unix:", "", "no such host:1:2"] {
            assert_eq!(listen_address(text, 1).expect_err("invalid").exit, super::super::Exit::Usage, "{text:?}");
        }
    }
}
