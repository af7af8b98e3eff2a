//! A cell with its firewall, and the world around it, in network namespaces.
//!
//! ```text
//!   containers ══ s-… ══ cell A (10.0.16.14) ── eth0 ──┐
//!                            │                         br0 (10.0.16.1) ── outside: every address of the internet
//!                            └── eth1 ── 192.168.77.2  │                  (10.0.16.15 as well, while there is no cell B)
//!   containers ══ s-… ══ cell B (10.0.16.15) ── eth0 ──┘
//! ```

use std::net::Ipv4Addr;
use std::sync::Arc;
use std::time::{Duration, Instant};

use weft_model::bandwidth::Bandwidth;
use weft_model::cell::{Cell, CellConfig, Key, Object, OverlayIngress, Step, Wanted};
use weft_model::container::{Handle, Owner, PortMapping};
use weft_model::firewall::explain::{Explanation, Probe, Route, explain};
use weft_model::firewall::{Content, Part, program};
use weft_model::lease::{Lease, Peers};
use weft_model::link::{self, LinkSpec};
use weft_model::profile::Profile;
use weft_node::kernel::{Kernel, Namespaces, Netlink, inside};

use crate::packet::{Ears, Mouth, Packet};
use crate::space::Space;

pub(crate) const CELL: Ipv4Addr = Ipv4Addr::new(10, 0, 16, 14);
pub(crate) const OTHER_CELL: Ipv4Addr = Ipv4Addr::new(10, 0, 16, 15);
pub(crate) const VTEP: Ipv4Addr = Ipv4Addr::new(10, 255, 30, 0);
const SUBNETS: [&str; 2] = ["10.255.30.0/24", "10.255.40.0/24"];

/// A cell, its containers' rules and their links.
pub(crate) struct Site {
    pub(crate) space: Space,
    pub(crate) kernel: Netlink,
    pub(crate) cell: Cell,
    /// Namespaces of containers whose links the next step makes.
    newborn: Namespaces,
    added: u32,
}

/// A running container.
#[derive(Clone)]
pub(crate) struct Instance {
    pub(crate) space: Space,
    pub(crate) addr: Ipv4Addr,
    pub(crate) handle: Handle,
}

/// All that is not the cell.
pub(crate) struct World {
    pub(crate) outside: Space,
    pub(crate) site: Site,
}

/// Where nothing limits the kernel's refusals, so that none comes late; and where routes check no source.
const OPEN: &str = "echo 0 > /proc/sys/net/ipv4/icmp_ratemask; echo 0 > /proc/sys/net/ipv4/conf/all/rp_filter; \
                    echo 0 > /proc/sys/net/ipv4/conf/default/rp_filter";

impl World {
    /// With policies, or with all open within the overlay.
    pub(crate) async fn new(policy: bool) -> Self {
        let outside = Space::new();
        outside.run(OPEN);
        // It answers as every address but those of the private networks.
        outside.run(
            "ip link add br0 type bridge && ip addr add 10.0.16.1/16 dev br0 && ip link set br0 up && \
             ip addr add 10.0.16.15/16 dev br0 && echo 1 > /proc/sys/net/ipv4/ip_nonlocal_bind && \
             ip route add throw 10.0.0.0/8 table local && ip route add throw 192.168.0.0/16 table local && \
             ip route add local 0.0.0.0/0 dev lo && ip route add 10.255.0.0/16 via 10.0.16.14 && \
             ip addr add 10.0.16.77/16 dev br0",
        );
        let site = Site::new(&outside, CELL, policy).await;
        // A way to the cell that is no way to the world.
        let end = site.space.path();
        outside.run(&format!(
            "ip link add side type veth peer name eth1 netns {end} && ip addr add 192.168.77.2/24 dev side && \
             ip link set side up && ip rule add from 192.168.77.2 lookup 77"
        ));
        site.space.run(
            "ip addr add 192.168.77.1/24 dev eth1 && ip link set eth1 up && \
             ip route add 198.18.0.0/15 via 192.168.77.2 && echo 1 > /proc/sys/net/ipv4/conf/eth1/forwarding",
        );
        outside.run("ip route add default via 192.168.77.1 dev side table 77");
        Self { outside, site }
    }

    /// Cell B, instead of an address of the outside. It lets its containers send whatever they like.
    pub(crate) async fn second_cell(&self) -> Site {
        self.outside.run("ip addr del 10.0.16.15/16 dev br0");
        Site::new(&self.outside, OTHER_CELL, false).await
    }
}

impl Instance {
    /// Until packets pass both ways: the kernel raises the cell's end by itself, a little after the container's.
    pub(crate) fn wait_until_it_hears(&self) {
        let (mouth, ears) = (Mouth::in_space(&self.space), Ears::in_space(&self.space, &[1]));
        // A machine that is busy with ending namespaces takes its time.
        let deadline = Instant::now() + Duration::from_secs(60);
        // It is always refused.
        let knock = Packet::new(self.addr, [9, 9, 9, 9].into(), Probe::Udp { port: 4789 }, u16::MAX - 1);
        while !ears.hear().iter().any(|heard| heard.refuses().is_some()) {
            assert!(Instant::now() < deadline, "nothing comes back to {}", self.addr);
            mouth.send(&knock);
            std::thread::sleep(Duration::from_micros(200));
        }
    }
}

