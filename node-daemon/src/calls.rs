//! What the API asks of the cell.

use std::collections::BTreeSet;
use std::os::fd::OwnedFd;

use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::cell::Wanted;
use weft_model::container::Handle;
use weft_model::firewall::explain::Explanation;
use weft_model::link::LinkSpec;
use weft_model::reason::Reason;
use weft_proto::node::StatusResponse;

use crate::inbox::Question;

/// What the caller of a CHECK remembers of its container, as plugins behind this one have left it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Remembered {
    pub handle: Handle,
    pub interface: DeviceName,
    /// None: as the node has it.
    pub addr: Option<OverlayAddr>,
    /// Of the container's end; none: as the node has it.
    pub mtu: Option<u32>,
    pub default_route: bool,
}

/// The containers of a network that its runtime knows: CNI_CONTAINERID and CNI_IFNAME.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Valid {
    pub network: String,
    pub attachments: BTreeSet<(String, String)>,
}

impl Valid {
    /// Whether it ends a container of that network.
    pub fn ends(&self, network: &str, handle: &Handle, interface: &DeviceName) -> bool {
        network == self.network && !self.attachments.contains(&(handle.to_string(), interface.to_string()))
    }
}

/// The calls of `node.proto`, decoded. The daemon's implementation is the handle of the inbox.
pub trait Calls: Clone + Send + Sync + 'static {
    /// Gives the container an address and lays its link; `namespace` is the container's.
    fn add(
        &self,
        wanted: Wanted,
        namespace: OwnedFd,
    ) -> impl Future<Output = Result<LinkSpec, Reason>> + Send;

    /// Whether all that ADD laid is still there.
    fn check(
        &self,
        remembered: Remembered,
        namespace: OwnedFd,
    ) -> impl Future<Output = Result<(), Reason>> + Send;

    /// Done when the link is gone. Deleting what is not there succeeds, and so it does for another interface than the
    /// container has.
    fn delete(
        &self,
        handle: Handle,
        interface: DeviceName,
    ) -> impl Future<Output = Result<(), Reason>> + Send;

    /// Deletes what is not valid, as far as that goes; done when the links are gone.
    fn collect(&self, valid: Valid) -> impl Future<Output = Result<(), Reason>> + Send;

    /// Whether a container could be added now.
    fn ready(&self) -> impl Future<Output = Result<(), Reason>> + Send;

    /// What becomes of a packet, by the program that the kernel holds.
    fn explain(&self, question: Question) -> impl Future<Output = Result<Explanation, Reason>> + Send;

    fn status(&self) -> impl Future<Output = StatusResponse> + Send;
}
