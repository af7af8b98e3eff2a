//! The policy server of the testbed against the protocol that it imitates, through a client that looks at bytes.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::fmt::Write as _;
use std::io::{self, Read, Write};
use std::net::TcpStream;
use std::sync::Arc;
use std::time::Duration;

use rustls::pki_types::pem::PemObject;
use rustls::pki_types::{CertificateDer, PrivateKeyDer, ServerName};
use rustls::{ClientConfig, ClientConnection, RootCertStore, StreamOwned, SupportedProtocolVersion, version};
use serde_json::{Value, json};
use weft_testbed::pki::{Authority, IdentityFiles};
use weft_testbed::policy_server::{Fault, NAME, Policy, PolicyServer, Route, SecurityGroup};
use weft_testbed::{Lab, Options};

type Stream = StreamOwned<ClientConnection, TcpStream>;

struct Reply {
    status: u16,
    head: String,
    body: String,
}

impl Reply {
    fn json(&self) -> Value {
        assert_eq!(self.status, 200, "{}", self.body);
        serde_json::from_str(&self.body).unwrap()
    }
}

/// A connection under the name that clients know the server by.
fn connect(
    server: &PolicyServer,
    identity: Option<&IdentityFiles>,
    version: &'static SupportedProtocolVersion,
) -> io::Result<Stream> {
    let mut roots = RootCertStore::empty();
    roots.add(CertificateDer::from_pem_file(&server.files.ca).unwrap()).unwrap();
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let config = ClientConfig::builder_with_provider(provider)
        .with_protocol_versions(&[version])
        .unwrap()
        .with_root_certificates(roots);
    let mut config = match identity {
        None => config.with_no_client_auth(),
        Some(files) => {
            let certificate = CertificateDer::from_pem_file(&files.certificate).unwrap();
            let key = PrivateKeyDer::from_pem_file(&files.key).unwrap();
            config.with_client_auth_cert(vec![certificate], key).unwrap()
        }
    };
    config.alpn_protocols = vec![b"h2".to_vec(), b"http/1.1".to_vec()];
    let name = ServerName::try_from(NAME).unwrap();
    let mut tls = ClientConnection::new(Arc::new(config), name).unwrap();
    let mut tcp = TcpStream::connect(server.address)?;
    tcp.set_read_timeout(Some(Duration::from_secs(60)))?;
    while tls.is_handshaking() {
        tls.complete_io(&mut tcp)?;
    }
    Ok(StreamOwned::new(tls, tcp))
}

fn client(server: &PolicyServer) -> io::Result<Stream> {
    connect(server, Some(&server.files.client), &version::TLS13)
}

fn request(stream: &mut Stream, method: &str, target: &str, body: &str) -> io::Result<Reply> {
    let length = body.len();
    write!(stream, "{method} {target} HTTP/1.1\r\nHost: {NAME}\r\nContent-Length: {length}\r\n\r\n{body}")?;
    stream.flush()?;
    read_reply(stream)
}

fn read_line(stream: &mut Stream) -> io::Result<String> {
    let (mut line, mut byte) = (Vec::new(), [0]);
    while !line.ends_with(b"\r\n") {
        stream.read_exact(&mut byte)?;
        line.push(byte[0]);
    }
    line.truncate(line.len() - 2);
    Ok(String::from_utf8(line).unwrap())
}

fn read_reply(stream: &mut Stream) -> io::Result<Reply> {
    let mut head = String::new();
    loop {
        let line = read_line(stream)?;
        if line.is_empty() {
            break;
        }
        writeln!(head, "{line}").unwrap();
    }
    let mut body = Vec::new();
    if head.contains("Transfer-Encoding: chunked") {
        loop {
            let length = usize::from_str_radix(&read_line(stream)?, 16).unwrap();
            let mut chunk = vec![0; length];
            stream.read_exact(&mut chunk)?;
            body.extend(chunk);
            assert_eq!(read_line(stream)?, "");
            if length == 0 {
                break;
            }
        }
    } else if let Some((_, rest)) = head.split_once("Content-Length: ") {
        body.resize(rest.lines().next().unwrap().parse().unwrap(), 0);
        stream.read_exact(&mut body)?;
    } else {
        stream.read_to_end(&mut body)?;
    }
    let status = head.split(' ').nth(1).unwrap().parse().unwrap();
    Ok(Reply { status, head, body: String::from_utf8(body).unwrap() })
}

