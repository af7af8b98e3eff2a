//! The only task of a controller that writes to the lease database.
//!
//! Owns the controller's replica of the table and publishes its editions. Woken by requests, by the clock and by hints
//! from the database. All that waits goes into one transaction: begin, absorb what others wrote, decide, commit,
//! answer. Its cost does not grow with the number of cells.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::StreamExt;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::time::{Instant, MissedTickBehavior, interval, timeout};
use tracing::{debug, error, info, warn};
use weft_daemon::cause::chain;
use weft_model::address::UnderlayAddr;
use weft_model::lease::{Head, Revision};
use weft_model::ledger::{Answer, Decision, Ledger, Request, Rules};
use weft_model::reason::Reason;

use crate::editions::Edition;
use crate::metrics::Metrics;
use crate::store::{CommitError, Page, Store, StoreError, TICK, Write};

/// Requests that wait. A whole foundation that comes back at once fits.
const QUEUE: usize = 16 * 1024;
/// Requests in one transaction.
const BATCH: usize = 1024;
/// How often the head row is read, whatever hints there are.
const LOOK: Duration = Duration::from_secs(1);
/// How often it is noted who follows, and how often expiry is looked for with everybody's notes at hand.
const SEEN: Duration = Duration::from_secs(20);
const EXPIRE: Duration = Duration::from_secs(60);
/// A transaction takes milliseconds; one that takes longer meets a database in trouble.
const TRANSACTION: Duration = Duration::from_secs(5);

type Reply = oneshot::Sender<Result<Answer, Reason>>;

/// How the rest of the controller asks the writer.
#[derive(Debug, Clone)]
pub struct Desk {
    requests: mpsc::Sender<(Request, Reply)>,
    followers: Followers,
    editions: watch::Receiver<Option<Arc<Edition>>>,
}

/// The cells whose watch is open here, with how many they have open.
#[derive(Debug, Clone, Default)]
struct Followers(Arc<Mutex<BTreeMap<UnderlayAddr, usize>>>);

/// One open watch: while it lives, the cell's lease is kept.
#[derive(Debug)]
pub struct Follower {
    followers: Followers,
    underlay: UnderlayAddr,
}

impl Desk {
    pub async fn ask(&self, request: Request) -> Result<Answer, Reason> {
        let (reply, answer) = oneshot::channel();
        self.requests.try_send((request, reply)).map_err(|_| Reason::Busy)?;
        answer.await.unwrap_or(Err(Reason::StoreUnavailable))
    }

    pub fn follow(&self, underlay: UnderlayAddr) -> Follower {
        let mut followers = self.followers.0.lock().unwrap_or_else(PoisonError::into_inner);
        *followers.entry(underlay).or_default() += 1;
        Follower { followers: self.followers.clone(), underlay }
    }

    pub fn editions(&self) -> watch::Receiver<Option<Arc<Edition>>> {
        self.editions.clone()
    }
}

impl Drop for Follower {
    fn drop(&mut self) {
        let mut followers = self.followers.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(open) = followers.get_mut(&self.underlay) {
            *open -= 1;
            if *open == 0 {
                followers.remove(&self.underlay);
            }
        }
    }
}

#[derive(Debug)]
pub struct Writer<S> {
    store: S,
    rules: Rules,
    reconcile: Duration,
    /// None until the database has been read, and after a loss of certainty.
    ledger: Option<Ledger>,
    requests: mpsc::Receiver<(Request, Reply)>,
    editions: watch::Sender<Option<Arc<Edition>>>,
    followers: Followers,
    /// Cells that asked for what they hold already.
    seen: BTreeSet<UnderlayAddr>,
    reported: BTreeSet<String>,
    away: bool,
    expire_at: Instant,
    metrics: Arc<Metrics>,
}

/// Makes a writer and the desk where it is asked.
pub fn writer<S: Store>(
    store: S,
    rules: Rules,
    reconcile: Duration,
    metrics: Arc<Metrics>,
) -> (Writer<S>, Desk) {
    let (requests, waiting) = mpsc::channel(QUEUE);
    let (editions, published) = watch::channel(None);
    let followers = Followers::default();
    let desk = Desk { requests, followers: followers.clone(), editions: published };
    let writer = Writer {
        store,
        rules,
        reconcile,
        ledger: None,
        requests: waiting,
        editions,
        followers,
        seen: BTreeSet::new(),
        reported: BTreeSet::new(),
        away: false,
        expire_at: Instant::now(),
        metrics,
    };
    (writer, desk)
}

