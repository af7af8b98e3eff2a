//! What there is: links, addresses, routes, neighbours and forwarding entries, put together to the objects that
//! a cell knows. An object counts as held only if it is whole; anything in between is unknown, and laid anew.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use netlink_packet_route::RouteNetlinkMessage;
use netlink_packet_route::address::AddressScope;
use netlink_packet_route::link::{InfoVxlan, LinkFlags};
use netlink_packet_route::route::{RouteAttribute, RouteType};
use nix::libc::{EACCES, EHOSTUNREACH, EINVAL, ENETUNREACH};
use weft_model::address::{DeviceName, HardwareAddr, OverlayAddr, UnderlayAddr};
use weft_model::bandwidth::{device_index, device_name};
use weft_model::cell::{Belief, Key, Object, PeerSpec, Seen, Stray, UnderlayDevice, VtepSpec};
use weft_model::firewall::explain::Route as Leads;
use weft_model::link::{self, GATEWAY, LinkSpec, host_name};
use weft_model::subnet::OverlayNetwork;

use super::dump::{
    Address, Device, Neighbour, Route, RouteSocket, addresses, forwards, links, neighbours, routes,
};
use super::message::{self, VNI};
use super::shaping::Buckets;

/// Links, addresses and neighbours of a network namespace.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) links: HashMap<u32, Device>,
    addresses: Vec<Address>,
    neighbours: HashMap<(u32, Ipv4Addr), Neighbour>,
}

/// Everything of ours, with the VXLAN device of the given name.
pub(super) fn see(socket: &mut RouteSocket, vtep: &DeviceName) -> io::Result<Seen> {
    let tables = Tables::read(socket)?;
    let links = tables.links.values().filter_map(|device| {
        let addr = addr_of(&device.name)?;
        (device.index == link::index(addr)).then(|| (Key::Link(addr), tables.link(device, addr)))
    });
    let mut seen: Seen = links.collect();
    tables.shaping(socket, &mut seen)?;
    if let Some(device) = tables.links.values().find(|device| device.name == vtep.as_str()) {
        seen.insert(Key::Vtep, tables.vtep(device));
        let (routes, forwards) = (routes(socket, device.index)?, forwards(socket, device.index)?);
        tables.peers(device, &routes, &forwards, &mut seen);
    }
    Ok(seen)
}

/// The devices that have these addresses.
pub(super) fn devices_of(socket: &mut RouteSocket, addrs: &[Ipv4Addr]) -> io::Result<BTreeSet<DeviceName>> {
    let owners: BTreeSet<u32> =
        addresses(socket)?.into_iter().filter(|a| addrs.contains(&a.local)).map(|a| a.index).collect();
    let owning = links(socket)?.into_iter().filter(|device| owners.contains(&device.index));
    Ok(owning.filter_map(|device| device.name.parse().ok()).collect())
}

/// Where the cell's routes lead an address.
pub(super) fn route(socket: &mut RouteSocket, to: Ipv4Addr) -> io::Result<Leads> {
    let message = match socket.get(message::get_route(to))? {
        Ok(message) => message,
        Err(refusal) if [ENETUNREACH, EHOSTUNREACH, EACCES, EINVAL].contains(&refusal.errno) => {
            return Ok(Leads::Nowhere);
        }
        Err(refusal) => return Err(refusal.into()),
    };
    let RouteNetlinkMessage::NewRoute(route) = message else { return Ok(Leads::Nowhere) };
    if route.header.kind == RouteType::Local {
        return Ok(Leads::Cell);
    }
    let index = route.attributes.iter().find_map(|attribute| match attribute {
        RouteAttribute::Oif(index) => Some(*index),
        _ => None,
    });
    let device = links(socket)?.into_iter().find(|device| Some(device.index) == index);
    Ok(device.and_then(|device| device.name.parse().ok()).map_or(Leads::Nowhere, Leads::Device))
}

/// The container address in the name of a link's cell end.
pub(super) fn addr_of(name: &str) -> Option<OverlayAddr> {
    addr_in(name, host_name)
}

