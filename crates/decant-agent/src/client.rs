//! A client of an agent's API: over its unix socket for root, or over mutual TLS.
//!
//! A connection is kept for the next request. A request that fails on a kept connection before anything was answered is
//! sent once more on a new one; nothing else is repeated here.

use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use decant_api::{Code, Empty, ErrorBody, Event};
use decant_base::WorkerId;
use http_body_util::{BodyExt, Full, Limited};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::{Method, Request, StatusCode, header};
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncRead, AsyncWrite};
use tokio::net::{TcpStream, UnixStream};

/// An answer is at most so long: a fleet's list of machines, or a seal's map of live blocks.
pub const MAX_BODY_BYTES: usize = 64 << 20;
/// How long connecting may take, TLS included: a worker that is away must not hold up a list.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(3);
/// Idle connections kept per client.
const MAX_IDLE: usize = 2;

/// Where an agent is.
#[derive(Debug, Clone)]
enum Target {
    Unix(PathBuf),
    Tls(TlsTarget),
}

/// An agent reached over mutual TLS.
#[derive(Debug, Clone)]
pub struct TlsTarget {
    /// `host:port`.
    pub address: String,
    /// The name that its certificate must carry.
    pub worker: WorkerId,
    /// Who we are and whom we trust; see [`crate::tls`].
    pub config: Arc<rustls::ClientConfig>,
}

/// Why a request got no answer, or not the wanted one.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// Nobody answers there.
    #[error("no agent answers at {target}")]
    Unreachable {
        /// Socket path or address.
        target: String,
        /// What failed.
        #[source]
        source: std::io::Error,
    },
    /// It did not answer in time. The request may have been carried out.
    #[error("the agent at {target} did not answer within {after:?}")]
    TimedOut {
        /// Socket path or address.
        target: String,
        /// How long it was given.
        after: Duration,
    },
    /// The connection broke before the whole answer was there.
    #[error("the connection to the agent at {target} broke")]
    Broken {
        /// Socket path or address.
        target: String,
        /// What failed.
        #[source]
        source: Box<dyn std::error::Error + Send + Sync>,
    },
    /// It answered something that is no answer of this API.
    #[error("the agent at {target} answered {status} with a body that is not of this API")]
    Garbled {
        /// Socket path or address.
        target: String,
        /// The HTTP status.
        status: u16,
        /// What is wrong with the body.
        #[source]
        source: serde_json::Error,
    },
    /// It refused, and says why.
    #[error(transparent)]
    Api(#[from] ErrorBody),
}

impl ClientError {
    /// As the one shape of every failure, so that a program prints all failures alike.
    pub fn into_body(self) -> ErrorBody {
        let cause = |error: &dyn std::error::Error| {
            let mut text = error.to_string();
            let mut source = error.source();
            while let Some(inner) = source {
                text = format!("{text}: {inner}");
                source = inner.source();
            }
            text
        };
        match self {
            Self::Api(body) => body,
            Self::Unreachable { .. } => ErrorBody::new(
                Code::Unavailable,
                "agent does not answer",
                cause(&self),
                "start it with `decant agent --config worker.toml`, or name its socket with --socket; the socket is for root only",
            ),
            Self::TimedOut { .. } => ErrorBody::new(
                Code::Timeout,
                "agent did not answer in time",
                cause(&self),
                "ask again; the request may have been carried out",
            ),
            Self::Broken { .. } => ErrorBody::new(
                Code::Unavailable,
                "connection to the agent broke",
                cause(&self),
                "ask again; the agent may be restarting, which interrupts no machine",
            ),
            Self::Garbled { .. } => ErrorBody::new(
                Code::Internal,
                "answer not understood",
                cause(&self),
                "use the same version of decant on both sides",
            ),
        }
    }
}

/// A client of one agent. Cheap to clone; clones share kept connections.
#[derive(Debug, Clone)]
pub struct Client {
    target: Arc<Target>,
    idle: Arc<Mutex<Vec<SendRequest<Full<Bytes>>>>>,
    /// SHA-256, hex, of the certificate that the agent showed last.
    certificate: Arc<Mutex<Option<String>>>,
    timeout: Duration,
}

impl Client {
    /// A client of the agent whose socket is `path`, `run_dir/agent.sock`. Nothing is opened yet.
    pub fn unix(path: impl AsRef<Path>) -> Self {
        Self::new(Target::Unix(path.as_ref().to_owned()))
    }

    /// A client of the agent at `target`. Nothing is opened yet.
    pub fn tls(target: TlsTarget) -> Self {
        Self::new(Target::Tls(target))
    }

    fn new(target: Target) -> Self {
        Self {
            target: Arc::new(target),
            idle: Arc::default(),
            certificate: Arc::default(),
            timeout: Duration::from_secs(30),
        }
    }

