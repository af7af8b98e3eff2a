//! Garden's rules: what is right arrives as it was meant, what is wrong is skipped by itself.
#![expect(clippy::unwrap_used, reason = "a failed step of a test is its failure")]

use std::net::Ipv4Addr;

use proptest::prelude::*;
use serde_json::{Map, Value, json};
use weft_model::asg::garden::{FIELD, MAX_BYTES, MAX_RULES, parse};
use weft_model::asg::{AddrRange, EgressRule, PortRange, Traffic};
use weft_model::reason::Reason;

fn rules(json: &Value) -> Vec<String> {
    let parsed = parse(json.to_string().as_bytes()).unwrap();
    assert_eq!(parsed.skipped, [], "{json}");
    parsed.rules.iter().map(|rule| format!("{} {rule}", rule.index)).collect()
}

#[track_caller]
fn refused(json: &[u8]) -> String {
    match parse(json) {
        Err(Reason::InvalidField { field, why }) if field == FIELD => why,
        other => panic!("not refused: {other:?}"),
    }
}

/// As `garden.NetOutRule` is written by Go: zeros are left out.
#[test]
fn what_garden_passes_is_understood() {
    let passed = json!([
        {"protocol": 1, "networks": [{"start": "9.9.9.9", "end": "9.9.9.10"}, {"start": "1.1.1.1", "end": "1.1.1.1"}],
         "ports": [{"start": 80, "end": 81}, {"start": 443, "end": 443}], "log": true},
        {"networks": [{"start": "0.0.0.0", "end": "169.253.255.255"}]},
        {"protocol": 2, "networks": [{"start": "8.8.8.8"}], "ports": [{"start": 53}, {"end": 1}]},
        {"protocol": 3, "networks": [{"end": "8.8.8.8"}], "icmps": {"code": 0}},
        {"protocol": 3, "networks": [{"start": "8.8.8.8", "end": ""}], "icmps": {"type": 8, "code": 255}},
        {"Protocol": 3, "NETWORKS": [{"Start": "8.8.8.8"}], "icmps": {"type": -1, "Code": 3}, "ports": null},
        {"protocol": 0, "networks": [{"start": "8.8.8.8"}], "ports": [], "new": 1},
    ]);
    let expected = [
        "0 9.9.9.9-9.9.9.10 tcp 80-81 log",
        "0 9.9.9.9-9.9.9.10 tcp 443 log",
        "0 1.1.1.1 tcp 80-81 log",
        "0 1.1.1.1 tcp 443 log",
        "1 0.0.0.0-169.253.255.255 all",
        "2 8.8.8.8 udp 53",
        "2 8.8.8.8 udp 0-1",
        "3 8.8.8.8 icmp type 0 code 0",
        "4 8.8.8.8 icmp type 8 code any",
        "5 8.8.8.8 icmp type any code 3",
        "6 8.8.8.8 all",
    ];
    assert_eq!(rules(&passed), expected);
}

