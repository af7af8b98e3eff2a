//! What the node says of itself: the answer to a status call, and how `weft-node status` prints it.

use std::fmt::Write as _;

use serde_json::{Value, json};
use weft_model::cell::{Cell, Presence};
use weft_model::link;
use weft_model::reason::Reason;
use weft_proto::convert::owner_to;
use weft_proto::node::{Container, Peer, PolicyServer, StatusResponse};

use crate::overlay::Overlay;
use crate::policy_server::Known;

/// `known`: of the policy server, if there is one.
pub fn status(
    cell: &Cell,
    overlay: &Overlay,
    known: Option<&Known>,
    not_ready: Option<Reason>,
) -> StatusResponse {
    let inputs = cell.inputs();
    let containers = cell.roster().iter().map(|(container, presence)| Container {
        handle: container.handle.to_string(),
        address: container.addr.to_string(),
        interface: container.interface.to_string(),
        host_interface: link::host_name(container.addr).to_string(),
        mtu: container.mtu,
        owner: Some(owner_to(&container.owner)),
        state: match presence {
            Presence::Present => "present",
            Presence::Lost => "lost",
            Presence::Leaving => "leaving",
        }
        .into(),
    });
    let peers = inputs
        .peers
        .values()
        .map(|lease| Peer { underlay: lease.underlay.to_string(), subnet: lease.subnet.to_string() });
    StatusResponse {
        version: env!("CARGO_PKG_VERSION").into(),
        underlay: inputs.config.underlay.to_string(),
        subnet: inputs.lease.map(|lease| lease.subnet.to_string()).unwrap_or_default(),
        vtep: inputs.config.vtep_name.to_string(),
        mtu: inputs.mtu().unwrap_or_default(),
        lease_state: overlay.state().into(),
        controller: overlay.controller.clone().unwrap_or_default(),
        table_age_seconds: overlay.age_seconds(),
        peers: peers.collect(),
        containers: containers.collect(),
        free_addresses: u32::try_from(cell.roster().ipam().free()).unwrap_or(u32::MAX),
        not_ready: not_ready.map(|reason| reason.to_string()).unwrap_or_default(),
        policy_server: known.map(policy_server),
    }
}

fn policy_server(known: &Known) -> PolicyServer {
    let seconds = |age: std::time::Duration| age.as_secs();
    PolicyServer {
        policies_age_seconds: known.policies.as_ref().map(|told| seconds(told.age())),
        security_groups_age_seconds: known.groups.as_ref().map(|told| seconds(told.age())),
        trouble: known.lost.values().next().cloned().unwrap_or_default(),
    }
}

/// For programs: the message's fields under their names.
pub fn json(status: &StatusResponse) -> Value {
    let containers = status.containers.iter().map(|container| {
        let owner = container.owner.clone().unwrap_or_default();
        json!({
            "handle": container.handle, "address": container.address, "interface": container.interface,
            "host_interface": container.host_interface, "mtu": container.mtu, "state": container.state,
            "app_id": owner.app_id, "space_id": owner.space_id, "org_id": owner.org_id,
            "container_workload": owner.container_workload,
        })
    });
    let peers = status.peers.iter().map(|peer| json!({"underlay": peer.underlay, "subnet": peer.subnet}));
    let policy_server = status.policy_server.as_ref().map(|server| {
        json!({
            "policies_age_seconds": server.policies_age_seconds,
            "security_groups_age_seconds": server.security_groups_age_seconds,
            "trouble": server.trouble,
        })
    });
    json!({
        "version": status.version, "not_ready": status.not_ready, "underlay": status.underlay,
        "subnet": status.subnet, "lease_state": status.lease_state, "controller": status.controller,
        "table_age_seconds": status.table_age_seconds, "vtep": status.vtep, "mtu": status.mtu,
        "free_addresses": status.free_addresses, "peers": peers.collect::<Vec<_>>(),
        "containers": containers.collect::<Vec<_>>(), "policy_server": policy_server,
    })
}

/// For people.
pub fn text(status: &StatusResponse) -> String {
    let or = |text: &str, none: &str| if text.is_empty() { none.to_owned() } else { text.to_owned() };
    let ready =
        if status.not_ready.is_empty() { "ready".into() } else { format!("not ready: {}", status.not_ready) };
    let mut out = String::new();
    let mut line = |name: &str, value: &str| {
        let _ = writeln!(out, "{name:<12}{value}");
    };
    line("state", &ready);
    line("underlay", &status.underlay);
    line("subnet", &format!("{} ({})", or(&status.subnet, "none"), status.lease_state));
    let age = format!(
        "{}, table confirmed {} s ago",
        or(&status.controller, "none reachable"),
        status.table_age_seconds
    );
    line("controller", &age);
    line("overlay", &format!("{}, MTU {}, peers: {}", status.vtep, status.mtu, status.peers.len()));
    if let Some(server) = &status.policy_server {
        let age = |seconds: Option<u64>| {
            seconds.map_or_else(|| "unknown".into(), |s| format!("confirmed {s} s ago"))
        };
        let ages = (age(server.policies_age_seconds), age(server.security_groups_age_seconds));
        line("policies", &ages.0);
        line("groups", &ages.1);
        if !server.trouble.is_empty() {
            line("trouble", &server.trouble);
        }
    }
    let containers = format!("{}, {} addresses free", status.containers.len(), status.free_addresses);
    line("containers", &containers);
    for container in &status.containers {
        let app = container.owner.as_ref().map(|owner| owner.app_id.as_str()).unwrap_or_default();
        let _ = writeln!(
            out,
            "  {:<16}{:<17}{:<9}{:<38}{}",
            container.address, container.host_interface, container.state, container.handle, app
        );
    }
    for peer in &status.peers {
        let _ = writeln!(out, "  peer {:<18}at {}", peer.subnet, peer.underlay);
    }
    out
}
