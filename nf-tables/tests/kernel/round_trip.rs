//! What the kernel gives back is what it was given.

use std::net::UdpSocket;
use std::process::Command;

use nf_tables::decode::{Body, Object, messages};
use nf_tables::{
    Base, Chain, Data, Dynamic, Expression, Field, Header, Hook, Key, Kind, Ranges, Rule, Set, Slot,
    Stateful, Target, Verdict, request,
};
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};

use crate::programs::{Filled, Program, name, program};
use crate::world::World;

/// The kernel gives chains in an order of its own.
fn sorted(mut program: Program) -> Program {
    program.chains.sort();
    program
}

#[test]
fn random_programs() {
    let mut runner = TestRunner::new(Config { failure_persistence: None, ..Config::with_cases(150) });
    let run = runner.run(&program(), |program| {
        let mut world = World::new();
        let mut batch = world.batch();
        program.load(&mut batch);
        prop_assert_eq!(world.commit(batch), []);
        prop_assert_eq!(sorted(world.see()), sorted(program));
        Ok(())
    });
    if let Err(error) = run {
        panic!("{error}");
    }
}

#[test]
fn two_thousand_ranges_and_ten_thousand_elements() {
    let ends: Vec<([u8; 12], [u8; 12])> = (0u32..2000)
        .map(|n| {
            let mut low = [0; 12];
            low[..4].copy_from_slice(&(0x0a00_0000 + n * 16).to_be_bytes());
            low[4] = 6;
            let mut high = low;
            high[3] |= 0xf;
            high[8..10].copy_from_slice(&[0xff, 0xff]);
            (low, high)
        })
        .collect();
    let ranges = Ranges::new(12, ends.iter().map(|(low, high)| (low.as_slice(), high.as_slice())));
    let elements = (0u32..10_000)
        .map(|n| {
            let key = [n.to_be_bytes(), n.to_ne_bytes()].concat();
            (key, Data::Value([n.to_be_bytes(), [0, 80, 0, 0]].concat().into()))
        })
        .collect();
    let wide = Set {
        key: [Field::Ipv4, Field::Protocol, Field::Port].into(),
        target: Target::Nothing,
        ranges: true,
        dynamic: None,
    };
    let long = Set {
        key: Key(vec![Field::Ipv4, Field::Mark]),
        target: Target::Value(vec![Field::Ipv4, Field::Port]),
        ranges: false,
        dynamic: None,
    };
    let mut program = Program::default();
    program.sets.insert(name("wide"), (wide, Filled { elements: Vec::new(), ranges: ranges.clone() }));
    program.sets.insert(name("long"), (long, Filled { elements, ranges: Ranges::default() }));
    let mut world = World::new();
    world.load(&program);
    assert_eq!(world.see(), program);

    // And away again.
    let mut batch = world.batch();
    batch.delete_ranges(&(), &name("wide"), &ranges);
    batch.delete_elements(&(), &name("long"), program.sets[&name("long")].1.elements().map(|(key, _)| key));
    assert_eq!(world.commit(batch), []);
    assert!(world.see().sets.into_values().all(|(_, filled)| filled == Filled::default()));
}

#[test]
fn what_is_replaced_and_deleted() {
    let program = crate::listing::program();
    let mut world = World::new();
    world.load(&program);

    let mut batch = world.batch();
    let (_, forward) = program.chains.iter().find(|(of, _)| *of == name("forward")).expect("chain").clone();
    let mut expected = sorted(program.clone());
    let rules = vec![forward.rules[0].clone(); 3];
    batch.replace_rules(&(), &name("forward"), &rules);
    batch.delete_chain(&(), &name("postrouting"));
    assert_eq!(world.commit(batch), []);
    expected.chains.retain(|(of, _)| *of != name("postrouting"));
    expected.chains.iter_mut().filter(|(of, _)| *of == name("forward")).for_each(|(_, chain)| {
        chain.rules.clone_from(&rules);
    });
    assert_eq!(sorted(world.see()), expected);

    // A set anew, under its name, with a rule that looks into it, in one transaction.
    let (set, _) = &program.sets[&name("wide")];
    let looks: Vec<_> = forward.rules.iter().filter(|rule| rule.comment == "ranges").cloned().collect();
    assert_eq!(looks.len(), 1);
    let mut batch = world.batch();
    batch.replace_rules(&(), &name("forward"), &[]);
    batch.delete_set(&(), &name("wide"));
    batch.add_set(&(), &name("wide"), set);
    batch.replace_rules(&(), &name("forward"), &looks);
    assert_eq!(world.commit(batch), []);
    let seen = world.see();
    assert!(seen.sets[&name("wide")].1.ranges.is_empty());
    assert!(seen.chains.iter().any(|(_, chain)| chain.rules == looks));

    // All of it anew.
    let mut batch = world.batch();
    batch.delete_table(&String::new());
    program.load(&mut batch);
    assert_eq!(world.commit(batch), []);
    assert_eq!(sorted(world.see()), sorted(program));

    let mut batch = world.batch();
    batch.delete_table(&());
    assert_eq!(world.commit(batch), []);
    assert_eq!(world.list(), "");
}

