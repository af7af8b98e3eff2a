//! The cell's task: the only one that changes the cell's network namespace.
//!
//! Owns the cell, its journal and the kernel. Woken by calls, by the lease stream, by the kernel's notifications and
//! by the clock. All that waits goes into one wave: edit, write the journal, diff, apply, settle, answer. Emits
//! answers, and the inner ends of new links to threads of their own.

mod audit;
mod call;
mod policies;

use std::collections::{BTreeMap, BTreeSet};
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::watch;
use tokio::task::spawn_blocking;
use tokio::time::{Instant, sleep_until};
use tracing::{debug, error, info, warn};
use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::cell::{Cell, Fault, Key, Outcome, Scope, Step};
use weft_model::container::Container;
use weft_model::firewall::Guard;
use weft_model::link::LinkSpec;
use weft_model::reason::Reason;

use crate::flow_log::Directory;
use crate::inbox::{Inbox, Reply, Request, Waiting};
use crate::journal::Journal;
use crate::kernel::conntrack::Connections;
use crate::kernel::events::Event;
use crate::kernel::{Kernel, KernelError, Namespaces};
use crate::metrics::Metrics;
use crate::overlay::Overlay;
use crate::policy_server::{Applied, Known};
use crate::report::status;
use call::lay_inside;
use policies::said;
pub use policies::{Policies, ids};

/// Between audits when nothing has happened.
const AUDIT: Duration = Duration::from_secs(60);
/// After a notification the kernel is looked at once it is quiet for so long …
const QUIET: Duration = Duration::from_secs(1);
/// … but no later than this.
const LATEST: Duration = Duration::from_secs(10);
/// How often what failed is tried again.
const RETRY: Duration = Duration::from_secs(2);
/// To forget connections their whole table is read. So those of all that was deleted within so long are forgotten in one walk,
/// unless addresses run short.
const TOGETHER: Duration = Duration::from_secs(1);
/// Fewer free addresses than this are short.
const SPARE: usize = 32;

/// What the task works with.
#[derive(Debug)]
pub struct Task<K> {
    pub cell: Cell,
    pub kernel: K,
    pub journal: Journal,
    pub waiting: Waiting,
    pub inbox: Inbox,
    pub overlay: watch::Receiver<Overlay>,
    pub underlay: Underlay,
    /// Who rejects what containers send to the cell.
    pub guard: watch::Receiver<Guard>,
    /// What the policy server says; none: there is no server, and no policy.
    pub policies: Option<Policies>,
    /// Who is who, for the traffic log; none: there is none.
    pub directory: watch::Sender<Arc<Directory>>,
    pub metrics: Arc<Metrics>,
}

/// Which of the cell's devices lead out.
#[derive(Debug, Default)]
pub struct Underlay {
    /// The device for the overlay's frames, if not the one that has the underlay address.
    pub device: Option<DeviceName>,
    /// Devices on which containers reach the world; none: those that have `addresses`.
    pub ways: BTreeSet<DeviceName>,
    pub addresses: Vec<Ipv4Addr>,
}

/// A call that has its effect in this wave.
enum Asked {
    Add { container: Arc<Container>, namespace: Arc<OwnedFd>, reply: Reply<LinkSpec> },
    Delete { addrs: Vec<OverlayAddr>, reply: Reply<()> },
    LogC2c { on: bool, reply: Reply<bool> },
}

struct Running<K> {
    task: Task<K>,
    audit_at: Instant,
    /// When the kernel was first heard of since the last audit.
    heard: Option<Instant>,
    /// What has been reported and not been mended since.
    reported: BTreeSet<Key>,
    underlay_missing: bool,
    /// Somebody else changed the firewall's table.
    table_touched: bool,
    forgetting: bool,
    connections: Arc<Mutex<Connections>>,
    /// The next walk, unless addresses run short.
    forget_at: Instant,
    forgetting_fails: bool,
    /// Why the journal lacks something.
    unwritten: Option<Reason>,
    /// Containers' ends are being told of another MTU.
    fitting: bool,
    /// Those that cannot be.
    unfit: BTreeSet<OverlayAddr>,
    /// The roster has changed since the directory was published.
    roster_changed: bool,
    /// What the cell has been told of the policy server's answers.
    told: Known,
    policies_changed: bool,
}

