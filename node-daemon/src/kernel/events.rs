//! That something changed in the cell's network namespace: a reason to look again, and to look now.
//!
//! Woken by: the kernel's notifications on links, addresses, routes, neighbours and queues. Emits: [`Event`]. Our own changes
//! are announced as well, and several at once: the reader gathers before it looks.

use std::collections::VecDeque;
use std::io;

use futures::stream::{Stream, unfold};
use netlink_packet_route::AddressFamily;
use netlink_packet_route::RouteNetlinkMessage as Rtnl;
use netlink_packet_route::link::{LinkAttribute, LinkMessage};
use netlink_packet_route::neighbour::NeighbourMessage;
use netlink_packet_route::route::RouteAttribute;
use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::io::unix::AsyncFd;
use weft_model::address::{DeviceName, OverlayAddr};

use super::dump::{RouteSocket, device, transient};
use super::see::{addr_of, shaped_addr_of};
use super::socket::NetlinkSocket;
use super::{KernelError, message};

/// RTMGRP_LINK, RTMGRP_NEIGH, RTMGRP_TC, RTMGRP_IPV4_IFADDR, RTMGRP_IPV4_ROUTE (linux/rtnetlink.h).
const GROUPS: u32 = 0x1 | 0x4 | 0x8 | 0x10 | 0x40;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Event {
    /// Of the VXLAN device, a container's link or limits, the underlay's device, or any address: what is there may not be what
    /// is believed.
    Changed,
    /// The link of this container is gone: we deleted it, or its namespace has ended.
    LinkGone(OverlayAddr),
}

struct Watch {
    socket: AsyncFd<RouteSocket>,
    vtep: DeviceName,
    /// Changes when the device is made anew.
    vtep_index: Option<u32>,
    underlay: u32,
    ready: VecDeque<Event>,
}

/// Starts to listen at once, in the network namespace of the calling thread; needs a tokio runtime. `underlay`: index
/// of the underlay's device.
pub fn watch(vtep: DeviceName, underlay: u32) -> Result<impl Stream<Item = Event> + Send, KernelError> {
    let refused = |source| KernelError::Refused {
        operation: "listen to",
        subject: "the kernel's notifications".into(),
        source,
    };
    let socket = NetlinkSocket::open(NETLINK_ROUTE, GROUPS).map_err(refused)?;
    socket.set_non_blocking().map_err(refused)?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe because a type may lie about its descriptor; ours owns it"
    )]
    let socket = AsyncFd::new(socket).map_err(refused)?;
    let vtep_index = index(&vtep).map_err(refused)?;
    let watch = Watch { socket, vtep, vtep_index, underlay, ready: VecDeque::new() };
    Ok(unfold(watch, async |mut watch| {
        loop {
            if let Some(event) = watch.ready.pop_front() {
                return Some((event, watch));
            }
            watch.read().await;
        }
    }))
}

fn index(vtep: &DeviceName) -> io::Result<Option<u32>> {
    let mut socket = NetlinkSocket::open(NETLINK_ROUTE, 0)?;
    let found = socket.get(message::get_link(vtep.as_str()))?;
    Ok(found.ok().and_then(device).map(|device| device.index))
}

impl Watch {
    async fn read(&mut self) {
        let Ok(mut guard) = self.socket.readable_mut().await else { return };
        let read = guard.try_io(|socket| socket.get_mut().notifications());
        match read {
            Ok(Ok(messages)) => {
                for (by, message) in messages {
                    // One is as good as many.
                    if let Some(event) = self.event(by, &message)
                        && self.ready.back() != Some(&event)
                    {
                        self.ready.push_back(event);
                    }
                }
            }
            // Notifications were lost (ENOBUFS): anything may have changed.
            Ok(Err(_)) => self.ready.push_back(Event::Changed),
            Err(_would_block) => {}
        }
    }

    fn event(&mut self, by: u32, message: &Rtnl) -> Option<Event> {
        let ours = match message {
            Rtnl::NewLink(link) => {
                let name = name(link)?;
                if name == self.vtep.as_str() {
                    self.vtep_index = Some(link.header.index);
                }
                self.is_ours(link.header.index) || addr_of(name).or_else(|| shaped_addr_of(name)).is_some()
            }
            Rtnl::DelLink(link) if link.header.interface_family == AddressFamily::Unspec => {
                if let Some(addr) = addr_of(name(link)?) {
                    return Some(Event::LinkGone(addr));
                }
                self.is_ours(link.header.index) || shaped_addr_of(name(link)?).is_some()
            }
            Rtnl::NewAddress(_) | Rtnl::DelAddress(_) => true,
            Rtnl::NewRoute(route) | Rtnl::DelRoute(route) => {
                let by =
                    |attribute: &_| matches!(attribute, RouteAttribute::Oif(index) if self.is_ours(*index));
                route.attributes.iter().any(by)
            }
            // Entries that come and go with traffic say nothing. But somebody's deletion also looks like a failure.
            Rtnl::NewNeighbour(entry) | Rtnl::DelNeighbour(entry) => {
                self.is_on_ours(entry) && (by != 0 || !transient(entry.header.state))
            }
            Rtnl::NewQueueDiscipline(of)
            | Rtnl::DelQueueDiscipline(of)
            | Rtnl::NewTrafficFilter(of)
            | Rtnl::DelTrafficFilter(of) => {
                let index = of.header.index.cast_unsigned();
                weft_model::link::is_index(index) || weft_model::bandwidth::is_device_index(index)
            }
            _ => false,
        };
        ours.then_some(Event::Changed)
    }

    fn is_ours(&self, index: u32) -> bool {
        Some(index) == self.vtep_index || index == self.underlay
    }

    fn is_on_ours(&self, entry: &NeighbourMessage) -> bool {
        let index = entry.header.ifindex;
        Some(index) == self.vtep_index || weft_model::link::is_index(index)
    }
}

fn name(link: &LinkMessage) -> Option<&str> {
    link.attributes.iter().find_map(|attribute| match attribute {
        LinkAttribute::IfName(name) => Some(name.as_str()),
        _ => None,
    })
}
