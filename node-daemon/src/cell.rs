//! The cell's task: the only one that changes the cell's network namespace.
//!
//! Owns the cell, its journal and the kernel. Woken by calls, by the lease stream, by the kernel's notifications and
//! by the clock. All that waits goes into one wave: edit, write the journal, diff, apply, settle, answer. Emits
//! answers, and the inner ends of new links to threads of their own.

use std::collections::BTreeSet;
use std::os::fd::{AsFd, OwnedFd};
use std::sync::Arc;
use std::time::Duration;

use futures::{Stream, StreamExt};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};
use tracing::{Level, debug, error, info, warn};
use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::cell::{Belief, Cell, Drift, Dropped, Fault, Key, Object, Outcome, Presence, Step};
use weft_model::container::Handle;
use weft_model::link::LinkSpec;
use weft_model::reason::{self, Reason};

use crate::inbox::{Check, Inbox, Reply, Request, Waiting};
use crate::journal::Journal;
use crate::kernel::events::Event;
use crate::kernel::{Kernel, KernelError, Namespaces, conntrack, inside};
use crate::metrics::Metrics;
use crate::overlay::Overlay;
use crate::report::status;

/// Between audits when nothing has happened.
const AUDIT: Duration = Duration::from_secs(60);
/// After a notification the kernel is looked at once it is quiet for so long …
const QUIET: Duration = Duration::from_secs(1);
/// … but no later than this.
const LATEST: Duration = Duration::from_secs(10);
/// How often what failed is tried again, and addresses whose connections could not be forgotten.
const RETRY: Duration = Duration::from_secs(2);

/// What the task works with.
#[derive(Debug)]
pub struct Task<K> {
    pub cell: Cell,
    pub kernel: K,
    pub journal: Journal,
    pub waiting: Waiting,
    pub inbox: Inbox,
    pub overlay: watch::Receiver<Overlay>,
    pub underlay_device: Option<DeviceName>,
    pub metrics: Arc<Metrics>,
}

/// A call that has its effect in this wave.
enum Asked {
    Add { spec: LinkSpec, namespace: Arc<OwnedFd>, reply: Reply<LinkSpec> },
    Delete { addr: OverlayAddr, reply: Reply<()> },
}

struct Running<K> {
    task: Task<K>,
    audit_at: Instant,
    /// When the kernel was first heard of since the last audit.
    heard: Option<Instant>,
    /// What has been reported and not been mended since.
    reported: BTreeSet<Key>,
    underlay_missing: bool,
    forgetting: bool,
    forgetting_fails: bool,
}

impl<K: Kernel> Task<K> {
    /// Looks at the kernel and brings it in step. What differs now is no drift: nobody watched before.
    pub async fn start(mut self) -> Result<Started<K>, KernelError> {
        let underlay = self.cell.inputs().config.underlay;
        let device = self.kernel.underlay(underlay, self.underlay_device.as_ref()).await?;
        self.cell.underlay(Some(device));
        let now = Instant::now();
        let mut running = Running {
            task: self,
            audit_at: now + AUDIT,
            heard: None,
            reported: BTreeSet::new(),
            underlay_missing: false,
            forgetting: false,
            forgetting_fails: false,
        };
        running.follow_leases();
        let seen = running.task.kernel.see().await?;
        for drift in running.task.cell.audit(seen) {
            running.report_container(&drift);
        }
        running.wave(Vec::new()).await;
        Ok(Started(running))
    }
}

/// The task after its first wave.
#[expect(missing_debug_implementations, reason = "a kernel has nothing to show")]
pub struct Started<K>(Running<K>);

