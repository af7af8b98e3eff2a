//! What a change of the firewall costs the cell's task: a container added, a security group changed.

use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use weft_model::asg::EgressRule;
use weft_model::asg::garden::parse;
use weft_model::cell::Step;
use weft_model::profile::{Digest, Known, Settings, Workload};
use weft_node::profiles::{Passed, Profiles};
use weft_testbed::interrupt;

use super::bed::{alike, garden};
use crate::common::bed::{Bed, Ports, handle, list, profile, wanted};
use crate::common::change::{Cost, Measured, Rounds, in_turns};
use crate::common::figure::{Figure, Spent};
use crate::common::machine::progress;

/// Lists of containers that are there without having to do with what is measured.
const OTHER_LISTS: u32 = 10;
/// Bytes of JSON from which on the plugin names a list by its digest (docs/cni.md).
const NAMED: usize = 16 << 10;
/// Containers that a changed group is used by, and all that are there.
const USERS: usize = 50;
const PRESENT: usize = 250;

/// What one change took, part by part.
#[derive(Debug, Clone, Copy, Default)]
struct Sample {
    /// Zero where nobody passes JSON.
    decode: Spent,
    known: Spent,
    cost: Cost,
}

impl Sample {
    fn whole(&self) -> Spent {
        self.known + self.cost.plan + self.cost.kernel
    }
}

#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) rules: usize,
    /// `new` or `known` of a list that is added; the ports of one that changes.
    pub(super) list: &'static str,
    /// Containers that are there.
    pub(super) present: usize,
    /// Garden's JSON made rules.
    pub(super) decode_ms: Figure,
    /// Rules made a profile that has a name, its digest; or found among those that were.
    pub(super) known_ms: Figure,
    /// Edits, the layers of a list that is new, difference, and belief afterwards.
    pub(super) plan_ms: Figure,
    /// The transaction by the kernel's shell, from asking to its answer.
    pub(super) kernel_ms: Figure,
    /// The last three of them.
    pub(super) whole_ms: Figure,
    pub(super) whole_cpu_ms: Figure,
    /// Beside them.
    pub(super) journal_ms: Figure,
    /// The same bytes sent again.
    pub(super) bare_ms: Figure,
    pub(super) bare_cpu_ms: Figure,
    pub(super) cpu_to_bare: Figure,
    pub(super) wall_to_bare: Figure,
    pub(super) transaction_bytes: usize,
}

fn row(
    samples: &Rounds<Sample>,
    rules: usize,
    list: &'static str,
    present: usize,
    transaction_bytes: usize,
) -> Row {
    let figure = |of: fn(&Sample) -> f64| samples.figure(of);
    Row {
        rules,
        list,
        present,
        decode_ms: figure(|sample| sample.decode.wall),
        known_ms: figure(|sample| sample.known.wall),
        plan_ms: figure(|sample| sample.cost.plan.wall),
        kernel_ms: figure(|sample| sample.cost.kernel.wall),
        whole_ms: figure(|sample| sample.whole().wall),
        whole_cpu_ms: figure(|sample| sample.whole().cpu),
        journal_ms: figure(|sample| sample.cost.journal.wall),
        bare_ms: figure(|sample| sample.cost.bare.wall),
        bare_cpu_ms: figure(|sample| sample.cost.bare.cpu),
        cpu_to_bare: samples.ratio(|sample| sample.whole().cpu, |sample| sample.cost.bare.cpu),
        wall_to_bare: samples.ratio(|sample| sample.whole().wall, |sample| sample.cost.bare.wall),
        transaction_bytes,
    }
}

/// Containers that have lists of this length, and nothing to do with what is measured.
fn others(bed: &mut Bed, count: usize, rules: usize) -> Result<()> {
    for number in 0..OTHER_LISTS {
        let lists = usize::try_from(OTHER_LISTS)?;
        let some = count / lists + usize::from(usize::try_from(number)? < count % lists);
        let known = Arc::new(Known::from(profile(list(100 + number, rules, Ports::Usual))));
        bed.add(alike(&format!("other-{number}"), some, &known))?;
    }
    Ok(())
}

// === add ===

struct Add {
    rules: usize,
    present: usize,
    measured: Measured,
    profiles: Profiles,
    /// A list that nobody has, and one that somebody has; in JSON.
    lists: [(&'static str, Vec<u8>); 2],
    /// The second one's digest, if the plugin names it so and does not send it.
    named: Option<Digest>,
    samples: [Rounds<Sample>; 2],
    bytes: [usize; 2],
}

/// One container's rules added and taken away again.
pub(super) fn add(rounds: usize, repeat: usize) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for rules in [10, 100, 1000] {
        for present in [0, 200] {
            all.push(Add::new(rules, present)?);
        }
    }
    for round in 0..rounds {
        progress(&format!("add: round {} of {rounds}", round + 1));
        for add in in_turns(&mut all, round) {
            interrupt::check()?;
            add.round(repeat)?;
        }
    }
    let one = |add: &Add, which: usize| {
        row(&add.samples[which], add.rules, add.lists[which].0, add.present, add.bytes[which])
    };
    Ok([0, 1].into_iter().flat_map(|which| all.iter().map(move |add| one(add, which))).collect())
}

impl Add {
    fn new(rules: usize, present: usize) -> Result<Self> {
        let mut measured = Measured::new()?;
        let (new, known) = (list(1, rules, Ports::Usual), list(2, rules, Ports::Usual));
        let json = |rules: &[EgressRule]| garden(rules).to_string().into_bytes();
        let lists = [("new", json(&new)), ("known", json(&known))];
        let profiles = Profiles::default();
        let held = measured.bed.runtime.block_on(profiles.get(passed(&lists[1].1), &handle("holder")?))?;
        measured.bed.add(alike("holder", 1, &held))?;
        others(&mut measured.bed, present, rules)?;
        let named = (lists[1].1.len() > NAMED).then(|| Digest::of_bytes(&lists[1].1));
        let (samples, bytes) = Default::default();
        Ok(Self { rules, present, measured, profiles, lists, named, samples, bytes })
    }

