//! The firewall's program, run on packets: docs/dataplane.md names the paragraphs.

use std::net::Ipv4Addr;
use std::num::NonZeroU32;
use std::sync::Arc;

use nf_tables::Data;
use nf_tables::machine::{self, Packet, Program};
use proptest::prelude::*;
use weft_model::address::OverlayAddr;
use weft_model::asg::{AddrRange, EgressRule, PortRange, Traffic};
use weft_model::cell::unit::plan;
use weft_model::cell::{Cell, Object, Outcome, Wanted};
use weft_model::container::PortMapping;
use weft_model::firewall::explain::{Explanation, Probe, Route, Verdict, explain};
use weft_model::firewall::{ALLOWED, Content, INGRESS_CONNECTION, program};
use weft_model::link;
use weft_model::policy::{Policy, PolicyTag, by_app};
use weft_model::profile::{Known, Profile, Settings, Transport};
use weft_model::reason::Reason;
use weft_model::walk;

const WORLD: Ipv4Addr = Ipv4Addr::new(198, 51, 100, 7);

fn cell_with(profile: Profile) -> (Cell, Ipv4Addr) {
    let mut cell = walk::start(7);
    let wanted = Wanted { profile: Arc::new(profile.into()), ..walk::wanted(1) };
    let addr = cell.add(wanted).expect("added").addr.get();
    (cell, addr)
}

fn program_of(cell: &Cell) -> Program {
    let wanted = plan(cell.inputs());
    program(wanted.iter().filter_map(|(key, object)| Some((key.part()?, object.content()?))))
}

fn ask(cell: &Cell, from: Ipv4Addr, to: Ipv4Addr, probe: Probe) -> Explanation {
    ask_on(cell, from, to, probe, |_| Route::Device("eth0".parse().expect("name")))
}

fn ask_on(
    cell: &Cell,
    from: Ipv4Addr,
    to: Ipv4Addr,
    probe: Probe,
    routes: impl Fn(Ipv4Addr) -> Route,
) -> Explanation {
    explain(&program_of(cell), cell.inputs(), from, to, probe, routes).expect("the program is whole")
}

fn rule(to: (u32, u32), traffic: Traffic, log: bool, index: u32) -> EgressRule {
    let to = AddrRange::new(to.0.min(to.1).into(), to.0.max(to.1).into()).expect("range");
    EgressRule { to, traffic, log, index }
}

fn ports() -> impl Strategy<Value = PortRange> {
    prop_oneof![Just((0, 65535)), (0u16..12, 0u16..12).prop_map(|(a, b)| (a.min(b), a.max(b))),]
        .prop_map(|(first, last)| PortRange::new(first, last).expect("range"))
}

fn traffic() -> impl Strategy<Value = Traffic> {
    let any_or = || proptest::option::of(0u8..3);
    prop_oneof![
        1 => Just(Traffic::All),
        3 => ports().prop_map(Traffic::Tcp),
        2 => ports().prop_map(Traffic::Udp),
        2 => (any_or(), any_or()).prop_map(|(kind, code)| Traffic::Icmp { kind, code }),
    ]
}

/// Few addresses, so that ranges meet; the whole internet among them.
fn rules(longest: usize) -> impl Strategy<Value = Vec<EgressRule>> {
    let base = u32::from(WORLD);
    let span = prop_oneof![
        6 => (base..base + 12, base..base + 12),
        1 => Just((0, u32::MAX)),
    ];
    let one = (span, traffic(), any::<bool>());
    (proptest::collection::vec(one, 0..longest), any::<bool>()).prop_map(|(rules, mixed)| {
        let rule = |(index, (to, traffic, log)): (u32, ((u32, u32), Traffic, bool))| {
            rule(to, traffic, log && mixed, index)
        };
        (0..).zip(rules).map(rule).collect()
    })
}

