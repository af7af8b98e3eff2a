//! The lease table as a cell has heard it.

use std::collections::BTreeSet;

use super::Snapshot;
use crate::address::UnderlayAddr;
use crate::lease::{Changes, Cursor, Digest, Lease, Peers};

/// A loss of more than half of at least so many peers at once is believed only when it is said twice.
const MANY: usize = 4;

#[derive(Debug, Clone, Default)]
pub(super) struct Table {
    /// Every lease, our own included once it was heard of.
    leases: Peers,
    /// From where the next watch goes on; none: from empty.
    cursor: Option<Cursor>,
    /// The answer under way, if it is in several parts or from empty: what it has named so far.
    named: Option<BTreeSet<UnderlayAddr>>,
    /// The loss that was said once.
    unlikely: Option<Digest>,
    /// What was not taken away while the controllers reconciled may be left over.
    reconciled: bool,
}

impl From<Snapshot> for Table {
    fn from(snapshot: Snapshot) -> Self {
        let mut leases = snapshot.peers;
        leases.insert(snapshot.lease.underlay, snapshot.lease);
        Self { leases, cursor: snapshot.cursor, ..Self::default() }
    }
}

/// What to make of a message.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    Agrees {
        changed: bool,
    },
    /// The controller is behind what we know.
    Stale,
    /// The table does not come out right, and should: ask again, from empty.
    Suspect,
    /// Too much is gone at once, or may be left over: ask again, from empty.
    AskAgain,
}

impl Table {
    pub(super) fn cursor(&self) -> Option<Cursor> {
        self.cursor
    }

    pub(super) fn peers(&self, own: UnderlayAddr) -> Peers {
        let others = self.leases.iter().filter(|(underlay, _)| **underlay != own);
        others.map(|(underlay, lease)| (*underlay, *lease)).collect()
    }

    pub(super) fn holds(&self, own: &Lease) -> bool {
        self.leases.get(&own.underlay).is_some_and(|lease| lease.subnet == own.subnet)
    }

    /// A new watch answers anew.
    pub(super) fn forget_unfinished(&mut self) {
        self.named = None;
    }

    pub(super) fn take(&mut self, changes: &Changes, own: UnderlayAddr) -> Verdict {
        if let Some(cursor) = self.cursor
            && cursor.epoch == changes.at.epoch
            && changes.at.revision < cursor.revision
        {
            return Verdict::Stale;
        }
        let before = self.leases.clone();
        let mut after = before.clone();
        if changes.from_empty && self.named.is_none() {
            self.named = Some(BTreeSet::new());
        }
        let mut gone = Vec::new();
        for (underlay, lease) in &changes.leases {
            if let Some(named) = &mut self.named {
                named.insert(*underlay);
            }
            match lease {
                Some(lease) => put(&mut after, *lease),
                None => gone.push(*underlay),
            }
        }
        if changes.more {
            let changed = after != before;
            self.leases = after;
            return Verdict::Agrees { changed };
        }
        // The answer is complete: now, and only now, something may be taken away.
        let named = self.named.take();
        if changes.reconciling {
            let changed = after != before;
            self.leases = after;
            self.cursor = None;
            self.reconciled = true;
            return Verdict::Agrees { changed };
        }
        let gone_now = |underlay: &UnderlayAddr| {
            let reput =
                changes.leases.iter().rev().find(|(u, _)| u == underlay).is_some_and(|(_, l)| l.is_some());
            !reput
                && (gone.contains(underlay) || named.as_ref().is_some_and(|named| !named.contains(underlay)))
        };
        after.retain(|underlay, _| !gone_now(underlay));
        if Digest::of(after.values()) != changes.digest {
            self.cursor = None;
            let expected = std::mem::take(&mut self.reconciled);
            return if expected { Verdict::AskAgain } else { Verdict::Suspect };
        }
        let (had, lost) =
            (before.len(), before.keys().filter(|u| **u != own && !after.contains_key(u)).count());
        let many = had >= MANY && lost * 2 > had;
        if many && self.unlikely.replace(changes.digest) != Some(changes.digest) {
            self.cursor = None;
            return Verdict::AskAgain;
        }
        self.unlikely = None;
        self.reconciled = false;
        let changed = after != before;
        self.leases = after;
        self.cursor = Some(changes.at);
        Verdict::Agrees { changed }
    }
}

/// No two leases overlap in the controllers' table, so who overlaps the newcomer has lost its subnet.
fn put(leases: &mut Peers, lease: Lease) {
    leases.retain(|underlay, other| *underlay == lease.underlay || !other.subnet.overlaps(lease.subnet));
    leases.insert(lease.underlay, lease);
}
