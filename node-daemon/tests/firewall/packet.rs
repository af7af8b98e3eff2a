//! IPv4 packets, byte by byte (RFC 791, 792, 768, 9293), sent and heard by raw sockets.
//!
//! A raw socket hears what the kernel delivers, so behind every filter; and whatever the ports, so without a server.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::num::NonZeroU32;
use std::os::fd::OwnedFd;

use rustix::io::Errno;
use rustix::net::{
    AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType, recv, sendto, socket_with,
    sockopt,
};
use weft_model::address::HardwareAddr;
use weft_model::firewall::explain::Probe;

use crate::space::Space;

pub(crate) const SYN: u8 = 0x02;
pub(crate) const ACK: u8 = 0x10;

/// A packet to be sent. What is not said here is as usual.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Packet {
    pub(crate) from: Ipv4Addr,
    pub(crate) to: Ipv4Addr,
    pub(crate) probe: Probe,
    /// The IP header's identification: nothing on the way changes it. Not 0, which the kernel would fill in.
    pub(crate) id: u16,
    /// Of TCP and UDP; the identifier of ICMP.
    pub(crate) source_port: u16,
    /// Of TCP.
    pub(crate) flags: u8,
    /// Makes the IP header longer, by options that mean nothing.
    pub(crate) options: bool,
}

impl Packet {
    /// The first of a connection of its own.
    pub(crate) fn new(from: Ipv4Addr, to: Ipv4Addr, probe: Probe, id: u16) -> Self {
        Self { from, to, probe, id, source_port: 20_000 + id % 40_000, flags: SYN, options: false }
    }

    pub(crate) fn bytes(&self) -> Vec<u8> {
        self.with(b"weft")
    }

    pub(crate) fn with(&self, payload: &[u8]) -> Vec<u8> {
        let body = self.body(payload);
        [self.header(body.len(), 0), body].concat()
    }

    /// In two pieces, of which the first has the ports and nothing else.
    pub(crate) fn fragments(&self) -> [Vec<u8>; 2] {
        const MORE: u16 = 0x2000;
        let body = self.body(b"weft, in two pieces");
        let (first, second) = body.split_at(8);
        [
            [self.header(first.len(), MORE), first.to_vec()].concat(),
            [self.header(second.len(), 1), second.to_vec()].concat(),
        ]
    }

    fn header(&self, body: usize, fragment: u16) -> Vec<u8> {
        let options: &[u8] = if self.options { &[1, 1, 1, 0] } else { &[] };
        let words = 5 + u8::try_from(options.len() / 4).expect("short");
        let total = u16::try_from(usize::from(words) * 4 + body).expect("a short packet");
        let mut header = vec![0x40 | words, 0];
        for word in [total, self.id, fragment, 64 << 8 | u16::from(self.probe.protocol()), 0] {
            header.extend(word.to_be_bytes());
        }
        header.extend(self.from.octets());
        header.extend(self.to.octets());
        header.extend(options);
        let sum = checksum(&header);
        header[10..12].copy_from_slice(&sum.to_be_bytes());
        header
    }

    fn body(&self, payload: &[u8]) -> Vec<u8> {
        let mut bytes = match self.probe {
            Probe::Tcp { port } => {
                let mut bytes = [self.source_port.to_be_bytes(), port.to_be_bytes()].concat();
                bytes.extend([0, 0, 0, 7, 0, 0, 0, 9, 5 << 4, self.flags, 0xff, 0xff, 0, 0, 0, 0]);
                bytes
            }
            Probe::Udp { port } => {
                let length = u16::try_from(8 + payload.len()).expect("a short packet");
                [self.source_port, port, length, 0].map(u16::to_be_bytes).concat()
            }
            Probe::Icmp { kind, code } => {
                [[kind, code], [0, 0], self.source_port.to_be_bytes(), [0, 1]].concat()
            }
            Probe::Other { .. } => vec![0; 4],
        };
        if !matches!(self.probe, Probe::Tcp { .. }) {
            bytes.extend(payload);
        }
        let length = u16::try_from(bytes.len()).expect("a short packet");
        let pseudo = [
            &self.from.octets()[..],
            &self.to.octets(),
            &u16::from(self.probe.protocol()).to_be_bytes(),
            &length.to_be_bytes(),
        ];
        let (place, pseudo) = match self.probe {
            Probe::Tcp { .. } => (16, pseudo.concat()),
            Probe::Udp { .. } => (6, pseudo.concat()),
            Probe::Icmp { .. } => (2, Vec::new()),
            // What has a wrong checksum is not answered, and of a protocol that it does not know the kernel takes one for
            // granted (nf_reject_verify_csum in linux/netfilter).
            Probe::Other { .. } => (2, Vec::new()),
        };
        let sum = checksum(&[&pseudo[..], &bytes[..]].concat());
        bytes[place..place + 2].copy_from_slice(&sum.to_be_bytes());
        bytes
    }
}

