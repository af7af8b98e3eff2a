//! Names that are taken here are taken by `nft`, wherever it reads one.

use nf_tables::Name;

use crate::world::World;

/// Words that stand anywhere in what `nft` reads, and some that stand in their place only.
#[rustfmt::skip]
const WORDS: &[&str] = &[
    "abort", "accept", "add", "ah", "all", "and", "arp", "auto-merge", "bridge", "broute", "cgroup",
    "chain", "comment", "comp", "constant", "continue", "counter", "cpu", "create", "ct", "data", "day",
    "dccp", "define", "delete", "describe", "destroy", "device", "devices", "dnat", "drop", "dst", "dup",
    "dynamic", "ecn", "element", "elements", "eq", "error", "erspan", "esp", "ether", "exists", "expires",
    "export", "exthdr", "fib", "flags", "flow", "flowtable", "flush", "frag", "fwd", "gc-interval", "ge",
    "geneve", "get", "goto", "gre", "gretap", "gt", "handle", "hbh", "hook", "hour", "ibrhwaddr",
    "ibriport", "ibrname", "ibrpvid", "ibrvproto", "icmp", "icmpv6", "igmp", "iif", "iifgroup", "iifname",
    "iiftype", "import", "include", "index", "inet", "init", "insert", "interval", "ip", "ip6", "ipsec",
    "jhash", "jump", "last", "le", "limit", "list", "ll", "log", "lshift", "lt", "map", "mark",
    "masquerade", "meta", "meter", "mh", "missing", "monitor", "ne", "netdev", "nftrace", "nh", "not",
    "notrack", "numgen", "obriport", "obrname", "offload", "oif", "oifgroup", "oifname", "oiftype", "or",
    "osf", "pkttype", "policy", "port", "position", "priority", "queue", "quota", "random", "redefine",
    "redirect", "reject", "rename", "replace", "reset", "return", "rshift", "rt", "rt0", "rt2",
    "rtclassid", "rule", "ruleset", "saddr", "sctp", "sdif", "sdifname", "secmark", "secpath", "set",
    "size", "skgid", "skuid", "snat", "socket", "srh", "symhash", "synproxy", "table", "tcp", "th", "time",
    "timeout", "to", "tproxy", "tunnel", "type", "typeof", "udp", "udplite", "undefine", "update", "vlan",
    "vmap", "vni", "vxlan", "window", "xor", "xt",
];

fn taken(world: &World, word: &str) -> bool {
    let (ok, _) = world.read_file(&format!(
        "table inet names {{
             set {word} {{ type ipv4_addr; }}
             chain {word} {{ ip saddr @{word} drop; }}
             chain first {{ jump {word}; }}
             map verdicts {{ type ipv4_addr : verdict; elements = {{ 10.0.0.1 : goto {word} }}; }}
         }}
         delete table inet names"
    ));
    ok
}

#[test]
fn what_nft_cannot_read_is_no_name() {
    let world = World::new();
    for word in WORDS {
        assert!(word.parse::<Name>().is_err() || taken(&world, word), "{word}");
    }
    for name in
        ["weft", "from-container", "egress-0a1b2c", "connections-100", "lines-accepted-udp-5", "set-1"]
    {
        assert!(name.parse::<Name>().is_ok() && taken(&world, name), "{name}");
    }
}
