//! The kernel, as far as a cell needs it: the only place that speaks netlink.
//!
//! Owns: the VXLAN device, what stands on it for every peer, and the containers' links. Woken by: calls of
//! [`Kernel`]. Emits: how each change went, what is there ([`Kernel::see`]), and that something changed ([`events`]).
//! Decides nothing: what to change is a [`Step`] when it arrives here.
//!
//! ```text
//!  socket    batches of messages, one acknowledgement each; dumps
//!  message   our objects as netlink messages
//!  rules     the firewall's changes, one transaction for a step, or two; and what is in its table
//!  lay       what a step lays            delete    links away, on threads of their own
//!  see       what is there, as a cell believes it         dump      the tables it is read from
//!  shaping   a container's limits
//!  inside    a link's inner end, in the container's namespace      sysctl    what no attribute carries
//!  carrier   when a new link passes packets
//!  events    notifications               conntrack connections of a former address
//!  ruleset_events    notifications on nf_tables          nflog     what rules log
//! ```

mod carrier;
pub mod conntrack;
mod delete;
mod dump;
pub mod events;
pub mod inside;
mod lay;
mod message;
pub mod nflog;
mod rules;
pub mod ruleset_events;
mod see;
mod shaping;
mod socket;
mod sysctl;

use std::collections::{BTreeSet, HashMap};
use std::io;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, mpsc};
use std::thread;

use netlink_sys::protocols::NETLINK_ROUTE;
use tokio::sync::oneshot;
use weft_model::address::{DeviceName, OverlayAddr, UnderlayAddr};
use weft_model::cell::{Outcome, Scope, Seen, Step, UnderlayDevice};
use weft_model::firewall::explain::Route;
use weft_model::reason::Reason;
use weft_model::traffic::Totals;

use delete::Deleters;
use dump::RouteSocket;
pub use dump::Traffic;
use lay::Work;
use rules::RulesSocket;
pub use rules::transactions;
use socket::NetlinkSocket;

/// Where the inner ends of new links are born: the containers' network namespaces, by container address.
pub type Namespaces = HashMap<OverlayAddr, Arc<OwnedFd>>;

/// What the cell's task asks of a kernel.
pub trait Kernel: Send {
    /// Carries out a step, as far as it goes: a change that fails is reported, the others are carried out. Those of the
    /// firewall are carried out together; those that are refused, and those that need them, are left out.
    ///
    /// A link whose address is in `namespaces` is made anew, its inner end in that namespace and down
    /// ([`inside::lay`] raises it). A link without one is mended from the cell's end.
    fn apply(&mut self, step: &Step, namespaces: &Namespaces) -> impl Future<Output = Outcome> + Send;

    /// What there is within a scope. A key that is not named is surely absent.
    fn see(&mut self, scope: Scope) -> impl Future<Output = Result<Seen, KernelError>> + Send;

    /// The numbers by which the cell's network namespace knows others that exist. A container's has its link's
    /// [`index`](weft_model::link::index), unless it had a number before.
    fn namespaces(&mut self) -> impl Future<Output = Result<BTreeSet<u32>, KernelError>> + Send;

    /// The devices that have these addresses; of an address that none has, none.
    fn devices_of(
        &mut self,
        addrs: &[Ipv4Addr],
    ) -> impl Future<Output = Result<BTreeSet<DeviceName>, KernelError>> + Send;

    /// Where the cell's routes lead an address.
    fn route(&mut self, to: Ipv4Addr) -> impl Future<Output = Result<Route, KernelError>> + Send;

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
    #[error("there is no device {0}")]
    NoDevice(DeviceName),
    #[error("the thread that speaks to the kernel has ended")]
    Gone,
}

impl KernelError {
    pub fn reason(&self) -> Reason {
        let find = |subject: String| Self::Refused {
            operation: "find the underlay device of",
            subject,
            source: io::Error::other(self.to_string()),
        };
        match self {
            Self::Refused { operation, subject, source } => Reason::Kernel {
                operation: (*operation).to_owned(),
                subject: subject.clone(),
                why: source.to_string(),
            },
            Self::NoUnderlay(addr) => find(addr.to_string()).reason(),
            Self::NoDevice(name) => find(name.to_string()).reason(),
            Self::Gone => Reason::Bug { invariant: self.to_string() },
        }
    }
}

/// The real kernel, through a thread that owns the sockets: netlink answers within the call, and the cell's own task
/// must not be held up by one that takes longer.
#[derive(Debug)]
pub struct Netlink {
    jobs: mpsc::Sender<Job>,
    rules_port: u32,
}

type Job = Box<dyn FnOnce(&mut Worker) + Send>;

struct Worker {
    socket: RouteSocket,
    rules: RulesSocket,
    deleters: Deleters,
    vtep: DeviceName,
}

impl Netlink {
    /// For the network namespace of the calling thread, with the VXLAN device of this name.
    pub fn open(vtep: DeviceName) -> Result<Self, KernelError> {
        let refused = |source| KernelError::Refused {
            operation: "open a netlink socket for",
            subject: vtep.to_string(),
            source,
        };
        let socket = NetlinkSocket::open(NETLINK_ROUTE, 0).map_err(refused)?;
        let deleters = Deleters::start().map_err(refused)?;
        let rules = RulesSocket::open().map_err(refused)?;
        let rules_port = rules.port();
        let mut worker = Worker { socket, rules, deleters, vtep: vtep.clone() };
        let (jobs, asked) = mpsc::channel::<Job>();
        let work = move || asked.into_iter().for_each(|job| job(&mut worker));
        thread::Builder::new().name("weft-netlink".into()).spawn(work).map_err(refused)?;
        Ok(Self { jobs, rules_port })
    }

