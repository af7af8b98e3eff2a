//! A cell of a lab: a machine with its own network and mounts, and `weft-node` on it.

use std::net::Ipv4Addr;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::interrupt;
use crate::netns::Place;
use crate::process::Daemon;

#[derive(Debug, Clone)]
pub struct Cell {
    pub name: String,
    pub underlay: Ipv4Addr,
    pub place: Place,
    pub node: Daemon,
    /// The node's Unix socket.
    pub socket: PathBuf,
    /// Where the cell's files are: configuration, state, logs, container namespaces.
    pub directory: PathBuf,
    /// Where the programs are.
    pub(crate) programs: PathBuf,
}

impl Cell {
    /// The node's configuration, read at its next start.
    pub fn config_file(&self) -> PathBuf {
        self.directory.join("weft-node.json")
    }

    /// What the firewall of the cell decided, line by line.
    pub fn traffic_log(&self) -> PathBuf {
        self.directory.join("logs/traffic.log")
    }

    pub fn start_node(&self) -> Result<()> {
        ensure!(self.node.process().is_none(), "the node of {} runs already", self.name);
        let mut command = Command::new(self.programs.join("weft-node"));
        command.arg("run").arg("--config").arg(self.config_file());
        self.node.start(&self.place, command, None).map(drop)
    }

    /// `kill -9`.
    pub fn kill_node(&self) -> Result<()> {
        self.node.end(Signal::SIGKILL)
    }

    /// An orderly end.
    pub fn stop_node(&self) -> Result<()> {
        self.node.end(Signal::SIGTERM)
    }

    /// What `weft-node status --json` says.
    pub fn status(&self) -> Result<Value> {
        let output = Command::new(self.programs.join("weft-node"))
            .args(["status", "--json", "--socket"])
            .arg(&self.socket)
            .output()
            .context("execute weft-node status")?;
        // It fails while the node is not ready, but says the same.
        ensure!(!output.stdout.is_empty(), "{}", String::from_utf8_lossy(&output.stderr).trim());
        serde_json::from_slice(&output.stdout).context("read the status document")
    }

    /// Its own address on the overlay, once it has a lease.
    pub fn overlay(&self) -> Result<Ipv4Addr> {
        let status = self.status()?;
        let subnet = status["subnet"].as_str().unwrap_or_default();
        let (addr, _) = subnet.split_once('/').context("no lease yet")?;
        Ok(addr.parse()?)
    }

    /// Waits until the node takes ADDs, unless it is one without containers, and knows that many other cells.
    pub fn wait_ready(&self, peers: usize, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            interrupt::check()?;
            let why = match self.status() {
                Ok(status) => match (not_ready(&status), status["peers"].as_array().map_or(0, Vec::len)) {
                    ("", known) if known >= peers => return Ok(()),
                    ("", known) => format!("it knows {known} of {peers} other cells"),
                    (reason, _) => reason.to_owned(),
                },
                Err(error) => format!("{error:#}"),
            };
            let running = self.node.process().is_some();
            if !running || Instant::now() > deadline {
                let state = if running { "is not ready" } else { "has ended" };
                bail!("weft-node of {} {state}: {why}; its log ends:\n{}", self.name, self.node.tail());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}

fn not_ready(status: &Value) -> &str {
    // A single address is for no container.
    if status["subnet"].as_str().is_some_and(|subnet| subnet.ends_with("/32")) {
        return "";
    }
    status["not_ready"].as_str().unwrap_or_default()
}