/// Why a batch was not decided.
#[derive(Debug, thiserror::Error)]
enum Undecided {
    #[error(transparent)]
    Store(#[from] StoreError),
    #[error(transparent)]
    Commit(#[from] CommitError),
    #[error("the lease database did not answer in time")]
    Late,
    /// While COMMIT was under way.
    #[error("the lease database did not answer a COMMIT in time")]
    LateCommit,
}

impl<S: Store> Writer<S> {
    /// Runs until every desk is gone.
    pub async fn run(mut self) {
        let mut wakes = self.store.wakes();
        let (mut look, mut tick, mut seen) = (interval(LOOK), interval(TICK), interval(SEEN));
        for timer in [&mut look, &mut tick, &mut seen] {
            timer.set_missed_tick_behavior(MissedTickBehavior::Delay);
        }
        loop {
            tokio::select! {
                request = self.requests.recv() => {
                    let Some(request) = request else { return };
                    let mut batch = vec![request];
                    while batch.len() < BATCH && let Ok(more) = self.requests.try_recv() {
                        batch.push(more);
                    }
                    self.serve(batch).await;
                }
                Some(()) = wakes.next() => self.look().await,
                _ = look.tick() => self.look().await,
                _ = tick.tick() => self.tick().await,
                _ = seen.tick() => self.note_seen().await,
            }
        }
    }

    async fn serve(&mut self, batch: Vec<(Request, Reply)>) {
        let (requests, replies): (Vec<Request>, Vec<Reply>) = batch.into_iter().unzip();
        let answers = match self.decide(&requests, false).await {
            // Another controller was faster with a subnet, or a row was not as we knew it: with a fresh replica.
            Err(Undecided::Commit(CommitError::Overlap { subnet })) => {
                warn!(%subnet, "database refused an overlap; decided again from the whole table");
                self.ledger = None;
                self.decide(&requests, false).await
            }
            decided => decided,
        };
        match answers {
            Ok(answers) => {
                for (reply, answer) in replies.into_iter().zip(answers) {
                    drop(reply.send(answer));
                }
            }
            Err(error) => {
                let reason = match error {
                    Undecided::Commit(CommitError::Unknown(_)) | Undecided::LateCommit => {
                        Reason::CommitUnknown
                    }
                    _ => Reason::StoreUnavailable,
                };
                self.lost(&error);
                for reply in replies {
                    drop(reply.send(Err(reason.clone())));
                }
            }
        }
    }

    async fn tick(&mut self) {
        let expire = Instant::now() >= self.expire_at;
        let requests = if expire { vec![Request::Tick] } else { Vec::new() };
        match self.decide(&requests, true).await {
            Ok(_) if expire => self.expire_at = Instant::now() + EXPIRE,
            Ok(_) => {}
            Err(error) => self.lost(&error),
        }
    }

    /// One transaction. `ticking`: the service clock is advanced, and nothing is believed of who was last seen when,
    /// for that is written without a revision.
    async fn decide(
        &mut self,
        requests: &[Request],
        ticking: bool,
    ) -> Result<Vec<Result<Answer, Reason>>, Undecided> {
        let began = Instant::now();
        let mut committing = false;
        let transaction = self.transact(requests, ticking, &mut committing);
        let decided = match timeout(TRANSACTION, transaction).await {
            Ok(decided) => decided,
            Err(_) if committing => Err(Undecided::LateCommit),
            Err(_) => Err(Undecided::Late),
        };
        self.metrics.transaction(began.elapsed());
        if let Ok(decision) = &decided {
            for row in &decision.rows {
                info!(underlay = %row.lease.underlay, subnet = %row.lease.subnet, state = ?row.state,
                      cell = row.holder.cell_id, revision = row.revision.0, "lease written");
            }
        }
        decided.map(|decision| decision.answers)
    }

    async fn transact(
        &mut self,
        requests: &[Request],
        ticking: bool,
        committing: &mut bool,
    ) -> Result<Decision, Undecided> {
        if self.ledger.is_none() {
            self.store.prepare(self.reconcile).await?;
        }
        let mut transaction = self.store.begin().await?;
        let mut head = *transaction.head();
        let whole = ticking && !requests.is_empty();
        let since = if whole { Revision(0) } else { self.known(&head) };
        let page = transaction.since(since).await?;
        let ledger = self.absorb(page, since);
        if ticking {
            head.service_time = head.service_time.after(transaction.advance());
        }
        let decision = ledger.step(&head, requests, &mut pick);
        if decision.rows.is_empty() && decision.purge.is_empty() && !ticking {
            drop(transaction);
        } else {
            *committing = true;
            transaction.commit(&decision.rows, &decision.purge, &decision.head, ticking).await?;
            *committing = false;
        }
        if let Some(ledger) = &mut self.ledger {
            ledger.absorb(decision.head, decision.rows.clone());
        }
        self.seen.extend(&decision.seen);
        self.publish();
        Ok(decision)
    }

    /// From which revision rows have to be read.
    fn known(&self, head: &Head) -> Revision {
        let known = self.ledger.as_ref().and_then(Ledger::head).map(|ours| ours.cursor);
        match known {
            Some(ours)
                if ours.epoch == head.cursor.epoch
                    && ours.revision <= head.cursor.revision
                    && ours.revision >= head.floor =>
            {
                ours.revision
            }
            _ => Revision(0),
        }
    }

    fn absorb(&mut self, page: Page, since: Revision) -> &Ledger {
        let unreadable: BTreeSet<String> = page.unreadable.into_iter().collect();
        for underlay in &unreadable {
            if self.reported.insert(underlay.clone()) {
                error!(underlay, "row of the lease table cannot be read and is left out; mend or delete it");
            }
        }
        let ledger = self.ledger.get_or_insert_with(|| Ledger::new(self.rules));
        if since == Revision(0) {
            *ledger = Ledger::new(self.rules);
        }
        ledger.absorb(page.head, page.rows);
        ledger
    }

    /// Takes in what others committed.
    async fn look(&mut self) {
        let Some(known) = self.ledger.as_ref().and_then(Ledger::head).copied() else {
            return;
        };
        let page = match timeout(TRANSACTION, self.store.page(known.cursor.revision)).await {
            Ok(Ok(page)) => page,
            Ok(Err(error)) => return self.lost(&error.into()),
            Err(_) => return self.lost(&Undecided::Late),
        };
        self.found();
        let since = self.known(&page.head);
        if since == known.cursor.revision {
            if page.head != known {
                self.absorb(page, since.max(Revision(1)));
                self.publish();
            }
        } else {
            // Another history: the database was restored, or we missed purged rows.
            self.ledger = None;
            match timeout(TRANSACTION, self.store.page(Revision(0))).await {
                Ok(Ok(page)) => {
                    self.absorb(page, Revision(0));
                    self.publish();
                }
                Ok(Err(error)) => self.lost(&error.into()),
                Err(_) => self.lost(&Undecided::Late),
            }
        }
    }

    async fn note_seen(&mut self) {
        let Some(head) = self.ledger.as_ref().and_then(Ledger::head).copied() else { return };
        let mut seen = std::mem::take(&mut self.seen);
        seen.extend(self.followers.0.lock().unwrap_or_else(PoisonError::into_inner).keys());
        if seen.is_empty() {
            return;
        }
        let who: Vec<UnderlayAddr> = seen.iter().copied().collect();
        match timeout(TRANSACTION, self.store.seen(&who, head.service_time)).await {
            Ok(Ok(())) => {}
            Ok(Err(error)) => {
                self.seen = seen;
                self.lost(&error.into());
            }
            Err(_) => {
                self.seen = seen;
                self.lost(&Undecided::Late);
            }
        }
    }

    fn publish(&mut self) {
        self.found();
        let Some((head, ledger)) = self.ledger.as_ref().and_then(|ledger| Some((*ledger.head()?, ledger)))
        else {
            return;
        };
        self.metrics.table(ledger);
        self.editions.send_if_modified(|edition| {
            let told = edition.as_ref().map(|edition| (edition.head().cursor, edition.head().reconciling()));
            let news = told != Some((head.cursor, head.reconciling()));
            if news {
                *edition = Some(Arc::new(Edition::new(head, ledger.clone())));
            }
            news
        });
    }

    fn found(&mut self) {
        self.metrics.available(true);
        if std::mem::take(&mut self.away) {
            info!("lease database is back");
        }
    }

    /// What we know may be wrong now; it is read anew when the database is back. Streams go on with what was told.
    fn lost(&mut self, error: &Undecided) {
        self.ledger = None;
        self.metrics.available(false);
        if std::mem::replace(&mut self.away, true) {
            debug!(error = chain(error), "lease database still away");
        } else {
            warn!(error = chain(error), "lease database lost; leases in use stay in use");
        }
    }
}

/// Uniform in `0..n`, but for a bias of `n` in 2^32.
fn pick(n: u32) -> u32 {
    getrandom::u32().unwrap_or_default() % n.max(1)
}
