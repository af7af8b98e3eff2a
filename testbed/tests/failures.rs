//! What breaks, and what does not: programs killed at any moment, controllers away, and calls that cannot succeed.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::Value;
use weft_testbed::external_networker::{Container, Request, said};
use weft_testbed::lab::{Cell, Store};
use weft_testbed::pki::Authority;
use weft_testbed::prober::{self, Transfer};
use weft_testbed::{Lab, Options};

/// A daemon that starts on a busy machine.
const PATIENCE: Duration = Duration::from_secs(30);
/// What controllers and nodes may say when the others are killed.
const AFTER_KILLS: [&str; 2] = ["controller lost", "caller of ADD has gone"];

/// `WEFT_KILLS` in the environment, for long runs.
fn kills() -> usize {
    std::env::var("WEFT_KILLS").map_or(12, |text| text.parse().unwrap())
}

fn lab(purpose: &str, more: impl FnOnce(&mut Options)) -> Lab {
    let mut options = Options::unique(purpose).unwrap();
    options.cells = 2;
    more(&mut options);
    Lab::up(&options).unwrap()
}

fn served(cell: &Cell, handle: &str) -> Container {
    let container = cell.add(&Request::app(handle)).unwrap();
    cell.serve(&container).unwrap();
    container
}

/// Handle and address of every container that the node knows.
fn containers(cell: &Cell) -> BTreeMap<String, String> {
    let status = cell.status().unwrap();
    let list = status["containers"].as_array().unwrap().iter();
    list.map(|c| (c["handle"].as_str().unwrap().to_owned(), c["address"].as_str().unwrap().to_owned()))
        .collect()
}

fn links(cell: &Cell) -> BTreeSet<String> {
    let listed = cell.place.run("ip", &["-o", "link"], "").unwrap();
    let names = listed.lines().filter_map(|line| line.split(": ").nth(1));
    names
        .filter(|name| name.starts_with("s-"))
        .map(|name| name.split('@').next().unwrap().to_owned())
        .collect()
}

/// The code of a CNI error.
fn code(output: &std::process::Output) -> i64 {
    let error: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(output)));
    error["code"].as_i64().unwrap_or_else(|| panic!("{}", said(output)))
}

/// Tells [`churn`] to stop, also when the test has failed.
struct Stop<'a>(&'a AtomicBool);

impl Drop for Stop<'_> {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Relaxed);
    }
}

/// Containers come and go on a cell until told to stop. A call may fail only with "try again later"; then, as Garden
/// does, the container is deleted and the next one is tried.
fn churn(cell: &Cell, stop: &AtomicBool) -> usize {
    let mut done = 0;
    for n in 0.. {
        if stop.load(Ordering::Relaxed) {
            break;
        }
        let handle = format!("churn-{n}");
        cell.create_namespace(&handle).unwrap();
        let added = cell.cni("ADD", &handle, &cell.add_input(&Request::app(&handle)).unwrap()).unwrap();
        assert!(added.status.success() || code(&added) == 11, "ADD {handle}: {}", said(&added));
        let deadline = Instant::now() + PATIENCE;
        loop {
            let deleted = cell.cni("DEL", &handle, &cell.del_input().unwrap()).unwrap();
            if deleted.status.success() {
                break;
            }
            assert_eq!(code(&deleted), 11, "DEL {handle}: {}", said(&deleted));
            assert!(Instant::now() < deadline, "DEL {handle}: {}", said(&deleted));
            thread::sleep(Duration::from_millis(10));
        }
        cell.remove_namespace(&handle).unwrap();
        done += 1;
    }
    done
}

