use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn group(guid: &str, rules: &Value) -> SecurityGroup {
    let json = json!({ "next": 0, "security_groups": [{
        "guid": guid, "name": guid, "rules": rules.to_string(), "staging_default": false, "running_default": true,
        "staging_space_guids": ["s"], "running_space_guids": ["r"],
    }]});
    let mut page = parse(json.to_string().as_bytes()).expect("a page");
    assert_eq!(page.skipped, Vec::<String>::new());
    page.groups.remove(0)
}

fn shown(rules: &[EgressRule]) -> Vec<String> {
    rules.iter().map(|rule| format!("{}: {rule}", rule.index)).collect()
}

#[test]
fn rules_are_read_as_they_were_meant() {
    let read = group(
        "g",
        &json!([
            { "protocol": "tcp", "destination": "10.0.0.1, 010.001.2.3", "ports": "80, 443 - 445", "log": true },
            { "protocol": "all", "destination": "10.1.2.3/0", "ports": "", "type": 0, "code": 0, "log": false },
            { "protocol": "icmp", "destination": "10.1.2.3/8", "type": -1, "code": 3 },
            { "protocol": "icmp", "destination": "1.1.1.1-1.1.1.4", "type": 3, "code": -1, "description": "x" },
            { "protocol": "udp", "destination": "1.2.3.4/32", "ports": "0-65535" },
        ]),
    );
    assert_eq!(read.skipped, []);
    assert_eq!(
        shown(&read.rules),
        [
            "0: 10.0.0.1 tcp 80 log",
            "0: 10.0.0.1 tcp 443-445 log",
            "0: 10.1.2.3 tcp 80 log",
            "0: 10.1.2.3 tcp 443-445 log",
            "1: 0.0.0.0-255.255.255.255 all",
            "2: 10.0.0.0-10.255.255.255 icmp type any code 3",
            "3: 1.1.1.1-1.1.1.4 icmp type 3 code any",
            "4: 1.2.3.4 udp 0-65535",
        ]
    );
}

#[test]
fn what_is_wrong_is_skipped_alone() {
    let read = group(
        "g",
        &json!([
            { "protocol": "tcp", "destination": "2001:db8::/32,10.0.0.1,10.0.0.9-10.0.0.1,,+1.2.3.4,1.2.3", "ports": "x,80,70000,9-1" },
            { "protocol": "sctp", "destination": "10.0.0.1", "ports": "1" },
            { "protocol": "tcp", "destination": "10.0.0.1" },
            { "protocol": "all", "destination": "10.0.0.1", "ports": "1" },
            { "protocol": "icmp", "destination": "10.0.0.1", "type": 256 },
            { "protocol": "all", "destination": "10.0.0.1/33" },
            7,
            { "protocol": "all", "destination": "10.0.0.2" },
        ]),
    );
    assert_eq!(shown(&read.rules), ["0: 10.0.0.1 tcp 80", "7: 10.0.0.2 all"]);
    let skipped: Vec<u32> = read.skipped.iter().map(|skipped| skipped.index).collect();
    assert_eq!(skipped, [0, 0, 0, 0, 0, 0, 0, 0, 1, 2, 3, 4, 5, 6], "{:?}", read.skipped);
    assert!(read.skipped.iter().any(|skipped| skipped.why.contains("IPv6")), "{:?}", read.skipped);
    assert_eq!(read.listed, 8);
}

#[test]
fn a_group_that_cannot_be_read_leaves_the_others() {
    let json = json!({ "next": 7, "security_groups": [
        { "name": "no guid" },
        { "guid": "torn", "rules": "[{" },
        { "guid": "none", "rules": "null", "running_space_guids": null },
        { "guid": "empty" },
    ]});
    let page = parse(json.to_string().as_bytes()).expect("a page");
    assert_eq!((page.next, page.skipped.len()), (7, 1));
    let skipped: Vec<_> =
        page.groups.iter().map(|group| (group.guid.as_str(), group.skipped.len())).collect();
    assert_eq!(skipped, [("torn", 1), ("none", 0), ("empty", 0)]);
    assert!(parse(b"[]").is_err() && parse(b"").is_err());
}

#[test]
fn lists_that_multiply_are_bounded() {
    let many = vec!["1.1.1.1"; 200].join(",");
    let ports = vec!["1"; 200].join(",");
    let read = group(
        "g",
        &json!([
            { "protocol": "tcp", "destination": many, "ports": ports },
            { "protocol": "all", "destination": "10.0.0.2" },
        ]),
    );
    assert_eq!((shown(&read.rules), read.skipped.len()), (vec!["1: 10.0.0.2 all".into()], 1));
}

