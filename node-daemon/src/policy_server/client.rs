//! The questions that the policy server's internal API answers.
//!
//! A question may take several requests: ids that no URL has room for, lists that come in pages. It has an answer only
//! if each of them has.

use std::collections::BTreeSet;
use std::str;
use std::time::Duration;

use hyper::{Method, StatusCode};
use serde::Deserialize;
use serde_json::json;
use tokio::sync::Mutex;
use weft_daemon::tls::Files;
use weft_model::asg::group::{self, SecurityGroup};
use weft_model::follow::Stamp;
use weft_model::policy::{AppGuid, PolicyTag};

use super::answer::Listed;
use super::connection::{Cause, Connection};
use super::url::{ServerUrl, lists};

/// Of all answers to one question together.
const MOST_BYTES: usize = 64 << 20;
/// Security groups per page, as many as the Cloud Controller gives.
const PAGE: usize = 5000;
/// What the overlay's routers are called, as silk calls them.
const ROUTER: &str = "INGRESS_ROUTER";
/// Of what a server says about an error, so much is passed on.
const SAID: usize = 200;

/// Where the policy server is, and how to be let in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Server {
    pub url: ServerUrl,
    pub certificates: Files,
    /// For one request, its connection included.
    pub answers_within: Duration,
}

/// A request that has no answer.
#[derive(Debug, thiserror::Error)]
#[error("get {what} from {url}")]
pub struct AskError {
    pub what: &'static str,
    /// Without its query, which may be long.
    pub url: String,
    #[source]
    pub source: Cause,
}

/// One question's security groups.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Groups {
    /// In the server's order, each once.
    pub groups: Vec<SecurityGroup>,
    /// Groups that could not be read at all: why.
    pub skipped: BTreeSet<String>,
}

/// An answer, and in how many parts it came. Those of several may be of several moments.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Parts<T> {
    pub answer: T,
    pub parts: usize,
}

#[derive(Debug)]
pub struct Client {
    server: Server,
    /// Kept between questions.
    open: Mutex<Option<Connection>>,
}

impl Client {
    pub fn new(server: Server) -> Self {
        Self { server, open: Mutex::new(None) }
    }

    /// Those whose source or destination is one of `apps`. Those that contradict each other are in it still.
    pub async fn policies(&self, apps: &BTreeSet<AppGuid>) -> Result<Parts<Listed>, AskError> {
        let mut request = Request::new(self, "app-to-app policies", "policies");
        let query = "?id=";
        let lists = lists(apps.iter().map(AppGuid::as_str), request.path.len() + query.len());
        let mut answer = Listed::default();
        for list in &lists {
            let body = request.get(&format!("{query}{list}")).await?;
            answer.add(&body).map_err(|why| request.failed(Cause::Json(why)))?;
        }
        Ok(Parts { answer, parts: lists.len() })
    }

    pub async fn policies_last_updated(&self) -> Result<Stamp, AskError> {
        let mut request = Request::new(self, "when policies last changed", "policies_last_updated");
        let body = request.get("").await?;
        stamp(&body).map_err(|cause| request.failed(cause))
    }

    /// Those that are for every space, and those of `spaces`.
    pub async fn security_groups(&self, spaces: &BTreeSet<String>) -> Result<Parts<Groups>, AskError> {
        let mut request = Request::new(self, "security groups", "security_groups");
        // As long as the number of a row can be.
        let query = |from: u64| format!("?limit={PAGE}&from={from:020}&space_guids=");
        let mut lists = lists(spaces.iter().map(String::as_str), request.path.len() + query(0).len());
        if lists.is_empty() {
            lists.push(String::new());
        }
        let (mut answer, mut parts) = (Groups::default(), 0);
        for list in lists {
            let (mut listed, mut from) = (Vec::new(), 0);
            loop {
                let spaces = if list.is_empty() { String::new() } else { format!("&space_guids={list}") };
                let body = request.get(&format!("?limit={PAGE}&from={from}{spaces}")).await?;
                let page = group::parse(&body).map_err(|why| request.failed(Cause::Json(why)))?;
                parts += 1;
                listed.extend(page.groups);
                answer.skipped.extend(page.skipped);
                match page.next {
                    0 => break,
                    next if next > from => from = next,
                    next => return Err(request.failed(Cause::Circle { from, next })),
                }
            }
            answer.groups = group::merge(answer.groups, listed);
        }
        Ok(Parts { answer, parts })
    }