    /// The same client with another limit on how long one answer may take; 30 s unless said.
    pub fn with_timeout(self, timeout: Duration) -> Self {
        Self { timeout, ..self }
    }

    /// Socket path or address, for messages.
    pub fn target(&self) -> String {
        match &*self.target {
            Target::Unix(path) => path.display().to_string(),
            Target::Tls(target) => format!("{} ({})", target.worker, target.address),
        }
    }

    /// `GET path`. Paths are made by [`decant_api::path`].
    pub async fn get<T: DeserializeOwned>(&self, path: &str) -> Result<T, ClientError> {
        self.call(Method::GET, path, Bytes::new()).await
    }

    /// `POST path` with `request` as its body.
    pub async fn post<T: DeserializeOwned>(&self, path: &str, request: &impl Serialize) -> Result<T, ClientError> {
        let body = serde_json::to_vec(request).expect("requests of this API have string keys and no failing types");
        self.call(Method::POST, path, Bytes::from(body)).await
    }

    /// `DELETE path`.
    pub async fn delete(&self, path: &str) -> Result<Empty, ClientError> {
        self.call(Method::DELETE, path, Bytes::new()).await
    }

    /// Opens a connection if none is kept, so that the next request need not.
    pub async fn warm(&self) -> Result<(), ClientError> {
        if self.idle().iter().any(|connection| !connection.is_closed()) {
            return Ok(());
        }
        let connection = self.connect().await?;
        self.keep(connection);
        Ok(())
    }

    /// Opens a new connection in any case.
    pub(crate) async fn connect_once(&self) -> Result<(), ClientError> {
        let connection = self.connect().await?;
        self.keep(connection);
        Ok(())
    }

    /// SHA-256, hex, of the certificate that the agent showed last; `None` before the first connection and on a unix socket.
    pub fn peer_certificate(&self) -> Option<String> {
        self.certificate.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    /// The event log from after number `after`, then live, until the connection breaks. Resume with the last sequence.
    pub async fn events(&self, after: u64) -> Result<EventStream, ClientError> {
        let mut connection = self.connect().await?;
        let request = self.request(Method::GET, &decant_api::path::events(after), Bytes::new());
        let response = connection.send_request(request).await.map_err(|error| self.broken(error))?;
        let status = response.status();
        if !status.is_success() {
            return Err(self.refusal(status, &self.read(response.into_body()).await?));
        }
        let (target, body) = (self.target(), response.into_body());
        Ok(EventStream { target, body, buffer: Vec::new(), _connection: connection })
    }

    async fn call<T: DeserializeOwned>(&self, method: Method, path: &str, body: Bytes) -> Result<T, ClientError> {
        let (status, answer) = tokio::time::timeout(self.timeout, self.exchange(method, path, body))
            .await
            .map_err(|_| ClientError::TimedOut { target: self.target(), after: self.timeout })??;
        if !status.is_success() {
            return Err(self.refusal(status, &answer));
        }
        serde_json::from_slice(&answer).map_err(|source| self.garbled(status, source))
    }

    async fn exchange(&self, method: Method, path: &str, body: Bytes) -> Result<(StatusCode, Bytes), ClientError> {
        while let Some(mut connection) = self.take_idle() {
            if connection.ready().await.is_err() {
                continue;
            }
            let request = self.request(method.clone(), path, body.clone());
            if let Ok(response) = connection.send_request(request).await {
                return self.finish(connection, response).await;
            }
            // The agent closed the kept connection meanwhile; requests of this API are safe to repeat.
            break;
        }
        let mut connection = self.connect().await?;
        let request = self.request(method, path, body);
        let response = connection.send_request(request).await.map_err(|error| self.broken(error))?;
        self.finish(connection, response).await
    }

    async fn finish(
        &self,
        connection: SendRequest<Full<Bytes>>,
        response: hyper::Response<hyper::body::Incoming>,
    ) -> Result<(StatusCode, Bytes), ClientError> {
        let status = response.status();
        let body = self.read(response.into_body()).await?;
        self.keep(connection);
        Ok((status, body))
    }

    async fn read(&self, body: hyper::body::Incoming) -> Result<Bytes, ClientError> {
        let collected = Limited::new(body, MAX_BODY_BYTES).collect().await;
        collected.map(|body| body.to_bytes()).map_err(|source| ClientError::Broken { target: self.target(), source })
    }

    fn request(&self, method: Method, path: &str, body: Bytes) -> Request<Full<Bytes>> {
        let host = match &*self.target {
            Target::Unix(_) => "localhost",
            Target::Tls(target) => target.worker.as_str(),
        };
        Request::builder()
            .method(method)
            .uri(path)
            .header(header::HOST, host)
            .header(header::CONTENT_TYPE, "application/json")
            .body(Full::new(body))
            .expect("paths are made of DNS labels and numbers")
    }

    async fn connect(&self) -> Result<SendRequest<Full<Bytes>>, ClientError> {
        let unreachable = |source| ClientError::Unreachable { target: self.target(), source };
        let connecting = async {
            match &*self.target {
                Target::Unix(path) => self.handshake(UnixStream::connect(path).await.map_err(unreachable)?).await,
                Target::Tls(target) => {
                    let (stream, certificate) = connect_tls(target).await.map_err(unreachable)?;
                    *self.certificate.lock().unwrap_or_else(PoisonError::into_inner) = Some(certificate);
                    self.handshake(stream).await
                }
            }
        };
        match tokio::time::timeout(CONNECT_TIMEOUT.min(self.timeout), connecting).await {
            Ok(result) => result,
            Err(_) => Err(unreachable(std::io::ErrorKind::TimedOut.into())),
        }
    }

    async fn handshake<S>(&self, stream: S) -> Result<SendRequest<Full<Bytes>>, ClientError>
    where
        S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
    {
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(|error| self.broken(error))?;
        tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "connection to an agent ended");
            }
        });
        Ok(sender)
    }

    fn idle(&self) -> std::sync::MutexGuard<'_, Vec<SendRequest<Full<Bytes>>>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn take_idle(&self) -> Option<SendRequest<Full<Bytes>>> {
        let mut idle = self.idle();
        idle.retain(|connection| !connection.is_closed());
        idle.pop()
    }

    fn keep(&self, connection: SendRequest<Full<Bytes>>) {
        let mut idle = self.idle();
        idle.retain(|connection| !connection.is_closed());
        if idle.len() < MAX_IDLE && !connection.is_closed() {
            idle.push(connection);
        }
    }

    fn broken(&self, error: hyper::Error) -> ClientError {
        ClientError::Broken { target: self.target(), source: Box::new(error) }
    }

    fn garbled(&self, status: StatusCode, source: serde_json::Error) -> ClientError {
        ClientError::Garbled { target: self.target(), status: status.as_u16(), source }
    }

    fn refusal(&self, status: StatusCode, body: &[u8]) -> ClientError {
        match serde_json::from_slice::<ErrorBody>(body) {
            Ok(body) => ClientError::Api(body),
            Err(source) => self.garbled(status, source),
        }
    }
}

