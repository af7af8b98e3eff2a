//! Addresses of former containers: free again once the kernel's connections of theirs are gone.

use std::collections::BTreeSet;
use std::mem;
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use tokio::task::spawn_blocking;
use tokio::time::Instant;
use tracing::warn;
use weft_model::address::OverlayAddr;
use weft_model::cell::Wanted;
use weft_model::reason::Reason;

use super::Running;
use crate::inbox::Request;
use crate::kernel::Kernel;

/// To forget connections their whole table is read. So those of all that was deleted within so long are forgotten in one
/// walk, unless there is no other address.
const TOGETHER: Duration = Duration::from_secs(1);

/// Walks through the table of connections.
#[derive(Debug, Default)]
pub(super) struct Walks {
    under_way: bool,
    /// When the last one began.
    last: Option<Instant>,
    /// The last one failed.
    fail: bool,
}

impl Walks {
    /// When the next one is due, as some addresses rest; `now`, if it is.
    fn due(&self, now: Instant, none_free: bool) -> Option<Instant> {
        let at_once = none_free && !self.fail;
        let due = self.last.filter(|_| !at_once).map(|last| last + TOGETHER);
        (!self.under_way).then_some(due.unwrap_or(now))
    }
}

impl<K: Kernel> Running<K> {
    /// Whether no address is free, and some will be in a moment.
    pub(super) fn addresses_come(&self) -> bool {
        let full = matches!(self.task.cell.ready(), Err(Reason::SubnetFull { .. }));
        let some = self.leaving || !self.task.cell.roster().resting().is_empty();
        full && some && !self.walks.fail
    }

    /// Who waits for an address and is not wanted any more.
    pub(super) fn refuse_parked(&mut self, unwanted: impl Fn(&Wanted) -> bool) {
        let parked = mem::take(&mut self.parked);
        for request in parked {
            match request {
                Request::Add { wanted, reply, .. } if unwanted(&wanted) => {
                    drop(reply.send(Err(Reason::Busy)))
                }
                other => self.parked.push(other),
            }
        }
    }

    /// When the next walk is due, if any is; `now`, if it is.
    pub(super) fn forget_at(&self, now: Instant) -> Option<Instant> {
        let roster = self.task.cell.roster();
        if roster.resting().is_empty() { None } else { self.walks.due(now, roster.ipam().free() == 0) }
    }

    pub(super) fn forget_resting(&mut self) {
        let now = Instant::now();
        if self.forget_at(now).is_none_or(|due| now < due) {
            return;
        }
        let resting = self.task.cell.roster().resting().clone();
        (self.walks.under_way, self.walks.last) = (true, Some(now));
        let (inbox, connections) = (self.task.inbox.clone(), Arc::clone(&self.connections));
        tokio::spawn(async move {
            let addrs = resting.clone();
            let forget = move || connections.lock().unwrap_or_else(PoisonError::into_inner).forget(&addrs);
            let told = match spawn_blocking(forget).await {
                Ok(Ok(_)) => Request::Forgotten(resting),
                Ok(Err(error)) => Request::NotForgotten(error.reason()),
                Err(panic) => Request::NotForgotten(Reason::Bug { invariant: panic.to_string() }),
            };
            inbox.tell(told).await;
        });
    }

    pub(super) fn forgotten(&mut self, addrs: &BTreeSet<OverlayAddr>) {
        (self.walks.under_way, self.walks.fail) = (false, false);
        self.task.cell.forgotten(addrs);
    }

    pub(super) fn not_forgotten(&mut self, why: &Reason) {
        self.walks.under_way = false;
        if !mem::replace(&mut self.walks.fail, true) {
            warn!(%why, "connections of former containers cannot be removed; their addresses rest");
        }
    }
}
