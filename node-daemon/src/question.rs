//! `weft-node explain`: the question as it is typed, and the answer as it is printed.

use std::net::Ipv4Addr;
use std::str::FromStr;

use serde_json::{Value, json};
use weft_model::firewall::explain::Probe;
use weft_proto::node::ExplainResponse;

/// Where a packet goes: `IP:PORT/tcp`, `IP:PORT/udp`, `IP/icmp` (an echo request), `IP:TYPE.CODE/icmp`, or `IP/NUMBER` for
/// any other protocol of IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub addr: Ipv4Addr,
    pub probe: Probe,
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("`{0}` is none of IP:PORT/tcp, IP:PORT/udp, IP/icmp, IP:TYPE.CODE/icmp and IP/NUMBER")]
pub struct NotATarget(String);

impl FromStr for Target {
    type Err = NotATarget;

    fn from_str(text: &str) -> Result<Self, NotATarget> {
        parse(text).ok_or_else(|| NotATarget(text.to_owned()))
    }
}

fn parse(text: &str) -> Option<Target> {
    let (place, protocol) = text.split_once('/')?;
    let (addr, detail) = match place.split_once(':') {
        Some((addr, detail)) => (addr, Some(detail)),
        None => (place, None),
    };
    let probe = match (protocol, detail) {
        ("tcp", Some(port)) => Probe::Tcp { port: port.parse().ok()? },
        ("udp", Some(port)) => Probe::Udp { port: port.parse().ok()? },
        // RFC 792: an echo request.
        ("icmp", None) => Probe::Icmp { kind: 8, code: 0 },
        ("icmp", Some(detail)) => {
            let (kind, code) = detail.split_once('.')?;
            Probe::Icmp { kind: kind.parse().ok()?, code: code.parse().ok()? }
        }
        (number, None) => Probe::Other { protocol: number.parse().ok().filter(|n| ![1, 6, 17].contains(n))? },
        _ => return None,
    };
    Some(Target { addr: addr.parse().ok()?, probe })
}

pub fn text(answer: &ExplainResponse) -> String {
    let mut lines = vec![format!("{:<12} {}", "verdict", answer.verdict)];
    let mut line = |name: &str, value: &str| {
        if !value.is_empty() {
            lines.push(format!("{name:<12} {value}"));
        }
    };
    line("rule", &answer.rule);
    line("whose", &answer.whose);
    line("mapped to", &answer.mapped_to);
    line("source", if answer.masqueraded { "the cell's address" } else { "" });
    line("logged as", &answer.logged.join(", "));
    lines.join("\n") + "\n"
}

pub fn json(answer: &ExplainResponse) -> Value {
    let or_null = |text: &str| if text.is_empty() { Value::Null } else { text.into() };
    json!({
        "verdict": answer.verdict,
        "rule": or_null(&answer.rule),
        "whose": answer.whose,
        "mapped_to": or_null(&answer.mapped_to),
        "masqueraded": answer.masqueraded,
        "logged": answer.logged,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn targets_are_read_as_they_are_written() {
        let addr = Ipv4Addr::new(8, 8, 8, 8);
        for (text, probe) in [
            ("8.8.8.8:443/tcp", Probe::Tcp { port: 443 }),
            ("8.8.8.8:53/udp", Probe::Udp { port: 53 }),
            ("8.8.8.8/icmp", Probe::Icmp { kind: 8, code: 0 }),
            ("8.8.8.8:3.1/icmp", Probe::Icmp { kind: 3, code: 1 }),
            ("8.8.8.8/47", Probe::Other { protocol: 47 }),
        ] {
            assert_eq!(text.parse(), Ok(Target { addr, probe }), "{text}");
        }
        for text in [
            "",
            "8.8.8.8",
            "8.8.8.8/tcp",
            "8.8.8.8:70000/tcp",
            "8.8.8.8:1/icmp",
            "8.8.8.8/6",
            "x:1/tcp",
            "::1:1/tcp",
        ] {
            text.parse::<Target>().expect_err(text);
        }
    }
}
