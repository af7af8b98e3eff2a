//! Plain HTTP for whoever works on this machine: health and metrics, and what a daemon offers besides ([`answer`]).
//!
//! One task for a listener, woken by connections; each gets one answer and is closed. It is offered on loopback only, as
//! scrapers, supervisors and operators' scripts run beside the daemon.

use std::convert::Infallible;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::sync::Arc;
use std::time::Duration;

use http_body_util::Full;
use hyper::body::{Bytes, Incoming};
use hyper::header::{ALLOW, CONTENT_TYPE};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Method, Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use prometheus_client::registry::Registry;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::Semaphore;
use tokio::time::{sleep, timeout};

/// Connections served at once; more wait in the kernel's queue.
const CONNECTIONS: usize = 16;
/// For a request to arrive, and for a whole connection.
const REQUEST_TIMEOUT: Duration = Duration::from_secs(5);
const CONNECTION_TIMEOUT: Duration = Duration::from_secs(30);

/// What `GET /health` answers: 200 and `{"healthy":true}`, or 503 and why not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Healthy,
    Unhealthy { why: String },
}

#[derive(Debug, thiserror::Error)]
pub enum HttpError {
    #[error("{address} is not a loopback address: plain HTTP is offered on 127.0.0.0/8 or ::1 only")]
    NotLoopback { address: SocketAddr },
    #[error("cannot listen on {address} for plain HTTP: {why}")]
    Listen { address: SocketAddr, why: io::Error },
}

/// Listens on a loopback address; port 0 takes a free one.
pub async fn bind(address: SocketAddr) -> Result<TcpListener, HttpError> {
    if !address.ip().is_loopback() {
        return Err(HttpError::NotLoopback { address });
    }
    TcpListener::bind(address).await.map_err(|why| HttpError::Listen { address, why })
}

/// How long one connection may take.
#[derive(Debug, Clone, Copy)]
pub struct Patience {
    /// For the request's headers to arrive.
    pub request: Duration,
    /// From the first byte to the last.
    pub connection: Duration,
}

impl Default for Patience {
    fn default() -> Self {
        Self { request: REQUEST_TIMEOUT, connection: CONNECTION_TIMEOUT }
    }
}

/// What is done before metrics are told: for what is read only then.
pub type Measure = Box<dyn Fn() -> BoxFuture<()> + Send + Sync>;
pub type BoxFuture<T> = Pin<Box<dyn Future<Output = T> + Send>>;

/// Serves health and metrics until dropped.
pub async fn serve<H>(listener: TcpListener, health: H, metrics: Arc<Registry>)
where
    H: Fn() -> Health + Send + Sync + 'static,
{
    serve_within(Patience::default(), listener, health, metrics, None).await;
}

/// As [`serve`], with something to do first.
pub async fn serve_measured<H>(listener: TcpListener, health: H, metrics: Arc<Registry>, measure: Measure)
where
    H: Fn() -> Health + Send + Sync + 'static,
{
    serve_within(Patience::default(), listener, health, metrics, Some(measure)).await;
}

async fn serve_within<H>(
    patience: Patience,
    listener: TcpListener,
    health: H,
    metrics: Arc<Registry>,
    measure: Option<Measure>,
) where
    H: Fn() -> Health + Send + Sync + 'static,
{
    let shared = Arc::new((health, metrics, measure));
    answer(listener, patience, move |request: Request<Incoming>| {
        let shared = Arc::clone(&shared);
        async move {
            let (health, metrics, measure) = &*shared;
            if let (Some(measure), "/metrics") = (measure, request.uri().path()) {
                measure().await;
            }
            respond(request.method(), request.uri().path(), health, metrics)
        }
    })
    .await;
}

/// Answers requests until dropped.
pub async fn answer<F, A>(listener: TcpListener, patience: Patience, respond: F)
where
    F: Fn(Request<Incoming>) -> A + Clone + Send + Sync + 'static,
    A: Future<Output = Response<Full<Bytes>>> + Send + 'static,
{
    let slots = Arc::new(Semaphore::new(CONNECTIONS));
    loop {
        let Ok(slot) = Arc::clone(&slots).acquire_owned().await else { return };
        match listener.accept().await {
            Ok((stream, _)) => {
                let respond = respond.clone();
                tokio::spawn(async move {
                    converse(patience, stream, respond).await;
                    drop(slot);
                });
            }
            Err(why) => {
                // Out of descriptors, mostly: give others time to close theirs rather than spin.
                tracing::warn!(%why, "cannot accept a connection for plain HTTP");
                sleep(Duration::from_millis(100)).await;
            }
        }
    }
}

async fn converse<F, A>(patience: Patience, stream: TcpStream, respond: F)
where
    F: Fn(Request<Incoming>) -> A,
    A: Future<Output = Response<Full<Bytes>>>,
{
    let answer = service_fn(|request: Request<Incoming>| {
        let response = respond(request);
        async { Ok::<_, Infallible>(response.await) }
    });
    let connection = http1::Builder::new()
        .timer(TokioTimer::new())
        .header_read_timeout(patience.request)
        .keep_alive(false)
        .serve_connection(TokioIo::new(stream), answer);
    match timeout(patience.connection, connection).await {
        Ok(Ok(())) => (),
        Ok(Err(why)) => tracing::debug!(%why, "connection for plain HTTP broke off"),
        Err(_) => tracing::debug!("connection for plain HTTP took too long"),
    }
}

