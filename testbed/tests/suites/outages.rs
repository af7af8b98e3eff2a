//! The policy server down, slow, lying, or gone for days: no packet's fate changes, containers start and stop, the age of
//! what is known is told, and recovery needs no restart.

use std::collections::BTreeMap;
use std::fs;
use std::net::Ipv4Addr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_testbed::Lab;
use weft_testbed::external_networker::{Container, Request};
use weft_testbed::lab::Cell;
use weft_testbed::netns::Place;
use weft_testbed::policy_server::{Fault, Policy, Route};

use crate::world::{
    AWAY, Ear, Fate, PATIENCE, WORLD, added, allow, begin, bind, forbid, group, instance, opens, polled,
    quiet, server, tcp, tcp_rule, wait_for,
};

const HTTP: u16 = 8080;
const OPEN: u16 = 80;
const CLOSED: u16 = 81;

/// Connections at a steady pace, whose fate is to stay the same.
struct Probe {
    stop: Arc<AtomicBool>,
    made: Arc<AtomicUsize>,
    thread: JoinHandle<BTreeMap<String, usize>>,
}

impl Probe {
    fn of(place: &Place, addr: Ipv4Addr, port: u16, expected: Fate) -> Self {
        let (stop, made) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicUsize::new(0)));
        let (stopped, counted, place) = (Arc::clone(&stop), Arc::clone(&made), place.clone());
        let thread = thread::spawn(move || {
            place.move_thread().unwrap();
            let mut others = BTreeMap::new();
            while !stopped.load(Ordering::Relaxed) {
                let fate = begin(addr, port, Duration::from_secs(10));
                if fate != expected {
                    *others.entry(format!("{addr}:{port} {fate:?}")).or_default() += 1;
                }
                counted.fetch_add(1, Ordering::Relaxed);
                thread::sleep(Duration::from_millis(20));
            }
            others
        });
        Self { stop, made, thread }
    }
}

/// Allowed and forbidden pairs on one cell and across two, and to the world.
struct Scene {
    lab: Lab,
    a: Container,
    b: Container,
    c: Container,
    _ears: Vec<Ear>,
}

impl Scene {
    fn new(purpose: &str) -> Self {
        let lab = polled(purpose);
        let [a, b] = ["a", "b"].map(|name| added(&lab.cells[0], &instance(name, name)));
        let c = added(&lab.cells[1], &instance("c", "c"));
        let mut ears: Vec<Ear> = [&a, &b, &c].map(|app| Ear::at(&app.place, HTTP)).into();
        ears.extend([OPEN, CLOSED].map(|port| Ear::at(&lab.underlay, port)));
        allow(&lab, &[Policy::tcp("a", "b", HTTP), Policy::tcp("a", "c", HTTP), Policy::tcp("c", "b", HTTP)]);
        bind(&lab, group("world", &json!([tcp_rule("10.0.0.1", "80")]), &["space"]));
        let scene = Self { lab, a, b, c, _ears: ears };
        let expected = scene.expected();
        let as_expected =
            || expected.iter().all(|(from, addr, port, fate)| tcp(&from.place, *addr, *port) == *fate);
        wait_for("policies and groups", as_expected);
        scene
    }

    fn expected(&self) -> Vec<(&Container, Ipv4Addr, u16, Fate)> {
        let (a, b, c) = (&self.a, &self.b, &self.c);
        vec![
            (a, b.addr, HTTP, Fate::Open),
            (a, c.addr, HTTP, Fate::Open),
            (c, b.addr, HTTP, Fate::Open),
            (b, a.addr, HTTP, Fate::Refused),
            (b, c.addr, HTTP, Fate::Refused),
            (c, a.addr, HTTP, Fate::Refused),
            (a, WORLD, OPEN, Fate::Open),
            (c, WORLD, CLOSED, Fate::Refused),
        ]
    }

