//! What the specification has beside ADD, DEL and their errors: chains, GC, STATUS, and which version has what.

use std::process::Command;

use serde_json::{Value, json};
use weft_model::reason::Reason;
use weft_proto::node::{Attachment, CollectRequest};

use crate::{VERSIONS, World, document, execute, refused};

/// Behind others the result is theirs and ours: docs/cni.md, "In a chain".
#[test]
fn what_plugins_before_made_stays_in_the_result() {
    let world = World::new(None);
    let mut conf = world.conf("1.1.0");
    conf["dns_servers"] = json!(["10.0.0.53"]);
    conf["prevResult"] = json!({
        "cniVersion": "1.1.0",
        "interfaces": [{"name": "lo", "mac": "00:00:00:00:00:00", "sandbox": world.namespace(), "x": 1}],
        "ips": [{"address": "127.0.0.1/8", "interface": 0}],
        "routes": [{"dst": "192.0.2.0/24"}],
        "dns": {"nameservers": ["192.0.2.53"], "search": ["example.com"]},
    });
    let output = world.run("ADD", &conf);
    assert!(output.status.success(), "{output:?}");
    let result = document(&output);
    let names = |list: &Value, key: &str| -> Vec<Value> {
        list.as_array().unwrap().iter().map(|one| one[key].clone()).collect()
    };
    assert_eq!(result["interfaces"][0], conf["prevResult"]["interfaces"][0]);
    assert_eq!(names(&result["interfaces"], "name"), ["lo", "s-010255030002", "eth0"]);
    assert_eq!(names(&result["ips"], "address"), ["10.255.30.2/32", "127.0.0.1/8"]);
    assert_eq!(names(&result["ips"], "interface"), [2, 0]);
    assert_eq!(names(&result["routes"], "dst"), ["192.0.2.0/24", "0.0.0.0/0"]);
    assert_eq!(result["dns"], json!({"nameservers": ["192.0.2.53", "10.0.0.53"], "search": ["example.com"]}));
    // Wrong, it is refused before anything is asked of the node.
    conf["prevResult"]["ips"] = json!({});
    refused(&world.run("ADD", &conf), 7, "prevResult.ips");
    assert_eq!(world.arrived.lock().unwrap().adds.len(), 1);
}

/// A later plugin may have changed the container's MTU or taken its default route: CHECK expects what it left.
#[test]
fn check_asks_for_what_the_last_plugin_left() {
    let world = World::new(None);
    let mut conf = world.conf("1.1.0");
    conf["prevResult"] = json!({
        "interfaces": [{"name": "s-010255030002"}, {"name": "eth0", "sandbox": "/n", "mtu": 1300}],
        "ips": [{"address": "10.255.30.2/32", "interface": 1}],
        "routes": [{"dst": "192.0.2.0/24"}],
    });
    assert!(world.run("CHECK", &conf).status.success());
    conf["prevResult"]["interfaces"][1]["name"] = "eth1".into();
    refused(&world.run("CHECK", &conf), 7, "prevResult.interfaces");
    let arrived = world.arrived.lock().unwrap();
    let [asked] = arrived.checks.as_slice() else { panic!("{:?}", arrived.checks) };
    assert_eq!((asked.address, asked.mtu, asked.without_default_route), (0x0aff_1e02, 1300, true));
}

