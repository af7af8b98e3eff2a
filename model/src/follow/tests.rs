use proptest::prelude::*;

use super::*;

const SECOND: Duration = Duration::from_secs(1);
const INTERVALS: Intervals =
    Intervals { policies: Duration::from_secs(5), groups: Some(Duration::from_secs(60)), router: None };
const ONLY_POLICIES: Intervals = Intervals { groups: None, ..INTERVALS };

fn ids(names: &[&str]) -> Arc<Ids> {
    let apps = names.iter().map(|name| name.parse().expect("an id")).collect();
    Arc::new(Ids { apps, spaces: names.iter().map(ToString::to_string).collect() })
}

/// A machine at a time of its own.
struct Script {
    follow: Follow,
    now: Duration,
}

impl Script {
    fn start(intervals: Intervals) -> Self {
        Self { follow: Follow::start(intervals, &[]), now: Duration::ZERO }
    }

    fn on(&mut self, event: Event) -> Vec<Act> {
        self.follow.on(event, self.now, &mut |_| 0)
    }

    fn answered(&mut self, outcome: Outcome) -> Vec<Act> {
        self.on(Event::Answered(Subject::Policies, outcome))
    }

    /// Goes to the deadline, which is so many milliseconds away.
    fn due(&mut self, millis: u64) -> Vec<Act> {
        let deadline = self.follow.next_deadline().expect("a deadline");
        assert_eq!(deadline - self.now, Duration::from_millis(millis));
        self.now = deadline;
        self.on(Event::Due)
    }
}

fn ask(names: &[&str], unless: Option<i64>) -> Act {
    let first = unless.map_or(First::Stamp, |stamp| First::Unless(Stamp(stamp)));
    Act::Ask { subject: Subject::Policies, ids: ids(names), first }
}

/// For those that are new.
fn ask_at_once(names: &[&str], stamp: i64) -> Act {
    Act::Ask { subject: Subject::Policies, ids: ids(names), first: First::Nothing(Stamp(stamp)) }
}

fn publish(names: &[&str], number: u64) -> Act {
    Act::Publish { subject: Subject::Policies, number, ids: ids(names) }
}

fn confirm(names: &[&str]) -> Act {
    Act::Confirm { subject: Subject::Policies, ids: ids(names) }
}

const SAVE: Act = Act::Save(Subject::Policies);

#[test]
fn a_stamp_is_done_once_its_answer_is_applied() {
    let mut script = Script::start(ONLY_POLICIES);
    assert_eq!(script.follow.next_deadline(), None, "nothing is asked before the cell's apps are known");
    assert_eq!(script.on(Event::Due), []);
    assert_eq!(script.on(Event::Wanted(ids(&["a"]))), [ask(&["a"], None)]);
    assert_eq!(script.follow.next_deadline(), None);
    assert_eq!(script.answered(Outcome::New(Some(Stamp(7)))), [publish(&["a"], 1), SAVE]);
    assert_eq!(script.due(3750), [ask(&["a"], None)], "it is not applied yet");
    assert_eq!(script.answered(Outcome::Same(Some(Stamp(7)))), [confirm(&["a"])]);
    assert_eq!(script.on(Event::Applied(Subject::Policies, 1)), []);
    assert_eq!(script.due(3750), [ask(&["a"], Some(7))]);
    assert_eq!(script.answered(Outcome::Unchanged), [confirm(&["a"])]);
    assert_eq!(script.due(3750), [ask(&["a"], Some(7))]);
    // Lower than before: only that it is another counts.
    assert_eq!(script.answered(Outcome::New(Some(Stamp(3)))), [publish(&["a"], 2), SAVE]);
    script.on(Event::Applied(Subject::Policies, 1));
    assert_eq!(script.due(3750), [ask(&["a"], None)], "what was applied is the one before");
    script.answered(Outcome::Failed("500".into()));
    script.on(Event::Applied(Subject::Policies, 2));
    assert_eq!(script.due(3750), [ask(&["a"], Some(3))]);
}

