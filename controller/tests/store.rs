//! What every lease database must do: one suite for memory, SQLite and a real Postgres.

use std::net::Ipv4Addr;
use std::time::Duration;

use weft_controller::store::memory::Memory;
use weft_controller::store::postgres::PostgresStore;
use weft_controller::store::sqlite::SqliteStore;
use weft_controller::store::{CommitError, Store, StoreError, Write};
use weft_model::address::UnderlayAddr;
use weft_model::lease::{Head, Holder, Lease, Revision, Row, ServiceTime, State};
use weft_testbed::postgres::Postgres;

fn underlay(n: u8) -> UnderlayAddr {
    Ipv4Addr::new(10, 0, 0, n).try_into().expect("address")
}

fn row(n: u8, subnet: &str, state: State, revision: u64) -> Row {
    let mut lease = Lease::new(underlay(n), subnet.parse().expect("subnet"));
    if n == 9 {
        lease.foreign_mac = Some("02:00:00:00:00:09".parse().expect("mac"));
    }
    let holder = Holder { cell_id: format!("cell-{n}"), boot_id: "boot".into() };
    Row { lease, holder, state, seen_at: ServiceTime(7), revision: Revision(revision) }
}

/// Commits rows as the next revision.
async fn commit(store: &impl Store, rows: &[Row], purge: &[UnderlayAddr]) -> Result<Head, CommitError> {
    let transaction = store.begin().await.expect("begin");
    let mut head = *transaction.head();
    head.cursor.revision.0 += 1;
    transaction.commit(rows, purge, &head, false).await.map(|()| head)
}

async fn conforms(store: impl Store) {
    assert!(store.begin().await.is_err(), "what was not prepared cannot be used");
    store.prepare(Duration::from_secs(30)).await.expect("prepare");
    store.prepare(Duration::from_secs(99)).await.expect("prepare again");
    let empty = store.page(Revision(0)).await.expect("page");
    assert_eq!(
        (empty.rows.len(), empty.head.cursor.revision, empty.head.service_time),
        (0, Revision(0), ServiceTime(0))
    );
    assert_eq!(empty.head.reconciling_until, ServiceTime(30), "the first preparation counts");

    rows_come_back_as_they_were(&store).await;
    what_overlaps_is_refused_and_undone(&store).await;
    a_transaction_dropped_has_not_happened(&store).await;
    seen_changes_no_revision(&store).await;
    writers_take_turns(&store).await;
    time_advances_with_ticks_only(&store).await;
}

async fn rows_come_back_as_they_were(store: &impl Store) {
    let rows = [
        row(1, "10.255.1.0/24", State::Held, 1),
        row(2, "10.255.2.0/24", State::Expired { at: ServiceTime(5) }, 1),
        row(3, "10.255.1.0/24", State::Released { at: ServiceTime(6) }, 1),
        row(9, "10.255.0.9/32", State::Held, 1),
    ];
    let head = commit(store, &rows, &[]).await.expect("commit");
    let mut page = store.page(Revision(0)).await.expect("page");
    page.rows.sort_by_key(|row| row.lease.underlay);
    assert_eq!((page.head, page.rows.as_slice(), page.unreadable.len()), (head, rows.as_slice(), 0));

    // Only what changed since, and what is purged is gone.
    commit(store, &[row(2, "10.255.2.0/24", State::Held, 2)], &[underlay(3)]).await.expect("commit");
    let page = store.page(Revision(1)).await.expect("page");
    assert_eq!(page.rows, [row(2, "10.255.2.0/24", State::Held, 2)]);
    assert_eq!(store.page(Revision(0)).await.expect("page").rows.len(), 3);
    let mut transaction = store.begin().await.expect("begin");
    assert_eq!(transaction.since(Revision(1)).await.expect("since").rows.len(), 1);
}

