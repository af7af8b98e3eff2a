//! The endpoints of operators' runbooks: the answers that scripts made for silk's agent expect, byte for byte.

#![expect(clippy::unwrap_used, reason = "a failed step of a test is its failure")]

use std::net::{Ipv4Addr, SocketAddr};
use std::sync::{Arc, OnceLock};

use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::sync::mpsc;
use weft_daemon::http;
use weft_daemon::log::{self, Format, Level};
use weft_model::reason::Reason;
use weft_node::inbox::{Request, inbox};
use weft_node::policy_server::Forced;
use weft_node::runbook::Runbook;

/// The process has one log.
fn level() -> Arc<Level> {
    static LEVEL: OnceLock<Arc<Level>> = OnceLock::new();
    Arc::clone(LEVEL.get_or_init(|| Arc::new(log::init("info", Format::Json).unwrap())))
}

struct World {
    force: SocketAddr,
    debug: SocketAddr,
}

impl World {
    /// With a server that ends forced polls so; none: there is no server.
    async fn start(groups: bool, server: Option<Result<(), &'static str>>) -> Self {
        let (inbox, mut waiting) = inbox();
        tokio::spawn(async move {
            let mut on = false;
            while let Some(request) = waiting.next().await {
                let Request::LogC2c { set, reply } = request else { panic!("{request:?}") };
                on = set.unwrap_or(on);
                reply.send(Ok(on)).unwrap();
            }
        });
        let polls = server.map(|outcome| {
            let (polls, mut forced) = mpsc::channel(4);
            tokio::spawn(async move {
                while let Some(Forced { subject, reply }) = forced.recv().await {
                    let of = |why| format!("{subject:?}: {why}");
                    reply.send(outcome.map_err(of)).unwrap();
                }
            });
            polls
        });
        let (force, debug) = (bound().await, bound().await);
        let at = (force.local_addr().unwrap(), debug.local_addr().unwrap());
        tokio::spawn(Runbook { inbox, polls, groups, level: level() }.serve(force, debug));
        Self { force: at.0, debug: at.1 }
    }
}

async fn bound() -> tokio::net::TcpListener {
    http::bind((Ipv4Addr::LOCALHOST, 0).into()).await.unwrap()
}

/// Status and body.
async fn ask(to: SocketAddr, request: &str, body: &str) -> (u16, String) {
    let mut stream = TcpStream::connect(to).await.unwrap();
    let length = body.len();
    let request = format!("{request} HTTP/1.1\r\nHost: localhost\r\nContent-Length: {length}\r\n\r\n{body}");
    stream.write_all(request.as_bytes()).await.unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).await.unwrap();
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    assert!(head.contains("content-type: text/plain; charset=utf-8"), "{head}");
    (head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned())
}

fn answer(status: u16, body: &str) -> (u16, String) {
    (status, body.to_owned())
}

#[tokio::test]
async fn forced_polls() {
    const DISABLED: &str = "ASG syncing has been disabled administratively";
    let (good, bad) = (Some(Ok(())), Some(Err("away")));
    for (groups, server, request, status, body) in [
        (true, good, "GET /force-policy-poll-cycle", 200, ""),
        (true, good, "POST /force-policy-poll-cycle", 200, ""),
        (true, bad, "GET /force-policy-poll-cycle", 500, "failed to force policy poll cycle: Policies: away"),
        (true, good, "GET /force-asgs-for-container?container=h-1", 200, "updated container h-1"),
        (true, good, "GET /force-asgs-for-container?x=y&container=h-1", 200, "updated container h-1"),
        (true, good, "GET /force-asgs-for-container", 400, "no container specified"),
        (true, good, "GET /force-asgs-for-container?container=", 400, "no container specified"),
        (
            true,
            bad,
            "GET /force-asgs-for-container?container=h-1",
            500,
            "failed to update asgs for container h-1: Groups: away",
        ),
        (false, good, "GET /force-asgs-for-container?container=h-1", 405, DISABLED),
        (false, good, "GET /force-asgs-for-container", 405, DISABLED),
        (
            true,
            bad,
            "GET /force-orphaned-asgs-cleanup?container=h-1",
            200,
            "cleaned up ASGs for container h-1",
        ),
        (true, good, "GET /force-orphaned-asgs-cleanup", 400, "no container specified"),
        (false, good, "GET /force-orphaned-asgs-cleanup?container=h-1", 405, DISABLED),
        (true, good, "GET /iptables-c2c-logging", 404, "404 page not found\n"),
        (
            false,
            None,
            "GET /force-policy-poll-cycle",
            500,
            "failed to force policy poll cycle: no policy server is configured",
        ),
    ] {
        let world = World::start(groups, server).await;
        assert_eq!(ask(world.force, request, "").await, answer(status, body), "{request}");
    }
}

