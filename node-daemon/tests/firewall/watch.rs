//! Many packets at once, and what became of each: ears at every place where one may arrive, and a last packet of which it
//! is known that it does.

use std::collections::BTreeMap;
use std::net::{Ipv4Addr, TcpListener, UdpSocket};
use std::time::{Duration, Instant};

use weft_model::firewall::explain::Probe;

use crate::cast::open;
use crate::packet::{Ears, Heard, Mouth, Packet};
use crate::space::Space;
use crate::world::{Instance, World};

/// Protocols that are listened to: ICMP, TCP, UDP; GRE, ESP, and one that is nobody's (RFC 3692).
const PROTOCOLS: [u8; 6] = [1, 6, 17, 47, 50, 253];

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Place {
    Outside,
    Cell,
    Neighbour,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Fate {
    /// There, with that source.
    Arrived {
        at: Place,
        seen: Ipv4Addr,
    },
    /// ICMP port unreachable came back to where it was sent.
    Refused,
    Dropped,
}

/// Sends packets, and hears what is told about them.
pub(crate) struct Speaker {
    pub(crate) addr: Ipv4Addr,
    mouth: Mouth,
    ears: Ears,
}

pub(crate) struct Watch {
    ears: Vec<(Place, Ears)>,
    /// May send anything.
    marker: Speaker,
    /// The services of the cell at 169.254.0.3: TCP 9001, UDP 9002. A closed port would refuse by itself.
    _services: (TcpListener, UdpSocket),
}

impl Speaker {
    pub(crate) fn of(instance: &Instance) -> Self {
        Self::at(&instance.space, instance.addr)
    }

    pub(crate) fn at(space: &Space, addr: Ipv4Addr) -> Self {
        Self { addr, mouth: Mouth::in_space(space), ears: Ears::in_space(space, &[1]) }
    }

    pub(crate) fn send(&self, packet: &Packet) {
        self.mouth.send(packet);
    }

    pub(crate) fn packet(&self, to: impl Into<Ipv4Addr>, probe: Probe, id: u16) -> Packet {
        Packet::new(self.addr, to.into(), probe, id)
    }
}

impl Watch {
    /// The outside and the neighbour answer nothing from now on.
    pub(crate) async fn new(world: &mut World, neighbour: &Instance) -> Self {
        for space in [&world.outside, &neighbour.space] {
            space.run(
                "nft 'add table ip mute; add chain ip mute out { type filter hook output priority 0; policy drop; }'",
            );
        }
        // Raw packets of the outside's own are not its answers.
        world.outside.run("nft 'add rule ip mute out meta mark 1 accept'");
        let marker = world.site.add(open(), &[]).await;
        let ears = |space| Ears::in_space(space, &PROTOCOLS);
        let cell = &world.site.space;
        let services =
            cell.enter(|| (TcpListener::bind("169.254.0.3:9001"), UdpSocket::bind("169.254.0.3:9002")));
        Self {
            ears: vec![
                (Place::Outside, ears(&world.outside)),
                (Place::Cell, ears(cell)),
                (Place::Neighbour, ears(&neighbour.space)),
            ],
            marker: Speaker::of(&marker),
            _services: (services.0.expect("listening"), services.1.expect("bound")),
        }
    }

    /// What became of each packet, by its place in the list. Their identifications are different from each other.
    pub(crate) fn fates(&self, speaker: &Speaker, packets: &[Packet]) -> Vec<Fate> {
        let heard = self.heard(speaker, || packets.iter().for_each(|packet| speaker.mouth.send(packet)));
        packets.iter().map(|packet| heard.fate(packet)).collect()
    }

    /// What was heard of all that was sent.
    pub(crate) fn heard(&self, speaker: &Speaker, send: impl FnOnce() + Send) -> Report {
        for ears in self.ears.iter().map(|(_, ears)| ears).chain([&speaker.ears]) {
            ears.hear();
        }
        let last = self.marker.packet([192, 0, 2, 1], Probe::Udp { port: 9 }, u16::MAX);
        let in_order = || {
            // What one processor sends through veths stays in order: behind the last packet nothing is under way.
            let mut processor = rustix::thread::CpuSet::new();
            processor.set(rustix::thread::sched_getcpu());
            rustix::thread::sched_setaffinity(None, &processor).expect("kept on one processor");
            send();
            self.marker.mouth.send(&last);
        };
        std::thread::scope(|scope| scope.spawn(in_order).join()).expect("sent");
        let mut report = Report { arrived: BTreeMap::new(), refused: Vec::new() };
        let deadline = Instant::now() + Duration::from_secs(20);
        let mut ended = false;
        while !ended {
            assert!(Instant::now() < deadline, "the last packet has not arrived");
            for (place, ears) in &self.ears {
                let heard = ears.hear();
                ended |= heard.iter().any(|heard| heard.id == last.id && heard.to == last.to);
                report.arrived.entry(*place).or_default().extend(heard);
            }
        }
        for (place, ears) in &self.ears {
            report.arrived.entry(*place).or_default().extend(ears.hear());
        }
        report.refused = speaker.ears.hear().iter().filter_map(Heard::refuses).collect();
        report
    }
}

/// What was heard.
#[derive(Debug)]
pub(crate) struct Report {
    pub(crate) arrived: BTreeMap<Place, Vec<Heard>>,
    /// What was told to be refused.
    pub(crate) refused: Vec<Heard>,
}

impl Report {
    pub(crate) fn fate(&self, packet: &Packet) -> Fate {
        let same = |heard: &Heard| (heard.id, heard.protocol) == (packet.id, packet.probe.protocol());
        let arrived = self.arrived.iter().flat_map(|(place, all)| all.iter().map(|heard| (*place, heard)));
        let arrived: Vec<_> = arrived.filter(|(_, heard)| same(heard)).collect();
        let refused = self.refused.iter().filter(|heard| same(heard)).count();
        match (&arrived[..], refused) {
            ([], 0) => Fate::Dropped,
            ([], 1) => Fate::Refused,
            ([(at, heard)], 0) => Fate::Arrived { at: *at, seen: heard.from },
            // A port that is closed there refuses by itself.
            ([(Place::Cell, heard)], 1) => Fate::Arrived { at: Place::Cell, seen: heard.from },
            (arrived, refused) => panic!("{packet:?}: {arrived:?}, and refused {refused} times"),
        }
    }
}
