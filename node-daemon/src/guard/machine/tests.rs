use proptest::prelude::*;

use super::*;
use crate::guard::backend::Side;
use crate::guard::rule::Held;
use Rule::{Forward, Input};

const MS: Duration = Duration::from_millis(1);

fn seen(nft: Held, legacy: Held) -> Seen {
    let side = |name: &str, held| Some(Side { path: name.into(), held });
    Seen { nft: side("n", nft), legacy: side("l", legacy), plain: Some(Backend::Nft) }
}

fn used(backend: Backend) -> Program {
    let name = if backend == Backend::Nft { "n" } else { "l" };
    Program { path: name.into(), backend }
}

fn trouble(why: Why) -> Trouble {
    Trouble { why, said: "because".into() }
}

/// A machine, its clock, and what it did.
struct Bench {
    machine: Machine,
    now: Instant,
    job: Option<Job>,
}

impl Bench {
    fn new(wish: Wish) -> Self {
        let now = Instant::now();
        let mut machine = Machine::new(wish, now);
        machine.on(Event::Listening(true), now);
        Self { machine, now, job: None }
    }

    fn on(&mut self, event: Event) -> Vec<Act> {
        let mut acts = self.machine.on(event, self.now);
        acts.retain(|act| match act {
            Act::Run(job) => {
                assert_eq!(self.job.replace(job.clone()), None, "one job at a time");
                false
            }
            Act::Publish(_) | Act::Tell(_) => true,
        });
        acts
    }

    /// The job that is due next, and how long it was until then.
    fn run(&mut self) -> (Job, Duration) {
        let at = self.machine.next_deadline().expect("something will be done").max(self.now);
        let waited = at - self.now;
        self.now = at;
        assert_eq!(self.on(Event::Clock), []);
        (self.job.take().expect("a job"), waited)
    }

    /// The job that is due now must be this one, ending so.
    fn does(&mut self, job: Job, end: Event) -> Vec<Act> {
        assert_eq!(self.run(), (job, Duration::ZERO));
        self.on(end)
    }

    fn check(&mut self, rule: Rule, there: bool) -> Vec<Act> {
        let program = self.machine.program.clone().expect("a program");
        self.does(Job::Check(program, rule), Event::Checked(rule, Ok(there)))
    }

    fn append(&mut self, rule: Rule) -> Vec<Act> {
        let program = self.machine.program.clone().expect("a program");
        self.does(Job::Append(program, rule), Event::Appended(rule, Ok(())))
    }

    /// Both rules in this backend.
    fn settled(backend: Backend) -> Self {
        let held = Held { foreign: true, ours: false };
        let mut bench = Self::new(Wish::Auto);
        let seen = match backend {
            Backend::Nft => seen(held, Held::default()),
            Backend::Legacy => seen(Held::default(), held),
        };
        bench.does(Job::Look, Event::Looked(seen));
        assert_eq!(bench.check(Input, true), [Act::Publish(Guard::Iptables)]);
        assert_eq!(bench.check(Forward, true), []);
        bench
    }

    /// All checks end like this until there is this job.
    fn until(&mut self, job: &Job, checks: &Result<bool, Trouble>) {
        for _ in 0..1000 {
            match self.run().0 {
                next if next == *job => return,
                Job::Check(_, rule) => drop(self.on(Event::Checked(rule, checks.clone()))),
                other => panic!("{other:?} before {job:?}"),
            }
        }
        panic!("never: {job:?}");
    }

    fn touch(&mut self, rule: Rule, touch: Touch) -> Vec<Act> {
        self.on(Event::Touched(rule, touch))
    }
}

#[test]
fn the_first_start() {
    let mut bench = Bench::new(Wish::Auto);
    let chosen = bench.does(Job::Look, Event::Looked(seen(Held::default(), Held::default())));
    assert_eq!(chosen, [Act::Tell(Tale::Chosen(used(Backend::Nft), Because::PlainOfNeither))]);
    assert_eq!(bench.check(Input, false), [Act::Publish(Guard::Ours)], "the first word");
    assert_eq!(bench.append(Input), []);
    // Its own event changes nothing.
    assert_eq!(bench.touch(Input, Touch::Made), []);
    assert_eq!(bench.check(Input, true), [Act::Publish(Guard::Iptables), Act::Tell(Tale::Appended(Input))]);
    assert_eq!(bench.touch(Input, Touch::Made), []);
    assert_eq!(bench.check(Forward, false), []);
    assert_eq!(bench.append(Forward), []);
    assert_eq!(bench.check(Forward, true), [Act::Tell(Tale::Appended(Forward))]);
    let (job, waited) = bench.run();
    assert_eq!((job, waited), (Job::Check(used(Backend::Nft), Input), SLOW));
}

