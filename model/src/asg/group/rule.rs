//! One rule of a security group.

use std::net::Ipv4Addr;

use serde_json::{Map, Value};

use crate::asg::garden::MAX_RULES;
use crate::asg::{AddrRange, EgressRule, PortRange, Traffic};

/// Names that are quoted in a report are cut to so many characters.
const QUOTED: usize = 64;

pub(super) struct Rule {
    destinations: Vec<AddrRange>,
    /// Each of these to each of the destinations.
    traffic: Vec<Traffic>,
    log: bool,
}

impl Rule {
    /// Parts of it that are wrong go to `skip`; an error is about the rule as a whole.
    pub(super) fn parse(json: &str, skip: &mut dyn FnMut(String)) -> Result<Self, String> {
        let rule: Value = serde_json::from_str(json).map_err(|why| format!("it cannot be read: {why}"))?;
        let Value::Object(rule) = rule else { return Err("it is not an object".into()) };
        let (destination, ports) = (text(&rule, "destination")?, text(&rule, "ports")?);
        let log = match rule.get("log") {
            None | Some(Value::Null) => false,
            Some(Value::Bool(log)) => *log,
            Some(other) => {
                return Err(format!("log: {} is neither true nor false", quoted(&other.to_string())));
            }
        };
        let protocol = text(&rule, "protocol")?.trim();
        let portless = ports.trim().is_empty();
        if pieces(destination).count().saturating_mul(pieces(ports).count()) > MAX_RULES {
            return Err(format!("it has more than {MAX_RULES} pairs of a destination and a port range"));
        }
        let traffic = match protocol {
            "tcp" | "udp" if portless => return Err(format!("it is for {protocol}, and names no ports")),
            "tcp" => taken(ports, port_range, skip).into_iter().map(Traffic::Tcp).collect(),
            "udp" => taken(ports, port_range, skip).into_iter().map(Traffic::Udp).collect(),
            "icmp" | "all" if !portless => return Err(format!("it is for {protocol}, and names ports")),
            "icmp" => vec![Traffic::Icmp { kind: number(&rule, "type")?, code: number(&rule, "code")? }],
            "all" => vec![Traffic::All],
            other => return Err(format!("protocol: {} is none of all, tcp, udp, icmp", quoted(other))),
        };
        Ok(Self { destinations: taken(destination, addresses, skip), traffic, log })
    }

    pub(super) fn pairs(&self) -> usize {
        self.destinations.len().saturating_mul(self.traffic.len())
    }

    pub(super) fn flatten(self, index: u32) -> impl Iterator<Item = EgressRule> {
        let Self { destinations, traffic, log } = self;
        destinations.into_iter().flat_map(move |to| {
            traffic.clone().into_iter().map(move |traffic| EgressRule { to, traffic, log, index })
        })
    }
}

fn pieces(list: &str) -> impl Iterator<Item = &str> {
    list.split(',').map(str::trim)
}

fn taken<T>(list: &str, parse: impl Fn(&str) -> Result<T, String>, skip: &mut dyn FnMut(String)) -> Vec<T> {
    pieces(list).filter_map(|piece| parse(piece).map_err(&mut *skip).ok()).collect()
}

fn text<'a>(rule: &'a Map<String, Value>, name: &str) -> Result<&'a str, String> {
    match rule.get(name) {
        None | Some(Value::Null) => Ok(""),
        Some(Value::String(text)) => Ok(text),
        Some(other) => Err(format!("{name}: {} is not a text", quoted(&other.to_string()))),
    }
}

/// An ICMP type or code. What is not written is 0 (Go cannot tell it); -1 is any, of each by itself, as the Cloud
/// Controller documents.
fn number(rule: &Map<String, Value>, name: &str) -> Result<Option<u8>, String> {
    match rule.get(name) {
        None | Some(Value::Null) => Ok(Some(0)),
        Some(given) if given.as_i64() == Some(-1) => Ok(None),
        Some(given) => match given.as_u64().map(u8::try_from) {
            Some(Ok(number)) => Ok(Some(number)),
            _ => Err(format!("{name}: {} is not a number from -1 to 255", quoted(&given.to_string()))),
        },
    }
}

fn port_range(piece: &str) -> Result<PortRange, String> {
    let port =
        |text: &str| decimal(text.trim()).ok_or_else(|| format!("ports: {} is not a port", quoted(piece)));
    let (first, last) = piece.split_once('-').unwrap_or((piece, piece));
    PortRange::new(port(first)?, port(last)?).map_err(|why| format!("ports: {why}"))
}

fn addresses(piece: &str) -> Result<AddrRange, String> {
    if piece.contains(':') {
        return Err(format!("destination: {} is IPv6, which containers do not have", quoted(piece)));
    }
    let wrong = || format!("destination: {} is no address, network or range of addresses", quoted(piece));
    let addr = |text: &str| addr(text.trim()).ok_or_else(wrong);
    if let Some((network, prefix)) = piece.split_once('/') {
        let prefix = decimal::<u8>(prefix.trim()).filter(|prefix| *prefix <= 32).ok_or_else(wrong)?;
        let hosts = u32::MAX.checked_shr(prefix.into()).unwrap_or(0);
        let network = addr(network)?.to_bits() & !hosts;
        let (first, last) = (Ipv4Addr::from_bits(network), Ipv4Addr::from_bits(network | hosts));
        return AddrRange::new(first, last).map_err(|why| format!("destination: {why}"));
    }
    let (first, last) = piece.split_once('-').unwrap_or((piece, piece));
    AddrRange::new(addr(first)?, addr(last)?).map_err(|why| format!("destination: {why}"))
}

/// Decimal octets whatever their leading zeros: old rows of the Cloud Controller have them, and never meant octal.
fn addr(text: &str) -> Option<Ipv4Addr> {
    let mut octets = [0; 4];
    let mut given = text.split('.');
    for octet in &mut octets {
        *octet = decimal(given.next()?)?;
    }
    given.next().is_none().then_some(octets.into())
}

/// Digits and nothing else.
fn decimal<T: std::str::FromStr>(text: &str) -> Option<T> {
    let digits = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
    digits.then(|| text.parse().ok()).flatten()
}

fn quoted(text: &str) -> String {
    match text.char_indices().nth(QUOTED) {
        Some((end, _)) => format!("`{}…`", &text[..end]),
        None => format!("`{text}`"),
    }
}
