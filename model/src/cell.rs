//! The cell: what is wanted, what is believed, and the step between them. No I/O, no clock.
//!
//! ```text
//!  edits ──▶ inputs ──plan──▶ wanted ┐
//!                                    ├─diff──▶ Step ──(a kernel carries it out)──▶ settle ──▶ believed
//!            audit ◀── seen          ┘
//! ```
//! *Wanted* follows from the inputs. *Believed* is what the kernel acknowledged; a key that is absent there is surely
//! absent in the kernel. *Seen* is what an audit read. Edits touch keys, and a diff looks at touched keys only, so a
//! container's ADD costs what it changes.

pub mod roster;
pub mod step;
pub mod unit;

use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::Arc;

pub use roster::{Presence, Record, Roster};
pub use step::{Belief, Change, Key, Object, Outcome, PeerSpec, Seen, Step, Stray, VtepSpec};
pub use unit::{CellConfig, Inputs, UnderlayDevice, Unit, VXLAN_OVERHEAD};

use crate::address::{DeviceName, OverlayAddr};
use crate::container::{Container, Handle, Owner, PortMapping};
use crate::lease::{Lease, Peers};
use crate::profile::Profile;
use crate::reason::Reason;
use unit::{plan, plan_unit, units};

/// A container as it is asked for; the cell gives it an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub handle: Handle,
    pub interface: DeviceName,
    /// Bytes; none: what the overlay carries.
    pub mtu: Option<u32>,
    pub owner: Owner,
    pub ports: Vec<PortMapping>,
    pub profile: Arc<Profile>,
}

/// What a delete found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Nothing is left to wait for.
    Absent,
    /// The link is removed by the next step.
    Leaving(OverlayAddr),
}

/// A change that the kernel did not carry out. It is tried again with the next step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fault {
    pub key: Key,
    pub why: Reason,
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

#[derive(Debug, Clone)]
pub struct Cell {
    inputs: Inputs,
    fenced: Option<Reason>,
    units: BTreeMap<Unit, Key>,
    wanted: BTreeMap<Key, Object>,
    believed: BTreeMap<Key, Belief>,
    touched: BTreeSet<Key>,
    /// Links of containers added since the last step: absent, but not lost.
    unborn: BTreeSet<OverlayAddr>,
    records: Vec<Record>,
}

impl Cell {
    pub fn new(config: CellConfig) -> Self {
        let inputs =
            Inputs { config, device: None, lease: None, peers: BTreeMap::new(), roster: Roster::default() };
        Self {
            inputs,
            fenced: None,
            units: BTreeMap::new(),
            wanted: BTreeMap::new(),
            believed: BTreeMap::new(),
            touched: BTreeSet::new(),
            unborn: BTreeSet::new(),
            records: Vec::new(),
        }
    }

    pub fn inputs(&self) -> &Inputs {
        &self.inputs
    }

    pub fn roster(&self) -> &Roster {
        &self.inputs.roster
    }

    pub fn fenced(&self) -> Option<&Reason> {
        self.fenced.as_ref()
    }

    // === edits ===

    /// Takes back what the journal holds.
    pub fn replay(&mut self, records: impl IntoIterator<Item = Record>) {
        for record in records {
            self.inputs.roster.apply(&record);
        }
        self.replan_all();
    }

    pub fn underlay(&mut self, device: Option<UnderlayDevice>) {
        if self.inputs.device != device {
            self.inputs.device = device;
            self.replan_all();
        }
    }

    /// The cell's own lease and the others'. Of those that overlap one is kept: a table that holds more is about to
    /// change.
    pub fn leases(&mut self, own: Option<Lease>, peers: &Peers) {
        if self.inputs.lease != own {
            self.inputs.lease = own;
            self.inputs.roster.lease(own.map(|lease| lease.subnet));
            self.replan_all();
        }
        let mut by_subnet = BTreeMap::new();
        let mut end = None;
        let mut sorted: Vec<&Lease> = peers.values().collect();
        sorted.sort_by_key(|lease| (lease.subnet.bounds(), lease.underlay));
        for lease in sorted {
            let (first, last) = lease.subnet.bounds();
            if end.is_none_or(|end| end < first) {
                by_subnet.insert(lease.subnet, *lease);
                end = Some(last);
            }
        }
        let before = mem::replace(&mut self.inputs.peers, by_subnet);
        let differs = |subnet: &_| before.get(subnet) != self.inputs.peers.get(subnet);
        let subnets = before.keys().chain(self.inputs.peers.keys()).copied().filter(differs);
        for subnet in subnets.collect::<BTreeSet<_>>() {
            self.replan(Unit::Peer(subnet));
        }
    }

