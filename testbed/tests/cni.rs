//! The CNI contract with real nodes: every version, chains, deletions as they come, and what a runtime asks beside.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

use std::io::Write;
use std::process::{Command, Output, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use weft_testbed::external_networker::{Request, said};
use weft_testbed::lab::Cell;
use weft_testbed::prober::wait_for;
use weft_testbed::{Lab, Options, prober};

const PATIENCE: Duration = Duration::from_secs(30);

fn lab(purpose: &str) -> Lab {
    let mut options = Options::unique(purpose).unwrap();
    options.cells = 1;
    Lab::up(&options).unwrap()
}

fn handles(cell: &Cell) -> Vec<String> {
    let status = cell.status().unwrap();
    let list = status["containers"].as_array().unwrap().iter();
    list.map(|container| container["handle"].as_str().unwrap().to_owned()).collect()
}

fn links(cell: &Cell) -> usize {
    cell.place.run("ip", &["-o", "link"], "").unwrap().lines().filter(|line| line.contains(": s-")).count()
}

fn code(output: &Output) -> i64 {
    let error: Value = serde_json::from_slice(&output.stdout).unwrap_or_else(|_| panic!("{}", said(output)));
    error["code"].as_i64().unwrap()
}

fn restart(cell: &Cell) {
    cell.kill_node().unwrap();
    cell.start_node().unwrap();
    cell.wait_ready(0, PATIENCE).unwrap();
}

#[test]
fn a_container_is_added_and_deleted_in_every_version() {
    let lab = lab("versions");
    let cell = &lab.cells[0];
    for version in ["0.1.0", "0.2.0", "0.3.0", "0.3.1", "0.4.0", "1.0.0", "1.1.0"] {
        cell.configure_list(version, "weft", &[cell.plugin().into()]).unwrap();
        let container = cell.add(&Request::app("c")).unwrap();
        assert_eq!(container.result["cniVersion"], version);
        prober::ping(&cell.place, container.addr).unwrap();
        match cell.check(&container) {
            Ok(()) => assert!(version >= "0.4.0"),
            Err(why) => assert!(version < "0.4.0", "{version}: {why}"),
        }
        cell.del("c").unwrap();
        assert_eq!((handles(cell).len(), links(cell)), (0, 0));
    }
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

/// With plugins that others wrote before and behind ours: what they did stays in the result and is no damage, and in
/// what order all are deleted does not matter.
#[test]
fn others_before_and_behind_get_along_with_it() {
    let lab = lab("chain");
    let cell = &lab.cells[0];
    let tuning = json!({"type": "tuning", "mtu": 1300, "sysctl": {"net.core.somaxconn": "500"}});
    let bandwidth = json!({"type": "bandwidth", "ingressRate": 800_000, "ingressBurst": 800_000});
    let plugins = [json!({"type": "loopback"}), cell.plugin().into(), tuning, bandwidth];
    cell.configure_list("1.0.0", "weft", &plugins).unwrap();
    let container = cell.add(&Request::app("c")).unwrap();
    let names: Vec<&Value> =
        container.result["interfaces"].as_array().unwrap().iter().map(|one| &one["name"]).collect();
    assert_eq!((names[0], names[2]), (&json!("lo"), &json!("eth0")), "{}", container.result);
    assert!(container.place.run("ip", &["link", "show", "eth0"], "").unwrap().contains("mtu 1300"));
    prober::ping(&cell.place, container.addr).unwrap();
    // In 1.0.0 a result has no MTU, so that CHECK takes the changed one for damage; in 1.1.0 it says what was left.
    let mut changed = container.clone();
    changed.result["interfaces"][2]["mtu"] = 1300.into();
    let ours = [cell.plugin().into()];
    cell.configure_list("1.1.0", "weft", &ours).unwrap();
    cell.check(&changed).unwrap();
    let damage = cell.check(&container).unwrap_err().to_string();
    assert!(damage.contains("MTU"), "{damage}");
    cell.configure_list("1.0.0", "weft", &plugins).unwrap();
    cell.del("c").unwrap();
    assert_eq!((handles(cell).len(), links(cell)), (0, 0));
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

#[test]
fn a_delete_succeeds_however_late_and_often_it_comes() {
    let lab = lab("delete");
    let cell = &lab.cells[0];
    let delete = |handle: &str| {
        let output = cell.cni("DEL", handle, &cell.del_input().unwrap()).unwrap();
        assert!(output.status.success() && output.stdout.is_empty(), "{handle}: {}", said(&output));
    };
    let free = cell.status().unwrap()["free_addresses"].clone();
    delete("never-seen");
    // The container's process has died, its namespace is still kept by the file.
    cell.add(&Request::app("died")).unwrap();
    delete("died");
    delete("died");
    cell.remove_namespace("died").unwrap();
    delete("died");
    // What garden-external-networker leaves when a process died before its namespace was bound: a plain file.
    std::fs::write(cell.namespace_file("died"), "").unwrap();
    delete("died");
    // The namespace is gone, and nobody was told.
    cell.add(&Request::app("gone")).unwrap();
    cell.remove_namespace("gone").unwrap();
    delete("gone");
    // The node has just been started again; of one container the namespace is gone.
    cell.add(&Request::app("kept")).unwrap();
    cell.add(&Request::app("ended")).unwrap();
    cell.kill_node().unwrap();
    cell.remove_namespace("ended").unwrap();
    cell.start_node().unwrap();
    cell.wait_ready(0, PATIENCE).unwrap();
    delete("ended");
    delete("kept");
    assert_eq!((handles(cell).len(), links(cell)), (0, 0));
    wait_for("all addresses are free", || cell.status().unwrap()["free_addresses"] == free);
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

/// The plugin that came before removed the cell's eth0 then.
#[test]
fn a_delete_with_the_cells_own_namespace_is_refused_and_changes_nothing() {
    let lab = lab("own");
    let cell = &lab.cells[0];
    let container = cell.add(&Request::app("c")).unwrap();
    let mut environment = cell.environment("DEL", "c");
    for (name, value) in &mut environment {
        if *name == "CNI_NETNS" {
            *value = "/proc/self/ns/net".into();
        }
    }
    let output = cell.cni_raw(&environment, cell.del_input().unwrap().to_string().as_bytes()).unwrap();
    assert_eq!(code(&output), 8, "{}", said(&output));
    cell.place.run("ip", &["link", "show", "eth0"], "").unwrap();
    cell.check(&container).unwrap();
    prober::ping(&cell.place, container.addr).unwrap();
    cell.del("c").unwrap();
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

/// A promise of the contract: code 11 within a second.
#[test]
fn a_delete_while_the_node_is_away_is_to_be_tried_again_and_changes_nothing() {
    let lab = lab("away");
    let cell = &lab.cells[0];
    let container = cell.add(&Request::app("c")).unwrap();
    cell.kill_node().unwrap();
    let began = Instant::now();
    let output = cell.cni("DEL", "c", &cell.del_input().unwrap()).unwrap();
    assert!(began.elapsed() < Duration::from_secs(1), "{:?}", began.elapsed());
    assert_eq!(code(&output), 11, "{}", said(&output));
    prober::ping(&cell.place, container.addr).unwrap();
    cell.start_node().unwrap();
    cell.wait_ready(0, PATIENCE).unwrap();
    cell.check(&container).unwrap();
    cell.del("c").unwrap();
    assert_eq!((handles(cell).len(), links(cell)), (0, 0));
}

/// No DEL ever comes, whether the node saw the namespace end or not.
#[test]
fn what_has_no_namespace_any_more_is_removed_without_a_delete() {
    let lab = lab("ended");
    let cell = &lab.cells[0];
    let port = |n: u16| json!([{"host_port": n, "container_port": 8080}]);
    for (handle, n) in [("one", 61_000), ("two", 61_001), ("three", 61_002)] {
        let request = Request { port_mappings: port(n), ..Request::app(handle) };
        cell.add(&request).unwrap();
    }
    cell.remove_namespace("one").unwrap();
    wait_for("the node removes one", || handles(cell) == ["three", "two"]);
    cell.kill_node().unwrap();
    cell.remove_namespace("two").unwrap();
    wait_for("the link goes with its namespace", || links(cell) == 1);
    cell.start_node().unwrap();
    cell.wait_ready(0, PATIENCE).unwrap();
    assert_eq!(handles(cell), ["three"], "at start");
    let again = Request { port_mappings: port(61_001), ..Request::app("again") };
    cell.add(&again).unwrap();
    assert_eq!(lab.complaints(&[]), Vec::<String>::new());
}

#[test]
fn what_a_runtime_does_not_list_is_collected_and_status_says_whether_containers_can_come() {
    let lab = lab("collect");
    let cell = &lab.cells[0];
    cell.configure_list("1.1.0", "weft", &[cell.plugin().into()]).unwrap();
    cell.takes_containers().unwrap();
    let kept = cell.add(&Request::app("kept")).unwrap();
    for handle in ["stale", "forgotten"] {
        cell.add(&Request::app(handle)).unwrap();
    }
    // Of this one the runtime has lost its memory: only the plugin can remove it.
    let cache = cell.directory.join("cni/results/weft-forgotten-eth0");
    std::fs::remove_file(cache).unwrap();
    cell.collect(&["kept"]).unwrap();
    assert_eq!((handles(cell), links(cell)), (vec!["kept".to_owned()], 1));
    cell.check(&kept).unwrap();
    // Another network's runtime knows nothing of this one.
    cell.configure_list("1.1.0", "other", &[cell.plugin().into()]).unwrap();
    cell.collect(&[]).unwrap();
    assert_eq!(handles(cell), ["kept"]);
    // In a version without GC the plugin is not asked, and what the runtime remembers is deleted all the same.
    cell.configure_list("1.0.0", "weft", &[cell.plugin().into()]).unwrap();
    cell.collect(&[]).unwrap();
    assert_eq!((handles(cell).len(), links(cell)), (0, 0));

    cell.configure_list("1.1.0", "weft", &[cell.plugin().into()]).unwrap();
    cell.add(&Request::app("left")).unwrap();
    cell.kill_node().unwrap();
    let away = cell.takes_containers().unwrap_err().to_string();
    assert!(away.contains("code 51") && away.contains("does not answer"), "{away}");
    // Without a lease, and without a controller to get one from.
    lab.controllers[0].kill().unwrap();
    std::fs::remove_file(cell.directory.join("state/leases.json")).unwrap();
    cell.start_node().unwrap();
    wait_for("STATUS says that no controller answers", || {
        let why = cell.takes_containers().unwrap_err().to_string();
        assert!(why.contains("code 50") || why.contains("code 51"), "{why}");
        why.contains("code 50") && why.contains("no controller answers")
    });
    // What is asked besides is done all the same.
    cell.del("left").unwrap();
    assert_eq!((handles(cell).len(), links(cell)), (0, 0));
    lab.controllers[0].start().unwrap();
    wait_for("STATUS says that containers can come", || cell.takes_containers().is_ok());
}

/// docs/cni.md, "In a chain": what another plugin laid is not taken from it, and of ours nothing is left.
#[test]
fn a_default_route_of_another_makes_the_add_fail_and_stays() {
    let lab = lab("route");
    let cell = &lab.cells[0];
    cell.create_namespace("c").unwrap();
    let place = cell.container_place("c");
    place.ip("link add other type veth peer name others\nlink set others up\nlink set other up\nroute add default dev other").unwrap();
    let added = cell.cni("ADD", "c", &cell.add_input(&Request::app("c")).unwrap()).unwrap();
    assert_eq!(code(&added), 5, "{}", said(&added));
    assert!(said(&added).contains("default route"), "{}", said(&added));
    assert!(place.run("ip", &["route"], "").unwrap().contains("default dev other"));
    assert_eq!((handles(cell).len(), links(cell)), (0, 0));
    assert_eq!(lab.complaints(&["container not added"]), Vec::<String>::new());
}

/// A runtime ends what it could not begin: the other attachment of the container stays.
#[test]
fn a_second_interface_is_refused_and_its_deletion_leaves_the_first() {
    let lab = lab("second");
    let cell = &lab.cells[0];
    let container = cell.add(&Request::app("c")).unwrap();
    let with = |verb: &str| {
        let mut environment = cell.environment(verb, "c");
        for (name, value) in &mut environment {
            if *name == "CNI_IFNAME" {
                *value = "eth1".into();
            }
        }
        environment
    };
    let input = cell.add_input(&Request::app("c")).unwrap().to_string();
    assert_eq!(code(&cell.cni_raw(&with("ADD"), input.as_bytes()).unwrap()), 100);
    let deleted = cell.cni_raw(&with("DEL"), cell.del_input().unwrap().to_string().as_bytes()).unwrap();
    assert!(deleted.status.success(), "{}", said(&deleted));
    cell.check(&container).unwrap();
    restart(cell);
    cell.check(&container).unwrap();
}

/// Starts the plugin and kills it after so long, wherever it is then.
fn kill_plugin(cell: &Cell, verb: &str, handle: &str, input: &Value, after: Duration) {
    let mut command = Command::new(cell.plugin_dir().join("weft-cni"));
    command.env_clear().envs(cell.environment(verb, handle));
    command.stdin(Stdio::piped()).stdout(Stdio::null()).stderr(Stdio::null());
    let mut child = cell.place.enter(|| command.spawn()).unwrap().unwrap();
    child.stdin.take().unwrap().write_all(input.to_string().as_bytes()).unwrap();
    thread::sleep(after);
    child.kill().unwrap();
    child.wait().unwrap();
}

/// As when a runtime is killed, or gives a plugin up: an ADD whose caller has gone is taken back, or is there as a whole and
/// goes with its namespace, though nobody deletes it; and a DEL can be asked for again.
#[test]
fn plugins_killed_at_any_moment_leave_nothing() {
    let lab = lab("killed");
    let cell = &lab.cells[0];
    let free = cell.status().unwrap()["free_addresses"].clone();
    let moments = (0..40).map(|n| (format!("killed-{n}"), Duration::from_micros(200 * n)));
    for (handle, after) in moments.clone() {
        cell.create_namespace(&handle).unwrap();
        kill_plugin(cell, "ADD", &handle, &cell.add_input(&Request::app(&handle)).unwrap(), after);
    }
    println!("{} of 40 containers are there", handles(cell).len());
    for (handle, after) in moments {
        kill_plugin(cell, "DEL", &handle, &cell.del_input().unwrap(), after);
    }
    println!("{} of 40 containers are there after their DELs were killed", handles(cell).len());
    for handle in handles(cell) {
        cell.del(&handle).unwrap();
    }
    wait_for("nothing is there", || {
        (links(cell), handles(cell).len()) == (0, 0) && cell.status().unwrap()["free_addresses"] == free
    });
    for n in 0..40 {
        cell.remove_namespace(&format!("killed-{n}")).unwrap();
    }
    // Without any DEL, even where the answer had been on its way.
    for n in 0..40 {
        let handle = format!("alone-{n}");
        cell.create_namespace(&handle).unwrap();
        let input = cell.add_input(&Request::app(&handle)).unwrap();
        kill_plugin(cell, "ADD", &handle, &input, Duration::from_micros(200 * n));
        cell.remove_namespace(&handle).unwrap();
    }
    wait_for("nothing is there, without a DEL", || {
        (links(cell), handles(cell).len()) == (0, 0) && cell.status().unwrap()["free_addresses"] == free
    });
    cell.add(&Request::app("next")).unwrap();
    assert_eq!(lab.complaints(&["caller of ADD has gone", "container not added"]), Vec::<String>::new());
}
