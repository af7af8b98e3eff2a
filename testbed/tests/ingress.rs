//! Routers on the overlay reach what containers offer, and connections of removed policies are cut where that is asked for:
//! real packets between machines. docs/dataplane.md, "Overlay ingress", "Connections of removed policies".

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, SocketAddrV4, TcpListener, TcpStream};
use std::process::Command;
use std::thread;
use std::time::Duration;

use serde_json::{Map, Value, json};
use weft_testbed::external_networker::{Container, ECHO_PORT, Request};
use weft_testbed::lab::{self, Cell};
use weft_testbed::netns::Place;
use weft_testbed::policy_server::{Policy, PolicyServer, Route, SecurityGroup};
use weft_testbed::prober::{self, wait_for};
use weft_testbed::{Lab, Options};

const WORLD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const WORLD_PORT: u16 = 7001;
const PATIENCE: Duration = Duration::from_secs(30);
/// For an answer on a connection. What is cut does not answer however long one waits; the others do so at once.
const ANSWER: Duration = Duration::from_secs(3);

fn properties(value: Value) -> Map<String, Value> {
    value.as_object().cloned().unwrap()
}

fn lab<const N: usize>(purpose: &str, only: [Value; N]) -> Lab {
    let mut options = Options::unique(purpose).unwrap();
    options.cells = u32::try_from(N).unwrap();
    options.policy_server = true;
    options.node = properties(json!({
        "disable_container_network_policy": false,
        "policy_poll_interval_seconds": 0.5,
        "asg_poll_interval_seconds": 0.5,
    }));
    options.only = (1..).zip(only).map(|(index, only)| (format!("cell{index}"), properties(only))).collect();
    let lab = Lab::up(&options).unwrap();
    lab.tell_all_refusals().unwrap();
    lab
}

fn server(lab: &Lab) -> &PolicyServer {
    lab.policy_server.as_ref().unwrap()
}

fn added(cell: &Cell, request: &Request) -> Container {
    let container = cell.add(request).unwrap();
    cell.serve(&container).unwrap();
    container
}

fn mapped(handle: &str, host: u16, container: u16) -> Request {
    let port_mappings = json!([{"host_port": host, "container_port": container}]);
    Request { port_mappings, ..Request::app(handle) }
}

/// Whether a connection is taken; else it must be refused.
fn reaches(from: &Place, addr: Ipv4Addr, port: u16) -> bool {
    prober::opens(from, addr, port).unwrap()
}

fn explain(cell: &Cell, from: &str, to: &str) -> Value {
    let output = Command::new(lab::programs().unwrap().join("weft-node"))
        .args(["explain", "--json", "--from", from, "--to", to, "--socket"])
        .arg(&cell.socket)
        .output()
        .unwrap();
    serde_json::from_slice(&output.stdout).unwrap()
}

