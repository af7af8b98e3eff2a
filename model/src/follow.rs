//! When to ask the policy server, and for what.
//!
//! A state machine without a clock, as [`crate::keeper`] is: [`Follow::on`] takes an event and the time and says what
//! to do; [`Follow::next_deadline`] says when to wake it with [`Event::Due`] at the latest. Policies, security groups and
//! the tag of the overlay's routers are followed alike, each with an interval of its own.
//!
//! ```text
//!           ┌──── due, or ids that the last answer did not cover ────┐
//!           ▼                                                        │
//!          Ask ──Unchanged, Same──▶ waiting ─────────────────────────┤
//!           ├────New──▶ Publish, Save ──▶ waiting (Applied: its stamp need not be fetched again)
//!           └────Failed──▶ waiting; what is held stays ──────────────┘
//! ```
//!
//! A person may force a poll ([`Event::Forced`]): it is asked at once whatever was asked before, unconditionally, and is
//! done when what it found is applied.
//!
//! The server's stamps are compared for being *different*: its database may be restored, and its clock set back. A
//! stamp counts as done only once what was fetched under it was applied; until then each poll fetches anew. Ids that
//! are new are asked about without asking for the stamp first: any that the server had before will do for what it
//! answers later, since with a later one all is fetched again.

use std::collections::{BTreeSet, VecDeque};
use std::mem;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::policy::AppGuid;

/// Everything is fetched so often whatever the stamps say.
const RESYNC: Duration = Duration::from_secs(300);
/// The first wait after a failure; each following one is twice as long, up to the interval.
const FIRST_RETRY: Duration = Duration::from_secs(5);
/// Answers published and not applied yet that are remembered: who is behind by more applies none of them soon.
const UNAPPLIED: usize = 16;

/// When the server's data last changed, in its own count: an opaque value.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct Stamp(pub i64);

/// What the server is asked about: whose containers the cell has.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct Ids {
    pub apps: BTreeSet<AppGuid>,
    pub spaces: BTreeSet<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Subject {
    Policies,
    Groups,
    /// The tag of the overlay's routers: of the whole foundation, whatever the cell has.
    Router,
}

impl Ids {
    /// Whether an answer about these says all that there is to say about `others`.
    fn cover(&self, others: &Self, subject: Subject) -> bool {
        match subject {
            Subject::Policies => self.apps.is_superset(&others.apps),
            Subject::Groups => self.spaces.is_superset(&others.spaces),
            Subject::Router => true,
        }
    }
}

/// How an [`Act::Ask`] ended.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Outcome {
    /// The server's stamp is the one that was given.
    Unchanged,
    /// Fetched, and equal to what was fetched last.
    Same(Option<Stamp>),
    /// Fetched, and not equal. The stamp is one that the server had *before* it answered; none: it has no stamps.
    New(Option<Stamp>),
    /// Why, for people.
    Failed(String),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The deadline has come.
    Due,
    /// Whose containers the cell has; nothing is asked before this is known.
    Wanted(Arc<Ids>),
    Answered(Subject, Outcome),
    /// What was published under this number, or a later one, is in the kernel.
    Applied(Subject, u64),
    /// Somebody wants it fetched now, and waits for the end of it.
    Forced(Subject, Ticket),
}

/// Whoever forced a poll, among all that did.
pub type Ticket = u64;

/// What is asked before everything is fetched.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum First {
    /// For the stamp: of what comes next it is known not to be older.
    Stamp,
    /// For the stamp, and nothing more if it is this one.
    Unless(Stamp),
    /// Nothing: the server had this stamp before.
    Nothing(Stamp),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    /// Ends in [`Event::Answered`], within a bounded time.
    Ask { subject: Subject, ids: Arc<Ids>, first: First },
    /// The answer just given, under this number, which is higher than any before.
    Publish { subject: Subject, number: u64, ids: Arc<Ids> },
    /// The server has just confirmed what was published last, about these.
    Confirm { subject: Subject, ids: Arc<Ids> },
    /// What is published goes on disk, with the time of now.
    Save(Subject),
    /// The server could not be asked, for the first time since it last could.
    Lost { subject: Subject, why: String },
    /// It answers again.
    Found(Subject),
    /// What this one forced has ended: what the server said after it is in the kernel, or why not.
    Done(Ticket, Result<(), String>),
}

/// How often to ask, at most.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Intervals {
    pub policies: Duration,
    /// None: security groups come with the containers, and the server is not asked for them.
    pub groups: Option<Duration>,
    /// None: routers on the overlay are nobody here.
    pub router: Option<Duration>,
}