/// What counts changes by itself; what it is does not.
#[test]
fn packets_change_nothing_that_is_read() {
    let field = |field: Field| Key::from([field]);
    let dynamic = |timeout| Some(Dynamic { size: 10, timeout });
    let target = Target::Nothing;
    let mut program = Program::default();
    let both = [Stateful::Limit { rate: 1, burst: 2, over: false }, Stateful::Counter];
    for (of, timeout, with) in [
        ("timed", Some(3_600_000), &both[..]),
        ("counts", None, &[Stateful::Counter]),
        ("connections", None, &[Stateful::ConnectionsOver { count: 100 }]),
        ("bare", Some(1_000_000), &[]),
    ] {
        let set =
            Set { key: field(Field::Ipv4), target: target.clone(), ranges: false, dynamic: dynamic(timeout) };
        program.sets.insert(name(of), (set, Filled::default()));
        let expressions = vec![
            Expression::Stateful(Stateful::Limit { rate: 1000, burst: 50, over: false }),
            Expression::Payload { header: Header::Network, offset: 16, len: 4, to: Slot(0) },
            Expression::Update { set: name(of), key: Slot(0), with: with.to_vec() },
            Expression::Stateful(Stateful::Counter),
        ];
        let base = Some(Base { kind: Kind::Filter, hook: Hook::Output, priority: 0 });
        let rules = vec![Rule { expressions, comment: of.to_owned() }];
        program.chains.push((name(&format!("sends-{of}")), Chain { base, rules }));
    }
    let mut world = World::new();
    world.load(&program);
    world.enter(|| {
        let up = Command::new("ip").args(["link", "set", "lo", "up"]).status().expect("ip");
        assert!(up.success());
        let socket = UdpSocket::bind("127.0.0.1:0").expect("bound");
        socket.send_to(b"x", "127.0.0.1:9").expect("sent");
    });
    let listed = world.list();
    // An ICMP answer may be counted as well.
    assert!(!listed.contains("packets 0 bytes 0 comment \"counts\""), "{listed}");
    for (of, (_, filled)) in &mut program.sets {
        let of_connections = *of == name("connections");
        // A packet that is over no limit ends the rule, but it is in the set.
        assert!(!of_connections || listed.contains("ct count over 100"), "{listed}");
        filled.elements = vec![(vec![127, 0, 0, 1], Data::Nothing)];
    }
    assert_eq!(sorted(world.see()), sorted(program));
}

#[test]
fn an_element_anew() {
    let mut world = World::new();
    world.load(&crate::listing::program());
    let key = [10, 255, 1, 2];
    let dropped = (key.to_vec(), Data::Verdict(Verdict::Drop));
    let mut batch = world.batch();
    batch.delete_elements(&(), &name("profiles"), [&key[..]]);
    batch.add_elements(&(), &name("profiles"), [(&key[..], &dropped.1)]);
    assert_eq!(world.commit(batch), []);
    let seen = world.see().sets.remove(&name("profiles")).expect("the map").1;
    assert!(seen.elements.contains(&dropped) && seen.elements.len() == 3);
}

