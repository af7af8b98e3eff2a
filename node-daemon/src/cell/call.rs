//! What calls need beside a wave: the inner end of a new link, the look of a CHECK, and explanations.

use std::os::fd::OwnedFd;
use std::sync::Arc;

use tracing::{Level, error, info, warn};
use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::cell::{Belief, Dropped, Key, Object, OverlayIngress, Presence, Scope};
use weft_model::container::{Container, Handle};
use weft_model::firewall::explain::{Explanation, Route, explain};
use weft_model::firewall::{Content, Part, Size, program};
use weft_model::link::LinkSpec;
use weft_model::reason::{self, Reason};

use super::Running;
use super::wave::Asked;
use crate::calls::{Remembered, Valid};
use crate::inbox::{Check, Inbox, Question, Reply, Request, Sender};
use crate::kernel::{Kernel, inside};
use crate::metrics::Metrics;

impl<K: Kernel> Running<K> {
    /// By the program that the kernel holds, as far as that is known.
    pub(super) async fn explain(&mut self, question: Question) -> Result<Explanation, Reason> {
        let from = match &question.from {
            Sender::Addr(addr) => *addr,
            Sender::Container(handle) => {
                let unknown = || Reason::UnknownContainer { handle: handle.to_string() };
                self.task.cell.roster().get(handle).ok_or_else(unknown)?.0.addr.get()
            }
        };
        // A mapped port leads to a container, whose link is no matter of routes.
        let route = self.task.kernel.route(question.to).await.map_err(|error| error.reason())?;
        let parts = self.held();
        let routes = |to| if to == question.to { route.clone() } else { Route::Nowhere };
        let explained =
            explain(&program(parts), self.task.cell.inputs(), from, question.to, question.probe, routes);
        explained.map_err(|broken| Reason::Bug { invariant: broken.to_string() })
    }

    /// What an app is said to listen on and is no port: it is not opened to the overlay's routers.
    pub(super) fn report_ports(&self, container: &Container) {
        if self.task.cell.inputs().config.ingress == OverlayIngress::Taken {
            for wrong in container.owner.offered().1 {
                warn!(handle = %container.handle, port = wrong, "not a port of a container; the others hold");
            }
        }
    }

    /// The program that the kernel holds, as far as that is known.
    fn held(&self) -> impl Iterator<Item = (&Part, &Content)> {
        self.task.cell.believed().iter().filter_map(|(key, belief)| match belief {
            Belief::Holds(object) => Some((key.part()?, object.content()?)),
            Belief::Unknown => None,
        })
    }

    pub(super) fn size(&self) -> Size {
        Size::of(self.held().map(|(_, content)| content))
    }

    /// Deletes in this wave what is still there of these containers.
    pub(super) fn delete(&mut self, handles: impl IntoIterator<Item = Handle>, reply: Reply<()>) -> Asked {
        let dropped = handles.into_iter().map(|handle| self.task.cell.drop(&handle));
        let leaving = dropped.filter_map(|dropped| match dropped {
            Dropped::Absent => None,
            Dropped::Leaving(addr) => Some(addr),
        });
        let addrs: Vec<OverlayAddr> = leaving.collect();
        self.leaving |= !addrs.is_empty();
        Asked::Delete { addrs, reply }
    }

    /// The containers of a network that its runtime does not know.
    pub(super) fn stale(&self, valid: &Valid) -> Vec<Handle> {
        let containers = self.task.cell.roster().iter().map(|(container, _)| container);
        let stale = containers
            .filter(|container| valid.ends(&container.network, &container.handle, &container.interface));
        stale.map(|container| container.handle.clone()).collect()
    }

    pub(super) async fn check(&mut self, check: Check) {
        let Check { remembered, namespace, reply } = check;
        match self.check_cells_end(&remembered).await {
            Err(reason) => drop(reply.send(Err(reason))),
            Ok(spec) => {
                tokio::spawn(async move {
                    drop(reply.send(inside::check(namespace, &spec, remembered).await));
                });
            }
        }
    }

