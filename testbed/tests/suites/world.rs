//! Two cells, a policy server and the world around them; containers as the suites have them; connections and what
//! becomes of them; and how long a change takes.

use std::io::ErrorKind;
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream, UdpSocket};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Map, Value, json};
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::lab::Cell;
use weft_testbed::netns::Place;
use weft_testbed::policy_server::{Policy, PolicyServer, SecurityGroup};
pub(crate) use weft_testbed::prober::wait_for;
use weft_testbed::{Lab, Options};

/// The machine that all cells' underlay devices lead to: the world, for containers.
pub(crate) const WORLD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// What the issue promises of a change where the server is asked every half second.
pub(crate) const SOON: Duration = Duration::from_secs(1);
/// What never comes is to fail rather than hang.
pub(crate) const PATIENCE: Duration = Duration::from_secs(30);
/// What nodes may say while the server fails.
pub(crate) const AWAY: &str = "policy server";

// === the lab ===

/// Two cells that ask the policy server every half second.
pub(crate) fn polled(purpose: &str) -> Lab {
    polled_with(purpose, &json!({}), &json!({}))
}

/// With more properties of the nodes, and of the plugin.
pub(crate) fn polled_with(purpose: &str, node: &Value, plugin: &Value) -> Lab {
    let often = json!({"policy_poll_interval_seconds": 0.5, "asg_poll_interval_seconds": 0.5});
    lab(purpose, [object(&often), object(node)].into_iter().flatten().collect(), plugin)
}

/// Two cells whose containers reach each other by policies only.
pub(crate) fn lab(purpose: &str, node: Map<String, Value>, plugin: &Value) -> Lab {
    let mut options = Options::unique(purpose).unwrap();
    options.policy_server = true;
    options.node.insert("disable_container_network_policy".into(), false.into());
    options.node.extend(node);
    options.plugin = object(plugin);
    let lab = Lab::up(&options).unwrap();
    lab.tell_all_refusals().unwrap();
    lab
}

