//! What is wrong with silk's policy agent, one by one, and not with this one. docs/suites.md has the list, and where those
//! are tested that are not here.

use std::net::Ipv4Addr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::Duration;

use serde_json::{Value, json};
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::lab::Cell;
use weft_testbed::policy_server::{Fault, Policy, Route, SecurityGroup};
use weft_testbed::{Lab, prober};

use crate::world::{
    AWAY, Ear, Fate, PATIENCE, SOON, WORLD, added, allow, begin, bind, forbid, group, in_force, instance,
    opens, polled, polled_with, quiet, server, tcp, tcp_rule, unbind, wait_for, with,
};

const HTTP: u16 = 8080;
/// What the node says of what it leaves out of an answer.
const LEFT_OUT: &str = "left out of the policy server's answer";

/// A client and a server that it may reach by policies, on one cell and across two.
fn pairs(lab: &Lab) -> (Container, [Container; 2]) {
    let client = added(&lab.cells[0], &instance("client", "client"));
    let servers = [0, 1].map(|n| added(&lab.cells[n], &instance(&format!("server-{n}"), "server")));
    for (cell, server) in lab.cells.iter().zip(&servers) {
        cell.serve(server).unwrap();
    }
    (client, servers)
}

/// Our table, in an order of its own: without what counts, and without the guard's chain, which follows iptables.
fn table(cell: &Cell) -> Vec<String> {
    let text = cell.place.run("nft", &["-s", "list", "table", "inet", "weft"], "").unwrap();
    let mut words: Vec<String> = text.split_whitespace().map(str::to_owned).collect();
    words.sort();
    words
}

#[test]
fn defect_1_an_update_whose_fetch_failed_is_not_lost() {
    let lab = polled("defect-1");
    let (client, servers) = pairs(&lab);
    let (policy, routes) = (Policy::tcp("client", "server", HTTP), [Route::Policies, Route::SecurityGroups]);
    let _world = Ear::at(&lab.underlay, 80);
    for route in routes {
        server(&lab).set_fault(route, Fault::Error);
    }
    let failed = routes.map(|route| server(&lab).asked(route));
    allow(&lab, &[policy]);
    bind(&lab, group("world", &json!([tcp_rule("10.0.0.1", "80")]), &["space"]));
    // The stamps are right, and are asked for; what they announce cannot be fetched, twice on each cell.
    let asked = || routes.iter().zip(failed).all(|(route, before)| server(&lab).asked(*route) >= before + 4);
    wait_for("polls that fail", asked);
    let open = || servers.iter().all(|server| opens(&client, server, HTTP));
    assert!(!open() && tcp(&client.place, WORLD, 80) == Fate::Refused);
    let recover = || server(&lab).set_fault_everywhere(None);
    in_force(&lab, SOON, "after recovery", recover, || open() && tcp(&client.place, WORLD, 80) == Fate::Open);
    quiet(&lab, &[AWAY]);
}

#[test]
fn defect_2_a_clock_that_goes_backwards_hides_nothing() {
    let lab = polled("defect-2");
    let (client, servers) = pairs(&lab);
    let _world = Ear::at(&lab.underlay, 80);
    let policy = [Policy::tcp("client", "server", HTTP)];
    allow(&lab, &policy);
    bind(&lab, group("world", &json!([tcp_rule("10.0.0.1", "80")]), &["space"]));
    let are = |fate: Fate| {
        servers.iter().all(|server| tcp(&client.place, server.addr, HTTP) == fate)
            && tcp(&client.place, WORLD, 80) == fate
    };
    wait_for("both", || are(Fate::Open));
    // As after a fail-over, or a restored backup.
    let back = Duration::from_secs(3600);
    server(&lab).change(|state| state.set_clock_back(back)).unwrap();
    let end = || {
        forbid(&lab, &policy);
        unbind(&lab, "world");
    };
    in_force(&lab, SOON, "deleted an hour ago", end, || are(Fate::Refused));
    quiet(&lab, &[]);
}

