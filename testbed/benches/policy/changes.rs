//! Answers of the policy server brought into the kernel: the first one, and one that differs in one place.

use std::collections::BTreeSet;
use std::sync::Arc;

use anyhow::{Result, ensure};
use serde::Serialize;
use weft_model::asg::EgressRule;
use weft_model::cell::{Step, Wanted};
use weft_model::container::Owner;
use weft_model::follow::Ids;
use weft_testbed::foundation::guid;
use weft_testbed::interrupt;
use weft_testbed::policy_server::{Policy, SecurityGroup};

use super::answers::{Decoded, Source, Stock, decode, written};
use crate::common::bed::{Bed, Ports, list, profile, wanted};
use crate::common::change::{Cost, Measured, Rounds, in_turns};
use crate::common::figure::{Figure, Spent};
use crate::common::machine::progress;

/// Each of an app of its own.
const CONTAINERS: u32 = 50;
/// Apps that may send to each of them: they themselves, and as many that are elsewhere.
const SENDERS: u32 = 2 * CONTAINERS;
const RULES: usize = 1000;

/// Whether all containers have one space, or each its own.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Spaces {
    One,
    Many,
}

/// What one answer took.
#[derive(Debug, Clone, Copy)]
struct Sample {
    fetch: Spent,
    decode: Spent,
    cost: Cost,
}

impl Sample {
    fn whole(&self) -> Spent {
        self.cost.plan + self.cost.kernel
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) case: &'static str,
    /// What is to be reached, in words.
    pub(super) goal: &'static str,
    /// The request, the answer, and its decoding; CPU is the node's alone.
    pub(super) fetch_ms: Figure,
    pub(super) fetch_cpu_ms: Figure,
    /// The answer's text made policies or groups.
    pub(super) decode_ms: Figure,
    pub(super) decode_cpu_ms: Figure,
    /// Edits, the layers of a list that is new, difference, and belief afterwards.
    pub(super) plan_ms: Figure,
    pub(super) plan_cpu_ms: Figure,
    /// The transaction by the kernel's shell, from asking to its answer.
    pub(super) kernel_ms: Figure,
    pub(super) kernel_cpu_ms: Figure,
    /// The last two.
    pub(super) whole_ms: Figure,
    pub(super) whole_cpu_ms: Figure,
    /// Beside them.
    pub(super) journal_ms: Figure,
    /// The same bytes sent again.
    pub(super) bare_ms: Figure,
    pub(super) bare_cpu_ms: Figure,
    pub(super) cpu_to_bare: Figure,
    pub(super) wall_to_bare: Figure,
    pub(super) answer_bytes: usize,
    pub(super) transaction_bytes: usize,
}

/// There and back between two answers. Going there is measured; of a change, coming back as well.
struct Case {
    name: &'static str,
    goal: &'static str,
    change: bool,
    measured: Measured,
    source: Source,
    ids: Ids,
    stocks: [Stock; 2],
    bodies: [Vec<u8>; 2],
    samples: Rounds<Sample>,
    bytes: usize,
}

/// `case`: only those whose names have that in them.
pub(super) fn measure(rounds: usize, repeat: usize, case: &str) -> Result<Vec<Row>> {
    let (none, all) = (Stock::Policies(Vec::new()), Stock::Policies(policies(8080)));
    let changed = Stock::Policies(policies(8081));
    let groups = |groups| Stock::Groups(groups);
    let mut cases = vec![
        Case::new("5,000 policies", "CPU <= 100 ms", Spaces::One, [none, all.clone()])?,
        Case::new("one policy of 5,000 changed", "CPU <= 5 ms", Spaces::One, [all, changed])?,
    ];
    for (ports, first, change) in [
        (Ports::Usual, "a group of 1,000 rules, usual ports", "one rule of it changed, usual ports"),
        (Ports::Own, "a group of 1,000 rules, own ports", "one rule of it changed, own ports"),
    ] {
        let [before, after] = rules(ports);
        let [before, after] = [before, after].map(|rules| groups(vec![group(0, &rules)]));
        let none = groups(vec![group(0, &[])]);
        cases.push(Case::new(first, "CPU <= 100 ms", Spaces::One, [none, before.clone()])?);
        cases.push(Case::new(change, "CPU <= 10 ms, 1.3 x bare", Spaces::One, [before, after])?);
    }
    let lists = (0..CONTAINERS).map(|n| group(n, &list(n, RULES, Ports::Usual))).collect();
    let none = groups(Vec::new());
    cases.push(Case::new("50 lists of 1,000 rules", "1.5 x bare", Spaces::Many, [none, groups(lists)])?);
    cases.retain(|one| one.name.contains(case));
    for round in 0..rounds {
        progress(&format!("changes: round {} of {rounds}", round + 1));
        for case in in_turns(&mut cases, round) {
            interrupt::check()?;
            case.round(repeat)?;
        }
    }
    Ok(cases.iter().map(Case::row).collect())
}

