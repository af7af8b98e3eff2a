//! What is printed: results in the version asked for (CNI 1.1.0, section 5), errors, and the versions.

use std::fmt::Display;
use std::net::Ipv4Addr;
use std::path::Path;

use serde_json::{Value, json};
use weft_model::address::{DeviceName, HardwareAddr};
use weft_model::reason::Reason;
use weft_proto::node::AddResponse;

use crate::netconf::Version;

/// The result of ADD. `sandbox` is CNI_NETNS as it was given, `nameservers` as in the configuration.
pub(crate) fn added(
    version: Version,
    added: &AddResponse,
    interface: &DeviceName,
    sandbox: &Path,
    nameservers: &[String],
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
    let mut ip = json!({
        "interface": 1, "address": format!("{}/32", Ipv4Addr::from(added.address)), "gateway": gateway,
    });
    if version >= Version::V1_1_0 {
        host["mtu"] = added.mtu.into();
        inner["mtu"] = added.mtu.into();
    }
    if version < Version::V1_0_0 {
        ip["version"] = "4".into();
    }
    // Absent, not empty: Garden then gives the container the cell's own resolvers.
    let dns = if nameservers.is_empty() { json!({}) } else { json!({"nameservers": nameservers}) };
    pretty(&json!({
        "cniVersion": version.as_str(),
        "interfaces": [host, inner],
        "ips": [ip],
        "routes": [{"dst": "0.0.0.0/0", "gw": gateway}],
        "dns": dns,
    }))
}

/// `msg` says what happened, `details` which kind it is: names do not change, texts may.
pub(crate) fn error(version: Version, reason: &Reason) -> String {
    let name = serde_json::to_value(reason).ok().and_then(|value| value.get("reason").cloned());
    pretty(&json!({
        "cniVersion": version.as_str(),
        "code": reason.meaning().cni,
        "msg": reason.to_string(),
        "details": name.unwrap_or(Value::Null),
    }))
}

pub(crate) fn versions(version: Version) -> String {
    pretty(&json!({"cniVersion": version.as_str(), "supportedVersions": Version::ALL.map(Version::as_str)}))
}

fn pretty(value: &impl Display) -> String {
    format!("{value:#}")
}
