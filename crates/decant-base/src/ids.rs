//! Names of things. Every id is a DNS label, so that it can be a file name, a path segment of the API,
//! a cgroup and a host name without quoting.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text that is no id.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{what} {text:?} is not valid: use 1 to 63 characters of a-z, 0-9 and '-', not starting or ending with '-'")]
pub struct InvalidId {
    /// Which kind of id was wanted, e.g. `machine`.
    pub what: &'static str,
    /// What was given, cut at 80 characters.
    pub text: String,
}

fn is_label(text: &str) -> bool {
    (1..=63).contains(&text.len())
        && text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || b == b'-')
        && !text.starts_with('-')
        && !text.ends_with('-')
}

macro_rules! id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
        #[serde(try_from = "String", into = "String")]
        pub struct $name(String);

        impl $name {
            /// Checks `text`: a DNS label (RFC 1123), lower case, 1 to 63 characters.
            pub fn new(text: impl Into<String>) -> Result<Self, InvalidId> {
                let text = text.into();
                if is_label(&text) {
                    Ok(Self(text))
                } else {
                    Err(InvalidId { what: $what, text: text.chars().take(80).collect() })
                }
            }

            /// The id as text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.pad(&self.0)
            }
        }

        impl FromStr for $name {
            type Err = InvalidId;
            fn from_str(text: &str) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl TryFrom<String> for $name {
            type Error = InvalidId;
            fn try_from(text: String) -> Result<Self, InvalidId> {
                Self::new(text)
            }
        }

        impl From<$name> for String {
            fn from(id: $name) -> String {
                id.0
            }
        }
    };
}

id!(
    /// A workload. Its id is its name and outlives the worker that runs it.
    MachineId, "machine");
id!(
    /// A host.
    WorkerId, "worker");
id!(
    /// A volume. The id travels with it when its machine moves.
    VolumeId, "volume");
id!(
    /// One move of one machine.
    MigrationId, "migration");
id!(
    /// One order to empty one or more workers.
    DrainId, "drain");
