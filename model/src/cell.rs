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

mod audit;
mod containers;
mod groups;
pub mod roster;
pub mod step;
pub mod unit;
mod wave;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::mem;

pub use audit::{Drift, Scope};
pub use containers::{Dropped, Wanted};
pub use roster::{Presence, Record, Roster};
pub use step::{Belief, Change, Firewall, Key, Object, Outcome, PeerSpec, Seen, Step, Stray, VtepSpec};
pub use unit::{CellConfig, Inputs, OverlayIngress, UnderlayDevice, Unit, VXLAN_OVERHEAD};
pub use wave::Fault;

use crate::address::{DeviceName, OverlayAddr};
use crate::container::{Container, Handle};
use crate::firewall::{Guard, limits_of};
use crate::lease::{Lease, Peers};
use crate::policy::{AppGuid, Policies, PolicyTag};
use crate::reason::Reason;
use groups::Groups;
use unit::{plan_unit, units};

#[derive(Debug, Clone)]
pub struct Cell {
    inputs: Inputs,
    fenced: Option<Reason>,
    /// What each was last planned to hold.
    units: BTreeMap<Unit, Box<[(Key, Object)]>>,
    wanted: BTreeMap<Key, Object>,
    believed: BTreeMap<Key, Belief>,
    /// Some more than once.
    touched: Vec<Key>,
    /// Links of containers added since the last step: absent, but not lost.
    unborn: BTreeSet<OverlayAddr>,
    groups: Option<Groups>,
    records: Vec<Record>,
}

