//! The network configuration on standard input (CNI 1.1.0, section 1), and what Cloud Foundry adds to it.
//!
//! garden-external-networker puts `metadata` and `runtimeConfig` at the top level of each plugin's configuration.
//! Fields that are not named here are accepted and not looked at.

use std::net::Ipv4Addr;
use std::path::PathBuf;

use serde_json::{Map, Value};
use weft_model::reason::Reason;

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

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct NetConf {
    pub(crate) socket: PathBuf,
    /// Bytes; 0: what the overlay carries.
    pub(crate) mtu: u32,
    pub(crate) owner: weft_proto::node::Owner,
    /// The container's address as the previous result has it.
    pub(crate) address: Option<Ipv4Addr>,
}

/// The version asked for; absent means 0.1.0 (CNI 1.1.0, section 1), which is not among ours.
pub(crate) fn version_of(stdin: &[u8]) -> Result<Version, Reason> {
    let conf = object(stdin)?;
    let given = text(&conf, "cniVersion")?.unwrap_or("0.1.0");
    Version::ALL.into_iter().find(|version| version.as_str() == given).ok_or_else(|| {
        let supported = Version::ALL.map(Version::as_str).join(", ");
        Reason::CniVersionUnsupported { given: given.into(), supported }
    })
}

impl NetConf {
    pub(crate) fn parse(stdin: &[u8]) -> Result<Self, Reason> {
        let conf = object(stdin)?;
        let name = text(&conf, "name")?.filter(|name| !name.is_empty());
        let name = name.ok_or_else(|| invalid("name", "missing network name"))?;
        if !is_network_name(name) {
            return Err(invalid(
                "name",
                "starts with a letter or digit, then letters, digits, `_`, `.` and `-`",
            ));
        }
        let mtu = match conf.get("mtu") {
            None | Some(Value::Null) => 0,
            Some(mtu) => {
                let number = mtu.as_u64().and_then(|number| u32::try_from(number).ok());
                number.ok_or_else(|| invalid("mtu", format!("`{mtu}` is not a number of bytes")))?
            }
        };
        let address = previous_address(&conf)?;
        Ok(Self {
            socket: text(&conf, "socket")?.filter(|path| !path.is_empty()).unwrap_or(DEFAULT_SOCKET).into(),
            mtu,
            owner: owner(&conf)?,
            address,
        })
    }
}

fn object(stdin: &[u8]) -> Result<Map<String, Value>, Reason> {
    let not_json = |why: String| Reason::InvalidJson { why };
    match serde_json::from_slice(stdin).map_err(|why| not_json(why.to_string()))? {
        Value::Object(conf) => Ok(conf),
        _ => Err(not_json("it is not an object".into())),
    }
}

fn invalid(field: &str, why: impl Into<String>) -> Reason {
    Reason::InvalidField { field: field.into(), why: why.into() }
}

fn text<'a>(conf: &'a Map<String, Value>, field: &str) -> Result<Option<&'a str>, Reason> {
    match conf.get(field) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text)),
        Some(other) => Err(invalid(field, format!("`{other}` is not a text"))),
    }
}

fn is_network_name(name: &str) -> bool {
    name.starts_with(|c: char| c.is_ascii_alphanumeric())
        && name.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '-'))
}

/// Garden's properties are free-form: what is not a text is not ours to refuse. Health checks have none at all.
fn owner(conf: &Map<String, Value>) -> Result<weft_proto::node::Owner, Reason> {
    let metadata = match conf.get("metadata") {
        None | Some(Value::Null) => return Ok(weft_proto::node::Owner::default()),
        Some(Value::Object(metadata)) => metadata,
        Some(other) => return Err(invalid("metadata", format!("`{other}` is not an object"))),
    };
    let property = |name| metadata.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(weft_proto::node::Owner {
        app_id: property("app_id"),
        space_id: property("space_id"),
        org_id: property("org_id"),
        container_workload: property("container_workload"),
    })
}

/// The first IPv4 address of `prevResult`, in any layout since 0.3.0.
fn previous_address(conf: &Map<String, Value>) -> Result<Option<Ipv4Addr>, Reason> {
    let previous = match conf.get("prevResult") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Object(previous)) => previous,
        Some(other) => return Err(invalid("prevResult", format!("`{other}` is not an object"))),
    };
    let ips = previous.get("ips").and_then(Value::as_array).into_iter().flatten();
    let addresses = ips.filter_map(|ip| ip.get("address").and_then(Value::as_str));
    Ok(addresses.filter_map(|address| address.split('/').next()?.parse().ok()).next())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn field(result: Result<NetConf, Reason>) -> String {
        match result {
            Err(Reason::InvalidField { field, .. }) => field,
            other => panic!("no field is named: {other:?}"),
        }
    }

    #[test]
    fn what_garden_external_networker_passes_is_understood() {
        let conf = br#"{"cniVersion":"1.0.0","name":"weft","type":"weft-cni","socket":"/s","mtu":1400,
            "metadata":{"app_id":"a","space_id":"s","org_id":"o","container_workload":"app","ports":"8080","x":1},
            "runtimeConfig":{"portMappings":[{"host_port":61000,"container_port":8080}],"netOutRules":null},
            "prevResult":{"ips":[{"address":"10.255.1.2/32"}]},"anything":[1]}"#;
        let conf = NetConf::parse(conf).expect("valid");
        assert_eq!((conf.socket.to_str(), conf.mtu, conf.owner.app_id.as_str()), (Some("/s"), 1400, "a"));
        assert_eq!(conf.address, Some(Ipv4Addr::new(10, 255, 1, 2)));
    }

    #[test]
    fn a_wrong_field_is_named() {
        for (conf, expected) in [
            (r#"{"cniVersion":"1.0.0"}"#, "name"),
            (r#"{"name":"-x"}"#, "name"),
            (r#"{"name":7}"#, "name"),
            (r#"{"name":"n","mtu":"big"}"#, "mtu"),
            (r#"{"name":"n","mtu":-1}"#, "mtu"),
            (r#"{"name":"n","socket":1}"#, "socket"),
            (r#"{"name":"n","metadata":[]}"#, "metadata"),
            (r#"{"name":"n","prevResult":"x"}"#, "prevResult"),
        ] {
            assert_eq!(field(NetConf::parse(conf.as_bytes())), expected, "{conf}");
        }
    }

    proptest::proptest! {
        #[test]
        fn any_input_becomes_a_configuration_or_a_reason(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
            let _: Result<_, Reason> = version_of(&bytes).and_then(|_| NetConf::parse(&bytes));
        }

        #[test]
        fn any_json_becomes_a_configuration_or_a_reason(
            key in "cniVersion|name|mtu|socket|metadata|prevResult", value in "[0-9a-z\\[\\]{}\",:.-]{0,30}",
        ) {
            let conf = format!(r#"{{"name":"n","{key}":{value}}}"#);
            let _: Result<_, Reason> = version_of(conf.as_bytes()).and_then(|_| NetConf::parse(conf.as_bytes()));
        }
    }
}
