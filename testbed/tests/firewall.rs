//! The firewall from the platform's side: what the CNI call asks for is what packets meet, whatever the node goes through.
//! Each test names its paragraph of docs/dataplane.md.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_testbed::external_networker::{Container, ECHO_PORT, Request};
use weft_testbed::lab::Cell;
use weft_testbed::netns::Place;
use weft_testbed::{Lab, Options, prober};

/// The machine that all cells' underlay devices lead to: the world, for containers.
const WORLD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const OPEN_PORT: u16 = 7001;
const CLOSED_PORT: u16 = 7002;
const PATIENCE: Duration = Duration::from_secs(30);

/// Cells whose containers reach each other by policies only, of which there are none.
fn lab(purpose: &str, more: impl FnOnce(&mut Options)) -> Lab {
    let mut options = Options::unique(purpose).unwrap();
    options.node.insert("disable_container_network_policy".into(), false.into());
    more(&mut options);
    let lab = Lab::up(&options).unwrap();
    lab.tell_all_refusals().unwrap();
    lab
}

fn rule(protocol: u8, first: &str, last: &str, ports: (u16, u16)) -> Value {
    json!({
        "protocol": protocol,
        "networks": [{"start": first, "end": last}],
        "ports": [{"start": ports.0, "end": ports.1}],
    })
}

/// Lets a container reach the world on one port.
fn asks(handle: &str) -> Request {
    Request {
        net_out_rules: json!([rule(1, "10.0.0.1", "10.0.0.1", (OPEN_PORT, OPEN_PORT))]),
        ..Request::app(handle)
    }
}

fn added(cell: &Cell, request: &Request) -> Container {
    let container = cell.add(request).unwrap();
    cell.serve(&container).unwrap();
    container
}

#[derive(Debug, PartialEq, Eq)]
enum Seen {
    Open,
    Refused,
    Silent,
}

fn connect(from: &Place, addr: Ipv4Addr, port: u16) -> Seen {
    let to = SocketAddrV4::new(addr, port).into();
    match from.enter(|| TcpStream::connect_timeout(&to, Duration::from_secs(3))).unwrap() {
        Ok(_) => Seen::Open,
        Err(refused) if refused.kind() == ErrorKind::ConnectionRefused => Seen::Refused,
        Err(silent) if silent.kind() == ErrorKind::TimedOut => Seen::Silent,
        Err(other) => panic!("connect to {addr}:{port}: {other}"),
    }
}

/// Counts connections to a port of a place, for as long as it lives. Each is taken and closed.
struct Counter {
    taken: Arc<AtomicUsize>,
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Counter {
    fn at(place: &Place, port: u16) -> Self {
        let listener = place.enter(|| TcpListener::bind(("0.0.0.0", port))).unwrap().unwrap();
        listener.set_nonblocking(true).unwrap();
        let (taken, stop) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicBool::new(false)));
        let (count, stopped) = (Arc::clone(&taken), Arc::clone(&stop));
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                match listener.accept() {
                    Ok(_) => drop(count.fetch_add(1, Ordering::Relaxed)),
                    Err(_) => thread::sleep(Duration::from_millis(1)),
                }
            }
        });
        Self { taken, stop, thread: Some(thread) }
    }

    fn count(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }

    /// Waits for so many: connections are taken a moment after they are made.
    fn reaches(&self, count: usize) {
        let deadline = Instant::now() + PATIENCE;
        while self.count() < count {
            assert!(Instant::now() < deadline, "{} of {count} connections", self.count());
            thread::sleep(Duration::from_millis(1));
        }
        assert_eq!(self.count(), count);
    }
}

impl Drop for Counter {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(thread::JoinHandle::join));
    }
}

/// SYNs to two ports of the world, one allowed and one forbidden, as fast as they can be sent, until it is dropped.
struct Flood {
    stop: Arc<AtomicBool>,
    thread: Option<thread::JoinHandle<()>>,
}

