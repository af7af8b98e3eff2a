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

use std::path::PathBuf;

use serde_json::Value;
use weft_model::bandwidth::Bandwidth;
use weft_model::container::PortMapping;
use weft_model::profile::Settings;
use weft_model::reason::Reason;
use weft_proto::node::{Attachment, Owner};

use crate::previous::Previous;
pub(crate) use fields::{Fields, invalid};

/// Where the node daemon listens unless the configuration says otherwise.
pub(crate) const DEFAULT_SOCKET: &str = "/var/vcap/data/weft-node/run/weft-node.sock";

/// The versions of the CNI specification that results can be given in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Version {
    V0_1_0,
    V0_2_0,
    V0_3_0,
    V0_3_1,
    V0_4_0,
    V1_0_0,
    V1_1_0,
}

impl Version {
    pub(crate) const ALL: [Self; 7] =
        [Self::V0_1_0, Self::V0_2_0, Self::V0_3_0, Self::V0_3_1, Self::V0_4_0, Self::V1_0_0, Self::V1_1_0];
    pub const LATEST: Self = Self::V1_1_0;

    pub(crate) fn as_str(self) -> &'static str {
        match self {
            Self::V0_1_0 => "0.1.0",
            Self::V0_2_0 => "0.2.0",
            Self::V0_3_0 => "0.3.0",
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
    pub(crate) name: String,
    pub(crate) socket: PathBuf,
}

/// What an ADD needs beside it. No other call looks at it: a wrong field must not keep a container from being deleted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Addition<'a> {
    /// Bytes; 0: what the overlay carries.
    pub(crate) mtu: u32,
    pub(crate) owner: Owner,
    pub(crate) ports: Vec<PortMapping>,
    pub(crate) settings: Settings,
    pub(crate) bandwidth: Bandwidth,
    /// For the result, as they were given.
    pub(crate) nameservers: Vec<String>,
    /// JSON, passed on as it is.
    pub(crate) net_out_rules: &'a [u8],
    /// What plugins before this one made.
    pub(crate) previous: Previous,
}

/// The version asked for, as it was written; what is absent or empty means 0.1.0 (CNI 0.2.0, "Network configuration").
pub(crate) fn given_version(conf: &Fields<'_>) -> Result<String, Reason> {
    let given = conf.text("cniVersion")?;
    Ok(given.filter(|given| !given.is_empty()).unwrap_or_else(|| Version::V0_1_0.as_str().into()))
}

pub(crate) fn version_of(conf: &Fields<'_>) -> Result<Version, Reason> {
    let given = given_version(conf)?;
    Version::ALL.into_iter().find(|version| version.as_str() == given).ok_or_else(|| {
        let supported = Version::ALL.map(Version::as_str).join(", ");
        Reason::CniVersionUnsupported { given, supported }
    })
}

impl NetConf {
    pub(crate) fn parse(conf: &Fields<'_>) -> Result<Self, Reason> {
        let name = conf.text("name")?.filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| invalid("name", "missing network name"))?;
        if !is_network_name(&name) {
            return Err(invalid(
                "name",
                "starts with a letter or digit, then letters, digits, `_`, `.` and `-`",
            ));
        }
        let socket = conf.text("socket")?.filter(|path| !path.is_empty());
        Ok(Self { name, socket: socket.map_or_else(|| DEFAULT_SOCKET.into(), Into::into) })
    }
}

/// What the runtime says that other plugins did, or that we did before.
pub(crate) fn previous(conf: &Fields<'_>) -> Result<Previous, Reason> {
    let previous = conf.get("prevResult")?;
    previous.map_or_else(|| Ok(Previous::default()), Previous::parse)
}

/// The containers and interfaces that a GC leaves. A list that is null is empty: so Go writes one that has nothing in it.
/// But without a list, or with one that is not understood, nothing is removed.
pub(crate) fn valid_attachments(conf: &Fields<'_>) -> Result<Vec<Attachment>, Reason> {
    const FIELD: &str = "cni.dev/valid-attachments";
    if !conf.has(FIELD) {
        return Err(invalid(FIELD, "is missing"));
    }
    let text = |n: usize, one: &Value, key: &str| match one.get(key).and_then(Value::as_str) {
        Some(text) => Ok(text.to_owned()),
        None => Err(invalid(format!("{FIELD}[{n}].{key}"), "is not a text")),
    };
    let attachments = conf.list(FIELD)?;
    let attachments = attachments.iter().enumerate().map(|(n, one)| {
        Ok(Attachment { handle: text(n, one, "containerID")?, interface: text(n, one, "ifname")? })
    });
    attachments.collect()
}

impl<'a> Addition<'a> {
    pub(crate) fn parse(conf: &Fields<'a>, version: Version) -> Result<Self, Reason> {
        let mtu = match conf.get("mtu")? {
            None => 0,
            Some(mtu) => {
                let number = mtu.as_u64().and_then(|number| u32::try_from(number).ok());
                number.ok_or_else(|| invalid("mtu", format!("`{mtu}` is not a number of bytes")))?
            }
        };
        let nameservers = settings::dns_servers(conf)?;
        let owner = runtime::owner(conf)?;
        let runtime = conf.object(fields::RUNTIME)?;
        let (ports, net_out_rules) = match &runtime {
            Some(runtime) => runtime::ports_and_rules(runtime)?,
            None => (Vec::new(), &[][..]),
        };
        let settings = settings::settings(conf, &nameservers)?;
        let nameservers = nameservers.into_iter().map(|(given, _)| given).collect();
        let bandwidth = bandwidth::bandwidth(conf, runtime.as_ref())?;
        // Chains are younger than the first layouts of results.
        let chained = version >= Version::V0_3_0;
        let previous = if chained { previous(conf)? } else { Previous::default() };
        Ok(Self { mtu, owner, ports, settings, bandwidth, nameservers, net_out_rules, previous })
    }
}

fn is_network_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

#[cfg(test)]
mod tests;
