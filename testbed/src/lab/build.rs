//! How a lab is made, step by step: namespaces and underlay, files, store, controllers, nodes.

use std::fs;
use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use serde_json::{Map, Value, json};

use super::{Cell, Controller, Lab, Options, Saved, Store, UNDERLAY_MTU, namespace};
use crate::interrupt;
use crate::netns::Place;
use crate::pki::{self, Authority};
use crate::policy_server::{self, PolicyServer};
use crate::postgres::Postgres;

const BRIDGE: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 1);
/// A second address of the bridge.
const POLICY_SERVER: Ipv4Addr = Ipv4Addr::new(10, 0, 0, 2);
/// How long a program may take until it is ready; an initdb on a busy machine is the longest.
const PATIENCE: Duration = Duration::from_secs(60);

impl Lab {
    pub(super) fn build(&mut self, options: &Options) -> Result<()> {
        let say = |text: &str| {
            if options.progress {
                eprintln!("lab: {text}");
            }
        };
        say("namespaces, underlay, certificates");
        self.make_underlay()?;
        self.make_files(options)?;
        if options.store == Store::Postgres {
            say("a scratch Postgres");
            let directory = self.directory.join("postgres");
            self.postgres = Some(Postgres::make(&self.underlay, &directory, BRIDGE.into(), 5432)?);
        }
        if options.policy_server {
            say("a policy server");
            let address = SocketAddrV4::new(POLICY_SERVER, policy_server::PORT);
            let files = policy_server::Files::at(&self.directory.join("pki"));
            self.policy_server = Some(PolicyServer::make(&self.underlay, address, files)?);
        }
        let database = self.postgres.as_ref().map(|postgres| postgres.database("weft")).transpose()?;
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
            if let Some(server) = &self.policy_server {
                let client = &server.files.client;
                config.insert("policy_server".into(), server.url().into());
                config.insert("policy_server_ca_file".into(), json!(server.files.ca));
                config.insert("policy_server_certificate_file".into(), json!(client.certificate));
                config.insert("policy_server_key_file".into(), json!(client.key));
            }
            config.extend(options.node.clone());
            config.extend(options.only.get(&cell.name).cloned().unwrap_or_default());
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
            "link add bridge type bridge\naddr add {BRIDGE}/16 dev bridge\naddr add {POLICY_SERVER}/16 dev bridge\nlink set bridge up\n"
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
        authority.policy_server(POLICY_SERVER.into())?.write(&pki, "policy-server")?;
        for controller in &self.controllers {
            make(controller.directory.join("state"))?;
            let identity = authority.controller((*controller.address.ip()).into())?;
            identity.write(&controller.directory, "identity")?;
        }
        for cell in &self.cells {
            for directory in ["logs", "state", "cni/config", "cni/plugins", "cni/results", "containers"] {
                make(cell.directory.join(directory))?;
            }
            authority.node()?.write(&cell.directory, "identity")?;
            cell.install_plugin(&options.plugin)?;
        }
        let saved = Saved {
            programs: options.programs.clone(),
            cells: options.cells,
            controllers: options.controllers,
        };
        write_json(&self.directory.join("lab.json"), &serde_json::to_value(saved)?)
    }
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
            "traffic_log_file": self.traffic_log(),
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