fn probe() -> impl Strategy<Value = Probe> {
    prop_oneof![
        3 => (0u16..14).prop_map(|port| Probe::Tcp { port }),
        2 => (0u16..14).prop_map(|port| Probe::Udp { port }),
        2 => (0u8..4, 0u8..4).prop_map(|(kind, code)| Probe::Icmp { kind, code }),
        1 => Just(Probe::Other { protocol: 47 }),
    ]
}

proptest! {
    /// dataplane.md, "To the world": layers of sets say what reading the rules one by one says, logs included.
    #[test]
    fn sets_say_what_the_rules_say(
        rules in rules(14),
        log_all in any::<bool>(),
        probes in proptest::collection::vec((0u32..14, probe()), 1..20),
    ) {
        let settings = Settings { log_all, ..Settings::default() };
        let (cell, from) = cell_with(Profile { rules: rules.clone(), settings, ..Profile::default() });
        for (offset, probe) in probes {
            let to = Ipv4Addr::from(u32::from(WORLD) + offset);
            let last = rules.iter().rev().find(|rule| rule.covers(to, probe));
            let told = ask(&cell, from, to, probe);
            let expected = if last.is_some() { Verdict::Allowed } else { Verdict::Refused };
            prop_assert_eq!(told.verdict, expected, "{} {:?}: {:?}", to, probe, told);
            let log = match last {
                Some(rule) if rule.log || log_all => vec!["weft:allowed".to_owned()],
                None if log_all => vec!["weft:denied".to_owned()],
                _ => Vec::new(),
            };
            prop_assert_eq!(&told.logged, &log, "{} {:?}", to, probe);
            if let Some(rule) = last {
                let named = format!("security group rule {} ", rule.index);
                prop_assert!(told.whose.contains(&named), "{:?}", told);
            }
        }
    }
}

#[test]
fn metadata_is_refused_before_any_security_group_but_for_names() {
    let everything = vec![rule((0, u32::MAX), Traffic::All, false, 0)];
    let (cell, from) = cell_with(Profile { rules: everything.clone(), ..Profile::default() });
    let tcp = |port| Probe::Tcp { port };
    for (addr, probe, verdict) in [
        ([169, 254, 169, 254], tcp(80), Verdict::Refused),
        ([169, 254, 169, 254], tcp(53), Verdict::Allowed),
        ([169, 254, 169, 254], Probe::Udp { port: 53 }, Verdict::Allowed),
        ([169, 254, 169, 254], Probe::Icmp { kind: 8, code: 0 }, Verdict::Refused),
        ([100, 100, 100, 200], tcp(80), Verdict::Refused),
        ([168, 63, 129, 16], tcp(80), Verdict::Refused),
        ([168, 63, 129, 16], tcp(32526), Verdict::Refused),
        ([168, 63, 129, 16], tcp(443), Verdict::Allowed),
        ([168, 63, 129, 16], Probe::Udp { port: 53 }, Verdict::Allowed),
    ] {
        assert_eq!(ask(&cell, from, addr.into(), probe).verdict, verdict, "{addr:?} {probe:?}");
    }
    let settings = Settings { deny_cloud_metadata: false, ..Settings::default() };
    let (cell, from) = cell_with(Profile { rules: everything, settings, ..Profile::default() });
    assert_eq!(ask(&cell, from, [169, 254, 169, 254].into(), tcp(80)).verdict, Verdict::Allowed);
}

#[test]
fn a_container_whose_profile_is_not_known_sends_nothing() {
    let (cell, _) = cell_with(Profile::default());
    let stranger = Ipv4Addr::new(10, 255, 1, 5);
    let told = ask(&cell, stranger, WORLD, Probe::Tcp { port: 80 });
    assert_ne!(told.verdict, Verdict::Allowed, "{told:?}");
}

#[test]
fn a_limit_of_connections_stands_before_the_security_groups() {
    let mut settings = Settings::default();
    settings.outbound_connections.max = Some(NonZeroU32::MIN);
    let rules = vec![rule((0, u32::MAX), Traffic::All, false, 0)];
    let (cell, from) = cell_with(Profile { rules, settings, ..Profile::default() });
    let told = ask(&cell, from, WORLD, Probe::Tcp { port: 80 });
    assert_eq!((told.verdict, told.masqueraded), (Verdict::Allowed, true), "{told:?}");
}

