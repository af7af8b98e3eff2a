//! No holes in the overlay: frames from those who hold no lease, what comes in frames from those who do, and strangers
//! that would pass through the cell. Each attempt is made twice, with the firewall and without.

use std::net::Ipv4Addr;
use std::time::Duration;

use weft_model::address::HardwareAddr;
use weft_model::firewall::Guard;
use weft_model::firewall::explain::Probe;
use weft_model::profile::Profile;

use crate::attempt::{Attempt, Became};
use crate::holes::{Lair, packets};
use crate::packet::{Mouth, Packet, frame};
use crate::watch::{Fate, Place, Report, Speaker};
use crate::world::{CELL, OTHER_CELL, VTEP, World};

/// On the underlay, without a lease.
const NOBODY: Ipv4Addr = Ipv4Addr::new(10, 0, 16, 99);
const REMOTE: Ipv4Addr = Ipv4Addr::new(10, 255, 40, 5);
const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);
const TCP: Probe = Probe::Tcp { port: 8080 };
const UDP: Probe = Probe::Udp { port: 8080 };
const PING: Probe = Probe::Icmp { kind: 8, code: 0 };

impl Lair {
    /// What became of packets that a host of the underlay sends in frames of the overlay.
    fn framed(&self, from: Ipv4Addr, inner: &[Packet]) -> Report {
        let mac = |addr: Ipv4Addr| HardwareAddr::from_ipv4(0xee, addr);
        let outside = Speaker::at(&self.world.outside, from);
        let mouth = Mouth::in_space(&self.world.outside);
        self.world.outside.run("nft insert rule ip mute out udp dport 4789 accept");
        let send = || {
            for packet in inner {
                let outer = Packet::new(from, CELL, Probe::Udp { port: 4789 }, 40_000 + packet.id);
                let bytes = outer.with(&frame(mac([10, 255, 40, 0].into()), mac(VTEP), packet));
                mouth.send_bytes(CELL, &bytes);
            }
        };
        self.watch.heard(&outside, send)
    }

    fn arrives(&self, from: Ipv4Addr, inner: &[Packet]) -> Vec<Fate> {
        let report = self.framed(from, inner);
        inner.iter().map(|packet| report.fate(packet)).collect()
    }
}

/// dataplane.md, "Frames of the overlay".
#[tokio::test]
async fn frames_are_taken_only_from_those_who_hold_a_lease() {
    let lair = Lair::new(false).await;
    let inner = packets([TCP, UDP, PING].map(|probe| (REMOTE, lair.neighbour.addr, probe)));
    let there = Fate::Arrived { at: Place::Neighbour, seen: REMOTE };
    assert_eq!(lair.arrives(NOBODY, &inner), [Fate::Dropped, Fate::Dropped, Fate::Dropped]);
    assert_eq!(lair.arrives(OTHER_CELL, &inner), [there.clone(), there.clone(), there.clone()]);
    lair.world.site.lose_table();
    assert_eq!(lair.arrives(NOBODY, &inner), [there.clone(), there.clone(), there]);
}

/// dataplane.md, "To the cell": whatever address of the cell it is for.
#[tokio::test]
async fn what_comes_by_the_overlay_does_not_reach_the_cell() {
    let mut lair = Lair::new(false).await;
    let to = [VTEP, CELL, [169, 254, 0, 3].into()];
    let kinds = [TCP, UDP, PING, Probe::Tcp { port: 9001 }, Probe::Udp { port: 9002 }];
    let inner = packets(crate::holes::each(&to, &kinds).into_iter().map(|(to, probe)| (REMOTE, to, probe)));
    for guard in [Guard::Ours, Guard::Iptables] {
        if guard == Guard::Iptables {
            lair.world.site.space.run("iptables -A INPUT -m mark --mark 0x01000000/0xff000000 -j REJECT");
        }
        lair.world.site.cell.guard(guard);
        lair.world.site.settle().await;
        let fates = lair.arrives(OTHER_CELL, &inner);
        assert!(fates.iter().all(|fate| *fate == Fate::Dropped), "{guard:?}: {fates:?}");
    }
    lair.world.site.lose_table();
    let fates = lair.arrives(OTHER_CELL, &inner);
    assert!(fates.iter().all(|fate| *fate == Fate::Arrived { at: Place::Cell, seen: REMOTE }), "{fates:?}");
}

/// dataplane.md, "To another cell": what is neither from nor to a container.
#[tokio::test]
async fn strangers_do_not_pass_to_or_from_the_overlay() {
    let lair = Lair::new(false).await;
    let out = packets([TCP, UDP, PING].map(|probe| (REMOTE, FAR, probe)));
    let back = packets([TCP, UDP, PING].map(|probe| (REMOTE, [10, 255, 40, 6].into(), probe)));
    let into = packets([TCP, UDP, PING].map(|probe| ([10, 0, 16, 77].into(), REMOTE, probe)));
    // What of this reaches the peer in frames.
    let carried = |report: &Report, packets: &[Packet]| {
        let heard = &report.arrived[&Place::Outside];
        let inner: Vec<_> =
            heard.iter().filter(|heard| heard.from == CELL).filter_map(|heard| heard.inner()).collect();
        let same = |packet: &&Packet| {
            inner.iter().any(|inner| {
                (inner.id, inner.to, inner.protocol) == (packet.id, packet.to, packet.probe.protocol())
            })
        };
        packets.iter().filter(same).count()
    };
    let outside = Speaker::at(&lair.world.outside, [10, 0, 16, 77].into());
    lair.world.outside.run("nft insert rule ip mute out ip saddr 10.0.16.77 accept");
    let mouth = Mouth::in_space(&lair.world.outside);
    let try_all = || {
        let left = lair.arrives(OTHER_CELL, &out).iter().filter(|fate| **fate != Fate::Dropped).count();
        let returned = carried(&lair.framed(OTHER_CELL, &back), &back);
        let entering = lair.watch.heard(&outside, || into.iter().for_each(|packet| mouth.send(packet)));
        (left, returned, carried(&entering, &into), entering.refused.len())
    };
    assert_eq!(try_all(), (0, 0, 0, 3), "left, returned, entered; and was refused");
    lair.world.site.lose_table();
    assert_eq!(try_all(), (3, 3, 3, 0));
}

/// dataplane.md, "To the cell", across two cells as they are: a service that listens everywhere.
#[tokio::test]
async fn another_cells_services_are_not_reached_by_its_overlay_address() {
    let world = World::new(true).await;
    let mut other = world.second_cell().await;
    let remote = other.add(Profile::default(), &[]).await;
    let attempt = |probe| {
        let (space, from, server) = (&remote.space, remote.addr, &world.site.space);
        let at = (Ipv4Addr::UNSPECIFIED, 22);
        Attempt { space, from, to: VTEP, probe, server, at, patience: Duration::from_secs(10) }.make()
    };
    let kinds = [Probe::Tcp { port: 22 }, Probe::Udp { port: 22 }];
    assert_eq!(kinds.map(attempt), [Became::Refused, Became::Refused]);
    world.site.lose_table();
    assert_eq!(kinds.map(attempt), [Became::Arrived { seen: remote.addr }; 2]);
}
