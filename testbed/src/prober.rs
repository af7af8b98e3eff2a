//! Real packets between places: a TCP connection that tells which source its peer sees, pings of any size with
//! "don't fragment" set, all pairs at once, and a connection that is watched over time. And the patience that all of that
//! needs.

use std::io::{self, BufRead, BufReader, ErrorKind, Read, Write};
use std::net::{Ipv4Addr, SocketAddr, SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};

use crate::external_networker::{Container, ECHO_PORT};
use crate::netns::Place;

/// Bytes of IPv4 and ICMP headers: what a ping's payload lacks to its packet.
const PING_HEADERS: u32 = 28;
/// How long an answer may take; a refusal is an answer.
const PATIENCE: Duration = Duration::from_secs(3);

/// Answers every connection with a line that says whom it sees, then with whatever it is sent.
pub fn echo(listener: &TcpListener) -> Result<()> {
    loop {
        let (stream, peer) = match listener.accept() {
            Ok(accepted) => accepted,
            // The peer gave up before it was accepted.
            Err(error) if error.kind() == ErrorKind::ConnectionAborted => continue,
            Err(error) => return Err(error).context("accept"),
        };
        thread::spawn(move || drop(answer(stream, peer)));
    }
}

fn answer(mut stream: TcpStream, peer: SocketAddr) -> std::io::Result<()> {
    stream.set_nodelay(true)?;
    writeln!(stream, "{}", peer.ip())?;
    let mut buffer = [0; 65_536];
    loop {
        match stream.read(&mut buffer)? {
            0 => return Ok(()),
            length => stream.write_all(&buffer[..length])?,
        }
    }
}

/// A TCP connection that answered.
#[derive(Debug, Clone, Copy)]
pub struct Connection {
    /// Our address as the peer sees it.
    pub source: Ipv4Addr,
    /// From the first packet to the end of the peer's first line.
    pub took: Duration,
}

/// Connects from a place to an echo server.
pub fn tcp(from: &Place, to: SocketAddrV4) -> Result<Connection> {
    from.enter(|| connect(to).map(|(_, connection)| connection))?
}

fn connect(to: SocketAddrV4) -> Result<(BufReader<TcpStream>, Connection)> {
    let start = Instant::now();
    let stream =
        TcpStream::connect_timeout(&to.into(), PATIENCE).with_context(|| format!("connect to {to}"))?;
    stream.set_read_timeout(Some(PATIENCE))?;
    stream.set_nodelay(true)?;
    let mut reader = BufReader::new(stream);
    let mut line = String::new();
    reader.read_line(&mut line).with_context(|| format!("read from {to}"))?;
    let source = line.trim().parse().with_context(|| format!("{to} answered `{}`", line.trim()))?;
    Ok((reader, Connection { source, took: start.elapsed() }))
}

/// Whether a connection is taken. If not, it must have been refused: anything else is an error.
pub fn opens(from: &Place, to: Ipv4Addr, port: u16) -> Result<bool> {
    let to = SocketAddrV4::new(to, port);
    match from.enter(|| TcpStream::connect_timeout(&to.into(), PATIENCE))? {
        Ok(_) => Ok(true),
        Err(refused) if refused.kind() == ErrorKind::ConnectionRefused => Ok(false),
        Err(other) => Err(other).with_context(|| format!("connect to {to}")),
    }
}

/// Waits half a minute at most: what never comes is to fail a test rather than to hang it.
#[track_caller]
pub fn wait_for(what: &str, done: impl FnMut() -> bool) {
    wait_within(Duration::from_secs(30), what, done);
}

#[track_caller]
pub fn wait_within(patience: Duration, what: &str, mut done: impl FnMut() -> bool) {
    let deadline = Instant::now() + patience;
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        thread::sleep(Duration::from_millis(10));
    }
}

/// Opens a socket. A program that another thread is about to start has copies of all sockets, for a moment: also of the one
/// that had this address before.
pub fn patiently<T>(bind: impl Fn() -> io::Result<T>) -> io::Result<T> {
    let deadline = Instant::now() + Duration::from_secs(5);
    loop {
        match bind() {
            Err(error) if error.kind() == ErrorKind::AddrInUse && Instant::now() < deadline => {
                thread::sleep(Duration::from_millis(1));
            }
            bound => return bound,
        }
    }
}

