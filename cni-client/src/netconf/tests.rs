use std::num::NonZeroU32;

use serde_json::json;
use weft_model::bandwidth::Limit;

use super::*;

fn read<'a, T>(text: &'a [u8], part: impl FnOnce(&Fields<'a>) -> Result<T, Reason>) -> Result<T, Reason> {
    part(&Fields::document(text)?)
}

fn addition_of(text: &[u8]) -> Result<Addition<'_>, Reason> {
    read(text, |conf| Addition::parse(conf, version_of(conf)?))
}

fn addition(conf: &Value) -> Addition<'static> {
    addition_of(conf.to_string().leak().as_bytes()).expect("valid")
}

/// The field that is refused, and what is said about it.
fn refused(conf: &str) -> (String, String) {
    let parsed = read(conf.as_bytes(), NetConf::parse).and_then(|_| addition_of(conf.as_bytes()));
    match parsed {
        Err(Reason::InvalidField { field, why }) => (field, why),
        Err(Reason::FieldUnsupported { field, value }) => (field, value),
        other => panic!("no field is named: {other:?}"),
    }
}

#[test]
fn what_garden_external_networker_passes_is_understood() {
    let text = br#"{"cniVersion":"1.0.0","name":"weft","type":"weft-cni","socket":"/s","mtu":1400,
        "metadata":{"app_id":"a","space_id":"s","org_id":"o","container_workload":"app","ports":"8080","x":1},
        "runtimeConfig":{"portMappings":[{"host_port":61000,"container_port":8080}],
            "netOutRules":[ {"networks" : 1} ],"other":1e999},
        "anything":[1]}"#;
    let conf = read(text, NetConf::parse).expect("valid");
    assert_eq!(conf.socket.to_str(), Some("/s"));
    let addition = addition_of(text).expect("valid");
    assert_eq!((addition.mtu, addition.owner.app_id.as_str()), (1400, "a"));
    let ports = addition.ports.iter().map(|mapping| (mapping.host.get(), mapping.container.get()));
    assert_eq!(ports.collect::<Vec<_>>(), [(61_000, 8080)]);
    assert_eq!(addition.net_out_rules, br#"[ {"networks" : 1} ]"#, "not looked into");
    assert_eq!(addition.settings, Settings::default());
}

#[test]
fn what_is_absent_or_null_is_as_by_default() {
    let plain = addition(&json!({"name": "n"}));
    assert_eq!((&plain.settings, &plain.owner, plain.mtu), (&Settings::default(), &Owner::default(), 0));
    assert!(plain.nameservers.is_empty() && plain.ports.is_empty() && plain.net_out_rules.is_empty());
    let null = json!({
        "name": "n", "mtu": null, "metadata": null, "dns_servers": null, "host_tcp_services": null,
        "host_udp_services": null, "deny_networks": {"always": null}, "outbound_connections": {},
        "no_masquerade_cidr_range": null, "iptables_asg_logging": null, "iptables_denied_logs_per_sec": null,
        "iptables_accepted_udp_logs_per_sec": null, "deny_cloud_metadata": null, "rate": null, "burst": 0,
        "runtimeConfig": {"portMappings": null, "netOutRules": null, "bandwidth": null},
    });
    assert_eq!(addition(&null), plain);
    assert_eq!(addition(&json!({"runtimeConfig": null, "no_masquerade_cidr_range": ""})), plain);
    assert_eq!(
        addition(&json!({"deny_networks": null, "outbound_connections": null, "dns_servers": []})),
        plain
    );
}

#[test]
fn limits_have_silks_units_or_those_of_the_conventions() {
    let limit = |rate, burst| Some(Limit::new(rate, burst).expect("a limit"));
    // silk's template multiplies by 1024, and the plugin that it uses divides bits by 8.
    let silks = addition(&json!({"rate": 10_240, "burst": 1024}));
    let (to, from) = (limit(1_310_720, 131_072), limit(1_310_720, 131_072));
    assert_eq!(silks.bandwidth, Bandwidth { to, from });
    let asked = json!({"ingressRate": 8_000_000, "ingressBurst": 800_000, "egressRate": 0, "egressBurst": 0});
    let conventional = addition(&json!({"rate": 1, "burst": 1, "runtimeConfig": {"bandwidth": asked}}));
    assert_eq!(conventional.bandwidth, Bandwidth { to: limit(1_000_000, 100_000), from: None });
}