#[test]
fn a_suspicious_event_is_published_before_anything_is_executed() {
    let mut bench = Bench::settled(Backend::Nft);
    bench.now += 2 * NEXT_BUT_ONE;
    assert_eq!(bench.touch(Input, Touch::Suspicious), [Act::Publish(Guard::Ours)]);
    assert_eq!(bench.touch(Input, Touch::Suspicious), []);
    assert_eq!(bench.check(Input, false), []);
    assert_eq!(bench.append(Input), []);
    assert_eq!(bench.check(Input, true), [Act::Publish(Guard::Iptables), Act::Tell(Tale::PutBack(Input))]);

    bench.now += 2 * NEXT_BUT_ONE;
    assert_eq!(bench.touch(Forward, Touch::Suspicious), [], "nothing depends on it");
    assert_eq!(bench.check(Forward, true), []);
    assert_eq!(bench.touch(Input, Touch::Suspicious), [Act::Publish(Guard::Ours)]);
    assert_eq!(bench.check(Input, true), [Act::Publish(Guard::Iptables)], "a rule of somebody else went");
}

#[test]
fn an_event_during_a_check_makes_its_answer_old() {
    let mut bench = Bench::settled(Backend::Nft);
    bench.now += 2 * NEXT_BUT_ONE;
    bench.touch(Input, Touch::Suspicious);
    bench.run();
    assert_eq!(bench.touch(Input, Touch::Suspicious), []);
    assert_eq!(bench.on(Event::Checked(Input, Ok(true))), []);
    assert_eq!(bench.run(), (Job::Check(used(Backend::Nft), Input), GAP));
    assert_eq!(bench.on(Event::Checked(Input, Ok(true))), [Act::Publish(Guard::Iptables)]);
}

#[test]
fn legacy_is_looked_at_more_often_and_moved_by_no_event() {
    let mut bench = Bench::settled(Backend::Legacy);
    assert_eq!(bench.touch(Input, Touch::Suspicious), []);
    assert_eq!(bench.run(), (Job::Check(used(Backend::Legacy), Input), BLIND));
    assert_eq!(bench.on(Event::Checked(Input, Ok(false))), [Act::Publish(Guard::Ours)]);
    assert_eq!(bench.append(Input), []);
    assert_eq!(bench.check(Input, true), [Act::Publish(Guard::Iptables), Act::Tell(Tale::PutBack(Input))]);
}

#[test]
fn a_failure_is_told_once() {
    let mut bench = Bench::settled(Backend::Nft);
    let fail = |bench: &mut Bench, why| {
        bench.until(&Job::Check(used(Backend::Nft), Input), &Ok(true));
        bench.on(Event::Checked(Input, Err(trouble(why))))
    };
    let tell = |why| Act::Tell(Tale::Trouble(Some(Input), trouble(why)));
    assert_eq!(fail(&mut bench, Why::Locked), [Act::Publish(Guard::Ours), tell(Why::Locked)]);
    assert_eq!(fail(&mut bench, Why::Locked), []);
    assert_eq!(fail(&mut bench, Why::Failed), [tell(Why::Failed)]);
    bench.until(&Job::Check(used(Backend::Nft), Input), &Ok(true));
    let mended = bench.on(Event::Checked(Input, Ok(true)));
    assert_eq!(mended, [Act::Publish(Guard::Iptables), Act::Tell(Tale::Mended(Input))]);
}

#[test]
fn a_rule_that_is_never_recognised_does_not_fill_the_chain() {
    let mut bench = Bench::settled(Backend::Nft);
    let (began, mut appends) = (bench.now, 0);
    while bench.now < began + Duration::from_secs(24 * 3600) {
        match bench.run().0 {
            Job::Look => bench.on(Event::Looked(seen(Held { foreign: true, ours: true }, Held::default()))),
            Job::Check(_, rule) => bench.on(Event::Checked(rule, Ok(rule == Forward))),
            Job::Append(_, rule) => {
                appends += 1;
                assert!(appends < 40, "by {:?}", bench.now - began);
                bench.touch(rule, Touch::Made);
                bench.on(Event::Appended(rule, Ok(())))
            }
            Job::Withdraw(..) => unreachable!("nothing is left elsewhere"),
        };
    }
    assert!(appends >= 10, "{appends}: it is not given up");
}

