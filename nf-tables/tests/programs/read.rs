//! A program from the messages that tell of it.

use std::collections::BTreeMap;

use nf_tables::decode::{Body, Found, Message, Object};
use nf_tables::{Chain, Name, Ranges, Set};

use super::{Filled, Program, name};

/// The program that a buffer's messages make.
pub(crate) fn read(all: impl IntoIterator<Item = Message>, table: &Name) -> Program {
    let mut program = Program::default();
    let mut found: BTreeMap<Name, Vec<Found>> = BTreeMap::new();
    for message in all {
        let Body::There { place, object } = message.body else { continue };
        assert!(place.is(table));
        match object {
            Object::Table => {}
            Object::Chain { name: of, base } => {
                program.chains.push((name(&of), Chain { base: base.expect("known"), rules: Vec::new() }));
            }
            Object::Rule { chain, rule, .. } => {
                let (_, found) =
                    program.chains.iter_mut().find(|(of, _)| of.as_str() == chain).expect("chain");
                found.rules.push(rule.expect("known"));
            }
            Object::Set { name: of, set } => {
                program.sets.insert(name(&of), (set.expect("known"), Filled::default()));
            }
            Object::Elements { set, elements } => {
                found
                    .entry(name(&set))
                    .or_default()
                    .extend(elements.into_iter().map(|one| one.expect("known")));
            }
        }
    }
    for (of, found) in found {
        fill(program.sets.get_mut(&of).expect("set"), found);
    }
    program
}

/// The kernel gives elements in an order of its own.
fn fill((set, filled): &mut (Set, Filled), found: Vec<Found>) {
    let ends: Vec<(&[u8], &[u8])> =
        found.iter().filter_map(|one| Some((one.key.as_slice(), one.end.as_deref()?))).collect();
    if set.ranges {
        assert_eq!(ends.len(), found.len());
        filled.ranges = Ranges::new(set.key.len(), ends);
    } else {
        assert_eq!(ends.len(), 0);
        filled.elements = found.into_iter().map(|one| (one.key, one.data)).collect();
        filled.elements.sort();
    }
}
