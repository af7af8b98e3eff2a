//! What the containers' firewall has decided of a packet, as it is told to whoever reads the traffic log.
//!
//! The firewall's rules log with a prefix that names the decision, and the reader knows them again by it: [`Decision`]
//! is the contract between the two.
//!
//! ```text
//!  packet       the headers of a packet, as far as a line shows them
//!  suppression  how many decisions have no line of their own
//! ```

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;
use std::time::SystemTime;

use crate::address::NotValid;
use crate::link;

mod packet;
mod suppression;

pub use packet::{Packet, Protocol};
pub use suppression::{Decided, Suppressed, Suppression, Totals};

/// What the firewall decided. The prefix of the rule that logs it is `weft:` and this name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Decision {
    /// A security group lets the container send it.
    Allowed,
    /// No security group does, or a deny network holds the destination.
    Denied,
    /// Refused: the container opens connections faster than it may.
    Limited,
    /// It would have been, were the limit not a dry run. The connection goes on, to the security groups.
    WouldLimit,
    /// No policy lets the container receive it.
    DeniedC2c,
    /// A policy does.
    AllowedC2c,
    /// Its app is the source of no policy, so no other cell would take it.
    DeniedOverlay,
}

impl Decision {
    pub const ALL: [Self; 7] = [
        Self::Allowed,
        Self::Denied,
        Self::Limited,
        Self::WouldLimit,
        Self::DeniedC2c,
        Self::AllowedC2c,
        Self::DeniedOverlay,
    ];

    /// What the rule logs: at most 63 bytes, so that iptables could write it as well (linux/netfilter/xt_NFLOG.h).
    pub const fn prefix(self) -> &'static str {
        match self {
            Self::Allowed => "weft:allowed",
            Self::Denied => "weft:denied",
            Self::Limited => "weft:limited",
            Self::WouldLimit => "weft:would-limit",
            Self::DeniedC2c => "weft:denied-c2c",
            Self::AllowedC2c => "weft:allowed-c2c",
            Self::DeniedOverlay => "weft:denied-overlay",
        }
    }

    /// Whether it counts as allowed in a line. What would have been refused is shown as silk shows it: as denied.
    pub const fn allows(self) -> bool {
        match self {
            Self::Allowed | Self::AllowedC2c => true,
            Self::Denied | Self::Limited | Self::WouldLimit | Self::DeniedC2c | Self::DeniedOverlay => false,
        }
    }

    /// Whether it is about two containers.
    pub const fn is_between_containers(self) -> bool {
        matches!(self, Self::DeniedC2c | Self::AllowedC2c | Self::DeniedOverlay)
    }

    /// What is between two containers is decided where it is received, if it gets there; everything else where it is
    /// sent.
    pub const fn direction(self) -> Direction {
        match self {
            Self::DeniedC2c | Self::AllowedC2c => Direction::Ingress,
            Self::Allowed | Self::Denied | Self::Limited | Self::WouldLimit | Self::DeniedOverlay => {
                Direction::Egress
            }
        }
    }
}

impl fmt::Display for Decision {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.prefix().trim_start_matches("weft:"))
    }
}

impl FromStr for Decision {
    type Err = NotValid;

    /// From a prefix.
    fn from_str(prefix: &str) -> Result<Self, NotValid> {
        let found = Self::ALL.into_iter().find(|decision| decision.prefix() == prefix);
        found.ok_or_else(|| NotValid::new("the prefix of a rule of the containers' firewall", prefix))
    }
}

/// As seen from the container.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Direction {
    Ingress,
    Egress,
}

impl fmt::Display for Direction {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Ingress => "ingress",
            Self::Egress => "egress",
        })
    }
}

/// One decision, as the kernel tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Record {
    pub decision: Decision,
    pub at: SystemTime,
    /// Index of the device that the packet came in by.
    pub incoming: Option<u32>,
    /// Index of the device that it was to leave by.
    pub outgoing: Option<u32>,
    pub mark: u32,
    pub packet: Packet,
}

impl Record {
    /// Ingress if the packet was on its way to a container's link: the devices `s-…`, which have indexes of their own
    /// ([`link::index`]), so that no name has to be looked up.
    pub fn direction(&self) -> Direction {
        let to_container = self.outgoing.is_some_and(link::is_index);
        if to_container { Direction::Ingress } else { self.decision.direction() }
    }

    /// The address of the container that it was decided for.
    pub fn container(&self) -> Ipv4Addr {
        match self.direction() {
            Direction::Ingress => self.packet.destination,
            Direction::Egress => self.packet.source,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::address::OverlayAddr;

    #[test]
    fn a_prefix_names_its_decision_and_no_other() {
        for decision in Decision::ALL {
            assert_eq!(decision.prefix().parse(), Ok(decision));
            assert_eq!(decision.prefix(), format!("weft:{decision}"));
            assert!(decision.prefix().len() <= 63);
        }
        for text in ["", "weft:", "weft:allow", "weft:allowed ", "WEFT:ALLOWED", "DENY_x"] {
            text.parse::<Decision>().expect_err(text);
        }
    }

    #[test]
    fn a_container_is_the_destination_of_what_goes_to_a_link_and_of_what_another_sends() {
        let (source, destination) = (Ipv4Addr::new(10, 255, 30, 2), Ipv4Addr::new(10, 255, 30, 3));
        let packet = Packet { source, destination, ..Packet::parse(&SHORTEST).expect("a packet") };
        let at = SystemTime::UNIX_EPOCH;
        let record = |decision, outgoing| Record { decision, at, incoming: None, outgoing, mark: 0, packet };
        let link = link::index(OverlayAddr::new(destination));
        for (decision, outgoing, direction, container) in [
            (Decision::Allowed, Some(2), Direction::Egress, source),
            (Decision::Denied, None, Direction::Egress, source),
            (Decision::Limited, Some(2), Direction::Egress, source),
            (Decision::WouldLimit, Some(2), Direction::Egress, source),
            (Decision::Allowed, Some(link), Direction::Ingress, destination),
            (Decision::DeniedC2c, Some(link), Direction::Ingress, destination),
            (Decision::AllowedC2c, Some(2), Direction::Ingress, destination),
            (Decision::DeniedOverlay, Some(2), Direction::Egress, source),
        ] {
            let record = record(decision, outgoing);
            assert_eq!((record.direction(), record.container()), (direction, container), "{record:?}");
        }
    }

    const SHORTEST: [u8; 20] = [0x45, 0, 0, 20, 0, 0, 0, 0, 64, 255, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];
}
