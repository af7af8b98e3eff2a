//! Follows Cloud Foundry's policy server: app-to-app policies, dynamic security groups, and the tag of the overlay's
//! routers.
//!
//! ```text
//!  Ids of the cell ──▶ ┌───────┐ ──asks──▶ client ──▶ policy server (HTTP/1.1, mutual TLS)
//!  numbers applied ──▶ │ run   │ ◀─answers─┘
//!       deadlines ───▶ │       │ ──▶ Known      ──▶ snapshot on disk
//!                      └───────┘ when to ask what: weft_model::follow
//! ```
//! Owns the connections to the server and the snapshot. Woken by a change of the cell's apps and spaces, by what was
//! applied of what it published, by answers, by deadlines and by whoever forces a poll. Emits [`Known`]. Nothing known is ever given up for an
//! outage: what it is worth is told by its age.

mod answer;
mod client;
mod connection;
mod question;
pub mod snapshot;
mod url;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::{Duration, Instant, SystemTime};

use futures::future::BoxFuture;
use futures::stream::{FuturesUnordered, StreamExt};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::spawn_blocking;
use tracing::{error, info, warn};
use weft_daemon::cause::chain;
use weft_model::asg::group::SecurityGroup;
use weft_model::follow::{Act, Event, Follow, Ids, Intervals, Outcome, Subject, Ticket};
use weft_model::policy::turns::Turns;
use weft_model::policy::{Policies, PolicyTag};

pub use answer::Listed;
pub use client::{AskError, Client, Groups, Parts, Server};
pub use connection::Cause;
use question::{Answer, Fetched, Value};
use snapshot::{Saved, SnapshotError};
pub use url::{NotAUrl, ServerUrl};

use crate::follower::{due, pick};
use crate::metrics::Metrics;

/// For all requests of one question together.
const QUESTION: Duration = Duration::from_secs(60);
/// Of what was left out of an answer, so much is logged line by line.
const LOGGED: usize = 20;

#[derive(Debug, Clone)]
pub struct Config {
    pub server: Server,
    pub intervals: Intervals,
    pub state_directory: PathBuf,
}

/// What the policy server said, or a snapshot of it.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct Known {
    /// None: nothing is known yet, which is not the same as that there are no policies.
    pub policies: Option<Told<Policies>>,
    pub groups: Option<Told<[SecurityGroup]>>,
    pub router: Option<Told<PolicyTag>>,
    /// Why the server could not be asked of late.
    pub lost: BTreeMap<Subject, String>,
}

#[derive(Debug, PartialEq, Eq)]
pub struct Told<T: ?Sized> {
    pub value: Arc<T>,
    /// Whose: of others nothing is known.
    pub ids: Arc<Ids>,
    /// When the server last confirmed it. Moves without waking those who watch.
    pub at: SystemTime,
    /// What to report in [`Applied`].
    pub number: u64,
}

impl<T: ?Sized> Clone for Told<T> {
    fn clone(&self) -> Self {
        let (value, ids) = (Arc::clone(&self.value), Arc::clone(&self.ids));
        Self { value, ids, at: self.at, number: self.number }
    }
}

/// The numbers of what is in the kernel by now; 0: nothing yet.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Applied {
    pub policies: u64,
    pub groups: u64,
    pub router: u64,
}

impl Applied {
    /// What follows from it, once all of that is in the kernel.
    pub fn of(known: &Known) -> Self {
        let number = |told: Option<u64>| told.unwrap_or_default();
        Self {
            policies: number(known.policies.as_ref().map(|told| told.number)),
            groups: number(known.groups.as_ref().map(|told| told.number)),
            router: number(known.router.as_ref().map(|told| told.number)),
        }
    }

    pub fn by_subject(self) -> [(Subject, u64); 3] {
        let Self { policies, groups, router } = self;
        [(Subject::Policies, policies), (Subject::Groups, groups), (Subject::Router, router)]
    }
}

/// Somebody wants a subject fetched and applied now.
#[derive(Debug)]
pub struct Forced {
    pub subject: Subject,
    /// Told when that is done, or why it is not.
    pub reply: oneshot::Sender<Result<(), String>>,
}

/// What the server said before this process began: what the cell is to start with, so that no packet meets less.
pub async fn known(config: &Config) -> Known {
    Known {
        policies: load(config, Subject::Policies).await,
        groups: match config.intervals.groups {
            Some(_) => load(config, Subject::Groups).await,
            None => None,
        },
        router: match config.intervals.router {
            Some(_) => load(config, Subject::Router).await,
            None => None,
        },
        lost: BTreeMap::new(),
    }
}

