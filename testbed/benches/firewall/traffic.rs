//! Real traffic of one container with the world's host. One thread is both ends, on one processor: whatever a packet
//! goes through on its way, it goes through within that thread's calls, and no scheduler has a say.

use std::io::{ErrorKind, IoSlice, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsRawFd;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use nix::libc::linger;
use nix::sys::socket::{MsgFlags, MultiHeaders, SockaddrIn, sendmmsg, setsockopt, sockopt};

use crate::common::bed::{Space, WORLD};
use crate::common::figure::median_of;

pub(super) const TCP: u16 = 8080;
pub(super) const UDP: u16 = 9;
/// Datagrams in one call.
const BATCH: usize = 64;
/// Bytes of a datagram.
const SMALL: usize = 18;
/// Bytes in bulk, at least, of which the time is taken; and those of one write.
const LARGE: usize = 1 << 20;
const CHUNK: usize = 128 << 10;

/// The sockets that a case keeps: made where they belong, used from anywhere.
#[derive(Debug)]
pub(super) struct Traffic {
    container: Space,
    world: Space,
    datagrams: UdpSocket,
    listener: TcpListener,
    /// A connection's two ends.
    client: TcpStream,
    server: TcpStream,
}

/// What a stretch of time showed.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Speeds {
    /// Datagrams per second.
    pub(super) datagrams: f64,
    pub(super) connections: f64,
    /// Microseconds until a connection is made.
    pub(super) connect: f64,
    /// Microseconds of one byte there and one back.
    pub(super) round_trip: f64,
    /// Gigabits per second.
    pub(super) bulk: f64,
}

