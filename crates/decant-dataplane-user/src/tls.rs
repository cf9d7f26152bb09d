//! Mutual TLS between workers: who we are, whom we talk to, and nothing in between.
//!
//! Both sides hold a certificate from the fleet's CA. A connection is bound to one peer: besides the CA's signature the
//! peer's own certificate must have the SHA-256 fingerprint that the migration names, so another worker of the same fleet
//! is refused like a stranger. TLS 1.3 only, no resumption (each session proves both sides afresh), AES-128-GCM preferred.
//! Names in certificates are not looked at: a worker's address changes, the fingerprint is its identity.

mod session;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;
use std::sync::Arc;

use rustls::client::danger::{HandshakeSignatureValid, ServerCertVerified, ServerCertVerifier};
use rustls::client::{Resumption, verify_server_cert_signed_by_trust_anchor};
use rustls::crypto::{CryptoProvider, aws_lc_rs, verify_tls13_signature};
use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName, UnixTime};
use rustls::server::danger::{ClientCertVerified, ClientCertVerifier};
use rustls::server::{ParsedCertificate, WebPkiClientVerifier};
use rustls::{
    CertificateError, ClientConfig, DigitallySignedStruct, DistinguishedName, Error, OtherError, RootCertStore,
    ServerConfig, SignatureScheme, version,
};
use sha2::{Digest, Sha256};

pub(crate) use session::{Progress, Session};

/// SHA-256 of a certificate's DER bytes.
#[derive(Clone, Copy, PartialEq, Eq, Hash)]
pub struct Fingerprint([u8; 32]);

impl Fingerprint {
    /// Of a certificate, DER.
    pub fn of(certificate: &[u8]) -> Self {
        Self(Sha256::digest(certificate).into())
    }
}

impl fmt::Display for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.iter().try_for_each(|byte| write!(f, "{byte:02x}"))
    }
}

impl fmt::Debug for Fingerprint {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

impl FromStr for Fingerprint {
    type Err = TlsError;

    /// 64 hex digits; colons between them are allowed, as openssl prints them.
    fn from_str(text: &str) -> Result<Self, TlsError> {
        let digits: Option<Vec<u8>> =
            text.chars().filter(|c| *c != ':').map(|c| c.to_digit(16).and_then(|d| u8::try_from(d).ok())).collect();
        let malformed = || TlsError::Fingerprint(text.chars().take(100).collect());
        let digits = digits.ok_or_else(malformed)?;
        let bytes: Vec<u8> =
            digits.chunks(2).map(|pair| pair.iter().fold(0, |byte, digit| byte << 4 | digit)).collect();
        if digits.len() != 64 {
            return Err(malformed());
        }
        bytes.try_into().map(Self).map_err(|_| malformed())
    }
}

/// Why TLS cannot be set up here. What can go wrong with a peer is told by `explain`.
#[derive(Debug, thiserror::Error)]
pub enum TlsError {
    /// A PEM file cannot be used.
    #[error("cannot read {what} from {}: {source}", path.display())]
    Pem {
        /// What should be in it.
        what: &'static str,
        /// The file.
        path: PathBuf,
        /// Why.
        source: rustls::pki_types::pem::Error,
    },
    /// A PEM file holds no certificate.
    #[error("{} holds no certificate", .0.display())]
    Empty(PathBuf),
    /// Not a fingerprint.
    #[error("not a SHA-256 fingerprint (64 hex digits): {0:?}")]
    Fingerprint(String),
    /// Certificate, key and CA do not fit each other.
    #[error("certificate, key or CA cannot be used: {0}")]
    Unfit(#[source] Error),
    /// The CA's file yields no client verifier.
    #[error("the CA cannot verify clients: {0}")]
    Verifier(#[from] rustls::server::VerifierBuilderError),
}

/// Where a worker's identity lies; PEM files.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Paths {
    /// The fleet's CA certificates.
    pub ca: PathBuf,
    /// This worker's certificate, and what leads from it to the CA.
    pub cert: PathBuf,
    /// Its private key.
    pub key: PathBuf,
}

/// A worker's certificate and key, and the CA it believes in.
pub struct Identity {
    roots: Arc<RootCertStore>,
    chain: Vec<CertificateDer<'static>>,
    key: PrivateKeyDer<'static>,
}

/// How to connect to one certain server.
#[derive(Clone)]
pub struct ClientTls {
    pub(crate) config: Arc<ClientConfig>,
}

/// How to be connected to by one certain client.
#[derive(Clone)]
pub struct ServerTls {
    pub(crate) config: Arc<ServerConfig>,
}

impl Identity {
    /// Reads the files.
    ///
    /// # Errors
    /// Unreadable, not PEM, or empty.
    pub fn load(paths: &Paths) -> Result<Self, TlsError> {
        let mut roots = RootCertStore::empty();
        for certificate in certificates(&paths.ca, "CA certificates")? {
            roots.add(certificate).map_err(TlsError::Unfit)?;
        }
        let chain = certificates(&paths.cert, "the certificate")?;
        let key = PrivateKeyDer::from_pem_file(&paths.key).map_err(|source| TlsError::Pem {
            what: "the private key",
            path: paths.key.clone(),
            source,
        })?;
        Ok(Self { roots: Arc::new(roots), chain, key })
    }

