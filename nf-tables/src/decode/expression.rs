//! Expressions as the kernel dumps them: with what it adds (defaults, counts), and registers in either form.

use super::{Unknown, lossy};
use crate::constants::*;
use crate::expression::{Comparison, Connection, Expression, Header, Lookup, Metadata, Slot, Stateful};
use crate::name::Name;
use crate::rule::Verdict;
use crate::wire::Attributes;

/// A name and data.
pub(super) fn expression(item: Attributes<'_>) -> Result<Expression, Unknown> {
    spoken(item).ok_or_else(|| {
        let name = item.bytes(NFTA_EXPR_NAME).and_then(lossy).unwrap_or_default();
        Unknown(format!("an expression `{}`", name.escape_default()))
    })
}

fn spoken(item: Attributes<'_>) -> Option<Expression> {
    let data = item.nest(NFTA_EXPR_DATA).unwrap_or_default();
    match item.text(NFTA_EXPR_NAME)? {
        META => meta(data),
        CT => ct(data),
        PAYLOAD => payload(data),
        RT => {
            let to = slot(data, NFTA_RT_DREG)?;
            (data.be32(NFTA_RT_KEY)? == NFT_RT_TCPMSS).then_some(Expression::PathSegment { to })
        }
        BYTEORDER => to_network(data),
        EXTHDR => lower_segment(data),
        BITWISE => bitwise(data),
        CMP => compare(data),
        IMMEDIATE => immediate(data),
        LOOKUP => lookup(data),
        DYNSET => update(data),
        NAT => dnat(data),
        // Flags and ports are choices that are not made here.
        MASQ => no(data, &[NFTA_MASQ_FLAGS, NFTA_MASQ_REG_PROTO_MIN]).then_some(Expression::Masquerade),
        LOG => log(data),
        REJECT => {
            let kind = data.be32(NFTA_REJECT_TYPE)?;
            let code = data.byte(NFTA_REJECT_ICMP_CODE)?;
            (kind == NFT_REJECT_ICMPX_UNREACH && code == NFT_REJECT_ICMPX_PORT_UNREACH)
                .then_some(Expression::Reject)
        }
        _ => stateful(item).map(Expression::Stateful),
    }
}

fn no(data: Attributes<'_>, kinds: &[u16]) -> bool {
    kinds.iter().all(|kind| !data.has(*kind))
}

/// The kernel names a slot that a 16-byte register starts with as that register (nft_dump_register).
fn slot(data: Attributes<'_>, kind: u16) -> Option<Slot> {
    let slot = match data.be32(kind)? {
        wide @ NFT_REG_1..=NFT_REG_4 => (wide - NFT_REG_1) * 4,
        narrow @ NFT_REG32_00..=NFT_REG32_15 => narrow - NFT_REG32_00,
        _ => return None,
    };
    u8::try_from(slot).ok().map(Slot)
}

fn value(data: Attributes<'_>, kind: u16) -> Option<Vec<u8>> {
    data.nest(kind)?.bytes(NFTA_DATA_VALUE).map(<[u8]>::to_vec)
}

fn name(data: Attributes<'_>, kind: u16) -> Option<Name> {
    data.text(kind)?.parse().ok()
}

pub(super) fn verdict(data: Attributes<'_>) -> Option<Verdict> {
    let chain = || name(data, NFTA_VERDICT_CHAIN);
    let code = i32::from_be_bytes(data.bytes(NFTA_VERDICT_CODE)?.try_into().ok()?);
    match (code, u32::try_from(code)) {
        (_, Ok(NF_ACCEPT)) => Some(Verdict::Accept),
        (_, Ok(NF_DROP)) => Some(Verdict::Drop),
        (NFT_RETURN, _) => Some(Verdict::Return),
        (NFT_JUMP, _) => chain().map(Verdict::Jump),
        (NFT_GOTO, _) => chain().map(Verdict::Goto),
        _ => None,
    }
}

fn meta(data: Attributes<'_>) -> Option<Expression> {
    let key = data.be32(NFTA_META_KEY)?;
    if let Some(from) = slot(data, NFTA_META_SREG) {
        return (key == NFT_META_MARK).then_some(Expression::SetMark { from });
    }
    let load = match key {
        NFT_META_NFPROTO => Metadata::Family,
        NFT_META_L4PROTO => Metadata::Protocol,
        NFT_META_MARK => Metadata::Mark,
        NFT_META_IIF => Metadata::InIndex,
        NFT_META_IIFNAME => Metadata::InName,
        NFT_META_OIFNAME => Metadata::OutName,
        _ => return None,
    };
    Some(Expression::Meta { load, to: slot(data, NFTA_META_DREG)? })
}

