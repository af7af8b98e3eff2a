//! A wave: the step from what is believed to what is wanted, and what its outcome makes of belief.

use std::mem;

use nf_tables::Data;

use super::{Belief, Cell, Change, Firewall, Key, Object, Outcome, Presence, Record, Step};
use crate::address::OverlayAddr;
use crate::firewall::{Content, Part};
use crate::reason::Reason;

/// A change that the kernel did not carry out. It is tried again with the next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub key: Key,
    pub why: Reason,
}

impl Cell {
    /// What has to change among the touched keys, in order. Empty if wanted and believed agree.
    pub fn diff(&mut self) -> Step {
        self.expect_peers_to_die_with_the_vtep();
        let mut step = Step::default();
        let mut touched = mem::take(&mut self.touched);
        touched.sort_unstable();
        touched.dedup();
        step.firewall.changes.reserve(touched.len());
        for key in touched {
            if self.is_held_back(&key) {
                self.touched.push(key);
                continue;
            }
            let (was, will) = (self.believed.get(&key), self.wanted.get(&key));
            let same = match (was, will) {
                (Some(Belief::Holds(is)), Some(will)) => is == will,
                (was, will) => was.is_none() && will.is_none(),
            };
            if same {
                continue;
            }
            let list = match will {
                _ if key.is_firewall() => &mut step.firewall.changes,
                Some(_) => &mut step.lay,
                None => &mut step.remove,
            };
            let (was, will) = (was.cloned(), will.cloned());
            list.push(Change { key, was, will });
        }
        let changes = &step.firewall.changes;
        step.firewall.met =
            changes.iter().any(|change| self.is_met(change)) && !changes.iter().any(makes_table);
        if step.firewall.changes.iter().any(needs_new_table) {
            step.firewall = self.whole_firewall();
        }
        step.lay.sort_by(|a, b| a.key.cmp(&b.key));
        step.remove.sort_by(|a, b| b.key.cmp(&a.key));
        // A subnet that is cut anew shares its gateway with the old one: the old one has to go first.
        let overlaps = |change: &Change| match change.key {
            Key::Peer(old) => {
                step.lay.iter().any(|laid| matches!(laid.key, Key::Peer(new) if new.overlaps(old)))
            }
            _ => false,
        };
        let (first, last) = step.remove.into_iter().partition(overlaps);
        step.remove = last;
        step.lay.splice(0..0, first);
        step
    }

    /// Without a lease nobody knows what belongs on the overlay: what is there stays as it is.
    fn is_held_back(&self, key: &Key) -> bool {
        key.is_overlay() && !self.inputs.knows_overlay()
    }

    fn whole_firewall(&self) -> Firewall {
        let wanted = self.wanted.iter().filter(|(key, _)| key.is_firewall() && !self.is_held_back(key));
        let kept = self.believed.iter().filter(|(key, _)| key.is_firewall() && self.is_held_back(key));
        let kept = kept.filter_map(|(key, belief)| match belief {
            Belief::Holds(object) => Some((key, object)),
            Belief::Unknown => None,
        });
        let create = |(key, object): (&Key, &Object)| Change {
            key: key.clone(),
            was: None,
            will: Some(object.clone()),
        };
        Firewall { anew: true, met: false, changes: wanted.chain(kept).map(create).collect() }
    }

    /// Whether packets that are on their way may be led elsewhere by this change.
    fn is_met(&self, change: &Change) -> bool {
        let leads_from = match (change.key.part(), change.will.as_ref().and_then(Object::content)) {
            (Some(Part::Element(_, key)), Some(Content::Element(Data::Verdict(_)))) => {
                <[u8; 4]>::try_from(&key[..]).ok().map(|addr| OverlayAddr::new(addr.into()))
            }
            _ => None,
        };
        let changes = change.was.is_some() && change.will.is_some();
        changes || leads_from.is_some_and(|addr| !self.unborn.contains(&addr))
    }

    /// Routes, neighbours and forwarding entries go with their device when it is made anew.
    fn expect_peers_to_die_with_the_vtep(&mut self) {
        let (Some(was), Some(Object::Vtep(will))) =
            (self.believed.get(&Key::Vtep), self.wanted.get(&Key::Vtep))
        else {
            return;
        };
        let kept = matches!(was, Belief::Holds(Object::Vtep(is)) if is.same_device(will));
        if kept || !self.touched.contains(&Key::Vtep) {
            return;
        }
        let on_vtep = |key: &Key| matches!(key, Key::Peer(_) | Key::Stray(_));
        let dying: Vec<Key> = self.believed.keys().filter(|key| on_vtep(key)).cloned().collect();
        for key in dying {
            self.believed.insert(key.clone(), Belief::Unknown);
            self.touched.push(key);
        }
    }

    /// Takes note of how a step went.
    pub fn settle(&mut self, step: &Step, outcome: &Outcome) -> Vec<Fault> {
        let mut faults = Vec::new();
        if step.firewall.anew
            && !step.firewall.changes.iter().any(|change| outcome.failed.contains_key(&change.key))
        {
            self.believed.retain(|key, _| !key.is_firewall());
        }
        for Change { key, will, .. } in step.changes() {
            if let Key::Link(addr) = key {
                self.unborn.remove(addr);
            }
            if let Some(why) = outcome.failed.get(key) {
                // A transaction that failed has changed nothing.
                if !key.is_firewall() {
                    self.believed.insert(key.clone(), Belief::Unknown);
                }
                self.touched.push(key.clone());
                faults.push(Fault { key: key.clone(), why: why.clone() });
                continue;
            }
            match (will, key) {
                (Some(object), _) => {
                    self.believed.insert(key.clone(), Belief::Holds(object.clone()));
                }
                (None, Key::Link(addr)) => {
                    self.believed.remove(key);
                    if self.inputs.roster.with_addr(*addr).is_some_and(|(_, p)| p == Presence::Leaving) {
                        self.record(Record::Resting(*addr));
                    }
                }
                (None, _) => {
                    self.believed.remove(key);
                    self.doubt_peers_that_shared_with(key);
                }
            }
        }
        faults
    }

    /// Subnets that begin with one address share a neighbour and a forwarding entry, which went with the one removed.
    fn doubt_peers_that_shared_with(&mut self, gone: &Key) {
        let Key::Peer(gone) = gone else { return };
        for (key, belief) in &mut self.believed {
            if matches!(key, Key::Peer(other) if other.gateway() == gone.gateway()) {
                *belief = Belief::Unknown;
                self.touched.push(key.clone());
            }
        }
    }
}

/// Nothing was there.
fn makes_table(change: &Change) -> bool {
    change.was.is_none() && change.key.part() == Some(&Part::Table)
}

/// Only chains and elements change in place; and what is not known may be anything.
fn needs_new_table(change: &Change) -> bool {
    match (&change.was, &change.will) {
        (Some(Belief::Unknown), _) => true,
        (Some(Belief::Holds(was)), Some(will)) => match (was, will) {
            (Object::Firewall(Content::Chain(was)), Object::Firewall(Content::Chain(will))) => {
                was.base != will.base
            }
            (_, Object::Firewall(Content::Element(_))) => false,
            _ => true,
        },
        _ => false,
    }
}