    /// Who changes the firewall, as the kernel's notifications name us.
    pub fn rules_port(&self) -> u32 {
        self.rules_port
    }

    async fn ask<T: Send + 'static>(
        &self,
        what: impl FnOnce(&mut Worker) -> T + Send + 'static,
    ) -> Result<T, KernelError> {
        let (answer, answered) = oneshot::channel();
        // Nobody waits for the answer any more if the asking task was cancelled.
        let job: Job = Box::new(move |worker| drop(answer.send(what(worker))));
        self.jobs.send(job).map_err(|_| KernelError::Gone)?;
        answered.await.map_err(|_| KernelError::Gone)
    }
}

impl Kernel for Netlink {
    async fn apply(&mut self, step: &Step, namespaces: &Namespaces) -> Outcome {
        let (mine, namespaces) = (step.clone(), namespaces.clone());
        let done = self.ask(move |worker| worker.work(&namespaces).carry_out(&mine)).await;
        done.unwrap_or_else(|e| {
            let failed = step.changes().map(|change| (change.key.clone(), e.reason())).collect();
            Outcome { failed }
        })
    }

    async fn see(&mut self, scope: Scope) -> Result<Seen, KernelError> {
        let (subject, seen) = match scope {
            Scope::Links => {
                let see = |worker: &mut Worker| see::see(&mut worker.socket, &worker.vtep);
                ("links, routes and neighbours", self.ask(see).await?)
            }
            Scope::Firewall => ("the firewall's table", self.ask(|worker| worker.rules.see()).await?),
        };
        seen.map_err(|source| KernelError::Refused { operation: "read", subject: subject.into(), source })
    }

    async fn namespaces(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        let found = self.ask(|worker| dump::namespaces(&mut worker.socket)).await?;
        found.map_err(|source| KernelError::Refused {
            operation: "read",
            subject: "the numbers of network namespaces".into(),
            source,
        })
    }

    async fn devices_of(&mut self, addrs: &[Ipv4Addr]) -> Result<BTreeSet<DeviceName>, KernelError> {
        let addrs = addrs.to_vec();
        let found = self.ask(move |worker| see::devices_of(&mut worker.socket, &addrs)).await?;
        found.map_err(|source| KernelError::Refused {
            operation: "find the devices of",
            subject: "the underlay's addresses".into(),
            source,
        })
    }

    async fn route(&mut self, to: Ipv4Addr) -> Result<Route, KernelError> {
        let found = self.ask(move |worker| see::route(&mut worker.socket, to)).await?;
        found.map_err(|source| KernelError::Refused {
            operation: "find the route to",
            subject: to.to_string(),
            source,
        })
    }

    async fn underlay(
        &mut self,
        addr: UnderlayAddr,
        named: Option<&DeviceName>,
    ) -> Result<UnderlayDevice, KernelError> {
        let name = named.cloned();
        let refused = |source| KernelError::Refused {
            operation: "find the underlay device of",
            subject: addr.to_string(),
            source,
        };
        let found = self.ask(move |worker| see::underlay(&mut worker.socket, addr, name.as_ref())).await?;
        found.map_err(refused)?.ok_or_else(|| match named {
            Some(name) => KernelError::NoDevice(name.clone()),
            None => KernelError::NoUnderlay(addr),
        })
    }
}

/// Reads what the firewall has counted, on a socket of its own: nothing that changes the cell waits for it.
#[derive(Debug)]
pub struct Counted(RulesSocket);

impl Counted {
    /// For the network namespace of the calling thread.
    pub fn open() -> Result<Self, KernelError> {
        RulesSocket::open().map(Self).map_err(|source| KernelError::Refused {
            operation: "open a netlink socket for",
            subject: "the firewall's counters".into(),
            source,
        })
    }

    /// Blocks for as long as the kernel takes.
    pub fn read(&mut self) -> Result<Totals, KernelError> {
        self.0.totals().map_err(|source| KernelError::Refused {
            operation: "read",
            subject: "the firewall's counters".into(),
            source,
        })
    }
}

/// Reads what devices have carried, on a socket of its own: nothing that changes the cell waits for it.
#[derive(Debug)]
pub struct LinkCounters(RouteSocket);

impl LinkCounters {
    /// For the network namespace of the calling thread.
    pub fn open() -> Result<Self, KernelError> {
        RouteSocket::open(NETLINK_ROUTE, 0).map(Self).map_err(|source| KernelError::Refused {
            operation: "open a netlink socket for",
            subject: "the links' counters".into(),
            source,
        })
    }

    /// All devices, in one dump. Blocks for as long as the kernel takes.
    pub fn read(&mut self) -> Result<Vec<Traffic>, KernelError> {
        dump::traffic(&mut self.0).map_err(|source| KernelError::Refused {
            operation: "read",
            subject: "the links' counters".into(),
            source,
        })
    }
}

impl Worker {
    fn work<'a>(&'a mut self, namespaces: &'a Namespaces) -> Work<'a> {
        let Self { socket, rules, deleters, vtep } = self;
        Work { socket, rules, deleters, vtep, namespaces, outcome: Outcome::default() }
    }
}
