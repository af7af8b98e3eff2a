//! What there is: dumps of links, addresses, routes, neighbours and forwarding entries, put together to the objects
//! that a cell knows. An object counts as held only if it is whole; anything in between is unknown, and laid anew.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::Ipv4Network;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecUnspec, InfoData, InfoKind, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use weft_model::address::{DeviceName, HardwareAddr, OverlayAddr, UnderlayAddr};
use weft_model::cell::{Belief, Key, Object, PeerSpec, Seen, Stray, UnderlayDevice, VtepSpec};
use weft_model::link::{self, GATEWAY, LinkSpec, host_name};
use weft_model::subnet::{OverlayNetwork, OverlaySubnet};

use super::message::VNI;
use super::socket::NetlinkSocket;

type RouteSocket = NetlinkSocket<Rtnl>;

/// Links, addresses and neighbours of a network namespace.
#[derive(Debug)]
pub(super) struct Tables {
    pub(super) links: HashMap<u32, Device>,
    addresses: Vec<Address>,
    neighbours: HashMap<(u32, Ipv4Addr), Neighbour>,
}

#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Option<HardwareAddr>,
    pub(super) mtu: u32,
    pub(super) rp_filter: bool,
    flags: LinkFlags,
    alias: Option<String>,
    forwarding: bool,
    pub(super) vxlan: Option<Vec<InfoVxlan>>,
}

#[derive(Debug)]
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) local: Ipv4Addr,
    pub(super) peer: Ipv4Addr,
    pub(super) prefix: u8,
    scope: AddressScope,
}

#[derive(Debug)]
struct Neighbour {
    mac: Option<HardwareAddr>,
    permanent: bool,
}

#[derive(Debug)]
pub(super) struct Route {
    /// None: the default route.
    dst: Option<Ipv4Network>,
    pub(super) gateway: Ipv4Addr,
    source: Option<Ipv4Addr>,
    pub(super) metric: u32,
}

/// Everything of ours, with the VXLAN device of the given name.
pub(super) fn see(socket: &mut RouteSocket, vtep: &DeviceName) -> io::Result<Seen> {
    let tables = Tables::read(socket)?;
    let links = tables.links.values().filter_map(|device| {
        let addr = addr_of(&device.name)?;
        (device.index == link::index(addr)).then(|| (Key::Link(addr), tables.link(device, addr)))
    });
    let mut seen: Seen = links.collect();
    if let Some(device) = tables.links.values().find(|device| device.name == vtep.as_str()) {
        seen.insert(Key::Vtep, tables.vtep(device));
        let (routes, forwards) = (routes(socket, device.index)?, forwards(socket, device.index)?);
        tables.peers(device, &routes, &forwards, &mut seen);
    }
    Ok(seen)
}

/// Whether a neighbour's state says that nobody answers, or is about to change: no entry that somebody laid.
pub(super) fn transient(state: NeighbourState) -> bool {
    use NeighbourState::{Failed, Incomplete, Noarp, None};
    matches!(state, Failed | Incomplete | Noarp | None)
}

/// A state is a set of bits: `bridge fdb add .. permanent` sets NUD_NOARP as well.
fn permanent(state: NeighbourState) -> bool {
    u16::from(state) & u16::from(NeighbourState::Permanent) != 0
}

/// The container address in the name of a link's cell end.
pub(super) fn addr_of(name: &str) -> Option<OverlayAddr> {
    let digits = name.strip_prefix("s-").filter(|digits| digits.len() == 12 && digits.is_ascii())?;
    let mut octets = [0; 4];
    for (n, octet) in octets.iter_mut().enumerate() {
        *octet = digits[n * 3..n * 3 + 3].parse().ok()?;
    }
    let addr = OverlayAddr::new(octets.into());
    (host_name(addr).as_str() == name).then_some(addr)
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

// === dumps ===

pub(super) fn links(socket: &mut RouteSocket) -> io::Result<Vec<Device>> {
    let request = || {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        Rtnl::GetLink(message)
    };
    Ok(socket.dump(request)?.into_iter().filter_map(device).collect())
}

pub(super) fn device(message: Rtnl) -> Option<Device> {
    let Rtnl::NewLink(message) = message else { return None };
    let mut device = Device { index: message.header.index, flags: message.header.flags, ..Device::default() };
    for attribute in message.attributes {
        match attribute {
            LinkAttribute::IfName(name) => device.name = name,
            LinkAttribute::Address(bytes) => device.mac = mac(&bytes),
            LinkAttribute::Mtu(mtu) => device.mtu = mtu,
            LinkAttribute::IfAlias(alias) => device.alias = Some(alias),
            LinkAttribute::LinkInfo(info) => device.vxlan = vxlan(info),
            LinkAttribute::AfSpecUnspec(families) => {
                for conf in families.iter().filter_map(ipv4_conf) {
                    (device.rp_filter, device.forwarding) = (conf.rp_filter == 1, conf.forwarding == 1);
                }
            }
            _ => {}
        }
    }
    Some(device)
}

fn ipv4_conf(family: &AfSpecUnspec) -> Option<&netlink_packet_route::link::InetDevConf> {
    let AfSpecUnspec::Inet(attributes) = family else { return None };
    attributes.iter().find_map(|attribute| match attribute {
        AfSpecInet::DevConf(conf) => Some(conf),
        _ => None,
    })
}

fn vxlan(info: Vec<LinkInfo>) -> Option<Vec<InfoVxlan>> {
    info.into_iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(attributes)) => Some(attributes),
        LinkInfo::Kind(kind) if kind != InfoKind::Vxlan => None,
        _ => None,
    })
}

