//! Whom the overlay's routers are let in to, and whose connections are cut, packet by packet: docs/dataplane.md names the
//! paragraphs.

use std::net::Ipv4Addr;
use std::num::NonZeroU16;

use ipnetwork::Ipv4Network;
use nf_tables::machine::{self, Packet, Program};
use weft_model::address::OverlayAddr;
use weft_model::asg::PortRange;
use weft_model::cell::unit::plan;
use weft_model::cell::{Cell, CellConfig, OverlayIngress, Wanted};
use weft_model::container::{Owner, PortMapping};
use weft_model::firewall::explain::{Explanation, Probe, Route, Verdict, explain};
use weft_model::firewall::{INGRESS_CONNECTION, program};
use weft_model::lease::Lease;
use weft_model::link;
use weft_model::policy::{Policy, PolicyTag, by_app};
use weft_model::profile::Transport;
use weft_model::subnet::OverlaySubnet;
use weft_model::walk;

const ROUTER: Ipv4Addr = Ipv4Addr::new(10, 255, 0, 1);
const CELL: Ipv4Addr = Ipv4Addr::new(10, 255, 9, 1);

fn program_of(cell: &Cell) -> Program {
    let wanted = plan(cell.inputs());
    program(wanted.iter().filter_map(|(key, object)| Some((key.part()?, object.content()?))))
}

/// Where all that is no container's is behind the VTEP.
fn ask(cell: &Cell, from: Ipv4Addr, to: Ipv4Addr, probe: Probe) -> Explanation {
    let vtep = |_| Route::Device("silk-vtep".parse().expect("name"));
    explain(&program_of(cell), cell.inputs(), from, to, probe, vtep).expect("the program is whole")
}

fn tag(number: u16) -> PolicyTag {
    PolicyTag::new(number.try_into().expect("tag"))
}

/// To the app of the first container.
fn policy(from: u8, of: u16, port: u16) -> Policy {
    Policy {
        source: walk::app(from),
        source_tag: tag(of),
        destination: walk::app(1),
        transport: Transport::Tcp,
        ports: PortRange::new(port, port).expect("range"),
    }
}

/// A cell with a container that offers 8080 and 2223, and with two other machines on the overlay.
fn cell_for_routers(settings: impl FnOnce(&mut CellConfig)) -> (Cell, Ipv4Addr) {
    let mut cell = walk::start_with(7, settings);
    let peers = [(ROUTER, 32, 1), (CELL, 24, 2)].map(|(addr, prefix, n)| {
        let subnet = match prefix {
            32 => OverlaySubnet::Single(addr),
            _ => OverlaySubnet::Block(Ipv4Network::new([10, 255, 9, 0].into(), prefix).expect("subnet")),
        };
        (walk::underlay(n), Lease::new(walk::underlay(n), subnet))
    });
    cell.leases(cell.inputs().lease, &peers.into());
    let ports = vec![PortMapping { host: port(61_000), container: port(61_001) }];
    let addr = cell.add(Wanted { ports, ..walk::wanted(1) }).expect("added").addr.get();
    (cell, addr)
}

fn port(number: u16) -> NonZeroU16 {
    number.try_into().expect("port")
}

