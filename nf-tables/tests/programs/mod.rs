//! Random programs that the kernel takes: registers are written before they are read, chains are there before what leads
//! to them, and keys are different.

pub(crate) mod read;

use std::collections::{BTreeMap, BTreeSet};

use nf_tables::{
    Base, Batch, Chain, Comparison, Connection, Data, Dynamic, Expression, Field, Header, Hook, Key, Kind,
    Lookup, Metadata, Name, Ranges, Rule, Set, Slot, Stateful, Target, Verdict,
};
use proptest::prelude::*;
use proptest::sample::{Index, select};

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Filled {
    pub(crate) elements: Vec<(Vec<u8>, Data)>,
    pub(crate) ranges: Ranges,
}

impl Filled {
    pub(crate) fn elements(&self) -> impl Iterator<Item = (&[u8], &Data)> {
        self.elements.iter().map(|(key, data)| (&**key, data))
    }
}

#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Program {
    pub(crate) sets: BTreeMap<Name, (Set, Filled)>,
    /// What leads to others comes after them.
    pub(crate) chains: Vec<(Name, Chain)>,
}

impl Program {
    /// The operations that make it, tagged by what they make.
    pub(crate) fn load(&self, batch: &mut Batch<String>) {
        batch.add_table(&"table".to_owned());
        for (of, (set, _)) in &self.sets {
            batch.add_set(&format!("set {of}"), of, set);
        }
        for (of, chain) in &self.chains {
            batch.add_chain(&format!("chain {of}"), of, chain);
        }
        for (of, (_, filled)) in &self.sets {
            batch.add_elements(&format!("elements of {of}"), of, filled.elements());
            batch.add_ranges(&format!("ranges of {of}"), of, &filled.ranges);
        }
    }
}

pub(crate) fn name(text: &str) -> Name {
    text.parse().expect("a name")
}

/// Chains that every random program has, in this order; the rules of each are its own.
const CHAINS: [&str; 5] = ["leaf", "twig", "forwarded", "mapped", "translated"];

pub(crate) fn program() -> impl Strategy<Value = Program> {
    let sets = prop::collection::vec(set(), 1..6);
    (sets, prop::collection::vec(prop::collection::vec(phrases(), 0..4), 5)).prop_map(|(sets, rules)| {
        let sets: BTreeMap<Name, (Set, Filled)> =
            sets.into_iter().zip(0..).map(|(set, place)| (name(&format!("set-{place}")), set)).collect();
        let chains = CHAINS.into_iter().zip(rules).map(|(of, rules)| {
            let base = |kind, hook, priority| Some(Base { kind, hook, priority });
            let base = match of {
                "forwarded" => base(Kind::Filter, Hook::Forward, -10),
                "mapped" => base(Kind::Nat, Hook::Prerouting, -100),
                "translated" => base(Kind::Nat, Hook::Postrouting, 100),
                _ => None,
            };
            let rules = rules.into_iter().map(|phrases| rule(of, &phrases, &sets)).collect();
            (name(of), Chain { base, rules })
        });
        Program { chains: chains.collect(), sets }
    })
}

/// What a rule is made of, but for what depends on where it is.
#[derive(Debug, Clone)]
enum Phrase {
    Plain(Vec<Expression>),
    Lookup {
        set: Index,
        inverted: bool,
        start: u8,
    },
    Update {
        set: Index,
        with: Vec<Stateful>,
    },
    /// Where packets have a path only.
    Segment(u8),
    End(u8),
    Comment(String),
}

fn phrases() -> impl Strategy<Value = Vec<Phrase>> {
    let phrase = prop_oneof![
        4 => plain().prop_map(Phrase::Plain),
        2 => (any::<Index>(), any::<bool>(), 0u8..4)
            .prop_map(|(set, inverted, start)| Phrase::Lookup { set, inverted, start: start * 4 }),
        1 => (any::<Index>(), prop::collection::vec(stateful(), 0..3))
            .prop_map(|(set, with)| Phrase::Update { set, with }),
        1 => (0u8..16).prop_map(Phrase::Segment),
        1 => any::<u8>().prop_map(Phrase::End),
        1 => "[ -~é]{0,100}".prop_map(Phrase::Comment),
    ];
    prop::collection::vec(phrase, 0..5)
}

