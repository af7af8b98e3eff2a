//! The cell's task: the only one that changes the cell's network namespace.
//!
//! Owns the cell, its journal and the kernel. Woken by calls, by the lease stream, by the kernel's notifications and
//! by the clock. All that waits goes into one wave: edit, write the journal, diff, apply, settle, answer. Emits
//! answers, and the inner ends of new links to threads of their own.

mod audit;
mod call;
mod forget;
mod policies;
mod wave;

use std::collections::BTreeSet;
use std::net::Ipv4Addr;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use futures::{FutureExt, Stream, StreamExt};
use tokio::sync::watch;
use tokio::time::{Instant, sleep_until};
use weft_model::address::{DeviceName, OverlayAddr};
use weft_model::cell::{Cell, Key, Scope};
use weft_model::firewall::Guard;
use weft_model::reason::Reason;

use crate::directory::Directory;
use crate::inbox::{Inbox, Request, Waiting};
use crate::journal::Journal;
use crate::kernel::conntrack::Connections;
use crate::kernel::events::Event;
use crate::kernel::{Kernel, KernelError};
use crate::metrics::Metrics;
use crate::overlay::Overlay;
use crate::policy_server::{Applied, Known};
use forget::Walks;
use policies::said;
pub use policies::{Policies, ids};

/// Between audits when nothing has happened.
const AUDIT: Duration = Duration::from_secs(60);
/// After a notification the kernel is looked at once it is quiet for so long …
const QUIET: Duration = Duration::from_secs(1);
/// … but no later than this.
const LATEST: Duration = Duration::from_secs(5);
/// How often what failed is tried again.
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
    pub underlay: Underlay,
    /// Who rejects what containers send to the cell.
    pub guard: watch::Receiver<Guard>,
    /// What the policy server says; none: there is no server, and no policy.
    pub policies: Option<Policies>,
    /// Who is who.
    pub names: Directory,
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

struct Running<K> {
    task: Task<K>,
    audit_at: Instant,
    /// Of the kernel, since the last audit.
    heard: Option<Heard>,
    /// What has been reported and not been mended since.
    reported: BTreeSet<Key>,
    underlay_missing: bool,
    /// Somebody else changed the firewall's table.
    table_touched: bool,
    connections: Arc<Mutex<Connections>>,
    walks: Walks,
    /// Calls to add containers, for which there are addresses in a moment.
    parked: Vec<Request>,
    /// Containers leave in this wave: then their addresses rest.
    leaving: bool,
    /// Why the journal lacks something.
    unwritten: Option<Reason>,
    /// Containers' ends are being told of another MTU.
    fitting: bool,
    /// Those that cannot be.
    unfit: BTreeSet<OverlayAddr>,
    /// Whose entries in the directory may be others now.
    renamed: BTreeSet<OverlayAddr>,
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
        let renamed = self.cell.roster().iter().map(|(container, _)| container.addr).collect();
        let mut running = Running {
            task: self,
            audit_at: now + AUDIT,
            heard: None,
            reported: BTreeSet::new(),
            underlay_missing: false,
            table_touched: false,
            connections: Arc::new(Mutex::new(Connections::open()?)),
            walks: Walks::default(),
            parked: Vec::new(),
            leaving: false,
            unwritten: None,
            fitting: false,
            unfit: BTreeSet::new(),
            renamed,
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
                Some(_) = events.next() => running.heard = Some(Heard::again(running.heard, Instant::now())),
                () = sleep_until(wake) => running.due().await,
            }
        }
    }
}

impl<K: Kernel> Running<K> {
    fn next_deadline(&self) -> Instant {
        let now = Instant::now();
        let retry = self.task.cell.unsettled() && self.task.cell.inputs().knows_overlay();
        let retry = retry || self.unwritten.is_some();
        let retry = retry.then(|| now + RETRY);
        [retry, self.forget_at(now)].into_iter().flatten().fold(self.look_at(), Instant::min)
    }

    fn look_at(&self) -> Instant {
        self.heard.map_or(self.audit_at, |heard| heard.look_at().min(self.audit_at))
    }

    async fn due(&mut self) {
        if Instant::now() >= self.look_at() {
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
}

/// When the kernel told of changes.
#[derive(Debug, Clone, Copy)]
struct Heard {
    first: Instant,
    last: Instant,
}

impl Heard {
    fn again(before: Option<Self>, now: Instant) -> Self {
        Self { first: before.map_or(now, |before| before.first), last: now }
    }

    /// Each notification puts the look off, up to a point: our own changes are told as well.
    fn look_at(self) -> Instant {
        (self.last + QUIET).min(self.first + LATEST)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A look at 200 links takes longer than three ADDs.
    #[test]
    fn notifications_put_the_look_off_but_not_for_ever() {
        let begin = Instant::now();
        let at = |millis| begin + Duration::from_millis(millis);
        let mut heard = Heard::again(None, begin);
        assert_eq!(heard.look_at(), at(1_000));
        for millis in (500..3_500).step_by(500) {
            heard = Heard::again(Some(heard), at(millis));
        }
        assert_eq!(heard.look_at(), at(4_000), "a second after the last");
        for millis in (3_500..9_000).step_by(500) {
            heard = Heard::again(Some(heard), at(millis));
        }
        assert_eq!(heard.look_at(), at(5_000), "5 s after the first");
    }
}
