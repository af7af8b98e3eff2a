//! A scratch Postgres server: a real one, on memory or a temporary directory, gone with its value.

use std::fs;
use std::net::{IpAddr, Ipv4Addr, TcpListener};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use nix::sys::signal::Signal;
use nix::unistd::{User, chown};
use serde_json::{Value, json};

use crate::interrupt;
use crate::netns::Place;
use crate::process::Daemon;

/// Name and password of the superuser; also the name of the first database.
pub const USER: &str = "postgres";
pub const PASSWORD: &str = "scratch";

const PATIENCE: Duration = Duration::from_secs(60);

#[derive(Debug)]
pub struct Postgres {
    pub host: IpAddr,
    pub port: u16,
    pub daemon: Daemon,
    place: Place,
    directory: PathBuf,
    /// Removed last.
    temporary: Option<tempfile::TempDir>,
}

impl Postgres {
    /// A server on a free port of the loopback of this thread's network.
    pub fn scratch() -> Result<Self> {
        let temporary = tempfile::tempdir().context("make a temporary directory")?;
        // The server is another user: it has to get through.
        fs::set_permissions(temporary.path(), std::os::unix::fs::PermissionsExt::from_mode(0o755))?;
        let place = Place::at("/proc/thread-self/ns/net".into(), None);
        let free = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).and_then(|listener| listener.local_addr())?;
        let mut postgres = Self::make(&place, temporary.path(), free.ip(), free.port())?;
        postgres.temporary = Some(temporary);
        Ok(postgres)
    }

    /// A server in a place, its files below `directory`.
    pub fn make(place: &Place, directory: &Path, host: IpAddr, port: u16) -> Result<Self> {
        let data = directory.join("data");
        let user = user()?;
        fs::create_dir_all(&data).with_context(|| format!("create {}", data.display()))?;
        chown(&data, Some(user.uid), Some(user.gid)).context("give the data directory to its user")?;
        let password = directory.join("password");
        fs::write(&password, PASSWORD)?;
        let mut initdb = program("initdb")?;
        initdb.args(["--no-sync", "--auth=scram-sha-256", "--username", USER, "--encoding=UTF8"]);
        initdb.arg("--no-locale").arg("--pwfile").arg(&password).arg("--pgdata").arg(&data);
        let output = initdb.output().context("execute initdb")?;
        ensure!(output.status.success(), "initdb: {}", String::from_utf8_lossy(&output.stderr));
        fs::write(data.join("pg_hba.conf"), "host all all 0.0.0.0/0 scram-sha-256\n")?;
        let postgres = Self {
            host,
            port,
            daemon: Daemon::named(directory, "postgres"),
            place: place.clone(),
            directory: data,
            temporary: None,
        };
        postgres.start()?;
        Ok(postgres)
    }

    /// Starts it, also after a [`kill`](Self::kill), and waits until it answers.
    pub fn start(&self) -> Result<()> {
        let deadline = Instant::now() + PATIENCE;
        while !self.answers() {
            interrupt::check()?;
            if Instant::now() > deadline {
                bail!("Postgres does not answer; its log ends:\n{}", self.daemon.tail());
            }
            // One that finds the memory of a killed one still in use ends at once, and is started again.
            if self.daemon.process().is_none() {
                let mut server = program("postgres")?;
                server.arg("-D").arg(&self.directory);
                server.args(["-c", &format!("listen_addresses={}", self.host), "-p", &self.port.to_string()]);
                // A scratch database survives kill -9 of its processes, and need not survive the machine's.
                server.args([
                    "-c",
                    "fsync=off",
                    "-c",
                    "unix_socket_directories=",
                    "-c",
                    "max_connections=200",
                ]);
                self.daemon.start(&self.place, server, None)?;
            }
            thread::sleep(Duration::from_millis(20));
        }
        Ok(())
    }

    /// `kill -9` of the server; what it had committed is there after the next [`start`](Self::start).
    pub fn kill(&self) -> Result<()> {
        self.daemon.end(Signal::SIGKILL)
    }

    /// An orderly end that waits for no client.
    pub fn stop(&self) -> Result<()> {
        self.daemon.end(Signal::SIGINT)
    }

    /// Runs SQL as the superuser in a database; returns what psql prints, unaligned, without headings.
    pub fn sql(&self, database: &str, sql: &str) -> Result<String> {
        let mut psql = self.client("psql")?;
        psql.args(["-XAtq", "-v", "ON_ERROR_STOP=1", "-d", database, "-c", sql]);
        let output = self.place.enter(|| psql.output())?.context("execute psql")?;
        ensure!(output.status.success(), "psql: {}", String::from_utf8_lossy(&output.stderr).trim());
        Ok(String::from_utf8_lossy(&output.stdout).into_owned())
    }

    /// Makes an empty database and returns the controller's `database` property for it.
    pub fn database(&self, name: &str) -> Result<Value> {
        self.sql(USER, &format!("create database \"{name}\""))?;
        Ok(self.config(name))
    }

    /// The controller's `database` property for a database that exists.
    pub fn config(&self, name: &str) -> Value {
        json!({
            "type": "postgres",
            "host": self.host,
            "port": self.port,
            "username": USER,
            "password": PASSWORD,
            "name": name,
        })
    }

    fn answers(&self) -> bool {
        let answer = self.client("pg_isready").and_then(|mut ready| self.place.enter(|| ready.output()));
        matches!(answer, Ok(Ok(output)) if output.status.success())
    }

    fn client(&self, name: &str) -> Result<Command> {
        let mut client = program(name)?;
        client.env("PGPASSWORD", PASSWORD).args(["-h", &self.host.to_string(), "-p", &self.port.to_string()]);
        client.args(["-U", USER]);
        Ok(client)
    }
}

impl Drop for Postgres {
    fn drop(&mut self) {
        // One without a temporary directory is a lab's, and ends with it.
        if self.temporary.is_some()
            && let Err(error) = self.stop()
        {
            eprintln!("scratch Postgres: {error:#}");
        }
    }
}

/// The user that the distribution's package makes; the server refuses to run as root.
fn user() -> Result<User> {
    User::from_name(USER)?.context("there is no user postgres: install the package postgresql")
}

/// A program of the newest Postgres that is installed, to be run as its user.
fn program(name: &str) -> Result<Command> {
    let versions = fs::read_dir("/usr/lib/postgresql").context("install the package postgresql")?;
    let number = |path: &PathBuf| path.file_name().and_then(|name| name.to_str()?.parse::<u32>().ok());
    let newest = versions.flatten().map(|entry| entry.path()).max_by_key(number);
    let newest = newest.context("install the package postgresql")?;
    let user = user()?;
    let mut command = Command::new(newest.join("bin").join(name));
    command.uid(user.uid.as_raw()).gid(user.gid.as_raw()).current_dir("/").env("LC_ALL", "C");
    Ok(command)
}
