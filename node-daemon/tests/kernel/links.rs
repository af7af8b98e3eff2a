//! Containers' links: both ends as silk lays them, names that are taken, many at once, and with a read-only /proc/sys.

use std::net::UdpSocket;
use std::process::Command;
use std::sync::Arc;
use std::thread;
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use tokio::runtime::Handle;
use weft_model::cell::{Belief, Key, Object};
use weft_model::link::{LinkSpec, index};
use weft_model::reason::Reason;
use weft_node::calls::Remembered;
use weft_node::kernel::{Kernel, Namespaces, inside};

use crate::world::{Cell, Space, at, held, key, lay, link, remove};

/// What a caller remembers of a container that nobody else has changed.
fn as_laid(spec: &LinkSpec) -> Remembered {
    Remembered {
        handle: spec.handle.clone(),
        interface: spec.interface.clone(),
        addr: Some(spec.addr),
        mtu: None,
        default_route: true,
    }
}

#[tokio::test]
async fn both_ends_are_as_silk_lays_them() {
    let mut cell = Cell::new().await;
    let (container, spec) = cell.container("10.255.66.2").await;
    assert_eq!(cell.see().await, held([Object::Link(spec.clone())]));
    inside::check(Arc::clone(&container.0), &spec, as_laid(&spec)).await.expect("whole");

    let host = cell.space.run("ip -d link show s-010255066002");
    for part in [
        "NOARP,UP,LOWER_UP",
        "mtu 1450",
        "link/ether aa:aa:0a:ff:42:02",
        "veth",
        "addrgenmode none",
        "alias eth0 handle-10-255-66-2",
    ] {
        assert!(host.contains(part), "{part} in {host}");
    }
    let text = |space: &Space, command: &str| space.run(command).trim().to_owned();
    assert!(
        text(&cell.space, "ip -o addr show s-010255066002")
            .contains("inet 169.254.0.1 peer 10.255.66.2/32 scope link")
    );
    assert_eq!(
        text(&cell.space, "ip neigh show dev s-010255066002"),
        "10.255.66.2 lladdr ee:ee:0a:ff:42:02 PERMANENT"
    );
    assert_eq!(
        text(&cell.space, "ip route get 10.255.66.2").lines().next(),
        Some("10.255.66.2 dev s-010255066002 src 169.254.0.1 uid 0 ")
    );

    let inner = container.run("ip -d link show eth0");
    for part in ["NOARP,UP,LOWER_UP", "mtu 1450", "link/ether ee:ee:0a:ff:42:02", "veth"] {
        assert!(inner.contains(part), "{part} in {inner}");
    }
    assert!(
        text(&container, "ip -o addr show eth0").contains("inet 10.255.66.2 peer 169.254.0.1/32 scope link")
    );
    assert_eq!(text(&container, "ip neigh show dev eth0"), "169.254.0.1 lladdr aa:aa:0a:ff:42:02 PERMANENT");
    assert_eq!(text(&container, "ip route show default"), "default via 169.254.0.1 dev eth0 src 10.255.66.2");
    assert!(text(&container, "ip link show lo").contains("UP"));
    for (space, device) in [(&cell.space, "s-010255066002"), (&container, "eth0")] {
        assert_eq!(text(space, &format!("cat /proc/sys/net/ipv6/conf/{device}/disable_ipv6")), "1");
        assert_eq!(text(space, &format!("cat /proc/sys/net/ipv4/conf/{device}/rp_filter")), "1");
        assert_eq!(space.run(&format!("ip -6 addr show dev {device}")), "");
    }
    assert_eq!(text(&cell.space, "cat /proc/sys/net/ipv4/conf/s-010255066002/forwarding"), "1");

    cell.apply(&remove(&held([Object::Link(spec)])), &Namespaces::new()).await;
    assert!(!container.try_run("ip link show eth0").0, "gone inside as soon as it is gone outside");
    assert_eq!(cell.see().await, held([]));
}

/// And is not dropped by an end that is not ready to send.
#[tokio::test]
async fn the_first_packet_to_a_new_container_arrives() {
    let (mut cell, runtime) = (Cell::new().await, Handle::current());
    for n in 2..52 {
        let addr = format!("10.255.66.{n}");
        let (container, spec) = (Space::new(), link(&addr, 1450));
        cell.apply(&lay([(Object::Link(spec.clone()), None)]), &at(&spec, &container)).await;
        let ear = container.enter(|| UdpSocket::bind(("0.0.0.0", 7000)).expect("bound"));
        ear.set_read_timeout(Some(Duration::from_secs(2))).expect("set");
        let heard = cell.space.enter(|| {
            runtime.block_on(inside::lay(Arc::clone(&container.0), &spec)).expect("laid");
            UdpSocket::bind(("0.0.0.0", 0))
                .expect("bound")
                .send_to(b"x", (addr.as_str(), 7000))
                .expect("sent");
            ear.recv(&mut [0; 1])
        });
        assert_eq!(heard.ok(), Some(1), "container {n}");
    }
}