#[test]
fn new_apps_are_asked_about_at_once_and_in_waves() {
    let mut script = Script::start(ONLY_POLICIES);
    script.on(Event::Wanted(ids(&["a"])));
    assert_eq!(script.on(Event::Wanted(ids(&["a", "b"]))), [], "one question at a time");
    assert_eq!(script.on(Event::Wanted(ids(&["a", "b", "c"]))), []);
    let acts = script.answered(Outcome::New(Some(Stamp(1))));
    assert_eq!(acts, [publish(&["a"], 1), SAVE, ask_at_once(&["a", "b", "c"], 1)]);
    script.answered(Outcome::New(Some(Stamp(1))));
    script.on(Event::Applied(Subject::Policies, 2));
    assert_eq!(script.on(Event::Wanted(ids(&["a", "c"]))), [], "less is no reason to ask");
    assert_eq!(script.due(3750), [ask(&["a", "c"], Some(1))], "and none to fetch");
    assert_eq!(script.answered(Outcome::Unchanged), [confirm(&["a", "b", "c"])]);
    assert_eq!(script.on(Event::Wanted(ids(&["a", "d"]))), [ask_at_once(&["a", "d"], 1)]);
    // The answer may be of later than its stamp, and then all is fetched again.
    assert_eq!(script.answered(Outcome::New(Some(Stamp(1)))), [publish(&["a", "d"], 3), SAVE]);
    script.on(Event::Applied(Subject::Policies, 3));
    assert_eq!(script.due(3750), [ask(&["a", "d"], Some(1))]);
    assert_eq!(script.answered(Outcome::Same(Some(Stamp(2)))), [confirm(&["a", "d"])]);
    assert_eq!(script.due(3750), [ask(&["a", "d"], Some(2))]);
}

/// A start in an outage begins with what is on disk; of whom that says nothing, it knows nothing.
#[test]
fn the_same_answer_about_others_is_written_down() {
    let mut script = Script::start(ONLY_POLICIES);
    script.on(Event::Wanted(ids(&["a"])));
    script.answered(Outcome::New(Some(Stamp(1))));
    script.on(Event::Applied(Subject::Policies, 1));
    assert_eq!(script.on(Event::Wanted(ids(&["a", "b"]))), [ask_at_once(&["a", "b"], 1)]);
    assert_eq!(script.answered(Outcome::Same(Some(Stamp(1)))), [confirm(&["a", "b"]), SAVE]);
}

#[test]
fn an_outage_is_told_once_and_takes_nothing() {
    let mut script = Script::start(ONLY_POLICIES);
    script.on(Event::Wanted(ids(&["a"])));
    let failed = || Outcome::Failed("refused".into());
    let lost = || Act::Lost { subject: Subject::Policies, why: "refused".into() };
    assert_eq!(script.answered(failed()), [lost()]);
    assert_eq!(script.on(Event::Wanted(ids(&["a"]))), [], "those wait like all");
    assert_eq!(script.due(3750), [ask(&["a"], None)]);
    assert_eq!(script.answered(failed()), []);
    assert_eq!(script.on(Event::Wanted(ids(&["a", "b"]))), [ask(&["a", "b"], None)]);
    let found = Act::Found(Subject::Policies);
    assert_eq!(script.answered(Outcome::New(None)), [found, publish(&["a", "b"], 1), SAVE]);
    script.due(3750);
    assert_eq!(script.answered(failed()), [lost()], "the next outage is another");
}

#[test]
fn a_long_interval_does_not_make_retries_slow() {
    let mut script = Script::start(Intervals { policies: 60 * SECOND, ..ONLY_POLICIES });
    script.on(Event::Wanted(ids(&["a"])));
    for millis in [3750, 7500, 15_000, 30_000, 45_000, 45_000] {
        script.answered(Outcome::Failed("refused".into()));
        script.due(millis);
    }
}

#[test]
fn everything_is_fetched_now_and_then() {
    let mut script = Script::start(ONLY_POLICIES);
    script.on(Event::Wanted(ids(&["a"])));
    script.answered(Outcome::New(Some(Stamp(1))));
    script.on(Event::Applied(Subject::Policies, 1));
    let mut polls = 0;
    while script.due(3750) == [ask(&["a"], Some(1))] {
        assert_eq!(script.answered(Outcome::Unchanged), [confirm(&["a"])]);
        polls += 1;
    }
    assert_eq!((polls, script.now), (59, Duration::from_secs(225)));
    assert_eq!(script.answered(Outcome::Same(Some(Stamp(1)))), [confirm(&["a"])]);
    assert_eq!(script.due(3750), [ask(&["a"], Some(1))]);
    // What is only confirmed is written down as seldom.
    let mut saves = 0;
    for _ in 0..60 {
        saves += script.answered(Outcome::Unchanged).iter().filter(|act| **act == SAVE).count();
        script.due(3750);
    }
    assert_eq!(saves, 1);
}

#[test]
fn a_server_without_stamps_is_fetched_from_each_time() {
    let mut script = Script::start(ONLY_POLICIES);
    script.on(Event::Wanted(ids(&["a"])));
    script.answered(Outcome::New(None));
    script.on(Event::Applied(Subject::Policies, 1));
    assert_eq!(script.due(3750), [ask(&["a"], None)]);
    assert_eq!(script.answered(Outcome::Same(None)), [confirm(&["a"])]);
}

