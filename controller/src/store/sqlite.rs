//! The embedded lease database: one file, for demonstrations, tests and installations with one controller.

use std::path::Path;
use std::time::Duration;

use futures::StreamExt;
use futures::stream::BoxStream;
use ipnetwork::Ipv4Network;
use sqlx::sqlite::{
    SqliteConnectOptions, SqliteJournalMode, SqlitePool, SqlitePoolOptions, SqliteRow, SqliteSynchronous,
};
use sqlx::{Row as _, Sqlite};
use weft_model::address::UnderlayAddr;
use weft_model::lease::{Cursor, Epoch, Head, Holder, Lease, Revision, Row, ServiceTime};

use super::{CommitError, Page, Store, StoreError, Write, advance, signed, state, unsigned};

const HEAD: &str =
    "select epoch, revision, floor, service_time, ticked_at, reconciling_until, unixepoch() as now from head";
const SINCE: &str = "select underlay, subnet_first, subnet_last, mac, cell_id, boot_id, state, state_since, seen_at, revision \
                     from lease where revision > $1";
const UPSERT: &str = "insert into lease (underlay, subnet_first, subnet_last, mac, cell_id, boot_id, state, state_since, \
                      seen_at, revision) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10) \
                      on conflict (underlay) do update set subnet_first = excluded.subnet_first, \
                      subnet_last = excluded.subnet_last, mac = excluded.mac, cell_id = excluded.cell_id, \
                      boot_id = excluded.boot_id, state = excluded.state, state_since = excluded.state_since, \
                      seen_at = excluded.seen_at, revision = excluded.revision";
const SET_HEAD: &str = "update head set revision = $1, floor = $2, service_time = $3, \
                        ticked_at = case when $4 then unixepoch() else ticked_at end";

#[derive(Debug, Clone)]
pub struct SqliteStore {
    pool: SqlitePool,
}

impl SqliteStore {
    /// Opens the file when it is first used, and makes it if there is none.
    pub fn new(path: &Path) -> Self {
        let options = SqliteConnectOptions::new()
            .filename(path)
            .create_if_missing(true)
            .journal_mode(SqliteJournalMode::Wal)
            .synchronous(SqliteSynchronous::Full)
            .busy_timeout(Duration::from_secs(5));
        let pool = SqlitePoolOptions::new().max_connections(4).acquire_timeout(Duration::from_secs(3));
        Self { pool: pool.connect_lazy_with(options) }
    }
}

fn failed(operation: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { operation, source }
}

impl Store for SqliteStore {
    type Write = Transaction;

    async fn prepare(&self, reconcile: Duration) -> Result<(), StoreError> {
        sqlx::migrate!("../migrations/sqlite").run(&self.pool).await.map_err(StoreError::Migrate)?;
        let epoch = getrandom::u64().unwrap_or(1);
        let insert = "insert into head values (1, $1, 0, 0, 0, unixepoch(), $2) on conflict do nothing";
        let insert = sqlx::query(insert).bind(signed(epoch)).bind(signed(reconcile.as_secs()));
        insert.execute(&self.pool).await.map_err(failed("make the head row"))?;
        Ok(())
    }

    async fn begin(&self) -> Result<Transaction, StoreError> {
        let begun = self.pool.begin_with("begin immediate").await;
        let mut transaction = begun.map_err(failed("begin a transaction"))?;
        let row =
            sqlx::query(HEAD).fetch_optional(&mut *transaction).await.map_err(failed("lock the head row"))?;
        let row = row.ok_or(StoreError::NoHead)?;
        let (head, advance) = head(&row).map_err(failed("read the head row"))?;
        Ok(Transaction { transaction, head, advance })
    }

    async fn page(&self, since: Revision) -> Result<Page, StoreError> {
        let mut transaction = self.pool.begin().await.map_err(failed("begin to read"))?;
        let row =
            sqlx::query(HEAD).fetch_optional(&mut *transaction).await.map_err(failed("read the head row"))?;
        let (head, _) = head(&row.ok_or(StoreError::NoHead)?).map_err(failed("read the head row"))?;
        let rows = sqlx::query(SINCE).bind(signed(since.0)).fetch_all(&mut *transaction).await;
        Ok(page(head, &rows.map_err(failed("read leases"))?))
    }

    async fn seen(&self, who: &[UnderlayAddr], at: ServiceTime) -> Result<(), StoreError> {
        let mut transaction =
            self.pool.begin_with("begin immediate").await.map_err(failed("begin a transaction"))?;
        for underlay in who {
            let update = sqlx::query("update lease set seen_at = max(seen_at, $2) where underlay = $1")
                .bind(i64::from(u32::from(underlay.get())))
                .bind(signed(at.0));
            update.execute(&mut *transaction).await.map_err(failed("note who was seen"))?;
        }
        transaction.commit().await.map_err(failed("note who was seen"))
    }

    /// One controller has the file; it knows what it wrote.
    fn wakes(&self) -> BoxStream<'static, ()> {
        futures::stream::pending().boxed()
    }
}

