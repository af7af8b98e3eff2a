//! What others, and we, change in the network namespace's nf_tables ruleset, by name.
//!
//! Woken by: the kernel's notifications on tables, chains, rules and what sets hold. Emits: [`Event`], one for each
//! object, after the whole transaction is in force. iptables' nft backend is seen here, its legacy backend is not:
//! the kernel announces nothing of that.

use std::collections::VecDeque;
use std::io;

use futures::future::ready;
use futures::stream::{Stream, StreamExt, unfold};
use netlink_packet_core::{NetlinkDeserializable, NetlinkHeader, NetlinkSerializable, NlasIterator};
use netlink_sys::protocols::NETLINK_NETFILTER;
use tokio::io::unix::AsyncFd;
use weft_model::firewall::TABLE;

use super::KernelError;
use super::socket::NetlinkSocket;

/// NFNLGRP_NFTABLES is group 7 (linux/netfilter/nfnetlink.h), here as a mask.
const GROUPS: u32 = 1 << 6;
/// NFNL_SUBSYS_NFTABLES (linux/netfilter/nfnetlink.h): the upper byte of a message's type.
const SUBSYSTEM: u8 = 10;
/// struct nfgenmsg: family, version, resource.
const HEADER: usize = 4;

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    Changed(Notice),
    /// Notifications were lost (ENOBUFS), or could not be read: anything may have changed.
    Lost,
}

/// One object that came, changed, or went.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Notice {
    pub family: u8,
    pub table: String,
    /// Of a chain or a rule.
    pub chain: Option<String>,
    pub object: Object,
    pub kind: Kind,
    /// The netlink port of the socket that did it.
    pub by_port: u32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Object {
    Table,
    Chain,
    Rule,
    Set,
    Element,
    /// A counter, quota, limit or other object that has a name.
    Named,
    Flowtable,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// Made, or changed.
    New,
    Deleted,
}

/// Families of tables (linux/netfilter.h, NFPROTO_*).
pub mod family {
    pub const INET: u8 = 1;
    pub const IPV4: u8 = 2;
}

struct Watch {
    socket: AsyncFd<NetlinkSocket<Message>>,
    ready: VecDeque<Event>,
}

/// That somebody else changed the firewall's table, or may have. `own`: the port of the socket that we change it by.
pub fn touches(own: u32) -> Result<impl Stream<Item = ()> + Send + 'static, KernelError> {
    let concerns = move |event| match event {
        Event::Changed(Notice { family: family::INET, table, by_port, .. }) => {
            table == TABLE && by_port != own
        }
        Event::Changed(_) => false,
        Event::Lost => true,
    };
    Ok(watch()?.filter_map(move |event| ready(concerns(event).then_some(()))))
}

/// Starts to listen at once, in the network namespace of the calling thread; needs a tokio runtime. The stream does
/// not end.
pub fn watch() -> Result<impl Stream<Item = Event> + Send + 'static, KernelError> {
    let refused = |source| KernelError::Refused {
        operation: "listen to",
        subject: "the kernel's notifications on nf_tables".into(),
        source,
    };
    let socket = NetlinkSocket::open(NETLINK_NETFILTER, GROUPS).map_err(refused)?;
    socket.set_non_blocking().map_err(refused)?;
    #[expect(
        deprecated,
        reason = "its successor is unsafe because a type may lie about its descriptor; ours owns it"
    )]
    let socket = AsyncFd::new(socket).map_err(refused)?;
    Ok(unfold(Watch { socket, ready: VecDeque::new() }, async |mut watch| {
        loop {
            if let Some(event) = watch.ready.pop_front() {
                return Some((event, watch));
            }
            watch.read().await;
        }
    }))
}

impl Watch {
    async fn read(&mut self) {
        let Ok(mut guard) = self.socket.readable_mut().await else { return };
        match guard.try_io(|socket| socket.get_mut().notifications()) {
            Ok(Ok(messages)) => {
                let notices = messages.iter().filter_map(|(by, message)| {
                    Notice::read(message.kind, *by, &message.payload).map(Event::Changed)
                });
                self.ready.extend(notices);
            }
            Ok(Err(_)) => self.ready.push_back(Event::Lost),
            Err(_would_block) => {}
        }
    }
}

