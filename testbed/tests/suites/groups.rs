//! Dynamic security groups: what containers may send to the world, while they run.

use std::net::Ipv4Addr;
use std::time::Instant;

use serde_json::{Value, json};
use weft_testbed::Lab;
use weft_testbed::external_networker::{Container, ECHO_PORT, Request};
use weft_testbed::lab::Cell;
use weft_testbed::policy_server::SecurityGroup;
use weft_testbed::prober::{self, Transfer};

use crate::world::{
    Answerer, Ear, Fate, SOON, WORLD, added, bind, group, in_force, instance, polled, polled_with, quiet,
    server, tcp, tcp_rule, udp, unbind, wait_for, with,
};

/// Where the acceptance tests look for the Cloud Controller.
const CONTROLLER: u16 = 9024;
const DNS: Ipv4Addr = Ipv4Addr::new(169, 254, 0, 2);

/// One on each cell.
fn apps(lab: &Lab) -> [Container; 2] {
    [0, 1].map(|n| added(&lab.cells[n], &instance(&format!("app-{n}"), "app")))
}

fn all(apps: &[Container], port: u16, fate: Fate) -> bool {
    apps.iter().all(|app| tcp(&app.place, WORLD, port) == fate)
}

fn pings(from: &Container) -> bool {
    prober::ping(&from.place, WORLD).is_ok()
}

/// A name server on the cell, where BOSH DNS is.
fn name_server(cell: &Cell) -> Answerer {
    cell.place.ip(&format!("addr add {DNS}/32 dev lo\n")).unwrap();
    Answerer::at(&cell.place, DNS, 53)
}

/// Also of accept-sd and smoke-sd what is ours: names are resolved by the cell, whatever the groups.
#[test]
fn acceptance_a_group_is_bound_and_unbound_without_a_restart() {
    let lab = polled_with("bound", &json!({}), &json!({"dns_servers": [DNS]}));
    let apps = apps(&lab);
    let _names: Vec<Answerer> = lab.cells.iter().map(name_server).collect();
    let _controller = Ear::at(&lab.underlay, CONTROLLER);
    let resolves = || apps.iter().all(|app| udp(&app.place, DNS, 53) == Fate::Open);
    assert!(all(&apps, CONTROLLER, Fate::Refused) && resolves());
    let bound = group("controller", &json!([tcp_rule("10.0.0.1", "9024")]), &["space"]);
    in_force(&lab, SOON, "bind", || bind(&lab, bound), || all(&apps, CONTROLLER, Fate::Open));
    in_force(&lab, SOON, "unbind", || unbind(&lab, "controller"), || all(&apps, CONTROLLER, Fate::Refused));
    assert!(resolves());
    quiet(&lab, &[]);
}

/// A change does not touch connections that are there.
#[test]
fn acceptance_a_connection_outlives_its_group() {
    let lab = polled("outlives");
    let [app, peer] = apps(&lab);
    // By the other cell's mapped port: to the world, for the first cell.
    lab.cells[1].del(&peer.handle).unwrap();
    let mapped = json!([{"host_port": ECHO_PORT, "container_port": ECHO_PORT}]);
    let peer = added(&lab.cells[1], &Request { port_mappings: mapped, ..instance("peer", "peer") });
    lab.cells[1].serve(&peer).unwrap();
    let (cell, port) = (lab.cells[1].underlay, ECHO_PORT);
    let reaches = || tcp(&app.place, cell, port);
    let rules = json!([tcp_rule(&cell.to_string(), &port.to_string())]);
    in_force(
        &lab,
        SOON,
        "bind",
        || bind(&lab, group("cell", &rules, &["space"])),
        || reaches() == Fate::Open,
    );
    let transfer = Transfer::start(&app.place, cell).unwrap();
    in_force(&lab, SOON, "unbind", || unbind(&lab, "cell"), || reaches() == Fate::Refused);
    assert!(transfer.stop().unwrap().answers > 0);
    quiet(&lab, &[]);
}

