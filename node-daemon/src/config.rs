//! The configuration file, parsed into values that cannot be wrong.

use std::collections::BTreeSet;
use std::ffi::OsStr;
use std::net::{Ipv4Addr, SocketAddr};
use std::path::PathBuf;
use std::time::Duration;

use ipnetwork::Ipv4Network;
use serde::{Deserialize, Deserializer, de};
use weft_daemon::log::Format;
use weft_daemon::tls::Files;
use weft_model::address::{DeviceName, UnderlayAddr};
use weft_model::cell::{CellConfig, OverlayIngress, VXLAN_OVERHEAD};
use weft_model::follow::Intervals;
use weft_model::subnet::{OverlayNetwork, SubnetKind};

use crate::cell::Underlay;
use crate::flow_log::{self, Host, Timestamps};
use crate::guard;
use crate::policy_server::{self, Server, ServerUrl};

/// One JSON object; every field but the first group has a default. docs/operating.md describes them for people.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct Config {
    /// This machine's name in the controller's table: the BOSH instance's GUID.
    #[serde(deserialize_with = "not_empty")]
    pub cell_id: String,
    /// The address that other cells send the overlay's frames to.
    pub underlay_ip: UnderlayAddr,
    /// `https://host:port` of each controller; they are tried in turn.
    #[serde(deserialize_with = "urls")]
    pub controllers: Vec<String>,
    /// PEM: the authority of the controllers' certificates.
    pub ca_file: PathBuf,
    /// PEM: this node's certificate, and its key.
    pub certificate_file: PathBuf,
    pub key_file: PathBuf,

    /// The name in the controllers' certificates.
    #[serde(default = "default::controller_name")]
    pub controller_name: String,
    #[serde(default = "default::overlay_network")]
    pub overlay_network: OverlayNetwork,
    /// Snapshot of the leases, and the journal of containers.
    #[serde(default = "default::state_directory")]
    pub state_directory: PathBuf,
    /// Where the CNI client calls. Its directory is made with mode 0700.
    #[serde(default = "default::socket")]
    pub socket: PathBuf,
    #[serde(default = "default::vtep_name")]
    pub vtep_name: DeviceName,
    /// UDP port of the overlay's frames, the same on all cells.
    #[serde(default = "default::vtep_port")]
    pub vtep_port: u16,
    /// The device for the overlay's frames, if not the one that has `underlay_ip`.
    #[serde(default)]
    pub vxlan_interface_name: Option<DeviceName>,
    /// Bytes of the largest packet on the underlay that carries one of the overlay, which has 50 less; 0: what its device
    /// carries.
    #[serde(default, deserialize_with = "outer_mtu")]
    pub mtu: u32,
    /// One address instead of a block: a machine without containers that speaks on the overlay.
    #[serde(default)]
    pub single_ip_only: bool,
    /// Every container reaches every other, on all cells. If false, only where a policy lets it.
    #[serde(default)]
    pub disable_container_network_policy: bool,
    /// Policies count for each packet of a connection, not for its first one only.
    #[serde(default)]
    pub cut_connections_of_removed_policies: bool,
    /// Routers on the overlay reach containers; with `single_ip_only` this machine is such a router.
    #[serde(default)]
    pub enable_overlay_ingress_rules: bool,
    /// Addresses of the networks on which containers reach the world; none: `underlay_ip` alone.
    #[serde(default)]
    pub underlay_ips: Vec<Ipv4Addr>,
    /// The devices for that, if not those that have `underlay_ips`.
    #[serde(default)]
    pub underlay_interface_names: BTreeSet<DeviceName>,
    /// What the firewall decided, as lines of JSON. Empty: no traffic log.
    #[serde(default = "default::traffic_log_file")]
    pub traffic_log_file: PathBuf,
    /// The NFLOG group through which the kernel passes it: nobody else on the machine may read it.
    #[serde(default = "default::traffic_log_group")]
    pub traffic_log_group: u16,
    #[serde(default)]
    pub traffic_log_timestamps: Timestamps,
    /// The backend for the two rules at the end of iptables' chains; `auto`: the one that the cell uses already.
    #[serde(default)]
    pub iptables_backend: guard::Wish,
    /// Where iptables is, if it is not to be looked for: Garden's own.
    #[serde(default)]
    pub iptables_directory: Option<PathBuf>,
    /// `https://host:port` of the internal policy server; none: no policies, and security groups as Garden passes them.
    #[serde(default)]
    pub policy_server: Option<ServerUrl>,
    /// PEM: the authority of its certificate, and the certificate and key that are shown to it. Needed with
    /// `policy_server`.
    #[serde(default)]
    pub policy_server_ca_file: PathBuf,
    #[serde(default)]
    pub policy_server_certificate_file: PathBuf,
    #[serde(default)]
    pub policy_server_key_file: PathBuf,
    #[serde(default = "default::policy_poll_interval")]
    pub policy_poll_interval_seconds: f64,
    #[serde(default = "default::asg_poll_interval")]
    pub asg_poll_interval_seconds: f64,
    /// Security groups come from the policy server, and change while containers run.
    #[serde(default = "default::enabled")]
    pub enable_asg_syncing: bool,
    /// What is between containers is in the traffic log, whatever the CNI configuration says: at the start.
    #[serde(default)]
    pub iptables_c2c_logging: bool,
    /// Forced polls and switches, as silk's agent has them.
    #[serde(default)]
    pub runbook_endpoints: RunbookEndpoints,
    /// Health and metrics, plain HTTP on loopback.
    #[serde(default = "default::health_address")]
    pub health_address: SocketAddr,
    #[serde(default = "default::log_level")]
    pub log_level: String,
    #[serde(default)]
    pub log_format: Format,
}

