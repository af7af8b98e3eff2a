//! Processes of a lab: started detached from the terminal, known by process id *and* start time, so that
//! nothing is ever signalled that merely got the same number later.

use std::fs::{self, File};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use nix::sys::signal::{Signal, kill};
use nix::sys::wait::{WaitPidFlag, waitpid};
use nix::unistd::Pid;

use crate::netns::{self, Id, Place};

/// A program that runs in the background. Its log and the file that says which process it is outlive the
/// process that started it.
#[derive(Debug, Clone)]
pub struct Daemon {
    pub log: PathBuf,
    record: PathBuf,
}

/// One process: a number alone could mean another one later.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Process {
    pub pid: i32,
    /// Clock ticks after boot (proc(5), field 22 of `stat`).
    started: u64,
}

impl Daemon {
    /// The daemon whose log is `directory/name.log` and whose record is `directory/name.pid`.
    pub fn named(directory: &Path, name: &str) -> Self {
        Self { log: directory.join(format!("{name}.log")), record: directory.join(format!("{name}.pid")) }
    }

    /// Starts it in `place`, appending both outputs to its log. `input`: its standard input, else none.
    pub fn start(&self, place: &Place, mut command: Command, input: Option<Stdio>) -> Result<Process> {
        let log = File::options().create(true).append(true).open(&self.log);
        let log = log.with_context(|| format!("open {}", self.log.display()))?;
        // In a process group of its own: Ctrl-C is for the one who started it.
        command.process_group(0).current_dir("/").stdin(input.unwrap_or_else(Stdio::null));
        command.stdout(log.try_clone()?).stderr(log);
        let program = command.get_program().to_owned();
        let child = place
            .enter(|| command.spawn())?
            .with_context(|| format!("execute {}", Path::new(&program).display()))?;
        let pid = i32::try_from(child.id())?;
        let process = Process::now(pid).with_context(|| format!("process {pid} ended at once"))?;
        fs::write(&self.record, format!("{pid} {}\n", process.started))
            .with_context(|| format!("write {}", self.record.display()))?;
        Ok(process)
    }

    /// The running process, if any.
    pub fn process(&self) -> Option<Process> {
        let record = fs::read_to_string(&self.record).ok()?;
        let (pid, started) = record.trim().split_once(' ')?;
        let process = Process { pid: pid.parse().ok()?, started: started.parse().ok()? };
        process.alive().then_some(process)
    }

    /// Sends a signal and waits until the process is gone; does nothing if it is not running.
    pub fn end(&self, signal: Signal) -> Result<()> {
        let Some(process) = self.process() else { return Ok(()) };
        process.signal(signal);
        let deadline = Instant::now() + Duration::from_secs(20);
        while process.alive() {
            if Instant::now() > deadline {
                bail!("process {} does not end on {signal}; its log: {}", process.pid, self.log.display());
            }
            thread::sleep(Duration::from_millis(2));
        }
        Ok(())
    }

    /// The last lines of its log, for an error message.
    pub fn tail(&self) -> String {
        let text = fs::read_to_string(&self.log).unwrap_or_default();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(12)..].iter().map(|line| format!("    {line}\n")).collect()
    }
}

impl Process {
    /// The process that has this number now.
    pub fn now(pid: i32) -> Option<Self> {
        Some(Self { pid, started: stat(pid)?.started })
    }

    /// Whether any of it still runs: until its last thread has gone, its sockets may be open. Reaped if ours.
    pub fn alive(self) -> bool {
        let Some(now) = stat(self.pid).filter(|now| now.started == self.started) else { return false };
        let over = matches!(now.state, 'Z' | 'X') && now.threads <= 1;
        if over {
            let _ = waitpid(Pid::from_raw(self.pid), Some(WaitPidFlag::WNOHANG));
        }
        !over
    }

    pub fn signal(self, signal: Signal) {
        if self.alive() {
            // Gone meanwhile is as good as signalled.
            let _ = kill(Pid::from_raw(self.pid), signal);
        }
    }

    /// User and system time spent so far, in all threads.
    pub fn cpu_time(self) -> Duration {
        let text = fs::read_to_string(format!("/proc/{}/stat", self.pid)).unwrap_or_default();
        let fields = text.rsplit(')').next().unwrap_or_default().split_whitespace();
        // utime and stime, fields 14 and 15, in units of 1/100 s on every architecture.
        let ticks: u64 = fields.skip(11).take(2).filter_map(|field| field.parse::<u64>().ok()).sum();
        Duration::from_millis(ticks * 10)
    }

    /// Resident memory in KiB: now, and the most there ever was.
    pub fn memory(self) -> Option<(u64, u64)> {
        let text = fs::read_to_string(format!("/proc/{}/status", self.pid)).ok()?;
        let line = |name: &str| {
            let line = text.lines().find_map(|line| line.strip_prefix(name))?;
            line.split_whitespace().next()?.parse().ok()
        };
        Some((line("VmRSS:")?, line("VmHWM:")?))
    }
}

struct Stat {
    state: char,
    threads: u32,
    started: u64,
}

/// Fields 3, 20 and 22 of /proc/PID/stat; the name in the middle may hold anything, `)` included.
fn stat(pid: i32) -> Option<Stat> {
    let text = fs::read_to_string(format!("/proc/{pid}/stat")).ok()?;
    let fields: Vec<&str> = text.rsplit(')').next()?.split_whitespace().collect();
    Some(Stat {
        state: fields.first()?.chars().next()?,
        threads: fields.get(17)?.parse().ok()?,
        started: fields.get(19)?.parse().ok()?,
    })
}

/// Ends every process that is [`inside`] any of `namespaces`: SIGTERM, then SIGKILL after
/// `patience`.
pub fn end_all_in(namespaces: &[Id], patience: Duration) -> Result<()> {
    let start = Instant::now();
    let mut asked: Vec<Process> = Vec::new();
    loop {
        let inside = inside(namespaces);
        // One that ends has left its namespaces before its last thread has closed all that it held.
        if inside.is_empty() && !asked.iter().any(|process| process.alive()) {
            return Ok(());
        }
        let late = start.elapsed() > patience;
        for process in &inside {
            if late {
                process.signal(Signal::SIGKILL);
            } else if !asked.contains(process) {
                process.signal(Signal::SIGTERM);
                asked.push(*process);
            }
        }
        if start.elapsed() > patience + Duration::from_secs(20) {
            bail!("processes do not end on SIGKILL: {inside:?}");
        }
        thread::sleep(Duration::from_millis(5));
    }
}

/// Every process whose network or mount namespace is one of `namespaces`, but the calling one.
pub fn inside(namespaces: &[Id]) -> Vec<Process> {
    let own = std::process::id().cast_signed();
    let Ok(entries) = fs::read_dir("/proc") else { return Vec::new() };
    entries
        .filter_map(|entry| entry.ok()?.file_name().to_str()?.parse::<i32>().ok())
        .filter(|pid| *pid != own)
        .filter(|pid| {
            ["net", "mnt"].iter().any(|kind| {
                netns::id(Path::new(&format!("/proc/{pid}/ns/{kind}")))
                    .is_some_and(|id| namespaces.contains(&id))
            })
        })
        .filter_map(Process::now)
        .filter(|process| process.alive())
        .collect()
}
