//! Names, addresses and numbers of a container's link: the same scheme as silk, so that operators' tools and
//! runbooks recognise it (docs/dataplane.md, "Container link").

use std::net::Ipv4Addr;

use serde::{Deserialize, Serialize};

use crate::address::{DeviceName, HardwareAddr, OverlayAddr};
use crate::container::{Container, Handle};

/// The cell's end of every container link has this address; it is every container's default gateway.
pub const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 1);

/// What the kernel holds for one container: the veth pair with everything on both its ends.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
pub struct LinkSpec {
    pub addr: OverlayAddr,
    /// Written into the host end's alias with the interface's name, for people and for the audit.
    pub handle: Handle,
    /// Name inside the container.
    pub interface: DeviceName,
    pub mtu: u32,
}

impl LinkSpec {
    pub fn of(container: &Container) -> Self {
        Self {
            addr: container.addr,
            handle: container.handle.clone(),
            interface: container.interface.clone(),
            mtu: container.mtu,
        }
    }

    pub fn host_name(&self) -> DeviceName {
        host_name(self.addr)
    }

    pub fn host_mac(&self) -> HardwareAddr {
        HardwareAddr::from_ipv4(0xaa, self.addr.get())
    }

    pub fn container_mac(&self) -> HardwareAddr {
        HardwareAddr::from_ipv4(0xee, self.addr.get())
    }

    /// The host end's alias (IFLA_IFALIAS, at most 255 bytes): `<interface> <handle>`. Tells people whose link
    /// it is, and lets the node recognise its containers even if its journal was lost.
    pub fn alias(&self) -> String {
        format!("{} {}", self.interface, self.handle)
    }

    pub fn index(&self) -> u32 {
        index(self.addr)
    }
}

/// `s-` and the address' four bytes in decimal with leading zeros: 14 characters, one name per address.
pub fn host_name(addr: OverlayAddr) -> DeviceName {
    device_name('s', addr)
}

/// Of a device of the cell that belongs to a container.
pub(crate) fn device_name(kind: char, addr: OverlayAddr) -> DeviceName {
    let [a, b, c, d] = addr.get().octets();
    let name = format!("{kind}-{a:03}{b:03}{c:03}{d:03}");
    name.parse().unwrap_or_else(|_| unreachable!("a letter, `-` and 12 digits are a device name"))
}

/// Index of both ends in their namespaces. Chosen by us, so that a link and all that is on it goes to the
/// kernel in one message batch, without asking for the index in between. The kernel numbers devices upwards
/// from 1 and accepts any free index on creation; 0x4000_0000 and the address' low 24 bits collide with none. It is
/// also the number by which the cell's namespace knows the container's.
pub fn index(addr: OverlayAddr) -> u32 {
    0x4000_0000 | (u32::from(addr.get()) & 0x00ff_ffff)
}

/// Whether an index is one of ours: the kernel's own are far below.
pub fn is_index(index: u32) -> bool {
    index & 0xff00_0000 == 0x4000_0000
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_and_macs_are_silks() {
        let spec = LinkSpec {
            addr: OverlayAddr::new(Ipv4Addr::new(10, 255, 30, 2)),
            handle: "h".parse().expect("handle"),
            interface: "eth0".parse().expect("name"),
            mtu: 1450,
        };
        assert_eq!(spec.host_name().as_str(), "s-010255030002");
        assert_eq!(spec.host_mac().to_string(), "aa:aa:0a:ff:1e:02");
        assert_eq!(spec.container_mac().to_string(), "ee:ee:0a:ff:1e:02");
    }
}
