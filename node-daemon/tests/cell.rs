//! The cell's task on the real kernel with faults: whichever change of a step fails, the caller hears of it, nothing is
//! left behind, and the next call works.

#![expect(clippy::unwrap_used, reason = "a panic is how a test fails, in its helpers too")]

#[path = "cell/calls.rs"]
mod calls;
#[path = "cell/disk.rs"]
mod disk;
#[path = "cell/table.rs"]
mod table;

use std::collections::BTreeSet;
use std::fs::File;
use std::net::Ipv4Addr;
use std::os::fd::OwnedFd;
use std::process::Command;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use nix::sched::{CloneFlags, unshare};
use prometheus_client::registry::Registry;
use tempfile::TempDir;
use tokio::sync::{mpsc, watch};
use tokio::task::JoinHandle;
use weft_model::address::{DeviceName, UnderlayAddr};
use weft_model::cell::{Cell, Key, Outcome, Scope, Seen, Step, UnderlayDevice};
use weft_model::firewall::Guard;
use weft_model::firewall::explain::Route;
use weft_model::keeper::Keeper;
use weft_model::lease::{self, Holder, Lease, Peers};
use weft_model::reason::Reason;
use weft_model::subnet::SubnetKind;
use weft_model::walk;
use weft_node::calls::Calls;
use weft_node::cell::{Task, Underlay};
use weft_node::directory::Directory;
use weft_node::inbox::{Inbox, inbox};
use weft_node::journal::Journal;
use weft_node::kernel::events::Event;
use weft_node::kernel::{Kernel, KernelError, Namespaces, Netlink};
use weft_node::metrics::Metrics;
use weft_node::overlay::Overlay;

/// The real kernel, but for one change: counted over all steps, the one with this number is not carried out. And the part
/// of the firewall that is the one of a number when it is first met is refused from then on. And it may take its time.
struct Failing {
    kernel: Netlink,
    changes: Arc<AtomicUsize>,
    fails: Arc<AtomicUsize>,
    refuses: Arc<AtomicUsize>,
    refused: Option<Key>,
    late: Arc<AtomicBool>,
}

/// Longer than callers wait for a kernel that is late.
const LATE: Duration = Duration::from_millis(200);

const NEVER: usize = usize::MAX;

impl Kernel for Failing {
    async fn apply(&mut self, step: &Step, namespaces: &Namespaces) -> Outcome {
        if self.late.load(Ordering::Relaxed) {
            tokio::time::sleep(LATE).await;
        }
        let (mut rest, mut failed) = (step.clone(), None);
        for list in [&mut rest.lay, &mut rest.remove] {
            list.retain(|change| {
                let fails =
                    self.changes.fetch_add(1, Ordering::Relaxed) == self.fails.load(Ordering::Relaxed);
                failed = failed.take().or_else(|| fails.then(|| change.key.clone()));
                !fails
            });
        }
        let firewall = &mut rest.firewall.changes;
        match self.refuses.load(Ordering::Relaxed) {
            NEVER => self.refused = None,
            n => {
                self.refused =
                    self.refused.take().or_else(|| firewall.get(n).map(|change| change.key.clone()))
            }
        }
        if let Some(at) = firewall.iter().position(|change| Some(&change.key) == self.refused.as_ref()) {
            failed = Some(firewall.remove(at).key);
        }
        let mut outcome = self.kernel.apply(&rest, namespaces).await;
        outcome.failed.extend(failed.map(|key| {
            let subject = key.to_string();
            (key, Reason::Kernel { operation: "test".into(), subject, why: "injected".into() })
        }));
        outcome
    }

    async fn see(&mut self, scope: Scope) -> Result<Seen, KernelError> {
        self.kernel.see(scope).await
    }

    async fn namespaces(&mut self) -> Result<BTreeSet<u32>, KernelError> {
        self.kernel.namespaces().await
    }

    async fn devices_of(&mut self, addrs: &[Ipv4Addr]) -> Result<BTreeSet<DeviceName>, KernelError> {
        self.kernel.devices_of(addrs).await
    }

    async fn route(&mut self, to: Ipv4Addr) -> Result<Route, KernelError> {
        self.kernel.route(to).await
    }

    async fn underlay(
        &mut self,
        addr: UnderlayAddr,
        named: Option<&DeviceName>,
    ) -> Result<UnderlayDevice, KernelError> {
        self.kernel.underlay(addr, named).await
    }
}