#[test]
fn what_a_snapshot_had_is_published_already() {
    let mut script =
        Script { follow: Follow::start(ONLY_POLICIES, &[Subject::Policies]), now: Duration::ZERO };
    script.on(Event::Applied(Subject::Policies, 1));
    assert_eq!(script.follow.confirmed_at(Subject::Policies), None);
    assert_eq!(script.on(Event::Wanted(ids(&["a"]))), [ask(&["a"], None)], "it has no stamp");
    assert_eq!(script.answered(Outcome::Same(Some(Stamp(1)))), [confirm(&["a"]), SAVE]);
    assert_eq!(script.due(3750), [ask(&["a"], Some(1))]);
    assert_eq!(script.answered(Outcome::New(Some(Stamp(2)))), [publish(&["a"], 2), SAVE]);
}

/// It is the same for all, so that no container is a reason to ask again.
#[test]
fn the_routers_tag_is_asked_for_at_once_and_then_in_its_own_time() {
    let intervals = Intervals { router: Some(Duration::from_secs(60)), ..ONLY_POLICIES };
    let mut script = Script::start(intervals);
    let tag = |names: &[&str]| Act::Ask { subject: Subject::Router, ids: ids(names), first: First::Stamp };
    assert_eq!(script.on(Event::Wanted(ids(&[]))), [ask(&[], None), tag(&[])]);
    let answered = script.on(Event::Answered(Subject::Router, Outcome::New(None)));
    assert_eq!(answered[..1], [Act::Publish { subject: Subject::Router, number: 1, ids: ids(&[]) }]);
    script.answered(Outcome::New(Some(Stamp(1))));
    assert_eq!(script.on(Event::Wanted(ids(&["a"]))), [ask_at_once(&["a"], 1)]);
    script.now = Duration::from_secs(45);
    assert_eq!(script.on(Event::Due), [tag(&["a"])]);
}

fn force(ticket: Ticket) -> Event {
    Event::Forced(Subject::Policies, ticket)
}

#[test]
fn a_forced_poll_is_asked_now_whatever_is_held_and_ends_when_applied() {
    let mut script = Script::start(ONLY_POLICIES);
    assert_eq!(script.on(force(1)), [], "nothing is known of the cell's apps yet");
    assert_eq!(script.on(Event::Wanted(ids(&["a"]))), [ask(&["a"], None)]);
    assert_eq!(script.answered(Outcome::New(Some(Stamp(7)))), [publish(&["a"], 1), SAVE]);
    assert_eq!(script.on(Event::Applied(Subject::Policies, 0)), []);
    assert_eq!(script.on(Event::Applied(Subject::Policies, 1)), [Act::Done(1, Ok(()))]);
    // Without a condition, though the stamp is done with.
    assert_eq!(script.on(force(2)), [ask(&["a"], None)]);
    assert_eq!(script.answered(Outcome::Same(Some(Stamp(7)))), [confirm(&["a"]), Act::Done(2, Ok(()))]);
    assert_eq!(script.due(3750), [ask(&["a"], Some(7))], "the next one is as ever");
    // What is under way began before: it may have seen less.
    assert_eq!(script.on(force(3)), []);
    assert_eq!(script.on(force(4)), []);
    assert_eq!(script.answered(Outcome::Unchanged), [confirm(&["a"]), ask(&["a"], None)]);
    assert_eq!(script.answered(Outcome::New(None)), [publish(&["a"], 2), SAVE]);
    let done = [Act::Done(3, Ok(())), Act::Done(4, Ok(()))];
    assert_eq!(script.on(Event::Applied(Subject::Policies, 2)), done);
}

#[test]
fn a_forced_poll_that_fails_says_why() {
    let mut script = Script::start(ONLY_POLICIES);
    script.on(Event::Wanted(ids(&["a"])));
    script.answered(Outcome::New(None));
    script.on(force(1));
    let why = || "refused".to_owned();
    let lost = Act::Lost { subject: Subject::Policies, why: why() };
    assert_eq!(script.answered(Outcome::Failed(why())), [Act::Done(1, Err(why())), lost]);
    // What is not applied yet holds up the end of the next one, which found the same.
    assert_eq!(script.on(force(2)), [ask(&["a"], None)]);
    let found = Act::Found(Subject::Policies);
    assert_eq!(script.answered(Outcome::Same(None)), [found, confirm(&["a"])]);
    assert_eq!(script.on(Event::Applied(Subject::Policies, 1)), [Act::Done(2, Ok(()))]);
    let groups = script.on(Event::Forced(Subject::Groups, 3));
    assert!(matches!(groups.as_slice(), [Act::Done(3, Err(_))]), "they are not followed: {groups:?}");
}