#[test]
fn routers_on_the_overlay_reach_what_containers_offer() {
    let on = || json!({"enable_overlay_ingress_rules": true});
    let single = json!({"single_ip_only": true});
    let lab = lab(
        "routers",
        [on(), json!({}), json!({"single_ip_only": true, "enable_overlay_ingress_rules": true}), single],
    );
    let [on, off, router, stranger] = [0, 1, 2, 3].map(|index| &lab.cells[index]);
    let mut request = mapped("a", 61_000, 9001);
    request.properties.insert("ports".into(), json!("8080, x, 0, 2222"));
    let a = added(on, &request);
    let b = added(off, &Request::app("b"));
    let listen = |port: u16| a.place.enter(|| TcpListener::bind(("0.0.0.0", port))).unwrap().unwrap();
    let _listening = [2222, 9000, 9001].map(listen);

    wait_for("the routers' tag", || reaches(&router.place, a.addr, ECHO_PORT));
    let own = router.overlay().unwrap();
    let seen = prober::tcp(&router.place, SocketAddrV4::new(a.addr, ECHO_PORT)).unwrap().source;
    assert_eq!(seen, own, "the containers see the router itself");
    let check = || {
        for (port, expected) in [(ECHO_PORT, true), (2222, true), (9001, true), (9000, false)] {
            assert_eq!(reaches(&router.place, a.addr, port), expected, "port {port}");
            let told = explain(on, &own.to_string(), &format!("{}:{port}/tcp", a.addr));
            assert_eq!(told["verdict"] == "allowed", expected, "{port}: {told}");
            assert_eq!(told["whose"].as_str().unwrap().contains("overlay ingress"), expected, "{told}");
        }
        for (who, from) in [("container", &b.place), ("cell", &off.place), ("machine", &stranger.place)] {
            assert!(!reaches(from, a.addr, ECHO_PORT), "a {who} that is no router");
        }
        assert!(!reaches(&router.place, b.addr, ECHO_PORT), "the receiver's cell takes no router");
    };
    check();
    let told = explain(router, &own.to_string(), &format!("{}:{ECHO_PORT}/tcp", a.addr));
    assert_eq!(told["rule"], "output: the routers' tag", "{told}");
    let tag = server(&lab).change(|state| state.allocate_tag("INGRESS_ROUTER", "router")).unwrap().unwrap();
    assert!(told["whose"].as_str().unwrap().contains(&tag), "{told}");
    assert_eq!(server(&lab).asked(Route::Tags), 2, "who has no use for the tag does not ask for it");

    // It outlives the nodes while the server is away.
    server(&lab).stop();
    for cell in [on, router] {
        cell.kill_node().unwrap();
        cell.start_node().unwrap();
        cell.wait_ready(3, PATIENCE).unwrap();
    }
    check();

    let complaints = lab.complaints(&["policy server"]);
    let about = |port: &str| complaints.iter().filter(|line| line.contains(port)).count();
    assert_eq!(
        (complaints.len(), about(r#""port":"x""#), about(r#""port":"0""#)),
        (2, 1, 1),
        "{complaints:?}"
    );
}

/// A connection to an echo server, or to whoever answers at all.
struct Talk {
    what: &'static str,
    stream: BufReader<TcpStream>,
}

impl Talk {
    fn start(what: &'static str, from: &Place, addr: Ipv4Addr, port: u16) -> Self {
        let to = SocketAddrV4::new(addr, port).into();
        let stream = from.enter(|| TcpStream::connect_timeout(&to, ANSWER)).unwrap().unwrap();
        stream.set_read_timeout(Some(ANSWER)).unwrap();
        let mut talk = Self { what, stream: BufReader::new(stream) };
        talk.stream.read_line(&mut String::new()).unwrap();
        assert!(talk.goes_on(), "{what}");
        talk
    }

    fn goes_on(&mut self) -> bool {
        let sent = self.stream.get_mut().write_all(b"?");
        sent.is_ok() && self.stream.read_exact(&mut [0]).is_ok()
    }
}

#[test]
fn connections_of_removed_policies_are_cut_and_no_others() {
    let cut = || json!({"cut_connections_of_removed_policies": true});
    let lab = lab("cut", [cut(), json!({})]);
    let [one, two] = [0, 1].map(|index| &lab.cells[index]);
    let a = added(one, &mapped("a", 61_000, ECHO_PORT));
    let b = added(one, &Request::app("b"));
    let [c, d, e] = ["c", "d", "e"].map(|handle| added(two, &Request::app(handle)));
    let outside = lab.underlay.enter(|| TcpListener::bind(("0.0.0.0", WORLD_PORT))).unwrap().unwrap();
    thread::spawn(move || prober::echo(&outside));

    let policy = |from: &Container, to: &Container| {
        let app = |container: &Container| format!("app-of-{}", container.handle);
        Policy::tcp(&app(from), &app(to), ECHO_PORT)
    };
    let go = [policy(&b, &a), policy(&c, &a), policy(&c, &d)];
    // By the last two the receiver of what is cut has a tag itself, so that what it sends leaves its cell.
    let stay = [policy(&e, &a), policy(&a, &b), policy(&a, &c)];
    let rules =
        json!([{"protocol": "tcp", "destination": WORLD.to_string(), "ports": WORLD_PORT.to_string()}]);
    let group = SecurityGroup { running_default: true, ..SecurityGroup::named("world", &rules.to_string()) };
    let asked = server(&lab).change(|state| {
        state.put_group(group);
        state.add_policies(go.iter().chain(&stay).cloned())
    });
    asked.unwrap().unwrap();
    for (from, to) in [(&b, &a), (&c, &a), (&c, &d), (&e, &a), (&a, &b), (&a, &c)] {
        wait_for("the policies", || reaches(&from.place, to.addr, ECHO_PORT));
    }
    wait_for("the security group", || reaches(&a.place, WORLD, WORLD_PORT));

    let talk = |what, from: &Container, to: &Container| Talk::start(what, &from.place, to.addr, ECHO_PORT);
    let mut cut = [talk("on the cell", &b, &a), talk("from another cell", &c, &a)];
    let mut others = [
        talk("another policy", &e, &a),
        talk("its own to the same app", &a, &b),
        talk("its own to the same app on another cell", &a, &c),
        talk("a cell that does not cut", &c, &d),
        Talk::start("a mapped port", &lab.underlay, one.underlay, 61_000),
        Talk::start("the world", &a.place, WORLD, WORLD_PORT),
    ];
    server(&lab).change(|state| state.remove_policies(&go)).unwrap();
    for (from, to) in [(&b, &a), (&c, &a), (&c, &d)] {
        wait_for("the end of the policies", || !reaches(&from.place, to.addr, ECHO_PORT));
    }
    for talk in &mut others {
        assert!(talk.goes_on(), "{}", talk.what);
    }
    for talk in &mut cut {
        assert!(!talk.goes_on(), "{}", talk.what);
    }
    for talk in &mut others {
        assert!(talk.goes_on(), "{}", talk.what);
    }

    // Back with its policy: what was sent meanwhile is sent again.
    server(&lab).change(|state| state.add_policies(go.clone())).unwrap().unwrap();
    for talk in &mut cut {
        talk.stream.get_ref().set_read_timeout(Some(PATIENCE)).unwrap();
        assert!(talk.stream.read_exact(&mut [0]).is_ok(), "{}", talk.what);
    }
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}
