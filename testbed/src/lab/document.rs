//! What `lab up` prints: where everything is. Keys and their order are stable; docs/lab.md describes them.

use std::net::{Ipv4Addr, SocketAddrV4};
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::{Lab, namespace};

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
}