    fn round(&mut self, repeat: usize) -> Result<()> {
        for which in 0..2 {
            let mut samples = Vec::new();
            for _ in 0..repeat {
                let (sample, bytes) = self.once(which)?;
                samples.push(sample);
                self.bytes[which] = bytes;
            }
            self.samples[which].0.push(samples);
        }
        Ok(())
    }

    fn once(&mut self, which: usize) -> Result<(Sample, usize)> {
        let mut sample = Sample::default();
        let begin = Spent::now()?;
        let known = if which == 0 {
            let parsed = parse(&self.lists[which].1).map_err(|why| anyhow::anyhow!("{why}"))?;
            let decoded = Spent::now()?;
            let known: Arc<Known> = Arc::new(profile(parsed.rules).into());
            sample.decode = decoded.since(begin);
            sample.known = Spent::now()?.since(decoded);
            known
        } else {
            let found = self.find()?;
            sample.known = Spent::now()?.since(begin);
            found
        };
        let (cost, bytes) = self.measured.come_and_go(wanted("added", "eth0", known)?)?;
        sample.cost = cost;
        Ok((sample, bytes))
    }

    /// The profile of the list that somebody has, as the node finds it.
    fn find(&self) -> Result<Arc<Known>> {
        match self.named {
            Some(rules) => {
                let found = self.profiles.known(Workload::Running, &Settings::default(), rules);
                found.context("a list that somebody has is not known")
            }
            None => {
                let (passed, whose) = (passed(&self.lists[1].1), handle("added")?);
                Ok(self.measured.bed.runtime.block_on(self.profiles.get(passed, &whose))?)
            }
        }
    }
}

fn passed(rules: &[u8]) -> Passed {
    Passed { workload: Workload::Running, settings: Settings::default(), net_out_rules: rules.to_vec() }
}

// === change ===

struct Change {
    rules: usize,
    ports: &'static str,
    measured: Measured,
    /// Which of them the group's users have changes with each sample: they differ in one rule.
    lists: [Vec<EgressRule>; 2],
    now: usize,
    samples: Rounds<Sample>,
    bytes: usize,
}

/// One rule of a group that many use changed.
pub(super) fn change(rounds: usize, repeat: usize) -> Result<Vec<Row>> {
    let mut all = Vec::new();
    for (ports, of) in [("usual ports", Ports::Usual), ("own ports", Ports::Own)] {
        for rules in [10, 100, 1000, 5000] {
            all.push(Change::new(rules, ports, of)?);
        }
    }
    for round in 0..rounds {
        progress(&format!("change: round {} of {rounds}", round + 1));
        for change in in_turns(&mut all, round) {
            interrupt::check()?;
            change.round(repeat)?;
        }
    }
    Ok(all
        .iter()
        .map(|change| row(&change.samples, change.rules, change.ports, PRESENT, change.bytes))
        .collect())
}

impl Change {
    fn new(rules: usize, ports: &'static str, of: Ports) -> Result<Self> {
        let mut measured = Measured::new()?;
        let before = list(1, rules, of);
        let mut after = before.clone();
        let other = list(2, rules, of);
        after[rules / 2] = other[rules / 2];
        let lists = [before, after];
        measured.bed.add(alike("user", USERS, &Arc::new(profile(lists[0].clone()).into())))?;
        others(&mut measured.bed, PRESENT - USERS, 100)?;
        Ok(Self { rules, ports, measured, lists, now: 0, samples: Rounds::default(), bytes: 0 })
    }

    fn round(&mut self, repeat: usize) -> Result<()> {
        let mut samples = Vec::new();
        for _ in 0..repeat {
            let mut there = [Sample::default(); 2];
            let steps = [self.once(&mut there[0])?, self.once(&mut there[1])?];
            let (bare, bytes) = self.measured.again(&steps[0], &steps[1], || Ok(()))?;
            for (sample, bare) in there.iter_mut().zip(bare) {
                sample.cost.bare = bare;
            }
            self.bytes = bytes;
            samples.extend(there);
        }
        self.samples.0.push(samples);
        Ok(())
    }

    fn once(&mut self, sample: &mut Sample) -> Result<Step> {
        self.now = 1 - self.now;
        let profile = profile(self.lists[self.now].clone());
        let handles = (0..USERS).map(|n| handle(&format!("user-{n}"))).collect::<Result<Vec<_>>>()?;
        let begin = Spent::now()?;
        let known: Arc<Known> = Arc::new(profile.into());
        sample.known = Spent::now()?.since(begin);
        let (cost, step) = self.measured.change(|bed| {
            handles.iter().try_for_each(|handle| bed.cell.assign(handle, Arc::clone(&known)))?;
            Ok(())
        })?;
        sample.cost = cost;
        ensure!(step.firewall.changes.len() > USERS, "nothing was changed");
        Ok(step)
    }
}
