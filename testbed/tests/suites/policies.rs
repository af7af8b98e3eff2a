//! Policies: who may open connections to whom, on one cell and across two.

use std::net::{Ipv4Addr, SocketAddrV4};

use serde_json::json;
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::lab::Cell;
use weft_testbed::policy_server::Policy;
use weft_testbed::{Lab, prober};

use crate::world::{
    Ear, Fate, SOON, WORLD, added, allow, bind, forbid, group, in_force, instance, opens, polled, quiet, tcp,
    tcp_rule, unbind, wait_for, wide_open, with,
};

const HTTP: u16 = 8080;

/// A container that takes connections on some ports.
struct App {
    container: Container,
    _ears: Vec<Ear>,
}

impl App {
    fn on(cell: &Cell, request: &Request, ports: &[u16]) -> Self {
        let container = added(cell, request);
        let ears = ports.iter().map(|port| Ear::at(&container.place, *port)).collect();
        Self { container, _ears: ears }
    }
}

/// Both cells, each with an instance of the destination.
fn on_both(lab: &Lab, name: &str, ports: &[u16]) -> [App; 2] {
    [0, 1].map(|n| App::on(&lab.cells[n], &instance(&format!("{name}-{n}"), name), ports))
}

fn all_open(from: &[&Container], to: &[App], ports: &[u16]) -> bool {
    each(from, to, ports).into_iter().all(|open| open)
}

fn none_open(from: &[&Container], to: &[App], ports: &[u16]) -> bool {
    each(from, to, ports).into_iter().all(|open| !open)
}

fn each(from: &[&Container], to: &[App], ports: &[u16]) -> Vec<bool> {
    let mut found = Vec::new();
    for from in from {
        for app in to {
            found.extend(ports.iter().map(|port| opens(from, &app.container, *port)));
        }
    }
    found
}

#[test]
fn smoke_the_user_configures_a_policy_and_deletes_it() {
    let lab = polled("smoke");
    let mapped = json!([{"host_port": 61000, "container_port": HTTP}]);
    let request = Request { port_mappings: mapped, ..instance("proxy", "proxy") };
    let proxy = App::on(&lab.cells[0], &request, &[HTTP]);
    let smoke = on_both(&lab, "smoke", &[HTTP]);
    let from = [&proxy.container];
    let router = || tcp(&lab.underlay, lab.cells[0].underlay, 61000);
    assert_eq!(router(), Fate::Open, "the router reaches the proxy");
    assert!(none_open(&from, &smoke, &[HTTP]));
    let policy = [Policy::tcp("proxy", "smoke", HTTP)];
    in_force(&lab, SOON, "create", || allow(&lab, &policy), || all_open(&from, &smoke, &[HTTP]));
    assert!(!opens(&smoke[0].container, &proxy.container, HTTP), "not the other way");
    in_force(&lab, SOON, "delete", || forbid(&lab, &policy), || none_open(&from, &smoke, &[HTTP]));
    assert_eq!(router(), Fate::Open);
    quiet(&lab, &[]);
}

#[test]
fn acceptance_whitelist_of_proxies_and_ticks_on_many_ports() {
    let lab = polled("whitelist");
    lab.tell_bursts_of_refusals().unwrap();
    let ports = [HTTP, 7000, 7001];
    let proxies = on_both(&lab, "proxy", &[]);
    let proxies: Vec<&Container> = proxies.iter().map(|app| &app.container).collect();
    let mut ticks: Vec<App> = ["tick-a", "tick-b"].iter().flat_map(|n| on_both(&lab, n, &ports)).collect();
    let _registry = Ear::at(&lab.underlay, 8761);
    bind(&lab, group("registry", &json!([tcp_rule("10.0.0.1", "8761")]), &["space"]));
    assert!(none_open(&proxies, &ticks, &ports));
    let policies: Vec<Policy> = ["tick-a", "tick-b"]
        .iter()
        .flat_map(|tick| ports.map(|port| Policy::tcp("proxy", tick, port)))
        .collect();
    let create = || allow(&lab, &policies);
    in_force(&lab, SOON, "all policies at once", create, || all_open(&proxies, &ticks, &ports));

    // Scaled up and down, and up again: a new instance is reached, and reaches the registry.
    let known = App::on(&lab.cells[1], &instance("tick-a-2", "tick-a"), &ports);
    assert!(all_open(&proxies, &[known], &ports), "the cell knows the app's policies");
    lab.cells[1].del("tick-a-2").unwrap();
    ticks.push(App::on(&lab.cells[0], &instance("tick-a-3", "tick-a"), &ports));
    assert!(all_open(&proxies, &ticks, &ports));
    let registers = |app: &App| tcp(&app.container.place, WORLD, 8761) == Fate::Open;
    wait_for("the registry's group", || ticks.iter().all(registers));

    in_force(&lab, SOON, "all gone", || forbid(&lab, &policies), || none_open(&proxies, &ticks, &ports));
    quiet(&lab, &[]);
}

