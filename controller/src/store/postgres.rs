//! The lease database on Postgres, for deployments.
//!
//! sqlx owns every statement; tokio-postgres owns the one connection on which only LISTEN is ever sent, and which
//! yields nothing but a hint (docs/adr/0003).

pub mod connect;

use std::collections::BTreeSet;
use std::net::IpAddr;
use std::time::Duration;

use futures::stream::BoxStream;
use ipnetwork::IpNetwork;
use sqlx::postgres::{PgPool, PgPoolOptions, PgRow};
use sqlx::{Postgres, Row as _};
use weft_model::address::UnderlayAddr;
use weft_model::lease::{Cursor, Epoch, Head, Holder, Lease, Revision, Row, ServiceTime};

use super::{CommitError, Page, Store, StoreError, Write, advance, signed, state, unsigned};
use connect::PostgresConfig;

const HEAD: &str = "select epoch, revision, floor, service_time, ticked_at, reconciling_until, \
                    extract(epoch from clock_timestamp())::bigint as now from head";
const LOCK_HEAD: &str = "select epoch, revision, floor, service_time, ticked_at, reconciling_until, \
                         extract(epoch from clock_timestamp())::bigint as now from head for update";
const SINCE: &str = "select underlay, subnet::inet as subnet, mac, cell_id, boot_id, state, state_since, seen_at, revision \
                     from lease where revision > $1";
const UPSERT: &str = "insert into lease (underlay, subnet, mac, cell_id, boot_id, state, state_since, seen_at, revision) \
                      values ($1, $2::inet::cidr, $3, $4, $5, $6, $7, $8, $9) \
                      on conflict on constraint lease_underlay do update set subnet = excluded.subnet, \
                      mac = excluded.mac, cell_id = excluded.cell_id, boot_id = excluded.boot_id, \
                      state = excluded.state, state_since = excluded.state_since, seen_at = excluded.seen_at, \
                      revision = excluded.revision";
const SET_HEAD: &str = "update head set revision = $1, floor = $2, service_time = $3, ticked_at = \
                        case when $4 then extract(epoch from clock_timestamp())::bigint else ticked_at end";
/// The channel of LISTEN and NOTIFY.
const CHANNEL: &str = "weft_lease";

#[derive(Debug, Clone)]
pub struct PostgresStore {
    pool: PgPool,
    config: PostgresConfig,
}

impl PostgresStore {
    /// Connects when it is first used.
    pub fn new(config: PostgresConfig) -> Self {
        let pool = PgPoolOptions::new()
            .max_connections(config.max_open_connections)
            .acquire_timeout(Duration::from_secs(3))
            .connect_lazy_with(config.for_sqlx());
        Self { pool, config }
    }
}

fn failed(operation: &'static str) -> impl Fn(sqlx::Error) -> StoreError {
    move |source| StoreError::Database { operation, source }
}

impl Store for PostgresStore {
    type Write = Transaction;

    async fn prepare(&self, reconcile: Duration) -> Result<(), StoreError> {
        sqlx::migrate!("../migrations/postgres").run(&self.pool).await.map_err(StoreError::Migrate)?;
        let epoch = getrandom::u64().unwrap_or(1);
        let insert = "insert into head values (true, $1, 0, 0, 0, extract(epoch from clock_timestamp())::bigint, $2) \
                      on conflict do nothing";
        let insert = sqlx::query(insert).bind(signed(epoch)).bind(signed(reconcile.as_secs()));
        insert.execute(&self.pool).await.map_err(failed("make the head row"))?;
        Ok(())
    }

    async fn begin(&self) -> Result<Transaction, StoreError> {
        let mut transaction = self.pool.begin().await.map_err(failed("begin a transaction"))?;
        let row = sqlx::query(LOCK_HEAD).fetch_optional(&mut *transaction).await;
        let row = row.map_err(failed("lock the head row"))?.ok_or(StoreError::NoHead)?;
        let (head, advance) = head(&row).map_err(failed("read the head row"))?;
        Ok(Transaction { transaction, head, advance })
    }

    async fn page(&self, since: Revision) -> Result<Page, StoreError> {
        let mut transaction = self.pool.begin().await.map_err(failed("begin to read"))?;
        let isolation = sqlx::query("set transaction isolation level repeatable read, read only");
        isolation.execute(&mut *transaction).await.map_err(failed("begin to read"))?;
        let row =
            sqlx::query(HEAD).fetch_optional(&mut *transaction).await.map_err(failed("read the head row"))?;
        let (head, _) = head(&row.ok_or(StoreError::NoHead)?).map_err(failed("read the head row"))?;
        let rows = sqlx::query(SINCE).bind(signed(since.0)).fetch_all(&mut *transaction).await;
        Ok(page(head, &rows.map_err(failed("read leases"))?))
    }