/// dataplane.md, "To a mapped port".
#[test]
fn a_port_of_the_cell_has_one_container_until_its_namespace_has_ended() {
    let mut cell = walk::start(7);
    let port = |n: u16| n.try_into().expect("port");
    let mapped = |n| Wanted {
        ports: vec![PortMapping { host: port(61000), container: port(8080) }],
        ..walk::wanted(n)
    };
    let first = cell.add(mapped(1)).expect("added");
    let taken = Reason::HostPortTaken { port: 61000, holder: walk::handle(1).to_string() };
    assert_eq!(cell.add(mapped(2)).err(), Some(taken));
    assert_eq!(cell.roster().get(&walk::handle(2)), None, "a refusal leaves nothing");
    let step = cell.diff();
    cell.settle(&step, &Outcome::default());
    cell.link_gone(first.addr).expect("lost");
    let second = cell.add(mapped(2)).expect("its namespace has ended");
    assert_eq!(cell.roster().get(&walk::handle(1)), None);
    let ports =
        plan(cell.inputs()).into_iter().filter(|(key, _)| key.to_string().contains("element of ports"));
    let leads: Vec<_> = ports.map(|(_, object)| object).collect();
    let to = [&second.addr.get().octets()[..], &[0x1f, 0x90, 0, 0]].concat();
    assert_eq!(leads, [Object::Firewall(Content::Element(Data::Value(to.into())))]);
}

fn policy(source: u8, tag: u16, destination: u8, ports: (u16, u16)) -> Policy {
    Policy {
        source: walk::app(source),
        source_tag: PolicyTag::new(tag.try_into().expect("tag")),
        destination: walk::app(destination),
        transport: Transport::Tcp,
        ports: PortRange::new(ports.0, ports.1).expect("range"),
    }
}

/// dataplane.md, "To a container", "To another cell".
#[test]
fn policies_let_apps_in_by_tag_protocol_and_ports() {
    let mut cell = walk::start(7);
    let mut add = |n: u8| cell.add(walk::wanted(n)).expect("added").addr.get();
    let (one, two, three) = (add(1), add(2), add(3));
    let other_cell = Ipv4Addr::new(10, 255, 4, 2);
    let tcp = |port| Probe::Tcp { port };
    let vtep = |_| Route::Device("silk-vtep".parse().expect("name"));
    let ask_by = |cell: &Cell, from, to, probe| ask_on(cell, from, to, probe, vtep);
    assert_eq!(ask_by(&cell, one, two, tcp(8080)).verdict, Verdict::Refused, "no policies");
    assert_eq!(ask_by(&cell, one, other_cell, tcp(8080)).verdict, Verdict::Refused, "source of no policy");

    cell.policies(by_app([
        policy(1, 5, 2, (8080, 8090)),
        policy(1, 5, 2, (8085, 8099)),
        policy(2, 6, 2, (9000, 9000)),
    ]));
    for (from, to, probe, verdict) in [
        (one, two, tcp(8080), Verdict::Allowed),
        (one, two, tcp(8099), Verdict::Allowed),
        (one, two, tcp(8100), Verdict::Refused),
        (one, two, Probe::Udp { port: 8080 }, Verdict::Refused),
        (two, one, tcp(8080), Verdict::Refused),
        (three, two, tcp(8080), Verdict::Refused),
        (two, two, tcp(9000), Verdict::Allowed),
        (one, other_cell, tcp(1), Verdict::Allowed),
        (three, other_cell, tcp(1), Verdict::Refused),
    ] {
        let told = ask_by(&cell, from, to, probe);
        assert_eq!(told.verdict, verdict, "{from} to {to} {probe:?}: {told:?}");
        if verdict == Verdict::Allowed && to == two {
            assert!(told.whose.starts_with("policy from app app-"), "{told:?}");
        }
    }

    // The policy is gone, and its tag is another app's at once.
    cell.policies(by_app([policy(3, 5, 2, (8080, 8080))]));
    assert_eq!(ask_by(&cell, one, two, tcp(8080)).verdict, Verdict::Refused);
    assert_eq!(ask_by(&cell, one, other_cell, tcp(8080)).verdict, Verdict::Refused);
    assert_eq!(ask_by(&cell, three, two, tcp(8080)).verdict, Verdict::Allowed);
}

