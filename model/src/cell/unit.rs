//! What the kernel has to hold for a cell: pure functions of the cell's inputs.
//!
//! A unit is the smallest thing whose objects are planned together. Every object belongs to exactly one unit, so an
//! edit replans only the units it touches; [`plan`] from the whole inputs is the specification of the same result.

use std::collections::{BTreeMap, BTreeSet};

use crate::address::{DeviceName, UnderlayAddr};
use crate::bandwidth::ShapingSpec;
use crate::cell::roster::{Presence, Roster};
use crate::cell::step::{Key, Object, PeerSpec, VtepSpec};
use crate::container::{Container, Handle};
use crate::firewall::{
    Base, Guard, Limit, Planned, app, base, exposed, granted, leased, limit, limits_of, member, profile,
    settings,
};
use crate::lease::Lease;
use crate::link::LinkSpec;
use crate::policy::{AppGuid, AppPolicies, Policies, PolicyTag};
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
    /// Whether policies count for each packet, and not for a connection's first one only
    /// (`cut_connections_of_removed_policies`).
    pub cut: bool,
    pub ingress: OverlayIngress,
    /// The NFLOG group of the traffic log.
    pub log_group: u16,
}

/// What the tag of the overlay's routers means here (`enable_overlay_ingress_rules`).
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum OverlayIngress {
    #[default]
    Off,
    /// Who has it reaches the ports that containers offer.
    Taken,
    /// This machine is such a router (`single_ip_only`): its own packets to the overlay carry it.
    Sent,
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
    /// The tag of the overlay's routers as the policy server last gave it, if it means anything here.
    pub router: Option<PolicyTag>,
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

    /// The largest packet that a container's link should carry: what was asked for, as far as that fits now.
    pub fn link_mtu(&self, container: &Container) -> Option<u32> {
        let fits = self.mtu()?;
        Some(container.wanted_mtu.map_or(fits, |mtu| mtu.min(fits)))
    }

    /// The routers' tag, unless policies say that it is an app's, as they may when the policy server has lost its data:
    /// then it is nobody's, until the two agree.
    pub fn router(&self) -> Option<PolicyTag> {
        let is = |tag: PolicyTag| {
            let of =
                |app: &AppPolicies| app.tag == Some(tag) || app.inbound.iter().any(|from| from.tag == tag);
            self.policies.values().any(|app| of(app))
        };
        self.router.filter(|tag| !is(*tag))
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
    /// What all containers with these settings have in common besides.
    Settings(Digest),
    Limit(Limit),
    /// Who may open connections to the containers of this app, if there are any.
    App(AppGuid),
    /// A container's link, and what leads to it.
    Container(Handle),
    /// What its profile gives a container.
    Granted(Handle),
}

/// Total and pure: a unit whose input is gone plans nothing.
pub fn plan_unit(unit: &Unit, inputs: &Inputs) -> Vec<(Key, Object)> {
    match unit {
        Unit::Base => {
            let Inputs { config, ways, guard, .. } = inputs;
            firewall(base(&Base { config, ways, guard: *guard, router: inputs.router() }))
        }
        Unit::Vtep => vtep(inputs).into_iter().collect(),
        Unit::Peer(subnet) => peer(*subnet, inputs).into_iter().collect(),
        Unit::Leased(underlay) => {
            let known = inputs.lease.is_some() && inputs.leased.contains(underlay);
            firewall(if known { leased(*underlay) } else { Vec::new() })
        }
        Unit::Profile(digest) => match inputs.roster.in_force(*digest) {
            Some(known) => firewall(profile(known, &inputs.config)),
            None => Vec::new(),
        },
        Unit::Settings(digest) => {
            match inputs.roster.profiles().find(|known| known.settings_digest() == *digest) {
                Some(known) => firewall(settings(*digest, &known.profile().settings, inputs.config.overlay)),
                None => Vec::new(),
            }
        }
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
                let mut planned = firewall(member(container, policies_of(container, inputs)));
                if inputs.config.ingress == OverlayIngress::Taken {
                    planned.extend(firewall(exposed(container)));
                }
                planned.push((Key::Link(container.addr), Object::Link(LinkSpec::of(container))));
                let shaping = ShapingSpec::of(container);
                planned.extend(shaping.map(|spec| (Key::Shaping(spec.addr), Object::Shaping(spec))));
                planned
            }
            _ => Vec::new(),
        },
        Unit::Granted(handle) => match inputs.roster.get(handle) {
            Some((container, Presence::Present)) => {
                let app = policies_of(container, inputs);
                match container.profile.and_then(|digest| inputs.roster.profile(digest)) {
                    Some(known) => firewall(granted(container, known, app, &inputs.config, inputs.log_c2c)),
                    None => Vec::new(),
                }
            }
            _ => Vec::new(),
        },
    }
}

fn policies_of<'a>(container: &Container, inputs: &'a Inputs) -> Option<&'a AppPolicies> {
    inputs.policies.get(container.owner.policy_group_id.as_str()).map(|policies| &**policies)
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
    let settings: BTreeSet<Digest> = inputs.roster.profiles().map(|known| known.settings_digest()).collect();
    let settings = settings.into_iter().map(Unit::Settings);
    let apps = inputs.policies.keys().cloned().map(Unit::App);
    let handles = || inputs.roster.iter().map(|(container, _)| container.handle.clone());
    let containers = handles().map(Unit::Container).chain(handles().map(Unit::Granted));
    [Unit::Base, Unit::Vtep]
        .into_iter()
        .chain(peers)
        .chain(leased)
        .chain(profiles)
        .chain(limits)
        .chain(settings)
        .chain(apps)
        .chain(containers)
}

/// The specification of what the kernel has to hold. Tests and the audit compare with it; no call waits for it.
pub fn plan(inputs: &Inputs) -> BTreeMap<Key, Object> {
    units(inputs).flat_map(|unit| plan_unit(&unit, inputs)).collect()
}
