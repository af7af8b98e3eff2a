//! What the kernel has to hold for a cell: pure functions of the cell's inputs.
//!
//! A unit is the smallest thing whose objects are planned together. Every object belongs to exactly one unit, so an
//! edit replans only the units it touches; [`plan`] from the whole inputs is the specification of the same result.

use std::collections::{BTreeMap, BTreeSet};

use crate::address::{DeviceName, UnderlayAddr};
use crate::cell::roster::{Presence, Roster};
use crate::cell::step::{Key, Object, PeerSpec, VtepSpec};
use crate::container::Handle;
use crate::firewall::{Base, Guard, Limit, Planned, app, base, leased, limit, limits_of, member, profile};
use crate::lease::Lease;
use crate::link::LinkSpec;
use crate::policy::{AppGuid, Policies};
use crate::profile::{Digest, Known};
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
    /// Whether containers reach each other only where a policy lets them; if not, all reach all
    /// (`disable_container_network_policy`).
    pub policy: bool,
    /// The NFLOG group of the traffic log.
    pub log_group: u16,
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
    /// The cells that hold them.
    pub leased: BTreeSet<UnderlayAddr>,
    /// Devices that lead to the world: containers send on no other.
    pub ways: BTreeSet<DeviceName>,
    pub guard: Guard,
    pub policies: Policies,
    /// What is between containers is logged, whatever their profiles say.
    pub log_c2c: bool,
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
    /// The chains that every packet meets.
    Base,
    Vtep,
    Peer(OverlaySubnet),
    /// A cell whose frames are taken.
    Leased(UnderlayAddr),
    /// The chains of all containers with this profile.
    Profile(Digest),
    Limit(Limit),
    /// Who may open connections to the containers of this app, if there are any.
    App(AppGuid),
    Container(Handle),
}

/// Total and pure: a unit whose input is gone plans nothing.
pub fn plan_unit(unit: &Unit, inputs: &Inputs) -> Vec<(Key, Object)> {
    match unit {
        Unit::Base => {
            let Inputs { config, ways, guard, .. } = inputs;
            firewall(base(&Base { config, ways, guard: *guard }))
        }
        Unit::Vtep => vtep(inputs).into_iter().collect(),
        Unit::Peer(subnet) => peer(*subnet, inputs).into_iter().collect(),
        Unit::Leased(underlay) => {
            let known = inputs.lease.is_some() && inputs.leased.contains(underlay);
            firewall(if known { leased(*underlay) } else { Vec::new() })
        }
        Unit::Profile(digest) => match inputs.roster.in_force(*digest) {
            Some(known) => {
                let Inputs { config, .. } = inputs;
                firewall(profile(*digest, known.profile(), known.layers(), config.overlay, config.log_group))
            }
            None => Vec::new(),
        },
        Unit::Limit(of) => {
            let uses = |known: &Known| limits_of(known.profile(), inputs.log_c2c).contains(of);
            let used = inputs.roster.profiles().any(|known| uses(known));
            firewall(if used { limit(*of, inputs.config.log_group) } else { Vec::new() })
        }
        Unit::App(guid) => match inputs.policies.get(guid) {
            Some(policies) if inputs.roster.of_app(guid).next().is_some() => {
                firewall(app(guid, policies, inputs.log_c2c))
            }
            _ => Vec::new(),
        },
        Unit::Container(handle) => match inputs.roster.get(handle) {
            Some((container, Presence::Present)) => {
                let known = container.profile.and_then(|digest| inputs.roster.profile(digest));
                let policies = container.owner.app().and_then(|guid| inputs.policies.get(&guid));
                let policies = policies.map(|policies| &**policies);
                let profile = known.map(|known| known.profile());
                let mut planned = firewall(member(container, profile, policies, inputs.log_c2c));
                planned.push((Key::Link(container.addr), Object::Link(LinkSpec::of(container))));
                planned
            }
            _ => Vec::new(),
        },
    }
}

fn firewall(planned: Planned) -> Vec<(Key, Object)> {
    planned.into_iter().map(|(part, content)| (Key::Firewall(part), Object::Firewall(content))).collect()
}

fn vtep(inputs: &Inputs) -> Option<(Key, Object)> {
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

fn peer(subnet: OverlaySubnet, inputs: &Inputs) -> Option<(Key, Object)> {
    let (own, peer) = (inputs.lease?, inputs.peers.get(&subnet)?);
    let spec =
        PeerSpec { subnet, underlay: peer.underlay, mac: peer.hardware_addr(), source: own.subnet.gateway() };
    // A subnet outside our overlay could take anybody's traffic; one that overlaps ours would take ours.
    let routable = inputs.config.overlay.contains(subnet) && !subnet.overlaps(own.subnet);
    (routable && inputs.device.is_some()).then_some((Key::Peer(subnet), Object::Peer(spec)))
}

pub fn units(inputs: &Inputs) -> impl Iterator<Item = Unit> {
    let peers = inputs.peers.keys().map(|subnet| Unit::Peer(*subnet));
    let leased = inputs.leased.iter().map(|underlay| Unit::Leased(*underlay));
    let profiles = inputs.roster.profiles().map(|known| Unit::Profile(known.digest()));
    let limits: BTreeSet<Limit> =
        inputs.roster.profiles().flat_map(|known| limits_of(known.profile(), inputs.log_c2c)).collect();
    let limits = limits.into_iter().map(Unit::Limit);
    let apps = inputs.policies.keys().cloned().map(Unit::App);
    let containers = inputs.roster.iter().map(|(container, _)| Unit::Container(container.handle.clone()));
    [Unit::Base, Unit::Vtep]
        .into_iter()
        .chain(peers)
        .chain(leased)
        .chain(profiles)
        .chain(limits)
        .chain(apps)
        .chain(containers)
}

/// The specification of what the kernel has to hold. Tests and the audit compare with it; no call waits for it.
pub fn plan(inputs: &Inputs) -> BTreeMap<Key, Object> {
    units(inputs).flat_map(|unit| plan_unit(&unit, inputs)).collect()
}
