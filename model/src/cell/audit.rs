//! An audit: belief becomes what was seen, and what differs from what is wanted is touched.

use std::collections::BTreeSet;
use std::mem;
use std::sync::Arc;

use super::unit::plan;
use super::{Belief, Cell, Key, Object, Presence, Record, Seen};
use crate::bandwidth::Bandwidth;
use crate::container::{Container, Handle, Owner};

/// What was looked at.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Scope {
    /// Links, the overlay's device and what stands on it.
    Links,
    /// The firewall's table.
    Firewall,
}

impl Scope {
    pub const ALL: [Self; 2] = [Self::Links, Self::Firewall];

    pub fn has(self, key: &Key) -> bool {
        key.is_firewall() == (self == Self::Firewall)
    }
}

/// A difference between what was believed and what an audit saw. The next step repairs it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Drift {
    /// Absent, changed or not whole.
    Differs(Key),
    /// Nobody asked for it: it is removed.
    Unwanted(Key),
    /// A container's link is gone, and its namespace with it: only a delete ends the container.
    Lost(Handle),
    /// A link that carries our marks but is in no record: the journal was lost, the container lives.
    Adopted(Handle),
    /// Wanted is not what the plan says.
    Bug,
}

impl Cell {
    /// Believes what was seen, whatever was believed before, and touches what differs from what is wanted.
    pub fn audit(&mut self, scope: Scope, seen: Seen) -> Vec<Drift> {
        let mut drift = Vec::new();
        if scope == Scope::Links {
            self.audit_containers(&seen, &mut drift);
        }
        let all = self.wanted.keys().chain(self.believed.keys()).chain(seen.keys());
        let keys: BTreeSet<Key> = all.filter(|key| scope.has(key)).cloned().collect();
        for key in keys {
            match (seen.get(&key), self.wanted.get(&key)) {
                (None, None) => {}
                (Some(Belief::Holds(is)), Some(will)) if is == will => {}
                (_, Some(_)) => drift.push(Drift::Differs(key.clone())),
                (_, None) => drift.push(Drift::Unwanted(key.clone())),
            }
            self.touched.push(key);
        }
        if scope == Scope::Links {
            self.end_those_who_left(&seen);
        }
        self.believed.retain(|key, _| !scope.has(key));
        self.believed.extend(seen);
        if self.wanted != plan(&self.inputs) {
            drift.push(Drift::Bug);
            // Nothing that was planned before is relied on.
            self.touched.extend(mem::take(&mut self.wanted).into_keys());
            self.units.clear();
            self.replan_all();
        }
        drift
    }

    /// Containers of a lost journal come back; links that vanished are noticed.
    fn audit_containers(&mut self, seen: &Seen, drift: &mut Vec<Drift>) {
        for (key, belief) in seen {
            if let (Key::Link(addr), Belief::Holds(Object::Link(link))) = (key, belief)
                && self.inputs.roster.with_addr(*addr).is_none()
                && self.inputs.roster.get(&link.handle).is_none()
            {
                let bandwidth = match seen.get(&Key::Shaping(*addr)) {
                    Some(Belief::Holds(Object::Shaping(shaping))) => shaping.bandwidth,
                    _ => Bandwidth::default(),
                };
                let container = Container {
                    handle: link.handle.clone(),
                    addr: *addr,
                    interface: link.interface.clone(),
                    mtu: link.mtu,
                    wanted_mtu: Some(link.mtu).filter(|mtu| self.inputs.mtu() != Some(*mtu)),
                    namespace: String::new(),
                    owner: Owner::default(),
                    ports: Vec::new(),
                    network: String::new(),
                    profile: None,
                    passed: None,
                    bandwidth,
                };
                self.record(Record::Present(Arc::new(container)));
                self.replan_container(&link.handle);
                drift.push(Drift::Adopted(link.handle.clone()));
            }
        }
        let present = self.inputs.roster.iter().filter(|(_, presence)| *presence == Presence::Present);
        let gone = |addr| !seen.contains_key(&Key::Link(addr)) && !self.unborn.contains(&addr);
        let lost = present.filter(|(container, _)| gone(container.addr));
        for handle in lost.map(|(container, _)| container.handle.clone()).collect::<Vec<_>>() {
            self.inputs.roster.set_lost(&handle, true);
            self.replan_container(&handle);
            drift.push(Drift::Lost(handle));
        }
    }

    fn end_those_who_left(&mut self, seen: &Seen) {
        let leaving = self.inputs.roster.iter().filter(|(_, presence)| *presence == Presence::Leaving);
        let ended = leaving.map(|(c, _)| c.addr).filter(|addr| !seen.contains_key(&Key::Link(*addr)));
        for addr in ended.collect::<Vec<_>>() {
            self.record(Record::Resting(addr));
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::walk;

    /// Whatever the fault was, it does not stay.
    #[test]
    fn what_is_wanted_by_mistake_is_planned_anew() {
        let mut cell = walk::start(3);
        cell.add(walk::wanted(1)).expect("added");
        let planned = cell.wanted.clone();
        let (lost, _) = cell.wanted.pop_first().expect("a key");
        let (_, object) = cell.wanted.pop_last().expect("a key");
        cell.wanted.insert(lost, object);
        let seen = cell.believed.iter().filter(|(key, _)| Scope::Links.has(key));
        let seen = seen.map(|(key, belief)| (key.clone(), belief.clone())).collect();
        assert!(cell.audit(Scope::Links, seen).contains(&Drift::Bug));
        assert_eq!(cell.wanted, planned);
    }
}
