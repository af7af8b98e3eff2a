//! A batch with one bad operation is rolled back whole, and the error finds whose it was.

use nf_tables::decode::Body;
use nf_tables::{
    Base, Batch, Chain, Data, Expression, Field, Hook, Kind, Ranges, Rule, Set, Target, Verdict, request,
};
use nix::errno::Errno;

use crate::programs::name;
use crate::world::World;

const KEY: [u8; 4] = [10, 0, 0, 1];

fn verdicts() -> Set {
    Set { key: [Field::Ipv4].into(), target: Target::Verdict, ranges: false, dynamic: None }
}

fn wide() -> Set {
    Set { key: [Field::Ipv4, Field::Port].into(), target: Target::Nothing, ranges: true, dynamic: None }
}

fn range(low: [u8; 8], high: [u8; 8]) -> Ranges {
    Ranges::new(8, [(low.as_slice(), high.as_slice())])
}

/// A world with a table, a map of verdicts and a set of ranges.
fn world() -> World {
    let mut world = World::new();
    let mut batch = world.batch();
    batch.add_table(&());
    batch.add_set(&(), &name("verdicts"), &verdicts());
    batch.add_set(&(), &name("wide"), &wide());
    assert_eq!(world.commit(batch), []);
    world
}

/// Runs a batch between two good operations; whose errors there were, and that nothing happened.
fn refused(
    world: &mut World,
    bad: impl FnOnce(&mut Batch<&'static str>),
) -> Vec<(Option<&'static str>, Errno)> {
    let before = world.list();
    let mut batch = world.batch();
    batch.add_chain(&"before", &name("ahead"), &Chain::default());
    bad(&mut batch);
    batch.add_chain(&"after", &name("behind"), &Chain::default());
    let refusals = world.commit(batch);
    assert_eq!(world.list(), before);
    refusals.into_iter().map(|(owner, refusal)| (owner, Errno::from_raw(refusal.errno))).collect()
}

#[test]
fn an_element_that_leads_nowhere() {
    let mut world = world();
    let nowhere = Data::Verdict(Verdict::Goto(name("nowhere")));
    let refusals =
        refused(&mut world, |batch| batch.add_elements(&"bad", &name("verdicts"), [(&KEY[..], &nowhere)]));
    assert_eq!(refusals, [(Some("bad"), Errno::ENOENT)]);
}

#[test]
fn a_range_in_another() {
    let mut world = world();
    let around = range([10, 0, 0, 0, 0, 0, 0, 0], [10, 0, 255, 255, 255, 255, 0, 0]);
    let inside = range([10, 0, 1, 0, 0, 80, 0, 0], [10, 0, 1, 255, 0, 80, 0, 0]);
    let refusals = refused(&mut world, |batch| {
        batch.add_ranges(&"good", &name("wide"), &around);
        batch.add_ranges(&"bad", &name("wide"), &inside);
    });
    assert_eq!(refusals, [(Some("bad"), Errno::EEXIST)]);

    // The other way round both are there.
    let mut batch = world.batch();
    batch.add_ranges(&(), &name("wide"), &inside);
    batch.add_ranges(&(), &name("wide"), &around);
    assert_eq!(world.commit(batch), []);
    assert_eq!(world.see().sets[&name("wide")].1.ranges.len(), 2);
}

#[test]
fn what_is_missing_cannot_go() {
    let mut world = world();
    let refusals = refused(&mut world, |batch| {
        batch.delete_elements(&"element", &name("verdicts"), [&KEY[..]]);
        batch.delete_ranges(&"range", &name("wide"), &range([1; 8], [1; 8]));
        batch.delete_chain(&"chain", &name("absent"));
        batch.delete_set(&"set", &name("absent"));
    });
    let all = ["element", "range", "chain", "set"].map(|owner| (Some(owner), Errno::ENOENT));
    assert_eq!(refusals, all);
}

#[test]
fn what_is_there_is_not_new() {
    let mut world = world();
    let element = (&KEY[..], &Data::Verdict(Verdict::Accept));
    let mut batch = world.batch();
    batch.add_table(&());
    batch.add_chain(&(), &name("there"), &Chain::default());
    batch.add_elements(&(), &name("verdicts"), [element]);
    assert_eq!(world.commit(batch), []);
    let refusals = refused(&mut world, |batch| {
        batch.add_chain(&"chain", &name("there"), &Chain::default());
        batch.add_set(&"set", &name("verdicts"), &verdicts());
        batch.add_elements(&"element", &name("verdicts"), [element]);
    });
    assert_eq!(refusals, ["chain", "set", "element"].map(|owner| (Some(owner), Errno::EEXIST)));
}

#[test]
fn what_is_used_stays() {
    let mut world = world();
    let leads = Rule {
        expressions: vec![Expression::Verdict(Verdict::Jump(name("target")))],
        comment: String::new(),
    };
    let mut batch = world.batch();
    batch.add_chain(&(), &name("target"), &Chain::default());
    batch.add_chain(&(), &name("origin"), &Chain { base: None, rules: vec![leads] });
    assert_eq!(world.commit(batch), []);
    let refusals = refused(&mut world, |batch| batch.delete_chain(&"target", &name("target")));
    assert_eq!(refusals, [(Some("target"), Errno::EBUSY)]);
}

#[test]
fn one_rule_among_many() {
    let mut world = world();
    let good = Rule { expressions: vec![Expression::Verdict(Verdict::Accept)], comment: String::new() };
    let bad = Rule {
        expressions: vec![Expression::Verdict(Verdict::Goto(name("nowhere")))],
        comment: "leads nowhere".to_owned(),
    };
    let refusals = refused(&mut world, |batch| {
        let rules = vec![good.clone(), good.clone(), bad, good.clone()];
        batch.add_chain(&"bad", &name("mixed"), &Chain { base: None, rules });
    });
    assert_eq!(refusals, [(Some("bad"), Errno::ENOENT)]);
}

#[test]
fn a_last_operation_that_fails_ends_the_answers_too() {
    let mut world = world();
    let mut batch = world.batch();
    batch.add_chain(&"first", &name("first"), &Chain::default());
    batch.delete_chain(&"last", &name("absent"));
    let refusals = world.commit(batch);
    assert_eq!(refusals.len(), 1);
    assert_eq!(refusals[0].0, Some("last"));
    assert!(world.see().chains.is_empty());
}

#[test]
fn a_transaction_for_another_generation() {
    let mut world = world();
    let generation = |world: &mut World| match world.ask(request::generation).as_slice() {
        [message] => match &message.body {
            Body::Generation(generation) => generation.clone(),
            other => panic!("{other:?}"),
        },
        other => panic!("{other:?}"),
    };
    let now = generation(&mut world).id;
    let pinned = |generation, first| {
        let mut batch = Batch::pinned(&World::table(), first, generation);
        batch.add_chain(&"mine", &name("mine"), &Chain::default());
        batch.finish()
    };

    let late = pinned(now - 1, 7_000);
    let answers = world.answers(&late);
    let [answer] = answers.as_slice() else { panic!("{answers:?}") };
    assert_eq!(answer.sequence, late.first());
    let Body::Refused(refusal) = &answer.body else { panic!("{answer:?}") };
    assert_eq!(Errno::from_raw(refusal.errno), Errno::ERESTART);
    assert!(world.see().chains.is_empty());

    let timely = pinned(now, 8_000);
    let answers = world.answers(&timely);
    let [answer] = answers.as_slice() else { panic!("{answers:?}") };
    assert_eq!((answer.sequence, &answer.body), (timely.last(), &Body::Acknowledged));
    assert_eq!(world.see().chains.len(), 1);
    assert!(generation(&mut world).id > now);
}

#[test]
fn a_loop_of_jumps_is_refused() {
    let mut world = world();
    let mut batch = world.batch();
    batch.add_chain(&"one", &name("one"), &Chain::default());
    batch.add_chain(&"two", &name("two"), &Chain::default());
    let base = Base { kind: Kind::Filter, hook: Hook::Forward, priority: 0 };
    batch.add_chain(&"forward", &name("forward"), &Chain { base: Some(base), rules: Vec::new() });
    let to = |chain| Rule {
        expressions: vec![Expression::Verdict(Verdict::Jump(name(chain)))],
        comment: String::new(),
    };
    batch.replace_rules(&"one", &name("one"), &[to("two")]);
    batch.replace_rules(&"two", &name("two"), &[to("one")]);
    batch.replace_rules(&"forward", &name("forward"), &[to("one")]);
    let refusals = world.commit(batch);
    assert!(world.see().chains.is_empty(), "{refusals:?}");
    let all: Vec<_> =
        refusals.into_iter().map(|(owner, refusal)| (owner, Errno::from_raw(refusal.errno))).collect();
    assert_eq!(all, [(Some("forward"), Errno::EMLINK)]);
}
