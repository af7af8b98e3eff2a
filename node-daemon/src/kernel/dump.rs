//! The kernel's tables as they are read: links, addresses, neighbours, routes, forwarding entries. No judgement.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::io;
use std::net::{IpAddr, Ipv4Addr};

use ipnetwork::Ipv4Network;
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecUnspec, InetDevConf, InfoData, InfoVxlan, LinkAttribute, LinkExtentMask, LinkFlags,
    LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{RouteAddress, RouteAttribute, RouteHeader, RouteMessage, RouteType};
use weft_model::address::{HardwareAddr, OverlayAddr, UnderlayAddr};
use weft_model::link;
use weft_model::subnet::OverlaySubnet;

use super::see::addr_of;
use super::socket::NetlinkSocket;

pub(super) type RouteSocket = NetlinkSocket<Rtnl>;

#[derive(Debug, Default)]
pub(super) struct Device {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) mac: Option<HardwareAddr>,
    pub(super) mtu: u32,
    pub(super) rp_filter: bool,
    pub(super) flags: LinkFlags,
    pub(super) alias: Option<String>,
    pub(super) forwarding: bool,
    /// The kind of its queue.
    pub(super) queue: Option<String>,
    pub(super) vxlan: Option<Vec<InfoVxlan>>,
}

#[derive(Debug)]
pub(super) struct Address {
    pub(super) index: u32,
    pub(super) local: Ipv4Addr,
    pub(super) peer: Ipv4Addr,
    pub(super) prefix: u8,
    pub(super) scope: AddressScope,
}

#[derive(Debug)]
pub(super) struct Neighbour {
    pub(super) mac: Option<HardwareAddr>,
    pub(super) permanent: bool,
}

#[derive(Debug)]
pub(super) struct Route {
    /// None: the default route.
    pub(super) dst: Option<Ipv4Network>,
    pub(super) gateway: Ipv4Addr,
    pub(super) source: Option<Ipv4Addr>,
    pub(super) metric: u32,
}

impl Route {
    pub(super) fn subnet(&self) -> Option<OverlaySubnet> {
        OverlaySubnet::try_from(self.dst?).ok()
    }

    pub(super) fn is_default_by(&self, gateway: Ipv4Addr) -> bool {
        self.dst.is_none_or(|dst| dst.prefix() == 0) && self.gateway == gateway
    }
}

impl Address {
    /// Whether it is this address of a device that is not point to point.
    pub(super) fn is(&self, addr: Ipv4Addr, prefix: u8) -> bool {
        (self.local, self.peer, self.prefix, self.scope) == (addr, addr, prefix, AddressScope::Link)
    }
}

pub(super) fn links(socket: &mut RouteSocket) -> io::Result<Vec<Device>> {
    let request = || {
        let mut message = LinkMessage::default();
        message.attributes.push(LinkAttribute::ExtMask(vec![LinkExtentMask::SkipStats]));
        Rtnl::GetLink(message)
    };
    Ok(socket.dump(request)?.into_iter().filter_map(device).collect())
}

/// What a device has carried, as seen from the cell.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Traffic {
    pub name: String,
    /// Whose link's end on the cell it is, if it is one.
    pub container: Option<OverlayAddr>,
    pub received_bytes: u64,
    pub received_packets: u64,
    pub received_dropped: u64,
    pub sent_bytes: u64,
    pub sent_packets: u64,
    pub sent_dropped: u64,
}

pub(super) fn traffic(socket: &mut RouteSocket) -> io::Result<Vec<Traffic>> {
    let traffic = |message| {
        let Rtnl::NewLink(message) = message else { return None };
        let (mut name, mut stats) = (None, None);
        for attribute in message.attributes {
            match attribute {
                LinkAttribute::IfName(is) => name = Some(is),
                LinkAttribute::Stats64(are) => stats = Some(are),
                _ => {}
            }
        }
        let (name, stats) = (name?, stats?);
        Some(Traffic {
            container: addr_of(&name).filter(|addr| link::index(*addr) == message.header.index),
            name,
            received_bytes: stats.rx_bytes,
            received_packets: stats.rx_packets,
            received_dropped: stats.rx_dropped,
            sent_bytes: stats.tx_bytes,
            sent_packets: stats.tx_packets,
            sent_dropped: stats.tx_dropped,
        })
    };
    let all = socket.dump(|| Rtnl::GetLink(LinkMessage::default()))?;
    Ok(all.into_iter().filter_map(traffic).collect())
}

/// Numbers that the socket's namespace has given to others.
pub(super) fn namespaces(socket: &mut RouteSocket) -> io::Result<BTreeSet<u32>> {
    let numbered = socket.dump(|| Rtnl::GetNsId(NsidMessage::default()))?;
    let numbers = numbered.into_iter().filter_map(|message| match message {
        Rtnl::NewNsId(message) => message.attributes.into_iter().find_map(|attribute| match attribute {
            NsidAttribute::Id(number) => u32::try_from(number).ok(),
            _ => None,
        }),
        _ => None,
    });
    Ok(numbers.collect())
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
            LinkAttribute::Qdisc(kind) => device.queue = Some(kind),
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

fn ipv4_conf(family: &AfSpecUnspec) -> Option<&InetDevConf> {
    let AfSpecUnspec::Inet(attributes) = family else { return None };
    attributes.iter().find_map(|attribute| match attribute {
        AfSpecInet::DevConf(conf) => Some(conf),
        _ => None,
    })
}

fn vxlan(info: Vec<LinkInfo>) -> Option<Vec<InfoVxlan>> {
    info.into_iter().find_map(|info| match info {
        LinkInfo::Data(InfoData::Vxlan(attributes)) => Some(attributes),
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

pub(super) fn neighbours(socket: &mut RouteSocket) -> io::Result<HashMap<(u32, Ipv4Addr), Neighbour>> {
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

/// The forwarding entries of a VXLAN device: where each MAC is, if that is one place.
pub(super) fn forwards(
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

/// Whether a neighbour's state says that nobody answers, or is about to change: no entry that somebody laid.
pub(super) fn transient(state: NeighbourState) -> bool {
    use NeighbourState::{Failed, Incomplete, Noarp, None};
    matches!(state, Failed | Incomplete | Noarp | None)
}

/// A state is a set of bits: `bridge fdb add .. permanent` sets NUD_NOARP as well.
fn permanent(state: NeighbourState) -> bool {
    u16::from(state) & u16::from(NeighbourState::Permanent) != 0
}
