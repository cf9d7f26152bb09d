//! What both ends of a migration's iSCSI export agree on: names, and mutual CHAP from the one secret that was drawn for it.

use decant_base::MigrationId;
use decant_dataplane::ExportSecret;
use decant_iscsi::chap::{Chap, Credentials, Secret};

/// What the names of targets and initiators begin with (RFC 7143 4.2.7.3).
pub const NAMING_AUTHORITY: &str = "iqn.2026-11.dev.decant";

/// A peer named a secret that no worker draws.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("the secret of the export is none that a worker draws")]
pub struct NoSecret;

/// The target of a migration's export.
pub(crate) fn target_name(migration: &MigrationId) -> String {
    format!("{NAMING_AUTHORITY}:{migration}")
}

/// The one initiator that it lets in.
pub(crate) fn initiator_name(migration: &MigrationId) -> String {
    format!("{NAMING_AUTHORITY}:reader.{migration}")
}

/// What each proves to the other.
///
/// # Errors
/// [`NoSecret`].
pub(crate) fn chap(migration: &MigrationId, secret: &ExportSecret) -> Result<Chap, NoSecret> {
    let credentials = |name: String, half: Option<&str>| {
        let secret = Secret::new(half.ok_or(NoSecret)?.as_bytes()).map_err(|_| NoSecret)?;
        Ok(Credentials { name, secret })
    };
    let reader = credentials(format!("reader.{migration}"), secret.of_reader())?;
    let export = credentials(format!("export.{migration}"), secret.of_export())?;
    Chap::new(reader, Some(export)).map_err(|_| NoSecret)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What we accept of others is wider: there are targets and initiators that take nothing but this.
    #[test]
    fn names_of_our_own_are_as_the_standard_has_them() {
        let longest = MigrationId::new("m".repeat(63)).unwrap();
        for name in [target_name(&longest), initiator_name(&longest)] {
            assert!(decant_iscsi::text::is_name(&name), "{name}");
        }
    }
}