/// Plain HTTP on loopback, with the ports of silk's agent.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct RunbookEndpoints {
    pub enabled: bool,
    pub force_address: SocketAddr,
    pub debug_address: SocketAddr,
}

impl Default for RunbookEndpoints {
    fn default() -> Self {
        let at = |port| ([127, 0, 0, 1], port).into();
        Self { enabled: false, force_address: at(8722), debug_address: at(8721) }
    }
}

/// What silk's agent waits for an answer.
const ANSWERS_WITHIN: Duration = Duration::from_secs(5);
/// How often the tag of the overlay's routers is asked for. It changes only with the policy server's database.
const ROUTER_INTERVAL: Duration = Duration::from_secs(60);

mod default {
    use super::{DeviceName, OverlayNetwork, PathBuf, SocketAddr};

    pub(super) fn controller_name() -> String {
        "weft-controller".into()
    }

    pub(super) fn overlay_network() -> OverlayNetwork {
        "10.255.0.0/16".parse().unwrap_or_else(|_| unreachable!("a network"))
    }

    pub(super) fn state_directory() -> PathBuf {
        "/var/vcap/data/weft-node".into()
    }

    pub(super) fn socket() -> PathBuf {
        "/var/vcap/data/weft-node/run/weft-node.sock".into()
    }

    pub(super) fn vtep_name() -> DeviceName {
        "silk-vtep".parse().unwrap_or_else(|_| unreachable!("a device name"))
    }

    pub(super) fn vtep_port() -> u16 {
        4789
    }

    pub(super) fn traffic_log_file() -> PathBuf {
        "/var/vcap/sys/log/weft-node/traffic.log".into()
    }

    pub(super) fn traffic_log_group() -> u16 {
        2312
    }

    pub(super) fn policy_poll_interval() -> f64 {
        5.0
    }

    pub(super) fn asg_poll_interval() -> f64 {
        60.0
    }

    pub(super) fn enabled() -> bool {
        true
    }

    pub(super) fn health_address() -> SocketAddr {
        ([127, 0, 0, 1], 23954).into()
    }

    pub(super) fn log_level() -> String {
        "info".into()
    }
}