#[test]
fn nodes_and_controllers_killed_at_any_moment_lose_nothing_and_break_no_connection() {
    let undisturbed = lab("control", |_| {});
    let lab = lab("kills", |options| {
        options.controllers = 2;
        options.store = Store::Postgres;
    });
    let [one, two] = lab.cells.as_slice() else { panic!("two cells") };
    let (a, b) = (served(one, "a"), served(two, "b"));
    let (from, to) = (served(&undisturbed.cells[0], "from"), served(&undisturbed.cells[1], "to"));
    let subnets: Vec<Value> = lab.cells.iter().map(|cell| cell.status().unwrap()["subnet"].clone()).collect();
    let (transfer, control) =
        (Transfer::start(&a.place, b.addr).unwrap(), Transfer::start(&from.place, to.addr).unwrap());

    let stop = AtomicBool::new(false);
    thread::scope(|scope| {
        let churned = scope.spawn(|| churn(one, &stop));
        let at_the_end = Stop(&stop);
        for n in 0..kills() {
            // Moments that no schedule of the system knows: 0 to 300 ms into whatever goes on.
            thread::sleep(Duration::from_millis((n as u64 * 137) % 300));
            match n % 4 {
                0 | 2 => {
                    one.kill_node().unwrap();
                    one.start_node().unwrap();
                    one.wait_ready(1, PATIENCE).unwrap();
                }
                1 => {
                    two.kill_node().unwrap();
                    two.start_node().unwrap();
                    two.wait_ready(1, PATIENCE).unwrap();
                }
                _ => {
                    let controller = &lab.controllers[n / 4 % 2];
                    controller.kill().unwrap();
                    controller.start().unwrap();
                    controller.wait_ready(PATIENCE).unwrap();
                }
            }
        }
        drop(at_the_end);
        assert!(churned.join().unwrap() > 0);
    });

    let (passage, control) = (transfer.stop().unwrap(), control.stop().unwrap());
    let limit = Duration::from_secs(1) + control.longest_gap;
    assert!(passage.longest_gap < limit, "{passage:?} beside {control:?}");
    for (cell, subnet) in lab.cells.iter().zip(subnets) {
        assert_eq!(cell.status().unwrap()["subnet"], subnet, "the same lease");
    }
    let expected =
        |container: &Container| BTreeMap::from([(container.handle.clone(), container.addr.to_string())]);
    assert_eq!((containers(one), containers(two)), (expected(&a), expected(&b)), "the same addresses");
    assert_eq!((links(one).len(), links(two).len()), (1, 1), "no link is left over");
    assert!(prober::matrix(&[a, b]).iter().all(prober::Pair::reached));
    assert_eq!(lab.complaints(&AFTER_KILLS), Vec::<String>::new());
}

