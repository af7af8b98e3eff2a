//! Random profiles and random packets: what becomes of each in the kernel is what `explain` says, and that is what the
//! security groups say.
//!
//! `WEFT_PACKETS` sets how many packets are sent (1,000).

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestCaseError, TestError, TestRunner};
use tokio::runtime::Runtime;
use weft_model::asg::{AddrRange, EgressRule, Traffic};
use weft_model::firewall::explain::{Explanation, Probe, Route, Verdict, explain};
use weft_model::profile::{HostService, Profile, Transport, Workload};
use weft_node::kernel::conntrack::Connections;

use crate::cast::ports;
use crate::packet::Packet;
use crate::watch::{Fate, Place, Speaker, Watch};
use crate::world::{CELL, World};

/// Sent under one profile.
const BATCH: usize = 100;
/// Rules and packets meet here.
const BASE: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 4);
const NEIGHBOUR: Ipv4Addr = Ipv4Addr::new(10, 255, 30, 2);
const MAPPED: u16 = 61_000;

/// Others than those around [`BASE`]: metadata, the cell's own, containers that are and are not, a device that is no way.
const SPECIAL: [[u8; 4]; 13] = [
    [9, 9, 9, 9],
    [169, 254, 169, 254],
    [100, 100, 100, 200],
    [168, 63, 129, 16],
    [10, 255, 30, 2],
    [10, 0, 16, 14],
    [10, 0, 16, 14],
    [169, 254, 0, 1],
    [169, 254, 0, 3],
    [10, 255, 30, 0],
    // No container ever gets the last one.
    [10, 255, 30, 255],
    [10, 255, 40, 5],
    [198, 18, 0, 5],
];
const PORTS: [u16; 9] = [22, 53, 80, 4789, 9001, 9002, 32_526, MAPPED, 65_535];

fn addr(offset: u32) -> Ipv4Addr {
    (u32::from(BASE) + offset).into()
}

fn rule() -> impl Strategy<Value = EgressRule> {
    let near = (0u32..14, 0u32..14).prop_map(|(a, b)| (addr(a.min(b)), addr(a.max(b))));
    let whole = Just((Ipv4Addr::UNSPECIFIED, Ipv4Addr::BROADCAST));
    let special = proptest::sample::select(&SPECIAL[..]).prop_map(|a| (a.into(), a.into()));
    let span = prop_oneof![12 => near, 1 => whole, 2 => special];
    let range = prop_oneof![
        1 => Just(ports(0, u16::MAX)),
        4 => (0u16..12, 0u16..12).prop_map(|(a, b)| ports(a.min(b), a.max(b))),
        1 => proptest::sample::select(&PORTS[..]).prop_map(|port| ports(port, port)),
    ];
    let any_or = || proptest::option::of(0u8..16);
    let traffic = prop_oneof![
        1 => Just(Traffic::All),
        3 => range.clone().prop_map(Traffic::Tcp),
        3 => range.prop_map(Traffic::Udp),
        3 => (any_or(), any_or()).prop_map(|(kind, code)| Traffic::Icmp { kind, code }),
    ];
    (span, traffic, any::<bool>()).prop_map(|((first, last), traffic, log)| EgressRule {
        to: AddrRange::new(first, last).expect("a range"),
        traffic,
        log,
        index: 0,
    })
}

