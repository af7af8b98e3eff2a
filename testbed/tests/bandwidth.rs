//! Bandwidth limits on real traffic, in both directions, beside a container without any; and that they stay while the
//! container does: over a restart of the node, after somebody's damage; and go with it.
#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::lab::Cell;
use weft_testbed::prober::wait_for;
use weft_testbed::{Lab, Options};

const PATIENCE: Duration = Duration::from_secs(30);
const PORT: u16 = 5201;
/// silk's kilobits: 30 of their megabits per second, a sixteenth of one at once.
const RATE: u32 = 30 * 1024;
const BURST: u32 = 1024 / 2;
/// What the buckets hold is gone by then, and TCP has found its pace.
const WARM: Duration = Duration::from_secs(1);
const MEASURED: Duration = Duration::from_secs(4);
/// Ethernet, IPv4 and TCP with timestamps around each 1398 bytes of an MTU of 1450: the limit counts them.
const HEADERS: f64 = 1464.0 / 1398.0;

/// Bytes per second, headers included, that arrive at `to` when `from` sends as fast as it can.
fn throughput(from: &Container, to: &Container) -> f64 {
    let listener = to.place.enter(|| TcpListener::bind((Ipv4Addr::UNSPECIFIED, PORT))).unwrap().unwrap();
    let target = SocketAddrV4::new(to.addr, PORT);
    let mut out = from.place.enter(|| TcpStream::connect_timeout(&target.into(), PATIENCE)).unwrap().unwrap();
    let sender = thread::spawn(move || {
        let block = [0x57; 16 << 10];
        loop {
            match out.write_all(&block) {
                Err(e) if [ErrorKind::ConnectionReset, ErrorKind::BrokenPipe].contains(&e.kind()) => return,
                sent => sent.unwrap(),
            }
        }
    });
    let (mut stream, _) = listener.accept().unwrap();
    stream.set_read_timeout(Some(PATIENCE)).unwrap();
    let mut received = |how_long: Duration| {
        let (mut buffer, mut bytes, began) = (vec![0; 256 << 10], 0, Instant::now());
        while began.elapsed() < how_long {
            let read = stream.read(&mut buffer).unwrap();
            assert_ne!(read, 0, "the connection ended");
            bytes += read;
        }
        f64::from(u32::try_from(bytes).unwrap_or(u32::MAX)) / began.elapsed().as_secs_f64()
    };
    received(WARM);
    let rate = received(MEASURED);
    drop(stream);
    sender.join().unwrap();
    rate * HEADERS
}

fn assert_limited(rate: f64, what: &str) {
    let limit = f64::from(RATE) * 1024.0 / 8.0;
    eprintln!("{what}: {:.2} Mbit/s, {:.1} % of the limit", rate * 8e-6, rate / limit * 100.0);
    assert!((rate / limit - 1.0).abs() < 0.1, "{what}: {rate} bytes per second, the limit is {limit}");
}

/// Adds a container; `limits` stand in the conflist.
fn add(cell: &Cell, handle: &str, limits: &Value) -> Container {
    cell.configure_plugin(limits.as_object().unwrap()).unwrap();
    cell.add(&Request::app(handle)).unwrap()
}

fn tc(cell: &Cell, args: &str) -> String {
    cell.place.run("tc", &args.split(' ').collect::<Vec<_>>(), "").unwrap()
}

fn link(container: &Container, letter: char) -> String {
    let [a, b, c, d] = container.addr.octets();
    format!("{letter}-{a:03}{b:03}{c:03}{d:03}")
}

/// What the kernel shows of a container's limits.
fn shaping(cell: &Cell, container: &Container) -> [String; 3] {
    let own = link(container, 's');
    let shown = cell.place.run("tc", &["qdisc", "show"], "").unwrap();
    let of = |device: &str| {
        let lines = shown.lines().filter(|line| line.contains(&format!("dev {device} ")));
        lines.collect::<Vec<_>>().join("\n")
    };
    let filter = tc(cell, &format!("filter show dev {own} ingress"));
    [of(&own), of(&link(container, 'i')), filter]
}

