//! Questions to the kernel: what is there, of the family inet, and which generation of the ruleset it is.
//!
//! A dump is answered by messages, then [`Done`](crate::decode::Body::Done); one that another's commit ran into says so
//! (`interrupted`) and is to be asked for again. The kernel sorts rules, sets and elements by table, tables and chains it
//! gives all.

use crate::constants::*;
use crate::name::Name;
use crate::wire::{Head, Writer};

/// [`Generation`](crate::decode::Generation), one message.
pub fn generation(sequence: u32) -> Vec<u8> {
    ask(NFT_MSG_GETGEN, 0, sequence, |_| ())
}

/// Every table.
pub fn tables(sequence: u32) -> Vec<u8> {
    ask(NFT_MSG_GETTABLE, NLM_F_DUMP, sequence, |_| ())
}

/// Every chain of every table.
pub fn chains(sequence: u32) -> Vec<u8> {
    ask(NFT_MSG_GETCHAIN, NLM_F_DUMP, sequence, |_| ())
}

/// A table's rules, by chains, in their order.
pub fn rules(table: &Name, sequence: u32) -> Vec<u8> {
    ask(NFT_MSG_GETRULE, NLM_F_DUMP, sequence, |out| out.text(NFTA_RULE_TABLE, table.as_str()))
}

/// A table's sets. ENOENT without the table.
pub fn sets(table: &Name, sequence: u32) -> Vec<u8> {
    ask(NFT_MSG_GETSET, NLM_F_DUMP, sequence, |out| out.text(NFTA_SET_TABLE, table.as_str()))
}

/// A set's elements. ENOENT without the table or the set.
pub fn elements(table: &Name, set: &Name, sequence: u32) -> Vec<u8> {
    ask(NFT_MSG_GETSETELEM, NLM_F_DUMP, sequence, |out| {
        out.text(NFTA_SET_ELEM_LIST_TABLE, table.as_str());
        out.text(NFTA_SET_ELEM_LIST_SET, set.as_str());
    })
}

fn ask(kind: u16, flags: u16, sequence: u32, body: impl FnOnce(&mut Writer)) -> Vec<u8> {
    let mut out = Writer::default();
    let head = Head {
        kind: NFNL_SUBSYS_NFTABLES << 8 | kind,
        flags: NLM_F_REQUEST | flags,
        sequence,
        family: NFPROTO_INET,
        resource: 0,
    };
    out.message(head, body);
    out.into_bytes()
}
