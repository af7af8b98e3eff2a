//! A container's limits in the kernel: laid, seen, announced when somebody changes them, and told apart from what others
//! have on the same devices (docs/dataplane.md, "Bandwidth").

use weft_model::bandwidth::{Bandwidth, Limit, ShapingSpec};
use weft_model::cell::{Belief, Key, Object, Step};
use weft_node::kernel::Namespaces;
use weft_node::kernel::events::Event;

use crate::drift::{listen, mend, next};
use crate::space::Space;
use crate::world::{Cell, addr, at, held, key, lay, link, remove};

const LINK: &str = "s-010255066002";
const DEVICE: &str = "i-010255066002";

fn limit(rate: u64, burst: u32) -> Option<Limit> {
    Some(Limit::new(rate, burst).expect("a limit"))
}

fn shaping(to: Option<Limit>, from: Option<Limit>) -> Object {
    Object::Shaping(ShapingSpec { addr: addr("10.255.66.2"), bandwidth: Bandwidth { to, from } })
}

/// Rates below and above what 32 bits hold, bursts that take no time and minutes; each way alone, and both.
#[tokio::test]
async fn what_is_laid_is_seen() {
    let mut cell = Cell::new().await;
    let (slow, usual, fast) = (limit(1000, 60_000), limit(1_310_720, 131_072), limit(6_000_000_000, 1 << 30));
    // As runtimes ask that know of no burst: the time that it takes is beyond what the kernel shows.
    let endless = limit(125_000, 268_435_456);
    for (to, from) in
        [(slow, None), (None, slow), (usual, fast), (fast, usual), (slow, slow), (endless, endless)]
    {
        let (_container, spec) = cell.container("10.255.66.2").await;
        let wanted = [Object::Link(spec), shaping(to, from)];
        cell.lay([wanted[1].clone()]).await;
        assert_eq!(cell.see().await, held(wanted.clone()));
        // Other limits, in place.
        let other = shaping(from.or(usual), to.and(usual));
        cell.apply(&lay([(other.clone(), Some(Belief::Holds(wanted[1].clone())))]), &Namespaces::new()).await;
        assert_eq!(cell.see().await, held([wanted[0].clone(), other]));
        let seen = cell.see().await;
        cell.apply(&remove(&seen), &Namespaces::new()).await;
        assert_eq!(cell.see().await, held([]));
        assert_eq!(cell.space.run("ip -o link show type ifb"), "");
    }
}

/// Link and limits in one step, as an ADD lays them; and limits taken from a link that stays.
#[tokio::test]
async fn limits_come_with_the_link_and_can_go_without_it() {
    let mut cell = Cell::new().await;
    let (space, spec) = (Space::new(), link("10.255.66.2", 1450));
    let wanted = [Object::Link(spec.clone()), shaping(limit(100_000, 10_000), limit(200_000, 20_000))];
    let step = lay(wanted.clone().map(|object| (object, None)));
    cell.apply(&step, &at(&spec, &space)).await;
    assert_eq!(cell.see().await, held(wanted.clone()));
    let mut only = remove(&held([wanted[1].clone()]));
    only.remove.retain(|change| change.key == key(&wanted[1]));
    cell.apply(&Step { remove: only.remove, ..Step::default() }, &Namespaces::new()).await;
    assert_eq!(cell.see().await, held([wanted[0].clone()]));
    assert_eq!(
        cell.space
            .run(&format!("tc qdisc show dev {LINK} root; tc filter show dev {LINK} ingress"))
            .matches("tbf")
            .count(),
        0
    );
}

#[tokio::test]
async fn damage_is_announced_and_mended() {
    let mut cell = Cell::new().await;
    let (_container, spec) = cell.container("10.255.66.2").await;
    let wanted = [Object::Link(spec), shaping(limit(1_310_720, 131_072), limit(655_360, 65_536))];
    cell.lay([wanted[1].clone()]).await;
    let shaped = Key::Shaping(addr("10.255.66.2"));
    for damage in [
        format!("tc qdisc del dev {LINK} root"),
        format!("tc qdisc replace dev {LINK} root handle 7765: tbf rate 1mbit burst 128kb latency 25ms"),
        format!("tc qdisc replace dev {LINK} root handle 7765: tbf rate 10485760 burst 64kb limit 163840"),
        format!("tc qdisc replace dev {DEVICE} root pfifo"),
        format!("tc qdisc del dev {LINK} ingress"),
        format!("tc filter del dev {LINK} ingress"),
        format!(
            "tc filter add dev {LINK} ingress protocol all prio 9 u32 match u32 0 0 action mirred egress redirect dev lo"
        ),
        format!("ip link set {DEVICE} down"),
        format!("ip link del {DEVICE}"),
    ] {
        let mut events = listen(&cell);
        cell.space.run(&damage);
        assert_eq!(next(&mut events, &damage).await, Event::Changed, "{damage}");
        let seen = cell.see().await;
        assert_ne!(seen.get(&shaped), Some(&Belief::Holds(wanted[1].clone())), "{damage}");
        mend(&mut cell, &wanted).await;
        assert_eq!(cell.see().await, held(wanted.clone()), "mended after: {damage}");
    }
}

/// Another plugin's limits on a container that has none of ours.
#[tokio::test]
async fn what_others_limit_is_theirs() {
    let mut cell = Cell::new().await;
    let (_container, spec) = cell.container("10.255.66.2").await;
    cell.space.run(&format!(
        "tc qdisc add dev {LINK} root handle 1: tbf rate 1mbit burst 16kb latency 25ms && \
         ip link add bwp0123456789ab type ifb && tc qdisc add dev {LINK} ingress"
    ));
    assert_eq!(cell.see().await, held([Object::Link(spec)]));
}