#[test]
fn acceptance_a_wide_open_group_does_not_open_the_overlay() {
    let lab = polled("wide-open");
    let client = added(&lab.cells[0], &instance("client", "client"));
    let servers = on_both(&lab, "server", &[HTTP]);
    let _world = Ear::at(&lab.underlay, 80);
    bind(&lab, group("open", &wide_open(), &["space"]));
    wait_for("the group", || tcp(&client.place, WORLD, 80) == Fate::Open);
    assert!(none_open(&[&client], &servers, &[HTTP]), "on its own cell and on the other");
    quiet(&lab, &[]);
}

#[test]
fn acceptance_a_wide_open_group_and_a_policy() {
    let lab = polled("open-policy");
    let client = added(&lab.cells[0], &instance("client", "client"));
    let servers = on_both(&lab, "server", &[HTTP]);
    bind(&lab, group("open", &wide_open(), &["space"]));
    let policy = [Policy::tcp("client", "server", HTTP)];
    let create = || allow(&lab, &policy);
    in_force(&lab, SOON, "the policy", create, || all_open(&[&client], &servers, &[HTTP]));
    quiet(&lab, &[]);
}

#[test]
fn acceptance_a_policy_does_not_open_egress() {
    let lab = polled("egress");
    let mapped = json!([{"host_port": 61000, "container_port": 7777}]);
    let request = Request { port_mappings: mapped, ..instance("own-0", "own") };
    let first = App::on(&lab.cells[0], &request, &[7777]);
    let second = App::on(&lab.cells[1], &instance("own-1", "own"), &[7777]);
    let router = Ear::at(&lab.underlay, 80);
    let own = [Policy::tcp("own", "own", 7777)];
    // Another instance of itself, on the other cell; and on its own.
    let third = App::on(&lab.cells[0], &instance("own-2", "own"), &[7777]);
    let apps = [second, third];
    let create = || allow(&lab, &own);
    in_force(&lab, SOON, "a policy to itself", create, || all_open(&[&first.container], &apps, &[7777]));
    for app in [&first, &apps[0], &apps[1]] {
        assert_eq!(tcp(&app.container.place, WORLD, 80), Fate::Refused);
    }
    assert_eq!(
        tcp(&apps[0].container.place, lab.cells[0].underlay, 61000),
        Fate::Refused,
        "by a mapped port"
    );
    assert_eq!(router.taken(), 0);
    quiet(&lab, &[]);
}

#[test]
fn acceptance_c2c_packets_keep_their_source() {
    let lab = polled("source-ip");
    let client = added(&lab.cells[0], &instance("client", "client"));
    let servers = [0, 1].map(|n| added(&lab.cells[n], &instance(&format!("server-{n}"), "server")));
    for (cell, server) in lab.cells.iter().zip(&servers) {
        cell.serve(server).unwrap();
    }
    bind(&lab, group("open", &wide_open(), &["space"]));
    let create = || allow(&lab, &[Policy::tcp("client", "server", HTTP)]);
    let open = || servers.iter().all(|server| opens(&client, server, HTTP));
    in_force(&lab, SOON, "the policy", create, open);
    for server in &servers {
        let seen = prober::tcp(&client.place, SocketAddrV4::new(server.addr, HTTP)).unwrap();
        assert_eq!(seen.source, client.addr);
    }
    quiet(&lab, &[]);
}

#[test]
fn acceptance_a_task_has_its_apps_policies() {
    let lab = polled("task");
    let servers = on_both(&lab, "server", &[HTTP]);
    allow(&lab, &[Policy::tcp("app", "server", HTTP)]);
    let app = added(&lab.cells[0], &instance("app", "app"));
    wait_for("the policy", || all_open(&[&app], &servers, &[HTTP]));
    // Its own handle, another id; the app's policies count, from its first moment.
    let task = with(instance("task", "app"), &[("app_id", "task"), ("container_workload", "task")]);
    let task = added(&lab.cells[0], &task);
    assert!(all_open(&[&task], &servers, &[HTTP]));
    quiet(&lab, &[]);
}

/// CATs tasks: what counts for apps counts for tasks, groups included.
#[test]
fn cats_tasks_have_policies_and_groups_of_apps() {
    let lab = polled("cats-task");
    let _world = Ear::at(&lab.underlay, 80);
    let servers = on_both(&lab, "server", &[HTTP]);
    let task = with(instance("task", "app"), &[("container_workload", "task")]);
    let task = added(&lab.cells[1], &task);
    assert_eq!(tcp(&task.place, WORLD, 80), Fate::Refused);
    let create = || {
        allow(&lab, &[Policy::tcp("app", "server", HTTP)]);
        bind(&lab, group("world", &json!([tcp_rule("10.0.0.1", "80")]), &["space"]));
    };
    in_force(&lab, SOON, "a policy and a group", create, || {
        all_open(&[&task], &servers, &[HTTP]) && tcp(&task.place, WORLD, 80) == Fate::Open
    });
    quiet(&lab, &[]);
}

