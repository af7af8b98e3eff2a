//! One processor for all that is measured.

use anyhow::{Context, Result};
use nix::sched::{CpuSet, sched_getaffinity, sched_setaffinity};
use nix::unistd::Pid;

/// This thread and all that come of it. Where no two of them run at once, nobody waits for another processor to wake up,
/// and a thread's time is known once another runs.
pub(crate) fn stay_on_one_processor() -> Result<()> {
    let allowed = sched_getaffinity(Pid::from_raw(0))?;
    let first = (0..CpuSet::count()).find(|n| allowed.is_set(*n).unwrap_or(false));
    let mut one = CpuSet::new();
    one.set(first.context("a processor to run on")?)?;
    sched_setaffinity(Pid::from_raw(0), &one).context("stay on one processor")
}
