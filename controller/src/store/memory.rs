//! A lease table in memory: the meaning of [`Store`] in code, for tests and simulation.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use tokio::sync::{Mutex, OwnedMutexGuard, watch};
use tokio_stream::wrappers::WatchStream;
use weft_model::address::UnderlayAddr;
use weft_model::lease::{Cursor, Epoch, Head, Revision, Row, ServiceTime, State};

use super::{CommitError, Page, Store, StoreError, TICK, Write};

#[derive(Debug, Clone)]
pub struct Memory {
    table: Arc<Mutex<Table>>,
    wakes: watch::Sender<()>,
}

#[derive(Debug, Default)]
struct Table {
    head: Option<Head>,
    rows: BTreeMap<UnderlayAddr, Row>,
}

impl Default for Memory {
    fn default() -> Self {
        Self { table: Arc::default(), wakes: watch::channel(()).0 }
    }
}

impl Table {
    fn page(&self, since: Revision) -> Result<Page, StoreError> {
        let head = self.head.ok_or(StoreError::NoHead)?;
        let rows = self.rows.values().filter(|row| row.revision > since).cloned().collect();
        Ok(Page { head, rows, unreadable: Vec::new() })
    }
}

impl Store for Memory {
    type Write = Transaction;

    async fn prepare(&self, reconcile: Duration) -> Result<(), StoreError> {
        let epoch = Epoch(getrandom::u64().unwrap_or(1));
        self.table.lock().await.head.get_or_insert(Head {
            cursor: Cursor { epoch, revision: Revision(0) },
            floor: Revision(0),
            service_time: ServiceTime(0),
            reconciling_until: ServiceTime(reconcile.as_secs()),
        });
        Ok(())
    }

    async fn begin(&self) -> Result<Transaction, StoreError> {
        let table = Arc::clone(&self.table).lock_owned().await;
        let head = table.head.ok_or(StoreError::NoHead)?;
        Ok(Transaction { table, head, wakes: self.wakes.clone() })
    }

    async fn page(&self, since: Revision) -> Result<Page, StoreError> {
        self.table.lock().await.page(since)
    }

    async fn seen(&self, who: &[UnderlayAddr], at: ServiceTime) -> Result<(), StoreError> {
        let mut table = self.table.lock().await;
        for underlay in who {
            if let Some(row) = table.rows.get_mut(underlay) {
                row.seen_at = row.seen_at.max(at);
            }
        }
        Ok(())
    }

    fn wakes(&self) -> BoxStream<'static, ()> {
        WatchStream::from_changes(self.wakes.subscribe()).boxed()
    }
}

#[derive(Debug)]
pub struct Transaction {
    table: OwnedMutexGuard<Table>,
    head: Head,
    wakes: watch::Sender<()>,
}

impl Write for Transaction {
    fn head(&self) -> &Head {
        &self.head
    }

    /// Its clock runs by ticks alone.
    fn advance(&self) -> Duration {
        TICK
    }

    async fn since(&mut self, revision: Revision) -> Result<Page, StoreError> {
        self.table.page(revision)
    }

    async fn commit(
        mut self,
        rows: &[Row],
        purge: &[UnderlayAddr],
        head: &Head,
        _ticked: bool,
    ) -> Result<(), CommitError> {
        let mut table = self.table.rows.clone();
        for row in rows {
            let in_use = |row: &Row| !matches!(row.state, State::Released { .. });
            let clash = table.values().any(|other| {
                other.lease.underlay != row.lease.underlay
                    && in_use(other)
                    && in_use(row)
                    && other.lease.subnet.overlaps(row.lease.subnet)
            });
            if clash {
                return Err(CommitError::Overlap { subnet: row.lease.subnet });
            }
            table.insert(row.lease.underlay, row.clone());
        }
        table.retain(|underlay, _| !purge.contains(underlay));
        self.table.rows = table;
        self.table.head = Some(*head);
        self.wakes.send_replace(());
        Ok(())
    }
}
