//! One container: what it comes with, its connections, and how Garden and its users act when they are told to try again.

use std::collections::VecDeque;
use std::net::{SocketAddrV4, TcpListener, TcpStream};
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_testbed::Lab;
use weft_testbed::external_networker::{Container, ECHO_PORT, Request};
use weft_testbed::lab::Cell;
use weft_testbed::policy_server::{Policy, PolicyServer, SecurityGroup};

use crate::{PARALLEL, PATIENCE};

/// The machine that all cells' underlay devices lead to, and where it listens.
const WORLD: SocketAddrV4 = SocketAddrV4::new(std::net::Ipv4Addr::new(10, 0, 0, 1), 80);
/// Of containers that share them; the others have their own.
const APPS: usize = 10;
const SPACES: usize = 4;
const LISTS: usize = 8;

/// Where containers come to.
pub(crate) struct World<'a> {
    pub(crate) lab: &'a Lab,
    pub(crate) server: &'a PolicyServer,
    listener: Arc<TcpListener>,
    /// "Try again", by cell.
    refused: Vec<AtomicUsize>,
}

impl<'a> World<'a> {
    /// Apps that may send to each other in a ring, spaces with a security group each, and somebody who takes connections.
    pub(crate) fn furnish(lab: &'a Lab) -> Self {
        let server = lab.policy_server.as_ref().unwrap();
        let ring = (0..APPS).map(|n| Policy::tcp(&app(n), &app((n + 1) % APPS), ECHO_PORT));
        server.change(|state| state.add_policies(ring)).unwrap().unwrap();
        let groups = (0..SPACES).map(|n| group(&space(n), n));
        server.change(|state| groups.for_each(|group| state.put_group(group))).unwrap();
        let listener = Arc::new(lab.underlay.enter(|| TcpListener::bind(WORLD)).unwrap().unwrap());
        let taken = Arc::clone(&listener);
        thread::spawn(move || {
            // Ends with the listener. Those who left without a word are forgotten after many others have come.
            let mut open = VecDeque::new();
            while let Ok((stream, _)) = taken.accept() {
                open.push_back(stream);
                open.drain(..open.len().saturating_sub(5 * PARALLEL));
            }
        });
        Self { lab, server, listener, refused: lab.cells.iter().map(|_| AtomicUsize::new(0)).collect() }
    }

    /// How often each cell has said "try again".
    pub(crate) fn refused(&self) -> Vec<usize> {
        self.refused.iter().map(|count| count.load(Ordering::Relaxed)).collect()
    }
}

impl Drop for World<'_> {
    fn drop(&mut self) {
        let _ = rustix::net::shutdown(&self.listener, rustix::net::Shutdown::Both);
    }
}

/// A container that comes and goes.
pub(crate) struct Visit<'a> {
    world: &'a World<'a>,
    pub(crate) cell: usize,
    request: Request,
    host_port: u16,
    policies: Vec<Policy>,
    group: Option<SecurityGroup>,
}

/// What keeps a container's connections open on either side: what runs in it does not end before it goes.
pub(crate) struct Connections {
    _inside: (TcpListener, TcpStream),
    _outside: TcpStream,
}

fn app(n: usize) -> String {
    format!("app-{n}")
}

fn space(n: usize) -> String {
    format!("space-{n}")
}

/// Lets a space's apps reach the world's listener, and something that tells it from others.
fn group(space: &str, n: usize) -> SecurityGroup {
    let rules = json!([
        {"protocol": "tcp", "destination": WORLD.ip(), "ports": WORLD.port().to_string()},
        {"protocol": "udp", "destination": elsewhere(n), "ports": "53"},
    ]);
    let named = SecurityGroup::named(&format!("group-of-{space}"), &rules.to_string());
    SecurityGroup { running_space_guids: vec![space.to_owned()], ..named }
}

/// The same, as Garden passes it.
fn list(n: usize) -> Value {
    let network = |addr: &str| json!([{"start": addr, "end": addr}]);
    json!([
        {"protocol": 1, "networks": network(&WORLD.ip().to_string()), "ports": [{"start": WORLD.port()}]},
        {"protocol": 2, "networks": network(&elsewhere(n)), "ports": [{"start": 53}]},
    ])
}

fn elsewhere(n: usize) -> String {
    format!("192.0.{}.{}", n / 250 % 250, n % 250)
}

