//! The addresses of a cell's lease: which are taken, which rest, and which is next.
//!
//! Least recently used first: a freed address goes to the end of the queue, so that peers' connections and caches
//! have the longest time to forget its former owner.

use std::collections::{BTreeSet, VecDeque};

use crate::address::OverlayAddr;
use crate::subnet::OverlaySubnet;

#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Ipam {
    subnet: Option<OverlaySubnet>,
    /// Addresses of `subnet` that nobody holds, next one first.
    free: VecDeque<OverlayAddr>,
    /// Taken or resting. May hold addresses of an earlier subnet, whose containers live on.
    taken: BTreeSet<OverlayAddr>,
}

impl Ipam {
    pub fn subnet(&self) -> Option<OverlaySubnet> {
        self.subnet
    }

    /// How many containers can still be added.
    pub fn free(&self) -> usize {
        self.free.len()
    }

    /// Addresses come from `subnet` from now on; those taken stay taken. Nothing changes if it is the same subnet.
    pub fn lease(&mut self, subnet: Option<OverlaySubnet>) {
        if self.subnet != subnet {
            self.subnet = subnet;
            let addrs = subnet.into_iter().flat_map(OverlaySubnet::container_addrs);
            self.free = addrs.filter(|addr| !self.taken.contains(addr)).collect();
        }
    }

    /// The address that was free longest.
    pub fn next(&self) -> Option<OverlayAddr> {
        self.free.front().copied()
    }

    /// False if somebody holds it already. An address outside the subnet can be taken: it is of an earlier lease.
    pub fn take(&mut self, addr: OverlayAddr) -> bool {
        let new = self.taken.insert(addr);
        if new && let Some(at) = self.free.iter().position(|free| *free == addr) {
            self.free.remove(at);
        }
        new
    }

    /// Nothing of the former owner is left.
    pub fn free_again(&mut self, addr: OverlayAddr) {
        let ours = self.subnet.is_some_and(|subnet| subnet.container_addrs().any(|a| a == addr));
        if self.taken.remove(&addr) && ours {
            self.free.push_back(addr);
        }
    }

    /// An address that was used and freed before now: it goes behind those that were not.
    pub fn used(&mut self, addr: OverlayAddr) {
        if let Some(at) = self.free.iter().position(|free| *free == addr) {
            self.free.remove(at);
            self.free.push_back(addr);
        }
    }
}
