//! The cell's objects as rtnetlink messages: what makes them, and what takes them away.
//!
//! Owns: which attribute carries what (docs/adr/0004-link-attributes.md). Values in, values out.

use std::net::{IpAddr, Ipv4Addr};
use std::os::fd::RawFd;

use netlink_packet_core::{NLM_F_CREATE, NLM_F_EXCL, NLM_F_REPLACE};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::address::{AddressAttribute, AddressMessage, AddressScope};
use netlink_packet_route::link::{
    AfSpecInet, AfSpecInet6, AfSpecUnspec, In6AddrGenMode, InetDevConf, InfoData, InfoKind, InfoVeth,
    LinkAttribute, LinkFlags, LinkInfo, LinkMessage,
};
use netlink_packet_route::neighbour::{
    NeighbourAddress, NeighbourAttribute, NeighbourFlags, NeighbourMessage, NeighbourState,
};
use netlink_packet_route::nsid::{NsidAttribute, NsidMessage};
use netlink_packet_route::route::{
    RouteAddress, RouteAttribute, RouteMessage, RouteProtocol, RouteScope, RouteType,
};
use nix::libc::{EADDRNOTAVAIL, EAFNOSUPPORT, EEXIST, ENODEV, ENOENT, ESRCH};
use rtnetlink::{LinkVxlan, RouteMessageBuilder};
use weft_model::address::{DeviceName, HardwareAddr, UnderlayAddr};
use weft_model::cell::{PeerSpec, VtepSpec};
use weft_model::link::{GATEWAY, LinkSpec};
use weft_model::subnet::OverlaySubnet;

/// The overlay's VXLAN network identifier.
pub(super) const VNI: u32 = 1;
/// RFC 6890 leaves index 1 of each namespace to no one, but every kernel gives it to the loopback device.
pub(super) const LOOPBACK: u32 = 1;

/// What a deletion may find: nothing to delete.
const ABSENT: &[i32] = &[ENOENT, ESRCH, ENODEV, EADDRNOTAVAIL];
const REPLACE: u16 = NLM_F_CREATE | NLM_F_REPLACE;
const CREATE: u16 = NLM_F_CREATE | NLM_F_EXCL;

/// One message to the kernel.
#[derive(Debug, Clone)]
pub(super) struct Request {
    /// What it does, for the error that says it was not done.
    pub(super) operation: &'static str,
    pub(super) message: Rtnl,
    pub(super) flags: u16,
    /// Answers that are as good as success.
    pub(super) tolerates: &'static [i32],
}

pub(super) fn request(operation: &'static str, message: Rtnl, flags: u16) -> Request {
    Request { operation, message, flags, tolerates: &[] }
}

pub(super) fn deletion(operation: &'static str, message: Rtnl) -> Request {
    Request { operation, message, flags: 0, tolerates: ABSENT }
}

// === links ===

/// Numbers a container's namespace, so that it is seen when it ends without its link being there to tell. One that has a
/// number keeps it, and so does another that has this one.
pub(super) fn number_namespace(spec: &LinkSpec, namespace: RawFd) -> Request {
    let mut message = NsidMessage::default();
    message.attributes =
        vec![NsidAttribute::Fd(namespace.unsigned_abs()), NsidAttribute::Id(spec.index().cast_signed())];
    Request { tolerates: &[EEXIST], ..request("number the namespace of", Rtnl::NewNsId(message), 0) }
}

/// The veth pair, its inner end in the container's namespace. The inner end must be born down: a veth whose peer is
/// up before it is there itself is refused (ENOTCONN).
pub(super) fn veth(spec: &LinkSpec, namespace: RawFd) -> Request {
    let mut inner = LinkMessage::default();
    inner.header.index = spec.index();
    inner.attributes = vec![
        LinkAttribute::IfName(spec.interface.to_string()),
        LinkAttribute::Address(spec.container_mac().bytes().to_vec()),
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::NetNsFd(namespace),
    ];
    let mut host = LinkMessage::default();
    host.header.index = spec.index();
    host.attributes = vec![
        LinkAttribute::IfName(spec.host_name().to_string()),
        LinkAttribute::Address(spec.host_mac().bytes().to_vec()),
        LinkAttribute::Mtu(spec.mtu),
        LinkAttribute::LinkInfo(vec![
            LinkInfo::Kind(InfoKind::Veth),
            LinkInfo::Data(InfoData::Veth(InfoVeth::Peer(inner))),
        ]),
    ];
    request("create the veth pair of", Rtnl::NewLink(host), CREATE)
}

/// What a veth pair is born with, on the cell's end of one that is there.
pub(super) fn mend(spec: &LinkSpec) -> Request {
    let attributes =
        vec![LinkAttribute::Address(spec.host_mac().bytes().to_vec()), LinkAttribute::Mtu(spec.mtu)];
    set_link("mend", spec.index(), attributes, LinkFlags::empty())
}

