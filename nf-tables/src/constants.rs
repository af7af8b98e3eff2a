//! Every number of the wire format that is written or looked for, with the Linux version that brought it: the one place
//! to see what the oldest kernel must know. A test refuses what is newer than 5.15. (Versions before 5.0 were not looked
//! up one by one: they may be off by one or two.)
//!
//! Names and values are those of linux/netlink.h, linux/netfilter.h, linux/netfilter/{nfnetlink,nf_tables,nf_nat}.h;
//! names of expressions those that net/netfilter registers. The user data (`NFTNL_UDATA_*`) is not read by the kernel:
//! it is `nft`'s, by libnftnl's udata.h.

/// A number, or a word, of the wire format.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Constant {
    pub name: &'static str,
    /// As written in the source.
    pub value: &'static str,
    /// Major and minor version of the first Linux that knows it. 2.6 stands for all before.
    pub since: (u16, u16),
}

macro_rules! constants {
    ($($(#[$doc:meta])* ($major:literal, $minor:literal) $kind:ty { $($name:ident = $value:expr;)* })*) => {
        $($(pub(crate) const $name: $kind = $value;)*)*

        /// All of them.
        pub const ALL: &[Constant] = &[
            $($(Constant { name: stringify!($name), value: stringify!($value), since: ($major, $minor) },)*)*
        ];
    };
}

constants! {
    // Netlink's own.
    (2, 6) u16 {
        NLMSG_ERROR = 2;
        NLMSG_DONE = 3;
        NLMSG_MIN_TYPE = 0x10;
        NLM_F_REQUEST = 0x1;
        NLM_F_ACK = 0x4;
        NLM_F_DUMP = 0x300;
        NLM_F_EXCL = 0x200;
        NLM_F_CREATE = 0x400;
        NLM_F_APPEND = 0x800;
        NLA_F_NESTED = 0x8000;
        NLA_F_NET_BYTEORDER = 0x4000;
    }
    (3, 1) u16 { NLM_F_DUMP_INTR = 0x10; }
    (4, 1) u16 { NFTA_SET_ELEM_EXPR = 7; }
    (4, 3) u16 { NLM_F_CAPPED = 0x100; }
    (4, 12) u16 {
        NLM_F_ACK_TLVS = 0x200;
        NLMSGERR_ATTR_MSG = 1;
    }

    // nfnetlink.
    (2, 6) u8 { NFNETLINK_V0 = 0; }
    (2, 6) u8 { NFPROTO_IPV4 = 2; }
    (3, 14) u8 { NFPROTO_INET = 1; }
    (3, 13) u16 {
        NFNL_SUBSYS_NFTABLES = 10;
        NFNL_MSG_BATCH_BEGIN = NLMSG_MIN_TYPE;
        NFNL_MSG_BATCH_END = NLMSG_MIN_TYPE + 1;
    }
    (4, 11) u16 { NFNL_BATCH_GENID = 1; }

    // Messages.
    (3, 13) u16 {
        NFT_MSG_NEWTABLE = 0;
        NFT_MSG_GETTABLE = 1;
        NFT_MSG_DELTABLE = 2;
        NFT_MSG_NEWCHAIN = 3;
        NFT_MSG_GETCHAIN = 4;
        NFT_MSG_DELCHAIN = 5;
        NFT_MSG_NEWRULE = 6;
        NFT_MSG_GETRULE = 7;
        NFT_MSG_DELRULE = 8;
        NFT_MSG_NEWSET = 9;
        NFT_MSG_GETSET = 10;
        NFT_MSG_DELSET = 11;
        NFT_MSG_NEWSETELEM = 12;
        NFT_MSG_GETSETELEM = 13;
        NFT_MSG_DELSETELEM = 14;
    }
    (3, 18) u16 {
        NFT_MSG_NEWGEN = 15;
        NFT_MSG_GETGEN = 16;
        NFTA_GEN_ID = 1;
    }
    (4, 15) u16 {
        NFTA_GEN_PROC_PID = 2;
        NFTA_GEN_PROC_NAME = 3;
    }

    // Tables, chains, rules.
    (3, 13) u16 {
        NFTA_TABLE_NAME = 1;
        NFTA_CHAIN_TABLE = 1;
        NFTA_CHAIN_NAME = 3;
        NFTA_CHAIN_HOOK = 4;
        NFTA_CHAIN_POLICY = 5;
        NFTA_CHAIN_TYPE = 7;
        NFTA_HOOK_HOOKNUM = 1;
        NFTA_HOOK_PRIORITY = 2;
        NFTA_RULE_TABLE = 1;
        NFTA_RULE_CHAIN = 2;
        NFTA_RULE_HANDLE = 3;
        NFTA_RULE_EXPRESSIONS = 4;
        NFTA_LIST_ELEM = 1;
        NFTA_EXPR_NAME = 1;
        NFTA_EXPR_DATA = 2;
    }
    (3, 15) u16 { NFTA_RULE_USERDATA = 7; }
    (3, 13) u32 {
        NF_DROP = 0;
        NF_ACCEPT = 1;
        NF_INET_PRE_ROUTING = 0;
        NF_INET_LOCAL_IN = 1;
        NF_INET_FORWARD = 2;
        NF_INET_LOCAL_OUT = 3;
        NF_INET_POST_ROUTING = 4;
    }
    (3, 13) &str { CHAIN_TYPE_FILTER = "filter"; }
    /// For the family inet.
    (5, 2) &str { CHAIN_TYPE_NAT = "nat"; }

    // Sets and elements.
    (3, 13) u16 {
        NFTA_SET_TABLE = 1;
        NFTA_SET_NAME = 2;
        NFTA_SET_FLAGS = 3;
        NFTA_SET_KEY_TYPE = 4;
        NFTA_SET_KEY_LEN = 5;
        NFTA_SET_DATA_TYPE = 6;
        NFTA_SET_DATA_LEN = 7;
        NFTA_SET_ELEM_KEY = 1;
        NFTA_SET_ELEM_DATA = 2;
        NFTA_SET_ELEM_FLAGS = 3;
        NFTA_SET_ELEM_LIST_TABLE = 1;
        NFTA_SET_ELEM_LIST_SET = 2;
        NFTA_SET_ELEM_LIST_ELEMENTS = 3;
        NFTA_DATA_VALUE = 1;
        NFTA_DATA_VERDICT = 2;
        NFTA_VERDICT_CODE = 1;
        NFTA_VERDICT_CHAIN = 2;
    }
    (3, 16) u16 {
        NFTA_SET_DESC = 9;
        NFTA_SET_DESC_SIZE = 1;
        NFTA_SET_ID = 10;
        NFTA_SET_ELEM_LIST_SET_ID = 4;
    }
    (4, 1) u16 { NFTA_SET_TIMEOUT = 11; }
    (4, 6) u16 { NFTA_SET_USERDATA = 13; }
    (5, 6) u16 {
        NFTA_SET_DESC_CONCAT = 2;
        NFTA_SET_FIELD_LEN = 1;
        NFTA_SET_ELEM_KEY_END = 10;
    }
    (3, 13) u32 {
        NFT_SET_INTERVAL = 0x4;
        NFT_SET_MAP = 0x8;
        NFT_DATA_VERDICT = 0xffff_ff00;
    }
    (4, 1) u32 {
        NFT_SET_TIMEOUT = 0x10;
        NFT_SET_EVAL = 0x20;
    }
    (5, 6) u32 { NFT_SET_CONCAT = 0x80; }
    (3, 13) i32 {
        NFT_JUMP = -3;
        NFT_GOTO = -4;
        NFT_RETURN = -5;
    }

    // Registers.
    (3, 13) u32 {
        NFT_REG_VERDICT = 0;
        NFT_REG_1 = 1;
        NFT_REG_4 = 4;
    }
    (4, 1) u32 {
        NFT_REG32_00 = 8;
        NFT_REG32_15 = 23;
    }

    // Expressions.
    (3, 13) &str {
        META = "meta";
        CT = "ct";
        PAYLOAD = "payload";
        BITWISE = "bitwise";
        CMP = "cmp";
        IMMEDIATE = "immediate";
        LOOKUP = "lookup";
        COUNTER = "counter";
        LIMIT = "limit";
        LOG = "log";
    }
    /// For the family inet.
    (3, 14) &str { REJECT = "reject"; }
    (4, 1) &str {
        DYNSET = "dynset";
        EXTHDR = "exthdr";
        BYTEORDER = "byteorder";
    }
    (4, 10) &str { RT = "rt"; }
    (4, 18) &str { CONNLIMIT = "connlimit"; }
    /// For the family inet.
    (5, 2) &str {
        NAT = "nat";
        MASQ = "masq";
    }
    (3, 13) u16 {
        NFTA_META_DREG = 1;
        NFTA_META_KEY = 2;
        NFTA_CT_DREG = 1;
        NFTA_CT_KEY = 2;
        NFTA_PAYLOAD_DREG = 1;
        NFTA_PAYLOAD_BASE = 2;
        NFTA_PAYLOAD_OFFSET = 3;
        NFTA_PAYLOAD_LEN = 4;
        NFTA_BITWISE_SREG = 1;
        NFTA_BITWISE_DREG = 2;
        NFTA_BITWISE_LEN = 3;
        NFTA_BITWISE_MASK = 4;
        NFTA_BITWISE_XOR = 5;
        NFTA_CMP_SREG = 1;
        NFTA_CMP_OP = 2;
        NFTA_CMP_DATA = 3;
        NFTA_IMMEDIATE_DREG = 1;
        NFTA_IMMEDIATE_DATA = 2;
        NFTA_LOOKUP_SET = 1;
        NFTA_LOOKUP_SREG = 2;
        NFTA_LOOKUP_DREG = 3;
        NFTA_COUNTER_PACKETS = 2;
        NFTA_LIMIT_RATE = 1;
        NFTA_LIMIT_UNIT = 2;
        NFTA_LOG_GROUP = 1;
        NFTA_LOG_PREFIX = 2;
        NFTA_LOG_SNAPLEN = 3;
        NFTA_LOG_QTHRESHOLD = 4;
        NFTA_NAT_TYPE = 1;
        NFTA_NAT_FAMILY = 2;
        NFTA_NAT_REG_ADDR_MIN = 3;
        NFTA_NAT_REG_ADDR_MAX = 4;
        NFTA_NAT_REG_PROTO_MIN = 5;
        NFTA_NAT_REG_PROTO_MAX = 6;
        NFTA_REJECT_TYPE = 1;
        NFTA_REJECT_ICMP_CODE = 2;
    }
    (3, 14) u16 {
        NFTA_META_SREG = 3;
        NFTA_CT_SREG = 4;
    }
    (3, 16) u16 {
        NFTA_LOOKUP_SET_ID = 4;
        NFTA_LOG_LEVEL = 5;
        NFTA_LOG_FLAGS = 6;
    }
    (3, 18) u16 {
        NFTA_NAT_FLAGS = 7;
        NFTA_MASQ_FLAGS = 1;
    }
    (4, 1) u16 {
        NFTA_DYNSET_SET_NAME = 1;
        NFTA_DYNSET_SET_ID = 2;
        NFTA_DYNSET_OP = 3;
        NFTA_DYNSET_SREG_KEY = 4;
        NFTA_DYNSET_SREG_DATA = 5;
        NFTA_DYNSET_TIMEOUT = 6;
        NFTA_DYNSET_EXPR = 7;
        NFTA_DYNSET_FLAGS = 9;
    }
    (4, 3) u16 {
        NFTA_LIMIT_BURST = 3;
        NFTA_LIMIT_TYPE = 4;
    }
    (4, 5) u16 { NFTA_LIMIT_FLAGS = 5; }
    (4, 6) u16 { NFTA_MASQ_REG_PROTO_MIN = 2; }
    (4, 8) u16 { NFTA_LOOKUP_FLAGS = 5; }
    (3, 13) u16 {
        NFTA_EXTHDR_TYPE = 2;
        NFTA_EXTHDR_OFFSET = 3;
        NFTA_EXTHDR_LEN = 4;
        NFTA_BYTEORDER_SREG = 1;
        NFTA_BYTEORDER_DREG = 2;
        NFTA_BYTEORDER_OP = 3;
        NFTA_BYTEORDER_LEN = 4;
        NFTA_BYTEORDER_SIZE = 5;
    }
    (4, 10) u16 {
        NFTA_RT_DREG = 1;
        NFTA_RT_KEY = 2;
    }
    (4, 11) u16 {
        NFTA_EXTHDR_FLAGS = 5;
        NFTA_EXTHDR_OP = 6;
    }
    (4, 14) u16 { NFTA_EXTHDR_SREG = 7; }
    (3, 13) u32 { NFT_BYTEORDER_HTON = 1; }
    (4, 11) u32 { NFT_EXTHDR_OP_TCPOPT = 1; }
    (4, 14) u32 { NFT_RT_TCPMSS = 3; }
    /// linux/tcp.h.
    (2, 6) u8 { TCPOPT_MSS = 2; }
    (4, 18) u16 {
        NFTA_CONNLIMIT_COUNT = 1;
        NFTA_CONNLIMIT_FLAGS = 2;
    }
    (5, 6) u16 { NFTA_BITWISE_OP = 6; }
    (5, 11) u16 { NFTA_DYNSET_EXPRESSIONS = 10; }
    (3, 13) u32 {
        NFT_META_MARK = 3;
        NFT_META_IIF = 4;
        NFT_META_IIFNAME = 6;
        NFT_META_OIFNAME = 7;
        NFT_CT_STATE = 0;
        NFT_CT_DIRECTION = 1;
        NFT_CT_MARK = 3;
        NFT_PAYLOAD_NETWORK_HEADER = 1;
        NFT_PAYLOAD_TRANSPORT_HEADER = 2;
        NFT_CMP_EQ = 0;
        NFT_CMP_NEQ = 1;
        NFT_NAT_DNAT = 1;
    }
    (3, 14) u32 {
        NFT_META_NFPROTO = 15;
        NFT_META_L4PROTO = 16;
    }
    (3, 18) u32 { NFT_REJECT_ICMPX_UNREACH = 2; }
    (3, 18) u8 { NFT_REJECT_ICMPX_PORT_UNREACH = 1; }
    (4, 1) u32 { NFT_DYNSET_OP_UPDATE = 1; }
    (5, 11) u32 { NFT_DYNSET_F_EXPR = 2; }
    (4, 3) u32 { NFT_LIMIT_PKTS = 0; }
    (4, 5) u32 { NFT_LIMIT_F_INV = 1; }
    (4, 8) u32 { NFT_LOOKUP_F_INV = 1; }
    (4, 18) u32 { NFT_CONNLIMIT_F_INV = 1; }
    (5, 6) u32 { NFT_BITWISE_MASK_XOR = 0; }
    (3, 18) u32 {
        NF_NAT_RANGE_MAP_IPS = 1;
        NF_NAT_RANGE_PROTO_SPECIFIED = 2;
    }

    // What `nft` alone reads.
    (3, 15) u8 { NFTNL_UDATA_RULE_COMMENT = 0; }
    (4, 6) u8 {
        NFTNL_UDATA_SET_KEYBYTEORDER = 0;
        NFTNL_UDATA_SET_DATABYTEORDER = 1;
    }
    /// Data types of `nft`, so that it prints keys as what they are; to the kernel any number is good.
    (3, 13) u32 {
        TYPE_IPADDR = 7;
        TYPE_INET_PROTOCOL = 12;
        TYPE_INET_SERVICE = 13;
        TYPE_ICMP_TYPE = 14;
        TYPE_MARK = 19;
        TYPE_IFINDEX = 20;
        TYPE_ICMP_CODE = 32;
        TYPE_IFNAME = 41;
    }
    (4, 6) u32 {
        BYTEORDER_HOST_ENDIAN = 1;
        BYTEORDER_BIG_ENDIAN = 2;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Ubuntu Jammy's kernel, the oldest that cells run.
    const OLDEST: (u16, u16) = (5, 15);

    #[test]
    fn nothing_is_newer_than_the_oldest_kernel() {
        for constant in ALL {
            assert!(constant.since <= OLDEST, "{} came with {:?}", constant.name, constant.since);
        }
    }

    #[test]
    fn each_is_named_once() {
        let mut names: Vec<&str> = ALL.iter().map(|constant| constant.name).collect();
        names.sort_unstable();
        let all = names.len();
        names.dedup();
        assert_eq!(names.len(), all);
    }
}
