//! What rules log is read, and becomes lines: real packets of containers, with a table that nft has made.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, UdpSocket};
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::time::{sleep, timeout};
use weft_model::bandwidth::Bandwidth;
use weft_model::container::{Container, Owner};
use weft_model::link::{self, LinkSpec};
use weft_model::traffic::{Decision, Direction, Protocol, Record, Totals};
use weft_node::directory::{Directory, Entered};
use weft_node::flow_log::{FlowLog, Host, Settings, Timestamps};
use weft_node::kernel::nflog::{Event, NflogError, listen};

use crate::world::{Cell, Space};

const GROUP: u16 = 2312;

const WORLD: &str = "10.77.0.99";

#[expect(clippy::disallowed_methods, reason = "a test's clock is the real one")]
fn now() -> SystemTime {
    SystemTime::now()
}

fn try_listen(space: &Space, group: u16) -> Result<BoxStream<'static, Event>, NflogError> {
    let runtime = tokio::runtime::Handle::current();
    space.enter(move || {
        let _inside = runtime.enter();
        listen(group).map(StreamExt::boxed)
    })
}

fn listening(space: &Space) -> BoxStream<'static, Event> {
    try_listen(space, GROUP).expect("listening")
}

async fn next(events: &mut BoxStream<'static, Event>) -> Event {
    let event = timeout(Duration::from_secs(10), events.next()).await;
    event.expect("told in time").expect("the stream does not end")
}

async fn record(events: &mut BoxStream<'static, Event>) -> Record {
    match next(events).await {
        Event::Decided(record) => record,
        other => panic!("{other:?}"),
    }
}

/// A table with one chain, in which rules log.
fn rules(space: &Space, hook: &str, rules: &[String]) {
    let text = format!(
        "table ip weft-test {{
            set totals {{ type ipv4_addr; size 64; flags dynamic; }}
            chain decides {{ type filter hook {hook} priority 0;\n{}\n}}
        }}",
        rules.join("\n")
    );
    space.run(&format!("nft -f - <<'END'\n{text}\nEND"));
}

fn log(prefix: &str) -> String {
    format!("log group {GROUP} snaplen 128 prefix \"{prefix}\"")
}

fn send(space: &Space, to: &str, port: u16) {
    let socket = space.enter(|| UdpSocket::bind("0.0.0.0:0")).expect("bound");
    socket.send_to(b"hello", (to, port)).expect("sent");
}

async fn containers(cell: &mut Cell) -> ((Space, LinkSpec), (Space, LinkSpec)) {
    (cell.container("10.255.66.2").await, cell.container("10.255.66.3").await)
}

#[tokio::test]
async fn every_decision_arrives_with_its_packet() {
    let mut cell = Cell::new().await;
    let ((one, one_link), (_two, two_link)) = containers(&mut cell).await;
    let by_port = |(n, decision): (usize, &Decision)| {
        format!("udp dport {} meta mark set {n} {}", 1000 + n, log(decision.prefix()))
    };
    rules(&cell.space, "forward", &Decision::ALL.iter().enumerate().map(by_port).collect::<Vec<_>>());
    let mut events = listening(&cell.space);
    for (n, decision) in Decision::ALL.into_iter().enumerate() {
        let ingress = decision.direction() == Direction::Ingress;
        let to = if ingress { "10.255.66.3" } else { WORLD };
        let port = u16::try_from(1000 + n).expect("port");
        send(&one, to, port);
        let record = record(&mut events).await;
        let outgoing = if ingress { two_link.index() } else { cell.vtep.device };
        assert_eq!(record.decision, decision);
        assert_eq!((record.incoming, record.outgoing), (Some(one_link.index()), Some(outgoing)));
        assert_eq!(record.mark as usize, n);
        assert_eq!(record.packet.source, Ipv4Addr::new(10, 255, 66, 2));
        assert_eq!(record.packet.destination, to.parse::<Ipv4Addr>().expect("address"));
        assert_eq!((record.packet.protocol, record.packet.length), (Protocol::UDP, 33));
        assert_eq!(record.packet.destination_port, Some(port));
        assert!(record.packet.source_port.is_some_and(|port| port != 0));
        assert_eq!(record.direction(), decision.direction());
        assert!(link::is_index(record.outgoing.unwrap_or_default()) == ingress);
        let off = now().duration_since(record.at).unwrap_or_else(|later| later.duration());
        assert!(off < Duration::from_secs(3600), "{record:?}");
    }
}

