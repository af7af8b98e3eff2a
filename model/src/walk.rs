//! A walk: random edits and accidents, for tests of everything that follows plans.
//!
//! The same moves drive a model of the kernel here and the real kernel in the node's tests.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnetwork::Ipv4Network;
use proptest::prelude::*;

use crate::address::{DeviceName, OverlayAddr, UnderlayAddr};
use crate::asg::{AddrRange, EgressRule, PortRange, Traffic};
use crate::bandwidth::{Bandwidth, Limit};
use crate::cell::{
    Belief, Cell, CellConfig, Change, Dropped, Firewall, Key, Object, Outcome, OverlayIngress, Seen, Step,
    UnderlayDevice, Wanted,
};
use crate::container::{Handle, Owner, PortMapping};
use crate::firewall::{Content, Guard, Part};
use crate::lease::{Lease, Peers};
use crate::policy::{AppGuid, Policy, PolicyTag, by_app};
use crate::profile::{HostService, Profile, Transport};
use crate::reason::Reason;
use crate::subnet::OverlaySubnet;
use nf_tables::{Data, Expression, Verdict};

/// One move of a walk. Numbers are small, so that moves meet.
#[derive(Debug, Clone)]
pub enum Move {
    /// The cell's lease becomes that of this number.
    Lease(u8),
    /// The other cells' leases: pairs of cell and subnet.
    Peers(BTreeMap<u8, u8>),
    UnderlayMtu(u32),
    /// With the profile of this number; and some have a mapped port.
    Add(u8, u8),
    Drop(u8),
    /// The container of the first number gets the profile of the second.
    Assign(u8, u8),
    /// Policies: source, destination, first port.
    Policies(BTreeSet<(u8, u8, u8)>),
    /// The tag of the overlay's routers.
    Router(u8),
    Guard(bool),
    /// What is between containers is logged.
    LogC2c(bool),
    /// Another device leads to the world.
    Way(bool),
    /// Connections of resting addresses are forgotten.
    Forget,
    /// Somebody else changes the kernel.
    Accident(Accident),
    /// The pending step is applied; the change of this number, if there is one, fails.
    Wave {
        fails: Option<u8>,
    },
    Audit,
}

#[derive(Debug, Clone)]
pub enum Accident {
    VtepDeleted,
    /// Part of the peer of this number is removed.
    PeerDamaged(u8),
    /// The link of the container of this number loses something.
    LinkDamaged(u8),
    /// The limits on the link of the container of this number lose something.
    ShapingDamaged(u8),
    /// The namespace of the container of this number ends.
    LinkGone(u8),
    /// The firewall's part of this number is deleted, as far as that can be; or changed.
    FirewallDamaged(u8),
    TableDeleted,
}

pub fn walk(longest: usize) -> impl Strategy<Value = Vec<Move>> {
    let wave = proptest::option::weighted(0.2, 0u8..40).prop_map(|fails| Move::Wave { fails });
    let accident = prop_oneof![
        1 => Just(Accident::VtepDeleted),
        3 => (0u8..6).prop_map(Accident::PeerDamaged),
        3 => (0u8..6).prop_map(Accident::LinkDamaged),
        2 => (0u8..6).prop_map(Accident::ShapingDamaged),
        2 => (0u8..6).prop_map(Accident::LinkGone),
        3 => (0u8..60).prop_map(Accident::FirewallDamaged),
        1 => Just(Accident::TableDeleted),
    ];
    let one = prop_oneof![
        1 => (1u8..3).prop_map(Move::Lease),
        4 => proptest::collection::btree_map(0u8..6, 3u8..9, 0..5).prop_map(Move::Peers),
        1 => prop_oneof![Just(1500), Just(1400), Just(9000)].prop_map(Move::UnderlayMtu),
        6 => (0u8..6, 0u8..4).prop_map(|(n, profile)| Move::Add(n, profile)),
        3 => proptest::collection::btree_set((0u8..4, 0u8..4, 0u8..3), 0..6).prop_map(Move::Policies),
        1 => (1u8..4).prop_map(Move::Router),
        1 => any::<bool>().prop_map(Move::Guard),
        1 => any::<bool>().prop_map(Move::LogC2c),
        1 => any::<bool>().prop_map(Move::Way),
        4 => (0u8..6).prop_map(Move::Drop),
        2 => (0u8..6, 0u8..2).prop_map(|(n, profile)| Move::Assign(n, profile)),
        2 => Just(Move::Forget),
        3 => accident.prop_map(Move::Accident),
        8 => wave,
        2 => Just(Move::Audit),
    ];
    proptest::collection::vec(one, 1..longest)
}