/// dataplane.md, "To a container", "To another cell": logged, nothing else becomes of a packet than before.
#[test]
fn what_is_between_containers_is_logged_while_that_is_on() {
    let mut cell = walk::start(7);
    let mut add = |n: u8| cell.add(walk::wanted(n)).expect("added").addr.get();
    let (one, two) = (add(1), add(2));
    let other_cell = Ipv4Addr::new(10, 255, 4, 2);
    let udp = Policy { transport: Transport::Udp, ..policy(1, 5, 2, (53, 53)) };
    cell.policies(by_app([policy(1, 5, 2, (8080, 8090)), udp]));
    let off = plan(cell.inputs());
    let cases = [
        (one, two, Probe::Tcp { port: 8080 }, Verdict::Allowed, Some("weft:allowed-c2c")),
        (one, two, Probe::Udp { port: 53 }, Verdict::Allowed, Some("weft:allowed-c2c")),
        (one, two, Probe::Tcp { port: 80 }, Verdict::Refused, Some("weft:denied-c2c")),
        (two, one, Probe::Udp { port: 8080 }, Verdict::Refused, Some("weft:denied-c2c")),
        (one, other_cell, Probe::Tcp { port: 1 }, Verdict::Allowed, None),
        (two, other_cell, Probe::Tcp { port: 1 }, Verdict::Refused, Some("weft:denied-overlay")),
    ];
    for on in [false, true, false] {
        cell.log_c2c(on);
        for (from, to, probe, verdict, line) in cases {
            let told = ask_on(&cell, from, to, probe, |_| Route::Device("silk-vtep".parse().expect("name")));
            let lines: Vec<String> = line.filter(|_| on).map(str::to_owned).into_iter().collect();
            assert_eq!((told.verdict, &told.logged), (verdict, &lines), "{from} to {to}: {told:?}");
            let by_app = told.rule.as_ref().is_some_and(|rule| rule.starts_with("app-"));
            let let_in = line == Some("weft:allowed-c2c");
            assert_eq!(by_app, let_in && !on, "who is let in meets no rule more while it is off: {told:?}");
            let policy = told.whose.starts_with("policy from app app-1 to app app-2");
            assert_eq!(policy, let_in, "{told:?}");
        }
    }
    assert_eq!(plan(cell.inputs()), off, "switched off, nothing of it is left");
}

