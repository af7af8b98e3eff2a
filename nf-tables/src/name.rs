//! Names of tables, chains and sets.

use std::cmp::Ordering;
use std::fmt;
use std::str::FromStr;
use std::sync::Arc;

/// 1 to 128 bytes: a lower-case letter, then lower-case letters, digits, `-` and `_`; and no word of the nft language, so
/// that what `nft list` prints can be read by `nft -f`. (The kernel takes up to 255 bytes of anything.)
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub struct Name {
    /// The first bytes, or all: tells most names apart without a look at the text.
    head: u64,
    text: Arc<str>,
}

impl Ord for Name {
    fn cmp(&self, other: &Self) -> Ordering {
        // Most names of one head that meet in a sorted map are one.
        self.head.cmp(&other.head).then_with(|| {
            if Arc::ptr_eq(&self.text, &other.text) { Ordering::Equal } else { self.text.cmp(&other.text) }
        })
    }
}

impl PartialOrd for Name {
    fn partial_cmp(&self, other: &Self) -> Option<Ordering> {
        Some(self.cmp(other))
    }
}

#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "`{0}` is not a name for nf_tables: 1 to 128 of `a-z`, `0-9`, `-` and `_`, a letter first, and no word of nft's own"
)]
pub struct NotAName(pub String);

impl Name {
    pub fn as_str(&self) -> &str {
        &self.text
    }
}

impl FromStr for Name {
    type Err = NotAName;

    fn from_str(text: &str) -> Result<Self, NotAName> {
        let clean =
            text.bytes().all(|b| b.is_ascii_lowercase() || b.is_ascii_digit() || matches!(b, b'-' | b'_'));
        let starts = text.starts_with(|c: char| c.is_ascii_lowercase());
        let fits = (1..=128).contains(&text.len());
        let own = RESERVED.binary_search(&text).is_err();
        if !(clean && starts && fits && own) {
            return Err(NotAName(text.to_owned()));
        }
        let mut head = [0; 8];
        head.iter_mut().zip(text.bytes()).for_each(|(head, byte)| *head = byte);
        Ok(Self { head: u64::from_be_bytes(head), text: text.into() })
    }
}

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.text)
    }
}

/// The words of the nft language that have the form of a name (nftables 1.1, src/scanner.l). Some are words only in their
/// place, and more of them with each version of `nft`.
const RESERVED: &[&str] = &[
    "accept",
    "add",
    "addr",
    "address",
    "after",
    "ah",
    "all",
    "and",
    "arp",
    "audit",
    "auto-merge",
    "base",
    "binop",
    "bridge",
    "bypass",
    "bytes",
    "cgroup",
    "cgroupv2",
    "chain",
    "chains",
    "ckey",
    "code",
    "comment",
    "comp",
    "concat",
    "constant",
    "continue",
    "count",
    "counter",
    "counters",
    "cpu",
    "create",
    "ct",
    "cwr",
    "daddr",
    "day",
    "dccp",
    "define",
    "delete",
    "describe",
    "destination",
    "destroy",
    "devgroup",
    "device",
    "devices",
    "direction",
    "dnat",
    "drop",
    "dst",
    "dup",
    "dynamic",
    "ecn",
    "element",
    "elements",
    "eq",
    "esp",
    "established",
    "ether",
    "exists",
    "expiration",
    "expires",
    "export",
    "exthdr",
    "family",
    "fib",
    "fin",
    "flag",
    "flags",
    "flow",
    "flowtable",
    "flowtables",
    "flush",
    "forever",
    "frag",
    "fragmentation",
    "fully-random",
    "fwd",
    "gc-interval",
    "ge",
    "geneve",
    "get",
    "ghdrchksum",
    "goto",
    "gre",
    "gretap",
    "group",
    "gt",
    "handle",
    "hash",
    "hbh",
    "helper",
    "hook",
    "hoplimit",
    "hour",
    "hours",
    "ibriport",
    "ibrname",
    "icmp",
    "icmpv6",
    "icmpx",
    "id",
    "igmp",
    "iif",
    "iifgroup",
    "iifkind",
    "iifname",
    "iiftype",
    "import",
    "in",
    "include",
    "index",
    "inet",
    "ingress",
    "insert",
    "interval",
    "ip",
    "ip6",
    "ipsec",
    "jhash",
    "jump",
    "key",
    "l2tp",
    "label",
    "last",
    "le",
    "length",
    "level",
    "limit",
    "list",
    "ll",
    "local",
    "log",
    "lshift",
    "lt",
    "map",
    "maps",
    "mark",
    "masquerade",
    "memory",
    "meta",
    "meter",
    "meters",
    "mh",
    "missing",
    "monitor",
    "ne",
    "netdev",
    "never",
    "new",
    "nexthdr",
    "nfproto",
    "nftrace",
    "ng",
    "nh",
    "no",
    "not",
    "notrack",
    "numgen",
    "obriport",
    "obrname",
    "offload",
    "offset",
    "oif",
    "oifgroup",
    "oifkind",
    "oifname",
    "oiftype",
    "options",
    "or",
    "original",
    "osf",
    "over",
    "owner",
    "packets",
    "performance",
    "persist",
    "persistent",
    "pkttype",
    "policy",
    "position",
    "prio",
    "priority",
    "protocol",
    "queue",
    "quota",
    "random",
    "rate",
    "redefine",
    "redirect",
    "reg",
    "reject",
    "related",
    "rename",
    "replace",
    "reply",
    "reset",
    "return",
    "rshift",
    "rt",
    "rt0",
    "rt2",
    "rtclassid",
    "rule",
    "ruleset",
    "saddr",
    "sample",
    "sctp",
    "secmark",
    "second",
    "seconds",
    "set",
    "sets",
    "size",
    "skgid",
    "skuid",
    "snaplen",
    "snat",
    "socket",
    "source",
    "sport",
    "sports",
    "src",
    "srh",
    "state",
    "stateless",
    "states",
    "status",
    "string",
    "symhash",
    "synproxy",
    "table",
    "tables",
    "tcp",
    "tcpopt",
    "th",
    "time",
    "timeout",
    "tproxy",
    "transparent",
    "ttl",
    "tunnel",
    "type",
    "typeof",
    "udp",
    "udplite",
    "undefine",
    "unknown",
    "update",
    "urgent",
    "used",
    "user",
    "via",
    "vlan",
    "vmap",
    "vni",
    "vxlan",
    "week",
    "wildcard",
    "wscale",
    "xor",
    "xt",
    "zone",
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_word_of_nft_is_a_name() {
        for word in RESERVED {
            assert_eq!(word.parse::<Name>(), Err(NotAName((*word).to_owned())));
            let longer = format!("{word}-1");
            assert!(longer.parse::<Name>().is_ok(), "{longer}");
        }
        assert!(RESERVED.is_sorted());
    }

    #[test]
    fn what_a_name_is() {
        let longest = "a".repeat(128);
        for name in ["a", "egress-0a1f", "x_9", &longest] {
            assert_eq!(name.parse::<Name>().map(|name| name.to_string()).as_deref(), Ok(name));
        }
        for none in ["", "A", "a.b", "9a", "-a", "_a", "a b", "a\0", "\u{e9}", &"a".repeat(129)] {
            assert!(none.parse::<Name>().is_err(), "{none}");
        }
    }
}
