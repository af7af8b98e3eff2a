//! The plugin called as a runtime calls it, and how long that took.

use std::collections::VecDeque;
use std::io::Write;
use std::process::{Command, Stdio};
use std::sync::{Barrier, Mutex};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use nix::sys::resource::{UsageWho, getrusage};
use nix::sys::time::TimeValLike;
use serde::Serialize;
use weft_testbed::external_networker::said;
use weft_testbed::interrupt;
use weft_testbed::lab::Cell;

use crate::Row;
use crate::lists::List;

#[derive(Debug, Serialize)]
pub(crate) struct Times {
    pub(crate) count: usize,
    pub(crate) p50_ms: f64,
    pub(crate) p95_ms: f64,
    pub(crate) min_ms: f64,
}

/// So many network namespaces are made before their containers come, and removed when all are gone: what the kernel does
/// to remove one takes its time, and should not be in the next call's.
const TOGETHER: usize = 40;

/// Calls of the plugin in one cell, with containers of its own.
pub(crate) struct Calls<'a> {
    pub(crate) cell: &'a Cell,
    pub(crate) prefix: &'static str,
    pub(crate) present: usize,
    pub(crate) list: List,
}

/// How one call went.
pub(crate) struct Call {
    pub(crate) took: Duration,
    /// What the plugin said, if it failed.
    pub(crate) failure: Option<String>,
}

impl Calls<'_> {
    fn handles(&self, count: usize) -> Vec<String> {
        (0..count).map(|index| format!("{}-{index}", self.prefix)).collect()
    }

    /// Whether there was anything to do.
    pub(crate) fn become_many(&mut self, count: usize) -> Result<bool> {
        let all = self.handles(count.max(self.present));
        if count > self.present {
            let new = &all[self.present..];
            self.namespaces(new, true)?;
            none_failed(self.all("ADD", new, 4)?)?;
        } else {
            let old = &all[count..];
            none_failed(self.all("DEL", old, 4)?)?;
            self.namespaces(old, false)?;
        }
        Ok(std::mem::replace(&mut self.present, count) != count)
    }

    /// One at a time: each container comes and goes. Many at once: as many come, then they go.
    pub(crate) fn measured(&self, present: usize, parallel: usize, count: usize) -> Result<[Row; 2]> {
        let mut cpu = [[0.0; 2]; 2];
        let mut elapsed = [Duration::ZERO; 2];
        let handles = self.handles(count);
        let mut calls: [Vec<Call>; 2] = Default::default();
        for group in handles.chunks(TOGETHER) {
            self.namespaces(group, true)?;
            for batch in group.chunks(parallel) {
                interrupt::check()?;
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
            }
            self.namespaces(group, false)?;
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
                to_empty: None,
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
pub(crate) fn call(command: &mut Command, input: &[u8]) -> Result<Call> {
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

impl Times {
    pub(crate) fn of(times: impl Iterator<Item = Duration>) -> Self {
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
