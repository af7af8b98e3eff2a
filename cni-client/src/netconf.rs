//! The network configuration on standard input (CNI 1.1.0, section 1), and what Cloud Foundry adds to it.
//!
//! Fields that are not named here and in its parts are accepted and not looked at.
//!
//! ```text
//!  bandwidth   limits, in either of two forms
//!  fields   one field of an object, or the reason why not        settings   what silk's configuration had
//!  runtime  `metadata` and `runtimeConfig`, as garden-external-networker puts them at the top level
//! ```

mod bandwidth;
mod fields;
mod runtime;
mod settings;

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde_json::Value;
use weft_model::bandwidth::Bandwidth;
use weft_model::container::PortMapping;
use weft_model::profile::Settings;
use weft_model::reason::Reason;
use weft_proto::node::Owner;

use fields::{Fields, invalid};

/// Where the node daemon listens unless the configuration says otherwise.
pub(crate) const DEFAULT_SOCKET: &str = "/var/vcap/data/weft-node/run/weft-node.sock";

/// The versions of the CNI specification that results can be given in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) enum Version {
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub(crate) const ALL: [Self; 4] = [Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub(crate) const LATEST: Self = Self::V1_1_0;

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V0_3_1 => "0.3.1",
            Self::V0_4_0 => "0.4.0",
            Self::V1_0_0 => "1.0.0",
            Self::V1_1_0 => "1.1.0",
        }
    }
}

/// What every call needs.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetConf {
    pub(crate) socket: PathBuf,
    /// The container's address as the previous result has it.
    pub(crate) address: Option<Ipv4Addr>,
}

/// What an ADD needs beside it. No other call looks at it: a wrong field must not keep a container from being deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Addition {
    /// Bytes; 0: what the overlay carries.
    pub(crate) mtu: u32,
    pub(crate) owner: Owner,
    pub(crate) ports: Vec<PortMapping>,
    pub(crate) settings: Settings,
    pub(crate) bandwidth: Bandwidth,
    /// For the result, as they were given.
    pub(crate) nameservers: Vec<String>,
    /// JSON, passed on as it is.
    pub(crate) net_out_rules: Vec<u8>,
}

/// The version asked for; absent means 0.1.0 (CNI 1.1.0, section 1), which is not among ours.
pub(crate) fn version_of(stdin: &[u8]) -> Result<Version, Reason> {
    let conf = Fields::document(stdin)?;
    let given = conf.text("cniVersion")?.unwrap_or_else(|| "0.1.0".into());
    Version::ALL.into_iter().find(|version| version.as_str() == given).ok_or_else(|| {
        let supported = Version::ALL.map(Version::as_str).join(", ");
        Reason::CniVersionUnsupported { given, supported }
    })
}

impl NetConf {
    pub(crate) fn parse(stdin: &[u8]) -> Result<Self, Reason> {
        let conf = Fields::document(stdin)?;
        let name = conf.text("name")?.filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| invalid("name", "missing network name"))?;
        if !is_network_name(&name) {
            return Err(invalid(
                "name",
                "starts with a letter or digit, then letters, digits, `_`, `.` and `-`",
            ));
        }
        let socket = conf.text("socket")?.filter(|path| !path.is_empty());
        Ok(Self {
            socket: socket.map_or_else(|| DEFAULT_SOCKET.into(), Into::into),
            address: previous_address(&conf)?,
        })
    }
}

impl Addition {
    pub(crate) fn parse(stdin: &[u8]) -> Result<Self, Reason> {
        let conf = Fields::document(stdin)?;
        let mtu = match conf.get("mtu")? {
            None => 0,
            Some(mtu) => {
                let number = mtu.as_u64().and_then(|number| u32::try_from(number).ok());
                number.ok_or_else(|| invalid("mtu", format!("`{mtu}` is not a number of bytes")))?
            }
        };
        let nameservers = settings::dns_servers(&conf)?;
        let owner = runtime::owner(&conf)?;
        let (ports, net_out_rules) = runtime::runtime_config(&conf)?;
        let settings = settings::settings(&conf, &nameservers)?;
        let nameservers = nameservers.into_iter().map(|(given, _)| given).collect();
        let bandwidth = bandwidth::bandwidth(&conf)?;
        Ok(Self { mtu, owner, ports, settings, bandwidth, nameservers, net_out_rules })
    }
}

fn is_network_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// The first IPv4 address of `prevResult`, in any layout since 0.3.0.
fn previous_address(conf: &Fields<'_>) -> Result<Option<Ipv4Addr>, Reason> {
    let previous = match conf.get("prevResult")? {
        None => return Ok(None),
        Some(Value::Object(previous)) => previous,
        Some(other) => return Err(invalid("prevResult", format!("`{other}` is not an object"))),
    };
    let ips = previous.get("ips").and_then(Value::as_array).into_iter().flatten();
    let addresses = ips.filter_map(|ip| ip.get("address").and_then(Value::as_str));
    Ok(addresses.filter_map(|address| address.split('/').next()?.parse().ok()).next())
}

#[cfg(test)]
mod tests;
