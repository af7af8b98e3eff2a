//! Expressions: what a rule is made of (linux/netfilter/nf_tables.h). Evaluated in order; the first that does not match
//! ends the rule.

use crate::name::Name;
use crate::rule::Verdict;

/// A 32-bit register, 0 to 15 (NFT_REG32_00 …). Longer values take those that follow.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Slot(pub u8);

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Expression {
    /// Loads a fact about the packet.
    Meta {
        load: Metadata,
        to: Slot,
    },
    /// Sets the packet's mark.
    SetMark {
        from: Slot,
    },
    /// Loads a fact about the packet's connection.
    Ct {
        load: Connection,
        to: Slot,
    },
    /// Sets the connection's mark.
    SetCtMark {
        from: Slot,
    },
    /// Loads bytes of the packet. A packet that is too short does not match.
    Payload {
        header: Header,
        offset: u32,
        len: u32,
        to: Slot,
    },
    /// Loads the TCP segment that fits the packet's path and the way back, in 16 bits of the machine's order: the least MTU
    /// that the routes have, less 40 or 60 bytes (IPv4, IPv6).
    PathSegment {
        to: Slot,
    },
    /// Puts 16 bits in the network's order.
    ToNetwork {
        from: Slot,
        to: Slot,
    },
    /// Makes the packet's largest TCP segment (option 2, RFC 9293) what the register holds, in the network's order, if it
    /// is larger. A packet without that option does not match.
    LowerSegment {
        from: Slot,
    },
    /// `to = (from & mask) ^ xor`; both of one length.
    Bitwise {
        from: Slot,
        to: Slot,
        mask: Vec<u8>,
        xor: Vec<u8>,
    },
    Compare {
        from: Slot,
        is: Comparison,
        with: Vec<u8>,
    },
    /// A constant.
    Value {
        to: Slot,
        data: Vec<u8>,
    },
    Lookup {
        set: Name,
        key: Slot,
        then: Lookup,
    },
    /// Puts the key into a dynamic set, or refreshes it there, and evaluates what the element carries. Does not match if
    /// the set is full, or if what the element carries does not. It carries two things at most.
    Update {
        set: Name,
        key: Slot,
        with: Vec<Stateful>,
    },
    /// Destination NAT of IPv4 to the address and port in two registers. Ends the evaluation of the hook: accepted.
    Dnat {
        addr: Slot,
        port: Slot,
    },
    /// Source NAT to the outgoing device's address. Ends the evaluation of the hook: accepted.
    Masquerade,
    /// What also stands alone in a rule.
    Stateful(Stateful),
    /// Gives the packet's first bytes, at most `length`, to who listens to the group (NFLOG).
    Log {
        group: u16,
        prefix: String,
        length: u32,
    },
    /// Drops the packet and tells its sender "port unreachable" (ICMP type 3 code 3).
    Reject,
    Verdict(Verdict),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Metadata {
    /// The family of the packet, one byte: 2 is IPv4, 10 is IPv6 (NFPROTO_*).
    Family,
    /// The protocol within IP, one byte.
    Protocol,
    Mark,
    InIndex,
    /// 16 bytes. Absent in hooks without an incoming device: does not match.
    InName,
    OutName,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Connection {
    /// Four bytes, the machine's order: INVALID 1, ESTABLISHED 2, RELATED 4, NEW 8, UNTRACKED 64.
    State,
    /// One byte: 0 as the packet that began the connection, 1 as an answer.
    Direction,
    Mark,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Header {
    Network,
    Transport,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Comparison {
    Equal,
    NotEqual,
}

/// What a lookup does with what it finds.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Lookup {
    /// Matches if the key is there. In a set only, as [`Lookup::Absent`]: 5.15 refuses it in a map.
    Present,
    /// Matches if it is not.
    Absent,
    /// Loads the element's data.
    Data(Slot),
    /// Carries out the element's verdict.
    Verdict,
}

/// Expressions that remember.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Stateful {
    Counter,
    /// A token bucket of `burst` packets, refilled at `rate` per second. Matches while there are tokens; with `over`,
    /// while there are none.
    Limit {
        rate: u64,
        burst: u32,
        over: bool,
    },
    /// Matches if more than so many connections of the same key are alive (connlimit, inverted).
    ConnectionsOver {
        count: u32,
    },
}
