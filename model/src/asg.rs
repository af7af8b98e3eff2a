//! Security groups' rules as values: what a container may send to the world (NetOut).

pub mod garden;
pub mod group;

use std::fmt;
use std::hash::{Hash, Hasher};
use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

/// Addresses from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct AddrRange {
    first: Ipv4Addr,
    last: Ipv4Addr,
}

/// Ports from `first` to `last`, both included.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct PortRange {
    first: u16,
    last: u16,
}

/// A range whose end lies before its beginning.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("the range {first} to {last} ends before it begins")]
pub struct Reversed {
    pub first: String,
    pub last: String,
}

// Lists of thousands are named by what they hash: each range in one piece.
impl Hash for AddrRange {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u64(u64::from(u32::from(self.first)) << 32 | u64::from(u32::from(self.last)));
    }
}

impl Hash for PortRange {
    fn hash<H: Hasher>(&self, state: &mut H) {
        state.write_u32(u32::from(self.first) << 16 | u32::from(self.last));
    }
}

impl AddrRange {
    pub fn new(first: Ipv4Addr, last: Ipv4Addr) -> Result<Self, Reversed> {
        let reversed = || Reversed { first: first.to_string(), last: last.to_string() };
        (first <= last).then_some(Self { first, last }).ok_or_else(reversed)
    }

    pub fn first(self) -> Ipv4Addr {
        self.first
    }

    pub fn last(self) -> Ipv4Addr {
        self.last
    }
}

impl PortRange {
    pub fn new(first: u16, last: u16) -> Result<Self, Reversed> {
        let reversed = || Reversed { first: first.to_string(), last: last.to_string() };
        (first <= last).then_some(Self { first, last }).ok_or_else(reversed)
    }

    pub fn first(self) -> u16 {
        self.first
    }

    pub fn last(self) -> u16 {
        self.last
    }
}

/// What kind of packets a rule is about.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Traffic {
    /// Every protocol.
    All,
    Tcp(PortRange),
    Udp(PortRange),
    /// None: any. Each by itself.
    Icmp {
        kind: Option<u8>,
        code: Option<u8>,
    },
}

/// One rule that lets packets out.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub struct EgressRule {
    pub to: AddrRange,
    pub traffic: Traffic,
    /// Each connection that it allows is logged.
    pub log: bool,
    /// Which of the rules that the platform passed it comes from, counted from 0. Of several that match, the one with
    /// the highest number decides whether the connection is logged.
    pub index: u32,
}

/// A rule that cannot be what was meant. The others hold.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct Skipped {
    /// Counted from 0, as passed.
    pub index: u32,
    pub why: String,
}

impl fmt::Display for AddrRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl fmt::Display for PortRange {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        if self.first == self.last {
            write!(f, "{}", self.first)
        } else {
            write!(f, "{}-{}", self.first, self.last)
        }
    }
}

impl fmt::Display for Traffic {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let any = |value: &Option<u8>| value.map_or_else(|| "any".to_owned(), |value| value.to_string());
        match self {
            Self::All => f.write_str("all"),
            Self::Tcp(ports) => write!(f, "tcp {ports}"),
            Self::Udp(ports) => write!(f, "udp {ports}"),
            Self::Icmp { kind, code } => write!(f, "icmp type {} code {}", any(kind), any(code)),
        }
    }
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}{}", self.to, self.traffic, if self.log { " log" } else { "" })
    }
}