impl Notice {
    /// None if it is of another subsystem, tells nothing about an object, or cannot be read. `kind`: a message's type.
    pub fn read(kind: u16, by_port: u32, payload: &[u8]) -> Option<Self> {
        let [message, subsystem] = kind.to_le_bytes();
        let (object, kind) = of_message(message).filter(|_| subsystem == SUBSYSTEM)?;
        let (header, attributes) = payload.split_at_checked(HEADER)?;
        // The attribute that has the table's name is the first of each kind of object.
        let table = name(attributes, 1)?;
        let chain = match object {
            Object::Chain => Some(name(attributes, NFTA_CHAIN_NAME)?),
            Object::Rule => Some(name(attributes, NFTA_RULE_CHAIN)?),
            _ => None,
        };
        Some(Self { family: *header.first()?, table, chain, object, kind, by_port })
    }
}

// linux/netfilter/nf_tables.h, enum nft_chain_attributes and enum nft_rule_attributes
const NFTA_CHAIN_NAME: u16 = 3;
const NFTA_RULE_CHAIN: u16 = 2;

/// By linux/netfilter/nf_tables.h, enum nf_tables_msg_types: NEW.., DEL.. and, since Linux 6.3, DESTROY.. A new
/// generation names no object.
fn of_message(message: u8) -> Option<(Object, Kind)> {
    Some(match message {
        0 => (Object::Table, Kind::New),
        2 | 26 => (Object::Table, Kind::Deleted),
        3 => (Object::Chain, Kind::New),
        5 | 27 => (Object::Chain, Kind::Deleted),
        6 => (Object::Rule, Kind::New),
        8 | 28 => (Object::Rule, Kind::Deleted),
        9 => (Object::Set, Kind::New),
        11 | 29 => (Object::Set, Kind::Deleted),
        12 => (Object::Element, Kind::New),
        14 | 30 => (Object::Element, Kind::Deleted),
        18 => (Object::Named, Kind::New),
        20 | 31 => (Object::Named, Kind::Deleted),
        22 => (Object::Flowtable, Kind::New),
        24 | 32 => (Object::Flowtable, Kind::Deleted),
        _ => return None,
    })
}

fn name(attributes: &[u8], kind: u16) -> Option<String> {
    let found = NlasIterator::new(attributes).map_while(Result::ok).find(|nla| nla.kind() == kind)?;
    let text = found.value().split(|byte| *byte == 0).next().unwrap_or_default();
    Some(String::from_utf8_lossy(text).into_owned())
}

/// A message as it came. Nothing is sent.
#[derive(Debug)]
struct Message {
    kind: u16,
    payload: Vec<u8>,
}

impl NetlinkDeserializable for Message {
    type Error = io::Error;

    fn deserialize(header: &NetlinkHeader, payload: &[u8]) -> Result<Self, Self::Error> {
        Ok(Self { kind: header.message_type, payload: payload.to_vec() })
    }
}

impl NetlinkSerializable for Message {
    fn message_type(&self) -> u16 {
        self.kind
    }

    fn buffer_len(&self) -> usize {
        self.payload.len()
    }

    fn serialize(&self, buffer: &mut [u8]) {
        buffer.copy_from_slice(&self.payload);
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn attribute(kind: u16, value: &[u8]) -> Vec<u8> {
        let length = u16::try_from(value.len() + 4).expect("short");
        let mut bytes = [length.to_ne_bytes(), kind.to_ne_bytes()].concat();
        bytes.extend(value);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn a_rule_names_its_table_and_chain() {
        let payload =
            [vec![family::IPV4, 0, 0, 7], attribute(1, b"filter\0"), attribute(2, b"INPUT\0")].concat();
        let notice = Notice::read(0x0a08, 77, &payload).expect("read");
        let expected = Notice {
            family: family::IPV4,
            table: "filter".into(),
            chain: Some("INPUT".into()),
            object: Object::Rule,
            kind: Kind::Deleted,
            by_port: 77,
        };
        assert_eq!(notice, expected);
        assert_eq!(Notice::read(0x0108, 77, &payload), None, "conntrack's");
        assert_eq!(Notice::read(0x0a0f, 77, &payload), None, "a generation");
        assert_eq!(Notice::read(0x0a08, 77, &payload[..20]), None, "cut short");
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_not(kind in any::<u16>(), bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            let _ = Notice::read(kind, 0, &bytes);
        }

        #[test]
        fn what_looks_like_ours_is_read_or_not(
            message in 0u16..34,
            attributes in proptest::collection::vec((0u16..6, 0u16..40, proptest::collection::vec(any::<u8>(), 0..12)), 0..5),
        ) {
            let mut payload = vec![2, 0, 0, 0];
            for (kind, length, value) in attributes {
                payload.extend([length.to_ne_bytes(), kind.to_ne_bytes()].concat());
                payload.extend(value);
            }
            let notice = Notice::read(0x0a00 | message, 0, &payload);
            prop_assert!(notice.is_none_or(|notice| notice.family == 2));
        }
    }
}
