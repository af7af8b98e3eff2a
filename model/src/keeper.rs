//! The cell's side of its lease: what to ask the controllers, when, and what to believe of their answers.
//!
//! A state machine without a clock: [`Keeper::on`] takes an event and the time and says what to do;
//! [`Keeper::next_deadline`] says when to wake it with [`Event::Due`] at the latest. Its driver connects, sends, receives,
//! and bounds each attempt in time: while one is under way there is no deadline, only its end.
//!
//! ```text
//!            Acquire ──granted──▶ Watch ──▶ following ──closed──▶ waiting ──due──▶ Watch, at another controller
//!  no lease ────▲                   ▲                              │
//!               └──── refused ──────┴── a snapshot has a lease     └─ nothing learned is ever given up for an outage
//! ```

mod table;

use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::lease::{Cell, Changes, Cursor, Lease, Peers};
use crate::reason::{Class, Reason};
use table::{Table, Verdict};

/// Waits after a failure that passes: the first at most this long, each following at most twice as long.
const FIRST_WAIT: Duration = Duration::from_millis(250);
const LONGEST_WAIT: Duration = Duration::from_secs(15);
/// Between attempts that only a person can bring to success: a conflict, an exhausted pool, a wrong certificate.
const REFUSED_WAIT: Duration = Duration::from_secs(30);

/// What happened.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Event {
    /// The deadline has come; also the first event of all.
    Due,
    /// The answer to an Acquire.
    Granted(Lease),
    /// An Acquire was refused, or no controller answered.
    Refused(Reason),
    /// The watch is open: the controller has accepted the claim.
    Opened,
    Changes(Changes),
    /// The watch could not be opened, or has ended.
    Closed(Reason),
}

/// What to do.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Act {
    Acquire,
    /// Opens a watch, at the next controller if the last attempt failed.
    Watch {
        held: Lease,
        since: Option<Cursor>,
    },
    /// Drops the open watch. No [`Event::Closed`] is expected for it.
    HangUp,
    /// This is the table to work from.
    Publish {
        own: Lease,
        peers: Peers,
    },
    Save(Snapshot),
    /// No container may be added until a person has acted. Traffic goes on.
    Fence(Reason),
    Unfence,
    /// The table was wrong although every message arrived: worth a warning.
    Mistrust(&'static str),
}

/// What a node keeps on disk, to start from while no controller answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Snapshot {
    pub lease: Lease,
    pub peers: Peers,
    pub cursor: Option<Cursor>,
    /// Why no container may be added; a restart does not lift that.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<Reason>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LeaseState {
    None,
    Held,
    Fenced,
}

/// For people: where the keeper stands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct View {
    pub lease: Option<Lease>,
    pub state: LeaseState,
    pub peers: usize,
    /// When a controller last confirmed the table; none before the first time.
    pub confirmed_at: Option<Duration>,
    /// What the last attempt failed for; none while a watch is open.
    pub trouble: Option<Reason>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Phase {
    /// Until then nothing is under way.
    Waiting(Duration),
    Acquiring,
    Opening,
    Following,
}

#[derive(Debug, Clone)]
pub struct Keeper {
    cell: Cell,
    own: Option<Lease>,
    fenced: Option<Reason>,
    table: Table,
    phase: Phase,
    failures: u32,
    trouble: Option<Reason>,
    confirmed_at: Option<Duration>,
}

impl Keeper {
    /// A snapshot of another cell, as when a disk was cloned, is as good as none.
    pub fn start(cell: Cell, snapshot: Option<Snapshot>) -> Self {
        let mine = |snapshot: &Snapshot| {
            snapshot.lease.underlay == cell.underlay && snapshot.lease.subnet.kind() == cell.wants
        };
        let snapshot = snapshot.filter(mine);
        Self {
            own: snapshot.as_ref().map(|snapshot| snapshot.lease),
            fenced: snapshot.as_ref().and_then(|snapshot| snapshot.fenced.clone()),
            table: snapshot.map(Table::from).unwrap_or_default(),
            cell,
            phase: Phase::Waiting(Duration::ZERO),
            failures: 0,
            trouble: None,
            confirmed_at: None,
        }
    }

    /// What a snapshot allows to work from before any controller has answered.
    pub fn known(&self) -> Option<Act> {
        self.own.map(|own| Act::Publish { own, peers: self.table.peers(own.underlay) })
    }

    pub fn fenced(&self) -> Option<&Reason> {
        self.fenced.as_ref()
    }

    pub fn view(&self) -> View {
        let state = match (&self.own, &self.fenced) {
            (None, _) => LeaseState::None,
            (Some(_), Some(_)) => LeaseState::Fenced,
            (Some(_), None) => LeaseState::Held,
        };
        let peers = self.own.map_or(0, |own| self.table.peers(own.underlay).len());
        let (confirmed_at, trouble) = (self.confirmed_at, self.trouble.clone());
        View { lease: self.own, state, peers, confirmed_at, trouble }
    }

    pub fn next_deadline(&self) -> Option<Duration> {
        match self.phase {
            Phase::Waiting(until) => Some(until),
            Phase::Acquiring | Phase::Opening | Phase::Following => None,
        }
    }

