//! What a cell's worth of rules takes in memory: of the program's parts, by a process of its own that holds them; and of
//! the daemon, in a lab.

use std::process::Command;
use std::sync::Arc;

use anyhow::{Context, Result, ensure};
use serde::{Deserialize, Serialize};
use weft_model::profile::Known;
use weft_testbed::external_networker::Request;
use weft_testbed::process::Process;
use weft_testbed::{Lab, Options, interrupt};

use super::bed::{alike, garden};
use crate::common::bed::{Bed, Ports, Space, list, profile};
use crate::common::machine::progress;

const CONTAINERS: usize = 250;
const LISTS: usize = 50;
const RULES: usize = 1000;

#[derive(Debug, Serialize)]
pub(super) struct Memory {
    pub(super) containers: usize,
    pub(super) rules: usize,
    /// A process with the model and the kernel's shell, and nothing else.
    pub(super) parts: Resident,
    pub(super) daemon: Resident,
}

/// KiB of resident memory.
#[derive(Debug, Serialize, Deserialize)]
pub(super) struct Resident {
    /// With an empty cell.
    pub(super) before_kib: u64,
    /// When all is in the kernel.
    pub(super) after_kib: u64,
    /// The most that ever was.
    pub(super) peak_kib: u64,
}

impl Resident {
    fn of(process: Process, before_kib: u64) -> Result<Self> {
        let (after_kib, peak_kib) = process.memory().context("read the memory of a process")?;
        Ok(Self { before_kib, after_kib, peak_kib })
    }
}

pub(super) fn measure() -> Result<Memory> {
    Ok(Memory { containers: CONTAINERS, rules: LISTS * RULES, parts: parts()?, daemon: daemon()? })
}

/// Asks a new process of this program.
fn parts() -> Result<Resident> {
    progress("memory: the parts");
    let output =
        Command::new(std::env::current_exe()?).arg("--hold").output().context("execute the bench")?;
    ensure!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr).trim());
    Ok(serde_json::from_slice(&output.stdout)?)
}

/// Is that process.
pub(super) fn hold() -> Result<()> {
    let world = Space::new()?;
    let mut bed = Bed::new(&world, true)?;
    let own = i32::try_from(std::process::id()).ok().and_then(Process::now).context("find this process")?;
    let (before, _) = own.memory().context("read the memory of this process")?;
    for number in 0..LISTS {
        let rules = list(u32::try_from(number)?, RULES, Ports::Usual);
        let known: Arc<Known> = Arc::new(profile(rules).into());
        bed.add(alike(&format!("of-{number}"), CONTAINERS / LISTS, &known))?;
    }
    println!("{}", serde_json::to_string(&Resident::of(own, before)?)?);
    Ok(())
}

/// The same containers by CNI.
fn daemon() -> Result<Resident> {
    progress("memory: a lab's daemon");
    let mut options = Options::unique("bench")?;
    options.cells = 1;
    let lab = Lab::up(&options)?;
    let resident = fill(&lab);
    lab.down()?;
    resident
}

fn fill(lab: &Lab) -> Result<Resident> {
    let cell = lab.cells.first().context("the lab has a cell")?;
    let node = cell.node.process().context("the node has ended")?;
    let (before, _) = node.memory().context("read the memory of the node")?;
    for n in 0..CONTAINERS {
        interrupt::check()?;
        let rules = list(u32::try_from(n % LISTS)?, RULES, Ports::Usual);
        let request = Request { net_out_rules: garden(&rules), ..Request::app(&format!("of-{n}")) };
        cell.add(&request)?;
    }
    Resident::of(node, before)
}
