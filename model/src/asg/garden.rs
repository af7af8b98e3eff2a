//! Security groups' rules as Garden passes them: `runtimeConfig.netOutRules` of the CNI configuration, an array of
//! garden's `NetOutRule` in JSON.
//!
//! Garden is written in Go: names are found whatever their case, and what is zero is left out.

use std::fmt;
use std::marker::PhantomData;
use std::net::Ipv4Addr;

use serde::de::value::MapAccessDeserializer;
use serde::de::{Deserialize, Deserializer, MapAccess, Visitor};
use serde_json::value::RawValue;
use serde_json::{Map, Value};

use super::{AddrRange, EgressRule, PortRange, Skipped, Traffic};
use crate::reason::Reason;

/// The field that the rules come in.
pub const FIELD: &str = "runtimeConfig.netOutRules";
/// The most rules that a container may have, counted as pairs of a network and a port range. Platforms pass hundreds;
/// what is far beyond would hold up every other call while it is worked out and goes to the kernel in one transaction.
pub const MAX_RULES: usize = 20_000;
/// The most bytes of JSON: some 200 for each rule.
pub const MAX_BYTES: usize = 4 << 20;

/// What was passed.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Rules {
    /// One for each pair of a network and a port range, in the order passed.
    pub rules: Vec<EgressRule>,
    /// Those that cannot be what was meant.
    pub skipped: Vec<Skipped>,
}

/// Takes an array in JSON; no bytes at all are no rules. A rule that is wrong is skipped, and the others hold.
pub fn parse(json: &[u8]) -> Result<Rules, Reason> {
    if json.is_empty() {
        return Ok(Rules::default());
    }
    check_size(json.len())?;
    // Each rule is looked into by itself, so that nothing within one can spoil the others.
    let passed: Vec<&RawValue> = serde_json::from_slice(json)
        .map_err(|why| invalid(format!("it is not the array of rules that it should be: {why}")))?;
    let mut parsed = Rules::default();
    for (index, rule) in (0..).zip(passed) {
        match Rule::plain(rule).map_or_else(|| Rule::parse(rule), Ok) {
            Ok(rule) if parsed.rules.len() + rule.pairs() + parsed.skipped.len() > MAX_RULES => {
                return Err(too_many());
            }
            Ok(rule) => parsed.rules.extend(rule.flatten(index)),
            Err(why) => parsed.skipped.push(Skipped { index, why }),
        }
        if parsed.skipped.len() > MAX_RULES {
            return Err(too_many());
        }
    }
    Ok(parsed)
}

/// Whether a list of so many bytes is looked at at all.
pub fn check_size(bytes: usize) -> Result<(), Reason> {
    if bytes > MAX_BYTES {
        return Err(invalid(format!("{bytes} bytes are too many: at most {MAX_BYTES} are taken")));
    }
    Ok(())
}

fn invalid(why: String) -> Reason {
    Reason::InvalidField { field: FIELD.into(), why }
}

fn too_many() -> Reason {
    invalid(format!("there are more than {MAX_RULES} rules, counted as pairs of a network and a port range"))
}

/// One of garden's rules.
#[derive(Debug, PartialEq, Eq)]
struct Rule {
    networks: Vec<AddrRange>,
    /// Each of these to each of the networks.
    traffic: Vec<Traffic>,
    log: bool,
}

/// A rule for TCP or UDP as Go writes it.
#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct Plain<'a> {
    protocol: u8,
    #[serde(borrow)]
    networks: Vec<Object<PlainRange<&'a str>>>,
    ports: Vec<Object<PlainRange<u16>>>,
    #[serde(default)]
    log: bool,
}

#[derive(serde::Deserialize)]
#[serde(deny_unknown_fields)]
struct PlainRange<T> {
    start: T,
    end: T,
}

/// An object: by itself, a structure would be read from an array as well.
struct Object<T>(T);

impl<'de, T: Deserialize<'de>> Deserialize<'de> for Object<T> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Fields<T>(PhantomData<T>);

        impl<'de, T: Deserialize<'de>> Visitor<'de> for Fields<T> {
            type Value = Object<T>;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object")
            }

            fn visit_map<A: MapAccess<'de>>(self, map: A) -> Result<Object<T>, A::Error> {
                T::deserialize(MapAccessDeserializer::new(map)).map(Object)
            }
        }

        deserializer.deserialize_map(Fields(PhantomData))
    }
}

