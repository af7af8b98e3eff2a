//! Many rules and many containers: the same verdicts, and one transaction for each change.

use std::net::Ipv4Addr;

use weft_model::asg::{AddrRange, EgressRule, Traffic};
use weft_model::firewall::explain::{Probe, Verdict};
use weft_model::profile::Profile;

use crate::cast::ports;
use crate::packet::Packet;
use crate::ruleset::Ruleset;
use crate::watch::{Fate, Speaker, Watch};
use crate::world::{Instance, World};

/// Of a cell.
const CONTAINERS: u16 = 250;
/// Of each of them.
const RULES: u32 = 100;

fn rule(first: u32, addresses: u32, traffic: Traffic, index: u32) -> EgressRule {
    let to = AddrRange::new(first.into(), (first + addresses - 1).into()).expect("a range");
    EgressRule { to, traffic, log: index % 7 == 3, index }
}

/// One rule for each block of 16 addresses, overlapping the next one by half; ports by the block's number.
fn large_group() -> Vec<EgressRule> {
    let base = u32::from(Ipv4Addr::new(198, 51, 0, 0));
    (0..1_000u32)
        .map(|n| {
            let port = u16::try_from(1_000 + n % 500).expect("a port");
            let traffic = match n % 4 {
                0 | 1 => Traffic::Tcp(ports(port, port + 20)),
                2 => Traffic::Udp(ports(port, port)),
                _ => Traffic::Icmp { kind: Some(8), code: None },
            };
            rule(base + n * 16, 24, traffic, n)
        })
        .collect()
}

#[tokio::test]
async fn a_group_of_a_thousand_rules_says_what_its_rules_say() {
    let mut world = World::new(true).await;
    let neighbour = world.site.add(Profile::default(), &[]).await;
    let watch = Watch::new(&mut world, &neighbour).await;
    let ruleset = Ruleset::of(&world.site.space);
    let rules = large_group();
    let profile = Profile { rules: rules.clone(), ..Profile::default() };
    let before = ruleset.generation();
    let instance = world.site.add(profile.clone(), &[]).await;
    assert_eq!(ruleset.generation(), before + 1, "whatever its size");

    let speaker = Speaker::of(&instance);
    let sample = |n: u16| {
        let rule = &rules[usize::from(n) * 7 % rules.len()];
        // Within, at its ends, and next to it; by its port, and by one that is its neighbours'.
        let to = u32::from(rule.to.first()) + [0, 23, 24, 12][usize::from(n % 4)];
        let probe = match rule.traffic {
            Traffic::Tcp(ports) => Probe::Tcp { port: ports.first() + n % 23 },
            Traffic::Udp(ports) => Probe::Udp { port: ports.first() + n % 2 },
            _ => Probe::Icmp { kind: 8 + 5 * u8::from(n.is_multiple_of(5)), code: 0 },
        };
        speaker.packet(to, probe, n + 1)
    };
    let packets: Vec<Packet> = (0..1_000).map(sample).collect();
    let fates = watch.fates(&speaker, &packets);
    let mut allowed = 0;
    for (packet, fate) in packets.iter().zip(&fates) {
        let said = rules.iter().any(|rule| rule.covers(packet.to, packet.probe));
        allowed += usize::from(said);
        let arrived = matches!(fate, Fate::Arrived { .. });
        assert_eq!((arrived, *fate == Fate::Refused), (said, !said), "{packet:?}: {fate:?}");
    }
    assert!((200..800).contains(&allowed), "{allowed}: there are some of both");
    for packet in packets.iter().step_by(50) {
        let told = world.site.explain(packet.from, packet.to, packet.probe).await;
        let said = rules.iter().any(|rule| rule.covers(packet.to, packet.probe));
        assert_eq!(told.verdict == Verdict::Allowed, said, "{packet:?}: {told:?}");
    }
    // Another with the same profile needs only its elements, one that has it no more takes only these.
    let again = world.site.wish(profile, &[]);
    let before = ruleset.generation();
    world
        .site
        .step(|step| assert!(step.firewall.changes.len() < 10, "{:?}", step.firewall.changes.len()))
        .await;
    assert_eq!(ruleset.generation(), before + 1);
    world.site.lay_inside(&again).await;
}

/// Each reaches ports of its own at a hundred networks.
fn profile_of(n: u16) -> Profile {
    let base = u32::from(Ipv4Addr::new(198, 51, 0, 0));
    let traffic = Traffic::Tcp(ports(1_000 + n, 1_000 + n));
    let rules = (0..RULES).map(|index| rule(base + index * 256, 256, traffic, index)).collect();
    Profile { rules, ..Profile::default() }
}

#[tokio::test]
async fn many_containers_with_many_rules_are_told_apart_and_each_comes_and_goes_at_once() {
    let mut world = World::new(true).await;
    let neighbour = world.site.add(Profile::default(), &[]).await;
    let watch = Watch::new(&mut world, &neighbour).await;
    let ruleset = Ruleset::of(&world.site.space);
    let mut instances: Vec<Instance> = Vec::new();
    // Two are there already; 253 addresses are all there are.
    for n in 0..CONTAINERS {
        let instance = world.site.wish(profile_of(n), &[]);
        let before = ruleset.generation();
        world.site.step(|_| ()).await;
        assert_eq!(ruleset.generation(), before + 1, "container {n}");
        world.site.lay_inside(&instance).await;
        instances.push(instance);
    }
    for (n, instance) in (0..).zip(&instances) {
        let speaker = Speaker::of(instance);
        let network = u8::try_from(n % 100).expect("a network");
        let packet = |third: u8, port, id| speaker.packet([198, 51, third, 9], Probe::Tcp { port }, id);
        let own = 1_000 + n;
        let packets = [
            packet(network, own, 1),
            packet(network, own + 1, 2),
            packet(network, own - 1, 3),
            packet(100, own, 4),
        ];
        let fates = watch.fates(&speaker, &packets);
        assert!(matches!(fates[0], Fate::Arrived { .. }), "container {n}: {fates:?}");
        assert_eq!(fates[1..], [Fate::Refused, Fate::Refused, Fate::Refused], "container {n}");
    }
    for instance in instances.iter().step_by(25) {
        let before = ruleset.generation();
        world.site.cell.drop(&instance.handle);
        world.site.step(|_| ()).await;
        assert_eq!(ruleset.generation(), before + 1);
        assert!(world.site.cell.unsettled(), "nobody has its profile any more");
        world.site.step(|_| ()).await;
        assert_eq!(ruleset.generation(), before + 2);
    }
}
