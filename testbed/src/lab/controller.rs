//! A controller of a lab: `weft-controller` on a machine of its own.

use std::net::SocketAddrV4;
use std::path::PathBuf;
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, bail, ensure};
use nix::sys::signal::Signal;
use serde_json::Value;

use crate::interrupt;
use crate::netns::Place;
use crate::pki::{self, IdentityFiles};
use crate::process::Daemon;

#[derive(Debug, Clone)]
pub struct Controller {
    pub name: String,
    pub address: SocketAddrV4,
    pub place: Place,
    pub daemon: Daemon,
    pub directory: PathBuf,
    /// What a client of it needs: the authority's certificate and one of its own.
    pub ca: PathBuf,
    pub client: IdentityFiles,
    pub(crate) programs: PathBuf,
}

impl Controller {
    /// The controller's configuration, read at its next start.
    pub fn config_file(&self) -> PathBuf {
        self.directory.join("weft-controller.json")
    }

    pub fn start(&self) -> Result<()> {
        ensure!(self.daemon.process().is_none(), "{} runs already", self.name);
        let mut command = Command::new(self.programs.join("weft-controller"));
        command.arg("run").arg("--config").arg(self.config_file());
        self.daemon.start(&self.place, command, None).map(drop)
    }

    /// `kill -9`.
    pub fn kill(&self) -> Result<()> {
        self.daemon.end(Signal::SIGKILL)
    }

    /// An orderly end.
    pub fn stop(&self) -> Result<()> {
        self.daemon.end(Signal::SIGTERM)
    }

    pub fn url(&self) -> String {
        format!("https://{}", self.address)
    }

    /// Runs `weft-controller leases` against it, with these further arguments.
    pub fn leases(&self, args: &[&str]) -> Result<String> {
        let path = |path: &PathBuf| path.to_string_lossy().into_owned();
        let program = path(&self.programs.join("weft-controller"));
        let (url, ca) = (self.url(), path(&self.ca));
        let (certificate, key) = (path(&self.client.certificate), path(&self.client.key));
        let mut all = vec!["leases", "--controller", &url, "--server-name", pki::CONTROLLER_NAME];
        all.extend(["--ca", &ca, "--certificate", &certificate, "--key", &key]);
        all.extend(args);
        self.place.run(&program, &all, "")
    }

    /// The lease table as `weft-controller leases --json` gives it.
    pub fn lease_table(&self) -> Result<Value> {
        Ok(serde_json::from_str(&self.leases(&["--json"])?)?)
    }

    /// Waits until it answers.
    pub fn wait_ready(&self, patience: Duration) -> Result<()> {
        let deadline = Instant::now() + patience;
        loop {
            interrupt::check()?;
            let Err(why) = self.leases(&[]) else { return Ok(()) };
            let running = self.daemon.process().is_some();
            if !running || Instant::now() > deadline {
                let state = if running { "does not answer" } else { "has ended" };
                bail!("{} {state}: {why:#}; its log ends:\n{}", self.name, self.daemon.tail());
            }
            thread::sleep(Duration::from_millis(20));
        }
    }
}
