//! The table as it is told to cells: one edition for each committed change.
//!
//! Owned by the writer, which publishes; read by every stream. There is no queue and no log of changes: the table
//! indexed by revision is the log. An answer is made once for each edition and starting point, and shared.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, PoisonError};

use futures::stream::{Stream, unfold};
use tokio::sync::watch;
use weft_model::lease::{Changes, Cursor, Digest, Head, Lease, Revision, Row, State};
use weft_model::ledger::Ledger;
use weft_proto::controller::WatchResponse;
use weft_proto::convert::changes_to;

/// Changes in one message: some 40 bytes each, so that a message stays below 64 KiB.
const PART: usize = 1000;

/// The table at one revision.
#[derive(Debug)]
pub struct Edition {
    head: Head,
    ledger: Ledger,
    answers: Mutex<BTreeMap<Option<Revision>, Arc<[WatchResponse]>>>,
}

impl Edition {
    pub fn new(head: Head, ledger: Ledger) -> Self {
        Self { head, ledger, answers: Mutex::default() }
    }

    pub fn head(&self) -> &Head {
        &self.head
    }

    pub fn ledger(&self) -> &Ledger {
        &self.ledger
    }

    /// What a cell has to be told that stands at `cursor`. Another epoch, or a place before the oldest tombstone:
    /// the whole table. A place ahead of us: nothing new, at our revision; the cell knows what to make of that.
    pub fn since(&self, cursor: Option<Cursor>) -> Arc<[WatchResponse]> {
        let same_history = |cursor: &Cursor| {
            cursor.epoch == self.head.cursor.epoch
                && cursor.revision >= self.head.floor
                && !self.head.reconciling()
        };
        let from = cursor.filter(same_history).map(|cursor| cursor.revision.min(self.head.cursor.revision));
        let mut answers = self.answers.lock().unwrap_or_else(PoisonError::into_inner);
        let answer = answers.entry(from).or_insert_with(|| self.answer(from).into());
        Arc::clone(answer)
    }

    fn answer(&self, from: Option<Revision>) -> Vec<WatchResponse> {
        let change = |row: &Row| {
            let lease: Option<Lease> = (row.state == State::Held).then_some(row.lease);
            (row.lease.underlay, lease)
        };
        let leases: Vec<_> = match from {
            Some(from) => self.ledger.since(from).map(change).collect(),
            None => self.ledger.held().map(|lease| (lease.underlay, Some(*lease))).collect(),
        };
        let digest: Digest = self.ledger.digest();
        let mut parts: Vec<&[_]> = leases.chunks(PART).collect();
        if parts.is_empty() {
            parts.push(&[]);
        }
        let last = parts.len() - 1;
        let part = |(n, part): (usize, &[_])| {
            changes_to(&Changes {
                at: self.head.cursor,
                digest,
                from_empty: from.is_none(),
                more: n < last,
                reconciling: self.head.reconciling(),
                leases: part.to_vec(),
            })
        };
        parts.into_iter().enumerate().map(part).collect()
    }
}

/// What is told to one cell: the answer for where it stands, then the same again for each edition that changes it.
/// A slow reader takes part in later editions only.
pub fn stream(
    editions: watch::Receiver<Option<Arc<Edition>>>,
    since: Option<Cursor>,
) -> impl Stream<Item = WatchResponse> + Send {
    struct At {
        editions: watch::Receiver<Option<Arc<Edition>>>,
        /// What the cell has been told; none before the first answer.
        told: Option<(Cursor, bool)>,
        since: Option<Cursor>,
        parts: Arc<[WatchResponse]>,
        next: usize,
    }
    let at = At { editions, told: None, since, parts: Arc::new([]), next: 0 };
    unfold(at, async |mut at| {
        loop {
            if let Some(part) = at.parts.get(at.next) {
                at.next += 1;
                return Some((part.clone(), at));
            }
            let edition = at.editions.borrow_and_update().clone();
            let news =
                edition.filter(|edition| at.told != Some((edition.head.cursor, edition.head.reconciling())));
            if let Some(edition) = news {
                let since = at.told.map(|(cursor, _)| cursor).or(at.since);
                at.parts = edition.since(since);
                at.next = 0;
                at.told = Some((edition.head.cursor, edition.head.reconciling()));
            } else if at.editions.changed().await.is_err() {
                return None;
            }
        }
    })
}