/// dataplane.md, "Overlay ingress".
#[test]
fn routers_on_the_overlay_reach_what_a_container_offers() {
    let tcp = |port| Probe::Tcp { port };
    let (mut cell, addr) = cell_for_routers(|_| ());
    let verdict = |cell: &Cell, from, probe| ask(cell, from, addr, probe).verdict;
    for probe in [tcp(8080), tcp(2223), tcp(61_001)] {
        assert_eq!(verdict(&cell, ROUTER, probe), Verdict::Refused, "the tag is not known yet");
    }
    cell.router(tag(9));
    for (from, probe, expected) in [
        (ROUTER, tcp(8080), Verdict::Allowed),
        (ROUTER, tcp(2223), Verdict::Allowed),
        (ROUTER, tcp(61_001), Verdict::Allowed),
        (ROUTER, tcp(8081), Verdict::Refused),
        (ROUTER, tcp(61_000), Verdict::Refused),
        (ROUTER, Probe::Udp { port: 8080 }, Verdict::Refused),
        (CELL, tcp(8080), Verdict::Refused),
    ] {
        let told = ask(&cell, from, addr, probe);
        assert_eq!(told.verdict, expected, "{from} {probe:?}: {told:?}");
        let routers = told.rule.as_deref() == Some("newcomers: overlay ingress");
        assert_eq!(routers, expected == Verdict::Allowed);
        assert_eq!(told.whose.contains("tag 0009"), routers, "{told:?}");
    }

    // Behind no other device than the VTEP is anybody a router, whatever his tag; and one that is an app's too is nobody's.
    let other = cell.add(walk::wanted(2)).expect("added").addr;
    let near = Packet {
        mark: 9,
        in_name: Some(link::host_name(other).to_string()),
        in_index: Some(link::index(other)),
        ..from_overlay(other.get(), addr, 8080, 8)
    };
    assert_eq!(run(&cell, &near), (machine::Outcome::Reject, "no policy".into()));
    let outside = Packet { mark: 9, in_name: Some("eth0".into()), ..from_overlay(ROUTER, addr, 8080, 8) };
    assert_eq!(run(&cell, &outside), (machine::Outcome::Reject, "no policy".into()));
    cell.policies(by_app([policy(2, 9, 80)]));
    assert_eq!(verdict(&cell, ROUTER, tcp(8080)), Verdict::Refused);
    cell.policies(by_app([policy(2, 8, 80)]));
    assert_eq!(verdict(&cell, ROUTER, tcp(8080)), Verdict::Allowed);

    cell.router(tag(10));
    let packet = |tag| Packet { mark: tag, ..from_overlay(ROUTER, addr, 8080, 8) };
    assert_eq!(run(&cell, &packet(9)), (machine::Outcome::Reject, "no policy".into()));
    assert_eq!(run(&cell, &packet(10)), (machine::Outcome::Accept, "overlay ingress".into()));

    let (mut off, addr) = cell_for_routers(|config| config.ingress = OverlayIngress::Off);
    let before = plan(off.inputs());
    off.router(tag(9));
    assert_eq!(plan(off.inputs()), before, "nothing is laid");
    assert!(!program_of(&off).sets.contains_key(&"exposed".parse().expect("name")));
    assert_eq!(ask(&off, ROUTER, addr, tcp(8080)).verdict, Verdict::Refused);
}

/// dataplane.md, "Overlay ingress".
#[test]
fn a_router_marks_what_it_sends_to_the_overlay_itself() {
    let own = walk::subnet(1).gateway();
    let container = Ipv4Addr::new(10, 255, 9, 2);
    let mut cell = walk::start_with(7, |config| config.ingress = OverlayIngress::Sent);
    let whose = |cell: &Cell| ask(cell, own, container, Probe::Tcp { port: 8080 }).whose;
    assert!(whose(&cell).starts_with("none of ours"), "{}", whose(&cell));
    cell.router(tag(9));
    assert!(whose(&cell).contains("tag 0009"), "{}", whose(&cell));
    let program = program_of(&cell);
    let send = |out: &str| {
        let mut packet = Packet { out_name: Some(out.into()), ..from_overlay(own, container, 8080, 8) };
        let decision = program.run(&"output".parse().expect("name"), &mut packet).expect("whole");
        (decision.outcome, packet.mark)
    };
    assert_eq!(send("silk-vtep"), (machine::Outcome::Accept, 9));
    assert_eq!(send("eth0"), (machine::Outcome::Accept, 0));
}

