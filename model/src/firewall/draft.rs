//! Rules, written the way one says them: each method adds what a packet must be, or what is done with it.

use std::net::Ipv4Addr;

use ipnetwork::Ipv4Network;
use nf_tables::{
    Comparison, Connection, Expression, Header, Lookup, Metadata, Name, Rule, Slot, Stateful, Verdict,
};

use crate::address::DeviceName;
use crate::firewall::{ALLOWED, Map, name};
use crate::policy::PolicyTag;
use crate::policy::turns::Turn;

pub(super) const TCP: u8 = 6;
pub(super) const UDP: u8 = 17;
pub(super) const ICMP: u8 = 1;
/// Connection states (linux/netfilter/nf_conntrack_common.h, as `ct state` loads them).
pub(super) const INVALID: u32 = 1;
pub(super) const ESTABLISHED: u32 = 2;
pub(super) const RELATED: u32 = 4;
pub(super) const NEW: u32 = 8;
pub(super) const UNTRACKED: u32 = 64;

/// NFPROTO_IPV4.
const IPV4: u8 = 2;
/// All rules work from the first register on: none needs what an earlier match loaded.
const FIRST: Slot = Slot(0);

/// What a key is made of, in a set's order of fields.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    InIndex,
    Source,
    Destination,
    Protocol,
    /// Of TCP and UDP.
    Port,
    IcmpType,
    IcmpCode,
    ConnectionMark,
    /// The sender's tag: the low 16 bits of the packet's mark.
    Tag,
    /// The tag and its turn, turned over ([`Turn::ends`]).
    TagAtTurn,
}

/// A rule in the making.
#[derive(Debug, Clone, Default)]
pub(super) struct Draft {
    rule: Rule,
}

pub(super) fn rule(comment: &str) -> Draft {
    Draft { rule: Rule { expressions: Vec::new(), comment: comment.to_owned() } }
}

impl Draft {
    fn add(mut self, expressions: impl IntoIterator<Item = Expression>) -> Self {
        self.rule.expressions.extend(expressions);
        self
    }

    fn meta(self, load: Metadata, is: Comparison, with: &[u8]) -> Self {
        let with = with.to_vec();
        self.add([Expression::Meta { load, to: FIRST }, Expression::Compare { from: FIRST, is, with }])
    }

    // === what the packet is ===

    pub(super) fn ipv4(self) -> Self {
        self.meta(Metadata::Family, Comparison::Equal, &[IPV4])
    }

    pub(super) fn not_ipv4(self) -> Self {
        self.meta(Metadata::Family, Comparison::NotEqual, &[IPV4])
    }

    /// From a container's link: the cell's end of each is named so, and nothing else is.
    pub(super) fn in_by_link(self) -> Self {
        self.meta(Metadata::InName, Comparison::Equal, b"s-")
    }

    pub(super) fn out_by_link(self) -> Self {
        self.meta(Metadata::OutName, Comparison::Equal, b"s-")
    }

    pub(super) fn in_by(self, name: &DeviceName) -> Self {
        self.meta(Metadata::InName, Comparison::Equal, &padded(name))
    }

    pub(super) fn out_by(self, name: &DeviceName) -> Self {
        self.meta(Metadata::OutName, Comparison::Equal, &padded(name))
    }

    pub(super) fn protocol(self, number: u8) -> Self {
        self.meta(Metadata::Protocol, Comparison::Equal, &[number])
    }

    pub(super) fn port(self, number: u16) -> Self {
        self.part(Part::Port, FIRST).equal(&number.to_be_bytes())
    }

    pub(super) fn destination(self, addr: Ipv4Addr) -> Self {
        self.part(Part::Destination, FIRST).equal(&addr.octets())
    }

    pub(super) fn destination_in(self, network: Ipv4Network) -> Self {
        self.part(Part::Destination, FIRST).within(network)
    }

    pub(super) fn source_in(self, network: Ipv4Network) -> Self {
        self.part(Part::Source, FIRST).within(network)
    }

    pub(super) fn connection_mark(self, mark: u32) -> Self {
        self.part(Part::ConnectionMark, FIRST).equal(&mark.to_ne_bytes())
    }