#[tokio::test]
async fn damage_inside_is_named() {
    let mut cell = Cell::new().await;
    for (n, (command, what)) in [
        ("ip link set eth0 mtu 1000", "MTU"),
        ("ip link set eth0 down", "down"),
        ("ip addr flush dev eth0", "address"),
        ("ip neigh del 169.254.0.1 dev eth0", "neighbour"),
        ("ip route del default", "default route"),
        ("ip link set eth0 down && ip link set eth0 name eth7", "name"),
        ("ip link del eth0", "gone"),
    ]
    .into_iter()
    .enumerate()
    {
        let (container, spec) = cell.container(&format!("10.255.66.{}", n + 2)).await;
        container.run(command);
        let why = inside::check(Arc::clone(&container.0), &spec, as_laid(&spec)).await.expect_err(command);
        assert!(
            matches!(&why, Reason::Damaged { what: said, .. } if said.contains(what)),
            "{command}: {why}"
        );
    }
}

#[tokio::test]
async fn what_a_later_plugin_changed_is_no_damage() {
    let mut cell = Cell::new().await;
    let (container, spec) = cell.container("10.255.66.2").await;
    container.run("ip link set eth0 mtu 1000");
    container.run("ip route del default");
    let remembered = Remembered { mtu: Some(1000), default_route: false, ..as_laid(&spec) };
    inside::check(Arc::clone(&container.0), &spec, remembered).await.expect("as it was left");
}

/// A container's namespace is known to exist by its number, whether its link does or not.
#[tokio::test]
async fn a_namespace_that_ended_is_told_from_a_link_that_is_gone() {
    let mut cell = Cell::new().await;
    let (container, spec) = cell.container("10.255.66.2").await;
    let (_kept, other) = cell.container("10.255.66.3").await;
    container.run("ip link del eth0");
    let numbers = cell.kernel.namespaces().await.expect("read");
    assert!(numbers.contains(&index(spec.addr)) && numbers.contains(&index(other.addr)), "{numbers:x?}");
    drop(container);
    let deadline = Instant::now() + Duration::from_secs(10);
    while cell.kernel.namespaces().await.expect("read").contains(&index(spec.addr)) {
        assert!(Instant::now() < deadline, "the namespace has not ended");
        tokio::time::sleep(Duration::from_millis(10)).await;
    }
    assert!(cell.kernel.namespaces().await.expect("read").contains(&index(other.addr)));
}

#[tokio::test]
async fn a_taken_interface_is_told_from_a_taken_host_name() {
    let mut cell = Cell::new().await;
    let (space, spec) = (Space::new(), link("10.255.66.2", 1450));
    space.run("ip link add eth0 type bridge");
    let step = lay([(Object::Link(spec.clone()), None)]);
    let outcome = cell.kernel.apply(&step, &at(&spec, &space)).await;
    let taken = Reason::InterfaceTaken { interface: "eth0".into() };
    assert_eq!(outcome.failed.get(&Key::Link(spec.addr)), Some(&taken));
    assert_eq!(cell.see().await, held([]), "nothing is left of it");
    assert!(space.run("ip -d link show eth0").contains("bridge"), "and theirs is untouched");

    cell.space.run("ip link add s-010255066002 type bridge");
    let outcome = cell.kernel.apply(&step, &at(&spec, &Space::new())).await;
    let why = outcome.failed.get(&Key::Link(spec.addr)).expect("refused");
    assert!(matches!(why, Reason::Kernel { .. }), "{why}");
    assert!(!cell.space.run("ip link show s-010255066002").contains("NOARP,UP"), "theirs was not configured");
}

#[tokio::test]
async fn what_is_left_of_a_former_link_makes_way() {
    let mut cell = Cell::new().await;
    let (former, spec) = cell.container("10.255.66.2").await;
    let (space, other) = (Space::new(), link("10.255.66.2", 1300));
    let step = lay([(Object::Link(other.clone()), Some(Belief::Unknown))]);
    cell.apply(&step, &at(&other, &space)).await;
    inside::lay(Arc::clone(&space.0), &other).await.expect("laid");
    assert_eq!(cell.see().await, held([Object::Link(other)]));
    let why = inside::check(Arc::clone(&former.0), &spec, as_laid(&spec))
        .await
        .expect_err("the former one is gone");
    assert!(matches!(why, Reason::Damaged { .. }), "{why}");
}