/// The cell that walks: 10.0.0.100 on an underlay device with this index.
pub fn start(device: u32) -> Cell {
    start_with(device, |_| ())
}

/// With other settings.
pub fn start_with(device: u32, settings: impl FnOnce(&mut CellConfig)) -> Cell {
    let mut config = CellConfig {
        vtep_name: "silk-vtep".parse().expect("name"),
        vtep_port: 4789,
        underlay: underlay(100),
        overlay: "10.255.0.0/16".parse().expect("network"),
        mtu: None,
        policy: true,
        cut: false,
        ingress: OverlayIngress::Taken,
        log_group: 2312,
    };
    settings(&mut config);
    let mut cell = Cell::new(config);
    cell.underlay(Some(UnderlayDevice { index: device, mtu: 1500 }));
    cell.ways(way(false).into_iter().collect());
    cell.leases(Some(Lease::new(underlay(100), subnet(1))), &Peers::new());
    cell
}

pub fn handle(n: u8) -> Handle {
    format!("container-{n}").parse().expect("handle")
}

/// A container as the platform asks for it, without rules and mapped ports.
pub fn wanted(n: u8) -> Wanted {
    wanted_as(n, 0)
}

/// Kinds differ in their profiles; every second one has a mapped port, which it shares with others.
fn wanted_as(n: u8, kind: u8) -> Wanted {
    let port = |n: u16| n.try_into().expect("port");
    let mapping = PortMapping { host: port(60_000 + u16::from(n / 2)), container: port(8080) };
    Wanted {
        handle: handle(n),
        interface: "eth0".parse().expect("name"),
        mtu: None,
        owner: Owner {
            policy_group_id: app(n % 4).to_string(),
            ports: format!("8080, {}", 2222 + u16::from(n)),
            ..Owner::default()
        },
        ports: if kind % 2 == 1 { vec![mapping] } else { Vec::new() },
        network: "weft".into(),
        profile: Arc::new(profile(kind / 2).into()),
        bandwidth: limits(n),
        namespace: String::new(),
    }
}

/// None, one way, the other, both.
fn limits(n: u8) -> Bandwidth {
    let limit = |n: u8| Limit::new(u64::from(n) * 1_000_000, u32::from(n) * 1000).ok();
    Bandwidth { to: limit(n).filter(|_| n & 1 != 0), from: limit(n).filter(|_| n & 2 != 0) }
}

pub fn app(n: u8) -> AppGuid {
    format!("app-{n}").parse().expect("guid")
}

fn tag_of(n: u8) -> PolicyTag {
    PolicyTag::new(u16::from(n).try_into().expect("tag"))
}

fn policy((source, destination, port): &(u8, u8, u8)) -> Policy {
    Policy {
        source: app(*source),
        source_tag: tag_of(*source + 1),
        destination: app(*destination),
        transport: Transport::Tcp,
        ports: PortRange::new(8080 + u16::from(*port), 8081 + u16::from(*port)).expect("range"),
    }
}