    /// While `work` goes on, every connection fares as ever.
    fn steadily(&self, work: impl FnOnce()) {
        let probes: Vec<Probe> = self
            .expected()
            .into_iter()
            .map(|(from, addr, port, fate)| Probe::of(&from.place, addr, port, fate))
            .collect();
        work();
        for probe in probes {
            let seen = probe.made.load(Ordering::Relaxed);
            wait_for("some more connections", || probe.made.load(Ordering::Relaxed) > seen + 2);
            probe.stop.store(true, Ordering::Relaxed);
            assert_eq!(probe.thread.join().unwrap(), BTreeMap::new());
        }
    }

    /// A container comes, of an app that the cell has and of one that it has not; and both go.
    fn come_and_go(&self, name: &str) {
        let cell = &self.lab.cells[0];
        let known = added(cell, &Request { handle: format!("known-{name}"), ..instance("-", "a") });
        assert!(opens(&known, &self.b, HTTP) && tcp(&known.place, WORLD, OPEN) == Fate::Open);
        let new = added(cell, &instance(&format!("new-{name}"), &format!("new-{name}")));
        assert!(!opens(&new, &self.b, HTTP), "an unknown app reaches nobody");
        for container in [known, new] {
            cell.del(&container.handle).unwrap();
        }
    }

    /// What is new at the server is followed.
    fn recovers(&self, name: &str) {
        let policy = [Policy::tcp(&format!("elsewhere-{name}"), "b", HTTP), Policy::tcp("b", "a", HTTP)];
        allow(&self.lab, &policy);
        wait_for("a new policy", || opens(&self.b, &self.a, HTTP));
        forbid(&self.lab, &policy);
        wait_for("its end", || !opens(&self.b, &self.a, HTTP));
    }
}

fn ages(cell: &Cell) -> [u64; 2] {
    let status = cell.status().unwrap();
    ["policies_age_seconds", "security_groups_age_seconds"]
        .map(|age| status["policy_server"][age].as_u64().unwrap_or_else(|| panic!("{status}")))
}

fn trouble(cell: &Cell) -> String {
    cell.status().unwrap()["policy_server"]["trouble"].as_str().unwrap().to_owned()
}

/// Until the failure shows, and is as old as is asked for.
fn grows_old(cell: &Cell, seconds: u64, says: &str) {
    wait_for("what is known to grow old", || ages(cell).iter().all(|age| *age >= seconds));
    let trouble = trouble(cell);
    assert!(trouble.contains(says), "{trouble}");
}

/// Both: where one has not failed yet, it is old without a word, until its own question ends.
fn fresh_again(cell: &Cell) {
    wait_for("what is known to be fresh, and no trouble", || {
        trouble(cell).is_empty() && ages(cell).iter().all(|age| *age <= 2)
    });
}

fn lying(name: &str, faults: &[(Fault, &str)]) {
    let scene = Scene::new(name);
    let cell = &scene.lab.cells[0];
    for (n, (fault, says)) in faults.iter().enumerate() {
        scene.steadily(|| {
            server(&scene.lab).set_fault_everywhere(*fault);
            grows_old(cell, 2, says);
            scene.come_and_go(&n.to_string());
            server(&scene.lab).set_fault_everywhere(None);
            fresh_again(cell);
        });
        scene.recovers(&n.to_string());
    }
    quiet(&scene.lab, &[AWAY]);
}

#[test]
fn a_server_that_is_down_changes_no_packets_fate() {
    let scene = Scene::new("down");
    let cell = &scene.lab.cells[0];
    scene.steadily(|| {
        server(&scene.lab).stop();
        grows_old(cell, 2, "connect");
        scene.come_and_go("down");
        server(&scene.lab).start().unwrap();
        fresh_again(cell);
    });
    scene.recovers("down");
    quiet(&scene.lab, &[AWAY]);
}

/// Each answer takes 30 s: longer than it is waited for.
#[test]
fn a_server_that_is_slow_changes_no_packets_fate() {
    let scene = Scene::new("slow");
    let cell = &scene.lab.cells[0];
    scene.steadily(|| {
        server(&scene.lab).set_fault_everywhere(Fault::Slow(Duration::from_secs(30)));
        // No ADD waits for what is slow.
        let before = Instant::now();
        scene.come_and_go("slow");
        assert!(before.elapsed() < Duration::from_secs(5), "{:?}", before.elapsed());
        wait_for("the failure to show", || !trouble(cell).is_empty());
        grows_old(cell, 5, "no answer within");
        server(&scene.lab).set_fault_everywhere(None);
        fresh_again(cell);
    });
    scene.recovers("slow");
    quiet(&scene.lab, &[AWAY]);
}

