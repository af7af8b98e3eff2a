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
mod groups;
pub mod roster;
pub mod step;
pub mod unit;
mod wave;

use std::collections::btree_map::Entry;
use std::collections::{BTreeMap, BTreeSet};
use std::mem;
use std::sync::Arc;

pub use audit::{Drift, Scope};
pub use roster::{Presence, Record, Roster};
pub use step::{Belief, Change, Firewall, Key, Object, Outcome, PeerSpec, Seen, Step, Stray, VtepSpec};
pub use unit::{CellConfig, Inputs, OverlayIngress, UnderlayDevice, Unit, VXLAN_OVERHEAD};
pub use wave::Fault;

use crate::address::{DeviceName, OverlayAddr};
use crate::bandwidth::Bandwidth;
use crate::container::{Container, Handle, Owner, PortMapping};
use crate::firewall::{Guard, limits_of};
use crate::lease::{Lease, Peers};
use crate::policy::{AppGuid, Policies, PolicyTag};
use crate::profile::Known;
use crate::reason::Reason;
use groups::Groups;
use unit::{plan_unit, units};

/// A container as it is asked for; the cell gives it an address.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Wanted {
    pub handle: Handle,
    pub interface: DeviceName,
    /// Bytes; none: what the overlay carries.
    pub mtu: Option<u32>,
    pub owner: Owner,
    pub ports: Vec<PortMapping>,
    /// The network configuration's name.
    pub network: String,
    pub profile: Arc<Known>,
    pub bandwidth: Bandwidth,
    /// The file of its network namespace, as the runtime named it.
    pub namespace: String,
}

/// What a delete found.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dropped {
    /// Nothing is left to wait for.
    Absent,
    /// The link is removed by the next step.
    Leaving(OverlayAddr),
}

