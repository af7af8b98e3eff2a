//! Packets that are on their way while the firewall changes: docs/dataplane.md, "Whose rules", "To a container".

use std::collections::BTreeMap;
use std::net::Ipv4Addr;
use std::sync::Arc;

use nf_tables::Chain;
use nf_tables::machine::Program;
use proptest::prelude::*;
use weft_model::asg::PortRange;
use weft_model::cell::{Cell, Change, Object, Outcome};
use weft_model::firewall::explain::{Probe, Route, Verdict, explain};
use weft_model::firewall::{Content, Map, Part, program};
use weft_model::policy::turns::Turns;
use weft_model::policy::{Policies, Policy, PolicyTag, by_app};
use weft_model::profile::Transport;
use weft_model::walk::{self, Move};

const APPS: u8 = 4;

#[derive(Debug, Clone)]
enum Event {
    /// Who may reach whom, and the number of each app's tag: few, so that they are given from hand to hand.
    Policies(Vec<(u8, u8)>, Vec<u16>),
    /// The container of the first number gets the profile of the second.
    Assign(u8, u8),
    LogC2c(bool),
    /// One more container.
    Add,
}

fn event() -> impl Strategy<Value = Event> {
    let pairs = proptest::collection::vec((0..APPS, 0..APPS), 0..6);
    let tags = Just((1..=u16::from(APPS)).collect::<Vec<_>>()).prop_shuffle();
    prop_oneof![
        6 => (pairs, tags).prop_map(|(pairs, tags)| Event::Policies(pairs, tags)),
        3 => (0..APPS, 0u8..3).prop_map(|(n, profile)| Event::Assign(n, profile)),
        1 => any::<bool>().prop_map(Event::LogC2c),
        1 => Just(Event::Add),
    ]
}

fn policies(pairs: &[(u8, u8)], tags: &[u16]) -> Policies {
    by_app(pairs.iter().map(|(from, to)| Policy {
        source: walk::app(*from),
        source_tag: PolicyTag::new(tags[usize::from(*from)].try_into().expect("tag")),
        destination: walk::app(*to),
        transport: Transport::Tcp,
        ports: PortRange::new(85, 85).expect("range"),
    }))
}

/// What the kernel holds of the firewall.
#[derive(Debug, Clone, Default)]
struct Held(BTreeMap<Part, Content>);

impl Held {
    fn program(&self) -> Program {
        program(&self.0)
    }

    fn change(&mut self, Change { key, will, .. }: &Change) {
        let part = key.part().expect("of the firewall").clone();
        match will.as_ref().and_then(Object::content) {
            Some(content) => drop(self.0.insert(part, content.clone())),
            None => drop(self.0.remove(&part)),
        }
    }

    /// The rules are what they were, none in a chain that is new; what is in maps is what it will be, but for those that
    /// packets were looked up in before.
    fn in_between(&self, changes: &[&Change], before: &[Map]) -> Self {
        let mut between = self.clone();
        for change in changes {
            match (change.key.part().expect("of the firewall"), change.was.is_some()) {
                (Part::Element(map, _), _) if before.contains(map) => {}
                (Part::Element(..), _) => between.change(change),
                (Part::Chain(name), false) => {
                    let base = None;
                    let empty = Content::Chain(Arc::new(Chain { base, rules: Vec::new() }));
                    between.0.insert(Part::Chain(name.clone()), empty);
                }
                (Part::Set(_), false) => between.change(change),
                (Part::Table | Part::Chain(_) | Part::Set(_), _) => {}
            }
        }
        between
    }
}

struct Scene {
    cell: Cell,
    held: Held,
    /// With links that are there.
    addrs: Vec<Ipv4Addr>,
}

impl Scene {
    fn new() -> Self {
        let mut scene = Self { cell: walk::start(7), held: Held::default(), addrs: Vec::new() };
        for _ in 0..APPS {
            scene.add();
        }
        scene.step(|_, _| ());
        scene.addrs = scene.cell.roster().iter().map(|(container, _)| container.addr.get()).collect();
        scene
    }

    fn add(&mut self) {
        let n = u8::try_from(self.cell.roster().len()).expect("few");
        // The subnet is full.
        let _ = self.cell.add(walk::wanted(n));
    }