    /// What peers pin to be sure that it is us.
    pub fn fingerprint(&self) -> Fingerprint {
        Fingerprint::of(self.chain.first().map(AsRef::as_ref).unwrap_or_default())
    }

    /// As a client of the server that shows the certificate `pinned`, or, without one, any of the fleet's.
    ///
    /// # Errors
    /// Certificate and key do not belong together.
    pub fn client(&self, pinned: impl Into<Option<Fingerprint>>) -> Result<ClientTls, TlsError> {
        let verifier = PinnedServer { roots: self.roots.clone(), provider: provider(), pinned: pinned.into() };
        let mut config = ClientConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(TlsError::Unfit)?
            .dangerous()
            .with_custom_certificate_verifier(Arc::new(verifier))
            .with_client_auth_cert(self.chain.clone(), self.key.clone_key())
            .map_err(TlsError::Unfit)?;
        config.resumption = Resumption::disabled();
        config.enable_sni = false;
        Ok(ClientTls { config: Arc::new(config) })
    }

    /// As a server for the client that shows the certificate `pinned`, or, without one, any of the fleet's.
    ///
    /// # Errors
    /// Certificate and key do not belong together, or the CA cannot be used.
    pub fn server(&self, pinned: impl Into<Option<Fingerprint>>) -> Result<ServerTls, TlsError> {
        let webpki = WebPkiClientVerifier::builder_with_provider(self.roots.clone(), provider()).build()?;
        let mut config = ServerConfig::builder_with_provider(provider())
            .with_protocol_versions(&[&version::TLS13])
            .map_err(TlsError::Unfit)?
            .with_client_cert_verifier(Arc::new(PinnedClient { webpki, pinned: pinned.into() }))
            .with_single_cert(self.chain.clone(), self.key.clone_key())
            .map_err(TlsError::Unfit)?;
        config.send_tls13_tickets = 0;
        Ok(ServerTls { config: Arc::new(config) })
    }
}

fn certificates(path: &Path, what: &'static str) -> Result<Vec<CertificateDer<'static>>, TlsError> {
    let wrong = |source| TlsError::Pem { what, path: path.to_owned(), source };
    let all: Vec<_> = CertificateDer::pem_file_iter(path).map_err(wrong)?.collect::<Result<_, _>>().map_err(wrong)?;
    if all.is_empty() { Err(TlsError::Empty(path.to_owned())) } else { Ok(all) }
}

/// aws-lc-rs, TLS 1.3 suites only, AES-128-GCM first: half the rounds of AES-256, and the payload is ciphertext already.
fn provider() -> Arc<CryptoProvider> {
    use aws_lc_rs::cipher_suite as suite;
    let cipher_suites =
        vec![suite::TLS13_AES_128_GCM_SHA256, suite::TLS13_AES_256_GCM_SHA384, suite::TLS13_CHACHA20_POLY1305_SHA256];
    Arc::new(CryptoProvider { cipher_suites, ..aws_lc_rs::default_provider() })
}

/// The peer has a certificate of our CA, but is not the peer that was named.
#[derive(Debug, thiserror::Error)]
#[error("the peer's certificate has fingerprint {found}, but {pinned} was agreed for this migration")]
struct WrongPeer {
    found: Fingerprint,
    pinned: Fingerprint,
}

fn check_pin(certificate: &CertificateDer<'_>, pinned: Option<Fingerprint>) -> Result<(), Error> {
    let Some(pinned) = pinned else { return Ok(()) };
    let found = Fingerprint::of(certificate);
    if found == pinned {
        return Ok(());
    }
    let wrong = OtherError(Arc::new(WrongPeer { found, pinned }));
    Err(Error::InvalidCertificate(CertificateError::Other(wrong)))
}

#[derive(Debug)]
struct PinnedServer {
    roots: Arc<RootCertStore>,
    provider: Arc<CryptoProvider>,
    pinned: Option<Fingerprint>,
}

impl ServerCertVerifier for PinnedServer {
    fn verify_server_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        _server_name: &ServerName<'_>,
        _ocsp_response: &[u8],
        now: UnixTime,
    ) -> Result<ServerCertVerified, Error> {
        let parsed = ParsedCertificate::try_from(end_entity)?;
        let algorithms = self.provider.signature_verification_algorithms.all;
        verify_server_cert_signed_by_trust_anchor(&parsed, &self.roots, intermediates, now, algorithms)?;
        check_pin(end_entity, self.pinned)?;
        Ok(ServerCertVerified::assertion())
    }

    fn verify_tls12_signature(
        &self,
        _message: &[u8],
        _cert: &CertificateDer<'_>,
        _dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        Err(Error::General("TLS 1.2 is not spoken".into()))
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        verify_tls13_signature(message, cert, dss, &self.provider.signature_verification_algorithms)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.provider.signature_verification_algorithms.supported_schemes()
    }
}

#[derive(Debug)]
struct PinnedClient {
    webpki: Arc<dyn ClientCertVerifier>,
    pinned: Option<Fingerprint>,
}

impl ClientCertVerifier for PinnedClient {
    fn root_hint_subjects(&self) -> &[DistinguishedName] {
        self.webpki.root_hint_subjects()
    }

