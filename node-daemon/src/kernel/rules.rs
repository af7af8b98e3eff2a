//! The firewall's table: one transaction for a step, or two, and what is in the table.
//!
//! Owns a socket of its own that stays open: one that closes waits for all that its transactions deleted.

mod transaction;

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::net::Ipv4Addr;
use std::sync::Arc;

use netlink_sys::protocols::NETLINK_NETFILTER;
use netlink_sys::{Socket, SocketAddr};
use nf_tables::batch::Transaction;
use nf_tables::decode::{self, Body, Found, Message, Object as There, Place, Refusal};
use nf_tables::{Chain, Data, Name, Ranges, Set, request};
use nix::libc::{EAGAIN, ECANCELED, EINTR, ENOENT, ERESTART};
use weft_model::cell::{Belief, Change, Firewall, Key, Object, Seen};
use weft_model::firewall::{Content, ElementKey, Filled, Limit, Lines, Map, Part, TABLE};
use weft_model::reason::Reason;
use weft_model::traffic::Totals;

use super::socket::{READ, open};

/// How often a dump is begun anew that was disturbed by changes, and a transaction that another's came before.
const TRIES: usize = 20;
/// Changes that are refused are left out and the others tried again, so often.
const ROUNDS: usize = 8;

/// The firewall's part of a step as it is sent: for those who measure what of a change is the kernel's.
pub fn transactions(firewall: &Firewall) -> Vec<Transaction<&Key>> {
    let table = TABLE.parse().unwrap_or_else(|_| unreachable!("{TABLE} is a name"));
    let sent = firewall.phases().into_iter().filter(|changes| !changes.is_empty());
    sent.map(|changes| transaction::transaction(&table, 1, firewall.anew, changes)).collect()
}

#[derive(Debug)]
pub(super) struct RulesSocket {
    socket: Socket,
    port: u32,
    table: Name,
    sequence: u32,
    buffer: Vec<u8>,
}

/// What became of a transaction: nothing of it happened unless no one is named here.
type Refusals = Vec<(Option<Key>, Refusal)>;

impl RulesSocket {
    pub(super) fn open() -> io::Result<Self> {
        let socket = open(NETLINK_NETFILTER, 0)?;
        let mut address = SocketAddr::new(0, 0);
        socket.get_address(&mut address)?;
        let table = TABLE.parse().map_err(io::Error::other)?;
        Ok(Self { port: address.port_number(), socket, table, sequence: 0, buffer: Vec::with_capacity(READ) })
    }

    /// How the kernel names us in what it announces.
    pub(super) fn port(&self) -> u32 {
        self.port
    }

    // === changes ===

    /// All at once, but for what has to be there before packets are led to it. Those that the kernel refuses, and those
    /// that need them, are left out and returned.
    pub(super) fn carry_out(&mut self, firewall: &Firewall) -> BTreeMap<Key, Reason> {
        let phases = firewall.phases();
        phases.iter().flat_map(|changes| self.carry_out_at_once(firewall.anew, changes)).collect()
    }

    fn carry_out_at_once(&mut self, anew: bool, changes: &[&Change]) -> BTreeMap<Key, Reason> {
        let mut out = BTreeMap::new();
        for _ in 0..ROUNDS {
            let taken: Vec<&Change> =
                changes.iter().copied().filter(|change| !out.contains_key(&change.key)).collect();
            if taken.is_empty() {
                return out;
            }
            let refusals = match self.commit(anew, &taken) {
                Ok(refusals) if refusals.is_empty() => return out,
                Ok(refusals) => refusals,
                Err(error) => {
                    out.extend(taken.iter().map(|change| (change.key.clone(), reason(&change.key, &error))));
                    return out;
                }
            };
            for (key, refusal) in refusals {
                let error = io::Error::from(RefusedByKernel(refusal));
                match key {
                    Some(key) => drop(out.entry(key.clone()).or_insert_with(|| reason(&key, &error))),
                    // The transaction as a whole.
                    None => {
                        let all = taken.iter().map(|change| change.key.clone());
                        out.extend(all.map(|key| (key.clone(), reason(&key, &error))));
                    }
                }
            }
        }
        let rest = changes.iter().filter(|change| !out.contains_key(&change.key));
        let left = io::Error::other("left out after other changes of its transaction were refused");
        let rest: Vec<_> = rest.map(|change| (change.key.clone(), reason(&change.key, &left))).collect();
        out.extend(rest);
        out
    }