fn profile(kind: u8) -> Profile {
    let rule = |third: u8, log| EgressRule {
        to: AddrRange::new([198, 51, third, 0].into(), [198, 51, 100 + third, 255].into()).expect("range"),
        traffic: Traffic::Tcp(PortRange::new(80, 90 + u16::from(third)).expect("range")),
        log,
        index: third.into(),
    };
    let mut profile = Profile::default();
    if kind > 0 {
        profile.rules = vec![rule(1, false), rule(2, true), rule(3, false)];
        profile.settings.log_all = kind > 1;
        profile.settings.outbound_connections.max = Some(std::num::NonZeroU32::MIN);
        profile.settings.host_services = vec![HostService {
            transport: Transport::Tcp,
            addr: [169, 254, 0, 3].into(),
            port: std::num::NonZeroU16::MIN,
        }];
    }
    profile
}

fn way(second: bool) -> Option<DeviceName> {
    if second { "eth1" } else { "eth0" }.parse().ok()
}

pub fn underlay(n: u8) -> UnderlayAddr {
    Ipv4Addr::new(10, 0, 0, n.max(1)).try_into().expect("address")
}

/// A /29, so that five containers fill it; the numbers 7 and 8 are /28s that begin where 3 and 4 do.
pub fn subnet(n: u8) -> OverlaySubnet {
    let (at, prefix) = if n == 7 || n == 8 { (n - 4, 28) } else { (n, 29) };
    OverlaySubnet::Block(Ipv4Network::new(Ipv4Addr::new(10, 255, at, 0), prefix).expect("subnet"))
}

/// Makes the edits of a move. Says which containers were added.
pub fn edit(cell: &mut Cell, device: u32, mv: &Move) -> Option<Handle> {
    let own = cell.inputs().lease;
    match mv {
        Move::Lease(n) => {
            let peers = cell.inputs().peers.values().map(|lease| (lease.underlay, *lease)).collect();
            cell.leases(Some(Lease::new(underlay(100), subnet(*n))), &peers);
        }
        Move::Peers(pairs) => {
            let peers = pairs.iter().map(|(c, s)| (underlay(c + 1), Lease::new(underlay(c + 1), subnet(*s))));
            cell.leases(own, &peers.collect());
        }
        Move::UnderlayMtu(mtu) => {
            cell.underlay(Some(UnderlayDevice { index: device, mtu: *mtu }));
            let misfits: Vec<_> = cell.misfits().map(|(container, mtu)| (container.addr, mtu)).collect();
            misfits.into_iter().for_each(|(addr, mtu)| cell.fit(addr, mtu));
        }
        Move::Policies(all) => cell.policies(by_app(all.iter().map(policy))),
        Move::Router(tag) => cell.router(tag_of(*tag)),
        Move::Guard(ours) => cell.guard(if *ours { Guard::Ours } else { Guard::Iptables }),
        Move::LogC2c(on) => cell.log_c2c(*on),
        Move::Way(second) => cell.ways(way(*second).into_iter().collect()),
        Move::Add(n, kind) => {
            return cell.add(wanted_as(*n, *kind)).ok().map(|container| container.handle.clone());
        }
        // A container that is not there cannot be given anything.
        Move::Assign(n, kind) => drop(cell.assign(&handle(*n), Arc::new(profile(*kind).into()))),
        Move::Drop(n) => {
            let _: Dropped = cell.drop(&handle(*n));
        }
        Move::Forget => cell.forgotten(&cell.roster().resting().clone()),
        Move::Accident(_) | Move::Wave { .. } | Move::Audit => {}
    }
    None
}

/// A kernel that holds state: what was laid is there, whole or damaged, until it is removed.
#[derive(Debug, Clone, Default)]
pub struct KernelModel {
    pub holds: Seen,
}