    /// `now` counts from any origin and never falls; `pick(n)` is uniform in `0..n`.
    pub fn on(&mut self, event: Event, now: Duration, pick: &mut dyn FnMut(u32) -> u32) -> Vec<Act> {
        match event {
            Event::Due => self.due(now),
            Event::Granted(lease) => self.granted(lease),
            Event::Refused(reason) if self.phase == Phase::Acquiring => self.wait(reason, now, pick),
            Event::Opened if self.phase == Phase::Opening => self.opened(now),
            Event::Changes(changes) if self.phase == Phase::Following => self.changes(&changes, now, pick),
            Event::Closed(reason) if matches!(self.phase, Phase::Opening | Phase::Following) => {
                self.closed(reason, now, pick)
            }
            // An answer to something given up since.
            Event::Refused(_) | Event::Opened | Event::Changes(_) | Event::Closed(_) => Vec::new(),
        }
    }

    fn due(&mut self, now: Duration) -> Vec<Act> {
        match self.phase {
            Phase::Waiting(until) if until <= now => self.next_attempt(),
            _ => Vec::new(),
        }
    }

    fn next_attempt(&mut self) -> Vec<Act> {
        if let Some(held) = self.own {
            self.phase = Phase::Opening;
            self.table.forget_unfinished();
            vec![Act::Watch { held, since: self.table.cursor() }]
        } else {
            self.phase = Phase::Acquiring;
            vec![Act::Acquire]
        }
    }

    fn granted(&mut self, lease: Lease) -> Vec<Act> {
        let expected = self.phase == Phase::Acquiring && lease.underlay == self.cell.underlay;
        if !expected {
            return Vec::new();
        }
        self.own = Some(lease);
        self.failures = 0;
        let mut acts = self.publish_and_save();
        acts.extend(self.next_attempt());
        acts
    }

    fn opened(&mut self, now: Duration) -> Vec<Act> {
        self.phase = Phase::Following;
        self.trouble = None;
        self.confirmed_at = Some(now);
        if self.fenced.take().is_none() {
            return Vec::new();
        }
        let mut acts = vec![Act::Unfence];
        acts.extend(self.snapshot().map(Act::Save));
        acts
    }

    fn changes(&mut self, changes: &Changes, now: Duration, pick: &mut dyn FnMut(u32) -> u32) -> Vec<Act> {
        let Some(own) = self.own else { return Vec::new() };
        match self.table.take(changes, own.underlay) {
            Verdict::Agrees { changed } => {
                self.confirmed_at = Some(now);
                let mut acts = if changed { self.publish_and_save() } else { Vec::new() };
                if changes.more || changes.reconciling || self.table.holds(&own) {
                    self.failures = 0;
                } else {
                    // Expired while we were cut off, or released by hand: claimed again, it is ours or in conflict.
                    acts.extend(self.elsewhere("its table lacks our lease", now, pick));
                }
                acts
            }
            Verdict::Stale => {
                self.elsewhere("its table is older than what another controller told", now, pick)
            }
            Verdict::Suspect => {
                let mut acts =
                    vec![Act::Mistrust("the table that the controller told does not have its digest")];
                acts.extend(self.elsewhere("its table did not come out right", now, pick));
                acts
            }
            Verdict::AskAgain => self.elsewhere("its table is asked for again, as a whole", now, pick),
        }
    }

    fn elsewhere(&mut self, why: &str, now: Duration, pick: &mut dyn FnMut(u32) -> u32) -> Vec<Act> {
        let mut acts = vec![Act::HangUp];
        acts.extend(self.wait(Reason::ControllerAway { why: why.into() }, now, pick));
        acts
    }

    fn closed(&mut self, reason: Reason, now: Duration, pick: &mut dyn FnMut(u32) -> u32) -> Vec<Act> {
        let mut acts = Vec::new();
        if reason.class() == Class::Fenced && self.fenced.is_none() {
            self.fenced = Some(reason.clone());
            acts.push(Act::Fence(reason.clone()));
            acts.extend(self.snapshot().map(Act::Save));
        }
        acts.extend(self.wait(reason, now, pick));
        acts
    }

    fn wait(&mut self, reason: Reason, now: Duration, pick: &mut dyn FnMut(u32) -> u32) -> Vec<Act> {
        let longest = match reason.class() {
            Class::Retry => LONGEST_WAIT.min(FIRST_WAIT * 2u32.saturating_pow(self.failures.min(10))),
            Class::Refused | Class::Fenced => REFUSED_WAIT,
        };
        // Between half and all of it, so that cells that lost a controller together do not come back together.
        let half = u32::try_from(longest.as_millis() / 2).unwrap_or(u32::MAX);
        let wait = Duration::from_millis(u64::from(half) + u64::from(pick(half + 1)));
        self.failures = self.failures.saturating_add(1);
        self.trouble = Some(reason);
        self.phase = Phase::Waiting(now + wait);
        Vec::new()
    }

    fn snapshot(&self) -> Option<Snapshot> {
        let lease = self.own?;
        let (peers, cursor) = (self.table.peers(lease.underlay), self.table.cursor());
        Some(Snapshot { lease, peers, cursor, fenced: self.fenced.clone() })
    }

    fn publish_and_save(&self) -> Vec<Act> {
        let Some(snapshot) = self.snapshot() else { return Vec::new() };
        vec![Act::Publish { own: snapshot.lease, peers: snapshot.peers.clone() }, Act::Save(snapshot)]
    }
}