/// A TLS stream to a worker, and the certificate that it showed.
type TlsStream = tokio_rustls::client::TlsStream<TcpStream>;

/// Connects to `target` and checks its certificate against the authority and the worker's name. The certificate's
/// SHA-256, hex, comes along: an export binds to it.
pub(crate) async fn connect_tls(target: &TlsTarget) -> std::io::Result<(TlsStream, String)> {
    let stream = TcpStream::connect(&target.address).await?;
    stream.set_nodelay(true)?;
    let name =
        rustls::pki_types::ServerName::try_from(target.worker.as_str().to_owned()).map_err(std::io::Error::other)?;
    let stream = tokio_rustls::TlsConnector::from(target.config.clone()).connect(name, stream).await?;
    let certificate = stream.get_ref().1.peer_certificates().and_then(<[_]>::first);
    let fingerprint = certificate.map(crate::tls::fingerprint).ok_or(std::io::ErrorKind::InvalidData)?;
    Ok((stream, fingerprint))
}

/// Events as they come.
#[derive(Debug)]
pub struct EventStream {
    target: String,
    body: hyper::body::Incoming,
    buffer: Vec<u8>,
    _connection: SendRequest<Full<Bytes>>,
}

impl EventStream {
    /// The next event; `None` when the agent ended the stream. Safe to cancel.
    pub async fn next(&mut self) -> Option<Result<Event, ClientError>> {
        loop {
            if let Some(event) = self.take_event() {
                return Some(event);
            }
            match self.body.frame().await? {
                Ok(frame) => {
                    if let Ok(data) = frame.into_data() {
                        self.buffer.extend_from_slice(&data);
                    }
                }
                Err(error) => {
                    return Some(Err(ClientError::Broken { target: self.target.clone(), source: Box::new(error) }));
                }
            }
        }
    }

    /// Takes one whole message (ended by an empty line) from the buffer; comments that keep the connection alive are dropped.
    fn take_event(&mut self) -> Option<Result<Event, ClientError>> {
        loop {
            let end = self.buffer.windows(2).position(|pair| pair == b"\n\n")?;
            let message: Vec<u8> = self.buffer.drain(..end + 2).collect();
            let text = String::from_utf8_lossy(&message);
            let data: String =
                text.lines().filter_map(|line| line.strip_prefix("data:")).map(str::trim_start).collect();
            if data.is_empty() {
                continue;
            }
            let event = serde_json::from_str(&data);
            return Some(event.map_err(|source| ClientError::Garbled {
                target: self.target.clone(),
                status: 200,
                source,
            }));
        }
    }
}