async fn what_overlaps_is_refused_and_undone(store: &impl Store) {
    let before = store.page(Revision(0)).await.expect("page");
    for taken in ["10.255.1.0/24", "10.255.1.128/25", "10.255.0.0/22"] {
        let rows = [row(4, "10.255.4.0/24", State::Held, 3), row(5, taken, State::Held, 3)];
        match commit(store, &rows, &[]).await {
            Err(CommitError::Overlap { subnet }) => assert_eq!(subnet.to_string(), taken),
            other => panic!("{taken}: {other:?}"),
        }
    }
    assert_eq!(store.page(Revision(0)).await.expect("page"), before, "no half of it was written");

    // Who leaves first makes room; a cell may be named twice.
    let swap = [
        row(1, "10.255.1.0/24", State::Released { at: ServiceTime(8) }, 3),
        row(1, "10.255.6.0/24", State::Held, 3),
        row(5, "10.255.1.0/24", State::Held, 3),
    ];
    commit(store, &swap, &[]).await.expect("swap");
}

async fn a_transaction_dropped_has_not_happened(store: &impl Store) {
    let before = store.page(Revision(0)).await.expect("page");
    drop(store.begin().await.expect("begin"));
    // Nor does it hold up the next one.
    let next = tokio::time::timeout(Duration::from_secs(5), store.begin()).await;
    drop(next.expect("no lock is left behind").expect("begin"));
    assert_eq!(store.page(Revision(0)).await.expect("page"), before);
}

async fn seen_changes_no_revision(store: &impl Store) {
    let before = store.page(Revision(0)).await.expect("page");
    store.seen(&[underlay(1), underlay(200)], ServiceTime(50)).await.expect("seen");
    store.seen(&[underlay(1)], ServiceTime(40)).await.expect("seen");
    let after = store.page(Revision(0)).await.expect("page");
    assert_eq!(after.head, before.head);
    let seen = after.rows.iter().find(|row| row.lease.underlay == underlay(1)).expect("row").seen_at;
    assert_eq!(seen, ServiceTime(50), "it never goes back");
}

/// Each reads, adds one and writes: no update is lost.
async fn writers_take_turns(store: &impl Store) {
    let before = store.page(Revision(0)).await.expect("page").head.cursor.revision.0;
    let writers = (0..2).map(|_| {
        let store = store.clone();
        tokio::spawn(async move {
            for _ in 0..10 {
                commit(&store, &[], &[]).await.expect("commit");
            }
        })
    });
    for writer in writers.collect::<Vec<_>>() {
        writer.await.expect("writer");
    }
    let after = store.page(Revision(0)).await.expect("page").head.cursor.revision.0;
    assert_eq!(after, before + 20);
}

async fn time_advances_with_ticks_only(store: &impl Store) {
    let before = store.page(Revision(0)).await.expect("page").head.service_time;
    let transaction = store.begin().await.expect("begin");
    assert!(transaction.advance() <= Duration::from_secs(10), "an outage does not count");
    let mut head = *transaction.head();
    head.service_time = head.service_time.after(Duration::from_secs(3));
    transaction.commit(&[], &[], &head, true).await.expect("commit");
    let after = store.page(Revision(0)).await.expect("page").head.service_time;
    assert_eq!(after, before.after(Duration::from_secs(3)));
}

fn postgres(server: &Postgres, database: &str) -> PostgresStore {
    let mut config = server.database(database).expect("database");
    config.as_object_mut().expect("object").remove("type");
    PostgresStore::new(serde_json::from_value(config).expect("configuration"))
}

#[tokio::test]
async fn memory_conforms() {
    conforms(Memory::default()).await;
}

#[tokio::test]
async fn sqlite_conforms() {
    let directory = tempfile::tempdir().expect("directory");
    conforms(SqliteStore::new(&directory.path().join("leases.sqlite"))).await;
}

#[tokio::test]
async fn postgres_conforms() {
    let server = Postgres::scratch().expect("a Postgres server");
    conforms(postgres(&server, "conforms")).await;
}

