//! Chains and their rules.

use crate::expression::Expression;
use crate::name::Name;

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Verdict {
    Accept,
    Drop,
    Return,
    Jump(Name),
    Goto(Name),
}

#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Rule {
    pub expressions: Vec<Expression>,
    /// Shown by `nft list`; at most 128 bytes, empty: none. A `"` in it or in a log's prefix is shown, but `nft -f` cannot
    /// read it.
    pub comment: String,
}

/// Where a chain is called by the kernel.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Base {
    pub kind: Kind,
    pub hook: Hook,
    pub priority: i32,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Kind {
    Filter,
    Nat,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Hook {
    Prerouting,
    Input,
    Forward,
    Output,
    Postrouting,
}

/// A chain's content. A base chain's policy is to accept.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Chain {
    /// None: called by other chains only.
    pub base: Option<Base>,
    pub rules: Vec<Rule>,
}