/// What the file's fields say together and this version cannot do.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum Refused {
    #[error("underlay_ip: {0} lies within overlay_network {1}; the two must be apart")]
    UnderlayInOverlay(UnderlayAddr, OverlayNetwork),
    #[error("enable_overlay_ingress_rules: needs policy_server, which gives the routers' tag")]
    RoutersUnknown,
    #[error("{0}: must be given with policy_server")]
    PolicyServerFile(&'static str),
    #[error("{0}: {1} is not a number of seconds from 0.1 to 86,400")]
    Interval(&'static str, f64),
    #[error("{0}: {1} is not a loopback address")]
    NotLoopback(&'static str, SocketAddr),
}

impl Config {
    pub fn check(&self) -> Result<(), Refused> {
        if Ipv4Network::from(self.overlay_network).contains(self.underlay_ip.get()) {
            return Err(Refused::UnderlayInOverlay(self.underlay_ip, self.overlay_network));
        }
        let files = [
            ("policy_server_ca_file", &self.policy_server_ca_file),
            ("policy_server_certificate_file", &self.policy_server_certificate_file),
            ("policy_server_key_file", &self.policy_server_key_file),
        ];
        for (field, file) in files {
            if self.policy_server.is_some() && file.as_os_str().is_empty() {
                return Err(Refused::PolicyServerFile(field));
            }
        }
        if self.enable_overlay_ingress_rules && self.policy_server.is_none() {
            return Err(Refused::RoutersUnknown);
        }
        for (field, seconds) in [
            ("policy_poll_interval_seconds", self.policy_poll_interval_seconds),
            ("asg_poll_interval_seconds", self.asg_poll_interval_seconds),
        ] {
            if !(0.1..=86_400.0).contains(&seconds) {
                return Err(Refused::Interval(field, seconds));
            }
        }
        let RunbookEndpoints { force_address, debug_address, .. } = self.runbook_endpoints;
        for (field, address) in [
            ("runbook_endpoints.force_address", force_address),
            ("runbook_endpoints.debug_address", debug_address),
        ] {
            if !address.ip().is_loopback() {
                return Err(Refused::NotLoopback(field, address));
            }
        }
        Ok(())
    }

    /// None: there is no policy server.
    pub fn policy_server(&self) -> Option<policy_server::Config> {
        let certificates = Files {
            ca: self.policy_server_ca_file.clone(),
            certificate: self.policy_server_certificate_file.clone(),
            key: self.policy_server_key_file.clone(),
        };
        let groups = Duration::from_secs_f64(self.asg_poll_interval_seconds);
        Some(policy_server::Config {
            server: Server { url: self.policy_server.clone()?, certificates, answers_within: ANSWERS_WITHIN },
            intervals: Intervals {
                policies: Duration::from_secs_f64(self.policy_poll_interval_seconds),
                groups: self.enable_asg_syncing.then_some(groups),
                router: self.enable_overlay_ingress_rules.then_some(ROUTER_INTERVAL),
            },
            state_directory: self.state_directory.clone(),
        })
    }

    pub fn certificates(&self) -> Files {
        Files {
            ca: self.ca_file.clone(),
            certificate: self.certificate_file.clone(),
            key: self.key_file.clone(),
        }
    }

    pub fn cell(&self) -> CellConfig {
        CellConfig {
            vtep_name: self.vtep_name.clone(),
            vtep_port: self.vtep_port,
            underlay: self.underlay_ip,
            overlay: self.overlay_network,
            mtu: (self.mtu != 0).then(|| self.mtu.saturating_sub(VXLAN_OVERHEAD)),
            policy: !self.disable_container_network_policy,
            cut: self.cut_connections_of_removed_policies,
            ingress: match (self.enable_overlay_ingress_rules, self.single_ip_only) {
                (false, _) => OverlayIngress::Off,
                (true, false) => OverlayIngress::Taken,
                (true, true) => OverlayIngress::Sent,
            },
            log_group: self.traffic_log_group,
        }
    }

    pub fn underlay(&self) -> Underlay {
        let own = || vec![self.underlay_ip.get()];
        Underlay {
            device: self.vxlan_interface_name.clone(),
            ways: self.underlay_interface_names.clone(),
            addresses: if self.underlay_ips.is_empty() { own() } else { self.underlay_ips.clone() },
        }
    }

    /// None: no traffic log.
    pub fn traffic_log(&self) -> Option<flow_log::Settings> {
        let host = Host { addr: self.underlay_ip, guid: self.cell_id.clone() };
        let (file, timestamps) = (self.traffic_log_file.clone(), self.traffic_log_timestamps);
        (!file.as_os_str().is_empty()).then_some(flow_log::Settings { file, timestamps, host })
    }

    pub fn guard(&self, path: Option<&OsStr>) -> guard::Config {
        let directories = guard::directories(self.iptables_directory.as_deref(), path);
        guard::Config { backend: self.iptables_backend, directories }
    }

    pub fn wants(&self) -> SubnetKind {
        if self.single_ip_only { SubnetKind::Single } else { SubnetKind::Block }
    }
}

/// RFC 791: every IPv4 module must forward 68 bytes without fragmenting, and so the overlay.
fn outer_mtu<'de, D: Deserializer<'de>>(deserializer: D) -> Result<u32, D::Error> {
    const LEAST: u32 = 68 + VXLAN_OVERHEAD;
    match u32::deserialize(deserializer)? {
        mtu @ (0 | LEAST..) => Ok(mtu),
        less => Err(de::Error::custom(format!("{less} is neither 0 nor {LEAST} or more"))),
    }
}

fn not_empty<'de, D: Deserializer<'de>>(deserializer: D) -> Result<String, D::Error> {
    let text = String::deserialize(deserializer)?;
    if text.is_empty() { Err(de::Error::custom("is empty")) } else { Ok(text) }
}

fn urls<'de, D: Deserializer<'de>>(deserializer: D) -> Result<Vec<String>, D::Error> {
    let urls = Vec::<String>::deserialize(deserializer)?;
    if urls.is_empty() {
        return Err(de::Error::custom("names no controller"));
    }
    for url in &urls {
        let secure =
            url.starts_with("https://") && tonic::transport::Endpoint::from_shared(url.clone()).is_ok();
        if !secure {
            return Err(de::Error::custom(format!("`{url}` is not https://host:port")));
        }
    }
    Ok(urls)
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::{Value, json};

    fn minimal() -> Value {
        json!({
            "cell_id": "cell", "underlay_ip": "10.0.0.1", "controllers": ["https://10.0.0.9:4103"],
            "ca_file": "ca", "certificate_file": "crt", "key_file": "key",
        })
    }

    fn load(config: &Value) -> Result<Config, String> {
        let directory = tempfile::tempdir().expect("directory");
        let file = directory.path().join("weft-node.json");
        std::fs::write(&file, config.to_string()).expect("write");
        let config: Config = weft_daemon::config::load(&file).map_err(|error| error.to_string())?;
        config.check().map_err(|error| error.to_string())?;
        Ok(config)
    }

    #[test]
    fn the_shortest_configuration_is_complete() {
        let config = load(&minimal()).expect("valid");
        assert_eq!((config.vtep_name.as_str(), config.vtep_port, config.mtu), ("silk-vtep", 4789, 0));
        let endpoints = RunbookEndpoints {
            enabled: false,
            force_address: ([127, 0, 0, 1], 8722).into(),
            debug_address: ([127, 0, 0, 1], 8721).into(),
        };
        assert_eq!((config.runbook_endpoints, config.iptables_c2c_logging), (endpoints, false));
    }

    #[test]
    fn an_error_names_the_field() {
        for (field, value) in [
            ("underlay_ip", json!("127.0.0.1")),
            ("underlay_ip", json!("10.255.3.4")),
            ("controllers", json!([])),
            ("controllers", json!(["http://10.0.0.9:4103"])),
            ("overlay_network", json!("10.255.0.1/16")),
            ("vtep_name", json!("much-too-long-name")),
            ("vtep_port", json!(70000)),
            ("disable_container_network_policy", json!("no")),
            ("underlay_ips", json!(["fe80::1"])),
            ("policy_server", json!("http://policy-server:4003")),
            ("enable_overlay_ingress_rules", json!(true)),
            ("policy_poll_interval_seconds", json!(0)),
            ("asg_poll_interval_seconds", json!(1e9)),
            ("runbook_endpoints", json!({"enabled": "yes"})),
            ("runbook_endpoints", json!({"force_address": "10.0.0.1:8722"})),
            ("runbook_endpoints", json!({"debug_address": "0.0.0.0:8721"})),
            ("runbook_endpoints", json!({"debug_port": 8721})),
            ("cell_id", json!("")),
            ("mtu", json!(117)),
            ("no_such_field", json!(1)),
        ] {
            let mut config = minimal();
            config[field] = value;
            let error = load(&config).expect_err(field);
            assert!(error.contains(field), "{field}: {error}");
        }
        let mut config = minimal();
        config.as_object_mut().expect("object").remove("key_file");
        assert!(load(&config).expect_err("missing").contains("key_file"));
    }

    #[test]
    fn the_mtu_is_that_of_the_underlays_packet() {
        for (outer, inner) in [(0, None), (118, Some(68)), (1500, Some(1450))] {
            let mut config = minimal();
            config["mtu"] = json!(outer);
            assert_eq!(load(&config).expect("valid").cell().mtu, inner);
        }
    }

    /// The error for an unknown field lists all that are known.
    #[test]
    fn the_page_for_operators_names_every_field() {
        let error = serde_json::from_value::<Config>(json!({"?": 1})).expect_err("unknown").to_string();
        let page = include_str!("../../docs/operating.md");
        let (_, section) = page.split_once("\n## weft-node\n").expect("section");
        let (section, _) = section.split_once("\n## ").expect("another section");
        let fields: Vec<&str> = error.split('`').skip(3).step_by(2).collect();
        assert!(fields.len() > 10, "{error}");
        for field in fields {
            assert!(section.contains(&format!("`{field}`")), "{field} is missing in docs/operating.md");
        }
    }
}