impl KernelModel {
    /// Links are born only for `newborn` containers; the change with number `fails` fails, half done.
    pub fn apply(&mut self, step: &Step, newborn: &BTreeSet<Handle>, fails: Option<u8>) -> Outcome {
        let mut outcome = Outcome::default();
        let guilty = fails.and_then(|n| step.changes().nth(n.into())).map(|change| &change.key);
        for key in self.firewall(&step.firewall, guilty) {
            outcome.failed.insert(key.clone(), failure(&key, "refused"));
        }
        for change in step.changes().filter(|change| !change.key.is_firewall()) {
            if guilty == Some(&change.key) {
                self.half(change);
                outcome.failed.insert(change.key.clone(), failure(&change.key, "injected"));
            } else if let Err(reason) = self.change(change, newborn) {
                outcome.failed.insert(change.key.clone(), failure(&change.key, reason));
            }
        }
        outcome
    }

    /// All or nothing of what is left when the guilty, and those that need them, are left out. Returns these.
    fn firewall(&mut self, firewall: &Firewall, guilty: Option<&Key>) -> BTreeSet<Key> {
        let mut out: BTreeSet<Key> = guilty.filter(|key| key.is_firewall()).cloned().into_iter().collect();
        loop {
            let mut next = self.holds.clone();
            if firewall.anew {
                next.retain(|key, _| !key.is_firewall());
            }
            let taken = firewall.changes.iter().filter(|change| !out.contains(&change.key));
            let mut refused = BTreeSet::new();
            for Change { key, was, will } in taken {
                let there = next.contains_key(key);
                match will {
                    // An element that is there is not entered again with other data.
                    Some(_) if there != was.is_some() => drop(refused.insert(key.clone())),
                    None if !there => drop(refused.insert(key.clone())),
                    Some(object) => drop(next.insert(key.clone(), Belief::Holds(object.clone()))),
                    None => drop(next.remove(key)),
                }
            }
            refused.extend(dangling(&next));
            if refused.is_empty() {
                self.holds = next;
                return out;
            }
            let changed = |key: &Key| firewall.changes.iter().any(|change| change.key == *key);
            let before = out.len();
            out.extend(refused.into_iter().filter(changed));
            if out.len() == before {
                // What cannot be told apart fails together.
                return firewall.changes.iter().map(|change| change.key.clone()).collect();
            }
        }
    }

