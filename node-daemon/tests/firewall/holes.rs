//! No holes: what a container, a neighbour on the underlay or another cell might try. Each attempt is made twice, with the
//! firewall and without: one that would come to nothing anyway proves nothing.

use std::net::Ipv4Addr;

use weft_model::firewall::explain::Probe;
use weft_model::lease::{Lease, Peers};
use weft_model::profile::Profile;

use crate::cast::open;
use crate::packet::{Mouth, Packet};
use crate::space::Space;
use crate::watch::{Fate, Place, Speaker, Watch};
use crate::world::{CELL, Instance, Site, VTEP, World};

const TCP: Probe = Probe::Tcp { port: 80 };
const UDP: Probe = Probe::Udp { port: 80 };
const PING: Probe = Probe::Icmp { kind: 8, code: 0 };
const GRE: Probe = Probe::Other { protocol: 47 };
const FRAMES: Probe = Probe::Udp { port: 4789 };
const KINDS: [Probe; 4] = [TCP, UDP, PING, GRE];
const FAR: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

/// A cell in which all containers reach each other and the world, and no device checks sources.
pub(crate) struct Lair {
    pub(crate) world: World,
    pub(crate) watch: Watch,
    pub(crate) neighbour: Instance,
    pub(crate) intruder: Instance,
}

impl Lair {
    pub(crate) async fn new(policy: bool) -> Self {
        let mut world = World::new(policy).await;
        let neighbour = world.site.add(open(), &[]).await;
        let intruder = world.site.add(open(), &[]).await;
        let watch = Watch::new(&mut world, &neighbour).await;
        world.site.check_no_sources();
        Self { world, watch, neighbour, intruder }
    }

    pub(crate) fn fates(&self, packets: &[Packet]) -> Vec<Fate> {
        self.watch.fates(&Speaker::of(&self.intruder), packets)
    }

    /// With the firewall, this becomes of all of them; without, each arrives somewhere.
    fn only_without_table(&self, packets: &[Packet], with: &Fate) {
        let others = |as_expected: &dyn Fn(&Fate) -> bool| {
            let fates = packets.iter().zip(self.fates(packets));
            fates.filter(|(_, fate)| !as_expected(fate)).collect::<Vec<_>>()
        };
        let wrong = others(&|fate| fate == with);
        assert!(wrong.is_empty(), "not {with:?}: {wrong:#?}");
        self.world.site.lose_table();
        let wrong = others(&|fate| matches!(fate, Fate::Arrived { .. }));
        assert!(wrong.is_empty(), "not there without the firewall: {wrong:#?}");
    }
}

/// Numbers them.
pub(crate) fn packets(all: impl IntoIterator<Item = (Ipv4Addr, Ipv4Addr, Probe)>) -> Vec<Packet> {
    let packet = |(id, (from, to, probe)): (u16, _)| Packet::new(from, to, probe, id);
    (1..).zip(all).map(packet).collect()
}

pub(crate) fn each<A: Copy, B: Copy>(a: &[A], b: &[B]) -> Vec<(A, B)> {
    a.iter().flat_map(|a| b.iter().map(|b| (*a, *b))).collect()
}

/// dataplane.md, "Spoofed sources, IPv6".
#[tokio::test]
async fn a_packet_with_anothers_address_goes_nowhere() {
    let lair = Lair::new(false).await;
    // The cell's own addresses too, and the world's, which their kernels would not take for a source.
    for space in [&lair.world.site.space, &lair.world.outside] {
        space.run("echo 1 > /proc/sys/net/ipv4/conf/all/accept_local");
    }
    let nobody = Ipv4Addr::new(10, 255, 30, 99);
    let remote = Ipv4Addr::new(10, 255, 40, 2);
    let sources = [nobody, remote, Ipv4Addr::new(9, 9, 9, 9), CELL, weft_model::link::GATEWAY, VTEP];
    let mut all: Vec<_> = each(&sources, &[FAR, lair.neighbour.addr]);
    all.push((lair.neighbour.addr, FAR));
    all.extend([nobody, remote].map(|from| (from, CELL)));
    let all = each(&all, &KINDS).into_iter().map(|((from, to), probe)| (from, to, probe));
    lair.only_without_table(&packets(all), &Fate::Dropped);
}