#[test]
fn without_controllers_a_node_starts_from_its_snapshot_and_adds_containers() {
    let lab = lab("away", |_| {});
    let [one, two] = lab.cells.as_slice() else { panic!("two cells") };
    let (a, b) = (served(one, "a"), served(two, "b"));
    let transfer = Transfer::start(&a.place, b.addr).unwrap();
    lab.controllers[0].kill().unwrap();
    for cell in &lab.cells {
        cell.kill_node().unwrap();
        cell.start_node().unwrap();
        cell.wait_ready(1, PATIENCE).unwrap();
    }
    let c = served(one, "c");
    assert!(prober::matrix(&[a, b, c]).iter().all(prober::Pair::reached));
    transfer.stop().unwrap();
    let status = two.status().unwrap();
    assert_eq!((&status["controller"], &status["lease_state"]), (&Value::from(""), &Value::from("held")));

    lab.controllers[0].start().unwrap();
    let deadline = Instant::now() + PATIENCE;
    while two.status().unwrap()["controller"] == "" {
        assert!(Instant::now() < deadline, "the controller is not followed again");
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(lab.complaints(&AFTER_KILLS), Vec::<String>::new());
}

#[test]
fn a_node_that_never_had_a_lease_says_why_it_cannot_add() {
    let lab = lab("leaseless", |_| {});
    let cell = &lab.cells[0];
    cell.kill_node().unwrap();
    lab.controllers[0].kill().unwrap();
    std::fs::remove_file(cell.directory.join("state/leases.json")).unwrap();
    cell.start_node().unwrap();
    cell.create_namespace("x").unwrap();
    let input = cell.add_input(&Request::app("x")).unwrap();
    let deadline = Instant::now() + PATIENCE;
    // Until it has started and heard that no controller answers.
    let refused = loop {
        let output = cell.cni("ADD", "x", &input).unwrap();
        if said(&output).contains("no controller answers") {
            break output;
        }
        assert!(Instant::now() < deadline, "{}", said(&output));
        thread::sleep(Duration::from_millis(50));
    };
    assert_eq!(code(&refused), 11, "{}", said(&refused));
    assert_eq!(links(cell), BTreeSet::new());
}

/// With certificates that no controller accepts a node goes on from its snapshot, and says what is wrong with which
/// file; once they are mended it follows again, without a restart.
#[test]
fn certificates_that_do_not_fit_are_named_and_cost_no_container() {
    let lab = lab("certificates", |_| {});
    let cell = &lab.cells[0];
    let config: Value = serde_json::from_slice(&std::fs::read(cell.config_file()).unwrap()).unwrap();
    let file = |field: &str| PathBuf::from(config[field].as_str().unwrap());
    let (certificate, key) = (file("certificate_file"), file("key_file"));
    let good = (std::fs::read(&certificate).unwrap(), std::fs::read(&key).unwrap());
    let authority = Authority::new("another").unwrap();
    let strange = authority.node().unwrap();
    let old = authority.expired("weft-node", None).unwrap();
    // With TLS 1.3 a client may lose the alert that says why it is refused; then the controller's log has it.
    let controllers_log = PathBuf::from(&lab.document().controllers[0].log);
    let nodes_log = cell.directory.join("logs/weft-node.log");
    for (identity, file, names) in
        [(strange, &controllers_log, "UnknownIssuer"), (old, &nodes_log, "expired on")]
    {
        std::fs::write(&certificate, &identity.certificate).unwrap();
        std::fs::write(&key, &identity.key).unwrap();
        cell.kill_node().unwrap();
        cell.start_node().unwrap();
        cell.wait_ready(1, PATIENCE).unwrap();
        let log = || std::fs::read_to_string(file).unwrap();
        let deadline = Instant::now() + PATIENCE;
        while !log().contains(names) {
            assert!(Instant::now() < deadline, "{names} is not in {}", file.display());
            thread::sleep(Duration::from_millis(50));
        }
        assert_eq!(cell.status().unwrap()["controller"], "");
        cell.add(&Request::app("c")).unwrap();
        cell.del("c").unwrap();
    }
    std::fs::write(&certificate, good.0).unwrap();
    std::fs::write(&key, good.1).unwrap();
    let deadline = Instant::now() + PATIENCE;
    while cell.status().unwrap()["controller"] == "" {
        assert!(Instant::now() < deadline, "the controller is not followed again");
        thread::sleep(Duration::from_millis(50));
    }
    assert_eq!(lab.complaints(&AFTER_KILLS), Vec::<String>::new());

    // What is no certificate at all is an error at start that names the file.
    std::fs::write(&certificate, "garbage").unwrap();
    cell.kill_node().unwrap();
    cell.start_node().unwrap();
    let error = cell.wait_ready(1, PATIENCE).unwrap_err().to_string();
    assert!(error.contains(certificate.to_str().unwrap()) && error.contains("has ended"), "{error}");
}

/// Each of these is refused with its code and a message that names what is wrong, and changes nothing.
#[test]
fn calls_that_cannot_succeed_say_why_and_change_nothing() {
    let lab = lab("refused", |_| {});
    let cell = &lab.cells[0];
    let there = served(cell, "there");
    let before = (containers(cell), links(cell), cell.status().unwrap()["free_addresses"].clone());
    let unchanged = |what: &str| {
        let deadline = Instant::now() + PATIENCE;
        // An address that was given and taken back rests until its connections are looked for.
        loop {
            let now = (containers(cell), links(cell), cell.status().unwrap()["free_addresses"].clone());
            if now == before {
                break;
            }
            assert!(Instant::now() < deadline, "{what}: {before:?} became {now:?}");
            thread::sleep(Duration::from_millis(20));
        }
    };
    let refuse = |what: &str, environment: &[(&str, String)], input: &str, expected: i64, names: &str| {
        let output = cell.cni_raw(environment, input.as_bytes()).unwrap();
        assert!(!output.status.success(), "{what} succeeded");
        assert_eq!(code(&output), expected, "{what}: {}", said(&output));
        assert!(said(&output).contains(names), "{what} does not name {names}: {}", said(&output));
        unchanged(what);
    };
    let input = cell.add_input(&Request::app("x")).unwrap().to_string();
    let add = |handle: &str| cell.environment("ADD", handle);
    let with = |mut environment: Vec<(&'static str, String)>, name: &str, value: Option<&str>| {
        environment.retain(|(key, _)| *key != name);
        environment.extend(value.map(|value| match name {
            "CNI_NETNS" => ("CNI_NETNS", value.to_owned()),
            "CNI_IFNAME" => ("CNI_IFNAME", value.to_owned()),
            other => panic!("{other}"),
        }));
        environment
    };
    cell.create_namespace("x").unwrap();

    refuse(
        "a namespace that is gone",
        &with(add("x"), "CNI_NETNS", Some("/nonexistent")),
        &input,
        3,
        "/nonexistent",
    );
    refuse(
        "a file that is no namespace",
        &with(add("x"), "CNI_NETNS", Some("/etc/passwd")),
        &input,
        4,
        "/etc/passwd",
    );
    refuse(
        "the cell's own namespace",
        &with(add("x"), "CNI_NETNS", Some("/proc/self/ns/net")),
        &input,
        8,
        "own",
    );
    refuse("a missing variable", &with(add("x"), "CNI_IFNAME", None), &input, 4, "CNI_IFNAME");
    refuse(
        "a bad interface",
        &with(add("x"), "CNI_IFNAME", Some("far-too-long-a-name")),
        &input,
        4,
        "CNI_IFNAME",
    );
    refuse("malformed input", &add("x"), "{\"cniVersion\": ", 6, "line 1");
    refuse("an unknown version", &add("x"), &input.replace("\"1.0.0\"", "\"9.9.9\""), 1, "9.9.9");
    refuse("a container added before", &add("there"), &input, 100, "there");
    let mut large = cell.add_input(&Request::app("x")).unwrap();
    large["mtu"] = 9000.into();
    refuse("an MTU that does not fit", &add("x"), &large.to_string(), 7, "mtu");
    let taken = cell.container_place("x");
    taken.ip("link add eth0 type veth peer name other").unwrap();
    refuse("an interface name that is taken", &add("x"), &input, 102, "eth0");
    assert!(taken.run("ip", &["link", "show", "eth0"], "").is_ok(), "what was there is still there");

    // After all that the next call works, and what is there still works.
    cell.create_namespace("y").unwrap();
    let added = cell.cni("ADD", "y", &cell.add_input(&Request::app("y")).unwrap()).unwrap();
    assert!(added.status.success(), "{}", said(&added));
    prober::ping(&cell.place, there.addr).unwrap();

    cell.kill_node().unwrap();
    let began = Instant::now();
    let away = cell.cni("ADD", "x", &cell.add_input(&Request::app("x")).unwrap()).unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(code(&away), 11, "{}", said(&away));
    cell.start_node().unwrap();
    cell.wait_ready(1, PATIENCE).unwrap();
    // Refusals that an operator should see are warnings; no error is among them.
    let expected = ["container not added", "kernel refused a change"];
    assert_eq!(lab.complaints(&expected), Vec::<String>::new());
}

/// CHECK says nothing while all is well, and names what is damaged.
#[test]
fn check_finds_damage_on_either_end() {
    let lab = lab("check", |_| {});
    let cell = &lab.cells[0];
    let container = cell.add(&Request::app("c")).unwrap();
    cell.check(&container).unwrap();
    let damage = |place: &weft_testbed::netns::Place, batch: &str, names: &str| {
        place.ip(batch).unwrap();
        let found = cell.check(&container).unwrap_err().to_string();
        assert!(found.contains(names), "{batch}: {found}");
    };
    damage(&container.place, "route del default", "default route");
    container
        .place
        .ip("route add default via 169.254.0.1 dev eth0 src ADDR"
            .replace("ADDR", &container.addr.to_string())
            .as_str())
        .unwrap();
    cell.check(&container).unwrap();
    damage(&container.place, "addr flush dev eth0", "address");
    cell.del("c").unwrap();
    cell.create_namespace("c").unwrap();
    let unknown = cell.check(&container).unwrap_err().to_string();
    assert!(unknown.contains("not known"), "{unknown}");
}

/// An address that was freed is the last to be given again.
#[test]
fn addresses_go_round() {
    let lab = lab("round", |_| {});
    let cell = &lab.cells[0];
    let addr = |n: usize| -> Ipv4Addr {
        let container = cell.add(&Request::app(&format!("c{n}"))).unwrap();
        cell.del(&container.handle).unwrap();
        container.addr
    };
    let first: Vec<Ipv4Addr> = (0..20).map(addr).collect();
    assert_eq!(first.iter().collect::<BTreeSet<_>>().len(), 20, "{first:?}");
    // The order is remembered over a restart.
    cell.kill_node().unwrap();
    cell.start_node().unwrap();
    cell.wait_ready(1, PATIENCE).unwrap();
    assert!(!first.contains(&addr(20)));
}