#[test]
fn settings_have_silks_names_and_meaning() {
    let parsed = addition(&json!({
        "dns_servers": ["169.254.0.2", "2001:DB8::1"],
        "host_tcp_services": ["169.254.0.3:9001"],
        "host_udp_services": ["10.0.0.1:53"],
        "deny_networks": {"always": ["10.1.2.3/24"], "running": ["0.0.0.0/0"], "staging": ["1.2.3.4/32"]},
        "outbound_connections": {"limit": true, "logging": true, "burst": 5, "rate_per_sec": 2, "dry_run": false, "max": 9},
        "no_masquerade_cidr_range": "10.255.7.7/16",
        "iptables_asg_logging": true,
        "iptables_denied_logs_per_sec": 3,
        "iptables_accepted_udp_logs_per_sec": 4,
        "deny_cloud_metadata": false,
    }));
    assert_eq!(parsed.nameservers, ["169.254.0.2", "2001:DB8::1"], "as they were given");
    let settings = serde_json::to_value(&parsed.settings).expect("serialised");
    let expected = json!({
        "dns_servers": ["169.254.0.2"],
        "host_services": [
            {"transport": "tcp", "addr": "169.254.0.3", "port": 9001},
            {"transport": "udp", "addr": "10.0.0.1", "port": 53},
        ],
        "deny_networks": {"always": ["10.1.2.0/24"], "running": ["0.0.0.0/0"], "staging": ["1.2.3.4/32"]},
        "outbound_connections": {"rate": {"burst": 5, "per_sec": 2, "dry_run": false, "log": true}, "max": 9},
        "no_masquerade": "10.255.0.0/16",
        "log_all": true,
        "denied_logs_per_sec": 3,
        "accepted_udp_logs_per_sec": 4,
        "deny_cloud_metadata": false,
    });
    assert_eq!(settings, expected);
}

#[test]
fn connections_are_limited_or_tried_out_or_neither() {
    let rate = |outbound: Value| {
        let rate = addition(&json!({"outbound_connections": outbound})).settings.outbound_connections.rate;
        rate.map(|rate| (rate.burst.get(), rate.per_sec.get(), rate.dry_run, rate.log))
    };
    assert_eq!(rate(json!({"limit": false, "logging": true, "burst": 5, "rate_per_sec": 2})), None);
    assert_eq!(rate(json!({"limit": true})), Some((1000, 100, false, false)));
    assert_eq!(rate(json!({"limit": true, "logging": true})), Some((1000, 100, false, true)));
    assert_eq!(rate(json!({"limit": true, "dry_run": true})), Some((1000, 100, true, true)));
    assert_eq!(rate(json!({"dry_run": true})), Some((1000, 100, true, true)));
    let max = |max: Value| {
        addition(&json!({"outbound_connections": {"max": max}})).settings.outbound_connections.max
    };
    assert_eq!((max(json!(0)), max(json!(7))), (None, NonZeroU32::new(7)));
}

#[test]
fn ports_are_mapped_in_gardens_spelling_and_in_cnis() {
    let parsed = addition(&json!({"runtimeConfig": {"portMappings": [
        {"host_port": 1, "container_port": 65535},
        {"hostPort": 65535, "containerPort": 1, "protocol": "TCP", "hostIP": ""},
        {"hostPort": 2, "containerPort": 1, "protocol": "tcp", "hostIP": "0.0.0.0"},
    ]}}));
    let ports = parsed.ports.iter().map(|mapping| (mapping.host.get(), mapping.container.get()));
    assert_eq!(ports.collect::<Vec<_>>(), [(1, 65_535), (65_535, 1), (2, 1)]);
}

