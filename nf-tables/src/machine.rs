//! Runs a program on a packet as the kernel would, and says which rule decided.
//!
//! The packet is the first of its connection that these rules see, so nothing that counts has counted yet: a limit has
//! all its tokens, and no other connection is alive.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

use crate::expression::{Comparison, Connection, Expression, Header, Lookup, Metadata, Slot, Stateful};
use crate::name::Name;
use crate::rule::{Chain, Rule, Verdict};
use crate::set::{Data, Ranges};

/// IPPROTO_TCP.
const TCP: u8 = 6;
/// Jumps within jumps that the kernel follows (NFT_JUMP_STACK_SIZE); it refuses programs that need more.
const DEPTH: usize = 16;

/// Chains and sets of one table.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Program {
    pub chains: BTreeMap<Name, Arc<Chain>>,
    pub sets: BTreeMap<Name, Contents>,
}

/// What is in a set: single elements, or ranges.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Contents {
    pub elements: BTreeMap<Vec<u8>, Data>,
    pub ranges: Ranges,
    /// Bytes that each field of the key takes; used for ranges.
    pub widths: Vec<usize>,
}

/// A packet as a hook sees it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Packet {
    /// 2 is IPv4, 10 is IPv6 (NFPROTO_*).
    pub family: u8,
    pub protocol: u8,
    /// From the first byte of the IP header.
    pub network: Vec<u8>,
    /// From the first byte behind the IP header.
    pub transport: Vec<u8>,
    pub mark: u32,
    pub in_index: Option<u32>,
    pub in_name: Option<String>,
    pub out_name: Option<String>,
    /// As [`Connection::State`] loads it.
    pub state: u32,
    /// Whether it goes the way of the connection's answers.
    pub answers: bool,
    pub connection_mark: u32,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    Accept,
    Drop,
    /// Dropped, and the sender is told.
    Reject,
    /// Accepted with another destination.
    Dnat {
        addr: [u8; 4],
        port: u16,
    },
    /// Accepted with another source.
    Masquerade,
}

/// A place in a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Place {
    pub chain: Name,
    /// Counted from 0.
    pub rule: usize,
    pub comment: String,
}

/// What became of a packet in one base chain.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    pub outcome: Outcome,
    /// The rule that decided; none: the end of the base chain.
    pub by: Option<Place>,
    /// Prefixes of what was logged on the way.
    pub logged: Vec<String>,
}

/// The program refers to something that is not in it, or goes in circles: the kernel would not have taken it.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Broken {
    #[error("there is no chain {0}")]
    NoChain(Name),
    #[error("there is no set {0}")]
    NoSet(Name),
    #[error("chains call each other more than {DEPTH} deep")]
    TooDeep,
}

/// How a rule ended.
enum Ended {
    /// It does not match, or has nothing to say.
    Next,
    With(Outcome),
    Verdict(Verdict),
}

struct Run<'p> {
    program: &'p Program,
    registers: [u8; 64],
    /// What this packet has put into dynamic sets.
    added: BTreeSet<(&'p Name, Vec<u8>)>,
    logged: Vec<String>,
}

impl Program {
    /// Runs a base chain. The packet's marks change as the rules say.
    pub fn run(&self, base: &Name, packet: &mut Packet) -> Result<Decision, Broken> {
        let mut run = Run { program: self, registers: [0; 64], added: BTreeSet::new(), logged: Vec::new() };
        let decided = run.chain(base, packet, 0)?;
        let (outcome, by) = decided.map_or((Outcome::Accept, None), |(outcome, by)| (outcome, Some(by)));
        Ok(Decision { outcome, by, logged: run.logged })
    }
}

