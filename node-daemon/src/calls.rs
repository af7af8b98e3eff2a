//! What the API asks of the cell.

use std::os::fd::OwnedFd;

use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::cell::Wanted;
use weft_model::container::Handle;
use weft_model::firewall::explain::Explanation;
use weft_model::link::LinkSpec;
use weft_model::reason::Reason;
use weft_proto::node::StatusResponse;

use crate::inbox::Question;

/// The calls of `node.proto`, decoded. The daemon's implementation is the handle of the inbox.
pub trait Calls: Clone + Send + Sync + 'static {
    /// Gives the container an address and lays its link; `namespace` is the container's.
    fn add(
        &self,
        wanted: Wanted,
        namespace: OwnedFd,
    ) -> impl Future<Output = Result<LinkSpec, Reason>> + Send;

    /// Whether all that ADD laid is still there. `addr`: as the caller remembers it.
    fn check(
        &self,
        handle: Handle,
        interface: DeviceName,
        addr: Option<OverlayAddr>,
        namespace: OwnedFd,
    ) -> impl Future<Output = Result<(), Reason>> + Send;

    /// Done when the link is gone. Deleting what is not there succeeds.
    fn delete(
        &self,
        handle: Handle,
        interface: DeviceName,
    ) -> impl Future<Output = Result<(), Reason>> + Send;

    /// What becomes of a packet, by the program that the kernel holds.
    fn explain(&self, question: Question) -> impl Future<Output = Result<Explanation, Reason>> + Send;

    fn status(&self) -> impl Future<Output = StatusResponse> + Send;
}