impl Case {
    fn new(name: &'static str, goal: &'static str, spaces: Spaces, stocks: [Stock; 2]) -> Result<Self> {
        let mut measured = Measured::new()?;
        let passed = Arc::new(profile(Vec::new()).into());
        measured.bed.add((0..CONTAINERS).map(|n| {
            let owner = owner(n, spaces);
            Ok(Wanted { owner, ..wanted(&format!("container-{n}"), "eth0", Arc::clone(&passed))? })
        }))?;
        let ids = Ids {
            apps: (0..CONTAINERS).map(|n| guid(n).parse()).collect::<Result<_, _>>()?,
            spaces: (0..CONTAINERS).map(|n| owner(n, spaces).space_id).collect(),
        };
        let source = Source::new()?;
        let nothing = match &stocks[0] {
            Stock::Policies(_) => Stock::Policies(Vec::new()),
            Stock::Groups(_) => Stock::Groups(Vec::new()),
        };
        source.replace(&nothing, &stocks[1])?;
        let second = source.body(&stocks[1])?;
        source.replace(&stocks[1], &stocks[0])?;
        let bodies = [source.body(&stocks[0])?, second];
        let mut case = Self {
            name,
            goal,
            change: name.contains("changed"),
            measured,
            source,
            ids,
            stocks,
            bodies,
            samples: Rounds::default(),
            bytes: 0,
        };
        case.go(0)?;
        Ok(case)
    }

    fn round(&mut self, repeat: usize) -> Result<()> {
        let mut samples = Vec::new();
        for _ in 0..repeat {
            let (mut there, forth) = self.go(1)?;
            let (mut back, home) = self.go(0)?;
            let Self { measured, source, ids, stocks, bodies, .. } = self;
            let (bare, bytes) = measured.again(&forth, &home, || {
                source.fetch(&stocks[0], ids)?;
                drop(decode(&stocks[1], &bodies[1])?);
                Ok(())
            })?;
            [there.cost.bare, back.cost.bare] = bare;
            self.bytes = bytes;
            samples.push(there);
            if self.change {
                samples.push(back);
            }
        }
        self.samples.0.push(samples);
        Ok(())
    }

    /// The server has the one or the other from now on, and so has the kernel.
    fn go(&mut self, to: usize) -> Result<(Sample, Step)> {
        let (stock, body) = (&self.stocks[to], &self.bodies[to]);
        self.source.replace(&self.stocks[1 - to], stock)?;
        let fetch = self.source.fetch(stock, &self.ids)?;
        let begin = Spent::now()?;
        let decoded = decode(stock, body)?;
        let decode = Spent::now()?.since(begin);
        let spaces = &self.ids.spaces;
        let (cost, step) = self.measured.change(|bed| edit(bed, &decoded, spaces))?;
        Ok((Sample { fetch, decode, cost }, step))
    }

    fn row(&self) -> Row {
        let figure = |of: fn(&Sample) -> f64| self.samples.figure(of);
        Row {
            case: self.name,
            goal: self.goal,
            fetch_ms: figure(|sample| sample.fetch.wall),
            fetch_cpu_ms: figure(|sample| sample.fetch.cpu),
            decode_ms: figure(|sample| sample.decode.wall),
            decode_cpu_ms: figure(|sample| sample.decode.cpu),
            plan_ms: figure(|sample| sample.cost.plan.wall),
            plan_cpu_ms: figure(|sample| sample.cost.plan.cpu),
            kernel_ms: figure(|sample| sample.cost.kernel.wall),
            kernel_cpu_ms: figure(|sample| sample.cost.kernel.cpu),
            whole_ms: figure(|sample| sample.whole().wall),
            whole_cpu_ms: figure(|sample| sample.whole().cpu),
            journal_ms: figure(|sample| sample.cost.journal.wall),
            bare_ms: figure(|sample| sample.cost.bare.wall),
            bare_cpu_ms: figure(|sample| sample.cost.bare.cpu),
            cpu_to_bare: self.samples.ratio(|sample| sample.whole().cpu, |sample| sample.cost.bare.cpu),
            wall_to_bare: self.samples.ratio(|sample| sample.whole().wall, |sample| sample.cost.bare.wall),
            answer_bytes: self.bodies[1].len(),
            transaction_bytes: self.bytes,
        }
    }
}

/// As the cell's task does with what the follower publishes.
fn edit(bed: &mut Bed, decoded: &Decoded, spaces: &BTreeSet<String>) -> Result<()> {
    match decoded {
        Decoded::Policies(policies) => bed.cell.policies(policies.clone()),
        Decoded::Groups(groups) => {
            let too_many = bed.cell.groups(Some((Arc::clone(groups), spaces.clone())));
            ensure!(too_many.is_empty(), "too many rules");
        }
    }
    Ok(())
}

fn owner(n: u32, spaces: Spaces) -> Owner {
    Owner {
        policy_group_id: guid(n),
        space_id: space(if spaces == Spaces::One { 0 } else { n }),
        container_workload: "app".into(),
        ..Owner::default()
    }
}

/// Other than any app's.
fn space(n: u32) -> String {
    guid(1_000_000 + n)
}

/// From each of the senders to each container, at port 8080; one of them at `one`.
fn policies(one: u16) -> Vec<Policy> {
    let all = (0..SENDERS).flat_map(|from| (0..CONTAINERS).map(move |to| (from, to)));
    all.map(|(from, to)| {
        let port = if (from, to) == (7, 13) { one } else { 8080 };
        Policy::tcp(&guid(from), &guid(to), port)
    })
    .collect()
}

/// Two lists that differ in one rule.
fn rules(ports: Ports) -> [Vec<EgressRule>; 2] {
    let before = list(1, RULES, ports);
    let mut after = before.clone();
    after[RULES / 2] = list(2, RULES, ports)[RULES / 2];
    [before, after]
}

fn group(n: u32, rules: &[EgressRule]) -> SecurityGroup {
    SecurityGroup {
        running_space_guids: vec![space(n)],
        ..SecurityGroup::named(&format!("group-{n}"), &written(rules))
    }
}