#[tokio::test]
async fn a_link_that_is_gone_cannot_be_mended_from_the_cells_end() {
    let mut cell = Cell::new().await;
    let spec = link("10.255.66.2", 1450);
    let outcome = cell.kernel.apply(&lay([(Object::Link(spec.clone()), None)]), &Namespaces::new()).await;
    let why = outcome.failed.get(&Key::Link(spec.addr)).expect("refused").to_string();
    assert!(why.contains("s-010255066002 is gone"), "{why}");
}

#[tokio::test]
async fn what_is_no_namespace_is_refused() {
    let mut cell = Cell::new().await;
    let spec = link("10.255.66.2", 1450);
    let file = Space(Arc::new(std::fs::File::open("/dev/null").expect("file").into()));
    let outcome = cell.kernel.apply(&lay([(Object::Link(spec.clone()), None)]), &at(&spec, &file)).await;
    assert!(outcome.failed.contains_key(&Key::Link(spec.addr)));
    inside::lay(Arc::clone(&file.0), &spec).await.expect_err("no namespace");
    assert_eq!(cell.see().await, held([]));
}

/// bpm mounts /proc/sys read-only. The mount is made in a mount namespace of the test's own thread.
#[tokio::test]
async fn ipv6_goes_off_though_proc_sys_is_read_only() {
    let mut cell = Cell::new().await;
    let (space, spec) = (Space::new(), link("10.255.66.2", 1450));
    cell.apply(&lay([(Object::Link(spec.clone()), None)]), &at(&spec, &space)).await;
    let laid = {
        let (space, spec, runtime) = (space.clone(), spec.clone(), Handle::current());
        thread::spawn(move || {
            unshare(CloneFlags::CLONE_NEWNS).expect("a new mount namespace");
            let mount = "mount --make-rprivate / && mount --bind /proc/sys /proc/sys && mount -o remount,ro,bind /proc/sys";
            assert!(Command::new("sh").args(["-c", mount]).status().expect("sh").success());
            let read_only =
                std::fs::write("/proc/sys/net/ipv6/conf/lo/disable_ipv6", "0").expect_err("read-only");
            assert_eq!(read_only.kind(), std::io::ErrorKind::ReadOnlyFilesystem);
            runtime.block_on(inside::lay(Arc::clone(&space.0), &spec))
        })
    };
    laid.join().expect("thread").expect("laid");
    assert_eq!(space.run("cat /proc/sys/net/ipv6/conf/eth0/disable_ipv6").trim(), "1");
}

#[tokio::test]
async fn two_hundred_links_at_once_and_one_by_one() {
    let mut cell = Cell::new().await;
    cell.lay_vtep().await;
    let containers: Vec<_> =
        (2..202).map(|n| (Space::new(), link(&format!("10.255.66.{n}"), 1450))).collect();
    let objects = || containers.iter().map(|(_, spec)| Object::Link(spec.clone()));
    let wanted = held(objects().chain([Object::Vtep(cell.vtep.clone())]));

    let namespaces = containers.iter().map(|(space, spec)| (spec.addr, Arc::clone(&space.0))).collect();
    let begin = Instant::now();
    cell.apply(&lay(objects().map(|object| (object, None))), &namespaces).await;
    println!("200 links in one step: {:?}", begin.elapsed());
    let begin = Instant::now();
    assert_eq!(cell.see().await, wanted);
    println!("seeing 200 links: {:?}", begin.elapsed());
    let begin = Instant::now();
    cell.apply(&remove(&held(objects())), &Namespaces::new()).await;
    println!("deleting 200 links in one step: {:?}", begin.elapsed());
    assert_eq!(cell.see().await, held([Object::Vtep(cell.vtep.clone())]));

    let (mut create, mut inner, mut delete) = (Vec::new(), Vec::new(), Vec::new());
    for (space, spec) in &containers {
        let object = Object::Link(spec.clone());
        let begin = Instant::now();
        cell.apply(&lay([(object.clone(), None)]), &at(spec, space)).await;
        create.push(begin.elapsed());
        let begin = Instant::now();
        inside::lay(Arc::clone(&space.0), spec).await.expect("laid");
        inner.push(begin.elapsed());
    }
    assert_eq!(cell.see().await, wanted);
    for object in objects() {
        let begin = Instant::now();
        cell.apply(&remove(&held([object.clone()])), &Namespaces::new()).await;
        delete.push(begin.elapsed());
        assert!(!cell.see().await.contains_key(&key(&object)));
    }
    for (what, mut times) in [("create", create), ("inside", inner), ("delete", delete)] {
        times.sort();
        let (min, p50, p95): (Duration, Duration, Duration) = (times[0], times[100], times[190]);
        println!("one link, {what}: min {min:?} p50 {p50:?} p95 {p95:?}");
    }
}
