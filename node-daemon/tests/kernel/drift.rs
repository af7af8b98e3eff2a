//! What somebody else changes is seen for what it is, announced, and mended.

use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::time::timeout;
use weft_model::cell::{Belief, Change, Key, Object, PeerSpec, Step, Stray};
use weft_node::kernel::Namespaces;
use weft_node::kernel::events::{Event, watch};

use crate::world::{Cell, addr, held, key, lay, link};

pub(crate) fn listen(cell: &Cell) -> BoxStream<'static, Event> {
    let (name, underlay) = (cell.vtep.name.clone(), cell.vtep.device);
    let runtime = tokio::runtime::Handle::current();
    cell.space.enter(move || {
        let _inside = runtime.enter();
        watch(name, underlay).expect("listening").boxed()
    })
}

pub(crate) async fn next(events: &mut BoxStream<'static, Event>, after: &str) -> Event {
    let event = timeout(Duration::from_secs(10), events.next()).await;
    event.unwrap_or_else(|_| panic!("not announced: {after}")).expect("the stream does not end")
}

#[tokio::test]
async fn drift_is_seen_announced_and_mended() {
    let (peer_key, link_key) =
        (Key::Peer("10.255.56.0/24".parse().expect("subnet")), Key::Link(addr("10.255.66.2")));
    let stray_neighbour = Key::Stray(Stray::Neighbour("10.255.9.9".parse().expect("addr")));
    let stray_forward = Key::Stray(Stray::Forward("00:00:00:00:00:00".parse().expect("mac")));
    let stray_route = Key::Stray(Stray::Route {
        dst: "10.99.0.0/24".parse().expect("subnet"),
        gateway: "10.255.56.0".parse().expect("gateway"),
    });
    let unknown = Some(Belief::Unknown);
    let vtep = &Key::Vtep;
    let mut cell = Cell::new().await;
    let peer = cell.peer("10.255.56.0/24", "10.77.0.12");
    cell.lay([Object::Vtep(cell.vtep.clone()), Object::Peer(peer)]).await;
    let elsewhere = PeerSpec { underlay: "10.77.0.99".parse().expect("underlay"), ..peer };
    let elsewhere = Some(Belief::Holds(Object::Peer(elsewhere)));
    // What is done, the key it concerns, what is seen of that key, and whether it is announced.
    let cases = [
        ("ip route del 10.255.56.0/24 dev silk-vtep", &peer_key, None, true),
        ("ip route change 10.255.56.0/24 dev silk-vtep via 10.255.56.9", &peer_key, None, true),
        (
            "ip route add 10.255.56.0/24 metric 7 via 10.255.56.0 dev silk-vtep",
            &peer_key,
            unknown.clone(),
            true,
        ),
        ("ip neigh del 10.255.56.0 dev silk-vtep", &peer_key, unknown.clone(), true),
        (
            "ip neigh replace 10.255.56.0 lladdr 02:00:00:00:00:01 dev silk-vtep",
            &peer_key,
            unknown.clone(),
            true,
        ),
        (
            "ip neigh replace 10.255.56.0 lladdr ee:ee:0a:ff:38:00 nud stale dev silk-vtep",
            &peer_key,
            unknown.clone(),
            true,
        ),
        ("bridge fdb del ee:ee:0a:ff:38:00 dev silk-vtep", &peer_key, unknown.clone(), true),
        ("bridge fdb replace ee:ee:0a:ff:38:00 dev silk-vtep dst 10.77.0.99", &peer_key, elsewhere, true),
        (
            "ip neigh add 10.255.9.9 lladdr 02:00:00:00:00:01 dev silk-vtep",
            &stray_neighbour,
            unknown.clone(),
            true,
        ),
        (
            "bridge fdb append 00:00:00:00:00:00 dst 10.77.0.99 dev silk-vtep",
            &stray_forward,
            unknown.clone(),
            true,
        ),
        ("ip route add 10.99.0.0/24 via 10.255.56.0 dev silk-vtep", &stray_route, unknown.clone(), true),
        ("ip link set silk-vtep down", vtep, unknown.clone(), true),
        ("ip addr flush dev silk-vtep", vtep, unknown.clone(), true),
        ("ip link del silk-vtep", vtep, None, true),
        ("echo 0 > /proc/sys/net/ipv4/conf/silk-vtep/forwarding", vtep, unknown.clone(), false),
        ("echo 0 > /proc/sys/net/ipv4/conf/eth0/forwarding", vtep, unknown.clone(), false),
        ("ip link set s-010255066002 down", &link_key, unknown.clone(), true),
        ("ip link set s-010255066002 arp on", &link_key, unknown.clone(), true),
        ("ip link set s-010255066002 alias nonsense", &link_key, unknown.clone(), true),
        ("ip link set s-010255066002 address 02:00:00:00:00:01", &link_key, unknown.clone(), true),
        ("ip addr flush dev s-010255066002", &link_key, unknown.clone(), true),
        ("ip neigh del 10.255.66.2 dev s-010255066002", &link_key, unknown.clone(), true),
        (
            "ip neigh replace 10.255.66.2 lladdr ee:ee:0a:ff:42:02 nud stale dev s-010255066002",
            &link_key,
            unknown.clone(),
            true,
        ),
        (
            "ip link set s-010255066002 arp on && \
             ip neigh add 10.255.66.2 lladdr ee:ee:0a:ff:42:02 nud permanent dev s-010255066002",
            &link_key,
            unknown.clone(),
            true,
        ),
        ("echo 0 > /proc/sys/net/ipv4/conf/s-010255066002/rp_filter", &link_key, unknown.clone(), false),
        (
            "echo 0 > /proc/sys/net/ipv4/ip_forward; echo 1 > /proc/sys/net/ipv4/ip_forward; \
          echo 0 > /proc/sys/net/ipv4/ip_forward",
            &link_key,
            unknown.clone(),
            false,
        ),
    ];
    let (_container, link) = cell.container("10.255.66.2").await;
    let wanted = [Object::Vtep(cell.vtep.clone()), Object::Peer(peer), Object::Link(link)];
    assert_eq!(cell.see().await, held(wanted.clone()));

    for (command, key, expected, announced) in cases {
        let mut events = listen(&cell);
        cell.space.run(command);
        if announced {
            assert_eq!(next(&mut events, command).await, Event::Changed, "{command}");
        }
        let seen = cell.see().await;
        assert_eq!(seen.get(key).cloned(), expected, "{command}: {seen:?}");

        // What an audit makes of it: lay what differs, take away what nobody wants.
        mend(&mut cell, &wanted).await;
        assert_eq!(cell.see().await, held(wanted.clone()), "mended after: {command}");
    }
}