#[test]
fn acceptance_without_syncing_groups_change_with_a_restart_only() {
    let lab = polled_with("unsynced", &json!({"enable_asg_syncing": false}), &json!({}));
    let before = added(&lab.cells[0], &instance("before", "app"));
    let _controller = Ear::at(&lab.underlay, CONTROLLER);
    bind(&lab, group("controller", &json!([tcp_rule("10.0.0.1", "9024")]), &["space"]));
    // Long enough for two polls.
    std::thread::sleep(SOON);
    assert_eq!(tcp(&before.place, WORLD, CONTROLLER), Fate::Refused, "consistently unchanged");
    assert_eq!(server(&lab).asked(weft_testbed::policy_server::Route::SecurityGroups), 0);
    let ports = json!([{"start": CONTROLLER, "end": CONTROLLER}]);
    let passed =
        json!([{"protocol": 1, "networks": [{"start": "10.0.0.1", "end": "10.0.0.1"}], "ports": ports}]);
    let again = Request { net_out_rules: passed, ..instance("after", "app") };
    let again = added(&lab.cells[0], &again);
    assert_eq!(tcp(&again.place, WORLD, CONTROLLER), Fate::Open, "what Garden passed");
    assert_eq!(tcp(&before.place, WORLD, CONTROLLER), Fate::Refused);
    quiet(&lab, &[]);
}

#[test]
fn acceptance_a_group_of_a_thousand_rules() {
    let lab = polled("thousand");
    let _controller = Ear::at(&lab.underlay, CONTROLLER);
    let mut rules: Vec<Value> =
        (0..999).map(|n| tcp_rule(&format!("172.16.{}.{}", n / 250, n % 250), "443, 8080-8090")).collect();
    rules.push(tcp_rule("10.0.0.1", "9024"));
    bind(&lab, group("large", &json!(rules), &["space"]));
    let before = Instant::now();
    let first = added(&lab.cells[0], &instance("first", "app"));
    println!("the first container of a group of 1000 rules: {:?}", before.elapsed());
    wait_for("the group", || tcp(&first.place, WORLD, CONTROLLER) == Fate::Open);
    let before = Instant::now();
    let second = added(&lab.cells[0], &instance("second", "app"));
    println!("the second: {:?}", before.elapsed());
    assert_eq!(tcp(&second.place, WORLD, CONTROLLER), Fate::Open, "from its first moment");
    assert_eq!(tcp(&second.place, WORLD, CONTROLLER + 1), Fate::Refused);
    quiet(&lab, &[]);
}

#[test]
fn acceptance_external_connectivity_of_names_and_http() {
    let lab = polled("external");
    let mapped = json!([{"host_port": 61000, "container_port": 8080}]);
    let app = added(&lab.cells[0], &Request { port_mappings: mapped, ..instance("app", "app") });
    let _serves = Ear::at(&app.place, 8080);
    let _web = [80, 443].map(|port| Ear::at(&lab.underlay, port));
    let _names = Answerer::at(&lab.underlay, WORLD, 53);
    let seen = || [80, 443].map(|port| tcp(&app.place, WORLD, port));
    assert_eq!(tcp(&lab.underlay, lab.cells[0].underlay, 61000), Fate::Open, "the router reaches the app");
    assert_eq!((seen(), udp(&app.place, WORLD, 53)), ([Fate::Refused; 2], Fate::Refused));
    assert!(!pings(&app));
    let everywhere = "0.0.0.0-255.255.255.255";
    let names = json!([{"protocol": "udp", "destination": everywhere, "ports": "53"}]);
    let create = || {
        bind(&lab, group("tcp", &json!([tcp_rule(everywhere, "80,443")]), &["space"]));
        bind(&lab, group("udp", &names, &["space"]));
    };
    let open = || seen() == [Fate::Open; 2] && udp(&app.place, WORLD, 53) == Fate::Open;
    in_force(&lab, SOON, "http and names", create, open);
    assert!(!pings(&app), "still denied");
    in_force(&lab, SOON, "no http", || unbind(&lab, "tcp"), || seen() == [Fate::Refused; 2]);
    assert_eq!(udp(&app.place, WORLD, 53), Fate::Open);
    quiet(&lab, &[]);
}

#[test]
fn acceptance_external_connectivity_of_pings() {
    let lab = polled("pings");
    let apps = apps(&lab);
    assert!(!apps.iter().any(pings));
    let rules = json!([{"protocol": "icmp", "destination": "10.0.0.1", "type": 8, "code": 0}]);
    let bound = group("icmp", &rules, &["space"]);
    in_force(&lab, SOON, "ping", || bind(&lab, bound), || apps.iter().all(pings));
    in_force(&lab, SOON, "no ping", || unbind(&lab, "icmp"), || !apps.iter().any(pings));
    quiet(&lab, &[]);
}