fn all(to: &str) -> Value {
    json!([{ "protocol": "nonsense" }, { "protocol": "all", "destination": to }])
}

#[test]
fn containers_get_the_rules_of_their_space_and_workload() {
    let running = group("default", &all("1.1.1.1"));
    let mut bound = SecurityGroup { running_default: false, ..group("bound", &all("2.2.2.2")) };
    bound.running_spaces.insert("t".into());
    let groups = [running.clone(), bound.clone(), bound, SecurityGroup { staging_default: true, ..running }];

    let rules = |space, workload| shown(&rules_for(&groups, space, workload));
    assert_eq!(rules("t", Workload::Running), ["1: 1.1.1.1 all", "3: 2.2.2.2 all"], "each group once");
    assert_eq!(rules("other", Workload::Running), ["1: 1.1.1.1 all"]);
    assert_eq!(rules("s", Workload::Staging), ["1: 1.1.1.1 all", "3: 2.2.2.2 all"]);
    assert_eq!(rules("t", Workload::Staging), ["1: 1.1.1.1 all"], "only the copy is a default for staging");
    assert_eq!(rules("t", Workload::Other), [""; 0]);
    assert_eq!(rules("", Workload::Running), [""; 0]);

    let from = |index| {
        origin(&groups, "t", Workload::Running, index).map(|(group, rule)| (group.guid.as_str(), rule))
    };
    assert_eq!([from(0), from(1)], [Some(("default", 0)), Some(("default", 1))]);
    assert_eq!([from(2), from(3), from(4)], [Some(("bound", 0)), Some(("bound", 1)), None]);
}

fn named(guids: &[u8]) -> Vec<SecurityGroup> {
    let group = |n: &u8| SecurityGroup { guid: n.to_string(), ..SecurityGroup::default() };
    guids.iter().map(group).collect()
}

proptest! {
    #[test]
    fn no_bytes_make_it_panic(bytes: Vec<u8>, text in r#"[\[\]{}":,a-z0-9.\-/ é]{0,60}"#) {
        drop(parse(&bytes));
        drop(parse(text.as_bytes()));
        drop(SecurityGroup::default().with_rules(&text));
        let mut skip = |_| {};
        for field in ["protocol", "destination", "ports", "type", "log"] {
            let mut rule = json!({ "protocol": "tcp", "destination": "1.1.1.1", "ports": "1" });
            rule[field] = json!(text);
            drop(Rule::parse(&rule.to_string(), &mut skip));
        }
    }

    #[test]
    fn a_network_is_from_its_first_to_its_last_address(bits: u32, prefix in 0u8..=32) {
        let addr = std::net::Ipv4Addr::from_bits(bits);
        let read = group("g", &json!([{ "protocol": "all", "destination": format!("{addr}/{prefix}") }]));
        let network = ipnetwork::Ipv4Network::new(addr, prefix).expect("a network");
        prop_assert_eq!(read.rules[0].to.first(), network.network());
        prop_assert_eq!(read.rules[0].to.last(), network.broadcast());
    }

    #[test]
    fn parts_of_a_list_merge_into_it(list in prop::collection::btree_map(any::<u8>(), 0u8..3, 0..20)) {
        let part = |own: u8| {
            let here = |n: &&u8| list[*n] == own || list[*n] == 2;
            named(&list.keys().filter(here).copied().collect::<Vec<u8>>())
        };
        let merged = merge(part(0), part(1));
        let mut guids: Vec<_> = merged.iter().map(|group| group.guid.parse::<u8>().expect("number")).collect();
        // Where both lists have it, all that comes before it in either does so in the merged one.
        for (common, _) in list.iter().filter(|(_, place)| **place == 2) {
            let at = guids.iter().position(|n| n == common).expect("in both");
            prop_assert!(guids[..at].iter().all(|n| n < common) && guids[at + 1..].iter().all(|n| n > common));
        }
        guids.sort_unstable();
        prop_assert!(guids.iter().eq(list.keys()));
    }

    #[test]
    fn every_rule_has_an_origin(counts in prop::collection::vec(0u32..4, 0..6)) {
        let groups: Vec<_> = (0..).zip(&counts).map(|(n, count)| {
            let rules = (0..*count).map(|_| json!({ "protocol": "all", "destination": "1.1.1.1" })).collect();
            group(&format!("{n}"), &Value::Array(rules))
        }).collect();
        let rules = rules_for(&groups, "x", Workload::Running);
        prop_assert!(rules.iter().map(|rule| rule.index).eq(0..counts.iter().sum()));
        for rule in rules {
            let (group, index) = origin(&groups, "x", Workload::Running, rule.index).expect("an origin");
            prop_assert_eq!(group.rules[usize::try_from(index).expect("small")].to, rule.to);
        }
    }
}