    async fn seen(&self, who: &[UnderlayAddr], at: ServiceTime) -> Result<(), StoreError> {
        // Sorted, so that two controllers lock rows in one order.
        let who: BTreeSet<UnderlayAddr> = who.iter().copied().collect();
        let who: Vec<IpNetwork> = who.into_iter().map(|underlay| IpAddr::V4(underlay.get()).into()).collect();
        let update = "update lease set seen_at = greatest(seen_at, $2) where underlay = any($1)";
        let update = sqlx::query(update).bind(who).bind(signed(at.0));
        update.execute(&self.pool).await.map_err(failed("note who was seen"))?;
        Ok(())
    }

    fn wakes(&self) -> BoxStream<'static, ()> {
        connect::listen(self.config.clone(), CHANNEL)
    }
}

#[derive(Debug)]
pub struct Transaction {
    transaction: sqlx::Transaction<'static, Postgres>,
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
            let (state, since) = state::to_columns(row.state);
            let upsert = sqlx::query(UPSERT)
                .bind(IpNetwork::from(IpAddr::V4(row.lease.underlay.get())))
                .bind(IpNetwork::V4(row.lease.subnet.network()))
                .bind(row.lease.foreign_mac.map(|mac| mac.to_string()))
                .bind(&row.holder.cell_id)
                .bind(&row.holder.boot_id)
                .bind(state)
                .bind(since)
                .bind(signed(row.seen_at.0))
                .bind(signed(row.revision.0));
            upsert.execute(&mut *self.transaction).await.map_err(|error| match &error {
                sqlx::Error::Database(refused) if refused.constraint() == Some("lease_no_overlap") => {
                    CommitError::Overlap { subnet: row.lease.subnet }
                }
                _ => undone("write a lease")(error),
            })?;
        }
        if !purge.is_empty() {
            let who: Vec<IpNetwork> =
                purge.iter().map(|underlay| IpAddr::V4(underlay.get()).into()).collect();
            let delete = sqlx::query("delete from lease where underlay = any($1)").bind(who);
            delete.execute(&mut *self.transaction).await.map_err(undone("purge leases"))?;
        }
        let set = sqlx::query(SET_HEAD)
            .bind(signed(head.cursor.revision.0))
            .bind(signed(head.floor.0))
            .bind(signed(head.service_time.0))
            .bind(ticked);
        set.execute(&mut *self.transaction).await.map_err(undone("set the head row"))?;
        if !rows.is_empty() {
            let notify = sqlx::query("select pg_notify($1, '')").bind(CHANNEL);
            notify.execute(&mut *self.transaction).await.map_err(undone("notify the others"))?;
        }
        self.transaction.commit().await.map_err(CommitError::Unknown)
    }
}

fn head(row: &PgRow) -> Result<(Head, Duration), sqlx::Error> {
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

fn page(head: Head, rows: &[PgRow]) -> Page {
    let mut page = Page { head, rows: Vec::new(), unreadable: Vec::new() };
    for row in rows {
        match lease(row) {
            Some(lease) => page.rows.push(lease),
            None => page.unreadable.push(
                row.try_get::<IpNetwork, _>("underlay")
                    .map_or_else(|_| "unknown".into(), |addr| addr.to_string()),
            ),
        }
    }
    page
}

fn lease(row: &PgRow) -> Option<Row> {
    let number = |name| row.try_get::<i64, _>(name).ok();
    let text = |name| row.try_get::<String, _>(name).ok();
    let network = |name| match row.try_get::<IpNetwork, _>(name).ok()? {
        IpNetwork::V4(network) => Some(network),
        IpNetwork::V6(_) => None,
    };
    let mac = row.try_get::<Option<String>, _>("mac").ok()?;
    Some(Row {
        lease: Lease {
            underlay: network("underlay")?.ip().try_into().ok()?,
            subnet: network("subnet")?.try_into().ok()?,
            foreign_mac: mac.map(|mac| mac.parse()).transpose().ok()?,
        },
        holder: Holder { cell_id: text("cell_id")?, boot_id: text("boot_id")? },
        state: state::from_columns(&text("state")?, number("state_since")?)?,
        seen_at: ServiceTime(unsigned(number("seen_at")?)),
        revision: Revision(unsigned(number("revision")?)),
    })
}
