//! Whether a cell of a large foundation pays for the foundation: the same cell with a server that has only what concerns
//! it, and then with one that has everything.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use serde::Serialize;
use serde_json::json;
use weft_testbed::foundation::{CONTAINERS, fill, guid, policies};
use weft_testbed::policy_server::{Policy, PolicyServer, Route};
use weft_testbed::process::Process;
use weft_testbed::{Lab, Options, interrupt};

use crate::common::machine::progress;

const INTERVAL: Duration = Duration::from_millis(500);
const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug, Serialize)]
pub(super) struct Row {
    pub(super) server: &'static str,
    /// That the server has.
    pub(super) policies: usize,
    /// That the cell has.
    pub(super) containers: u32,
    /// Of each poll after a change that is none of the cell's.
    pub(super) requests: f64,
    pub(super) answer_bytes: f64,
    pub(super) cpu_ms_per_changed_poll: f64,
    /// Of each poll that found nothing changed.
    pub(super) cpu_ms_per_unchanged_poll: f64,
    pub(super) resident_kib: u64,
    pub(super) peak_kib: u64,
}

pub(super) fn measure(polls: u32) -> Result<Vec<Row>> {
    progress("foundation: a lab");
    let mut options = Options::unique("bench")?;
    options.cells = 1;
    options.policy_server = true;
    let node = json!({
        "disable_container_network_policy": false,
        "policy_poll_interval_seconds": INTERVAL.as_secs_f64(),
    });
    options.node.extend(node.as_object().cloned().unwrap_or_default());
    let lab = Lab::up(&options)?;
    let rows = both(&lab, polls);
    lab.down()?;
    rows
}

fn both(lab: &Lab, polls: u32) -> Result<Vec<Row>> {
    let server = lab.policy_server.as_ref().context("the lab has a policy server")?;
    let node = lab.cells.first().and_then(|cell| cell.node.process()).context("the node runs")?;
    let (concerned, others) = policies();
    let counts = [concerned.len(), concerned.len() + others.len()];
    server.change(|state| state.add_policies(concerned))??;
    progress(&format!("foundation: {CONTAINERS} containers"));
    fill(&lab.cells[0])?;
    progress("foundation: a server that has what concerns the cell");
    let few = row("what concerns the cell", counts[0], server, node, polls)?;
    server.change(|state| state.add_policies(others))??;
    progress("foundation: a server that has everything");
    Ok(vec![few, row("everything", counts[1], server, node, polls)?])
}

/// Each change elsewhere is found by one poll, which the next one, that finds nothing, follows.
fn row(what: &'static str, count: usize, server: &PolicyServer, node: Process, polls: u32) -> Result<Row> {
    let asked = || (server.asked(Route::Policies), server.answered(Route::Policies));
    // Until it has what there is.
    changed(server)?;
    let (before, cpu) = (asked(), node.cpu_time());
    for _ in 0..polls {
        changed(server)?;
    }
    let (after, busy) = (asked(), node.cpu_time().saturating_sub(cpu));
    let cpu = node.cpu_time();
    let stamps = server.asked(Route::PoliciesLastUpdated);
    for poll in 1..=u64::from(polls) {
        wait("the next poll", || server.asked(Route::PoliciesLastUpdated) >= stamps + poll)?;
    }
    let unchanged = u32::try_from(server.asked(Route::PoliciesLastUpdated) - stamps)?;
    let idle = node.cpu_time().saturating_sub(cpu);
    let (resident_kib, peak_kib) = node.memory().context("read the memory of the node")?;
    let each = |total: u64| -> Result<f64> { Ok(f64::from(u32::try_from(total)?) / f64::from(polls)) };
    Ok(Row {
        server: what,
        policies: count,
        containers: CONTAINERS,
        requests: each(after.0 - before.0)?,
        answer_bytes: each(after.1 - before.1)?,
        cpu_ms_per_changed_poll: busy.as_secs_f64() * 1000.0 / f64::from(polls),
        cpu_ms_per_unchanged_poll: idle.as_secs_f64() * 1000.0 / f64::from(unchanged),
        resident_kib,
        peak_kib,
    })
}

/// A policy between two apps that are elsewhere goes and comes; until the cell has asked for its own again.
fn changed(server: &PolicyServer) -> Result<()> {
    let elsewhere = Policy::tcp(&guid(1), &guid(2), 9999);
    let before = server.asked(Route::Policies);
    server.change(|state| {
        state.remove_policies([&elsewhere]);
        state.add_policies([elsewhere.clone()])
    })??;
    wait("a fetch", || server.asked(Route::Policies) > before)?;
    // It is asked for in parts; behind the last one the time of the last change is asked for once more, and then by the
    // next poll.
    let last = server.asked(Route::PoliciesLastUpdated);
    wait("the next poll", || server.asked(Route::PoliciesLastUpdated) >= last + 2)
}

fn wait(what: &str, mut done: impl FnMut() -> bool) -> Result<()> {
    let deadline = Instant::now() + PATIENCE;
    while !done() {
        interrupt::check()?;
        ensure!(Instant::now() < deadline, "{what}: not in time");
        thread::sleep(Duration::from_millis(10));
    }
    Ok(())
}