struct World {
    inbox: Inbox,
    overlay: watch::Sender<Overlay>,
    guard: watch::Sender<Guard>,
    touched: mpsc::UnboundedSender<()>,
    events: mpsc::UnboundedSender<Event>,
    task: JoinHandle<()>,
    changes: Arc<AtomicUsize>,
    fails: Arc<AtomicUsize>,
    refuses: Arc<AtomicUsize>,
    late: Arc<AtomicBool>,
    names: Directory,
    directory: TempDir,
}

fn ip(arguments: &str) -> String {
    let output = Command::new("ip").args(arguments.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "ip {arguments}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Devices of limits.
fn limited() -> usize {
    ip("-o link show type ifb").matches(": i-").count()
}

fn links() -> usize {
    ip("-o link").lines().filter(|line| line.contains(": s-")).count()
}

impl World {
    async fn start(lease: Option<Lease>) -> Self {
        Self::start_in(lease, tempfile::tempdir().unwrap()).await
    }

    async fn start_in(lease: Option<Lease>, directory: TempDir) -> Self {
        ip("link set lo up");
        ip("link add eth0 mtu 1500 type veth peer name uplink");
        ip("addr add 10.0.0.100/24 dev eth0");
        ip("link set eth0 up");
        ip("link set uplink up");
        Self::run(lease, directory).await
    }

    /// From what the journal in `directory` and the kernel hold.
    async fn run(lease: Option<Lease>, directory: TempDir) -> Self {
        let (changes, fails) = (Arc::new(AtomicUsize::new(0)), Arc::new(AtomicUsize::new(NEVER)));
        let kernel = Netlink::open("silk-vtep".parse().unwrap()).unwrap();
        let (refuses, late) = (Arc::new(AtomicUsize::new(NEVER)), Arc::new(AtomicBool::new(false)));
        let kernel = Failing {
            kernel,
            changes: Arc::clone(&changes),
            fails: Arc::clone(&fails),
            refuses: Arc::clone(&refuses),
            refused: None,
            late: Arc::clone(&late),
        };
        let holder = Holder { cell_id: "cell".into(), boot_id: "boot".into() };
        let who = lease::Cell { underlay: walk::underlay(100), holder, wants: SubnetKind::Block };
        let mut overlay = Overlay::new(Instant::now(), Keeper::start(who, None).view());
        overlay.table = lease.map(|lease| (lease, Peers::new()));
        let (overlay, leases) = watch::channel(overlay);
        let (journal, records) = Journal::open(directory.path(), "boot").unwrap();
        let (inbox, waiting) = inbox();
        let (guard, guarded) = watch::channel(Guard::Ours);
        let mut cell = Cell::new(walk::start(0).inputs().config.clone());
        cell.replay(records);
        let names = Directory::default();
        let metrics = Arc::new(Metrics::new(&mut Registry::default()));
        let task = Task {
            cell,
            kernel,
            journal,
            waiting,
            inbox: inbox.clone(),
            overlay: leases,
            underlay: Underlay { addresses: vec![walk::underlay(100).get()], ..Underlay::default() },
            guard: guarded,
            policies: None,
            names: names.clone(),
            metrics,
        };
        let started = task.start().await.unwrap();
        let (touched, touches) = mpsc::unbounded_channel();
        let touches = futures::stream::unfold(touches, async |mut touches| {
            touches.recv().await.map(|()| ((), touches))
        });
        let (events, happened) = mpsc::unbounded_channel();
        let happened = futures::stream::unfold(happened, async |mut happened| {
            happened.recv().await.map(|event| (event, happened))
        });
        let task = tokio::spawn(started.run(happened, touches));
        Self { inbox, overlay, guard, touched, events, task, changes, fails, refuses, late, names, directory }
    }

    /// As if the daemon were killed and started again.
    async fn restart(self, lease: Option<Lease>) -> Self {
        self.task.abort();
        drop(self.task.await);
        Self::run(lease, self.directory).await
    }

    async fn add(&self, n: u8, namespace: OwnedFd) -> Result<std::net::Ipv4Addr, Reason> {
        let wanted = walk::wanted(n);
        self.inbox.add(wanted, namespace).await.map(|link| link.addr.get())
    }

    async fn delete(&self, n: u8) -> Result<(), Reason> {
        self.inbox.delete(walk::handle(n), "eth0".parse().unwrap()).await
    }

    /// The change with this number, counted from now, fails.
    fn fail(&self, n: usize) {
        self.fails.store(self.changes.load(Ordering::Relaxed) + n, Ordering::Relaxed);
    }

    /// Nothing is left: no container, no link, and all five addresses are free.
    async fn empty(&self) {
        let deadline = Instant::now() + Duration::from_secs(20);
        loop {
            let status = self.inbox.status().await;
            if status.containers.is_empty() && status.free_addresses == 5 && links() + limited() == 0 {
                return;
            }
            assert!(Instant::now() < deadline, "{status:?}, {} links, {} limited", links(), limited());
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
    }
}

fn namespace() -> OwnedFd {
    let made = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network namespace: run the tests as root");
        File::open("/proc/thread-self/ns/net").unwrap().into()
    });
    made.join().unwrap()
}

fn own_lease() -> Option<Lease> {
    Some(Lease::new(walk::underlay(100), walk::subnet(1)))
}

/// In a network namespace and a runtime of its own.
fn within<F: Future<Output = ()>>(test: impl FnOnce() -> F + Send + 'static) {
    let done = std::thread::spawn(|| {
        unshare(CloneFlags::CLONE_NEWNET).expect("unshare a network namespace: run the tests as root");
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
        runtime.block_on(test());
    });
    done.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic));
}