#[derive(Debug, Clone)]
pub struct Cell {
    inputs: Inputs,
    fenced: Option<Reason>,
    /// What each was last planned to hold.
    units: BTreeMap<Unit, Box<[(Key, Object)]>>,
    wanted: BTreeMap<Key, Object>,
    believed: BTreeMap<Key, Belief>,
    touched: BTreeSet<Key>,
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
            touched: BTreeSet::new(),
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
        self.take_ports(&wanted.ports)?;
        let profile = wanted.profile.digest();
        if self.inputs.roster.profile(profile).is_none() {
            self.record(Record::Profile(wanted.profile));
        }
        let container = Arc::new(Container {
            handle: wanted.handle,
            addr,
            interface: wanted.interface,
            mtu,
            wanted_mtu: wanted.mtu,
            namespace: wanted.namespace,
            owner: wanted.owner,
            ports: wanted.ports,
            network: wanted.network,
            profile: Some(profile),
            passed: Some(profile),
            bandwidth: wanted.bandwidth,
        });
        // The queues of a link that stood there before are not this one's.
        if let Some(belief) = self.believed.get_mut(&Key::Shaping(addr)) {
            *belief = Belief::Unknown;
        }
        self.record(Record::Present(Arc::clone(&container)));
        self.unborn.insert(addr);
        self.replan_container(&container.handle);
        self.follow_groups(&container.handle);
        Ok(container)
    }

    /// Containers whose links carry more than the overlay now does, or less than they could; and how much they should.
    pub fn misfits(&self) -> impl Iterator<Item = (&Arc<Container>, u32)> {
        let present = self.inputs.roster.iter().filter(|(_, presence)| *presence == Presence::Present);
        present.filter_map(|(container, _)| {
            let mtu = self.inputs.link_mtu(container).filter(|mtu| *mtu != container.mtu)?;
            Some((container, mtu))
        })
    }

    /// The container's own end carries so much now: the cell's end follows. The other way round, what the container sends
    /// would be too long for the cell's end, and vanish.
    pub fn fit(&mut self, addr: OverlayAddr, mtu: u32) {
        if let Some((container, Presence::Present)) = self.inputs.roster.with_addr(addr)
            && container.mtu != mtu
        {
            let handle = container.handle.clone();
            self.record(Record::Fitted(handle.clone(), mtu));
            self.replan(Unit::Container(handle));
        }
    }

    /// Gives a container another profile. Its established connections stay.
    pub fn assign(&mut self, handle: &Handle, profile: Arc<Known>) -> Result<(), Reason> {
        let unknown = || Reason::UnknownContainer { handle: handle.to_string() };
        let (container, presence) = self.inputs.roster.get(handle).ok_or_else(unknown)?;
        let digest = profile.digest();
        if container.profile == Some(digest) || presence == Presence::Leaving {
            return Ok(());
        }
        if self.inputs.roster.profile(digest).is_none() {
            self.record(Record::Profile(profile));
        }
        self.record(Record::Assigned(handle.clone(), digest));
        self.replan(Unit::Granted(handle.clone()));
        Ok(())
    }

    /// Frees ports whose holders' namespaces have ended without a delete; refuses those that are in use.
    fn take_ports(&mut self, ports: &[PortMapping]) -> Result<(), Reason> {
        let holders = ports.iter().filter_map(|mapping| {
            let holder = self.inputs.roster.with_port(mapping.host)?;
            Some((mapping.host, self.inputs.roster.get(holder)?))
        });
        let mut ended = BTreeSet::new();
        for (port, (holder, presence)) in holders {
            match presence {
                Presence::Lost => drop(ended.insert(holder.handle.clone())),
                Presence::Leaving => return Err(Reason::Busy),
                Presence::Present => {
                    let holder = holder.handle.to_string();
                    return Err(Reason::HostPortTaken { port: port.get(), holder });
                }
            }
        }
        for handle in ended {
            self.drop(&handle);
        }
        Ok(())
    }

    pub fn drop(&mut self, handle: &Handle) -> Dropped {
        let Some((container, presence)) = self.inputs.roster.get(handle) else { return Dropped::Absent };
        let addr = container.addr;
        if presence != Presence::Leaving {
            self.record(Record::Leaving(handle.clone()));
            self.replan_container(handle);
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
        self.replan_container(&handle);
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
        let roster = &self.inputs.roster;
        let of =
            |found: Option<(&Arc<Container>, Presence)>| found.and_then(|(container, _)| container.profile);
        let concerned = match &record {
            Record::Present(container) => [container.profile, None],
            Record::Assigned(handle, digest) => [of(roster.get(handle)), Some(*digest)],
            Record::Resting(addr) => [of(roster.with_addr(*addr)), None],
            Record::Profile(_) | Record::Fitted(..) | Record::Leaving(_) | Record::Free(_) => [None, None],
        };
        let app = match &record {
            Record::Present(container) => container.owner.app(),
            Record::Resting(addr) => roster.with_addr(*addr).and_then(|(container, _)| container.owner.app()),
            Record::Profile(_)
            | Record::Assigned(..)
            | Record::Fitted(..)
            | Record::Leaving(_)
            | Record::Free(_) => None,
        };
        let in_force = |roster: &Roster| concerned.map(|digest| roster.in_force(digest?).cloned());
        let before = in_force(roster);
        self.inputs.roster.apply(&record);
        if let Some(guid) = app.filter(|guid| self.inputs.policies.contains_key(guid)) {
            self.replan(Unit::App(guid));
        }
        self.records.push(record);
        let after = in_force(&self.inputs.roster);
        for change in before.into_iter().zip(after) {
            if let (Some(known), None) | (None, Some(known)) = change {
                self.replan(Unit::Profile(known.digest()));
                self.replan(Unit::Settings(known.settings_digest()));
                for limit in limits_of(known.profile(), self.inputs.log_c2c) {
                    self.replan(Unit::Limit(limit));
                }
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
                && now.iter().all(|(still, _)| still != key)
            {
                self.wanted.remove(key);
                self.touched.insert(key.clone());
            }
            let Some((key, object)) = is else { continue };
            match self.wanted.entry(key.clone()) {
                Entry::Occupied(there) if there.get() == object => {}
                place => {
                    self.touched.insert(key.clone());
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