    /// Sent by a container of an app that has a tag.
    pub(super) fn tagged(self) -> Self {
        let is = Comparison::NotEqual;
        self.part(Part::Tag, FIRST).add([Expression::Compare { from: FIRST, is, with: vec![0; 4] }])
    }

    /// Sent by one that has this tag.
    pub(super) fn tag(self, tag: PolicyTag) -> Self {
        self.part(Part::Tag, FIRST).equal(&u32::from(tag.get()).to_ne_bytes())
    }

    /// The way that the connection's first packet went, or the way of its answers.
    pub(super) fn answers(self, answers: bool) -> Self {
        self.add([Expression::Ct { load: Connection::Direction, to: FIRST }]).equal(&[answers.into()])
    }

    /// In one of these states.
    pub(super) fn state(self, states: u32) -> Self {
        let (mask, xor) = (states.to_ne_bytes().to_vec(), vec![0; 4]);
        self.add([
            Expression::Ct { load: Connection::State, to: FIRST },
            Expression::Bitwise { from: FIRST, to: FIRST, mask, xor },
            Expression::Compare { from: FIRST, is: Comparison::NotEqual, with: vec![0; 4] },
        ])
    }

    fn equal(self, with: &[u8]) -> Self {
        self.add([Expression::Compare { from: FIRST, is: Comparison::Equal, with: with.to_vec() }])
    }

    fn within(self, network: Ipv4Network) -> Self {
        let (mask, xor) = (network.mask().octets().to_vec(), vec![0; 4]);
        let masked = match network.prefix() {
            32 => self,
            _ => self.add([Expression::Bitwise { from: FIRST, to: FIRST, mask, xor }]),
        };
        masked.equal(&network.network().octets())
    }

    // === sets ===

    fn part(self, part: Part, to: Slot) -> Self {
        let payload = |header, offset, len| Expression::Payload { header, offset, len, to };
        let load = match part {
            Part::InIndex => Expression::Meta { load: Metadata::InIndex, to },
            Part::Protocol => Expression::Meta { load: Metadata::Protocol, to },
            Part::ConnectionMark => Expression::Ct { load: Connection::Mark, to },
            // RFC 791, RFC 768 and 9293, RFC 792.
            Part::Source => payload(Header::Network, 12, 4),
            Part::Destination => payload(Header::Network, 16, 4),
            Part::Port => payload(Header::Transport, 2, 2),
            Part::IcmpType => payload(Header::Transport, 0, 1),
            Part::IcmpCode => payload(Header::Transport, 1, 1),
            Part::Tag => return self.mark_bits(u16::MAX.into(), 0, to),
            Part::TagAtTurn => return self.mark_bits(Turn::BITS | u32::from(u16::MAX), Turn::TURNED, to),
        };
        self.add([load])
    }

    /// `turned`: those of them that are turned over.
    fn mark_bits(self, bits: u32, turned: u32, to: Slot) -> Self {
        let (mask, xor) = (bits.to_ne_bytes().to_vec(), turned.to_ne_bytes().to_vec());
        self.add([
            Expression::Meta { load: Metadata::Mark, to },
            Expression::Bitwise { from: to, to, mask, xor },
        ])
    }

    /// Loads a key: every part takes one register.
    fn key(self, parts: &[Part]) -> Self {
        (0..).zip(parts).fold(self, |draft, (slot, part)| draft.part(*part, Slot(slot)))
    }

    fn look_up(self, set: &Name, parts: &[Part], then: Lookup) -> Self {
        self.key(parts).add([Expression::Lookup { set: set.clone(), key: FIRST, then }])
    }

    pub(super) fn in_set(self, set: &Name, parts: &[Part]) -> Self {
        self.look_up(set, parts, Lookup::Present)
    }

    pub(super) fn not_in_set(self, set: &Name, parts: &[Part]) -> Self {
        self.look_up(set, parts, Lookup::Absent)
    }

    /// Puts the key into a dynamic set; goes on if what the element carries says so.
    pub(super) fn update(self, set: &Name, parts: &[Part], with: Stateful) -> Self {
        self.key(parts).add([Expression::Update { set: set.clone(), key: FIRST, with: vec![with] }])
    }

    // === what is done ===