impl Traffic {
    pub(super) fn new(container: Space, world: Space) -> Result<Self> {
        // Datagrams are counted and go no further, so that nobody answers them.
        world.run(&format!(
            "nft -f - <<'END'
             table netdev counts {{
               chain arrives {{ type filter hook ingress device \"eth0\" priority 0; udp dport {UDP} drop; }}
             }}\nEND"
        ))?;
        let at = |port| SocketAddrV4::new(WORLD, port);
        let listener = world.enter(|| Ok(TcpListener::bind(at(TCP))?))?;
        let datagrams = container.enter(|| {
            let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
            socket.connect(at(UDP))?;
            Ok(socket)
        })?;
        let client = container
            .enter(|| Ok(TcpStream::connect_timeout(&at(TCP).into(), Duration::from_secs(5))?))
            .context("connect to the world")?;
        let (server, _) = listener.accept()?;
        for end in [&client, &server] {
            end.set_nodelay(true)?;
            end.set_nonblocking(true)?;
        }
        Ok(Self { container, world, datagrams, listener, client, server })
    }

    /// Each kind of traffic for so long.
    pub(super) fn measure(&self, long: Duration) -> Result<Speeds> {
        self.container.enter(|| {
            first_in_line()?;
            let datagrams = self.flood(long)?;
            let (connections, connect) = self.connections(long)?;
            let (round_trip, bulk) = (self.round_trip(long)?, self.bulk(long)?);
            Ok(Speeds {
                datagrams,
                connections,
                connect: connect * 1e6,
                round_trip: round_trip * 1e6,
                bulk: bulk / 1e9,
            })
        })
    }

    /// Datagrams of one socket that nobody answers: to connection tracking each of them is a new connection's first.
    /// How many per second, in the median of calls.
    fn flood(&self, long: Duration) -> Result<f64> {
        let bytes = [0; SMALL];
        let slices = vec![[IoSlice::new(&bytes)]; BATCH];
        let to: Vec<Option<SockaddrIn>> = vec![None; BATCH];
        let mut headers = MultiHeaders::preallocate(BATCH, None);
        let (socket, none) = (self.datagrams.as_raw_fd(), MsgFlags::empty());
        let mut sent: u32 = 0;
        let before = self.arrived()?;
        let took = each(long, || {
            let count =
                sendmmsg(socket, &mut headers, &slices, &to, [], none).context("send datagrams")?.count();
            ensure!(count == BATCH, "{count} datagrams of {BATCH} were sent");
            sent += u32::try_from(count)?;
            Ok(())
        })?;
        let arrived = self.arrived()? - before;
        ensure!(arrived > 0.99 * f64::from(sent), "{arrived} datagrams of {sent} arrived");
        Ok(f64::from(u32::try_from(BATCH)?) / median_of(took))
    }

    /// Packets that the world's device has received.
    fn arrived(&self) -> Result<f64> {
        let text = self.world.enter(|| Ok(std::fs::read_to_string("/proc/thread-self/net/dev")?))?;
        let line = text.lines().find_map(|line| line.trim().strip_prefix("eth0:"));
        let packets = line.and_then(|line| line.split_whitespace().nth(1)).context("read /proc/net/dev")?;
        Ok(packets.parse()?)
    }

    /// Connections made and reset, one after the other: how many per second, and the seconds until one is made.
    fn connections(&self, long: Duration) -> Result<(f64, f64)> {
        let to = self.listener.local_addr()?;
        let mut made = Vec::new();
        let all = each(long, || {
            let start = Instant::now();
            let client = TcpStream::connect(to).context("connect to the world")?;
            made.push(start.elapsed().as_secs_f64());
            // Without the time that an orderly end has to wait, the container would run out of ports.
            setsockopt(&client, sockopt::Linger, &linger { l_onoff: 1, l_linger: 0 })?;
            self.listener.accept()?;
            Ok(())
        })?;
        Ok((1.0 / median_of(all), median_of(made)))
    }

    fn round_trip(&self, long: Duration) -> Result<f64> {
        let took = each(long, || {
            pass(&self.client, &self.server)?;
            pass(&self.server, &self.client)
        })?;
        Ok(median_of(took))
    }

    /// Bits per second, in the median of a socket's fillings.
    fn bulk(&self, long: Duration) -> Result<f64> {
        let (chunk, mut read) = (vec![0; CHUNK], vec![0; CHUNK]);
        let mut received = Vec::new();
        let took = each(long, || {
            let mut bytes = 0;
            while bytes < LARGE {
                while ready((&self.client).write(&chunk))?.is_some() {}
                while let Some(length) = ready((&self.server).read(&mut read))? {
                    ensure!(length > 0, "the connection has ended");
                    bytes += length;
                }
            }
            received.push(f64::from(u32::try_from(bytes)?));
            Ok(())
        })?;
        // What is still on its way is no part of the next measurement.
        let end = Instant::now() + Duration::from_millis(5);
        while Instant::now() < end {
            ready((&self.server).read(&mut read))?;
        }
        Ok(median_of(received.iter().zip(took).map(|(bytes, took)| bytes * 8.0 / took).collect()))
    }
}

/// Does something again and again for so long; how many seconds each time took.
fn each(long: Duration, mut work: impl FnMut() -> Result<()>) -> Result<Vec<f64>> {
    let mut took = Vec::new();
    let end = Instant::now() + long;
    let mut start = Instant::now();
    while start < end {
        work()?;
        let done = Instant::now();
        took.push((done - start).as_secs_f64());
        start = done;
    }
    Ok(took)
}

/// One byte.
fn pass(mut from: &TcpStream, mut to: &TcpStream) -> Result<()> {
    ensure!(ready(from.write(&[1]))? == Some(1), "a byte cannot be sent");
    let deadline = Instant::now() + Duration::from_secs(1);
    while ready(to.read(&mut [0]))?.is_none() {
        ensure!(Instant::now() < deadline, "a byte was lost");
    }
    Ok(())
}

fn ready(done: std::io::Result<usize>) -> Result<Option<usize>> {
    match done {
        Ok(length) => Ok(Some(length)),
        Err(error) if error.kind() == ErrorKind::WouldBlock => Ok(None),
        Err(error) => Err(error.into()),
    }
}

/// Puts the calling thread before what else runs on its processor.
fn first_in_line() -> Result<()> {
    let thread = nix::unistd::gettid().to_string();
    let asked = std::process::Command::new("chrt").args(["--rr", "--pid", "1", &thread]).output();
    let output = asked.context("execute chrt (package util-linux)")?;
    ensure!(output.status.success(), "chrt: {}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(())
}