impl<K: Kernel> Started<K> {
    /// Runs until every handle of the inbox is gone.
    pub async fn run(self, events: impl Stream<Item = Event> + Send) {
        let mut events = std::pin::pin!(events);
        let Self(mut running) = self;
        loop {
            let wake = running.next_deadline();
            tokio::select! {
                request = running.task.waiting.next() => {
                    let Some(request) = request else { return };
                    let mut requests = vec![request];
                    requests.extend(running.task.waiting.rest());
                    running.wave(requests).await;
                }
                changed = running.task.overlay.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    running.follow_leases();
                    running.wave(Vec::new()).await;
                }
                Some(_) = events.next() => running.heard = running.heard.or_else(|| Some(Instant::now())).inspect(|first| {
                    // Each notification puts the look off, up to a point.
                    running.audit_at = running.audit_at.min((Instant::now() + QUIET).min(*first + LATEST));
                }),
                () = sleep_until(wake) => running.due().await,
            }
        }
    }
}

impl<K: Kernel> Running<K> {
    fn next_deadline(&self) -> Instant {
        let retry = self.task.cell.unsettled() && self.task.cell.inputs().knows_overlay();
        let resting = !self.forgetting && !self.task.cell.roster().resting().is_empty();
        if retry || resting { self.audit_at.min(Instant::now() + RETRY) } else { self.audit_at }
    }

    async fn due(&mut self) {
        if Instant::now() >= self.audit_at {
            self.audit().await;
        }
        self.wave(Vec::new()).await;
    }

    fn follow_leases(&mut self) {
        let overlay = self.task.overlay.borrow_and_update().clone();
        self.task.cell.fence(overlay.fenced);
        if let Some((own, peers)) = &overlay.table {
            self.task.cell.leases(Some(*own), peers);
        }
    }

    // === one wave ===

    async fn wave(&mut self, requests: Vec<Request>) {
        // A fence that was published before a call is heard before it.
        if self.task.overlay.has_changed().unwrap_or(false) {
            self.follow_leases();
        }
        let mut asked = Vec::new();
        let mut namespaces = Namespaces::new();
        for request in requests {
            self.edit(request, &mut asked, &mut namespaces).await;
        }
        if let Err(error) = self.write_journal() {
            // Nothing that is not in the journal may be laid: an unknown container would lose its address.
            asked = self.refuse_adds(asked, &error);
        }
        let mut outcome = Outcome::default();
        // A link that could not be laid is taken away again in the same wave, so that a failure leaves nothing.
        for _ in 0..3 {
            let step = self.task.cell.diff();
            if step.is_empty() {
                break;
            }
            let done = self.apply(&step, &namespaces).await;
            let failed_adds = asked.iter().filter_map(|asked| match asked {
                Asked::Add { spec, .. } if done.failed.contains_key(&Key::Link(spec.addr)) => {
                    Some(&spec.handle)
                }
                _ => None,
            });
            let failed_adds: Vec<Handle> = failed_adds.cloned().collect();
            for handle in &failed_adds {
                self.task.cell.drop(handle);
            }
            for (key, why) in done.failed {
                outcome.failed.entry(key).or_insert(why);
            }
            if failed_adds.is_empty() {
                break;
            }
        }
        if let Err(error) = self.write_journal() {
            debug!(error = %chain(&error), "journal not written");
        }
        for asked in asked {
            self.answer(asked, &outcome);
        }
        self.forget_resting();
        self.task.metrics.observe(&self.task.cell, &self.task.overlay.borrow());
    }

    async fn edit(&mut self, request: Request, asked: &mut Vec<Asked>, namespaces: &mut Namespaces) {
        match request {
            // The caller is gone, so nothing is made that it would have to take back.
            Request::Add { reply, .. } if reply.is_closed() => {}
            Request::Add { wanted, namespace, reply } => match self.task.cell.add(wanted) {
                Ok(container) => {
                    let spec = LinkSpec::of(&container);
                    namespaces.insert(spec.addr, Arc::clone(&namespace));
                    asked.push(Asked::Add { spec, namespace, reply });
                }
                Err(reason) => drop(reply.send(Err(self.explained(reason)))),
            },
            Request::Delete { handle, reply } => match self.task.cell.drop(&handle) {
                Dropped::Absent => drop(reply.send(Ok(()))),
                Dropped::Leaving(addr) => asked.push(Asked::Delete { addr, reply }),
            },
            Request::Check(check) => self.check(check).await,
            Request::Status { reply } => {
                let ready = self.task.cell.ready().map_err(|reason| self.explained(reason));
                drop(reply.send(Ok(status(&self.task.cell, &self.task.overlay.borrow(), ready.err()))));
            }
            Request::Forgotten(addrs) => {
                (self.forgetting, self.forgetting_fails) = (false, false);
                self.task.cell.forgotten(&addrs);
            }
            Request::NotForgotten(why) => {
                self.forgetting = false;
                if !std::mem::replace(&mut self.forgetting_fails, true) {
                    warn!(%why, "connections of former containers cannot be removed; their addresses rest");
                }
            }
        }
    }

