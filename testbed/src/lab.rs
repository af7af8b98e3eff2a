//! A lab: cells and controllers as network namespaces on an underlay of their own, running the real programs.
//! Made by [`Lab::up`], found again by [`Lab::open`], gone with [`Lab::down`] or, unless it was left standing,
//! with the value. docs/lab.md is its manual.
//!
//! ```text
//!  underlay namespace:  bridge 10.0.0.1/16 (Postgres), 10.0.0.2 (policy server)
//!      │eth0 10.0.1.1         │eth0 10.0.2.1        │eth0 10.0.2.2
//!   controller1             cell1 (own mounts)    cell2 (own mounts)
//! ```

mod build;
mod cell;
mod claim;
mod controller;
mod document;

use std::collections::BTreeMap;
use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::netns::Place;
use crate::pki::IdentityFiles;
use crate::policy_server::PolicyServer;
use crate::postgres::Postgres;
use crate::process::Daemon;

pub use cell::Cell;
use claim::Claim;
pub use claim::names;
pub use controller::Controller;
pub use document::{CellEntry, ControllerEntry, Document};

/// Bytes of the largest IP packet on the underlay.
pub const UNDERLAY_MTU: u32 = 1500;
const CONTROLLERS: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 0);
const CELLS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);
const CONTROLLER_PORT: u16 = 4103;

/// Where the controllers keep leases.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum)]
pub enum Store {
    /// Embedded: one controller only.
    Sqlite,
    /// A scratch Postgres that all controllers share.
    Postgres,
}

/// What to make. Start from [`Options::named`].
#[derive(Debug, Clone)]
pub struct Options {
    pub name: String,
    pub cells: u32,
    pub controllers: u32,
    pub store: Store,
    /// The directory of `weft-controller`, `weft-node`, `weft-cni` and `lab`.
    pub programs: PathBuf,
    /// Run a policy server, within this process and as long as the value, on 10.0.0.2.
    pub policy_server: bool,
    /// Say on standard error what is being done.
    pub progress: bool,
    /// Properties that replace or complete those of every controller.
    pub controller: Map<String, Value>,
    /// Properties that replace or complete those of every node.
    pub node: Map<String, Value>,
    /// The same for the node of one cell, by the cell's name.
    pub only: BTreeMap<String, Map<String, Value>>,
    /// Keys that replace or complete those of the plugin in every cell's conflist: `dns_servers`, …
    pub plugin: Map<String, Value>,
}

impl Options {
    /// Two cells, one controller, the embedded store, programs where `scripts/build` put them.
    pub fn named(name: impl Into<String>) -> Result<Self> {
        Ok(Self {
            name: name.into(),
            cells: 2,
            controllers: 1,
            store: Store::Sqlite,
            programs: programs()?,
            policy_server: false,
            progress: false,
            controller: Map::new(),
            node: Map::new(),
            only: BTreeMap::new(),
            plugin: Map::new(),
        })
    }

    /// As [`Options::named`], under a name that no other process uses: for tests.
    pub fn unique(purpose: &str) -> Result<Self> {
        Self::named(format!("{purpose}-{}", std::process::id()))
    }
}

/// The programs' directory: `WEFT_BIN_DIR`, or beside or above this program.
pub fn programs() -> Result<PathBuf> {
    if let Some(directory) = std::env::var_os("WEFT_BIN_DIR") {
        return Ok(directory.into());
    }
    let own = std::env::current_exe().context("find this program")?;
    own.ancestors()
        .skip(1)
        .flat_map(|directory| [directory.to_owned(), directory.join("bin")])
        .find(|directory| directory.join("weft-node").is_file() && directory.join("weft-cni").is_file())
        .context("weft-node and weft-cni are not beside this program: run scripts/build, or set WEFT_BIN_DIR")
}

/// A lab that is up.
#[derive(Debug)]
pub struct Lab {
    pub name: String,
    pub cells: Vec<Cell>,
    pub controllers: Vec<Controller>,
    /// The namespace of the bridge, and of Postgres.
    pub underlay: Place,
    /// The controllers' store, if that is what was asked for; none in a lab that was only opened.
    pub postgres: Option<Postgres>,
    /// If that is what was asked for; none in a lab that was only opened.
    pub policy_server: Option<PolicyServer>,
    pub directory: PathBuf,
    /// The right to remove it; none in a value that was only opened.
    claim: Option<Claim>,
}