/// A default group with everything that makes silk's planning fail, beside one that is as it should be.
#[test]
fn defect_3_one_bad_rule_is_left_out_alone() {
    let lab = polled("defect-3");
    let before = added(&lab.cells[0], &instance("before", "app"));
    let _world: Vec<Ear> = [80, 81, 82, 83].map(|port| Ear::at(&lab.underlay, port)).into();
    bind(&lab, group("good", &json!([tcp_rule("10.0.0.1", "80")]), &["space"]));
    let fates = |of: &Container| [80, 81, 82, 83].map(|port| tcp(&of.place, WORLD, port) == Fate::Open);
    wait_for("the good group", || fates(&before) == [true, false, false, false]);
    let rules = json!([
        tcp_rule("10.0.0.1, 10.0.0.2", "81"),
        tcp_rule("010.000.000.001", "82"),
        tcp_rule("2001:db8::1", "443"),
        tcp_rule("not an address", "443"),
        {"protocol": "gre", "destination": "0.0.0.0/0"},
        {"protocol": "tcp", "destination": "10.0.0.1"},
        tcp_rule("10.0.0.1", "one, 83"),
    ]);
    let no_rules = SecurityGroup { running_default: true, ..SecurityGroup::named("no rules", "{nonsense") };
    let worst = || {
        bind(&lab, no_rules);
        bind(&lab, SecurityGroup { running_default: true, ..group("bad", &rules, &[]) });
    };
    // What can be meant counts, and what counted before counts still.
    in_force(&lab, SOON, "the bad group's good rules", worst, || fates(&before) == [true; 4]);
    let after = added(&lab.cells[0], &instance("after", "app"));
    assert_eq!(fates(&after), [true; 4], "and a new container has them too");
    let end = || unbind(&lab, "bad");
    let healed = || [&before, &after].iter().all(|of| fates(of) == [true, false, false, false]);
    in_force(&lab, SOON, "without it", end, healed);
    assert!(!lab.complaints(&[]).is_empty(), "each is named");
    quiet(&lab, &[LEFT_OUT]);
}

#[test]
fn defect_4_a_handle_that_comes_again_has_its_groups_and_nothing_is_left_behind() {
    let lab = polled("defect-4");
    let cell = &lab.cells[0];
    let _world = Ear::at(&lab.underlay, 80);
    let stays = added(cell, &instance("stays", "app"));
    bind(&lab, group("world", &json!([tcp_rule("10.0.0.1", "80")]), &["space"]));
    wait_for("the group", || tcp(&stays.place, WORLD, 80) == Fate::Open);
    // Their own settings and groups.
    let own = |n: u16| {
        let ports = json!([{"start": 9000 + n, "end": 9000 + n}]);
        let rules =
            json!([{"protocol": 1, "networks": [{"start": "10.9.9.9", "end": "10.9.9.9"}], "ports": ports}]);
        let request = with(instance("again", "again"), &[("space_id", "another space")]);
        Request { net_out_rules: rules, ..request }
    };
    bind(
        &lab,
        group("another", &json!([tcp_rule("10.0.0.1", "80"), tcp_rule("10.0.0.7", "7")]), &["another space"]),
    );
    let before = table(cell);
    for n in 0..3 {
        let again = added(cell, &own(n));
        wait_for("its group", || tcp(&again.place, WORLD, 80) == Fate::Open);
        cell.del("again").unwrap();
        wait_for("the table as it was", || table(cell) == before);
    }
    quiet(&lab, &[]);
}

#[test]
fn defect_5_metadata_that_cannot_be_read_spoils_nothing() {
    let lab = polled("defect-5");
    let nonsense =
        [("log_config", "{not json"), ("ports", "eighty, -1, 99999999"), ("container_workload", "\u{0}?")];
    let mut odd = with(instance("odd", "client"), &nonsense);
    odd.properties.insert("app_id".into(), json!(["not", "a", "text"]));
    odd.properties.insert("unheard of".into(), json!({"a": 1}));
    let odd = added(&lab.cells[0], &odd);
    let (client, servers) = pairs(&lab);
    let late = added(&lab.cells[1], &with(instance("late", "client"), &nonsense));
    let policy = [Policy::tcp("client", "server", HTTP)];
    let open = || [&odd, &client, &late].iter().all(|from| servers.iter().all(|to| opens(from, to, HTTP)));
    in_force(&lab, SOON, "policies of all", || allow(&lab, &policy), open);
    quiet(&lab, &[]);
}