    /// Why there is no lease yet is known to the lease stream only.
    fn explained(&self, reason: Reason) -> Reason {
        match (reason, &self.task.overlay.borrow().view.trouble) {
            (Reason::NoLeaseYet { .. }, Some(trouble)) => Reason::NoLeaseYet { why: trouble.to_string() },
            (reason, _) => reason,
        }
    }

    fn refuse_adds(&mut self, asked: Vec<Asked>, error: &crate::journal::JournalError) -> Vec<Asked> {
        error!(error = %chain(error), "journal not written; no container is added until it can be");
        let mut kept = Vec::new();
        for asked in asked {
            match asked {
                Asked::Add { spec, reply, .. } => {
                    self.task.cell.drop(&spec.handle);
                    drop(reply.send(Err(Reason::File {
                        operation: "write".into(),
                        path: "the journal of containers".into(),
                        why: chain(error),
                    })));
                }
                delete @ Asked::Delete { .. } => kept.push(delete),
            }
        }
        kept
    }

    fn write_journal(&mut self) -> Result<(), crate::journal::JournalError> {
        let records = self.task.cell.take_records();
        self.task.journal.append(&records, || self.task.cell.roster().records().collect())
    }

    async fn apply(&mut self, step: &Step, namespaces: &Namespaces) -> Outcome {
        let began = std::time::Instant::now();
        let outcome = self.task.kernel.apply(step, namespaces).await;
        self.task.metrics.wave(began.elapsed());
        for change in step.changes() {
            if !outcome.failed.contains_key(&change.key) {
                self.reported.remove(&change.key);
                if matches!(change.key, Key::Link(_)) {
                    debug!(%change, "applied")
                } else {
                    info!(%change, "applied")
                }
            }
        }
        for Fault { key, why } in self.task.cell.settle(step, &outcome) {
            let newborn = matches!(&key, Key::Link(addr) if namespaces.contains_key(addr));
            // A caller hears of its own link; everything else is for the log, once until it is mended.
            if !newborn && self.reported.insert(key.clone()) {
                error!(%key, %why, "kernel refused a change; it is tried again");
            }
        }
        outcome
    }

    fn answer(&self, asked: Asked, outcome: &Outcome) {
        match asked {
            Asked::Delete { addr, reply } => {
                let failed = outcome.failed.get(&Key::Link(addr)).cloned();
                drop(reply.send(failed.map_or(Ok(()), Err)));
            }
            Asked::Add { spec, namespace, reply } => {
                if let Some(why) = outcome.failed.get(&Key::Link(spec.addr)) {
                    drop(reply.send(Err(why.clone())));
                    return;
                }
                let inbox = self.task.inbox.clone();
                let metrics = Arc::clone(&self.task.metrics);
                tokio::spawn(async move { lay_inside(spec, namespace, reply, inbox, &metrics).await });
            }
        }
    }

    fn forget_resting(&mut self) {
        let resting = self.task.cell.roster().resting().clone();
        if resting.is_empty() || self.forgetting {
            return;
        }
        self.forgetting = true;
        let inbox = self.task.inbox.clone();
        tokio::spawn(async move {
            let addrs = resting.clone();
            let told = match spawn_blocking(move || conntrack::forget(&addrs)).await {
                Ok(Ok(_)) => Request::Forgotten(resting),
                Ok(Err(error)) => Request::NotForgotten(error.reason()),
                Err(panic) => Request::NotForgotten(Reason::Bug { invariant: panic.to_string() }),
            };
            inbox.tell(told).await;
        });
    }

