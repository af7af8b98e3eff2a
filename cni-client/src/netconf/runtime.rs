//! What garden-external-networker adds to each plugin's configuration: whose container it is, and what Garden was asked
//! to let in and out.

use std::num::NonZeroU16;

use serde_json::{Map, Value};
use weft_model::asg::garden;
use weft_model::container::{PortMapping, mapped_twice};
use weft_model::reason::Reason;
use weft_proto::node::Owner;

use super::fields::{Fields, invalid};

const PORTS: &str = "runtimeConfig.portMappings";

/// Garden's properties are free-form: what is not a text is not ours to refuse. Health checks have none at all.
pub(super) fn owner(conf: &Fields<'_>) -> Result<Owner, Reason> {
    let metadata = match conf.get("metadata")? {
        None => return Ok(Owner::default()),
        Some(Value::Object(metadata)) => metadata,
        Some(other) => return Err(invalid("metadata", format!("`{other}` is not an object"))),
    };
    let property = |name| metadata.get(name).and_then(Value::as_str).unwrap_or_default().to_owned();
    Ok(Owner {
        app_id: property("app_id"),
        space_id: property("space_id"),
        org_id: property("org_id"),
        container_workload: property("container_workload"),
        policy_group_id: property("policy_group_id"),
        ports: property("ports"),
    })
}

/// Mapped ports, and the rules as they are.
pub(super) fn ports_and_rules<'a>(runtime: &Fields<'a>) -> Result<(Vec<PortMapping>, &'a [u8]), Reason> {
    let mappings = runtime.list("portMappings")?;
    let ports = mappings.iter().enumerate().map(|(n, mapping)| port_mapping(n, mapping));
    let ports = ports.collect::<Result<Vec<_>, _>>()?;
    if let Some(port) = mapped_twice(&ports) {
        return Err(invalid(PORTS, format!("host_port: {port} is mapped twice")));
    }
    let rules = runtime.raw("netOutRules").map_or("", serde_json::value::RawValue::get);
    if !rules.is_empty() && !rules.starts_with('[') {
        return Err(invalid(garden::FIELD, "is not a list of rules"));
    }
    garden::check_size(rules.len())?;
    Ok((ports, rules.as_bytes()))
}

/// Names as garden spells them, or as CNI's conventions do (capability `portMappings`).
fn port_mapping(number: usize, mapping: &Value) -> Result<PortMapping, Reason> {
    let name = format!("{PORTS}[{number}]");
    let mapping =
        mapping.as_object().ok_or_else(|| invalid(name.as_str(), format!("`{mapping}` is not an object")))?;
    only(&name, mapping, "protocol", |protocol| protocol.eq_ignore_ascii_case("tcp"))?;
    only(&name, mapping, "hostIP", |addr| addr == "0.0.0.0")?;
    Ok(PortMapping {
        host: port(&name, mapping, ["host_port", "hostPort"])?,
        container: port(&name, mapping, ["container_port", "containerPort"])?,
    })
}

fn port(of: &str, mapping: &Map<String, Value>, names: [&str; 2]) -> Result<NonZeroU16, Reason> {
    let [garden, _] = names;
    let wrong = |why: String| invalid(format!("{of}.{garden}"), why);
    let mut given = names.into_iter().filter_map(|name| mapping.get(name));
    let value = match (given.next(), given.next()) {
        (None, _) => return Err(wrong("is missing".into())),
        (Some(_), Some(_)) => return Err(wrong("is there in two spellings".into())),
        (Some(value), None) => value,
    };
    let number = value.as_u64().and_then(|number| u16::try_from(number).ok()).and_then(NonZeroU16::new);
    number.ok_or_else(|| wrong(format!("`{value}` is not a port from 1 to 65535")))
}

/// A field that may be absent, or say what is so in any case.
fn only(
    of: &str,
    mapping: &Map<String, Value>,
    name: &str,
    allowed: impl Fn(&str) -> bool,
) -> Result<(), Reason> {
    match mapping.get(name) {
        None | Some(Value::Null) => Ok(()),
        Some(Value::String(text)) if text.is_empty() || allowed(text) => Ok(()),
        Some(other) => {
            Err(Reason::FieldUnsupported { field: format!("{of}.{name}"), value: other.to_string() })
        }
    }
}
