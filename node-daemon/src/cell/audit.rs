//! Looking at the kernel: what differs from what was believed is logged once, and repaired by the next step.

use std::path::PathBuf;
use std::sync::Arc;

use tokio::time::Instant;
use tracing::{error, info, warn};
use weft_daemon::cause::chain;
use weft_model::cell::{Belief, Drift, Presence, Scope};
use weft_model::container::Container;
use weft_model::link::{self, LinkSpec};
use weft_model::reason::Reason;

use super::{AUDIT, Running};
use crate::inbox::Request;
use crate::kernel::{Kernel, inside};

impl<K: Kernel> Running<K> {
    pub(super) async fn audit(&mut self) {
        self.audit_at = Instant::now() + AUDIT;
        self.heard = None;
        let config = &self.task.cell.inputs().config;
        match self.task.kernel.underlay(config.underlay, self.task.underlay.device.as_ref()).await {
            Ok(device) => {
                self.underlay_missing = false;
                self.task.cell.underlay(Some(device));
            }
            Err(error) if !self.underlay_missing => {
                self.underlay_missing = true;
                warn!(error = %chain(&error), "underlay device not found; what is there stays");
            }
            Err(_) => {}
        }
        match self.task.ways().await {
            Ok(ways) => self.task.cell.ways(ways),
            Err(error) => {
                warn!(error = %chain(&error), "devices to the world not read; they stay as they are")
            }
        }
        self.look(Scope::Links).await;
        self.sweep().await;
        self.follow_mtu();
    }

    /// What a DEL would do, for containers whose namespace has ended: a DEL may never come. A container that lost its
    /// link only is left to it.
    pub(super) async fn sweep(&mut self) {
        let containers = self.task.cell.roster().iter();
        let lost = containers.filter(|(_, presence)| *presence == Presence::Lost);
        let lost: Vec<_> = lost.map(|(container, _)| Arc::clone(container)).collect();
        if lost.is_empty() {
            return;
        }
        match self.task.kernel.namespaces().await {
            Ok(living) => {
                for container in
                    lost.iter().filter(|container| !living.contains(&link::index(container.addr)))
                {
                    info!(handle = %container.handle, "container deleted: its namespace has ended");
                    self.task.cell.drop(&container.handle);
                }
            }
            Err(error) => error!(error = %chain(&error), "namespaces not read; no container is deleted"),
        }
    }

    /// The ends of links within containers come first, each in its namespace; then the cell's (see `Cell::fit`).
    pub(super) fn follow_mtu(&mut self) {
        let fit = |(container, mtu): (&Arc<Container>, u32)| {
            let spec = LinkSpec { mtu, ..LinkSpec::of(container) };
            (spec, PathBuf::from(&container.namespace))
        };
        let misfits: Vec<_> = self.task.cell.misfits().map(fit).collect();
        self.unfit.retain(|addr| misfits.iter().any(|(spec, _)| spec.addr == *addr));
        if misfits.is_empty() || std::mem::replace(&mut self.fitting, true) {
            return;
        }
        let inbox = self.task.inbox.clone();
        tokio::spawn(async move {
            let mut outcomes = Vec::with_capacity(misfits.len());
            for (spec, namespace) in misfits {
                let outcome = inside::fit(namespace, &spec).await;
                outcomes.push((spec, outcome));
            }
            inbox.tell(Request::Fitted(outcomes)).await;
        });
    }

    pub(super) fn fitted(&mut self, outcomes: Vec<(LinkSpec, Result<(), Reason>)>) {
        self.fitting = false;
        for (LinkSpec { addr, handle, mtu, .. }, outcome) in outcomes {
            match outcome {
                Ok(()) => {
                    info!(%handle, mtu, "link follows the underlay's MTU");
                    self.unfit.remove(&addr);
                    self.task.cell.fit(addr, mtu);
                }
                // It may have left meanwhile, and then nobody has to know.
                Err(why) => {
                    let there = self.task.cell.roster().get(&handle).is_some();
                    if there && self.unfit.insert(addr) {
                        warn!(%handle, %why, "container's end not reached; its link keeps its MTU");
                    }
                }
            }
        }
    }

    /// Compares what there is with what was believed. The next step repairs it.
    pub(super) async fn look(&mut self, scope: Scope) {
        let seen = match self.task.kernel.see(scope).await {
            Ok(seen) => seen,
            Err(error) => {
                error!(error = %chain(&error), "audit not possible");
                return;
            }
        };
        let before = self.task.cell.believed().clone();
        for drift in self.task.cell.audit(scope, seen) {
            match &drift {
                Drift::Differs(key) | Drift::Unwanted(key) => {
                    // What was not believed to be right is known to be pending.
                    let believed = match (before.get(key), self.task.cell.wanted().get(key)) {
                        (Some(Belief::Holds(is)), Some(will)) => is == will,
                        (was, will) => was.is_none() && will.is_none(),
                    };
                    if believed && self.reported.insert(key.clone()) {
                        warn!(%key, "drift repaired");
                        self.task.metrics.drift();
                    }
                }
                Drift::Bug => {
                    error!("what is wanted was not what the plan says; planned anew");
                }
                container => self.report_container(container),
            }
        }
    }

    pub(super) fn report_container(&self, drift: &Drift) {
        match drift {
            Drift::Lost(handle) => info!(%handle, "container's link is gone"),
            Drift::Adopted(handle) => warn!(%handle, "container of a lost journal adopted"),
            Drift::Differs(_) | Drift::Unwanted(_) | Drift::Bug => {}
        }
    }
}
