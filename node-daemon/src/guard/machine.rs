//! What to do about the two rules: decides, and does nothing.
//!
//! One job runs at a time, when it is due: a check now and then, and soon after an event that concerns the rule; what
//! follows from its answer at once.
//!
//! ```text
//!  check ──there──▶ intact: publish Iptables (INPUT) ──suspicious event: publish Ours──▶ check
//!    │ ▲
//!    │ └──done── append ◀──not there: publish Ours── check
//!    └──fails: publish Ours, later──▶ check
//! ```

use std::time::Duration;

use tokio::time::Instant;

use super::Guard;
use super::backend::{Backend, Because, Program, Seen, Wish};
use super::program::{Trouble, Why};
use super::rule::{Each, Rule, Touch};

/// Between checks of a rule that the kernel tells of …
const SLOW: Duration = Duration::from_secs(10);
/// … and of one that it tells nothing of.
const BLIND: Duration = Duration::from_secs(3);
/// Between two checks of a rule, however many events there are …
const GAP: Duration = Duration::from_millis(100);
/// … and between one and the next but one.
const NEXT_BUT_ONE: Duration = Duration::from_secs(1);
/// How often it is looked whether others have begun to use the other backend.
const LOOK: Duration = Duration::from_secs(60);
/// The longest time between attempts of which none has an effect.
const VAIN: Duration = Duration::from_secs(3600);

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Event {
    /// A deadline has passed.
    Clock,
    /// The kernel's notifications can be had or not.
    Listening(bool),
    Touched(Rule, Touch),
    Looked(Seen),
    Checked(Rule, Result<bool, Trouble>),
    Appended(Rule, Result<(), Trouble>),
    Withdrawn(Rule, Result<(), Trouble>),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Act {
    Publish(Guard),
    /// Its end is told as an event before there is another.
    Run(Job),
    Tell(Tale),
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Job {
    Look,
    Check(Program, Rule),
    Append(Program, Rule),
    Withdraw(Program, Rule),
}

/// For the log.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Tale {
    Chosen(Program, Because),
    Appended(Rule),
    /// It had been there before.
    PutBack(Rule),
    Trouble(Option<Rule>, Trouble),
    /// It was in trouble, and is there now.
    Mended(Rule),
    /// From the backend that is not used.
    Withdrawn(Rule),
}

#[derive(Debug)]
pub(super) struct Machine {
    wish: Wish,
    /// The kernel tells of changes in the nft backend.
    listening: bool,
    program: Option<Program>,
    look_at: Option<Instant>,
    /// No program was found at the last look.
    absent: bool,
    rules: Each<Watched>,
    running: bool,
    /// None: nothing was known yet.
    published: Option<Guard>,
    /// The time of the last event.
    now: Instant,
    /// Rules of ours in the backend that is not used, from another time: they would keep operators' rules from
    /// winning.
    left: Vec<(Program, Rule)>,
}

/// What is known of a rule in the backend that is used.
#[derive(Debug, Clone, Default)]
struct Watched {
    /// When the next job is to begin: an append if it is missing, else a check.
    due: Option<Instant>,
    missing: bool,
    intact: bool,
    /// Something happened since the last check began.
    suspect: bool,
    /// It has been there.
    known: bool,
    /// It was appended, and not checked since.
    appended: bool,
    /// Something happened since it was appended.
    disturbed: bool,
    /// How many times in a row it was appended in vain, and when that may be tried again.
    vain: u32,
    not_before: Option<Instant>,
    trouble: Option<Why>,
    /// When the last checks began, the latest first.
    began: [Option<Instant>; 2],
}

impl Machine {
    pub(super) fn new(wish: Wish, now: Instant) -> Self {
        Self {
            wish,
            listening: false,
            program: None,
            look_at: (wish != Wish::None).then_some(now),
            absent: false,
            rules: Each::default(),
            running: false,
            published: None,
            now,
            left: Vec::new(),
        }
    }

    /// When [`Event::Clock`] is due.
    pub(super) fn next_deadline(&self) -> Option<Instant> {
        let dues = Rule::ALL.into_iter().filter_map(|rule| self.rules[rule].due);
        let withdraws = self.withdraws().then_some(self.now);
        dues.chain(self.look_at).chain(withdraws).min().filter(|_| !self.running)
    }

    /// Rules are taken out of the other backend once they are in this one.
    fn withdraws(&self) -> bool {
        !self.left.is_empty() && Rule::ALL.into_iter().all(|rule| self.rules[rule].intact)
    }

    pub(super) fn on(&mut self, event: Event, now: Instant) -> Vec<Act> {
        let mut acts = Vec::new();
        self.now = now;
        self.running &= matches!(event, Event::Clock | Event::Listening(_) | Event::Touched(..));
        match event {
            Event::Clock => {
                if let Some(job) = self.job(now).filter(|_| !self.running) {
                    self.running = true;
                    acts.push(Act::Run(job));
                }
            }
            Event::Listening(listening) => {
                self.listening = listening;
                if self.wish == Wish::None {
                    self.publish(Guard::Ours, &mut acts);
                }
            }
            Event::Touched(rule, touch) => self.touched(rule, touch, now, &mut acts),
            Event::Looked(seen) => self.looked(&seen, now, &mut acts),
            Event::Checked(rule, Ok(true)) => self.there(rule, now, &mut acts),
            Event::Checked(rule, Ok(false)) => self.not_there(rule, now, &mut acts),
            Event::Checked(rule, Err(trouble)) => {
                self.doubt(rule, &mut acts);
                self.fails(rule, trouble, now, &mut acts);
            }
            Event::Appended(rule, Ok(())) => {
                self.rules[rule].appended = true;
                self.rules[rule].due = Some(now);
            }
            Event::Appended(rule, Err(trouble)) => self.fails(rule, trouble, now, &mut acts),
            Event::Withdrawn(rule, Ok(())) => acts.push(Act::Tell(Tale::Withdrawn(rule))),
            Event::Withdrawn(rule, Err(trouble)) => acts.push(Act::Tell(Tale::Trouble(Some(rule), trouble))),
        }
        acts
    }

    /// What is to be done now.
    fn job(&mut self, now: Instant) -> Option<Job> {
        let is_due = |at: Option<Instant>| at.is_some_and(|at| at <= now);
        if let Some(program) = self.program.clone() {
            if let Some(rule) = Rule::ALL.into_iter().find(|rule| is_due(self.rules[*rule].due)) {
                let watched = &mut self.rules[rule];
                watched.due = None;
                if std::mem::take(&mut watched.missing) {
                    watched.disturbed = false;
                    return Some(Job::Append(program, rule));
                }
                watched.suspect = false;
                watched.began = [Some(now), watched.began[0]];
                return Some(Job::Check(program, rule));
            }
            if self.withdraws() {
                return self.left.pop().map(|(program, rule)| Job::Withdraw(program, rule));
            }
        }
        if is_due(self.look_at) {
            self.look_at = None;
            return Some(Job::Look);
        }
        None
    }

    fn period(&self) -> Duration {
        let told = self.listening && self.program.as_ref().is_some_and(|used| used.backend == Backend::Nft);
        if told { SLOW } else { BLIND }
    }

    fn publish(&mut self, guard: Guard, acts: &mut Vec<Act>) {
        if self.published.replace(guard) != Some(guard) {
            acts.push(Act::Publish(guard));
        }
    }

    /// The rule is not known to be there any more.
    fn doubt(&mut self, rule: Rule, acts: &mut Vec<Act>) {
        self.rules[rule].intact = false;
        if rule == Rule::Input {
            self.publish(Guard::Ours, acts);
        }
    }

    fn touched(&mut self, rule: Rule, touch: Touch, now: Instant, acts: &mut Vec<Act>) {
        if self.program.as_ref().is_none_or(|used| used.backend != Backend::Nft) {
            return;
        }
        let watched = &mut self.rules[rule];
        if touch == Touch::Made && watched.intact {
            return;
        }
        watched.hasten(now);
        if touch == Touch::Suspicious {
            (watched.suspect, watched.disturbed) = (true, true);
            self.doubt(rule, acts);
        }
    }

    fn looked(&mut self, seen: &Seen, now: Instant, acts: &mut Vec<Act>) {
        let stays = self.program.as_ref().is_some_and(|used| match self.wish {
            Wish::Auto => !seen.moves(used),
            _ => seen.program(used.backend).as_ref() == Some(used),
        });
        if stays {
            self.look_at = (self.wish == Wish::Auto).then_some(now + LOOK);
            return;
        }
        self.rules = Each::default();
        let chosen = seen.choose(self.wish);
        // Of a first program's rule nothing is known before it is checked.
        if self.published.is_some() || chosen.is_none() {
            self.publish(Guard::Ours, acts);
        }
        let Some((program, because)) = chosen else {
            self.program = None;
            self.look_at = Some(now + SLOW);
            if !std::mem::replace(&mut self.absent, true) {
                let said = "no program found".to_owned();
                acts.push(Act::Tell(Tale::Trouble(None, Trouble { why: Why::Absent, said })));
            }
            return;
        };
        self.absent = false;
        self.look_at = (self.wish == Wish::Auto).then_some(now + LOOK);
        for rule in Rule::ALL {
            self.rules[rule].due = Some(now);
        }
        let other = program.backend.other();
        let left = seen.program(other).filter(|_| seen.side(other).is_some_and(|side| side.held.ours));
        self.left = left.into_iter().flat_map(|left| Rule::ALL.map(|rule| (left.clone(), rule))).collect();
        self.program = Some(program.clone());
        acts.push(Act::Tell(Tale::Chosen(program, because)));
    }

    fn there(&mut self, rule: Rule, now: Instant, acts: &mut Vec<Act>) {
        let period = self.period();
        let watched = &mut self.rules[rule];
        let (appended, known) =
            (std::mem::take(&mut watched.appended), std::mem::replace(&mut watched.known, true));
        let trouble = watched.trouble.take();
        (watched.vain, watched.not_before) = (0, None);
        // An event that came while it was checked may have come after the answer.
        if !watched.suspect {
            watched.intact = true;
            watched.due = Some(now + period);
            if rule == Rule::Input {
                self.publish(Guard::Iptables, acts);
            }
        }
        if appended {
            acts.push(Act::Tell(if known { Tale::PutBack(rule) } else { Tale::Appended(rule) }));
        }
        if trouble.is_some() {
            acts.push(Act::Tell(Tale::Mended(rule)));
        }
    }

    fn not_there(&mut self, rule: Rule, now: Instant, acts: &mut Vec<Act>) {
        self.doubt(rule, acts);
        let watched = &mut self.rules[rule];
        if std::mem::take(&mut watched.appended) {
            if watched.disturbed {
                watched.vain = 0;
            } else {
                // An iptables that does not recognise its own rule must not fill the chain with them.
                let wait = SLOW.saturating_mul(1 << watched.vain.min(16)).min(VAIN);
                watched.vain += 1;
                watched.not_before = Some(now + wait);
                let said = "appended, and not there afterwards".to_owned();
                self.trouble(rule, Trouble { why: Why::Vain, said }, acts);
            }
        }
        let watched = &mut self.rules[rule];
        match watched.not_before {
            Some(at) if now < at => watched.due = Some(at),
            _ => (watched.missing, watched.due) = (true, Some(now)),
        }
    }

    fn fails(&mut self, rule: Rule, trouble: Trouble, now: Instant, acts: &mut Vec<Act>) {
        let again = now + self.period();
        self.rules[rule].due = Some(again);
        if trouble.why == Why::Absent {
            // Not put off by the failures to come.
            self.look_at = Some(self.look_at.map_or(again, |at| at.min(again)));
        }
        self.trouble(rule, trouble, acts);
    }

    fn trouble(&mut self, rule: Rule, trouble: Trouble, acts: &mut Vec<Act>) {
        if self.rules[rule].trouble.replace(trouble.why) != Some(trouble.why) {
            acts.push(Act::Tell(Tale::Trouble(Some(rule), trouble)));
        }
    }
}

impl Watched {
    /// Next job as soon as may be.
    fn hasten(&mut self, now: Instant) {
        let [last, last_but_one] = self.began;
        let gap = last.map(|last| last + GAP).max(last_but_one.map(|began| began + NEXT_BUT_ONE));
        let soon = gap.map_or(now, |gap| gap.max(now));
        self.due = Some(self.due.map_or(soon, |due| due.min(soon)));
    }
}

#[cfg(test)]
mod tests;