impl Lab {
    /// Makes a lab and waits until every node is ready and knows every other. Whatever was made is removed if
    /// that fails or is interrupted. Removes what dead processes left behind, under any name, first.
    pub fn up(options: &Options) -> Result<Self> {
        let claim = Self::claim(options)?;
        claim.mount()?;
        let mut lab = Self::layout(&options.name, &options.programs, options.cells, options.controllers);
        lab.claim = Some(claim);
        // From here on an error drops the value, and with it everything.
        lab.build(options)?;
        Ok(lab)
    }

    fn claim(options: &Options) -> Result<Claim> {
        let name = &options.name;
        ensure!(options.cells >= 1 && options.cells <= 1000, "a lab has 1 to 1000 cells");
        ensure!(options.controllers >= 1 && options.controllers <= 100, "a lab has 1 to 100 controllers");
        ensure!(
            options.controllers == 1 || options.store == Store::Postgres,
            "several controllers need a store that they share: --store postgres"
        );
        for program in ["weft-controller", "weft-node", "weft-cni", "lab"] {
            let file = options.programs.join(program);
            ensure!(
                file.is_file(),
                "{} is not there: run scripts/build, or set WEFT_BIN_DIR",
                file.display()
            );
        }
        Self::sweep()?;
        let Some(claim) = Claim::take(name)? else {
            bail!("another process is making, using or removing a lab named {name}");
        };
        ensure!(
            !claim::is_standing(name),
            "a lab named {name} is up already: take it down first, or choose another --name"
        );
        claim.clear()?;
        Ok(claim)
    }

    /// A lab that is up, by its name.
    pub fn open(name: &str) -> Result<Self> {
        let directory = claim::directory(name);
        let file = directory.join("lab.json");
        let text = fs::read(&file).with_context(|| format!("no lab named {name} is up"))?;
        let saved: Saved =
            serde_json::from_slice(&text).with_context(|| format!("read {}", file.display()))?;
        Ok(Self::layout(name, &saved.programs, saved.cells, saved.controllers))
    }

    /// Removes the lab of that name, or what is left of it; returns whether there was anything.
    pub fn remove(name: &str) -> Result<bool> {
        let Some(claim) = Claim::take(name)? else {
            bail!("another process is making, using or removing the lab named {name}");
        };
        let there = claim.directory.exists();
        claim.remove()?;
        Ok(there)
    }

    /// Removes what dead processes left behind, under any name. Labs that stand, or are held, stay.
    pub fn sweep() -> Result<()> {
        for swept in claim::sweep()? {
            eprintln!("lab: removed what was left of lab {swept}");
        }
        Ok(())
    }

    /// Ends and removes everything.
    pub fn down(mut self) -> Result<()> {
        self.policy_server = None;
        match self.claim.take() {
            Some(claim) => claim.remove(),
            None => Self::remove(&self.name).map(drop),
        }
    }

    /// Lets the lab outlive this process; [`Lab::open`] finds it again.
    pub fn leave_standing(mut self) -> Result<()> {
        if let Some(claim) = &self.claim {
            claim.leave_standing()?;
        }
        self.claim = None;
        Ok(())
    }

    pub fn cell(&self, name: &str) -> Result<&Cell> {
        let names = || self.cells.iter().map(|cell| cell.name.as_str()).collect::<Vec<_>>().join(", ");
        self.cells
            .iter()
            .find(|cell| cell.name == name)
            .with_context(|| format!("no cell named {name} in lab {} (it has {})", self.name, names()))
    }

    /// A cell, a controller, `underlay`, or `CELL/HANDLE` for a container.
    pub fn place(&self, name: &str) -> Result<Place> {
        if let Some((cell, handle)) = name.split_once('/') {
            return Ok(self.cell(cell)?.container_place(handle));
        }
        if name == "underlay" {
            return Ok(self.underlay.clone());
        }
        let controller = self.controllers.iter().find(|controller| controller.name == name);
        controller
            .map_or_else(|| self.cell(name).map(|cell| cell.place.clone()), |found| Ok(found.place.clone()))
    }

    /// Every refusal is told at once. They are ICMP messages, and the kernel sends few of those in a second to one peer.
    pub fn tell_all_refusals(&self) -> Result<()> {
        self.set_on_cells(&["net.ipv4.icmp_ratelimit=0"])
    }

