//! What every bench says of the machine that it runs on, and how it ends.

use std::fmt;
use std::process::ExitCode;
use std::thread;

use anyhow::Result;
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

impl fmt::Display for Machine {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { cores, kernel, load_before } = self;
        write!(f, "{cores} cores, Linux {kernel}, load before {load_before:.2}")
    }
}

pub(crate) fn exit(done: Result<()>) -> ExitCode {
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// The machine's load average over a minute: a figure taken on a busy machine is another figure.
fn load() -> f64 {
    let text = std::fs::read_to_string("/proc/loadavg").unwrap_or_default();
    text.split(' ').next().and_then(|word| word.parse().ok()).unwrap_or_default()
}

pub(crate) fn progress(text: &str) {
    eprintln!("bench: {text}");
}