fn ct(data: Attributes<'_>) -> Option<Expression> {
    let key = data.be32(NFTA_CT_KEY)?;
    if let Some(from) = slot(data, NFTA_CT_SREG) {
        return (key == NFT_CT_MARK).then_some(Expression::SetCtMark { from });
    }
    let load = match key {
        NFT_CT_STATE => Connection::State,
        NFT_CT_DIRECTION => Connection::Direction,
        NFT_CT_MARK => Connection::Mark,
        _ => return None,
    };
    Some(Expression::Ct { load, to: slot(data, NFTA_CT_DREG)? })
}

fn payload(data: Attributes<'_>) -> Option<Expression> {
    let header = match data.be32(NFTA_PAYLOAD_BASE)? {
        NFT_PAYLOAD_NETWORK_HEADER => Header::Network,
        NFT_PAYLOAD_TRANSPORT_HEADER => Header::Transport,
        _ => return None,
    };
    Some(Expression::Payload {
        header,
        offset: data.be32(NFTA_PAYLOAD_OFFSET)?,
        len: data.be32(NFTA_PAYLOAD_LEN)?,
        // Without one it writes to the packet.
        to: slot(data, NFTA_PAYLOAD_DREG)?,
    })
}

fn to_network(data: Attributes<'_>) -> Option<Expression> {
    let short = data.be32(NFTA_BYTEORDER_LEN)? == 2 && data.be32(NFTA_BYTEORDER_SIZE)? == 2;
    (short && data.be32(NFTA_BYTEORDER_OP)? == NFT_BYTEORDER_HTON).then_some(Expression::ToNetwork {
        from: slot(data, NFTA_BYTEORDER_SREG)?,
        to: slot(data, NFTA_BYTEORDER_DREG)?,
    })
}

fn lower_segment(data: Attributes<'_>) -> Option<Expression> {
    let plain = data.byte(NFTA_EXTHDR_TYPE)? == TCPOPT_MSS
        && data.be32(NFTA_EXTHDR_OP)? == NFT_EXTHDR_OP_TCPOPT
        && (data.be32(NFTA_EXTHDR_OFFSET)?, data.be32(NFTA_EXTHDR_LEN)?) == (2, 2)
        && data.be32(NFTA_EXTHDR_FLAGS).unwrap_or_default() == 0;
    // Without a source it loads the option.
    plain.then_some(Expression::LowerSegment { from: slot(data, NFTA_EXTHDR_SREG)? })
}

fn bitwise(data: Attributes<'_>) -> Option<Expression> {
    let op = data.be32(NFTA_BITWISE_OP).unwrap_or(NFT_BITWISE_MASK_XOR);
    let (mask, xor) = (value(data, NFTA_BITWISE_MASK)?, value(data, NFTA_BITWISE_XOR)?);
    (op == NFT_BITWISE_MASK_XOR).then_some(Expression::Bitwise {
        from: slot(data, NFTA_BITWISE_SREG)?,
        to: slot(data, NFTA_BITWISE_DREG)?,
        mask,
        xor,
    })
}

fn compare(data: Attributes<'_>) -> Option<Expression> {
    let is = match data.be32(NFTA_CMP_OP)? {
        NFT_CMP_EQ => Comparison::Equal,
        NFT_CMP_NEQ => Comparison::NotEqual,
        _ => return None,
    };
    Some(Expression::Compare { from: slot(data, NFTA_CMP_SREG)?, is, with: value(data, NFTA_CMP_DATA)? })
}

fn immediate(data: Attributes<'_>) -> Option<Expression> {
    if data.be32(NFTA_IMMEDIATE_DREG)? == NFT_REG_VERDICT {
        let to = data.nest(NFTA_IMMEDIATE_DATA)?.nest(NFTA_DATA_VERDICT)?;
        return verdict(to).map(Expression::Verdict);
    }
    let to = slot(data, NFTA_IMMEDIATE_DREG)?;
    Some(Expression::Value { to, data: value(data, NFTA_IMMEDIATE_DATA)? })
}

