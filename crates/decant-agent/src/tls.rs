//! Who a worker is to another: mutual TLS 1.3 under the operator's own authority, names taken from certificates.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use decant_base::WorkerId;
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{ClientConfig, RootCertStore, ServerConfig};
use sha2::{Digest, Sha256};

/// Certificate files cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A file cannot be read, or holds no PEM of the kind.
    #[error("cannot read {what} from {}", path.display())]
    File {
        /// `the authority's certificate`, `this worker's certificate` or `this worker's key`.
        what: &'static str,
        /// Which file.
        path: PathBuf,
        /// What is wrong with it.
        #[source]
        source: rustls::pki_types::pem::Error,
    },
    /// The key file can be read by others.
    #[error("{} can be read by other users: chmod 600 it", path.display())]
    Exposed {
        /// Which file.
        path: PathBuf,
    },
    /// The certificate is not this worker's.
    #[error("the certificate in {} is not issued to {worker}: issue one with `decant ca issue {worker}`", path.display())]
    NotOurs {
        /// Which file.
        path: PathBuf,
        /// Who we are.
        worker: WorkerId,
    },
    /// Key and certificate do not belong together, or something else the library refuses.
    #[error("the certificates cannot be used")]
    Unusable(#[source] rustls::Error),
    /// The authority cannot be used to check clients.
    #[error("the authority cannot be used")]
    Authority(#[source] rustls::server::VerifierBuilderError),
}

/// Where a worker's certificates are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct TlsFiles {
    /// The authority's certificate, PEM.
    pub ca: PathBuf,
    /// This worker's certificate, PEM.
    pub cert: PathBuf,
    /// Its key, PEM, mode 0600.
    pub key: PathBuf,
}

/// This worker's identity, ready to accept and to connect.
#[derive(Debug, Clone)]
pub struct Identity {
    /// For accepting: a client must show a certificate of the authority.
    pub server: Arc<ServerConfig>,
    /// For connecting: shows our certificate, checks the other's against the authority and its name.
    pub client: Arc<ClientConfig>,
    /// SHA-256, hex, of our certificate.
    pub fingerprint: String,
}

impl Identity {
    /// Reads `files` and checks that they are `worker`'s.
    pub fn load(files: &TlsFiles, worker: &WorkerId) -> Result<Self, TlsError> {
        let ca = read_certificates("the authority's certificate", &files.ca)?;
        let chain = read_certificates("this worker's certificate", &files.cert)?;
        let key = read_key(&files.key)?;
        let own = chain.first().expect("read_certificates returns at least one");
        if !is_issued_to(own, worker) {
            return Err(TlsError::NotOurs { path: files.cert.clone(), worker: worker.clone() });
        }
        let fingerprint = fingerprint(own);
        let mut roots = RootCertStore::empty();
        for certificate in ca {
            roots.add(certificate).map_err(TlsError::Unusable)?;
        }
        let roots = Arc::new(roots);
        let provider = Arc::new(rustls::crypto::aws_lc_rs::default_provider());
        let verifier = WebPkiClientVerifier::builder_with_provider(roots.clone(), provider.clone())
            .build()
            .map_err(TlsError::Authority)?;
        let server = ServerConfig::builder_with_provider(provider.clone())
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| {
                builder.with_client_cert_verifier(verifier).with_single_cert(chain.clone(), key.clone_key())
            })
            .map_err(TlsError::Unusable)?;
        let client = ClientConfig::builder_with_provider(provider)
            .with_protocol_versions(&[&rustls::version::TLS13])
            .and_then(|builder| builder.with_root_certificates(roots).with_client_auth_cert(chain, key))
            .map_err(TlsError::Unusable)?;
        Ok(Self { server: Arc::new(server), client: Arc::new(client), fingerprint })
    }
}

fn read_certificates(what: &'static str, path: &Path) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let fail = |source| TlsError::File { what, path: path.to_owned(), source };
    let list: Vec<_> = CertificateDer::pem_file_iter(path).map_err(fail)?.collect::<Result<_, _>>().map_err(fail)?;
    if list.is_empty() {
        return Err(fail(rustls::pki_types::pem::Error::NoItemsFound));
    }
    Ok(list)
}

fn read_key(path: &Path) -> Result<PrivateKeyDer<'static>, TlsError> {
    use std::os::unix::fs::PermissionsExt as _;
    let key = PrivateKeyDer::from_pem_file(path).map_err(|source| TlsError::File {
        what: "this worker's key",
        path: path.to_owned(),
        source,
    })?;
    let exposed = std::fs::metadata(path).is_ok_and(|file| file.permissions().mode() & 0o077 != 0);
    if exposed {
        return Err(TlsError::Exposed { path: path.to_owned() });
    }
    Ok(key)
}

/// Whether `certificate` names `worker` as a DNS name. It says nothing about who signed it.
pub fn is_issued_to(certificate: &CertificateDer<'_>, worker: &WorkerId) -> bool {
    let (Ok(parsed), Ok(name)) = (ParsedCertificate::try_from(certificate), ServerName::try_from(worker.as_str()))
    else {
        return false;
    };
    rustls::client::verify_server_name(&parsed, &name).is_ok()
}

/// SHA-256 of a certificate's DER, lower-case hex.
pub fn fingerprint(certificate: &CertificateDer<'_>) -> String {
    Sha256::digest(certificate.as_ref()).iter().map(|byte| format!("{byte:02x}")).collect()
}
