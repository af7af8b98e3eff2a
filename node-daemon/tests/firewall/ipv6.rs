//! IPv6: however it was switched on, nothing of it passes.

use std::net::{Ipv6Addr, SocketAddrV6};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use rustix::net::{
    AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto, recv, sendto, socket_with, sockopt,
};

use weft_model::address::HardwareAddr;

use crate::holes::Lair;
use crate::space::Space;
use crate::world::Site;

const ALL_NODES: Ipv6Addr = Ipv6Addr::new(0xff02, 0, 0, 0, 0, 0, 0, 1);
/// RFC 4861, 4.2: a router for half an hour, of high preference.
const ROUTER: [u8; 16] = [134, 0, 0, 0, 64, 0x08, 7, 8, 0, 0, 0, 0, 0, 0, 0, 0];
/// RFC 4443, 4.1.
const QUESTION: [u8; 12] = [128, 0, 0, 0, 0, 7, 0, 1, b'w', b'e', b'f', b't'];

/// ICMPv6: the kernel puts in its checksum.
fn socket(space: &Space) -> OwnedFd {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let open = || socket_with(AddressFamily::INET6, SocketType::RAW, flags, Some(ipproto::ICMPV6));
    let socket = space.enter(open).expect("a raw socket");
    sockopt::set_ipv6_multicast_hops(&socket, 255).expect("hops");
    socket
}

/// How many of our questions were delivered: they are told by what they carry.
fn questions(ears: &OwnedFd) -> usize {
    let (mut buffer, mut count) = ([0; 256], 0);
    while let Ok((_, length)) = recv(ears, &mut buffer[..], RecvFlags::empty()) {
        count += usize::from(buffer[0] == QUESTION[0] && buffer[..length].ends_with(&QUESTION[4..]));
    }
    count
}

/// dataplane.md, "Spoofed sources, IPv6".
#[tokio::test]
async fn nothing_of_ipv6_leaves_a_container_and_no_router_is_believed() {
    let lair = Lair::new(false).await;
    let (cell, world) = (&lair.world.site.space, &lair.world.outside);
    let link = Site::link(&lair.intruder);
    // Everybody has an address, knows the others, and forwards.
    cell.run(&format!(
        "echo 1 > /proc/sys/net/ipv6/conf/all/forwarding && echo 0 > /proc/sys/net/ipv6/conf/{link}/disable_ipv6 && \
         echo 2 > /proc/sys/net/ipv6/conf/{link}/accept_ra && ip -6 addr add fd00::1/64 dev {link} nodad && \
         ip -6 addr add fd01::14/64 dev eth0 nodad"
    ));
    world.run("ip -6 addr add fd01::1/64 dev br0 nodad && ip -6 route add fd00::/64 via fd01::14");
    let mac = HardwareAddr::from_ipv4(0xaa, lair.intruder.addr);
    let intruder = &lair.intruder.space;
    intruder.run(&format!(
        "echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6 && ip -6 addr add fd00::2/64 dev eth0 nodad && \
         ip -6 addr replace fe80::2/64 dev eth0 nodad && \
         ip -6 neigh replace fd00::1 lladdr {mac} nud permanent dev eth0 && ip -6 route add default via fd00::1"
    ));
    let index = intruder.run("cat /proc/net/if_inet6 | awk '$6 == \"eth0\" { print $2; exit }'");
    let index = u32::from_str_radix(index.trim(), 16).expect("an index");
    let (mouth, ears, far) = (socket(intruder), socket(cell), socket(world));
    let send = |to: Ipv6Addr, scope, bytes: &[u8]| {
        sendto(&mouth, bytes, SendFlags::empty(), &SocketAddrV6::new(to, 0, 0, scope)).expect("sent");
    };
    let try_all = || {
        for _ in 0..3 {
            send(ALL_NODES, index, &QUESTION);
            send(ALL_NODES, index, &ROUTER);
            send("fd00::1".parse().expect("address"), 0, &QUESTION);
            send("fd01::1".parse().expect("address"), 0, &QUESTION);
        }
    };
    let routers = || cell.run(&format!("ip -6 route show default dev {link}"));
    let heard = || (questions(&ears) > 0, questions(&far) > 0, !routers().is_empty());
    try_all();
    // A packet that must arrive has passed behind them.
    lair.fates(&[]);
    assert_eq!(heard(), (false, false, false), "the cell, the world, a router: {}", routers());
    lair.world.site.lose_table();
    let deadline = Instant::now() + Duration::from_secs(10);
    let mut all = (false, false, false);
    while all != (true, true, true) {
        assert!(Instant::now() < deadline, "not everything arrives without the firewall: {all:?}");
        try_all();
        let now = heard();
        all = (all.0 || now.0, all.1 || now.1, all.2 || now.2);
    }
}
