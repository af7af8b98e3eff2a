//! The VXLAN device and its peers: laid, seen back equal, changed, taken away, and as silk's tools show them.

use std::time::Instant;

use weft_model::cell::{Belief, Change, Key, Object, Step, Stray};
use weft_model::reason::Reason;
use weft_node::kernel::{Kernel, Namespaces};

use crate::world::{Cell, Space, held, key, lay, lines, remove};

#[tokio::test]
async fn everything_is_laid_seen_changed_and_taken_away() {
    let mut cell = Cell::new().await;
    assert_eq!(cell.see().await, held([]), "nothing of ours at first");

    let peers =
        ["10.255.56.0/24", "10.255.7.0/24", "10.255.0.188/32"].map(|subnet| cell.peer(subnet, "10.77.0.12"));
    let mut objects = vec![Object::Vtep(cell.vtep.clone())];
    objects.extend(peers.iter().cloned().map(Object::Peer));
    cell.lay(objects.clone()).await;
    assert_eq!(cell.see().await, held(objects.clone()));

    cell.apply(&Step::default(), &Namespaces::new()).await;
    cell.lay(objects.clone()).await;
    assert_eq!(cell.see().await, held(objects.clone()), "laying again changes nothing");

    let mut moved = peers[0];
    moved.underlay = "10.77.0.13".parse().expect("underlay");
    moved.mac = "02:00:00:00:00:07".parse().expect("mac");
    let mut vtep = cell.vtep.clone();
    vtep.mtu = 1400;
    let wanted = vec![Object::Vtep(vtep), Object::Peer(moved), objects[2].clone(), objects[3].clone()];
    let was = |object: &Object| objects.iter().find(|o| key(o) == key(object)).cloned().map(Belief::Holds);
    let step = lay(wanted.iter().map(|object| (object.clone(), was(object))));
    cell.apply(&step, &Namespaces::new()).await;
    assert_eq!(cell.see().await, held(wanted), "changed in place, nothing of the old MAC is left");

    let seen = cell.see().await;
    cell.apply(&remove(&seen), &Namespaces::new()).await;
    assert_eq!(cell.see().await, held([]));
    cell.apply(&remove(&seen), &Namespaces::new()).await;
    assert!(!cell.space.try_run("ip link show silk-vtep").0, "the device is gone");
}

/// More messages than the socket's buffers hold acknowledgements for.
#[tokio::test]
async fn four_thousand_peers_in_one_step() {
    let mut cell = Cell::new().await;
    let subnets = (1..=4000).map(|n| format!("10.255.{}.{}/28", n / 16, n % 16 * 16));
    let subnets = subnets.filter(|subnet| !subnet.starts_with("10.255.66."));
    let peers: Vec<_> = subnets.map(|subnet| cell.peer(&subnet, "10.77.0.12")).map(Object::Peer).collect();
    let objects: Vec<_> = peers.into_iter().chain([Object::Vtep(cell.vtep.clone())]).collect();
    let begin = Instant::now();
    cell.lay(objects.clone()).await;
    println!("laying 4000 peers: {:?}", begin.elapsed());
    let begin = Instant::now();
    let seen = cell.see().await;
    println!("seeing 4000 peers: {:?}", begin.elapsed());
    assert!(seen == held(objects), "{} seen", seen.len());
    cell.apply(&remove(&seen), &Namespaces::new()).await;
    assert_eq!(cell.see().await, held([]));
}