/// dataplane.md, "To the world", line 3: the look that comes first says all that the lines before it ask for.
#[test]
fn only_a_containers_own_packets_to_the_world_pass_by_what_was_let_out_before() {
    let mut cell = walk::start(7);
    let rules = vec![rule((0, u32::MAX), Traffic::All, false, 0)];
    let open: Arc<Known> = Arc::new(Profile { rules, ..Profile::default() }.into());
    let mut add = |n, profile: &Arc<Known>| {
        let wanted = Wanted { profile: Arc::clone(profile), ..walk::wanted(n) };
        cell.add(wanted).expect("added").addr
    };
    let (one, two) = (add(1, &open), add(2, &Arc::default()));
    let program = program_of(&cell);
    let packet = |from: OverlayAddr, link: OverlayAddr, connection_mark: u32| {
        let mut network = vec![0; 20];
        network[12..16].copy_from_slice(&from.get().octets());
        network[16..20].copy_from_slice(&WORLD.octets());
        Packet {
            family: 2,
            protocol: 17,
            network,
            transport: vec![0, 0, 0, 53, 0, 8, 0, 0],
            in_index: Some(link::index(link)),
            in_name: Some(link::host_name(link).to_string()),
            out_name: Some("eth0".to_owned()),
            state: 8, // new
            connection_mark,
            ..Packet::default()
        }
    };
    let run = |packet: &Packet| {
        let mut packet = packet.clone();
        let decision = program.run(&"forward".parse().expect("name"), &mut packet).expect("whole");
        let by = decision.by.map(|place| place.comment).unwrap_or_default();
        (decision.outcome, by.starts_with("let out before"), packet.mark, packet.connection_mark)
    };
    let new = packet(one, one, 0);
    let (outcome, before, _, mark) = run(&new);
    assert_eq!((outcome, before), (machine::Outcome::Accept, false));
    for (what, packet) in [
        ("not IPv4", Packet { family: 10, ..new.clone() }),
        ("a forged frame", Packet { transport: vec![0, 0, 0x12, 0xb5], ..new.clone() }),
        ("another's address", packet(two, one, 0)),
        ("by no rules", packet(two, two, 0)),
    ] {
        let (outcome, _, _, marked) = run(&packet);
        assert!(outcome != machine::Outcome::Accept && marked == 0, "{what} is never marked as let out");
    }
    let packet = |from, link| packet(from, link, mark);
    let run = |packet: &Packet| {
        let (outcome, before, mark, _) = run(packet);
        (outcome, before, mark)
    };
    let good = packet(one, one);
    assert_eq!(run(&good), (machine::Outcome::Accept, true, ALLOWED));
    let answer = Packet { connection_mark: INGRESS_CONNECTION, state: 2, ..good.clone() };
    assert_eq!(run(&answer), (machine::Outcome::Accept, true, ALLOWED), "from a mapped port");

    for (what, outcome, packet) in [
        ("another's address", machine::Outcome::Drop, packet(two, one)),
        ("another's link", machine::Outcome::Drop, packet(one, two)),
        (
            "to another cell",
            machine::Outcome::Reject,
            Packet { out_name: Some("silk-vtep".into()), ..good.clone() },
        ),
        ("on no way", machine::Outcome::Reject, Packet { out_name: Some("eth9".into()), ..good.clone() }),
        (
            "to a container",
            machine::Outcome::Reject,
            Packet { out_name: Some(link::host_name(two).to_string()), ..good.clone() },
        ),
        ("by another's rules", machine::Outcome::Reject, packet(two, two)),
        ("by no rules", machine::Outcome::Accept, Packet { connection_mark: 0, ..good.clone() }),
    ] {
        let (is, let_out_before, _) = run(&packet);
        assert_eq!((is, let_out_before), (outcome, false), "{what}");
    }
}

/// What a change costs follows from what is changed, not from what there is: silk's agent writes all of it anew.
#[test]
fn one_policy_of_thousands_changes_one_apps_list() {
    let mut cell = walk::start(7);
    for n in 0..4 {
        cell.add(walk::wanted(n)).expect("added");
    }
    // Four apps have containers here; each may be reached by 1,250 others.
    let others = |changed: bool| {
        (0..5000_u16).map(move |n| Policy {
            source: format!("other-{n}").parse().expect("an id"),
            source_tag: PolicyTag::new((1000 + n).try_into().expect("tag")),
            ..policy(0, 1, u8::try_from(n % 4).expect("an app"), (8080, 8080 + u16::from(changed && n == 6)))
        })
    };
    cell.policies(by_app(others(false)));
    let step = cell.diff();
    cell.settle(&step, &Outcome::default());
    cell.policies(by_app(others(true)));
    let step = cell.diff();
    let changes: Vec<String> = step.changes().map(ToString::to_string).collect();
    assert_eq!(changes.len(), 3, "{changes:?}");
    for (verb, what) in [("create", "set senders-"), ("delete", "set senders-"), ("change", "chain app-")] {
        let found = changes.iter().any(|change| change.starts_with(verb) && change.contains(what));
        assert!(found, "{verb} {what}: {changes:?}");
    }
}
