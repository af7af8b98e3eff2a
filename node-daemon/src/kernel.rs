//! The kernel, as far as a cell needs it: the only place that speaks netlink.
//!
//! Owns: the VXLAN device, what stands on it for every peer, and the containers' links. Woken by: calls of
//! [`Kernel`]. Emits: how each change went, what is there ([`Kernel::see`]), and that something changed ([`events`]).
//! Decides nothing: what to change is a [`Step`] when it arrives here.
//!
//! ```text
//!  socket    batches of messages, one acknowledgement each; dumps
//!  message   our objects as netlink messages
//!  lay       what a step lays            delete    links away, on threads of their own
//!  see       dumps into what a cell believes
//!  inside    a link's inner end, in the container's namespace      ipv6      IPv6 off, on either end
//!  events    notifications               conntrack connections of a former address
//! ```

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;

use weft_model::address::{DeviceName, OverlayAddr, UnderlayAddr};
use weft_model::cell::{Outcome, Seen, Step, UnderlayDevice};
use weft_model::reason::Reason;

/// Where the inner ends of new links are born: the containers' network namespaces, by container address.
pub type Namespaces = HashMap<OverlayAddr, Arc<OwnedFd>>;

/// What the cell's task asks of a kernel.
pub trait Kernel: Send {
    /// Carries out a step, as far as it goes: a change that fails is reported, the others are carried out.
    ///
    /// A link whose address is in `namespaces` is made anew, its inner end in that namespace and down
    /// ([`inside::lay`] raises it). A link without one is mended from the cell's end.
    fn apply(&mut self, step: &Step, namespaces: &Namespaces) -> impl Future<Output = Outcome> + Send;

    /// What there is. A key that is not named is surely absent.
    fn see(&mut self) -> impl Future<Output = Result<Seen, KernelError>> + Send;

    /// The device that owns the underlay address, or the one of the given name.
    fn underlay(
        &mut self,
        addr: UnderlayAddr,
        named: Option<&DeviceName>,
    ) -> impl Future<Output = Result<UnderlayDevice, KernelError>> + Send;
}

#[derive(Debug, thiserror::Error)]
pub enum KernelError {
    /// Something asked of the kernel, the thing it was asked about, and its answer.
    #[error("{operation} {subject}")]
    Refused {
        operation: &'static str,
        subject: String,
        #[source]
        source: io::Error,
    },
    #[error("no device has the underlay address {0}")]
    NoUnderlay(UnderlayAddr),
    #[error("the thread that speaks to the kernel has ended")]
    Gone,
}

impl KernelError {
    pub fn reason(&self) -> Reason {
        let (operation, subject, why) = match self {
            Self::Refused { operation, subject, source } => {
                ((*operation).to_owned(), subject.clone(), source.to_string())
            }
            Self::NoUnderlay(addr) => (
                "find the underlay device of".to_owned(),
                addr.to_string(),
                "no device has this address".to_owned(),
            ),
            Self::Gone => return Reason::Bug { invariant: self.to_string() },
        };
        Reason::Kernel { operation, subject, why }
    }
}