fn lookup(data: Attributes<'_>) -> Option<Expression> {
    let then = match (data.be32(NFTA_LOOKUP_FLAGS).unwrap_or_default(), data.be32(NFTA_LOOKUP_DREG)) {
        (0, None) => Lookup::Present,
        (NFT_LOOKUP_F_INV, None) => Lookup::Absent,
        (0, Some(NFT_REG_VERDICT)) => Lookup::Verdict,
        (0, Some(_)) => Lookup::Data(slot(data, NFTA_LOOKUP_DREG)?),
        _ => return None,
    };
    Some(Expression::Lookup { set: name(data, NFTA_LOOKUP_SET)?, key: slot(data, NFTA_LOOKUP_SREG)?, then })
}

fn update(data: Attributes<'_>) -> Option<Expression> {
    let plain = data.be32(NFTA_DYNSET_OP)? == NFT_DYNSET_OP_UPDATE
        && data.be32(NFTA_DYNSET_FLAGS).unwrap_or_default() & !NFT_DYNSET_F_EXPR == 0
        && data.be64(NFTA_DYNSET_TIMEOUT).unwrap_or_default() == 0
        && no(data, &[NFTA_DYNSET_SREG_DATA]);
    let with = match (data.nest(NFTA_DYNSET_EXPR), data.nest(NFTA_DYNSET_EXPRESSIONS)) {
        (Some(one), _) => vec![stateful(one)?],
        (None, Some(mut several)) => several.try_fold(Vec::new(), |mut all, (_, one)| {
            all.push(stateful(Attributes(one))?);
            Some(all)
        })?,
        (None, None) => Vec::new(),
    };
    plain.then_some(Expression::Update {
        set: name(data, NFTA_DYNSET_SET_NAME)?,
        key: slot(data, NFTA_DYNSET_SREG_KEY)?,
        with,
    })
}

/// The kernel names both ends of the ranges of addresses and ports: the same registers, if they are none.
fn dnat(data: Attributes<'_>) -> Option<Expression> {
    let one = |low, high| {
        let register = slot(data, low)?;
        let end = if data.has(high) { slot(data, high)? } else { register };
        (end == register).then_some(register)
    };
    let ours = NF_NAT_RANGE_MAP_IPS | NF_NAT_RANGE_PROTO_SPECIFIED;
    let plain = data.be32(NFTA_NAT_TYPE)? == NFT_NAT_DNAT
        && data.be32(NFTA_NAT_FAMILY)? == u32::from(NFPROTO_IPV4)
        && data.be32(NFTA_NAT_FLAGS).unwrap_or_default() & !ours == 0;
    plain.then_some(Expression::Dnat {
        addr: one(NFTA_NAT_REG_ADDR_MIN, NFTA_NAT_REG_ADDR_MAX)?,
        port: one(NFTA_NAT_REG_PROTO_MIN, NFTA_NAT_REG_PROTO_MAX)?,
    })
}

fn log(data: Attributes<'_>) -> Option<Expression> {
    let plain = data.be16(NFTA_LOG_QTHRESHOLD).unwrap_or_default() == 0
        && no(data, &[NFTA_LOG_LEVEL, NFTA_LOG_FLAGS]);
    plain.then_some(Expression::Log {
        group: data.be16(NFTA_LOG_GROUP)?,
        prefix: if data.has(NFTA_LOG_PREFIX) {
            data.text(NFTA_LOG_PREFIX)?.to_owned()
        } else {
            String::new()
        },
        length: data.be32(NFTA_LOG_SNAPLEN)?,
    })
}

fn stateful(item: Attributes<'_>) -> Option<Stateful> {
    let data = item.nest(NFTA_EXPR_DATA).unwrap_or_default();
    match item.text(NFTA_EXPR_NAME)? {
        COUNTER => Some(Stateful::Counter),
        LIMIT => {
            let plain = data.be64(NFTA_LIMIT_UNIT)? == 1
                && data.be32(NFTA_LIMIT_TYPE).unwrap_or(NFT_LIMIT_PKTS) == NFT_LIMIT_PKTS;
            plain.then_some(Stateful::Limit {
                rate: data.be64(NFTA_LIMIT_RATE)?,
                burst: data.be32(NFTA_LIMIT_BURST)?,
                over: data.be32(NFTA_LIMIT_FLAGS).unwrap_or_default() & NFT_LIMIT_F_INV != 0,
            })
        }
        CONNLIMIT => {
            let over = data.be32(NFTA_CONNLIMIT_FLAGS).unwrap_or_default() & NFT_CONNLIMIT_F_INV != 0;
            over.then_some(Stateful::ConnectionsOver { count: data.be32(NFTA_CONNLIMIT_COUNT)? })
        }
        _ => None,
    }
}
