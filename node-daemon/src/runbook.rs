//! The endpoints of operators' runbooks, with the paths and answers of silk's vxlan-policy-agent: for scripts that force a
//! poll, and for the switches that are thrown while something is looked for. Plain HTTP on loopback, off by default.
//!
//! Owns nothing but the level of the log. Woken by requests. Emits forced polls ([`Forced`]), and the switch of the log of
//! traffic between containers ([`Inbox::log_c2c`]). Any method will do where silk takes any.

use std::sync::Arc;
use std::time::Duration;

use http_body_util::{BodyExt, Full, Limited};
use hyper::body::{Body, Bytes};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::{Method, Request, Response, StatusCode};
use serde::Deserialize;
use tokio::net::TcpListener;
use tokio::sync::{mpsc, oneshot};
use tokio::time::timeout;
use tracing::info;
use weft_daemon::http::{self, Patience};
use weft_daemon::log::Level;
use weft_model::follow::Subject;

use crate::inbox::Inbox;
use crate::policy_server::Forced;

/// Of a request's body.
const MOST_BYTES: usize = 4 << 10;
/// For it to arrive.
const BODY: Duration = Duration::from_secs(5);
/// For a forced poll: a little more than its question may take.
const POLL: Duration = Duration::from_secs(65);
/// For a connection that waits for one.
const CONNECTION: Duration = Duration::from_secs(75);

/// What the endpoints work with.
#[derive(Debug)]
pub struct Runbook {
    pub inbox: Inbox,
    /// None: there is no policy server.
    pub polls: Option<mpsc::Sender<Forced>>,
    /// Whether security groups come from the server.
    pub groups: bool,
    pub level: Arc<Level>,
}

type Answer = (StatusCode, String);

impl Runbook {
    /// Serves both ports until dropped.
    pub async fn serve(self, force: TcpListener, debug: TcpListener) {
        let (runbook, patience) =
            (Arc::new(self), Patience { connection: CONNECTION, ..Patience::default() });
        let other = Arc::clone(&runbook);
        tokio::join!(
            http::answer(force, patience, move |request| {
                let runbook = Arc::clone(&runbook);
                async move { response(runbook.force(request.uri().path(), request.uri().query()).await) }
            }),
            http::answer(debug, patience, move |request| {
                let runbook = Arc::clone(&other);
                async move { response(runbook.debug(request).await) }
            }),
        );
    }

    /// What the port for forced polls answers.
    pub async fn force(&self, path: &str, query: Option<&str>) -> Answer {
        match path {
            "/force-policy-poll-cycle" => match self.poll(Subject::Policies).await {
                Ok(()) => (StatusCode::OK, String::new()),
                Err(why) => failed(format!("failed to force policy poll cycle: {why}")),
            },
            "/force-asgs-for-container" => match self.container(query) {
                Ok(container) => match self.poll(Subject::Groups).await {
                    Ok(()) => (StatusCode::OK, format!("updated container {container}")),
                    Err(why) => failed(format!("failed to update asgs for container {container}: {why}")),
                },
                Err(refused) => refused,
            },
            // A container's rules go with it, in one transaction: none are ever orphaned.
            "/force-orphaned-asgs-cleanup" => match self.container(query) {
                Ok(container) => (StatusCode::OK, format!("cleaned up ASGs for container {container}")),
                Err(refused) => refused,
            },
            _ => not_found(),
        }
    }

    fn container<'a>(&self, query: Option<&'a str>) -> Result<&'a str, Answer> {
        if !self.groups {
            let why = "ASG syncing has been disabled administratively";
            return Err((StatusCode::METHOD_NOT_ALLOWED, why.into()));
        }
        let mut pairs = query.unwrap_or_default().split('&');
        match pairs.find_map(|pair| pair.strip_prefix("container=")) {
            None | Some("") => Err((StatusCode::BAD_REQUEST, "no container specified".into())),
            Some(container) => Ok(container),
        }
    }

    async fn poll(&self, subject: Subject) -> Result<(), String> {
        let Some(polls) = &self.polls else { return Err("no policy server is configured".into()) };
        let (reply, done) = oneshot::channel();
        polls.try_send(Forced { subject, reply }).map_err(|_| "too many polls wait already")?;
        match timeout(POLL, done).await {
            Ok(Ok(outcome)) => outcome,
            Ok(Err(_)) => Err("the node is ending".into()),
            Err(_) => Err(format!("not in the kernel within {POLL:?}")),
        }
    }

    /// What the port for switches answers.
    pub async fn debug<B>(&self, request: Request<B>) -> Answer
    where
        B: Body<Data: Send, Error: Into<Box<dyn std::error::Error + Send + Sync>>>,
    {
        let (method, path) = (request.method().clone(), request.uri().path().to_owned());
        let switch = match path.as_str() {
            "/iptables-c2c-logging" => true,
            "/log-level" => false,
            _ => return not_found(),
        };
        let body = match timeout(BODY, Limited::new(request.into_body(), MOST_BYTES).collect()).await {
            Ok(Ok(body)) => body.to_bytes(),
            Ok(Err(_)) => return (StatusCode::BAD_REQUEST, "Failed to read body\n".into()),
            Err(_) => return (StatusCode::REQUEST_TIMEOUT, "no body in time\n".into()),
        };
        if switch { self.c2c_logging(&method, &body).await } else { self.log_level(&body) }
    }

    async fn c2c_logging(&self, method: &Method, body: &[u8]) -> Answer {
        #[derive(Deserialize)]
        struct Wanted {
            enabled: Option<bool>,
        }
        let bad = |why: &str| (StatusCode::BAD_REQUEST, format!(r#"{{ "error": "{why}" }}"#));
        let set = match (method, serde_json::from_slice(body)) {
            (&Method::PUT, Err(_)) => return bad("decoding request body as json"),
            (&Method::PUT, Ok(Wanted { enabled: None })) => return bad("missing required key 'enabled'"),
            (&Method::PUT, Ok(Wanted { enabled })) => enabled,
            _ => None,
        };
        match self.inbox.log_c2c(set).await {
            Ok(enabled) => {
                if set.is_some() {
                    info!(enabled, "log of traffic between containers switched");
                }
                (StatusCode::OK, format!("{{\"enabled\":{enabled}}}\n"))
            }
            Err(why) => failed(format!("{why}\n")),
        }
    }

    /// Without a level in the request, nothing but that we are here.
    fn log_level(&self, body: &[u8]) -> Answer {
        let given = String::from_utf8_lossy(body);
        let given = given.trim();
        if given.is_empty() {
            return (StatusCode::OK, String::new());
        }
        match self.level.set(level(given)) {
            Ok(()) => {
                info!(level = given, "log level changed");
                (StatusCode::OK, format!("/log-level was invoked with Level: {given}\n"))
            }
            Err(why) => (StatusCode::BAD_REQUEST, format!("Invalid log level: {why}\n")),
        }
    }
}

/// The words of silk's log library as ours.
fn level(given: &str) -> &str {
    match given.to_ascii_lowercase().as_str() {
        "d" | "0" => "debug",
        "i" | "1" => "info",
        "e" | "2" | "fatal" | "f" | "3" => "error",
        _ => given,
    }
}

fn not_found() -> Answer {
    (StatusCode::NOT_FOUND, "404 page not found\n".into())
}

fn failed(why: String) -> Answer {
    (StatusCode::INTERNAL_SERVER_ERROR, why)
}

fn response((status, body): Answer) -> Response<Full<Bytes>> {
    let mut response = Response::new(Full::from(body));
    *response.status_mut() = status;
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    response
}