#[test]
fn no_program_until_there_is_one() {
    let mut bench = Bench::new(Wish::Legacy);
    let absent = Trouble { why: Why::Absent, said: "no program found".into() };
    let told = bench.does(Job::Look, Event::Looked(Seen::default()));
    assert_eq!(told, [Act::Publish(Guard::Ours), Act::Tell(Tale::Trouble(None, absent))]);
    assert_eq!(bench.run(), (Job::Look, SLOW));
    assert_eq!(bench.on(Event::Looked(Seen::default())), []);
    assert_eq!(bench.run(), (Job::Look, SLOW));
    let chosen = bench.on(Event::Looked(seen(Held::default(), Held::default())));
    assert_eq!(chosen, [Act::Tell(Tale::Chosen(used(Backend::Legacy), Because::Wished))]);
    assert_eq!(bench.check(Input, true), [Act::Publish(Guard::Iptables)]);
    // And then it is removed again.
    assert_eq!(bench.run().0, Job::Check(used(Backend::Legacy), Forward));
    bench.on(Event::Checked(Forward, Err(trouble(Why::Absent))));
    bench.until(&Job::Look, &Err(trouble(Why::Absent)));
    bench.on(Event::Looked(Seen::default()));
    assert_eq!(bench.machine.published, Some(Guard::Ours));
}

#[test]
fn nothing_at_all_without_a_wish() {
    let mut bench = Bench::new(Wish::None);
    bench.touch(Input, Touch::Suspicious);
    assert_eq!(bench.machine.next_deadline(), None);
    assert_eq!(bench.machine.published, Some(Guard::Ours));
}

#[test]
fn a_move_to_the_other_backend_takes_our_rules_along() {
    let mut bench = Bench::settled(Backend::Nft);
    bench.until(&Job::Look, &Ok(true));
    let moved = seen(Held { foreign: false, ours: true }, Held { foreign: true, ours: false });
    let chosen = Act::Tell(Tale::Chosen(used(Backend::Legacy), Because::Holds));
    assert_eq!(bench.on(Event::Looked(moved)), [Act::Publish(Guard::Ours), chosen]);
    assert_eq!(bench.check(Input, true), [Act::Publish(Guard::Iptables)]);
    assert_eq!(bench.check(Forward, true), []);
    for rule in [Forward, Input] {
        let told = bench.does(Job::Withdraw(used(Backend::Nft), rule), Event::Withdrawn(rule, Ok(())));
        assert_eq!(told, [Act::Tell(Tale::Withdrawn(rule))]);
    }
    assert_eq!(bench.run().0, Job::Check(used(Backend::Legacy), Input));
}

// === any order of events ===

#[derive(Debug, Clone)]
enum Op {
    /// Somebody empties a chain, and the kernel says so.
    Flush(Rule),
    /// An event without a cause, or with one elsewhere.
    Touch(Rule, Touch),
    /// The program that runs does its work, and ends later.
    Work,
    End {
        fails: bool,
    },
    Pass(u64),
}

fn op() -> impl Strategy<Value = Op> {
    let rule = || prop_oneof![Just(Input), Just(Forward)];
    let touch = prop_oneof![Just(Touch::Made), Just(Touch::Suspicious)];
    prop_oneof![
        2 => rule().prop_map(Op::Flush),
        2 => (rule(), touch).prop_map(|(rule, touch)| Op::Touch(rule, touch)),
        6 => Just(Op::Work),
        6 => prop::bool::weighted(0.1).prop_map(|fails| Op::End { fails }),
        4 => prop_oneof![0u64..20, 80u64..600, 3000u64..12000].prop_map(Op::Pass),
    ]
}

/// How often each rule is in the kernel, and what is remembered to judge what is done.
struct World {
    bench: Bench,
    copies: Each<u32>,
    /// What the running program saw.
    answer: Option<Event>,
    /// The last suspicious event about INPUT, and when the last check that found its rule began, by counting.
    moment: u64,
    suspicious: u64,
    began: u64,
    found: u64,
}