    async fn check_cells_end(&mut self, remembered: &Remembered) -> Result<LinkSpec, Reason> {
        let Remembered { handle, interface, addr, .. } = remembered;
        let Some((container, presence)) = self.task.cell.roster().get(handle) else {
            return Err(Reason::UnknownContainer { handle: handle.to_string() });
        };
        let container = Arc::clone(container);
        let damaged = |what: &str| Reason::Damaged { handle: handle.to_string(), what: what.into() };
        let spec = LinkSpec::of(&container);
        match presence {
            Presence::Present => {}
            Presence::Lost => return Err(damaged("its link is gone")),
            Presence::Leaving => return Err(damaged("it is being deleted")),
        }
        if *interface != spec.interface {
            return Err(damaged(&format!("its interface is {}", spec.interface)));
        }
        if addr.is_some_and(|addr| addr != spec.addr) {
            return Err(damaged(&format!("its address is {}", spec.addr)));
        }
        let seen = self.task.kernel.see(Scope::Links).await.map_err(|error| error.reason())?;
        match seen.get(&Key::Link(spec.addr)) {
            Some(Belief::Holds(Object::Link(link))) if *link == spec => {}
            Some(_) => return Err(damaged("the cell's end of its link is not whole")),
            None => return Err(damaged("its link is gone")),
        }
        let shaping = Key::Shaping(spec.addr);
        let limited = self.task.cell.wanted().get(&shaping).cloned().map(Belief::Holds);
        if seen.get(&shaping) != limited.as_ref() {
            return Err(damaged("its bandwidth is limited in another way"));
        }
        let route = self.task.kernel.route(spec.addr.get()).await.map_err(|error| error.reason())?;
        if route != Route::Device(spec.host_name()) {
            return Err(damaged("the cell's route to it is gone"));
        }
        let seen = self.task.kernel.see(Scope::Firewall).await.map_err(|error| error.reason())?;
        let whole = |key: &Key| match (seen.get(key), self.task.cell.wanted().get(key)) {
            (Some(Belief::Holds(is)), Some(will)) => is == will,
            (is, will) => is.is_none() && will.is_none(),
        };
        let mut rules = self.task.cell.rules_of(&container);
        if let Some(key) = rules.find(|key| !whole(key)) {
            return Err(damaged(&format!("its rules are not whole: {key}")));
        }
        Ok(spec)
    }
}

/// Lays the inner end of a new link. If that fails, or nobody waits for it any more, the container is deleted.
pub(super) async fn lay_inside(
    spec: LinkSpec,
    namespace: Arc<OwnedFd>,
    reply: Reply<LinkSpec>,
    inbox: Inbox,
    metrics: &Metrics,
) {
    let began = std::time::Instant::now();
    let laid = inside::lay(namespace, &spec).await;
    metrics.inside(began.elapsed());
    let (handle, interface) = (spec.handle.clone(), spec.interface.clone());
    match laid {
        Ok(()) => {
            info!(%handle, addr = %spec.addr, "container added");
            if reply.send(Ok(spec)).is_err() {
                warn!(%handle, "caller of ADD has gone; container deleted");
                undo(&inbox, handle, interface).await;
            }
        }
        Err(why) => {
            log(&why, &handle);
            undo(&inbox, handle, interface).await;
            drop(reply.send(Err(why)));
        }
    }
}

async fn undo(inbox: &Inbox, handle: Handle, interface: DeviceName) {
    let (reply, answer) = tokio::sync::oneshot::channel();
    inbox.tell(Request::Delete { handle, interface, reply }).await;
    // What could not be removed is tried again by the cell's task, and logged there.
    drop(answer.await);
}

fn log(why: &Reason, handle: &Handle) {
    let level = match why.meaning().level {
        reason::Level::Info => Level::INFO,
        reason::Level::Warn => Level::WARN,
        reason::Level::Error => Level::ERROR,
    };
    match level {
        Level::ERROR => error!(%handle, %why, "container not added"),
        Level::WARN => warn!(%handle, %why, "container not added"),
        _ => info!(%handle, %why, "container not added"),
    }
}