impl Cell {
    pub fn new(config: CellConfig) -> Self {
        let inputs = Inputs {
            config,
            device: None,
            lease: None,
            peers: BTreeMap::new(),
            leased: BTreeSet::new(),
            ways: BTreeSet::new(),
            guard: Guard::default(),
            policies: Policies::new(),
            router: None,
            log_c2c: false,
            roster: Roster::default(),
        };
        let mut cell = Self {
            inputs,
            fenced: None,
            units: BTreeMap::new(),
            wanted: BTreeMap::new(),
            believed: BTreeMap::new(),
            touched: Vec::new(),
            unborn: BTreeSet::new(),
            groups: None,
            records: Vec::new(),
        };
        cell.replan(Unit::Base);
        cell
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

    /// The devices that lead to the world.
    pub fn ways(&mut self, ways: BTreeSet<DeviceName>) {
        if self.inputs.ways != ways {
            self.inputs.ways = ways;
            self.replan(Unit::Base);
        }
    }

    pub fn guard(&mut self, guard: Guard) {
        if self.inputs.guard != guard {
            self.inputs.guard = guard;
            self.replan(Unit::Base);
        }
    }

    /// All that is known of policies, as of one answer of the policy server in which [`Turns`](crate::policy::turns::Turns)
    /// are noted.
    pub fn policies(&mut self, policies: Policies) {
        let before = mem::replace(&mut self.inputs.policies, policies);
        let differs = |guid: &&AppGuid| before.get(*guid) != self.inputs.policies.get(*guid);
        let apps: BTreeSet<AppGuid> =
            before.keys().chain(self.inputs.policies.keys()).filter(differs).cloned().collect();
        for guid in apps {
            for handle in self.inputs.roster.of_app(&guid).cloned().collect::<Vec<_>>() {
                self.replan_container(&handle);
            }
            self.replan(Unit::App(guid));
        }
        if self.inputs.router.is_some() {
            self.replan(Unit::Base);
        }
    }

    /// The tag by which routers on the overlay are known, as the policy server last said.
    pub fn router(&mut self, tag: PolicyTag) {
        let router = Some(tag).filter(|_| self.inputs.config.ingress != OverlayIngress::Off);
        if self.inputs.router != router {
            self.inputs.router = router;
            self.replan(Unit::Base);
        }
    }

    /// Whether what is between containers is logged, whatever their profiles say.
    pub fn log_c2c(&mut self, on: bool) {
        if self.inputs.log_c2c != on {
            self.inputs.log_c2c = on;
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
        let leased = self.inputs.peers.values().map(|lease| lease.underlay).collect();
        let before = mem::replace(&mut self.inputs.leased, leased);
        let differs: Vec<_> = before.symmetric_difference(&self.inputs.leased).copied().collect();
        for underlay in differs {
            self.replan(Unit::Leased(underlay));
        }
    }

    /// While there is a reason, no container is added; those that are there keep all they have.
    pub fn fence(&mut self, reason: Option<Reason>) {
        self.fenced = reason;
    }

    /// What changed in the roster since it was last asked. Belongs into the journal before the kernel hears of it.
    pub fn take_records(&mut self) -> Vec<Record> {
        mem::take(&mut self.records)
    }

    fn record(&mut self, record: Record) {
        let roster = &self.inputs.roster;
        let app = match &record {
            Record::Present(container) => container.owner.app(),
            Record::Resting(addr) => roster.with_addr(*addr).and_then(|(container, _)| container.owner.app()),
            Record::Profile(_)
            | Record::Assigned(..)
            | Record::Fitted(..)
            | Record::Leaving(_)
            | Record::Free(_) => None,
        };
        let turned = self.inputs.roster.apply(&record);
        if let Some(guid) = app.filter(|guid| self.inputs.policies.contains_key(guid)) {
            self.replan(Unit::App(guid));
        }
        self.records.push(record);
        for known in turned {
            self.replan(Unit::Profile(known.digest()));
            self.replan(Unit::Settings(known.settings_digest()));
            for limit in limits_of(known.profile(), self.inputs.log_c2c) {
                self.replan(Unit::Limit(limit));
            }
        }
    }

    /// What stays as it is is not touched: where it is not believed, it was touched before.
    fn replan(&mut self, unit: Unit) {
        let now = plan_unit(&unit, &self.inputs).into_boxed_slice();
        let place = self.units.entry(unit);
        let before = match &place {
            Entry::Occupied(there) => &**there.get(),
            Entry::Vacant(_) => &[],
        };
        for n in 0..before.len().max(now.len()) {
            let (was, is) = (before.get(n), now.get(n));
            // Most stand as they stood.
            if was == is {
                continue;
            }
            if let Some((key, _)) = was
                && is.is_none_or(|(still, _)| still != key)
                && now.iter().all(|(still, _)| still != key)
            {
                self.wanted.remove(key);
                self.touched.push(key.clone());
            }
            let Some((key, object)) = is else { continue };
            match self.wanted.entry(key.clone()) {
                Entry::Occupied(there) if there.get() == object => {}
                place => {
                    self.touched.push(key.clone());
                    place.insert_entry(object.clone());
                }
            }
        }
        match place {
            Entry::Occupied(there) if now.is_empty() => drop(there.remove()),
            Entry::Vacant(_) if now.is_empty() => {}
            place => drop(place.insert_entry(now)),
        }
    }

    fn replan_container(&mut self, handle: &Handle) {
        self.replan(Unit::Container(handle.clone()));
        self.replan(Unit::Granted(handle.clone()));
    }

    fn replan_all(&mut self) {
        let all: BTreeSet<Unit> = self.units.keys().cloned().chain(units(&self.inputs)).collect();
        for unit in all {
            self.replan(unit);
        }
    }

    /// Whether a touched key waits for the next step: something failed, or is not known yet.
    pub fn unsettled(&self) -> bool {
        !self.touched.is_empty()
    }

    /// Whether a part of the firewall waits for the next step.
    pub fn unsettled_firewall(&self) -> bool {
        self.touched.iter().any(Key::is_firewall)
    }

    pub fn wanted(&self) -> &BTreeMap<Key, Object> {
        &self.wanted
    }

    pub fn believed(&self) -> &BTreeMap<Key, Belief> {
        &self.believed
    }

    /// The parts of the firewall that a container's packets meet.
    pub fn rules_of(&self, container: &Container) -> impl Iterator<Item = &Key> {
        let app = container.owner.app().map(Unit::App);
        let shared = [Some(Unit::Base), app].into_iter().flatten().flat_map(|unit| self.keys(&unit));
        shared.chain(self.keys_of(container)).filter(|key| key.is_firewall())
    }

    /// What the kernel has to hold for a container and its profile.
    pub fn keys_of(&self, container: &Container) -> impl Iterator<Item = &Key> {
        let own = [Unit::Container, Unit::Granted].map(|unit| unit(container.handle.clone()));
        let known = container.profile.and_then(|digest| self.inputs.roster.profile(digest));
        let shared =
            known.map(|known| [Unit::Profile(known.digest()), Unit::Settings(known.settings_digest())]);
        own.into_iter().chain(shared.into_iter().flatten()).flat_map(|unit| self.keys(&unit))
    }

    fn keys(&self, unit: &Unit) -> impl Iterator<Item = &Key> + use<'_> {
        self.units.get(unit).into_iter().flatten().map(|(key, _)| key)
    }
}