/// One ping; returns the round trip as ping measured it.
pub fn ping(from: &Place, to: Ipv4Addr) -> Result<Duration> {
    ping_with(from, to, &[])
}

/// One ping of exactly `bytes` as an IP packet, which no router may fragment.
pub fn ping_whole(from: &Place, to: Ipv4Addr, bytes: u32) -> Result<Duration> {
    ping_with(from, to, &["-M", "do", "-s", &(bytes - PING_HEADERS).to_string()])
}

fn ping_with(from: &Place, to: Ipv4Addr, options: &[&str]) -> Result<Duration> {
    let target = to.to_string();
    let args = [&["-n", "-c", "1", "-W", "3"], options, &[&target]].concat();
    let text = from.run("ping", &args, "")?;
    let millis =
        text.split("time=").nth(1).and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok());
    Ok(Duration::from_secs_f64(millis.unwrap_or_default() / 1000.0))
}

/// What one container found about another.
#[derive(Debug)]
pub struct Pair {
    pub from: usize,
    pub to: usize,
    pub tcp: Result<Connection>,
    pub icmp: Result<Duration>,
}

impl Pair {
    pub fn reached(&self) -> bool {
        self.tcp.is_ok() && self.icmp.is_ok()
    }
}

/// Every container to every other, by TCP and ICMP; each of them must have been [served](crate::lab::Cell::serve).
/// A connection whose peer sees another source than the container's own address has failed.
pub fn matrix(containers: &[Container]) -> Vec<Pair> {
    let row = |from: usize| {
        let others = containers.iter().enumerate().filter(move |(to, _)| *to != from);
        others.map(move |(to, peer)| probe(from, &containers[from], to, peer)).collect::<Vec<_>>()
    };
    thread::scope(|scope| {
        let rows: Vec<_> = (0..containers.len()).map(|from| scope.spawn(move || row(from))).collect();
        rows.into_iter()
            .flat_map(|row| row.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic)))
            .collect()
    })
}

fn probe(from: usize, container: &Container, to: usize, peer: &Container) -> Pair {
    let tcp = tcp(&container.place, SocketAddrV4::new(peer.addr, ECHO_PORT)).and_then(|connection| {
        let (own, seen) = (container.addr, connection.source);
        ensure!(seen == own, "{} sees {seen} instead of {own}", peer.handle);
        Ok(connection)
    });
    Pair { from, to, tcp, icmp: ping(&container.place, peer.addr) }
}

/// A connection to an echo server, used every few milliseconds until it is stopped.
#[derive(Debug)]
pub struct Transfer {
    stop: Arc<AtomicBool>,
    thread: JoinHandle<Result<Passage>>,
}

/// How a [`Transfer`] went.
#[derive(Debug, Clone, Copy)]
pub struct Passage {
    /// Longest time between two answers.
    pub longest_gap: Duration,
    pub answers: u64,
}

impl Transfer {
    /// Returns once the first answer has come.
    pub fn start(from: &Place, to: Ipv4Addr) -> Result<Self> {
        let target = SocketAddrV4::new(to, ECHO_PORT);
        let (mut reader, _) = from.enter(|| connect(target))??;
        reader.get_ref().set_read_timeout(Some(Duration::from_secs(60)))?;
        exchange(&mut reader)?;
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            let mut passage = Passage { longest_gap: Duration::ZERO, answers: 0 };
            let mut last = Instant::now();
            while !stopped.load(Ordering::Relaxed) {
                exchange(&mut reader).with_context(|| format!("after {} answers", passage.answers))?;
                passage.longest_gap = passage.longest_gap.max(last.elapsed());
                passage.answers += 1;
                last = Instant::now();
                thread::sleep(Duration::from_millis(5));
            }
            Ok(passage)
        });
        Ok(Self { stop, thread })
    }

    /// An error if the connection broke meanwhile.
    pub fn stop(self) -> Result<Passage> {
        self.stop.store(true, Ordering::Relaxed);
        self.thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// One full packet's worth, there and back.
fn exchange(reader: &mut BufReader<TcpStream>) -> Result<()> {
    let message = [0x57; 1400];
    reader.get_mut().write_all(&message).context("send")?;
    let mut answer = [0; 1400];
    reader.read_exact(&mut answer).context("receive")?;
    ensure!(answer == message, "the answer is not what was sent");
    Ok(())
}
