//! `scripts/bench cni`: what an ADD and a DEL of a real container cost, one at a time and many at once, and what
//! their parts cost alone. Plugins are spawned directly from threads that are in the cell already, so the
//! driver adds nothing but the spawn. docs/benchmarks.md says what each figure means.

#[path = "../common/added.rs"]
mod added;
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

use std::collections::VecDeque;
use std::io::Write;
use std::process::{Command, ExitCode, Stdio};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use clap::Parser;
use common::machine::{Machine, exit, progress};
use lists::List;
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::Serialize;
use weft_testbed::external_networker::said;
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

#[derive(Debug, Serialize)]
struct Times {
    count: usize,
    p50_ms: f64,
    p95_ms: f64,
    min_ms: f64,
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
        holder.grow_to(1)?;
    }
    let mut preload = calls("present", List::known(10));
    let mut cases = cases();
    for round in 0..arguments.rounds {
        progress(&format!("round {} of {}", round + 1, arguments.rounds));
        for case in &mut cases {
            if preload.grow_to(case.present)? {
                // What many at once leave behind is no part of what one costs.
                thread::sleep(SETTLED);
            }
            calls("warm-up", case.list).measured(case.present, 1, WARM_UPS)?;
            let run = calls("run", case.list);
            case.rounds.push(run.measured(case.present, case.parallel, arguments.count)?);
        }
        preload.shrink()?;
    }
    let mut rows: Vec<Row> = Vec::new();
    for case in cases {
        let (adds, dels): (Vec<Row>, Vec<Row>) = case.rounds.into_iter().map(|[add, del]| (add, del)).unzip();
        rows.extend([median(adds), median(dels)].into_iter().flatten());
    }
    progress(&format!("{} pairs, {PARALLEL} at once", arguments.pairs));
    rows.extend(calls("pair", List::known(10)).measured(0, PARALLEL, arguments.pairs)?);
    for holder in &mut holders {
        holder.shrink()?;
    }
    Ok(rows)
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
    let first = rounds.into_iter().next()?;
    Some(Row { failed, times, client_cpu_ms, node_cpu_ms, per_second, ..first })
}

/// Calls of the plugin in one cell, with containers of its own.
struct Calls<'a> {
    cell: &'a Cell,
    prefix: &'static str,
    present: usize,
    list: List,
}

/// How one call went.
struct Call {
    took: Duration,
    /// What the plugin said, if it failed.
    failure: Option<String>,
}

