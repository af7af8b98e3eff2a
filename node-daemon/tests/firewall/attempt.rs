//! What becomes of a packet in the kernel: by a real connection, a datagram and its answer, or a bare packet.

use std::io::{ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType, bind, connect, socket_with, sockopt};
use weft_model::firewall::explain::Probe;
use weft_testbed::prober::patiently;

use crate::packet::{Ears, Mouth, Packet};
use crate::space::Space;

/// Of a packet.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Became {
    /// It came where it was expected, with this source; its answer came back, if it has one.
    Arrived { seen: Ipv4Addr },
    /// ICMP port unreachable came back.
    Refused,
    /// Neither. It is waited for as long as the caller says.
    Dropped,
}

/// From where, to where; and where somebody waits for it.
pub(crate) struct Attempt<'a> {
    pub(crate) space: &'a Space,
    pub(crate) from: Ipv4Addr,
    pub(crate) to: Ipv4Addr,
    pub(crate) probe: Probe,
    pub(crate) server: &'a Space,
    pub(crate) at: (Ipv4Addr, u16),
    pub(crate) patience: Duration,
}

impl Attempt<'_> {
    pub(crate) fn make(&self) -> Became {
        match self.probe {
            Probe::Tcp { port } => self.connect(SocketAddrV4::new(self.to, port)),
            // A socket of the kernel's own has the overlay's port.
            Probe::Udp { port: 4789 } | Probe::Icmp { .. } | Probe::Other { .. } => self.send(),
            Probe::Udp { port } => self.ask(SocketAddrV4::new(self.to, port)),
        }
    }

    /// Until it is known what became of it.
    fn wait(&self, mut look: impl FnMut() -> Option<Became>) -> Became {
        let deadline = Instant::now() + self.patience;
        loop {
            match look() {
                Some(became) => return became,
                None if Instant::now() > deadline => return Became::Dropped,
                None => std::thread::sleep(Duration::from_micros(200)),
            }
        }
    }

    fn connect(&self, to: SocketAddrV4) -> Became {
        let listener = self.server.enter(|| patiently(|| TcpListener::bind(self.at)).expect("bound"));
        listener.set_nonblocking(true).expect("does not wait");
        let mut client = self.space.enter(|| begin(self.from, to));
        self.wait(|| {
            if let Ok((mut stream, peer)) = listener.accept() {
                exchange(&mut client, &mut stream);
                let std::net::SocketAddr::V4(peer) = peer else { panic!("not IPv4") };
                return Some(Became::Arrived { seen: *peer.ip() });
            }
            match sockopt::socket_error(&client).expect("a socket") {
                Ok(()) => None,
                Err(Errno::CONNREFUSED) => Some(Became::Refused),
                Err(e) => panic!("{} to {to}: {e}", self.from),
            }
        })
    }

    fn ask(&self, to: SocketAddrV4) -> Became {
        let server = self.server.enter(|| patiently(|| UdpSocket::bind(self.at)).expect("bound"));
        let client = self.space.enter(|| UdpSocket::bind((self.from, 0))).expect("bound");
        client.connect(to).expect("connected");
        for socket in [&server, &client] {
            socket.set_nonblocking(true).expect("does not wait");
        }
        client.send(b"weft").expect("sent");
        let (mut buffer, mut seen) = ([0; 16], Ipv4Addr::UNSPECIFIED);
        self.wait(|| {
            if let Ok((length, std::net::SocketAddr::V4(peer))) = server.recv_from(&mut buffer) {
                assert_eq!(&buffer[..length], b"weft");
                seen = *peer.ip();
                server.send_to(b"answer", peer).expect("answered");
            }
            match client.recv(&mut buffer) {
                Ok(_) => Some(Became::Arrived { seen }),
                Err(e) if e.kind() == ErrorKind::ConnectionRefused => Some(Became::Refused),
                Err(_) => None,
            }
        })
    }

    fn send(&self) -> Became {
        let packet = Packet::new(self.from, self.to, self.probe, 7_777);
        let server = Ears::in_space(self.server, &[self.probe.protocol()]);
        let client = Ears::in_space(self.space, &[1]);
        Mouth::in_space(self.space).send(&packet);
        self.wait(|| {
            let arrived = server.hear().into_iter().find(|heard| heard.id == packet.id);
            if let Some(heard) = arrived {
                return Some(Became::Arrived { seen: heard.from });
            }
            let about = client.hear().into_iter().find_map(|heard| heard.refuses());
            about.filter(|about| about.id == packet.id).map(|_| Became::Refused)
        })
    }
}

/// A connection that is being made: refusals are told by the socket, later.
fn begin(from: Ipv4Addr, to: SocketAddrV4) -> TcpStream {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = socket_with(AddressFamily::INET, SocketType::STREAM, flags, None).expect("a socket");
    bind(&socket, &SocketAddrV4::new(from, 0)).expect("bound");
    match connect(&socket, &to) {
        Ok(()) | Err(Errno::INPROGRESS) => socket.into(),
        Err(e) => panic!("{from} to {to}: {e}"),
    }
}

fn exchange(client: &mut TcpStream, server: &mut TcpStream) {
    for stream in [&*client, &*server] {
        stream.set_nonblocking(false).expect("waits");
        stream.set_read_timeout(Some(Duration::from_secs(10))).expect("not for ever");
    }
    let mut buffer = [0; 4];
    client.write_all(b"weft").expect("written");
    server.read_exact(&mut buffer).expect("read");
    server.write_all(&buffer).expect("written");
    client.read_exact(&mut buffer).expect("read");
}