#[test]
fn defect_6_without_a_server_nodes_start_and_containers_too() {
    let lab = polled("defect-6");
    let cell = &lab.cells[0];
    let _world = Ear::at(&lab.underlay, 80);
    server(&lab).stop();
    cell.stop_node().unwrap();
    // As on a new cell.
    for file in ["policies.json", "security-groups.json"] {
        drop(std::fs::remove_file(cell.directory.join("state").join(file)));
    }
    cell.start_node().unwrap();
    cell.wait_ready(1, PATIENCE).unwrap();
    let ports = json!([{"start": 80, "end": 80}]);
    let passed =
        json!([{"protocol": 1, "networks": [{"start": "10.0.0.1", "end": "10.0.0.1"}], "ports": ports}]);
    let container = added(cell, &Request { net_out_rules: passed, ..instance("new", "new") });
    assert_eq!(tcp(&container.place, WORLD, 80), Fate::Open, "what Garden passed");
    let other = added(cell, &instance("other", "other"));
    let _ear = Ear::at(&other.place, HTTP);
    assert!(!opens(&container, &other, HTTP), "closed for policy");
    quiet(&lab, &[AWAY]);
}

/// A tag is taken from one app and given to another, again and again, on one cell: neither reaches whom only the other
/// may reach, at no moment.
#[test]
fn defect_8_who_is_given_a_freed_tag_is_not_taken_for_who_had_it() {
    let lab = polled_with("defect-8", &json!({"policy_poll_interval_seconds": 0.1}), &json!({}));
    lab.tell_bursts_of_refusals().unwrap();
    let cell = &lab.cells[0];
    let [old, new, olds, news] =
        ["old", "new", "olds", "news"].map(|name| added(cell, &instance(name, name)));
    let _ears = [&olds, &news].map(|to| Ear::at(&to.place, HTTP));
    let (first, second) = ([Policy::tcp("old", "olds", HTTP)], [Policy::tcp("new", "news", HTTP)]);
    let tag = |app: &str| server(&lab).change(|state| state.tag(app)).unwrap();
    let stop = AtomicBool::new(false);
    // A refusal that does not come is not waited for.
    let briefly = Duration::from_millis(20);
    let opens = |from: &Container, to: &Container| {
        from.place.enter(|| begin(to.addr, HTTP, briefly)).unwrap() == Fate::Open
    };
    let never = |from: &Container, to: &Container| {
        from.place.move_thread().unwrap();
        let mut tried = 0_u32;
        while !stop.load(Ordering::Relaxed) {
            assert_ne!(begin(to.addr, HTTP, briefly), Fate::Open, "{} reaches {}", from.handle, to.handle);
            tried += 1;
        }
        tried
    };
    thread::scope(|scope| {
        let forbidden = [scope.spawn(|| never(&new, &olds)), scope.spawn(|| never(&old, &news))];
        for _ in 0..40 {
            allow(&lab, &first);
            let before = tag("old");
            wait_for("the one", || opens(&old, &olds));
            forbid(&lab, &first);
            allow(&lab, &second);
            assert_eq!(tag("new"), before, "given to another at once");
            wait_for("the other", || opens(&new, &news));
            forbid(&lab, &second);
        }
        stop.store(true, Ordering::Relaxed);
        for thread in forbidden {
            assert!(thread.join().unwrap() > 500);
        }
    });
    quiet(&lab, &[]);
}