#[tokio::test]
async fn the_switch_of_the_log() {
    let world = World::start(true, None).await;
    let long = format!("{{\"enabled\":true,\"x\":\"{}\"}}", "x".repeat(5000));
    for (request, body, status, told) in [
        ("GET /iptables-c2c-logging", "", 200, "{\"enabled\":false}\n"),
        ("PUT /iptables-c2c-logging", r#"{"enabled":true}"#, 200, "{\"enabled\":true}\n"),
        ("GET /iptables-c2c-logging", "", 200, "{\"enabled\":true}\n"),
        ("POST /iptables-c2c-logging", r#"{"enabled":false}"#, 200, "{\"enabled\":true}\n"),
        ("PUT /iptables-c2c-logging", "enabled", 400, r#"{ "error": "decoding request body as json" }"#),
        (
            "PUT /iptables-c2c-logging",
            r#"{"enabled":1}"#,
            400,
            r#"{ "error": "decoding request body as json" }"#,
        ),
        ("PUT /iptables-c2c-logging", "{}", 400, r#"{ "error": "missing required key 'enabled'" }"#),
        ("PUT /iptables-c2c-logging", long.as_str(), 400, "Failed to read body\n"),
        ("GET /iptables-c2c-logging", "", 200, "{\"enabled\":true}\n"),
        ("GET /force-policy-poll-cycle", "", 404, "404 page not found\n"),
    ] {
        assert_eq!(ask(world.debug, request, body).await, answer(status, told), "{request} {body}");
    }
}

#[tokio::test]
async fn the_level_of_the_log() {
    let world = World::start(true, None).await;
    let enabled = || tracing::enabled!(tracing::Level::DEBUG);
    assert_eq!(ask(world.debug, "GET /log-level", "").await, answer(200, ""));
    for (given, debug) in [("debug", true), ("info", false), ("D", true), ("fatal", false), ("info\n", false)]
    {
        let told = answer(200, &format!("/log-level was invoked with Level: {}\n", given.trim()));
        assert_eq!(ask(world.debug, "POST /log-level", given).await, told);
        assert_eq!(enabled(), debug, "{given}");
    }
    let (status, why) = ask(world.debug, "PUT /log-level", "loud").await;
    assert!(status == 400 && why.starts_with("Invalid log level: log level `loud`"), "{why}");
}

/// The cell's refusal is told.
#[tokio::test]
async fn a_switch_that_the_kernel_refuses() {
    let (inbox, mut waiting) = inbox();
    tokio::spawn(async move {
        let Some(Request::LogC2c { reply, .. }) = waiting.next().await else { panic!("another request") };
        reply.send(Err(Reason::Busy)).unwrap();
    });
    let (force, debug) = (bound().await, bound().await);
    let at = debug.local_addr().unwrap();
    tokio::spawn(Runbook { inbox, polls: None, groups: true, level: level() }.serve(force, debug));
    let told = answer(500, &format!("{}\n", Reason::Busy));
    assert_eq!(ask(at, "PUT /iptables-c2c-logging", r#"{"enabled":true}"#).await, told);
}