#[derive(Debug)]
pub struct Transaction {
    transaction: sqlx::Transaction<'static, Sqlite>,
    head: Head,
    advance: Duration,
}

impl Write for Transaction {
    fn head(&self) -> &Head {
        &self.head
    }

    fn advance(&self) -> Duration {
        self.advance
    }

    async fn since(&mut self, revision: Revision) -> Result<Page, StoreError> {
        let rows = sqlx::query(SINCE).bind(signed(revision.0)).fetch_all(&mut *self.transaction).await;
        Ok(page(self.head, &rows.map_err(failed("read leases"))?))
    }

    async fn commit(
        mut self,
        rows: &[Row],
        purge: &[UnderlayAddr],
        head: &Head,
        ticked: bool,
    ) -> Result<(), CommitError> {
        let undone =
            |operation| move |source| CommitError::NotCommitted(StoreError::Database { operation, source });
        for row in rows {
            let (first, last) = row.lease.subnet.bounds();
            let (state, since) = state::to_columns(row.state);
            let upsert = sqlx::query(UPSERT)
                .bind(i64::from(u32::from(row.lease.underlay.get())))
                .bind(i64::from(first))
                .bind(i64::from(last))
                .bind(row.lease.foreign_mac.map(|mac| mac.to_string()))
                .bind(&row.holder.cell_id)
                .bind(&row.holder.boot_id)
                .bind(state)
                .bind(since)
                .bind(signed(row.seen_at.0))
                .bind(signed(row.revision.0));
            upsert.execute(&mut *self.transaction).await.map_err(|error| match &error {
                sqlx::Error::Database(refused) if refused.message().contains("lease_no_overlap") => {
                    CommitError::Overlap { subnet: row.lease.subnet }
                }
                _ => undone("write a lease")(error),
            })?;
        }
        for underlay in purge {
            let delete = sqlx::query("delete from lease where underlay = $1")
                .bind(i64::from(u32::from(underlay.get())));
            delete.execute(&mut *self.transaction).await.map_err(undone("purge a lease"))?;
        }
        let set = sqlx::query(SET_HEAD)
            .bind(signed(head.cursor.revision.0))
            .bind(signed(head.floor.0))
            .bind(signed(head.service_time.0))
            .bind(ticked);
        set.execute(&mut *self.transaction).await.map_err(undone("set the head row"))?;
        self.transaction.commit().await.map_err(CommitError::Unknown)
    }
}

fn head(row: &SqliteRow) -> Result<(Head, Duration), sqlx::Error> {
    let number = |name| row.try_get::<i64, _>(name);
    let head = Head {
        cursor: Cursor {
            epoch: Epoch(unsigned(number("epoch")?)),
            revision: Revision(unsigned(number("revision")?)),
        },
        floor: Revision(unsigned(number("floor")?)),
        service_time: ServiceTime(unsigned(number("service_time")?)),
        reconciling_until: ServiceTime(unsigned(number("reconciling_until")?)),
    };
    Ok((head, advance(number("now")?, number("ticked_at")?)))
}

fn page(head: Head, rows: &[SqliteRow]) -> Page {
    let mut page = Page { head, rows: Vec::new(), unreadable: Vec::new() };
    for row in rows {
        match lease(row) {
            Some(lease) => page.rows.push(lease),
            None => page.unreadable.push(row.try_get::<i64, _>("underlay").map_or_else(
                |_| "unknown".into(),
                |number| {
                    u32::try_from(number)
                        .map_or_else(|_| number.to_string(), |n| std::net::Ipv4Addr::from(n).to_string())
                },
            )),
        }
    }
    page
}

fn lease(row: &SqliteRow) -> Option<Row> {
    let number = |name| row.try_get::<i64, _>(name).ok();
    let addr = |name| Some(std::net::Ipv4Addr::from(u32::try_from(number(name)?).ok()?));
    let text = |name| row.try_get::<String, _>(name).ok();
    let (first, last) = (addr("subnet_first")?, addr("subnet_last")?);
    let size = u32::from(last).checked_sub(u32::from(first))?.checked_add(1)?;
    let prefix = u8::try_from(32 - size.trailing_zeros()).ok().filter(|_| size.is_power_of_two())?;
    let mac = row.try_get::<Option<String>, _>("mac").ok()?;
    Some(Row {
        lease: Lease {
            underlay: addr("underlay")?.try_into().ok()?,
            subnet: Ipv4Network::new(first, prefix).ok()?.try_into().ok()?,
            foreign_mac: mac.map(|mac| mac.parse()).transpose().ok()?,
        },
        holder: Holder { cell_id: text("cell_id")?, boot_id: text("boot_id")? },
        state: state::from_columns(&text("state")?, number("state_since")?)?,
        seen_at: ServiceTime(unsigned(number("seen_at")?)),
        revision: Revision(unsigned(number("revision")?)),
    })
}