impl<'p> Run<'p> {
    /// None: the end of the chain, or a return.
    fn chain(
        &mut self,
        name: &Name,
        packet: &mut Packet,
        depth: usize,
    ) -> Result<Option<(Outcome, Place)>, Broken> {
        if depth > DEPTH {
            return Err(Broken::TooDeep);
        }
        let chain = self.program.chains.get(name).ok_or_else(|| Broken::NoChain(name.clone()))?;
        for (number, rule) in chain.rules.iter().enumerate() {
            let here = || Place { chain: name.clone(), rule: number, comment: rule.comment.clone() };
            match self.rule(rule, packet)? {
                Ended::Next => {}
                Ended::With(outcome) => return Ok(Some((outcome, here()))),
                Ended::Verdict(Verdict::Accept) => return Ok(Some((Outcome::Accept, here()))),
                Ended::Verdict(Verdict::Drop) => return Ok(Some((Outcome::Drop, here()))),
                Ended::Verdict(Verdict::Return) => return Ok(None),
                Ended::Verdict(Verdict::Goto(chain)) => return self.chain(&chain, packet, depth + 1),
                Ended::Verdict(Verdict::Jump(chain)) => {
                    let decided = self.chain(&chain, packet, depth + 1)?;
                    if decided.is_some() {
                        return Ok(decided);
                    }
                }
            }
        }
        Ok(None)
    }

    fn rule(&mut self, rule: &'p Rule, packet: &mut Packet) -> Result<Ended, Broken> {
        for expression in &rule.expressions {
            match expression {
                Expression::Verdict(verdict) => return Ok(Ended::Verdict(verdict.clone())),
                Expression::Reject => return Ok(Ended::With(Outcome::Reject)),
                Expression::Masquerade => return Ok(Ended::With(Outcome::Masquerade)),
                Expression::Dnat { addr, port } => {
                    let mut to = [0; 4];
                    to.copy_from_slice(self.read(*addr, 4));
                    let port = u16::from_be_bytes([self.read(*port, 2)[0], self.read(*port, 2)[1]]);
                    return Ok(Ended::With(Outcome::Dnat { addr: to, port }));
                }
                Expression::Lookup { set, key, then: Lookup::Verdict } => {
                    return Ok(match self.find(set, *key)? {
                        Some(Data::Verdict(verdict)) => Ended::Verdict(verdict),
                        _ => Ended::Next,
                    });
                }
                other => {
                    if !self.matches(other, packet)? {
                        return Ok(Ended::Next);
                    }
                }
            }
        }
        Ok(Ended::Next)
    }

    fn matches(&mut self, expression: &'p Expression, packet: &mut Packet) -> Result<bool, Broken> {
        match expression {
            Expression::Meta { load, to } => return Ok(self.load(*load, *to, packet)),
            Expression::SetMark { from } => packet.mark = self.word(*from),
            Expression::SetCtMark { from } => packet.connection_mark = self.word(*from),
            Expression::Ct { load, to } => match load {
                Connection::State => self.write(*to, &packet.state.to_ne_bytes()),
                Connection::Direction => self.write(*to, &[u8::from(packet.answers)]),
                Connection::Mark => self.write(*to, &packet.connection_mark.to_ne_bytes()),
            },
            Expression::Payload { header, offset, len, to } => {
                let bytes = match header {
                    Header::Network => &packet.network,
                    Header::Transport => &packet.transport,
                };
                let (start, end) = (*offset as usize, (*offset + *len) as usize);
                let Some(found) = bytes.get(start..end) else { return Ok(false) };
                let found = found.to_vec();
                self.write(*to, &found);
            }
            // How long a packet may be on its way decides nothing.
            Expression::PathSegment { to } => self.write(*to, &u16::MAX.to_ne_bytes()),
            Expression::ToNetwork { from, to } => {
                let mut bytes = self.read(*from, 2).to_vec();
                if cfg!(target_endian = "little") {
                    bytes.reverse();
                }
                self.write(*to, &bytes);
            }
            Expression::LowerSegment { .. } => return Ok(packet.protocol == TCP),
            Expression::Bitwise { from, to, mask, xor } => {
                let bytes = self.read(*from, mask.len()).iter().zip(mask).zip(xor);
                let bytes: Vec<u8> = bytes.map(|((byte, mask), xor)| (byte & mask) ^ xor).collect();
                self.write(*to, &bytes);
            }
            Expression::Compare { from, is, with } => {
                let equal = self.read(*from, with.len()) == with.as_slice();
                return Ok(equal == (*is == Comparison::Equal));
            }
            Expression::Value { to, data } => self.write(*to, data),
            Expression::Lookup { set, key, then } => match (self.find(set, *key)?, then) {
                (Some(_), Lookup::Present) | (None, Lookup::Absent) => {}
                (Some(Data::Value(value)), Lookup::Data(to)) => self.write(*to, &value),
                _ => return Ok(false),
            },
            Expression::Update { set, key, with } => {
                let width = self.contents(set)?.widths.iter().sum();
                let key = self.read(*key, width).to_vec();
                self.added.insert((set, key));
                return Ok(with.iter().all(untouched));
            }
            Expression::Stateful(stateful) => return Ok(untouched(stateful)),
            Expression::Log { prefix, .. } => self.logged.push(prefix.clone()),
            Expression::Verdict(_)
            | Expression::Reject
            | Expression::Masquerade
            | Expression::Dnat { .. } => {}
        }
        Ok(true)
    }