#[test]
fn whichever_change_of_an_add_fails_nothing_is_left_and_the_next_one_works() {
    within(async || {
        let world = World::start(own_lease()).await;
        // Who has limits both ways has the most that can fail.
        for n in 0..4 {
            world.fail(n);
            let added = world.add(3, namespace()).await;
            world.fails.store(NEVER, Ordering::Relaxed);
            match added {
                Err(reason) => assert!(reason.to_string().contains("injected"), "{reason}"),
                Ok(_) => {
                    assert!(n > 1, "the first changes of an ADD are its link and its limits");
                    world.delete(3).await.unwrap();
                }
            }
            world.empty().await;
        }
        let kept = namespace();
        world.add(3, kept.try_clone().unwrap()).await.unwrap();
        assert_eq!(links(), 1);
    });
}

fn nft(command: &str) -> String {
    let output = Command::new("nft").args(command.split_whitespace()).output().unwrap();
    assert!(output.status.success(), "nft {command}: {}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).unwrap()
}

/// Our table without what counts, its elements in order. Empty if it is not there.
fn table() -> String {
    let output = Command::new("nft").args(["-s", "list", "table", "inet", "weft"]).output().unwrap();
    let text = String::from_utf8(output.stdout).unwrap();
    let mut words: Vec<&str> = text.split([',', '\n']).map(str::trim).collect();
    words.sort_unstable();
    words.join("\n")
}

async fn wait_for(done: impl Fn() -> bool, what: &str) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while !done() {
        assert!(Instant::now() < deadline, "not in time: {what}\n{}", nft("list ruleset"));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

#[test]
fn a_delete_that_fails_is_said_so_and_succeeds_when_asked_again() {
    within(async || {
        let world = World::start(own_lease()).await;
        // Its limits, and its link.
        for n in 0..2 {
            let kept = namespace();
            world.add(3, kept.try_clone().unwrap()).await.unwrap();
            assert_eq!(limited(), 1);
            world.fail(n);
            let reason = world.delete(3).await.unwrap_err();
            assert!(reason.to_string().contains("injected"), "{reason}");
            world.delete(3).await.unwrap();
            world.delete(3).await.unwrap();
            world.empty().await;
        }
    });
}

#[test]
fn what_cannot_be_laid_inside_is_taken_back() {
    within(async || {
        let world = World::start(own_lease()).await;
        // Not a network namespace: the link cannot be born there.
        let wrong: OwnedFd = File::open("/proc/self/ns/mnt").unwrap().into();
        world.add(1, wrong).await.unwrap_err();
        world.empty().await;
        world.add(1, namespace()).await.unwrap();
    });
}

#[test]
fn a_caller_that_has_gone_leaves_nothing() {
    within(async || {
        let world = World::start(own_lease()).await;
        for wait in [0, 1, 2, 5] {
            let call = world.add(1, namespace());
            drop(tokio::time::timeout(Duration::from_millis(wait), call).await);
            // Whether it was made in time or not: a DEL as a runtime sends it.
            world.delete(1).await.unwrap();
            world.empty().await;
        }
    });
}

/// Who waits no longer than a call may take is told so by its own side, and has nothing to take back.
#[test]
fn what_the_kernel_does_too_late_is_taken_back_or_done_without_the_caller() {
    within(async || {
        let world = World::start(own_lease()).await;
        let kept = namespace();
        for _ in 0..3 {
            world.late.store(true, Ordering::Relaxed);
            let call = world.add(3, kept.try_clone().unwrap());
            tokio::time::timeout(LATE / 4, call).await.unwrap_err();
            world.late.store(false, Ordering::Relaxed);
            world.empty().await;
            world.add(3, kept.try_clone().unwrap()).await.unwrap();
            world.late.store(true, Ordering::Relaxed);
            tokio::time::timeout(LATE / 4, world.delete(3)).await.unwrap_err();
            world.late.store(false, Ordering::Relaxed);
            world.empty().await;
            world.delete(3).await.unwrap();
        }
    });
}

#[test]
fn five_containers_fill_a_small_subnet_and_twenty_at_once_share_waves() {
    within(async || {
        let world = World::start(own_lease()).await;
        let calls = (0..20).map(|n| world.add(n, namespace()));
        let answers = futures::future::join_all(calls).await;
        let added: std::collections::BTreeSet<_> = answers.iter().flatten().collect();
        assert_eq!(added.len(), 5, "{answers:?}");
        let full = |answer: &Result<_, Reason>| matches!(answer, Err(Reason::SubnetFull { .. }));
        assert_eq!(answers.iter().filter(|answer| full(answer)).count(), 15);
        let again = world.add(0, namespace()).await;
        assert!(matches!(again, Err(Reason::AlreadyAdded { .. })), "{again:?}");
    });
}

#[test]
fn without_a_lease_or_fenced_nothing_is_added_and_what_is_there_stays() {
    within(async || {
        let world = World::start(None).await;
        let none = world.add(1, namespace()).await;
        assert!(matches!(none, Err(Reason::NoLeaseYet { .. })), "{none:?}");
        world.overlay.send_modify(|overlay| {
            overlay.table = Some((Lease::new(walk::underlay(100), walk::subnet(1)), Peers::new()));
        });
        let kept = namespace();
        world.add(1, kept.try_clone().unwrap()).await.unwrap();
        let conflict = Reason::LeaseConflict { holder: "another".into() };
        world.overlay.send_modify(|overlay| overlay.fenced = Some(conflict.clone()));
        assert_eq!(world.add(2, namespace()).await, Err(conflict));
        assert_eq!(links(), 1);
        world.overlay.send_modify(|overlay| overlay.fenced = None);
        world.add(2, namespace()).await.unwrap();
    });
}

/// docs/traffic-log.md: switched while it runs, in one transaction; who asks for it hears when it is in the kernel.
#[test]
fn the_log_of_traffic_between_containers_is_switched_at_once() {
    within(async || {
        let world = World::start(own_lease()).await;
        let kept = namespace();
        world.add(1, kept.try_clone().unwrap()).await.unwrap();
        let logs = || {
            let output = Command::new("nft").args(["list", "table", "inet", "weft"]).output().unwrap();
            String::from_utf8(output.stdout).unwrap().contains("weft:denied-c2c")
        };
        assert!(!logs());
        assert_eq!(world.inbox.log_c2c(None).await, Ok(false));
        for on in [true, false, true] {
            assert_eq!(world.inbox.log_c2c(Some(on)).await, Ok(on));
            assert_eq!((logs(), world.inbox.log_c2c(None).await), (on, Ok(on)));
        }
        world.refuses.store(0, Ordering::Relaxed);
        let refused = world.inbox.log_c2c(Some(false)).await.unwrap_err().to_string();
        assert!(refused.contains("injected"), "{refused}");
        world.refuses.store(NEVER, Ordering::Relaxed);
        let deadline = Instant::now() + Duration::from_secs(20);
        while logs() {
            assert!(Instant::now() < deadline, "what was refused is tried again");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
        let size = world.inbox.measure().await.unwrap();
        assert!(size.rules > 20 && size.elements > 5, "{size:?}");
    });
}
