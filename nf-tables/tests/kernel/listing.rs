//! What operators see: `nft list ruleset` of a program with everything in it, and that `nft` can read it back.

use nf_tables::{
    Base, Chain, Comparison, Connection, Data, Dynamic, Expression, Field, Header, Hook, Key, Kind, Lookup,
    Metadata, Ranges, Rule, Set, Slot, Stateful, Target, Verdict,
};

use crate::programs::{Filled, Program, name};
use crate::world::World;

fn rule<const N: usize>(comment: &str, expressions: [Expression; N]) -> Rule {
    Rule { expressions: expressions.to_vec(), comment: comment.to_owned() }
}

fn meta(load: Metadata, slot: u8) -> Expression {
    Expression::Meta { load, to: Slot(slot) }
}

fn is(slot: u8, with: &[u8]) -> Expression {
    Expression::Compare { from: Slot(slot), is: Comparison::Equal, with: with.to_vec() }
}

fn payload(header: Header, offset: u32, len: u32, slot: u8) -> Expression {
    Expression::Payload { header, offset, len, to: Slot(slot) }
}

fn source(slot: u8) -> Expression {
    payload(Header::Network, 12, 4, slot)
}

fn look(set: &str, then: Lookup) -> Expression {
    Expression::Lookup { set: name(set), key: Slot(0), then }
}

fn ipv4() -> [Expression; 2] {
    [meta(Metadata::Family, 0), is(0, &[2])]
}

fn then<const N: usize>(comment: &str, expressions: [Expression; N]) -> Rule {
    Rule { expressions: [&ipv4()[..], &expressions].concat(), comment: comment.to_owned() }
}

fn accept() -> Expression {
    Expression::Verdict(Verdict::Accept)
}

fn padded(text: &str) -> Vec<u8> {
    let mut bytes = text.as_bytes().to_vec();
    bytes.resize(16, 0);
    bytes
}

fn sets() -> Vec<(&'static str, Set, Filled)> {
    let set = |key: &[Field], target| Set { key: Key(key.to_vec()), target, ranges: false, dynamic: None };
    let dynamic = |size, timeout| Some(Dynamic { size, timeout });
    let elements = |all: &[(&[u8], Data)]| Filled {
        elements: all.iter().map(|(key, data)| (key.to_vec(), data.clone())).collect(),
        ranges: Ranges::default(),
    };
    let nothing = |all: &[&[u8]]| elements(&all.iter().map(|key| (*key, Data::Nothing)).collect::<Vec<_>>());
    let verdict = |to| Data::Verdict(to);
    let wide = Ranges::new(
        12,
        [
            (&[10, 0, 0, 0, 6, 0, 0, 0, 0, 80, 0, 0][..], &[10, 0, 0, 255, 6, 0, 0, 0, 0, 90, 0, 0][..]),
            (&[10, 1, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0], &[10, 1, 0, 1, 17, 0, 0, 0, 0, 53, 0, 0]),
            (&[10, 2, 0, 5, 0, 0, 0, 0, 0, 0, 0, 0], &[10, 2, 0, 9, 255, 0, 0, 0, 255, 255, 0, 0]),
        ],
    );
    let mark = 0x0200_0007_u32.to_ne_bytes();
    let index = 1_u32.to_ne_bytes();
    vec![
        (
            "allowed",
            set(&[Field::Ipv4, Field::Mark], Target::Nothing),
            nothing(&[&[&[10, 255, 1, 2][..], &mark].concat()]),
        ),
        (
            "connections",
            Set { dynamic: dynamic(65535, None), ..set(&[Field::Ipv4], Target::Nothing) },
            Filled::default(),
        ),
        ("uplinks", set(&[Field::InterfaceName], Target::Nothing), nothing(&[&padded("eth0")])),
        ("indices", set(&[Field::InterfaceIndex], Target::Nothing), nothing(&[&index])),
        (
            "kinds",
            set(&[Field::IcmpType, Field::IcmpCode], Target::Nothing),
            nothing(&[&[8, 0, 0, 0, 0, 0, 0, 0]]),
        ),
        (
            "lines",
            Set { dynamic: dynamic(100, Some(10_000)), ..set(&[Field::Ipv4], Target::Nothing) },
            Filled::default(),
        ),
        ("marks", set(&[Field::Mark], Target::Nothing), nothing(&[&mark])),
        (
            "named",
            set(&[Field::Ipv4], Target::Value(vec![Field::Mark])),
            elements(&[(&[10, 255, 1, 2], Data::Value(mark.into()))]),
        ),
        (
            "ports",
            set(&[Field::Port], Target::Value(vec![Field::Ipv4, Field::Port])),
            elements(&[(&[0xf2, 0x30], Data::Value([10, 255, 1, 2, 0x1f, 0x90, 0, 0].into()))]),
        ),
        (
            "profiles",
            set(&[Field::Ipv4], Target::Verdict),
            elements(&[
                (&[10, 255, 1, 2], verdict(Verdict::Goto(name("leaf")))),
                (&[10, 255, 1, 3], verdict(Verdict::Jump(name("metadata")))),
                (&[10, 255, 1, 4], verdict(Verdict::Drop)),
            ]),
        ),
        ("protocols", set(&[Field::Protocol], Target::Nothing), nothing(&[&[6], &[17]])),
        (
            "rates",
            Set {
                dynamic: dynamic(200, Some(5_000)),
                ..set(&[Field::Ipv4, Field::Ipv4, Field::Port], Target::Nothing)
            },
            Filled::default(),
        ),
        (
            "sources",
            set(&[Field::InterfaceIndex, Field::Ipv4], Target::Value(vec![Field::Mark])),
            elements(&[(&[&index[..], &[10, 255, 1, 2]].concat(), Data::Value(mark.into()))]),
        ),
        (
            "wide",
            Set { ranges: true, ..set(&[Field::Ipv4, Field::Protocol, Field::Port], Target::Nothing) },
            Filled { elements: Vec::new(), ranges: wide },
        ),
    ]
}