#[test]
fn a_table_anew_whether_it_is_there_or_not() {
    let program = crate::listing::program();
    let mut world = World::new();
    for _ in 0..2 {
        let mut batch = world.batch();
        batch.add_table(&String::new());
        batch.delete_table(&String::new());
        program.load(&mut batch);
        assert_eq!(world.commit(batch), []);
        assert_eq!(sorted(world.see()), sorted(program.clone()));
    }
}

#[test]
fn damaged_dumps_are_read_without_harm() {
    let mut world = World::new();
    world.load(&crate::listing::program());
    let table = World::table();
    let mut dumps = world.raw(request::chains);
    dumps.extend(world.raw(|sequence| request::rules(&table, sequence)));
    dumps.extend(world.raw(|sequence| request::sets(&table, sequence)));
    dumps.extend(world.raw(|sequence| request::elements(&table, &name("wide"), sequence)));
    dumps.extend(world.raw(|sequence| request::elements(&table, &name("profiles"), sequence)));
    dumps.extend(world.raw(request::generation));
    let mut read = 0;
    for dump in &mut dumps {
        for at in 0..dump.len() {
            let byte = dump[at];
            dump[at] = byte ^ [0x01, 0x04, 0x80, 0xff][at % 4];
            read += messages(dump).count();
            dump[at] = byte;
            if at % 4 == 0 {
                read += messages(&dump[..at]).count();
            }
        }
    }
    assert!(read > 10_000);
}

#[test]
fn what_others_wrote_is_unknown_and_hides_nothing() {
    let mut world = World::new();
    world.load(&crate::listing::program());
    let (ok, text) = world.read_file(
        "table inet weft {
             set Strange { type ether_addr; elements = { 00:11:22:33:44:55 }; }
             set halves { type ipv4_addr; flags interval; elements = { 10.0.0.0/8, 11.0.0.1 }; }
             chain closed { type filter hook input priority 5; policy drop; }
         }
         add rule inet weft metadata ip ttl set 5
         add rule inet weft metadata ip daddr 10.0.0.1 tcp dport 80-90 accept
         add rule inet weft metadata limit rate 5/minute log level warn drop
         add rule inet weft metadata counter accept
         add table ip another { chain c { ip saddr 10.0.0.1 accept; }; }
         add table inet another",
    );
    assert!(ok, "{text}");
    let table = World::table();
    let rules: Vec<(String, bool)> = world
        .ask(|sequence| request::rules(&table, sequence))
        .into_iter()
        .filter_map(|message| match message.body {
            Body::There { object: Object::Rule { chain, rule, handle }, place } => {
                assert!(place.is(&table) && handle > 0);
                (chain == "metadata").then(|| (chain, rule.is_ok()))
            }
            _ => None,
        })
        .collect();
    let known: Vec<bool> = rules.into_iter().map(|(_, known)| known).collect();
    assert_eq!(known, [true, false, false, false, true]);

    let sets = world.ask(|sequence| request::sets(&table, sequence));
    let unknown: Vec<String> = sets
        .into_iter()
        .filter_map(|message| match message.body {
            Body::There { object: Object::Set { name, set: Err(_) }, .. } => Some(name),
            _ => None,
        })
        .collect();
    assert_eq!(unknown, ["Strange", "halves"]);
    let chains = world.ask(request::chains);
    let unknown = chains.iter().any(
        |message| matches!(&message.body, Body::There { object: Object::Chain { name, base: Err(_) }, .. } if name == "closed"),
    );
    assert!(unknown);
    let elements = world.ask(|sequence| request::elements(&table, &name("halves"), sequence));
    let halves = elements.into_iter().filter_map(|message| match message.body {
        Body::There { object: Object::Elements { elements, .. }, .. } => Some(elements),
        _ => None,
    });
    let known: Vec<bool> = halves.flatten().map(|one| one.is_ok()).collect();
    assert!(known.contains(&true) && known.contains(&false), "{known:?}");

    let tables = world.ask(request::tables).into_iter().filter_map(|message| match message.body {
        Body::There { place, object: Object::Table } => Some(place.table),
        _ => None,
    });
    assert_eq!(tables.collect::<Vec<_>>(), ["weft", "another"]);
}