    /// While there is a reason, no container is added; those that are there keep all they have.
    pub fn fence(&mut self, reason: Option<Reason>) {
        self.fenced = reason;
    }

    /// Whether a container could be added now, and if not, why.
    pub fn ready(&self) -> Result<(), Reason> {
        if let Some(reason) = &self.fenced {
            return Err(reason.clone());
        }
        let Some(lease) = self.inputs.lease else {
            return Err(Reason::NoLeaseYet { why: "the controller has not answered yet".into() });
        };
        if self.inputs.device.is_none() {
            return Err(Reason::Starting);
        }
        if self.inputs.roster.ipam().next().is_none() {
            return Err(Reason::SubnetFull { subnet: lease.subnet.to_string() });
        }
        Ok(())
    }

    pub fn add(&mut self, wanted: Wanted) -> Result<Arc<Container>, Reason> {
        match self.inputs.roster.get(&wanted.handle) {
            None => {}
            Some((_, Presence::Leaving)) => return Err(Reason::Busy),
            Some(_) => return Err(Reason::AlreadyAdded { handle: wanted.handle.to_string() }),
        }
        self.ready()?;
        let (Some(addr), Some(fits)) = (self.inputs.roster.ipam().next(), self.inputs.mtu()) else {
            return Err(Reason::Bug { invariant: "a ready cell has an address and an MTU".into() });
        };
        let mtu = wanted.mtu.unwrap_or(fits);
        // RFC 791: every IPv4 module must forward 68 bytes without fragmenting.
        if !(68..=fits).contains(&mtu) {
            let why = format!("{mtu} is outside 68 to {fits}, what the overlay carries here");
            return Err(Reason::InvalidField { field: "mtu".into(), why });
        }
        let container = Arc::new(Container {
            handle: wanted.handle,
            addr,
            interface: wanted.interface,
            mtu,
            owner: wanted.owner,
            ports: wanted.ports,
            profile: Some(wanted.profile.digest()),
        });
        self.record(Record::Present(Arc::clone(&container)));
        self.unborn.insert(addr);
        self.replan(Unit::Container(container.handle.clone()));
        Ok(container)
    }

    pub fn drop(&mut self, handle: &Handle) -> Dropped {
        let Some((container, presence)) = self.inputs.roster.get(handle) else { return Dropped::Absent };
        let addr = container.addr;
        if presence != Presence::Leaving {
            self.record(Record::Leaving(handle.clone()));
            self.replan(Unit::Container(handle.clone()));
        }
        if self.believed.contains_key(&Key::Link(addr)) {
            return Dropped::Leaving(addr);
        }
        self.unborn.remove(&addr);
        self.record(Record::Resting(addr));
        Dropped::Absent
    }

    /// The kernel said that a link is gone. Unless we removed it, its container's namespace has ended.
    pub fn link_gone(&mut self, addr: OverlayAddr) -> Option<Handle> {
        let (container, presence) = self.inputs.roster.with_addr(addr)?;
        let handle = container.handle.clone();
        if presence != Presence::Present || !self.believed.contains_key(&Key::Link(addr)) {
            return None;
        }
        self.believed.remove(&Key::Link(addr));
        self.inputs.roster.set_lost(&handle, true);
        self.replan(Unit::Container(handle.clone()));
        Some(handle)
    }

    /// The connections of these resting addresses are gone: they may be given out again.
    pub fn forgotten(&mut self, addrs: &BTreeSet<OverlayAddr>) {
        for addr in addrs.intersection(&self.inputs.roster.resting().clone()) {
            self.record(Record::Free(*addr));
        }
    }

    /// What changed in the roster since it was last asked. Belongs into the journal before the kernel hears of it.
    pub fn take_records(&mut self) -> Vec<Record> {
        mem::take(&mut self.records)
    }

    fn record(&mut self, record: Record) {
        self.inputs.roster.apply(&record);
        self.records.push(record);
    }

    fn replan(&mut self, unit: Unit) {
        let now = plan_unit(&unit, &self.inputs);
        let before = match &now {
            Some((key, _)) => self.units.insert(unit, key.clone()),
            None => self.units.remove(&unit),
        };
        if let Some(key) = before {
            self.wanted.remove(&key);
            self.touched.insert(key);
        }
        if let Some((key, object)) = now {
            self.touched.insert(key.clone());
            self.wanted.insert(key, object);
        }
    }

