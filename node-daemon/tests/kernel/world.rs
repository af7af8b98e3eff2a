//! A cell in a network namespace of its own, and the tools of the trade as oracles.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::Arc;

use weft_model::address::OverlayAddr;
use weft_model::cell::{Belief, Change, Key, Object, PeerSpec, Scope, Seen, Step, VtepSpec};
use weft_model::link::LinkSpec;
use weft_node::kernel::{Kernel, Namespaces, Netlink, inside};

pub(crate) use crate::space::Space;

/// A cell with an underlay device of its own.
pub(crate) struct Cell {
    pub(crate) space: Space,
    pub(crate) kernel: Netlink,
    pub(crate) vtep: VtepSpec,
}

impl Cell {
    pub(crate) async fn new() -> Self {
        let space = Space::new();
        space.run(
            "ip link add eth0 type veth peer name far && ip addr add 10.77.0.11/24 dev eth0 && \
             ip link set eth0 up && ip link set far up",
        );
        Self::on(space, "10.77.0.11", "10.255.66.0/24").await
    }

    /// In a namespace that has the underlay address already.
    pub(crate) async fn on(space: Space, underlay: &str, subnet: &str) -> Self {
        let mut kernel = space.netlink();
        let local = underlay.parse().expect("underlay");
        let device = kernel.underlay(local, None).await.expect("underlay device");
        let subnet: weft_model::subnet::OverlaySubnet = subnet.parse().expect("subnet");
        let vtep = VtepSpec {
            name: "silk-vtep".parse().expect("name"),
            port: 4789,
            local,
            device: device.index,
            mac: subnet.hardware_addr(),
            mtu: device.mtu - 50,
            addr: subnet.gateway(),
            overlay: "10.255.0.0/16".parse().expect("overlay"),
        };
        Self { space, kernel, vtep }
    }

    pub(crate) fn peer(&self, subnet: &str, underlay: &str) -> PeerSpec {
        let subnet: weft_model::subnet::OverlaySubnet = subnet.parse().expect("subnet");
        let underlay = underlay.parse().expect("underlay");
        PeerSpec { subnet, underlay, mac: subnet.hardware_addr(), source: self.vtep.addr }
    }

    /// Applies a step that must succeed.
    pub(crate) async fn apply(&mut self, step: &Step, namespaces: &Namespaces) {
        let outcome = self.kernel.apply(step, namespaces).await;
        assert!(outcome.failed.is_empty(), "{:?}", outcome.failed);
    }

    pub(crate) async fn lay(&mut self, objects: impl IntoIterator<Item = Object>) {
        let step = lay(objects.into_iter().map(|object| (object, None)));
        self.apply(&step, &Namespaces::new()).await;
    }

    pub(crate) async fn lay_vtep(&mut self) {
        self.lay([Object::Vtep(self.vtep.clone())]).await;
    }

    /// A container with its link, laid on both ends.
    pub(crate) async fn container(&mut self, addr: &str) -> (Space, LinkSpec) {
        let (space, spec) = (Space::new(), link(addr, self.vtep.mtu));
        self.apply(&lay([(Object::Link(spec.clone()), None)]), &at(&spec, &space)).await;
        inside::lay(Arc::clone(&space.0), &spec).await.expect("laid inside");
        (space, spec)
    }

    pub(crate) async fn see(&mut self) -> Seen {
        self.kernel.see(Scope::Links).await.expect("seen")
    }
}

pub(crate) fn addr(text: &str) -> OverlayAddr {
    OverlayAddr::new(text.parse::<Ipv4Addr>().expect("address"))
}

pub(crate) fn link(at: &str, mtu: u32) -> LinkSpec {
    let handle = format!("handle-{}", at.replace('.', "-")).parse().expect("handle");
    LinkSpec { addr: addr(at), handle, interface: "eth0".parse().expect("name"), mtu }
}

pub(crate) fn at(spec: &LinkSpec, space: &Space) -> Namespaces {
    Namespaces::from([(spec.addr, Arc::clone(&space.0))])
}

pub(crate) fn key(object: &Object) -> Key {
    match object {
        Object::Vtep(_) => Key::Vtep,
        Object::Peer(spec) => Key::Peer(spec.subnet),
        Object::Link(spec) => Key::Link(spec.addr),
        Object::Shaping(spec) => Key::Shaping(spec.addr),
        Object::Firewall(_) => panic!("the firewall's parts have names of their own"),
    }
}

pub(crate) fn lay(objects: impl IntoIterator<Item = (Object, Option<Belief>)>) -> Step {
    let change = |(object, was)| Change { key: key(&object), was, will: Some(object) };
    Step { lay: objects.into_iter().map(change).collect(), ..Step::default() }
}

/// What a step has to take away of what is seen.
pub(crate) fn remove(seen: &Seen) -> Step {
    let change =
        |(key, was): (&Key, &Belief)| Change { key: key.clone(), was: Some(was.clone()), will: None };
    Step { remove: seen.iter().rev().map(change).collect(), ..Step::default() }
}

pub(crate) fn held(objects: impl IntoIterator<Item = Object>) -> Seen {
    objects.into_iter().map(|object| (key(&object), Belief::Holds(object))).collect()
}

/// The lines of an oracle's output, blanks made one, sorted.
pub(crate) fn lines(text: &str) -> BTreeSet<String> {
    text.lines().map(|line| line.split_whitespace().collect::<Vec<_>>().join(" ")).collect()
}
