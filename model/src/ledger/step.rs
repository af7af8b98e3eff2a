//! One step of the ledger: a batch of requests, decided together. Requests of one batch see each other's effects.

use std::collections::BTreeSet;

use super::{Ledger, in_use};
use crate::address::UnderlayAddr;
use crate::lease::{Cell, Head, Lease, Revision, Row, State};
use crate::reason::Reason;
use crate::subnet::{OverlaySubnet, SubnetKind};

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// The cell's own lease, or a new one.
    Acquire(Cell),
    /// The cell believes that it holds this lease.
    Claim(Cell, Lease),
    Release(Cell),
    /// The service clock has moved: leases expire, tombstones end.
    Tick,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Answer {
    Lease(Lease),
    Done,
}

/// What a batch comes to, if it can be committed.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Decision {
    /// One for each request, in order.
    pub answers: Vec<Result<Answer, Reason>>,
    /// Rows to write one after the other, those that leave a subnet before those that take one, so that no two
    /// overlap on the way. A cell that changes its subnet is named twice: it leaves the old one, and takes the new.
    pub rows: Vec<Row>,
    /// Tombstones to delete.
    pub purge: Vec<UnderlayAddr>,
    pub head: Head,
    /// Cells that were heard of without a change to publish.
    pub seen: Vec<UnderlayAddr>,
}

impl Ledger {
    /// Decides a batch against the table as absorbed. `head` is that of the open transaction, its service time
    /// already advanced; `pick(n)` is uniform in `0..n`.
    pub fn step(&self, head: &Head, batch: &[Request], pick: &mut dyn FnMut(u32) -> u32) -> Decision {
        let revision = Revision(head.cursor.revision.0 + 1);
        let mut draft = Draft {
            before: self,
            ledger: self.clone(),
            head: *head,
            revision,
            written: BTreeSet::new(),
            purge: Vec::new(),
            seen: BTreeSet::new(),
        };
        let answers = batch.iter().map(|request| draft.decide(request, pick)).collect();
        draft.finish(answers)
    }
}

struct Draft<'a> {
    before: &'a Ledger,
    ledger: Ledger,
    head: Head,
    /// Of the rows that this step publishes.
    revision: Revision,
    written: BTreeSet<UnderlayAddr>,
    purge: Vec<UnderlayAddr>,
    seen: BTreeSet<UnderlayAddr>,
}

