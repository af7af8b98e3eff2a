//! The overlay network, and how it is cut into subnets that cells lease.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use ipnetwork::Ipv4Network;
use serde::{Deserialize, Serialize};

use crate::address::{HardwareAddr, NotValid, OverlayAddr};

/// The whole overlay, for example 10.255.0.0/16. Host bits are refused rather than cut off.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "Ipv4Network", into = "Ipv4Network")]
pub struct OverlayNetwork(Ipv4Network);

impl OverlayNetwork {
    pub fn get(self) -> Ipv4Network {
        self.0
    }

    pub fn prefix(self) -> u8 {
        self.0.prefix()
    }

    pub fn contains(self, subnet: OverlaySubnet) -> bool {
        self.0.is_supernet_of(subnet.network())
    }
}

impl TryFrom<Ipv4Network> for OverlayNetwork {
    type Error = NotValid;

    fn try_from(network: Ipv4Network) -> Result<Self, NotValid> {
        let whole = network.network() == network.ip() && (8..=30).contains(&network.prefix());
        whole.then_some(Self(network)).ok_or_else(|| {
            NotValid::new("an IPv4 network of prefix length 8 to 30 without host bits", network.to_string())
        })
    }
}

impl From<OverlayNetwork> for Ipv4Network {
    fn from(network: OverlayNetwork) -> Self {
        network.0
    }
}

impl FromStr for OverlayNetwork {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Self, NotValid> {
        let network: Ipv4Network =
            text.parse().map_err(|_| NotValid::new("an IPv4 network such as 10.255.0.0/16", text))?;
        network.try_into()
    }
}

impl fmt::Display for OverlayNetwork {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// Which kind of subnet a cell asks for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum SubnetKind {
    /// A block of addresses for the containers of a cell.
    Block,
    /// One address, for a machine that has no containers but speaks on the overlay (`single_ip_only`).
    Single,
}

/// What one lease gives: a block of addresses, or one address. Written as CIDR; a single address is a /32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Ipv4Network", into = "Ipv4Network")]
pub enum OverlaySubnet {
    Block(Ipv4Network),
    Single(Ipv4Addr),
}

impl OverlaySubnet {
    pub fn kind(self) -> SubnetKind {
        match self {
            Self::Block(_) => SubnetKind::Block,
            Self::Single(_) => SubnetKind::Single,
        }
    }

    pub fn network(self) -> Ipv4Network {
        match self {
            Self::Block(network) => network,
            Self::Single(addr) => addr.into(),
        }
    }

    /// The address of the cell's VTEP: the first of the block, which no container gets, or the single address.
    pub fn gateway(self) -> Ipv4Addr {
        self.network().network()
    }

    /// The MAC of the cell's VTEP: `ee:ee` and the gateway's four bytes. Peers derive it instead of asking.
    pub fn hardware_addr(self) -> HardwareAddr {
        HardwareAddr::from_ipv4(0xee, self.gateway())
    }

    /// First and last address, as numbers.
    pub fn bounds(self) -> (u32, u32) {
        let network = self.network();
        (network.network().into(), network.broadcast().into())
    }

    pub fn overlaps(self, other: Self) -> bool {
        let ((a, b), (c, d)) = (self.bounds(), other.bounds());
        a <= d && c <= b
    }

    /// Addresses for containers: all but the first (the VTEP), the second (skipped by silk's allocator, kept
    /// for parity) and the last (broadcast). A /24 gives 253, a /29 gives 5, a single address none.
    pub fn container_addrs(self) -> impl DoubleEndedIterator<Item = OverlayAddr> + Clone {
        let (first, last) = self.bounds();
        let range = match self {
            Self::Block(_) => first.saturating_add(2)..last,
            Self::Single(_) => 0..0,
        };
        range.map(|n| OverlayAddr::new(n.into()))
    }
}

impl TryFrom<Ipv4Network> for OverlaySubnet {
    type Error = NotValid;

    /// /32 is a single address; /1 to /30 without host bits is a block; a /31 has no room for a container.
    fn try_from(network: Ipv4Network) -> Result<Self, NotValid> {
        match network.prefix() {
            32 => Ok(Self::Single(network.ip())),
            1..=30 if network.network() == network.ip() => Ok(Self::Block(network)),
            _ => Err(NotValid::new(
                "a subnet of prefix length 1 to 30, or 32, without host bits",
                network.to_string(),
            )),
        }
    }
}

impl From<OverlaySubnet> for Ipv4Network {
    fn from(subnet: OverlaySubnet) -> Self {
        subnet.network()
    }
}

impl FromStr for OverlaySubnet {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Self, NotValid> {
        let network: Ipv4Network =
            text.parse().map_err(|_| NotValid::new("an IPv4 subnet such as 10.255.30.0/24", text))?;
        network.try_into()
    }
}

impl fmt::Display for OverlaySubnet {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.network().fmt(f)
    }
}

/// What there is to lease: every block of one prefix length but the first, and the first block's addresses
/// (all but its network address) one by one. This is silk's division, so both agree on who may hold what.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pool {
    network: OverlayNetwork,
    block_prefix: u8,
}