#[derive(Debug, Clone)]
pub struct Follow {
    wanted: Option<Arc<Ids>>,
    tracks: Vec<Track>,
}

impl Follow {
    /// `held`: what a snapshot had is published already, under number 1.
    pub fn start(intervals: Intervals, held: &[Subject]) -> Self {
        let Intervals { policies, groups, router } = intervals;
        let followed =
            [(Subject::Policies, Some(policies)), (Subject::Groups, groups), (Subject::Router, router)];
        let track = |(subject, interval): (_, Option<_>)| {
            Some(Track::new(subject, interval?, held.contains(&subject)))
        };
        Self { wanted: None, tracks: followed.into_iter().filter_map(track).collect() }
    }

    /// None while all that can happen next is the end of an ask, or ids.
    pub fn next_deadline(&self) -> Option<Duration> {
        self.wanted.as_ref()?;
        self.tracks.iter().filter_map(Track::deadline).min()
    }

    /// When the server last confirmed it; none: not since the start.
    pub fn confirmed_at(&self, subject: Subject) -> Option<Duration> {
        self.tracks.iter().find(|track| track.subject == subject)?.confirmed_at
    }

    /// `now` counts from any origin and never falls; `pick(n)` is uniform in `0..n`.
    pub fn on(&mut self, event: Event, now: Duration, pick: &mut dyn FnMut(u32) -> u32) -> Vec<Act> {
        let mut acts = Vec::new();
        match event {
            Event::Due => {}
            Event::Wanted(ids) => self.wanted = Some(ids),
            Event::Answered(subject, outcome) => {
                if let Some(track) = self.track(subject) {
                    track.answered(outcome, now, pick, &mut acts);
                }
            }
            Event::Applied(subject, number) => {
                if let Some(track) = self.track(subject) {
                    track.applied(number, &mut acts);
                }
            }
            Event::Forced(subject, ticket) => match self.track(subject) {
                Some(track) => track.forced.push(ticket),
                None => acts.push(Act::Done(ticket, Err("the server is not asked for this".into()))),
            },
        }
        if let Some(wanted) = &self.wanted {
            acts.extend(self.tracks.iter_mut().filter_map(|track| track.next(wanted, now)));
        }
        acts
    }

    fn track(&mut self, subject: Subject) -> Option<&mut Track> {
        self.tracks.iter_mut().find(|track| track.subject == subject)
    }
}

/// What was published, and under which stamp it need not be fetched again.
#[derive(Debug, Clone)]
struct Published {
    number: u64,
    stamp: Option<Stamp>,
}

/// One of the things that are followed.
#[derive(Debug, Clone)]
struct Track {
    subject: Subject,
    interval: Duration,
    /// The question that is under way: about whom.
    asked: Option<Arc<Ids>>,
    /// About whom the last attempt was, whatever its end: for others it is worth asking at once.
    tried: Option<Arc<Ids>>,
    /// About whom the last good answer was.
    held: Option<Arc<Ids>>,
    /// The server's, when it was last asked for it.
    stamp: Option<Stamp>,
    /// The next poll, if no ids come before.
    due: Duration,
    /// From then on a poll is unconditional.
    resync: Duration,
    /// From then on a confirmation is written down.
    save: Duration,
    last_number: u64,
    /// Not applied yet, oldest first.
    published: VecDeque<Published>,
    applied: Option<Published>,
    failures: u32,
    confirmed_at: Option<Duration>,
    /// Those whose question is not asked yet.
    forced: Vec<Ticket>,
    /// Those whose question is under way.
    asking: Vec<Ticket>,
    /// Those that wait until the answer with this number is applied.
    applying: Vec<(u64, Ticket)>,
}

impl Track {
    fn new(subject: Subject, interval: Duration, published: bool) -> Self {
        let published: VecDeque<_> =
            published.then_some(Published { number: 1, stamp: None }).into_iter().collect();
        Self {
            subject,
            interval,
            asked: None,
            tried: None,
            held: None,
            stamp: None,
            due: Duration::ZERO,
            resync: Duration::ZERO,
            save: Duration::ZERO,
            last_number: u64::from(!published.is_empty()),
            published,
            applied: None,
            failures: 0,
            confirmed_at: None,
            forced: Vec::new(),
            asking: Vec::new(),
            applying: Vec::new(),
        }
    }

    fn deadline(&self) -> Option<Duration> {
        self.asked.is_none().then_some(self.due)
    }