#[derive(Debug, Clone)]
enum Step {
    Force,
    Wait(u64),
    Want(BTreeSet<u8>),
    Answer(bool, u8),
    Apply(u64),
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        (0u64..20_000).prop_map(Step::Wait),
        prop::collection::btree_set(0u8..6, 0..4).prop_map(Step::Want),
        (any::<bool>(), 0u8..4).prop_map(|(groups, how)| Step::Answer(groups, how)),
        (0u64..9).prop_map(Step::Apply),
        Just(Step::Force),
    ]
}

proptest! {
    /// One question per subject at a time; no deadline beyond the interval; none asked about ids out of date; numbers
    /// only rise; a question has a condition only if the last publication was applied and covers the ids. Each forced
    /// poll ends, once, and well only if something is applied, if there was anything.
    #[test]
    fn whatever_happens(steps in prop::collection::vec(step(), 0..80), chance: u32) {
        let mut follow = Follow::start(INTERVALS, &[]);
        let mut now = Duration::ZERO;
        let mut wanted = None;
        let mut asked: [Option<Arc<Ids>>; 2] = [None, None];
        let mut published = [0, 0];
        let mut applied = [0, 0];
        let (mut forced, mut ended) = (0, BTreeSet::new());
        for step in steps {
            let event = match step {
                Step::Force => {
                    forced += 1;
                    force(forced)
                }
                Step::Wait(millis) => {
                    now += Duration::from_millis(millis);
                    Event::Due
                }
                Step::Want(apps) => {
                    let names: Vec<String> = apps.iter().map(ToString::to_string).collect();
                    let names: Vec<&str> = names.iter().map(String::as_str).collect();
                    wanted = Some(ids(&names));
                    Event::Wanted(ids(&names))
                }
                Step::Answer(groups, how) => {
                    let subject = if groups { Subject::Groups } else { Subject::Policies };
                    asked[usize::from(groups)] = None;
                    let stamp = Some(Stamp(i64::from(how)));
                    Event::Answered(subject, match how {
                        0 => Outcome::Failed("away".into()),
                        1 => Outcome::Unchanged,
                        2 => Outcome::Same(stamp),
                        _ => Outcome::New(stamp),
                    })
                }
                Step::Apply(number) => {
                    let number = number.min(published[0]);
                    applied[0] = number.max(applied[0]);
                    Event::Applied(Subject::Policies, number)
                }
            };
            for act in follow.on(event, now, &mut |n| chance % n) {
                match act {
                    Act::Ask { subject, ids, first } => {
                        let at = usize::from(subject == Subject::Groups);
                        prop_assert_eq!(asked[at].replace(Arc::clone(&ids)), None);
                        prop_assert_eq!(Some(ids), wanted.clone());
                        let conditional = matches!(first, First::Unless(_));
                        prop_assert!(!conditional || applied[at] == published[at]);
                    }
                    Act::Done(ticket, how) => {
                        prop_assert!(ticket <= forced && ended.insert(ticket));
                        prop_assert!(how.is_err() || applied[0] > 0 || published[0] == 0);
                    }
                    Act::Publish { subject, number, .. } => {
                        let at = usize::from(subject == Subject::Groups);
                        prop_assert!(number > published[at]);
                        published[at] = number;
                    }
                    _ => {}
                }
            }
            if wanted.is_some() {
                let free = asked.iter().any(Option::is_none);
                let deadline = follow.next_deadline();
                prop_assert_eq!(deadline.is_some(), free);
                prop_assert!(deadline.is_none_or(|deadline| deadline <= now + 57 * SECOND));
            }
        }
        // Whatever came before: two more answers, applied, end all.
        follow.on(Event::Wanted(ids(&[])), now, &mut |_| 0);
        for _ in 0..2 {
            for event in [
                Event::Answered(Subject::Policies, Outcome::New(None)),
                Event::Applied(Subject::Policies, u64::MAX),
            ] {
                let acts = follow.on(event, now, &mut |_| 0);
                ended.extend(acts.iter().filter_map(|act| match act {
                    Act::Done(ticket, _) => Some(*ticket),
                    _ => None,
                }));
            }
        }
        prop_assert_eq!(ended, (1..=forced).collect());
    }

    #[test]
    fn waits_lose_5_to_25_percent_and_never_gain(millis in 1000u64..600_000, chance: u32) {
        let interval = Duration::from_millis(millis);
        let wait = earlier(interval, &mut |n| chance % n);
        prop_assert!(interval * 3 / 4 <= wait && wait <= interval * 19 / 20);
    }
}