    /// None: the server is of a version that cannot tell.
    pub async fn security_groups_last_updated(&self) -> Result<Option<Stamp>, AskError> {
        let what = "when security groups last changed";
        let mut request = Request::new(self, what, "security_groups_last_updated");
        match request.get("").await {
            Ok(body) => stamp(&body).map(Some).map_err(|cause| request.failed(cause)),
            Err(AskError { source: Cause::Status { status: StatusCode::NOT_FOUND, .. }, .. }) => Ok(None),
            Err(error) => Err(error),
        }
    }

    /// The server gives them one if they have none yet.
    pub async fn router_tag(&self) -> Result<PolicyTag, AskError> {
        #[derive(Deserialize)]
        struct Answer {
            id: String,
            tag: String,
        }
        let mut request = Request::new(self, "the tag of the overlay's routers", "tags");
        let asked = json!({ "id": ROUTER, "type": "router" }).to_string();
        let body = request.send(&Method::PUT, "", &asked).await?;
        let answer: Answer = serde_json::from_slice(&body).map_err(|why| request.failed(Cause::Json(why)))?;
        let tag = answer.tag.parse().ok().filter(|_| answer.id == ROUTER);
        tag.ok_or_else(|| request.failed(Cause::NotATag(said(&body))))
    }

    async fn send(
        &self,
        method: &Method,
        path: &str,
        content: &str,
        limit: usize,
    ) -> Result<(StatusCode, Vec<u8>), Cause> {
        let Server { url, certificates, answers_within } = &self.server;
        let exchange = async {
            // Taken out, so that one that is given up half-way is not used again.
            let kept = self.open.lock().await.take().filter(|kept| kept.usable(certificates));
            if let Some(mut connection) = kept {
                match connection.send(url, method, path, content, limit).await {
                    // The server may end a connection that is idle just as it is used.
                    Err(Cause::Http(_)) => {}
                    answer => return answer.map(|answer| (connection, answer)),
                }
            }
            let mut connection = Connection::open(url, certificates).await?;
            let answer = connection.send(url, method, path, content, limit).await?;
            Ok((connection, answer))
        };
        let late = |_| Cause::Late(*answers_within);
        let (connection, answer) = tokio::time::timeout(*answers_within, exchange).await.map_err(late)??;
        *self.open.lock().await = Some(connection);
        Ok(answer)
    }
}

/// The requests of one question.
struct Request<'a> {
    client: &'a Client,
    what: &'static str,
    path: String,
    /// Of the bytes that the answers may have.
    left: usize,
}

impl<'a> Request<'a> {
    fn new(client: &'a Client, what: &'static str, name: &str) -> Self {
        // The server does not look at the version, and has one form only.
        Self { client, what, path: format!("/networking/v1/internal/{name}"), left: MOST_BYTES }
    }

    async fn get(&mut self, query: &str) -> Result<Vec<u8>, AskError> {
        self.send(&Method::GET, query, "").await
    }

    /// All requests may be sent again: none changes what an earlier one has changed.
    async fn send(&mut self, method: &Method, query: &str, content: &str) -> Result<Vec<u8>, AskError> {
        let path = format!("{}{query}", self.path);
        let answer = self.client.send(method, &path, content, self.left).await;
        let (status, body) = answer.map_err(|cause| self.failed(cause))?;
        if status != StatusCode::OK {
            return Err(self.failed(Cause::Status { status, said: said(&body) }));
        }
        self.left -= body.len();
        Ok(body)
    }

    fn failed(&self, source: Cause) -> AskError {
        AskError { what: self.what, url: format!("{}{}", self.client.server.url, self.path), source }
    }
}

fn stamp(body: &[u8]) -> Result<Stamp, Cause> {
    let number = str::from_utf8(body).ok().and_then(|text| text.trim().parse().ok());
    number.map(Stamp).ok_or_else(|| Cause::NotANumber(said(body)))
}

/// `{"error": "why"}`, or whatever else it is.
fn said(body: &[u8]) -> String {
    #[derive(Deserialize)]
    struct Said {
        error: String,
    }
    let text = match serde_json::from_slice(body) {
        Ok(Said { error }) => error,
        Err(_) => String::from_utf8_lossy(body).into_owned(),
    };
    text.trim().chars().take(SAID).collect()
}
