//! What the kernel has to hold for a cell: pure functions of the cell's inputs.
//!
//! A unit is the smallest thing whose objects are planned together. Every object belongs to exactly one unit, so an
//! edit replans only the units it touches; [`plan`] from the whole inputs is the specification of the same result.

use std::collections::BTreeMap;

use crate::address::{DeviceName, UnderlayAddr};
use crate::cell::roster::{Presence, Roster};
use crate::cell::step::{Key, Object, PeerSpec, VtepSpec};
use crate::container::Handle;
use crate::lease::Lease;
use crate::link::LinkSpec;
use crate::subnet::{OverlayNetwork, OverlaySubnet};

/// Bytes that VXLAN over IPv4 puts around an inner IP packet: inner Ethernet 14, VXLAN 8, UDP 8, IPv4 20 (RFC 7348).
pub const VXLAN_OVERHEAD: u32 = 50;

/// What does not change while the node runs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct CellConfig {
    pub vtep_name: DeviceName,
    pub vtep_port: u16,
    pub underlay: UnderlayAddr,
    pub overlay: OverlayNetwork,
    /// Bytes of the largest inner packet, if not the underlay's MTU less [`VXLAN_OVERHEAD`].
    pub mtu: Option<u32>,
}

/// The device that owns the underlay address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct UnderlayDevice {
    pub index: u32,
    pub mtu: u32,
}

/// Everything that determines what a cell's kernel holds.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inputs {
    pub config: CellConfig,
    pub device: Option<UnderlayDevice>,
    pub lease: Option<Lease>,
    /// Other cells' leases by subnet: no two have the same.
    pub peers: BTreeMap<OverlaySubnet, Lease>,
    pub roster: Roster,
}

impl Inputs {
    /// The largest inner packet that fits the underlay, or less if configured.
    pub fn mtu(&self) -> Option<u32> {
        let fits = self.device?.mtu.saturating_sub(VXLAN_OVERHEAD);
        Some(self.config.mtu.map_or(fits, |mtu| mtu.min(fits)))
    }

    /// Without a lease or a device, what should be on the overlay is not known, which is not the same as nothing.
    pub fn knows_overlay(&self) -> bool {
        self.lease.is_some() && self.device.is_some()
    }
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Unit {
    Vtep,
    Peer(OverlaySubnet),
    Container(Handle),
}

/// Total and pure: a unit whose input is gone plans nothing.
pub fn plan_unit(unit: &Unit, inputs: &Inputs) -> Option<(Key, Object)> {
    match unit {
        Unit::Vtep => {
            let (lease, device) = (inputs.lease?, inputs.device?);
            let spec = VtepSpec {
                name: inputs.config.vtep_name.clone(),
                port: inputs.config.vtep_port,
                local: inputs.config.underlay,
                device: device.index,
                mac: lease.hardware_addr(),
                mtu: inputs.mtu()?,
                addr: lease.subnet.gateway(),
                overlay: inputs.config.overlay,
            };
            Some((Key::Vtep, Object::Vtep(spec)))
        }
        Unit::Peer(subnet) => {
            let (own, peer) = (inputs.lease?, inputs.peers.get(subnet)?);
            let spec = PeerSpec {
                subnet: *subnet,
                underlay: peer.underlay,
                mac: peer.hardware_addr(),
                source: own.subnet.gateway(),
            };
            // A subnet outside our overlay could take anybody's traffic; one that overlaps ours would take ours.
            let routable = inputs.config.overlay.contains(*subnet) && !subnet.overlaps(own.subnet);
            (routable && inputs.device.is_some()).then_some((Key::Peer(*subnet), Object::Peer(spec)))
        }
        Unit::Container(handle) => {
            let (container, presence) = inputs.roster.get(handle)?;
            (presence == Presence::Present)
                .then(|| (Key::Link(container.addr), Object::Link(LinkSpec::of(container))))
        }
    }
}

pub fn units(inputs: &Inputs) -> impl Iterator<Item = Unit> {
    let peers = inputs.peers.keys().map(|subnet| Unit::Peer(*subnet));
    let containers = inputs.roster.iter().map(|(container, _)| Unit::Container(container.handle.clone()));
    std::iter::once(Unit::Vtep).chain(peers).chain(containers)
}

/// The specification of what the kernel has to hold. Tests and the audit compare with it; no call waits for it.
pub fn plan(inputs: &Inputs) -> BTreeMap<Key, Object> {
    units(inputs).filter_map(|unit| plan_unit(&unit, inputs)).collect()
}