fn plain() -> impl Strategy<Value = Vec<Expression>> {
    let slot = || (0u8..16).prop_map(Slot);
    // Room for the longest value.
    let early = || (0u8..12).prop_map(Slot);
    let bytes = |len| prop::collection::vec(any::<u8>(), len);
    let metadata = select(vec![
        (Metadata::Family, 1),
        (Metadata::Protocol, 1),
        (Metadata::Mark, 4),
        (Metadata::InIndex, 4),
        (Metadata::InName, 16),
        (Metadata::OutName, 16),
    ]);
    let compare = |(load, from, with): (Expression, Slot, Vec<u8>), equal| {
        let is = if equal { Comparison::Equal } else { Comparison::NotEqual };
        vec![load, Expression::Compare { from, is, with }]
    };
    let meta =
        (metadata, early(), bytes(16), any::<bool>()).prop_map(move |((load, len), to, with, equal)| {
            compare((Expression::Meta { load, to }, to, with[..len].to_vec()), equal)
        });
    let header = select(vec![Header::Network, Header::Transport]);
    let payload = (header, 0u32..60, 1usize..17, early(), bytes(16), any::<bool>()).prop_map(
        move |(header, offset, len, to, with, equal)| {
            let load = Expression::Payload { header, offset, len: u32::try_from(len).expect("small"), to };
            compare((load, to, with[..len].to_vec()), equal)
        },
    );
    let state = (slot(), slot(), bytes(4), bytes(4)).prop_map(|(from, to, mask, xor)| {
        let load = Expression::Ct { load: Connection::State, to: from };
        vec![load, Expression::Bitwise { from, to, mask, xor }]
    });
    let direction = (slot(), 0u8..2, any::<bool>()).prop_map(move |(to, with, equal)| {
        compare((Expression::Ct { load: Connection::Direction, to }, to, vec![with]), equal)
    });
    let ct_mark = slot()
        .prop_map(|to| vec![Expression::Ct { load: Connection::Mark, to }, Expression::SetMark { from: to }]);
    let mark = (slot(), bytes(4), any::<bool>()).prop_map(|(to, data, of_ct)| {
        let set = if of_ct { Expression::SetCtMark { from: to } } else { Expression::SetMark { from: to } };
        vec![Expression::Value { to, data }, set]
    });
    let log = (any::<u16>(), "[ -~]{0,120}", any::<u32>())
        .prop_map(|(group, prefix, length)| vec![Expression::Log { group, prefix, length }]);
    let stateful = stateful().prop_map(|one| vec![Expression::Stateful(one)]);
    prop_oneof![meta, payload, state, direction, ct_mark, mark, log, stateful]
}

fn stateful() -> impl Strategy<Value = Stateful> {
    prop_oneof![
        Just(Stateful::Counter),
        (1u64..1_000_000, 1u32..100_000, any::<bool>()).prop_map(|(rate, burst, over)| Stateful::Limit {
            rate,
            burst,
            over
        }),
        any::<u32>().prop_map(|count| Stateful::ConnectionsOver { count }),
    ]
}

fn rule(chain: &str, phrases: &[Phrase], sets: &BTreeMap<Name, (Set, Filled)>) -> Rule {
    let mut rule = Rule::default();
    let all: Vec<(&Name, &Set)> = sets.iter().map(|(name, (set, _))| (name, set)).collect();
    let slots = |bytes: u32| u8::try_from(bytes.div_ceil(4)).expect("a key fits the registers");
    // Registers as long as the key.
    let load = |rule: &mut Rule, set: &Set, start: u8| {
        for place in start..start + slots(set.key.len()) {
            let value = Expression::Value { to: Slot(place), data: vec![place; 4] };
            rule.expressions.push(value);
        }
    };
    let mut ended = false;
    for phrase in phrases {
        match phrase {
            Phrase::Comment(text) => rule.comment.clone_from(text),
            _ if ended => {}
            Phrase::Segment(_) if chain != "forwarded" => {}
            Phrase::Segment(slot) => {
                let slot = Slot(*slot);
                rule.expressions.extend([
                    Expression::PathSegment { to: slot },
                    Expression::ToNetwork { from: slot, to: slot },
                    Expression::LowerSegment { from: slot },
                ]);
            }
            Phrase::Plain(expressions) => rule.expressions.extend(expressions.clone()),
            Phrase::Lookup { set, inverted, start } => {
                let (of, set) = *set.get(&all);
                let start = if start + slots(set.key.len()) <= 16 { *start } else { 0 };
                let then = match &set.target {
                    Target::Nothing if *inverted => Lookup::Absent,
                    Target::Nothing => Lookup::Present,
                    // Chains that verdicts of elements lead to are not for every hook.
                    Target::Verdict if chain == "forwarded" => Lookup::Verdict,
                    Target::Verdict => continue,
                    Target::Value(fields) => Lookup::Data(Slot(16 - slots(Key(fields.clone()).len()))),
                };
                load(&mut rule, set, start);
                rule.expressions.push(Expression::Lookup { set: of.clone(), key: Slot(start), then });
                ended = then == Lookup::Verdict;
                let ports = Target::Value(vec![Field::Ipv4, Field::Port]);
                if chain == "mapped" && set.target == ports {
                    rule.expressions.push(Expression::Dnat { addr: Slot(14), port: Slot(15) });
                    ended = true;
                }
            }
            Phrase::Update { set, with } => {
                let (of, set) = *set.get(&all);
                let Some(dynamic) = set.dynamic else { continue };
                let fits = |one: &&Stateful| match one {
                    Stateful::ConnectionsOver { .. } => dynamic.timeout.is_none(),
                    _ => true,
                };
                let with = with.iter().filter(fits).copied().collect();
                load(&mut rule, set, 0);
                rule.expressions.push(Expression::Update { set: of.clone(), key: Slot(0), with });
            }
            Phrase::End(which) => {
                ended = true;
                rule.expressions.push(end(chain, *which));
            }
        }
    }
    rule
}