impl Flood {
    fn from(container: &Container) -> Self {
        let stop = Arc::new(AtomicBool::new(false));
        let (stopped, place) = (Arc::clone(&stop), container.place.clone());
        let thread = thread::spawn(move || {
            place.move_thread().unwrap();
            let mut n = 0_u32;
            while !stopped.load(Ordering::Relaxed) {
                // Mostly the forbidden one; whatever comes of it is counted at the other end.
                let port = if n.is_multiple_of(16) { OPEN_PORT } else { CLOSED_PORT };
                let to = SocketAddrV4::new(WORLD, port).into();
                drop(TcpStream::connect_timeout(&to, Duration::from_millis(20)));
                n = n.wrapping_add(1);
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Flood {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(thread::JoinHandle::join));
    }
}

/// What the node at a cell says of a connection: the verdict, and the exit status.
fn explain(cell: &Cell, from: &str, to: &str) -> (Value, Option<i32>) {
    let programs = weft_testbed::lab::programs().unwrap();
    let output = Command::new(programs.join("weft-node"))
        .args(["explain", "--json", "--from", from, "--to", to, "--socket"])
        .arg(&cell.socket)
        .output()
        .unwrap();
    let answer = serde_json::from_slice(&output.stdout);
    (answer.unwrap_or_else(|_| panic!("{}", String::from_utf8_lossy(&output.stderr))), output.status.code())
}

/// "To the world", "To a mapped port", "To a container", "To the cell".
#[test]
fn what_garden_asks_for_is_what_packets_meet() {
    let lab = lab("asked-for", |options| options.cells = 2);
    let (one, two) = (&lab.cells[0], &lab.cells[1]);
    let mapped = json!([{"host_port": 61000, "container_port": ECHO_PORT}]);
    let server = added(one, &Request { port_mappings: mapped, ..Request::app("server") });
    let client = added(one, &asks("client"));
    let remote = added(two, &asks("remote"));
    let open = Counter::at(&lab.underlay, OPEN_PORT);
    let closed = Counter::at(&lab.underlay, CLOSED_PORT);
    let cells = Counter::at(&one.place, 2222);

    for (what, from, addr, port, expected) in [
        ("a security group", &client.place, WORLD, OPEN_PORT, Seen::Open),
        ("no security group", &client.place, WORLD, CLOSED_PORT, Seen::Refused),
        ("none at all", &server.place, WORLD, OPEN_PORT, Seen::Refused),
        ("a neighbour, no policy", &client.place, server.addr, ECHO_PORT, Seen::Refused),
        ("another cell's container", &remote.place, server.addr, ECHO_PORT, Seen::Refused),
        ("a mapped port from outside", &lab.underlay, one.underlay, 61000, Seen::Open),
        ("an unmapped port", &lab.underlay, one.underlay, 61001, Seen::Refused),
        ("a mapped port from the same cell", &client.place, one.underlay, 61000, Seen::Refused),
        ("the cell itself", &client.place, one.underlay, 2222, Seen::Refused),
        ("the gateway", &client.place, Ipv4Addr::new(169, 254, 0, 1), 2222, Seen::Refused),
        ("from the cell", &one.place, server.addr, ECHO_PORT, Seen::Open),
    ] {
        assert_eq!(connect(from, addr, port), expected, "{what}");
    }
    open.reaches(1);
    assert_eq!((closed.count(), cells.count()), (0, 0));
    let seen = prober::tcp(&lab.underlay, SocketAddrV4::new(one.underlay, 61000)).unwrap();
    assert_eq!(seen.source, WORLD, "the source stays as it is");

    let (told, status) = explain(one, "client", &format!("{WORLD}:{OPEN_PORT}/tcp"));
    assert_eq!((told["verdict"].as_str(), status), (Some("allowed"), Some(0)), "{told}");
    assert!(told["whose"].as_str().unwrap().contains("security group rule 0"), "{told}");
    let (told, status) = explain(one, &client.addr.to_string(), &format!("{WORLD}:{CLOSED_PORT}/tcp"));
    assert_eq!((told["verdict"].as_str(), status), (Some("refused"), Some(2)), "{told}");
    let (told, _) = explain(one, &WORLD.to_string(), &format!("{}:61000/tcp", one.underlay));
    assert_eq!(told["mapped_to"], format!("{}:{ECHO_PORT}", server.addr), "{told}");

    one.del("server").unwrap();
    assert_eq!(
        connect(&lab.underlay, one.underlay, 61000),
        Seen::Refused,
        "the port goes with its container"
    );
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

/// "Whose rules": at no moment does a forbidden packet get through; while an allowed one does.
#[test]
fn a_flood_of_forbidden_syns_never_gets_through() {
    let lab = lab("flood", |options| options.cells = 1);
    let cell = &lab.cells[0];
    let open = Counter::at(&lab.underlay, OPEN_PORT);
    let closed = Counter::at(&lab.underlay, CLOSED_PORT);
    let stays = added(cell, &asks("stays"));
    let flood = Flood::from(&stays);
    let times =
        |name: &str, otherwise: usize| std::env::var(name).map_or(otherwise, |text| text.parse().unwrap());
    for n in 0..times("WEFT_FLOOD_ADDS", 200) {
        let handle = format!("comes-{n}");
        let container = cell.add(&asks(&handle)).unwrap();
        // From its first moment on.
        let own = Flood::from(&container);
        thread::sleep(Duration::from_millis(5));
        drop(own);
        cell.del(&handle).unwrap();
    }
    let after_adds = open.count();
    assert!(after_adds > 0, "what is allowed gets through");
    for n in 0..times("WEFT_FLOOD_RESTARTS", 100) {
        match n % 2 {
            0 => cell.kill_node().unwrap(),
            _ => cell.stop_node().unwrap(),
        }
        cell.start_node().unwrap();
        cell.wait_ready(0, PATIENCE).unwrap();
    }
    assert!(open.count() > after_adds, "and while the node starts again");
    drop(flood);
    assert_eq!(closed.count(), 0);
    // A node that is killed as it connects may say so when it has started again.
    assert_eq!(lab.complaints(&["controller lost"]), Vec::<String>::new());
}

/// "To the cell": while somebody flushes filter/INPUT, nothing that it refused gets through; an operator's rule counts.
fn whoever_flushes_input_opens_nothing(backend: &str) {
    let lab = lab(backend, |options| {
        options.cells = 1;
        options.node.insert("iptables_backend".into(), backend.into());
    });
    let cell = &lab.cells[0];
    let iptables = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        cell.place.run(&format!("iptables-{backend}"), &[&["-w"], &arguments[..]].concat(), "").unwrap()
    };
    let ours = || iptables("-S INPUT").lines().filter(|line| line.contains("weft: ")).count();
    let wait_for_ours = || {
        let deadline = Instant::now() + PATIENCE;
        while ours() == 0 {
            assert!(Instant::now() < deadline, "the rule is back within 10 s");
            thread::sleep(Duration::from_millis(20));
        }
    };
    wait_for_ours();
    let container = added(cell, &asks("asks"));
    let (closed, offered) = (Counter::at(&cell.place, 2222), Counter::at(&cell.place, 8898));
    assert_eq!(connect(&container.place, cell.underlay, 8898), Seen::Refused);
    iptables("-I INPUT -p tcp --dport 8898 -j ACCEPT");
    assert_eq!(connect(&container.place, cell.underlay, 8898), Seen::Open, "an operator's rule counts");
    offered.reaches(1);

    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        scope.spawn(|| {
            container.place.move_thread().unwrap();
            while !stop.load(Ordering::Relaxed) {
                let to = SocketAddrV4::new(cell.underlay, 2222).into();
                drop(TcpStream::connect_timeout(&to, Duration::from_millis(20)));
            }
        });
        let undisturbed = || {
            let before = closed.count();
            thread::sleep(Duration::from_millis(300));
            assert_eq!(closed.count(), before, "nothing comes through");
        };
        undisturbed();
        for _ in 0..3 {
            iptables("-F INPUT");
            wait_for_ours();
            undisturbed();
        }
        stop.store(true, Ordering::Relaxed);
    });
    assert_eq!(ours(), 1, "put back once");
    assert_eq!(connect(&container.place, cell.underlay, 2222), Seen::Refused);
    assert_eq!(connect(&container.place, cell.underlay, 8898), Seen::Refused, "the operator's rule went too");
    let complaints = lab.complaints(&["drift repaired: somebody removed the iptables rule"]);
    assert_eq!(complaints, Vec::<String>::new());
}

#[test]
fn whoever_flushes_input_of_iptables_nft_opens_nothing_for_long() {
    whoever_flushes_input_opens_nothing("nft");
}

#[test]
fn whoever_flushes_input_of_iptables_legacy_opens_nothing_for_long() {
    whoever_flushes_input_opens_nothing("legacy");
}

/// "Whose rules": what somebody does to our table is undone at once, and said once.
#[test]
fn a_flushed_table_is_back_at_once() {
    let lab = lab("flushed", |options| options.cells = 1);
    let cell = &lab.cells[0];
    let container = added(cell, &asks("asks"));
    let nft = |arguments: &[&str]| cell.place.run("nft", arguments, "").unwrap();
    // Sorted: elements come back in another order. Without the guard's chain, which follows iptables' rules.
    let table = || {
        let text = nft(&["-s", "list", "map", "inet", "weft", "profiles"])
            + &nft(&["-s", "list", "chain", "inet", "weft", "egress"]);
        let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
        words.sort();
        words
    };
    let before = table();
    nft(&["flush", "chain", "inet", "weft", "egress"]);
    nft(&["flush", "map", "inet", "weft", "profiles"]);
    let deadline = Instant::now() + Duration::from_secs(10);
    while table() != before {
        assert!(Instant::now() < deadline, "{:?}", table());
        thread::sleep(Duration::from_millis(5));
    }
    assert_eq!(connect(&container.place, WORLD, CLOSED_PORT), Seen::Refused);
    let drift = |line: &String| line.contains("drift repaired");
    let complaints = lab.complaints(&[]);
    assert!(complaints.iter().all(drift), "{complaints:?}");
    let of = |key: &str| complaints.iter().filter(|line| line.contains(key)).count();
    assert_eq!((of("chain egress"), of("element of profiles")), (1, 1), "{complaints:?}");
}

fn traffic(cell: &Cell) -> Vec<Value> {
    let text = std::fs::read_to_string(cell.traffic_log()).unwrap_or_default();
    text.lines().map(|line| serde_json::from_str(line).unwrap()).collect()
}

/// docs/traffic-log.md: a line for what was decided, with whose it is and by which rule; and how much has no line.
#[test]
fn what_was_decided_is_in_the_traffic_log() {
    let lab = lab("traffic", |options| {
        options.cells = 1;
        options.plugin = json!({"iptables_asg_logging": true}).as_object().cloned().unwrap();
    });
    let cell = &lab.cells[0];
    let container = added(cell, &asks("talks"));
    let open = Counter::at(&lab.underlay, OPEN_PORT);
    assert_eq!(connect(&container.place, WORLD, OPEN_PORT), Seen::Open);
    for _ in 0..30 {
        assert_eq!(connect(&container.place, WORLD, CLOSED_PORT), Seen::Refused);
    }
    open.reaches(1);
    let found = |message: &str| {
        let deadline = Instant::now() + PATIENCE;
        loop {
            let name = format!("cfnetworking.iptables.{message}");
            let lines: Vec<Value> =
                traffic(cell).into_iter().filter(|line| line["message"] == *name).collect();
            if !lines.is_empty() {
                return lines;
            }
            assert!(Instant::now() < deadline, "{message}: {:?}", traffic(cell));
            thread::sleep(Duration::from_millis(20));
        }
    };
    let allowed = found("egress-allowed");
    assert_eq!(allowed.len(), 1, "one line for a connection: {allowed:?}");
    let data = &allowed[0]["data"];
    assert_eq!(data["source"]["container_id"], "talks");
    assert_eq!(data["source"]["app_guid"], "app-of-talks");
    assert_eq!(data["packet"]["dst_port"], OPEN_PORT);
    assert!(data["rule"].as_str().unwrap().starts_with("security group rule 0 (10.0.0.1 tcp 7001"), "{data}");
    let denied = found("egress-denied");
    assert_eq!(denied[0]["data"]["packet"]["dst_port"], CLOSED_PORT);
    let suppressed = found("egress-suppressed");
    let count: u64 =
        suppressed.iter().map(|line| line["data"]["suppressed"]["count"].as_u64().unwrap()).sum();
    let lines =
        traffic(cell).iter().filter(|line| line["message"] == "cfnetworking.iptables.egress-denied").count();
    assert!(lines < 30 && count > 0 && count <= 30, "{lines} lines and {count} without one");
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}