#[tokio::test]
async fn headers_of_tcp_and_icmp_are_read() {
    let mut cell = Cell::new().await;
    let ((one, _), _) = containers(&mut cell).await;
    let prefix = log(Decision::Denied.prefix());
    rules(&cell.space, "forward", &[format!("ip protocol {{ tcp, icmp }} {prefix} drop")]);
    let mut events = listening(&cell.space);
    one.try_run(&format!("ping -c 1 -W 1 {WORLD}"));
    let packet = record(&mut events).await.packet;
    assert_eq!((packet.protocol, packet.icmp_kind, packet.icmp_code), (Protocol::ICMP, Some(8), Some(0)));
    assert_eq!((packet.source_port, packet.destination_port), (None, None));
    let to = format!("{WORLD}:443").parse().expect("address");
    one.enter(|| std::net::TcpStream::connect_timeout(&to, Duration::from_millis(50))).expect_err("dropped");
    let packet = record(&mut events).await.packet;
    assert_eq!((packet.protocol, packet.destination_port), (Protocol::TCP, Some(443)));
    assert_eq!((packet.icmp_kind, packet.icmp_code), (None, None));
}

/// Another's rule with our group harms nothing.
#[tokio::test]
async fn what_is_not_ours_is_told_apart() {
    let space = Space::new();
    rules(
        &space,
        "output",
        &[format!("udp dport 1 {}", log("ours?")), format!("udp dport 1 {}", log("weft:denied"))],
    );
    let mut events = listening(&space);
    send(&space, "127.0.0.1", 1);
    assert_eq!(next(&mut events).await, Event::Foreign);
    assert_eq!(record(&mut events).await.decision, Decision::Denied);
}

#[tokio::test]
async fn a_group_has_one_reader() {
    let (space, other) = (Space::new(), Space::new());
    let first = listening(&space);
    let Err(taken) = try_listen(&space, GROUP) else { panic!("two readers") };
    assert!(matches!(taken, NflogError::Taken { group: GROUP }), "{taken:?}");
    assert!(taken.to_string().starts_with("traffic_log_group: "), "{taken}");
    let _of_another_group = try_listen(&space, GROUP + 1).expect("another group");
    let _of_another_namespace = listening(&other);
    drop(first);
    drop(listening(&space));
}

/// What the reader does not take in time is lost, no error, and counted to the last one.
#[tokio::test]
async fn a_flood_is_counted_whole() {
    let space = Space::new();
    rules(&space, "output", &[format!("udp dport {{ 1, 2 }} counter {}", log("weft:denied"))]);
    let mut events = listening(&space);
    let flood = || {
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bound");
        (0..150_000).filter(|_| socket.send_to(b"flood", "127.0.0.1:1").is_ok()).count()
    };
    let sent = space.enter(flood);
    let (mut told, mut lost) = (0, 0);
    // The last packet tells of those lost before it, unless it is lost as well.
    'last: for tries in 0.. {
        assert!(tries < 20, "the last packet is not told");
        send(&space, "127.0.0.1", 2);
        while let Ok(event) = timeout(Duration::from_millis(500), events.next()).await {
            match event.expect("the stream does not end") {
                Event::Decided(record) => {
                    told += 1;
                    if record.packet.destination_port == Some(2) {
                        break 'last;
                    }
                }
                Event::Lost(records) => lost += records,
                Event::Foreign => panic!("not ours"),
            }
        }
    }
    let counter = space.run("nft list chain ip weft-test decides");
    let counted = counter.split("counter packets ").nth(1).and_then(|rest| rest.split(' ').next());
    let counted: u64 = counted.and_then(|text| text.parse().ok()).expect("a counter");
    assert!(counted > sent as u64, "{counter}");
    assert!(lost > 0 && told > 1000, "{told} told, {lost} lost");
    assert_eq!(told + lost, counted);
}