/// The one in the name of the device that a container's limits have.
pub(super) fn shaped_addr_of(name: &str) -> Option<OverlayAddr> {
    addr_in(name, device_name)
}

fn addr_in(name: &str, names: fn(OverlayAddr) -> DeviceName) -> Option<OverlayAddr> {
    let digits = name.get(2..).filter(|digits| digits.len() == 12 && digits.is_ascii())?;
    let mut octets = [0; 4];
    for (n, octet) in octets.iter_mut().enumerate() {
        *octet = digits[n * 3..n * 3 + 3].parse().ok()?;
    }
    let addr = OverlayAddr::new(octets.into());
    (names(addr).as_str() == name).then_some(addr)
}

impl Tables {
    pub(super) fn read(socket: &mut RouteSocket) -> io::Result<Self> {
        let links = links(socket)?.into_iter().map(|device| (device.index, device)).collect();
        Ok(Self { links, addresses: addresses(socket)?, neighbours: neighbours(socket)? })
    }

    pub(super) fn has_address(&self, index: u32, local: Ipv4Addr, peer: Ipv4Addr, prefix: u8) -> bool {
        self.addresses.iter().any(|a| (a.index, a.local, a.peer, a.prefix) == (index, local, peer, prefix))
    }

    pub(super) fn has_neighbour(&self, index: u32, addr: Ipv4Addr, mac: HardwareAddr) -> bool {
        self.neighbours.get(&(index, addr)).is_some_and(|n| n.permanent && n.mac == Some(mac))
    }

    fn link(&self, device: &Device, addr: OverlayAddr) -> Belief {
        let whole = || {
            let (interface, handle) = device.alias.as_deref()?.split_once(' ')?;
            let (interface, handle) = (interface.parse().ok()?, handle.parse().ok()?);
            let spec = LinkSpec { addr, handle, interface, mtu: device.mtu };
            (device.is_up_without_arp()
                && device.rp_filter
                && device.forwarding
                && device.mac == Some(spec.host_mac())
                && self.has_address(device.index, GATEWAY, addr.get(), 32)
                && self.has_neighbour(device.index, addr.get(), spec.container_mac()))
            .then_some(Object::Link(spec))
        };
        whole().map_or(Belief::Unknown, Belief::Holds)
    }

    /// Where no link and no device has a token bucket, nothing more is read.
    fn shaping(&self, socket: &mut RouteSocket, seen: &mut Seen) -> io::Result<()> {
        let limited =
            |device: &&Device| addr_of(&device.name).is_some() && device.queue.as_deref() == Some("tbf");
        let links = self.links.values().filter(limited).filter_map(|device| addr_of(&device.name));
        let mut devices: BTreeMap<OverlayAddr, Option<bool>> = links.map(|addr| (addr, None)).collect();
        for device in self.links.values() {
            if let Some(addr) = shaped_addr_of(&device.name) {
                let sound = device.index == device_index(addr) && device.flags.contains(LinkFlags::Up);
                devices.insert(addr, Some(sound));
            }
        }
        if devices.is_empty() {
            return Ok(());
        }
        let buckets = Buckets::read(socket)?;
        for (addr, device) in devices {
            let belief = buckets.of(socket, addr, device)?;
            seen.extend(belief.map(|belief| (Key::Shaping(addr), belief)));
        }
        Ok(())
    }

    fn vtep(&self, device: &Device) -> Belief {
        let whole = || {
            let mut addresses = self.addresses.iter().filter(|a| a.index == device.index);
            let (Some(address), None) = (addresses.next(), addresses.next()) else { return None };
            let network = Ipv4Network::new(address.local, address.prefix).ok()?;
            let network = Ipv4Network::new(network.network(), address.prefix).ok()?;
            let spec = device.vtep(address.local, OverlayNetwork::try_from(network).ok()?)?;
            let forwards = |index| self.links.get(&index).is_some_and(|device| device.forwarding);
            (device.flags.contains(LinkFlags::Up)
                && address.scope == AddressScope::Link
                && forwards(device.index)
                && forwards(spec.device))
            .then_some(Object::Vtep(spec))
        };
        whole().map_or(Belief::Unknown, Belief::Holds)
    }

