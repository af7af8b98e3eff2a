//! The firewall: what the cell's nf_tables program is, as a function of the cell's inputs. docs/dataplane.md is the same
//! in prose, one paragraph per class of traffic.
//!
//! ```text
//!  base      the chains that every packet of a container meets, and the maps that lead on from there
//!  profile   what containers may send: one set of chains for all that have the same profile
//!  settings  the rest of what containers with the same settings have in common
//!  app       who may open connections to an app's containers
//!  between   what is told of traffic between containers
//!  limits    dynamic sets that count: connections, log lines
//!  member    one container's elements in the maps
//!  map       the maps that elements are in
//!  key       the key of an element
//!  layers    security groups' rules as sets the kernel can hold
//!  explain   which rule decides on a packet, and whose it is
//! ```
//! **Absence denies**: an address without an element neither sends nor is reached.

mod app;
mod base;
mod between;
mod draft;
pub mod explain;
mod key;
mod layers;
mod limits;
mod map;
mod member;
mod profile;
mod settings;

use std::sync::Arc;

use nf_tables::{Chain, Data, Name, Ranges, Set};

pub use app::app;
pub use base::{Base, base};
pub use key::ElementKey;
pub use limits::{Limit, Lines, limit, limits_of};
pub use map::Map;
pub use member::{exposed, granted, is_leased, leased, member};
pub use profile::{Chains, Layers, profile, refuses};
pub use settings::settings;

/// The only table that is ours. Nothing else is touched.
pub const TABLE: &str = "weft";

/// Set in the mark of every packet that the program lets through, for the rule at the end of `filter/FORWARD`.
pub const ALLOWED: u32 = 0x0200_0000;
/// The mark of a packet to the cell itself that the rule at the end of `filter/INPUT` rejects, unless an operator's
/// own rule accepted it before. It is compared with [`REFUSED_MASK`].
pub const REFUSED: u32 = 0x0100_0000;
pub const REFUSED_MASK: u32 = 0xff00_0000;
/// The mark of the first packet of a connection that came to a mapped port from the underlay (silk's `ingress_tag`).
pub const INGRESS: u32 = 0xffff_0000;
/// The mark of such a connection. No [`Digest::mark`](crate::profile::Digest::mark) has this bit.
pub const INGRESS_CONNECTION: u32 = 0x8000_0000;

/// Who rejects what a container sends to the cell itself and may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Hash)]
pub enum Guard {
    /// Our own chain: the rule in `filter/INPUT` is not known to be there.
    #[default]
    Ours,
    /// The rule in `filter/INPUT`; our chain marks.
    Iptables,
}

/// A kernel object of the table.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Part {
    Table,
    Set(Name),
    Chain(Name),
    /// An element, by the bytes of its key.
    Element(Map, ElementKey),
}

/// Its content.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub enum Content {
    Table,
    Set(Arc<Filled>),
    Chain(Arc<Chain>),
    Element(Data),
}

/// A set as it is declared. What rules, containers and peers put into it is not part of it; its ranges are.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Filled {
    pub set: Set,
    pub ranges: Ranges,
}

/// How much there is of a program.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Size {
    pub rules: usize,
    /// Those of maps, and ranges of sets.
    pub elements: usize,
}

impl Size {
    pub fn of<'a>(contents: impl IntoIterator<Item = &'a Content>) -> Self {
        let mut size = Self::default();
        for content in contents {
            match content {
                Content::Chain(chain) => size.rules += chain.rules.len(),
                Content::Set(filled) => size.elements += filled.ranges.len(),
                Content::Element(_) => size.elements += 1,
                Content::Table => {}
            }
        }
        size
    }
}

/// What a unit plans.
pub type Planned = Vec<(Part, Content)>;

impl std::fmt::Display for Part {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Self::Table => write!(f, "table {TABLE}"),
            Self::Set(name) => write!(f, "set {name}"),
            Self::Chain(name) => write!(f, "chain {name}"),
            Self::Element(map, key) => write!(f, "element of {map} {key:?}"),
        }
    }
}

/// Spans that touch or overlap made one, in order.
fn joined<T: Copy + Ord + Into<u32>>(mut spans: Vec<(T, T)>) -> Vec<(T, T)> {
    spans.sort_unstable();
    let mut joined: Vec<(T, T)> = Vec::with_capacity(spans.len());
    for (first, last) in spans {
        match joined.last_mut() {
            Some((_, end)) if first.into() <= (*end).into().saturating_add(1) => *end = last.max(*end),
            _ => joined.push((first, last)),
        }
    }
    joined
}

/// Names are made of words and digests here, never of what comes from outside.
fn name(text: &str) -> Name {
    text.parse().unwrap_or_else(|_| unreachable!("{text} is a name"))
}

fn chain(name_of: &str, rules: Vec<nf_tables::Rule>) -> (Part, Content) {
    (Part::Chain(name(name_of)), Content::Chain(Arc::new(Chain { base: None, rules })))
}

fn set(name_of: &str, set: Set, ranges: Ranges) -> (Part, Content) {
    (Part::Set(name(name_of)), Content::Set(Arc::new(Filled { set, ranges })))
}

fn element(of: Map, key: impl Into<ElementKey>, data: Data) -> (Part, Content) {
    (Part::Element(of, key.into()), Content::Element(data))
}

/// A whole program, to run packets through.
pub fn program<'a>(parts: impl IntoIterator<Item = (&'a Part, &'a Content)>) -> nf_tables::machine::Program {
    let mut program = nf_tables::machine::Program::default();
    for (part, content) in parts {
        match (part, content) {
            (Part::Chain(name), Content::Chain(chain)) => {
                program.chains.insert(name.clone(), Arc::clone(chain));
            }
            (Part::Set(name), Content::Set(filled)) => {
                let contents = program.sets.entry(name.clone()).or_default();
                contents.ranges = filled.ranges.clone();
                contents.widths = filled.set.key.widths();
            }
            (Part::Element(map, key), Content::Element(data)) => {
                let contents = program.sets.entry(map.name().clone()).or_default();
                contents.elements.insert(key.to_vec(), data.clone());
            }
            _ => {}
        }
    }
    program
}
