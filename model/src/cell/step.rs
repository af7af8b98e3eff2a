//! What the kernel holds for a cell, as keys and contents, and a step from one state to another.

use std::collections::BTreeMap;
use std::fmt;
use std::net::Ipv4Addr;

use crate::address::{DeviceName, HardwareAddr, OverlayAddr, UnderlayAddr};
use crate::bandwidth::ShapingSpec;
use crate::firewall::{Content, Part, is_leased};
use crate::link::LinkSpec;
use crate::reason::Reason;
use crate::subnet::{OverlayNetwork, OverlaySubnet};

/// The identity of a kernel object. Ordered as objects are created; deletions run the other way.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Key {
    /// The cell's VXLAN device.
    Vtep,
    /// One other cell's subnet: a route, a permanent neighbour and a permanent FDB entry.
    Peer(OverlaySubnet),
    /// One container's veth pair.
    Link(OverlayAddr),
    /// The limits on one container's link.
    Shaping(OverlayAddr),
    /// Something on our VTEP that belongs to no peer. Seen, never wanted.
    Stray(Stray),
    /// A part of the firewall's program.
    Firewall(Part),
}

impl Key {
    pub fn is_firewall(&self) -> bool {
        self.part().is_some()
    }

    /// Of the firewall.
    pub fn part(&self) -> Option<&Part> {
        match self {
            Self::Firewall(part) => Some(part),
            _ => None,
        }
    }

    /// Whether it depends on the lease table. While that is not known, what is there stays as it is.
    pub fn is_overlay(&self) -> bool {
        match self {
            Self::Vtep | Self::Peer(_) | Self::Stray(_) => true,
            Self::Link(_) | Self::Shaping(_) => false,
            Self::Firewall(part) => is_leased(part),
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stray {
    /// A route through a gateway on the VTEP.
    Route { dst: OverlaySubnet, gateway: Ipv4Addr },
    /// An ARP entry on the VTEP.
    Neighbour(Ipv4Addr),
    /// A forwarding entry of the VTEP.
    Forward(HardwareAddr),
}

/// The content of a kernel object.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Object {
    Vtep(VtepSpec),
    Peer(PeerSpec),
    Link(LinkSpec),
    Shaping(ShapingSpec),
    Firewall(Content),
}

impl Object {
    /// Of a part of the firewall.
    pub fn content(&self) -> Option<&Content> {
        match self {
            Self::Firewall(content) => Some(content),
            _ => None,
        }
    }
}

/// The VXLAN device: VNI 1, group-based policy on, learning off, up, with the subnet's first address on it.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct VtepSpec {
    pub name: DeviceName,
    /// UDP port of the overlay.
    pub port: u16,
    pub local: UnderlayAddr,
    /// Index of the device that owns `local`.
    pub device: u32,
    pub mac: HardwareAddr,
    pub mtu: u32,
    pub addr: Ipv4Addr,
    /// The address is given with the whole overlay's prefix length, so that every gateway is on the link.
    pub overlay: OverlayNetwork,
}

impl VtepSpec {
    /// Whether the device must be made anew to become the other: these cannot be changed in place.
    pub fn same_device(&self, other: &Self) -> bool {
        (&self.name, self.port, self.local, self.device, self.mac)
            == (&other.name, other.port, other.local, other.device, other.mac)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct PeerSpec {
    pub subnet: OverlaySubnet,
    pub underlay: UnderlayAddr,
    pub mac: HardwareAddr,
    /// Source address of the cell's own packets to that subnet: our VTEP's.
    pub source: Ipv4Addr,
}

/// What is believed of an object. A key that is not in the map is surely absent.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Belief {
    Holds(Object),
    /// There may be something, whole or not: the next step lays it anew, or removes it.
    Unknown,
}

/// What was read from the kernel. A key that is not in the map was not there.
pub type Seen = BTreeMap<Key, Belief>;

/// One change of one object. `will: None` deletes; `was: None` creates.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Change {
    pub key: Key,
    pub was: Option<Belief>,
    pub will: Option<Object>,
}

/// The changes of one wave, in order. The firewall comes first and changes at once: a new link finds its rules, and a
/// link that goes has lost them. Of all others, what is laid comes before what is taken away, so that no change of one
/// cell's lease takes a working route from another.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Step {
    pub firewall: Firewall,
    pub lay: Vec<Change>,
    pub remove: Vec<Change>,
}

/// One or two transactions ([`Firewall::phases`]): of each all happens, or nothing.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Firewall {
    /// The table is replaced by what the changes create: something in it is not known, or cannot be changed in place.
    pub anew: bool,
    /// A packet may be on its way where something changes: it is not all about links that are not there yet, and there is a
    /// table that stays.
    pub met: bool,
    pub changes: Vec<Change>,
}

impl Firewall {
    /// What goes into a transaction ahead of the others, and the others.
    ///
    /// A packet chooses the old rules or the new ones when it comes, and looks into maps as they are at that moment: the old
    /// rules of a new chain are none, and what is led there by a new element is let through. And the kernel shows packets a
    /// new set's ranges a moment later than the rules that look into it (nft_do_chain in nf_tables_core.c,
    /// nft_set_commit_update in nf_tables_api.c). So new chains and sets are there before anything leads to them.
    pub fn phases(&self) -> [Vec<&Change>; 2] {
        let ahead = |change: &&Change| {
            let will = change.will.as_ref().and_then(Object::content).filter(|_| change.was.is_none());
            match will {
                Some(Content::Set(_)) => true,
                Some(Content::Chain(chain)) => chain.base.is_none(),
                Some(Content::Table | Content::Element(_)) | None => false,
            }
        };
        let (ahead, rest) = self.changes.iter().partition(|change| self.met && ahead(change));
        [ahead, rest]
    }
}

impl Step {
    pub fn is_empty(&self) -> bool {
        self.changes().next().is_none()
    }

    pub fn changes(&self) -> impl Iterator<Item = &Change> {
        self.firewall.changes.iter().chain(&self.lay).chain(&self.remove)
    }
}

/// How a step went: what failed, and why. All other changes were acknowledged by the kernel.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Outcome {
    pub failed: BTreeMap<Key, Reason>,
}

impl fmt::Display for Key {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Vtep => write!(f, "vtep"),
            Self::Peer(subnet) => write!(f, "peer {subnet}"),
            Self::Link(addr) => write!(f, "link {addr}"),
            Self::Shaping(addr) => write!(f, "shaping of {addr}"),
            Self::Stray(Stray::Route { dst, gateway }) => write!(f, "stray route {dst} via {gateway}"),
            Self::Stray(Stray::Neighbour(addr)) => write!(f, "stray neighbour {addr}"),
            Self::Stray(Stray::Forward(mac)) => write!(f, "stray forwarding entry {mac}"),
            Self::Firewall(part) => part.fmt(f),
        }
    }
}

impl fmt::Display for Change {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let verb = match (&self.was, &self.will) {
            (None, Some(_)) => "create",
            (Some(_), Some(_)) => "change",
            (_, None) => "delete",
        };
        write!(f, "{verb} {}", self.key)
    }
}