impl Draft<'_> {
    fn decide(&mut self, request: &Request, pick: &mut dyn FnMut(u32) -> u32) -> Result<Answer, Reason> {
        match request {
            Request::Acquire(cell) => self.acquire(cell, pick).map(Answer::Lease),
            Request::Claim(cell, lease) => self.claim(cell, lease).map(|()| Answer::Done),
            Request::Release(cell) => self.release(cell).map(|()| Answer::Done),
            Request::Tick => {
                self.tick();
                Ok(Answer::Done)
            }
        }
    }

    fn acquire(&mut self, cell: &Cell, pick: &mut dyn FnMut(u32) -> u32) -> Result<Lease, Reason> {
        let row = self.ledger.row(cell.underlay).cloned();
        if let Some(row) = &row {
            self.same_machine(cell, row)?;
            let subnet = row.lease.subnet;
            let fits = subnet.kind() == cell.wants && self.ledger.rules.pool.index_of(subnet).is_some();
            let free = in_use(row) || self.ledger.holder_of(subnet).is_none();
            if fits && free {
                self.hold(cell, row.lease);
                return Ok(row.lease);
            }
        }
        if self.head.reconciling() {
            return Err(Reason::Reconciling);
        }
        // A lease of another kind or pool ends with the new one; its subnet must not be the one to be given out.
        let subnet = self.choose(cell.wants, pick)?;
        let lease = Lease::new(cell.underlay, subnet);
        self.hold(cell, lease);
        Ok(lease)
    }

    /// A never used subnet, else the longest released one, else that of the oldest expired lease.
    fn choose(
        &mut self,
        kind: SubnetKind,
        pick: &mut dyn FnMut(u32) -> u32,
    ) -> Result<OverlaySubnet, Reason> {
        let pool = self.ledger.rules.pool;
        let mut known = BTreeSet::new();
        let (mut released, mut expired) = (None, None);
        for row in self.ledger.rows() {
            let subnet = row.lease.subnet;
            match pool.index_of(subnet) {
                Some(index) if subnet.kind() == kind => {
                    known.insert(index);
                }
                // Blocks and single addresses of one pool never overlap.
                Some(_) => continue,
                // A subnet from before the pool was changed may reach into several of today's.
                None if in_use(row) => {
                    known.extend(overlapped(pool, kind, subnet));
                    continue;
                }
                None => continue,
            }
            match row.state {
                State::Held => {}
                State::Released { at } if self.ledger.holder_of(subnet).is_none() => {
                    released = earliest(released, (at, row.lease));
                }
                State::Released { .. } => {}
                State::Expired { at } => expired = earliest(expired, (at, row.lease)),
            }
        }
        let never_used =
            pool.size(kind) - u32::try_from(known.len()).unwrap_or(u32::MAX).min(pool.size(kind));
        if never_used > 0 {
            let mut index = pick(never_used).min(never_used - 1);
            for taken in &known {
                if *taken <= index {
                    index += 1;
                }
            }
            return pool.nth(kind, index).ok_or_else(|| bug("a free index is in the pool"));
        }
        if let Some((_, lease)) = released {
            return Ok(lease.subnet);
        }
        let (_, lease) =
            expired.ok_or_else(|| Reason::PoolExhausted { network: pool.network().to_string() })?;
        let row = self.ledger.row(lease.underlay).cloned().ok_or_else(|| bug("an expired row is a row"))?;
        self.write(Row { state: State::Released { at: self.head.service_time }, ..row });
        Ok(lease.subnet)
    }

    fn claim(&mut self, cell: &Cell, lease: &Lease) -> Result<(), Reason> {
        let invalid = |why: &str| Reason::InvalidField { field: "lease".into(), why: why.into() };
        if lease.underlay != cell.underlay {
            return Err(invalid("it is of another cell"));
        }
        if self.ledger.rules.pool.index_of(lease.subnet).is_none() {
            return Err(invalid(&format!("{} is not a subnet of the pool in force", lease.subnet)));
        }
        if let Some(row) = self.ledger.row(cell.underlay).cloned() {
            self.same_machine(cell, &row)?;
            if in_use(&row) && row.lease.subnet != lease.subnet {
                let holder = format!("{} holds {}", row.holder.cell_id, row.lease);
                return Err(Reason::LeaseConflict { holder });
            }
        }
        if let Some(other) = self.ledger.holder_of(lease.subnet)
            && other.lease.underlay != cell.underlay
        {
            let holder = format!("{} holds {}", other.holder.cell_id, other.lease);
            return Err(Reason::LeaseConflict { holder });
        }
        self.hold(cell, *lease);
        Ok(())
    }

    fn release(&mut self, cell: &Cell) -> Result<(), Reason> {
        let Some(row) = self.ledger.row(cell.underlay).cloned() else { return Ok(()) };
        self.same_machine(cell, &row)?;
        if in_use(&row) {
            self.write(Row { state: State::Released { at: self.head.service_time }, ..row });
        }
        Ok(())
    }

    fn tick(&mut self) {
        let now = self.head.service_time;
        let rules = self.ledger.rules;
        let silent = |row: &&Row| row.state == State::Held && now.since(row.seen_at) >= rules.expiry;
        for row in self.ledger.rows().filter(silent).cloned().collect::<Vec<_>>() {
            self.write(Row { state: State::Expired { at: now }, ..row });
        }
        let ended = |row: &&Row| matches!(row.state, State::Released { at } if now.since(at) >= rules.keep_tombstones);
        for row in self.ledger.rows().filter(ended).cloned().collect::<Vec<_>>() {
            self.head.floor = self.head.floor.max(row.revision);
            self.written.remove(&row.lease.underlay);
            self.ledger.remove(row.lease.underlay);
            self.purge.push(row.lease.underlay);
        }
    }

    /// Another machine at the same underlay address is refused while the known one is alive.
    fn same_machine(&self, cell: &Cell, row: &Row) -> Result<(), Reason> {
        let silent = self.head.service_time.since(row.seen_at);
        let alive = row.state == State::Held && silent < self.ledger.rules.holder_grace;
        if alive && row.holder.cell_id != cell.holder.cell_id {
            let holder =
                format!("{}, seen {} s ago, holds {}", row.holder.cell_id, silent.as_secs(), row.lease);
            return Err(Reason::LeaseConflict { holder });
        }
        Ok(())
    }

    fn hold(&mut self, cell: &Cell, lease: Lease) {
        let now = self.head.service_time;
        let row = self.ledger.row(cell.underlay);
        let unchanged = row
            .is_some_and(|row| row.state == State::Held && row.lease == lease && row.holder == cell.holder);
        if unchanged {
            self.seen.insert(cell.underlay);
        } else {
            let holder = cell.holder.clone();
            self.write(Row { lease, holder, state: State::Held, seen_at: now, revision: self.revision });
        }
    }

    fn write(&mut self, row: Row) {
        self.written.insert(row.lease.underlay);
        self.ledger.put(Row { revision: self.revision, ..row });
    }

    fn finish(mut self, answers: Vec<Result<Answer, Reason>>) -> Decision {
        let mut rows = Vec::new();
        for row in self.written.iter().filter_map(|underlay| self.ledger.row(*underlay)) {
            let moved = |was: &&Row| in_use(was) && in_use(row) && was.lease.subnet != row.lease.subnet;
            if let Some(was) = self.before.row(row.lease.underlay).filter(moved) {
                let state = State::Released { at: self.head.service_time };
                rows.push(Row { state, revision: self.revision, ..was.clone() });
            }
            rows.push(row.clone());
        }
        rows.sort_by_key(in_use);
        if !rows.is_empty() || !self.purge.is_empty() {
            self.head.cursor.revision = self.revision;
        }
        // A cell may come back in the very step that ends its tombstone.
        self.purge.retain(|underlay| !self.written.contains(underlay));
        let seen = self.seen.difference(&self.written).copied().collect();
        Decision { answers, rows, purge: self.purge, head: self.head, seen }
    }
}

fn earliest<T: PartialOrd>(best: Option<(T, Lease)>, new: (T, Lease)) -> Option<(T, Lease)> {
    match best {
        Some(best) if best.0 <= new.0 => Some(best),
        _ => Some(new),
    }
}

/// Indexes of the pool's subnets that a foreign subnet reaches into.
fn overlapped(pool: crate::subnet::Pool, kind: SubnetKind, subnet: OverlaySubnet) -> Vec<u32> {
    (0..pool.size(kind))
        .filter(|index| pool.nth(kind, *index).is_some_and(|ours| ours.overlaps(subnet)))
        .collect()
}

fn bug(invariant: &str) -> Reason {
    Reason::Bug { invariant: invariant.into() }
}