/// A frame of the overlay, network 1, that carries a packet from one VTEP to another: what UDP carries.
pub(crate) fn frame(from: HardwareAddr, to: HardwareAddr, packet: &Packet) -> Vec<u8> {
    let mac = |addr: HardwareAddr| {
        let text = addr.to_string();
        text.split(':').map(|byte| u8::from_str_radix(byte, 16).expect("hexadecimal")).collect::<Vec<_>>()
    };
    let vxlan = [0x08, 0, 0, 0, 0, 0, 1, 0];
    [&vxlan[..], &mac(to), &mac(from), &[0x08, 0x00], &packet.bytes()].concat()
}

/// RFC 1071.
fn checksum(bytes: &[u8]) -> u16 {
    let words =
        bytes.chunks(2).map(|pair| u32::from(pair[0]) << 8 | pair.get(1).map_or(0, |b| u32::from(*b)));
    let sum: u32 = words.sum();
    let folded = (sum & 0xffff) + (sum >> 16);
    !u16::try_from((folded & 0xffff) + (folded >> 16)).expect("folded")
}

/// Sends whole packets, whatever their source.
pub(crate) struct Mouth(OwnedFd);

impl Mouth {
    pub(crate) fn in_space(space: &Space) -> Self {
        let protocol = NonZeroU32::new(255).map(Protocol::from_raw); // IPPROTO_RAW: with its header
        let open = || socket_with(AddressFamily::INET, SocketType::RAW, SocketFlags::CLOEXEC, protocol);
        let socket = space.enter(open).expect("a raw socket");
        sockopt::set_socket_broadcast(&socket, true).expect("broadcasts allowed");
        Self(socket)
    }

    pub(crate) fn send(&self, packet: &Packet) {
        self.send_bytes(packet.to, &packet.bytes());
    }

    pub(crate) fn send_bytes(&self, to: Ipv4Addr, bytes: &[u8]) {
        sendto(&self.0, bytes, SendFlags::empty(), &SocketAddrV4::new(to, 0)).expect("sent");
    }
}

/// Hears what is delivered in a namespace, of some protocols.
pub(crate) struct Ears(Vec<OwnedFd>);

/// A packet that was delivered.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Heard {
    pub(crate) from: Ipv4Addr,
    pub(crate) to: Ipv4Addr,
    pub(crate) id: u16,
    pub(crate) protocol: u8,
    /// From the first byte behind the IP header.
    pub(crate) transport: Vec<u8>,
}

impl Ears {
    pub(crate) fn in_space(space: &Space, protocols: &[u8]) -> Self {
        /// Enough for some ten thousand small packets that nobody has read yet.
        const ROOM: usize = 32 << 20;
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let open = |protocol: &u8| {
            let protocol = NonZeroU32::new((*protocol).into()).map(Protocol::from_raw);
            let socket =
                socket_with(AddressFamily::INET, SocketType::RAW, flags, protocol).expect("raw socket");
            sockopt::set_socket_recv_buffer_size_force(&socket, ROOM).expect("room");
            socket
        };
        Self(space.enter(|| protocols.iter().map(open).collect()))
    }

    /// All that was delivered since they were last asked.
    pub(crate) fn hear(&self) -> Vec<Heard> {
        let mut all = Vec::new();
        let mut buffer = [0; 2048];
        for socket in &self.0 {
            loop {
                match recv(socket, &mut buffer[..], RecvFlags::empty()) {
                    Ok((_, length)) => all.push(Heard::read(&buffer[..length])),
                    Err(Errno::WOULDBLOCK) => break,
                    Err(e) => panic!("a raw socket: {e}"),
                }
            }
        }
        all
    }
}

impl Heard {
    /// From the first byte of the IP header on.
    fn read(bytes: &[u8]) -> Self {
        let addr = |at: usize| Ipv4Addr::from(*bytes[at..].first_chunk::<4>().expect("an IP header"));
        Self {
            from: addr(12),
            to: addr(16),
            id: u16::from_be_bytes([bytes[4], bytes[5]]),
            protocol: bytes[9],
            transport: bytes[usize::from(bytes[0] & 0xf) * 4..].to_vec(),
        }
    }

    /// The packet that this ICMP port unreachable is about, as far as it carries it back.
    pub(crate) fn refuses(&self) -> Option<Self> {
        let refusal = self.protocol == 1 && self.transport.starts_with(&[3, 3]);
        refusal.then(|| Self::read(&self.transport[8..]))
    }

    /// The packet in a frame of the overlay (RFC 7348: UDP 8, VXLAN 8, Ethernet 14).
    pub(crate) fn inner(&self) -> Option<Self> {
        let framed = self.protocol == 17 && self.port() == 4789;
        framed.then(|| Self::read(&self.transport[30..]))
    }

    pub(crate) fn port(&self) -> u16 {
        u16::from_be_bytes([self.transport[2], self.transport[3]])
    }
}
