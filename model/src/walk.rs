//! A walk: random edits and accidents, for tests of everything that follows plans.
//!
//! The same moves drive a model of the kernel here and the real kernel in the node's tests.

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::sync::Arc;

use ipnetwork::Ipv4Network;
use proptest::prelude::*;

use crate::address::UnderlayAddr;
use crate::cell::{
    Belief, Cell, CellConfig, Change, Dropped, Key, Object, Outcome, Seen, Step, UnderlayDevice, Wanted,
};
use crate::container::{Handle, Owner};
use crate::lease::{Lease, Peers};
use crate::reason::Reason;
use crate::subnet::OverlaySubnet;

/// One move of a walk. Numbers are small, so that moves meet.
#[derive(Debug, Clone)]
pub enum Move {
    /// The cell's lease becomes that of this number.
    Lease(u8),
    /// The other cells' leases: pairs of cell and subnet.
    Peers(BTreeMap<u8, u8>),
    UnderlayMtu(u32),
    Add(u8),
    Drop(u8),
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
    /// The namespace of the container of this number ends.
    LinkGone(u8),
}

pub fn walk(longest: usize) -> impl Strategy<Value = Vec<Move>> {
    let wave = proptest::option::weighted(0.2, 0u8..6).prop_map(|fails| Move::Wave { fails });
    let accident = prop_oneof![
        1 => Just(Accident::VtepDeleted),
        3 => (0u8..6).prop_map(Accident::PeerDamaged),
        3 => (0u8..6).prop_map(Accident::LinkDamaged),
        2 => (0u8..6).prop_map(Accident::LinkGone),
    ];
    let one = prop_oneof![
        1 => (1u8..3).prop_map(Move::Lease),
        4 => proptest::collection::btree_map(0u8..6, 3u8..9, 0..5).prop_map(Move::Peers),
        1 => prop_oneof![Just(1500), Just(1400), Just(9000)].prop_map(Move::UnderlayMtu),
        6 => (0u8..6).prop_map(Move::Add),
        4 => (0u8..6).prop_map(Move::Drop),
        2 => Just(Move::Forget),
        3 => accident.prop_map(Move::Accident),
        8 => wave,
        2 => Just(Move::Audit),
    ];
    proptest::collection::vec(one, 1..longest)
}

/// The cell that walks: 10.0.0.100 on an underlay device with this index.
pub fn start(device: u32) -> Cell {
    let mut cell = Cell::new(CellConfig {
        vtep_name: "silk-vtep".parse().expect("name"),
        vtep_port: 4789,
        underlay: underlay(100),
        overlay: "10.255.0.0/16".parse().expect("network"),
        mtu: None,
    });
    cell.underlay(Some(UnderlayDevice { index: device, mtu: 1500 }));
    cell.leases(Some(Lease::new(underlay(100), subnet(1))), &Peers::new());
    cell
}

pub fn handle(n: u8) -> Handle {
    format!("container-{n}").parse().expect("handle")
}

/// A container as the platform asks for it, without rules and mapped ports.
pub fn wanted(n: u8) -> Wanted {
    Wanted {
        handle: handle(n),
        interface: "eth0".parse().expect("name"),
        mtu: None,
        owner: Owner::default(),
        ports: Vec::new(),
        profile: Arc::default(),
    }
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
        Move::UnderlayMtu(mtu) => cell.underlay(Some(UnderlayDevice { index: device, mtu: *mtu })),
        Move::Add(n) => {
            return cell.add(wanted(*n)).ok().map(|container| container.handle.clone());
        }
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
        for (n, change) in step.changes().enumerate() {
            let why = |why: &str| Reason::Kernel {
                operation: "apply".into(),
                subject: change.key.to_string(),
                why: why.into(),
            };
            if fails.is_some_and(|fails| usize::from(fails) == n) {
                self.half(change);
                outcome.failed.insert(change.key.clone(), why("injected"));
            } else if let Err(reason) = self.change(change, newborn) {
                outcome.failed.insert(change.key.clone(), why(reason));
            }
        }
        outcome
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
            self.holds.retain(|key, _| matches!(key, Key::Link(_)));
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
            Accident::LinkGone(n) => {
                let key = Key::Link(cell.roster().get(&handle(*n))?.0.addr);
                return self.holds.remove(&key).map(|_| key);
            }
        }
        None
    }
}