/// Everything on the cell's end of a container's link that is there.
pub(super) fn host_end(spec: &LinkSpec) -> Vec<Request> {
    let index = spec.index();
    let mut conf = InetDevConf::default();
    (conf.forwarding, conf.rp_filter) = (1, 1);
    let attributes = vec![LinkAttribute::IfAlias(spec.alias()), ipv4(conf)];
    vec![
        set_link("configure", index, attributes, LinkFlags::Noarp),
        no_link_local(index),
        set_link("raise", index, Vec::new(), LinkFlags::Up),
        address("give an address to", index, GATEWAY, spec.addr.get(), 32),
        neighbour("lay the neighbour of", index, spec.addr.get(), spec.container_mac()),
    ]
}

/// Everything on the container's end. The default route is not taken from somebody who laid one before.
pub(super) fn inner_end(spec: &LinkSpec) -> Vec<Request> {
    let (index, addr) = (spec.index(), spec.addr.get());
    let mut conf = InetDevConf::default();
    conf.rp_filter = 1;
    let default = route_via(GATEWAY, index).pref_source(addr).build();
    vec![
        set_link("configure", index, vec![ipv4(conf)], LinkFlags::Noarp),
        no_link_local(index),
        set_link("raise", index, Vec::new(), LinkFlags::Up),
        address("give an address to", index, addr, GATEWAY, 32),
        neighbour("lay the gateway's neighbour of", index, GATEWAY, spec.host_mac()),
        request("lay the default route of", Rtnl::NewRoute(default), CREATE),
        set_link("raise the loopback device beside", LOOPBACK, Vec::new(), LinkFlags::Up),
    ]
}

pub(super) fn delete_link(name: &DeviceName) -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_string()));
    deletion("delete", Rtnl::DelLink(message))
}

/// The devices of a group are deleted by one message. Nobody else uses this number ("weft").
const DELETION_GROUP: u32 = 0x7765_6674;

pub(super) fn mark_for_deletion(name: &DeviceName) -> Request {
    let mut message = LinkMessage::default();
    message.attributes = vec![LinkAttribute::IfName(name.to_string()), LinkAttribute::Group(DELETION_GROUP)];
    deletion("mark for deletion", Rtnl::SetLink(message))
}

pub(super) fn delete_marked_links() -> Request {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::Group(DELETION_GROUP));
    deletion("delete", Rtnl::DelLink(message))
}

pub(super) fn get_link(name: &str) -> Rtnl {
    let mut message = LinkMessage::default();
    message.attributes.push(LinkAttribute::IfName(name.to_owned()));
    Rtnl::GetLink(message)
}

/// Sets flags (never clears one) and attributes of a link.
pub(super) fn set_link(
    operation: &'static str,
    index: u32,
    attributes: Vec<LinkAttribute>,
    flags: LinkFlags,
) -> Request {
    let mut message = LinkMessage::default();
    message.header.index = index;
    message.header.flags = flags;
    message.header.change_mask = flags;
    message.attributes = attributes;
    request(operation, Rtnl::SetLink(message), 0)
}

/// Numbered as in linux/ip.h; a value of 0 is not sent, which leaves it as it is.
fn ipv4(conf: InetDevConf) -> LinkAttribute {
    LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet(vec![AfSpecInet::DevConfRequest(conf)])])
}

/// No IPv6 address comes by itself. A message of its own: without IPv6 the kernel refuses the whole message.
pub(super) fn no_link_local(index: u32) -> Request {
    let mode = AfSpecInet6::AddrGenMode(In6AddrGenMode::None);
    let attributes = vec![LinkAttribute::AfSpecUnspec(vec![AfSpecUnspec::Inet6(vec![mode])])];
    let message = set_link("keep IPv6 addresses from", index, attributes, LinkFlags::empty());
    Request { tolerates: &[EAFNOSUPPORT], ..message }
}

// === the VXLAN device ===

/// The MAC comes with the creation: udev and systemd give a device another one if it is set later.
pub(super) fn vtep(spec: &VtepSpec) -> Request {
    let message = LinkVxlan::new(spec.name.as_str(), VNI)
        .dev(spec.device)
        .local(spec.local.get())
        .port(spec.port)
        .learning(false)
        .udp_csum(true)
        .gbp()
        .address(spec.mac.bytes().to_vec())
        .mtu(spec.mtu)
        .build();
    request("create", Rtnl::NewLink(message), CREATE)
}

/// What can be set on a VXLAN device that is there. Its address comes last: it needs the device up.
pub(super) fn vtep_settings(spec: &VtepSpec, index: u32) -> Vec<Request> {
    let mut conf = InetDevConf::default();
    conf.forwarding = 1;
    let prefix = spec.overlay.get().prefix();
    let broadcast = AddressAttribute::Broadcast(spec.overlay.get().broadcast());
    let mut addr = address("give an address to", index, spec.addr, spec.addr, prefix);
    if let Rtnl::NewAddress(message) = &mut addr.message {
        message.attributes.push(broadcast);
    }
    vec![
        set_link("configure", index, vec![LinkAttribute::Mtu(spec.mtu), ipv4(conf)], LinkFlags::empty()),
        no_link_local(index),
        set_link("raise", index, Vec::new(), LinkFlags::Up),
        addr,
    ]
}

