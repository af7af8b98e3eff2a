//! Real packets: within a cell, across cells at full MTU, and connections that are forgotten.

use std::collections::BTreeSet;
use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::time::Duration;

use weft_model::cell::Object;
use weft_node::kernel::conntrack::Connections;

use crate::world::{Cell, Space, addr};

/// Sends 1 MiB by TCP and has it returned; the address that the server saw.
fn exchange(client: &Space, server: &Space, at: &str) -> SocketAddr {
    let listener = server.enter(|| TcpListener::bind((at, 0))).expect("listening");
    let port = listener.local_addr().expect("address").port();
    let echo = std::thread::spawn(move || {
        let (mut stream, peer) = listener.accept().expect("accepted");
        let mut bytes = vec![0; 1 << 20];
        stream.read_exact(&mut bytes).expect("read");
        stream.write_all(&bytes).expect("written");
        peer
    });
    let timeout = Duration::from_secs(10);
    let to = format!("{at}:{port}").parse().expect("address");
    let mut stream = client.enter(|| TcpStream::connect_timeout(&to, timeout)).expect("connected");
    stream.set_read_timeout(Some(timeout)).expect("timeout");
    let sent = vec![7; 1 << 20];
    stream.write_all(&sent).expect("written");
    let mut back = vec![0; 1 << 20];
    stream.read_exact(&mut back).expect("read");
    assert!(sent == back);
    echo.join().expect("server")
}

/// Whether an IP packet of exactly that many bytes, with DF set, is answered by one of the same size.
fn answers(client: &Space, at: &str, bytes: usize) -> bool {
    client.try_run(&format!("ping -M do -c 1 -W 2 -s {} {at}", bytes - 28)).0
}

#[tokio::test]
async fn containers_of_one_cell_reach_each_other() {
    let mut cell = Cell::new().await;
    cell.space.run("echo 0 > /proc/sys/net/ipv4/ip_forward");
    let (one, _) = cell.container("10.255.66.2").await;
    let (two, _) = cell.container("10.255.66.3").await;
    let seen = exchange(&one, &two, "10.255.66.3");
    assert_eq!(seen.ip(), "10.255.66.2".parse::<std::net::IpAddr>().expect("address"), "its own address");
    assert!(answers(&one, "10.255.66.3", 1450));
    assert!(!answers(&one, "10.255.66.3", 1451));
    assert_eq!(
        cell.space.run("cat /proc/sys/net/ipv4/ip_forward").trim(),
        "0",
        "per device, not for the machine"
    );
    assert_eq!(exchange(&cell.space, &two, "10.255.66.3").ip().to_string(), "169.254.0.1", "from the cell");
}

/// A container that sends with another's address is not heard.
#[tokio::test]
async fn a_forged_source_does_not_pass() {
    let mut cell = Cell::new().await;
    let (one, _) = cell.container("10.255.66.2").await;
    let (two, _) = cell.container("10.255.66.3").await;
    one.run("ip addr add 10.255.66.77/32 dev eth0");
    let receiver = two.enter(|| UdpSocket::bind("10.255.66.3:0")).expect("bound");
    receiver.set_read_timeout(Some(Duration::from_secs(1))).expect("timeout");
    let to = receiver.local_addr().expect("address");
    for (from, arrives) in [("10.255.66.77:0", false), ("10.255.66.2:0", true)] {
        let sender = one.enter(|| UdpSocket::bind(from)).expect("bound");
        sender.send_to(b"hello", to).expect("sent");
        assert_eq!(receiver.recv(&mut [0; 16]).is_ok(), arrives, "{from}");
    }
}