#[tokio::test]
async fn its_own_address_passes() {
    let lair = Lair::new(false).await;
    let own = lair.intruder.addr;
    let all = packets(KINDS.map(|probe| (own, FAR, probe)));
    let arrived = Fate::Arrived { at: Place::Outside, seen: CELL };
    assert!(lair.fates(&all).iter().all(|fate| *fate == arrived));
    let all = packets(KINDS.map(|probe| (own, lair.neighbour.addr, probe)));
    let arrived = Fate::Arrived { at: Place::Neighbour, seen: own };
    assert!(lair.fates(&all).iter().all(|fate| *fate == arrived));
}

/// dataplane.md, "To the world": on no way to the world.
#[tokio::test]
async fn no_other_device_leads_out() {
    let lair = Lair::new(false).await;
    let there = Ipv4Addr::new(198, 18, 0, 5);
    lair.only_without_table(&packets(KINDS.map(|probe| (lair.intruder.addr, there, probe))), &Fate::Refused);
}

#[tokio::test]
async fn a_device_that_becomes_a_way_leads_out_and_one_that_was_no_longer() {
    let mut lair = Lair::new(false).await;
    let there = Ipv4Addr::new(198, 18, 0, 5);
    let all = packets(KINDS.map(|probe| (lair.intruder.addr, there, probe)));
    let way = |name: &str| name.parse().expect("name");
    lair.world.site.cell.ways([way("eth0"), way("eth1")].into());
    lair.world.site.settle().await;
    assert!(lair.fates(&all).iter().all(|fate| matches!(fate, Fate::Arrived { at: Place::Outside, .. })));
    lair.world.site.space.run("conntrack -F");
    lair.world.site.cell.ways([way("eth0")].into());
    lair.world.site.settle().await;
    assert!(lair.fates(&all).iter().all(|fate| *fate == Fate::Refused));
}

/// dataplane.md, "To the world", 1, "To the cell", 1: whatever security groups allow.
#[tokio::test]
async fn frames_of_the_overlay_cannot_be_made_by_hand() {
    let lair = Lair::new(false).await;
    let peer = Ipv4Addr::new(10, 0, 16, 15);
    let to = [peer, CELL, VTEP, weft_model::link::GATEWAY, FAR, lair.neighbour.addr];
    let mut all = packets(to.map(|to| (lair.intruder.addr, to, FRAMES)));
    for packet in &mut all[2..4] {
        packet.options = true;
    }
    lair.only_without_table(&all, &Fate::Refused);
}

/// The ports are in the first piece only; the second one has nothing that a rule could look at.
#[tokio::test]
async fn pieces_of_packets_are_judged_as_wholes() {
    let lair = Lair::new(false).await;
    let peer = Ipv4Addr::new(10, 0, 16, 15);
    let (own, mouth) = (lair.intruder.addr, Mouth::in_space(&lair.intruder.space));
    let all = packets([(own, peer, FRAMES), (own, peer, UDP)]);
    let fates = || {
        let send = || {
            for packet in &all {
                packet.fragments().iter().for_each(|piece| mouth.send_bytes(packet.to, piece));
            }
        };
        let report = lair.watch.heard(&Speaker::of(&lair.intruder), send);
        all.iter().map(|packet| report.fate(packet)).collect::<Vec<_>>()
    };
    let arrived = |seen| Fate::Arrived { at: Place::Outside, seen };
    // Nothing is told about pieces: what was refused is refused as a whole, by the address of its first.
    assert!(matches!(&fates()[..], [Fate::Refused | Fate::Dropped, fate] if *fate == arrived(CELL)));
    lair.world.site.lose_table();
    assert_eq!(fates(), [arrived(own), arrived(own)]);
}

/// dataplane.md, "To the cell": broadcasts and multicasts are for it too.
#[tokio::test]
async fn the_cell_does_not_hear_what_is_sent_to_all() {
    let lair = Lair::new(false).await;
    // As a container may do that has the right to: its end has no ARP.
    lair.intruder.space.run(
        "mac=$(ip neigh show 169.254.0.1 | awk '{ print $5 }'); ip link set eth0 arp on && \
         ip neigh replace 169.254.0.1 lladdr $mac nud permanent dev eth0",
    );
    let to = [[255, 255, 255, 255], [10, 0, 255, 255], [224, 0, 0, 1]].map(Ipv4Addr::from);
    let all = each(&to, &[UDP, Probe::Udp { port: 53 }]);
    let all = packets(all.into_iter().map(|(to, probe)| (lair.intruder.addr, to, probe)));
    lair.only_without_table(&all, &Fate::Dropped);
}

