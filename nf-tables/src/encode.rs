//! Values as attributes: rules with their expressions, sets and elements, as linux/netfilter/nf_tables.h lays them out.

use std::collections::BTreeMap;

use crate::constants::*;
use crate::expression::{Comparison, Connection, Expression, Header, Lookup, Metadata, Slot, Stateful};
use crate::field::{Field, Key};
use crate::name::Name;
use crate::rule::{Base, Hook, Kind, Rule, Verdict};
use crate::set::{Data, Set, Target};
use crate::wire::Writer;

/// Sets that a batch makes itself, by the number it gave them.
pub(crate) type SetIds = BTreeMap<Name, u32>;

/// What the comment's length, one byte, leaves room for beside the zero at its end, in NFT_USERDATA_MAXLEN.
const COMMENT: usize = 253;

impl Field {
    /// `nft`'s number for how it is printed.
    pub(crate) const fn data_type(self) -> u32 {
        match self {
            Self::Ipv4 => TYPE_IPADDR,
            Self::Protocol => TYPE_INET_PROTOCOL,
            Self::Port => TYPE_INET_SERVICE,
            Self::IcmpType => TYPE_ICMP_TYPE,
            Self::IcmpCode => TYPE_ICMP_CODE,
            Self::Mark => TYPE_MARK,
            Self::InterfaceIndex => TYPE_IFINDEX,
            Self::InterfaceName => TYPE_IFNAME,
        }
    }

    const fn byte_order(self) -> u32 {
        match self {
            Self::Mark | Self::InterfaceIndex | Self::InterfaceName => BYTEORDER_HOST_ENDIAN,
            Self::Ipv4 | Self::Protocol | Self::Port | Self::IcmpType | Self::IcmpCode => {
                BYTEORDER_BIG_ENDIAN
            }
        }
    }
}

/// `nft`'s number for a concatenation: six bits for each field, the first one's on top.
pub(crate) fn data_type(fields: &[Field]) -> u32 {
    fields.iter().fold(0, |all, field| all << 6 | field.data_type())
}

pub(crate) fn base(out: &mut Writer, base: &Base) {
    let hook = match base.hook {
        Hook::Prerouting => NF_INET_PRE_ROUTING,
        Hook::Input => NF_INET_LOCAL_IN,
        Hook::Forward => NF_INET_FORWARD,
        Hook::Output => NF_INET_LOCAL_OUT,
        Hook::Postrouting => NF_INET_POST_ROUTING,
    };
    out.nest(NFTA_CHAIN_HOOK, |out| {
        out.be32(NFTA_HOOK_HOOKNUM, hook);
        out.bytes(NFTA_HOOK_PRIORITY, &base.priority.to_be_bytes());
    });
    out.be32(NFTA_CHAIN_POLICY, NF_ACCEPT);
    let kind = match base.kind {
        Kind::Filter => CHAIN_TYPE_FILTER,
        Kind::Nat => CHAIN_TYPE_NAT,
    };
    out.text(NFTA_CHAIN_TYPE, kind);
}

pub(crate) fn set(out: &mut Writer, set: &Set) {
    let mut flags = 0;
    if set.ranges {
        flags |= NFT_SET_INTERVAL | NFT_SET_CONCAT;
    }
    if set.target != Target::Nothing {
        flags |= NFT_SET_MAP;
    }
    if let Some(dynamic) = set.dynamic {
        flags |= NFT_SET_EVAL;
        if dynamic.timeout.is_some() {
            flags |= NFT_SET_TIMEOUT;
        }
    }
    out.be32(NFTA_SET_FLAGS, flags);
    out.be32(NFTA_SET_KEY_TYPE, data_type(&set.key.0));
    out.be32(NFTA_SET_KEY_LEN, set.key.len());
    match &set.target {
        Target::Nothing => {}
        Target::Verdict => out.be32(NFTA_SET_DATA_TYPE, NFT_DATA_VERDICT),
        Target::Value(fields) => {
            out.be32(NFTA_SET_DATA_TYPE, data_type(fields));
            out.be32(NFTA_SET_DATA_LEN, Key(fields.clone()).len());
        }
    }
    if set.ranges || set.dynamic.is_some() {
        out.nest(NFTA_SET_DESC, |out| {
            if let Some(dynamic) = set.dynamic {
                out.be32(NFTA_SET_DESC_SIZE, dynamic.size);
            }
            if set.ranges {
                out.nest(NFTA_SET_DESC_CONCAT, |out| {
                    for field in &set.key.0 {
                        out.nest(NFTA_LIST_ELEM, |out| out.be32(NFTA_SET_FIELD_LEN, field.len()));
                    }
                });
            }
        });
    }
    if let Some(timeout) = set.dynamic.and_then(|dynamic| dynamic.timeout) {
        out.be64(NFTA_SET_TIMEOUT, timeout);
    }
    let mut orders = byte_order(NFTNL_UDATA_SET_KEYBYTEORDER, &set.key.0);
    if let Target::Value(fields) = &set.target {
        orders.extend(byte_order(NFTNL_UDATA_SET_DATABYTEORDER, fields));
    }
    if !orders.is_empty() {
        out.bytes(NFTA_SET_USERDATA, &orders);
    }
}