    fn load(&mut self, load: Metadata, to: Slot, packet: &Packet) -> bool {
        let name = |name: &Option<String>| {
            let mut bytes = name.as_ref()?.as_bytes().to_vec();
            bytes.resize(16, 0);
            Some(bytes)
        };
        let value = match load {
            Metadata::Family => Some(vec![packet.family]),
            Metadata::Protocol => Some(vec![packet.protocol]),
            Metadata::Mark => Some(packet.mark.to_ne_bytes().to_vec()),
            Metadata::InIndex => packet.in_index.map(|index| index.to_ne_bytes().to_vec()),
            Metadata::InName => name(&packet.in_name),
            Metadata::OutName => name(&packet.out_name),
        };
        value.inspect(|value| self.write(to, value)).is_some()
    }

    fn contents(&self, set: &Name) -> Result<&'p Contents, Broken> {
        self.program.sets.get(set).ok_or_else(|| Broken::NoSet(set.clone()))
    }

    fn find(&self, set: &Name, key: Slot) -> Result<Option<Data>, Broken> {
        let contents = self.contents(set)?;
        let key = self.read(key, contents.widths.iter().sum());
        if let Some(data) = contents.elements.get(key) {
            return Ok(Some(data.clone()));
        }
        let added = self.added.iter().any(|(name, added)| *name == set && added == key);
        Ok((added || contents.in_ranges(key)).then_some(Data::Nothing))
    }

    fn read(&self, slot: Slot, len: usize) -> &[u8] {
        let start = usize::from(slot.0) * 4;
        self.registers.get(start..start + len).unwrap_or_default()
    }

    fn word(&self, slot: Slot) -> u32 {
        self.read(slot, 4).first_chunk().map_or(0, |bytes| u32::from_ne_bytes(*bytes))
    }

    /// Registers are filled with zeros up to four bytes, as the kernel does.
    fn write(&mut self, slot: Slot, bytes: &[u8]) {
        let start = usize::from(slot.0) * 4;
        for (n, register) in
            self.registers.iter_mut().skip(start).enumerate().take(bytes.len().next_multiple_of(4))
        {
            *register = bytes.get(n).copied().unwrap_or_default();
        }
    }
}

impl Contents {
    fn in_ranges(&self, key: &[u8]) -> bool {
        self.ranges.iter().any(|(low, high)| {
            let mut at = 0;
            self.widths.iter().all(|width| {
                let field = at..at + width;
                at += width;
                (&low[field.clone()]..=&high[field.clone()]).contains(&&key[field])
            })
        })
    }
}

/// Whether an expression that remembers matches when it has seen nothing yet.
fn untouched(stateful: &Stateful) -> bool {
    match stateful {
        Stateful::Counter => true,
        Stateful::Limit { over, .. } => !over,
        Stateful::ConnectionsOver { .. } => false,
    }
}