#[tokio::test]
async fn the_wire_contract_is_silks() {
    let mut cell = Cell::new().await;
    let peers = [cell.peer("10.255.56.0/24", "10.77.0.12"), cell.peer("10.255.0.188/32", "10.77.0.13")];
    cell.lay([Object::Vtep(cell.vtep.clone())].into_iter().chain(peers.map(Object::Peer))).await;

    let device = cell.space.run("ip -d link show silk-vtep");
    for part in [
        "<BROADCAST,MULTICAST,UP,LOWER_UP> mtu 1450",
        "link/ether ee:ee:0a:ff:42:00",
        "vxlan id 1 local 10.77.0.11 dev eth0 srcport 0 0 dstport 4789 nolearning ttl auto ageing 300 udpcsum \
         noudp6zerocsumtx noudp6zerocsumrx gbp",
        "addrgenmode none",
    ] {
        assert!(device.contains(part), "{part} in {device}");
    }
    let address = cell.space.run("ip -4 -o addr show silk-vtep");
    assert!(address.contains("inet 10.255.66.0/16 brd 10.255.255.255 scope link silk-vtep"), "{address}");
    assert_eq!(cell.space.run("ip -6 addr show silk-vtep"), "");
    assert_eq!(
        lines(&cell.space.run("ip -d route show dev silk-vtep")),
        lines(
            "unicast 10.255.0.0/16 proto kernel scope link src 10.255.66.0
             unicast 10.255.56.0/24 via 10.255.56.0 proto boot scope global src 10.255.66.0
             unicast 10.255.0.188 via 10.255.0.188 proto boot scope global src 10.255.66.0"
        )
    );
    assert_eq!(
        lines(&cell.space.run("bridge fdb show dev silk-vtep")),
        lines(
            "ee:ee:0a:ff:38:00 dst 10.77.0.12 self permanent\nee:ee:0a:ff:00:bc dst 10.77.0.13 self permanent"
        )
    );
    assert_eq!(
        lines(&cell.space.run("ip -4 neigh show dev silk-vtep")),
        lines(
            "10.255.56.0 lladdr ee:ee:0a:ff:38:00 PERMANENT\n10.255.0.188 lladdr ee:ee:0a:ff:00:bc PERMANENT"
        )
    );
}

#[tokio::test]
async fn silks_own_device_is_adopted_with_its_peers() {
    let mut cell = Cell::new().await;
    cell.space.run(
        "ip link add silk-vtep address ee:ee:0a:ff:42:00 type vxlan id 1 local 10.77.0.11 dev eth0 dstport 4789 \
         nolearning gbp && ip link set silk-vtep up && \
         ip addr add 10.255.66.0/16 brd 10.255.255.255 scope link dev silk-vtep && \
         ip route add 10.255.56.0/24 via 10.255.56.0 dev silk-vtep src 10.255.66.0 && \
         ip neigh add 10.255.56.0 lladdr ee:ee:0a:ff:38:00 dev silk-vtep && \
         bridge fdb add ee:ee:0a:ff:38:00 dst 10.77.0.12 dev silk-vtep self permanent",
    );
    let index = |text: String| text.split(':').next().map(str::to_owned);
    let before = index(cell.space.run("ip -o link show silk-vtep"));
    let peer = cell.peer("10.255.56.0/24", "10.77.0.12");
    let seen = cell.see().await;
    assert_eq!(seen.get(&Key::Peer(peer.subnet)), Some(&Belief::Holds(Object::Peer(peer))), "{seen:?}");
    cell.lay_vtep().await;
    assert_eq!(index(cell.space.run("ip -o link show silk-vtep")), before, "not made anew");
    assert_eq!(cell.see().await, held([Object::Vtep(cell.vtep.clone()), Object::Peer(peer)]));
    assert_eq!(cell.space.run("ip -6 addr show silk-vtep"), "", "its link-local address is gone");
}

#[tokio::test]
async fn a_device_made_differently_is_made_anew() {
    for differs in
        ["id 2", "id 1 gbp dstport 4790", "id 1 gbp dstport 4789 learning", "id 1 dstport 4789 nolearning"]
    {
        let mut cell = Cell::new().await;
        cell.space.run(&format!(
            "ip link add silk-vtep address ee:ee:0a:ff:42:00 type vxlan {differs} local 10.77.0.11 dev eth0"
        ));
        cell.lay_vtep().await;
        assert_eq!(cell.see().await, held([Object::Vtep(cell.vtep.clone())]), "{differs}");
    }
}