impl Rule {
    /// Nearly all are plain, and are read in a fourth of the time; none for one that is not, or is wrong.
    fn plain(json: &RawValue) -> Option<Self> {
        let Object::<Plain<'_>>(plain) = serde_json::from_str(json.get()).ok()?;
        let traffic = match plain.protocol {
            1 => Traffic::Tcp,
            2 => Traffic::Udp,
            _ => return None,
        };
        let network = |Object(range): &Object<PlainRange<&str>>| {
            AddrRange::new(range.start.parse().ok()?, range.end.parse().ok()?).ok()
        };
        let ports = |Object(range): &Object<PlainRange<u16>>| {
            PortRange::new(range.start, range.end).ok().map(traffic)
        };
        let networks: Vec<AddrRange> = plain.networks.iter().map(network).collect::<Option<_>>()?;
        let traffic: Vec<Traffic> = plain.ports.iter().map(ports).collect::<Option<_>>()?;
        let whole = !networks.is_empty() && !traffic.is_empty();
        whole.then_some(Self { networks, traffic, log: plain.log })
    }

    fn parse(json: &RawValue) -> Result<Self, String> {
        let rule: Value =
            serde_json::from_str(json.get()).map_err(|why| format!("it cannot be read: {why}"))?;
        let rule = Fields::of(&rule, "it")?;
        let networks = rule.list("networks")?;
        if networks.is_empty() {
            return Err("it names no networks".into());
        }
        let networks = networks.iter().map(network).collect::<Result<_, _>>()?;
        let log = match rule.get("log")? {
            None => false,
            Some(Value::Bool(log)) => *log,
            Some(other) => return Err(format!("log: `{other}` is neither true nor false")),
        };
        let protocol = rule.get("protocol")?.map_or(Some(0), Value::as_i64);
        let ports = rule.list("ports")?;
        let traffic = match protocol {
            Some(0) if ports.is_empty() => vec![Traffic::All],
            Some(0) => return Err("it is for all protocols, and names ports".into()),
            Some(1) => to_ports("tcp", ports, Traffic::Tcp)?,
            Some(2) => to_ports("udp", ports, Traffic::Udp)?,
            Some(3) if ports.is_empty() => vec![icmp(&rule)?],
            Some(3) => return Err("it is for icmp, and names ports".into()),
            _ => {
                let given = rule.get("protocol")?.unwrap_or(&Value::Null);
                return Err(format!("protocol: `{given}` is none of 0 (all), 1 (tcp), 2 (udp), 3 (icmp)"));
            }
        };
        Ok(Self { networks, traffic, log })
    }

    fn pairs(&self) -> usize {
        self.networks.len().saturating_mul(self.traffic.len())
    }

    fn flatten(self, index: u32) -> impl Iterator<Item = EgressRule> {
        let Self { networks, traffic, log } = self;
        networks.into_iter().flat_map(move |to| {
            traffic.clone().into_iter().map(move |traffic| EgressRule { to, traffic, log, index })
        })
    }
}

fn network(range: &Value) -> Result<AddrRange, String> {
    let range = Fields::of(range, "networks: one")?;
    let end = |name| match range.get(name)? {
        None => Ok(None),
        // An address that Go does not have.
        Some(Value::String(none)) if none.is_empty() => Ok(None),
        Some(Value::String(text)) => {
            let addr: Result<Ipv4Addr, _> = text.parse();
            addr.map(Some).map_err(|_| format!("networks: `{text}` is not an IPv4 address"))
        }
        Some(other) => Err(format!("networks: `{other}` is not an IPv4 address")),
    };
    let (first, last) = match (end("start")?, end("end")?) {
        (Some(first), Some(last)) => (first, last),
        (Some(one), None) | (None, Some(one)) => (one, one),
        (None, None) => return Err("networks: one has neither a start nor an end".into()),
    };
    AddrRange::new(first, last).map_err(|why| format!("networks: {why}"))
}

fn to_ports(
    protocol: &str,
    ports: &[Value],
    traffic: impl Fn(PortRange) -> Traffic,
) -> Result<Vec<Traffic>, String> {
    if ports.is_empty() {
        return Err(format!("it is for {protocol}, and names no ports"));
    }
    ports.iter().map(|range| port_range(range).map(&traffic)).collect()
}

fn port_range(range: &Value) -> Result<PortRange, String> {
    let range = Fields::of(range, "ports: one")?;
    let end = |name| match range.get(name)? {
        None => Ok(None),
        Some(given) => {
            let port = given.as_u64().and_then(|port| u16::try_from(port).ok());
            port.map(Some).ok_or_else(|| format!("ports: `{given}` is not a port"))
        }
    };
    let (first, last) = match (end("start")?, end("end")?) {
        (Some(first), last) => (first, last.unwrap_or(first)),
        // Garden leaves port 0 out.
        (None, Some(last)) => (0, last),
        (None, None) => return Err("ports: one has neither a start nor an end".into()),
    };
    PortRange::new(first, last).map_err(|why| format!("ports: {why}"))
}