fn assert_whole(cell: &Cell, container: &Container) {
    let [own, device, filter] = shaping(cell, container);
    for of in [&own, &device] {
        // tc counts in thousands.
        assert!(of.contains("qdisc tbf 7765: ") && of.contains("rate 31457Kbit burst 64Kb lat 25ms"), "{of}");
    }
    assert!(own.contains("qdisc ingress ffff:"), "{own}");
    let target = format!("mirred (Egress Redirect to device {})", link(container, 'i'));
    assert_eq!(filter.matches("mirred").count(), 1, "{filter}");
    assert!(filter.contains(&target), "{filter}");
}

fn devices(cell: &Cell) -> String {
    cell.place.run("ip", &["-brief", "link", "show", "type", "ifb"], "").unwrap()
}

#[test]
fn limits_hold_within_ten_percent_both_ways_and_over_a_restart() {
    let lab = Lab::up(&Options::unique("bandwidth").unwrap()).unwrap();
    let [first, second] = &lab.cells[..] else { panic!("two cells") };
    let limited = add(first, "limited", &json!({"rate": RATE, "burst": BURST}));
    let free = add(first, "free", &json!({}));
    let far = add(second, "far", &json!({}));
    assert_whole(first, &limited);
    assert_eq!(devices(first).lines().count(), 1, "who has no limits has no device for them");
    assert!(!shaping(first, &free).concat().contains("tbf"));

    let control = throughput(&free, &far).min(throughput(&far, &free));
    assert!(
        control > f64::from(RATE) * 1024.0 / 8.0 * 2.0,
        "without limits it is {control} bytes per second"
    );
    assert_limited(throughput(&limited, &far), "to another cell");
    assert_limited(throughput(&far, &limited), "from another cell");

    first.kill_node().unwrap();
    assert_whole(first, &limited);
    first.start_node().unwrap();
    first.wait_ready(1, PATIENCE).unwrap();
    assert_whole(first, &limited);
    first.check(&limited).unwrap();
    assert_limited(throughput(&limited, &free), "to a neighbour, after a restart");
    assert_limited(throughput(&free, &limited), "from a neighbour, after a restart");

    first.del("limited").unwrap();
    assert_eq!(devices(first), "", "the device goes with the container");
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

#[test]
fn damaged_limits_are_found_and_repaired() {
    let lab = Lab::up(&Options { cells: 1, ..Options::unique("shaping").unwrap() }).unwrap();
    let [cell] = &lab.cells[..] else { panic!("one cell") };
    let limited = add(cell, "limited", &json!({"rate": RATE, "burst": BURST}));
    let (own, device) = (link(&limited, 's'), link(&limited, 'i'));
    cell.check(&limited).unwrap();
    let damages = [
        format!("tc qdisc del dev {own} root"),
        format!("tc qdisc change dev {own} handle 7765: root tbf rate 1gbit burst 64kb latency 25ms"),
        format!("tc qdisc replace dev {device} root pfifo"),
        format!("tc qdisc del dev {own} ingress"),
        format!("tc filter del dev {own} ingress"),
        format!("ip link set {device} down"),
        format!("ip link del {device}"),
        format!("ip link del {device}; tc qdisc del dev {own} root; tc qdisc del dev {own} ingress"),
    ];
    for damage in &damages {
        cell.place.run("sh", &["-c", damage], "").unwrap();
        let why = cell.check(&limited).unwrap_err().to_string();
        assert!(why.contains("bandwidth is limited in another way"), "{damage}: {why}");
        wait_for(damage, || cell.check(&limited).is_ok());
        assert_whole(cell, &limited);
    }
    // A device that nobody asked for is not left standing.
    cell.place.ip("link add i-010255001099 type ifb\n").unwrap();
    wait_for("a stray device", || !devices(cell).contains("i-010255001099"));

    // A container that dies without a DEL takes its limits with it.
    cell.remove_namespace("limited").unwrap();
    wait_for("the device of a dead container", || devices(cell).is_empty());
    cell.del("limited").unwrap();
    assert_eq!(lab.complaints(&["drift repaired"]), Vec::<String>::new());
}