/// Everything that can be said.
pub(crate) fn program() -> Program {
    let mark = |value: u32| Expression::Value { to: Slot(0), data: value.to_ne_bytes().to_vec() };
    let update = |set: &str, with: &[Stateful]| Expression::Update {
        set: name(set),
        key: Slot(0),
        with: with.to_vec(),
    };
    let limit = |over| Stateful::Limit { rate: 5, burst: 10, over };
    let state = |states: u32| {
        [
            Expression::Ct { load: Connection::State, to: Slot(0) },
            Expression::Bitwise {
                from: Slot(0),
                to: Slot(0),
                mask: states.to_ne_bytes().to_vec(),
                xor: vec![0; 4],
            },
            Expression::Compare { from: Slot(0), is: Comparison::NotEqual, with: vec![0; 4] },
        ]
    };
    let [state_load, state_mask, state_compare] = state(2 | 4);
    let log = Expression::Log { group: 5, prefix: "DENY_10.0.0.1 ".to_owned(), length: 64 };
    let leaf = vec![
        rule(
            "established",
            [
                state_load,
                state_mask,
                state_compare,
                mark(0x0200_0000),
                Expression::SetMark { from: Slot(0) },
                accept(),
            ],
        ),
        rule("the connection's mark", [mark(0x8000_0000), Expression::SetCtMark { from: Slot(0) }]),
        rule(
            "restored",
            [Expression::Ct { load: Connection::Mark, to: Slot(3) }, Expression::SetMark { from: Slot(3) }],
        ),
        rule(
            "loaded",
            [meta(Metadata::Mark, 0), is(0, &7_u32.to_ne_bytes()), Expression::Stateful(Stateful::Counter)],
        ),
        then(
            "too many",
            [
                source(0),
                update("connections", &[Stateful::ConnectionsOver { count: 20 }]),
                Expression::Reject,
            ],
        ),
        then("lines", [source(0), update("lines", &[limit(false), Stateful::Counter]), log]),
        then(
            "rates",
            [
                source(0),
                payload(Header::Network, 16, 4, 1),
                meta(Metadata::Protocol, 2),
                is(2, &[6]),
                payload(Header::Transport, 2, 2, 2),
                update("rates", &[limit(true)]),
                Expression::Verdict(Verdict::Drop),
            ],
        ),
        rule("", [Expression::Stateful(limit(false)), Expression::Verdict(Verdict::Return)]),
        rule(
            "an IPv6 packet: [it's] é, $x; \\ {}",
            [meta(Metadata::Family, 15), is(15, &[10]), Expression::Verdict(Verdict::Drop)],
        ),
    ];
    let forward = vec![
        then(
            "ranges",
            [
                source(0),
                meta(Metadata::Protocol, 1),
                payload(Header::Transport, 2, 2, 2),
                look("wide", Lookup::Present),
                accept(),
            ],
        ),
        rule(
            "devices",
            [
                meta(Metadata::InName, 0),
                look("uplinks", Lookup::Absent),
                Expression::Verdict(Verdict::Goto(name("metadata"))),
            ],
        ),
        rule(
            "one device",
            [
                meta(Metadata::OutName, 0),
                is(0, &padded("silk-vtep")),
                Expression::Verdict(Verdict::Jump(name("metadata"))),
            ],
        ),
        rule("beginning", [meta(Metadata::InName, 0), is(0, b"s-010"), accept()]),
        rule("indices", [meta(Metadata::InIndex, 0), look("indices", Lookup::Present), accept()]),
        rule("marks", [meta(Metadata::Mark, 0), look("marks", Lookup::Present), accept()]),
        rule("protocols", [meta(Metadata::Protocol, 0), look("protocols", Lookup::Present), accept()]),
        then(
            "tagged",
            [source(0), look("named", Lookup::Data(Slot(0))), Expression::SetMark { from: Slot(0) }],
        ),
        then(
            "sources",
            [
                meta(Metadata::InIndex, 0),
                source(1),
                look("sources", Lookup::Data(Slot(0))),
                Expression::SetMark { from: Slot(0) },
            ],
        ),
        then(
            "let out",
            [
                source(0),
                Expression::Ct { load: Connection::Mark, to: Slot(1) },
                look("allowed", Lookup::Present),
                accept(),
            ],
        ),
        rule("answers", [Expression::Ct { load: Connection::Direction, to: Slot(0) }, is(0, &[1]), accept()]),
        rule(
            "segments",
            [
                meta(Metadata::Protocol, 0),
                is(0, &[6]),
                Expression::PathSegment { to: Slot(0) },
                Expression::ToNetwork { from: Slot(0), to: Slot(0) },
                Expression::LowerSegment { from: Slot(0) },
            ],
        ),
        then("profiles", [source(0), look("profiles", Lookup::Verdict)]),
    ];
    let prerouting = vec![then(
        "mapped",
        [
            meta(Metadata::Protocol, 0),
            is(0, &[6]),
            payload(Header::Transport, 2, 2, 0),
            look("ports", Lookup::Data(Slot(8))),
            Expression::Dnat { addr: Slot(8), port: Slot(9) },
        ],
    )];
    let postrouting =
        vec![rule("out", [meta(Metadata::OutName, 0), is(0, &padded("eth0")), Expression::Masquerade])];
    let base = |kind, hook, priority| Some(Base { kind, hook, priority });
    let chains = [
        ("metadata", None, vec![rule("counted", [Expression::Stateful(Stateful::Counter)])]),
        ("leaf", None, leaf),
        ("forward", base(Kind::Filter, Hook::Forward, -10), forward),
        ("input", base(Kind::Filter, Hook::Input, 0), Vec::new()),
        ("output", base(Kind::Filter, Hook::Output, 0), Vec::new()),
        ("prerouting", base(Kind::Nat, Hook::Prerouting, -100), prerouting),
        ("postrouting", base(Kind::Nat, Hook::Postrouting, 100), postrouting),
    ];
    Program {
        sets: sets().into_iter().map(|(of, set, filled)| (name(of), (set, filled))).collect(),
        chains: chains.into_iter().map(|(of, base, rules)| (name(of), Chain { base, rules })).collect(),
    }
}

#[test]
fn operators_see_what_is_meant() {
    let mut world = World::new();
    world.load(&program());
    let golden = include_str!("golden.nft");
    let listed = world.list();
    assert_eq!(listed, golden, "{listed}");
}

#[test]
fn what_is_listed_can_be_read() {
    let mut world = World::new();
    world.load(&program());
    let listed = world.list();
    let other = World::new();
    let (ok, text) = other.read_file(&listed);
    assert!(ok, "{text}\n{listed}");
    // Where it knows the family, `nft` makes one ICMP's code of the one for both.
    assert_eq!(other.list().replace("reject with icmp port-unreachable", "reject"), listed);
}