impl<K: Kernel> Task<K> {
    /// Looks at the kernel and brings it in step. What differs now is no drift: nobody watched before.
    pub async fn start(mut self) -> Result<Started<K>, KernelError> {
        let underlay = self.cell.inputs().config.underlay;
        let device = self.kernel.underlay(underlay, self.underlay.device.as_ref()).await?;
        self.cell.underlay(Some(device));
        let ways = self.ways().await?;
        self.cell.ways(ways);
        let now = Instant::now();
        let mut running = Running {
            task: self,
            audit_at: now + AUDIT,
            heard: None,
            reported: BTreeSet::new(),
            underlay_missing: false,
            table_touched: false,
            forgetting: false,
            connections: Arc::new(Mutex::new(Connections::open()?)),
            forget_at: Instant::now(),
            forgetting_fails: false,
            unwritten: None,
            fitting: false,
            unfit: BTreeSet::new(),
            roster_changed: true,
            told: Known::default(),
            policies_changed: false,
        };
        running.follow_leases();
        running.follow_guard();
        running.follow_policies();
        for scope in Scope::ALL {
            let seen = running.task.kernel.see(scope).await?;
            for drift in running.task.cell.audit(scope, seen) {
                running.report_container(&drift);
            }
        }
        running.sweep().await;
        running.wave(Vec::new()).await;
        running.follow_mtu();
        Ok(Started(running))
    }

    async fn ways(&mut self) -> Result<BTreeSet<DeviceName>, KernelError> {
        match self.underlay.ways.is_empty() {
            true => self.kernel.devices_of(&self.underlay.addresses).await,
            false => Ok(self.underlay.ways.clone()),
        }
    }
}

/// The task after its first wave.
#[expect(missing_debug_implementations, reason = "a kernel has nothing to show")]
pub struct Started<K>(Running<K>);

