//! `prevResult`: what plugins before this one made, and what those behind it have left of ours (CNI 1.1.0, section 5).

use std::net::Ipv4Addr;

use serde_json::{Map, Value};
use weft_model::address::DeviceName;
use weft_model::reason::Reason;

use crate::netconf::invalid;

const FIELD: &str = "prevResult";

/// A result in a layout since 0.3.0. Before that there were no chains.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Previous {
    pub(crate) interfaces: Vec<Value>,
    pub(crate) ips: Vec<Value>,
    pub(crate) routes: Vec<Value>,
    pub(crate) dns: Map<String, Value>,
}

/// What a CHECK finds in it of our own result. None: as the node has it.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(crate) struct Ours {
    pub(crate) address: Option<Ipv4Addr>,
    pub(crate) mtu: Option<u32>,
    /// A later plugin has taken it away.
    pub(crate) without_default_route: bool,
}

impl Previous {
    pub(crate) fn parse(result: Value) -> Result<Self, Reason> {
        let Value::Object(mut result) = result else {
            return Err(invalid(FIELD, format!("`{result}` is not an object")));
        };
        let mut list = |name: &str| match result.remove(name) {
            None | Some(Value::Null) => Ok(Vec::new()),
            Some(Value::Array(list)) => Ok(list),
            Some(other) => Err(invalid(format!("{FIELD}.{name}"), format!("`{other}` is not a list"))),
        };
        let (interfaces, ips, routes) = (list("interfaces")?, list("ips")?, list("routes")?);
        let dns = match result.remove("dns") {
            None | Some(Value::Null) => Map::new(),
            Some(Value::Object(dns)) => dns,
            Some(other) => {
                return Err(invalid(format!("{FIELD}.dns"), format!("`{other}` is not an object")));
            }
        };
        Ok(Self { interfaces, ips, routes, dns })
    }

    /// What it says of the interface in the container, which has to be in it. A list that is empty says nothing.
    pub(crate) fn ours(&self, interface: &DeviceName) -> Result<Ours, Reason> {
        let inside = |one: &Value| {
            one["name"] == interface.as_str() && one["sandbox"].as_str().is_some_and(|path| !path.is_empty())
        };
        let at = self.interfaces.iter().position(inside);
        if at.is_none() && !self.interfaces.is_empty() {
            let why = format!("has no interface {interface} in a container");
            return Err(invalid(format!("{FIELD}.interfaces"), why));
        }
        let mtu = at.and_then(|at| self.interfaces[at]["mtu"].as_u64());
        let whose = |ip: &Value| ip["interface"].as_u64().and_then(|index| usize::try_from(index).ok());
        let ips =
            self.ips.iter().filter(|ip| at.is_none() || whose(ip).is_none_or(|index| Some(index) == at));
        let mut addresses = ips.filter_map(|ip| ip["address"].as_str()?.split('/').next()?.parse().ok());
        let default = |route: &Value| route["dst"] == "0.0.0.0/0";
        Ok(Ours {
            address: addresses.next(),
            mtu: mtu.and_then(|mtu| u32::try_from(mtu).ok()).filter(|mtu| *mtu != 0),
            without_default_route: !self.interfaces.is_empty() && !self.routes.iter().any(default),
        })
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn ours(result: Value) -> Result<Ours, Reason> {
        Previous::parse(result).expect("valid").ours(&"eth0".parse().expect("name"))
    }

    #[test]
    fn of_several_interfaces_ours_is_found() {
        let result = json!({
            "interfaces": [
                {"name": "eth0"}, {"name": "lo", "sandbox": "/n"}, {"name": "eth0", "sandbox": "/n", "mtu": 1400},
            ],
            "ips": [{"address": "127.0.0.1/8", "interface": 1}, {"address": "10.255.1.2/32", "interface": 2}],
            "routes": [{"dst": "0.0.0.0/0", "gw": "169.254.0.1"}],
        });
        let address = Some(Ipv4Addr::new(10, 255, 1, 2));
        let expected = Ours { address, mtu: Some(1400), without_default_route: false };
        assert_eq!(ours(result.clone()), Ok(expected.clone()));
        let mut without = result;
        without["routes"] = Value::Null;
        assert_eq!(ours(without), Ok(Ours { without_default_route: true, ..expected }));
    }

    #[test]
    fn what_says_nothing_leaves_all_to_the_node() {
        assert_eq!(ours(json!({})), Ok(Ours::default()));
        let address = Some(Ipv4Addr::new(10, 255, 1, 2));
        assert_eq!(
            ours(json!({"ips": [{"address": "10.255.1.2/32"}]})),
            Ok(Ours { address, ..Ours::default() })
        );
    }

    #[test]
    fn what_is_wrong_is_named() {
        let field = |result: Result<Previous, Reason>| match result {
            Err(Reason::InvalidField { field, .. }) => field,
            other => panic!("{other:?}"),
        };
        assert_eq!(field(Previous::parse(json!("x"))), "prevResult");
        assert_eq!(field(Previous::parse(json!({"ips": {}}))), "prevResult.ips");
        assert_eq!(field(Previous::parse(json!({"dns": []}))), "prevResult.dns");
        let missing = ours(json!({"interfaces": [{"name": "eth1", "sandbox": "/n"}]}));
        assert!(missing.is_err_and(|why| why.to_string().contains("eth0")));
    }
}
