//! Who holds which subnet: the controllers' decisions, as pure functions of the table.
//!
//! A [`Ledger`] is a replica of the lease table. [`Ledger::step`] decides a batch of requests against it and says
//! which rows to write; it changes nothing itself. The writer commits the rows and, once they are committed,
//! [`Ledger::absorb`]s them like rows that another controller wrote.

pub mod step;

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

pub use step::{Answer, Decision, Request};

use crate::address::UnderlayAddr;
use crate::lease::{Digest, Head, Lease, Revision, Row, State};
use crate::subnet::{OverlaySubnet, Pool, SubnetKind};

/// What the operator decided.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Rules {
    pub pool: Pool,
    /// A lease that was not claimed for this long, in service time, is no longer published.
    pub expiry: Duration,
    /// How long a released row stays as a tombstone, so that cells that were away learn of its end.
    pub keep_tombstones: Duration,
    /// A machine seen within this time keeps its address against another that claims to be at the same one.
    pub holder_grace: Duration,
}

/// A replica of the lease table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Ledger {
    rules: Rules,
    head: Option<Head>,
    rows: BTreeMap<UnderlayAddr, Row>,
    by_revision: BTreeSet<(Revision, UnderlayAddr)>,
    /// Subnets of rows that are not released, by first address. They never overlap.
    in_use: BTreeMap<u32, UnderlayAddr>,
    digest: Digest,
}

impl Ledger {
    pub fn new(rules: Rules) -> Self {
        Self {
            rules,
            head: None,
            rows: BTreeMap::new(),
            by_revision: BTreeSet::new(),
            in_use: BTreeMap::new(),
            digest: Digest::default(),
        }
    }

    /// Takes in what the store holds since our revision. Another epoch, or a revision below ours, is another
    /// history: everything known before is forgotten, and `rows` must be the whole table.
    pub fn absorb(&mut self, head: Head, rows: impl IntoIterator<Item = Row>) {
        let same_history = self.head.is_some_and(|ours| {
            ours.cursor.epoch == head.cursor.epoch && ours.cursor.revision <= head.cursor.revision
        });
        if !same_history {
            *self = Self::new(self.rules);
        }
        for row in rows {
            self.put(row);
        }
        self.head = Some(head);
        self.purge(head.floor);
    }

    fn put(&mut self, row: Row) {
        self.remove(row.lease.underlay);
        if in_use(&row) {
            self.in_use.insert(row.lease.subnet.bounds().0, row.lease.underlay);
        }
        if row.state == State::Held {
            self.digest = self.digest.with(&row.lease);
        }
        self.by_revision.insert((row.revision, row.lease.underlay));
        self.rows.insert(row.lease.underlay, row);
    }

    fn remove(&mut self, underlay: UnderlayAddr) {
        let Some(row) = self.rows.remove(&underlay) else { return };
        self.by_revision.remove(&(row.revision, underlay));
        // By the time this row moves on, another may have taken its subnet.
        let first = row.lease.subnet.bounds().0;
        if self.in_use.get(&first) == Some(&underlay) {
            self.in_use.remove(&first);
        }
        if row.state == State::Held {
            self.digest = self.digest.without(&row.lease);
        }
    }

    /// Tombstones up to `floor` are no longer in the store.
    fn purge(&mut self, floor: Revision) {
        let old = self.by_revision.range(..=(floor, UnderlayAddr::MAX)).map(|(_, underlay)| *underlay);
        let released = |underlay: &_| self.rows.get(underlay).is_some_and(|row| !in_use(row));
        for underlay in old.filter(released).collect::<Vec<_>>() {
            self.remove(underlay);
        }
    }

    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    pub fn head(&self) -> Option<&Head> {
        self.head.as_ref()
    }

    pub fn rows(&self) -> impl Iterator<Item = &Row> {
        self.rows.values()
    }

    pub fn row(&self, underlay: UnderlayAddr) -> Option<&Row> {
        self.rows.get(&underlay)
    }

    /// Rows that changed after `revision`, oldest change first.
    pub fn since(&self, revision: Revision) -> impl Iterator<Item = &Row> {
        let after = (revision, UnderlayAddr::MAX);
        self.by_revision
            .range((std::ops::Bound::Excluded(after), std::ops::Bound::Unbounded))
            .filter_map(|(_, underlay)| self.rows.get(underlay))
    }

    /// Of the held leases.
    pub fn digest(&self) -> Digest {
        self.digest
    }

    pub fn held(&self) -> impl Iterator<Item = &Lease> {
        self.rows().filter(|row| row.state == State::Held).map(|row| &row.lease)
    }

    /// Subnets of a kind that could be given out without taking one from an expired holder.
    pub fn free(&self, kind: SubnetKind) -> u32 {
        let used = self.rows().filter(|row| {
            in_use(row)
                && row.lease.subnet.kind() == kind
                && self.rules.pool.index_of(row.lease.subnet).is_some()
        });
        self.rules.pool.size(kind)
            - u32::try_from(used.count()).unwrap_or(u32::MAX).min(self.rules.pool.size(kind))
    }

    /// Who holds a subnet that overlaps this one.
    pub fn holder_of(&self, subnet: OverlaySubnet) -> Option<&Row> {
        let (first, last) = subnet.bounds();
        let (_, underlay) = self.in_use.range(..=last).next_back()?;
        let row = self.rows.get(underlay)?;
        (row.lease.subnet.bounds().1 >= first).then_some(row)
    }
}

/// Whether the row's subnet is taken: released rows are memory only.
fn in_use(row: &Row) -> bool {
    !matches!(row.state, State::Released { .. })
}
