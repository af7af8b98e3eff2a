//! Connections of addresses that are given out anew: the next container must not inherit them.
//!
//! Owns a socket that stays open: when one of netfilter's closes, changes of the firewall wait for 10 to 30 ms.

use std::collections::BTreeSet;
use std::io;
use std::net::IpAddr;

use netlink_packet_netfilter::conntrack::{ConntrackAttribute, ConntrackMessage, IPTuple, Tuple};
use netlink_packet_netfilter::{
    NetfilterHeader, NetfilterMessage, NetfilterMessageInner, NetfilterProtoFamily,
};
use netlink_sys::protocols::NETLINK_NETFILTER;
use nix::libc::ENOENT;
use weft_model::address::OverlayAddr;

use super::KernelError;
use super::socket::NetlinkSocket;

/// Of the network namespace of the thread that opened it.
#[derive(Debug)]
pub struct Connections(Option<NetlinkSocket<NetfilterMessage>>);

impl Connections {
    pub fn open() -> Result<Self, KernelError> {
        Ok(Self(Some(open()?)))
    }

    /// Deletes all connections that one of these addresses began, or that were made to it (also through a mapped port:
    /// then it is the source of the replies). Blocks the calling thread while it reads the whole table. Returns how many
    /// there were.
    pub fn forget(&mut self, addrs: &BTreeSet<OverlayAddr>) -> Result<usize, KernelError> {
        // After an error another one is opened: what this one was asked last may not be answered yet.
        let mut socket = match self.0.take() {
            Some(socket) => socket,
            None => open()?,
        };
        // The kernel can select by itself only from 6.12 on.
        let table = socket.dump(|| message(ConntrackMessage::Get(Vec::new()))).map_err(refused("read"))?;
        let deletions: Vec<_> = table.into_iter().filter_map(|entry| deletion(entry, addrs)).collect();
        let outcomes = socket.batch(deletions).map_err(refused("delete"))?;
        let mut forgotten = 0;
        for outcome in outcomes {
            match outcome {
                Ok(()) => forgotten += 1,
                Err(refusal) if refusal.errno == ENOENT => {} // it ended by itself
                Err(refusal) => return Err(refused("delete")(io::Error::from(refusal))),
            }
        }
        self.0 = Some(socket);
        Ok(forgotten)
    }
}

fn open() -> Result<NetlinkSocket<NetfilterMessage>, KernelError> {
    NetlinkSocket::open(NETLINK_NETFILTER, 0).map_err(refused("open a socket for"))
}

fn refused(operation: &'static str) -> impl FnOnce(io::Error) -> KernelError {
    move |source| KernelError::Refused {
        operation,
        subject: "connections of former containers".into(),
        source,
    }
}

fn deletion(entry: NetfilterMessage, addrs: &BTreeSet<OverlayAddr>) -> Option<(NetfilterMessage, u16)> {
    let NetfilterMessageInner::Conntrack(ConntrackMessage::New(attributes)) = entry.inner else {
        return None;
    };
    let (mut original, mut theirs) = (None, false);
    for attribute in attributes {
        match attribute {
            ConntrackAttribute::CtaTupleOrig(tuple) => {
                theirs |= comes_from(&tuple, addrs);
                original = Some(tuple);
            }
            ConntrackAttribute::CtaTupleReply(tuple) => theirs |= comes_from(&tuple, addrs),
            _ => {}
        }
    }
    let original = original.filter(|_| theirs)?;
    Some((message(ConntrackMessage::Delete(vec![ConntrackAttribute::CtaTupleOrig(original)])), 0))
}

fn comes_from(tuple: &[Tuple], addrs: &BTreeSet<OverlayAddr>) -> bool {
    let ips = tuple.iter().filter_map(|part| match part {
        Tuple::Ip(ips) => Some(ips),
        _ => None,
    });
    ips.flatten().any(|ip| match ip {
        IPTuple::SourceAddress(IpAddr::V4(addr)) => addrs.contains(&OverlayAddr::new(*addr)),
        _ => false,
    })
}

fn message(conntrack: ConntrackMessage) -> NetfilterMessage {
    NetfilterMessage::new(NetfilterHeader::new(NetfilterProtoFamily::IPv4, 0, 0), conntrack)
}