pub(crate) async fn mend(cell: &mut Cell, wanted: &[Object]) {
    let seen = cell.see().await;
    let vtep_is_new = seen.get(&Key::Vtep).is_none_or(|belief| *belief == Belief::Unknown);
    let differs = wanted.iter().filter(|object| {
        let on_vtep = !matches!(object, Object::Link(_));
        seen.get(&key(object)) != Some(&Belief::Holds((*object).clone())) || (vtep_is_new && on_vtep)
    });
    let mut step = lay(differs.map(|object| (object.clone(), seen.get(&key(object)).cloned())));
    let unwanted = seen.iter().filter(|(k, _)| !wanted.iter().any(|object| key(object) == **k));
    let remove = unwanted.map(|(key, was)| Change { key: key.clone(), was: Some(was.clone()), will: None });
    step.remove = remove.collect();
    cell.apply(&step, &Namespaces::new()).await;
}

#[tokio::test]
async fn a_changed_mtu_is_seen_as_what_it_is() {
    let mut cell = Cell::new().await;
    cell.lay_vtep().await;
    let (_container, spec) = cell.container("10.255.66.2").await;
    cell.space.run("ip link set silk-vtep mtu 1300 && ip link set s-010255066002 mtu 1200");
    let mut vtep = cell.vtep.clone();
    vtep.mtu = 1300;
    assert_eq!(cell.see().await, held([Object::Vtep(vtep), Object::Link(link("10.255.66.2", 1200))]));
    let wanted = [Object::Vtep(cell.vtep.clone()), Object::Link(spec)];
    mend(&mut cell, &wanted).await;
    assert!(cell.space.run("ip link show s-010255066002").contains("mtu 1450"));
}

/// An entry that traffic leaves behind is neither drift nor news.
#[tokio::test]
async fn unanswered_neighbours_are_not_drift() {
    let mut cell = Cell::new().await;
    cell.lay_vtep().await;
    cell.space.run("ip neigh add 10.255.9.9 dev silk-vtep nud failed && ip neigh add 10.255.9.8 dev silk-vtep nud incomplete");
    assert_eq!(cell.see().await, held([Object::Vtep(cell.vtep.clone())]));
}

#[tokio::test]
async fn a_link_that_is_gone_is_announced_by_its_address() {
    let mut cell = Cell::new().await;
    let (container, _) = cell.container("10.255.66.2").await;
    let (other, _) = cell.container("10.255.66.3").await;
    let mut events = listen(&cell);
    other.run("ip link del eth0");
    while next(&mut events, "link deleted inside").await != Event::LinkGone(addr("10.255.66.3")) {}
    // The last one to hold the namespace goes: the kernel takes the link with it.
    drop(container);
    while next(&mut events, "namespace gone").await != Event::LinkGone(addr("10.255.66.2")) {}
    assert_eq!(cell.see().await, held([]));
    let gone = Change { key: Key::Link(addr("10.255.66.2")), was: Some(Belief::Unknown), will: None };
    cell.apply(&Step { remove: vec![gone], ..Step::default() }, &Namespaces::new()).await;
}
