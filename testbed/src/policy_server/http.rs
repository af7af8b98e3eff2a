//! One connection: HTTP/1.1 by hand, because faults need bytes that no library would send.

use std::io::{self, ErrorKind};
use std::sync::Arc;

use serde_json::{Value, json};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufStream};

use super::{Fault, Route, Served, State};

/// What Go's server takes of a request's head: 1 MiB, and some slack.
const LONGEST_HEAD: usize = (1 << 20) + 4096;
/// A longer answer is sent in chunks, as Go does where a handler names no length.
const LONGEST_WHOLE: usize = 2048;

#[derive(Debug, PartialEq, Eq)]
struct Head {
    method: String,
    path: String,
    query: String,
    length: usize,
    close: bool,
}

/// What is answered, before any fault.
struct Answer {
    status: &'static str,
    body: String,
}

/// Answers requests until the client leaves, or a fault ends the connection.
pub(super) async fn serve(
    stream: impl AsyncRead + AsyncWrite + Unpin,
    served: &Arc<Served>,
) -> io::Result<()> {
    let mut stream = BufStream::new(stream);
    while let Some(text) = read_head(&mut stream).await? {
        let Some(head) = parse(&text) else {
            send(&mut stream, 0, &Answer::new("400 Bad Request", "400 Bad Request")).await?;
            return stream.shutdown().await;
        };
        let mut body = vec![0; head.length];
        stream.read_exact(&mut body).await?;
        let route = route(&head.method, &head.path);
        let known = route.as_ref().ok().copied();
        let (number, fault) = served.note(known, &head.query);
        let mut answer = match route {
            Ok(route) => served.with(|state| answer(state, route, &head.query, &body)),
            Err(refusal) => refusal,
        };
        if let Some(route) = known {
            served.note_answer(route, &answer.body);
        }
        match fault {
            None => {}
            Some(Fault::Slow(delay)) => tokio::time::sleep(delay).await,
            Some(Fault::Error) => answer = error("database read failed"),
            Some(Fault::Garbage) => answer.body = "<html>Bad gateway</html>".to_owned(),
            Some(Fault::EmptyError) => {
                answer = error("");
                answer.body = match known {
                    Some(Route::Policies) => r#"{"total_policies":0,"policies":[]}"#,
                    Some(Route::SecurityGroups) => r#"{"next":0,"security_groups":[]}"#,
                    _ => "0",
                }
                .to_owned();
            }
            Some(Fault::Truncated) => {
                let head = format!("{}Content-Length: {}\r\n\r\n", start(number, &answer), answer.body.len());
                let half = &answer.body.as_bytes()[..answer.body.len() / 2];
                stream.write_all(&[head.as_bytes(), half].concat()).await?;
                return stream.flush().await;
            }
            Some(Fault::DropInHeaders) => {
                let head = start(number, &answer);
                stream.write_all(&head.as_bytes()[..head.len() / 2]).await?;
                return stream.flush().await;
            }
        }
        send(&mut stream, number, &answer).await?;
        if head.close {
            return stream.shutdown().await;
        }
    }
    Ok(())
}

impl Answer {
    fn new(status: &'static str, body: impl Into<String>) -> Self {
        Self { status, body: body.into() }
    }
}