/// Tells `nft` how to read a single field; those of a concatenation it knows by their types.
fn byte_order(kind: u8, fields: &[Field]) -> Vec<u8> {
    match fields {
        [one] => [&[kind, 4][..], &one.byte_order().to_ne_bytes()].concat(),
        _ => Vec::new(),
    }
}

/// One element, with its place in the list.
pub(crate) fn element(out: &mut Writer, key: &[u8], end: Option<&[u8]>, data: &Data) {
    out.nest(NFTA_LIST_ELEM, |out| {
        out.nest(NFTA_SET_ELEM_KEY, |out| out.bytes(NFTA_DATA_VALUE, key));
        if let Some(end) = end {
            out.nest(NFTA_SET_ELEM_KEY_END, |out| out.bytes(NFTA_DATA_VALUE, end));
        }
        match data {
            Data::Nothing => {}
            Data::Verdict(to) => out.nest(NFTA_SET_ELEM_DATA, |out| verdict(out, to)),
            Data::Value(value) => out.nest(NFTA_SET_ELEM_DATA, |out| out.bytes(NFTA_DATA_VALUE, value)),
        }
    });
}

pub(crate) fn rule(out: &mut Writer, rule: &Rule, sets: &SetIds) {
    out.nest(NFTA_RULE_EXPRESSIONS, |out| {
        for expression in &rule.expressions {
            self::expression(out, expression, sets);
        }
    });
    let comment = &rule.comment[..rule.comment.floor_char_boundary(COMMENT)];
    if !comment.is_empty() {
        let length = u8::try_from(comment.len() + 1).unwrap_or(u8::MAX);
        let user = [&[NFTNL_UDATA_RULE_COMMENT, length], comment.as_bytes(), &[0]].concat();
        out.bytes(NFTA_RULE_USERDATA, &user);
    }
}

fn verdict(out: &mut Writer, to: &Verdict) {
    let (code, chain) = match to {
        Verdict::Accept => (NF_ACCEPT.to_be_bytes(), None),
        Verdict::Drop => (NF_DROP.to_be_bytes(), None),
        Verdict::Return => (NFT_RETURN.to_be_bytes(), None),
        Verdict::Jump(chain) => (NFT_JUMP.to_be_bytes(), Some(chain)),
        Verdict::Goto(chain) => (NFT_GOTO.to_be_bytes(), Some(chain)),
    };
    out.nest(NFTA_DATA_VERDICT, |out| {
        out.bytes(NFTA_VERDICT_CODE, &code);
        if let Some(chain) = chain {
            out.text(NFTA_VERDICT_CHAIN, chain.as_str());
        }
    });
}

/// As an item of a list.
fn named(out: &mut Writer, kind: u16, name: &str, body: impl FnOnce(&mut Writer)) {
    out.nest(kind, |out| {
        out.text(NFTA_EXPR_NAME, name);
        out.nest(NFTA_EXPR_DATA, body);
    });
}

fn register(slot: Slot) -> u32 {
    NFT_REG32_00 + u32::from(slot.0)
}