/// dataplane.md, "Spoofed sources, IPv6": a link that belongs to no container we know.
#[tokio::test]
async fn a_link_that_is_only_named_like_ours_sends_nothing_and_is_not_reached() {
    let lair = Lair::new(true).await;
    let space = Space::new();
    lair.world.site.space.run(&format!(
        "ip link add s-stranger type veth peer name eth0 netns {} && ip addr add 169.254.0.1 peer 10.255.30.200 \
         dev s-stranger && ip link set s-stranger up && echo 1 > /proc/sys/net/ipv4/conf/s-stranger/forwarding && \
         echo 0 > /proc/sys/net/ipv4/conf/s-stranger/rp_filter",
        space.path()
    ));
    space.run(
        "ip addr add 10.255.30.200/32 dev eth0 && ip link set eth0 up && \
         ip route add default dev eth0 onlink via 169.254.0.1",
    );
    for (space, end) in [(&space, "eth0"), (&lair.world.site.space, "s-stranger")] {
        // The kernel sends nothing by a device before it has noticed that both its ends are up.
        space.run(&format!("until ip -br link show {end} | grep -q ' UP '; do sleep 0.01; done"));
    }
    // Its own address, which nobody has; and that of a container which may send anything.
    let stranger = Speaker::at(&space, [10, 255, 30, 200].into());
    let from = [stranger.addr, lair.intruder.addr];
    let all = each(&each(&from, &[FAR, lair.neighbour.addr, CELL]), &[TCP, UDP, PING]);
    let all = packets(all.into_iter().map(|((from, to), probe)| (from, to, probe)));
    let to_it = packets([TCP, UDP, PING].map(|probe| (lair.intruder.addr, stranger.addr, probe)));
    // It is heard where it is: the watch has no ears there.
    let ears = crate::packet::Ears::in_space(&space, &[1, 6, 17]);
    let fates = lair.watch.fates(&stranger, &all);
    assert!(fates.iter().all(|fate| *fate == Fate::Dropped), "{fates:?}");
    assert!(lair.fates(&to_it).iter().all(|fate| *fate == Fate::Refused));
    assert!(ears.hear().is_empty());
    lair.world.site.lose_table();
    let fates = lair.watch.fates(&stranger, &all);
    assert!(fates.iter().all(|fate| matches!(fate, Fate::Arrived { .. })), "{fates:?}");
    lair.fates(&to_it);
    let heard = |packet: &Packet| ears.hear().iter().any(|heard| heard.id == packet.id);
    assert!(to_it.first().is_some_and(heard));
}

/// dataplane.md, "To the world", 3: "by rules that still hold". The address has another container, the connection an
/// entry that has seen no answer.
#[tokio::test]
async fn what_yesterdays_rules_let_out_is_asked_again() {
    let mut lair = Lair::new(false).await;
    let lease = Lease::new(CELL.try_into().expect("cell"), "10.255.30.0/28".parse().expect("subnet"));
    lair.world.site.cell.leases(Some(lease), &Peers::new());
    let first = lair.world.site.add(open(), &[]).await;
    let packet = [Packet::new(first.addr, FAR, UDP, 1)];
    let arrived = Fate::Arrived { at: Place::Outside, seen: CELL };
    let sent = |lair: &Lair, from: &Instance| lair.watch.fates(&Speaker::of(from), &packet).remove(0);
    assert_eq!(sent(&lair, &first), arrived);
    let site: &mut Site = &mut lair.world.site;
    site.remove(&first).await;
    site.cell.forgotten(&site.cell.roster().resting().clone());
    let again = loop {
        let next = site.add(Profile::default(), &[]).await;
        if next.addr == first.addr {
            break next;
        }
    };
    let entry = || lair.world.site.space.run(&format!("conntrack -L -s {} 2>/dev/null || true", first.addr));
    assert!(entry().contains("UNREPLIED"), "{}", entry());
    assert_eq!(sent(&lair, &again), Fate::Refused);
    assert!(entry().contains("UNREPLIED"), "{}", entry());
}