    fn verify_client_cert(
        &self,
        end_entity: &CertificateDer<'_>,
        intermediates: &[CertificateDer<'_>],
        now: UnixTime,
    ) -> Result<ClientCertVerified, Error> {
        let verified = self.webpki.verify_client_cert(end_entity, intermediates, now)?;
        check_pin(end_entity, self.pinned)?;
        Ok(verified)
    }

    fn verify_tls12_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls12_signature(message, cert, dss)
    }

    fn verify_tls13_signature(
        &self,
        message: &[u8],
        cert: &CertificateDer<'_>,
        dss: &DigitallySignedStruct,
    ) -> Result<HandshakeSignatureValid, Error> {
        self.webpki.verify_tls13_signature(message, cert, dss)
    }

    fn supported_verify_schemes(&self) -> Vec<SignatureScheme> {
        self.webpki.supported_verify_schemes()
    }
}

/// What went wrong with a peer, cause and all.
pub(crate) fn explain(error: &Error) -> String {
    match error {
        Error::InvalidCertificate(CertificateError::Other(OtherError(cause))) => cause.to_string(),
        // Another CA, of another name or of the same.
        Error::InvalidCertificate(CertificateError::UnknownIssuer | CertificateError::BadSignature) => {
            "the peer's certificate is not from this fleet's CA".into()
        }
        Error::NoCertificatesPresented => "the peer showed no certificate".into(),
        Error::AlertReceived(alert) => format!("the peer refused us: TLS alert {alert:?}"),
        other => format!("TLS: {other}"),
    }
}
