//! An atomic transaction on one table of the family inet: all of its operations happen, or none.
//!
//! Every operation says whose it is, and the kernel's complaints name the message by its number, so each error finds its
//! object. What the kernel answers (nfnetlink_rcv_batch in net/netfilter/nfnetlink.c), all of it before `sendmsg`
//! returns:
//!
//!  - One error for each message that failed, in their order; nothing for those that did not, but for the last, which
//!    asks for an acknowledgement: [`Transaction::last`]. Its answer, good or bad, is the end of the answers; the
//!    transaction is done if none was an error.
//!  - One error with the number of the batch's beginning, [`Transaction::first`], for the batch as a whole: nothing of it
//!    happened. ERESTART if it was pinned to a generation that has passed, ENOMEM, EOPNOTSUPP without nf_tables: nothing
//!    else is answered then. What the commit itself complains of is followed by the last message's answer, which is an
//!    acknowledgement all the same. So after such an error there may be more to read, but it is not to be waited for.
//!
//! What the socket must have: room for the batch in one piece to send (SO_SNDBUFFORCE, twice its length: else EMSGSIZE),
//! room to receive (SO_RCVBUFFORCE), NETLINK_CAP_ACK (else each error carries the whole message back) and NETLINK_EXT_ACK.

use std::collections::BTreeMap;

use crate::constants::*;
use crate::encode::{self, SetIds};
use crate::name::Name;
use crate::rule::{Chain, Rule};
use crate::set::{Data, Ranges, Set};
use crate::wire::{Head, ROOM, Writer};

/// Bytes that an element with two ends of three fields takes, and a little more.
const ELEMENT: usize = 64;

/// Most transactions fit.
const FIRST: usize = 8 << 10;

/// A transaction in the making. `T` says whose an operation is.
///
/// Operations happen in their order: a chain is there before a rule or an element leads to it, a set before a rule looks
/// into it, and both go after what refers to them.
#[derive(Debug)]
pub struct Batch<T> {
    table: Name,
    out: Writer,
    first: u32,
    /// Messages so far, the beginning included.
    count: u32,
    /// Where the newest operation's message starts.
    newest: Option<usize>,
    /// Whose the messages from that one on are, by their place.
    owners: Vec<(u32, T)>,
    sets: SetIds,
    /// Sets made so far.
    made: u32,
}

impl<T: Clone> Batch<T> {
    /// The messages are numbered from `first` on, the batch's beginning included.
    pub fn new(table: &Name, first: u32) -> Self {
        Self::begin(table, first, None)
    }

    /// To be refused (ERESTART) unless the ruleset is still of that generation.
    pub fn pinned(table: &Name, first: u32, generation: u32) -> Self {
        Self::begin(table, first, Some(generation))
    }

    fn begin(table: &Name, first: u32, generation: Option<u32>) -> Self {
        let mut batch = Self {
            table: table.clone(),
            out: Writer::default(),
            first,
            count: 0,
            newest: None,
            owners: Vec::new(),
            sets: BTreeMap::new(),
            made: 0,
        };
        batch.out.reserve(FIRST);
        batch.edge(NFNL_MSG_BATCH_BEGIN, |out| {
            if let Some(generation) = generation {
                out.be32(NFNL_BATCH_GENID, generation);
            }
        });
        batch
    }

    /// Also if it is there already.
    pub fn add_table(&mut self, owner: &T) {
        self.own(owner);
        self.say(NFT_MSG_NEWTABLE, NLM_F_CREATE, |out, table, _| out.text(NFTA_TABLE_NAME, table));
    }

    /// With all that it holds.
    pub fn delete_table(&mut self, owner: &T) {
        self.own(owner);
        self.sets.clear();
        self.say(NFT_MSG_DELTABLE, 0, |out, table, _| out.text(NFTA_TABLE_NAME, table));
    }