    fn replan_all(&mut self) {
        let all: BTreeSet<Unit> = self.units.keys().cloned().chain(units(&self.inputs)).collect();
        for unit in all {
            self.replan(unit);
        }
    }

    // === diff, settle, audit ===

    /// What has to change among the touched keys, in order. Empty if wanted and believed agree.
    pub fn diff(&mut self) -> Step {
        self.expect_peers_to_die_with_the_vtep();
        let mut step = Step::default();
        for key in mem::take(&mut self.touched) {
            // Without a lease nobody knows what belongs on the overlay: what is there stays as it is.
            if !matches!(key, Key::Link(_)) && !self.inputs.knows_overlay() {
                self.touched.insert(key);
                continue;
            }
            let (was, will) = (self.believed.get(&key).cloned(), self.wanted.get(&key).cloned());
            let same = match (&was, &will) {
                (Some(Belief::Holds(is)), Some(will)) => is == will,
                (was, will) => was.is_none() && will.is_none(),
            };
            let list = if will.is_some() { &mut step.lay } else { &mut step.remove };
            if !same {
                list.push(Change { key, was, will });
            }
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
            self.touched.insert(key);
        }
    }

    /// Takes note of how a step went.
    pub fn settle(&mut self, step: &Step, outcome: &Outcome) -> Vec<Fault> {
        let mut faults = Vec::new();
        for Change { key, will, .. } in step.changes() {
            if let Key::Link(addr) = key {
                self.unborn.remove(addr);
            }
            if let Some(why) = outcome.failed.get(key) {
                self.believed.insert(key.clone(), Belief::Unknown);
                self.touched.insert(key.clone());
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
                self.touched.insert(key.clone());
            }
        }
    }

    /// Believes what was seen, whatever was believed before, and touches what differs from what is wanted.
    pub fn audit(&mut self, seen: Seen) -> Vec<Drift> {
        let mut drift = Vec::new();
        for (key, belief) in &seen {
            if let (Key::Link(addr), Belief::Holds(Object::Link(link))) = (key, belief)
                && self.inputs.roster.with_addr(*addr).is_none()
                && self.inputs.roster.get(&link.handle).is_none()
            {
                let container = Container {
                    handle: link.handle.clone(),
                    addr: *addr,
                    interface: link.interface.clone(),
                    mtu: link.mtu,
                    owner: Owner::default(),
                    ports: Vec::new(),
                    profile: None,
                };
                self.record(Record::Present(Arc::new(container)));
                self.replan(Unit::Container(link.handle.clone()));
                drift.push(Drift::Adopted(link.handle.clone()));
            }
        }
        let present = self.inputs.roster.iter().filter(|(_, presence)| *presence == Presence::Present);
        let gone = |addr| !seen.contains_key(&Key::Link(addr)) && !self.unborn.contains(&addr);
        let lost = present.filter(|(container, _)| gone(container.addr));
        for handle in lost.map(|(container, _)| container.handle.clone()).collect::<Vec<_>>() {
            self.inputs.roster.set_lost(&handle, true);
            self.replan(Unit::Container(handle.clone()));
            drift.push(Drift::Lost(handle));
        }
        let keys: BTreeSet<Key> = self.wanted.keys().chain(seen.keys()).cloned().collect();
        for key in keys {
            match (seen.get(&key), self.wanted.get(&key)) {
                (Some(Belief::Holds(is)), Some(will)) if is == will => {}
                (_, Some(_)) => drift.push(Drift::Differs(key.clone())),
                (_, None) => drift.push(Drift::Unwanted(key.clone())),
            }
            self.touched.insert(key);
        }
        let leaving: Vec<_> = self.inputs.roster.iter().filter(|(_, p)| *p == Presence::Leaving).collect();
        let ended =
            leaving.into_iter().map(|(c, _)| c.addr).filter(|addr| !seen.contains_key(&Key::Link(*addr)));
        for addr in ended.collect::<Vec<_>>() {
            self.record(Record::Resting(addr));
        }
        self.believed = seen;
        if self.wanted != plan(&self.inputs) {
            drift.push(Drift::Bug);
            self.replan_all();
        }
        drift
    }

    /// Whether a touched key waits for the next step: something failed, or is not known yet.
    pub fn unsettled(&self) -> bool {
        !self.touched.is_empty()
    }

    pub fn wanted(&self) -> &BTreeMap<Key, Object> {
        &self.wanted
    }

    pub fn believed(&self) -> &BTreeMap<Key, Belief> {
        &self.believed
    }
}