    fn next(&mut self, wanted: &Arc<Ids>, now: Duration) -> Option<Act> {
        let subject = self.subject;
        let covers = |ids: &Option<Arc<Ids>>| ids.as_ref().is_some_and(|ids| ids.cover(wanted, subject));
        // Those of the last attempt wait for the next one like all others if it failed.
        let new = !covers(&self.tried);
        let forced = !self.forced.is_empty();
        if self.asked.is_some() || !(new || forced || self.due <= now) {
            return None;
        }
        self.asking = mem::take(&mut self.forced);
        let conditional = !forced && self.published.is_empty() && covers(&self.held) && now < self.resync;
        let applied = self.applied.as_ref().and_then(|applied| applied.stamp).filter(|_| conditional);
        let first = match (applied, self.stamp) {
            (Some(stamp), _) => First::Unless(stamp),
            (None, Some(stamp)) if new && !forced => First::Nothing(stamp),
            (None, _) => First::Stamp,
        };
        self.asked = Some(Arc::clone(wanted));
        self.tried = Some(Arc::clone(wanted));
        Some(Act::Ask { subject, ids: Arc::clone(wanted), first })
    }

    fn answered(
        &mut self,
        outcome: Outcome,
        now: Duration,
        pick: &mut dyn FnMut(u32) -> u32,
        acts: &mut Vec<Act>,
    ) {
        let Some(ids) = self.asked.take() else { return };
        let subject = self.subject;
        let asking = mem::take(&mut self.asking);
        if let Outcome::Failed(why) = outcome {
            acts.extend(asking.into_iter().map(|ticket| Act::Done(ticket, Err(why.clone()))));
            let doubled = FIRST_RETRY.saturating_mul(2u32.saturating_pow(self.failures.min(10)));
            self.due = now + earlier(self.interval.min(doubled), pick);
            self.failures = self.failures.saturating_add(1);
            if self.failures == 1 {
                acts.push(Act::Lost { subject, why });
            }
            return;
        }
        if mem::take(&mut self.failures) > 0 {
            acts.push(Act::Found(subject));
        }
        self.due = now + earlier(self.interval, pick);
        self.confirmed_at = Some(now);
        match outcome {
            // Asked under the condition that the answer held covers these ids; it may cover more.
            Outcome::Unchanged => {
                acts.push(Act::Confirm { subject, ids: self.held.clone().unwrap_or(ids) });
            }
            Outcome::Same(stamp) if self.last_number > 0 => {
                // About whom it is matters to who starts from it.
                if self.held.as_ref() != Some(&ids) {
                    self.save = now;
                }
                self.fetched(&ids, stamp, now, pick);
                // What is published is the answer to this stamp as well.
                if let Some(last) = self.published.back_mut().or(self.applied.as_mut()) {
                    last.stamp = stamp;
                }
                acts.push(Act::Confirm { subject, ids });
            }
            Outcome::Same(stamp) | Outcome::New(stamp) => {
                self.fetched(&ids, stamp, now, pick);
                self.last_number += 1;
                let number = self.last_number;
                self.published.push_back(Published { number, stamp });
                if self.published.len() > UNAPPLIED {
                    self.published.pop_front();
                }
                acts.extend([Act::Publish { subject, number, ids }, Act::Save(subject)]);
                self.save = now + RESYNC;
            }
            Outcome::Failed(_) => {}
        }
        if self.save <= now {
            self.save = now + RESYNC;
            acts.push(Act::Save(subject));
        }
        self.applying.extend(asking.into_iter().map(|ticket| (self.last_number, ticket)));
        self.end_applied(acts);
    }

    fn fetched(
        &mut self,
        ids: &Arc<Ids>,
        stamp: Option<Stamp>,
        now: Duration,
        pick: &mut dyn FnMut(u32) -> u32,
    ) {
        self.held = Some(Arc::clone(ids));
        self.stamp = stamp;
        self.resync = now + earlier(RESYNC, pick);
    }

    fn applied(&mut self, number: u64, acts: &mut Vec<Act>) {
        while self.published.front().is_some_and(|first| first.number <= number) {
            self.applied = self.published.pop_front();
        }
        self.end_applied(acts);
    }

    fn end_applied(&mut self, acts: &mut Vec<Act>) {
        let applied = self.applied.as_ref().map_or(0, |applied| applied.number);
        let done = self.applying.extract_if(.., |(number, _)| *number <= applied);
        acts.extend(done.map(|(_, ticket)| Act::Done(ticket, Ok(()))));
    }
}

/// 75 to 95 % of it: cells that started together do not stay together, and none comes later than was said.
fn earlier(interval: Duration, pick: &mut dyn FnMut(u32) -> u32) -> Duration {
    interval.saturating_mul(750 + pick(201)) / 1000
}

#[cfg(test)]
mod tests;