fn icmp(rule: &Fields<'_>) -> Result<Traffic, String> {
    let Some(icmps) = rule.get("icmps")? else {
        return Err("it is for icmp, and names no type and code".into());
    };
    let icmps = Fields::of(icmps, "icmps: it")?;
    let number = |name| match icmps.get(name)? {
        None => Ok(None),
        Some(given) => match given.as_i64().map(u8::try_from) {
            // The platform's -1 arrives as 255 where it went through a byte.
            Some(Ok(255)) => Ok(Some(None)),
            Some(Err(_)) if given.as_i64() == Some(-1) => Ok(Some(None)),
            Some(Ok(number)) => Ok(Some(Some(number))),
            _ => Err(format!("icmps: {name}: `{given}` is not a number from 0 to 255")),
        },
    };
    let code = number("code")?.ok_or_else(|| "it is for icmp, and names no code".to_owned())?;
    Ok(Traffic::Icmp { kind: number("type")?.unwrap_or(Some(0)), code })
}

/// An object whose names are found whatever their case.
struct Fields<'a>(&'a Map<String, Value>);

impl<'a> Fields<'a> {
    fn of(value: &'a Value, what: &str) -> Result<Self, String> {
        value.as_object().map(Self).ok_or_else(|| format!("{what} is not an object"))
    }

    /// None as well for what is null.
    fn get(&self, name: &str) -> Result<Option<&'a Value>, String> {
        let mut found =
            self.0.iter().filter(|(key, _)| key.eq_ignore_ascii_case(name)).map(|(_, value)| value);
        match (found.next(), found.next()) {
            (Some(_), Some(_)) => Err(format!("it has {name} more than once")),
            (value, _) => Ok(value.filter(|value| !value.is_null())),
        }
    }

    fn list(&self, name: &str) -> Result<&'a [Value], String> {
        match self.get(name)? {
            None => Ok(&[]),
            Some(Value::Array(list)) => Ok(list),
            Some(other) => Err(format!("{name}: `{other}` is not an array")),
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// An array in the place of an object is none.
    fn ranges<T: serde::Serialize + std::fmt::Debug>(
        ends: impl Strategy<Value = T> + Clone,
    ) -> impl Strategy<Value = Value> {
        let one = (ends.clone(), ends, 0..10).prop_map(|(start, end, odd)| match odd {
            0 => json!([start, end]),
            _ => json!({"start": start, "end": end}),
        });
        proptest::collection::vec(one, 0..3).prop_map(Value::from)
    }

    /// Most of them plain, some spelled otherwise or wrong.
    fn rules() -> impl Strategy<Value = Value> {
        let addrs =
            prop_oneof![9 => Just("10.0.0.7"), 3 => Just("9.9.9.9"), 1 => Just(""), 1 => Just("10.0.0")];
        let ports = prop_oneof![9 => 0_u32..3, 1 => 65_535_u32..65_537];
        let name = |plain: &'static str, other: &'static str| prop_oneof![9 => Just(plain), 1 => Just(other)];
        let names = (name("protocol", "Protocol"), name("ports", "icmps"), name("log", "new"));
        (names, 0_i32..4, ranges(addrs), ranges(ports), any::<Option<bool>>()).prop_map(
            |((protocol, ports, log), number, networks, ranges, value)| {
                json!({protocol: number, "networks": networks, ports: ranges, log: value})
            },
        )
    }

    proptest! {
        #[test]
        fn what_is_read_quickly_is_what_is_read_slowly(rule in rules()) {
            let json = RawValue::from_string(rule.to_string()).expect("JSON");
            if let Some(plain) = Rule::plain(&json) {
                prop_assert_eq!(Ok(plain), Rule::parse(&json), "{}", rule);
            }
        }
    }

    #[test]
    fn what_go_writes_is_read_quickly() {
        let rule = json!({"protocol": 1, "networks": [{"start": "9.9.9.9", "end": "9.9.9.10"}], "ports": [{"start": 80, "end": 81}]});
        let json = RawValue::from_string(rule.to_string()).expect("JSON");
        assert_eq!(Rule::plain(&json), Rule::parse(&json).ok());
        assert!(Rule::plain(&json).is_some());
    }

    /// By itself, a structure would be read from an array: its fields in their order.
    #[test]
    fn an_array_is_no_object() {
        let range = |start, end| json!({"start": start, "end": end});
        let (networks, ports) = (json!([range("9.9.9.9", "9.9.9.9")]), json!([{"start": 80, "end": 81}]));
        for rule in [
            json!([1, networks, ports, true]),
            json!({"protocol": 1, "networks": [["9.9.9.9", "9.9.9.9"]], "ports": ports}),
            json!({"protocol": 1, "networks": networks, "ports": [[80, 81]]}),
        ] {
            let json = RawValue::from_string(rule.to_string()).expect("JSON");
            assert_eq!(Rule::plain(&json), None, "{rule}");
            assert!(Rule::parse(&json).is_err(), "{rule}");
        }
    }
}
