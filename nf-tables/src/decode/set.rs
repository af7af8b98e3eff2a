//! Sets and elements as the kernel dumps them.

use super::{Unknown, expression};
use crate::constants::*;
use crate::encode::data_type;
use crate::field::{Field, Key};
use crate::set::{Data, Dynamic, Set, Target};
use crate::wire::Attributes;

/// An element as found in a set.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Found {
    /// In a set with ranges: the lower end.
    pub key: Vec<u8>,
    /// The upper end, in a set with ranges.
    pub end: Option<Vec<u8>>,
    pub data: Data,
    /// Packets that its counter has counted, if it has one.
    pub counted: Option<u64>,
}

/// None: a set of others' making.
pub(super) fn set(all: Attributes<'_>) -> Option<Set> {
    let flags = all.be32(NFTA_SET_FLAGS).unwrap_or_default();
    let has = |flag| flags & flag != 0;
    let ours = NFT_SET_INTERVAL | NFT_SET_CONCAT | NFT_SET_MAP | NFT_SET_EVAL | NFT_SET_TIMEOUT;
    let timed = !has(NFT_SET_TIMEOUT) || has(NFT_SET_EVAL);
    if flags & !ours != 0 || has(NFT_SET_INTERVAL) != has(NFT_SET_CONCAT) || !timed {
        return None;
    }
    let key = Key(fields(all.be32(NFTA_SET_KEY_TYPE)?)?);
    if key.len() != all.be32(NFTA_SET_KEY_LEN)? {
        return None;
    }
    let target = match (has(NFT_SET_MAP), all.be32(NFTA_SET_DATA_TYPE)) {
        (false, _) => Target::Nothing,
        (true, Some(NFT_DATA_VERDICT)) => Target::Verdict,
        (true, Some(kind)) => {
            let data = Key(fields(kind)?);
            (data.len() == all.be32(NFTA_SET_DATA_LEN)?).then_some(Target::Value(data.0))?
        }
        (true, None) => return None,
    };
    let size = all.nest(NFTA_SET_DESC).and_then(|description| description.be32(NFTA_SET_DESC_SIZE));
    let timeout = || all.be64(NFTA_SET_TIMEOUT);
    let dynamic = match (has(NFT_SET_EVAL), has(NFT_SET_TIMEOUT)) {
        (false, _) if size.is_some() => return None,
        (false, _) => None,
        (true, false) => Some(Dynamic { size: size.unwrap_or_default(), timeout: None }),
        (true, true) => Some(Dynamic { size: size.unwrap_or_default(), timeout: Some(timeout()?) }),
    };
    Some(Set { key, target, ranges: has(NFT_SET_CONCAT), dynamic })
}

/// The fields that a number of [`data_type`] stands for: six bits each.
fn fields(kind: u32) -> Option<Vec<Field>> {
    let parts = (0..5).rev().map(|place| kind >> (6 * place) & 0x3f).skip_while(|part| *part == 0);
    let field = |part| Field::ALL.into_iter().find(|field| field.data_type() == part);
    let fields: Vec<Field> = parts.map(field).collect::<Option<_>>()?;
    (data_type(&fields) == kind && !fields.is_empty()).then_some(fields)
}

pub(super) fn elements(all: Attributes<'_>) -> Vec<Result<Found, Unknown>> {
    let list = all.nest(NFTA_SET_ELEM_LIST_ELEMENTS).unwrap_or_default();
    list.map(|(_, one)| element(Attributes(one)).ok_or_else(|| Unknown("a set's element".to_owned())))
        .collect()
}

fn element(one: Attributes<'_>) -> Option<Found> {
    let bytes = |kind| one.nest(kind).and_then(|data| data.bytes(NFTA_DATA_VALUE)).map(<[u8]>::to_vec);
    // The catch-all, or half of an interval.
    if one.be32(NFTA_SET_ELEM_FLAGS).unwrap_or_default() != 0 {
        return None;
    }
    let data = match one.nest(NFTA_SET_ELEM_DATA) {
        None => Data::Nothing,
        Some(data) => match (data.bytes(NFTA_DATA_VALUE), data.nest(NFTA_DATA_VERDICT)) {
            (Some(value), _) => Data::Value(value.into()),
            (None, Some(verdict)) => Data::Verdict(expression::verdict(verdict)?),
            (None, None) => return None,
        },
    };
    let counted = one.nest(NFTA_SET_ELEM_EXPR).and_then(|expression| {
        let counter = expression.text(NFTA_EXPR_NAME) == Some(COUNTER);
        expression.nest(NFTA_EXPR_DATA).filter(|_| counter)?.be64(NFTA_COUNTER_PACKETS)
    });
    Some(Found { key: bytes(NFTA_SET_ELEM_KEY)?, end: bytes(NFTA_SET_ELEM_KEY_END), data, counted })
}