impl World {
    fn on(&mut self, event: Event) {
        let is_clock = event == Event::Clock;
        self.moment += 1;
        match &event {
            Event::Touched(Input, Touch::Suspicious) => self.suspicious = self.moment,
            Event::Checked(Input, Ok(true)) => self.found = self.began,
            _ => {}
        }
        for act in self.bench.on(event) {
            if act == Act::Publish(Guard::Iptables) {
                assert!(self.found > self.suspicious, "published on an answer that is too old");
            }
        }
        if let Some(Job::Check(..)) = &self.bench.job
            && is_clock
        {
            self.began = self.moment;
        }
    }

    fn clock(&mut self) {
        if self.bench.machine.next_deadline().is_some_and(|at| at <= self.bench.now) {
            self.on(Event::Clock);
        }
    }

    fn work(&mut self) {
        if self.answer.is_some() {
            return;
        }
        self.answer = self.bench.job.clone().map(|job| match job {
            Job::Look => Event::Looked(seen(Held { foreign: true, ours: false }, Held::default())),
            Job::Check(_, rule) => Event::Checked(rule, Ok(self.copies[rule] > 0)),
            Job::Append(_, rule) => {
                self.copies[rule] += 1;
                assert_eq!(self.copies[rule], 1, "appended twice");
                Event::Appended(rule, Ok(()))
            }
            Job::Withdraw(..) => unreachable!("nothing is left elsewhere"),
        });
        if let Some(Event::Appended(rule, _)) = self.answer {
            self.on(Event::Touched(rule, Touch::Made));
        }
    }

    fn end(&mut self, fails: bool) {
        let Some(event) = self.answer.take() else { return };
        self.bench.job = None;
        self.on(match event {
            Event::Checked(rule, _) if fails => Event::Checked(rule, Err(trouble(Why::Late))),
            Event::Appended(rule, _) if fails => Event::Appended(rule, Err(trouble(Why::Late))),
            event => event,
        });
    }

    fn go(&mut self, op: Op) {
        self.clock();
        match op {
            Op::Flush(rule) => {
                if std::mem::take(&mut self.copies[rule]) > 0 {
                    self.on(Event::Touched(rule, Touch::Suspicious));
                }
            }
            Op::Touch(rule, touch) => self.on(Event::Touched(rule, touch)),
            Op::Work => self.work(),
            Op::End { fails } => self.end(fails),
            Op::Pass(millis) => self.bench.now += MS * u32::try_from(millis).expect("short"),
        }
        self.clock();
        if self.bench.machine.published == Some(Guard::Iptables) {
            assert_eq!(self.copies[Input], 1, "said to be there");
        }
    }
}

proptest! {
    #[test]
    fn whatever_happens(ops in proptest::collection::vec(op(), 0..120)) {
        let mut world = World {
            bench: Bench::new(Wish::Auto),
            copies: Each::default(),
            answer: None,
            moment: 0,
            suspicious: 0,
            began: 0,
            found: 0,
        };
        for op in ops {
            world.go(op);
        }
        // Once it is quiet, all is as it should be within one period, and stays so.
        for _ in 0..20 {
            world.go(Op::Work);
            world.go(Op::End { fails: false });
            if let Some(next) = world.bench.machine.next_deadline() {
                world.bench.now = world.bench.now.max(next);
            }
        }
        prop_assert_eq!(world.bench.machine.published, Some(Guard::Iptables));
        prop_assert_eq!([world.copies[Input], world.copies[Forward]], [1, 1]);
    }

    /// Foreign events alone cause few checks, and the first at once.
    #[test]
    fn a_storm_is_weathered(gaps in proptest::collection::vec(1u32..60, 50..300)) {
        let mut bench = Bench::settled(Backend::Nft);
        bench.now += 2 * NEXT_BUT_ONE;
        let began = bench.now;
        let mut checks: Vec<Instant> = Vec::new();
        for gap in gaps {
            bench.touch(Input, Touch::Suspicious);
            if bench.machine.next_deadline().is_some_and(|at| at <= bench.now) {
                let (job, _) = bench.run();
                if job == Job::Check(used(Backend::Nft), Input) {
                    checks.push(bench.now);
                    bench.on(Event::Checked(Input, Ok(true)));
                } else {
                    bench.on(Event::Checked(Forward, Ok(true)));
                }
            }
            bench.now += MS * gap;
        }
        prop_assert_eq!(checks.first(), Some(&began));
        for three in checks.windows(3) {
            prop_assert!(three[2] - three[0] >= NEXT_BUT_ONE);
            prop_assert!(three[1] - three[0] >= GAP);
        }
    }
}