/// Follows the server until no one tells it of the cell any more. The first ids are those that are there at the start.
///
/// `out`: what is [`known`].
pub async fn run(
    config: Config,
    mut ids: watch::Receiver<Arc<Ids>>,
    out: watch::Sender<Known>,
    mut applied: watch::Receiver<Applied>,
    mut forced: mpsc::Receiver<Forced>,
    metrics: Arc<Metrics>,
) {
    let origin = Instant::now();
    let held = Applied::of(&out.borrow()).by_subject().into_iter().filter(|(_, number)| *number > 0);
    let held: Vec<Subject> = held.map(|(subject, _)| subject).collect();
    let mut follow = Follow::start(config.intervals, &held);
    let turns = out.borrow().policies.as_ref().map(|told| Turns::of(&told.value)).unwrap_or_default();
    let client = || Arc::new(Client::new(config.server.clone()));
    let mut run = Run {
        clients: [Subject::Policies, Subject::Groups, Subject::Router]
            .map(|subject| (subject, client()))
            .into(),
        config,
        out,
        asks: FuturesUnordered::new(),
        turns,
        fresh: None,
        left_out: BTreeMap::new(),
        forced: BTreeMap::new(),
        metrics,
    };
    let mut last_ticket = 0;
    ids.mark_changed();
    applied.mark_changed();
    loop {
        let events = tokio::select! {
            changed = ids.changed() => match changed {
                Ok(()) => vec![Event::Wanted(Arc::clone(&ids.borrow_and_update()))],
                Err(_) => return,
            },
            changed = applied.changed() => match changed {
                Ok(()) => {
                    let numbers = applied.borrow_and_update().by_subject();
                    numbers.map(|(subject, number)| Event::Applied(subject, number)).into()
                }
                Err(_) => return,
            },
            Some(asked) = run.asks.next() => vec![Event::Answered(asked.subject, run.take(asked))],
            Some(Forced { subject, reply }) = forced.recv() => {
                last_ticket += 1;
                run.forced.insert(last_ticket, reply);
                vec![Event::Forced(subject, last_ticket)]
            }
            () = due(origin, follow.next_deadline()) => vec![Event::Due],
        };
        for event in events {
            for act in follow.on(event, origin.elapsed(), &mut pick) {
                run.act(act).await;
            }
        }
    }
}

struct Run {
    config: Config,
    /// One for each subject, so that none waits for another.
    clients: BTreeMap<Subject, Arc<Client>>,
    out: watch::Sender<Known>,
    asks: FuturesUnordered<BoxFuture<'static, Asked>>,
    /// Of the tags in the answers.
    turns: Turns,
    /// The answer that is being dealt with.
    fresh: Option<Value>,
    /// What was left out of the last answers, as logged.
    left_out: BTreeMap<Subject, BTreeSet<String>>,
    /// Those who forced a poll and wait for its end.
    forced: BTreeMap<Ticket, oneshot::Sender<Result<(), String>>>,
    metrics: Arc<Metrics>,
}

/// A question that has ended.
struct Asked {
    subject: Subject,
    /// What went wrong: the kind, and all of it.
    answer: Result<Answer, (&'static str, String)>,
    took: Duration,
}

impl Run {
    fn take(&mut self, Asked { subject, answer, took }: Asked) -> Outcome {
        self.metrics.polled(subject, took);
        match answer {
            Err((kind, why)) => {
                self.metrics.poll_failed(subject, kind);
                Outcome::Failed(why)
            }
            Ok(Answer::Unchanged) => Outcome::Unchanged,
            Ok(Answer::Fetched(Fetched { mut value, stamp, left_out })) => {
                self.log_left_out(subject, left_out);
                if let Value::Policies(policies) = &mut value {
                    self.turns.note(policies);
                }
                if value.is_in(&self.out.borrow()) {
                    return Outcome::Same(stamp);
                }
                self.fresh = Some(value);
                Outcome::New(stamp)
            }
        }
    }