/// Rules that cannot be what was meant, and a word of what is said about each.
fn wrong() -> Vec<(Value, &'static str)> {
    let with = |mut rule: Value, field: &str, value: Value| {
        rule[field] = value;
        rule
    };
    let one = json!([{"start": "8.8.8.8", "end": "8.8.8.8"}]);
    let tcp = json!({"protocol": 1, "networks": one, "ports": [{"start": 80, "end": 80}]});
    let icmp = json!({"protocol": 3, "networks": one, "icmps": {"type": 8, "code": 0}});
    vec![
        (json!(7), "not an object"),
        (json!(null), "not an object"),
        (json!("tcp"), "not an object"),
        (json!({"protocol": 1, "networks": one}), "it is for tcp, and names no ports"),
        (json!({"protocol": 2, "networks": one, "ports": []}), "it is for udp, and names no ports"),
        (with(tcp.clone(), "ports", json!([{"start": 90, "end": 80}])), "ports: the range 90 to 80"),
        (with(tcp.clone(), "ports", json!([{"start": 65536, "end": 65537}])), "`65536` is not a port"),
        (with(tcp.clone(), "ports", json!([{"start": -1, "end": 80}])), "`-1` is not a port"),
        (with(tcp.clone(), "ports", json!([{"start": 1.5}])), "`1.5` is not a port"),
        (with(tcp.clone(), "ports", json!([{}])), "ports: one has neither"),
        (with(tcp.clone(), "ports", json!([80])), "ports: one is not an object"),
        (with(tcp.clone(), "ports", json!("80")), "not an array"),
        (
            with(tcp.clone(), "networks", json!([{"start": "9.9.9.9", "end": "9.9.9.8"}])),
            "networks: the range",
        ),
        (with(tcp.clone(), "networks", json!([{"start": "2001:db8::1"}])), "`2001:db8::1` is not an IPv4"),
        (with(tcp.clone(), "networks", json!([{"start": "8.8.8.0/24"}])), "`8.8.8.0/24` is not an IPv4"),
        (with(tcp.clone(), "networks", json!([{"start": 8}])), "`8` is not an IPv4"),
        (with(tcp.clone(), "networks", json!([{"start": "", "end": ""}])), "networks: one has neither"),
        (with(tcp.clone(), "networks", json!(["8.8.8.8"])), "networks: one is not an object"),
        (with(tcp.clone(), "networks", json!([])), "names no networks"),
        (json!({}), "names no networks"),
        (with(tcp.clone(), "protocol", json!(4)), "protocol: `4`"),
        (with(tcp.clone(), "protocol", json!("tcp")), "protocol: `\"tcp\"`"),
        (with(tcp.clone(), "protocol", json!(0)), "all protocols, and names ports"),
        (with(tcp.clone(), "protocol", json!(3)), "for icmp, and names ports"),
        (with(tcp, "log", json!("yes")), "log: `\"yes\"`"),
        (json!({"protocol": 3, "networks": one}), "names no type and code"),
        (with(icmp.clone(), "icmps", json!({"type": 8})), "names no code"),
        (with(icmp.clone(), "icmps", json!({"type": 256, "code": 0})), "type: `256`"),
        (with(icmp.clone(), "icmps", json!({"type": 8, "code": -2})), "code: `-2`"),
        (with(icmp.clone(), "icmps", json!({"type": "8", "code": 0})), "type: `\"8\"`"),
        (with(icmp, "icmps", json!([8, 0])), "icmps: it is not an object"),
    ]
}