#[tokio::test]
async fn containers_of_two_cells_reach_each_other_at_full_mtu() {
    let (a, b) = (Space::new(), Space::new());
    a.run("ip link add eth0 type veth peer name eth1 && ip addr add 10.77.0.11/24 dev eth0 && ip link set eth0 up");
    a.run(&format!("ip link set eth1 netns {}", b.path()));
    b.run("ip link set eth1 name eth0 && ip addr add 10.77.0.12/24 dev eth0 && ip link set eth0 up");
    for space in [&a, &b] {
        space.run("echo 0 > /proc/sys/net/ipv4/ip_forward");
    }
    let mut left = Cell::on(a, "10.77.0.11", "10.255.66.0/24").await;
    let mut right = Cell::on(b, "10.77.0.12", "10.255.56.0/24").await;
    let to_right = left.peer("10.255.56.0/24", "10.77.0.12");
    let to_left = right.peer("10.255.66.0/24", "10.77.0.11");
    left.lay([Object::Vtep(left.vtep.clone()), Object::Peer(to_right)]).await;
    right.lay([Object::Vtep(right.vtep.clone()), Object::Peer(to_left)]).await;
    let (one, _) = left.container("10.255.66.2").await;
    let (two, _) = right.container("10.255.56.2").await;

    assert_eq!(exchange(&one, &two, "10.255.56.2").ip().to_string(), "10.255.66.2");
    assert_eq!(exchange(&two, &one, "10.255.66.2").ip().to_string(), "10.255.56.2");
    assert_eq!(
        exchange(&left.space, &two, "10.255.56.2").ip().to_string(),
        "10.255.66.0",
        "from the cell itself"
    );
    assert!(answers(&one, "10.255.56.2", 1450));
    assert!(!answers(&one, "10.255.56.2", 1451));
    for space in [&left.space, &right.space] {
        // Columns as in RFC 1213: fragments put together, and made.
        let counters = space.run("nstat -asz IpReasmReqds IpFragCreates | awk 'NR > 1 { print $2 }'");
        assert_eq!(counters.split_whitespace().collect::<Vec<_>>(), ["0", "0"], "nothing was fragmented");
    }
}

#[tokio::test]
async fn connections_of_an_address_are_forgotten() {
    let mut cell = Cell::new().await;
    let track = "nft 'add table ip t; add chain ip t f { type filter hook forward priority 0; }; \
                 add rule ip t f ct state established accept; \
                 add chain ip t d { type nat hook prerouting priority -100; }; \
                 add rule ip t d ip daddr 169.254.0.1 udp dport 6100 dnat to 10.255.66.3:7000'";
    cell.space.run(track);
    let (one, _) = cell.container("10.255.66.2").await;
    let (two, _) = cell.container("10.255.66.3").await;
    let (three, _) = cell.container("10.255.66.4").await;
    exchange(&one, &two, "10.255.66.3");
    exchange(&three, &one, "10.255.66.2");
    exchange(&three, &cell.space, "169.254.0.1");
    // By a mapped port: the container's address is only in the reply.
    let receiver = two.enter(|| UdpSocket::bind("10.255.66.3:7000")).expect("bound");
    receiver.set_read_timeout(Some(Duration::from_secs(5))).expect("timeout");
    let sender = three.enter(|| UdpSocket::bind("10.255.66.4:0")).expect("bound");
    sender.send_to(b"hello", "169.254.0.1:6100").expect("sent");
    receiver.recv(&mut [0; 16]).expect("received");

    let count = |what: &str| cell.space.run(&format!("conntrack -L 2>/dev/null | grep -c '{what}' || true"));
    assert_ne!(count("=10.255.66.3").trim(), "0", "{}", cell.space.run("conntrack -L"));
    let mut connections = cell.space.enter(|| Connections::open().expect("a socket"));
    let mut forget = |text: &str| {
        let addrs = BTreeSet::from([addr(text)]);
        cell.space.enter(|| connections.forget(&addrs).expect("forgotten"))
    };
    assert_eq!(forget("10.255.66.3"), 2, "the one to it, and the one by the mapped port");
    assert_eq!(count("=10.255.66.3").trim(), "0");
    assert_eq!(count("=10.255.66.4").trim(), "2", "others stay");
    assert_eq!(forget("10.255.66.2"), 1);
    assert_eq!(forget("10.255.66.2"), 0);
}
