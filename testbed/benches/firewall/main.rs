//! `scripts/bench firewall`: what the firewall's changes cost the node, and what its program costs a packet. Everything
//! happens in network namespaces of this process. docs/benchmarks.md says what each figure means.

mod bare;
mod bed;
mod changes;
mod figure;
mod memory;
mod packets;
mod print;
mod traffic;

use std::process::ExitCode;
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result};
use clap::{Parser, ValueEnum};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;
use weft_testbed::interrupt;

/// What the firewall's changes cost the node, and what its program costs a packet.
#[derive(Debug, Parser)]
#[command(name = "firewall", version)]
struct Arguments {
    /// One JSON document instead of tables
    #[arg(long)]
    json: bool,
    /// Rounds, in which all cases take turns
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Changes in a round, of each kind
    #[arg(long, default_value_t = 10)]
    repeat: usize,
    /// How long each kind of traffic is sent in a round
    #[arg(long, default_value_t = 500)]
    milliseconds: u64,
    /// Only these parts
    #[arg(long, value_enum)]
    only: Vec<Only>,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
    /// Is the process whose memory is looked at
    #[arg(long, hide = true)]
    hold: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    Add,
    Change,
    Packets,
    Memory,
}

/// The JSON document; keys are stable.
#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    cores: usize,
    kernel: String,
    load_before: f64,
    rounds: usize,
    add: Vec<changes::Row>,
    change: Vec<changes::Row>,
    packets: Vec<packets::Row>,
    memory: Option<memory::Memory>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    let done = if arguments.hold { memory::hold() } else { run(&arguments) };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(arguments: &Arguments) -> Result<()> {
    interrupt::watch()?;
    let cores = thread::available_parallelism()?.get();
    stay_on_one_processor()?;
    let wants = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let (rounds, repeat) = (arguments.rounds, arguments.repeat);
    let long = Duration::from_millis(arguments.milliseconds);
    let report = Report {
        bench: "firewall",
        cores,
        kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
        load_before: load(),
        rounds,
        add: if wants(Only::Add) { changes::add(rounds, repeat)? } else { Vec::new() },
        change: if wants(Only::Change) { changes::change(rounds, repeat)? } else { Vec::new() },
        packets: if wants(Only::Packets) { packets::measure(rounds, long)? } else { Vec::new() },
        memory: if wants(Only::Memory) { Some(memory::measure()?) } else { None },
    };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print::tables(&report);
    }
    Ok(())
}

/// This thread and all that come of it. Where no two of them run at once, nobody waits for another processor to wake up,
/// and a thread's time is known once another runs.
fn stay_on_one_processor() -> Result<()> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let first = (0..CpuSet::count()).find(|n| allowed.is_set(*n).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(first.context("a processor to run on")?)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("stay on one processor")
}

/// The machine's load average over a minute: a figure taken on a busy machine is another figure.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

fn progress(text: &str) {
    eprintln!("bench: {text}");
}