fn profile() -> impl Strategy<Value = Profile> {
    let network = (0u32..14, 28u8..33).prop_map(|(offset, prefix)| {
        let network = Ipv4Network::new(addr(offset), prefix).expect("a prefix");
        Ipv4Network::new(network.network(), prefix).expect("a prefix")
    });
    let networks = || proptest::collection::vec(network.clone(), 0..3);
    let workload = prop_oneof![Just(Workload::Running), Just(Workload::Staging), Just(Workload::Other)];
    let settings = (any::<bool>(), any::<bool>(), networks(), networks(), networks(), any::<bool>());
    (proptest::collection::vec(rule(), 0..41), workload, settings).prop_map(
        |(mut rules, workload, settings)| {
            for (index, rule) in (0..).zip(&mut rules) {
                rule.index = index;
            }
            let mut profile = Profile { workload, rules, ..Profile::default() };
            let (log_all, deny_metadata, always, running, staging, services) = settings;
            profile.settings.log_all = log_all;
            profile.settings.deny_cloud_metadata = deny_metadata;
            profile.settings.deny_networks = weft_model::profile::DenyNetworks { always, running, staging };
            if services {
                let service = |transport, port: u16| HostService {
                    transport,
                    addr: [169, 254, 0, 3].into(),
                    port: port.try_into().expect("a port"),
                };
                profile.settings.host_services =
                    vec![service(Transport::Tcp, 9001), service(Transport::Udp, 9002)];
            }
            profile
        },
    )
}

#[derive(Debug, Clone, Copy)]
struct Shot {
    to: Ipv4Addr,
    probe: Probe,
    options: bool,
}

fn shot() -> impl Strategy<Value = Shot> {
    let to = prop_oneof![
        3 => (0u32..16).prop_map(addr),
        2 => proptest::sample::select(&SPECIAL[..]).prop_map(Ipv4Addr::from),
    ];
    let port = prop_oneof![3 => 0u16..14, 2 => proptest::sample::select(&PORTS[..])];
    let probe = prop_oneof![
        3 => port.clone().prop_map(|port| Probe::Tcp { port }),
        3 => port.prop_map(|port| Probe::Udp { port }),
        3 => (0u8..20, 0u8..18).prop_map(|(kind, code)| Probe::Icmp { kind, code }),
        1 => proptest::sample::select(&[47u8, 50, 253][..]).prop_map(|protocol| Probe::Other { protocol }),
    ];
    (to, probe, proptest::bool::weighted(0.1)).prop_map(|(to, probe, options)| Shot { to, probe, options })
}

struct Trial {
    world: World,
    watch: Watch,
    routes: BTreeMap<Ipv4Addr, Route>,
    sent: usize,
    /// Verdicts that were given, so that none is missing.
    verdicts: BTreeMap<String, usize>,
}

impl Trial {
    async fn new() -> Self {
        let mut world = World::new(true).await;
        let neighbour = world.site.add(Profile::default(), &[(MAPPED, 8080)]).await;
        assert_eq!(neighbour.addr, NEIGHBOUR);
        let watch = Watch::new(&mut world, &neighbour).await;
        let mut routes = BTreeMap::new();
        for to in (0..16).map(addr).chain(SPECIAL.map(Ipv4Addr::from)) {
            routes.insert(to, world.site.route(to).await);
        }
        Self { world, watch, routes, sent: 0, verdicts: BTreeMap::new() }
    }

    async fn run(&mut self, profile: Profile, shots: &[Shot]) -> Result<(), TestCaseError> {
        let rules = profile.rules.clone();
        let instance = self.world.site.add(profile, &[]).await;
        let speaker = Speaker::of(&instance);
        let packet = |(id, shot): (u16, &Shot)| Packet {
            options: shot.options,
            ..speaker.packet(shot.to, shot.probe, id)
        };
        let packets: Vec<Packet> = (1..).zip(shots).map(packet).collect();
        let fates = self.watch.fates(&speaker, &packets);
        let (program, inputs) = (self.world.site.program(), self.world.site.cell.inputs());
        let mut wrong = Vec::new();
        for (packet, fate) in packets.iter().zip(fates) {
            let routes = |to: Ipv4Addr| self.routes[&to].clone();
            let told =
                explain(&program, inputs, packet.from, packet.to, packet.probe, routes).expect("whole");
            let expected = expected(&told, packet);
            *self.verdicts.entry(format!("{:?}", told.verdict)).or_default() += 1;
            if fate != expected || !agrees(&told, &rules, packet) {
                wrong.push(format!("{packet:?}: {fate:?}, told {told:?}"));
            }
        }
        self.sent += packets.len();
        self.world.site.remove(&instance).await;
        // So that addresses come back, and none of their connections with them.
        let resting = self.world.site.cell.roster().resting().clone();
        self.world.site.space.enter(|| Connections::open()?.forget(&resting)).expect("forgotten");
        self.world.site.cell.forgotten(&resting);
        prop_assert!(wrong.is_empty(), "{:#?}", wrong);
        Ok(())
    }
}

