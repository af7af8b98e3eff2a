//! A node that does nothing, as the plugin's other end: what is left is the plugin.

use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tokio::runtime::Runtime;
use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::cell::Wanted;
use weft_model::container::Handle;
use weft_model::firewall::explain::Explanation;
use weft_model::link::LinkSpec;
use weft_model::reason::Reason;
use weft_node::api::Socket;
use weft_node::calls::{Calls, Remembered, Valid};
use weft_node::inbox::Question;
use weft_proto::node::StatusResponse;
use weft_testbed::lab::Cell;

use super::calls::call;
use super::lists::List;

/// Answers at once.
#[derive(Clone)]
struct Nothing;

impl Calls for Nothing {
    async fn add(&self, wanted: Wanted, _: OwnedFd) -> Result<LinkSpec, Reason> {
        let addr = OverlayAddr::new([10, 255, 66, 2].into());
        Ok(LinkSpec { addr, handle: wanted.handle, interface: wanted.interface, mtu: 1450 })
    }

    async fn check(&self, _: Remembered, _: OwnedFd) -> Result<(), Reason> {
        Ok(())
    }

    async fn collect(&self, _: Valid) -> Result<(), Reason> {
        Ok(())
    }

    async fn ready(&self) -> Result<(), Reason> {
        Ok(())
    }

    async fn delete(&self, _: Handle, _: DeviceName) -> Result<(), Reason> {
        Ok(())
    }

    async fn explain(&self, _: Question) -> Result<Explanation, Reason> {
        Err(Reason::Starting)
    }

    async fn status(&self) -> StatusResponse {
        StatusResponse::default()
    }
}

pub(super) struct Idle<'a> {
    cell: &'a Cell,
    socket: PathBuf,
    /// Serves as long as it lives.
    _runtime: Runtime,
}

impl<'a> Idle<'a> {
    const HANDLE: &'static str = "idle";

    pub(super) fn start(cell: &'a Cell) -> Result<Self> {
        cell.create_namespace(Self::HANDLE)?;
        let socket = cell.directory.join("idle").join("node.sock");
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build()?;
        let served = runtime.block_on(async { Socket::bind(&socket) }).context("listen as an idle node")?;
        runtime.spawn(served.serve(Nothing, std::future::pending()));
        Ok(Self { cell, socket, _runtime: runtime })
    }

    pub(super) fn add(&self, rules: usize) -> Result<Duration> {
        let mut input = self.cell.add_input(&List::known(rules).request(Self::HANDLE)?)?;
        input["socket"] = Value::String(self.socket.display().to_string());
        let mut command = Command::new(self.cell.plugin_dir().join("weft-cni"));
        command.env_clear().envs(self.cell.environment("ADD", Self::HANDLE));
        // The container's namespace is a file that only the cell sees.
        let input = input.to_string();
        let call = self.cell.place.enter(|| call(&mut command, input.as_bytes()))??;
        ensure!(call.failure.is_none(), "ADD by an idle node: {:?}", call.failure);
        Ok(call.took)
    }
}

impl Drop for Idle<'_> {
    fn drop(&mut self) {
        // The lab goes too.
        let _removed = self.cell.remove_namespace(Self::HANDLE);
    }
}