    /// Carries the next step out. `during` is told what packets meet while a transaction is committed.
    fn step(&mut self, mut during: impl FnMut(&Self, Held)) {
        let step = self.cell.diff();
        for changes in step.firewall.phases() {
            for before in [
                &[][..],
                &[Map::Allowed],
                &[Map::Allowed, Map::Sources],
                &[Map::Allowed, Map::Sources, Map::Apps],
            ] {
                during(self, self.held.in_between(&changes, before));
            }
            changes.iter().for_each(|change| self.held.change(change));
        }
        self.cell.settle(&step, &Outcome::default());
    }

    /// From each container to each, and to the world.
    fn passing(&self, held: &Held) -> Vec<(Ipv4Addr, Ipv4Addr)> {
        let program = held.program();
        let world = Ipv4Addr::new(198, 51, 100, 7);
        let pairs =
            self.addrs.iter().flat_map(|from| self.addrs.iter().chain([&world]).map(move |to| (*from, *to)));
        let passes = |(from, to): &(Ipv4Addr, Ipv4Addr)| {
            let route = |_| Route::Device("eth0".parse().expect("name"));
            let told = explain(&program, self.cell.inputs(), *from, *to, Probe::Tcp { port: 85 }, route);
            told.expect("the program is whole").verdict == Verdict::Allowed
        };
        pairs.filter(passes).collect()
    }
}

proptest! {
    #[test]
    fn what_is_on_its_way_is_let_through_by_the_rules_before_or_after_or_not_at_all(
        events in proptest::collection::vec(event(), 1..16)
    ) {
        let (mut scene, mut turns) = (Scene::new(), Turns::default());
        for event in &events {
            match event {
                Event::Policies(pairs, tags) => {
                    let mut answer = policies(pairs, tags);
                    turns.note(&mut answer);
                    scene.cell.policies(answer);
                }
                Event::Assign(n, kind) => drop(walk::edit(&mut scene.cell, 7, &Move::Assign(*n, *kind))),
                Event::LogC2c(on) => scene.cell.log_c2c(*on),
                Event::Add => scene.add(),
            }
            let before = scene.passing(&scene.held);
            let mut between = Vec::new();
            scene.step(|scene, held| between.extend(scene.passing(&held)));
            let after = scene.passing(&scene.held);
            let leaks: Vec<_> =
                between.iter().filter(|way| !before.contains(way) && !after.contains(way)).collect();
            prop_assert!(leaks.is_empty(), "{:?} during {:?}", leaks, event);
        }
    }
}

/// Without a need there is one transaction, for each takes time: nothing is on its way by a link that is not there.
#[test]
fn what_is_new_goes_ahead_where_packets_may_be_on_their_way() {
    let mut scene = Scene { cell: walk::start(7), held: Held::default(), addrs: Vec::new() };
    let mut ahead = |edit: &mut dyn FnMut(&mut Cell)| {
        edit(&mut scene.cell);
        let step = scene.cell.diff();
        let [ahead, rest] = step.firewall.phases();
        assert_eq!(ahead.len() + rest.len(), step.firewall.changes.len());
        let names: Vec<String> = ahead.iter().map(|change| change.key.to_string()).collect();
        scene.cell.settle(&step, &Outcome::default());
        names
    };
    let none = Vec::<String>::new();
    assert_eq!(ahead(&mut |cell| drop(cell.add(walk::wanted(1)).expect("added"))), none, "all is new");
    assert_eq!(
        ahead(&mut |cell| drop(walk::edit(cell, 7, &Move::Add(2, 2)))),
        none,
        "a new list of a new container"
    );
    let first = ahead(&mut |cell| cell.policies(policies(&[(2, 1)], &[1, 2, 3, 4])));
    assert!(
        matches!(&first[..], [a, b] if a.contains("set senders-") && b.contains("chain app-")),
        "{first:?}"
    );
    let second = ahead(&mut |cell| cell.policies(policies(&[(2, 1), (3, 1)], &[1, 2, 3, 4])));
    assert!(matches!(&second[..], [a] if a.contains("set senders-")), "{second:?}");
    let list = ahead(&mut |cell| drop(walk::edit(cell, 7, &Move::Assign(1, 1))));
    assert_eq!(list, none, "a list that is there");
}
