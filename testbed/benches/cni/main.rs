//! `scripts/bench cni`: what an ADD and a DEL of a real container cost, one at a time and many at once, and what
//! their parts cost alone. Plugins are spawned directly from threads that are in the cell already, so the
//! driver adds nothing but the spawn. docs/benchmarks.md says what each figure means.

#[path = "../common/added.rs"]
mod added;
mod calls;
#[path = "../common/mod.rs"]
#[expect(
    dead_code,
    reason = "what the benches of the firewall's changes have in common is more than one of them needs"
)]
mod common;
mod idle;
mod lists;
mod parts;
mod transactions;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::Result;
use calls::{Calls, Times};
use clap::Parser;
use common::change::in_turns;
use common::machine::{Machine, exit, progress};
use lists::List;
use serde::Serialize;
use weft_testbed::lab::Cell;
use weft_testbed::{Lab, Options, interrupt};

const WARM_UPS: usize = 3;
const PARALLEL: usize = 20;
const SETTLED: Duration = Duration::from_secs(3);

/// What an ADD and a DEL of a real container cost, and what their parts cost alone.
#[derive(Debug, Parser)]
#[command(name = "cni", version)]
struct Arguments {
    /// One JSON document instead of a table
    #[arg(long)]
    json: bool,
    /// Containers per row and round
    #[arg(long, default_value_t = 40)]
    count: usize,
    /// Rounds, in each of which every row has its turn
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Pairs of ADD and DEL in the last rows, 20 at once
    #[arg(long, default_value_t = 1000)]
    pairs: usize,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

/// The JSON document; keys are stable.
#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    #[serde(flatten)]
    machine: Machine,
    rows: Vec<Row>,
    parts: Vec<parts::Part>,
}

/// One verb in one situation.
#[derive(Debug, Serialize)]
struct Row {
    verb: &'static str,
    /// Containers that were there before.
    present: usize,
    /// Calls at the same time.
    parallel: usize,
    /// Rules of each container's security groups.
    rules: usize,
    /// `known`: a list that others have as well; `new`: one that nobody has.
    list: &'static str,
    failed: usize,
    #[serde(flatten)]
    times: Times,
    /// Per call: the client process, user and system.
    client_cpu_ms: f64,
    /// Per call: the daemon, all threads; in units of the clock tick, so meaningful over many calls only.
    node_cpu_ms: f64,
    /// Containers per second, from the first spawn of a batch to the last reaping.
    per_second: f64,
    /// Of an ADD by itself: what its parts cost alone, and how many times that it takes.
    floor_ms: Option<f64>,
    to_floor: Option<f64>,
    /// Of a row with others present: how many times that it takes without them, in the same round.
    to_empty: Option<f64>,
}

impl Row {
    /// Exec, call, link, transaction, journal.
    fn beside(self, parts: &[parts::Part]) -> Self {
        let of = |name: &str| parts.iter().find(|part| part.name == name).map(|part| part.times.p50_ms);
        let transaction = transactions::name(self.rules, self.list);
        let names = ["exec", "rpc", "link", "journal", &transaction];
        let alone = self.verb == "ADD" && self.parallel == 1;
        let floor_ms = names.into_iter().map(of).sum::<Option<f64>>().filter(|_| alone);
        Self { floor_ms, to_floor: floor_ms.map(|floor| self.times.p50_ms / floor), ..self }
    }
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    interrupt::watch()?;
    let mut options = Options::unique("bench")?;
    options.cells = 1;
    let machine = Machine::look()?;
    let lab = Lab::up(&options)?;
    let report = Report {
        bench: "cni",
        machine,
        parts: parts::all(&lab.cells[0], arguments.count)?,
        rows: rows(&lab.cells[0], arguments)?,
    };
    let report =
        Report { rows: report.rows.into_iter().map(|row| row.beside(&report.parts)).collect(), ..report };
    lab.down()?;
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        report.print();
    }
    Ok(())
}

/// A row in the making: what its rounds said.
struct Case {
    present: usize,
    parallel: usize,
    list: List,
    rounds: Vec<[Row; 2]>,
}

fn cases() -> Vec<Case> {
    let case = |present, parallel, list| Case { present, parallel, list, rounds: Vec::new() };
    let mut cases = Vec::new();
    for present in [0, 200] {
        cases.extend([10, 100, 1000].map(|rules| case(present, 1, List::known(rules))));
        cases.push(case(present, PARALLEL, List::known(10)));
    }
    cases.extend([10, 100, 1000].map(|rules| case(0, 1, List::new(rules))));
    cases.sort_by_key(|case| case.present);
    cases
}