fn expression(out: &mut Writer, expression: &Expression, sets: &SetIds) {
    let mut named = |name, body: &dyn Fn(&mut Writer)| self::named(out, NFTA_LIST_ELEM, name, body);
    match expression {
        Expression::Meta { load, to } => named(META, &|out| {
            out.be32(NFTA_META_DREG, register(*to));
            out.be32(NFTA_META_KEY, meta_key(*load));
        }),
        Expression::SetMark { from } => named(META, &|out| {
            out.be32(NFTA_META_KEY, NFT_META_MARK);
            out.be32(NFTA_META_SREG, register(*from));
        }),
        Expression::Ct { load, to } => named(CT, &|out| {
            out.be32(NFTA_CT_DREG, register(*to));
            out.be32(NFTA_CT_KEY, ct_key(*load));
        }),
        Expression::SetCtMark { from } => named(CT, &|out| {
            out.be32(NFTA_CT_KEY, NFT_CT_MARK);
            out.be32(NFTA_CT_SREG, register(*from));
        }),
        Expression::Payload { header, offset, len, to } => named(PAYLOAD, &|out| {
            let base = match header {
                Header::Network => NFT_PAYLOAD_NETWORK_HEADER,
                Header::Transport => NFT_PAYLOAD_TRANSPORT_HEADER,
            };
            out.be32(NFTA_PAYLOAD_DREG, register(*to));
            out.be32(NFTA_PAYLOAD_BASE, base);
            out.be32(NFTA_PAYLOAD_OFFSET, *offset);
            out.be32(NFTA_PAYLOAD_LEN, *len);
        }),
        Expression::PathSegment { to } => named(RT, &|out| {
            out.be32(NFTA_RT_DREG, register(*to));
            out.be32(NFTA_RT_KEY, NFT_RT_TCPMSS);
        }),
        Expression::ToNetwork { from, to } => named(BYTEORDER, &|out| {
            out.be32(NFTA_BYTEORDER_SREG, register(*from));
            out.be32(NFTA_BYTEORDER_DREG, register(*to));
            out.be32(NFTA_BYTEORDER_OP, NFT_BYTEORDER_HTON);
            out.be32(NFTA_BYTEORDER_LEN, 2);
            out.be32(NFTA_BYTEORDER_SIZE, 2);
        }),
        Expression::LowerSegment { from } => named(EXTHDR, &|out| {
            out.be32(NFTA_EXTHDR_SREG, register(*from));
            out.byte(NFTA_EXTHDR_TYPE, TCPOPT_MSS);
            // Behind the option's kind and length.
            out.be32(NFTA_EXTHDR_OFFSET, 2);
            out.be32(NFTA_EXTHDR_LEN, 2);
            out.be32(NFTA_EXTHDR_OP, NFT_EXTHDR_OP_TCPOPT);
        }),
        Expression::Bitwise { from, to, mask, xor } => named(BITWISE, &|out| {
            out.be32(NFTA_BITWISE_SREG, register(*from));
            out.be32(NFTA_BITWISE_DREG, register(*to));
            // More than a register holds is refused by the kernel, at whatever length.
            out.be32(NFTA_BITWISE_LEN, u32::try_from(mask.len()).unwrap_or(u32::MAX));
            out.nest(NFTA_BITWISE_MASK, |out| out.bytes(NFTA_DATA_VALUE, mask));
            out.nest(NFTA_BITWISE_XOR, |out| out.bytes(NFTA_DATA_VALUE, xor));
        }),
        Expression::Compare { from, is, with } => named(CMP, &|out| {
            let op = match is {
                Comparison::Equal => NFT_CMP_EQ,
                Comparison::NotEqual => NFT_CMP_NEQ,
            };
            out.be32(NFTA_CMP_SREG, register(*from));
            out.be32(NFTA_CMP_OP, op);
            out.nest(NFTA_CMP_DATA, |out| out.bytes(NFTA_DATA_VALUE, with));
        }),
        Expression::Value { to, data } => named(IMMEDIATE, &|out| {
            out.be32(NFTA_IMMEDIATE_DREG, register(*to));
            out.nest(NFTA_IMMEDIATE_DATA, |out| out.bytes(NFTA_DATA_VALUE, data));
        }),
        Expression::Verdict(to) => named(IMMEDIATE, &|out| {
            out.be32(NFTA_IMMEDIATE_DREG, NFT_REG_VERDICT);
            out.nest(NFTA_IMMEDIATE_DATA, |out| verdict(out, to));
        }),
        Expression::Lookup { set, key, then } => named(LOOKUP, &|out| {
            out.text(NFTA_LOOKUP_SET, set.as_str());
            if let Some(id) = sets.get(set) {
                out.be32(NFTA_LOOKUP_SET_ID, *id);
            }
            out.be32(NFTA_LOOKUP_SREG, register(*key));
            match then {
                Lookup::Present => {}
                Lookup::Absent => out.be32(NFTA_LOOKUP_FLAGS, NFT_LOOKUP_F_INV),
                Lookup::Data(to) => out.be32(NFTA_LOOKUP_DREG, register(*to)),
                Lookup::Verdict => out.be32(NFTA_LOOKUP_DREG, NFT_REG_VERDICT),
            }
        }),
        Expression::Update { set, key, with } => named(DYNSET, &|out| {
            out.text(NFTA_DYNSET_SET_NAME, set.as_str());
            if let Some(id) = sets.get(set) {
                out.be32(NFTA_DYNSET_SET_ID, *id);
            }
            // In sets without a timeout too: since 5.16, and 5.15's stable updates of November 2021 (7b1394892de8).
            out.be32(NFTA_DYNSET_OP, NFT_DYNSET_OP_UPDATE);
            out.be32(NFTA_DYNSET_SREG_KEY, register(*key));
            match with.as_slice() {
                [] => {}
                [one] => stateful(out, NFTA_DYNSET_EXPR, one),
                several => {
                    out.nest(NFTA_DYNSET_EXPRESSIONS, |out| {
                        several.iter().for_each(|one| stateful(out, NFTA_LIST_ELEM, one));
                    });
                    out.be32(NFTA_DYNSET_FLAGS, NFT_DYNSET_F_EXPR);
                }
            }
        }),
        Expression::Dnat { addr, port } => named(NAT, &|out| {
            out.be32(NFTA_NAT_TYPE, NFT_NAT_DNAT);
            out.be32(NFTA_NAT_FAMILY, u32::from(NFPROTO_IPV4));
            out.be32(NFTA_NAT_REG_ADDR_MIN, register(*addr));
            out.be32(NFTA_NAT_REG_PROTO_MIN, register(*port));
        }),
        Expression::Masquerade => named(MASQ, &|_| ()),
        Expression::Stateful(one) => stateful(out, NFTA_LIST_ELEM, one),
        Expression::Log { group, prefix, length } => named(LOG, &|out| {
            out.be16(NFTA_LOG_GROUP, *group);
            if !prefix.is_empty() {
                out.text(NFTA_LOG_PREFIX, prefix);
            }
            out.be32(NFTA_LOG_SNAPLEN, *length);
        }),
        Expression::Reject => named(REJECT, &|out| {
            out.be32(NFTA_REJECT_TYPE, NFT_REJECT_ICMPX_UNREACH);
            out.byte(NFTA_REJECT_ICMP_CODE, NFT_REJECT_ICMPX_PORT_UNREACH);
        }),
    }
}