#[test]
fn a_server_that_talks_nonsense_changes_no_packets_fate() {
    lying("nonsense", &[(Fault::Garbage, ""), (Fault::Truncated, "HTTP"), (Fault::DropInHeaders, "HTTP")]);
}

#[test]
fn a_server_that_fails_with_empty_lists_changes_no_packets_fate() {
    lying("empty", &[(Fault::EmptyError, "500"), (Fault::Error, "500")]);
}

/// Its stamps are right, and all else is nonsense: nothing counts as done.
#[test]
fn a_server_whose_lists_alone_are_nonsense_changes_no_packets_fate() {
    let scene = Scene::new("half");
    scene.steadily(|| {
        for route in [Route::Policies, Route::SecurityGroups] {
            server(&scene.lab).set_fault(route, Fault::Garbage);
        }
        // Stamps differ, so that the lists are asked for.
        allow(&scene.lab, &[Policy::tcp("elsewhere", "b", HTTP)]);
        bind(&scene.lab, group("elsewhere", &json!([]), &["space"]));
        grows_old(&scene.lab.cells[0], 2, "");
        server(&scene.lab).set_fault_everywhere(None);
        fresh_again(&scene.lab.cells[0]);
    });
    scene.recovers("half");
    quiet(&scene.lab, &[AWAY]);
}

#[test]
fn a_server_whose_clock_goes_backwards_changes_no_packets_fate() {
    let scene = Scene::new("backwards");
    scene.steadily(|| {
        for (n, hours) in [1, 24, 2].into_iter().enumerate() {
            let behind = Duration::from_secs(hours * 3600);
            server(&scene.lab).change(|state| state.set_clock_back(behind)).unwrap();
            // A change moves the stamps, to the past.
            allow(&scene.lab, &[Policy::tcp(&format!("elsewhere-{n}"), "b", HTTP)]);
            bind(&scene.lab, group("elsewhere", &json!([]), &["space"]));
            let asked = server(&scene.lab).asked(Route::PoliciesLastUpdated);
            wait_for("two polls", || server(&scene.lab).asked(Route::PoliciesLastUpdated) >= asked + 4);
        }
    });
    scene.recovers("backwards");
    quiet(&scene.lab, &[]);
}

/// Nodes that start again meanwhile work from what they last heard, however long ago that was.
#[test]
fn a_server_that_is_gone_for_days_changes_no_packets_fate() {
    const DAYS: u64 = 3 * 24 * 3600;
    let scene = Scene::new("days");
    scene.steadily(|| {
        server(&scene.lab).stop();
        for cell in &scene.lab.cells {
            cell.stop_node().unwrap();
            for file in ["policies.json", "security-groups.json"] {
                let file = cell.directory.join("state").join(file);
                let mut saved: Value = serde_json::from_slice(&fs::read(&file).unwrap()).unwrap();
                saved["at"] = (saved["at"].as_u64().unwrap() - DAYS).into();
                fs::write(&file, saved.to_string()).unwrap();
            }
            cell.start_node().unwrap();
        }
        for cell in &scene.lab.cells {
            cell.wait_ready(1, PATIENCE).unwrap();
        }
        // A start is the moment at which least is known.
        for _ in 0..5 {
            for cell in &scene.lab.cells {
                cell.kill_node().unwrap();
                cell.start_node().unwrap();
                cell.wait_ready(1, PATIENCE).unwrap();
            }
        }
        for cell in &scene.lab.cells {
            wait_for("the failure to show", || !trouble(cell).is_empty());
            let ages = ages(cell);
            assert!(ages.iter().all(|age| *age >= DAYS), "{ages:?}");
        }
        scene.come_and_go("days");
        server(&scene.lab).start().unwrap();
        scene.lab.cells.iter().for_each(fresh_again);
    });
    scene.recovers("days");
    quiet(&scene.lab, &[AWAY, "controller lost"]);
}
