//! What is printed: results in the version asked for (CNI 1.1.0, section 5), errors, and the versions.

use std::fmt::Display;
use std::mem;
use std::net::Ipv4Addr;
use std::path::Path;

use serde_json::{Value, json};
use weft_model::address::{DeviceName, HardwareAddr};
use weft_model::reason::Reason;
use weft_proto::node::AddResponse;

use crate::netconf::Version;
use crate::previous::Previous;

/// The result of ADD: what plugins before this one made, and ours. `sandbox` is CNI_NETNS as it was given, `nameservers`
/// as in the configuration.
pub(crate) fn added(
    version: Version,
    added: &AddResponse,
    interface: &DeviceName,
    sandbox: &Path,
    nameservers: &[String],
    previous: Previous,
) -> String {
    let mac = |bytes: &[u8]| match <[u8; 6]>::try_from(bytes) {
        Ok(bytes) => HardwareAddr::new(bytes).to_string(),
        Err(_) => String::new(),
    };
    let gateway = Ipv4Addr::from(added.gateway);
    let mut host = json!({"name": added.host_interface, "mac": mac(&added.host_mac)});
    let mut inner = json!({
        "name": interface.as_str(), "mac": mac(&added.container_mac), "sandbox": sandbox.to_string_lossy(),
    });
    let address = format!("{}/32", Ipv4Addr::from(added.address));
    let default = json!({"dst": "0.0.0.0/0", "gw": gateway});
    let Previous { mut interfaces, mut ips, mut routes, mut dns } = previous;
    // Absent, not empty: Garden then gives the container the cell's own resolvers.
    if !nameservers.is_empty() {
        let before = dns.get_mut("nameservers").and_then(|list| list.as_array_mut()).map(mem::take);
        let ours = nameservers.iter().map(|server| server.as_str().into());
        dns.insert("nameservers".into(), before.into_iter().flatten().chain(ours).collect());
    }
    if version < Version::V0_3_0 {
        return pretty(&json!({
            "cniVersion": version.as_str(),
            "ip4": {"ip": address, "gateway": gateway, "routes": [default]},
            "dns": dns,
        }));
    }
    let mut ip = json!({"interface": interfaces.len() + 1, "address": address, "gateway": gateway});
    if version >= Version::V1_1_0 {
        host["mtu"] = added.mtu.into();
        inner["mtu"] = added.mtu.into();
    }
    if version < Version::V1_0_0 {
        ip["version"] = "4".into();
    }
    interfaces.extend([host, inner]);
    // First: many take the first address for the container's.
    ips.insert(0, ip);
    routes.push(default);
    pretty(&json!({
        "cniVersion": version.as_str(), "interfaces": interfaces, "ips": ips, "routes": routes, "dns": dns,
    }))
}

/// `msg` says what happened, `details` which kind it is: names do not change, texts may.
pub fn error(version: Version, code: u32, reason: &Reason) -> String {
    let name = serde_json::to_value(reason).ok().and_then(|value| value.get("reason").cloned());
    pretty(&json!({
        "cniVersion": version.as_str(),
        "code": code,
        "msg": reason.to_string(),
        "details": name.unwrap_or(Value::Null),
    }))
}

/// `given` is the version on standard input, whether we know it or not.
pub(crate) fn versions(given: &str) -> String {
    pretty(&json!({"cniVersion": given, "supportedVersions": Version::ALL.map(Version::as_str)}))
}

fn pretty(value: &impl Display) -> String {
    format!("{value:#}")
}
