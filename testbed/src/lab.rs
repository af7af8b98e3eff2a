//! A lab: cells and controllers as network namespaces on an underlay of their own, running the real programs.
//! Made by [`Lab::up`], found again by [`Lab::open`], gone with [`Lab::down`] or, unless it was left standing,
//! with the value. docs/lab.md is its manual.
//!
//! ```text
//!  underlay namespace:  bridge 10.0.0.1/16 ── (Postgres listens here)
//!      │eth0 10.0.1.1         │eth0 10.0.2.1        │eth0 10.0.2.2
//!   controller1             cell1 (own mounts)    cell2 (own mounts)
//! ```

mod cell;
mod claim;
mod controller;

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value, json};

use crate::interrupt;
use crate::netns::Place;
use crate::pki::{self, Authority, IdentityFiles};
use crate::process::Daemon;

pub use cell::Cell;
use claim::Claim;
pub use claim::names;
pub use controller::Controller;

/// Bytes of the largest IP packet on the underlay.
pub const UNDERLAY_MTU: u32 = 1500;
const BRIDGE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
const CONTROLLERS: Ipv4Addr = Ipv4Addr::new(10, 0, 1, 0);
const CELLS: Ipv4Addr = Ipv4Addr::new(10, 0, 2, 0);
const CONTROLLER_PORT: u16 = 4103;
/// How long a program may take until it is ready; an initdb on a busy machine is the longest.
const PATIENCE: Duration = Duration::from_secs(60);

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
    /// Say on standard error what is being done.
    pub progress: bool,
    /// Properties that replace or complete those of every controller.
    pub controller: Map<String, Value>,
    /// Properties that replace or complete those of every node.
    pub node: Map<String, Value>,
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
            progress: false,
            controller: Map::new(),
            node: Map::new(),
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
    pub directory: PathBuf,
    /// The right to remove it; none in a value that was only opened.
    claim: Option<Claim>,
}

/// What `lab up` prints, in this order; docs/lab.md describes it.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Document {
    pub cells: Vec<CellEntry>,
    pub controllers: Vec<ControllerEntry>,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CellEntry {
    pub name: String,
    pub network_namespace: PathBuf,
    pub mount_namespace: PathBuf,
    pub underlay: Ipv4Addr,
    pub socket: PathBuf,
    pub plugin_dir: PathBuf,
    pub conflist: PathBuf,
    pub logs: PathBuf,
}