fn expected(told: &Explanation, packet: &Packet) -> Fate {
    match told.verdict {
        Verdict::Dropped => Fate::Dropped,
        Verdict::Refused if is_not_answered(packet.probe) => Fate::Dropped,
        Verdict::Refused => Fate::Refused,
        Verdict::Allowed => {
            let at = match packet.to.octets() {
                _ if told.mapped_to.is_some() => Place::Neighbour,
                [10, 255, 30, 2] => Place::Neighbour,
                [10, 0, 16, 14] | [10, 255, 30, 0] | [169, 254, 0, _] => Place::Cell,
                _ => Place::Outside,
            };
            let seen = if told.masqueraded && is_tracked(packet.probe) { CELL } else { packet.from };
            Fate::Arrived { at, seen }
        }
    }
}

/// Where the program leaves it to the security groups, they say so one by one.
fn agrees(told: &Explanation, rules: &[EgressRule], packet: &Packet) -> bool {
    let covered = || rules.iter().any(|rule| rule.covers(packet.to, packet.probe));
    match told.rule.as_deref().and_then(|rule| rule.split_once(": ")) {
        Some((_, "security group")) => covered(),
        Some((_, "no security group")) => !covered(),
        _ => true,
    }
}

/// ICMP that is neither question nor answer is not answered by an ICMP error (RFC 1122, 3.2.2; `icmp_pointers` in
/// net/ipv4/icmp.c).
fn is_not_answered(probe: Probe) -> bool {
    matches!(probe, Probe::Icmp { kind, .. } if !matches!(kind, 0 | 8 | 13..=18))
}

/// Of ICMP, only questions begin a connection; nothing else is translated.
fn is_tracked(probe: Probe) -> bool {
    !matches!(probe, Probe::Icmp { kind, .. } if ![8, 13, 15, 17].contains(&kind))
}

#[test]
fn the_kernel_does_with_random_packets_what_explain_says() {
    let packets: usize =
        std::env::var("WEFT_PACKETS").map_or(1_000, |n| n.parse().expect("WEFT_PACKETS is a number"));
    let cases = u32::try_from(packets.div_ceil(BATCH)).expect("so many");
    let config = Config { cases, max_shrink_iters: 300, failure_persistence: None, ..Config::default() };
    let runtime = Runtime::new().expect("a runtime");
    let trial = RefCell::new(runtime.block_on(Trial::new()));
    let strategy = (profile(), proptest::collection::vec(shot(), BATCH));
    TestRunner::new(config)
        .run(&strategy, |(profile, shots)| runtime.block_on(trial.borrow_mut().run(profile, &shots)))
        .unwrap_or_else(|fault| match fault {
            TestError::Fail(why, (profile, _)) => {
                let rules: Vec<String> = profile.rules.iter().map(ToString::to_string).collect();
                panic!("{why}\nwith {:?} {:?} {rules:#?}", profile.workload, profile.settings)
            }
            TestError::Abort(why) => panic!("{why}"),
        });
    let trial = trial.into_inner();
    assert!(trial.sent >= packets, "{}", trial.sent);
    let often = |given: &str| trial.verdicts.get(given).is_some_and(|times| *times > packets / 100);
    assert!(["Allowed", "Refused"].into_iter().all(often), "{:?}", trial.verdicts);
}