#[test]
fn cats_dynamic_groups_as_a_default_for_all_spaces() {
    let lab = polled("cats-dynamic");
    let apps = apps(&lab);
    let elsewhere = with(instance("elsewhere", "other"), &[("space_id", "another space")]);
    let elsewhere = added(&lab.cells[1], &elsewhere);
    let _controller = Ear::at(&lab.underlay, CONTROLLER);
    let everybody =
        || all(&apps, CONTROLLER, Fate::Open) && tcp(&elsewhere.place, WORLD, CONTROLLER) == Fate::Open;
    let rules = json!([tcp_rule("10.0.0.0/16", "9024")]);
    let bound = SecurityGroup { running_default: true, ..group("default", &rules, &[]) };
    in_force(&lab, SOON, "default", || bind(&lab, bound), everybody);
    // Bound to one space instead.
    let to_one = || {
        let change = |group: &mut SecurityGroup| {
            group.running_default = false;
            group.running_space_guids = vec!["space".into()];
        };
        assert!(server(&lab).change(|state| state.change_group("default", change)).unwrap());
    };
    in_force(&lab, SOON, "bound to one space", to_one, || {
        tcp(&elsewhere.place, WORLD, CONTROLLER) == Fate::Refused && all(&apps, CONTROLLER, Fate::Open)
    });
    quiet(&lab, &[]);
}

#[test]
fn cats_comma_delimited_destinations() {
    let lab = polled("commas");
    let apps = apps(&lab);
    let _controller = Ear::at(&lab.underlay, CONTROLLER);
    let rules = json!([tcp_rule("192.168.0.0/16,10.0.0.0/8,172.16.0.0/12", "9024")]);
    let bound = group("private", &rules, &["space"]);
    in_force(&lab, SOON, "bind", || bind(&lab, bound), || all(&apps, CONTROLLER, Fate::Open));
    // The first and the last of the list count as the one in the middle does: let out, and nobody is there.
    let quiet_place = Ipv4Addr::new(192, 168, 7, 7);
    assert_ne!(tcp(&apps[0].place, quiet_place, CONTROLLER + 1), Fate::Open);
    assert!(all(&apps, CONTROLLER + 1, Fate::Refused));
    in_force(&lab, SOON, "unbind", || unbind(&lab, "private"), || all(&apps, CONTROLLER, Fate::Refused));
    quiet(&lab, &[]);
}

#[test]
fn cats_staging_has_the_groups_of_staging() {
    let lab = polled("staging");
    let staging = with(instance("stages", "app"), &[("container_workload", "staging")]);
    let staging = added(&lab.cells[0], &staging);
    let running = added(&lab.cells[0], &instance("runs", "app"));
    let _ears = [80, CONTROLLER].map(|port| Ear::at(&lab.underlay, port));
    let seen = |of: &Container| [80, CONTROLLER].map(|port| tcp(&of.place, WORLD, port));
    let none = [Fate::Refused; 2];
    assert_eq!((seen(&staging), seen(&running)), (none, none));
    let external = json!([tcp_rule("10.0.0.1", "80")]);
    let internal = json!([tcp_rule("10.0.0.1", "9024")]);
    let create = || {
        bind(&lab, SecurityGroup { staging_default: true, ..group("external", &external, &[]) });
        bind(&lab, group("internal", &internal, &["space"]));
    };
    in_force(&lab, SOON, "both", create, || {
        seen(&staging) == [Fate::Open, Fate::Refused] && seen(&running) == [Fate::Refused, Fate::Open]
    });
    let swap = |group: &mut SecurityGroup| {
        group.staging_space_guids = std::mem::take(&mut group.running_space_guids);
    };
    let to_staging = || assert!(server(&lab).change(|state| state.change_group("internal", swap)).unwrap());
    in_force(&lab, SOON, "bound to staging", to_staging, || {
        seen(&staging) == [Fate::Open; 2] && seen(&running) == none
    });
    quiet(&lab, &[]);
}