    fn change(&mut self, change: &Change, newborn: &BTreeSet<Handle>) -> Result<(), &'static str> {
        let Some(will) = &change.will else {
            self.remove(&change.key);
            return Ok(());
        };
        let is = self.holds.get(&change.key);
        match (will, is) {
            (Object::Vtep(will), Some(is)) if !matches!(is, Belief::Holds(Object::Vtep(is)) if is.same_device(will)) =>
            {
                self.remove(&Key::Vtep);
            }
            (Object::Peer(_), _) if !self.holds.contains_key(&Key::Vtep) => return Err("no such device"),
            (Object::Link(link), None) if !newborn.contains(&link.handle) => return Err("no namespace"),
            (Object::Shaping(shaping), _) if !self.holds.contains_key(&Key::Link(shaping.addr)) => {
                return Err("no such device");
            }
            _ => {}
        }
        self.holds.insert(change.key.clone(), Belief::Holds(will.clone()));
        Ok(())
    }

    fn half(&mut self, change: &Change) {
        match (&change.will, self.holds.get(&change.key)) {
            // A link or device whose creation failed is not there; anything else may be damaged.
            (Some(Object::Vtep(_)), _) => self.remove(&Key::Vtep),
            (Some(Object::Link(_)), None) | (None, None) => {}
            _ => {
                self.holds.insert(change.key.clone(), Belief::Unknown);
            }
        }
    }

    pub fn remove(&mut self, key: &Key) {
        self.holds.remove(key);
        // Subnets that begin with one address share a neighbour and a forwarding entry.
        for (other, belief) in &mut self.holds {
            if let (Key::Peer(other), Key::Peer(gone)) = (other, key)
                && other.gateway() == gone.gateway()
            {
                *belief = Belief::Unknown;
            }
        }
        if *key == Key::Vtep {
            self.holds.retain(|key, _| matches!(key, Key::Link(_) | Key::Shaping(_) | Key::Firewall(_)));
        }
        if let Key::Link(addr) = key {
            self.lose_shaping(*addr);
        }
    }

    /// Queues go with their link, the device for what the container sends does not.
    fn lose_shaping(&mut self, addr: OverlayAddr) {
        let key = Key::Shaping(addr);
        match self.holds.get(&key) {
            Some(Belief::Holds(Object::Shaping(shaping))) if shaping.bandwidth.from.is_none() => {
                self.holds.remove(&key);
            }
            Some(_) => drop(self.holds.insert(key, Belief::Unknown)),
            None => {}
        }
    }

    /// Does what an accident does. Returns the key of a link that is gone.
    pub fn accident(&mut self, cell: &Cell, accident: &Accident) -> Option<Key> {
        let mut damage = |key: Key| {
            self.holds.entry(key).and_modify(|belief| *belief = Belief::Unknown);
        };
        match accident {
            Accident::VtepDeleted => self.remove(&Key::Vtep),
            Accident::PeerDamaged(n) => damage(Key::Peer(subnet(n + 3))),
            Accident::LinkDamaged(n) => {
                let addr = cell.roster().get(&handle(*n))?.0.addr;
                damage(Key::Link(addr));
            }
            Accident::ShapingDamaged(n) => {
                let addr = cell.roster().get(&handle(*n))?.0.addr;
                damage(Key::Shaping(addr));
            }
            Accident::TableDeleted => self.holds.retain(|key, _| !key.is_firewall()),
            Accident::FirewallDamaged(n) => {
                let parts: Vec<Key> = self.holds.keys().filter(|key| key.is_firewall()).cloned().collect();
                let key = parts.get(usize::from(*n) % parts.len().max(1))?;
                let kept = self.holds.clone();
                self.holds.remove(key);
                if !dangling(&self.holds).is_empty() {
                    // It is needed: somebody changes it instead.
                    self.holds = kept;
                    self.holds.insert(key.clone(), Belief::Unknown);
                }
            }
            Accident::LinkGone(n) => {
                let key = Key::Link(cell.roster().get(&handle(*n))?.0.addr);
                let there = self.holds.contains_key(&key);
                self.remove(&key);
                return there.then_some(key);
            }
        }
        None
    }
}

fn failure(key: &Key, why: &str) -> Reason {
    Reason::Kernel { operation: "apply".into(), subject: key.to_string(), why: why.into() }
}

/// Parts of the firewall that need something that is not there.
fn dangling(holds: &Seen) -> BTreeSet<Key> {
    let has = |part: Part| holds.contains_key(&Key::Firewall(part));
    let leads = |verdict: &Verdict| match verdict {
        Verdict::Jump(chain) | Verdict::Goto(chain) => has(Part::Chain(chain.clone())),
        Verdict::Accept | Verdict::Drop | Verdict::Return => true,
    };
    let stands = |expression: &Expression| match expression {
        Expression::Verdict(verdict) => leads(verdict),
        Expression::Lookup { set, .. } | Expression::Update { set, .. } => has(Part::Set(set.clone())),
        _ => true,
    };
    let whole = |key: &Key, belief: &Belief| {
        let Key::Firewall(part) = key else { return true };
        let content = match belief {
            Belief::Holds(Object::Firewall(content)) => Some(content),
            _ => None,
        };
        match (part, content) {
            (Part::Table, _) => true,
            (Part::Element(map, _), Some(Content::Element(Data::Verdict(verdict)))) => {
                has(Part::Set(map.name().clone())) && leads(verdict)
            }
            (Part::Element(map, _), _) => has(Part::Set(map.name().clone())),
            (Part::Chain(_), Some(Content::Chain(chain))) => {
                has(Part::Table) && chain.rules.iter().all(|rule| rule.expressions.iter().all(stands))
            }
            _ => has(Part::Table),
        }
    };
    holds.iter().filter(|(key, belief)| !whole(key, belief)).map(|(key, _)| key.clone()).collect()
}