// === peers and strays ===

pub(super) fn peer(spec: &PeerSpec, vtep: u32) -> [Request; 3] {
    let gateway = spec.subnet.gateway();
    let route = route_to(spec.subnet, gateway, vtep).pref_source(spec.source).build();
    [
        forward(vtep, spec.mac, spec.underlay),
        neighbour("lay the neighbour of", vtep, gateway, spec.mac),
        request("lay the route of", Rtnl::NewRoute(route), REPLACE),
    ]
}

/// `metric` 0: of the route with the lowest one.
pub(super) fn delete_route(subnet: OverlaySubnet, gateway: Ipv4Addr, metric: u32, vtep: u32) -> Request {
    let route = route_to(subnet, gateway, vtep)
        .scope(RouteScope::NoWhere)
        .protocol(RouteProtocol::Unspec)
        .kind(RouteType::Unspec)
        .priority(metric);
    deletion("delete the route of", Rtnl::DelRoute(route.build()))
}

/// Asks for the route that a packet would take.
pub(super) fn get_route(to: Ipv4Addr) -> Rtnl {
    let mut message = RouteMessage::default();
    message.header.address_family = AddressFamily::Inet;
    message.header.destination_prefix_length = 32;
    message.attributes.push(RouteAttribute::Destination(RouteAddress::Inet(to)));
    Rtnl::GetRoute(message)
}

pub(super) fn delete_neighbour(addr: Ipv4Addr, vtep: u32) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = vtep;
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)));
    deletion("delete the neighbour of", Rtnl::DelNeighbour(message))
}

pub(super) fn delete_forward(mac: HardwareAddr, vtep: u32) -> Request {
    deletion("delete the forwarding entry of", Rtnl::DelNeighbour(forward_message(vtep, mac)))
}

fn forward(vtep: u32, mac: HardwareAddr, underlay: UnderlayAddr) -> Request {
    let mut message = forward_message(vtep, mac);
    message.attributes.push(NeighbourAttribute::Destination(NeighbourAddress::Inet(underlay.get())));
    request("lay the forwarding entry of", Rtnl::NewNeighbour(message), REPLACE)
}

fn forward_message(vtep: u32, mac: HardwareAddr) -> NeighbourMessage {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Bridge;
    message.header.ifindex = vtep;
    message.header.flags = NeighbourFlags::Own;
    message.header.state = NeighbourState::Permanent;
    message.attributes.push(NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()));
    message
}

// === parts ===

/// Through `gateway` on a device, to everywhere until a destination is given.
fn route_via(gateway: Ipv4Addr, device: u32) -> RouteMessageBuilder<Ipv4Addr> {
    // As silk and `ip route` without `proto`: a cell that is taken over keeps its routes as they are. Ours are known
    // by the device they go through.
    RouteMessageBuilder::<Ipv4Addr>::new()
        .protocol(RouteProtocol::Boot)
        .gateway(gateway)
        .output_interface(device)
}

fn route_to(subnet: OverlaySubnet, gateway: Ipv4Addr, vtep: u32) -> RouteMessageBuilder<Ipv4Addr> {
    let network = subnet.network();
    route_via(gateway, vtep).destination_prefix(network.network(), network.prefix())
}

/// An address that is valid on the link only. `peer` is the address itself, unless the link is point to point.
fn address(operation: &'static str, index: u32, local: Ipv4Addr, peer: Ipv4Addr, prefix: u8) -> Request {
    request(operation, Rtnl::NewAddress(address_message(index, local, peer, prefix)), REPLACE)
}

pub(super) fn delete_address(index: u32, local: Ipv4Addr, peer: Ipv4Addr, prefix: u8) -> Request {
    deletion("take an address from", Rtnl::DelAddress(address_message(index, local, peer, prefix)))
}

fn address_message(index: u32, local: Ipv4Addr, peer: Ipv4Addr, prefix: u8) -> AddressMessage {
    let mut message = AddressMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.index = index;
    message.header.prefix_len = prefix;
    message.header.scope = AddressScope::Link;
    message.attributes =
        vec![AddressAttribute::Local(IpAddr::V4(local)), AddressAttribute::Address(IpAddr::V4(peer))];
    message
}

fn neighbour(operation: &'static str, index: u32, addr: Ipv4Addr, mac: HardwareAddr) -> Request {
    let mut message = NeighbourMessage::default();
    message.header.family = AddressFamily::Inet;
    message.header.ifindex = index;
    message.header.state = NeighbourState::Permanent;
    message.attributes = vec![
        NeighbourAttribute::Destination(NeighbourAddress::Inet(addr)),
        NeighbourAttribute::LinkLayerAddress(mac.bytes().to_vec()),
    ];
    request(operation, Rtnl::NewNeighbour(message), REPLACE)
}