#[test]
fn cats_service_discovery_over_http_and_tls_ports() {
    let lab = polled("internal");
    let client = added(&lab.cells[0], &instance("client", "client"));
    let servers = on_both(&lab, "server", &[HTTP, 61443, 61444]);
    let policies = [HTTP, 61443].map(|port| Policy::tcp("client", "server", port));
    let create = || allow(&lab, &policies);
    in_force(&lab, SOON, "both ports", create, || all_open(&[&client], &servers, &[HTTP, 61443]));
    assert!(none_open(&[&client], &servers, &[61444]));
    quiet(&lab, &[]);
}

#[test]
fn acceptance_stale_policies_are_cleaned_up() {
    let lab = polled("stale");
    let client = added(&lab.cells[0], &instance("client", "client"));
    let servers = on_both(&lab, "server", &[HTTP]);
    let kept = [Policy::tcp("client", "server", HTTP)];
    let stale: Vec<Policy> = (0..50).map(|n| Policy::tcp(&format!("gone-{n}"), "server", HTTP)).collect();
    allow(&lab, &stale);
    allow(&lab, &kept);
    wait_for("the policy", || all_open(&[&client], &servers, &[HTTP]));
    // Whoever takes away those of apps that are no more takes away no others.
    forbid(&lab, &stale);
    std::thread::sleep(SOON);
    assert!(all_open(&[&client], &servers, &[HTTP]));
    quiet(&lab, &[]);
}

/// Apps × apps × ports, among many policies of apps elsewhere: sampled connections fail, succeed, fail.
#[test]
fn scaling_many_policies_come_and_go_as_a_whole() {
    let lab = polled("scaling");
    let ports = [HTTP, 7000, 7001];
    let names = ["a", "b", "c"];
    let apps: Vec<App> = names.iter().flat_map(|name| on_both(&lab, name, &ports)).collect();
    let containers: Vec<&Container> = apps.iter().map(|app| &app.container).collect();
    let elsewhere: Vec<Policy> = (0..3000)
        .map(|n| Policy::tcp(&format!("elsewhere-{}", n % 300), &format!("elsewhere-{}", n / 10), HTTP))
        .collect();
    allow(&lab, &elsewhere);
    let pairs = || names.iter().flat_map(|from| names.map(|to| (*from, to)));
    let policies: Vec<Policy> =
        pairs().flat_map(|(from, to)| ports.map(|port| Policy::tcp(from, to, port))).collect();
    // Not to itself: its own address never leaves a container.
    let sampled = || {
        containers.iter().enumerate().flat_map(|(n, from)| {
            let others = containers.iter().enumerate().filter(move |(m, _)| *m != n);
            others.map(|(m, to)| opens(from, to, ports[(n + m) % 3])).collect::<Vec<_>>()
        })
    };
    assert!(sampled().all(|open| !open));
    in_force(&lab, SOON, "27 policies", || allow(&lab, &policies), || sampled().all(|open| open));
    in_force(&lab, SOON, "none of them", || forbid(&lab, &policies), || sampled().all(|open| !open));
    quiet(&lab, &[]);
}

/// CATs running security groups: policies and groups know nothing of each other, in all four combinations.
#[test]
fn cats_running_groups_and_policies_are_independent() {
    let lab = polled("cats-running");
    let mapped = json!([{"host_port": 61000, "container_port": HTTP}]);
    let client = added(&lab.cells[0], &instance("client", "client"));
    let request = Request { port_mappings: mapped, ..instance("server", "server") };
    let server = App::on(&lab.cells[1], &request, &[HTTP]);
    let _world = Ear::at(&lab.underlay, 80);
    let nobody = Ipv4Addr::new(10, 0, 9, 9);
    let by_overlay = || tcp(&client.place, server.container.addr, HTTP);
    let by_cell = || tcp(&client.place, lab.cells[1].underlay, 61000);
    let internet = || tcp(&client.place, WORLD, 80);

    // The default group lets out to the internet, which has one address here, and to no private network.
    let mut public = group("public", &json!([tcp_rule("10.0.0.1", "1-65535")]), &[]);
    public.running_default = true;
    in_force(&lab, SOON, "the default group", || bind(&lab, public), || internet() == Fate::Open);
    assert_eq!((by_overlay(), by_cell()), (Fate::Refused, Fate::Refused));
    assert_eq!(tcp(&client.place, nobody, 80), Fate::Refused);

    let open = || bind(&lab, group("open", &wide_open(), &["space"]));
    in_force(&lab, SOON, "a wide-open group", open, || by_cell() == Fate::Open);
    assert_eq!(by_overlay(), Fate::Refused, "the overlay stays as it was");
    assert_eq!(tcp(&client.place, nobody, 80), Fate::Silent, "let out, and nobody is there");

    let policy = [Policy::tcp("client", "server", HTTP)];
    in_force(&lab, SOON, "and a policy", || allow(&lab, &policy), || by_overlay() == Fate::Open);
    in_force(&lab, SOON, "without the group", || unbind(&lab, "open"), || by_cell() == Fate::Refused);
    assert_eq!(by_overlay(), Fate::Open);
    assert_eq!(tcp(&client.place, nobody, 80), Fate::Refused);

    in_force(&lab, SOON, "without the policy", || forbid(&lab, &policy), || by_overlay() == Fate::Refused);
    assert_eq!(internet(), Fate::Open);
    quiet(&lab, &[]);
}