/// A packet that came by the VTEP for a container of [`cell_for_routers`].
fn from_overlay(from: Ipv4Addr, to: Ipv4Addr, port: u16, state: u32) -> Packet {
    let mut network = vec![0; 20];
    network[12..16].copy_from_slice(&from.octets());
    network[16..20].copy_from_slice(&to.octets());
    Packet {
        family: 2,
        protocol: 6,
        network,
        transport: [&[0, 0], &port.to_be_bytes()[..], &[0; 16]].concat(),
        in_name: Some("silk-vtep".into()),
        out_name: Some(link::host_name(OverlayAddr::new(to)).to_string()),
        state,
        ..Packet::default()
    }
}

fn run(cell: &Cell, packet: &Packet) -> (machine::Outcome, String) {
    let mut packet = packet.clone();
    let decision = program_of(cell).run(&"forward".parse().expect("name"), &mut packet).expect("whole");
    (decision.outcome, decision.by.map(|place| place.comment).unwrap_or_default())
}

/// dataplane.md, "Connections of removed policies".
#[test]
fn policies_count_for_each_packet_only_where_connections_are_cut() {
    const ESTABLISHED: u32 = 2;
    for cut in [false, true] {
        let (mut cell, one) = cell_for_routers(|config| config.cut = cut);
        let two = cell.add(walk::wanted(2)).expect("added").addr.get();
        cell.router(tag(9));
        cell.policies(by_app([policy(3, 4, 80), policy(2, 3, 81)]));
        let far =
            |port, tag| Packet { mark: tag, ..from_overlay([10, 255, 9, 2].into(), one, port, ESTABLISHED) };
        let near = |port| Packet {
            in_name: Some(link::host_name(OverlayAddr::new(two)).to_string()),
            in_index: Some(link::index(OverlayAddr::new(two))),
            ..from_overlay(two, one, port, ESTABLISHED)
        };
        let answers = |packet: Packet| Packet { answers: true, ..packet };
        let passes = |packet| run(&cell, &packet).0 == machine::Outcome::Accept;
        for (what, packet) in [
            ("a policy of another cell's app", far(80, 4)),
            ("a policy of this cell's app", near(81)),
            ("a router", Packet { mark: 9, ..from_overlay(ROUTER, one, 8080, ESTABLISHED) }),
            ("a mapped port", Packet { connection_mark: INGRESS_CONNECTION, ..far(8080, 0) }),
            ("an answer from another cell", answers(far(7, 0))),
            ("an answer on this cell", answers(near(7))),
            ("news of a connection", Packet { state: 4, ..far(7, 0) }),
            ("news of one on this cell", Packet { state: 4, ..near(7) }),
            ("to the world", Packet { out_name: Some("eth0".into()), ..near(443) }),
            ("to another cell", Packet { out_name: Some("silk-vtep".into()), ..near(443) }),
        ] {
            assert!(passes(packet), "{what}, {cut}");
        }
        for (what, packet) in [
            ("another app of another cell", far(80, 5)),
            ("another port", far(81, 4)),
            ("another port on this cell", near(80)),
            ("no tag", far(80, 0)),
            ("a router's, another port", Packet { mark: 9, ..from_overlay(ROUTER, one, 8081, ESTABLISHED) }),
        ] {
            assert_eq!(passes(packet), !cut, "{what}, {cut}");
        }
    }
}

/// dataplane.md, "Overlay ingress".
#[test]
fn a_port_that_is_none_spoils_only_itself() {
    for (text, ports, wrong) in [
        ("8080, 2222", vec![8080, 2222], vec![]),
        ("", vec![], vec![]),
        (" ,8080,,08081 ", vec![8080, 8081], vec![]),
        ("8080,x,0,-1,65536,2222-2223, 9", vec![8080, 9], vec!["x", "0", "-1", "65536", "2222-2223"]),
    ] {
        let owner = Owner { ports: text.into(), ..Owner::default() };
        let expected = ports.into_iter().map(port).collect();
        assert_eq!(owner.offered(), (expected, wrong), "{text}");
    }
}