    fn commit(&mut self, anew: bool, changes: &[&Change]) -> io::Result<Refusals> {
        for _ in 0..TRIES {
            self.drain();
            let first = self.sequence.wrapping_add(1);
            let transaction = transaction::transaction(&self.table, first, anew, changes.iter().copied());
            let (begin, last) = (transaction.first(), transaction.last());
            self.sequence = last.wrapping_add(1);
            self.socket.send(&transaction.bytes, 0)?;
            let mut refusals = Refusals::new();
            let mut again = false;
            'answers: loop {
                for message in self.read()? {
                    let whole = message.sequence == begin;
                    let ends = whole || message.sequence == last;
                    match message.body {
                        Body::Refused(refusal) => {
                            again |= whole && [ERESTART, EAGAIN, EINTR].contains(&refusal.errno);
                            let owner = transaction.owner(message.sequence).map(|key| Key::clone(key));
                            if owner.is_some() || whole {
                                refusals.push((owner, refusal));
                            }
                        }
                        Body::Acknowledged => {}
                        _ => continue,
                    }
                    // What is said of the transaction as a whole may be all that is said.
                    if ends {
                        break 'answers;
                    }
                }
            }
            if !again {
                return Ok(refusals);
            }
        }
        Err(io::Error::from_raw_os_error(ECANCELED))
    }

    // === what there is ===

    pub(super) fn see(&mut self) -> io::Result<Seen> {
        for _ in 0..TRIES {
            let before = self.generation()?;
            let seen = self.see_once()?;
            if let Some(seen) = seen.filter(|_| self.generation().is_ok_and(|after| after == before)) {
                return Ok(seen);
            }
        }
        Err(io::Error::other(format!("changed while it was read, {TRIES} times")))
    }

    /// None if it changed in between.
    fn see_once(&mut self) -> io::Result<Option<Seen>> {
        let Some(tables) = self.dump(request::tables)? else { return Ok(None) };
        if tables.is_empty() {
            return Ok(Some(Seen::new()));
        }
        let table = self.table.clone();
        let Some(chains) = self.dump(request::chains)? else { return Ok(None) };
        let Some(rules) = self.dump(|n| request::rules(&table, n))? else { return Ok(None) };
        let Some(sets) = self.dump(|n| request::sets(&table, n))? else { return Ok(None) };
        let mut seen = Seen::from([(Key::Firewall(Part::Table), holds(Content::Table))]);
        see_chains(chains, rules, &mut seen);
        for there in sets {
            let There::Set { name, set } = there else { continue };
            let Ok(name) = name.parse::<Name>() else { continue };
            let key = Key::Firewall(Part::Set(name.clone()));
            let Ok(set) = set else {
                seen.insert(key, Belief::Unknown);
                continue;
            };
            // What counts is in no plan.
            let elements = match set.dynamic {
                Some(_) => Vec::new(),
                None => match self.dump(|n| request::elements(&table, &name, n))? {
                    Some(elements) => elements,
                    None => return Ok(None),
                },
            };
            let belief = see_set(&name, set, elements, &mut seen);
            seen.insert(key, belief);
        }
        Ok(Some(seen))
    }

    /// What the program's rules have counted of lines that its limits let through or not.
    pub(super) fn totals(&mut self) -> io::Result<Totals> {
        let table = self.table.clone();
        let mut totals = Totals::new();
        for of in Lines::ALL {
            let set = Limit::Total { of }.set_name();
            // None: nobody's settings have it counted.
            for there in self.dump(|n| request::elements(&table, &set, n))?.into_iter().flatten() {
                let There::Elements { elements, .. } = there else { continue };
                for found in elements.into_iter().flatten() {
                    if let (Some(addr), Some(counted)) = (found.key.first_chunk::<4>(), found.counted) {
                        totals.insert((Ipv4Addr::from(*addr), of.decision()), counted);
                    }
                }
            }
        }
        Ok(totals)
    }

    fn generation(&mut self) -> io::Result<u32> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&request::generation(self.sequence), 0)?;
        loop {
            for message in self.read()? {
                match message.body {
                    Body::Generation(generation) if message.sequence == self.sequence => {
                        return Ok(generation.id);
                    }
                    Body::Refused(refusal) if message.sequence == self.sequence => {
                        return Err(RefusedByKernel(refusal).into());
                    }
                    _ => {}
                }
            }
        }
    }

    /// Our table's part of a dump. None if it changed meanwhile.
    fn dump(&mut self, ask: impl Fn(u32) -> Vec<u8>) -> io::Result<Option<Vec<There>>> {
        self.sequence = self.sequence.wrapping_add(1);
        self.socket.send(&ask(self.sequence), 0)?;
        let (mut all, mut whole) = (Vec::new(), true);
        loop {
            for message in self.read()? {
                if message.sequence != self.sequence {
                    continue;
                }
                whole &= !message.interrupted;
                match message.body {
                    Body::There { place, object } if is_ours(&place, &self.table) => all.push(object),
                    Body::Done { errno: 0 } => return Ok(whole.then_some(all)),
                    // Gone in between.
                    Body::Done { errno: ENOENT } => return Ok(None),
                    Body::Refused(Refusal { errno: ENOENT, .. }) => return Ok(None),
                    Body::Done { errno } => return Err(io::Error::from_raw_os_error(errno)),
                    Body::Refused(refusal) => return Err(RefusedByKernel(refusal).into()),
                    _ => {}
                }
            }
        }
    }

    fn read(&mut self) -> io::Result<Vec<Message>> {
        self.buffer.clear();
        while let Err(e) = self.socket.recv(&mut self.buffer, 0) {
            if e.kind() != io::ErrorKind::Interrupted {
                return Err(e);
            }
        }
        decode::messages(&self.buffer).collect::<Result<_, _>>().map_err(io::Error::other)
    }

    /// Forgets answers that nobody waited for, after an error.
    fn drain(&mut self) {
        self.buffer.clear();
        while self.socket.recv(&mut self.buffer, nix::libc::MSG_DONTWAIT).is_ok() {
            self.buffer.clear();
        }
    }
}