fn end(chain: &str, which: u8) -> Expression {
    match (chain, which % 6) {
        ("translated", 0) => Expression::Masquerade,
        ("forwarded" | "twig", 0) => Expression::Reject,
        ("forwarded", 1) => Expression::Verdict(Verdict::Goto(name("twig"))),
        ("twig", 1) => Expression::Verdict(Verdict::Jump(name("leaf"))),
        (_, 2) => Expression::Verdict(Verdict::Drop),
        (_, 3) => Expression::Verdict(Verdict::Return),
        _ => Expression::Verdict(Verdict::Accept),
    }
}

fn fields(most: usize) -> impl Strategy<Value = Vec<Field>> {
    prop::collection::vec(select(Field::ALL.to_vec()), 1..=most)
        .prop_filter("fits the registers", |fields| Key(fields.clone()).len() <= 64)
}

fn target() -> impl Strategy<Value = Target> {
    prop_oneof![
        3 => Just(Target::Nothing),
        2 => Just(Target::Verdict),
        2 => fields(4).prop_map(Target::Value),
        1 => Just(Target::Value(vec![Field::Ipv4, Field::Port])),
    ]
}

fn set() -> impl Strategy<Value = (Set, Filled)> {
    let plain = (fields(5), target(), prop::collection::vec(prop::collection::vec(any::<u8>(), 129), 0..30))
        .prop_map(|(key, target, seeds)| plain_set(Key(key), target, &seeds));
    let ends = prop::collection::vec((prop::collection::vec(any::<u8>(), 64), any::<u8>()), 0..40);
    let ranges = (prop::collection::vec(select(Field::ALL.to_vec()), 1..4), ends)
        .prop_map(|(more, ends)| ranged_set([vec![Field::Ipv4], more].concat(), &ends));
    let timeout = prop::option::of((1u64..100_000).prop_map(|seconds| seconds * 1000));
    let dynamic = (fields(4), 1u32..100_000, timeout).prop_map(|(key, size, timeout)| {
        let dynamic = Some(Dynamic { size, timeout });
        let set = Set { key: Key(key), target: Target::Nothing, ranges: false, dynamic };
        (set, Filled::default())
    });
    prop_oneof![3 => plain, 1 => ranges, 1 => dynamic]
}

/// The fields' bytes, taken from a seed, filled up as a key.
fn bytes(fields: &[Field], seed: &[u8]) -> Vec<u8> {
    let single = fields.len() == 1;
    let mut all = Vec::new();
    for field in fields {
        let len = field.len() as usize;
        all.extend_from_slice(&seed[all.len()..all.len() + len]);
        if !single {
            all.resize(all.len().next_multiple_of(4), 0);
        }
    }
    all
}

fn plain_set(key: Key, target: Target, seeds: &[Vec<u8>]) -> (Set, Filled) {
    let mut seen = BTreeSet::new();
    let mut elements = Vec::new();
    for seed in seeds {
        let (first, second) = seed.split_at(64);
        let key = bytes(&key.0, first);
        let data = match &target {
            Target::Nothing => Data::Nothing,
            Target::Verdict => Data::Verdict(match second[0] % 4 {
                0 => Verdict::Accept,
                1 => Verdict::Drop,
                2 => Verdict::Goto(name("twig")),
                _ => Verdict::Jump(name("leaf")),
            }),
            Target::Value(fields) => Data::Value(bytes(fields, second).into()),
        };
        if seen.insert(key.clone()) {
            elements.push((key, data));
        }
    }
    elements.sort();
    let set = Set { key, target, ranges: false, dynamic: None };
    (set, Filled { elements, ranges: Ranges::default() })
}

/// The first field keeps the ranges apart; the others go from what the seed says upwards.
fn ranged_set(fields: Vec<Field>, ends: &[(Vec<u8>, u8)]) -> (Set, Filled) {
    let pairs: Vec<(Vec<u8>, Vec<u8>)> = (0u32..)
        .zip(ends)
        .map(|(place, (seed, width))| {
            let mut low = bytes(&fields, seed);
            let mut high = low.clone();
            let mut at = 0;
            for field in &fields {
                let last = at + field.len() as usize - 1;
                high[last] = high[last].saturating_add(*width);
                at += field.padded() as usize;
            }
            low[..4].copy_from_slice(&(place * 256).to_be_bytes());
            high[..4].copy_from_slice(&(place * 256 + u32::from(*width)).to_be_bytes());
            (low, high)
        })
        .collect();
    let key = Key(fields);
    let ranges = Ranges::new(key.len(), pairs.iter().map(|(low, high)| (low.as_slice(), high.as_slice())));
    let set = Set { key, target: Target::Nothing, ranges: true, dynamic: None };
    (set, Filled { elements: Vec::new(), ranges })
}
