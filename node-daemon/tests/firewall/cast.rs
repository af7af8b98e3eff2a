//! The containers of the table of packets, as their platform asked for them.

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::num::NonZeroU32;

use weft_model::asg::{AddrRange, EgressRule, PortRange, Traffic};
use weft_model::profile::{ConnectionRate, HostService, Profile, Settings, Transport, Workload};

use crate::space::Space;
use crate::table::Who;
use crate::world::{CELL, Instance, Site, World};

/// A world with everybody of the table in it.
pub(crate) struct Cast {
    pub(crate) world: World,
    pub(crate) other: Site,
    pub(crate) containers: BTreeMap<Who, Instance>,
}

pub(crate) fn rule(index: u32, first: [u8; 4], last: [u8; 4], traffic: Traffic, log: bool) -> EgressRule {
    EgressRule { to: AddrRange::new(first.into(), last.into()).expect("a range"), traffic, log, index }
}

pub(crate) fn ports(first: u16, last: u16) -> PortRange {
    PortRange::new(first, last).expect("a range")
}

/// All addresses and protocols.
pub(crate) fn everything() -> EgressRule {
    rule(0, [0, 0, 0, 0], [255, 255, 255, 255], Traffic::All, false)
}

pub(crate) fn open() -> Profile {
    Profile { rules: vec![everything()], ..Profile::default() }
}

fn security_groups() -> Vec<EgressRule> {
    let all = [203, 0, 113, 0];
    vec![
        rule(0, [9, 9, 9, 9], [9, 9, 9, 10], Traffic::Tcp(ports(80, 81)), false),
        rule(1, [9, 9, 9, 9], [9, 9, 9, 10], Traffic::Tcp(ports(443, 443)), false),
        rule(2, [9, 9, 9, 9], [9, 9, 9, 9], Traffic::Udp(ports(53, 53)), true),
        rule(3, [8, 8, 8, 8], [8, 8, 8, 8], Traffic::Icmp { kind: Some(8), code: Some(0) }, false),
        rule(4, [9, 9, 9, 10], [9, 9, 9, 10], Traffic::Icmp { kind: None, code: None }, false),
        rule(5, all, [203, 0, 113, 255], Traffic::All, true),
        rule(6, [172, 16, 0, 0], [172, 31, 255, 255], Traffic::All, false),
    ]
}

fn settings() -> Settings {
    let network = |text: &str| text.parse().expect("network");
    let service = |transport, port: u16| HostService {
        transport,
        addr: [169, 254, 0, 3].into(),
        port: port.try_into().expect("port"),
    };
    let mut settings = Settings {
        dns_servers: vec![[169, 254, 0, 2].into(), [8, 8, 4, 4].into()],
        host_services: vec![service(Transport::Tcp, 9001), service(Transport::Udp, 9002)],
        ..Settings::default()
    };
    settings.deny_networks.always = vec![network("172.16.66.0/24")];
    settings.deny_networks.running = vec![network("172.16.67.0/24")];
    settings.deny_networks.staging = vec![network("172.16.68.0/24")];
    settings
}

fn profile(who: Who) -> Profile {
    let all = |workload| Profile { workload, settings: settings(), rules: vec![everything()] };
    match who {
        Who::App => {
            let mut settings = settings();
            let count = |n| NonZeroU32::new(n).expect("not none");
            let rate = ConnectionRate { burst: count(5), per_sec: count(2), dry_run: false, log: true };
            settings.outbound_connections.rate = Some(rate);
            Profile { workload: Workload::Running, settings, rules: security_groups() }
        }
        Who::Staging => all(Workload::Staging),
        Who::Other => all(Workload::Other),
        Who::Open | Who::Trusted => {
            let mut profile = all(Workload::Running);
            profile.settings.no_masquerade = Some("203.0.113.0/24".parse().expect("network"));
            profile.settings.deny_cloud_metadata = who == Who::Open;
            profile
        }
        _ => Profile::default(),
    }
}

impl Cast {
    pub(crate) async fn new(policy: bool) -> Self {
        let mut world = World::new(policy).await;
        let mut other = world.second_cell().await;
        let mut containers = BTreeMap::new();
        for (last, who) in (2..).zip([Who::App, Who::Bare, Who::Staging, Who::Other, Who::Open, Who::Trusted])
        {
            let ports: &[(u16, u16)] = match who {
                Who::App => &[(61_000, 8080), (61_001, 7000), (60_099, 9999)],
                Who::Bare => &[(61_003, 8080)],
                _ => &[],
            };
            let instance = world.site.add(profile(who), ports).await;
            assert_eq!(instance.addr, Ipv4Addr::new(10, 255, 30, last), "as the table has it");
            containers.insert(who, instance);
        }
        containers.insert(Who::Remote, other.add(Profile::default(), &[]).await);
        Self { world, other, containers }
    }

    /// The cell leaves the choice of an address to the kernel.
    pub(crate) fn of(&self, who: Who) -> (&Space, Ipv4Addr) {
        match who {
            Who::Cell => (&self.world.site.space, Ipv4Addr::UNSPECIFIED),
            Who::Outside => (&self.world.outside, [10, 0, 16, 77].into()),
            Who::Far => (&self.world.outside, [198, 51, 100, 1].into()),
            Who::Side => (&self.world.outside, [192, 168, 77, 2].into()),
            container => (&self.containers[&container].space, self.containers[&container].addr),
        }
    }

    /// To whom a packet belongs, if nothing stopped it; and its port there.
    pub(crate) fn behind(&self, to: Ipv4Addr, port: u16, tcp: bool) -> (&Space, (Ipv4Addr, u16)) {
        let mapped = match port {
            61_000 => Some((Who::App, 8080)),
            61_001 => Some((Who::App, 7000)),
            60_099 => Some((Who::App, 9999)),
            61_003 => Some((Who::Bare, 8080)),
            _ => None,
        };
        if let Some((who, port)) = mapped.filter(|_| tcp && to == CELL) {
            let (space, addr) = self.of(who);
            return (space, (addr, port));
        }
        let holder = self.containers.values().find(|instance| instance.addr == to);
        let space = match (holder, to.octets()) {
            (Some(instance), _) => &instance.space,
            (None, [10, 0, 16, 14] | [10, 255, 30, 0] | [169, 254, 0, _] | [192, 168, 77, 1]) => {
                &self.world.site.space
            }
            (None, [10, 255, 40, 0]) => &self.other.space,
            _ => &self.world.outside,
        };
        (space, (to, port))
    }
}