fn is_ours(place: &Place, table: &Name) -> bool {
    place.is(table)
}

fn holds(content: Content) -> Belief {
    Belief::Holds(Object::Firewall(content))
}

fn see_chains(chains: Vec<There>, rules: Vec<There>, seen: &mut Seen) {
    // None: something in it is not ours.
    let mut all: BTreeMap<String, Option<Chain>> = BTreeMap::new();
    for there in chains {
        if let There::Chain { name, base } = there {
            all.insert(name, base.ok().map(|base| Chain { base, rules: Vec::new() }));
        }
    }
    for there in rules {
        let There::Rule { chain, rule, .. } = there else { continue };
        let Some(known) = all.get_mut(&chain) else { continue };
        match (known.as_mut(), rule) {
            (Some(known), Ok(rule)) => known.rules.push(rule),
            _ => *known = None,
        }
    }
    for (name, chain) in all {
        let belief = chain.map_or(Belief::Unknown, |chain| holds(Content::Chain(Arc::new(chain))));
        match name.parse() {
            Ok(name) => drop(seen.insert(Key::Firewall(Part::Chain(name)), belief)),
            // A name that we would not give: with it, the table is not what it should be.
            Err(_) => drop(seen.insert(Key::Firewall(Part::Table), Belief::Unknown)),
        }
    }
}

/// The set as it was declared, with its ranges; a map's elements are parts of their own. Those of a set that is none of our
/// maps go with it.
fn see_set(name: &Name, set: Set, elements: Vec<There>, seen: &mut Seen) -> Belief {
    let map = Map::with_name(name);
    let stride = set.key.len();
    let mut ranges: BTreeSet<(Vec<u8>, Vec<u8>)> = BTreeSet::new();
    for there in elements {
        let There::Elements { elements, .. } = there else { continue };
        for found in elements {
            match found {
                Ok(Found { key, end: Some(end), data: Data::Nothing, .. }) if set.ranges => {
                    ranges.insert((key, end));
                }
                Ok(Found { key, end: None, data, .. }) if !set.ranges => {
                    let Some(key) = ElementKey::new(&key) else { return Belief::Unknown };
                    if let Some(map) = map {
                        seen.insert(Key::Firewall(Part::Element(map, key)), holds(Content::Element(data)));
                    }
                }
                _ => return Belief::Unknown,
            }
        }
    }
    if ranges.iter().any(|(low, high)| low.len() != stride as usize || high.len() != stride as usize) {
        return Belief::Unknown;
    }
    let ends = ranges.iter().map(|(low, high)| (low.as_slice(), high.as_slice()));
    let ranges = if set.ranges { Ranges::new(stride, ends) } else { Ranges::default() };
    holds(Content::Set(Arc::new(Filled { set, ranges })))
}

struct RefusedByKernel(Refusal);

impl From<RefusedByKernel> for io::Error {
    fn from(RefusedByKernel(Refusal { errno, text }): RefusedByKernel) -> Self {
        let plain = Self::from_raw_os_error(errno);
        match text {
            Some(text) => Self::new(plain.kind(), format!("{plain}: {text}")),
            None => plain,
        }
    }
}

fn reason(key: &Key, error: &io::Error) -> Reason {
    Reason::Kernel { operation: "change".into(), subject: key.to_string(), why: error.to_string() }
}