#[tokio::test]
async fn addresses_of_a_former_lease_go() {
    let mut cell = Cell::new().await;
    cell.lay_vtep().await;
    cell.space.run("ip addr add 10.255.1.0/24 dev silk-vtep && ip addr add 10.254.66.0/16 dev silk-vtep");
    assert_eq!(cell.see().await.get(&Key::Vtep), Some(&Belief::Unknown));
    cell.lay_vtep().await;
    assert_eq!(cell.see().await, held([Object::Vtep(cell.vtep.clone())]));
}

#[tokio::test]
async fn somebody_elses_device_is_left_alone() {
    let mut cell = Cell::new().await;
    cell.space.run("ip link add silk-vtep type bridge");
    let step = lay([(Object::Vtep(cell.vtep.clone()), None)]);
    let remove = Step {
        remove: vec![Change { key: Key::Vtep, was: Some(Belief::Unknown), will: None }],
        ..Step::default()
    };
    for step in [step, remove] {
        let outcome = cell.kernel.apply(&step, &Namespaces::new()).await;
        let why = outcome.failed.get(&Key::Vtep).expect("refused");
        assert!(
            matches!(why, Reason::Kernel { subject, why, .. }
            if subject == "silk-vtep" && why.contains("no VXLAN device")),
            "{why}"
        );
    }
    assert_eq!(cell.see().await.get(&Key::Vtep), Some(&Belief::Unknown));
    cell.space.run("ip link show silk-vtep");
}

#[tokio::test]
async fn a_failed_change_does_not_stop_the_others() {
    let mut cell = Cell::new().await;
    // Its gateway is not on the overlay's link, so the kernel refuses the route.
    let (bad, good) = (cell.peer("172.30.1.0/24", "10.77.0.12"), cell.peer("10.255.56.0/24", "10.77.0.12"));
    let objects = [Object::Vtep(cell.vtep.clone()), Object::Peer(bad), Object::Peer(good)];
    let outcome = cell.kernel.apply(&lay(objects.map(|o| (o, None))), &Namespaces::new()).await;
    let failed: Vec<_> = outcome.failed.iter().collect();
    let [(Key::Peer(subnet), Reason::Kernel { why, subject, .. })] = failed.as_slice() else {
        panic!("{failed:?}")
    };
    assert_eq!((*subnet, subject.as_str()), (bad.subnet, "peer 172.30.1.0/24"));
    assert!(
        why.contains("unreachable") && why.contains("gateway"),
        "errno and the kernel's own words: {why}"
    );
    let seen = cell.see().await;
    assert_eq!(seen.get(&Key::Peer(good.subnet)), Some(&Belief::Holds(Object::Peer(good))));
    let strays = [Stray::Neighbour(bad.subnet.gateway()), Stray::Forward(bad.mac)];
    assert!(strays.into_iter().all(|stray| seen.contains_key(&Key::Stray(stray))), "{seen:?}");
}

#[tokio::test]
async fn the_underlay_is_found_by_address_or_by_name() {
    let space = Space::new();
    space.run(
        "ip link add eth0 mtu 9000 type veth peer name eth1 mtu 1400 && ip addr add 10.77.0.11/24 dev eth0",
    );
    let mut kernel = space.netlink();
    let addr = "10.77.0.11".parse().expect("underlay");
    assert_eq!(kernel.underlay(addr, None).await.expect("by address").mtu, 9000);
    let eth1 = "eth1".parse().expect("name");
    assert_eq!(kernel.underlay(addr, Some(&eth1)).await.expect("by name").mtu, 1400);
    let error =
        kernel.underlay("10.77.0.12".parse().expect("underlay"), None).await.expect_err("no such address");
    assert!(error.to_string().contains("10.77.0.12"), "{error}");
    let error =
        kernel.underlay(addr, Some(&"eth7".parse().expect("name"))).await.expect_err("no such device");
    assert!(error.to_string().contains("eth7"), "{error}");
}