#[test]
fn a_wrong_field_is_named() {
    for (conf, field, why) in [
        (r#"{"cniVersion":"1.0.0"}"#, "name", "missing"),
        (r#"{"name":"-x"}"#, "name", "letter"),
        (r#"{"name":7}"#, "name", "`7`"),
        (r#"{"name":"n","socket":1}"#, "socket", "`1`"),
        (r#"{"name":"n","cniVersion":"1.0.0","prevResult":"x"}"#, "prevResult", "object"),
    ] {
        let (named, said) = refused(conf);
        assert!(named == field && said.contains(why), "{conf}: {named}: {said}");
    }
    for (wrong, field, why) in WRONG {
        let (named, said) = refused(&format!(r#"{{"name":"n",{wrong}}}"#));
        assert!(named == *field && said.contains(why), "{wrong}: {named}: {said}");
    }
}

const PORTS: &str = "runtimeConfig.portMappings";

/// What is wrong, the field that is named, and a word of what is said.
const WRONG: &[(&str, &str, &str)] = &[
    (r#""mtu":"big""#, "mtu", "bytes"),
    (r#""mtu":-1"#, "mtu", "`-1`"),
    (r#""metadata":[]"#, "metadata", "object"),
    (r#""rate":1024"#, "burst", "as well"),
    (r#""burst":1024"#, "rate", "as well"),
    (r#""rate":-1,"burst":1"#, "rate", "`-1`"),
    (r#""rate":1,"burst":"much""#, "burst", "whole number"),
    (r#""rate":18446744073709551615,"burst":1"#, "rate", "more than"),
    (r#""rate":1,"burst":34000000"#, "rate", "more than"),
    (r#""runtimeConfig":{"bandwidth":1}"#, "runtimeConfig.bandwidth", "object"),
    (r#""runtimeConfig":{"bandwidth":{"egressRate":1}}"#, "runtimeConfig.bandwidth.egressBurst", "as well"),
    (r#""dns_servers":["169.254.0.2","banana"]"#, "dns_servers", r#"invalid DNS server "banana""#),
    (r#""dns_servers":[1]"#, "dns_servers", "`1` is not a text"),
    (r#""dns_servers":"1.1.1.1""#, "dns_servers", "list"),
    (r#""host_tcp_services":["169.254.0.3"]"#, "host_tcp_services", "`169.254.0.3`"),
    (r#""host_tcp_services":["169.254.0.3:0"]"#, "host_tcp_services", "port"),
    (r#""host_udp_services":["169.254.0.3:x"]"#, "host_udp_services", "`169.254.0.3:x`"),
    (r#""host_udp_services":["[::1]:53"]"#, "host_udp_services", "IPv4"),
    (r#""host_udp_services":["localhost:53"]"#, "host_udp_services", "IPv4"),
    (r#""deny_networks":[]"#, "deny_networks", "object"),
    (r#""deny_networks":{"always":["1.2.3.4"]}"#, "deny_networks.always", "CIDR"),
    (r#""deny_networks":{"running":["1.2.3.4/33"]}"#, "deny_networks.running", "CIDR"),
    (r#""deny_networks":{"running":["1.2.3.4/+8"]}"#, "deny_networks.running", "CIDR"),
    (r#""deny_networks":{"staging":["2001:db8::/32"]}"#, "deny_networks.staging", "IPv4"),
    (r#""deny_networks":{"staging":["1.2.3.4/255.0.0.0"]}"#, "deny_networks.staging", "CIDR"),
    (r#""outbound_connections":7"#, "outbound_connections", "object"),
    (r#""outbound_connections":{"burst":0}"#, "outbound_connections.burst", "above 0"),
    (
        r#""outbound_connections":{"limit":false,"rate_per_sec":0}"#,
        "outbound_connections.rate_per_sec",
        "above 0",
    ),
    (r#""outbound_connections":{"burst":4294967296}"#, "outbound_connections.burst", "`4294967296`"),
    (r#""outbound_connections":{"limit":"yes"}"#, "outbound_connections.limit", "true or false"),
    (r#""outbound_connections":{"logging":1}"#, "outbound_connections.logging", "true or false"),
    (r#""outbound_connections":{"dry_run":1}"#, "outbound_connections.dry_run", "true or false"),
    (r#""outbound_connections":{"max":-1}"#, "outbound_connections.max", "`-1`"),
    (r#""no_masquerade_cidr_range":"10.255.0.0""#, "no_masquerade_cidr_range", "CIDR"),
    (r#""no_masquerade_cidr_range":10"#, "no_masquerade_cidr_range", "text"),
    (r#""iptables_asg_logging":"yes""#, "iptables_asg_logging", "true or false"),
    (r#""iptables_denied_logs_per_sec":0"#, "iptables_denied_logs_per_sec", "above 0"),
    (r#""iptables_denied_logs_per_sec":1.5"#, "iptables_denied_logs_per_sec", "`1.5`"),
    (r#""iptables_accepted_udp_logs_per_sec":-1"#, "iptables_accepted_udp_logs_per_sec", "above 0"),
    (r#""deny_cloud_metadata":0"#, "deny_cloud_metadata", "true or false"),
    (r#""deny_cloud_metadata":1e999"#, "deny_cloud_metadata", "cannot be read"),
    (r#""runtimeConfig":[]"#, "runtimeConfig", "object"),
    (r#""runtimeConfig":{"portMappings":{}}"#, PORTS, "list"),
    (r#""runtimeConfig":{"portMappings":[7]}"#, "runtimeConfig.portMappings[0]", "object"),
    (
        r#""runtimeConfig":{"portMappings":[{"host_port":1,"container_port":1},{"host_port":0,"container_port":1}]}"#,
        "runtimeConfig.portMappings[1].host_port",
        "`0`",
    ),
    (
        r#""runtimeConfig":{"portMappings":[{"hostPort":65536,"containerPort":1}]}"#,
        "runtimeConfig.portMappings[0].host_port",
        "`65536`",
    ),
    (
        r#""runtimeConfig":{"portMappings":[{"host_port":1}]}"#,
        "runtimeConfig.portMappings[0].container_port",
        "missing",
    ),
    (
        r#""runtimeConfig":{"portMappings":[{"host_port":1,"hostPort":2,"container_port":1}]}"#,
        "runtimeConfig.portMappings[0].host_port",
        "two spellings",
    ),
    (
        r#""runtimeConfig":{"portMappings":[{"host_port":9,"container_port":1},{"hostPort":9,"containerPort":2}]}"#,
        PORTS,
        "host_port: 9 is mapped twice",
    ),
    (
        r#""runtimeConfig":{"portMappings":[{"host_port":9,"container_port":1,"protocol":"udp"}]}"#,
        "runtimeConfig.portMappings[0].protocol",
        "udp",
    ),
    (
        r#""runtimeConfig":{"portMappings":[{"host_port":9,"container_port":1,"hostIP":"10.0.0.1"}]}"#,
        "runtimeConfig.portMappings[0].hostIP",
        "10.0.0.1",
    ),
    (r#""runtimeConfig":{"netOutRules":{}}"#, "runtimeConfig.netOutRules", "list"),
    (r#""runtimeConfig":{"netOutRules":"[]"}"#, "runtimeConfig.netOutRules", "list"),
];

#[test]
fn a_list_of_rules_that_is_too_long_is_refused() {
    let longest = weft_model::asg::garden::MAX_BYTES;
    let conf = |length: usize| {
        format!(r#"{{"name":"n","runtimeConfig":{{"netOutRules":[{}]}}}}"#, " ".repeat(length - 2))
    };
    assert!(addition_of(conf(longest).as_bytes()).is_ok());
    assert_eq!(refused(&conf(longest + 1)).0, "runtimeConfig.netOutRules");
}

proptest::proptest! {
    #[test]
    fn any_input_becomes_a_configuration_or_a_reason(bytes in proptest::collection::vec(proptest::num::u8::ANY, 0..300)) {
        let _: Result<_, Reason> = read(&bytes, version_of).and_then(|_| read(&bytes, NetConf::parse));
        let _: Result<_, Reason> = addition_of(&bytes);
        let _: Result<_, Reason> = read(&bytes, valid_attachments);
    }

    #[test]
    fn any_json_becomes_a_configuration_or_a_reason(
        key in "cniVersion|name|mtu|socket|metadata|prevResult|dns_servers|deny_networks|outbound_connections|runtimeConfig|rate|cni.dev/valid-attachments",
        value in "[0-9a-z\\[\\]{}\",:.-]{0,30}",
    ) {
        let conf = format!(r#"{{"name":"n","{key}":{value}}}"#);
        let conf = conf.as_bytes();
        let _: Result<_, Reason> = read(conf, version_of).and_then(|_| read(conf, NetConf::parse));
        let _: Result<_, Reason> = addition_of(conf);
        let _: Result<_, Reason> = read(conf, valid_attachments);
        let eth0 = "eth0".parse().expect("name");
        let _: Result<_, Reason> = read(conf, previous).and_then(|previous| previous.ours(&eth0));
    }
}
