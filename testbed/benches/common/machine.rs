//! The machine that a bench runs on.

use std::thread;

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;
use serde::Serialize;

/// What every report begins with.
#[derive(Debug, Serialize)]
pub(crate) struct Machine {
    pub(crate) cores: usize,
    pub(crate) kernel: String,
    pub(crate) load_before: f64,
}

impl Machine {
    /// Before anything is measured.
    pub(crate) fn look() -> Result<Self> {
        Ok(Self {
            cores: thread::available_parallelism()?.get(),
            kernel: std::fs::read_to_string("/proc/sys/kernel/osrelease")?.trim().to_owned(),
            load_before: load(),
        })
    }
}

/// This thread and all that come of it. Where no two of them run at once, nobody waits for another processor to wake up,
/// and a thread's time is known once another runs.
pub(crate) fn stay_on_one_processor() -> Result<()> {
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

pub(crate) fn progress(text: &str) {
    eprintln!("bench: {text}");
}
