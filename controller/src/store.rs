//! A lease database: everything the controllers need of one, and nothing that decides.
//!
//! The database is a log with an arbiter. A write transaction begins by locking the head row, so writers are in order;
//! the table's own constraint refuses what would overlap. All decisions are `weft_model::ledger`'s.

pub mod memory;
pub mod postgres;
pub mod sqlite;

use std::time::Duration;

use futures::stream::BoxStream;
use weft_model::address::UnderlayAddr;
use weft_model::lease::{Head, Revision, Row, ServiceTime};
use weft_model::subnet::OverlaySubnet;

/// The service clock advances at least so often while a controller runs, and never by more than twice this at once.
pub const TICK: Duration = Duration::from_secs(5);

/// A lease database. One conformance suite (tests/store.rs) says what each method means.
pub trait Store: Clone + Send + Sync + 'static {
    type Write: Write;

    /// Brings the schema up to date and makes the head row, if there is none. `reconcile`: how long a new table takes
    /// in claims before it gives out new subnets.
    fn prepare(&self, reconcile: Duration) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Begins a write transaction: all others wait.
    fn begin(&self) -> impl Future<Output = Result<Self::Write, StoreError>> + Send;

    /// The head, and the rows that changed after `since`, as of one moment. No lock.
    fn page(&self, since: Revision) -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// Notes when cells were last heard of. No revision, and nobody is woken.
    fn seen(
        &self,
        who: &[UnderlayAddr],
        at: ServiceTime,
    ) -> impl Future<Output = Result<(), StoreError>> + Send;

    /// Hints that another controller has committed. May miss some, may give too many; carries nothing.
    fn wakes(&self) -> BoxStream<'static, ()>;
}

/// An open write transaction; dropped without commit, nothing has happened.
pub trait Write: Send {
    fn head(&self) -> &Head;

    /// By how much service time has advanced since the last tick, within 0 and twice [`TICK`].
    fn advance(&self) -> Duration;

    fn since(&mut self, revision: Revision) -> impl Future<Output = Result<Page, StoreError>> + Send;

    /// Writes the rows in their order, deletes tombstones, sets the head. `ticked`: the clock was advanced.
    fn commit(
        self,
        rows: &[Row],
        purge: &[UnderlayAddr],
        head: &Head,
        ticked: bool,
    ) -> impl Future<Output = Result<(), CommitError>> + Send;
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Page {
    pub head: Head,
    pub rows: Vec<Row>,
    /// Rows that are not what a controller writes, by underlay address: left out and reported.
    pub unreadable: Vec<String>,
}

#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    #[error("{operation} in the lease database")]
    Database {
        operation: &'static str,
        #[source]
        source: sqlx::Error,
    },
    #[error("migrate the lease database")]
    Migrate(#[source] sqlx::migrate::MigrateError),
    #[error("the lease database has no head row; it was not prepared")]
    NoHead,
    #[error("the head row of the lease database is not what a controller writes: {0}")]
    Head(&'static str),
}

#[derive(Debug, thiserror::Error)]
pub enum CommitError {
    #[error("{subnet} overlaps a subnet in use")]
    Overlap { subnet: OverlaySubnet },
    /// The transaction is undone.
    #[error("the change was not committed")]
    NotCommitted(#[source] StoreError),
    /// The connection was lost while COMMIT was under way.
    #[error("whether the change was committed is not known")]
    Unknown(#[source] sqlx::Error),
}

/// Numbers as databases have them. Those beyond 2^63 are stored as negative ones.
fn signed(number: u64) -> i64 {
    number.cast_signed()
}

fn unsigned(number: i64) -> u64 {
    number.cast_unsigned()
}

/// `now - ticked_at`, which a step of the database's clock may have made anything.
fn advance(now: i64, ticked_at: i64) -> Duration {
    let passed = u64::try_from(now.saturating_sub(ticked_at)).unwrap_or(0);
    Duration::from_secs(passed).min(TICK * 2)
}

/// A row's state as its two columns.
mod state {
    use weft_model::lease::{ServiceTime, State};

    pub(super) fn to_columns(state: State) -> (&'static str, i64) {
        match state {
            State::Held => ("held", 0),
            State::Expired { at } => ("expired", super::signed(at.0)),
            State::Released { at } => ("released", super::signed(at.0)),
        }
    }

    pub(super) fn from_columns(state: &str, since: i64) -> Option<State> {
        let at = ServiceTime(super::unsigned(since));
        match state {
            "held" => Some(State::Held),
            "expired" => Some(State::Expired { at }),
            "released" => Some(State::Released { at }),
            _ => None,
        }
    }
}