    /// A new one (else EEXIST), with its rules.
    ///
    /// # Panics
    /// If a rule takes more than 64 KiB. (The kernel refuses rules of more than 128 expressions.)
    pub fn add_chain(&mut self, owner: &T, name: &Name, chain: &Chain) {
        self.own(owner);
        self.say(NFT_MSG_NEWCHAIN, NLM_F_CREATE | NLM_F_EXCL, |out, table, _| {
            out.text(NFTA_CHAIN_TABLE, table);
            out.text(NFTA_CHAIN_NAME, name.as_str());
            if let Some(base) = &chain.base {
                encode::base(out, base);
            }
        });
        self.add_rules(name, &chain.rules);
    }

    /// All of a chain's rules by others.
    ///
    /// # Panics
    /// As [`Batch::add_chain`].
    pub fn replace_rules(&mut self, owner: &T, chain: &Name, rules: &[Rule]) {
        self.own(owner);
        self.say(NFT_MSG_DELRULE, 0, |out, table, _| {
            out.text(NFTA_RULE_TABLE, table);
            out.text(NFTA_RULE_CHAIN, chain.as_str());
        });
        self.add_rules(chain, rules);
    }

    fn add_rules(&mut self, chain: &Name, rules: &[Rule]) {
        for rule in rules {
            self.say(NFT_MSG_NEWRULE, NLM_F_CREATE | NLM_F_APPEND, |out, table, sets| {
                out.text(NFTA_RULE_TABLE, table);
                out.text(NFTA_RULE_CHAIN, chain.as_str());
                encode::rule(out, rule, sets);
            });
        }
    }

    /// With its rules. EBUSY while a rule or an element leads to it.
    pub fn delete_chain(&mut self, owner: &T, name: &Name) {
        self.own(owner);
        self.say(NFT_MSG_DELCHAIN, 0, |out, table, _| {
            out.text(NFTA_CHAIN_TABLE, table);
            out.text(NFTA_CHAIN_NAME, name.as_str());
        });
    }

    /// A new one (else EEXIST), empty.
    pub fn add_set(&mut self, owner: &T, name: &Name, set: &Set) {
        self.own(owner);
        self.made += 1;
        let id = self.made;
        self.sets.insert(name.clone(), id);
        self.say(NFT_MSG_NEWSET, NLM_F_CREATE | NLM_F_EXCL, |out, table, _| {
            out.text(NFTA_SET_TABLE, table);
            out.text(NFTA_SET_NAME, name.as_str());
            out.be32(NFTA_SET_ID, id);
            encode::set(out, set);
        });
    }

    /// With its elements. EBUSY while a rule looks into it.
    pub fn delete_set(&mut self, owner: &T, name: &Name) {
        self.own(owner);
        self.sets.remove(name);
        self.say(NFT_MSG_DELSET, 0, |out, table, _| {
            out.text(NFTA_SET_TABLE, table);
            out.text(NFTA_SET_NAME, name.as_str());
        });
    }

