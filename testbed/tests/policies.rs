//! What the policy server says is what packets meet, on one cell and between two: policies and dynamic security groups,
//! and the server's failures. docs/dataplane.md, "To a container", "To another cell", "To the world".

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::net::{Ipv4Addr, TcpListener};
use std::thread;
use std::time::Duration;

use serde_json::json;
use weft_testbed::external_networker::{Container, ECHO_PORT, Request};
use weft_testbed::lab::Cell;
use weft_testbed::policy_server::{Fault, Policy, PolicyServer, SecurityGroup};
use weft_testbed::prober::{self, Transfer, wait_for};
use weft_testbed::{Lab, Options};

const WORLD: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const PATIENCE: Duration = Duration::from_secs(30);
/// What nodes may say while the server fails.
const COMPLAINTS: [&str; 1] = ["policy server"];

fn lab(purpose: &str) -> Lab {
    let mut options = Options::unique(purpose).unwrap();
    options.cells = 2;
    options.policy_server = true;
    let node = json!({
        "disable_container_network_policy": false,
        "policy_poll_interval_seconds": 0.5,
        "asg_poll_interval_seconds": 0.5,
    });
    options.node.extend(node.as_object().cloned().unwrap());
    let lab = Lab::up(&options).unwrap();
    lab.tell_all_refusals().unwrap();
    lab
}

fn server(lab: &Lab) -> &PolicyServer {
    lab.policy_server.as_ref().unwrap()
}

fn added(cell: &Cell, handle: &str) -> Container {
    let container = cell.add(&Request::app(handle)).unwrap();
    cell.serve(&container).unwrap();
    container
}

fn app(container: &Container) -> String {
    format!("app-of-{}", container.handle)
}

fn policy(from: &Container, to: &Container) -> Policy {
    Policy::tcp(&app(from), &app(to), ECHO_PORT)
}

/// Whether a connection is taken; else it must be refused.
fn reaches(from: &Container, addr: Ipv4Addr, port: u16) -> bool {
    prober::opens(&from.place, addr, port).unwrap()
}

#[test]
fn policies_let_in_whom_they_name_and_no_one_else() {
    let lab = lab("policies");
    let (one, two) = (&lab.cells[0], &lab.cells[1]);
    let (a, b, c) = (added(one, "a"), added(one, "b"), added(two, "c"));
    for (from, to) in [(&a, &b), (&a, &c), (&c, &a), (&b, &a)] {
        assert!(!reaches(from, to.addr, ECHO_PORT), "no policy lets {} to {}", from.handle, to.handle);
    }
    let (near, far) = (policy(&a, &b), policy(&a, &c));
    server(&lab).change(|state| state.add_policies([near.clone(), far.clone()])).unwrap().unwrap();
    wait_for("on one cell", || reaches(&a, b.addr, ECHO_PORT));
    wait_for("between cells", || reaches(&a, c.addr, ECHO_PORT));
    for (from, to) in [(&b, &a), (&c, &a), (&c, &b), (&b, &c)] {
        assert!(!reaches(from, to.addr, ECHO_PORT), "no policy lets {} to {}", from.handle, to.handle);
    }
    assert!(!reaches(&a, b.addr, ECHO_PORT + 1), "another port");

    // An established connection survives its policy, a new one does not.
    let transfer = Transfer::start(&a.place, c.addr).unwrap();
    server(&lab).change(|state| state.remove_policies([&near, &far])).unwrap();
    wait_for("the end of the policies", || {
        !reaches(&a, b.addr, ECHO_PORT) && !reaches(&a, c.addr, ECHO_PORT)
    });
    transfer.stop().unwrap();
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

#[test]
fn security_groups_change_while_containers_run() {
    let lab = lab("groups");
    let a = added(&lab.cells[0], "a");
    let open = lab.underlay.enter(|| TcpListener::bind(("0.0.0.0", 7001))).unwrap().unwrap();
    assert!(!reaches(&a, WORLD, 7001), "no security group");
    let rules = json!([
        {"protocol": "tcp", "destination": "not an address", "ports": "1"},
        {"protocol": "tcp", "destination": "10.0.0.0/24", "ports": "7001, 7003-7004"},
    ]);
    let bound = SecurityGroup {
        running_space_guids: vec!["space".into()],
        ..SecurityGroup::named("group", &rules.to_string())
    };
    server(&lab).change(|state| state.put_group(bound)).unwrap();
    wait_for("the group", || reaches(&a, WORLD, 7001));
    server(&lab).change(|state| state.remove_group("group")).unwrap();
    wait_for("the end of the group", || !reaches(&a, WORLD, 7001));
    drop(open);
    assert_eq!(lab.complaints(&["not an address", "left out", "skipped"]), Vec::<String>::new());
}

/// The server away or lying changes no packet's fate, and containers come and go.
#[test]
fn a_server_that_fails_changes_nothing() {
    let lab = lab("failing");
    let one = &lab.cells[0];
    let (a, b) = (added(one, "a"), added(one, "b"));
    server(&lab).change(|state| state.add_policies([policy(&a, &b)])).unwrap().unwrap();
    wait_for("the policy", || reaches(&a, b.addr, ECHO_PORT));
    for fault in [Fault::Error, Fault::EmptyError, Fault::Garbage, Fault::Truncated, Fault::DropInHeaders] {
        server(&lab).set_fault_everywhere(Some(fault));
        thread::sleep(Duration::from_millis(700));
        assert!(reaches(&a, b.addr, ECHO_PORT) && !reaches(&b, a.addr, ECHO_PORT));
    }
    server(&lab).stop();
    let late = added(one, "late");
    assert!(!reaches(&late, b.addr, ECHO_PORT), "an unknown app reaches nobody");
    one.kill_node().unwrap();
    one.start_node().unwrap();
    one.wait_ready(1, PATIENCE).unwrap();
    assert!(reaches(&a, b.addr, ECHO_PORT), "from the snapshot");
    one.del("late").unwrap();
    server(&lab).set_fault_everywhere(None);
    server(&lab).change(|state| state.add_policies([policy(&b, &a)])).unwrap().unwrap();
    server(&lab).start().unwrap();
    wait_for("the server is back", || reaches(&b, a.addr, ECHO_PORT));
    assert_eq!(lab.complaints(&COMPLAINTS), Vec::<String>::new());
}