#[tokio::test]
async fn sqlite_keeps_what_was_committed() {
    let directory = tempfile::tempdir().expect("directory");
    let file = directory.path().join("leases.sqlite");
    let store = SqliteStore::new(&file);
    store.prepare(Duration::ZERO).await.expect("prepare");
    let head = commit(&store, &[row(1, "10.255.1.0/24", State::Held, 1)], &[]).await.expect("commit");
    drop(store);
    let page = SqliteStore::new(&file).page(Revision(0)).await.expect("page");
    assert_eq!((page.head, page.rows.len()), (head, 1));
}

/// A row that somebody wrote by hand is left out and named; its neighbours hold.
#[tokio::test]
async fn postgres_leaves_out_a_row_that_cannot_be_read() {
    let server = Postgres::scratch().expect("a Postgres server");
    let store = postgres(&server, "poisoned");
    store.prepare(Duration::ZERO).await.expect("prepare");
    commit(&store, &[row(1, "10.255.1.0/24", State::Held, 1), row(2, "10.255.2.0/24", State::Held, 1)], &[])
        .await
        .expect("commit");
    server.sql("poisoned", "update lease set mac = 'zz' where underlay = '10.0.0.1'").expect("poison");
    server
        .sql("poisoned", "insert into lease select 'fd00::1', 'fd01::/64', null, 'x', 'x', 'held', 0, 0, 1")
        .expect("poison");
    let page = store.page(Revision(0)).await.expect("page");
    assert_eq!(page.rows, [row(2, "10.255.2.0/24", State::Held, 1)]);
    assert_eq!(page.unreadable.len(), 2, "{:?}", page.unreadable);
}

/// The database itself refuses what no controller should ask for.
#[tokio::test]
async fn postgres_constraints_hold_without_a_controller() {
    let server = Postgres::scratch().expect("a Postgres server");
    let store = postgres(&server, "constraints");
    store.prepare(Duration::ZERO).await.expect("prepare");
    let insert = |underlay: &str, subnet: &str, state: &str| {
        server.sql(
            "constraints",
            &format!(
                "insert into lease values ('{underlay}', '{subnet}', null, 'c', 'b', '{state}', 0, 0, 1)"
            ),
        )
    };
    insert("10.0.0.1", "10.255.1.0/24", "held").expect("first");
    insert("10.0.0.2", "10.255.1.0/24", "released").expect("released rows are memory");
    for (underlay, subnet, state, constraint) in [
        ("10.0.0.3", "10.255.1.0/25", "held", "lease_no_overlap"),
        ("10.0.0.3", "10.255.0.0/16", "expired", "lease_no_overlap"),
        ("10.0.0.1", "10.255.9.0/24", "held", "lease_underlay"),
        ("10.0.0.3", "10.255.9.0/24", "lost", "lease_state"),
        ("10.0.0.3", "10.255.9.1/24", "held", "cidr"),
    ] {
        let refused = insert(underlay, subnet, state).expect_err(subnet).to_string();
        assert!(refused.contains(constraint), "{subnet}: {refused}");
    }
}

#[tokio::test]
async fn postgres_that_is_away_is_an_error_within_seconds_and_then_back() {
    let server = Postgres::scratch().expect("a Postgres server");
    let store = postgres(&server, "away");
    store.prepare(Duration::ZERO).await.expect("prepare");
    let head = commit(&store, &[row(1, "10.255.1.0/24", State::Held, 1)], &[]).await.expect("commit");
    server.kill().expect("kill -9");
    let away = tokio::time::timeout(Duration::from_secs(20), store.begin()).await.expect("an answer in time");
    assert!(matches!(away, Err(StoreError::Database { .. })), "{:?}", away.err());
    server.start().expect("start");
    let page = store.page(Revision(0)).await.expect("page");
    assert_eq!((page.head, page.rows.len()), (head, 1), "what was committed is there");
}
