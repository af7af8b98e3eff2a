//! How much a container may send and receive: token buckets, and what the kernel holds for them (docs/dataplane.md,
//! "Bandwidth").

use std::num::{NonZeroU32, NonZeroU64};

use serde::{Deserialize, Serialize};

use crate::address::{DeviceName, NotValid, OverlayAddr};
use crate::container::Container;

/// Bytes of the Ethernet header, which a queue counts as well.
const ETHERNET: u32 = 14;
/// Packets wait no longer than this for their tokens.
const LATENCY_MS: u64 = 25;

/// A token bucket.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "(u64, u32)", into = "(u64, u32)")]
pub struct Limit {
    rate: NonZeroU64,
    burst: NonZeroU32,
}

impl Limit {
    /// Of bytes per second, and the bytes that may be sent at once. A queue's length has to fit the kernel's 32 bits.
    pub fn new(rate: u64, burst: u32) -> Result<Self, NotValid> {
        let wrong = || {
            NotValid::new(
                "a rate and a burst, both above 0 and below what a queue can hold",
                rate.to_string(),
            )
        };
        let (rate, burst) = (NonZeroU64::new(rate), NonZeroU32::new(burst));
        let limit = rate.zip(burst).map(|(rate, burst)| Self { rate, burst }).ok_or_else(wrong)?;
        limit.checked_queue().map(|_| limit).ok_or_else(wrong)
    }

    pub fn rate(self) -> u64 {
        self.rate.get()
    }

    pub fn burst(self) -> u32 {
        self.burst.get()
    }

    /// Bytes that wait at most; what is more is dropped.
    pub fn queue(self) -> u32 {
        self.checked_queue().unwrap_or(u32::MAX)
    }

    fn checked_queue(self) -> Option<u32> {
        u32::try_from(waiting(self.rate())?.checked_add(self.burst().into())?).ok()
    }

    /// The limit that has this queue.
    pub fn of_queue(rate: u64, queue: u32) -> Option<Self> {
        let burst = u64::from(queue).checked_sub(waiting(rate)?)?;
        Self::new(rate, u32::try_from(burst).ok()?).ok()
    }

    /// A bucket that held not even one packet would let none through.
    fn for_packets_of(self, mtu: u32) -> Self {
        let burst = self.burst.max(NonZeroU32::MIN.saturating_add(mtu.saturating_add(ETHERNET - 1)));
        let raised = Self { burst, ..self };
        raised.checked_queue().map_or(self, |_| raised)
    }
}

fn waiting(rate: u64) -> Option<u64> {
    Some(rate.checked_mul(LATENCY_MS)? / 1000)
}

impl TryFrom<(u64, u32)> for Limit {
    type Error = NotValid;

    fn try_from((rate, burst): (u64, u32)) -> Result<Self, NotValid> {
        Self::new(rate, burst)
    }
}

impl From<Limit> for (u64, u32) {
    fn from(limit: Limit) -> Self {
        (limit.rate(), limit.burst())
    }
}

/// The limits of a container, each way by itself.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash, Serialize, Deserialize)]
pub struct Bandwidth {
    /// On what it receives.
    pub to: Option<Limit>,
    /// On what it sends.
    pub from: Option<Limit>,
}

/// What the kernel holds for a container's limits: a queue on the cell's end of its link, and, behind a redirection
/// of what comes in there, one on a device of its own. Planned only where there is a limit.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct ShapingSpec {
    pub addr: OverlayAddr,
    pub bandwidth: Bandwidth,
}

impl ShapingSpec {
    pub fn of(container: &Container) -> Option<Self> {
        let Bandwidth { to, from } = container.bandwidth;
        let fit = |limit: Option<Limit>| limit.map(|limit| limit.for_packets_of(container.mtu));
        let bandwidth = Bandwidth { to: fit(to), from: fit(from) };
        (bandwidth != Bandwidth::default()).then_some(Self { addr: container.addr, bandwidth })
    }

    pub fn device(&self) -> DeviceName {
        device_name(self.addr)
    }

    pub fn device_index(&self) -> u32 {
        device_index(self.addr)
    }
}

/// The device through which goes what a container sends: `i-`, and the address as in its link's name.
pub fn device_name(addr: OverlayAddr) -> DeviceName {
    crate::link::device_name('i', addr)
}

/// Beside those of links (see [`crate::link::index`]).
pub fn device_index(addr: OverlayAddr) -> u32 {
    crate::link::index(addr) | 0x0100_0000
}

/// Whether an index is that of such a device.
pub fn is_device_index(index: u32) -> bool {
    index & 0xff00_0000 == 0x4100_0000
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    proptest! {
        /// What the kernel shows is the queue's length; it tells the burst.
        #[test]
        fn a_limit_is_known_by_its_queue(rate in 1..=1u64 << 36, burst in 1..=1u32 << 30) {
            let limit = Limit::new(rate, burst).expect("fits");
            prop_assert_eq!(Limit::of_queue(rate, limit.queue()), Some(limit));
        }

        #[test]
        fn a_bucket_holds_a_packet(rate in 1..=1u64 << 36, burst in 1..=1u32 << 20, mtu in 68..=65_535u32) {
            let limit = Limit::new(rate, burst).expect("fits").for_packets_of(mtu);
            prop_assert_eq!(limit.burst(), burst.max(mtu + 14));
            prop_assert_eq!(limit.rate(), rate);
        }

        #[test]
        fn no_queue_is_longer_than_the_kernel_counts(rate: u64, burst: u32) {
            if let Ok(limit) = Limit::new(rate, burst) {
                prop_assert_eq!(u64::from(limit.queue()), rate / 40 + u64::from(burst));
                prop_assert_eq!(limit.for_packets_of(u32::MAX), limit);
            }
        }
    }

    #[test]
    fn nothing_is_no_limit() {
        Limit::new(0, 1).expect_err("no rate");
        Limit::new(1, 0).expect_err("no burst");
        Limit::new(u64::MAX, 1).expect_err("no such queue");
    }

    #[test]
    fn names_and_indices_follow_the_address() {
        let addr = OverlayAddr::new([10, 255, 30, 2].into());
        assert_eq!(device_name(addr).as_str(), "i-010255030002");
        assert!(is_device_index(device_index(addr)) && !crate::link::is_index(device_index(addr)));
    }
}