fn get(server: &PolicyServer, rest: &str) -> Reply {
    request(&mut client(server).unwrap(), "GET", &format!("/networking/v1/internal/{rest}"), "").unwrap()
}

fn time(server: &PolicyServer, of: &str) -> u64 {
    get(server, &format!("{of}_last_updated")).body.parse().unwrap()
}

fn add(server: &PolicyServer, policies: &[Policy]) {
    server.change(|state| state.add_policies(policies.to_vec())).unwrap().unwrap();
}

fn pairs(list: &Value) -> Vec<(String, String)> {
    let text = |value: &Value| value["id"].as_str().unwrap().to_owned();
    let policies = list["policies"].as_array().unwrap();
    assert_eq!(list["total_policies"], policies.len());
    policies.iter().map(|policy| (text(&policy["source"]), text(&policy["destination"]))).collect()
}

#[test]
fn both_tls_versions_and_only_with_a_certificate_of_the_authority() {
    let server = PolicyServer::scratch().unwrap();
    for (version, suite) in [
        (&version::TLS12, "TLS_ECDHE_RSA_WITH_AES_128_GCM_SHA256"),
        (&version::TLS13, "TLS13_AES_128_GCM_SHA256"),
    ] {
        let mut stream = connect(&server, Some(&server.files.client), version).unwrap();
        let negotiated = stream.conn.negotiated_cipher_suite().unwrap().suite();
        assert_eq!(negotiated.as_str(), Some(suite));
        assert_eq!(stream.conn.alpn_protocol(), None);
        // One connection, several requests.
        for _ in 0..2 {
            let reply = request(&mut stream, "GET", "/networking/v1/internal/policies", "").unwrap();
            assert_eq!(reply.json(), json!({"total_policies": 0, "policies": []}));
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let strange =
        Authority::new("scratch").unwrap().node().unwrap().write(directory.path(), "strange").unwrap();
    for identity in [None, Some(&strange)] {
        for version in [&version::TLS12, &version::TLS13] {
            let refused = connect(&server, identity, version)
                .and_then(|mut stream| request(&mut stream, "GET", "/networking/v1/internal/policies", ""));
            assert!(refused.is_err(), "{identity:?} {version:?}");
        }
    }
    assert_eq!(server.asked(Route::Policies), 4);
}

#[test]
fn routes_headers_and_refusals() {
    let server = PolicyServer::scratch().unwrap();
    let mut stream = client(&server).unwrap();
    let mut ask =
        |method: &str, target: &str, body: &str| request(&mut stream, method, target, body).unwrap();
    for version in ["v0", "v1", "v9"] {
        let reply = ask("GET", &format!("/networking/{version}/internal/policies_last_updated"), "");
        assert_eq!(reply.status, 200);
        assert!(reply.head.contains("Content-Type: text/plain; charset=utf-8\n"), "{}", reply.head);
        assert!(reply.head.contains("X-Vcap-Request-Id: "), "{}", reply.head);
        assert!(reply.head.contains("Strict-Transport-Security: max-age=31536000\n"), "{}", reply.head);
        assert!(reply.body.parse::<u64>().unwrap() > 1_700_000_000_000_000_000, "{}", reply.body);
    }
    for (method, target, status, body) in [
        ("GET", "/", 404, "404 page not found\n"),
        ("GET", "/networking/v1/external/policies", 404, "404 page not found\n"),
        ("GET", "/networking/v1/internal/policies/", 404, "404 page not found\n"),
        ("PUT", "/networking/v0/internal/tags", 404, "404 page not found\n"),
        ("GET", "/networking/v1/internal/tags", 405, "Method Not Allowed\n"),
        ("POST", "/networking/v1/internal/policies", 405, "Method Not Allowed\n"),
        (
            "GET",
            "/networking/v1/internal/security_groups?limit=x",
            500,
            r#"{"error": "invalid value for 'limit' parameter"}"#,
        ),
        ("PUT", "/networking/v1/internal/tags", 400, r#"{"error": "failed parsing request body"}"#),
    ] {
        let reply = ask(method, target, "");
        assert_eq!((reply.status, reply.body.as_str()), (status, body), "{method} {target}");
    }
    let tags = "/networking/v1/internal/tags";
    let router = ask("PUT", tags, r#"{"ID": "INGRESS_ROUTER", "Type": "router"}"#);
    assert_eq!(router.json(), json!({"id": "INGRESS_ROUTER", "tag": "0001", "type": "router"}));
    let other = ask("PUT", tags, r#"{"id": "INGRESS_ROUTER", "type": "app"}"#);
    assert_eq!((other.status, other.body.as_str()), (500, r#"{"error": "database create failed"}"#));
    assert_eq!(ask("PUT", tags, "{}").json(), json!({"id": "", "tag": "0002", "type": ""}));
    // What is no HTTP/1.1 is refused, and ends the connection.
    write!(stream, "PRI * HTTP/2.0\r\n\r\n").unwrap();
    assert_eq!(read_reply(&mut stream).unwrap().status, 400);
    assert_eq!(stream.read(&mut [0]).unwrap(), 0);
}

#[test]
fn a_freed_tag_is_the_next_one_given() {
    let server = PolicyServer::scratch().unwrap();
    let [ab, cd] = [Policy::tcp("a", "b", 1), Policy::tcp("c", "d", 2)];
    add(&server, &[ab.clone(), cd.clone(), Policy::tcp("a", "d", 3)]);
    let tag = |app: &str| server.change(|state| state.tag(app)).unwrap();
    let tags = || ["a", "b", "c", "d", "e"].map(|app| tag(app).unwrap_or_default());
    assert_eq!(tags(), ["0001", "0002", "0003", "0004", ""]);
    let before = time(&server, "policies");
    server.change(|state| state.remove_policies([&ab, &cd])).unwrap();
    assert!(time(&server, "policies") > before);
    // Those that another policy uses stay.
    assert_eq!(tags(), ["0001", "", "", "0004", ""]);
    add(&server, &[Policy::tcp("e", "a", 4)]);
    assert_eq!(tags(), ["0001", "", "", "0004", "0002"]);
    assert_eq!(
        get(&server, "policies?id=e").json()["policies"][0],
        json!({
            "source": {"id": "e", "tag": "0002"},
            "destination": {"id": "a", "tag": "0001", "protocol": "tcp", "ports": {"start": 4, "end": 4}},
        })
    );
}

#[test]
fn tags_run_out_and_nothing_is_added() {
    let server = PolicyServer::scratch().unwrap();
    let to_self = |number: u32| {
        let app = format!("app-{number}");
        Policy::tcp(&app, &app, 8080)
    };
    add(&server, &(1..=0xffff).map(to_self).collect::<Vec<_>>());
    let refused = server.change(|state| state.add_policies([to_self(1), to_self(0)])).unwrap();
    assert!(refused.unwrap_err().to_string().contains("1 more tags are needed, 0 are free"));
    let last = server.change(|state| (state.tag("app-65535"), state.tag("app-0"))).unwrap();
    assert_eq!(last, (Some("FFFF".to_owned()), None));
}

#[test]
fn the_filter_is_source_or_destination() {
    let server = PolicyServer::scratch().unwrap();
    add(&server, &[Policy::tcp("a", "b", 1), Policy::tcp("b", "c", 2), Policy::tcp("c c", "d", 3)]);
    let listed = |query: &str| {
        let pairs = pairs(&get(&server, &format!("policies{query}")).json());
        pairs.iter().map(|(from, to)| format!("{from}>{to}")).collect::<Vec<_>>().join(" ")
    };
    for (query, expected) in [
        ("", "a>b b>c c c>d"),
        ("?other=b", "a>b b>c c c>d"),
        ("?id=", ""),
        ("?id=none", ""),
        ("?id=b", "a>b b>c"),
        ("?id=c,space,a", "a>b b>c"),
        ("?id=c%20c", "c c>d"),
        ("?id=d%2Ca", "a>b c c>d"),
        ("?id=a&id=d", "a>b"),
    ] {
        assert_eq!(listed(query), expected, "{query}");
    }
    assert_eq!(server.last_query(Route::Policies).unwrap(), "id=a&id=d");
    assert_eq!((server.asked(Route::Policies), server.asked(Route::SecurityGroups)), (9, 0));
}

#[test]
fn sixty_thousand_policies_are_listed_whole_and_by_app() {
    let server = PolicyServer::scratch().unwrap();
    let app = |number: u32| format!("{:08x}-0000-4000-8000-000000000000", number % 20_000);
    let policies = (0..60_000).map(|number| {
        Policy::tcp(&app(number), &app(number * 7 + 1), u16::try_from(8000 + number / 20_000).unwrap())
    });
    add(&server, &policies.collect::<Vec<_>>());
    let mut stream = client(&server).unwrap();
    let mut list = |query: &str| {
        let target = format!("/networking/v1/internal/policies{query}");
        request(&mut stream, "GET", &target, "").unwrap()
    };
    let all = list("");
    assert!(all.head.contains("Transfer-Encoding: chunked\n"), "{}", all.head);
    assert_eq!(all.json()["total_policies"], 60_000);
    for number in 0..100 {
        let own = pairs(&list(&format!("?id={}", app(number))).json());
        // 7 has an inverse modulo 20,000: each app is source and destination of three.
        assert!(own.len() == 6 || own.len() == 3, "{own:?}");
        assert!(own.iter().all(|(from, to)| *from == app(number) || *to == app(number)), "{own:?}");
    }
}

#[test]
fn security_groups_by_space_and_page() {
    let server = PolicyServer::scratch().unwrap();
    let before = time(&server, "security_groups");
    let rules = r#"[{"protocol":"tcp","destination":"10.0.0.0/8","ports":"80, 443","log":true}]"#;
    server
        .change(|state| {
            let staging = SecurityGroup { staging_default: true, ..SecurityGroup::named("staging", rules) };
            let running = SecurityGroup { running_default: true, ..SecurityGroup::named("running", "[{") };
            for group in
                [staging, running, SecurityGroup::named("one", rules), SecurityGroup::named("two", rules)]
            {
                state.put_group(group);
            }
            assert!(state.change_group("one", |group| group.staging_space_guids.push("s1".to_owned())));
            assert!(state.change_group("two", |group| group.running_space_guids.push("s2".to_owned())));
            assert!(!state.change_group("three", |_| ()));
        })
        .unwrap();
    assert!(time(&server, "security_groups") > before);
    let page = |query: &str| {
        let page = get(&server, &format!("security_groups{query}")).json();
        let guids = page["security_groups"].as_array().unwrap().iter();
        let guids: Vec<_> = guids.map(|group| group["guid"].as_str().unwrap().to_owned()).collect();
        (guids.join(" "), page["next"].as_u64().unwrap())
    };
    assert_eq!(page(""), ("staging running".to_owned(), 0));
    assert_eq!(page("?space_guids=s2"), ("staging running two".to_owned(), 0));
    // What agents of today send is no limit.
    assert_eq!(page("?space_guids=s1,s2&per_page=1"), ("staging running one two".to_owned(), 0));
    assert_eq!(page("?space_guids=s2&limit=1"), ("staging".to_owned(), 2));
    assert_eq!(page("?space_guids=s2&limit=2"), ("staging running".to_owned(), 4));
    assert_eq!(page("?space_guids=s2&limit=2&from=4"), ("two".to_owned(), 0));
    assert_eq!(page("?space_guids=s2&limit=3"), ("staging running two".to_owned(), 0));
    let list = get(&server, "security_groups?space_guids=s2").json();
    // Rules are a text, even if it is none that anybody can read.
    assert_eq!(list["security_groups"][1]["rules"], "[{");
    assert_eq!(
        list["security_groups"][2],
        json!({
            "guid": "two", "name": "two", "rules": rules, "staging_default": false, "running_default": false,
            "staging_space_guids": [], "running_space_guids": ["s2"],
        })
    );
    server.change(|state| state.remove_group("running")).unwrap();
    assert_eq!(page("?limit=1"), ("staging".to_owned(), 0));
    server.change(|state| state.security_groups_last_updated = None).unwrap();
    let old = get(&server, "security_groups_last_updated");
    assert_eq!((old.status, old.body.as_str()), (404, "404 page not found\n"));
}

#[test]
fn faults_of_one_route_and_of_all() {
    let server = PolicyServer::scratch().unwrap();
    add(&server, &[Policy::tcp("a", "b", 1)]);
    let ask = || {
        let mut stream = client(&server).unwrap();
        request(&mut stream, "GET", "/networking/v1/internal/policies", "")
    };
    let good = ask().unwrap().body;
    server.set_fault(Route::Policies, Fault::Error);
    let reply = ask().unwrap();
    assert_eq!((reply.status, reply.body.as_str()), (500, r#"{"error": "database read failed"}"#));
    assert_eq!(get(&server, "policies_last_updated").status, 200);
    server.set_fault(Route::Policies, Fault::EmptyError);
    let reply = ask().unwrap();
    assert_eq!((reply.status, reply.body.as_str()), (500, r#"{"total_policies":0,"policies":[]}"#));
    server.set_fault_everywhere(Fault::Garbage);
    let reply = ask().unwrap();
    assert!(reply.status == 200 && serde_json::from_str::<Value>(&reply.body).is_err());
    assert!(get(&server, "security_groups_last_updated").body.parse::<u64>().is_err());
    for fault in [Fault::Truncated, Fault::DropInHeaders] {
        server.set_fault(Route::Policies, fault);
        let cut = ask().err().unwrap();
        assert_eq!(cut.kind(), io::ErrorKind::UnexpectedEof, "{fault:?}: {cut}");
    }
    server.set_fault_everywhere(None);
    assert_eq!(ask().unwrap().body, good);
    assert_eq!(server.asked(Route::Policies), 7);
}

#[test]
fn a_slow_route_holds_up_no_other() {
    let server = PolicyServer::scratch().unwrap();
    server.set_fault(Route::Policies, Fault::Slow(Duration::from_hours(1)));
    let mut slow = client(&server).unwrap();
    write!(slow, "GET /networking/v1/internal/policies HTTP/1.1\r\nHost: {NAME}\r\n\r\n").unwrap();
    while server.asked(Route::Policies) == 0 {
        std::thread::yield_now();
    }
    assert_eq!(get(&server, "policies_last_updated").status, 200);
    // It ends with the server.
    server.stop();
    assert!(slow.read(&mut [0]).is_err());
    server.start().unwrap();
    server.set_fault(Route::Policies, Fault::Slow(Duration::from_millis(1)));
    assert_eq!(get(&server, "policies").status, 200);
}

#[test]
fn stopped_it_refuses_and_started_again_it_knows_what_it_knew() {
    let server = PolicyServer::scratch().unwrap();
    add(&server, &[Policy::tcp("a", "b", 1)]);
    let (list, last_updated) = (get(&server, "policies").body, time(&server, "policies"));
    for _ in 0..2 {
        server.stop();
        assert_eq!(client(&server).err().unwrap().kind(), io::ErrorKind::ConnectionRefused);
        server.start().unwrap();
        assert_eq!(get(&server, "policies").body, list);
        assert_eq!(time(&server, "policies"), last_updated);
    }
}

#[test]
fn the_clock_goes_back_with_the_next_change() {
    let server = PolicyServer::scratch().unwrap();
    let before = time(&server, "policies");
    server.change(|state| state.set_clock_back(Duration::from_hours(1))).unwrap();
    assert_eq!(time(&server, "policies"), before);
    add(&server, &[Policy::tcp("a", "b", 1)]);
    let back = time(&server, "policies");
    assert!(back < before, "{back} {before}");
    server.change(|state| state.policies_last_updated = 7).unwrap();
    assert_eq!(time(&server, "policies"), 7);
}

#[test]
fn in_a_lab_cells_reach_it_on_the_underlay() {
    let mut options = Options::unique("policy").unwrap();
    (options.cells, options.policy_server) = (1, true);
    let lab = Lab::up(&options).unwrap();
    let server = lab.policy_server.as_ref().unwrap();
    assert_eq!(server.url(), "https://10.0.0.2:4003");
    let asked = lab.cells[0].place.enter(|| get(server, "policies_last_updated").status).unwrap();
    assert_eq!(asked, 200);
    lab.down().unwrap();
}