pub(super) fn addresses(socket: &mut RouteSocket) -> io::Result<Vec<Address>> {
    let request = || {
        let mut message = AddressMessage::default();
        message.header.family = AddressFamily::Inet;
        Rtnl::GetAddress(message)
    };
    let address = |message| {
        let Rtnl::NewAddress(message) = message else { return None };
        let (mut local, mut peer) = (None, None);
        for attribute in message.attributes {
            match attribute {
                AddressAttribute::Local(IpAddr::V4(addr)) => local = Some(addr),
                AddressAttribute::Address(IpAddr::V4(addr)) => peer = Some(addr),
                _ => {}
            }
        }
        let header = message.header;
        Some(Address {
            index: header.index,
            local: local?,
            peer: peer?,
            prefix: header.prefix_len,
            scope: header.scope,
        })
    };
    Ok(socket.dump(request)?.into_iter().filter_map(address).collect())
}

fn neighbours(socket: &mut RouteSocket) -> io::Result<HashMap<(u32, Ipv4Addr), Neighbour>> {
    let request = || {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Inet;
        Rtnl::GetNeighbour(message)
    };
    let neighbour = |message| {
        let Rtnl::NewNeighbour(message) = message else { return None };
        let (mut addr, mut lladdr) = (None, None);
        for attribute in message.attributes {
            match attribute {
                NeighbourAttribute::Destination(NeighbourAddress::Inet(dst)) => addr = Some(dst),
                NeighbourAttribute::LinkLayerAddress(bytes) => lladdr = mac(&bytes),
                _ => {}
            }
        }
        let state = message.header.state;
        let entry = Neighbour { mac: lladdr, permanent: permanent(state) };
        (!transient(state)).then_some(((message.header.ifindex, addr?), entry))
    };
    Ok(socket.dump(request)?.into_iter().filter_map(neighbour).collect())
}

/// Routes by a gateway on one device. Others on it (the kernel's own, an operator's) are not ours to judge.
pub(super) fn routes(socket: &mut RouteSocket, device: u32) -> io::Result<Vec<Route>> {
    let request = || {
        let mut message = RouteMessage::default();
        message.header.address_family = AddressFamily::Inet;
        message.header.table = RouteHeader::RT_TABLE_MAIN;
        message.header.kind = RouteType::Unicast;
        message.attributes.push(RouteAttribute::Oif(device));
        Rtnl::GetRoute(message)
    };
    let route = |message| {
        let Rtnl::NewRoute(message) = message else { return None };
        let header = message.header;
        let (mut dst, mut gateway, mut source, mut metric, mut oif) = (None, None, None, 0, None);
        for attribute in message.attributes {
            match attribute {
                RouteAttribute::Destination(RouteAddress::Inet(addr)) => dst = Some(addr),
                RouteAttribute::Gateway(RouteAddress::Inet(addr)) => gateway = Some(addr),
                RouteAttribute::PrefSource(RouteAddress::Inet(addr)) => source = Some(addr),
                RouteAttribute::Priority(value) => metric = value,
                RouteAttribute::Oif(index) => oif = Some(index),
                _ => {}
            }
        }
        // Kernels before 5.0 do not filter.
        let here = header.table == RouteHeader::RT_TABLE_MAIN && oif == Some(device);
        let dst = dst.and_then(|dst| Ipv4Network::new(dst, header.destination_prefix_length).ok());
        here.then_some(Route { dst, gateway: gateway?, source, metric })
    };
    Ok(socket.dump(request)?.into_iter().filter_map(route).collect())
}

impl Route {
    pub(super) fn subnet(&self) -> Option<OverlaySubnet> {
        OverlaySubnet::try_from(self.dst?).ok()
    }
}

pub(super) fn is_default_route(route: &Route, gateway: Ipv4Addr) -> bool {
    route.dst.is_none_or(|dst| dst.prefix() == 0) && route.gateway == gateway
}

/// The forwarding entries of a VXLAN device: where each MAC is, if that is one place.
fn forwards(
    socket: &mut RouteSocket,
    device: u32,
) -> io::Result<BTreeMap<HardwareAddr, Option<UnderlayAddr>>> {
    let request = || {
        let mut message = NeighbourMessage::default();
        message.header.family = AddressFamily::Bridge;
        message.header.ifindex = device;
        Rtnl::GetNeighbour(message)
    };
    let mut entries = BTreeMap::new();
    for message in socket.dump(request)? {
        let Rtnl::NewNeighbour(message) = message else { continue };
        let (mut lladdr, mut dst) = (None, None);
        for attribute in message.attributes {
            match attribute {
                NeighbourAttribute::LinkLayerAddress(bytes) => lladdr = mac(&bytes),
                NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)) => dst = Some(addr),
                // The family of these messages is that of bridges, so an address may come as plain bytes.
                NeighbourAttribute::Destination(NeighbourAddress::Other(bytes)) => {
                    dst = bytes.first_chunk::<4>().map(|bytes| Ipv4Addr::from(*bytes));
                }
                _ => {}
            }
        }
        if let Some(mac) = lladdr.filter(|_| message.header.ifindex == device) {
            let place = dst
                .filter(|_| permanent(message.header.state))
                .and_then(|dst| UnderlayAddr::try_from(dst).ok());
            entries.entry(mac).and_modify(|place| *place = None).or_insert(place);
        }
    }
    Ok(entries)
}

fn mac(bytes: &[u8]) -> Option<HardwareAddr> {
    Some(HardwareAddr::new(bytes.try_into().ok()?))
}

impl Address {
    /// Whether it is this address of a device that is not point to point.
    pub(super) fn is(&self, addr: Ipv4Addr, prefix: u8) -> bool {
        (self.local, self.peer, self.prefix, self.scope) == (addr, addr, prefix, AddressScope::Link)
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