fn respond(
    method: &Method,
    path: &str,
    health: &impl Fn() -> Health,
    metrics: &Registry,
) -> Response<Full<Bytes>> {
    let (status, kind, body) = match (method, path) {
        (&Method::GET, "/health") => {
            let (status, body) = match health() {
                Health::Healthy => (StatusCode::OK, serde_json::json!({"healthy": true})),
                Health::Unhealthy { why } => {
                    (StatusCode::SERVICE_UNAVAILABLE, serde_json::json!({"healthy": false, "why": why}))
                }
            };
            (status, "application/json", format!("{body}\n"))
        }
        (&Method::GET, "/metrics") => {
            let mut text = String::new();
            match prometheus_client::encoding::text::encode(&mut text, metrics) {
                Ok(()) => {
                    (StatusCode::OK, "application/openmetrics-text; version=1.0.0; charset=utf-8", text)
                }
                Err(why) => (StatusCode::INTERNAL_SERVER_ERROR, "text/plain", format!("{why}\n")),
            }
        }
        (_, "/health" | "/metrics") => {
            (StatusCode::METHOD_NOT_ALLOWED, "text/plain", "only GET\n".to_owned())
        }
        _ => (StatusCode::NOT_FOUND, "text/plain", "there are /health and /metrics\n".to_owned()),
    };
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    let headers = response.headers_mut();
    headers.insert(CONTENT_TYPE, hyper::header::HeaderValue::from_static(kind));
    if status == StatusCode::METHOD_NOT_ALLOWED {
        headers.insert(ALLOW, hyper::header::HeaderValue::from_static("GET"));
    }
    response
}

#[cfg(test)]
mod tests {
    use super::*;
    use prometheus_client::metrics::counter::Counter;
    use std::net::Ipv4Addr;
    use tokio::io::{AsyncReadExt, AsyncWriteExt};

    async fn ask(request: &str, health: Health) -> String {
        let waves: Counter = Counter::default();
        waves.inc();
        let mut metrics = Registry::default();
        metrics.register("waves", "Waves applied", waves);

        let listener = bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let server = tokio::spawn(serve(listener, move || health.clone(), Arc::new(metrics)));
        let mut stream = TcpStream::connect(address).await.unwrap();
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut answer = String::new();
        stream.read_to_string(&mut answer).await.unwrap();
        server.abort();
        answer
    }

    fn get(path: &str) -> String {
        format!("GET {path} HTTP/1.1\r\nHost: localhost\r\n\r\n")
    }

    #[tokio::test]
    async fn health_is_200_or_503() {
        let well = ask(&get("/health"), Health::Healthy).await;
        assert!(well.starts_with("HTTP/1.1 200 OK\r\n"), "{well}");
        assert!(well.ends_with("{\"healthy\":true}\n"), "{well}");

        let ill = ask(&get("/health"), Health::Unhealthy { why: "no lease".into() }).await;
        assert!(ill.starts_with("HTTP/1.1 503 "), "{ill}");
        assert!(ill.ends_with("{\"healthy\":false,\"why\":\"no lease\"}\n"), "{ill}");
    }

    #[tokio::test]
    async fn metrics_are_open_metrics_text() {
        let answer = ask(&get("/metrics"), Health::Healthy).await;
        assert!(answer.contains("application/openmetrics-text"), "{answer}");
        assert!(answer.ends_with("# TYPE waves counter\nwaves_total 1\n# EOF\n"), "{answer}");
    }

    #[tokio::test]
    async fn anything_else_is_refused() {
        let other = ask(&get("/"), Health::Healthy).await;
        assert!(other.starts_with("HTTP/1.1 404 "), "{other}");
        let post =
            ask("POST /health HTTP/1.1\r\nHost: x\r\nContent-Length: 0\r\n\r\n", Health::Healthy).await;
        assert!(post.starts_with("HTTP/1.1 405 "), "{post}");
        assert!(post.contains("allow: GET\r\n"), "{post}");
    }

    #[tokio::test]
    async fn only_loopback() {
        let message = bind(([0, 0, 0, 0], 0).into()).await.unwrap_err().to_string();
        assert!(message.contains("0.0.0.0:0 is not a loopback address"), "{message}");
    }

    #[tokio::test]
    async fn a_taken_port_is_named() {
        let first = bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let address = first.local_addr().unwrap();
        let message = bind(address).await.unwrap_err().to_string();
        assert!(message.contains(&address.to_string()), "{message}");
    }

    /// Connections that say nothing hold every slot only until they are timed out.
    #[tokio::test]
    async fn silent_connections_are_closed() {
        let listener = bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap();
        let address = listener.local_addr().unwrap();
        let metrics = Arc::new(Registry::default());
        let short = Patience { request: Duration::from_millis(50), ..Patience::default() };
        let server = tokio::spawn(serve_within(short, listener, || Health::Healthy, metrics, None));
        let mut silent = Vec::new();
        for _ in 0..CONNECTIONS {
            silent.push(TcpStream::connect(address).await.unwrap());
        }
        let mut late = TcpStream::connect(address).await.unwrap();
        late.write_all(get("/health").as_bytes()).await.unwrap();
        let mut answer = String::new();
        late.read_to_string(&mut answer).await.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK"), "{answer}");
        server.abort();
    }
}