#[test]
fn gc_names_what_is_valid_and_nothing_else_removes_anything() {
    const VALID: &str = "cni.dev/valid-attachments";
    let world = World::new(None);
    let mut conf = world.conf("1.1.0");
    // Without a list, or with one that is not understood, nothing is removed.
    refused(&world.run("GC", &conf), 7, VALID);
    for wrong in [json!("x"), json!([{"containerID": "a"}]), json!([{"ifname": "eth0", "containerID": 1}])] {
        conf[VALID] = wrong;
        refused(&world.run("GC", &conf), 7, VALID);
    }
    conf[VALID] = json!([{"containerID": "a", "ifname": "eth0"}, {"containerID": "b", "ifname": "eth1"}]);
    refused(&execute(&[("CNI_COMMAND", "GC".into())], conf.to_string().as_bytes()), 4, "[CNI_PATH] missing");
    let environment = [("CNI_COMMAND", "GC".into()), ("CNI_PATH", "/plugins".into())];
    let output = execute(&environment, conf.to_string().as_bytes());
    assert!(output.status.success() && output.stdout.is_empty(), "{output:?}");
    conf[VALID] = Value::Null;
    assert!(world.run("GC", &conf).status.success());

    let arrived = world.arrived.lock().unwrap();
    let attachment =
        |handle: &str, interface: &str| Attachment { handle: handle.into(), interface: interface.into() };
    let collect = |valid| CollectRequest { network: "weft".into(), valid };
    let listed = vec![attachment("a", "eth0"), attachment("b", "eth1")];
    assert_eq!(arrived.collections, [collect(listed), collect(Vec::new())]);
    assert!(arrived.namespaces.is_empty(), "GC is about no namespace");
}

#[test]
fn status_says_50_or_51_and_why() {
    let status = |world: &World| {
        execute(&[("CNI_COMMAND", "STATUS".into())], world.conf("1.1.0").to_string().as_bytes())
    };
    let well = status(&World::new(None));
    assert!(well.status.success() && well.stdout.is_empty(), "{well:?}");
    for (reason, code, names) in [
        (Reason::NoLeaseYet { why: "no controller answers".into() }, 50, "no controller answers"),
        (Reason::SubnetFull { subnet: "10.255.30.0/24".into() }, 50, "10.255.30.0/24"),
        (Reason::Starting, 50, "starting"),
        (Reason::LeaseConflict { holder: "another".into() }, 51, "another"),
    ] {
        refused(&status(&World::new(Some(reason))), code, names);
    }
    let world = World::new(None);
    let mut conf = world.conf("1.1.0");
    conf["socket"] = "/nonexistent/node.sock".into();
    refused(&world.run("STATUS", &conf), 51, "/nonexistent/node.sock");
    // What is wrong with the call itself keeps its own code.
    conf["name"] = "".into();
    refused(&world.run("STATUS", &conf), 7, "name");
}

#[test]
fn commands_are_refused_in_versions_that_do_not_have_them() {
    let world = World::new(None);
    for (command, since) in [("CHECK", "0.4.0"), ("GC", "1.1.0"), ("STATUS", "1.1.0")] {
        for version in VERSIONS.into_iter().take_while(|version| *version != since) {
            refused(&world.run(command, &world.conf(version)), 1, &format!("{command} from {since} on"));
        }
    }
    let arrived = world.arrived.lock().unwrap();
    assert_eq!((arrived.checks.len(), arrived.collections.len()), (0, 0));
}

/// By a person at a terminal, say: nothing will ever come.
#[test]
fn an_unknown_command_waits_for_no_configuration() {
    let (input, kept) = std::io::pipe().unwrap();
    let mut plugin = Command::new(env!("CARGO_BIN_EXE_weft-cni"));
    let output = plugin.env("CNI_COMMAND", "X").stdin(input).output().unwrap();
    drop(kept);
    refused(&output, 4, "unknown CNI_COMMAND: X");
}

/// The oldest configurations have no version, and no runtime has to set CNI_PATH for us.
#[test]
fn what_the_specification_leaves_out_may_be_absent() {
    let world = World::new(None);
    let mut conf = world.conf("0.1.0");
    conf.as_object_mut().unwrap().remove("cniVersion");
    let mut environment = world.environment("ADD");
    environment.retain(|(name, _)| *name != "CNI_PATH");
    let output = execute(&environment, conf.to_string().as_bytes());
    assert!(output.status.success(), "{output:?}");
    assert_eq!(document(&output)["cniVersion"], "0.1.0");
    environment.push(("CNI_ARGS", "FOO=BAR;ABC=123".into()));
    conf["cniVersion"] = "".into();
    assert_eq!(document(&execute(&environment, conf.to_string().as_bytes()))["cniVersion"], "0.1.0");
}