fn error(description: &str) -> Answer {
    Answer::new("500 Internal Server Error", format!(r#"{{"error": "{description}"}}"#))
}

/// Which route it is, or the refusal.
fn route(method: &str, path: &str) -> Result<Route, Answer> {
    let parts: Vec<&str> = path.split('/').collect();
    let ["", "networking", version, "internal", name] = parts[..] else {
        return Err(Answer::new("404 Not Found", "404 page not found\n"));
    };
    // Only the one that is written to has a version; in the others any text will do.
    let (expected, route) = match name {
        _ if version.is_empty() => ("", None),
        "policies" => ("GET", Some(Route::Policies)),
        "policies_last_updated" => ("GET", Some(Route::PoliciesLastUpdated)),
        "security_groups" => ("GET", Some(Route::SecurityGroups)),
        "security_groups_last_updated" => ("GET", Some(Route::SecurityGroupsLastUpdated)),
        "tags" if version == "v1" => ("PUT", Some(Route::Tags)),
        _ => ("", None),
    };
    match route {
        None => Err(Answer::new("404 Not Found", "404 page not found\n")),
        Some(_) if method != expected => Err(Answer::new("405 Method Not Allowed", "Method Not Allowed\n")),
        Some(route) => Ok(route),
    }
}

fn answer(state: &mut State, route: Route, query: &str, body: &[u8]) -> Answer {
    let ok = |text: String| Answer::new("200 OK", text);
    match route {
        Route::Policies => ok(state.policies_text(param(query, "id").as_deref())),
        Route::PoliciesLastUpdated => ok(state.policies_last_updated.to_string()),
        Route::SecurityGroupsLastUpdated => match state.security_groups_last_updated {
            Some(time) => ok(time.to_string()),
            None => Answer::new("404 Not Found", "404 page not found\n"),
        },
        Route::SecurityGroups => {
            let number = |name: &str| match param(query, name).filter(|text| !text.is_empty()) {
                None => Ok(0),
                Some(text) => {
                    text.parse().map_err(|_| error(&format!("invalid value for '{name}' parameter")))
                }
            };
            let page = number("limit").and_then(|limit| Ok((limit, number("from")?)));
            let spaces = param(query, "space_guids").unwrap_or_default();
            page.map_or_else(
                |refusal| refusal,
                |(limit, from)| {
                    ok(state.groups_text(&spaces, usize::try_from(limit).unwrap_or(usize::MAX), from))
                },
            )
        }
        Route::Tags => {
            let Ok(Value::Object(request)) = serde_json::from_slice(body) else {
                return Answer::new("400 Bad Request", r#"{"error": "failed parsing request body"}"#);
            };
            // Keys in any case, as Go reads them.
            let field = |name: &str| {
                let found = request.iter().find(|(key, _)| key.eq_ignore_ascii_case(name));
                found.and_then(|(_, value)| value.as_str()).unwrap_or_default().to_owned()
            };
            let (id, kind) = (field("id"), field("type"));
            state.allocate_tag(&id, &kind).map_or_else(
                |_| error("database create failed"),
                |tag| ok(json!({"id": id, "tag": tag, "type": kind}).to_string()),
            )
        }
    }
}

/// The first value of a parameter, decoded.
fn param(query: &str, name: &str) -> Option<String> {
    let mut pairs = query.split('&').map(|pair| pair.split_once('=').unwrap_or((pair, "")));
    let (_, value) = pairs.find(|(key, _)| *key == name)?;
    let mut bytes = Vec::with_capacity(value.len());
    let mut rest = value.as_bytes();
    while let Some((&first, others)) = rest.split_first() {
        let hex = others.get(..2).and_then(|two| std::str::from_utf8(two).ok());
        let decoded = hex.and_then(|two| u8::from_str_radix(two, 16).ok());
        let (byte, after) = match (first, decoded) {
            (b'%', Some(byte)) => (byte, &others[2..]),
            (b'+', _) => (b' ', others),
            _ => (first, others),
        };
        rest = after;
        bytes.push(byte);
    }
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// Up to the empty line; `None` if the client has left.
async fn read_head(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<String>> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        match stream.read_u8().await {
            Ok(byte) => head.push(byte),
            Err(error) if error.kind() == ErrorKind::UnexpectedEof && head.is_empty() => return Ok(None),
            Err(error) => return Err(error),
        }
        if head.len() > LONGEST_HEAD {
            return Ok(Some(String::new()));
        }
    }
    String::from_utf8(head).map(Some).map_err(|error| io::Error::new(ErrorKind::InvalidData, error))
}

/// `None` is a bad request: another protocol, no `Host`, or a body whose length is not said.
fn parse(text: &str) -> Option<Head> {
    let mut lines = text.split("\r\n");
    let request: Vec<&str> = lines.next()?.split(' ').collect();
    let [method, target, "HTTP/1.1"] = request[..] else { return None };
    let headers: Vec<(&str, &str)> =
        lines.filter(|line| !line.is_empty()).map(|line| line.split_once(':')).collect::<Option<_>>()?;
    let header = |name: &str| {
        headers.iter().find(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value.trim())
    };
    header("host")?;
    if header("transfer-encoding").is_some() {
        return None;
    }
    let (path, query) = target.split_once('?').unwrap_or((target, ""));
    let length =
        header("content-length").unwrap_or("0").parse().ok().filter(|length| *length <= LONGEST_HEAD)?;
    let close = header("connection").is_some_and(|value| value.eq_ignore_ascii_case("close"));
    Some(Head { method: method.to_owned(), path: path.to_owned(), query: query.to_owned(), length, close })
}

/// The status line and the headers that every answer has.
fn start(number: u64, answer: &Answer) -> String {
    format!(
        "HTTP/1.1 {}\r\nContent-Type: text/plain; charset=utf-8\r\n\
         Strict-Transport-Security: max-age=31536000\r\n\
         X-Vcap-Request-Id: 00000000-0000-4000-8000-{number:012x}\r\n",
        answer.status
    )
}

async fn send(stream: &mut (impl AsyncWrite + Unpin), number: u64, answer: &Answer) -> io::Result<()> {
    let (start, length) = (start(number, answer), answer.body.len());
    let text = if length > LONGEST_WHOLE {
        format!("{start}Transfer-Encoding: chunked\r\n\r\n{length:x}\r\n{}\r\n0\r\n\r\n", answer.body)
    } else {
        format!("{start}Content-Length: {length}\r\n\r\n{}", answer.body)
    };
    stream.write_all(text.as_bytes()).await?;
    stream.flush().await
}