impl Site {
    async fn new(outside: &Space, underlay: Ipv4Addr, policy: bool) -> Self {
        let space = Space::new();
        space.run(OPEN);
        let last = underlay.octets()[3];
        outside.run(&format!(
            "ip link add port{last} type veth peer name eth0 netns {} && \
             ip link set port{last} master br0 && ip link set port{last} up",
            space.path()
        ));
        space.run(&format!(
            "ip addr add {underlay}/16 dev eth0 && ip link set eth0 up && ip route add default via 10.0.16.1 && \
             ip addr add 169.254.0.2/32 dev lo && ip addr add 169.254.0.3/32 dev lo"
        ));
        let mut kernel = space.netlink();
        let (underlay, other) = match underlay {
            CELL => (CELL.try_into().expect("cell"), OTHER_CELL.try_into().expect("cell")),
            _ => (OTHER_CELL.try_into().expect("cell"), CELL.try_into().expect("cell")),
        };
        let mut cell = Cell::new(CellConfig {
            vtep_name: "silk-vtep".parse().expect("name"),
            vtep_port: 4789,
            underlay,
            overlay: "10.255.0.0/16".parse().expect("overlay"),
            mtu: None,
            policy,
            cut: false,
            ingress: OverlayIngress::Off,
            log_group: 2312,
        });
        let subnets = SUBNETS.map(|subnet| subnet.parse().expect("subnet"));
        let [own, theirs] = if underlay.get() == CELL { subnets } else { [subnets[1], subnets[0]] };
        cell.underlay(Some(kernel.underlay(underlay, None).await.expect("the underlay's device")));
        cell.ways(["eth0".parse().expect("name")].into());
        cell.leases(Some(Lease::new(underlay, own)), &Peers::from([(other, Lease::new(other, theirs))]));
        let mut site = Self { space, kernel, cell, newborn: Namespaces::new(), added: 0 };
        site.settle().await;
        site
    }

    /// A container with its link. `ports`: of the cell, and of the container.
    pub(crate) async fn add(&mut self, profile: Profile, ports: &[(u16, u16)]) -> Instance {
        let instance = self.wish(profile, ports);
        self.settle().await;
        self.lay_inside(&instance).await;
        instance
    }

    /// One that the next step makes, of no app.
    pub(crate) fn wish(&mut self, profile: Profile, ports: &[(u16, u16)]) -> Instance {
        self.wish_of(Owner::default(), profile, ports)
    }

    pub(crate) fn wish_of(&mut self, owner: Owner, profile: Profile, ports: &[(u16, u16)]) -> Instance {
        let port = |n: u16| n.try_into().expect("a port");
        self.added += 1;
        let name = format!("container-{}", self.added);
        let wanted = Wanted {
            handle: name.parse().expect("handle"),
            interface: "eth0".parse().expect("name"),
            mtu: None,
            owner,
            ports: ports.iter().map(|(h, c)| PortMapping { host: port(*h), container: port(*c) }).collect(),
            network: "weft".into(),
            profile: Arc::new(profile.into()),
            bandwidth: Bandwidth::default(),
            namespace: String::new(),
        };
        let space = Space::bare();
        let container = self.cell.add(wanted).expect("added");
        self.newborn.insert(container.addr, Arc::clone(&space.0));
        Instance { space, addr: container.addr.get(), handle: container.handle.clone() }
    }

    pub(crate) async fn lay_inside(&self, instance: &Instance) {
        let (container, _) = self.cell.roster().get(&instance.handle).expect("it is there");
        let namespace = Arc::clone(&instance.space.0);
        inside::lay(namespace, &LinkSpec::of(container)).await.expect("laid inside");
        instance.wait_until_it_hears();
    }

    pub(crate) async fn remove(&mut self, instance: &Instance) {
        self.cell.drop(&instance.handle);
        self.settle().await;
    }

    /// Until nothing is left to do: profiles go with the step after their last container's.
    pub(crate) async fn settle(&mut self) {
        while self.cell.unsettled() {
            self.step(|_| ()).await;
        }
    }

    /// Carries out what is to be done now; `change` has its say before.
    pub(crate) async fn step(&mut self, change: impl FnOnce(&mut Step)) {
        let mut step = self.cell.diff();
        change(&mut step);
        let outcome = self.kernel.apply(&step, &std::mem::take(&mut self.newborn)).await;
        let faults = self.cell.settle(&step, &outcome);
        assert!(faults.is_empty(), "{faults:?}");
    }

    /// The program, as it is wanted.
    pub(crate) fn program(&self) -> nf_tables::machine::Program {
        program(self.cell.wanted().iter().filter_map(part))
    }

    pub(crate) async fn explain(&mut self, from: Ipv4Addr, to: Ipv4Addr, probe: Probe) -> Explanation {
        let route = self.route(to).await;
        explain(&self.program(), self.cell.inputs(), from, to, probe, |_| route.clone())
            .expect("a whole program")
    }

    pub(crate) async fn route(&mut self, to: Ipv4Addr) -> Route {
        self.kernel.route(to).await.expect("a route, or none")
    }

    /// The cell's end of a container's link.
    pub(crate) fn link(instance: &Instance) -> String {
        link::host_name(weft_model::address::OverlayAddr::new(instance.addr)).to_string()
    }

    /// No device checks sources: what the firewall does not stop is not stopped.
    pub(crate) fn check_no_sources(&self) {
        self.space.run("for f in /proc/sys/net/ipv4/conf/*/rp_filter; do echo 0 > $f; done");
    }

    /// Without any rules: what was refused before passes, if it can be sent at all.
    pub(crate) fn lose_table(&self) {
        self.space.run("nft delete table inet weft");
    }
}

pub(crate) fn part<'a>((key, object): (&'a Key, &'a Object)) -> Option<(&'a Part, &'a Content)> {
    Some((key.part()?, object.content()?))
}