fn totals(cell: &Cell) -> Totals {
    let text = cell.space.run("nft list set ip weft-test totals");
    let mut totals = BTreeMap::new();
    let words: Vec<&str> =
        text.split([' ', '\t', '\n', ',', '{', '}', '=']).filter(|word| !word.is_empty()).collect();
    for found in words.windows(4).filter(|found| found[1..3] == ["counter", "packets"]) {
        let container: Ipv4Addr = found[0].parse().expect("address");
        totals.insert((container, Decision::Denied), found[3].parse().expect("number"));
    }
    totals
}

/// From the packet to the file: one line by the kernel's limit, and one for all the others.
#[tokio::test]
async fn lines_and_suppressed_counts_reach_the_file() {
    let mut cell = Cell::new().await;
    let ((one, spec), _) = containers(&mut cell).await;
    let count_and_log = format!(
        "udp dport 53 update @totals {{ ip saddr counter }} limit rate 1/day burst 2 packets {}",
        log("weft:denied")
    );
    rules(&cell.space, "forward", &[count_and_log, "udp dport 53 drop".into()]);
    let place = tempfile::tempdir().expect("directory");
    let file = place.path().join("traffic.log");
    let container = Container {
        handle: spec.handle.clone(),
        addr: spec.addr,
        interface: spec.interface.clone(),
        mtu: 1450,
        wanted_mtu: None,
        namespace: String::new(),
        owner: Owner { app_id: "app-1".into(), ..Owner::default() },
        ports: Vec::new(),
        network: String::new(),
        profile: None,
        passed: None,
        bandwidth: Bandwidth::default(),
    };
    let directory = Directory::default();
    directory.enter(Entered { container: Arc::new(container), profile: None });
    let host = Host { addr: "10.77.0.11".parse().expect("address"), guid: "cell".into() };
    let settings = Settings { file: file.clone(), timestamps: Timestamps::Rfc3339, host };
    let log = FlowLog::start(settings, directory).expect("started");
    let (counters, tally) = (log.counters(), log.tally());
    let task = tokio::spawn(log.run(listening(&cell.space)));

    tally.read(&totals(&cell), now());
    for _ in 0..20 {
        send(&one, WORLD, 53);
    }
    for lines in [2, 3] {
        for _ in 0..1000 {
            if counters.written.get() == lines {
                break;
            }
            sleep(Duration::from_millis(10)).await;
        }
        assert_eq!(counters.written.get(), lines);
        tally.read(&totals(&cell), now());
        tally.read(&totals(&cell), now());
    }
    task.abort();

    let text = std::fs::read_to_string(&file).expect("readable");
    let lines: Vec<serde_json::Value> =
        text.lines().map(|line| serde_json::from_str(line).expect("JSON")).collect();
    let messages: Vec<&str> = lines.iter().filter_map(|line| line["message"].as_str()).collect();
    let denied = "cfnetworking.iptables.egress-denied";
    assert_eq!(messages, [denied, denied, "cfnetworking.iptables.egress-suppressed"]);
    for line in &lines {
        let source = &line["data"]["source"];
        assert_eq!(
            (&source["container_id"], &source["app_guid"]),
            (&spec.handle.as_str().into(), &"app-1".into())
        );
    }
    let packet = &lines[0]["data"]["packet"];
    assert_eq!((&packet["src_ip"], &packet["dst_port"]), (&"10.255.66.2".into(), &53.into()));
    assert_eq!(lines[2]["data"]["suppressed"]["count"], 18);
}