    // === audit and check ===

    async fn audit(&mut self) {
        self.audit_at = Instant::now() + AUDIT;
        self.heard = None;
        let config = &self.task.cell.inputs().config;
        match self.task.kernel.underlay(config.underlay, self.task.underlay_device.as_ref()).await {
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
        let seen = match self.task.kernel.see().await {
            Ok(seen) => seen,
            Err(error) => {
                error!(error = %chain(&error), "audit not possible");
                return;
            }
        };
        let before = self.task.cell.believed().clone();
        for drift in self.task.cell.audit(seen) {
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

    fn report_container(&self, drift: &Drift) {
        match drift {
            Drift::Lost(handle) => info!(%handle, "container's link is gone"),
            Drift::Adopted(handle) => warn!(%handle, "container of a lost journal adopted"),
            Drift::Differs(_) | Drift::Unwanted(_) | Drift::Bug => {}
        }
    }

    async fn check(&mut self, check: Check) {
        let Check { handle, interface, addr, namespace, reply } = check;
        match self.check_cells_end(&handle, &interface, addr).await {
            Err(reason) => drop(reply.send(Err(reason))),
            Ok(spec) => {
                spawn_blocking(move || drop(reply.send(inside::check(namespace.as_fd(), &spec))));
            }
        }
    }

    async fn check_cells_end(
        &mut self,
        handle: &Handle,
        interface: &DeviceName,
        addr: Option<OverlayAddr>,
    ) -> Result<LinkSpec, Reason> {
        let Some((container, presence)) = self.task.cell.roster().get(handle) else {
            return Err(Reason::UnknownContainer { handle: handle.to_string() });
        };
        let damaged = |what: &str| Reason::Damaged { handle: handle.to_string(), what: what.into() };
        let spec = LinkSpec::of(container);
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
        let seen = self.task.kernel.see().await.map_err(|error| error.reason())?;
        match seen.get(&Key::Link(spec.addr)) {
            Some(Belief::Holds(Object::Link(link))) if *link == spec => Ok(spec),
            Some(_) => Err(damaged("the cell's end of its link is not whole")),
            None => Err(damaged("its link is gone")),
        }
    }
}

/// Lays the inner end of a new link. If that fails, or nobody waits for it any more, the container is deleted.
async fn lay_inside(
    spec: LinkSpec,
    namespace: Arc<OwnedFd>,
    reply: Reply<LinkSpec>,
    inbox: Inbox,
    metrics: &Metrics,
) {
    let inner = spec.clone();
    let began = std::time::Instant::now();
    let laid = spawn_blocking(move || inside::lay(namespace.as_fd(), &inner)).await;
    metrics.inside(began.elapsed());
    let laid = laid.unwrap_or_else(|panic| Err(Reason::Bug { invariant: panic.to_string() }));
    let (handle, answer) = (spec.handle.clone(), laid.map(|()| spec));
    match answer {
        Ok(spec) => {
            info!(%handle, addr = %spec.addr, "container added");
            if reply.send(Ok(spec)).is_err() {
                warn!(%handle, "caller of ADD has gone; container deleted");
                undo(&inbox, handle).await;
            }
        }
        Err(why) => {
            log(&why, &handle);
            undo(&inbox, handle).await;
            drop(reply.send(Err(why)));
        }
    }
}

async fn undo(inbox: &Inbox, handle: Handle) {
    let (reply, answer) = tokio::sync::oneshot::channel();
    inbox.tell(Request::Delete { handle, reply }).await;
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

/// An error with all its causes.
pub fn chain(error: &(dyn std::error::Error + 'static)) -> String {
    let mut text = error.to_string();
    let mut source = error.source();
    while let Some(cause) = source {
        text.push_str(": ");
        text.push_str(&cause.to_string());
        source = cause.source();
    }
    text
}