#[test]
fn defect_9_groups_are_asked_for_in_pages_and_not_again_while_they_stay_the_same() {
    let lab = polled("defect-9");
    let app = added(&lab.cells[0], &instance("app", "app"));
    let _world = Ear::at(&lab.underlay, 80);
    server(&lab)
        .change(|state| {
            for n in 0..5000_u32 {
                let addr = Ipv4Addr::from(0x0aff_0000 + n);
                state.put_group(group(
                    &format!("group-{n}"),
                    &json!([tcp_rule(&addr.to_string(), "7")]),
                    &["space"],
                ));
            }
            // Alone on the second page.
            state.put_group(group("last", &json!([tcp_rule("10.0.0.1", "80")]), &["space"]));
        })
        .unwrap();
    wait_for("the second page", || tcp(&app.place, WORLD, 80) == Fate::Open);
    let query = server(&lab).last_query(Route::SecurityGroups).unwrap();
    assert!(query.contains("limit=5000") && !query.contains("per_page"), "{query}");
    let polls = || server(&lab).asked(Route::SecurityGroupsLastUpdated);
    // The cell without containers of the space has polled as well.
    let settled = polls() + 6;
    wait_for("polls", || polls() >= settled);
    let (lists, until) = (server(&lab).asked(Route::SecurityGroups), polls() + 8);
    wait_for("more polls", || polls() >= until);
    assert_eq!(server(&lab).asked(Route::SecurityGroups), lists, "the stamp says enough");
    quiet(&lab, &[]);
}

#[test]
fn defect_10_icmp_of_one_type_and_any_code() {
    let lab = polled("defect-10");
    let app = added(&lab.cells[0], &instance("app", "app"));
    for (kind, code, passes) in
        [(8, -1, true), (13, -1, false), (-1, -1, true), (0, -1, false), (-1, 0, true)]
    {
        let rules = json!([{"protocol": "icmp", "destination": "10.0.0.1", "type": kind, "code": code}]);
        bind(&lab, group("icmp", &rules, &["space"]));
        let pings = || prober::ping(&app.place, WORLD).is_ok();
        in_force(&lab, SOON, &format!("type {kind}, code {code}"), || (), || pings() == passes);
    }
    quiet(&lab, &[]);
}

/// silk 3.0 to 3.4 could not take such rules away again, and then no app started.
#[test]
fn defect_13_rules_of_any_icmp_come_and_go_with_their_containers() {
    let lab = polled("defect-13");
    let cell = &lab.cells[0];
    let any = json!([{"protocol": "icmp", "destination": "0.0.0.0/0", "type": -1, "code": -1}]);
    let other = json!([{"protocol": "icmp", "destination": "10.0.0.1", "type": 8, "code": -1}]);
    bind(&lab, SecurityGroup { running_default: true, ..group("icmp", &any, &[]) });
    let stays = added(cell, &instance("stays", "app"));
    let pings = |from: &Container| prober::ping(&from.place, WORLD).is_ok();
    wait_for("the group", || pings(&stays));
    let before = table(cell);
    for n in 0..3 {
        let comes = added(cell, &instance("comes", "app"));
        assert!(pings(&comes), "time {n}");
        cell.del("comes").unwrap();
        wait_for("the table as it was", || table(cell) == before);
    }
    // And when their group is another.
    bind(&lab, SecurityGroup { running_default: true, ..group("icmp", &other, &[]) });
    wait_for("the other list", || table(cell) != before);
    assert!(pings(&stays));
    in_force(&lab, SOON, "none", || unbind(&lab, "icmp"), || !pings(&stays));
    assert!(!pings(&added(cell, &instance("last", "app"))));
    quiet(&lab, &[]);
}

