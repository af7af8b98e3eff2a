//! `scripts/bench policy`: what the policy server's answers cost the node, from the decoded answer to the committed
//! transaction; and whether a large foundation costs a cell more than a small one. docs/benchmarks.md says what each
//! figure means.

#[path = "../common/mod.rs"]
mod common;

mod answers;
mod changes;
mod foundation;
mod print;

use std::process::ExitCode;

use anyhow::Result;
use clap::{Parser, ValueEnum};
use serde::Serialize;
use weft_testbed::interrupt;

use common::machine::{Machine, exit};
use common::processor::stay_on_one_processor;

/// What the policy server's answers cost the node.
#[derive(Debug, Parser)]
#[command(name = "policy", version)]
struct Arguments {
    /// One JSON document instead of tables
    #[arg(long)]
    json: bool,
    /// Rounds, in which all cases take turns
    #[arg(long, default_value_t = 5)]
    rounds: usize,
    /// Changes in a round, of each kind
    #[arg(long, default_value_t = 5)]
    repeat: usize,
    /// Changes elsewhere that a foundation's cell polls
    #[arg(long, default_value_t = 40)]
    polls: u32,
    /// Only these parts
    #[arg(long, value_enum)]
    only: Vec<Only>,
    /// Of the changes, only those whose names have this in them
    #[arg(long, default_value = "")]
    case: String,
    /// Given by `cargo bench`
    #[arg(long, hide = true)]
    bench: bool,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Only {
    Changes,
    Foundation,
}

/// The JSON document; keys are stable.
#[derive(Debug, Serialize)]
struct Report {
    bench: &'static str,
    #[serde(flatten)]
    machine: Machine,
    rounds: usize,
    changes: Vec<changes::Row>,
    foundation: Vec<foundation::Row>,
}

fn main() -> ExitCode {
    exit(run(&Arguments::parse()))
}

fn run(arguments: &Arguments) -> Result<()> {
    interrupt::watch()?;
    let machine = Machine::look()?;
    let wants = |part| arguments.only.is_empty() || arguments.only.contains(&part);
    // The daemon of a lab is not kept on one processor.
    let foundation = if wants(Only::Foundation) { foundation::measure(arguments.polls)? } else { Vec::new() };
    stay_on_one_processor()?;
    let changes = match wants(Only::Changes) {
        true => changes::measure(arguments.rounds, arguments.repeat, &arguments.case)?,
        false => Vec::new(),
    };
    let report = Report { bench: "policy", machine, rounds: arguments.rounds, changes, foundation };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print::tables(&report);
    }
    Ok(())
}