    /// New ones, each a key and what it leads to: EEXIST for what is there already.
    pub fn add_elements<'a>(
        &mut self,
        owner: &T,
        set: &Name,
        elements: impl IntoIterator<Item = (&'a [u8], &'a Data)>,
    ) {
        let all = elements.into_iter().map(|(key, data)| (key, None, data));
        self.elements(owner, NFT_MSG_NEWSETELEM, set, all);
    }

    /// By their keys. ENOENT for one that is not there.
    pub fn delete_elements<'a>(&mut self, owner: &T, set: &Name, keys: impl IntoIterator<Item = &'a [u8]>) {
        let all = keys.into_iter().map(|key| (key, None, &Data::Nothing));
        self.elements(owner, NFT_MSG_DELSETELEM, set, all);
    }

    /// New ones: EEXIST for one whose lower or upper end lies in another. (One around another is taken.)
    pub fn add_ranges(&mut self, owner: &T, set: &Name, ranges: &Ranges) {
        let all = ranges.iter().map(|(low, high)| (low, Some(high), &Data::Nothing));
        self.elements(owner, NFT_MSG_NEWSETELEM, set, all);
    }

    /// ENOENT for one that is not there with just these ends.
    pub fn delete_ranges(&mut self, owner: &T, set: &Name, ranges: &Ranges) {
        let all = ranges.iter().map(|(low, high)| (low, Some(high), &Data::Nothing));
        self.elements(owner, NFT_MSG_DELSETELEM, set, all);
    }

    /// In as many messages as it takes: the list is one attribute.
    fn elements<'a>(
        &mut self,
        owner: &T,
        kind: u16,
        set: &Name,
        all: impl Iterator<Item = (&'a [u8], Option<&'a [u8]>, &'a Data)>,
    ) {
        self.own(owner);
        let flags = if kind == NFT_MSG_NEWSETELEM { NLM_F_CREATE | NLM_F_EXCL } else { 0 };
        self.out.reserve(all.size_hint().0 * ELEMENT);
        let mut all = all.peekable();
        while all.peek().is_some() {
            self.say(kind, flags, |out, table, sets| {
                out.text(NFTA_SET_ELEM_LIST_TABLE, table);
                out.text(NFTA_SET_ELEM_LIST_SET, set.as_str());
                if let Some(id) = sets.get(set) {
                    out.be32(NFTA_SET_ELEM_LIST_SET_ID, *id);
                }
                out.nest(NFTA_SET_ELEM_LIST_ELEMENTS, |out| {
                    let start = out.len();
                    while let Some((key, end, data)) = all.peek() {
                        let before = out.len();
                        encode::element(out, key, *end, data);
                        if before > start && out.len() - start > ROOM {
                            out.cut(before);
                            break;
                        }
                        all.next();
                    }
                });
            });
        }
    }

    pub fn is_empty(&self) -> bool {
        self.newest.is_none()
    }

    pub fn finish(mut self) -> Transaction<T> {
        let last = self.first.wrapping_add(self.count - 1);
        if let Some(newest) = self.newest {
            self.out.flag(newest, NLM_F_ACK);
        }
        self.edge(NFNL_MSG_BATCH_END, |_| ());
        Transaction { first: self.first, last, owners: self.owners, bytes: self.out.into_bytes() }
    }

    /// The messages to come are this one's.
    fn own(&mut self, owner: &T) {
        self.owners.push((self.count, owner.clone()));
    }

    fn say(&mut self, kind: u16, flags: u16, body: impl FnOnce(&mut Writer, &str, &SetIds)) {
        self.newest = Some(self.out.len());
        let head = Head {
            kind: NFNL_SUBSYS_NFTABLES << 8 | kind,
            flags: NLM_F_REQUEST | flags,
            sequence: self.first.wrapping_add(self.count),
            family: NFPROTO_INET,
            resource: 0,
        };
        self.count += 1;
        self.out.message(head, |out| body(out, self.table.as_str(), &self.sets));
    }

    fn edge(&mut self, kind: u16, body: impl FnOnce(&mut Writer)) {
        let head = Head {
            kind,
            flags: NLM_F_REQUEST,
            sequence: self.first.wrapping_add(self.count),
            family: 0,
            resource: NFNL_SUBSYS_NFTABLES,
        };
        self.count += 1;
        self.out.message(head, body);
    }
}

/// A whole batch, to be sent in one piece.
#[derive(Debug, Clone)]
pub struct Transaction<T> {
    pub bytes: Vec<u8>,
    first: u32,
    last: u32,
    owners: Vec<(u32, T)>,
}

impl<T> Transaction<T> {
    /// The number of the batch's beginning: what is answered to it concerns the batch as a whole.
    pub fn first(&self) -> u32 {
        self.first
    }

    /// The number of the last operation's message: its answer is the last one. That of a batch without operations is
    /// [`Transaction::first`], and it is not answered at all.
    pub fn last(&self) -> u32 {
        self.last
    }

    /// Whose the message of that number is. None: the beginning's, or no message of this batch.
    pub fn owner(&self, sequence: u32) -> Option<&T> {
        let place = sequence.wrapping_sub(self.first);
        if place == 0 || place > self.last.wrapping_sub(self.first) {
            return None;
        }
        let behind = self.owners.partition_point(|(from, _)| *from <= place);
        self.owners.get(behind.checked_sub(1)?).map(|(_, owner)| owner)
    }
}