impl Pool {
    /// `subnet_prefix_length` must be longer than the network's own and at most 30.
    pub fn new(network: OverlayNetwork, subnet_prefix_length: u8) -> Result<Self, NotValid> {
        if subnet_prefix_length > network.prefix() && subnet_prefix_length <= 30 {
            Ok(Self { network, block_prefix: subnet_prefix_length })
        } else {
            Err(NotValid::new(
                "a subnet_prefix_length longer than the network's prefix and at most 30",
                subnet_prefix_length.to_string(),
            ))
        }
    }

    pub fn network(self) -> OverlayNetwork {
        self.network
    }

    pub fn block_prefix(self) -> u8 {
        self.block_prefix
    }

    /// How many subnets of a kind there are.
    pub fn size(self, kind: SubnetKind) -> u32 {
        match kind {
            SubnetKind::Block => (1 << (self.block_prefix - self.network.prefix())) - 1,
            SubnetKind::Single => (1 << (32 - self.block_prefix)) - 1,
        }
    }

    /// The `index`-th subnet of a kind, counted from 0.
    pub fn nth(self, kind: SubnetKind, index: u32) -> Option<OverlaySubnet> {
        if index >= self.size(kind) {
            return None;
        }
        let base = u32::from(self.network.get().network());
        Some(match kind {
            SubnetKind::Block => {
                let first = base + ((index + 1) << (32 - self.block_prefix));
                OverlaySubnet::Block(Ipv4Network::new(first.into(), self.block_prefix).ok()?)
            }
            SubnetKind::Single => OverlaySubnet::Single((base + 1 + index).into()),
        })
    }

    /// The index of a subnet of this pool; none if it is not one of them (another network or length).
    pub fn index_of(self, subnet: OverlaySubnet) -> Option<u32> {
        let offset = subnet.bounds().0.checked_sub(u32::from(self.network.get().network()))?;
        let index = match subnet {
            OverlaySubnet::Block(_) => (offset >> (32 - self.block_prefix)).checked_sub(1)?,
            OverlaySubnet::Single(_) => offset.checked_sub(1)?,
        };
        (self.nth(subnet.kind(), index) == Some(subnet)).then_some(index)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn pool(network: &str, prefix: u8) -> Pool {
        Pool::new(network.parse().expect("network"), prefix).expect("pool")
    }

    #[test]
    fn the_default_pool_is_silks() {
        let pool = pool("10.255.0.0/16", 24);
        assert_eq!((pool.size(SubnetKind::Block), pool.size(SubnetKind::Single)), (255, 255));
        assert_eq!(pool.nth(SubnetKind::Block, 0).expect("first").to_string(), "10.255.1.0/24");
        assert_eq!(pool.nth(SubnetKind::Block, 254).expect("last").to_string(), "10.255.255.0/24");
        assert_eq!(pool.nth(SubnetKind::Single, 0).expect("first").to_string(), "10.255.0.1/32");
        assert_eq!(pool.nth(SubnetKind::Single, 254).expect("last").to_string(), "10.255.0.255/32");
        for outside in ["10.255.0.0/24", "10.255.1.0/25", "10.254.1.0/24", "10.255.1.7/32", "10.255.0.0/32"] {
            assert_eq!(pool.index_of(outside.parse().expect(outside)), None, "{outside}");
        }
    }

    #[test]
    fn a_blocks_addresses_and_mac_are_silks() {
        let subnet: OverlaySubnet = "10.255.66.0/24".parse().expect("subnet");
        assert_eq!(subnet.hardware_addr().to_string(), "ee:ee:0a:ff:42:00");
        let addrs: Vec<_> = subnet.container_addrs().collect();
        assert_eq!(
            (addrs.len(), addrs[0].to_string(), addrs[252].to_string()),
            (253, "10.255.66.2".into(), "10.255.66.254".into())
        );
        let small: OverlaySubnet = "10.255.66.0/29".parse().expect("subnet");
        assert_eq!(small.container_addrs().count(), 5);
        assert_eq!("10.255.0.7/32".parse::<OverlaySubnet>().expect("single").container_addrs().count(), 0);
    }

    #[test]
    fn host_bits_and_useless_lengths_are_refused() {
        for text in ["10.255.1.1/24", "10.255.1.0/31", "0.0.0.0/0", "10.255.1.0/33", "x"] {
            text.parse::<OverlaySubnet>().expect_err(text);
        }
        Pool::new("10.255.0.0/16".parse().expect("network"), 16).expect_err("as long as the network");
        Pool::new("10.255.0.0/16".parse().expect("network"), 31).expect_err("too long");
    }

    proptest! {
        #[test]
        fn nth_and_index_of_are_inverse_and_subnets_of_a_pool_never_overlap(
            network in 8u8..26, more in 1u8..5, a in any::<u32>(), b in any::<u32>(), single_a: bool, single_b: bool,
        ) {
            let pool = Pool::new(
                OverlayNetwork(Ipv4Network::new(Ipv4Addr::new(10, 0, 0, 0), network).expect("prefix")), network + more,
            ).expect("pool");
            let kind = |single| if single { SubnetKind::Single } else { SubnetKind::Block };
            let nth = |n: u32, kind| pool.nth(kind, n % pool.size(kind)).expect("in the pool");
            let (left, right) = (nth(a, kind(single_a)), nth(b, kind(single_b)));
            prop_assert_eq!(pool.index_of(left), Some(a % pool.size(kind(single_a))));
            prop_assert!(pool.network().contains(left));
            prop_assert_eq!(left.overlaps(right), left == right);
        }
    }
}