/// Handles and GUIDs that begin alike for 28 characters, and one address that two containers have, one after the other.
#[test]
fn defect_16_the_traffic_log_names_containers_whole_and_as_of_the_packet() {
    let mut options = weft_testbed::Options::unique("defect-16").unwrap();
    options.cells = 1;
    // Five addresses, so that one comes back soon.
    options.controller.insert("subnet_prefix_length".into(), 29.into());
    // The limit counts by address, and one comes back within a second here.
    let logged = json!({"iptables_asg_logging": true, "iptables_denied_logs_per_sec": 100});
    options.plugin = crate::world::object(&logged);
    let lab = Lab::up(&options).unwrap();
    let cell = &lab.cells[0];
    let name = |n: u32| format!("bfce786c-ab07-40ad-79f9-8f21bc6f229d-{n}");
    let mut expected = Vec::new();
    for n in 0..11 {
        let container = added(cell, &instance(&name(n), &format!("app-{}", name(n))));
        assert_eq!(tcp(&container.place, WORLD, 81), Fate::Refused);
        // Gone before its line may have been written.
        cell.del(&name(n)).unwrap();
        expected.push((container.addr.to_string(), name(n), format!("app-{}", name(n))));
    }
    let again = expected.iter().filter(|(addr, ..)| *addr == expected[0].0).count();
    assert!(again >= 2, "an address came back: {expected:?}");
    let told = || -> Vec<(String, String, String)> {
        let text = std::fs::read_to_string(cell.traffic_log()).unwrap_or_default();
        let lines = text.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
        let denied = lines.filter(|line| line["message"] == "cfnetworking.iptables.egress-denied");
        denied
            .map(|line| {
                let (packet, source) = (&line["data"]["packet"], &line["data"]["source"]);
                let text = |value: &Value| value.as_str().unwrap().to_owned();
                (text(&packet["src_ip"]), text(&source["container_id"]), text(&source["app_guid"]))
            })
            .collect()
    };
    wait_for("a line for each", || expected.iter().all(|one| told().contains(one)));
    // A refusal that was lost is a packet that came twice.
    assert!(told().iter().all(|one| expected.contains(one)), "{:?}", told());
    quiet(&lab, &[]);
}

/// Also the acceptance tests' row of custom iptables rules: another job's rule lets containers reach the cell.
#[test]
fn defect_17_operators_iptables_rules_count_and_outlive_the_node() {
    let lab = polled("defect-17");
    let cell = &lab.cells[0];
    let app = added(cell, &instance("app", "app"));
    let _job = Ear::at(&cell.place, 8898);
    let seen = || tcp(&app.place, cell.underlay, 8898);
    assert_eq!(seen(), Fate::Refused, "without the rule");
    let iptables = |arguments: &str| {
        let arguments: Vec<&str> = arguments.split(' ').collect();
        cell.place.run("iptables", &[&["-w"], &arguments[..]].concat(), "").unwrap()
    };
    iptables(&format!("-I INPUT 1 -s 10.255.0.0/16 -p tcp -d {} --dport 8898 -j ACCEPT", cell.underlay));
    iptables("-A FORWARD -s 192.0.2.1 -j DROP");
    iptables("-t nat -A PREROUTING -s 192.0.2.1 -j ACCEPT");
    iptables("-t mangle -A OUTPUT -d 192.0.2.1 -j MARK --set-mark 7");
    let theirs = || {
        let all = ["-S", "-t nat -S", "-t mangle -S"].map(iptables).concat();
        all.lines().filter(|line| !line.contains("weft: ")).map(str::to_owned).collect::<Vec<_>>()
    };
    let before = theirs();
    assert_eq!(seen(), Fate::Open, "the rule counts");
    for end in [Cell::stop_node, Cell::kill_node] {
        end(cell).unwrap();
        assert_eq!((seen(), theirs()), (Fate::Open, before.clone()), "without a node");
        let ready = AtomicBool::new(false);
        let all_the_time = || {
            while !ready.load(Ordering::Relaxed) {
                assert_eq!(seen(), Fate::Open, "while the node starts");
            }
        };
        thread::scope(|scope| {
            let stream = scope.spawn(all_the_time);
            let started = cell.start_node().and_then(|()| cell.wait_ready(1, PATIENCE));
            ready.store(true, Ordering::Relaxed);
            stream.join().unwrap();
            started.unwrap();
        });
        let new = added(cell, &instance("new", "new"));
        assert_eq!(tcp(&new.place, cell.underlay, 8898), Fate::Open, "a newly pushed app");
        cell.del("new").unwrap();
        assert_eq!((seen(), theirs()), (Fate::Open, before.clone()));
    }
    iptables(&format!("-D INPUT -s 10.255.0.0/16 -p tcp -d {} --dport 8898 -j ACCEPT", cell.underlay));
    assert_eq!(seen(), Fate::Refused);
    quiet(&lab, &["controller lost"]);
}