    /// A peer is a route to a subnet by that subnet's gateway, the gateway's neighbour entry and the forwarding entry
    /// of that neighbour's MAC. What belongs to no route is stray.
    fn peers(
        &self,
        device: &Device,
        routes: &[Route],
        forwards: &BTreeMap<HardwareAddr, Option<UnderlayAddr>>,
        seen: &mut Seen,
    ) {
        let on_vtep = self.neighbours.iter().filter(|((index, _), _)| *index == device.index);
        let neighbours: BTreeMap<Ipv4Addr, &Neighbour> = on_vtep.map(|((_, addr), n)| (*addr, n)).collect();
        let (mut gateways, mut macs) = (BTreeSet::new(), BTreeSet::new());
        for route in routes {
            let Some(subnet) = route.subnet() else { continue };
            if route.gateway != subnet.gateway() {
                let stray = Stray::Route { dst: subnet, gateway: route.gateway };
                seen.insert(Key::Stray(stray), Belief::Unknown);
                continue;
            }
            gateways.insert(route.gateway);
            let neighbour = neighbours.get(&route.gateway);
            macs.extend(neighbour.and_then(|n| n.mac));
            let whole = || {
                let mac = neighbour.filter(|n| n.permanent)?.mac?;
                let underlay = (*forwards.get(&mac)?)?;
                Some(PeerSpec { subnet, underlay, mac, source: route.source? })
            };
            let belief = whole()
                .filter(|_| route.metric == 0)
                .map_or(Belief::Unknown, |p| Belief::Holds(Object::Peer(p)));
            // Two routes to one subnet: neither is what the other says.
            seen.entry(Key::Peer(subnet)).and_modify(|b| *b = Belief::Unknown).or_insert(belief);
        }
        let strays =
            neighbours.keys().filter(|addr| !gateways.contains(addr)).map(|addr| Stray::Neighbour(*addr));
        let strays =
            strays.chain(forwards.keys().filter(|mac| !macs.contains(mac)).map(|mac| Stray::Forward(*mac)));
        seen.extend(strays.map(|stray| (Key::Stray(stray), Belief::Unknown)));
    }
}

impl Device {
    pub(super) fn is_up_without_arp(&self) -> bool {
        self.flags.contains(LinkFlags::Up | LinkFlags::Noarp)
    }

    /// What this device was made to be, if it is a VXLAN device such as we make, with these addresses on it.
    pub(super) fn vtep(&self, addr: Ipv4Addr, overlay: OverlayNetwork) -> Option<VtepSpec> {
        let (mut port, mut local, mut device, mut gbp, mut learning, mut vni) =
            (None, None, 0, false, true, None);
        for attribute in self.vxlan.as_ref()? {
            match attribute {
                InfoVxlan::Port(value) => port = Some(*value),
                InfoVxlan::Local(value) => local = UnderlayAddr::try_from(*value).ok(),
                InfoVxlan::Link(value) => device = *value,
                InfoVxlan::Learning(value) => learning = *value,
                InfoVxlan::Id(value) => vni = Some(*value),
                InfoVxlan::Gbp => gbp = true,
                _ => {}
            }
        }
        let spec = VtepSpec {
            name: self.name.parse().ok()?,
            port: port?,
            local: local?,
            device,
            mac: self.mac?,
            mtu: self.mtu,
            addr,
            overlay,
        };
        (gbp && !learning && vni == Some(VNI)).then_some(spec)
    }
}

/// The device of a name, or the one that has the address.
pub(super) fn underlay(
    socket: &mut RouteSocket,
    addr: UnderlayAddr,
    named: Option<&DeviceName>,
) -> io::Result<Option<UnderlayDevice>> {
    let owner = match named {
        Some(_) => None,
        None => addresses(socket)?.into_iter().find(|a| a.local == addr.get()).map(|a| a.index),
    };
    let found = links(socket)?.into_iter().find(|device| match named {
        Some(name) => device.name == name.as_str(),
        None => Some(device.index) == owner,
    });
    Ok(found.map(|device| UnderlayDevice { index: device.index, mtu: device.mtu }))
}
