//! The operator's own authority: `decant ca init`, `decant ca issue WORKER`.
//!
//! The authority's key is needed only to issue, and is best kept off the workers. All files are made with mode 0600 and
//! never overwritten.

use std::io::Write as _;
use std::net::IpAddr;
use std::os::unix::fs::OpenOptionsExt as _;
use std::path::{Path, PathBuf};

use decant_base::WorkerId;
use jiff::civil::Date;
use rcgen::{
    BasicConstraints, CertificateParams, DnType, ExtendedKeyUsagePurpose, IsCa, Issuer, KeyPair, KeyUsagePurpose,
    SanType,
};

/// How long an authority is good: the life of a fleet.
const CA_YEARS: i16 = 20;
/// How long a worker's certificate is good unless said otherwise. There is no way to recall one but a new authority.
pub const WORKER_DAYS: u32 = 730;

/// A certificate cannot be made.
#[derive(Debug, thiserror::Error)]
pub enum CaError {
    /// A file cannot be made or read.
    #[error("cannot {action} {}", path.display())]
    File {
        /// `make` or `read`.
        action: &'static str,
        /// Which file.
        path: PathBuf,
        /// What the kernel said.
        #[source]
        source: std::io::Error,
    },
    /// The file is there and is not overwritten.
    #[error("{} is there already: nothing was changed; remove it first if a new one is meant", path.display())]
    Exists {
        /// Which file.
        path: PathBuf,
    },
    /// The library refuses.
    #[error("cannot make a certificate")]
    Certificate(#[from] rcgen::Error),
}

/// Files that were made.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Made {
    /// The certificate.
    pub cert: PathBuf,
    /// Its key.
    pub key: PathBuf,
}

/// Makes an authority in `directory`: `ca.pem` and `ca.key`.
pub fn init(directory: &Path, today: Date) -> Result<Made, CaError> {
    let made = Made { cert: directory.join("ca.pem"), key: directory.join("ca.key") };
    refuse_existing(&made)?;
    std::fs::create_dir_all(directory).map_err(|source| file("make", directory, source))?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(Vec::new())?;
    params.distinguished_name.push(DnType::CommonName, "decant authority");
    params.is_ca = IsCa::Ca(BasicConstraints::Constrained(0));
    params.key_usages = vec![KeyUsagePurpose::KeyCertSign, KeyUsagePurpose::CrlSign];
    set_validity(&mut params, today, today.saturating_add(jiff::Span::new().years(CA_YEARS)));
    let certificate = params.self_signed(&key)?;
    write_new(&made.key, &key.serialize_pem())?;
    write_new(&made.cert, &certificate.pem())?;
    Ok(made)
}

/// Issues `worker`'s certificate with the authority in `ca` into `directory`: `WORKER.pem` and `WORKER.key`. It is good for
/// serving and for connecting, for `days` from `today`, and names the worker and its `addresses`.
pub fn issue(
    ca: &Path,
    directory: &Path,
    worker: &WorkerId,
    addresses: &[IpAddr],
    validity: (Date, u32),
) -> Result<Made, CaError> {
    let (today, days) = validity;
    let made = Made { cert: directory.join(format!("{worker}.pem")), key: directory.join(format!("{worker}.key")) };
    refuse_existing(&made)?;
    let read = |name: &str| {
        let path = ca.join(name);
        std::fs::read_to_string(&path).map_err(|source| file("read", &path, source))
    };
    let issuer = Issuer::from_ca_cert_pem(&read("ca.pem")?, KeyPair::from_pem(&read("ca.key")?)?)?;
    std::fs::create_dir_all(directory).map_err(|source| file("make", directory, source))?;
    let key = KeyPair::generate()?;
    let mut params = CertificateParams::new(vec![worker.to_string()])?;
    params.subject_alt_names.extend(addresses.iter().copied().map(SanType::IpAddress));
    params.distinguished_name.push(DnType::CommonName, worker.as_str());
    params.key_usages = vec![KeyUsagePurpose::DigitalSignature];
    params.extended_key_usages = vec![ExtendedKeyUsagePurpose::ServerAuth, ExtendedKeyUsagePurpose::ClientAuth];
    params.use_authority_key_identifier_extension = true;
    set_validity(&mut params, today, today.saturating_add(jiff::Span::new().days(i64::from(days))));
    let certificate = params.signed_by(&key, &issuer)?;
    write_new(&made.key, &key.serialize_pem())?;
    write_new(&made.cert, &certificate.pem())?;
    Ok(made)
}

/// From the day before, so that a worker whose clock is behind accepts it at once.
fn set_validity(params: &mut CertificateParams, from: Date, to: Date) {
    let from = from.saturating_sub(jiff::Span::new().days(1));
    let at = |date: Date| {
        rcgen::date_time_ymd(i32::from(date.year()), date.month().unsigned_abs(), date.day().unsigned_abs())
    };
    (params.not_before, params.not_after) = (at(from), at(to));
}

fn refuse_existing(made: &Made) -> Result<(), CaError> {
    match [&made.cert, &made.key].into_iter().find(|path| path.exists()) {
        Some(path) => Err(CaError::Exists { path: path.clone() }),
        None => Ok(()),
    }
}

fn write_new(path: &Path, text: &str) -> Result<(), CaError> {
    let mut out = std::fs::OpenOptions::new()
        .write(true)
        .create_new(true)
        .mode(0o600)
        .open(path)
        .map_err(|source| file("make", path, source))?;
    out.write_all(text.as_bytes()).and_then(|()| out.sync_all()).map_err(|source| file("make", path, source))
}

fn file(action: &'static str, path: &Path, source: std::io::Error) -> CaError {
    CaError::File { action, path: path.to_owned(), source }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;
    use crate::tls::{Identity, TlsError, TlsFiles};

    fn id(name: &str) -> WorkerId {
        WorkerId::new(name).expect("a label")
    }

    #[test]
    fn files_are_private_never_overwritten_and_name_their_worker() {
        let directory = tempfile::tempdir().expect("a directory");
        let today = jiff::civil::date(2026, 1, 31);
        let authority = init(directory.path(), today).expect("an authority");
        let addresses = ["fdde::1".parse().expect("an address")];
        let made = issue(directory.path(), directory.path(), &id("worker-1"), &addresses, (today, 30)).expect("issued");
        for file in [&authority.cert, &authority.key, &made.cert, &made.key] {
            assert_eq!(std::fs::metadata(file).expect("a file").permissions().mode() & 0o777, 0o600, "{file:?}");
        }
        let before = std::fs::read(&made.key).expect("a key");
        assert!(matches!(init(directory.path(), today), Err(CaError::Exists { .. })));
        let again = issue(directory.path(), directory.path(), &id("worker-1"), &[], (today, 30));
        assert!(matches!(again, Err(CaError::Exists { .. })));
        assert_eq!(std::fs::read(&made.key).expect("a key"), before);

        let files = TlsFiles { ca: authority.cert, cert: made.cert, key: made.key.clone() };
        assert_eq!(Identity::load(&files, &id("worker-1")).expect("it is worker-1's").fingerprint.len(), 64);
        assert!(matches!(Identity::load(&files, &id("worker-2")), Err(TlsError::NotOurs { .. })));
        std::fs::set_permissions(&made.key, std::fs::Permissions::from_mode(0o640)).expect("set");
        assert!(matches!(Identity::load(&files, &id("worker-1")), Err(TlsError::Exposed { .. })));
    }
}