impl<K: Kernel> Started<K> {
    /// Runs until every handle of the inbox is gone.
    ///
    /// `touched`: somebody else changed the firewall's table.
    pub async fn run(self, events: impl Stream<Item = Event> + Send, touched: impl Stream<Item = ()> + Send) {
        let mut events = std::pin::pin!(events);
        let mut touched = std::pin::pin!(touched);
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
                changed = running.task.guard.changed() => {
                    if changed.is_err() {
                        return;
                    }
                    running.follow_guard();
                    running.wave(Vec::new()).await;
                }
                () = said(&mut running.task.policies) => {
                    let (began, before) = (std::time::Instant::now(), Applied::of(&running.told));
                    running.follow_policies();
                    running.wave(Vec::new()).await;
                    running.task.metrics.applied(before, Applied::of(&running.told), began.elapsed());
                }
                Some(()) = touched.next() => {
                    // All that is said at once is one change.
                    while touched.next().now_or_never().flatten().is_some() {}
                    running.table_touched = true;
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
        let retry = retry || self.unwritten.is_some();
        let retry = retry.then(|| Instant::now() + RETRY);
        let resting = !self.forgetting && !self.task.cell.roster().resting().is_empty();
        [retry, resting.then_some(self.forget_at)].into_iter().flatten().fold(self.audit_at, Instant::min)
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

    fn follow_guard(&mut self) {
        let guard = *self.task.guard.borrow_and_update();
        self.task.cell.guard(guard);
    }

    // === one wave ===

    async fn wave(&mut self, requests: Vec<Request>) {
        // A fence that was published before a call is heard before it.
        if self.task.overlay.has_changed().unwrap_or(false) {
            self.follow_leases();
        }
        if self.unwritten.is_some() {
            // Who asks whether a container can be added asks about now.
            self.write_journal();
        }
        let mut asked = Vec::new();
        let mut namespaces = Namespaces::new();
        for request in requests {
            self.edit(request, &mut asked, &mut namespaces).await;
        }
        self.write_journal();
        if let Some(why) = self.unwritten.clone() {
            // Nothing that is not in the journal may be laid: an unknown container would lose its address.
            asked = self.refuse_adds(asked, &why);
        }
        if std::mem::take(&mut self.table_touched) {
            self.look(Scope::Firewall).await;
        }
        let failed = self.carry_out(&asked, &namespaces).await;
        self.write_journal();
        for asked in asked {
            self.answer(asked, &failed);
        }
        self.forget_resting();
        let roster_changed = std::mem::take(&mut self.roster_changed);
        if std::mem::take(&mut self.policies_changed) || roster_changed {
            #[expect(clippy::disallowed_methods, reason = "the log's times are wall-clock times")]
            let now = std::time::SystemTime::now();
            let policies = self.told.policies.as_ref().map(|told| Arc::clone(&told.value));
            let entered = Directory::of(self.task.cell.roster(), policies.unwrap_or_default());
            self.task.directory.send_modify(|before| *before = Arc::new(entered.remembering(before, now)));
        }
        if let Some(policies) = self.task.policies.as_ref().filter(|_| roster_changed) {
            policies.want(self.task.cell.roster());
        }
        self.policies_applied();
        self.task.metrics.observe(&self.task.cell, &self.task.overlay.borrow());
    }

    /// Applies steps until all is done that can be, and says what failed, by key, or by the key of the link of a container
    /// that could not be added.
    async fn carry_out(&mut self, asked: &[Asked], namespaces: &Namespaces) -> BTreeMap<Key, Reason> {
        let mut failed = BTreeMap::new();
        let mut looked = false;
        // A container that could not be added is taken away again in the same wave, so that a failure leaves nothing.
        for _ in 0..4 {
            let step = self.task.cell.diff();
            if step.is_empty() {
                break;
            }
            let done = self.apply(&step, namespaces).await;
            if done.failed.keys().any(Key::is_firewall) && !looked {
                // Perhaps somebody has just changed the table: what is there is looked at, and then it is tried again.
                looked = true;
                self.look(Scope::Firewall).await;
                continue;
            }
            let mut dropped = false;
            for asked in asked {
                let Asked::Add { container, .. } = asked else { continue };
                let why = self.task.cell.keys_of(container).find_map(|key| done.failed.get(key));
                if let Some(why) = why.cloned() {
                    failed.entry(Key::Link(container.addr)).or_insert(why);
                    self.task.cell.drop(&container.handle);
                    dropped = true;
                }
            }
            for (key, why) in done.failed {
                failed.entry(key).or_insert(why);
            }
            if !dropped {
                break;
            }
        }
        failed
    }

    async fn edit(&mut self, request: Request, asked: &mut Vec<Asked>, namespaces: &mut Namespaces) {
        match request {
            // The caller is gone, so nothing is made that it would have to take back.
            Request::Add { reply, .. } if reply.is_closed() => {}
            Request::Add { wanted, namespace, reply } => match self.task.cell.add(*wanted) {
                Ok(container) => {
                    namespaces.insert(container.addr, Arc::clone(&namespace));
                    self.report_ports(&container);
                    asked.push(Asked::Add { container, namespace, reply });
                }
                Err(reason) => drop(reply.send(Err(self.explained(reason)))),
            },
            Request::Delete { handle, interface, reply } => {
                // Another interface is not ours: a runtime ends in this way what it could not begin.
                let found = self.task.cell.roster().get(&handle);
                let handles = found.filter(|(container, _)| container.interface == interface).map(|_| handle);
                asked.push(self.delete(handles, reply));
            }
            Request::Collect { valid, reply } => {
                let stale = self.stale(&valid);
                for handle in &stale {
                    info!(%handle, "container deleted: its runtime knows it no more");
                }
                asked.push(self.delete(stale, reply));
            }
            Request::Ready { reply } => {
                drop(reply.send(self.ready()));
            }
            Request::Check(check) => self.check(check).await,
            Request::Explain { question, reply } => drop(reply.send(self.explain(question).await)),
            Request::Status { reply } => {
                let ready = self.ready();
                let known = self.task.policies.as_ref().map(|policies| policies.known.borrow());
                let (cell, overlay) = (&self.task.cell, self.task.overlay.borrow());
                drop(reply.send(Ok(status(cell, &overlay, known.as_deref(), ready.err()))));
            }
            Request::LogC2c { set: None, reply } => {
                drop(reply.send(Ok(self.task.cell.inputs().log_c2c)));
            }
            Request::LogC2c { set: Some(on), reply } => {
                self.task.cell.log_c2c(on);
                asked.push(Asked::LogC2c { on, reply });
            }
            Request::Measure { reply } => drop(reply.send(Ok(self.size()))),
            Request::Forgotten(addrs) => {
                (self.forgetting, self.forgetting_fails) = (false, false);
                self.task.cell.forgotten(&addrs);
            }
            Request::Fitted(outcomes) => self.fitted(outcomes),
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

    fn refuse_adds(&mut self, asked: Vec<Asked>, why: &Reason) -> Vec<Asked> {
        let mut kept = Vec::new();
        for asked in asked {
            match asked {
                Asked::Add { container, reply, .. } => {
                    self.task.cell.drop(&container.handle);
                    drop(reply.send(Err(why.clone())));
                }
                other @ (Asked::Delete { .. } | Asked::LogC2c { .. }) => kept.push(other),
            }
        }
        kept
    }

    /// What is not written now is with the next wave that can.
    fn write_journal(&mut self) {
        let records = self.task.cell.take_records();
        self.roster_changed |= !records.is_empty();
        let written = self.task.journal.append(&records, || self.task.cell.roster().records().collect());
        let why = written.err().map(|error| Reason::File {
            operation: "write".into(),
            path: "the journal of containers".into(),
            why: chain(&error),
        });
        match (&self.unwritten, &why) {
            (None, Some(why)) => error!(%why, "no container is added until the journal can be written"),
            (Some(_), None) => info!("journal written again; containers are added"),
            _ => {}
        }
        self.unwritten = why;
    }

    /// Whether a container can be added.
    fn ready(&self) -> Result<(), Reason> {
        self.task.cell.ready().map_err(|reason| self.explained(reason))?;
        self.unwritten.clone().map_or(Ok(()), Err)
    }

    async fn apply(&mut self, step: &Step, namespaces: &Namespaces) -> Outcome {
        let began = std::time::Instant::now();
        let outcome = self.task.kernel.apply(step, namespaces).await;
        self.task.metrics.wave(began.elapsed());
        for change in step.changes() {
            if !outcome.failed.contains_key(&change.key) {
                self.reported.remove(&change.key);
                if matches!(change.key, Key::Link(_) | Key::Shaping(_) | Key::Firewall(_)) {
                    debug!(%change, "applied")
                } else {
                    info!(%change, "applied")
                }
            }
        }
        for Fault { key, why } in self.task.cell.settle(step, &outcome) {
            let newborn =
                matches!(&key, Key::Link(addr) | Key::Shaping(addr) if namespaces.contains_key(addr));
            // A caller hears of its own link; everything else is for the log, once until it is mended.
            if !newborn && self.reported.insert(key.clone()) {
                self.task.metrics.refused();
                error!(%key, %why, "kernel refused a change; it is tried again");
            }
        }
        outcome
    }

    fn answer(&self, asked: Asked, failed: &BTreeMap<Key, Reason>) {
        match asked {
            Asked::Delete { addrs, reply } => {
                let keys = addrs.into_iter().flat_map(|addr| [Key::Link(addr), Key::Shaping(addr)]);
                let failed = keys.into_iter().find_map(|key| failed.get(&key).cloned());
                drop(reply.send(failed.map_or(Ok(()), Err)));
            }
            Asked::LogC2c { on, reply } => {
                let failed = failed.iter().find(|(key, _)| key.is_firewall()).map(|(_, why)| why.clone());
                drop(reply.send(failed.map_or(Ok(on), Err)));
            }
            Asked::Add { container, namespace, reply } => {
                if let Some(why) = failed.get(&Key::Link(container.addr)) {
                    drop(reply.send(Err(why.clone())));
                    return;
                }
                let spec = LinkSpec::of(&container);
                let inbox = self.task.inbox.clone();
                let metrics = Arc::clone(&self.task.metrics);
                tokio::spawn(async move { lay_inside(spec, namespace, reply, inbox, &metrics).await });
            }
        }
    }

    fn forget_resting(&mut self) {
        let roster = self.task.cell.roster();
        let soon = roster.ipam().free() < SPARE || Instant::now() >= self.forget_at;
        if roster.resting().is_empty() || self.forgetting || !soon {
            return;
        }
        let resting = roster.resting().clone();
        self.forgetting = true;
        self.forget_at = Instant::now() + TOGETHER;
        let (inbox, connections) = (self.task.inbox.clone(), Arc::clone(&self.connections));
        tokio::spawn(async move {
            let addrs = resting.clone();
            let forget = move || connections.lock().unwrap_or_else(PoisonError::into_inner).forget(&addrs);
            let told = match spawn_blocking(forget).await {
                Ok(Ok(_)) => Request::Forgotten(resting),
                Ok(Err(error)) => Request::NotForgotten(error.reason()),
                Err(panic) => Request::NotForgotten(Reason::Bug { invariant: panic.to_string() }),
            };
            inbox.tell(told).await;
        });
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
