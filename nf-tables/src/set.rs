//! Sets, maps, and what is in them.

use std::fmt;
use std::sync::Arc;

use crate::field::{Field, Key};
use crate::rule::Verdict;

/// A set's declaration.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Set {
    pub key: Key,
    pub target: Target,
    /// Elements are ranges in every field of the key, ends included. Needs a key of two fields or more.
    pub ranges: bool,
    /// Rules add to it.
    pub dynamic: Option<Dynamic>,
}

/// What an element leads to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Target {
    Nothing,
    Verdict,
    /// The fields of a value: one, or a concatenation.
    Value(Vec<Field>),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Dynamic {
    /// Elements at most.
    pub size: u32,
    /// After so many milliseconds without an update an element goes; none: it stays as long as what it carries counts.
    /// The kernel rounds down to its ticks, 10 ms at most; it takes connections to count only without a timeout.
    pub timeout: Option<u64>,
}

/// What an element of a set without ranges leads to.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub enum Data {
    Nothing,
    Verdict(Verdict),
    Value(Arc<[u8]>),
}

/// The elements of a set with ranges, packed: for each the lower end's key and the upper end's, sorted.
#[derive(Clone, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub struct Ranges {
    /// Bytes of one key.
    stride: usize,
    bytes: Box<[u8]>,
}

impl Ranges {
    /// `stride`: bytes of one key. Each item's two ends have that length. (No ranges are equal whatever their keys.)
    pub fn new<'a>(stride: u32, ends: impl IntoIterator<Item = (&'a [u8], &'a [u8])>) -> Self {
        let stride = stride as usize;
        let mut all: Vec<(&[u8], &[u8])> = ends.into_iter().collect();
        if all.is_empty() {
            return Self::default();
        }
        all.sort_unstable();
        let mut bytes = Vec::with_capacity(all.len() * 2 * stride);
        for (low, high) in all {
            assert!(low.len() == stride && high.len() == stride, "both ends are keys");
            bytes.extend_from_slice(low);
            bytes.extend_from_slice(high);
        }
        Self { stride, bytes: bytes.into() }
    }

    pub fn len(&self) -> usize {
        self.bytes.len().checked_div(2 * self.stride).unwrap_or_default()
    }

    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    /// Lower and upper end of each.
    pub fn iter(&self) -> impl Iterator<Item = (&[u8], &[u8])> {
        self.bytes.chunks_exact((2 * self.stride).max(1)).map(|pair| pair.split_at(self.stride))
    }
}

impl fmt::Debug for Ranges {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_list().entries(self.iter()).finish()
    }
}
