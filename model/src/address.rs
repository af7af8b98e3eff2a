//! Addresses and names that cannot be wrong: each type is made by parsing, and says what it is for.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// A text that is not what it should be. Names what was expected and what was given.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{given}` is not {expected}")]
pub struct NotValid {
    pub expected: &'static str,
    pub given: String,
}

impl NotValid {
    pub fn new(expected: &'static str, given: impl Into<String>) -> Self {
        Self { expected, given: given.into() }
    }
}

/// The address of a cell on the network that carries the overlay: the outer address of its VXLAN frames,
/// and the key of its lease.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "Ipv4Addr", into = "Ipv4Addr")]
pub struct UnderlayAddr(Ipv4Addr);

impl UnderlayAddr {
    /// Above every address, as the end of a range.
    pub(crate) const MAX: Self = Self(Ipv4Addr::BROADCAST);

    pub fn get(self) -> Ipv4Addr {
        self.0
    }
}

impl TryFrom<Ipv4Addr> for UnderlayAddr {
    type Error = NotValid;

    /// A cell is one machine: 0.0.0.0, loopback, multicast and broadcast addresses are refused.
    fn try_from(addr: Ipv4Addr) -> Result<Self, NotValid> {
        if addr.is_unspecified() || addr.is_loopback() || addr.is_multicast() || addr.is_broadcast() {
            return Err(NotValid::new("an IPv4 address of one machine on the underlay", addr.to_string()));
        }
        Ok(Self(addr))
    }
}

impl From<UnderlayAddr> for Ipv4Addr {
    fn from(addr: UnderlayAddr) -> Self {
        addr.0
    }
}

impl FromStr for UnderlayAddr {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Self, NotValid> {
        let addr: Ipv4Addr = text
            .parse()
            .map_err(|_| NotValid::new("an IPv4 address of one machine on the underlay", text))?;
        addr.try_into()
    }
}

impl fmt::Display for UnderlayAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// The address of a container, or of a machine that holds a single-address lease, on the overlay.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct OverlayAddr(Ipv4Addr);

impl OverlayAddr {
    pub const fn new(addr: Ipv4Addr) -> Self {
        Self(addr)
    }

    pub const fn get(self) -> Ipv4Addr {
        self.0
    }
}

impl fmt::Display for OverlayAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

/// An Ethernet address (EUI-48), written in lower case with colons.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct HardwareAddr([u8; 6]);

impl HardwareAddr {
    pub const fn new(bytes: [u8; 6]) -> Self {
        Self(bytes)
    }

    /// `prefix:prefix:a.b.c.d`: silk's scheme, so that either side's tools recognise the other's devices.
    pub const fn from_ipv4(prefix: u8, addr: Ipv4Addr) -> Self {
        let [a, b, c, d] = addr.octets();
        Self([prefix, prefix, a, b, c, d])
    }

    pub const fn bytes(self) -> [u8; 6] {
        self.0
    }
}

impl fmt::Display for HardwareAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [a, b, c, d, e, g] = self.0;
        write!(f, "{a:02x}:{b:02x}:{c:02x}:{d:02x}:{e:02x}:{g:02x}")
    }
}

impl fmt::Debug for HardwareAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl FromStr for HardwareAddr {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Self, NotValid> {
        let wrong = || NotValid::new("an Ethernet address (six bytes in hexadecimal with colons)", text);
        let mut bytes = [0; 6];
        let mut parts = text.split(':');
        for byte in &mut bytes {
            let part = parts.next().filter(|p| p.len() == 2 && p.bytes().all(|b| b.is_ascii_hexdigit()));
            let part = part.ok_or_else(wrong)?;
            *byte = u8::from_str_radix(part, 16).map_err(|_| wrong())?;
        }
        parts.next().is_none().then_some(Self(bytes)).ok_or_else(wrong)
    }
}

impl TryFrom<String> for HardwareAddr {
    type Error = NotValid;

    fn try_from(text: String) -> Result<Self, NotValid> {
        text.parse()
    }
}

impl From<HardwareAddr> for String {
    fn from(addr: HardwareAddr) -> Self {
        addr.to_string()
    }
}

/// The name of a network device: 1 to 15 bytes (IFNAMSIZ less the final zero), neither `.` nor `..`,
/// without `/`, `:` and white space (`dev_valid_name` in the kernel; CNI 1.1.0, parameter CNI_IFNAME).
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct DeviceName(String);

impl DeviceName {
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl FromStr for DeviceName {
    type Err = NotValid;

    fn from_str(text: &str) -> Result<Self, NotValid> {
        let fits = (1..=15).contains(&text.len()) && text != "." && text != "..";
        let clean = !text.contains(|c: char| c == '/' || c == ':' || c.is_whitespace() || c.is_control());
        if fits && clean {
            Ok(Self(text.to_owned()))
        } else {
            Err(NotValid::new("a device name (1 to 15 bytes, no `/`, `:` or white space)", text))
        }
    }
}

impl TryFrom<String> for DeviceName {
    type Error = NotValid;

    fn try_from(text: String) -> Result<Self, NotValid> {
        text.parse()
    }
}

impl From<DeviceName> for String {
    fn from(name: DeviceName) -> Self {
        name.0
    }
}

impl fmt::Display for DeviceName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_that_are_no_machine_are_refused() {
        for text in ["0.0.0.0", "127.0.0.1", "224.0.0.1", "255.255.255.255", "10.0.0.256", "", "::1"] {
            text.parse::<UnderlayAddr>().expect_err(text);
        }
    }

    #[test]
    fn hardware_address_round_trips_in_lower_case() {
        let addr: HardwareAddr = "EE:ee:0A:ff:1e:00".parse().expect("valid");
        assert_eq!(addr.to_string(), "ee:ee:0a:ff:1e:00");
        assert_eq!(addr, HardwareAddr::from_ipv4(0xee, Ipv4Addr::new(10, 255, 30, 0)));
        for text in
            ["", "ee", "ee:ee:0a:ff:1e", "ee:ee:0a:ff:1e:00:00", "ee:ee:0a:ff:1e:+1", "g0:ee:0a:ff:1e:00"]
        {
            text.parse::<HardwareAddr>().expect_err(text);
        }
    }

    #[test]
    fn device_names_follow_the_kernels_rule() {
        for text in ["eth0", "s-010255030002", "a", "abcdefghijklmno"] {
            text.parse::<DeviceName>().expect(text);
        }
        for text in ["", ".", "..", "abcdefghijklmnop", "a b", "a/b", "a:b", "a\tb"] {
            text.parse::<DeviceName>().expect_err(text);
        }
    }
}