    /// Takes the packet's mark from a map.
    pub(super) fn mark_from(self, map: Map, parts: &[Part]) -> Self {
        self.look_up(map.name(), parts, Lookup::Data(FIRST)).add([Expression::SetMark { from: FIRST }])
    }

    pub(super) fn mark(self, mark: u32) -> Self {
        self.add([
            Expression::Value { to: FIRST, data: mark.to_ne_bytes().to_vec() },
            Expression::SetMark { from: FIRST },
        ])
    }

    /// Sets bits of the packet's mark and leaves the others.
    pub(super) fn mark_with(self, bits: u32) -> Self {
        let (mask, xor) = ((!bits).to_ne_bytes().to_vec(), bits.to_ne_bytes().to_vec());
        self.add([
            Expression::Meta { load: Metadata::Mark, to: FIRST },
            Expression::Bitwise { from: FIRST, to: FIRST, mask, xor },
            Expression::SetMark { from: FIRST },
        ])
    }

    pub(super) fn mark_connection(self, mark: u32) -> Self {
        self.add([
            Expression::Value { to: FIRST, data: mark.to_ne_bytes().to_vec() },
            Expression::SetCtMark { from: FIRST },
        ])
    }

    /// Makes the largest TCP segment that a connection's first packets ask for fit the path. Others have no such option.
    pub(super) fn fit_segment(self) -> Self {
        self.protocol(TCP).add([
            Expression::PathSegment { to: FIRST },
            Expression::ToNetwork { from: FIRST, to: FIRST },
            Expression::LowerSegment { from: FIRST },
        ])
    }

    pub(super) fn counted(self) -> Self {
        self.add([Expression::Stateful(Stateful::Counter)])
    }

    pub(super) fn log(self, group: u16, prefix: &str) -> Self {
        /// Bytes of each packet that are enough for its headers: IPv4 up to 60, TCP up to 60.
        const LENGTH: u32 = 128;
        self.add([Expression::Log { group, prefix: prefix.to_owned(), length: LENGTH }])
    }

    /// Ends with no verdict: for rules that only log or count.
    pub(super) fn go_on(self) -> Rule {
        self.rule
    }

    fn ends(self, with: Expression) -> Rule {
        self.add([with]).rule
    }

    pub(super) fn accept(self) -> Rule {
        self.ends(Expression::Verdict(Verdict::Accept))
    }

    /// To a container: marked as let through.
    pub(super) fn let_in(self) -> Rule {
        self.mark_with(ALLOWED).accept()
    }

    pub(super) fn drop(self) -> Rule {
        self.counted().ends(Expression::Verdict(Verdict::Drop))
    }

    pub(super) fn reject(self) -> Rule {
        self.counted().ends(Expression::Reject)
    }

    pub(super) fn back(self) -> Rule {
        self.ends(Expression::Verdict(Verdict::Return))
    }

    pub(super) fn goto(self, chain: &str) -> Rule {
        self.ends(Expression::Verdict(Verdict::Goto(name(chain))))
    }

    pub(super) fn jump(self, chain: &str) -> Rule {
        self.ends(Expression::Verdict(Verdict::Jump(name(chain))))
    }

    /// Goes where the map says; goes on if the key is not there.
    pub(super) fn verdict_from(self, map: Map, parts: &[Part]) -> Rule {
        self.look_up(map.name(), parts, Lookup::Verdict).rule
    }

    /// To the address and port that the map has for the packet's port; goes on if it has none. `before` is done if it has.
    pub(super) fn dnat_from(self, map: Map, before: impl FnOnce(Self) -> Self) -> Rule {
        // Behind what `before` works with.
        let (addr, port) = (Slot(4), Slot(5));
        let found = self.part(Part::Port, FIRST).add([Expression::Lookup {
            set: map.name().clone(),
            key: FIRST,
            then: Lookup::Data(addr),
        }]);
        before(found).ends(Expression::Dnat { addr, port })
    }

    pub(super) fn masquerade(self) -> Rule {
        self.ends(Expression::Masquerade)
    }
}

fn padded(name: &DeviceName) -> [u8; 16] {
    let mut bytes = [0; 16];
    let text = name.as_str().as_bytes();
    bytes[..text.len()].copy_from_slice(text);
    bytes
}