    async fn act(&mut self, act: Act) {
        match act {
            Act::Ask { subject, ids, first } => {
                let client = Arc::clone(&self.clients[&subject]);
                self.asks.push(Box::pin(async move {
                    let began = Instant::now();
                    let answer = tokio::time::timeout(QUESTION, question::ask(&client, subject, &ids, first));
                    let answer = match answer.await {
                        Ok(answer) => answer.map_err(|error| (error.source.kind(), chain(&error))),
                        Err(_) => Err(("late", format!("no answer within {QUESTION:?}"))),
                    };
                    Asked { subject, answer, took: began.elapsed() }
                }));
            }
            Act::Publish { number, ids, .. } => {
                let (Some(value), at) = (self.fresh.take(), now()) else { return };
                info!(number, what = %value, "the policy server's answer changed");
                self.out.send_modify(|known| value.publish(known, number, ids, at));
            }
            Act::Confirm { subject, ids } => {
                let at = now();
                // Who waits to hear of an app is woken; that time has passed is no news.
                self.out.send_if_modified(|known| match subject {
                    Subject::Policies => known.policies.as_mut().is_some_and(|told| told.confirm(ids, at)),
                    Subject::Groups => known.groups.as_mut().is_some_and(|told| told.confirm(ids, at)),
                    Subject::Router => known.router.as_mut().is_some_and(|told| told.confirm(ids, at)),
                });
            }
            Act::Save(subject) => self.save(subject).await,
            Act::Lost { subject, why } => {
                warn!(?subject, why, "the policy server cannot be asked; what was known stays");
                self.out.send_modify(|known| drop(known.lost.insert(subject, why)));
            }
            Act::Done(ticket, how) => {
                // Whoever forced it may have gone.
                drop(self.forced.remove(&ticket).map(|reply| reply.send(how)));
            }
            Act::Found(subject) => {
                info!(?subject, "the policy server answers again");
                self.out.send_modify(|known| drop(known.lost.remove(&subject)));
            }
        }
    }

    async fn save(&mut self, subject: Subject) {
        let directory = self.config.state_directory.clone();
        let Known { policies, groups, router, .. } = self.out.borrow().clone();
        fn write<T: Serialize + ?Sized>(
            directory: &Path,
            subject: Subject,
            told: Option<Told<T>>,
        ) -> Result<(), SnapshotError> {
            let Some(Told { value, ids, at, .. }) = told else { return Ok(()) };
            snapshot::save(directory, subject, &Saved::new(at, ids, value))
        }
        let saved = spawn_blocking(move || match subject {
            Subject::Policies => write(&directory, subject, policies),
            Subject::Groups => write(&directory, subject, groups),
            Subject::Router => write(&directory, subject, router),
        });
        if let Ok(Err(error)) = saved.await {
            error!(error = %chain(&error), "not saved; a restart would start from an older answer");
        }
    }

    /// Each thing when it is left out first.
    fn log_left_out(&mut self, subject: Subject, left_out: BTreeSet<String>) {
        let before = self.left_out.entry(subject).or_default();
        let new: Vec<&String> = left_out.difference(before).collect();
        for why in new.iter().take(LOGGED) {
            warn!(?subject, why, "left out of the policy server's answer; the rest holds");
        }
        if let Some(more) = new.len().checked_sub(LOGGED + 1) {
            warn!(?subject, more = more + 1, "more is left out of the policy server's answer");
        }
        *before = left_out;
    }
}

impl<T: ?Sized> Told<T> {
    /// Whether it is another answer than that one, or about others.
    pub fn differs_from(&self, before: Option<&Self>) -> bool {
        before.is_none_or(|before| (before.number, &before.ids) != (self.number, &self.ids))
    }

    /// Since the server last confirmed it.
    pub fn age(&self) -> Duration {
        now().duration_since(self.at).unwrap_or_default()
    }

    fn confirm(&mut self, ids: Arc<Ids>, at: SystemTime) -> bool {
        self.at = at;
        let others = self.ids != ids;
        self.ids = ids;
        others
    }
}

/// One that cannot be read is as good as none: the server knows better anyway.
async fn load<T: ?Sized>(config: &Config, subject: Subject) -> Option<Told<T>>
where
    Arc<T>: DeserializeOwned + Send + 'static,
{
    let directory = config.state_directory.clone();
    let loaded = spawn_blocking(move || snapshot::load::<Arc<T>>(&directory, subject)).await.ok()?;
    match loaded {
        Ok(saved) => {
            let saved = saved?;
            let told = Told { at: saved.at(), ids: saved.ids, value: saved.value, number: 1 };
            let age_seconds = told.age().as_secs();
            info!(?subject, age_seconds, "started from what the policy server last said");
            Some(told)
        }
        Err(error) => {
            warn!(error = %chain(&error), "started without it");
            None
        }
    }
}

#[expect(clippy::disallowed_methods, reason = "the age of an answer outlives this process")]
pub(crate) fn now() -> SystemTime {
    SystemTime::now()
}