impl<'a> Visit<'a> {
    /// Its cell and its kind follow from its number, so that every combination occurs on each; the host port is free as
    /// long as no two visits of one `place` are at once.
    pub(crate) fn new(world: &'a World, n: usize, place: usize) -> Self {
        let (cell, kind) = (n % world.lab.cells.len(), n / world.lab.cells.len());
        let handle = format!("pair-{n}");
        let (own_app, own_space, own_list) = (kind % 3 == 0, kind % 5 == 0, kind % 2 == 0);
        let (app_id, policies) = if own_app {
            let own = format!("app-of-{handle}");
            let policies = [(&own, &app(n % APPS)), (&app(n / 3 % APPS), &own)];
            let policies = policies.map(|(from, to)| Policy::tcp(from, to, ECHO_PORT)).into();
            (own, policies)
        } else {
            (app(n % APPS), Vec::new())
        };
        let space_id = if own_space { format!("space-of-{handle}") } else { space(n % SPACES) };
        let host_port = 61_000 + u16::try_from(place).unwrap();
        let mut request = Request::app(&handle);
        for (name, value) in [("app_id", &app_id), ("policy_group_id", &app_id), ("space_id", &space_id)] {
            request.properties.insert(name.to_owned(), value.as_str().into());
        }
        request.port_mappings = json!([{"host_port": host_port, "container_port": ECHO_PORT}]);
        request.net_out_rules = list(if own_list { n + LISTS } else { n % LISTS });
        let group = own_space.then(|| group(&space_id, n));
        Self { world, cell, request, host_port, policies, group }
    }

    fn cell(&self) -> &Cell {
        &self.world.lab.cells[self.cell]
    }

    /// First the platform knows of it, then it is added: until that succeeds; what failed is deleted, as Garden does.
    pub(crate) fn come(&self) -> Container {
        let tell = |state: &mut weft_testbed::policy_server::State| {
            if let Some(group) = &self.group {
                state.put_group(group.clone());
            }
            state.add_policies(self.policies.clone())
        };
        self.world.server.change(tell).unwrap().unwrap();
        let deadline = Instant::now() + PATIENCE;
        loop {
            match self.cell().add(&self.request) {
                Ok(container) => return container,
                Err(error) => self.try_again(&error, deadline),
            }
            self.delete();
        }
    }

    /// To the world, and by the mapped port from there.
    pub(crate) fn connect(&self, container: &Container) -> Connections {
        let what = |side| format!("{side} of {} on {}", container.handle, container.cell);
        let inside = || {
            let listener = TcpListener::bind(("0.0.0.0", ECHO_PORT)).unwrap();
            let stream = TcpStream::connect_timeout(&WORLD.into(), PATIENCE);
            let stream = stream.unwrap_or_else(|error| panic!("{}: {error}", what("connection")));
            // Its end, when its link has gone, is not to keep the namespace waiting for an answer.
            rustix::net::sockopt::set_socket_linger(&stream, Some(Duration::ZERO)).unwrap();
            (listener, stream)
        };
        let inside = container.place.enter(inside).unwrap();
        let mapped = SocketAddrV4::new(self.cell().underlay, self.host_port).into();
        let outside =
            self.world.lab.underlay.enter(|| TcpStream::connect_timeout(&mapped, PATIENCE)).unwrap();
        let outside = outside.unwrap_or_else(|error| panic!("{}: {error}", what("mapped port")));
        Connections { _inside: inside, _outside: outside }
    }

    pub(crate) fn go(&self) {
        self.delete();
        let tell = |state: &mut weft_testbed::policy_server::State| {
            state.remove_policies(&self.policies);
            if let Some(group) = &self.group {
                state.remove_group(&group.guid);
            }
        };
        self.world.server.change(tell).unwrap();
    }

    fn delete(&self) {
        let deadline = Instant::now() + PATIENCE;
        while let Err(error) = self.cell().del(&self.request.handle) {
            self.try_again(&error, deadline);
        }
    }

    /// The one failure that may be, and not for ever.
    fn try_again(&self, error: &anyhow::Error, deadline: Instant) {
        let why = format!("{} on {}: {error:#}", self.request.handle, self.cell().name);
        assert!(why.contains("code 11: "), "{why}");
        assert!(Instant::now() < deadline, "still: {why}");
        self.world.refused[self.cell].fetch_add(1, Ordering::Relaxed);
        thread::sleep(Duration::from_millis(20));
    }
}
