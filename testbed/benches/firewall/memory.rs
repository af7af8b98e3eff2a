//! What a cell's worth of rules takes in memory: by a process of its own, which tells what it holds.

use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use weft_model::profile::Known;

use super::bed::{Bed, Ports, Program, list, profile};
use super::progress;

const CONTAINERS: usize = 250;
const LISTS: usize = 50;
const RULES: usize = 1000;

#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Memory {
    pub(super) containers: usize,
    pub(super) rules: usize,
    /// Resident, with an empty cell.
    pub(super) before_kib: u64,
    /// Resident, when all is in the kernel.
    pub(super) after_kib: u64,
    /// The most that was ever resident.
    pub(super) peak_kib: u64,
}

/// Asks a new process of this program.
pub(super) fn measure() -> Result<Memory> {
    progress("memory");
    let output =
        Command::new(std::env::current_exe()?).arg("--hold").output().context("execute the bench")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Is that process.
pub(super) fn hold() -> Result<()> {
    let mut bed = Bed::new(Program::Laid)?;
    let before_kib = status("VmRSS")?;
    for number in 0..LISTS {
        let rules = list(u32::try_from(number)?, RULES, Ports::Usual);
        let known: Arc<Known> = Arc::new(profile(rules).into());
        bed.add(&format!("of-{number}"), CONTAINERS / LISTS, &known)?;
    }
    let memory = Memory {
        containers: CONTAINERS,
        rules: LISTS * RULES,
        before_kib,
        after_kib: status("VmRSS")?,
        peak_kib: status("VmHWM")?,
    };
    println!("{}", serde_json::to_string(&memory)?);
    Ok(())
}

/// A line of our own status (proc_pid_status(5)), in KiB.
fn status(name: &str) -> Result<u64> {
    let text = std::fs::read_to_string("/proc/self/status")?;
    let line = text.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(':'));
    let word = line.and_then(|line| line.split_whitespace().next()).context("read /proc/self/status")?;
    Ok(word.parse()?)
}
