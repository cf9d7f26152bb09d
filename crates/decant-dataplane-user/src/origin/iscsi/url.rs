//! `iscsi://HOST[:PORT]/IQN/LUN`, as libiscsi and QEMU write it, without a user: secrets do not belong into arguments.

use std::fmt;
use std::str::FromStr;

use decant_iscsi::text::{PEER_NAME, is_peer_name};

/// iSCSI's port (IANA).
const PORT: u16 = 3260;
/// LUNs that the flat addressing method can say (SAM-5 4.7.7.3).
const MAX_LUN: u16 = 16_383;

/// Which disk of which target.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IscsiUrl {
    /// Host name or address; an IPv6 address without brackets.
    pub host: String,
    /// TCP port.
    pub port: u16,
    /// The target's name.
    pub target: String,
    /// The logical unit, 0..=16383.
    pub lun: u16,
}

/// Why text is no iSCSI URL.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum UrlError {
    /// Another scheme, or parts are missing.
    #[error("write iscsi://HOST[:PORT]/IQN/LUN")]
    Form,
    /// A user or secret is in it.
    #[error("a user and secret belong into a file, not into the URL")]
    User,
    /// Not a port.
    #[error("{0:?} is no port")]
    Port(String),
    /// Not an iSCSI name.
    #[error("{0:?} is no iSCSI name: {PEER_NAME}")]
    Target(String),
    /// Not a LUN.
    #[error("{0:?} is no LUN: a number up to {MAX_LUN}")]
    Lun(String),
}

impl FromStr for IscsiUrl {
    type Err = UrlError;

    fn from_str(text: &str) -> Result<Self, UrlError> {
        let rest = text.strip_prefix("iscsi://").ok_or(UrlError::Form)?;
        let (portal, rest) = rest.split_once('/').ok_or(UrlError::Form)?;
        let (target, lun) = rest.split_once('/').ok_or(UrlError::Form)?;
        if portal.contains('@') {
            return Err(UrlError::User);
        }
        let (host, port) = match portal.strip_prefix('[') {
            Some(rest) => {
                let (host, rest) = rest.split_once(']').ok_or(UrlError::Form)?;
                (host, if rest.is_empty() { None } else { Some(rest.strip_prefix(':').ok_or(UrlError::Form)?) })
            }
            None => portal.split_once(':').map_or((portal, None), |(host, port)| (host, Some(port))),
        };
        let port = port.map_or(Ok(PORT), |port| port.parse().map_err(|_| UrlError::Port(port.to_owned())))?;
        if host.is_empty() {
            return Err(UrlError::Form);
        }
        if !is_peer_name(target) {
            return Err(UrlError::Target(target.to_owned()));
        }
        let digits = !lun.is_empty() && lun.bytes().all(|byte| byte.is_ascii_digit());
        let lun = lun.parse().ok().filter(|lun| digits && *lun <= MAX_LUN).ok_or(UrlError::Lun(lun.to_owned()))?;
        Ok(Self { host: host.to_owned(), port, target: target.to_owned(), lun })
    }
}

impl fmt::Display for IscsiUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { host, port, target, lun } = self;
        if host.contains(':') {
            write!(f, "iscsi://[{host}]:{port}/{target}/{lun}")
        } else {
            write!(f, "iscsi://{host}:{port}/{target}/{lun}")
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn urls_are_read_and_written() {
        let read = |text: &str| text.parse::<IscsiUrl>();
        let plain = read("iscsi://array.example/iqn.2026-11.dev.decant:disk/0").unwrap();
        assert_eq!((plain.port, plain.lun, plain.host.as_str()), (3260, 0, "array.example"));
        assert_eq!(plain.to_string(), "iscsi://array.example:3260/iqn.2026-11.dev.decant:disk/0");
        let six = read("iscsi://[2001:db8::1]:860/naa.52004567ba64678d/16383").unwrap();
        assert_eq!((six.host.as_str(), six.port, six.lun), ("2001:db8::1", 860, 16_383));
        assert_eq!(six.to_string().parse(), Ok(six));
        // As some arrays and tools write names.
        let odd = read("iscsi://host/iqn.2001-05.com.example:Array_1+a/0").unwrap();
        assert_eq!(odd.target, "iqn.2001-05.com.example:Array_1+a");
        assert_eq!(odd.to_string().parse(), Ok(odd));
        for (text, error) in [
            ("nbd://host/disk", UrlError::Form),
            ("iscsi://host/iqn.a:b", UrlError::Form),
            ("iscsi:///iqn.a:b/0", UrlError::Form),
            ("iscsi://[::1/iqn.a:b/0", UrlError::Form),
            ("iscsi://me%secret@host/iqn.a:b/0", UrlError::User),
            ("iscsi://host:iscsi/iqn.a:b/0", UrlError::Port("iscsi".into())),
            ("iscsi://host/disk/0", UrlError::Target("disk".into())),
            ("iscsi://host/iqn.a:my disk/0", UrlError::Target("iqn.a:my disk".into())),
            ("iscsi://host/iqn.a:b/16384", UrlError::Lun("16384".into())),
            ("iscsi://host/iqn.a:b/+1", UrlError::Lun("+1".into())),
        ] {
            assert_eq!(read(text), Err(error), "{text}");
        }
    }
}