fn rows(cell: &Cell, arguments: &Arguments) -> Result<Vec<Row>> {
    let calls = |prefix, list| Calls { cell, prefix, present: 0, list };
    // Somebody has the lists that are known.
    let mut holders: Vec<Calls<'_>> = [10, 100, 1000]
        .into_iter()
        .zip(["holds-10", "holds-100", "holds-1000"])
        .map(|(rules, name)| calls(name, List::known(rules)))
        .collect();
    for holder in &mut holders {
        holder.become_many(1)?;
    }
    let mut preload = calls("present", List::known(10));
    let mut cases = cases();
    for round in 0..arguments.rounds {
        progress(&format!("round {} of {}", round + 1, arguments.rounds));
        // So others come or go once a round.
        for case in in_turns(&mut cases, round) {
            if preload.become_many(case.present)? {
                // What many at once leave behind is no part of what one costs.
                thread::sleep(SETTLED);
            }
            calls("warm-up", case.list).measured(case.present, 1, WARM_UPS)?;
            let run = calls("run", case.list);
            case.rounds.push(run.measured(case.present, case.parallel, arguments.count)?);
        }
    }
    preload.become_many(0)?;
    compare(&mut cases);
    let mut rows: Vec<Row> = Vec::new();
    for case in cases {
        let (adds, dels): (Vec<Row>, Vec<Row>) = case.rounds.into_iter().map(|[add, del]| (add, del)).unzip();
        rows.extend([median(adds), median(dels)].into_iter().flatten());
    }
    progress(&format!("{} pairs, {PARALLEL} at once", arguments.pairs));
    rows.extend(calls("pair", List::known(10)).measured(0, PARALLEL, arguments.pairs)?);
    for holder in &mut holders {
        holder.become_many(0)?;
    }
    Ok(rows)
}

/// With the rows of an empty cell, round by round: the machine has slow phases.
fn compare(cases: &mut [Case]) {
    let (empty, full): (Vec<_>, Vec<_>) = cases.iter_mut().partition(|case| case.present == 0);
    for case in full {
        let Some(beside) =
            empty.iter().find(|empty| (empty.parallel, empty.list) == (case.parallel, case.list))
        else {
            continue;
        };
        for (with, without) in case.rounds.iter_mut().flatten().zip(beside.rounds.iter().flatten()) {
            with.to_empty = Some(with.times.p50_ms / without.times.p50_ms);
        }
    }
}

/// Each figure is the median of the rounds; calls and failures are all there were.
fn median(rounds: Vec<Row>) -> Option<Row> {
    let of = |figure: fn(&Row) -> f64| {
        let mut all: Vec<f64> = rounds.iter().map(figure).collect();
        all.sort_by(f64::total_cmp);
        all.get(all.len() / 2).copied().unwrap_or_default()
    };
    let times = Times {
        count: rounds.iter().map(|row| row.times.count).sum(),
        p50_ms: of(|row| row.times.p50_ms),
        p95_ms: of(|row| row.times.p95_ms),
        min_ms: of(|row| row.times.min_ms),
    };
    let (client_cpu_ms, node_cpu_ms) = (of(|row| row.client_cpu_ms), of(|row| row.node_cpu_ms));
    let (failed, per_second) = (rounds.iter().map(|row| row.failed).sum(), of(|row| row.per_second));
    let to_empty = rounds.first()?.to_empty.map(|_| of(|row| row.to_empty.unwrap_or_default()));
    let first = rounds.into_iter().next()?;
    Some(Row { failed, times, client_cpu_ms, node_cpu_ms, per_second, to_empty, ..first })
}

impl Report {
    fn print(&self) {
        println!("{}\n", self.machine);
        println!(
            "{:<4} {:>5} {:<5} {:>7} {:>8} {:>6} {:>6} {:>8} {:>8} {:>8} {:>7} {:>8} {:>8} {:>10} {:>8} {:>6}",
            "",
            "rules",
            "list",
            "present",
            "parallel",
            "calls",
            "failed",
            "p50 ms",
            "floor ms",
            "/ floor",
            "/ empty",
            "p95 ms",
            "min ms",
            "client CPU",
            "node CPU",
            "per s"
        );
        for row in &self.rows {
            let times = &row.times;
            let or_none =
                |figure: Option<f64>| figure.map_or_else(String::new, |figure| format!("{figure:.2}"));
            println!(
                "{:<4} {:>5} {:<5} {:>7} {:>8} {:>6} {:>6} {:>8.2} {:>8} {:>8} {:>7} {:>8.2} {:>8.2} {:>10.2} {:>8.2} {:>6.0}",
                row.verb,
                row.rules,
                row.list,
                row.present,
                row.parallel,
                times.count + row.failed,
                row.failed,
                times.p50_ms,
                or_none(row.floor_ms),
                or_none(row.to_floor),
                or_none(row.to_empty),
                times.p95_ms,
                times.min_ms,
                row.client_cpu_ms,
                row.node_cpu_ms,
                row.per_second
            );
        }
        println!("\n{:<76} {:>9} {:>9} {:>9}", "Parts alone", "p50 ms", "p95 ms", "min ms");
        for parts::Part { what, times, .. } in &self.parts {
            println!("{what:<76} {:>9.3} {:>9.3} {:>9.3}", times.p50_ms, times.p95_ms, times.min_ms);
        }
    }
}