#[test]
fn what_is_wrong_is_skipped_by_itself_and_says_why() {
    let good = json!({"networks": [{"start": "1.1.1.1"}]});
    for (wrong, why) in wrong() {
        let parsed = parse(json!([good, wrong, good]).to_string().as_bytes()).unwrap();
        let indices: Vec<u32> = parsed.rules.iter().map(|rule| rule.index).collect();
        assert_eq!(indices, [0, 2], "{wrong}");
        let [skipped] = parsed.skipped.as_slice() else { panic!("{wrong} is not skipped") };
        assert_eq!(skipped.index, 1);
        assert!(skipped.why.contains(why), "{wrong}: {}", skipped.why);
    }
    // What no value can hold spoils only the rule that it is in.
    let deep = format!("{}{}", "[".repeat(1000), "]".repeat(1000));
    let twice = r#"{"networks":[{"start":"1.1.1.1","Start":"0.0.0.0"}]}"#;
    for (wrong, why) in
        [(r#"{"protocol":1e999}"#, "read"), (deep.as_str(), "read"), (twice, "more than once")]
    {
        let parsed = parse(format!("[{good},{wrong},{good}]").as_bytes()).unwrap();
        assert_eq!((parsed.rules.len(), parsed.skipped.len()), (2, 1), "{wrong}");
        assert!(parsed.skipped[0].why.contains(why), "{}", parsed.skipped[0].why);
    }
}

#[test]
fn what_is_no_list_is_refused_whole() {
    assert_eq!(parse(b"").unwrap(), parse(b"[]").unwrap());
    for json in ["null", "{}", "7", "[", "[{}", "[{}]x", "\u{1}"] {
        assert!(refused(json.as_bytes()).contains("array"), "{json}");
    }
    refused(b"[\"\xff\"]");
}

#[test]
fn more_than_the_most_is_refused_whole() {
    let networks = |count: usize| -> Value { vec![json!({"start": "1.1.1.1"}); count].into() };
    let ports = |count: usize| -> Value { vec![json!({"start": 1}); count].into() };
    let product = |n, p| json!([{"protocol": 1, "networks": networks(n), "ports": ports(p)}]).to_string();
    assert_eq!(parse(product(200, MAX_RULES / 200).as_bytes()).unwrap().rules.len(), MAX_RULES);
    assert!(refused(product(200, MAX_RULES / 200 + 1).as_bytes()).contains("20000"));
    // However large, it is not worked out first.
    assert!(refused(product(30_000, 30_000).as_bytes()).contains("20000"));
    let many: Value = vec![json!({"networks": [{"start": "1.1.1.1"}]}); MAX_RULES + 1].into();
    assert!(refused(many.to_string().as_bytes()).contains("20000"));
    let wrong: Value = vec![json!(0); MAX_RULES + 1].into();
    assert!(refused(wrong.to_string().as_bytes()).contains("20000"));
    assert!(refused(&vec![b' '; MAX_BYTES + 1]).contains("bytes"));
}

fn range<T: Ord + Copy>(a: T, b: T) -> (T, T) {
    (a.min(b), a.max(b))
}

/// One of garden's rules, its names in small or capital letters, and what it means.
fn valid() -> impl Strategy<Value = (Value, Vec<(AddrRange, Traffic, bool)>)> {
    let networks = proptest::collection::vec(any::<(u32, u32)>().prop_map(|(a, b)| range(a, b)), 1..4);
    let ports = proptest::collection::vec(any::<(u16, u16)>().prop_map(|(a, b)| range(a, b)), 1..4);
    let number = proptest::option::of(0..255u8);
    (networks, ports, 0..4u8, (number.clone(), number), any::<(bool, bool)>()).prop_map(
        |(networks, ports, protocol, (kind, code), (log, upper))| {
            let name = |name: &str| if upper { name.to_uppercase() } else { name.to_owned() };
            let ends = |first: Value, last: Value| json!({name("start"): first, name("end"): last});
            let mut rule = Map::new();
            let addr = |bits: u32| Value::from(Ipv4Addr::from(bits).to_string());
            let listed: Vec<Value> = networks.iter().map(|(a, b)| ends(addr(*a), addr(*b))).collect();
            rule.insert(name("networks"), listed.into());
            rule.insert(name("protocol"), protocol.into());
            rule.insert(name("log"), log.into());
            let to_port = |(a, b): &(u16, u16)| PortRange::new(*a, *b).unwrap();
            let traffic: Vec<Traffic> = match protocol {
                0 => vec![Traffic::All],
                1 => ports.iter().map(to_port).map(Traffic::Tcp).collect(),
                2 => ports.iter().map(to_port).map(Traffic::Udp).collect(),
                _ => vec![Traffic::Icmp { kind, code }],
            };
            if matches!(protocol, 1 | 2) {
                let listed: Vec<Value> = ports.iter().map(|(a, b)| ends((*a).into(), (*b).into())).collect();
                rule.insert(name("ports"), listed.into());
            }
            if protocol == 3 {
                let number = |of: Option<u8>| of.unwrap_or(255);
                rule.insert(name("icmps"), json!({name("type"): number(kind), name("code"): number(code)}));
            }
            let to = |(a, b): &(u32, u32)| AddrRange::new((*a).into(), (*b).into()).unwrap();
            let pairs = networks.iter().flat_map(|n| traffic.iter().map(move |t| (to(n), *t, log)));
            let meant = pairs.collect();
            (rule.into(), meant)
        },
    )
}

proptest! {
    #[test]
    fn any_bytes_become_rules_or_a_reason(bytes in proptest::collection::vec(any::<u8>(), 0..300)) {
        let _: Result<_, Reason> = parse(&bytes);
    }

    #[test]
    fn anything_in_a_rule_becomes_rules_or_is_skipped(
        key in "(?i)protocol|networks|ports|icmps|log|start|type", value in "[0-9a-z\\[\\]{}\",:.-]{0,30}",
    ) {
        let rule = format!(r#"[{{"networks":[{{"start":"1.1.1.1"}}],"{key}":{value}}}]"#);
        if let Ok(parsed) = parse(rule.as_bytes()) {
            prop_assert!(parsed.rules.is_empty() != parsed.skipped.is_empty());
        }
    }

    #[test]
    fn what_is_right_arrives_as_it_was_meant_whatever_is_wrong_beside_it(
        passed in proptest::collection::vec(valid(), 0..8),
        wrong in proptest::sample::select(wrong()),
        at: prop::sample::Index,
    ) {
        let at = at.index(passed.len() + 1);
        let mut list: Vec<Value> = passed.iter().map(|(rule, _)| rule.clone()).collect();
        list.insert(at, wrong.0);
        let parsed = parse(Value::from(list).to_string().as_bytes()).unwrap();
        let expected = passed.iter().enumerate().flat_map(|(n, (_, meant))| {
            let index = u32::try_from(if n < at { n } else { n + 1 }).unwrap();
            meant.iter().map(move |(to, traffic, log)| EgressRule { to: *to, traffic: *traffic, log: *log, index })
        });
        prop_assert_eq!(parsed.rules, expected.collect::<Vec<_>>());
        prop_assert_eq!(parsed.skipped.iter().map(|skipped| skipped.index).collect::<Vec<_>>(), [u32::try_from(at).unwrap()]);
    }
}