pub(crate) fn object(value: &Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

pub(crate) fn server(lab: &Lab) -> &PolicyServer {
    lab.policy_server.as_ref().unwrap()
}

/// Nothing was said that a person would have to look at, but for what is expected.
pub(crate) fn quiet(lab: &Lab, expected: &[&str]) {
    assert_eq!(lab.complaints(expected), Vec::<String>::new());
}

// === containers ===

/// An instance of an app, in the space `space`.
pub(crate) fn instance(handle: &str, app: &str) -> Request {
    with(Request::app(handle), &[("app_id", app), ("policy_group_id", app)])
}

/// With other properties.
pub(crate) fn with(mut request: Request, properties: &[(&str, &str)]) -> Request {
    let properties = properties.iter().map(|(name, value)| ((*name).to_owned(), (*value).into()));
    request.properties.extend(properties);
    request
}

pub(crate) fn added(cell: &Cell, request: &Request) -> Container {
    cell.add(request).unwrap()
}

// === policies and security groups ===

pub(crate) fn allow(lab: &Lab, policies: &[Policy]) {
    server(lab).change(|state| state.add_policies(policies.to_vec())).unwrap().unwrap();
}

pub(crate) fn forbid(lab: &Lab, policies: &[Policy]) {
    server(lab).change(|state| state.remove_policies(policies)).unwrap();
}

/// A group for the apps of these spaces.
pub(crate) fn group(guid: &str, rules: &Value, spaces: &[&str]) -> SecurityGroup {
    let running_space_guids = spaces.iter().map(ToString::to_string).collect();
    SecurityGroup { running_space_guids, ..SecurityGroup::named(guid, &rules.to_string()) }
}

pub(crate) fn bind(lab: &Lab, group: SecurityGroup) {
    server(lab).change(|state| state.put_group(group)).unwrap();
}

pub(crate) fn unbind(lab: &Lab, guid: &str) {
    server(lab).change(|state| state.remove_group(guid)).unwrap();
}

/// All addresses and protocols.
pub(crate) fn wide_open() -> Value {
    json!([{"protocol": "all", "destination": "0.0.0.0/0"}])
}

pub(crate) fn tcp_rule(destination: &str, ports: &str) -> Value {
    json!({"protocol": "tcp", "destination": destination, "ports": ports})
}

// === connections ===

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Fate {
    Open,
    Refused,
    /// Nobody answers, or there is no way.
    Silent,
}

/// A connection, of which nothing but its beginning matters.
pub(crate) fn tcp(from: &Place, addr: Ipv4Addr, port: u16) -> Fate {
    from.enter(|| begin(addr, port, Duration::from_secs(3))).unwrap()
}

/// The same from where the thread is already.
pub(crate) fn begin(addr: Ipv4Addr, port: u16, patience: Duration) -> Fate {
    match TcpStream::connect_timeout(&SocketAddrV4::new(addr, port).into(), patience) {
        Ok(_) => Fate::Open,
        Err(error) => fate(&error),
    }
}

/// A datagram that is answered if it arrives.
pub(crate) fn udp(from: &Place, addr: Ipv4Addr, port: u16) -> Fate {
    let exchange = || {
        let socket = UdpSocket::bind(("0.0.0.0", 0))?;
        socket.set_read_timeout(Some(Duration::from_secs(1)))?;
        socket.connect((addr, port))?;
        socket.send(b"?")?;
        socket.recv(&mut [0])
    };
    match from.enter(exchange).unwrap() {
        Ok(_) => Fate::Open,
        Err(error) => fate(&error),
    }
}

fn fate(error: &std::io::Error) -> Fate {
    match error.kind() {
        ErrorKind::ConnectionRefused => Fate::Refused,
        ErrorKind::TimedOut
        | ErrorKind::WouldBlock
        | ErrorKind::HostUnreachable
        | ErrorKind::NetworkUnreachable => Fate::Silent,
        _ => panic!("{error}"),
    }
}

pub(crate) fn opens(from: &Container, to: &Container, port: u16) -> bool {
    tcp(&from.place, to.addr, port) == Fate::Open
}

/// Takes connections to a port and counts them, for as long as it lives.
pub(crate) struct Ear {
    listener: Arc<TcpListener>,
    taken: Arc<AtomicUsize>,
    thread: Option<JoinHandle<()>>,
}

impl Ear {
    pub(crate) fn at(place: &Place, port: u16) -> Self {
        let listener = Arc::new(place.enter(|| TcpListener::bind(("0.0.0.0", port))).unwrap().unwrap());
        let taken = Arc::new(AtomicUsize::new(0));
        let (accepts, counts) = (Arc::clone(&listener), Arc::clone(&taken));
        let thread = thread::spawn(move || {
            // Ends when the socket is shut down; a peer that left in the meantime is no end.
            loop {
                match accepts.accept() {
                    Ok(_) => drop(counts.fetch_add(1, Ordering::Relaxed)),
                    Err(error) if error.kind() == ErrorKind::ConnectionAborted => {}
                    Err(_) => return,
                }
            }
        });
        Self { listener, taken, thread: Some(thread) }
    }

    pub(crate) fn taken(&self) -> usize {
        self.taken.load(Ordering::Relaxed)
    }
}

impl Drop for Ear {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

/// Answers datagrams, for as long as it lives.
pub(crate) struct Answerer {
    stop: Arc<AtomicBool>,
    thread: Option<JoinHandle<()>>,
}

impl Answerer {
    pub(crate) fn at(place: &Place, addr: Ipv4Addr, port: u16) -> Self {
        let socket = place.enter(|| UdpSocket::bind((addr, port))).unwrap().unwrap();
        socket.set_read_timeout(Some(Duration::from_millis(50))).unwrap();
        let stop = Arc::new(AtomicBool::new(false));
        let stopped = Arc::clone(&stop);
        let thread = thread::spawn(move || {
            while !stopped.load(Ordering::Relaxed) {
                if let Ok((_, peer)) = socket.recv_from(&mut [0; 16]) {
                    drop(socket.send_to(b"!", peer));
                }
            }
        });
        Self { stop, thread: Some(thread) }
    }
}

impl Drop for Answerer {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        drop(self.thread.take().map(JoinHandle::join));
    }
}

// === time ===

/// Makes a change, and waits until it is in force: within `promise`, and what the machine may have kept us waiting. How
/// long that is says the control, in the same run: a connection from the cell to itself, which no change concerns.
pub(crate) fn in_force(
    lab: &Lab,
    promise: Duration,
    what: &str,
    change: impl FnOnce(),
    done: impl Fn() -> bool,
) {
    let cell = &lab.cells[0].place;
    let start = Instant::now();
    change();
    let mut slowest = Duration::ZERO;
    loop {
        let before = Instant::now();
        assert_eq!(tcp(cell, Ipv4Addr::LOCALHOST, 1), Fate::Refused, "nobody listens there");
        slowest = slowest.max(before.elapsed());
        if done() {
            break;
        }
        assert!(start.elapsed() < 3 * promise + PATIENCE, "never in force: {what}");
        thread::sleep(Duration::from_millis(10));
    }
    let took = start.elapsed();
    println!("{what}: in force after {took:.1?} of {promise:?} (control: {slowest:.1?} at most)");
    assert!(took <= promise + slowest, "{what}: {took:?}, while the control took {slowest:?}");
}
