//! What becomes of packets, with marks set as our own program sets them.

use std::io::ErrorKind;
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd;
use std::time::Duration;

use weft_node::guard::Rule;

use crate::world::{BOTH, Kept, LONG, Space, eventually};

/// A cell, and two container-like namespaces that are connected to it.
fn cell() -> (Space, Space, Space) {
    let (cell, one, two) = (Space::new(), Space::new(), Space::new());
    for (n, container) in [(1, &one), (2, &two)] {
        cell.run(&format!("ip link add c{n} type veth peer name outer{n}"));
        // The inner end is made here and moved there, by a thread that holds the other namespace.
        let there = container.0.as_fd();
        cell.enter(|| {
            let moved = std::process::Command::new("sh")
                .args(["-c", &format!("ip link set outer{n} netns /proc/self/fd/0")])
                .stdin(there.try_clone_to_owned().expect("cloned"))
                .status();
            assert!(moved.expect("sh").success());
        });
        cell.run(&format!("ip addr add 10.9.{n}.1/24 dev c{n} && ip link set c{n} up"));
        container.run(&format!(
            "ip link set outer{n} name eth0 && ip addr add 10.9.{n}.2/24 dev eth0 && ip link set eth0 up && \
             ip route add default via 10.9.{n}.1"
        ));
    }
    cell.run("echo 1 > /proc/sys/net/ipv4/ip_forward");
    (cell, one, two)
}

fn listen(space: &Space, port: u16) -> TcpListener {
    space.enter(|| TcpListener::bind(("0.0.0.0", port)).expect("listening"))
}

fn connect(from: &Space, to: &str, timeout: Duration) -> Result<(), ErrorKind> {
    let to: SocketAddr = to.parse().expect("address");
    from.enter(|| TcpStream::connect_timeout(&to, timeout)).map(drop).map_err(|e| e.kind())
}

#[test]
fn what_is_marked_is_refused_and_an_operators_accept_wins() {
    for (program, wish) in BOTH {
        let (cell, container, _) = cell();
        let _listeners = [8898, 8899, 8900].map(|port| listen(&cell, port));
        // As our own program does it: before iptables' chains, and with nothing but a mark.
        let mark = Rule::Input.mark().value;
        cell.run(&format!(
            "nft 'add table inet t; add chain inet t in {{ type filter hook input priority filter - 10; }}; \
             add rule inet t in iifname c1 tcp dport != 8900 meta mark set {mark}'"
        ));
        let connect = |port: u16| connect(&container, &format!("10.9.1.1:{port}"), LONG);
        assert_eq!(connect(8899), Ok(()), "{program}: without the rule nothing refuses");
        let kept = Kept::start(&cell, wish);
        kept.appends(program);
        assert_eq!(connect(8898), Err(ErrorKind::ConnectionRefused), "{program}");
        assert_eq!(connect(8899), Err(ErrorKind::ConnectionRefused), "{program}");
        assert_eq!(connect(8900), Ok(()), "{program}: not marked");
        cell.run(&format!("{program} -w 5 -I INPUT -p tcp --dport 8898 -j ACCEPT"));
        assert_eq!(connect(8898), Ok(()), "{program}");
        assert_eq!(connect(8899), Err(ErrorKind::ConnectionRefused), "{program}");
        // What comes in from the underlay to a mapped port has every upper bit.
        cell.run("nft 'flush chain inet t in; add rule inet t in meta mark set 0xffff0000'");
        assert_eq!(connect(8899), Ok(()), "{program}");
    }
}

#[test]
fn a_policy_of_drop_does_not_undo_what_is_allowed() {
    for (program, wish) in BOTH {
        let (cell, one, two) = cell();
        let _listeners = [8080, 8081].map(|port| listen(&two, port));
        let mark = Rule::Forward.mark().value;
        cell.run(&format!(
            "nft 'add table inet t; add chain inet t fw {{ type filter hook forward priority filter - 10; }}; \
             add rule inet t fw tcp dport 8080 meta mark set 0x2a; \
             add rule inet t fw tcp dport 8080 meta mark set meta mark or {mark}; \
             add rule inet t fw tcp sport 8080 meta mark set {mark}' && {program} -w 5 -P FORWARD DROP"
        ));
        let (allowed, not_allowed) = ("10.9.2.2:8080", "10.9.2.2:8081");
        let short = Duration::from_secs(2);
        assert_eq!(connect(&one, allowed, short), Err(ErrorKind::TimedOut), "{program}: without the rule");
        let kept = Kept::start(&cell, wish);
        kept.appends(program);
        eventually("both rules", || cell.has_ours(program));
        assert_eq!(connect(&one, allowed, LONG), Ok(()), "{program}");
        assert_eq!(connect(&one, not_allowed, short), Err(ErrorKind::TimedOut), "{program}");
    }
}