fn stateful(out: &mut Writer, kind: u16, one: &Stateful) {
    match one {
        Stateful::Counter => named(out, kind, COUNTER, |_| ()),
        Stateful::Limit { rate, burst, over } => named(out, kind, LIMIT, |out| {
            out.be64(NFTA_LIMIT_RATE, *rate);
            // Seconds.
            out.be64(NFTA_LIMIT_UNIT, 1);
            out.be32(NFTA_LIMIT_BURST, *burst);
            out.be32(NFTA_LIMIT_TYPE, NFT_LIMIT_PKTS);
            out.be32(NFTA_LIMIT_FLAGS, if *over { NFT_LIMIT_F_INV } else { 0 });
        }),
        Stateful::ConnectionsOver { count } => named(out, kind, CONNLIMIT, |out| {
            out.be32(NFTA_CONNLIMIT_COUNT, *count);
            out.be32(NFTA_CONNLIMIT_FLAGS, NFT_CONNLIMIT_F_INV);
        }),
    }
}

fn meta_key(load: Metadata) -> u32 {
    match load {
        Metadata::Family => NFT_META_NFPROTO,
        Metadata::Protocol => NFT_META_L4PROTO,
        Metadata::Mark => NFT_META_MARK,
        Metadata::InIndex => NFT_META_IIF,
        Metadata::InName => NFT_META_IIFNAME,
        Metadata::OutName => NFT_META_OIFNAME,
    }
}

fn ct_key(load: Connection) -> u32 {
    match load {
        Connection::State => NFT_CT_STATE,
        Connection::Direction => NFT_CT_DIRECTION,
        Connection::Mark => NFT_CT_MARK,
    }
}
