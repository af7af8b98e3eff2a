//! `scripts/bench firewall`: what the firewall's changes cost the node, and what its program costs a packet. Everything
//! happens in network namespaces of this process. docs/benchmarks.md says what each figure means.

#[path = "../common/added.rs"]
mod added;
#[path = "../common/mod.rs"]
mod common;

mod bed;
mod changes;
mod memory;
mod packets;
mod print;
mod traffic;

use std::process::ExitCode;
use std::time::Duration;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use serde::Serialize;
use weft_testbed::interrupt;

use common::machine::{Machine, exit};
use common::processor::stay_on_one_processor;

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
    #[serde(flatten)]
    machine: Machine,
    rounds: usize,
    add: Vec<changes::Row>,
    change: Vec<changes::Row>,
    packets: Vec<packets::Row>,
    memory: Option<memory::Memory>,
}

fn main() -> ExitCode {
    let arguments = Arguments::parse();
    exit(if arguments.hold { memory::hold() } else { run(&arguments) })
}

fn run(arguments: &Arguments) -> Result<()> {
    interrupt::watch()?;
    let machine = Machine::look()?;
    stay_on_one_processor()?;
    let wants = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    let (rounds, repeat) = (arguments.rounds, arguments.repeat);
    let long = Duration::from_millis(arguments.milliseconds);
    let report = Report {
        bench: "firewall",
        machine,
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
