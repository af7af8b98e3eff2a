//! Operators' runbooks on a whole system: forced polls, the switch of the log of traffic between containers, and metrics,
//! each against real packets. docs/operating.md, docs/traffic-log.md.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_testbed::external_networker::{Container, ECHO_PORT, Request};
use weft_testbed::lab::Cell;
use weft_testbed::netns::Place;
use weft_testbed::policy_server::{Policy, PolicyServer, SecurityGroup};
use weft_testbed::prober::{self, Transfer};
use weft_testbed::{Lab, Options};

const WORLD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const PATIENCE: Duration = Duration::from_secs(30);
const HEALTH: u16 = 4105;
const FORCE: u16 = 8722;
const DEBUG: u16 = 8721;
const SINK: u16 = 9000;

/// Nobody polls by himself.
fn lab(purpose: &str, enabled: bool) -> Lab {
    lab_with(
        purpose,
        json!({"runbook_endpoints": if enabled { json!({"enabled": true}) } else { json!({}) }}),
        json!({}),
    )
}

fn lab_with(purpose: &str, properties: Value, plugin: Value) -> Lab {
    let mut options = Options::unique(purpose).unwrap();
    options.cells = 2;
    options.policy_server = true;
    let node = json!({
        "disable_container_network_policy": false,
        "policy_poll_interval_seconds": 3600,
        "asg_poll_interval_seconds": 3600,
    });
    options.node.extend(node.as_object().cloned().unwrap());
    options.node.extend(properties.as_object().cloned().unwrap());
    options.plugin.extend(plugin.as_object().cloned().unwrap());
    let lab = Lab::up(&options).unwrap();
    lab.tell_all_refusals().unwrap();
    lab
}

fn server(lab: &Lab) -> &PolicyServer {
    lab.policy_server.as_ref().unwrap()
}

fn added(cell: &Cell, handle: &str) -> Container {
    let container = cell.add(&Request::app(handle)).unwrap();
    cell.serve(&container).unwrap();
    container
}

fn policy(from: &str, to: &str) -> Policy {
    Policy::tcp(&format!("app-of-{from}"), &format!("app-of-{to}"), ECHO_PORT)
}

/// Whether a connection is taken; else it must be refused.
fn reaches(from: &Container, addr: Ipv4Addr, port: u16) -> bool {
    prober::opens(&from.place, addr, port).unwrap()
}

/// Status and body of a request on the cell's loopback.
fn http(place: &Place, port: u16, request: &str, body: &str) -> std::io::Result<(u16, String)> {
    let connect = || TcpStream::connect((Ipv4Addr::LOCALHOST, port));
    let mut stream = place.enter(connect).unwrap()?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "{request} HTTP/1.1\r\nHost: x\r\nContent-Length: {}\r\n\r\n{body}", body.len())?;
    let mut answer = String::new();
    stream.read_to_string(&mut answer)?;
    let (head, body) = answer.split_once("\r\n\r\n").unwrap();
    Ok((head.split(' ').nth(1).unwrap().parse().unwrap(), body.to_owned()))
}

fn get(cell: &Cell, port: u16, path: &str) -> (u16, String) {
    http(&cell.place, port, &format!("GET {path}"), "").unwrap()
}

fn force(cell: &Cell) {
    assert_eq!(get(cell, FORCE, "/force-policy-poll-cycle"), (200, String::new()));
}