#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ControllerEntry {
    pub name: String,
    pub address: SocketAddrV4,
    pub ca: PathBuf,
    pub certificate: PathBuf,
    pub key: PathBuf,
    pub log: PathBuf,
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
        if claim::is_standing(name) {
            bail!("a lab named {name} is up already: take it down first, or choose another --name");
        }
        Self::sweep()?;
        let Some(claim) = Claim::take(name)? else {
            bail!("another process is making, using or removing a lab named {name}");
        };
        ensure!(!claim.directory.exists(), "a lab named {name} was just made by another process");
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

    pub fn document(&self) -> Document {
        let cells = self.cells.iter().map(|cell| CellEntry {
            name: cell.name.clone(),
            network_namespace: namespace(&self.directory, &cell.name, "net"),
            mount_namespace: namespace(&self.directory, &cell.name, "mnt"),
            underlay: cell.underlay,
            socket: cell.socket.clone(),
            plugin_dir: cell.plugin_dir(),
            conflist: cell.conflist(),
            logs: cell.directory.join("logs"),
        });
        let controllers = self.controllers.iter().map(|controller| ControllerEntry {
            name: controller.name.clone(),
            address: controller.address,
            ca: controller.ca.clone(),
            certificate: controller.client.certificate.clone(),
            key: controller.client.key.clone(),
            log: controller.daemon.log.clone(),
        });
        Document { cells: cells.collect(), controllers: controllers.collect() }
    }

    /// Every WARN or ERROR line in any log of the lab's daemons, except those that contain one of `expected`.
    /// A system that does what it should says nothing of the kind.
    pub fn complaints(&self, expected: &[&str]) -> Vec<String> {
        let nodes = self.cells.iter().map(|cell| (&cell.name, &cell.node));
        let controllers = self.controllers.iter().map(|controller| (&controller.name, &controller.daemon));
        let mut complaints = Vec::new();
        for (name, daemon) in nodes.chain(controllers) {
            let log = fs::read_to_string(&daemon.log).unwrap_or_default();
            let loud = log.lines().filter(|line| is_loud(line));
            let unexpected = loud.filter(|line| !expected.iter().any(|text| line.contains(text)));
            complaints.extend(unexpected.map(|line| format!("{name}: {line}")));
        }
        complaints
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
            claim: None,
            directory,
        }
    }

    fn build(&self, options: &Options) -> Result<()> {
        let say = |text: &str| {
            if options.progress {
                eprintln!("lab: {text}");
            }
        };
        say("namespaces, underlay, certificates");
        self.make_underlay()?;
        self.make_files(options)?;
        let database: Option<Value> = match options.store {
            Store::Sqlite => None,
            Store::Postgres => {
                bail!("postgres: to come")
            }
        };
        say(&format!("{} controller(s), {} cell(s)", self.controllers.len(), self.cells.len()));
        for controller in &self.controllers {
            let mut config = controller.config();
            config.extend(database.clone().map(|database| ("database".to_owned(), database)));
            config.extend(options.controller.clone());
            write_json(&controller.config_file(), &config.into())?;
            controller.start()?;
        }
        // A node retries by itself, and complains: a lab that comes up as it should has nothing to complain of.
        for controller in &self.controllers {
            controller.wait_ready(PATIENCE)?;
        }
        for cell in &self.cells {
            interrupt::check()?;
            let mut config = cell.config(&self.controllers, &self.directory.join("pki/ca.pem"));
            config.extend(options.node.clone());
            write_json(&cell.config_file(), &config.into())?;
            cell.start_node()?;
        }
        for cell in &self.cells {
            cell.wait_ready(self.cells.len() - 1, PATIENCE)?;
        }
        say("ready");
        Ok(())
    }

    fn make_underlay(&self) -> Result<()> {
        let namespaces = self.directory.join("namespaces");
        fs::create_dir(&namespaces).with_context(|| format!("create {}", namespaces.display()))?;
        let create = |name: &str, mounts: bool| {
            interrupt::check()?;
            let mounts = mounts.then(|| namespace(&self.directory, name, "mnt"));
            Place::create(namespace(&self.directory, name, "net"), mounts)
        };
        create("underlay", false)?.ip(&format!(
            "link add bridge type bridge\naddr add {BRIDGE}/16 dev bridge\nlink set bridge up\n"
        ))?;
        for controller in &self.controllers {
            let place = create(&controller.name, false)?;
            self.plug_in(&controller.name, *controller.address.ip(), &place)?;
        }
        for cell in &self.cells {
            let place = create(&cell.name, true)?;
            self.plug_in(&cell.name, cell.underlay, &place)?;
        }
        Ok(())
    }

    /// Joins a machine to the bridge by its `eth0`.
    fn plug_in(&self, name: &str, address: Ipv4Addr, place: &Place) -> Result<()> {
        let network = namespace(&self.directory, name, "net");
        self.underlay.ip(&format!(
            "link add {name} mtu {UNDERLAY_MTU} type veth peer name eth0 mtu {UNDERLAY_MTU} netns {}\n\
             link set {name} master bridge up\n",
            network.display()
        ))?;
        place.ip(&format!("addr add {address}/16 dev eth0\nlink set eth0 up\n"))
    }

    fn make_files(&self, options: &Options) -> Result<()> {
        let make = |directory: PathBuf| {
            fs::create_dir_all(&directory).with_context(|| format!("create {}", directory.display()))
        };
        let pki = self.directory.join("pki");
        make(pki.clone())?;
        let authority = Authority::new(&format!("lab {}", self.name))?;
        authority.write(&pki.join("ca.pem"))?;
        authority.node()?.write(&pki, "client")?;
        for controller in &self.controllers {
            make(controller.directory.join("state"))?;
            let identity = authority.controller((*controller.address.ip()).into())?;
            identity.write(&controller.directory, "identity")?;
        }
        for cell in &self.cells {
            for directory in
                ["logs", "run", "state", "cni/config", "cni/plugins", "cni/results", "containers"]
            {
                make(cell.directory.join(directory))?;
            }
            authority.node()?.write(&cell.directory, "identity")?;
            cell.install_plugin()?;
        }
        let saved = Saved {
            programs: options.programs.clone(),
            cells: options.cells,
            controllers: options.controllers,
        };
        write_json(&self.directory.join("lab.json"), &serde_json::to_value(saved)?)
    }
}

impl Drop for Lab {
    fn drop(&mut self) {
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

impl Controller {
    fn config(&self) -> Map<String, Value> {
        object(json!({
            "listen": self.address,
            "ca_file": self.ca,
            "certificate_file": self.directory.join("identity.pem"),
            "key_file": self.directory.join("identity.key"),
            "network": "10.255.0.0/16",
            "subnet_prefix_length": 24,
            "state_directory": self.directory.join("state"),
            "cell_certificate_name": pki::NODE_NAME,
            // An empty database is a new one here, not a lost one.
            "reconcile_seconds": 0,
            "health_address": "127.0.0.1:4104",
        }))
    }
}

impl Cell {
    fn config(&self, controllers: &[Controller], ca: &Path) -> Map<String, Value> {
        object(json!({
            "cell_id": self.name,
            "underlay_ip": self.underlay,
            "overlay_network": "10.255.0.0/16",
            "controllers": controllers.iter().map(Controller::url).collect::<Vec<_>>(),
            "controller_name": pki::CONTROLLER_NAME,
            "ca_file": ca,
            "certificate_file": self.directory.join("identity.pem"),
            "key_file": self.directory.join("identity.key"),
            "state_directory": self.directory.join("state"),
            "socket": self.socket,
            // Containers reach each other without policies.
            "disable_container_network_policy": true,
            "health_address": "127.0.0.1:4105",
        }))
    }
}

fn object(value: Value) -> Map<String, Value> {
    match value {
        Value::Object(map) => map,
        _ => Map::new(),
    }
}

fn write_json(file: &Path, value: &Value) -> Result<()> {
    let text = format!("{value:#}\n");
    fs::write(file, text).with_context(|| format!("write {}", file.display()))
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
