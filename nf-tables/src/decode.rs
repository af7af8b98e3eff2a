//! What the kernel answers and announces, as values.
//!
//! A buffer holds any number of messages; other tables' and other families' are read as well, so that their owner can
//! pass them over. What this crate does not speak is [`Unknown`], and only that rule, set or element: the kernel's and
//! others' additions never make a buffer unreadable. Numbers that change by themselves (counters, handles' uses,
//! expirations, limits' tokens) are left out, so that what is read equals what was written.

mod expression;
mod set;

use crate::constants::*;
use crate::rule::{Base, Hook, Kind, Rule};
use crate::set::Set;
use crate::wire::{self, Attributes, FAMILY_HEADER, HEADER, Received};

pub use set::Found;

/// Something that others wrote: what it is that is not spoken here.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{0}, which is not spoken here")]
pub struct Unknown(pub String);

/// The buffer ends within a message: it was shorter than what was received (MSG_TRUNC), or is none of netlink's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("a netlink message of which {0} bytes were received is not whole")]
pub struct NotWhole(pub usize);

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Message {
    /// That of the question or the operation which it answers; in a notification, of the one that caused it.
    pub sequence: u32,
    /// The port of who asked, or whose transaction is announced: the address that the socket is bound to.
    pub port: u32,
    /// Part of a dump that a commit ran into (NLM_F_DUMP_INTR): ask again.
    pub interrupted: bool,
    pub body: Body,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Body {
    /// The answer to an operation that asked for one.
    Acknowledged,
    /// The operation failed, and its batch with it.
    Refused(Refusal),
    /// The end of a dump: 0, or the error that ended it.
    Done { errno: i32 },
    /// The answer to [`request::generation`](crate::request::generation), and the last notification of each commit.
    Generation(Generation),
    /// In a dump: is there. In a notification: was made, or changed.
    There { place: Place, object: Object },
    /// A notification only.
    Gone { place: Place, name: Gone },
    /// Something else, by its message type.
    Other { kind: u16 },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// Positive, as in errno.h.
    pub errno: i32,
    /// The kernel's explanation, if it has one and the socket asked for it (NETLINK_EXT_ACK).
    pub text: Option<String>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Generation {
    pub id: u32,
    /// The thread that committed it, by its number in the first PID namespace, and by its name (of 15 bytes at most). To a
    /// question: the asker's own. To tell one's own commits from others', [`Message::port`] is better.
    pub pid: u32,
    pub process: String,
}

/// Whose table it is in: any name, it may be foreign.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    /// NFPROTO_*; inet is 1.
    pub family: u8,
    pub table: String,
}

impl Place {
    /// A table of the family inet.
    pub fn is(&self, table: &crate::name::Name) -> bool {
        self.family == NFPROTO_INET && self.table == table.as_str()
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Object {
    Table,
    Chain {
        name: String,
        base: Result<Option<Base>, Unknown>,
    },
    Rule {
        chain: String,
        handle: u64,
        rule: Result<Rule, Unknown>,
    },
    Set {
        name: String,
        set: Result<Set, Unknown>,
    },
    /// Some of a set's elements: a set of many takes several messages.
    Elements {
        set: String,
        elements: Vec<Result<Found, Unknown>>,
    },
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Gone {
    Table,
    Chain { name: String },
    Rule { chain: String, handle: u64 },
    Set { name: String },
    Elements { set: String, elements: Vec<Result<Found, Unknown>> },
}

/// The messages of a received buffer. Ends behind the first that is not whole.
pub fn messages(buffer: &[u8]) -> impl Iterator<Item = Result<Message, NotWhole>> {
    let mut rest = buffer;
    std::iter::from_fn(move || {
        if rest.is_empty() {
            return None;
        }
        let Some((received, behind)) = wire::first(rest) else {
            let length = rest.len();
            rest = &[];
            return Some(Err(NotWhole(length)));
        };
        rest = behind;
        Some(Ok(message(received)))
    })
}

fn message(received: Received<'_>) -> Message {
    let Received { kind, flags, sequence, port, body } = received;
    let known = match kind {
        NLMSG_ERROR => answer(flags, body),
        NLMSG_DONE => Some(Body::Done { errno: errno(body).unwrap_or_default() }),
        _ if kind >> 8 == NFNL_SUBSYS_NFTABLES => object(kind & 0xff, body),
        _ => None,
    };
    let body = known.unwrap_or(Body::Other { kind });
    // The same bit means something else in an acknowledgement.
    let interrupted = flags & NLM_F_DUMP_INTR != 0 && !matches!(body, Body::Acknowledged | Body::Refused(_));
    Message { sequence, port, interrupted, body }
}

/// The kernel writes it negated.
fn errno(body: &[u8]) -> Option<i32> {
    body.first_chunk().map(|bytes| i32::from_ne_bytes(*bytes).saturating_neg())
}

fn answer(flags: u16, body: &[u8]) -> Option<Body> {
    let errno = errno(body)?;
    if errno == 0 {
        return Some(Body::Acknowledged);
    }
    let original = body.get(4..)?;
    let echoed = match flags & NLM_F_CAPPED {
        0 => usize::try_from(wire::word(original, 0).unwrap_or_default()).unwrap_or(usize::MAX),
        _ => HEADER,
    };
    let told = flags & NLM_F_ACK_TLVS != 0;
    let more = original.get(echoed.checked_next_multiple_of(4)?..).filter(|_| told).unwrap_or_default();
    let text = Attributes(more).bytes(NLMSGERR_ATTR_MSG).and_then(lossy);
    Some(Body::Refused(Refusal { errno, text }))
}

fn object(kind: u16, body: &[u8]) -> Option<Body> {
    let (&[family, ..], rest) = body.split_first_chunk::<FAMILY_HEADER>()?;
    let all = Attributes(rest);
    let name = |kind| all.bytes(kind).and_then(lossy);
    let place = |kind| name(kind).map(|table| Place { family, table });
    let there = |table, object| Some(Body::There { place: place(table)?, object });
    let gone = |table, name| Some(Body::Gone { place: place(table)?, name });
    match kind {
        NFT_MSG_NEWGEN => Some(Body::Generation(Generation {
            id: all.be32(NFTA_GEN_ID)?,
            pid: all.be32(NFTA_GEN_PROC_PID).unwrap_or_default(),
            process: name(NFTA_GEN_PROC_NAME).unwrap_or_default(),
        })),
        NFT_MSG_NEWTABLE => there(NFTA_TABLE_NAME, Object::Table),
        NFT_MSG_DELTABLE => gone(NFTA_TABLE_NAME, Gone::Table),
        NFT_MSG_NEWCHAIN => {
            let base = base(all).ok_or_else(|| Unknown("a hook, a type or a policy".to_owned()));
            there(NFTA_CHAIN_TABLE, Object::Chain { name: name(NFTA_CHAIN_NAME)?, base })
        }
        NFT_MSG_DELCHAIN => gone(NFTA_CHAIN_TABLE, Gone::Chain { name: name(NFTA_CHAIN_NAME)? }),
        NFT_MSG_NEWRULE => {
            let (chain, handle) = (name(NFTA_RULE_CHAIN)?, all.be64(NFTA_RULE_HANDLE).unwrap_or_default());
            there(NFTA_RULE_TABLE, Object::Rule { chain, handle, rule: rule(all) })
        }
        NFT_MSG_DELRULE => {
            let (chain, handle) = (name(NFTA_RULE_CHAIN)?, all.be64(NFTA_RULE_HANDLE).unwrap_or_default());
            gone(NFTA_RULE_TABLE, Gone::Rule { chain, handle })
        }
        NFT_MSG_NEWSET => {
            let set = set::set(all).ok_or_else(|| Unknown("a set's type or flags".to_owned()));
            there(NFTA_SET_TABLE, Object::Set { name: name(NFTA_SET_NAME)?, set })
        }
        NFT_MSG_DELSET => gone(NFTA_SET_TABLE, Gone::Set { name: name(NFTA_SET_NAME)? }),
        NFT_MSG_NEWSETELEM => {
            let (set, elements) = (name(NFTA_SET_ELEM_LIST_SET)?, set::elements(all));
            there(NFTA_SET_ELEM_LIST_TABLE, Object::Elements { set, elements })
        }
        NFT_MSG_DELSETELEM => {
            let (set, elements) = (name(NFTA_SET_ELEM_LIST_SET)?, set::elements(all));
            gone(NFTA_SET_ELEM_LIST_TABLE, Gone::Elements { set, elements })
        }
        _ => None,
    }
}

/// Foreign names are bytes.
fn lossy(bytes: &[u8]) -> Option<String> {
    bytes.split(|byte| *byte == 0).next().map(|text| String::from_utf8_lossy(text).into_owned())
}

fn base(chain: Attributes<'_>) -> Option<Option<Base>> {
    let Some(hook) = chain.nest(NFTA_CHAIN_HOOK) else { return Some(None) };
    if chain.be32(NFTA_CHAIN_POLICY).unwrap_or(NF_ACCEPT) != NF_ACCEPT {
        return None;
    }
    let kind = match chain.text(NFTA_CHAIN_TYPE)? {
        CHAIN_TYPE_FILTER => Kind::Filter,
        CHAIN_TYPE_NAT => Kind::Nat,
        _ => return None,
    };
    let priority = i32::from_be_bytes(hook.bytes(NFTA_HOOK_PRIORITY)?.try_into().ok()?);
    let hook = match hook.be32(NFTA_HOOK_HOOKNUM)? {
        NF_INET_PRE_ROUTING => Hook::Prerouting,
        NF_INET_LOCAL_IN => Hook::Input,
        NF_INET_FORWARD => Hook::Forward,
        NF_INET_LOCAL_OUT => Hook::Output,
        NF_INET_POST_ROUTING => Hook::Postrouting,
        _ => return None,
    };
    Some(Some(Base { kind, hook, priority }))
}

fn rule(rule: Attributes<'_>) -> Result<Rule, Unknown> {
    let list = rule.nest(NFTA_RULE_EXPRESSIONS).unwrap_or_default();
    let expressions =
        list.map(|(_, one)| expression::expression(Attributes(one))).collect::<Result<_, _>>()?;
    let comment = rule.bytes(NFTA_RULE_USERDATA).and_then(comment).unwrap_or_default();
    Ok(Rule { expressions, comment })
}

/// Type, length and value, one behind the other (libnftnl's udata).
fn comment(mut user: &[u8]) -> Option<String> {
    while let [kind, length, rest @ ..] = user {
        let (value, behind) = rest.split_at_checked(usize::from(*length))?;
        if *kind == NFTNL_UDATA_RULE_COMMENT {
            return lossy(value);
        }
        user = behind;
    }
    None
}