fn switch(cell: &Cell, on: bool) {
    let body = format!(r#"{{"enabled":{on}}}"#);
    let answer = http(&cell.place, DEBUG, "PUT /iptables-c2c-logging", &body).unwrap();
    assert_eq!(answer, (200, format!("{body}\n")));
}

#[test]
fn a_forced_poll_is_in_force_when_it_answers() {
    let lab = lab("forced", true);
    let one = &lab.cells[0];
    let (a, b) = (added(one, "a"), added(one, "b"));
    // Whatever ADD has had fetched is over then.
    force(one);
    let near = policy("a", "b");
    server(&lab).change(|state| state.add_policies([near.clone()])).unwrap().unwrap();
    assert!(!reaches(&a, b.addr, ECHO_PORT), "nobody has polled");
    force(one);
    assert!(reaches(&a, b.addr, ECHO_PORT));
    server(&lab).change(|state| state.remove_policies([&near])).unwrap();
    assert!(reaches(&a, b.addr, ECHO_PORT), "nobody has polled");
    force(one);
    assert!(!reaches(&a, b.addr, ECHO_PORT));

    let open = lab.underlay.enter(|| TcpListener::bind(("0.0.0.0", 7001))).unwrap().unwrap();
    let rules = json!([{"protocol": "tcp", "destination": "10.0.0.0/24", "ports": "7001"}]);
    let group = SecurityGroup {
        running_space_guids: vec!["space".into()],
        ..SecurityGroup::named("group", &rules.to_string())
    };
    let groups = |handle: &str| get(one, FORCE, &format!("/force-asgs-for-container?container={handle}"));
    assert_eq!(groups("a").0, 200);
    server(&lab).change(|state| state.put_group(group)).unwrap();
    assert!(!reaches(&a, WORLD, 7001));
    assert_eq!(groups("a"), (200, "updated container a".into()));
    assert!(reaches(&a, WORLD, 7001));
    drop(open);

    server(&lab).stop();
    let (status, why) = get(one, FORCE, "/force-policy-poll-cycle");
    assert!(status == 500 && why.starts_with("failed to force policy poll cycle: get "), "{status} {why}");
    let cleaned = get(one, FORCE, "/force-orphaned-asgs-cleanup?container=a");
    assert_eq!(cleaned, (200, "cleaned up ASGs for container a".into()));

    // The level of the log, while it runs.
    let debug = || std::fs::read_to_string(&one.node.log).unwrap().contains(r#""level":"DEBUG""#);
    assert!(!debug());
    assert_eq!(http(&one.place, DEBUG, "POST /log-level", "debug").unwrap().0, 200);
    one.del("b").unwrap();
    assert!(debug());
    assert_eq!(lab.complaints(&["policy server"]), Vec::<String>::new());
}

#[test]
fn endpoints_are_absent_unless_they_are_enabled() {
    let lab = lab("absent", false);
    for port in [FORCE, DEBUG] {
        let refused = http(&lab.cells[0].place, port, "GET /log-level", "").unwrap_err();
        assert_eq!(refused.kind(), ErrorKind::ConnectionRefused);
    }
    assert_eq!(get(&lab.cells[0], HEALTH, "/health").0, 200);
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

/// Lines about traffic between containers: message, both apps, rule.
fn told(cell: &Cell) -> Vec<[String; 4]> {
    let text = std::fs::read_to_string(cell.traffic_log()).unwrap_or_default();
    let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let text = |value: &Value| value.as_str().unwrap_or("-").to_owned();
    let line = |line: Value| {
        let data = &line["data"];
        let message = text(&line["message"]).replace("cfnetworking.iptables.", "");
        [
            message,
            text(&data["source"]["app_guid"]),
            text(&data["destination"]["app_guid"]),
            text(&data["rule"]),
        ]
    };
    lines.map(line).collect()
}

/// Waits for as many lines, and looks once more.
fn expect(cell: &Cell, lines: &[[&str; 4]]) {
    let deadline = Instant::now() + PATIENCE;
    while told(cell).len() < lines.len() {
        assert!(Instant::now() < deadline, "{:?} instead of {lines:?}", told(cell));
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(told(cell), lines);
}

#[test]
fn traffic_between_containers_is_logged_from_the_next_connection_on() {
    let lab = lab("c2c", true);
    let (one, two) = (&lab.cells[0], &lab.cells[1]);
    let (a, b, c) = (added(one, "a"), added(one, "b"), added(two, "c"));
    let policies = [policy("a", "b"), policy("c", "b")];
    server(&lab).change(|state| state.add_policies(policies)).unwrap().unwrap();
    force(one);
    force(two);
    let talk = || {
        assert!(reaches(&a, b.addr, ECHO_PORT) && reaches(&c, b.addr, ECHO_PORT));
        assert!(!reaches(&c, a.addr, ECHO_PORT) && !reaches(&b, a.addr, ECHO_PORT));
        assert!(!reaches(&b, c.addr, ECHO_PORT), "it is the source of no policy");
    };
    talk();
    // What is established goes on throughout, and is told of by no line.
    let transfer = Transfer::start(&a.place, b.addr).unwrap();
    switch(one, true);
    talk();
    let lines = [
        ["ingress-allowed", "app-of-a", "app-of-b", "policy from app app-of-a to app app-of-b, tcp 8080"],
        ["ingress-allowed", "app-of-c", "app-of-b", "policy from app app-of-c to app app-of-b, tcp 8080"],
        ["ingress-denied", "app-of-c", "app-of-a", "no policy"],
        ["egress-denied", "app-of-b", "-", "source of no policy"],
    ];
    // Two denials to one container within a second: one of them is only counted.
    expect(one, &lines);
    switch(one, false);
    talk();
    switch(one, true);
    assert!(reaches(&a, b.addr, ECHO_PORT));
    let deadline = Instant::now() + PATIENCE;
    let allowed = || told(one).iter().filter(|line| line[0] == "ingress-allowed").count();
    while allowed() < 3 {
        assert!(Instant::now() < deadline, "{:?}", told(one));
        thread::sleep(Duration::from_millis(20));
    }
    assert_eq!(allowed(), 3, "nothing was told while it was off: {:?}", told(one));
    assert_eq!(get(one, DEBUG, "/iptables-c2c-logging"), (200, "{\"enabled\":true}\n".into()));
    transfer.stop().unwrap();
    one.kill_node().unwrap();
    one.start_node().unwrap();
    one.wait_ready(1, PATIENCE).unwrap();
    let after = get(one, DEBUG, "/iptables-c2c-logging");
    assert_eq!(after, (200, "{\"enabled\":false}\n".into()), "a restart begins with the configuration");
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

/// Datagrams that nobody answers are one connection each, as far as anybody can tell.
#[test]
fn udp_between_containers_has_so_many_lines_and_the_others_are_counted() {
    const SENT: u64 = 40;
    let on = json!({"iptables_c2c_logging": true, "runbook_endpoints": {"enabled": true}});
    let lab = lab_with("c2c-udp", on, json!({"iptables_accepted_udp_logs_per_sec": 1}));
    let one = &lab.cells[0];
    let (a, b) = (added(one, "a"), added(one, "b"));
    let udp = Policy { protocol: "udp".into(), ..Policy::tcp("app-of-a", "app-of-b", SINK) };
    server(&lab).change(|state| state.add_policies([udp])).unwrap().unwrap();
    force(one);
    let receiver = b.place.enter(|| UdpSocket::bind(("0.0.0.0", SINK))).unwrap().unwrap();
    receiver.set_read_timeout(Some(PATIENCE)).unwrap();
    let sender = a.place.enter(|| UdpSocket::bind(("0.0.0.0", 0))).unwrap().unwrap();
    for _ in 0..SENT {
        sender.send_to(b"x", (b.addr, SINK)).unwrap();
        receiver.recv(&mut [0; 9]).unwrap();
    }
    let of = |message: &str| {
        let text = std::fs::read_to_string(one.traffic_log()).unwrap_or_default();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        lines.filter(|line| line["message"] == format!("cfnetworking.iptables.{message}")).collect::<Vec<_>>()
    };
    let count = |line: &Value| {
        assert_eq!(line["data"]["suppressed"]["decision"], "allowed-c2c");
        line["data"]["suppressed"]["count"].as_u64().unwrap()
    };
    let sum = || {
        let lines = u64::try_from(of("ingress-allowed").len()).unwrap();
        (lines, lines + of("ingress-suppressed").iter().map(count).sum::<u64>())
    };
    let deadline = Instant::now() + 2 * PATIENCE;
    while sum().1 < SENT {
        assert!(Instant::now() < deadline, "{:?}", sum());
        thread::sleep(Duration::from_millis(100));
    }
    let (lines, all) = sum();
    assert!(all == SENT && (1..SENT / 2).contains(&lines), "{lines} lines, {all} in all");
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

/// The value of a metric with all of these labels.
fn metric(cell: &Cell, name: &str, labels: &[&str]) -> Option<f64> {
    let (status, text) = get(cell, HEALTH, "/metrics");
    assert_eq!(status, 200);
    let line = text.lines().find(|line| {
        let named = line.strip_prefix(name).is_some_and(|rest| rest.starts_with(['{', ' ']));
        named && labels.iter().all(|label| line.contains(label))
    })?;
    line.rsplit(' ').next()?.parse().ok()
}

/// Sends so many bytes to one who only takes them.
fn transfer(from: &Container, to: &Container, bytes: usize) {
    let sink = to.place.enter(|| TcpListener::bind(("0.0.0.0", SINK))).unwrap().unwrap();
    let taken = thread::spawn(move || std::io::copy(&mut sink.accept().unwrap().0, &mut std::io::sink()));
    let target = SocketAddrV4::new(to.addr, SINK);
    let mut stream = from.place.enter(|| TcpStream::connect(target)).unwrap().unwrap();
    stream.write_all(&vec![7; bytes]).unwrap();
    drop(stream);
    assert_eq!(taken.join().unwrap().unwrap(), u64::try_from(bytes).unwrap());
}

#[test]
fn metrics_count_what_containers_and_the_overlay_carry() {
    const BYTES: usize = 3_000_000;
    let lab = lab("metrics", true);
    let (one, two) = (&lab.cells[0], &lab.cells[1]);
    let (a, c) = (added(one, "a"), added(two, "c"));
    let idle = added(one, "idle");
    server(&lab)
        .change(|state| state.add_policies([Policy::tcp("app-of-a", "app-of-c", SINK)]))
        .unwrap()
        .unwrap();
    force(one);
    force(two);
    transfer(&a, &c, BYTES);
    let labels = |handle: &str, direction: &str| {
        let app = format!("app-of-{handle}");
        let labels =
            [("handle", handle), ("app", &app), ("space", "space"), ("org", "org"), ("direction", direction)];
        labels.map(|(label, value)| format!("{label}=\"{value}\""))
    };
    // Headers and acknowledgements are less than a tenth of full packets.
    let full = BYTES as f64..1.1 * BYTES as f64;
    let few = 100.0..0.1 * BYTES as f64;
    for (cell, handle, sent, received) in [(one, "a", &full, &few), (two, "c", &few, &full)] {
        for (direction, expected) in [("sent", sent), ("received", received)] {
            let labels = labels(handle, direction);
            let labels: Vec<&str> = labels.iter().map(String::as_str).collect();
            let bytes = metric(cell, "weft_node_container_bytes_total", &labels).unwrap();
            assert!(expected.contains(&bytes), "{handle} has {direction} {bytes} bytes");
            let packets = metric(cell, "weft_node_container_packets_total", &labels).unwrap();
            assert!((4.0..10_000.0).contains(&packets), "{handle} has {direction} {packets} packets");
            let overlay = metric(cell, "weft_node_overlay_bytes_total", &labels[4..]).unwrap();
            assert!(expected.contains(&overlay), "the overlay of {handle} has {direction} {overlay} bytes");
        }
    }
    let quiet = metric(one, "weft_node_container_bytes_total", &[r#"handle="idle""#, r#"direction="sent""#]);
    assert!(quiet.unwrap() < 10_000.0, "{quiet:?}");
    assert_eq!(metric(one, "weft_node_overlay_dropped_total", &[r#"direction="sent""#]), Some(0.0));

    let rules = one.place.run("nft", &["-j", "list", "table", "inet", "weft"], "").unwrap();
    let rules: Value = serde_json::from_str(&rules).unwrap();
    let rules = rules["nftables"].as_array().unwrap().iter().filter(|one| one.get("rule").is_some()).count();
    assert_eq!(metric(one, "weft_node_firewall_rules", &[]), Some(rules as f64));
    assert!(metric(one, "weft_node_firewall_elements", &[]).unwrap() > 10.0);
    assert_eq!(metric(one, "weft_node_containers", &[]), Some(2.0));

    let policies = [r#"subject="policies""#];
    assert!(metric(one, "weft_node_answer_age_seconds", &policies).unwrap() < 60.0);
    assert!(metric(one, "weft_node_poll_seconds_count", &policies).unwrap() >= 2.0);
    assert!(metric(one, "weft_node_apply_seconds_count", &policies).unwrap() >= 1.0);
    assert_eq!(metric(one, "weft_node_poll_failures_total", &policies), None);
    server(&lab).stop();
    assert_eq!(get(one, FORCE, "/force-policy-poll-cycle").0, 500);
    let refused = [r#"subject="policies""#, r#"kind="connect""#];
    assert_eq!(metric(one, "weft_node_poll_failures_total", &refused), Some(1.0));

    one.del("idle").unwrap();
    drop(idle);
    assert_eq!(metric(one, "weft_node_container_bytes_total", &[r#"handle="idle""#]), None);
    assert_eq!(lab.complaints(&["policy server"]), Vec::<String>::new());
}