impl Calls<'_> {
    fn handles(&self, count: usize) -> Vec<String> {
        (0..count).map(|index| format!("{}-{index}", self.prefix)).collect()
    }

    /// Whether there was anything to do.
    fn grow_to(&mut self, count: usize) -> Result<bool> {
        let new = self.handles(count).split_off(self.present);
        if new.is_empty() {
            return Ok(false);
        }
        self.namespaces(&new, true)?;
        none_failed(self.all("ADD", &new, 4)?)?;
        self.present = count;
        Ok(true)
    }

    fn shrink(&mut self) -> Result<()> {
        let all = self.handles(self.present);
        self.present = 0;
        none_failed(self.all("DEL", &all, 4)?)?;
        self.namespaces(&all, false)
    }

    /// One at a time: each container comes and goes. Many at once: as many come, then they go.
    fn measured(&self, present: usize, parallel: usize, count: usize) -> Result<[Row; 2]> {
        let mut cpu = [[0.0; 2]; 2];
        let mut elapsed = [Duration::ZERO; 2];
        let handles = self.handles(count);
        let mut calls: [Vec<Call>; 2] = Default::default();
        for batch in handles.chunks(parallel) {
            interrupt::check()?;
            self.namespaces(batch, true)?;
            for (index, verb) in ["ADD", "DEL"].into_iter().enumerate() {
                let before = self.cpu()?;
                let began = Instant::now();
                calls[index].extend(self.all(verb, batch, parallel)?);
                elapsed[index] += began.elapsed();
                let after = self.cpu()?;
                for side in 0..2 {
                    cpu[index][side] += after[side] - before[side];
                }
            }
            self.namespaces(batch, false)?;
        }
        let [adds, dels] = calls;
        let row = |verb: &'static str, calls: Vec<Call>, [client, node]: [f64; 2], elapsed: Duration| {
            let failures: Vec<&String> = calls.iter().filter_map(|call| call.failure.as_ref()).collect();
            if let Some(first) = failures.first() {
                eprintln!("bench: {} of {} {verb} failed, the first: {first}", failures.len(), calls.len());
            }
            let failed = failures.len();
            let all = as_f64(calls.len());
            let times = Times::of(calls.iter().filter(|call| call.failure.is_none()).map(|call| call.took));
            Row {
                verb,
                present,
                parallel,
                rules: self.list.rules,
                list: self.list.name(),
                failed,
                times,
                client_cpu_ms: client / all,
                node_cpu_ms: node / all,
                per_second: all / elapsed.as_secs_f64(),
                floor_ms: None,
                to_floor: None,
            }
        };
        Ok([row("ADD", adds, cpu[0], elapsed[0]), row("DEL", dels, cpu[1], elapsed[1])])
    }

    /// Milliseconds spent so far by all ended children of this process, and by the node.
    fn cpu(&self) -> Result<[f64; 2]> {
        let node = self.cell.node.process().context("the node has ended")?;
        Ok([children_cpu_ms()?, node.cpu_time().as_secs_f64() * 1000.0])
    }

    /// Makes or removes the containers' namespaces: not part of any figure.
    fn namespaces(&self, handles: &[String], make: bool) -> Result<()> {
        for handle in handles {
            if make { self.cell.create_namespace(handle) } else { self.cell.remove_namespace(handle) }?;
        }
        Ok(())
    }

    /// Calls the plugin for every handle, `parallel` at once.
    fn all(&self, verb: &str, handles: &[String], parallel: usize) -> Result<Vec<Call>> {
        let del = self.cell.del_input()?.to_string();
        let mut prepared = VecDeque::new();
        for handle in handles {
            let input = match verb {
                "ADD" => self.cell.add_input(&self.list.request(handle)?)?.to_string(),
                _ => del.clone(),
            };
            let mut command = Command::new(self.cell.plugin_dir().join("weft-cni"));
            command.env_clear().envs(self.cell.environment(verb, handle));
            prepared.push_back((command, input));
        }
        let queue = Mutex::new(prepared);
        // All start at once, from within the cell.
        let barrier = Barrier::new(parallel);
        let work = || {
            let entered = self.cell.place.move_thread();
            barrier.wait();
            entered?;
            let mut calls = Vec::new();
            loop {
                let next = queue.lock().ok().and_then(|mut queue| queue.pop_front());
                let Some((mut command, input)) = next else { return Ok(calls) };
                calls.push(call(&mut command, input.as_bytes())?);
            }
        };
        thread::scope(|scope| {
            let threads: Vec<_> = (0..parallel).map(|_| scope.spawn(work)).collect();
            let mut calls = Vec::new();
            for thread in threads {
                let done: Result<Vec<Call>> =
                    thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
                calls.extend(done?);
            }
            Ok(calls)
        })
    }
}

/// From before the spawn until the process is reaped and its output read.
fn call(command: &mut Command, input: &[u8]) -> Result<Call> {
    command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(Stdio::null());
    let start = Instant::now();
    let mut child = command.spawn().context("execute weft-cni")?;
    drop(child.stdin.take().map(|mut stdin| stdin.write_all(input)));
    let output = child.wait_with_output()?;
    let took = start.elapsed();
    Ok(Call { took, failure: (!output.status.success()).then(|| said(&output)) })
}

fn none_failed(calls: Vec<Call>) -> Result<()> {
    let failure = calls.into_iter().find_map(|call| call.failure);
    failure.map_or(Ok(()), |failure| Err(anyhow::anyhow!("{failure}")))
}

impl Report {
    fn print(&self) {
        println!("{}\n", self.machine);
        println!(
            "{:<4} {:>5} {:<5} {:>7} {:>8} {:>6} {:>6} {:>8} {:>8} {:>8} {:>8} {:>8} {:>10} {:>8} {:>6}",
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
                "{:<4} {:>5} {:<5} {:>7} {:>8} {:>6} {:>6} {:>8.2} {:>8} {:>8} {:>8.2} {:>8.2} {:>10.2} {:>8.2} {:>6.0}",
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

impl Times {
    fn of(times: impl Iterator<Item = Duration>) -> Self {
        let mut sorted: Vec<f64> = times.map(|time| time.as_secs_f64() * 1000.0).collect();
        sorted.sort_by(f64::total_cmp);
        let count = sorted.len();
        let at = |percent: usize| sorted.get((count * percent / 100).min(count.saturating_sub(1))).copied();
        let or_zero = |value: Option<f64>| value.unwrap_or_default();
        Self { count, p50_ms: or_zero(at(50)), p95_ms: or_zero(at(95)), min_ms: or_zero(at(0)) }
    }
}

#[expect(clippy::cast_precision_loss, reason = "counts of calls are small")]
fn as_f64(count: usize) -> f64 {
    count as f64
}

fn children_cpu_ms() -> Result<f64> {
    let usage = getrusage(UsageWho::RUSAGE_CHILDREN)?;
    let micros = usage.user_time().num_microseconds() + usage.system_time().num_microseconds();
    #[expect(clippy::cast_precision_loss, reason = "microseconds of CPU of one run fit")]
    Ok(micros as f64 / 1000.0)
}
