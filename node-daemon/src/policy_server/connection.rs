//! One connection to the policy server: HTTP/1.1, which is all that it speaks, over mutual TLS.

use std::time::{Duration, Instant, SystemTime};

use http_body_util::{BodyExt, Full};
use hyper::body::Bytes;
use hyper::client::conn::http1::{SendRequest, handshake};
use hyper::header::{ACCEPT, HOST, USER_AGENT};
use hyper::{Method, Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::net::TcpStream;
use tokio::task::AbortHandle;
use tokio_rustls::TlsConnector;
use weft_daemon::tls::{Files, Fingerprint, TlsError};

use super::url::ServerUrl;

/// Connections are replaced so often, to follow the name where it leads by then.
const LONGEST_USE: Duration = Duration::from_secs(300);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum Cause {
    #[error("use our certificates")]
    Certificates(#[source] TlsError),
    #[error("connect")]
    Connect(#[source] std::io::Error),
    #[error("agree on TLS")]
    Handshake(#[source] std::io::Error),
    #[error("write the request")]
    Request(#[source] hyper::http::Error),
    #[error("exchange HTTP")]
    Http(#[source] hyper::Error),
    #[error("the server answers {status}: {said}")]
    Status { status: StatusCode, said: String },
    #[error("the answer has more than {0} bytes")]
    TooLarge(usize),
    #[error("read the answer, which should be JSON")]
    Json(#[source] serde_json::Error),
    #[error("the answer `{0}` is not the whole number that it should be")]
    NotANumber(String),
    #[error("the answer `{0}` has no tag of theirs")]
    NotATag(String),
    #[error("page {next} is said to follow page {from}")]
    Circle { from: u64, next: u64 },
    #[error("no answer within {0:?}")]
    Late(Duration),
}

impl Cause {
    /// For those who count.
    pub(super) fn kind(&self) -> &'static str {
        match self {
            Self::Certificates(_) => "certificates",
            Self::Connect(_) => "connect",
            Self::Handshake(_) => "tls",
            Self::Request(_) | Self::Http(_) => "http",
            Self::Status { .. } => "status",
            Self::TooLarge(_)
            | Self::Json(_)
            | Self::NotANumber(_)
            | Self::NotATag(_)
            | Self::Circle { .. } => "content",
            Self::Late(_) => "late",
        }
    }
}

#[derive(Debug)]
pub(super) struct Connection {
    sender: SendRequest<Full<Bytes>>,
    driver: AbortHandle,
    opened: Instant,
    /// Of the certificates that it was opened with.
    certificates: Fingerprint,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.driver.abort();
    }
}

impl Connection {
    pub(super) async fn open(url: &ServerUrl, files: &Files) -> Result<Self, Cause> {
        #[expect(clippy::disallowed_methods, reason = "certificates are valid in wall-clock time")]
        let now = SystemTime::now();
        let certificates = files.fingerprint();
        let config =
            files.load(now).and_then(|loaded| loaded.client_config()).map_err(Cause::Certificates)?;
        let tcp = TcpStream::connect(url.endpoint()).await.map_err(Cause::Connect)?;
        // A request is one small write; it must not wait for others.
        tcp.set_nodelay(true).map_err(Cause::Connect)?;
        let tls = TlsConnector::from(config).connect(url.name(), tcp).await.map_err(Cause::Handshake)?;
        let (sender, connection) = handshake(TokioIo::new(tls)).await.map_err(Cause::Http)?;
        let driver = tokio::spawn(async move {
            // What it ends with is what the request under way ends with.
            drop(connection.await);
        });
        Ok(Self { sender, driver: driver.abort_handle(), opened: Instant::now(), certificates })
    }

    /// Whether another request may go over it.
    pub(super) fn usable(&self, files: &Files) -> bool {
        !self.sender.is_closed()
            && self.opened.elapsed() < LONGEST_USE
            && files.changed_since(&self.certificates).is_none()
    }

    /// At most `limit` bytes are taken, whatever the status.
    pub(super) async fn send(
        &mut self,
        url: &ServerUrl,
        method: &Method,
        path: &str,
        content: &str,
        limit: usize,
    ) -> Result<(StatusCode, Vec<u8>), Cause> {
        self.sender.ready().await.map_err(Cause::Http)?;
        let request = Request::builder()
            .method(method)
            .uri(path)
            .header(HOST, url.authority())
            .header(ACCEPT, "application/json")
            .header(USER_AGENT, "weft-node")
            .body(Full::from(content.to_owned()))
            .map_err(Cause::Request)?;
        let answer = self.sender.send_request(request).await.map_err(Cause::Http)?;
        let status = answer.status();
        // The body's type is not looked at: it is JSON, and says that it is text.
        let mut incoming = answer.into_body();
        let mut body = Vec::new();
        while let Some(frame) = incoming.frame().await {
            let frame = frame.map_err(Cause::Http)?;
            let Some(data) = frame.data_ref() else { continue };
            if data.len() > limit - body.len() {
                return Err(Cause::TooLarge(limit));
            }
            body.extend_from_slice(data);
        }
        Ok((status, body))
    }
}
