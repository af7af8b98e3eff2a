//! The headers of an IPv4 packet (RFC 791), as far as a line of the traffic log shows them.

use std::fmt;
use std::net::Ipv4Addr;

/// What follows the IPv4 header, by its number (IANA, "Assigned Internet Protocol Numbers").
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Protocol(pub u8);

impl Protocol {
    pub const ICMP: Self = Self(1);
    pub const TCP: Self = Self(6);
    pub const UDP: Self = Self(17);
    pub const UDPLITE: Self = Self(136);
}

/// As the kernel's own packet log writes it (net/netfilter/nf_log_syslog.c): a name for what it knows, else the number.
impl fmt::Display for Protocol {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            1 => f.write_str("ICMP"),
            6 => f.write_str("TCP"),
            17 => f.write_str("UDP"),
            50 => f.write_str("ESP"),
            51 => f.write_str("AH"),
            136 => f.write_str("UDPLITE"),
            number => write!(f, "{number}"),
        }
    }
}

/// What was cut off, or lies in an earlier fragment, is absent.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Packet {
    pub source: Ipv4Addr,
    pub destination: Ipv4Addr,
    pub protocol: Protocol,
    /// Of the whole packet, as its header says.
    pub length: u16,
    pub source_port: Option<u16>,
    pub destination_port: Option<u16>,
    pub icmp_kind: Option<u8>,
    pub icmp_code: Option<u8>,
}

impl Packet {
    /// The first bytes of a packet; none if they are not a whole IPv4 header.
    pub fn parse(bytes: &[u8]) -> Option<Self> {
        let &[first, _, l0, l1, _, _, f0, f1, _, protocol, _, _, s0, s1, s2, s3, d0, d1, d2, d3] =
            bytes.first_chunk::<20>()?;
        let (version, words) = (first >> 4, usize::from(first & 0xf));
        if version != 4 || words < 5 {
            return None;
        }
        let offset = u16::from_be_bytes([f0, f1]) & 0x1fff;
        let carried = bytes.get(words * 4..).filter(|_| offset == 0).unwrap_or_default();
        let protocol = Protocol(protocol);
        let with_ports = matches!(protocol, Protocol::TCP | Protocol::UDP | Protocol::UDPLITE);
        let port = |at: usize| {
            let bytes = carried.get(at..)?.first_chunk().filter(|_| with_ports)?;
            Some(u16::from_be_bytes(*bytes))
        };
        let icmp = |at: usize| carried.get(at).copied().filter(|_| protocol == Protocol::ICMP);
        Some(Self {
            source: Ipv4Addr::new(s0, s1, s2, s3),
            destination: Ipv4Addr::new(d0, d1, d2, d3),
            protocol,
            length: u16::from_be_bytes([l0, l1]),
            source_port: port(0),
            destination_port: port(2),
            icmp_kind: icmp(0),
            icmp_code: icmp(1),
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    /// Writes what [`Packet::parse`] reads: a header with `options` words of options, and the first bytes of what it
    /// carries.
    fn written(packet: &Packet, options: u8, offset: u16) -> Vec<u8> {
        let mut bytes = vec![0x45 + options, 0];
        bytes.extend(packet.length.to_be_bytes());
        bytes.extend([0, 0]);
        bytes.extend(offset.to_be_bytes());
        bytes.extend([64, packet.protocol.0, 0, 0]);
        bytes.extend(packet.source.octets());
        bytes.extend(packet.destination.octets());
        bytes.resize(bytes.len() + usize::from(options) * 4, 1);
        for port in [packet.source_port, packet.destination_port].into_iter().flatten() {
            bytes.extend(port.to_be_bytes());
        }
        bytes.extend([packet.icmp_kind, packet.icmp_code].into_iter().flatten());
        bytes
    }

    fn packets() -> impl Strategy<Value = Packet> {
        let carried = prop_oneof![
            (any::<[u16; 2]>(), prop_oneof![Just(6), Just(17), Just(136)])
                .prop_map(|([from, to], protocol)| (protocol, Some(from), Some(to), None, None)),
            any::<[u8; 2]>().prop_map(|[kind, code]| (1, None, None, Some(kind), Some(code))),
            (any::<u8>().prop_filter("has no ports", |p| ![1, 6, 17, 136].contains(p)))
                .prop_map(|protocol| (protocol, None, None, None, None)),
        ];
        (any::<u32>(), any::<u32>(), any::<u16>(), carried).prop_map(
            |(source, destination, length, carried)| {
                let (protocol, source_port, destination_port, icmp_kind, icmp_code) = carried;
                Packet {
                    source: source.into(),
                    destination: destination.into(),
                    protocol: Protocol(protocol),
                    length,
                    source_port,
                    destination_port,
                    icmp_kind,
                    icmp_code,
                }
            },
        )
    }

    /// None where there was something, never something else.
    fn is_part<T: PartialEq>(part: Option<T>, whole: Option<T>) -> bool {
        part.is_none() || part == whole
    }

    proptest! {
        #[test]
        fn any_bytes_are_read_or_refused(bytes in proptest::collection::vec(any::<u8>(), 0..80)) {
            if let Some(packet) = Packet::parse(&bytes) {
                prop_assert!(bytes.len() >= 20 && bytes[0] >> 4 == 4);
                prop_assert_eq!(&packet.source.octets(), &bytes[12..16]);
            }
        }

        #[test]
        fn what_is_written_is_read(packet in packets(), options in 0_u8..=10, rest in any::<[u8; 9]>()) {
            let mut bytes = written(&packet, options, 0x4000);
            bytes.extend(rest);
            prop_assert_eq!(Packet::parse(&bytes), Some(packet));
        }

        /// A cut takes fields away and changes none; a packet that has none of them is whole with its first 20 bytes.
        #[test]
        fn what_is_cut_off_is_absent(packet in packets(), options in 0_u8..=10, keep in 0_usize..70) {
            let mut bytes = written(&packet, options, 0);
            let (whole, bare) = (keep >= bytes.len(), 20 + usize::from(options) * 4);
            let bare = if bytes.len() == bare { 20 } else { usize::MAX };
            bytes.truncate(keep);
            match Packet::parse(&bytes) {
                None => prop_assert!(keep < 20),
                Some(read) => {
                    prop_assert!(is_part(read.source_port, packet.source_port));
                    prop_assert!(is_part(read.destination_port, packet.destination_port));
                    prop_assert!(is_part(read.icmp_kind, packet.icmp_kind));
                    prop_assert!(is_part(read.icmp_code, packet.icmp_code));
                    prop_assert_eq!((read.source, read.protocol), (packet.source, packet.protocol));
                    prop_assert_eq!(read == packet, keep >= bare || whole);
                }
            }
        }

        #[test]
        fn a_later_fragment_has_no_ports(packet in packets(), offset in 1_u16..0x2000) {
            let read = Packet::parse(&written(&packet, 0, offset)).expect("a header");
            prop_assert_eq!((read.source_port, read.destination_port), (None, None));
            prop_assert_eq!((read.icmp_kind, read.icmp_code), (None, None));
        }
    }

    #[test]
    fn protocols_have_the_kernels_names() {
        let names = [1, 6, 17, 50, 51, 136, 47, 132].map(|number| Protocol(number).to_string());
        assert_eq!(names, ["ICMP", "TCP", "UDP", "ESP", "AH", "UDPLITE", "47", "132"]);
    }
}