    /// Dozens of refusals at once as well: to all peers together the kernel sends no more than about fifty. An error on an older
    /// kernel, which has that limit outside the cells' namespaces.
    pub fn tell_bursts_of_refusals(&self) -> Result<()> {
        self.set_on_cells(&["net.ipv4.icmp_msgs_per_sec=1000000", "net.ipv4.icmp_msgs_burst=1000000"])
    }

    fn set_on_cells(&self, settings: &[&str]) -> Result<()> {
        let write = [&["-q", "-w"], settings].concat();
        self.cells.iter().try_for_each(|cell| cell.place.run("sysctl", &write, "").map(drop))
    }

    /// Every WARN or ERROR line in any log of the lab's daemons, except those that contain one of `expected`.
    /// A system that does what it should says nothing of the kind.
    pub fn complaints(&self, expected: &[&str]) -> Vec<String> {
        let mut complaints = Vec::new();
        for (name, daemon) in self.daemons() {
            let log = fs::read_to_string(&daemon.log).unwrap_or_default();
            let loud = log.lines().filter(|line| is_loud(line));
            let unexpected = loud.filter(|line| !expected.iter().any(|text| line.contains(text)));
            complaints.extend(unexpected.map(|line| format!("{name}: {line}")));
        }
        complaints
    }

    fn daemons(&self) -> impl Iterator<Item = (&String, &Daemon)> {
        let nodes = self.cells.iter().map(|cell| (&cell.name, &cell.node));
        nodes.chain(self.controllers.iter().map(|controller| (&controller.name, &controller.daemon)))
    }

    /// Where everything is: the same function for a lab to be made and for one that is found again.
    fn layout(name: &str, programs: &Path, cells: u32, controllers: u32) -> Self {
        let directory = claim::directory(name);
        let place = |name: &str| Place::at(namespace(&directory, name, "net"), None);
        let pki = directory.join("pki");
        let client = IdentityFiles { certificate: pki.join("client.pem"), key: pki.join("client.key") };
        let controllers = (1..=controllers).map(|index| {
            let name = format!("controller{index}");
            let own = directory.join(&name);
            Controller {
                address: SocketAddrV4::new(nth(CONTROLLERS, index), CONTROLLER_PORT),
                place: place(&name),
                daemon: Daemon::named(&own, "weft-controller"),
                directory: own,
                ca: pki.join("ca.pem"),
                client: client.clone(),
                programs: programs.to_owned(),
                name,
            }
        });
        let cells = (1..=cells).map(|index| {
            let name = format!("cell{index}");
            let own = directory.join(&name);
            let mounts = namespace(&directory, &name, "mnt");
            Cell {
                underlay: nth(CELLS, index),
                place: Place::at(namespace(&directory, &name, "net"), Some(mounts)),
                node: Daemon::named(&own.join("logs"), "weft-node"),
                socket: own.join("run/node.sock"),
                directory: own,
                programs: programs.to_owned(),
                name,
            }
        });
        Self {
            name: name.to_owned(),
            controllers: controllers.collect(),
            cells: cells.collect(),
            underlay: place("underlay"),
            postgres: None,
            policy_server: None,
            claim: None,
            directory,
        }
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
        if std::thread::panicking() {
            for (name, daemon) in self.daemons() {
                eprintln!("the last that {name} said:\n{}", daemon.tail());
            }
        }
        // Its socket would keep the namespace.
        self.policy_server = None;
        if let Some(claim) = self.claim.take()
            && let Err(error) = claim.remove()
        {
            eprintln!("lab: cannot remove lab {}: {error:#}", self.name);
        }
    }
}

/// What [`Lab::open`] needs to know.
#[derive(Debug, Serialize, Deserialize)]
struct Saved {
    programs: PathBuf,
    cells: u32,
    controllers: u32,
}

fn namespace(directory: &Path, name: &str, kind: &str) -> PathBuf {
    directory.join("namespaces").join(format!("{name}.{kind}"))
}

fn nth(base: Ipv4Addr, index: u32) -> Ipv4Addr {
    Ipv4Addr::from(u32::from(base) + index)
}

/// Levels as both of the daemons' log formats write them.
fn is_loud(line: &str) -> bool {
    let word = line.split_whitespace().nth(1);
    matches!(word, Some("WARN" | "ERROR"))
        || line.contains(r#""level":"WARN"#)
        || line.contains(r#""level":"ERROR"#)
}
